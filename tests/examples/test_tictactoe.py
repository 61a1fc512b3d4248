"""examples/tictactoe.py, played and cheated at."""

import asyncio

import pytest

from examples.tictactoe import FULL, NOT_YOURS, OVER, TAKEN, app
from server.testing import ReplyError, SimulatedClient, World, harness

CHANNEL = "game:ttt-one"


async def _table(world: World) -> tuple[SimulatedClient, SimulatedClient]:
    ann, bob = await world.connect("ann"), await world.connect("bob")
    assert await ann.rpc("join", {"game": "one"}) == {"mark": "X"}
    assert await bob.rpc("join", {"game": "one"}) == {"mark": "O"}
    return ann, bob


async def _play(players: tuple[SimulatedClient, SimulatedClient], cells: str) -> str:
    """Play these cells in turn; returns what the last move made of the game."""
    result = ""
    for number, cell in enumerate(cells):
        result = (await players[number % 2].rpc("move", {"game": "one", "cell": int(cell)}))["result"]
    return result


@pytest.mark.parametrize(
    ("cells", "result"), [("03142", "X"), ("031485", "O"), ("048213576", "draw"), ("0", ""), ("02431657", "")]
)
async def test_games_end_as_the_rules_say(cells: str, result: str) -> None:
    """Three in a row win, a full board is a draw, everything else goes on."""
    async with harness(app) as world:
        assert await _play(await _table(world), cells) == result


async def test_everybody_watches_the_same_game() -> None:
    """A watcher hears every step in order, and one who comes later reads the same from history."""
    async with harness(app) as world:
        watching = await (await world.connect("eve")).subscribe(CHANNEL)
        await _play(await _table(world), "03142")
        await world.settle()
        steps = [message.data for message in watching.heard()]
        assert [step.get("joined") or (step["mark"], step["cell"]) for step in steps] == [
            "ann", "bob", ("X", 0), ("O", 3), ("X", 1), ("O", 4), ("X", 2),
        ]  # fmt: skip
        late = await world.connect("late")
        assert [message.data for message in await late.history(CHANNEL)] == steps


async def test_nobody_cheats() -> None:
    """Out of turn, into a taken cell, from the third chair, past the rules, after the end: each is refused."""
    async with harness(app) as world:
        ann, bob = players = await _table(world)
        eve = await world.connect("eve")
        for client, method, request, code in (
            (bob, "move", {"cell": 0}, NOT_YOURS),
            (eve, "move", {"cell": 0}, NOT_YOURS),
            (eve, "join", {}, FULL),
            (ann, "move", {"cell": 9}, 107),
        ):
            with pytest.raises(ReplyError, match=str(code)):
                await client.rpc(method, {"game": "one", **request})
        for publish in (ann.publish(CHANNEL, {"cell": 0}), ann.publish_once(CHANNEL, {"cell": 0}, "k")):
            with pytest.raises(ReplyError, match=str(NOT_YOURS)):
                await publish
        await _play(players, "0")
        with pytest.raises(ReplyError, match=str(TAKEN)):
            await bob.rpc("move", {"game": "one", "cell": 0})
        for client, cell in ((bob, 3), (ann, 1), (bob, 4), (ann, 2)):
            await client.rpc("move", {"game": "one", "cell": cell})
        with pytest.raises(ReplyError, match=str(OVER)):
            await bob.rpc("move", {"game": "one", "cell": 5})


async def test_two_moves_at_once_are_one() -> None:
    """A player who moves from two tabs in the same instant has made one move."""
    async with harness(app) as world:
        ann, _ = await _table(world)
        again = await world.connect("ann")
        moves = await asyncio.gather(
            ann.rpc("move", {"game": "one", "cell": 0}),
            again.rpc("move", {"game": "one", "cell": 1}),
            return_exceptions=True,
        )
        assert sorted(type(move).__name__ for move in moves) == ["ReplyError", "dict"]


async def test_one_keeps_the_seat_after_a_reload() -> None:
    """A player who comes back joins again and is who he was."""
    async with harness(app) as world:
        ann, _ = await _table(world)
        ann.disconnect()
        back = await world.connect("ann")
        assert await back.rpc("join", {"game": "one"}) == {"mark": "X"}
