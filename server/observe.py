"""What the server tells its operators: the table of log events, and how they are written.

An event has a name in the past tense and fields; its weight is fixed here, and
the README prints the table.  Payloads and tokens are never logged.  Imports
nothing of ours.
"""

import json
import logging
import sys
import time
from collections import Counter
from typing import Any, Literal

DEBUG, INFO, WARNING, ERROR = logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR

EVENTS: dict[str, tuple[int, str]] = {
    "server.started": (INFO, "listening; `address`"),
    "server.divided": (INFO, "health, metrics, console and API are at a port of their own; `address`"),
    "server.open": (WARNING, "nothing is configured, everybody on this machine may do everything; `namespaces`"),
    "settings.reloaded": (INFO, "SIGHUP: settings were read anew; `changed` names what is different now"),
    "settings.waiting": (WARNING, "SIGHUP: what is different but needs a restart; `names`"),
    "settings.faulty": (ERROR, "SIGHUP: settings that cannot hold, so nothing was changed; one for each fault, `why`"),
    "epochs.renewed": (INFO, "new-epochs: all channels begin a new epoch; `count`"),
    "server.stopping": (INFO, "a signal came: not ready from now on, then clients are sent away; `connections`"),
    "server.stopped": (INFO, "all is closed"),
    "server.failed": (ERROR, "could not start; `why`"),
    "sweep.failed": (ERROR, "the once-a-second work raised; with its trace"),
    "connection.opened": (DEBUG, "a transport was opened; `client`, `transport`, `address`"),
    "connection.accepted": (INFO, "connect succeeded; `client`, `user`, `transport`, `address`"),
    "connection.closed": (INFO, "a connection ended; `client`, `user`, and `code`, `reason`, `why` if we ended it"),
    "connection.refused": (
        WARNING,
        "a handshake was refused; `why` names the setting, `address`, `code`, `count`, of a page `origin`",
    ),
    "command.refused": (
        INFO,
        "a command got an error; `client`, `method`, `code`, `why` names the setting; by REST also `address`, `count`",
    ),
    "command.failed": (ERROR, "a command met a fault of ours; `client`, `method`, with its trace"),
    "hook.failed": (ERROR, "a hook raised; `client`, `hook`, `function`, `at` its file and line, with its trace"),
    "hook.overdue": (ERROR, "a hook was cut off; `client`, `hook`, `function`, `at`, `why` names the setting"),
    "hook.misanswered": (ERROR, "a hook's answer is of no use; `client`, `hook`, `function`, `at`, `why`"),
    "proxy.failed": (WARNING, "a back end gave no good answer; `proxy` the setting, `endpoint`, `why`, `failures`"),
    "app.reloading": (INFO, "a file of the app changed, the server starts anew; `path`"),
    "subscription.recovered": (DEBUG, "a subscription caught up; `client`, `channel`, `since`, `top`"),
    "subscription.unrecoverable": (INFO, "its position is gone; `client`, `channel`, `since`, `top`, `floor`"),
    "subscription.lost": (WARNING, "history was trimmed under a subscription; `client`, `channel`"),
    "channel.repaired": (INFO, "a hole was filled from history; `channel`, `offset`, `top`"),
    "channel.repair_failed": (WARNING, "history could not be read, will be tried again; `channel`, `why`"),
    "connection.violated": (INFO, "a peer broke RFC 6455; `code`, `reason`"),
    "history.commit_failed": (WARNING, "publications could not be stored, publishers get error 100; `path`, `error`"),
    "history.commit_recovered": (INFO, "storing works again; `path`"),
    "history.read_failed": (WARNING, "history could not be read; `path`, `error`"),
    "history.read_recovered": (INFO, "reading works again; `path`"),
    "history.batch_failed": (ERROR, "a fault of ours while storing; `path`, with its trace"),
    "history.listener_failed": (ERROR, "a fault of ours while delivering; `channel`, with its trace"),
    "history.document_skipped": (
        WARNING,
        "a document that is not ours stands among ours; `path`, `collection`, `document` its id",
    ),
    "history.unavailable": (WARNING, "history cannot answer; `why`"),
    "blocks.unavailable": (WARNING, "blocks of users cannot be read, the last known hold; `why`"),
    "broker.unavailable": (WARNING, "the broker cannot answer; `why`"),
    "broker.lost": (WARNING, "Redis is away, kept channels are swept from history; `address`, `part`, `why`"),
    "broker.returned": (INFO, "Redis is back; `address`, `part`, `dropped` how many words waited in vain"),
    "broker.overflowed": (WARNING, "Redis takes no words, the oldest that wait are dropped; `address`"),
    "broker.refused": (WARNING, "Redis refuses to publish a word; `address`, `why`"),
    "broker.listener_failed": (ERROR, "a fault of ours while delivering; `channel`, with its trace"),
    "broker.unreadable": (WARNING, "another process said something that is not understood; `why`"),
    "presence.unavailable": (WARNING, "presence cannot answer; `why`"),
    "presence.entered_again": (INFO, "a connection to Redis is new, our members were entered again; `count`"),
    "task.failed": (ERROR, "background work raised; `task`, with its trace"),
    "api.called": (
        INFO,
        "a back end did something to users or channels; `method`, `by`, `address`, whom and where, `code` 0 if done",
    ),
    "api.served": (DEBUG, "a back end read or published; as `api.called`"),
    "api.refused": (WARNING, "the back-end API was called without its key; `address`, `why`"),
    "admin.entered": (INFO, "somebody logged in to the console; `address`"),
    "admin.refused": (WARNING, "somebody without password or token wanted in; `address`, `status`, `why`"),
    "admin.called": (INFO, "somebody changed something in the console; as `api.called`"),
    "guest.welcomed": (INFO, "a guest got a token; `user`, `address`"),
    "guest.refused": (INFO, "a guest got no token; `address`, `code`, `why`, `count`"),
    "http.failed": (ERROR, "a request met a fault of ours; `path`, with its trace"),
    "http.unread": (INFO, "an answer was not taken in time, its connection was cut; `path`"),
    "log.unstructured": (WARNING, "a library spoke; `logger`, `message`"),
}

