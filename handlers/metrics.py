"""The table of metrics: what a process can be asked about itself; PROTOCOL 17.5.

``METRICS`` says everything of each in one row, how it is read included, and
docs/metrics.md prints it.  Nothing is kept here: rows are read when somebody asks,
so that counting costs the work next to nothing (``server/metrics.py``).
``prometheus.py`` gives them to Prometheus, ``admin.py`` to the console.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec

from handlers.socket import Sockets
from server import __version__
from server.metrics import Histogram
from server.node import Node
from server.observe import EVENTS, happened

PREFIX = "waterspout_"
PARTS = ("history", "broker", "presence", "blocks")

Labels = tuple[str, ...]
Number = int | float
Numbers = Mapping[Labels, Number]


class Process(msgspec.Struct, frozen=True):
    """What the metrics are read of."""

    node: Node
    sockets: Sockets


class Row(msgspec.Struct, frozen=True):
    """One metric: ``read`` gives its numbers by the values of ``labels``.

    Counters are shown with ``_total`` behind their name, as Prometheus has it.
    """

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    about: str
    read: Callable[[Process], Mapping[Labels, Any]]
    labels: Labels = ()

    @property
    def shown(self) -> str:
        """The name under which it is found."""
        return PREFIX + self.name + ("_total" if self.kind == "counter" else "")


def _one(read: Callable[[Node], Any]) -> Callable[[Process], dict[Labels, Any]]:
    return lambda process: {(): read(process.node)}


def _each(read: Callable[[Node], Mapping[Any, Number]]) -> Callable[[Process], Numbers]:
    return lambda process: {(str(key),): number for key, number in read(process.node).items()}


def _subscriptions(node: Node) -> Mapping[str, int]:
    feeds = node.hub.feeds.values()
    return {"live": sum(feed.size for feed in feeds), "catching_up": sum(len(feed.catching) for feed in feeds)}


def _parts(node: Node) -> Mapping[str, int]:
    troubled = node.parts.troubled
    return {part: int(part not in troubled) for part in PARTS}


def _events(_: Process) -> Numbers:
    return {(name, _WEIGHTS[EVENTS[name][0]]): count for name, count in happened.items()}


_WEIGHTS = {10: "debug", 20: "info", 30: "warning", 40: "error"}

METRICS: tuple[Row, ...] = (
    Row("info", "gauge", "1; the version, and the id and the name of this process as the API's info has them",
        lambda process: {(__version__, process.node.id, process.node.name): 1}, ("version", "node", "name")),
    Row("connections", "gauge", "clients that are here, connected or about to be",
        _one(lambda node: node.connections)),
    Row("clients", "gauge", "clients that have connected, long-polls included", _one(lambda node: len(node.sessions))),
    Row("users", "gauge", "users of these clients", _one(lambda node: len(node.users))),
    Row("channels", "gauge", "channels that somebody here follows", _one(lambda node: len(node.hub.feeds))),
    Row("subscriptions", "gauge", "subscriptions; `state` is `live` or `catching_up`", _each(_subscriptions),
        ("state",)),
    Row("backlogged", "gauge", "connections whose socket has not taken all that it was sent",
        lambda process: {(): process.sockets.backlogged}),
    Row("processes", "gauge", "processes that are alive, as far as this one knows, itself included",
        _one(lambda node: 1 + len(node.peers.all))),
    Row("blocked_users", "gauge",
        "users that are blocked or muted somewhere (API `block_user`), as this process knows; what has run out counts "
        "for an hour at most",
        _one(lambda node: len(node.blocking.users))),
    Row("up", "gauge",
        "1 while a part can be used; `part` is `history`, `broker`, `presence` or `blocks`, see /health/ready",
        _each(_parts), ("part",)),
    Row("connections_opened", "counter", "connections that came, by `transport`",
        _each(lambda node: node.counts.opened), ("transport",)),
    Row("disconnects", "counter", "connections that ended, by `code`; 0: the client left",
        _each(lambda node: node.counts.disconnects), ("code",)),
    Row("slow_clients", "counter", "connections that were cut since they did not take what they were sent (3008)",
        _one(lambda node: node.counts.disconnects[3008])),
    Row("refusals", "counter", "commands, API calls and REST requests that were refused, by the error's `code`",
        _each(lambda node: node.counts.refusals), ("code",)),
    Row("limits", "counter", "how often somebody met a limit, by `setting`", _each(lambda node: node.counts.limits),
        ("setting",)),
    Row("api_calls", "counter", "calls of the back-end API, by `method`", _each(lambda node: node.counts.calls),
        ("method",)),
    Row("publications", "counter", "publications of this process; `kind` is `kept` (durable) or `passing`",
        _each(lambda node: {"kept": node.counts.kept, "passing": node.counts.passing}), ("kind",)),
    Row("publications_heard", "counter", "publications that other processes announced to this one",
        _one(lambda node: node.counts.heard)),
    Row("deliveries", "counter", "publications that were put into outboxes, one for each subscription",
        _one(lambda node: node.hub.deliveries)),
    Row("holes", "counter", "publications that came before those that precede them",
        _one(lambda node: node.counts.holes)),
    Row("repairs", "counter", "channels brought forward from history; `outcome` is `done`, or `failed` and tried again",
        _each(lambda node: {"done": node.counts.repairs, "failed": node.counts.failed_repairs}), ("outcome",)),
    Row("recoveries", "counter",
        "subscriptions that came with a position; `outcome` is `recovered`, `unrecoverable` (told `recovered: false`) "
        "or `lost` (trimmed away while it was subscribed)",
        _each(lambda node: {
            "recovered": node.counts.recovered,
            "unrecoverable": node.counts.unrecoverable,
            "lost": node.counts.lost,
        }), ("outcome",)),
    Row("events", "counter", "events of the log, by `event` and `level`, logged or not", _events, ("event", "level")),
    Row("fanout_seconds", "histogram",
        "time from the first publication for a room of more than 8 in a loop turn until all of that turn was written "
        "to the sockets", _one(lambda node: node.hub.fanout_seconds)),
    Row("publication_age_seconds", "histogram",
        "age of a kept publication when it was delivered here, the first of each commit; `from` is `here` (published "
        "by this process) or `elsewhere` (by another one: two clocks)",
        lambda process: {
            ("here",): process.node.counts.own_age_seconds,
            ("elsewhere",): process.node.counts.others_age_seconds,
        }, ("from",)),
    Row("recovery_publications", "histogram", "publications that a subscription which recovered had missed",
        _one(lambda node: node.counts.recovery_publications)),
    Row("commit_publications", "histogram", "publications of one commit, which is of one channel",
        _one(lambda node: node.counts.commit_publications)),
    Row("batch_publications", "histogram", "publications of one write to SQLite or MongoDB, of many channels",
        _one(lambda node: node.counts.batch_publications)),
    Row("batch_seconds", "histogram", "time of such a write until it was durable",
        _one(lambda node: node.counts.batch_seconds)),
    Row("history_read_seconds", "histogram", "time of a read of history: a page, or the tops of many channels",
        _one(lambda node: node.counts.read_seconds)),
    Row("broker_seconds", "histogram", "time until Redis had taken a word, of one word at a time",
        _one(lambda node: node.counts.broker_seconds)),
    Row("loop_lag_seconds", "histogram", "how late the event loop came to the work of each second",
        _one(lambda node: node.counts.lag_seconds)),
)  # fmt: skip
"""Every metric of ours; besides, there are those of the process and of Python that all Python programs have."""


def numbers(process: Process) -> dict[str, Any]:
    """The rows for the console: a number, or numbers by label; of a histogram how many values and their sum."""
    found: dict[str, Any] = {}
    for row in METRICS:
        values = {"/".join(labels): _brief(value) for labels, value in row.read(process).items()}
        found[row.name] = values if row.labels else values[""]
    return found


def _brief(value: Any) -> Any:
    return [value.count, round(value.total, 6)] if isinstance(value, Histogram) else value
