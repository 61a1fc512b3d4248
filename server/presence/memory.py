"""Presence of a process that is alone, or of several nodes inside one process.

Nodes that share a ``Board`` see one another's members; leases are kept as they
would be over a network, so that a node which is no longer swept fades there too.
"""

from server.presence import Presence
from server.stream import ClientInfo


class Board:
    """What the nodes of one process share: leases, and entries with the incarnation that made them."""

    def __init__(self) -> None:
        self.leases: dict[MemoryPresence, float] = {}
        self.entries: dict[str, dict[str, tuple[MemoryPresence, ClientInfo]]] = {}


class MemoryPresence(Presence):
    """See ``Presence``; ``lease_s`` is how long after its last ``renew`` a process is believed alive."""

    def __init__(self, lease_s: float, board: Board | None = None) -> None:
        self._lease_s = lease_s
        self._board = board or Board()

    async def open(self, now: float) -> None:
        """See ``Presence.open``."""
        self._board.leases[self] = now + self._lease_s

    async def close(self) -> None:
        """See ``Presence.close``."""
        self._board.leases.pop(self, None)
        self._clear({self})

    async def add(self, channel: str, info: ClientInfo) -> None:
        """See ``Presence.add``."""
        self._board.entries.setdefault(channel, {})[info.client] = (self, info)

    async def remove(self, channel: str, client: str) -> None:
        """See ``Presence.remove``."""
        entries = self._board.entries.get(channel)
        if entries is None:
            return
        entries.pop(client, None)
        if not entries:
            del self._board.entries[channel]

    async def members(self, channel: str, now: float) -> dict[str, ClientInfo]:
        """See ``Presence.members``."""
        entries = self._board.entries.get(channel, {})
        leases = self._board.leases
        return {client: info for client, (owner, info) in entries.items() if leases.get(owner, 0) > now}

    async def stats(self, channel: str, now: float) -> tuple[int, int]:
        """See ``Presence.stats``."""
        members = await self.members(channel, now)
        return len(members), len({info.user for info in members.values()})

    async def renew(self, now: float) -> bool:
        """See ``Presence.renew``."""
        in_time = self._board.leases.get(self, 0) > now
        self._board.leases[self] = now + self._lease_s
        return in_time

    async def sweep(self, now: float) -> list[tuple[str, ClientInfo]]:
        """See ``Presence.sweep``."""
        dead = {owner for owner, until in self._board.leases.items() if until <= now and owner is not self}
        for owner in dead:
            del self._board.leases[owner]
        return self._clear(dead) if dead else []

    def _clear(self, owners: "set[MemoryPresence]") -> list[tuple[str, ClientInfo]]:
        gone = [
            (channel, info)
            for channel, entries in self._board.entries.items()
            for owner, info in entries.values()
            if owner in owners
        ]
        for channel, info in gone:
            del self._board.entries[channel][info.client]
            if not self._board.entries[channel]:
                del self._board.entries[channel]
        return gone
