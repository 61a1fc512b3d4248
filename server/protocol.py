"""Frames to commands, and replies and pushes to frames, in JSON and in Protobuf.

Both formats carry the same messages, described once as msgspec Structs; JSON is
what msgspec makes of them, Protobuf is filled from them field by field.  Payloads
(``data``, ``conn_info``, ``chan_info``) pass through as the bytes they are.

Tried and dropped: writing the JSON of a publication by hand (0.3 µs of the 16 that one
takes, for a second description of the same message), and keeping each client's info
encoded (0.15 µs, for memory whose size clients choose).

Pure.  PROTOCOL 3 to 6.
"""

import re
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType

from server import errors, protobuf, stream
from server.errors import MALFORMED, Disconnected, Refusal

MAX_OFFSET = 2**63 - 1

T = TypeVar("T", bound=msgspec.Struct)

Offset = Annotated[int, Meta(ge=0, le=MAX_OFFSET)]
Payload = Raw | UnsetType


# --- commands (PROTOCOL 4) ---------------------------------------------------
class SubscribeRequest(msgspec.Struct):
    """PROTOCOL 4.2.

    ``flag`` bit 1 (value 1) says that numbers may stand for channels (21.4), bit 2
    (value 2) asks to be refused rather than subscribed unrecovered (11.4).  ``tf`` is a
    filter as JSON, not looked at yet (13), since a bad one costs no more than its command.
    """

    channel: str = ""
    token: str = ""
    recover: bool = False
    epoch: str = ""
    offset: Offset = 0
    data: Payload = UNSET
    positioned: bool = False
    recoverable: bool = False
    join_leave: bool = False
    delta: str = ""
    tf: Payload = UNSET
    flag: int = 0
    type: int = 0


class ConnectRequest(msgspec.Struct):
    """PROTOCOL 4.1."""

    token: str = ""
    data: Payload = UNSET
    subs: dict[str, SubscribeRequest] = {}
    name: str = ""
    version: str = ""
    headers: dict[str, str] = {}
    flag: int = 0


class ChannelRequest(msgspec.Struct):
    """What unsubscribe, presence and presence_stats ask with."""

    channel: str = ""


class PublishRequest(msgspec.Struct):
    """PROTOCOL 4.4."""

    channel: str = ""
    data: Payload = UNSET
    type: int = 0
    key: str = ""
    removed: bool = False


class StreamPosition(msgspec.Struct):
    """PROTOCOL 6.4."""

    offset: Offset = 0
    epoch: str = ""


class HistoryRequest(msgspec.Struct):
    """PROTOCOL 4.6."""

    channel: str = ""
    limit: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] = 0
    since: StreamPosition | None = None
    reverse: bool = False


class RPCRequest(msgspec.Struct):
    """PROTOCOL 4.7."""

    method: str = ""
    data: Payload = UNSET


class SendRequest(msgspec.Struct):
    """PROTOCOL 4.8."""

    data: Payload = UNSET


class RefreshRequest(msgspec.Struct):
    """PROTOCOL 4.9."""

    token: str = ""


class SubRefreshRequest(msgspec.Struct):
    """PROTOCOL 4.10."""

    channel: str = ""
    token: str = ""
    type: int = 0


class EmulationRequest(msgspec.Struct):
    """PROTOCOL 2.5: commands for the session whose stream the process ``node`` holds."""

    node: str
    session: str
    data: str


class Command(msgspec.Struct):
    """One command: an id above 0 and one method; ``send`` and the pong have no id (PROTOCOL 3.1)."""

    id: Annotated[int, Meta(ge=0, le=2**32 - 1)] = 0
    publish: PublishRequest | None = None
    subscribe: SubscribeRequest | None = None
    connect: ConnectRequest | None = None
    rpc: RPCRequest | None = None
    history: HistoryRequest | None = None
    presence: ChannelRequest | None = None
    presence_stats: ChannelRequest | None = None
    unsubscribe: ChannelRequest | None = None
    refresh: RefreshRequest | None = None
    sub_refresh: SubRefreshRequest | None = None
    send: SendRequest | None = None
    ping: dict[str, Any] | None = None

    @property
    def methods(self) -> list[str]:
        """The names of the methods that are present; a proper command has one, a pong none."""
        alone = msgspec.structs.astuple(self).count(None) == len(METHODS) - 1  # then the search ends where it is found
        found = []
        for name in METHODS:
            if getattr(self, name) is not None:
                found.append(name)
                if alone:
                    break
        return found


