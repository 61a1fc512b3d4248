"""What ``pip wheel`` packs runs without the source beside it: pages, types and documents included."""

import asyncio
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT
from tornado.httpclient import AsyncHTTPClient


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The contents of the wheel, as an installer lays them out."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "run.py"):
        shutil.copy(ROOT / name, source)
    for name in ("server", "handlers", "static", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pack = "from setuptools.build_meta import build_wheel; import sys; print(build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", pack, folder], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(folder / done.stdout.split()[-1]) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


@pytest.fixture(scope="module")
def address(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the installed server listens, started in a folder of its own."""
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "run", "--port", "0"],
        cwd=tmp_path_factory.mktemp("cwd"),
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[-1].rstrip("/")
        finally:
            process.terminate()


def test_nothing_but_what_it_needs_is_packed(installed: Path) -> None:
    """Every page and document is there as it is in the source, and no test."""
    for folder, place in (("static", "static"), ("docs", "server/docs")):
        packed = {path.name: path.read_bytes() for path in (installed / place).iterdir()}
        assert packed == {path.name: path.read_bytes() for path in (ROOT / folder).iterdir() if path.is_file()}
    assert not {"tests", "benchmarks", "examples"} & {path.name for path in installed.iterdir()}


async def test_an_installed_server_serves_its_pages(address: str) -> None:
    """Pages, the browser's client with its types, and the documents come as from the source; the engine does not."""
    files = {
        "/": "static/index.html",
        "/chat": "static/chat.html",
        "/arena": "static/arena.html",
        "/static/client.js": "static/client.js",
        "/static/client.d.ts": "static/client.d.ts",
        "/server/PROTOCOL.md": "server/PROTOCOL.md",
        **{f"/docs/{path.name}": f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")},
    }
    fetch = AsyncHTTPClient().fetch
    for path, name in files.items():
        assert (await fetch(address + path)).body == (ROOT / name).read_bytes(), path
    readme = (await fetch(f"{address}/README.md")).body.decode()
    assert readme.strip() == (ROOT / "README.md").read_text().strip()
    assert (await fetch(f"{address}/README.md", method="HEAD")).body == b""
    missing = ("/docs/none.md", "/server/app.py", "/server/docs/hooks.md", "/run.py")
    answers = await asyncio.gather(*(fetch(address + path, raise_error=False) for path in missing))
    assert [answer.code for answer in answers] == [404] * len(missing)
