"""A short storm, of the kind that ``make storm`` lets rage for as long as one likes."""

import os
from pathlib import Path

import pytest
from mongod import ReplicaSet
from storm import Plan, run
from verdict import summary
from wanderer import WAYS

SEED = 4
SHORT_S = 40.0


@pytest.mark.parametrize("seed", [int(os.environ.get("WATERSPOUT_STORM_SEED", SEED))])
async def test_a_short_storm_loses_and_doubles_nothing(tmp_path: Path, seed: int) -> None:
    """P1 to P6, with processes, Redis and MongoDB broken in turn: every list is history's, every promise was kept."""
    plan = Plan(seed, SHORT_S, longest_s=6.0, pause_s=0.5)
    with ReplicaSet() as replica_set:  # the shared one takes five seconds for an election, of which there are many here
        storm, faults = await run(plan, tmp_path, replica_set, print)
    assert not faults, f"seed {seed}: {summary(faults)}"
    counts = storm.world.counts
    assert len({one.kind for one in storm.disturbances}) >= 8
    assert counts["acknowledged"] > 500
    assert counts["delivered"] > 3 * counts["acknowledged"]
    assert counts["delivered to wanderers"] > counts["acknowledged"] / 2
    assert all(counts[f"legs by {way}"] for way in WAYS)
    assert counts["recoveries"] > 20
    assert counts["delivered in passing"] > 500
