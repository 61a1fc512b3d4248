"""Settings: three sources, one tree, and all mistakes at once."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from server.configuration import Fault, SettingsError, load, reference
from server.settings import TRY_OUT, ChannelOptions, Settings, duration_text, parse_duration, without_secrets

NOTHING: Mapping[str, Any] = MappingProxyType({})
PEM = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"


def flagged(**flags: Any) -> Settings:
    """The settings that these flags alone make."""
    return load(config=None, environ={}, flags=flags)


def faults_of(
    *, config: Path | None = None, environ: Mapping[str, str] = NOTHING, flags: Mapping[str, Any] = NOTHING
) -> list[Fault]:
    """Every fault of these sources; there must be some."""
    with pytest.raises(SettingsError) as caught:
        load(config=config, environ=environ, flags=flags)
    faults = caught.value.faults
    assert str(caught.value).splitlines() == [str(fault) for fault in faults], "one line each"
    return faults


def fault_of(**sources: Any) -> Fault:
    """The only fault of these sources."""
    (fault,) = faults_of(**sources)
    return fault


def written(folder: Path, name: str, text: str) -> Path:
    """A configuration file with this text."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# --- sources and their order -------------------------------------------------
TOML = """
[http_server]
port = 9001
[client]
allowed_origins = ["https://a.example"]
ping_interval = "10s"
[[channel.namespaces]]
name = "news"
history_size = 5
history_ttl = "1h30m"
"""
YAML = """
http_server:
  port: 9001
client:
  allowed_origins: [https://a.example]
  ping_interval: 10s
channel:
  namespaces:
    - name: news
      history_size: 5
      history_ttl: 1h30m
http_api:
"""
JSON = """
{"http_server": {"port": 9001}, "client": {"allowed_origins": ["https://a.example"], "ping_interval": "10s"},
 "channel": {"namespaces": [{"name": "news", "history_size": 5, "history_ttl": "1h30m"}]}}
"""


@pytest.mark.parametrize(
    ("name", "text"),
    [("c.toml", TOML), ("c.yaml", YAML), ("c.yml", YAML), ("c.json", JSON), ("C.JSON", JSON)],
)
def test_file_formats_say_the_same(tmp_path: Path, name: str, text: str) -> None:
    """TOML, YAML and JSON with the same options give the same settings."""
    settings = load(config=written(tmp_path, name, text), environ={})
    assert settings.http_server.port == 9001
    assert settings.client.allowed_origins == ("https://a.example",)
    assert settings.client.ping_interval == 10.0
    (news,) = settings.channel.namespaces
    assert (news.name, news.history_size, news.history_ttl, news.kept) == ("news", 5, 5400.0, True)


def test_empty_heading_in_yaml_says_nothing(tmp_path: Path) -> None:
    """A heading whose options are commented out is no fault and configures nothing."""
    config = written(tmp_path, "c.yaml", "client:\n  # insecure: true\nchannel:\n  without_namespace:\n")
    assert not load(config=config, environ={}).configured


@pytest.mark.parametrize("name", ["c.toml", "c.yaml", "c.json"])
def test_empty_file_configures_nothing(tmp_path: Path, name: str) -> None:
    """An empty file is a file with nothing configured."""
    assert not load(config=written(tmp_path, name, ""), environ={}).configured


def test_later_sources_win_key_by_key(tmp_path: Path) -> None:
    """Flags win over the environment, which wins over the file; what a later source leaves out stays."""
    config = written(
        tmp_path,
        "c.json",
        '{"client": {"channel_limit": 1, "connection_limit": 1, "queue_max_size": 1, "token": {"issuer": "file"}}}',
    )
    settings = load(
        config=config,
        environ={"WATERSPOUT_CLIENT__CHANNEL_LIMIT": "2", "WATERSPOUT_CLIENT__CONNECTION_LIMIT": "2"},
        flags={"client": {"channel_limit": 3, "token": {"audience": "flag"}}},
    )
    client = settings.client
    assert (client.channel_limit, client.connection_limit, client.queue_max_size) == (3, 2, 1)
    assert (client.token.issuer, client.token.audience) == ("file", "flag")


def test_lists_are_replaced_whole(tmp_path: Path) -> None:
    """A later list takes an earlier one's place; the two are not joined."""
    config = written(tmp_path, "c.toml", TOML)
    settings = load(
        config=config,
        environ={
            "WATERSPOUT_CHANNEL__NAMESPACES": '[{"name": "chat"}, {"name": "live"}]',
            "WATERSPOUT_CLIENT__ALLOWED_ORIGINS": '["https://b.example"]',
        },
    )
    assert [namespace.name for namespace in settings.channel.namespaces] == ["chat", "live"]
    assert settings.client.allowed_origins == ("https://b.example",)


