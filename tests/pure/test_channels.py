"""PROTOCOL 9, 10: channel names, namespaces, permissions and payload rules."""

import itertools
from typing import Any

import pytest

from server.auth import Override
from server.channels import Channels, Grant, Identity, Namespace, check_payload, grant, unknown_type
from server.errors import BAD_REQUEST, NOT_AVAILABLE, PERMISSION_DENIED, UNKNOWN_CHANNEL, Refusal, Refused
from server.settings import ChannelSettings

HISTORY = {"history_size": 5, "history_ttl": "10s"}
ANN, NOBODY = Identity("ann"), Identity()


def _channels(*namespaces: dict[str, Any], **settings: Any) -> Channels:
    return Channels(ChannelSettings.model_validate({"namespaces": namespaces, **settings}))


def _space(**options: Any) -> tuple[Channels, Namespace]:
    channels = _channels({"name": "it", **options})
    return channels, channels.known("it:1")


def _refusal(refused: pytest.ExceptionInfo[Refused]) -> Refusal:
    return refused.value.refusal


# --- names ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("channel", "namespace"),
    [
        ("news", ""),
        ("news:a", "news"),
        ("news:sport:live", "news"),
        ("news:", "news"),
        ("$news:a", "news"),
        ("$plain", ""),
        ("#ann", ""),
        ("news:#ann", "news"),
        (":a", None),
        ("New:a", None),
        ("news2:a", None),
        ("$$news:a", None),
        ("#news:a", None),
    ],
)
def test_namespaces(channel: str, namespace: str | None) -> None:
    """PROTOCOL 9.1: what stands before the first boundary, less a private prefix, picks the namespace."""
    channels = _channels({"name": "news"})
    found = channels.namespace(channel)
    assert (found.name if found else None) == namespace
    if namespace is None:
        with pytest.raises(Refused) as refused:
            channels.known(channel)
        assert _refusal(refused) is UNKNOWN_CHANNEL


def test_other_symbols() -> None:
    """PROTOCOL 9.1: prefix, boundaries and separator are settings."""
    channels = _channels(
        {"name": "news", "allow_user_limited_channels": True},
        private_prefix="!",
        namespace_boundary="/",
        user_boundary="@",
        user_separator="+",
    )
    assert channels.known("!news/a").name == "news"
    assert channels.known("news:a").name == ""
    assert channels.private("!x")
    assert not channels.private("$x")
    assert channels.users_of("news/a@ann+bob", channels.known("news/a")) == ["ann", "bob"]
    assert channels.personal("ann", "news") == "news/@ann"


@pytest.mark.parametrize(
    ("channel", "good"),
    [
        ("x" * 255, True),
        ("x" * 256, False),
        ("it:" + "x" * 252, True),
        ("it:" + "x" * 253, False),
        ("it:a b\x7f", True),
        ("it:ä", False),
        ("re:17", True),
        ("re:1x", False),
        ("$re:17", True),
        ("re:", False),
        ("re:١٧", True),
        ("uni:" + "ä" * 125, True),
        ("uni:" + "ä" * 126, False),
        ("uni:\udcff", False),
    ],
)
def test_names(channel: str, good: bool) -> None:
    """PROTOCOL 9.1: bytes are counted; ASCII only, unless a pattern decides about the rest of the name."""
    channels = _channels(
        {"name": "it"}, {"name": "re", "channel_regex": r"^\d+$"}, {"name": "uni", "channel_regex": "^ä*$"}
    )
    namespace = channels.known(channel)
    if good:
        channels.check_name(channel, namespace)
    else:
        with pytest.raises(Refused) as refused:
            channels.check_name(channel, namespace)
        assert _refusal(refused) is BAD_REQUEST


@pytest.mark.parametrize(
    ("channel", "users"),
    [
        ("it:a", None),
        ("it:a#ann", ["ann"]),
        ("it:a#ann,bob", ["ann", "bob"]),
        ("it:#ann", ["ann"]),
        ("it:a#", [""]),
        ("it:a#ann#bob", ["bob"]),
        ("it:a#ann,", ["ann", ""]),
    ],
)
def test_user_limited_names(channel: str, users: list[str] | None) -> None:
    """PROTOCOL 9.1: what follows the last ``#`` lists the users, where the namespace honours it."""
    channels, namespace = _space(allow_user_limited_channels=True)
    assert channels.users_of(channel, namespace) == users
    deaf, other = _space()
    assert deaf.users_of(channel, other) is None


def test_a_personal_channel_is_for_its_user_only() -> None:
    """PROTOCOL 9.2: the personal channel is user-limited, whatever the user is called."""
    channels, namespace = _space(allow_user_limited_channels=True)
    name = channels.personal("ann", "it")
    assert name == "it:#ann"
    channels.may_subscribe(ANN, name, namespace)
    for other in (NOBODY, Identity("bob"), Identity("it:#ann")):
        with pytest.raises(Refused):
            channels.may_subscribe(other, name, namespace)


# --- permissions --------------------------------------------------------------------------
@pytest.mark.parametrize("deed", ["publish", "history", "presence"])
@pytest.mark.parametrize(("client", "subscriber", "anonymous"), list(itertools.product([False, True], repeat=3)))
def test_who_may(deed: Any, client: bool, subscriber: bool, anonymous: bool) -> None:
    """PROTOCOL 10.1, 10.4: three options a deed; the one for anonymous users only extends the other two."""
    options = {
        f"allow_{deed}_for_client": client,
        f"allow_{deed}_for_subscriber": subscriber,
        f"allow_{deed}_for_anonymous": anonymous,
    }
    channels, namespace = _space(**options, **HISTORY, presence=True)
    for who, subscribed in itertools.product([ANN, NOBODY], [False, True]):
        expected = (client or (subscriber and subscribed)) and (bool(who.user) or anonymous)
        assert channels.may(deed, who, namespace, subscribed=subscribed) is expected
        if expected:
            channels.require(deed, who, namespace, subscribed=subscribed)
        else:
            with pytest.raises(Refused) as refused:
                channels.require(deed, who, namespace, subscribed=subscribed)
            assert _refusal(refused) is PERMISSION_DENIED
            assert f"allow_{deed}_for_client" in refused.value.why, "the log names the option to look at"
    assert channels.may(deed, Identity(insecure=True), namespace, subscribed=False)


