"""What a back end asks about blocks: ``block_user``, ``unblock_user``, ``blocked_users``; PROTOCOL 15.2.17 to 15.2.19.

Functions of a node and typed parameters; ``server/backend.py`` has them in its table.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from server.blocks import Block, adding, lifting
from server.errors import BAD_REQUEST, Refused
from server.node import Node

USERS = 100
MOST_USERS = 1000
"""How many users one answer has, unless the call says otherwise, and at most: each may have a thousand blocks."""

MOST_BLOCKS = 10_000
"""How many blocks one answer has, about."""


class Barred(msgspec.Struct):
    """Who, and from what: an empty ``channel`` is everywhere, ``mute`` is from publishing only."""

    user: str = ""
    channel: str = ""
    mute: bool = False


class BlockUser(Barred):
    """PROTOCOL 15.2.17."""

    expire_at: Annotated[int, Meta(ge=0, le=2**53)] = 0
    reason: Annotated[str, Meta(max_length=256)] = ""


class UnblockUser(Barred):
    """PROTOCOL 15.2.18."""


class BlockedUsers(msgspec.Struct):
    """PROTOCOL 15.2.19."""

    user: str = ""
    after: str = ""
    limit: Annotated[int, Meta(ge=0, le=MOST_USERS)] = 0


async def block_user(node: Node, request: BlockUser) -> bytes:
    """PROTOCOL 15.2.17; raises ``Refused`` and ``Unavailable``."""
    _check(node, request)
    if request.expire_at and request.expire_at <= node.clock():
        raise Refused(BAD_REQUEST, "block_user with an expire_at that is past")
    await node.block(request.user, adding(Block(request.channel, request.mute, request.expire_at, request.reason)))
    return b"{}"


async def unblock_user(node: Node, request: UnblockUser) -> bytes:
    """PROTOCOL 15.2.18; raises as ``block_user``."""
    _check(node, request)
    await node.block(request.user, lifting(request.channel, muted=request.mute))
    return b"{}"


async def blocked_users(node: Node, request: BlockedUsers) -> bytes:
    """PROTOCOL 15.2.19; what this process knows."""
    blocking = node.blocking
    users = [request.user] if request.user else blocking.blocked_users(request.after, request.limit or USERS)
    found: list[dict[str, object]] = []
    for user in users:
        if len(found) >= MOST_BLOCKS:
            break
        found += [
            {
                "user": user,
                "channel": block.channel,
                "mute": block.muted,
                "expire_at": block.expire_at,
                "reason": block.reason,
            }
            for block in blocking.held(user)
        ]
    return msgspec.json.encode({"blocks": found})


def _check(node: Node, request: Barred) -> None:
    if not request.user:
        raise Refused(BAD_REQUEST, "a user is expected: the anonymous one is nobody to be blocked")
    if request.channel:
        node.channels.check_name(request.channel, node.channels.known(request.channel))
