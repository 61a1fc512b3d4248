"""MongoDB history when things go wrong: elections, kills, stops, lost answers, races between processes.

The replica set is real and shared with the rest of the run, so what hurts it
does so inside ``disturbing``.  Several ``MongoHistory`` stand for as many
processes: they share nothing but the database.

A machine that is busy is no fault: histories wait for ``PATIENCE_S``, and only
those that are hurt give up as soon as their test says.
"""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

import bson
import pymongo
import pytest
from conftest import ExpectedLog
from mongod import Member, Mongod, ReplicaSet, disturbing, fresh_database, shared_set
from patience import awake, impatient
from ports import free_port
from proxy import Proxy
from pymongo.database import Database
from pymongo.errors import NotPrimaryError

from server.errors import Refused, Unavailable
from server.history import QUEUE_PUBLICATIONS, Appended, Draft, Version, mongo_places
from server.history.mongo import MongoHistory
from server.history.mongo_looks import LOOKED_AT
from server.history.mongo_scheme import GUARD_MS, TRUST_S, commit_document, pack
from server.history.mongo_server import MongoServer
from server.history.mongo_sweep import ERASE_RECORDS, ERASE_STEPS
from server.settings import MongoSettings
from server.stream import Page, Position, Publication, Retention

NOW = 1_800_000_000_000
FOREVER = Retention(-1, -1, -1)
PATIENCE_S = 120.0
DRIVERS = ["motor", "pymongo"]
every_driver = pytest.mark.parametrize("driver", DRIVERS)


def made(database: str, **options: Any) -> MongoHistory:
    """A history in ``database`` of the shared set, not open yet."""
    ttl_ms = options.pop("idempotency_ttl_ms", 86_400_000)
    patience = f"{PATIENCE_S:g}s"
    chosen = {"url": shared_set().url, "database": database, "publish_timeout": patience, **options}
    return MongoHistory(MongoSettings.model_validate(chosen), idempotency_ttl_ms=ttl_ms)


@asynccontextmanager
async def opened(database: str, **options: Any) -> AsyncIterator[MongoHistory]:
    """The same, open."""
    history = made(database, **options)
    await history.open()
    try:
        yield history
    finally:
        await history.close()


@contextmanager
def inside(database: str) -> Iterator[Database[dict[str, Any]]]:
    """The database as another program sees it."""
    with pymongo.MongoClient[dict[str, Any]](shared_set().url, w="majority") as client:
        yield client[database]


@pytest.fixture
def database() -> Iterator[str]:
    """A database of this test's own."""
    name = fresh_database()
    yield name
    shared_set().drop(name)


async def say(history: MongoHistory, channel: str, *texts: str, at_ms: int = NOW) -> list[int]:
    """Append some texts at once; gives their offsets."""
    appended = await asyncio.gather(*(history.append(channel, Draft(text.encode()), FOREVER, at_ms) for text in texts))
    return [each.position.offset for each in appended]


async def everything(history: MongoHistory, channel: str) -> Page:
    """All that is kept of a channel; its offsets have no hole."""
    page = await history.read(channel, FOREVER, NOW, limit=-1, max_bytes=1 << 30)
    assert [each.offset for each in page.publications] == list(range(page.floor + 1, page.top.offset + 1))
    return page


async def until(holds: Callable[[], Awaitable[bool]], what: str) -> None:
    """Ask again and again; it is somebody else's doing that is waited for."""
    ends = time.monotonic() + PATIENCE_S
    while not await holds():
        assert time.monotonic() < ends, what
        await asyncio.sleep(0.05)


async def swept(history: MongoHistory) -> bool:
    """Whether a sweep gets through."""
    try:
        await history.sweep(lambda channel: FOREVER, NOW)
    except Unavailable:
        return False
    return True


async def retried(history: MongoHistory, channel: str, draft: Draft) -> Appended:
    """Append until it is known, as a publisher with an idempotency key may."""
    ends = time.monotonic() + PATIENCE_S
    while True:
        try:
            return await history.append(channel, draft, FOREVER, NOW)
        except Unavailable:
            assert time.monotonic() < ends, "it never got through"


# --- what the driver may say ---------------------------------------------------------

IN_TIME_S = 15.0
"""However busy the machine: the driver by itself would wait for 30 s."""
HURT_TIMEOUT = "12s"
"""For who is hurt and goes on all the same; a third of it is the time of one attempt."""
NO_ANSWER_MS = 4_300
"""Longer than such an attempt."""

FAILURES: dict[str, tuple[int, dict[str, Any]]] = {
    "step-down": (2, {"errorCode": 11602, "errorLabels": []}),
    "not primary": (2, {"errorCode": 10107, "errorLabels": []}),
    "shutdown": (2, {"errorCode": 91, "errorLabels": []}),
    "closed connection": (3, {"closeConnection": True}),
    "no answer": (1, {"blockConnection": True, "blockTimeMS": NO_ANSWER_MS}),
    "majority in vain": (2, {"writeConcernError": {"code": 64, "errmsg": "waiting for replication timed out"}}),
    "majority interrupted": (1, {"writeConcernError": {"code": 11602, "errmsg": "interrupted", "errorLabels": []}}),
    "a refusal": (1, {"errorCode": 8, "errorLabels": []}),
}


@every_driver
@pytest.mark.parametrize("failure", FAILURES)
async def test_what_fails_once_is_stored_once(driver: str, failure: str, database: str, log: ExpectedLog) -> None:
    """Whatever the driver raises, whether the write was done or not: each publication is there once, none is lost."""
    log.expect("history.commit_failed", "history.read_failed")
    times, how = FAILURES[failure]
    heard: list[Publication] = []
    primary = shared_set().primary()
    url = f"{shared_set().url}&heartbeatFrequencyMS=500"  # a member that shut down is trusted again after the next one
    async with opened(database, url=url, driver=driver, publish_timeout=HURT_TIMEOUT) as history:
        history.on_commit = lambda channel, epoch, publications: heard.extend(publications)
        await say(history, "a", "before")
        try:
            await asyncio.to_thread(lambda: primary.fail("insert", times=times, **how))
            assert await say(history, "a", "1", "2", "3") == [2, 3, 4]
        finally:
            primary.fail_no_more()
        assert await say(history, "a", "after") == [5]
        assert list((await everything(history, "a")).publications) == heard
        assert [each.data for each in heard] == [b"before", b"1", b"2", b"3", b"after"]
        assert history.trouble == ""


async def test_a_failing_read_is_tried_again(database: str, log: ExpectedLog) -> None:
    """A read, tops and remove outlast an answer that is lost."""
    log.expect("history.read_failed")
    primary = shared_set().primary()
    async with opened(database) as history:
        await say(history, "a", "1", "2")
        try:
            for how in ({"errorCode": 11602}, {"closeConnection": True}):
                primary.fail("find", "update", times=3, **how)
                assert len((await everything(history, "a")).publications) == 2
                primary.fail("find", "update", times=3, **how)
                assert (await history.tops("a"))["a"].offset == 2
            primary.fail("find", "update", times=3, errorCode=11602)
            await history.remove("a")
        finally:
            primary.fail_no_more()
        assert (await everything(history, "a")).floor == 2


