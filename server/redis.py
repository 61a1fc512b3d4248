"""Redis by its URL: where it is, how a connection to it is made, and what its answers mean to an operator.

For the ``redis.py`` modules behind the seams; nobody else imports the driver.

* ``parse`` reads ``redis.url`` into an ``Address``, in Centrifugo's spelling.
* ``Wire`` is one connection.  Both seams must know what redis-py's clients hide
  behind their pools: when this very connection fell silent, what it had been told
  before, and in which order.  It stands on redis-py's ``Connection``, which
  connects, does TLS and logs in, and neither retries nor reconnects by itself.
* ``find_primary`` asks Sentinels, ``find_slots`` a cluster, who is in charge.

All words about Redis are made here, and none of them contains a password.
"""

import asyncio
import math
import os
import socket
import ssl
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from typing import Any, NamedTuple, Self
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

from redis import asyncio as aioredis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import AuthenticationError, BusyLoadingError, InvalidResponse, RedisError, ResponseError

from server.errors import Unavailable

CONNECT_S = 3.0
ANSWER_S = 2.0
"""How long a connection may take to be made and logged in, and a single question to be answered."""

LEAST_VERSION = (6, 2)
LEAST_CLUSTER_VERSION = (7, 0)
"""6.2 is the oldest that the tests have run on; sharded pub/sub, which a cluster is used with, came with 7.0."""

SENTINEL_OPTIONS = ("sentinel_master_name", "sentinel_user", "sentinel_password")

Command = Sequence[str | bytes]


# --- addresses ---------------------------------------------------------------
class Kind(Enum):
    """What stands at the address; the value is the URL's scheme without TLS."""

    ALONE = "redis"
    SENTINEL = "redis+sentinel"
    CLUSTER = "redis+cluster"


class Server(NamedTuple):
    """One process of Redis, or one Sentinel."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Address:
    """What ``redis.url`` says.

    ``servers`` are the one Redis, the Sentinels, or some nodes of the cluster.
    ``master`` and the credentials after it are for Sentinel only.
    """

    kind: Kind
    servers: tuple[Server, ...]
    db: int = 0
    user: str = ""
    password: str = field(default="", repr=False)
    tls: bool = False
    master: str = ""
    sentinel_user: str = ""
    sentinel_password: str = field(default="", repr=False)

    @property
    def text(self) -> str:
        """The URL without user names and passwords, for logs and operators."""
        scheme = self.kind.value.replace("redis", "rediss", 1) if self.tls else self.kind.value
        options = [f"sentinel_master_name={quote(self.master)}"] if self.master else []
        options += [f"addr={server}" for server in self.servers[1:]]
        db = f"/{self.db}" if self.db else ""
        return f"{scheme}://{self.servers[0]}{db}" + ("?" if options else "") + "&".join(options)

    def login(self, as_sentinel: bool = False) -> dict[str, Any]:
        """The driver's keywords for whoever connects to a Redis, or to a Sentinel."""
        user, password = (self.sentinel_user, self.sentinel_password) if as_sentinel else (self.user, self.password)
        return {"username": user or None, "password": password or None, "db": 0 if as_sentinel else self.db}


