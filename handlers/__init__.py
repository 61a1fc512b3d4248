"""Everything that knows Tornado; here the whole URL table."""

import ipaddress
import time
from pathlib import Path

import tornado.routing
import tornado.web

from handlers.api import ApiHandler, LinesHandler
from handlers.asking import Clients
from handlers.base import NamedPageHandler, NotFoundHandler, PageHandler
from handlers.door import Door
from handlers.emulation import EmulationHandler
from handlers.eventstream import (
    HttpStreamHandler,
    InitHandler,
    OneWayHttpStreamHandler,
    OneWaySocketHandler,
    OneWaySseHandler,
    SseHandler,
    Streams,
)
from handlers.fetching import make_proxies
from handlers.guests import Reception, SessionHandler
from handlers.health import LiveHandler, ReadyHandler
from handlers.rest import rest_routes
from handlers.socket import SocketHandler, Sockets
from handlers.status import DOCUMENTS, ROOT, DocumentHandler, StatusHandler
from server.commands import SKILLS
from server.node import Node
from server.session import Gate, Session

STATIC = Path(__file__).parent.parent / "static"


def make_sockets(node: Node, gate: Gate) -> Clients:
    """The WebSocket connections of ``node``; call its ``check_stalled`` once a second.

    They ask the back ends that the settings name; raises ``hooks.AppError`` if the
    user's module is for the same events.
    """
    settings = node.settings
    proxies = make_proxies(settings)
    proxies.attach(node)
    return Clients(
        gate,
        lambda outbox, request: Session(node, gate, SKILLS, outbox, request),
        allowed_origins=settings.client.allowed_origins,
        message_size_limit=settings.websocket.message_size_limit,
        queue_max_size=settings.client.queue_max_size,
        outbox_stall_timeout_s=settings.client.outbox_stall_timeout,
        user_id_http_header=settings.client.user_id_http_header,
        proxied_headers=proxies.headers,
        refusal=Door(node, time.monotonic).refusal,
        trusted_proxies=[ipaddress.ip_network(network) for network in settings.http_server.trusted_proxies],
    )


def make_app(node: Node, sockets: Clients) -> tornado.web.Application:
    """The web application of ``node``."""
    settings = node.settings
    routes: list[tornado.routing.Rule] = []
    if not settings.websocket.disabled:
        routes.append(tornado.web.url(settings.websocket.handler_prefix, SocketHandler, {"sockets": sockets}))
    routes += _stream_routes(node, sockets)
    if not settings.http_api.disabled:
        prefix = settings.http_api.handler_prefix.rstrip("/")
        options = {"node": node, "settings": settings.http_api}
        routes.append(tornado.web.url(rf"{prefix}/(\w+)", ApiHandler, options))
        routes.append(tornado.web.url(rf"{prefix}/?", LinesHandler, options))
    if settings.guests.enabled:
        reception = Reception(node, sockets.trusted_proxies)
        routes.append(tornado.web.url(r"/v1/session", SessionHandler, {"reception": reception}))
    pages = {"path": str(STATIC), "default_filename": "index.html"}
    routes += [
        tornado.web.url(r"/health/live", LiveHandler),
        tornado.web.url(r"/health/ready", ReadyHandler, {"node": node}),
        tornado.web.url(r"/v1/status", StatusHandler, {"node": node}),
        *([] if settings.rest.disabled else rest_routes(node, sockets)),
        tornado.web.url(DOCUMENTS, DocumentHandler, {"path": str(ROOT)}),
        tornado.web.url(r"/static/(.+)", PageHandler, pages),
        tornado.web.url(r"/()", PageHandler, pages),
        tornado.web.url(r"/(chat|arena)", NamedPageHandler, pages),
    ]
    return tornado.web.Application(routes, default_handler_class=NotFoundHandler, log_function=lambda handler: None)


def _stream_routes(node: Node, sockets: Sockets) -> list[tornado.routing.Rule]:
    """The paths of the transports without WebSocket, and of the one-way ones (PROTOCOL 2.5, 2.6)."""
    settings = node.settings
    streams = Streams(node, sockets)
    both_ways = ((settings.http_stream, HttpStreamHandler), (settings.sse, SseHandler))
    one_way = ((settings.uni_sse, OneWaySseHandler), (settings.uni_http_stream, OneWayHttpStreamHandler))
    routes: list[tornado.routing.Rule] = []
    for section, handler in (*both_ways, *one_way):
        if section.enabled:
            options = {"streams": streams, "most_bytes": section.max_request_body_size}
            routes.append(tornado.web.url(section.handler_prefix, handler, options))
    if any(section.enabled for section, _ in both_ways):
        emulation = settings.emulation
        options = {"sockets": sockets, "most_bytes": emulation.max_request_body_size, "node": node}
        routes.append(tornado.web.url(emulation.handler_prefix, EmulationHandler, options))
    if settings.uni_websocket.enabled:
        options = {"streams": streams, "message_size_limit": settings.uni_websocket.message_size_limit}
        routes.append(tornado.web.url(settings.uni_websocket.handler_prefix, OneWaySocketHandler, options))
    if settings.init.enabled:
        routes.append(tornado.web.url(settings.init.handler_prefix, InitHandler, {"sockets": sockets}))
    return routes