# --- members that fail --------------------------------------------------------------


async def flood(history: MongoHistory, name: str, done: asyncio.Event, channel: str) -> dict[bytes, Position]:
    """Publish until ``done``; gives what was acknowledged.  What was not may be there or not."""
    acknowledged: dict[bytes, Position] = {}

    async def publisher(number: int) -> None:
        for turn in itertools.count():
            if done.is_set():
                return
            data = f"{name}.{number}.{turn}".encode()
            try:
                acknowledged[data] = (await history.append(channel, Draft(data), FOREVER, NOW)).position
            except Unavailable:
                continue

    await asyncio.gather(*(publisher(number) for number in range(10)))
    return acknowledged


HURTS: dict[str, Callable[[ReplicaSet], object]] = {
    "step-down": lambda replica_set: replica_set.step_down(5),
    "kill": lambda replica_set: replica_set.primary().kill(),
    "stop": lambda replica_set: replica_set.primary().stop(),
}


@pytest.mark.parametrize("hurt", HURTS)
async def test_three_writers_lose_their_primary(hurt: str, database: str, log: ExpectedLog) -> None:
    """P1, P2: contending processes, a primary gone: contiguous, what was acknowledged is there, and nothing twice."""
    log.expect("history.commit_failed", "history.read_failed")
    done = asyncio.Event()
    heard: dict[int, list[tuple[int, bytes]]] = {0: [], 1: [], 2: []}
    async with AsyncExitStack() as stack:
        drivers = ("motor", "pymongo", "motor")
        histories = [
            await stack.enter_async_context(opened(database, driver=driver, publish_timeout="3s")) for driver in drivers
        ]
        for number, history in enumerate(histories):
            history.on_commit = lambda channel, epoch, publications, mine=heard[number]: mine.extend(  # type: ignore[misc]
                (each.offset, each.data) for each in publications
            )
        floods = [asyncio.ensure_future(flood(each, str(n), done, "a")) for n, each in enumerate(histories)]
        stack.callback(done.set)

        async def progress() -> None:
            wanted = {number: len(mine) + 30 for number, mine in heard.items()}
            await until(lambda: _true(all(len(heard[n]) >= count for n, count in wanted.items())), "all get their turn")

        await progress()
        with disturbing(shared_set()) as replica_set:
            await asyncio.to_thread(lambda: HURTS[hurt](replica_set))
            await asyncio.to_thread(replica_set.primary)
            await progress()
            await asyncio.to_thread(replica_set.recover)
        await progress()
        done.set()
        acknowledged: dict[bytes, Position] = {}
        for each in await asyncio.gather(*floods):
            acknowledged |= each
        # What is still in doubt comes to its end in close; another one looks.
        for history in histories:
            await history.close()
        other = await stack.enter_async_context(opened(database))
        page = await everything(other, "a")
        stored = {each.offset: each.data for each in page.publications}
        assert max(Counter(stored.values()).values()) == 1
        assert all(stored[position.offset] == data for data, position in acknowledged.items())
        told = sorted(itertools.chain(*heard.values()))
        assert told == sorted(stored.items())
        for mine in heard.values():
            assert [offset for offset, _ in mine] == sorted(offset for offset, _ in mine)


async def _true(value: bool) -> bool:
    return value


async def test_a_majority_that_cannot_be_had(database: str, log: ExpectedLog) -> None:
    """Two of three members stopped: error in time, the key says so too; then it is stored once, and told once."""
    log.expect("history.commit_failed", "history.read_failed")
    heard: list[bytes] = []
    async with opened(database, publish_timeout="1s") as history, opened(database) as other:
        history.on_commit = lambda channel, epoch, publications: heard.extend(each.data for each in publications)
        await retried(history, "a", Draft(b"before", key="before"))
        with disturbing(shared_set()) as replica_set:
            for member in replica_set.secondaries():
                member.stop()
            began = time.monotonic()
            keyed = Draft(b"keyed", key="k")
            outcomes = await asyncio.gather(
                *(history.append("a", keyed, FOREVER, NOW) for _ in range(3)),
                history.append("b", Draft(b"elsewhere"), FOREVER, NOW),
                return_exceptions=True,
            )
            assert [type(outcome) for outcome in outcomes] == [Unavailable] * 4
            assert time.monotonic() - began < IN_TIME_S
            with pytest.raises(Unavailable):
                await history.append("a", keyed, FOREVER, NOW)
            assert history.trouble
            assert heard == [b"before"]
            await asyncio.to_thread(replica_set.recover)
        again = await retried(history, "a", keyed)
        assert again.position.offset == 2
        # Told already, or by this very call: it asks for the outcome of the first one, and that comes once.
        assert heard.count(b"keyed") == 1
        assert await retried(history, "a", keyed) == Appended(again.position, repeated=True)
        await until(lambda: _true(history.trouble == ""), "all is well again")
        assert [each.data for each in (await everything(other, "a")).publications] == [b"before", b"keyed"]


