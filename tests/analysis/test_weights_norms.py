"""Decoder norms and what is made of them, against dense float64 and by hand."""

import math

import pytest
import torch

import clt_plugin as cp
from clt_plugin.analysis import STUDIES, weights
from clt_plugin.analysis.weights._blocks import blocks
from clt_plugin.core import WiringError
from support.crosscoders import make_clt


def with_norms(wiring, norms):
    """Make a crosscoder of width 3 whose vectors have the norms given, {(group, j): (n_latents,)}."""
    n = len(next(iter(norms.values())))
    clt = cp.Crosscoder(wiring, 3, n, "relu")
    with torch.no_grad():
        for decoder in clt.W_dec:
            decoder.zero_()
        for (g, j), values in norms.items():
            clt.W_dec[g][:, 3 * j + (g + j) % 3] = -torch.tensor(values)
    return clt


def decaying(scales, n_layers=4, rate=0.5):
    norms = {(s, j): [scales[s] * rate**j] * 3 for s in range(n_layers) for j in range(n_layers - s)}
    return with_norms(cp.Wiring.clt(n_layers), norms)


def test_streamed_from_disk_equals_dense_float64(tmp_path):
    clt = make_clt(seed=3)
    clt.save(tmp_path / "clt", format="circuit-tracer")
    lazy = cp.load(tmp_path / "clt", lazy=True)
    assert lazy.is_lazy
    found = weights.decoder_norms(lazy, bar=False)
    rows = found.table.set_index(["source", "target"])
    total = 0.0
    for g in range(3):
        dense = clt.W_dec[g].double().unflatten(1, (3 - g, -1)).norm(dim=2)
        assert torch.allclose(found.norms[g].double(), dense, rtol=1e-6)
        for j in range(3 - g):
            assert rows.loc[(g, g + j), "mean"] == pytest.approx(float(dense[:, j].mean()), rel=1e-6)
            assert rows.loc[(g, g + j), "sum"] == pytest.approx(float(dense[:, j].sum()), rel=1e-6)
        total += float(dense.mean(0).sum())
    assert float(found.summary["total"].sum()) == pytest.approx(total, rel=1e-6)


def test_blocks_cover_every_weight_once_whatever_their_size():
    clt = make_clt(n_latents=7)
    for entries in (1, 60, 10**9):
        seen = [torch.zeros_like(w) for w in clt.W_dec]
        for block in blocks(clt, False, entries=entries):
            for site, vectors in block.vectors.items():
                seen[block.group][block.rows, clt.layout.write_slices[block.group][site]] += vectors
        assert all(torch.equal(a, b) for a, b in zip(seen, clt.W_dec, strict=True))


def test_mass_by_hand():
    clt = with_norms(cp.Wiring.clt(2), {(0, 0): [3.0, 5.0], (0, 1): [1.0, 0.0], (1, 0): [2.0, 2.0]})
    summary = weights.decoder_norms(clt, bar=False).summary.set_index("kind")
    assert summary.loc["same-layer"].tolist() == pytest.approx([2, 6.0, 6 / 6.5, 3.0])
    assert summary.loc["cross-layer"].tolist() == pytest.approx([1, 0.5, 0.5 / 6.5, 0.5])


def test_scores_by_hand_and_what_writes_nothing():
    norms = {(0, 0): [4.0, 0.0, 0.0], (0, 1): [2.0, 1.0, 0.0], (0, 2): [1.0, 1.0, 0.0]}
    norms |= {(1, 0): [1.0] * 3, (1, 1): [1.0] * 3, (2, 0): [1.0] * 3}
    found = weights.cross_layer_features(with_norms(cp.Wiring.clt(3), norms), k=9, bar=False)
    assert found.scores[0].tolist()[:2] == [0.75, math.inf]
    assert math.isnan(found.scores[0][2])
    assert found.writes == (2, 1, 0)
    assert found.table.iloc[0][["layer", "feature", "cross"]].tolist() == ["0", 1, 2.0]
    # Eight features have a score; the one that writes nothing has none.
    assert len(found.table) == 8


def test_top_tokens_come_with_texts():
    from support.models import nnsight_model

    model, clt = nnsight_model("gpt2"), make_clt()
    found = weights.cross_layer_features(clt, model, ["w2 w3 w4 w5"], k=3, n_tokens=2, bar=False)
    assert all(each.count(",") <= 1 for each in found.table["top_tokens"])
    assert any("'w" in each for each in found.table["top_tokens"])
    with pytest.raises(ValueError, match="give the model"):
        weights.cross_layer_features(weights.decoder_norms(clt, bar=False), model, ["w2"])


def test_decay_is_fitted_and_within_sources_where_they_differ():
    even = weights.distance(decaying([1.0] * 4), bar=False)
    assert even.rate == pytest.approx(0.5)
    assert even.rate_within == pytest.approx(0.5)
    assert even.decay(3) == pytest.approx(0.125)
    # Early sources write less, and only they reach far: what looks like a steeper decay is not one.
    uneven = weights.distance(decaying([0.1, 1.0, 10.0, 100.0]), bar=False)
    assert uneven.rate_within == pytest.approx(0.5)
    assert uneven.rate < 0.3
    flat = weights.distance(decaying([1.0] * 4, rate=1.0), same_layer=False, bar=False)
    assert flat.rate == pytest.approx(1.0)


def test_a_plt_has_no_distance():
    found = weights.distance(cp.Crosscoder(cp.Wiring.plt(3), 4, 5, "relu"), bar=False)
    assert math.isnan(found.rate)
    with pytest.raises(ValueError, match=r"distances 0 and 5: \[0\]"):
        found.decay()


def test_spans_by_hand():
    norms = {(0, 0): [1.0, 1.0, 0.0], (0, 1): [0.05, 1.0, 0.0], (0, 2): [0.2, 1.0, 0.0]}
    norms |= {(1, 0): [0.0] * 3, (1, 1): [2.0] * 3, (2, 0): [1.0] * 3}
    clt = with_norms(cp.Wiring.clt(3), norms)
    plt = cp.Crosscoder(cp.Wiring.plt(3), 3, 4, "relu")
    found = weights.feature_span(clt, plt, bar=False)
    assert [each.tolist() for each in found.spans["CLT"]] == [[2, 3, 0], [1] * 3, [1] * 3]
    assert found.mean("CLT") == pytest.approx((2 + 3 + 3 + 3) / 8)
    assert found.mean("PLT") == 1
    absolute = weights.feature_span(clt, threshold=1.5, relative=False, bar=False)
    assert [each.tolist() for each in absolute.spans["CLT"]] == [[0, 0, 0], [1] * 3, [0] * 3]


def test_plots_and_names():
    norms = weights.decoder_norms(make_clt(), bar=False)
    plt = make_clt(cp.Wiring.plt(3))
    results = (norms, weights.cross_layer_features(norms), weights.distance(norms), weights.feature_span(norms, plt))
    for result in results:
        assert result.plot().axes
    names = {"decoder-norms", "cross-layer-features", "distance", "feature-span", "time-travel"}
    names |= {"attention-targeting", "mlp-targeting", "coactivation", "targeting-effect"}
    assert names <= set(STUDIES)


def test_several_models_are_refused():
    clt = cp.Crosscoder(cp.Wiring.model_diff(["a", "b"], 1), 4, 5, "relu")
    with pytest.raises(WiringError, match="spans a, b"):
        weights.decoder_norms(clt)
