"""How often somebody may read over REST: ``rest.read_rate_limit``; PROTOCOL 17.1.14, 18."""

from typing import Any

from hopper import Reply, ask
from support import Site, serving, settings, token

RATE = 5
READ = "/v1/channels/chat:1/publications"
PRESENCE = "/v1/channels/chat:1/presence"


def limited(**more: Any) -> Any:
    """Settings with so few reads a second that a test is quicker, and a proxy on this machine."""
    return settings(rest={"read_rate_limit": RATE}, http_server={"trusted_proxies": ["127.0.0.0/8"]}, **more)


async def read(site: Site, path: str = READ, *, address: str = "192.0.2.1", user: str | None = None) -> Reply:
    """One read, by that address and perhaps with a token."""
    headers = {"X-Forwarded-For": address}
    if user is not None:
        headers["Authorization"] = f"Bearer {token({'sub': user})}"
    return await ask(site.port, path, headers=headers)


async def _until_refused(site: Site, path: str = READ, **who: Any) -> Reply:
    """Read and read; the answer that is another one, which comes soon."""
    for _ in range(100 * RATE):
        reply = await read(site, path, **who)
        if reply.status != 200:
            return reply
    raise AssertionError("nothing was refused")


async def test_too_many_reads() -> None:
    """Beyond the rate an address gets 429 and the seconds to wait, it is counted, and others read on."""
    async with serving(limited()) as site:
        refused = await _until_refused(site)
        assert refused.status == 429
        assert refused.json["code"] == 111
        assert refused.json["detail"] == f"Expected at most {RATE} reads a second."
        assert int(refused.headers["retry-after"]) == 1
        assert (await read(site, address="192.0.2.2")).status == 200
        assert site.node.counts.limits["rest.read_rate_limit"] == 1


async def test_presence_and_publications_count_together() -> None:
    """A look at who is here is a read like another, and so is a HEAD; an IPv6 host has one bucket for its network."""
    async with serving(limited()) as site:
        for number in range(RATE):
            assert (await read(site, PRESENCE, address=f"2001:db8::{number}")).status == 200
        assert (await _until_refused(site, address="2001:db8::99")).status == 429
        assert (await _until_refused(site, PRESENCE, address="2001:db8::1")).status == 429
        head = {"X-Forwarded-For": "2001:db8::2"}
        statuses = {(await ask(site.port, READ, method="HEAD", headers=head)).status for _ in range(2 * RATE)}
        assert 429 in statuses


async def test_a_user_has_a_rate_of_its_own() -> None:
    """Who has a token is counted as a user, wherever it is; the address and other users have theirs still."""
    async with serving(limited()) as site:
        assert (await _until_refused(site, user="ann")).status == 429
        assert (await _until_refused(site, user="ann", address="192.0.2.2")).status == 429
        assert (await read(site, user="bob")).status == 200
        assert (await read(site)).status == 200


async def test_a_token_that_is_refused_is_no_way_around() -> None:
    """A token that is none counts for the address: 401, and 429 when that has no reads left."""
    async with serving(limited()) as site:
        headers = {"X-Forwarded-For": "192.0.2.1", "Authorization": "Bearer x.y.z"}
        statuses = [(await ask(site.port, READ, headers=headers)).status for _ in range(20 * RATE)]
        assert statuses[0] == 401
        assert statuses.index(429) >= RATE
        assert (await _until_refused(site)).status == 429
        assert (await read(site, address="192.0.2.2")).status == 200


async def test_publishing_is_not_counted_as_reading() -> None:
    """Who has no reads left may publish, which has a rate of its own."""
    async with serving(limited()) as site:
        await _until_refused(site)
        for number in range(3 * RATE):
            published = await ask(site.port, READ, headers={"X-Forwarded-For": "192.0.2.1"}, body={"data": number})
            assert published.status == 201


async def test_without_a_limit() -> None:
    """0 is no limit; and it holds from the next read on when the settings are read again."""
    chosen = limited()
    async with serving(settings(rest={"read_rate_limit": 0})) as site:
        for _ in range(50):
            assert (await read(site, address="127.0.0.1")).status == 200
        site.node.renew(chosen)
        assert (await _until_refused(site)).status == 429
