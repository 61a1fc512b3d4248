"""Back ends that are asked over HTTP: what goes there, and what their answers mean.

A proxy is a hook (``hooks.Remote``) whose function stands in a back end: sessions
ask it where they would ask the user's own module, and cannot tell the two apart.
Here requests are built and answers understood, both plain; in between stands
``Endpoint.post``, which waits for a free place and then for the ``Fetch`` that it
was given, since this knows no HTTP client.

What a back end does wrong costs the command that asked it, and nobody else: each
endpoint has ``AT_ONCE`` places, each request its time limit, which begins when it
gets into the queue, each answer a size.  Every failure is error 100; the log has
the first one, and then one line each ``QUIET_S`` however many there are.

Different from hooks in one thing: a proxy *decides*.  Where a namespace has one,
the configuration's own permissions do not count.  So that this can never open what
nobody answers for, the channel space learns of it only when proxies are attached.
PROTOCOL 16.
"""

import asyncio
import base64
import binascii
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec
from msgspec import UNSET, Raw, UnsetType

from server import protocol
from server.auth import Override
from server.errors import (
    BAD_REQUEST,
    DISCONNECTS,
    METHOD_NOT_FOUND,
    REFUSALS,
    Refusal,
    Refused,
    Unavailable,
)
from server.hooks import Allow, Change, Client, Disconnect, Exact, Hooks, Refuse, Remote, Renewal, Welcome
from server.messages import Message
from server.node import Node
from server.observe import event
from server.protocol import Payload, is_json, one_line
from server.settings import ProxySettings, Settings

T = TypeVar("T")

AT_ONCE = 64
"""Requests to one endpoint that are under way at a time."""

WAITING = 2_000
"""Requests that wait for that; beyond it there is error 100 at once."""

QUIET_S = 10.0
"""How long the log says nothing more of an endpoint that goes on failing."""

HEADER_VALUE = re.compile(r"[\t -~\x80-\xff]{0,8192}")
"""What can be a header (RFC 9110 5.5); a client that gives anything else as an emulated one has not given it."""


# --- the seam to HTTP --------------------------------------------------------------
class Post(msgspec.Struct, frozen=True):
    """One request, to be answered within ``timeout_s``."""

    url: str
    headers: Mapping[str, str]
    body: bytes
    timeout_s: float


class Response(msgspec.Struct, frozen=True):
    """What came back, whatever its status."""

    status: int
    body: bytes


Fetch = Callable[[Post], Awaitable[Response]]
"""Carries a request there and the answer back, without following redirects.

Raises ``errors.Unavailable``, in an operator's words, if there is no answer in time,
or one that is too large.
"""


# --- requests ------------------------------------------------------------------------
class Question(msgspec.Struct, omit_defaults=True):
    """The body of every request; each event has those of these fields that it knows (PROTOCOL 16)."""

    client: str
    transport: str
    protocol: str
    encoding: str
    user: str | UnsetType = UNSET
    channel: str | UnsetType = UNSET
    method: str | UnsetType = UNSET
    name: str = ""
    version: str = ""
    channels: list[str] = []
    data: Payload = UNSET
    b64data: str = ""
    meta: Payload = UNSET


# --- answers -------------------------------------------------------------------------
class _Error(msgspec.Struct):
    code: int
    message: str = ""
    temporary: bool = False


class _Disconnect(msgspec.Struct):
    code: int
    reason: str = ""


class _Answer(msgspec.Struct):
    result: Payload = UNSET
    error: _Error | None = None
    disconnect: _Disconnect | None = None


class _Switch(msgspec.Struct):
    value: bool = False


class _Subscribed(msgspec.Struct):
    info: Payload = UNSET
    b64info: str = ""
    data: Payload = UNSET
    b64data: str = ""
    expire_at: int = 0
    override: dict[str, _Switch | None] | None = None


class _Connected(msgspec.Struct):
    user: str = ""
    expire_at: int = 0
    info: Payload = UNSET
    b64info: str = ""
    data: Payload = UNSET
    b64data: str = ""
    channels: list[str] | None = None
    subs: dict[str, _Subscribed | None] | None = None
    meta: Payload = UNSET


class _Refreshed(msgspec.Struct):
    expired: bool = False
    expire_at: int = 0
    info: Payload = UNSET
    b64info: str = ""
    meta: Payload = UNSET


class _Called(msgspec.Struct):
    data: Payload = UNSET
    b64data: str = ""


