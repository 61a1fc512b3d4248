"""examples/chat_bot.py, talked to."""

import pytest

from examples.chat_bot import HELP, app
from server.testing import Subscription, World, harness


async def _answer(room: Subscription, text: str) -> str:
    """Say something, and hear it and then the bot."""
    await room.publish({"text": text})
    assert (await room.publication()).data["text"] == text
    message = await room.publication()
    assert message.info is not None
    assert (message.info.user, message.info.conn_info) == ("bot", {"name": "Bot"})
    return str(message.data["text"])


async def _room(world: World) -> Subscription:
    return await (await world.connect("ann")).subscribe("chat:lobby")


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("!help", HELP),
        ("!time", "It is 22:13 UTC"),
        ("!who", "1 here: ann"),
        ("!dance", f"What is !dance? {HELP}"),
        ("!remind me", "Like this: !remind 60 tea is ready"),
    ],
)
async def test_it_answers(question: str, answer: str) -> None:
    """Each word gets its answer, after the question, from the user "bot"."""
    async with harness(app) as world:
        assert await _answer(await _room(world), question) == answer


async def test_it_is_quiet_otherwise() -> None:
    """Ordinary talk passes, and nobody answers."""
    async with harness(app) as world:
        room = await _room(world)
        await room.publish({"text": "hello!"})
        await world.settle()
        assert [message.data["text"] for message in room.heard()] == ["hello!"]


async def test_it_reminds_on_time() -> None:
    """A reminder comes when its time is over, not before, also to those who came in between."""
    async with harness(app) as world:
        room = await _room(world)
        assert await _answer(room, "!remind 600 tea is ready") == "In 600 s, then"
        await world.pass_time(599)
        assert room.heard() == []
        late = await (await world.connect("bob")).subscribe("chat:lobby")
        await world.pass_time(1)
        for one in (room, late):
            assert (await one.publication()).data["text"] == "tea is ready"


async def test_three_reminders_are_enough() -> None:
    """A fourth at the same time is refused; after they have been told there is room again."""
    async with harness(app) as world:
        room = await _room(world)
        for _ in range(3):
            await _answer(room, "!remind 60 x")
        assert await _answer(room, "!remind 60 x") == "3 reminders at a time are enough"
        await world.pass_time(60)
        room.heard()
        assert await _answer(room, "!remind 60 x") == "In 60 s, then"


async def test_a_repeated_question_is_answered_once() -> None:
    """A page that saw no reply says it again with the same key and id: one question, one answer."""
    async with harness(app) as world:
        room = await _room(world)
        for _ in range(2):
            await room.client.publish_once("chat:lobby", {"text": "!help", "id": "7"}, key="7")
        await world.settle()
        assert [message.data["text"] for message in room.heard()] == ["!help", HELP]
