"""The promises of ``server.history``, asked of every kind.

A kind joins by a line in ``KINDS``: how to open one on a place (a directory, in
which the same history is found again), and what it can.
"""

import asyncio
import itertools
import tempfile
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mongod import fresh_database, shared_set
from support import PATIENTLY

from server.errors import TOO_MANY_REQUESTS, UNRECOVERABLE_POSITION, Refused, Unavailable
from server.history import (
    HIGHEST_VERSION,
    IDEMPOTENCY_TTL_MS,
    QUEUE_PUBLICATIONS,
    Appended,
    Draft,
    History,
    Version,
)
from server.history.memory import Log, MemoryHistory
from server.history.mongo import MongoHistory
from server.history.sqlite import SqliteHistory
from server.settings import MongoSettings
from server.stream import ClientInfo, Page, Position, Publication, Retention

NOW = 1_800_000_000_000
FOREVER = Retention(-1, -1, -1)


@asynccontextmanager
async def memory(place: Path, *, idempotency_ttl_ms: int = IDEMPOTENCY_TTL_MS) -> AsyncIterator[History]:
    """A history that is gone when it is closed, whatever the place."""
    history = MemoryHistory(idempotency_ttl_ms=idempotency_ttl_ms)
    await history.open()
    yield history
    await history.close()


@asynccontextmanager
async def sqlite(place: Path, *, idempotency_ttl_ms: int = IDEMPOTENCY_TTL_MS) -> AsyncIterator[History]:
    """A history in a file in ``place``."""
    history = SqliteHistory(place / "history.db", idempotency_ttl_ms=idempotency_ttl_ms)
    await history.open()
    try:
        yield history
    finally:
        await history.close()


DATABASES: dict[Path, str] = {}
"""The databases of the running test, by the place that stands for each."""


def mongo(driver: Literal["motor", "pymongo"]) -> Callable[..., AbstractAsyncContextManager[History]]:
    """How to open a history in the replica set of this run, in a database of its own for each place."""

    @asynccontextmanager
    async def opened(place: Path, *, idempotency_ttl_ms: int = IDEMPOTENCY_TTL_MS) -> AsyncIterator[History]:
        database = DATABASES.setdefault(place, fresh_database())
        options = {"url": shared_set().url, "database": database, "driver": driver, "publish_timeout": PATIENTLY}
        chosen = MongoSettings.model_validate(options)
        history = MongoHistory(chosen, idempotency_ttl_ms=idempotency_ttl_ms)
        await history.open()
        try:
            yield history
        finally:
            await history.close()

    return opened


@pytest.fixture(autouse=True)
def _databases() -> Iterator[None]:
    """Drops the databases of a test after it: the more there are, the slower every one becomes."""
    yield
    drop_databases()


def drop_databases() -> None:
    """Drop what the places stood for."""
    while DATABASES:
        shared_set().drop(DATABASES.popitem()[1])


class Kind(NamedTuple):
    """A kind under test: ``survives`` a restart; has ``queues`` that can be full; is ``shared`` by processes.

    ``examples``: how many sequences of operations it is compared with the model in.
    """

    name: str
    opened: Callable[..., AbstractAsyncContextManager[History]]
    survives: bool
    queues: bool
    shared: bool = False
    examples: int = 60


KINDS = [
    Kind("memory", memory, survives=False, queues=False, examples=500),
    Kind("sqlite", sqlite, survives=True, queues=True, examples=100),
    Kind("mongo-motor", mongo("motor"), survives=True, queues=True, shared=True),
    # Another driver under the same code: what differs is how it is opened and closed, which each example does.
    Kind("mongo-pymongo", mongo("pymongo"), survives=True, queues=True, shared=True, examples=15),
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
every_shared_kind = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.shared], ids=lambda kind: kind.name)
every_surviving_kind = pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind.survives], ids=lambda kind: kind.name
)
every_queueing_kind = pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind.queues], ids=lambda kind: kind.name
)


async def say(history: History, channel: str, *texts: str, at_ms: int = NOW, retention: Retention = FOREVER) -> None:
    """Append some texts, one after another."""
    for text in texts:
        await history.append(channel, Draft(text.encode()), retention, at_ms)


def offsets(page: Page) -> list[int]:
    """The numbers on a page."""
    return [publication.offset for publication in page.publications]


def texts(page: Page) -> list[str]:
    """What the publications of a page say."""
    return [publication.data.decode() for publication in page.publications]


# --- numbering ------------------------------------------------------------------


@every_kind
async def test_concurrent_appends_are_numbered_without_hole_or_repeat(kind: Kind, tmp_path: Path) -> None:
    """100 appenders over 5 channels: 1, 2, 3 ... each, told to on_commit in order and before append returns."""
    heard: dict[str, list[Publication]] = defaultdict(list)
    epochs: dict[str, set[str]] = defaultdict(set)

    def listen(channel: str, epoch: str, publications: Sequence[Publication]) -> None:
        heard[channel] += publications
        epochs[channel].add(epoch)

    async def appender(number: int) -> list[tuple[str, int]]:
        mine = []
        for turn in range(20):
            channel = f"channel {(number + turn) % 5}"
            text = f"{number}.{turn}"
            appended = await history.append(channel, Draft(text.encode()), FOREVER, NOW)
            assert heard[channel][appended.position.offset - 1].data == text.encode()
            page = await history.read(channel, FOREVER, NOW, limit=0)
            assert page.top.offset >= appended.position.offset
            mine.append((channel, appended.position.offset))
        return mine

    async with kind.opened(tmp_path) as history:
        history.on_commit = listen
        given_out = list(itertools.chain(*await asyncio.gather(*(appender(number) for number in range(100)))))
        assert len(given_out) == len(set(given_out)) == 2000
        for channel in (f"channel {n}" for n in range(5)):
            page = await history.read(channel, FOREVER, NOW, limit=-1, max_bytes=10_000_000)
            assert offsets(page) == list(range(1, 401))
            assert list(page.publications) == heard[channel]
            assert epochs[channel] == {page.top.epoch}
        assert len({min(names) for names in epochs.values()}) == 5