METHODS = tuple(name for name in Command.__struct_fields__ if name != "id")


# --- results and pushes (PROTOCOL 4 to 6) ------------------------------------
class ClientInfo(msgspec.Struct):
    """PROTOCOL 6.2; ``user`` and ``client`` are always written."""

    user: str
    client: str
    conn_info: Payload = UNSET
    chan_info: Payload = UNSET


class Publication(msgspec.Struct, omit_defaults=True):
    """PROTOCOL 6.3; ``epoch`` goes with the first publication of a stream only, ``delta`` with a patch."""

    data: Raw
    info: ClientInfo | UnsetType = UNSET
    offset: int = 0
    tags: dict[str, str] | UnsetType = UNSET
    time: int = 0
    epoch: str = ""
    delta: bool = False


class SubscribeResult(msgspec.Struct, omit_defaults=True):
    """PROTOCOL 4.2."""

    expires: bool = False
    ttl: int = 0
    recoverable: bool = False
    epoch: str = ""
    publications: list[Publication] = []
    recovered: bool = False
    offset: int = 0
    positioned: bool = False
    data: Payload = UNSET
    was_recovering: bool = False
    delta: bool = False
    id: int = 0


class ConnectResult(msgspec.Struct, omit_defaults=True):
    """PROTOCOL 4.1."""

    client: str
    version: str = ""
    expires: bool = False
    ttl: int = 0
    data: Payload = UNSET
    subs: dict[str, SubscribeResult] = {}
    ping: int = 0
    pong: bool = False
    session: str = ""
    node: str = ""
    time: int = 0


class Empty(msgspec.Struct):
    """The result that says only "done"."""


class PresenceResult(msgspec.Struct):
    """PROTOCOL 4.5; ``presence`` is always written."""

    presence: dict[str, ClientInfo]


class PresenceStatsResult(msgspec.Struct):
    """PROTOCOL 4.5; both are always written."""

    num_clients: int
    num_users: int


class HistoryResult(msgspec.Struct):
    """PROTOCOL 4.6; all three are always written."""

    publications: list[Publication]
    epoch: str
    offset: int


class RPCResult(msgspec.Struct):
    """PROTOCOL 4.7."""

    data: Payload = UNSET


class RefreshResult(msgspec.Struct, omit_defaults=True):
    """PROTOCOL 4.9, 4.10, 5.9."""

    expires: bool = False
    ttl: int = 0


class Presence(msgspec.Struct):
    """The body of join and leave (PROTOCOL 5.2, 5.3)."""

    info: ClientInfo


class Unsubscribe(msgspec.Struct):
    """PROTOCOL 5.4."""

    code: int
    reason: str


class Disconnect(msgspec.Struct):
    """PROTOCOL 5.8."""

    code: int
    reason: str


class Subscribe(msgspec.Struct, omit_defaults=True):
    """PROTOCOL 5.6."""

    recoverable: bool = False
    epoch: str = ""
    offset: int = 0
    positioned: bool = False
    data: Payload = UNSET


Body = msgspec.Struct
EMPTY = Empty()


def payload(data: bytes | None) -> Payload:
    """Payload bytes as a field of a result."""
    return UNSET if data is None else Raw(data)


def given(field: Payload) -> bytes | None:
    """A payload field of a command as bytes, ``None`` if it was absent."""
    return None if field is UNSET else bytes(field)


def client_info(info: stream.ClientInfo) -> ClientInfo:
    """What others see of a client, as it goes on the wire."""
    return ClientInfo(info.user, info.client, payload(info.conn_info), payload(info.chan_info))


def publication(pub: stream.Publication, epoch: str = "") -> Publication:
    """A publication as it goes on the wire; ``epoch`` is written with offset 1 only."""
    return Publication(
        Raw(pub.data),
        UNSET if pub.info is None else client_info(pub.info),
        pub.offset,
        pub.tags or UNSET,
        pub.time_ms,
        epoch if pub.offset == 1 else "",
    )


