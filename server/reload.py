"""What a running server takes over from settings that were read anew, and what has to wait for a restart.

``renewed`` makes of the settings in force and those that are wished the ones that
hold next: the wished ones where they can be changed (``LIVE``), else those in force.  It
is all decided before anything is touched, so that settings which cannot hold change
nothing.  Who carries it out is ``Node.renew``.

What is in ``LIVE`` is read anew each time that it is needed, or is remade by whoever
made something of it.  What is not: where we listen and what stands behind a seam; which
paths there are; proxies, which sessions learned of when they were made; and what
clients were told (pings).

``same_terms`` says what a namespace's change means to who is subscribed already.

Pure.  PROTOCOL 9.5.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from server.settings import ChannelOptions, Section, Settings
from server.settings import Namespace as NamespaceSettings

T = TypeVar("T", bound=Section)

LIVE = frozenset(
    (
        "admin.password",
        "admin.secret",
        "admin.ttl",
        "channel.history_meta_ttl",
        "channel.max_length",
        "channel.namespaces",
        "channel.publication_data_format",
        "channel.without_namespace",
        "client.address_connection_limit",
        "client.allow_anonymous_connect_without_token",
        "client.allowed_origins",
        "client.channel_limit",
        "client.command_burst",
        "client.command_rate_limit",
        "client.connect_include_server_time",
        "client.connection_limit",
        "client.connection_rate_limit",
        "client.disallow_anonymous_connection_tokens",
        "client.expired_close_delay",
        "client.expired_sub_close_delay",
        "client.history_max_publication_limit",
        "client.publish_rate_limit",
        "client.recovery_max_publication_limit",
        "client.recovery_rate_limit",
        "client.stale_close_delay",
        "client.subscription_token",
        "client.token",
        "client.user_connection_limit",
        "guests.rate_limit",
        "guests.ttl",
        "http_api.error_mode",
        "http_api.insecure",
        "http_api.key",
        "log.level",
        "rest.poll_limit",
        "rest.read_rate_limit",
    )
)
"""What can be changed in a running server; of namespaces all but their proxies."""

PROXIED = frozenset(
    f"{kind}_proxy_{what}" for kind in ("subscribe", "publish", "sub_refresh") for what in ("enabled", "name")
)
"""The options of a namespace that need a restart, and with them all of that namespace."""

LATER = frozenset(
    (
        *(f"allow_{deed}_for_{who}" for deed in ("publish", "history", "presence") for who in ("client", "anonymous")),
        *(f"allow_{deed}_for_subscriber" for deed in ("publish", "history", "presence")),
        "delta_publish",
        "history_meta_ttl",
        "history_size",
        "history_ttl",
        "join_leave_limit",
        "publication_data_format",
        "recovery_max_publication_limit",
    )
)
"""The options of a namespace that nothing was agreed about when somebody subscribed: they hold for the next deed."""


class Renewed(NamedTuple):
    """The settings that hold next, the names of what is new in them, and of what waits for a restart."""

    settings: Settings
    changed: list[str]
    waiting: list[str]


def renewed(former: Settings, wished: Settings) -> Renewed:
    """What holds next; see the module's docstring.

    A server that was open to all since nothing was configured is closed by a restart,
    and the other way round: then everything waits.
    """
    if wished.configured != former.configured:
        return Renewed(former, [], ["all, since nothing was configured before, or is now"])
    changed: list[str] = []
    waiting: list[str] = []
    return Renewed(_taken(former, wished, "", changed, waiting), changed, waiting)


def _taken(former: T, wished: T, above: str, changed: list[str], waiting: list[str]) -> T:
    """``former`` with what may be taken of ``wished``; adds the names of the rest to ``waiting``."""
    taken: dict[str, Any] = {}
    for name in type(former).model_fields:
        old, new, path = getattr(former, name), getattr(wished, name), f"{above}{name}"
        if old == new:
            continue
        if path == "channel.namespaces":
            taken[name] = _namespaces(old, new, changed, waiting)
        elif path == "channel.without_namespace" and _proxies(old) != _proxies(new):
            waiting.append(f"{path} (its proxies)")
        elif path in LIVE:
            taken[name] = new
            changed.append(path)
        elif isinstance(old, Section):
            taken[name] = _taken(old, new, f"{path}.", changed, waiting)
        else:
            waiting.append(path)
    return former.model_copy(update=taken) if taken else former


def _namespaces(
    former: tuple[NamespaceSettings, ...], wished: tuple[NamespaceSettings, ...], changed: list[str], waiting: list[str]
) -> tuple[NamespaceSettings, ...]:
    """The wished namespaces, but with those in force in place of such whose proxies are others."""
    known = {namespace.name: namespace for namespace in former}
    taken: list[NamespaceSettings] = []
    for namespace in wished:
        old = known.pop(namespace.name, None)
        path = f"channel.namespaces.{namespace.name}"
        if old == namespace:
            taken.append(namespace)
        elif _proxies(namespace) == (_proxies(old) if old is not None else NO_PROXIES):
            taken.append(namespace)
            changed.append(path)
        else:
            waiting.append(f"{path} (its proxies)")
            taken += [old] if old is not None else []
    changed += [f"channel.namespaces.{name}" for name in known]
    return tuple(taken)


def _proxies(options: ChannelOptions) -> Mapping[str, Any]:
    return {name: getattr(options, name) for name in PROXIED}


NO_PROXIES = _proxies(ChannelOptions())


def same_terms(former: ChannelOptions, options: ChannelOptions) -> bool:
    """May a subscription that was made under ``former`` go on under ``options``?

    Not if there is another answer to who may subscribe, to what it gets then, or to
    whether anything is kept.
    """
    return former.kept == options.kept and all(
        getattr(former, name) == getattr(options, name) for name in ChannelOptions.model_fields if name not in LATER
    )
