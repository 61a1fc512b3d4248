"""Two processes that pass for one: what ``support.Process`` is, behind a load balancer without memory.

A test written for one server runs on them unchanged, if it gets a ``Troupe`` in
place of its ``Process``.  Nothing sticks: two requests of one page go to two
processes, and so do two connections of one client.
"""

import asyncio
import signal
import subprocess
import threading
from collections.abc import Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from balancer import Balancer, listening
from mongod import fresh_database, shared_set
from redis_server import shared_server
from support import PATIENCE_S, PATIENTLY, SECRET, Process

from server.settings import TRY_OUT

SIZE = 2


class Troupe:
    """See the module's docstring; without ``config`` they are as open as one server with nothing configured.

    ``kill`` and ``stop`` are for all of them, as for the one they pass for.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any] | None = None, *arguments: str) -> None:
        database = fresh_database()
        shared: dict[str, Any] = dict(config) if config is not None else _open()
        patient = {"publish_timeout": PATIENTLY, **shared.get("mongo", {})}
        shared["mongo"] = {**patient, "url": shared_set().url, "database": database}
        shared["redis"] = {"url": shared_server().url, "prefix": database}
        self.folder = folder
        self.processes = []
        for number in range(SIZE):
            home = folder / f"process{number}"
            home.mkdir()
            self.processes.append(Process(home, shared, *arguments))
        self.balancer = Balancer([process.port for process in self.processes])
        # A test that blocks, as a story of one server may, must not hold up what goes to that server.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="balancer", daemon=True)

    @property
    def port(self) -> int:
        """Where all of them are."""
        return self.balancer.port

    @property
    def url(self) -> str:
        """Where WebSocket clients connect."""
        return self.balancer.url

    @property
    def http(self) -> str:
        """Where browsers go."""
        return self.balancer.http

    @property
    def popen(self) -> "subprocess.Popen[str] | _All | None":
        """Who takes signals: all of them."""
        running = [process.popen for process in self.processes if process.popen is not None]
        return _All(running) if running else None

    def start(self) -> Self:
        """Start all, side by side; returns when they listen."""
        with ThreadPoolExecutor() as threads:
            list(threads.map(Process.start, self.processes))
        return self

    def kill(self) -> None:
        """End all at once, as a crash would."""
        for process in self.processes:
            process.kill()

    def stop(self) -> int:
        """End all as an operator would; returns the highest exit code."""
        self.send(signal.SIGTERM)
        return max(process.wait() for process in self.processes)

    def send(self, number: int) -> None:
        """Send all a signal."""
        for process in self.processes:
            process.send(number)

    def __enter__(self) -> Self:
        self._thread.start()
        self._there(self.balancer.serve(listening()))
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.send(signal.SIGTERM)
        for process in self.processes:
            process.__exit__(kind, error, at)
        self._there(self.balancer.end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _there(self, work: Coroutine[Any, Any, None]) -> None:
        """Have the balancer's own loop do something, and wait for it."""
        asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)


class _All:
    """Several processes that take signals together."""

    def __init__(self, popens: list["subprocess.Popen[str]"]) -> None:
        self._popens = popens

    def send_signal(self, number: int) -> None:
        """Send each a signal."""
        for popen in self._popens:
            popen.send_signal(number)


def _open() -> dict[str, Any]:
    """What a server with nothing configured allows, with one key for all, since guests of one are guests of all."""
    chosen: dict[str, Any] = {name: dict(section) for name, section in TRY_OUT.items()}
    chosen["client"]["token"] = {"hmac_secret_key": SECRET}
    chosen["admin"]["password"] = "what one server would make up and print"
    return chosen