@every_kind
async def test_a_channel_nobody_published_to_has_no_epoch_and_reading_makes_none(kind: Kind, tmp_path: Path) -> None:
    """Reading writes nothing: the position stays Position(0, "") and the channel unknown."""
    async with kind.opened(tmp_path) as history:
        for _ in range(2):
            assert await history.read("quiet", FOREVER, NOW) == Page((), Position(0, ""), 0)
        await history.remove("quiet")
        await history.sweep(lambda channel: FOREVER, NOW)
        assert await history.tops(["quiet"]) == {}
        assert await history.new_epochs() == 0


@every_kind
async def test_the_epoch_is_eight_letters_and_digits_and_stays(kind: Kind, tmp_path: Path) -> None:
    """The first commit makes the epoch, every later position has the same."""
    async with kind.opened(tmp_path) as history:
        first = await history.append("a", Draft(b""), FOREVER, NOW)
        second = await history.append("a", Draft(b""), FOREVER, NOW)
        epoch = first.position.epoch
        assert len(epoch) == 8
        assert epoch.isascii()
        assert epoch.isalnum()
        assert (first, second) == (Appended(Position(1, epoch)), Appended(Position(2, epoch)))


@every_kind
async def test_times_of_a_channel_never_go_backwards(kind: Kind, tmp_path: Path) -> None:
    """A clock that is set back gives the time of the one before, so that the expired ones are a prefix."""
    async with kind.opened(tmp_path) as history:
        for now_ms in (NOW, NOW - 5_000, NOW + 1, NOW - 1):
            await say(history, "a", "x", at_ms=now_ms)
        page = await history.read("a", FOREVER, NOW)
        assert [publication.time_ms - NOW for publication in page.publications] == [0, 0, 1, 1]


@every_kind
async def test_info_tags_and_any_bytes_survive(kind: Kind, tmp_path: Path) -> None:
    """What was published is read back exactly, and told to on_commit exactly."""
    info = ClientInfo("user", "client", conn_info=b'{"name":"\xc3\x85sa"}', chan_info=bytes(range(256)))
    drafts = [
        Draft(bytes(range(256)), info, {"k": "v", "å": "ß"}),
        Draft(b"", ClientInfo("", ""), {}),
        Draft(b'{"a":1.0}', None, None),
    ]
    heard: list[Publication] = []
    async with kind.opened(tmp_path) as history:
        history.on_commit = lambda channel, epoch, publications: heard.extend(publications)
        for draft in drafts:
            await history.append("ünï:códe", draft, FOREVER, NOW)
        page = await history.read("ünï:códe", FOREVER, NOW)
        assert [(each.data, each.info, each.tags) for each in page.publications] == [
            (each.data, each.info, each.tags) for each in drafts
        ]
        assert list(page.publications) == heard
        assert [each.time_ms for each in heard] == [NOW, NOW, NOW]


@every_kind
async def test_the_wish_for_a_patch_is_told_and_not_stored(kind: Kind, tmp_path: Path) -> None:
    """``delta`` comes with on_commit, for the live ones; what is read back has no wishes (PROTOCOL 12.3)."""
    heard: list[Publication] = []
    async with kind.opened(tmp_path) as history:
        history.on_commit = lambda channel, epoch, publications: heard.extend(publications)
        for wish in (True, False, True):
            await history.append("a", Draft(b"1", delta=wish), FOREVER, NOW)
        assert [each.delta for each in heard] == [True, False, True]
        page = await history.read("a", FOREVER, NOW)
        assert [each.delta for each in page.publications] == [False, False, False]


@every_kind
async def test_tops_knows_the_known(kind: Kind, tmp_path: Path) -> None:
    """One query gives the tops of many channels and leaves unknown ones out."""
    async with kind.opened(tmp_path) as history:
        names = [f"channel '{n}" for n in range(600)]
        positions = await asyncio.gather(*(history.append(name, Draft(b""), FOREVER, NOW) for name in names))
        await say(history, names[7], "again")
        tops = await history.tops([*names, "unknown"])
        expected = {name: appended.position for name, appended in zip(names, positions, strict=True)}
        expected[names[7]] = Position(2, expected[names[7]].epoch)
        assert tops == expected
        assert await history.tops([]) == {}


# --- reading --------------------------------------------------------------------


@every_kind
async def test_pages_forward_and_backward_meet_everything_once(kind: Kind, tmp_path: Path) -> None:
    """PROTOCOL 4.6: ``since`` is exclusive both ways, and pages join without a hole."""
    async with kind.opened(tmp_path) as history:
        await asyncio.gather(*(history.append("a", Draft(b"%d" % n), FOREVER, NOW) for n in range(250)))
        forward: list[int] = []
        since: int | None = None
        while page := offsets(await history.read("a", FOREVER, NOW, since=since)):
            assert len(page) <= 100
            forward += page
            since = page[-1]
        assert forward == list(range(1, 251))
        backward: list[int] = []
        since = None
        while page := offsets(await history.read("a", FOREVER, NOW, since=since, limit=70, reverse=True)):
            assert len(page) <= 70
            backward += page
            since = page[-1]
        assert backward == list(range(250, 0, -1))


@every_kind
async def test_limits_and_odd_positions(kind: Kind, tmp_path: Path) -> None:
    """Limit 0 reads the position only, -1 all; a position beyond the top, or of 64 bits, is no fault."""
    async with kind.opened(tmp_path) as history:
        await say(history, "a", "1", "2", "3", "4", "5")

        async def read(since: int | None, limit: int, reverse: bool = False) -> list[int]:
            page = await history.read("a", FOREVER, NOW, since=since, limit=limit, reverse=reverse)
            assert page.top.offset == 5
            assert page.floor == 0
            return offsets(page)

        huge = 2**64 - 1
        assert await read(None, 0) == await read(None, 0, reverse=True) == []
        assert await read(None, -1) == await read(0, -1) == await read(0, huge) == [1, 2, 3, 4, 5]
        assert await read(3, -1) == [4, 5]
        assert await read(3, 1) == [4]
        assert await read(5, -1) == await read(6, -1) == await read(huge, -1) == []
        assert await read(None, 2, reverse=True) == await read(huge, 2, reverse=True) == [5, 4]
        assert await read(None, huge, reverse=True) == [5, 4, 3, 2, 1]
        assert await read(3, -1, reverse=True) == [2, 1]
        assert await read(3, 1, reverse=True) == [2]
        assert await read(1, -1, reverse=True) == await read(0, -1, reverse=True) == []


