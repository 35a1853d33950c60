"""Two graphs beside each other, and one graph under several prunings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from clt_plugin.attribution.graph import Graph, GraphError
from clt_plugin.attribution.scores import influence

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""The node thresholds that `edge_stability` tries by default, each with an edge threshold of 0.9, 0.95 and 0.98."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """In what two graphs differ.

    Attributes:
        nodes: One row a node: ``first`` and ``second``, its ids in the two graphs ("" where it is in one only),
            ``label``, ``kind``, ``where`` ("both", "first" or "second"), ``value_first``, ``value_second``,
            ``influence_first``, ``influence_second`` and ``change``, of influence, where one that a graph lacks has
            none of it.
        edges: One row an edge of either: ``source`` and ``target`` (ids of the first graph, or of the second where the
            first lacks the node; with `` (second)`` where the first has another node of that id), ``where`` (the
            graphs in which it is not 0), ``weight_first``, ``weight_second``, and ``change``, the second less the
            first; by its size.
    """

    nodes: pd.DataFrame
    edges: pd.DataFrame

    def __str__(self) -> str:
        lines = []
        for what, table in (("nodes", self.nodes), ("edges", self.edges)):
            counts = table["where"].value_counts()
            both, first, second = (int(counts.get(where, 0)) for where in ("both", "first", "second"))
            lines.append(f"{what}: {both} in both, {first} in the first only, {second} in the second only")
        return "\n".join(lines)


def compare(
    first: Graph,
    second: Graph,
    *,
    features: str | Mapping[str, str] = "id",
    positions: Mapping[int, int] | None = None,
) -> Comparison:
    """Return in what two graphs differ: of one prompt by two crosscoders, of two prompts, before and after a pruning.

    Embeddings, errors, the bias and targets are the same node where their ids are. Of two large graphs, compare
    the pruned ones: every edge is a row.

    Args:
        first: A graph.
        second: Another.
        features: How features are matched. ``"id"``: by group, latent and position, for graphs of one crosscoder.
            ``"none"``: not at all, for two crosscoders, whose latents have nothing to do with each other. Or {id in the
            first: id in the second}; others are then in one graph only.
        positions: {position in the first: position in the second}, where the prompts are shifted against each other;
            a position that is not named has no counterpart. By default each is its own.
    """
    pairs = _matched(first, second, features, positions)
    return Comparison(_nodes(first, second, pairs), _edges(first, second, pairs))


def _matched(
    first: Graph, second: Graph, features: str | Mapping[str, str], positions: Mapping[int, int] | None
) -> list[tuple[int, int]]:
    """Return the places in both graphs of every node that both have."""
    if isinstance(features, str) and features not in ("id", "none"):
        raise GraphError(f"features are matched by 'id', by 'none', or by a mapping of ids, not {features!r}")
    if isinstance(features, Mapping):
        pairs = [(first.index(one), second.index(other)) for one, other in features.items()]
        if not all(first.nodes["kind"][i] == second.nodes["kind"][j] == "feature" for i, j in pairs):
            raise GraphError("features maps ids of features to ids of features: other nodes are matched by their ids")
    else:
        pairs = []
    places = {node: place for place, node in enumerate(second.nodes["id"])}
    kinds = second.nodes["kind"].tolist()
    columns = (first.nodes[name].tolist() for name in ("id", "kind", "position"))
    for place, (node, kind, position) in enumerate(zip(*columns, strict=True)):
        if kind == "feature" and features != "id":
            continue
        other = _moved(node, position, positions)
        if other in places and kinds[places[other]] == kind:
            pairs.append((place, places[other]))
    twice = [j for j, count in Counter(j for _, j in pairs).items() if count > 1]
    if twice:
        raise GraphError(
            f"two nodes of the first graph would be {second.ids(twice[0])[0]} of the second: features and positions "
            "give each one counterpart of its own"
        )
    return sorted(pairs)


def _moved(node: str, position: int, positions: Mapping[int, int] | None) -> str | None:
    """Return the id of a node at the counterpart of its position; None where it has none."""
    if positions is None or position < 0 or not node.endswith(f"_{position}"):
        return node
    return f"{node.removesuffix(str(position))}{positions[position]}" if position in positions else None


def _nodes(first: Graph, second: Graph, pairs: list[tuple[int, int]]) -> pd.DataFrame:
    influences = [influence(graph).numpy() for graph in (first, second)]
    alone = [sorted(set(range(len(graph))) - {pair[i] for pair in pairs}) for i, graph in enumerate((first, second))]
    rows: list[tuple[int | None, int | None]] = [*pairs, *((i, None) for i in alone[0]), *((None, j) for j in alone[1])]
    columns = [{name: graph.nodes[name].tolist() for name in ("id", "kind", "value")} for graph in (first, second)]
    table: list[dict[str, Any]] = []
    for i, j in rows:
        graph, place = (first, i) if i is not None else (second, j)
        assert place is not None
        at = list(zip((i, j), columns, influences, strict=True))
        ids = ["" if here is None else own["id"][here] for here, own, _ in at]
        values = [math.nan if here is None else own["value"][here] for here, own, _ in at]
        held = [0.0 if here is None else float(influenced[here]) for here, _, influenced in at]
        table.append(
            {
                "first": ids[0],
                "second": ids[1],
                "label": graph.label(place),
                "kind": columns[graph is second]["kind"][place],
                "where": "first" if j is None else "second" if i is None else "both",
                "value_first": values[0],
                "value_second": values[1],
                "influence_first": held[0],
                "influence_second": held[1],
                "change": held[1] - held[0],
            }
        )
    return pd.DataFrame(table)


def _edges(first: Graph, second: Graph, pairs: list[tuple[int, int]]) -> pd.DataFrame:
    # By number: nodes that are matched go by the first graph's, and one of the second alone has one of its own.
    numbers = {j: i for i, j in pairs}
    own = [numbers.get(j, len(first) + j) for j in range(len(second))]
    known = set(first.nodes["id"])
    names = [*first.nodes["id"], *(f"{each} (second)" if each in known else each for each in second.nodes["id"])]
    one = _listed(first.adjacency, list(range(len(first))), "weight_first")
    other = _listed(second.adjacency, own, "weight_second")
    both = one.merge(other, on=["source", "target"], how="outer", indicator="where")
    both["where"] = both["where"].astype(str).replace({"left_only": "first", "right_only": "second"})
    for end in ("source", "target"):
        both[end] = pd.Series([names[number] for number in both[end]], dtype=str)
    weights = both[["weight_first", "weight_second"]].fillna(0.0)
    both[["weight_first", "weight_second"]] = weights
    both["change"] = weights["weight_second"] - weights["weight_first"]
    order = both["change"].abs().sort_values(ascending=False, kind="stable").index
    columns = ["source", "target", "where", "weight_first", "weight_second", "change"]
    return both.loc[order, columns].reset_index(drop=True)


def _listed(adjacency: Tensor, numbers: list[int], weight: str) -> pd.DataFrame:
    places = adjacency.nonzero().cpu()
    values = adjacency[adjacency != 0].double().cpu()
    named = torch.tensor(numbers, dtype=torch.int64)[places]
    return pd.DataFrame({"source": named[:, 1].numpy(), "target": named[:, 0].numpy(), weight: values.numpy()})


# ---------------------------------------------------------------- prunings


@dataclass(frozen=True, eq=False)
class EdgeStability:
    """Which edges survive which prunings.

    Attributes:
        settings: Those of each pruning.
        sizes: How many edges each leaves, in the same order, those of the bias not counted.
        edges: One row an edge that any of them leaves: ``source`` and ``target`` (ids), ``weight``, ``survives`` (in
            how many prunings) and ``share`` (of them); the most stable first, then by absolute weight.
    """

    settings: tuple[Mapping[str, Any], ...]
    sizes: tuple[int, ...]
    edges: pd.DataFrame

    def plot(self) -> Any:
        """Plot how many edges survive in how many of the prunings; returns matplotlib's figure."""
        from clt_plugin.report.stability import plot_stability

        counts = self.edges["survives"].value_counts()
        numbers = [int(counts.get(i, 0)) for i in range(1, len(self.settings) + 1)]
        return plot_stability(numbers, self.edges["survives"].tolist(), self.edges["weight"].abs().tolist())

    def __str__(self) -> str:
        always = int((self.edges["survives"] == len(self.settings)).sum())
        return f"{always} of {len(self.edges)} edges survive in all of {len(self.settings)} prunings"


