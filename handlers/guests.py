"""``POST /v1/session``: a name in, a guest's token out; PROTOCOL 8.6."""

import math
import secrets
import time
from collections.abc import Callable, Sequence

import msgspec

from handlers.cors import CorsHandler
from handlers.origins import Network
from handlers.refusals import Refusals
from server.guests import Guests
from server.limits import Buckets
from server.node import Node
from server.observe import event
from server.settings import Settings

BODY_BYTES = 16_384
"""A name and a former token need a few hundred bytes."""


class Wish(msgspec.Struct):
    """Who wants to be a guest; ``token`` is the one they had, if any."""

    name: str
    token: str = ""


class Reception:
    """What all requests for a session share."""

    def __init__(self, node: Node, trusted_proxies: Sequence[Network]) -> None:
        self.node = node
        self._make(node.settings)()
        node.renewals.append(self._make)
        self.trusted_proxies = trusted_proxies
        self.refusals = Refusals(time.monotonic)

    def _make(self, settings: Settings) -> Callable[[], None]:
        """See ``Node.renewals``."""
        guests, buckets = Guests(settings, lambda: secrets.token_hex(12)), Buckets(settings.guests.rate_limit)

        def commit() -> None:
            self.guests, self.buckets = guests, buckets

        return commit


class SessionHandler(CorsHandler):
    """``/v1/session``, for pages of ``client.allowed_origins`` and for whoever is no browser."""

    methods = ("POST",)
    exposed_headers = ("Retry-After",)

    def initialize(self, reception: Reception) -> None:
        """``reception`` knows the rules and who came before."""
        self._reception = reception

    def prepare(self) -> None:
        """403 to pages of other origins; to the others, leave to read whatever the answer is."""
        self.set_header("Cache-Control", "no-store")
        if not self.allow_origin(self._reception.node.settings.client.allowed_origins):
            self._refuse(403, "this origin may not have guests; look at client.allowed_origins")

    def options(self) -> None:
        """A browser's question before it sends JSON from another origin."""
        self.answer_preflight()

    def post(self) -> None:
        """200 with token, user, name and expires_at; 400, 413 or 429 with the reason."""
        reception = self._reception
        wait_s = reception.buckets.take(self._address(), time.monotonic())
        if wait_s:
            self.set_header("Retry-After", str(math.ceil(wait_s)))
            reception.node.counts.note_why("guests.rate_limit")
            self._refuse(429, f"too many guests from this address, try again in {math.ceil(wait_s)} s")
            return
        body = self.request.body
        if len(body) > BODY_BYTES:
            self._refuse(413, f"expected at most {BODY_BYTES} bytes, got {len(body)}")
            return
        try:
            wish = msgspec.json.decode(body, type=Wish)
            guest = reception.guests.welcome(wish.name, wish.token, reception.node.clock())
        except msgspec.ValidationError as error:
            self._refuse(400, f'expected JSON such as {{"name": "Ada"}}: {error}')
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self._refuse(400, 'expected JSON such as {"name": "Ada"}, got something else')
        except ValueError as error:
            self._refuse(400, str(error))
        else:
            event("guest.welcomed", user=guest.user, address=self._address())
            self.answer(guest)

    def _address(self) -> str:
        return self.address_behind(self._reception.trusted_proxies)

    def _refuse(self, status: int, why: str) -> None:
        self._reception.refusals.say("guest.refused", self._address(), status, why=why)
        self.answer({"error": {"code": status, "message": why}}, status)
