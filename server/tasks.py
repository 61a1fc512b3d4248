"""Work that goes on beside whoever began it: every task has an owner, and what it raises is logged once."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from server.observe import event


class Tasks:
    """The tasks of one owner."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._once: set[str] = set()

    def __repr__(self) -> str:
        return f"<Tasks {len(self._tasks)}>"

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Begin ``work``."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def once(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Begin ``work`` unless what was begun under this name is still going on."""
        if name in self._once:
            return
        self._once.add(name)
        self.spawn(work(), name).add_done_callback(lambda _: self._once.discard(name))

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            event("task.failed", task=task.get_name(), fault=fault)

    async def idle(self) -> None:
        """Wait until nothing is going on."""
        while tasks := self._tasks - {asyncio.current_task()}:
            await asyncio.wait(tasks)

    async def finish(self, patience_s: float) -> None:
        """Wait for what is going on, and after ``patience_s`` cancel it and wait as long for its end at most."""
        if pending := self._tasks - {asyncio.current_task()}:
            _, late = await asyncio.wait(pending, timeout=patience_s)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=patience_s)
