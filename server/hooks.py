"""What a user's own module may declare, and how the server asks it.

``Hooks`` is the table: one function for each event (and namespace), one for each
remote procedure.  Nothing is checked while functions are registered; ``faults``
then names everything that is wrong at once, each with function, file and line.
``ask`` calls a function under a time limit and judges what it answers, so that
whatever a hook does costs one command and one line of the log.

Two rules shaped it.  *The configuration decides first*: a hook narrows what the
options allow and never sees what they refuse, so that it may have side effects.
*The hooks of one client never overlap*: they take turns, also when the client
leaves while one of them waits; those of different clients do not wait for one
another.

Knows no node and no session: ``Peer`` is what it asks of one.  PROTOCOL 4, 7.1.
"""

import asyncio
import inspect
import re
import types
import typing
from collections.abc import Callable, Container, Coroutine, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import NoneType, UnionType
from typing import Any, NoReturn, Protocol, TypeVar, overload

import msgspec
from msgspec import UNSET

from server import orders
from server.auth import Override
from server.channels import Channels
from server.errors import (
    BAD_REQUEST,
    FORCE_DISCONNECT,
    INTERNAL,
    PERMISSION_DENIED,
    REFUSALS,
    Disconnected,
    Refusal,
    Refused,
    Unavailable,
)
from server.errors import Disconnect as Ending
from server.history import Version
from server.observe import event
from server.outbox import Request
from server.protocol import ConnectRequest, is_json, one_line
from server.stream import ClientInfo

T = TypeVar("T")
Working = Coroutine[Any, Any, Any]
F = TypeVar("F", bound=Callable[..., Working])

BUILT_IN = ("publish", "ping")
"""Remote procedures that the server answers itself (PROTOCOL 4.7)."""

TIMEOUT_S = 1.0
CLEAR_UP_S = 0.1
"""How long a hook that was cut off is waited for, so that it may clear up before the next one begins."""


class Alarm(Protocol):
    """What will happen later, unless it is cancelled."""

    def cancel(self) -> None:
        """Let it not happen."""


CallLater = Callable[[float, Callable[[], None]], Alarm]


def _call_later(seconds: float, callback: Callable[[], None]) -> Alarm:
    return asyncio.get_running_loop().call_later(seconds, callback)


# --- "no" -----------------------------------------------------------------------
class Refuse(Refused):
    """Raise it in a hook to refuse the command: 400 to 1999 are the application's own codes (PROTOCOL 7.1).

    A code of the protocol's table may be given, too; its message is then the
    table's unless ``message`` says otherwise.  ``temporary`` tells an SDK to try
    again.  Raises ``ValueError`` for any other code.
    """

    def __init__(self, code: int = PERMISSION_DENIED.code, message: str = "", *, temporary: bool = False) -> None:
        known = REFUSALS.get(code)
        if known is None and not 400 <= code <= 1999:
            raise ValueError(f"expected a refusal's code from 400 to 1999, got {code}")
        if known is None and not message:
            raise ValueError(f"expected a message with the refusal {code}, got none")
        refusal = Refusal(
            code, message or (known.message if known else ""), temporary or bool(known and known.temporary)
        )
        super().__init__(refusal, "a hook refused it")


class Disconnect(Disconnected):
    """Raise it in a hook to end the client's connection; 4000 to 4999 are the application's codes (PROTOCOL 7.2).

    From 3500 to 3999 and from 4500 on clients stay away, otherwise they come
    back.  Raises ``ValueError`` for a code or a reason that SDKs would misread.
    """

    def __init__(self, code: int = FORCE_DISCONNECT.code, reason: str = FORCE_DISCONNECT.reason) -> None:
        super().__init__(ending(code, reason), "a hook ended it")


def ending(code: int, reason: str) -> Ending:
    """A disconnect of the application's; raises ``ValueError`` for one that SDKs would misread (PROTOCOL 7.2)."""
    text = reason.encode()
    if not 3000 < code < 5000 or not 0 < len(text) <= 123 or not reason.isascii() or is_json(text):
        raise ValueError(
            "expected a code from 3001 to 4999 and a reason of 1 to 123 ASCII bytes that is no JSON, "
            f"got {code} and {reason!r}"
        )
    return Ending(code, reason)


