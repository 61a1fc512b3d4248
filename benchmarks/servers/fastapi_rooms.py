"""A chat room per path in FastAPI, as its documentation shows it: ``send_text`` to each.  For uvicorn."""

from collections import defaultdict

from fastapi import FastAPI, WebSocket, WebSocketDisconnect

app = FastAPI()
rooms: defaultdict[str, list[WebSocket]] = defaultdict(list)


@app.websocket("/ws/{room}")
async def chat(client: WebSocket, room: str) -> None:
    await client.accept()
    rooms[room].append(client)
    try:
        await client.send_text("ready")
        while True:
            message = await client.receive_text()
            for one in list(rooms[room]):
                try:
                    await one.send_text(message)
                except (RuntimeError, WebSocketDisconnect):
                    pass
    except WebSocketDisconnect:
        pass
    finally:
        rooms[room].remove(client)
