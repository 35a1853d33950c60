"""circuit-tracer's transcoders: what is refused."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import clt_plugin as cp
from support.layouts import transcoder_bundle as made

FILE = "layer_1.safetensors"


@pytest.fixture
def bundle(tmp_path):
    made.write(tmp_path, "relu", skip=True)
    return tmp_path


def refused(folder, words: str) -> None:
    with pytest.raises(cp.FormatError, match=re.escape(words)):
        cp.load(folder)


def change(path, **tensors) -> None:
    changed = load_file(path) | tensors
    save_file({key: value.contiguous() for key, value in changed.items() if value is not None}, path)


def say(folder, text: str) -> None:
    (folder / "config.yaml").write_text(made.CONFIG + text)


def test_no_config(bundle):
    (bundle / "config.yaml").unlink()
    refused(bundle, "no config says what it reads and writes")
    refused(bundle, "feature_input_hook and feature_output_hook")


def test_a_gap(bundle):
    (bundle / FILE).unlink()
    refused(bundle, "layer_1.safetensors missing")


SAID = {
    "unknown": ("activation: gelu", "activation 'gelu'; known are relu, jumprelu and topk"),
    "no k": ("activation: topk", "activation topk, but no k is given"),
    "no activation": ("k: 3", "gives k 3 and no activation"),
    "no number": ("activation: topk\nk: many", "gives no k (found 'many')"),
    "jumprelu": ("activation: jumprelu", "is said to have activation jumprelu, but holds no threshold"),
}


@pytest.mark.parametrize("name", SAID)
def test_activations_that_cannot_be(bundle, name):
    text, words = SAID[name]
    say(bundle, text)
    refused(bundle, words)


@pytest.mark.parametrize("said", ["relu", "topk\nk: 3"])
def test_thresholds_that_are_not_meant(tmp_path, said):
    made.write(tmp_path, "jumprelu", skip=False)
    say(tmp_path, f"activation: {said}")
    refused(tmp_path, "but holds activation_function.threshold")


def test_a_k_of_its_own(tmp_path):
    made.write(tmp_path, "topk", skip=False, stored_k=True)
    say(tmp_path, "activation: topk\nk: 5")
    refused(tmp_path, f"holds k = {made.K}, but its config says k 5")
    say(tmp_path, "activation: relu")
    refused(tmp_path, "activation relu, but holds k")
    say(tmp_path, f"activation: topk\nk: {made.K}")
    assert str(cp.load(tmp_path).activation) == made.TOPK


def test_layers_with_different_k(tmp_path):
    made.write(tmp_path, "topk", skip=False, stored_k=True)
    change(tmp_path / FILE, k=torch.tensor(2))
    refused(tmp_path, "mixes activations")


def test_unrectified_topk_stays_so(tmp_path):
    made.write(tmp_path, "topk", skip=False)
    clt = cp.load(tmp_path)
    acts = clt.encode(torch.randn(3, 40, made.D))
    assert bool((acts < 0).any())
    assert bool(((acts != 0).sum(-1) == made.K).all())


def test_as_many_latents_as_coordinates(bundle):
    square = {"W_enc": torch.randn(5, 5), "W_dec": torch.randn(5, 5), "b_enc": torch.randn(5)}
    change(bundle / FILE, **square)
    refused(bundle, "as many latents as coordinates, 5")


def test_a_skip_in_some_layers(bundle):
    change(bundle / FILE, W_skip=None)
    refused(bundle, "have a skip connection, but")


def test_a_decoder_over_targets(bundle):
    change(bundle / FILE, W_dec=torch.randn(made.F, 3, made.D))
    refused(bundle, "layer_1.safetensors: W_dec must be (F, d), not (7, 3, 5)")


def test_a_clt_by_its_config(bundle):
    (bundle / "config.yaml").write_text(made.CONFIG.replace("transcoder_set", "cross_layer_transcoder"))
    refused(bundle, "model_kind 'cross_layer_transcoder'")


def test_an_unknown_hook(bundle):
    (bundle / "config.yaml").write_text(made.CONFIG.replace("mlp.hook_in", "hook_mlp_in"))
    refused(bundle, "names the hook 'hook_mlp_in'")
