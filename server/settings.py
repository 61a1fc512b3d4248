"""Settings: what an operator may decide, as one frozen and typed tree.

``Settings`` is the tree: each field has its type, its default, its unit and a
line of help.  Names are Centrifugo v6's wherever the meaning is Centrifugo's, so
that its users can bring their file.  ``load`` reads a file (TOML, YAML or JSON),
the environment (``WATERSPOUT_HTTP_SERVER__PORT``) and flags; later ones win, key
by key, and lists are replaced whole.  Everything else in this program is handed
its settings as an argument and reads neither environment nor options.

Theory of operation
-------------------
Somebody who starts a server wants to hear of all mistakes at once, each with the
place to mend it.  A model that is fed with the merged sources cannot do that: a
fault in the file hides behind the flag that overrides it, the first broken
variable ends the reading, and nobody knows any more where a value came from.
Hence three steps:

1. Each source becomes a *layer*: the file is one, every environment variable is
   one, the flags are one.  pydantic-settings reads file and variables.
2. Each layer is validated alone, which finds unknown names and wrong values and
   names their source.  What was faulty is cut out.
3. What is left is merged, which cannot fail any more, and looked through for
   contradictions: values that are right alone and wrong together.  A contradiction
   that involves a value with a fault of its own is not reported; mend that first.

Where nothing is configured, the server is open to everybody on this machine, so
that a newcomer can try everything (``TRY_OUT``).  The first option that is set,
whatever its value, makes the defaults Centrifugo's closed ones, and they stay so.

Imports nothing of ours.  Neither reads a clock nor the process's environment:
both come as arguments.
"""

import copy
import difflib
import ipaddress
import json
import os.path
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import yaml  # type: ignore[import-untyped]
from annotated_types import Ge, Gt, Le
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    JsonConfigSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
    YamlConfigSettingsSource,
)
from pydantic_settings import SettingsError as SourceError

PREFIX = "WATERSPOUT_"
HOUR_S = 3600.0
LONGEST_S = 876_000 * HOUR_S
LOOPBACK = ("127.0.0.1", "::1", "localhost")

Place = tuple[str | int, ...]
"""Where a value stands: option names from the top down, and numbers where there is a list."""

UNNAMED = "--"
"""Stands in for a namespace's name that was faulty, so that the rest can still be looked at."""


# --- faults ------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Fault:
    """One mistake of a configuration.

    ``name`` is the option's full dotted name; ``expected`` and ``found`` are
    words for an operator, and never hold a secret; ``source`` is the file, the
    environment variable, ``flag``, or ``default``, joined by commas if several
    made the mistake together.
    """

    name: str
    expected: str
    found: str
    source: str

    def __str__(self) -> str:
        return f"{self.name}: expected {self.expected}, found {self.found} ({self.source})"


class SettingsError(Exception):
    """The configuration cannot be used; ``faults`` says everything that is wrong with it.

    As text, one line for each fault.
    """

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__("\n".join(str(fault) for fault in faults))
        self.faults = faults


# --- kinds of values ---------------------------------------------------------
# A validator of ours raises ValueError with the words that follow "expected".
@dataclass(frozen=True, slots=True)
class Kind:
    """What a value is called, article included; a ``secret`` is never shown."""

    text: str
    secret: bool = False


NANOSECONDS = {
    "ns": 1,
    "us": 10**3,
    "µs": 10**3,
    "μs": 10**3,
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}
DURATION = re.compile(r"(?:(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:ns|us|µs|μs|ms|s|m|h))+")
DURATION_PART = re.compile(r"([0-9.]+)([a-zµμ]+)")


def parse_duration(value: object) -> float:
    """Read a duration in Go's form, such as ``"1h30m"`` or ``"500ms"``, as seconds.

    ``"0"`` needs no unit, as in Go.  Nothing here is counted in less than a
    millisecond, so that a shorter duration would silently become zero: refused.
    Raises ``ValueError`` with what was expected.
    """
    match value:
        case int() | float() if not isinstance(value, bool):
            raise ValueError(f'a duration with its unit: write "{value}s" for seconds')
        case str():
            text = value.strip()
        case _:
            raise ValueError('a duration such as "300s"')
    if text == "0":
        return 0.0
    if re.fullmatch(r"[0-9]+(?:\.[0-9]*)?", text):
        raise ValueError(f'a duration with its unit: write "{text}s" for seconds')
    if not DURATION.fullmatch(text):
        raise ValueError('a duration such as "300s", "1h30m" or "500ms"')
    nanoseconds = sum(Decimal(count) * NANOSECONDS[unit] for count, unit in DURATION_PART.findall(text))
    seconds = float(nanoseconds / 10**9)
    if 0 < nanoseconds < 10**6:
        raise ValueError('a duration of "1ms" or more, or "0s"')
    if seconds > LONGEST_S:
        raise ValueError(f'a duration of "{duration_text(LONGEST_S)}" or less')
    return seconds


def parse_duration_or_no_limit(value: object) -> float:
    """As ``parse_duration``; and ``-1``, as a number or as text, is -1.0: no limit."""
    if value == "-1" or (value == -1 and not isinstance(value, bool)):
        return -1.0
    try:
        return parse_duration(value)
    except ValueError as error:
        raise ValueError(f'{error}, or "-1" for no limit') from None


def duration_text(seconds: float) -> str:
    """Write seconds in the form that ``parse_duration`` reads: hours, seconds or milliseconds; -1 is ``"-1"``."""
    if seconds == -1:
        return "-1"
    if seconds and seconds % HOUR_S == 0:
        return f"{int(seconds / HOUR_S)}h"
    if seconds == int(seconds):
        return f"{int(seconds)}s"
    return f"{Decimal(repr(seconds)) * 1000:f}".rstrip("0").rstrip(".") + "ms"


