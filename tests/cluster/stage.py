"""A stage for many processes: real ``run.py``, a real replica set, a real Redis, and wires that can be hurt.

Each process reaches Redis and every member of MongoDB through proxies of its own,
so that one process's link can be cut, held or made lossy while the others' is
well.  ``broken`` does each kind of fault that ``schedule`` knows, and undoes it.
"""

import asyncio
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from disguise import Disguise
from mongod import Member, ReplicaSet, fresh_database
from proxy import Proxy, Splitter
from redis_server import RedisServer, wait_for_replica
from support import KEPT, OPEN, Process, config
from tornado.httpclient import AsyncHTTPClient, HTTPClientError

T = TypeVar("T")

LOSS = 0.3
SLOW_S = 0.3
UNSHARED_S = 1.5
"""How long a primary takes writes, or a process commits some, of which nobody else hears, before it is killed."""

EVENT = re.compile(r"\d{4}-\d\d-\d\dT\S+Z \w+ ")
"""How a line begins that is no part of a trace."""

READY_S = 120.0
"""How long a process may take to be ready once all is well; a busy machine starts slowly."""

STREAMED: dict[str, Any] = {"sse": {"enabled": True}, "http_stream": {"enabled": True}}
"""The sections that offer the transports for those who have no WebSocket."""


async def asked_until(ask: Callable[[], Awaitable[T]], good: Callable[[T], bool], patience_s: float = READY_S) -> T:
    """Ask again and again, since nobody tells, until the answer is ``good``; raises ``TimeoutError``."""
    async with asyncio.timeout(patience_s):
        while True:
            answer = await ask()
            if good(answer):
                return answer
            await asyncio.sleep(0.1)


async def asked_again(ask: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
    """Ask, and as an SDK does again while the answer is error 100, which says to; raises ``TimeoutError``."""
    return await asked_until(ask, lambda answer: answer.get("error", {}).get("code") != 100)


class MemberProxy(Proxy):
    """A proxy before one member of a replica set, which tells a driver of the proxies and not of the members."""

    def __init__(self, host: str, port: int, addresses: Mapping[str, str]) -> None:
        super().__init__(host, port, resp=True)
        self._addresses = addresses
        self._disguises: WeakKeyDictionary[Splitter, Disguise] = WeakKeyDictionary()

    def _thinned(self, splitter: Splitter, piece: bytes) -> bytes:
        """One ``splitter`` stands for one connection; MongoDB's messages are others than Redis's."""
        disguise = self._disguises.get(splitter)
        if disguise is None:
            disguise = self._disguises[splitter] = Disguise(self._addresses)
        return disguise.feed(piece)


@asynccontextmanager
async def away(proxy: Proxy) -> AsyncIterator[None]:
    """Within this, connections are cut and new ones refused."""
    proxy.refuse()
    proxy.cut()
    try:
        yield
    finally:
        await proxy.accept()


@asynccontextmanager
async def stalled(proxy: Proxy) -> AsyncIterator[None]:
    """Within this, connections stay, new ones are taken, and nothing gets through; afterwards all of it comes."""
    proxy.stall()
    try:
        yield
    finally:
        proxy.flow()


class Running:
    """One process of ``run.py``, as its clients and whoever looks after it see it."""

    def __init__(self, name: str, process: Process) -> None:
        self.name = name
        self.process = process

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.http}>"

    @property
    def url(self) -> str:
        """Where WebSocket clients connect."""
        return self.process.url

    @property
    def http(self) -> str:
        """Where the back end calls."""
        return self.process.http

    async def start(self) -> None:
        """Start it, anew or again, and wait until it listens."""
        await asyncio.to_thread(self.process.start)

    async def readiness(self) -> tuple[int, str]:
        """Status and body of ``/health/ready``; (0, why) if nobody answers."""
        http = AsyncHTTPClient(force_instance=True)
        try:
            response = await http.fetch(f"{self.http}/health/ready", raise_error=False, request_timeout=5.0)
            return response.code, response.body.decode()
        except (OSError, HTTPClientError) as error:
            return 0, str(error)
        finally:
            http.close()

    async def ready(self, status: int = 200, patience_s: float = READY_S) -> str:
        """Wait until readiness has this status; returns the body."""
        return (await asked_until(self.readiness, lambda answer: answer[0] == status, patience_s))[1]

    def faults_logged(self) -> list[str]:
        """The lines of its log that say that something is its own fault, each with the end of its trace."""
        found: list[str] = []
        at_fault = False
        for line in self.process.log.read_text().splitlines():
            if EVENT.match(line):
                at_fault = " error " in line[:40]
                if at_fault:
                    found.append(line)
            elif at_fault and line and not line.startswith(" "):
                found[-1] += f" {line}"
        return found


