"""What is fuzzed: whatever a stranger's bytes meet first, each as a function that raises for what must never happen.

A target takes any bytes and holds what it fuzzes to its promises: no exception but
those that its docstring names, nothing held beyond its bounds, and what it accepts
is what it would accept again.  ``seeds`` are bytes that get far.  ``fuzz.py`` gives
them to atheris, which follows the code's branches, for as long as one likes;
``test_fuzz.py`` mutates them for a few seconds in the same way each time.

What one of them finds becomes a test beside those of its module; the ones that have
been found so far are listed in ``test_fuzz.FOUND``.
"""

import base64
import hashlib
import hmac
import ipaddress
import json
import struct
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec

from handlers import deflate
from handlers.asking import read_bearer
from handlers.frames import CONTROL_BYTES, Close, Parser, Ping, Pong, Violation, is_close_code
from handlers.handshake import handshake_fault, negotiate
from handlers.origins import client_address, origin_allowed
from handlers.publications import read_count, read_flag, read_key, read_preference
from server import cursors, filters, protobuf
from server.auth import KeyWanted, TokenExpired, TokenInvalid, Verifier
from server.channels import Channels
from server.errors import MALFORMED, Disconnected, Refused
from server.globs import matcher
from server.guests import NAME_CHARACTERS, clean_name
from server.protocol import JSON, MAX_OFFSET, ONE_WAY, PROTOBUF, Command, emulation_request, is_json, one_line
from server.settings import ChannelSettings, TokenSettings

LIMIT = 2_000
SECRET = "a secret that is long enough for every HMAC"
NOW = 1_700_000_000.0
TAGS = {"game": "chess", "level": "12"}


class Target(NamedTuple):
    """One thing to fuzz."""

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


def _demand(kept: bool, why: str) -> None:
    """An ``assert`` where there is an exception already."""
    if not kept:
        raise AssertionError(why)


# --- frames ------------------------------------------------------------------------------
def frames(data: bytes) -> None:
    """The frame parser: events within their bounds, or one ``Violation``; however the bytes are cut (RFC 6455).

    The first byte says how they are cut, and whether compression was agreed on.
    """
    if not data:
        return
    compression, step, stream = bool(data[0] & 1), 1 + (data[0] >> 1), data[1:]
    whole = _heard(Parser(LIMIT, compression=compression), [stream])
    pieces = [stream[at : at + step] for at in range(0, len(stream), step)]
    cut = _heard(Parser(LIMIT, compression=compression), pieces)
    assert cut == whole, f"cut into pieces of {step} bytes it is {cut}, in one piece {whole}"


def _heard(parser: Parser, reads: list[bytes]) -> list[object]:
    """All events, and the code of the violation that ends them."""
    heard: list[object] = []
    try:
        for read in reads:
            sole = parser.sole_text(read) if read else None
            if sole is not None:
                heard.append(sole)
                continue
            if read:
                parser.feed(read)
            while True:
                came = parser.next_event(7)
                if came is None:
                    if parser.unread:
                        continue
                    break
                _check_event(came)
                heard.append(came)
            assert parser.held_bytes <= 2 * LIMIT + 20, f"{parser.held_bytes} bytes are held"
    except Violation as violation:
        _demand(violation.code in (1002, 1007, 1009), f"code {violation.code}")
        _demand(len(violation.reason.encode()) <= CONTROL_BYTES - 2, "a reason that fits no frame")
        _demand(parser.held_bytes == 0, "a parser that is deaf keeps nothing")
        heard.append(violation.code)
    return heard


def _check_event(came: bytes | Ping | Pong | Close) -> None:
    match came:
        case Ping(data) | Pong(data):
            assert len(data) <= CONTROL_BYTES
        case Close(code, _):
            assert code is None or is_close_code(code)
        case _:
            assert len(came) <= LIMIT, f"a message of {len(came)} bytes"


