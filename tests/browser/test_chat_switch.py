"""The chat's switch "How am I connected?": the same talk by WebSocket, SSE and polling, and from one to another.

P3 over transports: what is said around every change, kill and cut is there once, in
order, for everybody, and the page says honestly how it is connected.
"""

import asyncio
import itertools
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
from playwright.async_api import Browser, Page, WebSocketRoute, expect
from support import Client, Process, config
from test_chat import AWAY, AXE, CONTRAST, PATIENCE_MS, RETURN_MS, VIOLATIONS, WHERE, Tab, Visitors, kept, numbered

WAYS = {"websocket": "Live by WebSocket", "sse": "Live by SSE", "polling": "Live by polling"}
"""The choices, and what the page says of itself when it is connected so."""

CHANGES = list(itertools.permutations(WAYS, 2))

FAILED = re.compile("^(Failed to load resource: |WebSocket connection to '[^']*' failed: )")
"""What a browser says of a request that is refused or not answered; no page can keep it from that."""


@asynccontextmanager
async def switching(browser: Browser, url: str, *, outages: bool = False) -> AsyncIterator[Visitors]:
    """Visitors of ``url``; no console may have complained, but with ``outages`` of requests that failed."""
    visitors = Visitors(browser, url)
    try:
        yield visitors
        faults = [fault for tab in visitors.tabs for fault in tab.faults]
        assert not [fault for fault in faults if not (outages and FAILED.match(fault))]
    finally:
        for tab in visitors.tabs:
            await tab.page.context.close()


async def is_by(tab: Tab, way: str) -> None:
    """Wait until the page says that it is live on this way."""
    await expect(tab.page.locator("#state span[role=status]")).to_have_text(WAYS[way], timeout=RETURN_MS)


async def go_by(tab: Tab, way: str) -> None:
    """Choose a way, and wait until the page says that it is live there."""
    await choose(tab, way)
    await is_by(tab, way)


