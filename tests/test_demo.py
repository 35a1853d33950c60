"""The bundled model and its transcoders are what the documentation says; the demo and the command run."""

import json
import warnings

import pytest
import torch
from typer.testing import CliRunner

import clt_plugin as cp
from clt_plugin import demo
from clt_plugin.cli import app
from clt_plugin.report import plot_features


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "report"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = CliRunner().invoke(app, ["demo", "--output", str(folder)], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return folder, json.loads((folder / "results.json").read_text()), outcome.output


def test_report_folder(report):
    folder, _, output = report
    graph = {"graph.html", "graph.json", "graph.safetensors", "graph-scores.json"}
    assert {path.name for path in folder.iterdir()} == {"features.png", "results.json"} | graph
    assert (folder / "features.png").read_bytes().startswith(b"\x89PNG")
    assert "largest difference between the two libraries" in output


def test_both_libraries_agree(report):
    _, results, _ = report
    assert 0 < results["largest_difference"] < 1e-5
    for row in results["predictions"] + results["edits"]:
        assert row["nnsight"]["probability"] == pytest.approx(row["TransformerLens"]["probability"], abs=1e-5)


def test_the_model_has_learnt_the_licence(report):
    _, results, _ = report
    plain, replaced, with_error = results["predictions"]
    assert results["answer"] == " sell"
    assert plain["nnsight"]["probability"] > 0.9
    assert with_error["nnsight"]["probability"] == pytest.approx(plain["nnsight"]["probability"], abs=1e-5)
    assert replaced["nnsight"]["top"] == " sell"
    assert abs(replaced["nnsight"]["probability"] - plain["nnsight"]["probability"]) > 1e-4


def test_editing_the_feature_found_moves_the_answer(report):
    _, results, _ = report
    logits = [row["nnsight"]["logit"] for row in results["edits"]]
    assert [row["factor"] for row in results["edits"]] == [1, 0, -1, -3]
    assert logits == sorted(logits, reverse=True)
    assert logits[0] - logits[1] > 0.1


def test_the_graph_of_the_answer(report):
    folder, results, output = report
    graph = cp.Graph.load(folder / "graph.safetensors")
    assert graph.certificate.holds
    assert graph.nodes["token"].iloc[-1] == results["answer"] == " sell"
    assert results["graph"]["scores"]["replacement"] > 0.8
    strongest = graph.inputs(graph.nodes["id"].iloc[-1], 1)["id"].item()
    layer, position, feature = results["feature"]
    assert strongest == f"{layer}_{feature}_{position}"  # what the gradient found as well
    assert "certificate holds" in output


@pytest.mark.parametrize("load", [demo.load_clt, demo.load_plt])
def test_transcoders(load):
    clt = load()
    assert clt.n_layers == 4
    assert clt.d_model == 128
    assert min(clt.group_sizes) >= 1024
    assert clt.activation.name == "jumprelu"
    assert clt.host.model_name == demo.NAME
    assert clt.host.exclude_first == 1


def test_sizes():
    from clt_plugin.demo.bundled import ASSETS

    for name, limit in {"language-model": 10e6, "clt": 6e6, "plt": 6e6}.items():
        assert sum(path.stat().st_size for path in (ASSETS / name).rglob("*")) < limit


def test_tokenizers_agree():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bridge = demo.load_bridge()
    ids = demo.load_tokenizer()(demo.MIT_PROMPT)["input_ids"]
    assert bridge.to_tokens(demo.MIT_PROMPT).tolist() == [ids]
    assert ids[0] == demo.load_tokenizer().bos_token_id


def test_plot_shows_every_layer():
    features = {2: torch.zeros(3, 8), 5: torch.rand(3, 8)}
    figure = plot_features(features, ["a", "$b", "\n"], "title", mark=(5, 1, 3))
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layer 2", "layer 5"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", r"\$b", r"\n"]
