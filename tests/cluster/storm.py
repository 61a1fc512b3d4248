#!/usr/bin/env python3
"""A storm: real processes, real stores, real clients, and a schedule that breaks them.

    tests/cluster/storm.py [--minutes M] [--seed N] [--processes P] [--report FILE]

It says its seed first, then each fault as it happens, and in the end what
``verdict.judge`` finds in the notes: exit code 1 if that is anything.  The same
seed gives the same faults at the same times; what the processes make of them is
theirs.
"""

import argparse
import asyncio
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from crowd import ApiVoice, Listener, SocketVoice, World, call_api, chatter, last_words, race, write
from mongod import ReplicaSet
from patience import TICK_S
from report import Disturbance, Figures, page, rows, slow, waits
from schedule import KINDS, Planned, for_one, planned
from stage import STREAMED, Place, Stage, asked_again, staging
from tornado.httpclient import HTTPClientError
from verdict import Down, Fault, Kept, Leaves, Line, Vanished, judge, summary
from wanderer import Wanderer

BUSY = [f"chat:{number}" for number in range(4)]
QUIET = [f"chat:quiet{number}" for number in range(12)]
"""Channels in which no other publication comes soon to tell that one was missed."""

KEPT = [*BUSY, *QUIET]
WANDERED = [*BUSY, *QUIET[:2]]
"""A wanderer each; in the quiet ones most legs end with silence."""

PASSING = "live:1"
LEASE_S = 4.0
PUBLISH_TIMEOUT_S = 3.0
SLACK_S = 3.0
"""What a busy machine may add to the publish timeout."""

HEAL_S = 120.0
"""How long writers may take to come to an end after everything was healed: stores elect, clients come back."""

LAST_LOSS = 0.6
"""The share of Redis's pushes that is lost while the last words are said, after which nothing more comes."""

SWEEP_S = 5.0

STILL_S = 0.5
"""When the loop's next turn is later than that, nobody could do anything."""

PAGE = 1000


@dataclass
class Plan:
    """What a storm is to be; lengths in seconds."""

    seed: int
    length_s: float
    processes: int = 2
    longest_s: float = 30.0
    pause_s: float = 5.0
    writer_pause_s: float = 0.1


