"""A small world with bad weather: nodes, clients and a network that does what networks do.

Time is virtual: when nobody has anything to do, the loop's clock jumps to the next
appointment, so hours of waiting take no time and every run of one seed is the same.
The nodes, sessions and cursors are the real ones; only the ways between them are
bad.  ``Listener`` behaves as an SDK does and checks the third promise at every
message; ``World.settle`` clears the sky and checks that everybody reaches the top.
"""

import asyncio
import json
import selectors
from collections.abc import Sequence
from random import Random
from typing import Any, Self

from centrifuge.fossil import apply_delta
from support import KEPT, settings

from run import make_gate
from server.blocks.memory import MemoryBlocks
from server.broker import Word
from server.broker.memory import Bus, MemoryBroker
from server.commands import SKILLS
from server.errors import Disconnect
from server.history import Appended, Draft, Retention
from server.history.memory import Log, MemoryHistory
from server.inside import InsideOutbox, LineWire
from server.node import Node
from server.outbox import Request
from server.presence.memory import Board, MemoryPresence
from server.session import Session
from server.settings import Settings
from server.stream import Page

EPOCH_S = 1_700_000_000.0
CHANNEL = "chat:storm"

MANNERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "numbered": {"flag": 1},
    "filtered": {"tf": {"key": "kind", "cmp": "in", "vals": ["odd", "both"]}},
    "filtered and numbered": {"tf": {"key": "kind", "cmp": "neq", "val": "odd"}, "flag": 1},
    "patched": {"delta": "fossil"},
    "patched and numbered": {"delta": "fossil", "flag": 1},
}
"""The ways in which a listener may wish to be sent to."""

WANTED: dict[str, frozenset[str | None]] = {
    "filtered": frozenset(("odd", "both")),
    "filtered and numbered": frozenset((None, "even", "both")),
}
"""The kinds of publications that pass a filter; ``None`` is one without tags."""

KINDS = (None, "odd", "even", "both")


# --- time ------------------------------------------------------------------------
class _Jump(selectors.SelectSelector):
    """Instead of waiting, moves the loop's clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.turns = 0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everybody waits, and nobody will ever come"
            self.turns = self.turns + 1 if timeout <= 0 else 0
            assert self.turns < 20_000, "everybody is busy, and nothing ever comes of it"
            self.now += max(timeout, 0)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only when there is nothing else to do."""

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        """The virtual time, in seconds."""
        return self._jump.now


def live_through(story: Any) -> None:
    """Run a coroutine in virtual time."""
    loop = VirtualLoop()
    try:
        loop.run_until_complete(story)
        loop.run_until_complete(asyncio.sleep(0))
    finally:
        loop.close()


