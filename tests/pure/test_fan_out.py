"""Manners in the hub: what is decided and encoded once, and who is sent a patch of what (PROTOCOL 12, 13, 21.4)."""

import gc
import json
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import pytest
from centrifuge.fossil import apply_delta  # type: ignore[import-untyped]
from support import KEPT, settings

from server import manners, protocol
from server.channels import Channels
from server.errors import Disconnect
from server.filters import Filter, Tags, read
from server.hub import FEW, Hub, Step, Subscription
from server.manners import PATCHES_BYTES, Delta, Manner, Patches
from server.outbox import Outbox, Wire
from server.stream import ClientInfo, Cursor, Page, Position, Publication

CHANNEL = "doc:1"
SPACES = settings(channel={"namespaces": [{"name": "doc", **KEPT, "allowed_delta_types": ["fossil"]}]})
NAMESPACE = Channels(SPACES.channel).known(CHANNEL)
TEXT = "a text that is long enough to be worth a patch, and then some"


class CountingWire(Wire):
    """Counts the frames that are made."""

    def __init__(self, format: str = "json") -> None:
        self.format = format
        self.codec = protocol.CODECS[format]
        self.made = 0

    def frame(self, message: bytes) -> bytes:
        """See ``Wire.frame``."""
        self.made += 1
        return message + b"\n"

    def spread(self, outboxes: Iterable[Outbox], data: bytes) -> None:
        """See ``Wire.spread``."""
        for outbox in outboxes:
            outbox.send(data)


class Basket(Outbox):
    """Keeps what it is sent."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.frames = b""

    @property
    def waiting_bytes(self) -> int:
        """See ``Outbox.waiting_bytes``."""
        return 0

    def send(self, frame: bytes) -> None:
        """See ``Outbox.send``."""
        self.frames += frame

    def flush(self) -> None:
        """See ``Outbox.flush``."""

    async def drained(self) -> None:
        """See ``Outbox.drained``."""

    def close(self, disconnect: Disconnect) -> None:
        """See ``Outbox.close``."""

    def pause_reading(self) -> None:
        """See ``Outbox.pause_reading``."""

    def resume_reading(self) -> None:
        """See ``Outbox.resume_reading``."""


class Room:
    """A hub with one channel, whose loop turns end when the test says so."""

    def __init__(self) -> None:
        self.wire = CountingWire()
        self.soon: list[Callable[[], None]] = []
        self.hub = Hub(self.soon.append, lambda: 0.0)
        self.offset = 0

    def enter(self, count: int = 1, at: int | None = None, **traits: Any) -> list[Subscription]:
        """So many new subscriptions, live from the top on (or catching up from ``at``)."""
        entered = []
        for _ in range(count):
            session: Any = None
            subscription = Subscription(session, Basket(self.wire), CHANNEL, NAMESPACE, ClientInfo("", ""))
            subscription.manner = Manner.of(self.wire, **traits)
            self.hub.join(subscription)
            subscription.cursor = Cursor(Position(self.offset if at is None else at, "e"))
            if at is None:
                assert self.hub.go_live(subscription) is Step.LIVE
            entered.append(subscription)
        return entered

    def say(self, *, offset: int | None = None, tags: dict[str, str] | None = None, delta: bool = True) -> Publication:
        """Publish the next one; with ``offset=0`` one that only passes."""
        self.offset += offset is None
        number = self.offset if offset is None else -self.offset
        data = json.dumps({"n": number, "text": TEXT, "end": number}).encode()
        publication = Publication(data, self.offset if offset is None else offset, 1, None, tags, delta)
        self.hub.hear(CHANNEL, "e", publication)
        return publication

    def end_turn(self) -> None:
        """What was put off to the end of the loop turn is done."""
        while self.soon:
            self.soon.pop(0)()


def _heard(subscription: Subscription) -> list[dict[str, Any]]:
    """The publications that a subscription was sent."""
    basket = subscription.outbox
    assert isinstance(basket, Basket)
    return [json.loads(line)["push"]["pub"] for line in basket.frames.splitlines()]


def _held(subscription: Subscription) -> list[bytes]:
    """The payloads that one with patches puts together."""
    payload, held = b"", []
    for publication in _heard(subscription):
        data = publication["data"].encode()
        payload = bytes(apply_delta(payload, data)) if publication.get("delta") else data
        held.append(payload)
    return held


CROWDS = pytest.mark.parametrize("crowd", [1, FEW, FEW + 1, 50])


@CROWDS
def test_a_frame_is_encoded_once_for_each_form(crowd: int) -> None:
    """However many subscribe, and with however many filters: as many frames as there are different texts."""
    room = Room()
    filters = [read(json.dumps({"key": "a", "cmp": "neq", "val": str(number)}).encode()) for number in range(5)]
    for numbered in (False, True):
        room.enter(crowd, numbered=numbered)
        for filter in filters:
            room.enter(crowd, numbered=numbered, filter=filter)
    patched = room.enter(crowd, numbered=True, delta=Delta.FULL)
    first = room.say(tags={"a": "b"})
    room.end_turn()
    assert room.wire.made == 2 * 2 + 1, "by name and by number, to the filtered with the epoch; and as text"
    late = room.enter(crowd, numbered=True, delta=Delta.FULL)
    room.wire.made = 0
    second = room.say(tags={"a": "0"})
    room.end_turn()
    assert room.wire.made == 2 * 2 + 2
    assert all(_held(one) == [first.data, second.data] for one in patched)
    assert all(_held(one) == [second.data] for one in late)


@CROWDS
def test_a_filter_is_judged_once(crowd: int) -> None:
    """For one publication, however many have the filter, by name or by number."""
    judged: list[Tags] = []

    def judge(tags: Tags) -> bool:
        judged.append(tags)
        return "yes" in tags

    room, filter = Room(), Filter(b"", judge)
    entered = room.enter(crowd, filter=filter) + room.enter(crowd, filter=filter, numbered=True)
    room.say(tags={"no": ""})
    room.say(tags={"yes": ""})
    room.end_turn()
    assert judged == [{"no": ""}, {"yes": ""}]
    assert all([one["offset"] for one in _heard(subscription)] == [2] for subscription in entered)


@CROWDS
def test_who_comes_and_goes_within_one_turn(crowd: int) -> None:
    """Newcomers get the next in full and then what all get; nobody gets anything twice at the turn's end."""
    room, plain = Room(), []
    plain += room.enter(crowd)
    generations = []
    for _ in range(5):
        first = room.offset
        generations.append((first, room.enter(crowd, delta=Delta.FULL)))
        room.say()
        room.say()
        for subscription in generations[0][1][-1:]:
            room.hub.leave(subscription)
            generations[0][1].remove(subscription)
    room.end_turn()
    assert [one["offset"] for one in _heard(plain[0])] == list(range(1, 11))
    said = [json.dumps({"n": n, "text": TEXT, "end": n}).encode() for n in range(1, 11)]
    for first, subscriptions in generations:
        assert all(_held(one) == said[first:] for one in subscriptions)
        for one in subscriptions:
            assert ["delta" in publication for publication in _heard(one)] == [False] + [True] * (9 - first)
    assert len(room.hub.feeds[CHANNEL].live) == 2


