"""The broker of many processes: Redis pub/sub, alone, behind Sentinels, or sharded over a cluster.

To each Redis that serves channels (one, or each primary of a cluster) a process
keeps two *lines*, connections that are made, watched and made again: an ``Ear``
that is subscribed and a ``Mouth`` that publishes, since Redis lets a subscribed
connection do nothing else.  Names and messages in Redis:

    {prefix}:c:{channel}    what happens in a channel
    {prefix}:a              notes for every process
    {prefix}:n:{node}       notes for one process
    "w1 " node "\\n" body    a message: who says it, then a word or a note in MessagePack

The 1 is the version of all that follows it.  Fields may be added within a version
(they have defaults, and who does not know them skips them), and kinds of notes, which
are then skipped with a line in the log.  Whatever an older process would take for
something else makes a new version.  Of another version nothing is understood, and
one line says so: kept channels miss nothing, since their tops are compared with
history; passing words and orders do not get across (docs/deploying.md).

Pub/sub knows no databases, so one other than 0 is put into the names:
``{prefix}.2:c:…``.  In a cluster all of it is sharded pub/sub, by the slot of the
name; nothing is broadcast over the cluster's own bus.

redis-py's ``PubSub`` is not used: it reconnects inside a read and says so to
nobody, while here a lost connection must be known as one, for words were missed;
its confirmations come without the order that ``follow`` needs; and it spends a
multiple of the time on each message.  What is used is its ``Connection`` (see
``server.redis``), which does nothing by itself.

How a line knows that it is alive: once a second it sends a PING inside the
connection, and whatever arrives counts as an answer.  It counts the seconds in
which it lived itself: a process that was stopped first reads what has arrived.
"""

import asyncio
import random
import re
from collections import deque
from collections.abc import Callable, Iterable

import msgspec

from server.broker import Broker, Note, Word
from server.broker.ledger import Ledger
from server.errors import Unavailable
from server.observe import event
from server.redis import ErrorReply, Kind, Server, Slots, Wire, find_primary, find_slots, parse, slot_of
from server.settings import RedisSettings

OPEN_S = 8.0
"""How long ``open`` may take."""

FOLLOW_S = 1.0
"""How long ``follow`` waits for its subscription."""

PING_S = 1.0
SILENT_PINGS = 3
"""A connection on which nothing has come since that many pings is dead."""

PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0
"""How long a line waits before it is made again: doubled each time, less a random part, lest all come at once."""

PLACES_S = 5.0
LEAST_PLACES_S = 0.1
"""How often we look whether channels have moved to another Redis, if nothing hints at it; and if something does."""

SLICE_S = 0.005
"""How long messages may be worked off before everybody else gets a turn of the loop."""

QUEUE_BYTES = 8 * 1024 * 1024
QUEUE_WORDS = 20_000
"""How much waits for a Redis that takes nothing; then the oldest is dropped."""

STALE_S = 3.0
"""Words that have waited longer are dropped: news of kept channels is swept for, and passing words are old."""

WRITE_BYTES = 256 * 1024
MOVES = 5
GOODBYE_S = 0.5
STRANGERS = 100

_bytes = msgspec.msgpack.Encoder().encode
_word = msgspec.msgpack.Decoder(Word).decode
_note = msgspec.msgpack.Decoder(Note).decode

VERSION = 1
_version = re.compile(rb"w([0-9]{1,9}) ")


class _Wish:
    """A Redis channel that shall be heard; ``channel`` is ours, ``None`` for notes."""

    __slots__ = ("channel", "ear", "slot", "waiters")

    def __init__(self, channel: str | None, slot: int) -> None:
        self.channel = channel
        self.slot = slot
        self.ear: Ear | None = None
        self.waiters: set[asyncio.Future[str]] = set()

    def answer(self, words: str = "") -> None:
        """Tell those who wait: in force, or why not."""
        for waiter in self.waiters:
            _settle(waiter, words)
        self.waiters.clear()


def _settle(waiter: "asyncio.Future[str]", words: str) -> None:
    if not waiter.done():  # nobody may wait any more
        waiter.set_result(words)


LATE = "late"
GRACE_S = 0.1


