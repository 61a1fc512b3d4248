"""The chat page in a real browser, against a real server that is killed, starts over, or answers strangely."""

import asyncio
import itertools
import json
import re
import signal
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pytest
from hopper import publish_once
from playwright.async_api import Browser, Page, WebSocketRoute, expect
from support import OPEN, ROOT, Client, Process, config

PATIENCE_MS = 15_000
RETURN_MS = 60_000  # after an outage: the attempts to come back are up to 20 s apart
UNREACHABLE = re.compile(r"^WebSocket connection to '[^']*' failed: ")
READ = """items => items.map(item => ({
    name: item.querySelector('.name').textContent,
    text: item.querySelector('.text').textContent,
    time: item.querySelector('time').dateTime,
}))"""
WHERE = "element => { const at = element.getBoundingClientRect(); return [at.left, at.top, at.right, at.bottom] }"
CONTRAST = """element => {
    const light = colour => {
        const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(part => part / 255)
            .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    if (!element.isConnected) return 0;
    let behind = element;
    while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
    const pair = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor].map(light);
    return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
}"""


AXE = ROOT / "tests" / "sdk" / "node_modules" / "axe-core" / "axe.min.js"
VIOLATIONS = "() => axe.run().then(({ violations }) => violations.map(({ id, nodes }) => [id, nodes[0].html]))"

LEAVE = {"id": 4_000_000_000, "unsubscribe": {"channel": "chat:positions"}}
"""A command that comes from the test, not from the page."""

AWAY = re.compile(r"^\s*Reconnecting in \d+ s")


class Tab:
    """One tab of its own visitor, and all that went over its WebSockets.

    ``sent`` and ``received`` are commands and replies as dicts, ``sockets`` the
    number of connections tried; ``faults`` is what the console complained of.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self.sent: list[dict[str, Any]] = []
        self.received: list[dict[str, Any]] = []
        self.faults: list[str] = []
        self.sockets = 0
        self._news = asyncio.Event()
        page.on("console", lambda message: self.faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("websocket", self._watch)

    def _watch(self, socket: Any) -> None:
        self.sockets += 1
        self._news.set()
        socket.on("framesent", lambda frame: self._note(self.sent, frame))
        socket.on("framereceived", lambda frame: self._note(self.received, frame))

    def _note(self, log: list[dict[str, Any]], frame: str | bytes) -> None:
        log.extend(_messages(frame))
        self._news.set()

    async def until(self, done: Callable[[], bool]) -> None:
        """Wait until ``done`` is true of what went over the wire."""
        async with asyncio.timeout(PATIENCE_MS / 1000):
            while not done():
                self._news.clear()
                await self._news.wait()

    async def is_live(self) -> None:
        """Wait until the page says that it is."""
        await expect(self.page.locator("#what")).to_have_text("Live", timeout=RETURN_MS)

    async def say(self, *texts: str) -> None:
        """Write messages as a person does, whether they can be sent or not."""
        for text in texts:
            await self.page.fill("#text", text)
            await self.page.press("#text", "Enter")

    async def shows(self, count: int) -> None:
        """Wait until exactly ``count`` messages of the room are there and none waits to be sent."""
        await expect(self.page.locator("#messages .message")).to_have_count(count, timeout=RETURN_MS)
        await expect(self.page.locator("#unsent li")).to_have_count(0, timeout=RETURN_MS)

    async def messages(self) -> list[dict[str, str]]:
        """What the page shows of each message, oldest first."""
        return list(await self.page.eval_on_selector_all("#messages .message", READ))

    async def texts(self) -> list[str]:
        """The texts alone."""
        return [message["text"] for message in await self.messages()]

    def offsets(self) -> list[int]:
        """The offsets of all publications that came by subscription to a kept channel, in order of arrival."""
        found = []
        for reply in self.received:
            publication = reply.get("push", {}).get("pub", {})
            if "offset" in publication:
                found.append(publication["offset"])
            found += [publication["offset"] for publication in reply.get("subscribe", {}).get("publications", [])]
        return found

    def results(self, method: str) -> list[dict[str, Any]]:
        """The results of all commands of this kind."""
        return [reply[method] for reply in self.received if method in reply]


def _messages(frame: str | bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in frame.split("\n")] if isinstance(frame, str) else []


class Visitors:
    """Makes tabs in one browser; every one belongs to another visitor, with storage of its own."""

    def __init__(self, browser: Browser, url: str) -> None:
        self.browser = browser
        self.url = url
        self.tabs: list[Tab] = []

    async def tab(
        self,
        name: str = "Ada",
        *,
        room: str = "",
        route: Callable[[WebSocketRoute], None] | None = None,
        **options: Any,
    ) -> Tab:
        """Open the page as a new visitor; ``route`` comes between it and the server."""
        context = await self.browser.new_context(locale="en-GB", **options)
        await context.add_init_script(f"try {{ localStorage['waterspout name'] ??= '{json.dumps(name)}' }} catch {{}}")
        tab = Tab(await context.new_page())
        self.tabs.append(tab)
        if route is not None:
            await tab.page.route_web_socket(re.compile("/connection/websocket"), route)
        await tab.page.goto(f"{self.url}/chat{room and '#' + room}")
        await tab.is_live()
        return tab


@asynccontextmanager
async def visiting(browser: Browser, url: str, *, outages: bool = False) -> AsyncIterator[Visitors]:
    """Visitors of ``url``, who are gone in the end.

    No console may have complained, except, with ``outages``, about connections
    that failed.
    """
    visitors = Visitors(browser, url)
    try:
        yield visitors
        faults = [fault for tab in visitors.tabs for fault in tab.faults]
        assert not [fault for fault in faults if not (outages and UNREACHABLE.match(fault))]
    finally:
        for tab in visitors.tabs:
            await tab.page.context.close()


async def kept(process: Process, room: str = "lobby") -> list[dict[str, str]]:
    """The history of a room as the page would show it, asked for by a client that is no browser."""
    client = await Client.connected(process.url)
    history = await client.ask("history", channel=f"chat:{room}", limit=-1)
    await client.close()
    assert [publication["offset"] for publication in history["publications"]] == list(range(1, history["offset"] + 1))
    return [
        {
            "name": publication.get("info", {}).get("conn_info", publication["data"])["name"],
            "text": publication["data"]["text"],
            "time": datetime.fromtimestamp(publication["time"] / 1000, UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z"),
        }
        for publication in history["publications"]
    ]


def order(process: Process, method: str, **request: Any) -> None:
    """Call the back-end API with the key of ``support.config``."""
    call = urllib.request.Request(
        f"{process.http}/api/{method}", json.dumps(request).encode(), {"X-API-Key": "api-key"}
    )
    with urllib.request.urlopen(call) as answer:
        assert json.load(answer) == {"result": {}}


async def grace_said(process: Process, room: str, texts: Iterable[str]) -> None:
    """Have messages in a room that no page has sent, each once."""
    for text in texts:
        await publish_once(lambda: process.port, f"chat:{room}", {"name": "Grace", "text": text}, text)


def numbered(word: str, count: int) -> list[str]:
    """Texts that tell who wrote them and in which order."""
    return [f"{word} {number}" for number in range(1, count + 1)]


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A server with nothing configured, for tests that leave it alone and take a room each."""
    with Process(tmp_path_factory.mktemp("open")) as process:
        yield process


