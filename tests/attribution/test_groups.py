"""Supernodes: found again where they were planted, merged so that rows still add up, and edited as one."""

from __future__ import annotations

import pytest
import torch

from attribution.graphs import drawn, make_graph, node
from attribution.test_scores import rows_add_up
from clt_plugin import Crosscoder, Wiring
from clt_plugin import interventions as iv
from clt_plugin.attribution.graph import GraphError
from clt_plugin.attribution.groups import APART, clusters


def nearest_first(alike: torch.Tensor, least: float, n_groups: int = 1) -> set[frozenset[int]]:
    """Average linkage as it is defined: join the two clusters of the largest mean similarity, again and again."""
    groups = [frozenset([i]) for i in range(len(alike))]
    while len(groups) > n_groups:
        pairs = [(a, b) for i, a in enumerate(groups) for b in groups[:i]]
        mean = {(a, b): float(alike[list(a)][:, list(b)].mean()) for a, b in pairs}
        a, b = max(mean, key=lambda pair: mean[pair])
        if mean[a, b] < least:
            break
        groups = [group for group in groups if group not in (a, b)] + [a | b]
    return set(groups)


def test_clusters_are_joined_nearest_first() -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        vectors = torch.nn.functional.normalize(torch.randn(14, 3, generator=generator, dtype=torch.float64))
        alike = vectors @ vectors.T
        for least in (0.9, 0.3, -0.2):
            assert set(map(frozenset, clusters(alike, least))) == nearest_first(alike, least)
        assert set(map(frozenset, clusters(alike, n_groups=4))) == nearest_first(alike, -1, 4)
        apart = alike.masked_fill(torch.arange(14)[:, None] % 2 != torch.arange(14) % 2, APART)
        assert set(map(frozenset, clusters(apart, n_groups=1))) == {frozenset(range(i, 14, 2)) for i in (0, 1)}
    assert clusters(torch.eye(0)) == []
    assert clusters(torch.ones(3, 3), 1.0) == [[0, 1, 2]]
    for wrong in ({"similarity": 1.5}, {"similarity": None}, {"n_groups": 0}):
        with pytest.raises(GraphError):
            clusters(torch.eye(2), **wrong)


def test_decoders_that_write_alike_are_grouped_across_layers() -> None:
    clt = Crosscoder(Wiring.clt(3), d_model=8, n_latents=6)
    directions = torch.eye(8)[:3]
    chosen = {0: (1, 4), 1: (2, 5), 2: (0, 3)}
    with torch.no_grad():
        for layer, latents in chosen.items():
            for which, latent in enumerate(latents):
                decoder = clt.decoder_view(layer)  # (F, writes, d)
                decoder[latent] = 0.05 * torch.randn(3 - layer, 8)
                # What is left in the residual stream counts, however it is spread over the writes.
                decoder[latent, -1] += (layer + 1) * directions[which]
    rows = [node("feature", layer, 1, group=str(layer), feature=f) for layer, fs in chosen.items() for f in fs]
    rows += [node("feature", 2, 2, group="2", feature=3), node("target", 3, 3, token_id=7, weight=1.0)]
    graph = drawn(rows, {}).grouped(clt, similarity=0.8)
    assert set(graph.supernodes.values()) == {("0_1_1", "1_2_1", "2_0_1"), ("0_4_1", "1_5_1", "2_3_1")}
    anywhere = drawn(rows, {}).grouped(clt, similarity=0.8, within=())
    assert ("0_4_1", "1_5_1", "2_3_1", "2_3_2") in anywhere.supernodes.values()
    by_layer = drawn(rows, {}).grouped(clt, similarity=0.8, within=("layer",))
    assert set(by_layer.supernodes.values()) == {("2_3_1", "2_3_2")}
    # A group made by hand stays, and its members are in no other; names that are taken are not given again.
    mine = drawn(rows, {}).with_supernode("group 1", ["0_1_1", "0_4_1"]).grouped(clt, similarity=0.8)
    assert mine.supernodes["group 1"] == ("0_1_1", "0_4_1")
    assert set(mine.supernodes) == {"group 1", "group 2", "group 3"}
    for other, message in (
        (Crosscoder(Wiring.clt(2), d_model=8, n_latents=6), "has no group '2'"),
        (Crosscoder(Wiring.clt(3), d_model=8, n_latents=5), "has 5 latents in group 1, and the graph the latent 5"),
        ("decoders", "not 'decoders'"),
    ):
        with pytest.raises(GraphError, match=message):
            drawn(rows, {}).grouped(other)
    with pytest.raises(GraphError, match="no column 'head'"):
        drawn(rows, {}).grouped(clt, within=("head",))


