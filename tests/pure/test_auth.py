"""Tokens: what a good one says, and that nothing else gets in (PROTOCOL 8)."""

from __future__ import annotations

import base64
import functools
import json
import re
import string
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st
from jwt.api_jws import PyJWS

from server.auth import (
    ALGORITHMS,
    KID_CHARACTERS,
    TOKEN_BYTES,
    ConnectClaims,
    Key,
    KeyWanted,
    Override,
    SubscribeClaims,
    SubscribeOptions,
    TokenExpired,
    TokenInvalid,
    Verifier,
    key_of,
    sign,
)
from server.settings import TokenSettings

NOW = 1_800_000_000.0
SECRET = "the secret of these tests, long enough for each of the HMAC algorithms there are"
OLD_SECRET = "the secret before that one, which was long enough for each of the algorithms, too"
BAD = (TokenInvalid, TokenExpired)

Claims = ConnectClaims | SubscribeClaims
KINDS = ("connection", "subscription")
ALL_ALGORITHMS = sorted(ALGORITHMS)

both = pytest.mark.parametrize("kind", KINDS)


# --- keys and tokens -----------------------------------------------------------


@functools.cache
def private_key(algorithm: str, which: int = 0) -> Any:
    """A key that signs with ``algorithm``; another ``which`` is another key."""
    if algorithm.startswith("HS"):
        return (SECRET, OLD_SECRET)[which]
    if algorithm.startswith("RS"):
        return rsa_key(which)
    curves: dict[str, ec.EllipticCurve] = {"ES256": ec.SECP256R1(), "ES384": ec.SECP384R1(), "ES512": ec.SECP521R1()}
    return ec.generate_private_key(curves[algorithm]) if algorithm in curves else ed25519.Ed25519PrivateKey.generate()


@functools.cache
def rsa_key(which: int, bits: int = 2048) -> rsa.RSAPrivateKey:
    """An RSA key; all three algorithms share it."""
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


def public_pem(key: Any) -> str:
    """The public half as settings take it."""
    return str(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), "ascii")


def settings_for(algorithm: str) -> dict[str, Any]:
    """The setting that trusts ``private_key(algorithm)``."""
    if algorithm.startswith("HS"):
        return {"hmac_secret_key": SECRET}
    names = {"RS": "rsa_public_key", "ES": "ecdsa_public_key", "Ed": "ed25519_public_key"}
    return {names[algorithm[:2]]: public_pem(private_key(algorithm))}


def every_key() -> dict[str, Any]:
    """Settings that trust a key of each family at once; for ECDSA that of ES256."""
    return settings_for("HS256") | settings_for("RS256") | settings_for("ES256") | settings_for("EdDSA")


def verifier(
    *, find_key: Callable[[str, str], Key | None] | None = None, skip: bool = False, **settings: Any
) -> Verifier:
    """A verifier with these settings and no others."""
    return Verifier(TokenSettings(**settings), find_key=find_key, skip_signature=skip)


def unchecked(**settings: Any) -> Verifier:
    """A verifier with settings whose own checks have not seen them."""
    return Verifier(TokenSettings.model_construct(**settings))


def token(payload: Mapping[str, Any] | bytes, algorithm: str = "HS256", key: Any = None, **header: Any) -> str:
    """A token with this payload, signed as asked, by somebody who uses PyJWT as it is."""
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return PyJWS().encode(body, private_key(algorithm) if key is None else key, algorithm, headers=header)


def forged(header: bytes, payload: bytes = b'{"channel":"news"}', signature: bytes = b"") -> str:
    """Three parts in base64url, whatever is in them."""
    return b".".join(encoded(part) for part in (header, payload, signature)).decode()


