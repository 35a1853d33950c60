"""ckkissane's crosscoder between a base and a chat model: a pickle, over scaled activations."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from torch import Tensor

import clt_plugin as cp
from support.layouts import Layout, Oracle

D, F = 4, 7
CONFIG = {
    "seed": 49, "d_in": D, "dict_size": F, "seq_len": 1024, "enc_dtype": "fp32", "model_name": "gemma-2-2b",
    "site": "resid_pre", "device": "cuda:0", "dec_init_norm": 0.08, "hook_point": "blocks.14.hook_resid_pre",
}  # fmt: skip


def write(folder: Path) -> Oracle:
    # The suite takes warnings for errors, and this one comes whenever the layout is read.
    warnings.filterwarnings("ignore", message=".*input_scale is not stored")
    w = {
        "W_enc": torch.randn(2, D, F),
        "b_enc": torch.randn(F),
        "W_dec": torch.randn(F, 2, D),
        "b_dec": torch.randn(2, D),
    }
    torch.save(w, folder / "cc_weights.pt")
    (folder / "cfg.json").write_text(json.dumps(CONFIG))

    def oracle(z: list[Tensor]) -> list[Tensor]:
        acts = (torch.einsum("tnd,ndf->tf", torch.stack(z, dim=1), w["W_enc"]) + w["b_enc"]).relu()
        return [*(torch.einsum("tf,fnd->ntd", acts, w["W_dec"]) + w["b_dec"][:, None])]

    return oracle


LAYOUTS = [
    Layout(
        "ckkissane's crosscoder", "model-diff-crosscoder", write,
        cp.Wiring.model_diff(("base", "chat"), 14, "resid_pre"), "ReLU()", cp.Host(exclude_first=1), "cc_weights.pt",
    ),
]  # fmt: skip
