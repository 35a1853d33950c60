"""Vectors that lie at positions, and their products with states there; and how rows are cut into chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Vectors:
    """Vectors at positions, sorted by position, each of which has a row in a matrix of edges.

    Attributes:
        rows: The rows, (n,), n at least 1.
        positions: Where each vector is, (n,), ascending.
        vectors: (n, d).
    """

    rows: Tensor
    positions: Tensor
    vectors: Tensor

    def meet(self, states: Tensor, start: int, edges: Tensor) -> None:
        """Add each vector's products with the states at its position to its row.

        Args:
            states: At positions from ``start`` on, (m, columns, d).
            start: The first position.
            edges: Where to add, (rows, columns).
        """
        batch = self._batch
        low, high = max(start, batch.first), min(start + len(states), batch.first + len(batch.columns))
        if low >= high:
            return
        befores, overs = batch.befores[low - batch.first :], batch.overs[low - batch.first :]
        n, n_over, width = high - low, overs[high - low] - overs[0], batch.columns.shape[-1]
        # First what comes of the vectors beyond a position's columns, then of the columns.
        found = states.new_empty(n_over + n * width, states.shape[1])
        for place in range(n) if n_over else ():
            over = slice(overs[place], overs[place + 1])
            if over.start < over.stop:
                product = states[low + place - start] @ batch.beyond[:, over]
                found[over.start - overs[0] : over.stop - overs[0]] = product.T
        columns = batch.columns[low - batch.first : high - batch.first]
        product = torch.bmm(states[low - start : high - start], columns)
        found[n_over:].view(n, width, -1).copy_(product.transpose(1, 2))
        here = slice(befores[0], befores[n])
        shift = torch.where(batch.is_beyond[here], overs[0], (low - batch.first) * width - n_over)
        self._add(edges, here, found[batch.places[here] - shift])

    def behind(self, weight: Tensor) -> Vectors:
        """Return what meets states before a linear map as these vectors meet them after it.

        Args:
            weight: The map, (k, d): states after it are ``states @ weight``.
        """
        return Vectors(self.rows, self.positions, self.vectors @ weight.T)

    def prepare(self) -> None:
        """Find now what `meet` keeps: threads that share these vectors then only read."""
        _ = self._batch, self._first_row

    def _add(self, edges: Tensor, here: slice, found: Tensor) -> None:
        if self._first_row is None:
            edges.index_add_(0, self.rows[here], found)
        else:
            edges[self._first_row + here.start : self._first_row + here.stop] += found

    @cached_property
    def _first_row(self) -> int | None:
        """The first row, where all rows follow one another."""
        first, n = int(self.rows[0]), len(self.rows)
        return first if torch.equal(self.rows, torch.arange(first, first + n, device=self.rows.device)) else None

    @cached_property
    def _batch(self) -> _Batch:
        first = int(self.positions[0])
        at = self.positions - first
        counts = torch.bincount(at)
        # About as many columns as there are vectors, in eights, so that padding at most doubles them.
        width = -(-len(at) // (8 * len(counts))) * 8
        width = min(width, int(counts.max()))
        befores = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        overs = torch.cat((counts.new_zeros(1), (counts - width).clamp(min=0).cumsum(0)))
        within = torch.arange(len(at), device=at.device) - befores[at]
        beyond = within >= width
        flat = self.vectors.new_zeros(len(counts) * width, self.vectors.shape[-1])
        flat[(at * width + within)[~beyond]] = self.vectors[~beyond]
        return _Batch(
            first=first,
            columns=flat.T.contiguous().unflatten(1, (-1, width)).transpose(0, 1),
            beyond=self.vectors[beyond].T.contiguous(),
            befores=befores.tolist(),
            overs=overs.tolist(),
            is_beyond=beyond,
            places=torch.where(beyond, overs[at] + within - width, at * width + within),
        )


@dataclass(frozen=True, eq=False)
class _Batch:
    """Vectors by position, for one batch of products: that takes a fifth of the time of as many thin products.

    Attributes:
        first: The first position.
        columns: The first few vectors of each position from there on, and zeros, (positions, d, width).
        beyond: The other vectors of positions that have more, (d, n_beyond).
        befores: How many vectors are at positions before each, and in all, (positions + 1,).
        overs: How many of those are in ``beyond``, (positions + 1,).
        is_beyond: Which vectors are there, (n,).
        places: Each vector's place, there or among the columns of all positions, (n,).
    """

    first: int
    columns: Tensor
    beyond: Tensor
    befores: Sequence[int]
    overs: Sequence[int]
    is_beyond: Tensor
    places: Tensor


def by_position(positions: Tensor) -> Iterator[tuple[int, slice]]:
    """Return (position, which entries) of each run of equal positions in an ascending list."""
    values, counts = torch.unique_consecutive(positions, return_counts=True)
    stop = 0
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        yield value, slice(stop, stop + count)
        stop += count


WASTE = 0.2
"""How much of a chunk's state may be positions that a row does not need."""


def cut(lengths: Sequence[int], elements: int, width: int, least: int = 0) -> Iterator[slice]:
    """Cut rows into chunks, each of which carries as many positions as its longest row.

    A chunk ends where it is full, or where it would carry too many positions in vain, unless it is small yet.

    Args:
        lengths: How many positions each row needs, descending.
        elements: How many numbers a chunk's state may have.
        width: How many a row has at each position.
        least: How many a row counts for at least.
    """
    first = 0
    while first < len(lengths):
        longest, needed, stop = lengths[first], 0, first
        while stop < len(lengths):
            needed += lengths[stop]
            rows = stop + 1 - first
            size = rows * max(longest * width, least)
            is_vain = rows * longest - needed > WASTE * rows * longest and 8 * size > elements
            if stop > first and (size > elements or is_vain):
                break
            stop += 1
        yield slice(first, stop)
        first = stop
