"""The graph as people ask it: nodes, labels, parts, neighbours, paths, contributions."""

from __future__ import annotations

import math
from dataclasses import replace

import networkx
import pandas as pd
import pytest
import torch

from attribution.graphs import drawn, make_certificate, make_graph, make_info, node
from attribution.test_scores import ahat, rows_add_up
from clt_plugin.attribution.graph import Graph, GraphError


def test_labels_say_what_nodes_are() -> None:
    graph = make_graph(seed=1)
    at = {kind: graph.nodes["id"][graph.nodes["kind"] == kind].iloc[-1] for kind in set(graph.nodes["kind"])}
    latent = graph.nodes["feature"][graph.nodes["id"] == at["feature"]].iloc[0]
    assert graph.label(at["feature"]) == f'feature 2.{latent} at " of"'
    assert graph.label(at["error"]) == 'error of layer 2 at " of"'
    assert graph.label(at["embedding"]) == 'embedding of " of"'
    assert graph.label("bias") == "bias"
    assert graph.label(-1) == 'logit of " word1"'
    special = node("target", 3, 3, id="target_direction_0", weight=1.0)
    bare = drawn([node("feature", 1, 2, group="1_2", feature=7), node("embedding", -1, 0, token_id=9), special], {})
    assert [bare.label(i) for i in range(3)] == [
        "feature 1_2.7 at position 2",
        "embedding of token 9",
        "target_direction_0",
    ]
    named = graph.with_label(at["error"], "noise").with_labels({"bias": "constants"})
    assert (named.label(at["error"]), named.label("bias"), graph.label("bias")) == ("noise", "constants", "bias")
    assert named.with_label("bias", "").label("bias") == "bias"
    with pytest.raises(GraphError, match=r"there is no node '9_9_9': ids are such as 0_"):
        graph.with_label("9_9_9", "x")


def test_nodes_are_found_by_id_place_and_mask() -> None:
    graph = make_graph()
    ids = graph.nodes["id"].tolist()
    assert graph.index(ids[7]) == graph.index(7) == graph.index(7 - len(graph)) == 7
    late = graph.nodes["position"] == 3
    expected = graph.nodes["id"][late].tolist()
    for way in (late, late.to_numpy(), torch.tensor(late.to_numpy()), late.tolist(), expected, late[late].index):
        assert graph.select(way).nodes["id"].tolist() == expected
    assert graph.ids(3) == (ids[3],)
    assert len(graph.select([])) == 0
    for wrong, message in (
        (len(graph), "there is no node"),
        ([True, False], "a mask over 43 nodes has as many entries"),
        ("x", "no node 'x'"),
    ):
        with pytest.raises(GraphError, match=message):
            graph.select(wrong)
    with pytest.raises(GraphError, match="no 'logit'"):
        graph.of_kind("logit")


def test_what_is_no_graph_is_refused() -> None:
    graph = make_graph()
    rest = (graph.certificate, graph.info)
    with pytest.raises(GraphError, match=r"43 nodes have an adjacency of \(43, 43\), not \(42, 43\)"):
        Graph(graph.adjacency[1:], graph.nodes, *rest)
    with pytest.raises(GraphError, match="lacks omitted"):
        Graph(graph.adjacency, graph.nodes.drop(columns="omitted"), *rest)
    twice = graph.nodes.assign(id=["bias", *graph.nodes["id"][1:]])
    with pytest.raises(GraphError, match="two nodes have the id 'bias'"):
        Graph(graph.adjacency, twice, *rest)
    for settings, words in (
        ({"labels": {"bias": 3}}, "a label is a text, not 3"),
        ({"supernodes": {3: ("bias",)}}, "a supernode's name is a text, not 3"),
    ):
        with pytest.raises(GraphError, match=words):
            replace(graph, **settings)
    with pytest.raises(GraphError, match="there is no 'logit'"):
        Graph(graph.adjacency, graph.nodes.replace({"kind": {"target": "logit"}}), *rest)
    with pytest.raises(GraphError, match="there is no node 'x'"):
        Graph(graph.adjacency, graph.nodes, *rest, supernodes={"a": ("x",)})


def test_a_part_keeps_what_it_can() -> None:
    graph = make_graph(seed=2, omitted=0.3)
    first, second, third = graph.nodes["id"][:3]
    graph = graph.with_label(first, "one").with_label(third, "three")
    graph = graph.with_supernode("both", [second, first]).with_supernode("gone", third)
    part = graph.select([i for i in range(len(graph)) if i != 2])
    assert part.supernodes == {"both": (first, second)}
    assert part.labels == {first: "one"}
    keep = [i for i in range(len(graph)) if i != 2]
    assert torch.equal(part.adjacency, graph.adjacency[keep][:, keep])
    assert rows_add_up(part)
    edges = graph.adjacency > 0
    half = graph.select_edges(edges)
    assert torch.equal(half.adjacency, graph.adjacency.clamp(min=0))
    assert rows_add_up(half)
    assert half.supernodes == graph.supernodes
    with pytest.raises(GraphError, match="edges have a mask"):
        graph.select_edges(edges[1:])


