"""Dice that nobody can load: the server throws them, and the table sees what fell.

    python run.py --app examples/dice.py

A page calls ``client.rpc("roll", {dice: 2, sides: 6, table: "game:tavern"})`` and
gets ``{"fell": [4, 1], "sum": 5}``; everybody at the table gets it as a publication.
"""

import secrets
from typing import Annotated

from msgspec import Meta, Struct

from server.app import App, Client, Refuse

app = App()

NOT_AT_THE_TABLE = 400


class Roll(Struct):
    """What is asked for; anything else is refused with 107 before ``roll`` runs."""

    dice: Annotated[int, Meta(ge=1, le=10)] = 1
    sides: Annotated[int, Meta(ge=2, le=100)] = 6
    table: str = ""


class Fell(Struct):
    """What fell."""

    fell: list[int]
    sum: int


@app.rpc
async def roll(client: Client, data: Roll) -> Fell:
    """Throw the dice, and tell the table if the player sits at one."""
    if data.table and data.table not in client.channels:
        raise Refuse(NOT_AT_THE_TABLE, "subscribe to the table first")
    fell = [secrets.randbelow(data.sides) + 1 for _ in range(data.dice)]
    result = Fell(fell, sum(fell))
    if data.table:
        await app.server.publish(data.table, result, user=client.user, conn_info=client.info)
    return result
