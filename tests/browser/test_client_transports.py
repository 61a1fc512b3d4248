"""static/transport-sse.js and static/transport-polling.js under static/client.js: what each can, and how each ends.

What they can is the same as on a WebSocket, from the same positions; what polling
cannot, it refuses.
"""

import asyncio
import itertools
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from playwright.async_api import Browser, Request, Route
from support import Client, Process, config, token
from test_client import Script, order, say, scripting

WITHOUT = ("sse", "polling")
"""The ways without WebSocket."""

FAILED = re.compile("^(Failed to load resource: |EventSource's response |WebSocket connection to '[^']*' failed: )")
"""What a browser says of a request that is refused or not answered; no page can keep it from that."""

WAYS = """async () => {
    const { Sse } = await import('/static/transport-sse.js');
    const { Polling } = await import('/static/transport-polling.js');
    window.polling = new Polling();
    window.ways = { websocket: null, sse: new Sse(), polling };
    window.go = (way, options) => {
        if (way === 'polling') polling.turnTo(options?.first ?? 'chat:1');
        return open({ ...options, transport: ways[way] });
    };
}"""

UNTIL_SEEN = "while ((await (await fetch('/v1/status')).json()).connections < 1);"
"""A poll is a connection while it waits."""


@asynccontextmanager
async def going(browser: Browser, url: str, *, outages: bool = False) -> AsyncIterator[Script]:
    """A script that has ``go(way, options)`` for a client on a way, and ``ways``."""
    async with scripting(browser, url) as script:
        await script.page.evaluate(WAYS)
        yield script
        script.faults = [fault for fault in script.faults if not (outages and FAILED.match(fault))]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A configured server with every way, which tests leave alone."""
    with Process(tmp_path_factory.mktemp("transports"), config(sse={"enabled": True})) as process:
        yield process


@pytest.mark.parametrize("way", WITHOUT)
async def test_every_method(browser: Browser, server: Process, way: str) -> None:
    """What a chat needs is there without a WebSocket: publish, once by key, history, presence, positions."""
    channel = f"chat:methods-{way}"
    async with going(browser, server.http) as script:
        found = await script.run(
            """
            const { way, channel } = given;
            const client = go(way, { first: channel });
            client.connect();
            const chat = watch(client.subscribe(channel), 'chat');
            await chat.ready();
            await client.publish(channel, { text: 'zwölf\\n🎈' });
            const key = 'a "key" \\\\ of this';
            const first = await client.publishOnce(channel, 2, key);
            const again = await client.publishOnce(channel, 2, key);
            await client.publish(channel, [3]);
            const top = await chat.history();
            const newest = await chat.history({ limit: 2, reverse: true });
            const older = await chat.history({ limit: 2, reverse: true, since: { offset: 2, epoch: top.epoch } });
            const oldest = await chat.history({ limit: 1, reverse: true, since: { offset: 1, epoch: top.epoch } });
            const [here, stats] = [await chat.presence(), await chat.presenceStats()];
            return { first, again, top, newest, older, oldest, here, stats };
            """,
            {"way": way, "channel": channel},
        )
        heard = await script.heard("chat", "publication", 3)
    epoch = found["top"]["epoch"]
    assert [(one["offset"], one["data"]) for one in heard] == [(1, {"text": "zwölf\n🎈"}), (2, 2), (3, [3])]
    assert found["first"] == found["again"] == {"offset": 2, "epoch": epoch}
    assert found["top"] == {"publications": [], "offset": 3, "epoch": epoch}
    assert [one["offset"] for one in found["newest"]["publications"]] == [3, 2]
    assert [one["offset"] for one in found["older"]["publications"]] == [1]
    assert found["oldest"]["publications"] == []
    assert (found["newest"]["offset"], found["older"]["offset"]) == (3, 3)
    present = 1 if way == "sse" else 0  # who polls is in no presence
    assert (len(found["here"]), found["stats"]["numClients"]) == (present, present)


async def test_hopping_loses_and_doubles_nothing(browser: Browser, tmp_path: Path) -> None:
    """P3: over random cuts, kills and every change from one way to another, each publication comes once, in order."""
    with Process(tmp_path) as process:
        async with going(browser, process.http, outages=True) as script:
            await script.run("go('websocket').connect(); await watch(client.subscribe('chat:1'), 'chat').ready();")
            pairs = list(itertools.permutations(("websocket", *WITHOUT), 2))
            count = 0
            for turn, (before, after) in enumerate(pairs):
                await script.run("polling.turnTo('chat:1'); client.setTransport(ways[given])", before)
                await say(process, "chat:1", *range(count + 1, count + 4))
                if turn % 2:
                    await script.until("client.state === 'connected'")
                if turn % 3 == 0:
                    await asyncio.to_thread(process.kill)
                    await asyncio.to_thread(process.start)
                await script.run("client.setTransport(ways[given])", after)
                await say(process, "chat:1", *range(count + 4, count + 7))
                count += 6
                heard = await script.heard("chat", "publication", count)
                assert [(one["offset"], one["data"]) for one in heard] == [(at, at) for at in range(1, count + 1)]
            joined = await script.heard("chat", "subscribed")
            assert [one["recovered"] for one in joined[1:]] == [True] * (len(joined) - 1)


async def test_what_is_unanswered_is_asked_again_on_the_next_way(browser: Browser, server: Process) -> None:
    """P5: a publish that a change of ways cuts off rejects as temporary, and by its key happens once on any of them."""
    async with going(browser, server.http, outages=True) as script:
        fates = await script.run(
            """
            go('websocket').connect();
            await client.ready();
            const fates = [];
            for (const way of ['polling', 'sse', 'websocket', 'polling', 'websocket', 'sse', 'polling']) {
                const key = `key ${fates.length}`;
                const asked = refusal(client.publishOnce('chat:cut', key, key));
                polling.turnTo('chat:cut');
                client.setTransport(ways[way]);
                const [fate] = [await asked, await client.ready()];
                await client.publishOnce('chat:cut', key, key);
                fates.push(fate);
            }
            return fates;
            """
        )
    assert fates == [{"code": 2, "temporary": True}] * 7
    raw = await Client.connected(server.url)
    history = await raw.ask("history", channel="chat:cut", limit=-1)
    assert [one["data"] for one in history["publications"]] == [f"key {number}" for number in range(7)]
    await raw.close()


@pytest.mark.parametrize("way", WITHOUT)
async def test_a_way_that_is_not_offered(browser: Browser, tmp_path: Path, way: str) -> None:
    """Where the server has this way switched off, the client says so and does not knock for ever."""
    with Process(tmp_path, config(rest={"disabled": True})) as process:
        async with going(browser, process.http, outages=True) as script:
            await script.run("go(given).connect()", way)
            (told,) = await script.heard("client", "disconnected")
            assert told["code"] == 3508
            assert "here" in told["reason"]
            await script.run("client.setTransport(null); client.connect(); await client.ready();")


async def test_polling_has_to_know_what_to_wait_for(browser: Browser, server: Process) -> None:
    """A programmer who forgot ``turnTo`` is told what was expected."""
    async with going(browser, server.http) as script:
        await script.run("open({ transport: polling }).connect()")
        (told,) = await script.heard("client", "disconnected")
        assert told == {"code": 6, "reason": "expected turnTo(channel) before connecting"}


@pytest.mark.parametrize("way", WITHOUT)
async def test_sent_away(browser: Browser, tmp_path: Path, way: str) -> None:
    """PROTOCOL 2.5.9, 7.2, 17.2.3: an order to go reaches those without WebSocket, and they come back if they may."""
    with Process(tmp_path, config(sse={"enabled": True})) as process:
        async with going(browser, process.http, outages=True) as script:
            await script.run("go(given).connect(); await watch(client.subscribe('chat:1'), 'chat').ready();", way)
            await script.run(UNTIL_SEEN)
            await order(process, "disconnect", user="", disconnect={"code": 3100, "reason": "come back"})
            await script.heard("client", "connected", 2)
            told = await script.heard("client", "connecting", 2)
            assert (told[1]["code"], told[1]["reason"]) == (3100, "come back")
            await script.heard("chat", "subscribed", 2)
            await script.run(UNTIL_SEEN)
            await order(process, "disconnect", user="")
            (told_end,) = await script.heard("client", "disconnected")
            assert told_end == {"code": 3503, "reason": "force disconnect"}


@pytest.mark.parametrize("way", WITHOUT)
async def test_a_token_that_is_none(browser: Browser, server: Process, way: str) -> None:
    """PROTOCOL 7.2: a token that the server does not trust ends the client for good, everywhere by the same code."""
    async with going(browser, server.http, outages=True) as script:
        await script.run("go(given, { token: 'none.at.all' }).connect()", way)
        (told,) = await script.heard("client", "disconnected")
        assert told["code"] == 3500
        assert not await script.run("return heard('client', 'connected')")


@pytest.mark.parametrize("way", WITHOUT)
async def test_a_token_that_expires(browser: Browser, server: Process, way: str) -> None:
    """PROTOCOL 8.3: an old token is replaced by another one, whether it was old already or grows old meanwhile."""
    async with going(browser, server.http, outages=True) as script:
        tokens = [token({"sub": "42", "exp": int(time.time()) + ttl}) for ttl in (-10, 2, 3600, 3600, 3600)]
        await script.run(
            """
            window.fetched = 0;
            const getToken = () => given.tokens[fetched++];
            go(given.way, { getToken, first: 'chat:tokens' }).connect();
            await watch(client.subscribe('chat:tokens'), 'chat').ready();
            """,
            {"tokens": tokens, "way": way},
        )
        await script.until("fetched >= 3")
        await script.until("client.state === 'connected' && client.subscribe('chat:tokens').state === 'subscribed'")
        await script.run("await client.publish('chat:tokens', given)", way)
        heard = await script.heard("chat", "publication")
        assert heard[-1]["info"]["user"] == "42"
        assert not await script.run("return heard('client', 'disconnected')")


async def test_what_polling_cannot(browser: Browser, server: Process) -> None:
    """What needs a connection is refused with 108, and what would cost a request for nothing is not sent."""
    async with going(browser, server.http, outages=True) as script:
        found = await script.run(
            """
            go('polling').connect();
            await client.ready();
            return [
                await refusal(client.subscribe('live:1').ready()),
                await refusal(client.subscribe('chat:tokened', { token: 'a' }).ready()),
                await refusal(client.rpc('anything')),
                await refusal(client.history('chat:1', { limit: 1 })),
                await refusal(client.publishOnce('chat:1', 1, 'schlüssel')),
                await refusal(client.presence('nowhere:1')),
                client.say('live:1', 1),
                client.id,
            ];
            """
        )
    codes = [one["code"] for one in found[:6]]
    assert codes == [108, 108, 108, 108, 107, 102]
    assert found[6:] == [False, ""]


async def test_history_that_is_gone_under_a_poller(browser: Browser, server: Process) -> None:
    """PROTOCOL 11.2.4, 17.1.7: what is erased before a poller asked for it is not recovered, and it is told so."""
    raw = await Client.connected(server.url)
    await raw.ask("publish", channel="chat:gone", data=1)
    async with going(browser, server.http, outages=True) as script:
        await script.page.clock.install(time=0)
        await script.page.clock.pause_at(1_000)
        await script.run(
            """
            go('polling', { first: 'chat:another' }).connect();
            await watch(client.subscribe('chat:gone'), 'chat').ready();
            """
        )
        await raw.ask("publish", channel="chat:gone", data=2)
        await order(server, "history_remove", channel="chat:gone")
        await script.page.clock.run_for(5_000)
        told = await script.heard("chat", "subscribed", 2)
        assert (told[1]["wasRecovering"], told[1]["recovered"]) == (True, False)
        (lost,) = await script.heard("chat", "subscribing")
        assert lost == {"code": 2500, "reason": "insufficient state"}
        await raw.ask("publish", channel="chat:gone", data=3)
        await script.run("polling.turnTo('chat:gone')")
        (heard,) = await script.heard("chat", "publication")
        assert (heard["data"], heard["offset"]) == (3, 3)
    await raw.close()


async def test_a_position_that_is_gone_before_polling_begins(browser: Browser, server: Process) -> None:
    """PROTOCOL 11.3: a change of ways from a position that is gone is no recovery, and it goes on from the top."""
    raw = await Client.connected(server.url)
    await raw.ask("publish", channel="chat:before", data=1)
    async with going(browser, server.http, outages=True) as script:
        await script.run("go('websocket').connect(); await watch(client.subscribe('chat:before'), 'chat').ready();")
        await script.page.context.set_offline(True)
        await script.heard("client", "connecting", 2)
        await raw.ask("publish", channel="chat:before", data=2)
        await order(server, "history_remove", channel="chat:before")
        await script.run("polling.turnTo('chat:before'); client.setTransport(polling)")
        await script.page.context.set_offline(False)
        told = await script.heard("chat", "subscribed", 2)
        assert (told[1]["wasRecovering"], told[1]["recovered"], told[1]["position"]["offset"]) == (True, False, 2)
        await raw.ask("publish", channel="chat:before", data=3)
        (heard,) = await script.heard("chat", "publication")
        assert (heard["data"], heard["offset"]) == (3, 3)
    await raw.close()


async def test_pollers_wait_for_one_channel_and_ask_for_the_others(browser: Browser, server: Process) -> None:
    """The first channel comes by itself, another only when its time has come, and at once when somebody turns to it."""
    async with going(browser, server.http) as script:
        await script.page.clock.install(time=0)
        await script.page.clock.pause_at(1_000)
        await script.run(
            """
            go('polling', { first: 'chat:one' }).connect();
            for (const name of ['one', 'two']) await watch(client.subscribe(`chat:${name}`), name).ready();
            """
        )
        await say(server, "chat:two", "a")
        await say(server, "chat:one", "b")
        await script.heard("one", "publication")
        assert not await script.run("return heard('two', 'publication')")
        await script.page.clock.run_for(5_000)
        await script.heard("two", "publication")
        await script.run("polling.turnTo('chat:two')")
        await say(server, "chat:two", "c")
        heard = await script.heard("two", "publication", 2)
        assert [one["data"] for one in heard] == ["a", "c"]
        assert [one["data"] for one in await script.heard("one", "publication")] == ["b"]


async def test_a_long_absence_is_caught_up_page_by_page(browser: Browser, server: Process) -> None:
    """PROTOCOL 17.1.6: more than one page is fetched in one go, also of a channel that is not waited for."""
    async with going(browser, server.http) as script:
        await script.run("go('websocket').connect(); await watch(client.subscribe('chat:long'), 'chat').ready();")
        await script.run("client.disconnect()")
        await say(server, "chat:long", *range(1, 331))
        await script.page.clock.install(time=0)
        await script.page.clock.pause_at(1_000)
        await script.run("polling.turnTo('chat:1'); client.setTransport(polling); client.connect();")
        await script.heard("chat", "subscribed", 2)
        await script.page.clock.run_for(5_000)
        heard = await script.heard("chat", "publication", 330)
        assert [one["offset"] for one in heard] == list(range(1, 331))


@pytest.mark.parametrize("way", WITHOUT)
async def test_a_server_that_falls_silent(browser: Browser, tmp_path: Path, way: str) -> None:
    """A stream without pings (PROTOCOL 2.4) and a poll without an answer are given up, and made anew."""
    with Process(tmp_path, config(sse={"enabled": True})) as process:
        async with going(browser, process.http, outages=True) as script:
            await script.page.clock.install()
            await script.run("go(given).connect(); await watch(client.subscribe('chat:1'), 'chat').ready();", way)
            await script.run(UNTIL_SEEN)
            process.send(signal.SIGSTOP)
            try:
                await script.page.clock.fast_forward(40_000)
                told = await script.heard("client", "connecting", 2)
            finally:
                process.send(signal.SIGCONT)
            assert told[1]["code"] == (5 if way == "sse" else 2)
            await script.heard("chat", "subscribed", 2)
            assert (await script.heard("chat", "subscribed", 2))[-1]["recovered"]


# --- what goes over the wire by SSE -----------------------------------------------
async def test_what_is_said_together_goes_together(browser: Browser, server: Process) -> None:
    """PROTOCOL 2.5.6: a hundred commands at once are a few requests, one after another, and done in order."""
    posts: list[Request] = []
    async with going(browser, server.http) as script:
        script.page.on("request", lambda request: posts.append(request) if "/emulation" in request.url else None)
        await script.run(
            """
            go('sse').connect();
            await client.ready();
            const publish = (_, at) => client.publish('chat:many', [at + 1, '☔'.repeat(500)]);
            await Promise.all(Array.from({ length: 100 }, publish));
            """
        )
        bodies = [request.post_data or "" for request in posts]
        assert 2 < len(bodies) < 10
        assert max(len(body.encode()) for body in bodies) < 65_536
    raw = await Client.connected(server.url)
    history = await raw.ask("history", channel="chat:many", limit=-1)
    assert [one["data"][0] for one in history["publications"]] == list(range(1, 101))
    await raw.close()


async def test_what_is_too_large_ends_it_for_good(browser: Browser, server: Process) -> None:
    """As on a WebSocket (PROTOCOL 2.3.7): what is too large once would be so again, so that nobody tries for ever."""
    async with going(browser, server.http, outages=True) as script:
        await script.run("go('sse').connect(); await client.ready();")
        fate = await script.run("return refusal(client.publish('chat:1', 'x'.repeat(70_000)))")
        assert fate == {"code": 2, "temporary": True}
        (told,) = await script.heard("client", "disconnected")
        assert told == {"code": 1009, "reason": "message too big"}


async def test_typing_marks_are_dropped_before_they_pile_up(browser: Browser, server: Process) -> None:
    """What is only said does not wait behind more than 64 KB."""
    async with going(browser, server.http) as script:
        said = await script.run(
            """
            go('sse').connect();
            await client.ready();
            return Array.from({ length: 12 }, () => client.say('live:1', 'x'.repeat(10_000)));
            """
        )
        assert said == [True] * 7 + [False] * 5


async def test_a_post_that_gets_lost(browser: Browser, server: Process) -> None:
    """A request that is not answered leaves its commands unknown: the connection is given up, and nothing is missed."""
    async with going(browser, server.http, outages=True) as script:
        await script.run("go('sse').connect(); await watch(client.subscribe('chat:lost'), 'chat').ready();")
        await script.page.route("**/emulation", lambda route: route.abort(), times=1)
        fate = await script.run("return refusal(client.publishOnce('chat:lost', 1, 'key'))")
        assert fate == {"code": 2, "temporary": True}
        await say(server, "chat:lost", 2)
        await script.heard("client", "connected", 2)
        await script.run("await client.publishOnce('chat:lost', 1, 'key')")
        heard = await script.heard("chat", "publication", 2)
        assert [(one["data"], one["offset"]) for one in heard] == [(2, 1), (1, 2)]


@pytest.mark.parametrize("body", ["<h1>Oops", "null", '{"hello": 1}'])
@pytest.mark.parametrize("status", [200, 502])
@pytest.mark.parametrize(("way", "path"), [("polling", "**/v1/channels/**"), ("sse", "**/connection/sse*")])
async def test_an_answer_that_is_none(
    browser: Browser, server: Process, way: str, path: str, status: int, body: str
) -> None:
    """P8: a proxy's error page, or a portal's, in place of an answer is a lost connection, and the next is made."""

    async def answer(route: Route) -> None:
        await route.fulfill(status=status, body=body, content_type="text/html")

    async with going(browser, server.http, outages=True) as script:
        await script.page.route(path, answer, times=1)
        await script.run("go(given).connect(); await client.ready()", way)
        told = await script.heard("client", "connecting", 2)
        assert [one["code"] for one in told] == [0, 2]
