"""When things break: each story alone, with real processes, a real replica set and a real Redis.

P2 to P6.  What several faults do together is the storm's to find.
"""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from crowd import call_api
from mongod import disturbing, shared_set
from patience import PATIENT_S, awake
from redis_server import RedisCluster, Sentinels
from stage import Place, Stage, asked_again, asked_until, staging
from support import Client, token

LEASE_S = 3.0
FADE_S = LEASE_S + 2
SWEEP_S = 5.0
SLACK_S = 3.0
"""What a busy machine may add to the times that are promised, besides those for which it stands still."""

LOSSES = ["primary killed", "primary stopped", "primary stepped down", "majority frozen", "mongo killed"]

FAILING_OVER: dict[str, Callable[[], Sentinels | RedisCluster]] = {
    "sentinels": Sentinels,
    "cluster": lambda: RedisCluster(replicas=True),
}

SHORT_TIMEOUT_S = 1.5
"""The publish timeout of those who are meant to meet it."""


@asynccontextmanager
async def _stage(
    folder: Path, processes: int = 2, publish_timeout_s: float = PATIENT_S, **sections: Any
) -> AsyncIterator[Stage]:
    """Processes with a short lease; the shared set is whole in the end."""
    config: dict[str, Any] = {
        "presence": {"lease": f"{LEASE_S:g}s"},
        "mongo": {"publish_timeout": f"{publish_timeout_s:g}s"},
        **sections,
    }
    with disturbing(shared_set()) as replica_set:
        async with staging(folder, replica_set, processes=processes, **config) as stage:
            yield stage


async def _present(place: Place, *channels: str, user: str = "") -> Client:
    """A client of ``place`` that follows these channels."""
    client = await Client.connected(place.url, token=token({"sub": user}) if user else "")
    for channel in channels:  # a process gives Redis a second; whoever is refused for that asks again, as an SDK does
        await asked_again(lambda channel=channel: client.call("subscribe", channel=channel))  # type: ignore[misc]
    return client


@asynccontextmanager
async def _within(limit_s: float) -> AsyncIterator[None]:
    """What is done inside takes no longer, but for the slack."""
    async with awake() as watch:
        yield
    assert watch.s < limit_s + SLACK_S


async def _say(place: Place, channel: str, data: Any, key: str = "") -> dict[str, Any]:
    """Publish by the back-end API; returns the whole answer."""
    body = {"channel": channel, "data": data} | ({"idempotency_key": key} if key else {})
    return await call_api(place, "publish", body)


async def _say_until_heard(place: Place, channel: str, data: Any, client: Client) -> None:
    """Publish to a passing channel, where a word may be lost, until one is heard."""

    async def say() -> bool:
        await _say(place, channel, data)
        return data in _heard(client, channel)

    await asked_until(say, bool)


async def _position(place: Place, channel: str, data: Any, key: str = "") -> int:
    """Publish by the back-end API, with a key as often as it is put off; returns the offset."""

    async def say() -> dict[str, Any]:
        return await _say(place, channel, data, key)

    answer = await (asked_again(say) if key else say())
    assert "result" in answer, answer
    return int(answer["result"]["offset"])


async def _fade(place: Place, channel: str, dead: set[str]) -> None:
    """Wait until none of them is there any more."""
    await asked_until(lambda: _members(place, channel), lambda them: not them & dead)


async def _all_told(client: Client, kind: str, channel: str, times: Mapping[str, int]) -> None:
    """Wait until a join or leave of each was told so many times."""
    await client.until(lambda: all(_told(client, kind, channel, one) >= least for one, least in times.items()))


async def _hears(client: Client, channel: str, payloads: list[Any]) -> None:
    """Wait until exactly these have come."""
    await client.until(lambda: _heard(client, channel) == payloads)


def _heard(client: Client, channel: str) -> list[Any]:
    """The payloads of the publications that came so far."""
    return [push["pub"]["data"] for push in client.pushes if "pub" in push and push["channel"] == channel]


