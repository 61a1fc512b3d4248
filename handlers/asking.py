"""What every path of ``/v1`` does the same way: who asks, with which parameters, and how it is told no.

PROTOCOL 17.1.
"""

import math
import time
from collections import Counter
from collections.abc import Awaitable
from typing import Any, ClassVar

import msgspec

from handlers.cors import CorsHandler
from handlers.openapi import Parameter
from handlers.problems import NAYS, Problem, problem_of
from handlers.refusals import Refusals
from handlers.socket import Connect, Sockets
from handlers.stream_outbox import EVENTS, Framing, Wires
from server.callers import Caller
from server.errors import BAD_REQUEST, INTERNAL, INVALID_TOKEN, METHOD_NOT_FOUND, PERMISSION_DENIED, TOO_MANY_REQUESTS
from server.limits import Buckets
from server.node import Node
from server.outbox import Request
from server.polling import Tops
from server.readers import CODEC
from server.session import Gate

PAGE = 100
"""Publications in an answer, unless the request says otherwise."""

EVENT_TEXT = Framing("text/event-stream; charset=utf-8", bytes, EVENTS.around)
"""Events that are whole already, ids and all."""


def read_bearer(header: str) -> str:
    """The token of an ``Authorization`` header, ``""`` if there is no header; raises ``ValueError``."""
    scheme, _, token = header.strip().partition(" ")
    if header and (scheme.lower() != "bearer" or not token.strip()):
        raise ValueError('expected "Bearer" and a token')
    return token.strip()


class Clients(Sockets):
    """The connections of this process, and those who ask without one: ``gate`` checks their tokens."""

    def __init__(self, gate: Gate, connect: Connect, **options: Any) -> None:
        super().__init__(connect, **options)
        self.gate = gate


class Rest:
    """The polls and event streams of this process; must be made on the running loop."""

    def __init__(self, node: Node, clients: Clients) -> None:
        client = node.settings.client
        self.node = node
        self.clients = clients
        self.refusals = Refusals(time.monotonic)
        self.tops = Tops(node)
        self.waiting: Counter[str] = Counter()
        """How many polls each user, or address, has waiting."""
        self._read_rate = 0
        self._reads = Buckets(0)
        self.wires = Wires.of(
            EVENT_TEXT, CODEC, queue_max_size=client.queue_max_size, stall_timeout_s=client.outbox_stall_timeout
        )
        clients.watch(*self.wires)
        self.unheard_s = client.ping_interval + max(client.pong_timeout, client.outbox_stall_timeout)

    def count_read(self, whose: str) -> None:
        """Raises ``Problem`` for a user, or an address, that reads too often; PROTOCOL 17.1.14."""
        rate = self.node.settings.rest.read_rate_limit
        if rate != self._read_rate:  # the settings may have been read again
            self._read_rate, self._reads = rate, Buckets(60 * rate, burst=rate)
        wait_s = self._reads.take(whose, time.monotonic())
        if wait_s:
            title, why = TOO_MANY_REQUESTS.message, f"look at rest.read_rate_limit ({rate})"
            detail, headers = f"Expected at most {rate} reads a second.", {"Retry-After": str(math.ceil(wait_s))}
            raise Problem(429, TOO_MANY_REQUESTS.code, title, detail, headers=headers, why=why)

    @property
    def page_bytes(self) -> int:
        """What an answer may weigh, as one to a command (PROTOCOL 4.6.2)."""
        return self.node.settings.client.queue_max_size // 2

    def page(self, limit: int | None) -> int:
        """How many publications an answer has at most (PROTOCOL 4.6.2)."""
        most = self.node.settings.client.history_max_publication_limit
        wanted = PAGE if limit is None else limit
        return min(wanted, most) if most else wanted


