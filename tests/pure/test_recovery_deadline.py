"""PROTOCOL 18.0.7: until when a recovery's turn must come, counted from when its command came, in virtual time."""

import asyncio
import json
from random import Random
from typing import Any

from support import settings
from weather import WIRE, World, live_through

from server.commands import SKILLS
from server.errors import Disconnect
from server.history import Draft
from server.inside import InsideOutbox
from server.outbox import Request
from server.session import Session


class Diary(InsideOutbox):
    """Notes each reply by its id, with the time of the loop."""

    def __init__(self) -> None:
        self.wire = WIRE
        self.replies: dict[int, tuple[float, dict[str, Any]]] = {}
        self.full = asyncio.Event()

    def send(self, frame: bytes) -> None:
        """See ``Outbox.send``."""
        for line in frame.decode().splitlines():
            reply = json.loads(line)
            if "id" in reply:
                self.replies[reply["id"]] = asyncio.get_running_loop().time(), reply
        if len(self.replies) == 11:
            self.full.set()

    async def drained(self) -> None:
        """See ``Outbox.drained``."""

    def close(self, disconnect: Disconnect) -> None:
        """See ``Outbox.close``."""


def test_half_of_the_publish_timeout_counts_from_when_a_command_came() -> None:
    """Of ten recoveries that came in one breath those have their turn for which it comes within a second of two.

    Two at once and two a second later (the bucket has half a token more than two): so four.  The others
    are told as soon as it is known, not each after half of what the one before it has left.
    """

    async def story() -> None:
        chosen = settings(client={"recovery_rate_limit": 2}, sqlite={"publish_timeout": "2s"})
        async with World(Random(1), nodes=1, settings_=chosen) as world:
            world.weather.clear()
            node, diary = world.nodes[0], Diary()
            namespace = node.channels.known("chat:0")
            for number in range(10):
                for text in (b"0", b"1"):
                    await node.publish(f"chat:{number}", namespace, Draft(text))
            session = Session(node, world.gate, SKILLS, diary, Request("test", "json", "", {}))
            commands: list[dict[str, Any]] = [{"id": 1, "connect": {}}]
            commands += [
                {"id": 2 + number, "subscribe": {"channel": f"chat:{number}", "recover": True, "offset": 1}}
                for number in range(10)
            ]
            began = asyncio.get_running_loop().time()
            session.receive("\n".join(map(json.dumps, commands)).encode())
            await diary.full.wait()
            outcomes = [diary.replies[id] for id in range(2, 12)]
            assert ["error" in reply for _, reply in outcomes] == [False] * 4 + [True] * 6
            assert [round(at - began, 1) for at, _ in outcomes] == [0.0, 0.0, 0.3] + [0.8] * 7
            session.gone()

    live_through(story())