def encoded(raw: bytes) -> bytes:
    """Base64url without padding."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=")


def base(kind: str, **claims: Any) -> dict[str, Any]:
    """The claims that a token of this kind cannot do without, and ``claims``."""
    return claims if kind == "connection" else {"channel": "news"} | claims


def verify(kind: str, by: Verifier, text: str, now: float = NOW) -> Claims:
    """Verify a token as the kind it is."""
    return by.connection(text, now) if kind == "connection" else by.subscription(text, now)


def why_invalid(kind: str, by: Verifier, text: str) -> str:
    """Check that the token is invalid, and give the reason for the log."""
    with pytest.raises(TokenInvalid) as caught:
        verify(kind, by, text)
    assert caught.value.why
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return caught.value.why


HMAC_ONLY = verifier(hmac_secret_key=SECRET)


# --- signatures ----------------------------------------------------------------


@both
@pytest.mark.parametrize("algorithm", ALL_ALGORITHMS)
def test_every_algorithm_verifies(kind: str, algorithm: str) -> None:
    """A token signed with any supported algorithm is good for the holder of its public key."""
    claims = verify(kind, verifier(**settings_for(algorithm)), token(base(kind, sub="42"), algorithm))
    assert claims.user == "42"


@both
@pytest.mark.parametrize("algorithm", ALL_ALGORITHMS)
def test_another_key_of_the_same_kind_is_refused(kind: str, algorithm: str) -> None:
    """Only the configured key verifies, not its family."""
    other = token(base(kind, sub="42"), algorithm, private_key(algorithm, 1))
    assert why_invalid(kind, verifier(**settings_for(algorithm)), other) == f"wrong signature, alg {algorithm}"


@both
@pytest.mark.parametrize("algorithm", ALL_ALGORITHMS)
def test_without_a_key_of_its_family_a_token_is_refused(kind: str, algorithm: str) -> None:
    """Keys of all other families do not help, and no keys at all verify nothing."""
    text = token(base(kind), algorithm)
    others = {name: value for name, value in every_key().items() if name not in settings_for(algorithm)}
    assert why_invalid(kind, verifier(**others), text) == f"no key is configured for {algorithm}"
    assert why_invalid(kind, verifier(), text) == f"no key is configured for {algorithm}"


@both
@pytest.mark.parametrize("algorithm", ["ES384", "ES512"])
def test_a_curve_serves_one_algorithm(kind: str, algorithm: str) -> None:
    """A P-256 key is no key for ES384 or ES512 (RFC 7518 3.4)."""
    text = token(base(kind), algorithm)
    assert why_invalid(kind, verifier(**settings_for("ES256")), text) == f"no key is configured for {algorithm}"


@both
@pytest.mark.parametrize("trusted", ["RS256", "ES256", "EdDSA"])
@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
def test_a_public_key_is_no_secret(kind: str, trusted: str, algorithm: str) -> None:
    """An HMAC made with the text of the public key is refused, with and without an HMAC secret (RFC 8725 2.1)."""
    pem = public_pem(private_key(trusted)).encode()
    # PyJWT would not sign with it, so the attacker does it by hand.
    signed = encoded(json.dumps({"alg": algorithm}).encode()) + b"." + encoded(json.dumps(base(kind)).encode())
    signature = ALGORITHMS[algorithm].sign(signed, pem)
    text = (signed + b"." + encoded(signature)).decode()
    assert why_invalid(kind, verifier(**settings_for(trusted)), text) == f"no key is configured for {algorithm}"
    assert why_invalid(kind, verifier(**every_key()), text) == f"wrong signature, alg {algorithm}"


@both
@pytest.mark.parametrize("name", ["none", "None", "NONE", "", "hs256", "PS256", "ES256K", "Ed25519", "dir", "HS256 "])
def test_other_names_of_algorithms_are_refused(kind: str, name: str) -> None:
    """``none``, in any spelling, and what we do not support are refused with and without a signature."""
    header = json.dumps({"alg": name}).encode()
    by = verifier(**every_key())
    for signature in (b"", b"x" * 32):
        assert (
            why_invalid(kind, by, forged(header, signature=signature))
            == "header: alg is none of those that are supported"
        )


@both
@pytest.mark.parametrize("algorithm", ALL_ALGORITHMS)
def test_signatures_of_no_or_another_length_are_refused(kind: str, algorithm: str) -> None:
    """An empty, short, long or all-zero signature is wrong, and raises nothing of the libraries below."""
    by = verifier(**settings_for(algorithm))
    head, payload, signature = token(base(kind), algorithm).split(".")
    raw = base64.urlsafe_b64decode(signature + "==")
    for fake in (b"", b"\0", raw[:-1], raw + b"\0", bytes(len(raw)), b"\xff" * len(raw), raw * 2):
        text = f"{head}.{payload}.{encoded(fake).decode()}"
        assert why_invalid(kind, by, text) == f"wrong signature, alg {algorithm}"


@both
def test_the_previous_secret_verifies_until_its_time(kind: str) -> None:
    """With rotation both secrets are good, the previous one up to and including ``valid_until``."""
    by = verifier(
        hmac_secret_key=SECRET, hmac_previous_secret_key=OLD_SECRET, hmac_previous_secret_key_valid_until=int(NOW)
    )
    for algorithm in ("HS256", "HS384", "HS512"):
        new, old = (token(base(kind, sub="42"), algorithm, secret) for secret in (SECRET, OLD_SECRET))
        for now in (NOW - 1, NOW, NOW + 1):
            assert verify(kind, by, new, now).user == "42"
        for now in (NOW - 1, NOW):
            assert verify(kind, by, old, now).user == "42"
        with pytest.raises(TokenInvalid):
            verify(kind, by, old, NOW + 1)


@both
def test_a_previous_secret_is_no_key_for_other_algorithms(kind: str) -> None:
    """While secrets rotate, tokens of the other families are good or not for their own reasons."""
    by = verifier(hmac_previous_secret_key=OLD_SECRET, **settings_for("ES256"))
    assert verify(kind, by, token(base(kind, sub="42"), "ES256")).user == "42"
    assert why_invalid(kind, by, token(base(kind), "ES256", private_key("ES256", 1))) == "wrong signature, alg ES256"
    assert why_invalid(kind, by, token(base(kind), "RS256")) == "no key is configured for RS256"


@both
def test_the_previous_secret_without_a_time_verifies_on(kind: str) -> None:
    """``valid_until`` 0 sets no end, and the previous secret needs no current one beside it."""
    old = token(base(kind, sub="42"), key=OLD_SECRET)
    for current in (SECRET, ""):
        by = verifier(hmac_secret_key=current, hmac_previous_secret_key=OLD_SECRET)
        assert verify(kind, by, old, NOW + 1e9).user == "42"


@both
def test_skipping_the_signature_skips_nothing_else(kind: str) -> None:
    """``skip_signature`` trusts unsigned content, but times, audience, issuer and form still count."""
    by = verifier(skip=True, audience="us", issuer="me")
    good = base(kind, sub="42", aud="us", iss="me")
    assert verify(kind, by, forged(b'{"alg":"none"}', json.dumps(good).encode())).user == "42"
    assert verify(kind, by, token(good, key=OLD_SECRET)).user == "42"
    for wrong in ({"aud": "them"}, {"iss": "you"}, {"sub": 42}):
        why_invalid(kind, by, forged(b"{}", json.dumps(good | wrong).encode()))
    with pytest.raises(TokenExpired):
        verify(kind, by, forged(b"{}", json.dumps(good | {"exp": NOW}).encode()))


# --- the envelope --------------------------------------------------------------


@both
@pytest.mark.parametrize(
    "mangle",
    [
        lambda text: "",
        lambda text: ".",
        lambda text: "..",
        lambda text: "...",
        lambda text: text.replace(".", ""),
        lambda text: text.rpartition(".")[0],
        lambda text: text.partition(".")[2],
        lambda text: text + ".",
        lambda text: "." + text,
        lambda text: text + "." + text,
        lambda text: text + "=",
        lambda text: text + "==",
        lambda text: text + "\n",
        lambda text: " " + text,
        lambda text: text + "\0",
        lambda text: text + "garbage",
        lambda text: text + "é",
        lambda text: "é" + text,
        lambda text: "\udcff" + text,
        lambda text: text.replace(".", "=.", 1),
        lambda text: text.replace(".", "!.", 1),
        lambda text: text.replace("e", "+", 1),
        lambda text: text.replace("e", "/", 1),
        lambda text: "Bearer " + text,
        lambda text: text.lower(),
        lambda text: text * 2,
    ],
)
def test_a_mangled_token_is_invalid(kind: str, mangle: Callable[[str], str]) -> None:
    """Missing dots, garbage at either end, padding, another alphabet and non-ASCII are refused, each with a reason."""
    why_invalid(kind, HMAC_ONLY, mangle(token(base(kind, sub="42"))))


@both
def test_base64_has_one_spelling(kind: str) -> None:
    """A last character with stray bits decodes to the same bytes elsewhere, and is refused here (RFC 4648 3.5)."""
    text = token(base(kind))
    alphabet = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"
    twin = text[:-1] + alphabet[alphabet.index(text[-1]) ^ 1]
    assert base64.urlsafe_b64decode(twin.rpartition(".")[2] + "=") == base64.urlsafe_b64decode(
        text.rpartition(".")[2] + "="
    )
    assert why_invalid(kind, HMAC_ONLY, twin) == "signature: broken base64url"


@both
def test_a_huge_token_is_refused_unread(kind: str) -> None:
    """Up to the limit a token counts, beyond it nothing is decoded."""
    room = TOKEN_BYTES * 3 // 4 - 400
    assert verify(kind, HMAC_ONLY, token(base(kind, sub="x" * room))).user == "x" * room
    huge = token(base(kind, sub="x" * TOKEN_BYTES))
    assert why_invalid(kind, HMAC_ONLY, huge) == f"longer than {TOKEN_BYTES} bytes"
    assert why_invalid(kind, HMAC_ONLY, "\udcff" * 10_000_000) == f"longer than {TOKEN_BYTES} bytes"


@both
def test_a_huge_kid_is_refused(kind: str) -> None:
    """A key id has at most ``KID_CHARACTERS``, also where nobody looks at it."""
    assert verify(kind, HMAC_ONLY, token(base(kind, sub="42"), kid="k" * KID_CHARACTERS)).user == "42"
    text = token(base(kind), kid="k" * (KID_CHARACTERS + 1))
    assert why_invalid(kind, HMAC_ONLY, text) == f"header: kid is longer than {KID_CHARACTERS} characters"


@both
@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{}",
        b"null",
        b"[]",
        b'"HS256"',
        b'{"alg":null}',
        b'{"alg":["HS256"]}',
        b'{"alg":{"HS256":1}}',
        b'{"alg":"HS256","kid":1}',
        b'{"alg":"HS256"',
        b'{"alg":"HS256"} x',
        b'{"alg":"HS256","x":"\xff"}',
        b'{"alg":"HS256","x":' + b"[" * 20_000,
        b'{"alg":"HS256","x":' + b"[" * 20_000 + b"]" * 20_000 + b"}",
        b'{"alg":"HS256","crit":["exp"]}',
        b'{"alg":"HS256","crit":[]}',
        b'{"alg":"HS256","b64":false,"crit":["b64"]}',
    ],
)
def test_a_header_that_makes_no_sense_is_refused(kind: str, header: bytes) -> None:
    """A header of another shape or type, too deep, or with extensions we must know (RFC 7515 4.1.11) is refused."""
    signed = encoded(header) + b"." + encoded(json.dumps(base(kind)).encode())
    signature = ALGORITHMS["HS256"].sign(signed, SECRET.encode())
    why_invalid(kind, HMAC_ONLY, (signed + b"." + encoded(signature)).decode())


@both
@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"null",
        b"[]",
        b'"news"',
        b"42",
        b"{",
        b'{"channel":"news"} {}',
        b'{"channel":"news","x":"\xff"}',
        b'{"channel":"news","info":"\xff"}',
        b'{"channel":"news","sub":"\\ud800"}',
        b'{"channel":"news","info":' + b"[" * 20_000,
        b'{"channel":"news","info":' + b"[" * 20_000 + b"]" * 20_000 + b"}",
        b'{"channel":"news","unknown":' + b'{"a":' * 9_000 + b"1" + b"}" * 9_000 + b"}",
        b'{"channel":"news","exp":' + b"9" * 20_000 + b"}",
        b'{"channel":"news","info":{"a":01}}',
    ],
)
def test_a_payload_that_is_no_object_is_refused(kind: str, payload: bytes) -> None:
    """Signed or not: what is no JSON object in UTF-8 of bearable depth is invalid."""
    why_invalid(kind, HMAC_ONLY, token(payload))


CLAIM_NAMES = (
    "sub exp nbf iat aud iss info b64info data b64data meta channels subs expire_at channel client override uid jti"
)

# --- claims --------------------------------------------------------------------


def test_a_connection_token_with_everything() -> None:
    """Each claim of a connection token arrives where it belongs; unknown ones are ignored."""
    text = token(
        {
            "sub": "42",
            "exp": int(NOW) + 60,
            "nbf": int(NOW),
            "iat": "yesterday",
            "jti": 7,
            "info": {"name": "Ann"},
            "meta": {"plan": "free"},
            "subs": {
                "news": {"info": [1], "data": {"a": None}, "override": {"presence": {"value": True}, "join_leave": {}}},
                "chat": {},
                "misc": None,
            },
            "caps": [{"channels": ["*"]}],
            "whatever": [[]],
        }
    )
    assert HMAC_ONLY.connection(text, NOW) == ConnectClaims(
        user="42",
        expire_at=int(NOW) + 60,
        info=b'{"name": "Ann"}',
        meta=b'{"plan": "free"}',
        subs={
            "news": SubscribeOptions(b"[1]", b'{"a": null}', Override(presence=True, join_leave=False)),
            "chat": SubscribeOptions(None, None),
            "misc": SubscribeOptions(None, None),
        },
    )


def test_a_subscription_token_with_everything() -> None:
    """Each claim of a subscription token arrives where it belongs; unknown ones are ignored."""
    switches = ("presence", "join_leave", "force_push_join_leave", "force_positioning", "force_recovery")
    text = token(
        {
            "sub": "42",
            "channel": "$news",
            "client": "c-1",
            "exp": int(NOW) + 60,
            "info": 1.50,
            "data": "text",
            "override": {switch: {"value": True} for switch in switches} | {"unknown": {"value": 1}},
            "channels": 5,
        }
    )
    assert HMAC_ONLY.subscription(text, NOW) == SubscribeClaims(
        user="42",
        channel="$news",
        client="c-1",
        expire_at=int(NOW) + 60,
        info=b"1.5",
        data=b'"text"',
        override=Override(True, True, True, True, True),
    )


def test_the_least_that_tokens_say() -> None:
    """A connection token may be empty: somebody anonymous, for ever; a subscription token needs its channel."""
    empty: dict[str, Any] = {"sub": "", "subs": {}, "channels": [], "b64info": "", "aud": []}
    null = dict.fromkeys(CLAIM_NAMES.split())
    for nothing in ({}, empty, null):
        assert HMAC_ONLY.connection(token(nothing), NOW) == ConnectClaims("", 0, None, None, {})
    empty = {"sub": "", "client": "", "b64info": "", "b64data": "", "override": {}}
    for nothing in ({}, empty, null):
        claims = HMAC_ONLY.subscription(token(nothing | {"channel": "news"}), NOW)
        assert claims == SubscribeClaims("", "news", "", 0, None, None, Override())


def test_the_claim_channel_tells_the_kinds_apart() -> None:
    """A subscription token opens no connection, and a connection token no subscription, whether expired or not."""
    for times in ({}, {"exp": 1}):
        assert "channel" in why_invalid("connection", HMAC_ONLY, token({"sub": "42", "channel": "news"} | times))
        for missing in ({}, {"channel": ""}, {"channel": None}):
            assert "channel" in why_invalid("subscription", HMAC_ONLY, token({"sub": "42"} | missing | times))
    assert HMAC_ONLY.connection(token({"sub": "42", "channel": ""}), NOW).user == "42"


def test_subs_outweigh_channels() -> None:
    """``channels`` subscribes with the namespace's options, and not at all beside non-empty ``subs``."""
    plain = SubscribeOptions(None, None)
    channels = {"channels": ["a", "b", "a"]}
    assert HMAC_ONLY.connection(token(channels), NOW).subs == {"a": plain, "b": plain}
    assert HMAC_ONLY.connection(token(channels | {"subs": {}}), NOW).subs == {"a": plain, "b": plain}
    assert HMAC_ONLY.connection(token(channels | {"subs": {"c": {}}}), NOW).subs == {"c": plain}