def edge_stability(graph: Graph, settings: Iterable[Mapping[str, Any]] | None = None) -> EdgeStability:
    """Return for each edge in how many of several prunings it survives: what a picture owes to its thresholds.

    Edges of the bias, which are never pruned, are not counted.

    Args:
        graph: The graph, not pruned.
        settings: Those of `prune`, one mapping a pruning, such as ``{"node_threshold": 0.8}``; by default fifteen, from
            few nodes and edges to many.
    """
    if settings is None:
        settings = [{"node_threshold": n, "edge_threshold": e} for n in THRESHOLDS for e in (0.9, 0.95, 0.98)]
    tried = tuple(dict(each) for each in settings)
    if not tried:
        raise GraphError("no settings were given: edges need one pruning at least to survive")
    counts = torch.zeros(len(graph), len(graph), dtype=torch.int32)
    sizes = []
    for each in tried:
        pruned = graph.prune(**each)
        left = (pruned.adjacency != 0).cpu()
        left[:, pruned.of_kind("bias")] = False
        places = torch.tensor([graph.index(node) for node in pruned.nodes["id"]], dtype=torch.int64)
        counts[places[:, None], places] += left.int()
        sizes.append(int(left.sum()))
    target, source = counts.nonzero().T
    ids = graph.nodes["id"].to_numpy()
    survives = counts[target, source]
    table = pd.DataFrame(
        {
            "source": ids[source.numpy()],
            "target": ids[target.numpy()],
            "weight": graph.adjacency.cpu()[target, source].double().numpy(),
            "survives": survives.numpy(),
            "share": (survives.double() / len(tried)).numpy(),
        }
    )
    order = table.assign(size=table["weight"].abs()).sort_values(["survives", "size"], ascending=False, kind="stable")
    return EdgeStability(tried, tuple(sizes), order.drop(columns="size").reset_index(drop=True))
