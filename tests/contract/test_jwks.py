"""Published keys: fetched from a real server that serves, hangs and breaks (PROTOCOL 8)."""

from __future__ import annotations

import asyncio
import base64
import functools
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from jwt.api_jws import PyJWS
from tornado.httpclient import AsyncHTTPClient
from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port
from tornado.web import Application, RequestHandler

from server.auth import ECDSA, ED25519, KID_CHARACTERS, RSA, TokenInvalid, Verifier
from server.errors import Unavailable
from server.jwks import (
    BODY_BYTES,
    MAX_FETCHES,
    MAX_URLS,
    PAUSE_S,
    REFRESH_S,
    RETRY_S,
    SET_KEYS,
    STALE_S,
    Keys,
    read_keys,
)
from server.settings import TokenSettings

NOW = 1_800_000_000.0


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """The time in seconds."""
        return self.now


class Endpoint:
    """A server of key sets: what each path answers, who asked, and how it misbehaves."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.bodies: dict[str, bytes] = {}
        self.status = 200
        self.breaks = False
        self.hangs = False
        self.asked: list[str] = []
        self.arrived = asyncio.Event()
        self.release = asyncio.Event()

    def url(self, path: str = "/jwks") -> str:
        """The address of one key set."""
        return f"http://127.0.0.1:{self.port}{path}"

    def publish(self, *jwks: dict[str, Any], path: str = "/jwks") -> None:
        """Serve these keys from now on."""
        self.bodies[path] = json.dumps({"keys": jwks}).encode()


class Answer(RequestHandler):
    """Answers as its endpoint says."""

    endpoint: Endpoint

    def initialize(self, endpoint: Endpoint) -> None:
        """Called by Tornado with what stands in the URL table."""
        self.endpoint = endpoint

    async def get(self) -> None:
        """Answer, or hang, or break."""
        self.endpoint.asked.append(self.request.path)
        self.endpoint.arrived.set()
        if self.endpoint.hangs and self.request.path == "/jwks":
            await self.endpoint.release.wait()
        if self.endpoint.breaks:
            self.detach().close()
            return
        self.set_status(self.endpoint.status)
        self.finish(self.endpoint.bodies.get(self.request.path, b""))


@asynccontextmanager
async def endpoint() -> AsyncIterator[Endpoint]:
    """A real server on a free port."""
    socket, port = bind_unused_port()
    served = Endpoint(port)
    server = HTTPServer(Application([(".*", Answer, {"endpoint": served})], log_function=lambda handler: None))
    server.add_socket(socket)
    try:
        yield served
    finally:
        served.release.set()
        server.stop()
        await server.close_all_connections()


@asynccontextmanager
async def fetching(
    clock: Callable[[], float], timeout_s: float = 30.0, request_timeout_s: float = 30.0
) -> AsyncIterator[Keys]:
    """Keys that are fetched with a real client, of the kind that the wiring passes."""
    client = AsyncHTTPClient(force_instance=True, max_body_size=BODY_BYTES)

    async def fetch(url: str) -> bytes:
        return (await client.fetch(url, request_timeout=request_timeout_s)).body

    keys = Keys(fetch, clock, timeout_s)
    try:
        yield keys
    finally:
        await keys.close()
        client.close()


@functools.cache
def private_key(name: str) -> Any:
    """A key by its id; the first letter says of what kind."""
    if name.startswith("r"):
        return rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return ec.generate_private_key(ec.SECP256R1()) if name.startswith("e") else ed25519.Ed25519PrivateKey.generate()


def jwk(name: str, **members: Any) -> dict[str, Any]:
    """The public half of ``private_key(name)`` as a key set publishes it; a member given as ``None`` is left out."""
    algorithm: Any = {"r": RSAAlgorithm, "e": ECAlgorithm, "o": OKPAlgorithm}[name[0]]
    public = algorithm.to_jwk(private_key(name).public_key(), as_dict=True)
    return {key: value for key, value in ({"kid": name} | public | members).items() if value is not None}


def token(name: str, **claims: Any) -> str:
    """A token signed with ``private_key(name)``, whose id it names."""
    algorithm = {"r": "RS256", "e": "ES256", "o": "EdDSA"}[name[0]]
    return PyJWS().encode(json.dumps(claims).encode(), private_key(name), algorithm, headers={"kid": name})


def body(*jwks: object) -> bytes:
    """A key set's text."""
    return json.dumps({"keys": jwks}).encode()


