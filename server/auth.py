"""A token and the time: who somebody is, and what that lets them do.

A token is a JWT in compact form (RFC 7515, RFC 7519), signed by the application's back end.  ``Verifier`` turns it into
claims or says why not; what becomes of a "no" (a refusal, a disconnect) is for the command that brought the token:

=================  ====================  ====================  =================  ======================
raised             connect (4.1)         subscribe (8.2)       refresh (4.9)      sub_refresh (4.10)
=================  ====================  ====================  =================  ======================
``TokenInvalid``   disconnect 3500       refusal 103           disconnect 3500    disconnect 3500
``TokenExpired``   refusal 109           refusal 109           disconnect 3005    the old expiry stays
=================  ====================  ====================  =================  ======================

Three choices that shaped this module:

* *The key picks the algorithm, not the token.*  A key is held together with the names of the algorithms it serves, and
  the header's ``alg`` can only choose among keys.  So an RSA public key never becomes an HMAC secret, and ``none`` is
  a name that no key has (RFC 8725 3.1).
* *PyJWT's algorithms, our own envelope.*  PyJWT's algorithm objects check the signature, with keys prepared once.
  ``PyJWS.decode`` was tried: it looks at the key anew for each token and walks the base64 text in Python, 42 us against
  7 us for a small token, 2.9 ms against 0.4 ms for one of 40 KB that anybody may send.
* *Nothing unsigned is looked at* but the header and, if the address of the key set depends on them, issuer and
  audience.

Pure: no clock, no randomness, no ``async``.  A key that has to be fetched first is asked for with ``KeyWanted``.
PROTOCOL 8.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from jwt.api_jws import PyJWS
from jwt.exceptions import InvalidKeyError

if TYPE_CHECKING:
    from server.settings import TokenSettings

TOKEN_BYTES = 65_536
"""A longer token is invalid unread; no frame of default size can carry one (PROTOCOL 18)."""

KID_CHARACTERS = 256
"""A longer key id is invalid; the ids in use are hashes and UUIDs."""

HMAC = frozenset(("HS256", "HS384", "HS512"))
RSA = frozenset(("RS256", "RS384", "RS512"))
ECDSA = frozenset(("ES256", "ES384", "ES512"))
ED25519 = frozenset(("EdDSA",))

# RFC 7518 3.4 ties each algorithm to one curve.
_CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}

# RFC 7518 3.3 asks for 2048 bits at least; beyond 8192 each check of a signature costs too much.
_RSA_BITS = (2048, 8192)

_JWS = PyJWS()
ALGORITHMS = {name: _JWS.get_algorithm_by_name(name) for name in sorted(HMAC | RSA | ECDSA | ED25519)}
"""Every algorithm that a token may name, by that name (RFC 7518 3.1, RFC 8037 3.1)."""


class TokenExpired(Exception):
    """The token was good and is no longer (``exp``), or is not yet (``nbf``).  PROTOCOL 8.1."""


class TokenInvalid(Exception):
    """The token cannot be trusted, or does not say what it has to.

    ``why`` goes to the log only.  It names the rule, and never holds the token or a claim's value.
    """

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class KeyWanted(Exception):
    """The key ``kid`` of the key set at ``url`` is not at hand: fetch it and verify once more.

    Whoever still gets this after a successful fetch knows that there is no such key, so the token is invalid
    (``jwks.Keys.verified`` does both steps).
    """

    def __init__(self, kid: str, url: str) -> None:
        super().__init__(url)
        self.kid = kid
        self.url = url


class Override(msgspec.Struct, frozen=True):
    """Namespace options switched for one subscription; ``None`` leaves the namespace's (PROTOCOL 8.1)."""

    presence: bool | None = None
    join_leave: bool | None = None
    force_push_join_leave: bool | None = None
    force_positioning: bool | None = None
    force_recovery: bool | None = None


class SubscribeOptions(msgspec.Struct, frozen=True):
    """What a connection token, or a hook, says of one subscription (PROTOCOL 8.1, ``subs``).

    ``info`` becomes ``chan_info``, ``data`` goes into the subscribe result; payload bytes, ``None`` for none.
    ``expire_at`` is Unix seconds, 0 for never; no token says it here.
    """

    info: bytes | None
    data: bytes | None
    override: Override = Override()
    expire_at: int = 0


