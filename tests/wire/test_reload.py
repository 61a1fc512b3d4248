"""PROTOCOL 9.5: settings that change under a running server, and what becomes of those who are there."""

import asyncio
import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
from conftest import ExpectedLog
from hopper import ask, events
from support import KEPT, OPEN, PATIENCE_S, ROOT, Client, Process, Site, config, serving, settings, token
from test_rest import Following, bearer, path

import run
from server.configuration import Fault, SettingsError
from server.history.memory import MemoryHistory
from server.settings import Settings

CHAT = {"name": "chat", **KEPT, "presence": True, "join_leave": True}
LIVE = {"name": "live", **OPEN, "presence": True, "join_leave": True}


def reload(site: Site, **sections: Any) -> None:
    """Have the settings of a server in this process read anew, as SIGHUP does."""
    run.reload(site.node, site.gate, lambda: settings(**sections))


def spaces(*namespaces: dict[str, Any]) -> dict[str, Any]:
    """Sections with these namespaces."""
    return {"channel": {"namespaces": list(namespaces)}}


async def api(site: Site, key: str) -> int:
    """The status of a call with this key."""
    return (await ask(site.port, "/api/info", body={}, headers={"X-API-Key": key})).status


# --- what changes -----------------------------------------------------------------------
async def test_keys(log: ExpectedLog) -> None:
    """The API's key and the tokens' are others from the next request on; who is here stays."""
    log.expect("api.refused")
    async with serving() as site:
        client = await Client.connected(site.url, token=token({"sub": "ann"}))
        other = "another secret that is long enough for HMAC"
        reload(site, http_api={"key": "new key"}, client={"token": {"hmac_secret_key": other}})
        assert (await api(site, "api-key"), await api(site, "new key")) == (401, 200)
        await Client.connected(site.url, token=token({"sub": "ann"}, other))
        late = await Client.open(site.url)
        await late.send(late.command("connect", token=token({"sub": "ann"})))
        assert (await late.closed())[0] == 3500
        assert (await ask(site.port, path("chat:a"), headers=bearer(sub="ann"))).status == 401
        await client.ask("publish", channel="live:1", data=1)
        by_new = token({"sub": "ann", "channel": "chat:1"}, other)
        await client.ask("subscribe", channel="chat:1", token=by_new)


async def test_the_former_key_goes_on_where_it_is_named() -> None:
    """A key that is rotated out is good until its time."""
    async with serving() as site:
        rotated = {"hmac_secret_key": "n" * 40, "hmac_previous_secret_key": settings().client.token.hmac_secret_key}
        reload(site, client={"token": rotated})
        await Client.connected(site.url, token=token({"sub": "ann"}))
        await Client.connected(site.url, token=token({"sub": "ann"}, "n" * 40))


async def test_origins_and_limits(log: ExpectedLog) -> None:
    """Pages of an origin that was taken out may not come any more, on any path; limits are the new ones."""
    log.expect("connection.refused")
    page = {"Origin": "https://a.example"}
    async with serving(settings(guests={"enabled": True, "rate_limit": 1})) as site:
        client = await Client.connected(site.url, token=token({"sub": "ann"}))
        assert (await ask(site.port, path("chat:a"), headers=page)).status == 200
        changed: dict[str, Any] = {"allowed_origins": ["https://b.example"], "channel_limit": 1}
        reload(site, client=changed, guests={"enabled": True, "rate_limit": 2})
        assert (await ask(site.port, path("chat:a"), headers=page)).status == 403
        assert (await ask(site.port, path("chat:a"), headers={"Origin": "https://b.example"})).status == 200
        for wanted in (page, {"Origin": "https://b.example"}):
            reply = await ask(site.port, "/v1/session", body={"name": "Bo"}, headers=wanted)
            assert reply.status == (403 if wanted is page else 200)
        with pytest.raises(Exception, match="403"):
            await Client.open(site.url, additional_headers=page)
        await client.ask("subscribe", channel="live:1")
        assert await client.refused("subscribe", channel="live:2") == 106