def test_environment_reads_every_type() -> None:
    """Variables hold text; numbers, booleans, durations, lists and objects are made of it."""
    settings = load(
        config=None,
        environ={
            "WATERSPOUT_HTTP_SERVER__PORT": "9002",
            "WATERSPOUT_HTTP_SERVER__TRUSTED_PROXIES": '["10.0.0.0/8", "::1"]',
            "WATERSPOUT_CLIENT__INSECURE": "true",
            "WATERSPOUT_CLIENT__PING_INTERVAL": "1m",
            "WATERSPOUT_CLIENT__TOKEN__HMAC_SECRET_KEY": "12345",
            "WATERSPOUT_CHANNEL": '{"max_length": 10, "user_boundary": "~"}',
            "WATERSPOUT_CHANNEL__MAX_LENGTH": "20",
            "HOME": "/root",
            "WATERSPOUTS": "another program's",
        },
    )
    assert settings.http_server.port == 9002
    assert settings.http_server.trusted_proxies == ("10.0.0.0/8", "::1")
    assert settings.client.insecure is True
    assert settings.client.ping_interval == 60.0
    assert settings.client.token.hmac_secret_key == "12345"
    assert settings.channel.user_boundary == "~"
    assert settings.channel.max_length == 20, "the more special variable wins"


def test_process_environment_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``environ`` does not hold is not there, whatever the process's own environment says."""
    monkeypatch.setenv("WATERSPOUT_HTTP_SERVER__PORT", "1")
    monkeypatch.setenv("HTTP_SERVER__PORT", "2")
    monkeypatch.setenv("HTTP_SERVER", '{"port": 3}')
    assert load(config=None, environ={}).http_server.port == 8000
    environ = {"WATERSPOUT_CLIENT__CHANNEL_LIMIT": "4"}
    assert load(config=None, environ=environ).http_server.port == 8000


# --- a file that cannot be read ----------------------------------------------
@pytest.mark.parametrize(
    ("name", "text", "expected", "found"),
    [
        ("c.toml", "[client\nkey = 's3cret'", "TOML", "line 1"),
        ("c.yaml", "client:\n  key: [s3cret", "YAML", "line 2"),
        ("c.yaml", "client:\n\tkey: s3cret", "YAML", "line 2, column 1"),
        ("c.json", '{"client": {"key": "s3cret",}}', "JSON", "line 1, column"),
        ("c.json", '["s3cret"]', "options at the top level, by name", "something else"),
        ("c.yaml", "s3cret", "options at the top level, by name", "something else"),
        ("c.ini", "", "a file that ends in .toml, .yaml, .yml or .json", "'.ini'"),
        ("config", "", "a file that ends in .toml, .yaml, .yml or .json", "''"),
    ],
)
def test_unreadable_file_is_one_fault(tmp_path: Path, name: str, text: str, expected: str, found: str) -> None:
    """A broken file is named with the place of the mistake, and none of its text is shown."""
    config = written(tmp_path, name, text)
    fault = fault_of(config=config)
    assert (fault.name, fault.expected, fault.source) == (str(config), expected, "--config")
    assert found in fault.found
    assert "s3cret" not in str(fault)


def test_missing_file_is_a_fault(tmp_path: Path) -> None:
    """A file that is not there is not taken for an empty one, nor is a directory."""
    assert fault_of(config=tmp_path / "none.toml").found == "No such file or directory"
    (tmp_path / "dir.toml").mkdir()
    assert fault_of(config=tmp_path / "dir.toml").found == "Is a directory"