# --- the ways between them ----------------------------------------------------------
class Weather:
    """How bad it is; every number may be changed while the world runs."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.loss = 0.3
        self.repeat = 0.2
        self.delay_s = 0.2
        self.read_s = 0.1
        self.write_s = 0.05
        self.socket_s = 0.1

    def clear(self) -> None:
        """Everything arrives, at once."""
        self.loss = self.repeat = self.delay_s = self.read_s = self.write_s = self.socket_s = 0.0

    def wait_s(self, most_s: float) -> float:
        """Some time up to ``most_s``, often none."""
        return self.random.uniform(0, most_s) if most_s and self.random.random() < 0.7 else 0.0


class BadBroker(MemoryBroker):
    """A broker that loses, delays, repeats and reorders, as its contract allows."""

    def __init__(self, bus: Bus, weather: Weather) -> None:
        super().__init__(bus)
        self._weather = weather

    async def follow(self, channel: str) -> None:
        """In force some time later."""
        await asyncio.sleep(self._weather.wait_s(self._weather.delay_s))
        await super().follow(channel)

    def _soon(self, broker: MemoryBroker, word: Word) -> None:
        weather = self._weather
        loop = asyncio.get_running_loop()
        while weather.random.random() >= weather.loss:
            loop.call_later(weather.wait_s(weather.delay_s), broker._hear, word)
            if weather.random.random() >= weather.repeat:
                return


class SlowHistory(MemoryHistory):
    """A history far away: what it says was true when it was asked, and takes time to arrive."""

    def __init__(self, log: Log, weather: Weather, world: "World") -> None:
        super().__init__(log)
        self._weather = weather
        self._world = world
        self.reads = 0

    async def append(self, channel: str, draft: Draft, retention: Retention, now_ms: int) -> Appended:
        """As ever, but the way there and the way back take time."""
        await asyncio.sleep(self._weather.wait_s(self._weather.write_s))
        appended = await super().append(channel, draft, retention, now_ms)
        if not appended.repeated:
            position = appended.position
            self._world.said[position.epoch, position.offset] = draft.data
            self._world.kinds[position.epoch, position.offset] = (draft.tags or {}).get("kind")
        await asyncio.sleep(self._weather.wait_s(self._weather.write_s))
        return appended

    async def read(self, channel: str, retention: Retention, now_ms: int, **options: Any) -> Page:
        """As ever, but the way there and the way back take time."""
        self.reads += 1
        await asyncio.sleep(self._weather.wait_s(self._weather.read_s))
        page = await super().read(channel, retention, now_ms, **options)
        await asyncio.sleep(self._weather.wait_s(self._weather.read_s))
        return page


# --- clients ---------------------------------------------------------------------------
WIRE = LineWire()


class Mailbox(InsideOutbox):
    """An outbox that ends in a listener of this process, a loop turn later."""

    def __init__(self, listener: "Listener", weather: Weather) -> None:
        self.wire = WIRE
        self._listener = listener
        self._weather = weather
        self._open = True

    def send(self, frame: bytes) -> None:
        """See ``Outbox.send``."""
        if self._open:
            asyncio.get_running_loop().call_soon(self._arrive, frame)

    def _arrive(self, frame: bytes) -> None:
        if self._listener.mailbox is self:
            for line in frame.decode().splitlines():
                self._listener.take(json.loads(line))

    async def drained(self) -> None:
        """The socket takes its time."""
        await asyncio.sleep(self._weather.wait_s(self._weather.socket_s))

    def close(self, disconnect: Disconnect) -> None:
        """See ``Outbox.close``."""
        self._open = False
        asyncio.get_running_loop().call_soon(self._listener.ended, self, disconnect)


class Listener:
    """One client that follows one channel as an SDK would, and trusts nothing."""

    def __init__(self, world: "World", manner: str = "plain") -> None:
        self.world = world
        self.manner = manner
        self.payload = b""
        self.patches = 0
        self.number = 0
        self.mailbox: Mailbox | None = None
        self.session: Session | None = None
        self.subscribed = False
        self.fresh = True
        self.offset = 0
        self.epoch = ""
        self.heard = 0
        self.restarts = 0
        self.expected_end = False

    def connect(self) -> None:
        """Open a session on some node, and subscribe in the same breath."""
        node = self.world.random.choice(self.world.nodes)
        self.mailbox = Mailbox(self, self.world.weather)
        self.session = Session(node, self.world.gate, SKILLS, self.mailbox, Request("test", "json", "", {}))
        self._say({"id": 1, "connect": {}})
        self._subscribe()

    def _say(self, command: dict[str, Any]) -> None:
        if self.session is not None:
            self.session.receive(json.dumps(command).encode())

    def _subscribe(self) -> None:
        request: dict[str, Any] = {"channel": CHANNEL, **MANNERS[self.manner]}
        if not self.fresh:
            request.update(recover=True, offset=self.offset, epoch=self.epoch)
        self._say({"id": 2, "subscribe": request})

    def cut(self) -> None:
        """The network drops the connection; the client comes back some time later."""
        session, self.session, self.mailbox = self.session, None, None
        self.subscribed = False
        if session is not None:
            session.gone()
            self.world.later(self.connect)

    def ended(self, mailbox: Mailbox, disconnect: Disconnect) -> None:
        """The server ended the connection, which in this world it has no reason to."""
        if self.mailbox is mailbox:
            self.world.complain(f"disconnected with {disconnect}")

    def take(self, message: dict[str, Any]) -> None:
        """Judge one message."""
        if not message:
            self._say({})
        if "connect" in message:
            return
        if "subscribe" in message:
            self._begin(message["subscribe"])
        elif "error" in message:
            if message["error"]["code"] != 100:
                self.world.complain(f"refused with {message}")
            self.world.later(self._subscribe)
        elif "push" in message:
            push = message["push"]
            if "unsubscribe" not in push and push.get("id", 0) != self.number:
                self.world.complain(f"a push to {self.manner} has the number {push.get('id')}, not {self.number}")
            if "pub" in push:
                self._hear(push["pub"])
            elif "unsubscribe" in push:
                self._lost(push["unsubscribe"]["code"])

    def _begin(self, result: dict[str, Any]) -> None:
        if result.get("was_recovering") and not result.get("recovered"):
            self.world.justify(self.offset, self.epoch)
            self.restarts += 1
        elif result.get("recovered") and result.get("offset", 0) != self.offset:
            self.world.complain(f"recovered from {result.get('offset', 0)}, asked for {self.offset}")
        self.number = result.get("id", 0)
        if (self.number > 0) != ("numbered" in self.manner) or result.get("delta", False) != ("patched" in self.manner):
            self.world.complain(f"{self.manner} was subscribed with {result}")
        self.subscribed, self.fresh = True, False
        self.offset, self.epoch = result.get("offset", 0), result.get("epoch", "")
        for publication in result.get("publications", ()):
            self._hear(publication)

    def _hear(self, publication: dict[str, Any]) -> None:
        offset = publication["offset"]
        if not self.subscribed:
            self.world.complain(f"publication {offset} came before the reply to subscribe")
        self.epoch = publication.get("epoch") or self.epoch
        if offset <= self.offset or self.wanted_between(self.offset, offset):
            self.world.complain(f"publication {offset} came after {self.offset} to {self.manner}")
        if not self._wants(offset):
            self.world.complain(f"publication {offset} came to {self.manner}")
        if self.world.said.get((self.epoch, offset)) != self._unpacked(publication):
            self.world.complain(f"publication {offset} of {self.epoch} says {publication} to {self.manner}")
        self.offset = offset
        self.heard += 1

    def _wants(self, offset: int) -> bool:
        if self.manner not in WANTED:
            return True
        stream = self.world.log.streams.get(CHANNEL)
        epoch = self.epoch or (stream.epoch if stream else "")  # who has heard nothing yet knows none
        return self.world.kinds.get((epoch, offset)) in WANTED[self.manner]

    def wanted_between(self, first: int, last: int) -> list[int]:
        """The offsets between these two that should have come to this listener."""
        return [offset for offset in range(first + 1, last) if self._wants(offset)]

    def _unpacked(self, publication: dict[str, Any]) -> bytes:
        """The payload's bytes; to who asked for patches they come as text, or as a patch of those before."""
        if "patched" not in self.manner:
            return json.dumps(publication["data"], ensure_ascii=False).encode()
        text = publication["data"].encode()
        if publication.get("delta"):
            self.patches += 1
            text = bytes(apply_delta(self.payload, text))
        self.payload = text
        return bytes(text)

    def _lost(self, code: int) -> None:
        if code != 2500:
            self.world.complain(f"unsubscribed with {code}")
        self.world.justify(self.offset, self.epoch)
        self.subscribed = False
        self._subscribe()


