"""PROTOCOL 17.1 over HTTP: whatever is asked, there is a status, a problem document, and nobody else notices."""

import asyncio
import json
import time
from typing import Any

import pytest
from conftest import ExpectedLog
from hopper import Reply, ask, head_of, read_head, vanish
from support import KEPT, Client, serving, settings
from test_rest import bearer, data_of, path, publish

from handlers import publications
from server.protocol import PAYLOAD_DEPTH


def check_problem(reply: Reply, status: int, code: int) -> Any:
    """The document of a problem, which has what RFC 9457 and the protocol ask for."""
    assert reply.status == status, reply
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.headers["cache-control"] == "no-store"
    problem = reply.json
    assert {"type", "title", "status", "detail", "code"} <= problem.keys()
    assert (problem["status"], problem["code"]) == (status, code), problem
    assert problem["type"] == f"/docs/rest.md#code-{code}"
    assert problem["title"]
    assert problem["detail"]
    return problem


BAD_QUERIES = [
    "since=",
    "since=x",
    "since=:",
    "since=e:-1",
    "since=e:1.5",
    "since=e:1e3",
    "since=e:%D9%A3",
    "since=e:9223372036854775808",
    "since=e:99999999999999999999999",
    "since=a.b:1",
    f"since={'e' * 33}:1",
    "since=e:1&since=e:1",
    "since=%ff:1",
    "since=e%3A1%00",
    "limit=",
    "limit=-1",
    "limit=1.5",
    "limit=ten",
    "limit=0x10",
    "limit=+5",
    "limit= 5",
    "limit=2147483648",
    "limit=99999999999999999999",
    "limit=1&limit=2",
    "reverse=1",
    "reverse=TRUE",
    "reverse=",
    "reverse=true&reverse=true",
]


async def test_every_parameter_wrong() -> None:
    """Each wrong, empty, repeated or too large parameter is 400 and named; one we do not know is passed over."""
    async with serving() as site:
        await publish(site, "chat:a", 1)
        for query in BAD_QUERIES:
            for headers in ({}, {"Prefer": "wait=30"}):
                reply = await ask(site.port, path("chat:a", query.replace(" ", "%20")), headers=headers)
                problem = check_problem(reply, 400, 107)
                assert problem["detail"].startswith(query.partition("=")[0]), (query, problem)
        good = await ask(site.port, path("chat:a", "unknown=1&unknown=2&limit=007&=&%ff=1"))
        assert data_of(good) == [1]


async def test_preferences_that_are_none() -> None:
    """RFC 7240: what is no preference of ours, or has no number, is passed over; the first that counts counts."""
    async with serving() as site:
        await publish(site, "chat:a", 1)
        for header in ("", "wait", "wait=", "wait=-1", "wait=soon", 'wait="', "respond-async", ",,;;==", "wait=0"):
            reply = await ask(site.port, path("chat:a"), headers={"Prefer": header})
            assert data_of(reply) == [1]
            assert "preference-applied" not in reply.headers, header
        for header, granted in (
            ("WAIT = 5", 5),
            ('wait="7"; x', 7),
            ("foo, wait=9, wait=2", 9),
            ("wait=999999999", 60),
        ):
            reply = await ask(site.port, path("chat:a"), headers={"Prefer": header})
            assert reply.headers["preference-applied"] == f"wait={granted}"


async def test_channels_that_are_none() -> None:
    """A name without namespace, too long, not ASCII, not UTF-8, or none: its code; passing channels keep nothing."""
    async with serving(settings(channel={"namespaces": [{"name": "chat", **KEPT}, {"name": "live"}]})) as site:
        for name, status, code in (
            ("nowhere:a", 404, 102),
            ("chat:" + "x" * 251, 400, 107),
            ("chat:ä", 400, 107),
            ("live:a", 404, 108),
            ("noname", 404, 108),
        ):
            check_problem(await ask(site.port, path(name)), status, code)
        check_problem(await ask(site.port, "/v1/channels/%ff%fe/publications"), 400, 107)
        for nowhere in ("/v1/channels//publications", "/v1/channels/chat:a", "/v1/channels", "/v1/", "/v1/x?a=b"):
            check_problem(await ask(site.port, nowhere), 404, 104)


BAD_BODIES: list[tuple[bytes, str]] = [
    (b"", "Expected JSON"),
    (b"{", "Expected JSON"),
    (b"null", "Expected"),
    (b"[]", "Expected"),
    (b'"data"', "Expected"),
    (b"{}", "got no data"),
    (b'{"Data": 1}', "got no data"),
    (b'{"data": 1', "Expected JSON"),
    (b'{"data": 1} x', "Expected JSON"),
    (b'{"data": nan}', "Expected JSON"),
    (b'{"data": "\xff"}', "Expected JSON"),
    (b"\xef\xbb\xbf{}", "Expected JSON"),
    (b'{"data": ' + b"[" * 5000 + b"]" * 5000 + b"}", "Expected JSON"),
]


