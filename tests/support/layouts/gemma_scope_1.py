"""Gemma Scope 1: transcoders and autoencoders whose path alone tells what they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import clt_plugin as cp
from support.layouts import Layout, Oracle

D, F = 5, 7
NAME, JUMPRELU = "gemma-scope-1", "JumpReLU(bandwidth=0.001)"


def write(folder: Path, scaling: bool = False) -> Oracle:
    p = {
        "W_enc": torch.randn(D, F),
        "W_dec": torch.randn(F, D),
        "b_enc": torch.randn(F),
        "b_dec": torch.randn(D),
        "threshold": torch.rand(F) - 0.4,
    }
    folder.mkdir(parents=True, exist_ok=True)
    extra = {"scaling_factor": np.ones(F, np.float32)} if scaling else {}
    np.savez(folder / "params.npz", **{key: value.numpy() for key, value in p.items()}, **extra)

    def oracle(x: list[Tensor]) -> list[Tensor]:
        h = x[0] @ p["W_enc"] + p["b_enc"]
        return [((h > p["threshold"]) * torch.relu(h)) @ p["W_dec"] + p["b_dec"]]

    return oracle


def write_set(folder: Path, paths: list[str]) -> Oracle:
    layers = [write(folder / path) for path in paths]
    return lambda x: [layer([one])[0] for layer, one in zip(layers, x, strict=True)]


def layout(name: str, repository: str, layer: int, wiring: cp.Wiring, model: str, scaling: bool = False) -> Layout:
    below = f"{repository}/layer_{layer}/width_16k/average_l0_87"
    return Layout(
        f"Gemma Scope 1, {name}",
        NAME,
        lambda folder: write(folder / below, scaling),
        wiring,
        JUMPRELU,
        cp.Host(model, exclude_first=1),
        f"{below}/params.npz",
        reference=below.replace("87", "*"),
        optional_keys=frozenset(["scaling_factor"]),
    )


SETS = [f"gemma-scope-9b-it-transcoders/layer_{layer}/width_16k/average_l0_{n}" for layer, n in enumerate((76, 65, 49))]
READ, WRITE = (cp.Site("model", name, 5) for name in ("mlp_in_before_gain", "mlp_out"))
LAYOUTS = [
    layout(
        "transcoder", "gemma-scope-2b-pt-transcoders", 5,
        cp.Wiring(((READ,),), ((WRITE,),), name="plt(layer 5)"), "google/gemma-2-2b",
    ),
    layout("residual", "models--google--gemma-scope-9b-it-res", 20, cp.Wiring.sae(20), "google/gemma-2-9b-it"),
    layout("MLP", "gemma-scope-2b-pt-mlp", 20, cp.Wiring.sae(("mlp_out", 20)), "google/gemma-2-2b", scaling=True),
    Layout(
        "Gemma Scope 1, transcoders", NAME, lambda folder: write_set(folder, SETS),
        cp.Wiring.plt(3, read="mlp_in_before_gain"), JUMPRELU, cp.Host("google/gemma-2-9b-it", exclude_first=1),
        f"{SETS[1]}/params.npz", reference="gemma-scope-9b-it-transcoders/layer_*/width_16k/average_l0_*",
    ),
]  # fmt: skip
