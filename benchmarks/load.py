"""load.c in Python, for machines without a C compiler: the same arguments, the same result, ten times the cost.

Its own CPU time is then most of what is seen of latency and throughput; the
server's CPU per delivery, which is what the tables compare, suffers less.  What the
arguments mean, and how marks, windows and scripts work, is said there.
"""

import json
import os
import resource
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

KEY, ACCEPT = b"dGhlIHNhbXBsZSBub25jZQ==", b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
MASK = bytes.fromhex("37fa213d")
MARK = 1 + 16 + 8
READ_BYTES = 1 << 20
SLOW_BYTES = 1 << 16
FIRST_ID = 10
ASKED = 1024
PRELUDE = 50
CONNECT_PATIENCE_S, CATCH_UP_S = 30.0, 120.0
TICK_S = 1 / os.sysconf("SC_CLK_TCK")

WISHES: dict[str, Any] = {
    **dict.fromkeys(("port", "publish_port", "rate", "idle", "fill", "returners", "slow", "spin", "announce"), 0),
    **dict.fromkeys(("clients", "channels", "flight"), 1),
    **dict.fromkeys(("ack", "refusal", "heartbeat", "answer"), ""),
    "path": "/",
    "publish": "@P",
    "channel": "c",
    "bytes": 128,
    "connecting": 64,
    "core": -1,
    "warm": 0.0,
    "seconds": 3.0,
    "patience": 3.0,
}
ROLES = ("", "publisher_", "returner_")


