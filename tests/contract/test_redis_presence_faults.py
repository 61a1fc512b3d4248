"""What Redis presence does while Redis is away, late or forgetful, and while processes die at bad moments."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from conftest import ExpectedLog
from patience import awake, impatient
from redis_server import (
    TILTED_S,
    RedisCluster,
    RedisServer,
    Sentinels,
    shared_cluster,
    shared_server,
    unique_prefix,
    wait_for_replica,
)
from test_presence import ANN, BOB, LEASE_S, MOMENT_S, NOW, RedisPlace, sweep_all

from server.errors import Unavailable
from server.presence.redis import SAID_AGAIN, SWEPT_AT_ONCE, RedisPresence
from server.presence.scripts import ADD, PAGE, PAGE_ENTRIES, REMOVE, SWEEP, SWEPT_BY_SCRIPT, Keys, Script
from server.settings import RedisSettings
from server.stream import ClientInfo

PATIENT_S = 20.0
SHORT_S = 1.0
"""How long a Redis that does not answer is waited for."""


@asynccontextmanager
async def opened(count: int, url: str, prefix: str = "") -> AsyncIterator[list[RedisPresence]]:
    """Presences of as many processes, which are closed in the end."""
    settings = RedisSettings(url=url, prefix=prefix or unique_prefix())
    presences = [RedisPresence(settings, LEASE_S) for _ in range(count)]
    for presence in presences:
        await presence.open(NOW)
    try:
        yield presences
    finally:
        for presence in presences:
            await presence.close()


async def until(true: Callable[[], Awaitable[object]]) -> None:
    """Ask Redis again and again, which tells nobody, until the answer is ``true``; it may be away meanwhile."""
    async with asyncio.timeout(PATIENT_S):
        while True:
            try:
                if await true():
                    return
            except Unavailable:
                pass
            await asyncio.sleep(0)  # a refused connection takes no time


def crowd(count: int, name: str = "c") -> list[ClientInfo]:
    """As many clients of a tenth as many users."""
    return [ClientInfo(f"u{number % (count // 10 or 1)}", f"{name}{number}") for number in range(count)]


async def enter(presence: RedisPresence, channel: str, infos: list[ClientInfo]) -> None:
    """Add them all at once."""
    await asyncio.gather(*(presence.add(channel, info) for info in infos))


# --- a wire that loses answers, and one that delivers late -----------------------
class Courier:
    """A TCP proxy in front of a Redis that knows scripts by their names.

    It may ``lose`` the answer to the next run of a script, which is carried out;
    ``delay`` that answer until it is told to go on; or ``hold`` the next run back,
    cut the connection, and deliver it later.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._losing: bytes = b""
        self._delaying: bytes = b""
        self.delayed = asyncio.Event()
        """An answer is there and waits for ``go_on``."""
        self.go_on = asyncio.Event()
        self._holding: bytes = b""
        self._held: list[tuple[asyncio.StreamWriter, bytes]] = []
        self._writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        """As in ``redis.url``."""
        assert self._server is not None
        return f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def lose(self, script: Script) -> None:
        """Cut the connection instead of giving the next answer of ``script``."""
        self._losing = script.sha.encode()

    def delay(self, script: Script) -> None:
        """Keep the next answer of ``script`` until ``go_on`` is set."""
        self._delaying = script.sha.encode()

    def hold(self, script: Script) -> None:
        """Cut the connection that asks for ``script`` next; its words arrive when ``deliver`` is called."""
        self._holding = script.sha.encode()

    async def deliver(self) -> None:
        """Let what was held back arrive, and wait until it has been carried out."""
        while self._held:
            writer, words = self._held.pop()
            writer.write(words)
            writer.write_eof()
            await self._ended[writer].wait()

    async def __aenter__(self) -> "Courier":
        self._ended: dict[asyncio.StreamWriter, asyncio.Event] = {}
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.close()
        await self._server.wait_closed()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers += [writer, there]
        self._ended[there] = asyncio.Event()
        deaf, slow = asyncio.Event(), asyncio.Event()
        back = asyncio.create_task(self._carry_back(there_reader, there, writer, deaf, slow))
        while words := await reader.read(65536):
            # A whole batch is written at once, and is small here, so it arrives in one piece.
            if self._holding and self._holding in words:
                self._holding = b""
                self._held.append((there, words))
                deaf.set()
                writer.close()
                break
            if self._losing and self._losing in words:
                self._losing = b""
                deaf.set()
            if self._delaying and self._delaying in words:
                self._delaying = b""
                slow.set()
            there.write(words)
        else:
            there.close()
        await back

    async def _carry_back(
        self,
        reader: asyncio.StreamReader,
        there: asyncio.StreamWriter,
        writer: asyncio.StreamWriter,
        deaf: asyncio.Event,
        slow: asyncio.Event,
    ) -> None:
        while words := await reader.read(65536):
            if slow.is_set():
                self.delayed.set()
                await self.go_on.wait()
            if deaf.is_set():
                writer.close()
            else:
                writer.write(words)
        self._ended[there].set()
        there.close()
        writer.close()


