"""Channel names, the namespaces they belong to, and who may do what.

A refusal's ``why`` names the option that decided, for the server's log.  Pure.
PROTOCOL 9 and 10.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Literal, get_args

import msgspec

from server.auth import Override
from server.errors import (
    BAD_REQUEST,
    NOT_AVAILABLE,
    PERMISSION_DENIED,
    UNKNOWN_CHANNEL,
    Refusal,
    Refused,
)
from server.protocol import is_json
from server.settings import ChannelOptions
from server.stream import Retention

if TYPE_CHECKING:
    from server.settings import ChannelSettings

Deed = Literal["publish", "history", "presence"]


class Namespace(msgspec.Struct, frozen=True):
    """A namespace's options, made ready for use.

    ``name`` is ``""`` for names without one; ``retention`` is ``None`` for a
    passing namespace.  ``rights`` is what ``may_by_options`` says yes to, worked
    out once, since it is asked for each publication (0.5 of its 17 µs).
    """

    name: str
    options: ChannelOptions
    retention: Retention | None
    pattern: re.Pattern[str] | None
    data_format: str = ""
    rights: frozenset[tuple[Deed, bool, bool]] = frozenset()

    @property
    def kept(self) -> bool:
        """Are its publications numbered and stored?"""
        return self.retention is not None

    @property
    def binary(self) -> bool:
        """May its payloads be something else than JSON?"""
        return self.data_format == "binary"


class Identity(msgspec.Struct, frozen=True):
    """Who asks: the user id (``""`` is the anonymous user), and whether the server is in insecure mode."""

    user: str = ""
    insecure: bool = False


class Channels:
    """The configured channel space; holds no state of any channel."""

    def __init__(self, settings: "ChannelSettings") -> None:
        self._namespaces: dict[str, Namespace] = {}
        self._without: Namespace | None = None
        self.renew(settings)
        self.decided_elsewhere: frozenset[tuple[str, str | None]] = frozenset()
        """Where a hook decides and not the options: kind of hook, and namespace (PROTOCOL 16)."""

    def renew(self, settings: "ChannelSettings") -> None:
        """From now on these hold; a namespace that is as it was is the same object as before (PROTOCOL 9.5)."""
        self._settings = settings
        self._without = self._namespace("", settings.without_namespace, self._without)
        self._namespaces = {
            one.name: self._namespace(one.name, one, self._namespaces.get(one.name)) for one in settings.namespaces
        }
        self._cached = lru_cache(maxsize=8192)(self._find)

    def _namespace(self, name: str, options: ChannelOptions, former: Namespace | None) -> Namespace:
        retention = None
        if options.kept:
            meta_ttl_s = options.history_meta_ttl or self._settings.history_meta_ttl
            ttl_ms = -1 if options.history_ttl < 0 else int(options.history_ttl * 1000)
            retention = Retention(options.history_size, ttl_ms, int(meta_ttl_s * 1000))
        pattern = re.compile(options.channel_regex) if options.channel_regex else None
        data_format = options.publication_data_format or self._settings.publication_data_format
        made = Namespace(name, options, retention, pattern, data_format, _rights(options))
        return made if made != former or former is None else former

    def namespace(self, channel: str) -> Namespace | None:
        """The namespace of ``channel``; ``None`` if there is none.  Overlong names are not worth remembering."""
        return self._cached(channel) if len(channel) <= self._settings.max_length else self._find(channel)

    def _find(self, channel: str) -> Namespace | None:
        name = channel.removeprefix(self._settings.private_prefix) if self._settings.private_prefix else channel
        head, boundary, _ = name.partition(self._settings.namespace_boundary)
        return self._namespaces.get(head) if boundary else self._without

    def known(self, channel: str) -> Namespace:
        """The namespace of ``channel``; raises ``Refused(UNKNOWN_CHANNEL)``."""
        namespace = self.namespace(channel)
        if namespace is None:
            raise Refused(UNKNOWN_CHANNEL, f"no entry of channel.namespaces is named like {channel[:64]!r}")
        return namespace

    def retention(self, channel: str) -> Retention | None:
        """How long ``channel`` remembers; ``None`` for a passing or an unknown one."""
        namespace = self.namespace(channel)
        return namespace.retention if namespace else None

    def personal(self, user: str, namespace: str) -> str:
        """The name of ``user``'s personal channel (PROTOCOL 9.2)."""
        prefix = f"{namespace}{self._settings.namespace_boundary}" if namespace else ""
        return f"{prefix}{self._settings.user_boundary}{user}"

    def private(self, channel: str) -> bool:
        """Does the name demand a subscription token (PROTOCOL 9.1)?"""
        prefix = self._settings.private_prefix
        return bool(prefix) and channel.startswith(prefix)

    def check_length(self, channel: str) -> None:
        """Raises ``Refused(BAD_REQUEST)`` for a name longer than ``channel.max_length`` bytes."""
        if len(channel.encode(errors="surrogatepass")) > self._settings.max_length:
            raise Refused(
                BAD_REQUEST, f"a channel name is longer than channel.max_length ({self._settings.max_length})"
            )

    def check_name(self, channel: str, namespace: Namespace) -> None:
        """Raises ``Refused(BAD_REQUEST)`` for characters that PROTOCOL 9.1 or ``channel_regex`` does not allow."""
        plain = channel.isascii()
        if not plain or len(channel) > self._settings.max_length:
            self.check_length(channel)
        if namespace.pattern is None:
            if not plain:
                raise Refused(BAD_REQUEST, "a channel name is not ASCII, and its namespace has no channel_regex")
            return
        rest = channel.removeprefix(self._settings.private_prefix) if self._settings.private_prefix else channel
        if namespace.name:
            rest = rest.partition(self._settings.namespace_boundary)[2]
        if not namespace.pattern.search(rest):
            raise Refused(BAD_REQUEST, f"{channel[:64]!r} does not match channel_regex of {namespace.name!r}")

    def users_of(self, channel: str, namespace: Namespace) -> list[str] | None:
        """The users that a user-limited name lists, ``None`` if the name is not user-limited."""
        boundary = self._settings.user_boundary
        if not namespace.options.allow_user_limited_channels or not boundary or boundary not in channel:
            return None
        return channel.rpartition(boundary)[2].split(self._settings.user_separator)

    def may_subscribe(self, identity: Identity, channel: str, namespace: Namespace) -> None:
        """Allow a subscription without a token, or raise ``Refused`` (PROTOCOL 10.2, steps 5, 7 to 10).

        Where a proxy decides, it must be asked next.
        """
        options = namespace.options
        if self.private(channel):
            raise Refused(PERMISSION_DENIED, f"{channel[:64]!r} is private and came without a subscription token")
        users = self.users_of(channel, namespace)
        if users is not None:
            if identity.user and identity.user in users:
                return
        elif self._decided_elsewhere("subscribing", namespace) or (
            options.allow_subscribe_for_client and (identity.user or options.allow_subscribe_for_anonymous)
        ):
            return
        if identity.insecure:
            return
        raise Refused(PERMISSION_DENIED, _look_at("allow_subscribe_for_client", namespace, identity))

    def _decided_elsewhere(self, kind: str, namespace: Namespace) -> bool:
        return (kind, namespace.name) in self.decided_elsewhere

    def may(self, deed: Deed, identity: Identity, namespace: Namespace, *, subscribed: bool) -> bool:
        """May this identity publish, read history or read presence (PROTOCOL 10.4)?"""
        return (
            (deed, identity.user == "", subscribed) in namespace.rights
            or identity.insecure
            or (deed == "publish" and self._decided_elsewhere("publishing", namespace))
        )

    def require(self, deed: Deed, identity: Identity, namespace: Namespace, *, subscribed: bool) -> None:
        """As ``may``, but raises ``Refused``: 108 when the feature is off, 103 when it is not allowed."""
        if deed == "history" and not namespace.kept:
            raise Refused(NOT_AVAILABLE, f"history_size and history_ttl are not set in {_called(namespace)}")
        if deed == "presence" and not namespace.options.presence:
            raise Refused(NOT_AVAILABLE, f"presence is not set in {_called(namespace)}")
        if not self.may(deed, identity, namespace, subscribed=subscribed):
            raise Refused(PERMISSION_DENIED, _look_at(f"allow_{deed}_for_client", namespace, identity))


