"""Which latents a TopK or BatchTopK selects where they compete with latents, or tokens, of other processes.

Exact: the same entries as one process would select, but for ties. Of equal scores at the edge those of the process
with the lower rank are taken, and within it those that come first.

Scores are (B, F) of this process's tokens and latents; entries are named by their flat index, token * F + latent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clt_plugin.core import Activation, BatchTopK, TopK
from clt_plugin.training import _selection
from clt_plugin.training._mesh import Mesh

DIGIT = 16
"""Scores are found digit by digit, as many bits at a time: so many bits' histogram is what processes exchange."""


def competes(mesh: Mesh, activation: Activation, training: bool) -> bool:
    """Return whether latents compete with those, or tokens with those, of other processes."""
    if isinstance(activation, BatchTopK):
        return training and mesh.size > 1
    return activation.ranks and mesh.n_latent > 1


def select(mesh: Mesh, activation: Activation, h: Tensor, scale: Tensor | None) -> Tensor:
    """Return the flat indices that are selected of pre-activations, by ascending token.

    Args:
        mesh: Which processes.
        activation: A TopK or BatchTopK.
        h: (B, F).
        scale: What scores are multiplied with, (F,), or None.
    """
    scores = h if scale is None else h * scale
    if isinstance(activation, BatchTopK):
        return top_of_all(mesh, scores, activation.k * len(scores) * mesh.n_data)
    assert isinstance(activation, TopK)
    return top_of_rows(mesh, scores, min(activation.k, scores.shape[1] * mesh.n_latent))


def top_of_rows(mesh: Mesh, scores: Tensor, k: int) -> Tensor:
    """Return this process's part of each row's k largest, where rows go on in other processes.

    Each process tells its k largest of every row, B * k numbers; the k-th largest of these is the bound.

    Args:
        mesh: Which processes.
        scores: (B, F); processes may differ in F. What is not a number counts as largest.
        k: At most what all processes together have.
    """
    if mesh.n_latent == 1:
        return _selection.top_of_rows(scores, k)
    scores = _comparable(scores)
    mine = scores.topk(min(k, scores.shape[1]), dim=1).values
    mine = torch.nn.functional.pad(mine, (0, k - mine.shape[1]), value=-torch.inf)
    every = mesh.gathered(mine, "latent")  # (processes, B, k)
    bound = every.transpose(0, 1).flatten(1).topk(k, dim=1).values[:, -1]
    equal = (every == bound[:, None]).sum(2)
    above = (every > bound[:, None]).sum((0, 2))
    left = (k - above - equal[: mesh.latent_rank].sum(0)).clamp(min=0)
    chosen, ties = scores > bound[:, None], scores == bound[:, None]
    if bool((ties.sum(1) > left).any()):
        ties &= ties.cumsum(1) <= left[:, None]
    return _selection.where(chosen | ties)


def top_of_all(mesh: Mesh, scores: Tensor, k: int) -> Tensor:
    """Return this process's part of the k largest positive scores of all processes; fewer where fewer are positive.

    Found by a radix search: of the bits of a positive number, read as an integer, the first 16 are decided by a
    histogram summed over processes, then the next 16. So they exchange 512 KB for each 16 bits, whatever B and F are.

    Args:
        mesh: Which processes.
        scores: (B, F). What is not a number counts as largest.
        k: Of all processes together.
    """
    scores = _comparable(scores).reshape(-1)
    # The bits of positive numbers are in the order of the numbers; those of negative ones are negative integers.
    keys = scores.view(torch.int64 if scores.dtype == torch.float64 else torch.int32)
    positive = keys[keys > 0]
    k = min(k, int(mesh.total(torch.tensor(len(positive), device=keys.device))))
    if k == 0:
        return torch.empty(0, dtype=torch.long, device=keys.device)
    key, wanted, n_equal = _kth_largest(mesh, positive, k)
    chosen = keys > key
    before = mesh.gathered(torch.tensor(n_equal, device=keys.device), None)[: mesh.rank].sum()
    mine = min(n_equal, max(0, wanted - int(before)))
    if mine:
        chosen[_selection.where(keys == key)[:mine]] = True
    return _selection.where(chosen)


def _kth_largest(mesh: Mesh, keys: Tensor, k: int) -> tuple[int, int, int]:
    """Return the k-th largest key of all processes, how many equal to it are among the k, and how many are here."""
    found, wanted = 0, k
    for shift in range(torch.iinfo(keys.dtype).bits - DIGIT, -1, -DIGIT):
        digits = (keys >> shift) & (2**DIGIT - 1)
        counts = mesh.total(torch.bincount(digits, minlength=2**DIGIT))
        at_least = counts.flip(0).cumsum(0).flip(0)
        digit = int((at_least >= wanted).sum()) - 1
        wanted -= int(at_least[digit] - counts[digit])
        found |= digit << shift
        keys = keys[digits == digit]
    return found, wanted, len(keys)


def _comparable(scores: Tensor) -> Tensor:
    """Return scores, at least float32, where what is not a number is infinite: it is selected, so the loss shows it."""
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