@every_kind
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
async def test_a_page_is_bounded_in_bytes_but_never_empty(kind: Kind, reverse: bool, tmp_path: Path) -> None:
    """One publication heavier than the bound comes alone; else a page stops before the bound."""
    sizes = {1: 10, 2: 10, 3: 300_000, 4: 10, 5: 10}
    async with kind.opened(tmp_path) as history:
        for size in sizes.values():
            await history.append("a", Draft(bytes(size)), FOREVER, NOW)

        async def pages(max_bytes: int) -> list[list[int]]:
            seen: list[list[int]] = []
            since: int | None = None
            while True:
                page = await history.read("a", FOREVER, NOW, since=since, max_bytes=max_bytes, reverse=reverse)
                if not page.publications:
                    return seen
                seen.append(offsets(page))
                since = seen[-1][-1]

        order = [[5, 4], [3], [2, 1]] if reverse else [[1, 2], [3], [4, 5]]
        assert await pages(1_000) == order
        one_by_one = list(itertools.chain(*order))
        assert await pages(0) == [[n] for n in one_by_one]
        assert await pages(10_000_000) == [one_by_one]


# --- retention --------------------------------------------------------------------


@every_kind
async def test_size_keeps_the_newest(kind: Kind, tmp_path: Path) -> None:
    """Beyond ``size`` is gone at once, and the floor says so, without a sweep."""
    five = Retention(5, -1, -1)
    async with kind.opened(tmp_path) as history:
        for n in range(1, 9):
            await say(history, "a", str(n), retention=five)
            page = await history.read("a", five, NOW)
            assert offsets(page) == list(range(max(1, n - 4), n + 1))
            assert (page.floor, page.top.offset) == (max(0, n - 5), n)
        assert offsets(await history.read("a", five, NOW, since=1)) == [4, 5, 6, 7, 8]
        assert offsets(await history.read("a", five, NOW, since=3, reverse=True)) == []
        assert offsets(await history.read("a", five, NOW, since=5, reverse=True)) == [4]


@every_kind
async def test_ttl_keeps_each_publication_for_its_time(kind: Kind, tmp_path: Path) -> None:
    """A publication is gone ``ttl_ms`` after it was said, whatever is said after it, without a sweep."""
    second = Retention(-1, 1_000, -1)
    async with kind.opened(tmp_path) as history:
        for n in range(8):
            await say(history, "a", str(n), at_ms=NOW + n * 100, retention=second)
        for late_ms, floor in ((999, 0), (1_000, 1), (1_099, 1), (1_350, 4), (1_699, 7), (1_700, 8), (10**9, 8)):
            page = await history.read("a", second, NOW + late_ms)
            assert (offsets(page), page.floor) == (list(range(floor + 1, 9)), floor)
            assert page.top.offset == 8


@every_kind
async def test_an_expired_beginning_longer_than_a_page_is_skipped(kind: Kind, tmp_path: Path) -> None:
    """A read from the start finds what is kept, however much has expired and not been swept."""
    second = Retention(-1, 1_000, -1)
    async with kind.opened(tmp_path) as history:
        await asyncio.gather(*(history.append("a", Draft(b""), FOREVER, NOW) for _ in range(350)))
        await say(history, "a", "kept", at_ms=NOW + 500)
        page = await history.read("a", second, NOW + 1_000, limit=10)
        assert (texts(page), page.floor) == (["kept"], 350)


@every_kind
async def test_size_and_ttl_together_keep_what_both_keep(kind: Kind, tmp_path: Path) -> None:
    """The floor is the higher one of the two."""
    both = Retention(3, 1_000, -1)
    async with kind.opened(tmp_path) as history:
        for n in range(5):
            await say(history, "a", str(n), at_ms=NOW + n * 100, retention=both)
        assert (await history.read("a", both, NOW + 900)).floor == 2
        assert (await history.read("a", both, NOW + 1_300)).floor == 4


@every_kind
async def test_the_sweep_makes_it_final(kind: Kind, tmp_path: Path) -> None:
    """What was swept stays gone under a wider retention; what was not gone stays."""
    narrow = Retention(2, -1, -1)
    async with kind.opened(tmp_path) as history:
        await say(history, "a", "1", "2", "3", "4", retention=narrow)
        await say(history, "b", "1", "2", "3", "4")
        await history.sweep({"a": narrow, "b": FOREVER}.get, NOW)
        page = await history.read("a", FOREVER, NOW)
        assert (texts(page), page.floor, page.top.offset) == (["3", "4"], 2, 4)
        assert len((await history.read("b", FOREVER, NOW)).publications) == 4
        await say(history, "a", "5", retention=FOREVER)
        assert texts(await history.read("a", FOREVER, NOW)) == ["3", "4", "5"]


@every_kind
async def test_a_channel_that_is_kept_no_more_is_left_alone(kind: Kind, tmp_path: Path) -> None:
    """An option taken away by mistake costs nothing that was said."""
    short = Retention(-1, 1, 1)
    async with kind.opened(tmp_path) as history:
        await say(history, "a", "1", "2", retention=FOREVER)
        await history.sweep(lambda channel: None, NOW + 10**9)
        assert len((await history.read("a", FOREVER, NOW)).publications) == 2
        await history.sweep(lambda channel: short, NOW + 10**9)
        assert await history.tops(["a"]) == {}


@every_kind
async def test_many_channels_are_swept_in_bounded_rounds(kind: Kind, tmp_path: Path) -> None:
    """However many channels there are, a few sweeps reach them all."""
    ttl = Retention(-1, 1_000, 5_000)
    async with kind.opened(tmp_path) as history:
        names = [f"channel {n}" for n in range(1_500)]
        await asyncio.gather(*(history.append(name, Draft(b""), ttl, NOW) for name in names))
        for _ in range(10):
            await history.sweep(lambda channel: ttl, NOW + 5_000)
        assert await history.tops(names) == {}


@every_kind
async def test_remove_forgets_payloads_and_keeps_the_numbering(kind: Kind, tmp_path: Path) -> None:
    """PROTOCOL 11.1: after remove the floor is the top, the epoch the same, and the next offset the next."""
    async with kind.opened(tmp_path) as history:
        await say(history, "a", "1", "2", "3")
        before = await history.read("a", FOREVER, NOW)
        await history.remove("a")
        after = await history.read("a", FOREVER, NOW)
        assert after == Page([], before.top, 3)
        await say(history, "a", "4")
        page = await history.read("a", FOREVER, NOW, since=3)
        assert (texts(page), page.floor, page.top) == (["4"], 3, Position(4, before.top.epoch))


