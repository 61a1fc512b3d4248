"""The console in a real browser: what an operator sees and does there, on a desk and on a phone, in light and dark."""

import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from conftest import ExpectedLog
from playwright.async_api import Browser, Page, expect
from support import KEPT, OPEN, ROOT, Client, Process, Site, config, serving, settings, token

from server.blocks import Block, Record, adding

PATIENCE_MS = 15_000
AXE = ROOT / "tests" / "sdk" / "node_modules" / "axe-core" / "axe.min.js"
VIOLATIONS = "() => axe.run().then(({ violations }) => violations.map(({ id, nodes }) => [id, nodes[0].html]))"
EXPECTED = re.compile(r"^Failed to load resource: (the server responded with a status of 40[13]|net::ERR_)")
SIZES = [(360, 740), (1280, 800)]
SCHEMES: list[Literal["light", "dark"]] = ["light", "dark"]
USER = "a" * 80
VIEWS = ["overview", "channels", "channel/chat%3Alobby", "users", f"user/{USER}", "settings"]
ADMIN = {"enabled": True, "password": "open sesame"}


@asynccontextmanager
async def visit(browser: Browser, url: str, **context: Any) -> AsyncIterator[Page]:
    """A page of a visitor of its own; a complaint in its console other than of a refusal fails the test."""
    visitor = await browser.new_context(locale="en-GB", **context)
    page = await visitor.new_page()
    page.set_default_timeout(PATIENCE_MS)
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    try:
        await page.goto(url)
        yield page
        assert [fault for fault in faults if not EXPECTED.match(fault)] == []
    finally:
        await visitor.close()


async def log_in(page: Page) -> None:
    """Give the password."""
    await page.fill("#password", "open sesame")
    await page.press("#password", "Enter")
    await expect(page.locator("#state")).to_have_text("All is well", timeout=PATIENCE_MS)


async def go(page: Page, view: str) -> None:
    """Open a view, as a link to it would."""
    await page.evaluate(f"location.hash = '#{view}'")


@asynccontextmanager
async def console(browser: Browser, **sections: Any) -> AsyncIterator[tuple[Site, Page]]:
    """A server in this process, and its console, inside."""
    spaces = [{"name": "chat", **KEPT, "presence": True}, {"name": "live", **OPEN, "presence": True}]
    async with serving(settings(admin=ADMIN, channel={"namespaces": spaces}, **sections)) as site:
        async with visit(browser, f"http://127.0.0.1:{site.port}/admin") as page:
            await log_in(page)
            yield site, page


def shown(page: Page, selector: str, text: str | re.Pattern[str]) -> Any:
    """Wait until an element says so."""
    return expect(page.locator(selector)).to_have_text(text, timeout=PATIENCE_MS)


# --- coming in ---------------------------------------------------------------------------
async def test_a_password_and_nothing_else(browser: Browser, tmp_path: Path) -> None:
    """Without it one sees a login and nothing of the server; a reload stays inside, logging out does not."""
    with Process(tmp_path, config(admin=ADMIN)) as process:
        async with visit(browser, process.http + "/admin") as page:
            await expect(page.locator("#login")).to_be_visible()
            await expect(page.locator("#nav")).to_be_hidden()
            await page.fill("#password", "ouvre-toi")
            await page.press("#password", "Enter")
            await shown(page, "#nay", "wrong password")
            await log_in(page)
            await expect(page.locator("#overview")).to_be_visible()
            await expect(page.locator("#login")).to_be_hidden()
            await page.reload()
            await shown(page, "#state", "All is well")
            await page.click("#leave")
            await expect(page.locator("#login")).to_be_visible()
            await page.reload()
            await expect(page.locator("#login")).to_be_visible()
            assert await page.evaluate("sessionStorage.length + localStorage.length + document.cookie.length") == 0


