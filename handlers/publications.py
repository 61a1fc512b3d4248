"""``/v1/channels/{channel}/publications``: read, wait, publish; PROTOCOL 17.1, 17.2.

A body is read as it comes and kept up to a limit.  Who sends too much or takes too
long is answered at once, and then listened to for a moment: to close with unread
bytes would reset the connection, and the answer would be lost with it.
"""

import asyncio
import re
from collections.abc import Awaitable, Iterable, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

import msgspec
import tornado.web
from msgspec import UNSET, Raw
from tornado.http1connection import HTTP1Connection

from handlers.asking import PAGE, Rest, RestHandler
from handlers.openapi import Parameter
from handlers.problems import Problem
from server import cursors, protocol
from server.channels import Namespace
from server.errors import BAD_REQUEST, CONNECTION_CLOSED, CONNECTION_LIMIT, TOO_MANY_REQUESTS, Disconnected
from server.manners import express
from server.polling import LONGEST_S, Gone, Poll
from server.stream import Page, Position, Publication, catch_up

BODY_S = 30.0
LINGER_S = 2.0
LINGER_BYTES = 4 * 1024 * 1024
"""How long a body may take; and how long, and how far, one is listened to that was refused."""

NO_LIMIT = 2**62


# --- what a request says: pure -----------------------------------------------------------
def read_count(text: str) -> int:
    """A number of publications."""
    if not re.fullmatch(r"[0-9]{1,10}", text, re.ASCII) or int(text) >= 2**31:
        raise ValueError("expected a whole number from 0 to 2147483647")
    return int(text)


def read_flag(text: str) -> bool:
    """``true`` or ``false``."""
    if text not in ("true", "false"):
        raise ValueError('expected "true" or "false"')
    return text == "true"


def read_key(text: str) -> str:
    """An idempotency key, in quotes or without."""
    quoted = re.fullmatch(r'"((?:[^"\\]|\\.)*)"', text)
    key = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else text
    if not re.fullmatch(r"[ -~]{1,256}", key):
        raise ValueError("expected 1 to 256 printable ASCII characters")
    return key


def read_preference(header: str) -> int:
    """The seconds that ``Prefer: wait=N`` asks for, 0 for none (RFC 7240 4.3); what is no such thing is passed over."""
    for preference in header.split(","):
        name, _, value = preference.partition(";")[0].partition("=")
        if name.strip().lower() == "wait":
            found = re.fullmatch(r'"?([0-9]{1,9})"?', value.strip(), re.ASCII)
            return min(int(found[1]), LONGEST_S) if found else 0
    return 0


class Publish(msgspec.Struct):
    """The body of a publish."""

    data: protocol.Payload = UNSET


class Read(NamedTuple):
    """An answer to a read: ``position`` is its end, ``tag`` what its entity tag says, ``more`` if it goes on behind."""

    publications: Sequence[Raw]
    position: Position
    tag: Position
    more: bool = False


class Body(msgspec.Struct):
    """A page of publications as it goes out."""

    publications: Sequence[Raw]
    epoch: str
    offset: int


# --- the parameters -----------------------------------------------------------------------
SINCE = Parameter(
    "since",
    "query",
    "Where to go on from, EPOCH:OFFSET as an answer gave it. Without it, the newest are read.",
    {"type": "string", "pattern": "^[0-9A-Za-z_-]{0,32}:[0-9]{1,18}$"},
    cursors.read,
    example=":0",
)
LIMIT = Parameter(
    "limit",
    "query",
    f"Publications in the answer, {PAGE} by default; 0: only the position. The server may give fewer.",
    {"type": "integer", "minimum": 0, "maximum": 2**31 - 1, "default": PAGE},
    read_count,
    example="10",
)
REVERSE = Parameter(
    "reverse", "query", "Newest first, and on to older ones.", {"type": "boolean", "default": False}, read_flag
)
UNCHANGED = Parameter(
    "If-None-Match", "header", "The ETag of a former answer: 304 if there is nothing else.", {"type": "string"}
)
PREFER = Parameter(
    "Prefer",
    "header",
    f"wait=N: answer when something comes, after N seconds at the latest ({LONGEST_S} at most; RFC 7240).",
    {"type": "string"},
    read_preference,
)
KEY = Parameter(
    "Idempotency-Key",
    "header",
    "A key by which a repeat is known: the channel publishes once, and a repeat gets the first one's position.",
    {"type": "string", "minLength": 1, "maxLength": 256, "pattern": "^[ -~]+$"},
    read_key,
)
NAME = {"type": "string", "minLength": 1}
CHANNEL = Parameter("channel", "path", "The channel's name, percent-encoded.", NAME, example="chat:lobby")


