"""PROTOCOL 11: positions, recovery and the join of history and live, seen from the wire."""

import asyncio
import socket
from typing import Any

import pytest
from conftest import ExpectedLog
from support import KEPT, OPEN, Client, Site, serving, settings, token

from server import pace
from server.history import Appended
from server.history.memory import MemoryHistory
from server.orders import Target, UnsubscribeOrder
from server.session import Session
from server.stream import PAGE_PUBLICATIONS, Page, Retention

FORMATS = pytest.mark.parametrize("format", ["json", "protobuf"])


def _spaces(*namespaces: dict[str, Any], **client: Any) -> Any:
    return settings(client=client, channel={"namespaces": [{"name": "chat", **KEPT}, *namespaces]})


async def _publish(client: Client, channel: str, count: int, first: int = 1) -> None:
    """Publish the numbers from ``first`` on, a hundred commands a frame."""
    commands = [client.command("publish", channel=channel, data=number) for number in range(first, first + count)]
    for start in range(0, count, 100):
        await client.send(*commands[start : start + 100])
    for command in commands:
        assert "publish" in await client.reply(command["id"])


async def _epoch(client: Client, channel: str) -> str:
    return str((await client.ask("history", channel=channel))["epoch"])


def _offsets(publications: list[dict[str, Any]]) -> list[int]:
    return [pub["offset"] for pub in publications]


# --- the pace ---------------------------------------------------------------------------
async def test_a_crowd_that_catches_up_is_sent_a_page_a_turn() -> None:
    """However many catch up on the same history at once, the loop has its other business between their pages."""
    async with serving(_spaces()) as site:
        publisher = await Client.connected(site.url)
        await _publish(publisher, "chat:long", 1_000)
        since = {"recover": True, "epoch": await _epoch(publisher, "chat:long"), "offset": 0}
        clients = [await Client.connected(site.url) for _ in range(10)]
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                before = site.node.hub.deliveries
                await asyncio.sleep(0)
                most = max(most, site.node.hub.deliveries - before)

        watching = asyncio.create_task(watch())
        replies = await asyncio.gather(*(client.ask("subscribe", channel="chat:long", **since) for client in clients))
        for client, reply in zip(clients, replies, strict=True):
            rest = await client.publications("chat:long", 1_000 - len(reply["publications"]))
            assert _offsets(reply["publications"]) + _offsets(rest) == list(range(1, 1_001))
        watching.cancel()
        assert 0 < most <= 2 * PAGE_PUBLICATIONS, "what was under way when the watcher looked, and the next page"
        for client in (publisher, *clients):
            await client.close()


class HeldHistory(MemoryHistory):
    """What is appended waits for ``goes_on``, if there is one."""

    goes_on: asyncio.Event | None = None

    def __init__(self) -> None:
        super().__init__()
        self.asked = asyncio.Event()

    async def append(self, *arguments: Any) -> Appended:
        """See ``MemoryHistory.append``."""
        if self.goes_on is not None:
            self.asked.set()
            await self.goes_on.wait()
        return await super().append(*arguments)


async def test_who_catches_up_waits_for_a_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """While somebody waits for a commit no page is sent, neither in a reply nor behind it; then all of it is."""
    monkeypatch.setattr(pace, "HOLD_S", 1_000)
    history = HeldHistory()
    async with serving(_spaces(), history=history) as site:
        publisher, behind, there = [await Client.connected(site.url) for _ in range(3)]
        await _publish(publisher, "chat:long", 350)
        await _publish(publisher, "chat:other", 1)
        long = {"recover": True, "epoch": await _epoch(publisher, "chat:long"), "offset": 0}
        other = {"recover": True, "epoch": await _epoch(publisher, "chat:other"), "offset": 1}
        history.goes_on = asyncio.Event()
        publishing = asyncio.create_task(publisher.ask("publish", channel="chat:other", data=2))
        await history.asked.wait()
        held = asyncio.create_task(behind.ask("subscribe", channel="chat:long", **long))
        for _ in range(3):
            await there.ask("subscribe", channel="chat:other", **other)  # nothing was missed there
            await there.ask("unsubscribe", channel="chat:other")
        early = held.done()
        history.goes_on.set()
        first = (await held)["publications"]
        assert not early
        rest = await behind.publications("chat:long", 350 - len(first))
        assert _offsets(first) + _offsets(rest) == list(range(1, 351))
        await publishing
        for client in (publisher, behind, there):
            await client.close()