# --- fetching ------------------------------------------------------------------


async def test_a_token_is_verified_with_a_fetched_key() -> None:
    """A key of each kind is fetched when a token wants it; all keys of the set are at hand from then on."""
    async with endpoint() as served, fetching(Clock()) as keys:
        served.publish(jwk("r1"), jwk("e1"), jwk("o1"))
        verifier = Verifier(TokenSettings(jwks_public_endpoint=served.url()), find_key=keys.find)
        for name in ("r1", "e1", "o1"):
            text = token(name, sub=name)
            claims = await keys.verified(lambda text=text: verifier.connection(text, NOW))  # type: ignore[misc]
            assert claims.user == name
        assert served.asked == ["/jwks"]


async def test_a_key_that_is_not_in_the_set_makes_the_token_invalid() -> None:
    """After a good answer without the key the token is invalid, which an outage must never look like."""
    async with endpoint() as served, fetching(Clock()) as keys:
        served.publish(jwk("e1"))
        verifier = Verifier(TokenSettings(jwks_public_endpoint=served.url()), find_key=keys.find)
        text = token("e2", sub="42")
        for _ in range(2):
            with pytest.raises(TokenInvalid, match="no key with the token's kid"):
                await keys.verified(lambda: verifier.connection(text, NOW))
        assert served.asked == ["/jwks"]


async def test_all_who_wait_share_one_fetch() -> None:
    """Fifty clients that want keys of one set at the same time cost its endpoint one request."""
    async with endpoint() as served, fetching(Clock()) as keys:
        served.publish(jwk("e1"), jwk("e2"))
        served.hangs = True
        waiting = [asyncio.create_task(keys.want(served.url(), f"e{number % 3}")) for number in range(50)]
        await served.arrived.wait()
        assert keys.find(served.url(), "e1") is None
        served.release.set()
        await asyncio.gather(*waiting)
        assert served.asked == ["/jwks"]
        assert keys.find(served.url(), "e1") is not None
        assert keys.find(served.url(), "e2") is not None
        assert keys.find(served.url(), "e0") is None


async def test_a_client_that_leaves_does_not_take_the_fetch_along() -> None:
    """Cancelling the one who caused a fetch leaves it to the others who wait."""
    async with endpoint() as served, fetching(Clock()) as keys:
        served.publish(jwk("e1"))
        served.hangs = True
        first = asyncio.create_task(keys.want(served.url(), "e1"))
        await served.arrived.wait()
        second = asyncio.create_task(keys.want(served.url(), "e1"))
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        served.release.set()
        await second
        assert keys.find(served.url(), "e1") is not None
        assert served.asked == ["/jwks"]


async def test_a_hanging_endpoint_costs_those_who_need_it_an_error() -> None:
    """The wait ends with ``Unavailable``, later ones fail at once for a while, and other addresses answer meanwhile."""
    clock = Clock()
    async with endpoint() as served, fetching(clock, timeout_s=60) as patient, fetching(clock, timeout_s=0.2) as keys:
        served.publish(jwk("e1"))
        served.publish(jwk("e2"), path="/other")
        served.hangs = True
        stuck = asyncio.create_task(patient.want(served.url(), "e1"))
        await served.arrived.wait()
        await patient.want(served.url("/other"), "e2")
        assert patient.find(served.url("/other"), "e2") is not None
        assert not stuck.done()
        stuck.cancel()
        served.asked.clear()
        with pytest.raises(Unavailable, match=r"gave no key set within 0\.2 s"):
            await keys.want(served.url(), "e1")
        for _ in range(3):
            with pytest.raises(Unavailable, match=r"within 0\.2 s"):
                await keys.want(served.url(), "e1")
        assert served.asked in ([], ["/jwks"]), "where everything stands still, time may be up before it is asked"

        served.release.set()
        clock.now += PAUSE_S
        keys._timeout_s = 60  # only who hangs is given up at once
        await keys.want(served.url(), "e1")
        assert keys.find(served.url(), "e1") is not None