def test_features_with_alike_edges_are_grouped() -> None:
    graph = make_graph(seed=1, n_layers=3, n_positions=2, n_features=3)
    twins = graph.nodes.index[(graph.nodes["layer"] == 1) & (graph.nodes["position"] == 1)][:2].tolist()
    adjacency = graph.adjacency.clone()
    adjacency[twins[1]] = 3 * adjacency[twins[0]]
    adjacency[:, twins[1]] = 0.5 * adjacency[:, twins[0]]
    alike = type(graph)(adjacency, graph.nodes, graph.certificate, graph.info)
    assert list(alike.grouped("edges", similarity=0.99).supernodes.values()) == [alike.ids(twins)]
    adjacency[:, twins[1]] *= -1  # what they do is opposite
    assert not alike.grouped("edges", similarity=0.99).supernodes


def test_merged_graphs_still_add_up() -> None:
    graph = make_graph(seed=2, omitted=0.2)
    ids = graph.nodes["id"].tolist()
    features = graph.nodes[graph.nodes["kind"] == "feature"]
    same = features["id"][(features["layer"] == 1) & (features["position"] > 0)].tolist()
    words = [ids[-2], ids[-1]]
    whole = graph.with_supernode("middle", same).with_supernode("words", words).with_label(same[1], "x")
    merged = whole.merged()
    assert len(merged) == len(graph) - (len(same) - 1) - (len(words) - 1)
    assert rows_add_up(merged)
    assert merged.label("supernode_middle") == "middle"
    assert merged.supernodes == {}
    inside, other = [graph.index(name) for name in same], graph.index(ids[0])
    place = merged.index("supernode_middle")
    assert place == inside[0]
    assert float(merged.adjacency[place, merged.index(ids[0])]) == pytest.approx(
        float(graph.adjacency[inside, other].sum())
    )
    last = merged.index("supernode_words")
    assert float(merged.adjacency[last, place]) == pytest.approx(float(graph.adjacency[-2:][:, inside].sum()))
    assert merged.nodes["weight"][last] == pytest.approx(0.9)
    assert merged.nodes["value"][last] == pytest.approx(graph.nodes["value"].iloc[-2:].sum())
    assert float(merged.influence().max()) > 0
    # Groups that edges lead into and out of again, within and without.
    across = [ids[0], same[0], features["id"][features["layer"] == 2].iloc[0]]
    twisted = graph.with_supernode("across", across).merged()
    assert rows_add_up(twisted)
    with pytest.raises(GraphError, match="round in a circle"):
        twisted.influence()
    errors = graph.with_supernode("errors", ["0_-1_0", "0_-1_1"]).merged()
    assert rows_add_up(errors)
    assert graph.merged().nodes.equals(graph.nodes)


def test_a_supernode_is_an_edit() -> None:
    rows = [node("feature", 1, 1, group="1", feature=9), node("feature", 1, 2, group="1", feature=5)]
    rows += [node("feature", 1, 3, group="1", feature=9), node("feature", 2, 1, group="2_1", feature=4)]
    rows += [node("error", 0, 1)]
    graph = drawn(rows, {}).with_supernode("Texas", [0, 1, 2, 3]).with_supernode("noise", [4])
    assert graph.as_supernode("Texas") == iv.supernode("Texas", {1: [5, 9], "2_1": 4})
    edit = iv.scale(group=graph.as_supernode("Texas"), by=0.0)
    assert dict(edit.targets()) == {"1": (5, 9), "2_1": (4,)}
    with pytest.raises(GraphError, match="has error nodes: only features can be edited"):
        graph.as_supernode("noise")
