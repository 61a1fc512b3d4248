"""Blocks of a process that is alone and forgets, or of several nodes inside one process."""

from collections.abc import Iterable

from server.blocks import Blocks, Change, Record, revised
from server.errors import Unavailable


class Shelf:
    """What the nodes of one process share: the records by user."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}


class MemoryBlocks(Blocks):
    """See ``Blocks``; those that share a ``Shelf`` are as processes at one store."""

    def __init__(self, shelf: Shelf | None = None) -> None:
        self._shelf = shelf or Shelf()
        self._open = False

    def _records(self) -> dict[str, Record]:
        if not self._open:
            raise Unavailable("blocks are not open")
        return self._shelf.records

    async def open(self) -> None:
        """See ``Blocks.open``."""
        self._open = True

    async def close(self) -> None:
        """See ``Blocks.close``."""
        self._open = False

    async def change(self, user: str, change: Change, now_ms: int) -> Record:
        """See ``Blocks.change``."""
        records = self._records()
        record = records[user] = revised(records.get(user), user, change, now_ms)
        return record

    async def records(self, since: int = 0) -> list[Record]:
        """See ``Blocks.records``."""
        return [record for record in self._records().values() if record.revision >= since]

    async def forget(self, records: Iterable[Record]) -> None:
        """See ``Blocks.forget``."""
        held = self._records()
        for record in records:
            if record.user in held and held[record.user].revision == record.revision:
                del held[record.user]