def _almost_late(waiter: "asyncio.Future[str]") -> None:
    """If it was this process that stood still, the answer has come and is read first."""
    if not waiter.done():
        waiter.get_loop().call_later(GRACE_S, _settle, waiter, LATE)


class _Said:
    """A message on its way out."""

    __slots__ = ("at", "data", "moves", "name")

    def __init__(self, name: bytes, data: bytes, at: float) -> None:
        self.name = name
        self.data = data
        self.at = at
        self.moves = 0


class RedisBroker(Broker):
    """See ``Broker``; raises ``ValueError`` in operator's words if ``redis.url`` cannot be read."""

    version = VERSION
    """Of what is said and understood."""

    def __init__(self, settings: RedisSettings) -> None:
        self._mark = b"w%d " % self.version
        self.address = parse(settings.url)
        db = self.address.db
        self._prefix = (f"{settings.prefix}.{db}" if db else settings.prefix).encode()
        self._clustered = self.address.kind is Kind.CLUSTER
        self._node = ""
        self._mine = b""
        self._ready = False
        self._wishes: dict[bytes, _Wish] = {}
        self._ears: dict[Server, Ear] = {}
        self._mouths: dict[Server, Mouth] = {}
        self._slots = Slots({})
        self._unplaced = ""
        self._look = asyncio.Event()
        self._strays: set[bytes] = set()
        self._returned: deque[_Said] = deque()
        self._keeper: asyncio.Task[None] | None = None
        self._strangers: set[bytes] = set()

    def __repr__(self) -> str:
        return f"<RedisBroker {self.address.text} following={len(self._wishes)}>"

    # --- life -----------------------------------------------------------------
    async def open(self, node: str) -> None:
        """See ``Broker.open``."""
        self._node = node
        self._mine = self._mark + node.encode() + b"\n"
        for name in (self._everybody, self._somebody(node)):
            self._wishes.setdefault(name, _Wish(None, slot_of(name)))
        try:
            async with asyncio.timeout(OPEN_S):
                self._place(await self._find_slots())
                await self._all_well()
        except TimeoutError:
            troubles = [line.trouble for line in self._lines() if line.trouble]
            await self._let_go()
            why = troubles[0] if troubles else f"redis.url: {self.address.text} did not answer"
            raise Unavailable(f"{why}; gave up after {OPEN_S:g} s") from None
        except BaseException:
            await self._let_go()
            raise
        self._ready = True
        self.weigh()
        self._keeper = asyncio.get_running_loop().create_task(self._keep_places(), name="redis broker")

    async def _all_well(self) -> None:
        """Wait until every line has been well once, or one could not be made; that one's error is raised."""
        firsts = [line.start() for line in self._lines()]
        done, _ = await asyncio.wait(firsts, return_when=asyncio.FIRST_EXCEPTION)
        faults = [fault for first in done if (fault := first.exception()) is not None]
        if faults:
            raise faults[0]

    async def close(self) -> None:
        """See ``Broker.close``; what has been said just before still goes out."""
        self._ready = False
        if self._mouths:
            await asyncio.wait({mouth.said_all() for mouth in self._mouths.values()}, timeout=GOODBYE_S)
        await self._let_go()
        for wish in self._wishes.values():
            wish.answer("redis.url: the broker is closed")
        self._wishes.clear()
        self.trouble = self.mute = ""

    async def _let_go(self) -> None:
        tasks = [line.end() for line in self._lines()]
        if self._keeper is not None:
            self._keeper.cancel()
            tasks.append(self._keeper)
            self._keeper = None
        self._ears.clear()
        self._mouths.clear()
        self._slots = Slots({})
        for wish in self._wishes.values():
            wish.ear = None
        await asyncio.gather(*tasks, return_exceptions=True)

    def _lines(self) -> "list[Line]":
        return [*self._ears.values(), *self._mouths.values()]

    # --- names ----------------------------------------------------------------
    def _name(self, channel: str) -> bytes:
        return self._prefix + b":c:" + channel.encode()

    @property
    def _everybody(self) -> bytes:
        return self._prefix + b":a"

    def _somebody(self, node: str) -> bytes:
        return self._prefix + b":n:" + node.encode()

    # --- hearing --------------------------------------------------------------
    async def follow(self, channel: str) -> None:
        """See ``Broker.follow``."""
        name = self._name(channel)
        wish = self._wishes.get(name)
        if wish is None:
            wish = self._wishes[name] = _Wish(channel, slot_of(name))
            self._assign(name, wish)
        if not self._ready:
            raise Unavailable("redis.url: the broker is not open")
        if wish.ear is not None and wish.ear.in_force(name):
            return
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[str] = loop.create_future()
        wish.waiters.add(waiter)
        timer = loop.call_later(FOLLOW_S, _almost_late, waiter)
        try:
            words = await waiter
        finally:
            timer.cancel()
            wish.waiters.discard(waiter)
        if words == LATE:
            where = wish.ear or self.address.text
            raise Unavailable(self.trouble or f"redis.url: {where} has not confirmed a subscription in {FOLLOW_S:g} s")
        if words:
            raise Unavailable(words)

    async def unfollow(self, channel: str) -> None:
        """See ``Broker.unfollow``."""
        name = self._name(channel)
        wish = self._wishes.pop(name, None)
        if wish is None:
            return
        wish.answer()  # whoever waited was overtaken by a later call
        self._strays.discard(name)
        if wish.ear is not None:
            wish.ear.unwant(name)

    def in_force(self, name: bytes) -> None:
        """An ear has ``name`` in force: tell those who wait for it."""
        wish = self._wishes.get(name)
        if wish is not None:
            wish.answer()

    def hear(self, name: bytes, data: bytes) -> None:
        """A message has come."""
        if data.startswith(self._mine):
            return
        wish = self._wishes.get(name)
        if wish is None:
            return  # not wanted any more
        try:
            if not data.startswith(self._mark):
                self._complain_of_version(name, data)
                return
            body = data[data.index(b"\n") + 1 :]
            if wish.channel is None:
                self._deliver(self.on_note, _note(body), name)
                return
            word = _word(body)
            if word.channel != wish.channel:
                raise ValueError("it speaks of another channel")
        except (ValueError, msgspec.DecodeError) as error:
            self._complain(name, error)
            return
        self._deliver(self.on_word, word, name)

    def _deliver(self, listener: Callable[..., None], what: Word | Note, name: bytes) -> None:
        try:
            listener(what)
        except Exception as fault:  # one bad word must not make us deaf
            event("broker.listener_failed", channel=name.decode(errors="replace"), fault=fault)

    def _complain(self, name: bytes, error: object) -> None:
        channel = name.decode(errors="replace")
        self._complain_once(name, f'a message in the Redis channel "{channel}" was skipped: {error}')

    def _complain_of_version(self, name: bytes, data: bytes) -> None:
        other = _version.match(data)
        if other is None:
            self._complain(name, "it is none of ours")
            return
        self._complain_once(
            other[0],
            f"other processes speak version {int(other[1])} to one another, this one version {self.version}: what "
            "they say is skipped, kept channels are compared with history instead; have all run the same release",
        )

    def _complain_once(self, of: bytes, why: str) -> None:
        if of not in self._strangers and len(self._strangers) < STRANGERS:
            self._strangers.add(of)
            event("broker.unreadable", why=why)

    def missed(self) -> None:
        """Whatever was missed is over, and all is followed again."""
        try:
            self.on_return()
        except Exception as fault:  # as with words
            event("broker.listener_failed", channel="", fault=fault)

    def weigh(self) -> None:
        """Say what the trouble is, after that of a line has changed."""
        troubles = (ear.trouble for ear in self._ears.values() if ear.names)
        self.trouble = self._unplaced or next(filter(None, troubles), "")
        self.mute = next((mouth.trouble for mouth in self._mouths.values() if mouth.trouble), "")

    # --- speaking -------------------------------------------------------------
    def announce(self, word: Word) -> None:
        """See ``Broker.announce``."""
        if self._ready:
            self._say(self._name(word.channel), self._mine + _bytes(word))

    def tell(self, note: Note, to: str = "") -> None:
        """See ``Broker.tell``."""
        if self._ready and to != self._node:
            self._say(self._somebody(to) if to else self._everybody, self._mine + _bytes(note))

    def _say(self, name: bytes, data: bytes) -> None:
        owner = self._slots.owner(slot_of(name) if self._clustered else 0)
        if owner is not None:  # else nobody serves it, and nobody hears it
            self._mouths[owner].say(_Said(name, data, asyncio.get_running_loop().time()))

    def probe(self) -> tuple[bytes, bytes]:
        """A name and a message that nobody takes notice of, to learn whether we may publish."""
        return self._somebody(self._node), self._mine

    def came_back(self, said: _Said) -> None:
        """A cluster did not take a word, since its channel has moved: it is said again when it is known where to."""
        said.moves += 1
        if said.moves <= MOVES and len(self._returned) < QUEUE_WORDS:
            self._returned.append(said)
        self.look()

    # --- who serves what --------------------------------------------------------
    def look(self) -> None:
        """Channels may have moved: look soon."""
        self._look.set()

    def stray(self, names: Iterable[bytes]) -> None:
        """These names are followed by nobody, though they should be: see where they belong."""
        self._strays.update(names)
        self.look()

    async def _find_slots(self) -> Slots:
        if self._clustered:
            return await find_slots(self.address, self._ears)
        return Slots.all_of(self.address.servers[0])

    async def connect(self, server: Server) -> Wire:
        """A connection to ``server``, or to whoever the Sentinels call primary; raises ``errors.Unavailable``."""
        if self.address.kind is Kind.SENTINEL:
            server = await find_primary(self.address)
        return await Wire.open(self.address, server)

    def _assign(self, name: bytes, wish: _Wish) -> None:
        """Let the ear that it belongs to hear ``name``."""
        owner = self._slots.owner(wish.slot)
        ear = self._ears.get(owner) if owner is not None else None
        if wish.ear is not ear and wish.ear is not None:
            wish.ear.unwant(name)
            if ear is not None:
                ear.missing = True
        wish.ear = ear
        if ear is not None:
            ear.want(name)

    def _place(self, slots: Slots) -> None:
        """Put every name where it belongs by ``slots``; makes the lines for that, to be started, and ends others."""
        changed = slots != self._slots
        self._slots = slots
        for server in slots.servers - self._ears.keys():
            self._ears[server] = Ear(self, server)
            self._mouths[server] = Mouth(self, server)
        if changed:
            for name, wish in self._wishes.items():
                self._assign(name, wish)
        strays, self._strays = self._strays, set()
        for name in strays:
            if name in self._wishes:
                self._assign(name, self._wishes[name])
        returned, self._returned = self._returned, deque()
        for server in self._ears.keys() - slots.servers:
            self._ears.pop(server).end()
            mouth = self._mouths.pop(server)
            mouth.end()
            returned += mouth.unsaid()
        for said in returned:
            if (owner := slots.owner(slot_of(said.name))) is not None:
                self._mouths[owner].say(said)
        served = all(wish.ear is not None for wish in self._wishes.values()) if changed else not self._unplaced
        self._unplaced = "" if served else "redis.url: some slots of the Redis Cluster are served by nobody"
        self.weigh()

    async def _keep_places(self) -> None:
        """Follow the channels, or the primary, to where they go."""
        while self.address.kind is not Kind.ALONE:
            try:
                async with asyncio.timeout(PLACES_S):
                    await self._look.wait()
            except TimeoutError:
                pass
            self._look.clear()
            try:
                if self.address.kind is Kind.SENTINEL:
                    self._check_primary(await find_primary(self.address))
                elif self._clustered:
                    self._place(await find_slots(self.address, self._ears))
                    for line in self._lines():
                        line.start()
            except Unavailable:
                pass  # the lines say what is wrong; places are kept until somebody knows better
            except Exception as fault:  # without this task a line might look for its Redis in vain for ever
                event("task.failed", task="redis places", fault=fault)
            await asyncio.sleep(LEAST_PLACES_S * random.uniform(1, 2))

    def _check_primary(self, primary: Server) -> None:
        for line in self._lines():
            line.check(primary)


