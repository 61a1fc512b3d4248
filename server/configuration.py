"""Configuration: from what an operator wrote, wherever, to the settings that hold, or to every mistake in it.

``load`` reads a file (TOML, YAML or JSON), the environment
(``WATERSPOUT_HTTP_SERVER__PORT``) and flags; later ones win, key by key, and
lists are replaced whole.  ``reference`` lists what may be written.

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

Which options there are is learned from the tree in ``settings``: a new field is
read, checked and listed without a word here, unless it is of a type that no other
field has, or contradicts another one.

Knows ``settings`` and nothing else of ours, and only run.py calls it: whoever does
the work is handed what holds, not where it came from.  It reads neither a clock nor
the process's environment, which comes as an argument; of files, it opens the one
that it is given, and looks whether those that TLS names are there.
"""

import copy
import difflib
import json
import os.path
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, takewhile
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args, get_origin

import yaml  # type: ignore[import-untyped]
from annotated_types import Ge, Gt, Le
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    JsonConfigSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
    YamlConfigSettingsSource,
)
from pydantic_settings import SettingsError as SourceError

from server.settings import (
    TRY_OUT,
    ChannelOptions,
    Kind,
    ProxySettings,
    RpcOptions,
    Section,
    Settings,
    TokenSettings,
    duration_text,
)

PREFIX = "WATERSPOUT_"
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
        inner = _inner(field)
        holder[int(last)] = {"name": UNNAMED} if inner is not None and "name" in inner.model_fields else {}
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
    if settings.redis.url and not settings.mongo.url:
        yield _Clash(
            (("redis", "url"), ("mongo", "url")),
            "mongo.url beside it: processes that share a broker must share one history",
            "mongo.url is not set",
        )
    tls = settings.http_server.tls
    if tls.enabled:
        for name, text in (("cert_pem", tls.cert_pem), ("key_pem", tls.key_pem)):
            if "-----BEGIN " not in text and not os.path.isfile(text):
                found = "a path of no file, or text that is no PEM" if text else "nothing"
                paths = (("http_server", "tls", name), ("http_server", "tls", "enabled"))
                yield _Clash(paths, "a file's path or PEM text, since http_server.tls.enabled is true", found)
    internal_port = settings.http_server.internal_port
    if internal_port and internal_port == settings.http_server.port:
        ports: tuple[Place, ...] = (("http_server", "internal_port"), ("http_server", "port"))
        yield _Clash(ports, "another port than http_server.port", str(internal_port))
    yield from _admin_clashes(settings)
    yield from _path_clashes(settings)


def _admin_clashes(settings: Settings) -> Iterator[_Clash]:
    admin = settings.admin
    if not admin.enabled:
        return
    if settings.configured and not admin.password and not admin.secret:
        yield _Clash(
            (("admin", "password"), ("admin", "enabled"), ("admin", "secret")),
            "a password, or admin.secret to sign tokens with, since admin.enabled is true",
            "neither",
        )
    if admin.secret and admin.secret == settings.client.token.hmac_secret_key:
        yield _Clash(
            (("admin", "secret"), ("client", "token", "hmac_secret_key")),
            "another key than client.token.hmac_secret_key",
            "the same",
        )


