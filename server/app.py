"""A user's own Python inside the server: hooks, remote procedures, and a handle to everything else.

A module makes one ``App`` and registers plain ``async def`` functions on it::

    app = App()

    @app.publishing("chat")
    async def moderate(client: Client, channel: str, data: Message) -> Change | None: ...

``run.py --app MODULE`` loads it (``load``), ``attach`` joins it to a node.  What
functions may be registered and what they answer is in ``server.hooks``; here is
``Server``, what they may do, and the life of an app.  docs/hooks.md is the
reference.
"""

import asyncio
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
from msgspec import UNSET

from server import orders
from server.channels import Namespace, check_payload
from server.errors import BAD_REQUEST, FORCE_DISCONNECT, NOT_AVAILABLE, UNRECOVERABLE_POSITION, Refused
from server.history import Draft
from server.hooks import Allow as Allow
from server.hooks import AppError as AppError
from server.hooks import Change as Change
from server.hooks import Client as Client
from server.hooks import Disconnect as Disconnect
from server.hooks import Hooks, decoded, encoded, end_all, ending
from server.hooks import Refuse as Refuse
from server.hooks import Welcome as Welcome
from server.node import Node
from server.observe import event
from server.stream import ClientInfo, Position, Publication


class Member(msgspec.Struct, frozen=True):
    """A client as others see it, with its infos as Python values, ``None`` for none (PROTOCOL 6.2)."""

    user: str
    client: str
    conn_info: Any = None
    chan_info: Any = None


class Message(msgspec.Struct, frozen=True):
    """A publication with its ``data`` as Python values (PROTOCOL 6.3); ``time_ms`` is Unix time."""

    data: Any
    offset: int
    time_ms: int
    info: Member | None = None
    tags: dict[str, str] | None = None


class Server:
    """What an app may do, from hooks, background tasks and start hooks alike.

    Every method raises ``RuntimeError`` before the app runs, ``Refused`` for a
    channel's name that is none (102, 107), and, where it waits for a store,
    ``Unavailable`` when that cannot answer.  No hook is asked about what an app does.
    """

    def __init__(self) -> None:
        self._node: Node | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    def __repr__(self) -> str:
        return f"<Server of {self._node!r}>"

    @property
    def node(self) -> Node:
        """The process; raises ``RuntimeError`` before the app runs."""
        if self._node is None:
            raise RuntimeError("the app is not running yet: use app.server in hooks, from ``starting`` on")
        return self._node

    def _known(self, channel: str) -> Namespace:
        namespace = self.node.channels.known(channel)
        self.node.channels.check_name(channel, namespace)
        return namespace

    # --- channels ------------------------------------------------------------------
    async def publish(
        self,
        channel: str,
        data: Any,
        *,
        key: str = "",
        tags: dict[str, str] | None = None,
        user: str = "",
        conn_info: Any = UNSET,
        delta: bool = False,
    ) -> Position:
        """Publish any value that JSON can hold; returns once it is durable, with its position (PROTOCOL 11.8).

        In a passing channel the position is ``Position(0, "")``.  ``key`` makes a
        repeat harmless; after ``Unavailable`` only a repeat with a key is safe.
        ``user`` and ``conn_info`` say who others see as the publisher; with
        ``delta`` it goes as a patch to those who want one (PROTOCOL 12).  Raises
        ``ValueError`` for a value that JSON cannot hold.
        """
        namespace = self._known(channel)
        raw = data if namespace.binary and isinstance(data, bytes) else encoded(data)
        info = ClientInfo(user, "", encoded(conn_info)) if user or conn_info is not UNSET else None
        draft = Draft(check_payload(raw, namespace), info=info, tags=tags, key=key, delta=delta)
        return (await self.node.publish(channel, namespace, draft)).position

    async def history(
        self, channel: str, *, limit: int = 100, since: Position | None = None, reverse: bool = False
    ) -> tuple[list[Message], Position]:
        """Publications after ``since``, or from the oldest kept on, and the top; ``limit`` -1: all (PROTOCOL 4.6).

        With ``reverse`` the newest come first.  Raises ``Refused``: 108 in a
        passing channel, 112 for a position of another epoch.
        """
        namespace = self._known(channel)
        if not namespace.kept:
            raise Refused(NOT_AVAILABLE, f"{channel!r} keeps no history")
        if reverse and since is not None and not since.offset:
            raise Refused(BAD_REQUEST, "history in reverse from offset 0")
        page = await self.node.pages.read(
            channel, namespace, since=None if since is None else since.offset, limit=limit, reverse=reverse
        )
        if since is not None and since.epoch and since.epoch != page.top.epoch:
            raise Refused(UNRECOVERABLE_POSITION, "history since a position of another epoch")
        return [_message(publication) for publication in page.publications], page.top

    async def presence(self, channel: str) -> dict[str, Member]:
        """Who is here, by client id; raises ``Refused`` (108) where that is not known (PROTOCOL 4.5)."""
        if not self._known(channel).options.presence:
            raise Refused(NOT_AVAILABLE, f"{channel!r} has no presence")
        members = await self.node.presence.members(channel, self.node.clock())
        return {client: _member(info) for client, info in members.items()}

    # --- clients -------------------------------------------------------------------
    @property
    def connections(self) -> int:
        """How many clients are connected to this process."""
        return len(self.node.sessions)

    def subscribe(
        self, channel: str, *, user: str, client: str = "", chan_info: Any = UNSET, data: Any = UNSET
    ) -> None:
        """Subscribe the connections of ``user`` (or only ``client`` of them) server-side, in all processes."""
        self._known(channel)
        target = orders.Target(user, client)
        self.node.ordering.give_soon(orders.SubscribeOrder(target, channel, encoded(chan_info), encoded(data)))

    def unsubscribe(self, channel: str, *, user: str, client: str = "") -> None:
        """End the subscriptions of ``user`` to ``channel`` with 2000."""
        self._known(channel)
        self.node.ordering.give_soon(orders.UnsubscribeOrder(orders.Target(user, client), channel))

    def disconnect(
        self,
        *,
        user: str,
        client: str = "",
        spared: Sequence[str] = (),
        code: int = FORCE_DISCONNECT.code,
        reason: str = FORCE_DISCONNECT.reason,
    ) -> None:
        """End the connections of ``user`` but the ``spared`` client ids; raises as ``Disconnect`` does."""
        end = ending(code, reason)
        self.node.ordering.give_soon(orders.DisconnectOrder(orders.Target(user, client, spared), end.code, end.reason))

    # --- time and tasks ---------------------------------------------------------------
    def clock(self) -> float:
        """Unix time in seconds; in a test, the test's."""
        return self.node.clock()

    async def sleep(self, seconds: float) -> None:
        """Wait; in a test, until the test has let so much time pass."""
        await self._sleep(seconds)

    def spawn(self, work: Coroutine[Any, Any, Any], name: str = "app task") -> asyncio.Task[Any]:
        """Run ``work`` beside everything; cancelled when the app stops, and logged when it raises.

        A hook that spawns and does not wait is done first: what it lets pass comes before what ``work`` publishes.
        """
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            event("task.failed", task=task.get_name(), fault=fault)


