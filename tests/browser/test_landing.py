"""The landing page in a real browser: within seconds one knows that it works, for how many, and what to do next."""

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from playwright.async_api import Browser, Page, expect
from support import ROOT, Client, Process, config

PATIENCE_MS = 15_000
AXE = ROOT / "tests" / "sdk" / "node_modules" / "axe-core" / "axe.min.js"
VIOLATIONS = "() => axe.run().then(({ violations }) => violations.map(({ id, nodes }) => [id, nodes[0].html]))"
UNREACHABLE = re.compile(r"^Failed to load resource: net::ERR_")
SIZES = [(360, 740), (768, 1024), (1280, 800)]
SCHEMES: list[Literal["light", "dark"]] = ["light", "dark"]


@asynccontextmanager
async def landing(browser: Browser, url: str, **context: Any) -> AsyncIterator[tuple[Page, list[str]]]:
    """The page, open, and what its console says; a complaint other than of an unreachable server fails the test."""
    visitor = await browser.new_context(locale="en-GB", **context)
    page = await visitor.new_page()
    said: list[str] = []
    faults: list[str] = []
    page.on("console", lambda message: (faults if message.type == "error" else said).append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    try:
        await page.goto(url)
        yield page, said
        assert [fault for fault in faults if not UNREACHABLE.match(fault)] == []
    finally:
        await visitor.close()


async def test_count_follows_who_is_connected(browser: Browser, tmp_path: Path) -> None:
    """The count is that of the server's clients, and changes by itself as they come and go."""
    with Process(tmp_path) as process:
        async with landing(browser, process.http) as (page, _):
            await expect(page.locator("#state")).to_have_text("It works")
            await expect(page.locator("#mode")).to_contain_text("open for trying out")
            await expect(page.locator("#connections")).to_have_text("0")
            clients = [await Client.connected(process.url) for _ in range(3)]
            await clients[0].ask("subscribe", channel="chat:lobby")
            await expect(page.locator("#connections")).to_have_text("3", timeout=PATIENCE_MS)
            await expect(page.locator("#channels")).to_have_text("1", timeout=PATIENCE_MS)
            for client in clients:
                await client.close()
            await expect(page.locator("#connections")).to_have_text("0", timeout=PATIENCE_MS)


async def test_a_server_that_is_gone_is_told_and_so_is_its_return(browser: Browser, tmp_path: Path) -> None:
    """Nothing old is shown as if it were true; when the server is back, the page finds out."""
    with Process(tmp_path) as process:
        async with landing(browser, process.http) as (page, _):
            await expect(page.locator("#state")).to_have_text("It works")
            process.kill()
            await expect(page.locator("#state")).to_have_text("The server does not answer", timeout=PATIENCE_MS)
            await expect(page.locator("#connections")).to_have_text("–")
            process.start()
            await expect(page.locator("#state")).to_have_text("It works", timeout=PATIENCE_MS)
            await expect(page.locator("#connections")).to_have_text("0")


async def test_configured_says_so(browser: Browser, tmp_path: Path) -> None:
    """Nobody is told that a configured server is open to all."""
    with Process(tmp_path, config()) as process:
        async with landing(browser, process.http) as (page, _):
            await expect(page.locator("#mode")).to_contain_text("configured")
            await expect(page.locator("#mode")).not_to_contain_text("open")


async def test_every_link_leads_somewhere(browser: Browser, tmp_path: Path) -> None:
    """Chat, arena, README, protocol and health are there, and the keyboard reaches each."""
    with Process(tmp_path) as process:
        async with landing(browser, process.http) as (page, _):
            targets = await page.eval_on_selector_all("a", "links => links.map(link => link.getAttribute('href'))")
            assert {"/chat", "/arena", "/docs/hooks.md", "/README.md", "/server/PROTOCOL.md", "/health/live"} <= set(
                targets
            )
            for target in targets:
                assert (await page.request.get(process.http + target)).status == 200, target
            reached = []
            for _ in range(len(targets) + 2):
                await page.keyboard.press("Tab")
                reached.append(await page.evaluate("document.activeElement.getAttribute('href')"))
            assert set(targets) <= set(reached)


async def test_the_example_works_as_it_stands(browser: Browser, tmp_path: Path) -> None:
    """What the page tells to paste into its console does what it says: it is heard, and it hears."""
    with Process(tmp_path) as process:
        async with landing(browser, process.http) as (page, said):
            listener = await Client.connected(process.url)
            await listener.ask("subscribe", channel="chat:lobby")
            example = await page.text_content("#example")
            async with page.expect_console_message(timeout=PATIENCE_MS):
                await page.evaluate(f"(async () => {{ {example} }})()")
            assert (await listener.push("pub", "chat:lobby"))["data"] == {"name": "Console", "text": "hello"}
            assert len(said) == 1
            await listener.close()


async def test_accessible_and_nothing_sticks_out(browser: Browser, tmp_path: Path) -> None:
    """axe finds nothing in light and dark, and no size needs sideways scrolling."""
    with Process(tmp_path) as process:
        for width, height in SIZES:
            for scheme in SCHEMES:
                viewport = {"width": width, "height": height}
                async with landing(browser, process.http, viewport=viewport, color_scheme=scheme) as (page, _):
                    await expect(page.locator("#state")).to_have_text("It works")
                    await page.evaluate(AXE.read_text())
                    assert json.dumps(await page.evaluate(VIOLATIONS)) == "[]", (width, scheme)
                    assert await page.evaluate("document.documentElement.scrollWidth") <= width
