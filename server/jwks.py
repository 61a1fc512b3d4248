"""Published key sets (JWKS, RFC 7517): fetched when a token asks for one, kept for the next.

A token names its key by ``kid``, and the key set's address may depend on the token's issuer.  So what is fetched, and
when, is in the hands of people nobody has verified yet, and each limit here stands against one way to abuse that or to
suffer from a broken endpoint:

* one fetch at a time per address, shared by all who wait, with an end; few addresses at once, few remembered;
* an unknown ``kid`` makes us fetch again, but not sooner than ``PAUSE_S`` after the last time, and a failure is
  remembered as long, so that neither made-up ids nor a broken endpoint make us hammer it or queue up behind it;
* keys are refreshed after ``REFRESH_S``, but those at hand go on serving for ``STALE_S`` while that fails: an identity
  provider's bad hour shuts nobody out who signs with a key that we know;
* keys are looked up by address *and* id: two issuers may use the same id, and one must not sign for the other.

Knows no HTTP: fetching comes as an argument, and whoever passes it decides on TLS, redirects and proxies.  PROTOCOL 8.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from jwt.exceptions import InvalidKeyError

from server.auth import ALGORITHMS, KID_CHARACTERS, Key, KeyWanted, TokenInvalid, key_of
from server.errors import Unavailable

BODY_BYTES = 128 * 1024
"""A longer key set is a failure; give the same limit to the HTTP client, so that it stops reading there."""

SET_KEYS = 100
"""Keys beyond this many in one set are skipped."""

REFRESH_S = 3600.0
"""A key set is fetched again at its first use after this time."""

STALE_S = 24 * 3600.0
"""So long after they were fetched keys serve if fetching them again fails."""

RETRY_S = 60.0
"""While a refresh fails, so long lies between two attempts."""

PAUSE_S = 5.0
"""So long after a fetch ended, an unknown key id or an earlier failure causes no other."""

MAX_URLS = 256
"""Key sets that are remembered; the one fetched longest ago goes first."""

MAX_FETCHES = 16
"""Fetches under way at one time, over all addresses."""

T = TypeVar("T")


class _KeySet:
    """What we know of one address; times are the clock's."""

    __slots__ = ("asked_at", "failure", "fetched_at", "keys", "serves_until")

    def __init__(self) -> None:
        self.keys: dict[str, Key] = {}
        self.fetched_at = 0.0
        self.serves_until = 0.0
        self.asked_at = 0.0
        self.failure = ""

    def succeed(self, keys: dict[str, Key], now: float) -> None:
        self.keys = keys
        self.failure = ""
        self.fetched_at = self.asked_at = now
        self.serves_until = now + REFRESH_S

    def fail(self, why: str, now: float) -> None:
        self.failure = why
        self.asked_at = now
        if self.keys:
            # Never shortens: the fetch may have been for an unknown id while the set is still fresh.
            self.serves_until = max(self.serves_until, min(self.fetched_at + STALE_S, now + RETRY_S))


