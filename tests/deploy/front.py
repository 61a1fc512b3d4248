"""nginx as ``deploy/nginx.conf`` has it, in front of whatever listens here; run as an ordinary user."""

import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ports import free_port
from redis_server import wait_until
from support import PATIENCE_S, ROOT

CONFIG = ROOT / "deploy" / "nginx.conf"
SERVERS = ("waterspout-1:8000", "waterspout-2:8000")
"""Who stands behind it in the file."""


def program(name: str, package: str) -> str:
    """The path of a program of the system, installed now if it is not there; raises if it cannot be."""
    search = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    if shutil.which(name, path=search) is None:
        subprocess.run(["sh", str(ROOT / "tests" / "sdk" / "install.sh"), package], check=True)
    found = shutil.which(name, path=search)
    assert found is not None, f"{package} is installed, and {name} is not there"
    return found


def replaced(text: str, changes: Mapping[str, str]) -> str:
    """``text`` with other words in some places; a word that is not there is a mistake of the test."""
    for before, after in changes.items():
        assert before in text, f"expected {before!r} in the file"
        text = text.replace(before, after)
    return text


def ordinary() -> int | None:
    """Whom to run as: nobody, if we are root; ``None`` for whoever we are."""
    return pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else None


class Front:
    """A running nginx."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port

    @property
    def url(self) -> str:
        """Where WebSocket clients connect."""
        return f"ws://127.0.0.1:{self.port}/connection/websocket"

    @property
    def http(self) -> str:
        """Where browsers go."""
        return f"http://127.0.0.1:{self.port}"

    def complaints(self) -> list[str]:
        """What it wrote to its error log, but that this user may not open so many files."""
        lines = (self.folder / "error.log").read_text().splitlines()
        return [line for line in lines if not re.search("open file resource limit|setrlimit", line)]

    def seen(self) -> str:
        """Its access log, and the other one."""
        return (self.folder / "access.log").read_text() + (self.folder / "error.log").read_text()


def write_config(folder: Path, port: int, servers: Sequence[int]) -> Path:
    """The file as it is shipped, but for addresses and for where it may write."""
    names = {name: f"127.0.0.1:{server}" for name, server in zip(SERVERS, servers, strict=True)}
    places = {"/tmp/nginx": f"{folder}/nginx", "/dev/stdout": f"{folder}/access.log"}
    file = folder / "nginx.conf"
    file.write_text(replaced(CONFIG.read_text(), {**names, "listen 8080;": f"listen 127.0.0.1:{port};", **places}))
    return file


@contextmanager
def fronting(servers: Sequence[int]) -> Iterator[Front]:
    """nginx in front of two ports of 127.0.0.1, listening, and gone in the end."""
    nginx = program("nginx", "nginx-light")
    with tempfile.TemporaryDirectory(prefix="waterspout-nginx-") as name:
        folder = Path(name)
        front = Front(folder, free_port())
        command = [nginx, "-p", name, "-e", "stderr", "-c", str(write_config(folder, front.port, servers))]
        user = ordinary()
        if user is not None:
            os.chown(folder, user, -1)
        with (folder / "error.log").open("w") as log:
            tried = subprocess.run([*command, "-t"], user=user, capture_output=True, text=True, check=False)
            assert tried.returncode == 0, tried.stderr
            with subprocess.Popen([*command, "-g", "daemon off;"], user=user, stdout=log, stderr=log) as process:
                try:
                    wait_until(lambda: _listens(front.port) or process.poll() is not None, "nginx to listen")
                    assert process.poll() is None, (folder / "error.log").read_text()
                    yield front
                finally:
                    process.send_signal(signal.SIGTERM)
                    process.wait(PATIENCE_S)


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0
