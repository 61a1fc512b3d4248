"""The people of a storm: writers who never give up or never ask twice, and listeners who trust nothing.

They speak the plain protocol and take notes for ``verdict``; they judge nothing
themselves but what no comparison could see later.  Who loses a connection comes
back by itself, sometimes to another process, and presents its position.
"""

import asyncio
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple, Protocol

import websockets
from support import Client, Closed
from tornado.httpclient import AsyncHTTPClient, HTTPClientError
from tornado.simple_httpclient import HTTPTimeoutError
from verdict import Ended, Heard, Line, Notes, Outcome, Said, Waited

OUTCOME_S = 8.0
"""How long a writer waits for an answer: longer than any publish timeout, shorter than a stop."""

RETRY_S = (0.05, 0.4)
"""The shortest and the longest pause before one tries again."""


class Place(Protocol):
    """One process, as its clients see it."""

    name: str

    @property
    def url(self) -> str:
        """Where WebSocket clients connect."""

    @property
    def http(self) -> str:
        """Where the back end calls."""


class Delivery(NamedTuple):
    """A publication reached a listener that was at ``place`` since ``since``; in seconds of the storm's clock."""

    mark: str
    at: float
    place: str
    since: float


@dataclass
class World:
    """What all people of a storm share: where they may go, their clock, their notes, and when it is over."""

    places: Sequence[Place]
    random: Random
    clock: Callable[[], float]
    notes: Notes = field(default_factory=Notes)
    counts: Counter[str] = field(default_factory=Counter)
    deliveries: list[Delivery] = field(default_factory=list)
    chatted: dict[str, int] = field(default_factory=dict)
    """The number of the last that each chatterer said in passing."""
    complaints: list[str] = field(default_factory=list)
    enough: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when writers are to write nothing new."""

    async def breathe(self, shortest_s: float = RETRY_S[0], longest_s: float = RETRY_S[1]) -> None:
        """Wait some time between the two, as people do."""
        await asyncio.sleep(self.random.uniform(shortest_s, longest_s))

    def complain(self, what: str) -> None:
        """Something came that must not."""
        self.complaints.append(f"{what} at {self.clock():.1f} s")


# --- writers -----------------------------------------------------------------
class Answer(NamedTuple):
    """What became of one try."""

    outcome: Outcome
    offset: int = 0
    epoch: str = ""


UNKNOWN = Answer("unknown")
ABSENT = Answer("refused")


def answer_of(result: Mapping[str, Any] | None, error: Mapping[str, Any] | None) -> Answer:
    """PROTOCOL 4.4: error 100 means that the outcome is unknown, any other that nothing was published."""
    if error is not None:
        return UNKNOWN if error["code"] == 100 else Answer("refused")
    assert result is not None
    return Answer("acknowledged", result.get("offset", 0), result.get("epoch", ""))


class Voice:
    """One way to publish, by a connection or by the back-end API, at one process at a time."""

    def __init__(self, world: World, home: Place) -> None:
        self.world = world
        self.place = home

    def move(self) -> None:
        """Speak at some other process from now on, if there is one."""
        others = [place for place in self.world.places if place is not self.place]
        self.place = self.world.random.choice(others or [self.place])

    async def publish(self, channel: str, payload: Mapping[str, Any], key: str) -> Answer:
        """Try once, at most ``OUTCOME_S``."""
        began = self.world.clock()
        try:
            async with asyncio.timeout(OUTCOME_S):
                answer = await self._publish(channel, payload, key)
        except ConnectionRefusedError:
            self.world.counts["nobody there"] += 1
            return ABSENT
        except (TimeoutError, HTTPTimeoutError):
            self._waited(began, payload, "nothing")
            await self.drop()
            return UNKNOWN
        except (OSError, websockets.WebSocketException, Closed, HTTPClientError):
            await self.drop()
            return UNKNOWN
        self._waited(began, payload, answer.outcome)
        if answer.outcome == "refused":
            self.world.counts["refused"] += 1
        return answer

    def _waited(self, began: float, payload: Mapping[str, Any], outcome: str) -> None:
        what = f"{type(self).__name__} said {payload['mark']} and got {outcome}"
        self.world.notes.waited.append(Waited(self.place.name, began, self.world.clock() - began, what))

    async def _publish(self, channel: str, payload: Mapping[str, Any], key: str) -> Answer:
        raise NotImplementedError

    async def drop(self) -> None:
        """Let go of whatever this way holds."""


class ApiVoice(Voice):
    """By ``/api/publish``; anything may carry a key."""

    async def _publish(self, channel: str, payload: Mapping[str, Any], key: str) -> Answer:
        body = {"channel": channel, "data": payload} | ({"idempotency_key": key} if key else {})
        answer = await call_api(self.place, "publish", body, OUTCOME_S - 0.5)  # so that it ends by itself
        return answer_of(answer.get("result"), answer.get("error"))


class SocketVoice(Voice):
    """By a connection: ``publish``, whose answer tells no offset, or with a key the RPC of that name."""

    def __init__(self, world: World, home: Place) -> None:
        super().__init__(world, home)
        self._client: Client | None = None

    async def _publish(self, channel: str, payload: Mapping[str, Any], key: str) -> Answer:
        if self._client is None:
            self._client = await Client.open(self.place.url, open_timeout=OUTCOME_S)
            await self._client.ask("connect")
        if not key:
            reply = await self._client.call("publish", channel=channel, data=payload)
            return answer_of(reply.get("publish"), reply.get("error"))
        data = {"channel": channel, "data": payload, "idempotency_key": key}
        reply = await self._client.call("rpc", method="publish", data=data)
        return answer_of(reply["rpc"].get("data") if "rpc" in reply else None, reply.get("error"))

    async def drop(self) -> None:
        """See ``Voice``."""
        client, self._client = self._client, None
        if client is not None:
            await client.drop()


async def call_api(place: Place, method: str, body: Mapping[str, Any], patience_s: float = 10.0) -> dict[str, Any]:
    """Call the back-end API with the key of ``support.config``; raises ``OSError`` and ``HTTPClientError``."""
    http = AsyncHTTPClient(force_instance=True)
    try:
        response = await http.fetch(
            f"{place.http}/api/{method}",
            method="POST",
            headers={"X-API-Key": "api-key"},
            body=json.dumps(body),
            connect_timeout=patience_s,
            request_timeout=patience_s,
        )
        return dict(json.loads(response.body))
    finally:
        http.close()


async def write(world: World, name: str, channels: Sequence[str], voice: Voice, *, keyed: bool, pause_s: float) -> None:
    """Publish one after another, to the channels in turn, until it is enough.

    ``keyed``: each has an idempotency key, and is said again, here or elsewhere,
    until it is acknowledged.  Otherwise each is said once, whatever comes of it.
    """
    for number, channel in enumerate(itertools.cycle(channels), 1):
        if world.enough.is_set():
            break
        mark = f"{name}.{number}"
        key = f"key {mark}" if keyed else ""
        await _say(world, voice, channel, mark, key)
        await world.breathe(0, 2 * pause_s)
    await voice.drop()


async def race(world: World, name: str, channel: str, voices: Sequence[Voice], pause_s: float) -> None:
    """Several publish under the same key at the same time, each something else, and each until it is acknowledged."""
    for number in itertools.count(1):
        if world.enough.is_set():
            break
        key = f"key {name}.{number}"
        await asyncio.gather(
            *(_say(world, voice, channel, f"{name}{nth}.{number}", key) for nth, voice in enumerate(voices))
        )
        await world.breathe(0, 2 * pause_s)
    for voice in voices:
        await voice.drop()


async def _say(world: World, voice: Voice, channel: str, mark: str, key: str) -> None:
    payload = {"mark": mark, "key": key}
    world.counts["sent"] += 1
    began = world.clock()
    while True:
        answer = await voice.publish(channel, payload, key)
        if answer.outcome == "acknowledged" or not key:
            break
        world.counts["sent again"] += 1
        await world.breathe()
        if world.random.random() < 0.5:
            await voice.drop()
            voice.move()
    world.counts[answer.outcome] += answer.outcome != "refused"
    outcome, offset, epoch = answer
    world.notes.said.append(Said(channel, mark, outcome, offset, epoch, key, world.clock(), began))
    if answer.outcome != "acknowledged" and world.random.random() < 0.3:
        await voice.drop()  # else it would go on speaking at the old place, and be noted at the new one
        voice.move()


async def last_words(world: World, name: str, channels: Sequence[str], voices: Sequence[Voice]) -> None:
    """Publish once more to each channel, each until it is acknowledged."""
    for number, channel in enumerate(channels, 1):
        mark = f"{name}.{number}"
        await _say(world, voices[number % len(voices)], channel, mark, f"key {mark}")
    for voice in voices:
        await voice.drop()


async def chatter(world: World, name: str, channel: str, home: Place, pause_s: float) -> None:
    """Publish to a passing channel, one after another, at one process."""
    voice = SocketVoice(world, home)
    for number in itertools.count(1):
        if world.enough.is_set():
            break
        mark = f"{name}.{number}"
        world.notes.passed.add(mark)
        world.chatted[name] = number
        world.counts["sent in passing"] += 1
        await voice.publish(channel, {"mark": mark}, "")
        await world.breathe(0, 2 * pause_s)
    await voice.drop()


# --- listeners ---------------------------------------------------------------
class Listener:
    """One subscriber of some kept channels and a passing one, with a position of its own in each.

    ``restless`` ones leave now and then by themselves, and leave a process that is
    silent for ``SILENCE_S``; the others wait for it as long as it takes.  Who
    comes back goes to another process as often as not, unless it is ``loyal``.
    """

    SILENCE_S = 4.0

    def __init__(
        self, world: World, name: str, kept: Sequence[str], passing: str, home: Place, *, restless: bool, loyal: bool
    ) -> None:
        self.world = world
        self.name = name
        self.place = home
        self.client = ""
        self.restless = restless
        self.loyal = loyal
        self.since = 0.0
        """When its present connection began, in seconds of the storm's clock."""
        self.heard = {channel: Heard(name, channel) for channel in kept}
        self.passing = Heard(name, passing)
        """What came over the present connection: no position, so no order, outlives one."""
        self.leaves: defaultdict[str, list[float]] = defaultdict(list)
        self.news = asyncio.Event()
        self._fresh = set(kept)
        self._subscribed: dict[str, float] = {}
        self._asked: dict[int, str] = {}
        self._numbers = itertools.count(2)
        world.notes.heard += self.heard.values()

    async def listen(self) -> None:
        """Connect, follow, and come back, until cancelled."""
        world = self.world
        while True:
            try:
                async with websockets.connect(
                    self.place.url,
                    max_size=None,
                    ping_interval=None,
                    compression=None,
                    open_timeout=self.SILENCE_S,
                    close_timeout=0.1,
                ) as connection:
                    await self._follow(connection)
            except (OSError, websockets.InvalidHandshake, websockets.InvalidMessage):  # TimeoutError is an OSError
                pass
            self.client = ""
            if not self.loyal and world.random.random() < 0.5:
                self.place = world.random.choice(world.places)
            await world.breathe()

    async def _follow(self, connection: websockets.ClientConnection) -> None:
        world = self.world
        world.counts["connections"] += 1
        self.since = world.clock()
        self._subscribed.clear()
        self._asked.clear()
        self.passing = Heard(self.name, self.passing.channel)
        world.notes.passing.append(self.passing)
        leaves_at = world.clock() + world.random.uniform(2, 20) if self.restless else float("inf")
        try:
            subscribes = [self._subscribe(channel) for channel in [*self.heard, self.passing.channel]]
            await connection.send("\n".join(json.dumps(line) for line in [{"id": 1, "connect": {}}, *subscribes]))
            while world.clock() < leaves_at:
                async with asyncio.timeout(self.SILENCE_S if self.restless else None):
                    message = await connection.recv()
                for line in str(message).split("\n"):
                    await self._take(connection, json.loads(line))
        except websockets.ConnectionClosed as closed:
            code, reason = (closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else (1006, "")
            world.notes.ended.append(Ended(self.name, self.place.name, code, reason, world.clock()))
            world.counts["connections ended"] += 1
            return
        connection.transport.abort()

    def _subscribe(self, channel: str) -> dict[str, Any]:
        request: dict[str, Any] = {"channel": channel}
        heard = self.heard.get(channel)
        if heard is not None and channel not in self._fresh:
            request.update(recover=True, offset=_position(heard), epoch=heard.epoch)
        number = next(self._numbers)
        self._asked[number] = channel
        return {"id": number, "subscribe": request}

    async def _take(self, connection: websockets.ClientConnection, message: dict[str, Any]) -> None:
        if not message:
            await connection.send("{}")
        elif "push" in message:
            self._pushed(message["push"])
            if "unsubscribe" in message["push"]:
                await connection.send(json.dumps(self._subscribe(message["push"]["channel"])))
        elif "connect" in message:
            self.client = message["connect"]["client"]
        elif "error" in message:
            channel = self._asked.pop(message["id"], "")
            if message["error"]["code"] != 100 or not channel:
                self.world.complain(f"{self.name} was refused with {message['error']} by {self.place.name}")
            self.world.counts["subscriptions put off"] += 1
            await self.world.breathe()
            await connection.send(json.dumps(self._subscribe(channel)))
        elif "subscribe" in message:
            self._begun(self._asked.pop(message["id"]), message["subscribe"])

    def _begun(self, channel: str, result: Mapping[str, Any]) -> None:
        self._subscribed[channel] = self.world.clock()
        heard = self.heard.get(channel)
        if heard is None:
            return
        offset = result.get("offset", 0)
        if channel in self._fresh:
            self._fresh.discard(channel)
            heard.since, heard.epoch = offset, result.get("epoch", "")
        elif result.get("was_recovering") and result.get("recovered"):
            self.world.counts["recoveries"] += 1
            if offset != _position(heard):
                self.world.complain(f"{heard.who} recovered from {offset}, and had asked for {_position(heard)}")
        else:
            heard.unrecovered.append(_position(heard))
        for publication in result.get("publications", ()):
            self._publication(heard, publication, live=False)

    def _pushed(self, push: Mapping[str, Any]) -> None:
        channel = push.get("channel", "")
        if "pub" in push:
            if channel not in self._subscribed:
                self.world.complain(f"{self.name} heard of {channel} before the reply to subscribe")
            heard = self.heard.get(channel)
            if heard is not None:
                self._publication(heard, push["pub"], live=True)
            else:
                self.passing.lines.append(Line(0, push["pub"]["data"]["mark"]))
                self.world.counts["delivered in passing"] += 1
                self.news.set()
        elif "leave" in push:
            self.leaves[push["leave"]["info"]["client"]].append(self.world.clock())
            self.world.counts["leaves told"] += 1
        elif "unsubscribe" in push:
            self._subscribed.pop(channel, None)
            heard = self.heard.get(channel)
            if heard is not None:
                heard.unrecovered.append(_position(heard))

    def _publication(self, heard: Heard, publication: Mapping[str, Any], *, live: bool) -> None:
        mark = publication["data"]["mark"]
        if "epoch" in publication:
            heard.epoch = publication["epoch"]
        heard.lines.append(Line(publication["offset"], mark))
        self.world.counts["delivered"] += 1
        if live:
            since = self._subscribed.get(heard.channel, self.world.clock())
            self.world.deliveries.append(Delivery(mark, self.world.clock(), self.place.name, since))
        self.news.set()

    async def until(self, done: Callable[[], bool], ends: float) -> bool:
        """Wait for news until ``done``, or until the storm's clock says ``ends``; returns whether it was."""
        while not done():
            if self.world.clock() >= ends:
                return False
            self.news.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await self.news.wait()
        return True

    def hears_passing(self, writers: Sequence[str], since: Mapping[str, int]) -> bool:
        """Has it heard, over its present connection, something of each writer that was said after ``since``?"""
        last: dict[str, int] = {}
        for line in self.passing.lines:
            writer, _, number = line.mark.rpartition(".")
            last[writer] = int(number)
        return all(last.get(writer, 0) > since[writer] for writer in writers)

    def behind(self, tops: Mapping[str, int]) -> list[str]:
        """The channels in which it has not come to the top yet."""
        return [channel for channel, heard in self.heard.items() if _position(heard) < tops.get(channel, 0)]


def _position(heard: Heard) -> int:
    return heard.lines[-1].offset if heard.lines else heard.since
