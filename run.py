#!/usr/bin/env python3
"""Waterspout's command line: read the settings, wire the parts, listen, sweep once a second, drain on SIGTERM.

    run.py [--host ADDRESS] [--port PORT] [--config FILE]    run the server
           [--app MODULE[:NAME]] [--reload]                  … with your own Python in it; start anew when that changes
           [--uvloop]                                        … on uvloop's event loop, if it is installed
    run.py check [--config FILE]                             say what is wrong with the settings and with the parts
                                                             they name, or print them
    run.py token --user ID [--channel NAME] [--ttl SECONDS]  sign a token with client.token.hmac_secret_key
    run.py new-epochs [--config FILE]                        start all channels on a new epoch, after a restore

Only here is it chosen what stands behind a seam.
"""

import argparse
import asyncio
import gc
import importlib
import json
import os
import resource
import secrets
import signal
import socket
import ssl
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import tornado.httpclient
import tornado.netutil
import tornado.web

from handlers import make_app, make_internal_app, make_sockets
from handlers.fetching import answer_to
from handlers.server import Server
from handlers.socket import Sockets
from server import auth
from server.app import App, AppError
from server.app import load as load_app
from server.blocks import Blocks
from server.blocks.memory import MemoryBlocks
from server.blocks.sqlite import SqliteBlocks
from server.broker import Broker
from server.broker.memory import MemoryBroker
from server.changes import Changes, files_of
from server.configuration import SettingsError, contradictions, load
from server.errors import Unavailable
from server.guests import KEY_BYTES, with_key
from server.history import History
from server.history.memory import MemoryHistory
from server.history.sqlite import SqliteHistory
from server.jwks import BODY_BYTES, Keys
from server.leaving import Leaving
from server.node import Node
from server.observe import configure, event, set_level
from server.passes import link, with_secret
from server.presence import Presence
from server.presence.memory import MemoryPresence
from server.reload import renewed
from server.session import Gate
from server.settings import HttpServerSettings, Settings, without_secrets

STDIN = 0
SWEEP_S = 1.0
RELOAD_S = 0.5
GOODBYE_S = 2.0
"""How long a client may take over what it is owed once the server is going away."""
MOST_FILES = 1_048_576
COLLECTIONS = 1_000
"""After how many collections of what is not quite new all is looked at; Python has 10."""
BACKLOG = 4096
REQUEST_BYTES = 4 * 1024 * 1024
REQUEST_S = 30.0
"""How large an HTTP request may be, and how long it may take to come: whoever has not shown a key may send one, too."""
FETCH_TIMEOUT_S = 1.5
"""Shorter than the patience of ``Keys``, so that the HTTP client ends its request itself."""


def main(argv: list[str]) -> int:
    """Do what the command line says; returns the exit code."""
    arguments = _parser().parse_args(argv)
    flags: dict[str, Any] = {}
    if arguments.host is not None:
        flags.setdefault("http_server", {})["address"] = arguments.host
    if arguments.port is not None:
        flags.setdefault("http_server", {})["port"] = arguments.port
    try:
        settings = load(config=arguments.config, environ=os.environ, flags=flags)
        check_redis(settings)
    except (SettingsError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.command == "check":
        return _check(settings)
    if arguments.command == "new-epochs":
        return _new_epochs(settings)
    if arguments.command == "token":
        return _print_token(settings, arguments)
    try:
        make_loop = importlib.import_module("uvloop").new_event_loop if arguments.uvloop else None
    except ImportError as error:
        print(f"--uvloop: {error}; pip install uvloop", file=sys.stderr)
        return 2
    return _serve(
        settings,
        arguments.app,
        arguments.reload,
        make_loop,
        lambda: load(config=arguments.config, environ=os.environ, flags=flags),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="run.py", description="Waterspout, a realtime server.")
    shared = argparse.ArgumentParser(add_help=False)
    for one in (parser, shared):
        default = None if one is parser else argparse.SUPPRESS
        one.add_argument("--config", type=Path, metavar="FILE", default=default, help="settings: TOML, YAML or JSON")
        one.add_argument("--host", metavar="ADDRESS", default=default, help="where to listen (http_server.address)")
        one.add_argument("--port", type=int, default=default, help="TCP port to listen on (http_server.port)")
    parser.add_argument("--app", metavar="MODULE[:NAME]", help="your own Python: a module or a file with an App in it")
    parser.add_argument("--reload", action="store_true", help="start anew when one of its files changes")
    parser.add_argument("--uvloop", action="store_true", help="run on uvloop's event loop (benchmarks/README.md)")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="other commands")
    commands.add_parser(
        "check", parents=[shared], help="say every fault of the settings, or print those in force without secrets"
    )
    commands.add_parser(
        "new-epochs",
        parents=[shared],
        help="start all channels on a new epoch, so that clients notice that history was restored from a backup",
    )
    token = commands.add_parser("token", parents=[shared], help="print a token, signed by client.token.hmac_secret_key")
    token.add_argument("--user", required=True, help="the user id (claim sub)")
    token.add_argument("--channel", default="", help="make it a subscription token for this channel")
    token.add_argument("--ttl", type=int, default=3600, metavar="SECONDS", help="how long it is good (default 3600)")
    return parser


