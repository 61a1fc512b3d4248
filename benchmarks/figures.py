"""From what was counted to figures, medians, ratios and tables.  Pure.

A figure is made of one round.  A ratio compares two peers in the same round, which
lie minutes apart at most, so that a machine that grows slower over an hour does
not enter it; only then come the medians.
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from benchmarks.peers import BARE
from benchmarks.works import Kind, Work


class Result(NamedTuple):
    """One round of one work with one peer; ``counted`` is what the load generator says."""

    peer: str
    work: str
    round: int
    counted: Mapping[str, Any]


class Spread(NamedTuple):
    """The median of some rounds, and their least and greatest."""

    median: float
    low: float
    high: float


Figures = Mapping[str, float]
Summary = Mapping[tuple[str, str], Mapping[str, Spread]]
"""By work and peer, the spread of each figure."""


class Column(NamedTuple):
    """A figure in a table: its heading, and how many decimals it has; ``spread`` shows least and greatest, too."""

    figure: str
    heading: str
    decimals: int = 0
    spread: bool = False
    grouped: bool = True
    """Are its thousands set apart?  Not those of a code."""


COLUMNS: Mapping[Kind, Sequence[Column]] = {
    "delivery": (
        Column("us", "CPU µs per delivery", 2, spread=True),
        Column("ratio", "× bare loop", 2, spread=True),
        Column("per_s", "deliveries/s"),
        Column("p50_ms", "p50 ms", 2),
        Column("p99_ms", "p99 ms", 2),
        Column("lost", "lost"),
        Column("others", "% others"),
    ),
    "latency": (
        Column("p50_ms", "p50 ms", 2, spread=True),
        Column("p99_ms", "p99 ms", 2, spread=True),
        Column("ratio", "p99 × bare loop", 2, spread=True),
        Column("max_ms", "max ms", 2),
        Column("us", "CPU µs per delivery", 1),
        Column("lost", "lost"),
        Column("others", "% others"),
    ),
    "connection": (
        Column("kb", "KB per connection", 2, spread=True),
        Column("connect_us", "CPU µs to connect and subscribe", spread=True),
        Column("connects_per_s", "connections/s"),
        Column("idle", "% CPU idle", 1),
        Column("others", "% others"),
    ),
    "acknowledged": (
        Column("acks_per_s", "acknowledged/s", spread=True),
        Column("ack_us", "CPU µs each", spread=True),
        Column("ack_p50_ms", "p50 ms", 1),
        Column("ack_p99_ms", "p99 ms", 1, spread=True),
        Column("unacknowledged", "without answer"),
        Column("others", "% others"),
    ),
    "slow": (
        Column("us", "CPU µs per delivery", 2),
        Column("us_after", "… with one slow", 2),
        Column("ratio", "×", 3, spread=True),
        Column("p99_ms", "p99 ms", 2),
        Column("p99_ms_after", "… with one slow", 2),
        Column("p99_ratio", "×", 2, spread=True),
        Column("slow_code", "the slow one ended with", grouped=False),
        Column("lost", "lost"),
        Column("others", "% others"),
    ),
    "recovery": (
        Column("p99_ms", "p99 ms", 2),
        Column("p99_ms_after", "… while others catch up", 2),
        Column("p99_ratio", "×", 2, spread=True),
        Column("max_ms_after", "max ms", 1),
        Column("caught_up_s", "s until all have caught up", 1),
        Column("recovered_per_s", "recovered/s"),
        Column("lost", "lost"),
        Column("others", "% others"),
    ),
}

HEADLINE: Mapping[Kind, Sequence[str]] = {
    "delivery": ("us", "ratio"),
    "latency": ("p99_ms", "ratio"),
    "connection": ("kb", "connect_us"),
}
"""What of a work stands in the table of all peers."""


def figures(work: Work, counted: Mapping[str, Any]) -> dict[str, float]:
    """The figures of one round; those for which there is nothing to count are left out."""
    window = counted["windows"][0]
    wall_s = window["wall_s"]
    found: dict[str, float] = {
        "per_s": window["deliveries"] / wall_s,
        "lost": counted["lost"] + counted["repeated"] + counted["gone"] + counted["broken"] + counted["refused"],
        "others": _others(window),
        "idle": 100 * window["cpu_s"] / wall_s,
    }
    found |= {name: window[name] for name in ("p50_ms", "p99_ms", "max_ms", "ack_p50_ms", "ack_p99_ms")}
    if window["deliveries"]:
        found["us"] = 1e6 * window["cpu_s"] / window["deliveries"]
    if window["acks"]:
        found["acks_per_s"] = window["acks"] / wall_s
        found["ack_us"] = 1e6 * window["cpu_s"] / window["acks"]
        found["unacknowledged"] = counted["unacknowledged"]
    if work.kind == "connection":
        connected = counted["connected"]
        found["kb"] = (counted["memory_after_kb"] - counted["memory_before_kb"]) / connected
        connecting = counted["connecting"]
        found["connect_us"] = 1e6 * connecting["cpu_s"] / connected
        found["connects_per_s"] = connected / connecting["wall_s"]
        found["others"] = _others(connecting)
    if len(counted["windows"]) > 1:
        found |= _afterwards(work, counted, found)
    return found


def _others(window: Mapping[str, Any]) -> float:
    """The percentage of a window in which others had the server's core, or nobody."""
    return float(100 * (window["other_s"] + window["stolen_s"]) / window["wall_s"])