def test_file_that_is_no_text_is_a_fault(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 are a fault in each format."""
    for name in ("c.toml", "c.yaml", "c.json"):
        path = tmp_path / name
        path.write_bytes(b"a\xff\xfe")
        assert fault_of(config=path).name == str(path)


# --- unknown names -----------------------------------------------------------
@pytest.mark.parametrize(
    ("flags", "name", "near"),
    [
        ({"client": {"allow_origins": []}}, "client.allow_origins", "client.allowed_origins"),
        ({"allowed_origins": []}, "allowed_origins", "client.allowed_origins"),
        ({"token_hmac_secret_key": "s3cret"}, "token_hmac_secret_key", "client.token.hmac_secret_key"),
        (
            {"channel": {"namespaces": [{"name": "news", "history_sise": 1}]}},
            "channel.namespaces.0.history_sise",
            "channel.namespaces.0.history_size",
        ),
        ({"client": {"jwks_public_endpoint": ""}}, "client.jwks_public_endpoint", "client.token.jwks_public_endpoint"),
        ({"configured": True}, "configured", None),
        ({"_env_file": "x"}, "_env_file", None),
        ({"zzz": {"yyy": "s3cret"}}, "zzz", None),
    ],
)
def test_unknown_option_is_named_with_its_nearest(flags: dict[str, Any], name: str, near: str | None) -> None:
    """An unknown name is a fault with its full path, and the name that was probably meant."""
    fault = fault_of(flags=flags)
    hint = f" (perhaps {near})" if near else ""
    assert fault == Fault(name, f"a known option{hint}", "an unknown name", "flag")


@pytest.mark.parametrize(
    ("variable", "name", "near"),
    [
        ("WATERSPOUT_CLIENT__ALLOW_ORIGINS", "client.allow_origins", "WATERSPOUT_CLIENT__ALLOWED_ORIGINS"),
        ("WATERSPOUT_CLIENT_ALLOWED_ORIGINS", "client_allowed_origins", "WATERSPOUT_CLIENT__ALLOWED_ORIGINS"),
        ("WATERSPOUT_HTTP_SERVER__PORT__X", "http_server.port.x", "WATERSPOUT_HTTP_SERVER__PORT"),
        ("waterspout_http_server__port", "http_server.port", "WATERSPOUT_HTTP_SERVER__PORT"),
        ("WATERSPOUT_Q", "q", None),
        ("WATERSPOUT_", "''", None),
    ],
)
def test_unknown_variable_is_a_fault(variable: str, name: str, near: str | None) -> None:
    """A variable with our prefix that names no option is never ignored; the hint can be copied."""
    hint = f" (perhaps {near})" if near else ""
    assert fault_of(environ={variable: "1"}) == Fault(name, f"a known option{hint}", "an unknown name", variable)


def test_unknown_name_inside_a_variable_keeps_its_source() -> None:
    """A mistake inside a variable's JSON is named with its path and the variable."""
    fault = fault_of(environ={"WATERSPOUT_CHANNEL__NAMESPACES": '[{"name": "news", "presense": true}]'})
    assert fault.name == "channel.namespaces.0.presense"
    assert fault.expected == "a known option (perhaps channel.namespaces.0.presence)"
    assert fault.source == "WATERSPOUT_CHANNEL__NAMESPACES"


def test_part_of_a_list_is_no_variable() -> None:
    """A variable for one element of a list gets told to give the list."""
    fault = fault_of(environ={"WATERSPOUT_CHANNEL__NAMESPACES__0__PRESENCE": "true"})
    assert fault.expected == "the whole list as JSON in WATERSPOUT_CHANNEL__NAMESPACES"


def test_names_that_are_no_text_are_unknown(tmp_path: Path) -> None:
    """YAML reads ``on`` and ``1`` as other things than names; they are reported, not fallen over."""
    config = written(tmp_path, "c.yaml", "on: 1\nclient:\n  1: 2\n")
    assert [fault.name for fault in faults_of(config=config)] == ["client.1", "True"]


# --- wrong values ------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "value", "expected", "found"),
    [
        ("http_server.port", "ten", "an integer ≥ 0, ≤ 65535", "'ten'"),
        ("http_server.port", 65536, "an integer ≥ 0, ≤ 65535", "65536"),
        ("http_server.port", 1.5, "an integer ≥ 0, ≤ 65535", "1.5"),
        ("http_server.address", "a b", "an IP address or a host name", "'a b'"),
        ("http_server.tls", True, "an object", "a value"),
        ("client.channel_limit", True, "an integer ≥ 1", "true"),
        ("client.channel_limit", 0, "an integer ≥ 1", "0"),
        ("client.channel_limit", [1], "an integer ≥ 1", "a list"),
        ("client.insecure", "perhaps", "true or false", "'perhaps'"),
        ("client.insecure", None, "true or false", "nothing"),
        ("client.allowed_origins", "*", "a list of strings", "'*'"),
        ("client.user_id_http_header", "X User", "the name of an HTTP header", "'X User'"),
        ("client.token.issuer", 5, "a string", "5"),
        ("client.token.user_id_claim", "a.b", 'a claim\'s name of letters and "_"', "'a.b'"),
        ("client.token.jwks_public_endpoint", "ftp://x", 'a URL that begins with "https://" or "http://"', "a string"),
        ("client.ping_interval", "0.5s", "a duration ≥ 1s", "500ms"),
        ("client.pong_timeout", "0s", "a duration > 0s", "0s"),
        ("log.level", "loud", '"none", "trace", "debug", "info", "warn" or "error"', "'loud'"),
        ("log.format", "xml", '"text" or "json"', "'xml'"),
        ("channel.user_boundary", "", "one or more printable ASCII characters, no space", "''"),
        ("channel.publication_data_format", "xml", '"", "json", "json_object" or "binary"', "'xml'"),
        ("channel.namespaces", "news", "a list of objects", "a string"),
        ("channel.without_namespace.history_size", "ten", "an integer ≥ -1", "'ten'"),
        ("channel.without_namespace.history_size", -2, "an integer ≥ -1", "-2"),
        (
            "channel.without_namespace.subscription_type",
            "map",
            '"stream", the only subscription type there is here',
            "'map'",
        ),
        (
            "channel.without_namespace.force_recovery_mode",
            "map",
            '"stream" or "cache"',
            "'map'",
        ),
        ("channel.without_namespace.allowed_delta_types", "fossil", 'a list of "fossil", or an empty one', "'fossil'"),
        ("http_api.handler_prefix", "api", 'a path such as "/connection/websocket"', "'api'"),
        ("http_api.handler_prefix", "/", 'a path such as "/connection/websocket"', "'/'"),
        ("presence.lease", "500ms", "a duration ≥ 1s", "500ms"),
        ("sqlite.path", "", "a file's path", "''"),
    ],
)
def test_wrong_value_says_what_was_expected(name: str, value: object, expected: str, found: str) -> None:
    """A value of a wrong type, or out of bounds, is one fault that says what should stand there."""
    flags: Any = value
    for part in reversed(name.split(".")):
        flags = {part: flags}
    assert fault_of(flags=flags) == Fault(name, expected, found, "flag")