def _path_clashes(settings: Settings) -> Iterator[_Clash]:
    """One path for two things; the back-end API and the console have all that lies below their own."""
    both_ways = settings.http_stream.enabled or settings.sse.enabled
    offered = {
        "websocket": not settings.websocket.disabled,
        **{name: getattr(settings, name).enabled for name in ("http_stream", "sse", "uni_sse", "uni_http_stream")},
        "uni_websocket": settings.uni_websocket.enabled,
        "emulation": both_ways,
        "init": settings.init.enabled,
        "http_api": not settings.http_api.disabled,
        "prometheus": settings.prometheus.enabled,
        "admin": settings.admin.enabled,
    }
    paths = {name: getattr(settings, name).handler_prefix for name, on in offered.items() if on}
    for (one, path), (other, its) in combinations(paths.items(), 2):
        nested = f"{path}/".startswith(f"{its}/") or f"{its}/".startswith(f"{path}/")
        if path == its or (nested and {one, other} & {"http_api", "admin"}):
            yield _Clash(
                ((one, "handler_prefix"), (other, "handler_prefix")),
                f'a path apart from {other}.handler_prefix ("{its}")',
                repr(path),
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
    yield from _guest_clashes(settings)
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


def _guest_clashes(settings: Settings) -> Iterator[_Clash]:
    token = settings.client.token
    if not settings.guests.enabled or not settings.configured:
        return
    above: Place = ("client", "token")
    if not token.hmac_secret_key:
        yield _Clash(
            (("guests", "enabled"), (*above, "hmac_secret_key")),
            "false unless client.token.hmac_secret_key is set, which signs the guests' tokens",
            "true",
        )
    for claim in ("audience", "issuer"):
        if getattr(token, f"{claim}_regex"):
            yield _Clash(
                (("guests", "enabled"), (*above, f"{claim}_regex")),
                f"false beside client.token.{claim}_regex, since guests' tokens can bear an exact {claim} only",
                "true",
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
    if options.auto_cache_recover and not (options.force_recovery and options.force_recovery_mode == "cache"):
        forced, mode = ((*above, name) for name in ("force_recovery", "force_recovery_mode"))
        found = f"{str(options.force_recovery).lower()} and {options.force_recovery_mode!r}"
        yield _Clash(((*above, "auto_cache_recover"), forced, mode), 'force_recovery, and "cache" for its mode', found)
    own = options.history_meta_ttl
    meta_ttl = own or channel_meta_ttl
    if options.history_ttl > meta_ttl:
        meta: Place = (*above, "history_meta_ttl") if own else ("channel", "history_meta_ttl")
        expected = f"at most {_dotted(meta)} ({duration_text(meta_ttl)})"
        yield _Clash((ttl, meta), expected, duration_text(options.history_ttl))


def _proxy_clashes(settings: Settings) -> Iterator[_Clash]:
    rpc = settings.rpc
    named: dict[str, int] = {}
    every: list[tuple[Place, ProxySettings]] = []
    for place, proxy in enumerate(settings.proxies):
        above: Place = ("proxies", place)
        if proxy.name in named or proxy.name == "default":
            twin = f"proxies.{named[proxy.name]}.name" if proxy.name in named else "each event's own proxy"
            yield _Clash(((*above, "name"),), f"a name that {twin} has not", repr(proxy.name))
        if not proxy.endpoint:
            yield _Clash(((*above, "endpoint"), above), "a URL", "nothing")
        named.setdefault(proxy.name, place)
        every.append((above, proxy))
    for event in ("connect", "refresh"):
        proxy_of_clients = getattr(settings.client.proxy, event)
        above = ("client", "proxy", event)
        every.append((above, proxy_of_clients))
        if proxy_of_clients.enabled and not proxy_of_clients.endpoint:
            yield _Clash(((*above, "endpoint"), (*above, "enabled")), "a URL, since it is enabled", "nothing")
    channel_like: list[tuple[Place, ChannelOptions]] = [
        (("channel", "without_namespace"), settings.channel.without_namespace)
    ]
    channel_like += [(("channel", "namespaces", place), one) for place, one in enumerate(settings.channel.namespaces)]
    for event in ("subscribe", "publish", "sub_refresh"):
        own = getattr(settings.channel.proxy, event)
        every.append((("channel", "proxy", event), own))
        for above, options in channel_like:
            option = f"{event}_proxy"
            yield from _choice_clashes(above, option, options, ("channel", "proxy", event), own, named)
    every.append((("rpc", "proxy"), rpc.proxy))
    yield from _choice_clashes(
        ("rpc", "without_namespace"), "proxy", rpc.without_namespace, ("rpc", "proxy"), rpc.proxy, named
    )
    first: dict[str, int] = {}
    for place, one in enumerate(rpc.namespaces):
        above = ("rpc", "namespaces", place)
        yield from _choice_clashes(above, "proxy", one, ("rpc", "proxy"), rpc.proxy, named)
        if one.name in first or rpc.namespace_boundary in one.name:
            expected = f"a name without rpc.namespace_boundary ({rpc.namespace_boundary!r}) that no other has"
            yield _Clash(((*above, "name"), ("rpc", "namespace_boundary")), expected, repr(one.name))
        first.setdefault(one.name, place)
    for above, one_of_all in every:
        yield from _transform_clashes((*above, "http", "status_to_code_transforms"), one_of_all)


def _choice_clashes(
    above: Place, option: str, options: Section, own_place: Place, own: ProxySettings, named: Mapping[str, int]
) -> Iterator[_Clash]:
    """Is the proxy there that a namespace asks?"""
    chosen: Place = (*above, f"{option}_name")
    enabled: Place = (*above, f"{option}_enabled")
    name = getattr(options, f"{option}_name")
    if not getattr(options, f"{option}_enabled"):
        return
    if name == "default" and not own.endpoint:
        found = f"{_dotted((*own_place, 'endpoint'))} is not set"
        yield _Clash((enabled, (*own_place, "endpoint"), chosen), f"{_dotted((*own_place, 'endpoint'))} for it", found)
    elif name != "default" and name not in named:
        yield _Clash((chosen, ("proxies",)), "the name of an entry of proxies", repr(name))


def _transform_clashes(above: Place, proxy: ProxySettings) -> Iterator[_Clash]:
    for place, transform in enumerate(proxy.http.status_to_code_transforms):
        path: Place = (*above, place)
        if not 100 <= transform.status_code <= 599 or transform.status_code == 200:
            found = repr(transform.status_code)
            yield _Clash(((*path, "status_code"),), "an HTTP status from 100 to 599 other than 200", found)
        error, end = transform.to_error, transform.to_disconnect
        if bool(error.code) == bool(end.code):
            yield _Clash((path,), "to_error with a code or to_disconnect with one", "both" if end.code else "neither")
        elif error.code and (error.code < 100 or not error.message):
            yield _Clash(((*path, "to_error"),), "a code of 100 or more and a message", repr(error.code))
        elif end.code and (end.code <= 3000 or not 0 < len(end.reason) <= 123 or not end.reason.isascii()):
            expected = "a code from 3001 to 4999 and a reason of 1 to 123 ASCII characters"
            yield _Clash(((*path, "to_disconnect"),), expected, repr(end.code))


def _overlap(one: Place, other: Place) -> bool:
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


def _contradictions(settings: Settings, layers: list[_Layer], faulty: list[Place]) -> Iterator[Fault]:
    for find in (_server_clashes, _client_clashes, _channel_clashes, _proxy_clashes):
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
    settings = Settings.from_options(merged, configured=configured)
    faults += _contradictions(settings, layers, faulty)
    if faults:
        raise SettingsError(faults)
    return settings


def contradictions(settings: Settings) -> list[Fault]:
    """What is wrong only together in settings that no source has given as they are."""
    return list(_contradictions(settings, [], []))


def _matters(path: Place) -> bool:
    """Does a value here end the trying out?  ``Settings.configured`` names those that do not."""
    return path[0] not in ("log", "sqlite") and path not in (("http_server", "address"), ("http_server", "port"))


class Row(NamedTuple):
    """One option, for the table in the README."""

    name: str
    type: str
    default: str
    help: str


def reference() -> list[Row]:
    """Every option with its full name, type, default and help, in the order of the tree.

    The options of a namespace are those of ``channel.without_namespace``, those of
    a proxy those of ``client.proxy.connect``; only what one has besides is listed
    again, and each proxy's endpoint.
    """
    rows = []
    for path, field in _KNOWN.items():
        shared = path[:2] == ("channel", "namespaces") and path[-1] in ChannelOptions.model_fields
        shared = shared or (path[:2] == ("rpc", "namespaces") and path[-1] in RpcOptions.model_fields)
        if shared or _is_like_another_proxy(path) or (_inner(field) is not None and not _is_list(field)):
            continue
        marker = _marker(field)
        kind = re.sub("^an? ", "", _kind(field)) + (" (secret)" if marker is not None and marker.secret else "")
        rows.append(Row(_dotted(path), kind, _default_text(field), field.description or ""))
    return rows


def _is_like_another_proxy(path: Place) -> bool:
    for depth, _ in enumerate(path, 1):
        above, below = path[:depth], path[depth:]
        if above in _PROXIES and above != ("client", "proxy", "connect") and below:
            return below[0] in ProxySettings.model_fields and below[0] != "endpoint"
    return False


_PROXIES = {
    (*path, 0) if _is_list(field) else path
    for path, field in _KNOWN.items()
    if (inner := _inner(field)) is not None and issubclass(inner, ProxySettings)
}
"""Where there is a proxy."""


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return json.dumps(duration_text(value) if isinstance(value, float) else value)
