"""Walks through a graph: what reaches what, a node's neighbours, the strongest paths, and what first layers do.

A path is as strong as the product of its edges' shares, an edge's share being its absolute value over the sum of its
row's, without the bias, as in influence. The strengths of all paths from a source to a target add up to the source's
influence on that target alone.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from clt_plugin.attribution.graph import Graph, GraphError
from clt_plugin.attribution.scores import backwards, blocks, shares, target_weights

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
    seen, last = nodes.clone(), nodes
    while last.any():
        found = linked[:, last].any(1) if forwards else linked[last].any(0)
        last = found & ~seen
        seen |= last
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

    They are found exactly, with the k best paths to each node on the way (a node is one of the k best to go through
    only if its own best path is).

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
    one = torch.eye(len(graph), dtype=torch.bool)
    between = reached(graph, one[end]) & reached(graph, one[start], forwards=True)
    best = torch.zeros(len(graph), k, dtype=torch.float64)
    best[start, 0] = 1
    through = torch.zeros(len(graph), k, 2, dtype=torch.int64)  # the node before, and which of its paths
    between[start] = False
    order = [some[between[some]] for some, _ in backwards(graph)]
    for level in reversed(order):
        for some, rows in blocks(graph, level):
            best[some], through[some] = _extend(shares(rows), best)
    return [_path(graph, through, start, end, rank, share) for rank, share in enumerate(best[end].tolist()) if share]


def _extend(rows: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """Return the k best paths to each row's node, (n, k), and by which node and which of its paths, (n, k, 2)."""
    k = best.shape[1]
    edges, before = rows.mul(best[:, 0]).topk(min(k, len(best)), dim=1)
    edges = rows.gather(1, before)
    strengths, flat = (edges[:, :, None] * best[before]).flatten(1).topk(k, dim=1)
    return strengths, torch.stack([before.gather(1, flat // k), flat % k], dim=-1)


def _path(graph: Graph, through: Tensor, start: int, end: int, rank: int, share: float) -> Path:
    places = [end]
    while places[-1] != start:
        before, rank = through[places[-1], rank].tolist()
        places.append(before)
    places.reverse()
    weights = tuple(float(graph.adjacency[t, s]) for s, t in itertools.pairwise(places))
    return Path(tuple(graph.nodes["id"].iloc[places]), tuple(map(graph.label, places)), weights, share)


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
