"""SQLite history when things go wrong: real locks, full disks, damaged files, killed processes."""

import asyncio
import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
from conftest import ExpectedLog
from patience import awake

from server.errors import Unavailable
from server.history import Appended, Draft, Version
from server.history.sqlite import SWEEP_ROWS, SqliteHistory
from server.history.sqlite_file import SCHEMA_VERSION, SWITCH_S
from server.stream import Page, Position, Retention

ROOT = Path(__file__).parents[2]
NOW = 1_800_000_000_000
FOREVER = Retention(-1, -1, -1)


@asynccontextmanager
async def opened(path: Path, **options: Any) -> AsyncIterator[SqliteHistory]:
    """A history in the file ``path``."""
    history = SqliteHistory(path, **options)
    await history.open()
    try:
        yield history
    finally:
        await history.close()


async def say(history: SqliteHistory, channel: str, *texts: str) -> list[int]:
    """Append some texts at once; gives their offsets."""
    appended = await asyncio.gather(*(history.append(channel, Draft(text.encode()), FOREVER, NOW) for text in texts))
    return [each.position.offset for each in appended]


async def everything(history: SqliteHistory, channel: str) -> Page:
    """All that is kept of a channel."""
    return await history.read(channel, FOREVER, NOW, limit=-1, max_bytes=1 << 30)


async def failing(*waiters: Any) -> list[str]:
    """Await all, each of which must be ``Unavailable``; gives their words."""
    outcomes = await asyncio.gather(*waiters, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Unavailable] * len(outcomes)
    return [str(outcome) for outcome in outcomes]


def script(body: str, *arguments: str, **options: Any) -> "subprocess.Popen[str]":
    """Start ``body``, the inside of an ``async`` function, in a Python of its own."""
    lines = [
        "import asyncio, itertools, json, logging, os, resource, sys",
        "from server.errors import Unavailable",
        "from server.history import Draft",
        "from server.history.sqlite import SqliteHistory",
        "from server.stream import Retention",
        f"NOW, FOREVER = {NOW}, Retention(-1, -1, -1)",
        "async def main():",
        *(f"    {line}" for line in body.splitlines()),
        "asyncio.run(main())",
    ]
    command = [sys.executable, "-c", "\n".join(lines), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, **options)


async def line_of(process: "subprocess.Popen[str]") -> str:
    """The next line that ``process`` prints."""
    assert process.stdout is not None
    return await asyncio.get_running_loop().run_in_executor(None, process.stdout.readline)


def state(path: Path, outside: sqlite3.Connection) -> tuple[Any, ...]:
    """What changes when anything is written: as another connection sees it, and in the write-ahead log."""
    wal = Path(f"{path}-wal").stat()
    return outside.execute("PRAGMA data_version").fetchone(), wal.st_size, wal.st_mtime_ns


def rows(path: Path, table: str) -> int:
    """How many rows the file has in a table, as another program sees it."""
    with closing(sqlite3.connect(path)) as outside:
        (count,) = outside.execute(f"SELECT count(*) FROM {table}").fetchone()
    assert isinstance(count, int)
    return count


# --- faults while running -----------------------------------------------------------


async def test_a_locked_file_costs_appends_and_passes(tmp_path: Path, log: ExpectedLog) -> None:
    """While another program holds the write lock appends are Unavailable, logged once; reads go on; then both."""
    log.expect("history.commit_failed")
    path = tmp_path / "h.db"
    async with opened(path) as history:
        await say(history, "a", "1")
        with closing(sqlite3.connect(path, isolation_level=None)) as outside:
            outside.execute("BEGIN EXCLUSIVE")
            for _ in range(2):
                appends = [history.append(name, Draft(b""), FOREVER, NOW) for name in "aabc"]
                reading, words = await asyncio.gather(everything(history, "a"), failing(*appends))
                assert reading.top.offset == 1
                assert all(str(path) in each and "locked by another program" in each for each in words)
            outside.execute("ROLLBACK")
        assert await say(history, "a", "2", "3") == [2, 3]
    assert len(log.seen("history.commit_failed")) == len(log.seen("history.commit_recovered")) == 1


