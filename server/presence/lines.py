"""Commands on their way to Redis: in order, many in one piece, each to the server that holds its key.

A *line* is one connection to one server with the commands that wait for it.  One
batch is under way at a time: what is asked meanwhile leaves in the next, so that
a crowd of a thousand costs a dozen round trips, and what was asked first is done
first, also across a broken connection.  A batch that is not answered within
``BATCH_S`` fails as a whole.

A connection that breaks under its first use may have died while nobody looked:
its batch is sent once more, so every command must do no harm twice.

Stands on ``redis.Wire`` rather than on redis-py's clients: their pool keeps no
order, and their cluster client closes the connections to all nodes when one fails.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from server.errors import Unavailable
from server.presence.scripts import SCRIPTS, Script
from server.redis import (
    Address,
    Answer,
    Command,
    ErrorReply,
    Kind,
    Server,
    Slots,
    Wire,
    find_primary,
    find_slots,
    slot_of,
)

BATCH_S = 1.0
BATCH_COMMANDS = 128
"""What one piece holds; with ``scripts.PAGE_ENTRIES`` this bounds how long Redis works on it."""

_ELSEWHERE = ("MOVED", "READONLY")
"""Refusals that say: not done here, somebody else is in charge of it."""

_LOADING = tuple(("SCRIPT", "LOAD", script.text) for script in SCRIPTS)
"""Goes ahead of the first batch: a script that had to be sent again would change places with what came after it."""

_IN_MOTION = ("ASK", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN")
"""Refusals of a cluster that is about to change; trying again in a moment helps."""


class _Waiting(NamedTuple):
    command: Command
    answer: "asyncio.Future[Answer]"


class Line:
    """The commands of one purpose for one server; ``on_return`` is called for each connection but the first."""

    def __init__(self, address: Address, server: Server, on_return: Callable[[], None]) -> None:
        self._address = address
        self._server = server
        self._on_return = on_return
        self._wire: Wire | None = None
        self._had_wire = False
        self._waiting: deque[_Waiting] = deque()
        self._task: asyncio.Task[None] | None = None

    def put(self, command: Command) -> "asyncio.Future[Answer]":
        """Queue a command; its answer, or ``errors.Unavailable``, comes as a future.

        Cancelled before its turn it is not sent.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Answer] = loop.create_future()
        self._waiting.append(_Waiting(command, answer))
        if self._task is None:
            self._task = loop.create_task(self._run(), name=f"presence line to {self._server}")
        return answer

    @property
    def idle(self) -> bool:
        """Does nobody wait for an answer?"""
        return self._task is None

    async def close(self) -> None:
        """Drop the connection and whatever waits."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._abort()
        for waiting in self._waiting:
            _fail(waiting, Unavailable("presence is closed"))

    async def _run(self) -> None:
        try:
            while batch := self._next_batch():
                try:
                    answers = await self._exchange([waiting.command for waiting in batch])
                except Exception as error:  # a fault of ours goes to those who asked, who raise it
                    for waiting in batch:
                        _fail(waiting, error)
                    continue
                except asyncio.CancelledError:
                    for waiting in batch:
                        _fail(waiting, Unavailable("presence is closed"))
                    raise
                for waiting, answer in zip(batch, answers, strict=True):
                    if not waiting.answer.done():
                        waiting.answer.set_result(answer)
        finally:
            self._task = None

    def _next_batch(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        while self._waiting and len(batch) < BATCH_COMMANDS:
            waiting = self._waiting.popleft()
            if not waiting.answer.done():
                batch.append(waiting)
        return batch

    async def _exchange(self, commands: Sequence[Command]) -> list[Answer]:
        try:
            async with asyncio.timeout(BATCH_S):
                if self._wire is not None:
                    try:
                        return await self._send(self._wire, commands)
                    except Unavailable:
                        self._abort()
                self._wire = await Wire.open(self._address, self._server)
                if self._had_wire:
                    self._on_return()
                self._had_wire = True
                answers = await self._send(self._wire, (*_LOADING, *commands))
                return answers[len(_LOADING) :]
        except TimeoutError:
            self._abort()
            raise Unavailable(f"redis.url: {self._server} did not answer within {BATCH_S:g} s") from None
        except BaseException:
            self._abort()
            raise

    async def _send(self, wire: Wire, commands: Sequence[Command]) -> list[Answer]:
        wire.write(commands)
        await wire.drain()
        return [await wire.read() for _ in commands]

    def _abort(self) -> None:
        if self._wire is not None:
            self._wire.abort()
            self._wire = None


def _fail(waiting: _Waiting, error: Exception) -> None:
    if not waiting.answer.done():
        waiting.answer.set_exception(error)


class Lines:
    """All lines of one process, one per purpose and server, and the knowledge which server holds a key.

    ``on_return`` is called when a connection had to be made anew, or another server
    is in charge: what it knows may be older than what was written before.
    """

    def __init__(self, address: Address, on_return: Callable[[], None]) -> None:
        self._address = address
        self._on_return = on_return
        self._lines: dict[tuple[str, Server], Line] = {}
        self._slots = Slots.all_of(address.servers[0]) if address.kind is Kind.ALONE else Slots({})
        self._stale = address.kind is not Kind.ALONE
        self._finding: asyncio.Task[None] | None = None
        self._closed = False

    async def run(self, purpose: str, script: Script, keys: Sequence[str], *args: str | bytes | int) -> Answer:
        """What ``script`` answers where ``keys`` are, all in one slot; raises ``errors.Unavailable``.

        Commands of the same ``purpose`` and server are carried out in the order in which they are asked.
        """
        rest = (str(len(keys)), *keys, *(str(arg) if isinstance(arg, int) else arg for arg in args))
        answer = await self._ask(purpose, keys[0], ("EVALSHA", script.sha, *rest))
        if isinstance(answer, ErrorReply) and answer.code == "NOSCRIPT":
            answer = await self._ask(purpose, keys[0], ("EVAL", script.text, *rest))
        return self._checked(answer, keys[0])

    async def ask(self, purpose: str, command: str, key: str, *args: str | bytes) -> Answer:
        """The same for one plain command."""
        return self._checked(await self._ask(purpose, key, (command, key, *args)), key)

    def say(self, purpose: str, command: str, key: str, *args: str | bytes) -> None:
        """The same, with nobody to hear the answer."""
        self._put(purpose, key, (command, key, *args)).add_done_callback(_heard)

    def probe(self) -> None:
        """Say a word on every line, so that one whose connection was lost while it was idle makes a new one."""
        for line in self._lines.values():
            line.put(("PING",)).add_done_callback(self._noticed)

    async def close(self) -> None:
        """Drop everything; who still waits gets ``errors.Unavailable``."""
        self._closed = True
        if self._finding is not None:
            self._finding.cancel()
            await asyncio.gather(self._finding, return_exceptions=True)
        for line in self._lines.values():
            await line.close()

    async def _ask(self, purpose: str, key: str, command: Command) -> Answer:
        if self._stale:
            await self._find()
        answer = await self._put(purpose, key, command)
        if isinstance(answer, ErrorReply) and answer.code in _ELSEWHERE and self._address.kind is not Kind.ALONE:
            self._stale = True
            await self._find()
            answer = await self._put(purpose, key, command)
        return answer

    def _put(self, purpose: str, key: str, command: Command) -> "asyncio.Future[Answer]":
        if self._closed:
            return _never("presence is closed")
        server = self._slots.owner(slot_of(key.encode()))
        if server is None:
            self._stale = True
            return _never(f"redis.url: expected a server in charge of every key at {self._address.text}, found gaps")
        line = self._lines.get((purpose, server))
        if line is None:
            line = self._lines[purpose, server] = Line(self._address, server, self._on_return)
        answer = line.put(command)
        answer.add_done_callback(self._noticed)
        return answer

    def _noticed(self, answer: "asyncio.Future[Answer]") -> None:
        """A server that does not answer may not be in charge any more."""
        if not answer.cancelled() and isinstance(answer.exception(), Unavailable):
            self._stale = self._address.kind is not Kind.ALONE

    async def _find(self) -> None:
        """Learn who is in charge; all who need to know share one question."""
        if self._finding is None:
            self._finding = asyncio.get_running_loop().create_task(self._found(), name="find redis")
            self._finding.add_done_callback(self._found_out)
        finding = self._finding
        await asyncio.wait([finding])  # goes on if we are cancelled: others may wait for it
        if finding.cancelled():
            raise Unavailable("presence is closed")
        finding.result()

    async def _found(self) -> None:
        self._stale = False
        before = self._slots
        try:
            if self._address.kind is Kind.CLUSTER:
                self._slots = await find_slots(self._address, self._slots.servers)
            else:
                self._slots = Slots.all_of(await find_primary(self._address))
        except BaseException:
            self._stale = True
            raise
        if before.servers and before != self._slots:
            self._on_return()
            for purpose, server in [key for key in self._lines if key[1] not in self._slots.servers]:
                if self._lines[purpose, server].idle:
                    await self._lines.pop((purpose, server)).close()

    def _found_out(self, task: "asyncio.Task[None]") -> None:
        self._finding = None
        _heard(task)

    def _checked(self, answer: Answer, key: str) -> Answer:
        if isinstance(answer, ErrorReply):
            self._stale = self._stale or answer.code in _IN_MOTION
            raise Unavailable(f"redis.url: {self._address.text} refused to serve presence ({answer})")
        return answer


def _never(why: str) -> "asyncio.Future[Answer]":
    """The answer to what could not even be asked."""
    answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
    answer.set_exception(Unavailable(why))
    return answer


def _heard(answer: "asyncio.Future[Answer] | asyncio.Task[None]") -> None:
    """Nobody minds what became of it."""
    if not answer.cancelled():
        answer.exception()