# --- lines --------------------------------------------------------------------
def _seen(first: "asyncio.Future[None]") -> None:
    """Whoever opens the broker looks at a line's first failure; of a later line it is known from its trouble."""
    if not first.cancelled():
        first.exception()


class Line:
    """One connection to one Redis that is kept up; see the module's docstring."""

    part = ""

    def __init__(self, broker: RedisBroker, server: Server) -> None:
        self.broker = broker
        self.server = server
        self.trouble = f"redis.url: {server} is not connected yet"
        self._wire: Wire | None = None
        self._task: asyncio.Task[None] | None = None
        self._first: asyncio.Future[None] | None = None
        self._lost = False
        self._failures = 0
        self._silent = 0
        self._verdict = ""

    def __str__(self) -> str:
        return str(self._wire.server if self._wire is not None else self.server)

    def start(self) -> "asyncio.Future[None]":
        """Make the connection and keep it; returns what is done once it is well, or could not be made."""
        if self._first is None:
            loop = asyncio.get_running_loop()
            self._first = loop.create_future()
            self._first.add_done_callback(_seen)
            self._task = loop.create_task(self._keep(), name=f"redis {self.part} {self.server}")
        return self._first

    def end(self) -> "asyncio.Task[None] | asyncio.Future[None]":
        """Let the connection go for good; returns what is done once that is so."""
        if self._task is None:
            gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            gone.set_result(None)
            return gone
        self._task.cancel()
        return self._task

    def check(self, primary: Server) -> None:
        """Drop the connection unless it goes to ``primary``."""
        if self._wire is not None and self._wire.server != primary:
            self._drop(f"redis.url: the Sentinels call {primary} the primary, no longer {self._wire.server}")

    async def _keep(self) -> None:
        while True:
            self._verdict = ""
            try:
                self._wire = await self.broker.connect(self.server)
                await self._serve(self._wire)
            except Unavailable as error:
                self._went(self._verdict or str(error))
            except Exception as fault:  # a connection more or less must not make us deaf or dumb for good
                event("task.failed", task=f"redis {self.part} {self.server}", fault=fault)
                self._went("redis.url: a fault of ours ended the connection")
            self._failures += 1
            pause_s = min(LONGEST_PAUSE_S, PAUSE_S * 2 ** min(self._failures, 10))
            await asyncio.sleep(pause_s * random.uniform(0.5, 1))

    async def _serve(self, wire: Wire) -> None:
        self._silent = 0
        watch = asyncio.get_running_loop().create_task(self._watch(wire))
        try:
            await self._talk(wire)
        finally:
            watch.cancel()
            wire.abort()

    async def _talk(self, wire: Wire) -> None:
        """Use the connection until it ends, which raises ``errors.Unavailable``."""
        raise NotImplementedError

    def _ping(self, wire: Wire) -> None:
        raise NotImplementedError

    async def _watch(self, wire: Wire) -> None:
        while True:
            await asyncio.sleep(PING_S)
            if self._silent >= SILENT_PINGS:
                self._drop(f"redis.url: {wire.server} has not answered for {SILENT_PINGS * PING_S:g} s")
                return
            if self._silent and not self.trouble:
                self._in_trouble(f"redis.url: {wire.server} does not answer")
            self._silent += 1
            self._ping(wire)

    def _refusal(self, what: str, words: str) -> str:
        """In an operator's words that Redis does not let us do something."""
        if not words.startswith("NOPERM"):
            return f"redis.url: {self} does not let us {what}: {words}"
        user = self.broker.address.user or "default"
        return f"redis.url: expected that the user {user} may {what} at {self}, found that it may not: {words}"

    def _drop(self, why: str) -> None:
        """End the connection; whoever reads it notices."""
        self._verdict = self._verdict or why
        if self._wire is not None:
            self._wire.abort()

    def _alive(self) -> None:
        """Something has come."""
        if self._silent:
            self._silent = 0
            if self.trouble and not self._lost:
                self._in_trouble("")

    def _in_trouble(self, why: str) -> None:
        self.trouble = why
        self.broker.weigh()

    def _well(self, dropped: int = 0) -> None:
        """The connection is in use."""
        self._failures = 0
        self._in_trouble("")
        if self._first is not None and not self._first.done():
            self._first.set_result(None)
        if self._lost:
            self._lost = False
            event("broker.returned", address=str(self), part=self.part, dropped=dropped)

    def _went(self, why: str) -> None:
        """The connection is gone, or could not be made."""
        address, self._wire = str(self), None
        self._in_trouble(why)
        if self._first is not None and not self._first.done():
            self._first.set_exception(Unavailable(why))
        elif not self._lost:
            self._lost = True
            event("broker.lost", address=address, part=self.part, why=why)
        self.broker.look()