@both
def test_payload_bytes_stay_as_they_are(kind: str) -> None:
    """Precision, key order, spacing and escapes of a payload claim survive; raw newlines do not (PROTOCOL 3.2)."""
    info = b'{"z" :\r\n  1.000000000000000000001,\n "a": [ "\\n\\u00e9 \xc3\xa9" ,1e3 ] }'
    claims = verify(
        kind, HMAC_ONLY, token(b'{"channel":"%s","info": %s }' % (b"" if kind == "connection" else b"x", info))
    )
    assert claims.info == info.replace(b"\r", b"").replace(b"\n", b"")


@both
def test_binary_payloads_win(kind: str) -> None:
    """``b64info`` wins over ``info`` and arrives untouched; an empty one counts as absent."""
    raw = bytes(range(256)) + b"\r\n"
    both_given = {"info": 1, "b64info": base64.b64encode(raw).decode()}
    assert verify(kind, HMAC_ONLY, token(base(kind, **both_given))).info == raw
    assert verify(kind, HMAC_ONLY, token(base(kind, info=1, b64info=""))).info == b"1"


def test_binary_data_wins_as_well() -> None:
    """``b64data`` wins over ``data``, in a subscription token and in ``subs``."""
    options = {"data": 1, "b64data": "AAE=", "info": 2, "b64info": "/+8="}
    claims = HMAC_ONLY.subscription(token({"channel": "news"} | options), NOW)
    assert (claims.data, claims.info) == (b"\0\1", b"\xff\xef")
    subs = HMAC_ONLY.connection(token({"subs": {"news": options}}), NOW).subs
    assert subs == {"news": SubscribeOptions(b"\xff\xef", b"\0\1")}


