"""Settings: what an operator may decide, as one frozen and typed tree.

``Settings`` is the tree: each field has its type, its default, its unit and a
line of help.  Names are Centrifugo v6's wherever the meaning is Centrifugo's, so
that its users can bring their file.  A field judges its own value and no other:
what is wrong only together is ``configuration``'s to find, and so is where a
value came from.

Where nothing is configured, the server is open to everybody on this machine, so
that a newcomer can try everything (``TRY_OUT``).  The first option that is set,
whatever its value, makes the defaults Centrifugo's closed ones, and they stay so.

Imports nothing of ours, and reads no file, no environment and no clock.
Everything in this program is handed its settings, or the section that concerns
it, as an argument.
"""

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit, urlunsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PrivateAttr,
    model_validator,
)
from pydantic_core import PydanticCustomError

HOUR_S = 3600.0
LONGEST_S = 876_000 * HOUR_S


# --- kinds of values ---------------------------------------------------------
# A validator of ours raises ValueError with the words that follow "expected".
@dataclass(frozen=True, slots=True)
class Kind:
    """What a value is called, article included; a ``secret`` is never shown."""

    text: str
    secret: bool = False


HEADER_NAME = r"[-!#$%&'*+.^_`|~0-9A-Za-z]+"
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


def _url(value: str) -> str:
    try:
        fits = re.fullmatch(r"|https?://[^\s/]\S*", value) and (urlsplit(value).port or True)
    except ValueError:  # no port, or half an IPv6 address
        fits = False
    if not fits:
        raise ValueError('a URL that begins with "https://" or "http://"')
    return value


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


def _recovery_mode(value: object) -> object:
    return value or "stream"


def _only_stream(what: str) -> BeforeValidator:
    def check(value: object) -> str:
        if value not in ("stream", ""):
            raise ValueError(f'"stream", the only {what} there is here')
        return "stream"

    return BeforeValidator(check)


def _hide(value: str) -> str:
    return "***" if value else ""


def _hide_login(value: str) -> str:
    """An address as it may be shown: who one is there, and what stands in the query, may be a secret."""
    url = urlsplit(value)
    login, _, place = url.netloc.rpartition("@")
    return urlunsplit(url._replace(netloc=f"***@{place}" if login else place, query=_hide(url.query)))


def _hide_values(value: dict[str, str]) -> dict[str, str]:
    return {name: _hide(text) for name, text in value.items()}


OWN_HEADERS = frozenset(
    (
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "expect",
        "host",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    )
)
"""What a request to a back end has of its own, so that no client's may take its place (RFC 9110 7.6.1)."""


