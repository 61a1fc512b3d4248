"""The protocol where a WebSocket cannot be had, and where the client only listens; PROTOCOL 2.5, 2.6.

Each transport is a way to ask and a kind of stream.  Both ways, the client sends its
first commands with the request and the others to ``/emulation``; one way, the request
is all it ever says.  From the stream on they are sessions like any other, with an
outbox like any other: what differs is the wire, and the codec that the wire has.
"""

import uuid
from typing import Any, cast

from tornado.httputil import HTTPServerRequest

from handlers.bodies import BodyHandler
from handlers.emulation import Emulated
from handlers.handshake import Handshakes, TurnedAway, shake_hands
from handlers.socket import Sockets, SocketWire
from handlers.stream_outbox import EVENTS, LENGTHS, LINES, StreamOutbox, Wires, open_stream
from server.errors import Disconnected
from server.node import Node
from server.outbox import Outbox, Request
from server.protocol import JSON, ONE_WAY, PROTOBUF, Command
from server.session import Session


class Streams:
    """The streams of this process; must be made on the running loop."""

    def __init__(self, node: Node, sockets: Sockets) -> None:
        client = node.settings.client
        self.node = node
        self.sockets = sockets
        # As long as a WebSocket's client has that does not answer a ping.
        self.unheard_s = client.ping_interval + max(client.pong_timeout, client.outbox_stall_timeout)
        limits: dict[str, Any] = {
            "queue_max_size": client.queue_max_size,
            "stall_timeout_s": client.outbox_stall_timeout,
        }
        self.json = Wires.of(LINES, JSON, **limits)
        self.protobuf = Wires.of(LENGTHS, PROTOBUF, **limits)
        self.events = Wires.of(EVENTS, JSON, **limits)
        self.one_way_json = Wires.of(LINES, ONE_WAY, **limits)
        self.one_way_events = Wires.of(EVENTS, ONE_WAY, **limits)
        self.one_way_socket = SocketWire(ONE_WAY, **limits)
        self.one_way_socket.note_too_big = lambda: sockets.note_limit("uni_websocket.message_size_limit")
        for wires in (self.json, self.protobuf, self.events, self.one_way_json, self.one_way_events):
            sockets.watch(*wires)
        sockets.watch(self.one_way_socket)

    def session(self, outbox: Outbox, request: Request) -> Session | None:
        """A session behind an outbox, which is closed if that is beyond us."""
        return cast("Session | None", self.sockets.session(outbox, request))


def _asked(request: HTTPServerRequest) -> bytes | None:
    """The value of ``cf_connect`` in a URL, ``None`` if there is none or it is empty."""
    found = request.query_arguments.get("cf_connect")
    return found[-1] or None if found else None


# --- streamed responses -------------------------------------------------------
class StreamHandler(BodyHandler):
    """What the transports below share: a request becomes a stream, and a session behind it."""

    transport = ""

    def initialize(self, streams: Streams, most_bytes: int) -> None:
        """``streams`` are this process's; for the rest see ``BodyHandler.bound``."""
        self.bound(streams.sockets, most_bytes)
        self.streams = streams

    async def _open(self, wires: Wires) -> tuple[StreamOutbox, Session] | None:
        """Begin to stream to a new session; ``None`` if the door is shut (503), or the client gone."""
        sockets, address = self.sockets, self.address
        refusal = sockets.refusal(address)
        if refusal is not None:
            origin = self.request.headers.get("Origin")
            sockets.refusals.say("connection.refused", address, 503, why=refusal, origin=origin)
            self.refuse(503, "too many connections, try again later")
            return None
        request = Request(
            transport=self.transport,
            format=wires.chunked.format,
            remote_addr=address,
            headers=sockets.wanted(self.request.headers),
            secret=str(uuid.uuid4()),
        )
        outbox = await open_stream(self, wires, unheard_s=self.streams.unheard_s)
        if outbox is None:
            return None
        session = self.streams.session(outbox, request)
        if session is None:
            return None
        outbox.start(session)
        return outbox, session

    async def converse(self, wires: Wires, batch: bytes) -> None:
        """Stream to a session that speaks by ``/emulation`` after these first commands."""
        opened = await self._open(wires)
        if opened is None:
            return
        outbox, session = opened
        try:
            commands = outbox.wire.codec.decode(batch)
        except Disconnected as end:
            session.disconnect(end.disconnect, end.why)
            return
        node = self.streams.node
        emulated = Emulated(session, outbox, 1 + max(one.id for one in commands), node.settings.client.queue_max_size)
        node.streams[session.secret] = emulated.take
        session.take(commands)

    async def introduce(self, wires: Wires, commands: list[Command]) -> None:
        """Stream to a session that says nothing more."""
        opened = await self._open(wires)
        if opened is not None:
            opened[1].take(commands)


