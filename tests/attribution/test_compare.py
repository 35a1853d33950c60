"""Graphs beside each other, and one graph under several prunings, against counts made edge by edge."""

from __future__ import annotations

import pytest
import torch

from attribution.graphs import drawn, make_graph, node
from clt_plugin.attribution.graph import Graph, GraphError


def changed(graph: Graph, edges: dict[tuple[str, str], float]) -> Graph:
    adjacency = graph.adjacency.clone()
    for (source, target), weight in edges.items():
        adjacency[graph.index(target), graph.index(source)] = weight
    return Graph(adjacency, graph.nodes, graph.certificate, graph.info)


def test_a_graph_does_not_differ_from_itself() -> None:
    graph = make_graph(seed=1, density=0.4)
    found = graph.compare(graph)
    assert set(found.nodes["where"]) == set(found.edges["where"]) == {"both"}
    assert len(found.edges) == int((graph.adjacency != 0).sum())
    assert (found.edges["change"] == 0).all()
    assert (found.nodes["change"] == 0).all()
    assert found.nodes["first"].tolist() == found.nodes["second"].tolist() == graph.nodes["id"].tolist()


def test_what_is_in_one_only_and_what_changed() -> None:
    graph = make_graph(seed=2)
    ids = graph.nodes["id"].tolist()
    other = changed(graph, {("E_10_0", ids[-1]): 0.0, ("E_11_1", ids[-1]): 7.0})
    gone = ids[0]
    other = other.select([name for name in ids if name != gone])
    found = graph.compare(other)
    nodes = found.nodes.set_index("first")
    assert nodes.index[nodes["where"] != "both"].tolist() == [gone]
    assert nodes.loc[gone, "second"] == ""
    assert nodes.loc[gone, "influence_second"] == 0
    assert nodes.loc[gone, "change"] == pytest.approx(-float(graph.influence()[0]))
    edges = found.edges.set_index(["source", "target"])
    ends = ("E_11_1", ids[-1])
    before = float(graph.adjacency[-1, graph.index("E_11_1")])
    assert edges.loc[ends, ["weight_first", "weight_second", "change"]].tolist() == [before, 7.0, 7.0 - before]
    lost = {(s, t) for s, t in edges.index[edges["where"] == "first"]}
    assert lost == {("E_10_0", ids[-1])} | {(gone, ids[int(t)]) for t in graph.adjacency[:, 0].nonzero()} | {
        (ids[int(s)], gone) for s in graph.adjacency[0].nonzero()
    }
    assert (edges["where"] == "second").sum() == 0
    back = other.compare(graph).edges.set_index(["source", "target"])
    assert {(s, t) for s, t in back.index[back["where"] == "second"]} == lost
    assert back["change"].to_dict() == (-edges["change"]).to_dict()
    assert found.edges["change"].abs().is_monotonic_decreasing
    assert "in the first only" in str(found)


def beside(feature: int) -> Graph:
    rows = [node("feature", 1, 1, group="1", feature=feature), node("embedding", -1, 0, token_id=2)]
    rows += [node("target", 3, 3, token_id=7, weight=1.0)]
    name = f"1_{feature}_1"
    return drawn(rows, {("E_2_0", name): 2.0, (name, "4_7_3"): 3.0, ("E_2_0", "4_7_3"): feature})


