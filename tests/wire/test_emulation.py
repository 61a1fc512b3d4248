"""``/emulation``: what the clients of http_stream and sse say; PROTOCOL 2.5."""

import asyncio
import json
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from streams import CONNECT, Stream, ask, batch, drop, emulated, head, http_stream, say, settings, sse
from support import PATIENCE_S, Client, Site, serving
from test_http_stream import session_of

from handlers.emulation import LOOK_S, LOOKS
from server.app import App
from server.app import Client as AppClient
from server.broker.memory import Bus, MemoryBroker

FORMATS = pytest.mark.parametrize("format", ["json", "protobuf"])


def stats(id: int) -> dict[str, Any]:
    """A command that is answered at once."""
    return {"id": id, "presence_stats": {"channel": "live:1"}}


async def ids(stream: Stream, count: int) -> list[int]:
    """The ids of the next replies."""
    found = []
    for _ in range(count):
        message = await stream.message()
        assert message is not None
        found.append(message["id"])
    return found


# --- taking -------------------------------------------------------------------------
@FORMATS
async def test_taken(format: str) -> None:
    """PROTOCOL 2.5: a batch in the format of the stream is 204, with nothing in it, and is carried out."""
    async with serving(settings()) as site, http_stream(site.port, CONNECT, format=format) as stream:
        hello = await stream.expect("connect")
        await say(site.port, hello, stats(2), stats(3), format=format)
        assert await ids(stream, 2) == [2, 3]


async def test_either_envelope() -> None:
    """PROTOCOL 2.5: the envelope's format is the request's, what is in it the stream's."""
    async with serving(settings()) as site:
        for stream_format, envelope in (("json", "protobuf"), ("json", "json")):
            async with http_stream(site.port, CONNECT, format=stream_format) as stream:
                hello = await stream.expect("connect")
                body, headers = emulated(hello["session"], hello["node"], batch(stats(2)), envelope)
                assert (await ask(site.port, "POST", "/emulation", body, headers)).status == 204
                assert await ids(stream, 1) == [2]


@asynccontextmanager
async def two_processes(**sections: Any) -> AsyncIterator[tuple[Site, Site]]:
    """Two nodes in this process, each on a port, that hear of each other."""
    bus = Bus()
    async with (
        serving(settings(**sections), broker=MemoryBroker(bus)) as one,
        serving(settings(**sections), broker=MemoryBroker(bus)) as other,
    ):
        for site in (one, other, one, other):
            site.pass_time(1)
            await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE_S):
            while one.node.id not in other.node.peers.all or other.node.id not in one.node.peers.all:
                await ask(one.port, "GET", "/health/live")
        yield one, other


@FORMATS
async def test_any_process_takes_it(format: str) -> None:
    """PROTOCOL 2.5: a post that comes to another process reaches the one that holds the stream."""
    async with two_processes() as (one, other):
        async with http_stream(one.port, CONNECT, format=format) as stream:
            hello = await stream.expect("connect")
            for number in range(2, 22, 2):
                await say(other.port, hello, stats(number), format=format)
                await say(one.port, hello, stats(number + 1), format=format)
            assert await ids(stream, 20) == list(range(2, 22))
            assert not other.node.streams
            stranger = {"session": "nobody", "node": hello["node"]}
            await say(other.port, stranger, stats(30), format=format)


async def test_a_process_that_has_ended() -> None:
    """PROTOCOL 2.5: the node of a stream that has ended with it is unknown, 404, so that the client comes back."""
    async with two_processes() as (one, other):
        gone = {"session": "x", "node": other.node.id}
        await say(one.port, gone, stats(2))
        other.node.peers.close()
        await asyncio.sleep(0)
        body, headers = emulated("x", other.node.id, batch(stats(2)))
        async with asyncio.timeout(PATIENCE_S):
            while (await ask(one.port, "POST", "/emulation", body, headers)).status != 404:
                pass


# --- order --------------------------------------------------------------------------
async def test_posts_that_overtook_one_another() -> None:
    """PROTOCOL 2.5: commands are carried out in the order of their ids, not of their arrival."""
    async with serving(settings()) as site, http_stream(site.port, CONNECT) as stream:
        hello = await stream.expect("connect")
        for number in (4, 3, 6, 2, 5):
            site.node.ordering.hand_over(hello["session"], batch(stats(number)))
        assert await ids(stream, 5) == [2, 3, 4, 5, 6]