def test_wrong_places_of_lists_are_named() -> None:
    """A fault inside a list has the place in its name."""
    found = faults_of(
        flags={
            "client": {"allowed_origins": ["*", 5, 6]},
            "http_server": {"trusted_proxies": ["10.0.0.0/8", "10.0.0.0/33", "proxy"]},
            "channel": {"namespaces": ["news", {"name": "a"}, {"presence": True}, None]},
        }
    )
    network = 'an IP address or a network such as "10.0.0.0/8"'
    namespace = 'a name of two or more letters, digits, "-", "_" and "."'
    assert [(fault.name, fault.expected, fault.found) for fault in found] == [
        ("http_server.trusted_proxies.1", network, "'10.0.0.0/33'"),
        ("http_server.trusted_proxies.2", network, "'proxy'"),
        ("client.allowed_origins.1", "a string", "5"),
        ("client.allowed_origins.2", "a string", "6"),
        ("channel.namespaces.0", "an object", "a string"),
        ("channel.namespaces.1.name", namespace, "'a'"),
        ("channel.namespaces.2.name", "a name", "nothing"),
        ("channel.namespaces.3.name", "a name", "nothing"),
    ]


def test_regular_expressions_are_compiled() -> None:
    """A pattern that is none is found at start, not at the first token."""
    found = faults_of(
        flags={
            "client": {"token": {"audience_regex": "("}, "subscription_token": {"issuer_regex": "["}},
            "channel": {"without_namespace": {"channel_regex": "*"}},
        }
    )
    assert [fault.name for fault in found] == [
        "client.token.audience_regex",
        "client.subscription_token.issuer_regex",
        "channel.without_namespace.channel_regex",
    ]
    assert all(fault.expected.startswith("a regular expression (") for fault in found)


def test_variable_that_is_no_json_is_a_fault_and_is_not_shown() -> None:
    """Lists and objects are JSON in variables; other text is a fault, and may be a secret."""
    found = faults_of(
        environ={
            "WATERSPOUT_CLIENT__ALLOWED_ORIGINS": "https://a.example",
            "WATERSPOUT_CLIENT__TOKEN": '{"hmac_secret_key": "s3cret"',
            "WATERSPOUT_CHANNEL__NAMESPACES": "",
        }
    )
    assert {(fault.name, fault.source) for fault in found} == {
        ("client.allowed_origins", "WATERSPOUT_CLIENT__ALLOWED_ORIGINS"),
        ("client.token", "WATERSPOUT_CLIENT__TOKEN"),
        ("channel.namespaces", "WATERSPOUT_CHANNEL__NAMESPACES"),
    }
    assert not any("s3cret" in str(fault) for fault in found)


# --- durations ---------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("300s", 300.0),
        ("1h30m", 5400.0),
        ("500ms", 0.5),
        ("720h", 2_592_000.0),
        ("0s", 0.0),
        ("0", 0.0),
        ("1.5h", 5400.0),
        (".5s", 0.5),
        ("1h1m1s1ms", 3661.001),
        ("1500us", 0.0015),
        ("1500µs", 0.0015),
        ("1s1ns", 1.000000001),
    ],
)
def test_durations_are_read_as_go_reads_them(text: str, seconds: float) -> None:
    """Durations in Go's form are seconds."""
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (300, 'write "300s"'),
        (2.5, 'write "2.5s"'),
        ("300", 'write "300s"'),
        (0, 'write "0s"'),
        (True, 'such as "300s"'),
        (None, 'such as "300s"'),
        ("", 'such as "300s"'),
        ("s", 'such as "300s"'),
        ("5 s", 'such as "300s"'),
        ("5d", 'such as "300s"'),
        ("-5s", 'such as "300s"'),
        ("-1", 'such as "300s"'),
        ("1e3s", 'such as "300s"'),
        ("٣s", 'such as "300s"'),
        ("100us", '"1ms" or more'),
        ("9" * 400 + "h", '"876000h" or less'),
    ],
)
def test_bad_durations_are_faults(value: object, hint: str) -> None:
    """A bare number, another form, less than a millisecond or more than a century is refused with a hint."""
    fault = fault_of(flags={"shutdown": {"timeout": value}})
    assert fault.name == "shutdown.timeout"
    assert hint in fault.expected


@pytest.mark.parametrize("value", ["-1", -1])
def test_no_limit_only_where_it_means_something(value: object) -> None:
    """-1 is "no limit" for history_ttl, whatever the meta TTL, and a fault for other durations."""
    options = flagged(channel={"without_namespace": {"history_size": -1, "history_ttl": value}}).channel
    assert (options.without_namespace.history_ttl, options.without_namespace.kept) == (-1.0, True)
    assert fault_of(flags={"channel": {"history_meta_ttl": value}}).name == "channel.history_meta_ttl"
    fault = fault_of(flags={"channel": {"without_namespace": {"history_size": 1, "history_ttl": 300}}})
    assert fault.expected == 'a duration with its unit: write "300s" for seconds, or "-1" for no limit'


