"""A run that is interrupted anywhere leaves the model, and the disk, as they were."""

from __future__ import annotations

import pytest
import torch

import clt_plugin as cp
from attribution.graphs import make_graph
from clt_plugin.adapters import _attention
from clt_plugin.attribution import trace
from clt_plugin.attribution.engine import checks, direct, edges, linear, local
from support.crosscoders import make_clt
from support.models import make_model

IDS = torch.tensor([0, 5, 17, 33, 60])


def state(hf):
    hooks = [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in hf.named_modules()]
    return hooks, hf.config._attn_implementation, dict(_attention._ACTING), hf.training


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (linear, "value_outputs"),  # the run is recorded
        (local, "sources_of"),
        (edges, "_shared"),  # edges are being found
        (checks, "column_residual"),
        (direct.FixedRun, "output"),  # in the middle of the direct run
        (checks, "layer_residuals"),
    ],
)
def test_the_model_is_left_as_it_was(where, name, monkeypatch):
    hf, clt = make_model("gemma2"), make_clt()
    before = state(hf)
    expected = cp.attribute(hf, IDS, clt=clt).adjacency

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, name, interrupt)
    with pytest.raises(KeyboardInterrupt):
        cp.attribute(hf, IDS, clt=clt)
    assert state(hf) == before
    monkeypatch.undo()
    assert torch.equal(cp.attribute(hf, IDS, clt=clt).adjacency, expected)
    assert trace.attribute is cp.attribute


@pytest.mark.parametrize("method", ["save", "to_json", "to_html"])
def test_no_half_written_file_is_left(method, tmp_path, monkeypatch):
    graph, path = make_graph(1), tmp_path / "graph"
    getattr(graph, method)(path)
    before = path.read_bytes()

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("clt_plugin.core.aside.os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        getattr(make_graph(2), method)(path)
    assert [each.name for each in tmp_path.iterdir()] == ["graph"]
    assert path.read_bytes() == before