@every_kind
async def test_an_empty_channel_forgets_its_epoch_after_the_meta_ttl(kind: Kind, tmp_path: Path) -> None:
    """``meta_ttl_ms`` after the last commit, not before, an empty channel begins anew, keys gone; a full one never."""
    fades = Retention(-1, 1_000, 5_000)
    stays = Retention(-1, -1, 5_000)
    retention_of = {"a": fades, "full": stays}.get
    async with kind.opened(tmp_path) as history:
        old = (await history.append("a", Draft(b"", key="k"), fades, NOW)).position
        await say(history, "full", "x", retention=stays)
        await history.sweep(retention_of, NOW + 4_999)
        assert await history.tops(["a"]) == {"a": old}
        await history.sweep(retention_of, NOW + 5_000)
        assert await history.read("a", fades, NOW + 5_000) == Page((), Position(0, ""), 0)
        again = await history.append("a", Draft(b"", key="k"), fades, NOW + 5_000)
        assert not again.repeated
        assert again.position.offset == 1
        assert again.position.epoch != old.epoch
        assert len((await history.read("full", stays, NOW + 5_000)).publications) == 1


@every_kind
async def test_new_epochs_begins_every_channel_anew(kind: Kind, tmp_path: Path) -> None:
    """After a restore: another epoch for each, offset 0, payloads and keys gone, and their number returned."""
    async with kind.opened(tmp_path) as history:
        for name in ("a", "b", "c"):
            await history.append(name, Draft(b"", key="k"), FOREVER, NOW)
        before = await history.tops(["a", "b", "c"])
        assert await history.new_epochs() == 3
        after = await history.tops(["a", "b", "c"])
        assert [position.offset for position in after.values()] == [0, 0, 0]
        assert len({position.epoch for position in (*before.values(), *after.values())}) == 6
        assert (await history.read("a", FOREVER, NOW)).publications == []
        again = await history.append("a", Draft(b"", key="k"), FOREVER, NOW)
        assert again == Appended(Position(1, after["a"].epoch))


@every_kind
async def test_redact_erases_one_payload(kind: Kind, tmp_path: Path) -> None:
    """The publication stays, with data ``null`` and neither info nor tags; key, time and neighbours are as before."""
    async with kind.opened(tmp_path) as history:
        said = [Draft(b'"%d"' % n, ClientInfo("user", "client"), {"tag": "value"}, key=f"key {n}") for n in range(1, 4)]
        appended = await asyncio.gather(*(history.append("a", draft, FOREVER, NOW) for draft in said))
        before = (await history.read("a", FOREVER, NOW)).publications
        for _ in range(2):
            await history.redact("a", 2)
            after = (await history.read("a", FOREVER, NOW)).publications
            assert list(after) == [before[0], Publication(b"null", 2, NOW), before[2]]
        again = await history.append("a", said[1], FOREVER, NOW)
        assert again == Appended(appended[1].position, repeated=True)


@every_kind
async def test_redact_refuses_what_is_not_there(kind: Kind, tmp_path: Path) -> None:
    """A position nobody published at, or that is gone, is 112, and changes nothing."""
    async with kind.opened(tmp_path) as history:
        await say(history, "a", "1", "2")
        await history.remove("a")
        await say(history, "a", "3")
        for channel, offset in (("a", 0), ("a", -1), ("a", 2), ("a", 4), ("a", 2**64), ("unknown", 1)):
            with pytest.raises(Refused) as refused:
                await history.redact(channel, offset)
            assert refused.value.refusal is UNRECOVERABLE_POSITION
        assert texts(await history.read("a", FOREVER, NOW)) == ["3"]
        assert await history.tops(["unknown"]) == {}


@every_surviving_kind
async def test_until_it_is_open_a_history_refuses(kind: Kind, tmp_path: Path) -> None:
    """After close, as before open, everything is Unavailable, and nothing is written."""
    async with kind.opened(tmp_path) as history:
        await say(history, "a", "1")
    waits: list[Coroutine[Any, Any, object]] = [
        history.append("a", Draft(b"2"), FOREVER, NOW),
        history.read("a", FOREVER, NOW),
        history.tops(["a"]),
        history.remove("a"),
        history.redact("a", 1),
        history.sweep(lambda channel: Retention(0, 0, 0), NOW),
        history.new_epochs(),
    ]
    for outcome in await asyncio.gather(*waits, return_exceptions=True):
        assert isinstance(outcome, Unavailable)
    async with kind.opened(tmp_path) as history:
        assert texts(await history.read("a", FOREVER, NOW)) == ["1"]


@every_shared_kind
async def test_several_processes_number_one_channel(kind: Kind, tmp_path: Path) -> None:
    """P1: three of them publish into the same channels: no hole, no repeat, and each hears of its own commits only."""
    heard: dict[int, list[tuple[str, int, bytes]]] = defaultdict(list)

    async def publish(number: int, history: History) -> list[tuple[str, int, bytes]]:
        mine = []
        for turn in range(30):
            data = b"%d.%d" % (number, turn)
            channel = f"channel {turn % 3}"
            appended = await history.append(channel, Draft(data), FOREVER, NOW)
            mine.append((channel, appended.position.offset, data))
        return mine

    async with kind.opened(tmp_path) as one, kind.opened(tmp_path) as two, kind.opened(tmp_path) as three:
        histories = (one, two, three)
        for number, history in enumerate(histories):
            history.on_commit = lambda channel, epoch, publications, mine=heard[number]: mine.extend(  # type: ignore[misc]
                (channel, each.offset, each.data) for each in publications
            )
        given = await asyncio.gather(*(publish(number, history) for number, history in enumerate(histories)))
        assert [sorted(mine) for mine in given] == [sorted(heard[number]) for number in range(3)]
        for channel in (f"channel {n}" for n in range(3)):
            pages = [await history.read(channel, FOREVER, NOW) for history in histories]
            assert offsets(pages[0]) == list(range(1, 31))
            assert pages[0] == pages[1] == pages[2]


