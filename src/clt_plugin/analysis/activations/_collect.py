"""Where each latent of a group is most active, and how its activations are distributed, streamed over tokens.

Memory is bounded by latents x examples, whatever the corpus. For each latent the k passages of the highest activation
are kept, at most one a row of text. Its histogram has bins of equal width up to the smallest power of two above its
largest activation so far: when that doubles, pairs of bins become one, so that the counts are exactly those of a
histogram that had known its range from the start.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clt_plugin.core.features import SparseGroup
from clt_plugin.training.data import Rows

PADDING = -1
"""Stands in a window where the text has no token."""


class Collector:
    """What is kept of one group.

    Args:
        n_latents: F.
        k: How many passages of each latent.
        context: How many tokens of a passage come before and after the one that is most active.
        bins: Of histograms, a power of two.

    Attributes:
        tokens: On how many tokens each latent was active, (F,).
        total: The sum of its activations, (F,), float64.
        largest: The largest, (F,).
        histogram: How many activations lie in each bin, (F, bins).
        peaks: The largest activation of each passage, the best first, 0 for none, (F, k).
        windows: The passages' token ids, (F, k, 2 context + 1); the most active one is in the middle.
        activations: Likewise, as shares of the passage's peak, in float16.
    """

    def __init__(self, n_latents: int, k: int, context: int, bins: int) -> None:
        self.n_latents, self.k, self.context, self.bins = n_latents, k, context, bins
        width = 2 * context + 1
        self.tokens = torch.zeros(n_latents, dtype=torch.int64)
        self.total = torch.zeros(n_latents, dtype=torch.float64)
        self.largest = torch.zeros(n_latents)
        self.histogram = torch.zeros(n_latents, bins, dtype=torch.int32)
        self.peaks = torch.zeros(n_latents, k)
        self.windows = torch.full((n_latents, k, width), PADDING, dtype=torch.int32)
        self.activations = torch.zeros(n_latents, k, width, dtype=torch.float16)

    @property
    def ranges(self) -> Tensor:
        """Where each latent's histogram ends, (F,): a power of two; 1 for a latent that was never active."""
        return torch.ldexp(torch.ones_like(self.largest), torch.frexp(self.largest).exponent)

    def add(self, rows: Rows, active: SparseGroup) -> None:
        """Take in a batch.

        Args:
            rows: The texts.
            active: The group's active latents; tokens are the rows' tokens that count, one row after another.
        """
        values = active.values.detach().float().cpu()
        positive = values > 0
        tokens, latents, values = active.tokens.cpu()[positive], active.latents.cpu()[positive], values[positive]
        if not len(values):
            return
        self.tokens.index_add_(0, latents, torch.ones_like(latents))
        self.total.index_add_(0, latents, values.double())
        self._count(latents, values)
        self._keep(rows, tokens, latents, values)

    def _count(self, latents: Tensor, values: Tensor) -> None:
        before = torch.frexp(self.largest).exponent
        known = self.largest > 0
        self.largest.scatter_reduce_(0, latents, values, "amax")
        exponents = torch.frexp(self.largest).exponent
        doublings = (exponents - before).masked_fill(~known, 0)
        while bool((grown := doublings > 0).any()):
            pairs = self.histogram[grown].unflatten(1, (-1, 2)).sum(2, dtype=torch.int32)
            self.histogram[grown] = torch.cat((pairs, torch.zeros_like(pairs)), dim=1)
            # After so many there is one bin left, which stays the first.
            doublings = (doublings - 1).clamp(max=self.bins.bit_length())
        # Below a power of two by definition of its exponent, so that the last bin is never passed.
        places = torch.ldexp(values * self.bins, -exponents[latents]).long()
        flat = self.histogram.view(-1)
        flat.index_add_(0, latents * self.bins + places, torch.ones_like(latents, dtype=torch.int32))

    def _keep(self, rows: Rows, tokens: Tensor, latents: Tensor, values: Tensor) -> None:
        n_rows, n = rows.ids.shape[0], self.n_latents
        where = rows.counted.nonzero()
        row, position = where[tokens, 0], where[tokens, 1]
        # The best of each row, and the first place of it.
        key = row * n + latents
        best = torch.zeros(n_rows * n).scatter_reduce_(0, key, values, "amax")
        first = torch.full((n_rows * n,), rows.ids.shape[1], dtype=torch.int64)
        won = values == best[key]
        first.scatter_reduce_(0, key[won], position[won], "amin")
        best, first = best.view(n_rows, n), first.view(n_rows, n)
        better = (best.amax(0) > self.peaks[:, -1]).nonzero()[:, 0]
        if not len(better):
            return
        # Stable: earlier passages stay ahead of equal ones.
        rivals = torch.cat((self.peaks[better], best[:, better].T), dim=1)
        order = rivals.argsort(dim=1, descending=True, stable=True)[:, : self.k]
        self.peaks[better] = rivals.gather(1, order)
        old = order.clamp(max=self.k - 1)[..., None].expand(-1, -1, self.windows.shape[2])
        windows, activations = self.windows[better].gather(1, old), self.activations[better].gather(1, old)
        at, slot = ((order >= self.k) & (self.peaks[better] > 0)).nonzero(as_tuple=True)
        from_row = order[at, slot] - self.k
        centre = first[from_row, better[at]]
        windows[at, slot], activations[at, slot] = self._windows(
            rows, from_row, centre, better[at], tokens * n + latents, values
        )
        self.windows[better], self.activations[better] = windows, activations

    def _windows(
        self, rows: Rows, row: Tensor, centre: Tensor, latents: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the ids and activations around some places, (m, 2 context + 1) each.

        Args:
            rows: The texts.
            row: Of each place, (m,).
            centre: Its position, (m,).
            latents: Whose activations, (m,).
            keys: token * F + latent of every active entry, ascending, (n,).
            values: Its activation, (n,).
        """
        places = centre[:, None] + torch.arange(-self.context, self.context + 1)
        # Padding comes after the last token that counts.
        index = torch.arange(rows.ids.shape[1])
        ends = torch.where(rows.counted, index, -1).amax(1) + 1
        inside = (places >= 0) & (places < ends[row][:, None])
        places = places.clamp(0, rows.ids.shape[1] - 1)
        ids = torch.where(inside, rows.ids[row[:, None], places], PADDING).int()
        number = torch.full(rows.ids.shape, -1)
        number[rows.counted] = torch.arange(int(rows.counted.sum()))
        wanted = number[row[:, None], places] * self.n_latents + latents[:, None]
        found = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        acts = torch.where(inside & (keys[found] == wanted), values[found], 0.0)
        peaks = acts[:, self.context, None]
        return ids, (acts / peaks).half()
