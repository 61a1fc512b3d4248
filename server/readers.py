"""Event streams: a session that only listens, to channels that its request names.

It is a session like any other: found by orders, counted, pinged, ended with a code;
its subscriptions are the hub's.  What differs is its beginning, which is a request
that can be refused, and its words: each publication is an event, whose *id* is the
position in all channels of this reader behind that event, so that a browser resumes
with no code of its own.

Ids are where readers of one channel differ.  So a publication is encoded once for
all of them, as everywhere, without an id; the outbox adds that when the event
leaves, in the order of leaving, since an id that ran ahead of its events would skip
them after a cut.  Readers of one channel that stand in the same epoch still share
the bytes.  Tried and dropped: encoding with the id for each reader in the hub, where
publications of two channels may change places between encoding and leaving.

PROTOCOL 17.3.
"""

import asyncio
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from server import cursors, errors, orders, protocol
from server.auth import SubscribeOptions
from server.callers import Asker
from server.commands import SKILLS, replace_others
from server.errors import (
    CONNECTION_CLOSED,
    CONNECTION_LIMIT,
    LIMIT_EXCEEDED,
    RATE_LIMITED,
    SERVER_ERROR,
    SHUTDOWN,
    TOO_MANY_REQUESTS,
    Disconnected,
    Refused,
    Unsubscribed,
)
from server.hub import Subscription
from server.node import Node
from server.outbox import Outbox, Request, Wire
from server.session import Gate, Session
from server.stream import Position
from server.subscribing import begin, join

BREAK = b"\0"
"""Between the parts of an event that has no id yet: in no JSON text is there such a byte."""

STAY_AWAY = b"retry: 86400000\n"
"""A browser knows none of our codes and comes back after any end; this has it wait a day (HTML standard, 9.2.6)."""

COME_AGAIN_MS = 2_000, 10_000
"""Between these a browser waits whose stream cannot begin for now: not all of them together again."""

KEEP_ALIVE = b":\n\n"
"""A comment (HTML standard, 9.2.6): a proxy sees that the stream lives, nobody else does."""


def event(kind: str, data: bytes, id: str = "") -> bytes:
    """An event as a browser reads it; ``kind`` is ``""`` for a message, ``data`` one line."""
    head = f"event: {kind}\n" if kind else ""
    tail = f"id: {id}\n" if id else ""
    return b"%sdata: %s\n%s\n" % (head.encode(), data, tail.encode())


class EventCodec(protocol.OneWayCodec):
    """Pushes as parts of events: kind, channel, offset, epoch (where it is said), data; ``Part`` reads them."""

    ping = b""

    def push(self, channel: str, kind: str, body: protocol.Body) -> bytes:
        """See ``Codec.push``; the channel goes into the data, in front."""
        name = msgspec.json.encode(channel)
        data = self._encode(body)
        if channel:
            data = b'{"channel":%s%s%s' % (name, b"," if len(data) > 2 else b"", data[1:])
        offset, epoch = (body.offset, body.epoch) if isinstance(body, protocol.Publication) else (0, "")
        return BREAK.join((kind.encode(), name, b"%d" % offset, epoch.encode(), data))

    def disconnect(self, disconnect: errors.Disconnect) -> bytes:
        """The last event; a browser that is to stay away is told how long, since it comes back by itself."""
        said = event("disconnect", self._encode(protocol.Disconnect(disconnect.code, disconnect.reason)))
        return said if disconnect.comes_back else STAY_AWAY + said


CODEC = EventCodec()


def come_again(code: int) -> bytes:
    """All that a browser is told for now whose stream cannot begin, with ``code`` of a refusal or a disconnect.

    An ``EventSource`` never comes back after another status than 200 (HTML standard, 9.2.3).
    """
    ending = {SHUTDOWN.code: SHUTDOWN, TOO_MANY_REQUESTS.code: RATE_LIMITED}.get(code, SERVER_ERROR)
    return b"retry: %d\n\n%s" % (random.randint(*COME_AGAIN_MS), CODEC.disconnect(ending))


class Part:
    """One push on its way to become an event."""

    __slots__ = ("channel", "data", "epoch", "kind", "offset")

    def __init__(self, message: bytes) -> None:
        kind, name, offset, epoch, self.data = message.split(BREAK, 4)
        self.kind = kind.decode()
        self.channel: str = msgspec.json.decode(name)
        self.offset = int(offset)
        self.epoch = epoch.decode()


def parts(frames: bytes) -> list[Part | None]:
    """The pushes of whole frames; ``None`` stands for a ping."""
    return [Part(line) if line else None for line in frames.split(b"\n")[:-1]]


