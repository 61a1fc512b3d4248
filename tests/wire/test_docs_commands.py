"""Every command of the README and of docs/ is run as it stands, page by page, as somebody would who reads along.

A page is a story.  What it calls a file is written; what starts a server starts one;
what asks it is sent, and must print what the page says that it prints ("…" stands
for anything).  Without a server of its own a page gets one with no configuration.
What needs an engine that is not here stands in ``ELSEWHERE``, with the test that
does what can be done instead.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support import ROOT, Process

import run

PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]

FILE = re.compile(r"`([\w.-]+\.(?:py|json|toml|yaml))`")
PLACEHOLDER = {"ADDRESS": "127.0.0.1", "PORT": "1", "MODULE:NAME": "bot.py:app", "MODULE": "bot.py", "NAME": "chat:1"}

LISTENING = """
curl() {
  command curl --max-time 1 "$@"
  [ $? = 28 ]
}
"""
"""What listens for ever has done its work when its time is up."""
STRICT = 'curl() { command curl --fail-with-body --max-time 10 "$@"; }\n'
"""Where a page shows no answer, a good one is meant."""

ELSEWHERE = {
    "docker": "tests/deploy/test_shipping.py",
    "kubectl": "tests/deploy/test_shipping.py",
    "systemctl": "tests/deploy/test_shipping.py",
    "install": "tests/deploy/test_shipping.py",
    "cp": "tests/deploy/test_shipping.py",
    "pip": "tests/deploy/test_shipping.py",
    "python3 -m venv": "tests/deploy/test_shipping.py",
    "/opt/waterspout/bin/pip": "tests/deploy/test_shipping.py",
    "python backend.py": "tests/wire/test_proxies.py",
}
"""What is not run here, by how it begins, and where what it works on is tested."""


class Step(NamedTuple):
    """Something that a page has its reader do; ``kind`` is file, start, shell or line."""

    kind: str
    text: str
    more: str = ""
    """What a shell prints, or a file's name."""


# --- reading a page: pure ------------------------------------------------------------
class Block(NamedTuple):
    """A piece of a page: ``kind`` is a fence's mark, "indented" or "words"; ``close`` if no empty line is before it."""

    kind: str
    text: str
    close: bool


def blocks(text: str) -> list[Block]:
    """The pieces of a page, as Markdown divides them."""
    found: list[Block] = []
    left = text.splitlines(keepends=True)
    close = False
    while left:
        if left[0].isspace():
            left.pop(0)
            close = False
            continue
        kind = "words"
        if left[0].startswith("```"):
            kind = left.pop(0).strip("`\n")
            size = left.index("```\n")
        elif left[0].startswith("    ") and not close:
            kind, size = "indented", _run(left, lambda line: line.startswith("    "))
        else:
            size = max(1, _run(left, lambda line: not line.isspace() and not line.startswith("```")))
        found.append(Block(kind, "".join(left[:size]), close))
        left = left[size + (left[size : size + 1] == ["```\n"] and kind not in ("words", "indented")) :]
        close = True
    return found


def _run(left: list[str], good: Callable[[str], bool]) -> int:
    """How many lines from here on are ``good``."""
    return next((number for number, line in enumerate(left) if not good(line)), len(left))


def steps(text: str) -> Iterator[Step]:
    """What a page has its reader do, in its order."""
    words = ""
    found = blocks(text)
    for block, after in zip(found, [*found[1:], None], strict=True):
        if block.kind == "words":
            words = block.text
            for command in re.findall(r'`(make run ARGS="[^"]+")`', words):
                yield Step("start", command)
            continue
        if block.kind == "indented":
            for line in lines(block.text):
                yield Step("line", line)
        elif block.kind == "sh":
            told = after is not None and after.close and after.kind in ("json", "http", "text")
            yield Step("shell", block.text, after.text if told and after is not None else "")
        elif (named := FILE.findall(words)) and words.rstrip().endswith(":"):
            yield Step("file", block.text, named[-1])
        words = ""


def lines(block: str) -> list[str]:
    """The commands of an indented block, each on one line and without what is said about it."""
    joined = re.sub(r"\\\n\s*", "", block)
    found = [re.sub(r"\s+# .*", "", line).strip() for line in joined.splitlines()]
    return [line for line in found if line]


def pattern(line: str) -> re.Pattern[str]:
    """A line of a page as a pattern, in which "…" stands for anything; a header's name may be in any case."""
    return re.compile(".*?".join(re.escape(part) for part in line.split("…")), re.IGNORECASE)


def test_a_page_is_read() -> None:
    """Files, starts, shells with what they print, and single commands are found, and nothing else."""
    text = (
        'Write this `bot.py`:\n\n```python\nx = 1\n```\n\nTry `make run ARGS="--app bot.py"`, then\n\n'
        "    curl a \\\n         b   # why\n    make x\n\n"
        "```sh\necho 1\n```\n```text\n1\n```\n\n```python\ny = 2\n```\n"
    )
    assert list(steps(text)) == [
        Step("file", "x = 1\n", "bot.py"),
        Step("start", 'make run ARGS="--app bot.py"'),
        Step("line", "curl a b"),
        Step("line", "make x"),
        Step("shell", "echo 1\n", "1\n"),
    ]


