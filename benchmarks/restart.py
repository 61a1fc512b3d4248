"""What a restart of one process costs history and the clients of the others: ``make restart``.

Three processes over a replica set of three and a Redis, all of which this starts.
Each client of the *crowd* follows a room and some channels of its own, so that
history has to be read for it where it comes back.  The *watchers* are at two
processes and publish a number of times a second to one another; the third process is
told to go (SIGTERM, no grace), and its clients come to the two.  The table says, for
each run, what MongoDB was asked in the meantime and how long the watchers'
publications took, from before they were sent until they were there.

The runs are without a restart, with the pace that is the default, all at once, and
all at once where nothing but the machine limits who comes back.  All share this
machine's cores, crowd and databases included, so rows compare, and figures of one
machine do not compare with another's.
"""

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from itertools import cycle, pairwise
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "cluster")]

from crowd import SocketVoice, World, call_api  # noqa: E402
from flock import Flock  # noqa: E402
from mongod import Member, ReplicaSet, fresh_database  # noqa: E402
from redis_server import RedisServer  # noqa: E402
from support import Process, config  # noqa: E402

from benchmarks.figures import table  # noqa: E402
from run import allow_files  # noqa: E402

PROCESSES = 3
ROOM = 20
"""Clients that share a room."""

WATCHERS = 20
VOICES = 4
PAUSE_S = 0.04
"""Between two publications of one of the watchers' voices."""

NOBODY_LIMITS = {"recovery_rate_limit": 0, "concurrent_recovery_limit": 0, "connection_rate_limit": 0}
LOOK_S = 0.25
CHECK_S = 0.02
CALM_S = 2.0
START_S = 60.0
BROADCAST = 500
"""Channels that are filled by one call."""


@dataclass
class Place:
    """One process, as clients see it."""

    name: str
    url: str
    http: str


class Run(NamedTuple):
    """A row: ``pace`` is ``None`` where nobody is sent away; ``limits`` are settings of the section ``client``."""

    name: str
    pace: int | None
    limits: Mapping[str, int]


RUNS = (
    Run("no restart", None, {}),
    Run("sent away, 100 a second", 100, {}),
    Run("sent away all at once", 0, {}),
    Run("… and no limit to who comes back", 0, NOBODY_LIMITS),
)


class Seen(NamedTuple):
    """What one run showed; times in ms."""

    sent_away: int
    seconds: float
    asked: int
    asked_most: float
    p50_ms: float
    p99_ms: float
    most_ms: float
    put_off: int
    lost: int


# --- the parts that are processes of their own ------------------------------------------------
def _say(**said: Any) -> None:
    print(json.dumps(said), flush=True)


async def _until_told() -> None:
    """Wait for the end of what we are told."""
    await asyncio.to_thread(sys.stdin.read)


async def crowd(places: Sequence[Place], wishes: Sequence[Sequence[str]]) -> None:
    """Come, say so when all are there, and again whenever some were sent away and all are there again."""
    world = World(places, Random(1), time.monotonic)
    flock = Flock(world)
    await flock.gather(wishes, places)
    _say(back=0, at=time.monotonic())
    told, back = asyncio.create_task(_until_told()), 0
    while not told.done():
        await asyncio.wait([told], timeout=CHECK_S)
        gone = len(flock.goodbyes)
        if gone > back and all(follower.settled for follower in flock.followers):
            back = gone
            _say(back=back, at=time.monotonic())
    flock.scatter()
    codes = Counter(bye.code for bye in flock.goodbyes)
    _say(codes=codes, complaints=world.complaints, put_off=world.counts["subscriptions put off"])


