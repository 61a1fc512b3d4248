"""Tag filters: which publications of a channel a subscription wants, by their tags (PROTOCOL 13).

A filter comes from a client as a tree and is judged for every publication, so all that
can be done once is done when it comes: it is checked, bounded, brought into one form
(``lang in [b, a]`` and ``lang in [a, b, a]`` are the same wish), and made into plain
functions.  Filters that mean the same are the same object, as long as somebody has it:
whoever fans out judges each once, however many subscriptions share it.

What bounds the work: a leaf costs the same whatever the length of its list, and there
are at most ``NODES`` of them.  Values of tags are looked up and compared, never run.

Pure.
"""

import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from functools import lru_cache
from typing import Any
from weakref import WeakValueDictionary

import msgspec

DEPTH = 10
"""How deep a filter may be nested; a leaf alone is 1 deep."""

NODES = 50
"""Leaves and groups that a filter may have; in memory it takes some 40 KB then, for each subscription at worst."""

FILTER_BYTES = 4 * 1024
"""Bytes that a filter may have, written as JSON without spaces."""

NUMBER_CHARACTERS = 200
"""What is longer is no number."""

Tags = Mapping[str, str]
Test = Callable[[Tags], bool]

NO_TAGS: Tags = {}


class Node(msgspec.Struct, omit_defaults=True):
    """A filter as it comes: a leaf (``op`` is empty), or a group of others (PROTOCOL 13.1)."""

    op: str = ""
    key: str = ""
    cmp: str = ""
    val: str = ""
    vals: list[str] = []
    nodes: list["Node"] = []


class Filter:
    """A filter ready for use; made by ``read`` only, so that equal ones are identical."""

    __slots__ = ("__weakref__", "_test", "text")

    def __init__(self, text: bytes, test: Test) -> None:
        self.text = text
        """The one form in which everybody's filter of this meaning is written."""
        self._test = test

    def __repr__(self) -> str:
        return f"<Filter {self.text.decode()}>"

    def matches(self, tags: Tags | None) -> bool:
        """Is a publication with these tags wanted?  ``None`` is the same as no tags."""
        return self._test(tags or NO_TAGS)


_known: WeakValueDictionary[bytes, Filter] = WeakValueDictionary()
_decode = msgspec.json.Decoder(Node).decode


def read(text: bytes) -> Filter:
    """The filter that a client has sent as JSON.

    Raises ``ValueError``, which says what was expected, for one that is malformed or
    beyond ``DEPTH``, ``NODES`` or ``FILTER_BYTES``.
    """
    try:
        node = _settled(_decode(text), 1, iter(range(NODES)))
        settled = msgspec.json.encode(node)
    except msgspec.DecodeError as error:
        raise ValueError(f"expected a filter: {error}") from None
    except RecursionError:
        raise ValueError(f"expected a filter at most {DEPTH} deep") from None
    if len(settled) > FILTER_BYTES:
        raise ValueError(f"expected a filter of at most {FILTER_BYTES} bytes, got {len(settled)}")
    found = _known.get(settled)
    if found is None:
        found = _known[settled] = Filter(settled, _test_of(node))
    return found


# --- checked, and brought into one form --------------------------------------------
_SINGLE = frozenset(("eq", "neq", "sw", "ew", "ct", "gt", "gte", "lt", "lte"))
_LISTED = frozenset(("in", "nin"))
_PRESENT = frozenset(("ex", "nex"))