NEWLINE, RETURN = b"\n\r"
"""As numbers: a byte is found six times as fast as bytes are, which Python 3.11 takes for a faulty number first."""


# --- payloads ----------------------------------------------------------------
_raw = msgspec.json.Decoder(Raw)


PAYLOAD_DEPTH = 128
"""How deep a payload may be nested: some subscribers' parsers give up at a thousand, whatever ours can do."""

_strings = re.compile(rb'"(?:[^"\\]|\\.)*"')
_brackets = re.compile(rb"[][{}]")


def is_json(data: bytes) -> bool:
    """Is this one valid JSON text in UTF-8, nested at most ``PAYLOAD_DEPTH`` deep?"""
    try:
        if not data.isascii():
            data.decode()
        _raw.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return data.count(b"[") + data.count(b"{") <= PAYLOAD_DEPTH or _depth(data) <= PAYLOAD_DEPTH


def _depth(data: bytes) -> int:
    depth = deepest = 0
    for bracket in _brackets.findall(_strings.sub(b"", data)):
        if bracket in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        else:
            depth -= 1
    return deepest


def one_line(data: bytes) -> bytes:
    """The same JSON text without raw newlines, which separate messages on the wire (PROTOCOL 2.3)."""
    if NEWLINE in data or RETURN in data:
        return data.replace(b"\n", b"").replace(b"\r", b"")
    return data


class Inexpressible(Exception):
    """A payload that is no JSON, for a client that speaks JSON: disconnect 3506 (PROTOCOL 9.4)."""


FRAME_COMMANDS = 2_000
"""How many commands a frame may hold; no proper ones that fit into 64 KB are more."""


# --- the two formats ---------------------------------------------------------
class Codec(ABC):
    """One format of the wire; every method gives one whole message, ready for a transport's frame."""

    format: str
    ping: bytes
    one_way = False
    """Does the client only listen, once it has said who it is?  PROTOCOL 2.6."""

    @abstractmethod
    def decode(self, batch: bytes) -> list[Command]:
        """The commands of one frame, at least one; raises ``Disconnected(MALFORMED)`` (PROTOCOL 2.3, 3.4)."""

    @abstractmethod
    def reply(self, id: int, method: str, result: Body) -> bytes:
        """The answer to command ``id``; the result is there even if empty."""

    @abstractmethod
    def refusal(self, id: int, refusal: Refusal) -> bytes:
        """The error that answers command ``id``."""

    @abstractmethod
    def push(self, channel: str, kind: str, body: Body) -> bytes:
        """What comes unasked (PROTOCOL 5)."""

    def publication(self, channel: str, pub: stream.Publication, epoch: str) -> bytes:
        """A publication as it stands, to who knows the channel by its name (PROTOCOL 5.1)."""
        return self.push(channel, "pub", publication(pub, epoch))

    def push_by_number(self, number: int, kind: str, body: Body) -> bytes:
        """As ``push``, to who has been told the channel's number (PROTOCOL 21.4).

        Raises ``NotImplementedError`` in a format in which nobody is told any.
        """
        raise NotImplementedError(f"{type(self).__name__} has no numbers for channels")

    def disconnect(self, disconnect: errors.Disconnect) -> bytes:
        """The last push, where the transport itself has no way to say why it ends (PROTOCOL 5.8)."""
        return self.push("", "disconnect", Disconnect(disconnect.code, disconnect.reason))


def _malformed(why: str) -> Disconnected:
    return Disconnected(MALFORMED, why)


