"""The ledger of one connection to a Redis: what it follows, kept in step with what is wanted of it.

Redis answers the commands of a connection in their order, so ``flush`` makes one
*batch* of what has changed: commands, closed by a PING that carries the batch's
number.  When that number comes back, everything before it has been dealt with,
and what was not confirmed by then was refused; no answer needs to be counted.
An end that is refused (by a Redis whose ACL lacks the command) is not asked for again:
that would go on for ever, and what is heard for nobody harms nobody.

Bytes are not its business and it never waits: whoever owns it writes what
``flush`` returns, and tells it what came (``confirmed``, ``ended``, ``refused``,
``answered``).  Pure; imports nothing of ours.
"""

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

BATCH_NAMES = 2_000
"""How many channels one batch may change, so that a thousandfold return does not come in one piece."""

Command = Sequence[bytes]


class _Batch:
    """Commands under way: the names that shall be confirmed, and those that shall be ended."""

    __slots__ = ("asked", "done", "ending", "number", "refusals", "waiting")

    def __init__(self, number: bytes) -> None:
        self.number = number
        self.asked: tuple[bytes, ...] = ()
        self.waiting: set[bytes] = set()
        self.ending: set[bytes] = set()
        self.refusals: list[str] = []
        self.done = False


class Outcome(NamedTuple):
    """A batch is through: these names are confirmed, those are not, and that is what Redis said to it."""

    confirmed: Sequence[bytes]
    refused: Sequence[bytes]
    refusals: Sequence[str]


class Ledger:
    """See the module's docstring.

    ``wanted`` is its owner's set, which is changed by ``want`` and ``unwant`` only;
    all of it is new to this connection.  Names of one command must agree in
    ``group``, since a cluster takes only names of one slot together.
    """

    def __init__(self, wanted: set[bytes], *, sharded: bool, group: Callable[[bytes], Hashable]) -> None:
        self.wanted = wanted
        self._subscribe, self._unsubscribe = (
            (b"SSUBSCRIBE", b"SUNSUBSCRIBE") if sharded else (b"SUBSCRIBE", b"UNSUBSCRIBE")
        )
        self._group = group
        self._changed = dict.fromkeys(wanted)
        self._asked: dict[bytes, _Batch] = {}
        self._batches: deque[_Batch] = deque()
        self._number = 0

    @property
    def changed(self) -> bool:
        """Is there something to flush?"""
        return bool(self._changed)

    @property
    def settled(self) -> bool:
        """Is all that is wanted in force, or refused?"""
        return not self._changed and not any(batch.asked for batch in self._batches)

    def want(self, name: bytes) -> None:
        """Follow ``name``; to be called again for one that was refused or ended, and changes nothing for others."""
        self.wanted.add(name)
        self._changed[name] = None

    def unwant(self, name: bytes) -> None:
        """Follow it no longer."""
        self.wanted.discard(name)
        self._changed[name] = None

    def in_force(self, name: bytes) -> bool:
        """Has Redis confirmed what was last wanted of ``name``, and is that to follow it?"""
        batch = self._asked.get(name)
        return batch is not None and batch.done and name in self.wanted and name not in self._changed

    def flush(self, *, ping: bool = False) -> tuple[list[Command], list[bytes]]:
        """The commands of one batch, to be written now, and the names that it is about.

        There are none if nothing has changed, but for the PING if one is asked
        for.  Call it again after ``answered`` while something is ``changed``.
        """
        names = list(self._changed)[:BATCH_NAMES] if len(self._changed) > BATCH_NAMES else list(self._changed)
        starting: dict[Hashable, list[bytes]] = {}
        stopping: dict[Hashable, list[bytes]] = {}
        self._number += 1
        batch = _Batch(b"%d" % self._number)
        for name in names:
            del self._changed[name]
            if name in self.wanted and name not in self._asked:
                self._asked[name] = batch
                batch.waiting.add(name)
                starting.setdefault(self._group(name), []).append(name)
            elif name not in self.wanted and self._asked.pop(name, None) is not None:
                batch.ending.add(name)
                stopping.setdefault(self._group(name), []).append(name)
        commands: list[Command] = [(self._unsubscribe, *group) for group in stopping.values()]
        commands += [(self._subscribe, *group) for group in starting.values()]
        if commands or ping:
            batch.asked = tuple(batch.waiting)
            self._batches.append(batch)
            commands.append((b"PING", batch.number))
        return commands, names

    def confirmed(self, name: bytes) -> None:
        """Redis has confirmed a subscription."""
        if self._batches:
            self._batches[0].waiting.discard(name)

    def ended(self, name: bytes) -> bool:
        """Redis has confirmed an end.  Returns true if nobody had asked for it, as when a cluster moves a slot away."""
        if self._batches and name in self._batches[0].ending:
            self._batches[0].ending.discard(name)
            return False
        return self._asked.pop(name, None) is not None

    def refused(self, words: str) -> None:
        """Redis has refused a command."""
        if self._batches:
            self._batches[0].refusals.append(words)

    def answered(self, number: bytes) -> Outcome:
        """A PING has come back.  Names that were refused are as if never asked for; ``want`` them again, or not.

        Raises ``ValueError`` if it is not the one that is due.
        """
        if not self._batches or self._batches[0].number != number:
            raise ValueError(f"expected the PING of a batch under way, found {number!r}")
        batch = self._batches.popleft()
        batch.done = True
        for name in batch.waiting:
            if self._asked.get(name) is batch:
                del self._asked[name]
        confirmed = [name for name in batch.asked if name not in batch.waiting]
        return Outcome(confirmed, list(batch.waiting), batch.refusals)
