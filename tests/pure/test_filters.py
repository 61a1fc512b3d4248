"""Tag filters: what is one, what it means, and that equal ones are the same (PROTOCOL 13)."""

import gc
import json
import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server import filters
from server.filters import Filter


def _read(node: Any) -> Filter:
    return filters.read(json.dumps(node).encode())


def _leaf(key: str, cmp: str, val: str = "", vals: list[str] | None = None) -> dict[str, Any]:
    return {"key": key, "cmp": cmp, **({"val": val} if val else {}), **({"vals": vals} if vals else {})}


@pytest.mark.parametrize(
    ("leaf", "yes", "no"),
    [
        (_leaf("a", "eq", "x"), [{"a": "x"}], [{}, {"a": ""}, {"a": "X"}, {"b": "x"}]),
        (_leaf("a", "neq", "x"), [{}, {"a": "y"}, {"b": "x"}], [{"a": "x"}]),
        (_leaf("a", "in", vals=["x", "y"]), [{"a": "x"}, {"a": "y"}], [{}, {"a": "z"}, {"a": ""}]),
        (_leaf("a", "in", vals=["x", ""]), [{}, {"a": ""}, {"a": "x"}], [{"a": "z"}]),
        (_leaf("a", "nin", vals=["x", "y"]), [{}, {"a": "z"}], [{"a": "x"}]),
        (_leaf("a", "nin", vals=[""]), [{"a": "z"}], [{}, {"a": ""}]),
        (_leaf("a", "ex"), [{"a": ""}, {"a": "x"}], [{}, {"b": "x"}]),
        (_leaf("a", "nex"), [{}, {"b": "x"}], [{"a": ""}]),
        (_leaf("", "ex"), [{"": "x"}], [{}, {"a": "x"}]),
        (_leaf("a", "sw", "ab"), [{"a": "abc"}, {"a": "ab"}], [{}, {"a": "xab"}]),
        (_leaf("a", "ew", "bc"), [{"a": "abc"}], [{}, {"a": "bcd"}]),
        (_leaf("a", "ct", "b"), [{"a": "abc"}], [{}, {"a": "ac"}]),
        (_leaf("a", "gt", "9.5"), [{"a": "10"}, {"a": "9.50000000000000000000000001"}], [{"a": "9.5"}, {"a": "9"}]),
        (_leaf("a", "gte", "9.5"), [{"a": "9.50"}, {"a": "+10"}], [{"a": "9.4"}, {}, {"a": ""}, {"a": "ten"}]),
        (_leaf("a", "lt", "-1"), [{"a": "-1.5"}], [{"a": "-1"}, {"a": "0"}, {}, {"a": "-2e1"}, {"a": "NaN"}]),
        (_leaf("a", "lte", "0.1"), [{"a": "0.1"}, {"a": "0.10"}, {"a": "-7"}], [{"a": "0.11"}, {"a": "Infinity"}]),
        (_leaf("a", "gt", "ten"), [], [{"a": "11"}, {"a": "ten"}, {}]),
        (_leaf("a", "lt", "5"), [], [{"a": "1" * 201}, {"a": "٣"}, {"a": " 3"}, {"a": "3."}, {"a": ".3"}]),
    ],
)
def test_comparisons(leaf: dict[str, Any], yes: list[dict[str, str]], no: list[dict[str, str]]) -> None:
    """PROTOCOL 13.2, row by row; what is no number is in no order."""
    filter = _read(leaf)
    assert [tags for tags in yes if not filter.matches(tags)] == []
    assert [tags for tags in no if filter.matches(tags)] == []
    opposite = _read({"op": "not", "nodes": [leaf]})
    assert [tags for tags in [*yes, *no] if opposite.matches(tags) == filter.matches(tags)] == []


def test_a_publication_without_tags() -> None:
    """It is judged as one with an empty set of them."""
    assert _read(_leaf("a", "nex")).matches(None)
    assert not _read(_leaf("a", "ex")).matches(None)


A, B = _leaf("a", "ex"), _leaf("b", "eq", "1")


