"""The back end's SDK, ``cent``, against ``/api``: every method that both have.

PROTOCOL 15.
"""

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import cent
import pytest
from cent import (
    AsyncClient,
    BatchRequest,
    BroadcastRequest,
    CentApiResponseError,
    CentTransportError,
    CentUnauthorizedError,
    ChannelsRequest,
    ConnectionsRequest,
    Disconnect,
    DisconnectRequest,
    HistoryRemoveRequest,
    HistoryRequest,
    InfoRequest,
    PresenceRequest,
    PresenceStatsRequest,
    PublishRequest,
    RefreshRequest,
    StreamPosition,
    SubscribeRequest,
    UnsubscribeRequest,
)
from conftest import ExpectedLog
from instruments import back_end, publish, signed
from streams import uni_sse
from support import Client, Site, serving, settings


@asynccontextmanager
async def serving_api() -> AsyncIterator[tuple[Site, AsyncClient]]:
    """A server, and its API client."""
    async with serving() as site, back_end(site.port) as api:
        yield site, api


async def code_of(refused: object) -> int:
    """The code with which a call is refused."""
    with pytest.raises(CentApiResponseError) as caught:
        await refused  # type: ignore[misc]
    return int(caught.value.code)


async def test_publish() -> None:
    """A publication gets its position; in a passing channel, or when it skips history, none."""
    async with serving_api() as (site, api):
        client = await Client.connected(site.url)
        await client.ask("subscribe", channel="chat:1")
        first = await api.publish(PublishRequest(channel="chat:1", data={"n": 1}, tags={"a": "b"}))
        assert (first.offset, len(first.epoch)) == (1, 8)
        heard = await client.push("pub")
        assert (heard["offset"], heard["data"], heard["tags"]) == (1, {"n": 1}, {"a": "b"})
        skipping = await api.publish(PublishRequest(channel="chat:1", data=0, skip_history=True))
        assert (skipping.offset, skipping.epoch) == (0, "")
        assert await client.push("pub") == {"data": 0}
        encoded = base64.b64encode(b'{"from":"base64"}').decode()
        second = await api.publish(PublishRequest(channel="chat:1", data=None, b64data=encoded))
        assert (second.offset, second.epoch) == (2, first.epoch)
        assert (await client.push("pub"))["data"] == {"from": "base64"}
        passing = await api.publish(PublishRequest(channel="live:1", data="x"))
        assert (passing.offset, passing.epoch) == (0, "")
        await client.close()


async def test_publish_is_idempotent() -> None:
    """The same key in the same channel gives the first position and publishes once, also when two race."""
    async with serving_api() as (_, api):
        request = PublishRequest(channel="chat:1", data=1, idempotency_key="key")
        raced = await asyncio.gather(*(api.publish(request) for _ in range(10)))
        assert {result.offset for result in raced} == {1}
        elsewhere = await api.publish(PublishRequest(channel="chat:2", data=1, idempotency_key="key"))
        assert elsewhere.offset == 1
        assert (await api.history(HistoryRequest(channel="chat:1"))).offset == 1


async def test_publish_by_version() -> None:
    """PROTOCOL 11.8.3: what is outdated is not published and gets the top, by publish and by broadcast."""
    async with serving_api() as (_, api):

        async def publish(version: int, epoch: str = "") -> int:
            request = PublishRequest(channel="chat:1", data=version, version=version, version_epoch=epoch)  # type: ignore[call-arg]
            return (await api.publish(request)).offset or 0

        assert [await publish(2, "a"), await publish(2, "a"), await publish(1), await publish(1, "b")] == [1, 1, 1, 2]
        raced = await asyncio.gather(*(publish(number, "b") for number in (5, 5, 5)))
        assert raced == [3, 3, 3]
        channels = ["chat:1", "chat:2", "live:1"]
        request = BroadcastRequest(channels=channels, data="all", version=4, version_epoch="b")  # type: ignore[call-arg]
        one, two, live = (await api.broadcast(request)).responses
        assert one.result is not None
        assert two.result is not None
        assert live.error is not None
        assert (one.result.offset, two.result.offset, live.error.code) == (3, 1, 108)
        told = (await api.history(HistoryRequest(channel="chat:1", limit=-1))).publications
        assert [each.data for each in told] == [2, 1, 5]


async def test_publish_refused() -> None:
    """An unknown namespace is 102, no channel or bad base64 107."""
    async with serving_api() as (_, api):
        assert await code_of(api.publish(PublishRequest(channel="nope:1", data=1))) == 102
        assert await code_of(api.publish(PublishRequest(channel="", data=1))) == 107
        assert await code_of(api.publish(PublishRequest(channel="chat:1", data=1, b64data="%"))) == 107


