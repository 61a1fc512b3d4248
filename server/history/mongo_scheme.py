"""What stands in MongoDB for ``MongoHistory``: collections, keys, indexes, and documents from and to values.

**Slots.**  The log of a channel is a row of *slots* 1, 2, 3 …, of which none is
ever used twice, not even under another epoch.  A slot is a publication's, or
the end of a life (see below).  What clients see is the offset: the slot less the
channel's ``base``, which is 0 until its first life has ended.

``log``: one document a commit, or the end of a life.  ``_id`` is
``{channel, first}``, so that the index which every collection has is the one
that lets a slot be taken once only, and is the order in which pages are read;
where all documents after a top begin is known, so that one ``$in`` of such ids
asks for news of thousands of channels.  (``_id`` is a pair of its own instead of
a number and a unique index: one index less to write.)  Further:

* ``last``: the last slot of it; the next document begins behind it.
* ``time``: Unix ms of its last publication; never less than the one before's.
* ``commit``: 12 random bytes that say whose attempt it is.  After a write whose
  outcome is unknown they tell the own document from another process's.
* ``pubs``: the publications as one MessagePack, missing once they are erased.
  (As subdocuments a hundred of them took 188 µs to encode and 52 µs to decode,
  this way 12 and 21; nobody asks MongoDB for what is inside.)
* ``version``: ``{slot, number, epoch}``, of the last publication in it that has a
  version; it outlives the publication.  Missing if none has.
* ``keys``: ``[{key, slot, until}]``, the idempotency keys in it with the Unix
  ms up to which they hold; they outlive the publications.  Missing if there are
  none.
* ``end``: true in the document that ends a life, and missing otherwise.
* ``due``: Unix ms when the sweep has to look again: keys have expired, or the
  document is to go.  Missing if there is nothing to wait for.

Its indexes: ``keys``, unique (channel, key), so that of two processes that use
one key at the same time one gets a duplicate key error; ``due``, by which the
sweep finds what is due among millions; and ``versions``, by which the last one of a
channel is found.  All are partial: documents without keys, due or version cost
them nothing.

``channels``: one document a channel, made before its first commit and changed
by destruction alone, never by a publication.  ``_id`` is the channel's name.

* ``epoch``: of the present life; ``""`` if the last one has ended and nobody has
  published since.
* ``base``: the slot before the life's first.
* ``floor``: the slot up to which everything is gone; always the end of a document.
  *A document counts only if it begins above it*, whatever it holds.
* ``erased``: the slot up to which the sweep has erased what is gone.
* ``used``: Unix ms of the newest publication that is gone, or of the life's beginning
  if none is, from which an empty channel's meta TTL counts.
* ``version``: as in the log, the last one up to the floor.  Missing if there is none.
* ``ended``: Unix ms when the last life ended; missing while it lives.

``meta``: ``{_id: "format", version}``.  Format 2 is 1 with versions: what has the older
one is adopted as it is, and servers that know no other, and would lose versions
with what they trim, refuse it from then on.

**Lives.**  A channel's life ends by the meta TTL or ``new_epochs``: the sweep
takes the next slot for a document with ``end``.  Whoever publishes at the same
moment takes that slot as well, and one of the two loses it and looks again: an
epoch never ends under a publication.

**Nothing is deleted early.**  A process that guesses the next slot may be a
little behind; were the documents between already deleted, it would get a slot
that is long gone.  So a guess is trusted for ``TRUST_S``, and a document stays,
without its publications, for ``GUARD_MS`` after it was erased; clocks of
processes may differ by what lies between.

Pure: no clock, no driver.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Self

import msgspec

from server.history import COMMIT_PUBLICATIONS, REDACTED, Version
from server.stream import ClientInfo, Publication

FORMAT = 2
LOG = "log"
CHANNELS = "channels"
META = "meta"

TRUST_S = 30.0
GUARD_MS = 5 * 60 * 1000

SPAN = COMMIT_PUBLICATIONS
"""The most slots that a document has; in this format it may not grow."""

LAST_SLOT = 2**63 - 1

Document = dict[str, Any]


class Index(NamedTuple):
    """An index of the log, as ``createIndexes`` takes it and ``index_information`` gives it back."""

    name: str
    keys: Sequence[tuple[str, int]]
    partial: Document
    unique: bool = False


INDEXES = (
    Index("keys", (("_id.channel", 1), ("keys.key", 1)), {"keys.key": {"$exists": True}}, unique=True),
    Index("due", (("due", 1),), {"due": {"$exists": True}}),
    Index("versions", (("_id.channel", 1), ("_id.first", -1)), {"version": {"$exists": True}}),
)


class Extra(msgspec.Struct, array_like=True):
    """What few publications have."""

    info: ClientInfo | None = None
    tags: dict[str, str] | None = None


class _Row(msgspec.Struct, array_like=True):
    time_ms: int
    data: bytes
    extra: Extra | None = None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[_Row])


def pack_extra(info: ClientInfo | None, tags: dict[str, str] | None) -> msgspec.Raw | None:
    """Info and tags as they are stored; raises ``ValueError`` for text that is no Unicode."""
    return None if info is None and tags is None else msgspec.Raw(_encoder.encode(Extra(info, tags)))


def pack(rows: Sequence[tuple[int, bytes, msgspec.Raw | None]]) -> bytes:
    """``pubs`` of (time, data, extra as packed)."""
    return _encoder.encode([row if row[2] is not None else row[:2] for row in rows])


class Key(NamedTuple):
    """An idempotency key, the slot of its publication, and until when (Unix ms) it holds."""

    key: str
    slot: int
    until_ms: int


class LastVersion(NamedTuple):
    """The last version of a channel, and the slot of the publication that had it; slot 0 if none had any."""

    slot: int = 0
    version: Version = Version()

    @classmethod
    def of(cls, field: object) -> Self | None:
        """What the field ``version`` says, missing or not; ``None`` if it is not ours."""
        match field:
            case None:
                return cls()
            case {"slot": int(slot), "number": int(number), "epoch": str(epoch)}:
                return cls(int(slot), Version(int(number), epoch))
        return None

    @property
    def field(self) -> Document:
        """As it is stored; in this order, since ``$max`` compares the first field first."""
        return {"slot": self.slot, "number": self.version.number, "epoch": self.version.epoch}


class Record(NamedTuple):
    """A document of the log, with plain numbers: the driver's 64 bit ones are a kind of their own.

    ``commit``, ``packed``, ``keys`` and ``version`` are there only if they were asked for.
    """

    channel: str
    first: int
    last: int
    time_ms: int
    ends: bool
    commit: bytes
    packed: bytes | None
    keys: Sequence[Key]
    version: LastVersion

    @classmethod
    def of(cls, document: Document) -> Self | None:
        """The record that ``document`` is; ``None`` if it is not ours."""
        match document:
            case {"_id": {"channel": str(channel), "first": int(first)}, "last": int(last), "time": int(time_ms)}:
                pass
            case _:
                return None
        packed, commit, keys = document.get("pubs"), document.get("commit", b""), document.get("keys", ())
        version = LastVersion.of(document.get("version"))
        if not (packed is None or isinstance(packed, bytes)) or not isinstance(commit, bytes) or version is None:
            return None
        if not 1 <= first <= last < first + SPAN or not isinstance(keys, list | tuple):
            return None
        try:
            found = [Key(key["key"], int(key["slot"]), int(key["until"])) for key in keys]
        except (TypeError, ValueError, KeyError):
            return None
        ends = document.get("end", False) is True
        return cls(channel, int(first), int(last), int(time_ms), ends, commit, packed, found, version)

    def publications(self, base: int) -> list[Publication] | None:
        """What is in it, with offsets above ``base``; empty if it is erased, ``None`` if it is not ours."""
        if self.packed is None:
            return []
        try:
            rows = _decoder.decode(self.packed)
        except msgspec.DecodeError:
            return None
        if len(rows) != self.last - self.first + 1:
            return None
        offset = self.first - base
        return [
            Publication(row.data, offset + n, row.time_ms)
            if row.extra is None
            else Publication(row.data, offset + n, row.time_ms, row.extra.info, row.extra.tags)
            for n, row in enumerate(rows)
        ]

    def redacted(self, slot: int) -> bytes:
        """``pubs`` without the payload of ``slot``."""
        assert self.packed is not None
        rows = _decoder.decode(self.packed)
        rows[slot - self.first] = _Row(rows[slot - self.first].time_ms, REDACTED)
        return pack([(row.time_ms, row.data, pack_extra(*_parts(row.extra))) for row in rows])


def _parts(extra: Extra | None) -> tuple[ClientInfo | None, dict[str, str] | None]:
    return (None, None) if extra is None else (extra.info, extra.tags)


class Channel(NamedTuple):
    """A document of ``channels``."""

    name: str
    epoch: str
    base: int
    floor: int
    erased: int
    used_ms: int
    ended_ms: int
    version: LastVersion = LastVersion()

    @classmethod
    def of(cls, document: Document) -> Self | None:
        """The channel that ``document`` is; ``None`` if it is not ours."""
        match document:
            case {
                "_id": str(name),
                "epoch": str(epoch),
                "base": int(base),
                "floor": int(floor),
                "erased": int(erased),
                "used": int(used_ms),
            } if isinstance(document.get("ended", 0), int) and (version := LastVersion.of(document.get("version"))):
                base, floor, erased, used_ms, ended_ms = map(
                    int, (base, floor, erased, used_ms, document.get("ended", 0))
                )
                return cls(name, epoch, base, floor, erased, used_ms, ended_ms, version)
        return None


def slot_id(channel: str, first: int) -> Document:
    """The ``_id`` of the document that begins at a slot."""
    return {"channel": channel, "first": first}


def slots(channel: str, above: int = 0, upto: int = LAST_SLOT) -> Document:
    """A filter: documents of ``channel`` that begin above a slot, up to another."""
    return {"_id": {"$gt": slot_id(channel, above), "$lte": slot_id(channel, min(upto, LAST_SLOT))}}


def commit_document(
    channel: str,
    first: int,
    time_ms: int,
    commit: bytes,
    packed: bytes,
    count: int,
    keys: Iterable[Key],
    version: LastVersion = LastVersion(),  # noqa: B008 frozen
) -> Document:
    """The document of a commit of ``count`` publications; ``version`` is the channel's last one, in it or before it."""
    document: Document = {
        "_id": slot_id(channel, first),
        "last": first + count - 1,
        "time": time_ms,
        "commit": commit,
        "pubs": packed,
    }
    held = list(keys)
    if held:
        document["keys"] = [{"key": key.key, "slot": key.slot, "until": key.until_ms} for key in held]
        document["due"] = max(key.until_ms for key in held)
    if version.slot >= first:
        document["version"] = version.field
    return document


