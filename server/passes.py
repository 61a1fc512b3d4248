"""Who may use the console: a password is exchanged for a pass, a token that is good for some hours; PROTOCOL 17.6.

A pass is a JWT like any other, but with a key and an audience of its own
(``AUDIENCE``), so that no token of a client opens the console, also where somebody
gave both the same key.  Who knows ``admin.secret`` can sign passes elsewhere: a
single sign-on, say.

Tried and dropped: a cookie.  A browser sends it unasked, with whatever another
site's page makes it request; a bearer token is sent by our page alone, so there is
nothing to forge.  The page keeps it for its tab.

Pure: time and chance come as arguments.
"""

import hashlib
import hmac
from collections.abc import Callable

import msgspec

from server.auth import KeyWanted, TokenExpired, TokenInvalid, Verifier, sign
from server.settings import AdminSettings, Settings, TokenSettings

AUDIENCE = "waterspout-console"


class Pass(msgspec.Struct, frozen=True):
    """What somebody who may come in is given; ``expires_at`` in Unix seconds."""

    token: str
    expires_at: int


class Passes:
    """Gives passes and knows them again; ``secret`` signs them where ``admin.secret`` does not."""

    def __init__(self, settings: AdminSettings, secret: str) -> None:
        self._password = _digest(settings.password) if settings.password else None
        self._ttl_s = settings.ttl
        self._secret = settings.secret or secret
        self._verifier = Verifier(TokenSettings(hmac_secret_key=self._secret, audience=AUDIENCE))

    @property
    def by_password(self) -> bool:
        """Is there a password at all?"""
        return self._password is not None

    def fits(self, password: str) -> bool:
        """Is this the password?  Takes as long for any."""
        return self._password is not None and hmac.compare_digest(_digest(password), self._password)

    def give(self, now: float) -> Pass:
        """A pass that is good from ``now`` for ``admin.ttl``."""
        expires_at = int(now + self._ttl_s)
        claims = {"sub": "console", "aud": AUDIENCE, "iat": int(now), "exp": expires_at}
        return Pass(sign(self._secret, claims), expires_at)

    def refusal(self, token: str, now: float) -> str:
        """Why this token opens nothing at ``now``, in words without it; ``""`` if it does open."""
        if not token:
            return "no token"
        try:
            claims = self._verifier.connection(token, now)
        except TokenExpired:
            return "the token has expired"
        except (TokenInvalid, KeyWanted) as error:
            return f"the token is not good: {error}"
        return "" if claims.expire_at else "the token is good for ever, which none may be"


def with_secret(settings: Settings, random_secret: Callable[[], str]) -> Settings:
    """The settings with a key to sign passes by, where there is none yet, so that a link can be given at start."""
    if not settings.admin.enabled or settings.admin.secret:
        return settings
    admin = settings.admin.model_copy(update={"secret": random_secret()})
    return settings.model_copy(update={"admin": admin})


def link(settings: AdminSettings, address: str, now: float) -> str:
    """The console's address with a pass in it, which is behind the ``#`` and never sent to anybody.

    ``address`` is where the server listens, with a slash at the end.
    """
    return f"{address}{settings.handler_prefix.lstrip('/')}#pass={Passes(settings, '').give(now).token}"


def _digest(text: str) -> bytes:
    """Of one length, so that nobody learns that of the password by the clock."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()
