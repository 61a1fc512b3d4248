"""examples/moderation.py, provoked."""

import pytest

from examples.moderation import FLOODED, MESSAGES, SECONDS, WARNINGS, app
from server.testing import ReplyError, harness


async def test_rude_words_get_stars() -> None:
    """A rude word is starred before anybody sees it, in history as well; the rest of the message stays."""
    async with harness(app) as world:
        ann, bob = await world.connect("ann"), await world.connect("bob")
        room = await bob.subscribe("chat:lobby")
        await ann.publish("chat:lobby", {"text": "What the HECK, Bob?", "name": "Ann", "id": "1"})
        message = await room.publication()
        assert message.data == {"text": "What the ****, Bob?", "name": "Ann", "id": "1"}
        assert message.tags == {"moderated": "yes"}
        assert [kept.data["text"] for kept in await room.history()] == ["What the ****, Bob?"]


async def test_polite_words_pass_as_they_are() -> None:
    """A message without rude words is untouched, down to what the filter does not know; "checked" is not rude."""
    async with harness(app) as world:
        ann = await world.connect("ann")
        room = await ann.subscribe("chat:lobby")
        await room.publish({"text": "I checked it", "mood": "good"})
        assert (await room.publication()).data == {"text": "I checked it", "mood": "good"}


@pytest.mark.parametrize("data", [{"text": ""}, {"text": 1}, {}, "hello", {"text": "x" * 2001}])
async def test_what_is_no_message_is_refused(data: object) -> None:
    """Anything that no chat page sends is 107."""
    async with harness(app) as world:
        ann = await world.connect("ann")
        with pytest.raises(ReplyError, match="107"):
            await ann.publish("chat:lobby", data)


async def test_a_flood_is_slowed_and_then_ended() -> None:
    """More than five messages in ten seconds are refused; time heals; who does not listen is sent away for good."""
    async with harness(app) as world:
        ann = await world.connect("ann")
        for _ in range(MESSAGES):
            await ann.publish("chat:lobby", {"text": "hi"})
        with pytest.raises(ReplyError, match="429") as caught:
            await ann.publish("chat:lobby", {"text": "hi"})
        assert caught.value.temporary
        await world.pass_time(SECONDS)
        for _ in range(MESSAGES):
            await ann.publish("chat:lobby", {"text": "hi again"})
        for _ in range(WARNINGS - 2):
            with pytest.raises(ReplyError, match="429"):
                await ann.publish("chat:lobby", {"text": "!"})
        with pytest.raises(Exception, match=str(FLOODED)):
            await ann.publish("chat:lobby", {"text": "!"})
        assert await ann.disconnected() == (FLOODED, "too many messages")
