"""Patterns of channel names, as the back-end API takes them (PROTOCOL 15.2).

``*`` is any run of characters, ``?`` one, ``[abc]`` and ``[a-c]`` one of these,
``[!abc]`` one that is none of them, ``{a,b}`` one of these patterns, ``\\`` takes
the next character as it is.  A whole name must match.

A pattern is matched against every channel of a process while nobody else gets a
turn, so it must not be able to take long: braces are written out, within a bound,
into patterns that have none, and of those each run between two stars is taken
where it is found first and never looked for again.  That is right since such a run
has one length, and leaves nothing to go back to.  Tried and dropped: one regular
expression with alternatives, which a dozen stars keep busy for hours.  Pure.
"""

import re
from collections.abc import Callable
from functools import lru_cache

LONGEST = 512
"""Characters that a pattern may have."""

MOST = 64
"""Patterns that one may be written out into."""


def matcher(pattern: str) -> Callable[[str], bool]:
    """Says of a name whether it matches ``pattern``, of which the empty one takes every name.

    Raises ``ValueError`` for what is no pattern: open brackets or braces, an empty
    or backward range, more than ``LONGEST`` characters or ``MOST`` alternatives.
    """
    expression = _compiled(pattern)
    return lambda name: expression.fullmatch(name) is not None


@lru_cache(maxsize=64)
def _compiled(pattern: str) -> re.Pattern[str]:
    if len(pattern) > LONGEST:
        raise ValueError(f"expected a pattern of at most {LONGEST} characters, got {len(pattern)}")
    if not pattern:
        pattern = "*"
    plain, rest = _alternatives(pattern, 0, nested=False)
    assert rest == len(pattern)
    return re.compile("|".join(map(_expression, plain)), re.DOTALL)


Run = tuple[str, ...]
"""A pattern without braces: expressions of one character each, and ``*``."""


def _alternatives(pattern: str, at: int, *, nested: bool) -> tuple[list[Run], int]:
    """Write out what begins at ``at``, up to the end or the brace that ends it; returns where that is."""
    done: list[Run] = []
    present: list[Run] = [()]
    while at < len(pattern):
        character = pattern[at]
        at += 1
        if nested and character in ",}":
            done += present
            present = [()]
            if character == "}":
                return done, at
            continue
        if character == "{":
            inner, at = _alternatives(pattern, at, nested=True)
            if len(present) * len(inner) + len(done) > MOST:
                raise ValueError(f"expected at most {MOST} alternatives, got more")
            present = [before + after for before in present for after in inner]
            continue
        if character == "[":
            one, at = _class(pattern, at)
        elif character == "\\":
            if at == len(pattern):
                raise ValueError("expected a character behind the last backslash, got the end")
            one, at = re.escape(pattern[at]), at + 1
        else:
            one = {"*": "*", "?": "."}.get(character) or re.escape(character)
        present = [(*before, one) for before in present]
    if nested:
        raise ValueError("expected a } for each {, got the end")
    return done + present, at


def _class(pattern: str, at: int) -> tuple[str, int]:
    """The class whose bracket stands before ``at``, as an expression, and where it ends."""
    end = pattern.find("]", at)
    inner = pattern[at:end] if end >= 0 else ""
    negated = inner.startswith("!")
    members = inner.removeprefix("!")
    if not members:
        raise ValueError("expected characters and a ] behind [, got none")
    ranges = ""
    place = 0
    while place < len(members):
        first = last = members[place]
        if members[place + 1 : place + 2] == "-" and place + 2 < len(members):
            last = members[place + 2]
            place += 2
        if last < first:
            raise ValueError(f"expected a range from low to high, got {first}-{last}")
        ranges += f"{re.escape(first)}-{re.escape(last)}"
        place += 1
    return f"[{'^' if negated else ''}{ranges}]", end + 1


def _expression(run: Run) -> str:
    """A regular expression that never goes back: what stands between two stars is taken at its first place."""
    pieces = [""]
    for one in run:
        if one == "*":
            pieces.append("")
        else:
            pieces[-1] += one
    if len(pieces) == 1:
        return pieces[0]
    first, *middle, last = pieces
    return f"{first}{''.join(f'(?>.*?{piece})' for piece in middle if piece)}.*{last}"