def test_what_passed_while_one_was_catching_up() -> None:
    """One that comes to the same offset as the others, but has not been sent what passed, is sent the next in full."""
    room = Room()
    (there,) = room.enter(delta=Delta.FULL)
    (back,) = room.enter(at=0, delta=Delta.FULL)
    first = room.say()
    passing = room.say(offset=0)
    assert room.hub.go_live(back) is Step.LIVE  # through the tail
    second = room.say()
    assert _held(there) == [first.data, passing.data, second.data]
    assert _held(back) == [first.data, second.data]
    assert ["delta" in one for one in _heard(back)] == [False, False]


def test_halted_ones_are_in_doubt() -> None:
    """Those that turn back to catching up begin anew, and patches fit what each of them was sent since."""
    room = Room()
    first, second = room.enter(2, delta=Delta.FULL)
    one = room.say()
    feed = room.hub.feeds[CHANNEL]
    missed = [Publication(b'{"n":%d,"text":"%b"}' % (n, TEXT.encode()), n) for n in (2, 3)]
    page = Page(missed, Position(9, "e"))
    assert set(room.hub.mend(feed, Position(1, "e"), page)) == {first, second}
    room.offset = 9
    rest = [Publication(b'{"n":%d,"text":"%b"}' % (n, TEXT.encode()), n) for n in range(4, 10)]
    room.hub.send(first, rest, "e")
    assert room.hub.go_live(first) is Step.LIVE
    passing = room.say(offset=0)
    room.hub.send(second, rest, "e")
    assert room.hub.go_live(second) is Step.LIVE
    last = room.say()
    room.end_turn()
    kept = [one.data, *(each.data for each in [*missed, *rest])]
    assert _held(first) == [*kept, passing.data, last.data]
    assert _held(second) == [*kept, last.data]


def test_manners_that_nobody_has_are_forgotten() -> None:
    """A client may come with ever new filters: what stays is what is subscribed with."""
    room = Room()
    before = len(manners._known)
    for number in range(100):
        filter = read(b'{"key":"a","cmp":"eq","val":"%d"}' % number)
        (subscription,) = room.enter(filter=filter)
        assert Manner.of(room.wire, filter=filter) is subscription.manner
        room.say()
        room.hub.leave(subscription)
    del subscription, filter
    gc.collect()
    assert len(manners._known) <= before + 1


def test_patches_are_remembered_within_bounds() -> None:
    """Who needs the same patch gets the same object; what is remembered is bounded in bytes."""
    patches = Patches()
    texts = [json.dumps({"n": n, "text": TEXT * 200}).encode() for n in range(600)]
    first = patches.between(texts[0], texts[1], text=True)
    assert first is not None
    assert patches.between(bytes(bytearray(texts[0])), texts[1], text=True) is first
    for base, target in pairwise(texts):
        patches.between(base, target, text=True)
    held = sum(len(base) + len(target) for base, target, _ in patches._made)
    assert held <= PATCHES_BYTES
    again = patches.between(texts[0], texts[1], text=True)
    assert again == first
    assert again is not first
