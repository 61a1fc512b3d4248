"""Hooks and remote procedures at work: PROTOCOL 4.1, 4.2, 4.4, 4.7, and what a bad hook costs."""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import ExpectedLog
from support import KEPT, OPEN, ROOT, Client, Process, config, serving, settings

from server.app import Allow, App, Change, Disconnect, Refuse, Welcome
from server.app import Client as Guest
from server.errors import Refused, Unavailable
from server.stream import Position, Publication
from server.testing import ConnectionEnded, ReplyError, World, harness

CLOSED = {"allow_anonymous_connect_without_token": False}


# --- connecting -----------------------------------------------------------------------
async def test_connecting_says_who_somebody_is() -> None:
    """PROTOCOL 4.1: the hook sees what came with connect; it names the user, its info, its channels, and answers."""
    app = App()

    @app.connecting
    async def connecting(client: Guest, data: dict[str, str]) -> Welcome:
        return Welcome(
            user=data["name"],
            conn_info={"name": data["name"]},
            data={"hello": data["name"]},
            channels={"chat:lobby": Allow(chan_info="new", data=[1]), "live:x": Allow()},
        )

    async with harness(app, client=CLOSED) as world:
        ann = await world.connect(data={"name": "Ann"})
        assert ann.data == {"hello": "Ann"}
        lobby = await ann.subscription("chat:lobby")
        assert lobby.data == [1]
        await lobby.publish("hi")
        info = (await lobby.publication()).info
        assert info is not None
        assert (info.user, info.conn_info, info.chan_info) == ("Ann", {"name": "Ann"}, "new")
        assert list(await world.server.presence("live:x")) == [ann.id]
        assert world.server.connections == 1


async def test_whom_nobody_named_stays_outside() -> None:
    """PROTOCOL 8.5: a hook that names nobody changes nothing: 3501 without a token, let in with one."""
    app = App()

    @app.connecting
    async def connecting(client: Guest) -> None:
        client.notes["met"] = client.user

    async with harness(app, client=CLOSED) as world:
        with pytest.raises(ConnectionEnded, match="3501"):
            await world.connect()
        assert (await world.connect("ann")).id


async def test_a_token_is_not_overruled(log: ExpectedLog) -> None:
    """Who came with a token stays who he is: another name is a fault of the hook's; another info is not."""
    log.expect("hook.misanswered")
    app = App()

    @app.connecting
    async def connecting(client: Guest, data: Any) -> Welcome:
        return Welcome(user=data, conn_info={"seen as": client.info})

    async with harness(app) as world:
        with pytest.raises(ReplyError, match="100"):
            await world.connect("ann", data="eve")
        ann = await world.connect("ann", info="A", data="ann")
        await ann.subscribe("chat:a")
        members = await ann.presence("chat:a")
        assert members[ann.id].conn_info == {"seen as": "A"}
        # A refreshed token does not undress it.
        await ann._ask("refresh", token=world.token("ann", info="B", exp=int(world.server.clock()) + 60))
        assert (await ann.presence("chat:a"))[ann.id].conn_info == {"seen as": "A"}
    assert "a token has named one" in str(log.seen("hook.misanswered")[0]["why"])


async def test_connecting_refuses_and_disconnects() -> None:
    """A refusal answers connect with its code; a disconnect ends the connection with its own."""
    app = App()

    @app.connecting
    async def connecting(client: Guest, data: str) -> None:
        if data == "later":
            raise Refuse(1999, "come back", temporary=True)
        raise Disconnect(4500, "go away")

    async with harness(app) as world:
        with pytest.raises(ReplyError) as caught:
            await world.connect(data="later")
        assert (caught.value.code, caught.value.message, caught.value.temporary) == (1999, "come back", True)
        with pytest.raises(ConnectionEnded, match="4500 go away"):
            await world.connect(data="never")
        with pytest.raises(ReplyError, match="107"):
            await world.connect(data=7)
        assert world.server.connections == 0