def test_supernodes_are_of_one_kind_and_apart() -> None:
    graph = make_graph()
    features = graph.nodes["id"][:4].tolist()
    graph = graph.with_supernode("a", features[:2])
    assert graph.with_supernode("a", features[1:3]).members("a") == tuple(features[1:3])
    with pytest.raises(GraphError, match=f"{features[1]} is in the supernode 'a' already"):
        graph.with_supernode("b", features[1:])
    with pytest.raises(GraphError, match="'b' would have error, feature"):
        graph.with_supernode("b", [features[3], "0_-1_0"])
    with pytest.raises(GraphError, match="would have none"):
        graph.with_supernode("b", [])
    assert graph.without_supernode("a").supernodes == {}
    with pytest.raises(GraphError, match="there is no supernode 'b': there are a"):
        graph.without_supernode("b")


def test_a_subgraph_is_what_paths_run_through() -> None:
    graph = make_graph(seed=3, density=0.15, n_layers=4)
    network = graph.to_networkx()
    end, start = graph.nodes["id"].iloc[-1], graph.nodes["id"][graph.of_kind("embedding").numpy()].iloc[0]
    before = networkx.ancestors(network, end) | {end}
    assert set(graph.subgraph(end).nodes["id"]) == before
    assert len(before) < len(graph)
    between = before & (networkx.descendants(network, start) | {start})
    assert set(graph.subgraph(end, start).nodes["id"]) == between


def test_networkx_has_it_all() -> None:
    graph = make_graph(seed=1, density=0.5, dtype=torch.float32).with_label("bias", "constants")
    graph = graph.with_supernode("pair", graph.nodes["id"][:2].tolist())
    network = graph.to_networkx()
    ids = graph.nodes["id"].tolist()
    assert list(network) == ids
    dense = networkx.to_numpy_array(network, nodelist=ids).T  # row = target
    assert torch.equal(torch.tensor(dense, dtype=torch.float32), graph.adjacency)
    assert network.nodes[ids[0]]["supernode"] == "pair"
    assert "supernode" not in network.nodes[ids[2]]
    assert network.nodes["bias"] | {"kind": "bias", "label": "constants"} == network.nodes["bias"]
    assert network.graph["prompt"] == graph.info.prompt
    assert type(network.nodes[ids[0]]["layer"]) is int


def test_neighbours_are_rows_and_columns() -> None:
    graph = make_graph(seed=4)
    middle = graph.nodes["id"][(graph.nodes["layer"] == 1) & (graph.nodes["kind"] == "feature")].iloc[-1]
    place = graph.index(middle)
    shares = ahat(graph)
    inputs = graph.inputs(middle, k=None)
    assert inputs["weight"].abs().is_monotonic_decreasing
    assert {"feature", "error", "embedding", "bias"} == set(inputs["kind"])
    assert inputs["weight"].sum() == pytest.approx(float(graph.adjacency[place].sum()))
    outputs = graph.outputs(middle, k=3)
    assert outputs["weight"].abs().tolist() == graph.adjacency[:, place].abs().topk(3).values.tolist()
    for table, row in ((inputs, True), (outputs, False)):
        for entry in table.itertuples():
            t, s = (place, graph.index(entry.id)) if row else (graph.index(entry.id), place)
            assert entry.weight == float(graph.adjacency[t, s])
            assert entry.label == graph.label(entry.id)
            if entry.kind == "bias":
                assert math.isnan(entry.share)
            else:
                assert entry.share == pytest.approx(float(shares[t, s]))
    assert graph.outputs("bias", k=2)["share"].isna().all()
    none = graph.inputs(graph.nodes["id"][graph.of_kind("embedding").numpy()].iloc[0])
    assert len(none) == 0
    assert list(none) == list(inputs)


