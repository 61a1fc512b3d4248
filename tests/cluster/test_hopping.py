"""One cursor over two processes: readers hop between transports and processes while both and Redis come and go.

P3 and P4 for every transport at once: the union of what a reader receives is history, in order, once.
"""

import asyncio
import random
from pathlib import Path

from hopper import ALWAYS, EMULATED, Hopper, ask, publish_all
from mongod import disturbing, shared_set
from stage import STREAMED, away, staging

COUNT = 120
CHANNEL = "chat:hop"
WAYS = [*ALWAYS, *EMULATED]


async def test_hopping_through_kills_and_cuts(tmp_path: Path) -> None:
    """Three readers on six transports and two processes, each of which is killed once, and Redis away for a while."""
    with disturbing(shared_set()) as replica_set:
        async with staging(tmp_path, replica_set, **STREAMED) as stage:
            first, second = stage.places
            ports = [place.process.port for place in stage.places]
            hoppers = [Hopper(ports, CHANNEL, random.Random(number), ways=WAYS) for number in range(3)]

            async def disturb() -> None:
                await hoppers[0].reached(COUNT // 6)
                await first.kill()
                await hoppers[1].reached(COUNT // 3)
                await first.start()
                async with away(first.redis), away(second.redis):
                    await hoppers[2].reached(COUNT // 2)
                await second.kill()
                await hoppers[0].reached(3 * COUNT // 4)
                await second.start()

            async with asyncio.TaskGroup() as group:
                for hopper in hoppers:
                    group.create_task(hopper.hop(COUNT))
                group.create_task(publish_all(lambda: ports, CHANNEL, COUNT, random.Random(5)))
                group.create_task(disturb())

            page = (await ask(ports[0], f"/v1/channels/{CHANNEL}/publications?since=:0&limit=300")).json
            history = [(one["offset"], one["data"]) for one in page["publications"]]
            assert history == [(number + 1, number) for number in range(COUNT)]
            for hopper in hoppers:
                assert [(one["offset"], one["data"]) for one in hopper.received] == history
            assert {kind for hopper in hoppers for kind in hopper.legs} == set(WAYS)
            for place in stage.places:
                assert place.faults_logged() == []
