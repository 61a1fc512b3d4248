"""The documents say what the code says: clauses, codes, settings, log events, dependencies.

The code is the truth for tables, ``server/PROTOCOL.md`` for clauses.  Each test names what is missing where, so that
mending it takes no search.
"""

import configparser
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]
from google.protobuf.descriptor import FieldDescriptor

import documents
from server import errors, protobuf
from server.configuration import load, reference
from server.observe import EVENTS

ROOT = Path(__file__).parent.parent.parent
PROTOCOL = (ROOT / "server" / "PROTOCOL.md").read_text()

NUMBER = r"\d+(?:\.\d+){0,2}"
CITATION = re.compile(rf"\bPROTOCOL\s+({NUMBER}(?:(?:,\s+(?:and\s+)?|\s+and\s+|\s+to\s+){NUMBER})*|appendix [A-Z])")
HEADING = re.compile(rf"^#+ ({NUMBER}) |^## (Appendix [A-Z])", re.MULTILINE)
CLAUSE = re.compile(rf"^\*\*({NUMBER})\*\* ", re.MULTILINE)
REFERENCE = re.compile(rf"§({NUMBER})")
SCALARS = {
    FieldDescriptor.TYPE_STRING: "s",
    FieldDescriptor.TYPE_BOOL: "b",
    FieldDescriptor.TYPE_BYTES: "y",
    FieldDescriptor.TYPE_UINT32: "u32",
    FieldDescriptor.TYPE_UINT64: "u64",
    FieldDescriptor.TYPE_INT32: "i32",
    FieldDescriptor.TYPE_INT64: "i64",
}
SECTIONS = sorted({row.name.partition(".")[0] for row in reference()})
SETTING = re.compile(rf"`((?:{'|'.join(SECTIONS)})\.[a-z_.]+)`")

PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]


# --- reading documents -------------------------------------------------------
def cited(text: str) -> list[str]:
    """The clauses that a text cites: ``PROTOCOL 4.2``, ``PROTOCOL 2.3, 3.4``, ``PROTOCOL 3 to 6`` …"""
    return [clause for found in CITATION.findall(text) for clause in re.findall(rf"{NUMBER}|appendix [A-Z]", found)]


def place(clause: str) -> tuple[int, ...]:
    """A clause's number in a form that sorts."""
    return tuple(int(part) for part in clause.split("."))


def clauses(text: str) -> set[str]:
    """What may be cited of a protocol text: its sections, its clauses, its appendices."""
    headings = {number or appendix.replace("A", "a", 1) for number, appendix in HEADING.findall(text)}
    return headings | set(CLAUSE.findall(text))


def section(number: str) -> str:
    """A section of PROTOCOL.md, from its heading to the next one of any level."""
    found = re.search(rf"^#+ {re.escape(number)} .*?(?=^#+ |\Z)", PROTOCOL, re.MULTILINE | re.DOTALL)
    assert found is not None, f"PROTOCOL.md has no section {number}"
    return found[0]


def rows(text: str) -> list[list[str]]:
    """The cells of each row of the Markdown tables in a text, without headings, rules, and code marks."""
    table: list[list[str]] = []
    for line in text.splitlines():
        if not line.startswith("|"):
            continue
        cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if all(re.fullmatch(":?-+:?", cell) for cell in cells):
            table.pop()  # what stood above the rule was the heading
        else:
            table.append([re.sub("^`([^`]*)`$", r"\1", cell) for cell in cells])
    return table


def readme(name: str) -> list[list[str]]:
    """The rows of the README's table between ``<!-- name -->`` and ``<!-- /name -->``."""
    text = (ROOT / "README.md").read_text()
    found = re.findall(f"<!-- {name} -->(.*?)<!-- /{name} -->", text, re.DOTALL)
    assert len(found) == 1, f"expected one <!-- {name} --> … <!-- /{name} --> in README.md, found {len(found)}"
    return rows(found[0])


def sources() -> Iterator[Path]:
    """Our Python files, where clauses are cited."""
    yield ROOT / "run.py"
    for folder in ("server", "handlers", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "node_modules" not in path.parts:
                yield path


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("See PROTOCOL 4.2.", ["4.2"]),
        ("PROTOCOL 2.3, 3.4).", ["2.3", "3.4"]),
        ("PROTOCOL 3 to 6.", ["3", "6"]),
        ("PROTOCOL 9 and 10", ["9", "10"]),
        ("PROTOCOL\n    8.1.2, and 8.3", ["8.1.2", "8.3"]),
        ("PROTOCOL 10.2, steps 5, 7", ["10.2"]),
        ("PROTOCOL 2.2; RFC 6455 4.2", ["2.2"]),
        ("PROTOCOL appendix A", ["appendix A"]),
        ("the PROTOCOL says", []),
    ],
)
def test_citations_are_found(text: str, found: list[str]) -> None:
    """A citation is found in each of the forms in which docstrings write it."""
    assert cited(text) == found


