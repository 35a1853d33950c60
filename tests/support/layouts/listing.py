"""Listings of files in other folders: those of every kind that is listed, by their own formulas."""

from __future__ import annotations

from pathlib import Path

import clt_plugin as cp
from support.layouts import Layout, Oracle, gemma_scope_1, gemma_scope_2, transcoder_bundle

N_LAYERS = 3
NAME, JUMPRELU = "listing", "JumpReLU(bandwidth=0.001)"
HEAD = """\
model_name: {model}
feature_input_hook: {read}
feature_output_hook: {write}
"""


def list_files(folder: Path, entries: list[str], model: str, read: str, write: str, more: str = "") -> None:
    text = HEAD.format(model=model, read=read, write=write) + more + "transcoders:\n"
    (folder / "config.yaml").write_text(text + "".join(f"- {entry}\n" for entry in entries))


def write_npz(folder: Path) -> Oracle:
    paths = [f"layer_{layer}/width_16k/average_l0_{n}" for layer, n in enumerate((76, 65, 49))]
    entries = [f"{path}/params.npz" for path in paths]
    kind = "model_kind: transcoder_set\n"
    list_files(folder, entries, "google/gemma-2-2b", "ln2.hook_normalized", "hook_mlp_out", kind)
    return gemma_scope_1.write_set(folder, paths)


def write_gemma_scope_2(folder: Path) -> Oracle:
    entries = [f"layer_{layer}_width_16k_l0_small_affine/params.safetensors" for layer in range(N_LAYERS)]
    list_files(folder, entries, "google/gemma-3-4b-it", "mlp.hook_in", "hook_mlp_out")
    return gemma_scope_2.write_set(folder)


def write_clt(folder: Path) -> Oracle:
    """With the last entry twice, as published."""
    entries = [f"clt/params_layer_{layer}.safetensors" for layer in (*range(N_LAYERS), N_LAYERS - 1)]
    kind = "model_kind: cross_layer_transcoder\n"
    list_files(folder, entries, "google/gemma-3-270m", "mlp.hook_in", "hook_mlp_out", kind)
    return gemma_scope_2.write_sites(folder / "clt", "clt", gemma_scope_2.ALL, True, "google/gemma-3-270m-pt")


def write_mappings(folder: Path) -> Oracle:
    """The older form, in any order."""
    entries = [f"{{id: t{layer}, layer: {layer}, filepath: layer_{layer}.safetensors}}" for layer in (2, 0, 1)]
    oracle = transcoder_bundle.write(folder, "topk", skip=True)
    more = f"activation: topk\nk: {transcoder_bundle.K}\n"
    list_files(folder, entries, "meta-llama/Llama-3.2-1B", "hook_resid_mid", "mlp.hook_out", more)
    return oracle


PLT = cp.Wiring.plt(N_LAYERS)
OLD = cp.Wiring.plt(N_LAYERS, "resid_mid", "mlp_out_before_norm").with_skips()
LAYOUTS = [
    Layout(
        "listing of Gemma Scope 1", NAME, write_npz, cp.Wiring.plt(N_LAYERS, "mlp_in_before_gain"), JUMPRELU,
        cp.Host("google/gemma-2-2b", None, N_LAYERS, 1), "layer_1/width_16k/average_l0_65/params.npz",
    ),
    Layout(
        "listing of Gemma Scope 2", NAME, write_gemma_scope_2, PLT.with_skips(), JUMPRELU,
        cp.Host("google/gemma-3-4b-it", None, N_LAYERS, 1), "layer_1_width_16k_l0_small_affine/params.safetensors",
    ),
    Layout(
        "listing of a CLT", NAME, write_clt, cp.Wiring.clt(N_LAYERS).with_skips(), JUMPRELU,
        cp.Host("google/gemma-3-270m", None, N_LAYERS, 1), "clt/params_layer_1.safetensors",
    ),
    Layout(
        "listing by mappings", NAME, write_mappings, OLD, transcoder_bundle.TOPK,
        cp.Host("meta-llama/Llama-3.2-1B", None, N_LAYERS, 1), "layer_1.safetensors",
    ),
]  # fmt: skip