def _no_boolean(value: object) -> object:
    # Python calls True an integer; "history_size: yes" is a slip.
    if isinstance(value, bool):
        raise PydanticCustomError("not_an_integer", "a boolean is no integer")
    return value


def _matching(pattern: str, expected: str) -> AfterValidator:
    compiled = re.compile(pattern)

    def check(value: str) -> str:
        if not compiled.fullmatch(value):
            raise ValueError(expected)
        return value

    return AfterValidator(check)


def _regex(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"a regular expression ({error})") from None
    return value


def _network(value: str) -> str:
    try:
        ipaddress.ip_network(value, strict=False)
    except ValueError:
        raise ValueError('an IP address or a network such as "10.0.0.0/8"') from None
    return value


def _handler_prefix(value: str) -> str:
    prefix = value.rstrip("/")
    if not re.fullmatch(r"(?:/[-._~A-Za-z0-9]+)+", prefix):
        raise ValueError('a path such as "/connection/websocket"')
    return prefix


def _log_level(value: object) -> object:
    return "warn" if value == "warning" else value


def _only_stream(what: str) -> BeforeValidator:
    def check(value: object) -> str:
        if value not in ("stream", ""):
            raise ValueError(f'"stream", the only {what} there is here')
        return "stream"

    return BeforeValidator(check)


def _hide(value: str) -> str:
    return "***" if value else ""


Integer = Annotated[int, BeforeValidator(_no_boolean)]
Seconds = Annotated[
    float,
    BeforeValidator(parse_duration),
    PlainSerializer(duration_text, return_type=str, when_used="json"),
    Kind("a duration"),
]
SecondsOrNoLimit = Annotated[
    float,
    BeforeValidator(parse_duration_or_no_limit),
    PlainSerializer(duration_text, return_type=str, when_used="json"),
    Kind('a duration, or "-1" for no limit'),
]
Secret = Annotated[
    str,
    Field(repr=False),
    PlainSerializer(_hide, return_type=str, when_used="json"),
    Kind("a string", secret=True),
]
Regex = Annotated[str, AfterValidator(_regex), Kind("a regular expression")]
HandlerPrefix = Annotated[str, AfterValidator(_handler_prefix), Kind("a path")]
Url = Annotated[str, _matching(r"|https?://[^\s/]\S*", 'a URL that begins with "https://" or "http://"'), Kind("a URL")]
HeaderName = Annotated[str, _matching(r"[-!#$%&'*+.^_`|~0-9A-Za-z]*", "the name of an HTTP header")]
ClaimName = Annotated[str, _matching(r"[a-zA-Z_]*", 'a claim\'s name of letters and "_"')]
Symbol = Annotated[str, _matching(r"[!-~]+", "one or more printable ASCII characters, no space")]
NamespaceName = Annotated[
    str, _matching(r"[-a-zA-Z0-9_.]{2,}", 'a name of two or more letters, digits, "-", "_" and "."'), Kind("a name")
]
Address = Annotated[str, _matching(r"\S*", "an IP address or a host name")]
Network = Annotated[str, AfterValidator(_network)]
DataFormat = Literal["", "json", "json_object", "binary"]
LogLevel = Annotated[Literal["none", "trace", "debug", "info", "warn", "error"], BeforeValidator(_log_level)]


