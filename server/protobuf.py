"""The wire's messages in Protobuf, built from one table at import.

The field numbers are PROTOCOL appendix A.  A table of thirty lines says the same
as a ``.proto`` file with its generated module and needs no compiler; the
descriptors live in a pool of their own, so that a client library loaded into the
same process (as our tests do) may register the same names.

Pure; knows nothing of what the messages mean.
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

_PACKAGE = "centrifugal.centrifuge.protocol"

# One message a line, fields as "number name:type"; [] repeats, {} maps from string.
_SCHEMA = """
EmulationRequest: 1 node:s, 2 session:s, 3 data:y
Error: 1 code:u32, 2 message:s, 3 temporary:b
Command: 1 id:u32, 4 connect:ConnectRequest, 5 subscribe:SubscribeRequest, 6 unsubscribe:ChannelRequest, 7 publish:PublishRequest, 8 presence:ChannelRequest, 9 presence_stats:ChannelRequest, 10 history:HistoryRequest, 11 ping:Empty, 12 send:SendRequest, 13 rpc:RPCRequest, 14 refresh:RefreshRequest, 15 sub_refresh:SubRefreshRequest
Reply: 1 id:u32, 2 error:Error, 4 push:Push, 5 connect:ConnectResult, 6 subscribe:SubscribeResult, 7 unsubscribe:Empty, 8 publish:Empty, 9 presence:PresenceResult, 10 presence_stats:PresenceStatsResult, 11 history:HistoryResult, 12 ping:Empty, 13 rpc:RPCResult, 14 refresh:RefreshResult, 15 sub_refresh:Refresh
Push: 1 id:i64, 2 channel:s, 4 pub:Publication, 5 join:Presence, 6 leave:Presence, 7 unsubscribe:Unsubscribe, 8 message:SendRequest, 9 subscribe:Subscribe, 10 connect:Connect, 11 disconnect:Disconnect, 12 refresh:Refresh
ClientInfo: 1 user:s, 2 client:s, 3 conn_info:y, 4 chan_info:y
Publication: 4 data:y, 5 info:ClientInfo, 6 offset:u64, 7 tags:{}s, 8 delta:b, 9 time:i64, 10 channel:s, 14 epoch:s
Presence: 1 info:ClientInfo
Unsubscribe: 2 code:u32, 3 reason:s
Subscribe: 1 recoverable:b, 4 epoch:s, 5 offset:u64, 6 positioned:b, 7 data:y
SendRequest: 1 data:y
Disconnect: 1 code:u32, 2 reason:s, 3 reconnect:b
Refresh: 1 expires:b, 2 ttl:u32
Connect: 1 client:s, 2 version:s, 3 data:y, 4 subs:{}SubscribeResult, 5 expires:b, 6 ttl:u32, 7 ping:u32, 8 pong:b, 9 session:s, 10 node:s, 11 time:i64
ConnectRequest: 1 token:s, 2 data:y, 3 subs:{}SubscribeRequest, 4 name:s, 5 version:s, 6 headers:{}s, 7 flag:i64
ConnectResult: 1 client:s, 2 version:s, 3 expires:b, 4 ttl:u32, 5 data:y, 6 subs:{}SubscribeResult, 7 ping:u32, 8 pong:b, 9 session:s, 10 node:s, 11 time:i64
RefreshRequest: 1 token:s
RefreshResult: 1 client:s, 2 version:s, 3 expires:b, 4 ttl:u32
SubscribeRequest: 1 channel:s, 2 token:s, 3 recover:b, 6 epoch:s, 7 offset:u64, 8 data:y, 9 positioned:b, 10 recoverable:b, 11 join_leave:b, 12 delta:s, 13 tf:FilterNode, 14 flag:i64, 15 type:i32
SubscribeResult: 1 expires:b, 2 ttl:u32, 3 recoverable:b, 6 epoch:s, 7 publications:[]Publication, 8 recovered:b, 9 offset:u64, 10 positioned:b, 11 data:y, 12 was_recovering:b, 13 delta:b, 14 id:i64
SubRefreshRequest: 1 channel:s, 2 token:s, 3 type:i32
ChannelRequest: 1 channel:s
PublishRequest: 1 channel:s, 2 data:y, 3 type:i32, 4 key:s, 5 removed:b
PresenceResult: 1 presence:{}ClientInfo
PresenceStatsResult: 1 num_clients:u32, 2 num_users:u32
StreamPosition: 1 offset:u64, 2 epoch:s
HistoryRequest: 1 channel:s, 7 limit:i32, 8 since:StreamPosition, 9 reverse:b
HistoryResult: 1 publications:[]Publication, 2 epoch:s, 3 offset:u64
RPCRequest: 1 data:y, 2 method:s
RPCResult: 1 data:y
FilterNode: 1 op:s, 2 key:s, 3 cmp:s, 4 val:s, 5 vals:[]s, 6 nodes:[]FilterNode
Empty:
"""  # noqa: E501

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "s": _Field.TYPE_STRING,
    "b": _Field.TYPE_BOOL,
    "y": _Field.TYPE_BYTES,
    "u32": _Field.TYPE_UINT32,
    "u64": _Field.TYPE_UINT64,
    "i32": _Field.TYPE_INT32,
    "i64": _Field.TYPE_INT64,
}


def _set_type(field: descriptor_pb2.FieldDescriptorProto, kind: str) -> None:
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type = _Field.TYPE_MESSAGE
        field.type_name = f".{_PACKAGE}.{kind}"


def _add_field(message: descriptor_pb2.DescriptorProto, spec: str) -> None:
    number, rest = spec.split(" ")
    name, kind = rest.split(":")
    field = message.field.add(name=name, number=int(number), label=_Field.LABEL_OPTIONAL)
    if kind.startswith("[]"):
        field.label = _Field.LABEL_REPEATED
        _set_type(field, kind[2:])
    elif kind.startswith("{}"):
        entry = message.nested_type.add(name=f"{name.title().replace('_', '')}Entry")
        entry.options.map_entry = True
        entry.field.add(name="key", number=1, label=_Field.LABEL_OPTIONAL, type=_Field.TYPE_STRING)
        _set_type(entry.field.add(name="value", number=2, label=_Field.LABEL_OPTIONAL), kind[2:])
        field.label = _Field.LABEL_REPEATED
        field.type = _Field.TYPE_MESSAGE
        field.type_name = f".{_PACKAGE}.{message.name}.{entry.name}"
    else:
        _set_type(field, kind)


def _build() -> dict[str, type[Message]]:
    file = descriptor_pb2.FileDescriptorProto(name="waterspout.proto", package=_PACKAGE, syntax="proto3")
    for line in _SCHEMA.strip().splitlines():
        name, _, specs = line.partition(":")
        message = file.message_type.add(name=name)
        for spec in filter(None, (spec.strip() for spec in specs.split(","))):
            _add_field(message, spec)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    names = (message.name for message in file.message_type)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in names}


_CLASSES = _build()
Command: Any = _CLASSES["Command"]
EmulationRequest: Any = _CLASSES["EmulationRequest"]
Reply: Any = _CLASSES["Reply"]

__all__ = ["Command", "DecodeError", "EmulationRequest", "Reply", "prefixed", "split"]


def prefixed(message: bytes) -> bytes:
    """Put the length before one message, as an unsigned LEB128 varint (PROTOCOL 2.3)."""
    size = len(message)
    if size < 0x80:
        return bytes((size,)) + message
    head = bytearray()
    while size >= 0x80:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    head.append(size)
    return bytes(head) + message


def split(batch: bytes, most: int) -> list[bytes]:
    """Take length-prefixed messages apart; raises ``ValueError`` if one is cut short, or if there are too many."""
    messages: list[bytes] = []
    position, end = 0, len(batch)
    while position < end:
        size = shift = 0
        while True:
            if position == end or shift > 28:
                raise ValueError("a length is cut short, or longer than five bytes")
            byte = batch[position]
            position += 1
            size |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
        if len(messages) == most:
            raise ValueError(f"more than {most} messages")
        if position + size > end:
            raise ValueError(f"a message of {size} bytes is cut short at {end - position}")
        messages.append(batch[position : position + size])
        position += size
    return messages
