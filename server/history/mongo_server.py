"""The server behind ``MongoHistory``: how it is reached, what is asked of it, and what becomes of a fault.

Knows the driver and the collections, and not what is done in them.

**Two drivers, one code.**  Motor and ``pymongo.AsyncMongoClient`` are made and
closed in different ways; find, insert, update and delete, which is all that is
used once it is open, are the same.

**Durable.**  Every write asks for a majority with journal, every read for what
a majority has, from the primary.  A read that has to be sure of an absence is
*linearizable*: the primary makes certain that it is one before it answers,
while a deposed one that has not noticed may tell an old truth for some seconds.

**Nothing hangs.**  Each *attempt* ends within a third of ``publish_timeout``:
the driver then cuts the connection (``pymongo.timeout``), and by the time of
the next attempt another primary may have been elected.  A member that answers
nothing at all is found out by the others, who elect another, which the driver
is told by them.

**Faults.**  The driver's exceptions come out as ``errors.Unavailable`` with
words for an operator, never with a password.  For a write that means: nothing
is known.  Some of the driver's errors would mean more (nothing was sent; the
server refused it), but the driver has tried twice by then, and the first attempt
may have succeeded: absence is a question for a read.  A duplicate key is the one
error that says something: not by *this* attempt.

**The interpreter's lock.**  Motor works in threads, which a busy event loop
starves as it would SQLite's (``sqlite_file`` tells how); so ``open`` shortens the
switch interval with Motor as well.
"""

import asyncio
import os
import re
import socket
import struct
import sys
import warnings
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import bson
import pymongo
from bson.errors import BSONError
from pymongo import IndexModel, ReadPreference, WriteConcern
from pymongo.errors import (
    BulkWriteError,
    ConfigurationError,
    DuplicateKeyError,
    InvalidURI,
    NotPrimaryError,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
)
from pymongo.read_concern import ReadConcern

from server.errors import Unavailable
from server.history.mongo_scheme import CHANNELS, FORMAT, INDEXES, LOG, META, Document
from server.observe import event
from server.settings import MongoSettings

OPEN_S = 8.0
"""How long ``open`` tries; what it then does to say what is wrong takes another second."""

PROBE_S = 1.5
OPEN_PAUSE_S = 0.25
GRACE_S = 0.5
SHORTEST_ATTEMPT_S = 0.2
SHORTEST_HEARTBEAT_MS = 500
SWITCH_S = 0.000_02
FOREIGN_SHOWN = 10
CERTAIN_BATCH = 1_000_000
DEFAULT_PORT = 27017
OP_MSG = 2013
OLDEST_WIRE_VERSION = 9
OLDEST = "4.4"

DUPLICATE_KEY = 11000
UNAUTHORIZED = 13
AUTHENTICATION_FAILED = (18, 8000)
AT_ODDS = (85, 86)

T = TypeVar("T")


class Fate(Enum):
    """What became of a document that was sent."""

    STORED = "stored"
    TAKEN = "taken"
    UNKNOWN = "unknown"


class _Wrong(Exception):
    """``open`` cannot succeed, however often it is tried within the next seconds."""


