"""A chat room per path in plain Tornado: ``write_message`` to each.  plain_tornado.py PORT."""

import asyncio
import sys
from collections import defaultdict

from tornado.web import Application
from tornado.websocket import WebSocketClosedError, WebSocketHandler

rooms: defaultdict[str, set["Chat"]] = defaultdict(set)


class Chat(WebSocketHandler):
    def check_origin(self, origin: str) -> bool:
        return True

    def open(self, room: str) -> None:
        self.set_nodelay(True)
        self.room = rooms[room]
        self.room.add(self)
        self.write_message("ready")

    def on_message(self, message: str | bytes) -> None:
        for client in self.room:
            try:
                client.write_message(message)
            except WebSocketClosedError:
                pass

    def on_close(self) -> None:
        self.room.discard(self)


async def main() -> None:
    Application([("/ws/(.+)", Chat)]).listen(int(sys.argv[1]), "127.0.0.1")
    await asyncio.Event().wait()


asyncio.run(main())
