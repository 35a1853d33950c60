"""What the benchmarks of attribution ask of circuit-tracer, in circuit-tracer's own environment.

    python circuit_tracer_graph_worker.py FOLDER [JOB ...]

FOLDER holds ``jobs.json``, {name: job}, ``hub/``, a cache with the models, and ``transcoders/``, with CLTs to be read
or, where a job says so, for those that are made here with random weights. Each job's graph goes to
``graphs/NAME.safetensors``; what it cost, and why it failed if it did, is printed as JSON. Nothing of ours is imported
here.
"""

from __future__ import annotations

import json
import sys
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from _measure import measured
from circuit_tracer import attribute
from circuit_tracer.replacement_model import ReplacementModel
from circuit_tracer.transcoder.cross_layer_transcoder import load_clt
from circuit_tracer_worker import make, write
from safetensors.torch import save_file
from transformer_lens import loading_from_pretrained
from transformers import AutoConfig

CPU = torch.device("cpu")
SIZES = {
    "d_model": "hidden_size",
    "d_head": "head_dim",
    "n_heads": "num_attention_heads",
    "n_key_value_heads": "num_key_value_heads",
    "d_mlp": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "d_vocab": "vocab_size",
    "n_ctx": "max_position_embeddings",
}
"""Of TransformerLens's config, and what transformers calls the same."""


def shrink() -> None:
    """Let TransformerLens take sizes from a model's own config, where its table has those of the real model."""
    of_the_real_one = loading_from_pretrained.convert_hf_model_config

    def convert(name: str, **settings: Any) -> dict[str, Any]:
        config, own = of_the_real_one(name, **settings), AutoConfig.from_pretrained(name)
        config |= {ours: getattr(own, key) for ours, key in SIZES.items() if config.get(ours) and hasattr(own, key)}
        if config.get("rotary_dim"):
            config["rotary_dim"] = config["d_head"]
        if config.get("attn_types"):
            config["attn_types"] = config["attn_types"][: config["n_layers"]]
        return config

    loading_from_pretrained.convert_hf_model_config = convert


def transcoders(job: dict[str, Any], folder: Path) -> Any:
    """Load a CLT that is there; else make what a job wants, and write it."""
    path = folder / "transcoders" / job["transcoders"]
    if job["kind"] == "saved CLT":
        return load_clt(str(path), *job["hooks"], device=CPU, dtype=torch.float32, lazy_decoder=False)
    torch.manual_seed(job["seed"])
    with torch.no_grad():
        made = make(job, job["shape"])
    if not path.exists():
        write(made, path, job["model"])
    return made


def run(job: dict[str, Any], folder: Path, path: Path) -> dict[str, float]:
    """Attribute a prompt; write the graph; return what the call cost."""
    model = ReplacementModel.from_pretrained_and_transcoders(
        job["model"], transcoders(job, folder), backend=job["backend"], device=CPU, dtype=torch.float32
    )
    tokens, settings = torch.tensor(job["tokens"]), {"batch_size": job["batch_size"]}
    if job["warm_up"]:
        attribute(tokens[: job["warm_up"]], model, **settings)
    graph, cost = measured(lambda: attribute(tokens, model, **settings))
    tensors = {
        "adjacency": graph.adjacency_matrix,
        "features": graph.active_features[graph.selected_features],
        "activations": graph.activation_values[graph.selected_features],
        "logits": graph.logit_token_ids,
        "tokens": graph.input_tokens,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.detach().contiguous() for key, value in tensors.items()}, path)
    return cost


def main() -> None:
    folder = Path(sys.argv[1])
    jobs = json.loads((folder / "jobs.json").read_text())
    shrink()
    told: dict[str, Any] = {"version": version("circuit-tracer"), "costs": {}, "failed": {}}
    for name in sys.argv[2:] or jobs:
        try:
            told["costs"][name] = run(jobs[name], folder, folder / "graphs" / f"{name}.safetensors")
        except Exception:  # the other tool's failure is a result, to be shown
            told["failed"][name] = traceback.format_exc()
    print("\n" + json.dumps(told))


if __name__ == "__main__":
    main()