@pytest.mark.parametrize(
    ("node", "why"),
    [
        (None, "Expected `object`, got `null`"),
        (1, "Expected `object`, got `int`"),
        ([], "Expected `object`, got `array`"),
        ({}, "got cmp ''"),
        ({"key": "a"}, "got cmp ''"),
        ({"key": "a", "cmp": "like", "val": "x"}, "got cmp 'like'"),
        ({"key": "a", "cmp": "eq"}, "'eq' to have val"),
        ({"key": "a", "cmp": "gte", "vals": ["1"]}, "'gte' to have val"),
        ({"key": "a", "cmp": "eq", "val": "x", "vals": ["x"]}, "'eq' to have val, and no vals"),
        ({"key": "a", "cmp": "in"}, "'in' to have vals"),
        ({"key": "a", "cmp": "nin", "val": "x", "vals": ["x"]}, "'nin' to have vals, and no val"),
        ({"key": "a", "cmp": "ex", "val": "x"}, "neither val nor vals"),
        ({"key": "a", "cmp": "nex", "vals": ["x"]}, "neither val nor vals"),
        ({"cmp": "eq", "val": "x"}, "expected a key"),
        ({"key": 1, "cmp": "eq", "val": "x"}, "Expected `str`, got `int`"),
        ({"key": "a", "cmp": "eq", "val": 1}, "Expected `str`, got `int`"),
        ({"key": "a", "cmp": "in", "vals": "x"}, "Expected `array`"),
        ({"op": "xor", "nodes": [A, B]}, "got 'xor'"),
        ({"op": "and"}, "at least one node"),
        ({"op": "or", "nodes": []}, "at least one node"),
        ({"op": "not"}, "exactly one node"),
        ({"op": "not", "nodes": [A, B]}, "exactly one node"),
        ({"op": "and", "nodes": [A, {"key": "b"}]}, "got cmp ''"),
        ({"op": "or", "nodes": [None]}, "Expected `object`, got `null`"),
        ({"key": "a", "cmp": "eq", "val": "x" * 9000}, "at most 4096 bytes"),
        ({"op": "and", "nodes": [A] * 50}, "at most 50 nodes"),
    ],
)
def test_what_is_no_filter(node: Any, why: str) -> None:
    """PROTOCOL 13.1.2: each is refused, and the log can say why."""
    with pytest.raises(ValueError, match="expected") as caught:
        _read(node)
    assert why in str(caught.value)


@pytest.mark.parametrize("depth", [11, 300, 100_000])
def test_too_deep(depth: int) -> None:
    """Nested beyond the limit, by one or by more than any parser bears."""
    text = b'{"op":"not","nodes":[' * (depth - 1) + b'{"key":"a","cmp":"ex"}' + b"]}" * (depth - 1)
    with pytest.raises(ValueError, match="expected a filter"):
        filters.read(text)


def test_just_within_the_limits() -> None:
    """Ten deep and fifty nodes are a filter still."""
    node: dict[str, Any] = A
    for _ in range(9):
        node = {"op": "not", "nodes": [node]}
    assert not _read(node).matches({"a": ""})
    assert _read({"op": "or", "nodes": [_leaf("a", "eq", str(n)) for n in range(1, 50)]}).matches({"a": "49"})


def test_equal_filters_are_one() -> None:
    """Order, repeats, absent and empty fields make no difference; whoever means the same shares the object."""
    first = _read({"op": "and", "nodes": [_leaf("a", "in", vals=["x", "y"]), B]})
    same = _read(
        {"op": "and", "nodes": [B, {"vals": ["y", "x", "y"], "cmp": "in", "key": "a", "op": "", "val": ""}, B]}
    )
    assert same is first
    assert _read({"op": "or", "nodes": [_leaf("a", "in", vals=["x", "y"]), B]}) is not first
    assert filters.read(first.text) is first


