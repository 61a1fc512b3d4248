"""What every test gets: a loop to run on, and a log that must stay quiet; and a browser for those that ask."""

import asyncio
import gc
import logging
import shutil
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from patience import be_patient, impatient

if TYPE_CHECKING:
    from playwright.async_api import Browser

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
"""A busy machine is no fault of ours: what must not grow is counted, not timed."""

be_patient()


@pytest.fixture
def as_in_service() -> Iterator[None]:
    """Ask for it to have every part as impatient as it is in service: for tests about that."""
    with impatient():
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_loop() -> "Iterator[asyncio.AbstractEventLoop]":
    """One for all; closed at the end, so that nobody complains that it was left open."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield loop
    loop.run_until_complete(_end_all())
    loop.close()
    with warnings.catch_warnings():  # the last test's connections, whose ends no further test's turns have seen to
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


async def _end_all() -> None:
    """Give what the last test left behind the turns that it needs for its end, as the next test would."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    for _ in range(5):  # connections whose other end is closed see it, and close theirs
        await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def _current_loop(_one_loop: asyncio.AbstractEventLoop) -> None:
    """All tests run on one loop, since several share a browser; newer Pythons make none by themselves."""
    asyncio.set_event_loop(_one_loop)


CHROMIUMS = ("chromium-headless-shell", "chromium")
"""The first that there is: the shell is the same engine without the window around it, for a third of the CPU."""
CHROMIUM = (
    "--no-sandbox",
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="session")
def browser(_one_loop: asyncio.AbstractEventLoop) -> "Iterator[Browser]":
    """One Chromium for all tests of pages: a start costs more than most tests, and visitors share nothing anyway."""
    from playwright.async_api import async_playwright, expect

    expect.set_options(timeout=15_000)  # of 5 a shared machine may stand still for as many
    asyncio.set_event_loop(_one_loop)
    playwright = _one_loop.run_until_complete(async_playwright().start())
    program = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    launch = playwright.chromium.launch(executable_path=program, args=CHROMIUM)
    chromium = _one_loop.run_until_complete(launch)
    yield chromium
    _one_loop.run_until_complete(chromium.close())
    _one_loop.run_until_complete(playwright.stop())


class ExpectedLog:
    """The log of one test: a warning or an error of the server that was not announced fails it."""

    def __init__(self) -> None:
        self.expected: set[str] = set()
        self.records: list[logging.LogRecord] = []

    def expect(self, *events: str) -> None:
        """Let these events happen; ``seen`` tells whether they did."""
        self.expected.update(events)

    def seen(self, event: str) -> list[dict[str, object]]:
        """The fields of each record of ``event``."""
        return [getattr(record, "fields", {}) for record in self.records if _name(record) == event]

    def unexpected(self) -> list[str]:
        """What nobody announced."""
        return [
            f"{record.levelname} {record.getMessage()} {getattr(record, 'fields', '')}"
            for record in self.records
            if record.levelno >= logging.WARNING and _name(record) not in self.expected
        ]


def _name(record: logging.LogRecord) -> str:
    return record.getMessage().split(" ", 1)[0]


class _Collector(logging.Handler):
    def __init__(self, log: ExpectedLog) -> None:
        super().__init__(logging.DEBUG)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.records.append(record)


@pytest.fixture(autouse=True)
def log() -> Iterator[ExpectedLog]:
    """The log of this test; ask for it to announce what it will provoke."""
    log = ExpectedLog()
    collector = _Collector(log)
    loggers = [logging.getLogger(name) for name in ("waterspout", "asyncio", "tornado")]
    ours = loggers[0]
    level = ours.level
    ours.setLevel(logging.DEBUG)
    for logger in loggers:
        logger.addHandler(collector)
    yield log
    for logger in loggers:
        logger.removeHandler(collector)
    ours.setLevel(level)
    assert not log.unexpected(), "unexpected log lines:\n" + "\n".join(log.unexpected())