# --- the tree ----------------------------------------------------------------
class Section(BaseModel):
    """A group of options."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_means_default(cls, value: object) -> object:
        # In YAML a heading whose options are all commented out is null.
        return {} if value is None else value


class TlsSettings(Section):
    """TLS of the HTTP server."""

    enabled: bool = Field(default=False, description="Serve HTTPS and WSS instead of HTTP and WS.")
    cert_pem: str = Field(default="", description="Certificate chain: a file's path, or PEM text.")
    key_pem: Secret = Field(default="", description="Private key: a file's path, or PEM text.")


class HttpServerSettings(Section):
    """Where the server listens."""

    address: Address = Field(
        default="127.0.0.1",
        description='Address to listen on; "" listens on all of them (which is Centrifugo\'s default, and not ours).',
    )
    port: Integer = Field(default=8000, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one.")
    tls: TlsSettings = Field(default_factory=TlsSettings, description="TLS of the HTTP server.")
    trusted_proxies: Annotated[tuple[Network, ...], Kind("a list of IP addresses and networks")] = Field(
        default=(),
        description="Reverse proxies whose X-Forwarded-For is believed: IP addresses and networks (CIDR).",
    )


class LogSettings(Section):
    """What is logged, and how."""

    level: LogLevel = Field(
        default="info", description='Least weight that is logged; "warning" is another word for "warn".'
    )
    format: Literal["text", "json"] = Field(
        default="text", description="Lines for people, or one JSON object for each event."
    )


class TokenSettings(Section):
    """How tokens are verified (PROTOCOL 8)."""

    hmac_secret_key: Secret = Field(default="", description="Key for HS256, HS384 and HS512.")
    hmac_previous_secret_key: Secret = Field(
        default="", description="The HMAC key before the last rotation, accepted besides the present one."
    )
    hmac_previous_secret_key_valid_until: Integer = Field(
        default=0, ge=0, description="Unix time (s) until which the previous HMAC key is accepted; 0: no end."
    )
    rsa_public_key: str = Field(default="", description="Public key for RS256, RS384 and RS512, PEM text.")
    ecdsa_public_key: str = Field(default="", description="Public key for ES256, ES384 and ES512, PEM text.")
    ed25519_public_key: str = Field(default="", description="Public key for EdDSA (Ed25519), PEM text.")
    jwks_public_endpoint: Url = Field(
        default="",
        description="URL of a JWKS with the public keys; {{name}} stands for a named group of issuer_regex or "
        "audience_regex. Excludes the static keys.",
    )
    audience: str = Field(default="", description="Exact value that the claim aud must have or contain.")
    audience_regex: Regex = Field(default="", description="Pattern that the claim aud must match. Excludes audience.")
    issuer: str = Field(default="", description="Exact value that the claim iss must have.")
    issuer_regex: Regex = Field(default="", description="Pattern that the claim iss must match. Excludes issuer.")
    user_id_claim: ClaimName = Field(default="", description='Claim that names the user; "" stands for sub.')


class SubscriptionTokenSettings(TokenSettings):
    """A separate set for subscription tokens (PROTOCOL 8.2)."""

    enabled: bool = Field(
        default=False, description="Verify subscription tokens with this set instead of client.token."
    )


class PersonalChannelSettings(Section):
    """The personal channel of each user (PROTOCOL 9.2)."""

    enabled: bool = Field(default=False, description="Subscribe each signed-in user to a channel of their own.")
    personal_channel_namespace: str = Field(
        default="", description='Namespace of personal channels; "" is channel.without_namespace.'
    )
    single_connection: bool = Field(
        default=False, description="A user's new connection ends their others (3504); needs presence there."
    )


class ClientSettings(Section):
    """What clients may do, and what they may cost."""

    allowed_origins: Annotated[tuple[str, ...], Kind("a list of strings")] = Field(
        default=(),
        description='Web origins that may connect: patterns such as "https://*.example.com", or "*" for all. '
        "Requests without Origin are not concerned.",
    )
    insecure: bool = Field(
        default=False, description="Everybody may do everything, without a token. For development only."
    )
    insecure_skip_token_signature_verify: bool = Field(
        default=False, description="Believe tokens without checking their signature. For development only."
    )
    allow_anonymous_connect_without_token: bool = Field(
        default=False, description='Let clients connect without a token, as the user "".'
    )
    disallow_anonymous_connection_tokens: bool = Field(default=False, description="Refuse tokens that name no user.")
    user_id_http_header: HeaderName = Field(
        default="", description="Header in which a trusted reverse proxy names the user; it must strip the client's."
    )
    connect_include_server_time: bool = Field(
        default=False, description="Tell clients the server's time (Unix ms) when they connect."
    )
    ping_interval: Seconds = Field(default=25.0, ge=1.0, description="Time from one ping to the next.")
    pong_timeout: Seconds = Field(
        default=8.0, gt=0.0, description="Time to answer a ping (3012); shorter than ping_interval."
    )
    stale_close_delay: Seconds = Field(default=10.0, gt=0.0, description="Time to send connect (3502).")
    expired_close_delay: Seconds = Field(
        default=25.0, description="Grace of a connection whose token has expired (3005)."
    )
    expired_sub_close_delay: Seconds = Field(
        default=25.0, description="Grace of a subscription whose token has expired (2501, 3006)."
    )
    queue_max_size: Integer = Field(
        default=1_048_576, ge=1, description="Bytes that may wait for one connection before it is cut (3008)."
    )
    channel_limit: Integer = Field(default=128, ge=1, description="Subscriptions of one connection (106, 3505).")
    user_connection_limit: Integer = Field(
        default=0, ge=0, description="Connections of one user to this process (3504); 0: no limit."
    )
    connection_limit: Integer = Field(
        default=0, ge=0, description="Connections to this process (HTTP 503); 0: no limit."
    )
    connection_rate_limit: Integer = Field(
        default=0, ge=0, description="New connections a second to this process (HTTP 503); 0: no limit."
    )
    history_max_publication_limit: Integer = Field(
        default=300, ge=0, description="Publications in one answer to a client's history command; 0: no limit."
    )
    recovery_max_publication_limit: Integer = Field(
        default=0,
        ge=0,
        description="Publications that one recovery may bring; 0: no limit, since recovery is paged here "
        "(Centrifugo's default is 300).",
    )
    outbox_stall_timeout: Seconds = Field(
        default=10.0, gt=0.0, description="Time without any progress of a socket that has something waiting (3008)."
    )
    subscribe_to_user_personal_channel: PersonalChannelSettings = Field(
        default_factory=PersonalChannelSettings, description="The personal channel of each user."
    )
    token: TokenSettings = Field(default_factory=TokenSettings, description="How tokens are verified.")
    subscription_token: SubscriptionTokenSettings = Field(
        default_factory=SubscriptionTokenSettings, description="A separate set for subscription tokens."
    )


class ChannelOptions(Section):
    """What the channels of one namespace are and who may do what in them (PROTOCOL 9.3)."""

    presence: bool = Field(default=False, description="Know who is subscribed.")
    join_leave: bool = Field(default=False, description="Tell when somebody subscribes or leaves.")
    force_push_join_leave: bool = Field(
        default=False, description="Deliver joins and leaves to every subscriber, asked for or not."
    )
    history_size: Integer = Field(
        default=0,
        ge=-1,
        description="Publications that are kept; -1: no limit, 0: none. With history_ttl, or neither.",
    )
    history_ttl: SecondsOrNoLimit = Field(
        default=0.0, description='Time that each publication is kept; "-1": no limit. With history_size, or neither.'
    )
    history_meta_ttl: Seconds = Field(
        default=0.0,
        description="Time that offset and epoch outlive the last publication; 0s: channel.history_meta_ttl.",
    )
    force_positioning: bool = Field(default=False, description="Watch the position of every subscription.")
    allow_positioning: bool = Field(default=False, description="Watch the position of subscriptions that ask for it.")
    force_recovery: bool = Field(default=False, description="Recovery for every subscription; needs history.")
    allow_recovery: bool = Field(default=False, description="Recovery for subscriptions that ask for it.")
    force_recovery_mode: Annotated[Literal["stream"], _only_stream("recovery mode")] = Field(
        default="stream", description="How recovery works: from publication to publication."
    )
    recovery_max_publication_limit: Integer = Field(
        default=0,
        ge=0,
        description="Publications that one recovery may bring; 0: client.recovery_max_publication_limit.",
    )
    allow_subscribe_for_client: bool = Field(default=False, description="Signed-in users may subscribe without token.")
    allow_subscribe_for_anonymous: bool = Field(
        default=False, description="allow_subscribe_for_client holds for anonymous users, too."
    )
    allow_publish_for_client: bool = Field(default=False, description="Signed-in users may publish.")
    allow_publish_for_subscriber: bool = Field(default=False, description="Signed-in subscribers may publish.")
    allow_publish_for_anonymous: bool = Field(
        default=False, description="The two options before hold for anonymous users, too."
    )
    allow_history_for_client: bool = Field(default=False, description="Signed-in users may read history.")
    allow_history_for_subscriber: bool = Field(default=False, description="Signed-in subscribers may read history.")
    allow_history_for_anonymous: bool = Field(
        default=False, description="The two options before hold for anonymous users, too."
    )
    allow_presence_for_client: bool = Field(default=False, description="Signed-in users may ask who is here.")
    allow_presence_for_subscriber: bool = Field(default=False, description="Signed-in subscribers may ask who is here.")
    allow_presence_for_anonymous: bool = Field(
        default=False, description="The two options before hold for anonymous users, too."
    )
    allow_user_limited_channels: bool = Field(
        default=False, description="The users that a channel's name lists may subscribe, and no others."
    )
    channel_regex: Regex = Field(
        default="", description='Pattern that the name after the namespace must match; "": any ASCII name.'
    )
    publication_data_format: DataFormat = Field(
        default="", description='What data must be; "": channel.publication_data_format.'
    )
    subscription_type: Annotated[Literal["stream"], _only_stream("subscription type")] = Field(
        default="stream", description="How subscriptions work: a stream of publications."
    )

    @property
    def kept(self) -> bool:
        """Are publications numbered, kept and recoverable, or only passed on?"""
        return self.history_size != 0 and self.history_ttl != 0


class Namespace(ChannelOptions):
    """The options of the channels whose name begins with ``name`` and the boundary (PROTOCOL 9.1)."""

    name: NamespaceName = Field(description="What stands before the first namespace_boundary of a channel's name.")


class ChannelSettings(Section):
    """Names, and the options behind them."""

    max_length: Integer = Field(default=255, ge=1, description="Bytes that a channel's name may have (107).")
    private_prefix: Symbol = Field(default="$", description="Channels that begin so need a subscription token.")
    namespace_boundary: Symbol = Field(default=":", description="What ends the namespace in a channel's name.")
    user_boundary: Symbol = Field(default="#", description="What begins the list of users in a channel's name.")
    user_separator: Symbol = Field(default=",", description="What stands between two users in a channel's name.")
    history_meta_ttl: Seconds = Field(
        default=720 * HOUR_S, gt=0.0, description="Time that offset and epoch outlive the last publication."
    )
    idempotency_ttl: Seconds = Field(
        default=24 * HOUR_S, gt=0.0, description="Time that a channel remembers an idempotency key."
    )
    publication_data_format: DataFormat = Field(
        default="",
        description='What data must be: anything but nothing (""), JSON, a JSON object, or anything at all.',
    )
    without_namespace: ChannelOptions = Field(
        default_factory=ChannelOptions, description="Options of channels without a namespace."
    )
    namespaces: Annotated[tuple[Namespace, ...], Kind("a list of objects")] = Field(
        default=(), description="Namespaces, each with a name and any option of channel.without_namespace."
    )


class HttpApiSettings(Section):
    """The API for back ends (PROTOCOL 15)."""

    disabled: bool = Field(default=False, description="Offer no API for back ends.")
    key: Secret = Field(default="", description="Key that a back end sends; without one every request is refused.")
    insecure: bool = Field(default=False, description="Ask for no key. For development only.")
    handler_prefix: HandlerPrefix = Field(default="/api", description="Path of the API.")


class WebsocketSettings(Section):
    """The WebSocket transport (PROTOCOL 2.3)."""

    disabled: bool = Field(default=False, description="Offer no WebSocket transport.")
    handler_prefix: HandlerPrefix = Field(default="/connection/websocket", description="Path of the transport.")
    message_size_limit: Integer = Field(
        default=65_536, ge=1, description="Bytes that one message of a client may have (close code 1009)."
    )


class RpcPingSettings(Section):
    """The remote procedure ``ping``."""

    enabled: bool = Field(default=False, description='Answer the remote procedure "ping" with an empty result.')


class RpcSettings(Section):
    """Remote procedure calls of clients (PROTOCOL 4.7)."""

    ping: RpcPingSettings = Field(default_factory=RpcPingSettings, description='The remote procedure "ping".')


class PresenceSettings(Section):
    """Who is here."""

    lease: Seconds = Field(
        default=10.0, ge=1.0, description="Time after which the clients of a process that fell silent are gone."
    )


class SqliteSettings(Section):
    """History in one local file."""

    path: Annotated[str, Kind("a file's path")] = Field(
        default="waterspout.db", min_length=1, description='Database file; ":memory:" survives no restart.'
    )
    publish_timeout: Seconds = Field(
        default=3.0, gt=0.0, description="Time for a publication to be stored, else error 100: outcome unknown."
    )


class ShutdownSettings(Section):
    """How the server ends."""

    timeout: Seconds = Field(default=30.0, description="Time for all clients to leave after SIGTERM.")


class Settings(Section):
    """All settings; get them from ``load``."""

    http_server: HttpServerSettings = Field(default_factory=HttpServerSettings, description="Where it listens.")
    log: LogSettings = Field(default_factory=LogSettings, description="What is logged, and how.")
    client: ClientSettings = Field(default_factory=ClientSettings, description="What clients may do and cost.")
    channel: ChannelSettings = Field(default_factory=ChannelSettings, description="Names and the options behind them.")
    http_api: HttpApiSettings = Field(default_factory=HttpApiSettings, description="The API for back ends.")
    websocket: WebsocketSettings = Field(default_factory=WebsocketSettings, description="The WebSocket transport.")
    rpc: RpcSettings = Field(default_factory=RpcSettings, description="Remote procedure calls of clients.")
    presence: PresenceSettings = Field(default_factory=PresenceSettings, description="Who is here.")
    sqlite: SqliteSettings = Field(default_factory=SqliteSettings, description="History in one local file.")
    shutdown: ShutdownSettings = Field(default_factory=ShutdownSettings, description="How the server ends.")

    _configured: bool = PrivateAttr(default=True)

    @property
    def configured(self) -> bool:
        """Was anything set that matters?  If not, the server is open to everybody on this machine.

        What does not count: http_server.address, http_server.port, log, sqlite.
        """
        return self._configured


# --- trying out --------------------------------------------------------------
_OPEN: dict[str, Any] = {
    f"allow_{action}_for_{who}": True
    for action in ("subscribe", "publish", "history", "presence")
    for who in ("client", "anonymous")
}
_CHAT: dict[str, Any] = {
    **_OPEN,
    "history_size": 10_000,
    "history_ttl": "720h",
    "force_recovery": True,
    "presence": True,
    "join_leave": True,
}

TRY_OUT: Mapping[str, Any] = MappingProxyType(
    {
        "client": {
            "allow_anonymous_connect_without_token": True,
            "allowed_origins": ["http://localhost:*", "http://127.0.0.1:*", "http://[::1]:*"],
        },
        "channel": {
            "without_namespace": _CHAT,
            "namespaces": [
                {"name": "chat", **_CHAT, "force_push_join_leave": True},
                {"name": "live", **_OPEN, "presence": True, "join_leave": True},
                {"name": "game", **_CHAT, "history_size": 1_000, "history_ttl": "24h"},
            ],
        },
    }
)
"""What holds while nothing is configured: chat is kept, live is passing (cursors, typing marks), game is kept a day."""


def _matters(path: Place) -> bool:
    return path[0] not in ("log", "sqlite") and path not in (("http_server", "address"), ("http_server", "port"))


# --- looking at the tree -----------------------------------------------------
def _inner(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds, alone or in a list."""
    annotation: Any = field.annotation
    if get_origin(annotation) is tuple:
        annotation = get_args(annotation)[0]
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _is_list(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is tuple


def _walk(section: type[Section], above: Place = ()) -> Iterator[tuple[Place, FieldInfo]]:
    """Every option and group below ``section``; 0 stands for each place of a list."""
    for name, field in section.model_fields.items():
        yield (*above, name), field
        inner = _inner(field)
        if inner is not None:
            yield from _walk(inner, (*above, name, 0) if _is_list(field) else (*above, name))


_KNOWN: dict[Place, FieldInfo] = dict(_walk(Settings))


def _field_at(path: Place) -> FieldInfo | None:
    """The option at ``path``, or the list it is a part of; ``None`` for an unknown name."""
    places = tuple(0 if isinstance(part, int) else part for part in path)
    if places and places[-1] == 0:
        places = places[:-1]
    return _KNOWN.get(places)


def _dotted(path: Place) -> str:
    return ".".join(part if isinstance(part, str) and re.fullmatch(r"[-\w]+", part) else ascii(part) for part in path)


def _variable(path: Place) -> str:
    return PREFIX + "__".join(str(part) for part in path).upper()


def _marker(field: FieldInfo) -> Kind | None:
    return next((item for item in field.metadata if isinstance(item, Kind)), None)


def _kind(field: FieldInfo) -> str:
    """What a field's value must be, in words that follow "expected"."""
    annotation: Any = field.annotation
    marker = _marker(field)
    if marker is not None:
        words = marker.text
    elif annotation is bool:
        words = "true or false"
    elif annotation is int:
        words = "an integer"
    elif annotation is str:
        words = "a string"
    elif get_origin(annotation) is Literal:
        *others, last = (json.dumps(choice) for choice in get_args(annotation))
        words = f"{', '.join(others)} or {last}" if others else last
    else:
        words = "an object"
    write: Callable[[Any], object] = duration_text if annotation is float else lambda bound: bound
    for item in field.metadata:
        if isinstance(item, Ge):
            words += f" ≥ {write(item.ge)}"
        elif isinstance(item, Gt):
            words += f" > {write(item.gt)}"
        elif isinstance(item, Le):
            words += f", ≤ {write(item.le)}"
    return words


def _found(value: object, field: FieldInfo | None) -> str:
    """A value in words; what is or may hold a secret is named by its type only."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    marker = _marker(field) if field is not None else None
    if field is None or _inner(field) is not None or (marker is not None and marker.secret):
        return "a string" if isinstance(value, str) else "a value"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _nearest(path: Place) -> Place | None:
    """The known option that somebody who wrote ``path`` may have meant.

    A neighbour with nearly that name; else that very name elsewhere (a flat file of
    an older Centrifugo); else whatever is written nearly so in full.
    """
    places = tuple(0 if isinstance(part, int) else part for part in path)
    neighbours = {str(known[-1]): known for known in _KNOWN if known[:-1] == places[:-1]}
    close = difflib.get_close_matches(str(places[-1]), neighbours, n=1, cutoff=0.75)
    found = neighbours[close[0]] if close else next((known for known in _KNOWN if known[-1] == places[-1]), None)
    if found is None:
        # One underscore or two, dots or none: what is left is how it sounds.
        full = {re.sub("_+", "_", "_".join(map(str, known))): known for known in _KNOWN}
        sound = re.sub("_+", "_", "_".join(map(str, places)))
        close = difflib.get_close_matches(sound, full, n=1, cutoff=0.75)
        if not close:
            return None
        found = full[close[0]]
    return (*path[: len(found) - 1], found[-1]) if found[:-1] == places[:-1] else found


# --- layers ------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _Layer:
    """What one source says: ``data`` as nested options, not validated yet."""

    source: str
    data: dict[str, Any]
    variable: bool = False


def _named(value: Any) -> Any:
    """``value`` with text for all names; YAML reads ``on:`` as True and ``1:`` as a number."""
    if isinstance(value, Mapping):
        return {str(name): _named(below) for name, below in value.items()}
    if isinstance(value, list | tuple):
        return [_named(below) for below in value]
    return value


class _Described(Settings, BaseSettings):
    """The tree as the sources of pydantic-settings want to see it; there is never an instance of it."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, case_sensitive=True)


_READERS: dict[str, Callable[[Path], Mapping[str, Any]]] = {
    ".toml": lambda path: TomlConfigSettingsSource(_Described, path)(),
    ".yaml": lambda path: YamlConfigSettingsSource(_Described, path)(),
    ".yml": lambda path: YamlConfigSettingsSource(_Described, path)(),
    ".json": lambda path: JsonConfigSettingsSource(_Described, path)(),
}


def _read_file(config: Path) -> tuple[list[_Layer], list[Fault]]:
    """The file as a layer; a file that cannot be read is one fault, which never quotes its text."""

    def broken(expected: str, found: str) -> tuple[list[_Layer], list[Fault]]:
        return [], [Fault(str(config), expected, found, "--config")]

    read = _READERS.get(config.suffix.lower())
    if read is None:
        return broken("a file that ends in .toml, .yaml, .yml or .json", repr(config.suffix))
    try:
        # The sources take a missing file for an empty one, so look first.
        with config.expanduser().open("rb"):
            data = read(config)
    except OSError as error:
        return broken("a readable file", error.strerror or type(error).__name__)
    except json.JSONDecodeError as error:
        return broken("JSON", f"{error.msg} at line {error.lineno}, column {error.colno}")
    except tomllib.TOMLDecodeError as error:
        return broken("TOML", str(error))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        return broken("YAML", f"{error.problem}{place}")
    except UnicodeDecodeError as error:
        return broken("UTF-8 text", f"another byte at {error.start}")
    except (TypeError, ValueError, yaml.YAMLError):
        return broken("options at the top level, by name", "something else")
    return [_Layer(str(config), _named(data))], []


def _read_environment(environ: Mapping[str, str]) -> tuple[list[_Layer], list[Fault]]:
    """A layer for each variable that is ours, the more special ones later."""
    layers, faults = [], []
    # It takes a look at the process's own environment when made; that is replaced before each use.
    source = EnvSettingsSource(_Described, case_sensitive=True, env_prefix="", env_nested_delimiter="__")
    ours = [name for name in environ if name.upper().startswith(PREFIX)]
    for variable in sorted(ours, key=lambda name: (name.count("__"), name)):
        parts = variable[len(PREFIX) :].lower().split("__")
        path = tuple(parts)
        whole = tuple(takewhile(lambda part: not part.isdecimal(), parts))
        listed = _field_at(whole)
        if whole != path and listed is not None and _is_list(listed):
            expected = f"the whole list as JSON in {_variable(whole)}"
            faults.append(Fault(_dotted(path), expected, "a part of it", variable))
            continue
        if _field_at(path) is None or variable != variable.upper():
            faults.append(_unknown(path, _Layer(variable, {}, variable=True)))
            continue
        source.env_vars = {"__".join(path): environ[variable]}
        try:
            layers.append(_Layer(variable, source(), variable=True))
        except SourceError:
            faults.append(Fault(_dotted(path), "a list or an object as JSON", "text that is no JSON", variable))
    return layers, faults


# --- faults of one layer -----------------------------------------------------
def _unknown(path: Place, layer: _Layer) -> Fault:
    near = _nearest(path)
    if near is None:
        hint = ""
    elif layer.variable and all(isinstance(part, str) for part in near):
        hint = f" (perhaps {_variable(near)})"
    else:
        hint = f" (perhaps {_dotted(near)})"
    return Fault(_dotted(path), f"a known option{hint}", "an unknown name", layer.source)


def _fault(error: ErrorDetails, layer: _Layer) -> Fault:
    path = error["loc"]
    field = _field_at(path)
    if error["type"] == "extra_forbidden" or field is None:
        return _unknown(path, layer)
    if error["type"] == "value_error":
        expected = str(error["ctx"]["error"])
    elif isinstance(path[-1], int):
        expected = "a string" if _inner(field) is None else "an object"
    else:
        expected = _kind(field)
    if error["type"] == "missing":
        found = "nothing"
    elif error["type"].startswith("greater_than") and field.annotation is float:
        found = duration_text(error["input"])  # the bound is checked after the text was read
    else:
        found = _found(error["input"], field)
    return Fault(_dotted(path), expected, found, layer.source)


def _cut(data: dict[str, Any], path: Place) -> None:
    """Take the faulty value at ``path`` out of ``data``, in place, and leave something valid."""
    holder: Any = data
    try:
        for part in path[:-1]:
            holder = holder[part]
    except LookupError:
        return  # gone already, with the list around it
    last, field = path[-1], _field_at(path)
    if isinstance(holder, dict):
        if field is not None and field.is_required():
            holder[last] = UNNAMED
        else:
            holder.pop(last, None)
    elif isinstance(holder, list) and field is not None and _inner(field) is not None:
        holder[int(last)] = {"name": UNNAMED}
    else:
        _cut(data, path[:-1])


def _check(layer: _Layer) -> tuple[dict[str, Any], list[Fault], list[Place]]:
    """Validate a layer alone: what is sound in it, its faults, and where they are."""
    try:
        Settings.model_validate(layer.data)
    except ValidationError as invalid:
        errors = invalid.errors(include_url=False)
    else:
        return layer.data, [], []
    sound = copy.deepcopy(layer.data)
    for error in errors:
        _cut(sound, error["loc"])
    return sound, [_fault(error, layer) for error in errors], [error["loc"] for error in errors]


# --- merging -----------------------------------------------------------------
def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        below = merged.get(name)
        if isinstance(below, Mapping):
            if value is not None:  # an empty heading says nothing
                merged[name] = _merge(below, value)
        else:
            merged[name] = value
    return merged


def _leaves(data: Mapping[Any, Any], above: Place = ()) -> Iterator[Place]:
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*above, name))
        elif value is not None:
            yield (*above, name)


