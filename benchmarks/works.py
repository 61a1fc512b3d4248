"""What is done to the servers: a table of works.  Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["delivery", "latency", "connection", "acknowledged", "slow", "recovery"]


@dataclass(frozen=True)
class Work:
    """One thing to do to a server.

    ``load`` holds arguments of the load generator.  ``kind`` says which figures
    count.  ``base`` is the work of the bare loop that this one is compared with,
    "" for none.  ``ours_only``: only our server can do it, or it is compared with
    itself.  ``acks``: publications are acknowledged, and the acknowledgements
    are counted.  ``together``: two processes, through Redis.  ``length``: it takes so many
    times the usual seconds.
    """

    name: str
    what: str
    kind: Kind
    load: Mapping[str, float]
    base: str = ""
    ours_only: bool = False
    kept: bool = False
    acks: bool = False
    together: bool = False
    length: float = 1.0

    def scaled(self, factor: float) -> "Work":
        """The same with so many times as many clients and channels, but as many in each."""
        load = dict(self.load)
        for name in ("channels", "clients", "fill", "returners"):
            if name in load:
                load[name] = max(1, round(load[name] * factor))
        load["clients"] = max(load["clients"], load.get("channels", 1), 3)
        return replace(self, load=load)


_ALL = (
    Work(
        "W1",
        "one channel, 1,000 subscribers, one publication at a time; the next when all have it",
        "delivery",
        {"clients": 1000, "flight": 1},
        base="W1",
    ),
    Work("W1o", "the same with 20 on their way", "delivery", {"clients": 1000, "flight": 20}, base="W1"),
    Work(
        "W2",
        "200 channels of 5 subscribers, one publication at a time in each",
        "delivery",
        {"clients": 1000, "channels": 200, "flight": 1},
        base="W2",
    ),
    Work(
        "W4",
        "20 publications a second to 200 subscribers: how long they take",
        "latency",
        {"clients": 200, "flight": 0, "rate": 20},
        base="W4",
    ),
    Work(
        "W6",
        "200 clients, each in a channel of its own: everybody talks to himself, so what comes in counts",
        "delivery",
        {"clients": 200, "channels": 200, "flight": 1},
        base="W6",
    ),
    Work(
        "W3",
        "5,000 connections, five to a channel: what it takes to connect and subscribe, and to be there",
        "connection",
        {"clients": 5000, "channels": 1000, "idle": 1, "connecting": 100},
        base="W3",
    ),
    Work(
        "K1",
        "W1 in a kept channel: every publication is in an SQLite file, synced, before it is delivered",
        "delivery",
        {"clients": 1000, "flight": 1},
        base="W1",
        ours_only=True,
        kept=True,
    ),
    Work(
        "K5",
        "5,000 publications a second in 200 kept channels, each acknowledged when it is in the file",
        "acknowledged",
        {"clients": 200, "channels": 200, "flight": 0, "rate": 5000},
        ours_only=True,
        kept=True,
        acks=True,
    ),
    Work(
        "K6",
        "the same, as many as it takes: 10 on their way in each channel",
        "acknowledged",
        {"clients": 200, "channels": 200, "flight": 10},
        ours_only=True,
        kept=True,
        acks=True,
    ),
    Work(
        "slow",
        "40 publications of 16 KB a second to 1,000 subscribers; then one of them stops reading",
        "slow",
        {"clients": 1000, "flight": 0, "rate": 40, "bytes": 16_000, "slow": 1},
        ours_only=True,
        length=4,
    ),
    Work(
        "recovery",
        "20 publications a second to 1,000 subscribers; then 100 clients come at once and catch up on 10,000",
        "recovery",
        {"clients": 1000, "flight": 0, "rate": 20, "fill": 10_000, "returners": 100},
        ours_only=True,
        kept=True,
        length=2,
    ),
    Work(
        "cross",
        "W1 with the publisher at one process and the subscribers at another, joined by Redis; the CPU of all three",
        "delivery",
        {"clients": 1000, "flight": 1},
        base="W1",
        ours_only=True,
        together=True,
    ),
    Work(
        "crossing",
        "200 channels of one subscriber, with their publishers at the other process: what a publication costs to cross",
        "delivery",
        {"clients": 200, "channels": 200, "flight": 1},
        base="W6",
        ours_only=True,
        together=True,
    ),
)
WORKS: Mapping[str, Work] = {work.name: work for work in _ALL}
USUAL = tuple(work.name for work in _ALL if not work.together)