def _member(info: ClientInfo) -> Member:
    return Member(info.user, info.client, decoded(info.conn_info), decoded(info.chan_info))


def _message(publication: Publication) -> Message:
    info = None if publication.info is None else _member(publication.info)
    return Message(decoded(publication.data), publication.offset, publication.time_ms, info, publication.tags)


class App(Hooks):
    """A user's application: its hooks, its remote procedures, and ``server``, its handle to the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.server = Server()

    def attach(self, node: Node) -> None:
        """Join it to a node that no client has come to yet; raises ``AppError`` with every fault."""
        self.check(node.channels, {"", *(namespace.name for namespace in node.settings.channel.namespaces)})
        self.timeout_s = node.settings.app.timeout
        self.server._node = node
        node.hooks = self

    async def start(self) -> None:
        """Await the ``starting`` hook, without a time limit; raises ``AppError`` if it raises."""
        hook = self.find("starting")
        if hook is None:
            return
        try:
            await hook.function()
        except (Exception, SystemExit) as fault:
            raise AppError(hook.fault(_raised(fault))) from fault

    async def stop(self) -> None:
        """All clients are gone: let the last hooks end, await ``stopping``, cancel what it spawned.

        Everything has an end: the last hooks may take ``shutdown.timeout``, and
        ``stopping`` as long again; what it raises is logged.
        """
        shutdown_s = self.server.node.settings.shutdown.timeout
        await self.finish(shutdown_s)
        await end_all(self.server._tasks, self.server._finished)
        self.server._tasks.clear()
        hook = self.find("stopping")
        if hook is not None:
            try:
                async with asyncio.timeout(shutdown_s):
                    await hook.function()
            except Exception as fault:
                event("hook.failed", client="", hook=hook.name, function=hook.called, at=hook.where, fault=fault)


def _raised(fault: BaseException) -> str:
    """What was raised and where: the innermost line that is neither ours nor Python's own import machinery."""
    if isinstance(fault, SyntaxError) and fault.filename:
        return f"{fault.filename}:{fault.lineno}: {type(fault).__name__}: {fault.msg}"
    ours = ("<", str(Path(__file__).parent), str(importlib.__file__))
    frames = [frame for frame in traceback.extract_tb(fault.__traceback__) if not frame.filename.startswith(ours)]
    at = f"{frames[-1].filename}:{frames[-1].lineno}: in {frames[-1].name}: " if frames else ""
    return f"{at}{type(fault).__name__}: {fault}"


def load(text: str) -> App:
    """The app that ``MODULE``, ``FILE.py``, or one of them and ``:NAME`` means; imports it.

    Raises ``AppError`` that says what was expected: a module that imports, with
    one ``App`` in it or an ``App`` of that name.
    """
    place, colon, name = text.rpartition(":")
    if not colon or not name.isidentifier():
        place, name = text, ""
    module = _import(place)
    found = {key: value for key, value in vars(module).items() if isinstance(value, App)}
    if name:
        if name not in found:
            got = type(getattr(module, name)).__name__ if hasattr(module, name) else "nothing"
            raise AppError(f"{_file(module)}: expected an App called {name!r}, got {got}")
        return found[name]
    if len({id(app) for app in found.values()}) != 1:
        got = ", ".join(sorted(found)) or "none; write app = App()"
        raise AppError(f"{_file(module)}: expected one App in it, or {place}:NAME to choose, found {got}")
    return next(iter(found.values()))


def _file(module: ModuleType) -> str:
    return str(getattr(module, "__file__", None) or module.__name__)


def _import(place: str) -> ModuleType:
    path = Path(place)
    is_file = path.suffix == ".py" or "/" in place
    folder = str(path.resolve().parent) if is_file else str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return _import_file(path.resolve()) if is_file else importlib.import_module(place)
    except (Exception, SystemExit) as fault:
        raise AppError(f"--app {place} cannot be imported: {_raised(fault)}") from fault


def _import_file(path: Path) -> ModuleType:
    # A file called as a module that is in use already must not take that one's place.
    name = path.stem if path.stem not in sys.modules else f"app_{path.stem}"
    if not path.is_file():
        raise ImportError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
