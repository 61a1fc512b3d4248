"""What an update promises: today's server goes on with what the first release stored; an older one leaves all alone.

``first/`` holds that as that release's own code left it (``first_release``); each test
works on a copy, once in a file and once in a database.
"""

import asyncio
import json
import shutil
import sqlite3
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pymongo
import pytest
from first_release import CHANNELS, FOLDER, LONG_MS, NOW, TEN, dump, read, restore, retention_of
from hopper import ask
from mongod import fresh_database, shared_set
from pymongo.database import Database
from support import OPEN, PATIENCE_S, PATIENTLY, ROOT, Client, Process, config

from server.blocks import Blocks, Record, lifting
from server.blocks.mongo import MongoBlocks
from server.blocks.sqlite import SqliteBlocks
from server.errors import Unavailable
from server.history import Appended, Draft, History, Version
from server.history.mongo import MongoHistory
from server.history.mongo_scheme import FORMAT
from server.history.sqlite import SqliteHistory
from server.history.sqlite_file import SCHEMA_VERSION
from server.settings import MongoSettings
from server.stream import Position

Seam = TypeVar("Seam", History, Blocks)

LATER = NOW + 30_000
KEY = {"X-API-Key": "api-key"}


class Store(ABC):
    """A copy of what the first release stored; ``name`` is its part of what that release read."""

    name = ""

    def was(self, what: str) -> Any:
        """What the release read of its ``history`` or ``blocks``."""
        return json.loads((FOLDER / f"{what}.read.json").read_text())[self.name]

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What a server needs to be told to find it."""

    @abstractmethod
    def history(self) -> History:
        """Today's history on it, not open yet."""

    @abstractmethod
    def blocks(self) -> Blocks:
        """Today's blocks on it, not open yet."""

    @abstractmethod
    def note_newer(self) -> None:
        """Have it be of the format that follows today's."""

    @abstractmethod
    def everything(self) -> Any:
        """All that there is in it, down to the last index."""


class FileStore(Store):
    """The two files; see ``Store``."""

    name = "file"

    def __init__(self, folder: Path) -> None:
        self.path = folder / "history.db"
        self.blocks_path = folder / "history.db.blocks"
        shutil.copyfile(FOLDER / "history.db", self.path)
        shutil.copyfile(FOLDER / "blocks.db", self.blocks_path)

    @property
    def settings(self) -> dict[str, Any]:
        """See ``Store.settings``."""
        return {"sqlite": {"path": str(self.path)}}

    def history(self) -> History:
        """See ``Store.history``."""
        return SqliteHistory(self.path, idempotency_ttl_ms=LONG_MS)

    def blocks(self) -> Blocks:
        """See ``Store.blocks``."""
        return SqliteBlocks(self.blocks_path)

    def note_newer(self) -> None:
        """See ``Store.note_newer``."""
        for path in (self.path, self.blocks_path):
            with closing(sqlite3.connect(path)) as db:
                db.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")

    def everything(self) -> Any:
        """See ``Store.everything``."""
        beside = {path.name for path in self.path.parent.glob("history*")} - {"history.db.lock"}
        return {name: (self.path.parent / name).read_bytes() for name in beside}


class DatabaseStore(Store):
    """See ``Store``; the database, in the replica set that all tests share."""

    name = "database"

    def __init__(self, database: Database[dict[str, Any]]) -> None:
        self.database = database
        restore(database, "history.mongo.json", "blocks.mongo.json")

    @property
    def settings(self) -> dict[str, Any]:
        """See ``Store.settings``."""
        return {
            "mongo": {"url": shared_set().url, "database": self.database.name, "publish_timeout": PATIENTLY},
        }

    def history(self) -> History:
        """See ``Store.history``."""
        return MongoHistory(MongoSettings.model_validate(self.settings["mongo"]), idempotency_ttl_ms=LONG_MS)

    def blocks(self) -> Blocks:
        """See ``Store.blocks``."""
        return MongoBlocks(MongoSettings.model_validate(self.settings["mongo"]))

    def note_newer(self) -> None:
        """See ``Store.note_newer``."""
        self.database["meta"].update_one({"_id": "format"}, {"$set": {"version": FORMAT + 1}})

    def everything(self) -> Any:
        """See ``Store.everything``."""
        return dump(self.database)


@pytest.fixture
def database_store() -> Iterator[DatabaseStore]:
    """A database of this test's own."""
    with pymongo.MongoClient[dict[str, Any]](shared_set().url, w="majority") as client:
        database = client[fresh_database()]
        yield DatabaseStore(database)
        shared_set().drop(database.name)


