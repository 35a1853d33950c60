"""Configs as plain data and back, and what they refuse."""

from __future__ import annotations

import json

import pytest
import yaml

import clt_plugin as cp
from clt_plugin.core import WiringError
from clt_plugin.core.errors import RegistryError
from clt_plugin.training import ConfigError, OptimizerConfig, TrainConfig
from clt_plugin.training.penalties import Tanh
from clt_plugin.training.wirings import WIRINGS, make_wiring

SETTINGS = {
    "n_latents": 64,
    "wiring": {"name": "local_clt", "span": 2},
    "activation": {"name": "topk", "k": 8},
    "tokens": 10_000,
    "batch_size": 500,
    "optimizer": {"learning_rate": 3e-4, "betas": [0.9, 0.99], "accumulate": 2},
    "sparsity": {"penalties": [{"name": "tanh", "weight": 1e-3}], "target_l0": [3.0, 2.0]},
    "data": {"length": 128},
}


def test_a_config_is_plain_data_and_comes_back(tmp_path):
    config = TrainConfig.from_dict(SETTINGS)
    assert config.optimizer == OptimizerConfig(learning_rate=3e-4, betas=(0.9, 0.99), accumulate=2)
    assert config.sparsity.penalties == (Tanh(1e-3),)
    assert config.n_steps == 20
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    assert TrainConfig.from_yaml(tmp_path / "config.yaml") == config
    wired = TrainConfig(n_latents=8, wiring=cp.Wiring.clt(3))
    again = TrainConfig.from_dict(json.loads(json.dumps(wired.to_dict())))
    assert make_wiring(again.wiring, 99) == cp.Wiring.clt(3)


def test_but_changes_some_settings_and_keeps_the_rest_of_nested_ones():
    config = TrainConfig.from_dict(SETTINGS).but(seed=3, optimizer={"clip": 1.0})
    assert (config.seed, config.optimizer.clip, config.optimizer.learning_rate) == (3, 1.0, 3e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": 3}, "the config has no setting latents: it has n_latents"),
        ({"optimizer": {"rate": 3}}, "optimizer has no setting rate: it has learning_rate"),
        ({"optimizer": 3}, "optimizer is a mapping of settings, not 3"),
        ({"batch_size": 501}, "501 tokens has no 2 equal parts"),
        ({"tokens": 400}, "400 tokens are less than one batch of 500"),
        ({"tokens": 1e6}, "tokens is a whole number"),
        ({"precision": "int8"}, "precision is one of 'float32', 'bfloat16', not 'int8'"),
        ({"activation": {"k": 3}}, "activation has a name"),
        ({"start": {"decoders": "none"}}, "start.decoders is"),
        ({"optimizer": {"falls_over": 2}}, "optimizer.falls_over is a share of the run"),
        ({"checkpoints": {"every": 0}}, "checkpoints.every is a whole number of at least 1"),
        ({"sparsity": {"penalties": [{"name": "tanh"}]}}, "'tanh' needs weight"),
    ],
)
def test_what_no_run_can_have_is_refused(changes, message):
    with pytest.raises((ConfigError, WiringError), match=message):
        TrainConfig.from_dict(SETTINGS | changes)


def test_a_config_needs_the_number_of_latents():
    with pytest.raises(ConfigError, match="the config needs n_latents"):
        TrainConfig.from_dict({})


def test_a_file_that_holds_no_settings_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(ConfigError, match="holds no settings"):
        TrainConfig.from_yaml(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match="is no YAML"):
        TrainConfig.from_yaml(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("spec", "wiring"),
    [
        ("clt", cp.Wiring.clt(4)),
        ("plt", cp.Wiring.plt(4)),
        ({"name": "clt", "read": "resid_mid"}, cp.Wiring.clt(4, read="resid_mid")),
        ({"name": "plt", "skips": True}, cp.Wiring.plt(4).with_skips()),
        ({"name": "sae", "layer": 2}, cp.Wiring.sae(2)),
        ("acausal", cp.Wiring.acausal(range(4))),
        ({"name": "weakly_causal", "layers": [1, 3]}, cp.Wiring.weakly_causal([1, 3])),
        ("strictly_causal", cp.Wiring.strictly_causal(4)),
        ({"name": "pre_post_mlp", "layer": 1}, cp.Wiring.pre_post_mlp(1)),
        ({"name": "model_diff", "layer": 1}, cp.Wiring.model_diff(["base", "chat"], 1)),
    ],
)
def test_wirings_by_name(spec, wiring):
    assert make_wiring(spec, 4, ("base", "chat")) == wiring


def test_a_third_party_adds_a_wiring():
    WIRINGS.add("first", lambda n_layers, models: cp.Wiring.sae(0))
    try:
        assert make_wiring("first", 4) == cp.Wiring.sae(0)
    finally:
        WIRINGS.remove("first")
    with pytest.raises(RegistryError, match="no wiring is called 'first'"):
        make_wiring("first", 4)
    with pytest.raises(WiringError, match="'clt' does not take"):
        make_wiring({"name": "clt", "spam": 2}, 4)
    with pytest.raises(WiringError, match="a wiring is a name"):
        make_wiring({"span": 2}, 4)