@pytest.mark.parametrize("text", ["A", "AAE", "AA E=", "A===", "_-8=", "é===", "AAE=\n", "AAE=AAE="])
def test_broken_base64_is_invalid(text: str) -> None:
    """Padding, alphabet and length must be right wherever base64 stands."""
    for name in ("b64info", "b64data"):
        why_invalid("subscription", HMAC_ONLY, token({"channel": "news", name: text}))
        why_invalid("connection", HMAC_ONLY, token({"subs": {"news": {name: text}}}))
    why_invalid("connection", HMAC_ONLY, token({"b64info": text}))


NO_TEXT: list[Any] = [1, True, [], {}]
NO_TIME: list[Any] = ["1", True, [], {}, 2**64, -(2**64), 1e300, 10**400]
WRONG: dict[str, dict[str, list[Any]]] = {
    "connection": {
        "channels": ["news", {}, [1], [None], 1],
        "subs": [
            *("news", [], ["news"], {"a": 1}, {"a": []}, 1),
            *({"a": {name: 1}} for name in ("b64info", "b64data", "override")),
            *({"a": {"override": {"presence": value}}} for value in NO_TEXT[1:3]),
            {"a": {"override": {"presence": {"value": 1}}}},
        ],
        "meta": [1, "text", [], True, [{}]],
    },
    "subscription": {
        "client": NO_TEXT,
        "b64data": NO_TEXT,
        "override": [1, [], {"presence": True}, {"join_leave": {"value": "x"}}],
    },
}
for _kind in KINDS:
    WRONG[_kind] |= dict.fromkeys(("sub", "iss", "b64info", "channel"), NO_TEXT)
    WRONG[_kind] |= dict.fromkeys(("exp", "nbf", "expire_at"), NO_TIME)
    WRONG[_kind]["aud"] = [1, {}, [1], ["a", None], [["a"]]]