async def watchers(places: Sequence[Place]) -> None:
    """Publish to one another until told to end; then say when each publication was sent and how long it took (s)."""
    times: list[tuple[float, float]] = []

    def note(data: Mapping[str, Any]) -> None:
        times.append((data["at"], time.monotonic() - data["at"]))

    world = World(places, Random(2), time.monotonic)
    flock = Flock(world, note)
    channels = [f"chat:watched{number}" for number in range(VOICES)]
    await flock.gather([channels] * WATCHERS, places)
    _say(here=True)
    told = asyncio.create_task(_until_told())

    async def talk(channel: str, voice: SocketVoice) -> int:
        said = 0
        while not told.done():
            answer = await voice.publish(channel, {"mark": f"{channel}.{said}", "at": time.monotonic()}, "")
            said += answer.outcome == "acknowledged"
            await asyncio.sleep(PAUSE_S)
        await voice.drop()
        return said

    voices = [SocketVoice(world, place) for place, _ in zip(cycle(places), channels, strict=False)]
    said = await asyncio.gather(*map(talk, channels, voices))
    tops = dict(zip(channels, said, strict=True))
    await flock.arrived(tops, 10.0)
    lost = sum(max(0, tops[name] - len(heard.lines)) for one in flock.followers for name, heard in one.heard.items())
    flock.scatter()
    _say(times=times, lost=lost + len(flock.goodbyes), complaints=world.complaints)


