"""``/v1/events`` and ``/v1/channels/{channel}/events``: channels as an ``EventSource``; PROTOCOL 17.3.

The request is answered with a "no" as any other, or becomes a stream; what that says
is ``server.readers``'s, how it is written ``stream_outbox``'s.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from handlers.asking import EVENT_TEXT, Rest, RestHandler
from handlers.cors import from_elsewhere
from handlers.openapi import Parameter
from handlers.problems import Problem
from handlers.publications import NAME, SINCE
from handlers.stream_outbox import open_stream
from server import cursors
from server.errors import BAD_REQUEST, CONNECTION_CLOSED, PERMISSION_DENIED, SHUTDOWN, TOO_MANY_REQUESTS, Disconnected
from server.readers import EventOutbox, Follower, Reader, come_again
from server.stream import Position

CHANNELS = Parameter(
    "channel",
    "query",
    f"A channel's name; up to {cursors.STREAM_CHANNELS} of them.",
    NAME,
    several=cursors.STREAM_CHANNELS,
    required=True,
    example="chat:lobby",
)
SINCE_EACH = Parameter(
    "since",
    "query",
    "Where to begin: the cursor of each channel, in their order, or the id of a former event. Without it, from now on.",
    {"type": "string"},
    several=cursors.STREAM_CHANNELS,
)
SINCE_ONE = Parameter(
    "since", "query", "Where to begin: a cursor, or the id of a former event. Without it, from now on.", SINCE.schema
)
LAST_EVENT = Parameter(
    "Last-Event-ID",
    "header",
    "The id of the last event that was received; a browser sends it by itself. It goes before since.",
    {"type": "string", "maxLength": cursors.ID_BYTES, "pattern": "^[!-~]*$"},
)
TOKEN = Parameter(
    "token", "query", "The token, for browsers, whose EventSource cannot set headers.", {"type": "string"}
)


class EventsHandler(RestHandler):
    """``/v1/events``; PROTOCOL 17.3."""

    methods = ("GET", "HEAD")
    since: ClassVar[Parameter] = SINCE_EACH

    def initialize(self, rest: Rest) -> None:
        """See ``RestHandler.initialize``."""
        super().initialize(rest)
        self._follower: Follower | None = None

    def on_connection_close(self) -> None:
        """The client has gone before its stream began."""
        super().on_connection_close()
        if self._follower is not None:
            self._follower.gone()

    async def get(self) -> None:
        """200 and events; 400, 401, 403, 404, 406, 429, 503, which to a browser is 200 and ``come_again``."""
        await self.attend(self._listen_to_all())

    async def head(self) -> None:
        """As GET, without the events."""
        await self.get()

    def set_problem(self, problem: Problem) -> None:
        """See ``RestHandler.set_problem``; a browser would never return from a 503 (PROTOCOL 17.3.7)."""
        if problem.status == 503 and "text/event-stream" in self.request.headers.get("Accept", ""):
            self.set_header("Content-Type", EVENT_TEXT.content_type)
            self.write(come_again(problem.code))
        else:
            super().set_problem(problem)

    async def _listen_to_all(self) -> None:
        await self._listen(self.given(CHANNELS))

    async def _listen(self, channels: Sequence[str]) -> None:
        since = self._positions(channels)
        token = self.one(TOKEN) or self.token()
        if not token and from_elsewhere(self.request.headers):
            # Whoever a cookie may be would be present, counted and asked about, and would not know it: PROTOCOL 17.3.9.
            detail = "An image or a link of another site begins no stream."
            raise Problem(403, PERMISSION_DENIED.code, detail=detail)
        if self.rest.node.leaving:
            raise Disconnected(SHUTDOWN, "it came while clients are sent away")
        refusal = self.rest.clients.refusal(self.address)
        if refusal is not None:
            code, origin = TOO_MANY_REQUESTS.code, self.request.headers.get("Origin")
            self.rest.refusals.say("connection.refused", self.address, code, why=refusal, origin=origin)
            # The door has counted the setting and the line before has named it.
            raise Problem(503, code, TOO_MANY_REQUESTS.message, "Too many connections.", why="turned away")
        events = EventOutbox(Reader(channels))
        follower = self._follower = Follower(self.rest.node, self.rest.clients.gate, events, self.asking("events"))
        try:
            await follower.open(token, since)
        except Disconnected as end:
            follower.disconnect(end.disconnect, end.why)
            raise
        except BaseException:
            follower.gone()
            raise
        if self.request.method == "HEAD":
            follower.gone()
            self.set_header("Content-Type", EVENT_TEXT.content_type)
            self.finish()
            return
        self.clear_header("Cache-Control")
        stream = await open_stream(self, self.rest.wires, unheard_s=self.rest.unheard_s)
        self._follower = None
        if stream is None:
            follower.gone()
            return
        if follower.closed:
            stream.close(events.ending or CONNECTION_CLOSED)
            return
        events.attach(stream)
        stream.start(follower)
        follower.begin()

    def _positions(self, channels: Sequence[str]) -> Mapping[str, Position] | None:
        """Where to begin in each channel, ``None`` for "now"; raises ``Problem``."""
        if not all(channels) or not channels or len(set(channels)) != len(channels):
            why = "channel: expected at least one name, and each once"
            raise Problem(400, BAD_REQUEST.code, BAD_REQUEST.message, why)
        name, texts = "Last-Event-ID", [text for text in self.given(LAST_EVENT) if text]
        if not texts:
            name, texts = self.since.name, self.given(self.since)
        if not texts:
            return None
        try:
            if len(texts) == 1:
                return cursors.event_positions(texts[0], channels)
            if len(texts) != len(channels):
                raise ValueError(f"expected one for each of {len(channels)} channels, got {len(texts)}")
            return dict(zip(channels, map(cursors.read, texts), strict=True))
        except ValueError as error:
            raise Problem(400, BAD_REQUEST.code, BAD_REQUEST.message, f"{name}: {error}") from None


class ChannelEventsHandler(EventsHandler):
    """``/v1/channels/{channel}/events``; PROTOCOL 17.3."""

    since = SINCE_ONE

    async def get(self, channel: str) -> None:  # type: ignore[override]
        """See ``EventsHandler.get``."""
        await self.attend(self._listen([channel]))

    async def head(self, channel: str) -> None:  # type: ignore[override]
        """See ``EventsHandler.head``."""
        await self.get(channel)