class ConnectClaims(msgspec.Struct, frozen=True):
    """What a connection token says (PROTOCOL 8.1).

    ``user`` is ``""`` for an anonymous one.  ``expire_at`` is the end of the connection in Unix seconds, 0 for never;
    it may be past already, which is refusal 110.  ``info`` becomes ``conn_info``; ``meta`` is the text of a JSON object
    for back ends only.  ``subs`` maps the channels to subscribe server-side to their options; nobody has checked the
    names yet.
    """

    user: str
    expire_at: int
    info: bytes | None
    meta: bytes | None
    subs: dict[str, SubscribeOptions]


class SubscribeClaims(msgspec.Struct, frozen=True):
    """What a subscription token says (PROTOCOL 8.2).

    The caller compares ``user`` and ``channel`` with those of the command, and ``client``, unless ``""``, with the
    client id.  ``expire_at`` is as in ``ConnectClaims``, for the subscription.
    """

    user: str
    channel: str
    client: str
    expire_at: int
    info: bytes | None
    data: bytes | None
    override: Override


@dataclass(frozen=True, slots=True)
class Key:
    """A key and the only algorithms that it serves; ``material`` is as PyJWT's algorithms want it."""

    algorithms: frozenset[str]
    material: Any


def key_of(material: object) -> Key:
    """Make a ``Key`` of a public key of ``cryptography``.

    Raises ``ValueError`` if no algorithm of ours can use it, or it is too weak or too costly.
    """
    if isinstance(material, RSAPublicKey):
        low, high = _RSA_BITS
        if not low <= material.key_size <= high:
            raise ValueError(f"expected an RSA key of {low} to {high} bits, got {material.key_size}")
        return Key(RSA, material)
    if isinstance(material, EllipticCurvePublicKey):
        algorithm = _CURVES.get(material.curve.name)
        if algorithm is None:
            raise ValueError(f"expected the curve P-256, P-384 or P-521, got {material.curve.name}")
        return Key(frozenset((algorithm,)), material)
    if isinstance(material, Ed25519PublicKey):
        return Key(ED25519, material)
    raise ValueError(f"expected an RSA, EC or Ed25519 public key, got {type(material).__name__}")


# --- the wire: an absent claim and one that is null are the same --------------

_ABSENT = msgspec.Raw(b"null")


class _Header(msgspec.Struct):
    alg: str = ""
    kid: str | None = None
    crit: msgspec.Raw = _ABSENT


class _Flag(msgspec.Struct):
    value: bool | None = None


class _Override(msgspec.Struct):
    presence: _Flag | None = None
    join_leave: _Flag | None = None
    force_push_join_leave: _Flag | None = None
    force_positioning: _Flag | None = None
    force_recovery: _Flag | None = None


class _Options(msgspec.Struct):
    info: msgspec.Raw = _ABSENT
    b64info: str | None = None
    data: msgspec.Raw = _ABSENT
    b64data: str | None = None
    override: _Override | None = None


class _Parties(msgspec.Struct):
    iss: str | None = None
    aud: str | list[str] | None = None


class _Claims(_Parties):
    sub: str | None = None
    exp: int | float | None = None
    nbf: int | float | None = None
    expire_at: int | float | None = None
    channel: str | None = None
    info: msgspec.Raw = _ABSENT
    b64info: str | None = None


class _ConnectionClaims(_Claims):
    meta: msgspec.Raw = _ABSENT
    channels: list[str] | None = None
    subs: dict[str, _Options | None] | None = None


class _SubscriptionClaims(_Claims):
    client: str | None = None
    data: msgspec.Raw = _ABSENT
    b64data: str | None = None
    override: _Override | None = None


_T = TypeVar("_T")
_C = TypeVar("_C", bound=_Claims)


