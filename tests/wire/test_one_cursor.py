"""One cursor everywhere: a reader changes its transport between any two publications, and misses nothing."""

import asyncio
import random
from pathlib import Path

import pytest
from hopper import ALWAYS, EMULATED, Hopper, ask, publish_all
from streams import settings as streamed
from support import Process, config, serving

COUNT = 150


@pytest.mark.parametrize("seed", [1, 2])
async def test_hopping_in_one_process(seed: int) -> None:
    """Memory history: what readers receive on six transports in turn is history, in order, once."""
    dice = random.Random(seed)
    ways = [*ALWAYS, *EMULATED]
    async with serving(streamed()) as site:
        lots = [random.Random(seed * 100 + number) for number in range(4)]
        hoppers = [Hopper([site.port], "chat:hop", one, ways=ways) for one in lots]
        async with asyncio.TaskGroup() as group:
            for hopper in hoppers:
                group.create_task(hopper.hop(COUNT))
            group.create_task(publish_all(lambda: [site.port], "chat:hop", COUNT, dice))
        for hopper in hoppers:
            assert [one["data"] for one in hopper.received] == list(range(COUNT))
            assert [one["offset"] for one in hopper.received] == list(range(1, COUNT + 1))
        assert {kind for hopper in hoppers for kind in hopper.legs} == set(ways)


async def test_hopping_over_a_killed_server(tmp_path: Path) -> None:
    """SQLite history: the process is killed in the middle, three times, and comes back; nothing is lost or doubled."""
    settings = config(sqlite={"path": str(tmp_path / "hop.db")})
    with Process(tmp_path, settings) as server:
        hoppers = [Hopper([server.port], "chat:hop", random.Random(number)) for number in range(3)]

        async def kill() -> None:
            for goal in (COUNT // 4, COUNT // 2, 3 * COUNT // 4):
                await hoppers[0].reached(goal)
                await asyncio.to_thread(server.kill)
                await asyncio.to_thread(server.start)

        async with asyncio.TaskGroup() as group:
            for hopper in hoppers:
                group.create_task(hopper.hop(COUNT))
            group.create_task(publish_all(lambda: [server.port], "chat:hop", COUNT, random.Random(7)))
            group.create_task(kill())
        history = await ask(server.port, "/v1/channels/chat:hop/publications?since=:0&limit=300")
        published = [(one["offset"], one["data"]) for one in history.json["publications"]]
        assert published == [(number + 1, number) for number in range(COUNT)]
        for hopper in hoppers:
            assert [(one["offset"], one["data"]) for one in hopper.received] == published
            assert hopper.cuts