def _frame(first: int, payload: bytes, mask: bytes = b"\x01\x02\x03\x04") -> bytes:
    masked = bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))
    size = len(payload)
    if size < 126:
        head = bytes((first, 0x80 | size))
    elif size < 0x10000:
        head = struct.pack("!BBH", first, 0x80 | 126, size)
    else:
        head = struct.pack("!BBQ", first, 0x80 | 127, size)
    return head + mask + masked


_DEFLATED = zlib.compressobj(wbits=-15)
_PACKED = (_DEFLATED.compress(b'{"id":1}' * 40) + _DEFLATED.flush(zlib.Z_SYNC_FLUSH))[:-4]
FRAMES = (
    b"\x00" + _frame(0x81, b'{"id":1,"connect":{}}'),
    b"\x07" + _frame(0x81, b'{"id":1}') + _frame(0x82, b"\x00\xff") + _frame(0x89, b"ping") + _frame(0x8A, b""),
    b"\x03" + _frame(0x01, "ä".encode()[:1]) + _frame(0x89, b"") + _frame(0x80, "ä".encode()[1:]),
    b"\x01" + _frame(0xC1, _PACKED),
    b"\x05" + _frame(0x41, _PACKED[:5]) + _frame(0x80, _PACKED[5:]),
    b"\x01" + _frame(0xC1, zlib.compress(bytes(100_000))[2:-4]),
    b"\x09" + _frame(0x81, b"x" * 300) + _frame(0x88, b"\x03\xe8bye"),
    b"\x02" + _frame(0x82, b"x" * (LIMIT + 1)),
    b"\x00" + _frame(0x82, b"x" * 70_000),
)


# --- commands ------------------------------------------------------------------------------
def commands(data: bytes) -> None:
    """What a client says, in each format: commands, or ``Disconnected`` with 3501; filters, or ``ValueError``.

    The first byte chooses the format.
    """
    if not data:
        return
    codec = (JSON, PROTOBUF, ONE_WAY)[data[0] % 3]
    try:
        found = codec.decode(data[1:])
    except Disconnected as end:
        _demand(end.disconnect is MALFORMED, f"{end.disconnect}")
        return
    finally:
        for format in ("json", "protobuf"):
            with suppress(ValueError):
                node, session, batch = emulation_request(format, data[1:])
                assert node
                assert session
                assert batch
    assert found, "expected a command at least"
    for command in found:
        _check_command(command)


def _check_command(command: Command) -> None:
    assert 0 <= command.id < 2**32
    if (subscribe := command.subscribe) is not None:
        assert 0 <= subscribe.offset <= MAX_OFFSET
        if subscribe.tf is not msgspec.UNSET:
            _check_filter(bytes(subscribe.tf))
    for request in (command.publish, command.rpc, command.connect):
        if request is not None and request.data is not msgspec.UNSET and is_json(bytes(request.data)):
            line = one_line(bytes(request.data))
            assert b"\n" not in line
            assert b"\r" not in line
            assert json.loads(line) == json.loads(bytes(request.data)) or b"NaN" in line
    if command.history is not None:
        assert -(2**31) <= command.history.limit < 2**31


def _check_filter(text: bytes) -> None:
    try:
        found = filters.read(text)
    except ValueError:
        return
    assert filters.read(found.text).matches(TAGS) == found.matches(TAGS)
    assert found.matches(None) == found.matches({})


_FILTER = {
    "op": "or",
    "nodes": [{"key": "level", "cmp": "gt", "val": "3"}, {"key": "game", "cmp": "in", "vals": ["go"]}],
}
_SAID: tuple[dict[str, Any], ...] = (
    {"id": 1, "connect": {"token": "a.b.c", "data": {"a": [1]}, "subs": {"chat:1": {"recover": True, "offset": 3}}}},
    {"id": 2, "subscribe": {"channel": "chat:1", "recover": True, "epoch": "x", "offset": 9, "flag": 3, "tf": _FILTER}},
    {"id": 3, "publish": {"channel": "chat:1", "data": {"text": "\U0001f30a", "n": 1.5e300}}},
    {"id": 4, "history": {"channel": "chat:1", "limit": -1, "since": {"offset": 4, "epoch": "x"}, "reverse": True}},
    {"id": 5, "rpc": {"method": "publish", "data": {"channel": "chat:1", "data": None, "idempotency_key": "k"}}},
    {"id": 6, "presence_stats": {"channel": "chat:1"}},
    {"id": 7, "sub_refresh": {"channel": "chat:1", "token": "a.b.c"}},
    {},
)