async def test_the_link_that_the_server_prints(browser: Browser, tmp_path: Path) -> None:
    """Where nothing is configured the link opens the console, and the pass is gone from the address at once."""
    with Process(tmp_path) as process:
        assert process.popen is not None
        assert process.popen.stdout is not None
        line = process.popen.stdout.readline()
        assert line.startswith(f"Its console is at {process.http}/admin#pass=")
        async with visit(browser, line.split()[-1]) as page:
            await shown(page, "#state", "All is well")
            assert page.url == f"{process.http}/admin"


async def test_a_pass_that_has_run_out_leads_to_the_login(browser: Browser, log: ExpectedLog) -> None:
    """When the pass is good no longer the page says so by itself, and shows nothing that was true before."""
    log.expect("admin.refused")
    async with serving(settings(admin=ADMIN)) as site, visit(browser, f"http://127.0.0.1:{site.port}/admin") as page:
        await log_in(page)
        site.clock.ahead_s += 13 * 3600
        await expect(page.locator("#login")).to_be_visible(timeout=PATIENCE_MS)
        await expect(page.locator("#overview")).to_be_hidden()


# --- what it shows -------------------------------------------------------------------------
async def test_overview_is_live(browser: Browser) -> None:
    """Clients, rates, processes and ends are shown, and follow what happens; there is a line for each graph."""
    async with console(browser) as (site, page):
        site.clock.run()
        await shown(page, "#graph-clients", "0")
        clients = [await Client.connected(site.url, token=token({"sub": f"user {n}"})) for n in range(3)]
        for client in clients:
            await client.ask("subscribe", channel="live:room")
        await shown(page, "#graph-clients", "3")
        await shown(page, "#graph-subscriptions", "3")
        for _ in range(3):
            await clients[0].ask("publish", channel="live:room", data={})
        await expect(page.locator("#graph-out")).not_to_have_text("0", timeout=PATIENCE_MS)
        await expect(page.locator("#nodes tr")).to_have_count(1)
        await expect(page.locator("#nodes tr")).to_contain_text("test")
        assert all(
            await page.eval_on_selector_all("#graphs path", "paths => paths.map(path => path.getAttribute('d'))")
        )
        await clients[0].close()
        await expect(page.locator("#disconnects")).to_contain_text("client left", timeout=PATIENCE_MS)
        for client in clients[1:]:
            await client.close()


async def test_what_is_in_trouble_is_said(browser: Browser) -> None:
    """A part that cannot be used stands at the top of the page, with the reason, and goes when it is well again."""
    async with console(browser) as (site, page):
        site.node.parts.troubles["history"] = "the disk is full"
        await shown(page, "#state", "Not ready")
        await expect(page.locator("#troubles")).to_contain_text("the disk is full")
        site.node.parts.troubles.clear()
        await shown(page, "#state", "All is well")
        await expect(page.locator("#troubles")).to_be_hidden()


async def test_channels_by_size_and_by_pattern(browser: Browser) -> None:
    """Channels are listed with their subscribers, the largest first; a pattern picks some, a name opens one."""
    async with console(browser) as (site, page):
        clients = [await Client.connected(site.url) for _ in range(2)]
        for client in clients:
            await client.ask("subscribe", channel="live:large")
        await clients[0].ask("subscribe", channel="chat:small")
        await page.click("#nav >> text=Channels")
        await expect(page.locator("#list li")).to_have_text(["live:large2", "chat:small1"], timeout=PATIENCE_MS)
        await page.fill("#pattern", "chat:*")
        await page.press("#pattern", "Enter")
        await expect(page.locator("#list li")).to_have_text(["chat:small1"], timeout=PATIENCE_MS)
        await page.fill("#pattern", "chat:<b>nobody</b>/here?")
        await page.click("#open")
        await shown(page, "#channel-title", "chat:<b>nobody</b>/here?")
        await shown(page, "#kind", "kept: 0 so far")
        for client in clients:
            await client.close()


