"""The parts of a process that may be elsewhere, from opening to closing: history, broker, presence, blocks.

They are opened all at once.  At the start of a server each may be away: then it is said
in the log, tried again every few seconds, and meanwhile the process is there and not
ready.  What keeps it from serving in full is asked of here (``troubled``), for
``/health/ready`` and for the console; other rooms may add to it (``troubles``).

Knows nothing of what the parts are for.
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from server.blocking import Blocking
from server.broker import Broker
from server.errors import Unavailable
from server.history import History
from server.observe import event
from server.presence import Presence
from server.tasks import Tasks

OPEN_AGAIN_S = 2.0
"""How long after a part could not be opened it is tried again."""

TASK = "open what is not open yet"

Opening = Callable[[], Coroutine[Any, Any, None]]
"""Opens one part; raises ``errors.Unavailable`` if it cannot be opened now."""


class Parts:
    """See the module's docstring.

    ``openings`` opens each part, by the names ``history``, ``broker``, ``presence`` and
    ``blocks``.  ``returned`` is called when all are open, if not all were at first.
    """

    def __init__(
        self,
        history: History,
        broker: Broker,
        presence: Presence,
        blocking: Blocking,
        *,
        openings: Mapping[str, Opening],
        tasks: Tasks,
        returned: Callable[[], None],
    ) -> None:
        self._history = history
        self._broker = broker
        self._blocking = blocking
        self._closings: dict[str, Opening] = {
            "broker": broker.close,
            "presence": presence.close,
            "blocks": blocking.close,
            "history": history.close,
        }
        self._closed = dict(openings)
        """What is not open, and how it is opened."""
        self._tasks = tasks
        self._returned = returned
        self._opening: asyncio.Task[Any] | None = None
        self.troubles: dict[str, str] = {}
        """What cannot be opened, and whatever else somebody says: the part and why, in operator's words."""

    def __repr__(self) -> str:
        return f"<Parts closed={sorted(self._closed)}>"

    def is_open(self, name: str) -> bool:
        """Has this part been opened?"""
        return name not in self._closed

    @property
    def troubled(self) -> dict[str, str]:
        """What keeps this process from serving in full: the part and why, in operator's words; empty if nothing."""
        troubles = dict(self.troubles)
        if self._history.trouble:
            troubles.setdefault("history", self._history.trouble)
        if away := self._broker.trouble or self._broker.mute:
            troubles.setdefault("broker", away)
        if self._blocking.trouble:
            troubles.setdefault("blocks", self._blocking.trouble)
        return troubles

    async def open(self, *, patiently: bool = False) -> None:
        """Open all; raises ``errors.Unavailable`` if one of them cannot be, and has then closed the others.

        ``patiently`` goes on without, says so in the log, and tries again until all are open.
        """
        faults = await self._open_closed()
        if not faults:
            return
        if not patiently:
            for name, close in self._closings.items():
                if self.is_open(name):
                    await close()
            raise faults[0]
        self._opening = self._tasks.spawn(self._open_later(), TASK)

    async def _open_closed(self) -> list[Unavailable]:
        """Try to open what is not open, all at once; returns what was in the way."""
        names = list(self._closed)
        faults = []
        for name, fault in zip(names, await asyncio.gather(*map(self._open_one, names)), strict=True):
            if fault is None:
                del self._closed[name]
                self.troubles.pop(name, None)
                continue
            faults.append(fault)
            self.troubles[name] = str(fault)
        return faults

    async def _open_one(self, name: str) -> Unavailable | None:
        try:
            await self._closed[name]()
        except Unavailable as fault:
            return fault
        return None

    async def _open_later(self) -> None:
        while self._closed:
            for name, why in self.troubles.items():
                event(f"{name}.unavailable", why=why)
            await asyncio.sleep(OPEN_AGAIN_S)
            try:
                await self._open_closed()
            except Exception as fault:  # else one fault of ours would keep this process away for good
                event("task.failed", task=TASK, fault=fault)
        self._returned()

    def give_up(self) -> None:
        """Try to open nothing any more: the end has come."""
        if self._opening is not None:
            self._opening.cancel()

    async def close(self) -> None:
        """Close all; history last, since what the others still do may end in it."""
        for close in self._closings.values():
            await close()
