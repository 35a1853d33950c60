"""SAELens's folders: what cannot be read and why, what the names of hooks mean, and exact folding."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import clt_plugin as cp
from support.layouts.saelens import HF, TRANSCODER, F, gated, jumprelu, relu, topk_rescaled, v3, v6, write


def refused(folder, *words):
    with pytest.raises(cp.FormatError) as error:
        cp.load(folder)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (v6("abstopk", k=3), ["'abstopk'", "negative activations"]),
        (v6("matching_pursuit"), ["one after the other"]),
        (v6("temporal"), ["attends over positions"]),
        (v6("batchtopk", k=3), ["training checkpoint", "save_inference_model"]),
        (v6("matryoshka_batchtopk", k=3), ["training checkpoint"]),
        (v6("mystery"), ["'mystery'", "known are standard"]),
        (v6("topk"), ["gives no k"]),
        (v6("standard", normalize_activations="layer_norm"), ["every token by itself"]),
        (v6("standard", normalize_activations="constant_norm_rescale"), ["by its own norm"]),
        (v6("standard", normalize_activations="covariance_whitening"), ["fold_activation_whitening"]),
        (v6("standard", normalize_activations="expected_average_only_in"), ["fold_activation_norm_scaling_factor"]),
        (v3(normalize_activations=True), ["expected_average_only_in", "factor is not in the folder"]),
        (v6("standard", normalize_activations="new"), ["'new'", "not known"]),
        (v3(activation_fn_str="tanh-relu"), ["'tanh-relu'", "known are relu, and topk with a k"]),
        (v3(activation_fn_str="topk"), ["'topk'", "with a k"]),
        (v6("standard", reshape_activations="hook_z"), ["hook_z", "not a site"]),
        (v3(hook_name="blocks.2.attn.hook_z"), ["hook_z", "not a site"]),
        (v3(hook_head_index=3), ["names a head (3)"]),
        (v6("standard", hooks={"hook_name": "blocks.2.mlp.hook_post"}), ["'mlp.hook_post'", "hook_resid_post"]),
        (v6("standard", hooks={"hook_name": "hook_embed"}), ["hook_embed", "not a place in a block"]),
        (v6("standard", hooks={"hook_name": None}), ["no hook_name"]),
        (v6("transcoder", **TRANSCODER | {"hooks": {"hook_name": "blocks.1.mlp.hook_in"}}), ["no hook_name_out"]),
        (v6("transcoder", **TRANSCODER | {"apply_b_dec_to_input": True}), ["apply_b_dec_to_input", "no transcoder"]),
        (v6("standard", d_sae=None), ["gives no d_sae", "None"]),
        (v6("standard", d_in=5), ["W_enc has shape (4, 9), where (5, 9) was expected"]),
        (v6("gated"), ["r_mag is missing"]),
        (v6("jumprelu"), ["no tensor threshold"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_refused(tmp_path, config, words):
    write(tmp_path, config, relu)
    refused(tmp_path, *words)


def test_an_unreadable_config(tmp_path):
    write(tmp_path, v6("standard"), relu)
    (tmp_path / "cfg.json").write_text("{")
    refused(tmp_path, "cfg.json cannot be read as JSON")


# ---------------------------------------------------------------- sites

LLAMA, GPT2 = {"model_name": "meta-llama/Llama-3.1-8B"}, {"model_name": "gpt2-small"}


@pytest.mark.parametrize(
    ("hooks", "site"),
    [
        ({"hook_name": "blocks.3.hook_resid_mid"}, "resid_mid"),
        ({"hook_name": "blocks.3.hook_attn_out"}, "attn_out"),
        ({"hook_name": "blocks.3.ln2.hook_normalized"}, "mlp_in_before_gain"),
        ({"hook_name": "blocks.3.ln2.hook_normalized"} | LLAMA, "mlp_in_before_gain"),
        ({"hook_name": "blocks.3.ln2.hook_normalized"} | GPT2, "mlp_in"),
        (
            {"hook_name": "blocks.3.ln2.hook_normalized", "model_from_pretrained_kwargs": {"fold_ln": True}} | GPT2,
            "mlp_in_before_gain",
        ),
        ({"hook_name": "model.layers.3"}, "resid_post"),
        ({"hook_name": "model.layers.3.mlp"} | LLAMA, "mlp_out_before_norm"),
        ({"hook_name": "transformer.h.3.mlp.input"} | GPT2, "mlp_in"),
        ({"hook_name": "blocks.3.x", "hf_hook_name": "model.layers.3.post_attention_layernorm.output"}, "attn_out"),
    ],
)
def test_sites(tmp_path, hooks, site):
    write(tmp_path, v6("standard", hooks=hooks), relu)
    assert cp.load(tmp_path).wiring == cp.Wiring.sae((site, 3))


def test_a_norm_of_which_the_kind_is_not_known(tmp_path):
    hooks = {"hook_name": "blocks.3.ln2.hook_normalized", "model_name": "mine"}
    write(tmp_path, v6("standard", hooks=hooks), relu)
    refused(tmp_path, "ln2.hook_normalized of mine", "before or after the norm's gain")


def test_gemmas_norms_are_not_llamas(tmp_path):
    write(tmp_path, v6("transcoder", **TRANSCODER | {"hooks": HF | LLAMA}), relu)
    refused(tmp_path, "'pre_feedforward_layernorm.output'")


@pytest.mark.parametrize("said", [None, {"center_writing_weights": True}])
def test_centred_activations_are_warned_of(tmp_path, said):
    """TransformerLens subtracts the mean from what GPT-2 writes; older configs do not say whether it was told to."""
    write(tmp_path, v3(model_from_pretrained_kwargs=said), relu)
    with pytest.warns(UserWarning, match="center_writing_weights.*mlp_out.*subtract each token's mean"):
        cp.load(tmp_path)


# ---------------------------------------------------------------- folding


def test_scaling_factors_must_be_announced(tmp_path):
    write(tmp_path, v3(), relu, "scaling_factor")
    refused(tmp_path, "scaling_factor other than 1", "finetuning_scaling_factor")
    weights = load_file(tmp_path / "sae_weights.safetensors")
    save_file(weights | {"scaling_factor": torch.ones(F)}, tmp_path / "sae_weights.safetensors")
    assert torch.equal(cp.load(tmp_path).decoder_vectors(0), weights["W_dec"])


@pytest.mark.parametrize("rows", [[8, 0, 3], [2]])
@pytest.mark.parametrize("lazy", [False, True])
def test_scaled_latents_are_selected_alike(tmp_path, rows, lazy):
    write(tmp_path / "gated", v6("gated"), gated, "b_gate", "b_mag", "r_mag")
    write(tmp_path / "finetuned", v3(finetuning_scaling_factor=True), relu, "scaling_factor")
    for folder in (tmp_path / "gated", tmp_path / "finetuned"):
        whole, x = cp.load(folder), torch.randn(1, 5, 4)
        part = cp.load(folder, features={2: rows}, lazy=lazy)
        torch.testing.assert_close(part.encode(x), whole.encode(x)[..., rows])
        assert torch.equal(part.decoder_vectors(0), whole.decoder_vectors(0)[rows])


def test_negative_thresholds_let_nothing_negative_through(tmp_path):
    write(tmp_path, v6("jumprelu"), jumprelu, "threshold")
    stored, loaded = load_file(tmp_path / "sae_weights.safetensors")["threshold"], cp.load(tmp_path)
    assert (stored < 0).any()
    assert torch.equal(loaded.threshold[0], stored.clamp(min=0))
    assert (loaded.encode(torch.randn(1, 50, 4)) >= 0).all()


def test_ranking_is_by_the_stored_decoders_norms(tmp_path):
    write(tmp_path, v6("topk", k=3, rescale_acts_by_decoder_norm=True), topk_rescaled)
    crosscoder = cp.load(tmp_path)
    torch.testing.assert_close(crosscoder.stored_norms[0].data, crosscoder.decoder_norms(0).detach())