# --- clocks and pauses ---------------------------------------------------------
async def test_clocks_that_differ_change_nothing() -> None:
    """Three processes half a minute, a year and an hour apart with a lease of seconds see the same and sweep nobody."""
    skews = (30.0, -30.0, 365 * 86400.0, -3600.0)
    settings = RedisSettings(url=shared_server().url, prefix=unique_prefix())
    presences = [RedisPresence(settings, 15.0) for _ in skews]
    clocks = [NOW + skew for skew in skews]
    for presence, now in zip(presences, clocks, strict=True):
        await presence.open(now)
    try:
        for number, presence in enumerate(presences):
            await presence.add("c", ClientInfo("ann", f"a{number}"))
        for presence, now in zip(presences, clocks, strict=True):
            assert len(await presence.members("c", now)) == len(skews)
            assert await presence.sweep(now) == []
            assert await presence.renew(now) is True
            assert await presence.stats("c", now) == (len(skews), 1)
        place = RedisPlace([shared_server()], settings.prefix)
        await place.pass_time(8)
        await presences[0].renew(clocks[0])
        await place.pass_time(8)
        assert set(await presences[0].members("c", clocks[0])) == {"a0"}
        assert len(await presences[0].sweep(clocks[0])) == len(skews) - 1
    finally:
        for presence in presences:
            await presence.close()


async def test_the_last_breath_of_a_paused_process() -> None:
    """What a process adds after its lease was cleared away is seen by nobody until it has registered anew."""
    server, prefix = shared_server(), unique_prefix()
    place = RedisPlace([server], prefix)
    async with opened(2, server.url, prefix) as (paused, other):
        await paused.add("c", ANN)
        await place.pass_time(LEASE_S / 2)
        await other.renew(NOW)
        await place.pass_time(LEASE_S / 2 + MOMENT_S)
        assert await sweep_all(other, NOW) == [("c", ANN)]
        await paused.add("c", BOB)
        await paused.add("d", BOB)
        for channel in ("c", "d"):
            assert await other.members(channel, NOW) == {}
            assert await other.stats(channel, NOW) == (0, 0)
        assert await paused.renew(NOW) is False
        await paused.add("c", ANN)
        await paused.add("d", BOB)
        assert await other.members("c", NOW) == {"a1": ANN}
        assert await other.members("d", NOW) == {"b1": BOB}
        assert await sweep_all(other, NOW + 1) == []  # BOB in "c" is not indexed any more: a stray
        assert await sweep_all(other, NOW + 2 * LEASE_S) == [("c", BOB)]
        assert await sweep_all(other, NOW + 4 * LEASE_S) == []
        assert await other.stats("c", NOW) == (1, 1)


async def test_strays_are_left_alone_while_their_process_may_come_back() -> None:
    """If the leases alone are lost, members are unseen until they register anew; nobody announces that they left."""
    server, prefix = shared_server(), unique_prefix()
    async with opened(2, server.url, prefix) as (one, other):
        await one.add("c", ANN)
        server.command("DEL", Keys(prefix).leases)
        assert await other.members("c", NOW) == {}
        assert await other.renew(NOW) is False
        assert await other.renew(NOW) is True
        assert await sweep_all(other, NOW) == []
        assert await one.renew(NOW) is False
        await one.add("c", ANN)
        assert await other.members("c", NOW) == {"a1": ANN}
        assert await sweep_all(other, NOW + 2 * LEASE_S) == []
        assert await other.members("c", NOW) == {"a1": ANN}