@every_shared_kind
async def test_what_one_process_destroys_is_gone_for_all(kind: Kind, tmp_path: Path) -> None:
    """Removal, redaction, sweep, and a life's end are seen by the other process, and its next publication fits."""
    fades = Retention(-1, 1, 1)
    async with kind.opened(tmp_path) as one, kind.opened(tmp_path) as two:
        await say(one, "a", "1", "2", "3")
        await say(two, "a", "4")
        await two.redact("a", 1)
        assert texts(await one.read("a", FOREVER, NOW)) == ["null", "2", "3", "4"]
        await one.sweep(lambda channel: Retention(2, -1, -1), NOW)
        page = await two.read("a", FOREVER, NOW)
        assert (texts(page), page.floor) == (["3", "4"], 2)
        await two.remove("a")
        assert (await one.read("a", FOREVER, NOW)).floor == 4
        old = (await one.append("a", Draft(b"5", key="k"), FOREVER, NOW)).position
        assert old.offset == 5
        await two.sweep(lambda channel: fades, NOW + 10)
        assert await one.tops(["a"]) == {}
        assert await one.read("a", FOREVER, NOW) == Page((), Position(0, ""), 0)
        new = await one.append("a", Draft(b"6", key="k"), FOREVER, NOW + 10)
        assert (new.position.offset, new.repeated) == (1, False)
        assert new.position.epoch != old.epoch
        assert (await two.append("a", Draft(b"", key="k"), FOREVER, NOW + 10)).position == new.position


# --- idempotency ----------------------------------------------------------------------


@every_kind
async def test_a_repeated_key_publishes_once(kind: Kind, tmp_path: Path) -> None:
    """The second use gets the first one's position and stores nothing; keys are a channel's own."""
    heard: list[int] = []
    async with kind.opened(tmp_path) as history:
        history.on_commit = lambda channel, epoch, publications: heard.extend(each.offset for each in publications)
        first = await history.append("a", Draft(b"1", key="k"), FOREVER, NOW)
        await say(history, "a", "2")
        second = await history.append("a", Draft(b"other", key="k"), FOREVER, NOW)
        assert second == Appended(first.position, repeated=True)
        assert not (await history.append("b", Draft(b"1", key="k"), FOREVER, NOW)).repeated
        assert texts(await history.read("a", FOREVER, NOW)) == ["1", "2"]
        assert heard == [1, 2, 1]


@every_kind
async def test_a_raced_key_publishes_once(kind: Kind, tmp_path: Path) -> None:
    """PROTOCOL 11.8: of many at once with one key, exactly one is stored and all get its position."""
    async with kind.opened(tmp_path) as history:
        racers = [history.append("a", Draft(b"%d" % n, key=f"k{n % 3}"), FOREVER, NOW) for n in range(60)]
        raced = await asyncio.gather(*racers, *(history.append("a", Draft(b"-"), FOREVER, NOW) for _ in range(10)))
        for key in range(3):
            same = raced[key:60:3]
            assert {each.position for each in same} == {same[0].position}
            assert sum(not each.repeated for each in same) == 1
        assert (await history.read("a", FOREVER, NOW, limit=0)).top.offset == 13


@every_kind
async def test_a_key_outlives_its_payload(kind: Kind, tmp_path: Path) -> None:
    """Trimming, sweeping and remove erase payloads; the key still answers with the first position."""
    one = Retention(1, -1, -1)
    async with kind.opened(tmp_path) as history:
        first = await history.append("a", Draft(b"1", key="k"), one, NOW)
        await say(history, "a", "2", "3", retention=one)
        await history.sweep(lambda channel: one, NOW)
        await history.remove("a")
        await history.sweep(lambda channel: one, NOW)
        again = await history.append("a", Draft(b"1", key="k"), one, NOW)
        assert again == Appended(first.position, repeated=True)


@every_kind
@pytest.mark.parametrize("swept", ["never", "before", "after"])
async def test_a_key_expires(kind: Kind, swept: str, tmp_path: Path) -> None:
    """After ``idempotency_ttl_ms``, and not before, a key is new again, whenever the sweep came by."""
    async with kind.opened(tmp_path, idempotency_ttl_ms=1_000) as history:

        async def append(late_ms: int) -> tuple[int, bool]:
            if swept == "before":
                await history.sweep(lambda channel: FOREVER, NOW + late_ms)
            appended = await history.append("a", Draft(b"", key="k"), FOREVER, NOW + late_ms)
            if swept == "after":
                await history.sweep(lambda channel: FOREVER, NOW + late_ms)
            return appended.position.offset, appended.repeated

        seen = [await append(late_ms) for late_ms in (0, 999, 1_000, 1_999, 2_000)]
        assert seen == [(1, False), (1, True), (2, False), (2, True), (3, False)]


# --- versions ---------------------------------------------------------------------------


async def tell(history: History, number: int, epoch: str = "", *, key: str = "", at_ms: int = NOW) -> tuple[int, bool]:
    """Append to "a" what says its version; gives its offset, or the top, and whether it was stored."""
    draft = Draft(f"{number}{epoch}".encode(), key=key, version=Version(number, epoch))
    appended = await history.append("a", draft, FOREVER, at_ms)
    return appended.position.offset, not appended.repeated


@every_kind
async def test_what_is_outdated_is_not_stored(kind: Kind, tmp_path: Path) -> None:
    """PROTOCOL 11.8.3: an equal or lower version gets the top, unless its epoch is another than the last one's."""
    heard: list[bytes] = []
    async with kind.opened(tmp_path) as history:
        history.on_commit = lambda channel, epoch, publications: heard.extend(each.data for each in publications)
        for number, epoch, expected in (
            (5, "", (1, True)),
            (5, "", (1, False)),
            (4, "", (1, False)),
            (6, "", (2, True)),
            (0, "", (3, True)),  # without a version nothing is compared, and the last one stays
            (6, "", (3, False)),
            (2, "x", (4, True)),  # another epoch counts by itself
            (6, "x", (5, True)),
            (6, "x", (5, False)),
            (6, "", (5, False)),  # no epoch: compared whatever the last one's is
            (1, "y", (6, True)),
            (HIGHEST_VERSION, "", (7, True)),
            (HIGHEST_VERSION, "", (7, False)),
            (1, "y", (8, True)),  # the last one's epoch is "" now
        ):
            assert await tell(history, number, epoch) == expected
        told = [b"5", b"6", b"0", b"2x", b"6x", b"1y", b"%d" % HIGHEST_VERSION, b"1y"]
        assert heard == told
        assert [each.data for each in (await history.read("a", FOREVER, NOW)).publications] == told
        top = (await history.read("a", FOREVER, NOW)).top
        outdated = await history.append("a", Draft(b"", version=Version(1)), FOREVER, NOW)
        assert outdated == Appended(top, repeated=True)
        assert (await history.append("b", Draft(b"", version=Version(1)), FOREVER, NOW)).position.offset == 1


