"""How long our parts wait for one another while they are tested.

In service an answer that is a second or two late had better be none.  A machine
that tests share with others may stand still for as long, and that is no fault of
the part under test: so while tests run these limits are ``PATIENT_S`` (and those of
the settings too, see ``support.config``), and nothing else is slower for it.

A test about one of them wants it as it is, or shorter, while it hurts somebody; or all the time:

    with impatient():
    with impatient(0.2):
    @pytest.mark.usefixtures("as_in_service")

and measures how long that took by ``awake``, which does not count when nobody could do anything:

    async with awake() as watch:
        ...
    assert watch.s < 2
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import ModuleType

import run
from server import ordering, peers, testing
from server import redis as redis_line
from server.blocks import sqlite as blocks
from server.broker import redis as broker
from server.history import mongo_server
from server.presence import lines
from server.presence import redis as presence

PATIENT_S = 60.0
"""Longer than any test has patience for."""

TICK_S = 0.02

LIMITS: tuple[tuple[ModuleType, str], ...] = (
    (redis_line, "CONNECT_S"),
    (redis_line, "ANSWER_S"),
    (broker, "OPEN_S"),
    (broker, "FOLLOW_S"),
    (broker, "STALE_S"),
    (mongo_server, "OPEN_S"),
    (blocks, "BUSY_S"),
    (presence, "PATIENCE_S"),
    (lines, "BATCH_S"),
    (ordering, "ORDER_PATIENCE_S"),
    (testing, "PATIENCE_S"),
    (run, "FETCH_TIMEOUT_S"),
)
"""How long each waits for another."""

AS_IN_SERVICE = [getattr(module, name) for module, name in LIMITS]


def be_patient() -> None:
    """From now on; and a process that is not heard of is none the less asked."""
    peers.FRESH_S = PATIENT_S
    for module, name in LIMITS:
        setattr(module, name, PATIENT_S)


@contextmanager
def impatient(limit_s: float | None = None) -> Iterator[None]:
    """Inside, everybody gives up as soon as in service, or after ``limit_s``."""
    for (module, name), own_s in zip(LIMITS, AS_IN_SERVICE, strict=True):
        setattr(module, name, own_s if limit_s is None else limit_s)
    try:
        yield
    finally:
        be_patient()


class Watch:
    """``s``: the seconds for which the loop was awake so far."""

    def __init__(self) -> None:
        self.s = 0.0

    async def run(self) -> None:
        """Count, until cancelled: a tick that came late is one in which everything stood still."""
        clock = asyncio.get_running_loop().time
        before = clock()
        while True:
            await asyncio.sleep(TICK_S)
            now = clock()
            self.s += min(now - before, 2 * TICK_S)
            before = now


@asynccontextmanager
async def awake() -> AsyncIterator[Watch]:
    """How long what is done inside takes, without the time for which the machine, or only this process, stood still."""
    watch = Watch()
    counting = asyncio.create_task(watch.run())
    try:
        yield watch
    finally:
        counting.cancel()
