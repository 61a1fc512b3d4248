"""Our server beside others: ``make bench``.

    python -m benchmarks.bench [--works W1,W6] [--peers bare,waterspout] [--rounds 3] [--seconds 3]
                               [--calm 100] [--scale 1.0] [--output FOLDER] [--readme] [--no-png]

Round after round every work is done to every peer in turn, each time to a server
that was just started, so that whatever else the machine does hits all alike.
Results are written as they come; table and picture are made of all of them at the
end, also after Ctrl-C or SIGTERM.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import environments, figures, pictures, processes
from benchmarks.environments import ENVS, HERE, ROOT, SERVERS, Missing
from benchmarks.figures import Result
from benchmarks.peers import BARE, PEERS, Peer
from benchmarks.peers import USUAL as USUAL_PEERS
from benchmarks.processes import Cores, Failed, Server
from benchmarks.works import USUAL as USUAL_WORKS
from benchmarks.works import WORKS, Work

ARTIST = Peer("picture", "Pillow", (), environment="picture", packages=("pillow",))
WARM_S = 1.0
PATIENCE_S = 240.0
LOST_S = 30.0
"""What nobody has heard of for so long is lost; on a machine of others' less would be its fault, not the server's."""

_OPEN = "\n".join(
    f"allow_{action}_for_{who} = true" for action in ("subscribe", "publish") for who in ("client", "anonymous")
)
CONFIG = f"""\
[client]
allow_anonymous_connect_without_token = true
command_rate_limit = 1_000_000
command_burst = 1_000_000
publish_rate_limit = 1_000_000
connection_rate_limit = 0
address_connection_limit = 0

[sqlite]
path = "{{folder}}/history.db"
publish_timeout = "60s"

[[channel.namespaces]]
name = "passing"
{_OPEN}

[[channel.namespaces]]
name = "kept"
history_size = -1
history_ttl = "24h"
force_recovery = true
{_OPEN}
"""
"""What our server is told: two open namespaces, where its file is, and limits that load from one address does not meet,
nor a disk that stands still.

They are counted all the same; all else is as it comes.
"""


class Tools(NamedTuple):
    """What a run works with."""

    load: tuple[str, ...]
    bare: tuple[str, ...]
    cores: Cores


def prepare() -> Tools:
    """Compile the load generator and the bare loop, or take those in Python."""
    load, bare = environments.compile_c("load"), environments.compile_c("raw")
    return Tools(
        (str(load),) if load else (sys.executable, str(HERE / "load.py")),
        (str(bare),) if bare else (sys.executable, str(SERVERS / "raw.py")),
        processes.choose_cores(),
    )


def command_of(peer: Peer, tools: Tools, port: int, config: Path) -> tuple[list[str], dict[str, str]]:
    """A peer's command line and its part of the environment."""
    places = {
        "python": environments.python_of(peer),
        "ours": sys.executable,
        "run": str(ROOT / "run.py"),
        "servers": str(SERVERS),
        "bin": str(environments.BIN),
        "environment": str(ENVS / peer.environment),
        "port": str(port),
        "config": str(config),
    }
    command = [part.format_map(places) for part in peer.command]
    if peer.name == BARE:
        command = [*tools.bare, str(port)]
    return command, {name: value.format_map(places) for name, value in peer.env.items()}