# --- subscribing ----------------------------------------------------------------------
async def test_subscribing_allows_refuses_and_adorns() -> None:
    """PROTOCOL 4.2: the hook sees the request's data; it refuses, or adds channel info and data to the reply."""
    app = App()

    @app.subscribing("chat")
    async def subscribing(client: Guest, channel: str, data: str | None) -> Allow | None:
        if data == "adorned":
            return Allow(chan_info={"role": "mod"}, data={"topic": channel})
        if data is None:
            return None
        raise Refuse(403, "members only")

    async with harness(app) as world:
        ann = await world.connect("ann")
        with pytest.raises(ReplyError, match="403 members only"):
            await ann.subscribe("chat:a", data="please")
        assert (await ann.subscribe("live:a", data="please")).data is None, "another namespace's"
        assert (await ann.subscribe("chat:b")).data is None
        adorned = await ann.subscribe("chat:a", data="adorned")
        assert adorned.data == {"topic": "chat:a"}
        assert (await adorned.presence())[ann.id].chan_info == {"role": "mod"}


async def test_the_configuration_decides_before_a_hook() -> None:
    """PROTOCOL 10.2, 10.4: what the options refuse no hook hears of, so that it may count on what it sees."""
    seen: list[str] = []
    app = App()

    @app.subscribing
    async def subscribing(client: Guest, channel: str) -> Allow:
        seen.append(channel)
        return Allow()

    @app.publishing
    async def publishing(client: Guest, channel: str, data: Any) -> Change:
        seen.append(channel)
        return Change()

    async with harness(app, channel={"namespaces": [{"name": "shut"}, {"name": "live", **OPEN}]}) as world:
        ann = await world.connect("ann")
        for refused in (ann.subscribe("shut:a"), ann.publish("shut:a", 1)):
            with pytest.raises(ReplyError, match="103"):
                await refused
        assert seen == []


async def test_wishes_of_connect_are_asked_about() -> None:
    """PROTOCOL 4.1: of connect's subs the hook is asked, too; its refusal costs only the wish."""
    app = App()

    @app.subscribing
    async def subscribing(client: Guest, channel: str) -> None:
        if channel.endswith("secret"):
            raise Refuse(404, "no such room")

    async with harness(app) as world:
        ann = await world.connect("ann", subs={"chat:a": None, "chat:secret": None})
        assert (await ann.subscription("chat:a")).channel == "chat:a"
        assert list(await world.server.presence("chat:secret")) == []


async def test_a_subscription_that_ended_while_the_hook_thought() -> None:
    """The client goes while its subscription is thought about: nothing is left of it, and no leaving is told."""
    asked, go_on = asyncio.Event(), asyncio.Event()
    left: list[str] = []
    app = App()

    @app.subscribing
    async def subscribing(client: Guest, channel: str) -> None:
        asked.set()
        await go_on.wait()
        assert not client.connected

    @app.leaving
    async def leaving(client: Guest, channel: str) -> None:
        left.append(channel)

    async with harness(app) as world:
        ann = await world.connect("ann")
        task = asyncio.ensure_future(ann.subscribe("chat:a"))
        await asked.wait()
        ann.disconnect()
        go_on.set()
        await world.settle()
        assert not world.node.hub.feeds
        assert await world.server.presence("chat:a") == {}
        assert left == []
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


# --- publishing ----------------------------------------------------------------------
@pytest.mark.parametrize("channel", ["chat:a", "live:a"])
async def test_publishing_changes_and_refuses(channel: str) -> None:
    """PROTOCOL 4.4: in kept and passing channels, by publish and by RPC, the hook lets pass, changes or refuses."""
    app = App()

    @app.publishing
    async def publishing(client: Guest, channel: str, data: str) -> Change | None:
        if data == "rude":
            raise Refuse(422, "be kind")
        if data == "loud":
            return Change("quiet", tags={"was": data})
        return None

    async with harness(app) as world:
        ann = await world.connect("ann")
        sub = await ann.subscribe(channel)
        for data in ("plain", "loud"):
            await sub.publish(data)
            await ann.publish_once(channel, data, key=data)
        for refused in (sub.publish("rude"), ann.publish_once(channel, "rude", key="r")):
            with pytest.raises(ReplyError, match="422 be kind"):
                await refused
        with pytest.raises(ReplyError, match="107"):
            await sub.publish(["no", "text"])
        await world.settle()
        assert [(message.data, message.tags) for message in sub.heard()] == [
            ("plain", None),
            ("plain", None),
            ("quiet", {"was": "loud"}),
            ("quiet", {"was": "loud"}),
        ]


