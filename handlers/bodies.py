"""Requests with a body that a page of another origin may make, and whoever is no browser.

The body is read as it comes and kept up to a limit.  One that is too large, or of a page
that may not come, is read to its end and forgotten, so that the answer is not lost in a
reset connection.  How long a body may take, and where reading ends in any case, is the
HTTP server's to say.
"""

from collections.abc import Awaitable
from typing import Any

import tornado.web

from handlers.cors import CorsHandler, from_elsewhere
from handlers.socket import Sockets
from server.observe import event


@tornado.web.stream_request_body
class BodyHandler(CorsHandler):
    """See the module's docstring; PROTOCOL 2.2.

    Cookies may come along, for load balancers that tell clients apart by them.
    """

    request_headers = None
    credentials = True

    def bound(self, sockets: Sockets, most_bytes: int) -> None:
        """To be called by ``initialize``: ``sockets`` know who may come, ``most_bytes`` is what a body may have."""
        self.sockets = sockets
        self.most_bytes = most_bytes
        self._barred = False
        self._body = bytearray()
        self._bytes = 0

    def prepare(self) -> Awaitable[None] | None:
        """Give pages of origins that may come leave to read the answer."""
        self._barred = not self.allow_origin(self.sockets.allowed_origins) or from_elsewhere(self.request.headers)
        return None

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        """Keep what may be kept."""
        self._bytes += len(chunk)
        if self._bytes <= self.most_bytes and not self._barred:
            self._body += chunk
        else:
            self._body.clear()
        return None

    def options(self) -> None:
        """A browser's question before it sends what a form could not (Fetch standard, CORS preflight)."""
        if self.read_body() is not None:
            self.answer_preflight()

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """See ``JsonHandler.write_error``; a method that there is not comes with those that there are."""
        if status_code == 405:
            self.set_header("Allow", self.allowed)  # RFC 9110 15.5.6
        super().write_error(status_code, **kwargs)

    def refuse(self, status: int, why: str) -> None:
        """Answer with an error, and with the reason for whoever wrote the client."""
        self.answer({"error": {"code": status, "message": why}}, status)

    def read_body(self) -> bytes | None:
        """The body; ``None``, and it is answered: 403 to pages that may not come, 413 if it is too large."""
        if self._barred:
            origin = self.request.headers.get("Origin")
            event("connection.refused", why="client.allowed_origins", origin=origin, address=self.address)
            self.refuse(403, "this origin may not connect")
            return None
        if self._bytes > self.most_bytes:
            self.refuse(413, f"expected at most {self.most_bytes} bytes, got {self._bytes}")
            return None
        return bytes(self._body)

    @property
    def format(self) -> str:
        """What the client says that its body is: ``"protobuf"`` for bytes, else ``"json"`` (PROTOCOL 2.5)."""
        kind = self.request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        return "protobuf" if kind == "application/octet-stream" else "json"

    @property
    def address(self) -> str:
        """Where the request comes from."""
        return self.address_behind(self.sockets.trusted_proxies)
