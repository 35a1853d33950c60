"""Rank correlation and bootstrap intervals, in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000

Numbers = NDArray[np.float64]


def ranks(values: Any) -> Numbers:
    """Return ranks from 1, equal values sharing their mean rank."""
    x = np.asarray(values, dtype=np.float64)
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[inverse]


def spearman(one: Any, other: Any) -> float:
    """Return Spearman's rank correlation; nan where either does not vary."""
    a, b = ranks(one), ranks(other)
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 0 else float("nan")


def interval(values: Sequence[float] | Numbers, level: float = 0.95) -> tuple[float, float]:
    """Return a percentile-bootstrap interval of the mean; the mean itself, twice, for a single value."""
    x = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(x), size=(RESAMPLES, len(x)))
    return _percentiles(x[drawn].mean(1), level)


def spearman_interval(
    groups: Sequence[tuple[Any, Any]], level: float = 0.95, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Return the mean over groups of their rank correlations, and a bootstrap interval of it.

    Groups (prompts) are drawn with replacement, and within each the pairs: both kinds of chance are in the interval.

    Args:
        groups: For each group the two sequences; those without a correlation are left out.
        level: Of the interval.
        resamples: How many.
    """
    kept = [(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)) for a, b in groups]
    kept = [(a, b) for a, b in kept if len(a) > 2 and not np.isnan(spearman(a, b))]
    if not kept:
        return float("nan"), float("nan"), float("nan")
    draw = np.random.default_rng(0)
    means = []
    for _ in range(resamples):
        found = []
        for g in draw.integers(len(kept), size=len(kept)):
            places = draw.integers(len(kept[g][0]), size=len(kept[g][0]))
            found.append(spearman(kept[g][0][places], kept[g][1][places]))
        means.append(np.nanmean(found) if not np.isnan(found).all() else np.nan)
    centre = float(np.mean([spearman(a, b) for a, b in kept]))
    return centre, *_percentiles(np.asarray(means), level)


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a share (Wilson 1927)."""
    from statistics import NormalDist

    z = NormalDist().inv_cdf((1 + level) / 2)
    share, spread = successes / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * float(np.sqrt(share * (1 - share) / n + spread / (4 * n)))
    return max(0.0, centre - half), min(1.0, centre + half)


def _percentiles(values: Numbers, level: float) -> tuple[float, float]:
    low, high = np.nanpercentile(values, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)
