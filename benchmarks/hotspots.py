"""Where our server's time goes in one work: ``make profile WORK=W6``.

    python -m benchmarks.hotspots --work W6 [--seconds 5] [--native] [--under NAME] [--output FOLDER]

py-spy looks on from outside, in an environment of its own; where it cannot be had
or may not look, the server looks at itself (``servers/ours.py``).  Prints the
functions that take most, and draws a flame graph.  For a work that is about
connecting the connecting is looked at, for all others what comes after it.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from benchmarks import environments, processes, stacks
from benchmarks.bench import CONFIG, WARM_S, command_of, prepare
from benchmarks.environments import ENVS, HERE, Missing
from benchmarks.peers import OURS, PEERS, Peer
from benchmarks.processes import Failed, Server
from benchmarks.stacks import Stacks
from benchmarks.works import WORKS, Work

SPY = Peer("py-spy", "py-spy", (), environment="py-spy", packages=("py-spy",))
RATE = 400
PATIENCE_S = 60.0


class Onlooker:
    """Somebody who samples the stack of a server from ``begin`` to ``end``."""

    def begin(self, server: Server) -> None:
        """Look from now on; raises ``Missing``."""
        raise NotImplementedError

    def end(self, server: Server) -> Stacks:
        """What was seen; raises ``Missing``."""
        raise NotImplementedError

    def close(self) -> None:
        """Look no more, whatever was seen."""


class Spy(Onlooker):
    """py-spy.  It needs the right to look into other processes: root's, or ``kernel.yama.ptrace_scope=0``."""

    def __init__(self, folder: Path, core: int, *, native: bool) -> None:
        environments.install(SPY)
        self._program = ENVS / SPY.environment / "bin" / "py-spy"
        self._path = folder / "stacks"
        self._core = core
        self._native = ["--native"] if native else []
        self._popen: subprocess.Popen[str] | None = None

    def begin(self, server: Server) -> None:
        """See ``Onlooker``."""
        command = [str(self._program), "record", "--pid", str(server.pids[0]), "--rate", str(RATE), "--format", "raw"]
        command += ["--output", str(self._path), *self._native]
        self._popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        os.sched_setaffinity(self._popen.pid, {self._core})
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            if "Sampling process" in line:
                return
        raise Missing("py-spy may not look at another process")

    def end(self, server: Server) -> Stacks:
        """See ``Onlooker``."""
        assert self._popen is not None
        self._popen.send_signal(signal.SIGINT)
        self._popen.communicate(timeout=PATIENCE_S)
        return stacks.parse(self._path.read_text())

    def close(self) -> None:
        """See ``Onlooker``."""
        if self._popen is not None:
            _end(self._popen)


class Mirror(Onlooker):
    """The server itself."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self, server: Server) -> None:
        """See ``Onlooker``."""
        os.kill(server.pids[0], signal.SIGUSR1)

    def end(self, server: Server) -> Stacks:
        """See ``Onlooker``."""
        os.kill(server.pids[0], signal.SIGUSR2)
        until = time.monotonic() + PATIENCE_S
        while not self._path.exists():
            if time.monotonic() > until:
                raise Missing("the server has written no samples")
            time.sleep(0.05)
        return stacks.parse(self._path.read_text())


def _end(popen: "subprocess.Popen[str]") -> None:
    if popen.poll() is None:
        popen.kill()
    popen.wait()


def profile(work: Work, seconds: float, *, spy: bool, native: bool) -> Stacks:
    """Do a work to our server, and look; raises ``Missing`` and ``Failed``."""
    tools = prepare()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="waterspout-profile-")))
        config, samples = folder / "config.toml", folder / "samples"
        config.write_text(CONFIG.format(folder=folder))
        port = processes.free_port()
        peer = PEERS[OURS]
        onlooker: Onlooker = Spy(folder, tools.cores.load, native=native) if spy else Mirror(samples)
        stack.callback(onlooker.close)
        if not spy:
            itself = ("{ours}", "{servers}/ours.py", "--samples", str(samples), "--", *peer.command[2:])
            peer = replace(peer, command=itself)
        command, env = command_of(peer, tools, port, config)
        server = stack.enter_context(Server(command, env, tools.cores.server, port, folder / "server.log"))
        connecting = work.kind == "connection"
        if connecting:
            onlooker.begin(server)
        options: dict[str, object] = {
            "port": port,
            "channel": "kept:" if work.kept else "passing:",
            "announce": 1,
            "warm": 0 if connecting else WARM_S,
            "seconds": 0.1 if connecting else seconds * work.length,
            "spin": int(tools.cores.apart),
            **peer.dialect.arguments,
            **(peer.dialect.ack if work.acks else {}),
            **work.load,
        }
        arguments = [f"{name}={value}" for name, value in options.items()]
        load = subprocess.Popen(
            [*tools.load, *arguments, *peer.dialect.script],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        stack.callback(_end, load)
        os.sched_setaffinity(load.pid, {tools.cores.load})
        assert load.stderr is not None
        said = []
        for line in load.stderr:
            said.append(line)
            if line == "begin\n":
                break
        if not connecting and load.poll() is None:
            onlooker.begin(server)
        said.append(load.communicate()[1])
        if load.returncode:
            raise Failed("".join(said).strip())
        return onlooker.end(server)


def main(argv: Sequence[str]) -> int:
    """Look, and show what was seen; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make profile", description="Where our server's time goes.")
    parser.add_argument("--work", default="W6", choices=[name for name in WORKS if not WORKS[name].together])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--native", action="store_true", help="show C functions, too (py-spy only)")
    parser.add_argument("--itself", action="store_true", help="do without py-spy")
    parser.add_argument("--under", metavar="NAME", help="show what happens below a function")
    parser.add_argument("--scale", type=float, default=1.0, help="so many times the usual clients")
    parser.add_argument("--output", type=Path, default=HERE / "results", metavar="FOLDER")
    arguments = parser.parse_args(argv)
    work = WORKS[arguments.work].scaled(arguments.scale)
    try:
        try:
            seen = profile(work, arguments.seconds, spy=not arguments.itself, native=arguments.native)
        except Missing as missing:
            print(f"{missing}; the server looks at itself", file=sys.stderr)
            seen = profile(work, arguments.seconds, spy=False, native=False)
    except (Missing, Failed) as failed:
        print(failed, file=sys.stderr)
        return 1
    if not seen:
        print("nothing was seen", file=sys.stderr)
        return 1
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"flame-{work.name}.svg"
    path.write_text(stacks.flame(seen, f"{work.name}: {work.what}"))
    print(f"{work.name}: {work.what}\n\n{stacks.top(seen, 25)}\n")
    if arguments.under:
        print(f"Below {arguments.under}:\n\n{stacks.under(seen, arguments.under)}\n")
    print(f"{sum(seen.values())} samples; {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