@contextlib.contextmanager
def started(peer: Peer, work: Work, tools: Tools) -> "Iterator[tuple[list[Server], list[int]]]":
    """The servers that a work is done to, and all processes whose CPU time counts."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="waterspout-bench-")))
        settings = CONFIG.format(folder=folder)
        pids: list[int] = []
        if work.together:
            joined, pids = _joined(stack, tools.cores.server)
            settings = joined + settings
        servers = []
        for number in range(2 if work.together else 1):
            config = folder / f"config{number}.toml"
            config.write_text(settings)
            port = processes.free_port()
            command, env = command_of(peer, tools, port, config)
            server = Server(command, env, tools.cores.server, port, folder / f"server{number}.log")
            servers.append(stack.enter_context(server))
        yield servers, [pid for server in servers for pid in server.pids] + pids


def _joined(stack: ExitStack, core: int) -> tuple[str, list[int]]:
    """Start Redis and MongoDB as the tests do; returns our settings for them, and the process id of Redis."""
    sys.path.append(str(ROOT / "tests"))
    try:
        from mongod import ReplicaSet  # type: ignore[import-not-found]
        from redis_server import RedisServer  # type: ignore[import-not-found]
    except ImportError as error:
        raise Missing(f"Redis and MongoDB of the tests: {error}") from None
    redis = stack.enter_context(RedisServer())
    mongo = stack.enter_context(ReplicaSet(1))
    pids = [redis.popen.pid, *(member.popen.pid for member in mongo.members if member.popen is not None)]
    for pid in pids:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):  # threads come and go
                os.sched_setaffinity(int(thread.name), {core})
    return f'[redis]\nurl = "{redis.url}"\n\n[mongo]\nurl = "{mongo.url}"\n\n', pids[:1]


def measure(peer: Peer, work: Work, tools: Tools, seconds: float) -> dict[str, Any]:
    """Start the peer, do the work once, and stop it; raises ``Missing`` and ``Failed``."""
    with started(peer, work, tools) as (servers, pids):
        options: dict[str, object] = {
            "port": servers[-1].port,
            "channel": "kept:" if work.kept else "passing:",
            "warm": WARM_S if seconds >= 1 else seconds,
            "seconds": seconds * work.length,
            "core": tools.cores.server,
            "patience": LOST_S,
            "spin": int(tools.cores.apart),
            **peer.dialect.arguments,
            **(peer.dialect.ack if work.acks else {}),
            **work.load,
        }
        if work.together:
            options["publish_port"] = servers[0].port
        arguments = [f"{name}={value}" for name, value in options.items()]
        arguments += [*peer.dialect.script, *(f"pid={pid}" for pid in pids)]
        try:
            return processes.run_load([*tools.load, *arguments], tools.cores.load, PATIENCE_S)
        except Failed as failed:
            raise Failed(f"{failed}; {servers[0].words[-300:]}") from None


# --- the run -----------------------------------------------------------------
TRIES = 10


class Plan(NamedTuple):
    """Who, what, how often; ``calm`` is the share of the server's core, in percent, that others may have meanwhile."""

    peers: Sequence[Peer]
    works: Sequence[Work]
    rounds: int
    seconds: float
    calm: float = 100.0

    def steps(self) -> "Iterator[tuple[int, Work, Peer]]":
        """Everything that is to be done, in order."""
        for number in range(1, self.rounds + 1):
            for work in self.works:
                for peer in self.peers:
                    if peer.ours or not work.ours_only:
                        yield number, work, peer


def measure_calmly(peer: Peer, work: Work, tools: Tools, plan: Plan) -> dict[str, Any]:
    """Measure again while others disturb it, and take the calmest: chosen by the noise, never by the figure."""
    tried: list[tuple[float, dict[str, Any]]] = []
    while not tried or (len(tried) < TRIES and min(others for others, _ in tried) > plan.calm):
        counted = measure(peer, work, tools, plan.seconds)
        tried.append((figures.figures(work, counted)["others"], counted))
    return min(tried, key=lambda one: one[0])[1]


def carry_out(plan: Plan, tools: Tools, path: Path) -> tuple[list[Result], dict[str, str]]:
    """Do all of a plan; returns the results and, by peer and work, what could not be done and why."""
    results: list[Result] = []
    failures: dict[str, str] = {}
    steps = list(plan.steps())
    with path.open("w") as file, contextlib.suppress(KeyboardInterrupt):
        for at, (number, work, peer) in enumerate(steps, 1):
            name = f"{peer.name} {work.name}"
            print(f"\r\033[K[{at}/{len(steps)}] {name}", end="", file=sys.stderr, flush=True)
            try:
                counted = measure_calmly(peer, work, tools, plan)
            except (Missing, Failed) as error:
                failures[name] = str(error)
                continue
            results.append(Result(peer.name, work.name, number, counted))
            file.write(json.dumps(results[-1]._asdict()) + "\n")
            file.flush()
    print("\r\033[K", end="", file=sys.stderr, flush=True)
    return results, failures


def page(plan: Plan, results: Sequence[Result], versions: Mapping[str, str], notes: Sequence[str]) -> str:
    """Everything that came of it, as Markdown."""
    summary = figures.summarize(results, {work.name: work for work in plan.works})
    titles = {peer.name: peer.title for peer in plan.peers}
    parts = [figures.overview(summary, plan.works, titles)]
    for work in plan.works:
        if any((work.name, peer) in summary for peer in titles):
            parts += [f"**{work.name}**: {work.what}", figures.details(summary, work, titles)]
    if notes:
        parts.append("\n".join(f"* {note}" for note in notes))
    parts.append("\n".join(f"* {titles[peer]}: {version}" for peer, version in versions.items()))
    return "\n\n".join(part for part in parts if part) + "\n"


def headline(plan: Plan, tools: Tools, arguments: argparse.Namespace) -> str:
    """When, where, and how."""
    machine = processes.machine()
    where = "its own core each" if tools.cores.apart else "one core for both"
    kind = "in C" if environments.compiler() else "in Python, for there is no compiler"
    today = datetime.datetime.now().astimezone()
    return (
        f"{today:%-d %B %Y}, {machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, "
        f"Linux {machine['kernel']}. Server and load: {where}; bare loop and load generator {kind}. "
        f"{plan.rounds} round{'s' if plan.rounds != 1 else ''} of {plan.seconds:g} s, medians (least–greatest)"
        + (f", {arguments.scale:g} times the usual clients." if arguments.scale != 1 else ".")
    )