async def choose(tab: Tab, way: str) -> None:
    """Choose a way as a person does, whatever becomes of it."""
    await tab.page.check(f"#ways [value={way}]")


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A server with nothing configured, for tests that leave it alone and take a room each."""
    with Process(tmp_path_factory.mktemp("open")) as process:
        yield process


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(WAYS, 2)))
async def test_two_on_different_ways(browser: Browser, open_server: Process, one: str, other: str) -> None:
    """Two visitors who are connected differently talk as if they were not, and see one and the same room."""
    room = f"{one}-{other}"
    async with switching(browser, open_server.http) as visitors:
        ada, grace = await visitors.tab("Ada", room=room), await visitors.tab("Grace", room=room)
        await go_by(ada, one)
        await go_by(grace, other)
        for number in range(1, 4):
            await ada.say(f"from Ada {number}")
            await grace.shows(2 * number - 1)
            await grace.say(f"from Grace {number}")
            await ada.shows(2 * number)
        shown = await ada.messages()
        assert shown == await grace.messages() == await kept(open_server, room)
        assert [message["name"] for message in shown] == ["Ada", "Grace"] * 3
        assert await ada.page.locator("#messages .mine").count() == 3
        assert await grace.page.locator("#messages .mine").count() == 3


async def test_switching_in_the_middle_of_talk(browser: Browser, open_server: Process) -> None:
    """P3, P5: over every change of ways, with messages on their way, none is lost and none doubled."""
    async with switching(browser, open_server.http) as visitors:
        ada, grace = await visitors.tab("Ada", room="hop"), await visitors.tab("Grace", room="hop")
        of_ada, of_grace = numbered("from Ada", 4 * len(CHANGES)), numbered("from Grace", 4 * len(CHANGES))
        for turn, (before, after) in enumerate(CHANGES):
            await go_by(ada, before)
            for at in range(4 * turn, 4 * turn + 4):
                await grace.say(of_grace[at])
                await ada.say(of_ada[at])
                if at % 2:  # once with messages under way, once while the new way is made
                    await choose(ada, after)
                    await choose(grace, before)
            await is_by(ada, after)
        for tab in (ada, grace):
            await tab.shows(8 * len(CHANGES))
        shown = await ada.messages()
        assert await grace.messages() == shown
        assert await kept(open_server, "hop") == shown
        assert [message["text"] for message in shown if message["name"] == "Ada"] == of_ada
        assert [message["text"] for message in shown if message["name"] == "Grace"] == of_grace
        await expect(ada.page.locator("#notice")).to_be_hidden()


@pytest.mark.parametrize("way", WAYS)
async def test_a_server_killed_on_each_way(browser: Browser, tmp_path: Path, way: str) -> None:
    """P2, P3, P5: what is written around a kill -9 is there once, in order, also for who changes ways meanwhile."""
    with Process(tmp_path) as process:
        async with switching(browser, process.http, outages=True) as visitors:
            ada, grace = await visitors.tab("Ada"), await visitors.tab("Grace")
            await go_by(ada, way)
            of_ada, of_grace = numbered("from Ada", 12), numbered("from Grace", 6)
            await ada.say(*of_ada[:3])
            await grace.say(*of_grace[:3])
            await grace.shows(6)
            await ada.say(*of_ada[3:6])
            process.kill()
            await ada.say(*of_ada[6:9])
            await grace.say(*of_grace[3:])
            await expect(ada.page.locator("#state")).to_have_text(AWAY, timeout=PATIENCE_MS)
            await choose(grace, way)
            await expect(ada.page.locator("#unsent small").last).to_have_text("Waits for the connection")
            process.start()
            await ada.say(*of_ada[9:])
            for tab in (ada, grace):
                await is_by(tab, way)
                await tab.shows(18)
                await expect(tab.page.locator("#notice")).to_be_hidden()
            shown = await ada.messages()
            assert shown == await grace.messages() == await kept(process)
            assert [message["text"] for message in shown if message["name"] == "Ada"] == of_ada
            assert [message["text"] for message in shown if message["name"] == "Grace"] == of_grace


@pytest.mark.parametrize("way", WAYS)
async def test_the_network_is_cut_on_each_way(browser: Browser, open_server: Process, way: str) -> None:
    """What is written offline is sent once, in order, when the network is back, on whatever way that is by then."""
    room = f"cut-{way}"
    async with switching(browser, open_server.http, outages=True) as visitors:
        ada, grace = await visitors.tab("Ada", room=room), await visitors.tab("Grace", room=room)
        await go_by(ada, way)
        await ada.say("before")
        await grace.shows(1)
        await ada.page.context.set_offline(True)
        await expect(ada.page.locator("#state")).to_have_text(AWAY, timeout=PATIENCE_MS)
        await ada.say(*numbered("offline", 3))
        await grace.say("meanwhile")
        await grace.shows(2)
        other = next(other for other in WAYS if other != way)
        await choose(ada, other)
        await ada.page.context.set_offline(False)
        await is_by(ada, other)
        for tab in (ada, grace):
            await tab.shows(5)
        assert await ada.texts() == ["before", "meanwhile", *numbered("offline", 3)]
        assert await ada.messages() == await grace.messages() == await kept(open_server, room)


async def test_what_polling_cannot_is_said(browser: Browser, open_server: Process) -> None:
    """Typing marks and presence are there by WebSocket and SSE; who polls is told what is missing."""
    async with switching(browser, open_server.http) as visitors:
        ada, grace = await visitors.tab("Ada", room="marks"), await visitors.tab("Grace", room="marks")
        await go_by(ada, "sse")
        await expect(grace.page.locator("#count")).to_have_text("2 here")
        await expect(ada.page.locator("#count")).to_have_text("2 here")
        await ada.page.locator("#text").press_sequentially("hm")
        await expect(grace.page.locator("#typing")).to_have_text("Ada is typing…")
        await grace.page.locator("#text").press_sequentially("well")
        await expect(ada.page.locator("#typing")).to_have_text("Grace is typing…")

        await go_by(ada, "polling")
        await expect(ada.page.locator("#way")).to_contain_text("No typing marks")
        await expect(ada.page.locator("#way")).to_contain_text("without you")
        await expect(ada.page.locator("#typing")).to_be_empty()
        # Asked before our own leave was done, it is asked again.
        await expect(ada.page.locator("#people li")).to_have_text("GGrace", timeout=PATIENCE_MS)
        await expect(grace.page.locator("#people li")).to_have_text("GGrace (you)")
        await ada.page.locator("#text").press_sequentially("m")
        await ada.page.press("#text", "Enter")
        await grace.shows(1)
        await expect(grace.page.locator("#typing")).to_be_empty()
        await ada.shows(1)

        await go_by(ada, "websocket")
        await expect(ada.page.locator("#people li")).to_have_count(2)
        await expect(grace.page.locator("#people li")).to_have_count(2)
        await ada.page.locator("#text").press_sequentially("again")
        await expect(grace.page.locator("#typing")).to_have_text("Ada is typing…")


async def test_who_comes_and_goes_while_presence_is_asked(browser: Browser, open_server: Process) -> None:
    """A join or leave may overtake the answer who is here, which then is the older one and must not undo it."""
    answers: list[str | bytes] = []
    seen: dict[str, asyncio.Event] = {"join": asyncio.Event(), "leave": asyncio.Event()}
    sides: list[WebSocketRoute] = []

    def hold(page: WebSocketRoute) -> None:
        sides.append(page)

        def answer(frame: str | bytes) -> None:
            reply = json.loads(frame)
            push = reply.get("push", {})
            if "presence" in reply:
                answers.append(frame)
                return
            page.send(frame)
            for kind, news in seen.items():
                if answers and kind in push and push["channel"] == "live:typing:overtaken":
                    news.set()

        page.connect_to_server().on_message(answer)

    async with switching(browser, open_server.http) as visitors:
        grace = await visitors.tab("Grace", room="overtaken")
        await expect(grace.page.locator("#count")).to_have_text("1 here")
        ada = await visitors.tab("Ada", room="overtaken", route=hold)
        async with asyncio.timeout(PATIENCE_MS / 1000):
            while not answers:  # an answer is no event of the page's
                await ada.page.evaluate("new Promise(requestAnimationFrame)")
            await grace.page.evaluate("location.hash = 'elsewhere'")
            await seen["leave"].wait()
            seen["join"].clear()
            await visitors.tab("Third", room="overtaken")
            await seen["join"].wait()
        assert await ada.page.locator("#count").text_content() == "Who is here is not known"
        for frame in answers:
            sides[0].send(frame)
        await expect(ada.page.locator("#people li")).to_have_text(["AAda (you)", "TThird"])


async def test_who_is_here_is_asked_by_pollers(browser: Browser, open_server: Process) -> None:
    """Who polls learns within ten seconds who came and who went."""
    async with switching(browser, open_server.http) as visitors:
        ada = await visitors.tab("Ada", room="asked")
        await ada.page.clock.install()
        await ada.page.reload()
        await go_by(ada, "polling")
        await expect(ada.page.locator("#count")).to_have_text("0 here")
        grace = await visitors.tab("Grace", room="asked")
        await expect(grace.page.locator("#count")).to_have_text("1 here")
        await ada.page.clock.fast_forward(10_000)
        await expect(ada.page.locator("#people li")).to_have_text("GGrace")


async def test_rooms_of_a_poller(browser: Browser, open_server: Process) -> None:
    """The room that one looks at comes at once, others count what is unread in them, and are whole when one looks."""
    async with switching(browser, open_server.http) as visitors:
        ada, grace = await visitors.tab("Ada", room="here"), await visitors.tab("Grace", room="there")
        await go_by(ada, "polling")
        await ada.page.evaluate("location.hash = 'there'")
        await is_by(ada, "polling")
        await grace.say("one")
        await ada.shows(1)
        await ada.page.evaluate("location.hash = 'here'")
        await is_by(ada, "polling")
        await grace.say("two", "three")
        there = ada.page.locator("#rooms li").filter(has_text="there")
        await expect(there.locator(".badge")).to_have_text("2 unread", timeout=PATIENCE_MS)
        await grace.say("four")
        await there.locator("a").click()
        await ada.shows(4)
        assert await ada.messages() == await kept(open_server, "there")


async def test_each_tab_remembers_its_own(browser: Browser, open_server: Process) -> None:
    """The choice outlives a reload and is this tab's; what is stored and makes no sense is the WebSocket."""
    async with switching(browser, open_server.http) as visitors:
        ada = await visitors.tab("Ada", room="tabs")
        await is_by(ada, "websocket")
        await go_by(ada, "polling")
        second = await ada.page.context.new_page()
        await second.goto(f"{open_server.http}/chat#tabs")
        await expect(second.locator("#ways :checked")).to_have_value("websocket")
        await expect(second.locator("#via")).to_have_text("by WebSocket", timeout=PATIENCE_MS)
        await ada.page.reload()
        await is_by(ada, "polling")
        await expect(ada.page.locator("#ways :checked")).to_have_value("polling")
        assert ada.sockets == 1
        for nonsense in ('"constructor"', "{", "7", '{"toString": 1}', "null"):
            await ada.page.evaluate("text => { sessionStorage['waterspout way'] = text }", nonsense)
            await ada.page.reload()
            await is_by(ada, "websocket")