@pytest.fixture(scope="module")
def ruled_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A server whose back-end API takes orders, and whose rooms keep neither history nor presence."""
    rooms = {"channel": {"namespaces": [{"name": "chat", **OPEN}]}}
    with Process(tmp_path_factory.mktemp("ruled"), config(**rooms)) as process:
        yield process


async def test_two_visitors_and_a_server_killed_in_the_middle(browser: Browser, tmp_path: Path) -> None:
    """P2, P3, P5: what two visitors write around a kill -9 is there once, in order, for both, after a reload, too."""
    with Process(tmp_path) as process:
        async with visiting(browser, process.http, outages=True) as visitors:
            ada, grace = await visitors.tab("Ada"), await visitors.tab("Grace")
            of_ada, of_grace = numbered("from Ada", 22), numbered("from Grace", 14)
            await ada.say(*of_ada[:4])
            await grace.say(*of_grace[:4])
            await ada.shows(8)
            await grace.shows(8)

            await ada.say(*of_ada[4:14])
            process.kill()
            await ada.say(*of_ada[14:])
            await grace.say(*of_grace[4:])
            for tab in (ada, grace):
                await expect(tab.page.locator("#state")).to_have_text(AWAY, timeout=PATIENCE_MS)
                await expect(tab.page.locator("#count")).to_have_text("Not connected")
            await expect(grace.page.locator("#unsent small").last).to_have_text("Waits for the connection")

            process.start()
            for tab in (ada, grace):
                await tab.is_live()
                await tab.shows(len(of_ada) + len(of_grace))
                await expect(tab.page.locator("#count")).to_have_text("2 here")
                await expect(tab.page.locator("#notice")).to_be_hidden()
            shown = await ada.messages()
            assert await grace.messages() == shown
            assert await kept(process) == shown
            assert [message["text"] for message in shown if message["name"] == "Ada"] == of_ada
            assert [message["text"] for message in shown if message["name"] == "Grace"] == of_grace
            for tab in (ada, grace):
                assert tab.offsets() == list(range(1, len(shown) + 1))
                assert [result["recovered"] for result in tab.results("subscribe") if "recovered" in result] == [True]
                await tab.page.reload()
                await tab.is_live()
                await tab.shows(len(shown))
                assert await tab.messages() == shown
                await expect(tab.page.locator("#name")).to_have_value("Ada" if tab is ada else "Grace")


async def test_what_is_unsent_survives_a_reload(browser: Browser, tmp_path: Path) -> None:
    """What was written while the server was away is sent once, although the page was loaded anew before."""
    with Process(tmp_path) as process:
        async with visiting(browser, process.http, outages=True) as visitors:
            ada = await visitors.tab("Ada")
            process.kill()
            await expect(ada.page.locator("#state")).to_have_text(AWAY, timeout=PATIENCE_MS)
            await ada.say("one", "two", "three")
            await ada.page.goto("about:blank")
            process.start()
            await ada.page.goto(f"{process.http}/chat")
            await ada.is_live()
            await ada.shows(3)
            assert await ada.texts() == ["one", "two", "three"]
            assert await kept(process) == await ada.messages()


async def test_the_reply_of_a_publication_gets_lost(browser: Browser, open_server: Process) -> None:
    """P5: answers "outcome unknown" and connections that end before the answer lead to a retry by the same key."""
    fates = ["unknown", "cut", "unknown"]

    def lossy(page: WebSocketRoute) -> None:
        server = page.connect_to_server()

        async def answer(frame: str | bytes) -> None:
            for reply in _messages(frame):
                fate = fates.pop() if "rpc" in reply and fates else ""
                if fate == "unknown":
                    page.send(
                        json.dumps({"id": reply["id"], "error": {"code": 100, "message": "?", "temporary": True}})
                    )
                elif fate == "cut":
                    await page.close(code=3012, reason="no pong")
                    await server.close()
                    return
                else:
                    page.send(json.dumps(reply))

        server.on_message(answer)

    async with visiting(browser, open_server.http) as visitors:
        ada = await visitors.tab("Ada", room="replies", route=lossy)
        await ada.say("one", "two")
        await ada.shows(2)
        assert not fates
        assert await ada.texts() == ["one", "two"]
        assert await kept(open_server, "replies") == await ada.messages()


async def test_insufficient_state_resubscribes(browser: Browser, open_server: Process) -> None:
    """PROTOCOL 7.3, 11.2: after an unsubscribe push 2500 the page subscribes again from where it stood."""
    asked: list[dict[str, Any]] = []
    sides: list[WebSocketRoute] = []
    left = asyncio.Event()

    def tap(page: WebSocketRoute) -> None:
        server = page.connect_to_server()
        sides[:] = [page, server]

        def ask(frame: str | bytes) -> None:
            wishes = [command["subscribe"] for command in _messages(frame) if "subscribe" in command]
            asked.extend(wish for wish in wishes if wish["channel"] == "chat:positions")
            server.send(frame)

        def answer(frame: str | bytes) -> None:
            if any(reply.get("id") == LEAVE["id"] for reply in _messages(frame)):
                left.set()
            else:
                page.send(frame)

        page.on_message(ask)
        server.on_message(answer)

    async with visiting(browser, open_server.http) as visitors:
        ada = await visitors.tab("Ada", room="positions", route=tap)
        grace = await visitors.tab("Grace", room="positions")
        await grace.say("one")
        await ada.shows(1)
        page, server = sides
        server.send(json.dumps(LEAVE))
        async with asyncio.timeout(PATIENCE_MS / 1000):
            await left.wait()
        await grace.say("two", "three")
        await grace.shows(3)
        assert await ada.texts() == ["one"]
        push = {"channel": "chat:positions", "unsubscribe": {"code": 2500, "reason": "insufficient state"}}
        page.send(json.dumps({"push": push}))
        await ada.shows(3)
        await ada.is_live()
        assert await ada.messages() == await grace.messages() == await kept(open_server, "positions")
        first, second = asked
        assert "recover" not in first
        assert second["recover"] is True
        assert second["offset"] == 1
        assert second["epoch"]


async def test_history_that_is_gone(browser: Browser, tmp_path: Path) -> None:
    """PROTOCOL 11.3: when the numbering began anew while one was away, the page says so and shows what there is."""
    with Process(tmp_path) as process:
        async with visiting(browser, process.http, outages=True) as visitors:
            ada = await visitors.tab("Ada")
            await ada.say("of the old life", "this one, too")
            await ada.shows(2)
            process.kill()
            await expect(ada.page.locator("#state")).to_have_text(AWAY, timeout=PATIENCE_MS)
            for file in list(tmp_path.glob("waterspout.db*")):  # noqa: ASYNC240
                file.unlink()
            process.start()
            raw = await Client.connected(process.url)
            await raw.ask("publish", channel="chat:lobby", data={"name": "Grace", "text": "of the new life"})
            await raw.close()
            await ada.is_live()
            await expect(ada.page.locator("#notice")).to_contain_text("no longer has all")
            await ada.shows(1)
            assert await ada.messages() == await kept(process)

            await ada.page.click("text=Dismiss")
            await expect(ada.page.locator("#notice")).to_be_hidden()
            await ada.say("on we go")
            await ada.shows(2)
            assert await ada.texts() == ["of the new life", "on we go"]


async def test_only_the_last_of_a_long_history(browser: Browser, open_server: Process) -> None:
    """The first load shows the last 50 messages, in order, and the newest is in view."""
    await grace_said(open_server, "long", numbered("message", 70))
    async with visiting(browser, open_server.http) as visitors:
        ada = await visitors.tab("Ada", room="long")
        await ada.shows(50)
        assert await ada.messages() == (await kept(open_server, "long"))[20:]
        await expect(ada.page.locator(".message").last).to_be_in_viewport()
        await ada.page.locator("#log").evaluate("log => { log.scrollTop = 0 }")
        await expect(ada.page.locator("#down")).to_be_visible()
        await ada.page.click("#down")
        await expect(ada.page.locator(".message").last).to_be_in_viewport()


async def test_what_others_write_stays_text(browser: Browser, open_server: Process) -> None:
    """P8: markup, and payloads that are no message at all, are shown as text and break nothing."""
    markup = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>&amp;"
    odd: list[Any] = [
        {"name": markup, "text": markup},
        {"name": {"toString": 1}, "text": ["x"], "id": {"a": 1}},
        {"name": "   ", "text": ""},
        "a string",
        17,
        True,
        [None, {"text": "deep"}],
        {"__proto__": {"name": "taken"}, "constructor": None},
        {"name": "\u202egnp.exe", "text": "x" * 20_000},
    ]
    async with visiting(browser, open_server.http) as visitors:
        ada = await visitors.tab("Ada", room="odd")
        raw = await Client.connected(open_server.url)
        for data in odd:
            await raw.ask("publish", channel="chat:odd", data=data)
        await raw.close()
        await ada.say(markup)
        await ada.shows(len(odd) + 1)
        texts = await ada.texts()
        assert texts[0] == texts[-1] == markup
        assert texts[3:6] == ["a string", "17", "true"]
        assert (await ada.messages())[0]["name"] == markup[:40]
        assert await ada.page.title() == "odd – Waterspout"
        assert await ada.page.locator("#log img, #log script, #people img").count() == 0
        assert await ada.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        await ada.page.reload()
        await ada.shows(len(odd) + 1)
        assert await ada.texts() == texts


async def test_sent_away_for_good(browser: Browser, ruled_server: Process) -> None:
    """PROTOCOL 7.2: after a code of 3500 to 3999 the page says why and stays away until it is told otherwise."""
    async with visiting(browser, ruled_server.http) as visitors:
        ada = await visitors.tab("Ada", room="gate")
        order(ruled_server, "disconnect", user="", disconnect={"code": 3100, "reason": "come back"})
        await ada.until(lambda: len(ada.results("subscribe")) == 2)
        await ada.is_live()
        order(ruled_server, "disconnect", user="")
        await expect(ada.page.locator("#what")).to_have_text("Disconnected: force disconnect (3503)")
        await expect(ada.page.locator("#countdown")).to_be_empty()
        await ada.say("later")
        await expect(ada.page.locator("#unsent small")).to_have_text("Waits for the connection")
        assert ada.sockets == 2
        await ada.page.click("text=Connect again")
        await ada.is_live()
        await ada.shows(1)
        assert ada.sockets == 3


async def test_taken_out_of_the_room(browser: Browser, ruled_server: Process) -> None:
    """PROTOCOL 7.3: after an unsubscribe below 2500 the page says why and does not join by itself, nor after a cut."""
    async with visiting(browser, ruled_server.http) as visitors:
        ada = await visitors.tab("Ada", room="door")
        order(ruled_server, "unsubscribe", user="", channel="chat:door")
        outside = "Not in this room: server unsubscribe (2000)"
        await expect(ada.page.locator("#what")).to_have_text(outside)
        order(ruled_server, "disconnect", user="", disconnect={"code": 3100, "reason": "come back"})
        await ada.until(lambda: len(ada.results("connect")) == 2)
        await expect(ada.page.locator("#what")).to_have_text(outside, timeout=PATIENCE_MS)
        assert len(ada.results("subscribe")) == 1
        await ada.page.click("text=Join again")
        await ada.is_live()
        await ada.say("back")
        await ada.shows(1)


async def test_a_room_that_keeps_nothing(browser: Browser, ruled_server: Process) -> None:
    """Without history and presence the page still talks, and does not pretend to know who is here."""
    async with visiting(browser, ruled_server.http) as visitors:
        ada, grace = await visitors.tab("Ada", room="hall"), await visitors.tab("Grace", room="hall")
        await ada.say("one")
        await grace.shows(1)
        await grace.say("two")
        await ada.shows(2)
        assert await ada.texts() == await grace.texts() == ["one", "two"]
        await expect(ada.page.locator("#count")).to_have_text("Who is here is not known")


async def test_a_refused_message_says_so(browser: Browser, open_server: Process) -> None:
    """A message that the server refuses for good stays in its room with the reason, and those after it are sent."""
    async with visiting(browser, open_server.http) as visitors:
        ada = await visitors.tab("Ada", room="before")
        await ada.page.evaluate("location.hash = 'x'.repeat(300)")
        await expect(ada.page.locator("#what")).to_have_text("Not in this room: bad request (107)")
        await ada.say("may I?")
        await expect(ada.page.locator("#unsent small")).to_have_text("Not sent: bad request (107)")
        await ada.page.go_back()
        await ada.is_live()
        await ada.say("here I may")
        await ada.shows(1)
        await ada.page.go_forward()
        await expect(ada.page.locator("#unsent small")).to_have_text("Not sent: bad request (107)")
        await ada.page.click("text=Discard")
        await expect(ada.page.locator("#unsent li")).to_have_count(0)
        await ada.page.reload()
        await expect(ada.page.locator("#what")).to_have_text("Not in this room: bad request (107)")
        await expect(ada.page.locator("#unsent li")).to_have_count(0)


async def test_a_server_that_falls_silent(browser: Browser, tmp_path: Path) -> None:
    """PROTOCOL 2.4: pings are answered, and without a sign of life for the interval and 10 s the page reconnects."""
    quick = config(client={"ping_interval": "1s", "pong_timeout": "500ms"})
    with Process(tmp_path, quick) as process:
        async with visiting(browser, process.http, outages=True) as visitors:
            ada = await visitors.tab("Ada")
            await ada.page.clock.install()
            await ada.page.reload()
            await ada.is_live()
            await ada.until(lambda: {} in ada.received and {} in ada.sent)
            assert process.popen is not None
            process.popen.send_signal(signal.SIGSTOP)
            try:
                await ada.page.clock.fast_forward(13_000)
                await expect(ada.page.locator("#what")).to_have_text(re.compile("Reconnecting|Connecting…"))
            finally:
                process.popen.send_signal(signal.SIGCONT)
            await ada.is_live()


async def test_rooms_and_who_is_here(browser: Browser, open_server: Process) -> None:
    """Rooms are apart, whatever their name; people come and go in view; the keyboard is enough for all of it."""
    async with visiting(browser, open_server.http) as visitors:
        ada, grace = await visitors.tab("Ada"), await visitors.tab("Grace")
        people = ada.page.locator("#people li")
        await grace.say("hello")
        await ada.shows(1)
        await expect(ada.page.locator("#count")).to_have_text("2 here")
        await expect(people.filter(has_text="Ada (you)")).to_have_count(1)
        await expect(people.filter(has_text="Grace")).to_have_count(1)

        await grace.page.focus("#room")
        await grace.page.keyboard.press("Control+A")
        await grace.page.keyboard.type("50% of: <us> #1 über")
        await grace.page.keyboard.press("Enter")
        await grace.is_live()
        await grace.shows(0)
        await expect(ada.page.locator("#count")).to_have_text("1 here")
        await expect(grace.page.locator("#text")).to_be_focused()
        await grace.page.keyboard.type("nobody")
        await grace.page.keyboard.press("Shift+Enter")
        await grace.page.keyboard.type("listens")
        await grace.page.keyboard.press("Tab")
        await expect(grace.page.locator("#say button")).to_be_focused()
        await grace.page.keyboard.press("Enter")
        await grace.shows(1)
        assert await grace.texts() == ["nobody\nlistens"]
        assert await ada.texts() == ["hello"]

        third = await visitors.tab("Third", room=grace.page.url.partition("#")[2])
        await third.shows(1)
        await expect(third.page.locator("#title")).to_have_text("50% of: <us> #1 über")
        await grace.page.go_back()
        await grace.is_live()
        await grace.shows(1)
        assert await grace.texts() == ["hello"]
        await grace.page.context.close()
        await expect(ada.page.locator("#count")).to_have_text("1 here")


async def test_names_are_what_the_token_says(browser: Browser, open_server: Process) -> None:
    """PROTOCOL 8.6: a new name is seen by all at once; one that the server does not take is refused with its reason."""
    async with visiting(browser, open_server.http) as visitors:
        ada, grace = await visitors.tab("Ada", room="names"), await visitors.tab("Grace", room="names")
        await ada.say("before")
        await ada.page.fill("#name", "Ada Lovelace")
        await ada.page.press("#name", "Enter")
        await ada.until(lambda: len(ada.results("refresh")) == 1)
        await ada.say("after")
        await grace.shows(2)
        assert [message["name"] for message in await grace.messages()] == ["Ada", "Ada Lovelace"]
        assert await ada.page.locator("#messages .mine").count() == 2
        assert await grace.page.locator("#messages .mine").count() == 0
        await ada.page.reload()
        await ada.is_live()
        await ada.shows(2)
        assert await ada.page.locator("#messages .mine").count() == 2
        raw = await Client.connected(open_server.url)
        await raw.ask("publish", channel="chat:names", data={"name": "Ada Lovelace", "text": "I am she"})
        await raw.close()
        await ada.shows(3)
        assert await ada.page.locator("#messages .mine").count() == 2

        await ada.page.fill("#name", "\u202e\u200b")
        await ada.page.press("#name", "Enter")
        await expect(ada.page.locator("#unnamed")).to_be_visible()
        await expect(ada.page.locator("#name")).to_have_value("Ada Lovelace")
        ada.faults = [fault for fault in ada.faults if "400 (Bad Request)" not in fault]


async def test_links_are_safe(browser: Browser, open_server: Process) -> None:
    """Only web addresses become links, which tell the other side nothing; what only looks like one stays text."""
    texts = {
        "see https://example.com/a_(b)?c=d&e=<f>, (http://example.org/).": [
            "https://example.com/a_(b)?c=d&e=",
            "http://example.org/",
        ],
        "javascript:alert(1) data:text/html,x ftp://example.com file:///etc vbscript:x": [],
        "https://bank.example@evil.example https://a:b@c.example http:// https://": [],
        "HTTPS://EXAMPLE.COM/Path!": ["HTTPS://EXAMPLE.COM/Path"],
        "https://example.com/\u202egnp.exe": ["https://example.com/"],
        'https://example.com/" onclick="alert(1)': ["https://example.com/"],
    }
    async with visiting(browser, open_server.http) as visitors:
        ada = await visitors.tab("Ada", room="links")
        await ada.say(*texts)
        await ada.shows(len(texts))
        assert await ada.texts() == list(texts)
        found = await ada.page.eval_on_selector_all(
            ".text",
            """texts => texts.map(text => [...text.querySelectorAll('a')].map(link => link.textContent))""",
        )
        assert found == list(texts.values())
        links = await ada.page.eval_on_selector_all(
            ".text a", "links => links.map(link => [link.protocol, link.rel, link.target, link.getAttributeNames()])"
        )
        for protocol, rel, target, attributes in links:
            assert protocol in ("http:", "https:")
            assert (rel, target) == ("noopener noreferrer nofollow", "_blank")
            assert attributes == ["href", "target", "rel"]


async def test_back_to_the_beginning(browser: Browser, open_server: Process) -> None:
    """Scrolling up brings page after page until the first message; what is in view stays where it is."""
    await grace_said(open_server, "back", numbered("message", 230))
    async with visiting(browser, open_server.http) as visitors:
        ada = await visitors.tab("Ada", room="back")
        await ada.shows(50)
        await expect(ada.page.locator("#beginning")).to_be_hidden()
        for count in (100, 150, 200, 230):
            oldest = await ada.page.locator(".message .text").first.text_content()
            was_oldest = ada.page.locator(".message").filter(has=ada.page.get_by_text(str(oldest), exact=True))
            if count < 230:
                await ada.page.locator("#log").evaluate("log => { log.scrollTop = 0 }")
            else:
                await ada.page.focus("#older")
                await ada.page.keyboard.press("Enter")
            await ada.shows(count)
            await expect(was_oldest).to_be_in_viewport()
        await expect(ada.page.locator("#beginning")).to_have_text("This is where the room begins.")
        await expect(ada.page.locator("#older")).to_be_hidden()
        await grace_said(open_server, "back", ["message 231"])
        await expect(ada.page.locator("#down")).to_have_text("1 new")
        assert await ada.texts() == numbered("message", 231)
        await ada.page.click("#down")
        await expect(ada.page.locator(".message").last).to_be_in_viewport()
        await expect(ada.page.locator("#down")).to_be_hidden()
        assert await ada.messages() == await kept(open_server, "back")


async def test_unread_elsewhere(browser: Browser, open_server: Process) -> None:
    """Rooms that one entered count what is said in them meanwhile, over reloads, too, until one looks."""
    async with visiting(browser, open_server.http) as visitors:
        ada, grace = await visitors.tab("Ada", room="near"), await visitors.tab("Grace", room="far")
        await grace.say("seen")
        await ada.page.evaluate("location.hash = 'far'")
        await ada.shows(1)
        await ada.page.evaluate("location.hash = 'near'")
        await ada.shows(0)
        far = ada.page.locator("#rooms li").filter(has_text="far")
        await expect(far.locator(".badge")).to_be_hidden()
        await grace.say("one", "two")
        await expect(far.locator(".badge")).to_have_text("2 unread")
        assert await ada.page.title() == "(2) near – Waterspout"
        await ada.page.goto("about:blank")
        await grace.say("three")
        await grace.shows(4)
        await ada.page.goto(f"{open_server.http}/chat#near")
        await expect(far.locator(".badge")).to_have_text("3 unread")
        await far.locator("a").click()
        await ada.shows(4)
        await expect(ada.page.locator(".fresh:visible")).to_have_count(1)
        await expect(ada.page.locator(".message").filter(has_text="one").locator(".fresh")).to_be_visible()
        await expect(far.locator(".badge")).to_be_hidden()
        assert await ada.page.title() == "far – Waterspout"
        await ada.page.click("#rooms li:has(a:not([aria-current])) button")
        await expect(ada.page.locator("#rooms li")).to_have_count(1)
        await expect(ada.page.locator("#title")).to_have_text("far")
        await ada.page.reload()
        await ada.is_live()
        await expect(ada.page.locator("#rooms li")).to_have_count(1)


async def test_who_only_follows_is_not_here(browser: Browser, open_server: Process) -> None:
    """Whoever has gone on to another room still counts what is new in this one, and is not shown as being in it."""
    async with visiting(browser, open_server.http) as visitors:
        ada, grace = await visitors.tab("Ada", room="desk"), await visitors.tab("Grace", room="desk")
        await expect(ada.page.locator("#count")).to_have_text("2 here")
        await expect(ada.page.locator("#who")).to_contain_text("Everybody who has this room open")
        await grace.page.evaluate("location.hash = 'kitchen'")
        await expect(ada.page.locator("#count")).to_have_text("1 here")
        await expect(grace.page.locator("#count")).to_have_text("1 here")
        await ada.say("come back")
        await expect(grace.page.locator("#rooms .badge:visible")).to_have_text("1 unread")
        await ada.page.reload()
        await expect(ada.page.locator("#people li")).to_have_text("AAda (you)")
        await grace.page.evaluate("location.hash = 'desk'")
        await expect(ada.page.locator("#count")).to_have_text("2 here")


async def test_followers_are_called_so(browser: Browser, tmp_path: Path) -> None:
    """Where only the rooms themselves have presence, the page says that it shows who follows the room."""
    rooms = {"channel": {"namespaces": [{"name": "chat", **OPEN, "presence": True}]}}
    with Process(tmp_path, config(**rooms)) as process:
        async with visiting(browser, process.http) as visitors:
            ada, grace = await visitors.tab("Ada", room="hall"), await visitors.tab("Grace", room="hall")
            await grace.page.evaluate("location.hash = 'yard'")
            await expect(grace.page.locator("#count")).to_have_text("1 follows this room")
            await ada.page.reload()
            await expect(ada.page.locator("#count")).to_have_text("2 follow this room")
            await expect(ada.page.locator("#who")).to_contain_text("cannot say")


async def test_who_is_typing(browser: Browser, open_server: Process) -> None:
    """Typing marks come and go with what is written, and are no part of the room's history."""
    async with visiting(browser, open_server.http) as visitors:
        ada, grace = await visitors.tab("Ada", room="typing"), await visitors.tab("Grace", room="typing")
        await expect(grace.page.locator("#count")).to_have_text("2 here")
        typing = grace.page.locator("#typing")
        await ada.page.locator("#text").press_sequentially("hm")
        await expect(typing).to_have_text("Ada is typing…")
        await expect(ada.page.locator("#typing")).to_be_empty()
        await ada.page.fill("#text", "")
        await expect(typing).to_be_empty()
        await ada.page.locator("#text").press_sequentially("well")
        await expect(typing).to_have_text("Ada is typing…")
        await ada.page.press("#text", "Enter")
        await expect(typing).to_be_empty()
        await ada.page.locator("#text").press_sequentially("and th")
        await expect(typing).to_have_text("Ada is typing…")
        await expect(typing).to_be_empty(timeout=PATIENCE_MS)
        await grace.shows(1)
        assert await grace.messages() == await kept(open_server, "typing")