def parse(url: str) -> Address:
    """Read a URL such as ``redis://user:password@host:6379/0``.

    Besides ``redis`` there are ``redis+sentinel`` (whose servers are Sentinels,
    with ``sentinel_master_name`` and perhaps ``sentinel_user``,
    ``sentinel_password``) and ``redis+cluster``; further servers come as
    ``addr=host:port``, any number of them.  ``rediss`` in place of ``redis`` is TLS
    to all of them, with the certificates that Python trusts (the environment
    variable ``SSL_CERT_FILE`` adds a private authority).  User and password are
    percent-encoded.

    Raises ``ValueError`` in operator's words, without any part of the URL that
    could belong to a password.
    """
    scheme, _, rest = url.partition("://")
    tls = scheme.startswith("rediss")
    try:
        kind = Kind(scheme.replace("rediss", "redis", 1))
    except ValueError:
        raise ValueError(
            'redis.url: expected it to begin with "redis://", "redis+sentinel://" or "redis+cluster://" '
            '(with "rediss" for TLS)'
        ) from None
    try:
        parts = urlsplit(f"redis://{rest}")
    except ValueError:  # its words quote the password
        raise ValueError(f"redis.url: expected {scheme}://host:port, found something else; {ENCODED}") from None
    if parts.fragment:
        raise ValueError(f'redis.url: expected no "#" in it; {ENCODED}')
    options = _options(kind, parts)
    if kind is Kind.SENTINEL and not any(options.get("sentinel_master_name", ())):
        raise ValueError(
            "redis.url: expected ?sentinel_master_name=NAME after the address of a Sentinel, found no such name"
        )
    first = _server(parts.netloc.rpartition("@")[2], kind, f"after {scheme}://")
    return Address(
        kind,
        (first, *(_server(text, kind, 'after "addr="') for text in options.get("addr", ()))),
        _db(kind, parts.path),
        unquote(parts.username or ""),
        unquote(parts.password or ""),
        tls,
        *("".join(options.get(name, ())) for name in SENTINEL_OPTIONS),
    )


ENCODED = "in a password, write / as %2F, ? as %3F, # as %23, @ as %40 and [ as %5B"