async def test_a_way_that_is_not_offered_is_said(browser: Browser, tmp_path: Path) -> None:
    """Where the server has a way switched off the page says so, knocks no more, and the next choice connects."""
    with Process(tmp_path, config(rest={"disabled": True})) as process:
        async with switching(browser, process.http, outages=True) as visitors:
            ada = await visitors.tab("Ada")
            await choose(ada, "sse")
            await expect(ada.page.locator("#what")).to_have_text("Disconnected: no server-sent events here (3508)")
            await choose(ada, "polling")
            await expect(ada.page.locator("#what")).to_have_text("Disconnected: no polling here (3508)")
            await expect(ada.page.locator("#countdown")).to_be_empty()
            await expect(ada.page.locator("#via")).to_be_empty()
            await ada.say("later")
            await go_by(ada, "websocket")
            await ada.shows(1)


@pytest.mark.parametrize("way", ["sse", "polling"])
async def test_a_key_that_changed_on_each_way(browser: Browser, tmp_path: Path, way: str) -> None:
    """A server that does not know our token any more gives another; nobody has to reload, nor to change ways."""
    with Process(tmp_path) as process:
        async with switching(browser, process.http, outages=True) as visitors:
            ada = await visitors.tab("Ada")
            await go_by(ada, way)
            process.kill()
            (tmp_path / "waterspout.db.key").unlink()
            process.start()
            await ada.say("still me")
            await is_by(ada, way)
            await ada.shows(1)
            assert await kept(process) == await ada.messages()
            assert (await ada.messages())[0]["name"] == "Ada"