async def test_a_publication_may_be_wished_for_as_a_patch() -> None:
    """PROTOCOL 12.3.1: a hook may wish so for what a client publishes, and the app for what it publishes itself."""
    app = App()

    @app.publishing
    async def publishing(client: Guest, channel: str, data: str) -> Change | None:
        return Change(delta=True) if data == "patch" else None

    async with harness(app) as world:
        wishes: list[tuple[bytes, bool]] = []
        history = world.node.history
        commit = history.on_commit

        def listen(channel: str, epoch: str, publications: Sequence[Publication]) -> None:
            wishes.extend((publication.data, publication.delta) for publication in publications)
            commit(channel, epoch, publications)

        history.on_commit = listen
        ann = await world.connect("ann")
        for data in ("full", "patch"):
            await ann.publish("chat:a", data)
        await app.server.publish("chat:a", "own", delta=True)
        await app.server.publish("chat:a", "plain")
        assert wishes == [(b'"full"', False), (b'"patch"', True), (b'"own"', True), (b'"plain"', False)]


async def test_the_app_itself_is_not_asked() -> None:
    """What the app publishes does not come back to its own hook; an idempotency key works, and history has it once."""
    app = App()

    @app.publishing
    async def publishing(client: Guest, channel: str, data: Any) -> None:
        raise Refuse()

    async with harness(app) as world:
        ann = await world.connect("ann")
        sub = await ann.subscribe("chat:a")
        positions = [await app.server.publish("chat:a", {"n": 1}, key="k", user="bot") for _ in range(2)]
        assert positions[0] == positions[1]
        assert (await sub.publication()).info.user == "bot"  # type: ignore[union-attr]
        messages, top = await app.server.history("chat:a")
        assert [message.data for message in messages] == [{"n": 1}]
        assert top == positions[0] == sub.position
        assert await app.server.publish("live:a", 1) == Position(0, "")


async def test_a_publisher_who_was_ended_meanwhile_publishes_nothing() -> None:
    """A hook that disconnects by the handle instead of raising: nothing is published."""
    app = App()

    @app.publishing
    async def publishing(client: Guest, channel: str, data: Any) -> None:
        client.disconnect(4001, "enough")

    async with harness(app) as world:
        ann, bob = await world.connect("ann"), await world.connect("bob")
        sub = await bob.subscribe("chat:a")
        with pytest.raises(ConnectionEnded, match="4001 enough"):
            await ann.publish("chat:a", "last words")
        await world.settle()
        assert sub.heard() == []


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (Change(object()), "JSON can hold"),
        (Change("x" * 600_000), "larger than half"),
        (True, "expected it to return Change or None, got bool"),
        (Allow(), "got Allow"),
    ],
    ids=["unspeakable", "huge", "a truth", "another event's"],
)
async def test_nonsense_costs_one_command(log: ExpectedLog, change: Any, why: str) -> None:
    """An answer of no use: error 100 for this command, a log line with function and line, and life goes on."""
    log.expect("hook.misanswered")
    app = App()

    @app.publishing
    async def publishing(client: Guest, channel: str, data: Any) -> Any:
        return change if data == "bad" else None

    async with harness(app) as world:
        ann = await world.connect("ann")
        with pytest.raises(ReplyError, match="100"):
            await ann.publish("live:a", "bad")
        await ann.publish("live:a", "good")
    (line,) = log.seen("hook.misanswered")
    assert why in str(line["why"])
    assert str(line["function"]).endswith("publishing")
    assert str(line["at"]) == f"{__file__}:{publishing.__code__.co_firstlineno}"


# --- faults --------------------------------------------------------------------------
async def _fail_plainly() -> None:
    raise RuntimeError("broken")


async def _exit() -> None:
    sys.exit(3)


async def _await_something_cancelled() -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.cancel()
    await future


async def _time_out_itself() -> None:
    raise TimeoutError("its own")


async def _refuse_by_accident() -> None:
    raise Refused(msgspec.UNSET, "what the handle raised, and nobody caught")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fail", [_fail_plainly, _exit, _await_something_cancelled, _time_out_itself, _refuse_by_accident]
)
async def test_a_hook_that_raises_costs_one_command(log: ExpectedLog, fail: Any) -> None:
    """Whatever it raises, even an exit or a cancellation: error 100, one trace, and the next command works."""
    log.expect("hook.failed")
    app = App()

    @app.rpc
    async def work(client: Guest, data: bool) -> str:
        if data:
            await fail()
        return "done"

    async with harness(app) as world:
        ann = await world.connect("ann")
        with pytest.raises(ReplyError, match="100") as caught:
            await ann.rpc("work", True)
        assert caught.value.temporary
        assert await ann.rpc("work", False) == "done"
    traces = [record for record in log.records if record.exc_info]
    assert len(traces) == 1
    assert traces[0].fields["at"] == f"{__file__}:{work.__code__.co_firstlineno}"  # type: ignore[attr-defined]


