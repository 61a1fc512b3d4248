"""PROTOCOL 8.6: names that can be shown, buckets that refill, tokens of guests, and the key that signs them."""

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import SECRET, settings, token

from server.auth import Verifier, sign
from server.configuration import SettingsError, load
from server.errors import Unavailable
from server.guests import Guests, clean_name, kept_key, with_key
from server.limits import Buckets

NOW = 1_800_000_000.0
DAY_S = 86_400.0


def counted() -> Iterator[str]:
    """Ids that a test can foresee."""
    return (str(number) for number in range(1, 1_000))


def guests(**sections: Any) -> Guests:
    """The guests of a server configured like that."""
    ids = counted()
    return Guests(settings(guests={"enabled": True}, **sections), lambda: next(ids))


# --- names --------------------------------------------------------------------
@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("Ada", "Ada"),
        ("  Ada \t\n Lovelace  ", "Ada Lovelace"),
        ("Ada\u2028Lovelace\u00a0\u3000II", "Ada Lovelace II"),
        ("Ａｄａ", "Ada"),
        ("Zoe\u0308", "Zoë"),
        ("evil\u202eadA\u2066\u2069", "eviladA"),
        ("A\u200bd\u200d\u00ada\ufeff", "Ada"),
        ("nul\x00 bell\x07 del\x7f", "nul bell del"),
        ("\u0301\u0301Ada", "Ada"),
        ("\u00a8 Ada", "Ada"),
        ("\u3164Ada\u2800", "Ada"),
        ("👩\u200d💻", "👩\u200d💻"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("日本語", "日本語"),
        ("<b>Ada</b>", "<b>Ada</b>"),
        ("x" * 32, "x" * 32),
    ],
)
def test_names_are_cleaned(written: str, shown: str) -> None:
    """What controls text, its direction, or hides in it is gone; what people write their names with stays."""
    assert clean_name(written) == shown


@pytest.mark.parametrize("written", ["", "   ", "\u200b\u200d", "\u202e", "\u0301", "\u3164", "\ud800", "\n\x00"])
def test_names_of_nothing_are_refused(written: str) -> None:
    """A name that nobody could see is no name."""
    with pytest.raises(ValueError, match="can be seen"):
        clean_name(written)


@pytest.mark.parametrize("written", ["x" * 33, "\ufdfa\ufdfa", "日" * 33])
def test_names_too_long_are_refused(written: str) -> None:
    """32 characters are counted after cleaning: one ligature may stand for eighteen."""
    with pytest.raises(ValueError, match="at most 32"):
        clean_name(written)


@given(st.text(max_size=40))
def test_clean_names_are_clean(written: str) -> None:
    """Cleaning twice is cleaning once; no clean name controls, hides, or begins with what belongs to others."""
    try:
        name = clean_name(written)
    except ValueError:
        return
    assert clean_name(name) == name
    assert 1 <= len(name) <= 32
    assert name == " ".join(name.split())
    assert all(character.isprintable() or character in "\u200c\u200d" for character in name)


# --- how often ------------------------------------------------------------------
def test_bucket_refills() -> None:
    """As many at once as the limit says, then one for each part of the minute; the wait that is told is enough."""
    buckets = Buckets(6)
    assert [buckets.take("10.0.0.1", 0.0) for _ in range(6)] == [0.0] * 6
    assert buckets.take("10.0.0.1", 0.0) == pytest.approx(10.0)
    assert buckets.take("10.0.0.1", 4.0) == pytest.approx(6.0)
    assert buckets.take("10.0.0.2", 4.0) == 0.0
    assert buckets.take("10.0.0.1", 10.0) == 0.0
    assert buckets.take("10.0.0.1", 10.0) == pytest.approx(10.0)
    assert [buckets.take("10.0.0.1", 10_000.0) for _ in range(6)] == [0.0] * 6
    assert buckets.take("10.0.0.1", 10_000.0) > 0


def test_an_ipv6_host_is_its_network() -> None:
    """Whoever has a whole /64 is one; a neighbour and a text that is no address are others."""
    buckets = Buckets(1)
    assert buckets.take("2001:db8::1", 0.0) == 0.0
    assert buckets.take("2001:db8::ffff:2", 0.0) > 0
    assert buckets.take("2001:db8:0:1::1", 0.0) == 0.0
    assert buckets.take("", 0.0) == 0.0
    assert buckets.take("", 0.0) > 0


def test_no_limit() -> None:
    """0 counts nobody."""
    buckets = Buckets(0)
    assert [buckets.take("10.0.0.1", 0.0) for _ in range(1_000)] == [0.0] * 1_000
    assert len(buckets) == 0


def test_buckets_are_bounded() -> None:
    """A flood of addresses costs bounded memory, and the one that asks all the time is not forgotten for it."""
    buckets = Buckets(1, addresses=10)
    assert buckets.take("10.0.0.1", 0.0) == 0.0
    for number in range(1_000):
        buckets.take(f"10.1.{number // 250}.{number % 250}", 0.0)
        assert buckets.take("10.0.0.1", 0.0) > 0
    assert len(buckets) == 10


# --- tokens -----------------------------------------------------------------------
def test_token_of_a_guest() -> None:
    """The server's own verifier accepts it: a user id that is not the name, the name in info, an end."""
    guest = guests().welcome(" Ada\u202e ", "", NOW)
    claims = Verifier(settings().client.token).connection(guest.token, NOW + DAY_S - 1)
    assert (guest.user, guest.name, guest.expires_at) == ("guest-1", "Ada", int(NOW + DAY_S))
    assert (claims.user, claims.info, claims.expire_at) == ("guest-1", b'{"name":"Ada"}', int(NOW + DAY_S))


