"""How fast attribution is, beside circuit-tracer on the same weights, beside its own floor, and within a node budget.

    python benchmarks/attribution.py
    python benchmarks/attribution.py --layers 12 --width 1024 --features 2713 --tokens 16
    python benchmarks/attribution.py --growth
    python benchmarks/attribution.py --budget

The first two install circuit-tracer as benchmarks/circuit_tracer_graphs.py does. A Llama-shaped model of random
weights, and a random CLT that reads the residual stream, with thresholds such that the wanted number of features is
active on one prompt, lie in files that both tools load into memory. The two attribute all features of that prompt in
turn, each time in a fresh process and after a short prompt to warm up: circuit-tracer on its TransformerLens backend at
several batch sizes, 512 being its default; we as it does, with ``zero_bos=True`` and without a bias node, but with our
certificate. Shown are medians of CPU seconds, of all threads, and of how far resident memory grew during the call,
beyond the weights. Edges must be equal to 1e-5 of the largest.

``--growth`` varies the length of the prompt and the number of layers, and shows CPU seconds against active features,
beside the floor: the operations that pushing every source through the frozen map needs, counted from the graph, at the
rate that a large matrix product reaches here. ``--budget`` attributes 1,024 tokens of the bundled model's corpus with
4,096 feature nodes at most; the whole process must stay within 4 GB.

CPU time hardly depends on what else runs, wall time does. ``--repeats 1 --tokens 8 --features 200`` is a quick trial.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _circuit_tracer import add_environment, ask, difference, environment, snapshot, theirs
from _random_models import LLAMA, make_model, save_model
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

import clt_plugin as cp
from clt_plugin.demo import bundled

WORKER, OURS = "circuit_tracer_graph_worker.py", Path(__file__).parent / "_attribution_run.py"
HOOKS = ("hook_resid_mid", "hook_mlp_out")
VOCABULARY, D_HEAD, WARM_UP, TOLERANCE = 512, 64, 3, 1e-5
DEFAULT_BATCH, LEAN_BATCH = 512, 32
GROWTH_TOKENS, GROWTH_LAYERS = (16, 32, 64, 128, 256), (2, 4, 6, 8, 12)
MEMORY = 4e9


@torch.no_grad()
def make_clt(model: Any, tokens: torch.Tensor, n_latents: int, n_features: int) -> cp.Crosscoder:
    """Make a random CLT of which a number of features is active on a prompt, the same in every layer.

    Args:
        model: A Llama-shaped model.
        tokens: The prompt, (1, position).
        n_latents: In each layer.
        n_features: How many are to be active, the first position left out.
    """
    n_layers, d = model.config.num_hidden_layers, model.config.hidden_size
    reads: list[torch.Tensor] = []
    norms = [block.post_attention_layernorm for block in model.model.layers]
    hooks = [norm.register_forward_pre_hook(lambda _, inputs: reads.append(inputs[0][0])) for norm in norms]
    model(tokens)
    for hook in hooks:
        hook.remove()
    host = cp.Host(model.config.name_or_path, n_layers=n_layers, exclude_first=1)
    clt = cp.Crosscoder(cp.Wiring.clt(n_layers, "resid_mid", "mlp_out"), d, n_latents, "jumprelu", host=host)
    for name, parameter in clt.named_parameters():
        scale = {"W_enc": d**-0.5, "W_dec": 0.1 * d**-0.5}.get(name.partition(".")[0], 0.1)
        parameter.data.normal_(std=scale)
    for layer, x in enumerate(reads):
        h = clt.pre_activations(layer, x[1:]).flatten().sort(descending=True).values
        count = n_features * (layer + 1) // n_layers - n_features * layer // n_layers
        clt.threshold[layer].data.fill_(float(h[count - 1 : count + 1].mean()))
    return clt.eval()


def prepare(folder: Path, name: str, sizes: dict[str, int]) -> dict[str, Any]:
    """Write a model and a CLT; return the job that uses them.

    Args:
        folder: For both tools.
        name: Of the CLT.
        sizes: ``layers``, ``width``, ``latents``, ``tokens`` and ``features``.
    """
    torch.manual_seed(0)
    shape = {"n_layers": sizes["layers"], "d_model": sizes["width"], "n_heads": max(2, sizes["width"] // D_HEAD)}
    model = make_model(LLAMA, **shape, vocabulary=VOCABULARY, context=max(64, sizes["tokens"]))
    save_model(model, snapshot(LLAMA, folder / "hub"))
    tokens = [0, *torch.randint(2, VOCABULARY, (sizes["tokens"] - 1,)).tolist()]
    clt = make_clt(model, torch.tensor([tokens]), sizes["latents"], sizes["features"])
    clt.save(folder / "transcoders" / name, format="circuit-tracer")
    return {"model": LLAMA, "hooks": HOOKS, "kind": "saved CLT", "transcoders": name, "tokens": tokens} | {
        "backend": "transformerlens",
        "warm_up": WARM_UP,
    }


def run_ours(folder: Path, name: str, threads: dict[str, str]) -> dict[str, float]:
    """Run one of our jobs; return its cost."""
    command = [sys.executable, str(OURS), str(folder), name]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
    if result.returncode:
        raise SystemExit(f"{name} failed:\n{result.stdout}{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def run_theirs(python: Path, folder: Path, name: str, threads: dict[str, str]) -> dict[str, float]:
    """Run one of circuit-tracer's."""
    told = json.loads(ask(python, WORKER, folder, name, **threads).splitlines()[-1])
    if told["failed"]:
        raise SystemExit(f"circuit-tracer failed:\n{told['failed'][name]}")
    return told["costs"][name]


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each number."""
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def beside(options: argparse.Namespace, folder: Path, console: Console, threads: dict[str, str]) -> None:
    """Compare with circuit-tracer."""
    python = environment(options.environment, console)
    sizes = {key: getattr(options, key) for key in ("layers", "width", "latents", "tokens", "features")}
    job = prepare(folder, "clt", sizes)
    names = {batch: f"batch-{batch}" for batch in sorted({*options.batches, LEAN_BATCH, DEFAULT_BATCH})}
    jobs = {name: job | {"batch_size": batch} for batch, name in names.items()} | {"ours": job}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in jobs}
    for _ in range(options.repeats):
        for name, kept in runs.items():
            kept.append(
                run_ours(folder, name, threads) if name == "ours" else run_theirs(python, folder, name, threads)
            )
    costs = {name: medians(kept) for name, kept in runs.items()}
    with safe_open(folder / "graphs" / "ours.safetensors", "pt") as file:
        graph = json.loads(file.metadata()["ids"]), file.get_tensor("adjacency")
    apart = max(
        difference(graph, theirs(folder / "graphs" / f"{name}.safetensors", sizes["layers"])) for name in names.values()
    )
    ours = costs["ours"]
    table = Table(
        title=f"{sizes['layers']} layers, d {sizes['width']:,}, {sizes['latents']:,} latents a layer, "
        f"{ours['features']:,.0f} active features, {sizes['tokens']} tokens, {options.threads} thread(s)"
    )
    for column in ("", "CPU s", "wall s", "peak MiB", "CPU, ours = 1", "memory, ours = 1"):
        table.add_column(column, justify="right" if column else "left")
    for name, cost in costs.items():
        label = "ours" if name == "ours" else f"circuit-tracer, batch {name.partition('-')[2]}"
        ratios = (f"{cost[key] / ours[key]:.1f}" for key in ("cpu", "peak"))
        table.add_row(label, f"{cost['cpu']:.2f}", f"{cost['wall']:.2f}", f"{cost['peak'] / 2**20:,.0f}", *ratios)
    console.print(table)
    best = min(names.values(), key=lambda name: costs[name]["cpu"])
    console.print(
        f"CPU time: {costs[best]['cpu'] / ours['cpu']:.1f} times ours at its best ({best}), "
        f"{costs[names[DEFAULT_BATCH]]['cpu'] / ours['cpu']:.1f} times at its default; memory: "
        f"{costs[names[LEAN_BATCH]]['peak'] / ours['peak']:.1f} times ours at batch {LEAN_BATCH}; "
        f"largest difference between two edges: {apart:.1e} of the largest edge"
    )
    if not apart <= TOLERANCE:
        raise SystemExit("the graphs differ")


def peak_rate(threads: int) -> float:
    """Return the operations a CPU second that a large matrix product reaches."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    a, b, rates = torch.randn(2048, 2048), torch.randn(2048, 2048), []
    for _ in range(6):
        start = time.process_time()
        a @ b
        rates.append(2 * 2048**3 / (time.process_time() - start))
    torch.set_num_threads(before)
    return max(rates)


