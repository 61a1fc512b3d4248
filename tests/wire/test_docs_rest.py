"""docs/rest.md can be typed as it stands: every command is run, and prints what the page says it prints."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from support import ROOT, Process

from handlers.problems import STATUS, WORDS

PAGE = (ROOT / "docs" / "rest.md").read_text()
BLOCK = re.compile(r"^```sh\n(.*?)^```\n(?:^```(?:json|http|text)\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def pattern(line: str) -> re.Pattern[str]:
    """A line of the page as a pattern, in which "…" stands for anything; a header's name may be in any case."""
    return re.compile(".*?".join(re.escape(part) for part in line.split("…")), re.IGNORECASE)


def test_every_command_prints_what_the_page_says(tmp_path: Path) -> None:
    """Against a server with no configuration, in the order of the page; each line of output is there, in order."""
    if shutil.which("curl") is None:
        subprocess.run(["sh", str(ROOT / "tests" / "sdk" / "install.sh"), "curl"], check=True)
    blocks = BLOCK.findall(PAGE)
    assert len(blocks) == PAGE.count("```sh") >= 10
    with Process(tmp_path) as server:
        for commands, output in blocks:
            typed = commands.replace("http://localhost:8000", f"http://127.0.0.1:{server.port}")
            done = subprocess.run(
                ["bash", "-c", typed],
                cwd=tmp_path,
                env={"PATH": os.environ["PATH"]},
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == 0, f"{typed}\n{done.stdout}\n{done.stderr}"
            lines = iter(done.stdout.replace("\r", "").splitlines())
            for expected in output.splitlines():
                wanted = pattern(expected)
                assert any(wanted.search(line) for line in lines), f"{expected!r} is not in\n{done.stdout}\nof\n{typed}"
        log = server.log.read_text()
    assert " error " not in log, log


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
