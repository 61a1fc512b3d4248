"""What every handler shares: JSON in and out, and who is asking."""

import asyncio
from typing import Any

import msgspec
import tornado.web
from tornado.http1connection import HTTP1Connection

from server.observe import event

TAKEN_S = 60.0
TAKEN_BYTES_S = 16 * 1024
"""How long an answer may take to be taken, and by how much longer a large one may; PROTOCOL 18."""


def _cut(connection: HTTP1Connection, path: str) -> None:
    event("http.unread", path=path)
    connection.close()


class JsonHandler(tornado.web.RequestHandler):
    """Answers with JSON, whatever happens."""

    def set_default_headers(self) -> None:
        """No header tells more than needed."""
        self.clear_header("Server")

    def answer(self, body: Any, status: int = 200) -> None:
        """Finish with ``body`` as JSON (bytes are JSON already)."""
        self.set_status(status)
        self.set_header("Content-Type", "application/json")
        self.finish(body if isinstance(body, bytes) else msgspec.json.encode(body))

    def finish(self, chunk: str | bytes | dict[str, Any] | None = None) -> "asyncio.Future[None]":
        """See ``RequestHandler.finish``; who does not take the answer is cut, else we would hold it for ever.

        Tornado says ``Connection: close`` where that was known when the request came;
        what was asked before the server was told to go, as a long-poll, is told here.
        """
        connection = self.request.connection
        assert isinstance(connection, HTTP1Connection), f"expected HTTP/1, got {connection!r}"
        if connection.params.no_keep_alive and not self._headers_written:
            self.set_header("Connection", "close")
        taken = super().finish(chunk)
        if not taken.done():
            allowed_s = TAKEN_S + len(chunk or b"") / TAKEN_BYTES_S
            alarm = asyncio.get_running_loop().call_later(allowed_s, _cut, connection, self.request.path)
            taken.add_done_callback(lambda _: alarm.cancel())
        return taken

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """An error that nobody handled: the status and its words, nothing of the fault."""
        self.set_header("Content-Type", "application/json")
        self.finish(msgspec.json.encode({"error": {"code": status_code, "message": self._reason}}))

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        """A fault of ours is logged once, with its trace; a refused request is not a fault."""
        if not isinstance(value, tornado.web.HTTPError):
            event("http.failed", path=self.request.path, fault=value)


class NotFoundHandler(JsonHandler):
    """What nothing else stands for."""

    def prepare(self) -> None:
        """404, as JSON."""
        self.answer({"error": {"code": 404, "message": "not found"}}, 404)


class PageHandler(tornado.web.StaticFileHandler):
    """Pages and scripts, with headers that keep foreign content out."""

    def set_extra_headers(self, path: str) -> None:
        """Only what this server serves is run; no other site frames it."""
        self.set_header(
            "Content-Security-Policy", "default-src 'self'; connect-src 'self' ws: wss:; frame-ancestors 'none'"
        )
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Referrer-Policy", "no-referrer")
        self.set_header("Cache-Control", "no-cache")


class NamedPageHandler(PageHandler):
    """A page by its name alone: ``/chat`` is ``chat.html``."""

    def parse_url_path(self, url_path: str) -> str:
        """The file behind the name."""
        return f"{url_path}.html"
