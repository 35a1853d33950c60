"""circuit-tracer's CLTs: ReLU, JumpReLU, and TopK over all layers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import clt_plugin as cp
from support.layouts import Layout, Oracle

N_LAYERS, D, F = 3, 4, 7
CONFIG = """\
model_name: google/gemma-2-2b
model_kind: cross_layer_transcoder
feature_input_hook: hook_resid_mid
feature_output_hook: hook_mlp_out
"""
HOST = cp.Host("google/gemma-2-2b", None, n_layers=N_LAYERS, exclude_first=1)
WIRING = cp.Wiring.clt(N_LAYERS, read="resid_mid")


def write(folder: Path, thresholds: bool) -> Oracle:
    encoders = [torch.randn(F, D) for _ in range(N_LAYERS)]
    decoders = [torch.randn(F, N_LAYERS - i, D) for i in range(N_LAYERS)]
    b_enc, b_dec, theta = torch.randn(N_LAYERS, F), torch.randn(N_LAYERS, D), torch.rand(N_LAYERS, F)
    for i in range(N_LAYERS):
        tensors = {f"W_enc_{i}": encoders[i], f"b_enc_{i}": b_enc[i].clone(), f"b_dec_{i}": b_dec[i].clone()}
        if thresholds:
            tensors[f"threshold_{i}"] = theta[i].clone()
        save_file(tensors, folder / f"W_enc_{i}.safetensors")
        save_file({f"W_dec_{i}": decoders[i]}, folder / f"W_dec_{i}.safetensors")
    (folder / "config.yaml").write_text(CONFIG)

    def oracle(x: list[Tensor]) -> list[Tensor]:
        y = [b_dec[w].expand(len(x[0]), D).clone() for w in range(N_LAYERS)]
        for i in range(N_LAYERS):
            h = x[i] @ encoders[i].T + b_enc[i]
            acts = h * (h > theta[i]) if thresholds else h.relu()
            for j in range(N_LAYERS - i):
                y[i + j] += acts @ decoders[i][:, j]
        return y

    return oracle


def write_topk(folder: Path, norms_apart: bool) -> Oracle:
    k = 2
    encoders = [torch.randn(F, D) for _ in range(N_LAYERS)]
    decoders = [torch.randn(F, N_LAYERS - i, D) for i in range(N_LAYERS)]
    norms = torch.rand(N_LAYERS, F) + 0.5  # not the decoders' own, so that one sees which are used
    for i in range(N_LAYERS):
        save_file({f"W_enc_{i}": encoders[i]}, folder / f"W_enc_{i}.safetensors")
        tensors = {f"W_dec_{i}": decoders[i], f"W_dec_norm_{i}": norms[i].clone()}
        save_file(tensors, folder / f"W_dec_{i}.safetensors")
    if norms_apart:
        save_file({"W_dec_norm": norms}, folder / "W_dec_norm.safetensors")
    save_file(
        {"resid_mid_l2": torch.rand(N_LAYERS), "mlp_out_l2": torch.rand(N_LAYERS)}, folder / "factors.safetensors"
    )
    (folder / "config.json").write_text(json.dumps({"base_model": "Qwen/Qwen3-8B-Base", "d_feature": F, "k": k}))

    def oracle(x: list[Tensor]) -> list[Tensor]:
        acts = torch.stack([(x[i] @ encoders[i].T).relu() for i in range(N_LAYERS)], dim=1)
        scores = (acts * norms).flatten(1)
        keep = torch.zeros_like(scores).scatter_(1, scores.topk(N_LAYERS * k).indices, 1.0)
        acts = acts * keep.reshape(acts.shape)
        y = [torch.zeros(len(x[0]), D) for _ in range(N_LAYERS)]
        for i in range(N_LAYERS):
            for j in range(N_LAYERS - i):
                y[i + j] += acts[:, i] @ decoders[i][:, j]
        return y

    return oracle


NAME = "circuit-tracer"
JOINT = "TopK(k=2, scope='joint', score='decoder_norm')"
QWEN = cp.Host("Qwen/Qwen3-8B-Base", None, N_LAYERS, 1)
LAYOUTS = [
    Layout(
        "circuit-tracer, ReLU", NAME, lambda folder: write(folder, False),
        WIRING, "ReLU()", HOST, "W_enc_1.safetensors",
    ),
    Layout(
        "circuit-tracer, JumpReLU", NAME, lambda folder: write(folder, True),
        WIRING, "JumpReLU(bandwidth=0.001)", HOST, "W_dec_0.safetensors",
    ),
    Layout(
        "cross-layer TopK", NAME, lambda folder: write_topk(folder, False),
        WIRING, JOINT, QWEN, "W_dec_1.safetensors",
    ),
    Layout(
        "cross-layer TopK, norms apart", NAME, lambda folder: write_topk(folder, True),
        WIRING, JOINT, QWEN, "W_dec_1.safetensors", optional_keys=frozenset(["W_dec_norm_1"]),
    ),
]  # fmt: skip