@pytest.mark.parametrize("way", ["sse", "polling"])
async def test_a_new_name_on_each_way(browser: Browser, open_server: Process, way: str) -> None:
    """PROTOCOL 8.6: a new name counts from the next message on, and one is still the same person."""
    room = f"names-{way}"
    async with switching(browser, open_server.http) as visitors:
        ada, grace = await visitors.tab("Ada", room=room), await visitors.tab("Grace", room=room)
        await go_by(ada, way)
        await ada.say("before")
        await grace.shows(1)
        async with ada.page.expect_response("**/v1/session"):
            await ada.page.fill("#name", "Ada Lovelace")
            await ada.page.press("#name", "Enter")
        await expect(ada.page.locator("#name")).to_have_value("Ada Lovelace")
        await ada.say("after")
        await grace.shows(2)
        await ada.shows(2)
        assert [message["name"] for message in await grace.messages()] == ["Ada", "Ada Lovelace"]
        assert await ada.page.locator("#messages .mine").count() == 2


@pytest.mark.parametrize("way", ["sse", "polling"])
async def test_what_others_write_stays_text_on_each_way(browser: Browser, open_server: Process, way: str) -> None:
    """P8: markup, line breaks that would end an event, and payloads that are no message are shown as text."""
    room = f"odd-{way}"
    markup = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>&amp;"
    event = 'one\n\ndata: {"push":{"disconnect":{"code":3500,"reason":"taken"}}}\n\nevent: x\r\n\r\n\u2028'
    said = '{"push":{"disconnect":{"code":3500,"reason":"taken"}}}'
    odd: list[Any] = [
        {"name": markup, "text": markup},
        {"text": event},
        {"text": said},
        {"push": {"disconnect": {}}},
        17,
    ]
    async with switching(browser, open_server.http) as visitors:
        ada = await visitors.tab("Ada", room=room)
        await go_by(ada, way)
        raw = await Client.connected(open_server.url)
        for data in odd:
            await raw.ask("publish", channel=f"chat:{room}", data=data)
        await raw.close()
        await ada.shows(5)
        await ada.say(markup)
        await ada.shows(6)
        texts = await ada.texts()
        assert texts == [markup, event, said, '{"push":{"disconnect":{}}}', "17", markup]
        assert await ada.page.title() == f"{room} – Waterspout"
        assert await ada.page.locator("#log img, #log script, #people img").count() == 0
        await is_by(ada, way)


