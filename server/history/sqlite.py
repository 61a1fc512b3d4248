"""History in one local file: what a server keeps that has no MongoDB.

**Durable before acknowledged.**  A disk syncs some hundred times a second, so
the one writer thread commits whole batches (see ``gathering``), one transaction
each.  Offsets are numbered *inside* the transaction from the channel's row and
never from a cache: after a failed commit, whatever became of it, the next one
reads what is true.

**Reads** are one read transaction each, and so one consistent snapshot; they do
not wait for the writer.

**Retention** is arithmetic when reading (``floor_at``); the sweep only gives
the space back, in bounded steps.

Knows what is in the tables; the file itself, its lock, its threads and its faults
are ``sqlite_file``'s, which also says what each table is for.  What follows the
class are the jobs that it sends there: functions of a connection, which run in
the writer's or the reader's thread and touch nothing of the class.
"""

import asyncio
import json
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from server.errors import UNRECOVERABLE_POSITION, Refused, Unavailable
from server.history import (
    IDEMPOTENCY_TTL_MS,
    PAGE_BYTES,
    PAGE_PUBLICATIONS,
    REDACTED,
    Appended,
    Draft,
    History,
    Retention,
    RetentionOf,
    Version,
    floor_at,
    forgets,
    random_epoch,
)
from server.history.gathering import Commit, Gathering
from server.history.sqlite_file import Damaged, SqliteFile, transaction
from server.observe import event
from server.stream import ClientInfo, Page, Position, Publication

SWEEP_CHANNELS = 200
SWEEP_ROWS = 10_000
TOUCHED = 10_000


class _Extra(msgspec.Struct, array_like=True):
    info: ClientInfo | None = None
    tags: dict[str, str] | None = None


_extra_encoder = msgspec.msgpack.Encoder()
_extra_decoder = msgspec.msgpack.Decoder(_Extra)


class _Waiter(NamedTuple):
    """Who gets the outcome, and the publication's ``extra`` as it is stored."""

    future: asyncio.Future[Appended]
    extra: bytes | None


class _Stored(NamedTuple):
    """The outcome of one commit: an answer for each entry, and what is new."""

    epoch: str
    outcomes: list[Appended]
    publications: list[Publication]


