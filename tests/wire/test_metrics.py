"""PROTOCOL 17.5: what is counted, who may read it, and on which port; and docs/metrics.md says what the code does."""

import asyncio
import json
import re
import signal
from asyncio import FIRST_COMPLETED
from collections.abc import Mapping
from pathlib import Path

import pytest
from conftest import ExpectedLog
from mongod import fresh_database, shared_set
from ports import free_port
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families
from redis_server import RedisServer
from support import PATIENTLY, ROOT, Client, Process, Site, config, serving, settings, token
from tornado.httpclient import AsyncHTTPClient, HTTPResponse

from handlers.metrics import METRICS
from server.blocks import Block, adding, lifting
from server.blocks.memory import MemoryBlocks
from server.broker.redis import RedisBroker
from server.errors import Unavailable
from server.history import History
from server.history.mongo import MongoHistory
from server.history.sqlite import SqliteHistory
from server.metrics import Counts, Histogram
from server.settings import MongoSettings, RedisSettings

WATCHED = {"prometheus": {"enabled": True}}


class AwayBlocks(MemoryBlocks):
    """A store that is away at first."""

    away = True

    async def open(self) -> None:
        """See ``Blocks.open``."""
        if self.away:
            raise Unavailable("mongo.url: nobody answers")
        await super().open()


async def _get(port: int, path: str, **headers: str) -> HTTPResponse:
    return await AsyncHTTPClient().fetch(
        f"http://127.0.0.1:{port}{path}", headers=headers, raise_error=False, request_timeout=30
    )


async def _numbers(site: Site) -> dict[str, dict[tuple[str, ...], float]]:
    """Every sample by its name and the values of its labels."""
    response = await _get(site.port, "/metrics")
    assert response.code == 200
    return _samples(response.body.decode())