def growth(options: argparse.Namespace, folder: Path, console: Console, threads: dict[str, str]) -> None:
    """Show how cost grows."""
    each = options.features / (options.layers * (options.tokens - 1))
    shapes = [(options.layers, tokens) for tokens in GROWTH_TOKENS if tokens <= options.longest]
    shapes += [(layers, options.tokens) for layers in GROWTH_LAYERS]
    rate = peak_rate(options.threads)
    table = Table(
        title=f"d {options.width:,}, {options.latents:,} latents a layer, {each:.1f} active for each token; "
        f"{rate / 1e9:.0f} GFLOP/s; {options.threads} thread(s)"
    )
    for column in ("layers", "tokens", "features", "GFLOP", "floor s", "CPU s", "CPU / floor", "peak MiB", "graph MiB"):
        table.add_column(column, justify="right")
    for layers, tokens in dict.fromkeys(shapes):
        features = round(each * layers * (tokens - 1))
        sizes = {"layers": layers, "tokens": tokens, "features": features}
        name = f"{layers}-{tokens}"
        job = prepare(folder, name, sizes | {"width": options.width, "latents": options.latents})
        (folder / "jobs.json").write_text(json.dumps({name: job}))
        cost = medians([run_ours(folder, name, threads) for _ in range(options.repeats)])
        floor = cost["flops"] / rate
        table.add_row(
            str(layers), str(tokens), f"{cost['features']:,.0f}", f"{cost['flops'] / 1e9:,.1f}", f"{floor:.2f}",
            f"{cost['cpu']:.2f}", f"{cost['cpu'] / floor:.1f}", f"{cost['peak'] / 2**20:,.0f}",
            f"{4 * cost['nodes'] ** 2 / 2**20:,.0f}",
        )  # fmt: skip
    console.print(table)


