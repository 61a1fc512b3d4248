"""Who did what to the server's users and channels: one line in the log for each administrative act.

A line says who called (``Author``), the method, whom and where it was meant for, and
what became of it, never a payload.  What reads, and what publishes, is at debug level:
a back end does so all day long.  What somebody does by hand in the console is not.
"""

from typing import Any

import msgspec

from server.observe import event

READING = frozenset(
    ("blocked_users", "channels", "connections", "history", "info", "presence", "presence_stats", "rpc")
)
"""Methods that change nothing."""

PUBLISHING = frozenset(("publish", "broadcast"))
"""Methods that change something, and are what the server is for."""


class Author(msgspec.Struct, frozen=True):
    """Who calls, and from where: ``by`` is "key" (``http_api.key``), "anybody" (``http_api.insecure``) or "console"."""

    by: str = "key"
    address: str = ""


def note(author: Author, method: str, request: object, code: int) -> None:
    """Say what was called, and that it was done (``code`` 0) or with which error it was not; PROTOCOL 15.1.7."""
    if method == "batch":
        return  # each of its commands has a line of its own
    fields: dict[str, Any] = {"method": method[:64], "by": author.by, "address": author.address}
    for name in ("user", "client", "session", "channel", "channels"):
        if value := getattr(request, name, None):
            fields[name] = _shown(name, value)
    fields["code"] = code
    if method in READING:
        event("api.served", **fields)
    elif author.by == "console":
        event("admin.called", **fields)
    elif method in PUBLISHING:
        event("api.served", **fields)
    else:
        event("api.called", **fields)


def _shown(name: str, value: object) -> object:
    """Enough of a field to know what was meant: of a session id, which is a key, only that there was one."""
    if name == "session":
        return "***"
    return len(value) if isinstance(value, list) else str(value)[:256]