def _told(client: Client, kind: str, channel: str, whom: str) -> int:
    """How often a join or leave of the client ``whom`` was told."""
    return sum(
        push[kind]["info"]["client"] == whom for push in client.pushes if kind in push and push["channel"] == channel
    )


async def _members(place: Place, channel: str) -> set[str]:
    """Client ids of who is there, as the process at ``place`` tells it."""
    answer = await asked_again(lambda: call_api(place, "presence", {"channel": channel}))
    return set(answer["result"]["presence"])


async def _history(place: Place, channel: str) -> list[Any]:
    """The payloads of a channel, whose offsets must be 1, 2, 3 …"""
    result = (await asked_again(lambda: call_api(place, "history", {"channel": channel, "limit": -1})))["result"]
    publications = result.get("publications", [])
    assert [one["offset"] for one in publications] == list(range(1, len(publications) + 1))
    return [one["data"] for one in publications]


# --- a process dies ------------------------------------------------------------
async def test_killed_between_commit_and_announcement(tmp_path: Path) -> None:
    """P2: an acknowledged publication that no other process was told of comes to its subscribers all the same."""
    async with _stage(tmp_path) as stage:
        one, other = stage.places
        bob = await _present(one, "chat:1")
        eve = await _present(other, "chat:1")
        assert await _position(one, "chat:1", "first") == 1
        await eve.until(lambda: _heard(eve, "chat:1") == ["first"])
        epoch = (await call_api(other, "history", {"channel": "chat:1"}))["result"]["epoch"]
        one.redis.stall()
        assert await _position(one, "chat:1", "unannounced") == 2
        await one.kill()
        async with _within(SWEEP_S):
            await eve.until(lambda: "unannounced" in _heard(eve, "chat:1"))
        assert _heard(eve, "chat:1") == ["first", "unannounced"]
        assert (await bob.closed())[0] == 1006
        back = await Client.connected(other.url)
        result = await back.ask("subscribe", channel="chat:1", recover=True, offset=1, epoch=epoch)
        assert (result["recovered"], [one["data"] for one in result["publications"]]) == (True, ["unannounced"])
        for client in (eve, back):
            await client.close()


async def test_members_of_a_dead_process_fade_once(tmp_path: Path) -> None:
    """P6: within the lease plus two seconds they are gone everywhere, and each survivor hears each leave once."""
    async with _stage(tmp_path, 3) as stage:
        victim, *survivors = stage.places
        watching = [await _present(place, "room:1") for place in survivors]
        doomed = [await _present(victim, "room:1") for _ in range(5)]
        dead = {client.hello["client"] for client in doomed}
        for client in watching:
            await _all_told(client, "join", "room:1", dict.fromkeys(dead, 1))
        # A machine that stood still let leases run out before: such leaves are good, and are not counted.
        await asked_until(lambda: _members(survivors[0], "room:1"), dead.issubset)
        once = [{one: _told(client, "leave", "room:1", one) + 1 for one in dead} for client in watching]
        await victim.kill()
        async with _within(FADE_S):
            for place in survivors:
                await _fade(place, "room:1", dead)
            for client, times in zip(watching, once, strict=True):
                await _all_told(client, "leave", "room:1", times)
        # Another lease later, when every survivor has looked for ghosts again, nothing was told twice.
        await asyncio.sleep(LEASE_S)
        for client, times in zip(watching, once, strict=True):
            assert {one: _told(client, "leave", "room:1", one) for one in dead} == times
            await client.close()
        for client in doomed:
            await client.closed()


