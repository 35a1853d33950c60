"""What is seen of a run: its history as tables, trackers, the console, and warnings of what goes wrong."""

from __future__ import annotations

import io
import json
import re
import sys
import types
import warnings
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from clt_plugin.report.training import plot_run
from clt_plugin.training import ConfigError, Evaluation, Metrics, TrainConfig, TrainError, TrainWarning
from clt_plugin.training.evaluation import InLoop
from clt_plugin.training.run import RunFolder
from clt_plugin.training.watch import EarlyWarnings, Watching, by_group, evaluations_of, table_of
from clt_plugin.training.watch._console import LiveConsole, console_for

CONFIG = TrainConfig(n_latents=8, tokens=2000, batch_size=10, watch={"every": 10})
METRICS = Metrics(
    step=0, loss=3.0, error=2.0, fvu=0.5, l0=(4.0, 2.0), dead=(0.0, 0.5), penalties={"tanh": 7.0}, learning_rate=1e-3,
    threshold=(0.1, 0.3), near=(0.01, 0.02),
)  # fmt: skip
EVALUATION = Evaluation(
    n_tokens=10, fvu={"mlp_out.0": 0.2, "mlp_out.1": 0.4}, l0={"0": 4.0, "1": 2.0}, dead={"0": 0.0, "1": 0.5},
    dense={"0": 0.0, "1": 0.0}, in_loop=InLoop(9, 2.0, 2.5, 0.4, 0.8),
)  # fmt: skip


def watched(folder=None, config=CONFIG, n_steps=None):
    with Watching(config, folder) as watch:
        for step in range(n_steps or config.n_steps):
            watch.step(replace(METRICS, step=step, loss=100.0 - step))
        watch.evaluated(step, EVALUATION)
    return watch.history


# ---------------------------------------------------------------- history


def test_the_history_as_tables():
    history = watched()
    table = table_of(history)
    assert list(table.index) == [*range(0, 200, 10), 199]
    assert table.loc[30].to_dict() == pytest.approx(
        {"loss": 70.0, "error": 2.0, "fvu": 0.5, "l0": 3.0, "dead": 0.25, "tanh": 7.0, "learning_rate": 1e-3,
         "pressure": 1.0, "threshold": 0.2, "near": 0.015}
    )  # fmt: skip
    assert by_group(history, "l0").loc[30].tolist() == [4.0, 2.0]
    row = {"fvu": 0.3, "l0": 3.0, "delta_loss": 0.5, "kl": 0.4, "top1": 0.8}
    assert evaluations_of(history).loc[199].to_dict() == pytest.approx(row)


def test_a_history_of_nothing_has_empty_tables():
    assert len(table_of([])) == 0
    assert len(evaluations_of([])) == 0
    plot_run([]).savefig(io.BytesIO())


def test_the_plot_marks_targets_and_evaluations():
    figure = plot_run(watched(), "a run", target_l0=6.0)
    lines = {line.get_label(): list(line.get_ydata()) for axes in figure.axes for line in axes.lines}
    assert lines["group 1"][0] in (2.0, 0.5)
    assert lines["target / 2"] == [3.0, 3.0]
    assert lines["FVU evaluated"] == [pytest.approx(0.3)]
    figure.savefig(io.BytesIO())
    many = [replace(METRICS, step=step, l0=(1.0,) * 12, dead=(0.0,) * 12).to_dict() for step in range(3)]
    plot_run(many, target_l0=(1.0,) * 12).savefig(io.BytesIO())


# ---------------------------------------------------------------- trackers


class Fake:
    """Stands in for a W&B run and for TensorBoard's writer."""

    def __init__(self, id="7"):
        self.id, self.told, self.closed = id, [], 0

    def log(self, numbers):
        self.told.append(numbers)

    def add_scalar(self, name, value, step):
        self.told.append((name, value, step))

    def close(self):
        self.closed += 1

    finish = close


def test_weights_and_biases_hears_of_watched_steps_and_goes_on_under_the_same_id(tmp_path, monkeypatch):
    asked, run = [], Fake()
    monkeypatch.setitem(
        sys.modules, "wandb", types.SimpleNamespace(init=lambda **settings: asked.append(settings) or run)
    )
    config = CONFIG.but(watch={"wandb": "mine"})
    watched(tmp_path, config)
    assert len(run.told) == 22
    assert run.told[3].items() >= {"step": 30, "loss": 70.0, "l0": 3.0, "l0/0": 4.0, "dead/1": 0.5, "tanh": 7.0}.items()
    assert run.told[-1] == {"step": 199, **{f"evaluation/{k}": pytest.approx(v) for k, v in
                            {"fvu": 0.3, "l0": 3.0, "delta_loss": 0.5, "kl": 0.4, "top1": 0.8}.items()}}  # fmt: skip
    assert run.closed == 1
    watched(tmp_path, config, n_steps=10)
    assert [(each["project"], each["id"], each["resume"]) for each in asked] == [
        ("mine", None, None),
        ("mine", "7", "allow"),
    ]
    assert asked[0]["config"] == config.to_dict()


