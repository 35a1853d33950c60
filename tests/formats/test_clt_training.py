"""clt-training: what its configs do not say, and what no crosscoder can follow."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import clt_plugin as cp
from support.layouts import clt_training as layout


@pytest.fixture
def folder(tmp_path):
    layout.write(tmp_path, span=layout.N_LAYERS)
    return tmp_path


def edit(folder, layers=range(layout.N_LAYERS), **settings):
    for layer in layers:
        path = folder / f"h.{layer}.mlp" / "cfg.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"activation": "groupmax"}, "activation 'groupmax': only topk"),
        ({"activation": "batchtopk"}, "activation 'batchtopk': only topk"),
        ({"topk_coalesced": True}, "topk_coalesced: the latents of all sources are selected anew"),
        ({"secondary_target_tied": True}, "secondary_target_tied: a second decoder"),
        ({"coalesce_topk": "group"}, "coalesce_topk 'group': known are none, concat, per-layer"),
        ({"transcode": False}, "does not say transcode: true"),
        ({"k": None}, "gives no k"),
        ({"skip_connection": True}, "has skips across layers"),
        ({"post_encoder_scale": True}, r"post_enc_scales.0 is missing, where \(9,\) was expected"),
    ],
)
def test_settings_that_are_refused(folder, settings, words):
    edit(folder, **settings)
    with pytest.raises(cp.FormatError, match=words):
        cp.load(folder)


def test_layers_that_differ(folder):
    edit(folder, [1], k=5)
    with pytest.raises(cp.FormatError, match=r"h.1.mlp/cfg.json says k 5, and h.0.mlp's says 3"):
        cp.load(folder)


@pytest.mark.parametrize(
    ("layer", "words"),
    [(0, "h.0.mlp missing"), (1, "h.1.mlp missing"), (2, "n_targets 3, where 2 follows .* are some missing")],
)
def test_a_layer_that_is_missing(folder, layer, words):
    shutil.rmtree(folder / f"h.{layer}.mlp")
    with pytest.raises(cp.FormatError, match=words):
        cp.load(folder)


def test_one_layer_alone(folder):
    with pytest.raises(cp.FormatError, match="one layer of several: give the folder above"):
        cp.load(folder / "h.1.mlp")


def test_what_was_read_is_not_guessed(folder):
    (folder / "config.json").unlink()
    with pytest.raises(cp.FormatError, match=r"no config.json, .* nothing else says what was read"):
        cp.load(folder)


@pytest.mark.parametrize(
    ("hookpoints_in", "words"),
    [(["h.*.attn"], "reads the input of 'attn'"), (["h.*.ln_2", "h.*.mlp"], "names ln_2, mlp, where one module")],
)
def test_other_inputs(folder, hookpoints_in, words):
    (folder / "config.json").write_text(json.dumps({"model": "gpt2", "hookpoints_in": hookpoints_in}))
    with pytest.raises(cp.FormatError, match=words):
        cp.load(folder)


def test_a_post_encoder_that_does_something(folder):
    path = folder / "h.1.mlp" / "sae.safetensors"
    plain = load_file(path)
    save_file(plain | {"post_encs.1": torch.full((layout.F,), 0.1)}, path)
    with pytest.raises(cp.FormatError, match=r"post_encs.1 is not 0 throughout: it is added to active latents"):
        cp.load(folder)
    save_file(plain | {"post_enc_scales.0": torch.ones(layout.F)}, path)  # the config does not speak of it
    with pytest.raises(cp.FormatError, match="which this format does not know"):
        cp.load(folder)


def test_other_hookpoints(folder):
    shutil.copytree(folder / "h.0.mlp", folder / "h.0.attn")
    with pytest.raises(cp.FormatError, match="other hookpoints"):
        cp.load(folder)


def test_a_norm_of_zero(tmp_path):
    layout.write(tmp_path, span=layout.N_LAYERS, normalize_io=True)
    path = tmp_path / "h.2.mlp" / "sae.safetensors"
    save_file(load_file(path) | {"in_norm": torch.zeros(1)}, path)
    with pytest.raises(cp.FormatError, match="in_norm must hold finite numbers above 0"):
        cp.load(tmp_path)
