"""static/client.js in a real browser against real servers: every method, and every way in which a connection ends."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, ConsoleMessage, Page, WebSocketRoute
from support import OPEN, ROOT, Client, Process, config, token

PATIENCE_MS = 60_000  # for after an outage as well: the attempts to come back are up to 20 s apart
UNREACHABLE = re.compile(r"^WebSocket connection to '[^']*' failed: ")

PRELUDE = """async () => {
    Object.assign(window, await import('/static/client.js'));
    window.told = [];
    const events = ['connecting', 'connected', 'disconnected', 'subscribing', 'subscribed', 'unsubscribed',
        'publication', 'join', 'leave'];
    window.watch = (speaker, name) => {
        for (const event of events) speaker.on(event, context => told.push({ name, event, ...context }));
        return speaker;
    };
    window.heard = (name, event) => told.filter(it => it.name === name && it.event === event);
    window.refusal = promise => promise.then(() => null, ({ code, temporary }) => ({ code, temporary }));
    window.open = (options, url) => window.client = watch(new Client(url, options), 'client');
}"""


class Script:
    """A page of the server that has nothing on it but client.js; scripts run in it.

    Scripts may use ``Client``, ``open(options)`` for a client named "client" that is
    watched, ``watch(speaker, name)`` and ``heard(name, event)``.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self.faults: list[str] = []
        self.sockets = 0
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("websocket", self._count)

    def _note(self, message: ConsoleMessage) -> None:
        if message.type == "error" and not message.location["url"].endswith("/favicon.ico"):
            self.faults.append(message.text)

    def _count(self, socket: object) -> None:
        self.sockets += 1

    async def run(self, script: str, given: Any = None) -> Any:
        """The result of an async function's body, which may use ``given``; as JSON, so what is undefined is absent."""
        body = "async given => JSON.stringify((await (async () => {" + script + "})()) ?? null)"
        return json.loads(await self.page.evaluate(body, given))

    async def until(self, condition: str, given: Any = None) -> None:
        """Wait until an expression is true in the page; of a promise see ``until_told``."""
        await self.page.wait_for_function("given => " + condition, arg=given, timeout=PATIENCE_MS, polling=20)

    async def until_told(self, question: str) -> None:
        """Ask until the answer, which an expression has a promise of, is true: ``until`` takes any promise for true."""
        async with asyncio.timeout(PATIENCE_MS / 1000):
            while not await self.run(f"return {question}"):
                pass

    async def heard(self, name: str, event: str, count: int = 1) -> list[dict[str, Any]]:
        """Wait for ``count`` events of this kind; returns the contexts of all there are."""
        await self.until("heard(given[0], given[1]).length >= given[2]", [name, event, count])
        told = await self.run("return heard(given[0], given[1])", [name, event])
        return [{key: value for key, value in one.items() if key not in ("name", "event")} for one in told]