async def test_who_lapsed_itself_judges_nobody_at_once() -> None:
    """After an outage longer than the lease, in which all lapsed, members come back without being said to have left."""
    server, prefix = shared_server(), unique_prefix()
    async with opened(2, server.url, prefix) as (one, other):
        await one.add("c", ANN)
        await RedisPlace([server], prefix).pass_time(LEASE_S + MOMENT_S)
        assert await other.renew(NOW) is False
        assert await other.sweep(NOW) == []
        assert await one.renew(NOW) is False
        await one.add("c", ANN)
        assert await other.renew(NOW) is True
        assert await sweep_all(other, NOW) == []
        assert await other.members("c", NOW) == {"a1": ANN}


async def test_an_addition_under_way_when_the_lease_is_found_lost() -> None:
    """An ``add`` that was carried out for the old life returns only when the client stands there for the new one."""
    server, prefix = shared_server(), unique_prefix()
    async with Courier(server.port) as courier, opened(1, courier.url, prefix) as (paused,):
        await paused.add("c", ANN)
        await RedisPlace([server], prefix).pass_time(LEASE_S + MOMENT_S)
        courier.delay(ADD)
        adding = asyncio.create_task(paused.add("c", BOB))
        await courier.delayed.wait()
        assert await paused.renew(NOW) is False
        assert await paused.members("c", NOW) == {}
        courier.go_on.set()
        await adding
        assert await paused.members("c", NOW) == {"b1": BOB}


async def test_a_lapse_is_final() -> None:
    """A process that a sweep has begun to clear away does not come alive again if the clock of Redis is set back."""
    server, prefix = shared_server(), unique_prefix()
    place = RedisPlace([server], prefix)
    async with opened(2, server.url, prefix) as (quiet, other):
        for number in range(100):
            await enter(quiet, f"c{number}", crowd(50))
        await place.pass_time(LEASE_S / 2)
        await other.renew(NOW)
        await place.pass_time(LEASE_S / 2 + MOMENT_S)
        first = await other.sweep(NOW)
        assert len(first) < 5000
        await place.pass_time(-2 * MOMENT_S)
        assert await quiet.renew(NOW) is False
        assert len(first) + len(await sweep_all(other, NOW)) == 5000


async def test_one_comes_while_the_last_one_goes() -> None:
    """Whoever sweeps finds a client that was added while the only other one of its process was being removed."""
    server, prefix = shared_server(), unique_prefix()
    async with opened(2, server.url, prefix) as (dead, other):
        await dead.add("c", ANN)
        await asyncio.gather(dead.remove("c", "a1"), dead.add("c", BOB))
        await RedisPlace([server], prefix).pass_time(LEASE_S / 2)
        await other.renew(NOW)
        await RedisPlace([server], prefix).pass_time(LEASE_S / 2 + MOMENT_S)
        assert await sweep_all(other, NOW) == [("c", BOB)]


async def test_who_asks_sees_what_was_there_when_it_asked() -> None:
    """A read that was under way when somebody came is not shared with those who ask afterwards."""
    server, prefix = shared_server(), unique_prefix()
    async with opened(1, server.url, prefix) as (other,), Courier(server.port) as courier:
        async with opened(1, courier.url, prefix) as (reader,):
            await other.add("c", BOB)
            courier.delay(PAGE)
            earlier = asyncio.create_task(reader.members("c", NOW))
            await courier.delayed.wait()
            await other.add("c", ANN)
            later = asyncio.create_task(reader.members("c", NOW))
            courier.go_on.set()
            assert await later == {"a1": ANN, "b1": BOB}
            assert await earlier == {"b1": BOB}


