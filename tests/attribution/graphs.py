"""Small random graphs, and graphs drawn by hand: what the graph's own tests share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from clt_plugin.attribution.certificate import Certificate
from clt_plugin.attribution.graph import COLUMNS, Graph, GraphInfo

CHECKS = ("rows", "median row", "columns", "reconstruction", "layers", "embeddings", "norms", "run")
TOKENS = ("<bos>", "The", " capital", " of", " Texas", " is", " Austin", " and", " Dallas")


def make_certificate(**settings: Any) -> Certificate:
    """Return a certificate that holds."""
    made: dict[str, Any] = {
        "max_relative_residual": 3e-7,
        "median_relative_residual": 1e-8,
        "checked_residual": 3e-7,
        "worst": "0_1_1",
        "column_residual": math.nan,
        "columns": (),
        "reconstruction_residual": 1e-7,
        "embedding_residual": 0.0,
        "norm_residual": 1e-7,
        "run_residual": 1e-7,
        "tolerances": dict.fromkeys(CHECKS, 1e-5),
        "layer_residuals": (1e-8, 2e-8),
        "dtype": "float64",
        "model_dtype": "float32",
    }
    return Certificate(**{**made, **settings})


def make_info(n_layers: int, n_positions: int, **settings: Any) -> GraphInfo:
    """Return what is said of a graph over the first tokens of `TOKENS`, repeated where they run out."""
    tokens = tuple(TOKENS[i % len(TOKENS)] for i in range(n_positions))
    return GraphInfo("".join(tokens), tokens, tuple(10 + i for i in range(n_positions)), n_layers, **settings)


def node(kind: str, layer: int = -1, position: int = -1, **settings: Any) -> dict[str, Any]:
    """Return one row of the table of nodes, with the columns' empty values where nothing is given."""
    row: dict[str, Any] = {"id": "", "kind": kind, "layer": layer, "position": position, "feature": -1, "group": ""}
    row |= {"token": "", "token_id": -1, "activation": math.nan, "value": math.nan, "weight": 0.0, "omitted": math.nan}
    row |= settings
    ids = {
        "feature": f"{row['group']}_{row['feature']}_{position}",
        "error": f"{layer}_-1_{position}",
        "embedding": f"E_{row['token_id']}_{position}",
        "bias": "bias",
        "target": f"{layer + 1}_{row['token_id']}_{position}",
    }
    row["id"] = row["id"] or ids[kind]
    return row


def make_graph(
    seed: int = 0,
    n_layers: int = 3,
    n_positions: int = 4,
    *,
    n_features: int = 2,
    n_logits: int = 2,
    bias: bool = True,
    density: float = 1.0,
    omitted: float = 0.0,
    dtype: torch.dtype = torch.float64,
    **info: Any,
) -> Graph:
    """Make a random graph whose rows add up, with the nodes and the order that `attribute` gives.

    Args:
        seed: It fixes everything.
        n_layers: Of the model.
        n_positions: Of the prompt.
        n_features: Active features at each layer and position.
        n_logits: Targets; their weights are falling and add up to 0.9.
        bias: Whether there is a bias node.
        density: The share of possible edges that are not 0.
        omitted: The scale of the rows' sums from features left out.
        dtype: Of the adjacency.
        **info: Of `GraphInfo`, such as ``model_name``.
    """
    generator = torch.Generator().manual_seed(seed)
    about = make_info(n_layers, n_positions, **info)
    rows = []
    for layer in range(n_layers):
        for position in range(n_positions):
            latents = torch.randperm(100, generator=generator)[:n_features].sort().values.tolist()
            rows += [_placed(about, "feature", layer, position, feature=latent, group=str(layer)) for latent in latents]
    rows += [_placed(about, "error", layer, p) for layer in range(n_layers) for p in range(n_positions)]
    rows += [_placed(about, "embedding", -1, p) for p in range(n_positions)]
    rows += [node("bias")] if bias else []
    weights = [2.0 ** -(i + 1) for i in range(n_logits)]
    for i in range(n_logits):
        settings = {"token": f" word{i}", "token_id": 500 + i, "weight": 0.9 * weights[i] / sum(weights)}
        rows.append(node("target", n_layers, n_positions - 1, **settings))
    table = pd.DataFrame(rows)

    layer, position = (torch.tensor(table[name].to_numpy()) for name in ("layer", "position"))
    is_target = torch.tensor(table["kind"].isin(["feature", "target"]).to_numpy())
    is_source = torch.tensor((table["kind"] != "target").to_numpy())
    allowed = (layer[None] < layer[:, None]) & (position[None] <= position[:, None])
    allowed &= is_target[:, None] & is_source[None]
    size = (len(table), len(table))
    adjacency = torch.randn(size, generator=generator, dtype=torch.float64)
    kept = torch.rand(size, generator=generator) < density
    adjacency = torch.where(allowed & kept, adjacency, 0.0).to(dtype)

    left_out = torch.randn(len(table), generator=generator, dtype=torch.float64) * omitted
    table["omitted"] = left_out.where(is_target, math.nan).numpy()
    table["value"] = (adjacency.double().sum(1) + left_out).where(is_target, math.nan).numpy()
    table["activation"] = table["value"].abs().where(table["kind"] == "feature")
    return Graph(adjacency, table, make_certificate(), about)


def _placed(about: GraphInfo, kind: str, layer: int, position: int, **settings: Any) -> dict[str, Any]:
    return node(kind, layer, position, token=about.tokens[position], token_id=about.token_ids[position], **settings)


def drawn(rows: Sequence[dict[str, Any]], edges: Mapping[tuple[str, str], float], n_layers: int = 3) -> Graph:
    """Make a graph drawn by hand.

    Args:
        rows: Of `node`, in order.
        edges: {(id of the source, id of the target): weight}.
        n_layers: Of the model.
    """
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    place = {name: i for i, name in enumerate(table["id"])}
    adjacency = torch.zeros(len(table), len(table), dtype=torch.float64)
    for (source, target), weight in edges.items():
        adjacency[place[target], place[source]] = weight
    return Graph(adjacency, table, make_certificate(), make_info(n_layers, 4))