async def test_the_clients_own_time_limit_is_an_outage_as_well() -> None:
    """A client that gives up before ``Keys`` does leaves the same picture."""
    async with endpoint() as served, fetching(Clock(), request_timeout_s=0.2) as keys:
        served.publish(jwk("e1"))
        served.hangs = True
        with pytest.raises(Unavailable, match=r"gave no key set: .*[Tt]imeout"):
            await keys.want(served.url(), "e1")
        assert keys.find(served.url(), "e1") is None


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"<html>sorry</html>",
        b"[]",
        b"{}",
        b'{"keys":{}}',
        b'{"keys":[]}',
        b'{"keys":[{"kty":"oct","kid":"e1","k":"AAAA"}]}',
        b'{"keys":["e1",1,null]}',
        b'{"keys":[' + b"[" * 10_000,
        b'{"keys":[],"x":' + b"[" * 10_000 + b"]" * 10_000 + b"}",
        b'{"keys":[]' + b" " * BODY_BYTES + b"}",
        b'{"keys":"\xff"}',
    ],
)
async def test_an_answer_that_is_no_key_set_is_an_outage(answer: bytes) -> None:
    """Garbage, an empty set and a huge body are faults of the endpoint, not of the token; it recovers by itself."""
    clock = Clock()
    async with endpoint() as served, fetching(clock) as keys:
        served.bodies["/jwks"] = answer
        with pytest.raises(Unavailable, match="gave no key set") as caught:
            await keys.want(served.url(), "e1")
        assert served.url() in str(caught.value)
        served.publish(jwk("e1"))
        clock.now += PAUSE_S
        await keys.want(served.url(), "e1")
        assert keys.find(served.url(), "e1") is not None
        await keys.want(served.url(), "unknown")
        assert len(served.asked) == 2


async def test_an_endpoint_that_breaks_is_an_outage() -> None:
    """Error statuses, a connection cut in the middle, a port where nobody listens, and no URL at all are told apart."""
    clock = Clock()
    async with endpoint() as served, fetching(clock) as keys:
        served.publish(jwk("e1"))
        for status in (404, 500, 503):
            served.status = status
            clock.now += PAUSE_S
            with pytest.raises(Unavailable, match=f"gave no key set: .*{status}"):
                await keys.want(served.url(), "e1")
        served.status = 200
        served.breaks = True
        clock.now += PAUSE_S
        with pytest.raises(Unavailable, match=r"gave no key set: .*[Cc]losed"):
            await keys.want(served.url(), "e1")
    async with fetching(clock) as keys:
        with pytest.raises(Unavailable, match=r"gave no key set: .*[Rr]efused"):
            await keys.want(served.url(), "e1")
        with pytest.raises(Unavailable, match="gave no key set"):
            await keys.want("no url", "e1")


# --- what is kept, and how long ------------------------------------------------


async def test_made_up_ids_do_not_hammer_the_endpoint() -> None:
    """An unknown key id causes a fetch, but none within the pause after the last one."""
    clock = Clock()
    async with endpoint() as served, fetching(clock) as keys:
        served.publish(jwk("e1"))
        for number in range(100):
            await keys.want(served.url(), f"made up {number}")
        assert len(served.asked) == 1
        clock.now += PAUSE_S
        for number in range(100):
            await keys.want(served.url(), f"made up {number}")
        assert len(served.asked) == 2
        await keys.want(served.url(), "e1")
        assert len(served.asked) == 2