class AppError(Exception):
    """The user's module cannot be used; one line for each fault, each naming function, file and line."""


# --- "yes, and" -----------------------------------------------------------------
class Allow(msgspec.Struct, frozen=True):
    """What a subscription gets besides its permission; the answer of ``subscribing`` (PROTOCOL 4.2).

    ``chan_info`` is what others see of this client in this channel, ``data`` what
    the client gets with the reply; any value that JSON can hold.  ``expire_at``
    (Unix s) ends the subscription unless it is refreshed (PROTOCOL 8.4), 0 leaves
    what a token says; ``override`` switches options of the namespace (PROTOCOL 8.1).
    """

    chan_info: Any = UNSET
    data: Any = UNSET
    expire_at: int = 0
    override: Override = Override()

    def __post_init__(self) -> None:
        """Raises ``TypeError`` where it is made, so that the trace names the line."""
        if not isinstance(self.expire_at, int) or not isinstance(self.override, Override):
            raise TypeError("expected expire_at in whole Unix seconds and an Override")


class Welcome(msgspec.Struct, frozen=True):
    """Who a client is and what it begins with; the answer of ``connecting`` (PROTOCOL 4.1).

    ``user`` names the user, unless a token did; ``conn_info`` is what others see
    of the client; ``data`` is what it gets with the reply.  ``channels`` are
    subscribed server-side, a mapping gives each its ``Allow``.  ``expire_at`` (Unix
    s) ends the connection unless it is refreshed (PROTOCOL 8.3), 0 leaves what a
    token says.
    """

    user: str | None = None
    conn_info: Any = UNSET
    data: Any = UNSET
    channels: Sequence[str] | Mapping[str, Allow] = ()
    expire_at: int = 0

    def __post_init__(self) -> None:
        """Raises ``TypeError`` where it is made, so that the trace names the line."""
        if self.user is not None and not isinstance(self.user, str):
            raise TypeError(f"expected user to be text or None, got {type(self.user).__name__}")
        if isinstance(self.channels, str) or not all(isinstance(channel, str) for channel in self.channels):
            raise TypeError("expected channels to be a list of names, or names with their Allow")
        if not isinstance(self.expire_at, int):
            raise TypeError(f"expected expire_at in whole Unix seconds, got {type(self.expire_at).__name__}")


class Change(msgspec.Struct, frozen=True):
    """What is published instead; the answer of ``publishing`` (PROTOCOL 4.4).

    ``data`` is any value that JSON can hold (``bytes`` as they are where the
    namespace is binary); what is not given stays as it came.  ``key`` makes a repeat
    harmless, what ``version`` calls outdated is not published (PROTOCOL 11.8); with
    ``skip_history`` it only passes; with ``delta`` it goes as a patch to those who
    want one (PROTOCOL 12).
    """

    data: Any = UNSET
    tags: dict[str, str] | None = None
    key: str = ""
    skip_history: bool = False
    delta: bool = False
    version: Version = Version()

    def __post_init__(self) -> None:
        """Raises ``TypeError`` where it is made, so that the trace names the line."""
        words = [word for tag in (self.tags or {}).items() for word in tag]
        if not all(isinstance(word, str) for word in words):
            raise TypeError("expected tags to be texts by name")
        if not isinstance(self.key, str) or len(self.key) > 256:
            raise TypeError("expected key to be a text of at most 256 characters")


class Renewal(msgspec.Struct, frozen=True):
    """What becomes of what has expired; ``info`` is payload bytes, ``expire_at`` Unix seconds, 0 for never."""

    expired: bool
    expire_at: int = 0
    info: bytes | None = None


# --- the client, as hooks see it ---------------------------------------------------
class Peer(Protocol):
    """What is asked of one client's session."""

    client: str
    user: str
    info: ClientInfo
    request: Request

    @property
    def closed(self) -> bool:
        """Is it over?"""

    @property
    def following(self) -> list[str]:
        """The channels it is subscribed to."""

    def disconnect(self, disconnect: Ending, why: str = "") -> None:
        """End the connection."""

    def subscribe_by_order(self, order: orders.SubscribeOrder) -> None:
        """Subscribe server-side."""

    def unsubscribe_by_order(self, channel: str) -> None:
        """End the subscription of ``channel``."""