async def test_a_process_stopped_for_longer_than_its_lease(tmp_path: Path) -> None:
    """What it missed it repairs, what it held it gives up: its members leave once, and are back when it goes on."""
    async with _stage(tmp_path) as stage:
        sleeper, other = stage.places
        bob = await _present(sleeper, "room:1")
        eve = await _present(other, "room:1")
        whom = bob.hello["client"]
        both = {whom, eve.hello["client"]}
        await bob.until(lambda: _told(bob, "join", "room:1", eve.hello["client"]) >= 1)
        await asked_until(lambda: _members(other, "room:1"), both.__eq__)
        joins, leaves = (_told(eve, kind, "room:1", whom) for kind in ("join", "leave"))
        sleeper.stop()
        async with _within(FADE_S):
            await eve.until(lambda: _told(eve, "leave", "room:1", whom) == leaves + 1)
        await asked_until(lambda: _members(other, "room:1"), {eve.hello["client"]}.__eq__)
        for number in range(3):
            assert await _position(other, "room:1", number) == number + 1
        sleeper.cont()
        await bob.until(lambda: _heard(bob, "room:1") == [0, 1, 2])
        await eve.until(lambda: _told(eve, "join", "room:1", whom) > joins)
        async with _within(FADE_S):
            await asked_until(lambda: _members(other, "room:1"), both.__eq__)
        assert await _position(sleeper, "room:1", 3) == 4
        for client in (bob, eve):
            await _hears(client, "room:1", [0, 1, 2, 3])
        # One leave, and one more with a join behind it for each time that the machine stood still for a lease since.
        await eve.until(
            lambda: _told(eve, "join", "room:1", whom) - joins >= _told(eve, "leave", "room:1", whom) - leaves
        )
        for client in (bob, eve):
            await client.close()


# --- Redis ---------------------------------------------------------------------
async def test_redis_dies_and_comes_back_empty(tmp_path: Path) -> None:
    """P4: kept channels go on by the sweep, nobody is disconnected, and afterwards everything is followed again."""
    async with _stage(tmp_path) as stage:
        one, other = stage.places
        bob = await _present(one, "chat:1", "live:1")
        eve = await _present(other, "chat:1", "live:1")
        async with stage.broken("redis emptied", one):
            for number in range(5):
                assert await _position(one, "chat:1", number) == number + 1
            async with _within(SWEEP_S):
                await eve.until(lambda: len(_heard(eve, "chat:1")) == 5)
            await one.ready(503)
            assert await _say(one, "live:1", "here only") == {"result": {}}
            await bob.until(lambda: _heard(bob, "live:1") == ["here only"])
        for place in stage.places:
            await place.ready()
        await _say_until_heard(one, "live:1", "everywhere", eve)
        assert await _position(other, "chat:1", 5) == 6
        ids = {client.hello["client"] for client in (bob, eve)}
        async with _within(FADE_S):
            await asked_until(lambda: _members(one, "live:1"), lambda them: them == ids)
        for client in (bob, eve):
            await _hears(client, "chat:1", [0, 1, 2, 3, 4, 5])
            assert client.close_code is None
            await client.close()


@pytest.mark.parametrize("kind", ["redis cut", "redis stalled", "redis stopped"])
async def test_redis_out_of_reach(tmp_path: Path, kind: str) -> None:
    """P4: a wire that is cut or silent costs kept channels a sweep, and passing ones what was said meanwhile."""
    async with _stage(tmp_path) as stage:
        one, other = stage.places
        eve = await _present(one, "chat:1", "live:1")
        async with stage.broken(kind, one):
            await one.ready(503)
            for number in range(3):
                assert await _position(other, "chat:1", number) == number + 1
            async with _within(SWEEP_S):
                await eve.until(lambda: len(_heard(eve, "chat:1")) == 3)
        await one.ready()
        await _say_until_heard(other, "live:1", "again", eve)
        assert _heard(eve, "chat:1") == [0, 1, 2]
        await eve.close()


async def test_redis_loses_a_third(tmp_path: Path) -> None:
    """P4: with 30 % of the messages lost, kept channels lose and double nothing."""
    async with _stage(tmp_path) as stage:
        one, other = stage.places
        clients = [await _present(place, "chat:1") for place in stage.places]
        async with stage.broken("redis lossy", one):
            for number in range(0, 200, 2):
                await asyncio.gather(_position(one, "chat:1", number), _position(other, "chat:1", number + 1))
            kept = await _history(one, "chat:1")
            assert sorted(kept) == list(range(200))
            for client in clients:
                await _hears(client, "chat:1", kept)
                await client.close()


