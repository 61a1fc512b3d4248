"""Without sticky sessions: processes behind a load balancer without memory serve SDKs and pages that nobody told.

P3: every reconnect may land on the other process, and recovers there.
"""

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import test_arena as arena
import test_chat as chat
from balancer import Balancer
from crowd import call_api
from instruments import KINDS, Player, playing
from mongod import disturbing, shared_set
from stage import Place, staging
from support import OPEN, config
from troupe import Troupe

Story = Callable[..., Awaitable[None]]
ROOM = "room:1"


async def _publish(places: list[Place], first: int, count: int) -> list[int]:
    """Publish numbers at the processes in turn; returns them."""
    numbers = list(range(first, first + count))
    for number in numbers:
        answer = await call_api(places[number % len(places)], "publish", {"channel": ROOM, "data": number})
        assert answer["result"]["offset"] == number, answer
    return numbers


async def _heard(player: Player, numbers: list[int]) -> None:
    came = await player.publications(ROOM, len(numbers))
    assert [(one["offset"], one["data"]) for one in came] == [(number, number) for number in numbers]


async def _recovered(player: Player) -> None:
    subscribed = await player.next("subscribed", ROOM)
    assert (subscribed["was_recovering"], subscribed["recovered"]) == (True, True)


async def test_sdks_through_cuts_and_moves(tmp_path: Path) -> None:
    """Four SDKs, cut off and moved between processes, some of which die, hear everything once and in order."""
    with disturbing(shared_set()) as replica_set:
        async with staging(tmp_path, replica_set) as stage, AsyncExitStack() as stack:
            places = list(stage.places)
            ports = [place.process.port for place in places]
            wires = [await stack.enter_async_context(Balancer(ports)) for _ in KINDS]
            players = [
                await stack.enter_async_context(playing(kind, wire.url))
                for kind, wire in zip(KINDS, wires, strict=True)
            ]
            for player in players:
                await player.subscribed(ROOM)
            numbers = await _publish(places, 1, 5)
            for player in players:
                await _heard(player, numbers)

            for _ in range(3):  # A cut sends each to the other process.
                for wire in wires:
                    wire.cut()
                numbers = await _publish(places, numbers[-1] + 1, 5)
                for player in players:
                    await _recovered(player)
                    await _heard(player, numbers)
            assert [wire.served for wire in wires] == [[ports[0], ports[1], ports[0], ports[1]]] * len(wires)

            await places[1].kill()  # All stood there; now one process has to do.
            numbers = await _publish(places[:1], numbers[-1] + 1, 5)
            for player in players:
                await _recovered(player)
                await _heard(player, numbers)
            stats = await players[0].call("presence_stats", ROOM)
            assert stats["num_clients"] >= len(players)
            await places[1].start()
            await places[1].ready()
            async with asyncio.TaskGroup() as group:
                group.create_task(places[0].kill())
            numbers = await _publish(places[1:], numbers[-1] + 1, 5)
            for player in players:
                await _recovered(player)
                await _heard(player, numbers)
                await player.call("publish", ROOM, data="last")
            for player in players:
                last = await player.publications(ROOM, len(players))
                assert [one["data"] for one in last] == ["last"] * len(players)
                assert not player.untaken("publication", ROOM)
                assert not player.untaken("disconnected")


def _stories(module: Any, *left_out: str) -> list[Any]:
    """The tests of a module; ``left_out`` are those that are about one server by itself."""
    found = {name: story for name, story in vars(module).items() if name.startswith("test_")}
    assert found.keys() >= set(left_out)
    return [pytest.param(story, id=name.removeprefix("test_")) for name, story in found.items() if name not in left_out]


CHAT = _stories(
    chat,
    "test_a_key_that_changed",  # there the server makes the key itself, and keeps it beside its own database
    "test_history_that_is_gone",  # there the database file is taken away
    *("test_fits_and_can_be_read", "test_a_phone", "test_followers_are_called_so", "test_links_are_safe"),
)
ARENA = _stories(
    arena,
    *("test_accessible_and_nothing_sticks_out", "test_by_touch", "test_keys_are_let_go_when_the_page_is_left"),
    *("test_a_bot_for_whoever_is_alone", "test_a_name_that_is_none_is_told"),
)
"""Left out is, apart from what is said above, what a page looks like and does by itself."""


@pytest.fixture(scope="module")
def open_troupe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Troupe]:
    """What ``open_server`` is, twice."""
    with Troupe(tmp_path_factory.mktemp("open")) as troupe:
        yield troupe


@pytest.fixture(scope="module")
def ruled_troupe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Troupe]:
    """What ``ruled_server`` is, twice."""
    with Troupe(tmp_path_factory.mktemp("ruled"), config(channel={"namespaces": [{"name": "chat", **OPEN}]})) as troupe:
        yield troupe


TWINS = {"open_server": "open_troupe", "ruled_server": "ruled_troupe"}


@pytest.fixture
def story(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Awaitable[None]]:
    """A story of one server, with the fixtures it asks for, and with troupes in place of servers."""
    told: Story = request.param
    for module in (chat, arena):
        monkeypatch.setattr(module, "Process", Troupe)
    asked = inspect.signature(told).parameters
    return functools.partial(told, **{name: request.getfixturevalue(TWINS.get(name, name)) for name in asked})


@pytest.mark.parametrize("story", CHAT, indirect=True)
async def test_chat(story: Callable[[], Awaitable[None]]) -> None:
    """The chat's own stories, with two processes in place of the server."""
    await story()


@pytest.mark.parametrize("story", ARENA, indirect=True)
async def test_arena(story: Callable[[], Awaitable[None]]) -> None:
    """The arena's own stories, with two processes in place of the server."""
    await story()
