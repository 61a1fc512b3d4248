"""How a process goes away without hurting anybody: no longer ready, then no longer listening, then client by client.

A load balancer that still sends clients here learns first that it should not
(``grace``), while all goes on as before.  Then the clients are sent away, in
random order and at a pace: each comes back somewhere else and is caught up there,
and all of them at once, or all of one channel, would be a storm for the others.
What a client is owed leaves before its goodbye, for which it has a moment only.
Back ends and operators, where they have a port of their own, come last: what they
ask concerns the clients, and is answered as long as there are any.  PROTOCOL 17.0.3.

Whoever is in a hurry (a second signal) calls ``hurry``: everything that waits here
ends at once.
"""

import asyncio
import math
import random
from collections.abc import Callable

from server.errors import SHUTDOWN
from server.node import Node
from server.settings import ShutdownSettings

TICK_S = 0.02
PACED_PART = 2 / 3
"""Within which part of ``shutdown.timeout`` all are told to go; the rest is for the last ones' goodbyes."""

REASON = "the server is going away"


def due(clients: int, elapsed_s: float, pace: float, timeout_s: float) -> int:
    """How many of so many clients should have been told to go by now.

    ``pace`` are clients a second, 0 for all at once; it is exceeded where it
    would not get them all out in time.
    """
    longest_s = timeout_s * PACED_PART
    if not pace or longest_s <= 0:
        return clients
    pace = max(pace, clients / longest_s)
    return min(clients, math.floor(elapsed_s * pace) + 1)


class Leaving:
    """The end of one process's life; ``leave`` once.

    ``stop_listening`` is called after the grace, ``stop_calls`` when all clients have
    been told to go: then nobody is let in, be it a back end.  ``goodbyes`` says how many
    connections have been told to go and are still there, or wait for an answer, and ends
    those that take too long over it.
    """

    def __init__(
        self,
        node: Node,
        settings: ShutdownSettings,
        *,
        stop_listening: Callable[[], None],
        stop_calls: Callable[[], None],
        goodbyes: Callable[[], int],
    ) -> None:
        self._node = node
        self._settings = settings
        self._stop_listening = stop_listening
        self._stop_calls = stop_calls
        self._goodbyes = goodbyes
        self._hurry = asyncio.Event()

    def hurry(self) -> None:
        """Do what is left without waiting for anybody."""
        self._hurry.set()

    async def leave(self, *, graceful: bool = True) -> None:
        """Send everybody away; when this returns nobody is left who would be owed anything.

        Without ``graceful`` readiness is not waited for to be seen: nobody
        balances load onto a server that is stopped from its terminal.
        """
        self._node.parts.troubles["server"] = REASON
        if graceful:
            await self._pause(self._settings.grace)
        self._node.leaving = True  # a connection that a proxy keeps can still ask to be a client's
        self._stop_listening()
        try:
            async with asyncio.timeout(self._settings.timeout):
                await self._send_away()
                self._stop_calls()
                while self._goodbyes() and not self._hurry.is_set():
                    await self._pause(TICK_S)
        except TimeoutError:
            self._all_at_once()

    async def _send_away(self) -> None:
        """Tell all clients to go, at the pace; those who came through the door last as well."""
        clock = asyncio.get_running_loop().time
        began = clock()
        leaving = list(self._node.sessions.values())
        random.shuffle(leaving)
        told = 0
        while told < len(leaving) and not self._hurry.is_set():
            number = due(len(leaving), clock() - began, self._settings.pace, self._settings.timeout)
            for session in leaving[told:number]:
                session.disconnect(SHUTDOWN)
            told = max(told, number)
            if told < len(leaving):
                await self._pause(TICK_S)
        self._all_at_once()

    def _all_at_once(self) -> None:
        for session in list(self._node.sessions.values()):
            session.disconnect(SHUTDOWN)

    async def _pause(self, seconds: float) -> None:
        """Wait so long, or until somebody is in a hurry."""
        try:
            async with asyncio.timeout(seconds):
                await self._hurry.wait()
        except TimeoutError:
            return
