"""P5 over REST: one ``Idempotency-Key`` publishes once, whichever process is asked, how often, and by how many at once.

PROTOCOL 17.1.10, 11.8, with real processes, MongoDB and Redis.
"""

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hopper import Cut, Reply, ask
from mongod import disturbing, shared_set
from stage import READY_S, Place, staging

CHANNEL = "chat:keys"
PATH = f"/v1/channels/{CHANNEL}/publications"


async def publish(place: Place, key: str, data: Any) -> Reply:
    """Publish once; raises ``Cut`` and ``OSError``."""
    return await ask(place.process.port, PATH, body={"data": data}, headers={"Idempotency-Key": key})


async def until_known(places: Sequence[Place], key: str, data: Any) -> Reply:
    """Publish, and on 503 or no answer at all, ask the next process the same again, as PROTOCOL 17.1.9 says one may."""
    async with asyncio.timeout(READY_S):
        for place in itertools.cycle(places):
            try:
                reply = await publish(place, key, data)
            except (Cut, OSError):
                await asyncio.sleep(0.02)  # a process that is down says nothing when it is back
                continue
            if reply.status == 201:
                return reply
            assert reply.status == 503, reply
    raise AssertionError("nobody was asked")


def told(reply: Reply) -> tuple[int, str, bytes]:
    """All of an answer to a publish that a client goes by."""
    assert reply.status == 201, reply
    return reply.status, reply.headers["location"], reply.body


async def history(place: Place) -> list[tuple[int, Any]]:
    """Offset and payload of all that was published."""
    page = (await ask(place.process.port, f"{PATH}?since=:0&limit=300")).json
    assert len(page["publications"]) == page["offset"]
    return [(one["offset"], one["data"]) for one in page["publications"]]


async def test_a_key_over_processes_and_restarts(tmp_path: Path) -> None:
    """A repeat is answered as the first one was: by another process, by one started since, when all started since."""
    async with staging(tmp_path, shared_set()) as stage:
        first, second = stage.places
        answer = told(await publish(first, "k", "first"))
        assert told(await publish(second, "k", "another")) == answer
        assert told(await publish(first, "other", "second")) != answer

        await first.kill()
        assert told(await publish(second, '"k"', "another")) == answer
        await first.start()
        await first.ready()
        assert told(await publish(first, "k", "another")) == answer

        await asyncio.gather(*(place.kill() for place in stage.places))
        await asyncio.gather(*(place.start() for place in stage.places))
        await asyncio.gather(*(place.ready() for place in stage.places))
        for place in (second, first):
            assert told(await publish(place, "k", "another")) == answer
            assert await history(place) == [(1, "first"), (2, "second")]


async def test_raced_keys(tmp_path: Path) -> None:
    """Twenty keys, each published by both processes several times at once: one publication and one answer for each."""
    async with staging(tmp_path, shared_set()) as stage:
        keys = [f"key-{number}" for number in range(20)]
        raced = [(key, place, again) for key in keys for again in range(3) for place in stage.places]
        replies = await asyncio.gather(*(publish(place, key, [key, place.name, again]) for key, place, again in raced))
        answers: defaultdict[str, set[tuple[int, str, bytes]]] = defaultdict(set)
        for (key, _, _), reply in zip(raced, replies, strict=True):
            answers[key].add(told(reply))
        assert {len(found) for found in answers.values()} == {1}
        kept = await history(stage.places[0])
        assert [offset for offset, _ in kept] == list(range(1, len(keys) + 1))
        assert sorted(data[0] for _, data in kept) == sorted(keys)
        # Each is where its answer says it is.
        for key, found in answers.items():
            ((_, location, _),) = found
            page = (await ask(stage.places[1].process.port, location)).json
            assert [one["data"][0] for one in page["publications"]] == [key]


async def test_a_kill_in_the_middle_of_a_race(tmp_path: Path) -> None:
    """Both processes die in turn under keyed publishes that ask again: each is there once, where its answers say."""
    with disturbing(shared_set()) as replica_set:
        async with staging(tmp_path, replica_set) as stage:
            places = list(stage.places)
            some = asyncio.Semaphore(6)
            half = asyncio.Event()
            answers: dict[str, set[tuple[int, str, bytes]]] = {}

            async def race(number: int) -> None:
                async with some:
                    key = f"key-{number}"
                    found = await asyncio.gather(*(until_known(turned, key, key) for turned in (places, places[::-1])))
                    answers[key] = set(map(told, found))
                    if len(answers) == 20:
                        half.set()

            async with asyncio.TaskGroup() as group:
                for number in range(120):
                    group.create_task(race(number))
                await half.wait()
                for place in places:
                    await place.kill()
                    await place.start()
                    await place.ready()
            assert {len(found) for found in answers.values()} == {1}
            kept = await history(places[0])
            assert [offset for offset, _ in kept] == list(range(1, 121))
            assert sorted(data for _, data in kept) == sorted(answers)
            for place in places:
                assert place.faults_logged() == []
