"""The arena's rules, which know no screen and no network: each script runs them with its own time and chance."""

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.async_api import Browser
from support import serving


async def run(browser: Browser, script: str) -> Any:
    """The result of an async function's body, which has the rules as ``World`` and ``update(t, x)`` of a ship."""
    prelude = """
        const World = await import('/static/arena-world.js');
        const update = (t, x, more = {}) =>
            World.read({ t, x, y: 400, vx: 300, vy: 0, a: 0, up: true, ...more });
    """
    async with serving() as site:
        context = await browser.new_context()
        page = await context.new_page()
        await page.goto(f"http://127.0.0.1:{site.port}/health/live")
        try:
            return await page.evaluate(f"async () => {{ {prelude} {script} }}")
        finally:
            await context.close()


async def test_others_move_smoothly_between_updates(browser: Browser) -> None:
    """30 updates a second with uneven delays are shown 144 times a second as one straight, even flight, 100 ms late."""
    gaps = await run(
        browser,
        """
        const stranger = new World.Stranger();
        const delays = [20, 45, 23, 38, 20, 60];
        const arrivals = [];
        for (let i = 0; i < 60; i++) arrivals.push([1e6 + i * 33 + delays[i % 6], update(i * 33, 100 + i * 9.9)]);
        const seen = [];
        for (let now = 1e6 + 300; now < 1e6 + 1900; now += 7) {
            while (arrivals.length && arrivals[0][0] <= now) stranger.hear(arrivals[0][1], arrivals.shift()[0]);
            seen.push(stranger.at(now).x);
        }
        return seen.slice(1).map((x, i) => x - seen[i]);
        """,
    )
    assert len(gaps) > 200
    assert min(gaps) > 1.0
    assert max(gaps) < 3.5


async def test_silence_and_disorder(browser: Browser) -> None:
    """Old and doubled updates are passed over; in silence a ship goes straight on for 100 ms at most, then is gone."""
    seen = await run(
        browser,
        """
        const strangers = new World.Strangers();
        const stranger = strangers.meet('a');
        const heard = [1000, 1033, 1033, 1000, 1066].map((t) => stranger.hear(update(t, t - 900), 5000 + t));
        const at = [6066 + 150, 6066 + 1000, 6066 + 2900].map((now) => stranger.at(now).x);
        strangers.forget(6066 + 2900);
        const kept = strangers.size;
        strangers.forget(6066 + 3100);
        return { heard, at, kept, left: strangers.size };
        """,
    )
    assert seen["heard"] == [True, True, False, False, True]
    near, far, later = seen["at"]
    assert 166 < near < far <= 166 + 30 + 0.001
    assert far == later
    assert (seen["kept"], seen["left"]) == (1, 0)


async def test_a_new_life_is_no_flight(browser: Browser) -> None:
    """Between the end of one life and the next, nobody is seen to cross the arena."""
    places = await run(
        browser,
        """
        const stranger = new World.Stranger();
        stranger.hear(update(0, 100), 1000);
        stranger.hear(update(33, 110, { up: false }), 1033);
        stranger.hear(update(66, 900), 1066);
        return [1100, 1116, 1133, 1150, 1166].map((now) => stranger.at(now)).map(({ x, up }) => up && x);
        """,
    )
    assert places == [100, 100, False, False, 900]


@pytest.mark.parametrize(
    "data",
    [
        "null", "7", "'x'", "[]", "{}", "{ x: 1 }", "{ t: 1, x: NaN, y: 0, vx: 0, vy: 0, a: 0 }",
        "{ t: 1, x: 1e9, y: 0, vx: 0, vy: 0, a: 0 }", "{ t: 1, x: 0, y: 0, vx: 0, vy: 0, a: '0' }",
        "{ t: Infinity, x: 0, y: 0, vx: 0, vy: 0, a: 0 }",
    ],
)  # fmt: skip
async def test_nonsense_is_no_update(browser: Browser, data: str) -> None:
    """What is no ship is nothing; it does not throw."""
    assert await run(browser, f"return World.read({data})") is None


