"""Graphs as JSON: the schema, the numbers against the graph itself, a file worked out by hand, the viewer's folder."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from attribution.graphs import drawn, make_graph, node
from clt_plugin.attribution.files.export import cantor, graph_data, pruned_for_view, to_json, to_viewer
from clt_plugin.attribution.files.notes import with_notes
from clt_plugin.attribution.files.schema import GRAPH_SCHEMA
from clt_plugin.attribution.graph import Graph, GraphError
from clt_plugin.core.aside import written_aside

VALIDATOR = jsonschema.Draft7Validator(GRAPH_SCHEMA)


def errors(data: dict[str, Any]) -> list[str]:
    return [error.message for error in VALIDATOR.iter_errors(data)]


def strange_graph() -> Graph:
    """Return a graph of everything: ids that once collided, other targets, hostile tokens, labels, supernodes."""
    rows = [
        node("feature", 0, 1, feature=2, group="0", token=' "\n', activation=1.5),
        node("feature", 2, 1, feature=7, group="2", token=' "\n', activation=0.5),
        node("error", 2, 1, token=' "\n'),
        node("embedding", -1, 0, token="</script>", token_id=3),
        node("embedding", -1, 1, token=' "\n', token_id=4),
        node("bias"),
        node("target", 3, 1, token=' "a"\n', token_id=9, weight=0.5),
        node("target", 3, 1, id="target_logit_9-8_1", weight=0.25),
        node("target", 1, 0, id="target_feature_1_5_0", weight=0.25),
    ]
    last = {"target_logit_9-8_1": 2.0, "4_9_1": -1.0}
    edges = {("2_7_1", name): weight for name, weight in last.items()}
    edges |= {("0_2_1", "2_7_1"): 3.0, ("E_4_1", "0_2_1"): 1.0, ("2_-1_1", "4_9_1"): 0.5, ("bias", "0_2_1"): 7.0}
    edges |= {("E_3_0", "target_feature_1_5_0"): -2.0}
    graph = drawn(rows, edges)
    info = replace(
        graph.info, prompt='</script> "\n', tokens=("</script>", ' "\n'), settings={"max_feature_nodes": None}
    )
    graph = replace(graph, info=info, labels={"2_7_1": 'say "x"', "target_logit_9-8_1": "9\nover 8"})
    return graph.with_supernode("both", ["0_2_1", "2_7_1"])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("thresholds", [(0.8, 0.98), (None, None)])
@pytest.mark.parametrize("make", [strange_graph, lambda: make_graph(3, omitted=0.1, dtype=torch.bfloat16)])
def test_what_is_written_keeps_the_schema(tmp_path: Path, make: Any, thresholds: Any, bias: bool) -> None:
    path = to_json(make(), tmp_path / "g.json", "g", "gemma-2-2b", "clt-hp", *thresholds, bias=bias, feature_url="u")
    data = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert errors(data) == []
    ids = [node["node_id"] for node in data["nodes"]]
    assert len(set(ids)) == len(ids)
    assert {link[end] for link in data["links"] for end in ("source", "target")} <= set(ids)
    assert set(data["qParams"]["pinnedIds"]) <= set(ids)
    assert ("bias" in ids) == bias
    assert data["metadata"]["feature_details"] == {"neuronpedia_source_set": "clt-hp", "feature_json_base_url": "u"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("qParams"),
        lambda data: data["metadata"].update(slug="../up"),
        lambda data: data["nodes"][2].update(node_id="0_2_1"),
        lambda data: data["nodes"][0].pop("clerp"),
        lambda data: data["nodes"][0].update(feature_type="transcoder"),
        lambda data: data["nodes"][-1].update(clerp="the logit"),
        lambda data: data["links"][0].update(weight="1"),
        lambda data: data["qParams"]["supernodes"].append(["empty"]),
    ],
)
def test_the_schema_refuses_what_no_viewer_reads(damage: Any) -> None:
    data = graph_data(strange_graph(), "g", node_threshold=None, edge_threshold=None)
    damage(data)
    assert errors(data)


@pytest.mark.parametrize("bias", [False, True])
def test_links_are_the_edges_of_the_pruned_graph(bias: bool) -> None:
    graph = make_graph(5, n_layers=4, density=0.4)
    data = graph_data(graph, bias=bias)
    pruned = graph.prune()
    weights = torch.zeros_like(pruned.adjacency)
    for link in data["links"]:
        weights[pruned.index(link["target"]), pruned.index(link["source"])] = link["weight"]
    expected = pruned.adjacency if bias else pruned.adjacency.masked_fill(pruned.of_kind("bias"), 0.0)
    assert torch.equal(weights, expected)
    joined = expected.ne(0).any(0) | expected.ne(0).any(1) | pruned.of_kind("embedding", "target")
    assert [node["node_id"] for node in data["nodes"]] == pruned.nodes["id"][joined.numpy()].tolist()
    table = pruned.nodes.set_index("id")
    for entry in data["nodes"]:
        row = table.loc[entry["node_id"]]
        if row["kind"] in ("feature", "error", "embedding"):
            assert entry["influence"] == row["cumulative_influence"]
        if row["kind"] == "feature":
            assert entry["activation"] == row["activation"]
            assert unpaired(entry["feature"]) == (row["layer"], row["feature"])


def unpaired(number: int) -> tuple[int, int]:
    """Undo Cantor's pairing: the diagonal is the largest triangular number's, the latent is what is left."""
    diagonal = (math.isqrt(8 * number + 1) - 1) // 2
    latent = number - diagonal * (diagonal + 1) // 2
    return diagonal - latent, latent


def test_pairing_is_cantors() -> None:
    assert [cantor(0, 0), cantor(1, 0), cantor(0, 1), cantor(2, 0), cantor(1, 1), cantor(0, 2)] == [0, 1, 2, 3, 4, 5]
    assert unpaired(cantor(25, 98_303)) == (25, 98_303)


def test_a_graph_worked_out_by_hand() -> None:
    data = graph_data(strange_graph(), "g", pinned=["2_-1_1"], node_threshold=None, edge_threshold=None, bias=True)
    common = {"run_idx": 0, "reverse_ctx_idx": 0, "is_target_logit": False, "token_prob": 0.0}
    nodes = {entry["node_id"]: entry for entry in data["nodes"]}
    assert list(nodes) == [
        "0_2_1", "2_7_1", "2_-1_1", "E_3_0", "E_4_1", "bias", "4_9_1", "target_logit_9-8_1", "target_feature_1_5_0",
    ]  # fmt: skip
    # Weights 1/2, 1/4, 1/4: feature 2.7 gets 2/3 of 1/2 and all of a 1/4, which pass on to 0.2 and to its token.
    seven, error, third = 7 / 12, 1 / 6, 1 / 4
    whole = 3 * seven + error + third
    assert nodes["2_7_1"] == common | {
        "node_id": "2_7_1",
        "feature": 52,  # (2 + 7) (2 + 7 + 1) / 2 + 7
        "layer": "2",
        "ctx_idx": 1,
        "feature_type": "cross layer transcoder",
        "jsNodeId": "2_7-0",
        "clerp": 'say "x"',
        "influence": pytest.approx(3 * seven / whole),
        "activation": 0.5,
    }
    assert nodes["E_3_0"]["influence"] == pytest.approx((3 * seven + third) / whole)
    assert nodes["2_-1_1"] == common | {
        "node_id": "2_-1_1",
        "feature": -1,
        "layer": "2",
        "ctx_idx": 1,
        "feature_type": "mlp reconstruction error",
        "jsNodeId": "2_-1-1",
        "clerp": 'Error of layer 2 at " "⏎"',
        "influence": pytest.approx(1.0),
    }
    assert [nodes["E_3_0"][name] for name in ("feature", "layer", "jsNodeId")] == [0, "E", "E_3-0"]
    logit, difference, feature = list(nodes.values())[-3:]
    assert (logit["feature"], difference["feature"], feature["feature"]) == (9, -2, -3)
    assert {target["layer"] for target in (logit, difference, feature)} == {"4"}
    assert logit["clerp"] == 'Output " "a"⏎" (p=0.500)'
    assert difference["clerp"] == 'Output "9⏎over 8" (p=0.250)'
    assert [target["is_target_logit"] for target in (logit, difference, feature)] == [True, False, False]
    assert [target["token_prob"] for target in (logit, difference, feature)] == [0.5, 0.25, 0.25]
    assert feature["ctx_idx"] == 0
    assert {"source": "bias", "target": "0_2_1", "weight": 7.0} in data["links"]
    assert data["qParams"]["supernodes"] == [["both", "0_2_1", "2_7_1"]]
    assert data["qParams"]["pinnedIds"] == ["2_-1_1", "0_2_1", "2_7_1"]
    metadata = data["metadata"]
    assert metadata["prompt_tokens"] == ["</script>", ' "⏎']
    assert metadata["prompt"] == '</script> "\n'
    assert "max_feature_nodes" not in metadata["generation_settings"]
    assert metadata["generation_settings"]["certificate"]["max_relative_residual"] == 3e-7


def test_a_pruned_graph_is_taken_as_it_is() -> None:
    pruned = make_graph(5, density=0.4).prune(0.5, 0.6)
    assert pruned_for_view(pruned, 0.8, 0.98) is pruned
    assert graph_data(pruned)["metadata"]["pruning_settings"]["node_threshold"] == 0.5
    assert graph_data(pruned)["metadata"]["node_threshold"] == 0.5


def test_names_are_made_of_what_is_known() -> None:
    named = make_graph(model_name="google/Gemma-2-2B")
    assert graph_data(named)["metadata"]["scan"] == "gemma-2-2b"
    assert graph_data(named)["metadata"]["slug"] == "bos-the-capital-of"
    nameless = replace(named, info=replace(named.info, prompt="……"))
    assert graph_data(nameless)["metadata"]["slug"] == "graph"


def test_the_viewers_folder_collects_graphs(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "graphs"
    first, second = make_graph(1), make_graph(2)
    assert to_viewer(first, folder, "one", "gemma-2-2b") == folder / "one.json"
    to_viewer(second, folder, "two", "gemma-2-2b")
    to_viewer(second, folder, "one", "llama")
    assert sorted(path.name for path in folder.iterdir()) == ["graph-metadata.json", "one.json", "two.json"]
    graphs = json.loads((folder / "graph-metadata.json").read_text())["graphs"]
    assert [(entry["slug"], entry["scan"]) for entry in graphs] == [("two", "gemma-2-2b"), ("one", "llama")]
    for entry in graphs:
        assert json.loads((folder / f"{entry['slug']}.json").read_text())["metadata"] == entry
        # What circuit-tracer's page reads of each graph.
        assert {"slug", "scan", "prompt", "prompt_tokens", "transcoder_list", "node_threshold"} <= set(entry)


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    graph = make_graph()
    endless = graph.adjacency.clone()
    endless[-1, 0] = torch.inf
    cases: list[tuple[Graph, dict[str, Any], str]] = [
        (graph, {"slug": "../up"}, "no slug"),
        (graph, {"pinned": ["0_1_99"]}, "no node"),
        (replace(graph, adjacency=endless), {}, "not finite"),
        (replace(graph, info=replace(graph.info, settings={"x": object()})), {}, "JSON"),
    ]
    for case, options, message in cases:
        with pytest.raises(GraphError, match=message):
            to_viewer(case, tmp_path, **options)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "graph-metadata.json").write_text("[]")
    with pytest.raises(GraphError, match="not an index"):
        to_viewer(graph, tmp_path, "g")
    assert (tmp_path / "graph-metadata.json").read_text() == "[]"


def test_an_interrupted_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "g.json"
    path.write_text("old")

    def interrupted() -> None:
        with written_aside(path) as aside:
            aside.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("g.json", "old")]


# ---------------------------------------------------------------- notes


def test_notes_name_group_and_take_away(tmp_path: Path) -> None:
    graph = make_graph()
    a, b, c, d, e = graph.nodes["id"][:5]
    graph = graph.with_labels({a: "old", b: "stays"}).with_supernode("gone", [a]).with_supernode("less", [b, c])
    notes = {"labels": {a: "", c: "<b>new</b>"}, "supernodes": {"gone": [], "more": [c, d, e]}, "pinned": [a]}
    path = tmp_path / "notes.json"
    path.write_text(json.dumps(notes))
    for given in (path, str(path), notes):
        noted = with_notes(graph, given)
        assert noted.labels == {b: "stays", c: "<b>new</b>"}
        assert noted.supernodes == {"less": (b,), "more": (c, d, e)}
    assert with_notes(graph, {d: "plain"}).labels == {a: "old", b: "stays", d: "plain"}
    assert with_notes(graph, {"labels": {}, "supernodes": {"all": [b, c]}}).supernodes == {"gone": (a,), "all": (b, c)}


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        ({"9_9_9": "x"}, "lacks"),
        ({"labels": {"a": 1}}, "text for each id"),
        ({"labels": {}, "supernodes": ["a"]}, "list of ids"),
        ({"labels": {}, "supernodes": {"a": "0_1_1"}}, "list of ids"),
        ("[1]", "hold no labels"),
        ("{", "not JSON"),
    ],
)
def test_notes_of_something_else_are_refused(tmp_path: Path, notes: Any, message: str) -> None:
    if isinstance(notes, str):
        (tmp_path / "notes.json").write_text(notes)
        notes = tmp_path / "notes.json"
    with pytest.raises(GraphError, match=message):
        with_notes(make_graph(), notes)
