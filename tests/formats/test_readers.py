"""Every layout, read: the same values as that tool's own formula gives, in every way of reading; and its damage."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import clt_plugin as cp
from clt_plugin import formats
from clt_plugin.formats import conversion
from clt_plugin.hub import Folder, open_folders
from support import layouts
from support.hub_server import HubServer, use
from support.layouts import Layout

MODULES = [
    importlib.import_module(f"{layouts.__name__}.{info.name}") for info in pkgutil.iter_modules(layouts.__path__)
]
LAYOUTS: list[Layout] = [layout for module in MODULES for layout in module.LAYOUTS]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


def written(layout: Layout, folder: Path):
    folder.mkdir(exist_ok=True)
    oracle = layout.write(folder)
    return str(folder / layout.reference) if layout.reference else str(folder), oracle


def inputs(clt: cp.Crosscoder, n_tokens: int = 6) -> list[torch.Tensor]:
    return [torch.randn(n_tokens, clt.layout.width[site], dtype=clt.dtype) for site in clt.sites.read]


def by_site(clt: cp.Crosscoder, x: list[torch.Tensor]) -> dict[cp.Site, torch.Tensor]:
    return dict(zip(clt.sites.read, x, strict=True))


def assert_reconstructs(clt: cp.Crosscoder, oracle, tolerance: float, sparse: bool = False) -> None:
    x = inputs(clt)
    want = oracle(x)
    assert any(bool(y.any()) for y in want)
    got = clt.decode(clt.encode(by_site(clt, x), sparse=sparse), by_site(clt, x))
    assert len(want) == len(clt.sites.write)
    scale = max(float(y.abs().max()) for y in want)
    for site, y in zip(clt.sites.write, want, strict=True):
        assert got[site].shape == y.shape
        error = float((got[site] - y).abs().max())
        assert error <= tolerance * scale, f"{site} is off by {error}"


@every_layout
def test_what_it_is(layout, tmp_path):
    reference, _ = written(layout, tmp_path / "x")
    clt = cp.load(reference)
    assert clt.wiring == layout.wiring
    assert clt.wiring.name == layout.wiring.name
    assert str(clt.activation) == layout.activation
    assert clt.host == layout.host
    assert not clt.is_partial


@every_layout
def test_one_format_knows_it(layout, tmp_path):
    reference, _ = written(layout, tmp_path / "x")
    for folder in open_folders(reference):
        assert [format.name for format in formats.FORMATS.values() if format.sniff(folder)] == [layout.format]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("lazy", [False, True])
@every_layout
def test_reconstruction_is_that_tools_own(layout, tmp_path, lazy, sparse):
    reference, oracle = written(layout, tmp_path / "x")
    clt = cp.load(reference, lazy=lazy)
    assert clt.is_lazy == lazy
    assert_reconstructs(clt, oracle, layout.tolerance, sparse)


@every_layout
def test_it_becomes_native(layout, tmp_path):
    reference, oracle = written(layout, tmp_path / "x")
    cp.load(reference, lazy=True).save(tmp_path / "native")
    assert_reconstructs(cp.load(tmp_path / "native"), oracle, layout.tolerance)


@every_layout
def test_rows_are_read_alike(layout, tmp_path):
    reference, _ = written(layout, tmp_path / "x")
    lazy, whole = cp.load(reference, lazy=True), cp.load(reference, lazy=False)
    for g, n in enumerate(whole.group_sizes):
        for rows in (torch.tensor([n - 1, 0]), torch.tensor([], dtype=torch.long)):
            assert torch.equal(lazy.encoder_vectors(g, rows), whole.encoder_vectors(g)[rows])
            assert torch.equal(lazy.decoder_vectors(g, rows), whole.decoder_vectors(g)[rows])


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@every_layout
def test_from_the_hub(layout, tmp_path, hub):
    """Described from headers alone, then fetched; and some latents by ranges of bytes, as a whole copy has them."""
    reference, oracle = written(layout, tmp_path / "x")
    name = f"owner/{re.sub('[^a-z0-9]+', '-', layout.name.lower()).strip('-')}"
    files = [path for path in (tmp_path / "x").rglob("*") if path.is_file()]
    hub.add(name, {f"sub/{path.relative_to(tmp_path / 'x')}": path for path in files})
    on_hub = f"hf://{name}/sub" + (f"/{layout.reference}" if layout.reference else "")
    with use(hub, tmp_path / "machine"):
        clt = cp.load(on_hub, lazy=True)
        assert_reconstructs(clt, oracle, layout.tolerance)
        assert clt.metadata["source"][0].startswith(f"{on_hub}@")
        assert_reconstructs(cp.load(clt.metadata["source"], lazy=True), oracle, layout.tolerance)
    whole, home = cp.load(reference), clt.wiring.home[-1]
    competing = whole.activation.ranks and not whole.has_measured_threshold
    choice = {} if competing else {"features": {home: [2, 0]}}
    if competing and whole.activation.joint:
        return
    with use(hub, tmp_path / "another"):
        few = cp.load(on_hub, layers=[home], **choice)
    assert list(conversion.differences(few, whole.select([home], **choice))) == []


# ---------------------------------------------------------------- damage


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".npz":
        return {key: torch.from_numpy(value) for key, value in np.load(path).items()}
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def rewrite(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    if path.suffix == ".npz":
        np.savez(path, **{key: value.numpy() for key, value in tensors.items()})
    elif path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)


def refused(reference: str, *words: str) -> None:
    for lazy in (False, True):
        with pytest.raises(cp.FormatError) as error:
            cp.load(reference, lazy=lazy)
        for word in words:
            assert word in str(error.value), str(error.value)


@pytest.fixture
def broken(layout, tmp_path):
    reference, _ = written(layout, tmp_path / "x")
    return reference, tmp_path / "x" / layout.damageable


@every_layout
def test_missing_file(layout, broken):
    reference, path = broken
    path.unlink()
    if layout.required:
        refused(reference, path.name if "*" not in layout.reference else "")
    else:
        assert cp.load(reference).wiring.n_groups < layout.wiring.n_groups


@every_layout
def test_empty_file(layout, broken):
    reference, path = broken
    path.write_bytes(b"")
    refused(reference, path.name, "empty")


@pytest.mark.parametrize("keep", [0.9, 0.02])
@every_layout
def test_truncated_file(layout, broken, keep):
    reference, path = broken
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    refused(reference, path.name, "truncated or damaged")


@every_layout
def test_unknown_tensor(layout, broken):
    reference, path = broken
    rewrite(path, tensors_of(path) | {"surprise": torch.zeros(2)})
    refused(reference, path.name, "surprise")


@every_layout
def test_each_missing_tensor(layout, broken):
    reference, path = broken
    whole = tensors_of(path)
    for key in whole.keys() - layout.optional_keys:
        rewrite(path, {k: v for k, v in whole.items() if k != key})
        with pytest.raises(cp.FormatError):
            cp.load(reference)


@every_layout
def test_each_wrong_shape(layout, broken):
    reference, path = broken
    whole = tensors_of(path)
    for key, tensor in whole.items():
        for axis in range(tensor.ndim) if key not in layout.optional_keys else ():
            shorter = tensor.narrow(axis, 0, tensor.shape[axis] - 1).clone()
            rewrite(path, whole | {key: shorter})
            with pytest.raises(cp.FormatError, match=re.escape(path.name)):
                cp.load(reference)


@every_layout
def test_mixed_dtypes(layout, broken):
    reference, path = broken
    whole = tensors_of(path)
    key = max((key for key, value in whole.items() if value.is_floating_point()), key=lambda key: whole[key].numel())
    rewrite(path, whole | {key: whole[key].half()})
    refused(reference, "mixes the dtypes", "dtype=")
    assert cp.load(reference, dtype=torch.float32).dtype == torch.float32


@every_layout
def test_not_finite(layout, broken):
    reference, path = broken
    whole = tensors_of(path)
    key = max((key for key, value in whole.items() if value.is_floating_point()), key=lambda key: whole[key].numel())
    bad = whole[key].clone()
    bad.view(-1)[-1] = float("nan")
    rewrite(path, whole | {key: bad})
    with pytest.raises(cp.FormatError, match="not finite"):
        cp.load(reference, lazy=False)


def test_folders_are_seen_in_natural_order(tmp_path):
    for name in ("layer_10", "layer_2", "layer_1"):
        (tmp_path / name).mkdir()
    assert [folder.label.rpartition("/")[2] for folder in Folder(tmp_path).glob("layer_*")] == [
        "layer_1",
        "layer_2",
        "layer_10",
    ]
