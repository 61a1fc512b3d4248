"""Tic-tac-toe with its rules on the server: pages ask, the server decides, everybody watches.

    python run.py --app examples/tictactoe.py

A page subscribes to ``game:ttt-NAME`` and calls ``join {game}`` and
``move {game, cell}`` (cells are 0 to 8).  Every accepted step is a publication;
the board is what they add up to, so a late watcher, a reload and a restart of the
server all see the same game.
"""

import asyncio
from typing import Annotated, Any
from weakref import WeakValueDictionary

from msgspec import Meta, Struct

from server.app import App, Client, Refuse

app = App()

LINES = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))
FULL, NOT_YOURS, TAKEN, OVER = 409, 403, 410, 411

turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
"""One step of a game at a time."""


class Join(Struct):
    """Take a seat."""

    game: Annotated[str, Meta(pattern="^[a-z0-9]{1,20}$")]


class Move(Join):
    """Put one's mark into a cell."""

    cell: Annotated[int, Meta(ge=0, le=8)]


class Board:
    """What the publications of a game add up to."""

    def __init__(self, steps: list[Any]) -> None:
        self.players: list[str] = [step["joined"] for step in steps if "joined" in step]
        self.cells = [""] * 9
        for step in steps:
            if "cell" in step:
                self.cells[step["cell"]] = step["mark"]
        marks = sum(1 for cell in self.cells if cell)
        self.next = "XO"[marks % 2]
        won = [self.cells[a] for a, b, c in LINES if self.cells[a] and self.cells[a] == self.cells[b] == self.cells[c]]
        self.result = won[0] if won else "draw" if marks == 9 else ""


async def board_of(channel: str) -> Board:
    """Read the game from its history."""
    messages, _ = await app.server.history(channel, limit=-1)
    return Board([message.data for message in messages])


@app.publishing("game")
async def only_the_server(client: Client, channel: str, data: Any) -> None:
    """Nobody writes into a game past its rules."""
    if channel.startswith("game:ttt-"):
        raise Refuse(NOT_YOURS, "call move instead")


@app.rpc
async def join(client: Client, data: Join) -> dict[str, str]:
    """Take a free seat; whoever has one keeps it."""
    channel, player = f"game:ttt-{data.game}", client.user or client.id
    async with turns.setdefault(channel, asyncio.Lock()):
        board = await board_of(channel)
        if player not in board.players:
            if len(board.players) == 2:
                raise Refuse(FULL, "both seats are taken")
            board.players.append(player)
            await app.server.publish(channel, {"joined": player})
    return {"mark": "XO"[board.players.index(player)]}


@app.rpc
async def move(client: Client, data: Move) -> dict[str, str]:
    """Make a move, if it is one's turn and the cell is free."""
    channel, player = f"game:ttt-{data.game}", client.user or client.id
    async with turns.setdefault(channel, asyncio.Lock()):
        board = await board_of(channel)
        if board.result:
            raise Refuse(OVER, "the game is over")
        if len(board.players) < 2 or player != board.players["XO".index(board.next)]:
            raise Refuse(NOT_YOURS, "it is not your turn")
        if board.cells[data.cell]:
            raise Refuse(TAKEN, "that cell is taken")
        board.cells[data.cell] = board.next
        result = Board([{"cell": at, "mark": mark} for at, mark in enumerate(board.cells) if mark]).result
        await app.server.publish(channel, {"cell": data.cell, "mark": board.next, "result": result})
    return {"result": result}
