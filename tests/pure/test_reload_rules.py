"""What a running server takes over of settings that were read anew, and what waits for a restart; PROTOCOL 9.5."""

from typing import Any

import pytest
from support import config

from server.configuration import contradictions, load, reference
from server.reload import LATER, LIVE, PROXIED, renewed, same_terms
from server.settings import ChannelOptions, Settings

ENDPOINT = {"proxy": {"subscribe": {"endpoint": "http://localhost/subscribe"}}}


def settings(**sections: Any) -> Settings:
    """Settings of these sections and nothing else."""
    return load(config=None, environ={}, flags=sections)


def test_the_names_exist() -> None:
    """Every option that is named here is one."""
    names = {row.name for row in reference()}
    groups = {name.rpartition(".")[0] for name in names}
    assert names | groups | {"channel.without_namespace"} >= LIVE
    assert ChannelOptions.model_fields.keys() >= LATER | PROXIED


def test_nothing_new_is_nothing_to_do() -> None:
    """The same settings change nothing, and are the same object."""
    former = load(config=None, environ={}, flags=config())
    settings, changed, waiting = renewed(former, load(config=None, environ={}, flags=config()))
    assert (changed, waiting) == ([], [])
    assert settings is former


def test_what_may_change_is_taken_and_the_rest_waits() -> None:
    """Keys, origins, limits and namespaces are the new ones; a port and a URL are as before, and named."""
    former = settings(http_api={"key": "old"}, client={"channel_limit": 5}, http_server={"port": 8001})
    wished = settings(
        http_api={"key": "new"},
        client={"allowed_origins": ["https://a.example"], "token": {"hmac_secret_key": "k"}, "ping_interval": "50s"},
        http_server={"port": 8002},
        mongo={"url": "mongodb://user:secret@host/"},
        channel={"namespaces": [{"name": "chat"}]},
    )
    taken, changed, waiting = renewed(former, wished)
    assert changed == [
        "client.allowed_origins",
        "client.channel_limit",
        "client.token",
        "channel.namespaces.chat",
        "http_api.key",
    ]
    assert waiting == ["http_server.port", "client.ping_interval", "mongo.url"]
    assert (taken.http_api.key, taken.client.channel_limit) == ("new", 128)
    assert (taken.http_server.port, taken.mongo.url) == (8001, "")
    assert taken.configured
    assert "secret" not in str(changed + waiting)


def test_a_namespace_is_taken_whole() -> None:
    """Added, changed and removed ones are named; one that asks a proxy, or no longer does, waits as it was."""
    former = settings(
        channel={
            **ENDPOINT,
            "namespaces": [
                {"name": "same"},
                {"name": "gone"},
                {"name": "other"},
                {"name": "asked", "subscribe_proxy_enabled": True},
            ],
        }
    )
    wished = settings(
        channel={
            **ENDPOINT,
            "namespaces": [
                {"name": "new"},
                {"name": "other", "presence": True},
                {"name": "same"},
                {"name": "asked", "presence": True},
                {"name": "asking", "subscribe_proxy_enabled": True},
            ],
        }
    )
    taken, changed, waiting = renewed(former, wished)
    assert changed == [f"channel.namespaces.{name}" for name in ("new", "other", "gone")]
    assert waiting == [f"channel.namespaces.{name} (its proxies)" for name in ("asked", "asking")]
    by_name = {namespace.name: namespace for namespace in taken.channel.namespaces}
    assert set(by_name) == {"new", "other", "same", "asked"}
    assert by_name["other"].presence
    assert by_name["asked"] == former.channel.namespaces[3]
    assert contradictions(taken) == []


def test_what_holds_together_is_judged_together() -> None:
    """Of two options that belong together one may wait: what comes of it is looked at again."""
    former = settings(client={"ping_interval": "10s", "pong_timeout": "5s"})
    mixed = former.model_copy(update={"client": former.client.model_copy(update={"pong_timeout": 20.0})})
    assert [fault.name for fault in contradictions(mixed)] == ["client.pong_timeout"]


def test_the_end_of_the_try_out_is_no_surprise() -> None:
    """Whoever configures a server that was open to all, or no longer does, is told to start it anew."""
    open_to_all, closed = settings(), settings(http_api={"key": "k"})
    for former, wished in ((open_to_all, closed), (closed, open_to_all)):
        taken, changed, waiting = renewed(former, wished)
        assert (taken, changed, len(waiting)) == (former, [], 1)


@pytest.mark.parametrize("option", sorted(LATER))
def test_what_is_looked_at_later_ends_nothing(option: str) -> None:
    """Rights to publish and read, and how long is kept, hold for the next deed; subscriptions go on."""
    kept = ChannelOptions(history_size=10, history_ttl="1h")  # type: ignore[arg-type]
    values = {"history_size": 20, "history_ttl": 60.0, "history_meta_ttl": 7200.0, "publication_data_format": "json"}
    value = values.get(option, 5 if option.endswith("_limit") else True)
    changed = kept.model_copy(update={option: value})
    assert changed != kept
    assert same_terms(kept, changed)


@pytest.mark.parametrize("option", sorted(ChannelOptions.model_fields.keys() - LATER))
def test_what_was_agreed_is_agreed_anew(option: str) -> None:
    """Who may subscribe, and what they then get: a subscription on other terms ends."""
    options = ChannelOptions(history_size=10, history_ttl="1h")  # type: ignore[arg-type]
    now = getattr(options, option)
    other: Any = not now if isinstance(now, bool) else f"{now}x" if isinstance(now, str) else (*now, "fossil")
    assert not same_terms(options, options.model_copy(update={option: other}))


def test_kept_or_passing_is_another_thing() -> None:
    """A channel that keeps nothing any more, or now does, has no positions in common with what it was."""
    kept = ChannelOptions(history_size=10, history_ttl="1h")  # type: ignore[arg-type]
    passing = kept.model_copy(update={"history_size": 0, "history_ttl": 0.0})
    assert not same_terms(kept, passing)
    assert not same_terms(passing, kept)
