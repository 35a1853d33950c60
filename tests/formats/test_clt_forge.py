"""CLT-Forge: sites by the model's norm, factors, and shares that do not go together."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import clt_plugin as cp
from support.layouts import clt_forge as layout


def edit(folder, **settings):
    config = json.loads((folder / "clt_cfg.json").read_text())
    config = {key: value for key, value in (config | settings).items() if value is not None}
    (folder / "clt_cfg.json").write_text(json.dumps(config))


def rewrite(path, **tensors):
    save_file(load_file(path) | tensors, path)


@pytest.mark.parametrize(
    ("model", "site"), [("pythia-70m", "mlp_in"), ("Qwen/Qwen3-0.6B", "mlp_in_before_gain"), ("gpt2", "mlp_in")]
)
def test_what_is_read_depends_on_the_norm(tmp_path, model, site):
    layout.write(tmp_path, model)
    assert cp.load(tmp_path).sites.read_name == site


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_name": "own"}, "reads ln2.hook_normalized of own, which is before or after the norm's gain"),
        ({"model_name": None}, "reads ln2.hook_normalized of None"),
        ({"d_latent": 12}, "says d_latent 12, but the tensors of .* have 10"),
        ({"cross_layer_decoders": False}, r"W_dec has shape \(6, 10, 4\), where \(3, 10, 4\) was expected"),
    ],
)
def test_configs_that_are_refused(tmp_path, settings, words):
    layout.write(tmp_path)
    edit(tmp_path, **settings)
    with pytest.raises(cp.FormatError, match=words):
        cp.load(tmp_path)


def test_a_factor_of_zero(tmp_path):
    layout.write(tmp_path)
    rewrite(tmp_path / layout.WEIGHTS, estimated_norm_scaling_factor_out=torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(cp.FormatError, match="factor_out must hold finite numbers above 0"):
        cp.load(tmp_path)


def test_shares_are_the_whole(tmp_path):
    layout.write(tmp_path, sharded=True)
    whole, lazy = cp.load(tmp_path), cp.load(tmp_path, lazy=True)
    rows = torch.tensor([9, 0, 6, 5, 6])
    for kind in ("W_enc", "W_dec"):
        assert torch.equal(lazy.store.get(kind, 1, rows), whole.store.get(kind, 1)[rows])
        assert torch.equal(lazy.store.get(kind, 1, slice(4, 8)), whole.store.get(kind, 1)[4:8])


@pytest.mark.parametrize(
    ("rank", "words"), [(0, "rank0_clt_weights.safetensors missing"), (1, "says d_latent 10, but .* have 6")]
)
def test_a_share_that_is_missing(tmp_path, rank, words):
    layout.write(tmp_path, sharded=True)
    (tmp_path / f"rank{rank}_clt_weights.safetensors").unlink()
    with pytest.raises(cp.FormatError, match=words):
        cp.load(tmp_path)


def test_shares_of_different_runs(tmp_path):
    layout.write(tmp_path, sharded=True)
    rewrite(tmp_path / "rank1_clt_weights.safetensors", b_dec=torch.zeros(6, 5))
    with pytest.raises(cp.FormatError, match=r"rank1_clt_weights.safetensors: b_dec \(6, 5\) does not go with"):
        cp.load(tmp_path)
