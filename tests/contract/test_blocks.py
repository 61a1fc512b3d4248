"""The promises of ``server.blocks``, asked of every kind.

A kind joins by a line in ``KINDS``: how to make several at one store, as those of
several processes are, and whether what it keeps outlives them.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pymongo
import pytest
from mongod import disturbing, fresh_database, shared_set
from support import PATIENTLY

from server.blocks import BLOCKS, KEPT_MS, Block, Blocks, Record, adding, lifting
from server.blocks.memory import MemoryBlocks, Shelf
from server.blocks.mongo import MongoBlocks
from server.blocks.sqlite import SqliteBlocks
from server.errors import LIMIT_EXCEEDED, Refused, Unavailable
from server.settings import MongoSettings

NOW_MS = 1_800_000_000_000
NOW_S = NOW_MS // 1000


def memory(folder: Path) -> Callable[[], Blocks]:
    """Blocks of nodes inside one process."""
    shelf = Shelf()
    return lambda: MemoryBlocks(shelf)


def sqlite(folder: Path) -> Callable[[], Blocks]:
    """Blocks in one file."""
    return lambda: SqliteBlocks(folder / "blocks")


DATABASES: list[str] = []


def new_database() -> str:
    """A database for one test, which is dropped after it."""
    DATABASES.append(fresh_database())
    return DATABASES[-1]


@pytest.fixture(autouse=True)
def _databases() -> Iterator[None]:
    """Drops what the test has made: the more databases there are, the slower every one becomes."""
    yield
    while DATABASES:
        shared_set().drop(DATABASES.pop())


def mongo(driver: str) -> Callable[[Path], Callable[[], Blocks]]:
    """Blocks in one database of the shared replica set."""

    def place(folder: Path) -> Callable[[], Blocks]:
        options: Any = {"url": shared_set().url, "driver": driver, "publish_timeout": PATIENTLY}
        settings = MongoSettings(database=new_database(), **options)
        return lambda: MongoBlocks(settings)

    return place


class Kind(NamedTuple):
    """A kind under test; ``place`` is a store, which gives one after the other that looks at it."""

    name: str
    place: Callable[[Path], Callable[[], Blocks]]
    survives: bool = True


KINDS = [
    Kind("memory", memory, survives=False),
    Kind("sqlite", sqlite),
    Kind("mongo-motor", mongo("motor")),
    Kind("mongo-pymongo", mongo("pymongo")),
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
every_surviving_kind = pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind.survives], ids=lambda kind: kind.name
)


class Opened:
    """Some of a kind at one store, open for as long as the block lasts."""

    def __init__(self, make: Callable[[], Blocks], count: int) -> None:
        self._all = [make() for _ in range(count)]

    async def __aenter__(self) -> Sequence[Blocks]:
        for blocks in self._all:
            await blocks.open()
        return self._all

    async def __aexit__(self, *error: object) -> None:
        for blocks in self._all:
            await blocks.close()


@every_kind
async def test_what_was_changed_is_what_all_read(kind: Kind, tmp_path: Path) -> None:
    """A change that has returned is in whatever anybody reads from then on, with all that was said of it."""
    everywhere = Block(expire_at=NOW_S + 60, reason='he said "…" to $everybody')
    mute = Block("chat:lobby", muted=True)
    async with Opened(kind.place(tmp_path), 2) as (here, there):
        assert await there.records() == []
        await here.change("$ann", adding(everywhere), NOW_MS)
        record = await there.change("$ann", adding(mute), NOW_MS + 1)
        assert record.user == "$ann"
        assert record.blocks == (everywhere, mute)
        assert await here.records() == [record] == await there.records()
        lifted = await here.change("$ann", lifting("", muted=False), NOW_MS + 2)
        assert lifted.blocks == (mute,)
        assert await there.records() == [lifted]


@every_kind
async def test_one_block_for_each_thing(kind: Kind, tmp_path: Path) -> None:
    """The same block again takes the place of the first; one that has run out leaves with the next change."""
    async with Opened(kind.place(tmp_path), 1) as (blocks,):
        await blocks.change("ann", adding(Block("chat:1", expire_at=NOW_S + 1)), NOW_MS)
        await blocks.change("ann", adding(Block("chat:1", muted=True)), NOW_MS)
        record = await blocks.change("ann", adding(Block("chat:1", expire_at=NOW_S + 2)), NOW_MS)
        assert record.blocks == (Block("chat:1", muted=True), Block("chat:1", expire_at=NOW_S + 2))
        record = await blocks.change("ann", lifting("chat:2", muted=False), NOW_MS + 5000)
        assert record.blocks == (Block("chat:1", muted=True),)


@every_kind
async def test_revisions_rise_whatever_the_clock_says(kind: Kind, tmp_path: Path) -> None:
    """Clocks of processes differ, and two changes fall into one millisecond: the later has the higher revision."""
    async with Opened(kind.place(tmp_path), 2) as (here, there):
        first = await here.change("ann", adding(Block()), NOW_MS)
        second = await there.change("ann", lifting("", muted=False), NOW_MS)
        third = await here.change("ann", adding(Block()), NOW_MS - 60_000)
        assert first.revision < second.revision < third.revision
        await here.forget([third])
        assert await there.records() == []
        fourth = await there.change("ann", adding(Block()), NOW_MS + KEPT_MS - 60_000)
        assert fourth.revision > third.revision


@every_kind
async def test_those_who_change_at_once_undo_nothing(kind: Kind, tmp_path: Path) -> None:
    """Of changes that race, in one process and in two, none is lost."""
    async with Opened(kind.place(tmp_path), 2) as both:
        changes = [
            both[number % 2].change("ann", adding(Block(f"chat:{number}")), NOW_MS + number) for number in range(12)
        ]
        records = await asyncio.gather(*changes)
        assert len({record.revision for record in records}) == 12
        (record,) = await both[0].records()
        assert {block.channel for block in record.blocks} == {f"chat:{number}" for number in range(12)}


@every_kind
async def test_what_is_new_can_be_asked_for_alone(kind: Kind, tmp_path: Path) -> None:
    """With a revision only what was changed since is read."""
    async with Opened(kind.place(tmp_path), 1) as (blocks,):
        await blocks.change("ann", adding(Block()), NOW_MS)
        new = await blocks.change("ben", adding(Block()), NOW_MS + 10)
        assert await blocks.records(NOW_MS + 1) == [new]
        assert len(await blocks.records(NOW_MS)) == 2


@every_kind
async def test_only_what_was_read_is_forgotten(kind: Kind, tmp_path: Path) -> None:
    """Who has been blocked again since somebody found the old record empty stays blocked."""
    async with Opened(kind.place(tmp_path), 2) as (here, there):
        await here.change("ann", adding(Block()), NOW_MS)
        empty = await here.change("ann", lifting("", muted=False), NOW_MS)
        again = await there.change("ann", adding(Block()), NOW_MS)
        await here.forget([empty])
        assert await here.records() == [again]
        await here.forget([again])
        await here.forget([])
        assert await there.records() == []


@every_kind
async def test_a_user_has_so_many_blocks_at_most(kind: Kind, tmp_path: Path) -> None:
    """Beyond ``BLOCKS`` a further one is refused, and nothing is changed."""
    many = [Block(f"chat:{number}") for number in range(BLOCKS)]
    async with Opened(kind.place(tmp_path), 1) as (blocks,):
        full = await blocks.change("ann", lambda _: many, NOW_MS)
        with pytest.raises(Refused) as refused:
            await blocks.change("ann", adding(Block("one more")), NOW_MS)
        assert refused.value.refusal is LIMIT_EXCEEDED
        assert await blocks.records() == [full]
        assert len((await blocks.change("ann", adding(Block("chat:1")), NOW_MS)).blocks) == BLOCKS


@every_surviving_kind
async def test_it_is_there_after_a_restart(kind: Kind, tmp_path: Path) -> None:
    """What was changed is on the disk: another process finds it."""
    make = kind.place(tmp_path)
    async with Opened(make, 1) as (blocks,):
        record = await blocks.change("ann", adding(Block(reason="spam")), NOW_MS)
    async with Opened(make, 1) as (blocks,):
        assert await blocks.records() == [record]


@every_kind
async def test_closed_it_says_so(kind: Kind, tmp_path: Path) -> None:
    """Before ``open`` and after ``close`` everything is ``Unavailable``; it can be opened again."""
    blocks = kind.place(tmp_path)()
    for _ in range(2):
        with pytest.raises(Unavailable):
            await blocks.records()
        with pytest.raises(Unavailable):
            await blocks.change("ann", adding(Block()), NOW_MS)
        await blocks.open()
        await blocks.records()
        await blocks.close()
    await blocks.close()


def test_what_can_be_forgotten() -> None:
    """A record in which nothing holds, once nobody can be told late of how it came about."""
    assert Record("ann", NOW_MS).forgettable_ms == NOW_MS + KEPT_MS
    assert Record("ann", NOW_MS, (Block(),)).forgettable_ms is None
    soon, late = Block("chat:1", expire_at=NOW_S + 1), Block("chat:2", expire_at=NOW_S + 2 * KEPT_MS // 1000)
    assert Record("ann", NOW_MS, (soon,)).forgettable_ms == NOW_MS + KEPT_MS
    assert Record("ann", NOW_MS, (late, soon)).forgettable_ms == NOW_MS + 2 * KEPT_MS
    assert Record("ann", NOW_MS, (late, Block("chat:3"))).forgettable_ms is None


# --- faults of a store ------------------------------------------------------------
async def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    """A database of another program, a newer version's and what is none at all are refused in words."""
    foreign = tmp_path / "foreign"
    connection = sqlite3.connect(foreign)
    connection.execute("CREATE TABLE theirs (a)")
    connection.close()
    with pytest.raises(Unavailable, match="another program"):
        await SqliteBlocks(foreign).open()
    (tmp_path / "text").write_text("no database at all, but longer than a header of one" * 10)
    with pytest.raises(Unavailable, match="not a database"):
        await SqliteBlocks(tmp_path / "text").open()
    with pytest.raises(Unavailable, match="unable to open"):
        await SqliteBlocks(tmp_path / "nowhere" / "blocks").open()
    newer = tmp_path / "newer"
    async with Opened(lambda: SqliteBlocks(newer), 1):
        pass
    connection = sqlite3.connect(newer)
    connection.execute("PRAGMA user_version = 9")
    connection.close()
    with pytest.raises(Unavailable, match="newer version"):
        await SqliteBlocks(newer).open()


