"""Two and four processes do what one does: see parallel_cases.py, which they run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

import clt_plugin as cp
from clt_plugin.training import ConfigError, checkpoints
from clt_plugin.training.trainer import Trainer
from training import parallel_cases as cases

PROCESSES = [(n, mesh) for n, meshes in cases.MESHES.items() for mesh in meshes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def results(folder):
    """What comes of the processes, which are all started once."""
    for case in cases.CHAINED:
        trainer = Trainer(cases.crosscoder_of(case), cases.config_of(case))
        cases.step(trainer)
        checkpoints.save(folder / "chain" / case, trainer.n_done, trainer.tensors(), trainer.numbers())
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, cases.__file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return {world: torch.load(folder / f"{world}.pt", weights_only=False) for world in cases.MESHES}


@pytest.fixture(scope="module")
def alone():
    return {(case, path): cases.run(case, path=path) for case in cases.CASES for path in ("sparse", "dense")}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        close = torch.isclose(found[name], value, rtol=1e-10, atol=1e-10, equal_nan=True)
        assert close.all(), (name, found[name], value)


def flat(metrics):
    """Metrics as one mapping of names to numbers."""
    return {key: value for key, value in metrics.items() if key != "penalties"} | metrics["penalties"]


@pytest.mark.parametrize(("world", "mesh"), PROCESSES)
@pytest.mark.parametrize("case", cases.CASES)
def test_steps_are_those_of_one_process(case, world, mesh, results, alone):
    for path in cases.PATHS[world]:
        found, expected = results[world][mesh]["runs"][case, path], alone[case, path]
        for mine, theirs in zip(found["metrics"], expected["metrics"], strict=True):
            mine, theirs = flat(mine), flat(theirs)
            assert mine.keys() == theirs.keys()
            for name, value in theirs.items():
                assert mine[name] == pytest.approx(value, rel=1e-10), name
        assert_same(found["gradients"], expected["gradients"])
        assert_same(found["weights"], expected["weights"])
        assert torch.equal(found["silent"], expected["silent"])


def test_what_is_compared_has_every_kind_of_work_in_it(alone):
    """Dead latents, clipped gradients, thresholds that move: none is compared as nothing with nothing."""
    for (case, _), run in alone.items():
        last = run["metrics"][-1]
        assert last["gradient_norm"] > 1
        assert all(value != 0 for value in flat(last).values()), case
        assert min(last["dead"]) > 0 or case == "topk unrectified"
        assert all(run["gradients"][name].any() for name in ("W_enc.0", "W_dec.2", "b_enc.1", "b_dec.0", "W_skip.0"))
    assert alone["jumprelu", "sparse"]["gradients"]["threshold.1"].any()


@pytest.mark.parametrize(("world", "mesh"), PROCESSES)
def test_selections_are_those_of_the_largest(world, mesh, results):
    """Exactly k, all at or above the k-th largest, of equals those that come first: by process, then by place."""
    found = iter(results[world][mesh]["selections"])
    for kind, k in cases.SELECTIONS:
        scores = cases.scores_of(*mesh, kind)
        rows = min(k, scores.shape[1])
        bound = scores.topk(rows, dim=1).values[:, -1:]
        chosen = next(found)
        assert (chosen.sum(1) == rows).all()
        assert torch.equal(scores > bound, chosen & (scores > bound))
        assert (scores[chosen] >= bound.expand_as(scores)[chosen]).all()
        if mesh[1] > 1:  # within one process any of them
            first = (scores == bound).cumsum(1) <= rows - (scores > bound).sum(1, keepdim=True)
            assert torch.equal(chosen, (scores > bound) | ((scores == bound) & first))

        chosen, positive = next(found), int((scores > 0).sum())
        total = min(k * len(scores), positive)
        assert int(chosen.sum()) == total
        least = scores.flatten().topk(total).values[-1]
        assert torch.equal(chosen & (scores != least), scores > least)
        by_process = torch.cat([
            part.flatten() for row in chosen.chunk(mesh[0]) for part in row.chunk(mesh[1], 1)
        ])  # fmt: skip
        ordered = torch.cat([part.flatten() for row in scores.chunk(mesh[0]) for part in row.chunk(mesh[1], 1)])
        ties = by_process[ordered == least]
        assert ties[: int(ties.sum())].all()


@pytest.mark.parametrize("case", cases.CHAINED)
def test_checkpoints_load_at_another_number_of_processes(case, results, folder):
    """Steps taken by one, four, two and one process, each from the checkpoint before, are those of one alone."""
    trainer = cases.go_on(case, folder / "chain")
    assert trainer.n_done == cases.N_STEPS
    expected = Trainer(cases.crosscoder_of(case), cases.config_of(case))
    for _ in range(cases.N_STEPS):
        cases.step(expected)
    assert_same(trainer.tensors(), expected.tensors())


def test_a_run_goes_on_with_fewer_processes(results, folder, tmp_path):
    """Four are stopped by a signal to one of them, two go on: the end is that of one that never stopped."""
    assert "did after 7 of 12 steps" in results[4]["stopped"]
    alone = cp.train(None, cases.Noise(), cases.run_config(), output=tmp_path / "run")
    ended = cp.train(None, cases.Noise(), cases.run_config(), output=folder / "run")
    assert ended.report["processes"] == 2
    theirs = dict(alone.crosscoder.named_parameters())
    for name, mine in ended.crosscoder.named_parameters():
        assert_close(mine, theirs[name], rtol=1e-4, atol=1e-5, msg=lambda said, name=name: f"{name}: {said}")
    assert [entry["step"] for entry in ended.history] == list(range(12))
    for mine, theirs in zip(ended.history, alone.history, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert not list((folder / "run" / "checkpoints").glob(".*"))


def test_what_cannot_be_is_refused_in_every_process(results):
    for world in cases.MESHES:
        expected = ["the penalties faithfulness look at all", "compile is for one process"]
        expected += ["1 tokens a part of a batch are not shared evenly by 2", "parallel.latent=3 does not divide"]
        expected += ["the loss is nan"]
        for said, part in zip(results[world]["refusals"], expected, strict=True):
            assert part in said
    with pytest.raises(ConfigError, match=r"parallel.latent=2 does not divide the number of processes, 1"):
        cp.train(None, cases.Noise(), cases.run_config(2))
