"""What a back end asks of the server: the methods of its API, whatever carries them.

``METHODS`` is their table: a name, the typed parameters, and the function that
carries it out.  ``Backend.call`` decodes, carries out and encodes one call.  Knows
no HTTP; ``handlers/api.py`` has the forms in which calls come, and the key.

Nobody who calls has to be slow or hostile to ask for much: a history without end,
ten thousand channels at once.  So work is done in slices with a turn of the loop
between them, answers are encoded slice by slice, and each is bounded in bytes.
PROTOCOL 15.
"""

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET, Raw, UnsetType

from server import audit, orders, protocol, user_blocks, user_connections
from server.auth import Override
from server.channels import Namespace, check_payload
from server.commands import history_page
from server.errors import (
    BAD_REQUEST,
    FORCE_DISCONNECT,
    INTERNAL,
    LIMIT_EXCEEDED,
    METHOD_NOT_FOUND,
    NOT_AVAILABLE,
    Refusal,
    Refused,
    Unavailable,
)
from server.globs import matcher
from server.history import Draft
from server.hooks import ending
from server.messages import Message
from server.node import Node
from server.observe import event
from server.stream import Position

T = TypeVar("T")

HISTORY_BYTES = 8 * 1024 * 1024
"""About how many bytes of publications one answer brings; the rest can be asked for from the last one's offset on."""

PAGE_PUBLICATIONS = 1000
PAGE_BYTES = 256 * 1024
"""How much of a history is read and encoded at a time."""

BATCH_BYTES = 16 * 1024 * 1024
"""Once the answers of one request have come to so much, what has not begun is not carried out."""

COMMANDS = 10_000
"""How many commands one request may hold."""

SLICE = 200
"""Channels of a broadcast, commands of a batch, members of an answer: so many in one turn of the loop."""

PARALLEL = 16
"""Commands of a parallel batch that are under way at a time."""

LOGGED_REFUSALS = 20
"""Refusals within one request of which the log has each."""


# --- parameters ------------------------------------------------------------------
class Flag(msgspec.Struct):
    """``{"value": true}``, as overrides are written (PROTOCOL 8.1)."""

    value: bool = False


class Channel(msgspec.Struct):
    """What presence, presence_stats and history_remove take."""

    channel: str = ""


class Publish(Message):
    """PROTOCOL 15.2, publish."""

    channel: str = ""


class Broadcast(Message):
    """PROTOCOL 15.2, broadcast."""

    channels: list[str] = msgspec.field(default_factory=list)


class Targeted(msgspec.Struct):
    """Whom subscribe, unsubscribe, disconnect and refresh are for."""

    user: str = ""
    client: str = ""
    session: str = ""

    def target(self, spared: Sequence[str] = ()) -> orders.Target:
        """The connections that are meant, but the ``spared`` client ids."""
        return orders.Target(self.user, self.client, spared, self.session)


class Subscribe(Targeted):
    """PROTOCOL 15.2, subscribe."""

    channel: str = ""
    info: protocol.Payload = UNSET
    b64info: str = ""
    data: protocol.Payload = UNSET
    b64data: str = ""
    expire_at: int = 0
    recover_since: protocol.StreamPosition | None = None
    override: dict[str, Flag | None] | None = None


class Unsubscribe(Targeted):
    """PROTOCOL 15.2, unsubscribe."""

    channel: str = ""


class DisconnectCode(msgspec.Struct):
    """The code that an ordered disconnect carries."""

    code: int = FORCE_DISCONNECT.code
    reason: str = FORCE_DISCONNECT.reason


class Disconnect(Targeted):
    """PROTOCOL 15.2, disconnect."""

    whitelist: list[str] | None = None
    disconnect: DisconnectCode | None = None


class Refresh(Targeted):
    """PROTOCOL 15.2, refresh."""

    expired: bool = False
    expire_at: int = 0
    info: protocol.Payload = UNSET


class History(msgspec.Struct):
    """PROTOCOL 15.2, history."""

    channel: str = ""
    limit: int = 0
    since: protocol.StreamPosition | None = None
    reverse: bool = False