class Place(Running):
    """One with its wires to Redis and to each member of MongoDB, to be hurt."""

    def __init__(self, name: str, process: Process, redis: Proxy, mongo: Sequence[Proxy]) -> None:
        super().__init__(name, process)
        self.redis = redis
        self.mongo = mongo

    async def kill(self) -> None:
        """End it at once, as a crash would."""
        await asyncio.to_thread(self.process.kill)

    def stop(self) -> None:
        """Let it do nothing from now on (SIGSTOP), with all its connections open."""
        self.process.send(signal.SIGSTOP)

    def cont(self) -> None:
        """Let it go on (SIGCONT)."""
        self.process.send(signal.SIGCONT)


class Stage:
    """Everything at once; see ``staging``."""

    def __init__(
        self, places: Sequence[Place], replica_set: ReplicaSet, redis: RedisServer, servers: ExitStack
    ) -> None:
        self.places = places
        self.replica_set = replica_set
        self.redis = redis
        self._servers = servers
        """Ends every Redis there was."""

    async def healthy(self) -> None:
        """Wait until every store and every process says that all is well."""
        await asyncio.to_thread(self.replica_set.recover)
        await asyncio.gather(*(place.ready() for place in self.places))

    @asynccontextmanager
    async def lossy(self, share: float) -> AsyncIterator[None]:
        """Within this, each process loses this share of what Redis pushes to it."""
        for place in self.places:
            place.redis.lose(share)
        try:
            yield
        finally:
            for place in self.places:
                place.redis.lose(0.0)

    def _follow_redis(self) -> RedisServer:
        """Start a replica of Redis; returns once it has what Redis has."""
        heir = self._servers.enter_context(RedisServer())
        heir.command("REPLICAOF", "127.0.0.1", str(self.redis.port))  # no option: it must not follow again at a restart
        wait_for_replica(heir)
        return heir

    async def _succeed(self, heir: RedisServer) -> None:
        """Put a replica in the place of Redis, at the same address, as hosts of databases do."""
        await asyncio.to_thread(heir.command, "REPLICAOF", "NO", "ONE")
        self.redis = heir
        for place in self.places:
            place.redis.target = ("127.0.0.1", heir.port)

    @asynccontextmanager
    async def broken(self, kind: str, place: Place) -> AsyncIterator[None]:
        """Do a fault of ``schedule.KINDS``, at ``place`` if it is for one process, and undo it in the end."""
        async with AsyncExitStack() as stack:
            match kind:
                case "process killed":
                    await place.kill()
                    stack.push_async_callback(place.start)
                case "killed unannounced":
                    async with stalled(place.redis):
                        await asyncio.sleep(UNSHARED_S)
                        await place.kill()
                        stack.push_async_callback(place.start)
                        place.redis.cut()  # what it had said, and was held back, is never heard
                case "process stopped":
                    place.stop()
                    stack.callback(place.cont)
                case "redis emptied":
                    await asyncio.to_thread(self.redis.kill)
                    stack.push_async_callback(asyncio.to_thread, self.redis.start)
                case "redis failed over":
                    heir = await asyncio.to_thread(self._follow_redis)
                    await asyncio.to_thread(self.redis.kill)
                    stack.push_async_callback(self._succeed, heir)
                case "redis stopped":
                    self.redis.freeze()
                    stack.callback(self.redis.thaw)
                case "redis lossy":
                    await stack.enter_async_context(self.lossy(LOSS))
                case "redis slow":
                    for one in self.places:
                        one.redis.delay_s = SLOW_S
                        stack.callback(setattr, one.redis, "delay_s", 0.0)
                case "redis cut":
                    await stack.enter_async_context(away(place.redis))
                case "redis stalled":
                    await stack.enter_async_context(stalled(place.redis))
                case "primary stepped down":
                    await asyncio.to_thread(self.replica_set.step_down, 5)
                case "primary killed":
                    member = await asyncio.to_thread(self.replica_set.primary)
                    await asyncio.to_thread(member.kill)
                    stack.push_async_callback(asyncio.to_thread, member.start)
                case "primary stopped":
                    member = await asyncio.to_thread(self.replica_set.primary)
                    member.stop()
                    stack.callback(member.cont)
                case "majority frozen":
                    for member in await asyncio.to_thread(self.replica_set.secondaries):
                        await asyncio.to_thread(_freeze, member, "alwaysOn")
                        stack.push_async_callback(asyncio.to_thread, _freeze, member, "off")
                case "primary rolled back":
                    member = await asyncio.to_thread(self.replica_set.primary)
                    async with self.broken("majority frozen", place):
                        await asyncio.sleep(UNSHARED_S)
                        await asyncio.to_thread(member.kill)
                        stack.push_async_callback(asyncio.to_thread, member.start)
                case "mongo killed":
                    for member in self.replica_set.members:
                        await asyncio.to_thread(member.kill)
                        stack.push_async_callback(asyncio.to_thread, member.start)
                case "mongo cut":
                    for wire in place.mongo:
                        await stack.enter_async_context(away(wire))
                case "mongo stalled":
                    for wire in place.mongo:
                        await stack.enter_async_context(stalled(wire))
                case _:
                    raise AssertionError(f"nobody knows how to do {kind!r}")
            yield


