"""``redis.url``: what it may say, and what an operator is told when it says something else."""

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from server.redis import Address, Kind, Server, Wire, misfit, parse
from server.settings import RedisSettings


def test_one_redis() -> None:
    """Host, port, database, user and password are read; what is left out has Redis's defaults."""
    assert parse("redis://cache") == Address(Kind.ALONE, (Server("cache", 6379),))
    assert parse("redis://127.0.0.1:7000/3") == Address(Kind.ALONE, (Server("127.0.0.1", 7000),), db=3)
    assert parse("redis://[::1]:7000/") == Address(Kind.ALONE, (Server("::1", 7000),))
    assert parse("redis://:secret@h:1") == Address(Kind.ALONE, (Server("h", 1),), password="secret")
    assert parse("rediss://ann:p%40ss%2Fw@h") == Address(
        Kind.ALONE, (Server("h", 6379),), user="ann", password="p@ss/w", tls=True
    )


def test_sentinels() -> None:
    """The servers are Sentinels, as many as there are; their login is apart from that of Redis."""
    assert parse("redis+sentinel://s1?sentinel_master_name=mymaster") == Address(
        Kind.SENTINEL, (Server("s1", 26379),), master="mymaster"
    )
    url = (
        "rediss+sentinel://u:p@s1:1/2?addr=s2:2&sentinel_master_name=m&addr=s3"
        "&sentinel_user=watch&sentinel_password=d%26g"
    )
    assert parse(url) == Address(
        Kind.SENTINEL,
        (Server("s1", 1), Server("s2", 2), Server("s3", 26379)),
        db=2,
        user="u",
        password="p",
        tls=True,
        master="m",
        sentinel_user="watch",
        sentinel_password="d&g",
    )


def test_cluster() -> None:
    """Some nodes of a cluster; it has no databases but 0."""
    assert parse("redis+cluster://a:1/0?addr=b:2&addr=c") == Address(
        Kind.CLUSTER, (Server("a", 1), Server("b", 2), Server("c", 6379))
    )
    assert parse("rediss+cluster://a").tls


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", 'expected it to begin with "redis://"'),
        ("http://h:1", 'expected it to begin with "redis://"'),
        ("redis+other://h:1", 'expected it to begin with "redis://"'),
        ("redis://", "expected one host:port with a port from 1 to 65535 after redis://"),
        ("redis://:1", "expected one host:port"),
        ("redis://h:port", "expected one host:port"),
        ("redis://h:0", "expected one host:port"),
        ("redis://h:70000", "expected one host:port"),
        ("redis://a:1,b:2", "expected one host:port"),
        ("redis+cluster://a:1,b:2", "further ones as addr=host:port"),
        ("redis+cluster://a:1?addr=", 'after "addr="'),
        ("redis+cluster://a:1?addr=user@b:2", 'after "addr="'),
        ("redis+cluster://a:1?addr=b:2/1", 'after "addr="'),
        ("redis://h:1/one", "expected a database number such as /0"),
        ("redis://h:1/1/2", "expected a database number such as /0"),
        ("redis+cluster://h:1/1", "a Redis Cluster has only that one"),
        ("redis+sentinel://h:1", "expected ?sentinel_master_name=NAME"),
        ("redis+sentinel://h:1?sentinel_master_name=", "expected ?sentinel_master_name=NAME"),
        ("redis+sentinel://h:1?sentinel_master_name=a&sentinel_master_name=b", "once, found it twice"),
        ("redis://h:1?addr=b:2", 'expected no options with redis://, found "addr"'),
        (
            "redis+cluster://h:1?sentinel_master_name=m",
            'expected one of the options addr with redis+cluster://, found "',
        ),
        ("redis://h:1?io_timeout=1s", "expected no options with redis://, found another one"),
        ("redis://:sec#ret@h:1", "# as %23"),
        ("redis://:sec/ret@h:1", "write / as %2F"),
        ("redis://:sec?ret@h:1", "? as %3F"),
        ("redis://:sec[ret@h:1", "[ as %5B"),
        ("redis://:sec℀ret@h:1", "found something else"),
    ],
)
def test_what_is_wrong_is_said(url: str, said: str) -> None:
    """The words name the setting and what was expected, and show nothing that may belong to a password."""
    with pytest.raises(ValueError, match=r"^redis\.url: ") as raised:
        parse(url)
    words = str(raised.value)
    assert said in words
    assert not any(part in words for part in ("sec", "ret@", "℀"))


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


