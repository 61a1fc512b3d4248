"""``/v1``: channels for whoever cannot or will not hold a WebSocket; PROTOCOL 17.

Reads, long-polls, publishes and event streams share one cursor with every other
transport.  ``ROUTES`` is the table: the URLs and the OpenAPI document come from it, and
its parameters are the ones that the handlers read.  Here and in ``asking``,
``publications`` and ``events`` is only HTTP; who may do what is in ``server.callers``,
how a poll waits in ``server.polling``, what an event stream says in
``server.readers``.
"""

from collections.abc import Mapping

import msgspec
import tornado.routing
import tornado.web

from handlers.asking import Clients, NowhereHandler, Rest, RestHandler
from handlers.events import CHANNELS, LAST_EVENT, SINCE_EACH, SINCE_ONE, TOKEN, ChannelEventsHandler, EventsHandler
from handlers.openapi import Answer, Operation, Route, Schema, document, problem
from handlers.publications import CHANNEL, KEY, LIMIT, PREFER, REVERSE, SINCE, UNCHANGED, PublicationsHandler
from server import protocol
from server.commands import presence_of
from server.node import Node


# --- presence ---------------------------------------------------------------------------
class PresenceHandler(RestHandler):
    """``/v1/channels/{channel}/presence``; PROTOCOL 17.1."""

    methods = ("GET", "HEAD")

    async def get(self, channel: str) -> None:
        """200 with who is here; 400, 401, 403, 404, 503."""
        await self.attend(self._members(channel))

    async def head(self, channel: str) -> None:
        """As GET."""
        await self.get(channel)

    async def _members(self, channel: str) -> None:
        caller = await self.identified()
        namespace = caller.known(channel)
        await caller.require("presence", channel, namespace)
        self.answer(await presence_of(self.rest.node, channel))


# --- the table ----------------------------------------------------------------------------
class DocumentHandler(RestHandler):
    """``/v1/openapi.json``; PROTOCOL 17.4."""

    methods = ("GET", "HEAD")

    def get(self) -> None:
        """200 with the document that the table makes."""
        self.set_header("Cache-Control", "no-cache")
        self.answer(DOCUMENT)

    def head(self) -> None:
        """As GET."""
        self.get()


JSON_VALUE: Schema = {"description": "Any JSON value."}
EPOCH: Schema = {"type": "string", "description": "The life of the numbering; empty while nobody has published."}
OFFSET: Schema = {"type": "integer", "minimum": 0, "maximum": protocol.MAX_OFFSET}
INFO: Schema = {"$ref": "#/components/schemas/ClientInfo"}
SCHEMAS: Mapping[str, Schema] = {
    "Publish": {"type": "object", "required": ["data"], "properties": {"data": JSON_VALUE}},
    "Publication": {
        "type": "object",
        "required": ["data"],
        "properties": {
            "data": JSON_VALUE,
            "offset": {"type": "integer", "minimum": 1, "description": "Its number in the channel: 1, 2, 3 …"},
            "time": {"type": "integer", "description": "Unix time in ms at which it was stored."},
            "info": INFO,
            "tags": {"type": "object", "additionalProperties": {"type": "string"}},
            "epoch": EPOCH,
        },
    },
    "Page": {
        "type": "object",
        "required": ["publications", "epoch", "offset"],
        "properties": {
            "publications": {"type": "array", "items": {"$ref": "#/components/schemas/Publication"}},
            "epoch": EPOCH,
            "offset": OFFSET,
        },
    },
    "Position": {"type": "object", "required": ["epoch", "offset"], "properties": {"epoch": EPOCH, "offset": OFFSET}},
    "Nothing": {"type": "object"},
    "ClientInfo": {
        "type": "object",
        "required": ["user", "client"],
        "properties": {
            "user": {"type": "string"},
            "client": {"type": "string"},
            "conn_info": JSON_VALUE,
            "chan_info": JSON_VALUE,
        },
    },
    "Presence": {
        "type": "object",
        "required": ["presence"],
        "properties": {"presence": {"type": "object", "additionalProperties": INFO}},
    },
    "Problem": {
        "type": "object",
        "required": ["type", "title", "status", "detail", "code"],
        "properties": {
            "type": {"type": "string", "format": "uri-reference"},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "detail": {"type": "string"},
            "code": {"type": "integer", "description": "The protocol's code for it."},
            "epoch": EPOCH,
            "offset": OFFSET,
        },
    },
}
HEADERS = {
    "ETag": "The cursor of the page's end; in reverse, of the newest publication.",
    "Link": "The next page (rel=next), if there is one.",
    "Location": "Where this publication can be read.",
    "Preference-Applied": "The wait that was granted.",
    "Retry-After": "Seconds.",
    "WWW-Authenticate": "What kind of token is wanted.",
    "Allow": "The methods that there are.",
}
PROBLEMS: Mapping[int, Answer] = {
    400: problem("A parameter, a header or the channel's name is none."),
    401: problem("No token, or one that is not good any more.", "WWW-Authenticate"),
    403: problem("Not permitted; or a page of an origin that may not ask."),
    404: problem("No such channel, or it has no such thing."),
    405: problem("No such method.", "Allow"),
    429: problem("Too much at a time.", "Retry-After"),
    500: problem("A fault of the server's."),
    503: problem("The server cannot now; to a publish: the outcome is unknown.", "Retry-After"),
}
PAGE_FOUND = Answer("A page.", "application/json", "Page", ("ETag", "Link", "Preference-Applied"))
NOT_MODIFIED = Answer("Nothing has changed.", headers=("ETag", "Link", "Preference-Applied"))
READING = (CHANNEL, SINCE, LIMIT, REVERSE, UNCHANGED)
POSITION_GONE = problem("The cursor is gone; the document has the new one.", "ETag")
NO_JSON = problem("A payload that is no JSON.")
STREAM = Answer(
    "Events: each one's data is a publication, its id the cursor of all channels; `reset` says that a cursor is gone.",
    "text/event-stream",
)

