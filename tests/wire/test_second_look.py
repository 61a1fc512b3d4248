"""Faults that a second reading of the HTTP transports found, each with its story; PROTOCOL 2.5, 17."""

import asyncio
import json
from typing import Any
from urllib.parse import quote

import pytest
from conftest import ExpectedLog
from hopper import ask, head_of, read_head, vanish
from streams import CONNECT, batch, http_stream, sse
from streams import ask as ask_raw
from streams import settings as all_transports
from support import PATIENCE_S, serving, settings
from test_emulation import busy
from test_http_stream import deaf, read_all
from test_rest import Following, data_of, path, publish

from handlers import base
from handlers.emulation import Turns
from server.app import App, Refuse
from server.app import Client as AppClient
from server.configuration import SettingsError
from server.protocol import Command
from server.settings import without_secrets

KEY = {"X-API-Key": "api-key"}


# --- the cursor ---------------------------------------------------------------------------
async def test_a_passing_publication_does_not_move_a_poll() -> None:
    """What passes through a kept channel wakes a poll, whose cursor stays where it stood (PROTOCOL 11.1.5, 17.1.7).

    The cursor went back to 0, so that whoever followed it got everything once more.
    """
    async with serving() as site:
        following = Following(site.node.hub)
        top = await publish(site, "chat:a", 1)
        since = f"since={top['epoch']}:1"
        polling = asyncio.create_task(ask(site.port, path("chat:a", since), headers={"Prefer": "wait=30"}))
        await following.until(1)
        passing = {"channel": "chat:a", "data": "passing", "skip_history": True}
        assert (await ask(site.port, "/api/publish", body=passing, headers=KEY)).status == 200
        reply = await polling
        assert data_of(reply) == ["passing"]
        assert (reply.json["epoch"], reply.json["offset"]) == (top["epoch"], 1)
        assert reply.headers["etag"] == f'"{top["epoch"]}:1"'


async def test_no_link_leads_to_itself() -> None:
    """With ``limit=0`` there is no next page: its link led back to the same position for ever."""
    async with serving() as site:
        await publish(site, "chat:a", 1)
        reply = await ask(site.port, path("chat:a", "since=:0&limit=0"))
        assert (reply.json["offset"], reply.headers.get("link")) == (0, None)


async def test_unchanged_and_yet_there_is_more() -> None:
    """A 304 to a page that was full has the link that the page has got meanwhile (RFC 9110 15.4.5)."""
    async with serving() as site:
        await publish(site, "chat:a", 1)
        page = path("chat:a", "since=:0&limit=1")
        first = await ask(site.port, page)
        assert "link" not in first.headers
        await publish(site, "chat:a", 2)
        again = await ask(site.port, page, headers={"If-None-Match": first.headers["etag"]})
        assert again.status == 304
        link = again.headers["link"].partition(">")[0].removeprefix("<")
        assert data_of(await ask(site.port, link)) == [2]


# --- what is left behind ----------------------------------------------------------------------
async def test_a_poll_whose_client_left_before_it_began() -> None:
    """Whoever goes while the app is asked who it is does not wait afterwards, in nobody's name (PROTOCOL 17.2.4).

    The poll went on for a minute, counted as a connection and against the user's limit.
    """
    app = App()
    asked, goes_on = asyncio.Event(), asyncio.Event()
    left: asyncio.Event = asyncio.Event()

    @app.connecting
    async def connecting(client: AppClient) -> None:
        asked.set()
        await goes_on.wait()

    @app.disconnecting
    async def disconnecting(client: AppClient) -> None:
        left.set()

    async with serving(settings(app={"timeout": "60s"})) as site:
        app.attach(site.node)
        _, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(head_of("GET", path("chat:a", "since=:0"), {"Prefer": "wait=60"}))
        await asked.wait()
        await vanish(writer)
        # The server has seen it go when it has taken a connection that began later.
        for _ in range(3):
            await ask(site.port, "/health/live")
        goes_on.set()
        async with asyncio.timeout(PATIENCE_S):
            await left.wait()
        assert (site.node.connections, site.node.hub.feeds) == (0, {})
        await app.stop()


def test_batches_in_order_leave_nothing() -> None:
    """A client whose posts never overtake one another costs no memory with each of them: it did, for ever."""
    turns = Turns(2)
    for id in range(2, 5_000):
        turns.put([Command(id=id)], 0, 1)
        assert len(turns.take(0)) == 1
    assert not turns._arrivals
    assert not turns._waiting