def _check(settings: Settings) -> int:
    """Print the settings in force; what is elsewhere (MongoDB, Redis) is tried as the start would."""
    print(json.dumps(without_secrets(settings), indent=2))
    if not settings.mongo.url:
        return 0
    faults = asyncio.run(_try_parts(settings))
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


async def _try_parts(settings: Settings) -> list[str]:
    node = make_node(settings)
    await node.open(patiently=True)
    faults = list(node.parts.troubles.values())
    await node.close()
    return faults


def _new_epochs(settings: Settings) -> int:
    async def begin() -> int:
        history = make_history(settings)
        await history.open()
        try:
            return await history.new_epochs()
        finally:
            await history.close()

    try:
        count = asyncio.run(begin())
    except Unavailable as error:
        print(error, file=sys.stderr)
        return 1
    configure(settings.log.level, settings.log.format)
    event("epochs.renewed", count=count)
    print(f"{count} channels have a new epoch; clients that come back are told that they cannot be recovered")
    return 0


def _print_token(settings: Settings, arguments: argparse.Namespace) -> int:
    tokens = settings.client.token
    name = "client.token.hmac_secret_key"
    if arguments.channel and settings.client.subscription_token.enabled:
        tokens, name = settings.client.subscription_token, "client.subscription_token.hmac_secret_key"
    if not tokens.hmac_secret_key:
        print(f"{name} is not set, so there is nothing to sign a token with; use --config", file=sys.stderr)
        return 2
    now = int(time.time())
    claims: dict[str, Any] = {tokens.user_id_claim or "sub": arguments.user, "exp": now + arguments.ttl, "iat": now}
    if arguments.channel:
        claims["channel"] = arguments.channel
    if tokens.audience:
        claims["aud"] = tokens.audience
    if tokens.issuer:
        claims["iss"] = tokens.issuer
    print(auth.sign(tokens.hmac_secret_key, claims))
    return 0


def _serve(
    settings: Settings,
    module: str | None,
    reload: bool,
    make_loop: Callable[[], asyncio.AbstractEventLoop] | None,
    read_again: Callable[[], Settings],
) -> int:
    configure(settings.log.level, settings.log.format)
    allow_files()
    collect_rarely()
    # Python takes a compiled file for the present one if size and second agree, as they may between two saves.
    sys.dont_write_bytecode = sys.dont_write_bytecode or reload
    try:
        app = None if module is None else load_app(module)
        settings = complete(settings, secrets.token_hex(KEY_BYTES), secrets.token_hex(KEY_BYTES))
        changes = Changes() if reload else None
        with asyncio.Runner(loop_factory=make_loop) as runner:
            changed = runner.run(_run(settings, app, changes, read_again))
        if changed:
            os.execv(sys.executable, sys.orig_argv)
    except AppError as error:
        # What is there now is remembered before the fault is shown, or a quick mending would not be seen.
        changes = Changes(files_of(error) | ({module} if module else set()))
        print(error, file=sys.stderr)
        if not reload:
            return 2
        while (path := changes.look()) is None:
            time.sleep(RELOAD_S)
        event("app.reloading", path=path)
        os.execv(sys.executable, sys.orig_argv)
    except (Unavailable, OSError, ssl.SSLError) as error:
        event("server.failed", why=error)
        return 1
    return 0