async def test_two_hundred_at_once() -> None:
    """As many posts as a page can begin at once are each carried out once, in whatever order they make it here."""
    async with serving(settings()) as site, sse(site.port, CONNECT) as stream:
        hello = await stream.expect("connect")
        posts = [say(site.port, hello, stats(number)) for number in range(2, 202)]
        await asyncio.gather(*posts)
        assert sorted(await ids(stream, 200)) == list(range(2, 202))


async def test_a_post_that_never_comes() -> None:
    """PROTOCOL 2.5: an id that is missing is waited for, then passed over; should it come later it is carried out."""
    async with serving(settings()) as site, http_stream(site.port, CONNECT) as stream:
        hello = await stream.expect("connect")
        loop = asyncio.get_running_loop()
        began = loop.time()
        await say(site.port, hello, stats(4))
        assert await ids(stream, 1) == [4]
        assert loop.time() - began >= LOOKS * LOOK_S
        for number in (3, 2, 5):
            await say(site.port, hello, stats(number))
            assert await ids(stream, 1) == [number]


async def test_the_first_id_is_that_of_connect() -> None:
    """SDKs count for the life of a client: the next id follows that of connect, and nothing is waited for."""
    async with serving(settings()) as site, http_stream(site.port, {"id": 70, "connect": {}}, stats(71)) as stream:
        hello = await stream.expect("connect")
        assert await ids(stream, 1) == [71]
        site.node.ordering.hand_over(hello["session"], batch(stats(73)))
        site.node.ordering.hand_over(hello["session"], batch(stats(72)))
        assert await ids(stream, 2) == [72, 73]


async def test_a_pong_does_not_wait() -> None:
    """PROTOCOL 2.4: a pong counts when it comes, whatever is missing."""
    async with serving(settings()) as site, http_stream(site.port, CONNECT) as stream:
        hello = await stream.expect("connect")
        session = session_of(site, hello["client"])
        due = session.next_ping
        while session.next_ping == due:
            site.pass_time(1)
        assert await stream.message() == {}
        site.node.ordering.hand_over(hello["session"], batch(stats(3)))
        site.node.ordering.hand_over(hello["session"], batch({}))
        site.pass_time(9)
        assert not session.closed


# --- a session that is busy -----------------------------------------------------------
@asynccontextmanager
async def busy(site: Site) -> AsyncIterator[asyncio.Event]:
    """A server whose RPC method "wait" is answered when the event is set."""
    app = App()
    over = asyncio.Event()

    @app.rpc("wait")
    async def wait(client: AppClient, data: Any) -> str:
        await over.wait()
        return "over"

    app.attach(site.node)
    yield over
    over.set()
    await app.stop()


@FORMATS
async def test_a_busy_session_is_waited_for(format: str) -> None:
    """PROTOCOL 3.4: what comes behind a slow command waits, outside the session as well; all is answered, in order."""
    async with serving(settings(app={"timeout": "60s"})) as site, busy(site) as over:
        async with http_stream(site.port, CONNECT, format=format) as stream:
            hello = await stream.expect("connect")
            site.node.ordering.hand_over(hello["session"], batch({"id": 2, "rpc": {"method": "wait"}}, format=format))
            for number in range(502, 2, -1):
                site.node.ordering.hand_over(hello["session"], batch(stats(number), format=format))
            await say(site.port, hello, stats(503), stats(504), format=format)
            over.set()
            assert await ids(stream, 503) == list(range(2, 505))


async def test_a_flood_behind_a_busy_session() -> None:
    """PROTOCOL 18: what waits is bounded; who says more than that is told 3013, and nobody else notices."""
    async with serving(settings(app={"timeout": "60s"}, client={"queue_max_size": 100_000})) as site, busy(site):
        neighbour = await Client.connected(site.url)
        async with sse(site.port, CONNECT) as stream:
            hello = await stream.expect("connect")
            site.node.ordering.hand_over(hello["session"], batch({"id": 2, "rpc": {"method": "wait"}}))
            number = 3
            while hello["client"] in site.node.sessions:
                site.node.ordering.hand_over(hello["session"], batch(stats(number)))
                number += 1
                assert number < 1_000
            await stream.ended(3013)
        assert await neighbour.ask("presence_stats", channel="live:1") == {"num_clients": 0, "num_users": 0}
        await neighbour.close()


