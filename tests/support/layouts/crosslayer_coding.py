"""crosslayer-coding: every way of tying decoders, of normalising and of activating that is a function of the token."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import clt_plugin as cp
from support.layouts import Layout, Oracle

N_LAYERS, D, F, K = 3, 4, 7, 3
CONFIG = {
    "num_features": F,
    "num_layers": N_LAYERS,
    "d_model": D,
    "model_name": "gpt2",
    "normalization_method": "none",
    "activation_fn": "jumprelu",
    "jumprelu_threshold": 0.03,
    "mlp_input_template": "transformer.h.{}.ln_2.input",
    "mlp_output_template": "transformer.h.{}.mlp.output",
    "decoder_tying": "none",
    "skip_connection": False,
}


def name(tying: str, s: int, t: int) -> str:
    return {"none": f"{s}->{t}", "per_source": f"{s}", "per_target": f"{t}"}[tying]


def tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    state = {}
    for s in range(N_LAYERS):
        state[f"encoder_module.encoders.{s}.weight"] = torch.randn(F, D)
        state[f"encoder_module.encoders.{s}.bias_param"] = torch.randn(F)
        for t in range(s, N_LAYERS):
            state[f"decoder_module.decoders.{name(config['decoder_tying'], s, t)}.weight"] = torch.randn(D, F)
            state[f"decoder_module.decoders.{name(config['decoder_tying'], s, t)}.bias_param"] = torch.randn(D)
        if config["skip_connection"]:
            state[f"decoder_module.skip_weights.{s}"] = torch.randn(D, D)
    if config.get("enable_feature_scale"):
        state |= {f"decoder_module.feature_scale.{t}": torch.randn(F) for t in range(N_LAYERS)}
    if config["activation_fn"] == "jumprelu":
        state["theta_manager.log_threshold"] = torch.randn(N_LAYERS, F) * 0.5 - 1
    return state


def statistics() -> dict[str, Any]:
    def stat() -> dict[str, list[float]]:
        return {"mean": torch.randn(D).tolist(), "std": (torch.rand(D) + 0.5).tolist()}

    return {str(layer): {"inputs": stat(), "targets": stat()} for layer in range(N_LAYERS)}


def write(folder: Path, stats_above: bool = False, **settings: Any) -> Oracle:
    config = CONFIG | settings
    state, stats, tying = tensors(config), statistics(), config["decoder_tying"]
    inside = folder / "tied" if stats_above else folder
    inside.mkdir(exist_ok=True)
    save_file(state, inside / "clt_checkpoint_latest.safetensors")
    (inside / "cfg.json").write_text(json.dumps(config, indent=4))
    if config["normalization_method"] == "mean_std":
        (folder / "norm_stats.json").write_text(json.dumps(stats))

    def normalise(x: Tensor, layer: int) -> Tensor:
        if config["normalization_method"] == "sqrt_d_model":
            return x * D**0.5
        stat = {key: torch.tensor(value) for key, value in stats[str(layer)]["inputs"].items()}
        return (x - stat["mean"]) / (stat["std"] + 1e-6) if config["normalization_method"] == "mean_std" else x

    def denormalise(u: Tensor, layer: int) -> Tensor:
        if config["normalization_method"] == "sqrt_d_model":
            return u / D**0.5
        stat = {key: torch.tensor(value) for key, value in stats[str(layer)]["targets"].items()}
        return u * (stat["std"] + 1e-6) + stat["mean"] if config["normalization_method"] == "mean_std" else u

    def activate(p: Tensor, layer: int) -> Tensor:
        if config["activation_fn"] == "jumprelu":
            return (p >= state["theta_manager.log_threshold"][layer].exp()).float() * p
        if config["activation_fn"] == "topk":
            return p * torch.zeros_like(p).scatter_(-1, p.topk(K, dim=-1).indices, 1.0)
        return p.relu()

    def oracle(x: list[Tensor]) -> list[Tensor]:
        z = [normalise(x[layer], layer) for layer in range(N_LAYERS)]
        acts = []
        for s in range(N_LAYERS):
            at = f"encoder_module.encoders.{s}"
            acts.append(activate(torch.nn.functional.linear(z[s], state[f"{at}.weight"], state[f"{at}.bias_param"]), s))
        y = []
        for t in range(N_LAYERS):
            at = [f"decoder_module.decoders.{name(tying, s, t)}" for s in range(t + 1)]
            scaled = [a * state.get(f"decoder_module.feature_scale.{t}", 1) for a in acts[: t + 1]]
            if tying == "per_target":
                summed = torch.stack(scaled).sum(0)
                u = torch.nn.functional.linear(summed, state[f"{at[t]}.weight"], state[f"{at[t]}.bias_param"])
            else:
                pairs = zip(scaled, at, strict=True)
                u = sum(torch.nn.functional.linear(a, state[f"{p}.weight"], state[f"{p}.bias_param"]) for a, p in pairs)
            if config["skip_connection"]:
                u = u + z[t] @ state[f"decoder_module.skip_weights.{t}"].T
            y.append(denormalise(u, t))
        return y

    return oracle


WIRING = cp.Wiring.clt(N_LAYERS, read="resid_mid")
JUMP = "JumpReLU(bandwidth=0.001)"
WEIGHTS = "clt_checkpoint_latest.safetensors"


def layout(variant: str, activation: str = JUMP, wiring: cp.Wiring = WIRING, above: bool = False, **settings: Any):
    place = {"damageable": f"tied/{WEIGHTS}", "reference": "tied"} if above else {"damageable": WEIGHTS}
    return Layout(
        f"crosslayer-coding, {variant}", "crosslayer-coding", partial(write, stats_above=above, **settings),
        wiring, activation, cp.Host(settings.get("model_name", "gpt2"), None, N_LAYERS), tolerance=1e-5, **place,
    )  # fmt: skip


MEAN_STD = {"normalization_method": "mean_std"}
PYTHIA = {
    "model_name": "EleutherAI/pythia-70m",
    "mlp_input_template": "gpt_neox.layers.{}.mlp.input",
    "mlp_output_template": "gpt_neox.layers.{}.mlp.output",
}
TOP = {"activation_fn": "topk", "topk_k": K, "topk_mode": "per_layer"}
NOT_RECTIFIED = "TopK(k=3, scope='group', score='activation', rectify=False)"
LAYOUTS = [
    layout("untied"),
    layout("untied, mean_std", **MEAN_STD),
    layout("untied, TopK", NOT_RECTIFIED, **TOP),
    layout("a source's decoder, ReLU", "ReLU()", decoder_tying="per_source", activation_fn="relu"),
    layout("a target's decoder", decoder_tying="per_target", **MEAN_STD),
    layout("a source's decoder, scaled", decoder_tying="per_source", enable_feature_scale=True, **MEAN_STD),
    layout(
        "a target's decoder and skips, statistics above", wiring=WIRING.with_skips(), above=True,
        decoder_tying="per_target", skip_connection=True, **MEAN_STD,
    ),
    layout(
        "sqrt_d_model, skips", wiring=WIRING.with_skips(),
        decoder_tying="per_source", skip_connection=True, normalization_method="sqrt_d_model",
    ),
    layout("Pythia", wiring=cp.Wiring.clt(N_LAYERS, "mlp_in", "mlp_out_before_norm"), **PYTHIA),
]  # fmt: skip