class Clock:
    """Seconds since the storm began; while the machine or this process stands still it goes on for ``STILL_S`` only.

    It goes on between its ticks, unlike ``patience.Watch``: what is told of a storm is told in milliseconds.
    """

    def __init__(self) -> None:
        self._s = 0.0
        self._at = time.monotonic()

    def __call__(self) -> float:
        """What it says now."""
        return self._s + min(time.monotonic() - self._at, STILL_S)

    async def run(self) -> None:
        """Go, until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self._s, self._at = self(), time.monotonic()


@dataclass
class Storm:
    """One storm on its stage, from the first connection to the verdict."""

    plan: Plan
    stage: Stage
    say: Callable[[str], None]
    clock: Clock
    disturbances: list[Disturbance] = field(default_factory=list)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.world = World(self.stage.places, Random(self.plan.seed), self.clock)
        self.world.notes.most_wait_s = PUBLISH_TIMEOUT_S + SLACK_S
        self.listeners: list[Listener] = []
        self.wanderers: list[Wanderer] = []
        self.writers: list[asyncio.Task[None]] = []
        self._parts: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.under_way: dict[str, float] = {}
        """The kinds of fault that are under way, and since when."""

    # --- the people -----------------------------------------------------------
    def gather(self) -> None:
        """Bring in writers and listeners, some of each kind at each process, and those who wander between them."""
        world, pause_s = self.world, self.plan.writer_pause_s
        for number, place in enumerate(self.stage.places):
            for nth, (restless, loyal) in enumerate([(False, True), (True, True), (True, False)]):
                name = f"listener{number}{nth}"
                listener = Listener(world, name, KEPT, PASSING, place, restless=restless, loyal=loyal)
                self.listeners.append(listener)
                self._tasks.append(asyncio.create_task(listener.listen(), name=name))
            voices = [(ApiVoice, True), (ApiVoice, False), (SocketVoice, True), (SocketVoice, False)]
            for nth, (kind, keyed) in enumerate(voices):
                name, channel = f"writer{number}{nth}", BUSY[(number + nth) % len(BUSY)]
                self._write(name, write(world, name, [channel], kind(world, place), keyed=keyed, pause_s=pause_s))
            self._write(f"chatter{number}", chatter(world, f"chatter{number}", PASSING, place, pause_s))
            quiet = write(world, f"rare{number}", QUIET, ApiVoice(world, place), keyed=True, pause_s=10 * pause_s)
            self._write(f"rare{number}", quiet)
        ports = [place.process.port for place in self.stage.places]
        for number, channel in enumerate(WANDERED):
            wanderer = Wanderer(world, f"wanderer{number}", channel, ports, Random(f"{self.plan.seed} {number}"))
            self.wanderers.append(wanderer)
            self._tasks.append(asyncio.create_task(wanderer.wander(), name=wanderer.name))
        twins = [ApiVoice(world, place) for place in self.stage.places]
        self._write("race", race(world, "twin", BUSY[0], twins, 2 * pause_s))

    def _write(self, name: str, work: Any) -> None:
        self.writers.append(asyncio.create_task(work, name=name))

    # --- the faults -----------------------------------------------------------
    async def rage(self) -> None:
        """Break everything as planned, and have it whole again in the end."""
        plan = self.plan
        faults = planned(plan.seed, plan.length_s, plan.processes, longest_s=plan.longest_s, pause_s=plan.pause_s)
        async with asyncio.TaskGroup() as group:
            for fault in faults:
                await self._until(fault.at_s)
                group.create_task(self._break_in_turn(fault))
            await self._until(plan.length_s)

    async def _until(self, moment: float) -> None:
        await asyncio.sleep(max(0.0, moment - self.clock()))

    async def _break_in_turn(self, fault: Planned) -> None:
        """Healing takes its time, too: until it is done the next fault of the same part waits."""
        async with self._parts[KINDS[fault.kind].part]:
            await self._break(fault)

    async def _break(self, fault: Planned) -> None:
        place = self.stage.places[fault.process]
        where = place.name if for_one(fault.kind) else ""
        began = self.under_way[fault.kind] = self.clock()
        self.say(f"{began:7.1f} s  {fault.kind}{where and ' '}{where} for {fault.length_s:.1f} s")
        watch = asyncio.create_task(self._watch_the_dead(place)) if fault.kind == "process killed" else None
        try:
            async with self.stage.broken(fault.kind, place):
                await asyncio.sleep(fault.length_s)
        finally:
            ended = self.clock()
            del self.under_way[fault.kind]
            self.disturbances.append(Disturbance(fault.kind, where, began, ended))
            if KINDS[fault.kind].part == "process":
                self.world.notes.downs.append(Down(place.name, began, ended))
        if watch is not None:
            await watch

    async def _watch_the_dead(self, place: Place) -> None:
        """See the members of a process that is being killed fade, unless what they fade in is disturbed, too."""
        world, began = self.world, self.clock()
        dead = [one.client for one in self.listeners if one.place is place and one.client]
        ears = [(one, one.client) for one in self.listeners if one.place is not place and one.client]
        other = next((one for one in self.stage.places if one is not place), place)
        most_s = LEASE_S + 2
        members = set(dead)
        after_s: float | None = None
        while self.clock() < began + 2 * most_s:
            if self._presence_disturbed(began - LEASE_S - 2):
                return
            try:
                answer = await call_api(other, "presence", {"channel": PASSING}, 2.0)
                members = {client for client in answer["result"]["presence"] if client in dead}
            except (OSError, HTTPClientError, KeyError):
                return
            if not members:
                after_s = self.clock() - began
                break
            await asyncio.sleep(0.1)
        await asyncio.sleep(1.0)
        if self._presence_disturbed(began - LEASE_S - 2):
            return
        for client in dead:
            world.notes.vanished.append(Vanished(client, place.name, after_s, most_s))
            for ear, at_first in ears:
                if ear.client == at_first:
                    world.notes.leaves.append(Leaves(ear.name, client, len(ear.leaves[client])))
        world.counts["faded"] += len(dead)

    def _presence_disturbed(self, since: float) -> bool:
        """Was Redis, the way to it, or a process that must tell of it, broken since then?"""
        parts = ("redis", "link")
        return any(KINDS[kind].part in parts or kind == "process stopped" for kind in self.under_way) or any(
            (KINDS[one.kind].part in parts or one.kind == "process stopped") and one.ended >= since
            for one in self.disturbances
        )

    # --- the end --------------------------------------------------------------
    async def settle(self) -> list[Fault]:
        """Let everybody finish, read what is there, and judge; everything has been healed before.

        First all must hear one another again, also in passing.  Then the last
        words are said while Redis loses most of what it should push: nothing
        comes behind them that would tell of a loss.
        """
        world = self.world
        await self.stage.healthy()
        faults = await self._deaf()
        world.enough.set()
        _, late = await asyncio.wait(self.writers, timeout=HEAL_S)
        for task in late:
            faults.append(Fault("stuck", task.get_name(), "did not come to an end after everything was healed"))
            task.cancel()
        await asyncio.gather(*self.writers, return_exceptions=True)
        async with self.stage.lossy(LAST_LOSS):
            await last_words(world, "last", QUIET, [ApiVoice(world, place) for place in self.stage.places])
            for place in self.stage.places:
                for channel in KEPT:
                    try:
                        world.notes.kept.append(await read_all(place, channel))
                    except Unreadable as error:
                        faults.append(Fault("unreadable", place.name, str(error)))
            tops = {kept.channel: len(kept.lines) for kept in world.notes.kept}
            ends = self.clock() + SWEEP_S + 2 * SLACK_S
            for listener in self.listeners:
                await listener.until(lambda listener=listener: not listener.behind(tops), ends)  # type: ignore[misc]
            for wanderer in self.wanderers:
                await wanderer.arrived(tops, ends)
        self.say(f"{self.clock():7.1f} s  all have come to the top, or had the time to")
        for listening in self._tasks:
            listening.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        faults += judge(world.notes)
        faults += slow(waits(world.notes.said, world.deliveries), self.disturbances, SWEEP_S + 2 * SLACK_S)
        faults += [Fault("complaint", "listener", what) for what in world.complaints]
        faults += [Fault("logged", place.name, line) for place in self.stage.places for line in place.faults_logged()]
        return faults

    async def _deaf(self) -> list[Fault]:
        """Who does not hear all processes in passing, now that everything is healed: the doorbell must ring again."""
        since = dict(self.world.chatted)
        ends = self.clock() + HEAL_S / 2
        faults = []
        for listener in self.listeners:
            heard = await listener.until(
                lambda listener=listener: listener.hears_passing(list(since), since),  # type: ignore[misc]
                ends,
            )
            if not heard:
                faults.append(Fault("deaf", listener.name, f"at {listener.place.name} does not hear all others"))
        return faults

    def figures(self, command: str, faults: list[Fault]) -> Figures:
        """What the report tells."""
        world = self.world
        counts = dict(world.counts)
        truth = {kept.channel: len(kept.lines) for kept in world.notes.kept}
        return Figures(
            self.plan.seed,
            self.plan.length_s,
            self.plan.processes,
            command,
            rows(self.disturbances, world.notes.said, world.deliveries, world.notes.waited),
            counts,
            sum(truth.values()),
            faults,
            self.disturbances,
            machine(),
        )


def machine() -> str:
    """What this runs on."""
    return f"{os.cpu_count()} cores, Python {platform.python_version()}, {platform.system()} {platform.machine()}"


class Unreadable(Exception):
    """A process did not tell what history has."""


async def read_all(place: Place, channel: str) -> Kept:
    """A channel's whole history, page by page, as one process tells it; raises ``Unreadable``."""
    lines: list[Line] = []
    epoch = ""
    while True:
        body: dict[str, Any] = {"channel": channel, "limit": PAGE}
        if lines:
            body["since"] = {"offset": lines[-1].offset, "epoch": epoch}
        try:
            answer = await asked_again(lambda body=body: call_api(place, "history", body))  # type: ignore[misc]
        except TimeoutError:
            raise Unreadable(f"{channel} after everything was healed: put off again and again") from None
        if "result" not in answer:
            raise Unreadable(f"{channel} after everything was healed: {answer}")
        result = answer["result"]
        epoch = result.get("epoch", "")
        publications = result.get("publications", [])
        lines += [Line(one["offset"], one["data"]["mark"], one["data"]["key"]) for one in publications]
        if not publications or lines[-1].offset >= result["offset"]:
            return Kept(channel, place.name, epoch, lines)


