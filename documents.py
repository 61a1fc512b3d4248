#!/usr/bin/env python3
"""The documents that are made, not written: tables of settings and of log events, and the site.

    documents.py tables         write docs/settings.md, and the README's tables of settings and log events
    documents.py site FOLDER    lay out the source of the site in FOLDER, for mkdocs.yml

The code is the truth for the tables: ``server/settings.py`` and the EVENTS of
``server/observe.py``.  The site is ``docs/`` with what its pages link to outside
of it (``OUTSIDE``), so that no page is written twice.  A page that links to
anything else is a mistake and said to be one, since a reader of the site could not
follow it.
"""

import argparse
import logging
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from server.configuration import reference
from server.observe import EVENTS
from server.settings import Settings

ROOT = Path(__file__).parent

OUTSIDE = {"server/PROTOCOL.md": "protocol.md", "SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md"}
"""Pages that lie elsewhere, and what they are called in the site."""
SHOWN = "deploy"
"""A folder whose files the site has beside its pages, as they are."""

LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
HEAD = """# Settings

From a file (TOML, YAML or JSON), the environment (`WATERSPOUT_`, with `__` between levels:
`WATERSPOUT_HTTP_SERVER__PORT=9000`) and flags, later ones winning. Names and meanings are Centrifugo's where it has
them. Durations are written like `300s`, `1h30m`, `500ms`. What is not known is an error that names it, and
`python run.py check` says all errors at once.

While nothing but the address, `sqlite` or `log` is configured the server listens on this machine only and everybody may
do everything. From the first setting that matters on it is closed but for what the settings open.

The options under `channel.without_namespace` are also those of each entry of `channel.namespaces`, and those under
`client.proxy.connect` of each other proxy.
"""


# --- tables: pure ----------------------------------------------------------------
def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; a bar inside a cell is written with a backslash."""
    lines = [heading, ["---"] * len(heading), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def settings_table(section: str = "") -> str:
    """All settings, or those of one section, with type, default and help."""
    rows = [row for row in reference() if not section or row.name.partition(".")[0] == section]
    cells = [(f"`{row.name}`", row.type, _default(row.default), row.help) for row in rows]
    return table(("setting", "type", "default", "what"), cells)


def _default(text: str) -> str:
    return text if text == "required" else f"`{text}`"


def events_table() -> str:
    """All log events with their weight, and when they happen with which fields."""
    rows = [(f"`{name}`", logging.getLevelName(weight).lower(), text) for name, (weight, text) in EVENTS.items()]
    return table(("event", "level", "when; fields"), rows)


def settings_page() -> str:
    """``docs/settings.md``: a section of the page for each of the settings."""
    parts = [HEAD]
    for name, field in Settings.model_fields.items():
        parts.append(f"\n## {name}\n\n{field.description}\n\n{settings_table(name)}")
    return "".join(parts)


def with_tables(text: str) -> str:
    """A document with both tables between their marks."""
    for name, made in (("settings", settings_table()), ("events", events_table())):
        first, mark, rest = text.partition(f"<!-- {name} -->\n")
        _, end, last = rest.partition(f"<!-- /{name} -->")
        if not mark or not end:
            raise ValueError(f"expected <!-- {name} --> … <!-- /{name} -->")
        text = first + mark + made + end + last
    return text


# --- the site ------------------------------------------------------------------------
def on_the_site(text: str, place: str) -> str:
    """A page of the repository as the site has it; ``place`` is where it lies.

    Raises ``ValueError``: a link that leads nowhere, or out of the site.
    """

    def target(found: re.Match[str]) -> str:
        link, mark, part = found[1].partition("#")
        if not link or "://" in link:
            return found[1]
        path = (ROOT / place).parent.joinpath(link).resolve()
        if not path.is_file():
            raise ValueError(f"{place}: {found[1]} leads nowhere")
        name = path.relative_to(ROOT).as_posix()
        return _name_on_the_site(name, place) + mark + part

    return LINK.sub(target, text)


def _name_on_the_site(name: str, place: str) -> str:
    if name in OUTSIDE:
        return OUTSIDE[name]
    if name.startswith(f"{SHOWN}/"):
        return name
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    raise ValueError(f"{place}: {name} is not on the site; see OUTSIDE in documents.py")


def lay_out(folder: Path) -> None:
    """Write the source of the site."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in sorted((ROOT / "docs").glob("*.md")):
        (folder / path.name).write_text(on_the_site(path.read_text(), f"docs/{path.name}"))
    for place, name in OUTSIDE.items():
        (folder / name).write_text(on_the_site((ROOT / place).read_text(), place))
    shutil.copytree(ROOT / SHOWN, folder / SHOWN, ignore=shutil.ignore_patterns("secrets"))


def main(argv: list[str]) -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="documents.py", description="Make the documents that are not written.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("tables", help="write docs/settings.md and the README's tables")
    commands.add_parser("site", help="lay out the source of the site").add_argument("folder", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.command == "site":
        try:
            lay_out(arguments.folder)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
        return 0
    (ROOT / "docs" / "settings.md").write_text(settings_page())
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
