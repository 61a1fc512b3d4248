"""Thousands of subscribers in one event loop, each of which does what an SDK does when its server goes away.

A ``Follower`` is a few callbacks on a socket and no task: it connects, follows its
kept channels, answers pings, and when it is sent away, turned away or cut off comes
back by itself after a while that grows, to another process, with the positions that
it has.  What is refused for now it asks for again.  It takes notes for ``verdict``
and of each ``Goodbye``; it judges nothing.
"""

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec
from crowd import Place, World
from verdict import Heard, Line

LEAST_S, MOST_S = 0.5, 20.0
"""Before they come back SDKs wait at least so long, and at most."""

AT_ONCE = 100
"""How many connect at the same time in the beginning; later it is up to them."""

TEXT, CLOSE = 0x81, 0x88
HANDSHAKE = (
    b"GET /connection/websocket HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


class Goodbye(NamedTuple):
    """A connection was ended by the process ``place``; times in seconds of the world's clock.

    ``welcomed_at`` is when connect was answered, 0.0 if it never was.  Without a close
    frame ``code`` is 1006.
    """

    who: str
    channels: Sequence[str]
    place: str
    code: int
    at: float
    welcomed_at: float


def backoff_s(step: int, share: float) -> float:
    """How long to wait before the try after ``step`` vain ones; ``share`` of 0 to 1 is by chance."""
    return min(MOST_S, LEAST_S + share * min(MOST_S, LEAST_S * 2.0 ** min(step, 31)))


class _Wire(asyncio.Protocol):
    """One WebSocket connection of a follower, RFC 6455 as far as our server speaks it."""

    def __init__(self, follower: "Follower") -> None:
        self.code = 1006
        self.open = False
        self._follower = follower
        self._buffer = b""
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(HANDSHAKE)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self.open:
            head, end, rest = self._buffer.partition(b"\r\n\r\n")
            if not end:
                return
            if not head.startswith(b"HTTP/1.1 101 "):
                self._follower.turned_away(head[9:12].decode())
                self.transport.abort()
                return
            self.open, self._buffer = True, rest
            self._follower.opened(self)
        while (frame := self._frame()) is not None:
            first, payload = frame
            if first == TEXT:
                for line in payload.split(b"\n"):
                    self._follower.take(self, msgspec.json.decode(line))
            elif first == CLOSE:
                self.code = int.from_bytes(payload[:2], "big")
                self.transport.close()

    def _frame(self) -> tuple[int, bytes] | None:
        """The next frame, if all of it is here: its first byte and its payload."""
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        begin = {126: 4, 127: 10}.get(buffer[1], 2)
        size = buffer[1] if begin == 2 else int.from_bytes(buffer[2:begin], "big")
        if len(buffer) < begin + size:
            return None
        self._buffer = buffer[begin + size :]
        return buffer[0], buffer[begin : begin + size]

    def say(self, *commands: Mapping[str, Any]) -> None:
        """Send commands in one frame, whose mask is nothing."""
        payload = b"\n".join(map(msgspec.json.encode, commands))
        size = len(payload)
        head = bytes((TEXT, 0x80 | size)) if size < 126 else bytes((TEXT, 0xFE)) + size.to_bytes(2, "big")
        self.transport.write(head + bytes(4) + payload)

    def connection_lost(self, _: Exception | None) -> None:
        self._follower.lost(self)


@dataclass
class Flock:
    """All followers and what they share.  ``on_live`` is called with the data of each live publication."""

    world: World
    on_live: Callable[[Mapping[str, Any]], None] = lambda _: None
    goodbyes: list[Goodbye] = field(default_factory=list)
    followers: "list[Follower]" = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def gather(self, wishes: Sequence[Sequence[str]], places: Sequence[Place]) -> None:
        """One follower for each of these lists of channels, at the places in turn; returns when all are subscribed."""
        for number, (channels, place) in enumerate(zip(wishes, itertools.cycle(places), strict=False)):
            self.followers.append(Follower(self, f"follower{number}", channels, place))
        for first in range(0, len(self.followers), AT_ONCE):
            some = self.followers[first : first + AT_ONCE]
            for follower in some:
                follower.come()
            await self.until(lambda some=some: all(one.settled for one in some))  # type: ignore[misc]

    async def until(self, done: Callable[[], bool], patience_s: float = 120.0) -> None:
        """Wait until it is true of the followers; raises ``TimeoutError``."""
        async with asyncio.timeout(patience_s):
            while not done():
                self.news.clear()
                await self.news.wait()

    async def arrived(self, tops: Mapping[str, int], patience_s: float = 30.0) -> None:
        """Wait until everybody is where history is, or has had the time to be."""
        with suppress(TimeoutError):
            await self.until(lambda: not any(follower.behind(tops) for follower in self.followers), patience_s)

    def scatter(self) -> None:
        """Let all go, for good."""
        for follower in self.followers:
            follower.leave()


class Follower:
    """See the module's docstring; ``place`` is where it is, or was last."""

    def __init__(self, flock: Flock, name: str, channels: Sequence[str], place: Place) -> None:
        self.name = name
        self.place = place
        self.welcomed_at = 0.0
        self.heard = {channel: Heard(name, channel) for channel in channels}
        self._flock = flock
        self._world = flock.world
        self._wire: _Wire | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._again: asyncio.TimerHandle | None = None
        self._gone = False
        self._tries = 0
        self._fresh = set(channels)
        self._subscribed: set[str] = set()
        self._put_off: dict[str, int] = {}
        self._asked: dict[int, str] = {}
        self._numbers = itertools.count(2)
        flock.world.notes.heard += self.heard.values()

    @property
    def settled(self) -> bool:
        """Is it subscribed to all its channels?"""
        return len(self._subscribed) == len(self.heard)

    def behind(self, tops: Mapping[str, int]) -> bool:
        """Is there something in its channels that it has not been sent?"""
        return any(_position(heard) < tops.get(channel, 0) for channel, heard in self.heard.items())

    # --- coming and going -------------------------------------------------------
    def come(self) -> None:
        """Connect to the place, and come back whenever that ends."""
        self._connecting = asyncio.create_task(self._connect(), name=self.name)

    def leave(self) -> None:
        """Be no more."""
        self._gone = True
        if self._again is not None:
            self._again.cancel()
        if self._connecting is not None:
            self._connecting.cancel()
        if self._wire is not None:
            self._wire.transport.abort()

    async def _connect(self) -> None:
        address = urlsplit(self.place.url)
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: _Wire(self), address.hostname or "", address.port or 0)
        except OSError:
            self._world.counts["nobody there"] += 1
            self._come_again()

    def turned_away(self, status: str) -> None:
        """The door is shut."""
        self._world.counts[f"turned away with {status}"] += 1

    def opened(self, wire: _Wire) -> None:
        """The door is open."""
        self._wire = wire
        wire.say({"id": 1, "connect": {}})

    def lost(self, wire: _Wire) -> None:
        """The connection is over, whatever the reason."""
        self._wire = None
        if self._gone:
            return
        if wire.open:
            at = self._world.clock()
            self._flock.goodbyes.append(
                Goodbye(self.name, tuple(self.heard), self.place.name, wire.code, at, self.welcomed_at)
            )
        self.welcomed_at = 0.0
        self._subscribed.clear()
        self._asked.clear()
        self._put_off.clear()
        self._come_again()

    def _come_again(self) -> None:
        """To another process, after a while: what stands before them has seen that this one is not ready."""
        delay_s = backoff_s(self._tries, self._world.random.random())
        self._tries += 1
        self.place = self._world.random.choice([place for place in self._world.places if place is not self.place])
        self._again = asyncio.get_running_loop().call_later(delay_s, self.come)

    # --- what comes ---------------------------------------------------------------
    def take(self, wire: _Wire, message: Mapping[str, Any]) -> None:
        """One reply or push."""
        if not message:
            wire.say({})
        elif "push" in message:
            self._pushed(wire, message["push"])
        elif "connect" in message:
            self.welcomed_at = self._world.clock()
            self._tries = 0
            wire.say(*map(self._subscribe, self.heard))
        elif "subscribe" in message:
            self._begun(self._asked.pop(message["id"]), message["subscribe"])
        else:
            self._refused(wire, self._asked.pop(message["id"], ""), message["error"])

    def _subscribe(self, channel: str) -> dict[str, Any]:
        request: dict[str, Any] = {"channel": channel}
        if channel not in self._fresh:
            heard = self.heard[channel]
            request.update(recover=True, offset=_position(heard), epoch=heard.epoch)
        number = next(self._numbers)
        self._asked[number] = channel
        return {"id": number, "subscribe": request}

    def _refused(self, wire: _Wire, channel: str, error: Mapping[str, Any]) -> None:
        if not error.get("temporary") or not channel:
            self._world.complain(f"{self.name} was refused with {error} by {self.place.name}")
            return
        self._world.counts["subscriptions put off"] += 1
        step = self._put_off.get(channel, 0)
        self._put_off[channel] = step + 1
        delay_s = backoff_s(step, self._world.random.random())
        asyncio.get_running_loop().call_later(delay_s, partial(self._ask_again, wire, channel))

    def _ask_again(self, wire: _Wire, channel: str) -> None:
        if wire is self._wire and not wire.transport.is_closing():
            wire.say(self._subscribe(channel))

    def _begun(self, channel: str, result: Mapping[str, Any]) -> None:
        self._subscribed.add(channel)
        self._put_off.pop(channel, None)
        heard, offset = self.heard[channel], result.get("offset", 0)
        if channel in self._fresh:
            self._fresh.discard(channel)
            heard.since, heard.epoch = offset, result.get("epoch", "")
        elif result.get("recovered"):
            self._world.counts["recoveries"] += 1
            if offset != _position(heard):
                self._world.complain(f"{heard.who} recovered from {offset}, and had asked for {_position(heard)}")
        else:
            heard.unrecovered.append(_position(heard))
        for publication in result.get("publications", ()):
            self._publication(heard, publication)
        self._flock.news.set()

    def _pushed(self, wire: _Wire, push: Mapping[str, Any]) -> None:
        channel = push.get("channel", "")
        if "pub" in push:
            if channel not in self._subscribed:
                self._world.complain(f"{self.name} heard of {channel} before the reply to subscribe")
            self._publication(self.heard[channel], push["pub"])
            self._flock.on_live(push["pub"]["data"])
            self._flock.news.set()
        elif "unsubscribe" in push:
            self._subscribed.discard(channel)
            self.heard[channel].unrecovered.append(_position(self.heard[channel]))
            wire.say(self._subscribe(channel))

    def _publication(self, heard: Heard, publication: Mapping[str, Any]) -> None:
        if "epoch" in publication:
            heard.epoch = publication["epoch"]
        heard.lines.append(Line(publication["offset"], publication["data"]["mark"]))
        self._world.counts["delivered"] += 1


def _position(heard: Heard) -> int:
    return heard.lines[-1].offset if heard.lines else heard.since
