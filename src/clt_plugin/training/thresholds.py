"""From selections to thresholds: BatchTopK to one per token, TopK to JumpReLU, with the loss before and after.

Batches are streamed; what is kept is one histogram of scores a group, or one a latent.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clt_plugin.core import Crosscoder, JumpReLU, Site, WiringError
from clt_plugin.training._groups import by_site, pre_activations, score_scale

EXPONENTS = 128
"""Scores from 2^-64 to 2^64 are told apart; others count at the ends."""
BINS_PER_LATENT = 256

Activations = Tensor | Mapping[Site, Tensor]


class ScoreHistogram:
    """Counts of positive scores, in bins that are 2^-12 of their value wide (or as wide as the dtype's own steps).

    Attributes:
        counts: How many scores fell into each bin, on the CPU.
        n_tokens: How many tokens they came from.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        # No finer than the dtype itself, so that the edge of every bin is one of its numbers.
        self.bits = min(12, round(-torch.tensor(torch.finfo(dtype).eps).log2().item()))
        self.counts = torch.zeros(EXPONENTS << self.bits, dtype=torch.long)
        self.n_tokens = 0

    def update(self, scores: Tensor) -> None:
        """Take in the scores of some tokens, (tokens, F)."""
        positive = scores[scores > 0].cpu()
        positive = positive if positive.dtype == torch.float64 else positive.float()
        mantissa, exponent = torch.frexp(positive)  # mantissa * 2^exponent, the mantissa from 0.5 to 1
        within = ((mantissa * 2 - 1) * (1 << self.bits)).long()
        bins = ((exponent.long() + EXPONENTS // 2) << self.bits) + within
        self.counts += torch.bincount(bins.clamp(0, len(self.counts) - 1), minlength=len(self.counts))
        self.n_tokens += len(scores)

    def find(self, per_token: float) -> int:
        """Return the bin from which upwards the number of scores a token is nearest to one asked for.

        Args:
            per_token: How many scores a token there should be, on average; 0 is returned where fewer are positive.
        """
        above, wanted = self.counts.flip(0).cumsum(0).flip(0), per_token * self.n_tokens
        if above[0] <= wanted:
            return 0
        nearest = above[(above - wanted).abs().argmin()]
        # Of the bins between the last score that counts and the next, which are empty, the one in the middle: what
        # rounding does to a score then matters least.
        same = (above == nearest).nonzero()
        return int(same[len(same) // 2])

    def share(self, number: int) -> float:
        """Return how many scores a token lie in a bin or above it."""
        return self.counts[number:].sum().item() / self.n_tokens

    def threshold(self, number: int) -> float:
        """Return the largest number of the dtype below a bin, which all its scores exceed; 0 for the lowest bin."""
        if number == 0:
            return 0.0
        exponent = (number >> self.bits) - EXPONENTS // 2
        value = (0.5 + (number & ((1 << self.bits) - 1)) / (2 << self.bits)) * 2.0**exponent
        edge = torch.tensor(value, dtype=self.dtype)
        return edge.nextafter(torch.zeros_like(edge)).item()


@torch.no_grad()
def estimate_threshold(crosscoder: Crosscoder, batches: Iterable[Activations]) -> list[float]:
    """Measure BatchTopK's per-token thresholds over many batches, and set them: then it can run outside training.

    The threshold is a score that k latents a token exceed on average over all batches (k times the number of groups,
    where the scope is joint), as `Crosscoder.estimate_threshold` finds it on one batch. Scores are counted in bins that
    are 2^-12 of their value wide, so L0 may differ from k by what one bin holds.

    Args:
        crosscoder: A BatchTopK crosscoder; its thresholds are changed.
        batches: What it reads, stacked (n_read_sites, ..., d) or {site: (..., d_site)} each.

    Returns:
        For each group how many latents a token exceed the threshold on these batches, which is their L0.
    """
    if not crosscoder.activation.has_batch_threshold or crosscoder.threshold is None:
        raise WiringError(f"{crosscoder.activation} has no measured threshold: only BatchTopK does")
    found = _shared_thresholds(crosscoder, batches)
    for parameter, (threshold, _) in zip(crosscoder.threshold, found, strict=True):
        parameter.data.fill_(threshold)
    return [l0 for _, l0 in found]


def _shared_thresholds(crosscoder: Crosscoder, batches: Iterable[Activations]) -> list[tuple[float, float]]:
    """Return for each group the threshold of scores by which k latents a token are active, and its L0."""
    every, joint = range(crosscoder.wiring.n_groups), crosscoder.activation.joint
    scales = [score_scale(crosscoder, g) for g in every]
    histograms = [ScoreHistogram(crosscoder.dtype) for _ in every]
    for x in batches:
        for histogram, h, scale in zip(histograms, pre_activations(crosscoder, x), scales, strict=True):
            acts = h.relu()
            histogram.update(acts if scale is None else acts * scale)
    if not histograms[0].n_tokens:
        raise ValueError("a threshold is measured on batches, and there were none")
    k = getattr(crosscoder.activation, "k", 0)
    if joint:
        whole = ScoreHistogram(crosscoder.dtype)
        whole.counts = torch.stack([each.counts for each in histograms]).sum(0)
        whole.n_tokens = histograms[0].n_tokens
        numbers = [whole.find(k * len(histograms))] * len(histograms)
    else:
        numbers = [each.find(k) for each in histograms]
    silent = [g for g, number in enumerate(numbers) if number == 0]
    if silent:
        warnings.warn(
            f"in groups {silent} fewer than k={k} latents a token have a positive pre-activation on these batches, so "
            "their threshold is 0: give more typical inputs",
            stacklevel=3,
        )
    return [(each.threshold(number), each.share(number)) for each, number in zip(histograms, numbers, strict=True)]


# ---------------------------------------------------------------- before and after


@dataclass(frozen=True, eq=False)
class Conversion:
    """A crosscoder whose selection became thresholds, and what that did on the batches given.

    Attributes:
        crosscoder: With thresholds, in evaluation mode.
        loss_before: The squared error summed over written sites, a token, of the selection.
        loss_after: Likewise, with thresholds.
        l0_before: Active latents a token, of each group.
        l0_after: Likewise, with thresholds.
    """

    crosscoder: Crosscoder
    loss_before: float
    loss_after: float
    l0_before: tuple[float, ...]
    l0_after: tuple[float, ...]

    def __str__(self) -> str:
        before, after = ("+".join(f"{n:.1f}" for n in l0) for l0 in (self.l0_before, self.l0_after))
        return f"loss {self.loss_before:.4g} -> {self.loss_after:.4g}, L0 {before} -> {after}"


@torch.no_grad()
def measure(crosscoder: Crosscoder, batches: Iterable[tuple[Activations, Activations]]) -> tuple[float, list[float]]:
    """Return the loss and L0 over batches, in the mode in which the crosscoder is.

    Args:
        crosscoder: Which.
        batches: (x, y): what is read and what is to be written, each stacked or by site.

    Returns:
        The squared error summed over written sites, a token, and the active latents a token of each group.
    """
    wiring = crosscoder.wiring
    error, n_active, n_tokens = 0.0, [0] * wiring.n_groups, 0
    for x, y in batches:
        inputs, targets = by_site(x, wiring.read_sites), by_site(y, wiring.write_sites)
        acts = tuple(crosscoder.encode(inputs))
        outputs = crosscoder.decode(acts, inputs)
        error += sum((outputs[site] - targets[site]).double().square().sum().item() for site in targets)
        n_active = [n + int(act.count_nonzero()) for n, act in zip(n_active, acts, strict=True)]
        n_tokens += len(acts[0])
    if not n_tokens:
        raise ValueError("a loss is measured on batches, and there were none")
    return error / n_tokens, [n / n_tokens for n in n_active]


def to_threshold(crosscoder: Crosscoder, batches: Iterable[tuple[Activations, Activations]]) -> Conversion:
    """Give a BatchTopK crosscoder its per-token thresholds, in place, and say what they change.

    Args:
        crosscoder: A BatchTopK crosscoder; it is left in evaluation mode.
        batches: (x, y) as for `measure`; gone through three times, so a list or the like. As large as in training,
            since the selection before depends on which tokens share a batch.
    """
    _check_again(batches)
    loss_before, l0_before = measure(crosscoder.train(), batches)
    estimate_threshold(crosscoder, (x for x, _ in batches))
    loss_after, l0_after = measure(crosscoder.eval(), batches)
    return Conversion(crosscoder, loss_before, loss_after, tuple(l0_before), tuple(l0_after))


@torch.no_grad()
def to_jumprelu(
    crosscoder: Crosscoder,
    batches: Iterable[tuple[Activations, Activations]],
    how: str = "shared",
    bandwidth: float = 0.001,
) -> Conversion:
    """Turn a TopK or BatchTopK crosscoder into a JumpReLU one with the same weights, and say what it changes.

    Args:
        crosscoder: Stays as it is.
        batches: (x, y) as for `measure`; gone through up to four times, so a list or the like.
        how: How to choose thresholds. ``"shared"``: all latents of a group (of all groups, where they compete) have one
            threshold for their score, that of k active latents a token; a BatchTopK's measured threshold is taken as it
            is, and then nothing changes. ``"rates"``: each latent has the threshold at which it fires as often as it
            was selected, to a 256th of the span in which that lies.
        bandwidth: Of the new activation.

    Returns:
        A copy, and the loss and L0 of both.
    """
    activation = crosscoder.activation
    if not activation.ranks:
        raise WiringError(f"{activation} selects nothing: only TopK and BatchTopK can become JumpReLU")
    if how not in ("shared", "rates"):
        raise ValueError(f"how must be 'shared' or 'rates', not {how!r}")
    if how == "shared" and not getattr(activation, "rectify", True):
        raise WiringError("with rectify=False negative pre-activations are selected too: use how='rates'")
    _check_again(batches)
    loss_before, l0_before = measure(crosscoder, batches)
    measured = how == "shared" and crosscoder.has_measured_threshold and crosscoder.threshold is not None
    if how == "rates":
        thresholds = _by_rates(crosscoder, batches)
    else:
        if measured and crosscoder.threshold is not None:
            shared = [threshold.item() for threshold in crosscoder.threshold]
        else:
            shared = [threshold for threshold, _ in _shared_thresholds(crosscoder, (x for x, _ in batches))]
        thresholds = [_per_latent(crosscoder, g, value) for g, value in enumerate(shared)]
    converted = copy.deepcopy(crosscoder)
    converted.activation, converted.stored_norms = JumpReLU(bandwidth), None
    converted.threshold = nn.ParameterList(nn.Parameter(threshold.to(crosscoder.dtype)) for threshold in thresholds)
    loss_after, l0_after = measure(converted.eval(), batches)
    return Conversion(converted, loss_before, loss_after, tuple(l0_before), tuple(l0_after))


def _per_latent(crosscoder: Crosscoder, group: int, shared: float) -> Tensor:
    """Return a threshold of scores as one of each latent's pre-activations, (F,)."""
    scale = score_scale(crosscoder, group)
    if scale is None:
        return torch.full((crosscoder.group_sizes[group],), shared, dtype=crosscoder.dtype, device=crosscoder.device)
    # A latent that writes nothing is never selected; its threshold is out of reach, and not infinite, since a
    # straight-through gradient would multiply it by 0.
    never = torch.finfo(crosscoder.dtype).max ** 0.5
    return torch.where(scale > 0, shared / scale, never)


def _by_rates(crosscoder: Crosscoder, batches: Iterable[tuple[Activations, Activations]]) -> list[Tensor]:
    """Return for each group the thresholds at which its latents fire as often as they are selected, (F_g,).

    What fires as often as it is selected lies at or above the lowest pre-activation selected. Between that and the
    highest of all, pre-activations are counted in bins.
    """
    spans = [_Span(n, crosscoder.dtype, crosscoder.device) for n in crosscoder.group_sizes]
    for x, _ in batches:
        acts = crosscoder.encode(by_site(x, crosscoder.wiring.read_sites))
        for span, h, act in zip(spans, pre_activations(crosscoder, x), acts, strict=True):
            span.widen(h, act != 0)
    for x, _ in batches:
        for span, h in zip(spans, pre_activations(crosscoder, x), strict=True):
            span.count(h)
    return [span.thresholds() for span in spans]


class _Span:
    """Where each latent's threshold may lie, and how many pre-activations lie where in between."""

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device) -> None:
        self.selected = torch.zeros(n, dtype=torch.long, device=device)
        self.low = torch.full((n,), torch.inf, dtype=dtype, device=device)
        self.high = -self.low
        self.counts = torch.zeros(n, BINS_PER_LATENT, dtype=torch.int32, device=device)

    @property
    def width(self) -> Tensor:
        return ((self.high - self.low) / BINS_PER_LATENT).where(self.selected > 0, 1)

    def widen(self, h: Tensor, active: Tensor) -> None:
        self.selected += active.sum(0)
        self.low = self.low.minimum(h.where(active, torch.inf).amin(0))
        self.high = self.high.maximum(h.amax(0))

    def count(self, h: Tensor) -> None:
        tokens, latents = (h >= self.low).nonzero(as_tuple=True)
        # A latent whose lowest selected value is also its highest of all has one bin, of no width.
        bins = ((h[tokens, latents] - self.low[latents]) / self.width[latents]).nan_to_num(0)
        bins = bins.long().clamp(0, BINS_PER_LATENT - 1)
        ones = torch.ones_like(bins, dtype=torch.int32)
        self.counts.index_put_((latents, bins), ones, accumulate=True)

    def thresholds(self) -> Tensor:
        above = self.counts.flip(1).cumsum(1).flip(1)
        best = (above - self.selected[:, None]).abs().argmin(1)
        edge = self.low + best * self.width
        # What fires is greater than its threshold: step just below the bin. What is never selected never fires.
        return edge.nextafter(torch.full_like(edge, -torch.inf)).where(self.selected > 0, self.high)


def _check_again(batches: Iterable[tuple[Activations, Activations]]) -> None:
    if iter(batches) is batches:
        raise ValueError("batches are gone through several times, so give a list rather than an iterator")


@torch.no_grad()
def keep_above(crosscoder: Crosscoder, least: float = 1e-3) -> None:
    """Keep JumpReLU's thresholds at or above a small number, after an optimiser's step.

    Below 0 a latent could fire with a negative activation, and the straight-through gradient, which is in proportion to
    the threshold, would change its sign.
    """
    if crosscoder.activation.has_threshold:
        for threshold in crosscoder.threshold or ():
            threshold.clamp_(min=least)