@given(st.integers(0, 3_153_600_000_000))
def test_durations_survive_writing(milliseconds: int) -> None:
    """A duration that is written is read as the same one."""
    seconds = milliseconds / 1000
    assert parse_duration(duration_text(seconds)) == seconds


# --- contradictions ----------------------------------------------------------
def options(**given: Any) -> dict[str, Any]:
    """Flags with these options for channels without a namespace."""
    return {"channel": {"without_namespace": given}}


@pytest.mark.parametrize(
    ("flags", "name", "words"),
    [
        (
            {"client": {"ping_interval": "5s", "pong_timeout": "5s"}},
            "client.pong_timeout",
            "less than client.ping_interval (5s)",
        ),
        ({"client": {"ping_interval": "5s"}}, "client.pong_timeout", "less than client.ping_interval (5s)"),
        ({"client": {"token": {"audience": "a", "audience_regex": "b"}}}, "client.token.audience_regex", "not both"),
        ({"client": {"token": {"issuer": "a", "issuer_regex": "b"}}}, "client.token.issuer_regex", "not both"),
        (
            {"client": {"subscription_token": {"jwks_public_endpoint": "https://a/", "rsa_public_key": "x"}}},
            "client.subscription_token.jwks_public_endpoint",
            "a JWKS endpoint or static keys, not both",
        ),
        (
            {"client": {"token": {"jwks_public_endpoint": "https://a/{{realm}}", "issuer_regex": "(?P<kingdom>.*)"}}},
            "client.token.jwks_public_endpoint",
            "named group",
        ),
        (options(history_size=10), "channel.without_namespace.history_ttl", "both or neither"),
        (options(history_ttl="10s"), "channel.without_namespace.history_size", "both or neither"),
        (options(history_ttl="-1"), "channel.without_namespace.history_size", "both or neither"),
        (options(force_recovery=True), "channel.without_namespace.force_recovery", "history_size and history_ttl"),
        (
            options(history_size=1, history_ttl="1h", force_recovery=True, auto_cache_recover=True),
            "channel.without_namespace.auto_cache_recover",
            'force_recovery, and "cache" for its mode',
        ),
        (
            options(history_size=1, history_ttl="1h", force_recovery_mode="cache", auto_cache_recover=True),
            "channel.without_namespace.auto_cache_recover",
            'force_recovery, and "cache" for its mode',
        ),
        (
            options(history_size=1, history_ttl="721h"),
            "channel.without_namespace.history_ttl",
            "at most channel.history_meta_ttl (720h)",
        ),
        (
            options(history_size=1, history_ttl="2h", history_meta_ttl="1h"),
            "channel.without_namespace.history_ttl",
            "at most channel.without_namespace.history_meta_ttl (1h)",
        ),
        (
            {"channel": {"namespaces": [{"name": "news"}, {"name": "chat"}, {"name": "news"}]}},
            "channel.namespaces.2.name",
            "a name that channel.namespaces.0.name has not",
        ),
        (
            {"channel": {"namespaces": [{"name": "a.b"}], "namespace_boundary": "."}},
            "channel.namespaces.0.name",
            "a name without channel.namespace_boundary",
        ),
        (
            {"channel": {"user_boundary": ":"}},
            "channel.user_boundary",
            "something else than channel.namespace_boundary",
        ),
        (
            {"client": {"subscribe_to_user_personal_channel": {"enabled": True, "personal_channel_namespace": "me"}}},
            "client.subscribe_to_user_personal_channel.personal_channel_namespace",
            "the name of a configured namespace",
        ),
        (
            {"client": {"subscribe_to_user_personal_channel": {"enabled": True, "single_connection": True}}},
            "client.subscribe_to_user_personal_channel.single_connection",
            "presence to be on in channel.without_namespace",
        ),
        ({"http_api": {"handler_prefix": "/connection"}}, "websocket.handler_prefix", "a path apart from"),
        ({"websocket": {"handler_prefix": "/api/ws/"}}, "websocket.handler_prefix", "a path apart from"),
        (
            {"sse": {"enabled": True}, "emulation": {"handler_prefix": "/connection/sse"}},
            "sse.handler_prefix",
            "a path apart from emulation.handler_prefix",
        ),
        (
            {"uni_sse": {"enabled": True, "handler_prefix": "/connection/websocket"}},
            "websocket.handler_prefix",
            "a path apart from uni_sse.handler_prefix",
        ),
        (
            {"init": {"enabled": True, "handler_prefix": "/api/init"}},
            "init.handler_prefix",
            "a path apart from http_api.handler_prefix",
        ),
        (
            {"admin": {"enabled": True, "password": "p", "handler_prefix": "/api/console"}},
            "http_api.handler_prefix",
            "a path apart from admin.handler_prefix",
        ),
        ({"admin": {"enabled": True}}, "admin.password", "a password, or admin.secret"),
        (
            {"admin": {"enabled": True, "secret": "one"}, "client": {"token": {"hmac_secret_key": "one"}}},
            "admin.secret",
            "another key than client.token.hmac_secret_key",
        ),
        ({"http_server": {"internal_port": 8000}}, "http_server.internal_port", "another port"),
    ],
)
def test_contradictions_are_refused(flags: dict[str, Any], name: str, words: str) -> None:
    """Values that are right alone and wrong together are one fault that names both."""
    fault = fault_of(flags=flags)
    assert fault.name == name
    assert words in fault.expected
    assert fault.source == "flag"