# --- sweepers ------------------------------------------------------------------
async def test_a_sweep_that_races_a_return() -> None:
    """A process adds its members again while two survivors sweep: all are there in the end, none was taken twice."""
    server, prefix = shared_server(), unique_prefix()
    infos = crowd(600)
    async with opened(3, server.url, prefix) as (paused, *survivors):
        await asyncio.gather(*(paused.add(f"c{number % 7}", info) for number, info in enumerate(infos)))
        await RedisPlace([server], prefix).pass_time(LEASE_S / 2)
        for one in survivors:
            await one.renew(NOW)
        await RedisPlace([server], prefix).pass_time(LEASE_S / 2 + MOMENT_S)

        async def come_back() -> None:
            assert await paused.renew(NOW) is False
            for start in range(0, len(infos), 50):
                numbers = range(start, start + 50)
                await asyncio.gather(*(paused.add(f"c{number % 7}", infos[number]) for number in numbers))

        sweeping = [asyncio.create_task(sweep_all(one, NOW)) for one in survivors]
        await come_back()
        taken = [info.client for task in sweeping for _, info in await task]
        assert len(taken) == len(set(taken))
        found: dict[str, ClientInfo] = {}
        for channel in range(7):
            members = await survivors[0].members(f"c{channel}", NOW)
            assert await survivors[0].stats(f"c{channel}", NOW) == (
                len(members),
                len({info.user for info in members.values()}),
            )
            found |= members
        assert found == {info.client: info for info in infos}
        assert [await sweep_all(one, NOW) for one in survivors] == [[], []]


async def test_a_sweeper_that_dies_on_the_way() -> None:
    """A sweep that ends in the middle leaves whole entries behind, which another takes; none is taken twice."""
    server, prefix = shared_server(), unique_prefix()
    total = 3 * SWEPT_AT_ONCE
    async with opened(3, server.url, prefix) as (dead, killed, other):
        for channel in ("c", "d", "e"):
            await enter(dead, channel, crowd(SWEPT_AT_ONCE, channel))
        await RedisPlace([server], prefix).pass_time(LEASE_S / 2)
        for one in (killed, other):
            await one.renew(NOW)
        await RedisPlace([server], prefix).pass_time(LEASE_S / 2 + MOMENT_S)
        first = await killed.sweep(NOW)
        assert SWEPT_AT_ONCE <= len(first) < total, "it returns what it has, to be announced"
        entries = [Keys(prefix).of(channel, "entries")[0] for channel in ("c", "d", "e")]
        left = total - len(first)
        sweeping = asyncio.create_task(killed.sweep(NOW))
        await until(lambda: _fewer(server, entries, left))
        sweeping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sweeping
        rest = await sweep_all(other, NOW)
        taken = [info.client for _, info in (*first, *rest)]
        assert len(taken) == len(set(taken)) < total
        for channel in ("c", "d", "e"):
            assert server.command("EXISTS", *Keys(prefix).of(channel, "entries", "counts", "users")) == 0
        assert server.command("ZCARD", Keys(prefix).leases) == 2


async def _fewer(server: RedisServer, entries: list[str], than: int) -> bool:
    lengths: list[int] = [server.command("HLEN", key) for key in entries]
    return sum(lengths) < than


@pytest.mark.parametrize("count", [1, 250])
async def test_an_answer_that_was_lost_is_given_again(count: int) -> None:
    """A sweep whose answer is cut off on the way returns the same entries later, once each."""
    server, prefix = shared_server(), unique_prefix()
    infos = crowd(count)
    async with Courier(server.port) as courier, opened(1, server.url, prefix) as (dead,):
        async with opened(1, courier.url, prefix) as (sweeper,):
            await enter(dead, "c", infos)
            await RedisPlace([server], prefix).pass_time(LEASE_S / 2)
            await sweeper.renew(NOW)
            await RedisPlace([server], prefix).pass_time(LEASE_S / 2 + MOMENT_S)
            courier.lose(SWEEP)
            swept = await sweep_all(sweeper, NOW)
            assert sorted(swept, key=repr) == sorted((("c", info) for info in infos), key=repr)
            assert server.command("EXISTS", *Keys(prefix).of("c", "entries", "counts", "users")) == 0


async def test_an_answer_that_stays_away_is_asked_for_by_the_next_sweep() -> None:
    """If Redis stalls after a sweep has taken entries, a later one returns them, though nothing is left to sweep."""
    prefix = unique_prefix()
    with RedisServer() as server:
        async with Courier(server.port) as courier, opened(2, server.url, prefix) as (dead, other):
            async with opened(1, courier.url, prefix) as (sweeper,):
                await enter(dead, "c", crowd(20))
                await RedisPlace([server], prefix).pass_time(LEASE_S / 2)
                for one in (sweeper, other):
                    await one.renew(NOW)
                await RedisPlace([server], prefix).pass_time(LEASE_S / 2 + MOMENT_S)
                courier.hold(SWEEP)
                with impatient():
                    sweeping = asyncio.create_task(sweeper.sweep(NOW))
                    await until(lambda: _held(courier))
                    server.freeze()
                    with pytest.raises(Unavailable):
                        await sweeping
                server.thaw()
                await courier.deliver()
                assert await other.stats("c", NOW) == (0, 0)
                assert await sweep_all(other, NOW) == []
                assert len(await sweep_all(sweeper, NOW)) == 20
                assert await sweep_all(sweeper, NOW) == []