def frame(opcode: int, payload: bytes) -> bytes:
    """A whole masked frame."""
    size = len(payload)
    head = bytes((0x80 | opcode, 0x80 | size)) if size < 126 else struct.pack("!BBH", 0x80 | opcode, 0xFE, size)
    key = int.from_bytes((MASK * (size // 4 + 1))[:size], "big")
    return head + MASK + (int.from_bytes(payload, "big") ^ key).to_bytes(size, "big")


def expand(template: str, channel: str, payload: str = "", number: int = 0) -> bytes:
    """A template with its places filled in; the payload last, for it may hold anything."""
    return template.replace("@C", channel).replace("@N", str(number)).replace("@P", payload).encode()


class Channel:
    """One channel: who publishes, and what is on its way."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.publisher: Client | None = None
        self.subscribers = self.published = self.outstanding = 0


class Client:
    """One connection, and how far it is: ``connecting``, ``upgrading``, ``talking``, ``ready`` or ``gone``."""

    def __init__(self, role: int, channel: Channel) -> None:
        self.role = role
        self.channel = channel
        self.sock = socket.socket()
        self.state = "waiting"
        self.step = self.next = self.heard = self.said = self.close_code = 0
        self.asked: dict[int, int] | None = None
        self.deaf = False
        self.kept = b""


class Window:
    """What was counted between two moments."""

    def __init__(self) -> None:
        self.began = self.ended = 0
        self.counts: dict[str, float] = {}
        self.cpu_s: list[float] = []
        self.delivery_ns: list[int] = []
        self.ack_ns: list[int] = []


def quantile_ms(times_ns: Sequence[int], share: float) -> float:
    """A quantile of sorted times, -1 if there are none."""
    return times_ns[int(share * (len(times_ns) - 1))] / 1e6 if times_ns else -1.0


class Load:
    """The crowd; see ``load.c``."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.want = dict(WISHES)
        self.scripts: tuple[list[tuple[str, str]], ...] = ([], [], [])
        self.pids: list[int] = []
        for argument in arguments:
            key, _, value = argument.partition("=")
            role = next((at for at in (1, 2) if key.startswith(ROLES[at])), 0)
            step = key.removeprefix(ROLES[role])
            if step in ("say", "hear"):
                self.scripts[role].append((step, value))
            elif key == "pid":
                self.pids.append(int(value))
            elif key in WISHES:
                self.want[key] = type(WISHES[key])(value)
            else:
                sys.exit(f"load: unknown: {key}")
        want = self.want
        apart = want["channels"] if want["publish_port"] else 0
        self.channels = [Channel(f"{want['channel']}{at}") for at in range(want["channels"])]
        roles = [0] * want["clients"] + [1] * apart + [2] * want["returners"]
        self.here = len(roles) - want["returners"]
        self.clients = []
        for at, role in enumerate(roles):
            place = 0 if role == 2 else (at - want["clients"] if role == 1 else at) % want["channels"]
            client = Client(role, self.channels[place])
            self.clients.append(client)
            if role == bool(apart) and client.channel.publisher is None:
                client.channel.publisher = client
                client.asked = {} if want["ack"] else None
        self.counts = dict.fromkeys(("lost", "repeated", "gone", "broken", "refused"), 0)
        self.published = self.deliveries = self.acks = self.reads = self.missing = 0
        self.ready = self.under_way = self.turn = 0
        self.window: Window | None = None
        self.loop = select.epoll()
        self.by_fd: dict[int, Client] = {}

    # --- the server seen from outside ---
    def cpu_of(self, pid: int) -> float:
        """CPU seconds that a process has used."""
        try:
            values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(values[11]) + int(values[12])) * TICK_S

    def memory_kb(self) -> int:
        """Resident memory of all processes."""
        pages = 0
        for pid in self.pids:
            with suppress(OSError):
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE") // 1024

    def core(self) -> tuple[float, float]:
        """For how long the server's core has worked for anybody, and was not there at all."""
        for line in Path("/proc/stat").read_text().splitlines():
            name, *values = line.split()
            if name == f"cpu{self.want['core']}":
                user, nice, system, _, _, interrupts, soft, stolen = map(int, values[:8])
                return (user + nice + system + interrupts + soft) * TICK_S, stolen * TICK_S
        return 0.0, 0.0

    def look(self) -> tuple[dict[str, float], list[float]]:
        """All counters."""
        busy_s, stolen_s = self.core()
        used = resource.getrusage(resource.RUSAGE_SELF)
        counts = {"published": self.published, "deliveries": self.deliveries, "acks": self.acks, "reads": self.reads}
        times = {"load_cpu_s": used.ru_utime + used.ru_stime, "busy_s": busy_s, "stolen_s": stolen_s}
        return {**counts, **times}, [self.cpu_of(pid) for pid in self.pids]

    def within(self, work: Callable[[], None]) -> Window:
        """Count while something is done."""
        window = Window()
        window.began = time.monotonic_ns()
        before, cpu_before = self.look()
        self.window = window
        work()
        self.window = None
        after, cpu_after = self.look()
        window.ended = time.monotonic_ns()
        window.counts = {name: after[name] - before[name] for name in after}
        window.cpu_s = [later - earlier for earlier, later in zip(cpu_before, cpu_after, strict=True)]
        return window

    # --- one client ---
    def arrange(self, client: Client) -> None:
        """Begin to connect."""
        sock = client.sock
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if self.want["slow"] and client is self.clients[self.here - 1]:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_BYTES)
        port = self.want["publish_port"] if client.role == 1 else self.want["port"]
        with suppress(BlockingIOError):
            sock.connect(("127.0.0.1", port))
        client.state = "connecting"
        self.under_way += 1
        self.by_fd[sock.fileno()] = client
        self.loop.register(sock, select.EPOLLOUT)

    def upgrade(self, client: Client) -> None:
        """Connected: ask for a WebSocket."""
        path = expand(self.want["path"], client.channel.name)
        client.state = "upgrading"
        self.loop.modify(client.sock, select.EPOLLIN)
        self.put(
            client,
            b"GET %s HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: %s\r\nSec-WebSocket-Version: 13\r\n\r\n" % (path, KEY),
        )

    def end(self, client: Client) -> None:
        """The connection is over."""
        if client.state == "gone":
            return
        if client.state == "ready":
            self.ready -= 1
        else:
            self.under_way -= 1
        self.counts["gone"] += not client.deaf
        client.state = "gone"
        self.by_fd.pop(client.sock.fileno(), None)
        client.sock.close()

    def put(self, client: Client, data: bytes) -> None:
        """Send all of it."""
        while data and client.state != "gone":
            try:
                data = data[client.sock.send(data) :]
            except BlockingIOError:
                if not select.select([], [client.sock], [], self.want["patience"])[1]:
                    sys.exit(f"load: the server has read nothing for {self.want['patience']:.0f} s")
            except OSError:
                self.end(client)

    def go_on(self, client: Client) -> None:
        """Say what is next in the script."""
        script = self.scripts[client.role]
        while client.step < len(script) and script[client.step][0] == "say":
            self.put(client, frame(1, expand(script[client.step][1], client.channel.name)))
            client.step += 1
        if client.step < len(script) or client.state != "talking":
            return
        client.state = "ready"
        self.ready += 1
        self.under_way -= 1
        if client.role == 0:
            client.channel.subscribers += 1
            client.next = client.channel.published

    # --- what comes ---
    def read_from(self, client: Client) -> None:
        """Take what has come."""
        try:
            data = client.sock.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.end(client)
            return
        now = time.monotonic_ns()
        self.reads += 1
        data = client.kept + data
        if client.state == "upgrading":
            head, found, rest = data.partition(b"\r\n\r\n")
            if found and (b" 101" not in head[:16] or ACCEPT not in head):
                print(f"load: the handshake was answered with\n{head.decode(errors='replace')}", file=sys.stderr)
                self.end(client)
            elif found:
                client.state, data = "talking", rest
                self.go_on(client)
        if client.state != "upgrading":
            data = self.take_frames(client, data, now)
        client.kept = data

    def take_frames(self, client: Client, data: bytes, now: int) -> bytes:
        """Take whole frames; returns what is left."""
        at = 0
        while len(data) - at >= 2 and client.state != "gone":
            head, size = at + 2, data[at + 1]
            if size & 0x80:
                self.counts["broken"] += 1
                self.end(client)
                break
            if size >= 126:
                head = at + (4 if size == 126 else 10)
                if len(data) < head:
                    break
                size = int.from_bytes(data[at + 2 : head], "big")
            if len(data) < head + size:
                break
            self.take_frame(client, data[at], data[head : head + size], now)
            at = head + size
        return data[at:]

    def take_frame(self, client: Client, first: int, data: bytes, now: int) -> None:
        """One frame: a goodbye, a ping, or a text to look for marks in."""
        want = self.want
        if first == 0x88:
            client.close_code = int.from_bytes(data[:2], "big") if data else 1005
            self.end(client)
        elif first == 0x89:
            self.put(client, frame(10, data))
        elif first != 0x81:
            self.counts["broken"] += first != 0x8A
        elif want["heartbeat"] and data == want["heartbeat"].encode():
            self.put(client, frame(1, want["answer"].encode()))
        else:
            script = self.scripts[client.role]
            if client.state == "talking" and script[client.step][1].encode() in data:
                client.step += 1
                self.go_on(client)
            if client.asked is not None:
                self.count_acks(client, client.asked, data, now)
            at = data.find(b"~")
            while 0 <= at <= len(data) - MARK:
                self.deliver(client, int(data[at + 1 : at + 17], 16), int(data[at + 17 : at + MARK], 16), now)
                at = data.find(b"~", at + MARK)

    def deliver(self, client: Client, sent_at: int, number: int, now: int) -> None:
        """One publication has come."""
        client.heard += 1
        if client.deaf:
            return
        if number < client.next:
            self.counts["repeated"] += 1
            return
        skipped, client.next = number - client.next, number + 1
        self.counts["lost"] += skipped
        if client.role == 0:
            client.channel.outstanding -= skipped + 1
            self.deliveries += 1
            if self.window is not None:
                self.window.delivery_ns.append(now - sent_at)

    def count_acks(self, client: Client, asked: dict[int, int], data: bytes, now: int) -> None:
        """Answers to publications."""
        ack, refusal = self.want["ack"].encode(), self.want["refusal"].encode()
        at = data.find(ack)
        while at >= 0:
            number = int(data[data.rfind(b":", 0, at) + 1 : at].strip(b","))
            self.acks += 1
            self.missing -= 1
            if self.window is not None:
                self.window.ack_ns.append(now - asked.pop(number % ASKED, now))
            at = data.find(ack, at + len(ack))
        self.counts["refused"] += bool(refusal) and refusal in data

    # --- the crowd ---
    def pump(self, patience_s: float) -> None:
        """Take what has come everywhere."""
        for fd, _ in self.loop.poll(0 if self.want["spin"] else max(0.0, patience_s)):
            client = self.by_fd.get(fd)
            if client is None:
                continue
            if client.state == "connecting":
                self.upgrade(client)
            else:
                self.read_from(client)

    def connect_some(self, some: Sequence[Client]) -> None:
        """Connect these, and wait until all are subscribed."""
        waiting, target, before = list(reversed(some)), self.ready + len(some), -1
        moved_at = time.monotonic()
        while self.ready < target:
            while waiting and self.under_way < self.want["connecting"]:
                self.arrange(waiting.pop())
            self.pump(0.01)
            if self.counts["gone"]:
                sys.exit(f"load: {self.counts['gone']} connections have ended at once")
            if before != self.ready:
                before, moved_at = self.ready, time.monotonic()
            elif time.monotonic() - moved_at > CONNECT_PATIENCE_S:
                sys.exit(f"load: {self.ready} clients are subscribed, and then nothing for {CONNECT_PATIENCE_S:.0f} s")

    def publish(self, channel: Channel, count: int) -> None:
        """Publish some at once."""
        client, now, frames = channel.publisher, time.monotonic_ns(), []
        assert client is not None
        for _ in range(count):
            payload = f'{{"mark":"~{now:016x}{channel.published:08x}","pad":"'
            payload = payload.ljust(self.want["bytes"] - 2, ".") + '"}'
            number = FIRST_ID + client.said
            frames.append(frame(1, expand(self.want["publish"], channel.name, payload, number)))
            if client.asked is not None:
                client.asked[number % ASKED] = now
                self.missing += 1
            client.said += 1
            channel.published += 1
            channel.outstanding += channel.subscribers
            self.published += 1
        self.put(client, b"".join(frames))

    def forgive(self) -> None:
        """What has not come by now never will."""
        for channel in self.channels:
            self.counts["lost"] += max(0, channel.outstanding)
            channel.outstanding = min(0, channel.outstanding)

    def caught_up(self) -> bool:
        """Have all who returned heard enough?"""
        return all(client.heard >= self.want["fill"] for client in self.clients[self.here :])

    def empty(self) -> bool:
        """Has nothing come in this window?  Then it says nothing, and the first delivery is waited for."""
        if self.window is None or self.want["idle"]:
            return False
        return not self.window.delivery_ns or bool(self.want["ack"] and not self.window.ack_ns)

    def work(self, seconds: float, done: Callable[[], bool] | None = None) -> None:
        """Publish and listen for so long, or until somebody is done."""
        want = self.want
        moved_at = due = now = time.monotonic()
        until, before, waiting = now + seconds, self.deliveries, list(reversed(self.clients[self.here :]))
        late = until + CONNECT_PATIENCE_S
        while (now < until or (self.empty() and now < late)) and not (done and done()):
            patience_s = 0.01
            while done and waiting and self.under_way < want["connecting"]:
                self.arrange(waiting.pop())
            if not want["idle"] and want["flight"]:
                for channel in self.channels:
                    under = -(-channel.outstanding // channel.subscribers) if channel.subscribers else 0
                    if under < want["flight"]:
                        self.publish(channel, want["flight"] - under)
                if before != self.deliveries:
                    before, moved_at = self.deliveries, now
                elif now - moved_at > self.want["patience"] / 2:
                    self.forgive()
                    moved_at = now
            elif not want["idle"]:
                while due <= now:
                    self.publish(self.channels[self.turn % len(self.channels)], 1)
                    self.turn += 1
                    due += 1 / want["rate"]
                patience_s = due - now
            self.pump(patience_s)
            now = time.monotonic()

    def drain(self) -> None:
        """Wait for what is on its way."""
        moved_at, before = time.monotonic(), self.deliveries + self.acks
        while any(channel.outstanding > 0 for channel in self.channels) or (self.want["ack"] and self.missing > 0):
            self.pump(0.01)
            if before != self.deliveries + self.acks:
                before, moved_at = self.deliveries + self.acks, time.monotonic()
            elif time.monotonic() - moved_at > self.want["patience"]:
                break
        self.forgive()

    def fill(self) -> None:
        """Publish what others will catch up on."""
        channel = self.channels[0]
        while channel.published < self.want["fill"]:
            self.publish(channel, max(0, min(50 - channel.outstanding, self.want["fill"] - channel.published)))
            self.pump(0.01)
        self.drain()

    # --- what came of it ---
    def run(self) -> dict[str, Any]:
        """All of it; returns the result."""
        want = self.want
        first = min(PRELUDE, self.here) if want["idle"] else want["channels"] if want["fill"] else 0
        self.connect_some(self.clients[:first])
        if want["fill"]:
            self.fill()
        if want["idle"]:
            want["spin"] = 0
            self.work(0.5)
        memory_before = self.memory_kb()
        connecting = self.within(lambda: self.connect_some(self.clients[first : self.here]))
        self.work(want["warm"])
        memory_after = self.memory_kb()
        if want["announce"]:
            print("begin", file=sys.stderr, flush=True)
        windows = [self.within(lambda: self.work(want["seconds"]))]
        slow = self.clients[self.here - 1]
        if want["slow"]:
            slow.deaf = True
            self.loop.unregister(slow.sock)
            slow.channel.subscribers -= 1
            slow.channel.outstanding -= slow.channel.published - slow.next
            windows.append(self.within(lambda: self.work(want["seconds"])))
        elif want["returners"]:
            windows.append(self.within(lambda: self.work(CATCH_UP_S, self.caught_up)))
        if not want["idle"]:
            self.drain()
        while want["slow"] and slow.state != "gone" and select.select([slow.sock], [], [], 0.5)[0]:
            self.read_from(slow)
        caught_up_s = (windows[-1].ended - windows[-1].began) / 1e9 if want["returners"] and self.caught_up() else -1.0
        return {
            "connecting": self.told(connecting),
            "windows": [self.told(window) for window in windows],
            "clients": want["clients"],
            "connected": self.here - first,
            "memory_before_kb": memory_before,
            "memory_after_kb": memory_after,
            **self.counts,
            "unacknowledged": self.missing,
            "caught_up_s": caught_up_s,
            "slow_code": slow.close_code if want["slow"] else 0,
            "slow_heard": slow.heard if want["slow"] else 0,
        }

    def told(self, window: Window) -> dict[str, Any]:
        """A window's figures."""
        delivery_ns, ack_ns = sorted(window.delivery_ns), sorted(window.ack_ns)
        counts, cpu_s = dict(window.counts), sum(window.cpu_s)
        return {
            "wall_s": (window.ended - window.began) / 1e9,
            "other_s": max(0.0, counts.pop("busy_s") - cpu_s),
            **counts,
            "cpu_s": cpu_s,
            "p50_ms": quantile_ms(delivery_ns, 0.5),
            "p99_ms": quantile_ms(delivery_ns, 0.99),
            "max_ms": quantile_ms(delivery_ns, 1.0),
            "ack_p50_ms": quantile_ms(ack_ns, 0.5),
            "ack_p99_ms": quantile_ms(ack_ns, 0.99),
            "cpu_by": window.cpu_s,
        }


if __name__ == "__main__":
    print(json.dumps(Load(sys.argv[1:]).run()))