async def test_rights_hold_for_the_next_deed() -> None:
    """Who may publish or read is asked each time; the subscription goes on, and so does retention as it is now."""
    async with serving() as site:
        client = await Client.connected(site.url)
        await client.ask("subscribe", channel="chat:1")
        for number in range(3):
            await client.ask("publish", channel="chat:1", data=number)
        quiet = {**CHAT, "allow_publish_for_client": False, "history_size": 2}
        reload(site, **spaces(quiet, LIVE))
        assert await client.refused("publish", channel="chat:1", data=4) == 103
        history = await client.ask("history", channel="chat:1", limit=10)
        assert [one["data"] for one in history["publications"]] == [1, 2]
        assert {"chat:1"} == set(site.node.hub.feeds)
        feed = site.node.hub.feeds["chat:1"]
        assert feed.namespace is site.node.channels.namespace("chat:1")
        assert all(one.namespace is feed.namespace for one in feed.subscriptions())
        reload(site)
        await client.publications("chat:1", 3)
        await client.ask("publish", channel="chat:1", data=5)
        assert (await client.push("pub", "chat:1"))["offset"] == 4
        assert not any("unsubscribe" in push for push in client.pushes)


async def test_other_terms_end_subscriptions() -> None:
    """2502 for those that asked, 3014 for server-side ones: both come back with their position and miss nothing."""
    async with serving() as site:
        asker = await Client.connected(site.url)
        epoch = (await asker.ask("subscribe", channel="chat:1", recoverable=True)).get("epoch", "")
        given = await Client.connected(site.url, token=token({"sub": "ann", "channels": ["chat:1"]}))
        other = await Client.connected(site.url)
        await other.ask("subscribe", channel="live:1")
        reload(site, **spaces({**CHAT, "presence": False, "join_leave": False}, LIVE))
        end = await asker.push("unsubscribe", "chat:1")
        assert (end["code"], end["reason"]) == (2502, "state invalidated")
        assert await given.closed() == (3014, "state invalidated")
        await other.ask("publish", channel="chat:1", data="meanwhile")
        found = await asker.ask("subscribe", channel="chat:1", recoverable=True, recover=True, offset=0, epoch=epoch)
        assert [one["data"] for one in found["publications"]] == ["meanwhile"]
        assert await asker.refused("presence", channel="chat:1") == 108
        await other.ask("publish", channel="live:1", data="still subscribed")
        await other.push("pub", "live:1")


async def test_a_namespace_that_is_gone_and_one_that_is_new() -> None:
    """Its subscriptions end, then it is unknown (102); a new one is there at once."""
    async with serving() as site:
        client = await Client.connected(site.url)
        await client.ask("subscribe", channel="live:1")
        reload(site, **spaces(CHAT, {"name": "game", **OPEN}))
        assert (await client.push("unsubscribe", "live:1"))["code"] == 2502
        assert await client.refused("subscribe", channel="live:1") == 102
        assert await client.refused("publish", channel="live:1", data=1) == 102
        await client.ask("subscribe", channel="game:1")
        assert set(site.node.hub.feeds) == {"game:1"}


async def test_kept_becomes_passing_and_comes_back() -> None:
    """A channel that keeps nothing for a while has its history and numbers where it left them."""
    passing = {**CHAT, "history_size": 0, "history_ttl": "0s", "force_recovery": False}
    async with serving() as site:
        client = await Client.connected(site.url)
        await client.ask("subscribe", channel="chat:1")
        await client.ask("publish", channel="chat:1", data=1)
        reload(site, **spaces(passing, LIVE))
        assert (await client.push("unsubscribe", "chat:1"))["code"] == 2502
        assert "offset" not in await client.ask("subscribe", channel="chat:1")
        await client.ask("publish", channel="chat:1", data="passing")
        reload(site)
        assert (await client.push("unsubscribe", "chat:1"))["code"] == 2502
        assert (await client.ask("subscribe", channel="chat:1", recoverable=True))["offset"] == 1
        await client.ask("publish", channel="chat:1", data=2)
        await client.push("pub", "chat:1")
        assert [await client.push("pub", "chat:1") for _ in range(2)][-1]["offset"] == 2