async def test_history_in_pages(browser: Browser) -> None:
    """The newest publications come first, older ones page by page until the first; what they hold is only text."""
    async with console(browser) as (site, page):
        client = await Client.connected(site.url, token=token({"sub": "ann"}))
        await client.ask("publish", channel="chat:a", data={"text": "<img src=x onerror=alert(1)>"})
        for number in range(2, 46):
            await client.ask("publish", channel="chat:a", data=number)
        await go(page, "channel/chat%3Aa")
        numbers = page.locator("#publications .head b")
        await expect(numbers).to_have_count(20, timeout=PATIENCE_MS)
        for count in (40, 45):
            await page.click("#older")
            await expect(numbers).to_have_count(count, timeout=PATIENCE_MS)
        assert await numbers.all_text_contents() == [str(number) for number in range(45, 0, -1)]
        await expect(page.locator("#older")).to_be_hidden()
        await expect(page.locator("#publications li").last).to_contain_text('{"text":"<img src=x onerror=alert(1)>"}')
        await expect(page.locator("#publications .head").first).to_contain_text("ann")
        await page.click("#newest")
        await expect(numbers).to_have_count(20)
        await client.close()


async def test_watching_a_kept_channel(browser: Browser) -> None:
    """New publications appear by themselves; of a flood the newest are shown, and how many were not."""
    async with console(browser) as (site, page):
        client = await Client.connected(site.url)
        await client.ask("publish", channel="chat:a", data="before")
        await go(page, "channel/chat%3Aa")
        await expect(page.locator("#publications li")).to_have_count(1, timeout=PATIENCE_MS)
        await page.click("#watch")
        await shown(page, "#pace", "Watching")
        await client.ask("publish", channel="chat:a", data="one")
        await expect(page.locator("#publications li").first).to_contain_text("one", timeout=PATIENCE_MS)
        await expect(page.locator("#publications li")).to_have_count(2)
        for number in range(100):
            await client.send(client.command("publish", channel="chat:a", data=number))
        offsets = page.locator("#publications .head b")
        await expect(offsets.first).to_have_text("102", timeout=PATIENCE_MS)
        numbers = [int(text) for text in await offsets.all_text_contents()]
        gaps = await page.locator("#publications .gap").all_text_contents()
        unseen = sum(int(gap.split()[0]) for gap in gaps)
        assert numbers == sorted(set(numbers), reverse=True)
        assert (numbers[0], len(numbers) + unseen) == (102, 102), "what is not shown is counted"
        assert len(site.node.hub.feeds) == 0, "it reads, and follows nothing"
        await page.click("#watch")
        await expect(page.locator("#watch")).to_have_attribute("aria-pressed", "false")
        await client.close()


async def test_watching_a_passing_channel(browser: Browser) -> None:
    """What only passes is seen as it comes, by nobody's leave but the pass; and no longer once one looks elsewhere."""
    async with console(browser) as (site, page):
        client = await Client.connected(site.url)
        await go(page, "channel/live%3Aa")
        await expect(page.locator("#kind")).to_contain_text("passing", timeout=PATIENCE_MS)
        await page.click("#watch")
        async with page.expect_response(re.compile("/admin/sample$")):
            pass
        await client.ask("publish", channel="live:a", data={"x": 17})
        await expect(page.locator("#publications li").first).to_contain_text('{"x":17}', timeout=PATIENCE_MS)
        await go(page, "overview")
        await expect(page.locator("#channel")).to_be_hidden()
        await go(page, "channel/live%3Aa")
        await expect(page.locator("#publications li")).to_have_count(0)
        await client.close()


