"""What the Redis broker does while Redis is killed, cut off, stopped, swapped or misconfigured.

Each way must come back by itself: everything is followed again, the node is told
that words may have been missed, and nothing but words is lost.
"""

import asyncio
import datetime
import ipaddress
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from conftest import ExpectedLog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from patience import awake, impatient
from ports import free_port
from proxy import Proxy
from redis_server import (
    RedisCluster,
    RedisServer,
    Sentinels,
    shared_cluster,
    shared_sentinels,
    shared_server,
    unique_prefix,
)
from test_broker import Ear, word

from server.broker import Bye, Published
from server.broker import redis as redis_broker
from server.broker.redis import QUEUE_BYTES, RedisBroker
from server.errors import Unavailable
from server.redis import Wire, parse, slot_of, trusted
from server.settings import RedisSettings
from server.stream import Position, Publication

PATIENCE_S = 20.0


class Party(Ear):
    """One process, with what it was told about returns."""

    def __init__(self, url: str, prefix: str) -> None:
        self.redis = RedisBroker(RedisSettings(url=url, prefix=prefix))
        super().__init__(self.redis)
        self.returns = 0
        self.redis.on_return = self._return

    def _return(self) -> None:
        self.returns += 1
        self._news.set()


@asynccontextmanager
async def parties(*urls: str, prefix: str = "") -> AsyncIterator[list[Party]]:
    """Processes at these addresses of one and the same Redis, each open, and all following "c"."""
    prefix = prefix or unique_prefix()
    those = [Party(url, prefix) for url in urls]
    try:
        for one in those:
            await one.broker.open(str(uuid.uuid4()))
            await one.broker.follow("c")
        yield those
    finally:
        await asyncio.gather(*(one.broker.close() for one in those))


async def until(true: Callable[[], object]) -> None:
    """Look until something is ``true`` of a broker that tells nobody when it becomes so."""
    async with asyncio.timeout(PATIENCE_S):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def _hear_one_another(*those: Party) -> None:
    """Each hears what each other one says in "c" from now on, and what it tells."""
    for speaker in those:
        others = [one for one in those if one is not speaker]
        for one in others:
            one.words.clear()
            one.notes.clear()
        speaker.broker.announce(word(7))
        speaker.broker.tell(Bye("speaker"))
        for one in others:
            await one.until(lambda one=one: 7 in one.numbers("c") and Bye("speaker") in one.notes)  # type: ignore[misc]


# --- a Redis that goes and comes -----------------------------------------------
async def test_a_killed_redis_that_comes_back_empty(log: ExpectedLog) -> None:
    """While Redis is dead the trouble is told; once it is back all hear one another again, and each is told so."""
    log.expect("broker.lost")
    with RedisServer() as redis:
        async with parties(redis.url, redis.url) as those:
            await _hear_one_another(*those)
            redis.kill()
            for one in those:
                await until(lambda one=one: one.broker.trouble)  # type: ignore[misc]
                assert redis.address in one.broker.trouble
                one.broker.announce(word(1))
            assert [one.returns for one in those] == [0, 0]
            redis.start()
            for one in those:
                await one.until(lambda one=one: one.returns == 1)  # type: ignore[misc]
                assert one.broker.trouble == ""
            await _hear_one_another(*those)
    assert len(log.seen("broker.lost")) == 4  # two lines each
    await until(lambda: len(log.seen("broker.returned")) == 4)


