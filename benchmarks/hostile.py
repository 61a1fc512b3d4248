"""What a well-behaved client notices of hostile ones, and what memory those cost: ``make hostile SECONDS=5``.

One server with its default limits, one neighbour who publishes into a kept channel
and waits for each publication to come back, and one kind of offender after the other,
each in a process of its own.  The table says what offenders were told, and the
neighbour's times alone and beside them; whatever it loses is listed.  That limits
hold is for tests/wire/test_hostile.py to say; how much they spare others is
measured here, since that depends on the machine.

The server has a core to itself; offenders share the other one with the neighbour, and
are of lower priority, so that it is not their work that makes it wait.  The last
column says for what part of the time the server was ready to go on and had no core,
since other programs had it: where that is much, the neighbour's times are theirs.
"""

import argparse
import asyncio
import base64
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.bare import HANDSHAKE, command, frame
from benchmarks.figures import table
from benchmarks.processes import Server, choose_cores, free_port, memory_mb, waited_s

ROOT = Path(__file__).parent.parent
KB, MB = 1024, 1024 * 1024
PAUSE_S = 0.005
"""Between two publications of the neighbour."""

_OPEN = "\n".join(
    f"allow_{deed}_for_{who} = true"
    for deed in ("subscribe", "publish", "history", "presence")
    for who in ("client", "anonymous")
)
CONFIG = f"""\
[client]
allow_anonymous_connect_without_token = true
token.hmac_secret_key = "a secret that is long enough for every HMAC"

[websocket]
compression = true

[sqlite]
path = "{{folder}}/history.db"

[[channel.namespaces]]
name = "kept"
history_size = 1000
history_ttl = "1h"
force_recovery = true
{_OPEN}

[[channel.namespaces]]
name = "passing"
presence = true
join_leave = true
{_OPEN}
"""
"""Every limit is as it comes."""


class Told(NamedTuple):
    """What a neighbour has seen: its times in ms, and what it lost."""

    heard: int
    p50_ms: float
    p99_ms: float
    most_ms: float
    lost: int


class Line:
    """One connection of an offender."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, port: int, codes: Counter[str], headers: bytes = b"") -> "Line | None":
        """Shake hands; ``None`` if the door is shut, which is counted."""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HANDSHAKE + headers + b"\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
        except (OSError, asyncio.IncompleteReadError):
            codes["cut"] += 1
            return None
        status = head.split(b" ", 2)[1].decode()
        if status != "101":
            codes[f"HTTP {status}"] += 1
            writer.close()
            return None
        return cls(reader, writer)

    async def say(self, data: bytes) -> None:
        """Send, at the server's pace; a line that was cut says nothing."""
        with suppress(OSError):
            self.writer.write(data)
            await self.writer.drain()

    async def end(self, codes: Counter[str]) -> None:
        """Read up to the server's goodbye, and count its code."""
        try:
            while True:
                head = await self.reader.readexactly(2)
                size = head[1]
                if size > 125:
                    size = int.from_bytes(await self.reader.readexactly(2 if size == 126 else 8), "big")
                payload = await self.reader.readexactly(size)
                if head[0] == 0x88:
                    codes[str(int.from_bytes(payload[:2], "big"))] += 1
                    break
        except (OSError, asyncio.IncompleteReadError):
            codes["cut"] += 1
        self.writer.close()


# --- the neighbour --------------------------------------------------------------------------
HERE = "here"
"""What a neighbour prints once it has connected and subscribed; it begins when it is told so."""


