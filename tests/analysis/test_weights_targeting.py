"""Targeting scans: equal to dense float64, planted targets found, nothing found where there is nothing."""

from functools import cache

import pandas as pd
import pytest
import torch
import transformers

import clt_plugin as cp
from clt_plugin.adapters.huggingface import HostModel
from clt_plugin.analysis import weights
from clt_plugin.analysis.weights import _readers
from clt_plugin.analysis.weights._nulls import Bank, Limits, Nulls, binned
from clt_plugin.analysis.weights._tally import Above, Tally
from clt_plugin.core import Site, WiringError
from support.crosscoders import make_clt
from support.models import make_model, nnsight_model

D, LAYERS, HEADS = 64, 3, 8
FAST = {"draws": 999, "bar": False}


@cache
def model():
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=61, n_embd=D, n_layer=LAYERS, n_head=HEADS, n_positions=32, bos_token_id=0, eos_token_id=1
    )
    made = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        if ".ln_" in name:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return made


def random_clt(n=400, wiring=None, seed=0):
    torch.manual_seed(seed)
    clt = cp.Crosscoder(wiring or cp.Wiring.clt(LAYERS), D, n, "relu").requires_grad_(False)
    for decoder in clt.W_dec:
        # Norms that differ by an order of magnitude.
        decoder.copy_(torch.randn_like(decoder) * torch.rand(len(decoder), 1).mul(2).exp())
    return clt


def heads(gains=True):
    return _readers.heads(model(), HostModel.of(model()), "q", gains)


def share(found, null):
    return found.table.set_index("null").loc[null, "share"]


# ---------------------------------------------------------------- exact


@pytest.mark.parametrize(("kind", "read_by", "vectors"), [("head", "later", "all"), ("neuron", "next", "cross")])
def test_a_lazy_scan_equals_dense_float64(kind, read_by, vectors, tmp_path, monkeypatch):
    family = make_model("gemma2", torch.float64)
    clt = make_clt(dtype=torch.float64, n_latents=90, seed=2)
    for decoder in clt.W_dec:
        decoder *= torch.randn(90, 1).exp()
    clt.save(tmp_path / "clt")
    lazy = cp.load(tmp_path / "clt", lazy=True)
    seen = {}
    real = Nulls.limits

    def limits(self, name, target, layer):
        seen[name, target.layer, layer], scale = real(self, name, target, layer), self.bank.scale
        seen["scale"] = scale
        return seen[name, target.layer, layer]

    monkeypatch.setattr(Nulls, "limits", limits)
    # Blocks of several latents, so that what is split comes together.
    monkeypatch.setattr("clt_plugin.analysis.weights._blocks.ROWS", 7)
    nulls = ["isotropic", "covariance"]
    scan = weights.attention_targeting if kind == "head" else weights.mlp_targeting
    found = scan(lazy, family, nulls=nulls, read_by=read_by, vectors=vectors, **FAST)
    host = HostModel.of(family)
    units = _readers.heads(family, host) if kind == "head" else _readers.neurons(family, host)
    for null in nulls:
        rows = []
        for g in range(3):
            for j in range(3 - g):
                target = g + j
                if vectors == "cross" and j == 0:
                    continue
                for layer in range(target + 1, 3 if read_by == "later" else min(target + 2, 3)):
                    for i in range(90):
                        v = clt.W_dec[g][i].view(-1, 16)[j].double()
                        together = null == "isotropic" and kind == "head"
                        v = v / (seen["scale"] if together else v.norm())
                        read = units.weights[layer] @ v
                        s = read.view(-1, units.width).norm(dim=1) if kind == "head" else read
                        limit = seen[null, target, layer]
                        for u in (s.abs() > limit.limit).nonzero()[:, 0].tolist():
                            z = (s[u].abs() - limit.middle[u]) / (limit.limit[u] - limit.middle[u])
                            rows.append((g, i, target, layer, u, float(s[u]), float(z)))
        dense = pd.DataFrame(rows, columns=["source", "feature", "target", "layer", kind, "strength", "standard"])
        assert len(dense) > 2
        assert int(found.by_layer(null)["hits"].sum()) == len(dense)
        hits = found.by_unit(null).set_index(["layer", kind])["hits"]
        assert all(hits[at] == n for at, n in dense.groupby(["layer", kind]).size().items())
        top = dense.sort_values("standard", ascending=False).head(200).reset_index(drop=True)
        for name in top.columns:
            assert found.top(null, k=200)[name].tolist() == pytest.approx(top[name].tolist(), rel=1e-6), name
        if kind == "neuron":
            assert found.negative(null) == pytest.approx((dense["strength"] < 0).mean())


