"""Patches in Fossil's delta format: a payload told by what it shares with the one before (PROTOCOL 12).

A patch is made once for all subscribers, on the event loop, in Python.  So all that walks
over bytes here is a call of C (slices compared, ``find``, a look-up in a dict), and the
work follows what has *changed*, not how long a payload is:

1. What both begin and end with is compared in slices that double.
2. Behind each copy the next one is looked for close by, where a value that was changed
   in its place leaves it: a few bytes at hand, in a short stretch of the base.
3. Only what that does not find is looked up in an index of the base's blocks, first at
   every byte, and the longer nothing is found the farther apart, so that a payload that
   has nothing in common costs some hundred look-ups.  Strides are odd, since an even one
   might miss every block of a long common run.
4. After ``MOST`` copies the rest is inserted as it is.

What that makes of a payload, and microseconds on one core of a cloud machine:

    ================================== ======== ======= =====
    change                                bytes   patch    µs
    ================================== ======== ======= =====
    a byte near both ends                   539      20    15
    1 of 60 players moved                 3,346      43    65
    all 60 players moved                  3,346   1,169   420
    one in 50 of 800 players moved       45,940     288   850
    a third of them moved                45,942   5,505 2,500
    all of them moved                    45,943  16,519 5,900
    a word put into a text               60,007      34   330
    the halves of a text exchanged       60,000      24   900
    one more item in a list              28,704      60   440
    500 items in another order           28,657   3,090 5,000
    random bytes                         65,536    none   900
    ================================== ======== ======= =====

Tried and dropped: common beginning and end alone (no patch to speak of for seven of
these); the index alone, without step 2 (where all players moved 29,502 bytes instead of
16,519, in no less time); blocks of 8 (better for tables of digits, but it falls for the
``,"name":`` of a neighbour: twice the bytes for items in another order); an index kept
for the next publication (half a millisecond for 46 KB, seldom needed at all, and it
holds eight times its payload in memory); a rolling hash as Fossil's own encoder has (a
line of Python per byte).  Pure.
"""

from collections.abc import Iterator

SHORTEST = 16
"""Bytes that a payload must have to be worth a patch: its size and its checksum alone take up to 9."""

LONGEST = 128 * 1024
"""Bytes of either payload above which none is made: a message of that size waits for its network, not for us."""

BLOCK = 12
"""Bytes that must agree for two places to be compared at all; what is common over 23 is in some block of the base."""

NEAR, REACH = 16, 64
"""Bytes of the target behind a copy that are looked for close by, and bytes of the base in which they are."""

PATIENCE = 5
"""After each ``2 ** PATIENCE`` look-ups without a find the stride grows by two bytes."""

MOST = 1000
"""Copies that a patch may have."""

DIGITS = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz~"

Copy = tuple[int, int, int]
"""Where it stands in the target, where in the base, and how many bytes."""


def create(base: bytes, target: bytes, *, text: bool) -> bytes | None:
    """A patch that makes ``target`` out of ``base``; None where none is shorter than the target itself.

    Both must be the exact bytes that clients hold or are to hold.  With ``text`` what a
    patch inserts begins and ends with whole characters of UTF-8, so that it is text if
    the target is, as JSON connections need.  None, too, for payloads above ``LONGEST``.
    """
    if len(target) < SHORTEST or max(len(base), len(target)) > LONGEST:
        return None
    parts = [_number(len(target)), b"\n"]
    size, at = 0, 0
    for copy in [*_copies(base, target), (len(target), 0, 0)]:
        to, source, count = _whole(target, *copy) if text else copy
        order = b"%b@%b," % (_number(count), _number(source))
        if to < len(target) and count <= len(order) + 2 * (to > at):
            continue  # costs more than it saves, with what it takes to begin another insertion behind it
        if to > at:
            parts += [_number(to - at), b":", target[at:to]]
            size += to - at
        if size >= len(target):
            return None
        if count:
            parts.append(order)
        at = to + count
    parts += [_number(_checksum(target)), b";"]
    patch = b"".join(parts)
    return patch if len(patch) < len(target) else None