def _source_of(path: Place, layers: list[_Layer]) -> str | None:
    """Who said what holds at ``path``; ``None`` if it is the default."""
    for layer in reversed(layers):
        value: Any = layer.data
        try:
            for part in path:
                value = value[part]
        except (LookupError, TypeError):
            continue
        return layer.source
    return None


# --- contradictions ----------------------------------------------------------
class _Clash(NamedTuple):
    """Values that are right alone and wrong together; ``paths`` are all of them, the first one is to blame."""

    paths: tuple[Place, ...]
    expected: str
    found: str


def _server_clashes(settings: Settings) -> Iterator[_Clash]:
    address = settings.http_server.address
    if not settings.configured and address not in LOOPBACK:
        yield _Clash(
            (("http_server", "address"),),
            '"127.0.0.1", "::1" or "localhost" while nothing is configured and everybody may do everything; '
            "to be seen from outside, configure who may connect (client.token or another way to sign in, "
            "client.allowed_origins) and where to (channel.namespaces)",
            repr(address),
        )
    tls = settings.http_server.tls
    if tls.enabled:
        for name, text in (("cert_pem", tls.cert_pem), ("key_pem", tls.key_pem)):
            if "-----BEGIN " not in text and not os.path.isfile(text):
                found = "a path of no file, or text that is no PEM" if text else "nothing"
                paths = (("http_server", "tls", name), ("http_server", "tls", "enabled"))
                yield _Clash(paths, "a file's path or PEM text, since http_server.tls.enabled is true", found)
    one, other = settings.websocket, settings.http_api
    nested = f"{one.handler_prefix}/".startswith(f"{other.handler_prefix}/")
    nested = nested or f"{other.handler_prefix}/".startswith(f"{one.handler_prefix}/")
    if nested and not one.disabled and not other.disabled:
        yield _Clash(
            (("websocket", "handler_prefix"), ("http_api", "handler_prefix")),
            f'a path apart from http_api.handler_prefix ("{other.handler_prefix}")',
            repr(one.handler_prefix),
        )


