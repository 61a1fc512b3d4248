"""PROTOCOL 13 and 21.4: subscribers that want less than everything, and that know channels by number."""

import asyncio
from typing import Any

import pytest
from support import KEPT, OPEN, Client, Site, serving, settings, token

from server.history import Draft
from server.stream import ClientInfo

FORMATS = pytest.mark.parametrize("format", ["json", "protobuf"])
GERMAN = {"key": "lang", "cmp": "eq", "val": "de"}
DEAR = {"key": "price", "cmp": "gte", "val": "10.5"}


def _spaces(**options: Any) -> Any:
    """Kept and passing channels with filters; ``options`` are those of the kept ones."""
    kept = {"name": "news", **KEPT, "allow_tags_filter": True, **options}
    passing = {"name": "tick", **OPEN, "allow_tags_filter": True}
    return settings(channel={"namespaces": [{"name": "chat", **KEPT}, kept, passing]})


async def _say(site: Site, channel: str, data: int, **tags: str) -> None:
    """Publish a number with these tags."""
    namespace = site.node.channels.known(channel)
    await site.node.publish(channel, namespace, Draft(b"%d" % data, tags=tags or None))


def _data(publications: list[dict[str, Any]]) -> list[Any]:
    return [publication["data"] for publication in publications]


# --- filters: 13.1 ----------------------------------------------------------------------
@FORMATS
@pytest.mark.parametrize(
    ("channel", "filter", "code"),
    [
        pytest.param("news:1", GERMAN, 0, id="a leaf"),
        pytest.param("news:1", {"op": "and", "nodes": [GERMAN, {"op": "not", "nodes": [DEAR]}]}, 0, id="a tree"),
        pytest.param("tick:1", {"key": "lang", "cmp": "in", "vals": ["de", "en"]}, 0, id="in a passing channel"),
        pytest.param("chat:1", GERMAN, 107, id="not allowed"),
        pytest.param("news:1", {}, 107, id="empty"),
        pytest.param("news:1", {"key": "lang", "cmp": "is", "val": "de"}, 107, id="an unknown comparison"),
        pytest.param("news:1", {"key": "lang", "cmp": "eq", "vals": ["de"]}, 107, id="val is missing"),
        pytest.param("news:1", {"op": "not", "nodes": [GERMAN, DEAR]}, 107, id="not of two"),
        pytest.param("news:1", {"op": "and", "nodes": [GERMAN] * 50}, 107, id="too many nodes"),
    ],
)
async def test_which_filters_there_are(format: str, channel: str, filter: dict[str, Any], code: int) -> None:
    """PROTOCOL 13.1: a bad filter, or one where none is allowed, costs the command, and there is no subscription."""
    async with serving(_spaces()) as site:
        client = await Client.connected(site.url, format=format)
        if not code:
            assert "id" not in await client.ask("subscribe", channel=channel, tf=filter)
            return
        assert await client.refused("subscribe", channel=channel, tf=filter) == code
        assert not site.node.hub.feeds
        await client.ask("subscribe", channel=channel)


@pytest.mark.parametrize("filter", [None, 1, "x", [], [GERMAN], {"key": 1, "cmp": "eq", "val": "de"}])
async def test_what_is_no_filter_at_all(filter: Any) -> None:
    """PROTOCOL 13.1: any other JSON in its place is 107 and not the end of the connection."""
    async with serving(_spaces()) as site:
        client = await Client.connected(site.url)
        assert await client.refused("subscribe", channel="news:1", tf=filter) == 107
        await client.ask("subscribe", channel="news:1")


async def test_a_filter_in_connect_has_no_effect() -> None:
    """PROTOCOL 4.1.4: neither filter, delta nor number of a wish count, be they good or bad."""
    async with serving(_spaces(allowed_delta_types=["fossil"])) as site:
        subs = {"news:1": {"tf": {}, "delta": "fossil", "flag": 1}}
        client = await Client.connected(site.url, subs=subs)
        assert client.hello["subs"] == {"news:1": {"recoverable": True, "positioned": True}}
        await _say(site, "news:1", 1)
        assert _data(await client.publications("news:1", 1)) == [1]