def _copies(base: bytes, target: bytes) -> Iterator[Copy]:
    """What of the target stands in the base, from its beginning to its end, nothing twice."""
    most = min(len(base), len(target))
    head = _alike(base, 0, target, 0, most)
    tail = _alike_before(base, len(base), target, len(target), most - head)
    end = len(target) - tail
    if head:
        yield 0, 0, head
    at, behind = head, head
    index: dict[bytes, int] = {}
    for _ in range(MOST):
        if end - at < BLOCK:
            break
        found = _near(base, behind, target, at, end)
        if not found:
            index = index or {base[place : place + BLOCK]: place for place in range(0, len(base) - BLOCK + 1, BLOCK)}
            found = _anywhere(index, base, target, at, end)
        if not found:
            break
        to, source = found
        count = _alike(base, source, target, to, min(end - to, len(base) - source))
        yield to, source, count
        at, behind = to + count, source + count
    if tail:
        yield end, len(base) - tail, tail


def _near(base: bytes, behind: int, target: bytes, at: int, end: int) -> tuple[int, int] | None:
    """Where target and base agree again, close behind a copy that ended at ``at`` and ``behind``."""
    for to in range(at, min(at + NEAR, end - BLOCK + 1)):
        source = base.find(target[to : to + BLOCK], behind, behind + REACH)
        if source >= 0:
            return to, source
    return None


def _anywhere(index: dict[bytes, int], base: bytes, target: bytes, at: int, end: int) -> tuple[int, int] | None:
    """Where something of the target, from ``at`` on, stands in the base: the beginning of what is alike."""
    to, looks = at, 0
    while to <= end - BLOCK:
        source = index.get(target[to : to + BLOCK])
        if source is not None:
            before = _alike_before(base, source, target, to, min(to - at, source))
            return to - before, source - before
        looks += 1
        to += 1 + 2 * (looks >> PATIENCE)
    return None


def _alike(base: bytes, source: int, target: bytes, to: int, most: int) -> int:
    """How many bytes, of at most ``most``, are the same from these two places on."""
    done, step = 0, BLOCK
    while done < most:
        step = min(2 * step, most - done)
        ours = target[to + done : to + done + step]
        theirs = base[source + done : source + done + step]
        if ours != theirs:
            return done + step - _length(int.from_bytes(ours, "big") ^ int.from_bytes(theirs, "big"))
        done += step
    return most


def _alike_before(base: bytes, source: int, target: bytes, to: int, most: int) -> int:
    """How many bytes, of at most ``most``, are the same before these two places."""
    done, step = 0, BLOCK
    while done < most:
        step = min(2 * step, most - done)
        ours = target[to - done - step : to - done]
        theirs = base[source - done - step : source - done]
        if ours != theirs:
            return done + step - _length(int.from_bytes(ours, "little") ^ int.from_bytes(theirs, "little"))
        done += step
    return most


def _length(number: int) -> int:
    """Bytes that a number takes."""
    return (number.bit_length() + 7) // 8


def _whole(target: bytes, to: int, source: int, count: int) -> Copy:
    """As much of a copy as begins and ends between two characters of the target."""
    end = to + count
    while to < end and target[to] & 0xC0 == 0x80:
        to, source = to + 1, source + 1
    while end > to and end < len(target) and target[end] & 0xC0 == 0x80:
        end -= 1
    return to, source, end - to


def _number(number: int) -> bytes:
    """A number as patches write it: base 64, the highest digit first."""
    written = DIGITS[number & 63 : (number & 63) + 1]
    while number := number >> 6:
        written = DIGITS[number & 63 : (number & 63) + 1] + written
    return written


def _checksum(target: bytes) -> int:
    """The sum of the big-endian 32-bit words, the last one filled up with zeros, modulo 2 ** 32."""
    first, second, third, fourth = (sum(target[place::4]) for place in range(4))
    return (first << 24) + (second << 16) + (third << 8) + fourth & 0xFFFFFFFF