async def test_what_a_shot_meets(browser: Browser) -> None:
    """A shot that jumps over a ship between two steps has hit it; one that passes by, or meets a shield, has not."""
    met = await run(
        browser,
        """
        const ship = { x: 500, y: 400, hidden: 0, shield: 0 };
        const shot = { fromX: 400, fromY: 400, x: 600, y: 400 };
        return [
            World.meets(shot, ship),
            World.meets({ ...shot, fromY: 420, y: 420 }, ship),
            World.meets({ ...shot, x: 450 }, ship),
            World.meets({ fromX: 505, fromY: 400, x: 505, y: 400 }, ship),
            World.meets(shot, { ...ship, shield: 0.1 }),
            World.meets(shot, { ...ship, hidden: 0.1 }),
        ];
        """,
    )
    assert met == [True, False, False, True, False, False]


async def test_ships_stay_in_the_world(browser: Browser) -> None:
    """Whatever one steers, for a minute: inside, finite, and no faster than drag allows."""
    worst = await run(
        browser,
        """
        let seed = 7;
        const random = () => (seed = (seed * 16807) % 2147483647) / 2147483647;
        const ship = World.newShip(random);
        const worst = { out: 0, speed: 0, shots: 0 };
        let controls = {};
        for (let i = 0; i < 3600; i++) {
            if (i % 20 === 0) controls = { turn: Math.round(random() * 2 - 1), thrust: random() < 0.8 };
            World.moveShip(ship, controls, 1 / 60);
            if (World.shoot(ship)) worst.shots++;
            const inside = ship.x > 0 && ship.y > 0 && ship.x < World.WORLD.width && ship.y < World.WORLD.height;
            if (!inside || !Number.isFinite(ship.a)) worst.out++;
            worst.speed = Math.max(worst.speed, Math.hypot(ship.vx, ship.vy));
        }
        return worst;
        """,
    )
    assert worst["out"] == 0
    assert 100 < worst["speed"] < 520
    assert 200 < worst["shots"] < 260


def publications(count: int) -> Iterator[str]:
    """Hits of Ada on Grace as the kept channel brings them."""
    for offset in range(1, count + 1):
        yield (
            f"{{ offset: {offset}, time: 1000, data: {{ by: {{ key: 'a', name: 'Ada' }} }}, "
            "info: { user: 'g', client: 'c', connInfo: { name: 'Grace' } } }"
        )


async def test_the_table_is_the_same_for_all(browser: Browser) -> None:
    """Doubles count once, order does not matter, only the last 300 hits of a day count, whenever one came."""
    rows = await run(
        browser,
        f"""
        const hits = [{", ".join(publications(350))}];
        const [early, late] = [new World.Table(), new World.Table()];
        for (const hit of hits) early.take(hit);
        for (const hit of hits) early.take(hit);
        for (const hit of hits.slice(-300).reverse()) late.take(hit);
        return [early.rows(2000), late.rows(2000), early.rows(1000 + World.TABLE_MS + 1)];
        """,
    )
    expected = [
        {"key": "a", "name": "Ada", "points": 300, "lost": 0},
        {"key": "g", "name": "Grace", "points": 0, "lost": 300},
    ]
    assert rows == [expected, expected, []]


async def test_nobody_scores_on_himself(browser: Browser) -> None:
    """A hit by oneself, by nobody or of nobody is none."""
    taken = await run(
        browser,
        """
        const table = new World.Table();
        const info = { user: 'g', client: 'c' };
        return [
            { offset: 1, time: 1, data: { by: { key: 'g' } }, info },
            { offset: 2, time: 1, data: { by: {} }, info },
            { offset: 3, time: 1, data: null, info },
            { offset: 4, time: 1, data: { by: { key: 'a' } } },
            { offset: 5, time: 1, data: { by: { key: 'a' } }, info },
        ].map((publication) => table.take(publication)?.byName ?? null);
        """,
    )
    assert taken == [None, None, None, None, "Pilot"]


async def test_the_bot_hits_and_can_be_hit(browser: Browser) -> None:
    """Against a ship that stands still, in a minute it scores now and then, and does not every time it shoots."""
    score = await run(
        browser,
        """
        const still = { ...World.newShip(() => 0.5), shield: 0 };
        const bot = World.newShip(() => 0.1);
        const shots = new World.Shots();
        const score = { fired: 0, hits: 0 };
        for (let i = 0; i < 3600; i++) {
            const wish = World.decide(bot, still, i / 60);
            World.moveShip(bot, wish, 1 / 60);
            const shot = wish.fire && World.shoot(bot);
            if (shot) {
                shots.add(shot);
                score.fired++;
                bot.reload *= 2.5;
            }
            shots.move(1 / 60, (one) => World.meets(one, still) && Boolean(++score.hits));
        }
        return score;
        """,
    )
    assert 3 <= score["hits"] < score["fired"]
