"""Tornado's HTTP server, with one clock for all who keep it waiting for a request, and an end that cuts no answer.

Tornado can end a connection on which no request comes (``idle_connection_timeout``), with a timer, two futures and
their callbacks for each request: 6 % of what a WebSocket costs to come (``make bench WORKS=W3``, November 2026).
Here is one timer for all, which looks at those who have been waited for longest.

Tornado ends by closing: what is being carried out is then answered to nobody.  Here
the end has three steps (PROTOCOL 17.0.3), and between them whoever ends the process
does what is his: ``let_go`` makes each answer the last one of its connection, ``end``
lets nobody in, so that ``under_way`` goes to nothing, and ``refuse`` has nothing
carried out any more, so that all else can be closed in whatever order.
"""

import asyncio
from collections.abc import Awaitable
from typing import Any

from tornado.http1connection import HTTP1Connection, HTTP1ServerConnection
from tornado.httpserver import HTTPServer
from tornado.httputil import (
    HTTPConnection,
    HTTPHeaders,
    HTTPMessageDelegate,
    RequestStartLine,
    ResponseStartLine,
)

LOOKS = 8
"""How often within ``request_s`` the clock looks at most, however many wait since however many moments."""


class Server(HTTPServer):
    """As Tornado's, with one argument more.

    ``request_s`` is how long the head of a request may take to come, and of the next one on its connection.
    Of several requests behind one another none is carried out behind an answer that ends
    the connection (RFC 9112 9.6): Tornado reads on, and would answer nobody.
    """

    def initialize(self, *args: Any, **options: Any) -> None:
        """Tornado constructs it."""
        self._request_s: float = options.pop("request_s")
        super().initialize(*args, **options)
        self._waiting: dict[HTTP1ServerConnection, float] = {}
        """Since when, by the loop's clock, each connection has owed us a request; the longest first."""
        self._looking: asyncio.TimerHandle | None = None
        self._coming: set[HTTP1ServerConnection] = set()
        """Those whose request has begun to come."""
        self._answering: set[HTTP1ServerConnection] = set()
        """Those whose request is there, and whose answer they have not taken yet."""
        self._refusing = False

    @property
    def under_way(self) -> int:
        """How many requests have begun to come and are not answered yet, or the answer is not taken."""
        return len(self._coming) + len(self._answering)

    @property
    def refusing(self) -> bool:
        """Is nothing carried out any more?"""
        return self._refusing

    def let_go(self) -> None:
        """From now on each answer is the last one of its connection, and says so where its head is still to be sent."""
        self.conn_params.no_keep_alive = True

    def end(self, patience_s: float) -> None:
        """After ``let_go``: let nobody in, and give so many seconds to who sends a request or takes an answer.

        Wait then until nothing is ``under_way``: that ends, since each connection has one more answer at most.
        """
        self.stop()
        asyncio.get_running_loop().call_later(patience_s, self._cut)

    def _cut(self) -> None:
        """End those who keep us waiting; not those who wait for us."""
        for connection in self._coming | {one for one in self._answering if one.stream.writing()}:
            connection.stream.close()

    def refuse(self) -> None:
        """From now on no request is carried out, whatever was read of it; call ``close_all_connections`` next."""
        self.stop()
        self._refusing = True

    def start_request(self, server_conn: object, request_conn: HTTPConnection) -> HTTPMessageDelegate:
        """A connection is about to wait for its next request; what it said before is answered."""
        assert isinstance(server_conn, HTTP1ServerConnection), f"expected HTTP/1.1, got {server_conn!r}"
        assert isinstance(request_conn, HTTP1Connection), f"expected HTTP/1.1, got {request_conn!r}"
        answered = server_conn in self._coming or server_conn in self._answering
        self._coming.discard(server_conn)
        self._answering.discard(server_conn)
        if answered and self.conn_params.no_keep_alive:
            server_conn.stream.close()  # it was asked before ``let_go``, when Tornado meant to keep it
        over = answered and server_conn.stream.closed()
        loop = asyncio.get_running_loop()
        self._waiting[server_conn] = loop.time()
        if self._looking is None:
            self._looking = loop.call_later(self._request_s, self._look)
        return _Awaited(self, server_conn, request_conn, super().start_request(server_conn, request_conn), over)

    def on_close(self, server_conn: object) -> None:
        """A connection has ended, or is a WebSocket's from now on."""
        assert isinstance(server_conn, HTTP1ServerConnection), f"expected HTTP/1.1, got {server_conn!r}"
        self._waiting.pop(server_conn, None)
        self._coming.discard(server_conn)
        self._answering.discard(server_conn)
        super().on_close(server_conn)

    def comes(self, connection: HTTP1ServerConnection) -> None:
        """The head of a request is there."""
        self._waiting.pop(connection, None)
        self._coming.add(connection)

    def has_come(self, connection: HTTP1ServerConnection) -> None:
        """The whole request is there."""
        self._coming.discard(connection)
        self._answering.add(connection)

    def _look(self) -> None:
        """End those who have been waited for too long, and look again when the next one's time is over."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._waiting:
            connection, since = next(iter(self._waiting.items()))
            left_s = since + self._request_s - now
            if left_s > 0:
                self._looking = loop.call_later(max(left_s, self._request_s / LOOKS), self._look)
                return
            del self._waiting[connection]
            connection.stream.close()
        self._looking = None


class _Awaited(HTTPMessageDelegate):
    """Passes a request on to who is to answer it, unless that is ``over``, and notes that it has come."""

    def __init__(
        self,
        server: Server,
        connection: HTTP1ServerConnection,
        request: HTTP1Connection,
        answering: HTTPMessageDelegate,
        over: bool,
    ) -> None:
        self._server = server
        self._connection = connection
        self._request = request
        self._answering = answering
        self._over = over

    def headers_received(
        self, start_line: RequestStartLine | ResponseStartLine, headers: HTTPHeaders
    ) -> Awaitable[None] | None:
        """The head of the request is there."""
        if self._over or self._server.refusing:
            self._request.detach().close()  # only who has taken the stream away is not read on from
            return None
        if self._server.conn_params.no_keep_alive and start_line.version == "HTTP/1.0":
            headers.pop("Connection", None)  # or Tornado would promise to keep the connection who asked for it
        self._server.comes(self._connection)
        return self._answering.headers_received(start_line, headers)

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        """A part of its body."""
        return self._answering.data_received(chunk)

    def finish(self) -> None:
        """The whole request is there."""
        if self._server.refusing:
            self._answering.on_connection_close()
            self._request.detach().close()
            return
        self._server.has_come(self._connection)
        self._answering.finish()

    def on_connection_close(self) -> None:
        """The client is gone before it was answered."""
        self._answering.on_connection_close()