def _freeze(member: Member, mode: str) -> None:
    """Have a secondary take nothing from the primary any more, or again, while it goes on to say that it is alive."""
    member.command({"configureFailPoint": "stopReplProducer", "mode": mode})


def shared_config(database: str, prefix: str, **sections: Any) -> dict[str, Any]:
    """The configuration of all processes of a stage, but for the addresses.

    Namespaces: ``chat`` kept, ``live`` passing with presence and pushed joins and
    leaves, ``room`` kept with both.
    """
    social = {"presence": True, "join_leave": True, "force_push_join_leave": True}
    namespaces = [{"name": "chat", **KEPT}, {"name": "live", **OPEN, **social}, {"name": "room", **KEPT, **social}]
    whole: dict[str, Any] = {
        "channel": {"namespaces": namespaces},
        "mongo": {"database": database},
        "redis": {"prefix": prefix},
    }
    for name, section in sections.items():
        whole[name] = {**whole.get(name, {}), **section}
    return config(**whole)


@asynccontextmanager
async def staging(
    folder: Path, replica_set: ReplicaSet, *, processes: int = 2, **sections: Any
) -> AsyncIterator[Stage]:
    """Processes over ``replica_set`` and a Redis of their own, all ready; gone in the end.

    With ``redis={"url": …}`` they go to that one instead, and not through proxies.
    """
    database = fresh_database()
    async with AsyncExitStack() as stack:
        servers = stack.enter_context(ExitStack())
        redis = servers.enter_context(RedisServer())
        places = []
        for number in range(processes):
            wire = await stack.enter_async_context(Proxy("127.0.0.1", redis.port, resp=True))
            addresses: dict[str, str] = {}
            mongo = []
            for member in replica_set.members:
                proxy = MemberProxy("127.0.0.1", member.advertised, addresses)
                addresses[member.address] = proxy.address
                mongo.append(await stack.enter_async_context(proxy))
            name = f"process {number}"
            home = folder / f"process{number}"
            home.mkdir()
            chosen = shared_config(database, database, **sections)
            chosen["mongo"]["url"] = f"mongodb://{','.join(addresses.values())}/?replicaSet=waterspout"
            chosen["redis"].setdefault("url", f"redis://127.0.0.1:{wire.port}/0")
            places.append(Place(name, Process(home, chosen), wire, mongo))
        stage = Stage(places, replica_set, redis, servers)
        for place in places:
            stack.push_async_callback(_end, place)
        await asyncio.gather(*(place.start() for place in places))
        await asyncio.gather(*(place.ready() for place in places))
        yield stage


async def _end(place: Place) -> None:
    """End a process, whatever state it is in."""
    if place.process.popen is not None:
        place.cont()
        await asyncio.to_thread(place.process.kill)