def _protobuf(said: Mapping[str, Any]) -> bytes:
    command = protobuf.Command(id=said.get("id", 0))
    for method, request in said.items():
        if method == "id":
            continue
        message = getattr(command, method)
        message.SetInParent()
        for name, value in request.items():
            if name == "data":
                message.data = json.dumps(value).encode()
            elif isinstance(value, (str, int)):
                setattr(message, name, value)
    return protobuf.prefixed(command.SerializeToString())


COMMANDS = (
    *(b"\x00" + json.dumps(said).encode() for said in _SAID),
    b"\x00" + b"\n".join(json.dumps(said).encode() for said in _SAID),
    b'\x00{"id":1,"publish":{"channel":"a","data":' + b"[" * 900 + b"]" * 900 + b"}}",
    b'\x00{"id":4294967295,"history":{"channel":"a","since":{"offset":9223372036854775807}}}',
    *(b"\x01" + _protobuf(said) for said in _SAID),
    b"\x01" + b"".join(map(_protobuf, _SAID)),
    b"\x02" + json.dumps(_SAID[0]["connect"]).encode(),
    b'\x00{"node":"n","session":"s","data":"{}"}',
)


# --- tokens -------------------------------------------------------------------------------------
_VERIFIER = Verifier(TokenSettings(hmac_secret_key=SECRET))
_STRANGERS = Verifier(
    TokenSettings(jwks_public_endpoint="https://issuer.example/jwks", issuer_regex="https://(a|b)\\.example"),
    find_key=lambda url, kid: None,
)


def tokens(data: bytes) -> None:
    """A token, forged or well signed: claims, or ``TokenInvalid``, ``TokenExpired``, ``KeyWanted``.

    Nothing forged is believed.  The first byte says whether the rest is the token, its header, or claims that we sign.
    """
    if not data:
        return
    kind, rest = data[0] % 4, data[1:]
    signed = kind == 3
    match kind:
        case 0:
            text = rest.decode("latin-1")
        case 1:
            text = rest.decode(errors="replace")
        case 2:
            text = f"{_base64url(rest)}.{_base64url(b'{}')}.{_base64url(b'x' * 32)}"
        case _:
            begun = ".".join((_base64url(b'{"alg":"HS256"}'), _base64url(rest)))
            text = f"{begun}.{_base64url(hmac.digest(SECRET.encode(), begun.encode(), hashlib.sha256))}"
    for verifier in (_VERIFIER, _STRANGERS):
        for check in (verifier.connection, verifier.subscription):
            try:
                claims = check(text, NOW)
            except (TokenExpired, KeyWanted):
                continue
            except TokenInvalid as error:
                _demand(len(error.why) < 300, "what a stranger says does not fill the log")
                continue
            assert signed, f"{text!r} was believed"
            assert verifier is _VERIFIER
            assert isinstance(claims.user, str)
            assert claims.expire_at >= 0


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


TOKENS = (
    b"\x00a.b.c",
    b"\x01eyJhbGciOiJub25lIn0.eyJzdWIiOiI0MiJ9.",
    b'\x02{"alg":"none"}',
    b'\x02{"alg":"HS256","typ":"JWT","kid":"k1"}',
    b'\x02{"alg":"RS256","kid":"' + b"k" * 200 + b'"}',
    b'\x03{"sub":"42","exp":1800000000,"nbf":1,"iat":1,"info":{"name":"Ann"},"channels":["chat:1"]}',
    b'\x03{"sub":"42","channel":"chat:1","override":{"presence":{"value":true}},"b64info":"e30="}',
    b'\x03{"sub":"42","subs":{"chat:1":{"info":1,"override":{}}},"meta":{"a":1},"expire_at":1900000000}',
    b'\x03{"sub":"42","exp":1e300,"iss":["a"],"aud":["a","b"]}',
)