async def test_a_rotated_key_is_found_and_the_old_one_forgotten() -> None:
    """A new id leads to a new fetch, whose set replaces the old one whole."""
    clock = Clock()
    async with endpoint() as served, fetching(clock) as keys:
        served.publish(jwk("e1"))
        await keys.want(served.url(), "e1")
        served.publish(jwk("e2"))
        clock.now += PAUSE_S
        assert keys.find(served.url(), "e2") is None
        await keys.want(served.url(), "e2")
        assert keys.find(served.url(), "e2") is not None
        assert keys.find(served.url(), "e1") is None


async def test_keys_are_refreshed_after_an_hour() -> None:
    """A key that was taken out of the set serves no longer than ``REFRESH_S``."""
    clock = Clock()
    async with endpoint() as served, fetching(clock) as keys:
        served.publish(jwk("e1"), jwk("e2"))
        await keys.want(served.url(), "e1")
        served.publish(jwk("e2"))
        clock.now += REFRESH_S - 1
        assert keys.find(served.url(), "e1") is not None
        clock.now += 1
        assert keys.find(served.url(), "e1") is None
        await keys.want(served.url(), "e1")
        assert keys.find(served.url(), "e1") is None
        assert keys.find(served.url(), "e2") is not None
        assert len(served.asked) == 2


async def test_known_keys_outlive_a_bad_day_of_their_endpoint() -> None:
    """While refreshing fails known keys serve for ``STALE_S``, with one attempt in ``RETRY_S``; then they are gone."""
    clock = Clock()
    async with endpoint() as served, fetching(clock) as keys:
        served.publish(jwk("e1"))
        await keys.want(served.url(), "e1")
        served.status = 500
        clock.now += REFRESH_S
        assert keys.find(served.url(), "e1") is None
        await keys.want(served.url(), "e1")
        assert keys.find(served.url(), "e1") is not None
        assert len(served.asked) == 2

        clock.now += RETRY_S - 1
        assert keys.find(served.url(), "e1") is not None
        with pytest.raises(Unavailable, match="500"):
            await keys.want(served.url(), "unknown")
        assert len(served.asked) == 3
        clock.now += RETRY_S
        assert keys.find(served.url(), "e1") is None

        clock.now = 1000.0 + STALE_S - 1
        await keys.want(served.url(), "e1")
        assert keys.find(served.url(), "e1") is not None
        clock.now += 1
        assert keys.find(served.url(), "e1") is None
        clock.now += PAUSE_S
        with pytest.raises(Unavailable, match="500"):
            await keys.want(served.url(), "e1")

        served.status = 200
        clock.now += PAUSE_S
        await keys.want(served.url(), "e1")
        assert keys.find(served.url(), "e1") is not None


async def test_a_failed_fetch_for_an_unknown_id_leaves_fresh_keys_in_force() -> None:
    """An outage within the hour shortens nothing."""
    clock = Clock()
    async with endpoint() as served, fetching(clock) as keys:
        served.publish(jwk("e1"))
        await keys.want(served.url(), "e1")
        served.status = 500
        clock.now += PAUSE_S
        with pytest.raises(Unavailable):
            await keys.want(served.url(), "unknown")
        clock.now = 1000.0 + REFRESH_S - 1
        assert keys.find(served.url(), "e1") is not None


async def test_one_issuer_never_signs_for_another() -> None:
    """Two sets with a key of the same id stay apart: red's key is no good for a token that claims to be blue's."""
    async with endpoint() as served, fetching(Clock()) as keys:
        served.publish(jwk("e-red", kid="shared"), path="/red")
        served.publish(jwk("e-blue", kid="shared"), path="/blue")
        settings = TokenSettings(jwks_public_endpoint=served.url("/{{who}}"), issuer_regex="^(?P<who>red|blue)$")
        verifier = Verifier(settings, find_key=keys.find)

        def by_red(issuer: str) -> str:
            payload = json.dumps({"sub": "42", "iss": issuer}).encode()
            return PyJWS().encode(payload, private_key("e-red"), "ES256", headers={"kid": "shared"})

        assert (await keys.verified(lambda: verifier.connection(by_red("red"), NOW))).user == "42"
        with pytest.raises(TokenInvalid, match="wrong signature"):
            await keys.verified(lambda: verifier.connection(by_red("blue"), NOW))
        assert served.asked == ["/red", "/blue"]


