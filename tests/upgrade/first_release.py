"""What the first release stored, and how it was written down; ``first/README.md`` tells the command.

Run on that release's own code this makes the files in ``first/``: the SQLite file as
that code closed it, the collections and indexes of its MongoDB database as extended
JSON, and for either what that code itself read from it in the end.

``test_upgrade`` takes from here what must be there, and reads it in the same way.
"""

import asyncio
import base64
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pymongo
from bson import json_util
from mongod import ReplicaSet
from pymongo.database import Database

from server.history import Draft, History
from server.history.mongo import MongoHistory
from server.history.sqlite import SqliteHistory
from server.settings import MongoSettings
from server.stream import ClientInfo, Retention

FOLDER = Path(__file__).parent / "first"

NOW = 1_763_750_000_000
"""In Unix ms, when all of it was published; the clock of whoever reads it later is ahead."""

LONG_MS = 100 * 365 * 86_400_000
"""How long keys are remembered that are to hold at any time at which the tests may run."""

FOREVER = Retention(-1, -1, -1)
TEN = Retention(10, -1, -1)
MORTAL = Retention(-1, 1000, 2000)
ANN = ClientInfo("ann", "c1", b'{"name":"Ann"}', b"[1]")
BINARY = bytes(range(256))


def retention_of(channel: str) -> Retention:
    """What holds for a channel, by its namespace."""
    return {"short": TEN, "mortal": MORTAL}.get(channel.partition(":")[0], FOREVER)


async def _say(history: History, channel: str, *payloads: bytes, now_ms: int = NOW, **draft: Any) -> None:
    """Publish, all at once: what is gathered becomes one commit."""
    drafts = [Draft(payload, **draft) for payload in payloads]
    await asyncio.gather(*(history.append(channel, each, retention_of(channel), now_ms) for each in drafts))


def _numbers(first: int, last: int) -> list[bytes]:
    return [b"%d" % number for number in range(first, last + 1)]


async def _fill(make: Callable[[int], History]) -> dict[str, Any]:
    """Something of everything; returns what the code that wrote it reads."""
    history = make(LONG_MS)
    await history.open()
    await _say(history, "chat:plain", b'"hello"', info=ANN, tags={"lang": "de", "": "\u00e4"})
    await _say(history, "chat:plain", b'{"a": 1.10}', b"null", b'"\xf0\x9f\x8c\x8a"')
    await _say(history, "raw:binary", BINARY, b"", info=ClientInfo("", "c2", BINARY))
    for start in range(1, 121, 40):
        await _say(history, "chat:long", *_numbers(start, start + 39), now_ms=NOW + start)
    for number in range(1, 4):
        await _say(history, "chat:keys", b"%d" % number, key=f"k{number}")
    await _say(history, "short:trimmed", *_numbers(1, 25))
    await _say(history, "short:trimmed", *_numbers(26, 40))
    await _say(history, "chat:removed", *_numbers(1, 5), key="")
    await _say(history, "chat:removed", b"6", key="gone")
    await history.remove("chat:removed")
    await _say(history, "chat:removed", *_numbers(7, 8))
    await _say(history, "chat:emptied", *_numbers(1, 3))
    await history.remove("chat:emptied")
    await _say(history, "chat:redacted", *_numbers(1, 3), info=ANN)
    await history.redact("chat:redacted", 2)
    await _say(history, "mortal:again", *_numbers(1, 3))
    await _say(history, "mortal:gone", *_numbers(1, 3))
    for _ in range(20):
        await history.sweep(retention_of, NOW + 10_000)
    await _say(history, "mortal:again", *_numbers(1, 2), now_ms=NOW + 20_000)
    await _say(history, "short:unswept", *_numbers(1, 25), now_ms=NOW + 20_000)
    await history.close()

    history = make(1000)
    await history.open()
    await _say(history, "chat:keys", b"4", key="expired", now_ms=NOW + 20_000)
    await history.close()

    history = make(LONG_MS)
    await history.open()
    found = await _read(history)
    await history.close()
    return found


