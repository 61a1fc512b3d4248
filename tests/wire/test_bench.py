"""The benchmark measures what it says: the smallest run there is, and a load generator that nothing escapes."""

import asyncio
import json
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from support import ROOT
from websockets.asyncio.server import ServerConnection, serve

from benchmarks.bench import prepare
from benchmarks.peers import CENTRIFUGE, PLAIN

PATIENCE_S = 120.0
GENERATORS = {"chosen": prepare().load, "python": (sys.executable, str(ROOT / "benchmarks" / "load.py"))}


async def carried_out(*command: str, env: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    """Run a program in our checkout; returns its exit code and what it said."""
    program = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, env=env, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(PATIENCE_S):
            out, err = await program.communicate()
    finally:
        if program.returncode is None:
            program.kill()
            await program.wait()
    assert program.returncode is not None
    return program.returncode, out.decode(), err.decode()


# --- the load generator ----------------------------------------------------------
class Forger:
    """A server that brings one message of ten, never the last, in another way than it should."""

    def __init__(self, wrong: str) -> None:
        self.wrong = wrong
        self.port = 0
        self.count = self.wronged = 0

    async def serve_one(self, client: ServerConnection) -> None:
        """Echo, but for what is wrong."""
        await client.send("ready")
        async for message in client:
            self.count += 1
            if self.count % 10 != 5:
                await client.send(message)
                continue
            self.wronged += 1
            match self.wrong:
                case "nothing":
                    await client.send(message)
                case "repeat":
                    await client.send(message)
                    await client.send(message)
                case "join":
                    await client.send(f"{message!s}\n{message!s}")
                case "fragment":
                    await client.send([str(message)[:20], str(message)[20:]])
                case "close":
                    await client.close(3008, "enough")


@asynccontextmanager
async def forging(wrong: str) -> AsyncIterator[Forger]:
    """Such a server."""
    forger = Forger(wrong)
    # The generator answers no goodbye, and nothing is learned by waiting for it.
    async with serve(forger.serve_one, "127.0.0.1", 0, compression=None, close_timeout=0.5) as server:
        forger.port = next(iter(server.sockets)).getsockname()[1]
        yield forger


async def load(generator: str, port: int, *more: str) -> tuple[int, dict[str, Any], str]:
    """Run a generator for a moment; returns its exit code, its result, and what it said beside."""
    options = [f"{name}={value}" for name, value in PLAIN.arguments.items()]
    common = [
        f"port={port}",
        "warm=0",
        "seconds=0.3",
        "flight=0",
        "rate=200",
        "patience=15",
        *PLAIN.script,
        *options,
        *more,
    ]
    code, out, err = await carried_out(*GENERATORS[generator], *common)
    return code, json.loads(out) if out else {}, err


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize(
    ("wrong", "shown"),
    [("nothing", ()), ("lose", ("lost",)), ("repeat", ("repeated",)), ("join", ("repeated",))],
)
async def test_the_generator_counts_what_went_wrong(generator: str, wrong: str, shown: Sequence[str]) -> None:
    """Each publication that is lost or repeated is counted as that, also if it shares a frame."""
    async with forging(wrong) as forger:
        code, result, err = await load(generator, forger.port)
        assert code == 0, err
        window = result["windows"][0]
        assert window["published"] == forger.count > 10
        for name in ("lost", "repeated"):
            assert result[name] == (forger.wronged if name in shown else 0), name
        assert result["gone"] == result["broken"] == result["refused"] == 0
        assert window["deliveries"] <= forger.count - (forger.wronged if wrong == "lose" else 0)
        assert 0 < window["p50_ms"] <= window["p99_ms"] <= window["max_ms"]


@pytest.mark.parametrize("generator", GENERATORS)
async def test_the_generator_sees_what_it_does_not_understand(generator: str) -> None:
    """Frames that no server here has a reason to send are counted as broken, and their publications as lost."""
    async with forging("fragment") as forger:
        code, result, err = await load(generator, forger.port)
        assert code == 0, err
        assert result["broken"] > forger.wronged > 0
        assert result["lost"] == forger.wronged


@pytest.mark.parametrize("generator", GENERATORS)
async def test_the_generator_notices_the_end_of_a_connection(generator: str) -> None:
    """A connection that the server closes is counted, and what it did not get is lost."""
    async with forging("close") as forger:
        code, result, err = await load(generator, forger.port, "patience=1")
        assert code == 0, err
        assert result["gone"] == 1
        assert result["lost"] > 0


@pytest.mark.parametrize("generator", GENERATORS)
async def test_the_generator_wants_a_websocket(generator: str) -> None:
    """A server that answers the handshake with anything but a proper 101 makes the run fail, and is quoted."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 101 Fine\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: of+somebody+else=\r\n\r\n")
        await writer.drain()
        with suppress(ConnectionResetError):
            await reader.read()
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    async with server:
        code, result, err = await load(generator, server.sockets[0].getsockname()[1])
    assert code != 0
    assert not result
    assert "of+somebody+else" in err


# --- the whole of it ---------------------------------------------------------------
async def bench(folder: Path, *arguments: str) -> tuple[str, list[dict[str, Any]]]:
    """The smallest run: its tables, and its rounds."""
    small = ("--rounds", "1", "--seconds", "0.2", "--scale", "0.02", "--no-png", "--output", str(folder))
    code, out, err = await carried_out(sys.executable, "-m", "benchmarks.bench", *small, *arguments)
    assert code == 0, err
    text = (folder / "bench.md").read_text()
    assert text in out
    return text, [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def rows(text: str) -> list[list[str]]:
    """The cells of all tables of a page, without their rules."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not re.match(r"\|[-: |]*$", line)]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


async def test_the_smallest_bench_makes_a_table_and_a_picture(tmp_path: Path) -> None:
    """One run measures the bare loop and our server; its page has machine, figures, ratios and versions."""
    text, rounds = await bench(tmp_path, "--works", "W1,W6,W3", "--peers", "bare,waterspout")
    assert [(one["work"], one["peer"]) for one in rounds] == [
        (work, peer) for work in ("W1", "W6", "W3") for peer in ("bare", "waterspout")
    ]
    for one in rounds:
        assert not any(one["counted"][name] for name in ("lost", "repeated", "gone", "broken", "refused")), one
    assert all(one["counted"]["windows"][0]["deliveries"] for one in rounds if one["work"] != "W3")
    headings, bare, ours = rows(text)[:3]
    assert headings == ["server", "W1 µs (×)", "W6 µs (×)", "W3 KB", "W3 connect µs"]
    assert (bare[0], ours[0]) == ("bare send loop", "Waterspout")
    for cell in (*bare[3:], *ours[3:]):
        assert re.fullmatch(r"[-\d,.]+", cell), f"{cell!r} is no number"
    for cell in (*bare[1:3], *ours[1:3]):
        assert re.fullmatch(r"[\d,.]+( \([\d,.]+\))?", cell), f"{cell!r} is no figure with its ratio"
    assert re.search(r"\d+ cores, .*Linux .*medians", text)
    assert re.search(r"^\* Waterspout: tornado \d.*Python 3", text, re.MULTILINE)
    assert "W1: CPU per delivery" in (tmp_path / "bench.txt").read_text()


async def test_what_only_we_do_is_measured_too(tmp_path: Path) -> None:
    """Kept and acknowledged publications, a slow reader, and a recovery beside live subscribers: nothing is lost."""
    text, rounds = await bench(tmp_path, "--works", "K1,K5,slow,recovery", "--peers", "waterspout")
    found = {one["work"]: one["counted"] for one in rounds}
    assert list(found) == ["K1", "K5", "slow", "recovery"], text
    for name, counted in found.items():
        assert counted["lost"] == counted["repeated"] == counted["gone"] == counted["refused"] == 0, name
    assert found["K5"]["windows"][0]["acks"] > 0
    assert found["K5"]["unacknowledged"] == 0
    assert len(found["slow"]["windows"]) == len(found["recovery"]["windows"]) == 2
    assert found["recovery"]["caught_up_s"] > 0


async def test_two_processes_are_measured_together(tmp_path: Path) -> None:
    """What one process publishes reaches the clients of another through Redis, whose CPU time counts with theirs."""
    text, rounds = await bench(tmp_path, "--works", "cross", "--peers", "waterspout")
    (one,) = rounds
    assert len(one["counted"]["windows"][0]["cpu_by"]) == 3, "two servers and Redis"
    assert one["counted"]["windows"][0]["deliveries"] > 0
    assert one["counted"]["lost"] == one["counted"]["gone"] == 0, text


async def test_a_bare_machine_does(tmp_path: Path) -> None:
    """Without a compiler and without Node the rest is measured, by Python, and the page says so."""
    small = ("--rounds", "1", "--seconds", "0.2", "--scale", "0.01", "--no-png", "--output", str(tmp_path / "out"))
    command = (
        sys.executable,
        "-m",
        "benchmarks.bench",
        *small,
        "--works",
        "W1",
        "--peers",
        "bare,waterspout,socket.io",
    )
    code, out, err = await carried_out(*command, env={"PATH": str(tmp_path)})
    assert code == 0, err
    assert "* Socket.IO on Node was not measured: there is no node" in out
    assert "in Python, for there is no compiler" in out
    assert [row[0] for row in rows(out)[:3]] == ["server", "bare send loop", "Waterspout"]


async def test_a_profile_names_functions(tmp_path: Path) -> None:
    """A server that looks at itself tells which of its functions take the time, as a table and as an SVG."""
    small = ("--itself", "--seconds", "1", "--scale", "0.05", "--output", str(tmp_path))
    code, out, err = await carried_out(sys.executable, "-m", "benchmarks.hotspots", "--work", "W6", *small)
    assert code == 0, err
    assert rows(out)[0] == ["function", "% itself", "% with what it calls"]
    assert "(handlers/" in out
    assert ET.parse(tmp_path / "flame-W6.svg").getroot().tag.endswith("svg")


def test_every_script_of_ours_ends_subscribed() -> None:
    """Each role's script in our dialect begins with connect, and those who listen end with a subscription."""
    by_role: dict[str, list[str]] = {}
    for step in CENTRIFUGE.script:
        role, _, text = step.rpartition("say=") if "say=" in step else step.rpartition("hear=")
        by_role.setdefault(role, []).append(text)
    assert set(by_role) == {"", "publisher_", "returner_"}
    assert all(steps[1] == '"connect":{' for steps in by_role.values())
    assert by_role[""][-1] == by_role["returner_"][-1] == '"subscribe":{'
