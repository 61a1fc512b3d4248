"""The log says what its table says: each event that the code tells is in it, with the fields that it is told with."""

import ast
import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from server.observe import EVENTS, JsonFormatter, TextFormatter, event, happened

ROOT = Path(__file__).parent.parent.parent


class Told(NamedTuple):
    """One place in the code that tells an event; ``names`` is a pattern where its name is put together."""

    place: str
    names: re.Pattern[str]
    fields: frozenset[str]


def sources() -> list[Path]:
    """The files of the program, but for the one with the table."""
    files = [ROOT / "run.py", *sorted((ROOT / "server").rglob("*.py")), *sorted((ROOT / "handlers").rglob("*.py"))]
    return [file for file in files if file.name != "observe.py"]


def told() -> Iterator[Told]:
    """Every call of ``event`` in the program."""
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id != "event":
                continue
            if not node.args or (pattern := _pattern(node.args[0])) is None:
                continue
            fields = frozenset(keyword.arg for keyword in node.keywords if keyword.arg not in (None, "fault"))
            yield Told(f"{path.relative_to(ROOT)}:{node.lineno}", pattern, frozenset(map(str, fields)))


def _pattern(name: ast.expr) -> re.Pattern[str] | None:
    match name:
        case ast.Constant(value=str(text)) if "." in text:
            return re.compile(re.escape(text))
        case ast.JoinedStr(values=parts):
            texts = (re.escape(part.value) if isinstance(part, ast.Constant) else ".*" for part in parts)
            return re.compile("".join(map(str, texts)))
        case _:
            return None


def test_what_is_told_is_in_the_table() -> None:
    """Each event in the code has a row, whose words name each field that it has there."""
    places = list(told())
    assert len(places) > 50
    faults = []
    for place, names, fields in places:
        rows = [meaning for name, (_, meaning) in EVENTS.items() if names.fullmatch(name)]
        if not any(all(f"`{field}`" in row for field in fields) for row in rows):
            faults.append(f"{place}: {names.pattern} with {', '.join(sorted(fields))}")
    assert faults == []


def test_what_is_in_the_table_is_told() -> None:
    """No row of the table is of an event that nobody tells."""
    patterns = [names for _, names, _ in told()]
    silent = {name for name in EVENTS if not any(names.fullmatch(name) for names in patterns)}
    silent -= {name for path in sources() for name in silent if f'"{name}"' in path.read_text()}
    assert silent <= {"log.unstructured"}, "it stands for what libraries say"


def _lines(formatter: logging.Formatter) -> tuple[logging.Logger, logging.Handler, io.StringIO]:
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(formatter)
    logger = logging.getLogger("waterspout")
    logger.addHandler(handler)
    return logger, handler, text


@pytest.mark.parametrize("why", ["plain", 'two words and "quotes"', "a\nbreak", "ünïcode", ""])
def test_text_and_json_say_the_same(why: str) -> None:
    """An event is one line in either form, whatever its fields hold; JSON can be read back; it is counted."""
    before = happened["app.reloading"]
    lines = []
    for formatter in (TextFormatter(), JsonFormatter()):
        logger, handler, text = _lines(formatter)
        try:
            event("app.reloading", path=why)
        finally:
            logger.removeHandler(handler)
        assert text.getvalue().count("\n") == 1
        lines.append(text.getvalue())
    entry = json.loads(lines[1])
    assert (entry["event"], entry["level"], entry["path"]) == ("app.reloading", "info", why)
    assert lines[0].split(" ")[1:3] == ["info", "app.reloading"]
    assert happened["app.reloading"] == before + 2
