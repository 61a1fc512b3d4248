"""What passes through a channel that nobody keeps, for who watches it: a sample; PROTOCOL 17.6.4.

A kept channel is watched by reading its history.  A passing one has none, so
somebody has to listen; and a channel may carry ten thousand publications a second.
So a *sample* listens like any subscriber, but only until it has heard ``A_SECOND``
publications; then it leaves the channel and comes back when the second is over.
Whoever is told little sees everything, whoever is told too much sees the beginning
of each second and is told that something is missing.  What it costs the channel
does not grow with the flood: in the worst case the publications of one loop turn
are encoded once more.

It is no client: it has no entry in presence and tells nobody that it came.  All
who watch a channel share one sample, and it ends some seconds after the last of
them has asked.
"""

import asyncio
from collections import deque

import msgspec
from msgspec import Raw

from server.channels import Namespace
from server.errors import Disconnect, Unavailable
from server.hub import Subscription
from server.inside import InsideOutbox, LineWire, publications
from server.node import Node
from server.observe import event
from server.stream import ClientInfo

A_SECOND = 20
"""Publications that one sample wants to hear in a second."""

KEPT = 50
"""Publications that are remembered for who asks."""

WATCHED_S = 5.0
"""How long after the last question a sample goes on."""

SAMPLES = 20
"""Channels that are watched at a time; with one more, the one that was asked for longest ago is watched no longer."""


class Heard(msgspec.Struct, frozen=True):
    """One publication: its number in this sample, when it came (Unix ms), and its body as a client gets it.

    ``gap`` says that something before it may be missing.
    """

    number: int
    time: int
    gap: bool
    pub: Raw


class Heards(msgspec.Struct, frozen=True):
    """What one question is answered with: all after the number it named, and what to name next."""

    publications: list[Heard]
    number: int


WIRE = LineWire()


class SampleOutbox(InsideOutbox):
    """Takes frames into the hands of its sample."""

    __slots__ = ("_sample", "wire")

    def __init__(self, sample: "Sample") -> None:
        self.wire = WIRE
        self._sample = sample

    def send(self, frame: bytes) -> None:
        """See ``Outbox.send``."""
        self._sample.take(frame)


class Sample:
    """One passing channel that is watched; a ``hub.Subscriber``."""

    def __init__(self, node: Node, channel: str, namespace: Namespace) -> None:
        self._node = node
        self._channel = channel
        self._namespace = namespace
        self._loop = asyncio.get_running_loop()
        self._heard: deque[Heard] = deque(maxlen=KEPT)
        self._number = 0
        self._gap = False
        self._second = 0
        self._this_second = 0
        self._subscription: Subscription | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._asked_at = self._loop.time()
        self.over = False

    def __repr__(self) -> str:
        return f"<Sample of {self._channel!r} at {self._number}>"

    async def listen(self) -> None:
        """Subscribe now; raises ``errors.Unavailable``."""
        subscription = Subscription(self, SampleOutbox(self), self._channel, self._namespace, ClientInfo("", ""))
        self._subscription = subscription
        await self._node.subscribe(subscription, None)
        if not subscription.closed:
            self._node.settle(subscription, None)
            self._wake_at(self._asked_at + WATCHED_S)

    def after(self, number: int) -> Heards:
        """What was heard after ``number``; 0: all that is remembered."""
        self._asked_at = self._loop.time()
        if number > self._number:
            number = 0  # of another sample, before this one
        return Heards([heard for heard in self._heard if heard.number > number], self._number)

    def take(self, frames: bytes) -> None:
        """Frames have come, in the middle of a fan-out: the subscription must stay as it is until that is over."""
        for publication in publications(frames):
            second = int(self._loop.time())
            if second != self._second:
                self._second, self._this_second = second, 0
            self._this_second += 1
            if self._this_second > A_SECOND:
                self._gap = True
                continue
            self._number += 1
            self._heard.append(Heard(self._number, self._node.now_ms, self._gap, publication))
            self._gap = False
            if self._this_second == A_SECOND:
                self._loop.call_soon(self._rest)

    def _rest(self) -> None:
        """Hear nothing until the second is over."""
        if self._subscription is not None and not self.over:
            self._leave()
            self._gap = True
            self._wake_at(self._second + 1)

    def _wake_at(self, time: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(time, self._wake)

    def _wake(self) -> None:
        """Listen again, if somebody still asks; or else end."""
        if self.over:
            return
        if self._loop.time() >= self._asked_at + WATCHED_S:
            self.end()
        elif self._subscription is None:
            self._node.spawn(self._listen_again(), f"sample {self._channel}")
        else:
            self._wake_at(self._asked_at + WATCHED_S)

    async def _listen_again(self) -> None:
        try:
            await self.listen()
        except Unavailable as error:
            event("broker.unavailable", why=error)
            self.end()

    def end(self) -> None:
        """Watch no longer."""
        self.over = True
        self._leave()
        if self._timer is not None:
            self._timer.cancel()

    def _leave(self) -> None:
        subscription, self._subscription = self._subscription, None
        if subscription is not None and not subscription.closed:
            self._node.release(subscription)

    # --- what the hub may ask of it: see ``hub.Subscriber`` -----------------------------------
    def lose(self, subscription: Subscription) -> None:
        """A passing channel has no history to be lost."""

    def invalidate(self, subscription: Subscription) -> None:
        """The namespace is another one now: whoever watches on begins anew."""
        self.end()

    def disconnect(self, disconnect: Disconnect, why: str = "") -> None:
        """A payload cannot be shown as JSON: it is left out."""
        self._gap = True


class Samples:
    """The samples of this process, by channel."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._samples: dict[str, Sample] = {}

    async def after(self, channel: str, namespace: Namespace, number: int) -> Heards:
        """What was heard in a passing channel after ``number``; raises ``errors.Unavailable``."""
        sample = self._samples.pop(channel, None)
        if sample is None or sample.over:
            sample = Sample(self._node, channel, namespace)
            self._samples[channel] = sample
            try:
                await sample.listen()
            except BaseException:
                sample.end()
                raise
        else:
            self._samples[channel] = sample  # behind those that were asked for before
        while len(self._samples) > SAMPLES:
            self._samples.pop(next(iter(self._samples))).end()
        return sample.after(number)
