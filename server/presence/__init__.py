"""Presence: the seam that knows who is in a channel, over all processes.

What every kind promises (``tests/contract/test_presence.py``):

* An entry belongs to the *incarnation* of a process that made it, and every
  incarnation renews one lease.  Readers do not see entries whose lease has run
  out, whether anybody has cleared them away or not.
* A client that is added by two processes belongs to the one that added it last,
  and only that one can remove it.
* ``sweep`` clears away the entries of incarnations that are gone; each entry is
  returned by exactly one sweep of one survivor, or taken by one ``remove`` of its
  owner, who announces the leave.
* A process whose lease ran out while it was paused registers anew, as another
  incarnation: ``renew`` says so by returning ``False``, and the node adds its
  members again.  What it had entered before is a dead one's.
* Reading and writing cost nothing that grows with the square of the members.

Times are Unix seconds and come from the caller.  Clocks of processes differ, so
a kind that leaves the process judges leases by one clock that all share, where
the entries are, and takes from the callers' only how much time passed for each.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from server.stream import ClientInfo


class Presence(ABC):
    """The contract; see the module's docstring for the promises.  Every method may raise ``errors.Unavailable``."""

    @abstractmethod
    async def open(self, now: float) -> None:
        """Take a lease as a new incarnation, within ten seconds; may be called again if it raised.

        The words of its ``errors.Unavailable`` are the operator's: which setting,
        what was expected, what was found.  Until it has returned everything else
        raises ``errors.Unavailable``.
        """

    @abstractmethod
    async def close(self) -> None:
        """Give up the lease together with all entries of this incarnation."""

    @abstractmethod
    async def add(self, channel: str, info: ClientInfo) -> None:
        """Enter ``info.client`` into ``channel``, or renew what others see of it."""

    @abstractmethod
    async def remove(self, channel: str, client: str) -> bool:
        """Take ``client`` out of ``channel``; it need not be there.

        ``False`` says that it was not, or belongs to another process: somebody
        else has announced that it left, or will.
        """

    @abstractmethod
    async def members(self, channel: str, now: float) -> dict[str, ClientInfo]:
        """Who is in ``channel``, by client id."""

    @abstractmethod
    async def stats(self, channel: str, now: float) -> tuple[int, int]:
        """How many clients, and how many different users, are in ``channel``; the anonymous user counts as one."""

    @abstractmethod
    async def renew(self, now: float) -> bool:
        """Renew the lease; ``False`` if it had run out, and everything must be added again."""

    @abstractmethod
    async def sweep(self, now: float) -> Sequence[tuple[str, ClientInfo]]:
        """Clear away what dead incarnations left; returns what was cleared, channel and entry.

        It may stop after some thousand entries, so that they are announced before
        it goes on: call it again while it returns any.
        """
