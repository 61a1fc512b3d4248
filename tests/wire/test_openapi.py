"""PROTOCOL 17.4: the OpenAPI document is a valid one, says what there is, and holds whoever asks to it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import schemathesis
from hopper import ask
from support import KEPT, ROOT, Process, config, serving

from handlers.rest import ROUTES

CASES = 10
"""Random requests for each method; the examples and the edges of each parameter come on top, some 150 in all."""

# A cursor may be well-formed and gone: that is no fault of the document's.
CONFIGURATION = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 304, 401, 403, 404, 410, 429]
"""


async def document() -> Any:
    """The document, as a server gives it to anybody."""
    async with serving() as site:
        reply = await ask(site.port, "/v1/openapi.json")
        assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
        return reply.json


async def test_the_document_is_valid() -> None:
    """It is OpenAPI 3.1 by that standard's own schema, and each of its operations can be understood."""
    found = await document()
    assert found["openapi"] == "3.1.0"
    schema = schemathesis.openapi.from_dict(found)
    schema.validate()
    names = [operation.ok().definition.raw["operationId"] for operation in schema.get_all_operations()]
    assert len(names) == len(set(names)) == sum(len(route.operations) for route in ROUTES)


async def test_the_document_says_what_there_is() -> None:
    """Each path and method of the table is in the document and answers; what is not in the table is not there."""
    found = await document()
    assert set(found["paths"]) == {route.path for route in ROUTES}
    async with serving() as site:
        for route in ROUTES:
            place = route.path.replace("{channel}", "chat:a")
            stated = {name.upper() for name in found["paths"][route.path]}
            allowed = (await ask(site.port, place, method="OPTIONS")).headers["allow"].split(", ")
            assert stated <= set(allowed) == {*stated, "HEAD", "OPTIONS"}
            for method in sorted({"GET", "POST", "PUT", "DELETE", "PATCH"} - set(allowed)):
                assert (await ask(site.port, place, method=method)).status == 405
            named = set(re.findall(r"\{(\w+)\}", route.path))
            for operation in found["paths"][route.path].values():
                places = {one["name"] for one in operation.get("parameters", []) if one["in"] == "path"}
                assert places == named


def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    """Requests made from the document, proper and broken ones, are answered as the document says, by a real server.

    Event streams are left out, since a good request to them has no end.
    """
    anything = {**KEPT, "presence": True, "channel_regex": "(?s).+"}
    settings = config(channel={"without_namespace": anything, "max_length": 2000})
    (tmp_path / "schemathesis.toml").write_text(CONFIGURATION)
    with Process(tmp_path, settings) as server:
        run = subprocess.run(
            [
                str(Path(sys.executable).parent / "schemathesis"),
                *("run", f"{server.http}/v1/openapi.json", "--seed", "17", "--max-examples", str(CASES)),
                *("--phases", "examples,coverage,fuzzing", "--generation-database", "none", "--no-color"),
                *("--exclude-operation-id", "listen", "--exclude-operation-id", "listenToChannel"),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    generated = re.search(r"(\d+) generated, (\d+) passed", run.stdout)
    assert generated is not None, run.stdout
    assert int(generated[1]) >= 50
    log = server.log.read_text()
    assert " error " not in log, log
    assert "Traceback" not in log, log


def test_the_table_needs_no_server() -> None:
    """The document is made from the table alone, the same each time."""
    code = "from handlers.rest import DOCUMENT; import sys; sys.stdout.buffer.write(DOCUMENT)"
    made = {
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout for _ in "ab"
    }
    assert len(made) == 1
    assert json.loads(made.pop())["info"]["title"] == "Waterspout"
