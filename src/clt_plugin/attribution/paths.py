"""Walks through a graph: what reaches what, a node's neighbours, the strongest paths, and what first layers do.

A path is as strong as the product of its edges' shares, an edge's share being its absolute value over the sum of its
row's, without the bias, as in influence. The strengths of all paths from a source to a target add up to the source's
influence on that target alone.
"""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from clt_plugin.attribution.graph import Graph, GraphError
from clt_plugin.attribution.scores import blocks, in_order, shares, target_weights

EDGES = ("circuit", "target")
"""Over which edges contributions are counted."""


def reached(graph: Graph, nodes: Tensor, forwards: bool = False) -> Tensor:
    """Return the nodes from which edges lead to some nodes, these included, as a mask (N,).

    Args:
        graph: The graph.
        nodes: A mask (N,).
        forwards: Return those to which edges lead instead.
    """
    linked = (graph.adjacency != 0).cpu()
    seen, last = nodes.clone(), nodes.nonzero().flatten()
    while len(last):
        found = linked.index_select(1, last).any(1) if forwards else linked.index_select(0, last).any(0)
        last = (found & ~seen).nonzero().flatten()
        seen |= found
    return seen


# ---------------------------------------------------------------- neighbours


def neighbours(graph: Graph, node: int | str, k: int | None = 10, *, outputs: bool = False) -> pd.DataFrame:
    """Return a node's strongest inputs or outputs, by absolute weight.

    Args:
        graph: The graph.
        node: By id or by place.
        k: How many at most; None for all.
        outputs: Return what the node acts on, instead of what acts on it.

    Returns:
        One row a neighbour: its ``id``, ``label``, ``kind``, ``layer`` and ``position``, the edge's ``weight``, and its
        ``share`` in the absolute sum of the edges into the same target; nan for the bias, which is outside of it.
    """
    if k is not None and k < 1:
        raise GraphError(f"k is the number of neighbours to return, 1 or more, or None for all, not {k}")
    place = graph.index(node)
    weights = (graph.adjacency[:, place] if outputs else graph.adjacency[place]).to("cpu", torch.float64)
    order = weights.abs().argsort(descending=True, stable=True)
    chosen = order[weights[order] != 0][:k]
    if outputs:
        share = torch.cat([shares(rows)[:, place] for _, rows in blocks(graph, chosen)] or [weights[:0]])
    else:
        ((_, row),) = blocks(graph, torch.tensor([place]))
        share = shares(row)[0, chosen]
    outside = graph.of_kind("bias")
    share[outside[chosen] | outside[place]] = math.nan
    table = graph.nodes.loc[chosen.numpy(), ["id", "kind", "layer", "position"]].reset_index(drop=True)
    table.insert(1, "label", pd.Series([graph.label(each) for each in chosen.tolist()], dtype=str))
    return table.assign(weight=weights[chosen].numpy(), share=share.numpy())


# ---------------------------------------------------------------- paths


@dataclass(frozen=True)
class Path:
    """A way through a graph.

    Attributes:
        nodes: The ids on the way, from source to target.
        labels: What they are called.
        weights: The weights of the edges between them.
        share: The product of the edges' shares: what of the target's influence comes back to the source this way.
    """

    nodes: tuple[str, ...]
    labels: tuple[str, ...]
    weights: tuple[float, ...]
    share: float

    @property
    def sign(self) -> int:
        """1 where the source pushes the target up this way, -1 where it pushes it down."""
        return -1 if sum(weight < 0 for weight in self.weights) % 2 else 1

    def __str__(self) -> str:
        return f"{self.sign * self.share:+.4f}  {' -> '.join(self.labels)}"


def paths(graph: Graph, source: int | str, target: int | str, k: int = 10) -> list[Path]:
    """Return the k strongest paths from one node to another, strongest first; fewer where there are fewer.

    They are found exactly, one after another: the next best path to a node follows from the next best ones to the
    nodes before it, each looked for once it is needed (Jimenez and Marzal 1999, "Computing the k shortest paths: a new
    algorithm and an experimental comparison"). So memory grows with the paths found, not with all nodes times k.

    Args:
        graph: The graph.
        source: By id or by place.
        target: By id or by place.
        k: How many.
    """
    start, end = graph.index(source), graph.index(target)
    if start == end:
        raise GraphError(f"a path leads from one node to another, not from {graph.ids(start)[0]} to itself")
    if bool(graph.of_kind("bias")[start]):
        raise GraphError("no path starts at the bias: it stands outside the shares by which paths are measured")
    if k < 1:
        raise GraphError(f"k is the number of paths to find, 1 or more, not {k}")
    ways = _ways(graph, start, end, k)
    ids, label = graph.nodes["id"].tolist(), cache(graph.label)
    found = []
    for rank in range(k):
        if end not in ways or ways[end].strength(rank) is None:
            break
        share, places = ways[end].found[rank].strength, [end]
        while places[-1] != start:
            step = ways[places[-1]].found[rank]
            rank = step.rank
            places.append(step.before)
        places.reverse()
        weights = tuple(float(graph.adjacency[t, s]) for s, t in itertools.pairwise(places))
        found.append(Path(tuple(ids[i] for i in places), tuple(map(label, places)), weights, share))
    return found