def allow_files() -> None:
    """Let this process have as many files open as it may, since each connection is one (``handlers.door``)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def complete(settings: Settings, key: str, secret: str) -> Settings:
    """The settings with what the server makes up where nobody gave it: the guests' key, and the console's secret."""
    return with_secret(with_key(settings, lambda: key), lambda: secret)


def collect_rarely() -> None:
    """Let the collector of cycles look at everything seldom: with 100,000 subscriptions that holds all up for 0.4 s.

    By default it does so whenever a quarter more is there than at the last time, so
    that a client that subscribes and subscribes stops everybody else: for 340 to 812 ms,
    now for 54 in the one run that was made (``make hostile ARGS="--only names"``).  What
    connections leave behind hardly needs it: 3,000 that came and went, and 7,000 that
    were turned away, left 2 MB with and without (November 2026).  The young are looked
    at as ever.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], COLLECTIONS)


# --- wiring ------------------------------------------------------------------
def make_history(settings: Settings) -> History:
    """What stands behind the history seam.

    A driver is imported where it is configured only: together they take a third
    of a second and 25 MB.
    """
    idempotency_ttl_ms = int(settings.channel.idempotency_ttl * 1000)
    if settings.mongo.url:
        from server.history.mongo import MongoHistory

        return MongoHistory(settings.mongo, idempotency_ttl_ms=idempotency_ttl_ms)
    if settings.sqlite.path == ":memory:":
        return MemoryHistory(idempotency_ttl_ms=idempotency_ttl_ms)
    return SqliteHistory(settings.sqlite.path, idempotency_ttl_ms=idempotency_ttl_ms)


def check_redis(settings: Settings) -> None:
    """Read ``redis.url`` as its driver will; raises ``ValueError`` in an operator's words."""
    if settings.redis.url:
        from server.redis import parse

        parse(settings.redis.url)


def make_broker(settings: Settings) -> Broker:
    """What stands behind the broker seam."""
    if settings.redis.url:
        from server.broker.redis import RedisBroker

        return RedisBroker(settings.redis)
    return MemoryBroker()


def make_presence(settings: Settings) -> Presence:
    """What stands behind the presence seam."""
    if settings.redis.url:
        from server.presence.redis import RedisPresence

        return RedisPresence(settings.redis, settings.presence.lease)
    return MemoryPresence(settings.presence.lease)


def make_blocks(settings: Settings) -> Blocks:
    """What stands behind the blocks seam: where history is."""
    if settings.mongo.url:
        from server.blocks.mongo import MongoBlocks

        return MongoBlocks(settings.mongo)
    if settings.sqlite.path == ":memory:":
        return MemoryBlocks()
    return SqliteBlocks(f"{settings.sqlite.path}.blocks")


def make_node(settings: Settings) -> Node:
    """One process with the parts that the settings choose."""
    return Node(
        history=make_history(settings),
        broker=make_broker(settings),
        presence=make_presence(settings),
        blocks=make_blocks(settings),
        settings=settings,
        clock=time.time,
        name=f"{socket.gethostname()}_{settings.http_server.port}",
    )


def make_gate(settings: Settings) -> Gate:
    """Who checks tokens."""
    keys = Keys(_fetch, time.monotonic)
    return Gate(*make_verifiers(settings, keys), keys)


def make_verifiers(settings: Settings, keys: Keys) -> tuple[auth.Verifier, auth.Verifier]:
    """What checks the tokens of connections and of subscriptions; raises ``ValueError``."""
    skip = settings.client.insecure_skip_token_signature_verify

    def verifier(tokens: Any) -> auth.Verifier:
        return auth.Verifier(tokens, skip_signature=skip, find_key=keys.find)

    separate = settings.client.subscription_token
    return verifier(settings.client.token), verifier(separate if separate.enabled else settings.client.token)


