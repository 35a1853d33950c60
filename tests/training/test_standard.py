"""Statistics streamed over batches against those of everything at once, and folding against unfolded outputs."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch.testing import assert_close

from clt_plugin.core import Site, WiringError
from clt_plugin.formats import load
from clt_plugin.training.standard import Moments, Scaling, Standard, Statistics, fold, unfold
from core.oracle import ACTIVATIONS, WIRINGS, brute_decode, brute_encode, build, copies, inputs

SITE = Site("model", "mlp_in", 0)


def drifting(n=400, d=5):
    """Tokens whose mean and spread move far, with coordinates of very different scales and a constant one."""
    time = torch.linspace(0, 1, n)[:, None].double()
    x = 1e4 + 30 * time + (1 + 5 * time) * torch.randn(n, d).double() * torch.tensor([1.0, 2.0, 0.5, 1e-4, 0.0])
    x[:, 4] = 7.0
    return x


def random_standard(crosscoder):
    """Very different scales and means for every site, and for every coordinate."""
    sites = dict.fromkeys((*crosscoder.wiring.read_sites, *crosscoder.wiring.write_sites))
    scalings = {}
    for i, site in enumerate(sites):
        mean, scale = torch.randn(2, crosscoder.layout.width[site]).double()
        scalings[site] = Scaling(3 * mean, scale.exp() * 4.0**i)
    return Standard(scalings)


def calibrate(crosscoder, x):
    """Measure BatchTopK's thresholds, off the smallest score selected: they lie one rounding below it."""
    if crosscoder.activation.has_batch_threshold:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of groups that select nothing
            crosscoder.estimate_threshold(x)
        for threshold in crosscoder.threshold:
            threshold.data.mul_(1 - 1e-9)


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("sizes", [(400,), (1, 2, 397), (100,) * 4, (0, 399, 1)])
def test_moments_do_not_depend_on_the_batches(sizes):
    x = drifting()
    moments = Moments(5)
    for part in x.split(sizes):
        moments.update(part)
    assert moments.count == 400
    assert_close(moments.mean, x.mean(0), rtol=1e-14, atol=0)
    # A naive sum of squares is wrong in the fourth digit of a spread of 1e-4 about 1e4.
    assert_close(moments.variance, x.var(0, correction=0), rtol=1e-11, atol=0)


def test_merged_and_in_low_precision():
    x = drifting().to(torch.bfloat16)
    whole, halves = Moments(5), [Moments(5), Moments(5)]
    whole.update(x.reshape(4, 100, 5))
    for each, part in zip(halves, x.split(150), strict=False):
        each.update(part)
    rest = Statistics()
    rest.update({SITE: x[300:]})
    statistics = Statistics()
    for each in halves:
        other = Statistics()
        other.moments[SITE] = each
        statistics.merge(other)
    statistics.merge(rest)
    assert_close(statistics.moments[SITE].mean, whole.mean)
    assert_close(statistics.moments[SITE].variance, x.double().var(0, correction=0))


@pytest.mark.parametrize(
    "settings", [{}, {"centred": False}, {"per_coordinate": True}, {"per_coordinate": True, "floor": 0.01}]
)
def test_standard_units(settings):
    x = drifting()
    batches = [{SITE: part} for part in x.split(64)]
    standard = Standard.of(batches, **settings)
    scaling, y = standard[SITE], torch.cat([standard.standardise(batch)[SITE] for batch in batches])
    assert_close(torch.cat([standard.restore({SITE: part})[SITE] for part in y.split(100)]), x, rtol=1e-14, atol=0)
    if settings.get("centred", True):
        assert y.mean(0).abs().max() < 1e-9
    if settings.get("per_coordinate"):
        floor = settings.get("floor", 0.1) * x.var(0, correction=0).mean().sqrt()
        assert_close(scaling.scale, x.std(0, correction=0).clamp(min=floor))
        assert (y.square().mean(0)[:3] - 1).abs().max() < 1e-9
        assert not y[:, 4].any()
    else:
        assert len(scaling.scale.unique()) == 1
        assert y.square().mean().item() == pytest.approx(1, rel=1e-9)


def test_refusals():
    constant = torch.full((50, 3), 0.1).bfloat16()
    with pytest.raises(ValueError, match=r"mlp_in\.0 does not vary over the 50 tokens"):
        Standard.of([{SITE: constant}])
    assert Standard.of([{SITE: constant}], centred=False)[SITE].scale[0].item() == pytest.approx(0.1, rel=1e-2)
    with pytest.raises(ValueError, match="was seen on 1 tokens"):
        Standard.of([{SITE: torch.randn(1, 3)}])
    with pytest.raises(ValueError, match=r"activation of mlp_in\.0 is not finite"):
        Standard.of([{SITE: torch.tensor([[1.0, float("inf")]])}])
    with pytest.raises(WiringError, match="has width 3, but activations of width 4"):
        Standard.of([{SITE: torch.randn(2, 3)}, {SITE: torch.randn(2, 4)}])
    crosscoder = build("clt", "relu")
    with pytest.raises(WiringError, match=r"mlp_in\.1 has no statistics"):
        fold(crosscoder, Standard.of([{SITE: torch.randn(9, 4)}]))


