"""The people of a storm who keep a cursor and nothing else: each leg goes another way, to another process.

A ``Listener`` comes back to where it left off on the same transport; a ``Wanderer``
has only what the last transport told it, epoch and offset, and takes these to
WebSocket, both emulated streams, the channel's event stream, long-poll or plain
reading, every few publications, while processes die and stores go away.  Its list
is judged like everybody's: history, in order, once.
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from random import Random
from typing import Any

from crowd import World
from hopper import ALWAYS, EMULATED, Hopper, Lost
from verdict import Heard, Line

WAYS = (*ALWAYS, *EMULATED)

SILENCE_S = 4.0
"""After so long without news it tries another way: the process may be stopped."""


class Wanderer(Hopper):
    """A hopper that takes notes; from the beginning of ``channel`` on, over ``ports``."""

    def __init__(self, world: World, name: str, channel: str, ports: Sequence[int], dice: Random) -> None:
        super().__init__(ports, channel, dice, ways=WAYS, silence_s=SILENCE_S)
        self.name = name
        self.heard = Heard(name, channel)
        self._world = world
        world.notes.heard.append(self.heard)

    async def wander(self) -> None:
        """Leg after leg, until cancelled."""
        counts = self._world.counts
        while True:
            cuts, legs = self.cuts, dict(self.legs)
            try:
                await self.leg()
            except Lost:
                self.heard.unrecovered.append(self.offset)
                await self._world.breathe()
            except AssertionError as error:
                self._world.complain(f"{self.name}: {error}")
                await self._world.breathe()
            counts["legs"] += 1
            counts["legs cut short"] += self.cuts - cuts
            for way, count in self.legs.items():
                counts[f"legs by {way}"] += count - legs.get(way, 0)

    def take(self, publication: Mapping[str, Any], epoch: str = "") -> None:
        """See ``Hopper``."""
        super().take(publication, epoch)
        self.heard.epoch = self.epoch
        self.heard.lines.append(Line(publication["offset"], publication["data"]["mark"]))
        self._world.counts["delivered to wanderers"] += 1

    async def arrived(self, tops: Mapping[str, int], ends: float) -> None:
        """Wait until it is at the top, or until the storm's clock says ``ends``."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, ends - self._world.clock())):
                await self.reached(tops.get(self.channel, 0))
