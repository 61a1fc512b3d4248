"""A commit on its way into MongoDB: composed into a document, and judged by who holds its slot.

Decides and never waits; ``mongo_commits`` does.
"""

import asyncio
import secrets
from enum import Enum
from typing import NamedTuple

import msgspec

from server.errors import Unavailable
from server.history import Appended, Draft
from server.history.gathering import Commit, Entry
from server.history.mongo_places import Place, View
from server.history.mongo_scheme import Document, Key, LastVersion, Record, commit_document, pack
from server.stream import Position, Publication


class Waiter(NamedTuple):
    """Who gets the outcome, until when (of the loop), and info and tags of the publication as they are stored."""

    future: asyncio.Future[Appended]
    ends_s: float
    extra: msgspec.Raw | None

    def answer(self, outcome: Appended) -> None:
        """Tell the outcome, if it is still wanted."""
        if not self.future.done():
            self.future.set_result(outcome)

    def refuse(self, why: str) -> None:
        """Tell that it is unknown.  One exception each: a shared one would gather the traces of all."""
        if not self.future.done():
            self.future.set_exception(Unavailable(why))


class Write:
    """A commit on its way.

    ``document`` is what is to be sent, ``None`` until it is composed; ``sent``
    says that MongoDB may have it, ``done`` that its waiters have their answer,
    ``blind`` how often nobody was found in its slot.  ``outcomes`` are those known already: of
    entries that are no part of the document, since their keys had been used.
    ``outdated`` has those of entries that are none for their version, if the slot is
    had; ``version`` is the channel's last one then, ``None`` if not known.
    """

    __slots__ = (
        "blind", "commit", "document", "done", "doubted", "entries", "epoch", "outcomes", "outdated", "publications",
        "sent", "sent_s", "size", "version",
    )  # fmt: skip

    def __init__(self, commit: Commit[Waiter]) -> None:
        self.commit = commit
        self.document: Document | None = None
        self.entries: list[Entry[Waiter]] = []
        self.publications: list[Publication] = []
        self.epoch = ""
        self.outcomes: dict[Entry[Waiter], Appended] = {}
        self.outdated: dict[Entry[Waiter], Appended] = {}
        self.version: LastVersion | None = None
        self.sent = self.done = self.doubted = False
        self.sent_s = 0.0
        self.size = 0
        self.blind = 0

    def __repr__(self) -> str:
        return f"Write({self.commit!r}, {self.document and self.document['_id']}, sent={self.sent})"

    @property
    def channel(self) -> str:
        """Its channel."""
        return self.commit.channel

    @property
    def undecided(self) -> list[Entry[Waiter]]:
        """Its entries whose keys are not known to have been used."""
        entries, outcomes = self.commit.entries, self.outcomes
        return [entry for entry in entries if entry not in outcomes] if outcomes else entries

    @property
    def keys(self) -> dict[str, Entry[Waiter]]:
        """Its entries by their idempotency keys."""
        return {entry.draft.key: entry for entry in self.undecided if entry.draft.key}

    @property
    def versioned(self) -> bool:
        """Has to be known which version was the last?"""
        return any(entry.draft.version.number for entry in self.undecided)

    @property
    def twofold(self) -> bool:
        """Has it drafts with key and version?  The key goes first, so it has to be looked for first."""
        return not all(is_plain(entry.draft) for entry in self.undecided)

    def may_guess(self, place: Place) -> bool:
        """May it be composed from ``place`` without a look?"""
        return not self.versioned or (place.version is not None and not self.twofold)

    def compose(self, place: Place, ttl_ms: int) -> None:
        """Make the document for the slot behind the top of ``place``, of all entries without an outcome.

        There is none if nothing is left of them.
        """
        self.entries = []
        self.publications = []
        self.outdated = {}
        self.version = place.version
        self.epoch = place.epoch
        self.sent = self.doubted = False
        self.blind = 0
        time_ms, slot = place.time_ms, place.top
        rows, keys = [], []
        for entry in self.undecided:
            draft = entry.draft
            if draft.version.number:
                if self.version is not None and self.version.version.covers(draft.version):
                    self.outdated[entry] = Appended(Position(slot - place.base, place.epoch), repeated=True)
                    continue
                self.version = LastVersion(slot + 1, draft.version)
            slot += 1
            self.entries.append(entry)
            time_ms = max(time_ms, entry.now_ms)
            rows.append((time_ms, draft.data, entry.waiter.extra))
            publication = Publication(draft.data, slot - place.base, time_ms, draft.info, draft.tags, draft.delta)
            self.publications.append(publication)
            if draft.key:
                keys.append(Key(draft.key, slot, entry.now_ms + ttl_ms))
        if not rows:
            self.document = None
            return
        packed = pack(rows)
        self.size = len(packed)
        version = self.version or LastVersion()
        self.document = commit_document(
            self.channel, place.top + 1, time_ms, secrets.token_bytes(12), packed, len(rows), keys, version
        )


class Verdict(Enum):
    """What a look says of a write."""

    OURS = "ours"
    LOST = "lost"
    GONE = "gone"
    OPEN = "open"


def judge(write: Write, holder: Record | None, view: View) -> Verdict:
    """What became of ``write``, whose slot ``holder`` holds for a majority.

    ``GONE``: it was sent, and its slot is below the floor with nobody in it any
    more: whether it had been ours is nowhere to be read.  That takes longer than
    ``GUARD_MS``, so that nobody waits for the answer.
    """
    if write.document is None or not write.sent:
        return Verdict.OPEN
    if holder is not None:
        return Verdict.OURS if holder.commit == write.document["commit"] else Verdict.LOST
    if view.state is None or view.state.floor >= write.document["_id"]["first"]:
        return Verdict.GONE
    return Verdict.OPEN


def is_plain(draft: Draft) -> bool:
    """Has it not both a key and a version?"""
    return not (draft.key and draft.version.number)


def is_late(waiter: Waiter, now_s: float) -> bool:
    """Has it been told already that its time is over?"""
    return waiter.ends_s <= now_s
