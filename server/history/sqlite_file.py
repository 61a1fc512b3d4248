"""The file behind ``SqliteHistory``: whose it is, its tables, its connections, and what becomes of a fault.

Knows the tables and not what is done in them.  That comes as *jobs*, functions
of a connection: ``SqliteFile`` gives each a good one in the right thread, and
turns SQLite's errors into ``Unavailable`` with words for an operator.

**Durable.**  Write-ahead log with ``synchronous=FULL``: a transaction is on the
disk when ``COMMIT`` returns.

**Reads do not wait for the disk.**  They have a thread and a connection of
their own; each is one read transaction, that is one consistent snapshot, begun
after it was asked for and so never older than a commit already heard of.

**The interpreter's lock.**  A waiting thread may ask a busy event loop for it
only after a whole *switch interval* in which the loop never let go.  A loop lets
go at every turn, for the microsecond that its ``select`` takes, which is too short for
the thread to wake up: at Python's 5 ms the writer starves beside a loop with
turns below that (single appends took 10 to 45 s; CPython 3.11, November 2026).
``open`` therefore shortens the interval, of the whole process, to ``SWITCH_S``.  With
turns of 0.15, 0.3 and 0.7 ms no append then took more than 40 ms, where 0.5 ms
still left some at 2 s, and the loop lost nothing measurable.

**One process.**  SQLite's ``locking_mode=EXCLUSIVE`` would lock out our own
second connection, so an advisory lock (``flock``) is held on ``PATH.lock``, a
file that stays behind: whoever deletes a lock file deletes the lock of the next
one.  Programs that look into the database (``sqlite3``, a backup) are welcome;
if one holds the write lock for longer than ``BUSY_S``, writing jobs get
``Unavailable`` and the next one tries again.

**Faults.**  Any error of SQLite answers all who waited for that transaction
with ``Unavailable``, is logged at its onset and once when it is over, and drops
the connection (unless the file was merely locked), so that the next transaction
starts afresh.  A file that was moved or replaced under the running server is a
fault too: SQLite itself would go on writing to a file without a name, and what
was acknowledged would be gone at the next start.

The tables, and why each is there:

* ``channels``: one row a channel, made by its first commit: ``epoch``, ``top``,
  ``floor`` (the highest offset gone for good), ``used_ms`` (the time of the last
  commit: meta TTL, and times that never go backwards).  ``id`` stands for the
  name in the big tables.  ``name`` is unique, which is also the index by which
  commits and reads find it, and NULL once the channel is forgotten: it is gone
  for all at once, while its rows are erased bit by bit.  ``version`` and
  ``version_epoch`` are the last ones published (since schema 2), 0 if there are none.
* ``publications``: one row each, keyed (``channel``, ``offset``) and stored in
  that order (``WITHOUT ROWID``), so that a page is one stretch of the file and
  no second index is to be kept.  All offsets above the floor up to the top are
  there; ones below it may be, until the sweep comes by.  ``extra`` holds what few
  publications have (info, tags), as MessagePack.
* ``keys``: idempotency keys, by (``channel``, ``key``), the order they are asked
  in.  ``keys_by_expiry`` is how the sweep finds the expired ones among millions.

The file does not shrink, its free pages are used again.
"""

import asyncio
import fcntl
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from server.errors import Unavailable
from server.observe import event

APPLICATION_ID = int.from_bytes(b"wspt", "big")
SCHEMA_VERSION = 2
SCHEMA = """
CREATE TABLE channels (
    id INTEGER PRIMARY KEY,
    name TEXT UNIQUE,
    epoch TEXT NOT NULL,
    top INTEGER NOT NULL,
    floor INTEGER NOT NULL,
    used_ms INTEGER NOT NULL,
    version INTEGER NOT NULL DEFAULT 0,
    version_epoch TEXT NOT NULL DEFAULT ''
);
CREATE TABLE publications (
    channel INTEGER NOT NULL,
    offset INTEGER NOT NULL,
    time_ms INTEGER NOT NULL,
    data BLOB NOT NULL,
    extra BLOB,
    PRIMARY KEY (channel, offset)
) WITHOUT ROWID;
CREATE TABLE keys (
    channel INTEGER NOT NULL,
    key TEXT NOT NULL,
    offset INTEGER NOT NULL,
    epoch TEXT NOT NULL,
    expires_ms INTEGER NOT NULL,
    PRIMARY KEY (channel, key)
) WITHOUT ROWID;
CREATE INDEX keys_by_expiry ON keys (expires_ms);
"""
UPGRADES = {
    1: """
ALTER TABLE channels ADD COLUMN version INTEGER NOT NULL DEFAULT 0;
ALTER TABLE channels ADD COLUMN version_epoch TEXT NOT NULL DEFAULT '';
""",
}
"""What makes the next schema of an older one; a column with a default is added without touching a row."""