class RestHandler(CorsHandler):
    """What every path of ``/v1`` does the same way."""

    request_headers = ("Authorization", "Content-Type", "Idempotency-Key", "If-None-Match", "Last-Event-ID", "Prefer")
    exposed_headers = ("ETag", "Link", "Location", "Preference-Applied", "Retry-After")
    parameters: ClassVar[tuple[Parameter, ...]] = ()

    def initialize(self, rest: Rest) -> None:
        """``rest`` is what all requests share."""
        self.rest = rest
        self.caller: Caller | None = None
        self.gone = False

    def prepare(self) -> Awaitable[None] | None:
        """403 to pages of other origins."""
        self._prepare_headers()
        if not self.allow_origin(self.rest.clients.allowed_origins):
            detail = "Pages of this origin may not ask."
            self.refuse(Problem(403, PERMISSION_DENIED.code, detail=detail, why="look at client.allowed_origins"))
        return None

    def _prepare_headers(self) -> None:
        self.set_header("Cache-Control", "no-store")
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Referrer-Policy", "no-referrer")

    def compute_etag(self) -> None:
        """What has an entity tag says so itself, and knows when nothing has changed."""

    def on_connection_close(self) -> None:
        """The client has gone; nobody reads an answer."""
        self.gone = True
        super().on_connection_close()

    def options(self, *path: str) -> None:
        """What there is, and what a page of another origin may ask for."""
        self.answer_preflight()

    async def attend(self, work: Awaitable[None]) -> None:
        """Await the answer; every "no" ends here."""
        try:
            await work
        except NAYS as error:
            if not self.gone:
                self.refuse(problem_of(error))
        finally:
            if self.caller is not None:
                self.caller.end()

    def refuse(self, problem: Problem) -> None:
        """Answer with a problem document."""
        self.note_refusal(problem)
        self.set_problem(problem)
        self.finish()

    def note_refusal(self, problem: Problem) -> None:
        """Count it, and tell the log."""
        client = self.caller.client if self.caller is not None else ""
        self.rest.node.counts.refused(problem.code, problem.why)
        self.rest.refusals.say(
            "command.refused", self.address, problem.code, client=client, method="rest", why=problem.why
        )

    def set_problem(self, problem: Problem) -> None:
        """Make a problem document the answer."""
        self.set_status(problem.status)
        for name, value in problem.headers.items():
            self.set_header(name, value)
        self.set_header("Content-Type", "application/problem+json")
        self.write(msgspec.json.encode(problem.body))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """What Tornado found wrong, or a fault of ours, as a problem document all the same."""
        self._prepare_headers()
        self.allow_origin(self.rest.clients.allowed_origins)
        if status_code == 405:
            self.set_header("Allow", self.allowed)  # RFC 9110 15.5.6
            found = Problem(405, METHOD_NOT_FOUND.code, detail=f"There is {self.allowed}.")
        elif status_code < 500:
            found = Problem(status_code, BAD_REQUEST.code, detail="The request cannot be read.")
        else:
            found = Problem(status_code, INTERNAL.code, INTERNAL.message)
        self.set_problem(found)
        self.finish()

    # --- what was asked ---
    def given(self, parameter: Parameter) -> list[Any]:
        """The values of a query parameter or a header, none if it is absent; raises ``Problem``."""
        most = parameter.several or 1
        try:
            if parameter.place == "header":
                header = self.request.headers.get(parameter.name)
                return [] if header is None else [parameter.read(header)]
            texts = self.request.query_arguments.get(parameter.name, [])
            if len(texts) > most:
                raise ValueError(f"expected {'it once' if most == 1 else f'{most} at most'}, got {len(texts)}")
            return [parameter.read(text.decode()) for text in texts]
        except ValueError as error:
            why = "expected UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
            raise Problem(400, BAD_REQUEST.code, BAD_REQUEST.message, f"{parameter.name}: {why}") from None

    def one(self, parameter: Parameter) -> Any:
        """The value of a parameter, ``None`` if it is absent; raises ``Problem``."""
        values = self.given(parameter)
        return values[0] if values else None

    @property
    def address(self) -> str:
        """Where the request comes from."""
        return self.address_behind(self.rest.clients.trusted_proxies)

    def asking(self, transport: str) -> Request:
        """The request, as sessions and hooks see it."""
        headers = self.rest.clients.wanted(self.request.headers)
        return Request(transport=transport, format="json", remote_addr=self.address, headers=headers)

    def token(self) -> str:
        """The bearer token, ``""`` for none; raises ``Problem``."""
        try:
            return read_bearer(self.request.headers.get("Authorization", ""))
        except ValueError as error:
            why = f"Authorization: {error}"
            raise Problem(401, INVALID_TOKEN.code, INVALID_TOKEN.reason, why) from None

    async def identified(self) -> Caller:
        """Who asks; raises what ``connect`` would be refused with, and ``Problem`` for one who reads too often."""
        token = self.token()
        reads = self.request.method != "POST"
        if reads and not token:  # before anybody is asked about him
            self.rest.count_read(self.address)
        self.caller = Caller(self.rest.node, self.rest.clients.gate, self.asking("rest"))
        try:
            await self.caller.identify(token)
        except NAYS:
            if reads and token:  # whose it is nobody knows
                self.rest.count_read(self.address)
            raise
        if reads and token:
            self.rest.count_read(f"user {self.caller.user}" if self.caller.user else self.address)
        return self.caller


class NowhereHandler(RestHandler):
    """What is not there below ``/v1``."""

    def prepare(self) -> None:
        """404, as a problem document."""
        super().prepare()
        if not self._finished:
            self.refuse(Problem(404, METHOD_NOT_FOUND.code, detail="There is nothing here; look at /v1/openapi.json."))