class Ear(Line):
    """The line that hears; ``names`` are the Redis channels that it shall hear."""

    part = "hearing"

    def __init__(self, broker: RedisBroker, server: Server) -> None:
        super().__init__(broker, server)
        self.names: set[bytes] = set()
        self.missing = False
        """Has something been missed, which nobody has been told of yet?"""
        self._ledger: Ledger | None = None
        self._flushing: asyncio.Handle | None = None

    def want(self, name: bytes) -> None:
        """Hear ``name``, also if that was refused before."""
        self.names.add(name)
        if self._ledger is not None:
            self._ledger.want(name)
            self._flush_soon()

    def unwant(self, name: bytes) -> None:
        """Hear it no longer."""
        self.names.discard(name)
        if self._ledger is not None:
            self._ledger.unwant(name)
            self._flush_soon()

    def in_force(self, name: bytes) -> bool:
        """Is ``name`` subscribed to?"""
        return self._ledger is not None and self._ledger.in_force(name)

    def _went(self, why: str) -> None:
        self._ledger = None
        self.missing = self.missing or (self._first is not None and self._first.done())
        super()._went(why)

    def _flush_soon(self) -> None:
        """All that changes in one turn of the loop leaves in one piece."""
        if self._flushing is None:
            self._flushing = asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self, *, ping: bool = False) -> None:
        self._flushing = None
        if self._ledger is None or self._wire is None:
            return
        commands, names = self._ledger.flush(ping=ping)
        if commands:
            self._wire.write(commands)
        for name in names:
            if self._ledger.in_force(name):
                self.broker.in_force(name)

    def _ping(self, wire: Wire) -> None:
        self._flush(ping=True)

    async def _talk(self, wire: Wire) -> None:
        sharded = self.broker.address.kind is Kind.CLUSTER
        ledger = self._ledger = Ledger(self.names, sharded=sharded, group=slot_of if sharded else _alike)
        self._flush(ping=True)
        loop = asyncio.get_running_loop()
        until = loop.time() + SLICE_S
        while True:
            answer = await wire.read()
            self._alive()
            match answer:
                case [b"message" | b"smessage", name, data]:
                    self.broker.hear(name, data)
                case [b"pong", number] | bytes(number):
                    self._answered(ledger, number)
                case [b"subscribe" | b"ssubscribe", name, _]:
                    ledger.confirmed(name)
                case [b"unsubscribe" | b"sunsubscribe", name, _]:
                    if ledger.ended(name):  # its slot has moved, and words may have been said there
                        self.missing = True
                        self.broker.stray([name])
                case ErrorReply():
                    ledger.refused(str(answer))
                case _:
                    raise Unavailable(f"redis.url: {wire.server} said what nobody asked for")
            if loop.time() >= until:
                await asyncio.sleep(0)
                until = loop.time() + SLICE_S

    def _answered(self, ledger: Ledger, number: bytes) -> None:
        """Everything up to a PING is through."""
        try:
            outcome = ledger.answered(number)
        except ValueError as error:
            raise Unavailable(f"redis.url: {self} mixed up its answers ({error})") from None
        for name in outcome.confirmed:
            if ledger.in_force(name):
                self.broker.in_force(name)
        if outcome.refused:
            if not all(words.startswith("MOVED ") for words in outcome.refusals):
                raise Unavailable(self._refusal("subscribe", "; ".join(dict.fromkeys(outcome.refusals))))
            self.broker.stray(outcome.refused)
        if ledger.changed:
            self._flush_soon()
        if not ledger.settled:
            return
        opening = self._first is not None and not self._first.done()
        if self.trouble or self._lost or opening:  # a first answer that was late has ended the trouble already
            self._well()
        if self.missing and not outcome.refused:
            self.missing = False
            self.broker.missed()


