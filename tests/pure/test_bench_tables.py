"""From counts to figures, ratios, tables and pictures of the benchmark."""

import json
import re
from typing import Any

import pytest

from benchmarks import bench, figures, pictures, processes
from benchmarks.figures import Column, Result, Spread
from benchmarks.peers import CENTRIFUGE, PEERS
from benchmarks.works import WORKS, Work


def counted(*, cpu_s: float = 1.0, deliveries: int = 100_000, acks: int = 0, **more: Any) -> dict[str, Any]:
    """What the load generator says, with one window of two seconds."""
    window = {
        "wall_s": 2.0,
        "cpu_s": cpu_s,
        "deliveries": deliveries,
        "acks": acks,
        "other_s": 0.1,
        "stolen_s": 0.1,
        **dict.fromkeys(("p50_ms", "p99_ms", "max_ms"), 4.0),
        **dict.fromkeys(("ack_p50_ms", "ack_p99_ms"), 7.0),
    }
    faults = dict.fromkeys(("lost", "repeated", "gone", "broken", "refused", "unacknowledged"), 0)
    connecting = {**window, "wall_s": 0.5, "cpu_s": 0.2}
    memory = {"memory_before_kb": 100, "memory_after_kb": 3100}
    windows = {"connecting": connecting, "windows": [window]}
    return {"connected": 1000, **windows, **faults, **memory, "caught_up_s": -1.0, **more}


# --- figures -------------------------------------------------------------------
def test_a_delivery_costs_what_the_server_used() -> None:
    """CPU per delivery is the CPU time of the window by its deliveries, in µs; what others took is a share of time."""
    found = figures.figures(WORKS["W1"], counted(cpu_s=0.5))
    assert found["us"] == pytest.approx(5.0)
    assert found["per_s"] == 50_000
    assert found["others"] == pytest.approx(10.0)
    assert found["lost"] == 0


def test_a_connection_costs_what_it_added() -> None:
    """Memory and CPU of a connection are what came on top of those before it, by their number."""
    found = figures.figures(WORKS["W3"], counted(deliveries=0, cpu_s=0.02))
    assert (found["kb"], found["connect_us"], found["connects_per_s"]) == (3.0, 200.0, 2000.0)
    assert found["idle"] == pytest.approx(1.0)
    assert found["others"] == pytest.approx(40.0), "of the time in which they connected"
    assert "us" not in found


def test_an_acknowledgement_has_figures_of_its_own() -> None:
    """CPU and rate of acknowledged publications are by their acknowledgements."""
    found = figures.figures(WORKS["K5"], counted(acks=10_000))
    assert (found["acks_per_s"], found["ack_us"], found["ack_p99_ms"]) == (5000.0, 100.0, 7.0)


def test_a_second_window_is_compared_with_the_first() -> None:
    """What a slow reader or a recovery does to the others is the ratio of the second window to the first."""
    both = counted(slow_code=3008)
    both["windows"].append({**both["windows"][0], "cpu_s": 1.1, "p99_ms": 6.0})
    found = figures.figures(WORKS["slow"], both)
    assert found["ratio"] == pytest.approx(1.1)
    assert found["p99_ratio"] == pytest.approx(1.5)
    assert found["slow_code"] == 3008
    both["caught_up_s"] = 4.0
    found = figures.figures(WORKS["recovery"], both)
    assert (found["caught_up_s"], found["recovered_per_s"]) == (4.0, 250_000.0)


def test_a_recovery_that_did_not_end_has_no_time() -> None:
    """Clients that have not caught up by the end make an empty cell, and not a quick one."""
    both = counted()
    both["windows"] *= 2
    found = figures.figures(WORKS["recovery"], both)
    assert "caught_up_s" not in found
    assert "recovered_per_s" not in found


def test_a_ratio_is_to_the_bare_loop_in_the_same_round() -> None:
    """On a machine that grows slower the ratio of each round stays what it is, and the median is one of them."""
    rounds = [
        Result(peer, "W1", number, counted(cpu_s=cpu_s * number))
        for number in (1, 2, 4)
        for peer, cpu_s in (("bare", 0.4), ("waterspout", 0.6))
    ]
    ratio = figures.summarize(rounds, WORKS)["W1", "waterspout"]["ratio"]
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((1.5, 1.5, 1.5))