class Reader:
    """Where one reader stands in its channels; what it is sent moves it."""

    __slots__ = ("channels", "positions")

    def __init__(self, channels: Sequence[str]) -> None:
        self.channels = tuple(channels)
        self.positions: dict[str, Position] = {}

    @property
    def id(self) -> str:
        """Its position, as the id of an event; ``""`` if none of its channels has one."""
        return cursors.event_id(self.channels, self.positions)

    def take(self, batch: Iterable[Part | None]) -> bytes:
        """The events that these pushes are for it."""
        return b"".join(map(self._event, batch))

    def _event(self, part: Part | None) -> bytes:
        if part is None:
            return KEEP_ALIVE
        if part.kind == "unsubscribe":
            self.positions.pop(part.channel, None)
        if part.kind != "pub":
            return event(part.kind, part.data)
        position = self.positions.get(part.channel)
        if position is None or not part.offset:
            return event("", part.data)
        self.positions[part.channel] = Position(part.offset, part.epoch or position.epoch)
        return event("", part.data, self.id)


class EventWire(Wire):
    """All readers of a process: each push on a line of its own, and an event only in the outbox."""

    format = "json"

    codec = CODEC

    def frame(self, message: bytes) -> bytes:
        """See ``Wire.frame``; messages have no raw newlines (PROTOCOL 2.3.6)."""
        return message + b"\n"

    def spread(self, outboxes: Iterable[Outbox], data: bytes) -> None:
        """See ``Wire.spread``; who reads the same alone, from the same epoch on, shares the bytes."""
        batch = parts(data)
        made: dict[tuple[Wire, str], bytes] = {}
        alike: dict[tuple[Wire, str], list[Outbox]] = {}
        for outbox in outboxes:
            assert isinstance(outbox, EventOutbox), f"expected an EventOutbox, got {outbox!r}"
            outbox.spread(batch, made, alike)
        for (wire, epoch), group in alike.items():
            wire.spread(group, made[wire, epoch])


WIRE = EventWire()


class EventOutbox(Outbox):
    """One reader's events; they go to the outbox of a stream once there is one (``attach``).

    Until then what the session is sent waits here; its subscriptions go live only
    afterwards, so that this is nothing but a few orders' pushes.
    """

    __slots__ = ("_stream", "_waiting", "ending", "reader", "wire")

    def __init__(self, reader: Reader) -> None:
        self.wire = WIRE
        self.reader = reader
        self._stream: Outbox | None = None
        self._waiting: list[bytes] = []
        self.ending: errors.Disconnect | None = None
        """Why it was closed."""

    def __repr__(self) -> str:
        return f"<EventOutbox of {len(self.reader.channels)} channels {self._stream!r}>"

    def attach(self, stream: Outbox) -> None:
        """The response has begun: ``stream`` carries it."""
        self._stream = stream
        if self.ending is not None:
            stream.close(self.ending)

    def say(self, text: bytes) -> None:
        """Send text of the stream's own; it must be attached."""
        assert self._stream is not None, "expected a stream, and there is none yet"
        self._stream.send(self._stream.wire.frame(text))

    @property
    def waiting_bytes(self) -> int:
        """See ``Outbox.waiting_bytes``."""
        return self._stream.waiting_bytes if self._stream is not None else sum(map(len, self._waiting))

    def send(self, frame: bytes) -> None:
        """See ``Outbox.send``."""
        if self._stream is None:
            self._waiting.append(frame)
        else:
            self.say(self.reader.take(parts(frame)))

    def release(self) -> None:
        """Send what has waited for the beginning."""
        waiting, self._waiting = self._waiting, []
        for frame in waiting:
            self.send(frame)

    def spread(
        self,
        batch: Sequence[Part | None],
        made: dict[tuple[Wire, str], bytes],
        alike: dict[tuple[Wire, str], list[Outbox]],
    ) -> None:
        """Take part in a fan-out: what others can use as it is goes into ``made``, and who wants it into ``alike``."""
        stream, reader = self._stream, self.reader
        if stream is None or len(reader.channels) > 1:
            self.say(reader.take(batch))
            return
        position = reader.positions.get(reader.channels[0])
        key = stream.wire, position.epoch if position is not None else BREAK.decode()
        text = reader.take(batch) if key not in made else b""
        if text:
            made[key] = stream.wire.frame(text)
        elif position is not None:
            self._move(batch, position)
        alike.setdefault(key, []).append(stream)

    def _move(self, batch: Sequence[Part | None], position: Position) -> None:
        for part in batch:
            if part is not None and part.kind == "pub" and part.offset:
                position = Position(part.offset, part.epoch or position.epoch)
        self.reader.positions[self.reader.channels[0]] = position

    def flush(self) -> None:
        """See ``Outbox.flush``."""
        if self._stream is not None:
            self._stream.flush()

    async def drained(self) -> None:
        """See ``Outbox.drained``."""
        if self._stream is not None:
            await self._stream.drained()

    def close(self, disconnect: errors.Disconnect) -> None:
        """See ``Outbox.close``."""
        self.ending = self.ending or disconnect
        if self._stream is not None:
            self._stream.close(disconnect)

    def pause_reading(self) -> None:
        """See ``Outbox.pause_reading``; nothing is read."""

    def resume_reading(self) -> None:
        """See ``Outbox.resume_reading``; nothing is read."""


