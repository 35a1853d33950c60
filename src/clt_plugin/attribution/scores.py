"""Influence, pruning and scores: which nodes and edges matter for the targets, and how much of it is features.

With Ahat the row-normalised |A|, every row's shares of its input add up to 1. The influence of a node is what of the
targets' weights arrives at it when each node hands on what it has to its sources by those shares: the target-weighted
rows of ``Ahat + Ahat^2 + ... = (I - Ahat)^-1 - I`` (Ameisen et al. 2025, "Circuit Tracing", on graph pruning and
evaluation). A graph has no cycles, so that it is exact after one pass from the targets to the embeddings, in which
every row is read once.

Three conventions. The bias node stands outside: its edges are left out before rows are normalised, its influence is 0,
and it is never pruned. What a node budget left out (``omitted``) is left out before rows are normalised too. And the
targets' weights are used as they are: a logit counts by its probability in the whole vocabulary, as circuit-tracer
0.5.0 has it, so that influence is in units of probability; shares, thresholds and scores do not depend on their sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clt_plugin.attribution.graph import Graph, GraphError

BLOCK = 2**23
"""About so many edges are in memory in float64 at a time."""


@dataclass(frozen=True)
class Scores:
    """How much of a graph's computation runs through features rather than errors, each from 0 to 1.

    nan where a score has no meaning: no influence reaches an embedding or an error, or no node has an input.

    Attributes:
        replacement: The share of end-to-end influence that starts at embeddings rather than errors.
        completeness: Over features and targets with inputs, the share of a node's input that is not error, weighted
            by the node's influence and its own weight.
        completeness_counting_inputless_nodes: The same over all nodes, where one without inputs (an embedding, an
            error) counts as complete: as circuit-tracer 0.5.0 computes what it calls completeness. Never smaller.
    """

    replacement: float
    completeness: float
    completeness_counting_inputless_nodes: float

    def __str__(self) -> str:
        return (
            f"replacement {self.replacement:.3f}, completeness {self.completeness:.3f} "
            f"({self.completeness_counting_inputless_nodes:.3f} counting nodes without inputs as complete)"
        )


# ---------------------------------------------------------------- rows


def blocks(graph: Graph, nodes: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Read rows in order, some at a time, without the edges of the bias.

    Args:
        graph: The graph.
        nodes: Their places; by default those of features and targets, since no other node has inputs.

    Yields:
        The places (n,) and the rows (n, N) in float64, on the CPU.
    """
    bias = graph.of_kind("bias")
    places = graph.of_kind("feature", "target").nonzero().flatten() if nodes is None else nodes
    for some in places.split(max(1, BLOCK // max(1, len(graph)))):
        rows = graph.adjacency[some.to(graph.adjacency.device)].to("cpu", torch.float64)
        rows[:, bias] = 0
        yield some, rows


def shares(rows: Tensor) -> Tensor:
    """Return rows' absolute values over their sums, (n, N); rows of zeros stay so."""
    size = rows.abs()
    total = size.sum(1, keepdim=True)
    return size / total.masked_fill(total == 0, 1)


def backwards(graph: Graph) -> Iterator[tuple[Tensor, Tensor]]:
    """Read all rows once, each after the rows of every node that it is a source of.

    Yields:
        As `blocks`.

    Raises:
        GraphError: Edges lead round in a circle, which only merged supernodes do.
    """
    waiting = torch.zeros(len(graph), dtype=torch.int64)
    for _, rows in blocks(graph):
        waiting += (rows != 0).sum(0)
    done = torch.zeros(len(graph), dtype=torch.bool)
    while not done.all():
        ready = ((waiting == 0) & ~done).nonzero().flatten()
        if len(ready) == 0:
            raise GraphError(
                "the edges of this graph lead round in a circle, so that influence and paths have no meaning: "
                "supernodes were merged across layers; ask the graph before it was merged, or group within layers"
            )
        done[ready] = True
        for some, rows in blocks(graph, ready):
            waiting -= (rows != 0).sum(0)
            yield some, rows


def target_weights(graph: Graph) -> Tensor:
    """Return the targets' weights, (N,) in float64; 0 for other nodes."""
    return torch.tensor(graph.nodes["weight"].to_numpy())


# ---------------------------------------------------------------- influence


def influence(graph: Graph) -> Tensor:
    """Return each node's influence on the targets, (N,) in float64; a target's own weight is not part of it."""
    weight = target_weights(graph)
    total = torch.zeros_like(weight)
    for some, rows in backwards(graph):
        total += (weight + total)[some] @ shares(rows)
    return total


def edge_scores(graph: Graph) -> Tensor:
    """Return ``Ahat[t, s] (influence_t + weight_t)`` for every edge, (N, N) in float64; 0 for those of the bias."""
    handed_on = influence(graph) + target_weights(graph)
    scores = torch.zeros(len(graph), len(graph), dtype=torch.float64)
    for some, rows in blocks(graph):
        scores[some] = shares(rows) * handed_on[some, None]
    return scores


def cumulative_share(scores: Tensor) -> Tensor:
    """Return for each score the share of the total that it and all scores as large hold, of the same shape.

    Equal scores have equal shares; scores of 0 have 1.
    """
    values, inverse, counts = scores.double().unique(return_inverse=True, return_counts=True)
    held = (values * counts).flip(0).cumsum(0).flip(0)
    if len(held) == 0 or held[0] == 0:
        return torch.ones_like(scores, dtype=torch.float64)
    return torch.where(values > 0, held / held[0], 1.0)[inverse]


def largest(scores: Tensor, threshold: float) -> Tensor:
    """Return the fewest of the largest scores that hold a share of their total, a mask of the same shape.

    Scores equal to the last one kept are kept as well, and scores of 0 never are.
    """
    found = scores[scores > 0].double()
    if threshold >= 1:
        return scores > 0
    values = found.sort(descending=True).values
    held = torch.cat([values.new_zeros(1), values.cumsum(0)])
    n_kept = int((held[:-1] < threshold * held[-1]).sum())
    return torch.zeros_like(scores, dtype=torch.bool) if n_kept == 0 else scores >= values[n_kept - 1]


# ---------------------------------------------------------------- pruning


def prune(
    graph: Graph, node_threshold: float = 0.8, edge_threshold: float = 0.98, *, prune_errors: bool = False
) -> Graph:
    """Return the graph of the nodes and edges that matter most.

    First the fewest nodes stay that hold a share of all influence. Then, with influence computed anew on what is left,
    the fewest edges stay that hold a share of all edge scores. At last, features that no edge leaves or none enters
    are taken away, again and again until none is left. Nodes or edges of equal score stay or go together.

    Embeddings, targets and the bias, with its edges, always stay. Errors do as well (Ameisen et al. 2025);
    circuit-tracer 0.5.0 prunes them like features, and those that no edge leaves.

    Args:
        graph: The graph.
        node_threshold: The share of influence that the nodes kept hold, from 0 to 1. At 1 every node with any stays.
        edge_threshold: The share of edge scores that the edges kept hold, from 0 to 1.
        prune_errors: Whether errors are pruned too.

    Returns:
        The pruned graph. Its table of nodes has further columns: ``influence``, and ``cumulative_influence``, the share
        of all influence that the node and every node of as much or more hold together, both of the graph as it was
        given. Its ``info.pruning`` says how it was pruned.
    """
    for name, value in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not 0 <= value <= 1:
            raise GraphError(f"{name} is a share from 0 to 1, not {value}")
    influences = influence(graph)
    columns = {"influence": influences.numpy(), "cumulative_influence": cumulative_share(influences).numpy()}
    prunable = graph.of_kind("feature", "error") if prune_errors else graph.of_kind("feature")
    known = replace(graph, nodes=graph.nodes.assign(**columns))
    left = known.select(largest(influences, node_threshold) | ~prunable)
    edges = largest(edge_scores(left), edge_threshold)
    keep = _connected(edges, left.of_kind("feature"), left.of_kind("error") & prune_errors)
    # The bias's edges have no score: they stay.
    edges |= left.of_kind("bias")
    pruning = {"node_threshold": node_threshold, "edge_threshold": edge_threshold, "prune_errors": prune_errors}
    pruned = left.select_edges(edges.to(left.adjacency.device)).select(keep)
    return replace(pruned, info=replace(graph.info, pruning=pruning))


def _connected(edges: Tensor, features: Tensor, errors: Tensor) -> Tensor:
    """Return the nodes left, (N,), when features without output or input, and errors without output, are gone."""
    keep = torch.ones_like(features)
    while True:
        has_output, has_input = edges[keep].any(0), edges[:, keep].any(1)
        dropped = keep & ((features & ~(has_output & has_input)) | (errors & ~has_output))
        if not dropped.any():
            return keep
        keep = keep & ~dropped


# ---------------------------------------------------------------- scores


def scores(graph: Graph) -> Scores:
    """Return the graph's scores; see `Scores`."""
    influences = influence(graph)
    errors, inner = graph.of_kind("error"), graph.of_kind("feature", "target")
    from_embeddings, from_errors = influences[graph.of_kind("embedding")].sum(), influences[errors].sum()
    reach = influences + target_weights(graph)
    not_error = torch.ones_like(reach)
    has_input = torch.zeros_like(errors)
    for some, rows in blocks(graph):
        not_error[some] = 1 - shares(rows)[:, errors].sum(1)
        has_input[some] = (rows != 0).any(1)
    fed = inner & has_input
    return Scores(
        _ratio(from_embeddings, from_embeddings + from_errors),
        _ratio((reach * not_error)[fed].sum(), reach[fed].sum()),
        _ratio((reach * not_error).sum(), reach.sum()),
    )


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if whole > 0 else math.nan