CHANNELS = (
    "chat:plain", "raw:binary", "chat:long", "chat:keys", "short:trimmed", "short:unswept", "chat:removed",
    "chat:emptied", "chat:redacted", "mortal:again", "mortal:gone", "chat:never",
)  # fmt: skip


async def _read(history: History) -> dict[str, Any]:
    return {channel: await read(history, channel) for channel in CHANNELS}


async def read(history: History, channel: str) -> dict[str, Any]:
    """All that there is of a channel, in JSON's types; nothing is too old by itself."""
    retention = TEN if channel.startswith("short:") else FOREVER
    page = await history.read(channel, retention, NOW + 20_000, limit=-1, max_bytes=2**40)
    return {
        "epoch": page.top.epoch,
        "top": page.top.offset,
        "floor": page.floor,
        "publications": [
            {
                "offset": publication.offset,
                "time": publication.time_ms,
                "data": base64.b64encode(publication.data).decode(),
                "info": msgspec.to_builtins(publication.info),
                "tags": publication.tags,
            }
            for publication in page.publications
        ],
    }


async def _block(make: Callable[[], Any]) -> Any:
    """Users who are kept out, of one thing and of another, one who was and is not, and one whose time is over."""
    from server.blocks import Block, adding, lifting

    blocks = make()
    await blocks.open()
    await blocks.change("ann", adding(Block(reason="spam \u00e4")), NOW)
    await blocks.change("bob", adding(Block("chat:plain", muted=True)), NOW)
    await blocks.change("bob", adding(Block("chat:keys", expire_at=NOW // 1000 + 60)), NOW)
    await blocks.change("cid", adding(Block()), NOW)
    await blocks.change("cid", lifting("", muted=False), NOW)
    found = msgspec.to_builtins(sorted(await blocks.records(), key=lambda record: record.user))
    await blocks.close()
    return found


def dump(database: Database[dict[str, Any]]) -> dict[str, Any]:
    """All documents and indexes of a database, by collection."""
    return {
        name: {
            "documents": list(database[name].find().sort("_id")),
            "indexes": [dict(index) for index in database[name].list_indexes() if index["name"] != "_id_"],
        }
        for name in sorted(database.list_collection_names())
    }


def restore(database: Database[dict[str, Any]], *names: str) -> None:
    """Put into an empty database what these files of ``first/`` say."""
    for name in names:
        options = json_util.CANONICAL_JSON_OPTIONS
        for collection, stored in json_util.loads((FOLDER / name).read_text(), json_options=options).items():
            if stored["documents"]:
                database[collection].insert_many(stored["documents"])
            if stored["indexes"]:
                database.command({"createIndexes": collection, "indexes": stored["indexes"]})


def _write(name: str, found: Any) -> None:
    text = found if isinstance(found, str) else json_util.dumps(found)
    (FOLDER / name).write_bytes(msgspec.json.format(text.encode(), indent=1) + b"\n")


def main() -> None:
    """Make the files anew whose names begin as the command line says: ``history`` or ``blocks``."""
    (what,) = sys.argv[1:]
    path = FOLDER / f"{what}.db"
    for former in FOLDER.glob(f"{what}*"):
        former.unlink()
    with ReplicaSet(1) as one, pymongo.MongoClient[dict[str, Any]](one.url) as client:
        settings = MongoSettings(url=one.url, database="first")
        if what == "history":
            file = asyncio.run(_fill(lambda ttl_ms: SqliteHistory(path, idempotency_ttl_ms=ttl_ms)))
            database = asyncio.run(_fill(lambda ttl_ms: MongoHistory(settings, idempotency_ttl_ms=ttl_ms)))
            (FOLDER / "history.db.lock").unlink()
        else:
            from server.blocks.mongo import MongoBlocks
            from server.blocks.sqlite import SqliteBlocks

            file = asyncio.run(_block(lambda: SqliteBlocks(path)))
            database = asyncio.run(_block(lambda: MongoBlocks(settings)))
        _write(f"{what}.read.json", {"file": file, "database": database})
        options = json_util.CANONICAL_JSON_OPTIONS
        _write(f"{what}.mongo.json", json_util.dumps(dump(client["first"]), json_options=options))


if __name__ == "__main__":
    main()
