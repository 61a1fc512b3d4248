"""examples/dice.py, played."""

import pytest

from examples.dice import app
from server.testing import ReplyError, harness


async def test_everybody_at_the_table_sees_the_same_dice() -> None:
    """The thrower's answer and the table's publication are the same fall, and it is a possible one."""
    async with harness(app) as world:
        ann, bob = await world.connect("ann"), await world.connect("bob")
        await ann.subscribe("game:tavern")
        table = await bob.subscribe("game:tavern")
        answer = await ann.rpc("roll", {"dice": 3, "sides": 6, "table": "game:tavern"})
        seen = await table.publication()
        assert seen.data == answer
        assert seen.info is not None
        assert seen.info.user == "ann"
        assert len(answer["fell"]) == 3
        assert answer["sum"] == sum(answer["fell"])
        assert all(1 <= fallen <= 6 for fallen in answer["fell"])


@pytest.mark.parametrize("data", [{"dice": 0}, {"dice": 11}, {"sides": "six"}, [], None])
async def test_impossible_dice_are_refused(data: object) -> None:
    """No dice, too many, sides in words: 107, and the function never runs."""
    async with harness(app) as world:
        ann = await world.connect("ann")
        with pytest.raises(ReplyError, match="107"):
            await ann.rpc("roll", data)


async def test_nobody_throws_at_a_table_where_he_does_not_sit() -> None:
    """The table must be one's own: refused with the application's code, and nothing is published."""
    async with harness(app) as world:
        ann, bob = await world.connect("ann"), await world.connect("bob")
        table = await bob.subscribe("game:tavern")
        with pytest.raises(ReplyError, match="400 subscribe to the table first"):
            await ann.rpc("roll", {"table": "game:tavern"})
        await world.settle()
        assert table.heard() == []