@pytest.mark.parametrize(
    ("kind", "claims"),
    [(kind, {name: value}) for kind in KINDS for name, values in WRONG[kind].items() for value in values],
)
def test_claims_of_wrong_types_are_invalid(kind: str, claims: dict[str, Any]) -> None:
    """A claim of another type than its own is never guessed at."""
    why_invalid(kind, HMAC_ONLY, token(base(kind) | claims))


# --- times ---------------------------------------------------------------------


@both
@pytest.mark.parametrize("times", [{"exp": NOW}, {"exp": 0}, {"exp": -1}, {"exp": NOW - 0.5}, {"nbf": NOW + 0.5}])
def test_a_token_out_of_its_time_is_expired(kind: str, times: dict[str, float]) -> None:
    """At ``exp`` it is too late and before ``nbf`` too early, both called expired; ``expire_at`` does not help."""
    for more in ({}, {"expire_at": 0}, {"expire_at": NOW + 60}):
        with pytest.raises(TokenExpired):
            verify(kind, HMAC_ONLY, token(base(kind, **times, **more)))


@both
def test_an_expired_token_with_a_wrong_signature_is_invalid(kind: str) -> None:
    """Nobody learns "expired" about a token that was never good."""
    why_invalid(kind, HMAC_ONLY, token(base(kind, exp=1), key=OLD_SECRET))


