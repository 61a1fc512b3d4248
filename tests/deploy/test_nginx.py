"""nginx with the file that we ship: every way in goes through it, and a rolling restart behind it loses nothing."""

import asyncio
import random
import re
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import websockets
from front import CONFIG, Front, fronting
from hopper import ALWAYS, EMULATED, FLOOD_S, Cut, Hopper, ask, events, head_of, publish_all, vanish
from instruments import EMULATED as EMULATED_KINDS
from instruments import KINDS, playing
from mongod import fresh_database, shared_set
from ports import free_port
from redis_server import shared_server
from streams import TRANSPORTS, uni_http_stream, uni_sse
from support import KEPT, PATIENCE_S, Client, Closed, Process, config

import run
from server.polling import LONGEST_S
from server.settings import Settings

CHANNEL = "chat:front"
WAYS = [*ALWAYS, *EMULATED]


def directive(name: str) -> str:
    """The value of a directive of the file, which must be there once."""
    found = re.findall(rf"^\s*{name} ([^;]+);", CONFIG.read_text(), re.MULTILINE)
    assert len(found) == 1, f"{name}: {found}"
    return str(found[0])


def seconds(text: str) -> float:
    """A duration in seconds."""
    return float(text.removesuffix("s"))


# --- the file by itself --------------------------------------------------------------
def test_its_patience_is_that_of_the_server() -> None:
    """Nothing that the server keeps open is cut by nginx, nothing that it would take is refused, and it closes last."""
    assert seconds(directive("proxy_read_timeout")) > max(Settings().client.ping_interval, LONGEST_S) + 5
    assert seconds(directive("keepalive_timeout")) < run.REQUEST_S - 5
    assert directive("client_max_body_size") == f"{run.REQUEST_BYTES // 2**20}m"


class Doubtful:
    """Two servers of which the first to be asked does something wrong, and the other answers."""

    def __init__(self, wrong: str) -> None:
        self.wrong = wrong
        self.asked: list[str] = []

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        head = await reader.readuntil(b"\r\n\r\n")
        self.asked.append(head.split()[0].decode())
        first = len(self.asked) == 1
        if first and self.wrong == "cut":
            await vanish(writer)
            return
        status = "503 Service Unavailable" if first else "200 OK"
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{{}}".encode())
        writer.close()


@asynccontextmanager
async def doubtful(wrong: str) -> AsyncIterator[tuple[Doubtful, Front]]:
    """``Doubtful`` behind nginx."""
    servers = Doubtful(wrong)
    async with AsyncExitStack() as stack:
        ports = [free_port(), free_port()]
        for port in ports:
            await stack.enter_async_context(await asyncio.start_server(servers.answer, "127.0.0.1", port))
        yield servers, stack.enter_context(fronting(ports))


async def test_a_read_is_asked_of_the_next() -> None:
    """A GET whose server cuts it, or says 503, is asked of the other one, and nobody notices."""
    for wrong in ("cut", "503"):
        async with doubtful(wrong) as (servers, front):
            assert (await ask(front.port, "/v1/status")).status == 200
            assert servers.asked == ["GET", "GET"]


async def test_a_publish_is_never_repeated() -> None:
    """A POST that was sent is not sent again: 503 is passed on, a cut is 502, and only its sender decides."""
    for wrong, status in (("cut", 502), ("503", 503)):
        async with doubtful(wrong) as (servers, front):
            assert (await ask(front.port, "/api/publish", body={})).status == status
            assert servers.asked == ["POST"]