def test_limits_are_what_a_further_draw_exceeds_by_chance():
    torch.manual_seed(0)
    spread = torch.rand(300) + 0.1  # units differ in scale
    draw = lambda n: spread * torch.randn(n, 8, 300).norm(dim=1)  # noqa: E731
    limits = Limits.of(draw(999))
    assert limits.by_chance == 0.01
    fresh = draw(4000)
    assert float((fresh > limits.limit).double().mean()) == pytest.approx(0.01, rel=0.05)
    standard = (fresh - limits.middle) / (limits.limit - limits.middle)
    assert float((standard.amax(1) > limits.largest).double().mean()) == pytest.approx(0.01, abs=0.008)
    # What is above the limits lies as draws above them do.
    seen, tail = binned(standard[fresh > limits.limit]), limits.tail
    for edge in (100, 200, 400):
        assert float(seen[edge:].sum() / seen.sum()) == pytest.approx(float(tail[edge:].sum() / tail.sum()), abs=0.03)


def test_discoveries_are_those_of_benjamini_and_hochberg():
    torch.manual_seed(0)
    n, units = 500, 20
    null = torch.randn(1999, units).abs()
    limits = Limits.of(null)
    strengths = torch.randn(n, units)
    strengths[:40, :5] *= 3
    tally = Tally((n,), (units,))
    tally.add(Above.of(strengths, [limits]), limits, (0, 0, 0), torch.arange(n))
    # The textbook's: p-values from the pooled standardised draws, sorted.
    standardise = lambda s: (s - limits.middle) / (limits.limit - limits.middle)  # noqa: E731
    pooled, seen = standardise(null).flatten().sort().values, standardise(strengths.abs()).flatten()
    above = len(pooled) - torch.searchsorted(pooled, seen)
    p = ((above / 2000 + 1 / 2000 * 1) / units).double().sort().values
    passed = (p <= 0.05 * torch.arange(1, len(p) + 1) / len(p)).nonzero()
    textbook = int(passed.max()) + 1
    assert textbook > 30
    assert tally.discoveries(0.05) == pytest.approx(textbook, abs=3)
    q = tally.q_values(tally.top[:, 0])
    assert int((q <= 0.05).sum()) == tally.discoveries(0.05)


def test_covariance_matched_draws_stay_in_the_span_and_have_the_covariance():
    torch.manual_seed(0)
    sample = torch.nn.functional.normalize(torch.randn(300, 3) @ torch.randn(3, 20) + 1, dim=1)
    site = Site("model", "mlp_out", 1)
    bank = Bank({site: sample}, {site: torch.zeros(300)}, 1.0)
    nulls = Nulls(_readers.Units("head", (), 1, ()), bank, {0: [site]}, (), 20000, torch.Generator().manual_seed(0))
    drawn = nulls._gaussian(sample)
    assert torch.linalg.matrix_rank(torch.cat([sample, drawn[:50]]), rtol=1e-4) == torch.linalg.matrix_rank(
        sample, rtol=1e-4
    )
    assert torch.allclose(drawn.mean(0), sample.mean(0), atol=0.02)
    assert torch.allclose(drawn.T.cov(), sample.T.cov(), atol=0.01)
    assert torch.allclose(nulls.directions("covariance", site).norm(dim=1), torch.ones(20000))


# ---------------------------------------------------------------- planted, and not


def planted(n=400, by=40, layer=2, head=5):
    """Plant vectors of group 0 to layer 1 that point where a head of layer 2 reads most."""
    clt = random_clt(n)
    rows = heads().weights[layer].view(HEADS, -1, D)[head]
    best = torch.linalg.svd(rows)[2][0]
    clt.W_dec[0].view(n, LAYERS, D)[:by, 1] = 3 * best + 0.05 * torch.randn(by, D)
    return clt