def test_rows_are_read() -> None:
    """A table's rows are read cell by cell; a bar inside a cell is written with a backslash."""
    assert rows("| a | b |\n| --- | :-: |\n| `x.y` | `1` or `2` |\n\n| a |\n|---|\n| p \\| q |") == [
        ["x.y", "`1` or `2`"],
        ["p | q"],
    ]


# --- PROTOCOL.md -------------------------------------------------------------
def test_every_cited_clause_exists() -> None:
    """Whoever follows a ``PROTOCOL n.n`` of the code or the tests finds that clause."""
    known = clauses(PROTOCOL)
    citations = [(path, clause) for path in sources() if path != Path(__file__) for clause in cited(path.read_text())]
    assert len(citations) > 100
    lost = {f"{path.relative_to(ROOT)}: PROTOCOL {clause}" for path, clause in citations if clause not in known}
    assert not lost


def test_references_inside_the_protocol_exist() -> None:
    """Each § of PROTOCOL.md points at a section or clause of it."""
    assert set(REFERENCE.findall(PROTOCOL)) <= clauses(PROTOCOL)


def test_clauses_are_numbered_once_and_in_order() -> None:
    """No number is given twice, numbers ascend, and a clause stands in the section that its number names."""
    found = re.findall(rf"^(?:#+|\*\*)\s*({NUMBER})(?:\*\*)? ", PROTOCOL, re.MULTILINE)
    assert [number for number, count in Counter(found).items() if count > 1] == []
    places = [place(number) for number in found]
    assert places == sorted(places)
    stray = []
    headed: tuple[int, ...] = ()
    for number in re.findall(rf"^(#+ {NUMBER}|\*\*{NUMBER}\*\*) ", PROTOCOL, re.MULTILINE):
        at = place(number.strip("#* "))
        if number.startswith("#"):
            headed = at
        elif at[: len(headed)] != headed and at != (*headed, 0, at[-1]):
            stray.append(number)
    assert stray == []


def test_every_section_is_there() -> None:
    """Sections 1 to 22 all exist, those too whose features do not, and none of them is empty."""
    tops = [number for number, _ in HEADING.findall(PROTOCOL) if number and "." not in number]
    assert tops == [str(number) for number in range(1, 23)]
    bodies = re.split(r"^## .*$", PROTOCOL, flags=re.MULTILINE)[1:]
    assert [index for index, body in enumerate(bodies, 1) if not body.strip()] == []


def test_refusals_are_those_of_the_code() -> None:
    """Section 7.1 lists exactly the errors that the code has, in the same words, temporary or not."""
    known = {one.code: one for one in vars(errors).values() if isinstance(one, errors.Refusal)}
    assert known == errors.REFUSALS
    stated = {int(code): (message, temporary) for code, message, temporary, _ in rows(section("7.1"))}
    assert stated == {code: (one.message, "yes" if one.temporary else "") for code, one in known.items()}


def test_disconnects_are_those_of_the_code() -> None:
    """Section 7.2 lists exactly the disconnects that the code has, in the same words, and who comes back."""
    known = {one.code: one for one in vars(errors).values() if isinstance(one, errors.Disconnect)}
    assert known == errors.DISCONNECTS
    stated = {int(code): (reason, back) for code, reason, back, _ in rows(section("7.2"))}
    assert stated == {code: (one.reason, "yes" if one.comes_back else "no") for code, one in known.items()}


def test_unsubscribes_are_those_of_the_code() -> None:
    """Section 7.3 lists exactly the unsubscribes that the code has, in the same words."""
    known = {one.code: one.reason for one in vars(errors).values() if isinstance(one, errors.Unsubscribe)}
    assert {int(code): reason for code, reason, _ in rows(section("7.3"))} == known


def test_settings_named_in_the_protocol_exist() -> None:
    """Each setting that PROTOCOL.md names exists, or is a group of some."""
    names = {row.name for row in reference()}
    groups = {name.rsplit(".", depth)[0] for name in names for depth in range(1, name.count(".") + 1)}
    named = set(SETTING.findall(PROTOCOL))
    assert named
    assert named <= names | groups


