"""QK attribution: why a head looks from one position at another.

A head's attention score is bilinear: its query is affine in the residual stream where it looks from, its key in that
where it looks to, and each of these is a sum over sources (features, errors, embeddings, the bias) of what they write
there, directly and through earlier attention. So the score is a sum over pairs of sources. The score meant here is
scaled, ``scaling <query, key>``, and before the softcap of models that have one. Rotary embedding is linear and part of
the map; the denominators of norms are those of the run, those of queries and keys included. Source: Kamath et al. 2025,
"Tracing Attention Computation Through Feature Interactions", on QK attributions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt_plugin.attribution.graph import GraphError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

ROWS = 1024
"""How many rows of the matrix of pairs are looked at at a time."""


@dataclass(frozen=True, eq=False)
class QKAttribution:
    """One attention score as a sum over pairs of sources.

    Attributes:
        layer: The layer.
        head: The head.
        query: The position that looks.
        key: The position that is looked at.
        score: Scaled, before the softcap.
        softcap: Of the model, or None: scores x become ``softcap tanh(x / softcap)``.
        weight: The attention pattern there.
        query_nodes: The sources that reach the query, one row each, as in a graph's table of nodes.
        key_nodes: Those that reach the key.
        query_parts: What each source of the query adds to it, scaled, (n_query_sources, d_head).
        key_parts: What each source of the key adds to it, (n_key_sources, d_head).
        residual: How far the pairs' sum, and the sums of parts, are from the run's, relative to their absolute sums.
        tolerance: What that had to stay below.
    """

    layer: int
    head: int
    query: int
    key: int
    score: float
    softcap: float | None
    weight: float
    query_nodes: pd.DataFrame
    key_nodes: pd.DataFrame
    query_parts: Tensor
    key_parts: Tensor
    residual: float
    tolerance: float

    @property
    def matrix(self) -> Tensor:
        """What each pair adds to the score, (n_query_sources, n_key_sources); made anew each time."""
        return self.query_parts @ self.key_parts.T

    @property
    def by_query(self) -> Tensor:
        """What each source of the query adds, with all of the key, (n_query_sources,)."""
        return self.query_parts @ self.key_parts.sum(0)

    @property
    def by_key(self) -> Tensor:
        """What each source of the key adds, with all of the query, (n_key_sources,)."""
        return self.key_parts @ self.query_parts.sum(0)

    def top(self, k: int = 20) -> pd.DataFrame:
        """Return the k pairs that add most in magnitude: ``query``, ``key`` (ids) and ``score``."""
        values, places = self.query_parts.new_zeros(0), torch.zeros(0, dtype=torch.long)
        for start in range(0, len(self.query_parts), ROWS):
            block = (self.query_parts[start : start + ROWS] @ self.key_parts.T).flatten()
            values = torch.cat((values, block))
            places = torch.cat((places, torch.arange(len(block)) + start * len(self.key_parts)))
            best = values.abs().topk(min(k, len(values))).indices
            values, places = values[best], places[best]
        rows, columns = places // max(len(self.key_parts), 1), places % max(len(self.key_parts), 1)
        names = {
            "query": self.query_nodes["id"].iloc[rows.tolist()].tolist(),
            "key": self.key_nodes["id"].iloc[columns.tolist()].tolist(),
        }
        import pandas as pd

        return pd.DataFrame({**names, "score": values.tolist()})

    def top_sources(self, side: str, k: int = 20) -> pd.DataFrame:
        """Return the k sources of one side that add most in magnitude, with all of the other.

        Args:
            side: ``"query"`` or ``"key"``.
            k: How many at most.

        Returns:
            Their rows of the table of nodes, with a column ``score``.
        """
        if side not in ("query", "key"):
            raise GraphError(f"a score has the sides 'query' and 'key', not {side!r}")
        nodes, scores = (self.query_nodes, self.by_query) if side == "query" else (self.key_nodes, self.by_key)
        best = scores.abs().topk(min(k, len(scores))).indices
        return nodes.iloc[best.tolist()].assign(score=scores[best].tolist()).reset_index(drop=True)

    def plot(self, k: int = 12) -> Figure:
        """Plot the pairs of the k strongest sources of each side as a heat map."""
        from clt_plugin.report.attention import plot_pairs

        rows, columns = (each.abs().topk(min(k, len(each))).indices for each in (self.by_query, self.by_key))
        return plot_pairs(
            self.query_parts[rows] @ self.key_parts[columns].T,
            self.query_nodes["id"].iloc[rows.tolist()].tolist(),
            self.key_nodes["id"].iloc[columns.tolist()].tolist(),
            f"head {self.layer}.{self.head}, from {self.query} to {self.key}: score {self.score:.2f}",
        )

    def __str__(self) -> str:
        cap = "" if self.softcap is None else f" (before a softcap of {self.softcap:g})"
        return (
            f"head {self.layer}.{self.head} looks from position {self.query} at {self.key} with score {self.score:.3f}"
            f"{cap}, pattern {self.weight:.3f}; {len(self.query_nodes)} x {len(self.key_nodes)} pairs, residual "
            f"{self.residual:.1e}\n{self.top(10).to_string(index=False)}"
        )

    def __repr__(self) -> str:
        return (
            f"<QKAttribution of head {self.layer}.{self.head} at ({self.query}, {self.key}), score {self.score:.3f}, "
            f"{len(self.query_nodes)} x {len(self.key_nodes)} pairs>"
        )


def qk_attribution(
    model: Any,
    prompt: Any,
    layer: int,
    head: int,
    query: int,
    key: int,
    *,
    clt: Any = None,
    zero_bos: bool = False,
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
    name: str = "clt",
) -> QKAttribution:
    """Split one attention score over pairs of sources.

    Args:
        model: An nnsight model, a TransformerBridge, or a transformers model.
        prompt: Text, or token ids (position,) or (1, position).
        layer: The layer of the head.
        head: The head.
        query: The position that looks; negative ones count from the end.
        key: The position that is looked at, the query's or an earlier one.
        clt: The crosscoder, or a reference; by default the one that is attached to the model.
        zero_bos: As for `attribute`.
        dtype: In which to compute; by default the model's, float32 at least.
        tolerance: What residuals must stay below; by default what suits the coarsest dtype.
        name: The name under which the crosscoder is attached.

    Raises:
        CertificateError: The pairs do not add up to the score, or the score is not what the pattern was made of.
        FreezeError: The model cannot be recorded or frozen.
        AttachError: The crosscoder does not fit the model, or cannot stand for its MLPs.
        GraphError: There is no such head or position, or the head cannot look there.
    """
    from clt_plugin.adapters.huggingface import plain_model
    from clt_plugin.attribution.attention._parts import check_sums, pulled, source_nodes
    from clt_plugin.attribution.attention._queries import score_of
    from clt_plugin.attribution.engine.local import LocalReplacement
    from clt_plugin.interventions.modes import find_crosscoder, read_prompt

    crosscoder = find_crosscoder(model, clt, name, None, "attribute")
    assert crosscoder is not None
    inputs, tokenizer = read_prompt(model, prompt)
    with plain_model(model) as hf, torch.no_grad():
        local = LocalReplacement.of(hf, crosscoder, inputs, zero_bos=zero_bos, dtype=dtype)
        pattern = _pattern(local.frozen, layer, head)
        query, key = (_position(each, len(pattern)) for each in (query, key))
        score = score_of(hf, local.frozen, layer, head, query, key)
        if not bool(score.visible[key]):
            raise GraphError(f"layer {layer} does not look from position {query} at {key}: its mask hides it")
        readings = score.readings(layer)
        edges = pulled(local, readings)
        queries, keys = edges.T.chunk(2, dim=1)
        queries = queries * score.scaling
        value, absolute = score.row[key], _absolute_sum(queries, keys)
        # What rounding does to a pattern grows with the scores.
        largest = score.row.abs().max().clamp(min=1)
        model_dtype = next(hf.parameters()).dtype
        residual, tolerance = check_sums(
            local,
            model_dtype,
            [
                ("the sum of the parts of the query or key", edges.sum(1), readings.values, edges.abs().sum(1)),
                ("the sum over pairs", (queries.sum(0) * keys.sum(0)).sum()[None], value[None], absolute[None]),
            ],
            tolerance,
            [("the pattern of these scores", score.weights / largest, pattern[query] / largest)],
        )
    nodes = source_nodes(local, tokenizer)
    sides: Mapping[str, Tensor] = {"query": queries.cpu(), "key": keys.cpu()}
    reached = {side: parts.any(dim=1) for side, parts in sides.items()}
    return QKAttribution(
        layer=layer,
        head=head,
        query=query,
        key=key,
        score=float(value),
        softcap=score.softcap,
        weight=float(pattern[query, key]),
        query_nodes=nodes[reached["query"].numpy()].reset_index(drop=True),
        key_nodes=nodes[reached["key"].numpy()].reset_index(drop=True),
        query_parts=sides["query"][reached["query"]],
        key_parts=sides["key"][reached["key"]],
        residual=residual,
        tolerance=tolerance,
    )


def _pattern(frozen: Any, layer: int, head: int) -> Tensor:
    """Return a head's pattern, (position, position), or refuse a head that is not there."""
    if not 0 <= layer < frozen.n_layers:
        raise GraphError(f"there is no layer {layer}: the model has layers 0-{frozen.n_layers - 1}")
    pattern = frozen.layers[layer].pattern
    if not 0 <= head < len(pattern):
        raise GraphError(f"there is no head {head}: layer {layer} has heads 0-{len(pattern) - 1}")
    return pattern[head]


def _position(position: int, n: int) -> int:
    if not -n <= position < n:
        raise GraphError(f"the prompt has {n} tokens: there is no position {position}")
    return position % n


def _absolute_sum(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the sum of all pairs' absolute parts; the whole matrix is never held."""
    parts = [(block @ keys.T).abs().sum() for block in queries.split(ROWS)]
    return torch.stack(parts).sum() if parts else queries.new_full((), math.nan)