# --- in front of two processes -----------------------------------------------------------
class Site:
    """Two processes on one history, behind nginx."""

    def __init__(self, processes: list[Process], front: Front) -> None:
        self.processes = processes
        self.front = front
        self.port = front.port

    async def ready(self, process: Process) -> None:
        """Wait until a process says that it may be asked."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                if (await ask(process.port, "/health/ready")).status == 200:
                    return
                await asyncio.sleep(0.05)  # it tells nobody when it becomes so


@asynccontextmanager
async def behind_nginx(folder: Path, **sections: Any) -> AsyncIterator[Site]:
    """Two processes behind nginx, both ready."""
    database = fresh_database()
    shared = config(
        channel={"namespaces": [{"name": "chat", **KEPT, "presence": True}]},
        mongo={"url": shared_set().url, "database": database},
        redis={"url": shared_server().url, "prefix": database},
        http_server={"trusted_proxies": ["127.0.0.1"]},
        **{name: {"enabled": True} for name in TRANSPORTS},
        **sections,
    )
    async with AsyncExitStack() as stack:
        processes = []
        for number in range(2):
            home = folder / f"process{number}"
            home.mkdir()
            processes.append(Process(home, shared))
        await asyncio.gather(*(asyncio.to_thread(process.start) for process in processes))
        for process in processes:
            stack.callback(process.__exit__, None, None, None)
        site = Site(processes, stack.enter_context(fronting([process.port for process in processes])))
        await asyncio.gather(*map(site.ready, processes))
        yield site
        assert site.front.complaints() == []


async def test_every_way_goes_through(tmp_path: Path) -> None:
    """What is published at one process comes at once by every transport; nothing is held back on the way."""
    async with behind_nginx(tmp_path) as site, AsyncExitStack() as stack:
        hoppers = [Hopper([site.port], CHANNEL, random.Random(1), ways=[way]) for way in WAYS]
        await publish_all(lambda: [site.port], CHANNEL, 1, random.Random(2))  # from now on there is an epoch
        saying = publish_all(lambda: [site.port], CHANNEL, 20, random.Random(2))  # the same key again: 19 more
        await asyncio.gather(saying, *(hopper.hop(20) for hopper in hoppers))
        for hopper, way in zip(hoppers, WAYS, strict=True):
            assert [one["data"] for one in hopper.received] == list(range(20)), way
            assert hopper.cuts == 0, f"{way} was cut"

        request: dict[str, Any] = {"subs": {CHANNEL: {}}}
        streams = [await stack.enter_async_context(make(site.port, request)) for make in (uni_sse, uni_http_stream)]
        for stream in streams:
            await stream.expect("connect")
        one_way = await websockets.connect(f"ws://127.0.0.1:{site.port}/connection/uni_websocket", compression=None)
        stack.push_async_callback(one_way.close)
        await one_way.send('{"subs": {"chat:front": {}}}')
        assert "connect" in str(await one_way.recv())
        answer = await ask(site.port, f"/v1/channels/{CHANNEL}/publications", body={"data": "live"})
        assert answer.json["offset"] == 21
        for stream in streams:
            assert (await stream.expect("pub"))["data"] == "live"
        assert '"live"' in str(await one_way.recv())

        players = [
            await stack.enter_async_context(playing(kind, _url(site, kind.transport))) for kind in EMULATED_KINDS
        ]
        for player in players:  # What they say goes by requests of its own, to either process.
            await player.subscribed(CHANNEL)
            assert (await player.call("presence_stats", CHANNEL))["num_clients"] >= 1


def _url(site: Site, transport: str) -> str:
    return site.front.url if transport == "websocket" else f"{site.front.http}/connection/{transport}"


async def test_who_asks_is_known_and_tokens_are_not(tmp_path: Path) -> None:
    """The server logs the client's own address, whatever that claims; nginx logs no query, in which a token may be."""
    async with behind_nginx(tmp_path) as site:
        forged = {"X-Forwarded-For": "203.0.113.9"}
        client = await Client.open(site.front.url, local_addr=("127.0.0.7", 0), additional_headers=forged)
        await client.ask("connect")
        await client.close()
        await ask(site.port, "/v1/status?token=hush")
        await asyncio.to_thread(site.processes[0].kill)
        for _ in range(4):  # Some of them meet the one that is gone.
            assert (await ask(site.port, "/v1/status?token=hush")).status == 200
        logs = "".join(process.log.read_text() for process in site.processes)
        assert re.search(r"connection\.accepted .*address=127\.0\.0\.7\b", logs), logs
        assert "203.0.113.9" not in logs
        assert "hush" not in site.front.seen()
        assert "/v1/status" in site.front.seen()


class Source:
    """What a browser's ``EventSource`` does: it listens, and comes back with its last id when the stream ends.

    Sooner than a browser: the publisher waits for it each time.
    """

    def __init__(self, port: int) -> None:
        self.heard: list[int] = []
        self.returns = 0
        self._port = port
        self._news = asyncio.Event()

    async def listen(self) -> None:
        """Never ends."""
        last = ":0"
        while True:
            with suppress(OSError, Cut, StopAsyncIteration):
                async with events(self._port, _path("events"), {"Last-Event-ID": last}) as stream:
                    assert stream.status == 200, stream.problem
                    while True:
                        event = await stream.next()
                        assert event.kind in ("id", "message", "disconnect"), event
                        if event.kind == "message":
                            self.heard.append(event.data["data"])
                            self._news.set()
                        last = stream.last_id
            self.returns += 1
            await asyncio.sleep(FLOOD_S)

    async def until(self, count: int) -> None:
        """Wait until it has heard so much."""
        while len(self.heard) < count:
            self._news.clear()
            await self._news.wait()


