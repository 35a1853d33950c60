"""A token-level shuffle buffer: harvested in order, drawn at random, resumed at the same tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clt_plugin.training.data._ahead import Ahead
from clt_plugin.training.data.activations import (
    Activations,
    Chunk,
    Cursor,
    DataError,
    Source,
    check_whole,
    digest,
    permutation,
)


@dataclass(frozen=True, eq=False)
class Batch(Activations):
    """Activations drawn from a `Buffer`.

    Attributes:
        origins: Each token's number in the source, (tokens,).
    """

    origins: Tensor


class Buffer:
    """Tokens of a source in random order.

    The source's tokens are taken in blocks of `capacity`. Each block is drawn in an order of its own, a random
    permutation from the seed; as its tokens leave, those of the next block take their places, harvested meanwhile in a
    thread. So memory holds `capacity` tokens and the few chunks on their way; every token is drawn once; which tokens
    a batch has depends on seed, capacity and source alone, never on timing; and where a run stands is a few numbers,
    from which it goes on after one block is harvested again.

    Use it as a context manager, or `close` it: the thread ends then.

    Args:
        source: Where activations come from.
        capacity: How many tokens are mixed at a time, and held.
        seed: Decides every block's order.
        ahead: How many chunks may wait besides.

    >>> tokens = Buffer(harvest, capacity=2**18)           # doctest: +SKIP
    >>> with tokens:                                       # doctest: +SKIP
    ...     for batch in tokens.batches(4096):
    ...         trainer.step(batch.by_site(wiring.read_sites), batch.by_site(wiring.write_sites))
    """

    def __init__(self, source: Source, capacity: int, *, seed: int = 0, ahead: int = 2) -> None:
        check_whole("capacity", capacity, 1)
        check_whole("ahead", ahead, 1)
        check_whole("seed", seed, 0)
        self.source, self.capacity, self.seed, self.ahead = source, capacity, seed, ahead
        # Not later, when the thread may be running the models that it looks at.
        self._identity = digest(source.identity())
        self._rows: Tensor | None = None
        self._chunks: Ahead[Chunk] | None = None
        self._chunk: Chunk | None = None
        self._paused = self._closed = False
        self._restart(_Start(), 0)

    # ---------------------------------------------------------------- drawing

    def draw(self, n: int) -> Batch:
        """Draw so many tokens; at the source's end those that are left, and then none.

        Raises:
            DataError: The buffer is closed or paused. What the source raises is raised here.
        """
        check_whole("the number of tokens", n, 1)
        if self._closed or self._paused:
            state = "closed: make a new one" if self._closed else "paused, and waits for nobody: draw afterwards"
            raise DataError(f"the buffer is {state}")
        # Before any token is taken: where the source fails, none is lost.
        self._fill(wait=False)
        parts, origins = [], []
        while n and (self._at < len(self._slots) or self._next_block()):
            assert self._rows is not None
            taken = slice(self._at, self._at + n)
            parts.append(self._rows[self._slots[taken]])
            origins.append(self._order[taken] + self._block * self.capacity)
            self._at += len(parts[-1])
            n -= len(parts[-1])
        if not parts:
            parts = [torch.empty(0, sum(self.source.widths)) if self._rows is None else self._rows[:0]]
        flat = parts[0] if len(parts) == 1 else torch.cat(parts)
        return Batch(flat, self.source.sites, self.source.widths, torch.cat([*origins, NONE]))

    def batches(self, size: int, drop_last: bool = True) -> Iterator[Batch]:
        """Draw batch after batch, to the source's end.

        Args:
            size: How many tokens a batch has.
            drop_last: Whether to leave out the last one if it has fewer.
        """
        while len(batch := self.draw(size)) == size:
            yield batch
        if len(batch) and not drop_last:
            yield batch

    # ---------------------------------------------------------------- where it stands

    def state_dict(self) -> dict[str, Any]:
        """Return where the buffer stands, as plain data; `load_state_dict` goes on from it at the same tokens."""
        return {
            "capacity": self.capacity,
            "seed": self.seed,
            "source": self._identity,
            "block": max(self._block, 0),
            "drawn": self._at if self._block >= 0 else 0,
            "start": self._start.cursor.to_list(),
            "skip": self._start.skip,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another buffer stood: the block that it was drawing from is harvested again.

        Args:
            state: What `state_dict` returned.

        Raises:
            DataError: That buffer had another capacity, seed or source, so that other tokens would come.
        """
        mine = {"capacity": self.capacity, "seed": self.seed, "source": self._identity}
        for name, value in mine.items():
            if state[name] != value:
                asked = f"{name} {state[name]}, not {value}" if name != "source" else "another source"
                raise DataError(f"the run that is resumed had {asked}: resume it with the same data and settings")
        self._stop()
        self._restart(_Start(Cursor(*state["start"]), state["skip"]), state["block"])
        if state["drawn"]:
            if not self._next_block() or len(self._slots) < state["drawn"]:
                raise DataError("the source has fewer tokens than when the run was stopped: give the same one")
            self._at = state["drawn"]

    @property
    def nbytes(self) -> int:
        """How many bytes the buffer holds, without the chunks on their way; 0 before the first draw."""
        return 0 if self._rows is None else self._rows.nbytes

    # ---------------------------------------------------------------- the thread

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Have the harvest stand still, so that its models can be used for something else, such as evaluation."""
        if self._chunks is None:
            yield
            return
        with self._chunks.busy:
            self._paused = True
            try:
                yield
            finally:
                self._paused = False

    def close(self) -> None:
        """End the thread and let go of the memory."""
        self._closed = True
        self._stop()
        self._rows = self._chunk = None

    def __enter__(self) -> Buffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stop(self) -> None:
        if self._chunks is not None:
            self._chunks.close()
            self._chunks = None

    # ---------------------------------------------------------------- blocks

    def _restart(self, start: _Start, block: int) -> None:
        """Be about to fill a block whose first token is at a place of the source."""
        self._block = block - 1
        # Tokens leave from `_slots` in order, `_at` of them so far. The next block's tokens, of which there are
        # `_filled`, take the places that are free by then, in the same order.
        self._slots, self._at, self._filled = torch.arange(self.capacity), self.capacity, 0
        self._order = NONE
        self._start = self._next_start = start
        self._chunk, self._used, self._cursor = None, start.skip, start.cursor

    def _next_block(self) -> bool:
        """Wait for the next block to be complete, and begin to draw from it; False at the source's end."""
        self._fill(wait=True)
        if not self._filled:
            return False
        self._block += 1
        self._order = permutation(self._filled, "block", self.seed, self._block)
        self._slots = self._slots[: self._filled][self._order]
        self._start, self._at, self._filled = self._next_start, 0, 0
        return True

    def _fill(self, wait: bool) -> None:
        """Put the next block's tokens into free places: as many as there are, or as are there without waiting."""
        while self._filled < self._at and self._take(wait):
            assert self._chunk is not None
            flat = self._chunk.activations.flat
            if self._rows is None:
                self._rows = flat.new_empty(self.capacity, flat.shape[1])
            if not self._filled:
                self._next_start = _Start(self._cursor, self._used)
            taken = slice(self._used, self._used + self._at - self._filled)
            rows = flat[taken]
            self._rows[self._slots[self._filled : self._filled + len(rows)]] = rows
            self._used += len(rows)
            self._filled += len(rows)

    def _take(self, wait: bool) -> bool:
        """See to it that `_chunk` has tokens that were not used; False where none can be had."""
        while self._chunk is None or self._used >= len(self._chunk.activations):
            if self._chunk is not None:
                self._cursor, self._used, self._chunk = self._chunk.after, 0, None
            chunks = self._started()
            if not wait and not chunks.ready():
                return False
            try:
                self._chunk = next(chunks)
            except StopIteration:
                return False
        return True

    def _started(self) -> Ahead[Chunk]:
        if self._chunks is None:
            # Not `self`: whoever forgets the buffer ends the thread.
            source, cursor = self.source, self._cursor
            self._chunks = Ahead(lambda: source.chunks(cursor), self.ahead)
        return self._chunks


NONE = torch.empty(0, dtype=torch.long)


@dataclass(frozen=True)
class _Start:
    """Where a block begins in the source: at a chunk's cursor, and how many of the chunk's tokens come before."""

    cursor: Cursor = Cursor()  # noqa: RUF009 - a cursor is immutable
    skip: int = 0


def mixing(origins: Tensor) -> float:
    """Return how well an order is mixed: 1 for a random one, about 0 for the source's own.

    It is the mean distance between neighbours, in tokens of the source, over the mean distance of any two. Over one
    block of a `Buffer` it is 1; over many blocks about capacity / tokens, as blocks follow each other.

    Args:
        origins: Where each token comes from, in the order drawn, (tokens,): `Batch.origins`.

    Raises:
        DataError: There are fewer than two tokens.
    """
    n = len(origins)
    if n < 2:
        raise DataError("mixing needs at least two tokens")
    place = origins.double()
    neighbours = place.diff().abs().mean()
    # The mean over all pairs, from the sorted values: each is added as often as it is the larger, less the smaller.
    times = 2 * torch.arange(n, dtype=torch.float64, device=origins.device) - (n - 1)
    return float(neighbours / (2 * (times * place.sort().values).sum() / (n * (n - 1))))