BUSY_S = 1.0
SWITCH_S = 0.000_02
CACHE_KB = 16 * 1024
CHECKPOINT_PAGES = 4_000
WAL_KEPT_BYTES = 64 * 1024 * 1024

T = TypeVar("T")
Job = Callable[[sqlite3.Connection], T]

_WORDS = {
    sqlite3.SQLITE_BUSY: "is locked by another program",
    sqlite3.SQLITE_LOCKED: "is locked by another program",
    sqlite3.SQLITE_FULL: "cannot grow, the disk is full",
    sqlite3.SQLITE_IOERR: "cannot be read or written: a full or failing disk, or a quota",
    sqlite3.SQLITE_READONLY: "cannot be written, see its permissions",
    sqlite3.SQLITE_PERM: "cannot be opened, see its permissions",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened, see that it and its directory exist and may be written",
    sqlite3.SQLITE_NOTADB: "is no SQLite database, or is damaged",
    sqlite3.SQLITE_CORRUPT: "is damaged, restore it from a backup",
}


class Damaged(sqlite3.DatabaseError):
    """The file lacks what our own transactions put there, or is not the file we opened.

    Its words stand behind the file's path, as in "… is damaged".
    """


class SqliteFile:
    """The database file ``path``, made if need be, with one thread that writes and one that reads.

    Call ``open`` before any job, and ``close`` in the end; it can then be opened again.
    """

    def __init__(self, path: str | Path) -> None:
        # The real path, so that two names of one file (a link, another directory) meet at one lock.
        self.path = os.path.realpath(path)
        self._writer = _Link(self.path, "commit")
        self._reader = _Link(self.path, "read")
        self._lock = -1

    def __repr__(self) -> str:
        return f"SqliteFile({self.path!r})"

    async def open(self) -> None:
        """Take the file: lock it, see whose it is, make its tables, and start both threads.

        Shortens the interpreter's switch interval; see the module's docstring.

        Raises ``errors.Unavailable`` in operator's words: in use by another
        process, of another program or a newer version, damaged, not writable.
        """
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_S))
        try:
            self._lock = await asyncio.get_running_loop().run_in_executor(None, _take_lock, self.path)
            self._writer.start(create=True)
            await self._writer.run(partial(_adopt, path=self.path))
            self._reader.start(create=False)
            await self._reader.run(_look)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Finish the jobs that were asked for, close both connections, and give up the lock; harmless if not open."""
        await self._reader.stop()
        # The writer's last: it then folds the write-ahead log into the file.
        await self._writer.stop()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def write(self, job: Job[T]) -> asyncio.Future[T]:
        """Do ``job`` in the writer's thread, behind those before it; SQLite's errors come as ``errors.Unavailable``."""
        return self._writer.run(job)

    def read(self, job: Job[T]) -> asyncio.Future[T]:
        """Do ``job``, which only reads, in the reader's thread; SQLite's errors come as ``errors.Unavailable``."""
        return self._reader.run(job)


class _Link:
    """One thread with one connection, which it opens, mends after a fault, and closes.

    Whatever goes wrong in SQLite comes out as ``errors.Unavailable``.  The first
    fault after a success is logged as ``history.<event>_failed``, the first
    success after it as ``history.<event>_recovered``; what fails before any
    success fails ``open``, and its caller says so.
    """

    def __init__(self, path: str, event: str) -> None:
        self._path = path
        self._event = event
        self._create = False
        self._executor: ThreadPoolExecutor | None = None
        # From here on the thread's own:
        self._db: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._worked = False
        self._faulty = False

    def start(self, *, create: bool) -> None:
        """Start the thread; it waits on a queue and costs nothing while idle."""
        self._create = create
        self._file = None
        self._worked = self._faulty = False
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"history-{self._event}")

    async def stop(self) -> None:
        """Close the connection behind all jobs, and let the thread end; harmless if there is none."""
        executor, self._executor = self._executor, None
        if executor is not None:
            await asyncio.get_running_loop().run_in_executor(executor, self._drop)
            executor.shutdown(wait=False)

    def run(self, job: Job[T]) -> asyncio.Future[T]:
        """Do ``job`` in the thread, behind those before it; raises ``errors.Unavailable``."""
        if self._executor is None:
            raise Unavailable(f"history in {self._path} is closed")
        return asyncio.get_running_loop().run_in_executor(self._executor, self._do, job)

    def _do(self, job: Job[T]) -> T:
        try:
            result = job(self._connection())
        except sqlite3.Error as error:
            words = f"{self._path} {_reason(error)}"
            if self._worked and not self._faulty:
                self._faulty = True
                event(f"history.{self._event}_failed", path=self._path, error=_reason(error))
            if _code(error) not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                self._drop()
            raise Unavailable(words) from error
        self._worked = True
        if self._faulty:
            self._faulty = False
            event(f"history.{self._event}_recovered", path=self._path)
        return result

    def _connection(self) -> sqlite3.Connection:
        """The connection, made anew after a fault, to the file that was opened first and to no other."""
        if self._db is not None:
            self._same_file()
            return self._db
        # Only the very first may make a file: later, a file that is missing was taken away.
        mode = "rwc" if self._create and self._file is None else "rw"
        if self._file is not None:
            self._same_file()
        db = sqlite3.connect(
            f"file:{quote(self._path)}?mode={mode}",
            uri=True,
            timeout=BUSY_S,
            isolation_level=None,
            cached_statements=64,
        )
        try:
            # FULL, and on macOS a sync that reaches the platter: acknowledged means durable.
            db.execute("PRAGMA synchronous=FULL")
            db.execute("PRAGMA fullfsync=1")
            db.execute(f"PRAGMA cache_size=-{CACHE_KB}")
            db.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
            db.execute(f"PRAGMA journal_size_limit={WAL_KEPT_BYTES}")
            if self._file is None:
                self._file = self._identity()
        except BaseException:
            db.close()
            raise
        self._db = db
        return db

    def _identity(self) -> tuple[int, int]:
        try:
            stat = os.stat(self._path)
        except OSError as error:
            raise Damaged(f"is not where it was: {error.strerror}") from error
        return stat.st_dev, stat.st_ino

    def _same_file(self) -> None:
        if self._identity() != self._file:
            raise Damaged("was replaced by another file under the running server, restart it")

    def _drop(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            with suppress(sqlite3.Error):
                db.close()


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code, 0 if the error is none of SQLite's own."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF


def _reason(error: sqlite3.Error) -> str:
    """What is wrong with the file in operator's words, to stand behind its path."""
    words = _WORDS.get(_code(error))
    return f"{words} ({error})" if words else str(error)