# --- the table of PROTOCOL 11.3 ------------------------------------------------------
@FORMATS
@pytest.mark.parametrize(
    ("offset", "epoch", "recovered"),
    [
        pytest.param(5, "", True, id="at the top, epoch unknown"),
        pytest.param(5, "same", True, id="at the top"),
        pytest.param(5, "other", False, id="at the top of another epoch"),
        pytest.param(2, "same", True, id="just what is kept"),
        pytest.param(3, "", True, id="some missed, epoch unknown"),
        pytest.param(1, "same", False, id="trimmed"),
        pytest.param(0, "", False, id="from the beginning, trimmed"),
        pytest.param(6, "same", False, id="beyond the top"),
        pytest.param(2**63 - 1, "same", False, id="far beyond the top"),
    ],
)
async def test_recovery(format: str, offset: int, epoch: str, recovered: bool) -> None:
    """Each row: five were published, three are kept; live ones follow without a hole, recovered or not."""
    async with serving(_spaces({"name": "three", **KEPT, "history_size": 3})) as site:
        writer = await Client.connected(site.url)
        await _publish(writer, "three:1", 5)
        current = await _epoch(writer, "three:1")
        client = await Client.connected(site.url, format=format)
        result = await client.ask(
            "subscribe", channel="three:1", recover=True, offset=offset, epoch=current if epoch == "same" else epoch
        )
        assert result["was_recovering"] is True
        assert result["recoverable"] is True
        assert result["positioned"] is True
        assert result["epoch"] == current
        assert result.get("recovered", False) is recovered
        assert _offsets(result.get("publications", [])) == (list(range(offset + 1, 6)) if recovered else [])
        assert result.get("offset", 0) == (offset if recovered else 5)
        await writer.ask("publish", channel="three:1", data=6)
        assert (await client.push("pub"))["offset"] == 6


@FORMATS
async def test_subscribing_without_recovery(format: str) -> None:
    """PROTOCOL 11.3: offset and epoch are the top; nothing was recovering."""
    async with serving() as site:
        writer = await Client.connected(site.url)
        client = await Client.connected(site.url, format=format)
        assert await client.ask("subscribe", channel="chat:1") == {"recoverable": True, "positioned": True}
        await _publish(writer, "chat:1", 3)
        other = await Client.connected(site.url, format=format)
        result = await other.ask("subscribe", channel="chat:1", offset=1, epoch="x")
        assert result == {
            "recoverable": True,
            "positioned": True,
            "offset": 3,
            "epoch": await _epoch(writer, "chat:1"),
        }
        assert _offsets(await client.publications("chat:1", 3)) == [1, 2, 3]


async def test_a_position_in_a_channel_nobody_published_to() -> None:
    """Offset 0 with no epoch is recovered there; any other position is not."""
    async with serving() as site:
        client = await Client.connected(site.url)
        basis = {"was_recovering": True, "recoverable": True, "positioned": True}
        assert await client.ask("subscribe", channel="chat:1", recover=True) == {**basis, "recovered": True}
        assert await client.ask("subscribe", channel="chat:2", recover=True, offset=1) == basis
        assert await client.ask("subscribe", channel="chat:3", recover=True, epoch="x") == basis


async def test_recovery_where_there_is_none() -> None:
    """Whoever asks to recover in a passing channel, or where recovery was not granted, is just subscribed."""
    async with serving(_spaces({"name": "live", **OPEN}, {"name": "deaf", **KEPT, "force_recovery": False})) as site:
        client = await Client.connected(site.url)
        await client.ask("publish", channel="deaf:1", data=1)
        for name in ("live:1", "deaf:1"):
            assert await client.ask("subscribe", channel=name, recover=True, offset=9, epoch="x", flag=2) == {}


async def test_after_the_retention_time() -> None:
    """History that has aged away: whoever has seen the last one is recovered, whoever has not is not."""
    async with serving(_spaces({"name": "short", **KEPT, "history_ttl": "10s"})) as site:
        client = await Client.connected(site.url)
        await _publish(client, "short:1", 3)
        site.pass_time(11)
        seen = await client.ask("subscribe", channel="short:1", recover=True, offset=3)
        assert seen["recovered"] is True
        await client.ask("unsubscribe", channel="short:1")
        missed = await client.ask("subscribe", channel="short:1", recover=True, offset=2)
        assert "recovered" not in missed
        assert missed["offset"] == 3


