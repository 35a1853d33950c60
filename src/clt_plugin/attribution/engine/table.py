"""The table of a graph's nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from clt_plugin.attribution.engine.edges import Edges
from clt_plugin.attribution.engine.local import LocalReplacement
from clt_plugin.attribution.engine.resolve import Resolved
from clt_plugin.attribution.graph import COLUMNS, GraphError

_EMPTY: dict[type, Any] = {str: "", int: -1, float: np.nan}
_DTYPE: dict[type, Any] = {str: object, int: np.int64, float: np.float64}


def table_of(
    local: LocalReplacement, edges: Edges, targets: Sequence[Resolved], tokenizer: Any, bias: bool = True
) -> pd.DataFrame:
    """Return one row a node: the features kept, errors, embeddings, the bias, targets.

    Args:
        local: The local replacement model.
        edges: Which features were kept.
        targets: The targets.
        tokenizer: The model's, or None.
        bias: Whether the bias will be a node; otherwise what it does to others counts as omitted.
    """
    ids = local.inputs["input_ids"][0].tolist()
    texts = [str(i) if tokenizer is None else tokenizer.decode([i]) for i in ids]
    n, n_layers = len(ids), local.frozen.n_layers
    features, nodes = local.sources.features, edges.nodes
    groups = [features.labels[g] for g in features.group[nodes].tolist()]
    layers = [features.home[g] for g in features.group[nodes].tolist()]
    positions, latents = features.position[nodes].tolist(), features.latent[nodes].tolist()
    left_out = edges.omitted() if bias else edges.omitted() + edges.bias
    omitted = left_out.double().cpu().numpy()
    kinds = {"feature": len(nodes), "error": n_layers * n, "embedding": n, "bias": 1, "target": len(targets)}
    ends = dict(zip(kinds, np.cumsum(list(kinds.values())).tolist(), strict=True))
    where = {kind: slice(ends[kind] - size, ends[kind]) for kind, size in kinds.items()}
    table: dict[str, Any] = {name: np.full(ends["target"], _EMPTY[of], _DTYPE[of]) for name, of in COLUMNS.items()}
    table["kind"][:] = np.repeat(list(kinds), list(kinds.values()))
    table["weight"][:] = 0.0
    table["activation"][where["embedding"]] = 1.0
    columns: dict[str, dict[str, Any]] = {
        "feature": {
            "id": [f"{g}_{f}_{p}" for g, f, p in zip(groups, latents, positions, strict=True)],
            "layer": layers,
            "position": positions,
            "feature": latents,
            "group": groups,
            "activation": features.activation[nodes].cpu().numpy(),
            "value": features.pre_activation[nodes].cpu().numpy(),
            "omitted": omitted[: len(nodes)],
        },
        "error": {
            "id": [f"{layer}_-1_{p}" for layer in range(n_layers) for p in range(n)],
            "layer": np.repeat(np.arange(n_layers), n),
            "position": np.tile(np.arange(n), n_layers),
        },
        "embedding": {"id": [f"E_{i}_{p}" for p, i in enumerate(ids)], "position": np.arange(n)},
        "bias": {"id": ["bias"]},
        "target": {
            **{name: [one.node[name] for one in targets] for name in (targets[0].node if targets else ())},
            "omitted": omitted[len(nodes) :],
        },
    }
    for kind, values in columns.items():
        for name, value in values.items():
            table[name][where[kind]] = value
    placed = (table["kind"] != "target") & (table["position"] >= 0)
    table["token"][placed] = np.array(texts, dtype=object)[table["position"][placed]]
    table["token_id"][placed] = np.array(ids)[table["position"][placed]]
    _refuse_twice(table["id"])
    return pd.DataFrame(table)


def _refuse_twice(ids: Any) -> None:
    """Refuse two targets of one id: all other ids differ by what they are made of."""
    seen: set[str] = set()
    for one in ids:
        if one in seen:
            raise GraphError(f"two targets are the same, {one}: name each once, or give directions other names")
        seen.add(one)