@asynccontextmanager
async def storming(
    plan: Plan, folder: Path, replica_set: ReplicaSet, say: Callable[[str], None]
) -> AsyncIterator[Storm]:
    """A storm on a stage of its own, with everybody in place."""
    config: dict[str, Any] = {
        "presence": {"lease": f"{LEASE_S:g}s"},
        "mongo": {"publish_timeout": f"{PUBLISH_TIMEOUT_S:g}s"},
    }
    config |= STREAMED
    async with staging(folder, replica_set, processes=plan.processes, **config) as stage:
        clock = Clock()
        storm = Storm(plan, stage, say, clock)
        going = asyncio.create_task(clock.run(), name="clock")
        storm.gather()
        try:
            yield storm
        finally:
            for task in [going, *storm._tasks, *storm.writers]:
                task.cancel()
            await asyncio.gather(going, *storm._tasks, *storm.writers, return_exceptions=True)


async def run(
    plan: Plan, folder: Path, replica_set: ReplicaSet, say: Callable[[str], None]
) -> tuple[Storm, list[Fault]]:
    """One storm from beginning to end; returns it with the faults that were found."""
    say(f"seed {plan.seed}, {plan.length_s:g} s, {plan.processes} processes")
    async with storming(plan, folder, replica_set, say) as storm:
        await storm.rage()
        faults = await storm.settle()
    return storm, faults