@pytest.mark.parametrize("kind", FAILING_OVER)
async def test_redis_fails_over(tmp_path: Path, kind: str) -> None:
    """P4: a primary dies, its replica is put in its place, it comes back: kept channels miss nothing, nobody is cut."""
    rooms = [f"chat:{number}" for number in range(6)]
    passing = [f"live:{number}" for number in range(6)]
    with FAILING_OVER[kind]() as redis:
        async with _stage(tmp_path, redis={"url": redis.url}) as stage:
            bob, eve = [await _present(place, *rooms, *passing) for place in stage.places]
            ids = {client.hello["client"] for client in (bob, eve)}

            async def all_hear(number: int) -> None:
                for at, room in enumerate(rooms):
                    assert await _position(stage.places[at % 2], room, number) == number
                for client in (bob, eve):
                    for room in rooms:
                        await _hears(client, room, list(range(1, number + 1)))

            async def all_hear_in_passing(word: str) -> None:
                for channel in passing:
                    await _say_until_heard(stage.places[0], channel, f"{word} from bob's", eve)
                    await _say_until_heard(stage.places[1], channel, f"{word} from eve's", bob)
                    await asked_until(lambda channel=channel: _members(stage.places[0], channel), ids.__eq__)  # type: ignore[misc]

            await all_hear_in_passing("before")
            losing = asyncio.create_task(asyncio.to_thread(redis.lose_primary))
            await all_hear(1)
            dead = await losing
            await all_hear(2)
            await all_hear_in_passing("without it")
            await asyncio.to_thread(dead.start)
            await all_hear(3)
            for place in stage.places:
                await place.ready()
            await all_hear_in_passing("with it again")
            for client in (bob, eve):
                assert client.close_code is None
                await client.close()
            assert [line for place in stage.places for line in place.faults_logged()] == []


# --- MongoDB -------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["mongo cut", "mongo stalled"])
async def test_mongodb_is_away(tmp_path: Path, kind: str) -> None:
    """Kept publishes, new kept subscriptions and history get error 100; all else goes on, and readiness says so."""
    async with _stage(tmp_path, publish_timeout_s=SHORT_TIMEOUT_S) as stage:
        one, other = stage.places
        ann = await _present(one, "chat:1", "live:1")
        eve = await _present(other, "chat:1", "live:1")
        assert await _position(one, "chat:1", "before", "before") == 1
        await eve.until(lambda: _heard(eve, "chat:1") == ["before"])
        async with stage.broken(kind, one), stage.broken(kind, other):
            async with _within(SHORT_TIMEOUT_S):
                assert await ann.refused("publish", channel="chat:1", data="lost?") == 100
            assert (await _say(other, "chat:2", "lost?"))["error"]["code"] == 100
            assert await ann.refused("subscribe", channel="chat:3") == 100
            assert await ann.refused("history", channel="chat:1", limit=1) == 100
            for place in stage.places:
                assert "mongo" in await place.ready(503)
            await ann.ask("publish", channel="live:1", data="passing")
            await eve.until(lambda: _heard(eve, "live:1") == ["passing"])
            new = await _present(other, "live:1")
            members = {client.hello["client"] for client in (ann, eve, new)}
            await asked_until(
                lambda: ann.call("presence", channel="live:1"),
                lambda reply: reply.get("presence", {}).get("presence", {}).keys() == members,
            )
            for client in (ann, eve, new):
                assert client.close_code is None
        for place in stage.places:
            await place.ready()
        assert await _position(one, "chat:1", "after", "after") in (2, 3)
        kept = await _history(other, "chat:1")
        assert kept in (["before", "after"], ["before", "lost?", "after"])
        for client in (ann, eve):
            await _hears(client, "chat:1", kept)
        for client in (ann, eve, new):
            await client.close()


