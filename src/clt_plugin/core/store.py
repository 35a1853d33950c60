"""Where weights live: in memory, or in safetensors files that are sliced on demand.

Both answer one call, ``get(kind, group, rows)``. Rows are always latents: ``get("W_enc", g, rows)`` gives
encoder vectors (n, read width) and ``get("W_dec", g, rows)`` decoder vectors (n, write width), so that
decoding and attribution touch only the latents they need. ``W_skip`` has no latents: its rows are the
coordinates of the site read, and its "group" is the number of the skip.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from clt_plugin.core.errors import FormatError

KINDS = ("W_enc", "W_dec", "W_skip")


@runtime_checkable
class Store(Protocol):
    """Weights behind one call."""

    lazy: bool

    def get(self, kind: str, group: int, rows: Tensor | None = None) -> Tensor:
        """Return weights of a kind, latents first, or the rows asked for."""
        ...


class MemoryStore:
    """Weights held as parameters."""

    lazy = False

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self.parameters = parameters

    def get(self, kind: str, group: int, rows: Tensor | None = None) -> Tensor:
        """Return a view of the parameter, or a copy of some of its rows; differentiable."""
        weight = self.parameters[kind][group]
        if kind == "W_enc":
            weight = weight.T
        return weight if rows is None else weight[rows]


@dataclass(frozen=True)
class Piece:
    """One tensor, or a part of one, in a safetensors file.

    Attributes:
        path: The file.
        key: The tensor's name in it.
        shape: What the whole tensor must be, checked against the file's header when the store opens.
        latents_last: Whether the stored tensor has its latents on the last axis, (d, F), not the first.
        columns: Which entries to take of the axis beside the latents' (the first one if they are last, else the
            second); None for all.
    """

    path: str
    key: str
    shape: tuple[int, ...]
    latents_last: bool = False
    columns: tuple[int, int] | None = None


@dataclass(frozen=True)
class LazyStore:
    """Weights sliced from safetensors files each time they are asked for.

    Files are opened for each read and closed again, so nothing stays mapped in memory between two.

    Attributes:
        pieces: For each (kind, group), the pieces whose columns, side by side, make the weights.
        dtype: What to convert to; None keeps the file's.
        device: Where to put what is read.
        latents: For each group, which of the stored latents it keeps (a selection); absent for all.
    """

    pieces: Mapping[tuple[str, int], tuple[Piece, ...]]
    dtype: torch.dtype | None = None
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - a device is immutable
    latents: Mapping[int, Tensor] = field(default_factory=dict)

    lazy = True

    def get(self, kind: str, group: int, rows: Tensor | None = None) -> Tensor:
        """Read weights, latents first: the rows asked for and no others."""
        if kind != "W_skip" and group in self.latents:
            kept = self.latents[group]
            rows = kept if rows is None else kept[rows.cpu()]
        parts = [read_piece(piece, rows) for piece in self.pieces[kind, group]]
        weight = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return weight.to(device=self.device, dtype=self.dtype)

    def moved(self, dtype: torch.dtype | None, device: torch.device) -> LazyStore:
        """Return the same store, reading into another dtype and device."""
        return replace(self, dtype=dtype, device=device)


def read_piece(piece: Piece, rows: Tensor | None = None) -> Tensor:
    """Read one piece as (latents, columns); refuse what is not finite.

    Args:
        piece: What to read.
        rows: Which latents, in this order; None for all.
    """
    from safetensors import SafetensorError, safe_open

    if rows is not None and len(rows) == 0:
        rows, empty = torch.zeros(1, dtype=torch.long), True
    else:
        empty = False
    try:
        with safe_open(piece.path, framework="pt") as file:
            stored = file.get_slice(piece.key)
            tensor = _sliced(stored, piece, rows)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{os.path.basename(piece.path)}: cannot read {piece.key} ({error})") from error
    if empty:
        tensor = tensor[:0]
    if not bool(torch.isfinite(tensor).all()):
        raise FormatError(
            f"{os.path.basename(piece.path)}: {piece.key} holds values that are not finite (nan or inf): "
            "the file is damaged, or was saved from a run that diverged"
        )
    return tensor


def _sliced(stored: Any, piece: Piece, rows: Tensor | None) -> Tensor:
    """Slice rows and columns out of a stored tensor and flatten it to (latents, columns)."""
    columns = slice(*piece.columns) if piece.columns else slice(None)
    if piece.latents_last:
        return stored[columns, :].T if rows is None else stored[:, _index(rows)][columns].T
    if rows is None:
        tensor = stored[:, columns]
    elif piece.columns:
        # The reader indexes one axis at a time: whole rows first, then their columns.
        tensor = stored[_index(rows)][:, columns]
    else:
        tensor = stored[_index(rows)]
    return tensor.reshape(tensor.shape[0], -1)


def _index(rows: Tensor) -> Tensor:
    return rows.detach().cpu()


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
