"""The floor where there is no C compiler: a room per path, and a bare loop of ``send`` of one ready frame.

raw.py PORT.  Not a server: see raw.c, which is the same.
"""

import contextlib
import select
import socket
import sys

ANSWER = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n\x81\x05ready"
)
clients: dict[int, socket.socket] = {}
rooms: dict[bytes, list[socket.socket]] = {}
room_of: dict[int, list[socket.socket]] = {}


def take(room: list[socket.socket], data: bytes) -> None:
    """Send every frame of ``data`` to all, without its mask."""
    at = 0
    while at + 6 <= len(data):
        head, length = at + 2, data[at + 1] & 0x7F
        if length == 126:
            head, length = at + 4, int.from_bytes(data[at + 2 : at + 4], "big")
        mask, end = data[head : head + 4], head + 4 + length
        key = int.from_bytes((mask * (length // 4 + 1))[:length], "big")
        payload = (int.from_bytes(data[head + 4 : end], "big") ^ key).to_bytes(length, "big")
        frame = bytes((data[at], data[at + 1] & 0x7F)) + data[at + 2 : head] + payload
        for client in room:
            with contextlib.suppress(OSError):
                client.send(frame)
        at = end


listener = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=4096)
loop = select.epoll()
loop.register(listener, select.EPOLLIN)
while True:
    for fd, _ in loop.poll():
        if fd == listener.fileno():
            client, _ = listener.accept()
            client.setblocking(False)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            clients[client.fileno()] = client
            loop.register(client, select.EPOLLIN)
            continue
        client = clients[fd]
        try:
            data = client.recv(1 << 18)
        except ConnectionError:
            data = b""
        if not data:
            room_of.pop(fd, [client]).remove(client)
            clients.pop(fd).close()
        elif fd in room_of:
            take(room_of[fd], data)
        else:
            room_of[fd] = rooms.setdefault(data.split(b" ", 2)[1], [])
            room_of[fd].append(client)
            client.send(ANSWER)
