"""science-of-finetuning's crosscoders: with an L1 penalty and BatchTopK, by code normalisation, normalised or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import clt_plugin as cp
from support.layouts import Layout, Oracle

D, F, K, THRESHOLD = 4, 9, 3, 1.3
IDS = {"CROSSCODER": 1, "SAE": 2, "MIXED": 3, "NONE": 4}


def config_of(code: str | None, batchtopk: bool) -> dict[str, Any]:
    config: dict[str, Any] = {
        "activation_dim": D, "dict_size": F, "num_layers": 2, "same_init_for_all_layers": False,
        "norm_init_scale": None, "encoder_layers": None, "latent_processor": None, "num_decoder_layers": None,
    }  # fmt: skip
    if code:
        config |= {"code_normalization": code, "code_normalization_alpha_sae": 1.0, "code_normalization_alpha_cc": 0.1}
    return config | {"k": K} if batchtopk else config


def write(folder: Path, code: str | None, batchtopk: bool, buffers: str = "", trainer: bool = True) -> Oracle:
    """Write one; buffers are "" (before they were there), "nan" or "normalised"."""
    folder.mkdir(exist_ok=True)
    w = {
        "encoder.weight": torch.randn(2, D, F),
        "encoder.bias": torch.randn(F),
        "decoder.weight": torch.randn(2, F, D),
        "decoder.bias": torch.randn(2, D),
    }
    if code:
        w["code_normalization_id"] = torch.tensor(IDS[code])
    if batchtopk:
        w |= {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(THRESHOLD)}
    if buffers:
        nothing = torch.full((2, D), float("nan"))
        std = torch.rand(2, D) + 0.5
        w |= {"activation_mean": nothing, "activation_std": nothing.clone(), "target_rms": torch.tensor(3.0)}
        w["activation_global_scale"] = torch.ones(2)
        if buffers == "normalised":
            w |= {"activation_mean": torch.randn(2, D), "activation_std": std}
            w["activation_global_scale"] = 3 / (std.pow(2).sum(-1) + 1e-8).sqrt()
    save_file(w, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_of(code, batchtopk)))
    if trainer:
        kind = "BatchTopKCrossCoder" if batchtopk else "CrossCoder"
        said = {"dict_class": kind, "layer": 13, "lm_name": "google/gemma-2-2b-it-google/gemma-2-2b"}
        (folder / "trainer_config.json").write_text(json.dumps({"trainer": said}))
    return oracle_of(w, code, batchtopk, buffers == "normalised")


def oracle_of(w: dict[str, Tensor], code: str | None, batchtopk: bool, normalised: bool) -> Oracle:
    def oracle(inputs: list[Tensor]) -> list[Tensor]:
        x = torch.stack(inputs, dim=1)
        if normalised:
            mean, scale = w["activation_mean"], w["activation_global_scale"][:, None]
            x = (x - mean) * scale
        acts = (torch.einsum("tnd,ndf->tnf", x, w["encoder.weight"]).sum(1) + w["encoder.bias"]).relu()
        if batchtopk:
            each = w["decoder.weight"].norm(dim=2)
            joint = w["decoder.weight"].permute(1, 0, 2).reshape(F, -1).norm(dim=1)
            scores = {"SAE": joint, "MIXED": joint + 0.1 * each.sum(0), "NONE": torch.ones(F)}
            acts = acts * (acts * scores.get(code or "", each.sum(0)) > w["threshold"])
        y = torch.einsum("tf,nfd->tnd", acts, w["decoder.weight"]) + w["decoder.bias"]
        if normalised:
            y = y / (scale + 1e-8) + mean
        return [*y.transpose(0, 1)]

    return oracle


def layout(name: str, code: str | None, batchtopk: bool, buffers: str = "", **how: Any) -> Layout:
    return Layout(
        f"science-of-finetuning, {name}",
        "dictionary-learning-crosscoder",
        lambda folder: write(folder, code, batchtopk, buffers),
        cp.Wiring.model_diff(("base", "chat"), 13),
        f"BatchTopK(k={K}, scope='group', score='decoder_norm')" if batchtopk else "ReLU()",
        cp.Host(),
        "model.safetensors",
        optional_keys=frozenset(["k", "code_normalization_id", "target_rms"]),
        **how,
    )


LAYOUTS = [
    layout("L1, old", None, False),
    layout("L1, normalised", "CROSSCODER", False, "normalised"),
    layout("BatchTopK, old", None, True),
    *(layout(f"BatchTopK {code}", code, True, "nan") for code in IDS),
    *(layout(f"BatchTopK {code}, normalised", code, True, "normalised") for code in IDS),
]