# --- filters: 13.2, 13.3 ---------------------------------------------------------------------
@FORMATS
@pytest.mark.parametrize("crowd", [1, 12])
@pytest.mark.parametrize("channel", ["news:1", "tick:1"])
async def test_live_publications(format: str, crowd: int, channel: str) -> None:
    """PROTOCOL 13.3: each of several filters, shared by few or many, gets what matches, in order; others get all."""
    async with serving(_spaces()) as site:
        wishes = {"german": GERMAN, "dear": DEAR, "both": {"op": "and", "nodes": [DEAR, GERMAN]}, "all": None}
        crowds: dict[str, list[Client]] = {}
        for name, filter in wishes.items():
            crowds[name] = [await Client.connected(site.url, format=format) for _ in range(crowd)]
            for client in crowds[name]:
                await client.ask("subscribe", channel=channel, **({"tf": filter} if filter else {}))
        assert len(site.node.hub.feeds[channel].live) == 4
        said: list[tuple[int, dict[str, str]]] = [
            (1, {"lang": "de", "price": "10.5"}),
            (2, {"lang": "en", "price": "99"}),
            (3, {"lang": "de", "price": "9.99"}),
            (4, {}),
            (5, {"price": "much", "lang": "de"}),
            (6, {"lang": "de", "price": "11"}),
        ]
        await asyncio.gather(*(_say(site, channel, number, **tags) for number, tags in said))
        expected = {"german": [1, 3, 5, 6], "dear": [1, 2, 6], "both": [1, 6], "all": [1, 2, 3, 4, 5, 6]}
        for name, clients in crowds.items():
            for client in clients:
                assert _data(await client.publications(channel, len(expected[name]))) == expected[name], name
                assert not client.pushes


@FORMATS
async def test_recovery_is_filtered(format: str) -> None:
    """PROTOCOL 13.3: the reply has what matches of its page, pushes have what matches of the rest, live ones follow."""
    async with serving(_spaces()) as site:
        for number in range(1, 351):
            await _say(site, "news:1", number, lang="de" if number % 7 == 0 else "en")
        client = await Client.connected(site.url, format=format)
        result = await client.ask("subscribe", channel="news:1", tf=GERMAN, recover=True, offset=5)
        assert (result["recovered"], result["offset"]) == (True, 5)
        sevens = [number for number in range(6, 351) if number % 7 == 0]
        first = _data(result["publications"])
        assert first == [number for number in sevens if number <= 105]
        assert _data(await client.publications("news:1", len(sevens) - len(first))) == sevens[len(first) :]
        await _say(site, "news:1", 351, lang="en")
        await _say(site, "news:1", 352, lang="de")
        last = await client.push("pub", "news:1")
        assert (last["data"], last["offset"]) == (352, 352)
        assert not client.pushes


async def test_a_client_that_lags_behind_its_filter() -> None:
    """PROTOCOL 13.3: publications that do not match move the server's position only; recovery from the client's own
    position brings what matches since, once."""
    async with serving(_spaces()) as site:
        client = await Client.connected(site.url)
        await client.ask("subscribe", channel="news:1", tf=GERMAN)
        await _say(site, "news:1", 1, lang="de")
        offset = (await client.push("pub", "news:1"))["offset"]
        for number in range(2, 300):
            await _say(site, "news:1", number, lang="en")
        await client.drop()
        await _say(site, "news:1", 300, lang="de")
        back = await Client.connected(site.url)
        result = await back.ask("subscribe", channel="news:1", tf=GERMAN, recover=True, offset=offset)
        assert (result["recovered"], result["offset"], result.get("publications", [])) == (True, 1, [])
        assert (await back.push("pub", "news:1"))["data"] == 300


async def test_histories_are_not_filtered() -> None:
    """PROTOCOL 13.3: ``history`` of a filtered subscriber has everything."""
    async with serving(_spaces()) as site:
        client = await Client.connected(site.url)
        await client.ask("subscribe", channel="news:1", tf=GERMAN)
        await _say(site, "news:1", 1, lang="en")
        await _say(site, "news:1", 2)
        assert _data((await client.ask("history", channel="news:1", limit=10))["publications"]) == [1, 2]


async def test_a_hole_behind_a_filter() -> None:
    """PROTOCOL 11.2, 13.3: what was missed is read and filtered, and joins and leaves are not filtered."""
    async with serving(_spaces(presence=True, join_leave=True, force_push_join_leave=True)) as site:
        client = await Client.connected(site.url)
        await client.ask("subscribe", channel="news:1", tf=GERMAN)
        assert (await client.push("join", "news:1"))["info"]["client"] == client.hello["client"]
        history = site.node.history
        silent, history.on_commit = history.on_commit, lambda *_: None
        for number in (1, 2, 3):
            await _say(site, "news:1", number, lang="de" if number == 2 else "en")
        history.on_commit = silent
        await _say(site, "news:1", 4, lang="de")
        assert _data(await client.publications("news:1", 2)) == [2, 4]
        assert not client.pushes


# --- numbers: 21.4 ------------------------------------------------------------------------------
async def _numbered(client: Client, channel: str) -> int:
    """Subscribe by number."""
    return int((await client.ask("subscribe", channel=channel, flag=1))["id"])


async def _first(client: Client) -> dict[str, Any]:
    """The first push that nobody took, by whatever name."""
    await client.until(lambda: bool(client.pushes))
    return client.pushes[0]


def _by_number(client: Client, number: int) -> list[dict[str, Any]]:
    """The pushes so far that came by this number; none of them may have a name as well."""
    found = [push for push in client.pushes if push.get("id") == number]
    assert not any("channel" in push for push in found)
    return found