@asynccontextmanager
async def scripting(browser: Browser, url: str, *, outages: bool = False) -> AsyncIterator[Script]:
    """A script at the server of ``url``; no console may have complained, but of failed connections with ``outages``."""
    context = await browser.new_context()
    script = Script(await context.new_page())
    try:
        await script.page.goto(f"{url}/health/live")
        await script.page.evaluate(PRELUDE)
        yield script
        assert not [fault for fault in script.faults if not (outages and UNREACHABLE.match(fault))]
    finally:
        await context.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A configured server that tests leave alone; ``held`` grants joins, leaves and recovery to those who ask."""
    kept = {"history_size": 100, "history_ttl": "1h"}
    held = {"name": "held", **OPEN, **kept, "presence": True, "join_leave": True, "allow_recovery": True}
    namespaces = [*config()["channel"]["namespaces"], held, {"name": "closed", **kept}]
    with Process(tmp_path_factory.mktemp("client"), config(channel={"namespaces": namespaces})) as process:
        yield process


async def say(process: Process, channel: str, *data: Any) -> None:
    """Publish as somebody else."""
    raw = await Client.connected(process.url)
    for one in data:
        await raw.ask("publish", channel=channel, data=one)
    await raw.close()


async def order(process: Process, method: str, **request: Any) -> None:
    """Call the back-end API."""
    reader, writer = await asyncio.open_connection("127.0.0.1", process.port)
    body = json.dumps(request)
    head = f"POST /api/{method} HTTP/1.1\r\nHost: x\r\nX-API-Key: api-key\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    answer = (await reader.read()).decode()
    writer.close()
    assert '"result"' in answer, answer


# --- commands -------------------------------------------------------------------
async def test_every_method(browser: Browser, server: Process) -> None:
    """Publish, publish once, say, history, presence and rpc do what client.d.ts says, in its shapes."""
    async with scripting(browser, server.http) as script:
        found = await script.run(
            """
            const client = open({ name: 'test', data: { any: 1 } });
            client.connect();
            await new Promise(resolve => client.on('connected', resolve));
            const chat = watch(client.subscribe('chat:methods'), 'chat');
            await new Promise(resolve => chat.on('subscribed', resolve));
            const results = { id: client.id };
            results.published = await chat.publish({ text: 'one' });
            results.once = await client.publishOnce('chat:methods', { text: 'two' }, 'key 1');
            results.again = await client.publishOnce('chat:methods', { text: 'two' }, 'key 1');
            await client.publish('chat:methods', 'three');
            results.said = client.say('chat:methods', null);
            results.all = await chat.history({ limit: -1 });
            results.page = await chat.history({ limit: 1, since: { offset: 1, epoch: results.once.epoch } });
            results.reverse = await client.history('chat:methods', { limit: 2, reverse: true });
            results.top = await chat.history();
            results.presence = await chat.presence();
            results.stats = await chat.presenceStats();
            results.passing = await client.publishOnce('live:methods', 1, 'key 2');
            results.position = chat.position;
            return results;
            """
        )
        me = {"user": "", "client": found["id"]}
        epoch = found["once"]["epoch"]
        assert found["once"] == found["again"] == {"offset": 2, "epoch": epoch}
        assert found["said"] is True
        assert found["position"] == {"offset": 4, "epoch": epoch}
        publications = found["all"].pop("publications")
        assert found["all"] == {"offset": 4, "epoch": epoch}
        assert found["top"] == {"offset": 4, "epoch": epoch, "publications": []}
        assert [one["data"] for one in publications] == [{"text": "one"}, {"text": "two"}, "three", None]
        assert [one["offset"] for one in publications] == [1, 2, 3, 4]
        assert all(one["info"] == me and one["time"] > 1_700_000_000_000 for one in publications)
        assert [one["data"] for one in found["page"]["publications"]] == [{"text": "two"}]
        assert [one["offset"] for one in found["reverse"]["publications"]] == [4, 3]
        assert found["presence"] == {found["id"]: me}
        assert found["stats"] == {"numClients": 1, "numUsers": 1}
        assert found["passing"] == {}
        assert await script.heard("chat", "publication", 4) == publications


async def test_refusals_carry_their_code(browser: Browser, server: Process) -> None:
    """PROTOCOL 7.1: an error of the server rejects with its code, and says whether trying again may help."""
    async with scripting(browser, server.http) as script:
        refused = await script.run(
            """
            const client = open();
            client.connect();
            await new Promise(resolve => client.on('connected', resolve));
            await client.publish('chat:refusals', 1);
            return Promise.all([
                client.publish('nowhere:1', 1),
                client.publish('closed:1', 1),
                client.publish('chat:refusals'),
                client.rpc('dance'),
                client.history('live:1'),
                client.history('chat:refusals', { limit: 1, since: { offset: 1, epoch: 'else' } }),
            ].map(refusal));
            """
        )
        assert [one["code"] for one in refused] == [102, 103, 107, 108, 108, 112]
        assert not any(one["temporary"] for one in refused)


async def test_nothing_waits_without_a_connection(browser: Browser, server: Process) -> None:
    """Commands without a connection reject at once and are never sent; what was on its way is of unknown outcome."""
    async with scripting(browser, server.http) as script:
        found = await script.run(
            """
            const client = open();
            const calls = () => [client.publish('chat:waits', 1), client.publishOnce('chat:waits', 1, 'k'),
                client.rpc('x'), client.history('chat:waits'), client.presence('chat:waits')].map(refusal);
            const before = await Promise.all(calls());
            client.connect();
            const during = await Promise.all(calls());
            const said = client.say('chat:waits', 1);
            await new Promise(resolve => client.on('connected', resolve));
            const under = refusal(client.publish('chat:waits', 'once'));
            client.disconnect();
            return { before, during, said, under: await under, after: await Promise.all(calls()) };
            """
        )
        nothing_sent = {"code": 3, "temporary": True}
        assert found["before"] == found["during"] == found["after"] == [nothing_sent] * 5
        assert found["said"] is False
        assert found["under"] == {"code": 2, "temporary": True}
        raw = await Client.connected(server.url)
        assert (await raw.ask("history", channel="chat:waits"))["offset"] <= 1
        await raw.close()


async def test_callbacks_come_off_and_cost_nobody_else(browser: Browser, server: Process) -> None:
    """A callback that throws is reported and stops neither the others nor the client; ``on`` gives what undoes it."""
    async with scripting(browser, server.http) as script:
        await script.run(
            """
            window.seen = [];
            const client = open();
            const chat = watch(client.subscribe('chat:callbacks'), 'chat');
            chat.on('publication', () => { throw new Error('of the application'); });
            const off = chat.on('publication', ({ data }) => seen.push(data));
            chat.on('publication', ({ data }) => data === 'one' && off());
            client.connect();
            """
        )
        await script.heard("chat", "subscribed")
        await say(server, "chat:callbacks", "one", "two")
        await script.heard("chat", "publication", 2)
        assert await script.run("return seen") == ["one"]
        assert len(script.faults) == 2
        assert all("of the application" in fault for fault in script.faults)
        script.faults.clear()


# --- subscriptions --------------------------------------------------------------
async def test_subscriptions_before_and_after_the_connection(browser: Browser, server: Process) -> None:
    """One object for a channel; it may be asked for at any time, left, and entered anew, and stays in step."""
    async with scripting(browser, server.http) as script:
        found = await script.run(
            """
            const client = open();
            const early = watch(client.subscribe('chat:early'), 'early');
            const states = [early.state];
            client.connect();
            await new Promise(resolve => client.on('connected', resolve));
            const late = watch(client.subscribe('live:late'), 'late');
            await new Promise(resolve => late.on('subscribed', resolve));
            states.push(early.state, late.state);
            early.unsubscribe();
            states.push(early.state);
            const same = client.subscribe('chat:early') === early;
            early.unsubscribe();
            client.subscribe('chat:early');
            early.unsubscribe();
            client.subscribe('chat:early');
            const stats = await early.presenceStats();
            await early.publish('hello');
            return { states, same, stats, late: late.position, early: early.position };
            """
        )
        assert found["states"] == ["subscribing", "subscribed", "subscribed", "unsubscribed"]
        assert found["same"] is True
        assert found["stats"] == {"numClients": 1, "numUsers": 1}
        assert found["late"] is None
        assert found["early"]["offset"] == 1
        assert [one["data"] for one in await script.heard("early", "publication")] == ["hello"]
        assert len(await script.heard("early", "subscribed")) == 2
        called = {"code": 0, "reason": "unsubscribe called"}
        assert await script.heard("early", "unsubscribed") == [called] * 3


async def test_joins_and_leaves_for_those_who_ask(browser: Browser, server: Process) -> None:
    """PROTOCOL 10.3: with ``joinLeave`` both are told, without it neither."""
    async with scripting(browser, server.http) as script:
        await script.run(
            """
            const client = open();
            watch(client.subscribe('held:asked', { joinLeave: true }), 'asked');
            watch(client.subscribe('held:not asked'), 'not asked');
            client.connect();
            """
        )
        await script.heard("not asked", "subscribed")
        raw = await Client.connected(server.url, token=token({"sub": "7", "info": {"name": "Grace"}}))
        for channel in ("held:not asked", "held:asked"):
            await raw.ask("subscribe", channel=channel)
            await raw.ask("unsubscribe", channel=channel)
        grace = {"user": "7", "client": raw.hello["client"], "connInfo": {"name": "Grace"}}
        left = await script.heard("asked", "leave")
        assert left == [{"info": grace}]
        assert (await script.heard("asked", "join"))[-1] == {"info": grace}
        assert await script.run("return heard('not asked', 'join').concat(heard('not asked', 'leave'))") == []
        await raw.close()


async def test_begin_at_a_position(browser: Browser, server: Process) -> None:
    """PROTOCOL 11.3: ``since`` brings all behind it, however many pages; one that is gone is said to be."""
    await say(server, "chat:since", *range(1, 251))
    async with scripting(browser, server.http) as script:
        await script.run(
            """
            const client = open();
            client.connect();
            await new Promise(resolve => client.on('connected', resolve));
            const { epoch } = await client.history('chat:since');
            watch(client.subscribe('chat:since', { since: { offset: 3, epoch } }), 'since');
            watch(client.subscribe('chat:else', { since: { offset: 3, epoch: 'else' } }), 'else');
            """
        )
        publications = await script.heard("since", "publication", 247)
        assert [one["data"] for one in publications] == [one["offset"] for one in publications] == list(range(4, 251))
        (since,) = await script.heard("since", "subscribed")
        assert since["recovered"] is since["wasRecovering"] is True
        assert since["position"]["offset"] == 3
        (other,) = await script.heard("else", "subscribed")
        assert (other["recovered"], other["wasRecovering"]) == (False, True)


async def test_recovery_on_request(browser: Browser, server: Process) -> None:
    """PROTOCOL 10.3: where recovery is granted on request, ``recoverable`` asks; without it nothing is promised."""
    async with scripting(browser, server.http) as script:
        await script.run(
            """
            const client = open();
            watch(client.subscribe('held:on request', { recoverable: true }), 'asked');
            watch(client.subscribe('held:another'), 'not asked');
            client.connect();
            """
        )
        await script.heard("not asked", "subscribed")
        await script.run("client.disconnect()")
        await say(server, "held:on request", 1, 2)
        await say(server, "held:another", 1, 2)
        await script.run("client.connect()")
        first, second = await script.heard("asked", "subscribed", 2)
        assert (first["recovered"], first["wasRecovering"]) == (False, False)
        assert (second["recovered"], second["wasRecovering"]) == (True, True)
        assert [one["data"] for one in await script.heard("asked", "publication", 2)] == [1, 2]
        assert not any(one["wasRecovering"] for one in await script.heard("not asked", "subscribed", 2))
        assert await script.run("return heard('not asked', 'publication')") == []


async def test_refused_and_taken_away(browser: Browser, server: Process) -> None:
    """PROTOCOL 7.3: a refusal and a code below 2500 end a subscription for good, with code and reason."""
    async with scripting(browser, server.http) as script:
        await script.run(
            """
            const client = open();
            watch(client.subscribe('closed:1'), 'closed');
            watch(client.subscribe('chat:taken'), 'taken');
            client.connect();
            """
        )
        assert await script.heard("closed", "unsubscribed") == [{"code": 103, "reason": "permission denied"}]
        await script.heard("taken", "subscribed")
        await order(server, "unsubscribe", user="", channel="chat:taken")
        assert await script.heard("taken", "unsubscribed") == [{"code": 2000, "reason": "server unsubscribe"}]
        await script.run("client.disconnect(); client.connect();")
        await script.heard("client", "connected", 2)
        assert await script.run("return heard('taken', 'subscribing')") == []
        await script.run("client.subscribe('chat:taken')")
        await script.heard("taken", "subscribed", 2)


async def test_insufficient_state(browser: Browser, server: Process) -> None:
    """PROTOCOL 7.3: after 2500 it subscribes again from where it stood; after 2502 anew, and the application knows."""
    sides: list[WebSocketRoute] = []
    left = asyncio.Event()

    def tap(page: WebSocketRoute) -> None:
        upstream = page.connect_to_server()
        sides[:] = [page, upstream]

        def answer(frame: str | bytes) -> None:
            if isinstance(frame, str) and '"id":4000000000' in frame:
                left.set()
            else:
                page.send(frame)

        upstream.on_message(answer)

    async def end(code: int) -> None:
        """End the subscription, behind the client's back and then before its eyes."""
        page, upstream = sides
        left.clear()
        upstream.send(json.dumps({"id": 4_000_000_000, "unsubscribe": {"channel": "chat:state"}}))
        async with asyncio.timeout(PATIENCE_MS / 1000):
            await left.wait()
        await say(server, "chat:state", code)
        push = {"channel": "chat:state", "unsubscribe": {"code": code, "reason": "of the test"}}
        page.send(json.dumps({"push": push}))

    async with scripting(browser, server.http) as script:
        await script.page.route_web_socket(re.compile("/connection/websocket"), tap)
        await script.run("const client = open(); watch(client.subscribe('chat:state'), 'state'); client.connect()")
        await script.heard("state", "subscribed")
        await say(server, "chat:state", "first")
        await script.heard("state", "publication")
        await end(2500)
        subscribed = await script.heard("state", "subscribed", 2)
        assert (subscribed[1]["recovered"], subscribed[1]["wasRecovering"]) == (True, True)
        assert [one["data"] for one in await script.heard("state", "publication", 2)] == ["first", 2500]
        await end(2502)
        subscribed = await script.heard("state", "subscribed", 3)
        assert (subscribed[2]["recovered"], subscribed[2]["wasRecovering"]) == (False, True)
        assert subscribed[2]["position"]["offset"] == 3
        await say(server, "chat:state", "last")
        publications = await script.heard("state", "publication", 3)
        assert [one["data"] for one in publications] == ["first", 2500, "last"]
        assert [one["code"] for one in await script.heard("state", "subscribing", 2)] == [2500, 2502]