def _client_clashes(settings: Settings) -> Iterator[_Clash]:
    client = settings.client
    if client.pong_timeout >= client.ping_interval:
        yield _Clash(
            (("client", "pong_timeout"), ("client", "ping_interval")),
            f"less than client.ping_interval ({duration_text(client.ping_interval)})",
            duration_text(client.pong_timeout),
        )
    yield from _token_clashes(("client", "token"), client.token)
    yield from _token_clashes(("client", "subscription_token"), client.subscription_token)
    personal = client.subscribe_to_user_personal_channel
    if not personal.enabled:
        return
    above: Place = ("client", "subscribe_to_user_personal_channel")
    path = (*above, "personal_channel_namespace")
    name = personal.personal_channel_namespace
    namespaces = {namespace.name: namespace for namespace in settings.channel.namespaces}
    options = namespaces.get(name) if name else settings.channel.without_namespace
    if options is None:
        yield _Clash((path, ("channel", "namespaces")), "the name of a configured namespace", repr(name))
    elif personal.single_connection and not options.presence:
        yield _Clash(
            ((*above, "single_connection"), path, ("channel",)),
            f"presence to be on in {f'namespace {name}' if name else 'channel.without_namespace'} for it",
            "it off",
        )


def _token_clashes(above: Place, token: TokenSettings) -> Iterator[_Clash]:
    for exact, pattern in (("audience", "audience_regex"), ("issuer", "issuer_regex")):
        if getattr(token, exact) and getattr(token, pattern):
            yield _Clash(((*above, pattern), (*above, exact)), f"{exact} or {pattern}, not both", "both")
    if not token.jwks_public_endpoint:
        return
    endpoint: Place = (*above, "jwks_public_endpoint")
    static = ("hmac_secret_key", "hmac_previous_secret_key", "rsa_public_key", "ecdsa_public_key", "ed25519_public_key")
    given = [name for name in static if getattr(token, name)]
    if given:
        paths = (endpoint, *((*above, name) for name in given))
        yield _Clash(paths, "a JWKS endpoint or static keys, not both", f"{', '.join(given)} as well")
    groups = {name for pattern in (token.issuer_regex, token.audience_regex) for name in re.compile(pattern).groupindex}
    for name in re.findall(r"\{\{(.*?)\}\}", token.jwks_public_endpoint):
        if name not in groups:
            yield _Clash(
                (endpoint, (*above, "issuer_regex"), (*above, "audience_regex")),
                "each {{name}} to be a named group of issuer_regex or audience_regex",
                repr(name),
            )


