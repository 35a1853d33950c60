"""crosslayer-coding: what is refused, and where statistics and thresholds are exact."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import clt_plugin as cp
from clt_plugin.hub import Folder
from support.hub_server import HubServer, use
from support.layouts import crosslayer_coding as layout


def edit(folder, **settings):
    config = json.loads((folder / "cfg.json").read_text())
    config = {key: value for key, value in (config | settings).items() if value is not None}
    (folder / "cfg.json").write_text(json.dumps(config))


def add(folder, **tensors):
    path = folder / layout.WEIGHTS
    save_file(load_file(path) | {f"decoder_module.{k.replace('__', '.')}": v for k, v in tensors.items()}, path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"activation_fn": "batchtopk", "batchtopk_k": 3}, "batchtopk ranks .* convert it to JumpReLU"),
        ({"activation_fn": "topk", "topk_k": 3}, "z-scores over the batch"),
        ({"activation_fn": "topk", "topk_k": 0, "topk_mode": "per_layer"}, "topk_k is 0"),
        ({"activation_fn": "gelu"}, "activation_fn is 'gelu': known are jumprelu, relu"),
        ({"decoder_tying": "both"}, "decoder_tying 'both': known are none, per_source, per_target"),
        ({"normalization_method": "l2"}, "normalization_method 'l2': known are none, mean_std, sqrt_d_model"),
        ({"normalization_method": "auto"}, "no norm_stats.json, neither in .* nor in the folder above"),
        ({"num_features": 8}, "says num_features 8, but the tensors of .* have 7"),
        ({"num_layers": 4}, "has no tensor encoder_module.encoders.3.weight"),
        ({"num_layers": 2}, r"log_threshold has shape \(3, 7\), where \(2, 7\)"),
        ({"mlp_input_template": "transformer.h.{}.attn.input"}, "reads the input of 'attn'"),
        ({"mlp_output_template": "transformer.h.{}.output"}, "transformer.h.{}.mlp.output' was expected"),
        ({"mlp_input_template": None, "model_name": "own"}, "mlp_input_template is None"),
        ({"mlp_input_template": "model.layers.{}.post_attention_layernorm.input", "model_name": "google/gemma-2-2b"},
         "in google/gemma-2-2b is no site"),
    ],
)  # fmt: skip
def test_configs_that_are_refused(tmp_path, settings, words):
    layout.write(tmp_path)
    edit(tmp_path, **settings)
    with pytest.raises(cp.FormatError, match=words):
        cp.load(tmp_path)


def test_old_names_and_defaults(tmp_path):
    layout.write(tmp_path)
    plain = cp.load(tmp_path)
    edit(tmp_path, mlp_input_template=None, mlp_output_template=None, decoder_tying=None, activation_fn=None)
    assert cp.load(tmp_path).wiring == plain.wiring
    edit(tmp_path, normalization_method="auto_sqrt_d_model")
    assert torch.allclose(cp.load(tmp_path).encoder_vectors(0), plain.encoder_vectors(0) * layout.D**0.5)
    edit(tmp_path, normalization_method=None, sqrt_d_model_normalize=True)
    assert torch.allclose(cp.load(tmp_path).decoder_vectors(0), plain.decoder_vectors(0) / layout.D**0.5)


def test_a_share_of_the_width_is_rounded_up(tmp_path):
    layout.write(tmp_path, **layout.TOP)
    edit(tmp_path, topk_k=0.3)
    assert cp.load(tmp_path).activation.k == 3  # of 7


def test_reaching_the_threshold_is_enough(tmp_path):
    layout.write(tmp_path)
    clt = cp.load(tmp_path)
    theta = load_file(tmp_path / layout.WEIGHTS)["theta_manager.log_threshold"][1].exp()
    assert torch.equal(clt.activate(1, theta), theta)
    assert not clt.activate(1, torch.nextafter(theta, torch.zeros_like(theta))).any()


def test_statistics_that_no_one_asks_for(tmp_path):
    layout.write(tmp_path, stats_above=True, normalization_method="mean_std")
    edit(tmp_path / "tied", normalization_method="none")
    with pytest.raises(cp.FormatError, match=r"norm_stats.json lies with it: set normalization_method to mean_std"):
        cp.load(tmp_path / "tied")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda stats: stats.pop("1"), "layer 1 lacks a mean or std of its inputs"),
        (lambda stats: stats["0"]["targets"]["std"].__setitem__(2, 0.0), "layer 0's targets need .* above 0"),
        (lambda stats: stats["2"]["inputs"]["mean"].pop(), "layer 2's inputs need a mean and a std of 4"),
    ],
)
def test_damaged_statistics(tmp_path, change, words):
    layout.write(tmp_path, normalization_method="mean_std")
    stats = json.loads((tmp_path / "norm_stats.json").read_text())
    change(stats)
    (tmp_path / "norm_stats.json").write_text(json.dumps(stats))
    with pytest.raises(cp.FormatError, match=words):
        cp.load(tmp_path)


@pytest.mark.parametrize("holder", ["decoder", "encoder"])
def test_features_that_are_offset_for_a_target(tmp_path, holder):
    layout.write(tmp_path, decoder_tying="per_target")
    plain, path = cp.load(tmp_path), tmp_path / layout.WEIGHTS
    state, key = load_file(path), f"{holder}_module.feature_offset.1"
    save_file(state | {key: torch.zeros(layout.F)}, path)
    assert torch.equal(cp.load(tmp_path).b_dec[1], plain.b_dec[1])
    save_file(state | {key: torch.full((layout.F,), 0.1)}, path)
    with pytest.raises(cp.FormatError, match="it is added to active latents for one target"):
        cp.load(tmp_path)
    cp.load(tmp_path, layers=[2])  # which does not write there


def test_skips_across_layers(tmp_path):
    layout.write(tmp_path)
    edit(tmp_path, skip_connection=True)
    pairs = {f"skip_weights__{s}->{t}": torch.randn(layout.D, layout.D) for s in range(3) for t in range(s, 3)}
    add(tmp_path, **pairs)
    with pytest.raises(cp.FormatError, match="skip across layers"):
        cp.load(tmp_path)


def test_several_checkpoints(tmp_path):
    layout.write(tmp_path)
    shutil.copy(tmp_path / layout.WEIGHTS, tmp_path / "clt_checkpoint_100.safetensors")
    cp.load(tmp_path)  # the latest
    (tmp_path / layout.WEIGHTS).rename(tmp_path / "clt_checkpoint_200.safetensors")
    with pytest.raises(cp.FormatError, match=r"it holds clt_checkpoint_100.safetensors, clt_checkpoint_200"):
        cp.load(tmp_path)


def test_statistics_above_a_folder_of_the_hub(tmp_path):
    (tmp_path / "x").mkdir()
    layout.write(tmp_path / "x", stats_above=True, normalization_method="mean_std")
    with HubServer() as hub, use(hub, tmp_path / "machine"):
        hub.add("owner/clts", tmp_path / "x")
        here, there = cp.load(tmp_path / "x" / "tied"), cp.load("hf://owner/clts/tied")
    assert torch.equal(here.decoder_vectors(0), there.decoder_vectors(0))
    assert torch.equal(here.b_dec[2], there.b_dec[2])


def test_the_folder_above(tmp_path):
    folder = Folder(tmp_path) / "a"
    assert folder.parent is not None
    assert folder.parent.path == tmp_path
    assert Folder(Path(tmp_path.anchor)).parent is None