class Nonsense(Exception):
    """An answer that cannot be used; its text says what was expected."""


class _Refuse(Refuse):
    """A refusal with any code that an SDK takes for the server's."""

    def __init__(self, refusal: Refusal, why: str) -> None:
        Refused.__init__(self, refusal, why)


def understand(status: int, body: bytes, proxy: ProxySettings, why: str) -> bytes | None:
    """The result in an answer, ``None`` if it has none; PROTOCOL 16.

    Raises ``Refuse`` and ``Disconnect`` if that is the answer, ``Nonsense`` if it
    is none.  ``why`` names the proxy, for the log.
    """
    for transform in proxy.http.status_to_code_transforms:
        if transform.status_code == status:
            error, end = transform.to_error, transform.to_disconnect
            if end.code:
                raise Disconnect(end.code, end.reason)
            raise _Refuse(Refusal(error.code, error.message, error.temporary), f"{why}: status {status}")
    if status != 200:
        raise Nonsense(f"expected status 200, got {status}")
    answer = _decoded(body, _Answer)
    if answer.disconnect is not None:
        code, known = answer.disconnect.code, DISCONNECTS.get(answer.disconnect.code)
        try:
            raise Disconnect(
                code, answer.disconnect.reason or (known.reason if known else "disconnected by the back end")
            )
        except ValueError as error:
            raise Nonsense(f"disconnect: {error}") from None
    if answer.error is not None:
        raise _refuse(answer.error, why)
    return _given(answer.result)


def _refuse(error: _Error, why: str) -> Refuse:
    # SDKs take codes below 100 for their own.
    if not 100 <= error.code < 2**32:
        raise Nonsense(f"error: expected a code from 100 on, got {error.code}")
    known = REFUSALS.get(error.code)
    message = error.message or (known.message if known else "refused by the back end")
    return _Refuse(
        Refusal(error.code, message, error.temporary or bool(known and known.temporary)), f"{why} refused it"
    )


def _decoded(body: bytes, kind: type[T]) -> T:
    try:
        body.decode()
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # What it says of a value of a wrong type names the type only.
        raise Nonsense(f"expected an answer in JSON: {error}") from None


def _given(field: Payload) -> bytes | None:
    """A field's bytes; one that is ``null`` counts as absent."""
    given = protocol.given(field)
    return None if given == b"null" else given


def _bytes(name: str, data: Payload, encoded: str) -> bytes | None:
    """A payload given as JSON, or in base64, which wins; ``None`` for neither."""
    if encoded:
        try:
            return base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError):
            raise Nonsense(f"expected base64 in b64{name}") from None
    given = _given(data)
    if given is None:
        return None
    if not is_json(given):
        raise Nonsense(f"expected JSON in {name} that is nested 128 deep at most")
    return one_line(given)


def _info(data: Payload, encoded: str) -> Exact | bytes | UnsetType:
    """What others see: JSON as it is; other bytes stay bytes, which become a JSON string (PROTOCOL 8.1)."""
    found = _bytes("info", data, encoded)
    if found is None:
        return UNSET
    return Exact(one_line(found)) if is_json(found) else found


def _shown(client: Client, data: Payload, encoded: str) -> Exact | bytes | UnsetType:
    """What one client gets: as ``_info``, but a client that speaks Protobuf gets bytes as they are."""
    found = _bytes("data", data, encoded)
    if found is None:
        return UNSET
    if is_json(found):
        return Exact(one_line(found))
    return Exact(found) if client.request.format == "protobuf" else found


def _note_meta(client: Client, meta: Payload) -> None:
    """Keep what is for back ends only, unless none was given."""
    given = _bytes("meta", meta, "")
    if given is None:
        return
    if not given.lstrip(b" \t").startswith(b"{"):
        raise Nonsense("expected an object as meta")
    client.meta = given


def _allowed(client: Client, result: _Subscribed) -> Allow:
    override = {name: switch.value for name, switch in (result.override or {}).items() if switch is not None}
    unknown = override.keys() - set(Override.__struct_fields__)
    if unknown:
        raise Nonsense(f"expected in override {', '.join(Override.__struct_fields__)}, got {sorted(unknown)[0]!r}")
    return Allow(
        chan_info=_info(result.info, result.b64info),
        data=_shown(client, result.data, result.b64data),
        expire_at=result.expire_at,
        override=Override(**override),
    )


