"""BatchTopK's streamed thresholds against sorting everything, and conversions against what was selected."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from clt_plugin.core import JumpReLU, WiringError
from clt_plugin.training.thresholds import (
    ScoreHistogram,
    estimate_threshold,
    keep_above,
    measure,
    to_jumprelu,
    to_threshold,
)
from core.oracle import build, flat, inputs


def batches(crosscoder, sizes=(40, 1, 119, 240)):
    made = []
    for n in sizes:
        x = inputs(crosscoder, (n,))
        made.append((x, {site: torch.randn(n, 4).double() for site in crosscoder.wiring.write_sites}))
    return made


def together(made):
    return {site: torch.cat([flat(x)[site] for x, _ in made]) for site in made[0][0]}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_histogram_finds_the_score_asked_for(dtype):
    scores = (torch.randn(500, 40).exp() * 3 - 3).to(dtype)
    histogram = ScoreHistogram(dtype)
    for part in scores.split(77):
        histogram.update(part)
    for per_token in (0.5, 4.0, 11.3):
        number = histogram.find(per_token)
        threshold, share = histogram.threshold(number), histogram.share(number)
        ordered = scores[scores > 0].double().sort(descending=True).values
        n = (scores > threshold).sum().item()
        coarse = max(2**-12, torch.finfo(dtype).eps)
        # As many as asked for, but for those in one bin, and halfway between the last that counts and the next.
        tied = (ordered / threshold - 1).abs() <= coarse
        assert abs(n - per_token * 500) <= 0.5 + tied.sum().item()
        middle = (ordered[n - 1] * ordered[n]).sqrt().item()
        assert threshold == pytest.approx(middle, rel=2 * coarse, abs=(ordered[n - 1] - ordered[n]).item() / 10)
        assert torch.tensor(threshold, dtype=dtype).item() == threshold
        assert (scores > threshold).sum().item() / 500 == share  # what it says of L0 is so
    assert histogram.find(40.0) == 0
    assert histogram.threshold(0) == 0
    assert histogram.share(0) == (scores > 0).sum().item() / 500


@pytest.mark.parametrize("scope", ["group", "joint"])
@pytest.mark.parametrize("score", ["activation", "decoder_norm"])
def test_streamed_thresholds_are_those_of_one_batch(scope, score):
    crosscoder, other = (build("clt", f"batchtopk-{scope}-{score}") for _ in range(2))
    other.load_state_dict(crosscoder.state_dict())
    made = batches(crosscoder)
    l0 = estimate_threshold(crosscoder, (x for x, _ in made))
    other.estimate_threshold(together(made))
    # Between the same two scores, or, of two in one bin, off by one.
    for acts, expected in zip(
        crosscoder.eval().encode(together(made)), other.eval().encode(together(made)), strict=True
    ):
        assert ((acts != 0) != (expected != 0)).sum() <= 1
    assert l0 == measure(crosscoder.eval(), made)[1]
    wanted = 6 if scope == "joint" else [2.0, 2.0, 2.0]
    assert (sum(l0) if scope == "joint" else l0) == pytest.approx(wanted, abs=0.02)


def test_too_few_positives_are_said():
    crosscoder = build("clt", "batchtopk-group-activation")
    crosscoder.b_enc[1].data.fill_(-100.0)
    with pytest.warns(UserWarning, match=r"in groups \[1\] fewer than k=2"):
        estimate_threshold(crosscoder, [x for x, _ in batches(crosscoder)])
    assert crosscoder.threshold[1] == 0
    with pytest.raises(ValueError, match="there were none"):
        estimate_threshold(crosscoder, [])
    with pytest.raises(WiringError, match="only BatchTopK does"):
        estimate_threshold(build("clt", "relu"), [])


def brute_loss(crosscoder, made):
    error = sum((crosscoder(x)[site] - y[site]).square().sum() for x, y in made for site in y)
    return error.item() / sum(len(next(iter(x.values()))) for x, _ in made)


def test_batchtopk_per_token_with_the_loss_before_and_after():
    crosscoder = build("skips", "batchtopk-joint-decoder_norm")
    made = batches(crosscoder, (100, 100))
    before = brute_loss(crosscoder.train(), made)
    conversion = to_threshold(crosscoder, made)
    assert conversion.crosscoder is crosscoder
    assert not crosscoder.training
    assert conversion.loss_before == pytest.approx(before, rel=1e-12)
    assert conversion.loss_after == pytest.approx(brute_loss(crosscoder, made), rel=1e-12)
    assert sum(conversion.l0_before) == 6
    assert sum(conversion.l0_after) == pytest.approx(6, abs=0.05)
    assert str(conversion).startswith("loss ")
    # A token's activations no longer depend on its batch.
    x = made[0][0]
    alone = crosscoder.encode({site: value[:1] for site, value in x.items()})
    assert_close([acts[:1] for acts in crosscoder.encode(x)], list(alone))


@pytest.mark.parametrize("scope", ["group", "joint"])
@pytest.mark.parametrize("score", ["activation", "decoder_norm"])
def test_a_measured_threshold_becomes_jumprelu_exactly(scope, score):
    crosscoder = build("clt", f"batchtopk-{scope}-{score}")
    made = batches(crosscoder)
    estimate_threshold(crosscoder, [x for x, _ in made])
    conversion = to_jumprelu(crosscoder.eval(), made, bandwidth=0.3)
    assert conversion.crosscoder.activation == JumpReLU(0.3)
    assert conversion.loss_after == pytest.approx(conversion.loss_before, rel=1e-12)
    assert conversion.l0_after == conversion.l0_before
    x = made[2][0]
    assert_close(conversion.crosscoder.encode(x), crosscoder.encode(x))


@pytest.mark.parametrize("activation", ["topk-group-activation", "topk-joint-decoder_norm", "topk-group-decoder_norm"])
def test_topk_to_a_shared_threshold(activation):
    crosscoder = build("clt", activation)
    made = batches(crosscoder)
    conversion = to_jumprelu(crosscoder, made)
    assert conversion.loss_before == pytest.approx(brute_loss(crosscoder, made), rel=1e-12)
    assert conversion.loss_after == pytest.approx(brute_loss(conversion.crosscoder, made), rel=1e-12)
    # The same number a token on average: k where enough are positive, of the group or of all together.
    l0 = torch.tensor(conversion.l0_after)
    assert (l0.sum() if crosscoder.activation.joint else l0.max()).item() == pytest.approx(
        6 if crosscoder.activation.joint else 2, abs=0.02
    )
    # And it is one threshold of scores: no latent that is left out scores higher than one that is not.
    norms = [crosscoder.decoder_norms(g).detach() for g in range(3)]
    ranked = crosscoder.activation.ranks_by_decoder_norm
    scores = [t * (n if ranked else 1) for t, n in zip(conversion.crosscoder.threshold, norms, strict=True)]
    scores = [torch.cat(scores)] if crosscoder.activation.joint else scores
    assert all(group.std() < 1e-12 for group in scores)


@pytest.mark.parametrize("activation", ["topk-unrectified", "topk-joint-decoder_norm", "batchtopk-group-activation"])
def test_topk_to_the_rates_of_its_latents(activation):
    crosscoder = build("clt", activation)
    made = batches(crosscoder)
    crosscoder.W_enc[1].data[:, 0] = 0
    crosscoder.b_enc[1].data[0] = -50.0  # never selected
    conversion = to_jumprelu(crosscoder, made, how="rates")
    n_tokens = 400
    for g in range(3):
        before = sum((crosscoder.encode(x)[g] != 0).sum(0) for x, _ in made) / n_tokens
        after = sum((conversion.crosscoder.encode(x)[g] != 0).sum(0) for x, _ in made) / n_tokens
        assert (before - after).abs().max() <= 4 / n_tokens
        assert before.sum() > 0.5
    assert before[0] != before[1]
    threshold, x = conversion.crosscoder.threshold[1], together(made)
    assert not (conversion.crosscoder.pre_activations(1, x[crosscoder.wiring.reads[1][0]])[:, 0] > threshold[0]).any()
    assert conversion.loss_after == pytest.approx(brute_loss(conversion.crosscoder, made), rel=1e-12)


def test_a_latent_that_writes_nothing_never_fires_and_has_gradients():
    crosscoder = build("clt", "topk-group-decoder_norm")
    crosscoder.W_dec[0].data[2] = 0
    made = batches(crosscoder)
    converted = to_jumprelu(crosscoder, made).crosscoder
    assert not converted.encode(together(made))[0][:, 2].any()
    converted.encode(together(made))[0].sum().backward()
    assert converted.threshold[0].grad.isfinite().all()


def test_refusals():
    crosscoder = build("clt", "topk-unrectified")
    made = batches(crosscoder)
    with pytest.raises(WiringError, match="use how='rates'"):
        to_jumprelu(crosscoder, made)
    with pytest.raises(ValueError, match="give a list rather than an iterator"):
        to_jumprelu(crosscoder, iter(made), how="rates")
    with pytest.raises(WiringError, match="only TopK and BatchTopK can become JumpReLU"):
        to_jumprelu(build("clt", "relu"), made)
    with pytest.raises(ValueError, match="'shared' or 'rates'"):
        to_jumprelu(crosscoder, made, how="best")


def test_thresholds_are_kept_above_0():
    crosscoder = build("clt", "jumprelu")
    crosscoder.threshold[0].data[:2] = torch.tensor([-0.3, 0.0])
    kept = crosscoder.threshold[0].data[2:].clone()
    keep_above(crosscoder, 0.01)
    assert crosscoder.threshold[0][:2].tolist() == [0.01, 0.01]
    assert torch.equal(crosscoder.threshold[0][2:], kept)
    keep_above(build("clt", "batchtopk-group-activation"))