class JsonCodec(Codec):
    """PROTOCOL 3.2."""

    format = "json"
    ping = b"{}"

    def __init__(self) -> None:
        self._decode = msgspec.json.Decoder(Command).decode
        self._encode = msgspec.json.Encoder().encode

    def decode(self, batch: bytes) -> list[Command]:
        """See ``Codec.decode``; one trailing newline is allowed."""
        try:
            if NEWLINE not in batch:
                return [self._decode(batch)]
            lines = batch.split(b"\n", FRAME_COMMANDS + 1)
            if not lines[-1]:
                lines.pop()
            if len(lines) > FRAME_COMMANDS:
                raise _malformed(f"a frame has more than {FRAME_COMMANDS} commands")
            return [self._decode(line) for line in lines]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _malformed(f"a frame is not made of JSON commands: {error}") from None

    def reply(self, id: int, method: str, result: Body) -> bytes:
        """See ``Codec.reply``."""
        return b'{"id":%d,"%s":%s}' % (id, method.encode(), self._encode(result))

    def refusal(self, id: int, refusal: Refusal) -> bytes:
        """See ``Codec.refusal``."""
        temporary = b',"temporary":true' if refusal.temporary else b""
        message = self._encode(refusal.message)
        return b'{"id":%d,"error":{"code":%d,"message":%s%s}}' % (id, refusal.code, message, temporary)

    def push(self, channel: str, kind: str, body: Body) -> bytes:
        """See ``Codec.push``."""
        name = b'"channel":%s,' % _quoted(channel) if channel else b""
        return b'{"push":{%s"%s":%s}}' % (name, kind.encode(), self._encode(body))

    def publication(self, channel: str, pub: stream.Publication, epoch: str) -> bytes:
        """See ``Codec.publication``; what clients say in passing is put together by hand, in a quarter of the time."""
        if pub.info is None or pub.offset or pub.time_ms or pub.tags:
            return self.push(channel, "pub", publication(pub, epoch))
        info = self._encode(client_info(pub.info))
        return b'{"push":{"channel":%s,"pub":{"data":%s,"info":%s}}}' % (_quoted(channel), pub.data, info)

    def push_by_number(self, number: int, kind: str, body: Body) -> bytes:
        """See ``Codec.push_by_number``."""
        return b'{"push":{"id":%d,"%s":%s}}' % (number, kind.encode(), self._encode(body))


@lru_cache(maxsize=4096)
def _quoted(channel: str) -> bytes:
    return msgspec.json.encode(channel)


class OneWayCodec(JsonCodec):
    """PROTOCOL 2.6: what the client says is one request to connect, and all it hears are bare pushes."""

    one_way = True

    def __init__(self) -> None:
        super().__init__()
        self._decode_request = msgspec.json.Decoder(ConnectRequest).decode

    def decode(self, batch: bytes) -> list[Command]:
        """The one command that such a client has; raises as ``Codec.decode``."""
        try:
            return [Command(id=1, connect=self._decode_request(batch))]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _malformed(f"not a request to connect: {error}") from None

    def reply(self, id: int, method: str, result: Body) -> bytes:
        """A reply becomes a push of the same name."""
        return self.push("", method, result)

    def refusal(self, id: int, refusal: Refusal) -> bytes:
        """There is none: whoever refuses such a client must end its connection (PROTOCOL 2.6)."""
        raise TypeError(f"a refusal {refusal.code} for a one-way client, expected a disconnect")

    def push(self, channel: str, kind: str, body: Body) -> bytes:
        """See ``Codec.push``."""
        name = b'"channel":%s,' % _quoted(channel) if channel else b""
        return b'{%s"%s":%s}' % (name, kind.encode(), self._encode(body))

    def publication(self, channel: str, pub: stream.Publication, epoch: str) -> bytes:
        """See ``Codec.publication``."""
        return self.push(channel, "pub", publication(pub, epoch))


class ProtobufCodec(Codec):
    """PROTOCOL 3.3; every message stands behind its length, so messages are joined by laying them side by side."""

    format = "protobuf"
    ping = b"\x00"

    def decode(self, batch: bytes) -> list[Command]:
        """See ``Codec.decode``."""
        try:
            messages = protobuf.split(batch, FRAME_COMMANDS)
            if not messages:
                raise ValueError("an empty frame")
            return [_struct(protobuf.Command.FromString(message), Command) for message in messages]
        except (ValueError, protobuf.DecodeError) as error:
            raise _malformed(f"a frame is not made of Protobuf commands: {error}") from None

    def reply(self, id: int, method: str, result: Body) -> bytes:
        """See ``Codec.reply``."""
        message = protobuf.Reply(id=id)
        _fill(getattr(message, method), result)
        return protobuf.prefixed(message.SerializeToString())

    def refusal(self, id: int, refusal: Refusal) -> bytes:
        """See ``Codec.refusal``."""
        error = {"code": refusal.code, "message": refusal.message, "temporary": refusal.temporary}
        return protobuf.prefixed(protobuf.Reply(id=id, error=error).SerializeToString())

    def push(self, channel: str, kind: str, body: Body) -> bytes:
        """See ``Codec.push``."""
        message = protobuf.Reply()
        message.push.channel = channel
        _fill(getattr(message.push, kind), body)
        return protobuf.prefixed(message.SerializeToString())