async def test_a_file_that_cannot_grow_costs_appends_and_passes(tmp_path: Path) -> None:
    """Without room to grow appends are Unavailable, logged once; with room again they go on, and nothing is lost."""
    body = """
history = SqliteHistory(sys.argv[1])
await history.open()
events = []
class Collector(logging.Handler):
    def emit(self, record):
        events.append(record.getMessage())
logging.getLogger("waterspout").addHandler(Collector())
logging.getLogger("waterspout").setLevel(logging.INFO)
async def fill(count):
    stored, failed = [], []
    for n in range(count):
        try:
            appended = await history.append("a", Draft(os.urandom(20_000)), FOREVER, NOW)
            stored.append(appended.position.offset)
        except Unavailable as error:
            failed.append(str(error))
    return stored, failed
before, _ = await fill(3)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
full, failed = await fill(20)
kept = (await history.read("a", FOREVER, NOW, limit=0)).top.offset
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
after, _ = await fill(3)
page = await history.read("a", FOREVER, NOW, limit=-1, max_bytes=1 << 30)
await history.close()
stored = [each.offset for each in page.publications]
print(json.dumps([before + full, failed, kept, after, stored, events]))
"""
    with script(body, str(tmp_path / "h.db")) as process:
        out, _ = process.communicate(timeout=60)
    acknowledged, failed, kept, after, stored, events = json.loads(out)
    assert failed
    assert all("full or failing disk" in words or "disk is full" in words for words in failed)
    assert kept >= acknowledged[-1]
    assert stored == list(range(1, len(stored) + 1))
    assert set(acknowledged + after) <= set(stored)
    assert events == ["history.commit_failed", "history.commit_recovered"]
    async with opened(tmp_path / "h.db") as history:
        assert [each.offset for each in (await everything(history, "a")).publications] == stored


async def test_a_file_overwritten_under_the_server_is_unavailable(tmp_path: Path, log: ExpectedLog) -> None:
    """Garbage is never served: reads and appends are Unavailable, logged once each; the file put back serves again."""
    log.expect("history.commit_failed", "history.read_failed")
    path = tmp_path / "h.db"
    async with opened(path) as history:
        for channel in ("a", "b"):
            await say(history, channel, *("x" * 1_000 for _ in range(300)))
    good = path.read_bytes()
    async with opened(path) as history:
        assert (await everything(history, "a")).top.offset == 300

        def overwrite(content: bytes) -> None:
            # From another process: closing a file here would take SQLite's own locks on it away.
            subprocess.run(["dd", f"of={path}", "conv=notrunc", "status=none"], input=content, check=True)

        overwrite(os.urandom(len(good)))
        for _ in range(2):
            words = await failing(everything(history, "b"), history.append("b", Draft(b""), FOREVER, NOW))
            assert all(str(path) in each and "damaged" in each for each in words)
        overwrite(good)
        assert (await everything(history, "b")).top.offset == 300
        assert await say(history, "b", "after") == [301]
    assert len(log.seen("history.commit_failed")) == len(log.seen("history.read_failed")) == 1


async def test_a_missing_publication_is_damage_not_a_hole(tmp_path: Path, log: ExpectedLog) -> None:
    """Who deletes a row by hand gets Unavailable, never a page with a hole; other channels and the sweep go on."""
    log.expect("history.read_failed")
    path = tmp_path / "h.db"
    ttl = Retention(-1, 1_000, -1)
    async with opened(path) as history:
        await say(history, "a", "1", "2", "3", "4")
        await say(history, "b", "1", "2")
        with closing(sqlite3.connect(path)) as outside, outside:
            outside.execute("DELETE FROM publications WHERE offset=3 OR (channel=1 AND offset=1)")
        for reverse in (False, True):
            (words,) = await failing(history.read("a", FOREVER, NOW, reverse=reverse))
            assert "is missing" in words
        await failing(history.read("a", ttl, NOW))
        assert [each.offset for each in (await history.read("a", FOREVER, NOW, since=3)).publications] == [4]
        await history.sweep(lambda channel: ttl, NOW + 1_000)
        assert (await history.read("b", FOREVER, NOW)).floor == 2