# --- reading along ---------------------------------------------------------------------
class Reader:
    """Somebody who does what a page says, in ``folder``; ``done`` are the steps that were really taken."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server: Process | None = None
        self.done: list[Step] = []
        self._ways: list[tuple[str, Callable[[list[str]], None]]] = [
            ("make run", lambda words: self._start(shlex.split(" ".join(words[2:]).removeprefix("ARGS=")))),
            ("make", self._make),
            ("python run.py", lambda words: self._ours(words[2:])),
            ("waterspout", lambda words: self._ours(words[1:])),
        ]
        shutil.copy(ROOT / "examples" / "dice.py", folder / "bot.py")  # for a page that has none of its own

    def take(self, step: Step) -> None:
        """Do it; fails if it does not do what the page says, or if nobody knows how to do it."""
        match step.kind:
            case "file":
                (self.folder / step.more).write_text(step.text)
            case "shell":
                self._shell(step.text, step.more)
            case _ if step.text.startswith("curl"):
                self._shell(step.text, "")
            case _:
                self._command(step.text)
        self.done.append(step)

    def end(self) -> None:
        """Stop what was started; it must have found no fault of its own."""
        if self.server is not None:
            assert self.server.stop() == 0
            assert " error " not in self.server.log.read_text(), self.server.log.read_text()
            self.server = None

    def _shell(self, typed: str, output: str) -> None:
        if self.server is None:
            self._start([])
        assert self.server is not None
        for name in ("localhost", "127.0.0.1"):
            typed = typed.replace(f"http://{name}:8000", f"http://127.0.0.1:{self.server.port}")
        about = "" if output else LISTENING if " -N " in typed else STRICT
        done = subprocess.run(
            ["bash", "-c", about + typed],
            cwd=self.folder,
            env={"PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{typed}\n{done.stdout}\n{done.stderr}"
        assert done.stdout, f"{typed} printed nothing"
        printed = iter(done.stdout.replace("\r", "").splitlines())
        for expected in output.splitlines():
            wanted = pattern(expected)
            assert any(wanted.search(line) for line in printed), f"{expected!r} is not in\n{done.stdout}\nof\n{typed}"

    def _command(self, text: str) -> None:
        for beginning, way in self._ways:
            if f"{text} ".startswith(f"{beginning} "):
                way(shlex.split(text))
                return
        for beginning, place in ELSEWHERE.items():
            if f"{text} ".startswith(f"{beginning} "):
                assert (ROOT / place).is_file()
                for path in re.findall(r"(?<![\w/])deploy/[\w.]+", text):
                    made = path == "deploy/secrets"  # by the reader, from secrets.example
                    assert made or (ROOT / path).is_file(), f"{text}: there is no {path}"
                return
        raise AssertionError(f"nobody knows how to do {text!r}; see ELSEWHERE")

    def _make(self, words: list[str]) -> None:
        """Every other target would do too much here: make itself says whether it knows them."""
        done = subprocess.run([*words, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def _ours(self, words: list[str]) -> None:
        """Our own command line."""
        if any(word.isupper() or "[" in word for word in words):  # how it is used, not what to type
            optional = [word.strip("[]").replace("[:NAME", ":NAME") for word in words]
            run._parser().parse_args([PLACEHOLDER.get(word, word) for word in optional])
            words = [word for word in words if word in ("check", "new-epochs")]
            if not words:
                return
        if words and words[0] in ("check", "token", "new-epochs"):
            elsewhere = self.folder / "elsewhere"  # the server at work has its file to itself
            elsewhere.mkdir(exist_ok=True)
            command = [sys.executable, str(ROOT / "run.py"), *map(self._file, words)]
            done = subprocess.run(command, cwd=elsewhere, env={}, capture_output=True, text=True, check=False)
            said = [line for line in done.stderr.splitlines() if "epochs.renewed" not in line]  # its line in the log
            assert (done.returncode, said) == (0, []), words
            assert done.stdout
        else:
            self._start(words)

    def _start(self, arguments: list[str]) -> None:
        self.end()
        self.server = Process(self.folder, None, *map(self._file, arguments)).start()

    def _file(self, word: str) -> str:
        """A word that names a file of the page or of the source, as a path that holds anywhere."""
        found = [
            place / word for place in (self.folder, ROOT) if re.search(r"\.\w+$", word) and (place / word).exists()
        ]
        return str(found[0]) if found else word


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_does_what_the_page_says(page: Path, tmp_path: Path) -> None:
    """In the order of the page, each with the server that the page has started last."""
    if shutil.which("curl") is None:
        subprocess.run(["sh", str(ROOT / "tests" / "sdk" / "install.sh"), "curl"], check=True)
    reader = Reader(tmp_path)
    found = list(steps(page.read_text()))
    try:
        for step in found:
            reader.take(step)
    finally:
        reader.end()
    assert reader.done == found
    assert sum(step.kind == "shell" for step in found) == page.read_text().count("```sh\n")


def test_no_command_is_overlooked() -> None:
    """Shell has one mark in these pages, and what is not run has a command that somewhere stands."""
    texts = {page: page.read_text() for page in PAGES}
    for page, text in texts.items():
        assert not re.search(r"```(console|bash|shell)\b", text), f"{page}: mark commands with sh"
    typed = [step.text for text in texts.values() for step in steps(text) if step.kind == "line"]
    assert [one for one in ELSEWHERE if not any(f"{text} ".startswith(f"{one} ") for text in typed)] == []