async def test_ready(browser: Browser, server: Process) -> None:
    """Whoever waits for a connection or a subscription learns that it is there, or why it will not be."""
    async with scripting(browser, server.http) as script:
        found = await script.run(
            """
            const why = promise => promise.then(() => 'ready', ({ code, message, temporary }) =>
                [code, message, temporary].join(' '));
            const client = open();
            const before = await why(client.ready());
            const chat = client.subscribe('chat:ready');
            const early = why(chat.ready());
            client.connect();
            const waits = [client, chat, client.subscribe('closed:1')].map(it => why(it.ready()));
            const first = await Promise.all([early, ...waits]);
            const states = [client.state, chat.state];
            const again = await Promise.all([client, chat, client.subscribe('chat:ready')].map(it => why(it.ready())));
            const left = client.subscribe('chat:left');
            const leaves = why(left.ready());
            left.unsubscribe();
            const afterwards = [await leaves, await why(left.ready())];
            client.disconnect();
            const patient = why(chat.ready());
            const gone = await why(client.ready());
            client.connect();
            const back = [await patient, await why(client.ready())];
            return { before, first, states, again, afterwards, gone, back };
            """
        )
        assert found["before"] == "3 not connected true"
        assert found["first"] == ["ready", "ready", "ready", "103 permission denied false"]
        assert found["states"] == ["connected", "subscribed"]
        assert found["again"] == ["ready"] * 3
        assert found["afterwards"] == ["0 unsubscribe called false"] * 2
        assert found["gone"] == "0 disconnect called false"
        assert found["back"] == ["ready"] * 2