async def test_a_flood_behind_a_missing_id() -> None:
    """The same holds for what waits for its turn."""
    async with serving(settings(client={"queue_max_size": 100_000})) as site, sse(site.port, CONNECT) as stream:
        hello = await stream.expect("connect")
        for number in range(3, 1_000):
            site.node.ordering.hand_over(hello["session"], batch(stats(number)))
        await stream.ended(3013)
        assert not site.node.streams


# --- bad input --------------------------------------------------------------------------
@pytest.mark.parametrize("data", ["x", "[]", "\n", '{"id":2}', '{"id":2,"connect":{}}', '{"id":-1}', "{}"])
async def test_commands_that_are_none(data: str) -> None:
    """PROTOCOL 3.4: what is no command ends the session with 3501, said in its stream; the post itself was taken."""
    async with serving(settings()) as site, http_stream(site.port, CONNECT) as stream:
        hello = await stream.expect("connect")
        body, headers = emulated(hello["session"], hello["node"], data.encode())
        assert (await ask(site.port, "POST", "/emulation", body, headers)).status == 204
        await stream.ended(3501)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"x",
        b"[]",
        b"null",
        b"{}",
        b"\xff",
        b"[" * 30_000,
        b'{"session":"a","node":"b"}',
        b'{"session":"a","data":"{}"}',
        b'{"node":"b","data":"{}"}',
        b'{"session":"","node":"b","data":"{}"}',
        b'{"session":"a","node":"","data":"{}"}',
        b'{"session":"a","node":"b","data":""}',
        b'{"session":1,"node":"b","data":"{}"}',
        b'{"session":"a","node":[],"data":"{}"}',
        b'{"session":"a","node":"b","data":{}}',
        b'{"session":"a","node":"b","data":null}',
        b'{"session":"a","node":"b","data":"\\ud800"}',
    ],
)
async def test_envelopes_that_are_none(body: bytes) -> None:
    """PROTOCOL 2.5: what does not say session, node and data is 400, with the reason."""
    async with serving(settings()) as site:
        answer = await ask(site.port, "POST", "/emulation", body)
        assert answer.status == 400
        assert "session" in answer.error
        answer = await ask(site.port, "POST", "/emulation", body, {"Content-Type": "application/octet-stream"})
        assert answer.status == 400


async def test_nobody_there() -> None:
    """PROTOCOL 2.5: an unknown node is 404; an unknown session of a known node is not told from a known one."""
    async with serving(settings()) as site, http_stream(site.port, CONNECT) as stream:
        hello = await stream.expect("connect")
        for session, node, status in (
            (hello["session"], "nobody", 404),
            (hello["session"], hello["node"].upper(), 404),
            ("nobody", hello["node"], 204),
            (hello["session"][:-1], hello["node"], 204),
            (hello["client"], hello["node"], 204),
            ("x" * 50_000, hello["node"], 204),
        ):
            body, headers = emulated(session, node, batch(stats(2)))
            answer = await ask(site.port, "POST", "/emulation", body, headers)
            assert answer.status == status
        await say(site.port, hello, stats(3))
        assert await ids(stream, 1) == [3], "nobody spoke for it"


async def test_thousands_of_posts_to_nobody() -> None:
    """Posts to sessions and nodes that do not exist leave nothing behind, and others are served meanwhile."""
    async with serving(settings()) as site:
        neighbour = await Client.connected(site.url)
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)

        async def post(number: int) -> int:
            node = site.node.id if number % 2 else f"node {number}"
            body = json.dumps({"session": f"session {number}", "node": node, "data": "{}"}).encode()
            writer.write(head("POST", "/emulation", {"Content-Length": str(len(body))}) + body)
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
            for line in lines:
                if line.lower().startswith(b"content-length: "):
                    await reader.readexactly(int(line.split(b" ")[1]))
            return int(first.split(b" ")[1])

        async with asyncio.timeout(60):
            for number in range(200):
                await post(number)
            tracemalloc.start()
            try:
                for number in range(200, 3_200):
                    assert await post(number) == (204 if number % 2 else 404)
                    if number % 100 == 0:
                        await neighbour.ask("presence_stats", channel="live:1")
                held, _ = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
        assert held < 500_000
        assert not site.node.streams
        await drop(writer)
        await neighbour.close()