class Part:
    """One of them as a process; in the end it is told to end, if it has not."""

    def __init__(self, name: str, *arguments: Any) -> None:
        command = [sys.executable, "-m", "benchmarks.restart", "--part", name]
        self._popen = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._popen.stdin is not None
        self._popen.stdin.write(json.dumps(arguments, default=asdict) + "\n")
        self._popen.stdin.flush()

    def said(self) -> dict[str, Any]:
        """What it says next; ends the benchmark if that is nothing."""
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        if not line:
            raise SystemExit(f"a part of the benchmark failed with {self._popen.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self) -> dict[str, Any]:
        """Tell it to end; its last words."""
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        found = self.said()
        self._popen.wait()
        return found

    def __enter__(self) -> "Part":
        return self

    def __exit__(self, *_: object) -> None:
        self._popen.kill()
        for stream in (self._popen.stdin, self._popen.stdout):
            assert stream is not None
            stream.close()
        self._popen.wait()


# --- what MongoDB is asked --------------------------------------------------------------------
class Questions:
    """How many queries the primary has had, looked at several times a second, inside ``with``."""

    def __init__(self, primary: Member) -> None:
        self._primary = primary
        self._looks: list[tuple[float, int]] = []
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._enough.wait(LOOK_S):
            status = self._primary.command({"serverStatus": 1})
            self._looks.append((time.monotonic(), int(status["opcounters"]["query"])))

    def between(self, began: float, ended: float) -> tuple[int, float]:
        """How many there were in all, and how many in the busiest moment, by the second."""
        looks = [look for look in self._looks if began - LOOK_S <= look[0] <= ended + LOOK_S]
        rates = [(more - less) / (later - sooner) for (sooner, less), (later, more) in pairwise(looks)]
        return looks[-1][1] - looks[0][1], max(rates)

    def __enter__(self) -> "Questions":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._thread.join()


# --- one run ------------------------------------------------------------------------------------
def wishes_of(clients: int, own: int) -> list[list[str]]:
    """The channels of each client: a room, and those that nobody else follows."""
    return [
        [f"chat:room{number // ROOM}", *(f"chat:own{number}.{nth}" for nth in range(own))] for number in range(clients)
    ]


def fill(place: Place, channels: Sequence[str]) -> None:
    """One publication in each, so that there is something that one could have missed."""

    async def broadcast() -> None:
        for first in range(0, len(channels), BROADCAST):
            body = {"channels": channels[first : first + BROADCAST], "data": {"mark": "first"}}
            answer = await call_api(place, "broadcast", body, 30.0)
            assert "result" in answer, answer

    asyncio.run(broadcast())


def start(stack: ExitStack, folder: Path, run: Run, stores: Mapping[str, Any]) -> list[Process]:
    """The processes of one run, ready."""
    limits = {"connection_rate_limit": 500, "recovery_rate_limit": 200}  # as they come
    no_limit = {"address_connection_limit": 0, "user_connection_limit": 0}
    chosen = config(
        client={**limits, **no_limit, **run.limits},
        shutdown={"grace": "0s", "pace": run.pace or 0, "timeout": "60s"},
        **stores,
    )
    processes = []
    for number in range(PROCESSES):
        home = folder / str(number)
        home.mkdir()
        process = Process(home, chosen)
        stack.callback(process.kill)
        processes.append(process)
    with ThreadPoolExecutor() as threads:
        list(threads.map(Process.start, processes))
    for process in processes:
        until_ready(process)
    return processes


def until_ready(process: Process) -> None:
    """Wait until it says so."""
    ends = time.monotonic() + START_S
    while time.monotonic() < ends:
        with suppress(urllib.error.URLError), urllib.request.urlopen(f"{process.http}/health/ready", timeout=5):
            return
        time.sleep(LOOK_S)
    raise SystemExit(f"a process is not ready: {process.log.read_text()[-2000:]}")


def measure(
    run: Run, wishes: Sequence[Sequence[str]], seconds: float, stores: Mapping[str, Any], primary: Member
) -> Seen:
    """One run, on processes of its own."""
    with tempfile.TemporaryDirectory(prefix="waterspout-restart-") as folder, ExitStack() as stack:
        processes = start(stack, Path(folder), run, stores)
        places = [Place(f"process {n}", process.url, process.http) for n, process in enumerate(processes)]
        fill(places[0], sorted({channel for channels in wishes for channel in channels}))
        watching = stack.enter_context(Part("watchers", places[1:]))
        watching.said()
        coming = stack.enter_context(Part("crowd", places, wishes))
        coming.said()
        questions = stack.enter_context(Questions(primary))
        time.sleep(CALM_S)
        began, sent_away = time.monotonic(), 0
        if run.pace is None:
            time.sleep(seconds)
            ended = time.monotonic()
        else:
            processes[0].send(signal.SIGTERM)
            sent_away = len(wishes[::PROCESSES])
            while (word := coming.said())["back"] < sent_away:
                continue
            ended = word["at"]
        time.sleep(2 * LOOK_S)
        asked, asked_most = questions.between(began, ended)
        watched, came = watching.end(), coming.end()
        if faults := [*watched["complaints"], *came["complaints"], *(set(came["codes"]) - {"3001"})]:
            raise SystemExit(f"{run.name}: {faults}")
    times = sorted(1000 * took for at, took in watched["times"] if began <= at <= ended)
    p50, p99 = (times[int(len(times) * share)] for share in (0.5, 0.99))
    return Seen(sent_away, ended - began, asked, asked_most, p50, p99, times[-1], came["put_off"], watched["lost"])


def row(name: str, seen: Seen) -> list[str]:
    """The row of a table."""
    return [
        name,
        f"{seen.sent_away:,}",
        f"{seen.seconds:.1f}",
        f"{seen.asked / seen.seconds:,.0f}",
        f"{seen.asked_most:,.0f}",
        f"{seen.p50_ms:.1f}",
        f"{seen.p99_ms:.1f}",
        f"{seen.most_ms:.0f}",
        f"{seen.put_off:,}",
        str(seen.lost),
    ]


HEADINGS = (
    *("run", "sent away", "s until all were back", "history queries/s", "at most"),
    *("p50 ms of the others", "p99 ms", "longest ms", "refused for now", "lost"),
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clients", type=int, default=1_200, help="of all three processes (1200)")
    parser.add_argument("--own", type=int, default=1, help="channels that each has for itself (1)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of the run without a restart (8)")
    parser.add_argument("--limit", type=int, help="client.recovery_rate_limit, where there is one")
    parser.add_argument("--part", choices=["crowd", "watchers"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    allow_files()
    if arguments.part:
        places, *rest = json.loads(sys.stdin.readline())
        part = crowd if arguments.part == "crowd" else watchers
        asyncio.run(part([Place(**place) for place in places], *rest))
        return
    wishes = wishes_of(arguments.clients, arguments.own)
    rows = []
    with ReplicaSet() as replica_set, RedisServer() as redis:
        for run in RUNS:
            database = fresh_database()
            stores = {
                "mongo": {"url": replica_set.url, "database": database},
                "redis": {"url": redis.url, "prefix": database},
            }
            if arguments.limit is not None:
                run = run._replace(limits={"recovery_rate_limit": arguments.limit, **run.limits})
            rows.append(row(run.name, measure(run, wishes, arguments.seconds, stores, replica_set.primary())))
            print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    print(f"{arguments.clients:,} clients; each follows a room, and {arguments.own} more channels alone\n")
    print(table(HEADINGS, rows))


if __name__ == "__main__":
    main()