class Redact(msgspec.Struct):
    """PROTOCOL 15.2, redact."""

    channel: str = ""
    offset: protocol.Offset = 0


class Pattern(msgspec.Struct):
    """PROTOCOL 15.2, channels."""

    pattern: str = ""


class Info(msgspec.Struct):
    """PROTOCOL 15.2, info; takes nothing."""


class Rpc(msgspec.Struct):
    """PROTOCOL 15.2, rpc."""

    method: str = ""
    params: protocol.Payload = UNSET


class Batch(msgspec.Struct):
    """PROTOCOL 15.2, batch."""

    commands: list[Raw] = []
    parallel: bool = False


# --- results ---------------------------------------------------------------------
class Positioned(msgspec.Struct, omit_defaults=True):
    """The result of a publish; empty in a passing channel."""

    offset: int = 0
    epoch: str = ""


class Error(msgspec.Struct):
    """Why a call was not carried out, as its caller is told."""

    code: int
    message: str


class Failed(Exception):
    """A call was not carried out; ``error`` is for the caller."""

    def __init__(self, error: Error) -> None:
        super().__init__(f"{error.code} {error.message}")
        self.error = error


encode = msgspec.json.Encoder().encode
DONE = b"{}"


# --- one request -------------------------------------------------------------------
class Backend:
    """The methods of one request, and how many of its calls were refused so far.

    Each method takes its parameters and returns the result as JSON, or raises
    ``Refused`` or ``Unavailable``.
    """

    def __init__(self, node: Node, author: audit.Author | None = None) -> None:
        self._node = node
        self._author = author or audit.Author()
        self._refusals = 0

    def __repr__(self) -> str:
        return f"<Backend of {self._node!r}>"

    async def call(self, method: str, parameters: bytes) -> bytes:
        """Carry out one call with a JSON text of parameters; returns its result as JSON, or raises ``Failed``.

        Raises ``msgspec.DecodeError``, ``UnicodeDecodeError`` or ``RecursionError``
        if ``parameters`` are no JSON text that can be read.
        """
        known = METHODS.get(method)
        if known is None:
            raise Failed(self._error(method, METHOD_NOT_FOUND, f"no method {method[:64]!r}"))
        self._node.counts.calls[method] += 1
        kind, carry_out = known
        try:
            if not parameters.isascii():
                parameters.decode()  # what is passed on unread must be good as well
            request = msgspec.json.decode(parameters, type=kind)
        except msgspec.ValidationError as error:
            # The caller is the operator's own program: it may know which field.
            refusal = Refusal(BAD_REQUEST.code, f"{BAD_REQUEST.message}: {error}")
            raise Failed(self._error(method, refusal, str(error))) from None
        try:
            result = await carry_out(self, request)
        except Refused as refused:
            failure = self._error(method, refused.refusal, refused.why)
        except Unavailable as unavailable:
            failure = self._error(method, INTERNAL, str(unavailable))
        except protocol.Inexpressible as inexpressible:
            failure = self._error(method, NOT_AVAILABLE, str(inexpressible))
        except Exception as fault:
            event("command.failed", client="", method=f"api {method}", fault=fault)
            failure = Error(INTERNAL.code, INTERNAL.message)
        else:
            audit.note(self._author, method, request, 0)
            return result
        audit.note(self._author, method, request, failure.code)
        raise Failed(failure)

    def too_much(self, method: str) -> Error:
        """In place of a call that is not carried out, since the answers before it are more than ``BATCH_BYTES``."""
        why = f"the answers before it are more than {BATCH_BYTES} bytes, so it was not carried out"
        return self._error(method, Refusal(LIMIT_EXCEEDED.code, f"{LIMIT_EXCEEDED.message}: {why}"), why)

    def _error(self, method: str, refusal: Refusal, why: str) -> Error:
        self._refusals += 1
        self._node.counts.refused(refusal.code, why)
        if self._refusals <= LOGGED_REFUSALS:
            event("command.refused", client="", method=f"api {method[:64]}", code=refusal.code, why=why)
        return Error(refusal.code, refusal.message)

    def _known(self, channel: str) -> Namespace:
        if not channel:
            raise Refused(BAD_REQUEST, "a call without channel")
        namespace = self._node.channels.known(channel)
        self._node.channels.check_name(channel, namespace)
        return namespace

    # --- publishing ------------------------------------------------------------------
    async def publish(self, request: Publish) -> bytes:
        """PROTOCOL 15.2."""
        return encode(await self._publish(request, request.channel, {}))

    async def _publish(self, message: Message, channel: str, payloads: dict[str, bytes]) -> Positioned:
        """Publish in one channel; ``payloads`` are those made already, by namespace."""
        namespace = self._known(channel)
        data = payloads.get(namespace.name)
        if data is None:
            data = check_payload(_payload(message.data, message.b64data), namespace)
            data = payloads[namespace.name] = data if namespace.binary else protocol.one_line(data)
        draft = Draft(
            data,
            tags=message.tags,
            key=message.idempotency_key,
            skip_history=message.skip_history,
            delta=message.delta,
            version=message.versioned,
        )
        position = (await self._node.publish(channel, namespace, draft)).position
        return Positioned(position.offset, position.epoch if position.offset else "")

    async def broadcast(self, request: Broadcast) -> bytes:
        """PROTOCOL 15.2; one channel's error does not fail the call."""
        if not request.channels:
            raise Refused(BAD_REQUEST, "broadcast without channels")
        payloads: dict[str, bytes] = {}

        async def one(channel: str) -> bytes:
            try:
                return b'{"result":%s}' % encode(await self._publish(request, channel, payloads))
            except Refused as refused:
                error = self._error("broadcast", refused.refusal, refused.why)
            except Unavailable as unavailable:
                error = self._error("broadcast", INTERNAL, str(unavailable))
            return b'{"error":%s}' % encode(error)

        responses: list[bytes] = []
        for some in _slices(request.channels, SLICE):
            responses += await asyncio.gather(*map(one, some))
            await asyncio.sleep(0)
        return b'{"responses":[%s]}' % b",".join(responses)

    # --- connections -----------------------------------------------------------------
    async def subscribe(self, request: Subscribe) -> bytes:
        """PROTOCOL 15.2."""
        self._known(request.channel)
        override = {name: flag.value for name, flag in (request.override or {}).items() if flag is not None}
        unknown = override.keys() - set(Override.__struct_fields__)
        if unknown:
            raise Refused(BAD_REQUEST, f"unknown override: {', '.join(sorted(unknown))}")
        since = request.recover_since
        order = orders.SubscribeOrder(
            request.target(),
            request.channel,
            _payload(request.info, request.b64info),
            _payload(request.data, request.b64data),
            request.expire_at,
            Position(since.offset, since.epoch) if since else None,
            override,
        )
        await self._node.ordering.give(order)
        return DONE

    async def unsubscribe(self, request: Unsubscribe) -> bytes:
        """PROTOCOL 15.2; an empty channel means all channels."""
        if request.channel:
            self._known(request.channel)
        await self._node.ordering.give(orders.UnsubscribeOrder(request.target(), request.channel))
        return DONE

    async def disconnect(self, request: Disconnect) -> bytes:
        """PROTOCOL 15.2."""
        end = request.disconnect or DisconnectCode()
        try:
            ending(end.code, end.reason)
        except ValueError as error:
            raise Refused(BAD_REQUEST, f"disconnect: {error}") from None
        await self._node.ordering.give(
            orders.DisconnectOrder(request.target(request.whitelist or ()), end.code, end.reason)
        )
        return DONE

    async def refresh(self, request: Refresh) -> bytes:
        """PROTOCOL 15.2."""
        info = protocol.given(request.info)
        await self._node.ordering.give(orders.RefreshOrder(request.target(), request.expired, request.expire_at, info))
        return DONE

    # --- presence and history --------------------------------------------------------
    def _present(self, channel: str) -> None:
        if not self._known(channel).options.presence:
            raise Refused(NOT_AVAILABLE, "the namespace has no presence")

    async def presence(self, request: Channel) -> bytes:
        """PROTOCOL 15.2."""
        self._present(request.channel)
        members = await self._node.presence.members(request.channel, self._node.clock())
        infos = ((client, protocol.client_info(info)) for client, info in members.items())
        return b'{"presence":%s}' % await _object(infos)

    async def presence_stats(self, request: Channel) -> bytes:
        """PROTOCOL 15.2."""
        self._present(request.channel)
        stats = await self._node.presence.stats(request.channel, self._node.clock())
        return encode(protocol.PresenceStatsResult(*stats))

    def _kept(self, channel: str) -> Namespace:
        namespace = self._known(channel)
        if not namespace.kept:
            raise Refused(NOT_AVAILABLE, "the namespace keeps no history")
        return namespace

    async def history(self, request: History) -> bytes:
        """PROTOCOL 15.2; without the limit that clients have, but in bytes."""
        namespace = self._kept(request.channel)
        publications: list[bytes] = []
        top: protocol.HistoryResult | None = None
        async for page in self._pages(request, namespace):
            top = top or page
            publications += map(encode, page.publications)
        assert top is not None
        tail = (encode(top.epoch), top.offset)
        return b'{"publications":[%s],"epoch":%s,"offset":%d}' % (b",".join(publications), *tail)

    async def _pages(self, request: History, namespace: Namespace) -> AsyncIterator[protocol.HistoryResult]:
        """Read up to ``request.limit`` publications and about ``HISTORY_BYTES``, page by page, with turns between.

        What is published meanwhile is left out, and it ends where trimming or a new
        epoch came in between: all pages are one run under one epoch.
        """
        step = -1 if request.reverse else 1
        left = request.limit
        bytes_left = HISTORY_BYTES
        since, first = request.since, None
        while True:
            size = min(left, PAGE_PUBLICATIONS) if left >= 0 else PAGE_PUBLICATIONS
            try:
                page = await history_page(
                    self._node,
                    "json",
                    request.channel,
                    namespace,
                    size,
                    since,
                    request.reverse,
                    max_bytes=min(PAGE_BYTES, bytes_left),
                )
            except Refused:
                if first is None:
                    raise
                return
            found = page.publications
            if first is None:
                first = page
            else:
                assert since is not None
                if page.epoch != first.epoch or (found and found[0].offset != since.offset + step):
                    return
                found = page.publications = [one for one in found if one.offset <= first.offset]
            yield page
            bytes_left -= sum(len(one.data) + 64 for one in found)
            left -= len(found) if left >= 0 else 0
            if not found or not left or bytes_left <= 0 or found[-1].offset == (1 if request.reverse else first.offset):
                return
            since = protocol.StreamPosition(found[-1].offset, first.epoch)
            await asyncio.sleep(0)

    async def history_remove(self, request: Channel) -> bytes:
        """PROTOCOL 15.2; offsets go on, epoch and idempotency keys stay."""
        self._kept(request.channel)
        await self._node.remove(request.channel)
        return DONE

    async def redact(self, request: Redact) -> bytes:
        """PROTOCOL 15.2; the offset stays, the payload goes."""
        self._kept(request.channel)
        if not request.offset:
            raise Refused(BAD_REQUEST, "redact without offset")
        await self._node.redact(request.channel, request.offset)
        return DONE

    # --- the whole -------------------------------------------------------------------
    async def channels(self, request: Pattern) -> bytes:
        """PROTOCOL 15.2; of all processes."""
        try:
            matcher(request.pattern)
        except ValueError as error:
            raise Refused(BAD_REQUEST, f"pattern: {error}") from None
        counts = self._node.ordering.followed(request.pattern)
        answers = await self._node.ordering.ask(orders.ChannelsQuestion(request.pattern))
        for answer in answers.values():
            await asyncio.sleep(0)
            for channel, count in _counts.decode(answer).items() if answer else ():
                counts[channel] = counts.get(channel, 0) + count
        return b'{"channels":%s}' % await _object(
            (channel, {"num_clients": count}) for channel, count in counts.items() if count
        )

    async def info(self, request: Info) -> bytes:
        """PROTOCOL 15.2; every process that is alive, as it said within the last seconds."""
        return encode({"nodes": self._node.everybody()})

    async def rpc(self, request: Rpc) -> bytes:
        """PROTOCOL 15.2; a place for extensions, of which there are none."""
        if not request.method:
            raise Refused(BAD_REQUEST, "rpc without method")
        raise Refused(METHOD_NOT_FOUND, f"no RPC method {request.method[:64]!r} for back ends")

    async def batch(self, request: Batch) -> bytes:
        """PROTOCOL 15.2; each error in its place."""
        if len(request.commands) > COMMANDS:
            raise Refused(BAD_REQUEST, f"a batch has more than {COMMANDS} commands")
        replies: list[bytes] = []
        size = 0
        for some in _slices(request.commands, PARALLEL if request.parallel else 1):
            if size > BATCH_BYTES:
                error = b'{"error":%s}' % encode(self.too_much("batch"))
                replies += [error] * (len(request.commands) - len(replies))
                break
            answers = await asyncio.gather(*map(self._batched, some))
            size += sum(map(len, answers))
            before = len(replies) // SLICE
            replies += answers
            if len(replies) // SLICE != before:
                await asyncio.sleep(0)
        return b'{"replies":[%s]}' % b",".join(replies)

    async def _batched(self, command: Raw) -> bytes:
        """The reply to one command of a batch."""
        try:
            try:
                ((method, parameters),) = msgspec.json.decode(command, type=dict[str, Raw]).items()
            except (msgspec.ValidationError, ValueError):
                refused = Refused(BAD_REQUEST, "expected a command with one method")
                raise Failed(self._error("batch", refused.refusal, refused.why)) from None
            if method == "batch":
                raise Failed(self._error(method, METHOD_NOT_FOUND, "a batch in a batch"))
            result = await self.call(method, bytes(parameters))
        except Failed as failed:
            return b'{"error":%s}' % encode(failed.error)
        return b"{%s:%s}" % (encode(method), result)