async def test_a_hook_that_hangs_is_cut_off_and_holds_up_nobody_else(log: ExpectedLog) -> None:
    """After app.timeout: error 100 and a line that says where it hung; another client was answered while it hung."""
    log.expect("hook.overdue")
    app = App()

    async def wait_for_ever() -> None:
        await asyncio.Event().wait()

    @app.rpc
    async def hang(client: Guest) -> None:
        await wait_for_ever()

    @app.rpc
    async def quick(client: Guest) -> int:
        return 1

    async with harness(app, app={"timeout": "60s"}) as world:
        ann, bob = await world.connect("ann"), await world.connect("bob")
        slow = asyncio.ensure_future(ann.rpc("hang"))
        await world.pass_time(59)
        assert await bob.rpc("quick") == 1
        assert not slow.done()
        await world.pass_time(1)
        with pytest.raises(ReplyError, match="100") as caught:
            await slow
        assert caught.value.temporary
        assert await ann.rpc("quick") == 1
    (line,) = log.seen("hook.overdue")
    place = f"{__file__}:{wait_for_ever.__code__.co_firstlineno + 1}"
    assert line["why"] == f"it waited at {place}, look at app.timeout (60 s)"


async def test_a_hook_that_hangs_is_cut_off_in_real_time(log: ExpectedLog) -> None:
    """Without a test's clock app.timeout is of real time, on the wire as well."""
    log.expect("hook.overdue")
    app = App()

    @app.rpc
    async def hang(client: Guest) -> None:
        await asyncio.Event().wait()

    async with serving(settings(app={"timeout": "50ms"})) as site:
        app.attach(site.node)
        client = await Client.connected(site.url)
        assert await client.refused("rpc", method="hang") == 100
        await client.close()


async def test_a_hook_that_is_cut_off_clears_up_before_the_next(log: ExpectedLog) -> None:
    """What it does in ``finally`` is done, though it has to wait, before the next hook of this client begins."""
    log.expect("hook.overdue")
    told: list[str] = []
    app = App()

    @app.rpc
    async def work(client: Guest, data: str) -> None:
        told.append(f"{data} begins")
        try:
            await asyncio.Event().wait()
        finally:
            await app.server.sleep(0.05)
            told.append(f"{data} ends")

    async with harness(app) as world:
        ann = await world.connect("ann")
        asked = [asyncio.ensure_future(ann.rpc("work", data)) for data in ("one", "two")]
        await world.pass_time(3)
        for one in asked:
            with pytest.raises(ReplyError, match="100"):
                await one
    assert told == ["one begins", "one ends", "two begins", "two ends"]
    assert not any("no notice" in str(line["why"]) for line in log.seen("hook.overdue"))


async def test_a_hook_that_takes_no_notice(log: ExpectedLog) -> None:
    """One that swallows its cancellation: the client is answered all the same and goes on, and the log says so."""
    log.expect("hook.overdue", "hook.failed")
    let_go = asyncio.Event()
    app = App()

    @app.rpc
    async def deaf(client: Guest) -> None:
        while not let_go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await let_go.wait()
        raise RuntimeError("broken as well")

    @app.rpc
    async def quick(client: Guest) -> int:
        return 1

    async with harness(app) as world:
        ann = await world.connect("ann")
        slow = asyncio.ensure_future(ann.rpc("deaf"))
        await world.pass_time(1.2)
        with pytest.raises(ReplyError, match="100"):
            await slow
        assert await ann.rpc("quick") == 1
        assert str(log.seen("hook.overdue")[0]["why"]).endswith("it took no notice, and goes on by itself")
        assert log.seen("hook.failed") == []
        let_go.set()
        await world.settle()
        assert len(log.seen("hook.failed")) == 1


