"""P1 and P3 under a network that delays, repeats, reorders and loses.

Hypothesis writes the story, ``weather`` plays it in virtual time.
"""

import asyncio
from random import Random

import pytest
from conftest import ExpectedLog
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from weather import CHANNEL, MANNERS, World, live_through

ACTS = st.sampled_from(
    ["say 1", "say 1", "say 3", "say 250", "join", "join", "cut", "cut", "wait 0.01", "wait 0.1", "wait 1", "wait 6"]
)
SEEDS = st.integers(0, 2**32)
CROWDS = st.sampled_from([["join"], ["join"] * 24])
"""One listener, or so many that each node has more of them in the room than it writes to one by one."""
ENDS = st.sampled_from(["trim", "forget"])
QUIET = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


async def _play(random: Random, story: list[str]) -> World:
    async with World(random, manners=tuple(MANNERS)) as world:
        for act in story:
            verb, _, number = act.partition(" ")
            match verb:
                case "say":
                    world.publish(int(number))
                case "join":
                    world.join()
                case "cut":
                    world.cut()
                case "wait":
                    await asyncio.sleep(float(number))
                case "trim":
                    await world.trim()
                case "forget":
                    await world.forget()
        await world.settle()
    return world


@QUIET
@given(SEEDS, CROWDS, st.lists(ACTS, min_size=4, max_size=60))
def test_everybody_hears_everything_once_and_in_order(seed: int, crowd: list[str], story: list[str]) -> None:
    """Each subscriber sees every offset it wants once, in order, byte by byte, and reaches the top, in whatever manner
    it is sent to; nobody is told that history is gone."""

    async def run() -> None:
        world = await _play(Random(seed), [*crowd, *story])
        assert sum(listener.restarts for listener in world.listeners) == 0
        stream = world.log.streams.get(CHANNEL)
        offsets = sorted(offset for _, offset in world.said)
        assert offsets == list(range(1, (stream.top if stream else 0) + 1))

    live_through(run())


@QUIET
@given(SEEDS, CROWDS, st.lists(ACTS | ENDS, min_size=4, max_size=60))
def test_told_of_a_loss_only_when_history_is_gone(
    log: ExpectedLog, seed: int, crowd: list[str], story: list[str]
) -> None:
    """With history trimmed and forgotten in the middle, everybody still ends at the top, and each loss told is real."""
    log.expect("subscription.lost")
    live_through(_play(Random(seed), [*crowd, *story]))


def test_a_cursor_of_a_forgotten_epoch_ends_its_wait(log: ExpectedLog) -> None:
    """Who catches up while history begins anew is told so; it once asked for repairs of a sound channel for ever."""
    log.expect("subscription.lost")
    story = "join say_250 forget forget cut join say_3 wait_0.1 wait_1 say_1 say_250 say_1 trim trim cut join wait_0.01"
    story += " join join trim forget join cut cut join join join cut cut wait_0.01 say_1 join say_3 join say_3 forget"
    for seed in range(60):
        live_through(_play(Random(seed), [act.replace("_", " ") for act in story.split()]))


@pytest.mark.parametrize("missed", [1, 1000])
def test_a_hole_is_repaired_before_the_sweep(missed: int) -> None:
    """What got lost between two words is there a moment after the second, be it more than a page."""

    async def run() -> None:
        async with World(Random(0)) as world:
            world.weather.clear()
            world.join()
            await asyncio.sleep(1)
            (session,) = [session for node in world.nodes for session in node.sessions.values()]
            elsewhere = next(node for node in world.nodes if node is not session.node)
            world.publish(1, elsewhere)
            await asyncio.sleep(0.1)
            world.weather.loss = 1.0
            world.publish(missed, elsewhere)
            await asyncio.sleep(0.1)
            assert world.listeners[0].offset == 1
            world.weather.loss = 0.0
            world.publish(1, elsewhere)
            await asyncio.sleep(0.5)
            assert world.listeners[0].offset == missed + 2
            await world.settle()

    live_through(run())


@given(SEEDS)
@example(1)
@settings(max_examples=10, deadline=None)
def test_a_mass_return_costs_few_reads(seed: int) -> None:
    """A hundred clients that come back within a second, each missing less than a page, share their history reads."""

    async def run() -> None:
        async with World(Random(seed), nodes=1) as world:
            world.weather.clear()
            for _ in range(100):
                world.join()
            await asyncio.sleep(2)
            world.publish(30)
            await asyncio.sleep(1)
            for index, listener in enumerate(world.listeners):
                listener.cut()
                if index % 4 == 0:
                    world.publish(1)
            before = world.histories[0].reads
            await world.settle()
            assert world.histories[0].reads - before <= 5

    live_through(run())
