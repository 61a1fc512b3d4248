"""A chat room per path in aiohttp: ``send_str`` to each.  aiohttp_rooms.py PORT."""

import sys
from collections import defaultdict

from aiohttp import WSMsgType, web

rooms: defaultdict[str, set[web.WebSocketResponse]] = defaultdict(set)


async def chat(request: web.Request) -> web.WebSocketResponse:
    client = web.WebSocketResponse(compress=False)
    await client.prepare(request)
    room = rooms[request.match_info["room"]]
    room.add(client)
    try:
        await client.send_str("ready")
        async for message in client:
            if message.type is WSMsgType.TEXT:
                for one in list(room):
                    try:
                        await one.send_str(message.data)
                    except ConnectionError:
                        pass
    finally:
        room.discard(client)
    return client


app = web.Application()
app.router.add_get("/ws/{room}", chat)
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None, access_log=None, backlog=4096)