@FORMATS
async def test_more_than_a_page(format: str) -> None:
    """Thousands missed: the reply brings the first hundred, pushes the rest, in order, and live ones behind them."""
    async with serving() as site:
        writer = await Client.connected(site.url)
        await _publish(writer, "chat:1", 2500)
        client = await Client.connected(site.url, format=format)
        result = await client.ask("subscribe", channel="chat:1", recover=True, epoch=await _epoch(writer, "chat:1"))
        assert result["recovered"] is True
        assert _offsets(result["publications"]) == list(range(1, 101))
        await _publish(writer, "chat:1", 10, first=2501)
        rest = await client.publications("chat:1", 2410)
        assert _offsets(rest) == [pub["data"] for pub in rest] == list(range(101, 2511))


@pytest.mark.parametrize("where", ["client", "namespace"])
async def test_a_limit_of_recovery(where: str) -> None:
    """With ``recovery_max_publication_limit`` more than that is not recovered; the namespace's goes first."""
    limited = {"name": "lim", **KEPT, **({"recovery_max_publication_limit": 5} if where == "namespace" else {})}
    general = {"recovery_max_publication_limit": 5 if where == "client" else 1}
    async with serving(_spaces(limited, **general)) as site:
        client = await Client.connected(site.url)
        await _publish(client, "lim:1", 10)
        assert "recovered" not in await client.ask("subscribe", channel="lim:1", recover=True, offset=4)
        await client.ask("unsubscribe", channel="lim:1")
        result = await client.ask("subscribe", channel="lim:1", recover=True, offset=5)
        assert _offsets(result["publications"]) == [6, 7, 8, 9, 10]


# --- refuse instead (PROTOCOL 11.4) ----------------------------------------------------
@FORMATS
async def test_refused_rather_than_unrecovered(format: str) -> None:
    """Flag 2 turns "not recovered" into error 112 and no subscription; what can be recovered is."""
    async with serving() as site:
        client = await Client.connected(site.url, format=format)
        await _publish(client, "chat:1", 3)
        for flag in (2, 3):
            asked = {"channel": "chat:1", "recover": True, "flag": flag}
            assert await client.refused("subscribe", **asked, offset=1, epoch="other") == 112
            assert not site.node.hub.feeds
            result = await client.ask("subscribe", **asked, offset=1)
            assert _offsets(result["publications"]) == [2, 3]
            await client.ask("unsubscribe", channel="chat:1")
        assert "error" not in await client.call("subscribe", channel="chat:1", flag=2)


async def test_who_was_refused_never_joined() -> None:
    """Error 112 leaves no join and no leave with the others, and no entry in presence."""
    async with serving() as site:
        watcher = await Client.connected(site.url)
        await watcher.ask("subscribe", channel="chat:1", join_leave=True)
        await watcher.push("join")
        client = await Client.connected(site.url)
        asked = {"channel": "chat:1", "recover": True, "flag": 2, "offset": 5, "epoch": "other"}
        assert await client.refused("subscribe", **asked) == 112
        assert list((await watcher.ask("presence", channel="chat:1"))["presence"]) == [watcher.hello["client"]]
        await watcher.ask("publish", channel="chat:1", data=1)
        await watcher.push("pub")
        assert watcher.pushes == []