def _channel_clashes(settings: Settings) -> Iterator[_Clash]:
    channel = settings.channel
    symbols: dict[str, str] = {}
    for name in ("private_prefix", "namespace_boundary", "user_boundary", "user_separator"):
        symbol = getattr(channel, name)
        if symbol in symbols:
            paths: tuple[Place, ...] = (("channel", name), ("channel", symbols[symbol]))
            yield _Clash(paths, f"something else than channel.{symbols[symbol]}", repr(symbol))
        symbols.setdefault(symbol, name)
    first: dict[str, int] = {}
    for place, namespace in enumerate(channel.namespaces):
        above: Place = ("channel", "namespaces", place)
        named: Place = (*above, "name")
        if namespace.name in first:
            twin: Place = ("channel", "namespaces", first[namespace.name], "name")
            yield _Clash((named, twin), f"a name that {_dotted(twin)} has not", repr(namespace.name))
        first.setdefault(namespace.name, place)
        if channel.namespace_boundary in namespace.name:
            yield _Clash(
                (named, ("channel", "namespace_boundary")),
                f"a name without channel.namespace_boundary ({channel.namespace_boundary!r})",
                repr(namespace.name),
            )
        yield from _history_clashes(above, namespace, channel.history_meta_ttl)
    yield from _history_clashes(("channel", "without_namespace"), channel.without_namespace, channel.history_meta_ttl)


