"""The arena in a real browser: tabs that fly against each other, a server that is killed, lost replies, nonsense."""

import json
import re
from asyncio import gather, timeout
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count, pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

from playwright.async_api import Browser, Page, WebSocketRoute, expect
from support import ROOT, Client, Process, config
from tornado.httpclient import AsyncHTTPClient
from wires import Wire

PATIENCE_MS = 15_000
RETURN_MS = 60_000  # after an outage: the attempts to come back are up to 20 s apart
AXE = (ROOT / "tests" / "sdk" / "node_modules" / "axe-core" / "axe.min.js").read_text
VIOLATIONS = "() => axe.run().then(({ violations }) => violations.map(({ id, nodes }) => [id, nodes[0].html]))"
UNREACHABLE = re.compile(r"^WebSocket connection to '[^']*' failed: ")
SCHEMES: list[Literal["light", "dark"]] = ["light", "dark"]

PLACE = """([x, y, a, shield = 0]) =>
    Object.assign(arena.me, { x, y, a, vx: 0, vy: 0, hidden: 0, shield, reload: 0 })"""
REMEMBERED = """(([it]) => it && Object.defineProperty(it, 'heardAt', { get: () => Infinity, set() {} }))(
    [...arena.strangers.values()])"""
"""The only other ship is not forgotten, however long nothing is heard of it."""

STRUCK = """([x, y]) => {
    const [id] = arena.strangers.keys();
    arena.shots.add({ x: x - 5, y, vx: 300, vy: 0, id: `${id}:late`, from: id });
}"""
"""A shot of the only other ship that was on its way already hits ours, which stands there."""

HIT_BOT = f"""() => {{
    ({PLACE})([600, 400, 0]);
    Object.assign(arena.bot, {{ x: 645, y: 400, vx: 0, vy: 0, hidden: 0, shield: 0, reload: 9 }});
    arena.shoot();
}}"""
"""It is so near that it has no time to get away."""

TAP = """() => {
    for (const kind of ['keydown', 'keyup']) dispatchEvent(new KeyboardEvent(kind, { code: 'Space' }));
    return [...arena.shots].filter(shot => shot.from === 'me').length;
}"""
"""A tap on the key that shoots, within one turn of the page; how many shots there are then."""

NAMED = "name => [...arena.strangers.values()].some(it => it.name === name)"
SEEN = "() => { const [it] = arena.strangers.values(); return it?.at(performance.timeOrigin + performance.now()) }"


