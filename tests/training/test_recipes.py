"""Recipes are read, changed, estimated and run; those in examples/recipes among them, without a network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from clt_plugin.training import ConfigError, Recipe, TrainConfig
from clt_plugin.training.data import DataError
from clt_plugin.training.recipes import parse_setting, parse_yaml

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
GB = 1e9


def skeleton(config):
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def shapes():
    """Models of the sizes that recipes are for, without weights."""
    gemma = skeleton(transformers.Gemma2Config())
    return {"gpt2": skeleton(transformers.GPT2Config()), "gemma": gemma, "diff": {"base": gemma, "chat": gemma}}


# name: (which model, parameters in billions, steps)
SHIPPED = {
    "gpt2_clt": ("gpt2", 0.691, 100_000),
    "gpt2_plt": ("gpt2", 0.185, 100_000),
    "gpt2_local_clt": ("gpt2", 0.415, 100_000),
    "gemma_2_2b_clt": ("gemma", 14.23, 73_242),
    "model_diff": ("diff", 0.302, 24_414),
    "demo_clt": (None, 0.00277, None),
    "demo_plt": (None, 0.00158, None),
    "demo_local_clt": (None, 0.00217, None),
}


def test_every_shipped_recipe_is_looked_at():
    assert {file.stem for file in RECIPES.glob("*.py")} == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes(name, shapes):
    which, parameters, n_steps = SHIPPED[name]
    recipe = Recipe.load(RECIPES / f"{name}.py")
    found = recipe.estimate(None if which is None else shapes[which], world=recipe.config.parallel.latent)
    if which is not None:
        assert found.n_parameters / 1e9 == pytest.approx(parameters, rel=0.01)
        assert recipe.config.n_steps == n_steps
        assert found.memory < 80 * GB  # of a GPU
    assert found.model > 0
    assert TrainConfig.from_dict(recipe.config.to_dict()) == recipe.config


def test_per_layer_transcoders_are_trained_alike():
    clt, plt = (Recipe.load(RECIPES / f"gpt2_{name}.py") for name in ("clt", "plt"))
    assert plt.config.but(wiring="clt", name=clt.config.name) == clt.config
    assert plt.config.wiring == "plt"


YAML = """
model: demo
data: {files: texts, separator: "---"}
config:
  n_latents: 32
  wiring: {name: local_clt, span: 2}
  tokens: 256
  batch_size: 64
  optimizer: {learning_rate: 1e-3}
  sparsity: {penalties: [{name: tanh, weight: 1e-4}]}
  data: {length: 32, rows: 2, buffer: 256, statistics: 256}
  evaluation: {tokens: 0}
output: there
"""


def test_a_recipe_in_yaml_runs(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("Permission is hereby granted, free of charge, to any person\n---\n" * 40)
    (tmp_path / "recipe.yaml").write_text(YAML)
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    assert recipe.output == "there"
    assert recipe.config.optimizer.learning_rate == 1e-3
    result = recipe.run(tmp_path / "run", n_latents=16)
    assert result.crosscoder.n_latents == 16
    assert "local_clt(4, span=2)" in repr(result.crosscoder.wiring)
    assert result.folder == tmp_path / "run"
    assert (tmp_path / "run" / "run.png").read_bytes().startswith(b"\x89PNG")


def test_settings_are_changed_by_name():
    recipe = Recipe.load(RECIPES / "demo_clt.py")
    given = ["optimizer.learning_rate=1e-4", "wiring={name: local_clt, span: 3}", "activation.bandwidth=0.25", "name=x"]
    changed = recipe.with_settings(dict(map(parse_setting, given))).config
    assert changed.optimizer.learning_rate == 1e-4
    assert changed.wiring == {"name": "local_clt", "span": 3}
    assert (changed.activation.bandwidth, changed.name) == (0.25, "x")
    untouched = {"optimizer": {"learning_rate": 3e-3}, "wiring": "clt", "activation": recipe.config.activation}
    assert changed.but(**untouched, name=recipe.config.name) == recipe.config


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("tokens", "name=value"),
        ("optimizer.speed=3", "optimizer has no setting speed: it has learning_rate"),
        ("tokens.more=3", r"no setting tokens\.more"),
        ("tokens=[", "the value of tokens is no YAML"),
        ("tokens=many", "tokens is a whole number"),
    ],
)
def test_wrong_settings_are_refused(setting, message):
    recipe = Recipe.load(RECIPES / "demo_clt.py")
    with pytest.raises(ConfigError, match=message):
        recipe.with_settings(dict([parse_setting(setting)]))


def test_numbers_in_yaml():
    text = "[1e-4, 2E5, -1.5e+3, 3, 0.5, .5, yes, 1e, e5, '1e-4']"
    assert parse_yaml(text, "it") == [1e-4, 2e5, -1500.0, 3, 0.5, 0.5, True, "1e", "e5", "1e-4"]
    assert isinstance(parse_yaml("3", "it"), int)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.py", "1 / 0", "a.py cannot be run: ZeroDivisionError: division by zero"),
        ("a.py", "model = data = 1", "defines no config: a recipe needs model, data, config"),
        ("a.py", "model = data = config = 1", "config is a TrainConfig, not int"),
        ("a.yaml", "model: [", "is no YAML"),
        ("a.yaml", "- model", "must be a mapping"),
        ("a.yaml", "modle: demo", "has no modle; it has model, data"),
        ("a.yaml", "model: demo\ndata: 3\nconfig: {n_latents: 8}", "data is demo, or a mapping with either files"),
        ("a.yaml", "model: demo\ndata: {files: x, split: y}\nconfig: {n_latents: 8}", "from files has no split"),
        ("a.yaml", "model: demo\ndata: demo\nconfig: {latents: 8}", "no setting latents"),
        ("a.txt", "", "in Python"),
    ],
)
def test_wrong_recipes_are_refused(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        Recipe.load(tmp_path / name)
    with pytest.raises(ConfigError, match="there is no recipe"):
        Recipe.load(tmp_path / "none.py")


def test_a_data_set_of_the_hub_in_yaml(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **more: asked.append((given, more)) or ["a", "b"])
    (tmp_path / "a.yaml").write_text(
        "model: demo\nconfig: {n_latents: 8}\n"
        "data: {dataset: owner/name, config: small, split: test, streaming: false, revision: abc}\n"
    )
    texts = Recipe.load(tmp_path / "a.yaml").data()
    assert list(texts.iterate()) == ["a", "b"]
    assert asked == [(("owner/name", "small"), {"split": "test", "streaming": False, "revision": "abc"})]


def test_files_of_a_recipe_that_are_not_there(tmp_path):
    (tmp_path / "a.yaml").write_text("model: demo\ndata: {files: nowhere}\nconfig: {n_latents: 8}")
    with pytest.raises(DataError, match="nowhere"):
        Recipe.load(tmp_path / "a.yaml").run()
