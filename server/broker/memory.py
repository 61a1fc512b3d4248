"""The broker of a process that is alone, or of several nodes inside one process.

Nodes that share a ``Bus`` hear one another a loop turn later, in order and
without loss; tests wrap it to make it as bad as a broker may be.
"""

import asyncio
from collections import defaultdict

from server.broker import Broker, Note, Word


class Bus:
    """What the nodes of one process share: who follows what."""

    def __init__(self) -> None:
        self.brokers: dict[str, MemoryBroker] = {}
        self.followers: defaultdict[str, set[MemoryBroker]] = defaultdict(set)


class MemoryBroker(Broker):
    """See ``Broker``; ``MemoryBroker()`` is alone on a bus of its own."""

    def __init__(self, bus: Bus | None = None) -> None:
        self._bus = bus or Bus()
        self._node = ""

    async def open(self, node: str) -> None:
        """See ``Broker.open``."""
        self._node = node
        self._bus.brokers[node] = self

    async def close(self) -> None:
        """See ``Broker.close``."""
        self._bus.brokers.pop(self._node, None)
        for channel in [channel for channel, who in self._bus.followers.items() if self in who]:
            await self.unfollow(channel)

    @property
    def alone(self) -> bool:
        """See ``Broker.alone``."""
        return len(self._bus.brokers) < 2

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

    def tell(self, note: Note, to: str = "") -> None:
        """See ``Broker.tell``."""
        for name, broker in self._bus.brokers.items():
            if broker is not self and to in ("", name):
                self._soon_tell(broker, note)

    def _soon(self, broker: "MemoryBroker", word: Word) -> None:
        asyncio.get_running_loop().call_soon(broker._hear, word)

    def _hear(self, word: Word) -> None:
        if self in self._bus.followers.get(word.channel, ()):
            self.on_word(word)

    def _soon_tell(self, broker: "MemoryBroker", note: Note) -> None:
        asyncio.get_running_loop().call_soon(broker._note, note)

    def _note(self, note: Note) -> None:
        if self._bus.brokers.get(self._node) is self:
            self.on_note(note)