def test_claims_that_the_settings_ask_for() -> None:
    """Audience, issuer and the claim of the user id are those that client.token demands."""
    rules = {"audience": "game", "issuer": "us", "user_id_claim": "uid"}
    guest = guests(client={"token": rules}).welcome("Ada", "", NOW)
    verifier = Verifier(settings(client={"token": rules}).client.token)
    assert verifier.connection(guest.token, NOW).user == "guest-1"


def test_former_guest_stays_the_same_user() -> None:
    """A guest's own token keeps the user id under another name, also for as long after its end as it was good."""
    party = guests()
    ada = party.welcome("Ada", "", NOW)
    assert party.welcome("Augusta", ada.token, NOW + 5).user == ada.user
    late = party.welcome("Ada", ada.token, NOW + 2 * DAY_S - 1)
    assert (late.user, late.expires_at) == (ada.user, int(NOW + 3 * DAY_S - 1))
    assert party.welcome("Ada", ada.token, NOW + 2 * DAY_S).user != ada.user


@pytest.mark.parametrize(
    "former",
    [
        "nonsense",
        "a.b.c",
        token({"sub": "42", "exp": NOW + 60}),
        token({"sub": "guest-7", "exp": NOW + 60}),
        token({"sub": "42", "exp": NOW + 60, "meta": {"guest": False}}),
        token({"sub": "42", "exp": NOW + 60, "meta": {"guest": True}, "channel": "chat:a"}),
        sign("another key that is long enough", {"sub": "guest-7", "exp": NOW + 60, "meta": {"guest": True}}),
    ],
)
def test_tokens_of_others_are_worth_nothing(former: str) -> None:
    """A token of the application is not prolonged, nor one of another key: the guest is a new user."""
    assert guests().welcome("Ada", former, NOW).user == "guest-1"


def test_guests_need_a_key() -> None:
    """Without a key there is nothing to sign by: said when it is wired, not when the first guest comes."""
    with pytest.raises(ValueError, match="hmac_secret_key"):
        Guests(settings(client={"token": {"hmac_secret_key": ""}}), str)


# --- settings -----------------------------------------------------------------------
def test_guests_are_for_trying_out() -> None:
    """On where nothing is configured, off as soon as something is."""
    assert load(config=None, environ={}).guests.enabled
    assert not load(config=None, environ={}, flags={"client": {"insecure": False}}).guests.enabled


@pytest.mark.parametrize(
    ("tokens", "culprit"),
    [
        ({}, "hmac_secret_key"),
        ({"hmac_secret_key": SECRET, "audience_regex": "a.*"}, "audience_regex"),
        ({"hmac_secret_key": SECRET, "issuer_regex": "a.*"}, "issuer_regex"),
    ],
)
def test_guests_that_cannot_be_are_a_fault(tokens: dict[str, str], culprit: str) -> None:
    """Whoever configures guests is told what their tokens lack."""
    with pytest.raises(SettingsError) as caught:
        load(config=None, environ={}, flags={"guests": {"enabled": True}, "client": {"token": tokens}})
    (fault,) = caught.value.faults
    assert fault.name == "guests.enabled"
    assert culprit in fault.expected


# --- the key ------------------------------------------------------------------------
def test_key_survives_a_restart(tmp_path: Path) -> None:
    """It is made once, kept beside the database, and nobody else on the machine can read it."""
    tried = load(config=None, environ={}, flags={"sqlite": {"path": str(tmp_path / "some.db")}})
    first = with_key(tried, lambda: "a" * 64)
    second = with_key(tried, lambda: "b" * 64)
    assert first.client.token.hmac_secret_key == second.client.token.hmac_secret_key == "a" * 64
    assert not first.configured
    (file,) = tmp_path.iterdir()
    assert file.name == "some.db.key"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_key_of_a_memory_is_not_kept() -> None:
    """With history in memory nothing outlives the process, and no file is left."""
    tried = load(config=None, environ={}, flags={"sqlite": {"path": ":memory:"}})
    assert with_key(tried, lambda: "a" * 64).client.token.hmac_secret_key == "a" * 64
    assert not Path(":memory:.key").exists()


def test_configured_key_is_the_key() -> None:
    """A key that somebody configured signs the guests, too, and none is made."""
    chosen = settings(guests={"enabled": True})
    assert with_key(chosen, lambda: "a" * 64) is chosen
    closed = settings()
    assert with_key(closed, lambda: "a" * 64) is closed


@pytest.mark.parametrize("content", ["", "short", "z" * 64, "a" * 65, "\xff" * 64])
def test_damaged_key_is_told(tmp_path: Path, content: str) -> None:
    """A file that holds something else is not overwritten, and the words say which file and what to do."""
    file = tmp_path / "some.db.key"
    file.write_text(content, encoding="latin-1")
    with pytest.raises(Unavailable, match=r"some\.db\.key holds no key.*remove it"):
        kept_key(str(file), lambda: "a" * 64)
    assert file.read_text(encoding="latin-1") == content


def test_key_that_cannot_be_kept_is_told(tmp_path: Path) -> None:
    """A folder that is not there is an operator's fault, said in words."""
    with pytest.raises(Unavailable, match="No such file or directory"):
        kept_key(str(tmp_path / "nowhere" / "some.db.key"), lambda: "a" * 64)
    assert list(tmp_path.iterdir()) == []