@every_kind
async def test_raced_versions_are_stored_ascending(kind: Kind, tmp_path: Path) -> None:
    """Many at once, in no order, with others between: what is stored ascends, and the highest is there."""
    async with kind.opened(tmp_path) as history:
        numbers = [(n * 37) % 101 for n in range(1, 101)]
        beside = asyncio.gather(*(history.append("a", Draft(b"-"), FOREVER, NOW) for _ in range(30)))
        raced = await asyncio.gather(*(tell(history, number) for number in numbers))
        await beside
        page = await history.read("a", FOREVER, NOW, limit=-1)
        stored = [int(each.data) for each in page.publications if each.data != b"-"]
        assert stored == sorted(set(stored))
        assert stored[-1] == 100
        assert sorted(number for number, (_, told) in zip(numbers, raced, strict=True) if told) == stored
        for number, (offset, told) in zip(numbers, raced, strict=True):
            assert page.publications[offset - 1].data == b"%d" % number or not told


@every_shared_kind
async def test_processes_race_versions(kind: Kind, tmp_path: Path) -> None:
    """Three processes say the same versions at once, and others without: each is stored once at most, ascending."""

    async def publish(history: History) -> list[int]:
        told = []
        for number in range(1, 21):
            offset, stored = await tell(history, number)
            told += [number] if stored else []
            assert offset >= 1
            if number % 4 == 0:
                await say(history, "a", "-")
        return told

    async with kind.opened(tmp_path) as one, kind.opened(tmp_path) as two, kind.opened(tmp_path) as three:
        told = await asyncio.gather(*map(publish, (one, two, three)))
        page = await one.read("a", FOREVER, NOW, limit=-1)
        stored = [int(each.data) for each in page.publications if each.data != b"-"]
        assert stored == sorted(itertools.chain(*told))
        assert stored == sorted(set(stored))
        assert stored[-1] == 20


@every_kind
async def test_a_version_outlives_its_publication(kind: Kind, tmp_path: Path) -> None:
    """Trimming, sweeps long after, and ``remove`` leave the last version; only the end of the epoch takes it."""
    one, none = Retention(1, -1, -1), Retention(0, -1, 1_000)
    day_ms = 24 * 3600 * 1000
    async with kind.opened(tmp_path) as history:
        assert await tell(history, 7, "x") == (1, True)
        await say(history, "a", "2", "3", retention=one)
        for days in range(3):
            await history.sweep(lambda channel: one, NOW + days * day_ms)
            assert await tell(history, 7, "x", at_ms=NOW + days * day_ms) == (3, False)
        await history.remove("a")
        assert await tell(history, 8, "x", at_ms=NOW + 3 * day_ms) == (4, True)
        await history.remove("a")
        for days in range(3, 6):
            await history.sweep(lambda channel: one, NOW + days * day_ms)
            assert await tell(history, 8, at_ms=NOW + days * day_ms) == (4, False)
        await history.sweep(lambda channel: none, NOW + 6 * day_ms)
        assert await tell(history, 1, "x", at_ms=NOW + 6 * day_ms) == (1, True)
        await history.new_epochs()
        assert await tell(history, 1, "x", at_ms=NOW + 6 * day_ms) == (1, True)


@every_kind
async def test_a_key_goes_before_a_version(kind: Kind, tmp_path: Path) -> None:
    """A retry gets its first position, however outdated; what was outdated uses up no key."""
    async with kind.opened(tmp_path) as history:
        assert await tell(history, 1, key="one") == (1, True)
        assert await tell(history, 5, key="five") == (2, True)
        again = await asyncio.gather(
            tell(history, 1, key="one"),
            tell(history, 9, key="five"),
            tell(history, 4, key="four"),
            tell(history, 6, key="six"),
            tell(history, 6, key="six"),
        )
        assert [*again] == [(1, False), (2, False), (2, False), (3, True), (3, False)]
        assert await tell(history, 7, key="four") == (4, True)


@every_surviving_kind
async def test_versions_outlast_a_restart(kind: Kind, tmp_path: Path) -> None:
    """The last version is known after close and open, and so is that there was none."""
    async with kind.opened(tmp_path) as history:
        await say(history, "b", "1")
        assert await tell(history, 3, "x") == (1, True)
        await say(history, "a", "2")
    async with kind.opened(tmp_path) as history:
        assert await tell(history, 3, "x") == (2, False)
        assert await tell(history, 3, "y") == (3, True)
        assert (await history.append("b", Draft(b"", version=Version(1)), FOREVER, NOW)).position.offset == 2


# --- waiting ----------------------------------------------------------------------------


@every_kind
async def test_cancelling_a_waiter_cancels_no_commit(kind: Kind, tmp_path: Path) -> None:
    """Who gives up waiting has published all the same, and on_commit tells of it."""
    heard: list[bytes] = []
    async with kind.opened(tmp_path) as history:
        history.on_commit = lambda channel, epoch, publications: heard.extend(each.data for each in publications)
        impatient = asyncio.ensure_future(history.append("a", Draft(b"1"), FOREVER, NOW))
        asyncio.get_running_loop().call_soon(impatient.cancel)  # runs right after its first step
        patient = await asyncio.gather(history.append("a", Draft(b"2"), FOREVER, NOW))
        assert impatient.done()
        assert patient[0].position.offset == 2
        assert heard == [b"1", b"2"]
        assert texts(await history.read("a", FOREVER, NOW)) == ["1", "2"]


@every_queueing_kind
async def test_a_full_queue_refuses_with_111_and_stores_nothing(kind: Kind, tmp_path: Path) -> None:
    """One channel's flood costs that channel alone, and what was refused is not there."""
    async with kind.opened(tmp_path) as history:
        flood = [history.append("a", Draft(b"%d" % n), FOREVER, NOW) for n in range(QUEUE_PUBLICATIONS + 5)]
        *results, other = await asyncio.gather(
            *flood, history.append("b", Draft(b""), FOREVER, NOW), return_exceptions=True
        )
        refused = [n for n, result in enumerate(results) if isinstance(result, Refused)]
        assert refused == list(range(QUEUE_PUBLICATIONS, QUEUE_PUBLICATIONS + 5))
        assert {result.refusal for result in results if isinstance(result, Refused)} == {TOO_MANY_REQUESTS}
        assert isinstance(other, Appended)
        assert (await history.append("a", Draft(b""), FOREVER, NOW)).position.offset == QUEUE_PUBLICATIONS + 1