async def test_away_and_back(database: str, log: ExpectedLog) -> None:
    """All members dead: everything says Unavailable in time and why; afterwards all goes on, by itself."""
    log.expect("history.commit_failed", "history.read_failed")
    async with opened(database, publish_timeout="1s") as history, opened(database) as other:
        await retried(history, "a", Draft(b"1", key="1"))
        before = Counter(each.getMessage() for each in log.records)
        with disturbing(shared_set()) as replica_set:
            for member in replica_set.members:
                member.kill()
            began = time.monotonic()
            waits: list[Awaitable[Any]] = [
                history.append("a", Draft(b"2", key="k"), FOREVER, NOW),
                history.read("a", FOREVER, NOW),
                history.read("unknown", FOREVER, NOW),
                history.tops(["a", "unknown"]),
                history.remove("a"),
                history.redact("a", 1),
                history.sweep(lambda channel: FOREVER, NOW),
            ]
            outcomes = await asyncio.gather(*waits, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [Unavailable] * len(waits)
            assert time.monotonic() - began < IN_TIME_S
            assert history.trouble
            told = Counter(each.getMessage() for each in log.records) - before
            assert told["history.commit_failed"] == told["history.read_failed"] == 1
            await asyncio.to_thread(replica_set.recover)
        await until(lambda: swept(history), "history can be swept")
        assert (await retried(history, "a", Draft(b"2", key="k"))).position.offset == 2
        await until(lambda: _true(history.trouble == ""), "all is well again")
        assert len((await everything(other, "a")).publications) == 2
    assert len(log.seen("history.commit_failed")) == len(log.seen("history.commit_recovered"))
    assert len(log.seen("history.read_failed")) == len(log.seen("history.read_recovered"))


async def test_what_nobody_sent_is_dropped_with_its_publisher(database: str, log: ExpectedLog) -> None:
    """Behind a commit in doubt: who was told that it failed is not published an hour later, and the queue is free."""
    log.expect("history.commit_failed", "history.read_failed")
    async with opened(database, publish_timeout="1s") as history, opened(database) as other:
        await retried(history, "a", Draft(b"1", key="1"))
        with disturbing(shared_set()) as replica_set:
            for member in replica_set.members:
                member.stop()
            first = asyncio.ensure_future(history.append("a", Draft(b"in doubt"), FOREVER, NOW))
            await asyncio.sleep(0)  # it is on its way before the others come
            await asyncio.sleep(0)
            for _ in range(2):
                behind = [history.append("a", Draft(b"late"), FOREVER, NOW) for _ in range(QUEUE_PUBLICATIONS - 1)]
                outcomes = await asyncio.gather(*behind, return_exceptions=True)
                assert {type(outcome) for outcome in outcomes} == {Unavailable}
            with pytest.raises(Unavailable):
                await first
            await asyncio.to_thread(replica_set.recover)
        assert (await retried(history, "a", Draft(b"after", key="after"))).position.offset == 3
        data = [each.data for each in (await everything(other, "a")).publications]
        assert data == [b"1", b"in doubt", b"after"]


@every_driver
async def test_close_has_an_end(driver: str, database: str, log: ExpectedLog) -> None:
    """With a commit in doubt and nobody answering, close ends in time, and whoever waits is told."""
    log.expect("history.commit_failed")
    async with opened(database, publish_timeout="2s", driver=driver) as history:
        await retried(history, "a", Draft(b"1", key="1"))
        with disturbing(shared_set()) as replica_set:
            for member in replica_set.members:
                member.stop()
            waiting = asyncio.ensure_future(history.append("a", Draft(b"2"), FOREVER, NOW))
            await asyncio.sleep(0)
            began = time.monotonic()
            await history.close()
            assert time.monotonic() - began < IN_TIME_S
            with pytest.raises(Unavailable):
                await waiting
            with pytest.raises(Unavailable, match="not open"):
                await history.append("a", Draft(b"3"), FOREVER, NOW)


async def test_cuts_lose_and_double_nothing(database: str, log: ExpectedLog) -> None:
    """Connections reset, then half open, with answers on the way: each key is published once, and that is known."""
    log.expect("history.commit_failed", "history.read_failed")
    proxies: list[Proxy] = []

    def advertise(port: int) -> int:
        proxies.append(Proxy("127.0.0.1", port))
        return proxies[-1].port

    replica_set = ReplicaSet(advertise=advertise)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(asyncio.to_thread, replica_set.end)
        for proxy in proxies:
            await stack.enter_async_context(proxy)
        await asyncio.to_thread(replica_set.start)
        url = replica_set.url
        histories = [
            await stack.enter_async_context(opened(database, url=url, driver=driver, publish_timeout="3s"))
            for driver in DRIVERS
        ]
        known: dict[str, Position] = {}

        async def publish(number: int) -> None:
            for turn in range(15):
                key = f"{number}.{turn}"
                history = histories[(number + turn) % 2]
                known[key] = (await retried(history, "a", Draft(key.encode(), key=key))).position

        publishing = asyncio.gather(*(publish(number) for number in range(8)))
        for cut in range(6):
            so_far = len(known)
            await until(lambda so_far=so_far: _true(publishing.done() or len(known) > so_far + 5), "it goes on")
            for proxy in proxies:
                proxy.cut()
                if cut == 3:
                    proxy.stall()
            if cut == 3:
                # Half open: nobody is told anything; what helps is that every attempt has an end.
                with pytest.raises(Unavailable):
                    await histories[0].read("a", FOREVER, NOW)
                for proxy in proxies:
                    proxy.flow()
        await publishing
        other = await stack.enter_async_context(opened(database, url=url))
        page = await everything(other, "a")
        assert {each.data.decode(): each.offset for each in page.publications} == {
            key: position.offset for key, position in known.items()
        }
        assert len(page.publications) == len(known) == 120


# --- several processes --------------------------------------------------------------


async def test_raced_keys_are_published_once(database: str) -> None:
    """P5: 120 keys, each used at once by two processes, one of them with others beside it: one publication each."""
    async with opened(database) as left, opened(database, driver="pymongo") as right:
        keys = [f"key {n}" for n in range(120)]
        sides = [
            asyncio.gather(*(side.append("a", Draft(key.encode(), key=key), FOREVER, NOW) for key in keys))
            for side in (left, right)
        ]
        beside = asyncio.gather(*(say(left, "a", f"{n}") for n in range(100)))
        ours, theirs = await asyncio.gather(*sides)
        await beside
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.position == other.position
            assert mine.repeated != other.repeated
        assert len((await everything(left, "a")).publications) == 220


async def tell(history: MongoHistory, number: int, epoch: str = "") -> tuple[int, bool]:
    """Append to "a" what says its version; gives its offset, or the top, and whether it was stored."""
    draft = Draft(f"{number}{epoch}".encode(), version=Version(number, epoch))
    appended = await history.append("a", draft, FOREVER, NOW)
    return appended.position.offset, not appended.repeated


async def test_what_is_outdated_is_found_so_in_the_database(database: str) -> None:
    """What one process knows of the last version may be old: it neither lets in nor keeps out by it."""
    async with opened(database) as left, opened(database, driver="pymongo") as right:
        assert await tell(left, 5, "a") == (1, True)
        assert await tell(right, 1, "b") == (2, True)
        assert await tell(left, 3, "a") == (3, True)  # as far as it knew, 5 was the last one of this epoch
        assert await tell(right, 9, "a") == (4, True)
        assert await tell(left, 4, "a") == (4, False)
        assert await say(right, "a", "-") == [5]
        left.heard("a", Position(5, (await right.tops("a"))["a"].epoch), NOW)
        assert await tell(left, 9, "a") == (5, False)
        assert await tell(left, 10, "a") == (6, True)


async def test_whoever_publishes_alone_looks_for_no_version(database: str) -> None:
    """After the first one the last version is known from own commits, as the top is."""
    async with opened(database) as history:
        assert await tell(history, 1) == (1, True)
        assert await say(history, "a", "-") == [2]
        with queries(database) as asked:
            assert [await tell(history, number) for number in range(2, 6)] == [(n, True) for n in range(3, 7)]
        assert asked == []


@pytest.mark.parametrize("failure", ["step-down", "closed connection", "no answer", "majority in vain"])
async def test_a_version_whose_outcome_is_unknown(failure: str, database: str, log: ExpectedLog) -> None:
    """Whether the write was done or not: each version is stored once, what comes later is compared with it."""
    log.expect("history.commit_failed", "history.read_failed")
    times, how = FAILURES[failure]
    primary = shared_set().primary()
    async with (
        opened(database, publish_timeout=HURT_TIMEOUT) as left,
        opened(database, publish_timeout=HURT_TIMEOUT, driver="pymongo") as right,
    ):
        await tell(left, 1)
        try:
            await asyncio.to_thread(lambda: primary.fail("insert", times=times, **how))
            told = await asyncio.gather(*(tell(side, number) for number in (2, 3, 4) for side in (left, right)))
        finally:
            primary.fail_no_more()
        stored = [int(each.data) for each in (await everything(left, "a")).publications]
        assert stored == sorted(set(stored))
        assert stored[-1] == 4
        assert sum(new for _, new in told) == len(stored) - 1
        assert await tell(right, 4) == await tell(left, 3) == (len(stored), False)


async def test_an_expired_key_is_raced_for_anew(database: str) -> None:
    """Keys whose time is over are free, once, for whoever comes first; in the log they do not stand in the way."""
    async with opened(database, idempotency_ttl_ms=1_000) as left, opened(database, idempotency_ttl_ms=1_000) as right:
        keys = [f"key {n}" for n in range(30)]
        for late_ms, base in ((0, 0), (1_000, 30), (2_000, 60)):
            sides = [
                asyncio.gather(*(side.append("a", Draft(b"", key=key), FOREVER, NOW + late_ms) for key in keys))
                for side in (left, right)
            ]
            ours, theirs = await asyncio.gather(*sides)
            for mine, other in zip(ours, theirs, strict=True):
                assert (mine.position, mine.repeated) == (other.position, not other.repeated)
            assert sorted(each.position.offset - base for each in ours) == list(range(1, 31))


async def test_a_sweep_that_is_raced_tells_the_truth(database: str) -> None:
    """Readers beside a publisher and sweeps of two processes: no page has a hole, nothing above the floor is gone."""
    short = Retention(20, -1, -1)
    async with opened(database) as writer, opened(database, driver="pymongo") as reader:
        done = asyncio.Event()

        async def publish() -> None:
            for n in range(400):
                await writer.append("a", Draft(b"%d" % n), short, NOW + n)
                if n % 10 == 0:
                    await writer.remove("a") if n % 100 == 50 else await writer.sweep(lambda channel: short, NOW + n)
            done.set()

        async def recover() -> int:
            position, epoch, pages = 0, "", 0
            while not done.is_set():
                await reader.sweep(lambda channel: short, NOW)
                page = await reader.read("a", FOREVER, NOW, since=position)
                pages += 1
                first = page.publications[0].offset if page.publications else page.top.offset + 1
                assert page.top.offset >= position
                assert not page.publications or first == max(position, page.floor) + 1
                assert epoch in ("", page.top.epoch)
                epoch = page.top.epoch
                position = page.publications[-1].offset if page.publications else page.top.offset
                backward = await reader.read("a", short, NOW, reverse=True, limit=5)
                numbers = [each.offset for each in backward.publications]
                assert numbers == list(range(backward.top.offset, backward.top.offset - len(numbers), -1))
                assert len(numbers) == min(5, backward.top.offset - backward.floor)
            return pages

        _, pages = await asyncio.gather(publish(), recover())
        assert pages > 5
        assert (await everything(reader, "a")).top.offset == 400


async def test_a_life_that_ends_beside_publications(database: str) -> None:
    """Forgetting races with publishing of two processes: no position is given twice, none is left out."""
    fades = Retention(-1, 1, 1)
    async with opened(database) as left, opened(database, driver="pymongo") as right:
        given: list[Position] = []

        async def publish(history: MongoHistory) -> None:
            for n in itertools.count():
                if n >= 60 and len({position.epoch for position in given}) > 1:
                    return  # not before: a life lasts while the other one is always a little quicker than the sweep
                given.append((await history.append("a", Draft(b""), FOREVER, NOW + n)).position)
                if n % 5 == 4:
                    await history.sweep(lambda channel: fades, NOW + 10_000)

        await asyncio.gather(publish(left), publish(right))
        assert len(set(given)) == len(given) >= 120
        lives = Counter(position.epoch for position in given)
        for epoch, count in lives.items():
            assert {position.offset for position in given if position.epoch == epoch} == set(range(1, count + 1))


@pytest.mark.parametrize("ended", [False, True], ids=["first life", "next life"])
async def test_a_life_that_has_just_begun_is_not_over(ended: bool, database: str, log: ExpectedLog) -> None:
    """Whoever is told an epoch before the first publication is stored keeps it: a sweep takes it for no old one."""
    log.expect("history.commit_failed", "history.read_failed")
    fades = Retention(-1, -1, 1_000)
    primary = shared_set().primary()
    async with opened(database) as writer, opened(database) as other:
        if ended:
            before = (await writer.append("a", Draft(b"0"), fades, NOW - 10_000)).position
            await writer.remove("a")
            await writer.sweep(lambda channel: fades, NOW)
            assert (await other.read("a", fades, NOW)).top != before
        primary.fail("insert", times=100_000, closeConnection=True)
        appending = asyncio.create_task(writer.append("a", Draft(b"1"), fades, NOW))
        try:
            with inside(database) as seen:
                await until(lambda: _true(bool(seen["channels"].count_documents({"epoch": {"$gt": ""}}))), "it begins")
            told = (await other.read("a", fades, NOW)).top
            assert (told.offset, told.epoch != "") == (0, True)
            primary.fail_no_more()
            await other.sweep(lambda channel: fades, NOW + 1)
        finally:
            primary.fail_no_more()
        assert (await appending).position == Position(1, told.epoch)


async def test_a_guess_from_old_knowledge_is_no_slot_of_the_past(database: str) -> None:
    """Trimmed documents are deleted only when nobody can guess their slots any more: who comes back looks first."""
    one = Retention(1, -1, -1)
    after_ms = NOW + GUARD_MS + 1_000
    async with opened(database) as sleeper, opened(database, driver="pymongo") as other:
        await say(sleeper, "a", "1", at_ms=NOW)
        for n in range(2, 6):
            await say(other, "a", str(n), at_ms=NOW + n)
        await other.sweep(lambda channel: one, NOW + 1_000)
        with inside(database) as seen:
            assert seen["log"].count_documents({}) == 5
            await other.sweep(lambda channel: one, after_ms)
            assert seen["log"].count_documents({}) == 1
        assert await say(sleeper, "a", "6", at_ms=after_ms) == [6]
        assert await say(other, "a", "7", at_ms=after_ms + int(TRUST_S * 1000) + 1) == [7]


async def test_a_lost_slot_is_looked_at_once(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever finds its slot taken learns the top by one read, however many came between, and takes the next."""
    monkeypatch.setattr(mongo_places, "TRUST_S", 3600.0)  # the others may be at it for longer than half a minute
    async with opened(database) as left, opened(database, driver="pymongo") as right:
        assert await say(left, "a", "1") == [1]
        for behind in (1, LOOKED_AT - 1, LOOKED_AT, 2 * LOOKED_AT):
            top = (await right.tops("a"))["a"].offset
            for n in range(behind):
                await say(right, "a", str(n))
            with queries(database) as asked:
                assert await say(left, "a", "left") == [top + behind + 1]
            assert len(asked) == (1 if behind < LOOKED_AT else 5)
        assert (await everything(right, "a")).top.offset == 1 + 4 * LOOKED_AT + 4


async def test_a_guess_that_lapses_on_its_way(database: str) -> None:
    """Its slot was taken, and by the time that this is known nothing may be guessed any more: it is looked up."""
    async with opened(database) as left, opened(database) as right:
        await say(left, "a", "1")
        await say(right, "a", "2")
        guessed = asyncio.ensure_future(left.append("a", Draft(b"3"), FOREVER, NOW))
        await asyncio.sleep(0)  # it is queued
        await asyncio.sleep(0)  # and composed, from what was known
        later = left.append("b", Draft(b""), FOREVER, NOW + int(TRUST_S * 1000) + 1)
        assert [each.position.offset for each in await asyncio.gather(guessed, later)] == [3, 1]


async def test_a_lost_slot_in_a_life_that_is_over(database: str) -> None:
    """What took the slot may be the end of the life, with the next one behind it: the position is of the new life."""
    fades = Retention(-1, 1, 1)
    async with opened(database) as left, opened(database, driver="pymongo") as right:
        for count in (1, 3, LOOKED_AT + 1):
            old = (await left.append("a", Draft(b""), FOREVER, NOW)).position
            await right.sweep(lambda channel: fades, NOW + 10)
            for n in range(1, count + 1):
                new = (await right.append("a", Draft(b""), FOREVER, NOW)).position
                assert (new.offset, new.epoch != old.epoch) == (n, True)
            lost = await left.append("a", Draft(b"", key="k"), FOREVER, NOW)
            assert lost == Appended(Position(count + 1, new.epoch))
            page = await everything(right, "a")
            assert page.top == lost.position
            await left.sweep(lambda channel: fades, NOW + 10)


async def test_a_forgotten_channel_leaves_nothing(database: str) -> None:
    """In the end a channel past its meta TTL has no document left, neither of its publications nor of its keys."""
    fades = Retention(-1, 1, 1)
    async with opened(database, idempotency_ttl_ms=1_000) as history:
        await history.append("a", Draft(b"1", key="k"), fades, NOW)
        for late_ms in (10, GUARD_MS + 2_000, 2 * GUARD_MS + 4_000):
            for _ in range(2):
                await history.sweep(lambda channel: fades, NOW + late_ms)
        with inside(database) as seen:
            assert seen["log"].count_documents({}) == seen["channels"].count_documents({}) == 0
        appended = await history.append("a", Draft(b"1", key="k"), fades, NOW + 3 * GUARD_MS)
        assert (appended.position.offset, appended.repeated) == (1, False)


async def test_what_was_announced_is_read(database: str, log: ExpectedLog) -> None:
    """After ``heard`` no read is older, and the next commit takes the next slot without a look."""
    log.expect("history.read_failed")
    async with opened(database) as left, opened(database) as right:
        first = (await left.append("a", Draft(b"1"), FOREVER, NOW)).position
        assert (await right.tops("a"))["a"] == first
        second = (await left.append("a", Draft(b"2"), FOREVER, NOW)).position
        right.heard("a", second, NOW)
        with queries(database) as asked:
            assert (await right.append("a", Draft(b"3"), FOREVER, NOW)).position.offset == 3
        assert asked == []
    async with opened(database, publish_timeout="3s") as deceived:
        deceived.heard("a", Position(9, "another life"), NOW)
        deceived.heard("a", Position(4, first.epoch), NOW)

        async def refused_as_older() -> bool:
            with pytest.raises(Unavailable) as refused:
                # Nobody but a liar announces what is not there; better no answer than one that contradicts it.
                await deceived.read("a", FOREVER, NOW)
            return "older" in str(refused.value)  # unless the database was late

        await until(refused_as_older, "what is read is older")


@contextmanager
def queries(database: str) -> Iterator[list[dict[str, Any]]]:
    """The finds that the primary is asked for in ``database`` inside the block, known after it."""
    found: list[dict[str, Any]] = []
    with inside(database) as seen:
        seen.command({"profile": 2})
        yield found
        seen.command({"profile": 0})
        found += seen["system.profile"].find(
            {"op": {"$in": ["query", "getmore"]}, "ns": {"$ne": f"{database}.system.profile"}}
        )
        seen["system.profile"].drop()


async def test_tops_of_thousands_cost_one_query(database: str, log: ExpectedLog) -> None:
    """Channels whose top is known are compared in one query, with news a look more; unknown ones in two."""
    names = [f"channel {n}" for n in range(2_000)]
    async with opened(database) as history, opened(database) as other:
        await asyncio.gather(*(history.append(name, Draft(b""), FOREVER, NOW) for name in names))
        with queries(database) as asked:
            assert len(await history.tops(names)) == 2_000
        assert len(asked) <= 2
        await say(other, names[3], "news")
        assert (await history.tops(names))[names[3]].offset == 2
        with queries(database) as asked:
            assert await other.tops([f"quiet {n}" for n in range(2_000)]) == {}
        assert len(asked) <= 3


async def test_tops_after_a_long_silence_cost_three_queries(database: str) -> None:
    """Whatever was known long ago is compared again in one go: news, a floor that rose past it, another life."""
    names = [f"channel {n}" for n in range(2_000)]
    later_ms = NOW + GUARD_MS + 60_000
    async with opened(database) as history, opened(database) as other:
        first = await asyncio.gather(*(history.append(name, Draft(b""), FOREVER, NOW) for name in names))
        with queries(database) as asked:
            # Somebody gives a time by which all that was known has lapsed.
            await history.read(names[0], FOREVER, later_ms, limit=0)
            assert await history.tops(names) == {name: each.position for name, each in zip(names, first, strict=True)}
        assert len(asked) <= 6  # three of them are the read's
        await say(other, names[3], "news", at_ms=later_ms)
        await say(other, names[4], "2", "3", at_ms=NOW)
        await say(other, names[4], "4", at_ms=NOW)
        await say(other, names[5], "2", at_ms=NOW)
        sweeps = {names[4]: Retention(1, -1, -1), names[5]: Retention(-1, 1, 1)}
        for at_ms in (later_ms, later_ms + GUARD_MS + 1):
            await say(other, names[3], "so that the sweep comes by", at_ms=at_ms)
            await other.sweep(sweeps.get, at_ms)
        begun = (await other.append(names[5], Draft(b""), FOREVER, later_ms)).position
        with inside(database) as seen:
            assert seen["log"].count_documents({"_id.channel": names[4]}) == 1
        await history.read(names[0], FOREVER, later_ms + 2 * GUARD_MS, limit=0)
        tops = await history.tops(names)
        assert [tops[name].offset for name in names[2:5]] == [1, 4, 4]
        assert tops[names[5]] == begun
        assert (begun.offset, begun.epoch != first[5].position.epoch) == (1, True)


async def test_a_sweep_reads_little_where_nothing_is_gone(database: str) -> None:
    """However long a channel is, a few of its documents show that all of it is kept; once they are gone, more go."""
    async with opened(database) as history:
        for n in range(60):
            await say(history, "a", str(n), at_ms=NOW + n)
        with queries(database) as asked:
            await history.sweep(lambda channel: Retention(1_000, 1_000, 1_000), NOW + 500)
        assert sum(each["nreturned"] for each in asked if each["ns"].endswith(".log")) < 10
        await history.sweep(lambda channel: Retention(10, -1, -1), NOW + 500)
        assert (await everything(history, "a")).floor == 50


async def test_times_never_go_backwards_across_processes(database: str) -> None:
    """A process whose clock is behind gives its publications the time of the one before, whoever made that."""
    async with opened(database) as fast, opened(database) as slow:
        for _ in range(3):
            await say(fast, "a", "x", at_ms=NOW + 5_000)
            await say(slow, "a", "x", at_ms=NOW)
        page = await everything(fast, "a")
        assert [each.time_ms - NOW for each in page.publications] == [5_000] * 6


async def test_new_epochs_beside_a_publisher(database: str) -> None:
    """All servers had better be stopped; what one that is not publishes is in the new life or in the old."""
    async with opened(database) as publisher, opened(database) as operator:
        before = (await publisher.append("a", Draft(b"old"), FOREVER, NOW)).position
        assert await operator.new_epochs() == 1
        after = (await publisher.append("a", Draft(b"new"), FOREVER, NOW)).position
        assert after.epoch != before.epoch
        assert after.offset == 1
        page = await everything(operator, "a")
        assert ([each.data for each in page.publications], page.top) == ([b"new"], after)


async def test_neighbours_are_redacted_at_once(database: str) -> None:
    """Two processes that redact publications of one document take nothing back from each other, and none gives up."""
    async with opened(database) as left, opened(database, driver="pymongo") as right:
        await say(left, "a", *(f"secret {n}" for n in range(50)))
        await asyncio.gather(*(side.redact("a", n) for n in range(1, 41) for side in (left, right)))
        data = [each.data for each in (await everything(left, "a")).publications]
        assert data == [b"null"] * 40 + [f"secret {n}".encode() for n in range(40, 50)]
        with inside(database) as seen:
            assert not any(b"secret 3" in bson.encode(document) for document in seen["log"].find())


async def test_remove_erases_at_once(database: str) -> None:
    """After ``remove`` no payload is left in the database, though keys and places are."""
    async with opened(database) as history:
        for n in range(3):
            await history.append("a", Draft(b"secret", key=f"{n}"), FOREVER, NOW)
        await history.remove("a")
        with inside(database) as seen:
            assert not any(b"secret" in bson.encode(document) for document in seen["log"].find())
        assert (await history.append("a", Draft(b"", key="1"), FOREVER, NOW)).repeated


async def test_a_channel_that_is_very_long_is_removed_bit_by_bit(database: str) -> None:
    """It is empty at once; its payloads are erased in bounded steps, and the sweep does not break down over them."""
    many = (ERASE_STEPS + 2) * ERASE_RECORDS
    async with opened(database) as history, opened(database) as other:
        await say(history, "a", "1")
        documents = [
            commit_document("a", slot, NOW, bytes(12), pack([(NOW, b"x", None)]), 1, []) for slot in range(2, many + 1)
        ]
        with inside(database) as seen:
            seen["log"].insert_many(documents)
            await history.remove("a")
            page = await history.read("a", FOREVER, NOW)
            assert (page.publications, page.floor) == ([], many)
            left = seen["log"].count_documents({"pubs": {"$exists": True}})
            assert left == 2 * ERASE_RECORDS
            while left:
                await history.sweep(lambda channel: FOREVER, NOW)
                before, left = left, seen["log"].count_documents({"pubs": {"$exists": True}})
                assert left >= before - ERASE_RECORDS
                assert left < before
        assert await say(other, "a", "after") == [many + 1]


# --- what is not ours ----------------------------------------------------------------


async def test_documents_that_are_not_ours_are_skipped_and_named(database: str, log: ExpectedLog) -> None:
    """Whatever stands in the collections: reads and sweeps go on, and each stranger is named once."""
    log.expect("history.document_skipped")
    async with opened(database) as history:
        await say(history, "a", "1")
        with inside(database) as seen:
            stranger = seen["log"].insert_one({"invoice": 1}).inserted_id
            seen["log"].insert_one({"_id": {"channel": "a", "first": 1.5}, "last": "x"})
            seen["log"].insert_one({"_id": {"channel": "a", "first": "x"}, "last": 1, "time": 1})
            seen["channels"].insert_one({"_id": "b", "epoch": 5})
            seen["channels"].insert_one({"owner": "somebody"})
        for _ in range(2):
            assert len((await history.read("a", FOREVER, NOW, since=0)).publications) == 1
            await history.sweep(lambda channel: Retention(5, 10, 10), NOW)
            assert (await history.tops("ab")).keys() == {"a"}
        assert await say(history, "a", "2") == [2]
    async with opened(database):
        pass
    named = Counter(str(fields["document"]) for fields in log.seen("history.document_skipped"))
    assert named[repr(stranger)] == 1
    assert named["'b'"] == 1
    assert named["{'channel': 'a', 'first': 1.5}"] >= 1


async def test_a_slot_that_a_stranger_holds_costs_its_channel_alone(database: str, log: ExpectedLog) -> None:
    """Nothing can be published where somebody else's document stands: Unavailable, named; other channels go on."""
    log.expect("history.document_skipped", "history.commit_failed")
    async with opened(database, publish_timeout="3s") as history, opened(database) as other:
        await retried(history, "a", Draft(b"1", key="1"))
        with inside(database) as seen:
            seen["log"].insert_one({"_id": {"channel": "a", "first": 2}, "junk": True})
            with pytest.raises(Unavailable):
                await say(history, "a", "2")
            beside = [(await retried(history, "b", Draft(b"", key=key))).position.offset for key in "12"]
            assert beside == [1, 2]
            assert len((await everything(other, "a")).publications) == 1
            seen["log"].delete_one({"junk": True})
        assert (await retried(history, "a", Draft(b"3", key="3"))).position.offset in (2, 3)


async def test_a_channel_that_a_stranger_holds_costs_its_publishers_alone(database: str, log: ExpectedLog) -> None:
    """A document of ``channels`` that is not ours, and a lie about a top: those who are looked at with it go on."""
    log.expect("history.document_skipped", "history.commit_failed")
    async with opened(database, publish_timeout="6s") as history, opened(database) as other:
        elsewhere = (await other.append("lied about", Draft(b""), FOREVER, NOW)).position
        with inside(database) as seen:
            seen["channels"].insert_one({"_id": "theirs", "epoch": 5})
        history.heard("lied about", Position(9, elsewhere.epoch))
        outcomes = await asyncio.gather(
            *(history.append(name, Draft(b""), FOREVER, NOW) for name in ("a", "theirs", "lied about", "b")),
            return_exceptions=True,
        )
        assert [type(outcome) for outcome in outcomes] == [Appended, Unavailable, Unavailable, Appended]
        assert await say(history, "c", "1") == [1]


async def test_a_listener_that_raises_costs_nobody_an_answer(database: str, log: ExpectedLog) -> None:
    """A fault in on_commit is logged; the commit stands, and the others in the batch are told."""
    log.expect("history.listener_failed")

    def listen(channel: str, epoch: str, publications: Sequence[Publication]) -> None:
        if channel == "a":
            raise LookupError(channel)

    async with opened(database) as history:
        history.on_commit = listen
        appends = [history.append(name, Draft(b""), FOREVER, NOW) for name in "abc"]
        assert [each.position.offset for each in await asyncio.gather(*appends)] == [1, 1, 1]
    assert log.seen("history.listener_failed") == [{"channel": "a"}]


async def test_what_cannot_be_stored_harms_nobody_else(database: str) -> None:
    """Text that is no Unicode, and more than a document holds, are refused before they are queued."""
    async with opened(database) as history:
        outcomes = await asyncio.gather(
            say(history, "a", "1"),
            history.append("\ud800", Draft(b""), FOREVER, NOW),
            history.append("a", Draft(b"", key="\ud800"), FOREVER, NOW),
            history.append("a", Draft(b"", tags={"k": "\udfff"}), FOREVER, NOW),
            history.append("a", Draft(bytes(16 * 1024 * 1024)), FOREVER, NOW),
            say(history, "a", "2"),
            return_exceptions=True,
        )
        kinds = [type(outcome) for outcome in outcomes]
        assert all(issubclass(kind, ValueError) for kind in kinds[1:4])
        assert kinds[4] is Refused
        assert len((await everything(history, "a")).publications) == 2


# --- opening -------------------------------------------------------------------------


async def refusal(settings: dict[str, Any]) -> str:
    """What ``open`` says, in time; everything else says Unavailable as well, and close is harmless."""
    history = MongoHistory(MongoSettings.model_validate(settings))
    async with awake() as watch:
        with pytest.raises(Unavailable) as unavailable, impatient():
            await history.open()
    assert watch.s < IN_TIME_S
    assert history.trouble == str(unavailable.value)
    with pytest.raises(Unavailable):
        await history.append("a", Draft(b""), FOREVER, NOW)
    with pytest.raises(Unavailable):
        await history.read("a", FOREVER, NOW)
    await history.close()
    return str(unavailable.value)


@every_driver
@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mongodb://127.0.0.1:99999/", "mongo.url: "),
        ("mongodb://127.0.0.1:27017/?replicaSet=", "mongo.url: "),
        ("mongodb://us:er:pass@127.0.0.1/", "mongo.url: "),
        ("mongodb://127.0.0.1/?tls=perhaps", "mongo.url: "),
        ("mongodb://no-such-host.invalid/", "unknown host name"),
    ],
)
async def test_a_url_that_is_wrong(driver: str, url: str, words: str) -> None:
    """It is the setting that is named, and what is wrong with it."""
    said = await refusal({"url": url, "driver": driver})
    assert said.startswith("mongo.url: ")
    assert words in said


