"""The edges into one target by the last attention head that they pass: the split behind `head_loadings`.

With all attention cut, a target's gradient goes back through the residual stream and affine skips alone, which leave it
at the target's position. What it is at the output of a layer's attention is what that layer's heads add to the target
without another head in between. Taken back from there through one head alone, and through the whole of earlier layers,
it meets what sources wrote: the part of the target's edges whose last head it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from clt_plugin.attribution.attention._parts import pulled
from clt_plugin.attribution.engine.linear import FrozenLayer
from clt_plugin.attribution.engine.local import LocalReplacement
from clt_plugin.attribution.engine.pull import chunks, pull
from clt_plugin.attribution.engine.readings import Reading, Readings, order_of


@dataclass(frozen=True, eq=False)
class _Cut(FrozenLayer):
    """A layer whose attention passes nothing back, and keeps what came to it for the only target.

    Attributes:
        position: Where the target reads.
        arrived: The gradient there, (d,).
    """

    position: int = 0
    arrived: list[Tensor] = field(default_factory=list)

    def attend_transposed(self, g: Tensor, out: Tensor) -> None:
        """Keep the gradient, of (m, 1, d), and add nothing."""
        self.arrived.append(g[self.position, 0].clone())

    def attend_from_transposed(self, g: Tensor, at: Tensor, out: Tensor) -> None:
        """Keep the gradient, (1, d), and add nothing."""
        self.arrived.append(g[0].clone())


@dataclass(frozen=True, eq=False)
class _EachHead(FrozenLayer):
    """A layer through which each row goes by one head, and whose own biases write nothing.

    Attributes:
        heads: The rows' heads.
    """

    heads: tuple[int, ...] = ()

    def attend_from_transposed(self, g: Tensor, at: Tensor, out: Tensor) -> None:
        """Carry row r, (rows, d), back through its head; see `FrozenLayer.attend_from_transposed`."""
        for row, head in enumerate(self.heads):
            here, back = slice(row, row + 1), torch.zeros_like(out[:, :1])
            _head(self, head).attend_from_transposed(g[here], at[here], back)
            out[:, here] += back


def _head(layer: FrozenLayer, head: int) -> FrozenLayer:
    """Return a layer with one of its heads alone."""
    group = len(layer.W_O) // layer.W_V.shape[1]
    own, shared = slice(head, head + 1), slice(head // group, head // group + 1)
    return FrozenLayer(
        **{**_parts(layer), "W_O": layer.W_O[own], "pattern": layer.pattern[own], "W_V": layer.W_V[:, shared]}
    )


def _parts(layer: FrozenLayer) -> dict[str, Any]:
    return {each.name: getattr(layer, each.name) for each in fields(FrozenLayer)}


def split(
    local: LocalReplacement, readings: Readings, bar: bool
) -> tuple[Tensor, Tensor, list[tuple[str, Tensor, Tensor, Tensor]]]:
    """Split the edges into one target.

    Args:
        local: The local replacement model.
        readings: What the target reads.
        bar: Whether to show progress.

    Returns:
        The parts that pass no head, (S,); those by last head, (layer, head, S); and sums that `check_sums` is to check.
    """
    frozen, n_heads = local.frozen, len(local.frozen.layers[0].W_O)
    position = int(readings.positions[0])
    cuts = tuple(_Cut(**_parts(layer), position=position) for layer in frozen.layers)
    direct = pulled(replace(local, frozen=replace(frozen, layers=cuts)), readings)[0]
    loadings = direct.new_zeros(frozen.n_layers, n_heads, len(local.sources))
    sums = []
    for number, cut in enumerate(tqdm(cuts, "layers", disable=not bar)):
        if cut.arrived and bool(cut.arrived[0].any()):  # else the target does not see the layer
            heads = _heads(local, number, cut.arrived[0], position)
            loadings[number] = parts = _pulled_by_head(local, number, heads)
            sums.append((f"the sum by layer {number}'s heads", parts.sum(1), heads.values, parts.abs().sum(1)))
    return direct, loadings, sums


def _heads(local: LocalReplacement, number: int, g: Tensor, position: int) -> Readings:
    """Return the heads of a layer as targets: what each adds along a vector.

    Args:
        local: The local replacement model.
        number: The layer.
        g: The vector, (d,).
        position: Where.
    """
    layer, x = local.frozen.layers[number], local.frozen.value(number, "resid_pre")[:, None]
    rows = torch.arange(len(layer.W_O), device=g.device)
    positions = torch.full_like(rows, position)
    reading = Reading(number, "attn_out", rows, positions, g.expand(len(rows), -1))
    values = []
    for head in rows.tolist():
        written = torch.zeros_like(x)
        _head(layer, head).attend(x, 0, written)
        values.append(written[position, 0] @ g)
    last = torch.full_like(rows, order_of(number, "attn_out"))
    return Readings((reading,), g.new_zeros(len(rows)), torch.stack(values), positions, last)


def _pulled_by_head(local: LocalReplacement, number: int, heads: Readings) -> Tensor:
    """Return the edges into a layer's heads, each through itself alone, (heads, S)."""
    frozen, parts = local.frozen, heads.values.new_zeros(len(heads), len(local.sources))
    layer = {**_parts(frozen.layers[number]), "constant": torch.zeros_like(frozen.layers[number].constant)}
    for rows in chunks(heads, frozen.d_model, len(local.sources)):
        each = _EachHead(**layer, heads=tuple(rows.tolist()))
        layers = (*frozen.layers[:number], each, *frozen.layers[number + 1 :])
        parts[rows] = pull(replace(frozen, layers=layers), local.sources, heads, rows)
    return parts