def test_a_work_may_be_compared_with_another_work_of_the_bare_loop() -> None:
    """W1o and the kept channel stand beside W1 of the bare loop; without that there is no ratio."""
    rounds = [Result("bare", "W1", 1, counted(cpu_s=0.5)), Result("waterspout", "W1o", 1, counted(cpu_s=0.05))]
    assert figures.summarize(rounds, WORKS)["W1o", "waterspout"]["ratio"].median == pytest.approx(0.1)
    assert "ratio" not in figures.summarize(rounds[1:], WORKS)["W1o", "waterspout"]


def test_what_went_wrong_is_said() -> None:
    """Losses, repetitions and lost connections of a round are named with it; a good round is not."""
    rounds = [Result("aiohttp", "W2", 2, counted(lost=1200, gone=3)), Result("bare", "W2", 2, counted())]
    assert figures.worries(rounds) == ["aiohttp, W2, round 2: 1,200 deliveries lost, 3 connections ended"]


# --- tables and pictures ---------------------------------------------------------
def test_a_table_reads_as_text_and_as_markdown() -> None:
    """Cells of one column are equally wide, names flush left, numbers right."""
    assert figures.table(["server", "µs"], [["bare", "4.50"], ["Waterspout", "4.9"]]).splitlines() == [
        "| server     |   µs |",
        "| ---------- | ---: |",
        "| bare       | 4.50 |",
        "| Waterspout |  4.9 |",
    ]


@pytest.mark.parametrize(
    ("spread", "text"),
    [
        (Spread(4.5, 4.25, 5.0), "4.50 (4.25–5.00)"),
        (Spread(4.5, 4.499, 4.501), "4.50"),
        (Spread(12345.6, 12345.6, 12345.6), "12,346"),
        (None, ""),
    ],
)
def test_a_cell_shows_the_spread_that_there_is(spread: Spread | None, text: str) -> None:
    """Least and greatest stand in brackets where they differ in what is shown; large numbers have no decimals."""
    assert figures.cell(spread, Column("us", "µs", 2, spread=True)) == text


def test_a_code_is_no_quantity() -> None:
    """The thousands of a disconnect code are not set apart."""
    assert figures.cell(Spread(3008, 3008, 3008), Column("slow_code", "ended with", grouped=False)) == "3008"


def test_the_overview_has_a_row_for_each_server_and_leaves_out_what_only_we_do() -> None:
    """Each measured server has a row; our own works have no column, and a server that failed a work an empty cell."""
    rounds = [Result("bare", "W1", 1, counted()), Result("waterspout", "W1", 1, counted(cpu_s=2.0))]
    rounds += [Result("waterspout", "K1", 1, counted()), Result("bare", "W3", 1, counted())]
    summary = figures.summarize(rounds, WORKS)
    titles = {"bare": "bare loop", "waterspout": "Waterspout", "aiohttp": "aiohttp"}
    text = figures.overview(summary, [WORKS[name] for name in ("W1", "W3", "K1")], titles)
    assert figures.overview(summary, [WORKS["K1"]], titles) == ""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert cells[0] == ["server", "W1 µs (×)", "W3 KB", "W3 connect µs"]
    assert cells[2:] == [["bare loop", "10.00 (1.00)", "3.00", "200"], ["Waterspout", "20.00 (2.00)", "", ""]]


def test_the_table_of_a_work_begins_with_the_best() -> None:
    """Rows are ordered by the figure in the first column."""
    rounds = [Result("bare", "W1", 1, counted(cpu_s=2.0)), Result("waterspout", "W1", 1, counted(cpu_s=1.0))]
    text = figures.details(figures.summarize(rounds, WORKS), WORKS["W1"], {"bare": "B", "waterspout": "W"})
    assert re.findall(r"^\| (\w) ", text, re.MULTILINE) == ["W", "B"]