async def test_a_reload_in_mid_sentence(browser: Browser, open_server: Process) -> None:
    """What was half written is still there after a reload, each in its room, and is sent once."""
    async with visiting(browser, open_server.http) as visitors:
        ada = await visitors.tab("Ada", room="mid")
        await ada.page.locator("#text").press_sequentially("half a sen")
        await ada.page.evaluate("location.hash = 'other'")
        await expect(ada.page.locator("#text")).to_have_value("")
        await ada.page.evaluate("location.hash = 'mid'")
        await ada.page.reload()
        await ada.is_live()
        await expect(ada.page.locator("#text")).to_have_value("half a sen")
        await ada.page.press("#text", "End")
        await ada.page.locator("#text").press_sequentially("tence")
        await ada.page.press("#text", "Enter")
        await ada.shows(1)
        await ada.page.reload()
        await ada.is_live()
        await ada.shows(1)
        assert await ada.texts() == ["half a sentence"]
        await expect(ada.page.locator("#text")).to_have_value("")


async def test_the_network_is_cut(browser: Browser, open_server: Process) -> None:
    """What is written offline is shown as waiting, and sent once, in order, as soon as the network is back."""
    async with visiting(browser, open_server.http, outages=True) as visitors:
        ada, grace = await visitors.tab("Ada", room="cut"), await visitors.tab("Grace", room="cut")
        await ada.say("before")
        await ada.shows(1)
        await ada.page.context.set_offline(True)
        await expect(ada.page.locator("#state")).to_have_text(AWAY, timeout=PATIENCE_MS)
        await ada.say(*numbered("offline", 5))
        await grace.say("meanwhile")
        await expect(ada.page.locator("#unsent small")).to_have_text(["Waits for the connection"] * 5)
        await ada.page.context.set_offline(False)
        await ada.shows(7)
        await grace.shows(7)
        assert await ada.texts() == ["before", "meanwhile", *numbered("offline", 5)]
        assert await ada.messages() == await grace.messages() == await kept(open_server, "cut")
        assert ada.offsets() == list(range(1, 8))