class Client:
    """One connection, the same object in all its hooks; ``notes`` is the application's to write in."""

    def __init__(self, peer: Peer, hooks: "Hooks") -> None:
        self._peer = peer
        self._hooks = hooks
        self.notes: dict[str, Any] = {}
        self.turn = asyncio.Lock()
        """Held by the hook of this client that runs."""
        self.dressed = False
        """Did a hook set its ``conn_info``?  Then a refreshed token does not."""
        self.welcomed = False
        self.introduction: ConnectRequest | None = None
        """What it connects with, while it does."""
        self.emulated: Mapping[str, str] = {}
        """Headers that it gave with connect instead of real ones, by lower-case name (PROTOCOL 4.1)."""
        self.meta: bytes | None = None
        """What its token or its back end said of it for back ends only, as a JSON object (PROTOCOL 8.1)."""

    def __repr__(self) -> str:
        return f"<Client {self.id} user={self.user!r}>"

    @property
    def id(self) -> str:
        """The client id: a new one for each connection."""
        return self._peer.client

    @property
    def user(self) -> str:
        """The user id; ``""`` is the anonymous user."""
        return self._peer.user

    @property
    def info(self) -> Any:
        """What others see of it (``conn_info``), ``None`` for nothing."""
        return decoded(self._peer.info.conn_info)

    @property
    def address(self) -> str:
        """The IP address it comes from."""
        return self._peer.request.remote_addr

    @property
    def request(self) -> Request:
        """How it came here."""
        return self._peer.request

    @property
    def transport(self) -> str:
        """What carries it, such as ``"websocket"``."""
        return self._peer.request.transport

    @property
    def channels(self) -> list[str]:
        """The channels it is subscribed to at the moment."""
        return self._peer.following

    @property
    def connected(self) -> bool:
        """Is it still here?  To be asked after a wait."""
        return not self._peer.closed

    def subscribe(self, channel: str, *, chan_info: Any = UNSET, data: Any = UNSET) -> None:
        """Subscribe this connection server-side, soon; no effect before it is connected (see ``Welcome.channels``).

        Raises ``Refused`` for a name that no namespace has.
        """
        self._hooks.check_channel(channel)
        target = orders.Target(self.user, self.id)
        self._peer.subscribe_by_order(orders.SubscribeOrder(target, channel, encoded(chan_info), encoded(data)))

    def unsubscribe(self, channel: str) -> None:
        """End its subscription of ``channel`` with 2000; no effect if there is none."""
        if channel:
            self._peer.unsubscribe_by_order(channel)

    def disconnect(self, code: int = FORCE_DISCONNECT.code, reason: str = FORCE_DISCONNECT.reason) -> None:
        """End this connection now; raises ``ValueError`` as ``Disconnect`` does."""
        self._peer.disconnect(ending(code, reason), "a hook ended it")


def decoded(data: bytes | None) -> Any:
    """A payload as Python values: bytes that are no JSON stay bytes, ``None`` for none."""
    if data is None:
        return None
    return msgspec.json.decode(data) if is_json(data) else data


class Exact(bytes):
    """Payload bytes that are what they are, for ``encoded`` to leave alone."""


def encoded(value: Any) -> bytes | None:
    """A value as payload bytes, ``None`` for ``UNSET``; raises ``ValueError`` for what JSON cannot hold."""
    if value is UNSET:
        return None
    if isinstance(value, Exact):
        return bytes(value)
    try:
        data = msgspec.json.encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"expected a value that JSON can hold: {error}") from None
    if not is_json(data):
        raise ValueError("expected a value that JSON can hold, nested 128 deep at most")
    return one_line(data)


# --- one hook ------------------------------------------------------------------------
class Event(msgspec.Struct, frozen=True):
    """What a hook of one kind takes, and what it may answer besides ``None``."""

    parameters: tuple[str, ...]
    answer: type | None = None
    by_namespace: bool = False