# --- the session ---------------------------------------------------------------------------
class Follower(Asker, Session):
    """A session that follows the channels of its request, and nothing else.

    ``open`` first; then, with a stream attached to ``events``, ``begin``.
    """

    def __init__(self, node: Node, gate: Gate, events: EventOutbox, request: Request) -> None:
        super().__init__(node, gate, SKILLS, events, request)
        self.events = events
        self.given: dict[str, SubscribeOptions] = {}
        self._joined: list[tuple[Subscription, protocol.SubscribeResult, Position | None]] = []
        self._resets: list[str] = []

    def go_on(self) -> None:
        """See ``Asker.go_on``."""
        if self.closed:
            raise Disconnected(self.events.ending or CONNECTION_CLOSED, "it ended before its stream began")

    def subscribe_by_order(self, order: orders.SubscribeOrder) -> None:
        """The request names its channels, the server adds none."""

    async def open(self, token: str, since: Mapping[str, Position] | None) -> None:
        """Find out who it is, and subscribe from these positions on; ``None``: from now on.

        Raises ``Refused``, ``Disconnected``, ``Unavailable`` and
        ``protocol.Inexpressible``, and is then to be ended.
        """
        self.start_connecting()
        await self.identify(token)
        settings = self.node.settings.client
        limit = settings.user_connection_limit
        if limit and self.user and len(self.node.users.get(self.user, ())) >= limit:
            raise Disconnected(CONNECTION_LIMIT, f"look at client.user_connection_limit ({limit})")
        channels = {}
        for channel in self.events.reader.channels:
            namespace = self.known(channel)
            channels[channel] = namespace, await self.may_subscribe(channel, namespace)
        if len(channels) > settings.channel_limit:
            raise Refused(LIMIT_EXCEEDED, f"look at client.channel_limit ({settings.channel_limit})")
        self.node.admit(self)
        outcomes = await asyncio.gather(
            *(
                join(
                    self,
                    channel,
                    namespace,
                    _request(channel, since),
                    options,
                    asked_at=self.connected_at,
                    server_side=True,
                )
                for channel, (namespace, options) in channels.items()
            ),
            return_exceptions=True,
        )
        for outcome in outcomes:
            if isinstance(outcome, Unsubscribed):
                continue  # as it will be told when its stream begins
            if isinstance(outcome, BaseException):
                raise outcome
            subscription, result, _ = outcome
            if subscription.closed:
                continue
            self._joined.append(outcome)
            if not result.recoverable:
                continue
            self.events.reader.positions[subscription.channel] = Position(result.offset, result.epoch)
            if since is not None and not result.recovered:
                self._resets.append(subscription.channel)
        self.go_on()

    def begin(self) -> None:
        """The stream is there: say where it begins and what was missed, and go live, all in one loop turn."""
        if self.closed:
            return
        events, reader = self.events, self.events.reader
        events.say(b"id: %s\n\n" % reader.id.encode() if reader.id else KEEP_ALIVE)
        for channel in self._resets:
            top = reader.positions[channel]
            lost: dict[str, Any] = {"channel": channel, "epoch": top.epoch, "offset": top.offset}
            events.say(event("reset", msgspec.json.encode(lost), reader.id))
        for subscription, result, _ in self._joined:
            for publication in result.publications:
                self.push(subscription.channel, "pub", publication)
        for subscription, _, stood in self._joined:
            begin(self, subscription, stood)
        events.release()
        self._joined.clear()
        replace_others(self)
        self.accept(self.node.clock())


def _request(channel: str, since: Mapping[str, Position] | None) -> protocol.SubscribeRequest:
    request = protocol.SubscribeRequest(channel=channel, positioned=True, recoverable=True)
    if since is not None and channel in since:
        request.recover, request.offset, request.epoch = True, since[channel].offset, since[channel].epoch
    return request