async def test_wishes_outlive_an_outage(log: ExpectedLog) -> None:
    """A ``follow`` in an outage is refused after about a second, fulfilled on return; an ``unfollow`` then counts."""
    log.expect("broker.lost")
    with RedisServer() as redis:
        async with parties(redis.url, redis.url) as (speaker, hearer):
            await hearer.broker.follow("left")
            redis.kill()
            await until(lambda: hearer.broker.trouble and speaker.broker.trouble)
            began = time.monotonic()
            with pytest.raises(Unavailable, match=redis.address), impatient():
                async with awake() as watch:
                    await hearer.broker.follow("wished")
            assert time.monotonic() - began > 0.5
            assert watch.s < 5
            await hearer.broker.unfollow("left")
            redis.start()
            await hearer.until(lambda: hearer.returns == 1)
            await hearer.broker.follow("wished")
            await until(lambda: not speaker.broker.trouble)
            await _hear_one_another(speaker, hearer)
            for channel in ("left", "wished", "c"):
                speaker.broker.announce(word(1, channel))
            await hearer.until(lambda: 1 in hearer.numbers("c"))
            assert (hearer.numbers("left"), hearer.numbers("wished")) == ([], [1])


async def test_a_follow_that_waits_is_answered_by_the_return(log: ExpectedLog) -> None:
    """Who asks while the connection is being made again waits for that, all together, and is in force then."""
    log.expect("broker.lost")
    with RedisServer() as redis:
        async with parties(redis.url, redis.url) as (speaker, hearer):
            assert redis.cut_clients("pubsub") == 2
            channels = [f"c{number}" for number in range(50)]
            await asyncio.gather(*(hearer.broker.follow(channel) for channel in channels for _ in range(2)))
            for channel in channels:
                speaker.broker.announce(word(1, channel))
            await hearer.until(lambda: all(hearer.numbers(channel) == [1] for channel in channels))


@pytest.mark.parametrize("kind", ["pubsub", "normal"])
async def test_killed_connections(kind: str, log: ExpectedLog) -> None:
    """``CLIENT KILL`` of those that hear is told as a return; of those that speak it is mended as well."""
    log.expect("broker.lost")
    with RedisServer() as redis:
        async with parties(redis.url, redis.url) as those:
            for _ in range(3):
                before = len(log.seen("broker.returned"))
                assert redis.cut_clients(kind) == 2
                await until(lambda before=before: len(log.seen("broker.returned")) == before + 2)  # type: ignore[misc]
                await _hear_one_another(*those)
            assert [one.returns for one in those] == ([3, 3] if kind == "pubsub" else [0, 0])


async def test_a_stopped_redis(log: ExpectedLog) -> None:
    """A Redis that is stopped and holds its connections is noticed within seconds; continued, it is as before."""
    log.expect("broker.lost", "broker.overflowed")
    with RedisServer() as redis:
        async with parties(redis.url, redis.url) as those:
            redis.freeze()
            async with awake() as watch:
                await until(lambda: all(one.broker.trouble for one in those))
            assert watch.s < 4
            await until(lambda: len(log.seen("broker.lost")) == 4)
            redis.thaw()
            for one in those:
                await one.until(lambda one=one: one.returns == 1)  # type: ignore[misc]
                assert one.broker.trouble == ""
            await until(lambda: len(log.seen("broker.returned")) == 4)
            await _hear_one_another(*those)