async def test_ready_outlasts_an_outage(browser: Browser, tmp_path: Path) -> None:
    """While it comes back by itself nobody is told no; sent away for good, whoever waits learns the code."""
    with Process(tmp_path, config()) as process:
        async with scripting(browser, process.http, outages=True) as script:
            await script.run("const client = open(); client.connect(); await client.ready()")
            process.kill()
            await script.heard("client", "connecting", 3)
            await script.run("window.waits = client.ready().then(() => told.push({ name: 'me', event: 'ready' }))")
            assert await script.run("return heard('me', 'ready')") == []
            process.start()
            await script.heard("me", "ready")
            await order(process, "disconnect", user="")
            await script.heard("client", "disconnected")
            assert (await script.run("return refusal(client.ready())"))["code"] == 3503


# --- connections that end -------------------------------------------------------
async def test_a_server_that_is_killed(browser: Browser, tmp_path: Path) -> None:
    """P3: after a kill -9 the client comes back by itself and brings what was missed, once and in order."""
    with Process(tmp_path) as process:
        async with scripting(browser, process.http, outages=True) as script:
            await script.run("const client = open(); watch(client.subscribe('chat:kill'), 'chat'); client.connect()")
            await script.heard("chat", "subscribed")
            await say(process, "chat:kill", 1, 2)
            await script.heard("chat", "publication", 2)
            process.kill()
            called, lost = (await script.heard("client", "connecting", 2))[:2]
            assert called == {"code": 0, "reason": "connect called", "delayMs": 0}
            assert (lost["code"], lost["reason"]) == (2, "connection lost")
            assert 200 <= lost["delayMs"] <= 700
            assert await script.run("return [client.state, client.id]") == ["connecting", ""]
            assert await script.heard("chat", "subscribing") == [{"code": 2, "reason": "connection lost"}]
            process.start()
            await say(process, "chat:kill", *range(3, 131))
            publications = await script.heard("chat", "publication", 130)
            assert [one["offset"] for one in publications] == list(range(1, 131))
            assert [one["data"] for one in publications] == list(range(1, 131))
            assert [one["recovered"] for one in await script.heard("chat", "subscribed", 2)] == [False, True]