class Verifier:
    """Verifies the tokens of one set of settings (``client.token`` or ``client.subscription_token``).

    ``skip_signature`` trusts every token's content (``client.insecure_skip_token_signature_verify``); expiry, issuer
    and audience count all the same.  ``find_key(url, kid)`` gives a key of a JWKS that is at hand, or ``None``; with
    ``jwks_public_endpoint`` set no other key counts.

    Raises ``ValueError``, naming the setting, for one that cannot work.  PROTOCOL 8.
    """

    def __init__(
        self,
        settings: TokenSettings,
        *,
        skip_signature: bool = False,
        find_key: Callable[[str, str], Key | None] | None = None,
    ) -> None:
        self._skip_signature = skip_signature
        self._find_key = find_key
        self._keys = _static_keys(settings)
        self._previous = _hmac_key("hmac_previous_secret_key", settings.hmac_previous_secret_key)
        self._previous_until = settings.hmac_previous_secret_key_valid_until
        self._issuer = _Party("issuer", settings.issuer, settings.issuer_regex)
        self._audience = _Party("audience", settings.audience, settings.audience_regex)
        self._user_claim = settings.user_id_claim if settings.user_id_claim != "sub" else ""
        self._endpoint = settings.jwks_public_endpoint
        self._placeholders = frozenset(_PLACEHOLDER.findall(self._endpoint))
        for name in sorted(self._placeholders):
            if not (self._issuer.lists(name) or self._audience.lists(name)):
                raise ValueError(
                    f"jwks_public_endpoint: expected issuer_regex or audience_regex with a group (?P<{name}>one|two) "
                    f"for {{{{{name}}}}}, an explicit list of values, since they come from tokens nobody has verified"
                )

    def connection(self, token: str, now: float) -> ConnectClaims:
        """Verify a connection token at ``now`` (Unix seconds).  PROTOCOL 8.1.

        Raises ``TokenInvalid``, ``TokenExpired`` or ``KeyWanted``, and nothing else, whatever the token.
        """
        claims, user = self._verify(token, now, _ConnectionClaims)
        if claims.channel:
            raise TokenInvalid("a connection token has no channel claim, this one looks like a subscription token")
        _check_times(claims, now)
        if claims.subs:
            subs = {channel: _subscribe_options(options or _Options()) for channel, options in claims.subs.items()}
        else:
            subs = {channel: SubscribeOptions(None, None) for channel in claims.channels or ()}
        meta = _payload(claims.meta)
        if meta is not None and not meta.startswith(b"{"):
            raise TokenInvalid("claim meta: expected an object")
        return ConnectClaims(user, _expire_at(claims), _payload(claims.info, claims.b64info), meta, subs)

    def subscription(self, token: str, now: float) -> SubscribeClaims:
        """Verify a subscription token at ``now`` (Unix seconds).  PROTOCOL 8.2.

        Raises as ``connection`` does.
        """
        claims, user = self._verify(token, now, _SubscriptionClaims)
        if not claims.channel:
            raise TokenInvalid("a subscription token needs the claim channel")
        _check_times(claims, now)
        return SubscribeClaims(
            user=user,
            channel=claims.channel,
            client=claims.client or "",
            expire_at=_expire_at(claims),
            info=_payload(claims.info, claims.b64info),
            data=_payload(claims.data, claims.b64data),
            override=_override(claims.override),
        )

    def _verify(self, token: str, now: float, kind: type[_C]) -> tuple[_C, str]:
        """Give the claims and the user of a token with a good signature, issuer and audience."""
        header, payload, signed, signature = _open(token)
        if not self._skip_signature:
            self._check_signature(header, payload, signed, signature, now)
        claims = _decode(payload, kind, "claims")
        self._match_parties(claims)
        if not self._user_claim:
            return claims, claims.sub or ""
        user = _decode(payload, dict[str, object], "claims").get(self._user_claim)
        if user is not None and not isinstance(user, str):
            raise TokenInvalid("the claim that user_id_claim names: expected a string")
        return claims, user or ""

    def _check_signature(self, header: _Header, payload: bytes, signed: bytes, signature: bytes, now: float) -> None:
        algorithm = ALGORITHMS.get(header.alg)
        if algorithm is None:
            raise TokenInvalid("header: alg is none of those that are supported")
        if self._endpoint:
            keys = [self._fetched_key(header, payload)]
        else:
            keys = self._keys
            # "Until" is inclusive, and 0 is "until it is taken out of the settings".
            if self._previous is not None and (not self._previous_until or now <= self._previous_until):
                keys = [*keys, self._previous]
            keys = [key for key in keys if header.alg in key.algorithms]
        if not keys:
            raise TokenInvalid(f"no key is configured for {header.alg}")
        if not any(algorithm.verify(signed, key.material, signature) for key in keys):
            raise TokenInvalid(f"wrong signature, alg {header.alg}")

    def _fetched_key(self, header: _Header, payload: bytes) -> Key:
        if header.alg in HMAC:
            # Published keys are public: one that served as a secret would let anybody sign.
            raise TokenInvalid(f"jwks_public_endpoint is set, and {header.alg} takes no published key")
        if not header.kid:
            raise TokenInvalid("header: expected a kid, since jwks_public_endpoint is set")
        url = self._endpoint
        if self._placeholders:
            url = self._filled(self._match_parties(_decode(payload, _Parties, "claims")))
        key = self._find_key(url, header.kid) if self._find_key is not None else None
        if key is None:
            raise KeyWanted(header.kid, url)
        if header.alg not in key.algorithms:
            raise TokenInvalid(f"the key with this kid does not serve {header.alg}")
        return key

    def _match_parties(self, claims: _Parties) -> dict[str, str]:
        """Check issuer and audience; gives the values of the named groups, the audience's last."""
        groups = self._issuer.match([claims.iss or ""])
        aud = claims.aud
        return groups | self._audience.match([aud] if isinstance(aud, str) else aud or [])

    def _filled(self, groups: Mapping[str, str]) -> str:
        """Put the groups' values into the address of the key set."""
        if not self._placeholders <= groups.keys():
            raise TokenInvalid("issuer and audience do not give all that jwks_public_endpoint needs")
        return _PLACEHOLDER.sub(lambda found: groups[found[1]], self._endpoint)


