"""What every test gets: a log that must stay quiet."""

import logging
from collections.abc import Iterator

import pytest


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
