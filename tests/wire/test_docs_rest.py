"""docs/rest.md leaves nothing out; that its commands print what it says, test_docs_commands.py tests."""

import re

from support import ROOT

from handlers.problems import STATUS, WORDS

PAGE = (ROOT / "docs" / "rest.md").read_text()


def test_every_code_has_a_row() -> None:
    """The ``type`` of each problem that we name leads to a row of the page's table."""
    rows = {int(code) for code in re.findall(r'<a id="code-(\d+)"></a>', PAGE)}
    assert WORDS.keys() <= rows
    assert {code for code in STATUS if code < 3000} <= rows


def test_every_path_and_header_is_shown() -> None:
    """What the OpenAPI table has, the page has with a command: each path, and each header that does something."""
    for place in ("publications", "presence", "events", "/v1/events", "/v1/openapi.json"):
        assert place in PAGE
    for word in ("since", "limit", "reverse", "Prefer", "If-None-Match", "Idempotency-Key", "Last-Event-ID", "token"):
        assert word in PAGE