def trimming(floor: int, used_ms: int, version: LastVersion) -> Document:
    """The update that raises a floor; ``version`` is the last one of what goes.  Never takes anything back."""
    highest: Document = {"floor": floor, "used": used_ms}
    return {"$max": {**highest, "version": version.field} if version.slot else highest}


def end_document(channel: str, slot: int, now_ms: int, commit: bytes) -> Document:
    """The document that ends a life at ``slot``; it is due only once its channel's document tells the same."""
    return {"_id": slot_id(channel, slot), "last": slot, "time": now_ms, "commit": commit, "end": True}


def unerased(channel: str, above: int, upto: int) -> Document:
    """A filter: documents between two slots that are to be erased."""
    return {**slots(channel, above, upto), "$or": [{"pubs": {"$exists": True}}, {"end": True}]}


def erasure(now_ms: int) -> Document:
    """The update that erases a document; its keys may need it for longer than its slot does."""
    return {"$unset": {"pubs": ""}, "$max": {"due": now_ms + GUARD_MS}}


def new_channel(epoch: str, now_ms: int) -> Document:
    """The document of a channel that nobody has published to, without its ``_id``.

    As every life it begins as used: its epoch may be told before its first commit is stored, and is no old one.
    """
    return {"epoch": epoch, "base": 0, "floor": 0, "erased": 0, "used": now_ms}


def after_end(slot: int, epoch: str, used_ms: int, now_ms: int) -> Document:
    """The update of a channel whose life has ended at ``slot``; with ``epoch`` the next one begins there."""
    fields: Document = {"epoch": epoch, "base": slot, "floor": slot, "used": used_ms}
    return {"$set": fields, "$unset": {"ended": ""}} if epoch else {"$set": {**fields, "ended": now_ms}}


def beginning(epoch: str, now_ms: int) -> Document:
    """The update of a channel whose last life has ended, by which the next one begins."""
    return {"$set": {"epoch": epoch, "used": now_ms}, "$unset": {"ended": ""}}