class Keys:
    """The published keys at hand, for ``auth.Verifier(find_key=keys.find)``.

    ``fetch(url)`` gives the body of a 200 answer or raises; ``clock()`` gives seconds that only grow; ``timeout_s``
    ends each fetch.  It does so by cancelling ``fetch``, which not every HTTP client takes for the end of its request,
    so the client should have a limit of its own that comes first.  Whoever makes a ``Keys`` calls ``close`` at the end.
    """

    def __init__(
        self,
        fetch: Callable[[str], Awaitable[bytes]],
        clock: Callable[[], float],
        timeout_s: float = 2.0,
    ) -> None:
        self._fetch = fetch
        self._clock = clock
        self._timeout_s = timeout_s
        self._sets: dict[str, _KeySet] = {}
        self._fetches: dict[str, asyncio.Task[None]] = {}
        self._closed = False

    def __repr__(self) -> str:
        return f"Keys(sets={len(self._sets)}, fetching={len(self._fetches)})"

    def find(self, url: str, kid: str) -> Key | None:
        """Give a key that is at hand and may still serve, or ``None``; never waits."""
        known = self._sets.get(url)
        if known is None or self._clock() >= known.serves_until:
            return None
        return known.keys.get(kid)

    async def want(self, url: str, kid: str) -> None:
        """See to it that ``find(url, kid)`` gives the key if there is one.

        Returns also when the set does not hold it.  Raises ``Unavailable`` if that could not be found out.
        """
        if self.find(url, kid) is not None:
            return
        task = self._fetches.get(url)
        if task is None:
            known = self._sets.get(url)
            if known is not None and self._clock() < known.asked_at + PAUSE_S:
                if known.failure:
                    raise Unavailable(known.failure)
                return
            if self._closed:
                raise Unavailable(f"going down, {url} is not fetched any more")
            if len(self._fetches) >= MAX_FETCHES:
                raise Unavailable(f"{MAX_FETCHES} key sets are being fetched already")
            task = self._fetches[url] = asyncio.create_task(self._refresh(url))
        # Neither cancels the fetch with one of those who wait, nor them with the fetch.
        await asyncio.wait((task,))
        if self.find(url, kid) is not None:
            return
        if task.cancelled():
            raise Unavailable(f"fetching {url} was given up")
        known = self._sets.get(url)
        if known is not None and known.failure:
            raise Unavailable(known.failure)

    async def verified(self, verify: Callable[[], T]) -> T:
        """Give what ``verify`` gives, with the key it wants fetched in between if there is need.

        ``verify`` is a call of one of ``Verifier``'s methods.  Raises as that does, except that ``KeyWanted`` becomes
        ``Unavailable`` or, when there is no such key, ``TokenInvalid``.
        """
        try:
            return verify()
        except KeyWanted as wanted:
            await self.want(wanted.url, wanted.kid)
        try:
            return verify()
        except KeyWanted as wanted:
            raise TokenInvalid(f"no key with the token's kid at {wanted.url}") from None

    async def close(self) -> None:
        """Give up what is being fetched, and fetch no more; those who wait for it get ``Unavailable``."""
        self._closed = True
        tasks = list(self._fetches.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._fetches.clear()

    async def _refresh(self, url: str) -> None:
        """Fetch one key set and write down what came of it; raises nothing."""
        keys: dict[str, Key] = {}
        failure = ""
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await self._fetch(url)
            keys = read_keys(body)
        except TimeoutError:
            failure = f"{url} gave no key set within {self._timeout_s:g} s"
        except Exception as error:
            # Whatever an HTTP client raises: those who wait are told, and it costs them one command.
            failure = f"{url} gave no key set: {type(error).__name__}: {error}"
        finally:
            del self._fetches[url]
        # Taken out and put back, the newest is always the last.
        known = self._sets.pop(url, None) or _KeySet()
        if failure:
            known.fail(failure, self._clock())
        else:
            known.succeed(keys, self._clock())
        self._sets[url] = known
        while len(self._sets) > MAX_URLS:
            del self._sets[next(iter(self._sets))]


class _Jwk(msgspec.Struct):
    """The public members of a JWK that we read (RFC 7517 4, RFC 7518 6, RFC 8037 2)."""

    kty: str
    kid: str | None = None
    use: str | None = None
    key_ops: list[str] | None = None
    alg: str | None = None
    crv: str | None = None
    n: str | None = None
    e: str | None = None
    x: str | None = None
    y: str | None = None


class _JwkSet(msgspec.Struct):
    keys: list[msgspec.Raw]


def read_keys(body: bytes) -> dict[str, Key]:
    """Read a key set (RFC 7517 5) and give its keys by their ids.

    Skips keys that are of unknown kinds, malformed, weak, without an id, or not for signatures; of two with one id the
    first counts.  Raises ``ValueError`` if the body is no key set or none of its keys is usable, for an endpoint
    that lost its keys for a moment must not make good tokens invalid.
    """
    if len(body) > BODY_BYTES:
        raise ValueError(f"expected at most {BODY_BYTES} bytes, got {len(body)}")
    try:
        jwks = msgspec.json.decode(body, type=_JwkSet).keys
    except RecursionError:
        raise ValueError("nested too deeply") from None
    keys: dict[str, Key] = {}
    for raw in jwks[:SET_KEYS]:
        try:
            jwk = msgspec.json.decode(raw, type=_Jwk)
        except (ValueError, RecursionError):
            continue
        key = _key(jwk)
        if key is not None and jwk.kid:
            keys.setdefault(jwk.kid, key)
    if not keys:
        raise ValueError("expected a key that verifies tokens, got none")
    return keys


def _key(jwk: _Jwk) -> Key | None:
    """Make a key of a JWK, or ``None`` if it is none of ours."""
    if not jwk.kid or len(jwk.kid) > KID_CHARACTERS or jwk.use not in (None, "sig"):
        return None
    if jwk.key_ops is not None and "verify" not in jwk.key_ops:
        return None
    try:
        # Only public members are passed on: a set that leaks its private keys makes public keys all the same.  Curves
        # that are none of ours fall to the reader or to key_of.
        match jwk.kty:
            case "RSA":
                material = ALGORITHMS["RS256"].from_jwk({"kty": jwk.kty, "n": jwk.n, "e": jwk.e})
            case "EC":
                material = ALGORITHMS["ES256"].from_jwk({"kty": jwk.kty, "crv": jwk.crv, "x": jwk.x, "y": jwk.y})
            case "OKP":
                material = ALGORITHMS["EdDSA"].from_jwk({"kty": jwk.kty, "crv": jwk.crv, "x": jwk.x})
            case _:
                return None
        key = key_of(material)
    except (ValueError, TypeError, InvalidKeyError, UnsupportedAlgorithm):
        return None
    if jwk.alg is None:
        return key
    return Key(key.algorithms & {jwk.alg}, key.material) if jwk.alg in key.algorithms else None