async def test_a_first_answer_that_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Redis whose first answer comes after the first PING is fallen silent and back, and open all the same."""
    monkeypatch.setattr(redis_broker, "PING_S", 0.1)
    monkeypatch.setattr(redis_broker, "SILENT_PINGS", 600)  # for as many of these a machine may stand still
    with RedisServer() as redis:
        async with Proxy("127.0.0.1", redis.port) as proxy:
            proxy.delay_s = 0.08
            async with parties(f"redis://{proxy.address}", redis.url) as those:
                await _hear_one_another(*those)


async def test_a_redis_that_hesitates() -> None:
    """Stopped for less than three seconds, Redis is in trouble for a while, and nothing is lost or made again."""
    with RedisServer() as redis:
        async with parties(redis.url, redis.url) as (speaker, hearer):
            redis.freeze()
            for number in range(1, 101):
                speaker.broker.announce(word(number))
            await until(lambda: hearer.broker.trouble)
            redis.thaw()
            await hearer.until(lambda: hearer.numbers("c") == list(range(1, 101)))
            await until(lambda: not hearer.broker.trouble)
            assert hearer.returns == 0


async def test_a_connection_that_is_cut_in_half(log: ExpectedLog) -> None:
    """A half-open connection, on which nothing ever comes again, is dropped after three seconds and made again."""
    log.expect("broker.lost")
    with RedisServer() as redis:
        async with Proxy("127.0.0.1", redis.port) as proxy, parties(f"redis://{proxy.address}", redis.url) as those:
            cut_off, other = those
            proxy.stall()
            await until(lambda: cut_off.broker.trouble)
            assert proxy.address in cut_off.broker.trouble
            assert other.broker.trouble == ""
            await until(lambda: len(log.seen("broker.lost")) == 2)
            proxy.cut()
            proxy.flow()
            await cut_off.until(lambda: cut_off.returns == 1)
            await until(lambda: len(log.seen("broker.returned")) == 2)
            await _hear_one_another(*those)
            assert other.returns == 0


async def test_cuts_and_refusals(log: ExpectedLog) -> None:
    """Connections that are reset, also while they are being made, and refused for a while come back each time."""
    log.expect("broker.lost")
    with RedisServer() as redis:
        async with Proxy("127.0.0.1", redis.port) as proxy, parties(*[f"redis://{proxy.address}"] * 2) as those:
            for turn in range(1, 4):
                proxy.refuse()
                proxy.cut()
                await until(lambda: all(one.broker.trouble for one in those))
                await proxy.accept()
                for one in those:
                    await one.until(lambda one=one, turn=turn: one.returns >= turn)  # type: ignore[misc]
            await until(lambda: len(log.seen("broker.lost")) == len(log.seen("broker.returned")))
            await _hear_one_another(*those)


async def test_a_slow_network() -> None:
    """With 300 ms each way words come late and in order, and ``follow`` is in force when it returns; no trouble."""
    with RedisServer() as redis:
        async with Proxy("127.0.0.1", redis.port) as proxy, parties(redis.url, f"redis://{proxy.address}") as those:
            speaker, hearer = those
            proxy.delay_s = 0.3
            for number in range(1, 6):
                await hearer.broker.follow(f"c{number}")
                speaker.broker.announce(word(number, f"c{number}"))
            await hearer.until(lambda: bool(hearer.numbers("c5")))
            assert [hearer.numbers(f"c{number}") for number in range(1, 6)] == [[1], [2], [3], [4], [5]]
            assert (hearer.broker.trouble, hearer.returns) == ("", 0)


async def test_a_network_that_loses_messages() -> None:
    """Of messages lost on the way nobody knows: some words are missing, the rest is in order, and all seems well."""
    with RedisServer() as redis:
        async with (
            Proxy("127.0.0.1", redis.port, resp=True) as proxy,
            parties(redis.url, f"redis://{proxy.address}") as those,
        ):
            speaker, hearer = those
            proxy.lose(0.3)
            for number in range(1, 1001):
                speaker.broker.announce(word(number))
            await until(lambda: proxy.passed + proxy.lost >= 1000)
            proxy.lose(0)
            await _hear_one_another_after(speaker, hearer)
            heard = hearer.numbers("c")[:-1]
            assert 600 < len(heard) < 800
            assert heard == sorted(heard)
            assert (hearer.broker.trouble, hearer.returns) == ("", 0)


async def _hear_one_another_after(speaker: Party, hearer: Party) -> None:
    """All that was said before has come, or is lost."""
    speaker.broker.announce(word(10_000))
    await hearer.until(lambda: 10_000 in hearer.numbers("c"))


async def test_many_channels_are_followed_again(log: ExpectedLog) -> None:
    """Ten thousand channels are followed again before the return is told, and every one of them is heard."""
    log.expect("broker.lost")
    with RedisServer() as redis:
        async with parties(redis.url, redis.url) as (speaker, hearer):
            channels = [f"many{number}" for number in range(10_000)]
            # So many may take longer than one may wait for; the wishes stand all the same.
            await asyncio.gather(*(hearer.broker.follow(channel) for channel in channels), return_exceptions=True)
            redis.cut_clients("pubsub")
            await hearer.until(lambda: hearer.returns == 1)
            for channel in channels:
                speaker.broker.announce(word(1, channel))
            await hearer.until(lambda: len(hearer.words) == len(channels))


# --- too much ---------------------------------------------------------------------
def _calls(redis: RedisServer, command: str) -> int:
    facts = redis.facts("INFO", "commandstats").get(f"cmdstat_{command}", "calls=0,")
    return int(facts.partition("calls=")[2].partition(",")[0])


async def test_what_is_wished_in_one_turn_is_one_command() -> None:
    """A thousand ``follow`` of one turn of the loop are one SUBSCRIBE, and as many ``unfollow`` one UNSUBSCRIBE."""
    with RedisServer() as redis:
        async with parties(redis.url) as (hearer,):
            before = _calls(redis, "subscribe")
            channels = [f"c{number}" for number in range(1000)]
            await asyncio.gather(*(hearer.broker.follow(channel) for channel in channels))
            assert _calls(redis, "subscribe") == before + 1
            await asyncio.gather(*(hearer.broker.unfollow(channel) for channel in channels))
            await until(lambda: _calls(redis, "unsubscribe") == 1)
            assert redis.heard_by(hearer.redis._name("c1")) == 0


async def test_what_is_said_in_one_turn_is_one_write() -> None:
    """A thousand words of one turn of the loop reach Redis in a few reads of its, in order."""
    with RedisServer() as redis:
        async with parties(redis.url, redis.url) as (speaker, hearer):
            before = int(redis.facts("INFO", "stats")["total_reads_processed"])
            for number in range(1, 1001):
                speaker.broker.announce(word(number))
            await hearer.until(lambda: len(hearer.numbers("c")) == 1000)
            assert hearer.numbers("c") == list(range(1, 1001))
            reads = int(redis.facts("INFO", "stats")["total_reads_processed"]) - before
            assert reads < 100, f"Redis read {reads} times"


async def test_a_redis_that_takes_nothing_costs_bounded_memory(log: ExpectedLog) -> None:
    """What is said to a Redis that stands still waits up to a bound, drops the oldest, and is logged once."""
    log.expect("broker.overflowed", "broker.lost")
    with RedisServer() as redis:
        async with parties(redis.url, redis.url) as (speaker, hearer):
            redis.freeze()
            heavy = Published("c", Position(), (Publication(bytes(16_000)),))
            for _ in range(4 * QUEUE_BYTES // 16_000):
                speaker.broker.announce(heavy)
            mouth = next(iter(speaker.redis._mouths.values()))
            assert mouth._queue_bytes <= QUEUE_BYTES
            for _ in range(100_000):
                speaker.broker.announce(word(1, "light"))
            assert mouth._queue_bytes <= QUEUE_BYTES
            assert len(log.seen("broker.overflowed")) == 1
            redis.thaw()
            await until(lambda: not hearer.broker.trouble and not mouth._queue)
            await _hear_one_another(speaker, hearer)


async def test_a_hearer_that_redis_finds_too_slow(log: ExpectedLog) -> None:
    """Redis cuts a subscriber whose output grows beyond its limit: that is a lost connection like any other."""
    log.expect("broker.lost", "broker.overflowed")
    with RedisServer("--client-output-buffer-limit", "pubsub", "1mb", "1mb", "1") as redis:
        async with Proxy("127.0.0.1", redis.port) as proxy, parties(redis.url, f"redis://{proxy.address}") as those:
            speaker, hearer = those
            proxy.stall()
            heavy = Published("c", Position(), (Publication(bytes(1_000_000)),))
            while redis.heard_by(f"{hearer.redis._prefix.decode()}:c:c") > 1:
                speaker.broker.announce(heavy)
                await asyncio.sleep(0)
            proxy.flow()
            await hearer.until(lambda: hearer.returns == 1)
            await until(lambda: not hearer.broker.trouble)
            speaker.broker.announce(word(9))
            await hearer.until(lambda: 9 in hearer.numbers("c"))


async def test_a_burst_lets_others_have_their_turns() -> None:
    """Ten thousand words that arrive at once are worked off in slices, between which the loop goes on."""
    async with parties(shared_server().url, shared_server().url) as (speaker, hearer):
        turns = 0
        turns_within = [0]

        def work(_: object) -> None:
            hearer.words.append(word(1))
            turns_within.append(turns)
            until = time.perf_counter() + 20e-6
            while time.perf_counter() < until:
                pass  # a word costs its fan-out
            hearer._news.set()

        hearer.broker.on_word = work

        async def tick() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        ticking = asyncio.create_task(tick())
        for number in range(10_000):
            speaker.broker.announce(word(number))
        await hearer.until(lambda: len(hearer.words) == 10_000)
        ticking.cancel()
        most = max(turns_within.count(turn) for turn in set(turns_within))
        assert most < 1000, f"{most} words in one turn of the loop"


# --- what others put into our channels --------------------------------------------
async def test_messages_of_others_are_skipped(log: ExpectedLog) -> None:
    """What cannot be read is skipped with one warning a channel, another version with one in all; the rest is heard."""
    log.expect("broker.unreadable")
    redis, prefix = shared_server(), unique_prefix()
    async with parties(redis.url, redis.url, prefix=prefix) as those:
        for _ in range(2):
            for body in (
                b"",
                b"hello",
                b"w2 node\n\x80",
                b"w2x node\n\x80",
                b"w1 node",
                b"w1 node\n",
                b"w1 node\n\xc1",
                b"w1 other\n\x80",
            ):
                redis.command("PUBLISH", f"{prefix}:c:c", body)
                redis.command("PUBLISH", f"{prefix}:a", body)
        those[0].broker.announce(word(1, "c"))
        await _hear_one_another(*those)
    told = [str(fields["why"]) for fields in log.seen("broker.unreadable")]
    assert len(told) == 6
    assert sum("speak version 2" in one for one in told) == 2
    assert sum(f'"{prefix}:c:c"' in one for one in told) == 2
    assert sum(f'"{prefix}:a"' in one for one in told) == 2


async def test_a_fault_of_the_listener_does_not_make_it_deaf(log: ExpectedLog) -> None:
    """A listener that raises is logged with the channel, and hears the next word."""
    log.expect("broker.listener_failed")
    async with parties(shared_server().url, shared_server().url) as (speaker, hearer):
        hear = hearer.broker.on_word

        def fragile(one: object) -> None:
            hear(one)  # type: ignore[arg-type]
            raise RuntimeError("a fault of ours")

        hearer.broker.on_word = fragile
        speaker.broker.announce(word(1))
        speaker.broker.announce(word(2))
        await hearer.until(lambda: hearer.numbers("c") == [1, 2])
    assert len(log.seen("broker.listener_failed")) == 2


async def test_databases_are_apart() -> None:
    """Redis's channels know no databases, ours do: what is said in one is not heard in the other."""
    prefix = unique_prefix()
    url = shared_server().url
    async with (
        parties(f"{url}/0", f"{url}/0", prefix=prefix) as (first, second),
        parties(f"{url}/1", f"{url}/1", prefix=prefix) as (third, fourth),
    ):
        first.broker.announce(word(1))
        await second.until(lambda: second.numbers("c") == [1])
        third.broker.announce(word(2))
        await fourth.until(lambda: fourth.numbers("c") == [2])
        assert (second.numbers("c"), third.numbers("c")) == ([1], [])