async def neighbour(port: int, seconds: float) -> Told:
    """Publish and hear it, again and again."""
    line = await Line.open(port, Counter())
    assert line is not None, "the neighbour was not let in"
    await line.say(command(id=1, connect={}) + command(id=2, subscribe={"channel": "kept:neighbour"}))
    buffer = await _read_until(line, b"", b'{"id":2,"subscribe"')
    print(HERE, flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    times: list[float] = []
    number, heard, lost = 0, 0, 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        number += 1
        said_at = time.monotonic()
        await line.say(command(id=number + 2, publish={"channel": "kept:neighbour", "data": number}))
        try:
            async with asyncio.timeout(10):
                buffer = await _read_until(line, buffer, b'"data":%d,' % number, b'"data":%d}' % number)
            heard += 1
        except TimeoutError:
            lost += 1
            print(f"publication {number} did not come; the last that did: {buffer[-300:]!r}", file=sys.stderr)
        times.append((time.monotonic() - said_at) * 1000)
        await asyncio.sleep(PAUSE_S)
    line.writer.close()
    times.sort()
    return Told(heard, times[len(times) // 2], times[min(len(times) - 1, int(len(times) * 0.99))], times[-1], lost)


async def _read_until(line: Line, buffer: bytes, *wanted: bytes) -> bytes:
    """Read until one of these has come, and answer pings; the end of all that came."""
    while not any(one in buffer for one in wanted):
        data = await line.reader.read(65_536)
        if not data:
            raise ConnectionError(f"the neighbour was cut off behind {buffer[-300:]!r}")
        if b'"error":' in data:
            raise ConnectionError(f"the neighbour was refused: {data[-300:]!r}")
        buffer = buffer[-4096:] + data
        if b"\x81\x02{}" in data:
            await line.say(frame(0x81, b"{}"))
    return buffer


# --- offenders --------------------------------------------------------------------------------
Offence = Callable[[int, float, Counter[str]], Awaitable[None]]


async def _again(
    port: int, until: float, codes: Counter[str], said: bytes, *, at_once: int, headers: bytes = b""
) -> None:
    """Come, say that, hear what one gets, and come again; several at once."""

    async def one() -> None:
        while time.monotonic() < until:
            line = await Line.open(port, codes, headers)
            if line is None:
                await asyncio.sleep(0.02)
                continue
            pouring = asyncio.create_task(line.say(said))
            try:
                async with asyncio.timeout(max(0.1, until - time.monotonic())):
                    await line.end(codes)
            except TimeoutError:
                codes["still there"] += 1
            pouring.cancel()
            line.writer.transport.abort()

    await asyncio.gather(*(one() for _ in range(at_once)))


async def _stopped(port: int, until: float, codes: Counter[str], step: int) -> None:
    """Subscribers of a busy channel of whom nobody reads, or only ``step`` bytes now and then."""
    lines = []
    for _ in range(20):
        line = await Line.open(port, codes)
        if line is not None:
            line.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await line.say(command(id=1, connect={}) + command(id=2, subscribe={"channel": "passing:busy"}))
            lines.append(line)
    writer = await Line.open(port, codes)
    assert writer is not None
    await writer.say(command(id=1, connect={}))
    number = 1
    while time.monotonic() < until:
        number += 1
        await writer.say(command(id=number, publish={"channel": "passing:busy", "data": "x" * 16_000}))
        await asyncio.sleep(0.01)
        if step:
            for line in lines:
                line.writer.transport.resume_reading()  # type: ignore[attr-defined]
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.001):
                        await line.reader.read(step)
                line.writer.transport.pause_reading()  # type: ignore[attr-defined]
    for line in lines:
        line.writer.transport.resume_reading()  # type: ignore[attr-defined]
        with suppress(TimeoutError):
            async with asyncio.timeout(2):
                await line.end(codes)
        line.writer.transport.abort()
    writer.writer.transport.abort()


async def stopped(port: int, until: float, codes: Counter[str]) -> None:
    """20 subscribers of 1.6 MB a second who read nothing."""
    await _stopped(port, until, codes, 0)


async def sipping(port: int, until: float, codes: Counter[str]) -> None:
    """The same, reading a byte now and then."""
    await _stopped(port, until, codes, 1)


async def dripping(port: int, until: float, codes: Counter[str]) -> None:
    """300 clients who send a byte at a time."""
    lines = [line for _ in range(300) if (line := await Line.open(port, codes)) is not None]
    said = command(id=1, connect={}) + command(id=2, publish={"channel": "passing:1", "data": "x" * 10_000})
    at = 0
    while time.monotonic() < until:
        for line in lines:
            line.writer.write(said[at : at + 1])
        at += 1
        await asyncio.sleep(0.05)
    codes["still there"] += sum(not line.reader.at_eof() for line in lines)
    for line in lines:
        line.writer.transport.abort()


async def bombs(port: int, until: float, codes: Counter[str]) -> None:
    """60 KB that would be 60 MB, from 8 at once."""
    bomb = zlib.compress(bytes(60 * MB), 9)[2:-4][: 60 * KB]
    headers = b"Sec-WebSocket-Extensions: permessage-deflate\r\n"
    await _again(port, until, codes, frame(0xC1, bomb), at_once=8, headers=headers)


async def pings(port: int, until: float, codes: Counter[str]) -> None:
    """RFC 6455 pings without end, from 8 at once."""
    await _again(port, until, codes, command(id=1, connect={}) + frame(0x89, b"x") * 50_000, at_once=8)


async def commands(port: int, until: float, codes: Counter[str]) -> None:
    """Small commands without end, a frame for each, from 8 at once."""
    asked = b"".join(command(id=id, presence_stats={"channel": "passing:1"}) for id in range(2, 10_000))
    await _again(port, until, codes, command(id=1, connect={}) + asked, at_once=8)


async def publications(port: int, until: float, codes: Counter[str]) -> None:
    """Publications to a kept channel without end, 500 in a frame, from 8 at once."""
    said = [
        frame(
            0x81,
            b"\n".join(b'{"id":%d,"publish":{"channel":"kept:1","data":1}}' % id for id in range(at, at + 500)),
        )
        for at in range(2, 10_002, 500)
    ]
    await _again(port, until, codes, command(id=1, connect={}) + b"".join(said), at_once=8)


async def fragments(port: int, until: float, codes: Counter[str]) -> None:
    """Empty fragments of one message without end, from 8 at once."""
    await _again(port, until, codes, command(id=1, connect={}) + frame(0x01) + frame(0x00) * 200_000, at_once=8)


async def crowd(port: int, until: float, codes: Counter[str]) -> None:
    """Newcomers at four times ``client.connection_rate_limit``, as far as the load's core can."""

    async def come() -> None:
        line = await Line.open(port, codes)
        if line is not None:
            codes["101"] += 1
            line.writer.transport.abort()

    began, count = time.monotonic(), 0
    waiting: set[asyncio.Task[None]] = set()
    while (now := time.monotonic()) < until:
        while count < (now - began) * 2_000 and len(waiting) < 500:
            count += 1
            task = asyncio.create_task(come())
            waiting.add(task)
            task.add_done_callback(waiting.discard)
        await asyncio.sleep(0.005)
    await asyncio.gather(*waiting)


async def names(port: int, until: float, codes: Counter[str]) -> None:
    """100,000 subscriptions of channels that nobody else knows, of 800 clients, who stay."""
    lines = []
    for number in range(800):
        line = await Line.open(port, codes)
        if line is None:
            await asyncio.sleep(0.1)
            continue
        await asyncio.sleep(0.004)  # they keep to the rate at which newcomers are let in
        asked = b"\n".join(
            b'{"id":%d,"subscribe":{"channel":"passing:made-up-%d-%d"}}' % (at + 2, number, at) for at in range(125)
        )
        await line.say(command(id=1, connect={}) + frame(0x81, asked))
        line.writer.transport.pause_reading()  # type: ignore[attr-defined]
        lines.append(line)
    codes["subscriptions"] = 125 * len(lines)
    await asyncio.sleep(max(1.0, until - time.monotonic()))
    for line in lines:
        line.writer.transport.abort()


async def malformed(port: int, until: float, codes: Counter[str]) -> None:
    """Deep JSON, huge numbers, no UTF-8, from 8 at once."""
    said = (
        frame(0x81, b'{"id":1,"publish":{"channel":"a","data":' + b"[" * 25_000 + b"]" * 25_000 + b"}}"),
        frame(0x81, b'{"id":' + b"9" * 50_000 + b"}"),
        frame(0x81, b'{"id":1,"connect":{"data":"' + b"\xff" * 50_000 + b'"}}'),
        frame(0x82, b'{"id":1,"connect":{"data":"' + b"\xff" * 50_000 + b'"}}'),
    )
    await asyncio.gather(*(_again(port, until, codes, one, at_once=2) for one in said))


async def tokens(port: int, until: float, codes: Counter[str]) -> None:
    """Tokens without signature, with a huge key id, with a wrong signature, from 8 at once."""

    def part(said: Any) -> str:
        return base64.urlsafe_b64encode(json.dumps(said).encode()).rstrip(b"=").decode()

    bearers = (
        f"{part({'alg': 'none'})}.{part({'sub': '42'})}.",
        f"{part({'alg': 'HS256', 'kid': 'k' * 40_000})}.{part({'sub': '42'})}.eA",
        f"{part({'alg': 'HS256'})}.{part({'sub': '42', 'info': 'x' * 30_000})}.{part('wrong')}",
        "." * 50_000,
    )
    await asyncio.gather(
        *(_again(port, until, codes, command(id=1, connect={"token": one}), at_once=2) for one in bearers)
    )


OFFENCES: dict[str, Offence] = {
    one.__name__: one
    for one in (
        stopped,
        sipping,
        dripping,
        bombs,
        pings,
        commands,
        publications,
        fragments,
        crowd,
        malformed,
        tokens,
        names,
    )
}


# --- all together -----------------------------------------------------------------------------------
def _settle(core: int, niceness: int) -> None:
    os.sched_setaffinity(0, {core})
    os.nice(niceness)


def _start(role: str, port: int, seconds: float, core: int, niceness: int) -> "subprocess.Popen[str]":
    command = (
        sys.executable,
        "-m",
        "benchmarks.hostile",
        "--role",
        role,
        "--port",
        str(port),
        "--seconds",
        str(seconds),
    )
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: _settle(core, niceness),
    )


def _heard(popen: "subprocess.Popen[str]") -> Any:
    output, _ = popen.communicate()
    if popen.returncode:
        raise SystemExit(f"a part of the benchmark failed with {popen.returncode}")
    return json.loads(output)


def _wait_until_here(popen: "subprocess.Popen[str]") -> None:
    assert popen.stdout is not None
    if popen.stdout.readline().strip() != HERE:
        raise SystemExit(f"the neighbour failed with {popen.wait()}")


def _begin(popen: "subprocess.Popen[str]") -> None:
    assert popen.stdin is not None
    popen.stdin.write("\n")
    popen.stdin.flush()


def measure(name: str, seconds: float) -> Sequence[str]:
    """One offence against a server of its own; the row of the table."""
    cores, port = choose_cores(), free_port()
    with tempfile.TemporaryDirectory(prefix="waterspout-hostile-") as folder:
        config = Path(folder) / "config.toml"
        config.write_text(CONFIG.format(folder=folder))
        arguments = (sys.executable, str(ROOT / "run.py"), "--config", str(config), "--port", str(port))
        with Server(arguments, {}, cores.server, port, Path(folder) / "server.log") as server:
            alone = _start("neighbour", port, seconds, cores.load, 0)
            _wait_until_here(alone)
            _begin(alone)
            usual = Told(*_heard(alone))
            # It is there before they come: whether it would be let in beside them is not what is measured.
            watching = _start("neighbour", port, seconds, cores.load, 0)
            _wait_until_here(watching)
            before = most = memory_mb(server.pids[0])
            waited, began = waited_s(server.pids[0]), time.monotonic()
            offender = _start(name, port, seconds + 1, cores.load, 10)
            time.sleep(0.5)
            _begin(watching)
            while watching.poll() is None or offender.poll() is None:
                most = max(most, memory_mb(server.pids[0]))
                time.sleep(0.02)
            waited = (waited_s(server.pids[0]) - waited) / (time.monotonic() - began)
            beside, codes = Told(*_heard(watching)), _heard(offender)
    told = ", ".join(f"{code}: {count:,}" for code, count in sorted(codes.items())) or "nothing"
    return (
        (OFFENCES[name].__doc__ or "").strip().rstrip("."),
        told,
        f"{usual.p50_ms:.1f} / {usual.p99_ms:.1f}",
        f"{beside.p50_ms:.1f} / {beside.p99_ms:.1f}",
        f"{beside.most_ms:.0f}",
        str(usual.lost + beside.lost),
        f"{before:.0f} → {most:.0f}",
        f"{waited:.0%}",
    )


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="make hostile", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--only", default=",".join(OFFENCES), metavar="A,B", help=f"of {', '.join(OFFENCES)}")
    parser.add_argument("--role", choices=("neighbour", *OFFENCES), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role == "neighbour":
        print(json.dumps(asyncio.run(neighbour(arguments.port, arguments.seconds))))
        return
    if arguments.role is not None:
        codes: Counter[str] = Counter()
        asyncio.run(_offend(OFFENCES[arguments.role], arguments.port, arguments.seconds, codes))
        print(json.dumps(codes))
        return
    rows = []
    for name in arguments.only.split(","):
        rows.append(measure(name, arguments.seconds))
        print(" · ".join(rows[-1]), file=sys.stderr, flush=True)
    heading = (
        "who",
        "is told",
        "alone p50 / p99 ms",
        "beside them",
        "longest ms",
        "lost",
        "server MB",
        "without a core",
    )
    print(table(heading, rows))


async def _offend(offence: Offence, port: int, seconds: float, codes: Counter[str]) -> None:
    await offence(port, time.monotonic() + seconds, codes)


if __name__ == "__main__":
    main()
