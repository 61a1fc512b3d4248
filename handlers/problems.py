"""What says no over HTTP: problem documents (RFC 9457) that carry the protocol's code.

One table maps the codes to statuses.  A reason that names a setting is for the log;
the client gets words that tell it what to do.  Pure.  PROTOCOL 17.1.5.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from server import cursors, protocol
from server.errors import (
    BAD_REQUEST,
    CONNECTION_EXPIRED,
    CONNECTION_LIMIT,
    EXPIRED,
    FORBIDDEN,
    INTERNAL,
    INVALID_TOKEN,
    LIMIT_EXCEEDED,
    METHOD_NOT_FOUND,
    NOT_AVAILABLE,
    PERMISSION_DENIED,
    SERVER_ERROR,
    SHUTDOWN,
    TOKEN_EXPIRED,
    TOO_MANY_REQUESTS,
    UNAUTHORIZED,
    UNKNOWN_CHANNEL,
    UNRECOVERABLE_POSITION,
    Disconnected,
    Refused,
    Unavailable,
)
from server.polling import Gone

STATUS = {
    INTERNAL.code: 500,
    UNAUTHORIZED.code: 401,
    UNKNOWN_CHANNEL.code: 404,
    PERMISSION_DENIED.code: 403,
    METHOD_NOT_FOUND.code: 404,
    LIMIT_EXCEEDED.code: 400,
    BAD_REQUEST.code: 400,
    NOT_AVAILABLE.code: 404,
    TOKEN_EXPIRED.code: 401,
    EXPIRED.code: 401,
    TOO_MANY_REQUESTS.code: 429,
    UNRECOVERABLE_POSITION.code: 410,
    SHUTDOWN.code: 503,
    SERVER_ERROR.code: 500,
    CONNECTION_EXPIRED.code: 401,
    INVALID_TOKEN.code: 401,
    CONNECTION_LIMIT.code: 429,
}
"""The HTTP status of each code (PROTOCOL 7.1, 7.2, 17.1.5); of any other it is 403."""

WORDS = {
    INTERNAL.code: "The server met a fault of its own, or did not get an answer in time.",
    UNAUTHORIZED.code: "A token is needed here: Authorization: Bearer TOKEN.",
    UNKNOWN_CHANNEL.code: "No namespace is configured for this channel.",
    PERMISSION_DENIED.code: "The options of this channel's namespace do not allow it to you.",
    LIMIT_EXCEEDED.code: "It is more than the server gives at once.",
    BAD_REQUEST.code: "The channel's name or the payload is none that its namespace takes.",
    NOT_AVAILABLE.code: "This channel's namespace has no such thing, or cannot say it in JSON.",
    TOKEN_EXPIRED.code: "Get another token and try again.",
    EXPIRED.code: "The token's expire_at is past.",
    TOO_MANY_REQUESTS.code: "Too much waits already, or comes too fast; nothing was done.",
    UNRECOVERABLE_POSITION.code: "What follows this position is no longer kept. Reload, and go on from the new one.",
    SHUTDOWN.code: "The server is going away; come back.",
    INVALID_TOKEN.code: "The token is not one that this server trusts.",
    FORBIDDEN.code: "This user may not be here.",
    CONNECTION_LIMIT.code: "This user has as many connections as one may have.",
}


class Problem(Exception):
    """An answer that says no; ``more`` are further members of the document, ``headers`` go with it."""

    def __init__(
        self,
        status: int,
        code: int,
        title: str = "",
        detail: str = "",
        *,
        more: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        why: str = "",
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.title = title or HTTPStatus(status).phrase
        self.detail = detail or WORDS.get(code, "")
        self.more = more or {}
        self.headers = dict(headers or {})
        self.why = why or detail
        if status == 401:
            self.headers.setdefault("WWW-Authenticate", "Bearer" if code == UNAUTHORIZED.code else INVALID)
        if status in (429, 503):
            self.headers.setdefault("Retry-After", "1")

    @property
    def body(self) -> dict[str, Any]:
        """The members of RFC 9457 3.1, and the protocol's ``code``."""
        members = {"type": f"/docs/rest.md#code-{self.code}", "title": self.title, "status": self.status}
        return {**members, "detail": self.detail, "code": self.code, **self.more}


INVALID = 'Bearer error="invalid_token"'  # RFC 6750 3.1

NAYS = (Problem, Refused, Disconnected, Unavailable, Gone, protocol.Inexpressible)


def problem_of(error: Exception) -> Problem:
    """What any "no" of the engine is over HTTP."""
    match error:
        case Problem():
            return error
        case Gone():
            more = {"epoch": error.top.epoch, "offset": error.top.offset}
            headers = {"ETag": cursors.tag(error.top)}
            refusal = UNRECOVERABLE_POSITION
            return Problem(410, refusal.code, refusal.message, more=more, headers=headers, why=str(error))
        case Refused():
            status = STATUS.get(error.refusal.code, 503 if error.refusal.temporary else 403)
            return Problem(status, error.refusal.code, error.refusal.message, why=error.why)
        case Disconnected():
            code = error.disconnect.code
            return Problem(STATUS.get(code, 403), code, error.disconnect.reason, why=error.why)
        case protocol.Inexpressible():
            return Problem(406, NOT_AVAILABLE.code, NOT_AVAILABLE.message, "A payload is no JSON.", why=str(error))
        case _:
            return Problem(503, INTERNAL.code, INTERNAL.message, why=str(error))
