"""``clt train`` and ``clt analyse``, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import clt_plugin as cp
from clt_plugin.analysis import STUDIES
from clt_plugin.cli import app

DEMO = str(Path(__file__).parents[1] / "examples" / "recipes" / "demo_clt.py")
SHORTENED = [
    "n_latents=64", "tokens=512", "batch_size=128", "data.buffer=512", "data.statistics=512", "data.length=64",
    "evaluation.every=2", "evaluation.tokens=64", "watch.every=1",
]  # fmt: skip


def clt(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def settings(*given):
    return [part for each in given for part in ("--set", each)]


def test_the_demo_recipe_trains(tmp_path):
    outcome = clt("train", DEMO, "--output", tmp_path / "run", *settings(*SHORTENED))
    assert outcome.exit_code == 0, outcome.output
    assert "run/crosscoder: FVU" in outcome.output.replace("\n", "")
    crosscoder = cp.load(tmp_path / "run" / "crosscoder")
    assert (crosscoder.n_layers, crosscoder.n_latents) == (4, 64)
    assert {file.name for file in (tmp_path / "run").iterdir()} >= {"metrics.jsonl", "run.png", "report.json"}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 1, 2, 3, 3]
    other = clt("train", DEMO, "--output", tmp_path / "run", *settings(*SHORTENED, "seed=1"))
    assert other.exit_code == 2
    assert "seed was 0 and is now 1" in other.output


def test_an_estimate_trains_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = clt("train", DEMO, "--estimate", *settings("tokens=512"))
    assert outcome.exit_code == 0, outcome.output
    assert "parameters        2.77 M" in outcome.output
    assert "h at least" in outcome.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "none.py"], "there is no recipe none.py"),
        (["train", DEMO, "--set", "speed=3"], "no setting speed"),
        (["analyse", "nothing"], "no study is called 'nothing'"),
        (["analyse", "decoder-norms"], "needs --clt (a crosscoder)"),
        (["analyse", "distance", "--clt", "demo", "--set", "same_layer=x"], "is true or false, not 'x'"),
        (["analyse", "distance", "--clt", "demo", "--set", "nothing=x"], "has no setting nothing; it has same_layer"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = clt(*arguments)
    assert outcome.exit_code == 2
    assert message in outcome.output
    assert len(outcome.output.splitlines()) == 1


def test_a_study_writes_its_table_and_its_plot(tmp_path):
    outcome = clt("analyse", "distance", "--clt", "demo", "--set", "same_layer=true", "-o", tmp_path)
    assert outcome.exit_code == 0, outcome.output
    assert (tmp_path / "distance.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "distance.csv").read_text().splitlines()) > 1


def test_studies_are_listed():
    outcome = clt("analyse")
    assert outcome.exit_code == 0
    for name in STUDIES:
        assert name in outcome.output