async def _held(courier: Courier) -> bool:
    return bool(courier._held)


# --- what comes late -------------------------------------------------------------
async def test_a_removal_that_comes_late_takes_nothing_newer() -> None:
    """A removal that hung on a broken connection arrives after the client was added again: it stays."""
    server, prefix = shared_server(), unique_prefix()
    async with Courier(server.port) as courier, opened(1, courier.url, prefix) as (one,):
        await one.add("c", ANN)
        courier.hold(REMOVE)
        await one.remove("c", "a1")  # said again on another connection
        await one.add("c", ANN)
        await courier.deliver()
        assert await one.members("c", NOW) == {"a1": ANN}
        assert await one.stats("c", NOW) == (1, 1)


async def test_an_addition_that_comes_late_does_not_stay() -> None:
    """An entry that hung on a broken connection arrives after its removal: it is gone again with the next sweep."""
    with RedisServer() as server:
        prefix = unique_prefix()
        async with Courier(server.port) as courier, opened(1, courier.url, prefix) as (one,):
            await one.add("c", BOB)
            courier.hold(ADD)
            with impatient():
                adding = asyncio.create_task(one.add("c", ANN))
                await until(lambda: _held(courier))
                server.freeze()
                with pytest.raises(Unavailable):
                    await adding
            server.thaw()
            await one.remove("c", "a1")
            await courier.deliver()
            assert "a1" in await one.members("c", NOW)
            assert await one.sweep(NOW) == []
            assert await one.members("c", NOW) == {"b1": BOB}
            await one.add("c", ANN)
            for _ in range(SAID_AGAIN + 1):
                await one.sweep(NOW)
            assert await one.members("c", NOW) == {"a1": ANN, "b1": BOB}


# --- Redis away ------------------------------------------------------------------
async def refuses(one: RedisPresence) -> None:
    """See that every method says soon that Redis cannot answer."""
    calls: list[Callable[[], Awaitable[Any]]] = [
        lambda: one.add("c", BOB),
        lambda: one.remove("c", "b1"),
        lambda: one.members("c", NOW),
        lambda: one.stats("c", NOW),
        lambda: one.renew(NOW),
        lambda: one.sweep(NOW),
    ]

    async def refused(call: Callable[[], Awaitable[Any]]) -> None:
        with pytest.raises(Unavailable, match=r"^redis\.url: "):
            await call()

    with impatient(SHORT_S):
        async with awake() as watch:
            await asyncio.gather(*(refused(call) for call in calls))
    assert watch.s < 2 * SHORT_S


async def test_redis_dies_and_comes_back_empty() -> None:
    """While it is down everything is refused at once; when it is back ``renew`` says that all must be added again."""
    with RedisServer() as server:
        async with opened(2, server.url) as (one, other):
            await one.add("c", ANN)
            await other.add("c", BOB)
            server.kill()
            await refuses(one)
            server.start()
            assert await other.members("c", NOW) == {}
            for presence, info in ((one, ANN), (other, BOB)):
                assert await presence.renew(NOW) is False
                await presence.add("c", info)
                assert await presence.renew(NOW) is True
            assert await other.members("c", NOW) == {"a1": ANN, "b1": BOB}
            for presence in (one, other):
                assert await sweep_all(presence, NOW) == []


async def test_redis_stalls() -> None:
    """While Redis is stopped nothing hangs longer than it should, and a crowd that tried leaves nothing behind."""
    with RedisServer() as server:
        async with opened(1, server.url) as (one,):
            await one.add("c", ANN)
            server.freeze()
            await refuses(one)
            with impatient(SHORT_S):
                failed = await asyncio.gather(*(one.add("c", info) for info in crowd(500)), return_exceptions=True)
            assert {type(end) for end in failed} == {Unavailable}
            server.thaw()
            await asyncio.gather(*(one.remove("c", info.client) for info in (*crowd(500), BOB)))
            await until(lambda: _renewed(one))
            await sweep_all(one, NOW)
            assert await one.members("c", NOW) == {"a1": ANN}
            assert await one.stats("c", NOW) == (1, 1)


