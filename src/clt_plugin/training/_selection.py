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

FOLDS = (1, 2, 4, 8, 16, 32, 64)
"""Into how many parts rows may be folded before the largest are looked for: see `top_of_rows`."""

# ---------------------------------------------------------------- the largest of many


def kth_largest(values: Tensor, k: int) -> Tensor:
    """Return the k-th largest along the last axis, (..., 1)."""
    if values.device.type != "cpu":
        return values.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    at = values.shape[-1] - k
    return torch.from_numpy(np.partition(_array(values), at, axis=-1)[..., at : at + 1]).to(values.dtype)


def where(mask: Tensor) -> Tensor:
    """Return the flat indices of what is set, (n,), ascending."""
    if mask.device.type != "cpu":
        return mask.reshape(-1).nonzero().squeeze(1)
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def top_of_rows(scores: Tensor, k: int) -> Tensor:
    """Return the flat indices of each row's k largest, (B * k,), row after row and in no order within.

    A row is folded into parts that lie on top of each other. The k-th largest of the maxima over parts is a lower bound
    for the k-th largest of the row, and little is above it that is not wanted: among that the k largest are looked for.

    Args:
        scores: (B, n).
        k: At most n. Among equals any may be chosen.
    """
    n_rows, n = scores.shape
    parts = _fold(n, 2 * k)
    if scores.device.type != "cpu" or parts == 1:
        return _best_of_rows(scores, k)
    bound = kth_largest(scores.view(n_rows, parts, n // parts).amax(1), k)
    candidates = where((scores < bound).logical_not_())
    # As a table, in which shorter rows are filled up with what is never chosen: no row has fewer than k.
    starts = torch.searchsorted(candidates, torch.arange(0, n_rows * n, n))
    counts = torch.diff(starts, append=starts.new_tensor([len(candidates)]))
    place = torch.arange(len(candidates)) - torch.repeat_interleave(starts, counts)
    width = int(counts.max())
    place += torch.repeat_interleave(torch.arange(0, n_rows * width, width), counts)
    table = scores.new_full((n_rows * width,), -torch.inf)
    table[place] = scores.view(-1).index_select(0, candidates)
    number = torch.zeros_like(table, dtype=torch.long)
    number[place] = candidates
    return number.index_select(0, _best_of_rows(table.view(n_rows, width), k))


def _best_of_rows(values: Tensor, k: int) -> Tensor:
    """Return the flat indices of each row's k largest, (B * k,), row after row."""
    # "Not less": what is not a number counts as large, as in torch, so that no row has fewer than k.
    best = (values < kth_largest(values, k)).logical_not_()
    flat = where(best)
    if len(flat) == len(values) * k:
        return flat
    # Rows with several entries equal to their k-th largest have too many.
    odd = (best.sum(1) != k).nonzero().squeeze(1)
    best[odd] = torch.zeros_like(best[odd]).scatter_(1, values[odd].topk(k, dim=1, sorted=False).indices, True)
    return where(best)


def top_of_all(scores: Tensor, k: int) -> Tensor:
    """Return the flat indices of the k largest of all scores together, (k,), ascending.

    Sorting or flat selection takes ten times as long. The k-th largest of the maxima over parts is a lower bound for
    the k-th largest of all, and little is above it that is not wanted.

    Args:
        scores: Of any shape.
        k: At most as many as there are. Among equals any may be chosen.
    """
    flat = scores.view(-1)
    parts = _fold(len(flat), 5 * k)
    bound = kth_largest(flat.view(parts, -1).amax(0), k)
    candidates = where((flat < bound).logical_not_())
    values = flat.index_select(0, candidates)
    if flat.device.type == "cpu":
        at = len(values) - k
        best = torch.from_numpy(np.sort(np.argpartition(_array(values), at)[at:])) if at else torch.arange(k)
    else:
        best = values.topk(k, sorted=False).indices.sort().values
    return candidates.index_select(0, best)


def _fold(n: int, least: int) -> int:
    """Return into how many equal parts n numbers can be folded so that each part has at least so many of them."""
    return max((parts for parts in FOLDS if n % parts == 0 and n // parts >= least), default=1)


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