# --- one endpoint -----------------------------------------------------------------------
class Endpoint:
    """A back end's address, with its options; ``called`` is the setting that has them.

    ``clock`` is in seconds and only grows.
    """

    def __init__(self, proxy: ProxySettings, called: str, fetch: Fetch, clock: Callable[[], float]) -> None:
        self.proxy = proxy
        self.called = called
        address = urlsplit(proxy.endpoint)
        # As it may be shown: neither a password nor a key that stands in the query.
        self.where = f"{address.scheme}://{address.netloc.rpartition('@')[2]}{address.path}"
        self._fetch = fetch
        self._clock = clock
        self._places = asyncio.Semaphore(AT_ONCE)
        self._waiting = 0
        self._failures = 0
        self._logged_at = float("-inf")

    def __repr__(self) -> str:
        return f"<Endpoint {self.called} waiting={self._waiting}>"

    async def ask(self, client: Client, question: Question) -> bytes | None:
        """The result of the back end's answer, ``None`` if it gave none.

        Raises ``Refuse`` and ``Disconnect`` if that is the answer, and ``Unavailable``,
        which is logged, if there is no answer or none that makes sense.
        """
        response = await self._post(self._headers(client), msgspec.json.encode(question))
        return self.read(lambda: understand(response.status, response.body, self.proxy, self.called))

    def read(self, reading: Callable[[], T]) -> T:
        """What ``reading`` an answer gives; nonsense is logged, and ``Unavailable``."""
        try:
            return reading()
        except Nonsense as nonsense:
            raise self._failed(str(nonsense)) from None

    async def _post(self, headers: dict[str, str], body: bytes) -> Response:
        until = self._clock() + self.proxy.timeout
        if self._waiting >= WAITING:
            raise self._failed(f"{WAITING} requests are waiting already")
        self._waiting += 1
        try:
            async with asyncio.timeout(self.proxy.timeout):
                await self._places.acquire()
        except TimeoutError:
            raise self._failed(f"no free place within {self.proxy.timeout:g} s, {AT_ONCE} are taken") from None
        finally:
            self._waiting -= 1
        try:
            left_s = max(until - self._clock(), 0.001)
            return await self._fetch(Post(self.proxy.endpoint, headers, body, left_s))
        except Unavailable as error:
            raise self._failed(str(error)) from None
        finally:
            self._places.release()

    def _failed(self, why: str) -> Unavailable:
        self._failures += 1
        now = self._clock()
        if now - self._logged_at >= QUIET_S:
            event("proxy.failed", proxy=self.called, endpoint=self.where, why=why, failures=self._failures)
            self._logged_at = now
            self._failures = 0
        return Unavailable(f"{self.called}: {why}")

    def _headers(self, client: Client) -> dict[str, str]:
        """The static ones, over them the emulated ones, over them those of the client's own request."""
        headers = {name.lower(): value for name, value in self.proxy.http.static_headers.items()}
        for names, given in (
            (self.proxy.emulated_headers, client.emulated),
            (self.proxy.http_headers, client.request.headers),
        ):
            lower = map(str.lower, names)
            headers.update((name, given[name]) for name in lower if name in given)
        return {**headers, "content-type": "application/json"}

    def question(self, client: Client, data: bytes | None, **fields: Any) -> Question:
        """A request about ``client``; raises ``Refused(BAD_REQUEST)`` for ``data`` that only base64 could carry."""
        proxy, request = self.proxy, client.request
        question = Question(
            client=client.id,
            transport=request.transport,
            protocol=request.format,
            encoding="binary" if proxy.binary_encoding else "json",
            **fields,
        )
        if data and proxy.binary_encoding:
            question.b64data = base64.b64encode(data).decode()
        elif data:
            if not is_json(data):
                raise Refused(BAD_REQUEST, f"data is no JSON; look at {self.called}.binary_encoding")
            question.data = Raw(data)
        if proxy.include_connection_meta and client.meta is not None:
            question.meta = Raw(client.meta)
        return question


