"""PROTOCOL 17.3 in a real browser: a plain ``EventSource`` resumes by itself, with no code."""

import asyncio
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from hopper import ask
from support import Client, Process, config, token

if TYPE_CHECKING:
    from playwright.async_api import Browser

LISTEN = """url => {
    window.seen = [];
    window.opened = window.put_off = 0;
    const events = new EventSource(url);
    events.onopen = () => { window.opened += 1; };
    events.onmessage = ({ data, lastEventId }) => {
        const { channel, data: payload } = JSON.parse(data);
        window.seen.push([channel, payload]);
        window.last = lastEventId;
    };
    events.addEventListener("disconnect", () => { window.put_off += 1; });
    events.addEventListener("reset", ({ data }) => window.seen.push(["reset", data]));
}"""


async def publish(server: Process, channel: str, data: int) -> None:
    """Publish by REST."""
    reply = await ask(server.port, f"/v1/channels/{quote(channel)}/publications", body={"data": data})
    assert reply.status == 201


async def test_a_browser_stays_away_if_it_is_told_to(browser: "Browser", tmp_path: Path) -> None:
    """Of two streams that are ended one is to come back, which the browser does, and with the other one it waits."""
    with Process(tmp_path, config()) as server:
        page = await browser.new_page()
        await page.goto(f"{server.http}/")
        for user, code in (("gone", 4500), ("back", 4400)):
            frame = await page.evaluate_handle("() => document.body.appendChild(document.createElement('iframe'))")
            window = await frame.as_element().content_frame()
            await window.evaluate(LISTEN, f"/v1/channels/chat:a/events?token={token({'sub': user})}")
            await window.wait_for_function("() => window.opened === 1")
            ended = {"user": user, "disconnect": {"code": code, "reason": "because"}}
            assert (await ask(server.port, "/api/disconnect", body=ended, headers={"X-API-Key": "api-key"})).json == {
                "result": {}
            }
        gone, back = page.frames[1:]
        await back.wait_for_function("() => window.opened === 2", timeout=60_000)
        assert await gone.evaluate("window.opened") == 1
        await page.close()


async def test_a_browser_that_was_put_off_comes_again(browser: "Browser", tmp_path: Path) -> None:
    """A stream that cannot begin for now, here since there are enough, begins by itself once it can."""
    with Process(tmp_path, config(client={"connection_limit": 1})) as server:
        occupant = await Client.connected(server.url)
        page = await browser.new_page()
        await page.goto(f"{server.http}/")
        await page.evaluate(LISTEN, "/v1/channels/chat:a/events")
        await page.wait_for_function("() => window.put_off >= 1")
        await publish(server, "chat:a", 1)
        await occupant.close()
        seen: list[list[Any]] = []
        async with asyncio.timeout(60):
            for number in itertools.count(2):
                await page.wait_for_function("() => window.opened > window.put_off", timeout=60_000)
                await publish(server, "chat:a", number)
                if seen := await page.evaluate("window.seen"):
                    break
        first, last = seen[0][1], seen[-1][1]
        assert first > 1
        assert seen == [["chat:a", number] for number in range(first, last + 1)]
        await page.close()


async def test_a_browser_resumes_by_itself(browser: "Browser", tmp_path: Path) -> None:
    """Two channels in one EventSource, the server killed twice: the page has each publication once, in order."""
    settings = config(sqlite={"path": str(tmp_path / "events.db")})
    with Process(tmp_path, settings) as server:
        page = await browser.new_page()
        await page.goto(f"{server.http}/")
        await page.evaluate(LISTEN, "/v1/events?channel=chat:a&channel=chat:b")
        await page.wait_for_function("() => window.opened === 1")
        for life in range(3):
            for number in range(5):
                await publish(server, "chat:a", 10 * life + number)
                await publish(server, "chat:b", 10 * life + number)
            await page.wait_for_function(f"() => window.seen.length === {10 * (life + 1) + 2 * life}", timeout=60_000)
            if life == 2:
                break
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
            # The browser waits some seconds before it comes back; this is what it must not miss.
            await publish(server, "chat:a", 10 * life + 5)
            await publish(server, "chat:b", 10 * life + 5)
            await page.wait_for_function(f"() => window.opened === {life + 2}", timeout=60_000)
        seen = await page.evaluate("window.seen")
        wanted = [*range(6), *range(10, 16), *range(20, 25)]
        assert [data for channel, data in seen if channel == "chat:a"] == wanted
        assert [data for channel, data in seen if channel == "chat:b"] == wanted
        assert len(seen) == 2 * len(wanted)
        assert (await page.evaluate("window.last")).count(",") == 1
        await page.close()