async def test_bodies_that_are_none() -> None:
    """Each is 400 with what was expected; a payload that its namespace does not take is 400 as well."""
    namespaces = [{"name": "chat", **KEPT}, {"name": "object", **KEPT, "publication_data_format": "json_object"}]
    async with serving(settings(channel={"namespaces": namespaces})) as site:
        for body, detail in BAD_BODIES:
            problem = check_problem(await ask(site.port, path("chat:a"), body=body), 400, 107)
            assert detail in problem["detail"] or "payload" in problem["detail"], (body, problem)
        deep = b'{"data": ' + b"[" * (PAYLOAD_DEPTH + 1) + b"]" * (PAYLOAD_DEPTH + 1) + b"}"
        check_problem(await ask(site.port, path("chat:a"), body=deep), 400, 107)
        check_problem(await ask(site.port, path("object:a"), body={"data": [1]}), 400, 107)
        for kind in ("text/plain", "application/x-www-form-urlencoded", "application/jsonx", "", "a" * 300):
            reply = await ask(site.port, path("chat:a"), body={"data": 1}, headers={"Content-Type": kind})
            check_problem(reply, 415, 107)
        packed = await ask(site.port, path("chat:a"), body=b"\x1f\x8b", headers={"Content-Encoding": "gzip"})
        check_problem(packed, 415, 107)
        for key in ("", '""', "k" * 257, '"' + "k" * 257 + '"'):
            reply = await ask(site.port, path("chat:a"), body={"data": 1}, headers={"Idempotency-Key": key})
            check_problem(reply, 400, 107)
        assert data_of(await ask(site.port, path("chat:a"))) == []
        fine = {"Content-Type": "Application/JSON; charset=utf-8", "Idempotency-Key": "k" * 256}
        assert (await ask(site.port, path("chat:a"), body={"data": None, "more": 1}, headers=fine)).status == 201
        assert data_of(await ask(site.port, path("chat:a"))) == [None]


async def test_a_flood_of_refusals_does_not_fill_the_log(log: ExpectedLog) -> None:
    """Each is answered and counted; the log has one a second of the same kind, with how many it stands for."""
    async with serving() as site:
        begun = time.monotonic()
        for number in range(60):
            check_problem(await ask(site.port, path("chat:a", f"since=bad{number}")), 400, 107)
            check_problem(await ask(site.port, path("none:a")), 404, 102)
        lines = log.seen("command.refused")
        assert len(lines) <= 2 * (time.monotonic() - begun + 1)
        assert {(one["method"], one["address"], one["code"]) for one in lines} == {
            ("rest", "127.0.0.1", 107),
            ("rest", "127.0.0.1", 102),
        }
        assert sum(one["count"] for one in lines) <= 120
        assert (site.node.counts.refusals[107], site.node.counts.refusals[102]) == (60, 60)


async def test_methods_that_are_none() -> None:
    """405 with those that there are, on every path; a body to a GET does not matter."""
    async with serving() as site:
        for place, allow in (
            (path("chat:a"), "GET, HEAD, POST, OPTIONS"),
            ("/v1/channels/chat:a/presence", "GET, HEAD, OPTIONS"),
            ("/v1/channels/chat:a/events", "GET, HEAD, OPTIONS"),
            ("/v1/events?channel=chat:a", "GET, HEAD, OPTIONS"),
            ("/v1/openapi.json", "GET, HEAD, OPTIONS"),
        ):
            for method in ("PUT", "DELETE", "PATCH", "BREW"):
                reply = await ask(site.port, place, method=method)
                check_problem(reply, 405, 104)
                assert reply.headers["allow"] == allow
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(head_of("GET", path("chat:a"), {"Content-Length": "3"}) + b"{{{")
        assert (await read_head(reader))[0] == 200
        await vanish(writer)


async def send(port: int, head: dict[str, str], *parts: bytes) -> tuple[Reply, asyncio.StreamWriter]:
    """Send a publish piece by piece, as far as the server takes it; returns its answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head_of("POST", path("chat:a"), {"Content-Type": "application/json", **head}))
    for part in parts:
        writer.write(part)
    status, headers = await read_head(reader)
    body = await reader.readexactly(int(headers["content-length"]))
    return Reply(status, headers, body), writer


async def test_bodies_that_are_too_large() -> None:
    """413, by the announced length or by what comes, with the whole answer readable, however much is sent."""
    async with serving() as site:
        client = await Client.connected(site.url)
        await client.ask("subscribe", channel="chat:a")
        large = b'{"data": "' + b"x" * 300_000 + b'"}'
        check_problem(await ask(site.port, path("chat:a"), body=large), 413, 107)
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [large[:100_000], large[100_000:]])
        reply, writer = await send(site.port, {"Transfer-Encoding": "chunked"}, chunks + b"0\r\n\r\n")
        check_problem(reply, 413, 107)
        await vanish(writer)
        for length in ("99999999", "9" * 30):
            reply, writer = await send(site.port, {"Content-Length": length}, b"x" * 100_000)
            check_problem(reply, 413, 107)
            assert reply.headers["connection"] == "close"
            await vanish(writer)
        exact = b'{"data": "' + b"x" * (65_536 - 12) + b'"}'
        assert len(exact) == 65_536
        assert (await ask(site.port, path("chat:a"), body=exact)).status == 201
        check_problem(await ask(site.port, path("chat:a"), body=exact + b" "), 413, 107)
        assert (await client.push("pub"))["offset"] == 1
        await client.close()


async def test_bodies_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that goes on for ever is 413 after the limit and cut off soon; one that does not come is 408."""
    monkeypatch.setattr(publications, "LINGER_S", 0.1)
    async with serving() as site:
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(head_of("POST", path("chat:a"), {"Transfer-Encoding": "chunked"}))

        async def flood() -> None:
            while True:
                writer.write(b"8000\r\n" + b"x" * 0x8000 + b"\r\n")
                await writer.drain()

        flooding = asyncio.create_task(flood())
        status, headers = await read_head(reader)
        assert (status, json.loads(await reader.readexactly(int(headers["content-length"])))["code"]) == (413, 107)
        with pytest.raises(OSError):
            await flooding
        await vanish(writer)
        monkeypatch.setattr(publications, "BODY_S", 0.1)
        for sent in (b"", b'{"data": '):
            reply, writer = await send(site.port, {"Content-Length": "100"}, sent)
            check_problem(reply, 408, 107)
            await vanish(writer)
        assert (await ask(site.port, path("chat:a"), body={"data": 1})).status == 201


