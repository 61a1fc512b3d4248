"""``/connection/sse``: the protocol as an event stream; PROTOCOL 2.5.

What all streams share is in ``test_http_stream``.
"""

from urllib.parse import quote

import pytest
from streams import CONNECT, Stream, ask, batch, say, settings, sse
from support import serving
from test_http_stream import HEADERS, pass_ping, session_of

from server.errors import SHUTDOWN


async def test_connect_in_the_query() -> None:
    """PROTOCOL 2.5: the first commands are the query's cf_connect; the stream begins with an empty line."""
    async with serving(settings()) as site:
        async with sse(site.port, CONNECT) as stream:
            assert (stream.status, stream.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
            assert HEADERS.items() <= stream.headers.items()
            assert await anext(stream) == b"\r\n"
            event = await stream.text(b"\n\n")
            assert event is not None
            assert event.startswith(b'data: {"id":1,"connect":{"client":')
            assert b"\n" not in event
            (client,) = site.node.sessions
            assert session_of(site, client).request.transport == "sse"


async def test_a_batch_in_the_query() -> None:
    """PROTOCOL 2.5: several commands, a line each, are carried out in turn."""
    async with serving(settings()) as site:
        subscribe = {"id": 2, "subscribe": {"channel": "chat:zwölf"}}
        async with sse(site.port, CONNECT, subscribe, {"id": 3, "presence_stats": {"channel": "chat:1"}}) as stream:
            await stream.expect("connect")
            await stream.expect("error")  # names are ASCII; the query is UTF-8 all the same
            await stream.expect("presence_stats")


async def test_a_post() -> None:
    """PROTOCOL 2.5: the commands may come in the body, for tokens that are too long for a URL."""
    async with serving(settings()) as site:
        async with Stream.request(site.port, "POST", "/connection/sse", batch(CONNECT)) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            await stream.expect("connect")


async def test_a_whole_conversation() -> None:
    """Commands go by /emulation; replies, pushes and pings come as events, and the last one says why it ends."""
    async with serving(settings()) as site:
        async with sse(site.port, CONNECT) as stream:
            hello = await stream.expect("connect")
            await say(site.port, hello, {"id": 2, "subscribe": {"channel": "chat:1"}})
            await stream.expect("subscribe")
            await say(site.port, hello, {"id": 3, "publish": {"channel": "chat:1", "data": "a\n\ndata: b"}})
            assert (await stream.expect("pub"))["data"] == "a\n\ndata: b"
            await stream.expect("publish")
            pass_ping(site, session_of(site, hello["client"]))
            assert await stream.message() == {}
            await say(site.port, hello, {})
            site.pass_time(9)
            session_of(site, hello["client"]).disconnect(SHUTDOWN)
            assert await stream.ended(3001) == "shutdown"
            assert stream.whole


async def test_payloads_with_newlines() -> None:
    """PROTOCOL 2.3: a payload that was written over several lines arrives as one event, with the same value."""
    async with serving(settings()) as site:
        async with sse(site.port, CONNECT, {"id": 2, "subscribe": {"channel": "live:1"}}) as stream:
            await stream.expect("connect")
            await stream.expect("subscribe")
            answer = await ask(
                site.port,
                "POST",
                "/api/publish",
                b'{"channel":"live:1","data":{\n"a":\r\n[1,\r2]\n}}',
                {"X-API-Key": "api-key", "Content-Type": "application/json"},
            )
            assert answer.body == b'{"result":{}}'
            assert (await stream.expect("pub"))["data"] == {"a": [1, 2]}


async def test_http_1_0() -> None:
    """A client of HTTP/1.0 gets the same events without chunks."""
    async with serving(settings()) as site:
        async with sse(site.port, CONNECT, version="1.0") as stream:
            assert "transfer-encoding" not in stream.headers
            hello = await stream.expect("connect")
            session_of(site, hello["client"]).disconnect(SHUTDOWN)
            await stream.ended(3001)


@pytest.mark.parametrize("query", ["", "?", "?cf_connec=1", "?cf_connect"])
async def test_no_commands(query: str) -> None:
    """PROTOCOL 2.5: without cf_connect it is 400, and no session is made."""
    async with serving(settings()) as site:
        answer = await ask(site.port, "GET", f"/connection/sse{query}")
        assert answer.status == 400
        assert "cf_connect" in answer.error
        assert not site.node.connections


@pytest.mark.parametrize("text", ["x", "{}", "[]", '{"id":1}', "\n", "\x00", "[" * 5_000, '{"id":1,"connect":1}'])
async def test_commands_that_are_none(text: str) -> None:
    """PROTOCOL 3.4: what is no connect is told 3501 in the stream."""
    async with serving(settings()) as site:
        async with Stream.request(site.port, "GET", f"/connection/sse?cf_connect={quote(text)}") as stream:
            await stream.ended(3501)


async def test_bytes_that_are_no_text() -> None:
    """A query that is no UTF-8 is 3501 as well, and no fault."""
    async with serving(settings()) as site:
        async with Stream.request(site.port, "GET", "/connection/sse?cf_connect=%ff%fe") as stream:
            await stream.ended(3501)
