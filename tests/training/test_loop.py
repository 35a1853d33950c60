"""Whole runs: every wiring and library, killed and gone on with, and what ends one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import clt_plugin as cp
from clt_plugin.training import CheckpointError, ConfigError, TrainError, checkpoints
from clt_plugin.training.data import DataError, harvest
from support.models import bridge_model, make_model, make_tokenizer, nnsight_model
from training.killed_run import config, texts

SHORT = {
    "tokens": 4 * 64,
    "sparsity": {"penalties": [{"name": "tanh", "weight": 1e-3}]},
    "start": {},
    "checkpoints": {"every": 2},
    "evaluation": {"tokens": 60},
}


def short(**more):
    return config(**(SHORT | more))


def run(chosen, output=None, model=None, data=None):
    model = make_model("gpt2") if model is None else model
    return cp.train(model, texts() if data is None else data, chosen, output=output, tokenizer=make_tokenizer())


def weights(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "crosscoder").glob("*.safetensors"))}


# ---------------------------------------------------------------- from texts to a saved crosscoder

WIRINGS = {
    "sae": {"name": "sae", "layer": 1},
    "plt with skips": {"name": "plt", "skips": True},
    "clt": {"name": "clt", "read": "resid_mid"},
    "local clt": {"name": "local_clt", "span": 2},
    "acausal": "acausal",
    "weakly causal": "weakly_causal",
    "strictly causal": "strictly_causal",
    "pre/post MLP": {"name": "pre_post_mlp", "layer": 1},
}


@pytest.mark.parametrize("activation", ["relu", "jumprelu", {"name": "topk", "k": 4}, {"name": "batchtopk", "k": 4}])
@pytest.mark.parametrize("wiring", ["clt", "acausal"])
def test_what_is_saved_is_what_was_trained(activation, wiring, tmp_path):
    result = run(short(activation=activation, wiring=wiring), tmp_path / "run")
    saved = cp.load(tmp_path / "run/crosscoder")
    x = {site: torch.randn(50, 16) for site in saved.sites.read}
    for site, y in result.crosscoder(x).items():
        torch.testing.assert_close(saved(x)[site], y, rtol=0, atol=0)
    assert saved.host == cp.Host("tiny/gpt2", n_layers=3, exclude_first=1)
    assert saved.metadata["recipe"]["n_latents"] == 40
    assert result.report["evaluation"]["n_tokens"] >= 60
    assert (result.report["conversion"] is None) == (result.crosscoder.activation.name != "batchtopk")
    assert len(result.table) == 4


@pytest.mark.parametrize("wiring", WIRINGS)
def test_every_wiring_is_trained(wiring):
    result = run(short(wiring=WIRINGS[wiring]))
    assert result.report["tokens"] == 256
    in_loop = result.report["evaluation"]["in_loop"]
    assert (in_loop is not None) == (wiring in ("plt with skips", "clt", "local clt", "strictly causal"))


def test_two_models_are_compared():
    models = {"base": make_model("gpt2"), "chat": make_model("llama")}
    result = run(short(wiring={"name": "model_diff", "layer": 1}), model=models)
    assert [site.model for site in result.crosscoder.sites.read] == ["base", "chat"]


@pytest.mark.parametrize("library", [nnsight_model, bridge_model])
def test_libraries_give_what_the_plain_model_gives(library, tmp_path):
    run(short(), tmp_path / "plain")
    run(short(), tmp_path / "library", model=library("gpt2"))
    plain, theirs = (cp.load(tmp_path / name / "crosscoder") for name in ("plain", "library"))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], value, rtol=0, atol=1e-4)


def test_activations_of_ones_own_are_trained_on():
    source = harvest(make_model("gpt2"), texts(), cp.Wiring.clt(3), tokenizer=make_tokenizer(), length=32, epochs=None)
    result = cp.train(None, source, short())
    assert result.crosscoder.n_layers == 3
    assert result.report["evaluation"] is None
    with pytest.raises(DataError, match=r"lack resid_mid\.0"):
        cp.train(None, source, short(wiring={"name": "clt", "read": "resid_mid"}))
    with pytest.raises(ConfigError, match="texts are run through a model"):
        cp.train(None, texts(), short())


def test_a_cache_is_written_once_and_trained_from(tmp_path):
    data = {"length": 32, "buffer": 700, "statistics": 600, "rows": 4, "cache": str(tmp_path / "cache")}
    first = run(short(data=data))
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.safetensors")}
    second = run(short(data=data))
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.safetensors")} == before
    for name, value in first.crosscoder.state_dict().items():
        torch.testing.assert_close(second.crosscoder.state_dict()[name], value, rtol=0, atol=0)


def test_a_clt_begins_as_a_trained_plt(tmp_path):
    plt = run(short(wiring="plt", sparsity={}), tmp_path / "plt").crosscoder
    start = {"crosscoder": str(tmp_path / "plt/crosscoder")}
    tiny = short(start=start, optimizer={"learning_rate": 1e-12}, sparsity={})
    clt = run(tiny).crosscoder
    x = torch.randn(3, 20, 16)
    torch.testing.assert_close(clt(x), plt(x), rtol=0, atol=1e-4)


def test_a_topk_becomes_a_jumprelu_at_the_end():
    result = run(short(activation={"name": "topk", "k": 4}, to_jumprelu="shared"))
    assert result.crosscoder.activation.name == "jumprelu"
    assert result.report["conversion"]["l0_before"] == [4, 4, 4] or result.report["conversion"]["l0_before"] == (
        4,
        4,
        4,
    )


def test_statistics_come_from_everywhere(monkeypatch):
    """The first texts are all of one word: means taken of them alone would be quite different."""
    same = ["w7 " * 30] * 100 + texts()
    from clt_plugin.training import prepare

    taken = []
    original = prepare.Statistics.update
    monkeypatch.setattr(prepare.Statistics, "update", lambda self, b: (taken.append(b), original(self, b))[1])
    run(short(), data=same)
    rows = torch.cat([next(iter(batch.values())) for batch in taken])
    assert len(rows.round(decimals=4).unique(dim=0)) > 0.5 * len(rows)


# ---------------------------------------------------------------- killed, and gone on with


def test_a_run_that_was_killed_ends_with_the_same_weights(tmp_path):
    program = [sys.executable, str(Path(__file__).with_name("killed_run.py"))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = subprocess.Popen([*program, killed], env=environment)
    deadline = time.monotonic() + 120
    while _watched(killed) < 30 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (killed / "report.json").exists(), "it was to be killed before its end"
    (killed / "checkpoints/.step-00000099.partial").mkdir(parents=True, exist_ok=True)
    run(config(), killed)
    run(config(), whole)
    assert weights(killed) == weights(tmp_path / "whole")
    logs = [(folder / "metrics.jsonl").read_text() for folder in (killed, tmp_path / "whole")]
    assert logs[0] == logs[1]
    assert [path.name for path in (killed / "checkpoints").iterdir() if path.name.startswith(".")] == []


def _watched(folder):
    try:
        return len((folder / "metrics.jsonl").read_text().splitlines())
    except OSError:
        return 0


def test_an_ended_run_is_not_run_again(tmp_path):
    first = run(short(), tmp_path / "run")
    before = weights(tmp_path / "run")
    again = run(short(), tmp_path / "run")
    assert weights(tmp_path / "run") == before
    assert again.history == first.history
    assert again.report == json.loads(json.dumps(first.report, default=str))


def test_a_run_that_is_asked_to_stop_keeps_where_it_stands(tmp_path, monkeypatch):
    from clt_plugin.training import loop

    original = loop.Trainer.step

    def step(self, *args, **kwargs):
        if self.n_done == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(loop.Trainer, "step", step)
    with pytest.raises(TrainError, match="asked to stop, and did after 3 of 4 steps; started again it goes on"):
        run(short(), tmp_path / "stopped")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.setattr(loop.Trainer, "step", original)
    run(short(), tmp_path / "stopped")
    run(short(), tmp_path / "whole")
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")


def test_a_broken_checkpoint_is_named_and_the_one_before_it_is_taken(tmp_path):
    run(short(), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    (tmp_path / "broken/report.json").unlink()
    last = checkpoints.found(tmp_path / "broken/checkpoints")[-1]
    shard = next(last.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=rf"{last.name} is broken: .*distcp has \d+ bytes, not"):
        run(short(), tmp_path / "broken")
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    (tmp_path / "broken/report.json").unlink()
    for path in checkpoints.found(tmp_path / "broken/checkpoints"):
        (path / "state.json").write_text("{")
    with (
        pytest.warns(UserWarning, match=r"no readable state\.json"),
        pytest.raises(CheckpointError, match=r"no checkpoint is whole.*Remove"),
    ):
        run(short(), tmp_path / "broken")


def test_a_disk_that_is_full_leaves_the_checkpoints_from_before(tmp_path, monkeypatch):
    run(short(), tmp_path / "whole")
    original, calls = checkpoints._seal, []

    def full(path, numbers):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        original(path, numbers)

    monkeypatch.setattr(checkpoints, "_seal", full)
    with pytest.raises(CheckpointError, match=r"step-00000004 cannot be written .*No space left"):
        run(short(), tmp_path / "full")
    assert [path.name for path in (tmp_path / "full/checkpoints").iterdir()] == ["step-00000002"]
    run(short(), tmp_path / "full")
    assert weights(tmp_path / "full") == weights(tmp_path / "whole")


# ---------------------------------------------------------------- what is refused


def test_another_config_in_the_same_folder_is_refused(tmp_path):
    run(short(), tmp_path / "run")
    with pytest.raises(ConfigError, match="holds another run: n_latents was 40 and is now 20"):
        run(short(n_latents=20), tmp_path / "run")
    run(short(watch={"every": 3, "console": False}, checkpoints={"every": None}), tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="no training run"):
        run(short(), tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.txt"]


def test_too_few_tokens_are_named(tmp_path):
    data = {"length": 32, "buffer": 700, "statistics": 600, "rows": 4, "epochs": 1}
    with pytest.raises(TrainError, match=r"end after 300 tokens, but the run has 3840"):
        run(config(data=data), data=texts()[:10])


def test_a_loss_that_is_not_finite_names_the_last_checkpoint(tmp_path):
    wild = short(optimizer={"learning_rate": 1e18, "warm_up": 0}, checkpoints={"every": 1, "keep": 9})
    with pytest.raises(TrainError, match=r"nothing was updated.*step-0000000"):
        run(wild, tmp_path / "run")