# --- Sentinel ----------------------------------------------------------------------
async def test_a_failover_by_sentinels(log: ExpectedLog) -> None:
    """After an ordered failover and after the death of the primary all meet again at the new one."""
    log.expect("broker.lost")
    with Sentinels() as sentinels:
        async with parties(sentinels.url, sentinels.url) as those:
            await _hear_one_another(*those)
            await asyncio.to_thread(sentinels.fail_over)
            for one in those:
                await one.until(lambda one=one: one.returns >= 1)  # type: ignore[misc]
            await _at_the_primary(sentinels, those)
            await _hear_one_another(*those)
            returns = [one.returns for one in those]
            dead = sentinels.primary()
            dead.kill()
            await asyncio.to_thread(sentinels.wait_for_other_primary, dead)
            for one, before in zip(those, returns, strict=True):
                await one.until(lambda one=one, before=before: one.returns > before)  # type: ignore[misc]
            await _at_the_primary(sentinels, those)
            await _hear_one_another(*those)


async def _at_the_primary(sentinels: Sentinels, those: list[Party]) -> None:
    """Wait until every line goes to the primary."""
    primary = sentinels.primary()
    lines = [line for one in those for line in one.redis._lines()]
    await until(lambda: all(str(line) == primary.address and not line.trouble for line in lines))