async def test_publish_and_disconnect(browser: Browser) -> None:
    """What is published reaches who is subscribed; who is here is listed, and can be disconnected after a question."""
    async with console(browser) as (site, page):
        ann = await Client.connected(site.url, token=token({"sub": "ann", "info": {"name": "Ann"}}))
        await ann.ask("subscribe", channel="chat:a")
        await go(page, "channel/chat%3Aa")
        await shown(page, "#here", "Who is here: 1, 1 user")
        await expect(page.locator("#members li")).to_contain_text('{"name":"Ann"}')
        await page.fill("#data", '{"text": ')
        await page.click("#say button")
        await expect(page.locator("#said")).to_contain_text("No JSON", timeout=PATIENCE_MS)
        await page.fill("#data", '{"text": "from the console"}')
        await page.fill("#key", "once")
        for _ in range(2):
            await page.click("#say button")
            await shown(page, "#said", "Published as 1.")
        assert (await ann.publications("chat:a", 1))[0]["data"] == {"text": "from the console"}
        await expect(page.locator("#publications li")).to_have_count(1)
        await page.click("#members button")
        await page.click("#sure button[value=no]")
        assert ann.close_code is None
        await page.click("#members button")
        await page.click("#sure button[value=yes]")
        assert (await ann.closed())[0] == 3503
        await page.click("#ask")
        await shown(page, "#here", "Who is here: 0, 0 users")


async def test_the_connections_of_a_user(browser: Browser) -> None:
    """Each is shown with what it is and where; one of them ends after a question, then all, and others stay."""
    async with console(browser) as (site, page):
        who = token({"sub": "ann/b"})
        one = await Client.connected(site.url, token=who, name="<b>app</b>", version="1.2")
        await one.ask("subscribe", channel="chat:a/b")
        site.clock.ahead_s += 2
        others = [await Client.connected(site.url, token=who, format="protobuf") for _ in range(2)]
        ben = await Client.connected(site.url, token=token({"sub": "ben"}))
        await go(page, "users")
        await page.fill("#user", "ann/b")
        await page.press("#user", "Enter")
        await shown(page, "#user-title", "ann/b")
        await shown(page, "#connections-title", "Connections: 3")
        cards = page.locator("#connections li")
        await expect(cards).to_have_count(3)
        await expect(cards.last).to_contain_text("websocket json · <b>app</b> 1.2")
        await expect(cards.last).to_contain_text("from 127.0.0.1 · at test")
        await expect(cards.last).to_contain_text("in chat:a/b")
        await expect(cards.last).to_contain_text(one.hello["client"])
        await expect(cards.first).to_contain_text("websocket protobuf")
        await expect(cards.first).to_contain_text("in no channel")
        await cards.last.get_by_role("button").click()
        await page.click("#sure button[value=no]")
        await cards.last.get_by_role("button").click()
        await expect(page.locator("#question")).to_have_text(f"Disconnect ann/b ({one.hello['client']})?")
        await page.click("#sure button[value=yes]")
        assert (await one.closed())[0] == 3503
        await shown(page, "#connections-title", "Connections: 2")
        await shown(page, "#done", "Disconnected.")
        assert [other.close_code for other in others] == [None, None]
        await page.click("#end-all")
        await page.click("#sure button[value=yes]")
        for other in others:
            assert (await other.closed())[0] == 3503
        await shown(page, "#connections-title", "Connections: 0")
        await expect(page.locator("#end-all")).to_be_disabled()
        back = await Client.connected(site.url, token=who)
        await back.ask("subscribe", channel="live:room")
        await page.click("#again")
        await shown(page, "#connections-title", "Connections: 1")
        await page.click("#end-subscriptions")
        await page.click("#sure button[value=yes]")
        assert (await back.push("unsubscribe", "live:room"))["code"] == 2000
        await expect(cards).to_contain_text("in no channel", timeout=PATIENCE_MS)
        assert ben.close_code is None
        for client in (back, ben):
            await client.close()


