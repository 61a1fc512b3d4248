"""Patterns of channel names (PROTOCOL 15.2) against a matcher that tries everything, and against time."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.globs import LONGEST, MOST, matcher

# A pattern as a tree: what the property tests make, write down, and match in the simplest way there is.
Star, One = "*", "?"
Tree = tuple[object, ...]


def written(tree: Tree) -> str:
    """The pattern that a tree stands for."""
    text = ""
    for part in tree:
        match part:
            case str():
                text += part
            case ("class", negated, members):
                text += f"[{'!' if negated else ''}{members}]"
            case tuple():
                text += "{" + ",".join(written(inner) for inner in part) + "}"
    return text


def matches(tree: Tree, name: str) -> bool:
    """Does the whole name match?  Every way is tried."""

    @cache
    def ends(tree: Tree, at: int) -> frozenset[int]:
        if not tree:
            return frozenset((at,))
        part, rest = tree[0], tree[1:]
        match part:
            case "*":
                nexts = set(range(at, len(name) + 1))
            case "?":
                nexts = {at + 1} if at < len(name) else set()
            case str():
                nexts = {at + 1} if name[at : at + 1] == part else set()
            case ("class", negated, members):
                nexts = {at + 1} if at < len(name) and (name[at] in str(members)) is not negated else set()
            case tuple():
                nexts = {end for inner in part for end in ends(inner, at)}
            case _:
                raise TypeError(part)
        return frozenset(end for found in nexts for end in ends(rest, found))

    return len(name) in ends(tree, 0)


LETTERS = "abc:"
plain = st.sampled_from([*LETTERS, Star, Star, One])
classes = st.tuples(st.just("class"), st.booleans(), st.text(LETTERS, min_size=1, max_size=3))
trees = st.recursive(
    st.lists(plain | classes, max_size=6).map(tuple),
    lambda inner: st.tuples(inner, st.lists(inner, min_size=1, max_size=2).map(tuple), inner).map(
        lambda three: (*three[0], three[1], *three[2])
    ),
    max_leaves=5,
)


@given(trees, st.text(LETTERS, max_size=12))
def test_a_pattern_matches_what_it_says(tree: Tree, name: str) -> None:
    """Whatever stars, classes and alternatives are put together, a name matches exactly if there is a way."""
    pattern = written(tree)
    if pattern:
        assert matcher(pattern)(name) is matches(tree, name)


@given(st.text(max_size=20))
def test_a_name_written_out_matches_itself_alone(name: str) -> None:
    """With a backslash before each character every name is its own pattern, line breaks and brackets included."""
    exact = matcher("".join(f"\\{character}" for character in name) or "*")
    assert exact(name)
    if name:
        assert not exact(name + "x")


@pytest.mark.parametrize(
    ("pattern", "taken", "passed_over"),
    [
        ("", ["", "news", "a\nb"], []),
        ("chat:*", ["chat:", "chat:1"], ["chat", "xchat:1", "Chat:1"]),
        ("a*a", ["aa", "aba"], ["a", "ab"]),
        ("chat:[!a-c]?", ["chat:d1", "chat:--"], ["chat:a1", "chat:d"]),
        ("{news,chat:{1,2*}}", ["news", "chat:1", "chat:23"], ["chat:3", "chat:"]),
        ("*{abcd,c}*d", ["abcd", "cd", "abcdd"], ["abc"]),
        ("a.b", ["a.b"], ["axb"]),
        ("[-a]", ["-", "a"], ["b"]),
        (r"\*", ["*"], ["a"]),
        ("a,b}", ["a,b}"], ["a"]),
    ],
)
def test_examples(pattern: str, taken: list[str], passed_over: list[str]) -> None:
    """What each sign means, one by one."""
    taking = matcher(pattern)
    assert [name for name in taken if not taking(name)] == []
    assert [name for name in passed_over if taking(name)] == []


@pytest.mark.parametrize(
    "pattern",
    ["[", "[]", "[!]", "[abc", "[c-a]", "{a,b", "a{b{c}", "\\", "*" * (LONGEST + 1), "{a,b}" * 7],
)
def test_what_is_no_pattern(pattern: str) -> None:
    """Open brackets, empty or backward classes, and what would be too much work are refused in words."""
    with pytest.raises(ValueError, match="expected"):
        matcher(pattern)


def test_as_many_alternatives_as_are_promised() -> None:
    """The bound counts what a pattern is written out into, wherever its braces stand."""
    assert matcher("{a,b}" * 6)("ababab")
    assert MOST == 2**6


def test_no_pattern_takes_long() -> None:
    """Patterns that keep other matchers busy for ages are answered by the time this test times out otherwise."""
    name = "a" * 255
    for pattern in ("*a" * 200 + "b", "*a*{a,b}" * 6 + "b", "{*a*a*a*b,*a*a*c}*" * 3 + "d"):
        assert not matcher(pattern)(name)
    assert matcher("*a" * 200)(name)
    with pytest.raises(ValueError, match="alternatives"):
        matcher("{" * 200 + "a,b" + "}" * 200 + "{a,b}" * 10)


def test_a_pattern_is_no_regular_expression() -> None:
    """What means something to ``re`` means nothing here."""
    for sign in "^$.|()+":
        assert matcher(sign)(sign)
        assert matcher(f"[{sign}]")(sign)
    assert not matcher("^")("")
    assert matcher("a b")("a b")
