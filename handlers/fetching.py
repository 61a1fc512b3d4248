"""How back ends are asked: Tornado's HTTP client, behind the seam that ``server.proxies`` has for it.

Each request is a connection of its own, since Tornado's client keeps none: 750 µs of
our one core, 2,200 with TLS, where a kept one would cost 250.  Tried and dropped: a
client of our own that keeps them; a question that meets the other side's goodbye is
then lost, and a publish must not be asked twice.  Names are looked up in a thread.
"""

import asyncio
import time

import tornado.httpclient
from tornado.httpclient import HTTPResponse
from tornado.iostream import UnsatisfiableReadError

from server.errors import Unavailable
from server.proxies import Post, Proxies, Response
from server.settings import Settings

HEADER_BYTES = 65_536

OURS = frozenset(
    [
        "connection",
        "content-length",
        "expect",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    ]
)
"""Headers that are about one connection (RFC 9110 7.6.1) or one message: whoever lists them to be passed on errs."""

CONNECTIONS = 4_096
"""More than endpoints have places for: it is they who keep others from waiting for one that hangs."""


async def answer_to(asked: asyncio.Future[HTTPResponse]) -> HTTPResponse:
    """What comes of a request of Tornado's; whoever is cancelled gives up waiting, and no more.

    Tornado goes on with it all the same, and would log its end as a fault of ours.
    """
    asked.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # nobody else may be there to look
    return await asyncio.shield(asked)


class Fetcher:
    """See ``proxies.Fetch``; an answer may have ``most_bytes``."""

    def __init__(self, *, most_bytes: int) -> None:
        self._client = tornado.httpclient.AsyncHTTPClient(
            force_instance=True,
            defaults={},
            max_clients=CONNECTIONS,
            max_body_size=most_bytes,
            max_buffer_size=most_bytes + HEADER_BYTES,
            max_header_size=HEADER_BYTES,
        )

    async def __call__(self, post: Post) -> Response:
        """Ask, and give the answer of any status; raises ``Unavailable`` if there is none."""
        request = tornado.httpclient.HTTPRequest(
            post.url,
            method="POST",
            headers={name: value for name, value in post.headers.items() if name.lower() not in OURS},
            body=post.body,
            connect_timeout=post.timeout_s,
            request_timeout=post.timeout_s,
            follow_redirects=False,
            decompress_response=False,
        )
        try:
            response = await answer_to(self._client.fetch(request, raise_error=False))
        except (OSError, ValueError, tornado.httpclient.HTTPError, UnsatisfiableReadError) as error:
            raise Unavailable(f"{type(error).__name__}: {error}") from None
        if response.code == NO_ANSWER:
            raise Unavailable(str(response.error or "no answer"))
        return Response(response.code, response.body)


NO_ANSWER = 599
"""Tornado's own status for a request that nobody answered."""


def make_proxies(settings: Settings) -> Proxies:
    """The proxies that the settings name."""
    fetch = Fetcher(most_bytes=settings.client.queue_max_size // 2)  # so that what a back end says fits into a reply
    return Proxies(settings, fetch, time.monotonic)
