"""History in this process's memory: fast, exact, and gone with it.

For tests, demonstrations and channels whose past nobody misses after a restart.
Nothing is ever waited for: an append is numbered, stored and told to
``on_commit`` in one go, so there is no queue to fill and no outcome to doubt.

Several ``MemoryHistory`` may share one ``Log``: the nodes of a test then stand
over one truth, as processes do over one database, each hearing of its own
commits only.
"""

import heapq
from collections.abc import Callable, Iterable

import msgspec

from server.errors import UNRECOVERABLE_POSITION, Refused
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
from server.stream import Page, Position, Publication

SWEEP_CHANNELS = 1_000
SWEEP_ITEMS = 10_000


class _Stream:
    """One channel.  ``publications`` holds exactly the offsets above ``floor`` up to ``top``."""

    __slots__ = ("epoch", "floor", "keys", "publications", "top", "used_ms", "version")

    def __init__(self, epoch: str) -> None:
        self.epoch = epoch
        self.top = 0
        self.floor = 0
        self.used_ms = 0
        self.version = Version()
        # By offset, not in a sequence: what finding a page or cutting off an old end costs does not grow with the size.
        self.publications: dict[int, Publication] = {}
        self.keys: dict[str, tuple[int, int]] = {}  # key -> offset, expires_ms

    def time_of(self, offset: int) -> int:
        return self.publications[offset].time_ms

    def cut(self, floor: int) -> None:
        """Erase the payloads up to ``floor``."""
        for offset in range(self.floor + 1, floor + 1):
            del self.publications[offset]
        self.floor = max(self.floor, floor)


class Log:
    """What is remembered; the truth that several ``MemoryHistory`` can share."""

    def __init__(self) -> None:
        self.streams: dict[str, _Stream] = {}
        self.expiring: list[tuple[int, str, str]] = []  # a heap of expires_ms, channel, key
        self.round: list[str] = []  # channels that the sweep has yet to look at, the last one next

    def __repr__(self) -> str:
        return f"Log({len(self.streams)} channels)"