def test_planted_heads_are_found():
    found = weights.attention_targeting(planted(), model(), nulls=["norm", "untrained", "base"], **FAST)
    for null in ("norm", "untrained", "base"):
        top = found.top(null, k=40)
        assert set(zip(top["layer"], top["head"], strict=True)) == {(2, 5)}
        assert set(top["feature"]) == set(range(40))
        assert (top["q"] < 0.05).all()
        assert found.by_unit(null).set_index(["layer", "head"]).loc[(2, 5), "hits"] >= 40
        # Other heads read the planted direction as well, and hardly any other vector is discovered.
        n = found.table.set_index("null").loc[null, "discoveries"]
        assert 40 <= n <= 40 * HEADS
        assert (found.top(null, k=n)["feature"] < 40).mean() > 0.9


def test_an_untrained_clt_targets_nothing():
    found = weights.attention_targeting(weights.untrained(random_clt(2000), 2000), model(), **FAST)
    table = found.table.set_index("null")
    assert len(table) == 6
    for null in table.index:
        assert table.loc[null, "share"] == pytest.approx(table.loc[null, "by_chance"], abs=0.0035), null
        if null != "isotropic":  # for which norms that differ count as well
            assert table.loc[null, "share_largest"] == pytest.approx(0.01, abs=0.008), null
        assert table.loc[null, "discoveries"] == 0


def test_the_largest_of_eight_heads_against_one_percentile_errs_six_to_eight_times():
    """The document's own statistic finds 6 to 7% where there is nothing; its expectation is stated beside it."""
    torch.manual_seed(0)
    # Heads of one scale, where the maximum is of eight alike.
    limits = Limits.of(torch.randn(4999, 16, HEADS).norm(dim=1))
    assert 0.06 < limits.naive_by_chance < 0.085
    found = weights.attention_targeting(weights.untrained(random_clt(2000), 2000), model(), nulls=["norm"], **FAST)
    row = found.table.iloc[0]
    assert row["naive"] == pytest.approx(row["naive_by_chance"], abs=0.015)
    assert row["naive"] > 3 * row["share"]