def test_limits_have_their_true_defaults() -> None:
    """Section 18 states each limit's default as the settings have it."""
    defaults = {row.name: row.default for row in reference()}
    stated = {setting: default for _, default, setting, _ in rows(section("18"))}
    assert stated
    assert stated == {setting: defaults.get(setting) for setting in stated}


def kind(field: FieldDescriptor) -> str:
    """A Protobuf field's type as appendix A writes it."""
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return "{}" + kind(field.message_type.fields_by_name["value"])
    one = SCALARS[field.type] if field.message_type is None else field.message_type.name
    return f"[]{one}" if field.is_repeated else one


def test_field_numbers_are_those_of_the_code() -> None:
    """Appendix A lists each Protobuf message with exactly the fields that we encode and decode with."""
    messages = protobuf.Command.DESCRIPTOR.file.message_types_by_name
    fields = {
        name: " · ".join(f"{field.number} {field.name}:{kind(field)}" for field in message.fields) or "none"
        for name, message in messages.items()
    }
    assert {row[0]: row[1] for row in rows(PROTOCOL[PROTOCOL.index("## Appendix A") :])} == fields


# --- README.md ---------------------------------------------------------------
def test_every_setting_is_documented() -> None:
    """The README lists every setting with its default, and none that does not exist."""
    table = readme("settings")
    assert {row[0]: row[2] for row in table} == {row.name: row.default for row in reference()}
    assert len(table) == len(reference())


def test_every_log_event_is_documented() -> None:
    """The README lists every log event with its weight, meaning and fields, and none that does not exist."""
    stated = {name: (weight, meaning) for name, weight, meaning in readme("events")}
    events = EVENTS.items()
    assert stated == {name: (logging.getLevelName(weight).lower(), meaning) for name, (weight, meaning) in events}


def test_every_dependency_is_documented() -> None:
    """Each package that running or testing installs has a row in the README that says what it is for."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    wanted = config["options"]["install_requires"] + config["options.extras_require"]["test"]
    packages = {re.split(r"[\s\[<>=!~;]", line.strip())[0].lower() for line in wanted.splitlines() if line.strip()}
    assert packages
    documented = {word.lower() for row in readme("dependencies") for word in re.findall(r"[\w.-]+", row[0])}
    assert packages - documented == set()


# --- docs/ -------------------------------------------------------------------
def test_tables_are_made_from_the_code() -> None:
    """docs/settings.md and the README's tables are what ``python documents.py tables`` (or make docs) writes."""
    for name, made in (
        ("docs/settings.md", documents.settings_page()),
        ("README.md", documents.with_tables((ROOT / "README.md").read_text())),
    ):
        assert (ROOT / name).read_text() == made, f"{name} is behind the code: python documents.py tables"


def test_every_page_has_its_place(tmp_path: Path) -> None:
    """mkdocs.yml leads to each page of docs/ and to those that lie elsewhere, and no link of theirs leads nowhere."""
    documents.lay_out(tmp_path / "site")
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(_leaves(nav)) == sorted(path.name for path in (tmp_path / "site").glob("*.md"))


def _leaves(nav: object) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, list | dict):
        for one in nav.values() if isinstance(nav, dict) else nav:
            yield from _leaves(one)


def test_what_pages_name_exists() -> None:
    """Each setting or log event, and each clause of the protocol, that a page names is there."""
    names = {row.name for row in reference()}
    groups = {name.rsplit(".", depth)[0] for name in names for depth in range(1, name.count(".") + 1)}
    for page in PAGES:
        text = page.read_text()
        named = {name for name in SETTING.findall(text) if not re.search(r"\.(ts|js)$|^app\.server\.", name)}
        if page.name != "hooks.md":  # there ``client`` and ``app`` are objects
            assert named <= names | groups | EVENTS.keys(), page.name
        assert set(cited(text)) <= clauses(PROTOCOL), page.name


def test_configurations_in_pages_have_no_fault(tmp_path: Path) -> None:
    """What a page shows as a configuration, in TOML or JSON, the server takes."""
    seen = 0
    for page in PAGES:
        for kind, text in re.findall(r"^```(toml|json)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
            shown = kind == "toml" or ("…" not in text and json.loads(text).keys() <= {*SECTIONS})
            if not shown:
                continue
            file = tmp_path / f"config.{kind}"
            file.write_text(text)
            assert load(config=file, environ={}, flags={}).configured, page.name
            seen += 1
    assert seen >= 5