# --- one hook for each event ---------------------------------------------------------------
class Proxied(Remote):
    """A hook at an endpoint."""

    def __init__(self, kind: str, key: str | None, endpoint: Endpoint) -> None:
        super().__init__(kind, key, endpoint.called, endpoint.where)
        self.endpoint = endpoint

    async def put(self, client: Client, data: bytes | None, kind: type[T], **fields: Any) -> T | None:
        """The result of asking, as ``kind``; ``None`` if there was none."""
        endpoint = self.endpoint
        result = await endpoint.ask(client, endpoint.question(client, data, **fields))
        return None if result is None else endpoint.read(lambda: _decoded(result, kind))

    async def require(self, client: Client, data: bytes | None, kind: type[T], **fields: Any) -> T:
        """As ``put``; but an answer must have a result."""
        found = await self.put(client, data, kind, **fields)
        if found is None:
            raise self.endpoint._failed("expected result, error or disconnect, got neither of them")
        return found


class Connecting(Proxied):
    """PROTOCOL 16.1."""

    async def ask(self, client: Client, *arguments: str, data: bytes | None) -> Welcome | None:
        """Who a client without token is; ``None`` if the back end does not know."""
        introduction = client.introduction or protocol.ConnectRequest()
        found = await self.put(
            client,
            data,
            _Connected,
            name=introduction.name,
            version=introduction.version,
            channels=list(introduction.subs),
        )
        return None if found is None else self.endpoint.read(lambda: self._welcome(client, found))

    def _welcome(self, client: Client, found: _Connected) -> Welcome:
        _note_meta(client, found.meta)
        channels = dict.fromkeys(found.channels or (), Allow())
        channels.update((name, _allowed(client, sub or _Subscribed())) for name, sub in (found.subs or {}).items())
        return Welcome(
            user=found.user,
            conn_info=_info(found.info, found.b64info),
            data=_shown(client, found.data, found.b64data),
            channels=channels,
            expire_at=found.expire_at,
        )


class Subscribing(Proxied):
    """PROTOCOL 16.3."""

    async def ask(self, client: Client, *arguments: str, data: bytes | None) -> Allow:
        """May it subscribe, and how?"""
        (channel,) = arguments
        found = await self.require(client, data, _Subscribed, user=client.user, channel=channel)
        return self.endpoint.read(lambda: _allowed(client, found))


class Publishing(Proxied):
    """PROTOCOL 16.4."""

    async def ask(self, client: Client, *arguments: str, data: bytes | None) -> Change:
        """May it publish this, and what becomes of it?"""
        (channel,) = arguments
        found = await self.require(client, data, Message, user=client.user, channel=channel)
        return self.endpoint.read(lambda: self._change(found))

    def _change(self, found: Message) -> Change:
        if len(found.idempotency_key) > 256:
            raise Nonsense("expected an idempotency_key of at most 256 characters")
        data = _bytes("data", found.data, found.b64data)
        return Change(
            UNSET if data is None else Exact(data),
            found.tags,
            found.idempotency_key,
            found.skip_history,
            found.delta,
            found.versioned,
        )


class Refreshing(Proxied):
    """PROTOCOL 16.2, 16.5; of a connection, or with a channel of its subscription."""

    async def ask(self, client: Client, *arguments: str, data: bytes | None) -> Renewal:
        """What becomes of it; an answer without result, or with an error, means that it is over."""
        fields = {"channel": arguments[0]} if arguments else {}
        try:
            found = await self.put(client, None, _Refreshed, user=client.user, **fields)
        except Refuse:
            found = None
        if found is None or found.expired:
            return Renewal(True)
        return self.endpoint.read(lambda: self._renewal(client, found))

    def _renewal(self, client: Client, found: _Refreshed) -> Renewal:
        info = _info(found.info, found.b64info)
        encoded = None if isinstance(info, UnsetType) else bytes(info)
        if encoded is not None and not isinstance(info, Exact):
            encoded = msgspec.json.encode(encoded)
        _note_meta(client, found.meta)
        return Renewal(False, found.expire_at, encoded)


class Calling(Proxied):
    """PROTOCOL 16.6; ``key`` is the method."""

    async def ask(self, client: Client, *arguments: str, data: bytes | None) -> Any:
        """What a remote procedure returns; ``None`` for nothing."""
        found = await self.require(client, data, _Called, user=client.user, method=self.key or "")
        shown = self.endpoint.read(lambda: _shown(client, found.data, found.b64data))
        return None if isinstance(shown, UnsetType) else shown