async def test_many_at_once_that_never_say_what_they_want() -> None:
    """Hundreds of requests that stop in the middle of a body keep nobody from publishing and reading."""
    async with serving() as site:
        writers = []
        for _ in range(300):
            _, writer = await asyncio.open_connection("127.0.0.1", site.port)
            writer.write(head_of("POST", path("chat:a"), {"Content-Length": "60000"}) + b'{"data": "')
            writers.append(writer)
        for number in range(20):
            await publish(site, "chat:a", number)
        assert data_of(await ask(site.port, path("chat:a"))) == list(range(20))
        for writer in writers:
            await vanish(writer)


async def test_a_payload_that_is_no_json() -> None:
    """In a binary namespace a payload that JSON cannot hold is 406 for whoever reads or waits here (PROTOCOL 9.4)."""
    namespaces = [{"name": "bin", **KEPT, "publication_data_format": "binary"}]
    async with serving(settings(channel={"namespaces": namespaces})) as site:
        body = {"channel": "bin:a", "b64data": "/w=="}
        waiting = asyncio.create_task(ask(site.port, path("bin:a", "since=:0"), headers={"Prefer": "wait=30"}))
        while not site.node.sessions:
            await ask(site.port, "/health/live")
        await ask(site.port, "/api/publish", body=body, headers={"X-API-Key": "api-key"})
        check_problem(await waiting, 406, 108)
        check_problem(await ask(site.port, path("bin:a")), 406, 108)
        check_problem(await ask(site.port, path("bin:a", "since=:0"), headers={"Prefer": "wait=30"}), 406, 108)


async def test_headers_of_any_kind() -> None:
    """Tokens with odd characters, headers in other encodings, huge ones: never a fault of ours."""
    async with serving() as site:
        for header, value in (
            ("Authorization", "Bearer é.é.é"),
            ("Authorization", "Bearer " + "a" * 60_000),
            ("Authorization", "Bearer a b"),
        ):
            check_problem(await ask(site.port, path("chat:a"), headers={header: value}), 401, 3500)
        for header, value in (("If-None-Match", "é" * 500), ("Prefer", "é=é"), ("X-Forwarded-For", "x" * 500)):
            assert (await ask(site.port, path("chat:a"), headers={header: value})).status == 200
        assert (await ask(site.port, path("chat:a"), headers=bearer(sub="é"))).status == 200


async def test_origins() -> None:
    """Pages of allowed origins may ask with token and key and read the answer; others get 403, problems included."""
    async with serving(settings(client={"allowed_origins": ["https://*.good.example"]})) as site:
        good, evil = {"Origin": "https://a.good.example"}, {"Origin": "https://evil.example"}
        for reply in (
            await ask(site.port, path("chat:a"), headers=good),
            await ask(site.port, path("chat:a", "limit=x"), headers=good),
            await ask(site.port, path("chat:a"), method="PUT", headers=good),
            await ask(site.port, path("chat:a"), body=b"x" * 70_000, headers=good),
        ):
            assert reply.headers["access-control-allow-origin"] == good["Origin"]
            assert "ETag" in reply.headers["access-control-expose-headers"]
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        preflight = await ask(site.port, path("chat:a"), method="OPTIONS", headers={**good, **asked})
        assert preflight.status == 204
        assert "POST" in preflight.headers["access-control-allow-methods"]
        for name in ("Authorization", "Idempotency-Key", "Prefer", "If-None-Match"):
            assert name in preflight.headers["access-control-allow-headers"]
        for method, body in (("GET", None), ("POST", {"data": 1}), ("OPTIONS", None)):
            refused = await ask(site.port, path("chat:a"), method=method, body=body, headers=evil)
            check_problem(refused, 403, 103)
            assert "access-control-allow-origin" not in refused.headers
        assert data_of(await ask(site.port, path("chat:a"))) == []