async def test_broadcast() -> None:
    """Each channel gets the publication and has its own answer; one channel's error does not fail the others."""
    async with serving_api() as (site, api):
        client = await Client.connected(site.url)
        for channel in ("chat:1", "live:1"):
            await client.ask("subscribe", channel=channel)
        channels = ["chat:1", "nope:1", "live:1"]
        chat, nope, live = (await api.broadcast(BroadcastRequest(channels=channels, data={"n": 1}))).responses
        assert chat.result is not None
        assert chat.result.offset == 1
        assert nope.error is not None
        assert nope.error.code == 102
        assert live.result is not None
        assert live.result.offset == 0
        assert (await client.push("pub", "chat:1"))["data"] == {"n": 1}
        assert (await client.push("pub", "live:1"))["data"] == {"n": 1}
        assert await code_of(api.broadcast(BroadcastRequest(channels=[], data=1))) == 107
        await client.close()


async def test_presence() -> None:
    """Presence names every client with its info; its statistics count clients and users."""
    async with serving_api() as (site, api):
        ann = await Client.connected(site.url, token=signed(site, sub="42", info={"name": "Ada"}))
        bob = await Client.connected(site.url)
        for client in (ann, bob):
            await client.ask("subscribe", channel="chat:1")
        members = (await api.presence(PresenceRequest(channel="chat:1"))).presence
        assert set(members) == {ann.hello["client"], bob.hello["client"]}
        member = members[ann.hello["client"]]
        assert (member.user, member.client, member.conn_info) == ("42", ann.hello["client"], {"name": "Ada"})
        stats = await api.presence_stats(PresenceStatsRequest(channel="chat:1"))
        assert (stats.num_clients, stats.num_users) == (2, 2)
        assert (await api.presence(PresenceRequest(channel="chat:nobody"))).presence == {}
        assert await code_of(api.presence(PresenceRequest(channel="nope:1"))) == 102
        for client in (ann, bob):
            await client.close()


async def test_presence_not_available() -> None:
    """A namespace without presence refuses both methods with 108."""
    async with serving(settings(channel={"namespaces": [{"name": "bare"}]})) as site, back_end(site.port) as api:
        assert await code_of(api.presence(PresenceRequest(channel="bare:1"))) == 108
        assert await code_of(api.presence_stats(PresenceStatsRequest(channel="bare:1"))) == 108


async def test_history() -> None:
    """The back end reads history as clients do, but without the limit of 300."""
    async with serving_api() as (_, api):
        await publish(api, "chat:1", range(1, 401), at_once=1)
        top = await api.history(HistoryRequest(channel="chat:1"))
        assert (top.publications, top.offset) == ([], 400)
        everything = await api.history(HistoryRequest(channel="chat:1", limit=-1))
        assert [one.offset for one in everything.publications] == list(range(1, 401))
        assert [one.data["n"] for one in everything.publications] == list(range(1, 401))
        since = StreamPosition(offset=398, epoch=top.epoch)
        after = await api.history(HistoryRequest(channel="chat:1", limit=10, since=since))
        assert [one.offset for one in after.publications] == [399, 400]
        back = await api.history(HistoryRequest(channel="chat:1", limit=2, since=since, reverse=True))
        assert [one.offset for one in back.publications] == [397, 396]
        foreign = StreamPosition(offset=1, epoch="another")
        assert await code_of(api.history(HistoryRequest(channel="chat:1", since=foreign))) == 112
        assert await code_of(api.history(HistoryRequest(channel="live:1"))) == 108


async def test_history_remove() -> None:
    """Removing history erases what was said; the numbers go on under the same epoch."""
    async with serving_api() as (_, api):
        await publish(api, "chat:1", [1, 2], at_once=1)
        before = await api.history(HistoryRequest(channel="chat:1"))
        await api.history_remove(HistoryRemoveRequest(channel="chat:1"))
        after = await api.history(HistoryRequest(channel="chat:1", limit=-1))
        assert (after.publications, after.offset, after.epoch) == ([], 2, before.epoch)
        assert (await api.publish(PublishRequest(channel="chat:1", data=3))).offset == 3
        assert await code_of(api.history_remove(HistoryRemoveRequest(channel="live:1"))) == 108


