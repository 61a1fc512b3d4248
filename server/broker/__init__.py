"""Broker: the seam that carries word between processes.  Only a doorbell.

What every kind promises (``tests/contract/test_broker.py``):

* ``follow`` returns once the subscription is in force: what others announce
  after that is heard here, unless it is lost on the way.  ``follow`` and
  ``unfollow`` of one channel take effect in the order they were called; a
  second ``follow`` changes nothing, and one ``unfollow`` ends it.
* A wish outlives an outage: what was to be followed when ``follow`` raised, or
  when a connection was lost, is followed as soon as that can be.
* It is quick, and nothing else: a word may be lost, late, repeated or out of
  order.  Nobody misses a publication of a kept channel because of it, since
  ``node`` judges every word by its cursors and repairs from history.
* A process does not hear its own words; it has delivered them already.
* ``announce`` and ``tell`` never wait and never raise.
* ``on_return`` is called when anything may have been missed (a connection was
  lost and is back, and all is followed again); the node then sweeps all that it
  follows.
* ``trouble`` says so while nothing is heard, and ``mute`` while nothing that is said
  is taken, from a second or two after the connection fell silent.

Words are values; a kind that leaves the process encodes them with msgspec.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import msgspec

from server.stream import ClientInfo, Position, Publication

ANNOUNCED_BYTES = 16 * 1024
"""A kept publication that weighs more, with its tags, is announced by its position only; history has the rest."""


class Published(msgspec.Struct, frozen=True, tag="p"):
    """Publications of one channel, ascending; or, without any, the word that its top is ``top``.

    In a passing channel ``top`` is ``Position(0, "")``.
    """

    channel: str
    top: Position
    publications: Sequence[Publication] = ()


class Joined(msgspec.Struct, frozen=True, tag="j"):
    """Somebody subscribed."""

    channel: str
    info: ClientInfo


class Left(msgspec.Struct, frozen=True, tag="l"):
    """Somebody's subscription ended."""

    channel: str
    info: ClientInfo


Word = Published | Joined | Left


class Ask(msgspec.Struct, frozen=True, tag="q"):
    """A process asks others; said again until they answer, so ``id`` makes the repeat harmless.

    ``sender`` is the id of the asking node.  What is asked is for ``peers`` and
    those who answer to understand: this seam only carries it.  ``age_s`` is how
    long ago it was first asked.
    """

    id: str
    sender: str
    body: bytes
    age_s: float = 0.0


class Answer(msgspec.Struct, frozen=True, tag="a"):
    """What ``sender`` answers to the ask ``id``."""

    id: str
    sender: str
    body: bytes


class Hello(msgspec.Struct, frozen=True, tag="h"):
    """``sender`` is alive, and this is what it has to say of itself (PROTOCOL 15.2, info)."""

    sender: str
    facts: bytes


class Bye(msgspec.Struct, frozen=True, tag="b"):
    """``sender`` is about to end."""

    sender: str


class Spent(msgspec.Struct, frozen=True, tag="s"):
    """``sender`` has let ``whose`` publish so many times in ``channel`` since it last said so (``limits.Quotas``)."""

    sender: str
    whose: str
    channel: str
    count: int


Note = Ask | Answer | Hello | Bye | Spent
"""What processes tell one another apart from what happens in channels."""


def _ignore(_: object) -> None:
    """Nobody listens yet."""


def _ignore_return() -> None:
    """Nobody listens yet."""


class Broker(ABC):
    """The contract; see the module's docstring for the promises."""

    on_word: Callable[[Word], None] = staticmethod(_ignore)
    on_note: Callable[[Note], None] = staticmethod(_ignore)
    on_return: Callable[[], None] = staticmethod(_ignore_return)
    on_taken: Callable[[float], None] = staticmethod(_ignore)
    """Called with the seconds that a word waited until it was taken; of one word at a time."""

    trouble: str = ""
    """Why nothing is heard just now, in operator's words; ``""`` while all is well."""

    mute: str = ""
    """The same for what is said: kept channels elsewhere are behind until the next sweep, orders do not get there."""

    @property
    def alone(self) -> bool:
        """Is there certainly nobody who could hear?  Then a word need not even be made."""
        return False

    @abstractmethod
    async def open(self, node: str) -> None:
        """Make ready, within ten seconds; ``node`` is the id by which ``tell`` of other processes finds this one.

        Raises ``errors.Unavailable`` if that cannot be, and may then be called
        again.  The words are the operator's: which setting, what was expected,
        what was found.
        """

    @abstractmethod
    async def close(self) -> None:
        """Let go of everything; nothing is heard afterwards."""

    @abstractmethod
    async def follow(self, channel: str) -> None:
        """Hear what others announce in ``channel`` from now on.

        Raises ``errors.Unavailable`` if that is not in force within a second or
        so; the wish stands all the same.
        """

    @abstractmethod
    async def unfollow(self, channel: str) -> None:
        """Hear it no longer."""

    @abstractmethod
    def announce(self, word: Word) -> None:
        """Tell the processes that follow ``word.channel``."""

    @abstractmethod
    def tell(self, note: Note, to: str = "") -> None:
        """Tell the node ``to``, or all other processes; like any word it may be lost, late or repeated."""
