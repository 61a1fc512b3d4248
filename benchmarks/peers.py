"""Who is measured: how each server is installed and started, and what its clients say.  Pure.

Every peer is in the form in which its own documentation shows it, without tuning:
a room for each name, and what one says goes to all in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Dialect:
    """What a client says until it is subscribed, and how it publishes.

    ``script`` are the arguments ``say`` and ``hear`` of the load generator in
    order, ``arguments`` the rest of what the dialect needs; in all of them ``@C``
    is the channel, ``@P`` the payload, ``@N`` the number of the command.
    """

    script: tuple[str, ...]
    arguments: Mapping[str, str]
    ack: Mapping[str, str] = field(default_factory=dict)


PLAIN = Dialect(("hear=ready",), {"path": "/ws/@C", "publish": "@P"})

SOCKET_IO = Dialect(
    ("hear=0{", "say=40", "hear=40{", 'say=421["join","@C"]', "hear=431"),
    {
        "path": "/socket.io/?EIO=4&transport=websocket",
        "publish": '42["say","@C",@P]',
        "heartbeat": "2",
        "answer": "3",
    },
)

_CONNECT = ('say={"id":1,"connect":{}}', 'hear="connect":{')
_SUBSCRIBE = ('say={"id":2,"subscribe":{"channel":"@C"}}', 'hear="subscribe":{')
_RECOVER = ('say={"id":2,"subscribe":{"channel":"@C","recover":true,"offset":0}}', 'hear="subscribe":{')

CENTRIFUGE = Dialect(
    (
        *_CONNECT,
        *_SUBSCRIBE,
        *(f"publisher_{step}" for step in _CONNECT),
        *(f"returner_{step}" for step in (*_CONNECT, *_RECOVER)),
    ),
    {
        "path": "/connection/websocket",
        "publish": '{"id":@N,"publish":{"channel":"@C","data":@P}}',
        "heartbeat": "{}",
        "answer": "{}",
    },
    {"ack": '"publish":{', "refusal": '"error":{'},
)


@dataclass(frozen=True)
class Peer:
    """A server to be measured.

    ``command`` is its command line, with ``{python}`` for the interpreter of its
    ``environment``, ``{servers}`` and ``{bin}`` for the folders of scripts and of
    what is compiled, ``{port}``, and for our own server ``{ours}``, ``{run}`` and
    ``{config}``.  ``packages`` are pip's or npm's names of what the environment
    holds; versions are shown of the first ones.
    """

    name: str
    title: str
    command: tuple[str, ...]
    dialect: Dialect = PLAIN
    environment: str = ""
    packages: tuple[str, ...] = ()
    kind: str = "pip"
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        """Is it Waterspout?"""
        return self.dialect is CENTRIFUGE


BARE = "bare"
OURS = "waterspout"

_UVICORN = (
    *("{python}", "-m", "uvicorn", "--app-dir", "{servers}", "--host", "127.0.0.1", "--port", "{port}"),
    *("--log-level", "warning", "--backlog", "4096"),
)

_ALL = (
    Peer(BARE, "bare send loop", ("{bin}/raw", "{port}")),
    Peer(OURS, "Waterspout", ("{ours}", "{run}", "--port", "{port}", "--config", "{config}"), CENTRIFUGE),
    Peer(
        "waterspout-uvloop",
        "Waterspout on uvloop",
        *(("{ours}", "{servers}/ours.py", "--loop", "uvloop", "--", "--port", "{port}", "--config", "{config}"),),
        dialect=CENTRIFUGE,
        environment="uvloop",
        packages=("uvloop",),
        kind="beside",
        env={"PYTHONPATH": "{environment}"},
    ),
    Peer(
        "websockets",
        "websockets",
        ("{python}", "{servers}/websockets_broadcast.py", "{port}"),
        environment="websockets",
        packages=("websockets",),
    ),
    Peer(
        "aiohttp",
        "aiohttp",
        ("{python}", "{servers}/aiohttp_rooms.py", "{port}"),
        environment="aiohttp",
        packages=("aiohttp",),
    ),
    Peer(
        "tornado",
        "plain Tornado",
        ("{python}", "{servers}/plain_tornado.py", "{port}"),
        environment="tornado",
        packages=("tornado",),
    ),
    Peer(
        "fastapi",
        "FastAPI on uvicorn",
        (*_UVICORN, "fastapi_rooms:app"),
        environment="fastapi",
        packages=("fastapi", "uvicorn[standard]"),
    ),
    Peer(
        "python-socketio",
        "python-socketio on uvicorn",
        (*_UVICORN, "socketio_rooms:app"),
        SOCKET_IO,
        environment="python-socketio",
        packages=("python-socketio", "uvicorn[standard]"),
    ),
    Peer(
        "socket.io",
        "Socket.IO on Node",
        ("node", "{servers}/socketio_rooms.js", "{port}"),
        SOCKET_IO,
        environment="socket.io",
        packages=("socket.io",),
        kind="npm",
        env={"NODE_PATH": "{environment}/node_modules", "NODE_ENV": "production"},
    ),
)
PEERS: Mapping[str, Peer] = {peer.name: peer for peer in _ALL}
USUAL = tuple(name for name in PEERS if name != "waterspout-uvloop")