# --- all of them -------------------------------------------------------------------------
class Proxies:
    """The proxies of a configuration, ready to be asked; it is ``hooks.Elsewhere``.

    ``fetch`` and ``clock`` are as ``Endpoint`` wants them.
    """

    def __init__(self, settings: Settings, fetch: Fetch, clock: Callable[[], float]) -> None:
        self._rpc: dict[str, Endpoint | None] = {}
        self._boundary = settings.rpc.namespace_boundary
        self._hooks: dict[tuple[str, str | None], Remote] = {}
        endpoints: dict[str, Endpoint] = {}

        def endpoint(name: str, own: ProxySettings, called: str) -> Endpoint:
            """The endpoint that a namespace chooses: one for each place in the settings, however many share it."""
            chosen, place = own, called
            for number, proxy in enumerate(settings.proxies):
                if proxy.name == name:
                    chosen, place = proxy, f"proxies.{number}"
            return endpoints.setdefault(place, Endpoint(chosen, place, fetch, clock))

        clients = settings.client.proxy
        if clients.connect.enabled:
            self._add(Connecting("connecting", None, endpoint("", clients.connect, "client.proxy.connect")))
        if clients.refresh.enabled:
            self._add(Refreshing("refreshing", None, endpoint("", clients.refresh, "client.proxy.refresh")))
        channel, own = settings.channel, settings.channel.proxy
        for name, options in [("", channel.without_namespace), *((one.name, one) for one in channel.namespaces)]:
            if options.subscribe_proxy_enabled:
                chosen = endpoint(options.subscribe_proxy_name, own.subscribe, "channel.proxy.subscribe")
                self._add(Subscribing("subscribing", name, chosen))
            if options.publish_proxy_enabled:
                chosen = endpoint(options.publish_proxy_name, own.publish, "channel.proxy.publish")
                self._add(Publishing("publishing", name, chosen))
            if options.sub_refresh_proxy_enabled:
                chosen = endpoint(options.sub_refresh_proxy_name, own.sub_refresh, "channel.proxy.sub_refresh")
                self._add(Refreshing("sub_refreshing", name, chosen))
        for name, rpc in [("", settings.rpc.without_namespace), *((one.name, one) for one in settings.rpc.namespaces)]:
            self._rpc[name] = endpoint(rpc.proxy_name, settings.rpc.proxy, "rpc.proxy") if rpc.proxy_enabled else None
        self.headers = frozenset(name.lower() for one in endpoints.values() for name in one.proxy.http_headers)
        """The headers of a client's own request that somebody wants to see, by lower-case name."""
        self._emulated = frozenset(name.lower() for one in endpoints.values() for name in one.proxy.emulated_headers)

    def __repr__(self) -> str:
        return f"<Proxies {', '.join(hook.name for hook in self._hooks.values()) or 'none'}>"

    def _add(self, hook: Remote) -> None:
        self._hooks[hook.kind, hook.key] = hook

    @property
    def events(self) -> Iterable[tuple[str, str | None]]:
        """Kind and namespace of every event that is asked about, but for remote procedures."""
        return self._hooks.keys()

    def find(self, kind: str, key: str | None = None) -> Remote | None:
        """The hook for this event: of just this namespace, since each chooses for itself.

        Raises ``Refused``: 104 for a procedure of an unknown namespace, 108 where its namespace has no proxy, if
        there are namespaces of procedures at all.
        """
        if kind != "rpc":
            return self._hooks.get((kind, key))
        head, boundary, _ = (key or "").partition(self._boundary)
        name = head if boundary else ""
        if name not in self._rpc:
            if len(self._rpc) == 1 and self._rpc[""] is None:
                return None  # nobody configured any of this
            raise Refused(METHOD_NOT_FOUND, f"no entry of rpc.namespaces is named {name[:64]!r}")
        endpoint = self._rpc[name]
        return None if endpoint is None else Calling("rpc", key, endpoint)

    def emulated(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Those headers of a connect command that somebody wants to see, by lower-case name (PROTOCOL 4.1)."""
        return {
            name.lower(): value
            for name, value in headers.items()
            if name.lower() in self._emulated and HEADER_VALUE.fullmatch(value)
        }

    def attach(self, node: Node) -> None:
        """Have the sessions of ``node``, to which none has come yet, ask these.

        Raises ``AppError`` if the user's module has hooks for the same events.
        """
        if not self._hooks and not any(self._rpc.values()):
            return
        hooks = node.hooks
        if hooks is None:
            hooks = Hooks()
            hooks.check(node.channels, ())
        hooks.ask_elsewhere(self, self.events)
        node.hooks = hooks
        node.channels.decided_elsewhere = frozenset(self.events)