# --- REST -------------------------------------------------------------------------------------------
_CHANNELS = Channels(ChannelSettings())
_PROXIES = (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("::1/128"))


def rest(data: bytes) -> None:
    """Parameters, headers and cursors of requests: a value, or ``ValueError`` in words for the client.

    Every reader is given the same text.
    """
    text = data.decode("latin-1")
    plain = data.decode(errors="replace")
    for reader in (read_count, read_flag, read_key, read_bearer, clean_name, cursors.read):
        for given in (text, plain):
            try:
                found = reader(given)
            except ValueError as error:
                _demand(len(str(error)) < 300, "what a stranger says does not come back in full")
                continue
            _check_value(reader, given, found)
    assert 0 <= read_preference(text) <= 3600
    for channels in (["chat:1"], ["chat:1", "live:1"]):
        with suppress(ValueError):
            positions = cursors.event_positions(text, channels)
            assert positions.keys() <= set(channels)
            again = cursors.event_positions(cursors.event_id(channels, positions), channels) if positions else positions
            assert again == positions
    assert len(cursors.tags(text)) <= len(text)
    with suppress(ValueError):
        matcher(plain[:200])("chat:" + plain[:100])
    address = client_address("10.0.0.1", text, _PROXIES)
    assert client_address("192.0.2.1", text, _PROXIES) == "192.0.2.1", "only proxies are believed"
    assert ipaddress.ip_address(address)
    origin_allowed(text, ("https://*.example.com", "http://localhost:*"))
    assert negotiate(text, text)[0] in ("json", "protobuf")
    handshake_fault("HTTP/1.1", text, text, text)
    agreed = deflate.accept(text)
    assert agreed is None or agreed.startswith(deflate.ACCEPTED)
    with suppress(Refused):
        _CHANNELS.check_name(plain, _CHANNELS.known(plain))


def _check_value(reader: Callable[[str], Any], text: str, found: Any) -> None:
    match found:
        case bool():
            assert text in ("true", "false")
        case int():
            assert 0 <= found < 2**31
        case str() if reader is clean_name:
            assert 1 <= len(found) <= NAME_CHARACTERS
            assert found.isprintable() or not found.isascii()
            assert clean_name(found) == found, "a clean name is clean"
        case str() if reader is read_key:
            assert 1 <= len(found) <= 256
            assert found.isascii()
        case str():
            assert found == found.strip()
        case _:
            assert cursors.read(cursors.written(found)) == found


REST = (
    b"10",
    b"true",
    b'"an \\"idempotency\\" key"',
    b'wait=20; foo, respond-async, wait="5"',
    b"Bearer a.b.c",
    b"Xk3f:9223372036854775807",
    cursors.event_id(["chat:1", "live:1"], {"chat:1": cursors.read("Xk3f:7"), "live:1": cursors.read(":0")}).encode(),
    b'W/"Xk3f:7", "abc:9", *',
    b"chat:{a,b*}[!c-e]?**",
    b"203.0.113.7, 10.1.2.3:8080, [::1]:99, ::ffff:10.0.0.1",
    b"https://a.example.com:8443",
    b"permessage-deflate; server_max_window_bits=12; client_max_window_bits, permessage-deflate",
    b"websocket, Upgrade",
    "A\u200dda \u202eEve\u0301 \ufb01".encode(),
)


TARGETS: Mapping[str, Target] = {
    "frames": Target(frames, FRAMES),
    "commands": Target(commands, COMMANDS),
    "tokens": Target(tokens, TOKENS),
    "rest": Target(rest, REST),
}