_PLACEHOLDER = re.compile(r"\{\{(.*?)\}\}")

# Letters, digits, harmless punctuation, escaped punctuation, and "|" between them: such a group has as many values as
# the operator wrote down.  Anything looser would let an unverified token choose where its own key comes from.
_EXPLICIT = r"\(\?P<%s>(?:[A-Za-z0-9_\-:/@|]|\\[^A-Za-z0-9])+\)"


class _Party:
    """What is demanded of ``iss`` or ``aud``: nothing, one exact value, or a match."""

    def __init__(self, name: str, exact: str, pattern: str) -> None:
        if exact and pattern:
            raise ValueError(f"{name}, {name}_regex: expected one of the two, got both")
        self._name = name
        self._exact = exact
        try:
            # ASCII: in Go, where these settings come from, \w and \d know nothing else.
            self._regex = re.compile(pattern, re.ASCII) if pattern else None
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{name}_regex: {error}") from None

    def lists(self, group: str) -> bool:
        """Is there a named group whose possible values are written down one by one?"""
        if self._regex is None or group not in self._regex.groupindex:
            return False
        return re.search(_EXPLICIT % re.escape(group), self._regex.pattern) is not None

    def match(self, values: list[str]) -> dict[str, str]:
        """Give the named groups of the first value that will do; raises ``TokenInvalid`` if none does."""
        if self._exact:
            if self._exact in values:
                return {}
            raise TokenInvalid(f"wrong {self._name}")
        if self._regex is None:
            return {}
        for value in values:
            # "$" means the very end in Go, and in Python also the place before a last newline.
            found = self._regex.search(value) if "\n" not in value else None
            if found is not None:
                return {name: text for name, text in found.groupdict().items() if text is not None}
        raise TokenInvalid(f"{self._name} does not match {self._name}_regex")


def sign(secret: str, claims: Mapping[str, Any]) -> str:
    """Give a token with ``claims``, signed with HS256 and ``secret``; for development and operators.

    Raises ``ValueError`` for a secret that is empty or a public key, ``TypeError`` for claims that are no JSON.
    """
    key = _hmac_key("secret", secret)
    if key is None:
        raise ValueError("secret: expected one, got an empty text")
    header = msgspec.json.encode({"alg": "HS256", "typ": "JWT"})
    signed = _base64url(header) + b"." + _base64url(msgspec.json.encode(dict(claims)))
    return (signed + b"." + _base64url(ALGORITHMS["HS256"].sign(signed, key.material))).decode("ascii")


# --- keys from settings --------------------------------------------------------


def _static_keys(settings: TokenSettings) -> list[Key]:
    keys = [
        _hmac_key("hmac_secret_key", settings.hmac_secret_key),
        _pem_key("rsa_public_key", settings.rsa_public_key, RSA),
        _pem_key("ecdsa_public_key", settings.ecdsa_public_key, ECDSA),
        _pem_key("ed25519_public_key", settings.ed25519_public_key, ED25519),
    ]
    return [key for key in keys if key is not None]


def _hmac_key(setting: str, secret: str) -> Key | None:
    if not secret:
        return None
    try:
        # Refuses what looks like a public key: those who know that one could sign.
        return Key(HMAC, ALGORITHMS["HS256"].prepare_key(secret))
    except InvalidKeyError:
        raise ValueError(f"{setting}: expected a secret, got the text of a key or certificate") from None


def _pem_key(setting: str, pem: str, family: frozenset[str]) -> Key | None:
    if not pem:
        return None
    try:
        key = key_of(load_pem_public_key(pem.encode()))
    except UnsupportedAlgorithm:
        raise ValueError(f"{setting}: expected a public key of a known kind") from None
    except ValueError as error:
        raise ValueError(f"{setting}: expected a public key in PEM: {error}") from None
    if not key.algorithms <= family:
        raise ValueError(f"{setting}: got a key for {', '.join(sorted(key.algorithms))}")
    return key