# --- history and live join without loss (PROTOCOL 11.5) ----------------------------------
@FORMATS
async def test_subscribing_in_the_midst_of_publishing(format: str) -> None:
    """While one publishes without pause, others come and go: each sees every number from its place on, once."""
    async with serving() as site:
        writer = await Client.connected(site.url)
        publishing = asyncio.create_task(_publish(writer, "chat:1", 3000))
        client = await Client.connected(site.url, format=format)
        publishing.add_done_callback(lambda _: client._news.set())  # its end may come behind the last push
        position: dict[str, Any] = {}
        seen = 0
        while not publishing.done():
            result = await client.ask("subscribe", channel="chat:1", **position)
            if position:
                assert result["recovered"] is True
                assert result.get("offset", 0) == seen
            else:
                seen = result.get("offset", 0)
            await client.until(lambda: publishing.done() or len(client.pushes) >= 5)
            await client.ask("unsubscribe", channel="chat:1")
            pushed = [push["pub"] for push in client.pushes]
            client.pushes.clear()
            for offset in _offsets([*result.get("publications", []), *pushed]):
                assert offset == seen + 1
                seen = offset
            epoch = result.get("epoch") or await _epoch(client, "chat:1")
            position = {"recover": True, "offset": seen, "epoch": epoch}
        await publishing
        last = await client.ask("subscribe", channel="chat:1", **position)
        rest = _offsets(last.get("publications", [])) + _offsets(
            await client.publications("chat:1", 3000 - seen - len(last.get("publications", [])))
        )
        assert rest == list(range(seen + 1, 3001))


class SlowHistory(MemoryHistory):
    """Reads wait until the test lets them go on."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.open_ = asyncio.Event(), asyncio.Event()

    async def read(self, channel: str, retention: Retention, now_ms: int, **how: Any) -> Page:
        """See ``History.read``; the page is as old as the moment when it was asked for."""
        page = await super().read(channel, retention, now_ms, **how)
        self.asked.set()
        await self.open_.wait()
        return page


@FORMATS
async def test_what_is_published_while_history_is_read(format: str) -> None:
    """Publications between the read and the reply come as pushes behind the reply, none twice, none lost."""
    history = SlowHistory()
    async with serving(history=history) as site:
        writer = await Client.connected(site.url)
        await _publish(writer, "chat:1", 3)
        client = await Client.connected(site.url, format=format)
        command = client.command("subscribe", channel="chat:1", recover=True, offset=1)
        await client.send(command)
        await history.asked.wait()
        await _publish(writer, "chat:1", 5, first=4)
        history.open_.set()
        result = (await client.reply(command["id"]))["subscribe"]
        assert result["recovered"] is True
        recovered = _offsets(result["publications"])
        pushed = _offsets(await client.publications("chat:1", 7 - len(recovered)))
        assert recovered + pushed == [2, 3, 4, 5, 6, 7, 8]


async def test_a_pong_counts_while_commands_wait() -> None:
    """A client whose subscribe waits for history still answers pings, and is not cut for it (PROTOCOL 2.4)."""
    history = SlowHistory()
    async with serving(history=history) as site:
        client = await Client.connected(site.url)
        command = client.command("subscribe", channel="chat:1")
        await client.send(command)
        await history.asked.wait()
        while not client.pings:
            site.pass_time(1)
            await _heard(client)
        await _heard(client)
        site.pass_time(9)
        history.open_.set()
        assert "subscribe" in await client.reply(command["id"])
        assert client.close_code is None


async def _heard(client: Client) -> None:
    """Wait until the server has read all that the client sent so far: it answers native pings in order."""
    await (await client.connection.ping())


async def test_unsubscribed_by_order_while_connecting() -> None:
    """A server-side subscription that the back end ends before the connect reply is not in that reply."""
    history = SlowHistory()
    async with serving(history=history) as site:
        client = await Client.open(site.url)
        command = client.command("connect", token=token({"sub": "ann", "channels": ["chat:1", "chat:2"]}))
        await client.send(command)
        await history.asked.wait()
        site.node.ordering.give_soon(UnsubscribeOrder(Target("ann"), "chat:1"))
        history.open_.set()
        hello = (await client.reply(command["id"]))["connect"]
        assert set(hello["subs"]) == {"chat:2"}
        assert set(site.node.hub.feeds) == {"chat:2"}


# --- what is gone while somebody follows -------------------------------------------------
async def _lose(site: Site, channel: str) -> None:
    """Let a channel begin a new life under its followers, as after a restore from backup."""
    await site.node.history.new_epochs()
    site.node.positioning.check_all()


@FORMATS
async def test_a_new_epoch_under_a_subscription(format: str, log: ExpectedLog) -> None:
    """PROTOCOL 11.2: client-side subscriptions get 2500 and can subscribe again; server-side ones are 3010."""
    log.expect("subscription.lost")
    async with serving() as site:
        writer = await Client.connected(site.url)
        await _publish(writer, "chat:1", 3)
        client = await Client.connected(site.url, format=format)
        result = await client.ask("subscribe", channel="chat:1")
        server_side = await Client.connected(site.url, token=token({"sub": "ann", "channels": ["chat:1"]}))
        await _lose(site, "chat:1")
        assert await client.push("unsubscribe", "chat:1") == {"code": 2500, "reason": "insufficient state"}
        assert await server_side.closed() == (3010, "insufficient state")
        again = await client.ask("subscribe", channel="chat:1", recover=True, offset=3, epoch=result["epoch"])
        assert "recovered" not in again
        await writer.ask("publish", channel="chat:1", data="new")
        assert (await client.push("pub"))["offset"] == 1


# --- many at once ------------------------------------------------------------------------
async def _slow_line(site: Site) -> Client:
    """A client whose socket takes little at a time."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
    sock.connect(("127.0.0.1", site.port))
    return await Client.open(site.url, sock=sock)


