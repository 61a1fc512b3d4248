"""History: the seam that numbers publications and keeps them.  The truth.

What every kind promises (``tests/contract/test_history.py`` holds each to it):

* A publication is durable before ``append`` returns, and its offset has no hole
  before it.  Offsets of a channel are 1, 2, 3 ... under one epoch, whoever
  appends.
* ``on_commit`` is called on the event loop for each commit of this process, in
  order, *before* the ``append`` calls that it answers return; also when nobody
  waits for them any more.
* A read is never older than a commit or an announcement already heard of.
* An idempotency key is unique in its channel for ``idempotency_ttl``; the second
  use gets the first one's position.  The same key twice in one gathering waits
  for the first's outcome.  Trimming, ``remove`` and ``redact`` erase payloads;
  keys and offsets stay.
* A draft with a version that the channel's last one covers is not stored, and
  gets the top instead; whoever publishes, and however they race.  The last version
  outlives its publication: it goes with the channel's epoch.  A key goes first:
  what was used once gets its position, whatever its version.
* A new epoch comes only from destruction: the meta TTL, ``new_epochs``.  Reading
  writes nothing: a channel nobody published to has the position ``Position(0, "")``.
* Nothing here blocks the event loop, and cancelling a waiter cancels no commit.

A kind translates its driver's exceptions: ``errors.Unavailable`` when it cannot
answer (for ``append``: the outcome is unknown), ``errors.Refused`` with
``TOO_MANY_REQUESTS`` when a channel's queue is full.  Until ``open`` has returned
everything else raises ``errors.Unavailable``, and writes nothing.
"""

import secrets
import string
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import msgspec

from server.stream import PAGE_BYTES as PAGE_BYTES
from server.stream import PAGE_PUBLICATIONS as PAGE_PUBLICATIONS
from server.stream import ClientInfo, Page, Position, Publication
from server.stream import Retention as Retention

COMMIT_PUBLICATIONS = 100
COMMIT_BYTES = 256 * 1024
QUEUE_PUBLICATIONS = 2_000
QUEUE_BYTES = 8 * 1024 * 1024
IDEMPOTENCY_TTL_MS = 24 * 3600 * 1000
HIGHEST_VERSION = 2**63 - 1

REDACTED = b"null"
"""What stands in place of a payload that was redacted: JSON, so that every client can read it."""

EPOCH_ALPHABET = string.ascii_letters + string.digits


def random_epoch() -> str:
    """A new epoch: 8 letters and digits that nobody can have seen before."""
    return "".join(secrets.choice(EPOCH_ALPHABET) for _ in range(8))


def floor_at(retention: Retention, floor: int, top: int, now_ms: int, time_of: Callable[[int], int]) -> int:
    """The highest offset that is gone at ``now_ms``: erased already (``floor``), beyond the size, or too old.

    ``time_of`` gives the ``time_ms`` of any publication above ``floor`` up to
    ``top``.  Times of a channel never go backwards, so the expired ones are a
    prefix: it is asked once as a rule, and some log2 times when the sweep is
    behind.
    """
    if retention.size >= 0:
        floor = max(floor, top - retention.size)
    expired_ms = now_ms - retention.ttl_ms
    if retention.ttl_ms < 0 or floor >= top or time_of(floor + 1) > expired_ms:
        return floor
    return floor + bisect_right(range(floor + 1, top + 1), expired_ms, key=time_of)


def forgets(retention: Retention, used_ms: int, now_ms: int) -> bool:
    """Does an empty channel, last committed to at ``used_ms``, forget its epoch and top at ``now_ms``?"""
    return 0 <= retention.meta_ttl_ms <= now_ms - used_ms


class Version(NamedTuple):
    """The version of what a publication says: a number up to ``HIGHEST_VERSION``, and the epoch in which it counts.

    Number 0 is none.  PROTOCOL 11.8.3.
    """

    number: int = 0
    epoch: str = ""

    def covers(self, other: "Version") -> bool:
        """Does ``other``, published after this one, say nothing new?  Without an epoch it counts in any."""
        return 0 < other.number <= self.number and other.epoch in ("", self.epoch)