ROUTES = (
    Route(
        "/v1/channels/{channel}/publications",
        PublicationsHandler,
        (
            Operation(
                "GET",
                "readPublications",
                "Read a channel's publications from a cursor on, or the newest; wait for the next.",
                {200: PAGE_FOUND, 304: NOT_MODIFIED, 406: NO_JSON, 410: POSITION_GONE},
                (*READING, PREFER),
            ),
            Operation(
                "HEAD",
                "lookAtPublications",
                "As GET, without the publications and without waiting.",
                {200: Answer("A page.", headers=("ETag", "Link")), 304: NOT_MODIFIED, 406: NO_JSON, 410: POSITION_GONE},
                READING,
            ),
            Operation(
                "POST",
                "publish",
                "Publish into a channel.",
                {
                    201: Answer("It is stored.", "application/json", "Position", ("Location",)),
                    202: Answer("It is on its way; the channel keeps nothing.", "application/json", "Nothing"),
                    408: problem("The body took too long."),
                    413: problem("The body is too large."),
                    415: problem("The body is no JSON by its headers."),
                },
                (CHANNEL, KEY),
                body="Publish",
            ),
        ),
    ),
    Route(
        "/v1/channels/{channel}/presence",
        PresenceHandler,
        (
            Operation(
                "GET",
                "readPresence",
                "See who is in a channel.",
                {200: Answer("Who is here, by client id.", "application/json", "Presence")},
                (CHANNEL,),
            ),
        ),
    ),
    Route(
        "/v1/channels/{channel}/events",
        ChannelEventsHandler,
        (
            Operation(
                "GET",
                "listenToChannel",
                "Listen to a channel as an EventSource.",
                {200: STREAM, 406: NO_JSON},
                (CHANNEL, SINCE_ONE, LAST_EVENT, TOKEN),
                token_in_query=True,
            ),
        ),
    ),
    Route(
        "/v1/events",
        EventsHandler,
        (
            Operation(
                "GET",
                "listen",
                "Listen to several channels as one EventSource.",
                {200: STREAM, 406: NO_JSON},
                (CHANNELS, SINCE_EACH, LAST_EVENT, TOKEN),
                token_in_query=True,
            ),
        ),
    ),
    Route(
        "/v1/openapi.json",
        DocumentHandler,
        (
            Operation(
                "GET",
                "readDocument",
                "This document.",
                {200: Answer("The document.", "application/json", "Nothing")},
                public=True,
            ),
        ),
    ),
)
DOCUMENT = msgspec.json.encode(document(ROUTES, SCHEMAS, HEADERS, PROBLEMS))


def rest_routes(node: Node, clients: Clients) -> list[tornado.routing.Rule]:
    """The URLs of the table, and a problem document for everything else below ``/v1``: they come last there."""
    options = {"rest": Rest(node, clients)}
    found: list[tornado.routing.Rule] = [tornado.web.url(route.pattern, route.handler, options) for route in ROUTES]
    return [*found, tornado.web.url(r"/v1/.*", NowhereHandler, options)]
