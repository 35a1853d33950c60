"""Whether circuit-tracer's attribution graphs and ours are the same, edge by edge.

    python benchmarks/circuit_tracer_graphs.py

Installs circuit-tracer as benchmarks/circuit_tracer_format.py does. Small models of random weights, random norms and
biases too, go by the names of real ones and lie in a Hub cache, so that both of circuit-tracer's backends take them for
those. circuit-tracer makes random CLTs and sets of transcoders, with and without skips, writes them, and attributes a
prompt in its own environment. We read its files, attribute the same prompt to the same model with ``zero_bos=True``,
which is what circuit-tracer does at the first position, and compare every edge, in float32.

circuit-tracer lets an affine skip act at the first position, where its features and errors are 0. A set that we read
from its files has nothing act there (``host.exclude_first`` is 1), so it is set to 0 here, and ``zero_bos`` does the
rest.

One of its results is known to differ, and is shown to differ in that way alone: on its nnsight backend edges from
Gemma 3's token embeddings are too small by sqrt(d_model), since it takes embeddings before they are scaled and the
gradient of those after.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _circuit_tracer import add_environment, ask, difference, environment, snapshot, theirs
from _random_models import GEMMA_2, GEMMA_3, GPT_2, LLAMA, QWEN_3, make_model, save_model
from rich.console import Console
from rich.table import Table
from torch import Tensor

import clt_plugin as cp

WORKER = "circuit_tracer_graph_worker.py"
SIZES = {"n_layers": 4, "d_model": 32, "n_heads": 4, "vocabulary": 101, "context": 64}
N_LATENTS, N_TOKENS = 48, 9
TOLERANCE = 1e-5  # of the largest edge
BACKENDS = ("transformerlens", "nnsight")

RESIDUAL, MLP = ("hook_resid_mid", "hook_mlp_out"), ("mlp.hook_in", "mlp.hook_out")
GAINLESS = ("ln2.hook_normalized", "hook_mlp_out")
# Where transcoders of each family are published, or could be.
HOOKS = {
    LLAMA: (RESIDUAL, MLP),
    GEMMA_2: (RESIDUAL, GAINLESS),
    QWEN_3: (MLP,),
    GPT_2: (RESIDUAL, MLP),
    GEMMA_3: (RESIDUAL,),
}
KINDS = (("CLT", "ReLU", False), ("CLT", "JumpReLU", False), ("set", "ReLU", False), ("set", "JumpReLU", True))
WITHOUT_NNSIGHT = {GPT_2}  # circuit-tracer's nnsight backend has no mapping for it
UNSCALED = {(GEMMA_3, "nnsight")}


def jobs() -> dict[str, dict[str, Any]]:
    """Say what is attributed."""
    made: dict[str, dict[str, Any]] = {}
    tokens = [0, *torch.randint(2, SIZES["vocabulary"], (N_TOKENS - 1,)).tolist()]
    shape = (SIZES["n_layers"], SIZES["d_model"], N_LATENTS)
    common = {"tokens": tokens, "shape": shape, "stored": "float32", "seed": 2, "batch_size": 64, "warm_up": 0}
    for model, hooks in ((model, pair) for model, pairs in HOOKS.items() for pair in pairs):
        for kind, activation, skip in KINDS:
            name = f"{model}-{hooks[0]}-{kind}-{activation}{'-skip' * skip}".replace("/", "-")
            job = common | {"model": model, "hooks": hooks, "kind": kind, "activation": activation, "skip": skip}
            for backend in BACKENDS:
                if backend != "nnsight" or model not in WITHOUT_NNSIGHT:
                    made[f"{name}-{backend}"] = job | {"transcoders": name, "backend": backend}
    return made


def ours(job: dict[str, Any], model: Any, folder: Path) -> tuple[list[str], Tensor]:
    """Attribute the prompt; return the nodes' ids and the edges."""
    clt = cp.load(folder / "transcoders" / job["transcoders"])
    if job["skip"]:
        clt.host = replace(clt.host, exclude_first=0)
    graph = cp.attribute(model, torch.tensor([job["tokens"]]), clt=clt, zero_bos=True, bias_node=False)
    return list(graph.nodes["id"]), graph.adjacency


def compare(job: dict[str, Any], graph: tuple[list[str], Tensor], path: Path) -> tuple[tuple[str, ...], bool]:
    """Compare our graph with circuit-tracer's; return what the table shows of it, and whether they agree."""
    expected = theirs(path, SIZES["n_layers"])
    found, known = difference(graph, expected), (job["model"], job["backend"]) in UNSCALED
    agree = found <= TOLERANCE
    shown = "yes" if agree else "NO"
    if known:
        corrected = difference(graph, expected, factor=SIZES["d_model"] ** 0.5)
        # If it agreed as it is, the fault would be mended and this script out of date.
        agree = not agree and corrected <= TOLERANCE
        shown = f"{'embeddings x sqrt(d)' if agree else 'NO'}: {corrected:.1e}"
    what = f"{job['kind']}, {job['activation']}" + ", skips" * job["skip"]
    nodes, edges = len(graph[0]), int(graph[1].count_nonzero())
    row = (
        job["model"],
        what,
        " -> ".join(job["hooks"]),
        job["backend"],
        str(nodes),
        f"{edges:,}",
        f"{found:.1e}",
        shown,
    )
    return row, agree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_environment(parser)
    options = parser.parse_args()
    console = Console(width=170)
    python = environment(options.environment, console)
    torch.manual_seed(0)
    table = Table(caption="largest difference between two edges, relative to the largest edge")
    for column in ("model", "transcoders", "hooks", "backend", "nodes", "edges", "difference", "agree"):
        table.add_column(
            column, no_wrap=True, justify="right" if column in ("nodes", "edges", "difference") else "left"
        )
    agree = []
    with tempfile.TemporaryDirectory() as name:
        folder, todo = Path(name), jobs()
        models = {model: make_model(model, **SIZES) for model in HOOKS}
        for model, made in models.items():
            save_model(made, snapshot(model, folder / "hub"))
        (folder / "jobs.json").write_text(json.dumps(todo))
        told = json.loads(ask(python, WORKER, folder).splitlines()[-1])
        graphs: dict[str, tuple[list[str], Tensor]] = {}
        for label, job in todo.items():
            if label in told["failed"]:
                raise SystemExit(f"circuit-tracer failed at {label}:\n{told['failed'][label]}")
            if job["transcoders"] not in graphs:
                graphs[job["transcoders"]] = ours(job, models[job["model"]], folder)
            row, good = compare(job, graphs[job["transcoders"]], folder / "graphs" / f"{label}.safetensors")
            table.add_row(*row)
            agree.append(good)
    sizes = f"{SIZES['n_layers']} layers, d {SIZES['d_model']}, {N_LATENTS} latents a layer, {N_TOKENS} tokens"
    table.title = f"circuit-tracer {told['version']}: {sizes}"
    console.print(table)
    if not all(agree):
        raise SystemExit(f"{agree.count(False)} of {len(agree)} disagree")


if __name__ == "__main__":
    main()