def test_right_neighbours_of_contradictions_are_accepted() -> None:
    """The values next to each refusal are allowed."""
    flagged(client={"ping_interval": "5s", "pong_timeout": "4999ms"})
    flagged(
        client={
            "token": {"jwks_public_endpoint": "https://a/{{realm}}/c", "issuer_regex": "/(?P<realm>[a-z]+)$"},
            "subscribe_to_user_personal_channel": {
                "enabled": True,
                "personal_channel_namespace": "me",
                "single_connection": True,
            },
        },
        channel={"namespaces": [{"name": "me", "presence": True}]},
    )
    flagged(**options(history_size=1, history_ttl="720h", force_recovery=True))
    flagged(**options(history_size=1, history_ttl="721h", history_meta_ttl="721h"))
    flagged(websocket={"disabled": True}, http_api={"handler_prefix": "/connection"})
    flagged(websocket={"handler_prefix": "/api2"})
    flagged(admin={"enabled": True, "secret": "one"}, client={"token": {"hmac_secret_key": "another"}})
    flagged(http_server={"internal_port": 8001})


def test_contradiction_names_every_source(tmp_path: Path) -> None:
    """Two sources that are wrong only together are both named."""
    config = written(tmp_path, "c.json", '{"client": {"pong_timeout": "20s"}}')
    fault = fault_of(config=config, environ={"WATERSPOUT_CLIENT__PING_INTERVAL": "15s"})
    assert fault.source == f"{config}, WATERSPOUT_CLIENT__PING_INTERVAL"


def test_tls_needs_certificate_and_key(tmp_path: Path) -> None:
    """With TLS on, certificate and key must each be PEM text or the path of a file."""
    found = faults_of(flags={"http_server": {"tls": {"enabled": True, "key_pem": "s3cret\0"}}})
    assert [(fault.name, fault.found) for fault in found] == [
        ("http_server.tls.cert_pem", "nothing"),
        ("http_server.tls.key_pem", "a path of no file, or text that is no PEM"),
    ]
    key = written(tmp_path, "key.pem", PEM)
    settings = flagged(http_server={"tls": {"enabled": True, "cert_pem": PEM, "key_pem": str(key)}})
    assert settings.http_server.tls.enabled
    flagged(http_server={"tls": {"enabled": False, "cert_pem": "not there yet"}})


# --- all together ------------------------------------------------------------
def test_faults_of_all_sources_come_together(tmp_path: Path) -> None:
    """File, variables and flags are all looked through, also where a later source hides an earlier mistake."""
    config = written(
        tmp_path,
        "c.toml",
        '[http_server]\nport = "ten"\n[client]\nallow_origins = []\nchannel_limit = 0\n'
        '[[channel.namespaces]]\nname = "news"\nhistory_size = 5\n[[channel.namespaces]]\nname = "x"\n',
    )
    found = faults_of(
        config=config,
        environ={"WATERSPOUT_CLIENT__CHANNEL_LIMIT": "many", "WATERSPOUT_NO": "1", "WATERSPOUT_RPC": "{"},
        flags={"http_server": {"port": 9000}, "shutdown": {"timeout": 5}},
    )
    assert {(fault.name, fault.source) for fault in found} == {
        ("http_server.port", str(config)),
        ("client.allow_origins", str(config)),
        ("client.channel_limit", str(config)),
        ("channel.namespaces.1.name", str(config)),
        ("no", "WATERSPOUT_NO"),
        ("rpc", "WATERSPOUT_RPC"),
        ("client.channel_limit", "WATERSPOUT_CLIENT__CHANNEL_LIMIT"),
        ("shutdown.timeout", "flag"),
        ("channel.namespaces.0.history_ttl", str(config)),
    }


def test_contradiction_waits_for_the_values_it_is_about() -> None:
    """A faulty history_ttl is one fault, not also a history_size without one; another namespace's is told."""
    found = faults_of(
        flags={
            "channel": {
                "namespaces": [
                    {"name": "news", "history_size": 5, "history_ttl": "long"},
                    {"name": "chat", "history_size": 5},
                ]
            }
        }
    )
    assert [fault.name for fault in found] == ["channel.namespaces.0.history_ttl", "channel.namespaces.1.history_ttl"]