@pytest.mark.parametrize("replaced", [False, True], ids=["moved", "replaced"])
async def test_a_file_taken_away_is_not_written_on(replaced: bool, tmp_path: Path, log: ExpectedLog) -> None:
    """Acknowledging into a file without a name would lose it all; no new file is begun; put back, it goes on."""
    log.expect("history.commit_failed", "history.read_failed")
    path, away = tmp_path / "h.db", tmp_path / "away.db"
    async with opened(path) as history:
        await say(history, "a", "1")
        path.rename(away)
        if replaced:
            path.touch()
        for _ in range(2):
            await failing(history.append("a", Draft(b"2"), FOREVER, NOW), everything(history, "a"))
        assert path.exists() == replaced
        away.replace(path)
        assert await say(history, "a", "2") == [2]
        assert (await everything(history, "a")).top.offset == 2


async def test_a_listener_that_raises_costs_nobody_an_answer(tmp_path: Path, log: ExpectedLog) -> None:
    """A fault in on_commit is logged; the commit stands, and the others in the batch are told."""
    log.expect("history.listener_failed")
    heard: list[str] = []

    def listen(channel: str, epoch: str, publications: object) -> None:
        if channel == "a":
            raise LookupError(channel)
        heard.append(channel)

    async with opened(tmp_path / "h.db") as history:
        history.on_commit = listen
        appends = [history.append(name, Draft(b""), FOREVER, NOW) for name in "abc"]
        assert [each.position.offset for each in await asyncio.gather(*appends)] == [1, 1, 1]
    assert heard == ["b", "c"]
    assert log.seen("history.listener_failed") == [{"channel": "a"}]


async def test_a_fault_of_ours_in_a_batch_answers_all_and_passes(tmp_path: Path, log: ExpectedLog) -> None:
    """An epoch source that raises fails its batch as Unavailable, logged as our fault; nothing of it is stored."""
    log.expect("history.batch_failed")
    epochs: list[str] = []

    def source() -> str:
        return epochs.pop()

    async with opened(tmp_path / "h.db", epoch_source=source) as history:
        await failing(*(history.append(name, Draft(b""), FOREVER, NOW) for name in "ab"))
        assert await history.tops("ab") == {}
        epochs += ["two", "one"]
        assert await say(history, "a", "1", "2") == [1, 2]
        assert (await everything(history, "a")).top.epoch == "one"


@pytest.mark.parametrize(
    ("channel", "draft"),
    [("\ud800", Draft(b"")), ("a", Draft(b"", key="\ud800")), ("a", Draft(b"", tags={"k": "\udfff"}))],
    ids=["channel", "key", "tags"],
)
async def test_text_that_is_no_unicode_harms_nobody_else(channel: str, draft: Draft, tmp_path: Path) -> None:
    """It is refused before it is queued, since in a transaction it would fail the whole batch."""
    async with opened(tmp_path / "h.db") as history:
        outcomes = await asyncio.gather(
            history.append("a", Draft(b"1"), FOREVER, NOW),
            history.append(channel, draft, FOREVER, NOW),
            history.append("a", Draft(b"2"), FOREVER, NOW),
            return_exceptions=True,
        )
        assert isinstance(outcomes[1], ValueError)
        assert [each.position.offset for each in outcomes if isinstance(each, Appended)] == [1, 2]


async def test_a_busy_loop_does_not_starve_the_writer(tmp_path: Path) -> None:
    """Beside an event loop that never idles, in turns of 0.3 ms, an append still takes far less than a publish may."""
    async with opened(tmp_path / "h.db") as history:
        assert sys.getswitchinterval() <= SWITCH_S * 1.01
        done = False

        async def spin() -> None:
            while not done:
                end = time.perf_counter() + 0.0003
                while time.perf_counter() < end:
                    pass
                await asyncio.sleep(0)

        spinning = asyncio.ensure_future(spin())
        for _ in range(30):
            async with awake() as watch:
                await history.append("a", Draft(b""), FOREVER, NOW)
            assert watch.s < 3
        done = True
        await spinning


# --- opening --------------------------------------------------------------------------


