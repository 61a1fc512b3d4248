"""The queues behind a group commit: who waits, in which order, and what goes into the next batch.

A disk or a majority acknowledges some hundred times a second, however much it
is given at once.  So appends are *gathered*: those of one channel become a
*commit* (at most ``COMMIT_PUBLICATIONS`` or ``COMMIT_BYTES``), the commits of
many channels a *batch*.  The rules that make this fair and safe:

* One commit in flight per channel.  The next one is cut only when the outcome
  of the one before is known, so it can never become durable before it.
* Round robin: a channel that has been served goes behind all that wait.  A
  flooded channel gets one commit a batch like any other.
* A full queue refuses at once (111) and nothing of the refused draft is kept.
  What counts are all who still wait for an answer, in flight or not, since they
  are what fills the memory.
* An idempotency key that is queued or in flight already becomes a *follower* of
  the first entry with it: it shares that one's outcome, good or bad, and adds
  no second publication.

Where several processes write to one channel, a commit may lose its place to
another's and go out again: ``refill`` then lets those who came meanwhile go
with it.  Who shall give others a turn settles with ``hold`` and calls
``release`` when it is over.  ``shed`` lets go of those who waited in vain for a
commit to begin.

Shared by the kinds that commit elsewhere.  Plain: no ``async``, no clock; what
a waiter is (a future, say) is the caller's business.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from server.errors import TOO_MANY_REQUESTS, Refused
from server.history import COMMIT_BYTES, COMMIT_PUBLICATIONS, QUEUE_BYTES, QUEUE_PUBLICATIONS, Appended, Draft
from server.stream import weight_of

BATCH_PUBLICATIONS = 5_000
BATCH_BYTES = 4 * 1024 * 1024

W = TypeVar("W")


def weigh(draft: Draft) -> int:
    """Bytes that ``draft`` is counted with in a queue and in a commit."""
    return weight_of(draft.data, draft.info, draft.tags) + len(draft.key) + len(draft.version.epoch)


class Entry(Generic[W]):
    """One draft in a queue, who waits for it, and who waits for the same key."""

    __slots__ = ("draft", "followers", "now_ms", "waiter", "weight")

    def __init__(self, draft: Draft, now_ms: int, waiter: W) -> None:
        self.draft = draft
        self.now_ms = now_ms
        self.waiter = waiter
        self.weight = weigh(draft)
        self.followers: list[W] = []

    @property
    def waiters(self) -> list[W]:
        """All who wait for it, its own first."""
        return [self.waiter, *self.followers]

    def __repr__(self) -> str:
        return f"Entry({self.draft.data!r}, key={self.draft.key!r}, followers={len(self.followers)})"


class Commit(Generic[W]):
    """What becomes durable in one channel at once, in order; no key stands in it twice."""

    __slots__ = ("channel", "entries")

    def __init__(self, channel: str, entries: list[Entry[W]]) -> None:
        self.channel = channel
        self.entries = entries

    def __repr__(self) -> str:
        return f"Commit({self.channel!r}, {len(self.entries)} entries)"


class _Queue(Generic[W]):
    """One channel that somebody waits for; it is gone with the last of them, unless it is held."""

    __slots__ = ("entries", "held", "keyed", "waiting", "waiting_bytes")

    def __init__(self) -> None:
        self.entries: deque[Entry[W]] = deque()
        self.keyed: dict[str, Entry[W]] = {}
        self.waiting = 0
        self.waiting_bytes = 0
        self.held = False


class Gathering(Generic[W]):
    """The queues of all channels; see the module's docstring for the rules.

    The caller adds, takes a batch, makes it durable, and then calls ``settle``
    or ``fail`` exactly once for each commit of it.  Several batches may be in
    flight at a time.
    """

    def __init__(self) -> None:
        self._queues: dict[str, _Queue[W]] = {}
        # Channels with something to take and nothing in flight, each once, the longest waiting first.
        self._ready: deque[str] = deque()

    def __repr__(self) -> str:
        return f"Gathering({len(self._queues)} channels, {len(self._ready)} ready)"

    @property
    def idle(self) -> bool:
        """Does nobody wait for an answer?"""
        return not any(queue.waiting for queue in self._queues.values())

    @property
    def ready(self) -> bool:
        """Would ``take`` give something now?"""
        return bool(self._ready)

    def add(self, channel: str, draft: Draft, now_ms: int, waiter: W) -> None:
        """Put ``draft`` in the queue of ``channel``, or behind an entry with the same key.

        An empty queue takes any draft, however heavy: refusing it would ask its
        publisher to try again for ever.

        Raises ``errors.Refused`` (111): the queue is full, nothing was taken.
        """
        queue = self._queues.get(channel)
        if queue is not None and queue.waiting >= QUEUE_PUBLICATIONS:
            raise Refused(TOO_MANY_REQUESTS, f"{QUEUE_PUBLICATIONS} publications wait for history in {channel!r}")
        if queue is not None and draft.key and (first := queue.keyed.get(draft.key)) is not None:
            first.followers.append(waiter)
            queue.waiting += 1
            return
        entry = Entry(draft, now_ms, waiter)
        if queue is None:
            queue = self._queues[channel] = _Queue()
            self._ready.append(channel)
        elif queue.waiting_bytes + entry.weight > QUEUE_BYTES:
            raise Refused(TOO_MANY_REQUESTS, f"{queue.waiting_bytes} bytes wait for history in {channel!r}")
        queue.entries.append(entry)
        queue.waiting += 1
        queue.waiting_bytes += entry.weight
        if draft.key:
            queue.keyed[draft.key] = entry

    def take(self) -> list[Commit[W]]:
        """Cut the next batch: a commit of each ready channel in turn, until it is full or none is left.

        A batch is full at ``BATCH_PUBLICATIONS`` or ``BATCH_BYTES``, so that
        nobody waits long for the commits of others; the last commit may exceed.
        """
        batch: list[Commit[W]] = []
        publications = size = 0
        while self._ready and publications < BATCH_PUBLICATIONS and size < BATCH_BYTES:
            channel = self._ready.popleft()
            entries, weight = self._cut(self._queues[channel])
            batch.append(Commit(channel, entries))
            publications += len(entries)
            size += weight
        return batch

    def refill(self, commit: Commit[W], fits: Callable[[Draft], bool] = lambda draft: True) -> None:
        """Let those who came since ``commit`` was cut go with it, as far as there is room in it and ``fits`` allows."""
        queue = self._queues[commit.channel]
        weight = sum(entry.weight for entry in commit.entries)
        while queue.entries and len(commit.entries) < COMMIT_PUBLICATIONS and fits(queue.entries[0].draft):
            weight += queue.entries[0].weight
            if weight > COMMIT_BYTES:
                break
            commit.entries.append(queue.entries.popleft())

    def shed(self, channel: str, late: Callable[[W], bool]) -> list[W]:
        """Give up the longest waiting entries of ``channel`` that no commit has and all of whose waiters are ``late``.

        Returns their waiters.
        """
        queue = self._queues.get(channel)
        waiters: list[W] = []
        while queue is not None and queue.entries and all(map(late, queue.entries[0].waiters)):
            entry = queue.entries.popleft()
            waiters += entry.waiters
            self._forget(queue, entry)
            if not queue.waiting:
                # Nothing of it is in flight, so it is ready, or held.
                if not queue.held:
                    self._ready.remove(channel)
                    del self._queues[channel]
                break
        return waiters

    def settle(
        self, commit: Commit[W], outcomes: Sequence[Appended], *, hold: bool = False
    ) -> list[tuple[W, Appended]]:
        """Free the channel after a commit that became durable; returns each waiter with its answer.

        ``outcomes`` has one for each entry, in order.  With ``hold`` no further
        commit of the channel is cut before ``release``.
        """
        answers: list[tuple[W, Appended]] = []
        for entry, outcome in zip(commit.entries, outcomes, strict=True):
            answers.append((entry.waiter, outcome))
            if entry.followers:
                repeated = Appended(outcome.position, repeated=True)
                answers.extend((waiter, repeated) for waiter in entry.followers)
        self._free(commit, hold)
        return answers

    def fail(self, commit: Commit[W]) -> list[W]:
        """Free the channel after a commit that failed; returns all who waited for it."""
        waiters = [waiter for entry in commit.entries for waiter in entry.waiters]
        self._free(commit, False)
        return waiters

    def release(self, channel: str) -> None:
        """End the hold on ``channel`` that ``settle`` began."""
        queue = self._queues[channel]
        queue.held = False
        self._next(channel, queue)

    @staticmethod
    def _cut(queue: _Queue[W]) -> tuple[list[Entry[W]], int]:
        """Take a commit's worth from the head of ``queue``, at least one entry."""
        entries = [queue.entries.popleft()]
        weight = entries[0].weight
        while queue.entries and len(entries) < COMMIT_PUBLICATIONS:
            if weight + queue.entries[0].weight > COMMIT_BYTES:
                break
            entry = queue.entries.popleft()
            entries.append(entry)
            weight += entry.weight
        return entries, weight

    def _free(self, commit: Commit[W], hold: bool) -> None:
        queue = self._queues[commit.channel]
        for entry in commit.entries:
            self._forget(queue, entry)
        queue.held = hold
        if not hold:
            self._next(commit.channel, queue)

    def _next(self, channel: str, queue: _Queue[W]) -> None:
        if queue.entries:
            self._ready.append(channel)
        else:
            del self._queues[channel]

    @staticmethod
    def _forget(queue: _Queue[W], entry: Entry[W]) -> None:
        queue.waiting -= 1 + len(entry.followers)
        queue.waiting_bytes -= entry.weight
        if entry.draft.key:
            del queue.keyed[entry.draft.key]