def _samples(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


def _families(text: str) -> Mapping[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


# --- the table ------------------------------------------------------------------------------
def test_every_metric_is_documented() -> None:
    """docs/metrics.md lists every metric with its kind, labels and meaning, and none that does not exist."""
    text = (ROOT / "docs" / "metrics.md").read_text()
    table = re.findall(r"<!-- metrics -->(.*?)<!-- /metrics -->", text, re.DOTALL)
    assert len(table) == 1
    stated = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table[0].strip().splitlines()[2:]]
    assert stated == [
        (f"`{row.shown}`", row.kind, ", ".join(f"`{label}`" for label in row.labels), row.about) for row in METRICS
    ]


async def test_every_metric_is_there_and_no_other_of_ours() -> None:
    """What is told has the names, kinds and labels of the table, and a help text each."""
    async with serving(settings(**WATCHED)) as site:
        client = await Client.connected(site.url)
        await client.ask("subscribe", channel="chat:a")
        families = _families((await _get(site.port, "/metrics")).body.decode())
        await client.close()
    ours = {name: family for name, family in families.items() if name.startswith("waterspout_")}
    for row in METRICS:
        family = ours.pop(row.shown.removesuffix("_total"))
        assert (family.type, family.documentation) == (row.kind, row.about)
        assert all(set(row.labels) | {"le"} >= set(sample.labels) for sample in family.samples)
    assert not ours
    assert {"process_cpu_seconds", "python_info"} <= set(families)


async def test_openmetrics_for_who_accepts_it() -> None:
    """The newer format is there as well, and can be read."""
    async with serving(settings(**WATCHED)) as site:
        response = await _get(site.port, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
        assert response.headers["Content-Type"].startswith("application/openmetrics-text")
        assert "waterspout_connections" in {family.name for family in read_openmetrics(response.body.decode())}
        plain = await _get(site.port, "/metrics")
        assert plain.headers["Content-Type"].startswith("text/plain")
        assert plain.headers["Cache-Control"] == "no-store"


# --- what is counted --------------------------------------------------------------------------
async def test_connections_and_what_becomes_of_them(log: ExpectedLog) -> None:
    """Connections, users, subscriptions and channels rise and fall; ends are counted by code, limits by setting."""
    log.expect("command.refused")
    limited = {**WATCHED, "client": {"channel_limit": 2, "user_connection_limit": 1}, "http_api": {"key": "k"}}
    async with serving(settings(**limited)) as site:
        ann = await Client.connected(site.url, token=token({"sub": "ann"}))
        for channel in ("chat:a", "live:b"):
            await ann.ask("subscribe", channel=channel)
        assert await ann.refused("subscribe", channel="chat:c") == 106
        second = await Client.open(site.url)
        await second.send(second.command("connect", token=token({"sub": "ann"})))
        assert (await second.closed())[0] == 3504
        found = await _numbers(site)
        assert found["waterspout_connections"][()] == found["waterspout_users"][()] == 1
        assert found["waterspout_channels"][()] == found["waterspout_subscriptions"][("live",)] == 2
        assert found["waterspout_connections_opened_total"] == {("websocket",): 2}
        assert found["waterspout_disconnects_total"] == {("3504",): 1}
        assert found["waterspout_refusals_total"] == {("106",): 1}
        assert found["waterspout_limits_total"] == {
            ("client.channel_limit",): 1,
            ("client.user_connection_limit",): 1,
        }
        await ann.close()
        while (found := await _numbers(site))["waterspout_connections"][()]:
            pass
        assert found["waterspout_connections"][()] == found["waterspout_channels"][()] == 0
        assert found["waterspout_disconnects_total"][("0",)] == 1


async def test_blocked_users() -> None:
    """Users with a block or a mute are counted once each, wherever it is, and no more when it is lifted."""
    async with serving(settings(**WATCHED)) as site:
        name = "waterspout_blocked_users"
        assert (await _numbers(site))[name][()] == 0
        for user, channel, mute in (("ann", "", False), ("ann", "chat:1", True), ("ben", "", True)):
            await site.node.block(user, adding(Block(channel, mute)))
        assert (await _numbers(site))[name][()] == 2
        await site.node.block("ann", lifting("", muted=False))
        assert (await _numbers(site))[name][()] == 2
        await site.node.block("ben", lifting("", muted=True))
        assert (await _numbers(site))[name][()] == 1


async def test_every_part_is_up_or_not(log: ExpectedLog) -> None:
    """A part that cannot be opened is 0, the store of blocks as well as any other, and 1 when it is there."""
    log.expect("blocks.unavailable")
    blocks = AwayBlocks()
    async with serving(settings(**WATCHED), blocks=blocks, patiently=True) as site:
        up = (await _numbers(site))["waterspout_up"]
        assert up == {("history",): 1, ("broker",): 1, ("presence",): 1, ("blocks",): 0}
        blocks.away = False
        async with asyncio.timeout(15):
            await site.node.tasks.idle()
        assert (await _numbers(site))["waterspout_up"][("blocks",)] == 1


async def test_publications_in_and_out() -> None:
    """What comes in is counted by its kind, what goes out by subscription, in small rooms and in large ones."""
    async with serving(settings(**WATCHED)) as site:
        clients = [await Client.connected(site.url) for _ in range(10)]
        for client in clients:
            await client.ask("subscribe", channel="live:large")
        for client in clients[:2]:
            await client.ask("subscribe", channel="chat:small")
        for number in range(3):
            await clients[0].ask("publish", channel="live:large", data=number)
            await clients[0].ask("publish", channel="chat:small", data=number)
        for client in clients:
            await client.publications("live:large", 3)
        found = await _numbers(site)
        assert found["waterspout_publications_total"] == {("kept",): 3, ("passing",): 3}
        assert found["waterspout_deliveries_total"][()] == 3 * 10 + 3 * 2
        assert found["waterspout_fanout_seconds_count"][()] == 3, "one for each turn with something for a large room"
        assert found["waterspout_commit_publications_count"][()] == 3
        assert found["waterspout_publication_age_seconds_count"][("here",)] == 3
        for client in clients:
            await client.close()


async def test_recoveries_by_outcome_and_length() -> None:
    """Who comes back counts as recovered, with what was missed, or as unrecoverable."""
    async with serving(settings(**WATCHED)) as site:
        client = await Client.connected(site.url)
        for number in range(7):
            await client.ask("publish", channel="chat:a", data=number)
        top = await client.ask("subscribe", channel="chat:a", recoverable=True)
        await client.ask("unsubscribe", channel="chat:a")
        for offset, epoch, recovered in ((4, top["epoch"], True), (4, "another", False)):
            wish = {"recover": True, "recoverable": True, "offset": offset, "epoch": epoch}
            result = await client.ask("subscribe", channel="chat:a", **wish)
            assert result.get("recovered", False) is recovered
            await client.ask("unsubscribe", channel="chat:a")
        found = await _numbers(site)
        assert found["waterspout_recoveries_total"] == {("recovered",): 1, ("unrecoverable",): 1, ("lost",): 0}
        assert found["waterspout_recovery_publications_sum"][()] == 3
        assert found["waterspout_history_read_seconds_count"][()] > 0
        await client.close()


@pytest.mark.parametrize("kind", ["sqlite", "mongo"])
async def test_time_of_a_write(kind: str, tmp_path: Path) -> None:
    """With history in a file or in MongoDB each write counts once, with its publications and the time that it took."""
    history: History = SqliteHistory(str(tmp_path / "history.db"))
    if kind == "mongo":
        history = MongoHistory(
            MongoSettings(url=shared_set().url, database=fresh_database(), publish_timeout=PATIENTLY)
        )
    async with serving(settings(**WATCHED), history=history) as site:
        client = await Client.connected(site.url)
        for number in range(5):
            await client.ask("publish", channel="chat:a", data=number)
        found = await _numbers(site)
        assert found["waterspout_batch_publications_sum"][()] == 5
        assert found["waterspout_batch_seconds_count"][()] == 5, "one by one, since each was awaited"
        assert 0 < found["waterspout_batch_seconds_sum"][()] < 60
        assert found["waterspout_up"][("history",)] == 1
        await client.close()


async def test_time_and_state_of_redis(log: ExpectedLog) -> None:
    """Redis is up while it is, and how long it takes over a word is known; while it is away the metric says so."""
    log.expect("broker.lost")
    with RedisServer() as redis:
        broker = RedisBroker(RedisSettings(url=redis.url))
        async with serving(settings(**WATCHED), broker=broker) as site:
            client = await Client.connected(site.url)
            await client.ask("publish", channel="live:a", data=1)
            taken = asyncio.get_running_loop().create_future()
            observe = site.node.counts.broker_seconds.observe

            def note(seconds: float) -> None:
                observe(seconds)
                if not taken.done():
                    taken.set_result(None)

            broker.on_taken = note
            await client.ask("publish", channel="live:a", data=2)
            await asyncio.wait_for(taken, 15)
            found = await _numbers(site)
            assert found["waterspout_broker_seconds_count"][()] >= 1
            assert found["waterspout_up"][("broker",)] == 1
            redis.kill()
            async with asyncio.timeout(30):
                while (await _numbers(site))["waterspout_up"][("broker",)]:
                    pass
            await client.close()


async def test_events_are_counted_whatever_is_logged() -> None:
    """Each event counts under its name and weight, also those that are too light for the log."""
    async with serving(settings(**WATCHED)) as site:
        before = (await _numbers(site))["waterspout_events_total"].get(("connection.accepted", "info"), 0)
        client = await Client.connected(site.url)
        assert (await _numbers(site))["waterspout_events_total"][("connection.accepted", "info")] == before + 1
        await client.close()


# --- who may read it ----------------------------------------------------------------------------
async def test_closed_unless_switched_on() -> None:
    """A configured server tells no metrics unless that is configured, too."""
    async with serving() as site:
        assert (await _get(site.port, "/metrics")).code == 404
    async with serving(settings(prometheus={"enabled": True, "handler_prefix": "/my/numbers"})) as site:
        assert (await _get(site.port, "/metrics")).code == 404
        assert (await _get(site.port, "/my/numbers")).code == 200


async def test_a_port_for_operators(tmp_path: Path) -> None:
    """With an internal port health, metrics, console and API are there and nowhere else; clients come as before."""
    port = free_port()
    chosen = config(
        prometheus={"enabled": True},
        admin={"enabled": True, "password": "open sesame"},
        http_server={"internal_port": port},
    )
    with Process(tmp_path, chosen) as process:
        inside = ("/health/live", "/health/ready", "/metrics", "/admin", "/static/admin.js", "/static/style.css")
        for path in inside:
            assert (await _get(port, path)).code == 200, path
        for path in inside[:4]:
            assert (await _get(process.port, path)).code == 404, path
        for path in ("/", "/chat", "/v1/status"):
            assert (await _get(process.port, path)).code == 200, path
            assert (await _get(port, path)).code == 404, path
        for at, code in ((port, 200), (process.port, 404)):
            url, key = f"http://127.0.0.1:{at}/api/info", {"X-API-Key": "api-key"}
            response = await AsyncHTTPClient().fetch(url, method="POST", body="{}", headers=key, raise_error=False)
            assert response.code == code
        client = await Client.connected(process.url)
        assert _samples((await _get(port, "/metrics")).body.decode())["waterspout_connections"][()] == 1
        await client.close()


async def test_the_port_for_operators_outlives_the_other(tmp_path: Path) -> None:
    """While clients are sent away nobody new comes in, and operators can watch how many are left."""
    port = free_port()
    chosen = config(
        prometheus={"enabled": True},
        http_server={"internal_port": port},
        shutdown={"grace": "0s", "pace": 1, "timeout": "60s"},
    )
    with Process(tmp_path, chosen) as process:
        clients = [await Client.connected(process.url) for _ in range(30)]
        process.send(signal.SIGTERM)
        await asyncio.wait([asyncio.ensure_future(client.closed()) for client in clients], return_when=FIRST_COMPLETED)
        with pytest.raises(ConnectionRefusedError):
            await _get(process.port, "/")
        assert (await _get(port, "/health/ready")).code == 503
        found = _samples((await _get(port, "/metrics")).body.decode())
        assert 0 < found["waterspout_connections"][()] < 30
        assert found["waterspout_disconnects_total"][("3001",)] >= 1
        process.send(signal.SIGTERM)  # be quick
        assert [await client.closed() for client in clients] == [(3001, "shutdown")] * 30
        assert await asyncio.to_thread(process.wait) == 0


async def test_while_nothing_is_configured(tmp_path: Path) -> None:
    """Whoever tries it out has metrics, and health, on the one port there is."""
    with Process(tmp_path) as process:
        assert (await _get(process.port, "/metrics")).code == 200
        assert json.loads((await _get(process.port, "/health/ready")).body) == {"ready": True}


# --- plain numbers --------------------------------------------------------------------------------
def test_a_histogram_counts_up_to_its_bounds() -> None:
    """A value counts where it is at most the bound; above the last one it still counts, and all are summed."""
    histogram = Histogram((1, 10))
    for value in (0, 1, 1.5, 10, 11, 1000):
        histogram.observe(value)
    assert (histogram.counts, histogram.count, histogram.total) == ([2, 2, 2], 6, 1023.5)


@pytest.mark.parametrize(
    ("why", "limit"),
    [
        ("look at client.channel_limit (128)", "client.channel_limit"),
        ("look at client.queue_max_size and client.outbox_stall_timeout", "client.queue_max_size"),
        ("look at rest.poll_limit (100)", "rest.poll_limit"),
        ("no connect within client.stale_close_delay (10 s)", "client.stale_close_delay"),
        ("rpc dice() at bot.py:10 took longer than app.timeout", "app.timeout"),
        ("uni_websocket.message_size_limit", "uni_websocket.message_size_limit"),
        ("look at client.allowed_origins", None),
        ("", None),
    ],
)
def test_limits_are_found_in_what_is_said(why: str, limit: str | None) -> None:
    """The setting that a refusal names is counted if it is a limit, and nothing else is."""
    counts = Counts()
    counts.note_why(why)
    assert counts.limits == ({limit: 1} if limit else {})
