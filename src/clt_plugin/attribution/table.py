"""The table of a graph's nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from clt_plugin.attribution.edges import Edges
from clt_plugin.attribution.graph import COLUMNS, GraphError
from clt_plugin.attribution.local import LocalReplacement
from clt_plugin.attribution.resolve import Resolved

_EMPTY: dict[type, Any] = {str: "", int: -1, float: np.nan}


def table_of(local: LocalReplacement, edges: Edges, targets: Sequence[Resolved], tokenizer: Any) -> pd.DataFrame:
    """Return one row a node: the features kept, errors, embeddings, the bias, targets.

    Args:
        local: The local replacement model.
        edges: Which features were kept.
        targets: The targets.
        tokenizer: The model's, or None.
    """
    ids = local.inputs["input_ids"][0].tolist()
    texts = [str(i) if tokenizer is None else tokenizer.decode([i]) for i in ids]
    n, n_layers = len(ids), local.frozen.n_layers
    features, nodes = local.sources.features, edges.nodes
    groups = [features.labels[g] for g in features.group[nodes].tolist()]
    layers = [features.home[g] for g in features.group[nodes].tolist()]
    positions, latents = features.position[nodes].tolist(), features.latent[nodes].tolist()
    omitted = edges.omitted().cpu().tolist()
    parts = [
        _part(
            "feature",
            len(nodes),
            id=[f"{g}_{f}_{p}" for g, f, p in zip(groups, latents, positions, strict=True)],
            layer=layers,
            position=positions,
            feature=latents,
            group=groups,
            activation=features.activation[nodes].tolist(),
            value=features.pre_activation[nodes].tolist(),
            omitted=omitted[: len(nodes)],
        ),
        _part(
            "error",
            n_layers * n,
            id=[f"{layer}_-1_{p}" for layer in range(n_layers) for p in range(n)],
            layer=[layer for layer in range(n_layers) for _ in range(n)],
            position=list(range(n)) * n_layers,
        ),
        _part(
            "embedding",
            n,
            id=[f"E_{i}_{p}" for p, i in enumerate(ids)],
            position=list(range(n)),
            activation=1.0,
        ),
        _part("bias", 1, id="bias"),
    ]
    parts += [_part("target", 1, **one.node, omitted=omitted[len(nodes) + k]) for k, one in enumerate(targets)]
    table = pd.concat(parts, ignore_index=True)
    placed = (table["kind"] != "target") & (table["position"] >= 0)
    table.loc[placed, "token"] = [texts[p] for p in table.loc[placed, "position"]]
    table.loc[placed, "token_id"] = [ids[p] for p in table.loc[placed, "position"]]
    twice = table["id"][table["id"].duplicated()]
    if len(twice):
        raise GraphError(f"two targets are the same, {twice.iloc[0]}: name each once, or give directions other names")
    return table.astype({column: kind for column, kind in COLUMNS.items() if kind is not str})


def _part(kind: str, n: int, **columns: Any) -> pd.DataFrame:
    """Return n rows of one kind, with what is not given left empty."""
    rows: dict[str, Any] = {column: [_EMPTY[of]] * n for column, of in COLUMNS.items()}
    rows["kind"], rows["weight"] = [kind] * n, [0.0] * n
    for column, values in columns.items():
        rows[column] = values if isinstance(values, list) else [values] * n
    return pd.DataFrame(rows)