async def refusal(path: Path) -> str:
    """What ``open`` says of a path it cannot use; it must have let go of everything."""
    history = SqliteHistory(path)
    with pytest.raises(Unavailable) as unavailable:
        await history.open()
    with pytest.raises(Unavailable):
        await history.append("a", Draft(b""), FOREVER, NOW)
    await history.close()
    return str(unavailable.value)


@pytest.mark.parametrize("garbage", [b"no database at all, but some text. " * 200, bytes(range(256)) * 64])
async def test_garbage_is_refused_and_left_alone(garbage: bytes, tmp_path: Path) -> None:
    """A file that is no database is named as that, and not touched."""
    path = tmp_path / "h.db"
    path.write_bytes(garbage)
    assert f"{path} is no SQLite database" in await refusal(path)
    assert path.read_bytes() == garbage


def foreign(db: sqlite3.Connection) -> None:
    """Another program's table."""
    db.execute("CREATE TABLE invoices (id INTEGER)")


def foreign_mark(db: sqlite3.Connection) -> None:
    """Another program's mark, nothing else yet."""
    db.execute("PRAGMA application_id=7")


def newer(db: sqlite3.Connection) -> None:
    """Ours, of a time to come."""
    db.execute(f"PRAGMA application_id={int.from_bytes(b'wspt', 'big')}")
    db.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")


@pytest.mark.parametrize(
    ("make", "words"),
    [(foreign, "another program"), (foreign_mark, "another program"), (newer, f"schema {SCHEMA_VERSION + 1}")],
)
async def test_a_file_that_is_not_ours_is_refused_and_left_alone(
    make: Callable[[sqlite3.Connection], None], words: str, tmp_path: Path
) -> None:
    """Another program's database, or a newer version's, is not changed by as much as its journal mode."""
    path = tmp_path / "h.db"
    with closing(sqlite3.connect(path)) as db, db:
        make(db)
    before = path.read_bytes()
    said = await refusal(path)
    assert str(path) in said
    assert words in said
    assert path.read_bytes() == before


OLD_SCHEMA = """
CREATE TABLE channels (id INTEGER PRIMARY KEY, name TEXT UNIQUE, epoch TEXT NOT NULL, top INTEGER NOT NULL,
    floor INTEGER NOT NULL, used_ms INTEGER NOT NULL);
CREATE TABLE publications (channel INTEGER NOT NULL, offset INTEGER NOT NULL, time_ms INTEGER NOT NULL,
    data BLOB NOT NULL, extra BLOB, PRIMARY KEY (channel, offset)) WITHOUT ROWID;
CREATE TABLE keys (channel INTEGER NOT NULL, key TEXT NOT NULL, offset INTEGER NOT NULL, epoch TEXT NOT NULL,
    expires_ms INTEGER NOT NULL, PRIMARY KEY (channel, key)) WITHOUT ROWID;
CREATE INDEX keys_by_expiry ON keys (expires_ms);
INSERT INTO channels VALUES (1, 'a', 'epoch', 2, 0, 1800000000000);
INSERT INTO publications VALUES (1, 1, 1800000000000, x'31', NULL), (1, 2, 1800000000000, x'32', NULL);
INSERT INTO keys VALUES (1, 'k', 2, 'epoch', 1900000000000);
"""


async def test_a_file_of_an_older_schema_goes_on(tmp_path: Path) -> None:
    """What schema 1 holds is all there, and versions are kept from then on."""
    path = tmp_path / "h.db"
    with closing(sqlite3.connect(path)) as db:
        db.executescript(OLD_SCHEMA)
        db.execute(f"PRAGMA application_id={int.from_bytes(b'wspt', 'big')}")
        db.execute("PRAGMA user_version=1")
    versioned = Draft(b"3", version=Version(1, "x"))
    for turn in range(2):
        async with opened(path) as history:
            again = await history.append("a", Draft(b"", key="k"), FOREVER, NOW)
            assert again == Appended(Position(2, "epoch"), repeated=True)
            assert await history.append("a", versioned, FOREVER, NOW) == Appended(Position(3, "epoch"), turn == 1)
            page = await history.read("a", FOREVER, NOW)
            assert [each.data for each in page.publications] == [b"1", b"2", b"3"]


