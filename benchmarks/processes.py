"""Servers and the load generator as processes: each pinned to a core, counted, and ended by its own id.

Linux only: the figures come from ``/proc``.
"""

import contextlib
import ctypes
import json
import os
import platform
import random
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

START_S = 30.0
END_S = 10.0
LOOK_S = 0.02


class Failed(Exception):
    """A server or the load generator did not do its part; the message has its own words."""


class Cores(NamedTuple):
    """Where the server and the load run; the same where there is only one."""

    server: int
    load: int

    @property
    def apart(self) -> bool:
        """Do they have a core each?"""
        return self.server != self.load


def choose_cores() -> Cores:
    """Two cores that we may use and that are not two threads of one, as far as there are such."""
    mine = sorted(os.sched_getaffinity(0))
    siblings = Path(f"/sys/devices/system/cpu/cpu{mine[0]}/topology/thread_siblings_list")
    shared = numbers(siblings.read_text()) if siblings.exists() else {mine[0]}
    others = [core for core in mine[1:] if core not in shared] or mine[1:] or mine
    return Cores(mine[0], others[0])


def numbers(text: str) -> set[int]:
    """What the kernel means by a list such as ``0,4-6``."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def machine() -> dict[str, Any]:
    """What it is measured on."""
    cpu = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": cpu, "cores": os.cpu_count() or 1, "memory_gb": round(memory, 1), "kernel": platform.release()}


def free_port() -> int:
    """A port that nobody listens on now; not one of those from 32768 up, which the system lends to whoever asks."""
    while True:
        port = random.randrange(12_000, 20_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", port))
            return port


def memory_mb(pid: int) -> float:
    """What a process holds now."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def waited_s(pid: int) -> float:
    """How long the threads of a process have been ready to run and had no core, so far."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[1]) for task in tasks) / 1e9


def tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for one in found:
        for children in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:
                continue  # it has ended
    return found


class Server:
    """A server that answers on ``port``; use it in ``with``.

    Raises ``Failed`` if it does not answer within ``START_S``: one that listens may
    still be busy with opening its files.  What it prints is in ``log``.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], core: int, port: int, log: Path) -> None:
        self.port = port
        self._log = log
        with log.open("wb") as output:
            self._popen = subprocess.Popen(
                command,
                env={**os.environ, **env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=log.parent,
                preexec_fn=lambda: _settle(core),
            )
        try:
            self._wait()
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def pids(self) -> list[int]:
        """Its processes."""
        return tree(self._popen.pid)

    def _wait(self) -> None:
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            if self._popen.poll() is not None:
                break
            try:
                with socket.create_connection(("127.0.0.1", self.port), START_S) as sock:
                    sock.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
                    if sock.recv(1):
                        return
            except OSError:
                pass  # not yet
            time.sleep(LOOK_S)
        raise Failed(f"it does not answer: {self.words}")

    @property
    def words(self) -> str:
        """The end of what it has printed."""
        return self._log.read_text(errors="replace").strip()[-1000:]

    def end(self) -> None:
        """End it, and what descends from it."""
        pids = self.pids if self._popen.poll() is None else []
        if pids:
            self._popen.terminate()
            try:
                self._popen.wait(END_S)
            except subprocess.TimeoutExpired:
                self._popen.kill()
        for pid in pids[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._popen.wait()


_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def _settle(core: int) -> None:
    """In the child, before its program: go to its core, take as many files as there may be, and end when we do."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.sched_setaffinity(0, {core})
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def run_load(command: Sequence[str], core: int, patience_s: float) -> dict[str, Any]:
    """The load generator's result; raises ``Failed`` with its own words, or when it takes too long."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=patience_s, preexec_fn=lambda: _settle(core), check=False
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"the load generator was not done within {patience_s:.0f} s") from None
    if done.returncode:
        raise Failed(done.stderr.strip()[-500:] or f"the load generator ended with {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout)
    result["words"] = done.stderr.strip()[-500:]
    return result