@every_kind
async def test_close_finishes_the_commits_under_way(kind: Kind, tmp_path: Path) -> None:
    """What was asked for before close is committed and answered."""
    async with kind.opened(tmp_path) as history:
        appends: list[Coroutine[Any, Any, Appended]] = [
            history.append("a", Draft(b"%d" % n), FOREVER, NOW) for n in range(350)
        ]
        *appended, _ = await asyncio.gather(*appends, history.close())
        assert [each.position.offset for each in appended if each is not None] == list(range(1, 351))


@every_surviving_kind
async def test_a_restart_loses_nothing(kind: Kind, tmp_path: Path) -> None:
    """Publications, numbering, epoch, floor and keys are there after close and open."""
    async with kind.opened(tmp_path) as history:
        await say(history, "a", "1", "2")
        await history.remove("a")
        keyed = await history.append("a", Draft(b"3", ClientInfo("u", "c"), {"t": "v"}, key="k"), FOREVER, NOW)
        before = await history.read("a", FOREVER, NOW)
    async with kind.opened(tmp_path) as history:
        assert await history.read("a", FOREVER, NOW) == before
        again = await history.append("a", Draft(b"3", key="k"), FOREVER, NOW)
        assert again == Appended(keyed.position, repeated=True)
        assert (await history.append("a", Draft(b"4"), FOREVER, NOW)).position == Position(4, before.top.epoch)


async def test_two_memory_histories_share_a_log_and_hear_of_their_own_commits() -> None:
    """Over one Log: one numbering, one set of keys, and on_commit for one's own commits only."""
    log = Log()
    left, right = MemoryHistory(log), MemoryHistory(log)
    heard: dict[str, list[int]] = {"left": [], "right": []}
    left.on_commit = lambda channel, epoch, publications: heard["left"].extend(each.offset for each in publications)
    right.on_commit = lambda channel, epoch, publications: heard["right"].extend(each.offset for each in publications)
    first = await left.append("a", Draft(b"1", key="k"), FOREVER, NOW)
    await say(right, "a", "2", "3")
    await say(left, "a", "4")
    assert await right.append("a", Draft(b"", key="k"), FOREVER, NOW) == Appended(first.position, repeated=True)
    assert heard == {"left": [1, 4], "right": [2, 3]}
    assert await left.read("a", FOREVER, NOW) == await right.read("a", FOREVER, NOW)
    assert await MemoryHistory().tops(["a"]) == {}


async def test_memory_is_trimmed_by_the_append_itself() -> None:
    """A flood between two sweeps does not outgrow the memory: what retention calls gone is not kept."""
    history = MemoryHistory()
    await say(history, "size", *"12345", retention=Retention(2, -1, -1))
    assert texts(await history.read("size", FOREVER, NOW)) == ["4", "5"]
    for late_ms in range(0, 3_000, 500):
        await say(history, "ttl", str(late_ms), at_ms=NOW + late_ms, retention=Retention(-1, 1_000, -1))
    assert texts(await history.read("ttl", FOREVER, NOW)) == ["2000", "2500"]


# --- against a model ----------------------------------------------------------------------

RETENTIONS = {"a": Retention(4, 100, 300), "b": Retention(-1, 60, 150), "c": Retention(3, -1, -1), "d": FOREVER}
KEY_TTL_MS = 120


class Life:
    """A channel of the model, from one epoch to the next: plainly everything that was ever said in it."""

    def __init__(self) -> None:
        self.said: list[Publication] = []
        self.removed = 0
        self.keys: dict[str, tuple[int, int]] = {}
        self.used_ms = 0
        self.version = Version()

    def kept(self, retention: Retention, now_ms: int) -> list[Publication]:
        """What is neither removed, nor beyond the size, nor too old."""
        kept = self.said[self.removed :]
        if retention.size >= 0:
            kept = kept[-retention.size :]
        return [each for each in kept if retention.ttl_ms < 0 or each.time_ms + retention.ttl_ms > now_ms]

    def redact(self, offset: int) -> None:
        """Take the payload out of one publication."""
        assert offset > self.removed
        self.said[offset - 1] = Publication(b"null", offset, self.said[offset - 1].time_ms)


class Model:
    """The contract in its simplest words, against which each kind is held."""

    def __init__(self) -> None:
        self.lives: dict[str, Life] = {}
        self.epochs: dict[Life, str] = {}

    def append(self, channel: str, draft: Draft, now_ms: int) -> tuple[Life, int, bool]:
        """Say ``draft``; gives the channel's life, the offset, and whether it was a repeat."""
        life = self.lives.setdefault(channel, Life())
        offset, expires_ms = life.keys.get(draft.key, (0, 0))
        if draft.key and expires_ms > now_ms:
            return life, offset, True
        number, epoch = draft.version
        if number and number <= life.version.number and (not epoch or epoch == life.version.epoch):
            return life, len(life.said), True
        life.version = draft.version if number else life.version
        life.used_ms = max(life.used_ms, now_ms)
        life.said.append(Publication(draft.data, len(life.said) + 1, life.used_ms))
        if draft.key:
            life.keys[draft.key] = len(life.said), now_ms + KEY_TTL_MS
        return life, len(life.said), False

    def sweep(self, now_ms: int) -> None:
        """Drop expired keys, and channels past their meta TTL."""
        for channel, life in list(self.lives.items()):
            retention = RETENTIONS[channel]
            life.keys = {key: value for key, value in life.keys.items() if value[1] > now_ms}
            forgets = 0 <= retention.meta_ttl_ms <= now_ms - life.used_ms
            if forgets and not life.kept(retention, now_ms):
                del self.lives[channel]

    def new_epochs(self) -> int:
        """Begin all lives anew; gives their number."""
        for channel, life in self.lives.items():
            self.lives[channel] = Life()
            self.lives[channel].used_ms = life.used_ms
        return len(self.lives)

    def agree_on_epoch(self, life: Life, epoch: str) -> None:
        """An epoch is one life's, and a life has one epoch."""
        assert self.epochs.setdefault(life, epoch) == epoch
        assert list(self.epochs.values()).count(epoch) == 1


