"""The attribution graph: a table of nodes and a matrix of edges.

Canonical shapes: ``adjacency`` is (N, N), row = target, column = source. Nodes come in this order: features by (layer,
group, position, latent), where a layer has one group of latents as a rule; errors by (layer, position), embeddings by
position, the bias node, targets (logits by probability).
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt_plugin.attribution.certificate import Certificate

if TYPE_CHECKING:
    import pathlib

    import networkx as nx
    import pandas as pd

    from clt_plugin.attribution.compare import Comparison, EdgeStability
    from clt_plugin.attribution.paths import Contribution, Path
    from clt_plugin.attribution.scores import Scores
    from clt_plugin.core.crosscoder import Crosscoder
    from clt_plugin.interventions.edits import Supernode

KINDS = ("feature", "error", "embedding", "bias", "target")
"""What a node can be, in the order in which nodes come."""

COLUMNS: dict[str, type] = {
    "id": str,
    "kind": str,
    "layer": int,
    "position": int,
    "feature": int,
    "group": str,
    "token": str,
    "token_id": int,
    "activation": float,
    "value": float,
    "weight": float,
    "omitted": float,
}
"""The columns of the table of nodes; -1, "" and nan stand where a column has no meaning for a node."""

DTYPES: dict[type, str] = {str: "str", int: "int64", float: "float64"}
"""How pandas calls them."""

ROWS = 64
"""So many rows of a graph are copied at a time."""


class GraphError(ValueError):
    """A question that a graph cannot answer, or a file that holds none."""


@dataclass(frozen=True)
class GraphInfo:
    """Where a graph comes from, as plain data.

    Attributes:
        prompt: The prompt as text; "" where it was given as ids without a tokenizer.
        tokens: Its tokens as text, one a position.
        token_ids: Their ids.
        n_layers: Of the model.
        model_name: The model's name, or "".
        crosscoder: What the crosscoder is, in a short line.
        source: Where the crosscoder came from (its reference), or "".
        settings: Those of `attribute`, such as ``max_n_logits``, ``max_feature_nodes``, ``zero_bos``.
        pruning: Those of `prune`, where the graph was pruned, else empty.
    """

    prompt: str
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    n_layers: int
    model_name: str = ""
    crosscoder: str = ""
    source: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    pruning: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Graph:
    """An attribution graph of one prompt.

    Attributes:
        adjacency: (N, N), row = target, column = source: what the source's activation adds to the target's
            pre-activation, or to a logit less the mean logit, through the frozen linear map.
        nodes: One row a node, in the order of the adjacency, with the `COLUMNS`: ``id`` (unique), ``kind`` (one of
            `KINDS`), ``layer`` (-1 for embeddings and bias; the model's number of layers for logits), ``position``
            (-1 for the bias), ``feature`` (the latent; -1 for others), ``group`` (the label of its group of latents,
            the layer's number as a rule), ``token`` (of its position; of a logit, the token predicted), ``token_id``,
            ``activation`` (of features), ``value`` (a feature's pre-activation, a target's value), ``weight`` (a
            target's share in influence: a logit's probability; 0 for other nodes) and ``omitted`` (the sum of the
            row's edges that are not in the matrix: from features that a node budget left out, from the bias where it is
            no node, and those that `select`, `prune` or `merged` took away). So a row's edges and its ``omitted`` add
            up to its ``value``, always.
            Further columns are kept as they are; `prune` adds ``influence`` and ``cumulative_influence``.
        certificate: What was checked.
        info: Where it comes from.
        labels: {id: what people call the node}.
        supernodes: {name: ids of the nodes that belong together}.
    """

    adjacency: Tensor
    nodes: pd.DataFrame
    certificate: Certificate
    info: GraphInfo
    labels: Mapping[str, str] = field(default_factory=dict)
    supernodes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.nodes)
        if tuple(self.adjacency.shape) != (n, n):
            raise GraphError(f"{n} nodes have an adjacency of ({n}, {n}), not {tuple(self.adjacency.shape)}")
        missing = [column for column in COLUMNS if column not in self.nodes.columns]
        if missing:
            raise GraphError(f"the table of nodes lacks {', '.join(missing)}")
        # One form for all, whatever the table was made from: what is saved is then what is loaded.
        nodes = self.nodes.reset_index(drop=True)
        others = {name: kind for name, kind in COLUMNS.items() if str(nodes[name].dtype) != DTYPES[kind]}
        object.__setattr__(self, "nodes", nodes.astype(others) if others else nodes)
        if not self.nodes["id"].is_unique:
            twice = self.nodes["id"][self.nodes["id"].duplicated()].iloc[0]
            raise GraphError(f"two nodes have the id {twice!r}")
        strange = self.nodes["kind"][~self.nodes["kind"].isin(KINDS)]
        if len(strange):
            raise GraphError(f"nodes are of the kinds {', '.join(KINDS)}: there is no {strange.iloc[0]!r}")
        texts = {"a label": self.labels.values(), "a supernode's name": self.supernodes}
        for what, given in texts.items():
            for text in given:
                if not isinstance(text, str):
                    raise GraphError(f"{what} is a text, not {text!r}")
        for node in (*self.labels, *(node for members in self.supernodes.values() for node in members)):
            self.index(node)

    # ---------------------------------------------------------------- nodes

    def __len__(self) -> int:
        """Return the number of nodes."""
        return len(self.nodes)

    def __repr__(self) -> str:
        counts = self.nodes["kind"].value_counts()
        shown = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if kind in counts)
        pruned = ", pruned" if self.info.pruning else ""
        return f"<Graph of {self.info.prompt!r}: {shown} nodes; {int((self.adjacency != 0).sum())} edges{pruned}>"

    @cached_property
    def _places(self) -> dict[str, int]:
        return {node: place for place, node in enumerate(self.nodes["id"])}

    def of_kind(self, *kinds: str) -> Tensor:
        """Return which nodes are of some kinds, (N,) of bool."""
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown:
            raise GraphError(f"nodes are of the kinds {', '.join(KINDS)}: there is no {unknown[0]!r}")
        return torch.tensor(self.nodes["kind"].isin(kinds).to_numpy())

    def index(self, node: int | str) -> int:
        """Return a node's place in the adjacency, given its id, or that place itself."""
        if not isinstance(node, str):
            place = operator.index(node)
            if not -len(self) <= place < len(self):
                raise GraphError(f"there is no node {place}: the graph has {len(self)}")
            return place % len(self)
        if node not in self._places:
            raise GraphError(f"there is no node {node!r}: ids are such as {', '.join(self.nodes['id'][:3])}")
        return self._places[node]

    def ids(self, nodes: Any) -> tuple[str, ...]:
        """Return the ids of nodes, in the order of the graph.

        Args:
            nodes: One node or several, by id or by place; or a mask over all nodes (N,).
        """
        return tuple(self.nodes["id"][self._mask(nodes).numpy()])

    def _mask(self, nodes: Any) -> Tensor:
        if isinstance(nodes, str | int):
            nodes = [nodes]
        chosen = nodes.tolist() if hasattr(nodes, "tolist") else list(nodes)
        if chosen and all(isinstance(each, bool) for each in chosen):
            if len(chosen) != len(self):
                raise GraphError(f"a mask over {len(self)} nodes has as many entries, not {len(chosen)}")
            return torch.tensor(chosen)
        mask = torch.zeros(len(self), dtype=torch.bool)
        mask[[self.index(each) for each in chosen]] = True
        return mask

    def label(self, node: int | str) -> str:
        """Return what people call a node: its label, or what it is, such as ``feature 3.811 at " and"``."""
        row = self.nodes.iloc[self.index(node)]
        if row["id"] in self.labels:
            return self.labels[row["id"]]
        token = json.dumps(row["token"], ensure_ascii=False) if row["token"] else ""
        place = token or f"position {row['position']}"
        match row["kind"]:
            case "feature":
                return f"feature {row['group']}.{row['feature']} at {place}"
            case "error":
                return f"error of layer {row['layer']} at {place}"
            case "embedding":
                return f"embedding of {token or f'token {row.token_id}'}"
            case "target" if not row["id"].startswith("target_"):
                return f"logit of {token or f'token {row.token_id}'}"
        return row["id"]

    def with_label(self, node: int | str, text: str) -> Graph:
        """Return the graph with a node called something else; an empty text takes its label away."""
        return self.with_labels({self.ids(node)[0]: text})

    def with_labels(self, labels: Mapping[str, str]) -> Graph:
        """Return the graph with several labels, {id: text}, added to its own; empty texts take labels away."""
        both = {**self.labels, **labels}
        for node in labels:
            self.index(node)
        return replace(self, labels={node: text for node, text in both.items() if text})

    def with_notes(self, notes: str | PathLike[str] | Mapping[str, Any]) -> Graph:
        """Take over labels and supernodes that were saved from the page; see `clt_plugin.attribution.files.notes`."""
        from clt_plugin.attribution.files.notes import with_notes

        return with_notes(self, notes)

    def with_supernode(self, name: str, nodes: Any) -> Graph:
        """Return the graph with nodes grouped under a name; a group of that name is replaced.

        Args:
            name: What they are called together.
            nodes: By id or by place, or a mask over all nodes: of one kind, and in no other supernode.
        """
        members = self.ids(nodes)
        others = {name_: ids for name_, ids in self.supernodes.items() if name_ != name}
        kinds = sorted(set(self.nodes["kind"][self._mask(list(members)).numpy()]))
        if len(kinds) != 1:
            raise GraphError(f"a supernode has nodes of one kind: {name!r} would have {', '.join(kinds) or 'none'}")
        for other, ids in others.items():
            shared = set(ids) & set(members)
            if shared:
                raise GraphError(f"{min(shared)} is in the supernode {other!r} already: take it out of there first")
        return replace(self, supernodes={**others, name: members})

    def without_supernode(self, name: str) -> Graph:
        """Return the graph without a group; its nodes stay."""
        self.members(name)
        return replace(self, supernodes={other: ids for other, ids in self.supernodes.items() if other != name})

    def members(self, name: str) -> tuple[str, ...]:
        """Return the ids of a supernode's nodes."""
        if name not in self.supernodes:
            raise GraphError(f"there is no supernode {name!r}: there are {', '.join(self.supernodes) or 'none'}")
        return self.supernodes[name]

    # ---------------------------------------------------------------- parts

    def select(self, keep: Any, edges: Tensor | None = None) -> Graph:
        """Return the graph of some nodes and the edges between them, in the same order.

        Labels and supernodes are narrowed to them; the edges left out are added to ``omitted``; the certificate
        stays that of the whole graph.

        Args:
            keep: A mask over all nodes (N,), or nodes by id or by place.
            edges: If given, only these edges stay: a mask (N, N), over all nodes.
        """
        mask, whole = self._mask(keep), self.adjacency
        if edges is not None and tuple(edges.shape) != tuple(whole.shape):
            raise GraphError(f"edges have a mask of {tuple(whole.shape)}, not {tuple(edges.shape)}")
        here, gone = (places.nonzero().flatten().to(whole.device) for places in (mask, ~mask))
        adjacency = whole.new_empty(len(here), len(here))
        omitted = []
        # Some rows at a time: no copy is made of what is left out.
        for some, into in zip(here.split(ROWS), adjacency.split(ROWS), strict=True):
            rows = whole.index_select(0, some)
            left_out = rows.index_select(1, gone).double().sum(1)
            if edges is not None:
                stay = edges.to(whole.device).index_select(0, some).index_fill_(1, gone, True)
                left_out += rows.masked_fill(stay, 0).double().sum(1)
                rows.masked_fill_(stay.logical_not_(), 0)
            into.copy_(rows.index_select(1, here))
            omitted.append(left_out.cpu())
        nodes = self.nodes[mask.numpy()].copy()
        nodes["omitted"] += torch.cat(omitted).numpy()
        kept = set(nodes["id"])
        supernodes = {
            name: tuple(each for each in members if each in kept) for name, members in self.supernodes.items()
        }
        return replace(
            self,
            adjacency=adjacency,
            nodes=nodes,
            labels={node: text for node, text in self.labels.items() if node in kept},
            supernodes={name: members for name, members in supernodes.items() if members},
        )

    def select_edges(self, keep: Tensor) -> Graph:
        """Return the graph with some of its edges, a mask (N, N); the others' weights are added to ``omitted``."""
        return self.select(torch.ones(len(self), dtype=torch.bool), keep)

    def subgraph(self, targets: Any, sources: Any = None) -> Graph:
        """Return the part of the graph through which nodes act on others.

        Args:
            targets: Nodes by id or by place, or a mask; they stay, with all from which edges lead to them.
            sources: If given, only what they lead to stays of that, and they themselves.
        """
        from clt_plugin.attribution.paths import reached

        mask = reached(self, self._mask(targets))
        return self.select(mask if sources is None else mask & reached(self, self._mask(sources), forwards=True))

    def prune(self, node_threshold: float = 0.8, edge_threshold: float = 0.98, *, prune_errors: bool = False) -> Graph:
        """Return the graph of the nodes and edges that matter most; see `clt_plugin.attribution.scores.prune`."""
        from clt_plugin.attribution.scores import prune

        return prune(self, node_threshold, edge_threshold, prune_errors=prune_errors)

    def merged(self) -> Graph:
        """Return the graph with each supernode as one node; see `clt_plugin.attribution.groups.merged`."""
        from clt_plugin.attribution.groups import merged

        return merged(self)

    def grouped(
        self,
        by: str | Crosscoder,
        *,
        similarity: float | None = 0.5,
        n_groups: int | None = None,
        within: Sequence[str] = ("position",),
    ) -> Graph:
        """Return the graph with alike features as supernodes; see `clt_plugin.attribution.groups.grouped`."""
        from clt_plugin.attribution.groups import grouped

        return grouped(self, by, similarity=similarity, n_groups=n_groups, within=within)

    def as_supernode(self, name: str) -> Supernode:
        """Return a supernode's features as `clt_plugin.interventions.supernode` has them, to edit them together."""
        from clt_plugin.attribution.groups import as_supernode

        return as_supernode(self, name)

    # ---------------------------------------------------------------- questions

    def influence(self) -> Tensor:
        """Return each node's influence on the targets, (N,) in float64; see `clt_plugin.attribution.scores`."""
        from clt_plugin.attribution.scores import influence

        return influence(self)

    def edge_scores(self) -> Tensor:
        """Return each edge's share in the influence on the targets, (N, N) in float64, as the adjacency lies."""
        from clt_plugin.attribution.scores import edge_scores

        return edge_scores(self)

    def scores(self) -> Scores:
        """Return how much of the graph runs through features; see `clt_plugin.attribution.scores.Scores`."""
        from clt_plugin.attribution.scores import scores

        return scores(self)

    def paths(self, source: int | str, target: int | str, k: int = 10) -> list[Path]:
        """Return the k strongest paths between two nodes, strongest first; see `clt_plugin.attribution.paths`."""
        from clt_plugin.attribution.paths import paths

        return paths(self, source, target, k)

    def inputs(self, node: int | str, k: int = 10) -> pd.DataFrame:
        """Return a node's k strongest inputs; see `clt_plugin.attribution.paths.neighbours`."""
        from clt_plugin.attribution.paths import neighbours

        return neighbours(self, node, k)

    def outputs(self, node: int | str, k: int = 10) -> pd.DataFrame:
        """Return a node's k strongest outputs; see `clt_plugin.attribution.paths.neighbours`."""
        from clt_plugin.attribution.paths import neighbours

        return neighbours(self, node, k, outputs=True)

    def cumulative_contribution(self, target: int | str | None = None, edges: str = "circuit") -> Contribution:
        """Return how much of a circuit its first layers do; see `clt_plugin.attribution.paths.Contribution`."""
        from clt_plugin.attribution.paths import cumulative_contribution

        return cumulative_contribution(self, target, edges)

    def compare(self, other: Graph, **settings: Any) -> Comparison:
        """Return in what this graph and another differ; see `clt_plugin.attribution.compare.compare`."""
        from clt_plugin.attribution.compare import compare

        return compare(self, other, **settings)

    def edge_stability(self, settings: Iterable[Mapping[str, Any]] | None = None) -> EdgeStability:
        """Return which edges survive which prunings; see `clt_plugin.attribution.compare.edge_stability`."""
        from clt_plugin.attribution.compare import edge_stability

        return edge_stability(self, settings)

    # ---------------------------------------------------------------- elsewhere

    def to_networkx(self) -> nx.DiGraph:
        """Return a directed graph of networkx, edges from source to target.

        A node is its id, with the table's columns, its ``label`` and, where it is in one, its ``supernode``; an edge
        has its ``weight``. The graph's own attributes are the prompt and the model's name.
        """
        import networkx as nx

        group_of = {node: name for name, members in self.supernodes.items() for node in members}
        result = nx.DiGraph(prompt=self.info.prompt, model_name=self.info.model_name)
        ids = self.nodes["id"].tolist()
        rows: list[dict[str, Any]] = self.nodes.drop(columns="id").to_dict("records")  # type: ignore[assignment]
        for node, row in zip(ids, rows, strict=True):
            grouped = {"supernode": group_of[node]} if node in group_of else {}
            result.add_node(node, **row, label=self.label(node), **grouped)
        places = self.adjacency.nonzero()
        weights = self.adjacency[places[:, 0], places[:, 1]].double().tolist()
        for (target, source), weight in zip(places.tolist(), weights, strict=True):
            result.add_edge(ids[source], ids[target], weight=weight)
        return result

    def to_json(self, path: str | PathLike[str], **options: Any) -> pathlib.Path:
        """Write Neuronpedia's JSON of the graph, pruned first; see `clt_plugin.attribution.files.export.to_json`."""
        from clt_plugin.attribution.files.export import to_json

        return to_json(self, path, **options)

    def to_viewer(self, folder: str | PathLike[str], **options: Any) -> pathlib.Path:
        """Write a folder for circuit-tracer's viewer; see `clt_plugin.attribution.files.export.to_viewer`."""
        from clt_plugin.attribution.files.export import to_viewer

        return to_viewer(self, folder, **options)

    def to_html(self, path: str | PathLike[str], **options: Any) -> pathlib.Path:
        """Write one self-contained page to look at it; see `clt_plugin.report.graph_page.write_page`."""
        from clt_plugin.report.graph_page import write_page

        return write_page(self, path, **options)

    def write(self, folder: str | PathLike[str], name: str = "graph", **options: Any) -> list[pathlib.Path]:
        """Write the graph, its JSON, its page and its scores; see `clt_plugin.attribution.files.bundle.write`."""
        from clt_plugin.attribution.files.bundle import write

        return write(self, folder, name, **options)

    def save(self, path: str | PathLike[str]) -> None:
        """Save to one safetensors file, whole or not at all; what is saved is loaded exactly."""
        from clt_plugin.attribution.files.storage import save

        save(self, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Graph:
        """Load a graph that `save` wrote.

        Raises:
            GraphError: The file is damaged, of another release, or of something else.
        """
        from clt_plugin.attribution.files.storage import load

        return load(path)