async def _renewed(one: RedisPresence) -> bool:
    return await one.renew(NOW)


async def test_closing_without_redis(log: ExpectedLog) -> None:
    """A process can end while Redis is away: it says that its entries stay until the lease ends, and waits not long."""
    log.expect("presence.unavailable")
    with RedisServer() as server:
        async with opened(1, server.url) as (one,):
            await one.add("c", ANN)
            server.kill()
            with impatient(SHORT_S):
                async with awake() as watch:
                    await one.close()
            assert watch.s < 3 * SHORT_S
        server.start()
    assert "until the lease ends" in str(log.seen("presence.unavailable")[0]["why"])


async def test_connections_that_were_cut_while_idle() -> None:
    """A connection that was cut while nobody spoke costs no refusal."""
    with RedisServer() as server:
        async with opened(1, server.url) as (one,):
            await one.add("c", ANN)
            for _ in range(3):
                assert await one.members("c", NOW) == {"a1": ANN}
                assert server.cut_clients("normal") > 0
                await one.add("c", ANN)
                assert await one.renew(NOW) is True
                assert await one.stats("c", NOW) == (1, 1)


async def test_scripts_that_were_forgotten() -> None:
    """``SCRIPT FLUSH`` costs nothing but another way of asking."""
    with RedisServer() as server:
        async with opened(1, server.url) as (one,):
            await one.add("c", ANN)
            server.command("SCRIPT", "FLUSH")
            await one.add("c", BOB)
            assert await one.members("c", NOW) == {"a1": ANN, "b1": BOB}


# --- Redis forgetful ---------------------------------------------------------------
async def test_what_a_server_lost_is_entered_again(log: ExpectedLog) -> None:
    """A server that comes back with the lease but without the entries gets them again, those of who is still there."""
    with RedisServer() as server:
        prefix = unique_prefix()
        async with opened(2, server.url, prefix) as (one, other):
            await enter(one, "c", crowd(300))
            await one.add("d", ANN)
            await other.add("c", BOB)
            await asyncio.gather(*(one.remove("c", info.client) for info in crowd(200)))
            keys = Keys(prefix)
            names = ("entries", "counts", "users")
            server.command("DEL", *keys.of("c", *names), *keys.of("d", *names), keys.channels(one._incarnation))
            server.cut_clients("normal")
            for presence in (one, other):
                assert await presence.renew(NOW) is True
            expected = {info.client: info for info in (*crowd(300)[200:], BOB)}
            await until(lambda: _members_are(other, "c", expected))
            await until(lambda: _members_are(other, "d", {"a1": ANN}))
            await until(lambda: _told(log))
            assert {fields["count"] for fields in log.seen("presence.entered_again")} == {101, 1}
            await RedisPlace([server], prefix).pass_time(LEASE_S / 2)
            await other.renew(NOW)
            await RedisPlace([server], prefix).pass_time(LEASE_S / 2 + MOMENT_S)
            assert len(await sweep_all(other, NOW)) == 101
            assert await other.members("c", NOW) == {"b1": BOB}


async def _told(log: ExpectedLog) -> bool:
    return len(log.seen("presence.entered_again")) == 2


async def _members_are(one: RedisPresence, channel: str, expected: dict[str, ClientInfo]) -> bool:
    return await one.members(channel, NOW) == expected


async def test_entering_again_takes_nothing_from_others() -> None:
    """A client that was added elsewhere since is not taken back by its old process after a reconnection."""
    with RedisServer() as server:
        prefix = unique_prefix()
        async with opened(2, server.url, prefix) as (old, new):
            await old.add("c", ANN)
            await old.add("c", BOB)
            moved = ClientInfo("ann", "a1", b"elsewhere")
            await new.add("c", moved)
            server.command("HDEL", Keys(prefix).of("c", "entries")[0], "b1")
            server.cut_clients("normal")
            assert await old.renew(NOW) is True
            await until(lambda: _members_are(new, "c", {"a1": moved, "b1": BOB}))