# --- cluster -----------------------------------------------------------------------
async def test_a_cluster_node_that_dies_and_returns(log: ExpectedLog) -> None:
    """While a node is dead that is a trouble; once it is back its channels are heard again, and those of the others."""
    log.expect("broker.lost", "broker.refused")
    with RedisCluster() as cluster:
        async with parties(cluster.url, cluster.url) as those:
            channels = [f"c{number}" for number in range(30)]
            for one in those:
                await asyncio.gather(*(one.broker.follow(channel) for channel in channels))
            dead = cluster.servers[1]
            dead.kill()
            await until(lambda: all(one.broker.trouble for one in those))
            dead.start()
            await asyncio.to_thread(cluster.wait_until_well)
            await until(lambda: all(one.returns >= 1 and not one.broker.trouble for one in those))
            await until(lambda: not any(line.trouble for one in those for line in one.redis._lines()))
            for channel in channels:
                those[0].broker.announce(word(1, channel))
            await those[1].until(lambda: all(1 in those[1].numbers(channel) for channel in channels))
            await _hear_one_another(*those)


async def test_a_slot_that_moves() -> None:
    """A channel whose slot moves is followed at its new node, words said meanwhile go there, and the return is told."""
    with RedisCluster() as cluster:
        async with parties(cluster.url, cluster.url) as those:
            speaker, hearer = those
            slot = slot_of(hearer.redis._name("c"))
            for turn in range(1, 4):
                source = cluster.owner(slot)
                target = next(server for server in cluster.servers if server is not source)
                returns = hearer.returns
                await asyncio.to_thread(cluster.move_slot, slot, target)
                speaker.broker.announce(word(100 + turn))
                await hearer.until(lambda returns=returns: hearer.returns > returns)  # type: ignore[misc]
                await until(lambda target=target: target.heard_by(hearer.redis._name("c")) == 2)  # type: ignore[misc]
                await _hear_one_another(*those)
            assert [one.broker.trouble for one in those] == ["", ""]


