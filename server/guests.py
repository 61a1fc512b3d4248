"""Guests: users with a name before anyone has written a login; PROTOCOL 8.6.

A guest is a random user id and a name of their own choice, signed into a token
like any other.  The name is for people to read: two guests may bear the same one,
so nothing is ever decided by it.  Whoever shows the token of a guest gets another
one for the same user, under the old name or a new one; the token of anybody else
is worth nothing here, or it could be prolonged for ever by who has stolen it.

Pure but for ``kept_key``, which reads and writes the file that it is given; time
and chance come as arguments.
"""

import os
import re
import tempfile
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec

from server.auth import KeyWanted, TokenExpired, TokenInvalid, Verifier, sign
from server.errors import Unavailable
from server.settings import Settings

NAME_CHARACTERS = 32
KEY_BYTES = 32
KEY = re.compile(rf"[0-9a-f]{{{2 * KEY_BYTES}}}")
_META = {"guest": True}

# --- names --------------------------------------------------------------------
_JOINERS = "\u200c\u200d"
_BETWEEN = rf"[^\x00-\x7f\s{_JOINERS}]"
_STRAY_JOINER = re.compile(rf"(?<!{_BETWEEN})[{_JOINERS}]|[{_JOINERS}](?!{_BETWEEN})")
_BLANKS = {ord(blank): " " for blank in "\u115f\u1160\u2800\u3164\uffa0"}
"""Characters that are letters or symbols by their category, and nothing to the eye."""


def clean_name(text: str) -> str:
    """Give a name as it may be shown, of 1 to 32 characters; raises ``ValueError`` with what is wrong.

    Unicode's compatibility form (NFKC), without characters that control text or
    its direction, hide in it, or belong to nobody; white space folded.  Joiners
    stay where they join (emoji, Persian), never beside ASCII.
    """
    text = _stripped(unicodedata.normalize("NFKC", _stripped(text)))
    text = unicodedata.normalize("NFKC", _STRAY_JOINER.sub("", text))
    text = " ".join(text.translate(_BLANKS).split())
    while text and (text[0].isspace() or unicodedata.category(text[0])[0] == "M"):
        text = text[1:]  # an accent that no letter bears would stand on what comes before the name
    text = _STRAY_JOINER.sub("", text)
    if not text:
        raise ValueError("a name needs at least one character that can be seen")
    if len(text) > NAME_CHARACTERS:
        raise ValueError(f"a name has at most {NAME_CHARACTERS} characters, this one has {len(text)}")
    return text


def _stripped(text: str) -> str:
    kept = []
    for character in text:
        if character.isspace():
            kept.append(" ")
        elif unicodedata.category(character)[0] != "C" or character in _JOINERS:
            kept.append(character)
    return "".join(kept)


# --- tokens -----------------------------------------------------------------------
class Guest(msgspec.Struct, frozen=True):
    """What a guest is told; ``expires_at`` is in Unix seconds, and the end of ``token``."""

    token: str
    user: str
    name: str
    expires_at: int


class Guests:
    """Signs guests in by ``client.token.hmac_secret_key``, for ``guests.ttl``.

    ``random_id`` gives text that nobody can guess and that never comes twice.
    Raises ``ValueError`` without that key.
    """

    def __init__(self, settings: Settings, random_id: Callable[[], str]) -> None:
        self._tokens = settings.client.token
        if not self._tokens.hmac_secret_key:
            raise ValueError("guests.enabled: expected client.token.hmac_secret_key, or settings made by with_key")
        self._ttl_s = settings.guests.ttl
        self._verifier = Verifier(self._tokens)
        self._random_id = random_id

    def welcome(self, name: str, former: str, now: float) -> Guest:
        """A token for ``name``; the user is that of the guest's token ``former`` ("" for none), or a new one.

        ``former`` may have run out, though not for longer than it was good.
        Raises ``ValueError`` for a name that cannot be one.
        """
        name = clean_name(name)
        user = self._known(former, now) or f"guest-{self._random_id()}"
        expires_at = int(now + self._ttl_s)
        claims: dict[str, Any] = {
            self._tokens.user_id_claim or "sub": user,
            "exp": expires_at,
            "iat": int(now),
            "info": {"name": name},
            "meta": _META,
        }
        if self._tokens.audience:
            claims["aud"] = self._tokens.audience
        if self._tokens.issuer:
            claims["iss"] = self._tokens.issuer
        return Guest(sign(self._tokens.hmac_secret_key, claims), user, name, expires_at)

    def _known(self, former: str, now: float) -> str:
        if not former:
            return ""
        try:
            claims = self._verifier.connection(former, now - self._ttl_s)
        except (TokenInvalid, TokenExpired, KeyWanted):
            return ""
        return claims.user if claims.meta is not None and msgspec.json.decode(claims.meta) == _META else ""


# --- the key of a server that nobody has configured -----------------------------------
def with_key(settings: Settings, random_key: Callable[[], str]) -> Settings:
    """The settings with a key to sign guests by, where there is none yet.

    Beside the database it outlives a restart, as what the guests said does; with
    history in memory, it ends with the process.  Raises ``Unavailable``.
    """
    client = settings.client
    if not settings.guests.enabled or client.token.hmac_secret_key:
        return settings
    path = settings.sqlite.path
    key = random_key() if path == ":memory:" else kept_key(f"{path}.key", random_key)
    token = client.token.model_copy(update={"hmac_secret_key": key})
    return settings.model_copy(update={"client": client.model_copy(update={"token": token})})


def kept_key(path: str, random_key: Callable[[], str]) -> str:
    """The key in the file ``path``, which is made if it is not there, for its owner's eyes only.

    ``random_key`` gives 64 hexadecimal digits.  The file comes into being whole,
    so that a crash leaves a key or none, and of two processes the second takes
    the first one's.  Raises ``Unavailable`` with the reason.
    """
    try:
        with suppress(FileNotFoundError):
            return _read_key(path)
        handle, made = tempfile.mkstemp(prefix=f"{os.path.basename(path)}.", dir=os.path.dirname(path) or ".")
        try:
            with open(handle, "w") as file:
                file.write(random_key() + "\n")
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):
                os.link(made, path)
        finally:
            os.unlink(made)
        return _read_key(path)
    except OSError as error:
        raise Unavailable(f"the key for guests cannot be kept in {path}: {error.strerror}") from error


def _read_key(path: str) -> str:
    with open(path, encoding="ascii", errors="replace") as file:
        key = file.read(4 * KEY_BYTES).strip()
    if not KEY.fullmatch(key):
        raise Unavailable(
            f"{path} holds no key for guests ({2 * KEY_BYTES} hexadecimal digits); remove it, and those "
            "who are guests now will be new ones"
        )
    return key