def _take_lock(path: str) -> int:
    """Lock ``path`` against other processes; returns the file descriptor that holds the lock.

    Raises ``errors.Unavailable``: another process has it, or no lock file can be made beside it.
    """
    lock_path = f"{path}.lock"
    try:
        lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise Unavailable(f"{path} cannot be used for history: {lock_path}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.pwrite(lock, b"%d\n" % os.getpid(), 0)
    except BlockingIOError as error:
        holder = os.pread(lock, 32, 0).decode("ascii", "replace").strip()
        os.close(lock)
        raise Unavailable(f"{path} is in use by another server, process {holder or 'unknown'}") from error
    except OSError as error:
        os.close(lock)
        raise Unavailable(f"{path} cannot be locked: {lock_path}: {error.strerror}") from error
    return lock


@contextmanager
def transaction(db: sqlite3.Connection, begin: str) -> Iterator[None]:
    """Commit what the block did, or nothing of it."""
    db.execute(begin)
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        # SQLite has rolled back by itself after some errors, and cannot after others; ``_Link`` then drops it.
        if db.in_transaction:
            with suppress(sqlite3.Error):
                db.execute("ROLLBACK")
        raise


def _adopt(db: sqlite3.Connection, *, path: str) -> None:
    """See that the file is ours, or empty and to be ours, before anything in it is changed."""
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    empty = (application, version, tables) == (0, 0, 0)
    if not empty and application != APPLICATION_ID:
        raise Unavailable(f"{path} is a database of another program; name another file in sqlite.path")
    if version > SCHEMA_VERSION:
        raise Unavailable(
            f"{path} was written by a newer version of this server (schema {version}, this one knows up to "
            f"{SCHEMA_VERSION}); upgrade the server, or name another file in sqlite.path"
        )
    (journal,) = db.execute("PRAGMA journal_mode=WAL").fetchone()
    if journal != "wal":
        raise Unavailable(f"{path} is on a file system without shared memory; name a file on a local disk")
    script = SCHEMA if empty else "".join(UPGRADES[older] for older in range(max(1, version), SCHEMA_VERSION))
    if script:
        with transaction(db, "BEGIN IMMEDIATE"):
            for statement in script.split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA application_id={APPLICATION_ID}")
            db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")


def _look(db: sqlite3.Connection) -> None:
    """A first job for the reader, so that ``open`` fails if it cannot read."""
    db.execute("SELECT 1 FROM channels LIMIT 1").fetchone()
