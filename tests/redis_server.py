"""Real Redis for the tests: one alone, a primary with Sentinels, a cluster; and each way to hurt them.

    with RedisServer() as redis: redis.url; redis.kill(); redis.start(); redis.freeze()
    with Sentinels() as sentinels: sentinels.url; sentinels.primary().kill()
    with RedisCluster() as cluster: cluster.url; cluster.move_slot(12, to)

They listen on free ports of 127.0.0.1, keep nothing on disk that outlives them,
and are stopped by their own process ids.  ``redis-server`` is looked for in
``PATH``, then at ``WATERSPOUT_TEST_REDIS``; a run without it fails.

``shared_server``, ``shared_sentinels`` and ``shared_cluster`` are started once and
serve a whole run: for tests that hurt nothing, with a ``unique_prefix`` each.
"""

import atexit
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import redis
from ports import free_port

PATIENCE_S = 30.0

TILTED_S = 100.0
TILT_MS = 3_000
"""A Sentinel that stood still for two seconds trusts its clock no more, and does nothing for the next thirty (TILT):
here for three, where it can be told so (Redis 7), and it is waited for longer than it would take by itself."""

CALM_MS = 60_000
"""After what silence those that are shared call one of them dead: nobody hurts them, but the machine that they share
with others may stand still."""

MASTER = "mymaster"
SLOTS = 16384
_numbers = itertools.count(1)


def unique_prefix() -> str:
    """A ``redis.prefix`` that no other test uses."""
    return f"test{os.getpid()}.{next(_numbers)}"


def program() -> str:
    """The path of redis-server; raises ``RuntimeError`` if there is none."""
    found = shutil.which("redis-server") or os.environ.get("WATERSPOUT_TEST_REDIS", "")
    if not found or not os.access(found, os.X_OK):
        raise RuntimeError("the tests need redis-server in PATH, or its path in WATERSPOUT_TEST_REDIS")
    return found