async def test_what_only_a_dead_primary_had(tmp_path: Path) -> None:
    """P2: a write that no majority has is not acknowledged, nor delivered, nor built on; it may go with its primary."""
    async with _stage(tmp_path, publish_timeout_s=SHORT_TIMEOUT_S) as stage:
        one, other = stage.places
        bob, eve = await _present(one, "chat:1"), await _present(other, "chat:1")
        assert await _position(one, "chat:1", "before", "key") == 1
        primary = await asyncio.to_thread(stage.replica_set.primary)
        async with stage.broken("majority frozen", one):
            for place in stage.places:
                assert (await _say(place, "chat:1", f"doubtful, by {place.name}"))["error"]["code"] == 100
            await asyncio.to_thread(primary.kill)
        for client in (bob, eve):
            assert _heard(client, "chat:1") == ["before"]
        await asyncio.to_thread(stage.replica_set.recover)
        for place in stage.places:
            await place.ready()
            await _position(place, "chat:1", f"after, by {place.name}", place.name)
        kept = await _history(one, "chat:1")
        certain = ["before", *(f"after, by {place.name}" for place in stage.places)]
        assert [text for text in kept if "doubtful" not in text] == certain
        assert len(set(kept)) == len(kept)
        for client in (bob, eve):
            await _hears(client, "chat:1", kept)
            await client.close()


@pytest.mark.parametrize("code", [64, 11602], ids=["write concern timed out", "interrupted by an election"])
async def test_a_doubtful_answer_gives_up_no_slot(tmp_path: Path, code: int) -> None:
    """P1, P2: a write that is stored, though the answer does not say so, is found where it is, and is there once."""
    async with _stage(tmp_path) as stage:
        one, other = stage.places
        eve = await _present(other, "chat:1")
        primary = await asyncio.to_thread(stage.replica_set.primary)
        failure = {"code": code, "codeName": "Doubtful", "errmsg": "whether a majority has it is not known"}
        for number in range(1, 4):
            await asyncio.to_thread(primary.fail, "insert", times=1, writeConcernError=failure)
            assert await _position(one, "chat:1", number) == number
        await _hears(eve, "chat:1", [1, 2, 3])
        assert await _history(other, "chat:1") == [1, 2, 3]
        await eve.close()


@pytest.mark.parametrize("kind", LOSSES)
async def test_mongodb_loses_its_primary(tmp_path: Path, kind: str) -> None:
    """P2, P5: each publish succeeds once or ends with error 100; the same key said again tells what became of it."""
    async with _stage(tmp_path, publish_timeout_s=SHORT_TIMEOUT_S) as stage:
        one, other = stage.places
        eve = await _present(other, "chat:1")
        outcomes: dict[str, int] = {}

        async def publish(number: int) -> None:
            name = f"{'keyed' if number % 4 < 2 else 'bare'} {number}"
            answer = await _say(stage.places[number % 2], "chat:1", name, name if name.startswith("keyed") else "")
            assert "result" in answer or answer["error"]["code"] == 100, answer
            outcomes[name] = answer.get("result", {}).get("offset", 0)

        publishing: list[asyncio.Task[None]] = []
        async with stage.broken(kind, one):
            for wave in range(10):
                publishing += [asyncio.create_task(publish(10 * wave + number)) for number in range(10)]
                await asyncio.wait(publishing[-10:], timeout=0.3)
            await asyncio.gather(*publishing)
        await stage.healthy()
        for name, offset in outcomes.items():
            if name.startswith("keyed"):
                again = await _position(other, "chat:1", name, name)
                assert offset in (0, again), f"{name} was acknowledged at {offset}, then at {again}"
                outcomes[name] = again
        kept = await _history(one, "chat:1")
        assert len(set(kept)) == len(kept), "nothing is there twice"
        assert {name for name, offset in outcomes.items() if offset} <= set(kept) <= set(outcomes)
        assert all(kept[offset - 1] == name for name, offset in outcomes.items() if offset)
        await _hears(eve, "chat:1", kept)
        await eve.close()