JSONISH = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "-1", "5s", "stream", "news", "\0é"]),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), below, max_size=3),
    max_leaves=6,
)
NAMES = [row.name.split(".") for row in reference()] + [["channel", "namespaces"], ["client", "token"], ["rpc"]]


@given(st.lists(st.tuples(st.sampled_from(NAMES), JSONISH), max_size=4))
def test_anything_gives_settings_or_faults(given_values: list[tuple[list[str], Any]]) -> None:
    """Whatever stands in the place of whatever option, the outcome is settings or named faults."""
    flags: dict[str, Any] = {}
    for path, value in given_values:
        below = flags
        for part in path[:-1]:
            inner = below.get(part)
            if not isinstance(inner, dict):
                inner = below[part] = {}
            below = inner
        below[path[-1]] = value
    outcome: Settings | list[Fault]
    try:
        outcome = load(config=None, environ={}, flags=flags)
    except SettingsError as error:
        outcome = error.faults
    if isinstance(outcome, Settings):
        assert json.loads(json.dumps(without_secrets(outcome)))
    else:
        assert outcome
        assert all(fault.name and fault.expected and fault.found and fault.source for fault in outcome)


# --- secrets -----------------------------------------------------------------
SECRETS: dict[str, Any] = {
    "http_api": {"key": "s3cret"},
    "http_server": {"tls": {"key_pem": "s3cret"}},
    "client": {
        "token": {"hmac_secret_key": "s3cret", "hmac_previous_secret_key": "s3cret"},
        "subscription_token": {"hmac_secret_key": "s3cret", "hmac_previous_secret_key": "s3cret"},
    },
}


def test_secrets_are_hidden() -> None:
    """Neither what is shown nor the repr holds a secret; whether one is set can be seen."""
    settings = load(config=None, environ={}, flags=SECRETS)
    shown = without_secrets(settings)
    assert "s3cret" not in json.dumps(shown) + repr(settings) + str(settings)
    assert shown["http_api"]["key"] == "***"
    assert shown["client"]["token"]["hmac_secret_key"] == "***"
    assert without_secrets(flagged(client={"insecure": True}))["http_api"]["key"] == ""
    assert settings.http_api.key == "s3cret", "whoever needs it has it"


def test_no_name_of_a_secret_was_forgotten() -> None:
    """Whatever is called a key, a password or a secret is one, public keys and times apart."""
    words = ("key", "password", "secret")
    named = {row.name for row in reference() if any(word in row.name.split(".")[-1] for word in words)}
    named -= {name for name in named if "public_key" in name or name.endswith("_valid_until")}
    assert named == {row.name for row in reference() if row.type == "string (secret)"}


def test_faults_do_not_tell_secrets() -> None:
    """A secret of a wrong type, or in a wrong place, is not printed."""
    found = faults_of(
        flags={
            "http_api": {"key": 53_1337, "keys": "s3cret"},
            "client": {"token": "s3cret", "subscription_token": {"hmac_secret_key": ["s3cret"]}},
            "channel": {"namespaces": "s3cret"},
        }
    )
    assert len(found) == 5
    assert not any("s3cret" in str(fault) or "531337" in str(fault) for fault in found)


def test_what_is_shown_can_be_read_again(tmp_path: Path) -> None:
    """The shown settings, written to a file, give the same settings where there is no secret."""
    own = {"stale_close_delay": "1500ms"}
    settings = load(config=None, environ={}, flags={**TRY_OUT, "guests": {}, "admin": {}, "client": own})
    shown = without_secrets(settings)
    assert shown["client"]["stale_close_delay"] == "1500ms"
    assert shown["client"]["ping_interval"] == "25s"
    assert load(config=written(tmp_path, "c.json", json.dumps(shown)), environ={}) == settings


# --- nothing configured ------------------------------------------------------
def test_nothing_configured_is_open_for_trying_out() -> None:
    """Without any option everybody on this machine may do everything in chat, live, game and plain channels."""
    settings = load(config=None, environ={})
    assert not settings.configured
    assert (settings.http_server.address, settings.http_server.port) == ("127.0.0.1", 8000)
    assert settings.client.allow_anonymous_connect_without_token
    assert settings.client.allowed_origins == ("http://localhost:*", "http://127.0.0.1:*", "http://[::1]:*")
    assert (settings.http_api.key, settings.http_api.insecure) == ("", False)
    namespaces: dict[str, ChannelOptions] = {each.name: each for each in settings.channel.namespaces}
    plain = settings.channel.without_namespace
    chat, live, game = namespaces["chat"], namespaces["live"], namespaces["game"]
    for each in (chat, live, game, plain):
        assert each.presence
        assert each.join_leave
        for action in ("subscribe", "publish", "history", "presence"):
            assert getattr(each, f"allow_{action}_for_client")
            assert getattr(each, f"allow_{action}_for_anonymous")
    assert (chat.history_size, chat.history_ttl, chat.force_recovery) == (10_000, 30 * 86_400.0, True)
    assert (plain.history_size, plain.history_ttl, plain.force_recovery) == (10_000, 30 * 86_400.0, True)
    assert (game.history_size, game.history_ttl, game.force_recovery) == (1_000, 86_400.0, True)
    assert not live.kept
    assert [each.force_push_join_leave for each in (chat, live, game, plain)] == [True, False, False, False]