async def _fetch(url: str) -> bytes:
    client = tornado.httpclient.AsyncHTTPClient(force_instance=True, defaults={}, max_body_size=BODY_BYTES)
    try:
        asked = client.fetch(url, request_timeout=FETCH_TIMEOUT_S, connect_timeout=FETCH_TIMEOUT_S)
        return (await answer_to(asked)).body
    finally:
        client.close()


def make_tls(settings: HttpServerSettings) -> ssl.SSLContext | None:
    """The TLS context, ``None`` if TLS is off; raises ``ssl.SSLError`` and ``OSError``."""
    if not settings.tls.enabled:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for name, text in (("cert", settings.tls.cert_pem), ("key", settings.tls.key_pem)):
            if "-----BEGIN" in text:
                path = os.path.join(folder, name)
                with open(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
                    file.write(text)
                text = path
            files.append(text)
        context.load_cert_chain(*files)
    return context


def bind_internal(settings: HttpServerSettings) -> list[socket.socket]:
    """Sockets for what is for operators only; none if that is where everything else is.  Raises ``OSError``."""
    if not settings.internal_port:
        return []
    return tornado.netutil.bind_sockets(settings.internal_port, settings.internal_address)


def address_of(listening: list[socket.socket], *, secure: bool) -> str:
    """Where we listen, as a URL with a slash at the end."""
    host, port = listening[0].getsockname()[:2]
    return f"{'https' if secure else 'http'}://{f'[{host}]' if ':' in host else host}:{port}/"


def make_server(app: tornado.web.Application, tls: ssl.SSLContext | None, *, request_s: float = REQUEST_S) -> Server:
    """A server of ``app`` with our limits (``request_s``: until a request has come); it has yet to be given sockets."""
    return Server(
        app,
        ssl_options=tls,
        max_buffer_size=REQUEST_BYTES,
        max_body_size=REQUEST_BYTES,
        body_timeout=request_s,
        request_s=request_s,
    )


# --- life --------------------------------------------------------------------
async def _run(
    settings: Settings, app: App | None, changes: Changes | None, read_again: Callable[[], Settings]
) -> bool:
    """Serve until a signal comes, or, if ``changes`` are to be heeded, until there is one: true is to start anew."""
    node = make_node(settings)
    if app is not None:
        app.attach(node)
    gate = make_gate(settings)
    clients = make_sockets(node, gate)
    tls = make_tls(settings.http_server)
    listening = tornado.netutil.bind_sockets(settings.http_server.port, settings.http_server.address, backlog=BACKLOG)
    internally = bind_internal(settings.http_server)
    await node.open(patiently=bool(settings.mongo.url))
    if app is not None:
        await start(app, node)
    server = make_server(make_app(node, clients), tls)
    server.add_sockets(listening)
    internal = make_server(make_internal_app(node, clients), None) if internally else None
    if internal is not None:
        internal.add_sockets(internally)
    servers = [server] if internal is None else [server, internal]
    leaving = make_leaving(node, clients, servers)
    # Before anybody learns that we are here, and may send one.
    signals = Signals(leaving.hurry, lambda: reload(node, gate, read_again))

    address = address_of(listening, secure=tls is not None)
    if not settings.configured:
        names = [namespace.name for namespace in settings.channel.namespaces]
        event("server.open", namespaces=",".join(names))
    event("server.started", address=address)
    if internal is not None:
        event("server.divided", address=address_of(internally, secure=False))
    print(f"Waterspout is listening on {address}", flush=True)
    if not settings.configured:
        print(f"Its console is at {link(settings.admin, address, time.time())}", flush=True)

    sweeper = asyncio.create_task(sweep_for_ever(node, clients))
    changed = False
    if changes is None:
        await signals.came.wait()
    else:
        changed = await wait_for_change(changes, signals.came)
    event("server.stopping", connections=len(node.sessions))
    clients.hasten(GOODBYE_S)
    await leaving.leave(graceful=signals.first == signal.SIGTERM)
    sweeper.cancel()
    await close(node, gate, servers, app)
    event("server.stopped")
    return changed and signals.first is None  # a signal may have come while clients were sent away for the change


async def close(node: Node, gate: Gate, servers: Sequence[Server], app: App | None = None) -> None:
    """Close everything, once nobody is owed anything more: ways in first.

    Who asks in this last moment over a connection that is still there finds it
    closed, and asks another process; nobody is answered by one without its history.
    All servers refuse before anything is waited for, since what is then carried out would be cut.
    """
    for server in servers:
        server.refuse()
    for server in servers:
        await server.close_all_connections()
    if app is not None:
        await app.stop()
    await gate.keys.close()
    await node.close()


class Signals:
    """SIGTERM and SIGINT: the first ends the server, each further one calls ``again``; SIGHUP calls ``renew``.

    From a terminal that was closed SIGHUP is an end, too: who closes the window does not want the server to stay.
    """

    def __init__(self, again: Callable[[], None], renew: Callable[[], None]) -> None:
        self.came = asyncio.Event()
        self.first: signal.Signals | None = None
        self._again = again
        self._renew = renew
        self._terminal = os.isatty(STDIN)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._take, number)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._hang_up)

    def _hang_up(self) -> None:
        if self._terminal and not os.isatty(STDIN):
            self._take(signal.SIGHUP)
        else:
            self._renew()

    def _take(self, number: signal.Signals) -> None:
        if self.first is None:
            self.first = number
            self.came.set()
        else:
            self._again()