def may_by_options(options: ChannelOptions, deed: Deed, *, anonymous: bool, subscribed: bool) -> bool:
    """Do the options alone let such a client do that (PROTOCOL 10.4)?"""
    if anonymous and not getattr(options, f"allow_{deed}_for_anonymous"):
        return False
    if getattr(options, f"allow_{deed}_for_client"):
        return True
    return subscribed and bool(getattr(options, f"allow_{deed}_for_subscriber"))


def _rights(options: ChannelOptions) -> frozenset[tuple[Deed, bool, bool]]:
    """Whom the options let do what: the deed, whether the client is anonymous, whether it is subscribed."""
    cases: Iterable[tuple[Deed, bool, bool]] = product(get_args(Deed), (False, True), (False, True))
    return frozenset(
        (deed, anonymous, subscribed)
        for deed, anonymous, subscribed in cases
        if may_by_options(options, deed, anonymous=anonymous, subscribed=subscribed)
    )


class Grant(msgspec.Struct, frozen=True):
    """What a permitted subscription gets (PROTOCOL 10.3)."""

    presence: bool
    join_leave: bool
    joins: bool
    positioned: bool
    recoverable: bool


def grant(
    channels: Channels,
    identity: Identity,
    namespace: Namespace,
    override: Override,
    *,
    positioned: bool = False,
    recoverable: bool = False,
    join_leave: bool = False,
) -> Grant:
    """Weigh the namespace's options, a token's overrides and the client's wishes (the three flags); PROTOCOL 10.3."""
    options = namespace.options

    def chosen(name: str) -> bool:
        switched = getattr(override, name)
        return bool(getattr(options, name) if switched is None else switched)

    may_read = namespace.kept and channels.may("history", identity, namespace, subscribed=True)
    may_see = options.presence and channels.may("presence", identity, namespace, subscribed=True)
    emits = chosen("join_leave")
    recovers = chosen("force_recovery") or (recoverable and (options.allow_recovery or may_read))
    positions = chosen("force_positioning") or (positioned and (options.allow_positioning or may_read))
    return Grant(
        presence=chosen("presence"),
        join_leave=emits,
        joins=chosen("force_push_join_leave") or (join_leave and emits and may_see),
        positioned=namespace.kept and (positions or recovers),
        recoverable=namespace.kept and recovers,
    )


