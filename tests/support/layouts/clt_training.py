"""clt-training: decoders by source, by target and shared, of full and limited span, and a transcoder a layer."""

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

N_LAYERS, D, F, K = 3, 4, 9, 3


def tensors(layer: int, config: dict[str, Any]) -> dict[str, Tensor]:
    state = {"encoder.weight": torch.randn(F, D), "encoder.bias": torch.randn(F)}
    multi, mode = config["n_targets"] > 0, config["coalesce_topk"]
    if multi and mode == "none":
        for k in range(config["n_targets"]):
            if not config["per_source_tied"]:
                state[f"W_decs.{k}"] = torch.randn(F, D)
            state[f"b_decs.{k}"] = torch.randn(D)
        state["b_dec"] = state["b_decs.0"].clone()
    else:
        state["b_dec"] = torch.randn(D)
    if config["per_source_tied"] or mode != "none" or not multi:
        state["W_dec"] = torch.randn(F * max(1, config["n_sources"] if mode == "per-layer" else 1), D)
    if config["skip_connection"]:
        state["W_skip"] = torch.randn(D, D)
    if config["normalize_io"]:
        state |= {"in_norm": torch.rand(1) + 1.5, "out_norm": torch.rand(1) + 1.5}
    if config["post_encoder_scale"]:
        names = [f"post_enc_scales.{k}" for k in range(config["n_targets"])] or ["post_enc_scale"]
        state |= {name: torch.randn(F) for name in names}
    if config["train_post_encoder"]:
        names = [f"post_encs.{k}" for k in range(config["n_targets"])] or ["post_enc"]
        state |= {name: torch.zeros(F) for name in names}
    return state


def sparse(x: Tensor, state: dict[str, Tensor]) -> Tensor:
    acts = torch.nn.functional.linear(x, state["encoder.weight"], state["encoder.bias"]).relu()
    values, indices = acts.topk(K, dim=-1, sorted=False)
    return torch.zeros_like(acts).scatter_(-1, indices, values)


def write(
    folder: Path, blocks: str = "h", hookpoints_in: tuple[str, ...] = (), span: int = 0, **settings: Any
) -> Oracle:
    states, configs = [], []
    for layer in range(N_LAYERS):
        config = {
            "dtype": "none", "activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": F,
            "k": K, "skip_connection": False, "transcode": True, "n_targets": min(span, N_LAYERS - layer),
            "n_sources": min(span, layer + 1), "normalize_io": False, "divide_cross_layer": False,
            "train_post_encoder": True, "post_encoder_scale": False, "per_source_tied": False, "coalesce_topk": "none",
            "topk_coalesced": False, "d_in": D,
        } | settings  # fmt: skip
        configs.append(config)
        states.append(tensors(layer, config))
        inside = folder / f"{blocks}.{layer}.mlp"
        inside.mkdir()
        save_file(states[layer], inside / "sae.safetensors")
        (inside / "cfg.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model": "gpt2", "hookpoints_in": list(hookpoints_in)}))
    config = configs[0]

    def oracle(x: list[Tensor]) -> list[Tensor]:
        z = [a * D**0.5 / state["in_norm"] if config["normalize_io"] else a for a, state in zip(x, states, strict=True)]
        acts = [sparse(a, state) for a, state in zip(z, states, strict=True)]
        y = []
        for t, own in enumerate(states):
            live = [s for s in range(t + 1) if t - s < max(1, configs[s]["n_targets"])]
            if config["coalesce_topk"] == "none" and span:
                u = torch.zeros(1)
                for s in live:
                    decoder = states[s]["W_dec" if config["per_source_tied"] else f"W_decs.{t - s}"]
                    q = max(1, len(live) - 1) if config["divide_cross_layer"] and s < t else 1
                    scale = states[s].get(f"post_enc_scales.{t - s}", 1)
                    u = u + ((acts[s] * scale) @ decoder + states[s][f"b_decs.{t - s}"]) / q
            elif config["coalesce_topk"] == "per-layer":
                u = (
                    torch.cat([acts[s] * states[s].get(f"post_enc_scales.{t - s}", 1) for s in live], dim=1)
                    @ own["W_dec"]
                    + own["b_dec"]
                )
            else:
                u = torch.stack([acts[s] for s in live]).sum(0) @ own["W_dec"] + own["b_dec"]
            if config["skip_connection"]:
                u = u + z[t] @ own["W_skip"].mT
            y.append(u * own["out_norm"] / D**0.5 if config["normalize_io"] else u)
        return y

    return oracle


def layout(variant: str, wiring: cp.Wiring, blocks: str = "h", damaged: int = 0, **settings: Any) -> Layout:
    return Layout(
        f"clt-training, {variant}", "clt-training", partial(write, blocks=blocks, **settings), wiring,
        "TopK(k=3, scope='group', score='activation')", cp.Host("gpt2"), f"{blocks}.{damaged}.mlp/sae.safetensors",
        optional_keys=frozenset(["post_enc", *(f"post_encs.{k}" for k in range(N_LAYERS))])
        | ({"b_dec"} if settings.get("span") and "coalesce_topk" not in settings else frozenset()),
        tolerance=1e-5,
    )  # fmt: skip


MID = cp.Wiring.clt(N_LAYERS, read="resid_mid")
LLAMA = cp.Wiring.clt(N_LAYERS, read="resid_mid", write="mlp_out_before_norm")
LAYOUTS = [
    layout("by offset", cp.Wiring.clt(N_LAYERS), span=N_LAYERS, divide_cross_layer=True),
    layout("by offset, scaled", cp.Wiring.clt(N_LAYERS), span=N_LAYERS, post_encoder_scale=True),
    layout("by offset, of limited span", cp.Wiring.local_clt(N_LAYERS, 2), span=2, damaged=1),
    layout(
        "a source's decoder", LLAMA, "layers", 1, span=N_LAYERS, per_source_tied=True, normalize_io=True,
        hookpoints_in=("layers.*.post_attention_layernorm",),
    ),
    layout(
        "a target's decoder", MID.with_skips(), damaged=1, span=N_LAYERS, coalesce_topk="concat", normalize_io=True,
        skip_connection=True, hookpoints_in=("h.*.ln_2",),
    ),
    layout(
        "by source with the target", MID.with_skips(), damaged=1, span=N_LAYERS, coalesce_topk="per-layer",
        skip_connection=True, post_encoder_scale=True,
        hookpoints_in=tuple(f"h.{layer}.ln_2" for layer in range(N_LAYERS)),
    ),
    layout(
        "within each layer", cp.Wiring.plt(N_LAYERS).with_skips(), skip_connection=True, normalize_io=True, damaged=2
    ),
]  # fmt: skip
