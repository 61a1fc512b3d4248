"""Rooms of python-socketio: join one, say something to all in it.  For uvicorn."""

import socketio

server = socketio.AsyncServer(async_mode="asgi", cors_allowed_origins="*")
app = socketio.ASGIApp(server)


@server.event
async def join(sid: str, room: str) -> str:
    await server.enter_room(sid, room)
    return "joined"


@server.event
async def say(sid: str, room: str, message: object) -> None:
    await server.emit("said", message, room=room)
