"""Where weights live: in memory, or in files that are sliced on demand.

Both answer one call, ``get(kind, group, rows)``. Rows are always latents: ``get("W_enc", g, rows)`` gives
encoder vectors (n, read width) and ``get("W_dec", g, rows)`` decoder vectors (n, write width), so that
decoding and attribution touch only the latents they need. ``W_skip`` has no latents: its rows are the
coordinates of the site read, and its "group" is the number of the skip.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from clt_plugin.core.errors import FormatError
from clt_plugin.core.files import File

KINDS = ("W_enc", "W_dec", "W_skip")


@runtime_checkable
class Store(Protocol):
    """Weights behind one call."""

    lazy: bool

    def get(self, kind: str, group: int, rows: Tensor | slice | None = None) -> Tensor:
        """Return weights of a kind, latents first, or the rows asked for."""
        ...


class MemoryStore:
    """Weights held as parameters."""

    lazy = False

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self.parameters = parameters

    def get(self, kind: str, group: int, rows: Tensor | slice | None = None) -> Tensor:
        """Return a view of the parameter, or a copy of some of its rows; differentiable."""
        weight = self.parameters[kind][group]
        if kind == "W_enc":
            weight = weight.T
        return weight if rows is None else weight[rows]


@dataclass(frozen=True)
class Piece:
    """One tensor of a file, or a part of one, seen as (rows, columns).

    The rows of ``W_enc`` and ``W_dec`` are latents, those of ``W_skip`` the coordinates of the site read.

    Attributes:
        file: The file.
        key: The tensor's name in it.
        shape: What the whole tensor must be, checked against the file's header when the store opens.
        at: Which entry of its leading axes to take, such as a layer of a tensor over all layers.
        rows_last: Whether the rows are the last of the remaining axes, (d, F), not the first.
        columns: Which entries to take of the axis beside the rows' (the first one if they are last, else the
            second); None for all.
        zeros: Entries of that axis that are not taken and must be about 0: the targets before its source that a
            full-length decoder has.
        scale: What to multiply with: a number, or one a column.
        row_scale: What to multiply with besides, one number a row.
    """

    file: File
    key: str
    shape: tuple[int, ...]
    at: tuple[int, ...] = ()
    rows_last: bool = False
    columns: tuple[int, int] | None = None
    zeros: tuple[int, int] | None = None
    scale: float | Tensor | None = None
    row_scale: Tensor | None = None


@dataclass(frozen=True)
class LazyStore:
    """Weights sliced from files each time they are asked for.

    Files are opened for each read and closed again, so nothing stays mapped in memory between two. A file that has
    changed in between is refused: the biases that were read at first would not go with it.

    A crosscoder whose weights are here reads them all when it is copied (``copy.deepcopy``) or pickled: the copy has
    them in memory.

    Attributes:
        pieces: For each (kind, group), the pieces whose columns, side by side, make the weights.
        dtype: What to convert to; None keeps the file's.
        device: Where to put what is read.
        latents: For each group, which of the stored latents it keeps (a selection); absent for all.
        stamps: {path: `File.stamp`} of the files when the store was opened; taken now where they are not given.
    """

    pieces: Mapping[tuple[str, int], tuple[Piece, ...]]
    dtype: torch.dtype | None = None
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - a device is immutable
    latents: Mapping[int, Tensor] = field(default_factory=dict)
    stamps: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)

    lazy = True

    def __post_init__(self) -> None:
        if self.stamps is None:
            files = {file.path: file for pieces in self.pieces.values() for file in _files(pieces)}
            stamps = {path: file.stamp() for path, file in files.items() if file.is_here}
            object.__setattr__(self, "stamps", stamps)

    def get(self, kind: str, group: int, rows: Tensor | slice | None = None) -> Tensor:
        """Read weights, latents first: the rows asked for and no others."""
        if kind != "W_skip" and group in self.latents:
            kept = self.latents[group]
            rows = kept if rows is None else kept[rows.cpu() if isinstance(rows, Tensor) else rows]
        for file in _files(self.pieces[kind, group]):
            if self.stamps and file.path in self.stamps and file.stamp() != self.stamps[file.path]:
                raise FormatError(f"{file} changed since it was opened: load it again")
        parts = [read_piece(piece, rows) for piece in self.pieces[kind, group]]
        weight = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return weight.to(device=self.device, dtype=self.dtype)

    def moved(self, dtype: torch.dtype | None, device: torch.device) -> LazyStore:
        """Return the same store, reading into another dtype and device."""
        return replace(self, dtype=dtype, device=device)


def _files(pieces: Sequence[Piece]) -> list[File]:
    """Return the files that pieces lie in, those behind views of them."""
    return list(dict.fromkeys(part for file in dict.fromkeys(piece.file for piece in pieces) for part in file.parts))


ABOUT_ZERO = 1e-4
"""How large entries that must be about 0 may be, beside the largest one of the rows they were read with."""


def read_piece(piece: Piece, rows: Tensor | slice | None = None) -> Tensor:
    """Read one piece as (rows, columns); refuse what is not finite.

    Args:
        piece: What to read.
        rows: Which rows, in this order; None for all.
    """
    rows = rows.detach().cpu() if isinstance(rows, Tensor) else rows
    if piece.rows_last:
        stored = piece.file.read(piece.key, piece.at)
        taken = stored[_columns(piece.columns)]
        weight = (taken if rows is None else taken[..., rows]).flatten(0, -2)
        weight = weight.T
    else:
        weight = _rows_of(piece, rows, piece.columns)
        if piece.zeros:
            _check_zeros(piece, _rows_of(piece, rows, piece.zeros), weight)
        weight = weight.flatten(1)
    if not is_finite(weight):
        raise _not_finite(piece)
    if piece.scale is None and piece.row_scale is None:
        return weight
    # In float32 at least: a scale in bfloat16 would be off by up to 0.4%.
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if piece.scale is not None:
        weight = weight * piece.scale
    if piece.row_scale is not None:
        row_scale = piece.row_scale if rows is None else piece.row_scale[rows]
        weight = weight * row_scale.to(weight.dtype)[:, None]
    return weight


def _rows_of(piece: Piece, rows: Tensor | slice | None, columns: tuple[int, int] | None) -> Tensor:
    """Read rows of a tensor whose rows come first, and of them some columns, (n, columns, ...)."""
    if columns is None:
        return piece.file.read(piece.key, piece.at, rows)
    if not (isinstance(rows, Tensor) and piece.file.is_here):
        return piece.file.read(piece.key, piece.at, rows)[:, slice(*columns)]
    # Columns first, which copies nothing, so that of the rows no others are copied.
    kept = piece.file.read(piece.key, piece.at)[:, slice(*columns)]
    piece.file.ask_ahead(piece.key, kept, rows)
    return kept[rows]


def _not_finite(piece: Piece) -> FormatError:
    return FormatError(
        f"{piece.file}: {piece.key} holds values that are not finite (nan or inf): "
        "the file is damaged, or was saved from a run that diverged"
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is finite."""
    # A sum is one pass without a copy, and is finite only if every value is. Where values are so large that it
    # overflows, each is looked at, which takes four times as long.
    return bool(tensor.detach().sum().isfinite()) or bool(torch.isfinite(tensor).all())


