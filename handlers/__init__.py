"""Everything that knows Tornado; here the whole URL table."""

import ipaddress
import time
from pathlib import Path

import tornado.routing
import tornado.web

from handlers.api import Api, ApiHandler
from handlers.base import NamedPageHandler, NotFoundHandler, PageHandler
from handlers.door import Door
from handlers.guests import Reception, SessionHandler
from handlers.health import LiveHandler
from handlers.socket import SocketHandler, Sockets
from handlers.status import DOCUMENTS, ROOT, DocumentHandler, StatusHandler
from server.commands import SKILLS
from server.node import Node
from server.session import Gate, Session

STATIC = Path(__file__).parent.parent / "static"


def make_sockets(node: Node, gate: Gate) -> Sockets:
    """The WebSocket connections of ``node``; call its ``check_stalled`` once a second."""
    settings = node.settings
    return Sockets(
        lambda outbox, request: Session(node, gate, SKILLS, outbox, request),
        allowed_origins=settings.client.allowed_origins,
        message_size_limit=settings.websocket.message_size_limit,
        queue_max_size=settings.client.queue_max_size,
        outbox_stall_timeout_s=settings.client.outbox_stall_timeout,
        user_id_http_header=settings.client.user_id_http_header,
        refusal=Door(node, time.monotonic).refusal,
        trusted_proxies=[ipaddress.ip_network(network) for network in settings.http_server.trusted_proxies],
    )


def make_app(node: Node, sockets: Sockets) -> tornado.web.Application:
    """The web application of ``node``."""
    settings = node.settings
    routes: list[tornado.routing.Rule] = []
    if not settings.websocket.disabled:
        routes.append(tornado.web.url(settings.websocket.handler_prefix, SocketHandler, {"sockets": sockets}))
    if not settings.http_api.disabled:
        prefix = settings.http_api.handler_prefix.rstrip("/")
        options = {"api": Api(node), "settings": settings.http_api}
        routes.append(tornado.web.url(rf"{prefix}/(\w+)", ApiHandler, options))
    if settings.guests.enabled:
        reception = Reception(node, sockets.trusted_proxies)
        routes.append(tornado.web.url(r"/v1/session", SessionHandler, {"reception": reception}))
    pages = {"path": str(STATIC), "default_filename": "index.html"}
    routes += [
        tornado.web.url(r"/health/live", LiveHandler),
        tornado.web.url(r"/v1/status", StatusHandler, {"node": node}),
        tornado.web.url(DOCUMENTS, DocumentHandler, {"path": str(ROOT)}),
        tornado.web.url(r"/static/(.+)", PageHandler, pages),
        tornado.web.url(r"/()", PageHandler, pages),
        tornado.web.url(r"/(chat|arena)", NamedPageHandler, pages),
    ]
    return tornado.web.Application(routes, default_handler_class=NotFoundHandler, log_function=lambda handler: None)