# --- from text to values -------------------------------------------------------


def _open(token: str) -> tuple[_Header, bytes, bytes, bytes]:
    """Take a token apart: header, payload, the bytes that are signed, signature (RFC 7515 7.1)."""
    # A character takes a byte at least, so this holds before anything is copied.
    if len(token) > TOKEN_BYTES:
        raise TokenInvalid(f"longer than {TOKEN_BYTES} bytes")
    try:
        parts = token.encode("ascii").split(b".", 3)
    except UnicodeEncodeError:
        raise TokenInvalid("not ASCII") from None
    if len(parts) != 3:
        raise TokenInvalid("expected three parts with a dot between them")
    header = _decode(_unbase64url(parts[0], "header"), _Header, "header")
    if header.crit != _ABSENT:
        # RFC 7515 4.1.11: whoever does not know an extension must refuse; we know none.
        raise TokenInvalid("header: crit names extensions, none is supported")
    if header.kid is not None and len(header.kid) > KID_CHARACTERS:
        raise TokenInvalid(f"header: kid is longer than {KID_CHARACTERS} characters")
    payload = _unbase64url(parts[1], "claims")
    return header, payload, parts[0] + b"." + parts[1], _unbase64url(parts[2], "signature")


def _decode(text: bytes, kind: type[_T], what: str) -> _T:
    try:
        # msgspec passes over the bytes of raw and of unknown values; in a text frame they must be UTF-8 all the same.
        str(text, "utf-8")
        return msgspec.json.decode(text, type=kind)
    except (ValueError, RecursionError) as error:
        # The message names a place and a type, never a value.
        raise TokenInvalid(f"{what}: {error}") from None


def _base64url(raw: bytes) -> bytes:
    return base64.urlsafe_b64encode(raw).rstrip(b"=")


def _unbase64url(text: bytes, what: str) -> bytes:
    """Decode base64url without padding (RFC 7515 2); only the one canonical spelling counts (RFC 4648 3.5)."""
    try:
        raw = base64.urlsafe_b64decode(text + b"==")
    except ValueError:
        raise TokenInvalid(f"{what}: broken base64url") from None
    # The decoder steps over what it does not know; encoding again finds each such place.
    if _base64url(raw) != text:
        raise TokenInvalid(f"{what}: broken base64url")
    return raw


def _payload(raw: msgspec.Raw, encoded: str | None = None) -> bytes | None:
    """Give a payload claim's bytes as they stand, less raw newlines (PROTOCOL 3.2); its base64 twin wins, untouched."""
    if encoded:
        try:
            return base64.b64decode(encoded, validate=True)
        except ValueError:
            raise TokenInvalid("broken base64 in b64info or b64data") from None
    # A string has no raw newline inside, so these stand between values.
    return bytes(raw).translate(None, b"\r\n") if raw != _ABSENT else None


def _subscribe_options(options: _Options) -> SubscribeOptions:
    return SubscribeOptions(
        info=_payload(options.info, options.b64info),
        data=_payload(options.data, options.b64data),
        override=_override(options.override),
    )


def _override(override: _Override | None) -> Override:
    if override is None:
        return Override()
    return Override(
        presence=_switch(override.presence),
        join_leave=_switch(override.join_leave),
        force_push_join_leave=_switch(override.force_push_join_leave),
        force_positioning=_switch(override.force_positioning),
        force_recovery=_switch(override.force_recovery),
    )


def _switch(flag: _Flag | None) -> bool | None:
    return None if flag is None else bool(flag.value)


def _check_times(claims: _Claims, now: float) -> None:
    """Refuse what is out of its time; ``exp`` is the first second that is too late (RFC 7519 4.1.4, 4.1.5)."""
    for moment in (claims.exp, claims.nbf, claims.expire_at):
        if moment is not None and abs(moment) > 2**63:
            raise TokenInvalid("exp, nbf or expire_at: expected Unix seconds, got a number beyond 64 bits")
    if claims.exp is not None and now >= claims.exp:
        raise TokenExpired("exp is past")
    if claims.nbf is not None and now < claims.nbf:
        raise TokenExpired("nbf is to come")


def _expire_at(claims: _Claims) -> int:
    """Unix seconds at which the connection or subscription ends, 0 for never (PROTOCOL 8.1)."""
    moment = claims.exp if claims.expire_at is None else claims.expire_at
    # Rounded up, for 0.5 rounded down would turn "long ago" into "never".
    return max(0, math.ceil(moment)) if moment is not None else 0