def test_a_filter_that_nobody_has_is_forgotten() -> None:
    """Clients may send as many different ones as they like: what stays is what is subscribed with."""
    kept = _read(_leaf("a", "eq", "kept"))
    for number in range(1000):
        _read(_leaf("a", "eq", f"forgotten {number}"))
    gc.collect()
    assert [text for text in filters._known if b"forgotten" in text] == []
    assert _read(_leaf("a", "eq", "kept")) is kept


def test_the_heaviest_filter_is_light() -> None:
    """Fifty nodes over a tag of 60 KB are judged in far less than a publication costs elsewhere."""
    heavy = _read({"op": "or", "nodes": [_leaf("a", "gt", str(10**40 + n)) for n in range(49)]})
    began = time.process_time()
    for _ in range(100):
        assert not heavy.matches({"a": "9" * 60_000})
        assert not heavy.matches({"a": "9" * 40})
    assert time.process_time() - began < 1
    assert filters._read_number.cache_info().currsize <= 1024


NAMES = st.sampled_from(["", "a", "b"])
VALUES = st.sampled_from(["", "1", "1.0", "2", "x"])
FULL = st.sampled_from(["1", "1.0", "2", "x"])
LEAVES = st.one_of(
    st.builds(
        _leaf, NAMES.filter(bool), st.sampled_from(["eq", "neq", "sw", "ew", "ct", "gt", "gte", "lt", "lte"]), FULL
    ),
    st.builds(
        lambda key, cmp, vals: {"key": key, "cmp": cmp, "vals": vals},
        NAMES.filter(bool),
        st.sampled_from(["in", "nin"]),
        st.lists(VALUES, min_size=1, max_size=3),
    ),
    st.builds(_leaf, NAMES, st.sampled_from(["ex", "nex"])),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(
            lambda op, nodes: {"op": op, "nodes": nodes}, st.sampled_from(["and", "or"]), st.lists(inner, min_size=1)
        ),
        st.builds(lambda node: {"op": "not", "nodes": [node]}, inner),
    ),
    max_leaves=8,
)


def _depth(node: dict[str, Any]) -> int:
    return 1 + max(map(_depth, node.get("nodes", ())), default=0)


def _plainly(node: dict[str, Any], tags: dict[str, str]) -> bool:
    """The table of PROTOCOL 13.2 once more, read out loud."""
    inner = [_plainly(one, tags) for one in node.get("nodes", ())]
    match node.get("op", ""):
        case "and":
            return all(inner)
        case "or":
            return any(inner)
        case "not":
            return not inner[0]
    tag, val, there = tags.get(node["key"], ""), node.get("val", ""), node["key"] in tags
    numbers = {"1": 1, "1.0": 1, "2": 2}
    found, bound = numbers.get(tag), numbers.get(val)
    ordered = there and found is not None and bound is not None
    return {
        "eq": there and tag == val,
        "neq": not there or tag != val,
        "in": tag in node.get("vals", ()),
        "nin": tag not in node.get("vals", ()),
        "ex": there,
        "nex": not there,
        "sw": there and tag.startswith(val),
        "ew": there and tag.endswith(val),
        "ct": there and val in tag,
        "gt": ordered and (found or 0) > (bound or 0),
        "gte": ordered and (found or 0) >= (bound or 0),
        "lt": ordered and (found or 0) < (bound or 0),
        "lte": ordered and (found or 0) <= (bound or 0),
    }[node["cmp"]]


@given(TREES.filter(lambda tree: _depth(tree) <= filters.DEPTH), st.dictionaries(NAMES, VALUES))
def test_trees(tree: dict[str, Any], tags: dict[str, str]) -> None:
    """Whatever the tree, its one form means what the tree does."""
    filter = _read(tree)
    assert filter.matches(tags) == _plainly(tree, tags)
    assert filters.read(filter.text) is filter


@given(st.binary(max_size=60))
def test_no_bytes_are_a_fault(text: bytes) -> None:
    """Whatever comes is a filter, or a ValueError."""
    found: Filter | None = None
    with suppress(ValueError):
        found = filters.read(text)
    assert found is None or filters.read(found.text) is found