# --- bodies ---------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["PUT", "DELETE", "HEAD", "OPTIONS", "GET"])
async def test_too_large_with_any_method(method: str) -> None:
    """A body above the limit is 413 whatever the method: one that there is not was an error in our log."""
    async with serving() as site:
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(head_of(method, path("chat:a"), {"Content-Length": "100000"}) + b"x" * 100_000)
        status, _ = await read_head(reader)
        assert status == 413
        async with asyncio.timeout(PATIENCE_S):
            body = await reader.read()
        assert body == b"" if method == "HEAD" else json.loads(body)["code"] == 107
        await vanish(writer)


async def test_nothing_follows_a_refusal_of_what_was_announced() -> None:
    """Who asks before it sends (``Expect: 100-continue``) gets 413 and no word behind it (RFC 9110 10.1.1)."""
    async with serving() as site:
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(head_of("POST", path("chat:a"), {"Content-Length": "2000000", "Expect": "100-continue"}))
        status, headers = await read_head(reader)
        assert status == 413
        await reader.readexactly(int(headers["content-length"]))
        async with asyncio.timeout(PATIENCE_S):
            assert await reader.read() == b""
        await vanish(writer)


@pytest.mark.parametrize("length", ["\u00b2", "-1", "+5", "5,6", "0x10", "1_0", "99999999999999999999999"])
async def test_lengths_that_are_none(length: str, log: ExpectedLog) -> None:
    """A Content-Length that is none is the client's fault, not ours, and nothing is published."""
    async with serving() as site:
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(head_of("POST", path("chat:a"), {"Content-Length": length}) + b'{"data": 1}')
        writer.write_eof()
        async with asyncio.timeout(PATIENCE_S):
            answer = await reader.read()
        assert answer[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 413", b""), answer
        await vanish(writer)
        assert data_of(await ask(site.port, path("chat:a"))) == []


# --- commands by /emulation -------------------------------------------------------------------
async def test_a_flood_without_ids_behind_a_busy_session() -> None:
    """What has no id is no way around the bound on what waits (PROTOCOL 2.5.8): it was, as long as a command took."""
    sections = {"app": {"timeout": "60s"}, "client": {"queue_max_size": 100_000}}
    async with serving(all_transports(**sections)) as site, busy(site):
        async with http_stream(site.port, CONNECT) as stream:
            hello = await stream.expect("connect")
            site.node.ordering.hand_over(hello["session"], batch({"id": 2, "rpc": {"method": "wait"}}))
            posts = 0
            while hello["client"] in site.node.sessions:
                site.node.ordering.hand_over(hello["session"], batch({"send": {"data": "x" * 1000}}))
                posts += 1
                assert posts < 1_000
            await stream.ended(3013)


# --- pages of other origins ---------------------------------------------------------------------
async def test_a_link_or_an_image_is_no_client(log: ExpectedLog) -> None:
    """A GET that does something is refused to another site's page that sends no Origin, as images and links do.

    With the user's cookies it published in the user's name (Fetch Metadata, ``Sec-Fetch-Site``).
    """
    log.expect("connection.refused")
    async with serving(all_transports(client={"allowed_origins": ["https://ours.example"]})) as site:
        said = batch(CONNECT, {"id": 2, "publish": {"channel": "chat:a", "data": "forged"}})
        for transport in ("sse", "uni_sse"):
            url = f"/connection/{transport}?cf_connect={quote(said if transport == 'sse' else b'{}')}"
            for where in ("cross-site", "same-site"):
                answer = await ask_raw(site.port, "GET", url, headers={"Sec-Fetch-Site": where})
                assert answer.status == 403
        assert site.node.connections == 0
        assert data_of(await ask(site.port, path("chat:a"))) == []
        for headers in (
            {"Sec-Fetch-Site": "same-origin"},
            {"Sec-Fetch-Site": "none"},
            {"Sec-Fetch-Site": "cross-site", "Origin": "https://ours.example"},
            {},
        ):
            stream = sse(site.port, CONNECT)
            stream.bytes_of_request = stream.bytes_of_request.replace(
                b"Host: a",
                b"\r\n".join([b"Host: a", *(f"{name}: {value}".encode() for name, value in headers.items())]),
            )
            async with stream:
                assert stream.status == 200
                await stream.expect("connect")


# --- who does not read ------------------------------------------------------------------------
async def test_who_does_not_take_an_answer_is_cut(log: ExpectedLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page is not held for ever for somebody who asks and does not read (PROTOCOL 18.0.2)."""
    monkeypatch.setattr(base, "TAKEN_S", 0.1)
    monkeypatch.setattr(base, "TAKEN_BYTES_S", 100 * 1024 * 1024)
    sections: dict[str, Any] = {"client": {"queue_max_size": 32 * 1024 * 1024}}
    async with serving(settings(**sections)) as site:
        for _ in range(150):  # more than the kernel holds between the two
            await publish(site, "chat:a", "x" * 60_000)
        sock = await deaf(site, head_of("GET", path("chat:a", "since=:0&limit=300"), {}))
        async with asyncio.timeout(PATIENCE_S):
            while not log.seen("http.unread"):
                await ask(site.port, "/health/live")
        answer = await read_all(sock)
        sock.close()
        size = int(answer.partition(b"Content-Length: ")[2].partition(b"\r\n")[0])
        assert len(answer) < size, "it was not cut"
        (cut,) = log.seen("http.unread")
        assert cut == {"path": path("chat:a")}


# --- settings that name addresses -------------------------------------------------------------
def test_addresses_are_shown_without_what_opens_them() -> None:
    """The settings as they are printed have no password of a back end's address, nor a key in its query."""
    endpoint = "https://waterspout:sesame@backend.example:8443/connect?key=open"
    jwks = {"jwks_public_endpoint": "https://u:sesame@keys.example/jwks", "hmac_secret_key": ""}
    chosen = settings(client={"proxy": {"connect": {"enabled": True, "endpoint": endpoint}}, "token": jwks})
    shown = without_secrets(chosen)["client"]
    assert shown["proxy"]["connect"]["endpoint"] == "https://***@backend.example:8443/connect?***"
    assert shown["token"]["jwks_public_endpoint"] == "https://***@keys.example/jwks"
    assert "sesame" not in repr(chosen)
    plain = settings(client={"proxy": {"connect": {"endpoint": "http://backend.example/connect"}}})
    assert without_secrets(plain)["client"]["proxy"]["connect"]["endpoint"] == "http://backend.example/connect"


def test_an_address_that_is_none_is_a_fault_of_the_settings() -> None:
    """Half an IPv6 address, or a port that is none, is said at start with its name, and without what it may hold."""
    for endpoint in ("http://[::1/connect", "http://u:sesame@host:port/", "http://host:99999/", "ftp://u:sesame@host"):
        with pytest.raises(SettingsError) as caught:
            settings(client={"proxy": {"connect": {"enabled": True, "endpoint": endpoint}}})
        (fault,) = caught.value.faults
        assert (fault.name, fault.found) == ("client.proxy.connect.endpoint", "a string")
        assert "sesame" not in str(caught.value)


# --- the back-end API ---------------------------------------------------------------------------
async def test_lines_that_ask_for_too_much() -> None:
    """The old form is bounded as a batch is: beyond 16 MB of answers the rest is not carried out (PROTOCOL 15.1.6)."""
    async with serving() as site:
        for _ in range(20):
            await ask(site.port, "/api/publish", body={"channel": "chat:a", "data": "x" * 400_000}, headers=KEY)
        lines: list[dict[str, Any]] = [{"method": "history", "params": {"channel": "chat:a", "limit": -1}}] * 4
        lines.append({"id": 9, "method": "publish", "params": {"channel": "chat:b", "data": 1}})
        body = "\n".join(map(json.dumps, lines)).encode()
        reply = await ask(site.port, "/api", method="POST", body=body, headers=KEY)
        answers = [json.loads(line) for line in reply.body.split(b"\n")]
        assert ["result" in answer for answer in answers] == [True, True, True, False, False]
        assert (answers[-1]["id"], answers[-1]["error"]["code"]) == (9, 106)
        top = await ask(site.port, "/api/history", body={"channel": "chat:b"}, headers=KEY)
        assert top.json["result"]["offset"] == 0


async def test_an_app_that_refuses_for_now() -> None:
    """What an app refuses as temporary is 503 with ``Retry-After``, and 403 otherwise (PROTOCOL 17.1.5)."""
    app = App()

    @app.publishing
    async def publishing(client: AppClient, channel: str, data: bool) -> None:
        raise Refuse(450, "not so fast", temporary=data)

    async with serving() as site:
        app.attach(site.node)
        for temporary, status in ((True, 503), (False, 403)):
            reply = await ask(site.port, path("chat:a"), body={"data": temporary})
            assert (reply.status, reply.json["code"], "retry-after" in reply.headers) == (status, 450, temporary)
        await app.stop()