async def test_what_takes_no_notice_ends_with_the_app(log: ExpectedLog) -> None:
    """A hook and a background task that swallow every cancellation are ended by force, their ``finally`` included."""
    log.expect("hook.overdue")
    told: list[str] = []
    app = App()

    async def never_end(name: str) -> None:
        try:
            while True:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()
        finally:
            told.append(name)

    @app.starting
    async def starting() -> None:
        app.server.spawn(never_end("task"))

    @app.rpc
    async def deaf(client: Guest) -> None:
        await never_end("hook")

    async with harness(app) as world:
        slow = asyncio.ensure_future((await world.connect("ann")).rpc("deaf"))
        await world.pass_time(1.2)
        with pytest.raises(ReplyError, match="100"):
            await slow
        assert told == []
    assert sorted(told) == ["hook", "task"]


async def test_a_last_hook_that_hangs_does_not_hold_up_the_end(log: ExpectedLog) -> None:
    """Nobody moves the clock when a test is over: a hook that is told the end and hangs is cut off all the same."""
    log.expect("hook.overdue")
    app = App()

    @app.disconnecting
    async def disconnecting(client: Guest) -> None:
        await asyncio.Event().wait()

    async with harness(app) as world:
        await world.connect("ann")
    assert len(log.seen("hook.overdue")) == 1


@pytest.mark.parametrize("channel", ["chat:a", "live:a"])
async def test_what_a_hook_spawns_comes_after_what_it_lets_pass(channel: str) -> None:
    """A hook that does not wait may count on it: its publication comes first, then those of what it spawned."""
    app = App()

    @app.publishing
    async def publishing(client: Guest, channel: str, data: Any) -> None:
        app.server.spawn(app.server.publish(channel, "answer"))

    async with harness(app) as world:
        sub = await (await world.connect("ann")).subscribe(channel)
        await sub.publish("question")
        await world.settle()
        assert [message.data for message in sub.heard()] == ["question", "answer"]


async def test_an_unavailable_store_is_no_fault_of_the_hook() -> None:
    """What the handle raises when history cannot answer becomes error 100 without a trace."""
    app = App()

    @app.rpc
    async def remember(client: Guest) -> None:
        raise Unavailable("history is away")

    async with harness(app) as world:
        ann = await world.connect("ann")
        with pytest.raises(ReplyError, match="100"):
            await ann.rpc("remember")


async def test_procedures_answer() -> None:
    """PROTOCOL 4.7: any value that JSON can hold, nothing for None; unknown is 108; publish stays built in."""
    app = App()

    @app.rpc("echo")
    async def answer(client: Guest, data: Any) -> Any:
        return data

    async with harness(app) as world:
        ann = await world.connect("ann")
        for value in ({"a": [1, None, "ü"]}, 0, "", False):
            assert await ann.rpc("echo", value) == value
        assert await ann.rpc("echo") is None
        with pytest.raises(ReplyError, match="108"):
            await ann.rpc("answer")
        assert (await ann.publish_once("chat:a", 1, "k")).offset == 1


# --- leaving -------------------------------------------------------------------------
async def _leave_by_command(world: World, ann: Any, sub: Any) -> None:
    await sub.unsubscribe()


async def _leave_by_closing(world: World, ann: Any, sub: Any) -> None:
    ann.disconnect()


async def _leave_by_order(world: World, ann: Any, sub: Any) -> None:
    world.server.unsubscribe("chat:a", user="ann")
    assert await sub.unsubscribed() == (2000, "server unsubscribe")


async def _leave_by_kick(world: World, ann: Any, sub: Any) -> None:
    world.server.disconnect(user="ann", code=4000, reason="kicked")
    assert await ann.disconnected() == (4000, "kicked")


@pytest.mark.parametrize("leave", [_leave_by_command, _leave_by_closing, _leave_by_order, _leave_by_kick])
async def test_leaving_is_told_once(leave: Any) -> None:
    """However a subscription ends, leaving is told once; disconnecting follows if the connection is over, too."""
    told: list[str] = []
    app = App()

    @app.leaving
    async def leaving(client: Guest, channel: str) -> None:
        told.append(f"{client.user} left {channel}")

    @app.disconnecting
    async def disconnecting(client: Guest) -> None:
        told.append(f"{client.user} is gone, {client.channels}, {client.notes}")

    @app.connecting
    async def connecting(client: Guest) -> None:
        client.notes["n"] = 1

    async with harness(app) as world:
        ann = await world.connect("ann")
        sub = await ann.subscribe("chat:a")
        await leave(world, ann, sub)
        await world.settle()
        assert told[0] == "ann left chat:a"
        if leave in (_leave_by_closing, _leave_by_kick):
            assert told[1:] == ["ann is gone, [], {'n': 1}"]
        else:
            assert told[1:] == []
    assert len(told) == 2