async def test_info() -> None:
    """Info counts what this process has."""
    async with serving_api() as (site, api):
        clients = [await Client.connected(site.url, token=signed(site, sub=user)) for user in ("1", "1", "2")]
        for client in clients:
            await client.ask("subscribe", channel="chat:1")
        await clients[0].ask("subscribe", channel="live:1")
        (node,) = (await api.info(InfoRequest())).nodes
        assert (node.num_clients, node.num_users, node.num_channels, node.num_subs) == (3, 2, 2, 4)
        assert node.uid == site.node.id
        assert node.version
        for client in clients:
            await client.close()


async def test_connections() -> None:
    """The connections of a user are listed with transport, app and channels (PROTOCOL 15.2.20)."""
    async with serving_api() as (site, api):
        one = await Client.connected(site.url, token=signed(site, sub="42"), name="phone", version="7")
        other = await Client.connected(site.url, token=signed(site, sub="43"))
        await one.ask("subscribe", channel="chat:1")
        found = (await api.connections(ConnectionsRequest(user="42", expression=""))).connections
        assert list(found) == [one.hello["client"]]
        about = found[one.hello["client"]]
        assert (about.user, about.transport, about.protocol) == ("42", "websocket", "json")
        assert (about.app_name, about.app_version) == ("phone", "7")
        assert about.state is not None
        assert list(about.state.channels or {}) == ["chat:1"]
        for client in (one, other):
            await client.close()


async def test_subscribe_and_unsubscribe() -> None:
    """Only the user's connections are subscribed and unsubscribed, and of them only the client that is named."""
    async with serving_api() as (site, api):
        token = signed(site, sub="42")
        first = await Client.connected(site.url, token=token)
        second = await Client.connected(site.url, token=token)
        stranger = await Client.connected(site.url)
        await publish(api, "chat:1", [1, 2], at_once=1)
        epoch = (await api.history(HistoryRequest(channel="chat:1"))).epoch
        order = SubscribeRequest(
            user="42",
            channel="chat:1",
            client=first.hello["client"],
            info="gold",
            data={"hello": 1},
            recover_since=StreamPosition(offset=1, epoch=epoch),
        )
        await api.subscribe(order)
        pushed = await first.push("subscribe", "chat:1")
        assert (pushed["recoverable"], pushed["data"], pushed["epoch"]) == (True, {"hello": 1}, epoch)
        assert (await first.push("pub", "chat:1"))["offset"] == 2
        (member,) = (await api.presence(PresenceRequest(channel="chat:1"))).presence.values()
        assert (member.client, member.chan_info) == (first.hello["client"], "gold")
        await api.subscribe(SubscribeRequest(user="42", channel="chat:1"))
        await second.push("subscribe", "chat:1")
        await api.unsubscribe(UnsubscribeRequest(user="42", channel="chat:1", client=first.hello["client"]))
        assert (await first.push("unsubscribe", "chat:1"))["code"] == 2000
        await publish(api, "chat:1", [3])
        assert (await second.push("pub", "chat:1"))["offset"] == 3
        await api.unsubscribe(UnsubscribeRequest(user="42", channel=""))
        assert (await second.push("unsubscribe", "chat:1"))["code"] == 2000
        for client in (first, second, stranger):
            await client.ask("presence_stats", channel="chat:1")
            assert not client.pushes
            await client.close()
        assert await code_of(api.subscribe(SubscribeRequest(user="42", channel="nope:1"))) == 102


async def test_disconnect() -> None:
    """A user's connections are ended, except those on the white list, with the code that is given or 3503."""
    async with serving_api() as (site, api):
        token = signed(site, sub="42")
        first = await Client.connected(site.url, token=token)
        second = await Client.connected(site.url, token=token)
        stranger = await Client.connected(site.url)
        code = Disconnect(code=4321, reason="out of order")
        await api.disconnect(DisconnectRequest(user="42", whitelist=[first.hello["client"]], disconnect=code))
        assert await second.closed() == (4321, "out of order")
        await api.disconnect(DisconnectRequest(user="42"))
        assert await first.closed() == (3503, "force disconnect")
        await stranger.ask("presence_stats", channel="chat:1")
        assert list(site.node.sessions) == [stranger.hello["client"]]
        bad = Disconnect(code=99, reason="no such code")
        assert await code_of(api.disconnect(DisconnectRequest(user="42", disconnect=bad))) == 107
        for client in (first, second, stranger):
            await client.close()


async def test_refresh() -> None:
    """The back end moves a connection's expiry, takes it away, or says that it has come."""
    async with serving_api() as (site, api):
        client = await Client.connected(site.url, token=signed(site, sub="42"))
        now = int(site.clock())
        await api.refresh(RefreshRequest(user="42", expire_at=now + 60))
        moved = await client.push("refresh")
        assert moved["expires"] is True
        assert 55 < moved["ttl"] <= 60
        await api.refresh(RefreshRequest(user="42", expire_at=0))
        assert await client.push("refresh") == {}
        await api.refresh(RefreshRequest(user="42", expired=True))
        assert (await client.closed())[0] == 3005
        await client.close()