def test_address_port_log_and_sqlite_do_not_count_as_configured() -> None:
    """One may try things out on another port, with another file and another log."""
    settings = load(
        config=None,
        environ={"WATERSPOUT_HTTP_SERVER__PORT": "0", "WATERSPOUT_LOG__LEVEL": "warning"},
        flags={"http_server": {"address": "localhost"}, "sqlite": {"path": ":memory:"}, "client": {}},
    )
    assert not settings.configured
    assert (settings.http_server.port, settings.sqlite.path, settings.log.level) == (0, ":memory:", "warn")
    assert settings.client.allow_anonymous_connect_without_token


@pytest.mark.parametrize(
    "flags",
    [
        {"client": {"insecure": False}},
        {"client": {"allowed_origins": []}},
        {"shutdown": {"timeout": "1s"}},
        {"http_server": {"trusted_proxies": ["10.0.0.1"]}},
    ],
)
def test_any_other_option_closes_the_server(flags: dict[str, Any]) -> None:
    """As soon as anything is set, even to its default, the defaults are closed."""
    settings = load(config=None, environ={}, flags=flags)
    assert settings.configured
    assert not settings.client.allow_anonymous_connect_without_token
    assert settings.client.allowed_origins == ()
    assert settings.channel.namespaces == ()
    assert settings.channel.without_namespace == ChannelOptions()


@pytest.mark.parametrize("address", ["0.0.0.0", "", "192.168.1.5", "::", "example.com"])
def test_open_server_does_not_leave_this_machine(address: str) -> None:
    """While nothing is configured, an address that others can reach is refused, with what to configure."""
    fault = fault_of(environ={"WATERSPOUT_HTTP_SERVER__ADDRESS": address})
    assert (fault.name, fault.source) == ("http_server.address", "WATERSPOUT_HTTP_SERVER__ADDRESS")
    for option in ("client.token", "client.allowed_origins", "channel.namespaces"):
        assert option in fault.expected
    settings = flagged(http_server={"address": address}, client={"token": {"hmac_secret_key": "k"}})
    assert settings.http_server.address == address


def test_failed_configuration_is_not_taken_for_none() -> None:
    """Whoever configured in vain hears of that mistake, and not that nothing is configured."""
    address = {"WATERSPOUT_HTTP_SERVER__ADDRESS": "0.0.0.0"}
    assert fault_of(environ={**address, "WATERSPOUT_CLIENT__TOKEN": "{"}).name == "client.token"
    assert fault_of(environ=address, flags={"client": {"tokn": {}, "insecure": True}}).name == "client.tokn"


# --- the tree ----------------------------------------------------------------
def models(model: type[BaseModel] = Settings) -> set[type[BaseModel]]:
    """Every model of the tree."""
    found = {model}
    for field in model.model_fields.values():
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for each in candidates:
            if isinstance(each, type) and issubclass(each, BaseModel):
                found |= models(each)
    return found


def test_every_field_has_help_and_refuses_strangers() -> None:
    """No option without a line of help; no model that swallows unknown names or can be changed."""
    assert len(models()) >= 22
    for model in models():
        assert model.model_config["extra"] == "forbid"
        assert model.model_config["frozen"] is True
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name} has no help"
            assert "\n" not in field.description


def test_reference_lists_every_option() -> None:
    """The table has a row for each option, with type, default and help."""
    rows = {row.name: row for row in reference()}
    assert len(rows) == len(reference()), "no name twice"
    for row in rows.values():
        assert all(row), row
    assert rows["http_server.port"][1:3] == ("integer ≥ 0, ≤ 65535", "8000")
    assert rows["client.ping_interval"][1:3] == ("duration ≥ 1s", '"25s"')
    assert rows["channel.history_meta_ttl"].default == '"720h"'
    assert rows["channel.without_namespace.history_ttl"].type == 'duration, or "-1" for no limit'
    assert rows["channel.namespaces.0.name"].default == "required"
    assert rows["client.allowed_origins"].default == "[]"
    for name in rows:
        if ".0." not in name:
            value: Any = Settings()
            for part in name.split("."):
                value = getattr(value, part)


def test_settings_cannot_be_changed() -> None:
    """What was read at start stays; lists cannot be appended to either."""
    settings = load(config=None, environ={})
    with pytest.raises(ValidationError, match="frozen"):
        settings.http_server.port = 1
    assert isinstance(settings.client.allowed_origins, tuple)
    assert isinstance(settings.channel.namespaces, tuple)


def test_all_defaults_are_sound() -> None:
    """The defaults pass the checks that a configured value must pass."""
    shown = without_secrets(Settings())
    assert load(config=None, environ={}, flags=shown) == Settings()
    assert math.isclose(Settings().channel.idempotency_ttl, 86_400.0)