@both
@pytest.mark.parametrize(
    ("times", "expire_at"),
    [
        ({}, 0),
        ({"exp": NOW + 60}, NOW + 60),
        ({"exp": NOW + 0.25}, NOW + 1),
        ({"exp": 2**63 - 1}, 2**63 - 1),
        ({"exp": NOW + 60, "nbf": NOW}, NOW + 60),
        ({"exp": NOW + 60, "expire_at": 0}, 0),
        ({"exp": NOW + 60, "expire_at": -5}, 0),
        ({"exp": NOW + 60, "expire_at": NOW + 5}, NOW + 5),
        ({"exp": NOW + 60, "expire_at": None}, NOW + 60),
        ({"expire_at": NOW + 5}, NOW + 5),
        ({"expire_at": 1}, 1),
        ({"expire_at": 0.5}, 1),
    ],
)
def test_when_a_connection_or_subscription_ends(kind: str, times: dict[str, Any], expire_at: float) -> None:
    """``expire_at`` decides, 0 or less for never; else ``exp``.  A past one is given as it is, for refusal 110."""
    claims = verify(kind, HMAC_ONLY, token(base(kind, **times)))
    assert claims.expire_at == expire_at
    assert type(claims.expire_at) is int


# --- who it is from and for ----------------------------------------------------


@both
@pytest.mark.parametrize(
    ("settings", "good", "bad"),
    [
        ({"audience": "us"}, ["us", ["them", "us"]], [None, "", "US", "us ", ["them"], [], "them"]),
        ({"issuer": "me"}, ["me"], [None, "", "Me", "me ", "you"]),
        ({"audience_regex": r"^app-\d$"}, ["app-1", ["x", "app-2"]], [None, "", "app-", "app-1\n", "app-٣", [], ["x"]]),
        ({"issuer_regex": r"^app-\d$"}, ["app-1"], [None, "", "app-", "app-1\n", "app-٣"]),
        ({"audience_regex": "us"}, ["us", "trust"], ["u s", None]),
        ({"issuer_regex": "me|you"}, ["me", "home", "you"], ["us", None]),
    ],
)
def test_audience_and_issuer(kind: str, settings: dict[str, Any], good: list[Any], bad: list[Any]) -> None:
    """An exact value equals or is in the list; a regular expression is searched for, with the meaning it has in Go."""
    by = verifier(hmac_secret_key=SECRET, **settings)
    name = "aud" if "audience" in next(iter(settings)) else "iss"
    for value in good:
        assert verify(kind, by, token(base(kind, sub="42", **{name: value}))).user == "42"
    for value in bad:
        assert next(iter(settings)).partition("_")[0] in why_invalid(kind, by, token(base(kind, **{name: value})))


@both
def test_another_claim_may_name_the_user(kind: str) -> None:
    """With ``user_id_claim`` the user comes from there alone: missing is anonymous, another type is invalid."""
    by = verifier(hmac_secret_key=SECRET, user_id_claim="uid")
    assert verify(kind, by, token(base(kind, sub="42", uid="7"))).user == "7"
    for nobody in ({}, {"uid": ""}, {"uid": None}, {"UID": "7"}):
        assert verify(kind, by, token(base(kind, sub="42", **nobody))).user == ""
    for wrong in (7, True, ["7"], {"id": "7"}):
        assert "user_id_claim" in why_invalid(kind, by, token(base(kind, uid=wrong)))
    assert verify(kind, verifier(hmac_secret_key=SECRET, user_id_claim="sub"), token(base(kind, sub="42"))).user == "42"


# --- published keys ------------------------------------------------------------

JWKS_URL = "https://keys.example.com/jwks.json"


def published(algorithm: str) -> Key:
    """The public half of ``private_key(algorithm)`` as a key set gives it."""
    return key_of(private_key(algorithm).public_key())


@both
@pytest.mark.parametrize("algorithm", [name for name in ALL_ALGORITHMS if not name.startswith("HS")])
def test_a_published_key_is_wanted_and_then_verifies(kind: str, algorithm: str) -> None:
    """The verifier names the key that it lacks, and accepts the token once the key is at hand."""
    at_hand: dict[tuple[str, str], Key] = {}
    by = verifier(jwks_public_endpoint=JWKS_URL, find_key=lambda url, kid: at_hand.get((url, kid)))
    text = token(base(kind, sub="42"), algorithm, kid="k1")
    with pytest.raises(KeyWanted) as caught:
        verify(kind, by, text)
    assert (caught.value.kid, caught.value.url) == ("k1", JWKS_URL)
    at_hand[JWKS_URL, "k1"] = published(algorithm)
    assert verify(kind, by, text).user == "42"
    stranger = token(base(kind, sub="42"), algorithm, private_key(algorithm, 1), kid="k1")
    assert why_invalid(kind, by, stranger) == f"wrong signature, alg {algorithm}"


@both
def test_published_keys_exclude_configured_ones(kind: str) -> None:
    """With a key set in force no secret or PEM key counts, and a token that no published key can fit wants none."""
    by = verifier(jwks_public_endpoint=JWKS_URL, hmac_previous_secret_key=OLD_SECRET, **every_key())
    for algorithm in ("HS256", "HS384", "HS512"):
        for secret in (SECRET, OLD_SECRET):
            assert "takes no published key" in why_invalid(kind, by, token(base(kind), algorithm, secret, kid="k1"))
    for algorithm in ("RS256", "ES256", "EdDSA"):
        assert "expected a kid" in why_invalid(kind, by, token(base(kind), algorithm))
        assert "expected a kid" in why_invalid(kind, by, token(base(kind), algorithm, kid=""))
        with pytest.raises(KeyWanted):
            verify(kind, by, token(base(kind), algorithm, kid="k1"))