class MemoryHistory(History):
    """The contract of ``History``, kept in memory.

    ``idempotency_ttl_ms`` is how long a key is remembered; ``epoch_source``
    gives a name that was never used, for each new epoch.
    """

    def __init__(
        self,
        log: Log | None = None,
        *,
        idempotency_ttl_ms: int = IDEMPOTENCY_TTL_MS,
        epoch_source: Callable[[], str] = random_epoch,
    ) -> None:
        self._log = Log() if log is None else log
        self._idempotency_ttl_ms = idempotency_ttl_ms
        self._epoch_source = epoch_source

    async def open(self) -> None:
        """Nothing to make ready."""

    async def close(self) -> None:
        """Nothing to finish; the ``Log`` stays with whoever else holds it."""

    async def append(self, channel: str, draft: Draft, retention: Retention, now_ms: int) -> Appended:
        """Number ``draft`` and store it, in this loop turn; never raises.  PROTOCOL 11.1, 11.8."""
        stream = self._log.streams.get(channel)
        if stream is None:
            stream = self._log.streams[channel] = _Stream(self._epoch_source())
        if draft.key:
            offset, expires_ms = stream.keys.get(draft.key, (0, now_ms))
            if expires_ms > now_ms:
                return Appended(Position(offset, stream.epoch), repeated=True)
        if stream.version.covers(draft.version):
            return Appended(Position(stream.top, stream.epoch), repeated=True)
        if draft.version.number:
            stream.version = draft.version
        stream.top += 1
        stream.used_ms = max(stream.used_ms, now_ms)
        publication = Publication(draft.data, stream.top, stream.used_ms, draft.info, draft.tags)
        stream.publications[stream.top] = publication
        if draft.key:
            expires_ms = now_ms + self._idempotency_ttl_ms
            stream.keys[draft.key] = stream.top, expires_ms
            heapq.heappush(self._log.expiring, (expires_ms, channel, draft.key))
        # Not left to the sweep: a flood must not outgrow the memory within a second.
        stream.cut(floor_at(retention, stream.floor, stream.top, now_ms, stream.time_of))
        appended = Appended(Position(stream.top, stream.epoch))
        told = msgspec.structs.replace(publication, delta=True) if draft.delta else publication
        self.on_commit(channel, stream.epoch, (told,))
        return appended

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
        """Read a page; never raises.  PROTOCOL 4.6."""
        stream = self._log.streams.get(channel)
        if stream is None:
            return Page((), Position())
        floor = floor_at(retention, stream.floor, stream.top, now_ms, stream.time_of)
        if reverse:
            newest = stream.top if since is None else min(since - 1, stream.top)
            offsets = range(newest, floor, -1)
        else:
            offsets = range(max(floor, since or 0) + 1, stream.top + 1)
        publications: list[Publication] = []
        size = 0
        for offset in offsets if limit < 0 else offsets[:limit]:
            publication = stream.publications[offset]
            size += publication.weight
            if publications and size > max_bytes:
                break
            publications.append(publication)
        return Page(publications, Position(stream.top, stream.epoch), floor)

    async def tops(self, channels: Iterable[str]) -> dict[str, Position]:
        """The newest position of each known channel; never raises."""
        streams = self._log.streams
        known = ((channel, streams[channel]) for channel in channels if channel in streams)
        return {channel: Position(stream.top, stream.epoch) for channel, stream in known}

    async def remove(self, channel: str) -> None:
        """Forget the payloads of a channel; never raises.  PROTOCOL 11.1."""
        stream = self._log.streams.get(channel)
        if stream is not None:
            stream.publications.clear()
            stream.floor = stream.top

    async def redact(self, channel: str, offset: int) -> None:
        """Erase one payload; raises ``errors.Refused`` (112) if it is not there.  PROTOCOL 11.1."""
        stream = self._log.streams.get(channel)
        publication = None if stream is None else stream.publications.get(offset)
        if stream is None or publication is None:
            raise Refused(UNRECOVERABLE_POSITION, f"{channel!r} has no publication {offset} to redact")
        stream.publications[offset] = Publication(REDACTED, offset, publication.time_ms)

    async def sweep(self, retention_of: RetentionOf, now_ms: int) -> None:
        """Erase what is gone in the next ``SWEEP_CHANNELS`` channels, and expired keys, some ``SWEEP_ITEMS`` in all."""
        log = self._log
        left = SWEEP_ITEMS
        while left > 0 and log.expiring and log.expiring[0][0] <= now_ms:
            expires_ms, channel, key = heapq.heappop(log.expiring)
            stream = log.streams.get(channel)
            # The key may have been used anew since, or its channel forgotten and begun again.
            if stream is not None and stream.keys.get(key, (0, 0))[1] == expires_ms:
                del stream.keys[key]
            left -= 1
        if not log.round:
            log.round = list(log.streams)
        for _ in range(min(SWEEP_CHANNELS, len(log.round))):
            if left <= 0:
                break
            channel = log.round[-1]
            stream = log.streams.get(channel)
            retention = None if stream is None else retention_of(channel)
            if stream is not None and retention is not None:
                floor = floor_at(retention, stream.floor, stream.top, now_ms, stream.time_of)
                cut = min(floor, stream.floor + left)
                left -= cut - stream.floor
                stream.cut(cut)
                if cut < floor:
                    break  # the same channel goes on next time
                if stream.floor == stream.top and forgets(retention, stream.used_ms, now_ms):
                    del log.streams[channel]
            log.round.pop()

    async def new_epochs(self) -> int:
        """Start every channel on a new epoch at offset 0; never raises."""
        self._log.expiring.clear()
        for channel, stream in self._log.streams.items():
            fresh = self._log.streams[channel] = _Stream(self._epoch_source())
            fresh.used_ms = stream.used_ms
        return len(self._log.streams)