def test_paths_are_the_strongest_of_all() -> None:
    graph = make_graph(seed=5, density=0.5, n_positions=3)
    shares, network = ahat(graph), graph.to_networkx()
    end = graph.nodes["id"].iloc[-1]
    for start, least in ((graph.nodes["id"].iloc[0], 5), ("E_10_0", 20), ("0_-1_1", 2)):
        every = []
        for way in networkx.all_simple_paths(network, start, end):
            places = [graph.index(name) for name in way]
            edges = list(zip(places[1:], places[:-1], strict=True))
            strength = math.prod(float(shares[t, s]) for t, s in edges)
            every.append((strength, math.prod(math.copysign(1, graph.adjacency[t, s]) for t, s in edges), tuple(way)))
        every.sort(reverse=True)
        assert len(every) >= least
        for k in (1, 4, 10**9):  # memory is of what is found, not of k
            found = graph.paths(start, end, k=k)
            assert [(path.nodes, path.sign) for path in found] == [(way, sign) for _, sign, way in every[:k]]
            assert [path.share for path in found] == pytest.approx([strength for strength, *_ in every[:k]])
        assert found[0].labels[0] in str(found[0])
        # All of them together are the influence of the start on this target alone.
        alone = Graph(
            graph.adjacency, graph.nodes.assign(weight=(graph.nodes["id"] == end) * 1.0), graph.certificate, graph.info
        )
        assert sum(path.share for path in found) == pytest.approx(float(alone.influence()[graph.index(start)]))
    assert graph.paths(end, "E_10_0") == []
    assert graph.paths("E_12_2", "0_-1_1") == []


def test_what_paths_refuse() -> None:
    graph = make_graph()
    with pytest.raises(GraphError, match="not from bias to itself"):
        graph.paths("bias", "bias")
    with pytest.raises(GraphError, match="no path starts at the bias"):
        graph.paths("bias", -1)
    with pytest.raises(GraphError, match="1 or more, not 0"):
        graph.paths(0, -1, k=0)
    for k in (0, -1):
        with pytest.raises(GraphError, match=f"or None for all, not {k}"):
            graph.inputs(0, k=k)


def test_cumulative_contribution_counts_positive_edges_from_features() -> None:
    a, b, c = (node("feature", layer, 1, group=str(layer), feature=5) for layer in range(3))
    aside = node("feature", 0, 2, group="0", feature=6)
    rows = [a, aside, b, c, node("error", 0, 1), node("embedding", -1, 1, token_id=2)]
    rows += [node("target", 3, 3, token_id=7, weight=0.3), node("target", 3, 3, token_id=8, weight=0.6)]
    edges = {("E_2_1", "0_5_1"): 9.0, ("0_-1_1", "1_5_1"): 9.0}  # not from features
    edges |= {("0_5_1", "1_5_1"): 2.0, ("0_5_1", "4_8_3"): 1.0, ("1_5_1", "2_5_1"): 4.0, ("2_5_1", "4_8_3"): 5.0}
    edges |= {("1_5_1", "4_8_3"): -8.0, ("0_5_1", "2_5_1"): -8.0}  # not positive
    edges |= {("0_6_2", "4_7_3"): 100.0, ("2_5_1", "4_7_3"): 100.0}  # not of the top logit's circuit
    graph = drawn(rows, edges)
    found = graph.cumulative_contribution()
    assert (found.target, found.edges) == ("4_8_3", "circuit")
    assert found.table["share"].tolist() == pytest.approx([3 / 12, 4 / 12, 5 / 12])
    assert found.table["cumulative"].tolist() == pytest.approx([3 / 12, 7 / 12, 1])
    direct = graph.cumulative_contribution(edges="target")
    assert direct.table["cumulative"].tolist() == pytest.approx([1 / 6, 1 / 6, 1])
    other = graph.cumulative_contribution("4_7_3", "target")
    assert other.table["share"].tolist() == pytest.approx([0.5, 0, 0.5])
    assert "4_8_3" in str(found)
    lines = found.plot(other=other).axes[0].lines
    assert [list(line.get_ydata()) for line in lines[1:]] == [list(x.table["cumulative"]) for x in (found, other)]
    assert graph.cumulative_contribution("0_5_1").table["share"].isna().all()
    with pytest.raises(GraphError, match="not 'all'"):
        graph.cumulative_contribution(edges="all")
    with pytest.raises(GraphError, match="has no target"):
        graph.select([0, 1]).cumulative_contribution()


def test_repr_counts() -> None:
    graph = make_graph()
    counts = "24 feature, 12 error, 4 embedding, 1 bias, 2 target nodes"
    assert repr(graph).startswith(f"<Graph of '<bos>The capital of': {counts}; ")
    assert repr(graph.prune()).endswith("pruned>")


def test_the_table_has_one_form_whatever_it_was_made_from() -> None:
    row = node("target", 3, 3, token_id=7, weight=1) | {"value": 2}
    table = pd.DataFrame([row], index=[17], dtype=object)
    graph = Graph(torch.zeros(1, 1), table, make_certificate(), make_info(3, 4))
    assert graph.index("4_7_3") == 0
    assert graph.nodes.dtypes.to_dict() == make_graph().nodes.dtypes.to_dict()
