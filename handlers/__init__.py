"""Everything that knows Tornado; here the whole URL table."""

import ipaddress
import time
from collections.abc import Callable
from pathlib import Path

import tornado.routing
import tornado.web

from handlers.admin import Console, admin_routes
from handlers.api import ApiHandler, LinesHandler
from handlers.asking import Clients
from handlers.base import NamedPageHandler, NotFoundHandler, PageHandler
from handlers.deflate import Deflate
from handlers.door import Door
from handlers.emulation import EmulationHandler
from handlers.eventstream import (
    HttpStreamHandler,
    InitHandler,
    OneWayHandshakes,
    OneWayHttpStreamHandler,
    OneWaySseHandler,
    SseHandler,
    Streams,
)
from handlers.fetching import make_proxies
from handlers.guests import Reception, SessionHandler
from handlers.handshake import Handshakes, SocketHandshakes
from handlers.health import LiveHandler, ReadyHandler
from handlers.metrics import Process
from handlers.rest import rest_routes
from handlers.socket import Sockets
from handlers.status import DOCUMENTS, ROOT, DocumentHandler, StatusHandler
from server.commands import SKILLS
from server.node import Node
from server.session import Gate, Session
from server.settings import Settings

STATIC = Path(__file__).parent.parent / "static"
PAGES = {"path": str(STATIC), "default_filename": "index.html"}


def make_sockets(node: Node, gate: Gate) -> Clients:
    """The WebSocket connections of ``node``; call its ``check_stalled`` once a second.

    They ask the back ends that the settings name; raises ``hooks.AppError`` if the
    user's module is for the same events.
    """
    settings, websocket = node.settings, node.settings.websocket
    proxies = make_proxies(settings)
    proxies.attach(node)
    clients = Clients(
        gate,
        lambda outbox, request: Session(node, gate, SKILLS, outbox, request),
        allowed_origins=settings.client.allowed_origins,
        message_size_limit=settings.websocket.message_size_limit,
        queue_max_size=settings.client.queue_max_size,
        outbox_stall_timeout_s=settings.client.outbox_stall_timeout,
        user_id_http_header=settings.client.user_id_http_header,
        proxied_headers=proxies.headers,
        refusal=Door(node, time.monotonic).refusal,
        note_limit=node.counts.note_why,
        deflate=Deflate(websocket.compression_level, websocket.compression_min_size) if websocket.compression else None,
        trusted_proxies=[ipaddress.ip_network(network) for network in settings.http_server.trusted_proxies],
    )

    def renewal(settings: Settings) -> Callable[[], None]:
        return lambda: setattr(clients, "allowed_origins", settings.client.allowed_origins)

    node.renewals.append(renewal)
    return clients


def make_app(node: Node, sockets: Clients) -> tornado.web.Application:
    """The web application of ``node``."""
    settings = node.settings
    routes: list[tornado.routing.Rule] = []
    if not settings.websocket.disabled:
        routes.append(_path(settings.websocket.handler_prefix, SocketHandshakes(sockets)))
    routes += _stream_routes(node, sockets)
    if not settings.http_server.internal_port:
        routes += _internal_routes(node, sockets)
    if settings.guests.enabled:
        reception = Reception(node, sockets.trusted_proxies)
        routes.append(tornado.web.url(r"/v1/session", SessionHandler, {"reception": reception}))
    routes += [
        tornado.web.url(r"/v1/status", StatusHandler, {"node": node}),
        *([] if settings.rest.disabled else rest_routes(node, sockets)),
        tornado.web.url(DOCUMENTS, DocumentHandler, {"path": str(ROOT)}),
        tornado.web.url(r"/static/(.+)", PageHandler, PAGES),
        tornado.web.url(r"/()", PageHandler, PAGES),
        tornado.web.url(r"/(chat|arena)", NamedPageHandler, PAGES),
    ]
    return _application(routes)


def make_internal_app(node: Node, sockets: Clients) -> tornado.web.Application:
    """What is at ``http_server.internal_port``, and then nowhere else; with the files that the console's page needs."""
    files = tornado.web.url(r"/static/(.+)", PageHandler, PAGES)
    return _application([*_internal_routes(node, sockets), files])


def _application(routes: list[tornado.routing.Rule]) -> tornado.web.Application:
    return tornado.web.Application(
        routes,
        default_handler_class=NotFoundHandler,
        log_function=lambda handler: None,
    )


def _internal_routes(node: Node, sockets: Clients) -> list[tornado.routing.Rule]:
    """What is for operators and back ends, and for no client: health, metrics, console, API (PROTOCOL 17.0.6)."""
    settings = node.settings
    process = Process(node, sockets)
    routes: list[tornado.routing.Rule] = [
        tornado.web.url(r"/health/live", LiveHandler),
        tornado.web.url(r"/health/ready", ReadyHandler, {"node": node}),
    ]
    if settings.prometheus.enabled:
        from handlers.prometheus import metrics_route

        routes.append(metrics_route(process, settings.prometheus.handler_prefix))
    if settings.admin.enabled:
        routes += admin_routes(Console(process, sockets.trusted_proxies), str(STATIC))
    if not settings.http_api.disabled:
        prefix = settings.http_api.handler_prefix.rstrip("/")
        options = {"node": node}
        routes.append(tornado.web.url(rf"{prefix}/(\w+)", ApiHandler, options))
        routes.append(tornado.web.url(rf"{prefix}/?", LinesHandler, options))
    return routes


def _path(prefix: str, handshakes: Handshakes) -> tornado.routing.Rule:
    return tornado.routing.Rule(tornado.routing.PathMatches(prefix), handshakes)


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
        one_way_sockets = OneWayHandshakes(streams, settings.uni_websocket.message_size_limit)
        routes.append(_path(settings.uni_websocket.handler_prefix, one_way_sockets))
    if settings.init.enabled:
        routes.append(tornado.web.url(settings.init.handler_prefix, InitHandler, {"sockets": sockets}))
    return routes