class SqliteHistory(History):
    """The contract of ``History``, kept in the SQLite file ``path``, which ``open`` makes if need be.

    ``idempotency_ttl_ms`` is how long a key is remembered; ``epoch_source``
    gives a name that was never used, for each new epoch, and is called in the
    writer's thread.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        idempotency_ttl_ms: int = IDEMPOTENCY_TTL_MS,
        epoch_source: Callable[[], str] = random_epoch,
    ) -> None:
        self._file = SqliteFile(path)
        self._idempotency_ttl_ms = idempotency_ttl_ms
        self._epoch_source = epoch_source
        self._gathering: Gathering[_Waiter] = Gathering()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._committing = False
        self._gather_due = False
        self._settled: asyncio.Future[None] | None = None
        # Sweep: channels lately written to (a set that keeps its order), and the last id of the round.
        self._touched: dict[str, None] = {}
        self._swept_id = 0

    def __repr__(self) -> str:
        return f"SqliteHistory({self._file.path!r})"

    async def open(self) -> None:
        """Take the file, or make it.

        Shortens the interpreter's switch interval; ``sqlite_file`` says why.

        Raises ``errors.Unavailable`` in operator's words: in use by another
        process, of another program or a newer version, damaged, not writable.
        """
        if self._loop is not None:
            raise RuntimeError("this SqliteHistory is open already")
        await self._file.open()
        self._loop = asyncio.get_running_loop()

    async def close(self) -> None:
        """Finish all commits that were asked for, and give up the file."""
        if self._loop is None:
            return
        loop, self._loop = self._loop, None  # from here on nothing new is taken
        if not self._gathering.idle:
            self._settled = loop.create_future()
            await self._settled
            self._settled = None
        await self._file.close()

    async def append(self, channel: str, draft: Draft, retention: Retention, now_ms: int) -> Appended:
        """Put ``draft`` into the next batch; returns once it is on the disk.  PROTOCOL 11.1, 11.8.

        Raises ``errors.Unavailable`` (outcome unknown), ``errors.Refused``
        (111), and ``ValueError`` for text that is no Unicode: before it is
        queued, since in a transaction it would fail the whole batch.
        """
        loop = self._opened()
        channel.encode()
        draft.key.encode()
        draft.version.epoch.encode()
        extra = None
        if draft.info is not None or draft.tags is not None:
            extra = _extra_encoder.encode(_Extra(draft.info, draft.tags))
        future: asyncio.Future[Appended] = loop.create_future()
        self._gathering.add(channel, draft, now_ms, _Waiter(future, extra))
        if not self._gather_due and not self._committing:
            self._gather_due = True
            loop.call_soon(self._gather)
        return await future

    async def read(
        self,
        channel: str,
        retention: Retention,
        now_ms: int,
        *,
        since: int | None = None,
        limit: int = PAGE_PUBLICATIONS,
        max_bytes: int = PAGE_BYTES,
        reverse: bool = False,
    ) -> Page:
        """Read a page from one snapshot.  PROTOCOL 4.6."""
        self._opened()
        return await self._file.read(
            partial(
                _read,
                channel=channel,
                retention=retention,
                now_ms=now_ms,
                since=since,
                limit=limit,
                max_bytes=max_bytes,
                reverse=reverse,
            )
        )

    async def tops(self, channels: Iterable[str]) -> dict[str, Position]:
        """The newest position of each known channel, from one query."""
        self._opened()
        return await self._file.read(partial(_tops, names=json.dumps(list(channels))))

    async def remove(self, channel: str) -> None:
        """Forget the payloads of a channel at once; the sweep erases what is many.  PROTOCOL 11.1."""
        self._opened()
        await self._file.write(partial(_remove, channel=channel))
        self._touch(channel)

    async def redact(self, channel: str, offset: int) -> None:
        """Erase one payload in the file; raises ``errors.Refused`` (112) if it is not there.  PROTOCOL 11.1."""
        self._opened()
        await self._file.write(partial(_redact, channel=channel, offset=offset))

    async def sweep(self, retention_of: RetentionOf, now_ms: int) -> None:
        """Erase what is gone in ``SWEEP_CHANNELS`` channels lately written to, and as many of the round.

        Some ``SWEEP_ROWS`` rows a call, one short transaction, none if nothing
        is to erase.  A channel that is kept no more (``retention_of`` gives
        ``None``) stays as it is: who takes an option away by mistake shall not
        lose what was said.

        Raises ``errors.Unavailable``; call it again.
        """
        self._opened()
        touched = list(self._touched)[:SWEEP_CHANNELS]
        names = json.dumps(touched)
        found, self._swept_id = await self._file.read(partial(_sweepable, names=names, after_id=self._swept_id))
        plan = [(row_id, name, None if name is None else retention_of(name)) for row_id, name in found.items()]
        # Taken off before the transaction: what is committed meanwhile puts them back.
        for channel in touched:
            self._touched.pop(channel, None)
        unfinished: list[str] = touched
        try:
            unfinished = await self._file.write(partial(_sweep, plan=plan, now_ms=now_ms))
        finally:
            for channel in unfinished:
                self._touch(channel)

    async def new_epochs(self) -> int:
        """Start every channel on a new epoch at offset 0, in one transaction: payloads and keys are gone."""
        self._opened()
        return await self._file.write(partial(_new_epochs, epoch_source=self._epoch_source))

    def _opened(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            raise Unavailable(f"history in {self._file.path} is not open")
        return self._loop

    def _touch(self, channel: str) -> None:
        """Let the sweep look at ``channel`` soon; beyond the bound the round finds it."""
        if len(self._touched) < TOUCHED:
            self._touched[channel] = None

    def _gather(self) -> None:
        """Send the next batch to the writer, if it is free and somebody waits."""
        self._gather_due = False
        if self._committing or not self._gathering.ready:
            return
        batch = self._gathering.take()
        store = partial(_store, batch=batch, idempotency_ttl_ms=self._idempotency_ttl_ms, new_epoch=self._epoch_source)
        self._committing = True
        written_at = asyncio.get_running_loop().time()
        self._file.write(store).add_done_callback(partial(self._answer, batch, written_at))

    def _answer(self, batch: list[Commit[_Waiter]], written_at: float, done: asyncio.Future[list[_Stored]]) -> None:
        """Tell the outcome of a batch, each commit to ``on_commit`` before its waiters, and begin the next."""
        self._committing = False
        error = done.exception()
        if error is None:
            took_s = asyncio.get_running_loop().time() - written_at
            self.on_batch(sum(len(stored.publications) for stored in done.result()), took_s)
            for commit, stored in zip(batch, done.result(), strict=True):
                self._tell(commit, stored)
        else:
            if not isinstance(error, Unavailable):
                event("history.batch_failed", fault=error, path=self._file.path)
            for commit in batch:
                for waiter in self._gathering.fail(commit):
                    if not waiter.future.done():
                        # One exception each: a shared one would gather the traces of all.
                        waiter.future.set_exception(Unavailable(str(error)))
        self._gather()
        if self._settled is not None and self._gathering.idle and not self._settled.done():
            self._settled.set_result(None)

    def _tell(self, commit: Commit[_Waiter], stored: _Stored) -> None:
        if stored.publications:
            self._touch(commit.channel)
            try:
                self.on_commit(commit.channel, stored.epoch, stored.publications)
            except Exception as error:
                # Our fault, but the commit stands, and the others in the batch are to be told.
                event("history.listener_failed", fault=error, channel=commit.channel)
        for waiter, outcome in self._gathering.settle(commit, stored.outcomes):
            if not waiter.future.done():
                waiter.future.set_result(outcome)


def _store(
    db: sqlite3.Connection,
    *,
    batch: Sequence[Commit[_Waiter]],
    idempotency_ttl_ms: int,
    new_epoch: Callable[[], str],
) -> list[_Stored]:
    """Number and store a batch in one transaction; the outcome of each commit, in order."""
    outcomes: list[_Stored] = []
    rows: list[tuple[int, int, int, bytes, bytes | None]] = []
    channels: list[tuple[int, int, int, str, int]] = []
    keys: list[tuple[int, str, int, str, int]] = []
    with transaction(db, "BEGIN IMMEDIATE"):
        for commit in batch:
            found = db.execute(
                "SELECT id, epoch, top, used_ms, version, version_epoch FROM channels WHERE name=?", (commit.channel,)
            ).fetchone()
            if found is None:
                epoch = new_epoch()
                made = db.execute(
                    "INSERT INTO channels (name, epoch, top, floor, used_ms) VALUES (?, ?, 0, 0, 0)",
                    (commit.channel, epoch),
                )
                found = made.lastrowid, epoch, 0, 0, 0, ""
            channel_id, epoch, top, time_ms, *last = found
            version = Version(*last)
            stored = _Stored(epoch, [], [])
            for entry in commit.entries:
                draft = entry.draft
                if draft.key:
                    first = db.execute(
                        "SELECT offset, epoch FROM keys WHERE channel=? AND key=? AND expires_ms>?",
                        (channel_id, draft.key, entry.now_ms),
                    ).fetchone()
                    if first is not None:
                        stored.outcomes.append(Appended(Position(*first), repeated=True))
                        continue
                if version.covers(draft.version):
                    stored.outcomes.append(Appended(Position(top, epoch), repeated=True))
                    continue
                if draft.version.number:
                    version = draft.version
                if draft.key:
                    keys.append((channel_id, draft.key, top + 1, epoch, entry.now_ms + idempotency_ttl_ms))
                top += 1
                time_ms = max(time_ms, entry.now_ms)
                rows.append((channel_id, top, time_ms, draft.data, entry.waiter.extra))
                stored.outcomes.append(Appended(Position(top, epoch)))
                stored.publications.append(Publication(draft.data, top, time_ms, draft.info, draft.tags, draft.delta))
            if stored.publications:
                channels.append((top, time_ms, *version, channel_id))
            outcomes.append(stored)
        db.executemany("INSERT INTO publications VALUES (?, ?, ?, ?, ?)", rows)
        db.executemany("UPDATE channels SET top=?, used_ms=?, version=?, version_epoch=? WHERE id=?", channels)
        db.executemany("INSERT OR REPLACE INTO keys VALUES (?, ?, ?, ?, ?)", keys)
    return outcomes


def _floor(db: sqlite3.Connection, channel_id: int, retention: Retention, floor: int, top: int, now_ms: int) -> int:
    """``floor_at`` of a channel as stored."""

    def time_of(offset: int) -> int:
        row = db.execute(
            "SELECT time_ms FROM publications WHERE channel=? AND offset=?", (channel_id, offset)
        ).fetchone()
        if row is None:
            raise Damaged(f"is damaged: publication {offset} of channel id {channel_id} is missing")
        time_ms: int = row[0]
        return time_ms

    return floor_at(retention, floor, top, now_ms, time_of)


def _read(
    db: sqlite3.Connection,
    *,
    channel: str,
    retention: Retention,
    now_ms: int,
    since: int | None,
    limit: int,
    max_bytes: int,
    reverse: bool,
) -> Page:
    """Read a page in one read transaction."""
    with transaction(db, "BEGIN"):
        found = db.execute("SELECT id, epoch, top, floor FROM channels WHERE name=?", (channel,)).fetchone()
        if found is None:
            return Page((), Position())
        channel_id, epoch, top, floor = found
        floor = _floor(db, channel_id, retention, floor, top, now_ms)
        # The offsets asked for, cut to what exists: a client may send any 64 bits, SQLite takes 63.
        first, last = floor + 1, top
        if since is not None:
            first, last = (first, min(since - 1, top)) if reverse else (max(first, since + 1), top)
        if limit >= 0:
            first, last = (max(first, last - limit + 1), last) if reverse else (first, min(last, first + limit - 1))
        offsets = range(last, first - 1, -1) if reverse else range(first, last + 1)
        publications: list[Publication] = []
        if offsets:
            rows = db.execute(
                "SELECT offset, time_ms, data, extra FROM publications WHERE channel=? AND offset BETWEEN ? AND ?"
                f" ORDER BY offset {'DESC' if reverse else 'ASC'}",
                (channel_id, first, last),
            )
            size = 0
            for offset in offsets:
                row = rows.fetchone()
                if row is None or row[0] != offset:
                    # Better no answer than a page with a hole, which would be taken for the truth.
                    raise Damaged(f"is damaged: publication {offset} of channel id {channel_id} is missing")
                publication = _publication(*row)
                size += publication.weight
                if publications and size > max_bytes:
                    break
                publications.append(publication)
            rows.close()
        return Page(publications, Position(top, epoch), floor)


def _publication(offset: int, time_ms: int, data: bytes, packed: bytes | None) -> Publication:
    """A publication from its row."""
    if packed is None:
        return Publication(data, offset, time_ms)
    try:
        extra = _extra_decoder.decode(packed)
    except msgspec.DecodeError as error:
        raise Damaged(f"is damaged: publication {offset}: {error}") from error
    return Publication(data, offset, time_ms, extra.info, extra.tags)


def _tops(db: sqlite3.Connection, *, names: str) -> dict[str, Position]:
    """The positions of the channels that ``names``, a JSON array, lists and that exist."""
    rows = db.execute("SELECT name, top, epoch FROM channels WHERE name IN (SELECT value FROM json_each(?))", (names,))
    return {name: Position(top, epoch) for name, top, epoch in rows}


def _erase(db: sqlite3.Connection, channel_id: int, floor: int, limit: int) -> tuple[int, bool]:
    """Erase payloads up to ``floor``, the oldest first, at most ``limit``; says how many, and whether that was all."""
    (oldest,) = db.execute("SELECT min(offset) FROM publications WHERE channel=?", (channel_id,)).fetchone()
    if oldest is None or oldest > floor:
        return 0, True
    last = min(floor, oldest + limit - 1)
    erased = db.execute("DELETE FROM publications WHERE channel=? AND offset<=?", (channel_id, last)).rowcount
    return erased, last == floor


def _remove(db: sqlite3.Connection, *, channel: str) -> None:
    """Raise the floor to the top, and begin to erase."""
    with transaction(db, "BEGIN IMMEDIATE"):
        found = db.execute("SELECT id, top FROM channels WHERE name=?", (channel,)).fetchone()
        if found is not None:
            channel_id, top = found
            db.execute("UPDATE channels SET floor=? WHERE id=?", (top, channel_id))
            _erase(db, channel_id, top, SWEEP_ROWS)


def _redact(db: sqlite3.Connection, *, channel: str, offset: int) -> None:
    """Put ``REDACTED`` in place of a payload, and zeros where it was on its page."""
    db.execute("PRAGMA secure_delete=ON")
    try:
        with transaction(db, "BEGIN IMMEDIATE"):
            found = db.execute("SELECT id, floor, top FROM channels WHERE name=?", (channel,)).fetchone()
            # Compared here: a back end may send any 64 bits, SQLite takes 63.
            if found is None or not found[1] < offset <= found[2]:
                raise Refused(UNRECOVERABLE_POSITION, f"{channel!r} has no publication {offset} to redact")
            db.execute(
                "UPDATE publications SET data=?, extra=NULL WHERE channel=? AND offset=?", (REDACTED, found[0], offset)
            )
    finally:
        db.execute("PRAGMA secure_delete=OFF")


def _sweepable(db: sqlite3.Connection, *, names: str, after_id: int) -> tuple[dict[int, str | None], int]:
    """Channels by id: those that ``names`` lists, then the next of the round; and where the round goes on."""
    found: dict[int, str | None] = dict(
        db.execute("SELECT id, name FROM channels WHERE name IN (SELECT value FROM json_each(?))", (names,))
    )
    turn = db.execute(
        "SELECT id, name FROM channels WHERE id>? ORDER BY id LIMIT ?", (after_id, SWEEP_CHANNELS)
    ).fetchall()
    found.update(turn)
    return found, turn[-1][0] if len(turn) == SWEEP_CHANNELS else 0


def _sweep(
    db: sqlite3.Connection, *, plan: Sequence[tuple[int, str | None, Retention | None]], now_ms: int
) -> list[str]:
    """Erase expired keys, and what is gone in the channels of ``plan``; returns those that need another call."""
    unfinished: list[str] = []
    # Begun as a read: where nothing is to erase, nothing is written and no disk is waited for.
    with transaction(db, "BEGIN"):
        expired = db.execute(
            "SELECT channel, key FROM keys WHERE expires_ms<=? ORDER BY expires_ms LIMIT ?", (now_ms, SWEEP_ROWS // 2)
        ).fetchall()
        if expired:
            db.executemany("DELETE FROM keys WHERE channel=? AND key=?", expired)
        left = SWEEP_ROWS - len(expired)
        for channel_id, name, retention in plan:
            erased, finished = 0, False
            if left > 0:
                # A damaged channel shall not stop the others: whoever reads it will hear of it.
                with suppress(Damaged):
                    erased, finished = _sweep_channel(db, channel_id, name, retention, now_ms, left)
            left -= erased
            if not finished and name is not None:
                unfinished.append(name)
    return unfinished


def _sweep_channel(
    db: sqlite3.Connection, channel_id: int, name: str | None, retention: Retention | None, now_ms: int, limit: int
) -> tuple[int, bool]:
    """Erase up to ``limit`` rows of one channel; says how many, and whether that was all."""
    # The name again: since the plan was made the id may have passed to another channel.
    found = db.execute(
        "SELECT top, floor, used_ms FROM channels WHERE id=? AND name IS ?", (channel_id, name)
    ).fetchone()
    if found is None:
        return 0, True
    top, stored_floor, used_ms = found
    floor = stored_floor
    if name is None:
        floor = top
    elif retention is not None:
        floor = _floor(db, channel_id, retention, stored_floor, top, now_ms)
    if floor > stored_floor:
        db.execute("UPDATE channels SET floor=? WHERE id=?", (floor, channel_id))
    erased, finished = _erase(db, channel_id, floor, limit)
    if not finished:
        return erased, False
    if name is not None:
        if floor < top or retention is None or not forgets(retention, used_ms, now_ms):
            return erased, True
        db.execute("UPDATE channels SET name=NULL WHERE id=?", (channel_id,))
    # Forgotten for all; its row goes last, so that no other channel gets its id while its keys are there.
    keys = db.execute(
        "DELETE FROM keys WHERE channel=? AND key IN (SELECT key FROM keys WHERE channel=? LIMIT ?)",
        (channel_id, channel_id, limit),
    ).rowcount
    if keys < limit:
        db.execute("DELETE FROM channels WHERE id=?", (channel_id,))
    return erased + keys, True


def _new_epochs(db: sqlite3.Connection, *, epoch_source: Callable[[], str]) -> int:
    """Begin every channel anew in one transaction; returns how many there are."""
    with transaction(db, "BEGIN IMMEDIATE"):
        db.execute("DELETE FROM publications")
        db.execute("DELETE FROM keys")
        db.execute("DELETE FROM channels WHERE name IS NULL")
        ids = db.execute("SELECT id FROM channels").fetchall()
        db.executemany(
            "UPDATE channels SET epoch=?, top=0, floor=0, version=0, version_epoch='' WHERE id=?",
            [(epoch_source(), row_id) for (row_id,) in ids],
        )
    return len(ids)