def _alike(name: bytes) -> int:
    """Outside a cluster all names may go into one command."""
    return 0


class Mouth(Line):
    """The line that speaks: words leave in order, those of one turn of the loop in one piece."""

    part = "speaking"

    def __init__(self, broker: RedisBroker, server: Server) -> None:
        super().__init__(broker, server)
        self._queue: deque[_Said] = deque()
        self._queue_bytes = 0
        self._under_way: deque[_Said | None] = deque()
        self._wake = asyncio.Event()
        self._dropped = 0
        self._refusing = False
        self._timed: _Said | None = None
        """The word whose way is being timed."""
        self._said_all: asyncio.Future[None] | None = None
        self._verb = b"SPUBLISH" if broker.address.kind is Kind.CLUSTER else b"PUBLISH"

    def say(self, said: _Said) -> None:
        """Send a word after all that were said before; never waits."""
        queue = self._queue
        queue.append(said)
        self._queue_bytes += len(said.data)
        while self._queue_bytes > QUEUE_BYTES or len(queue) > QUEUE_WORDS:
            if not self._dropped:
                event("broker.overflowed", address=str(self))
            self._dropped += 1
            self._queue_bytes -= len(queue.popleft().data)
        self._wake.set()

    def unsaid(self) -> list[_Said]:
        """What still waits; for another line to say."""
        unsaid = list(self._queue)
        self._queue.clear()
        return unsaid

    def said_all(self) -> "asyncio.Future[None]":
        """What is done once everything that was said has been taken by Redis."""
        self._said_all = asyncio.get_running_loop().create_future()
        self._see_whether_said_all()
        return self._said_all

    def _see_whether_said_all(self) -> None:
        if self._said_all is not None and not self._said_all.done() and not self._queue and not self._under_way:
            self._said_all.set_result(None)

    def _ping(self, wire: Wire) -> None:
        if not self._under_way:  # else answers are due anyway
            self._under_way.append(None)
            wire.write([(b"PING",)])

    async def _talk(self, wire: Wire) -> None:
        self._under_way.clear()  # what the last connection took with it is lost
        self._timed = None
        match await wire.ask(self._verb, *self.broker.probe()):
            case ErrorReply("MOVED"):
                pass  # we may, only not here
            case ErrorReply() as reply:
                raise Unavailable(self._refusal("publish", str(reply)))
        dropped, self._dropped = self._dropped, 0
        self._refusing = False
        self._well(dropped)
        self._wake.set()
        writing = asyncio.get_running_loop().create_task(self._write(wire))
        loop = asyncio.get_running_loop()
        until = loop.time() + SLICE_S
        try:
            while True:
                answer = await wire.read()
                self._alive()
                if not self._under_way:
                    raise Unavailable(f"redis.url: {wire.server} said what nobody asked for")
                said = self._under_way.popleft()
                if said is not None:
                    self._taken(said, answer if isinstance(answer, ErrorReply) else None)
                self._see_whether_said_all()
                if loop.time() >= until:
                    await asyncio.sleep(0)
                    until = loop.time() + SLICE_S
        finally:
            writing.cancel()

    def _taken(self, said: _Said, refusal: ErrorReply | None) -> None:
        if refusal is None:
            if said is self._timed:
                self._timed = None
                self.broker.on_taken(asyncio.get_running_loop().time() - said.at)
            if self._refusing:
                self._refusing = False
                self._in_trouble("")
        elif refusal.code == "MOVED":
            self.broker.came_back(said)
        else:
            if not self._refusing:
                self._refusing = True
                event("broker.refused", address=str(self), why=str(refusal))
                self.broker.look()
            if not self.trouble:
                self._in_trouble(self._refusal("publish", str(refusal)))

    async def _write(self, wire: Wire) -> None:
        """Write what is said, as fast as the connection takes it."""
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while self._queue:
                    wire.write(self._take())
                    await wire.drain()
        except Unavailable:
            wire.abort()  # whoever reads notices
        except Exception as fault:
            event("task.failed", task=f"redis {self.part} {self.server}", fault=fault)
            wire.abort()

    def _take(self) -> list[tuple[bytes, bytes, bytes]]:
        """The commands for what is said next; all that a turn of the loop has said, but for the bound of one write."""
        commands = []
        size = 0
        oldest = asyncio.get_running_loop().time() - STALE_S
        while self._queue and size < WRITE_BYTES:
            said = self._queue.popleft()
            self._queue_bytes -= len(said.data)
            if said.at < oldest:
                self._dropped += 1
                continue
            size += len(said.data)
            self._under_way.append(said)
            self._timed = self._timed or said
            commands.append((self._verb, said.name, said.data))
        return commands
