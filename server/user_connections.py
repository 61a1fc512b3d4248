"""What a back end asks about a user's connections: ``connections``; PROTOCOL 15.2.20.

A function of a node and typed parameters; ``server/backend.py`` has it in its table.
"""

import asyncio
from typing import Any

import msgspec

from server import orders
from server.errors import BAD_REQUEST, Refused, Unavailable
from server.node import Node

_answers = msgspec.msgpack.Decoder(orders.ConnectionsAnswer)
_encode = msgspec.json.Encoder().encode


class Connections(msgspec.Struct):
    """PROTOCOL 15.2.20; ``expression`` is what Centrifugo PRO has, and must be empty."""

    user: str = ""
    client: str = ""
    session: str = ""
    expression: str = ""


async def connections(node: Node, request: Connections) -> bytes:
    """PROTOCOL 15.2.20; raises ``Refused``, and ``Unavailable`` if a process that is alive does not answer."""
    if not request.user:
        raise Refused(BAD_REQUEST, "a user is expected: the anonymous ones may be a million")
    if request.expression:
        raise Refused(BAD_REQUEST, "expression is not supported; user, client and session are")
    target = orders.Target(request.user, request.client, session=request.session)
    told = {node.id: node.ordering.described(target)}
    for uid, answer in (await node.ordering.ask(orders.ConnectionsQuestion(target))).items():
        told[uid] = _read(answer)
    names = {facts.uid: facts.name for facts in node.everybody()}
    entries: list[bytes] = []
    for uid, some in told.items():
        entries += [_entry(connection, names.get(uid, uid)) for connection in some.connections]
        await asyncio.sleep(0)
    number = sum(some.number for some in told.values())
    return b'{"connections":{%s},"num_connections":%d}' % (b",".join(entries), number)


def _read(answer: bytes) -> orders.ConnectionsAnswer:
    """What another process told; half of the truth is none."""
    try:
        return _answers.decode(answer)
    except msgspec.DecodeError:
        raise Unavailable("another process has answered with nothing that can be read") from None


def _entry(connection: orders.Connection, node: str) -> bytes:
    """One connection as a member of the JSON object."""
    told: dict[str, Any] = {
        "app_name": connection.app_name,
        "app_version": connection.app_version,
        "transport": connection.transport,
        "protocol": connection.protocol,
        "user": connection.user,
        "state": {"channels": {channel: {} for channel in connection.channels}},
        "num_channels": connection.num_channels,
        "address": connection.address,
        "connected_at": connection.connected_at,
        "node": node,
    }
    return b"%s:%s" % (_encode(connection.client), _encode(told))