async def test_who_waits_and_who_listens() -> None:
    """A long-poll is 503, to be asked again; an event stream ends with 3014, after which a browser comes back."""
    async with serving() as site:
        following = Following(site.node.hub)
        await ask(site.port, path("chat:a"), body={"data": 1})
        async with events(site.port, "/v1/events?channel=chat:a") as stream:
            waiting = asyncio.create_task(ask(site.port, path("chat:a", "since=:1"), headers={"Prefer": "wait=20"}))
            await following.until(2)
            reload(site, **spaces({**CHAT, "join_leave": False}, LIVE))
            reply = await waiting
            assert (reply.status, reply.json["code"]) == (503, 100)
            while (event := await stream.next()).kind != "disconnect":
                pass
            assert event.data["code"] == 3014
        assert (await ask(site.port, path("chat:a"))).status == 200


class SlowHistory(MemoryHistory):
    """Its reads can be held back; ``reading`` is set while one is."""

    def __init__(self) -> None:
        super().__init__(idempotency_ttl_ms=10_000)
        self.reading, self.answering = asyncio.Event(), asyncio.Event()

    async def read(self, *arguments: Any, **options: Any) -> Any:
        """See ``History.read``."""
        self.reading.set()
        await self.answering.wait()
        return await super().read(*arguments, **options)


async def test_changed_while_somebody_subscribes() -> None:
    """Who waits for history under terms that are no longer is told to try again, and then gets what holds."""
    history = SlowHistory()
    async with serving(history=history) as site:
        client = await Client.connected(site.url)
        command = client.command("subscribe", channel="chat:1")
        await client.send(command)
        await history.reading.wait()
        reload(site, **spaces({**CHAT, "join_leave": False}, LIVE))
        history.answering.set()
        error = (await client.reply(command["id"]))["error"]
        assert (error["code"], error["temporary"]) == (100, True)
        await client.ask("subscribe", channel="chat:1")
        assert site.node.hub.feeds["chat:1"].namespace.options.join_leave is False


# --- what is wrong ----------------------------------------------------------------------
async def test_faults_change_nothing(log: ExpectedLog) -> None:
    """Each fault of faulty settings is in the log, and nothing of what was right in them holds."""
    log.expect("settings.faulty")
    faults = [Fault("client.channel_limit", "an integer", "'many'", "file"), Fault("a", "b", "c", "flag")]

    def faulty() -> Settings:
        raise SettingsError(faults)

    async with serving() as site:
        before = site.node.settings
        run.reload(site.node, site.gate, faulty)
        assert [str(line["why"]) for line in log.seen("settings.faulty")] == [str(fault) for fault in faults]
        assert site.node.settings is before
        assert await api(site, "api-key") == 200


async def test_what_only_its_user_can_judge_changes_nothing_either(log: ExpectedLog) -> None:
    """A secret that is the text of a key is found when a verifier is made of it: nothing has been changed by then."""
    log.expect("settings.faulty")
    pem = "-----BEGIN PUBLIC KEY-----\nabc\n-----END PUBLIC KEY-----"
    async with serving(settings(admin={"enabled": True, "password": "p" * 20})) as site:
        before = site.node.settings
        wished = settings(
            admin={"enabled": True, "password": "p" * 20}, http_api={"key": "new"}, channel={"namespaces": []}
        )
        wished = wished.model_copy(update={"admin": wished.admin.model_copy(update={"secret": pem})})
        run.reload(site.node, site.gate, lambda: wished)
        assert len(log.seen("settings.faulty")) == 1
        assert pem not in str(log.seen("settings.faulty"))
        assert site.node.settings is before
        assert site.node.channels.namespace("chat:1") is not None
        assert await api(site, "api-key") == 200