async def test_the_channels_of_a_connection(browser: Browser) -> None:
    """Some of many channels are named, and lead to the channel; the rest are counted."""
    async with console(browser) as (site, page):
        client = await Client.connected(site.url, token=token({"sub": "ann"}))
        for number in range(15):
            await client.ask("subscribe", channel=f"live:{number}")
        await go(page, "user/ann")
        await expect(page.locator("#connections a")).to_have_count(12, timeout=PATIENCE_MS)
        await expect(page.locator("#connections li")).to_contain_text("live:11 and 3 more")
        await page.click("#connections a >> nth=4")
        await shown(page, "#channel-title", "live:4")
        await client.close()


async def test_block_and_unblock(browser: Browser) -> None:
    """Who is blocked goes at once and is listed; a mute in a channel has its term; each is lifted by itself."""
    async with console(browser) as (site, page):
        ann = await Client.connected(site.url, token=token({"sub": "ann"}))
        await go(page, "users")
        await shown(page, "#blocked-nay", "Nobody.")
        await go(page, "user/ann")
        await shown(page, "#connections-title", "Connections: 1")
        await expect(page.locator("#blocks")).to_have_text("None.")
        await page.fill("#where", "chat:lobby")
        await page.check("#mute")
        await page.select_option("#term", "86400")
        await page.fill("#reason", "<i>shouts</i>")
        await page.click("#block button")
        await shown(page, "#question", "Keep ann from publishing in chat:lobby, for a day?")
        await page.click("#sure button[value=yes]")
        held = page.locator("#blocks .held")
        await expect(held).to_have_count(1, timeout=PATIENCE_MS)
        await expect(held).to_contain_text("Muted in chat:lobby until")
        await expect(held).to_contain_text("<i>shouts</i>")
        (block,) = site.node.blocking.held("ann")
        assert (block.channel, block.muted, block.reason) == ("chat:lobby", True, "<i>shouts</i>")
        assert 86_000 < block.expire_at - time.time() <= 86_400
        await expect(page.locator("#where")).to_have_value("")
        await expect(page.locator("#mute")).not_to_be_checked()
        assert ann.close_code is None, "a mute ends no connection"
        await page.click("#block button")
        await shown(page, "#question", "Keep ann out, for ever? All their connections end now.")
        await page.click("#sure button[value=yes]")
        assert (await ann.closed())[0] == 3503
        await expect(held).to_have_count(2, timeout=PATIENCE_MS)
        await shown(page, "#connections-title", "Connections: 0")
        await shown(page, "#done", "Blocked.")
        await go(page, "users")
        await expect(page.locator("#blocked li")).to_have_count(1, timeout=PATIENCE_MS)
        await expect(page.locator("#blocked li")).to_contain_text("Blocked everywhere")
        await page.click("#blocked a")
        await page.get_by_role("button", name="Unblock everywhere").click()
        await shown(page, "#question", "Let ann in again?")
        await page.click("#sure button[value=yes]")
        await expect(held).to_have_count(1, timeout=PATIENCE_MS)
        assert [block.channel for block in site.node.blocking.held("ann")] == ["chat:lobby"]
        await (await Client.connected(site.url, token=token({"sub": "ann"}))).close()
        await page.get_by_role("button", name="Unblock from publishing in chat:lobby").click()
        await page.click("#sure button[value=yes]")
        await expect(page.locator("#blocks")).to_have_text("None.", timeout=PATIENCE_MS)
        assert site.node.blocking.users == {}


async def test_what_cannot_be_done_to_a_user_is_said(browser: Browser) -> None:
    """A block of an unknown channel is refused in the server's words, and the form keeps what was written."""
    async with console(browser) as (site, page):
        await go(page, "user/ann")
        await shown(page, "#connections-title", "Connections: 0")
        await page.fill("#where", "nowhere:1")
        await page.click("#block button")
        await page.click("#sure button[value=yes]")
        await shown(page, "#done", "Not done: unknown channel")
        await expect(page.locator("#where")).to_have_value("nowhere:1")
        await go(page, "user/ben")
        await expect(page.locator("#where")).to_have_value("")
        assert site.node.blocking.users == {}


