"""``/admin``: the console, and what it asks; PROTOCOL 17.6.

The page is like any other, and knows nothing before somebody has logged in.  What
it does it does through the methods of the back-end API (``server/backend.py``),
with a pass in place of the key.  Besides there are what it draws, the settings in
force, and samples of passing channels.

Whoever may come in may do everything that the API may.  So each request shows a
pass by itself, as a bearer token, which no other site's page can make a browser
send; logins are limited for each address; and what changes something is in the log.
"""

import math
import secrets
import time
from collections.abc import Callable, Sequence
from urllib.parse import parse_qs

import msgspec
import tornado.routing
import tornado.web

from handlers.api import ApiHandler
from handlers.asking import read_bearer
from handlers.base import JsonHandler, PageHandler
from handlers.metrics import Process, numbers
from handlers.origins import Network, client_address
from server import __version__
from server.audit import Author, note
from server.backend import METHODS
from server.errors import BAD_REQUEST, METHOD_NOT_FOUND, Refused, Unavailable
from server.limits import Buckets
from server.observe import event
from server.passes import Pass, Passes
from server.sampling import Samples
from server.settings import HttpApiSettings, Settings, without_secrets

LOGINS_A_MINUTE = 10
"""Tries of one address; a password that is no word of a dictionary is then safe for longer than anybody tries."""

LOGIN_BYTES = 4096


class Login(msgspec.Struct):
    """Who wants to come in."""

    password: str


class Watching(msgspec.Struct):
    """Which passing channel is watched, and the number of what was last heard of it."""

    channel: str
    after: int = 0


class Console:
    """What all requests of the console share; without ``admin.secret`` its passes are good for this process only."""

    def __init__(self, process: Process, trusted_proxies: Sequence[Network]) -> None:
        settings = process.node.settings
        self.process = process
        self.node = process.node
        self.prefix = settings.admin.handler_prefix
        self._secret = secrets.token_hex(32)
        self.passes = Passes(settings.admin, self._secret)
        process.node.renewals.append(self.renewal)
        self.buckets = Buckets(LOGINS_A_MINUTE)
        self.samples = Samples(process.node)
        self.trusted_proxies = trusted_proxies

    def renewal(self, settings: Settings) -> Callable[[], None]:
        """See ``Node.renewals``; with another secret, the passes that were given are worth nothing."""
        passes = Passes(settings.admin, self._secret)

        def commit() -> None:
            self.passes = passes

        return commit


class AdminHandler(JsonHandler):
    """What only somebody with a pass may ask."""

    def initialize(self, console: Console) -> None:
        """``console`` is what all requests share."""
        self.console = console

    def prepare(self) -> None:
        """403 for another site's page, 401 without a pass."""
        self.set_header("Cache-Control", "no-store")
        self.set_header("X-Content-Type-Options", "nosniff")
        if self.request.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site"):
            self.turn_away(403, "a page of another site asked")
        elif why := self.refusal():
            self.turn_away(401, why)

    def refusal(self) -> str:
        """Why this request is not let in, ``""`` if it is."""
        try:
            token = read_bearer(self.request.headers.get("Authorization", ""))
        except ValueError as error:
            return f"Authorization: {error}"
        return self.console.passes.refusal(token, self.console.node.clock())

    @property
    def address(self) -> str:
        """Where the request comes from."""
        forwarded_for = self.request.headers.get("X-Forwarded-For", "")
        return client_address(self.request.remote_ip or "", forwarded_for, self.console.trusted_proxies)

    def turn_away(self, status: int, why: str, words: str = "log in first") -> None:
        """Answer with an error; ``why`` is for the log, ``words`` for the page."""
        event("admin.refused", address=self.address, status=status, why=why)
        self.answer({"error": {"code": status, "message": words}}, status)


class ConsolePageHandler(PageHandler):
    """``GET /admin``: the page."""

    def parse_url_path(self, url_path: str) -> str:
        """Its file."""
        return "admin.html"

    def set_extra_headers(self, path: str) -> None:
        """As of any page; and no other may open it in a window of its own making."""
        super().set_extra_headers(path)
        self.set_header("Cross-Origin-Opener-Policy", "same-origin")