class Pilot:
    """One tab of its own visitor."""

    def __init__(self, page: Page, url: str, name: str) -> None:
        self.page = page
        self.url = url
        self.name = name
        self.faults: list[str] = []
        self.sent: list[dict[str, Any]] = []
        page.on("console", lambda message: self.faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("websocket", lambda socket: socket.on("framesent", self._note))

    def _note(self, frame: str | bytes) -> None:
        if isinstance(frame, str):
            self.sent += [json.loads(line) for line in frame.split("\n")]

    async def fly(self) -> None:
        """Open the page, say who one is, and be in the air."""
        await self.page.goto(f"{self.url}/arena")
        await self.page.fill("#name", self.name)
        await self.page.press("#name", "Enter")
        await self.until("arena.client?.state === 'connected'")

    async def remembers(self) -> None:
        """Keep the only other ship, so that a shot of it can arrive when nothing else does."""
        await self.until(REMEMBERED)

    async def is_hit(self, x: float = 300, y: float = 300) -> None:
        """While nobody can be told, let a shot arrive that the other one, who is remembered, has fired before."""
        await self.place(x, y)
        await self.page.evaluate(STRUCK, [x, y])
        await self.until("sessionStorage.getItem('arena.hits') !== '{}'")

    async def until(self, condition: str, given: Any = None, *, patience_ms: float = PATIENCE_MS) -> None:
        """Wait until an expression is true in the page."""
        await self.page.wait_for_function(f"given => {condition}", arg=given, timeout=patience_ms)

    async def place(self, x: float, y: float, angle: float = 0.0, shield_s: float = 0.0) -> None:
        """Stand still at a place, and be hit by nobody until so long is over or one shoots."""
        await self.page.evaluate(PLACE, [x, y, angle, shield_s])

    async def sees(self, x: float, y: float) -> None:
        """Wait until the other's ship is shown at a place."""
        await self.until(f"(it => it && Math.hypot(it.x - given[0], it.y - given[1]) < 3)(({SEEN})())", [x, y])

    async def shows(self, *rows: tuple[str, int, int]) -> None:
        """Wait until the table has exactly these rows: name, hits, lost."""
        cells = self.page.locator("#rows tr")
        texts = [f"{name}{hits}{lost}" for name, hits, lost in rows]
        await expect(cells).to_have_text(texts, timeout=PATIENCE_MS)


@asynccontextmanager
async def pilots(
    browser: Browser,
    url: str,
    *names: str,
    route: Callable[[WebSocketRoute], None] | None = None,
    outages: bool = False,
    **context: Any,
) -> AsyncIterator[list[Pilot]]:
    """Tabs in the air, the last one through ``route``; in the end no console may have complained, but of outages.

    They are small if nothing else is said: a sky is painted sixty times a second, and that is most of what they cost.
    """
    context = {"viewport": {"width": 640, "height": 360}, **context}
    flying: list[Pilot] = []
    try:
        for name in names:
            visitor = await browser.new_context(locale="en-GB", **context)
            flying.append(Pilot(await visitor.new_page(), url, name))
            if route is not None and name == names[-1]:
                await flying[-1].page.route_web_socket(re.compile("/connection/websocket"), route)
            await flying[-1].fly()
        yield flying
        faults = [fault for pilot in flying for fault in pilot.faults]
        assert [fault for fault in faults if not (outages and UNREACHABLE.match(fault))] == []
    finally:
        for pilot in flying:
            await pilot.page.context.close()


async def duel(shooter: Pilot, target: Pilot) -> None:
    """Put two ships face to face, and let one shoot the other."""
    await target.place(700, 400)
    await shooter.place(500, 400)
    await shooter.sees(700, 400)
    await target.sees(500, 400)
    await target.place(700, 400)
    await shooter.place(500, 400)
    await gather(target.until("arena.me.hidden > 0"), shooter.page.keyboard.press("Space"))


async def hits(process: Process) -> list[dict[str, Any]]:
    """All that the kept channel has, asked for by a client that is no browser."""
    client = await Client.connected(process.url)
    history = await client.ask("history", channel="game:arena", limit=-1)
    await client.close()
    return list(history["publications"])


async def test_each_sees_the_other_fly(browser: Browser, tmp_path: Path) -> None:
    """A ship that moves here moves there, through updates of 30 a second at most; who closes the tab is gone."""
    with Process(tmp_path) as process:
        async with pilots(browser, process.http, "Ada", "Grace") as (ada, grace):
            for one, other in ((ada, grace), (grace, ada)):
                await one.until("arena.strangers.size === 1")
                await one.until("[...arena.strangers.values()][0]?.name === given", other.name)
                await one.place(300, 300)
                await other.sees(300, 300)
                await one.page.keyboard.down("ArrowUp")
                await other.until(f"({SEEN})()?.x > 400")
                await other.until(f"({SEEN})()?.on")
                await one.page.keyboard.up("ArrowUp")
                await one.place(900, 500)
                await other.sees(900, 500)
            times = [said["publish"]["data"]["t"] for said in ada.sent if "publish" in said]
            gaps_ms = [after - before for before, after in pairwise(times)]
            assert 1000 / mean(gaps_ms) < 31
            assert 1000 / median(gaps_ms) > 15, "but for standstills"
            await expect(ada.page.locator("#state")).to_have_text("Live · 2 ships")
            await grace.page.close()
            await ada.until("arena.strangers.size === 0")


async def test_a_hit_counts_once_for_both_and_for_ever(browser: Browser, tmp_path: Path) -> None:
    """P2, P5: both tables say the same; a reload, a kill -9 of the server and a late joiner see it, too."""
    with Process(tmp_path) as process:
        async with pilots(browser, process.http, "Ada", "Grace", outages=True) as (ada, grace):
            await duel(ada, grace)
            for pilot in (ada, grace):
                await pilot.shows(("Ada", 1, 0), ("Grace", 0, 1))
            await expect(ada.page.locator("#rows .me")).to_have_text("Ada10")
            await grace.fly()
            await grace.shows(("Ada", 1, 0), ("Grace", 0, 1))
            await expect(grace.page.locator("#rows .me")).to_have_text("Grace01")

            process.kill()
            await expect(ada.page.locator("#state")).to_contain_text("Connection lost", timeout=PATIENCE_MS)
            process.start()
            for pilot in (ada, grace):
                back = "arena.client.state === 'connected' && arena.strangers.size === 1"
                await pilot.until(back, patience_ms=RETURN_MS)
            await duel(grace, ada)
            for pilot in (ada, grace):
                await pilot.shows(("Ada", 1, 1), ("Grace", 1, 1))
            assert [hit["info"]["conn_info"]["name"] for hit in await hits(process)] == ["Grace", "Ada"]
            async with pilots(browser, process.http, "Late") as (late,):
                await late.shows(("Ada", 1, 1), ("Grace", 1, 1))


async def test_the_network_is_cut(browser: Browser, tmp_path: Path) -> None:
    """P3, P5: who is offline misses no hit of others and loses none of his own; each is in the kept channel once."""
    with Process(tmp_path) as process:
        async with pilots(browser, process.http, "Ada", "Grace", outages=True) as (ada, grace):
            await duel(ada, grace)
            await ada.shows(("Ada", 1, 0), ("Grace", 0, 1))
            await ada.remembers()
            await ada.page.context.set_offline(True)
            await expect(ada.page.locator("#state")).to_contain_text("Connection lost", timeout=PATIENCE_MS)
            await ada.is_hit()
            async with pilots(browser, process.http, "Hopper") as (hopper,):
                await grace.until("arena.strangers.size === 1 && [...arena.strangers.values()][0].name === 'Hopper'")
                await hopper.until("arena.strangers.size === 1")
                await duel(hopper, grace)
                await grace.shows(("Ada", 1, 0), ("Hopper", 1, 0), ("Grace", 0, 2))
            await expect(ada.page.locator("#rows tr")).to_have_count(2)
            assert len(await hits(process)) == 2
            await ada.page.context.set_offline(False)
            for pilot in (ada, grace):
                await pilot.shows(("Hopper", 1, 0), ("Ada", 1, 1), ("Grace", 1, 2))
            await ada.until("sessionStorage.getItem('arena.hits') === '{}'")
            await ada.until("arena.strangers.size === 1")
            assert [hit["info"]["conn_info"]["name"] for hit in await hits(process)] == ["Grace", "Grace", "Ada"]


async def test_a_cut_that_nobody_tells_and_a_reload_in_the_middle(browser: Browser, tmp_path: Path) -> None:
    """P5: a wire breaks, one is hit, and reloads before it is mended: the hit is told once, by the same pilot."""
    with Process(tmp_path) as process:
        async with Wire(process.port) as wire, pilots(browser, process.http, "Grace", outages=True) as (grace,):
            async with pilots(browser, wire.http, "Ada", outages=True) as (ada,):
                await duel(grace, ada)
                await grace.shows(("Grace", 1, 0), ("Ada", 0, 1))
                await ada.remembers()
                await wire.end()
                await expect(ada.page.locator("#state")).to_contain_text("Connection lost", timeout=PATIENCE_MS)
                await grace.until("arena.strangers.size === 0")
                await ada.is_hit()
                await ada.page.goto("about:blank")
                assert len(await hits(process)) == 1
                await wire.mend()
                await ada.fly()
                for pilot in (ada, grace):
                    await pilot.shows(("Grace", 2, 0), ("Ada", 0, 2))
                await expect(ada.page.locator("#rows .me")).to_have_text("Ada02")
                await ada.until("sessionStorage.getItem('arena.hits') === '{}'")
                await ada.page.reload()
                await ada.fly()
                await ada.shows(("Grace", 2, 0), ("Ada", 0, 2))
                assert len(await hits(process)) == 2


async def test_a_hit_whose_answer_gets_lost_counts_once(browser: Browser, tmp_path: Path) -> None:
    """P5: whoever was hit says so again when the connection is back, by the shot's id, and it counts once."""
    lost: list[dict[str, Any]] = []

    def lossy(page: WebSocketRoute) -> None:
        server = page.connect_to_server()

        async def answer(frame: str | bytes) -> None:
            replies = [json.loads(line) for line in str(frame).split("\n")]
            answered = [reply for reply in replies if "rpc" in reply]
            if answered and not lost:
                lost.extend(answered)
                await page.close(code=3012, reason="no pong")
                await server.close()
            else:
                page.send(frame)

        server.on_message(answer)

    with Process(tmp_path) as process:
        async with pilots(browser, process.http, "Ada", "Grace", route=lossy) as (ada, grace):
            await duel(ada, grace)
            await ada.shows(("Ada", 1, 0), ("Grace", 0, 1))
            await grace.until("sessionStorage.getItem('arena.hits') === '{}' && arena.client.state === 'connected'")
            await grace.shows(("Ada", 1, 0), ("Grace", 0, 1))
            assert lost
            assert len(await hits(process)) == 1


async def test_a_bot_for_whoever_is_alone(browser: Browser, tmp_path: Path) -> None:
    """It comes when nobody else is here, is gone when somebody is, comes back; its hits stay in the page."""
    with Process(tmp_path) as process:
        async with pilots(browser, process.http, "Ada") as (ada,):
            await ada.until("arena.bot")
            await expect(ada.page.locator("#state")).to_have_text("Live · you and a bot")
            await ada.page.evaluate(HIT_BOT)
            await expect(ada.page.locator("#practice")).to_contain_text("you 1", timeout=PATIENCE_MS)
            async with pilots(browser, process.http, "Grace") as (grace,):
                await ada.until("!arena.bot && arena.strangers.size === 1")
                await grace.until("!arena.bot && arena.strangers.size === 1")
            await ada.until("arena.bot")
            assert await hits(process) == []
            await expect(ada.page.locator("#rows tr")).to_have_count(0)


async def test_what_others_send_is_never_markup_nor_harm(browser: Browser, tmp_path: Path) -> None:
    """Names of tags are text; nonsense in both channels is passed over, and the game goes on."""
    evil = "<img src=x onerror=alert(1)>"
    nonsense: list[Any] = [
        None, 7, "x", [], {}, {"x": None}, {"t": 1, "x": 1e999, "y": 0, "vx": 0, "vy": 0, "a": 0},
        {"t": "now", "x": 1, "y": 1, "vx": 1, "vy": 1, "a": 1}, {"by": None}, {"by": {"key": 7}}, {"by": {"key": ""}},
        {"t": 1, "x": 1, "y": 1, "vx": 1, "vy": 1, "a": 1, "shots": [None, 7, {"id": 7}, {"id": "s", "x": "1"}]},
    ]  # fmt: skip
    with Process(tmp_path) as process:
        body = json.dumps({"name": evil})
        answer = await AsyncHTTPClient().fetch(f"{process.http}/v1/session", method="POST", body=body)
        mallory = await Client.connected(process.url, token=json.loads(answer.body)["token"])
        async with pilots(browser, process.http, "Ada") as (ada,):
            for data in nonsense:
                for channel in ("live:arena", "game:arena"):
                    await mallory.raw(
                        json.dumps(mallory.command("publish", channel=channel, data=data)).replace("Infinity", "1e999")
                    )
            ship = {"x": 600, "y": 300, "vx": 0, "vy": 0, "a": 0, "up": True, "name": evil}
            await mallory.ask("publish", channel="game:arena", data={"by": {"key": "guest-x", "name": "</td><script>"}})
            async with timeout(PATIENCE_MS / 1000):
                for t in count(5):  # who says nothing any more is soon forgotten
                    await mallory.ask("publish", channel="live:arena", data={**ship, "t": t})
                    if await ada.page.evaluate(NAMED, evil):
                        break
            await ada.shows(("</td><script>", 1, 0), (evil, 0, 1))
            assert await ada.page.locator("img, section script").count() == 0
            await ada.place(300, 300)
            await ada.page.keyboard.down("ArrowUp")
            await ada.until("arena.me.x > 350")
        await mallory.close()


async def test_a_name_that_is_none_is_told(browser: Browser, tmp_path: Path) -> None:
    """The server's reason stands beside the field, and another name is let in."""
    with Process(tmp_path) as process:
        visitor = await browser.new_context()
        page = await visitor.new_page()
        await page.goto(f"{process.http}/arena")
        await page.fill("#name", "\u200b \u202e")
        await page.click("#start button")
        await expect(page.locator("#fault")).to_have_text("a name needs at least one character that can be seen")
        await page.fill("#name", "Ada")
        await page.press("#name", "Enter")
        await expect(page.locator("#state")).to_contain_text("Live", timeout=PATIENCE_MS)
        await visitor.close()


async def test_a_server_that_keeps_no_table(browser: Browser, tmp_path: Path) -> None:
    """Where guests and the kept channel are not offered, one flies all the same, and reads what is missing."""
    with Process(tmp_path, config()) as process:
        visitor = await browser.new_context()
        page = await visitor.new_page()
        await page.goto(f"{process.http}/arena")
        await page.fill("#name", "Ada")
        await page.press("#name", "Enter")
        await expect(page.locator("#state")).to_have_text("No table is kept: unknown channel", timeout=PATIENCE_MS)
        await page.evaluate(PLACE, [300, 300, 0])
        await page.keyboard.down("ArrowUp")
        await page.wait_for_function("() => arena.me.x > 350", timeout=PATIENCE_MS)
        await visitor.close()


async def test_by_touch(browser: Browser, tmp_path: Path) -> None:
    """A finger on the sky steers and thrusts towards it until it is lifted, and another one shoots."""
    viewport = {"width": 360, "height": 740}
    with Process(tmp_path) as process:
        async with pilots(
            browser, process.http, "Ada", viewport=viewport, has_touch=True, is_mobile=True, device_scale_factor=2
        ) as (ada,):
            await ada.place(600, 400)
            touch = await ada.page.context.new_cdp_session(ada.page)
            finger = [{"x": 330, "y": 310}]
            await touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": finger})
            await ada.until("arena.me.x > 640 && arena.me.on")
            await touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
            await ada.until("!arena.me.on")
            await ada.place(600, 400, -1.57, shield_s=60)  # a bot may have come
            await gather(ada.until("[...arena.shots].some(shot => shot.from === 'me')"), ada.page.tap("#fire"))


async def test_by_keyboard_alone(browser: Browser, tmp_path: Path) -> None:
    """From the address to the first shot, and from there to the table and out of the page, without a pointer."""
    with Process(tmp_path) as process:
        visitor = await browser.new_context(viewport={"width": 1280, "height": 800})
        page = await visitor.new_page()
        await page.goto(f"{process.http}/arena")

        async def tab_to(selector: str) -> None:
            for _ in range(8):
                if await page.locator(selector).evaluate("it => it === document.activeElement"):
                    return
                await page.keyboard.press("Tab")
            raise AssertionError(f"no way to {selector}")

        await tab_to("#name")
        await page.keyboard.type("Ada")
        await tab_to("#start button")
        await page.keyboard.press("Enter")
        await page.wait_for_function("() => arena.client?.state === 'connected'", timeout=PATIENCE_MS)
        await expect(page.locator("#sky")).to_be_focused()
        await page.evaluate(PLACE, [300, 300, 0])
        await page.keyboard.down("KeyW")
        await page.wait_for_function("() => arena.me.x > 350", timeout=PATIENCE_MS)
        await page.keyboard.up("KeyW")
        await page.keyboard.down("Space")  # until it is seen: a shot is soon gone, and a bot may have hit her
        await page.wait_for_function("() => [...arena.shots].some(shot => shot.from === 'me')", timeout=PATIENCE_MS)
        await page.keyboard.up("Space")
        await tab_to("#scroll")
        await tab_to("header a")
        await page.keyboard.press("Enter")
        await expect(page.locator("#state")).to_have_text("It works", timeout=PATIENCE_MS)
        await visitor.close()


async def test_a_tap_that_no_frame_sees(browser: Browser, tmp_path: Path) -> None:
    """A key that is pressed and released between two frames shoots; one that is held goes on shooting."""
    with Process(tmp_path) as process:
        async with pilots(browser, process.http, "Ada") as (ada,):
            await ada.place(300, 300, shield_s=60)
            assert await ada.page.evaluate(TAP) == 1
            await ada.place(300, 300, shield_s=60)
            await ada.page.keyboard.down("Space")
            await ada.until("[...arena.shots].filter(shot => shot.from === 'me').length >= 3")


async def test_keys_are_let_go_when_the_page_is_left(browser: Browser, tmp_path: Path) -> None:
    """A key whose release went elsewhere does not thrust for ever."""
    with Process(tmp_path) as process:
        async with pilots(browser, process.http, "Ada") as (ada,):
            await ada.page.keyboard.down("ArrowUp")
            await ada.until("arena.me.on")
            await ada.page.evaluate("dispatchEvent(new Event('blur'))")
            await ada.until("!arena.me.on")


async def test_accessible_and_nothing_sticks_out(browser: Browser, tmp_path: Path) -> None:
    """axe finds nothing before and in flight, in light and dark, with motion and without; no sideways scrolling."""
    with Process(tmp_path) as process:
        for width, height in ((360, 740), (768, 1024), (1280, 800)):
            for scheme in SCHEMES:
                visitor = await browser.new_context(
                    viewport={"width": width, "height": height},
                    color_scheme=scheme,
                    reduced_motion="reduce" if width == 768 else "no-preference",
                )
                ada = Pilot(await visitor.new_page(), process.http, "Ada")
                await ada.page.goto(f"{process.http}/arena")
                await ada.page.evaluate(AXE())
                assert await ada.page.evaluate(VIOLATIONS) == [], (width, scheme)
                await ada.fly()
                await ada.page.evaluate(AXE())
                assert await ada.page.evaluate(VIOLATIONS) == [], (width, scheme)
                assert await ada.page.evaluate("document.documentElement.scrollWidth") <= width
                assert ada.faults == []
                await visitor.close()
