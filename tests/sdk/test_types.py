"""The types in static/, held against a compiler and against the modules whose types they are."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

FOLDER = ROOT / "tests" / "sdk"
STRICT = (
    "--noEmit",
    "--strict",
    "--noUnusedLocals",
    "--skipDefaultLibCheck",
    "--target", "es2022",
    "--lib", "es2022,dom",
    "--module", "esnext",
    "--moduleResolution", "bundler",
)  # fmt: skip


def _node(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["node", *map(str, arguments)], cwd=FOLDER, capture_output=True, text=True, check=False)


def _compiled(*files: Path) -> str:
    """What the compiler has to say, nothing if all is well."""
    done = _node("node_modules/typescript/bin/tsc", *STRICT, *files)
    assert done.stdout or not done.returncode, done.stderr
    return done.stdout


def _members(path: Path) -> dict[str, Any]:
    done = _node("js/members.mjs", path)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_a_typed_page_compiles() -> None:
    """Strictly compiled, all that the types declare can be used as documented, and what they forbid is refused."""
    assert _compiled(*(ROOT / "static").glob("*.d.ts"), FOLDER / "js" / "consumer.ts") == ""


def test_the_compiler_would_have_complained(tmp_path: Path) -> None:
    """A page that calls what is not there does not compile: the test above can fail."""
    page = tmp_path / "page.ts"
    page.write_text(f"import {{ Client }} from {str(ROOT / 'static' / 'client.js')!r};\nnew Client().dance();\n")
    assert "'dance' does not exist" in _compiled(page)


def test_the_types_are_those_of_the_module() -> None:
    """Exports, public members, numbers of parameters and codes are the same in client.js and client.d.ts."""
    there, declared = _members(ROOT / "static" / "client.js"), _members(ROOT / "static" / "client.d.ts")
    assert set(there) == {"CODES", "Client", "ClientError", "Subscription"}
    assert there["Client"]["ready"] == 0
    # An error's fields are set in its constructor, and its name is that of every error.
    assert there["ClientError"].keys() <= {"name"}
    assert declared.pop("ClientError").keys() == {"code", "temporary"}
    del there["ClientError"]
    assert there == declared


@pytest.mark.parametrize(
    ("name", "exported"),
    [
        ("transport-sse", {"Sse": {"open": 1}}),
        ("transport-polling", {"Polling": {"turnTo": 1, "open": 1}}),
    ],
)
def test_the_types_are_those_of_the_transport(name: str, exported: dict[str, Any]) -> None:
    """Each transport exports one class, with the members that are declared and no others."""
    there, declared = _members(ROOT / "static" / f"{name}.js"), _members(ROOT / "static" / f"{name}.d.ts")
    assert there == declared == exported