async def test_what_needs_a_restart_is_named(log: ExpectedLog) -> None:
    """A port, a URL and a transport are as they were, with a warning; the rest of the same file holds."""
    log.expect("settings.waiting")
    async with serving() as site:
        reload(site, http_server={"port": 1}, sse={"enabled": True}, http_api={"key": "new"})
        (line,) = log.seen("settings.waiting")
        assert line["names"] == "http_server.port,sse.enabled"
        assert site.node.settings.http_server.port != 1
        assert await api(site, "new") == 200
        assert log.seen("settings.reloaded") == [{"changed": "http_api.key"}]


async def test_a_console_with_another_secret() -> None:
    """Its passes are void, and the new password opens it."""
    admin = {"enabled": True, "password": "first password", "secret": "s" * 40}
    async with serving(settings(admin=admin)) as site:

        async def enter(password: str) -> Any:
            return await ask(site.port, "/admin/auth", body={"password": password})

        given = (await enter("first password")).json["token"]
        headers = {"Authorization": f"Bearer {given}"}
        assert (await ask(site.port, "/admin/state", headers=headers)).status == 200
        reload(site, admin={**admin, "password": "second password"})
        assert (await ask(site.port, "/admin/state", headers=headers)).status == 200
        assert (await enter("second password")).status == 200
        reload(site, admin={**admin, "secret": "t" * 40})
        site.node.clock()
        assert (await enter("first password")).status == 200


# --- by the signal ------------------------------------------------------------------------
def test_a_closed_terminal_ends_it(tmp_path: Path) -> None:
    """SIGHUP from a terminal that is no more is no wish for other settings: the server ends as by Ctrl-C."""
    outer, inner = pty.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    server = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), "--port", "0"],
        cwd=tmp_path,
        env={},
        stdin=inner,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=take_terminal,
        text=True,
    )
    assert server.stdout is not None
    assert server.stderr is not None
    with server.stdout, server.stderr:
        assert "listening" in server.stdout.readline()
        os.close(inner)
        server.send_signal(signal.SIGHUP)
        assert any("settings.reloaded" in line for line in server.stderr), "while there is a terminal, it reloads"
        os.close(outer)
        assert "server.stopped" in server.stderr.read()
        assert server.wait(PATIENCE_S) == 0


async def test_sighup(tmp_path: Path) -> None:
    """The file is read anew when the signal comes; a broken file changes nothing and every fault of it is logged."""
    chosen = config(sqlite={"path": "data.db"}, log={"format": "json"})
    with Process(tmp_path, chosen) as process:
        client = await Client.connected(process.url)
        file = tmp_path / "config.json"

        async def hang_up(text: str, event: str) -> list[dict[str, Any]]:
            """Write the file, send the signal, and wait until the log has the event; its lines of this event."""
            before = len(lines(event))
            file.write_text(text)
            process.send(signal.SIGHUP)
            async with asyncio.timeout(PATIENCE_S):
                while len(lines(event)) == before:
                    await client.ask("publish", channel="live:1", data=0)
            return lines(event)[before:]

        def lines(event: str) -> list[dict[str, Any]]:
            found = [json.loads(line) for line in process.log.read_text().splitlines()]
            return [line for line in found if line["event"] == event]

        await hang_up(json.dumps(config(sqlite={"path": "data.db"}, http_api={"key": "new"})), "settings.reloaded")
        headers = {"X-API-Key": "new"}
        assert (await ask(process.port, "/api/info", body={}, headers=headers)).status == 200
        faulty = {**config(sqlite={"path": "data.db"}), "nonsense": 1, "log": {"level": "loud"}, "http_api": {"key": 7}}
        faults = await hang_up(json.dumps(faulty), "settings.faulty")
        assert len(faults) == 3
        assert len(await hang_up("{", "settings.faulty")) == 1
        assert (await ask(process.port, "/api/info", body={}, headers=headers)).status == 200
        assert client.close_code is None
    await client.closed()