@given(names, names, st.sampled_from(["redis", "rediss", "redis+cluster", "redis+sentinel"]))
def test_a_login_comes_through_and_is_never_shown(user: str, password: str, scheme: str) -> None:
    """Any user and password, percent-encoded, are read as they are; ``text`` and the repr show neither password."""

    def url(password: str) -> str:
        secret = quote(password, safe="")
        options = f"?sentinel_master_name=m&sentinel_password={secret}" if "sentinel" in scheme else ""
        return f"{scheme}://{quote(user, safe='')}:{secret}@h:1{options}"

    address = parse(url(password))
    assert (address.user, address.password) == (user, password)
    assert address.text == f"{scheme}://h:1" + ("?sentinel_master_name=m" if "sentinel" in scheme else "")
    assert repr(address) == repr(parse(url("other")))


@given(st.text(max_size=60))
def test_whatever_the_url_it_is_read_or_refused(text: str) -> None:
    """No text raises anything but ``ValueError``, and ``text`` of what is read says the same address again."""
    for url in (text, f"redis://{text}", f"redis+cluster://{text}", f"redis+sentinel://h?sentinel_master_name={text}"):
        try:
            address = parse(url)
        except ValueError as error:
            assert str(error).startswith("redis.url: ")  # noqa: PT017  (any text may be refused, or not)
            continue
        assert parse(address.text).servers == address.servers


def test_what_settings_let_through_is_what_is_read() -> None:
    """The scheme that the settings ask for is the one that is read."""
    for scheme in ("redis", "rediss", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster"):
        url = f"{scheme}://h:1" + ("?sentinel_master_name=m" if "sentinel" in scheme else "")
        assert parse(RedisSettings(url=url).url).servers[0] == Server("h", 1)
    with pytest.raises(ValidationError):
        RedisSettings(url="redis+other://h:1")


def greeted(mode: str, role: str, version: tuple[int, ...]) -> Wire:
    """A connection to a server that has said this of itself."""
    wire = Wire(None, Server("h", 1))  # type: ignore[arg-type]  # nothing is sent
    wire.mode, wire.role, wire.version = mode, role, version
    return wire


@pytest.mark.parametrize(
    ("kind", "mode", "role", "version", "said"),
    [
        (Kind.ALONE, "standalone", "master", (6, 2, 0), ""),
        (Kind.ALONE, "standalone", "master", (7, 0, 15), ""),
        (Kind.CLUSTER, "cluster", "master", (7, 0), ""),
        (Kind.CLUSTER, "cluster", "replica", (8, 0), ""),
        (Kind.ALONE, "standalone", "master", (6, 0, 16), "a Redis of version 6.2 or newer at h:1, found 6.0.16"),
        (Kind.CLUSTER, "cluster", "master", (6, 2, 7), "a Redis Cluster of version 7.0 or newer at h:1, found 6.2.7"),
        (Kind.ALONE, "standalone", "replica", (7, 0), "expected a primary at h:1, found a replica"),
        (Kind.SENTINEL, "standalone", "replica", (7, 0), "expected a primary at h:1, found a replica"),
        (Kind.ALONE, "cluster", "master", (7, 0), 'write "redis+cluster://"'),
        (Kind.SENTINEL, "cluster", "master", (7, 0), 'write "redis+cluster://"'),
        (Kind.CLUSTER, "standalone", "master", (7, 0), 'write "redis://"'),
        (Kind.ALONE, "sentinel", "", (7, 0), 'write "redis+sentinel://"'),
    ],
)
def test_a_server_that_is_not_what_the_url_says(
    kind: Kind, mode: str, role: str, version: tuple[int, ...], said: str
) -> None:
    """What a server says of itself is held against the URL, and the words tell what to write instead."""
    found = misfit(kind, greeted(mode, role, version))
    assert said in found
    assert bool(said) == bool(found)


def test_a_sentinel_that_is_none() -> None:
    """Where a Sentinel is expected, a Redis is not taken for one."""
    assert 'write "redis://"' in misfit(Kind.SENTINEL, greeted("standalone", "master", (7, 0)), as_sentinel=True)
    assert misfit(Kind.SENTINEL, greeted("sentinel", "", (6, 2)), as_sentinel=True) == ""
