"""Gemma Scope 2: CLTs, crosscoders, transcoders and autoencoders, by the formula of its authors' notebooks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import clt_plugin as cp
from support.layouts import Layout, Oracle

N_LAYERS, D, F = 3, 5, 7
NAME, JUMPRELU = "gemma-scope-2", "JumpReLU(bandwidth=0.001)"
RESID = "model.layers.{%s}.output"
MLP = ("model.layers.%s.pre_feedforward_layernorm.output", "model.layers.%s.post_feedforward_layernorm.output")


def config(folder: Path, kind: str, hooks: tuple[str, str], width: int, affine: bool, model: str) -> None:
    values = {
        "hf_hook_point_in": hooks[0],
        "hf_hook_point_out": hooks[1],
        "width": width,
        "model_name": model,
        "architecture": "jump_relu",
        "l0": 10,
        "affine_connection": affine,
        "type": kind,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))


def random_tensors(n_sites: int | None, affine: bool, d: int = D, f: int = F) -> dict[str, Tensor]:
    """A file's tensors; some thresholds are negative, where relu(h) and h differ."""
    tensors = {
        "w_enc": torch.randn(d, f),
        "b_enc": torch.randn(f),
        "threshold": torch.rand(f) - 0.4,
        "w_dec": torch.randn(f, *((n_sites, d) if n_sites else (d,))),
        "b_dec": torch.randn(d),
    }
    return tensors | ({"affine_skip_connection": torch.randn(d, d)} if affine else {})


def activations(p: dict[str, Tensor], x: Tensor) -> Tensor:
    h = x @ p["w_enc"] + p["b_enc"]
    return torch.relu(h) * (h > p["threshold"])


def write_sites(folder: Path, kind: str, hooks: tuple[str, str], affine: bool, model: str) -> Oracle:
    """A CLT or crosscoder; before its source a decoder holds what training left there, next to nothing."""
    params = [random_tensors(N_LAYERS, affine) for _ in range(N_LAYERS)]
    for i, p in enumerate(params):
        p["w_dec"][:, :i] *= 1e-8
    config(folder, kind, hooks, N_LAYERS * F, affine, model)
    for i, p in enumerate(params):
        save_file(p, folder / f"params_layer_{i}.safetensors")
    stacked = {key: torch.stack([p[key] for p in params]) for key in params[0]}

    def oracle(x: list[Tensor]) -> list[Tensor]:
        acts = torch.stack([activations(p, x[i]) for i, p in enumerate(params)], dim=1)
        y = torch.einsum("tif,ifmd->tmd", acts, stacked["w_dec"]) + stacked["b_dec"]
        if affine:
            y = y + torch.einsum("tid,ide->tie", torch.stack(x, dim=1), stacked["affine_skip_connection"])
        return list(y.unbind(1))

    return oracle


def write_layer(folder: Path, kind: str, hooks: tuple[str, str], affine: bool, model: str) -> Oracle:
    p = random_tensors(None, affine)
    config(folder, kind, hooks, F, affine, model)
    save_file(p, folder / "params.safetensors")
    save_file({"tokens": torch.zeros(2, 3)}, folder / "examples.safetensors")

    def oracle(x: list[Tensor]) -> list[Tensor]:
        y = activations(p, x[0]) @ p["w_dec"] + p["b_dec"]
        return [y + x[0] @ p["affine_skip_connection"] if affine else y]

    return oracle


def write_set(folder: Path) -> Oracle:
    hooks = [(MLP[0] % layer, MLP[1] % layer) for layer in range(N_LAYERS)]
    places = [folder / f"layer_{layer}_width_16k_l0_small_affine" for layer in range(N_LAYERS)]
    layers = [
        write_layer(place, "transcoder", pair, True, "google/gemma-3-4b-it")
        for place, pair in zip(places, hooks, strict=True)
    ]
    return lambda x: [layer([one])[0] for layer, one in zip(layers, x, strict=True)]


def layout(
    name: str,
    kind: str,
    hooks: tuple[str, str],
    wiring: cp.Wiring,
    affine: bool = False,
    model: str = "google/gemma-3-1b-pt",
    host: str = "google/gemma-3-1b-pt",
) -> Layout:
    several = kind in ("clt", "crosscoder")
    write: Callable[..., Oracle] = write_sites if several else write_layer
    return Layout(
        f"Gemma Scope 2, {name}",
        NAME,
        lambda folder: write(folder, kind, hooks, affine, model),
        wiring.with_skips() if affine else wiring,
        JUMPRELU,
        cp.Host(host, None, N_LAYERS if kind == "clt" else None, exclude_first=1),
        "params_layer_1.safetensors" if several else "params.safetensors",
    )


ALL = (MLP[0] % "{all}", MLP[1] % "{all}")
CLT = cp.Wiring.clt(N_LAYERS)
THREE = (RESID % "5,9,12",) * 2
CROSSCODER = cp.Wiring.weakly_causal([5, 9, 12])
TRANSCODER = cp.Wiring(
    ((cp.Site("model", "mlp_in", 17),),), ((cp.Site("model", "mlp_out", 17),),), name="plt(layer 17)"
)
AT_17 = (MLP[0] % 17, MLP[1] % 17)
LAYOUTS = [
    layout("CLT", "clt", ALL, CLT),
    layout("affine CLT", "clt", ALL, CLT, True, "gemma-v3-270m-pt", "google/gemma-3-270m"),
    layout("crosscoder", "crosscoder", THREE, CROSSCODER, False, "gemma-3-1b-it", "google/gemma-3-1b-it"),
    layout("transcoder", "transcoder", AT_17, TRANSCODER, model="gemma-3-4b", host="google/gemma-3-4b-pt"),
    layout("affine transcoder", "transcoder", AT_17, TRANSCODER, True),
    *(
        layout(f"autoencoder at {module}", "sae", (f"model.layers.17.{module}",) * 2, cp.Wiring.sae((site, 17)))
        for module, site in [("output", "resid_post"), ("post_feedforward_layernorm.output", "mlp_out")]
    ),
    Layout(
        "Gemma Scope 2, transcoders", NAME, write_set, cp.Wiring.plt(N_LAYERS).with_skips(), JUMPRELU,
        cp.Host("google/gemma-3-4b-it", None, None, 1), "layer_1_width_16k_l0_small_affine/params.safetensors",
        reference="layer_*_width_16k_l0_small_affine",
    ),
]  # fmt: skip