async def test_channels() -> None:
    """Each channel with a subscriber, and how many it has; a pattern leaves those that match."""
    async with serving_api() as (site, api):
        clients = [await Client.connected(site.url) for _ in range(3)]
        for client in clients:
            await client.ask("subscribe", channel="chat:all")
        await clients[0].ask("subscribe", channel="chat:1")
        await clients[0].ask("subscribe", channel="live:1")

        async def counted(pattern: str | None = None) -> dict[str, int]:
            found = (await api.channels(ChannelsRequest(pattern=pattern))).channels
            return {channel: info.num_clients for channel, info in found.items()}

        assert await counted() == {"chat:all": 3, "chat:1": 1, "live:1": 1}
        assert await counted("{chat,live}:?") == {"chat:1": 1, "live:1": 1}
        assert await counted("chat:[!0-9]*") == {"chat:all": 3}
        assert await counted("nothing") == {}
        assert await code_of(api.channels(ChannelsRequest(pattern="["))) == 107
        await clients[0].ask("unsubscribe", channel="chat:1")
        assert await counted("chat:*") == {"chat:all": 3}
        for client in clients:
            await client.close()


async def test_batch() -> None:
    """Several calls in one, each with its own result, in turn or at the same time."""
    async with serving_api() as (site, api):
        client = await Client.connected(site.url)
        await client.ask("subscribe", channel="chat:1")
        for parallel in (False, True):
            requests = [
                PublishRequest(channel="chat:1", data={"parallel": parallel}),
                PresenceStatsRequest(channel="chat:1"),
                BroadcastRequest(channels=["live:1"], data=1),
            ]
            published, stats, broadcast = (await api.batch(BatchRequest(requests=requests, parallel=parallel))).replies
            assert isinstance(published, cent.PublishResult)
            assert published.offset == 1 + parallel
            assert (await client.push("pub"))["data"] == {"parallel": parallel}
            assert isinstance(stats, cent.PresenceStatsResult)
            assert stats.num_clients == 1
            assert isinstance(broadcast, cent.BroadcastResult)
            assert len(broadcast.responses) == 1
        await client.close()


async def test_a_session_of_a_user() -> None:
    """Orders can be aimed at one connection by its session id."""
    async with serving(settings(uni_sse={"enabled": True})) as site, back_end(site.port) as api:
        async with uni_sse(site.port, {"token": signed(site, sub="42")}) as listener:
            session = (await listener.expect("connect"))["session"]
            await api.subscribe(SubscribeRequest(user="42", channel="live:1", session="another"))
            await api.subscribe(SubscribeRequest(user="42", channel="live:2", session=session))
            await listener.expect("subscribe")
            assert list((await api.channels(ChannelsRequest())).channels) == ["live:2"]
            await api.disconnect(DisconnectRequest(user="42", session=session))
            await listener.ended(3503)


async def test_wrong_key(log: ExpectedLog) -> None:
    """A wrong key, or none, is 401 whatever is asked, and the log names the setting."""
    log.expect("api.refused")
    async with serving() as site:
        for key in ("wrong", ""):
            async with back_end(site.port, key) as api:
                with pytest.raises(CentUnauthorizedError):
                    await api.publish(PublishRequest(channel="chat:1", data=1))
                with pytest.raises(CentUnauthorizedError):
                    await api.info(InfoRequest())
        assert len(log.seen("api.refused")) == 4
        assert all("http_api.key" in str(fields["why"]) for fields in log.seen("api.refused"))


async def test_unknown_method() -> None:
    """A method of the paid edition is an unknown path, which the SDK reports as such."""
    async with serving_api() as (_, api):
        with pytest.raises(CentTransportError) as caught:
            await api.get_user_status(cent.GetUserStatusRequest(users=["42"]))
        assert caught.value.status_code == 404


async def test_the_synchronous_client() -> None:
    """The SDK's other client, over another HTTP library, is answered just the same."""

    def drive(url: str) -> tuple[int, list[int]]:
        api = cent.Client(url, "api-key")
        try:
            top = api.publish(PublishRequest(channel="chat:1", data={"n": 1})).offset
            page = api.history(HistoryRequest(channel="chat:1", limit=-1))
            return top, [one.offset for one in page.publications]
        finally:
            api.close()

    async with serving() as site:
        assert await asyncio.to_thread(drive, f"http://127.0.0.1:{site.port}/api") == (1, [1])
