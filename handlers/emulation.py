"""``/emulation``: what a client says whose stream only listens; PROTOCOL 2.5.

A browser posts each batch of commands by itself and does not wait for the one before,
so they overtake one another on the way.  ``Turns`` puts them back into the order of
their ids: an id that is missing is waited for a moment, then passed over.  What has no
id (a pong) goes through at once.

The moment is counted in looks at the network, each of which takes ten milliseconds or
as long as the loop is busy: what was not read yet because of us is not missing.  Tried
and dropped: fifty milliseconds by the clock; two hundred posts at once, whose handling
takes longer than that, were then taken out of order though all of them were there.

The post may come to any process.  The one that holds the stream is named in it, and is
asked through the node; which stream it is only the client knows, by a secret id that
is looked up and never compared piece by piece.
"""

import asyncio
import heapq
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from handlers.bodies import BodyHandler
from handlers.socket import Sockets
from handlers.stream_outbox import StreamOutbox
from server import errors, orders, protocol
from server.errors import Disconnected, Unavailable
from server.node import Node
from server.protocol import Command

LOOK_S = 0.01
LOOKS = 5
"""How often, and how many times, a missing id is looked for before it is passed over."""

COMMAND_BYTES = 256
"""What a decoded command takes beside its bytes, roughly; for the bound on what waits."""


class Turns:
    """The batches of one client in the order of their commands' ids.

    Pure; ``look`` counts up.  ``first`` is the id that is expected next.  A batch
    that begins below it is late, or counted by rules of the client's own: its turn
    is now.  Within a batch nothing is missing.
    """

    __slots__ = ("_arrivals", "_count", "_expected", "_held", "_waiting", "waiting_bytes")

    def __init__(self, first: int) -> None:
        self._expected = first
        self._held: list[tuple[int, int, int, Sequence[Command]]] = []
        self._count = 0
        self._arrivals: deque[tuple[int, int]] = deque()
        """Number and look of each batch, in the order in which they came; the first one still waits."""
        self._waiting: set[int] = set()
        self.waiting_bytes = 0
        """About what the commands weigh whose turn has not come."""

    def put(self, commands: Sequence[Command], look: int, weight: int) -> None:
        """Take a batch, at least one command of which has an id; it weighs so many bytes."""
        self._count += 1
        self.waiting_bytes += weight
        first = min(command.id for command in commands if command.id)
        heapq.heappush(self._held, (first, self._count, weight, commands))
        self._arrivals.append((self._count, look))
        self._waiting.add(self._count)

    def take(self, look: int) -> Sequence[Command]:
        """Give the batch whose turn it is; none if there is none."""
        if not self._held or (self._held[0][0] > self._expected and look < self._arrivals[0][1] + LOOKS):
            return ()
        _, count, weight, commands = heapq.heappop(self._held)
        self._waiting.discard(count)
        while self._arrivals and self._arrivals[0][0] not in self._waiting:
            self._arrivals.popleft()
        self.waiting_bytes -= weight
        self._expected = max(self._expected, 1 + max(command.id for command in commands))
        return commands


class Speaker(Protocol):
    """What is asked of the session."""

    @property
    def closed(self) -> bool:
        """Is it over?"""

    def take(self, commands: Sequence[Command]) -> None:
        """Take commands, at least one."""

    def disconnect(self, disconnect: errors.Disconnect, why: str = "") -> None:
        """End the connection."""


class Emulated:
    """One session's commands that come by ``/emulation``, on their way to it.

    ``first`` is the id that is expected next, ``most_bytes`` what may wait for its
    turn or for a busy session; who sends more is disconnected with 3013.
    """

    __slots__ = ("_beside_bytes", "_look", "_loop", "_most_bytes", "_outbox", "_session", "_timer", "_turns")

    def __init__(self, session: Speaker, outbox: StreamOutbox, first: int, most_bytes: int) -> None:
        self._session = session
        self._outbox = outbox
        self._most_bytes = most_bytes
        self._turns = Turns(first)
        self._beside_bytes = 0
        self._look = 0
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        outbox.on_resume(self._go_on)

    def take(self, data: bytes) -> None:
        """Take one batch of commands; never waits, never raises."""
        if self._session.closed:
            return
        try:
            commands = self._outbox.wire.codec.decode(data)
        except Disconnected as end:
            self._session.disconnect(end.disconnect, end.why)
            return
        weight = len(data) + COMMAND_BYTES * len(commands)
        if any(command.id for command in commands):
            self._turns.put(commands, self._look, weight)
            self._go_on()
        else:
            # A pong counts at once; anything else waits in the session, which does not want it while it is paused.
            self._beside_bytes += weight if self._outbox.paused else 0
            self._session.take(commands)
        if self._turns.waiting_bytes + self._beside_bytes > self._most_bytes:
            self._session.disconnect(errors.RATE_LIMITED, "look at client.queue_max_size; its commands do not wait")

    def _go_on(self) -> None:
        """Give the session what it may have, as long as it wants more; look again for what is missing."""
        while not self._outbox.paused:
            self._beside_bytes = 0
            if self._session.closed:
                return
            commands = self._turns.take(self._look)
            if not commands:
                if self._turns.waiting_bytes and self._timer is None:
                    self._timer = self._loop.call_later(LOOK_S, self._look_again)
                return
            self._session.take(commands)

    def _look_again(self) -> None:
        self._timer = None
        self._look += 1
        self._go_on()


class EmulationHandler(BodyHandler):
    """See the module's docstring; for pages of ``client.allowed_origins`` and whoever is no browser."""

    methods = ("POST",)

    def initialize(self, sockets: Sockets, most_bytes: int, node: Node) -> None:
        """``node`` is this process; for the rest see ``BodyHandler.bound``."""
        self.bound(sockets, most_bytes)
        self._node = node

    async def post(self) -> None:
        """204 taken (or for a session that is gone); 400, 404 node unknown, 413, 503 it does not answer."""
        body = self.read_body()
        if body is None:
            return
        try:
            node, session, data = protocol.emulation_request(self.format, body)
        except ValueError as error:
            self.refuse(400, str(error))
            return
        if node == self._node.id:
            self._node.ordering.hand_over(session, data)
        elif node not in self._node.peers.all:
            self.refuse(404, "no such node")
            return
        else:
            try:
                await self._node.ordering.ask(orders.Emulated(session, data), to=node)
            except Unavailable:
                self.refuse(503, "the node that holds the stream does not answer")
                return
        self.set_status(204)
        self.finish()