CHANNELS = st.sampled_from("abcd")
KEYS = st.sampled_from(["", "", "k", "l"])
VERSIONS = st.just(Version()) | st.builds(Version, st.integers(1, 3), st.sampled_from(["", "x"]))
STEPS = st.one_of(
    st.tuples(
        st.just("append"),
        st.lists(st.tuples(CHANNELS, KEYS, VERSIONS, st.integers(0, 80)), min_size=1, max_size=6),
    ),
    st.tuples(st.just("pass"), st.integers(0, 130)),
    st.tuples(
        st.just("read"),
        st.tuples(
            CHANNELS,
            st.none() | st.integers(0, 12),
            st.integers(-1, 5),
            st.sampled_from([0, 200, 100_000]),
            st.booleans(),
        ),
    ),
    st.tuples(st.just("remove"), CHANNELS),
    st.tuples(st.just("redact"), st.tuples(CHANNELS, st.integers(-1, 12))),
    st.tuples(st.sampled_from(["sweep", "restart", "new_epochs"]), st.none()),
)


async def compare(kind: Kind, place: Path, steps: list[tuple[str, Any]]) -> None:
    """Do ``steps`` to a history and to the model, and look at everything after each."""
    model = Model()
    now_ms = NOW
    swept_ms = 0
    serial = itertools.count()
    heard: dict[str, list[Publication]] = defaultdict(list)
    expected: dict[str, list[Publication]] = defaultdict(list)
    opened = kind.opened(place, idempotency_ttl_ms=KEY_TTL_MS)
    history = await opened.__aenter__()

    def listen(channel: str, epoch: str, publications: Sequence[Publication]) -> None:
        heard[channel] += publications

    async def look(channel: str) -> None:
        page = await history.read(channel, RETENTIONS[channel], now_ms, limit=-1)
        life = model.lives.get(channel)
        if life is None:
            assert page == Page((), Position(0, ""), 0)
            return
        kept = life.kept(RETENTIONS[channel], now_ms)
        assert list(page.publications) == kept
        assert page.top.offset == len(life.said)
        assert page.floor == len(life.said) - len(kept)
        model.agree_on_epoch(life, page.top.epoch)

    try:
        history.on_commit = listen
        for what, argument in steps:
            if what == "append":
                # The clock of an append may be behind by the few ms given, but not behind the last sweep: whether a key
                # that a sweep found expired is known to a clock of before it is nobody's promise.
                # Of two with one key at once the second shares what becomes of the first, where there are queues: as
                # in turn, unless the first is outdated.  So those have no version here.
                uses = Counter((channel, key) for channel, key, _, _ in argument if key)
                drafts = [
                    (channel, Draft(b"%d" % next(serial), key=key, version=version), behind)
                    for channel, key, wish, behind in argument
                    for version in [wish if uses[channel, key] < 2 else Version()]
                ]
                at_ms = max(now_ms - max(behind for _, _, behind in drafts), swept_ms)
                appends = [history.append(channel, draft, RETENTIONS[channel], at_ms) for channel, draft, _ in drafts]
                results = await asyncio.gather(*appends)
                for (channel, draft, _), appended in zip(drafts, results, strict=True):
                    life, offset, repeated = model.append(channel, draft, at_ms)
                    assert (appended.position.offset, appended.repeated) == (offset, repeated)
                    model.agree_on_epoch(life, appended.position.epoch)
                    if not repeated:
                        expected[channel].append(life.said[-1])
                assert heard == expected
            elif what == "pass":
                now_ms += argument
            elif what == "read":
                channel, since, limit, max_bytes, reverse = argument
                page = await history.read(
                    channel, RETENTIONS[channel], now_ms, since=since, limit=limit, max_bytes=max_bytes, reverse=reverse
                )
                known = model.lives.get(channel, Life())
                wanted = known.kept(RETENTIONS[channel], now_ms)
                if since is not None:
                    wanted = [each for each in wanted if (each.offset < since if reverse else each.offset > since)]
                wanted = wanted[::-1] if reverse else wanted
                wanted = wanted if limit < 0 else wanted[:limit]
                weights = list(itertools.accumulate(each.weight for each in wanted))
                fitting = [each for each, weight in zip(wanted, weights, strict=True) if weight <= max_bytes]
                assert list(page.publications) == (fitting or wanted[:1])
            elif what == "remove":
                await history.remove(argument)
                if (life_removed := model.lives.get(argument)) is not None:
                    life_removed.removed = len(life_removed.said)
            elif what == "redact":
                channel, offset = argument
                life_redacted = model.lives.get(channel)
                try:
                    await history.redact(channel, offset)
                except Refused:
                    # What retention calls gone may be there, as long as no sweep came by, and may be gone already.
                    kept = life_redacted.kept(RETENTIONS[channel], now_ms) if life_redacted else []
                    assert offset not in [each.offset for each in kept]
                else:
                    assert life_redacted is not None
                    life_redacted.redact(offset)
            elif what == "sweep":
                await history.sweep(RETENTIONS.get, now_ms)
                model.sweep(now_ms)
                swept_ms = now_ms
            elif what == "new_epochs":
                assert await history.new_epochs() == model.new_epochs()
            elif what == "restart" and kind.survives:
                await opened.__aexit__(None, None, None)
                opened = kind.opened(place, idempotency_ttl_ms=KEY_TTL_MS)
                history = await opened.__aenter__()
                history.on_commit = listen
            for channel in RETENTIONS:
                await look(channel)
            tops = await history.tops(RETENTIONS)
            assert {channel: top.offset for channel, top in tops.items()} == {
                channel: len(life.said) for channel, life in model.lives.items()
            }
    finally:
        await opened.__aexit__(None, None, None)


@every_kind
def test_every_kind_does_what_the_model_does(kind: Kind) -> None:
    """Any sequence of operations gives what the contract, written down as a few lists, gives."""

    @settings(max_examples=kind.examples, deadline=None)
    @given(steps=st.lists(STEPS, max_size=25))
    def compared(steps: list[tuple[str, Any]]) -> None:
        with tempfile.TemporaryDirectory() as place:
            try:
                asyncio.run(compare(kind, Path(place), steps))
            finally:
                drop_databases()

    compared()
