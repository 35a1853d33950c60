"""The engine's parts against plain sums: vectors that meet states, the order of sources, what a direct run leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

import clt_plugin as cp
from clt_plugin.attribution.engine import direct
from clt_plugin.attribution.engine._vectors import Vectors
from clt_plugin.attribution.engine.local import LocalReplacement
from support.crosscoders import make_clt
from support.models import make_model

IDS = torch.tensor([0, 5, 17, 33, 60, 9, 12, 40])
N, D = 6, 5

# Two at position 0 with rows apart, none at 1, four at 2 of which the last two follow another row, one at 5.
ROWS, AT = torch.tensor([7, 3, 0, 1, 5, 6, 2]), torch.tensor([0, 0, 2, 2, 2, 2, 5])


def vectors() -> Vectors:
    return Vectors(ROWS, AT, torch.randn(len(ROWS), D, dtype=torch.float64))


@pytest.mark.parametrize("columns", [1, 4])
@pytest.mark.parametrize(("start", "m"), [(0, 6), (0, 3), (2, 4), (3, 2)])
def test_vectors_meet_the_states_at_their_positions(columns, start, m):
    one, states = vectors(), torch.randn(m, columns, D, dtype=torch.float64)
    edges = torch.randn(8, columns, dtype=torch.float64)
    expected = edges.clone()
    for row, at, vector in zip(ROWS.tolist(), AT.tolist(), one.vectors, strict=True):
        if start <= at < start + m:
            expected[row] += states[at - start] @ vector
    one.meet(states, start, [slice(None)] * m, edges)
    assert_close(edges, expected)


def test_columns_out_of_reach_are_left_out_and_edges_may_be_a_transposed_view():
    one, states = vectors(), torch.randn(N, 4, D, dtype=torch.float64)
    found = torch.zeros(4, 8, dtype=torch.float64)
    reach = [slice(max(0, at - 3), 4) for at in range(N)]
    one.meet(states, 0, reach, found.T)
    for row, at, vector in zip(ROWS.tolist(), AT.tolist(), one.vectors, strict=True):
        expected = states[at] @ vector
        expected[: reach[at].start] = 0
        assert_close(found[:, row], expected)


def test_vectors_are_added_where_they_are():
    one, weights = vectors(), torch.randn(3, 8, dtype=torch.float64)
    totals = torch.zeros(3, N, D, dtype=torch.float64)
    one.add_to(totals, weights)
    expected = torch.zeros_like(totals)
    for row, at, vector in zip(ROWS.tolist(), AT.tolist(), one.vectors, strict=True):
        expected[:, at] += weights[:, row, None] * vector
    assert_close(totals, expected)


def local_of(family: str = "llama") -> LocalReplacement:
    hf, clt = make_model(family), make_clt()
    with torch.no_grad():
        return LocalReplacement.of(hf, clt, {"input_ids": IDS[None]})


def test_what_is_written_at_a_layer_lies_together_at_each_position():
    sources = local_of().sources
    n = len(sources.features)
    assert torch.equal(sources.order[sources.places], torch.arange(sources.n_writing))
    for layer in range(sources.n_layers):
        parts = list(sources.written(layer))
        places, vectors = (torch.cat([getattr(part, name) for part in parts]) for name in ("rows", "vectors"))
        writers = torch.zeros(sources.n_writing, dtype=torch.bool)
        writers[sources.order[places]] = True
        expected = torch.arange(sources.n_writing)
        home = torch.tensor(sources.features.home)[sources.features.group]
        writes = torch.cat((home <= layer, (expected[n:] - n) // len(IDS) == layer))
        assert bool(writers[writes].all())
        assert not bool(vectors[~writes[sources.order[places]]].any())  # between writers, zeros
        for run in range(len(IDS)):
            here = places[sources.position[sources.order[places]] == run]
            assert bool((here.diff() == 1).all())


def test_what_is_kept_does_not_keep_parts_from_moving():
    local = local_of()
    _ = local.sources.features.ranges, list(local.sources.written(0)), local.frozen.layers[0].shares
    moved = local.to(torch.device("meta"))
    assert moved.sources.features.group.is_meta
    assert moved.sources.rows[0].rows.is_meta
    assert moved.frozen.layers[0].shares.is_meta


def own_forwards(hf: Any) -> list[str]:
    return [name for name, module in hf.named_modules() if "forward" in vars(module)]


def test_mlps_run_again_after_a_direct_run(monkeypatch):
    hf, clt = make_model("gemma2"), make_clt()
    mlp = hf.get_submodule("model.layers.1.mlp")
    mlp.forward = mlp.forward  # as a library does that has put another in its place
    kept = mlp.forward
    logits = hf(IDS[None]).logits
    cp.attribute(hf, IDS, clt=clt)
    assert own_forwards(hf) == ["model.layers.1.mlp"]
    assert mlp.forward is kept

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(direct.FixedRun, "output", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cp.attribute(hf, IDS, clt=clt)
    assert own_forwards(hf) == ["model.layers.1.mlp"]
    assert torch.equal(hf(IDS[None]).logits, logits)
