"""What history in MongoDB reaches, on a replica set of three that this starts: ``python benchmarks/history.py``.

Each figure comes from processes of its own, which are this program again with
``--part``.  A publisher publishes, waits for its acknowledgement, and goes on.
Ratios matter, not figures: all share this machine with three ``mongod``.
"""

import argparse
import asyncio
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from server.errors import Refused, Unavailable  # noqa: E402
from server.history import Draft  # noqa: E402
from server.history.mongo import MongoHistory  # noqa: E402
from server.history.mongo_scheme import LOG, commit_document, pack  # noqa: E402
from server.history.mongo_server import MongoServer  # noqa: E402
from server.settings import MongoSettings  # noqa: E402
from server.stream import Retention  # noqa: E402

PUBLISHERS = 200
CHANNELS = 200
PAYLOAD = b'{"text":"' + b"x" * 119 + b'"}'
FOREVER = Retention(-1, -1, -1)
PAUSE_S = 0.05


def now_ms() -> int:
    """Unix milliseconds."""
    return int(time.time() * 1000)


async def publishing(publish: Callable[[int], Awaitable[object]], publishers: int, seconds: float) -> list[float]:
    """Let ``publishers`` publish for so long; gives what each acknowledgement took, in seconds."""
    took: list[float] = []
    ends = time.monotonic() + seconds

    async def publisher(number: int) -> None:
        while (began := time.monotonic()) < ends:
            try:
                await publish(number)
            except (Unavailable, Refused) as error:
                print(f"not stored: {error}", file=sys.stderr)
            else:
                took.append(time.monotonic() - began)

    await asyncio.gather(*map(publisher, range(publishers)))
    return took


async def one_insert_each(settings: MongoSettings, seconds: float, publishers: int) -> dict[str, float]:
    """A document for each publication, to a slot that is known to be free: what history does not do."""
    server = MongoServer(settings)
    await server.open()
    slots = [itertools.count(1) for _ in range(publishers)]

    async def publish(number: int) -> None:
        channel, slot, at_ms = f"naive {number}", next(slots[number]), now_ms()
        document = commit_document(channel, slot, at_ms, bytes(12), pack([(at_ms, PAYLOAD, None)]), 1, [])
        await server.attempt(lambda: server._collections[LOG].insert_one(document))

    took = await publishing(publish, publishers, seconds)
    await server.close()
    return summary(took, seconds)


async def gathered(settings: MongoSettings, seconds: float, publishers: int, channels: int) -> dict[str, float]:
    """Publications by history, to so many channels."""
    history = MongoHistory(settings)
    await history.open()

    async def publish(number: int) -> object:
        return await history.append(f"channel {number % channels}", Draft(PAYLOAD), FOREVER, now_ms())

    await publish(0)
    took = await publishing(publish, publishers, seconds)
    await history.close()
    return summary(took, seconds)


async def beside_a_flood(settings: MongoSettings, seconds: float, publishers: int, channels: int) -> dict[str, float]:
    """One channel flooded by all publishers at once; gives what those of other channels wait, who take pauses."""
    history = MongoHistory(settings)
    await history.open()
    others: list[float] = []
    ends = time.monotonic() + seconds

    async def other(number: int) -> None:
        await asyncio.sleep(PAUSE_S * number / channels)
        while time.monotonic() < ends:
            began = time.monotonic()
            await history.append(f"quiet {number}", Draft(PAYLOAD), FOREVER, now_ms())
            others.append(time.monotonic() - began)
            await asyncio.sleep(PAUSE_S)

    async def flood(number: int) -> object:
        return await history.append("flooded", Draft(PAYLOAD), FOREVER, now_ms())

    await asyncio.gather(*(history.append(f"quiet {n}", Draft(PAYLOAD), FOREVER, now_ms()) for n in range(channels)))
    flooded, *_ = await asyncio.gather(
        publishing(flood, publishers, seconds), *(other(number) for number in range(channels - 1))
    )
    await history.close()
    return {**summary(others, seconds), "flooded_per_s": len(flooded) / seconds}


PARTS: dict[str, Callable[..., Coroutine[Any, Any, dict[str, float]]]] = {
    "one insert each": one_insert_each,
    "gathered": gathered,
    "beside a flood": beside_a_flood,
}


def summary(took: list[float], seconds: float) -> dict[str, float]:
    """Acknowledged publications per second, and what half and 99 of 100 waited at most."""
    took.sort()
    return {
        "per_s": len(took) / seconds,
        "p50_ms": took[len(took) // 2] * 1000,
        "p99_ms": took[len(took) * 99 // 100] * 1000,
    }


def run(part: str, settings: dict[str, str], processes: int = 1, **arguments: Any) -> dict[str, float]:
    """Run a part in so many processes at once; rates are summed up, waits are the worst."""
    words = [sys.executable, __file__, "--part", json.dumps([part, settings, arguments])]
    running = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    results = [json.loads(each.communicate()[0]) for each in running]
    return {
        name: sum(result[name] for result in results)
        if name.endswith("per_s")
        else max(result[name] for result in results)
        for name in results[0]
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each figure (8)")
    parser.add_argument("--driver", choices=["motor", "pymongo"], action="append", help="one of them (both)")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        part, settings, options = json.loads(arguments.part)
        print(json.dumps(asyncio.run(PARTS[part](MongoSettings.model_validate(settings), **options))))
        return

    from mongod import ReplicaSet

    with ReplicaSet() as replica_set:
        for driver in arguments.driver or ["motor", "pymongo"]:
            measure(replica_set.url, driver, arguments.seconds)


def measure(url: str, driver: str, seconds: float) -> None:
    """All figures of one driver, as a table."""
    numbers = itertools.count()

    def figures(part: str, processes: int = 1, **options: Any) -> dict[str, float]:
        database = f"bench_{driver}_{next(numbers)}"
        settings = {"url": url, "database": database, "driver": driver, "publish_timeout": "30s"}
        return run(part, settings, processes, seconds=seconds, **options)

    naive = figures("one insert each", publishers=PUBLISHERS)
    rows = [("one insert each", naive, 1.0)]

    def add(name: str, found: dict[str, float], to: dict[str, float]) -> None:
        rows.append((name, found, found["per_s"] / to["per_s"]))

    add(f"history, {CHANNELS} channels", figures("gathered", publishers=PUBLISHERS, channels=CHANNELS), naive)
    one = figures("gathered", publishers=PUBLISHERS, channels=1)
    add("history, one channel", one, naive)
    add("the same, three processes with as many each", figures("gathered", 3, publishers=PUBLISHERS, channels=1), one)
    add(
        "the same, three processes with a third each",
        figures("gathered", 3, publishers=PUBLISHERS // 3, channels=1),
        one,
    )
    beside = figures("beside a flood", publishers=PUBLISHERS, channels=CHANNELS)
    print(f"\n{driver}, {PUBLISHERS} publishers, {len(PAYLOAD)} bytes each\n")
    print("| what | publications/s | of the one it is held against | p50 ms | p99 ms |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, found, ratio in rows:
        print(f"| {name} | {found['per_s']:,.0f} | {ratio:.2f} | {found['p50_ms']:.1f} | {found['p99_ms']:.1f} |")
    ratio = beside["p99_ms"] / beside["p50_ms"]
    print(
        f"| {CHANNELS - 1} channels beside a flooded one ({beside['flooded_per_s']:,.0f}/s) | {beside['per_s']:,.0f} "
        f"| p99 is {ratio:.1f} times the median | {beside['p50_ms']:.1f} | {beside['p99_ms']:.1f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