KINDS: dict[str, Event] = {
    "connecting": Event(("client", "data"), Welcome),
    "subscribing": Event(("client", "channel", "data"), Allow, by_namespace=True),
    "publishing": Event(("client", "channel", "data"), Change, by_namespace=True),
    "leaving": Event(("client", "channel"), by_namespace=True),
    "disconnecting": Event(("client",)),
    "rpc": Event(("client", "data"), object),
    "starting": Event(()),
    "stopping": Event(()),
}


class Hook:
    """One function of the user's, ready to be asked.  ``name`` says for what, ``where`` is its file and line."""

    decides = False
    """Does it decide in place of the configuration, and not only of what that permits?"""

    def __init__(self, kind: str, key: str | None, function: Callable[..., Working]) -> None:
        self.kind = kind
        self.key = key
        self.function = function
        self.name = kind if key is None else f"{kind} {key!r}"
        self.answer = KINDS[kind].answer
        self.takes_data = False
        self._decode: Callable[[bytes], Any] | None = None
        code = getattr(function, "__code__", None)
        self.called = getattr(function, "__qualname__", repr(function))
        self.where = f"{code.co_filename}:{code.co_firstlineno}" if code else "?"

    def __repr__(self) -> str:
        return f"<Hook {self.name} {self.called} at {self.where}>"

    def fault(self, what: str) -> str:
        """A line about something wrong with this function."""
        return f"{self.where}: {self.called} ({self.name}): {what}"

    def prepare(self) -> str | None:
        """Look at the signature and make the decoder; returns what is wrong with it."""
        parameters = KINDS[self.kind].parameters
        words = ", ".join(parameters)
        if not inspect.iscoroutinefunction(self.function):
            return self.fault(f"expected async def {self.called}({words}), got something that cannot be awaited")
        taken = list(inspect.signature(self.function).parameters.values())
        plain = [one for one in taken if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
        needed = [one for one in taken if one.default is one.empty and one.kind not in (one.VAR_KEYWORD,)]
        optional = 1 if parameters[-1:] == ("data",) else 0
        if len(plain) != len(needed) or not len(parameters) - optional <= len(plain) <= len(parameters):
            return self.fault(f"expected the parameters ({words}), got {inspect.signature(self.function)}")
        for name, one in zip(parameters, plain, strict=False):
            if one.name != name and one.name in parameters:
                return self.fault(f"expected {name} in place of {one.name}: the parameters are ({words})")
        try:
            hints = typing.get_type_hints(self.function)
        except Exception as error:
            return self.fault(f"its annotations cannot be resolved: {error}")
        for name, one in zip(parameters, plain, strict=False):
            hint = hints.get(one.name, Any)
            wanted = {"client": Client, "channel": str}.get(name)
            if wanted is not None and hint not in (Any, wanted):
                return self.fault(f"expected {one.name} to be a {wanted.__name__}, got {_called(hint)}")
        self.takes_data = len(plain) == len(parameters) and optional == 1
        if self.takes_data:
            try:
                self._decode = _decoder(hints.get(plain[-1].name, Any))
            except (TypeError, ValueError, NameError) as error:
                return self.fault(f"the type of {plain[-1].name} cannot be checked: {error}")
        return self._wrong_answer(hints.get("return", Any))

    def _wrong_answer(self, hint: Any) -> str | None:
        if self.answer is object:
            return None
        allowed = {None, NoneType, Any, NoReturn, self.answer}
        members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)
        if all(one in allowed for one in members):
            return None
        wanted = f"{self.answer.__name__} or None" if self.answer else "None"
        return self.fault(f"expected it to return {wanted}, got {_called(hint)}")

    def payload(self, data: bytes | None) -> tuple[Any, ...]:
        """The last argument, checked against its declared type; raises ``Refused(BAD_REQUEST)``.

        No data at all is ``null``, for the declared type to accept or not.
        """
        if not self.takes_data:
            return ()
        if self._decode is None:
            return (data or b"",)
        try:
            if data and not data.isascii():
                data.decode()
            return (self._decode(data or b"null"),)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            # The values of a payload do not belong into a log.
            why = re.sub(r"(Invalid [^'\"]*?value) .*?(?= - at `|$)", r"\1", str(error), flags=re.DOTALL)
            raise Refused(BAD_REQUEST, f"data for {self.called} at {self.where}: {why}") from None


