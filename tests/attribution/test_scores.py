"""Influence, pruning and scores, against a dense inverse and rules applied by hand, node by node."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch

import clt_plugin as cp
from attribution.graphs import drawn, make_graph, node
from attribution.oracle import clt_of, exact, model_of
from clt_plugin.attribution.graph import Graph, GraphError
from clt_plugin.attribution.scores import cumulative_share, in_order, largest, least_kept

SHAPES = [{"seed": 0}, {"seed": 1, "density": 0.3}, {"seed": 2, "bias": False, "n_layers": 5, "n_features": 1}]


def ahat(graph: Graph) -> torch.Tensor:
    """Row-normalised |A| without the bias, dense."""
    size = graph.adjacency.abs()
    size[:, torch.tensor((graph.nodes["kind"] == "bias").to_numpy())] = 0
    return torch.nan_to_num(size / size.sum(1, keepdim=True))


def weights(graph: Graph) -> torch.Tensor:
    return torch.tensor(graph.nodes["weight"].to_numpy())


def rows_add_up(graph: Graph) -> bool:
    left = torch.tensor((graph.nodes["value"] - graph.nodes["omitted"]).to_numpy())
    targets = graph.of_kind("feature", "target")
    return torch.allclose(graph.adjacency.sum(1)[targets], left[targets], atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_influence_is_the_dense_inverse(shape: dict[str, float]) -> None:
    graph = make_graph(**shape)
    shares = ahat(graph)
    eye = torch.eye(len(graph), dtype=torch.float64)
    expected = weights(graph) @ (torch.linalg.inv(eye - shares) - eye)
    found = graph.influence()
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    edges = shares * (expected + weights(graph))[:, None]
    torch.testing.assert_close(graph.edge_scores(), edges, atol=1e-12, rtol=1e-12)
    # What leaves a node by its edges is what influence arrived at it.
    torch.testing.assert_close(graph.edge_scores().sum(0), found, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("clt", ["a sum", "two reads"])
def test_traced_graphs_are_read_in_their_own_order(clt: str) -> None:
    # Groups that share a layer or read several sites.
    hf = model_of("gpt2")
    with exact(hf):
        graph = cp.attribute(hf, [0, 5, 17, 33], clt=clt_of(clt))
    shares, eye = ahat(graph), torch.eye(len(graph), dtype=torch.float64)
    expected = weights(graph) @ (torch.linalg.inv(eye - shares) - eye)
    torch.testing.assert_close(graph.influence(), expected, atol=1e-14, rtol=1e-12)
    assert in_order(graph).tolist() == graph.of_kind("feature", "target").nonzero().flatten().tolist()


def test_influence_does_not_depend_on_how_rows_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = make_graph(seed=3)
    expected, scores = graph.influence(), graph.scores()
    monkeypatch.setattr("clt_plugin.attribution.scores.BLOCK", 1)  # row by row
    torch.testing.assert_close(graph.influence(), expected, atol=1e-14, rtol=1e-14)
    assert graph.scores().completeness == pytest.approx(scores.completeness, abs=1e-14)
    torch.manual_seed(0)
    order = torch.randperm(len(graph))
    mixed = Graph(
        graph.adjacency[order][:, order], graph.nodes.iloc[order.numpy()], graph.certificate, graph.info
    )  # an order of nodes in which rows depend on later rows
    torch.testing.assert_close(mixed.influence(), expected[order], atol=1e-14, rtol=1e-14)


def test_the_bias_stands_outside() -> None:
    graph = make_graph(seed=4)
    bias = graph.index("bias")
    loud = graph.adjacency.clone()
    loud[:, bias] *= 1000
    other = Graph(loud, graph.nodes, graph.certificate, graph.info)
    assert torch.equal(other.influence(), graph.influence())
    assert other.scores() == graph.scores()
    assert graph.influence()[bias] == 0
    pruned = other.prune(0.5, 0.5)
    kept = [graph.index(name) for name in pruned.nodes["id"]]
    assert torch.equal(pruned.adjacency[:, pruned.index("bias")], loud[kept, bias])


def pruned_by_hand(graph: Graph, node_share: float, edge_share: float, prune_errors: bool) -> set[tuple[str, str]]:
    """Return the nodes (twice) and the edges (target, source) that the rules of `prune` keep, one thing at a time."""

    def best(scores: dict, share: float) -> set:
        kept, held, whole = set(), 0.0, sum(scores.values())
        for key in sorted(scores, key=lambda key: -scores[key]):
            if held >= share * whole:
                break
            kept.add(key)
            held += scores[key]
        return kept

    ids, kind = graph.nodes["id"].tolist(), dict(zip(graph.nodes["id"], graph.nodes["kind"], strict=True))
    prunable = {"feature", "error"} if prune_errors else {"feature"}
    nodes = best(dict(zip(ids, graph.influence().tolist(), strict=True)), node_share)
    nodes |= {name for name in ids if kind[name] not in prunable}
    left = graph.select(sorted(nodes))
    names, scores = left.nodes["id"].tolist(), left.edge_scores().tolist()
    scored = {(t, s): scores[i][j] for i, t in enumerate(names) for j, s in enumerate(names) if scores[i][j] > 0}
    edges = best(scored, edge_share)
    while True:
        fed, used = {t for t, _ in edges}, {s for _, s in edges}
        gone = {n for n in nodes if kind[n] == "feature" and not (n in fed and n in used)}
        gone |= {n for n in nodes if kind[n] == "error" and prune_errors and n not in used}
        if not gone:
            break
        nodes -= gone
        edges = {(t, s) for t, s in edges if t not in gone and s not in gone}
    biased = {(t, "bias") for t in nodes if "bias" in kind and graph.adjacency[graph.index(t), graph.index("bias")]}
    return {(n, n) for n in nodes} | edges | biased


@pytest.mark.parametrize("prune_errors", [False, True])
@pytest.mark.parametrize(("node_share", "edge_share"), [(0.8, 0.98), (0.5, 0.6), (0.95, 0.2)])
def test_pruning_follows_its_rules(node_share: float, edge_share: float, prune_errors: bool) -> None:
    dropped = 0
    for seed in range(4):
        graph = make_graph(seed=seed, n_layers=4, density=0.6, omitted=0.1)
        pruned = graph.prune(node_share, edge_share, prune_errors=prune_errors)
        ids = pruned.nodes["id"].tolist()
        found = {(name, name) for name in ids}
        found |= {(ids[t], ids[s]) for t, s in pruned.adjacency.nonzero().tolist()}
        assert found == pruned_by_hand(graph, node_share, edge_share, prune_errors)
        assert rows_add_up(graph)
        assert rows_add_up(pruned)
        places = [graph.index(name) for name in ids]
        assert places == sorted(places)
        assert pruned.nodes["influence"].tolist() == graph.influence()[places].tolist()
        assert pruned.info.pruning == {
            "node_threshold": node_share,
            "edge_threshold": edge_share,
            "prune_errors": prune_errors,
        }
        by_share = graph.select(largest(graph.influence(), node_share) | ~graph.of_kind("feature"))
        dropped += int(by_share.of_kind("feature").sum() - pruned.of_kind("feature").sum())
    assert edge_share == 0.98 or dropped > 0  # features did lose their last edge


def test_cumulative_influence_is_the_share_at_which_a_node_is_kept() -> None:
    graph = make_graph(seed=5, n_positions=2)
    assert len(graph.nodes) == 12 + 6 + 2 + 1 + 2
    whole = graph.prune(1.0, 1.0).nodes.set_index("id")
    features = whole[whole["kind"] == "feature"]
    for name, row in features.iterrows():
        kept = graph.prune(min(1.0, row["cumulative_influence"] + 1e-9), 1.0).nodes["id"].tolist()
        at_least = features.index[features["influence"] >= row["influence"]]
        assert set(at_least) <= set(kept)
        before = row["cumulative_influence"] - row["influence"] / graph.influence().sum()
        assert name not in graph.prune(max(0.0, before - 1e-9), 1.0).nodes["id"].tolist()


def test_equal_scores_share_their_fate() -> None:
    scores = torch.tensor([1.0, 2.0, 0.0, 2.0, 1.0, 2.0, 0.0])
    assert largest(scores, 0.1).tolist() == [False, True, False, True, False, True, False]
    assert largest(scores, 6 / 8).tolist() == largest(scores, 0.1).tolist()
    assert largest(scores, 0.76).tolist() == (scores > 0).tolist() == largest(scores, 1.0).tolist()
    assert not largest(scores, 0.0).any()
    assert cumulative_share(scores).tolist() == [1, 0.75, 1, 0.75, 1, 0.75, 1]
    assert cumulative_share(torch.zeros(3)).tolist() == [1, 1, 1]
    assert not largest(torch.zeros(3), 0.8).any()
    # A share that is reached exactly needs no more.
    assert largest(torch.tensor([1.9375, 1.03125, 1.0, 0.03125]), 2.96875 / 4).tolist() == [True, True, False, False]


def test_features_that_lose_their_input_go_one_after_another() -> None:
    chain = [node("feature", layer, 1, group=str(layer), feature=5) for layer in range(3)]
    edges = {("0_5_1", "1_5_1"): 1.0, ("1_5_1", "2_5_1"): 1.0, ("2_5_1", "4_7_3"): 1.0, ("E_2_1", "4_7_3"): 1.0}
    graph = drawn([*chain, EMBEDDING, LOGIT], edges)  # nothing enters the first
    assert graph.prune(1.0, 1.0).nodes["id"].tolist() == ["E_2_1", "4_7_3"]


def test_what_is_kept_is_what_sorting_keeps() -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 30.0):  # within an octave or two, and over hundreds
        scores = torch.exp2(scale * torch.randn(40, 50, generator=generator, dtype=torch.float64))
        scores *= torch.rand(40, 50, generator=generator) < 0.7
        falling = scores.flatten().sort(descending=True).values
        held = torch.cat([falling.new_zeros(1), falling.cumsum(0)[:-1]])
        for threshold in (1e-12, 0.3, 0.8, 0.98, 1 - 1e-9):
            least = falling[held < threshold * falling.sum()][-1]
            assert torch.equal(largest(scores, threshold), scores >= least)
            parts = scores.split([1, 20, 0, 19])
            assert least_kept(lambda parts=parts: parts, threshold) == float(least)


LOGIT = node("target", 3, 3, token=" Austin", token_id=7, weight=0.5)
ERROR, FEATURE = node("error", 0, 1), node("feature", 1, 1, group="1", feature=5)
EMBEDDING, BIAS = node("embedding", -1, 1, token="The", token_id=2), node("bias")
FIXTURES = {
    # what feeds the logit: (edges), replacement, completeness, the same counting nodes without inputs
    "error only": ([ERROR, LOGIT], {("0_-1_1", "4_7_3"): 2.0}, 0.0, 0.0, 0.5),
    "chain": ([FEATURE, ERROR, LOGIT], {("0_-1_1", "1_5_1"): 3.0, ("1_5_1", "4_7_3"): -2.0}, 0.0, 0.5, 2 / 3),
    "no error": (
        [FEATURE, EMBEDDING, LOGIT],
        {("E_2_1", "1_5_1"): 3.0, ("1_5_1", "4_7_3"): -2.0, ("E_2_1", "4_7_3"): 6.0},
        *(1.0, 1.0, 1.0),
    ),
    # The logit has 1/4 from the error and 3/4 from the feature, of which 1/3 is error: influences are 3/4, 1/2, 1/2.
    "mixed": (
        [FEATURE, ERROR, EMBEDDING, LOGIT],
        {("0_-1_1", "4_7_3"): -1.0, ("1_5_1", "4_7_3"): 3.0, ("0_-1_1", "1_5_1"): 1.0, ("E_2_1", "1_5_1"): 2.0},
        *(1 / 2, (3 / 4 + 3 / 4 * 2 / 3) / (7 / 4), (3 / 4 + 3 / 4 * 2 / 3 + 1 / 2 + 1 / 2) / (7 / 4 + 1)),
    ),
    # A feature that only the bias feeds is neither complete nor incomplete.
    "bias fed": (
        [FEATURE, ERROR, BIAS, LOGIT],
        {("bias", "1_5_1"): 1.0, ("1_5_1", "4_7_3"): 1.0, ("0_-1_1", "4_7_3"): 1.0},
        *(0.0, 0.5, (0.5 + 0.5 + 0.5) / 2),
    ),
    "nothing": ([FEATURE, ERROR, LOGIT], {}, math.nan, math.nan, 1.0),
}


@pytest.mark.parametrize("name", FIXTURES)
def test_scores_of_graphs_drawn_by_hand(name: str) -> None:
    rows, edges, replacement, completeness, counting = FIXTURES[name]
    scores = drawn(rows, edges).scores()
    assert scores.replacement == pytest.approx(replacement, nan_ok=True)
    assert scores.completeness == pytest.approx(completeness, nan_ok=True)
    assert scores.completeness_counting_inputless_nodes == pytest.approx(counting)
    assert f"completeness {completeness:.3f}" in str(scores)


def test_a_graph_without_influence_behaves() -> None:
    rows, edges, *_ = FIXTURES["nothing"]
    graph = drawn(rows, edges)
    assert graph.influence().tolist() == [0, 0, 0]
    pruned = graph.prune()
    assert pruned.nodes["id"].tolist() == ["0_-1_1", "4_7_3"]
    assert graph.prune(prune_errors=True).nodes["id"].tolist() == ["4_7_3"]
    assert pruned.nodes["cumulative_influence"].tolist() == [1, 1]
    empty = Graph(graph.adjacency[:0, :0], graph.nodes.iloc[:0], graph.certificate, graph.info)
    assert len(empty.prune()) == 0


def test_what_pruning_refuses() -> None:
    graph = make_graph()
    with pytest.raises(GraphError, match=r"node_threshold is a share from 0 to 1, not 80"):
        graph.prune(80)
    with pytest.raises(GraphError, match=r"edge_threshold is a share"):
        graph.prune(0.8, -0.1)
    circle = graph.adjacency.clone()
    circle[0, -1] = 1.0
    with pytest.raises(GraphError, match="round in a circle"):
        Graph(circle, graph.nodes, graph.certificate, graph.info).influence()


def test_a_graph_of_many_nodes() -> None:
    # Deep and wide enough that a pass a power of Ahat, or a dense inverse, would be felt.
    graph = make_graph(n_layers=12, n_positions=6, n_features=20, dtype=torch.float32)
    assert len(graph) > 1500
    found = graph.influence()
    # All that reaches the embeddings and errors, where paths end, is all that the targets had.
    ends = graph.of_kind("embedding", "error")
    assert float(found[ends].sum()) == pytest.approx(float(weights(graph).sum()), abs=1e-9)
    table = graph.prune().nodes
    assert isinstance(table, pd.DataFrame)
    assert table["cumulative_influence"].between(0, 1).all()
