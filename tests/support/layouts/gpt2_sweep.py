"""The GPT-2 sweep's CLTs, decoders by target, with and without skips."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import clt_plugin as cp
from support.layouts import Layout, Oracle

N_LAYERS, D = 3, 4
SIZES = (7, 5, 6)


def write(folder: Path, skip: bool) -> Oracle:
    encoders, decoders = [], []
    for i in range(N_LAYERS):
        encoders.append({"W_enc": torch.randn(SIZES[i], D), "b_enc": torch.randn(SIZES[i])})
        decoder = {f"W_dec_from_{s}": torch.randn(D, SIZES[s]) for s in range(i + 1)} | {"b_dec": torch.randn(D)}
        decoders.append(decoder | ({"W_skip": torch.randn(D, D)} if skip else {}))
        save_file(encoders[i], folder / f"encoder_layer_{i}.safetensors")
        save_file(decoders[i], folder / f"decoder_layer_{i}.safetensors")

    def oracle(x: list[Tensor]) -> list[Tensor]:
        acts = [(x[i] @ encoder["W_enc"].T + encoder["b_enc"]).relu() for i, encoder in enumerate(encoders)]
        y = []
        for t, decoder in enumerate(decoders):
            stacked = torch.cat([decoder[f"W_dec_from_{s}"].T for s in range(t + 1)])
            y.append(torch.cat(acts[: t + 1], dim=1) @ stacked + decoder["b_dec"])
            if skip:
                y[t] = y[t] + x[t] @ decoder["W_skip"].mT
        return y

    return oracle


WIRING = cp.Wiring.clt(N_LAYERS, read="resid_mid")
LAYOUTS = [
    Layout(
        "sparsecoder sweep", "sparsecoder-sweep", lambda folder: write(folder, False),
        WIRING, "ReLU()", cp.Host(n_layers=N_LAYERS), "decoder_layer_2.safetensors",
    ),
    Layout(
        "sparsecoder sweep, skips", "sparsecoder-sweep", lambda folder: write(folder, True),
        WIRING.with_skips(), "ReLU()", cp.Host(n_layers=N_LAYERS), "decoder_layer_1.safetensors",
    ),
    Layout(
        "sparsecoder sweep, its encoders", "sparsecoder-sweep", lambda folder: write(folder, True),
        WIRING.with_skips(), "ReLU()", cp.Host(n_layers=N_LAYERS), "encoder_layer_1.safetensors",
    ),
]  # fmt: skip