# --- the world ---------------------------------------------------------------------------
class World:
    """Some nodes over one truth, and those who listen."""

    def __init__(
        self,
        random: Random,
        nodes: int = 2,
        settings_: Settings | None = None,
        manners: Sequence[str] = ("plain",),
    ) -> None:
        self.random = random
        self.manners = manners
        self.weather = Weather(random)
        self.log = Log()
        self.said: dict[tuple[str, int], bytes] = {}
        self.kinds: dict[tuple[str, int], str | None] = {}
        self.listeners: list[Listener] = []
        self.complaints: list[str] = []
        self.acknowledged = 0
        self.ends = 0
        chat = {"name": "chat", **KEPT, "presence": True, "join_leave": True}
        chat.update(allow_tags_filter=True, allowed_delta_types=["fossil"])
        chosen = settings_ or settings(channel={"namespaces": [chat]})
        self.gate = make_gate(chosen)
        bus, board = Bus(), Board()
        loop = asyncio.get_running_loop()
        self.histories = [SlowHistory(self.log, self.weather, self) for _ in range(nodes)]
        self.nodes = [
            Node(
                history=history,
                broker=BadBroker(bus, self.weather),
                presence=MemoryPresence(10.0, board),
                blocks=MemoryBlocks(),
                settings=chosen,
                clock=lambda: EPOCH_S + loop.time(),
            )
            for history in self.histories
        ]
        self._published = 0
        self._tasks: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Self:
        """Open the nodes, and let each sweep once a second."""
        for node in self.nodes:
            await node.open()
            self._spawn(self._sweep(node))
        return self

    async def _sweep(self, node: Node) -> None:
        while True:
            await asyncio.sleep(1.0)
            node.sweep(node.clock())

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def later(self, call: Any) -> None:
        """Do something after a moment."""
        asyncio.get_running_loop().call_later(self.random.uniform(0, 0.5), call)

    def complain(self, what: str) -> None:
        """Something happened that must not."""
        self.complaints.append(what)

    def justify(self, offset: int, epoch: str) -> None:
        """Is history after this position truly gone?"""
        if self.ends and not epoch:
            return  # Which of the pasts it stood in cannot be told any more.
        stream = self.log.streams.get(CHANNEL)
        if stream is None or (epoch and stream.epoch != epoch) or offset < stream.floor or offset > stream.top:
            return
        self.complain(
            f"told that {offset} of {epoch} is gone; floor is {stream.floor}, top {stream.top} of {stream.epoch}"
        )

    def join(self) -> None:
        """One more listener."""
        listener = Listener(self, self.random.choice(self.manners))
        self.listeners.append(listener)
        listener.connect()

    def cut(self) -> None:
        """Somebody's connection drops."""
        if self.listeners:
            self.random.choice(self.listeners).cut()

    def publish(self, count: int, node: Node | None = None) -> None:
        """Some node publishes, not waiting for one before the next."""
        node = node or self.random.choice(self.nodes)
        for _ in range(count):
            self._published += 1
            text = f"the {self._published // 3} · " * self.random.choice((0, 1, 2, 5, 5))
            if self.random.random() < 0.01:
                text *= 500  # too much for an announcement
            data = json.dumps({"n": self._published, "text": text}, ensure_ascii=False).encode()
            kind = self.random.choice(KINDS)
            tags = None if kind is None else {"kind": kind}
            self._spawn(self._publish(node, Draft(data, tags=tags, delta=self.random.random() < 0.8)))

    async def _publish(self, node: Node, draft: Draft) -> None:
        await node.publish(CHANNEL, node.channels.known(CHANNEL), draft)
        self.acknowledged += 1

    async def trim(self) -> None:
        """History is cut off up to its top."""
        self.ends += 1
        await self.random.choice(self.histories).remove(CHANNEL)

    async def forget(self) -> None:
        """History is restored from a backup that had nothing."""
        self.ends += 1
        await self.random.choice(self.histories).new_epochs()

    async def settle(self) -> None:
        """Clear the sky, wait as long as the design allows, and check where everybody stands."""
        self.weather.clear()
        await asyncio.sleep(15.0)
        stream = self.log.streams.get(CHANNEL)
        top = stream.top if stream else 0
        for listener in self.listeners:
            if not listener.subscribed:
                self.complain("somebody is not subscribed in the end")
            elif listener.offset > top or listener.wanted_between(listener.offset, top + 1):
                self.complain(f"somebody stands at {listener.offset} in the end, the top is {top}")
        assert not self.complaints, "; ".join(self.complaints[:5])

    async def __aexit__(self, *error: object) -> None:
        """End the world."""
        for listener in self.listeners:
            listener.mailbox = None
            if listener.session is not None:
                listener.session.gone()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for node in self.nodes:
            await node.close()
        await self.gate.keys.close()
