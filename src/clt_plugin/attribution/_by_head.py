"""The edges into one target by the last attention head that they pass: the split behind `head_loadings`.

With all attention cut, a target's gradient goes back through the residual stream and affine skips alone. What it is at
the output of a layer's attention is what that layer's heads add to the target without another head in between. Taken
back through one head, it is what that head reads for the target, and the sources' edges into that are the part of the
target's edges whose last head it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from clt_plugin.attribution._parts import pulled
from clt_plugin.attribution.linear import FrozenLayer
from clt_plugin.attribution.local import LocalReplacement
from clt_plugin.attribution.readings import Reading, Readings


@dataclass(frozen=True, eq=False)
class _Cut(FrozenLayer):
    """A layer whose attention passes nothing back, and keeps what came to it.

    Attributes:
        arrived: The gradients, (m, rows, d) each.
    """

    arrived: list[Tensor] = field(default_factory=list)

    def attend_transposed(self, g: Tensor, out: Tensor) -> None:
        """Keep gradients, (m, rows, d), and add nothing."""
        self.arrived.append(g.clone())


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
    cuts = tuple(_Cut(**{each.name: getattr(layer, each.name) for each in fields(layer)}) for layer in frozen.layers)
    direct = pulled(replace(local, frozen=replace(frozen, layers=cuts)), readings)[0]
    loadings = direct.new_zeros(frozen.n_layers, n_heads, len(local.sources))
    sums = []
    for number, cut in enumerate(tqdm(cuts, "layers", disable=not bar)):
        (arrived,) = cut.arrived
        if not arrived.shape[1]:  # a layer behind the target
            continue
        heads = _heads(local, number, arrived)
        loadings[number] = parts = pulled(local, heads)
        sums.append((f"the sum by layer {number}'s heads", parts.sum(1), heads.values, parts.abs().sum(1)))
    return direct, loadings, sums


def _heads(local: LocalReplacement, number: int, g: Tensor) -> Readings:
    """Return what the heads of a layer read for a target that is reached from them without another head.

    Args:
        local: The local replacement model.
        number: The layer.
        g: The target's gradient at what the layer's attention adds, (m, 1, d).
    """
    layer = local.frozen.layers[number]
    n_heads, group = len(layer.W_O), len(layer.W_O) // layer.W_V.shape[1]
    vectors = g.new_zeros(len(g), n_heads, g.shape[-1])
    for head in range(n_heads):
        own, shared = slice(head, head + 1), slice(head // group, head // group + 1)
        one = replace(layer, W_O=layer.W_O[own], pattern=layer.pattern[own], W_V=layer.W_V[:, shared])
        back = torch.zeros_like(g)
        one.attend_transposed(g, out=back)
        vectors[:, head] = back[:, 0]
    heads, places = (torch.arange(n, device=g.device) for n in (n_heads, len(g)))
    rows, positions = heads.repeat(len(g)), places.repeat_interleave(n_heads)
    reading = Reading(number, "resid_pre", rows, positions, vectors.flatten(0, 1))
    values = torch.einsum("mhd,md->h", vectors, local.frozen.value(number, "resid_pre")[: len(g)])
    last = torch.full_like(heads, number)
    return Readings((reading,), torch.zeros_like(values), values, torch.full_like(heads, len(g) - 1), last)
