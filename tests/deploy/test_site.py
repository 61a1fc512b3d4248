"""The site of the documents is built, strictly: whatever is linked to is there."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

import documents


def test_the_site_is_built(tmp_path: Path) -> None:
    """Every page has its place, with its tables and code, and nothing is loaded from elsewhere."""
    documents.lay_out(tmp_path / "build" / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    zensical = Path(sys.executable).parent / "zensical"
    done = subprocess.run([zensical, "build", "--strict"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "build" / "site"
    for page in (tmp_path / "build" / "docs").glob("*.md"):
        place = site / ("" if page.stem == "index" else page.stem) / "index.html"
        html = place.read_text()
        assert html.count("<h1") == 1, page.name
        assert ("<table>" in html) == ("| --- |" in page.read_text()), page.name
        assert 'src="https://' not in html, page.name
    assert (site / "deploy" / "nginx.conf").read_bytes() == (ROOT / "deploy" / "nginx.conf").read_bytes()
    assert 'id="code-112"' in (site / "rest" / "index.html").read_text(), "problem documents lead there"


def test_a_link_to_nowhere_is_said() -> None:
    """A page that links to what is not there, or to what the site does not have, is named with its link."""
    assert documents.on_the_site("[a](rest.md#x) [b](https://a.b/c) [c](#d)", "docs/index.md").count("rest.md#x") == 1
    assert documents.on_the_site("[a](../server/PROTOCOL.md)", "docs/index.md") == "[a](protocol.md)"
    with pytest.raises(ValueError, match=r"docs/index\.md: none\.md leads nowhere"):
        documents.on_the_site("[a](none.md)", "docs/index.md")
    with pytest.raises(ValueError, match=r"docs/index\.md: run\.py is not on the site"):
        documents.on_the_site("[a](../run.py)", "docs/index.md")
