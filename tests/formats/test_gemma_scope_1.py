"""Gemma Scope 1: what its paths must tell."""

from __future__ import annotations

import numpy as np
import pytest

import clt_plugin as cp
from support.layouts import gemma_scope_1 as made

PLACE = "layer_5/width_16k/average_l0_87"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (f"mine/{PLACE}", "does not hold what it reads and writes"),
        ("gemma-scope-2b-pt-transcoders/width_16k/average_l0_87", "does not hold which layer it is"),
        ("gemma-scope-9b-pt-res/embedding/width_4k/average_l0_6", "does not hold which layer it is"),
        (f"gemma-scope-2b-pt-att/{PLACE}", "the heads' outputs before they are projected"),
        (f"gemma-scope-2b-pt-nothing/{PLACE}", "a config.yaml that lists the file"),
    ],
)
def test_paths_that_do_not_tell(tmp_path, path, words):
    made.write(tmp_path / path)
    with pytest.raises(cp.FormatError, match=words):
        cp.load(tmp_path / path)


def test_the_folder_itself(tmp_path, monkeypatch):
    folder = tmp_path / "gemma-scope-2b-pt-transcoders" / PLACE
    made.write(folder)
    monkeypatch.chdir(folder)
    assert cp.load(".").wiring == cp.load(folder).wiring


def test_several_of_one_layer(tmp_path):
    below = tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_5" / "width_16k"
    for n in (43, 87):
        made.write(below / f"average_l0_{n}")
    with pytest.raises(cp.FormatError, match=r"holds layer 5 more than once .*average_l0_43.*average_l0_87"):
        cp.load(f"{tmp_path}/gemma-scope-2b-pt-transcoders/layer_*/width_16k/average_l0_*")


def test_factors_that_scale(tmp_path):
    folder = tmp_path / "gemma-scope-2b-pt-res" / PLACE
    made.write(folder, scaling=True)
    tensors = dict(np.load(folder / "params.npz"))
    np.savez(folder / "params.npz", **tensors | {"scaling_factor": tensors["scaling_factor"] * 2})
    with pytest.raises(cp.FormatError, match="scaling_factor is not 1 everywhere"):
        cp.load(folder)
