"""P8 once more: who makes up names of channels, by the hundred thousand, or one after the other.

What they cost is bounded while they are here, a well-behaved client loses nothing,
and when they have gone there is nothing left of them.
"""

import asyncio
import gc
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from hopper import ask
from support import KEPT, PATIENCE_S, Process, config
from test_bad_input import Neighbour
from test_hostile import KB, MB, ROOM, Bare, beside, until

from benchmarks.bare import command, frame
from benchmarks.processes import memory_mb

MADE_UP, EACH = 800, 128
KB_EACH, KB_CONNECTION = 4, 16
"""What a made-up channel with its only subscriber may cost, and a connection besides."""


@asynccontextmanager
async def made_up(server: Process, neighbour: Neighbour, turn: int, count: int) -> AsyncIterator[None]:
    """``count`` connections with ``EACH`` subscriptions of channels that nobody else knows, others each ``turn``."""
    said = [{"id": at + 2, "subscribe": {"channel": f"chat:@-{at}"}} for at in range(EACH + 3)]
    text = "\n".join(map(json.dumps, said)).encode()
    bares: list[Bare] = []

    async def follow(number: int) -> None:
        bare = await Bare.connected(server, buffer=0)
        bares.append(bare)
        await bare.say(frame(0x81, text.replace(b"@", b"%d-%d" % (turn, number))))
        assert (await bare.answer(EACH + 4)).count(b'"code":106') == 3

    try:
        for first in range(0, count, 20):
            await asyncio.gather(neighbour.notices_nothing(), *(follow(first + at) for at in range(20)))
        yield
    finally:
        for bare in bares:
            bare.vanish()


async def _info(server: Process) -> dict[str, int]:
    found = await ask(server.port, "/api/info", headers={"X-API-Key": "api-key"}, body={})
    (node,) = found.json["result"]["nodes"]
    return dict(node)


async def test_a_hundred_thousand_made_up_channels(tmp_path: Path) -> None:
    """Each connection has its limit (106), each subscription costs 4 KB at most, and what they cost is given back.

    The neighbour misses nothing meanwhile; and when others come with other names, that
    takes nothing that was not held before.
    """
    # However long it takes: they answer no pings.
    quiet = config(client={"ping_interval": "1h"}, channel={"namespaces": [{"name": "chat", **KEPT}]})
    with Process(tmp_path, quiet) as server:
        assert server.popen is not None
        pid = server.popen.pid
        neighbour = await Neighbour.at(server)
        held = [memory_mb(pid)]
        for turn, count in enumerate((MADE_UP, MADE_UP // 8)):
            async with made_up(server, neighbour, turn, count):
                here = await _info(server)
                assert here["num_subs"] == count * EACH + 2
                assert here["num_channels"] == count * EACH + 1
                held.append(memory_mb(pid))
            async with asyncio.timeout(PATIENCE_S):
                while (here := await _info(server))["num_clients"] > 2:
                    await neighbour.notices_nothing()
            assert (here["num_subs"], here["num_channels"]) == (2, 1)
        assert (held[1] - held[0]) * MB <= MADE_UP * (EACH * KB_EACH + KB_CONNECTION) * KB
        assert held[2] < held[1], "what had been held for the first was not used again"
        await neighbour.notices_nothing()


async def test_who_leaves_with_many_channels() -> None:
    """Clients who go away with 100 channels each leave nothing behind either: not one object for each channel.

    (What a test keeps of the log is some fifty objects a connection.)
    """
    async with beside() as (site, neighbour):

        async def come_and_go(names: range) -> None:
            for first in range(names.start, names.stop, 100):
                said = [command(id=at, subscribe={"channel": f"chat:{at}"}) for at in range(first, first + 100)]
                bare = await Bare.connected(site)
                await bare.say(b"".join(said))
                await bare.answer(first + 99)
                bare.vanish()
            await until(lambda: set(site.node.hub.feeds) == {ROOM} and site.node.connections == 2)

        await come_and_go(range(100_000, 109_000))
        held = []
        for first in (200_000, 300_000):
            await come_and_go(range(first, first + 3_000))
            await neighbour.notices_nothing()
            gc.collect()
            held.append(sys.getallocatedblocks())
        assert held[1] - held[0] < 3_000, held


async def test_names_that_are_used_once() -> None:
    """Subscribing to ever new names and leaving them again leaves nothing behind: not one object for ten names.

    What is remembered of names in any case (their namespace, the beginning of a frame)
    is so for the last few thousand, so that many are used before it is measured.
    """
    async with beside() as (site, neighbour):
        bare = await Bare.connected(site)

        async def through(names: range) -> None:
            for first in range(names.start, names.stop, 100):
                said = []
                for name in range(first, first + 100):
                    channel = f"live:{'x' * 200}{name}"
                    said.append({"id": name, "subscribe": {"channel": channel}})
                    said.append({"id": name, "unsubscribe": {"channel": channel}})
                text = "\n".join(json.dumps(one) for one in said)
                await bare.say(frame(0x81, text.encode()))
                await bare.answer(first + 99)

        await through(range(100_000, 109_000))
        held = []
        for first in (200_000, 300_000):
            await through(range(first, first + 5_000))
            await neighbour.notices_nothing()
            gc.collect()
            held.append(sys.getallocatedblocks())
        assert held[1] - held[0] < 500, held
        assert set(site.node.hub.feeds) == {ROOM}
        bare.vanish()
