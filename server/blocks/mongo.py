"""Blocks in MongoDB, beside history: a document for each user who has some, or lately had.

    {_id: user, revision: 1763750000000, blocks: [{channel, muted, expire_at, reason}, …]}

A change is a replacement under the revision that was read, so of two processes one
finds that it came too late, and tries again on what the other has made.  Written to a
majority with journal, read from what a majority has.

It has no version of its own: ``meta`` of history's collections says of what format the
whole database is, and one of a newer format is refused here as well.

It has a client of its own: neither seam knows the other, and a handful of idle
connections is all that this costs.
"""

from collections.abc import Iterable

import msgspec
import pymongo
from bson import Int64
from pymongo.errors import DuplicateKeyError

from server.blocks import Blocks, Change, Record, revised
from server.errors import Unavailable
from server.history.mongo_scheme import Document
from server.history.mongo_server import MongoServer
from server.settings import MongoSettings

BLOCKS = "blocks"
TRIES = 20
"""How often somebody else may be quicker; each of them has then had their way."""


class MongoBlocks(Blocks):
    """See ``Blocks``; in the collection ``blocks`` of ``mongo.database``."""

    def __init__(self, settings: MongoSettings) -> None:
        self._server = MongoServer(settings, adopts=False)

    def __repr__(self) -> str:
        return f"MongoBlocks({self._server.place!r})"

    async def open(self) -> None:
        """See ``Blocks.open``."""
        await self._server.open()

    async def close(self) -> None:
        """See ``Blocks.close``."""
        await self._server.close()

    async def change(self, user: str, change: Change, now_ms: int) -> Record:
        """See ``Blocks.change``."""
        for _ in range(TRIES):
            found = await self._find({"_id": user})
            held = found[0] if found else None
            record = revised(held, user, change, now_ms)
            if await self._write(record, held):
                return record
        raise Unavailable(f"{self._server.place}: others change the blocks of this user without end")

    async def _write(self, record: Record, held: Record | None) -> bool:
        """Put ``record`` in the place of ``held``; false if that is no longer there."""
        collection = self._server.collection
        document = _document(record)

        async def work() -> bool:
            if held is not None:
                query = {"_id": record.user, "revision": Int64(held.revision)}
                return bool((await collection(BLOCKS).replace_one(query, document)).matched_count)
            try:
                # Not before there is something: whoever never blocks anybody has no such collection.
                await collection(BLOCKS).create_index("revision")
                await collection(BLOCKS).insert_one(document)
            except DuplicateKeyError:
                return False
            return True

        return await self._server.attempt(work)

    async def records(self, since: int = 0) -> list[Record]:
        """See ``Blocks.records``."""
        return await self._find({"revision": {"$gte": Int64(since)}} if since else {})

    async def _find(self, query: Document) -> list[Record]:
        documents = await self._server.attempt(lambda: self._server.collection(BLOCKS).find(query).to_list(None))
        try:
            return [msgspec.convert({"user": document["_id"], **document}, Record) for document in documents]
        except msgspec.ValidationError as error:
            raise Unavailable(f"{self._server.place}: a document in {BLOCKS} is not ours: {error}") from error

    async def forget(self, records: Iterable[Record]) -> None:
        """See ``Blocks.forget``."""
        operations = [pymongo.DeleteOne({"_id": one.user, "revision": Int64(one.revision)}) for one in records]
        if operations:
            await self._server.attempt(lambda: self._server.collection(BLOCKS).bulk_write(operations, ordered=False))


def _document(record: Record) -> Document:
    made: Document = msgspec.to_builtins(record)
    return {"_id": made["user"], "revision": Int64(record.revision), "blocks": list(made["blocks"])}