class AuthHandler(AdminHandler):
    """``POST /admin/auth``: a password in, a pass out."""

    def refusal(self) -> str:
        """Nobody has a pass yet."""
        return ""

    def post(self) -> None:
        """200 with token and expires_at; 400, 401 or 429 with the reason."""
        console = self.console
        wait_s = console.buckets.take(self.address, time.monotonic())
        if wait_s:
            # Not logged: the ten before it are, and whoever tries on and on shall not fill the log.
            self.set_header("Retry-After", str(math.ceil(wait_s)))
            words = f"too many tries, try again in {math.ceil(wait_s)} s"
            self.answer({"error": {"code": 429, "message": words}}, 429)
            return
        try:
            password = self._password()
        except (ValueError, RecursionError, msgspec.DecodeError):
            self.turn_away(400, "a login that cannot be read", 'expected JSON such as {"password": "…"}')
            return
        if not console.passes.fits(password):
            why = "wrong password" if console.passes.by_password else "admin.password is not set"
            self.turn_away(401, why, why)
            return
        event("admin.entered", address=self.address)
        given: Pass = console.passes.give(console.node.clock())
        self.answer(given)

    def _password(self) -> str:
        """As JSON, or as a form, whatever the headers say; raises ``ValueError`` or ``msgspec.DecodeError``."""
        body = self.request.body
        if len(body) > LOGIN_BYTES:
            raise ValueError("a login of a few bytes was expected")
        if body.lstrip().startswith(b"{"):
            return msgspec.json.decode(body, type=Login).password
        given = parse_qs(body.decode(), strict_parsing=True).get("password")
        if not given:
            raise ValueError("a password was expected")
        return given[0]


class StateHandler(AdminHandler):
    """``GET /admin/state``: what the console draws."""

    def get(self) -> None:
        """200 with this process, its numbers, all processes, and what is in trouble."""
        node = self.console.node
        self.answer(
            {
                "version": __version__,
                "node": node.id,
                "name": node.name,
                "time": node.now_ms,
                "lag": round(node.counts.last_lag_seconds, 6),
                "numbers": numbers(self.console.process),
                "nodes": node.everybody(),
                "troubles": node.parts.troubled,
            }
        )


class SettingsHandler(AdminHandler):
    """``GET /admin/settings``: the settings in force, without secrets."""

    def get(self) -> None:
        """200 with the whole tree."""
        self.answer(without_secrets(self.console.node.settings))


class SampleHandler(AdminHandler):
    """``POST /admin/sample``: what passes through a passing channel."""

    async def post(self) -> None:
        """200 with publications and number; 400 for what is no passing channel, 503 when it cannot be followed."""
        node = self.console.node
        try:
            asked = msgspec.json.decode(self.request.body, type=Watching)
            namespace = node.channels.known(asked.channel)
            node.channels.check_name(asked.channel, namespace)
            if namespace.kept:
                raise Refused(BAD_REQUEST, "a kept channel is watched by its history")
            heard = await self.console.samples.after(asked.channel, namespace, asked.after)
        except Refused as refused:
            self.answer({"error": {"code": refused.refusal.code, "message": refused.why or str(refused)}}, 400)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self.answer({"error": {"code": 400, "message": "expected JSON with a channel"}}, 400)
        except Unavailable as error:
            self.answer({"error": {"code": 503, "message": str(error)}}, 503)
        else:
            self.answer(heard)


class CallHandler(AdminHandler, ApiHandler):
    """``POST /admin/api/<method>``: the back-end API, with a pass in place of its key."""

    def initialize(self, console: Console) -> None:  # type: ignore[override]  # the key is not asked for
        """``console`` is what all requests share."""
        AdminHandler.initialize(self, console)
        ApiHandler.initialize(self, console.node)

    async def post(self, method: str) -> None:
        """Carry out one call; PROTOCOL 15.1."""
        if method not in METHODS:
            note(self._author, method, None, METHOD_NOT_FOUND.code)
        await super().post(method)

    @property
    def _author(self) -> Author:
        """See ``ApiHandler``."""
        return Author("console", self.address)

    @property
    def _settings(self) -> HttpApiSettings:
        return HttpApiSettings()  # none of the API's own: errors are in a 200 body


def admin_routes(console: Console, static: str) -> list[tornado.routing.Rule]:
    """The paths of the console; ``static`` is where its page lies."""
    prefix = console.prefix
    options = {"console": console}
    return [
        tornado.web.url(rf"{prefix}()/?", ConsolePageHandler, {"path": static}),
        tornado.web.url(rf"{prefix}/auth", AuthHandler, options),
        tornado.web.url(rf"{prefix}/state", StateHandler, options),
        tornado.web.url(rf"{prefix}/settings", SettingsHandler, options),
        tornado.web.url(rf"{prefix}/sample", SampleHandler, options),
        tornado.web.url(rf"{prefix}/api/(\w+)", CallHandler, options),
    ]
