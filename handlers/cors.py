"""What a page of another origin may ask for: CORS by ``client.allowed_origins`` (Fetch standard, 3.2)."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from handlers.base import JsonHandler
from handlers.origins import Network, client_address, origin_allowed

PREFLIGHT_S = 300
"""How long a browser may remember what it was allowed (PROTOCOL 2.2)."""


def from_elsewhere(headers: Mapping[str, str]) -> bool:
    """Did another site's page cause this request, and not say so by ``Origin``: an image, a link (Fetch Metadata, 2.4)?

    No page can read the answer, but cookies may have come along; what does something must not be done for it.
    """
    return not headers.get("Origin") and headers.get("Sec-Fetch-Site") in ("cross-site", "same-site")


class CorsHandler(JsonHandler):
    """Answers that pages of allowed origins may read."""

    methods: ClassVar[tuple[str, ...]] = ()
    """What the path has, besides OPTIONS."""
    request_headers: ClassVar[tuple[str, ...] | None] = ("Content-Type",)
    """What such a page may send, ``None`` for whatever it asks for."""
    exposed_headers: ClassVar[tuple[str, ...]] = ()
    credentials: ClassVar[bool] = False
    """May cookies come along?  Tokens need none."""

    def allow_origin(self, allowed_origins: Sequence[str]) -> bool:
        """Let a page of an allowed origin read the answer, whatever that is; false to all others (PROTOCOL 2.2)."""
        origin = self.request.headers.get("Origin")
        self.set_header("Vary", "Origin")
        if not origin_allowed(origin, allowed_origins):
            return False
        if origin:
            self.set_header("Access-Control-Allow-Origin", origin)
            if self.credentials:
                self.set_header("Access-Control-Allow-Credentials", "true")
            if self.exposed_headers:
                self.set_header("Access-Control-Expose-Headers", ", ".join(self.exposed_headers))
        return True

    def answer_preflight(self) -> None:
        """Say what may be asked for: a browser's question before a request that a form could not make."""
        asked = self.request.headers.get("Access-Control-Request-Headers", "")
        accepted = asked if self.request_headers is None else ", ".join(self.request_headers)
        self.set_header("Allow", self.allowed)
        self.set_header("Access-Control-Allow-Methods", self.allowed)
        if accepted:
            self.set_header("Access-Control-Allow-Headers", accepted)
        self.set_header("Access-Control-Max-Age", str(PREFLIGHT_S))
        self.clear_header("Content-Type")
        self.set_status(204)
        self.finish()

    @property
    def allowed(self) -> str:
        """The methods of the path, as ``Allow`` lists them (RFC 9110 10.2.1)."""
        return ", ".join((*self.methods, "OPTIONS"))

    def address_behind(self, trusted_proxies: Sequence[Network]) -> str:
        """Where the request comes from."""
        forwarded_for = self.request.headers.get("X-Forwarded-For", "")
        return client_address(self.request.remote_ip or "", forwarded_for, trusted_proxies)