@both
def test_a_published_key_serves_no_other_algorithm(kind: str) -> None:
    """A key set's key serves its own family, or the one algorithm that it names."""
    narrow = Key(frozenset(("RS512",)), published("RS256").material)
    for key, algorithm in [(published("RS256"), "ES256"), (published("ES256"), "ES384"), (narrow, "RS256")]:
        by = verifier(jwks_public_endpoint=JWKS_URL, find_key=lambda url, kid, key=key: key)  # type: ignore[misc]
        text = token(base(kind), algorithm, kid="k1")
        assert why_invalid(kind, by, text) == f"the key with this kid does not serve {algorithm}"


@both
def test_issuer_and_audience_choose_the_key_set(kind: str) -> None:
    """Named groups fill the address, so that one tenant's key never verifies another tenant's token."""
    by = verifier(
        jwks_public_endpoint="https://{{tenant}}.example.com/{{app}}/jwks.json",
        issuer_regex=r"^https://(?P<tenant>red|blue|a\.b-c_d)/$",
        audience_regex="(?P<app>one)?",
        find_key=lambda url, kid: published("ES256") if "//red." in url else None,
    )
    red = base(kind, sub="42", iss="https://red/", aud=["two", "one"])
    assert why_invalid(kind, by, token(red, "ES256", kid="k1")).startswith("issuer and audience do not give all")
    red["aud"] = "one"
    assert verify(kind, by, token(red, "ES256", kid="k1")).user == "42"
    with pytest.raises(KeyWanted) as caught:
        verify(kind, by, token(red | {"iss": "https://blue/"}, "ES256", kid="k1"))
    assert caught.value.url == "https://blue.example.com/one/jwks.json"
    for iss in ("https://green/", "https://red.evil/", "https://a-b-c_d/", "", None, 7):
        why_invalid(kind, by, token(red | {"iss": iss}, "ES256", kid="k1"))


@pytest.mark.parametrize(
    "loose",
    [
        "(?P<t>.*)",
        "(?P<t>[a-z]+)",
        r"(?P<t>\w+)",
        "(?P<t>a.b)",
        "(?P<t>a|b*)",
        "(?P<t>(a))",
        "(?P<t>)",
        "x",
        "(t)",
        "[(?P<t>a)]",
    ],
)
def test_an_address_is_filled_from_explicit_lists_only(loose: str) -> None:
    """A group that matches more than a written list would let a token say where its own key is to be fetched."""
    for name in ("issuer_regex", "audience_regex"):
        unsafe: dict[str, Any] = {name: loose}
        with pytest.raises(ValueError, match=r"jwks_public_endpoint: expected .* explicit list"):
            verifier(jwks_public_endpoint="https://{{t}}/", **unsafe)


# --- settings ------------------------------------------------------------------


def test_settings_that_cannot_work_are_named() -> None:
    """Each fault names its setting, and never shows the key."""
    weak = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    odd = ec.generate_private_key(ec.SECP256K1())
    secret_half = rsa_key(0).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    faults = [
        ("hmac_secret_key", public_pem(rsa_key(0))),
        ("hmac_previous_secret_key", public_pem(private_key("ES256"))),
        ("hmac_secret_key", '{"kty":"oct","k":"AAAA"}'),
        ("rsa_public_key", "no PEM"),
        ("rsa_public_key", secret_half),
        ("rsa_public_key", public_pem(weak)),
        ("rsa_public_key", public_pem(private_key("ES256"))),
        ("ecdsa_public_key", public_pem(odd)),
        ("ecdsa_public_key", public_pem(private_key("EdDSA"))),
        ("ed25519_public_key", public_pem(rsa_key(0))),
        ("issuer_regex", "("),
        ("audience_regex", "(?P<x>"),
    ]
    for name, value in faults:
        with pytest.raises(ValueError, match=f"^{name}: ") as caught:
            unchecked(**{name: value})
        assert value not in str(caught.value) or len(value) < 10
    for name in ("issuer", "audience"):
        with pytest.raises(ValueError, match=f"{name}, {name}_regex: expected one of the two"):
            unchecked(**{name: "a", f"{name}_regex": "a"})


# --- sign ----------------------------------------------------------------------


@both
def test_sign_makes_a_token_that_verifies(kind: str) -> None:
    """A token for operators and tests is a good one, also for PyJWT."""
    text = sign(SECRET, base(kind, sub="ünï", info={"a": 1}))
    claims = verify(kind, HMAC_ONLY, text)
    assert (claims.user, claims.info) == ("ünï", b'{"a":1}')
    opened = PyJWS().decode_complete(text, SECRET, ["HS256"])
    assert opened["header"] == {"alg": "HS256", "typ": "JWT"}


