"""The transports without WebSocket in a real browser, from a page of another origin: EventSource, fetch and CORS.

PROTOCOL 2.2, 2.5, 2.6.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from conftest import ExpectedLog
from playwright.async_api import Browser, Page
from streams import settings
from support import Client, serving

EMPTY_PAGE = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 15\r\nConnection: close\r\n\r\n<!doctype html>"
)

TAKE = """() => {
window.said = [];
window.next = async (kind) => {
  for (;;) {
    const at = window.said.findIndex((message) => kind in message || kind in (message.push ?? {}));
    if (at >= 0) return window.said.splice(at, 1)[0];
    await new Promise((resolve) => { window.wake = resolve; });
  }
};
window.take = (message) => { window.said.push(message); window.wake?.(); };
window.read = async (response) => {
  let text = "";
  for await (const part of response.body.pipeThrough(new TextDecoderStream())) {
    text += part;
    const lines = text.split("\\n");
    text = lines.pop();
    for (const line of lines) window.take(JSON.parse(line));
  }
  window.take({ end: true });
};
}"""


@asynccontextmanager
async def elsewhere(browser: Browser) -> AsyncIterator[tuple[Page, str]]:
    """An empty page of another server, and its origin."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):  # a browser opens connections that it then has no use for
            await reader.readuntil(b"\r\n\r\n")
            writer.write(EMPTY_PAGE)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    origin = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    visitor = await browser.new_context()
    try:
        page = await visitor.new_page()
        await page.goto(origin)
        await page.evaluate(TAKE)
        yield page, origin
    finally:
        await visitor.close()
        server.close()
        await server.wait_closed()


async def test_an_event_source_one_way(browser: Browser) -> None:
    """A page without any library hears what is published, and is told the end, by a plain EventSource."""
    async with elsewhere(browser) as (page, origin), serving(settings(client={"allowed_origins": [origin]})) as site:
        request = json.dumps({"subs": {"chat:1": {}}})
        await page.evaluate(
            """([url, request]) => {
              window.events = new EventSource(`${url}?cf_connect=${encodeURIComponent(request)}`);
              window.events.onmessage = (event) => window.take(JSON.parse(event.data));
            }""",
            [f"http://127.0.0.1:{site.port}/connection/uni_sse", request],
        )
        assert (await page.evaluate("next('connect')"))["connect"]["subs"].keys() == {"chat:1"}
        speaker = await Client.connected(site.url)
        await speaker.ask("publish", channel="chat:1", data={"text": "zwölf\n\ndata: 🎈"})
        heard = await page.evaluate("next('pub')")
        assert heard["pub"]["data"] == {"text": "zwölf\n\ndata: 🎈"}
        await page.evaluate("events.close()")
        while len(site.node.sessions) > 1:
            await speaker.ask("presence_stats", channel="live:1")
        await speaker.close()


async def test_fetch_both_ways(browser: Browser) -> None:
    """A page of another origin reads the stream and posts its commands, asking first whether it may."""
    async with elsewhere(browser) as (page, origin), serving(settings(client={"allowed_origins": [origin]})) as site:
        base = f"http://127.0.0.1:{site.port}"
        await page.evaluate(
            """([base, body]) => {
              const headers = { "Content-Type": "application/json" };
              const options = { method: "POST", headers, credentials: "include" };
              window.post = (path, body) => fetch(base + path, { ...options, body });
              post("/connection/http_stream", body).then(window.read);
            }""",
            [base, '{"id":1,"connect":{}}'],
        )
        hello = (await page.evaluate("next('connect')"))["connect"]
        data = '{"id":2,"subscribe":{"channel":"chat:1"}}\n{"id":3,"publish":{"channel":"chat:1","data":[1]}}'
        envelope = json.dumps({"session": hello["session"], "node": hello["node"], "data": data})
        assert await page.evaluate("body => post('/emulation', body).then(({ status }) => status)", envelope) == 204
        await page.evaluate("next('subscribe')")
        assert (await page.evaluate("next('pub')"))["push"]["pub"]["data"] == [1]
        (session,) = site.node.sessions.values()
        session.unsubscribe_by_order("")
        assert (await page.evaluate("next('unsubscribe')"))["push"]["unsubscribe"]["code"] == 2000


@pytest.mark.parametrize("path", ["/connection/http_stream", "/connection/uni_http_stream", "/emulation"])
async def test_other_pages_may_not(browser: Browser, path: str, log: ExpectedLog) -> None:
    """A page that is not listed can neither read nor write, and costs no connection."""
    log.expect("connection.refused")
    async with elsewhere(browser) as (page, _), serving(settings(client={"allowed_origins": ["https://a.b"]})) as site:
        failed = await page.evaluate(
            """([url, type]) => fetch(url, { method: "POST", headers: { "Content-Type": type }, body: "{}" })
              .then(() => "read", (error) => error.name)""",
            [f"http://127.0.0.1:{site.port}{path}", "application/json"],
        )
        assert failed == "TypeError"
        simple = await page.evaluate(
            """([url]) => fetch(url, { method: "POST", body: "{}" }).then(() => "read", (error) => error.name)""",
            [f"http://127.0.0.1:{site.port}{path}"],
        )
        assert simple == "TypeError"
        assert not site.node.connections