@every_driver
async def test_nobody_answers(driver: str) -> None:
    """Each address is named with what was found there; never the password."""
    ports = [free_port(), free_port()]
    url = f"mongodb://me:hush@127.0.0.1:{ports[0]},127.0.0.1:{ports[1]}/?replicaSet=waterspout"
    said = await refusal({"url": url, "driver": driver})
    assert said.startswith("mongo.url: nobody answers")
    assert all(f"127.0.0.1:{port}" in said for port in ports)
    assert "refused" in said
    assert "hush" not in said


async def test_a_port_that_says_nothing() -> None:
    """Somebody listens and does not speak: found out in time."""

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1 << 20)
        await reader.read()
        writer.close()

    async with await asyncio.start_server(listen, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        said = await refusal({"url": f"mongodb://127.0.0.1:{port}/"})
        assert said.startswith("mongo.url: ")
        assert f"127.0.0.1:{port}" in said


@every_driver
async def test_an_old_server(driver: str) -> None:
    """MongoDB 4.2 is too old, and is called that."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello = {"ok": 1, "ismaster": True, "helloOk": True, "setName": "rs", "minWireVersion": 0, "maxWireVersion": 8}
        hello |= {"hosts": [f"127.0.0.1:{port}"], "me": f"127.0.0.1:{port}", "setVersion": 1}
        try:
            while header := await reader.readexactly(16):
                length, request = (int.from_bytes(header[n : n + 4], "little") for n in (0, 4))
                kind = int.from_bytes(header[12:16], "little")
                await reader.readexactly(length - 16)
                # OP_MSG has flags and one section of kind 0; OP_REPLY flags, cursor, start, and one document.
                prefix = bytes(5) if kind == 2013 else bytes(16) + (1).to_bytes(4, "little")
                body = prefix + bson.encode(hello)
                numbers = (16 + len(body), 0, request, 2013 if kind == 2013 else 1)
                writer.write(b"".join(number.to_bytes(4, "little") for number in numbers) + body)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        said = await refusal({"url": f"mongodb://127.0.0.1:{port}/?replicaSet=rs", "driver": driver})
        assert said.startswith("mongo.url: expected MongoDB 4.4 or newer")


@every_driver
@pytest.mark.parametrize("named", [False, True], ids=["", "set named"])
async def test_a_mongod_on_its_own(driver: str, named: bool) -> None:
    """A standalone mongod is told from a replica set, whether or not the URL names one, and left as it was."""
    with Mongod() as alone:
        url = alone.url + ("?replicaSet=waterspout" if named else "")
        said = await refusal({"url": url, "driver": driver})
        assert said.startswith("mongo.url: expected a replica set")
        assert "on its own" in said
        with pymongo.MongoClient[dict[str, Any]](alone.url) as client:
            assert "waterspout" not in client.list_database_names()


async def test_another_set_than_named() -> None:
    """The set's name in the URL is another one."""
    said = await refusal({"url": shared_set().url.replace("replicaSet=waterspout", "replicaSet=other")})
    assert said.startswith("mongo.url: expected the replica set 'other'")
    assert "'waterspout'" in said


async def test_only_a_secondary() -> None:
    """A URL that leads to a secondary alone cannot be written to."""
    secondary = shared_set().secondaries()[0]
    said = await refusal({"url": f"mongodb://{secondary.address}/?directConnection=true"})
    assert said.startswith("mongo.url: ")
    assert "secondary" in said
    assert "directConnection" in said


def test_a_primary_that_is_deposed_while_it_is_asked() -> None:
    """What answers as a secondary where the driver may choose is an election that passes, and no fault of the URL."""
    server = MongoServer(MongoSettings(url=shared_set().url))
    with pytest.raises(NotPrimaryError):
        server._judge(shared_set().secondaries()[0].hello())


async def test_a_set_without_a_primary() -> None:
    """While there is no majority it says how each member sees it, and ``open`` succeeds when there is one again."""
    with ReplicaSet(2) as pair:
        history = made(fresh_database(), url=pair.url)
        pair.secondaries()[0].kill()
        await until(lambda: asyncio.to_thread(lambda: not _writable(pair)), "the primary steps down")
        said = await refusal({"url": pair.url})
        assert said.startswith("mongo.url: no primary was found")
        assert "a secondary, and knows no primary" in said
        await asyncio.to_thread(pair.recover)
        await until(lambda: reopened(history), "it can be opened")  # the next election may come at once
        assert await say(history, "a", "1") == [1]
        await history.close()


async def reopened(history: MongoHistory) -> bool:
    """Whether it can be opened."""
    try:
        await history.open()
    except Unavailable:
        return False
    return True


def _writable(replica_set: ReplicaSet) -> bool:
    return any(member.hello().get("isWritablePrimary") for member in replica_set.members)


@every_driver
async def test_logins(driver: str) -> None:
    """A wrong password, no login where one is needed, a user without the right: each is named, none shown."""
    with ReplicaSet(1, credentials=("ad:min", "p@ss/word")) as secured:
        settings = {"url": secured.url, "driver": driver}
        history = MongoHistory(MongoSettings.model_validate(settings))
        await history.open()
        await history.close()
        secured.primary().command({"createUser": "reader", "pwd": "s3cret", "roles": ["read"]}, database="other")
        bare = f"mongodb://{secured.hosts}/?replicaSet=waterspout"
        wrong = await refusal({**settings, "url": secured.url.replace("p%40ss%2Fword", "p%40ss%2Fwrong")})
        assert "mongo.url" in wrong
        assert "'ad:min'" in wrong
        assert "wrong" in wrong
        assert "p@ss" not in wrong
        assert "p%40ss" not in wrong
        none = await refusal({**settings, "url": bare})
        assert "mongo.url: a login is needed" in none
        poor = bare.replace("mongodb://", "mongodb://reader:s3cret@") + "&authSource=other"
        said = await refusal({**settings, "url": poor})
        assert "user 'reader' may not use the database 'waterspout'" in said
        assert "s3cret" not in said


def _unlike(seen: Database[dict[str, Any]]) -> None:
    seen["log"].drop_index("keys")
    seen["log"].create_index([("_id.channel", 1)], name="keys")


def _not_unique(seen: Database[dict[str, Any]]) -> None:
    seen["log"].drop_index("keys")
    keys = [("_id.channel", 1), ("keys.key", 1)]
    seen["log"].create_index(keys, name="keys", partialFilterExpression={"keys.key": {"$exists": True}})


def _other_name(seen: Database[dict[str, Any]]) -> None:
    seen["log"].drop_index("due")
    seen["log"].create_index([("due", 1)], name="theirs", partialFilterExpression={"due": {"$exists": True}})


@pytest.mark.parametrize("change", [_unlike, _not_unique, _other_name])
async def test_an_index_that_differs(change: Callable[[Database[dict[str, Any]]], None], database: str) -> None:
    """It is reported with its name and what was expected, and not changed."""
    async with opened(database):
        pass
    with inside(database) as seen:
        change(seen)
        before = seen["log"].index_information()
        said = await refusal({"url": shared_set().url, "database": database})
        assert said.startswith("mongo.database: index ")
        assert f"{database}.log" in said
        assert seen["log"].index_information() == before


async def test_a_missing_index_is_made(database: str) -> None:
    """Dropping one is all that an operator has to do to have it made anew."""
    async with opened(database):
        pass
    with inside(database) as seen:
        seen["log"].drop_index("keys")
        async with opened(database):
            assert set(seen["log"].index_information()) == {"_id_", "keys", "due", "versions"}


async def test_a_database_of_the_format_before(database: str) -> None:
    """It is adopted as it is; the index that it lacks may take longer than ``open`` does, and is made all the same."""
    async with opened(database) as history:
        await say(history, "a", "1", "2")
    primary = shared_set().primary()
    with inside(database) as seen:
        seen["log"].drop_index("versions")
        seen["meta"].update_one({"_id": "format"}, {"$set": {"version": 1}})
        primary.command({"configureFailPoint": "hangAfterSettingUpIndexBuild", "mode": "alwaysOn"})

        async def refused_for_now() -> bool:
            said = await refusal({"url": shared_set().url, "database": database})
            return said.startswith(f"mongo.database: the indexes of {database}.log are still being made")

        try:
            await until(refused_for_now, "it waits for the indexes")  # unless its time was lost elsewhere
        finally:
            primary.command({"configureFailPoint": "hangAfterSettingUpIndexBuild", "mode": "off"})
        async with opened(database) as history:
            assert "versions" in seen["log"].index_information()
            assert seen["meta"].find_one({"_id": "format"}) == {"_id": "format", "version": 2}
            versioned = Draft(b"3", version=Version(1))
            first = await history.append("a", versioned, FOREVER, NOW)
            assert await history.append("a", versioned, FOREVER, NOW) == Appended(first.position, repeated=True)
            assert first.position.offset == 3


async def test_a_database_of_another_program_or_of_a_newer_server(database: str) -> None:
    """Neither is touched."""
    with inside(database) as seen:
        seen["log"].insert_one({"line": "GET /"})
        said = await refusal({"url": shared_set().url, "database": database})
        assert said.startswith(f"mongo.database: {database!r} is another program's")
        assert seen.list_collection_names() == ["log"]
        seen["log"].drop()
        async with opened(database):
            pass
        seen["meta"].update_one({"_id": "format"}, {"$set": {"version": 99}})
        said = await refusal({"url": shared_set().url, "database": database})
        assert said.startswith("mongo.database: ")
        assert "newer version of this server (format 99" in said


async def test_opening_twice_at_once(database: str) -> None:
    """Processes that start at the same moment make what is missing together."""
    histories = [made(database, driver=driver) for driver in DRIVERS * 2]
    await asyncio.gather(*(history.open() for history in histories))
    assert sorted(itertools.chain(*[await say(history, "a", "x") for history in histories])) == [1, 2, 3, 4]
    await asyncio.gather(*(history.close() for history in histories))


def test_a_member_that_is_missing_is_no_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any mongod the tests fail, and say where one was looked for."""
    import mongod

    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(mongod.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="fiftyone"):
        mongod.mongod_path()
    assert isinstance(shared_set().primary(), Member)