async def test_a_word_for_a_slot_that_has_moved_is_not_lost() -> None:
    """A word that a node refuses since the slot is elsewhere now arrives there, after those said before it."""
    with RedisCluster() as cluster:
        async with parties(cluster.url) as (speaker,):
            name = speaker.redis._name("c")
            source = cluster.owner(slot_of(name))
            target = next(server for server in cluster.servers if server is not source)
            await asyncio.to_thread(cluster.move_slot, slot_of(name), target)
            async with parties(cluster.url, prefix=speaker.redis._prefix.decode()) as (hearer,):
                for number in range(1, 101):
                    speaker.broker.announce(word(number))
                await hearer.until(lambda: len(hearer.numbers("c")) == 100)
                assert hearer.numbers("c") == list(range(1, 101))


# --- connections ------------------------------------------------------------------
async def test_a_connection_in_the_making_can_be_given_up() -> None:
    """Whenever it is cancelled, ``Wire.open`` ends at once and cancelled.

    It did not always: a library's time-out of Python 3.11 swallowed the
    cancellation, and a broker that could not be opened never came back.
    """
    with RedisServer("--requirepass", "right") as redis:
        address = parse(f"redis://:right@{redis.address}/1")
        opened = 0
        for turns in range(80):
            opening = asyncio.create_task(Wire.open(address, address.servers[0]))
            for _ in range(turns):
                await asyncio.sleep(0)
            if opening.done():
                opening.result().abort()
                opened += 1
                continue
            opening.cancel()
            await asyncio.wait({opening}, timeout=PATIENCE_S)
            assert opening.cancelled(), f"cancelled after {turns} turns of the loop it went on"
        assert opened < 80