def _options(kind: Kind, parts: SplitResult) -> dict[str, list[str]]:
    known = {Kind.ALONE: (), Kind.CLUSTER: ("addr",), Kind.SENTINEL: ("addr", *SENTINEL_OPTIONS)}[kind]
    options: dict[str, list[str]] = {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name not in known:
            expected = f"one of the options {', '.join(known)}" if known else "no options"
            shown = f'"{name}"' if name in ("addr", *SENTINEL_OPTIONS) else "another one"
            raise ValueError(f"redis.url: expected {expected} with {kind.value}://, found {shown}; {ENCODED}")
        if name in options and name != "addr":
            raise ValueError(f'redis.url: expected the option "{name}" once, found it twice')
        options.setdefault(name, []).append(value)
    return options


def _server(text: str, kind: Kind, where: str) -> Server:
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or port == 0 or "@" in text or parts.netloc != text:
        further = "" if kind is Kind.ALONE else ", further ones as addr=host:port"
        raise ValueError(
            f"redis.url: expected one host:port with a port from 1 to 65535 {where}{further}, "
            f"found something else; {ENCODED}"
        )
    return Server(host, port or (26379 if kind is Kind.SENTINEL else 6379))


def _db(kind: Kind, path: str) -> int:
    text = path.removeprefix("/")
    if not text:
        return 0
    if not (text.isascii() and text.isdigit() and len(text) < 6):
        raise ValueError(f"redis.url: expected a database number such as /0 after host:port; {ENCODED}")
    if kind is Kind.CLUSTER and int(text):
        raise ValueError("redis.url: expected no database number, or /0: a Redis Cluster has only that one")
    return int(text)


# --- one connection ----------------------------------------------------------
class ErrorReply(NamedTuple):
    """Redis refused a command: ``code`` such as "NOPERM", and its words."""

    code: str
    text: str

    def __str__(self) -> str:
        return f"{self.code} {self.text}"


Answer = list[Any] | bytes | int | None | ErrorReply


class _Connection(aioredis.Connection):
    """redis-py's connection, which lets us write without waiting and end without saying goodbye."""

    def transmit(self, chunks: list[bytes]) -> None:
        if self._writer is not None:
            self._writer.writelines(chunks)

    async def drain(self) -> None:
        if self._writer is not None:
            await self._writer.drain()

    def abort(self) -> None:
        if self._writer is not None:
            self._writer.transport.abort()  # close() would wait for a peer that reads no more
            self._parser.on_disconnect()  # type: ignore[no-untyped-call]
            self._reader = self._writer = None


class _TlsConnection(_Connection, aioredis.SSLConnection):
    """The same, encrypted; all share one context, since to load what is trusted takes many milliseconds."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.ssl_context.context = trusted()


@cache
def trusted() -> ssl.SSLContext:
    """The certificates that Python trusts, read once."""
    return ssl.create_default_context()


class Wire:
    """One connection to one Redis, logged in and in RESP2, where answers and messages come in one order.

    It is silent when its peer is: whoever holds it watches it.  ``abort`` it in
    the end, also after an error.
    """

    def __init__(self, connection: _Connection, server: Server) -> None:
        self._connection = connection
        self.server = server
        self.mode = self.role = ""
        self.version: tuple[int, ...] = ()

    def __repr__(self) -> str:
        return f"<Wire {self.server} {self.role}>"

    @classmethod
    async def open(cls, address: Address, server: Server, as_sentinel: bool = False) -> Self:
        """Connect to one server of ``address``, log in, and see that it is what the address says.

        Raises ``errors.Unavailable`` in operator's words, within ``CONNECT_S``.
        """
        failing = "cannot be reached (it may not speak TLS)" if address.tls else "cannot be reached"

        async def log_in(connection: aioredis.Connection) -> None:
            nonlocal failing
            failing = "did not answer"
            await connection.on_connect()

        connection = (_TlsConnection if address.tls else _Connection)(
            host=server.host,
            port=server.port,
            protocol=2,
            driver_info=None,
            redis_connect_func=log_in,
            # With time-outs of its own it writes by asyncio.wait_for, which on Python 3.11 may swallow a cancellation.
            socket_timeout=None,
            socket_connect_timeout=None,
            **address.login(as_sentinel),
        )
        wire = cls(connection, server)
        try:
            async with asyncio.timeout(CONNECT_S):
                await connection.connect()  # type: ignore[no-untyped-call]
                await wire._greet()
        except TimeoutError:
            wire.abort()
            raise Unavailable(f"redis.url: {server} {failing} within {CONNECT_S:g} s") from None
        except (RedisError, OSError) as error:
            wire.abort()
            raise Unavailable(in_words(server, error)) from error
        except BaseException:
            wire.abort()
            raise
        if found := misfit(address.kind, wire, as_sentinel):
            wire.abort()
            raise Unavailable(f"redis.url: {found}")
        return wire

    async def _greet(self) -> None:
        # HELLO without arguments changes nothing, tells all that we must know, and needs no permission.
        await self._connection.send_command("HELLO", check_health=False)
        said = await self._connection.read_response()
        found = {bytes(name).decode(): value for name, value in zip(said[::2], said[1::2], strict=False)}
        self.mode, self.role = found["mode"].decode(), found.get("role", b"").decode()
        self.version = tuple(int(part) for part in found["version"].decode().split(".") if part.isdigit())

    def write(self, commands: Iterable[Command]) -> None:
        """Send commands in one piece; never waits, and does nothing once the connection is gone."""
        self._connection.transmit(self._connection.pack_commands(commands))

    async def drain(self) -> None:
        """Wait until most of what was written has left this process; raises ``errors.Unavailable``."""
        try:
            await self._connection.drain()
        except OSError as error:
            raise Unavailable(in_words(self.server, error)) from error

    async def read(self) -> Answer:
        """The next answer or message, however long it takes; raises ``errors.Unavailable`` when none will come.

        It does not let others run while something has arrived already.
        """
        try:
            answer: Answer = await self._connection.read_response(timeout=math.inf)
        except ResponseError as error:
            return _refusal(error)
        except (RedisError, OSError) as error:
            raise Unavailable(in_words(self.server, error)) from error
        return answer

    async def ask(self, *command: str | bytes) -> Answer:
        """Send one command and return its answer; raises ``errors.Unavailable``, also after ``ANSWER_S``."""
        self.write([command])
        try:
            async with asyncio.timeout(ANSWER_S):
                return await self.read()
        except TimeoutError:
            self.abort()
            raise Unavailable(f"redis.url: {self.server} did not answer within {ANSWER_S:g} s") from None

    def abort(self) -> None:
        """End the connection at once; may be called again."""
        self._connection.abort()


def _refusal(error: ResponseError) -> ErrorReply:
    code, _, text = str(error).partition(" ")
    return ErrorReply(error.status_code, str(error)) if error.status_code else ErrorReply(code, text)


# --- words for the operator --------------------------------------------------
def misfit(kind: Kind, wire: Wire, as_sentinel: bool = False) -> str:
    """What is wrong with the server at the other end, given what ``redis.url`` says is there; ``""`` if nothing."""
    server, mode = wire.server, wire.mode
    if as_sentinel or mode == "sentinel":
        if as_sentinel and mode == "sentinel":
            return ""
        if as_sentinel:
            return f'expected a Sentinel at {server}, found a Redis; write "redis://" for that'
        return f'expected a Redis at {server}, found a Sentinel; write "redis+sentinel://" for that'
    if kind is Kind.CLUSTER and mode != "cluster":
        return f'expected a node of a Redis Cluster at {server}, found a Redis alone; write "redis://" for that'
    if kind is not Kind.CLUSTER and mode == "cluster":
        return f'expected a Redis alone at {server}, found a node of a Redis Cluster; write "redis+cluster://" for that'
    least = LEAST_CLUSTER_VERSION if kind is Kind.CLUSTER else LEAST_VERSION
    if wire.version < least:
        expected, found = (".".join(map(str, version)) for version in (least, wire.version))
        what = "a Redis Cluster" if kind is Kind.CLUSTER else "a Redis"
        return f"expected {what} of version {expected} or newer at {server}, found {found}"
    if kind is not Kind.CLUSTER and wire.role not in ("", "master"):
        return f"expected a primary at {server}, found a {wire.role}"
    return ""


def in_words(server: Server | str, error: Exception) -> str:
    """What an error of the driver says about ``server``, in operator's words."""
    return f"redis.url: {_in_words(server, error)}"


def _in_words(server: Server | str, error: Exception) -> str:
    cause = error if isinstance(error, OSError) else error.__context__
    match error:
        case AuthenticationError(status_code="NOAUTH"):
            return f"expected user or password for {server}, found none: it asks for them"
        case AuthenticationError(status_code="WRONGPASS"):
            return f"expected user and password of {server}, found others: it refuses them"
        case AuthenticationError() if "without any password" in str(error):
            return f"expected no password for {server}, found one: none is set there"
        case AuthenticationError():
            return f"{server} refuses the login ({error})"
        case BusyLoadingError():
            return f"{server} is still loading its data"
        case ResponseError():
            refusal = _refusal(error)
            if "unknown command" in refusal.text.lower():
                least = ".".join(map(str, LEAST_VERSION))
                return f"expected a Redis of version {least} or newer at {server}, found that it knows no HELLO"
            return f"{server} refuses to serve us ({refusal})"
        case InvalidResponse():
            return f"expected a Redis at {server}, found something that speaks otherwise ({error})"
    match cause:
        case ssl.SSLCertVerificationError():
            return f"expected a certificate of {server} that is trusted here, found another ({cause.verify_message})"
        case ssl.SSLError():
            return f"expected TLS at {server}, found something else ({cause.reason or cause})"
        case socket.gaierror():
            return f"expected the name or address of a host, found {server} ({cause.strerror})"
        case OSError():
            return f"{server} cannot be reached ({os.strerror(cause.errno) if cause.errno else cause})"
    return f"{server} ended the connection ({error})"


# --- who is in charge --------------------------------------------------------
async def find_primary(address: Address) -> Server:
    """Whom the Sentinels of ``address`` call primary: most of them, or of those that answer.

    Raises ``errors.Unavailable`` within a few seconds.
    """
    votes: Counter[Server] = Counter()
    strangers, silent = [], []
    asking = [asyncio.ensure_future(_ask_sentinel(address, server)) for server in address.servers]
    try:
        for answer in asyncio.as_completed(asking):
            try:
                primary = await answer
            except Unavailable as error:
                silent.append(str(error).removeprefix("redis.url: "))
                continue
            if isinstance(primary, str):
                strangers.append(primary)
                continue
            votes[primary] += 1
            if votes[primary] * 2 > len(address.servers):
                return primary
    finally:
        await _dismiss(asking)
    if votes:
        return votes.most_common(1)[0][0]
    raise Unavailable(f"redis.url: {(strangers or silent)[0]}")


async def _ask_sentinel(address: Address, server: Server) -> Server | str:
    """The primary's address, or in words that this Sentinel knows none."""
    wire = await Wire.open(address, server, as_sentinel=True)
    try:
        match await wire.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", address.master):
            case [bytes() as host, bytes() as port]:
                return Server(host.decode(), int(port))
            case ErrorReply() as reply:
                raise Unavailable(f"redis.url: Sentinel {server} answered {reply}")
        known = await wire.ask("SENTINEL", "MASTERS")
        masters = [dict(zip(one[::2], one[1::2], strict=False)) for one in known] if isinstance(known, list) else []
        names = ", ".join(f'"{one[b"name"].decode()}"' for one in masters) or "none"
        return (
            f'expected sentinel_master_name to be one that Sentinel {server} knows ({names}), found "{address.master}"'
        )
    finally:
        wire.abort()


class Slots:
    """Which node of a cluster serves which slot (Redis Cluster specification, "Keys distribution model")."""

    def __init__(self, owners: dict[int, Server]) -> None:
        self._owners = owners
        self.servers = frozenset(owners.values())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slots) and self._owners == other._owners

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def all_of(cls, server: Server) -> Self:
        """A Redis that serves everything."""
        return cls(dict.fromkeys(range(REDIS_CLUSTER_HASH_SLOTS), server))

    def owner(self, slot: int) -> Server | None:
        """The node that serves ``slot`` (see ``slot_of``); ``None`` if nobody does."""
        return self._owners.get(slot)