# --- bounds --------------------------------------------------------------------


async def test_only_so_many_sets_are_remembered() -> None:
    """Beyond ``MAX_URLS`` the set that was fetched longest ago goes, be it a success or a failure."""
    text = body(jwk("e1"))

    async def fetch(url: str) -> bytes:
        if url.startswith("bad"):
            raise OSError(url)
        return text

    clock = Clock()
    keys = Keys(fetch, clock)
    for number in range(MAX_URLS):
        await keys.want(str(number), "e1")
    clock.now += PAUSE_S
    await keys.want("0", "unknown")
    with pytest.raises(Unavailable):
        await keys.want("bad", "e1")
    assert repr(keys) == f"Keys(sets={MAX_URLS}, fetching=0)"
    assert [url for url in map(str, range(MAX_URLS)) if keys.find(url, "e1") is None] == ["1"]
    for number in range(2 * MAX_URLS):
        with pytest.raises(Unavailable):
            await keys.want(f"bad {number}", "e1")
    assert repr(keys) == f"Keys(sets={MAX_URLS}, fetching=0)"


async def test_only_so_many_fetches_run_at_once() -> None:
    """Beyond ``MAX_FETCHES`` a further address is unavailable at once, one under way can still be waited for."""
    text = body(jwk("e1"))
    release = asyncio.Event()

    async def fetch(url: str) -> bytes:
        await release.wait()
        return text

    keys = Keys(fetch, Clock())
    waiting = [asyncio.create_task(keys.want(f"{number % MAX_FETCHES}", "e1")) for number in range(2 * MAX_FETCHES)]
    # Reaches its own await only after all of them, in the order of their making.
    refused = asyncio.create_task(keys.want("one more", "e1"))
    with pytest.raises(Unavailable, match=f"{MAX_FETCHES} key sets"):
        await refused
    release.set()
    await asyncio.gather(*waiting)
    assert repr(keys) == f"Keys(sets={MAX_FETCHES}, fetching=0)"


async def test_closing_ends_every_wait() -> None:
    """Those who wait when the server goes down get ``Unavailable``, also for a known set; their clients come back."""
    text = body(jwk("e1"))
    hangs = asyncio.Event()
    hung: asyncio.Queue[str] = asyncio.Queue()

    async def fetch(url: str) -> bytes:
        if hangs.is_set():
            await hung.put(url)
            await asyncio.Event().wait()
        return text

    clock = Clock()
    keys = Keys(fetch, clock)
    await keys.want("known", "e1")
    clock.now += PAUSE_S
    hangs.set()
    waiting = {url: asyncio.create_task(keys.want(url, "e2")) for url in ("new", "known")}
    assert {await hung.get(), await hung.get()} == {"new", "known"}
    # Made, but not begun when the end comes.
    waiting["late"] = asyncio.create_task(keys.want("late", "e2"))
    await asyncio.wait((asyncio.create_task(keys.close()),))
    for url, task in waiting.items():
        with pytest.raises(Unavailable, match=f"fetching {url} was given up"):
            await task
    with pytest.raises(Unavailable, match="going down"):
        await keys.want("new", "e1")
    assert repr(keys) == "Keys(sets=1, fetching=0)"
    assert keys.find("known", "e1") is not None


# --- reading a set -------------------------------------------------------------


def test_keys_of_every_known_kind_are_read() -> None:
    """RSA, EC and Ed25519 keys are read, each with the algorithms it serves, narrowed by its own ``alg``."""
    found = read_keys(
        body(
            jwk("r1"),
            jwk("r2", alg="RS512", use="sig", key_ops=["verify"]),
            jwk("e1", use="sig", x5c=["..."], x5t=7),
            jwk("o1", alg="EdDSA"),
        )
    )
    assert {name: key.algorithms for name, key in found.items()} == {
        "r1": RSA,
        "r2": frozenset(("RS512",)),
        "e1": frozenset(("ES256",)),
        "o1": ED25519,
    }
    assert found["e1"].algorithms < ECDSA


