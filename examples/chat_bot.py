"""A bot in every chat room: ``!help``, ``!who``, ``!time``, and ``!remind 10 tea is ready``.

    python run.py --app examples/chat_bot.py

It answers as the user "bot", after the message that it answers.
"""

import re
import time

from msgspec import Struct

from server.app import App, Client

app = App()

HELP = "I know !help, !who, !time, and !remind SECONDS TEXT"
REMIND = re.compile(r"(\d{1,5})\s+(\S.*)")
REMINDERS = 3


class Said(Struct):
    """What a chat page publishes."""

    text: str
    id: str = ""


@app.publishing("chat")
async def listen(client: Client, channel: str, data: Said) -> None:
    """Let everything pass; answer what begins with "!" beside it."""
    if data.text.startswith("!"):
        # A message that a page sends twice, since it saw no reply, has the same id: it is answered once.
        key = f"bot {client.user or client.id} {data.id}" if data.id else ""
        app.server.spawn(answer(client, channel, data.text, key), "bot answers")


async def answer(client: Client, channel: str, text: str, key: str) -> None:
    """Do what is asked, and say so."""
    word, _, rest = text.partition(" ")
    match word:
        case "!help":
            await say(channel, HELP, key)
        case "!who":
            members = await app.server.presence(channel)
            users = sorted({member.user or "a guest" for member in members.values()})
            await say(channel, f"{len(members)} here: {', '.join(users)}", key)
        case "!time":
            await say(channel, time.strftime("It is %H:%M UTC", time.gmtime(app.server.clock())), key)
        case "!remind":
            await remind(client, channel, rest, key)
        case _:
            await say(channel, f"What is {word[:20]}? {HELP}", key)


async def remind(client: Client, channel: str, text: str, key: str) -> None:
    """Wait, then say it; at most REMINDERS at a time for one client."""
    found = REMIND.fullmatch(text)
    running = client.notes.get("reminders", 0)
    if found is None:
        await say(channel, "Like this: !remind 60 tea is ready", key)
    elif running >= REMINDERS:
        await say(channel, f"{REMINDERS} reminders at a time are enough", key)
    else:
        client.notes["reminders"] = running + 1
        try:
            await say(channel, f"In {found[1]} s, then", key)
            await app.server.sleep(int(found[1]))
            await say(channel, found[2], key and f"{key} later")
        finally:
            client.notes["reminders"] -= 1


async def say(channel: str, text: str, key: str) -> None:
    """Publish as the bot."""
    await app.server.publish(
        channel, {"name": "Bot", "text": text}, key=key[:256], user="bot", conn_info={"name": "Bot"}
    )
