"""The broker of a process that is alone, or of several nodes inside one process.

Nodes that share a ``Bus`` hear one another a loop turn later, in order and
without loss; tests wrap it to make it as bad as a broker may be.
"""

import asyncio
from collections import defaultdict

from server.broker import Broker, Order, Word


class Bus:
    """What the nodes of one process share: who follows what."""

    def __init__(self) -> None:
        self.brokers: set[MemoryBroker] = set()
        self.followers: defaultdict[str, set[MemoryBroker]] = defaultdict(set)


class MemoryBroker(Broker):
    """See ``Broker``; ``MemoryBroker()`` is alone on a bus of its own."""

    def __init__(self, bus: Bus | None = None) -> None:
        self._bus = bus or Bus()

    async def open(self) -> None:
        """See ``Broker.open``."""
        self._bus.brokers.add(self)

    async def close(self) -> None:
        """See ``Broker.close``."""
        self._bus.brokers.discard(self)
        for channel in [channel for channel, who in self._bus.followers.items() if self in who]:
            await self.unfollow(channel)

    async def follow(self, channel: str) -> None:
        """See ``Broker.follow``."""
        self._bus.followers[channel].add(self)

    async def unfollow(self, channel: str) -> None:
        """See ``Broker.unfollow``."""
        followers = self._bus.followers[channel]
        followers.discard(self)
        if not followers:
            del self._bus.followers[channel]

    def announce(self, word: Word) -> None:
        """See ``Broker.announce``."""
        followers = self._bus.followers.get(word.channel)
        if followers is None or followers == {self}:
            return
        for broker in followers - {self}:
            self._soon(broker, word)

    def order(self, order: Order) -> None:
        """See ``Broker.order``."""
        for broker in self._bus.brokers - {self}:
            asyncio.get_running_loop().call_soon(broker._obey, order)

    def _soon(self, broker: "MemoryBroker", word: Word) -> None:
        asyncio.get_running_loop().call_soon(broker._hear, word)

    def _hear(self, word: Word) -> None:
        if self in self._bus.followers.get(word.channel, ()):
            self.on_word(word)

    def _obey(self, order: Order) -> None:
        if self in self._bus.brokers:
            self.on_order(order)