@pytest.mark.usefixtures("as_in_service")
async def test_a_locked_file_is_a_fault_that_passes(tmp_path: Path) -> None:
    """Another program that writes makes a change ``Unavailable``; when it is done, changes are made again."""
    async with Opened(lambda: SqliteBlocks(tmp_path / "blocks"), 1) as (blocks,):
        await blocks.change("ann", adding(Block()), NOW_MS)
        connection = sqlite3.connect(tmp_path / "blocks", isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(Unavailable, match="locked"):
            await blocks.change("ann", lifting("", muted=False), NOW_MS)
        connection.execute("ROLLBACK")
        connection.close()
        assert (await blocks.change("ann", lifting("", muted=False), NOW_MS)).blocks == ()


async def test_a_document_that_is_not_ours_is_named(tmp_path: Path) -> None:
    """What somebody else has put among the records is a fault in words, and not a trace."""
    database = new_database()
    options: Any = {"url": shared_set().url, "publish_timeout": PATIENTLY}
    async with Opened(lambda: MongoBlocks(MongoSettings(database=database, **options)), 1) as (blocks,):
        with pymongo.MongoClient[dict[str, Any]](shared_set().url) as client:
            client[database]["blocks"].insert_one({"_id": "ann", "revision": "one"})
        with pytest.raises(Unavailable, match="not ours"):
            await blocks.records()


@pytest.mark.parametrize("driver", ["motor", "pymongo"])
async def test_a_cut_is_an_unknown_outcome_and_the_same_change_again_is_harmless(
    driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that cuts each attempt makes a change ``Unavailable``; made again it holds once."""
    with disturbing(shared_set()) as replica_set:
        async with Opened(mongo(driver)(Path()), 2) as (here, there):
            assert isinstance(here, MongoBlocks)
            await here.change("ann", adding(Block("chat:1")), NOW_MS)
            member = await asyncio.to_thread(replica_set.primary)
            await asyncio.to_thread(lambda: member.fail("update", times=100_000, closeConnection=True))
            with monkeypatch.context() as hurried:
                hurried.setattr(here._server, "attempt_s", 2.0)
                with pytest.raises(Unavailable):
                    await here.change("ann", adding(Block()), NOW_MS)
            await asyncio.to_thread(member.fail_no_more)
            record = await here.change("ann", adding(Block()), NOW_MS)
            assert record.blocks == (Block("chat:1"), Block())
            assert await there.records() == [record]
