"""Waterspout itself, as ``run.py`` starts it, on another event loop or with somebody looking on.

    ours.py [--loop uvloop] [--samples FILE] -- ARGUMENTS OF run.py

``--samples`` notes from SIGUSR1 on, at every tick of the kernel's clock at which it works, where the program stands,
and writes that at SIGUSR2 as one line per stack, ``outermost;…;innermost count``.  It is for machines without py-spy:
the timer's signal is handled between two bytecodes, so what C code takes is put down to the Python function that
called it.
"""

import argparse
import asyncio
import signal
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import run  # noqa: E402

SAMPLE_S = 0.001


@cache
def _shown(filename: str) -> Path:
    path = Path(filename)
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-2:])


class Samples:
    """Counts the stacks that the timer meets."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stacks: Counter[str] = Counter()
        signal.signal(signal.SIGPROF, self._look)
        signal.siginterrupt(signal.SIGPROF, False)
        signal.signal(signal.SIGUSR1, lambda *_: signal.setitimer(signal.ITIMER_PROF, SAMPLE_S, SAMPLE_S))
        signal.signal(signal.SIGUSR2, lambda *_: self._write())

    def _look(self, number: int, frame: FrameType | None) -> None:
        names = []
        while frame is not None:
            names.append(f"{frame.f_code.co_qualname} ({_shown(frame.f_code.co_filename)}:{frame.f_lineno})")
            frame = frame.f_back
        self._stacks[";".join(reversed(names))] += 1

    def _write(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        whole = self._path.with_suffix(".part")
        whole.write_text("".join(f"{stack} {count}\n" for stack, count in self._stacks.items()))
        whole.replace(self._path)


parser = argparse.ArgumentParser()
parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio")
parser.add_argument("--samples", type=Path)
parser.add_argument("rest", nargs=argparse.REMAINDER)
arguments = parser.parse_args()
if arguments.loop == "uvloop":
    import uvloop

    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
if arguments.samples is not None:
    Samples(arguments.samples)
sys.exit(run.main(arguments.rest[1:]))