def test_bars_are_as_long_as_their_figures() -> None:
    """The longest bar is the greatest figure, half of it half as long; ours is marked, ratios are written."""
    rounds = [Result("bare", "W1", 1, counted(cpu_s=1.0)), Result("waterspout", "W1", 1, counted(cpu_s=2.0))]
    some = pictures.panels(
        figures.summarize(rounds, WORKS), [WORKS["W1"]], {"bare": "bare", "waterspout": "Waterspout"}, ["waterspout"]
    )
    (panel,) = some
    assert [(bar.label, bar.length, bar.ours) for bar in panel.bars] == [
        ("bare", 0.5, False),
        ("Waterspout", 1.0, True),
    ]
    lines = pictures.text(some).splitlines()
    assert lines[2].count("█") * 2 == lines[3].count("█") == pictures.BAR
    assert lines[3].endswith("20.00 µs, 2.00 ×")
    assert json.loads(json.dumps(some))[0][1][1][0] == "Waterspout", "it can be handed to the artist"


# --- works, peers, machine -------------------------------------------------------
def test_a_smaller_work_is_still_that_work() -> None:
    """Scaled, a work has fewer clients and channels and the same rate, and as many clients as it needs."""
    small = WORKS["W2"].scaled(0.01)
    assert dict(small.load) == {"clients": 10, "channels": 2, "flight": 1}
    assert WORKS["W1"].scaled(0.0001).load["clients"] == 3
    assert WORKS["recovery"].scaled(0.1).load["fill"] == 1000
    assert WORKS["W1"].scaled(1.0) == WORKS["W1"]


def test_every_round_meets_every_peer_before_the_next() -> None:
    """Peers take turns within a round, so that what else the machine does hits all alike; ours alone do our works."""
    peers = [PEERS["bare"], PEERS["waterspout"]]
    plan = bench.Plan(peers, [WORKS["W1"], WORKS["K1"]], rounds=2, seconds=1)
    assert [(number, work.name, peer.name) for number, work, peer in plan.steps()] == [
        (number, work, peer)
        for number in (1, 2)
        for work, peer in (("W1", "bare"), ("W1", "waterspout"), ("K1", "waterspout"))
    ]


@pytest.mark.parametrize("work", WORKS.values(), ids=lambda work: work.name)
def test_every_work_has_its_base_and_its_columns(work: Work) -> None:
    """What a work is compared with is a work that every peer does, and its kind has a table."""
    assert work.kind in figures.COLUMNS
    assert not work.base or not WORKS[work.base].ours_only
    assert {"ratio"} <= {column.figure for column in figures.COLUMNS[work.kind]} or not work.base or work.name == "W3"


def test_our_dialect_counts_what_it_must() -> None:
    """Acknowledgements, refusals and heartbeats of our protocol are told from publications."""
    assert CENTRIFUGE.ack["ack"] in '{"id":12,"publish":{}}'
    assert CENTRIFUGE.ack["ack"] not in '{"push":{"channel":"a","pub":{"data":{}}}}'
    assert CENTRIFUGE.ack["refusal"] in '{"id":12,"error":{"code":111,"message":"too many requests"}}'


@pytest.mark.parametrize(("text", "found"), [("0\n", {0}), ("0,4\n", {0, 4}), ("2-4,7", {2, 3, 4, 7})])
def test_the_kernels_lists_are_read(text: str, found: set[int]) -> None:
    """Cores that share one are listed singly or as a range."""
    assert processes.numbers(text) == found


def test_the_command_line_refuses_what_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown work or peer ends the program before anything is started, and the known ones are named."""
    with pytest.raises(SystemExit):
        bench.parse(["--works", "W1,W9"])
    assert "W9" in (said := capsys.readouterr().err)
    assert "recovery" in said


def test_the_options_that_were_chosen_are_shown() -> None:
    """The command beside a published table has what differs from the defaults, and nothing else."""
    assert bench.chosen(bench.parse(["--rounds", "5", "--works", "W1"])) == {"works": "W1", "rounds": "5"}
    assert bench.chosen(bench.parse([])) == {}