async def test_pushes_by_number() -> None:
    """PROTOCOL 21.4: ``pub``, ``join`` and ``leave`` come by number, ``unsubscribe`` by name; Protobuf gets names."""
    options = {"presence": True, "join_leave": True, "force_push_join_leave": True}
    async with serving(_spaces(**options)) as site:
        client = await Client.connected(site.url, token=token({"sub": "42"}))
        other = await Client.connected(site.url, format="protobuf")
        number, second = await _numbered(client, "news:1"), await _numbered(client, "news:2")
        assert 0 < number != second > 0
        assert "id" not in await other.ask("subscribe", channel="news:1", flag=1)
        await _say(site, "news:1", 7)
        await other.ask("unsubscribe", channel="news:1")
        await client.until(lambda: len(_by_number(client, number)) == 4)
        found = _by_number(client, number)
        assert [next(kind for kind in push if kind != "id") for push in found] == ["join", "join", "pub", "leave"]
        assert found[2]["pub"]["data"] == 7
        assert (await other.push("pub", "news:1"))["data"] == 7
        assert len(_by_number(client, second)) == 1
        for session in list(site.node.sessions.values()):
            session.unsubscribe_by_order("news:1")
        assert (await client.push("unsubscribe", "news:1"))["code"] == 2000


async def test_one_number_for_a_channel() -> None:
    """PROTOCOL 21.4: all of a process have the same one, so that they share their frames, few or many."""
    async with serving(_spaces()) as site:
        clients = [await Client.connected(site.url) for _ in range(12)]
        numbers = {await _numbered(client, "news:1") for client in clients}
        assert len(numbers) == 1
        (manner,) = site.node.hub.feeds["news:1"].live
        assert manner.plain
        await _say(site, "news:1", 1)
        for client in clients:
            push = await _first(client)
            assert ({push["id"]}, push["pub"]["data"]) == (numbers, 1)


async def test_a_number_that_was_given_up_is_not_used_again() -> None:
    """PROTOCOL 21.4: who comes back when all have left gets another one, which nothing can be taken for."""
    async with serving(_spaces()) as site:
        client = await Client.connected(site.url)
        first = await _numbered(client, "news:1")
        await client.ask("unsubscribe", channel="news:1")
        assert await _numbered(client, "news:1") != first
        assert await _numbered(client, "news:2") != first


async def test_recovery_by_number() -> None:
    """PROTOCOL 21.4: what follows a recovery's reply comes by the number that the reply has said."""
    async with serving(_spaces()) as site:
        for number in range(1, 251):
            await _say(site, "news:1", number)
        client = await Client.connected(site.url)
        result = await client.ask("subscribe", channel="news:1", flag=1, recover=True)
        channel = result["id"]
        assert _data(result["publications"]) == list(range(1, 101))
        await client.until(lambda: len(_by_number(client, channel)) == 150)
        assert [push["pub"]["data"] for push in _by_number(client, channel)] == list(range(101, 251))


@pytest.mark.parametrize("flag", [0, 2, 4])
async def test_no_number_for_who_does_not_know_them(flag: int) -> None:
    """PROTOCOL 21.4: without bit 1 there is no ``id``, and pushes have the channel's name."""
    async with serving(_spaces()) as site:
        client = await Client.connected(site.url)
        assert "id" not in await client.ask("subscribe", channel="news:1", flag=flag)
        await _say(site, "news:1", 1)
        assert _data(await client.publications("news:1", 1)) == [1]


async def test_a_filter_by_number() -> None:
    """Both at once: few or many, each gets what it wants by the same number."""
    async with serving(_spaces()) as site:
        client = await Client.connected(site.url)
        result = await client.ask("subscribe", channel="news:1", flag=1, tf=GERMAN)
        await _say(site, "news:1", 1)
        await _say(site, "news:1", 2, lang="de")
        push = await _first(client)
        assert (push["id"], push["pub"]["data"], push["pub"]["tags"]) == (result["id"], 2, {"lang": "de"})


async def test_who_publishes_is_seen_by_all_manners() -> None:
    """Every form of a frame has the publication's other fields: publisher, tags, time, and the first one's epoch."""
    async with serving(_spaces(allowed_delta_types=["fossil"])) as site:
        clients = [await Client.connected(site.url) for _ in range(4)]
        wishes: list[dict[str, Any]] = [{}, {"flag": 1}, {"tf": GERMAN}, {"delta": "fossil"}]
        for client, wish in zip(clients, wishes, strict=True):
            await client.ask("subscribe", channel="news:1", **wish)
        info = ClientInfo("42", "c", b'{"name":"Ada"}')
        draft = Draft(b"1", info=info, tags={"lang": "de"})
        await site.node.publish("news:1", site.node.channels.known("news:1"), draft)
        seen = []
        for client in clients:
            publication = dict((await _first(client))["pub"])
            assert publication.pop("data") in (1, "1")
            seen.append(publication)
        assert seen[0]["info"] == {"user": "42", "client": "c", "conn_info": {"name": "Ada"}}
        assert len(seen[0]["epoch"]) == 8
        assert all(one == seen[0] for one in seen)
