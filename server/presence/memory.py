"""Presence of a process that is alone, or of several nodes inside one process.

Nodes that share a ``Board`` see one another's members; leases are kept as they
would be over a network, so that a node which is no longer swept fades there too.
"""

from server.errors import Unavailable
from server.presence import Presence
from server.stream import ClientInfo


class Incarnation:
    """One life of a presence, from taking a lease to losing it."""


class Board:
    """What the nodes of one process share: leases, and entries with the incarnation that made them."""

    def __init__(self) -> None:
        self.leases: dict[Incarnation, float] = {}
        self.entries: dict[str, dict[str, tuple[Incarnation, ClientInfo]]] = {}


class MemoryPresence(Presence):
    """See ``Presence``; ``lease_s`` is how long after its last ``renew`` a process is believed alive."""

    def __init__(self, lease_s: float, board: Board | None = None) -> None:
        self._lease_s = lease_s
        self._board = board or Board()
        self._lives: list[Incarnation] = []

    @property
    def _incarnation(self) -> Incarnation:
        if not self._lives:
            raise Unavailable("presence is not open")
        return self._lives[-1]

    async def open(self, now: float) -> None:
        """See ``Presence.open``."""
        self._begin(now)

    def _begin(self, now: float) -> None:
        self._lives.append(Incarnation())
        self._board.leases[self._incarnation] = now + self._lease_s

    async def close(self) -> None:
        """See ``Presence.close``."""
        for incarnation in self._lives:
            self._board.leases.pop(incarnation, None)
        self._clear(set(self._lives))

    async def add(self, channel: str, info: ClientInfo) -> None:
        """See ``Presence.add``."""
        self._board.entries.setdefault(channel, {})[info.client] = (self._incarnation, info)

    async def remove(self, channel: str, client: str) -> bool:
        """See ``Presence.remove``."""
        entries = self._board.entries.get(channel, {})
        owner, _ = entries.get(client, (None, None))
        if owner not in self._lives:
            return False
        del entries[client]
        if not entries:
            del self._board.entries[channel]
        return True

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
        in_time = self._board.leases.get(self._incarnation, 0) > now
        if in_time:
            self._board.leases[self._incarnation] = now + self._lease_s
        else:
            self._board.leases[self._incarnation] = 0.0
            self._begin(now)
        return in_time

    async def sweep(self, now: float) -> list[tuple[str, ClientInfo]]:
        """See ``Presence.sweep``."""
        dead = {one for one, until in self._board.leases.items() if until <= now and one is not self._incarnation}
        for owner in dead:
            del self._board.leases[owner]
        self._lives = [one for one in self._lives if one not in dead]
        return self._clear(dead) if dead else []

    def _clear(self, owners: set[Incarnation]) -> list[tuple[str, ClientInfo]]:
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