class Draft(msgspec.Struct, frozen=True):
    """A publication before it has a number.

    ``key`` is the idempotency key, ``""`` for none.  One with ``skip_history``
    never comes here: the node lets it pass.  ``delta`` is not stored: it is a wish
    for the publication that ``on_commit`` gets.
    """

    data: bytes
    info: ClientInfo | None = None
    tags: dict[str, str] | None = None
    key: str = ""
    skip_history: bool = False
    delta: bool = False
    version: Version = Version()


class Appended(msgspec.Struct, frozen=True):
    """Where a draft stands now; ``repeated`` if nothing was stored, since its key had been used, or it is outdated.

    What is outdated gets the position of the top.
    """

    position: Position
    repeated: bool = False


OnCommit = Callable[[str, str, Sequence[Publication]], None]
"""Called with channel, epoch, and the publications of one commit, ascending."""

RetentionOf = Callable[[str], Retention | None]
"""Gives a channel's retention by its name, ``None`` if it is no kept channel (any more)."""


OnBatch = Callable[[int, float], None]
"""Called with how many publications one write to the store made durable, and how long (s) that took."""


def ignore_batches(publications: int, seconds: float) -> None:
    """The ``on_batch`` of a history whose speed nobody measures."""


def ignore_commits(channel: str, epoch: str, publications: Sequence[Publication]) -> None:
    """The ``on_commit`` of a history that nobody listens to."""


class History(ABC):
    """The contract; see the module's docstring for the promises.

    Times are Unix milliseconds and always come from the caller.
    """

    on_commit: OnCommit = staticmethod(ignore_commits)
    on_batch: OnBatch = staticmethod(ignore_batches)

    trouble: str = ""
    """Why it cannot answer just now, in operator's words; ``""`` while all is well."""

    @abstractmethod
    async def open(self) -> None:
        """Make ready, within ten seconds; raises ``errors.Unavailable`` if that cannot be, and may be called again.

        The words are the operator's: which setting, what was expected, what was found.
        """

    @abstractmethod
    async def close(self) -> None:
        """Finish the commits under way and let go of everything."""

    @abstractmethod
    async def append(self, channel: str, draft: Draft, retention: Retention, now_ms: int) -> Appended:
        """Number ``draft`` and store it; returns once it is durable.

        Raises ``errors.Unavailable`` (outcome unknown) and ``errors.Refused``
        (111, the channel's queue is full; nothing was stored).
        """

    @abstractmethod
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
        """Read up to ``limit`` publications (-1: no limit) and about ``max_bytes`` after ``since``.

        ``since=None`` starts at the oldest kept one; ``limit=0`` reads only the
        position and the floor.  At least one publication is returned if there is
        one, however heavy.  With ``reverse`` they descend, from below ``since``
        or from the top.  What ``retention`` calls gone at ``now_ms`` is gone,
        whether the sweep came by or not: ``floor`` says so.

        Raises ``errors.Unavailable``.
        """

    @abstractmethod
    async def tops(self, channels: Iterable[str]) -> dict[str, Position]:
        """The newest position of each channel, in one query; unknown ones are left out."""

    @abstractmethod
    async def remove(self, channel: str) -> None:
        """Forget the payloads of a channel; its top, epoch and keys stay (PROTOCOL 11.1)."""

    @abstractmethod
    async def redact(self, channel: str, offset: int) -> None:
        """Erase the payload of one publication for good: it stays, with data ``null`` and neither info nor tags.

        Raises ``errors.Refused`` (112) if it is not there (any more), and
        ``errors.Unavailable``: whether it was done is unknown, ask again.
        """

    def heard(self, channel: str, top: Position, time_ms: int = 0) -> None:  # noqa: B027 not abstract: see there
        """Learn that another process announced ``top``; ``time_ms`` is the time of that publication, 0 if unknown.

        From now on no read is older.  A kind that no other process writes to has
        nothing to learn.
        """

    @abstractmethod
    async def sweep(self, retention_of: RetentionOf, now_ms: int) -> None:
        """Erase for good what retention calls gone, expired keys, and channels past their meta TTL.

        Does a bounded amount of work a call; call it once a second.
        """

    @abstractmethod
    async def new_epochs(self) -> int:
        """Start every channel on a new epoch (after a restore from backup); returns how many there were."""