async def test_hooks_of_one_client_take_turns() -> None:
    """While a command's hook waits, the end of the connection is not told; it is told afterwards."""
    told: list[str] = []
    go_on = asyncio.Event()
    app = App()

    @app.rpc
    async def work(client: Guest) -> None:
        told.append("begins")
        await go_on.wait()
        told.append("ends")

    @app.disconnecting
    async def disconnecting(client: Guest) -> None:
        told.append("gone")

    async with harness(app) as world:
        ann = await world.connect("ann")
        task = asyncio.ensure_future(ann.rpc("work"))
        await world.settle()
        ann.disconnect()
        await world.settle()
        assert told == ["begins"]
        go_on.set()
        await world.settle()
        assert told == ["begins", "ends", "gone"]
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


# --- the handle ----------------------------------------------------------------------
async def test_the_handle_subscribes_and_notices_wrong_names() -> None:
    """Users and single clients are subscribed from anywhere; a name of no namespace is an error, not a silence."""
    app = App()

    @app.rpc
    async def enter(client: Guest, data: str) -> None:
        client.subscribe(data, data={"by": "hook"})

    async with harness(app, channel={"namespaces": [{"name": "chat", **KEPT, "presence": True}]}) as world:
        ann = await world.connect("ann")
        await ann.rpc("enter", "chat:a")
        assert (await ann.subscription("chat:a")).data == {"by": "hook"}
        app.server.subscribe("chat:b", user="ann", client=ann.id, chan_info="x")
        await ann.subscription("chat:b")
        members = await app.server.presence("chat:b")
        assert members[ann.id].chan_info == "x"
        for call in (
            lambda: app.server.subscribe("none:a", user="ann"),
            lambda: app.server.unsubscribe("none:a", user="ann"),
        ):
            with pytest.raises(Refused, match="102"):
                call()
        for wait in (app.server.publish("none:a", 1), app.server.history("none:a"), app.server.presence("none:a")):
            with pytest.raises(Refused, match="102"):
                await wait
        with pytest.raises(ValueError, match="JSON can hold"):
            await app.server.publish("chat:a", object())
        with pytest.raises(ValueError, match="3001 to 4999"):
            app.server.disconnect(user="ann", code=1)


async def test_the_handle_before_the_app_runs() -> None:
    """Used at import time it says where it may be used instead."""
    with pytest.raises(RuntimeError, match="from ``starting`` on"):
        await App().server.publish("chat:a", 1)


async def test_background_tasks_live_with_the_app(log: ExpectedLog) -> None:
    """Started by the starting hook, awakened by the test's clock, cancelled at the end; one that raises is logged."""
    log.expect("task.failed")
    told: list[str] = []
    app = App()

    async def tick() -> None:
        try:
            while True:
                await app.server.sleep(60)
                await app.server.publish("live:clock", int(app.server.clock()))
        finally:
            told.append("cancelled")

    async def fail() -> None:
        raise RuntimeError("broken")

    @app.starting
    async def starting() -> None:
        app.server.spawn(tick(), "tick")
        app.server.spawn(fail(), "fail")

    @app.stopping
    async def stopping() -> None:
        told.append("stopped")

    async with harness(app) as world:
        sub = await (await world.connect()).subscribe("live:clock")
        begin = int(app.server.clock())
        await world.pass_time(59)
        assert sub.heard() == []
        await world.pass_time(121)
        assert [message.data for message in sub.heard()] == [begin + 60, begin + 120, begin + 180]
    assert told == ["cancelled", "stopped"]
    assert log.seen("task.failed")[0]["task"] == "fail"


async def test_hooks_over_real_sockets() -> None:
    """PROTOCOL 4.7, 4.4: the same hooks answer clients on the wire, in JSON and in Protobuf."""
    app = App()

    @app.rpc
    async def double(client: Guest, data: int) -> int:
        assert client.address == "127.0.0.1"
        assert client.transport == "websocket"
        return data * 2

    @app.publishing
    async def publishing(client: Guest, channel: str, data: Any) -> Change:
        return Change([data])

    async with serving() as site:
        app.attach(site.node)
        for format in ("json", "protobuf"):
            client = await Client.connected(site.url, format=format)
            assert (await client.ask("rpc", method="double", data=21))["data"] == 42
            await client.ask("subscribe", channel="live:a")
            await client.ask("publish", channel="live:a", data=1)
            assert (await client.push("pub"))["data"] == [1]
            await client.close()