async def _heavy(site: Site, channels: int, each: int) -> tuple[Client, list[str]]:
    """Channels with so many publications of 60 KB each; returns who published them, and their names."""
    writer = await Client.connected(site.url)
    names = [f"chat:{number}" for number in range(channels)]
    for name in names:
        await asyncio.gather(*(writer.ask("publish", channel=name, data="x" * 60_000) for _ in range(each)))
    return writer, names


async def test_many_recoveries_in_one_frame() -> None:
    """A client that comes back with heavy channels over a slow line gets them at its own pace, not cut for the sum."""
    async with serving(settings(client={"queue_max_size": 300_000})) as site:
        writer, names = await _heavy(site, 80, 2)
        client = await _slow_line(site)
        hello = await client.ask("connect")
        session = site.node.sessions[hello["client"]]
        assert isinstance(session, Session)
        client.connection.transport.pause_reading()
        commands = [client.command("subscribe", channel=name, recover=True) for name in names]
        await client.send(*commands)
        while not session.closed and session.outbox.waiting_bytes < 20_000:
            await writer.ask("history", channel="chat:1")
        for _ in range(20):
            await writer.ask("history", channel="chat:1")
            assert session.outbox.waiting_bytes < 300_000
        client.connection.transport.resume_reading()
        for command in commands:
            result = (await client.reply(command["id"]))["subscribe"]
            assert _offsets(result["publications"]) == [1, 2]


async def test_many_channels_catching_up() -> None:
    """Many channels with many pages each catch up side by side: they take turns, and the socket is never overrun."""
    async with serving() as site:
        writer, names = await _heavy(site, 30, 10)
        client = await _slow_line(site)
        commands = [client.command("connect")]
        commands += [client.command("subscribe", channel=name, recover=True) for name in names]
        await client.send(*commands)
        seen = dict.fromkeys(names, 0)
        for name, command in zip(names, commands[1:], strict=True):
            for offset in _offsets((await client.reply(command["id"]))["subscribe"]["publications"]):
                assert offset == seen[name] + 1
                seen[name] = offset
            client.connection.transport.pause_reading()
            await writer.ask("history", channel=name)
            client.connection.transport.resume_reading()
        for _ in range(30 * 10 - sum(seen.values())):
            await client.until(lambda: bool(client.pushes))
            push = client.pushes.pop(0)
            assert push["pub"]["offset"] == seen[push["channel"]] + 1
            seen[push["channel"]] += 1
        assert set(seen.values()) == {10}


async def test_a_heavy_connect() -> None:
    """What server-side subscriptions recover together comes as far as it fits the reply; the rest follows as pushes."""
    async with serving(settings(client={"queue_max_size": 300_000})) as site:
        _, names = await _heavy(site, 100, 2)
        client = await _slow_line(site)
        subs = {name: {"recover": True} for name in names}
        hello = await client.ask("connect", token=token({"sub": "ann", "channels": names}), subs=subs)
        replied = {name: _offsets(hello["subs"][name].get("publications", [])) for name in names}
        await client.until(lambda: sum(map(len, replied.values())) + len(client.pushes) >= 200)
        for name in names:
            assert hello["subs"][name]["recovered"] is True
            pushed = [push["pub"]["offset"] for push in client.pushes if push["channel"] == name]
            assert replied[name] + pushed == [1, 2]
        await client.ask("publish", channel="live:1", data=1)
