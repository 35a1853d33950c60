"""Supernodes: features grouped by what they write or by their edges, a group as one node, and as one edit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from clt_plugin.attribution.graph import Graph, GraphError

if TYPE_CHECKING:
    from clt_plugin.core.crosscoder import Crosscoder
    from clt_plugin.interventions.edits import Supernode

APART = -2.0
"""The similarity of nodes that may not be grouped; no cosine is as low."""


def grouped(
    graph: Graph,
    by: str | Crosscoder,
    *,
    similarity: float | None = 0.5,
    n_groups: int | None = None,
    within: Sequence[str] = ("position",),
) -> Graph:
    """Return the graph with alike features as supernodes, called ``group 1``, ``group 2`` and so on.

    Clusters are joined, the most alike first, by the average similarity of their features (average linkage). Features
    that are in a supernode already, and those alike to none, stay as they are.

    Args:
        graph: The graph.
        by: ``"edges"``: the similarity of two features is the mean of two cosines, of their rows (inputs) and of their
            columns (outputs). A crosscoder: it is the cosine of what their decoders write, summed over the sites
            written, which is what each leaves in the residual stream at last.
        similarity: Clusters are joined while they are at least as alike, from -1 to 1.
        n_groups: If given, join until so many clusters are left, single features counted, however alike.
        within: Columns of the table of nodes, such as ``position``, ``layer``, ``group``; features are grouped only
            where these are equal. Only where ``layer`` is among them has `merged` no circles for certain.
    """
    taken = {node for members in graph.supernodes.values() for node in members}
    free = graph.of_kind("feature") & ~torch.tensor(graph.nodes["id"].isin(taken).to_numpy())
    places = free.nonzero().flatten()
    if isinstance(by, str) and by != "edges":
        raise GraphError(f"features are grouped by 'edges', or by a crosscoder's decoders: give it, not {by!r}")
    alike = _by_edges(graph, places) if isinstance(by, str) else _by_decoders(graph, places, by)
    for column in within:
        if column not in graph.nodes.columns:
            raise GraphError(f"nodes have no column {column!r} to group within: see graph.nodes.columns")
        codes = torch.from_numpy(pd.factorize(graph.nodes[column])[0])[places]
        alike = alike.masked_fill(codes[:, None] != codes, APART)
    names = (name for i in itertools.count(1) if (name := f"group {i}") not in graph.supernodes)
    found = {}
    for members in clusters(alike, similarity, n_groups):
        if len(members) > 1:
            found[next(names)] = graph.ids(places[members])
    return replace(graph, supernodes={**graph.supernodes, **found})


def _by_edges(graph: Graph, places: Tensor) -> Tensor:
    adjacency = graph.adjacency.to("cpu", torch.float64)
    rows, columns = (F.normalize(x, dim=1) for x in (adjacency[places], adjacency[:, places].T))
    return (rows @ rows.T + columns @ columns.T) / 2


def _by_decoders(graph: Graph, places: Tensor, crosscoder: Crosscoder) -> Tensor:
    from clt_plugin.adapters._run import group_labels

    labels = group_labels(crosscoder.wiring)
    table = graph.nodes.iloc[places.numpy()]
    unknown = sorted(set(table["group"]) - set(labels))
    if unknown:
        raise GraphError(f"this crosscoder has no group {unknown[0]!r}: give the one that the graph was made with")
    written = torch.zeros(len(places), crosscoder.d_model, dtype=torch.float64)
    for group, label in enumerate(labels):
        here = torch.tensor((table["group"] == label).to_numpy())
        latents = torch.tensor(table["feature"].to_numpy())[here]
        if len(latents) == 0:
            continue
        if int(latents.max()) >= crosscoder.group_sizes[group]:
            raise GraphError(
                f"this crosscoder has {crosscoder.group_sizes[group]} latents in group {label}, and the graph the "
                f"latent {int(latents.max())}: give the one that the graph was made with"
            )
        vectors = crosscoder.decoder_vectors(group, latents.to(crosscoder.device)).detach().to("cpu", torch.float64)
        written[here] = vectors.unflatten(1, (-1, crosscoder.d_model)).sum(1)
    written = F.normalize(written, dim=1)
    return written @ written.T


# ---------------------------------------------------------------- clustering


def clusters(alike: Tensor, similarity: float | None = 0.5, n_groups: int | None = None) -> list[list[int]]:
    """Join the most alike clusters, by average linkage, and return their members, (n, n) -> clusters in order.

    Args:
        alike: Similarities (n, n), symmetric; `APART` and less is never joined.
        similarity: Join while clusters are at least as alike.
        n_groups: If given, join until so many are left instead.
    """
    if n_groups is None and not (similarity is not None and -1 <= similarity <= 1):
        raise GraphError(f"a similarity is from -1 to 1, not {similarity}; or give n_groups")
    if n_groups is not None and n_groups < 1:
        raise GraphError(f"n_groups is 1 or more, not {n_groups}")
    joins = sorted(_average_linkage(alike), key=lambda join: -join[2])
    # Cosines of equal vectors are 1 but for rounding.
    lowest = -1.5 if n_groups is not None or similarity is None else similarity - 1e-12
    kept = [(one, other) for one, other, value in joins if value >= lowest]
    if n_groups is not None:
        kept = kept[: max(0, len(alike) - n_groups)]
    cluster = torch.arange(len(alike))
    for one, other in kept:
        cluster[cluster == cluster[other]] = cluster[one].clone()
    members: dict[int, list[int]] = {}
    for place, number in enumerate(cluster.tolist()):
        members.setdefault(number, []).append(place)
    return list(members.values())


def _average_linkage(alike: Tensor) -> list[tuple[int, int, float]]:
    """Return all joins, each as a member of one cluster, a member of the other, and their average similarity.

    A chain is followed from each cluster to its nearest until two are each other's nearest, and these are joined. With
    average linkage that gives the same joins as always joining the nearest two of all, in quadratic time (Murtagh
    1983, "A survey of recent advances in hierarchical clustering algorithms").
    """
    n = len(alike)
    alike = alike.clone().fill_diagonal_(-torch.inf)
    size = torch.ones(n, dtype=alike.dtype)
    joins: list[tuple[int, int, float]] = []
    chain: list[int] = []
    live = set(range(n))
    while len(joins) < n - 1:
        if not chain:
            chain = [min(live)]
        here = chain[-1]
        nearest = int(alike[here].argmax())
        if len(chain) > 1 and alike[here, chain[-2]] >= alike[here, nearest]:
            nearest = chain[-2]
        if len(chain) < 2 or nearest != chain[-2]:
            chain.append(nearest)
            continue
        joins.append((nearest, here, float(alike[nearest, here])))
        del chain[-2:]
        live.remove(here)
        joined = (size[nearest] * alike[nearest] + size[here] * alike[here]) / (size[nearest] + size[here])
        size[nearest] += size[here]
        alike[nearest], alike[:, nearest] = joined, joined
        alike[here], alike[:, here] = -torch.inf, -torch.inf
        alike[nearest, nearest] = -torch.inf
    return joins


# ---------------------------------------------------------------- a group as one


def merged(graph: Graph) -> Graph:
    """Return the graph with each supernode as one node, ``supernode_{name}``, labelled by its name.

    A group's edges to others are the sums of its members' edges: over its members as sources, since what they add to a
    target adds up, and over its members as targets, so that its row adds up to the sum of their values. Edges within a
    group leave the matrix and are added to its ``omitted``. So every row still adds up. The node stands at its first
    member's place, layer and position; its weight is the sum of theirs, its activation nan, its feature -1.

    A group of features of several layers can be both before and after another node: its edges then lead round in a
    circle, and influence and paths refuse the graph.
    """
    place_of = torch.arange(len(graph))
    name_at = {}
    for name, members in graph.supernodes.items():
        places = torch.tensor(sorted(map(graph.index, members)))
        place_of[places] = places[0]
        name_at[int(places[0])] = name
    kept, into = place_of.unique(return_inverse=True)
    n = len(kept)
    adjacency = graph.adjacency.to("cpu", torch.float64)
    adjacency = torch.zeros(n, len(graph), dtype=torch.float64).index_add_(0, into, adjacency)
    adjacency = torch.zeros(n, n, dtype=torch.float64).index_add_(1, into, adjacency)

    columns = graph.nodes.drop(columns=["influence", "cumulative_influence"], errors="ignore")
    nodes = columns.iloc[kept.numpy()].reset_index(drop=True)
    sums = columns[["value", "weight", "omitted"]].groupby(into.numpy()).sum(min_count=1)
    nodes[["value", "weight", "omitted"]] = sums.to_numpy()
    nodes["omitted"] += adjacency.diagonal().numpy()
    adjacency.fill_diagonal_(0)
    grouped = [place for place, first in enumerate(kept.tolist()) if first in name_at]
    names = [name_at[int(kept[place])] for place in grouped]
    ids = [f"supernode_{name}" for name in names]
    nodes.loc[grouped, "id"] = ids
    nodes.loc[grouped, "feature"] = -1
    nodes.loc[grouped, "activation"] = float("nan")
    known = set(nodes["id"])
    labels = {node: text for node, text in graph.labels.items() if node in known}
    return replace(
        graph,
        adjacency=adjacency.to(graph.adjacency),
        nodes=nodes,
        labels=labels | dict(zip(ids, names, strict=True)),
        supernodes={},
    )


def as_supernode(graph: Graph, name: str) -> Supernode:
    """Return a supernode's features, whatever their positions, as `clt_plugin.interventions.supernode` has them."""
    from clt_plugin.interventions import supernode

    table = graph.nodes[graph.nodes["id"].isin(graph.members(name))]
    others = table["kind"][table["kind"] != "feature"]
    if len(others):
        raise GraphError(f"the supernode {name!r} has {others.iloc[0]} nodes: only features can be edited")
    features: dict[int | str, list[int]] = {}
    for group, latent in zip(table["group"].tolist(), table["feature"].tolist(), strict=True):
        features.setdefault(group, []).append(latent)
    return supernode(name, {layer: sorted(set(several)) for layer, several in features.items()})
