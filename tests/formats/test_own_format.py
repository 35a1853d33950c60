"""A reader from outside the package: the one that docs/formats/own.md shows, as a module of its own."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import clt_plugin as cp
from clt_plugin.core import RegistryError
from clt_plugin.formats import FORMATS
from clt_plugin.hub import remote
from support.hub_server import HubServer, use

PAGE = Path(__file__).parents[2] / "docs" / "formats" / "own.md"
READER = next(
    block for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S) if "class Almond" in block
)
COMMAND = "import almond; from clt_plugin.cli import app; app()"
N_LAYERS, D, F = 3, 16, 400


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder with a package that is installed nowhere, on the path."""
    package = tmp_path / "elsewhere" / "almond"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(READER)
    monkeypatch.syspath_prepend(str(package.parent))
    return package.parent


@pytest.fixture
def almond(elsewhere):
    """That package, imported: it registers itself."""
    yield importlib.import_module("almond")
    del sys.modules["almond"]
    FORMATS.remove("almond")


@pytest.fixture
def published(tmp_path):
    """A folder in that layout, and its tensors."""
    folder, rng = tmp_path / "nuts", np.random.default_rng(0)
    folder.mkdir()
    (folder / "almond.json").write_text(json.dumps({"blocks": N_LAYERS, "model": "m/n"}))
    shapes = {"in|w": (D, F), "in|b": (F,), "log t": (F,), "out|b": (D,)}
    blocks = []
    for layer in range(N_LAYERS):
        every = shapes | {"out|w": (N_LAYERS - layer, F, D)}
        blocks.append({key: rng.standard_normal(shape, dtype=np.float32) for key, shape in every.items()})
        np.savez(folder / f"block{layer}.npz", **blocks[-1])
    return folder, [{key: torch.from_numpy(value) for key, value in block.items()} for block in blocks]


def reconstruction(blocks, x):
    """That tool's own formula."""
    y = [block["out|b"].expand(len(x[0]), D).clone() for block in blocks]
    for i, block in enumerate(blocks):
        h = x[i] @ block["in|w"] + block["in|b"]
        for j in range(N_LAYERS - i):
            y[i + j] += (h * (h > block["log t"].exp())) @ block["out|w"][j]
    return torch.stack(y)


def test_it_is_not_known_before_it_is_imported(published):
    with pytest.raises(cp.FormatError, match="in no known format"):
        cp.load(published[0])


@pytest.mark.parametrize("lazy", [False, True])
def test_loading(almond, published, lazy):
    folder, blocks = published
    clt = cp.load(folder, lazy=lazy)
    assert clt.is_lazy is lazy
    assert clt.wiring == cp.Wiring.clt(N_LAYERS, read="resid_mid")
    assert clt.host == cp.Host("m/n", None, N_LAYERS, 1)
    x = torch.randn(N_LAYERS, 5, D)
    torch.testing.assert_close(clt.decode(clt.encode(x)), reconstruction(blocks, x), rtol=1e-5, atol=1e-4)
    part = cp.load(folder, layers=[1], features={1: [3, 11]}, lazy=lazy)
    assert torch.equal(part.decoder_vectors(0), clt.decoder_vectors(1, torch.tensor([3, 11])))


def test_from_the_hub(almond, published, tmp_path):
    folder, blocks = published
    with HubServer() as hub, use(hub, tmp_path / "machine"):
        hub.add("o/n", {f"v1/{path.name}": path for path in folder.iterdir()})
        found = cp.inspect("hf://o/n/v1")
        assert found.is_complete
        assert found.format == "almond"
        assert sum(hub.fetched("o/n").values()) < found.size
        assert max(hub.fetched("o/n").values()) <= 2 * remote.HEADER_BYTES
        clt = cp.load("hf://o/n/v1")
        assert torch.equal(clt.encoder_vectors(2), blocks[2]["in|w"].T)


def test_inspecting_and_converting(almond, published, tmp_path):
    folder, _ = published
    assert cp.inspect(folder).rows()["format"] == "almond"
    cp.convert(folder, tmp_path / "native", bar=False)
    assert torch.equal(cp.load(tmp_path / "native").b_enc[1], cp.load(folder).b_enc[1])
    np.savez(folder / "block1.npz", **{"in|w": np.zeros((D, F), np.float32), "more": np.zeros(3, np.float32)})
    (folder / "block2.npz").write_bytes(b"")
    assert "block2.npz is empty" in cp.inspect(folder).problems[0]
    (folder / "block2.npz").unlink()
    assert "almond.json says 3 blocks, and there are [0, 1]" in cp.inspect(folder).problems[0]


def test_the_command(elsewhere, published):
    folder, _ = published
    path = os.pathsep.join([str(elsewhere), *filter(None, [os.environ.get("PYTHONPATH")])])
    arguments = [sys.executable, "-c", COMMAND, "inspect", str(folder), "--json"]
    done = subprocess.run(arguments, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["format"] == "almond"
    assert COMMAND in PAGE.read_text()


def test_a_name_is_taken_once(almond):
    with pytest.raises(RegistryError, match="the format 'almond' is registered already: choose another name"):
        FORMATS.add("almond", almond.Almond())
    with pytest.raises(RegistryError, match="the format 'circuit-tracer' is registered already"):
        FORMATS.add("circuit-tracer", almond.Almond())
    FORMATS.remove("almond")
    assert "almond" not in FORMATS
    FORMATS.add("almond", almond.Almond())