def test_tensorboard_hears_of_watched_steps(tmp_path, monkeypatch):
    writer, asked = Fake(), []
    module = types.SimpleNamespace(SummaryWriter=lambda *given, **more: asked.append((given, more)) or writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    watched(tmp_path, CONFIG.but(watch={"tensorboard": True}))
    assert asked == [((str(tmp_path / "tensorboard"),), {"purge_step": None})]
    assert ("loss", 70.0, 30) in writer.told
    assert ("evaluation/kl", 0.4, 199) in writer.told
    assert writer.closed == 1


@pytest.mark.parametrize(
    ("settings", "module"), [({"tensorboard": True}, "torch.utils.tensorboard"), ({"wandb": "x"}, "wandb")]
)
def test_what_is_not_installed_is_named(settings, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with (
        pytest.raises(ConfigError, match=rf"pip install {module.split('.')[-1]}"),
        Watching(CONFIG.but(watch=settings), tmp_path),
    ):
        pass
    if "tensorboard" in settings:
        with pytest.raises(ConfigError, match="give output="), Watching(CONFIG.but(watch=settings), None):
            pass


# ---------------------------------------------------------------- the console


def test_a_line_now_and_then_where_there_is_no_terminal(capsys):
    watched(config=CONFIG.but(watch={"console": True}))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 22
    assert lines[3].startswith("step 31 of 200 (16%)  loss 70  FVU 0.5000  L0 3.0 a group  dead 25.0%")
    assert "loss +0.5000, KL 0.4000, top-1 80.0%" in lines[-1]
    watched()
    watched(config=CONFIG.but(watch={"console": False}))
    assert capsys.readouterr().err == ""


def test_the_live_display_shows_where_a_run_stands():
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    (live,) = console_for(CONFIG, console)
    assert isinstance(live, LiveConsole)
    live.step(replace(METRICS, step=49), 1234.0, watched=False)
    live.evaluated(49, EVALUATION)
    live.close()
    shown = console.file.getvalue()
    for part in ("step 50 of 200 (25%)", "L0    4.0 2.0", "dead  0% 50%", "1,234 tokens/s", "FVU 0.3000"):
        assert part in shown
    assert console_for(CONFIG.but(watch={"console": False}), console) == []


# ---------------------------------------------------------------- warnings


def warned(config=CONFIG, steps=range(0, 200, 10), **changes):
    """Return what is warned of when every watched step is like this."""
    judge = EarlyWarnings(config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in steps:
            judge.step(replace(METRICS, step=step, **changes))
    assert all(each.category is TrainWarning for each in caught)
    return [str(each.message) for each in caught]


def test_nothing_is_warned_of_where_nothing_is_wrong():
    assert warned() == []
    assert warned(CONFIG.but(sparsity={"target_l0": 6.5})) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dead": (0.0, 1.0)}, "step 20: all latents of group 1 are dead: try"),
        ({"l0": (4.0, 0.05)}, "step 40: group 1 has an L0 of 0.05, .* separate decoder norms"),
        ({"l0": (100.0, 2.0), "near": ()}, "step 40: group 1 has an L0 of 2, where the groups' median is 51"),
        ({"near": (0.0, 0.02)}, "step 20: no pre-activation of group 0 .* wider bandwidth"),
    ],
)
def test_each_thing_is_warned_of_once(changes, message):
    (found,) = warned(**changes)
    assert re.match(message, found)


def test_a_group_that_falls_to_nothing_is_warned_of_at_once():
    judge = EarlyWarnings(replace(CONFIG, tokens=20_000))
    for metrics in (METRICS, *(replace(METRICS, step=step, l0=(4.0, 0.0)) for step in (10, 20))):
        judge.step(metrics)
    with pytest.warns(TrainWarning, match="group 1 has an L0 of 0,"):
        judge.step(replace(METRICS, step=30, l0=(4.0, 0.0)))


def test_what_passes_is_not_warned_of():
    judge = EarlyWarnings(CONFIG)
    for step in range(50, 200, 10):
        judge.step(replace(METRICS, step=step, near=(0.0 if step % 30 else 0.1, 0.02)))


@pytest.mark.parametrize(
    ("target", "message"),
    [(4.0, "L0 is 6 near .* 4: try a larger"), ((4.0, 3.0), "group 1 is 2 near .* smaller")],
)
def test_a_target_missed_is_warned_of_near_the_end(target, message):
    config = CONFIG.but(sparsity={"target_l0": target}, watch={"every": 1})
    assert warned(config, steps=range(189)) == []
    (found,) = warned(config, steps=range(200))
    assert re.search(message, found)


def test_short_runs_are_not_judged():
    assert warned(replace(CONFIG, tokens=990), steps=range(99), dead=(1.0, 1.0), l0=(0.0, 0.0)) == []


def test_a_log_that_is_gone_on_with_forgets_what_comes_again(tmp_path):
    watched(tmp_path, n_steps=51)
    again = Watching(CONFIG, tmp_path, n_done=25)
    assert [entry["step"] for entry in again.history] == [0, 10, 20]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, 10, 20]


# ---------------------------------------------------------------- the end of a run that cannot go on


def test_an_error_names_the_last_good_checkpoint(tmp_path):
    for folder, message in ((RunFolder(None, CONFIG), "^nan$"), (RunFolder(tmp_path, CONFIG), "^nan$")):
        with pytest.raises(TrainError, match=message), folder.naming_checkpoint():
            raise TrainError("nan")
    folder.save(10, {"weights": torch.zeros(2)}, {})
    message = r"^nan\. The last good checkpoint is .*step-00000010"
    with pytest.raises(TrainError, match=message), folder.naming_checkpoint():
        raise TrainError("nan")
