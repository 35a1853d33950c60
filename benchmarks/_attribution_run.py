"""What benchmarks/attribution.py runs of ours, in a process of its own.

    python _attribution_run.py FOLDER JOB

FOLDER is as circuit-tracer's program in ``peers/`` has it. The job's graph goes to ``graphs/JOB.safetensors``; its
cost, and what it had to do, are printed as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from _circuit_tracer import snapshot
from peers._measure import measured
from safetensors.torch import save_file
from torch import Tensor

import clt_plugin as cp
from clt_plugin.demo import bundled

N_DEMO_TOKENS = 1024


def load(job: dict[str, Any], folder: Path) -> tuple[Any, cp.Crosscoder, Tensor]:
    """Load a job's model and CLT, in memory; return them and the prompt's tokens, (1, position)."""
    from transformers import AutoModelForCausalLM

    if job["model"] == bundled.NAME:
        prose = "\n\n".join(path.read_text() for path in sorted(bundled.ASSETS.parent.glob("corpus/prose/*.txt")))
        # The first of it is enough for a prompt, and the whole is slow to tokenize.
        tokens = bundled.load_tokenizer()(prose[: 16 * N_DEMO_TOKENS], return_tensors="pt").input_ids
        return bundled.load_model(), bundled.load_clt(), tokens[:, :N_DEMO_TOKENS]
    model = AutoModelForCausalLM.from_pretrained(snapshot(job["model"], folder / "hub")).eval()
    model.config.name_or_path = job["model"]
    clt = cp.load(folder / "transcoders" / job["transcoders"], lazy=False)
    return model.requires_grad_(False), clt, torch.tensor([job["tokens"]])


def flops(graph: Any, config: Any) -> float:
    """Return the operations that pushing every source needs.

    A source is carried through attention from the layer after its first write on, at its own position and later ones:
    through the value and output maps, and through the causal half of the pattern. Then each target takes one product of
    d_model with each source that can reach it, in an earlier layer and at no later position.

    Args:
        graph: The graph.
        config: The model's.
    """
    heads, n_layers, d = config.num_attention_heads, config.num_hidden_layers, config.hidden_size
    d_head = getattr(config, "head_dim", None) or d // heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    nodes, n = graph.nodes, len(graph.info.tokens)
    sources = nodes[nodes["kind"].isin(("feature", "error", "embedding"))]
    places = (n - sources["position"]).to_numpy().astype(float)  # -1 is the layer of embeddings
    steps = n_layers - 1 - sources["layer"].to_numpy()
    each = 2 * places * d * (kv + heads) * d_head + places * (places + 1) * heads * d_head
    total = float((steps * each).sum())
    # The number of sources by layer and position, then of those in earlier layers at no later positions.
    count = torch.zeros(n_layers + 1, n, dtype=torch.float64)
    at = [torch.tensor(sources[column].to_numpy()) for column in ("layer", "position")]
    count.index_put_((at[0] + 1, at[1]), torch.ones(len(sources), dtype=torch.float64), accumulate=True)
    reaching = count.cumsum(0).cumsum(1)
    features = nodes[nodes["kind"] == "feature"]
    pairs = reaching[torch.tensor(features["layer"].to_numpy()), torch.tensor(features["position"].to_numpy())].sum()
    pairs += int((nodes["kind"] == "target").sum()) * len(sources)
    return total + 2 * d * float(pairs)


def main() -> None:
    folder, name = Path(sys.argv[1]), sys.argv[2]
    job = json.loads((folder / "jobs.json").read_text())[name]
    model, clt, tokens = load(job, folder)
    settings = {"zero_bos": True, "bias_node": False, "max_feature_nodes": job.get("max_feature_nodes")}
    if job["warm_up"]:
        cp.attribute(model, tokens[:, : job["warm_up"]], clt=clt, **settings)
    graph, cost = measured(lambda: cp.attribute(model, tokens, clt=clt, **settings))
    path = folder / "graphs" / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"adjacency": graph.adjacency.contiguous()}, path, metadata={"ids": json.dumps(list(graph.nodes["id"]))})
    features = int((graph.nodes["kind"] == "feature").sum())
    print("\n" + json.dumps(cost | {"features": features, "nodes": len(graph), "flops": flops(graph, model.config)}))


if __name__ == "__main__":
    main()
