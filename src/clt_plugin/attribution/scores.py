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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clt_plugin.attribution.graph import Graph, GraphError

BLOCK = 2**19
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
    bias = graph.of_kind("bias").nonzero().flatten()
    places = graph.of_kind("feature", "target").nonzero().flatten() if nodes is None else nodes
    for some in places.split(max(1, BLOCK // max(1, len(graph)))):
        rows = graph.adjacency.detach().index_select(0, some.to(graph.adjacency.device)).to("cpu", torch.float64)
        yield some, rows.index_fill_(1, bias, 0)


def shares(rows: Tensor) -> Tensor:
    """Return rows' absolute values over their sums, (n, N); rows of zeros stay so."""
    size = rows.abs()
    total = size.sum(1, keepdim=True)
    return size / total.masked_fill(total == 0, 1)


def in_order(graph: Graph) -> Tensor:
    """Return the places of features and targets, (n,), each after all that act on it.

    That is the order in which a graph of `attribute` has its nodes, where no two groups of latents share a layer.

    Raises:
        GraphError: Edges lead round in a circle, which only merged supernodes do.
    """
    places = graph.of_kind("feature", "target").nonzero().flatten()
    return places if _reads_earlier(graph, places) else _by_levels(graph, places)


def _reads_earlier(graph: Graph, places: Tensor) -> bool:
    """Return whether each of some nodes has, of these, earlier ones as its sources only."""
    places = places.to(graph.adjacency.device)
    start, size = 0, max(1, BLOCK // max(1, len(graph)))
    for some in places.split(size):
        rows = graph.adjacency.index_select(0, some).index_select(1, places[start:])
        if rows.triu_().count_nonzero():
            return False
        start += len(some)
    return True


def _by_levels(graph: Graph, places: Tensor) -> Tensor:
    """Return nodes in an order as in `in_order`: from the targets backwards, each once all that it acts on are out."""
    waiting = torch.zeros(len(graph), dtype=torch.int64)
    for _, rows in blocks(graph, places):
        waiting += (rows != 0).sum(0)
    left, levels = places, []
    while len(left):
        ready = waiting[left] == 0
        if not ready.any():
            raise GraphError(
                "the edges of this graph lead round in a circle, so that influence and paths have no meaning: "
                "supernodes were merged across layers; ask the graph before it was merged, or group within layers"
            )
        levels.append(left[ready])
        left = left[~ready]
        for _, rows in blocks(graph, levels[-1]):
            waiting -= (rows != 0).sum(0)
    return torch.cat([places[:0], *reversed(levels)])


def target_weights(graph: Graph) -> Tensor:
    """Return the targets' weights, (N,) in float64; 0 for other nodes."""
    return torch.tensor(graph.nodes["weight"].to_numpy())


# ---------------------------------------------------------------- influence


@dataclass(frozen=True, eq=False)
class Flow:
    """What one pass from the targets backwards tells of a graph, in float64.

    Attributes:
        influence: Each node's influence, (N,).
        inputs: The absolute sum of each row, without the bias, (N,).
        errors: What of it is from errors, (N,).
    """

    influence: Tensor
    inputs: Tensor
    errors: Tensor


def flow(graph: Graph) -> Flow:
    """Return influence, with the sums of rows that it is made of, reading every row once.

    Rows are substituted backwards, some at a time: what they hand on to each other solves a small triangular system,
    and what they hand on to all before them is added up. No matrix of all nodes is made.

    Raises:
        GraphError: As `in_order`.
    """
    weight, errors = target_weights(graph), graph.of_kind("error").double()
    found = Flow(*(torch.zeros_like(weight) for _ in range(3)))
    for some, rows in blocks(graph, in_order(graph).flip(0)):
        size = rows.abs_()
        total = size.sum(1)
        found.inputs[some], found.errors[some] = total, size @ errors
        divisor = total.masked_fill(total == 0, 1)
        # Later rows come first here, so that what they hand on to others of these lies above the diagonal.
        among = torch.eye(len(some), dtype=torch.float64) - (size.index_select(1, some) / divisor[:, None]).T
        given = (weight + found.influence)[some, None]
        held = torch.linalg.solve_triangular(among, given, upper=False, unitriangular=True)[:, 0]
        found.influence.add_((held / divisor) @ size)
    return found


def influence(graph: Graph) -> Tensor:
    """Return each node's influence on the targets, (N,) in float64; a target's own weight is not part of it."""
    return flow(graph).influence


def edge_scores(graph: Graph) -> Tensor:
    """Return ``Ahat[t, s] (influence_t + weight_t)`` for every edge, (N, N) in float64; 0 for those of the bias."""
    scores = torch.zeros(len(graph), len(graph), dtype=torch.float64)
    for some, rows in _scored(graph, flow(graph)):
        scores[some] = rows
    return scores


def _scored(graph: Graph, found: Flow) -> Iterator[tuple[Tensor, Tensor]]:
    """Read the scores of edges, some rows at a time, as `blocks` reads rows."""
    handed_on = (found.influence + target_weights(graph)) / found.inputs.masked_fill(found.inputs == 0, 1)
    for some, rows in blocks(graph):
        yield some, rows.abs_().mul_(handed_on[some, None])


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
    exact = scores.double()
    return exact >= least_kept(lambda: [exact], threshold)


def least_kept(parts: Callable[[], Iterable[Tensor]], threshold: float) -> float:
    """Return the least of the largest scores that hold a share of their total; infinity where none is needed.

    Scores are read twice instead of being sorted: first their sums by magnitude, in sixteenths of octaves, then those
    of the magnitude in which the share is reached, which alone are sorted.

    Args:
        parts: Reads all scores, none below 0, in float64, in parts of any shape.
        threshold: The share; at 1 every score above 0 is kept.
    """
    if threshold >= 1:
        return math.ulp(0.0)
    sums = torch.zeros(2**15, dtype=torch.float64)
    for part in parts():
        sums += torch.bincount(_magnitude(part).flatten(), part.flatten(), len(sums))
    held = sums.flip(0).cumsum(0)
    wanted = threshold * held[-1]
    if not wanted > 0:
        return math.inf
    from_above = int((held < wanted).sum())
    before = held[from_above - 1] if from_above else held.new_zeros(())
    magnitude = len(sums) - 1 - from_above
    there = torch.cat([part[_magnitude(part) == magnitude] for part in parts()]).sort(descending=True).values
    sums_before = before + there.cumsum(0) - there
    return float(there[int((sums_before < wanted).sum()) - 1])


def _magnitude(scores: Tensor) -> Tensor:
    """Return the exponent and the first four bits of the mantissa of numbers from 0 on, in order, as one integer."""
    return scores.view(torch.int64) >> 48


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
    edges = _largest_edges(left, edge_threshold)
    keep = _connected(edges, left.of_kind("feature"), left.of_kind("error") & prune_errors)
    # The bias's edges have no score: they stay.
    edges |= left.of_kind("bias")
    pruning = {"node_threshold": node_threshold, "edge_threshold": edge_threshold, "prune_errors": prune_errors}
    return replace(left.select(keep, edges), info=replace(graph.info, pruning=pruning))


def _largest_edges(graph: Graph, threshold: float) -> Tensor:
    """Return the fewest edges that hold a share of all edge scores, as `largest`, (N, N) of bool."""
    found = flow(graph)
    least = least_kept(lambda: (rows for _, rows in _scored(graph, found)), threshold)
    edges = torch.zeros(len(graph), len(graph), dtype=torch.bool)
    for some, rows in _scored(graph, found):
        edges[some] = rows >= least
    return edges


def _connected(edges: Tensor, features: Tensor, errors: Tensor) -> Tensor:
    """Return the nodes left, (N,), when features without output or input, and errors without output, are gone."""
    keep = torch.ones_like(features)
    n_outputs, n_inputs = _counted(edges)
    while True:
        dropped = keep & ((features & ((n_outputs == 0) | (n_inputs == 0))) | (errors & (n_outputs == 0)))
        if not dropped.any():
            return keep
        keep = keep & ~dropped
        n_outputs -= _counted(edges[dropped])[0]
        n_inputs -= _counted(edges[:, dropped])[1]


def _counted(edges: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many of some edges are in each column, and how many in each row, counted some rows at a time."""
    parts = edges.split(max(1, BLOCK // max(1, edges.shape[1])))
    columns = torch.zeros(edges.shape[1], dtype=torch.int64)
    for part in parts:
        columns += part.count_nonzero(0)
    return columns, torch.cat([part.count_nonzero(1) for part in parts])


# ---------------------------------------------------------------- scores


def scores(graph: Graph) -> Scores:
    """Return the graph's scores; see `Scores`."""
    found = flow(graph)
    from_embeddings = found.influence[graph.of_kind("embedding")].sum()
    from_errors = found.influence[graph.of_kind("error")].sum()
    reach = found.influence + target_weights(graph)
    fed = found.inputs > 0
    not_error = 1 - found.errors / found.inputs.masked_fill(~fed, 1)
    return Scores(
        _ratio(from_embeddings, from_embeddings + from_errors),
        _ratio((reach * not_error)[fed].sum(), reach[fed].sum()),
        _ratio((reach * not_error).sum(), reach.sum()),
    )


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if whole > 0 else math.nan