async def test_a_key_that_changed(browser: Browser, tmp_path: Path) -> None:
    """A server that does not know our token any more gives another; nobody has to reload."""
    with Process(tmp_path) as process:
        async with visiting(browser, process.http, outages=True) as visitors:
            ada = await visitors.tab("Ada")
            process.kill()
            (tmp_path / "waterspout.db.key").unlink()
            process.start()
            await ada.say("still me")
            await ada.is_live()
            await ada.shows(1)
            assert await kept(process) == await ada.messages()
            assert (await ada.messages())[0]["name"] == "Ada"


async def test_a_phone(browser: Browser, open_server: Process) -> None:
    """Rooms and people are behind a button, by touch and by keyboard; what is behind the drawer cannot be reached."""
    async with visiting(browser, open_server.http) as visitors:
        ada = await visitors.tab("Ada", room="hand", viewport={"width": 360, "height": 740}, has_touch=True)
        page = ada.page
        await expect(page.locator("#room")).not_to_be_visible()
        await page.tap("#menu")
        await expect(page.locator("#room")).to_be_in_viewport(ratio=1)
        await expect(page.locator("#people li")).to_have_text("AAda (you)")
        await page.tap("#room")
        await page.keyboard.type("pocket")
        await page.tap("text=→")
        await expect(page.locator("#title")).to_have_text("pocket")
        await expect(page.locator("#room")).not_to_be_visible()
        await ada.is_live()
        await page.tap("#text")
        await page.keyboard.type("by thumb")
        await page.tap("#say button")
        await ada.shows(1)

        await page.focus("#menu")
        await page.keyboard.press("Enter")
        await expect(page.locator("#rooms [aria-current]")).to_be_focused()
        assert await page.evaluate("document.querySelector('main').inert")
        await page.keyboard.press("Escape")
        await expect(page.locator("#menu")).to_be_focused()
        await expect(page.locator("#room")).not_to_be_visible()
        await page.tap("#menu")
        await page.touchscreen.tap(350, 400)
        await expect(page.locator("#room")).not_to_be_visible()

        await page.evaluate("location.hash = 'x'.repeat(300)")
        await expect(page.locator("#what")).to_have_text("Not in this room: bad request (107)")
        await _inside(page, "#title", "#what", "#again")
        (*_, title_bottom), (_, what_top, *_) = [
            await page.locator(place).evaluate(WHERE) for place in ("#title", "#what")
        ]
        assert title_bottom <= what_top


