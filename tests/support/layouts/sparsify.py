"""sparsify's folders: TopK autoencoders and transcoders, of several ages, alone and in sets."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import clt_plugin as cp
from support.layouts import Layout, Oracle

D, F, K = 4, 9, 3
AGES = {
    "2024": {},
    "skip": {"skip_connection": True},
    "today": {"activation": "topk", "skip_connection": False, "transcode": False},
    "transcoder": {"activation": "topk", "skip_connection": False, "transcode": True},
    "skip transcoder": {"activation": "topk", "skip_connection": True, "transcode": True},
}
"""What configs say, by when they were written and what of."""


def config_of(age: str) -> dict[str, object]:
    usual = {"expansion_factor": 32, "normalize_decoder": True, "num_latents": F, "k": K, "multi_topk": False}
    return usual | AGES[age] | {"d_in": D}


def write_one(folder: Path, age: str) -> Oracle:
    folder.mkdir()
    config = config_of(age)
    tensors = {
        "encoder.weight": torch.randn(F, D),
        "encoder.bias": torch.randn(F),
        "W_dec": torch.randn(F, D),
        "b_dec": torch.randn(D),
    }
    if config.get("skip_connection"):
        tensors["W_skip"] = torch.randn(D, D)
    save_file(tensors, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))

    def oracle(x: list[Tensor]) -> list[Tensor]:
        centred = x[0] if config.get("transcode") else x[0] - tensors["b_dec"]
        pre = torch.nn.functional.linear(centred, tensors["encoder.weight"], tensors["encoder.bias"]).relu()
        values, indices = pre.topk(K, dim=-1)
        y = torch.einsum("tk,tkd->td", values, tensors["W_dec"][indices]) + tensors["b_dec"]
        if "W_skip" in tensors:
            y = y + x[0] @ tensors["W_skip"].mT
        return [y]

    return oracle


def write(folder: Path, age: str, hookpoints: list[str], run: dict[str, object] | None = None) -> Oracle:
    oracles = [write_one(folder / hookpoint, age) for hookpoint in hookpoints]
    if run is not None:
        (folder / "config.json").write_text(json.dumps(run))
        (folder / "optimizer_0.pt").write_bytes(b"not read")
        (folder / "logs").mkdir()
    return lambda x: [y for oracle, one in zip(oracles, x, strict=True) for y in oracle([one])]


NAME, SITES = "sparsify", ("mlp_in", "mlp_out_before_norm")


def transcoder(layer: int, skip: bool) -> cp.Wiring:
    read, write = (cp.Site("model", name, layer) for name in SITES)
    wiring = cp.Wiring(((read,),), ((write,),), name=f"plt(layer {layer})")
    return wiring.with_skips([(read, write)]) if skip else wiring


def autoencoders(n_layers: int, site: str) -> cp.Wiring:
    sites = tuple((cp.Site("model", site, layer),) for layer in range(n_layers))
    return cp.Wiring(sites, sites, name=f"sae({n_layers})")


MLPS = ["layers.0.mlp", "layers.1.mlp", "layers.2.mlp"]
MODEL = "HuggingFaceTB/SmolLM2-135M"
RUN = {"model": MODEL, "hookpoints": MLPS, "transcode": False}
ACTIVATION = f"TopK(k={K}, scope='group', score='activation')"
LAYOUTS = [
    Layout(
        "sparsify, skip transcoder of before f02711e", NAME,
        lambda folder: write(folder, "skip", ["layers.3.mlp"]),
        transcoder(3, True), ACTIVATION, cp.Host(), "layers.3.mlp/sae.safetensors", "layers.3.mlp",
    ),
    Layout(
        "sparsify, skip transcoder", NAME,
        lambda folder: write(folder, "skip transcoder", ["h.3.mlp"]),
        transcoder(3, True), ACTIVATION, cp.Host(), "h.3.mlp/sae.safetensors", "h.3.mlp",
    ),
    Layout(
        "sparsify, transcoder", NAME,
        lambda folder: write(folder, "transcoder", ["gpt_neox.layers.0.mlp"]),
        transcoder(0, False), ACTIVATION, cp.Host(), "gpt_neox.layers.0.mlp/sae.safetensors", "gpt_neox.layers.0.mlp",
    ),
    Layout(
        "sparsify, autoencoder of 2024", NAME,
        lambda folder: write(folder, "2024", ["layers.11"]),
        cp.Wiring.sae(11), ACTIVATION, cp.Host(), "layers.11/sae.safetensors", "layers.11",
    ),
    Layout(
        "sparsify, autoencoder of an MLP's output", NAME,
        lambda folder: write(folder, "today", ["layers.1.mlp"]),
        cp.Wiring.sae(("mlp_out_before_norm", 1)), ACTIVATION, cp.Host(), "layers.1.mlp/sae.safetensors",
        "layers.1.mlp",
    ),
    Layout(
        "sparsify, skip transcoders of every layer", NAME,
        lambda folder: write(folder, "skip", MLPS, RUN | {"transcode": True}),
        cp.Wiring.plt(3, *SITES).with_skips(), ACTIVATION, cp.Host(MODEL), "layers.1.mlp/sae.safetensors",
    ),
    Layout(
        "sparsify, autoencoders of every layer, as the run says", NAME,
        lambda folder: write(folder, "2024", MLPS, RUN),
        autoencoders(3, "mlp_out_before_norm"), ACTIVATION, cp.Host(MODEL), "layers.2.mlp/sae.safetensors",
    ),
    Layout(
        "sparsify, autoencoders named with a star", NAME,
        lambda folder: write(folder, "2024", ["layers.0", "layers.1"]),
        autoencoders(2, "resid_post"), ACTIVATION, cp.Host(), "layers.1/sae.safetensors", "layers.*",
    ),
]  # fmt: skip
