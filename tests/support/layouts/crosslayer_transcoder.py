"""crosslayer-transcoder: every nonlinearity, standardisers folded and stored, across layers and within each."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

import clt_plugin as cp
from support.layouts import Layout, Oracle

N_LAYERS, D, F, K = 3, 4, 7, 2
PACKAGE = "crosslayer_transcoder.model"


def part(module: str, name: str, **args: Any) -> dict[str, Any]:
    return {"class_path": f"{PACKAGE}.{module}.{name}", "init_args": args}


NONLINEARITIES = {
    "ReLU": part("jumprelu", "ReLU"),
    "JumpReLU": part("jumprelu", "JumpReLU", theta=0.03, bandwidth=0.01, n_layers=N_LAYERS, d_features=F),
    "PerLayerTopK": part("topk", "PerLayerTopK", k=K, e=None, n_layers=N_LAYERS),
    "BatchTopK": part("topk", "BatchTopK", k=K, e=0.01, n_layers=N_LAYERS),
    "PerLayerBatchTopK": part("topk", "PerLayerBatchTopK", k=K, e=0.01, n_layers=N_LAYERS),
}


def kept_by(nonlinearity: str) -> dict[str, Tensor]:
    if nonlinearity == "JumpReLU":
        # Some thresholds are negative, where only what is positive passes.
        return {"theta": torch.randn(1, N_LAYERS, F) * 0.5, "bandwidth": torch.tensor(0.01)}
    if nonlinearity == "BatchTopK":
        return {"threshold": torch.tensor([0.4])}
    return {"threshold": torch.tensor([0.3, -0.2, 0.6])} if nonlinearity == "PerLayerBatchTopK" else {}


def standardiser(kind: str | None) -> dict[str, Tensor]:
    shape = {"Dimensionwise": (N_LAYERS, D), "Layerwise": (N_LAYERS,)}.get(kind or "")
    return {} if shape is None else {"mean": torch.randn(shape), "std": torch.rand(shape) + 0.5}


def config(nonlinearity: str, kind: str | None, across: bool) -> dict[str, Any]:
    sizes = {"d_acts": D, "d_features": F, "n_layers": N_LAYERS}
    args = {"n_layers": N_LAYERS} | ({"activation_dim": D} if kind == "Dimensionwise" else {})
    return {
        "model": {
            "class_path": f"{PACKAGE}.clt.CrossLayerTranscoder",
            "init_args": {
                "encoder": part("clt", "Encoder", **sizes),
                "decoder": part("clt", "CrosslayerDecoder" if across else "Decoder", **sizes),
                "nonlinearity": NONLINEARITIES[nonlinearity],
                "input_standardizer": part("standardize", f"{kind}InputStandardizer", **args) if kind else None,
                "output_standardizer": part("standardize", f"{kind}OutputStandardizer", **args) if kind else None,
            },
            "is_folded": kind is None,
        }
    }


def write(folder: Path, nonlinearity: str, kind: str | None = None, across: bool = True) -> Oracle:
    state = {
        "encoder.W": torch.randn(N_LAYERS, D, F),
        "encoder.b": torch.randn(N_LAYERS, F),
        "decoder.b": torch.randn(N_LAYERS, D),
    }
    if across:
        state |= {f"decoder.W_{t}": torch.randn(t + 1, F, D) for t in range(N_LAYERS)}
    else:
        state["decoder.W"] = torch.randn(N_LAYERS, F, D)
    kept, inputs, outputs = kept_by(nonlinearity), standardiser(kind), standardiser(kind)
    for name, tensors in (("nonlinearity", kept), ("input_standardizer", inputs), ("output_standardizer", outputs)):
        state |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
    save_file(state, folder / "checkpoint.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump(config(nonlinearity, kind, across)))

    def activate(h: Tensor) -> Tensor:  # (tokens, layers, F)
        if nonlinearity == "JumpReLU":
            return h * (h > kept["theta"]) * (h > 0)
        if nonlinearity == "PerLayerTopK":
            values, indices = h.topk(K, dim=-1)
            return torch.zeros_like(h).scatter_(-1, indices, values.relu())
        threshold = kept.get("threshold", torch.zeros(1))
        return torch.where(h > threshold.clamp(min=0)[None, :, None], h, torch.zeros_like(h))

    def oracle(x: list[Tensor]) -> list[Tensor]:
        z = torch.stack(x, dim=1)
        layerwise = (slice(None), None) if kind == "Layerwise" else ()
        if kind:
            z = (z - inputs["mean"][layerwise]) / inputs["std"][layerwise]
        acts = activate(torch.einsum("bld,ldf->blf", z, state["encoder.W"]) + state["encoder.b"])
        if across:
            decoded = [torch.einsum("bsf,sfd->bd", acts[:, : t + 1], state[f"decoder.W_{t}"]) for t in range(N_LAYERS)]
            y = torch.stack(decoded, dim=1) + state["decoder.b"]
        else:
            y = torch.einsum("blf,lfd->bld", acts, state["decoder.W"]) + state["decoder.b"]
        if kind:
            y = y * outputs["std"][layerwise] + outputs["mean"][layerwise]
        return list(y.unbind(1))

    return oracle


def layout(variant: str, activation: str, across: bool = True, **settings: Any) -> Layout:
    wiring = (cp.Wiring.clt if across else cp.Wiring.plt)(N_LAYERS, read="resid_mid")
    return Layout(
        f"crosslayer-transcoder, {variant}", "crosslayer-transcoder", partial(write, across=across, **settings),
        wiring, activation, cp.Host(n_layers=N_LAYERS), "checkpoint.safetensors",
        optional_keys=frozenset(["nonlinearity.bandwidth"]), tolerance=1e-5,
    )  # fmt: skip


JUMP = "JumpReLU(bandwidth=0.01)"
PER_LAYER_K = "(k=2, scope='group', score='activation')"
LAYOUTS = [
    layout("ReLU", "ReLU()", nonlinearity="ReLU"),
    layout("JumpReLU", JUMP, nonlinearity="JumpReLU"),
    layout("top k of each layer", f"TopK{PER_LAYER_K}", nonlinearity="PerLayerTopK"),
    layout("one threshold", "BatchTopK(k=2, scope='joint', score='activation')", nonlinearity="BatchTopK"),
    layout("a threshold a layer", f"BatchTopK{PER_LAYER_K}", nonlinearity="PerLayerBatchTopK"),
    layout("dimensionwise", JUMP, nonlinearity="JumpReLU", kind="Dimensionwise"),
    layout("layerwise", "ReLU()", nonlinearity="ReLU", kind="Layerwise"),
    layout("within each layer", JUMP, across=False, nonlinearity="JumpReLU"),
    layout("within each layer, dimensionwise", "ReLU()", False, nonlinearity="ReLU", kind="Dimensionwise"),
]