METHODS: dict[str, tuple[type[msgspec.Struct], Callable[[Backend, Any], Awaitable[bytes]]]] = {
    "publish": (Publish, Backend.publish),
    "broadcast": (Broadcast, Backend.broadcast),
    "subscribe": (Subscribe, Backend.subscribe),
    "unsubscribe": (Unsubscribe, Backend.unsubscribe),
    "disconnect": (Disconnect, Backend.disconnect),
    "refresh": (Refresh, Backend.refresh),
    "presence": (Channel, Backend.presence),
    "presence_stats": (Channel, Backend.presence_stats),
    "history": (History, Backend.history),
    "history_remove": (Channel, Backend.history_remove),
    "redact": (Redact, Backend.redact),
    "connections": (
        user_connections.Connections,
        lambda backend, request: user_connections.connections(backend._node, request),
    ),
    "block_user": (user_blocks.BlockUser, lambda backend, request: user_blocks.block_user(backend._node, request)),
    "unblock_user": (
        user_blocks.UnblockUser,
        lambda backend, request: user_blocks.unblock_user(backend._node, request),
    ),
    "blocked_users": (
        user_blocks.BlockedUsers,
        lambda backend, request: user_blocks.blocked_users(backend._node, request),
    ),
    "channels": (Pattern, Backend.channels),
    "info": (Info, Backend.info),
    "rpc": (Rpc, Backend.rpc),
    "batch": (Batch, Backend.batch),
}

_counts = msgspec.msgpack.Decoder(dict[str, int])


def _slices(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


async def _object(entries: Iterable[tuple[str, Any]]) -> bytes:
    """A JSON object, encoded some entries at a time with turns between."""
    waiting = iter(entries)
    parts: list[bytes] = []
    while some := dict(islice(waiting, SLICE)):
        parts.append(encode(some)[1:-1])
        await asyncio.sleep(0)
    return b"{%s}" % b",".join(parts)


def _payload(data: Raw | UnsetType, encoded: str) -> bytes | None:
    """A payload given as JSON, or in base64, which wins; raises ``Refused(BAD_REQUEST)``."""
    if not encoded:
        return protocol.given(data)
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(BAD_REQUEST, "a base64 field is not base64") from None
