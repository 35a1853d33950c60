"""CLT-Forge: across layers and within each, after LayerNorm and RMSNorm, whole and in shares."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import clt_plugin as cp
from support.layouts import Layout, Oracle

N_LAYERS, D, F = 3, 4, 10
SHARES = ((0, 6), (6, 10))
AXES = {"W_enc": 2, "b_enc": 1, "W_dec": 1, "log_threshold": 1, "feature_count": 1}


def write(folder: Path, model: str = "gpt2", across: bool = True, sharded: bool = False) -> Oracle:
    source, target = torch.triu_indices(N_LAYERS, N_LAYERS) if across else [torch.arange(N_LAYERS)] * 2
    n_pairs = len(source)
    state = {
        "W_enc": torch.randn(N_LAYERS, D, F),
        "b_enc": torch.randn(N_LAYERS, F),
        "W_dec": torch.randn(n_pairs, F, D),
        "b_dec": torch.randn(n_pairs, D),
        "log_threshold": torch.randn(N_LAYERS, F) * 0.5 - 1,
        "feature_count": torch.randint(9, (N_LAYERS, F)),
        "estimated_norm_scaling_factor_in": torch.rand(N_LAYERS) + 0.5,
        "estimated_norm_scaling_factor_out": torch.rand(N_LAYERS) + 0.5,
    }
    if across:
        state["layer_mask"] = torch.stack([(source == layer).float() for layer in range(N_LAYERS)])
    config = {
        "device": "cuda", "dtype": "float32", "seed": 42, "model_name": model, "d_in": D, "d_latent": F,
        "n_layers": N_LAYERS, "jumprelu_bandwidth": 1.0, "jumprelu_init_threshold": 0.03,
        "cross_layer_decoders": across, "context_size": 16, "feature_sharding": sharded,
    }  # fmt: skip
    (folder / "clt_cfg.json").write_text(json.dumps(config))
    if sharded:
        for rank, (start, stop) in enumerate(SHARES):
            share = {k: v.narrow(AXES[k], start, stop - start) if k in AXES else v for k, v in state.items()}
            save_file({k: v.contiguous() for k, v in share.items()}, folder / f"rank{rank}_clt_weights.safetensors")
    else:
        save_file(state, folder / "clt_weights.safetensors")
    factors = [state[f"estimated_norm_scaling_factor_{side}"][:, None] for side in ("in", "out")]

    def oracle(x: list[Tensor]) -> list[Tensor]:
        scaled = torch.stack(x, dim=1) * factors[0]
        hidden = torch.einsum("bnd,ndk->bnk", scaled, state["W_enc"]) + state["b_enc"]
        acts = hidden * (hidden > state["log_threshold"].exp())
        pairs = torch.einsum("bpk,pkd->bpd", acts[:, source], state["W_dec"]) + state["b_dec"]
        y = torch.zeros(len(x[0]), N_LAYERS, D).index_add(1, target, pairs)
        return list((y / factors[1]).unbind(1))

    return oracle


WEIGHTS = "clt_weights.safetensors"


def layout(variant: str, wiring: cp.Wiring, damageable: str = WEIGHTS, model: str = "gpt2", **settings: bool) -> Layout:
    return Layout(
        f"CLT-Forge, {variant}", "clt-forge", partial(write, model=model, **settings), wiring,
        "JumpReLU(bandwidth=1.0)", cp.Host(model, None, N_LAYERS), damageable,
        optional_keys=frozenset(["layer_mask", "feature_count"]), tolerance=1e-5,
    )  # fmt: skip


AFTER, BEFORE = "mlp_in", "mlp_in_before_gain"
LLAMA = "meta-llama/Llama-3.2-1B"
LAYOUTS = [
    layout("GPT-2", cp.Wiring.clt(N_LAYERS, AFTER)),
    layout("Llama", cp.Wiring.clt(N_LAYERS, BEFORE), model=LLAMA),
    layout("within each layer", cp.Wiring.plt(N_LAYERS, AFTER), across=False),
    layout("in shares", cp.Wiring.clt(N_LAYERS, AFTER), "rank0_clt_weights.safetensors", sharded=True),
]
