"""Blocks: the seam that remembers who is kept out, and of what.

What every kind promises (``tests/contract/test_blocks.py``):

* What ``change`` has returned is durable, and every later ``records`` has it, of
  whatever process.
* A user has one *record*, which is changed in one step: of two who change it at the
  same time neither undoes the other's.
* Each change gives the record a higher *revision* than it ever had, also where it
  was forgotten meanwhile.  So whoever hears of two changes, in whatever order, knows
  which is the later one, and may hear of one twice.
* ``forget`` takes away only what nobody needs any more, and nothing that was changed
  since it was read.

Nobody asks a seam whether somebody is blocked: each process has a copy of what is
here (``server/blocking.py``) and asks that.

A revision is Unix milliseconds, or one more than the one before if that is higher: so
it goes on rising after a record was forgotten, as long as clocks differ by less
than ``KEPT_MS``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

import msgspec

from server.errors import LIMIT_EXCEEDED, Refused

KEPT_MS = 3600 * 1000
"""How long a record in which nothing holds any more is remembered after its last change."""

BLOCKS = 1000
"""What one user's record may hold."""


class Block(msgspec.Struct, frozen=True):
    """One thing that a user may not: be in ``channel`` (``""``: be here at all), or, ``muted``, publish there.

    ``expire_at`` in Unix seconds, 0: for ever; ``reason`` is for operators.
    """

    channel: str = ""
    muted: bool = False
    expire_at: int = 0
    reason: str = ""

    def holds(self, now: float) -> bool:
        """Does it hold at ``now`` (Unix s)?"""
        return not self.expire_at or now < self.expire_at


class Record(msgspec.Struct, frozen=True):
    """All blocks of one user; without any it says that there were some."""

    user: str
    revision: int
    blocks: tuple[Block, ...] = ()

    @property
    def forgettable_ms(self) -> int | None:
        """From when on (Unix ms) nothing of it holds and nobody can still be told of it late; ``None``: never."""
        if not all(block.expire_at for block in self.blocks):
            return None
        return max(self.revision + KEPT_MS, *(block.expire_at * 1000 for block in self.blocks), 0)


Change = Callable[[Sequence[Block]], Sequence[Block]]
"""From a user's blocks to those that are to be; is called again if somebody else was quicker."""


class Blocks(ABC):
    """The contract; see the module's docstring for the promises.  Every method may raise ``errors.Unavailable``."""

    @abstractmethod
    async def open(self) -> None:
        """Begin, within ten seconds; may be called again if it raised.

        The words of its ``errors.Unavailable`` are the operator's: which setting,
        what was expected, what was found.  Until it has returned everything else
        raises ``errors.Unavailable``.
        """

    @abstractmethod
    async def close(self) -> None:
        """End; harmless if not open."""

    @abstractmethod
    async def change(self, user: str, change: Change, now_ms: int) -> Record:
        """Change the blocks of ``user``; returns the record as it is now.

        ``errors.Unavailable`` means that the outcome is unknown: making the same
        change again is harmless.  Raises what ``change`` raises, having changed nothing.
        """

    @abstractmethod
    async def records(self, since: int = 0) -> list[Record]:
        """All records with a revision of ``since`` or higher."""

    @abstractmethod
    async def forget(self, records: Iterable[Record]) -> None:
        """Forget these, but for those that have another revision by now."""


def revised(record: Record | None, user: str, change: Change, now_ms: int) -> Record:
    """The record that follows ``record`` (``None``: there is none); what has run out is left out of it."""
    held = () if record is None else record.blocks
    wanted = change([block for block in held if block.holds(now_ms / 1000)])
    revision = now_ms if record is None else max(now_ms, record.revision + 1)
    return Record(user, revision, tuple(wanted))


def adding(block: Block) -> Change:
    """The change that puts ``block`` in, in place of one for the same thing.

    It raises ``Refused(LIMIT_EXCEEDED)`` where there are ``BLOCKS`` of them.
    """

    def change(blocks: Sequence[Block]) -> Sequence[Block]:
        others = [one for one in blocks if (one.channel, one.muted) != (block.channel, block.muted)]
        if len(others) >= BLOCKS:
            raise Refused(LIMIT_EXCEEDED, f"the user has {BLOCKS} blocks already")
        return [*others, block]

    return change


def lifting(channel: str, *, muted: bool) -> Change:
    """The change that takes out the block for this, if there is one."""
    return lambda blocks: [one for one in blocks if (one.channel, one.muted) != (channel, muted)]