happened: Counter[str] = Counter()
"""How often each event happened in this process, logged or not."""

_logger = logging.getLogger("waterspout")


def event(name: str, /, *, fault: BaseException | None = None, **fields: Any) -> None:
    """Log one event of the table with its fields; ``fault`` adds the trace."""
    weight = EVENTS[name][0]
    happened[name] += 1
    if _logger.isEnabledFor(weight):
        _logger.log(weight, name, extra={"fields": fields}, exc_info=fault)


class TextFormatter(logging.Formatter):
    """One line an event: time, weight, name, ``field=value`` …; a trace follows on its own lines."""

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging.Formatter.format``."""
        name, fields = _parts(record)
        words = [time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)), record.levelname.lower(), name]
        words += [f"{key}={_quoted(value)}" for key, value in fields.items()]
        line = " ".join(words)
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time`` (Unix s), ``level``, ``event``, the fields, and ``trace`` if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging.Formatter.format``."""
        name, fields = _parts(record)
        entry = {"time": round(record.created, 3), "level": record.levelname.lower(), "event": name, **fields}
        if record.exc_info:
            entry["trace"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def _parts(record: logging.LogRecord) -> tuple[str, dict[str, Any]]:
    fields = getattr(record, "fields", None)
    if fields is not None:
        return record.getMessage(), fields
    if record.name == "waterspout" or record.name.startswith("waterspout."):
        return record.getMessage(), {}
    return "log.unstructured", {"logger": record.name, "message": record.getMessage()}


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text) if not text or any(c in ' "=\n\r\t' or not c.isprintable() for c in text) else text


def configure(level: str, format: Literal["text", "json"]) -> None:
    """Write the process's log to standard error from ``level`` (``debug``, ``info``, ``warn``, ``error`` …) up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    set_level(level)
    logging.getLogger("tornado.access").setLevel(logging.ERROR)


def set_level(level: str) -> None:
    """Write events from ``level`` up, from now on."""
    _logger.setLevel(_WEIGHTS[level])


_WEIGHTS = {
    "trace": DEBUG,
    "debug": DEBUG,
    "info": INFO,
    "warn": WARNING,
    "warning": WARNING,
    "error": ERROR,
    "fatal": logging.CRITICAL,
    "none": logging.CRITICAL + 1,
}