async def test_a_rolling_restart_loses_nothing(tmp_path: Path) -> None:
    """Both processes are ended and started again one after the other, with everybody talking: P9 through nginx.

    SDKs, a reader that hops between all transports, an event stream and a
    publisher: in the end each has all of history once and in order, and no
    handshake was ever refused.
    """
    kinds = [KINDS[0], KINDS[3], EMULATED_KINDS[0]]
    async with behind_nginx(tmp_path, shutdown={"grace": "1s", "timeout": "10s"}) as site, AsyncExitStack() as stack:
        players = [await stack.enter_async_context(playing(kind, _url(site, kind.transport))) for kind in kinds]
        for player in players:
            await player.subscribed(CHANNEL)
        hopper = Hopper([site.port], CHANNEL, random.Random(3), ways=WAYS)
        source = Source(site.port)
        published: list[int] = []
        done = asyncio.Event()

        async def talk() -> None:
            while not done.is_set():
                await _publish(site, len(published) + 1)
                published.append(len(published) + 1)
                await _knock(site)
                await source.until(len(published))

        async def hop() -> None:
            while True:
                await hopper.leg()

        async with asyncio.TaskGroup() as group:
            listeners = [group.create_task(work) for work in (source.listen(), hop())]
            talking = group.create_task(talk())
            for process in site.processes:
                await hopper.reached(len(hopper.received) + 10)
                process.send(signal.SIGTERM)
                assert await asyncio.to_thread(process.wait) == 0
                await hopper.reached(len(hopper.received) + 10)
                await asyncio.to_thread(process.start)
                await site.ready(process)
            done.set()
            await talking
            for listener in listeners:
                listener.cancel()
        await hopper.hop(len(published))

        assert published == source.heard == [one["data"] for one in hopper.received]
        assert source.returns >= 1
        for player in players:
            assert [one["data"] for one in await player.publications(CHANNEL, len(published))] == published
            assert not player.untaken("disconnected")
        for process in site.processes:
            assert " error " not in process.log.read_text()


def _path(what: str) -> str:
    return f"/v1/channels/{CHANNEL}/{what}"


async def _publish(site: Site, number: int) -> None:
    """Publish until it is acknowledged, by one key: whoever gets 502 or 503, or nothing, knows nothing."""
    while True:
        with suppress(OSError, Cut):
            key = {"Idempotency-Key": f"number-{number}"}
            reply = await ask(site.port, _path("publications"), headers=key, body={"data": number})
            if reply.status == 201:
                assert reply.json["offset"] == number
                return
            assert reply.status in (502, 503), reply


async def _knock(site: Site) -> None:
    """Connect; a handshake that fails, fails the test.  To be welcomed and sent on with 3001 is no failure."""
    client = await Client.open(site.front.url)
    with suppress(Closed):
        await client.ask("connect")
    await client.drop()


async def test_one_process_alone_goes_on(tmp_path: Path) -> None:
    """A process that is killed and stays away costs its clients one way back, and nobody a refusal."""
    async with behind_nginx(tmp_path) as site, AsyncExitStack() as stack:
        player = await stack.enter_async_context(playing(KINDS[0], site.front.url))
        await player.subscribed(CHANNEL)
        await publish_all(lambda: [site.port], CHANNEL, 10, random.Random(4))
        await asyncio.to_thread(site.processes[0].kill)
        for _ in range(10):
            reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
            writer.write(head_of("GET", _path("publications"), {"Connection": "close"}))
            assert b" 200 " in await reader.readline()
            await vanish(writer)
        await publish_all(lambda: [site.port], CHANNEL, 10, random.Random(5))
        last = await ask(site.port, _path("publications"), body={"data": "last"})
        assert last.json["offset"] == 11  # The keys of the second ten were those of the first.
        assert [one["data"] for one in await player.publications(CHANNEL, 11)] == [*range(10), "last"]