# --- orders --------------------------------------------------------------------
async def test_orders_reach_connections_of_other_processes(tmp_path: Path) -> None:
    """PROTOCOL 15.2: what the back end asks of one process is done to the user's connections at the other."""
    async with _stage(tmp_path) as stage:
        one, other = stage.places
        eve = await _present(one, "room:1", user="eve")
        ann = await _present(other, "room:1", user="ann")
        await eve.until(lambda: _told(eve, "join", "room:1", ann.hello["client"]) >= 1)
        stats = {"result": {"num_clients": 2, "num_users": 2}}
        await asked_until(lambda: call_api(one, "presence_stats", {"channel": "room:1"}), stats.__eq__)
        both = {eve.hello["client"], ann.hello["client"]}
        await asked_until(lambda: _members(one, "room:1"), both.__eq__)

        async def order(method: str, **request: Any) -> None:
            assert await asked_again(lambda: call_api(one, method, {"user": "ann", **request})) == {"result": {}}

        await order("subscribe", channel="chat:7")
        assert (await ann.push("subscribe", "chat:7"))["recoverable"]
        assert await _position(one, "chat:7", "to ann") == 1
        assert (await ann.push("pub", "chat:7"))["data"] == "to ann"
        leaves = _told(eve, "leave", "room:1", ann.hello["client"])
        await order("unsubscribe", channel="room:1")
        assert (await ann.push("unsubscribe", "room:1"))["code"] == 2000
        await eve.until(lambda: _told(eve, "leave", "room:1", ann.hello["client"]) > leaves)
        await order("refresh", expire_at=4_000_000_000)
        assert (await ann.push("refresh"))["expires"]
        await order("disconnect", disconnect={"code": 4123, "reason": "enough"})
        assert await ann.closed() == (4123, "enough")
        assert eve.close_code is None
        await eve.close()


async def test_an_order_is_said_until_it_is_heard(tmp_path: Path) -> None:
    """A disconnect that Redis loses at first is carried out once Redis hears it, without being asked for again."""
    async with _stage(tmp_path) as stage:
        one, other = stage.places
        ann = await _present(other, user="ann")
        async with stage.lossy(0.6):
            answer = await call_api(one, "disconnect", {"user": "ann"})
        assert "result" in answer or answer["error"]["code"] == 100, answer
        assert await ann.closed() == (3503, "force disconnect")


async def test_a_key_publishes_once_wherever_it_is_said(tmp_path: Path) -> None:
    """P5: said at both processes at once, over and over, each key has one position and one publication."""
    async with _stage(tmp_path) as stage:
        for number in range(20):
            key = f"key {number}"
            told = await asyncio.gather(
                *(_position(place, "chat:1", key, key) for place in [*stage.places, *stage.places])
            )
            assert set(told) == {number + 1}
        assert await _history(stage.places[0], "chat:1") == [f"key {number}" for number in range(20)]


async def test_a_rolling_restart_loses_nothing(tmp_path: Path) -> None:
    """P9: clients of a process that is told to end are sent to come back, and recover at the other one."""
    async with _stage(tmp_path) as stage:
        one, other = stage.places
        bob = await _present(one, "chat:1")
        assert await _position(one, "chat:1", "before") == 1
        await bob.until(lambda: _heard(bob, "chat:1") == ["before"])
        one.process.send(signal.SIGTERM)
        assert await bob.closed() == (3001, "shutdown")
        assert await _position(other, "chat:1", "meanwhile") == 2
        epoch = (await call_api(other, "history", {"channel": "chat:1"}))["result"]["epoch"]
        back = await Client.connected(other.url)
        result = await back.ask("subscribe", channel="chat:1", recover=True, offset=1, epoch=epoch)
        assert (result["recovered"], [one["data"] for one in result["publications"]]) == (True, ["meanwhile"])
        assert await asyncio.to_thread(one.process.wait) == 0
        await one.start()
        await one.ready()
        assert await _history(one, "chat:1") == ["before", "meanwhile"]
        await back.close()
