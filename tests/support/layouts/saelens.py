"""SAELens's folders: every architecture that can be read, as versions before and after 6 write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import clt_plugin as cp
from support.layouts import Layout, Oracle

D, D_OUT, F, K = 4, 5, 9, 3
Tensors = dict[str, Tensor]


def relu(p: Tensor, h: Tensor, w: Tensors) -> Tensor:
    return p.relu()


def jumprelu(p: Tensor, h: Tensor, w: Tensors) -> Tensor:
    threshold = w["threshold"] if "threshold" in w else w["log_threshold"].exp()
    return p.relu() * (p > threshold)


def topk(p: Tensor, h: Tensor, w: Tensors) -> Tensor:
    values, indices = p.topk(K, dim=-1)
    return torch.zeros_like(p).scatter_(-1, indices, values.relu())


def topk_rescaled(p: Tensor, h: Tensor, w: Tensors) -> Tensor:
    norms = w["W_dec"].norm(dim=-1)
    return topk(p * norms, h, w) * (1 / norms)


def gated(p: Tensor, h: Tensor, w: Tensors) -> Tensor:
    gate = (h @ w["W_enc"] + w["b_gate"] > 0).float()
    return gate * (h @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()


def v6(architecture: str, **extra: Any) -> dict[str, Any]:
    """A config of version 6; metadata under its own key."""
    hooks = {"hook_name": "blocks.2.hook_resid_post"} | extra.pop("hooks", {})
    metadata = {"sae_lens_version": "6.12.1", "model_name": "gemma-2-2b", "prepend_bos": True} | hooks
    base = {"architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu"}
    usual = {"apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none"}
    return base | usual | extra | {"metadata": metadata}


def v3(**extra: Any) -> dict[str, Any]:
    """A config of before version 6; flat."""
    base = {"d_in": D, "d_sae": F, "dtype": "torch.float32", "device": "cuda", "model_name": "gpt2-small"}
    hooks = {"hook_name": "blocks.2.hook_mlp_out", "hook_layer": 2, "hook_head_index": None}
    usual = {"activation_fn_str": "relu", "apply_b_dec_to_input": False, "finetuning_scaling_factor": False}
    kwargs = {"model_from_pretrained_kwargs": {"center_writing_weights": False}, "normalize_activations": None}
    return base | hooks | usual | kwargs | extra


def write(
    folder: Path, config: dict[str, Any], acts: Callable[[Tensor, Tensor, Tensors], Tensor], *names: str
) -> Oracle:
    """Write one; names are those of tensors besides the usual four."""
    folder.mkdir(exist_ok=True)
    transcodes = "d_out" in config
    d_out = D_OUT if transcodes else D
    w = {"W_enc": torch.randn(D, F), "W_dec": torch.randn(F, d_out), "b_dec": torch.randn(d_out)}
    if acts is not gated:
        w["b_enc"] = torch.randn(F)
    for name in names:
        w[name] = torch.randn(d_out, D) if name == "W_skip" else torch.randn(F) * 0.5
    save_file(w, folder / "sae_weights.safetensors")
    save_file({"sparsity": torch.randn(F)}, folder / "sparsity.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    centred = config.get("apply_b_dec_to_input", True) and not transcodes

    def oracle(x: list[Tensor]) -> list[Tensor]:
        h = x[0] - w["b_dec"] if centred else x[0]
        p = h @ w["W_enc"] + w["b_enc"] if "b_enc" in w else h
        feature_acts = acts(p, h, w)
        if config.get("finetuning_scaling_factor"):
            feature_acts = feature_acts * w["scaling_factor"]
        y = feature_acts @ w["W_dec"] + w["b_dec"]
        return [y + x[0] @ w["W_skip"].T if "W_skip" in w else y]

    return oracle


def write_set(folder: Path) -> Oracle:
    hooks = [{"hooks": {"hook_name": f"blocks.{layer}.hook_resid_pre"}} for layer in range(2)]
    oracles = [
        write(folder / f"layer_{i}", v6("jumprelu", **hook), jumprelu, "threshold") for i, hook in enumerate(hooks)
    ]
    return lambda x: [y for oracle, one in zip(oracles, x, strict=True) for y in oracle([one])]


NAME, WEIGHTS = "saelens", "sae_weights.safetensors"
GEMMA, GPT2 = cp.Host("gemma-2-2b"), cp.Host("gpt2")
RESIDUAL, MLP_OUT = cp.Wiring.sae(2), cp.Wiring.sae(("mlp_out", 2))
RELU, JUMP = "ReLU()", "JumpReLU(bandwidth=0.001)"
TOPK, RANKED = (f"TopK(k={K}, scope='group', score='{score}')" for score in ("activation", "decoder_norm"))
TRANSCODER = {
    "apply_b_dec_to_input": False,
    "d_out": D_OUT,
    "hooks": {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"},
}
HF = {
    "hook_name": "blocks.1.hook_mlp_in",
    "hf_hook_name": "model.layers.1.pre_feedforward_layernorm.output",
    "hook_name_out": "blocks.1.hook_mlp_out",
    "hf_hook_name_out": "model.layers.1.post_feedforward_layernorm.output",
}


def transcoder(skip: bool) -> cp.Wiring:
    read, write = cp.Site("model", "mlp_in", 1), cp.Site("model", "mlp_out", 1)
    wiring = cp.Wiring(((read,),), ((write,),), name="plt(layer 1)")
    return wiring.with_skips([(read, write)]) if skip else wiring


def layout(name: str, wiring: cp.Wiring, activation: str, host: cp.Host, *content: Any, **how: Any) -> Layout:
    return Layout(
        f"SAELens, {name}", NAME, lambda folder: write(folder, *content), wiring, activation, host, WEIGHTS, **how
    )


LAYOUTS = [
    layout("standard", RESIDUAL, RELU, GEMMA, v6("standard"), relu),
    layout("standard, b_dec not applied", RESIDUAL, RELU, GEMMA, v6("standard", apply_b_dec_to_input=False), relu),
    layout("JumpReLU", RESIDUAL, JUMP, GEMMA, v6("jumprelu"), jumprelu, "threshold"),
    layout("JumpReLU in training", RESIDUAL, JUMP, GEMMA, v6("jumprelu"), jumprelu, "log_threshold"),
    layout("TopK", RESIDUAL, TOPK, GEMMA, v6("topk", k=K), topk),
    layout(
        "TopK by decoder norm", RESIDUAL, RANKED, GEMMA,
        v6("topk", k=K, rescale_acts_by_decoder_norm=True), topk_rescaled,
    ),
    layout("gated", RESIDUAL, JUMP, GEMMA, v6("gated"), gated, "b_gate", "b_mag", "r_mag"),
    layout(
        "gated, b_dec not applied", RESIDUAL, JUMP, GEMMA,
        v6("gated", apply_b_dec_to_input=False), gated, "b_gate", "b_mag", "r_mag",
    ),
    layout("transcoder", transcoder(False), RELU, GEMMA, v6("transcoder", **TRANSCODER), relu),
    layout("skip transcoder", transcoder(True), RELU, GEMMA, v6("skip_transcoder", **TRANSCODER), relu, "W_skip"),
    layout(
        "JumpReLU transcoder at transformers' hooks", transcoder(False), JUMP, GEMMA,
        v6("jumprelu_transcoder", **TRANSCODER | {"hooks": HF}), jumprelu, "threshold",
    ),
    layout(
        "JumpReLU skip transcoder", transcoder(True), JUMP, GEMMA,
        v6("jumprelu_skip_transcoder", **TRANSCODER), jumprelu, "threshold", "W_skip",
    ),
    layout("version 3", MLP_OUT, RELU, GPT2, v3(), relu),
    layout("version 3, by its first keys", MLP_OUT, RELU, GPT2, {
        "hook_point" if key == "hook_name" else "activation_fn" if key == "activation_fn_str" else key: value
        for key, value in v3(normalize_activations=False).items()
    }, relu),
    layout(
        "version 3, TopK", MLP_OUT, TOPK, GPT2,
        v3(architecture="standard", activation_fn_str="topk", activation_fn_kwargs={"k": K}), topk,
    ),
    layout(
        "version 4, finetuned", MLP_OUT, RELU, GPT2,
        v3(architecture="standard", finetuning_scaling_factor=True), relu, "scaling_factor",
    ),
    Layout(
        "SAELens, a set", NAME, write_set,
        cp.Wiring(*[tuple((cp.Site("model", "resid_pre", layer),) for layer in range(2))] * 2, name="sae(2)"),
        JUMP, GEMMA, f"layer_1/{WEIGHTS}", "layer_*",
    ),
]  # fmt: skip
