"""Every Python block of the README and of the docs runs: a page's blocks are one program, from top to bottom."""

import re
import runpy
import warnings
from pathlib import Path

import pytest

from clt_plugin.core import FORMATS
from support.hub_server import HubServer, use
from support.published import publish

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [
    page
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "src").rglob("*.md"))
    if BLOCK.search(page.read_text(encoding="utf-8"))
]


def program(page: Path) -> str:
    """Return a page's blocks as one program, each at the line where it stands in the page."""
    text, lines = page.read_text(encoding="utf-8"), []
    for match in BLOCK.finditer(text):
        start = text.count("\n", 0, match.start(1))
        lines += [""] * (start - len(lines)) + match[1].splitlines()
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Stand in for the Hub, with tiny crosscoders under the names and in the layouts that the pages speak of."""
    with HubServer() as server:
        publish(server, tmp_path_factory.mktemp("published"))
        yield server


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_blocks_run(page, tmp_path, monkeypatch, request):
    if "hf://" not in program(page):
        run(page, tmp_path, monkeypatch)
        return
    hub = request.getfixturevalue("hub")
    with use(hub, tmp_path / "machine", token=hub.writer):
        run(page, tmp_path, monkeypatch)


def run(page, tmp_path, monkeypatch):
    # A file, since nnsight reads the source of a trace's body.
    script = tmp_path / f"{page.stem.replace('-', '_')}.py"
    script.write_text(program(page), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    known = set(FORMATS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runpy.run_path(str(script))
    finally:
        for name in set(FORMATS) - known:  # what a page makes known is known to it alone
            FORMATS.remove(name)


def test_a_block_that_fails_is_noticed(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("text\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError):
        run(page, tmp_path, monkeypatch)