def main(argv: list[str]) -> int:
    """Do what the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(description="Break everything for a while, and see that nothing is lost.")
    parser.add_argument("--minutes", type=float, default=30.0, help="how long (default 30)")
    parser.add_argument("--seed", type=int, help="of the schedule (default: of the clock)")
    parser.add_argument("--processes", type=int, default=3, help="how many of run.py (default 3)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="where to write what came of it, as Markdown")
    arguments = parser.parse_args(argv)
    seed = int(time.time()) if arguments.seed is None else arguments.seed
    plan = Plan(seed, arguments.minutes * 60, arguments.processes)
    folder = Path(tempfile.mkdtemp(prefix="waterspout-storm-"))
    with ReplicaSet() as replica_set:
        storm, faults = asyncio.run(run(plan, folder, replica_set, lambda text: print(text, flush=True)))
    command = f"make storm MINUTES={arguments.minutes:g} SEED={seed}"
    if arguments.processes != 3:
        command += f" ARGS={shlex.quote(f'--processes {arguments.processes}')}"
    for name, count in sorted(storm.world.counts.items()):
        print(f"{count:9,} {name}")
    if arguments.report is not None:
        arguments.report.write_text(page(storm.figures(command, faults)))
    if faults:
        print(f"{summary(faults)}\nthe logs are in {folder}")
        return 1
    print("no promise was broken")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