def _ways(graph: Graph, start: int, end: int, k: int) -> dict[int, _Ways]:
    """Return the ways to each node between two nodes, by its place; of each only the k best nodes before it."""
    one = torch.eye(len(graph), dtype=torch.bool)
    between = reached(graph, one[end]) & reached(graph, one[start], forwards=True)
    best = torch.zeros(len(graph), dtype=torch.float64)
    best[start] = 1
    ways: dict[int, _Ways] = {}
    ways[start] = _Ways(ways, torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64))
    ways[start].found.append(_Step(1.0, -1, 0))
    between[start] = False
    order = in_order(graph)
    for some, rows in blocks(graph, order[between[order]]):
        for place, row in zip(some.tolist(), shares(rows), strict=True):
            strengths, before = (row * best).topk(min(k, len(row)))
            before = before[strengths > 0]
            if len(before):
                best[place] = strengths[0]
                ways[place] = _Ways(ways, before, row[before])
    return ways


class _Step(NamedTuple):
    """The last step of a path: its strength, the node before it, and which of the paths to that it goes on from."""

    strength: float
    before: int
    rank: int


class _Ways:
    """The paths to one node, strongest first, found as they are asked for.

    Args:
        ways: Those to all nodes.
        before: The nodes before it, in the order of the best path through each, (n,).
        edges: The shares of the edges from these, (n,).
    """

    def __init__(self, ways: dict[int, _Ways], before: Tensor, edges: Tensor) -> None:
        self.ways, self.before, self.edges = ways, before, edges
        self.found: list[_Step] = []
        self.open: list[tuple[float, int, int]] = []  # (less its strength, which node before, which path to it)
        self.last = (-1, 0)  # which of these was found last

    def strength(self, rank: int) -> float | None:
        """Return the strength of a path by its rank, from 0; None where there are not as many."""
        while len(self.found) <= rank:
            self._open_next()
            if not self.open:
                return None
            negative, place, through = heapq.heappop(self.open)
            self.last = place, through
            self.found.append(_Step(-negative, int(self.before[place]), through))
        return self.found[rank].strength

    def _open_next(self) -> None:
        """Open what may follow the path found last: the next through the same node, the first through the next."""
        place, through = self.last
        self.last = len(self.before), 1
        for candidate in [(place, through + 1)] * (place >= 0) + [(place + 1, 0)] * (through == 0):
            if candidate[0] < len(self.before):
                share = self.ways[int(self.before[candidate[0]])].strength(candidate[1])
                strength = 0.0 if share is None else float(self.edges[candidate[0]]) * share
                if strength > 0:
                    heapq.heappush(self.open, (-strength, *candidate))


# ---------------------------------------------------------------- what first layers do


@dataclass(frozen=True, eq=False)
class Contribution:
    """How much of a target's circuit the features of the first layers do.

    A curve that is steep at first is a warning: features of early layers do in one step what the model may do in
    several (seen in cross-layer transcoders beside per-layer ones, whose curve is about straight).

    Attributes:
        target: The id of the target.
        edges: ``"circuit"``: over all positive edges that leave features, among the nodes from which edges lead to the
            target; ``"target"``: over the positive edges from features into the target alone.
        table: One row a layer: ``layer``, the ``share`` of those edges' sum that leaves its features, and the
            ``cumulative`` share that leaves it and all layers before it; nan where there is no such edge.
    """

    target: str
    edges: str
    table: pd.DataFrame

    def plot(self, **others: Contribution) -> Any:
        """Plot the cumulative share over layers; returns matplotlib's figure.

        Args:
            **others: Contributions to draw beside it, by what they are called.
        """
        from clt_plugin.report.contribution import plot_contributions

        this = {"this graph" if others else "": self.table["cumulative"].tolist()}
        curves = this | {name: other.table["cumulative"].tolist() for name, other in others.items()}
        return plot_contributions(curves, title=f"what leads to {self.target}, {self._over}")

    @property
    def _over(self) -> str:
        return "all positive edges" if self.edges == "circuit" else "positive edges into it"

    def __str__(self) -> str:
        rows = [f"  layer {row.layer:>2}  {row.share:.3f}  {row.cumulative:.3f}" for row in self.table.itertuples()]
        return "\n".join([f"share by layer of what leads to {self.target}, {self._over}", *rows])


def cumulative_contribution(graph: Graph, target: int | str | None = None, edges: str = "circuit") -> Contribution:
    """Return how much of a target's circuit the features of layers 0 to n do, for every n.

    Args:
        graph: The graph; prune it first to count over its circuit alone.
        target: By id or by place; by default the one of the largest weight, the likeliest logit.
        edges: ``"circuit"`` or ``"target"``; see `Contribution`.
    """
    if edges not in EDGES:
        raise GraphError(f"contributions are counted over the edges of the {' or the '.join(EDGES)}, not {edges!r}")
    if target is None:
        targets = graph.of_kind("target")
        if not targets.any():
            raise GraphError("this graph has no target: say to which node contributions are to be counted")
        end = int(target_weights(graph).masked_fill(~targets, -1).argmax())
    else:
        end = graph.index(target)
    rows = torch.zeros(len(graph), dtype=torch.bool)
    rows[end] = True
    if edges == "circuit":
        rows = reached(graph, rows)
    total = torch.zeros(len(graph), dtype=torch.float64)
    for _, block in blocks(graph, rows.nonzero().flatten()):
        total += block.clamp(min=0).sum(0)
    features = graph.of_kind("feature")
    layers = torch.tensor(graph.nodes["layer"].to_numpy())[features]
    by_layer = torch.zeros(graph.info.n_layers, dtype=torch.float64).index_add(0, layers, total[features])
    share = by_layer / by_layer.sum()
    table = pd.DataFrame({"layer": range(len(share)), "share": share.numpy(), "cumulative": share.cumsum(0).numpy()})
    return Contribution(graph.ids(end)[0], edges, table)