class Keeper:
    """Does for a presence what its node does: renews, and adds again what must be, until that has worked."""

    def __init__(self, presence: RedisPresence, held: list[tuple[str, ClientInfo]]) -> None:
        self.presence = presence
        self._held = held
        self._owed = list(held)

    async def keep(self) -> None:
        """Renew once; raises ``Unavailable`` and goes on where it stopped the next time."""
        if not await self.presence.renew(NOW):
            self._owed = list(self._held)
        while self._owed:
            await self.presence.add(*self._owed[-1])
            self._owed.pop()

    async def sees(self, held: list[tuple[str, ClientInfo]]) -> bool:
        """Is everybody there?"""
        views = [await self.presence.members(channel, NOW) for channel, _ in held]
        return all(info.client in view for view, (_, info) in zip(views, held, strict=True))


async def _kept(keepers: list[Keeper], held: list[tuple[str, ClientInfo]]) -> bool:
    for keeper in keepers:
        await keeper.keep()
    return all([await keeper.sees(held) for keeper in keepers])


async def test_a_failover_by_sentinel() -> None:
    """When the primary dies everything goes on with the other one, with all members."""
    with Sentinels() as sentinels:
        async with opened(2, sentinels.url) as presences:
            held = [(f"c{number % 5}", info) for number, info in enumerate(crowd(20))]
            keepers = [Keeper(presence, held[number::2]) for number, presence in enumerate(presences)]
            assert await _kept(keepers, held)
            before = sentinels.primary()
            before.kill()
            await asyncio.to_thread(sentinels.wait_for_other_primary, before)
            await until(lambda: _kept(keepers, held))
            before.start()
            await until(lambda: _kept(keepers, held))


async def test_a_primary_that_was_set_aside() -> None:
    """After an ordered failover the old primary refuses to write, and the new one is found."""
    with Sentinels() as sentinels:
        async with opened(2, sentinels.url) as presences:
            held = [(f"c{number % 5}", info) for number, info in enumerate(crowd(20))]
            keepers = [Keeper(presence, held[number::2]) for number, presence in enumerate(presences)]
            assert await _kept(keepers, held)
            before = sentinels.primary()
            await asyncio.to_thread(sentinels.fail_over)
            await asyncio.to_thread(wait_for_replica, before, TILTED_S)  # it is set aside seconds later
            await until(lambda: _kept(keepers, held))
            await presences[0].add("new", ANN)
            assert await presences[1].members("new", NOW) == {"a1": ANN}


async def test_nodes_of_a_cluster_that_come_back_empty() -> None:
    """Each node in turn dies and comes back without anything: the others' channels go on, and all members come back."""
    with RedisCluster() as cluster:
        async with opened(2, cluster.url) as presences:
            held = [(f"c{number}", info) for number, info in enumerate(crowd(30))]
            keepers = [Keeper(presence, held[number::2]) for number, presence in enumerate(presences)]
            assert await _kept(keepers, held)
            for server in cluster.servers:
                server.kill()
                answers = await asyncio.gather(
                    *(presences[0].members(channel, NOW) for channel, _ in held), return_exceptions=True
                )
                assert any(isinstance(answer, Unavailable) for answer in answers)
                server.start()
                await asyncio.to_thread(cluster.wait_until_well)
                await until(lambda: _kept(keepers, held))


async def test_a_slot_that_moves() -> None:
    """A channel whose slot was given to another node is found there."""
    with RedisCluster() as cluster:
        prefix = unique_prefix()
        async with opened(2, cluster.url, prefix) as (one, other):
            await one.add("elsewhere", ANN)
            slot = cluster.servers[0].command("CLUSTER", "KEYSLOT", Keys(prefix).of("c", "entries")[0])
            source = cluster.owner(slot)
            await asyncio.to_thread(
                cluster.move_slot, slot, next(server for server in cluster.servers if server is not source)
            )
            await one.add("c", ANN)
            assert await other.members("c", NOW) == {"a1": ANN}
            assert await other.stats("c", NOW) == (1, 1)


# --- what it costs -------------------------------------------------------------------
def calls(server: RedisServer) -> dict[str, int]:
    """How often each command was carried out, within scripts, too."""
    facts = server.facts("INFO", "commandstats")
    return {
        name.removeprefix("cmdstat_"): int(fields.split(",")[0].removeprefix("calls="))
        for name, fields in facts.items()
    }