@tornado.web.stream_request_body
class PublicationsHandler(RestHandler):
    """``/v1/channels/{channel}/publications``; PROTOCOL 17.1, 17.2."""

    methods = ("GET", "HEAD", "POST")

    def initialize(self, rest: Rest) -> None:
        """See ``RestHandler.initialize``."""
        super().initialize(rest)
        self._received = bytearray()
        self._received_bytes = 0
        self._refused = False
        self._alarm: asyncio.TimerHandle | None = None
        self._poll: Poll | None = None
        self._tags: list[Position] = []
        self._any_tag = False

    # --- the body, as it comes ---
    def prepare(self) -> Awaitable[None] | None:
        """As ``RestHandler.prepare``; and look at what the body is said to be."""
        result = super().prepare()
        if self._finished:
            return result
        headers = self.request.headers
        connection = self.request.connection
        assert isinstance(connection, HTTP1Connection), f"expected HTTP/1, got {connection!r}"
        # The server's own limits end the connection without a word.
        connection.set_max_body_size(NO_LIMIT)
        if "Content-Length" in headers or "Transfer-Encoding" in headers:
            connection.set_body_timeout(2 * BODY_S)
            self._alarm = asyncio.get_running_loop().call_later(BODY_S, self._take_too_long)
        length = headers.get("Content-Length", "")
        if re.fullmatch("[0-9]+", length) and int(length[:19]) > self._most_bytes:
            self._too_large()
        return result

    @property
    def _most_bytes(self) -> int:
        return self.rest.node.settings.websocket.message_size_limit

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        """Keep what may be kept."""
        self._received_bytes += len(chunk)
        if not self._refused and self._received_bytes <= self._most_bytes:
            self._received += chunk
        elif not self._refused:
            self._too_large()
        elif self._received_bytes > LINGER_BYTES:
            self._stop_listening()
        return None

    def _too_large(self) -> None:
        detail = f"Expected a body of {self._most_bytes} bytes at most."
        self._refuse_early(Problem(413, BAD_REQUEST.code, detail=detail))

    def _take_too_long(self) -> None:
        self._refuse_early(Problem(408, BAD_REQUEST.code, detail=f"Expected the body within {BODY_S:g} s."))

    def _refuse_early(self, problem: Problem) -> None:
        """Answer while the body still comes; the connection ends with it, or soon."""
        if self._refused or self._finished:
            return
        self._refused = True
        self._received.clear()
        self._set_alarm(LINGER_S, self._stop_listening)
        self.note_refusal(problem)
        self.request.headers.pop("Expect", None)  # or Tornado would tell it to go on (RFC 9110 10.1.1)
        body = msgspec.json.encode(problem.body)
        self.set_problem(problem)
        self.set_header("Content-Length", str(len(body)))
        self.set_header("Connection", "close")
        self.flush()

    def _stop_listening(self) -> None:
        if not self._finished:
            connection = self.request.connection
            assert isinstance(connection, HTTP1Connection), f"expected HTTP/1, got {connection!r}"
            # Tornado goes by the request's word alone on whether the connection ends.
            self.finish().add_done_callback(lambda _: connection.close())

    def send_error(self, status_code: int = 500, **kwargs: Any) -> None:
        """See ``RequestHandler.send_error``; who was refused already, whatever the method, needs no other answer."""
        if self._refused:
            self._stop_listening()
        else:
            super().send_error(status_code, **kwargs)

    def _set_alarm(self, seconds: float, call: Any) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = asyncio.get_running_loop().call_later(seconds, call)

    def _whole(self) -> bool:
        """The body is there; false if it was refused, and all is said."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if self._refused:
            self._stop_listening()
        return not self._refused

    def on_finish(self) -> None:
        """Nothing is waited for any more."""
        if self._alarm is not None:
            self._alarm.cancel()

    def on_connection_close(self) -> None:
        """Whoever polled has gone: the poll frees what it holds."""
        if self._alarm is not None:
            self._alarm.cancel()
        super().on_connection_close()
        if self._poll is not None:
            self._poll.disconnect(CONNECTION_CLOSED)

    def options(self, *path: str) -> None:
        """See ``RestHandler.options``."""
        if self._whole():
            super().options(*path)

    # --- reading ---
    async def get(self, channel: str) -> None:
        """200 with a page; 304, 400, 401, 403, 404, 406, 410, 429, 503."""
        if self._whole():
            await self.attend(self._read(channel))

    async def head(self, channel: str) -> None:
        """As GET, without waiting."""
        await self.get(channel)

    async def _read(self, channel: str) -> None:
        since: Position | None = self.one(SINCE)
        limit = self.rest.page(self.one(LIMIT))
        reverse = bool(self.one(REVERSE))
        header = self.one(UNCHANGED) or ""
        self._tags, self._any_tag = cursors.tags(header), header.strip() == "*"
        wait_s = read_preference(",".join(self.request.headers.get_list("Prefer")))
        if reverse or not limit or self.request.method == "HEAD":
            wait_s = 0
        caller = await self.identified()
        namespace = caller.known(channel)
        await caller.require("history", channel, namespace)
        if wait_s:
            found = await self._read_patiently(channel, namespace, since, limit, wait_s)
        else:
            found = await self._read_now(channel, namespace, since, limit, reverse)
        self._answer_page(channel, found, limit, reverse)

    async def _read_now(
        self, channel: str, namespace: Namespace, since: Position | None, limit: int, reverse: bool
    ) -> Read:
        """What history has, in one read; in none, if all that can be said is known."""
        tops = self.rest.tops
        top = tops.known(channel)
        if top is not None and (since is None or since == top) and (self._unchanged(top) or (since and not reverse)):
            return Read((), top, top)
        node, asked_at = self.rest.node, self.rest.node.clock()
        page = await node.pages.read(
            channel,
            namespace,
            since=None if since is None else since.offset,
            limit=limit,
            max_bytes=self.rest.page_bytes,
            reverse=reverse or since is None,
        )
        tops.confirm(channel, page.top, asked_at)
        if since is not None and not catch_up(since, Page((), page.top, page.floor)).recovered:
            raise Gone(page.top)
        return read_of(page, namespace, since, reverse)

    async def _read_patiently(
        self, channel: str, namespace: Namespace, since: Position | None, limit: int, wait_s: int
    ) -> Read:
        """As ``_read_now``, but if there is nothing, or nothing new, wait until there is."""
        self.set_header("Preference-Applied", f"wait={wait_s}")
        if since is not None and not self._any_tag and (not self._tags or since in self._tags):
            return await self._await_news(channel, namespace, since, limit, wait_s)
        found = await self._read_now(channel, namespace, since, limit, reverse=False)
        nothing_new = self._unchanged(found.tag) if self._tags or self._any_tag else not found.publications
        if nothing_new:
            news = await self._await_news(channel, namespace, found.position, limit, wait_s)
            if news.publications:
                found = await self._read_now(channel, namespace, since, limit, reverse=False)
        return found

    async def _await_news(self, channel: str, namespace: Namespace, since: Position, limit: int, wait_s: int) -> Read:
        """A long-poll; raises ``Problem`` or ``Disconnected`` if there are too many, and as ``Poll.news``."""
        caller, rest = self.caller, self.rest
        assert caller is not None, "expected somebody who was identified"
        if self.gone:
            raise Disconnected(CONNECTION_CLOSED, "it went before it could wait")
        settings = rest.node.settings
        whose = f"user {caller.user}" if caller.user else f"address {self.address}"
        most, connections = settings.rest.poll_limit, settings.client.connection_limit
        own = settings.client.user_connection_limit
        if most and rest.waiting[whose] >= most:
            title, why = TOO_MANY_REQUESTS.message, f"look at rest.poll_limit ({most})"
            raise Problem(429, TOO_MANY_REQUESTS.code, title, f"Expected at most {most} polls at a time.", why=why)
        if connections and rest.node.connections >= connections:
            title, why = TOO_MANY_REQUESTS.message, f"look at client.connection_limit ({connections})"
            raise Problem(503, TOO_MANY_REQUESTS.code, title, "Too many connections; try again later.", why=why)
        if own and caller.user and len(rest.node.users.get(caller.user, ())) >= own:
            raise Disconnected(CONNECTION_LIMIT, f"look at client.user_connection_limit ({own})")
        rest.waiting[whose] += 1
        poll = self._poll = Poll(caller, channel, namespace, limit, rest.page_bytes)
        try:
            tidings = await poll.news(since, wait_s)
        finally:
            self._poll = None
            rest.waiting[whose] -= 1
            if not rest.waiting[whose]:
                del rest.waiting[whose]
        return Read(tidings.publications, tidings.position, tidings.position, tidings.more)

    def _unchanged(self, tag: Position) -> bool:
        return self._any_tag or tag in self._tags

    def _answer_page(self, channel: str, found: Read, limit: int, reverse: bool) -> None:
        self.set_header("ETag", cursors.tag(found.tag))
        self.set_header("Cache-Control", "private, no-cache")
        self.set_header("Vary", "Origin, Authorization, Prefer")
        if found.more and limit:
            further = "&reverse=true" if reverse else ""
            url = f"{path_of(channel)}?since={cursors.written(found.position)}&limit={limit}{further}"
            self.set_header("Link", f'<{url}>; rel="next"')
        if self._unchanged(found.tag):
            self.clear_header("Content-Type")
            self.set_status(304)
            self.finish()
            return
        self.answer(Body(found.publications, found.position.epoch, found.position.offset))

    # --- publishing ---
    async def post(self, channel: str) -> None:
        """201 with the position, 202 in a passing channel; 400, 401, 403, 404, 413, 415, 429, 503."""
        if self._whole():
            await self.attend(self._publish(channel))

    async def _publish(self, channel: str) -> None:
        key = self.one(KEY) or ""
        data = protocol.given(self._body().data)
        caller = await self.identified()
        namespace = caller.known(channel)
        draft = await caller.draft(channel, namespace, data, key)
        position = (await self.rest.node.publish(channel, namespace, draft)).position
        if not position.offset:
            self.answer({}, 202)
            return
        before = cursors.written(Position(position.offset - 1, position.epoch))
        self.set_header("Location", f"{path_of(channel)}?since={before}&limit=1")
        self.answer({"epoch": position.epoch, "offset": position.offset}, 201)

    def _body(self) -> Publish:
        headers = self.request.headers
        kind = headers.get("Content-Type", "application/json").partition(";")[0].strip().lower()
        coding = headers.get("Content-Encoding", "identity").strip().lower()
        if kind != "application/json" or coding != "identity":
            detail = f"Expected application/json, got {(kind if coding == 'identity' else coding)[:64]!r}."
            raise Problem(415, BAD_REQUEST.code, detail=detail)
        try:
            self._received.decode()
            body = msgspec.json.decode(self._received, type=Publish)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            # What msgspec says of a wrong type is a place and a type, never a value.
            why = f": {error}" if isinstance(error, msgspec.ValidationError) else ""
            detail = f'Expected JSON such as {{"data": {{"text": "hello"}}}}{why}.'
            raise Problem(400, BAD_REQUEST.code, BAD_REQUEST.message, detail) from None
        if body.data is UNSET:
            detail = 'Expected JSON such as {"data": {"text": "hello"}}, got no data.'
            raise Problem(400, BAD_REQUEST.code, BAD_REQUEST.message, detail)
        return body


def read_of(page: Page, namespace: Namespace, since: Position | None, reverse: bool) -> Read:
    """The answer that a page makes; without ``since`` or in ``reverse`` the page descends."""
    publications: Iterable[Publication] = page.publications
    descending = reverse or since is None
    last = page.publications[-1].offset if page.publications else None
    if reverse:
        if last is None:
            position, more = since or page.top, False
        else:
            position, more = Position(last, page.top.epoch), last - 1 > page.floor
        tag = page.top
    elif since is None:
        position, more, tag = page.top, False, page.top
    else:
        position = tag = Position(since.offset if last is None else last, page.top.epoch)
        more = position.offset < page.top.offset
    if descending and not reverse:
        publications = reversed(page.publications)
    bodies = [Raw(msgspec.json.encode(express("json", one, page.top.epoch, namespace))) for one in publications]
    return Read(bodies, position, tag, more)


def path_of(channel: str) -> str:
    """Where a channel's publications are."""
    return f"/v1/channels/{quote(channel, safe='')}/publications"
