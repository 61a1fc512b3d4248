"""Blocks in a small file of their own, beside that of history.

History's file is locked by its own two connections and written by its own thread,
and is busy all day; this one is written when an operator blocks somebody.  So it has
a connection of its own, a thread that sleeps, and SQLite's default journal with
``synchronous=FULL``: a change is on the disk when it is acknowledged, and there is
nothing to look after.

A fault drops the connection, so that the next job begins with another one.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from server.blocks import Block, Blocks, Change, Record, revised
from server.errors import Unavailable

APPLICATION_ID = int.from_bytes(b"wsbl", "big")
SCHEMA_VERSION = 1
SCHEMA = (
    "CREATE TABLE records (user TEXT PRIMARY KEY, revision INTEGER NOT NULL, blocks TEXT NOT NULL) WITHOUT ROWID",
    "CREATE INDEX records_by_revision ON records (revision)",
)
"""``blocks`` is JSON, so that an operator can read it with any tool."""

BUSY_S = 1.0

T = TypeVar("T")

_encode = msgspec.json.Encoder().encode
_decoder = msgspec.json.Decoder(tuple[Block, ...])


class SqliteBlocks(Blocks):
    """See ``Blocks``; the file ``path`` is made if need be."""

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._thread: ThreadPoolExecutor | None = None
        self._connection: sqlite3.Connection | None = None

    def __repr__(self) -> str:
        return f"SqliteBlocks({str(self._path)!r})"

    async def open(self) -> None:
        """See ``Blocks.open``."""
        self._thread = self._thread or ThreadPoolExecutor(1, "blocks")
        try:
            await self._do(lambda connection: None)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """See ``Blocks.close``."""
        thread, self._thread = self._thread, None
        if thread is not None:
            await asyncio.get_running_loop().run_in_executor(thread, self._drop)
            thread.shutdown(wait=False)

    async def change(self, user: str, change: Change, now_ms: int) -> Record:
        """See ``Blocks.change``."""

        def work(connection: sqlite3.Connection) -> Record:
            found = connection.execute("SELECT user, revision, blocks FROM records WHERE user = ?", (user,)).fetchone()
            record = revised(_record(found) if found else None, user, change, now_ms)
            row = record.user, record.revision, _encode(record.blocks).decode()
            connection.execute("REPLACE INTO records (user, revision, blocks) VALUES (?, ?, ?)", row)
            return record

        return await self._do(work)

    async def records(self, since: int = 0) -> list[Record]:
        """See ``Blocks.records``."""

        def work(connection: sqlite3.Connection) -> list[Record]:
            rows = connection.execute("SELECT user, revision, blocks FROM records WHERE revision >= ?", (since,))
            return [_record(row) for row in rows]

        return await self._do(work)

    async def forget(self, records: Iterable[Record]) -> None:
        """See ``Blocks.forget``."""
        rows = [(record.user, record.revision) for record in records]
        await self._do(
            lambda connection: connection.executemany("DELETE FROM records WHERE user = ? AND revision = ?", rows)
        )

    # --- the thread ------------------------------------------------------------------
    async def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do ``work`` as one transaction, in the thread; SQLite's errors come as ``errors.Unavailable``."""
        if self._thread is None:
            raise Unavailable(f"blocks in {self._path} are not open")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._transact, work)

    def _transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            connection = self._connection = self._connection or self._connected()
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                return work(connection)
        except (sqlite3.Error, msgspec.DecodeError) as error:
            self._drop()
            raise Unavailable(f"sqlite.path: blocks in {self._path}: {error}") from error

    def _connected(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA synchronous = FULL")
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                self._adopt(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _adopt(self, connection: sqlite3.Connection) -> None:
        """See that the file is ours, or make it so."""
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if not application and not tables:
            for statement in SCHEMA:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        elif application != APPLICATION_ID:
            raise sqlite3.DatabaseError("expected a file of this server, found one of another program")
        elif version > SCHEMA_VERSION:
            raise sqlite3.DatabaseError(
                f"expected schema {SCHEMA_VERSION} or older, found {version}, of a newer version of this server; "
                "upgrade the server, or name another file"
            )

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()


def _record(row: tuple[str, int, str]) -> Record:
    user, revision, blocks = row
    return Record(user, revision, _decoder.decode(blocks))