async def test_a_path_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    """A missing directory, a file where a directory should be, a directory where the file should be."""
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    for path, words in (
        (tmp_path / "missing" / "h.db", "No such file or directory"),
        (tmp_path / "file" / "h.db", "Not a directory"),
        (tmp_path / "directory", "cannot be opened"),
    ):
        said = await refusal(path)
        assert str(path) in said
        assert words in said


def test_a_directory_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    """Without the permission to make the file, open says so with the path; also when the tests run as root."""
    body = """
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    await SqliteHistory(sys.argv[1]).open()
except Unavailable as error:
    print(error)
"""
    tmp_path.chmod(0o500)
    path = tmp_path / "h.db"
    with script(body, str(path)) as process:
        out, _ = process.communicate(timeout=60)
    tmp_path.chmod(0o700)
    assert f"{path} cannot be used for history" in out
    assert "Permission denied" in out
    assert list(tmp_path.iterdir()) == []


async def test_a_second_process_on_the_file_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    """The words name the file and the process that has it; kill -9 sets it free."""
    path = tmp_path / "h.db"
    body = """
history = SqliteHistory(sys.argv[1])
await history.open()
print("open", flush=True)
sys.stdin.read()
"""
    with script(body, str(path)) as process:
        assert await line_of(process) == "open\n"
        said = await refusal(path)
        process.kill()
    assert f"{path} is in use by another server, process {process.pid}" in said
    async with opened(path) as history:
        assert await say(history, "a", "1") == [1]


async def test_two_names_of_one_file_are_one_file(tmp_path: Path) -> None:
    """A link to the file does not get around the lock, nor does the same process."""
    path, link = tmp_path / "h.db", tmp_path / "link.db"
    async with opened(path):
        link.symlink_to(path)
        assert "is in use by another server" in await refusal(link)
        assert "is in use by another server" in await refusal(path)


async def test_a_closed_history_says_so_and_opens_again(tmp_path: Path) -> None:
    """After close everything is Unavailable, closing twice is harmless, and open starts over."""
    history = SqliteHistory(tmp_path / "h.db")
    await failing(history.append("a", Draft(b""), FOREVER, NOW))
    await history.open()
    with pytest.raises(RuntimeError, match="open already"):
        await history.open()
    await say(history, "a", "1")
    await history.close()
    await history.close()
    await failing(
        history.append("a", Draft(b""), FOREVER, NOW),
        everything(history, "a"),
        history.tops(["a"]),
        history.remove("a"),
        history.sweep(lambda channel: None, NOW),
        history.new_epochs(),
    )
    await history.open()
    assert await say(history, "a", "2") == [2]
    await history.close()


# --- kill -9 ------------------------------------------------------------------------------


async def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """P2: whatever a killed process had acknowledged is there, once, and every channel is contiguous."""
    path = tmp_path / "h.db"
    body = """
history = SqliteHistory(sys.argv[1])
await history.open()
async def appender(number):
    for turn in itertools.count():
        text = f"{number}.{turn}"
        appended = await history.append(f"channel {number % 4}", Draft(text.encode(), key=text), FOREVER, NOW)
        print(number % 4, appended.position.offset, text, flush=True)
await asyncio.gather(*(appender(number) for number in range(20)))
"""
    acknowledged: dict[tuple[str, int], str] = {}
    for life in range(3):
        with script(body.replace("{number}.", f"{life}.{{number}}."), str(path)) as process:
            for _ in range(400 + 57 * life):
                channel, offset, text = (await line_of(process)).split()
                acknowledged[f"channel {channel}", int(offset)] = text
            process.kill()
            process.wait()
            assert process.stdout is not None
            out = process.stdout.read()
        # What had been printed when the signal came was acknowledged, too; the last line may be cut.
        for line in out.splitlines(keepends=True):
            if line.endswith("\n"):
                channel, offset, text = line.split()
                acknowledged[f"channel {channel}", int(offset)] = text
        assert process.returncode == -signal.SIGKILL
        async with opened(path) as history:
            stored: dict[tuple[str, int], str] = {}
            for channel in (f"channel {n}" for n in range(4)):
                page = await everything(history, channel)
                assert [each.offset for each in page.publications] == list(range(1, page.top.offset + 1))
                stored.update({(channel, each.offset): each.data.decode() for each in page.publications})
            assert acknowledged.items() <= stored.items()
            assert len(set(stored.values())) == len(stored)