# --- what an operator is told ------------------------------------------------------
async def _refused(url: str) -> str:
    """What ``open`` says; it must say so within ten seconds, and leave nothing behind."""
    broker = RedisBroker(RedisSettings(url=url, prefix=unique_prefix()))
    with pytest.raises(Unavailable) as raised:
        async with awake() as watch:
            await broker.open("node")
    assert watch.s < 10
    words = str(raised.value)
    assert words.startswith("redis.url: ")
    assert "secret" not in words
    assert broker._lines() == []
    return words


async def test_a_redis_that_is_not_there() -> None:
    """An address where nobody listens, and a name that nobody has, are said to be so."""
    port = free_port()
    assert f"127.0.0.1:{port} cannot be reached" in await _refused(f"redis://:secret@127.0.0.1:{port}")
    assert f"127.0.0.1:{port} cannot be reached" in await _refused(f"redis+cluster://127.0.0.1:{port}")
    words = await _refused(f"redis+sentinel://127.0.0.1:{port}?sentinel_master_name=m")
    assert f"127.0.0.1:{port} cannot be reached" in words
    assert "expected the name or address of a host, found nowhere.invalid:6379" in await _refused(
        "redis://nowhere.invalid"
    )


async def test_a_redis_that_does_not_answer() -> None:
    """A Redis that accepts connections and says nothing is given up in time."""
    with RedisServer() as redis:
        redis.freeze()
        for url in (redis.url, redis.url.replace("redis:", "redis+cluster:")):
            with impatient():
                assert f"{redis.address} did not answer within 3 s" in await _refused(url)
        with impatient():
            words = await _refused(f"redis+sentinel://{redis.address}?sentinel_master_name=m")
        assert f"{redis.address} did not answer within 3 s" in words
        redis.thaw()


async def test_wrong_logins() -> None:
    """A password that is missing, wrong, or not asked for is each said in its own words."""
    with RedisServer("--requirepass", "right") as redis:
        assert "expected user or password for" in await _refused(redis.url)
        assert "found others: it refuses them" in await _refused(f"redis://:secret@{redis.address}")
        assert "found others: it refuses them" in await _refused(f"redis://ann:secret@{redis.address}")
        async with parties(f"redis://:right@{redis.address}") as (one,):
            assert one.broker.trouble == ""
    assert "found one: none is set there" in await _refused(f"redis://:secret@{shared_server().address}")


async def test_a_user_that_may_not() -> None:
    """A user who may not publish, subscribe or use the channels is named, with what Redis says to it."""
    with RedisServer() as redis:
        redis.command("ACL", "SETUSER", "ann", "on", ">secret", "+subscribe", "+unsubscribe", "+ping", "&*")
        url = f"redis://ann:secret@{redis.address}"
        words = await _refused(url)
        assert f"expected that the user ann may publish at {redis.address}" in words
        redis.command("ACL", "SETUSER", "ann", "+publish", "-subscribe")
        assert f"expected that the user ann may subscribe at {redis.address}" in await _refused(url)
        redis.command("ACL", "SETUSER", "ann", "+subscribe", "resetchannels", "&other*")
        assert "expected that the user ann may " in await _refused(url)
        redis.command("ACL", "SETUSER", "ann", "&test*")
        async with parties(url, url) as those:
            await _hear_one_another(*those)