class MongoServer:
    """The replica set in ``settings``; call ``open`` before anything else, and ``close`` in the end.

    Unless it ``adopts`` it leaves history's collections alone, but wants a database of
    a format that it knows: what stands beside history is of the same format.
    """

    def __init__(self, settings: MongoSettings, *, adopts: bool = True) -> None:
        self._settings = settings
        self._adopts = adopts
        parts = urlsplit(settings.url)
        self._secrets = _secrets(settings.url)
        self._user = unquote(parts.username or "")
        self._hosts = parts.netloc.rpartition("@")[2]
        self._options = {name.lower(): value for name, value in parse_qsl(parts.query)}
        self._scheme = parts.scheme
        self.place = f"{parts.scheme}://{self._hosts}/{settings.database}"
        self.attempt_s = max(SHORTEST_ATTEMPT_S, settings.publish_timeout / 3)
        self._client: Any = None
        self._database: Any = None
        self._collections: dict[str, Any] = {}
        self._certain: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"MongoServer({self.place!r})"

    # --- life -----------------------------------------------------------------
    async def open(self) -> None:
        """Reach the primary, and see that collections and indexes are ours, or make them; within ten seconds.

        Raises ``errors.Unavailable`` in operator's words.
        """
        if self._settings.driver == "motor":
            sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_S))
        ends = asyncio.get_running_loop().time() + OPEN_S
        try:
            await self._make_client()
            await self._adopt_patiently(ends)
        except BaseException as fault:
            await self.close()
            if isinstance(fault, _Wrong):
                raise Unavailable(str(fault)) from fault.__cause__
            raise

    async def close(self) -> None:
        """Let go of all connections; harmless if there are none."""
        client, self._client = self._client, None
        self._collections = {}
        self._certain = {}
        if client is not None:
            if self._settings.driver == "motor":
                await asyncio.get_running_loop().run_in_executor(None, client.close)
            else:
                await client.close()

    def _new_client(self, url: str, **options: Any) -> Any:
        if self._settings.driver == "motor":
            from motor.motor_asyncio import AsyncIOMotorClient

            return AsyncIOMotorClient(url, io_loop=asyncio.get_running_loop(), **options)
        return pymongo.AsyncMongoClient(url, **options)

    async def _make_client(self) -> None:
        # What the URL says goes before.
        options = {
            "appname": "waterspout",
            "connectTimeoutMS": int(self.attempt_s * 1000),
            "serverSelectionTimeoutMS": int(self._settings.publish_timeout * 1000),
            # A member that the driver has lost trust in is not asked before its next heartbeat.
            "heartbeatFrequencyMS": max(SHORTEST_HEARTBEAT_MS, int(self.attempt_s * 1000)),
        }
        options = {name: value for name, value in options.items() if name.lower() not in self._options}
        try:
            with warnings.catch_warnings():
                # The driver merely warns of an option that it does not know, and goes on without, be it "tls".
                warnings.simplefilter("error", UserWarning)
                self._client = self._new_client(self._settings.url, **options)
        except (PyMongoError, ValueError, TypeError, UserWarning) as error:
            raise _Wrong(f"mongo.url: {self._clean(error)}") from error
        database = self._client.get_database(
            self._settings.database,
            read_preference=ReadPreference.PRIMARY,
            read_concern=ReadConcern("majority"),
            write_concern=WriteConcern("majority", j=True),
        )
        self._database = database
        for name in (LOG, CHANNELS, META):
            self._collections[name] = database[name]
            self._certain[name] = database[name].with_options(read_concern=ReadConcern("linearizable"))

    # --- asking ---------------------------------------------------------------
    def collection(self, name: str) -> Any:
        """A collection that is not history's, as the driver has it; to be used within ``attempt``."""
        return self._database[name]

    async def find(
        self,
        collection: str,
        query: Mapping[str, Any],
        *,
        fields: Sequence[str] = (),
        newest: bool = False,
        ordered: bool = True,
        by: str = "_id",
        limit: int = 0,
        certain: bool = False,
    ) -> list[Document]:
        """The documents that match, ascending ``by`` a field or the ``newest`` first, at most ``limit`` (0: all).

        ``fields`` are those asked for beside ``_id`` (none: all).  ``certain``
        makes the read linearizable, which costs as much as a write.  Raises
        ``errors.Unavailable``.
        """
        asked = (self._certain if certain else self._collections)[collection]

        def work() -> Awaitable[list[Document]]:
            cursor = asked.find(query, dict.fromkeys(fields, 1) or None)
            if ordered:
                cursor = cursor.sort(by, pymongo.DESCENDING if newest else pymongo.ASCENDING)
            if certain:
                cursor = cursor.batch_size(CERTAIN_BATCH)  # no second batch would be certain
            found: Awaitable[list[Document]] = cursor.limit(limit).to_list(None)
            return found

        return await self.attempt(work)

    async def insert(self, documents: Sequence[Document]) -> tuple[list[Fate], str]:
        """Send documents to the log, each to its slot; says of each what became of it, and what was wrong if anything.

        ``STORED``: a majority has it.  ``TAKEN``: not stored now, since slot or
        key is another's, or its own from an earlier attempt.
        """

        async def work() -> tuple[list[Fate], str]:
            try:
                await self._collections[LOG].insert_many(documents, ordered=False)
            except BulkWriteError as error:
                return _fates(len(documents), error.details)
            return [Fate.STORED] * len(documents), ""

        try:
            return await self.attempt(work)
        except Unavailable as error:
            return [Fate.UNKNOWN] * len(documents), str(error)

    async def update(self, collection: str, query: Mapping[str, Any], change: Mapping[str, Any]) -> int:
        """Change all documents that match; returns how many did.  Raises ``errors.Unavailable``: it is unknown."""
        done = await self.attempt(lambda: self._collections[collection].update_many(query, change))
        matched: int = done.matched_count
        return matched

    async def update_each(
        self, collection: str, changes: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], *, upsert: bool = False
    ) -> None:
        """Make changes (query, change) in one batch; raises ``errors.Unavailable``: it is unknown.

        With ``upsert`` a document that does not match is made; that another process did so first is well.
        """
        if not changes:
            return
        kind = pymongo.UpdateOne if upsert else pymongo.UpdateMany
        operations = [kind(query, change, upsert=upsert) for query, change in changes]

        async def work() -> None:
            try:
                await self._collections[collection].bulk_write(operations, ordered=False)
            except BulkWriteError as error:
                fates, why = _fates(len(operations), error.details)
                if Fate.UNKNOWN in fates:
                    raise Unavailable(f"{self.place}: {why}") from error

        await self.attempt(work)

    async def delete(self, collection: str, query: Mapping[str, Any]) -> None:
        """Delete all documents that match; raises ``errors.Unavailable``: it is unknown."""
        await self.attempt(lambda: self._collections[collection].delete_many(query))

    async def attempt(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do ``work`` within ``attempt_s``; the driver's errors come as ``errors.Unavailable``."""
        if self._client is None:
            raise Unavailable(f"history in {self.place} is not open")
        try:
            # The second one is for a driver that does not keep to the first.
            async with asyncio.timeout(self.attempt_s + GRACE_S):
                with pymongo.timeout(self.attempt_s):
                    return await work()
        except PyMongoError as error:
            raise Unavailable(f"{self.place}: {self._clean(error)}") from error
        except TimeoutError:
            raise Unavailable(f"{self.place} did not answer within {self.attempt_s + GRACE_S:g} s") from None

    def _clean(self, error: object) -> str:
        """What the driver says, on one line, without its state of the world and without the password."""
        text = str(error)
        for end in (", Timeout: ", ", full error: ", " (configured timeouts: ", ", Topology Description: "):
            text = text.partition(end)[0]
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return " ".join(text.split()) or type(error).__name__

    # --- opening --------------------------------------------------------------
    async def _adopt_patiently(self, ends: float) -> None:
        """Adopt, again and again while the fault may pass by itself: an election, a server that is starting."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                async with asyncio.timeout_at(ends):
                    return await self._adopt(ends)
            except (PyMongoError, TimeoutError) as error:
                why = await self._diagnosis(error)
                if loop.time() + OPEN_PAUSE_S >= ends:
                    raise Unavailable(why) from error
            await asyncio.sleep(OPEN_PAUSE_S)

    async def _adopt(self, ends: float) -> None:
        left_s = ends - asyncio.get_running_loop().time()
        with pymongo.timeout(max(SHORTEST_ATTEMPT_S, min(left_s, OPEN_S / 2))):
            self._judge(await self._client.admin.command("hello"))
            if not self._adopts:
                self._judge_format(await self._collections[META].find_one({"_id": "format"}))
                return
            await self._adopt_format()
            await self._judge_indexes()
        await self._make_indexes(ends)
        with pymongo.timeout(self.attempt_s):
            await self._warn_of_foreign()

    def _judge(self, hello: Mapping[str, Any]) -> None:
        """See that a primary of a replica set answered, and not too old a one."""
        address = hello.get("me") or self._hosts
        if hello.get("msg") == "isdbgrid":
            raise _Wrong(f"mongo.url: expected a replica set, {address} is a mongos of a sharded cluster")
        if not hello.get("setName"):
            raise _Wrong(
                f"mongo.url: expected a replica set, {address} is a mongod on its own, which can lose what it "
                "acknowledged; start it with --replSet and call rs.initiate() (one member is enough)"
            )
        if not hello.get("isWritablePrimary"):
            if self._options.get("directconnection", "").lower() != "true":
                raise NotPrimaryError(f"{address} is no primary any more")  # it was when the driver chose it
            raise _Wrong(
                f"mongo.url: expected the replica set {hello['setName']!r}, only its secondary {address} is asked; "
                "leave out directConnection, and name all members"
            )
        self._judge_version(hello, address)

    @staticmethod
    def _judge_version(hello: Mapping[str, Any], address: str) -> None:
        if hello.get("maxWireVersion", 0) < OLDEST_WIRE_VERSION:
            raise _Wrong(
                f"mongo.url: expected MongoDB {OLDEST} or newer, {address} is older "
                f"(wire version {hello.get('maxWireVersion', 0)}, {OLDEST} has {OLDEST_WIRE_VERSION})"
            )

    async def _adopt_format(self) -> None:
        """See that the database is ours, or empty and to be ours, and that a write reaches a majority."""
        meta = self._collections[META]
        found = await meta.find_one({"_id": "format"})
        name = self._settings.database
        if found is None:
            for collection in (LOG, CHANNELS, META):
                other = await self._collections[collection].find_one({}, {"_id": 1})
                if other is not None and await meta.find_one({"_id": "format"}) is None:
                    raise _Wrong(
                        f"mongo.database: {name!r} is another program's, its collection {collection!r} has a document "
                        f"{other['_id']!r} and no format is noted in {META!r}; name another database"
                    )
        with suppress(DuplicateKeyError):
            await meta.update_one({"_id": "format"}, {"$setOnInsert": {"version": FORMAT}}, upsert=True)
        older = {"_id": "format", "version": {"$type": "number", "$lt": FORMAT}}
        await meta.update_one(older, {"$set": {"version": FORMAT}})
        self._judge_format(await meta.find_one({"_id": "format"}) or {})

    def _judge_format(self, found: Mapping[str, Any] | None) -> None:
        """See that a database's format is one that we know; one that nobody has noted yet will be ours."""
        if found is None:
            return
        name, version = self._settings.database, found.get("version")
        if not isinstance(version, int):
            raise _Wrong(f"mongo.database: {name!r} has no format version that we know in {META!r}; name another")
        if version > FORMAT:
            raise _Wrong(
                f"mongo.database: {name!r} was written by a newer version of this server (format {version}, this one "
                f"knows up to {FORMAT}); upgrade the server, or name another database"
            )

    async def _judge_indexes(self) -> None:
        """See that no index differs from ours; one that does is the operator's to change."""
        indexes = await self._indexes()
        collation = indexes.get("_id_", {}).get("collation")
        if collation:
            raise _Wrong(self._at_odds("_id_", {"collation": dict(collation)}, {}))
        for index in INDEXES:
            found = indexes.get(index.name)
            if found is None:
                continue
            expected = {"key": list(index.keys), "unique": index.unique, "partialFilterExpression": index.partial}
            other = {
                name: value
                for name, value in found.items()
                if name not in ("v", "ns", "background") and name not in expected
            }
            actual = {
                "key": [(name, order) for name, order in found.get("key", ())],
                "unique": bool(found.get("unique", False)),
                "partialFilterExpression": dict(found.get("partialFilterExpression", {})),
                **other,
            }
            if actual != expected:
                raise _Wrong(self._at_odds(index.name, actual, expected))

    async def _make_indexes(self, ends: float) -> None:
        """Have all indexes, those that another process is making included.

        Without a limit of the driver's, by which the server would give up what it
        has begun: so it goes on after us, and a later ``open`` finds it done.
        """
        models = [
            IndexModel(list(index.keys), name=index.name, unique=index.unique, partialFilterExpression=index.partial)
            for index in INDEXES
        ]
        where = f"{self._settings.database}.{LOG}"
        try:
            async with asyncio.timeout_at(ends - OPEN_PAUSE_S):
                await self._collections[LOG].create_indexes(models)
        except TimeoutError:
            raise _Wrong(
                f"mongo.database: the indexes of {where} are still being made, which takes as long as it is large; "
                "nothing is wrong, it is ready when that is done"
            ) from None
        except OperationFailure as error:
            if error.code not in (*AT_ODDS, DUPLICATE_KEY):
                raise
            raise _Wrong(
                f"mongo.database: index missing in {where} that cannot be made: {self._clean(error)}"
            ) from error

    async def _indexes(self) -> Mapping[str, Mapping[str, Any]]:
        found: Mapping[str, Mapping[str, Any]] = await self._collections[LOG].index_information()
        return found

    def _at_odds(self, name: str, actual: object, expected: object) -> str:
        return (
            f"mongo.database: index {name!r} of {self._settings.database}.{LOG} is {actual}, expected {expected}; "
            "drop it, and it is made anew at the next start"
        )

    async def _warn_of_foreign(self) -> None:
        """Name documents of the log that no read would meet, since their ``_id`` is none of ours."""
        types = ["objectId", "string", "number", "binData", "null", "bool", "date"]  # by index, unlike "no object"
        found = (
            await self._collections[LOG].find({"_id": {"$type": types}}, {"_id": 1}).limit(FOREIGN_SHOWN).to_list(None)
        )
        for document in found:
            event("history.document_skipped", path=self.place, collection=LOG, document=repr(document["_id"]))

    # --- saying what is wrong ---------------------------------------------------
    async def _diagnosis(self, error: BaseException) -> str:
        """What an operator should hear of ``error``; raises ``_Wrong`` if it will not pass by itself."""
        match error:
            case OperationFailure(code=code) if code in AUTHENTICATION_FAILED:
                raise _Wrong(
                    f"mongo.url: {self._hosts} refused the login of user {self._user!r}: user, password, or authSource "
                    "is wrong"
                ) from error
            case OperationFailure(code=code) if code == UNAUTHORIZED:
                who = f"user {self._user!r} may not use" if self._user else "a login is needed, with a user who may use"
                raise _Wrong(
                    f"mongo.url: {who} the database {self._settings.database!r} (role readWrite): {self._clean(error)}"
                ) from error
            case InvalidURI():
                raise _Wrong(f"mongo.url: {self._clean(error)}") from error
            case ConfigurationError() | ServerSelectionTimeoutError() | TimeoutError():
                return await self._survey(error)
        return f"mongo.url: {self._clean(error)}"

    async def _survey(self, error: BaseException) -> str:
        """Ask each member that the URL names how it sees itself, and put that into one sentence."""
        if self._scheme != "mongodb" or any(name.startswith(("tls", "ssl")) for name in self._options):
            return f"mongo.url: {self._clean(error)}"
        hosts = [host for host in self._hosts.split(",") if host]
        hellos = await asyncio.gather(*map(self._probe, hosts))
        wanted = self._options.get("replicaset", "")
        findings = []
        for host, hello in zip(hosts, hellos, strict=True):
            if isinstance(hello, str):
                findings.append(f"{host}: {hello}")
                continue
            name = hello.get("setName", "")
            self._judge_version(hello, host)
            if hello.get("isreplicaset"):
                raise _Wrong(f"mongo.url: {host} is not initiated as a member of a replica set; call rs.initiate()")
            if not name:
                self._judge({**hello, "me": host})
            if wanted and name != wanted:
                raise _Wrong(f"mongo.url: expected the replica set {wanted!r}, {host} is a member of {name!r}")
            role = (
                f"the primary, but calls itself {hello.get('me')}, which cannot be reached from here"
                if hello.get("isWritablePrimary")
                else "a secondary, and knows no primary"
                if not hello.get("primary")
                else f"a secondary of {hello['primary']}, which cannot be reached from here"
            )
            findings.append(f"{host}: {role}")
        if not any(isinstance(hello, dict) for hello in hellos):
            raise _Wrong(f"mongo.url: nobody answers ({'; '.join(findings)})")
        return f"mongo.url: no primary was found ({'; '.join(findings)})"

    async def _probe(self, host: str) -> Document | str:
        """How a member sees itself, or why it does not say.

        Asked by hand: the driver keeps to itself what it was told by a server
        that is not as it expects.
        """
        parts = urlsplit(f"//{host}")
        try:
            async with asyncio.timeout(PROBE_S):
                reader, writer = await asyncio.open_connection(parts.hostname, parts.port or DEFAULT_PORT)
                try:
                    return await _hello(reader, writer)
                finally:
                    writer.close()
        except TimeoutError:
            return "no answer"
        except socket.gaierror:
            return "unknown host name"
        except OSError as error:
            return (os.strerror(error.errno) if error.errno else str(error)).lower()
        except (ValueError, EOFError, BSONError):
            return "no MongoDB, or one that expects TLS"


async def _hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Document:
    """Ask ``hello``, as an OP_MSG of one section: no flags, kind 0, a document."""
    message = bytes(5) + bson.encode({"hello": 1, "$db": "admin"})
    writer.write(struct.pack("<4i", 16 + len(message), 1, 0, OP_MSG) + message)
    (length,) = struct.unpack("<i12x", await reader.readexactly(16))
    return dict(bson.decode((await reader.readexactly(length - 16))[5:]))


def _secrets(url: str) -> list[str]:
    """Whatever in ``url`` may be of its password, even if that was not written as it should be."""
    login = url.partition("://")[2].rpartition("@")[0]
    password = login.partition(":")[2]
    pieces = {password, *re.split("[/?#@:]", password)}
    return sorted({*pieces, *map(unquote, pieces)} - {""}, key=len, reverse=True)


def _fates(count: int, details: Mapping[str, Any]) -> tuple[list[Fate], str]:
    """What a batch's errors say of each of its ``count`` writes.

    Without the write concern nothing that was written is known to stay.
    """
    concerns: Sequence[Mapping[str, Any]] = details.get("writeConcernErrors", ())
    why = "; ".join(str(concern.get("errmsg", "")) for concern in concerns)
    fates = [Fate.UNKNOWN if concerns else Fate.STORED] * count
    for error in details.get("writeErrors", ()):
        if error["code"] == DUPLICATE_KEY:
            fates[error["index"]] = Fate.TAKEN
        else:
            fates[error["index"]] = Fate.UNKNOWN
            why = why or str(error.get("errmsg", ""))
    return fates, why
