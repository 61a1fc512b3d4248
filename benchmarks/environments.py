"""Where the peers live: a virtual environment or ``node_modules`` each under ``.envs``, and two programs from C.

Our own environment stays as it is.  What is there already is used again, unless
other packages are wanted by now.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.peers import BARE, Peer

HERE = Path(__file__).parent
ROOT = HERE.parent
ENVS = HERE / ".envs"
SERVERS = HERE / "servers"
BIN = ENVS / "bin"
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input", "install")


class Missing(Exception):
    """Something cannot be had on this machine; the message says what and why, for a reader of the table."""


def _carry_out(*command: str, cwd: Path | None = None) -> None:
    try:
        subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise Missing(f"there is no {command[0]}") from None
    except subprocess.CalledProcessError as error:
        told = (error.stderr or error.stdout).strip().splitlines() or ["it said nothing"]
        raise Missing(f"{' '.join(command[-3:])} failed: {told[-1]}") from None


def compiler() -> str | None:
    """The C compiler, ``None`` if there is none."""
    return shutil.which("cc") or shutil.which("gcc")


def compile_c(name: str) -> Path | None:
    """A program from ``NAME.c``, newer than that; ``None`` if there is no compiler.  Raises ``Missing``."""
    cc = compiler()
    if cc is None:
        return None
    source, program = HERE / f"{name}.c", BIN / name
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        BIN.mkdir(parents=True, exist_ok=True)
        made = program.with_name(f"{name}.{os.getpid()}")
        _carry_out(cc, "-O2", "-o", str(made), str(source))
        made.replace(program)
    return program


def install(peer: Peer) -> None:
    """Make what the peer needs, unless it is there.  Raises ``Missing``."""
    if not peer.environment:
        return
    if peer.kind == "npm" and shutil.which("node") is None:
        raise Missing("there is no node")
    folder = ENVS / peer.environment
    made_for = folder / "made-for"
    wanted = " ".join((sys.version.split()[0], *peer.packages))
    if made_for.exists() and made_for.read_text() == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    print(f"installing {', '.join(peer.packages)} …", file=sys.stderr, flush=True)
    folder.mkdir(parents=True)
    match peer.kind:
        case "npm":
            (folder / "package.json").write_text('{"private": true}\n')
            _carry_out("npm", "install", "--silent", "--no-audit", "--no-fund", *peer.packages, cwd=folder)
        case "beside":  # beside the packages of our own environment, from where it is started
            _carry_out(sys.executable, *PIP, "--target", str(folder), *peer.packages)
        case _:
            _carry_out(sys.executable, "-m", "venv", str(folder))
            _carry_out(str(folder / "bin" / "python"), *PIP, *peer.packages)
    made_for.write_text(wanted)


def python_of(peer: Peer) -> str:
    """The interpreter that the peer runs on."""
    return (
        str(ENVS / peer.environment / "bin" / "python") if peer.kind == "pip" and peer.environment else sys.executable
    )


def version_of(peer: Peer) -> str:
    """What is installed, in words: ``tornado 6.5, Python 3.11.2``."""
    if peer.name == BARE:
        return "C" if compiler() else f"Python {sys.version.split()[0]}"
    names = [package.partition("[")[0] for package in peer.packages]
    if peer.kind == "npm":
        folder = ENVS / peer.environment / "node_modules"
        found = [f"{name} {json.loads((folder / name / 'package.json').read_text())['version']}" for name in names]
        node = subprocess.run(["node", "--version"], check=True, capture_output=True, text=True).stdout.strip()
        return ", ".join([*found, f"Node {node.removeprefix('v')}"])
    if peer.ours:
        names = ["tornado", "msgspec", *names]
    script = (
        "import sys, platform; from importlib.metadata import version; "
        "print(', '.join([f'{n} {version(n)}' for n in sys.argv[1:]] + [f'Python {platform.python_version()}']))"
    )
    path = {"PYTHONPATH": str(ENVS / peer.environment)} if peer.kind == "beside" else {}
    command = [python_of(peer), "-c", script, *names]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **path})
    return answer.stdout.strip()