def test_sign_refuses_what_is_no_secret() -> None:
    """No secret, or a public key for one, makes no token; nor do claims that are no JSON."""
    for secret in ("", public_pem(private_key("ES256"))):
        with pytest.raises(ValueError, match=r"^secret: "):
            sign(secret, {})
    with pytest.raises(TypeError):
        sign(SECRET, {"sub": object()})


# --- properties ----------------------------------------------------------------

# The first example makes the keys, which takes as long as it takes.
unhurried = settings(deadline=None)


@functools.cache
def trusting_all() -> Verifier:
    """A verifier that trusts a key of each family."""
    return verifier(**every_key())


@functools.cache
def originals(kind: str) -> dict[str, Claims]:
    """Good tokens of each family, by text, with their claims."""
    texts = [
        token(base(kind, sub=f"user {number} of {algorithm}", info={"n": number}, exp=NOW + 60 + number), algorithm)
        for algorithm in ("HS256", "HS512", "RS256", "ES256", "EdDSA")
        for number in (1, 2)
    ]
    return {text: verify(kind, trusting_all(), text) for text in texts}


def outcome(kind: str, by: Verifier, text: str) -> Claims | None:
    """The claims, or ``None`` for a token that is invalid or expired; anything else fails the test."""
    try:
        return verify(kind, by, text)
    except BAD:
        return None


@unhurried
@given(
    text=st.text()
    | st.text(alphabet=string.ascii_letters + string.digits + "-_.=")
    | st.from_regex(re.compile(r"\A\w*\.\w*\.\w*\Z", re.ASCII))
)
def test_arbitrary_text_is_never_a_token(text: str) -> None:
    """Whatever text comes as a token, it is refused, and nothing else happens."""
    for kind in KINDS:
        assert outcome(kind, trusting_all(), text) is None


@unhurried
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_a_mutated_token_says_what_was_signed_or_nothing(data: st.DataObject, kind: str) -> None:
    """Cutting, inserting, replacing and swapping parts of good tokens gives claims signed like that, or a refusal."""
    texts = sorted(originals(kind))
    parts = data.draw(st.sampled_from(texts)).split(".")
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, 2))
        part = parts[place]
        start = data.draw(st.integers(0, len(part)))
        end = data.draw(st.integers(start, len(part)) | st.just(start) | st.just(min(start + 1, len(part))))
        fresh = data.draw(
            st.text(alphabet=string.ascii_letters + string.digits + "-_", max_size=4)
            | st.text(max_size=4)
            | st.sampled_from(texts).map(lambda text, place=place: text.split(".")[place])  # type: ignore[misc]
        )
        parts[place] = data.draw(st.sampled_from((part[:start] + fresh + part[end:], fresh)))
    claims = outcome(kind, trusting_all(), ".".join(parts))
    assert claims is None or claims in originals(kind).values()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@unhurried
@given(claims=st.dictionaries(st.sampled_from(CLAIM_NAMES.split()), JSON), kind=st.sampled_from(KINDS))
def test_arbitrary_claims_give_typed_ones_or_a_refusal(claims: dict[str, Any], kind: str) -> None:
    """The back end may sign any nonsense: what comes out has the promised types, or is refused."""
    for by in (HMAC_ONLY, verifier(hmac_secret_key=SECRET, user_id_claim="uid", audience_regex="a", issuer_regex="i")):
        found = outcome(kind, by, token(claims))
        if found is not None:
            assert isinstance(found.user, str)
            assert type(found.expire_at) is int
            assert found.expire_at >= 0
            assert found.info is None or b"\n" not in found.info or claims.get("b64info")


@unhurried
@given(payload=st.binary(max_size=200), header=st.binary(max_size=100))
def test_arbitrary_bytes_in_the_parts_are_refused(payload: bytes, header: bytes) -> None:
    """Bytes that are no JSON give a refusal, be they in a signed payload or in the header."""
    for kind in KINDS:
        assert outcome(kind, HMAC_ONLY, token(payload)) is None or re.match(rb"\s*\{", payload)
        assert outcome(kind, HMAC_ONLY, forged(header, payload)) is None


def test_no_reason_tells_what_the_token_said() -> None:
    """What goes to the log holds no part of the token and no value of a claim."""
    spy = "Tr0ub4dor"
    invalid: list[dict[str, Any]] = [
        {name: value}
        for name in ("sub", "exp", "aud", "b64info", "subs", "channels", "meta", "channel", "iss", "uid")
        for value in (spy, [spy], {spy: spy}, [{spy: [spy]}])
    ]
    by = verifier(hmac_secret_key=SECRET, user_id_claim="uid", audience="us", issuer_regex="me")
    reasons = [
        why_invalid("connection", by, text)
        for claims in invalid
        for text in (
            token(claims),
            token(claims, key=OLD_SECRET),
            token(claims, kid=spy * 40),
            token(json.dumps(claims).encode() + b"x"),
        )
    ]
    reasons += [
        why_invalid("connection", by, forged(json.dumps({name: spy}).encode())) for name in ("alg", "kid", "crit")
    ]
    assert len(reasons) == len(invalid) * 4 + 3
    assert not [reason for reason in reasons if spy in reason or encoded(spy.encode()).decode()[:6] in reason]
