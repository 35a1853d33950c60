"""What the pages speak of, for the stand-in Hub: tiny crosscoders under the published names, in the published layouts.

Where a page attaches one to a model, a tiny model of that family is there too, under its name, of the same width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

import clt_plugin as cp
from support.layouts import (
    circuit_tracer,
    clt_forge,
    clt_training,
    crosslayer_coding,
    crosslayer_transcoder,
    dictionary_learning,
    gemma_scope_1,
    gemma_scope_2,
    gpt2_sweep,
    listing,
    model_diff_pickle,
    saelens,
    sparsify,
    transcoder_bundle,
)
from support.models import ARCHITECTURES, CONFIGS, D_MODEL, make_tokenizer

F = 16


def model(family: str, n_layers: int) -> Callable[[Path], object]:
    """Return what writes a tiny model of a family, and its tokenizer."""

    def write(folder: Path) -> None:
        small = CONFIGS[family]()
        settings = {"num_hidden_layers": n_layers, "layer_types": None, "architectures": [ARCHITECTURES[family]]}
        config = type(small)(**small.to_dict() | settings)
        getattr(transformers, ARCHITECTURES[family])(config).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)

    return write


def circuit_tracer_clt(name: str, n_layers: int, activation: str = "relu") -> Callable[[Path], object]:
    host = cp.Host(name, None, n_layers, 1)
    clt = cp.Crosscoder(cp.Wiring.clt(n_layers, read="resid_mid"), D_MODEL, F, activation, host=host)
    return lambda folder: clt.save(folder, format="circuit-tracer", overwrite=True)


def gemma_scope_2_sites(
    kind: str, hooks: tuple[str, str], n_sites: int, name: str, affine: bool = False
) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        gemma_scope_2.config(folder, kind, hooks, n_sites * F, affine, name)
        for i in range(n_sites):
            tensors = gemma_scope_2.random_tensors(n_sites, affine, D_MODEL, F)
            tensors["w_dec"][:, :i] = 0
            save_file(tensors, folder / f"params_layer_{i}.safetensors")

    return write


def gemma_scope_2_layer(kind: str, layer: int, name: str, affine: bool = False) -> Callable[[Path], object]:
    place = {
        "sae": (f"model.layers.{layer}.output",) * 2,
        "transcoder": tuple(hook % layer for hook in gemma_scope_2.MLP),
    }
    return lambda folder: gemma_scope_2.write_layer(folder, kind, place[kind], affine, name)  # type: ignore[arg-type]


def bundle(name: str, read: str, write: str, n_layers: int, activation: str = "relu", skip: bool = False, config=True):
    def write_files(folder: Path) -> None:
        for layer in range(n_layers):
            save_file(transcoder_bundle.random_layer(activation, skip), folder / f"layer_{layer}.safetensors")
        if config:
            hooks = f"feature_input_hook: {read}\nfeature_output_hook: {write}\n"
            (folder / "config.yaml").write_text(f"model_name: {name}\nmodel_kind: transcoder_set\n{hooks}")

    return write_files


def gemma_scope_1_listing(folder: Path) -> None:
    entries = [f"hf://google/gemma-scope-2b-pt-transcoders/{path}/params.npz" for path in GEMMA_SCOPE_1]
    kind = "model_kind: transcoder_set\n"
    listing.list_files(folder, entries, "google/gemma-2-2b", "ln2.hook_normalized", "hook_mlp_out", kind)


L0 = [76, 65, 49, 54, 88, 87, 95, 70, 52, 72, 88, 5, 6, *range(13, 26)]
GEMMA_SCOPE_1 = [f"layer_{layer}/width_16k/average_l0_{l0}" for layer, l0 in enumerate(L0)]
GEMMA_3 = "google/gemma-scope-2-270m-pt"
ONE_B = "google/gemma-3-1b-pt"
SWEPT = "resid_post/layer_12_width_16k_l0_medium"
SAE_V3 = saelens.v3(hook_name="blocks.8.hook_resid_pre", hook_layer=8)
PUBLISHED: dict[tuple[str, str], Callable[[Path], object]] = {
    ("google/gemma-2-2b", ""): model("gemma2", 26),
    ("google/gemma-3-270m", ""): model("gemma3", 18),
    ("mntss/clt-gemma-2-2b-426k", ""): circuit_tracer_clt("google/gemma-2-2b", 26),
    ("mntss/clt-llama-3.2-1b-524k", ""): circuit_tracer_clt("meta-llama/Llama-3.2-1B", 16, "jumprelu"),
    ("ByteDance-Seed/Cross-Layer-TopK-CLT", ""): lambda folder: circuit_tracer.write_topk(folder, norms_apart=True),
    ("google/gemma-scope-2b-pt-transcoders", ""): lambda folder: gemma_scope_1.write_set(folder, GEMMA_SCOPE_1),
    ("mntss/gemma-scope-transcoders", ""): gemma_scope_1_listing,
    (GEMMA_3, "clt/width_262k_l0_medium"): gemma_scope_2_sites("clt", gemma_scope_2.ALL, 18, "google/gemma-3-270m-pt"),
    (GEMMA_3, "clt/width_262k_l0_medium_affine"): gemma_scope_2_sites(
        "clt", gemma_scope_2.ALL, 18, "google/gemma-3-270m-pt", affine=True
    ),
    (GEMMA_3, "crosscoder/layer_5_9_12_15_width_65k_l0_medium"): gemma_scope_2_sites(
        "crosscoder", (gemma_scope_2.RESID % "5,9,12,15",) * 2, 4, "google/gemma-3-270m-pt"
    ),
    ("google/gemma-scope-2-1b-pt", SWEPT): gemma_scope_2_layer("sae", 12, ONE_B),
    **{
        ("google/gemma-scope-2-1b-pt", f"transcoder_all/layer_{layer}_width_16k_l0_small{suffix}"): (
            gemma_scope_2_layer("transcoder", layer, ONE_B, affine=bool(suffix))
        )
        for layer in range(26)
        for suffix in ("", "_affine")
    },
    ("mntss/transcoder-Llama-3.2-1B", ""): bundle(
        "meta-llama/Llama-3.2-1B", "hook_resid_mid", "hook_mlp_out", 16, skip=True
    ),
    ("mwhanna/qwen3-4b-transcoders", ""): bundle("Qwen/Qwen3-4B", "mlp.hook_in", "hook_mlp_out", 36),
    ("facebook/crv-8b-instruct-transcoders", ""): bundle("", "", "", 32, "topk", config=False),
    ("EleutherAI/skip-transcoder-Llama-3.2-1B-131k", ""): lambda folder: sparsify.write(
        folder, "skip", [f"layers.{layer}.mlp" for layer in range(16)]
    ),
    ("jbloom/GPT2-Small-SAEs-Reformatted", "blocks.8.hook_resid_pre"): lambda folder: saelens.write(
        folder, SAE_V3, saelens.relu
    ),
    ("georglange/crosslayer-transcoder-topk-16k", ""): lambda folder: crosslayer_transcoder.write(
        folder, "PerLayerTopK"
    ),
    ("ctigges/gpt2-clts", ""): lambda folder: crosslayer_coding.write(
        folder, True, decoder_tying="per_target", skip_connection=True, normalization_method="mean_std"
    ),
    ("our-group/clt-forge-gpt2", ""): clt_forge.write,
    ("EleutherAI/llama1b-clt-none-ef64-k16", ""): lambda folder: clt_training.write(
        folder, "layers", ("layers.*.post_attention_layernorm",), span=clt_training.N_LAYERS
    ),
    ("mntss/sparsecoder-sweep-gpt2", ""): lambda folder: gpt2_sweep.write(folder, skip=False),
    ("ckkissane/crosscoder-gemma-2-2b-model-diff", "blocks.14.hook_resid_pre"): model_diff_pickle.write,
    ("science-of-finetuning/gemma-2-2b-L13-k100-lr1e-04-local-shuffling-CCLoss", ""): (
        lambda folder: dictionary_learning.write(folder, "CROSSCODER", batchtopk=True)
    ),
}
"""{(repository, folder in it): what writes it}."""

RENAMED = {"ctigges/gpt2-clts": ("tied/", "tied_per_target_skip_global_batchtopk_jumprelu/")}
TAGS = {"mntss/sparsecoder-sweep-gpt2": "clt-relu-sp8"}


def publish(server, aside: Path) -> None:
    """Put everything on a stand-in Hub."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(0)
        for (repo, below), write in PUBLISHED.items():
            folder = aside / repo / below
            folder.mkdir(parents=True, exist_ok=True)
            write(folder)
    for repo in dict.fromkeys(repo for repo, _ in PUBLISHED):
        files = {str(path.relative_to(aside / repo)): path for path in (aside / repo).rglob("*") if path.is_file()}
        old, new = RENAMED.get(repo, ("", ""))
        commit = server.add(repo, {name.replace(old, new, 1): path for name, path in files.items()})
        if repo in TAGS:
            server.tag(repo, TAGS[repo], commit)