async def test_history_begun_anew(browser: Browser, tmp_path: Path) -> None:
    """PROTOCOL 11.3: when the numbering began anew meanwhile, ``recovered`` is false and the new position holds."""
    with Process(tmp_path, config()) as process:  # its history is in memory
        async with scripting(browser, process.http, outages=True) as script:
            await script.run("const client = open(); watch(client.subscribe('chat:anew'), 'chat'); client.connect()")
            await script.heard("chat", "subscribed")
            await say(process, "chat:anew", "old")
            await script.heard("chat", "publication")
            process.kill()
            process.start()
            await say(process, "chat:anew", "new")
            after = (await script.heard("chat", "subscribed", 2))[1]
            assert after["wasRecovering"] is True
            await say(process, "chat:anew", "newest")
            publications = await script.heard("chat", "publication", 2)
            assert publications[-1]["data"] == "newest"
            assert (await script.run("return client.subscribe('chat:anew').position"))["offset"] == 2
            assert after["recovered"] is False


async def test_sent_away(browser: Browser, server: Process) -> None:
    """PROTOCOL 7.2: after most codes it comes back, after one for good it stays away until told to connect."""
    async with scripting(browser, server.http) as script:
        await script.run("open({ token: given }).connect()", token({"sub": "away"}))
        await script.heard("client", "connected")
        for number, code in enumerate((3001, 3005, 4000), 1):
            await order(server, "disconnect", user="away", disconnect={"code": code, "reason": "come back"})
            await script.heard("client", "connected", 1 + number)
        assert [one["code"] for one in await script.heard("client", "connecting")] == [0, 3001, 3005, 4000]
        for number, code in enumerate((3503, 4500), 1):
            await order(server, "disconnect", user="away", disconnect={"code": code, "reason": "for good"})
            ended = await script.heard("client", "disconnected", number)
            assert ended[-1] == {"code": code, "reason": "for good"}
            assert await script.run("return client.state") == "disconnected"
            assert script.sockets == 3 + number
            await script.run("client.connect()")
            await script.heard("client", "connected", 4 + number)