async def test_many_blocked_users_come_in_pages(browser: Browser) -> None:
    """A hundred users are listed, and the next ones when they are asked for."""
    async with console(browser) as (site, page):
        for number in range(105):
            site.node.blocking.take(Record(f"user {number:03}", number + 1, (Block(),)))
        await go(page, "users")
        users = page.locator("#blocked li")
        await expect(users).to_have_count(100, timeout=PATIENCE_MS)
        await page.click("#more-blocked")
        await expect(users).to_have_count(105, timeout=PATIENCE_MS)
        await expect(users.last).to_contain_text("user 104")
        await expect(page.locator("#more-blocked")).to_be_hidden()


async def test_settings_in_force(browser: Browser) -> None:
    """Every setting is there, without secrets; a word picks some, and so does whether it is set."""
    async with console(browser) as (_, page):
        await page.click("#nav >> text=Settings")
        values = page.locator("#values div")
        await expect(values.filter(has_text="admin.password")).to_contain_text('"***"', timeout=PATIENCE_MS)
        assert await values.count() > 150
        await page.fill("#word", "namespaces[chat].HISTORY")
        await expect(values).to_have_count(await values.count())
        assert {text.split('"')[0].rsplit(".", 1)[0] for text in await values.all_text_contents()} == {
            "channel.namespaces[chat]"
        }
        await page.fill("#word", "http_server.tls")
        await expect(values).to_have_count(3)
        await page.check("#changed")
        await expect(values).to_have_text(["none"])


async def test_the_server_goes_and_comes(browser: Browser, tmp_path: Path) -> None:
    """A server that does not answer is told; with a secret that is set, the pass is good again after a restart."""
    with Process(tmp_path, config(admin={**ADMIN, "secret": "signs passes"})) as process:
        async with visit(browser, process.http + "/admin") as page:
            await log_in(page)
            process.kill()
            await shown(page, "#state", "The server does not answer")
            process.start()
            await shown(page, "#state", "All is well")


async def test_accessible_and_nothing_sticks_out(browser: Browser) -> None:
    """axe finds nothing in any view, in light and dark, and no size needs sideways scrolling."""
    spaces = [{"name": "chat", **KEPT, "presence": True}]
    async with serving(settings(admin=ADMIN, channel={"namespaces": spaces})) as site:
        clients = [await Client.connected(site.url, token=token({"sub": USER}), name="app" * 20) for _ in range(2)]
        await site.node.block(USER, adding(Block("chat:" + "b" * 80, reason="long" * 60)))
        for client in clients:
            await client.ask("subscribe", channel="chat:lobby")
        await clients[0].ask("publish", channel="chat:lobby", data={"text": "long" * 500})
        for width, height in SIZES:
            for scheme in SCHEMES:
                viewport = {"width": width, "height": height}
                url = f"http://127.0.0.1:{site.port}/admin"
                async with visit(browser, url, viewport=viewport, color_scheme=scheme, bypass_csp=True) as page:
                    await page.evaluate(AXE.read_text())
                    for view in ["login", *VIEWS]:
                        if view == "login":
                            await expect(page.locator("#login")).to_be_visible()
                        else:
                            await go(page, view)
                            await expect(page.locator(f"#{view.split('/')[0]}")).to_be_visible(timeout=PATIENCE_MS)
                        if view.startswith("user/"):
                            await expect(page.locator("#connections li")).to_have_count(2, timeout=PATIENCE_MS)
                            await expect(page.locator("#blocks .held")).to_have_count(1, timeout=PATIENCE_MS)
                        assert json.dumps(await page.evaluate(VIOLATIONS)) == "[]", (width, scheme, view)
                        assert await page.evaluate("document.documentElement.scrollWidth") <= width, (scheme, view)
                        if view == "login":
                            await log_in(page)
        for client in clients:
            await client.close()