def budget(options: argparse.Namespace, folder: Path, console: Console, threads: dict[str, str]) -> None:
    """Show what a long prompt costs within a node budget."""
    job = {"model": bundled.NAME, "warm_up": 0, "max_feature_nodes": options.nodes}
    (folder / "jobs.json").write_text(json.dumps({"budget": job}))
    cost = medians([run_ours(folder, "budget", threads) for _ in range(options.repeats)])
    console.print(
        f"1,024 tokens, {cost['features']:,.0f} feature nodes of at most {options.nodes:,}: {cost['cpu']:.1f} CPU s, "
        f"{cost['wall']:.1f} s, the call grew memory by {cost['peak'] / 1e9:.2f} GB, to {cost['total'] / 1e9:.2f} GB"
    )
    if cost["total"] > MEMORY:
        raise SystemExit(f"that is more than {MEMORY / 1e9:.0f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_environment(parser)
    parser.add_argument("--growth", action="store_true", help="ours alone, over lengths and depths")
    parser.add_argument("--budget", action="store_true", help="ours alone, a long prompt with a node budget")
    for name, value in {"layers": 6, "width": 256, "latents": 4096, "tokens": 32, "features": 2612}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--batches", type=int, nargs="*", default=[32, 64, 128, 256, 512], help="of circuit-tracer")
    parser.add_argument("--longest", type=int, default=max(GROWTH_TOKENS), help="the longest prompt of --growth")
    parser.add_argument("--nodes", type=int, default=4096, help="max_feature_nodes of --budget")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to write, and remove again; by default a temporary folder")
    options = parser.parse_args()
    console = Console(width=140)
    threads = {name: str(options.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        show = growth if options.growth else budget if options.budget else beside
        show(options, Path(name), console, threads)


if __name__ == "__main__":
    main()
