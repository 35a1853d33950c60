"""Which entries of a group's pre-activations are kept: those that are active, or near enough to matter to a gradient.

Pre-activations h are (B, F); entries are named by their flat index, token * F + latent. On a CPU numpy finds the k
largest and what is set, which it does several times as fast as torch; both give the same entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clt_plugin.core import Activation, BatchTopK, JumpReLU, ReLU, TopK, jumprelu

FOLDS = (64, 32, 16, 8, 4, 2)
"""Into how many parts rows may be folded before the largest are looked for: see `top_of_rows`."""

# ---------------------------------------------------------------- the largest of many


def where(mask: Tensor) -> Tensor:
    """Return the flat indices of what is set, (n,), ascending."""
    if mask.device.type != "cpu":
        return mask.reshape(-1).nonzero().squeeze(1)
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def top_of_rows(scores: Tensor, k: int) -> Tensor:
    """Return the flat indices of each row's k largest, (B * k,), ascending.

    A row is folded into parts that lie on top of each other. The k-th largest of the maxima over parts is a lower bound
    for the k-th largest of the row, and little is above it that is not wanted: among that the k largest are looked for.

    Args:
        scores: (B, n).
        k: At most n. Among equals any may be chosen, and what is not a number counts as largest, as in torch.
    """
    n_rows, n = scores.shape
    parts = next((parts for parts in FOLDS if n // parts >= 2 * k), 1)
    if scores.device.type == "cpu" and parts > 1:
        # What is left over where parts don't share a row evenly has no say in the bound.
        folded = _array(scores[:, : n - n % parts].unflatten(1, (parts, -1)).amax(1))
        if not np.isnan(folded).any():
            return torch.from_numpy(_top_above(_array(scores), _kth_largest(folded, k), k))
    best = scores.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    return (best + torch.arange(0, n_rows * n, n, device=scores.device).unsqueeze(1)).view(-1)


def top_of_all(scores: Tensor, k: int) -> Tensor:
    """Return the flat indices of the k largest of all scores together, (k,), ascending: see `top_of_rows`."""
    return top_of_rows(scores.view(1, -1), k)


def _top_above(scores: np.ndarray, bound: np.ndarray, k: int) -> np.ndarray:
    """Return the flat indices of each row's k largest, (B * k,), ascending.

    Args:
        scores: (B, n), all of them numbers.
        bound: (B, 1), at most the k-th largest of each row.
        k: How many.
    """
    n_rows, n = scores.shape
    candidates = np.flatnonzero(scores >= bound)
    values = scores.reshape(-1).take(candidates)
    starts = np.searchsorted(candidates, np.arange(0, n_rows * n, n))
    counts = np.diff(starts, append=len(candidates))
    # As a table, in which shorter rows are filled up with what is never chosen: no row has fewer than k.
    table = np.full((n_rows, counts.max()), -np.inf, scores.dtype)
    table[np.arange(table.shape[1]) < counts[:, None]] = values
    least = np.repeat(_kth_largest(table, k), counts)
    chosen = values >= least
    if np.count_nonzero(chosen) > n_rows * k:
        # Of what equals its row's k-th largest, only the first are taken.
        above, equal = values > least, values == least
        before = np.cumsum(equal) - equal
        before -= np.repeat(before[starts], counts)
        chosen = above | (equal & (before < np.repeat(k - np.add.reduceat(above, starts, dtype=int), counts)))
    return candidates.take(np.flatnonzero(chosen))


def _kth_largest(values: np.ndarray, k: int) -> np.ndarray:
    """Return the k-th largest of each row, (B, 1)."""
    at = values.shape[1] - k
    return np.partition(values, at, axis=1)[:, at : at + 1]


def _array(values: Tensor) -> np.ndarray:
    return (values if values.dtype in (torch.float32, torch.float64) else values.float()).detach().numpy()


# ---------------------------------------------------------------- what each activation keeps

Keep = Callable[[Any, Tensor, Any, Tensor | None, bool], Tensor]
"""(activation, h, threshold, score scale, training) to the flat indices kept, by ascending token."""

Act = Callable[[Any, Tensor, Any], Tensor]
"""(activation, pre-activations of the entries, their thresholds) to their activations."""


@dataclass(frozen=True)
class SparseForm:
    """How an activation acts where few latents are active.

    Attributes:
        keep: Which entries are kept: at least all that are active, or that a gradient comes from.
        act: What activations are at entries kept.
        complete: See `clt_plugin.training.forward.GroupActivity`.
    """

    keep: Keep
    act: Act
    complete: bool


def _keep_relu(activation: ReLU, h: Tensor, threshold: Any, scale: Tensor | None, training: bool) -> Tensor:
    # "Not at most" rather than "above": what is not a number is kept, so that the loss shows it.
    return where((h <= 0).logical_not_())


def _keep_jumprelu(activation: JumpReLU, h: Tensor, threshold: Any, scale: Tensor | None, training: bool) -> Tensor:
    # A little more than half the bandwidth, and the rounding of either side: `jumprelu` itself decides at the edge.
    margin = 0.5001 * activation.bandwidth + 4 * torch.finfo(threshold.dtype).eps * threshold.abs()
    return where((h <= threshold - margin).logical_not_())


def _keep_topk(activation: TopK, h: Tensor, threshold: Any, scale: Tensor | None, training: bool) -> Tensor:
    return top_of_rows(h if scale is None else h * scale, min(activation.k, h.shape[-1]))


def _keep_batchtopk(activation: BatchTopK, h: Tensor, threshold: Any, scale: Tensor | None, training: bool) -> Tensor:
    if training:
        return top_of_all(h if scale is None else h * scale, min(activation.k * len(h), h.numel()))
    # The activation itself knows whether its threshold was measured, and what to say if not.
    return where(activation(h, threshold, scale, training) != 0)


def _rectified(activation: Any, pre: Tensor, threshold: Any) -> Tensor:
    return pre.relu()


def _selected(activation: TopK, pre: Tensor, threshold: Any) -> Tensor:
    return pre.relu() if activation.rectify else pre


def _jumped(activation: JumpReLU, pre: Tensor, threshold: Any) -> Tensor:
    return jumprelu(pre, threshold, activation.bandwidth)


SPARSE_FORMS: dict[type[Activation], SparseForm] = {
    ReLU: SparseForm(_keep_relu, _rectified, complete=True),
    JumpReLU: SparseForm(_keep_jumprelu, _jumped, complete=True),
    TopK: SparseForm(_keep_topk, _selected, complete=False),
    BatchTopK: SparseForm(_keep_batchtopk, _rectified, complete=False),
}
"""By exact type: what is not here, a subclass too, is computed densely."""
