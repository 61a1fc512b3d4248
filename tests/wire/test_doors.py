"""docs/who-gets-in.md: every door of a server, as a stranger finds it."""

import asyncio
import json
import re
import secrets
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest
import websockets
from hopper import head_of, read_head, vanish
from support import ROOT, Client, Closed, Site, serving

import run
from server.configuration import load, reference
from server.reload import LIVE
from server.settings import Settings

PAGE = (ROOT / "docs" / "who-gets-in.md").read_text()
CONNECT = {"id": 1, "connect": {}}
BODIES: dict[str, Any] = {
    "/connection/http_stream": CONNECT,
    "/connection/uni_http_stream": {},
    "/emulation": {"session": "", "node": "", "data": ""},
    "/v1/channels/chat:a/publications": {"data": 1},
    "/v1/session": {"name": "Bo"},
    "/api/info": {},
}
QUERIES = {"/connection/sse": CONNECT, "/connection/uni_sse": {}}

SECTIONS: list[dict[str, Any]] = [
    {"presence": {"lease": "20s"}},
    {"client": {"allowed_origins": ["https://a.example"]}},
    {"channel": {"namespaces": [{"name": "chat"}]}},
    {"shutdown": {"pace": 1}},
]
"""Settings that open nothing by themselves, each of which closes all."""


class Door(NamedTuple):
    """A row of the table."""

    name: str
    request: str
    open: str
    closed: str
    settings: str


def doors() -> Iterator[Door]:
    """The rows of the table."""
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and len(cells) == len(Door._fields) and "`" in cells[1]:
            yield Door(cells[0], cells[1].strip("`"), *cells[2:])


DOORS = list(doors())


def configured(**sections: Any) -> Settings:
    """Settings of these sections alone; a server that is given none is open."""
    settings = load(config=None, environ={}, flags={**sections, "sqlite": {"path": ":memory:"}})
    return run.complete(settings, secrets.token_hex(32), secrets.token_hex(32))


async def knock(site: Site, request: str) -> str:
    """What a stranger is answered: a status, a code, or "in"."""
    method, path = request.split(" ")
    if method in ("CONNECT", "ORIGIN"):
        return await _connect(site, path, "https://evil.example" if method == "ORIGIN" else None)
    headers = {"Connection": "close"}
    body = b""
    if path in QUERIES:
        path += f"?cf_connect={quote(json.dumps(QUERIES[path]))}"
    if method == "POST":
        body = json.dumps(BODIES[path]).encode()
        headers |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    return str(await _status(site, head_of(method, path, headers) + body))


async def _status(site: Site, request: bytes) -> int:
    """The status of an answer that need not end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    try:
        writer.write(request)
        status, _ = await read_head(reader)
        return status
    finally:
        await vanish(writer)


async def _connect(site: Site, path: str, origin: str | None) -> str:
    url = f"ws://127.0.0.1:{site.port}{path}"
    try:
        if "uni" in path:
            async with websockets.connect(url) as connection:
                await connection.send("{}")
                return "in" if "connect" in json.loads(await connection.recv()) else "out"
        client = await Client.open(url, **({"origin": origin} if origin else {}))
        await client.ask("connect")
    except websockets.InvalidStatus as error:
        return str(error.response.status_code)
    except Closed as end:
        return str(end.code)
    await client.close()
    return "in"


@pytest.fixture(autouse=True)
def _announced(log: Any) -> None:
    """A stranger is in the log."""
    log.expect("connection.refused", "api.refused", "admin.refused")


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.name)
async def test_a_door_of_a_server_that_nobody_has_configured(door: Door) -> None:
    """It is as open as the table says."""
    async with serving(configured()) as site:
        assert await knock(site, door.request) == door.open


@pytest.mark.parametrize("sections", SECTIONS, ids=lambda sections: next(iter(sections)))
async def test_any_setting_closes_them_all(sections: dict[str, Any]) -> None:
    """Whatever is set: each door is as closed as the table says."""
    async with serving(configured(**sections)) as site:
        assert {door.name: await knock(site, door.request) for door in DOORS} == {
            door.name: door.closed for door in DOORS
        }


async def test_who_is_in_has_nothing_yet() -> None:
    """Without a namespace a channel is unknown, and without options nobody may do anything in it."""
    async with serving(configured(client={"allow_anonymous_connect_without_token": True})) as site:
        client = await Client.connected(site.url)
        assert await client.refused("subscribe", channel="chat:a") == 102
        assert await client.refused("subscribe", channel="a") == 103
        assert await client.refused("publish", channel="a", data=1) == 103
        await client.close()


def test_the_settings_that_open_them_exist() -> None:
    """Each setting of the page is one."""
    names = {row.name for row in reference()}
    groups = {name.rsplit(".", depth)[0] for name in names for depth in range(1, name.count(".") + 1)}
    settings = {name for door in DOORS for name in re.findall(r"`([a-z_.]+)`", door.settings)}
    assert len(settings) > 10
    assert settings <= names | groups


def test_no_transport_or_path_is_left_out() -> None:
    """Whatever can be enabled is a door of the table."""
    enabled = {row.name for row in reference() if re.fullmatch(r"[a-z_]+\.enabled", row.name)}
    assert enabled - {name for door in DOORS for name in re.findall(r"`([a-z_.]+)`", door.settings)} == {"init.enabled"}


def test_the_page_lists_what_can_be_changed() -> None:
    """Between its marks, the settings that a running server takes over."""
    listed = PAGE.partition("<!-- live -->")[2].partition("<!-- /live -->")[0]
    assert re.findall(r"`([a-z_.]+)`", listed) == sorted(LIVE)