def test_features_are_matched_as_asked() -> None:
    first, second = beside(5), beside(5)
    apart = first.compare(second, features="none")
    assert apart.nodes["where"].value_counts().to_dict() == {"both": 2, "first": 1, "second": 1}
    found = {(row.source, row.target, row.where) for row in apart.edges.itertuples()}
    assert found == {
        ("E_2_0", "4_7_3", "both"),
        ("E_2_0", "1_5_1", "first"),
        ("1_5_1", "4_7_3", "first"),
        ("E_2_0", "1_5_1 (second)", "second"),
        ("1_5_1 (second)", "4_7_3", "second"),
    }
    paired = beside(5).compare(beside(6), features={"1_5_1": "1_6_1"})
    assert set(paired.nodes["where"]) == {"both"}
    changes = {(row.source, row.target): row.change for row in paired.edges.itertuples()}
    assert changes == {("E_2_0", "1_5_1"): 0.0, ("1_5_1", "4_7_3"): 0.0, ("E_2_0", "4_7_3"): 1.0}
    assert (beside(5).compare(beside(6)).nodes["where"] != "both").sum() == 2
    for wrong, message in (
        ("name", "not 'name'"),
        ({"1_5_1": "E_2_0"}, "ids of features to ids of features"),
        ({"1_9_1": "1_6_1"}, "there is no node '1_9_1'"),
    ):
        with pytest.raises(GraphError, match=message):
            beside(5).compare(beside(6), features=wrong)


def test_prompts_shifted_against_each_other() -> None:
    def at(position: int) -> Graph:
        name = f"1_5_{position}"
        rows = [node("feature", 1, position, group="1", feature=5), node("error", 0, position)]
        rows += [node("bias"), node("target", 3, position + 1, token_id=7, weight=1.0)]
        return drawn(rows, {(f"0_-1_{position}", name): 2.0, ("bias", name): 1.0, (name, f"4_7_{position + 1}"): 3.0})

    same = at(2).compare(at(11), positions={2: 11, 3: 12})
    assert set(same.nodes["where"]) == set(same.edges["where"]) == {"both"}
    assert same.nodes["second"].tolist() == ["1_5_11", "0_-1_11", "bias", "4_7_12"]
    for other, moved in ((11, 12), (2, 3)):
        partly = at(2).compare(at(other), positions={3: moved})
        assert partly.nodes["where"].value_counts().to_dict() == {"both": 2, "first": 2, "second": 2}
    two = drawn([node("feature", 1, position, group="1", feature=5) for position in (1, 2)], {})
    with pytest.raises(GraphError, match="two nodes of the first graph would be 1_5_2 of the second"):
        two.compare(at(2), positions={1: 2, 2: 2})


def test_edge_stability_counts_prunings() -> None:
    graph = make_graph(seed=3, n_layers=4)
    settings = [{"node_threshold": n, "edge_threshold": e} for n in (0.4, 0.8, 1.0) for e in (0.5, 1.0)]
    found = graph.edge_stability(settings)
    counts: dict[tuple[str, str], int] = {}
    for number, each in enumerate(settings):
        pruned = graph.prune(**each)
        ids, left = pruned.nodes["id"].tolist(), 0
        for target, source in pruned.adjacency.nonzero().tolist():
            if ids[source] != "bias":
                counts[ids[source], ids[target]] = counts.get((ids[source], ids[target]), 0) + 1
                left += 1
        assert found.sizes[number] == left
    table = {(row.source, row.target): row.survives for row in found.edges.itertuples()}
    assert table == counts
    assert 0 < sum(n == 6 for n in counts.values()) < len(counts)
    assert found.edges["survives"].is_monotonic_decreasing
    assert found.edges["share"].tolist() == (found.edges["survives"] / 6).tolist()
    row = found.edges.iloc[0]
    assert row["weight"] == float(graph.adjacency[graph.index(row["target"]), graph.index(row["source"])])
    bars = found.plot().axes[0].patches
    assert [bar.get_height() for bar in bars] == [sum(n == i for n in counts.values()) for i in range(1, 7)]
    assert "survive in all of 6 prunings" in str(found)
    assert len(graph.edge_stability().settings) == 15
    with pytest.raises(GraphError, match="no settings"):
        graph.edge_stability([])


def test_weights_of_any_dtype_compare() -> None:
    graph = make_graph(seed=4, dtype=torch.bfloat16)
    assert (graph.compare(graph.prune()).edges["change"] <= 1e9).all()
    assert len(graph.edge_stability([{}]).edges) > 0