class HttpStreamHandler(StreamHandler):
    """``/connection/http_stream``, in JSON or Protobuf; PROTOCOL 2.5."""

    transport = "http_stream"
    methods = ("POST",)

    async def post(self) -> None:
        """A stream; or 413, 503."""
        body = self.read_body()
        if body is not None:
            await self.converse(self.streams.protobuf if self.format == "protobuf" else self.streams.json, body)


class SseHandler(StreamHandler):
    """``/connection/sse``; PROTOCOL 2.5."""

    transport = "sse"
    methods = ("GET", "POST")

    async def get(self) -> None:
        """A stream; or 400 without ``cf_connect``, 503."""
        if self.read_body() is None:
            return
        batch = _asked(self.request)
        if batch is None:
            self.refuse(400, "expected the first commands as cf_connect")
        else:
            await self.converse(self.streams.events, batch)

    async def post(self) -> None:
        """A stream; or 413, 503."""
        body = self.read_body()
        if body is not None:
            await self.converse(self.streams.events, body)


class OneWayHandler(StreamHandler):
    """What the one-way transports share; PROTOCOL 2.6."""

    async def listen(self, wires: Wires, request: bytes) -> None:
        """Stream to whom ``request`` introduces; or 400 if that is no request to connect, 503."""
        try:
            commands = ONE_WAY.decode(request)
        except Disconnected as end:
            self.refuse(400, end.why)
        else:
            await self.introduce(wires, commands)


class OneWaySseHandler(OneWayHandler):
    """``/connection/uni_sse``; PROTOCOL 2.6."""

    transport = "uni_sse"
    methods = ("GET", "POST")

    async def get(self) -> None:
        """A stream; the request is ``cf_connect``, by default an empty one."""
        if self.read_body() is not None:
            query = _asked(self.request)
            await self.listen(self.streams.one_way_events, b"{}" if query is None else query)

    async def post(self) -> None:
        """A stream; the request is the body."""
        body = self.read_body()
        if body is not None:
            await self.listen(self.streams.one_way_events, body)


class OneWayHttpStreamHandler(OneWayHandler):
    """``/connection/uni_http_stream``; PROTOCOL 2.6."""

    transport = "uni_http_stream"
    methods = ("POST",)

    async def post(self) -> None:
        """A stream; the request is the body."""
        body = self.read_body()
        if body is not None:
            await self.listen(self.streams.one_way_json, body)


# --- a WebSocket one way --------------------------------------------------------
class OnlyFirst:
    """A session that hears one message and is deaf to the rest."""

    __slots__ = ("_deaf", "_session")

    def __init__(self, session: Session, *, deaf: bool) -> None:
        self._session = session
        self._deaf = deaf

    def receive(self, message: bytes) -> None:
        """See ``handlers.socket.Session``."""
        if not self._deaf:
            self._deaf = True
            self._session.receive(message)

    def gone(self) -> None:
        """See ``handlers.socket.Session``."""
        self._session.gone()

    def slow(self) -> None:
        """See ``handlers.socket.Session``."""
        self._session.slow()

    def native_ping(self) -> None:
        """See ``handlers.socket.Session``."""
        self._session.native_ping()

    def native_pong(self) -> None:
        """See ``handlers.socket.Session``."""
        self._session.native_pong()


class OneWayHandshakes(Handshakes):
    """``/connection/uni_websocket``: the request is ``cf_connect``, or else the first message; PROTOCOL 2.6."""

    def __init__(self, streams: Streams, message_size_limit: int) -> None:
        super().__init__(streams.sockets)
        self._streams = streams
        self._message_size_limit = message_size_limit

    def welcome(self, request: HTTPServerRequest) -> None:
        """See ``Handshakes.welcome``."""
        asked = _asked(request)
        commands = None
        if asked is not None:
            try:
                commands = ONE_WAY.decode(asked)
            except Disconnected as end:
                raise TurnedAway(400, end.why) from None
        self.check(request)
        asking = Request(
            transport="uni_websocket",
            format="json",
            remote_addr=self.address(request),
            headers=self.sockets.wanted(request.headers),
            native_pings=True,
            secret=str(uuid.uuid4()),
        )
        taken = shake_hands(request, {})
        if taken is None:
            return
        outbox = self.sockets.outbox(*taken, self._streams.one_way_socket, self._message_size_limit)
        session = self._streams.session(outbox, asking)
        if session is None:
            return
        outbox.start(OnlyFirst(session, deaf=commands is not None))
        if commands is not None:
            session.take(commands)


class InitHandler(BodyHandler):
    """``/connection/init``: a cheap request to make first, for a cookie of a load balancer, say."""

    methods = ("GET",)

    def initialize(self, sockets: Sockets) -> None:
        """``sockets`` know who may come."""
        self.bound(sockets, 0)

    def get(self) -> None:
        """200 and ``{}``."""
        if self.read_body() is not None:
            self.answer({})
