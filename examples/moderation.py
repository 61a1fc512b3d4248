"""A filter in front of every chat room: rude words get stars, floods are slowed down, three floods end the visit.

    python run.py --app examples/moderation.py

What a page publishes into ``chat:…`` passes through ``moderate`` before anybody
sees it or it is stored.
"""

import re
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from server.app import App, Change, Client, Disconnect, Refuse

app = App()

RUDE = re.compile(r"\b(?:darn|heck|blockhead)\b", re.IGNORECASE)
SLOW_DOWN = 429
FLOODED = 4503  # from 4500 on a client stays away
MESSAGES = 5
SECONDS = 10.0
WARNINGS = 3


class Said(Struct):
    """What a chat page publishes; anything else is refused with 107 before ``moderate`` runs."""

    text: Annotated[str, Meta(min_length=1, max_length=2000)]
    name: str = ""
    id: str = ""


@app.publishing("chat")
async def moderate(client: Client, channel: str, data: Said) -> Change | None:
    """Let a message pass, put stars into it, or refuse it."""
    slow_down(client)
    clean = RUDE.sub(lambda found: "*" * len(found[0]), data.text)
    if clean == data.text:
        return None
    return Change(msgspec.structs.replace(data, text=clean), tags={"moderated": "yes"})


def slow_down(client: Client) -> None:
    """Refuse more than MESSAGES in SECONDS; end the connection of whoever does not listen."""
    now = app.server.clock()
    recent = [at for at in client.notes.get("said", []) if at > now - SECONDS]
    if len(recent) >= MESSAGES:
        client.notes["warnings"] = client.notes.get("warnings", 0) + 1
        if client.notes["warnings"] >= WARNINGS:
            raise Disconnect(FLOODED, "too many messages")
        raise Refuse(SLOW_DOWN, "not so fast", temporary=True)
    client.notes["said"] = [*recent, now]