async def test_an_address_of_another_kind() -> None:
    """A cluster, a Redis alone, a Sentinel and a replica in one another's place are recognized, with what to write."""
    alone, cluster, sentinels = shared_server(), shared_cluster(), shared_sentinels()
    node, sentinel = cluster.servers[0].address, sentinels.sentinels[0].address
    assert 'found a node of a Redis Cluster; write "redis+cluster://"' in await _refused(f"redis://{node}")
    assert 'found a Redis alone; write "redis://"' in await _refused(f"redis+cluster://{alone.address}")
    assert 'found a Sentinel; write "redis+sentinel://"' in await _refused(f"redis://{sentinel}")
    words = await _refused(f"redis+sentinel://{alone.address}?sentinel_master_name=m")
    assert 'found a Redis; write "redis://"' in words
    replica = next(server for server in sentinels.servers if server is not sentinels.primary())
    assert f"expected a primary at {replica.address}, found a replica" in await _refused(replica.url)


async def test_a_master_that_no_sentinel_knows() -> None:
    """The name that was looked for is shown, and those that the Sentinels know."""
    url = shared_sentinels().url.replace("mymaster", "other")
    words = await _refused(url)
    assert "expected sentinel_master_name to be one that Sentinel 127.0.0.1:" in words
    assert 'knows ("mymaster"), found "other"' in words


async def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``rediss`` encrypts; a certificate that is not trusted, and a Redis without TLS, are refused in words."""
    certificate, key = _self_signed(tmp_path)
    port = free_port()
    files = ("--tls-cert-file", str(certificate), "--tls-key-file", str(key), "--tls-auth-clients", "no")
    with RedisServer("--tls-port", str(port), *files) as redis:
        assert f"expected a certificate of 127.0.0.1:{port} that is trusted" in await _refused(
            f"rediss://127.0.0.1:{port}"
        )
        with impatient():
            assert "cannot be reached (it may not speak TLS) within 3 s" in await _refused(f"rediss://{redis.address}")
        assert f"127.0.0.1:{port}" in await _refused(f"redis://127.0.0.1:{port}")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        trusted.cache_clear()
        try:
            async with parties(f"rediss://127.0.0.1:{port}", f"{redis.url}") as those:
                await _hear_one_another(*those)
        finally:
            trusted.cache_clear()


def _self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - day, now + day)
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    files = folder / "certificate.pem", folder / "key.pem"
    files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    pem = serialization.PrivateFormat.PKCS8
    files[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, pem, serialization.NoEncryption()))
    return files


async def test_a_cluster_without_slots() -> None:
    """A cluster whose slots nobody serves yet is no cluster to use."""
    with RedisServer("--cluster-enabled", "yes", "--cluster-port", str(free_port())) as node:
        words = await _refused(f"redis+cluster://{node.address}")
        assert "expected nodes that serve slots" in words


async def test_open_may_be_tried_again() -> None:
    """A broker that could not be opened is opened later as if nothing had been, with what was wished meanwhile."""
    redis = RedisServer()
    prefix = unique_prefix()
    broker = Party(redis.url, prefix)
    with pytest.raises(Unavailable):
        await broker.broker.open("node")
    with pytest.raises(Unavailable, match="not open"):
        await broker.broker.follow("c")
    broker.broker.announce(word(1))
    with redis:
        await broker.broker.open("node")
        async with parties(redis.url, prefix=prefix) as (other,):
            other.broker.announce(word(2))
            await broker.until(lambda: broker.numbers("c") == [2])
        await broker.broker.close()