def _columns(columns: tuple[int, int] | None) -> slice:
    return slice(*columns) if columns else slice(None)


def _check_zeros(piece: Piece, early: Tensor, kept: Tensor) -> None:
    """Refuse rows that write where nothing may be written, both (n, targets, d)."""
    largest = _largest(early)
    if largest <= 1e-6 or largest <= ABOUT_ZERO * _largest(kept):
        return
    if not is_finite(early):
        raise _not_finite(piece)
    if piece.zeros is not None:
        start, stop = piece.zeros
        raise FormatError(
            f"{piece.file}: {piece.key} writes up to {largest:.3g} at targets {start} to {stop - 1}, which come before "
            "its source and must be about 0: this is not a causal decoder"
        )


def _largest(tensor: Tensor) -> float:
    """Return the largest absolute value, 0 of nothing; nan where there is one."""
    return max(map(abs, (float(bound) for bound in tensor.aminmax()))) if tensor.numel() else 0.0


class _StreamedProduct(torch.autograd.Function):
    """x @ weight for a weight that is read when needed and never kept: read again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, read: Callable[[], Tensor]) -> Tensor:
        ctx.read = read
        return x @ read()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _StreamedProduct.apply(grad, lambda: ctx.read().T), None


def streamed_product(x: Tensor, read: Callable[[], Tensor]) -> Tensor:
    """Return ``x @ read()``, (..., out), without keeping the (in, out) weight: a backward pass reads it again."""
    return _StreamedProduct.apply(x, read)


def product(x: Tensor, store: Store, kind: str, group: int) -> Tensor:
    """Return x @ weights for ``W_enc`` (its latents last) or ``W_dec``; lazily read weights are not kept.

    Args:
        x: (..., read width) for the encoder, (..., n_latents) for the decoder, (..., read width) for a skip.
        store: Where the weights live.
        kind: One of `KINDS`.
        group: The group, or the number of the skip.
    """
    if kind == "W_enc":
        read = lambda: store.get(kind, group).T  # noqa: E731
    else:
        read = lambda: store.get(kind, group)  # noqa: E731
    return streamed_product(x, read) if store.lazy else x @ read()