def _fill(message: Any, body: Body) -> None:
    """Copy a Struct into the Protobuf message of the same fields."""
    message.SetInParent()
    for name in body.__struct_fields__:
        value = getattr(body, name)
        if value is UNSET or value is None:
            continue
        if isinstance(value, Raw):
            setattr(message, name, bytes(value))
        elif isinstance(value, msgspec.Struct):
            _fill(getattr(message, name), value)
        elif isinstance(value, dict):
            field = getattr(message, name)
            for key, item in value.items():
                if isinstance(item, msgspec.Struct):
                    _fill(field[key], item)
                else:
                    field[key] = item
        elif isinstance(value, list):
            field = getattr(message, name)
            for item in value:
                _fill(field.add(), item)
        elif value:
            setattr(message, name, value)


_NESTED: dict[str, type[msgspec.Struct]] = {
    "publish": PublishRequest,
    "subscribe": SubscribeRequest,
    "connect": ConnectRequest,
    "rpc": RPCRequest,
    "history": HistoryRequest,
    "presence": ChannelRequest,
    "presence_stats": ChannelRequest,
    "unsubscribe": ChannelRequest,
    "refresh": RefreshRequest,
    "sub_refresh": SubRefreshRequest,
    "send": SendRequest,
    "since": StreamPosition,
}


def _filter_node(message: Any) -> dict[str, Any]:
    """A filter as a client that speaks JSON sends it (PROTOCOL 13)."""
    node = {field.name: value for field, value in message.ListFields()}
    for name, inner in (("vals", str), ("nodes", _filter_node)):
        if name in node:
            node[name] = [inner(item) for item in node[name]]
    return node


def _struct(message: Any, kind: type[T]) -> T:
    """Make the Struct of a Protobuf message; fields that we do not know are passed over."""
    known = kind.__struct_fields__
    values: dict[str, Any] = {}
    for field, value in message.ListFields():
        name = field.name
        if name not in known:
            continue
        if name in _NESTED:
            values[name] = _struct(value, _NESTED[name])
        elif name == "subs":
            values[name] = {channel: _struct(sub, SubscribeRequest) for channel, sub in value.items()}
        elif name == "headers":
            values[name] = dict(value)
        elif name == "ping":
            values[name] = {}
        elif name == "tf":
            values[name] = Raw(msgspec.json.encode(_filter_node(value)))
        elif isinstance(value, bytes):
            values[name] = Raw(value)
        else:
            if name == "offset" and value > MAX_OFFSET:
                raise ValueError(f"offset {value} is beyond {MAX_OFFSET}")
            values[name] = value
    return kind(**values)


_emulation = msgspec.json.Decoder(EmulationRequest)


def emulation_request(format: str, body: bytes) -> tuple[str, str, bytes]:
    """Node, session and commands of a request to ``/emulation`` (PROTOCOL 2.5); raises ``ValueError``."""
    try:
        if format == "protobuf":
            found = protobuf.EmulationRequest.FromString(body)
            node, session, data = found.node, found.session, found.data
        else:
            request = _emulation.decode(body)
            node, session, data = request.node, request.session, request.data.encode()
    except (msgspec.DecodeError, protobuf.DecodeError, UnicodeError, RecursionError) as error:
        raise ValueError(f"expected node, session and data: {error}") from None
    for name, value in (("node", node), ("session", session), ("data", data)):
        if not value:
            raise ValueError(f"expected node, session and data: {name} is empty")
    return node, session, data


JSON = JsonCodec()
PROTOBUF = ProtobufCodec()
ONE_WAY = OneWayCodec()
CODECS: dict[str, Codec] = {codec.format: codec for codec in (JSON, PROTOBUF)}