def check_payload(data: bytes | None, namespace: Namespace) -> bytes:
    """The payload, if its namespace takes it; raises ``Refused(BAD_REQUEST)`` (PROTOCOL 9.4).

    Unless a namespace says ``binary``, payloads are JSON whatever the publisher
    speaks, since one that is not would break every subscriber who speaks JSON.
    """
    wanted = namespace.data_format
    if wanted == "binary":
        return data or b""  # in Protobuf an empty payload and none look the same
    if not data:
        raise Refused(BAD_REQUEST, "a publication has no data")
    if not is_json(data):
        raise Refused(
            BAD_REQUEST, f"a payload is not JSON, and {_called(namespace)} is not publication_data_format=binary"
        )
    if wanted == "json_object" and not data.lstrip(b" \t\r\n").startswith(b"{"):
        raise Refused(BAD_REQUEST, f"a payload is no JSON object, as {_called(namespace)} demands")
    return data


def unknown_type(type: int) -> Refusal:
    """The refusal of a subscription type that we do not offer (PROTOCOL 10.2, step 4; 21.1, 21.2)."""
    return PERMISSION_DENIED if type in (1, 2, 3) else NOT_AVAILABLE


def _called(namespace: Namespace) -> str:
    return f"namespace {namespace.name!r}" if namespace.name else "channel.without_namespace"


def _look_at(option: str, namespace: Namespace, identity: Identity) -> str:
    anonymous = " (and its …_for_anonymous, since the user is anonymous)" if not identity.user else ""
    return f"look at {option} of {_called(namespace)}{anonymous}"
