"""Where the time goes, from samples of the stack: a table of functions, and a flame graph.  Pure.

A stack is written as py-spy's "raw" format has it: frames from the outermost to
the innermost with semicolons between, each ``function (file:line)``, then a blank and
how often it was met.
"""

import html
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.figures import table

Stacks = Mapping[tuple[str, ...], int]
"""How often each stack was met; its frames are functions, ``name (file)``, from the outermost to the innermost."""

_LINE = re.compile(r":\d+\)$")
WAITING = ("_worker (concurrent/futures/thread.py)", "wait (threading.py)", "Condition.wait (threading.py)")
"""Where a thread that has nothing to do is met; py-spy can not tell everywhere that it does nothing."""
OURS = re.compile(r"\((?:server|handlers|run\.py)\b")


class Share(NamedTuple):
    """A function's part of the time, 0 to 1: ``own`` without, ``whole`` with what it called."""

    name: str
    own: float
    whole: float


def parse(text: str) -> Stacks:
    """Read stacks; those that differ by the lines within functions only become one, and ``WAITING`` is left out."""
    stacks: Counter[tuple[str, ...]] = Counter()
    for line in text.splitlines():
        frames, _, count = line.rpartition(" ")
        stack = tuple(_LINE.sub(")", frame) for frame in frames.split(";"))
        if frames and stack[-1] not in WAITING:
            stacks[stack] += int(count)
    return stacks


def shares(stacks: Stacks) -> list[Share]:
    """Every function's part, the greatest of its own first.  A function that calls itself counts once."""
    own: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    for stack, count in stacks.items():
        own[stack[-1]] += count
        whole.update(dict.fromkeys(stack, count))
    total = sum(stacks.values())
    found = [Share(name, own[name] / total, count / total) for name, count in whole.items()]
    return sorted(found, key=lambda share: (-share.own, -share.whole, share.name))


def top(stacks: Stacks, count: int) -> str:
    """The table of the ``count`` functions that take most of the time themselves."""
    rows = [(share.name, f"{100 * share.own:.1f}", f"{100 * share.whole:.1f}") for share in shares(stacks)[:count]]
    return table(("function", "% itself", "% with what it calls"), rows)


def under(stacks: Stacks, name: str) -> str:
    """The table of what happens below the functions whose name begins so: for asking further."""
    below: Counter[tuple[str, ...]] = Counter()
    for stack, count in stacks.items():
        for at, frame in enumerate(stack):
            if frame.startswith(name):
                below[stack[at:]] += count
                break
    return top(below, 25) if below else f"nothing is called {name}"


# --- the flame graph ---------------------------------------------------------
WIDTH, ROW, LEAST = 1200, 18, 0.4
LETTER = 6.6
COLOURS = {"ours": "#0b7285", "python": "#f2a65a", "native": "#c9d1d9"}


class _Box(NamedTuple):
    name: str
    depth: int
    begin: int
    met: int


def _boxes(stacks: Sequence[tuple[tuple[str, ...], int]], depth: int, begin: int) -> list[_Box]:
    """Stacks that agree above ``depth``, as boxes beside one another."""
    found: list[_Box] = []
    groups: dict[str, list[tuple[tuple[str, ...], int]]] = {}
    for stack, count in stacks:
        if len(stack) > depth:
            groups.setdefault(stack[depth], []).append((stack, count))
    for name, group in sorted(groups.items()):
        count = sum(count for _, count in group)
        found.append(_Box(name, depth, begin, count))
        found += _boxes(group, depth + 1, begin)
        begin += count
    return found


def flame(stacks: Stacks, title: str) -> str:
    """An SVG in which a box is a function, as wide as its part of the time, upon what called it."""
    total = sum(stacks.values())
    boxes = _boxes(list(stacks.items()), 0, 0)
    height = (2 + max((box.depth for box in boxes), default=0)) * ROW + 30
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'font-family="monospace" font-size="11">',
        f'<text x="8" y="18" font-size="14">{html.escape(title)}</text>',
    ]
    for name, depth, begin, count in boxes:
        x, width, y = WIDTH * begin / total, WIDTH * count / total, height - (depth + 1) * ROW
        if width < LEAST:
            continue
        colour = COLOURS["ours" if OURS.search(name) else "python" if ".py" in name else "native"]
        label = html.escape(name[: int(width / LETTER) - 1])
        drawn.append(
            f'<g><title>{html.escape(name)} {100 * count / total:.1f} %</title><rect x="{x:.1f}" y="{y}" '
            f'width="{max(width - 0.5, LEAST):.1f}" height="{ROW - 1}" fill="{colour}"/>'
            + (f'<text x="{x + 3:.1f}" y="{y + 13}">{label}</text>' if width > 4 * LETTER else "")
            + "</g>"
        )
    return "\n".join([*drawn, "</svg>"]) + "\n"