def _forwardable(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if not re.fullmatch(HEADER_NAME, name) or name.lower() in OWN_HEADERS:
            raise ValueError(f"names of HTTP headers other than {', '.join(sorted(OWN_HEADERS))}")
    return names


def _headers(value: object) -> dict[str, str]:
    # The whole of it is judged here, since a fault inside of an object that is no section would have no name.
    headers = value if isinstance(value, Mapping) else {"": ""}
    for name, text in headers.items():
        good = isinstance(name, str) and re.fullmatch(HEADER_NAME, name) and name.lower() not in OWN_HEADERS
        if not good or not isinstance(text, str) or not re.fullmatch(r"[\t -~]*", text):
            raise ValueError(f"texts by the names of HTTP headers other than {', '.join(sorted(OWN_HEADERS))}")
    return dict(headers)


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
Url = Annotated[
    str,
    AfterValidator(_url),
    Field(repr=False),
    PlainSerializer(_hide_login, return_type=str, when_used="json"),
    Kind("a URL", secret=True),
]
MongoUrl = Annotated[
    str,
    _matching(r"|mongodb(\+srv)?://\S+", 'a URL that begins with "mongodb://" or "mongodb+srv://"'),
    Field(repr=False),
    PlainSerializer(_hide, return_type=str, when_used="json"),
    Kind("a URL", secret=True),
]
RedisUrl = Annotated[
    str,
    _matching(
        r"|rediss?(\+sentinel|\+cluster)?://\S+",
        'a URL that begins with "redis://", "redis+sentinel://" or "redis+cluster://" (with "rediss" for TLS)',
    ),
    Field(repr=False),
    PlainSerializer(_hide, return_type=str, when_used="json"),
    Kind("a URL", secret=True),
]
HeaderName = Annotated[str, _matching(r"[-!#$%&'*+.^_`|~0-9A-Za-z]*", "the name of an HTTP header")]
DeltaType = Annotated[Literal["fossil"], Kind('"fossil"')]
HeaderNames = Annotated[tuple[str, ...], AfterValidator(_forwardable), Kind("a list of strings")]
Headers = Annotated[
    dict[str, str],
    BeforeValidator(_headers),
    Field(repr=False),
    PlainSerializer(_hide_values, return_type=dict[str, str], when_used="json"),
    Kind("an object of strings by header", secret=True),
]
ClaimName = Annotated[str, _matching(r"[a-zA-Z_]*", 'a claim\'s name of letters and "_"')]
Symbol = Annotated[str, _matching(r"[!-~]+", "one or more printable ASCII characters, no space")]
NamespaceName = Annotated[
    str, _matching(r"[-a-zA-Z0-9_.]{2,}", 'a name of two or more letters, digits, "-", "_" and "."'), Kind("a name")
]
ProxyName = Annotated[
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
    internal_address: Address = Field(
        default="127.0.0.1", description='Address of the internal port; "" listens on all of them.'
    )
    internal_port: Integer = Field(
        default=0,
        ge=0,
        le=65535,
        description="TCP port, without TLS, that takes metrics, health, console and back-end API off http_server.port; "
        "0: none.",
    )
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


class ToErrorSettings(Section):
    """An error that a client gets instead."""

    code: Integer = Field(default=0, ge=0, le=2**32 - 1, description="Code of the error, from 400 to 1999; 0: none.")
    message: str = Field(default="", description="What the error says.")
    temporary: bool = Field(default=False, description="May an SDK try again?")


class ToDisconnectSettings(Section):
    """A disconnect that a client gets instead."""

    code: Integer = Field(
        default=0, ge=0, le=4999, description="Code of the disconnect; from 4000 to 4499 clients come back; 0: none."
    )
    reason: str = Field(default="", description="Why, in 1 to 123 characters of ASCII.")


class StatusTransformSettings(Section):
    """What becomes of one HTTP status of a back end."""

    status_code: Integer = Field(default=0, ge=0, le=599, description="The HTTP status that this is for.")
    to_error: ToErrorSettings = Field(default_factory=ToErrorSettings, description="The error it becomes.")
    to_disconnect: ToDisconnectSettings = Field(
        default_factory=ToDisconnectSettings, description="The disconnect it becomes."
    )


class ProxyHttpSettings(Section):
    """What requests to a back end look like."""

    static_headers: Headers = Field(
        default_factory=dict, description="Headers of every request, unless a client's of the same name is passed on."
    )
    status_to_code_transforms: Annotated[tuple[StatusTransformSettings, ...], Kind("a list of objects")] = Field(
        default=(), description="What a status other than 200 becomes, where that is not error 100."
    )


class ProxySettings(Section):
    """A back end that is asked (PROTOCOL 16)."""

    endpoint: Url = Field(
        default="", description="URL that is asked by POST; its other options are those of client.proxy.connect."
    )
    timeout: Seconds = Field(default=1.0, gt=0.0, description="Time to answer, else error 100.")
    http_headers: HeaderNames = Field(
        default=(), description="Headers of the client's own request that are passed on, such as Cookie."
    )
    emulated_headers: HeaderNames = Field(
        default=(), description="Headers that a browser may give with connect, passed on where there is no real one."
    )
    include_connection_meta: bool = Field(
        default=False, description="Pass on the meta of the connection's token or of the connect proxy."
    )
    binary_encoding: bool = Field(default=False, description="Pass payloads on in base64 (b64data).")
    http: ProxyHttpSettings = Field(default_factory=ProxyHttpSettings, description="What its requests look like.")


class ClientProxySettings(ProxySettings):
    """A back end that is asked about every connection."""

    enabled: bool = Field(default=False, description="Ask it.")


class NamedProxySettings(ProxySettings):
    """A back end that namespaces choose by ``name``."""

    name: NamespaceName = Field(description="What …_proxy_name of a namespace chooses it by.")


class ClientProxiesSettings(Section):
    """Who is asked about connections (PROTOCOL 16)."""

    connect: ClientProxySettings = Field(
        default_factory=ClientProxySettings, description="Asked who a client without token is."
    )
    refresh: ClientProxySettings = Field(
        default_factory=ClientProxySettings, description="Asked when a connection expires, instead of the client."
    )


class ChannelProxiesSettings(Section):
    """Who is asked about channels, where a namespace says so (PROTOCOL 16)."""

    subscribe: ProxySettings = Field(default_factory=ProxySettings, description="Asked whether a client may subscribe.")
    publish: ProxySettings = Field(default_factory=ProxySettings, description="Asked whether a client may publish.")
    sub_refresh: ProxySettings = Field(
        default_factory=ProxySettings, description="Asked when a subscription expires, instead of the client."
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
    command_rate_limit: Integer = Field(
        default=500, ge=0, description="Commands a second of one connection (111; twice as many: 3013); 0: no limit."
    )
    command_burst: Integer = Field(
        default=1_000, ge=1, description="Commands that a connection may send at once before command_rate_limit counts."
    )
    publish_rate_limit: Integer = Field(
        default=200,
        ge=0,
        description="Publications a second of one user in one channel, over all processes (111); 0: no limit.",
    )
    user_connection_limit: Integer = Field(
        default=100, ge=0, description="Connections of one user to this process (3504); 0: no limit."
    )
    address_connection_limit: Integer = Field(
        default=1_000,
        ge=0,
        description="Connections from one address to this process (HTTP 503); behind proxies needs "
        "http_server.trusted_proxies; 0: no limit.",
    )
    connection_limit: Integer = Field(
        default=50_000, ge=0, description="Connections to this process (HTTP 503); 0: no limit."
    )
    connection_rate_limit: Integer = Field(
        default=500, ge=0, description="New connections a second to this process (HTTP 503); 0: no limit."
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
    concurrent_recovery_limit: Integer = Field(
        default=32, ge=0, description="Pages of history read at once for recoveries; others wait in turn; 0: no limit."
    )
    recovery_rate_limit: Integer = Field(
        default=200,
        ge=0,
        description="Recoveries a second that need a read of history, one for all that come back to a channel at once; "
        "others wait in turn (100 if it comes too late); 0: no limit.",
    )
    outbox_stall_timeout: Seconds = Field(
        default=10.0, gt=0.0, description="Time without any progress of a socket that has something waiting (3008)."
    )
    subscribe_to_user_personal_channel: PersonalChannelSettings = Field(
        default_factory=PersonalChannelSettings, description="The personal channel of each user."
    )
    proxy: ClientProxiesSettings = Field(
        default_factory=ClientProxiesSettings, description="Back ends that are asked about connections."
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
    join_leave_limit: Integer = Field(
        default=1_000,
        ge=0,
        description="Subscribers of a channel in one process above which that tells no joins and leaves; 0: no limit.",
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
    force_recovery_mode: Annotated[Literal["stream", "cache"], BeforeValidator(_recovery_mode)] = Field(
        default="stream", description='What recovery brings: everything missed, or ("cache") the newest publication.'
    )
    auto_cache_recover: bool = Field(
        default=False,
        description="Bring the newest to every subscriber, asked for or not; needs force_recovery and cache.",
    )
    recovery_max_publication_limit: Integer = Field(
        default=0,
        ge=0,
        description="Publications that one recovery may bring; 0: client.recovery_max_publication_limit.",
    )
    allowed_delta_types: Annotated[tuple[DeltaType, ...], Kind('a list of "fossil", or an empty one')] = Field(
        default=(), description='Kinds of patches that subscribers may ask for in place of payloads: "fossil".'
    )
    delta_publish: bool = Field(
        default=False, description="Send patches for every publication, not only for those published with delta."
    )
    allow_tags_filter: bool = Field(default=False, description="Subscribers may choose publications by their tags.")
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
    subscribe_proxy_enabled: bool = Field(
        default=False, description="The back end decides who may subscribe, but for tokens and user-limited names."
    )
    subscribe_proxy_name: ProxyName = Field(
        default="default", description='An entry of proxies; "default" is channel.proxy.subscribe.'
    )
    publish_proxy_enabled: bool = Field(default=False, description="The back end decides who may publish what.")
    publish_proxy_name: ProxyName = Field(
        default="default", description='An entry of proxies; "default" is channel.proxy.publish.'
    )
    sub_refresh_proxy_enabled: bool = Field(
        default=False, description="The back end, and not the client, is asked when a subscription expires."
    )
    sub_refresh_proxy_name: ProxyName = Field(
        default="default", description='An entry of proxies; "default" is channel.proxy.sub_refresh.'
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
    proxy: ChannelProxiesSettings = Field(
        default_factory=ChannelProxiesSettings, description="Back ends that are asked about channels."
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
    error_mode: Literal["", "transport"] = Field(
        default="", description='How errors are answered: in a 200 body, or ("transport") as the HTTP status.'
    )


class RestSettings(Section):
    """Channels over plain HTTP, for clients (PROTOCOL 17)."""

    disabled: bool = Field(default=False, description="Offer no REST to clients.")
    poll_limit: Integer = Field(
        default=100,
        ge=0,
        description="Long-polls that one user may have waiting, or one address without a user (HTTP 429); 0: no limit.",
    )
    read_rate_limit: Integer = Field(
        default=100,
        ge=0,
        description="Reads a second of one user, or of one address without a user (HTTP 429); 0: no limit.",
    )


class WebsocketSettings(Section):
    """The WebSocket transport (PROTOCOL 2.3)."""

    disabled: bool = Field(default=False, description="Offer no WebSocket transport.")
    handler_prefix: HandlerPrefix = Field(default="/connection/websocket", description="Path of the transport.")
    message_size_limit: Integer = Field(
        default=65_536, ge=1, description="Bytes that one message of a client may have (close code 1009)."
    )
    compression: bool = Field(default=False, description="Compress messages for clients that offer permessage-deflate.")
    compression_min_size: Integer = Field(
        default=256, ge=0, description="Bytes below which a message is sent as it is, compression or not."
    )
    compression_level: Integer = Field(
        default=1, ge=1, le=9, description="How hard to compress: 1 is quick, 9 small (zlib's levels)."
    )


class HttpStreamSettings(Section):
    """The protocol over a streamed response and /emulation (PROTOCOL 2.5)."""

    enabled: bool = Field(default=False, description="Offer the HTTP stream, and with it /emulation.")
    handler_prefix: HandlerPrefix = Field(default="/connection/http_stream", description="Path of the transport.")
    max_request_body_size: Integer = Field(
        default=65_536, ge=1, description="Bytes that the request which opens a stream may have (HTTP 413)."
    )


class SseSettings(Section):
    """The protocol over an event stream and /emulation (PROTOCOL 2.5)."""

    enabled: bool = Field(default=False, description="Offer the event stream, and with it /emulation.")
    handler_prefix: HandlerPrefix = Field(default="/connection/sse", description="Path of the transport.")
    max_request_body_size: Integer = Field(
        default=65_536, ge=1, description="Bytes that the request which opens a stream may have (HTTP 413)."
    )


class EmulationSettings(Section):
    """What the clients of http_stream and sse say (PROTOCOL 2.5)."""

    handler_prefix: HandlerPrefix = Field(default="/emulation", description="Path that takes their commands.")
    max_request_body_size: Integer = Field(default=65_536, ge=1, description="Bytes of one request (HTTP 413).")


class UniSseSettings(Section):
    """One way, as an event stream (PROTOCOL 2.6)."""

    enabled: bool = Field(default=False, description="Offer the one-way event stream.")
    handler_prefix: HandlerPrefix = Field(default="/connection/uni_sse", description="Path of the transport.")
    max_request_body_size: Integer = Field(
        default=65_536, ge=1, description="Bytes that the request which opens a stream may have (HTTP 413)."
    )


class UniHttpStreamSettings(Section):
    """One way, as a streamed response (PROTOCOL 2.6)."""

    enabled: bool = Field(default=False, description="Offer the one-way HTTP stream.")
    handler_prefix: HandlerPrefix = Field(default="/connection/uni_http_stream", description="Path of the transport.")
    max_request_body_size: Integer = Field(
        default=65_536, ge=1, description="Bytes that the request which opens a stream may have (HTTP 413)."
    )


class UniWebsocketSettings(Section):
    """One way, as a WebSocket (PROTOCOL 2.6)."""

    enabled: bool = Field(default=False, description="Offer the one-way WebSocket.")
    handler_prefix: HandlerPrefix = Field(default="/connection/uni_websocket", description="Path of the transport.")
    message_size_limit: Integer = Field(
        default=65_536, ge=1, description="Bytes that the first message of a client may have (close code 1009)."
    )


class InitSettings(Section):
    """A cheap request to make first (PROTOCOL 2.1)."""

    enabled: bool = Field(default=False, description="Answer it.")
    handler_prefix: HandlerPrefix = Field(default="/connection/init", description="Path of it.")


class RpcPingSettings(Section):
    """The remote procedure ``ping``."""

    enabled: bool = Field(default=False, description='Answer the remote procedure "ping" with an empty result.')


class RpcOptions(Section):
    """Who carries out the procedures of one namespace."""

    proxy_enabled: bool = Field(default=False, description="The back end carries them out.")
    proxy_name: ProxyName = Field(default="default", description='An entry of proxies; "default" is rpc.proxy.')


class RpcNamespace(RpcOptions):
    """The options of the procedures whose name begins with ``name`` and the boundary (PROTOCOL 16)."""

    name: NamespaceName = Field(description="What stands before the first rpc.namespace_boundary of a procedure.")


class RpcSettings(Section):
    """Remote procedure calls of clients (PROTOCOL 4.7)."""

    ping: RpcPingSettings = Field(default_factory=RpcPingSettings, description='The remote procedure "ping".')
    proxy: ProxySettings = Field(
        default_factory=ProxySettings, description="Back end that carries out remote procedures, where proxy_enabled."
    )
    namespace_boundary: Symbol = Field(default=":", description="What ends the namespace in a procedure's name.")
    without_namespace: RpcOptions = Field(
        default_factory=RpcOptions, description="Options of procedures without a namespace."
    )
    namespaces: Annotated[tuple[RpcNamespace, ...], Kind("a list of objects")] = Field(
        default=(), description="Namespaces of procedures, each with a name and any option of rpc.without_namespace."
    )


class AppSettings(Section):
    """The user's own module (``--app``)."""

    timeout: Seconds = Field(
        default=1.0, gt=0.0, description="Time that one hook or RPC method of --app may take (100)."
    )


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


class MongoSettings(Section):
    """History in MongoDB, shared by any number of processes."""

    url: MongoUrl = Field(
        default="", description="Replica set that keeps history, with the driver's options; empty: a local file does."
    )
    database: Annotated[str, _matching(r"[-a-zA-Z0-9_]{1,63}", "a database name")] = Field(
        default="waterspout", description="Database in it."
    )
    driver: Literal["motor", "pymongo"] = Field(
        default="motor", description="Motor, or PyMongo's own asyncio API, its successor."
    )
    publish_timeout: Seconds = Field(
        default=3.0, gt=0.0, description="Time for a publication to be stored, else error 100: outcome unknown."
    )


class RedisSettings(Section):
    """Word between processes, and presence over all of them; needs mongo.url."""

    url: RedisUrl = Field(
        default="",
        description="redis://host:port/0, redis+sentinel://host:port?sentinel_master_name=name (further sentinels as "
        "addr=host:port), or redis+cluster://host:port?addr=host:port; rediss for TLS; empty: this process is alone.",
    )
    prefix: Annotated[str, _matching(r"[!-z]{1,64}", "up to 64 printable ASCII characters")] = Field(
        default="waterspout", description="What all keys and channels in Redis begin with."
    )


class GuestsSettings(Section):
    """Users with a name and no login (PROTOCOL 8.6)."""

    enabled: bool = Field(
        default=False, description="Give whoever asks a token and a random user id (POST /v1/session)."
    )
    ttl: Seconds = Field(default=24 * HOUR_S, ge=60.0, description="Time that a guest's token is good.")
    rate_limit: Integer = Field(
        default=60, ge=0, description="Guests' tokens for one address in a minute (HTTP 429); 0: no limit."
    )


class PrometheusSettings(Section):
    """Metrics for Prometheus (PROTOCOL 17.5)."""

    enabled: bool = Field(default=False, description="Offer metrics.")
    handler_prefix: HandlerPrefix = Field(default="/metrics", description="Path of them.")


class AdminSettings(Section):
    """The console (PROTOCOL 17.6)."""

    enabled: bool = Field(default=False, description="Offer the console.")
    handler_prefix: HandlerPrefix = Field(default="/admin", description="Path of it.")
    password: Secret = Field(default="", description="Password that opens it.")
    secret: Secret = Field(
        default="",
        description="Key that signs its tokens; empty: a new one at each start, which ends all visits. Set it where "
        "several processes answer.",
    )
    ttl: Seconds = Field(default=12 * HOUR_S, ge=60.0, description="Time that a login is good.")


class ShutdownSettings(Section):
    """How the server ends."""

    grace: Seconds = Field(
        default=5.0, description="Time from SIGTERM, when it stops being ready, until it stops listening."
    )
    pace: int = Field(
        default=100,
        ge=0,
        description="Clients then sent away in a second, more if two thirds of timeout would pass; 0: all at once.",
    )
    timeout: Seconds = Field(default=30.0, description="Time for all clients to leave after the grace.")


class Settings(Section):
    """All settings; get them from ``configuration.load``."""

    http_server: HttpServerSettings = Field(default_factory=HttpServerSettings, description="Where it listens.")
    log: LogSettings = Field(default_factory=LogSettings, description="What is logged, and how.")
    client: ClientSettings = Field(default_factory=ClientSettings, description="What clients may do and cost.")
    channel: ChannelSettings = Field(default_factory=ChannelSettings, description="Names and the options behind them.")
    http_api: HttpApiSettings = Field(default_factory=HttpApiSettings, description="The API for back ends.")
    rest: RestSettings = Field(default_factory=RestSettings, description="Channels over plain HTTP, for clients.")
    websocket: WebsocketSettings = Field(default_factory=WebsocketSettings, description="The WebSocket transport.")
    http_stream: HttpStreamSettings = Field(
        default_factory=HttpStreamSettings, description="The protocol over a streamed response."
    )
    sse: SseSettings = Field(default_factory=SseSettings, description="The protocol over an event stream.")
    emulation: EmulationSettings = Field(
        default_factory=EmulationSettings, description="What the clients of http_stream and sse say."
    )
    uni_sse: UniSseSettings = Field(default_factory=UniSseSettings, description="One way, as an event stream.")
    uni_http_stream: UniHttpStreamSettings = Field(
        default_factory=UniHttpStreamSettings, description="One way, as a streamed response."
    )
    uni_websocket: UniWebsocketSettings = Field(
        default_factory=UniWebsocketSettings, description="One way, as a WebSocket."
    )
    init: InitSettings = Field(default_factory=InitSettings, description="A cheap request to make first.")
    rpc: RpcSettings = Field(default_factory=RpcSettings, description="Remote procedure calls of clients.")
    proxies: Annotated[tuple[NamedProxySettings, ...], Kind("a list of objects")] = Field(
        default=(), description="Back ends by name, each with a name and any option of client.proxy.connect."
    )
    app: AppSettings = Field(default_factory=AppSettings, description="The user's own module.")
    presence: PresenceSettings = Field(default_factory=PresenceSettings, description="Who is here.")
    sqlite: SqliteSettings = Field(default_factory=SqliteSettings, description="History in one local file.")
    mongo: MongoSettings = Field(default_factory=MongoSettings, description="History in MongoDB.")
    redis: RedisSettings = Field(default_factory=RedisSettings, description="Word between processes, and presence.")
    guests: GuestsSettings = Field(default_factory=GuestsSettings, description="Users with a name and no login.")
    prometheus: PrometheusSettings = Field(default_factory=PrometheusSettings, description="Metrics for Prometheus.")
    admin: AdminSettings = Field(default_factory=AdminSettings, description="The console.")
    shutdown: ShutdownSettings = Field(default_factory=ShutdownSettings, description="How the server ends.")

    _configured: bool = PrivateAttr(default=True)

    @property
    def configured(self) -> bool:
        """Was anything set that matters?  If not, the server is open to everybody on this machine.

        What does not count: http_server.address, http_server.port, log, sqlite.
        """
        return self._configured

    @classmethod
    def from_options(cls, options: Mapping[str, Any], *, configured: bool) -> Self:
        """The settings that ``options`` make, a tree as a file holds it; ``configured`` is what they then answer.

        Raises ``pydantic.ValidationError``: an unknown name, or a value that its field refuses.
        """
        settings = cls.model_validate(options)
        settings._configured = configured
        return settings


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
        "guests": {"enabled": True},
        "prometheus": {"enabled": True},
        "admin": {"enabled": True},
        **{
            transport: {"enabled": True}
            for transport in ("http_stream", "sse", "uni_sse", "uni_http_stream", "uni_websocket", "init")
        },
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


# --- showing -----------------------------------------------------------------
def without_secrets(settings: Settings) -> dict[str, Any]:
    """The settings as JSON can hold them, to be shown or logged.

    Durations are text such as ``"300s"``; a secret is ``"***"``, or ``""`` if it
    is not set.
    """
    return settings.model_dump(mode="json")