def wait_until(true: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> None:
    """Look again and again until it is ``true`` of a server, which tells nobody when it becomes so."""
    until = time.monotonic() + patience_s
    while True:
        try:
            if true():
                return
        except redis.RedisError:
            pass  # not yet up
        assert time.monotonic() < until, f"waited {patience_s} s in vain: {what}"
        time.sleep(0.02)


class RedisServer:
    """One redis-server; ``options`` are those of its command line.

    It saves nothing: whenever it is started again, it comes back empty (but for
    a cluster's or a Sentinel's own configuration).
    """

    ready = "Ready to accept connections"

    def __init__(self, *options: str) -> None:
        self.port = free_port()
        self.options = options
        self.log: list[str] = []
        self.popen: subprocess.Popen[str] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="waterspout-redis-")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.address}>"

    @property
    def folder(self) -> Path:
        """Where it works."""
        return Path(self._folder.name)

    @property
    def address(self) -> str:
        """``host:port``."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """As in ``redis.url``."""
        return f"redis://{self.address}"

    def arguments(self) -> list[str]:
        """The command line after the program's name."""
        return ["--save", "", "--appendonly", "no", "--repl-diskless-sync-delay", "0", *self.options]

    # --- life -----------------------------------------------------------------
    def start(self) -> Self:
        """Start it and wait until it is ready; its port is the same each time."""
        assert self.popen is None, f"{self} is running"
        common = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder), "--daemonize", "no"]
        arguments = self.arguments()
        files = [arguments.pop(0)] if arguments and not arguments[0].startswith("--") else []
        self.popen = subprocess.Popen(
            [program(), *files, *common, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        ready = threading.Event()
        threading.Thread(target=self._read, args=(self.popen, ready), daemon=True).start()
        assert ready.wait(PATIENCE_S), "\n".join(self.log)
        assert self.popen.poll() is None, "\n".join(self.log)
        return self

    def _read(self, popen: "subprocess.Popen[str]", ready: threading.Event) -> None:
        assert popen.stdout is not None
        with popen.stdout:
            for line in popen.stdout:
                self.log.append(line.rstrip())
                if self.ready in line:
                    ready.set()
        ready.set()  # ended: whoever waits looks at that

    def kill(self) -> None:
        """End it at once, as a crash would; its connections are cut."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it if it runs."""
        if self.popen is not None:
            self._end(signal.SIGKILL if self.popen.poll() is None else 0)

    def restart(self) -> None:
        """Kill it, and start it again, empty."""
        self.kill()
        self.start()

    def freeze(self) -> None:
        """Stop it in its tracks (SIGSTOP): connections stay, and nothing answers."""
        assert self.popen is not None
        self.popen.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on (SIGCONT)."""
        assert self.popen is not None
        self.popen.send_signal(signal.SIGCONT)

    def _end(self, number: int) -> None:
        assert self.popen is not None, f"{self} is not running"
        self.popen.send_signal(number)
        self.popen.wait(PATIENCE_S)
        self.popen = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()
        self._folder.cleanup()

    # --- commands -------------------------------------------------------------
    def command(self, *command: str | bytes | int, user: str | None = None, password: str | None = None) -> Any:
        """Run one command and return the answer as it comes (bytes, int, list); blocks.

        Raises ``redis.RedisError``.
        """
        client = redis.Redis(
            host="127.0.0.1", port=self.port, protocol=2, socket_timeout=5, username=user, password=password
        )
        client.response_callbacks.clear()
        try:
            return client.execute_command(*command)  # type: ignore[no-untyped-call]
        finally:
            client.close()

    def facts(self, *command: str) -> dict[str, str]:
        """The ``name:value`` lines that a command such as ``CLUSTER INFO`` answers with."""
        lines = self.command(*command).decode().splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line)

    def heard_by(self, name: str | bytes) -> int:
        """How many connections are subscribed to a channel of this server."""
        return sum(self.command("PUBSUB", verb, name)[1] for verb in ("NUMSUB", "SHARDNUMSUB"))

    def cut_clients(self, kind: str) -> int:
        """``CLIENT KILL TYPE``: cut connections of a kind, ``pubsub`` or ``normal``; returns how many."""
        return int(self.command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes"))


def wait_for_replica(server: RedisServer, patience_s: float = PATIENCE_S) -> None:
    """Block until a replica has what its primary has, and hears what is new."""
    wait_until(
        lambda: server.facts("INFO", "replication").get("master_link_status") == "up",
        f"{server} follows nobody",
        patience_s,
    )


# --- Sentinel ----------------------------------------------------------------
class Sentinel(RedisServer):
    """One Sentinel, which watches ``primary``."""

    ready = "+monitor master"

    def __init__(self, primary: RedisServer, *options: str) -> None:
        super().__init__(*options)
        self.config = self.folder / "sentinel.conf"
        self.config.write_text(
            f"sentinel monitor {MASTER} 127.0.0.1 {primary.port} 2\n"
            f"sentinel down-after-milliseconds {MASTER} 700\n"
            f"sentinel failover-timeout {MASTER} 3000\n"
        )

    @property
    def url(self) -> str:
        """As in ``redis.url``."""
        return f"redis+sentinel://{self.address}?sentinel_master_name={MASTER}"

    def arguments(self) -> list[str]:
        """See ``RedisServer.arguments``."""
        return [str(self.config), "--sentinel", *self.options]


class Sentinels:
    """A primary, a replica, and three Sentinels that call a primary dead after 0.7 s and know one another."""

    def __init__(self) -> None:
        self.servers = [RedisServer(), RedisServer()]
        self.servers[1].options = ("--replicaof", "127.0.0.1", str(self.servers[0].port))
        self.sentinels = [Sentinel(self.servers[0]) for _ in range(3)]
        self._stack = ExitStack()

    @property
    def url(self) -> str:
        """As in ``redis.url``, with all three."""
        return self.sentinels[0].url + "".join(f"&addr={sentinel.address}" for sentinel in self.sentinels[1:])

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for server in self.servers:
                stack.enter_context(server)
            wait_for_replica(self.servers[1])
            for sentinel in self.sentinels:
                stack.enter_context(sentinel)
                with suppress(redis.ResponseError):
                    sentinel.command("SENTINEL", "DEBUG", "TILT-PERIOD", TILT_MS)
            self._wait_for_one_another()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def _wait_for_one_another(self) -> None:
        for sentinel in self.sentinels:
            wait_until(
                lambda sentinel=sentinel: _knows(sentinel),  # type: ignore[misc]
                f"{sentinel} does not know the others",
            )

    def primary(self) -> RedisServer:
        """Whom the Sentinels call primary now."""
        port = int(self._first_alive().command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER)[1])
        return next(server for server in self.servers if server.port == port)

    def fail_over(self) -> None:
        """Have the Sentinels swap primary and replica, as an operator would."""
        before = self.primary()
        wait_until(lambda: self._failed_over(before), "no replica is ready", TILTED_S)
        self.wait_for_other_primary(before)

    def _failed_over(self, before: RedisServer) -> bool:
        """Is it done?  Else order it, again too: a Sentinel gives up what a TILT has kept it from for too long."""
        if self.primary() is not before:
            return True
        self._first_alive().command("SENTINEL", "FAILOVER", MASTER)  # refused while one is under way
        return False

    def lose_primary(self) -> RedisServer:
        """Kill the primary; returns it once the Sentinels have put the other one in its place."""
        dead = self.primary()
        dead.kill()
        self.wait_for_other_primary(dead)
        return dead

    def wait_for_other_primary(self, before: RedisServer) -> None:
        """Block until the Sentinels agree that ``before`` is no longer the primary."""
        for sentinel in self.sentinels:
            if sentinel.popen is not None:
                wait_until(
                    lambda sentinel=sentinel: (  # type: ignore[misc]
                        int(sentinel.command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER)[1]) != before.port
                    ),
                    f"{sentinel} still calls {before} the primary",
                    TILTED_S,
                )

    def _first_alive(self) -> Sentinel:
        return next(sentinel for sentinel in self.sentinels if sentinel.popen is not None)


def _knows(sentinel: Sentinel) -> bool:
    answer = sentinel.command("SENTINEL", "MASTER", MASTER)
    state = dict(zip(answer[::2], answer[1::2], strict=True))
    return (state[b"num-slaves"], state[b"num-other-sentinels"]) == (b"1", b"2")


# --- cluster -----------------------------------------------------------------
class RedisCluster:
    """Three primaries, which share the slots; a node is called dead after a second.

    They are alone, or have a replica each (``replicas``), which takes the place of a dead one.
    """

    def __init__(self, *, replicas: bool = False) -> None:
        self.servers = [_node() for _ in range(3)]
        self.replicas = [_node() for _ in self.servers] if replicas else []
        self._stack = ExitStack()

    @property
    def url(self) -> str:
        """As in ``redis.url``, with all three."""
        first, *others = (server.address for server in self.servers)
        return f"redis+cluster://{first}?" + "&".join(f"addr={address}" for address in others)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for server in self.everyone:
                stack.enter_context(server)
            bounds = [0, 5461, 10923, SLOTS]
            for number, server in enumerate(self.servers):
                server.command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
                server.command("CLUSTER", "ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1)
            for server in self.everyone[1:]:
                bus = int(server.options[server.options.index("--cluster-port") + 1])
                self.servers[0].command("CLUSTER", "MEET", "127.0.0.1", server.port, bus)
            self.wait_until_well()
            for primary, replica in zip(self.servers, self.replicas, strict=False):
                replica.command("CLUSTER", "REPLICATE", self.id_of(primary))
                wait_for_replica(replica)
            self.wait_until_well()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def wait_until_well(self) -> None:
        """Block until every node sees all the others, their replicas, and all slots served."""
        for server in self.everyone:
            wait_until(
                lambda server=server: self._well(server),  # type: ignore[misc]
                f"the cluster is not well in the eyes of {server}",
            )

    @property
    def everyone(self) -> list[RedisServer]:
        """All nodes."""
        return [*self.servers, *self.replicas]

    def _well(self, server: RedisServer) -> bool:
        facts, followers = server.facts("CLUSTER", "INFO"), server.command("CLUSTER", "NODES").count(b"slave")
        known = (facts["cluster_known_nodes"], facts["cluster_size"]) == (str(len(self.everyone)), "3")
        return (
            facts["cluster_state"] == "ok" and known and followers in (0, len(self.replicas)) and self._served(server)
        )

    def _served(self, server: RedisServer) -> bool:
        return sum(last - first + 1 for first, last, _ in _slots(server)) == SLOTS

    def lose_primary(self) -> RedisServer:
        """Kill a primary that has a replica; returns it once all others see the replica in its place."""
        slot = 0
        dead = self.owner(slot)
        dead.kill()
        for server in self.everyone:
            if server is not dead:
                wait_until(
                    lambda server=server: (  # type: ignore[misc]
                        _owner_port(server, slot) not in (0, dead.port)
                        and server.facts("CLUSTER", "INFO")["cluster_state"] == "ok"
                    ),
                    f"{server} still calls {dead} a primary",
                )
        return dead

    def id_of(self, server: RedisServer) -> str:
        """A node's id."""
        return str(server.command("CLUSTER", "MYID").decode())

    def owner(self, slot: int) -> RedisServer:
        """The node that serves a slot: a primary, or the replica that has taken its place."""
        for server in self.everyone:
            if _owner_port(server, slot) == server.port:
                return server
        raise AssertionError(f"nobody serves slot {slot}")

    def move_slot(self, slot: int, to: RedisServer) -> None:
        """Hand an empty slot to another node, as a reshard does."""
        source = self.owner(slot)
        target_id = self.id_of(to)
        to.command("CLUSTER", "SETSLOT", slot, "IMPORTING", self.id_of(source))
        source.command("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
        for server in (to, source):
            server.command("CLUSTER", "SETSLOT", slot, "NODE", target_id)
        wait_until(lambda: all(_owner_port(server, slot) == to.port for server in self.servers), "not all know")


def _node() -> RedisServer:
    return RedisServer(
        *("--cluster-enabled", "yes", "--cluster-node-timeout", "1000"),
        *("--cluster-port", str(free_port())),
    )


def _slots(server: RedisServer) -> list[tuple[int, int, int]]:
    """First, last, and the port of the owner."""
    return [(first, last, node[1]) for first, last, node, *_ in server.command("CLUSTER", "SLOTS")]


def _owner_port(server: RedisServer, slot: int) -> int:
    return next((port for first, last, port in _slots(server) if first <= slot <= last), 0)


# --- one for a whole run -----------------------------------------------------
@cache
def shared_server() -> RedisServer:
    """A Redis that serves the whole run; hurt it not."""
    return _until_exit(RedisServer())


@cache
def shared_sentinels() -> Sentinels:
    """Sentinels that serve the whole run; hurt them not."""
    sentinels = _until_exit(Sentinels())
    for sentinel in sentinels.sentinels:
        sentinel.command("SENTINEL", "SET", MASTER, "down-after-milliseconds", CALM_MS)
    return sentinels


@cache
def shared_cluster() -> RedisCluster:
    """A cluster that serves the whole run; hurt it not."""
    cluster = _until_exit(RedisCluster())
    for server in cluster.servers:
        server.command("CONFIG", "SET", "cluster-node-timeout", CALM_MS)
    return cluster


T = TypeVar("T", RedisServer, Sentinels, RedisCluster)


def _until_exit(one: T) -> T:
    one.__enter__()
    atexit.register(one.__exit__, None, None, None)
    return one