def _afterwards(work: Work, counted: Mapping[str, Any], before: Figures) -> dict[str, float]:
    """The figures of the second window, compared with those of the first."""
    window = counted["windows"][1]
    found = {f"{name}_after": window[name] for name in ("p99_ms", "max_ms")}
    if before["p99_ms"] > 0:
        found["p99_ratio"] = window["p99_ms"] / before["p99_ms"]
    if work.kind == "slow":
        found["slow_code"] = counted["slow_code"]
        if window["deliveries"] and before.get("us"):
            found["us_after"] = 1e6 * window["cpu_s"] / window["deliveries"]
            found["ratio"] = found["us_after"] / before["us"]
    elif counted["caught_up_s"] > 0:
        found["caught_up_s"] = counted["caught_up_s"]
        found["recovered_per_s"] = work.load["returners"] * work.load["fill"] / counted["caught_up_s"]
    return found


def summarize(results: Iterable[Result], works: Mapping[str, Work]) -> Summary:
    """The spread of every figure over the rounds, and of the ratios to the bare loop in the same round."""
    rounds: dict[tuple[str, str, int], dict[str, float]] = {}
    for result in results:
        work = works[result.work]
        rounds[result.work, result.peer, result.round] = figures(work, result.counted)
    for (name, _, number), found in rounds.items():
        work = works[name]
        base = rounds.get((work.base, BARE, number), {})
        measure = "p99_ms" if work.kind == "latency" else "us"
        if work.base and measure in found and base.get(measure, 0) > 0:
            found["ratio"] = found[measure] / base[measure]
    gathered: dict[tuple[str, str], dict[str, list[float]]] = {}
    for (name, peer, _), found in rounds.items():
        values = gathered.setdefault((name, peer), {})
        for figure, value in found.items():
            values.setdefault(figure, []).append(value)
    return {
        key: {figure: Spread(median(some), min(some), max(some)) for figure, some in values.items()}
        for key, values in gathered.items()
    }


def worries(results: Iterable[Result]) -> list[str]:
    """What a reader must know of single rounds, in sentences."""
    found = []
    for peer, work, number, counted in results:
        said = [
            f"{counted[name]:,} {words}"
            for name, words in (
                ("lost", "deliveries lost"),
                ("repeated", "repeated or late"),
                ("gone", "connections ended"),
                ("broken", "frames not understood"),
                ("refused", "publications refused"),
            )
            if counted[name]
        ]
        if said:
            found.append(f"{peer}, {work}, round {number}: {', '.join(said)}")
    return found


# --- tables ------------------------------------------------------------------
def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table that can be read as text: the first column is flush left, the others right."""
    lines = [list(headings), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines.insert(1, rule)
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in lines
    )


def number(value: float, decimals: int = 0, *, grouped: bool = True) -> str:
    """A number for a cell; large ones without decimals."""
    text = f"{value:,.{0 if abs(value) >= 1000 else decimals}f}"
    return text if grouped else text.replace(",", "")


def cell(spread: Spread | None, column: Column) -> str:
    """A spread for a cell, empty if there is none; least and greatest in brackets if they differ."""
    if spread is None:
        return ""
    text = number(spread.median, column.decimals, grouped=column.grouped)
    low, high = number(spread.low, column.decimals), number(spread.high, column.decimals)
    return f"{text} ({low}–{high})" if column.spread and low != high else text


def overview(summary: Summary, works: Sequence[Work], titles: Mapping[str, str]) -> str:
    """The table of all peers: the figures that matter most, and their ratios to the bare loop; empty without any."""
    compared = [work for work in works if work.kind in HEADLINE and not work.ours_only]
    headings = ["server"]
    for work in compared:
        match work.kind:
            case "connection":
                headings += [f"{work.name} KB", f"{work.name} connect µs"]
            case "latency":
                headings += [f"{work.name} p99 ms"]
            case _:
                headings += [f"{work.name} µs (×)"]
    rows = []
    for peer, title in titles.items():
        found = [summary.get((work.name, peer)) for work in compared]
        if any(found):
            row = [title]
            for work, figures in zip(compared, found, strict=True):
                row += _headline(work, figures or {})
            rows.append(row)
    return table(headings, rows) if rows else ""


def _headline(work: Work, found: Mapping[str, Spread]) -> list[str]:
    columns = {column.figure: column for column in COLUMNS[work.kind]}
    cells = [cell(found.get(name), columns[name]._replace(spread=False)) for name in HEADLINE[work.kind]]
    return cells if work.kind == "connection" else [f"{cells[0]} ({cells[1]})" if cells[1] else cells[0]]


def details(summary: Summary, work: Work, titles: Mapping[str, str]) -> str:
    """The table of one work, the best first."""
    columns = COLUMNS[work.kind]
    found = [(summary[work.name, peer], title) for peer, title in titles.items() if (work.name, peer) in summary]
    found.sort(key=lambda row: row[0][columns[0].figure].median if columns[0].figure in row[0] else float("inf"))
    rows = [[title, *(cell(figures.get(column.figure), column) for column in columns)] for figures, title in found]
    return table(["server", *(column.heading for column in columns)], rows)