# --- run.py ---------------------------------------------------------------------------
HEAD = "from server.app import App\napp = App()\n"
BOT = """
from server.app import App, Client
app = App()

@app.rpc
async def version(client: Client) -> int:
    return {version}
"""


async def test_run_with_an_app_that_reloads(tmp_path: Path) -> None:
    """--app FILE --reload: procedures answer; a saved change is in force for the next connection; a fault waits."""
    bot = tmp_path / "bot.py"
    bot.write_text(BOT.format(version=1))
    with Process(tmp_path, config(), "--app", str(bot), "--reload") as server:
        client = await Client.connected(server.url)
        assert (await client.ask("rpc", method="version"))["data"] == 1
        assert server.popen is not None
        assert server.popen.stdout is not None
        for text, version in ((BOT.format(version=2), 2), ("x = = 1\n" + BOT.format(version=3), 0)):
            bot.write_text(text)
            assert await client.closed() == (3001, "shutdown")
            if version:
                line = await asyncio.to_thread(server.popen.stdout.readline)
                assert line.startswith("Waterspout is listening on ")
                client = await Client.connected(server.url)
                assert (await client.ask("rpc", method="version"))["data"] == version
        await asyncio.to_thread(_await_text, server.log, "bot.py:1: SyntaxError")
        bot.write_text(BOT.format(version=4))
        line = await asyncio.to_thread(server.popen.stdout.readline)
        assert line.startswith("Waterspout is listening on ")
        client = await Client.connected(server.url)
        assert (await client.ask("rpc", method="version"))["data"] == 4
        await client.close()


def _await_text(log: Path, text: str) -> None:
    tail = subprocess.Popen(["tail", "-n", "+1", "-f", str(log)], stdout=subprocess.PIPE, text=True)
    try:
        assert tail.stdout is not None
        assert any(text in line for line in tail.stdout)
    finally:
        tail.send_signal(signal.SIGTERM)
        tail.communicate()


DEAF = """
import asyncio
from server.app import App, Client
app = App()

@app.rpc
async def deaf(client: Client) -> None:
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            pass
"""


async def test_run_with_an_app_that_never_ends(tmp_path: Path) -> None:
    """SIGTERM ends the process, exit code 0, although a hook swallows whatever is to end it."""
    (tmp_path / "bot.py").write_text(DEAF)
    with Process(tmp_path, config(app={"timeout": "50ms"}), "--app", str(tmp_path / "bot.py")) as server:
        client = await Client.connected(server.url)
        assert await client.refused("rpc", method="deaf") == 100
        await client.close()
        assert await asyncio.to_thread(server.stop) == 0
    assert "bot.py:10, look at app.timeout (0.05 s); it took no notice" in server.log.read_text()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import nowhere_at_all\n", "bot.py:1: in <module>: ModuleNotFoundError"),
        (
            HEAD + "@app.publish\nasync def f(client): ...\n",
            "bot.py:3: in <module>: AttributeError: an App has no 'publish'",
        ),
        (
            "from server.app import App\napp = App()\n@app.rpc\ndef f(client): ...\n",
            "bot.py:3: f (rpc 'f'): expected async",
        ),
        (
            HEAD + "@app.leaving('nochat')\nasync def f(client, channel): ...\n",
            "bot.py:3: f (leaving 'nochat'): no entry of channel.namespaces is named 'nochat'",
        ),
        (
            HEAD + "@app.starting\nasync def f(): 1 / 0\n",
            "bot.py:3: f (starting): … bot.py:4: in f: ZeroDivisionError",
        ),
    ],
)
def test_run_with_a_faulty_app(tmp_path: Path, text: str, expected: str) -> None:
    """The server does not start: exit code 2, and one line with function, file and line on standard error."""
    (tmp_path / "bot.py").write_text(text)
    (tmp_path / "config.json").write_text(json.dumps(config()))
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "--port", "0", "--config", "config.json", "--app", "bot"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert all(part in lines[0] for part in expected.split(" … ")), lines