async def _contrast(page: Page, selector: str) -> float:
    """Of a text and what is behind it; a text that is shown anew at this very moment is asked again."""
    while not (contrast := float(await page.locator(selector).last.evaluate(CONTRAST))):
        pass
    return contrast


async def test_fits_and_can_be_read(browser: Browser, tmp_path: Path) -> None:
    """On a phone, a tablet and a desk nothing is cut off, text has the contrast of WCAG AA, and axe finds no fault."""
    sizes = ((360, 740), (768, 1024), (1280, 800))
    schemes: tuple[Literal["light", "dark"], ...] = ("light", "dark")
    with Process(tmp_path) as process:
        async with visiting(browser, process.http, outages=True) as visitors:
            ada, grace = await visitors.tab("Ada", reduced_motion="reduce"), await visitors.tab("Grace")
            page = ada.page
            await ada.say(*numbered("a message of some length that wraps on a phone, and then some", 15), "x" * 300)
            await grace.say("see https://example.com/")
            await ada.shows(17)
            await page.evaluate("location.hash = 'elsewhere'")
            await ada.shows(0)
            await grace.say("missed")
            await expect(page.locator("#rooms .badge:visible")).to_have_count(1)
            await page.evaluate("location.hash = 'lobby'")
            await ada.shows(18)
            await page.evaluate(AXE.read_text())
            process.kill()
            await ada.say("waits")
            await expect(page.locator("#state")).to_have_text(AWAY, timeout=PATIENCE_MS)
            for (width, height), scheme in itertools.product(sizes, schemes):
                await page.set_viewport_size({"width": width, "height": height})
                await page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
                await expect(page.locator("#unsent small")).to_be_in_viewport(ratio=1)
                assert await page.evaluate("[document.documentElement.scrollWidth, innerHeight]") == [width, height]
                assert await page.locator(".text").last.evaluate("text => text.scrollWidth <= text.clientWidth")
                await _inside(page, "#title", "#state", "#log", "#text", "#say button")
                assert await page.evaluate(VIOLATIONS) == []
                if width == 360:
                    await page.click("#menu")
                await _inside(page, "#rooms", "#room", "#count", "#name")
                assert await page.evaluate(VIOLATIONS) == []
                if width == 360:
                    await page.keyboard.press("Escape")
                for text in (
                    "h1",
                    "#what",
                    "label",
                    "#count",
                    ".name",
                    ".text",
                    "time",
                    ".face",
                    "small",
                    "#say button",
                ):
                    assert await _contrast(page, text) >= 4.5, (text, scheme)


async def _inside(page: Page, *places: str) -> None:
    width, height = await page.evaluate("[innerWidth, innerHeight]")
    for place in places:
        left, top, right, bottom = await page.locator(place).evaluate(WHERE)
        assert left >= 0, place
        assert top >= 0, place
        assert right <= width, place
        assert bottom <= height, place
