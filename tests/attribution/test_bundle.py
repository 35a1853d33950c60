"""The command, the folder it writes, and where features are active in a data set."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
from typer.testing import CliRunner

import clt_plugin as cp
from attribution.graphs import make_graph
from clt_plugin import demo
from clt_plugin.attribution import GraphError, top_examples
from clt_plugin.cli import app
from clt_plugin.interventions import EditError
from support.crosscoders import make_clt
from support.models import make_model, nnsight_model
from support.reference import reference_run

TEXTS = [" ".join(f"w{2 + (7 * i * i + 3 * t) % 50}" for i in range(12 + t)) for t in range(5)]


def run(*arguments: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CliRunner().invoke(app, ["attribute", *arguments])


def test_the_command_writes_graph_page_json_and_scores(tmp_path):
    folder = tmp_path / "graph"
    prompt = "THE SOFTWARE IS PROVIDED"
    found = run("demo", "demo", prompt, "--output", str(folder), "--target", " AS", "--node-threshold", "0.7")
    assert found.exit_code == 0, found.output
    assert "certificate holds" in found.output
    graph = cp.Graph.load(folder / "graph.safetensors")
    assert graph.info.prompt == prompt
    assert graph.nodes["token"].iloc[-1] == " AS"
    told = json.loads((folder / "graph-scores.json").read_text())
    assert told["scores"]["replacement"] == pytest.approx(graph.scores().replacement)
    assert told["certificate"]["holds"] is True
    assert told["pruning"]["node_threshold"] == 0.7
    written = json.loads((folder / "graph.json").read_text())
    assert written["metadata"]["prompt"] == prompt
    assert 0 < told["nodes"]["pruned"] < told["nodes"]["whole"] == len(graph)
    assert "<html" in (folder / "graph.html").read_text()


def test_the_command_says_what_is_wrong_in_a_line(tmp_path):
    found = run("demo", "demo", "a", "--target", "two tokens at least", "--output", str(tmp_path / "graph"))
    assert found.exit_code == 2
    assert "a target is one token" in found.output
    assert "Traceback" not in found.output
    assert not (tmp_path / "graph").exists()


def test_the_page_shows_where_features_are_active_in_given_texts(tmp_path):
    texts, folder = tmp_path / "texts.jsonl", tmp_path / "graph"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("THE SOFTWARE IS", "granted, free of")))
    found = run("demo", "demo", "THE SOFTWARE", "-o", str(folder), "-t", " IS", "--texts", str(texts))
    assert found.exit_code == 0, found.output
    page = (folder / "graph.html").read_text()
    assert re.search(r'"top_tokens": \[\[" SOFTWARE", ', page)
    missing = run("demo", "demo", "THE SOFTWARE", "-o", str(folder), "--texts", str(tmp_path / "nowhere"))
    assert missing.exit_code == 2
    assert "there is no file or folder" in missing.output


def test_the_command_says_what_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    found = run("demo", "demo", "THE SOFTWARE", "-t", " IS", "-o", str(tmp_path / "file"))
    assert found.exit_code == 2
    assert "Traceback" not in found.output
    assert "clt: " in found.output


def test_a_pruned_graph_is_written_as_it_is(tmp_path):
    graph = make_graph(3).prune(0.5, 0.9)
    whole, written, page, scores = graph.write(tmp_path / "deep" / "folder", "mine")
    assert [path.name for path in (whole, written, page, scores)] == [
        "mine.safetensors",
        "mine.json",
        "mine.html",
        "mine-scores.json",
    ]
    assert len(cp.Graph.load(whole)) == len(graph)
    assert json.loads(scores.read_text())["nodes"] == {"whole": len(graph), "pruned": len(graph)}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_top_examples_are_those_of_a_plain_loop(batch_size):
    hf, clt = make_model("llama"), make_clt(activation="jumprelu", exclude_first=1)
    model = nnsight_model(hf)
    members = {0: [1, 5], 2: [3, 7]}
    found = top_examples(
        model, members, TEXTS, clt=clt, k=2, n_tokens=3, context=2, batch_size=batch_size, max_tokens=64, bar=False
    )
    for layer, latents in members.items():
        for latent in latents:
            passages, tokens = [], {}
            for text in TEXTS:
                ids = model.tokenizer(text)["input_ids"]
                acts = reference_run(hf, torch.tensor([ids]), clt, "observe")["features"][layer][0, :, latent]
                acts[0] = 0  # excluded
                at = int(acts.argmax())
                if acts[at] > 0:
                    part = slice(max(0, at - 2), at + 3)
                    words = [model.tokenizer.decode([i]) for i in ids[part]]
                    passages.append((float(acts[at]), words, acts[part].tolist()))
                for i, value in zip(ids, acts.tolist(), strict=True):
                    if value > 0:
                        word = model.tokenizer.decode([i])
                        tokens[word] = max(value, tokens.get(word, 0.0))
            known = found[f"{layer}_{latent}"]
            passages = sorted(passages, key=lambda passage: -passage[0])[:2]
            assert [example["tokens"] for example in known["examples"]] == [words for _, words, _ in passages]
            for example, (_, _, values) in zip(known["examples"], passages, strict=True):
                assert example["activations"] == pytest.approx(values, abs=1e-5)
            top = sorted(tokens.items(), key=lambda item: -item[1])[:3]
            assert [token for token, _ in known["top_tokens"]] == [token for token, _ in top]
            assert [value for _, value in known["top_tokens"]] == pytest.approx([v for _, v in top], abs=1e-5)
    assert any(known["examples"] for known in found.values())


def test_long_texts_are_cut_and_keep_their_bos():
    clt = make_clt()
    model = nnsight_model("gpt2")  # of 64 positions
    ids = [0, *(2 + i % 50 for i in range(150))]
    found = top_examples(model, {0: list(range(24))}, [ids], clt=clt, k=9, max_tokens=50, context=0, bar=False)
    assert max(len(known["examples"]) for known in found.values()) == 4  # 150 tokens in pieces of 49 and a BOS
    with pytest.raises(EditError, match="a text is a string"):
        top_examples(model, {0: [1]}, [[0.5, 1.0]], clt=clt, bar=False)
    for setting, least in (("k", 1), ("n_tokens", 1), ("context", 0)):
        with pytest.raises(GraphError, match=f"{setting} is a whole number of at least {least}, not -1"):
            top_examples(model, {0: [1]}, [[5]], clt=clt, bar=False, **{setting: -1})
    assert top_examples(model, [], [[5]], clt=clt, bar=False) == {}


def test_a_graphs_features_are_found_in_the_demo_corpus():
    model, clt = demo.load_nnsight(), demo.load_clt()
    graph = cp.attribute(model, "Permission is hereby granted, free of", clt=clt, bar=False).prune(0.6, 0.9)
    known = top_examples(model, graph, demo.load_corpus()[:6], clt=clt, bar=False)
    features = graph.nodes[graph.nodes["kind"] == "feature"]
    assert set(known) == {f"{g}_{f}" for g, f in zip(features["group"], features["feature"], strict=True)}
    assert any(known[key]["top_tokens"] for key in known)
