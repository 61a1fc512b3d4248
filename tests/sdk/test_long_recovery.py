"""A hundred thousand missed publications through an unmodified SDK, and what they cost the server.

PROTOCOL 11.3, 11.5; promises 3 and 7: recovery has no length limit of the engine's own, and memory per connection is
bounded whatever was missed.
"""

import asyncio
import time
from pathlib import Path

import pytest
from instruments import Kind, Line, back_end, batched, complaints, config, playing, publish
from support import Process

from server.history import QUEUE_PUBLICATIONS, Draft, Retention
from server.history.sqlite import SqliteHistory

CHANNEL = "chat:long"
AT_ONCE = 5
"""Publications under way at a time while somebody recovers."""

GROWTH_KB = 20 * 1024


def memory_kb(server: Process, name: str) -> int:
    """``VmRSS`` (what the process holds now) or ``VmHWM`` (the most it ever held), in KiB."""
    assert server.popen is not None
    for line in Path(f"/proc/{server.popen.pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise AssertionError(f"no {name}")


async def fill(file: Path, first: int, last: int) -> None:
    """Store ``{"n": number}`` for each number up to ``last``, through a history of our own while no server runs."""
    day_ms = 86_400_000
    retention = Retention(-1, day_ms, 30 * day_ms)
    history = SqliteHistory(file)
    await history.open()
    try:
        for numbers in batched(range(first, last + 1), QUEUE_PUBLICATIONS // 2):
            drafts = [Draft(b'{"n":%d}' % number) for number in numbers]
            now_ms = int(time.time() * 1000)
            await asyncio.gather(*(history.append(CHANNEL, draft, retention, now_ms) for draft in drafts))
    finally:
        await history.close()


@pytest.mark.parametrize("missed", [1_000, 100_000])
@pytest.mark.parametrize("kind", [Kind("python", "json"), Kind("js", "protobuf"), Kind("js", "json", "sse")], ids=str)
async def test_recovers_all_at_a_constant_cost(kind: Kind, missed: int, tmp_path: Path) -> None:
    """Whoever missed 1,000 or 100,000 gets all of them, once and in order, on a busy channel, for under 20 MB."""
    file = tmp_path / "history.db"
    caught_up = asyncio.Event()
    with Process(tmp_path, config(sqlite={"path": str(file)})) as server:
        async with Line(server.port) as relay, playing(kind, relay.url) as player, back_end(server.port) as api:

            async def keep_busy() -> int:
                number = missed + 2
                while not caught_up.is_set():
                    await publish(api, CHANNEL, range(number, number + AT_ONCE), AT_ONCE)
                    number += AT_ONCE
                return number

            await player.subscribed(CHANNEL)
            await publish(api, CHANNEL, [1])
            assert (await player.publications(CHANNEL, 1))[0]["offset"] == 1
            with relay.severed():
                await player.next("connecting")
                assert await asyncio.to_thread(server.stop) == 0
                await fill(file, 2, missed + 1)
                await asyncio.to_thread(server.start)
                # What the first client and the first publications cost once and for all is not measured.
                async with playing(kind, server.url) as other:
                    await other.subscribed("chat:other")
                    await publish(api, "chat:other", range(200))
                    assert len(await other.publications("chat:other", 200)) == 200
                before_kb = memory_kb(server, "VmRSS")
                busy = asyncio.create_task(keep_busy())
            assert (await player.next("subscribed", CHANNEL))["recovered"]
            came = await player.publications(CHANNEL, missed)
            growth_kb = memory_kb(server, "VmHWM") - before_kb
            caught_up.set()
            end = await busy
            assert end > missed + 2, "nothing was published meanwhile"
            came += await player.publications(CHANNEL, end - missed - 2)

            assert [one["offset"] for one in came] == list(range(2, end))
            assert [one["data"]["n"] for one in came[:missed]] == list(range(2, missed + 2))
            assert sorted(one["data"]["n"] for one in came[missed:]) == list(range(missed + 2, end))
            assert not player.untaken("publication", CHANNEL)
            assert growth_kb < GROWTH_KB, f"{missed} missed publications cost {growth_kb} KiB"
        assert complaints(server) == []