def test_a_shared_subspace_is_not_targeting():
    """Decoders that keep to where heads read exceed random directions, and not those of their own covariance."""
    clt = random_clt(800)
    for decoder in clt.W_dec:
        rows = heads().weights[2]
        weight = torch.linalg.svd(rows, full_matrices=False)[2][:12]
        decoder.copy_((torch.randn(len(decoder), decoder.shape[1] // D, 12) @ weight).flatten(1))
    found = weights.attention_targeting(clt, model(), nulls=["norm", "covariance"], **FAST)
    assert share(found, "norm") > 0.1
    assert share(found, "covariance") == pytest.approx(0.01, abs=0.006)
    assert found.table.set_index("null").loc["covariance", "discoveries"] == 0


def test_shuffled_targets_tell_a_layer_from_a_direction():
    clt = planted(by=200)
    everywhere = planted(by=200)
    view = everywhere.W_dec[0].view(-1, LAYERS, D)
    view[:200, 2] = view[:200, 1]
    only, both = (weights.attention_targeting(c, model(), nulls=["shuffled"], **FAST) for c in (clt, everywhere))
    assert only.by_unit().set_index(["layer", "head"]).loc[(2, 5), "share"] > 0.4
    assert both.by_unit().set_index(["layer", "head"]).loc[(2, 5), "share"] < 0.03


def test_long_vectors_count_for_the_isotropic_null_alone():
    clt = random_clt()
    clt.W_dec[0].view(-1, LAYERS, D)[:100, 1] *= 20
    found = weights.attention_targeting(clt, model(), nulls=["isotropic", "norm"], **FAST)
    assert share(found, "isotropic") > 0.1
    assert share(found, "norm") < 0.02


def test_planted_neurons_hubs_and_suppression():
    host = HostModel.of(model())
    row = _readers.neurons(model(), host).weights[2][77]
    clt = random_clt()
    clt.W_dec[0].view(-1, LAYERS, D)[:60, 1] = -2 * row + 0.02 * torch.randn(60, D)
    clt.W_dec[0].view(-1, LAYERS, D)[60:80, 1] = 2 * row
    found = weights.mlp_targeting(clt, model(), nulls=["isotropic", "base"], **FAST)
    hub = found.by_unit().set_index(["layer", "neuron"]).loc[(2, 77)]
    assert hub["hits"] >= 80 > 8 * hub["by_chance"]
    assert hub["negative"] == pytest.approx(60 / hub["hits"], abs=0.05)
    top = found.top(k=80)
    assert set(zip(top["layer"], top["neuron"], strict=True)) == {(2, 77)}
    assert (top["strength"] < 0).sum() == 60
    assert top["strength"].iloc[0] == pytest.approx(1, abs=1e-4)
    plain = weights.mlp_targeting(random_clt(), model(), nulls=["isotropic"], **FAST)
    assert plain.table["discoveries"].item() == 0
    assert plain.by_unit(k=1)["hits"].item() < 20


def test_intervals_cover_and_follow_features():
    found = weights.attention_targeting(planted(), model(), nulls=["norm"], **FAST)
    row = found.table.iloc[0]
    assert row["low"] < row["share"] < row["high"]
    layers = found.by_layer()
    assert ((layers["low"] <= layers["share"]) & (layers["share"] <= layers["high"])).all()
    assert float((layers["hits"] / layers["tests"]).iloc[0]) == pytest.approx(layers["share"].iloc[0])
    # The same seed draws the same.
    again = weights.attention_targeting(planted(), model(), nulls=["norm"], **FAST)
    assert found.table.equals(again.table)


# ---------------------------------------------------------------- settings


def test_who_reads():
    clt = random_clt(40)
    layers = {
        read_by: weights.attention_targeting(clt, model(), nulls=["norm"], read_by=read_by, **FAST)
        for read_by in ("next", "later", "same")
    }
    # Group 0 writes 1 and 2, group 1 writes 2; what is written at 2 no later layer reads.
    assert {k: v.by_layer()[["layer", "tests"]].to_numpy().tolist() for k, v in layers.items()} == {
        "next": [[2, 40 * HEADS]],
        "later": [[2, 40 * HEADS]],
        "same": [[1, 40 * HEADS], [2, 80 * HEADS]],
    }
    own = weights.attention_targeting(clt, model(), nulls=["norm"], vectors="same", read_by="later", **FAST)
    assert own.by_layer()["tests"].tolist() == [40 * HEADS, 80 * HEADS]


def test_the_models_own_mlps_are_scanned_alike():
    found = weights.attention_targeting(weights.own_writes(model()), model(), vectors="same", **FAST)
    # A PLT's features write one layer: there is nothing to shuffle.
    assert "shuffled" not in set(found.table["null"])
    assert found.vectors == 2 * 4 * D
    assert share(found, "norm") == pytest.approx(0.01, abs=0.006)


def test_both_libraries_and_parts():
    clt = make_clt(n_latents=30)
    found = weights.attention_targeting(clt, nnsight_model("llama"), part="k", nulls=["norm"], **FAST)
    assert found.by_unit()["head"].tolist() == [0]  # one head of keys for two of queries
    assert found.plot().axes
    assert weights.mlp_targeting(clt, nnsight_model("llama"), nulls=["isotropic"], **FAST).plot().axes


def test_dead_decoders_are_left_out():
    clt = random_clt(50)
    clt.W_dec[0][:20] = 0
    found = weights.attention_targeting(clt, model(), nulls=["norm", "covariance"], **FAST)
    assert found.vectors == 30
    assert found.table["share"].notna().all()


def test_refusals():
    clt, few = random_clt(40), {"nulls": ["norm"], **FAST}
    with pytest.raises(ValueError, match="read_by is one of next, later, same, not 'all'"):
        weights.attention_targeting(clt, model(), read_by="all", **few)
    with pytest.raises(ValueError, match=r"nulls of neurons are .*, not norm"):
        weights.mlp_targeting(clt, model(), **few)
    with pytest.raises(ValueError, match="at least 199 draws, not 50"):
        weights.attention_targeting(clt, model(), draws=50)
    with pytest.raises(ValueError, match="'shuffled' cannot be drawn: sources write too few other targets"):
        weights.attention_targeting(clt, model(), nulls=["shuffled"], **FAST)
    plt = random_clt(40, cp.Wiring.plt(LAYERS))
    with pytest.raises(WiringError, match="no cross vectors of this crosscoder are read by a head"):
        weights.attention_targeting(plt, model(), **few)
    with pytest.raises(ValueError, match="has the nulls norm, not 'base'"):
        weights.attention_targeting(clt, model(), **few).by_layer("base")
