"""Settings of proxies (PROTOCOL 16): what is right alone and wrong together, and what cannot be."""

import json
from typing import Any

import pytest

from server.configuration import SettingsError, load
from server.settings import Settings, without_secrets

URL = "http://127.0.0.1:3000/"


def read(**sections: Any) -> Settings:
    """The settings that these flags make."""
    return load(config=None, environ={}, flags=sections)


def faults(**sections: Any) -> dict[str, tuple[str, str]]:
    """What is expected and found, by name, of all that is wrong."""
    with pytest.raises(SettingsError) as caught:
        read(**sections)
    return {fault.name: (fault.expected, fault.found) for fault in caught.value.faults}


def connect(**options: Any) -> dict[str, Any]:
    """A connect proxy with these options."""
    return {"client": {"proxy": {"connect": {"enabled": True, "endpoint": URL, **options}}}}


@pytest.mark.parametrize("event", ["connect", "refresh"])
def test_an_enabled_proxy_needs_an_endpoint(event: str) -> None:
    """Whoever is to be asked must have an address."""
    found = faults(client={"proxy": {event: {"enabled": True}}})
    assert found == {f"client.proxy.{event}.endpoint": ("a URL, since it is enabled", "nothing")}


@pytest.mark.parametrize("event", ["subscribe", "publish", "sub_refresh"])
def test_a_namespace_needs_its_proxy(event: str) -> None:
    """A namespace that asks names a proxy that there is, its own event's or an entry of the list."""
    for channel, name in (
        ({"without_namespace": {f"{event}_proxy_enabled": True}}, "channel.without_namespace"),
        ({"namespaces": [{"name": "chat", f"{event}_proxy_enabled": True}]}, "channel.namespaces.0"),
    ):
        (found,) = faults(channel=channel)
        assert found == f"{name}.{event}_proxy_enabled"
        assert read(channel={**channel, "proxy": {event: {"endpoint": URL}}}).configured
    chosen = {"namespaces": [{"name": "chat", f"{event}_proxy_enabled": True, f"{event}_proxy_name": "other"}]}
    assert faults(channel=chosen) == {
        f"channel.namespaces.0.{event}_proxy_name": ("the name of an entry of proxies", "'other'")
    }
    assert read(channel=chosen, proxies=[{"name": "other", "endpoint": URL}]).configured


def test_procedures_need_their_proxy() -> None:
    """The same for remote procedures, whose namespaces have names of their own."""
    assert set(faults(rpc={"without_namespace": {"proxy_enabled": True}})) == {"rpc.without_namespace.proxy_enabled"}
    assert set(faults(rpc={"namespaces": [{"name": "sun"}, {"name": "sun"}]})) == {"rpc.namespaces.1.name"}
    assert set(faults(rpc={"namespaces": [{"name": "a.b"}], "namespace_boundary": "."})) == {"rpc.namespaces.0.name"}


def test_entries_of_the_list() -> None:
    """Each has an address and a name that no other has, "default" being taken."""
    found = faults(
        proxies=[
            {"name": "aa", "endpoint": URL},
            {"name": "aa", "endpoint": URL},
            {"name": "default"},
            {"endpoint": URL},
        ]
    )
    assert found["proxies.1.name"] == ("a name that proxies.0.name has not", "'aa'")
    assert found["proxies.3.name"][1] == "nothing"
    assert set(faults(proxies=[{"name": "default"}])) == {"proxies.0.name", "proxies.0.endpoint"}


@pytest.mark.parametrize("endpoint", ["grpc://127.0.0.1:3000", "127.0.0.1:3000", "ftp://a/b", 5])
def test_an_endpoint_is_http(endpoint: object) -> None:
    """Nothing else is spoken."""
    assert set(faults(**connect(endpoint=endpoint))) == {"client.proxy.connect.endpoint"}


@pytest.mark.parametrize("names", [["a b"], [""], ["Content-Length"], ["X-Good", "host"], "Cookie"])
@pytest.mark.parametrize("option", ["http_headers", "emulated_headers"])
def test_headers_that_cannot_be_passed_on(option: str, names: object) -> None:
    """What is no header's name, and what a request has of its own, is refused when the configuration is read."""
    assert set(faults(**connect(**{option: names}))) == {f"client.proxy.connect.{option}"}


@pytest.mark.parametrize("headers", [{"X A": "b"}, {"X-A": "b\nc"}, {"X-A": 1}, {"Host": "h"}, ["X-A"], "X-A: b"])
def test_static_headers_that_cannot_be(headers: object) -> None:
    """A fault in one of them names the option, and tells nothing of a value."""
    (found,) = faults(**connect(http={"static_headers": headers})).items()
    assert found[0] == "client.proxy.connect.http.static_headers"
    assert found[1][1] in ("an object", "a list", "a string")


def test_static_headers_are_kept_secret() -> None:
    """They may hold a key for the back end, so that they are not shown; a variable may give them as JSON."""
    variable = {"WATERSPOUT_CLIENT__PROXY__CONNECT__HTTP__STATIC_HEADERS": '{"X-Key": "sesame"}'}
    settings = load(config=None, environ=variable, flags=connect())
    assert settings.client.proxy.connect.http.static_headers == {"X-Key": "sesame"}
    assert "sesame" not in json.dumps(without_secrets(settings))
    assert "sesame" not in repr(settings)


@pytest.mark.parametrize(
    ("transform", "place"),
    [
        ({"to_error": {"code": 400, "message": "m"}}, "status_code"),
        ({"status_code": 200, "to_error": {"code": 400, "message": "m"}}, "status_code"),
        ({"status_code": 404}, ""),
        ({"status_code": 404, "to_error": {"code": 4, "message": "m"}}, "to_error"),
        ({"status_code": 404, "to_error": {"code": 404}}, "to_error"),
        ({"status_code": 404, "to_disconnect": {"code": 4004}}, "to_disconnect"),
        ({"status_code": 404, "to_disconnect": {"code": 1000, "reason": "r"}}, "to_disconnect"),
        (
            {
                "status_code": 404,
                "to_error": {"code": 404, "message": "m"},
                "to_disconnect": {"code": 4004, "reason": "r"},
            },
            "",
        ),
        ("404", ""),
    ],
)
def test_transforms_that_say_nothing_or_too_much(transform: object, place: str) -> None:
    """Each has a status other than 200, and either an error or a disconnect, whole."""
    above = "client.proxy.connect.http.status_to_code_transforms.0"
    assert set(faults(**connect(http={"status_to_code_transforms": [transform]}))) == {f"{above}.{place}".rstrip(".")}