async def test_too_large_for_good(browser: Browser, server: Process) -> None:
    """A message beyond the server's limit ends the connection for good (1009): it would be too large again."""
    async with scripting(browser, server.http) as script:
        refused = await script.run(
            """
            const client = open();
            client.connect();
            await new Promise(resolve => client.on('connected', resolve));
            return refusal(client.publish('chat:large', 'x'.repeat(100_000)));
            """
        )
        assert refused["code"] == 2
        assert (await script.heard("client", "disconnected"))[0]["code"] == 1009


async def test_the_network_goes_away(browser: Browser, server: Process) -> None:
    """When the browser says that it is offline, that is told at once; when it is back, nobody waits for a timer."""
    async with scripting(browser, server.http, outages=True) as script:
        await script.run("open().connect()")
        await script.heard("client", "connected")
        await script.page.context.set_offline(True)
        assert (await script.heard("client", "connecting", 2))[1]["reason"] == "offline"
        # No attempt is under way, nor about to be: it would find the network before the browser says that it is back.
        await script.until("heard('client', 'connecting').at(-1).delayMs > 1500")
        await script.page.context.set_offline(False)
        await script.heard("client", "connected", 2)
        connecting = await script.heard("client", "connecting")
        assert connecting[-1]["code"] == 0
        assert connecting[-1]["delayMs"] == 0


async def test_pings_and_their_absence(browser: Browser, tmp_path: Path) -> None:
    """PROTOCOL 2.4: pings are answered; without one for the interval and 10 s the client turns elsewhere."""
    quick = config(client={"ping_interval": "1s", "pong_timeout": "500ms"})
    with Process(tmp_path, quick) as process:
        async with scripting(browser, process.http) as script:
            muted = asyncio.Semaphore(0)

            def tap(page: WebSocketRoute) -> None:
                """Let nothing through from the third ping on: there is none if those before are not answered."""
                upstream = page.connect_to_server()
                pings = 0

                def answer(frame: str | bytes) -> None:
                    nonlocal pings
                    pings += frame == "{}"
                    if pings < 3:
                        page.send(frame)
                    elif frame == "{}":
                        upstream.send("{}")
                        muted.release()

                upstream.on_message(answer)

            await script.page.clock.install()
            await script.page.route_web_socket(re.compile("/connection/websocket"), tap)
            await script.page.reload()
            await script.page.evaluate(PRELUDE)
            await script.run("open().connect()")
            async with asyncio.timeout(PATIENCE_MS / 1000):
                while not await script.run("return heard('client', 'connecting').some(it => it.reason === 'no ping')"):
                    await muted.acquire()
                    await script.page.clock.fast_forward(11_500)
            await script.page.clock.fast_forward(1_000)
            await script.until("client.state === 'connected'")


async def test_nonsense_from_the_other_side(browser: Browser, server: Process) -> None:
    """What is not JSON ends the connection, for nobody knows what it was; the client comes back."""
    first = True

    def tap(page: WebSocketRoute) -> None:
        nonlocal first
        upstream = page.connect_to_server()

        def answer(frame: str | bytes) -> None:
            nonlocal first
            page.send("{]" if first else frame)
            first = False

        upstream.on_message(answer)

    async with scripting(browser, server.http) as script:
        await script.page.route_web_socket(re.compile("/connection/websocket"), tap)
        await script.run("open().connect()")
        await script.heard("client", "connected")
        assert (await script.heard("client", "connecting", 2))[1]["code"] == 6


async def test_an_address_that_cannot_be(browser: Browser, server: Process) -> None:
    """An address that the browser will not open ends in "disconnected", not in attempts for ever."""
    async with scripting(browser, server.http) as script:
        await script.run("open({}, 'ftp://127.0.0.1/').connect()")
        assert (await script.heard("client", "disconnected"))[0]["code"] == 6