def _settled(node: Node, depth: int, left: Any) -> Node:
    """The same filter in the one form; takes one of ``left`` for each node."""
    if depth > DEPTH:
        raise ValueError(f"expected a filter at most {DEPTH} deep")
    if next(left, None) is None:
        raise ValueError(f"expected a filter of at most {NODES} nodes")
    if not node.op:
        return _settled_leaf(node)
    if node.op not in ("and", "or", "not"):
        raise ValueError(f'expected op to be "and", "or", "not" or nothing, got {node.op[:32]!r}')
    if not node.nodes or (node.op == "not" and len(node.nodes) > 1):
        wanted = "exactly one node" if node.op == "not" else "at least one node"
        raise ValueError(f"expected {wanted} in {node.op!r}, got {len(node.nodes)}")
    inner = {msgspec.json.encode(settled): settled for settled in (_settled(n, depth + 1, left) for n in node.nodes)}
    return Node(op=node.op, nodes=[inner[text] for text in sorted(inner)])


def _settled_leaf(node: Node) -> Node:
    cmp = node.cmp
    if cmp in _SINGLE:
        if not node.val or node.vals:
            raise ValueError(f"expected {cmp!r} to have val, and no vals")
    elif cmp in _LISTED:
        if not node.vals or node.val:
            raise ValueError(f"expected {cmp!r} to have vals, and no val")
    elif cmp not in _PRESENT:
        raise ValueError(f"expected a comparison, got cmp {cmp[:32]!r}")
    elif node.val or node.vals:
        raise ValueError(f"expected {cmp!r} to have neither val nor vals")
    if not node.key and cmp not in _PRESENT:
        raise ValueError(f"expected a key for {cmp!r}")
    return Node(key=node.key, cmp=cmp, val=node.val, vals=sorted(set(node.vals)))


# --- made into functions --------------------------------------------------------------
def _test_of(node: Node) -> Test:
    if not node.op:
        return _leaf(node)
    tests = tuple(map(_test_of, node.nodes))
    if node.op == "not":
        return _no(tests[0])
    return _every(tests) if node.op == "and" else _some(tests)


def _no(test: Test) -> Test:
    return lambda tags: not test(tags)


def _every(tests: tuple[Test, ...]) -> Test:
    return lambda tags: all(test(tags) for test in tests)


def _some(tests: tuple[Test, ...]) -> Test:
    return lambda tags: any(test(tags) for test in tests)


def _leaf(node: Node) -> Test:
    """One comparison; a tag that is missing equals nothing, but is in a list that has ``""``."""
    key, val, vals = node.key, node.val, frozenset(node.vals)
    match node.cmp:
        case "eq":
            return lambda tags: tags.get(key) == val
        case "neq":
            return lambda tags: tags.get(key) != val
        case "in":
            return lambda tags: tags.get(key, "") in vals
        case "nin":
            return lambda tags: tags.get(key, "") not in vals
        case "ex":
            return lambda tags: key in tags
        case "nex":
            return lambda tags: key not in tags
        case "sw":
            return lambda tags: key in tags and tags[key].startswith(val)
        case "ew":
            return lambda tags: key in tags and tags[key].endswith(val)
        case "ct":
            return lambda tags: key in tags and val in tags[key]
    return _ordered(key, node.cmp, val)


_ORDERS: dict[str, Callable[[Decimal, Decimal], bool]] = {
    "gt": Decimal.__gt__,
    "gte": Decimal.__ge__,
    "lt": Decimal.__lt__,
    "lte": Decimal.__le__,
}


def _ordered(key: str, cmp: str, val: str) -> Test:
    bound, order = number(val), _ORDERS[cmp]
    if bound is None:
        return lambda tags: False

    def holds(tags: Tags) -> bool:
        found = number(tags.get(key, ""))
        return found is not None and order(found, bound)

    return holds


_number = re.compile(r"[+-]?[0-9]+(?:\.[0-9]+)?", re.ASCII)


def number(text: str) -> Decimal | None:
    """A decimal number, exactly as written (a price is no float); ``None`` if the text is none."""
    return _read_number(text) if len(text) <= NUMBER_CHARACTERS else None


@lru_cache(maxsize=1024)
def _read_number(text: str) -> Decimal | None:
    """As ``number``, of a text that is short: one publication is held against many bounds."""
    return Decimal(text) if _number.fullmatch(text) else None