async def test_by_keyboard(browser: Browser, open_server: Process) -> None:
    """The switch is one stop of the Tab key, its arrows choose, and what is chosen is told in words."""
    async with switching(browser, open_server.http) as visitors:
        ada = await visitors.tab("Ada", room="keys")
        page = ada.page
        await page.focus("#name")
        await page.keyboard.press("Shift+Tab")
        await expect(page.locator("#ways [value=websocket]")).to_be_focused()
        await page.keyboard.press("ArrowRight")
        await is_by(ada, "sse")
        await page.keyboard.press("ArrowRight")
        await is_by(ada, "polling")
        await expect(page.locator("#ways [value=polling]")).to_be_focused()
        await page.keyboard.press("ArrowRight")
        await is_by(ada, "websocket")
        await page.keyboard.press("ArrowLeft")
        await page.keyboard.press("ArrowLeft")
        await is_by(ada, "sse")
        group = page.get_by_role("group", name="How am I connected?")
        await expect(group.get_by_role("radio", name="SSE")).to_be_checked()
        await expect(group).to_have_accessible_description(re.compile("^Server-sent events"))
        await page.keyboard.press("Tab")
        await expect(page.locator("#name")).to_be_focused()


async def test_the_switch_fits_and_can_be_read(browser: Browser, open_server: Process) -> None:
    """At three sizes, in light and dark, on every way: all is in view, with the contrast of WCAG AA, and axe agrees."""
    sizes = ((360, 740), (768, 1024), (1280, 800))
    schemes: tuple[Literal["light", "dark"], ...] = ("light", "dark")
    async with switching(browser, open_server.http) as visitors:
        ada = await visitors.tab("Ada", room="a-room-with-quite-a-long-name-for-a-phone", reduced_motion="reduce")
        page = ada.page
        await page.evaluate(AXE.read_text())
        for (width, height), scheme, way in itertools.product(sizes, schemes, WAYS):
            await page.set_viewport_size({"width": width, "height": height})
            await page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            if width == 360:
                await page.click("#menu")
            await go_by(ada, way)
            await expect(page.locator("#count")).to_contain_text("here")
            await _in_view(page, "#ways", "#way", "#name")
            assert await page.evaluate(VIOLATIONS) == []
            for text in ("legend", "#ways :checked + span", "#ways :not(:checked) + span", "#way", "#who"):
                assert await page.locator(text).last.evaluate(CONTRAST) >= 4.5, (text, scheme)
            if width == 360:
                await page.keyboard.press("Escape")
            await _in_view(page, "#title", "#state", "#via")
            assert await page.evaluate("document.documentElement.scrollWidth") == width
            assert await page.locator("#via").evaluate(CONTRAST) >= 4.5, scheme


async def _in_view(page: Page, *places: str) -> None:
    width, height = await page.evaluate("[innerWidth, innerHeight]")
    for place in places:
        left, top, right, bottom = await page.locator(place).evaluate(WHERE)
        assert 0 <= left <= right <= width, place
        assert 0 <= top <= bottom <= height, place