def _history_clashes(above: Place, options: ChannelOptions, channel_meta_ttl: float) -> Iterator[_Clash]:
    size: Place = (*above, "history_size")
    ttl: Place = (*above, "history_ttl")
    if options.history_size and not options.history_ttl:
        yield _Clash((ttl, size), f"a duration, since history_size is {options.history_size} (both or neither)", "0s")
    elif options.history_ttl and not options.history_size:
        lasts = duration_text(options.history_ttl)
        yield _Clash((size, ttl), f"a number, since history_ttl is {lasts} (both or neither)", "0")
    elif options.force_recovery and not options.kept:
        yield _Clash(((*above, "force_recovery"), size, ttl), "history_size and history_ttl for it", "neither")
    own = options.history_meta_ttl
    meta_ttl = own or channel_meta_ttl
    if options.history_ttl > meta_ttl:
        meta: Place = (*above, "history_meta_ttl") if own else ("channel", "history_meta_ttl")
        expected = f"at most {_dotted(meta)} ({duration_text(meta_ttl)})"
        yield _Clash((ttl, meta), expected, duration_text(options.history_ttl))


def _overlap(one: Place, other: Place) -> bool:
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


def _contradictions(settings: Settings, layers: list[_Layer], faulty: list[Place]) -> Iterator[Fault]:
    for find in (_server_clashes, _client_clashes, _channel_clashes):
        for clash in find(settings):
            if any(_overlap(path, place) for path in clash.paths for place in faulty):
                continue
            sources = [_source_of(path, layers) for path in clash.paths]
            said = dict.fromkeys(source for source in sources if source is not None)
            yield Fault(_dotted(clash.paths[0]), clash.expected, clash.found, ", ".join(said) or "default")