# --- what is on the disk -----------------------------------------------------------------


async def test_the_sweep_erases_rows_in_bounded_steps(tmp_path: Path) -> None:
    """One call erases at most SWEEP_ROWS, later ones the rest, of a removed and of a forgotten channel."""
    path = tmp_path / "h.db"
    many = SWEEP_ROWS * 2 // 1_000 + 1
    async with opened(path) as history:
        for turn in range(many):
            drafts = [Draft(b"", key=f"{turn}.{n}") for n in range(1_000)]
            await asyncio.gather(*(history.append("a", draft, FOREVER, NOW) for draft in drafts))
        await history.remove("a")
        assert rows(path, "publications") == many * 1_000 - SWEEP_ROWS
        fades = Retention(-1, -1, 1)
        left = [rows(path, "publications") + rows(path, "keys")]
        while rows(path, "channels"):
            await history.sweep(lambda channel: fades, NOW + 1)
            left.append(rows(path, "publications") + rows(path, "keys"))
            # Forgotten is forgotten at once, while there are still keys to erase.
            assert (await history.tops(["a"]) == {}) == (rows(path, "keys") < many * 1_000)
        steps = [before - after for before, after in itertools.pairwise(left)]
        # A channel's last payloads and first keys go in one call.
        assert all(0 <= step <= 2 * SWEEP_ROWS for step in steps)
        assert left[-1] == 0


async def test_a_forgotten_channel_begins_anew_while_its_rows_are_erased(tmp_path: Path) -> None:
    """The name is free at once: another epoch, offset 1, and none of the old keys, which are still on the disk."""
    path = tmp_path / "h.db"
    fades = Retention(-1, 1, 1)
    async with opened(path) as history:
        drafts = [Draft(b"", key=f"{n}") for n in range(SWEEP_ROWS + 1)]
        for start in range(0, len(drafts), 1_000):
            await asyncio.gather(*(history.append("a", each, FOREVER, NOW) for each in drafts[start : start + 1_000]))
        old = (await everything(history, "a")).top
        while await history.tops(["a"]):
            await history.sweep(lambda channel: fades, NOW + 1)
        assert rows(path, "keys") > 0
        appended = [await history.append("a", each, FOREVER, NOW + 1) for each in (drafts[0], drafts[-1])]
        assert [(each.position.offset, each.repeated) for each in appended] == [(1, False), (2, False)]
        assert appended[0].position.epoch != old.epoch
        while rows(path, "channels") > 1:
            await history.sweep(lambda channel: FOREVER, NOW + 1)
        assert rows(path, "keys") == rows(path, "publications") == 2


async def test_expired_keys_leave_the_disk(tmp_path: Path) -> None:
    """Keys are erased after their time, the others stay."""
    path = tmp_path / "h.db"
    async with opened(path, idempotency_ttl_ms=1_000) as history:
        await history.append("a", Draft(b"", key="old"), FOREVER, NOW)
        await history.append("a", Draft(b"", key="new"), FOREVER, NOW + 500)
        await history.sweep(lambda channel: FOREVER, NOW + 1_000)
        with closing(sqlite3.connect(path)) as outside:
            assert outside.execute("SELECT key FROM keys").fetchall() == [("new",)]


async def test_a_sweep_with_nothing_to_erase_writes_nothing(tmp_path: Path) -> None:
    """Idle costs no disk: another connection sees no change, and the write-ahead log does not grow."""
    path = tmp_path / "h.db"
    async with opened(path) as history:
        await say(history, "a", "1")
        with closing(sqlite3.connect(path)) as outside:
            before = state(path, outside)
            for _ in range(3):
                await history.sweep(lambda channel: Retention(10, 1_000, 1_000), NOW)
            assert state(path, outside) == before
            await say(history, "a", "2")
            assert state(path, outside) != before
