"""Everything that can be answered with "no": two tables, and what carries them.

A *refusal* costs one command, a *disconnect* costs one connection, an
*unavailable* seam costs whoever needed it a refusal 100.  Anything else that is
raised is a fault of ours: it is logged once, and the client learns only
"internal server error".

Pure; imports nothing of ours.  PROTOCOL 7.1, 7.2, 7.3.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why one command was not carried out (PROTOCOL 7.1).

    ``temporary`` tells an SDK to try again with backoff.
    """

    code: int
    message: str
    temporary: bool = False


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Why one connection was ended (PROTOCOL 7.2).

    ``reason`` is ASCII, 1 to 123 bytes, and never text that parses as JSON:
    SDKs misread an empty or a JSON reason.
    """

    code: int
    reason: str

    @property
    def comes_back(self) -> bool:
        """Does an SDK reconnect after this code?"""
        return not (3500 <= self.code < 4000 or 4500 <= self.code < 5000)


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    """Why one subscription was ended by the server (PROTOCOL 7.3).

    An SDK subscribes again after codes from 2500 up.
    """

    code: int
    reason: str


# --- refusals: code, message, does trying again help? ------------------------
INTERNAL = Refusal(100, "internal server error", temporary=True)
UNAUTHORIZED = Refusal(101, "unauthorized")
UNKNOWN_CHANNEL = Refusal(102, "unknown channel")
PERMISSION_DENIED = Refusal(103, "permission denied")
METHOD_NOT_FOUND = Refusal(104, "method not found")
ALREADY_SUBSCRIBED = Refusal(105, "already subscribed")
LIMIT_EXCEEDED = Refusal(106, "limit exceeded")
BAD_REQUEST = Refusal(107, "bad request")
NOT_AVAILABLE = Refusal(108, "not available")
TOKEN_EXPIRED = Refusal(109, "token expired")
EXPIRED = Refusal(110, "expired")
TOO_MANY_REQUESTS = Refusal(111, "too many requests", temporary=True)
UNRECOVERABLE_POSITION = Refusal(112, "unrecoverable position")

REFUSALS = {
    refusal.code: refusal
    for refusal in (
        INTERNAL,
        UNAUTHORIZED,
        UNKNOWN_CHANNEL,
        PERMISSION_DENIED,
        METHOD_NOT_FOUND,
        ALREADY_SUBSCRIBED,
        LIMIT_EXCEEDED,
        BAD_REQUEST,
        NOT_AVAILABLE,
        TOKEN_EXPIRED,
        EXPIRED,
        TOO_MANY_REQUESTS,
        UNRECOVERABLE_POSITION,
    )
}

# --- disconnects: 3000-3499 come back, 3500-3999 stay away -------------------
CONNECTION_CLOSED = Disconnect(3000, "connection closed")
SHUTDOWN = Disconnect(3001, "shutdown")
SERVER_ERROR = Disconnect(3004, "internal server error")
CONNECTION_EXPIRED = Disconnect(3005, "connection expired")
SUBSCRIPTION_EXPIRED = Disconnect(3006, "subscription expired")
SLOW = Disconnect(3008, "slow")
WRITE_ERROR = Disconnect(3009, "write error")
INSUFFICIENT_STATE = Disconnect(3010, "insufficient state")
FORCE_RECONNECT = Disconnect(3011, "force reconnect")
NO_PONG = Disconnect(3012, "no pong")
RATE_LIMITED = Disconnect(3013, "too many requests")
STATE_INVALIDATED = Disconnect(3014, "state invalidated")
INVALID_TOKEN = Disconnect(3500, "invalid token")
MALFORMED = Disconnect(3501, "bad request")
STALE = Disconnect(3502, "stale")
FORCE_DISCONNECT = Disconnect(3503, "force disconnect")
CONNECTION_LIMIT = Disconnect(3504, "connection limit")
CHANNEL_LIMIT = Disconnect(3505, "channel limit")
INAPPROPRIATE_PROTOCOL = Disconnect(3506, "inappropriate protocol")
FORBIDDEN = Disconnect(3507, "permission denied")
UNSUPPORTED = Disconnect(3508, "not available")
TOO_MANY_ERRORS = Disconnect(3509, "too many errors")

DISCONNECTS = {
    disconnect.code: disconnect
    for disconnect in (
        CONNECTION_CLOSED,
        SHUTDOWN,
        SERVER_ERROR,
        CONNECTION_EXPIRED,
        SUBSCRIPTION_EXPIRED,
        SLOW,
        WRITE_ERROR,
        INSUFFICIENT_STATE,
        FORCE_RECONNECT,
        NO_PONG,
        RATE_LIMITED,
        STATE_INVALIDATED,
        INVALID_TOKEN,
        MALFORMED,
        STALE,
        FORCE_DISCONNECT,
        CONNECTION_LIMIT,
        CHANNEL_LIMIT,
        INAPPROPRIATE_PROTOCOL,
        FORBIDDEN,
        UNSUPPORTED,
        TOO_MANY_ERRORS,
    )
}

# --- unsubscribes: below 2500 for good, from 2500 subscribe again ------------
SERVER_UNSUBSCRIBE = Unsubscribe(2000, "server unsubscribe")
UNSUBSCRIBE_INSUFFICIENT_STATE = Unsubscribe(2500, "insufficient state")
UNSUBSCRIBE_EXPIRED = Unsubscribe(2501, "subscription expired")
UNSUBSCRIBE_STATE_INVALIDATED = Unsubscribe(2502, "state invalidated")


class Refused(Exception):
    """The peer asked for something it does not get: answer this command with ``refusal``.

    ``why`` goes to the log only; it names the rule or the setting to look at.
    """

    def __init__(self, refusal: Refusal, why: str = "") -> None:
        super().__init__(f"{refusal.code} {refusal.message}: {why}" if why else f"{refusal.code} {refusal.message}")
        self.refusal = refusal
        self.why = why


class Disconnected(Exception):
    """The peer broke a rule of the connection: end it with ``disconnect``.

    ``why`` goes to the log only; it names the rule or the setting to look at.
    """

    def __init__(self, disconnect: Disconnect, why: str = "") -> None:
        super().__init__(
            f"{disconnect.code} {disconnect.reason}: {why}" if why else f"{disconnect.code} {disconnect.reason}"
        )
        self.disconnect = disconnect
        self.why = why


class Unavailable(Exception):
    """A seam cannot answer now, and says in operator's words what is wrong.

    For a read it means "nothing is known".  For a write it means "the outcome
    is unknown": the publication may be stored or not, and only a retry with an
    idempotency key is safe.  The client gets error 100.
    """


class Overdue(Unavailable):
    """Too many come back at once: the turn of this one does not come in time, and it had better come again."""


class Unsubscribed(Exception):
    """A subscription was closed before it began; whoever closed it has seen to what its client is told."""
