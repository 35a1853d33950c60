"""Every Python block of the README and of the docs runs: a page's blocks are one program, from top to bottom."""

import json
import re
import runpy
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import clt_plugin as cp
from support.hub_server import HubServer, use

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
    folder = tmp_path_factory.mktemp("published")
    host = cp.Host("google/gemma-2-2b", None, 26, 1)
    cp.Crosscoder(cp.Wiring.clt(26, read="resid_mid"), 8, 16, host=host).save(folder / "clt", format="circuit-tracer")
    with HubServer() as server:
        server.add("mntss/clt-gemma-2-2b-426k", folder / "clt")
        files = {}
        for layer in range(26):
            name = f"transcoder_all/layer_{layer}_width_16k_l0_small"
            files |= {f"{name}/{file}": content for file, content in gemma_scope_2_transcoder(layer, folder).items()}
        server.add("google/gemma-scope-2-1b-pt", files)
        yield server


def gemma_scope_2_transcoder(layer, folder):
    d, n = 8, 12
    tensors = {"w_enc": torch.randn(d, n), "b_enc": torch.zeros(n), "threshold": torch.rand(n)}
    save_file(tensors | {"w_dec": torch.randn(n, d), "b_dec": torch.zeros(d)}, folder / f"params_{layer}.safetensors")
    hook = f"model.layers.{layer}."
    config = {
        "hf_hook_point_in": f"{hook}pre_feedforward_layernorm.output",
        "hf_hook_point_out": f"{hook}post_feedforward_layernorm.output",
        "width": n,
        "model_name": "google/gemma-3-1b-pt",
        "architecture": "jump_relu",
        "l0": 5,
        "affine_connection": False,
        "type": "transcoder",
    }
    content = (folder / f"params_{layer}.safetensors").read_bytes()
    return {"config.json": json.dumps(config).encode(), "params.safetensors": content}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_blocks_run(page, tmp_path, monkeypatch, hub):
    if "hf://" not in program(page):
        run(page, tmp_path, monkeypatch)
        return
    with use(hub, tmp_path / "machine", token=hub.writer):
        run(page, tmp_path, monkeypatch)


def run(page, tmp_path, monkeypatch):
    # A file, since nnsight reads the source of a trace's body.
    script = tmp_path / f"{page.stem.replace('-', '_')}.py"
    script.write_text(program(page), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runpy.run_path(str(script))


def test_a_block_that_fails_is_noticed(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("text\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError):
        run(page, tmp_path, monkeypatch)