# --- tokens ---------------------------------------------------------------------
async def test_tokens_are_fetched_and_renewed(browser: Browser, server: Process) -> None:
    """PROTOCOL 8.3: an expired token is replaced, one that runs out is renewed in time, and nobody is disconnected."""
    renewals_s = iter([2])
    renewed = asyncio.Event()

    def fetch(state: str) -> str:
        ttl_s = 2 if state == "connecting" else next(renewals_s, 600)
        if ttl_s == 600:
            renewed.set()
        return token({"sub": "42", "exp": int(time.time()) + ttl_s, "info": {"ttl_s": ttl_s}})

    async with scripting(browser, server.http) as script:
        await script.page.expose_function("fetchToken", fetch)
        old = token({"sub": "42", "exp": int(time.time()) - 60})
        await script.run("open({ token: given, getToken: () => fetchToken(client.state) }).connect()", old)
        async with asyncio.timeout(PATIENCE_MS / 1000):
            await renewed.wait()
        await script.run("watch(client.subscribe('live:tokens'), 'tokens')")
        await script.heard("tokens", "subscribed")
        await script.until_told(
            "client.presence('live:tokens').then(all => Object.values(all)[0].connInfo.ttl_s === 600)"
        )
        codes = [one["code"] for one in await script.heard("client", "connecting")]
        assert codes[:2] == [0, 109]
        assert set(codes[2:]) <= {109}, "where one comes too late"
        assert len(await script.heard("client", "connected")) == 1


async def test_another_token(browser: Browser, server: Process) -> None:
    """PROTOCOL 4.9: ``setToken`` changes what others see of a user at once; a foreign one is refused for good."""
    async with scripting(browser, server.http) as script:
        await script.run("open({ token: given }).connect()", token({"sub": "42", "info": "old"}))
        await script.run("watch(client.subscribe('live:names'), 'names')")
        await script.heard("names", "subscribed")
        await script.run("await client.setToken(given)", token({"sub": "42", "info": "new"}))
        await script.until_told("client.presence('live:names').then(all => Object.values(all)[0].connInfo === 'new')")
        refused = await script.run("return refusal(client.setToken(given))", token({"sub": "43"}))
        assert refused["code"] == 2
        assert (await script.heard("client", "disconnected"))[0]["code"] == 3500


async def test_no_token_to_be_had(browser: Browser, server: Process) -> None:
    """getToken that gives nothing ends it for good; one that throws is asked again; an old one without it is final."""
    async with scripting(browser, server.http) as script:
        await script.run(
            """
            for (const [name, options] of Object.entries({
                nothing: { getToken: () => '' },
                final: { getToken: () => { throw Object.assign(new Error('no such user'), { temporary: false }); } },
                expired: { token: given.old },
                foreign: { token: given.foreign },
            })) watch(new Client(undefined, options), name).connect();
            let asked = 0;
            open({ getToken: async () => {
                if (asked++ < 2) throw new Error('the token server is away');
                return given.good;
            } }).connect();
            """,
            {
                "old": token({"sub": "42", "exp": int(time.time()) - 60}),
                "foreign": token({"sub": "42"}, "another secret that is long enough as well"),
                "good": token({"sub": "42"}),
            },
        )
        assert await script.heard("nothing", "disconnected") == [{"code": 4, "reason": "unauthorized"}]
        assert await script.heard("final", "disconnected") == [{"code": 4, "reason": "no such user"}]
        assert await script.heard("expired", "disconnected") == [{"code": 109, "reason": "token expired"}]
        assert await script.heard("foreign", "disconnected") == [{"code": 3500, "reason": "invalid token"}]
        await script.heard("client", "connected")
        assert [one["code"] for one in await script.heard("client", "connecting")] == [0, 4, 4]


async def test_subscription_tokens(browser: Browser, server: Process) -> None:
    """PROTOCOL 8.2, 8.4: a subscription fetches its token and renews it in time; without one it is told no."""
    expired_s = iter([-60])
    renewed = asyncio.Event()
    refreshed: list[dict[str, Any]] = []

    def fetch(about: dict[str, str]) -> str:
        ttl_s = next(expired_s, 2 if about["state"] == "subscribing" else 600)
        return token({"channel": about["channel"], "exp": int(time.time()) + ttl_s, "info": {"role": "host"}})

    def hear(frame: str | bytes) -> None:
        reply = json.loads(frame)
        if "sub_refresh" in reply:
            refreshed.append(reply["sub_refresh"])
            renewed.set()

    async with scripting(browser, server.http) as script:
        await script.page.expose_function("fetchToken", fetch)
        script.page.on("websocket", lambda socket: socket.on("framereceived", hear))
        await script.run(
            """
            const client = open();
            watch(client.subscribe('$chat:1'), 'none');
            watch(client.subscribe('$chat:2', { getToken: () => null }), 'nothing');
            watch(client.subscribe('$chat:3', { token: given.old }), 'old');
            watch(client.subscribe('$chat:4', { token: given.good }), 'given');
            const getToken = about => fetchToken({ ...about, state: fetched.state });
            const fetched = watch(client.subscribe('$chat:5', { getToken }), 'fetched');
            client.connect();
            """,
            {
                "old": token({"channel": "$chat:3", "exp": int(time.time()) - 60}),
                "good": token({"channel": "$chat:4"}),
            },
        )
        assert await script.heard("none", "unsubscribed") == [{"code": 103, "reason": "permission denied"}]
        assert await script.heard("nothing", "unsubscribed") == [{"code": 4, "reason": "unauthorized"}]
        assert await script.heard("old", "unsubscribed") == [{"code": 109, "reason": "token expired"}]
        await script.heard("given", "subscribed")
        await script.heard("fetched", "subscribed")
        async with asyncio.timeout(PATIENCE_MS / 1000):
            await renewed.wait()
        assert refreshed[0]["ttl"] > 500
        assert len(await script.heard("fetched", "subscribed")) == 1