async def test_what_members_cost() -> None:
    """The last hundred of a thousand members cost as many steps as the first, also if each looks how many there are."""
    with RedisServer() as server:
        async with opened(2, server.url) as presences:
            infos = crowd(1000)
            costs = []
            for start in range(0, 1000, 100):
                server.command("CONFIG", "RESETSTAT")
                for number in range(start, start + 100):
                    await presences[number % 2].add("c", infos[number])
                    await presences[number % 2].stats("c", NOW)
                for one in presences:
                    await one.renew(NOW)
                found = calls(server)
                assert not {"hgetall", "hkeys", "hvals", "smembers"} & found.keys() or found["hgetall"] <= 100
                assert "hscan" not in found
                costs.append(sum(found.values()))
            assert max(costs) <= 1.2 * min(costs) < 100 * 20, costs


async def test_what_looking_around_costs() -> None:
    """A thousand who ask at once who is there cost a few reads, in pages, and each sees all."""
    with RedisServer() as server:
        async with opened(2, server.url) as (one, other):
            infos = crowd(1000)
            await enter(one, "c", infos)
            server.command("CONFIG", "RESETSTAT")
            views = await asyncio.gather(*(other.members("c", NOW) for _ in range(1000)))
            assert all(view == {info.client: info for info in infos} for view in views)
            assert calls(server)["hscan"] <= 2 * (1000 // PAGE_ENTRIES + 2)


async def test_sweeping_is_done_in_small_steps() -> None:
    """No script clears away more than a hundred entries, however many there are."""
    with RedisServer() as server:
        prefix = unique_prefix()
        async with opened(2, server.url, prefix) as (dead, other):
            await enter(dead, "c", crowd(1000))
            await RedisPlace([server], prefix).pass_time(LEASE_S / 2)
            await other.renew(NOW)
            await RedisPlace([server], prefix).pass_time(LEASE_S / 2 + MOMENT_S)
            server.command("CONFIG", "RESETSTAT")
            assert len(await sweep_all(other, NOW)) == 1000
            assert calls(server)["srandmember"] >= 1000 // SWEPT_BY_SCRIPT


async def test_nothing_is_left_behind() -> None:
    """When everybody has left and ended in order, the only keys are those that expire."""
    for url, servers in ((shared_server().url, [shared_server()]), (shared_cluster().url, shared_cluster().servers)):
        prefix = unique_prefix()
        async with opened(2, url, prefix) as (one, other):
            for channel in ("c", "d"):
                await enter(one, channel, crowd(30))
                await enter(other, channel, crowd(30, "other"))
            await asyncio.gather(*(one.remove("c", info.client) for info in crowd(30)))
        left = [key for server in servers for key in server.command("KEYS", f"{prefix}*") if b":swept:" not in key]
        assert left == []


# --- words for the operator ----------------------------------------------------------
async def test_it_says_at_the_start_what_is_wrong() -> None:
    """Nobody there, a wrong password, another kind of Redis, no URL: each is said, and ``open`` may be tried again."""
    with RedisServer("--requirepass", "right") as server:
        wrong = {
            f"redis://:wrong@{server.address}": "refuses",
            f"redis://{server.address}": "password",
            f"redis+cluster://:right@{server.address}": "cluster",
            f"redis+sentinel://{server.address}?sentinel_master_name=m&sentinel_password=right": "Sentinel",
            "redis://127.0.0.1:1": "127.0.0.1:1",
        }
        for url, word in wrong.items():
            presence = RedisPresence(RedisSettings(url=url), LEASE_S)
            with pytest.raises(Unavailable, match=r"^redis\.url: ") as refused:
                await presence.open(NOW)
            assert word.lower() in str(refused.value).lower()
            assert "right" not in str(refused.value)
            with pytest.raises(Unavailable):
                await presence.add("c", ANN)
            await presence.close()
    with RedisServer() as server:
        presence = RedisPresence(RedisSettings(url=server.url, prefix=unique_prefix()), LEASE_S)
        server.kill()
        with pytest.raises(Unavailable):
            await presence.open(NOW)
        server.start()
        await presence.open(NOW)
        await presence.add("c", ANN)
        await presence.close()
