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
import test_chat_switch as switch
from balancer import Balancer
from crowd import call_api
from instruments import EMULATED, KINDS, Player, playing
from mongod import disturbing, shared_set
from stage import STREAMED, Place, staging
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


async def _came_back(player: Player) -> None:
    """However often it has come back by now, it recovered."""
    while player.untaken("subscribed", ROOM):
        await _recovered(player)


async def test_sdks_through_cuts_and_moves(tmp_path: Path) -> None:
    """SDKs on every transport, cut off and moved between processes, some of which die, hear all once and in order."""
    with disturbing(shared_set()) as replica_set:
        async with staging(tmp_path, replica_set, **STREAMED) as stage, AsyncExitStack() as stack:
            places = list(stage.places)
            ports = [place.process.port for place in places]
            kinds = [*KINDS, *EMULATED]
            wires = [await stack.enter_async_context(Balancer(ports)) for _ in kinds]
            players = [
                await stack.enter_async_context(playing(kind, wire.url))
                for kind, wire in zip(kinds, wires, strict=True)
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
            whole = len(KINDS)
            assert [wire.served for wire in wires[:whole]] == [[ports[0], ports[1], ports[0], ports[1]]] * whole
            # A stream here, its commands there: each of these needs a connection at least, and gets the next process.
            assert all(set(wire.served) == set(ports) for wire in wires[whole:])

            await places[1].kill()  # All WebSockets stood there, and any of the streams; now one process has to do.
            numbers = await _publish(places[:1], numbers[-1] + 1, 5)
            for player in players[:whole]:
                await _recovered(player)
            for player in players:
                await _heard(player, numbers)
                await _came_back(player)
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
    """The tests of a module, each with every set of its parameters; ``left_out`` are about one server by itself."""
    found = {name: story for name, story in vars(module).items() if name.startswith("test_")}
    assert found.keys() >= set(left_out)
    return [
        pytest.param(functools.partial(story, **given), id="-".join([name.removeprefix("test_"), *given.values()]))
        for name, story in found.items()
        if name not in left_out
        for given in _parameters(story)
    ]


def _parameters(story: Story) -> list[dict[str, str]]:
    """What ``pytest.mark.parametrize`` gives a test: one mark or none."""
    marks = [mark for mark in getattr(story, "pytestmark", []) if mark.name == "parametrize"]
    if not marks:
        return [{}]
    ((names, values),) = [mark.args for mark in marks]
    if isinstance(names, str):
        return [{names: value} for value in values]
    return [dict(zip(names, each, strict=True)) for each in values]


CHAT = _stories(
    chat,
    "test_a_key_that_changed",  # there the server makes the key itself, and keeps it beside its own database
    "test_history_that_is_gone",  # there the database file is taken away
    *("test_fits_and_can_be_read", "test_a_phone", "test_followers_are_called_so", "test_links_are_safe"),
    *("test_a_refused_message_says_so", "test_a_room_that_keeps_nothing", "test_sent_away_for_good"),
    *("test_a_server_that_falls_silent", "test_what_others_write_stays_text"),
)
SWITCH = _stories(
    switch,
    "test_a_key_that_changed_on_each_way",  # as in the chat
    *("test_by_keyboard", "test_the_switch_fits_and_can_be_read", "test_a_way_that_is_not_offered_is_said"),
    *("test_what_polling_cannot_is_said", "test_each_tab_remembers_its_own", "test_a_new_name_on_each_way"),
    "test_what_others_write_stays_text_on_each_way",
)
ARENA = _stories(
    arena,
    *("test_accessible_and_nothing_sticks_out", "test_by_touch", "test_keys_are_let_go_when_the_page_is_left"),
    *("test_a_bot_for_whoever_is_alone", "test_a_name_that_is_none_is_told", "test_a_server_that_keeps_no_table"),
    *("test_by_keyboard_alone", "test_what_others_send_is_never_markup_nor_harm"),
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
    told: functools.partial[Awaitable[None]] = request.param
    for module in (chat, switch, arena):
        monkeypatch.setattr(module, "Process", Troupe)
    asked = inspect.signature(told.func).parameters.keys() - told.keywords.keys()
    return functools.partial(told, **{name: request.getfixturevalue(TWINS.get(name, name)) for name in asked})


@pytest.mark.parametrize("story", CHAT, indirect=True)
async def test_chat(story: Callable[[], Awaitable[None]]) -> None:
    """The chat's own stories, with two processes in place of the server."""
    await story()


@pytest.mark.parametrize("story", SWITCH, indirect=True)
async def test_chat_switch(story: Callable[[], Awaitable[None]]) -> None:
    """The stories of the chat's ways to connect, with two processes in place of the server."""
    await story()


@pytest.mark.parametrize("story", ARENA, indirect=True)
async def test_arena(story: Callable[[], Awaitable[None]]) -> None:
    """The arena's own stories, with two processes in place of the server."""
    await story()
