"""``/api``: the forms in which a back end's calls come over HTTP; PROTOCOL 15.1.

What the calls do is in ``server/backend.py``.  Answers are 200 with ``result`` or
``error``, since the back-end SDKs depend on that, unless the caller asks for a
status instead.
"""

import asyncio
import hmac
import json
import re
from collections.abc import Iterator

import msgspec
from msgspec import Raw

from handlers.base import JsonHandler
from server.audit import Author
from server.backend import BATCH_BYTES, COMMANDS, METHODS, SLICE, Backend, Error, Failed, encode
from server.errors import (
    BAD_REQUEST,
    INTERNAL,
    LIMIT_EXCEEDED,
    METHOD_NOT_FOUND,
    PERMISSION_DENIED,
    TOO_MANY_REQUESTS,
    UNKNOWN_CHANNEL,
    UNRECOVERABLE_POSITION,
)
from server.node import Node
from server.observe import event
from server.settings import HttpApiSettings

STATUS = {
    INTERNAL.code: 500,
    UNKNOWN_CHANNEL.code: 404,
    PERMISSION_DENIED.code: 403,
    METHOD_NOT_FOUND.code: 404,
    LIMIT_EXCEEDED.code: 413,
    TOO_MANY_REQUESTS.code: 429,
    UNRECOVERABLE_POSITION.code: 416,
}
"""The HTTP status of an error in transport mode; 400 for any other (PROTOCOL 15.1)."""


class Line(msgspec.Struct):
    """One command of the old form (PROTOCOL 15.1)."""

    method: str = ""
    params: Raw = Raw(b"{}")
    id: int | None = None


_line = msgspec.json.Decoder(Line)
_json = json.JSONDecoder()
_space = re.compile("[ \\t\\r\\n]*")


class BackendHandler(JsonHandler):
    """What both forms share: the key, and what is no call at all."""

    def initialize(self, node: Node) -> None:
        """``node`` is what is called; its settings have the key."""
        self._node = node

    @property
    def _settings(self) -> HttpApiSettings:
        return self._node.settings.http_api

    def prepare(self) -> None:
        """401 with an empty body to whom the key is not known; PROTOCOL 15.1."""
        if self.request.method == "POST" and not self._authorized():
            event("api.refused", address=self.request.remote_ip, why="wrong or no key; look at http_api.key")
            self.set_status(401)
            self.clear_header("Content-Type")
            self.finish()

    def _authorized(self) -> bool:
        if self._settings.insecure:
            return True
        key = self.request.headers.get("X-API-Key")
        if key is None:
            scheme, _, rest = self.request.headers.get("Authorization", "").partition(" ")
            key = rest.strip() if scheme.lower() == "apikey" else self.get_query_argument("api_key", "")
        expected = self._settings.key
        return bool(expected) and hmac.compare_digest(key.encode(errors="surrogateescape"), expected.encode())

    @property
    def _author(self) -> Author:
        """Who calls, for the log; PROTOCOL 15.1.7."""
        return Author("anybody" if self._settings.insecure else "key", self.request.remote_ip or "")

    def write_error(self, status_code: int, **kwargs: object) -> None:
        """See ``JsonHandler.write_error``."""
        if status_code == 405:
            self.set_header("Allow", "POST")  # RFC 9110 15.5.6
        super().write_error(status_code, **kwargs)

    def no_json(self, why: object) -> None:
        """400 to a body that is no JSON, in words."""
        self.set_status(400)
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(f"the body is not JSON: {why}\n")


class ApiHandler(BackendHandler):
    """``POST /api/<method>``."""

    async def post(self, method: str) -> None:
        """Carry out one call; PROTOCOL 15.1."""
        if method not in METHODS:
            self.answer({"error": {"code": 404, "message": "no such method"}}, 404)
            return
        try:
            result = await Backend(self._node, self._author).call(method, self.request.body)
        except Failed as failed:
            if self._transport_mode:
                self.answer(encode(failed.error), STATUS.get(failed.error.code, 400))
            else:
                self.answer(b'{"error":%s}' % encode(failed.error))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self.no_json(error)
        else:
            self.answer(result if method == "batch" else b'{"result":%s}' % result)

    @property
    def _transport_mode(self) -> bool:
        """Does the caller want an error as the status?  PROTOCOL 15.1."""
        mode = self.request.headers.get("X-Centrifugo-Error-Mode") or self._settings.error_mode
        return mode == "transport"


class LinesHandler(BackendHandler):
    """``POST /api``: commands one after the other, the old form."""

    async def post(self) -> None:
        """Carry out all of them in turn, unless one cannot be read: then none; PROTOCOL 15.1."""
        lines: list[Line] = []
        try:
            for line in _lines(self.request.body):
                lines.append(line)
                if len(lines) > COMMANDS:
                    break
                if len(lines) % SLICE == 0:
                    await asyncio.sleep(0)
        except (ValueError, msgspec.DecodeError, RecursionError) as error:
            self.no_json(error)
            return
        if not 0 < len(lines) <= COMMANDS:
            self.no_json(f"expected 1 to {COMMANDS} commands, got {'none' if not lines else 'more'}")
            return
        backend = Backend(self._node, self._author)
        answers: list[bytes] = []
        size = 0
        for line in lines:
            answers.append(await self._answer(backend, line, full=size > BATCH_BYTES))
            size += len(answers[-1])
            if len(answers) % SLICE == 0:
                await asyncio.sleep(0)
        self.answer(b"\n".join(answers))

    async def _answer(self, backend: Backend, line: Line, *, full: bool) -> bytes:
        try:
            if full:
                raise Failed(backend.too_much(line.method))
            answer = b'"result":%s' % await backend.call(line.method.lower(), bytes(line.params))
        except Failed as failed:
            answer = b'"error":%s' % encode(failed.error)
        except (msgspec.DecodeError, RecursionError):
            answer = b'"error":%s' % encode(Error(BAD_REQUEST.code, BAD_REQUEST.message))
        return b"{%s}" % answer if line.id is None else b'{"id":%d,%s}' % (line.id, answer)


def _lines(body: bytes) -> Iterator[Line]:
    """The commands of a body, between which there may be white space or none.

    Raises ``ValueError``, ``msgspec.DecodeError`` or ``RecursionError`` at the first that is none.
    """
    text = body.decode()
    at = _behind_space(text, 0)
    while at < len(text):
        # Python's decoder finds where the value ends; ours takes its bytes, so that payloads stay as they are.
        end = _json.raw_decode(text, at)[1]
        yield _line.decode(text[at:end].encode())
        at = _behind_space(text, end)


def _behind_space(text: str, at: int) -> int:
    found = _space.match(text, at)
    return found.end() if found is not None else at