@pytest.mark.parametrize("deed", ["history", "presence"])
def test_what_is_off_is_off_for_everybody(deed: Any) -> None:
    """PROTOCOL 10.4: a feature that the namespace lacks is 108, in insecure mode, too, before any permission."""
    channels, namespace = _space()
    for who in (ANN, Identity(insecure=True)):
        with pytest.raises(Refused) as refused:
            channels.require(deed, who, namespace, subscribed=True)
        assert _refusal(refused) is NOT_AVAILABLE


# --- grants ---------------------------------------------------------------------------------
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("override", [None, False, True])
def test_overrides(forced: bool, override: bool | None) -> None:
    """PROTOCOL 8.1: a token's override goes before the namespace's option; absent, the option counts."""
    names = ("presence", "join_leave", "force_push_join_leave", "force_positioning", "force_recovery")
    channels, namespace = _space(**HISTORY, **dict.fromkeys(names, forced))
    switched = Override(**dict.fromkeys(names, override))
    expected = forced if override is None else override
    assert grant(channels, ANN, namespace, switched) == Grant(*[expected] * 5)


def test_recovery_implies_positioning() -> None:
    """PROTOCOL 4.2: who may recover is positioned; without history nobody is either."""
    channels, namespace = _space(**HISTORY, allow_recovery=True)
    granted = grant(channels, ANN, namespace, Override(), recoverable=True)
    assert (granted.positioned, granted.recoverable) == (True, True)
    bare, passing = _space(allow_recovery=True, force_positioning=True)
    granted = grant(bare, ANN, passing, Override(force_recovery=True), recoverable=True, positioned=True)
    assert (granted.positioned, granted.recoverable) == (False, False)


def test_wishes_count_the_client_as_subscribed() -> None:
    """PROTOCOL 10.3: "may read" is asked as for a subscriber, and for an anonymous one as always."""
    options = {"allow_history_for_subscriber": True, "allow_presence_for_subscriber": True}
    channels, namespace = _space(**HISTORY, presence=True, join_leave=True, **options)
    wishes = {"positioned": True, "recoverable": True, "join_leave": True}
    mine = grant(channels, ANN, namespace, Override(), **wishes)
    assert (mine.positioned, mine.recoverable, mine.joins) == (True, True, True)
    theirs = grant(channels, NOBODY, namespace, Override(), **wishes)
    assert (theirs.positioned, theirs.recoverable, theirs.joins) == (False, False, False)


# --- retention, payloads, types ---------------------------------------------------------------
def test_retention() -> None:
    """A kept namespace has sizes and times in ms, -1 for no limit; its meta TTL falls back on the general one."""
    channels = _channels(
        {"name": "aa", "history_size": 5, "history_ttl": "10s", "history_meta_ttl": "1h"},
        {"name": "bb", "history_size": -1, "history_ttl": "-1"},
        {"name": "cc"},
        history_meta_ttl="2h",
    )
    a, b = channels.retention("aa:1"), channels.retention("bb:1")
    assert a is not None
    assert b is not None
    assert (a.size, a.ttl_ms, a.meta_ttl_ms) == (5, 10_000, 3_600_000)
    assert (b.size, b.ttl_ms, b.meta_ttl_ms) == (-1, -1, 7_200_000)
    assert channels.retention("cc:1") is None
    assert channels.retention("nowhere:1") is None


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize(
    ("format", "data", "good"),
    [
        ("", b"1", True),
        ("", b"{", False),
        ("", b"", False),
        ("", None, False),
        ("json", b"[1]", True),
        ("json", b"\xff", False),
        ("json_object", b' \n{"a":1}', True),
        ("json_object", b"[1]", False),
        ("json_object", b'{"a":1', False),
        ("binary", b"\x00\xff", True),
        ("binary", b"", True),
        ("binary", None, True),
    ],
)
def test_payloads(format: str, data: bytes | None, good: bool, general: bool) -> None:
    """PROTOCOL 9.4: JSON unless the namespace, or else the general setting, says ``binary``."""
    if general:
        namespace = _channels({"name": "it"}, publication_data_format=format).known("it:1")
    else:
        namespace = _space(publication_data_format=format)[1]
    if good:
        assert check_payload(data, namespace) == (data or b"")
    else:
        with pytest.raises(Refused) as refused:
            check_payload(data, namespace)
        assert _refusal(refused) is BAD_REQUEST


def test_types_that_are_not_offered() -> None:
    """PROTOCOL 10.2: map types are not this namespace's (103), anything else is not available (108)."""
    assert [unknown_type(type) for type in (1, 2, 3, 4, 5, -1)] == [PERMISSION_DENIED] * 3 + [NOT_AVAILABLE] * 3


def test_refusals_never_repeat_long_names() -> None:
    """A refusal's ``why`` goes to the log, so a client's long name is cut there."""
    channels = _channels()
    with pytest.raises(Refused) as refused:
        channels.known("x:" + "y" * 60_000)
    assert len(refused.value.why) < 200