def slot_of(name: bytes) -> int:
    """The slot of a channel or key, 0 to 16383."""
    return key_slot(name)


async def find_slots(address: Address, known: Iterable[Server] = ()) -> Slots:
    """Ask nodes of a cluster who serves what: those of ``address`` and those ``known``, and believe the first answer.

    Raises ``errors.Unavailable`` within a few seconds.
    """
    refused = []
    asking = [asyncio.ensure_future(_ask_slots(address, server)) for server in {*address.servers, *known}]
    try:
        for answer in asyncio.as_completed(asking):
            try:
                return await answer
            except Unavailable as error:
                refused.append(str(error))
    finally:
        await _dismiss(asking)
    raise Unavailable(refused[0])


async def _ask_slots(address: Address, server: Server) -> Slots:
    wire = await Wire.open(address, server)
    try:
        answer = await wire.ask("CLUSTER", "SLOTS")
    finally:
        wire.abort()
    if not isinstance(answer, list):
        raise Unavailable(f"redis.url: expected that {server} answers CLUSTER SLOTS, found {answer!s}")
    owners = {}
    for first, last, (host, port, *_), *_ in answer:
        owner = Server((host or b"").decode().strip("?") or server.host, port)
        owners.update(dict.fromkeys(range(first, last + 1), owner))
    if not owners:
        raise Unavailable(f"redis.url: expected nodes that serve slots, found that {server} knows of none")
    return Slots(owners)


async def _dismiss(asking: "Sequence[asyncio.Future[Any]]") -> None:
    """Ask no further, and leave no connection behind."""
    for one in asking:
        one.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
