"""Entries of a group's activations, and sums and products of the rows that they name.

A sum of rows gathers them from all over a table. Where the table does not fit into a processor's own cache, and each
row is used often, it pays to cut the table into pieces of few columns that do, and to sum piece by piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

PIECE = 64
"""The columns of a piece."""

OFTEN = 16
"""How many entries a latent must have on average for pieces to be the faster: with 2,048 latents they are from about 12
on, with 8,192 from about 16 on."""

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, eq=False)
class Entries:
    """Which entries of a group's (B, F) activations are kept.

    Attributes:
        flat: Their flat indices, token * F + latent, (n,): by ascending token, in any order within one.
        n_tokens: B.
        n_latents: F.
    """

    flat: Tensor
    n_tokens: int
    n_latents: int

    @property
    def density(self) -> float:
        """The share of all entries that is kept."""
        return len(self.flat) / max(1, self.n_tokens * self.n_latents)

    @property
    def in_pieces(self) -> bool:
        """Whether latents are active so often that sums over them are the faster in pieces: see `pieces_of`."""
        return self.flat.device.type == "cpu" and len(self.flat) >= OFTEN * self.n_latents

    @cached_property
    def starts(self) -> Tensor:
        """Where each token's entries start, (B,)."""
        # Flat indices are in order as far as tokens go, which is all that a search for a token's first one needs.
        first = torch.arange(0, self.n_tokens * self.n_latents, self.n_latents, device=self.flat.device)
        return torch.searchsorted(self.flat, first)

    @cached_property
    def tokens(self) -> Tensor:
        """The token of each entry, (n,), ascending."""
        # Counted out: a division of every flat index takes several times as long.
        counts = torch.diff(self.starts, append=self.starts.new_tensor([len(self.flat)]))
        return torch.repeat_interleave(counts, output_size=len(self.flat))

    @cached_property
    def latents(self) -> Tensor:
        """The latent of each entry, (n,)."""
        return self.flat - self.tokens * self.n_latents

    @cached_property
    def by_latent(self) -> ByLatent:
        """The entries by latent, then token: sorted once for all gradients."""
        # Sorting 16 bits takes a third of the time that 64 take.
        few = torch.int16 if self.n_latents < 2**15 else torch.int32
        latents, order = self.latents.to(few).sort(stable=True)
        starts = torch.searchsorted(latents, torch.arange(self.n_latents, dtype=few, device=latents.device))
        return ByLatent(order, self.tokens.index_select(0, order), latents.long(), starts)


@dataclass(frozen=True, eq=False)
class ByLatent:
    """Entries by latent, then token.

    Attributes:
        order: Which entry each is, (n,).
        tokens: Its token, (n,).
        latents: Its latent, (n,), ascending.
        starts: Where each latent's entries start, (F,).
    """

    order: Tensor
    tokens: Tensor
    latents: Tensor
    starts: Tensor


def sum_rows(rows: Tensor, indices: Tensor, starts: Tensor, values: Tensor) -> Tensor:
    """Return sums of ``values[i] * rows[indices[i]]``, one for each start, (n_sums, width).

    Args:
        rows: (n_rows, width).
        indices: Into rows, (n,), those of each sum side by side.
        starts: Where those of each sum start, (n_sums,).
        values: (n,).
    """
    return F.embedding_bag(indices, rows, starts, mode="sum", per_sample_weights=values)


def dot_rows(a: Tensor, i: Tensor, starts: Tensor, b: Tensor, j: Tensor) -> Tensor:
    """Return ``a[i] . b[j]`` for every entry, (n,), without gathering rows.

    Args:
        a: (n_rows, width).
        i: Into a, (n,), ascending.
        starts: Where the entries of each row of a start, (n_rows,).
        b: (n_others, width).
        j: Into b, (n,).
    """
    # What torch.nn.functional.embedding_bag runs backward for the weights of its samples; 0 is for sums.
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(a, b, j, starts, i, 0)


def cut(widths: Sequence[int], device: torch.device) -> list[list[slice]]:
    """Return for each of several blocks of columns, side by side, the slices that it is cut into.

    On a CPU they are of at most `PIECE` columns; elsewhere blocks stay whole.
    """
    result, start = [], 0
    for width in widths:
        stop, step = start + width, PIECE if device.type == "cpu" else width
        result.append([slice(at, min(at + step, stop)) for at in range(start, stop, step)])
        start = stop
    return result


def pieces_of(table: Tensor, columns: Sequence[slice]) -> list[Tensor]:
    """Return contiguous copies of a table's columns, each (n_rows, its width)."""
    pieces = [table.new_empty(len(table), each.stop - each.start) for each in columns]
    # So many rows at once that their pages are still known when the next columns are read: in half the time.
    for start in range(0, len(table), _ROWS_AT_ONCE):
        rows = table[start : start + _ROWS_AT_ONCE]
        for piece, each in zip(pieces, columns, strict=True):
            piece[start : start + len(rows)] = rows[:, each]
    return pieces
