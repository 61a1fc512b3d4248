"""Broker: the seam that carries word between processes.  Only a doorbell.

What every kind promises (``tests/contract/test_broker.py``):

* ``follow`` returns once the subscription is in force: what others announce
  after that is heard here, unless it is lost on the way.  ``follow`` and
  ``unfollow`` of one channel take effect in the order they were called.
* It is quick, and nothing else: a word may be lost, late, repeated or out of
  order.  Nobody misses a publication of a kept channel because of it, since
  ``node`` judges every word by its cursors and repairs from history.
* A process does not hear its own words; it has delivered them already.
* ``announce`` never waits and never raises.
* ``on_return`` is called when anything may have been missed (a connection was
  lost and is back); the node then sweeps all that it follows.

Words are values; a kind that leaves the process encodes them with msgspec.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import msgspec

from server.stream import ClientInfo, Position, Publication

ANNOUNCED_BYTES = 16 * 1024
"""A kept publication with a larger payload is announced by its position only; history has the rest."""


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


class Target(msgspec.Struct, frozen=True):
    """Which connections an order is for: those of ``user``, narrowed by client id (PROTOCOL 15.2).

    The empty user is the anonymous user, not everybody.
    """

    user: str
    client: str = ""
    spared: Sequence[str] = ()


class DisconnectOrder(msgspec.Struct, frozen=True, tag="d"):
    """End the target's connections."""

    target: Target
    code: int
    reason: str


class SubscribeOrder(msgspec.Struct, frozen=True, tag="s"):
    """Subscribe the target's connections server-side."""

    target: Target
    channel: str
    info: bytes | None = None
    data: bytes | None = None
    expire_at: int = 0
    since: Position | None = None
    override: dict[str, bool] = {}


class UnsubscribeOrder(msgspec.Struct, frozen=True, tag="u"):
    """End the target's subscriptions of ``channel``, or of all channels if it is empty."""

    target: Target
    channel: str


class RefreshOrder(msgspec.Struct, frozen=True, tag="r"):
    """Move the expiry of the target's connections (0: never), or end them as expired."""

    target: Target
    expired: bool
    expire_at: int
    info: bytes | None = None


Order = DisconnectOrder | SubscribeOrder | UnsubscribeOrder | RefreshOrder


def _ignore(_: object) -> None:
    """Nobody listens yet."""


def _ignore_return() -> None:
    """Nobody listens yet."""


class Broker(ABC):
    """The contract; see the module's docstring for the promises."""

    on_word: Callable[[Word], None] = staticmethod(_ignore)
    on_order: Callable[[Order], None] = staticmethod(_ignore)
    on_return: Callable[[], None] = staticmethod(_ignore_return)

    @abstractmethod
    async def open(self) -> None:
        """Make ready; raises ``errors.Unavailable`` in operator's words if that cannot be."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of everything; nothing is heard afterwards."""

    @abstractmethod
    async def follow(self, channel: str) -> None:
        """Hear what others announce in ``channel`` from now on; raises ``errors.Unavailable``."""

    @abstractmethod
    async def unfollow(self, channel: str) -> None:
        """Hear it no longer."""

    @abstractmethod
    def announce(self, word: Word) -> None:
        """Tell the processes that follow ``word.channel``."""

    @abstractmethod
    def order(self, order: Order) -> None:
        """Tell all other processes to do this with their connections."""
