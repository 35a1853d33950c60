"""What the benchmarks beside circuit-tracer share: its environment, a Hub cache for it, and its graphs beside ours."""

from __future__ import annotations

import argparse
import math
import os
import subprocess
from pathlib import Path

import _peers
import torch
from _peers import PEERS
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

COMMIT = "0" * 40


def add_environment(parser: argparse.ArgumentParser) -> None:
    """Add the option that says where circuit-tracer is."""
    _peers.add_environment(parser, "circuit-tracer")


def environment(folder: Path, console: Console) -> Path:
    """Return the interpreter of circuit-tracer's environment, made if it is missing or of other versions."""
    return _peers.environment("circuit-tracer", folder, console)


def snapshot(name: str, hub: Path) -> Path:
    """Return where huggingface_hub puts the files of a repository, which it then finds there without a network."""
    repository = hub / f"models--{name.replace('/', '--')}"
    reference = repository / "refs" / "main"
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(COMMIT)
    return repository / "snapshots" / COMMIT


def ask(python: Path, worker: str, folder: Path, *arguments: str, **variables: str) -> str:
    """Let circuit-tracer do what a folder's ``jobs.json`` says, without the network.

    Args:
        python: The interpreter of its environment.
        worker: The program, one of those in ``peers/``.
        folder: What the program is told; ``hub/`` in it is the Hub's cache.
        arguments: What else it is told.
        variables: Of the process's environment.

    Returns:
        What the program printed.
    """
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "hub"), "PYTHONPATH": ""}
    command = [str(python), str(PEERS / worker), str(folder), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | offline | variables)
    if result.returncode:
        raise SystemExit(f"circuit-tracer failed:\n{result.stdout}{result.stderr}")
    return result.stdout


def theirs(path: Path, n_layers: int) -> tuple[list[str], Tensor]:
    """Return what circuit-tracer wrote in the same form."""
    graph = load_file(path)
    tokens, positions = graph["tokens"].tolist(), range(len(graph["tokens"]))
    ids = [f"{layer}_{latent}_{position}" for layer, position, latent in graph["features"].tolist()]
    ids += [f"{layer}_-1_{position}" for layer in range(n_layers) for position in positions]
    ids += [f"E_{tokens[position]}_{position}" for position in positions]
    ids += [f"{n_layers + 1}_{token}_{positions[-1]}" for token in graph["logits"].tolist()]
    return ids, graph["adjacency"]


def difference(our_graph: tuple[list[str], Tensor], their_graph: tuple[list[str], Tensor], factor: float = 1) -> float:
    """Return the largest difference between two graphs' edges, relative to the largest edge.

    Args:
        our_graph: The nodes' ids, and the edges (N, N).
        their_graph: The same; nodes may come in another order.
        factor: By which its edges from embeddings are too small.

    Returns:
        The difference; infinity where nodes differ or an edge is not a finite number.
    """
    (our_ids, edges), (their_ids, expected) = our_graph, their_graph
    if sorted(our_ids) != sorted(their_ids):
        return math.inf
    at = {name: place for place, name in enumerate(their_ids)}
    order = torch.tensor([at[name] for name in our_ids])
    expected = expected.double()[order][:, order]
    expected[:, [name.startswith("E_") for name in our_ids]] *= factor
    found = float((edges.double() - expected).abs().max() / expected.abs().max())
    return found if math.isfinite(found) else math.inf