def test_what_is_no_key_for_tokens_is_skipped() -> None:
    """Keys of unknown kinds, for other uses, malformed, weak, secret or nameless are skipped; the rest counts."""
    weak = RSAAlgorithm.to_jwk(
        rsa.generate_private_key(public_exponent=65537, key_size=1024).public_key(), as_dict=True
    )
    skipped: list[object] = [
        None,
        "e1",
        [],
        {},
        {"kty": 1, "kid": "a"},
        {"kty": "oct", "kid": "secret", "k": base64.urlsafe_b64encode(b"x" * 32).decode()},
        {"kty": "OKP", "kid": "ed448", "crv": "Ed448", "x": "AAAA"},
        {"kty": "OKP", "kid": "x25519", "crv": "X25519", "x": jwk("o1")["x"]},
        {"kty": "AKP", "kid": "pq", "alg": "ML-DSA-44", "pub": "AAAA"},
        weak | {"kid": "weak"},
        jwk("e1", kid=None),
        jwk("e1", kid=""),
        jwk("e1", kid=7),
        jwk("e1", kid="k" * (KID_CHARACTERS + 1)),
        jwk("e1", use="enc"),
        jwk("e1", key_ops=["sign"]),
        jwk("e1", alg="ES384"),
        jwk("r1", alg="RSA-OAEP"),
        jwk("r1", alg="none"),
        jwk("r1", alg="HS256"),
        jwk("r1", n=None),
        jwk("r1", n="é"),
        jwk("r1", n=""),
        jwk("r1", e="AA"),
        jwk("r1", e=65537),
        jwk("e1", x=None),
        jwk("e1", x="AAAA"),
        jwk("e1", y=jwk("e1")["x"]),
        jwk("e1", crv="secp256k1"),
        jwk("e1", crv="P-384"),
        jwk("e1", crv=None),
        jwk("o1", x="AAAA"),
        jwk("o1", x="!"),
        jwk("o1", x=None),
        jwk("o1", crv=None),
    ]
    assert list(read_keys(body(*skipped, jwk("e2")))) == ["e2"]
    with pytest.raises(ValueError, match="expected a key that verifies tokens"):
        read_keys(body(*skipped))


def test_a_leaked_private_half_is_not_taken_in() -> None:
    """A set that publishes whole keys gives public ones, which verify and cannot sign."""
    for name, algorithm in (("r1", RSAAlgorithm), ("e1", ECAlgorithm), ("o1", OKPAlgorithm)):
        whole: Any = algorithm.to_jwk(private_key(name), as_dict=True)
        assert "d" in whole
        found = read_keys(body(whole | {"kid": name, "key_ops": ["sign", "verify"]}))
        assert not hasattr(found[name].material, "sign")


def test_a_set_is_read_up_to_its_bounds() -> None:
    """Of two keys with one id the first counts, keys beyond ``SET_KEYS`` and bodies beyond ``BODY_BYTES`` do not."""
    first, second = jwk("e1", kid="same"), jwk("o1", kid="same")
    assert read_keys(body(first, second))["same"].algorithms == frozenset(("ES256",))
    many = [jwk("e1", kid=str(number)) for number in range(SET_KEYS + 5)]
    assert list(read_keys(body(*many))) == [str(number) for number in range(SET_KEYS)]
    with pytest.raises(ValueError, match="nested too deeply"):
        read_keys(b'{"keys":[],"x":' + b"[" * 10_000 + b"]" * 10_000 + b"}")
    text = body(first)
    assert read_keys(text.ljust(BODY_BYTES)) == read_keys(text)
    with pytest.raises(ValueError, match="expected at most"):
        read_keys(text.ljust(BODY_BYTES + 1))