@pytest.fixture(params=["file", "database"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Either of them."""
    if request.param == "file":
        return FileStore(tmp_path)
    found: DatabaseStore = request.getfixturevalue("database_store")
    return found


@asynccontextmanager
async def opened(seam: Seam) -> AsyncIterator[Seam]:
    """Open it for a while."""
    await seam.open()
    try:
        yield seam
    finally:
        await seam.close()


# --- at the seams -------------------------------------------------------------------
async def test_all_of_it_is_there(store: Store) -> None:
    """Positions, payloads, times, info and tags are what that release read itself, also after a restart."""
    was = store.was("history")
    assert was.keys() == set(CHANNELS)
    for _ in range(2):
        async with opened(store.history()) as history:
            for channel in CHANNELS:
                assert await read(history, channel) == was[channel], channel
            known = {name: Position(one["top"], one["epoch"]) for name, one in was.items() if one["epoch"]}
            assert await history.tops(CHANNELS) == known


async def test_keys_still_refuse_doubles(store: Store) -> None:
    """A key gets its first position, also where the publication was removed; one whose time is over is used anew."""
    was = store.was("history")
    keys, removed = was["chat:keys"]["epoch"], was["chat:removed"]["epoch"]
    cases = [("chat:keys", f"k{number}", Position(number, keys)) for number in range(1, 4)]
    cases.append(("chat:removed", "gone", Position(6, removed)))
    for _ in range(2):
        async with opened(store.history()) as history:
            for channel, key, position in cases:
                again = await history.append(channel, Draft(b"0", key=key), retention_of(channel), LATER)
                assert again == Appended(position, repeated=True)
    async with opened(store.history()) as history:
        anew = await history.append("chat:keys", Draft(b"5", key="expired"), retention_of("chat:keys"), LATER)
        assert anew == Appended(Position(5, keys))


async def test_it_goes_on(store: Store) -> None:
    """Offsets follow on in old channels and old lives, a new life begins where one had ended, and versions are kept."""
    was = store.was("history")
    retention = retention_of("chat:plain")
    versioned = Draft(b"7", version=Version(7, "x"))
    async with opened(store.history()) as history:
        for channel, one in was.items():
            said = await history.append(channel, Draft(b"more"), retention_of(channel), LATER)
            assert said.position.offset == one["top"] + 1, channel
            assert said.position.epoch == one["epoch"] or not one["epoch"]
        first = await history.append("chat:plain", versioned, retention, LATER)
    async with opened(store.history()) as history:
        again = await history.append("chat:plain", versioned, retention, LATER)
        assert again == Appended(first.position, repeated=True)
        now = (await read(history, "chat:plain"))["publications"]
        assert [one["offset"] for one in now] == [1, 2, 3, 4, 5, 6]
        assert now[:4] == was["chat:plain"]["publications"]


async def test_trimming_goes_on(store: Store) -> None:
    """What that release had not trimmed yet is trimmed, what it had stays so, and nothing else is touched."""
    was = store.was("history")
    forever = retention_of("chat:plain")
    async with opened(store.history()) as history:
        for number in range(26, 36):
            await history.append("short:unswept", Draft(b"%d" % number), TEN, LATER)
        for _ in range(20):
            await history.sweep(lambda name: TEN if name.startswith("short:") else forever, LATER)
        page = await history.read("short:unswept", forever, LATER)
        assert page.floor == 25
        assert [one.data for one in page.publications] == [b"%d" % number for number in range(26, 36)]
        for channel in set(CHANNELS) - {"short:unswept"}:
            assert await read(history, channel) == was[channel], channel


async def test_who_was_kept_out_stays_out(store: Store) -> None:
    """Blocks are what that release read, a change has a higher revision, and they are there after a restart."""
    async with opened(store.blocks()) as blocks:
        records = {record.user: record for record in await blocks.records()}
        was = msgspec.convert(store.was("blocks"), list[Record])
        assert [records[user] for user in sorted(records)] == was
        lifted = await blocks.change("ann", lifting("", muted=False), NOW - 1)
        assert (lifted.blocks, lifted.revision) == ((), records["ann"].revision + 1)
    async with opened(store.blocks()) as blocks:
        assert {record.user: record for record in await blocks.records()} == {**records, "ann": lifted}


# --- a whole server -------------------------------------------------------------------
def _config(store: Store) -> dict[str, Any]:
    kept = {**OPEN, "history_size": -1, "history_ttl": "-1", "force_recovery": True}
    namespaces = [
        {"name": "chat", **kept},
        {"name": "short", **kept, "history_size": 10},
        {"name": "raw", **kept, "publication_data_format": "binary"},
        {"name": "mortal", **kept},
    ]
    channel = {"history_meta_ttl": "876000h", "namespaces": namespaces}
    return config(channel=channel, **store.settings)


async def _back(server: Process, channel: str, since: Position, *, format: str = "json") -> tuple[bool, list[Any]]:
    """Come back with a position: is it recovered, and with what."""
    client = await Client.connected(server.url, format=format)
    position = {"recover": True, "offset": since.offset, "epoch": since.epoch}
    answer = await client.ask("subscribe", channel=channel, **position)
    found = [one.get("data", b"") for one in answer.get("publications", [])]
    if answer.get("recovered"):
        top = (await client.ask("history", channel=channel)).get("offset", 0)
        found += [one["data"] for one in await client.publications(channel, top - since.offset - len(found))]
    await client.close()
    return answer.get("recovered", False), found


async def test_a_server_on_what_the_first_release_left(store: Store, tmp_path: Path) -> None:
    """Clients of then recover from their positions; what is published and blocked since is there after a restart."""
    was = store.was("history")
    epoch = {name: one["epoch"] for name, one in was.items()}
    with Process(tmp_path, _config(store)) as server:
        assert await _back(server, "chat:plain", Position(2, epoch["chat:plain"])) == (True, [None, "\U0001f30a"])
        long = await _back(server, "chat:long", Position(3, epoch["chat:long"]))
        assert long == (True, list(range(4, 121)))
        binary = await _back(server, "raw:binary", Position(0, epoch["raw:binary"]), format="protobuf")
        assert binary == (True, [bytes(range(256)), b""])
        assert (await _back(server, "chat:removed", Position(5, epoch["chat:removed"])))[0] is False
        assert await _back(server, "chat:removed", Position(6, epoch["chat:removed"])) == (True, [7, 8])
        assert (await _back(server, "mortal:gone", Position(3, "AwRHCbkP")))[0] is False
        assert (await _back(server, "short:unswept", Position(14, epoch["short:unswept"])))[0] is False
        again = {"channel": "chat:keys", "data": 0, "idempotency_key": "k2"}
        for _ in range(2):
            answer = (await ask(server.port, "/api/publish", headers=KEY, body=again)).json
            assert answer == {"result": {"offset": 2, "epoch": epoch["chat:keys"]}}
            assert (await _publish(server, "chat:plain", "new"))["offset"] in (5, 6)
            server.kill()
            server.start()
        since = Position(3, epoch["chat:plain"])
        assert await _back(server, "chat:plain", since) == (True, ["\U0001f30a", "new", "new"])
        listed = (await ask(server.port, "/api/blocked_users", headers=KEY, body={})).json["result"]["blocks"]
        assert {one["user"] for one in listed} == {"ann", "bob"}


async def _publish(server: Process, channel: str, data: Any) -> dict[str, Any]:
    body = {"channel": channel, "data": data}
    found: dict[str, Any] = (await ask(server.port, "/api/publish", headers=KEY, body=body)).json["result"]
    return found


# --- a format of a time to come --------------------------------------------------------
async def test_an_older_server_changes_nothing(store: Store) -> None:
    """What is of the format after today's is refused by either seam in words that say what to do, and left alone."""
    store.note_newer()
    before = store.everything()
    for seam in (store.history(), store.blocks()):
        with pytest.raises(Unavailable, match=r"newer version.*upgrade the server"):
            await seam.open()
        await seam.close()
    assert store.everything() == before


def test_an_older_server_does_not_begin(tmp_path: Path) -> None:
    """On a file of a format to come the program ends at once, with one line that says why."""
    store = FileStore(tmp_path)
    store.note_newer()
    before = store.everything()
    (tmp_path / "config.json").write_text(json.dumps(_config(store)))
    arguments = ["--port", "0", "--config", str(tmp_path / "config.json")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "server.failed" in line]
    assert "newer version of this server" in line
    assert "upgrade the server" in line
    assert "Traceback" not in done.stderr
    assert store.everything() == before


async def test_an_older_server_at_a_newer_database(database_store: DatabaseStore, tmp_path: Path) -> None:
    """It runs, as with a database that is away, says why it is not ready, and takes nothing that it would store."""
    database_store.note_newer()
    before = database_store.everything()
    with Process(tmp_path, _config(database_store)) as server:
        ready = await ask(server.port, "/health/ready")
        assert ready.status == 503
        for part in ("history", "blocks"):
            assert "newer version of this server" in ready.json["reasons"][part]
            assert "upgrade the server" in ready.json["reasons"][part]
        for method, body in (("publish", {"channel": "chat:plain", "data": 1}), ("block_user", {"user": "dan"})):
            answer = (await ask(server.port, f"/api/{method}", headers=KEY, body=body)).json
            assert answer["error"]["code"] == 100, method
    assert database_store.everything() == before


# --- an upgrade that is cut short -------------------------------------------------------
KILLED = """
import asyncio, os, shutil, signal, sqlite3, sys
from server.history.sqlite import SqliteHistory

sys.path[:0] = {path!r}
original, copy = sys.argv[1:]
connect = sqlite3.connect


def killing(at):
    statements = 0

    def trace(statement):
        nonlocal statements
        statements += 1
        if statements == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def connect_traced(*arguments, **options):
        db = connect(*arguments, **options)
        db.set_trace_callback(trace)
        return db

    return connect_traced


async def adopt():
    history = SqliteHistory(copy)
    await history.open()
    await history.close()


at = killed = 0
while True:
    at += 1
    shutil.copyfile(original, copy)
    child = os.fork()
    if not child:
        sqlite3.connect = killing(at)
        asyncio.run(adopt())
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        break
    killed += 1
    db = connect(copy)
    (version,) = db.execute("PRAGMA user_version").fetchone()
    names = [row[1] for row in db.execute("PRAGMA table_info(channels)")]
    db.close()
    assert (version, "version_epoch" in names, "version" in names) in ((1, False, False), (2, True, True)), at
    asyncio.run(adopt())
    db = connect(copy)
    rows = db.execute("SELECT name, epoch, top, floor, used_ms, version, version_epoch FROM channels").fetchall()
    print(version, rows)
    db.close()
    for end in ("", "-wal", "-shm"):
        if os.path.exists(copy + end):
            os.remove(copy + end)
print("survived", killed, os.waitstatus_to_exitcode(status))
"""
"""Opens a copy again and again, killed at its first statement, its second, …; then opens what is left."""


def test_killed_at_each_statement_of_an_upgrade(tmp_path: Path) -> None:
    """A file is of the one schema or of the other, whenever the process is killed, and the next start completes it."""
    script = KILLED.format(path=[str(ROOT)])
    arguments = [str(FOLDER / "history.db"), str(tmp_path / "copy.db")]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    word, killed, code = last.split()
    assert (word, int(killed), code) == ("survived", len(lines), "0")
    assert len({line[2:] for line in lines}) == 1, "each time the same in the end"
    assert {line[0] for line in lines} == {"1", "2"}, "killed before it was done, and after"


async def test_killed_while_an_index_is_made(database_store: DatabaseStore, tmp_path: Path) -> None:
    """A process killed between the format's number and the index leaves a database that the next one completes."""
    store, was = database_store, database_store.was("history")
    primary = shared_set().primary()
    server = Process(tmp_path, _config(store))
    primary.command({"configureFailPoint": "hangAfterSettingUpIndexBuild", "mode": "alwaysOn"})
    program = [sys.executable, str(ROOT / "run.py"), *server.arguments]
    # It prints that it listens only after ``open``, which hangs.
    popen = await asyncio.to_thread(subprocess.Popen, program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        builds = {"currentOp": 1, "command.createIndexes": "log", "command.$db": store.database.name}
        async with asyncio.timeout(PATIENCE_S):
            while not primary.command(builds)["inprog"]:
                assert popen.poll() is None, "it ended by itself"
                await turn()
        assert store.database["meta"].find_one({"_id": "format"}) == {"_id": "format", "version": FORMAT}
    finally:
        popen.kill()
        popen.wait()
        primary.command({"configureFailPoint": "hangAfterSettingUpIndexBuild", "mode": "off"})
    with server:
        await _ready(server)
        assert set(store.database["log"].index_information()) == {"_id_", "keys", "due", "versions"}
        since = Position(2, was["chat:plain"]["epoch"])
        assert await _back(server, "chat:plain", since) == (True, [None, "\U0001f30a"])


async def _ready(server: Process) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while (await ask(server.port, "/health/ready")).status != 200:
            continue


async def turn() -> None:
    """One turn of the loop, in which others go on."""
    await asyncio.sleep(0)
