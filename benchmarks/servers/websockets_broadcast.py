"""A chat room per path with ``websockets``: its own ``broadcast``.  websockets_broadcast.py PORT."""

import asyncio
import sys
from collections import defaultdict

from websockets.asyncio.server import ServerConnection, broadcast, serve

rooms: defaultdict[str, set[ServerConnection]] = defaultdict(set)


async def chat(client: ServerConnection) -> None:
    room = rooms[client.request.path]
    room.add(client)
    try:
        await client.send("ready")
        async for message in client:
            broadcast(room, message)
    finally:
        room.discard(client)


async def main() -> None:
    async with serve(chat, "127.0.0.1", int(sys.argv[1]), compression=None, backlog=4096) as server:
        await server.serve_forever()


asyncio.run(main())