async def test_subscriptions_of_the_server(browser: Browser, tmp_path: Path) -> None:
    """PROTOCOL 11.7: what the server subscribes us to is told by the client, and recovers with the connection."""
    folder = {"sqlite": {"path": str(tmp_path / "history.db")}}
    with Process(tmp_path, config(**folder)) as process:
        async with scripting(browser, process.http, outages=True) as script:
            await script.run("open({ token: given }).connect()", token({"sub": "42", "channels": ["chat:own"]}))
            assert (await script.heard("client", "subscribed"))[0]["channel"] == "chat:own"
            await order(process, "subscribe", user="42", channel="live:extra", data={"hello": 1})
            assert (await script.heard("client", "subscribed", 2))[1]["data"] == {"hello": 1}
            await say(process, "chat:own", "one")
            await script.heard("client", "publication")
            await order(process, "unsubscribe", user="42", channel="live:extra")
            ended = await script.heard("client", "unsubscribed")
            assert ended == [{"channel": "live:extra", "code": 2000, "reason": "server unsubscribe"}]
            process.kill()
            process.start()
            await say(process, "chat:own", "two")
            again = (await script.heard("client", "subscribed", 3))[2]
            assert (again["channel"], again["recovered"], again["wasRecovering"]) == ("chat:own", True, True)
            await say(process, "chat:own", "three")
            publications = await script.heard("client", "publication", 3)
            assert [one["data"] for one in publications] == ["one", "two", "three"]
            assert {one["channel"] for one in publications} == {"chat:own"}


# --- the documents ------------------------------------------------------------------
async def test_the_types_name_what_there_is(browser: Browser, server: Process) -> None:
    """client.d.ts declares the members and codes that client.js has, and no others."""
    declared = (ROOT / "static" / "client.d.ts").read_text()
    async with scripting(browser, server.http) as script:
        for name in ("Client", "Subscription"):
            body = declared.split(f"export class {name} {{")[1].split("\n}")[0]
            methods = set(re.findall(r"^  (\w+)[(<]", body, re.MULTILINE)) - {"constructor"}
            fields = set(re.findall(r"^  readonly (\w+):", body, re.MULTILINE))
            there = await script.run(
                """
                const thing = given === 'Client' ? new Client() : new Client().subscribe('chat:1');
                const methods = [...Object.getOwnPropertyNames(Object.getPrototypeOf(thing)), 'on']
                    .filter(name => !name.startsWith('_') && name !== 'constructor');
                return { methods, fields: Object.keys(thing).filter(name => !name.startsWith('_')) };
                """,
                name,
            )
            assert set(there["methods"]) == methods
            assert set(there["fields"]) == fields
        codes = dict(re.findall(r"^  ([A-Z_]+): (\d+);", declared, re.MULTILINE))
        assert {name: int(code) for name, code in codes.items()} == await script.run("return CODES")


async def test_the_example_of_the_readme(browser: Browser, tmp_path: Path) -> None:
    """What the README shows does what it says, on a server with nothing configured, and once after a reload, too."""
    examples = re.findall(r"```js\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (example,) = (one for one in examples if "/static/client.js" in one)
    with Process(tmp_path) as process:
        async with scripting(browser, process.http) as script:
            said: asyncio.Queue[str] = asyncio.Queue()
            script.page.on("console", lambda line: said.put_nowait(line.text) if line.type == "log" else None)
            async with asyncio.timeout(PATIENCE_MS / 1000):
                await script.page.add_script_tag(content=example, type="module")
                assert [await said.get(), await said.get()] == ["here false false", "1 hello"]
                await script.page.goto(f"{process.http}/health/live")
                await script.page.add_script_tag(content=example, type="module")
                assert await said.get() == "here false false"
        raw = await Client.connected(process.url)
        assert (await raw.ask("history", channel="chat:lobby"))["offset"] == 1
        await raw.close()