# ---------------------------------------------------------------- folding


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("wiring", ["clt", "acausal", "ragged_skips"])
def test_folding_is_exact(wiring, activation):
    """Raw in, raw out, as standardising, running unfolded and restoring gives it: for every activation."""
    crosscoder = build(wiring, activation)
    standard, raw = random_standard(crosscoder), inputs(crosscoder, (6,))
    before = copy.deepcopy(crosscoder)
    calibrate(crosscoder, standard.standardise(raw))
    for mode in (True, False):
        crosscoder.train(mode)
        folded = fold(crosscoder, standard)
        p = copies(crosscoder)
        if mode or not crosscoder.activation.has_batch_threshold:
            # The oracle shares nothing with the product but the formulas.
            small = standard.standardise(raw)
            features = brute_encode(crosscoder, p, small)
            expected = standard.restore(brute_decode(crosscoder, p, features, small))
        else:
            expected = standard.restore(crosscoder(standard.standardise(raw)))
        largest = max(y.abs().max() for y in expected.values())
        for site, y in folded(raw).items():
            assert (y - expected[site]).abs().max() <= 1e-12 * largest
        acts = zip(folded.encode(raw), crosscoder.encode(standard.standardise(raw)), strict=True)
        assert all(torch.equal(new != 0, old != 0) for new, old in acts)
    assert all(torch.equal(p, q) for p, q in zip(before.W_dec, crosscoder.W_dec, strict=True))


def test_ranking_by_the_folded_norms_would_be_wrong():
    """The trap: without the norms of before, folding changes which latents are selected."""
    crosscoder = build("clt", "topk-group-decoder_norm")
    standard, raw = random_standard(crosscoder), inputs(crosscoder, (30,))
    folded = fold(crosscoder, standard)
    right = folded(raw)
    folded.stored_norms = None
    wrong = folded(raw)
    assert max((right[site] - wrong[site]).norm() / right[site].norm() for site in right) > 0.1


@pytest.mark.parametrize("activation", ["jumprelu", "topk-joint-decoder_norm", "batchtopk-group-decoder_norm"])
def test_saved_and_read_again(activation, tmp_path):
    crosscoder = build("clt", activation)
    standard, raw = random_standard(crosscoder), inputs(crosscoder, (9,))
    calibrate(crosscoder, standard.standardise(raw))
    expected = standard.restore(crosscoder.eval()(standard.standardise(raw)))
    fold(crosscoder, standard).save(tmp_path / "folded")
    again = load(tmp_path / "folded")(raw)
    for site, y in expected.items():
        assert_close(again[site], y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["relu", "topk-group-decoder_norm"])
def test_unfold_takes_it_back(activation):
    crosscoder = build("skips", activation)
    standard = random_standard(crosscoder)
    again = unfold(fold(crosscoder, standard), standard)
    assert again.stored_norms is None
    for (name, got), expected in zip(again.named_parameters(), crosscoder.parameters(), strict=True):
        assert_close(got, expected, rtol=1e-12, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
    # A raw crosscoder that ranks by its own norms keeps its selections.
    raw = inputs(crosscoder, (9,))
    expected = crosscoder(raw)
    got = standard.restore(unfold(crosscoder, standard)(standard.standardise(raw)))
    assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_in_place_and_in_float32():
    crosscoder = build("clt", "jumprelu", dtype=torch.float32)
    standard, raw = random_standard(crosscoder), inputs(crosscoder, (9,))
    double = fold(copy.deepcopy(crosscoder).double(), standard)
    folded = fold(crosscoder, standard, in_place=True)
    assert folded is crosscoder
    assert folded.dtype == torch.float32
    for got, expected in zip(folded.parameters(), double.parameters(), strict=True):
        assert torch.equal(got, expected.float())  # rounded once
    site = crosscoder.wiring.write_sites[0]
    assert_close(folded(raw)[site], double(raw)[site].float(), rtol=1e-4, atol=1e-3)


def test_a_function_in_standard_units_and_a_checkpoint(tmp_path):
    crosscoder = build("clt", "relu")
    standard = random_standard(crosscoder)
    torch.save(standard.state_dict(), tmp_path / "state.pt")
    again = Standard.from_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    read, write = crosscoder.wiring.read_sites[0], crosscoder.wiring.write_sites[1]
    x = torch.randn(6, 4).double()
    mlp = again.standardised(lambda v: v.tanh() * 3, read, write)
    assert_close(standard[write].restore(mlp(standard[read].standardise(x))), x.tanh() * 3)


def test_every_wiring_is_folded():
    for name in WIRINGS:
        crosscoder = build(name, "jumprelu")
        standard, raw = random_standard(crosscoder), inputs(crosscoder, (4,))
        expected = standard.restore(crosscoder(standard.standardise(raw)))
        assert_close(fold(crosscoder, standard)(raw), expected, rtol=1e-11, atol=1e-11)
