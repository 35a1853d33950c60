"""Vectors that lie at positions, and their products with states there; and how rows are cut into chunks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Vectors:
    """Vectors at positions, sorted by position, each of which has a row in a matrix of edges.

    Attributes:
        rows: The rows, (n,).
        positions: Where each vector is, (n,), ascending.
        vectors: (n, d).
    """

    rows: Tensor
    positions: Tensor
    vectors: Tensor

    def meet(self, states: Tensor, start: int, reach: Sequence[slice], edges: Tensor) -> None:
        """Add each vector's products with the states at its position to its row.

        Args:
            states: At positions from ``start`` on, (m, columns, d).
            start: The first position.
            reach: For each of those positions the columns whose states may be other than 0 there.
            edges: Where to add, (rows, columns).
        """
        stop = start + len(states)
        if states.shape[1] == 1:
            here = slice(*torch.searchsorted(self.positions, torch.tensor((start, stop)).to(self.positions)).tolist())
            products = torch.linalg.vecdot(states[self.positions[here] - start, 0], self.vectors[here])
            edges[:, 0].index_add_(0, self.rows[here], products)
            return
        # One product for each position, written where it belongs: no other copy of what was found.
        for position, rows, vectors in self._runs[bisect_left(self._runs, start, key=_position) :]:
            if position >= stop:
                break
            seen = reach[position - start]
            edges[rows, seen].addmm_(vectors, states[position - start, seen].T)

    def add_to(self, totals: Tensor, weights: Tensor) -> None:
        """Add the vectors to the positions where they are, each with its row's weight.

        Args:
            totals: (k, positions, d).
            weights: (k, rows).
        """
        for position, rows, vectors in self._runs:
            totals[:, position].addmm_(weights[:, rows], vectors)

    def behind(self, weight: Tensor) -> Vectors:
        """Return what meets states before a linear map as these vectors meet them after it.

        Args:
            weight: The map, (k, d): states after it are ``states @ weight``.
        """
        return Vectors(self.rows, self.positions, self.vectors @ weight.T)

    def prepare(self) -> None:
        """Find now what `meet` keeps: threads that share these vectors then only read."""
        _ = self._runs

    @cached_property
    def _runs(self) -> list[tuple[int, slice, Tensor]]:
        """Vectors at one position whose rows follow one another: (position, rows, vectors)."""
        if not len(self.rows):
            return []
        breaks = (self.rows.diff() != 1) | (self.positions.diff() != 0)
        starts = [0, *(breaks.nonzero()[:, 0] + 1).tolist(), len(self.rows)]
        firsts = torch.tensor(starts[:-1], device=self.rows.device)
        places = zip(self.positions[firsts].tolist(), self.rows[firsts].tolist(), pairwise(starts), strict=True)
        return [
            (position, slice(row, row + stop - start), self.vectors[start:stop])
            for position, row, (start, stop) in places
        ]


def _position(run: tuple[int, slice, Tensor]) -> int:
    return run[0]


def by_position(positions: Tensor) -> Iterator[tuple[int, slice]]:
    """Return (position, which entries) of each run of equal positions in an ascending list."""
    values, counts = torch.unique_consecutive(positions, return_counts=True)
    stop = 0
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        yield value, slice(stop, stop + count)
        stop += count


WASTE = 0.3
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
            is_vain = rows * longest - needed > WASTE * rows * longest and 4 * size > elements
            if stop > first and (size > elements or is_vain):
                break
            stop += 1
        yield slice(first, stop)
        first = stop