class Remote(Hook):
    """A hook that somebody elsewhere carries out, who decides, and whose time is limited by whoever asks there.

    ``called`` names the setting behind it, ``where`` the address.
    """

    decides = True

    def __init__(self, kind: str, key: str | None, called: str, where: str) -> None:
        self.kind = kind
        self.key = key
        self.name = kind if key is None else f"{kind} {key!r}"
        self.called = called
        self.where = where

    async def ask(self, client: Client, *arguments: str, data: bytes | None) -> Any:
        """What the other side answers; raises as ``Hooks.ask``."""
        raise NotImplementedError


class Elsewhere(Protocol):
    """Who knows the hooks that are carried out elsewhere."""

    def emulated(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Those headers of a connect command that somebody there wants to see, by lower-case name (PROTOCOL 4.1)."""

    def find(self, kind: str, key: str | None = None) -> Remote | None:
        """The hook for this event; raises ``Refused`` if there can be none by this name."""


def _called(hint: Any) -> str:
    return getattr(hint, "__name__", None) or str(hint)


def _decoder(hint: Any) -> Callable[[bytes], Any] | None:
    """How payloads become ``hint``; ``None``: not at all, since they are wanted as bytes.

    Raises ``TypeError`` for a type that can never come out of JSON.
    """
    if hint is bytes:
        return None
    if hint is Any:
        return msgspec.json.Decoder().decode
    seen: set[int] = set()
    waiting: list[Any] = [msgspec.inspect.type_info(hint)]
    while waiting:
        one = waiting.pop()
        if isinstance(one, msgspec.inspect.CustomType):
            raise TypeError(f"expected a msgspec Struct, a dataclass, a TypedDict or a plain type, got {one.cls}")
        if isinstance(one, tuple | list):
            waiting += one
        elif isinstance(one, msgspec.Struct) and id(one) not in seen:
            seen.add(id(one))
            waiting += [getattr(one, name) for name in one.__struct_fields__ if name not in ("cls", "default")]
    decode: Callable[[bytes], Any] = msgspec.json.Decoder(hint).decode
    return decode


# A function is stepped through in the task of its command and not in one of its own: what does not wait is answered at
# once, and comes before whatever it has spawned.  Only the one that goes on after it was cancelled gets its own.
class _Disobeyed(Exception):
    """A function was cancelled, and waits for something else now."""

    def __init__(self, waits_for: Any) -> None:
        super().__init__("it goes on")
        self.waits_for = waits_for


@types.coroutine
def _obeying(working: Working, limit: asyncio.Timeout) -> Generator[Any, None, Any]:
    """Await ``working`` inside ``limit``; raises ``_Disobeyed`` if that does not end it."""
    step: Callable[[], Any] = partial(working.send, None)
    cut = False
    while True:
        try:
            waits_for = step()
        except StopIteration as end:
            return end.value
        if cut:
            raise _Disobeyed(waits_for)
        try:
            yield waits_for
            step = partial(working.send, None)
        except BaseException as fault:
            cut = limit.expired() and isinstance(fault, asyncio.CancelledError)
            step = partial(working.throw, fault)


@types.coroutine
def _rest(working: Working, waits_for: Any) -> Generator[Any, None, Any]:
    """Await the rest of ``working``, which has begun already, and waits for something."""
    while True:
        step: Callable[[], Any] = partial(working.send, None)
        try:
            yield waits_for
        except BaseException as fault:
            step = partial(working.throw, fault)
        try:
            waits_for = step()
        except StopIteration as end:
            return end.value


def _place_of(working: Working, hook: Hook) -> str:
    """The line at which a hook waits, the innermost one of its own file."""
    file = hook.where.rpartition(":")[0]
    place = hook.where
    one: Any = working
    while inspect.iscoroutine(one):
        if one.cr_frame is not None and one.cr_frame.f_code.co_filename == file:
            place = f"{file}:{one.cr_frame.f_lineno}"
        one = one.cr_await
    return place


async def end_all(tasks: Iterable[asyncio.Task[Any]], told: Callable[[asyncio.Task[Any]], object]) -> None:
    """Cancel tasks and wait a second for their end; ``told`` is their callback for it.

    One that takes no notice is closed where it waits, and its end not told: a loop
    waits for all of its tasks, so that a single one would keep the process for ever.
    """
    left = set(tasks)
    for task in left:
        task.cancel()
    if left:
        _, left = await asyncio.wait(left, timeout=1.0)
    for task in left:
        task.remove_done_callback(told)
        task.add_done_callback(_pass_over)
        coroutine = task.get_coro()
        if inspect.iscoroutine(coroutine):
            with suppress(RuntimeError):  # it waits again even now
                coroutine.close()
        task.cancel()


def _pass_over(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()  # what was closed cannot be gone on with


# --- all of them -----------------------------------------------------------------------
class Hooks:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._hooks: dict[tuple[str, str | None], Hook] = {}
        self._faults: list[str] = []
        self._channels: Channels | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._strays: set[asyncio.Task[Any]] = set()
        self.timeout_s = TIMEOUT_S
        self.elsewhere: Elsewhere | None = None
        """Who is asked about events that no function here is for."""
        self.call_later: CallLater = _call_later
        """What says that the time limit is over; a test puts its own clock here."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {', '.join(hook.name for hook in self._hooks.values()) or 'without hooks'}>"

    if not typing.TYPE_CHECKING:  # or every misspelt name would be right for a type checker

        def __getattr__(self, name: str) -> Any:
            kinds = ", ".join(f"@app.{kind}" for kind in KINDS)
            raise AttributeError(f"an App has no {name!r}; what it has is {kinds}, and app.server")

    # --- registering ---------------------------------------------------------------
    def connecting(self, function: F) -> F:
        """``async (client, data) -> Welcome | None``: asked when a client connects; PROTOCOL 4.1."""
        return self._register("connecting", None, function)

    @overload
    def subscribing(self, function: F, /) -> F: ...
    @overload
    def subscribing(self, namespace: str, /) -> Callable[[F], F]: ...
    def subscribing(self, given: F | str, /) -> F | Callable[[F], F]:
        """``async (client, channel, data) -> Allow | None``: asked when a client subscribes; PROTOCOL 4.2."""
        return self._by_namespace("subscribing", given)

    @overload
    def publishing(self, function: F, /) -> F: ...
    @overload
    def publishing(self, namespace: str, /) -> Callable[[F], F]: ...
    def publishing(self, given: F | str, /) -> F | Callable[[F], F]:
        """``async (client, channel, data) -> Change | None``: asked when a client publishes; PROTOCOL 4.4."""
        return self._by_namespace("publishing", given)

    @overload
    def leaving(self, function: F, /) -> F: ...
    @overload
    def leaving(self, namespace: str, /) -> Callable[[F], F]: ...
    def leaving(self, given: F | str, /) -> F | Callable[[F], F]:
        """``async (client, channel) -> None``: told when a subscription has ended, for whatever reason."""
        return self._by_namespace("leaving", given)

    def disconnecting(self, function: F) -> F:
        """``async (client) -> None``: told when a connection has ended, after the ``leaving`` of its channels."""
        return self._register("disconnecting", None, function)

    @overload
    def rpc(self, function: F, /) -> F: ...
    @overload
    def rpc(self, method: str, /) -> Callable[[F], F]: ...
    def rpc(self, given: F | str, /) -> F | Callable[[F], F]:
        """``async (client, data) -> any value``: a remote procedure, called as the function unless named; 4.7."""
        if isinstance(given, str):
            return lambda function: self._register("rpc", given, function)
        return self._register("rpc", getattr(given, "__name__", "?"), given)

    def starting(self, function: F) -> F:
        """``async () -> None``: awaited before the server listens; what it raises stops the start."""
        return self._register("starting", None, function)

    def stopping(self, function: F) -> F:
        """``async () -> None``: awaited when all clients are gone and everything still works."""
        return self._register("stopping", None, function)

    def _by_namespace(self, kind: str, given: F | str) -> F | Callable[[F], F]:
        if isinstance(given, str):
            return lambda function: self._register(kind, given, function)
        return self._register(kind, None, given)

    def _register(self, kind: str, key: str | None, function: F) -> F:
        if not callable(function):
            raise TypeError(f"expected @app.{kind} above an async def, without parentheses, got {function!r}")
        hook = Hook(kind, key, function)
        earlier = self._hooks.get((kind, key))
        if earlier is not None:
            self._faults.append(hook.fault(f"there is one already: {earlier.called} at {earlier.where}"))
            return function
        if kind == "rpc" and key in BUILT_IN:
            self._faults.append(hook.fault("the server answers this method itself"))
        wrong = hook.prepare()
        if wrong:
            self._faults.append(wrong)
        self._hooks[kind, key] = hook
        return function

    def check(self, channels: Channels, namespaces: Container[str]) -> None:
        """Make ready for these channels, in these namespaces; raises ``AppError`` with all that is wrong."""
        self._channels = channels
        faults = list(self._faults)
        for hook in self._hooks.values():
            if hook.key and KINDS[hook.kind].by_namespace and hook.key not in namespaces:
                faults.append(hook.fault(f"no entry of channel.namespaces is named {hook.key!r}"))
        if faults:
            raise AppError("\n".join(faults))

    def check_channel(self, channel: str) -> None:
        """Raises ``Refused`` for a name that is none here."""
        if self._channels is None:
            raise RuntimeError("the app is not running yet: use it in hooks, from ``starting`` on")
        self._channels.check_name(channel, self._channels.known(channel))

    # --- finding -------------------------------------------------------------------
    def find(self, kind: str, key: str | None = None) -> Hook | None:
        """The hook for this event: that of the namespace ``key`` before that of all, and what is elsewhere last."""
        hook = self._hooks.get((kind, key)) or (
            self._hooks.get((kind, None)) if key is not None and kind != "rpc" else None
        )
        return self.elsewhere.find(kind, key) if hook is None and self.elsewhere is not None else hook

    def ask_elsewhere(self, elsewhere: Elsewhere, events: Iterable[tuple[str, str | None]]) -> None:
        """Have the hooks for ``events``, kinds with their namespaces, and remote procedures carried out elsewhere.

        Raises ``AppError`` with all for which there is a function here as well.
        """
        faults = set()
        for kind, key in [*events, *(one for one in self._hooks if one[0] == "rpc")]:
            try:
                remote = elsewhere.find(kind, key)
            except Refused:
                continue  # a procedure that nobody there would carry out
            hook = self.find(kind, key)
            if remote is not None and hook is not None:
                faults.add(hook.fault(f"{remote.called} ({remote.where}) is for the same event: use one of the two"))
        if faults:
            raise AppError("\n".join(sorted(faults)))
        self.elsewhere = elsewhere

    # --- asking --------------------------------------------------------------------
    async def ask(self, hook: Hook, client: Client, *arguments: str, data: bytes | None = None) -> Any:
        """What ``hook`` answers, of the kind it must be, or ``None``.

        Raises ``Refused`` (107 for data of another type, 100 for a fault of the
        hook's, which has been logged, or what it refused with), ``Disconnected``,
        ``Unavailable``.
        """
        if isinstance(hook, Remote):
            async with client.turn:
                return await hook.ask(client, *arguments, data=data)
        checked = hook.payload(data)
        async with client.turn:
            answer = await self._call(hook, client.id, client, *arguments, *checked)
        if answer is not None and hook.answer is not object and not isinstance(answer, hook.answer or NoneType):
            wanted = f"{hook.answer.__name__} or None" if hook.answer else "None"
            raise self.nonsense(hook, client, f"expected it to return {wanted}, got {type(answer).__name__}")
        return answer

    def nonsense(self, hook: Hook, client: Client, why: str) -> Refused:
        """Log that a hook answered what cannot be used; returns the refusal to raise."""
        event("hook.misanswered", client=client.id, hook=hook.name, function=hook.called, at=hook.where, why=why)
        return Refused(INTERNAL, f"{hook.called} at {hook.where} answered nonsense")

    def bytes_of(self, hook: Hook, client: Client, value: Any) -> bytes | None:
        """A value of a hook's answer as payload bytes, ``None`` for ``UNSET``; raises ``Refused(INTERNAL)``, logged."""
        try:
            return encoded(value)
        except ValueError as error:
            raise self.nonsense(hook, client, str(error)) from None

    async def _call(self, hook: Hook, client: str, *arguments: Any) -> Any:
        fields: dict[str, Any] = {"client": client, "hook": hook.name, "function": hook.called, "at": hook.where}
        working: Working = hook.function(*arguments)
        limit = asyncio.timeout(None)
        loop = asyncio.get_running_loop()
        place, goes_on = "", ""

        def cut_off() -> None:
            nonlocal place
            place = _place_of(working, hook)
            limit.reschedule(loop.time())

        alarm = self.call_later(self.timeout_s, cut_off)
        try:
            async with limit:
                return await _obeying(working, limit)
        except (Refuse, Disconnect, Unavailable):
            raise
        except _Disobeyed as disobeyed:
            if not await self._clears_up(_rest(working, disobeyed.waits_for), hook, client):
                goes_on = "; it took no notice, and goes on by itself"
        except (Exception, SystemExit, asyncio.CancelledError) as fault:
            # Cancelled from outside, or by awaiting something that was?  The latter is a fault like any other.
            if isinstance(fault, asyncio.CancelledError) and (task := asyncio.current_task()) and task.cancelling():
                raise
            if not (limit.expired() and isinstance(fault, TimeoutError)):
                event("hook.failed", **fields, fault=fault)
                raise Refused(INTERNAL, f"{hook.called} at {hook.where} raised") from None
        finally:
            alarm.cancel()
        why = f"it waited at {place}, look at app.timeout ({self.timeout_s:g} s){goes_on}"
        event("hook.overdue", **fields, why=why)
        raise Refused(INTERNAL, f"{hook.called} at {hook.where} took longer than app.timeout")

    async def _clears_up(self, rest: Coroutine[Any, Any, Any], hook: Hook, client: str) -> bool:
        """Give what a hook does after it was cut off a moment; whether it came to its end."""
        over = asyncio.Event()
        task = self._own(self._see_out(rest, hook, client))
        task.add_done_callback(lambda _: over.set())
        alarm = self.call_later(CLEAR_UP_S, over.set)
        try:
            await over.wait()
        finally:
            alarm.cancel()
        if not task.done():
            self._strays.add(task)
            task.add_done_callback(self._strays.discard)
        return task.done()

    async def _see_out(self, rest: Coroutine[Any, Any, Any], hook: Hook, client: str) -> None:
        try:
            await rest
        except (Exception, SystemExit) as fault:
            event("hook.failed", client=client, hook=hook.name, function=hook.called, at=hook.where, fault=fault)

    def tell(self, hook: Hook, client: Client, *arguments: str) -> None:
        """Have a hook told beside us that something is over; nobody waits for it, and it has nobody to refuse."""
        self._own(self._tell(hook, client, *arguments))

    async def _tell(self, hook: Hook, client: Client, *arguments: str) -> None:
        try:
            await self.ask(hook, client, *arguments)
        except (Refuse, Disconnect, Unavailable) as error:
            event("hook.failed", client=client.id, hook=hook.name, function=hook.called, at=hook.where, fault=error)
        except Refused:
            return  # It has been logged.

    def _own(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    @property
    def running(self) -> set[asyncio.Task[Any]]:
        """Hooks that are being asked or told at the moment, but those that took no notice of their end."""
        return self._tasks - self._strays

    async def finish(self, patience_s: float) -> None:
        """All clients are gone: wait for the last hooks, ``patience_s`` at most, and end what still goes on."""
        if self.running:
            await asyncio.wait(self.running, timeout=patience_s)
        await end_all(self._tasks, self._tasks.discard)
        self._tasks.clear()

    def left(self, client: Client | None, channel: str, namespace: str) -> None:
        """A subscription of ``client`` is over."""
        hook = self.find("leaving", namespace)
        if hook is not None and client is not None:
            self.tell(hook, client, channel)

    def ended(self, client: Client | None) -> None:
        """The connection of ``client``, who had been welcomed, is over."""
        hook = self.find("disconnecting")
        if hook is not None and client is not None and client.welcomed:
            self.tell(hook, client)