def reload(node: Node, gate: Gate, read_again: Callable[[], Settings]) -> None:
    """Have the settings hold that ``read_again`` brings, as far as they can; PROTOCOL 9.5.

    What is wrong with them is logged, all of it, and then nothing is changed.  It
    is done in one turn of the loop, some milliseconds.
    """
    former = node.settings
    try:
        wished = read_again()
        wished = complete(wished, former.client.token.hmac_secret_key, former.admin.secret)
        settings, changed, waiting = renewed(former, wished)
        if faults := contradictions(settings):
            raise SettingsError(faults)
        verifiers = make_verifiers(settings, gate.keys)
        node.renew(settings)
    except SettingsError as error:
        for fault in error.faults:
            event("settings.faulty", why=fault)
        return
    except (ValueError, Unavailable) as error:
        event("settings.faulty", why=error)
        return
    gate.connection, gate.subscription = verifiers
    set_level(settings.log.level)
    event("settings.reloaded", changed=",".join(changed))
    if waiting:
        event("settings.waiting", names=",".join(waiting))


async def start(app: App, node: Node) -> None:
    """Start the user's module; raises ``AppError``, having closed the node."""
    try:
        await app.start()
    except AppError:
        await node.close()
        raise


async def wait_for_change(changes: Changes, stop: asyncio.Event) -> bool:
    """Wait for a signal (false), or for a change of one of the watched files (true)."""
    while not stop.is_set():
        path = await asyncio.to_thread(changes.look)
        if path is not None:
            event("app.reloading", path=path)
            return True
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), RELOAD_S)
    return False


def make_leaving(node: Node, clients: Sockets, servers: Sequence[Server]) -> Leaving:
    """How the process goes away; the first of its ``servers`` is the clients'."""

    def stop_listening() -> None:
        servers[0].stop()
        for server in servers:
            server.let_go()

    def stop_calls() -> None:
        for server in servers:
            server.end(GOODBYE_S)

    return Leaving(
        node,
        node.settings.shutdown,
        stop_listening=stop_listening,
        stop_calls=stop_calls,
        goodbyes=lambda: goodbyes(clients, servers),
    )


def goodbyes(clients: Sockets, servers: Sequence[Server]) -> int:
    """How many connections have not finished their goodbye, or wait for an answer; those that take too long are cut."""
    clients.check_stalled(asyncio.get_running_loop().time())
    return clients.closing + sum(server.under_way for server in servers)


async def sweep_for_ever(node: Node, clients: Sockets) -> None:
    """Call the once-a-second work; a fault in it is logged, and the next second comes."""
    loop = asyncio.get_running_loop()
    while True:
        due_at = loop.time() + SWEEP_S
        await asyncio.sleep(SWEEP_S)
        node.counts.late(loop.time() - due_at)
        try:
            node.sweep(node.clock())
            clients.check_stalled(loop.time())
        except Exception as fault:
            event("sweep.failed", fault=fault)


def command() -> int:
    """``waterspout`` on the command line of an installed package."""
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(command())