# --- what others call --------------------------------------------------------
def load(
    *, config: Path | None, environ: Mapping[str, str], flags: Mapping[str, Any] = MappingProxyType({})
) -> Settings:
    """Read all sources and give the settings that hold.

    ``config`` is a file whose suffix tells TOML, YAML or JSON, or ``None``.
    ``environ`` are environment variables; those that begin with ``WATERSPOUT_``
    are ours, with ``__`` between two levels, and lists and objects as JSON.
    ``flags`` is a tree of overrides, such as ``{"http_server": {"port": 9000}}``.

    Raises ``SettingsError`` with every fault of every source.
    """
    layers, faults = _read_file(config) if config is not None else ([], [])
    more_layers, more_faults = _read_environment(environ)
    layers += more_layers
    faults += more_faults
    if flags:
        layers.append(_Layer("flag", _named(flags)))
    # Somebody who configured something, if only in vain, does not ask for the try-out.
    configured = bool(faults) or any(_matters(path) for layer in layers for path in _leaves(layer.data))
    merged: Mapping[str, Any] = {} if configured else TRY_OUT
    faulty: list[Place] = []
    for layer in layers:
        sound, layer_faults, places = _check(layer)
        faults += layer_faults
        faulty += places
        merged = _merge(merged, sound)
    settings = Settings.model_validate(merged)
    settings._configured = configured
    faults += _contradictions(settings, layers, faulty)
    if faults:
        raise SettingsError(faults)
    return settings


def without_secrets(settings: Settings) -> dict[str, Any]:
    """The settings as JSON can hold them, to be shown or logged.

    Durations are text such as ``"300s"``; a secret is ``"***"``, or ``""`` if it
    is not set.
    """
    return settings.model_dump(mode="json")


class Row(NamedTuple):
    """One option, for the table in the README."""

    name: str
    type: str
    default: str
    help: str


def reference() -> list[Row]:
    """Every option with its full name, type, default and help, in the order of the tree.

    The options of a namespace are those of ``channel.without_namespace``; only
    what a namespace has besides is listed again.
    """
    rows = []
    for path, field in _KNOWN.items():
        shared = path[:2] == ("channel", "namespaces") and path[-1] in ChannelOptions.model_fields
        if shared or (_inner(field) is not None and not _is_list(field)):
            continue
        marker = _marker(field)
        kind = re.sub("^an? ", "", _kind(field)) + (" (secret)" if marker is not None and marker.secret else "")
        rows.append(Row(_dotted(path), kind, _default_text(field), field.description or ""))
    return rows


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return json.dumps(duration_text(value) if isinstance(value, float) else value)