def draw(plan: Plan, results: Sequence[Result], caption: str, path: Path | None) -> str:
    """The picture: returned as text, and, if there is a ``path``, written as a PNG if Pillow can be had."""
    titles = {peer.name: peer.title for peer in plan.peers}
    ours = [peer.name for peer in plan.peers if peer.ours]
    some = pictures.panels(
        figures.summarize(results, {work.name: work for work in plan.works}), plan.works, titles, ours
    )
    if some and path is not None:
        given = path.with_suffix(".json")
        given.write_text(json.dumps({"title": "Server CPU, one core", "caption": caption, "panels": some}))
        try:
            environments.install(ARTIST)
            command = [environments.python_of(ARTIST), str(HERE / "pictures.py"), str(given), str(path)]
            subprocess.run(command, check=True, capture_output=True)
        except (Missing, subprocess.CalledProcessError) as error:
            print(f"no PNG: {error}", file=sys.stderr)
    return pictures.text(some)


def renew(readme: Path, tables: str) -> None:
    """Put the tables where the README has those of the last run."""
    found = re.compile("(?<=<!-- bench -->\n).*?(?=<!-- /bench -->)", re.DOTALL)
    readme.write_text(found.sub(lambda _: tables, readme.read_text(), count=1))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--works", default=",".join(USUAL_WORKS), metavar="A,B", help=f"of {', '.join(WORKS)}")
    parser.add_argument("--peers", default=",".join(USUAL_PEERS), metavar="A,B", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one measurement")
    parser.add_argument(
        "--calm",
        type=float,
        default=100.0,
        metavar="PERCENT",
        help=f"measure again, up to {TRIES} times, while others have more of the server's core",
    )
    parser.add_argument("--scale", type=float, default=1.0, help="so many times the usual clients")
    parser.add_argument("--output", type=Path, default=HERE / "results", metavar="FOLDER")
    parser.add_argument("--readme", action="store_true", help="put the tables and the picture into README.md")
    parser.add_argument("--no-png", dest="png", action="store_false", help="the picture as text only")
    arguments = parser.parse_args(argv)
    for names, known in ((arguments.works, WORKS), (arguments.peers, PEERS)):
        unknown = set(names.split(",")) - known.keys()
        if unknown:
            parser.error(f"expected some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    return arguments


def main(argv: Sequence[str]) -> int:
    """Measure, and show what came of it; returns the exit code."""
    arguments = parse(argv)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell has its background jobs ignore the first
        signal.signal(number, signal.default_int_handler)
    tools = prepare()
    notes, peers = [], []
    for name in arguments.peers.split(","):
        try:
            environments.install(PEERS[name])
        except Missing as missing:
            notes.append(f"{PEERS[name].title} was not measured: {missing}")
        else:
            peers.append(PEERS[name])
    versions = {peer.name: environments.version_of(peer) for peer in peers}
    works = [WORKS[name].scaled(arguments.scale) for name in arguments.works.split(",")]
    plan = Plan(peers, works, arguments.rounds, arguments.seconds, arguments.calm)
    arguments.output.mkdir(parents=True, exist_ok=True)
    results, failures = carry_out(plan, tools, arguments.output / "rounds.jsonl")
    if not results:
        print("\n".join([*notes, *failures.values()]), file=sys.stderr)
        return 1
    notes += [f"{name} failed: {why}" for name, why in failures.items()] + figures.worries(results)
    first = headline(plan, tools, arguments)
    tables = f"{first}\n\n{page(plan, results, versions, notes)}"
    png = arguments.output / "bench.png" if arguments.png else None
    picture = draw(plan, results, first.partition(". ")[0], png)
    (arguments.output / "bench.md").write_text(tables)
    (arguments.output / "bench.txt").write_text(picture)
    if arguments.readme:
        options = [*(f"{name.upper()}={value}" for name, value in chosen(arguments).items())]
        renew(HERE / "README.md", f"\n    make bench {' '.join(options)}".rstrip() + f"\n\n{tables}\n")
        if png is not None and png.exists():
            shutil.copyfile(png, HERE / "bench.png")
    print(f"{tables}\n{picture}")
    return 0


def chosen(arguments: argparse.Namespace) -> dict[str, str]:
    """What the command line has that is not the default."""
    usual = parse(())
    return {
        name: f"{getattr(arguments, name)}"
        for name in ("works", "peers", "rounds", "seconds", "calm", "scale")
        if getattr(arguments, name) != getattr(usual, name)
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
