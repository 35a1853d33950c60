"""circuit-tracer's transcoders: ReLU, JumpReLU and its TopK, with and without skips, decoders either way round."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import clt_plugin as cp
from support.layouts import Layout, Oracle

N_LAYERS, D, F, K = 3, 5, 7, 4
NAME = "transcoder-bundle"
CONFIG = """\
model_name: Qwen/Qwen3-0.6B
model_kind: transcoder_set
feature_input_hook: mlp.hook_in
feature_output_hook: mlp.hook_out
"""
HOST = cp.Host("Qwen/Qwen3-0.6B", None, N_LAYERS, exclude_first=1)
WIRING = cp.Wiring.plt(N_LAYERS, write="mlp_out_before_norm")


def random_layer(activation: str, skip: bool) -> dict[str, Tensor]:
    p = {"W_enc": torch.randn(F, D), "W_dec": torch.randn(F, D), "b_enc": torch.randn(F), "b_dec": torch.randn(D)}
    if activation == "jumprelu":
        p["activation_function.threshold"] = torch.randn(F)  # negative ones let negative h through
    return p | ({"W_skip": torch.randn(D, D)} if skip else {})


def apply(p: dict[str, Tensor], activation: str, x: Tensor) -> Tensor:
    h = torch.nn.functional.linear(x, p["W_enc"], p["b_enc"])
    if activation == "jumprelu":
        acts = h * (h > p["activation_function.threshold"])
    elif activation == "topk":
        values, indices = torch.topk(h, K, dim=-1)  # of pre-activations: negative ones are kept
        acts = torch.zeros_like(h).scatter_(-1, indices, values)
    else:
        acts = torch.relu(h)
    y = acts @ p["W_dec"] + p["b_dec"]
    return y + x @ p["W_skip"].T if "W_skip" in p else y


def write(folder: Path, activation: str, skip: bool, turned: bool = False, stored_k: bool = False) -> Oracle:
    layers = [random_layer(activation, skip) for _ in range(N_LAYERS)]
    for i, p in enumerate(layers):
        stored = p | ({"W_dec": p["W_dec"].T.contiguous()} if turned else {})
        save_file(stored | ({"k": torch.tensor(K)} if stored_k else {}), folder / f"layer_{i}.safetensors")
    said = f"activation: topk\nk: {K}\n" if activation == "topk" and not stored_k else ""
    (folder / "config.yaml").write_text(CONFIG + said)
    return lambda x: [apply(p, activation, one) for p, one in zip(layers, x, strict=True)]


def layout(name: str, activation: str, shown: str, skip: bool = False, **how: bool) -> Layout:
    return Layout(
        f"transcoder bundle, {name}",
        NAME,
        lambda folder: write(folder, activation, skip, **how),
        WIRING.with_skips() if skip else WIRING,
        shown,
        HOST,
        "layer_1.safetensors",
    )


TOPK = f"TopK(k={K}, scope='group', score='activation', rectify=False)"
LAYOUTS = [
    layout("ReLU", "relu", "ReLU()"),
    layout("ReLU, decoders turned", "relu", "ReLU()", turned=True),
    layout("ReLU with skips", "relu", "ReLU()", skip=True),
    layout("JumpReLU", "jumprelu", "JumpReLU(bandwidth=0.001)"),
    layout("TopK", "topk", TOPK),
    layout("TopK with skips, k stored", "topk", TOPK, skip=True, stored_k=True),
]
