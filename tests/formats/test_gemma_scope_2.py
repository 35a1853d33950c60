"""Gemma Scope 2: what is refused, and selections of a CLT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import clt_plugin as cp
from support.layouts import gemma_scope_2 as made


@pytest.fixture
def clt(tmp_path):
    made.write_sites(tmp_path, "clt", made.ALL, True, "google/gemma-3-1b-pt")
    return tmp_path


@pytest.fixture
def transcoder(tmp_path):
    made.write_layer(tmp_path, "transcoder", made.AT_17, True, "google/gemma-3-1b-pt")
    return tmp_path


def refused(folder: Path, *words: str, **how) -> None:
    for lazy in (True, False):
        with pytest.raises(cp.FormatError) as error:
            cp.load(folder, lazy=lazy, **how)
        for word in words:
            assert word in str(error.value), str(error.value)


def say(folder: Path, **values) -> None:
    path = folder / "config.json"
    said = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in said.items() if value is not None}))


def change(path: Path, **tensors: torch.Tensor | None) -> None:
    changed = load_file(path) | tensors
    save_file({key: value.contiguous() for key, value in changed.items() if value is not None}, path)


# ---------------------------------------------------------------- what comes before the source


def decoder(folder: Path, i: int) -> torch.Tensor:
    return load_file(folder / f"params_layer_{i}.safetensors")["w_dec"]


def test_a_decoder_that_writes_before_its_source(clt):
    w_dec = decoder(clt, 2)
    w_dec[3, 1, 0] = 0.5
    change(clt / "params_layer_2.safetensors", w_dec=w_dec)
    refused(clt, "params_layer_2.safetensors", "w_dec writes up to 0.5 at targets 0 to 1", "not a causal decoder")
    assert cp.load(clt, lazy=True, layers=[0, 1]).wiring.n_groups == 2
    refused(clt, "not a causal decoder", features={2: [0, 3]})


def test_a_decoder_that_counts_from_its_source(clt):
    for i in range(3):
        path = clt / f"params_layer_{i}.safetensors"
        change(path, w_dec=decoder(clt, i).roll(-i, dims=1))
    refused(clt, "params_layer_1.safetensors: w_dec is 0 at its last 1 targets", "count targets from its source")


def test_a_decoder_without_any_order(clt):
    for i in range(3):
        change(clt / f"params_layer_{i}.safetensors", w_dec=torch.randn(made.F, 3, made.D))
    refused(clt, "params_layer_1.safetensors", "at targets 0 to 0", "must be about 0")


def test_layers_of_a_clt(clt):
    whole, part = cp.load(clt), cp.load(clt, layers=[1])
    assert torch.equal(part.W_dec[0], whole.W_dec[1])
    assert torch.equal(part.W_skip[0], whole.W_skip[1])
    assert [str(site) for site in part.sites.write] == ["mlp_out.1", "mlp_out.2"]


# ---------------------------------------------------------------- configs


def test_no_config(clt, transcoder):
    for folder in (clt, transcoder):
        (folder / "config.json").unlink(missing_ok=True)
        refused(folder, "config.json", "which site it reads", "hf_hook_point_in and hf_hook_point_out")


@pytest.mark.parametrize("key", ["type", "architecture", "width", "affine_connection", "l0", "model_name"])
def test_what_the_config_need_not_say(clt, key):
    whole = cp.load(clt)
    say(clt, **{key: None})
    assert cp.load(clt).wiring == whole.wiring
    assert cp.load(clt).host.model_name == (None if key == "model_name" else "google/gemma-3-1b-pt")


def test_an_autoencoder_that_names_its_site_once(tmp_path):
    made.write_layer(tmp_path, "sae", ("model.layers.17.output",) * 2, False, "google/gemma-3-1b-pt")
    say(tmp_path, hf_hook_point_out=None)
    assert cp.load(tmp_path).wiring == cp.Wiring.sae(17)


WRONG = {
    "architecture": ({"architecture": "topk"}, "architecture 'topk'"),
    "type": ({"type": "sae"}, "type 'sae', but its files are those of clt or crosscoder"),
    "width": ({"width": 7}, "width 7, which is for all layers together, but the encoders have 21"),
    "affine": ({"affine_connection": False}, "affine_connection False"),
    "hook": ({"hf_hook_point_in": "model.layers.{all}.mlp.up_proj.output"}, "names the hook 'mlp.up_proj.output'"),
    "no hook": ({"hf_hook_point_in": "model.norm"}, "'model.norm', which is not a place in a block"),
    "layers": ({"hf_hook_point_in": "model.layers.{0,1}.output"}, "but the tensors are those of 3 sites"),
    "order": ({"hf_hook_point_in": "model.layers.{2,1,0}.output"}, "must be distinct and in order"),
    "apart": ({"hf_hook_point_in": "model.layers.{0,1,4}.output"}, "a CLT reads and writes every layer, here 0 to 2"),
    "one": ({"hf_hook_point_in": "model.layers.4.output"}, "but the tensors are those of 3 sites"),
}


@pytest.mark.parametrize("name", WRONG)
def test_configs_that_contradict(clt, name):
    values, words = WRONG[name]
    say(clt, **values)
    refused(clt, "config.json", words)


def test_attention(tmp_path):
    made.write_layer(tmp_path, "sae", ("model.layers.17.self_attn.o_proj.input",) * 2, False, "google/gemma-3-1b-pt")
    refused(tmp_path, "self_attn.o_proj.input", "not a site that this package reads")


def test_a_layer_that_is_all(transcoder):
    say(transcoder, hf_hook_point_in=made.ALL[0])
    refused(transcoder, "{all}", "one layer alone")


# ---------------------------------------------------------------- files


def test_missing_layers(clt):
    (clt / "params_layer_2.safetensors").unlink()
    refused(clt, "params_layer_2.safetensors missing")
    (clt / "params_layer_0.safetensors").unlink()
    refused(clt, "params_layer_0.safetensors, params_layer_2.safetensors missing")


def test_no_files(clt):
    for path in clt.glob("*.safetensors"):
        path.unlink()
    refused(clt, "neither params.safetensors nor params_layer_0.safetensors")


def test_a_skip_in_some_layers(clt):
    say(clt, affine_connection=None)
    change(clt / "params_layer_1.safetensors", affine_skip_connection=None)
    refused(clt, "have affine_skip_connection, but params_layer_1.safetensors has none")


def test_a_transcoder_without_the_skip_it_speaks_of(transcoder):
    change(transcoder / "params.safetensors", affine_skip_connection=None)
    refused(transcoder, "says affine_connection True, but params.safetensors lacks affine_skip_connection")


def test_no_threshold(clt):
    change(clt / "params_layer_0.safetensors", threshold=None)
    refused(clt, "params_layer_0.safetensors has no tensor threshold")
