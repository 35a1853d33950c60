"""Edges by pulling: the gradient of targets is carried back, and met by what sources wrote.

The same map as in `push`, transposed: one sweep a chunk of targets. A chunk holds targets whose last reading is of the
same state, at neighbouring positions: the layers and positions after are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from clt_plugin.attribution.engine._vectors import cut
from clt_plugin.attribution.engine.linear import FrozenLayer, FrozenMap, Spread
from clt_plugin.attribution.engine.readings import Readings
from clt_plugin.attribution.engine.sources import Sources


def pull(frozen: FrozenMap, sources: Sources, readings: Readings, targets: Tensor, *, bias: bool = True) -> Tensor:
    """Return the edges from all sources to some targets, (n, S).

    Args:
        frozen: The map.
        sources: The sources.
        readings: The targets.
        targets: Numbers of targets whose last reading is of one state, (n,).
        bias: Whether to find the edges from the bias too, which meets every layer at every position; otherwise 0.
    """
    return _Sweep(frozen, sources, readings.select(targets), bias).run().T


class _Sweep:
    """One chunk of targets on its way back through the layers."""

    def __init__(self, frozen: FrozenMap, sources: Sources, readings: Readings, bias: bool) -> None:
        self.frozen, self.sources, self.readings, self.bias = frozen, sources, readings, bias
        self.m = int(readings.positions.max()) + 1
        self.edges = torch.zeros(len(sources), len(readings), dtype=frozen.dtype, device=frozen.device)
        # Gradients at states that skips read, by state.
        self.pending: dict[tuple[int, str], Tensor] = {}
        # Whether every row is at its own position yet.
        self.is_fresh = True
        # What each row reads, (rows, d), and what the first attention made of it; where that is all there is.
        self.is_plain = len(readings.readings) == 1 and not any(sources.skips)
        self.own: Tensor | None = None
        self.spread: Spread | None = None
        # The gradient at the first layer's values.
        self.values: Tensor | None = None

    def run(self) -> Tensor:
        """Sweep; return the edges, (S, n)."""
        shape = (self.m, len(self.readings), self.frozen.d_model)
        g = torch.zeros(shape, dtype=self.frozen.dtype, device=self.frozen.device)
        for layer in reversed(range(int(self.readings.last_layer[0]) + 1)):
            self._inject(layer, "resid_post", g)
            self._meet(layer, g)
            if not self.frozen.parallel:
                self._inject(layer, "resid_mid", g)
            attended = g.clone() if self._reads(layer, "attn_out") else g
            self._inject(layer, "attn_out", attended)
            self._attend(layer, attended, g)
            self._inject(layer, "resid_pre", g)
        self._meet_embeddings(g)
        self._meet_bias(g, self.sources.start)
        if self.bias:
            self.edges[self.sources.bias] += self.readings.constants
        return self.edges

    def _reads(self, layer: int, state: str) -> bool:
        return bool(self.readings.at(layer, state)) or (layer, state) in self.pending

    def _inject(self, layer: int, state: str, g: Tensor) -> None:
        """Add the gradient of what is read of a state."""
        for reading in self.readings.at(layer, state):
            # A target reads a state once, so that no entry meets another.
            g[reading.positions, reading.rows] += reading.vectors
        skipped = self.pending.pop((layer, state), None)
        if skipped is not None:
            g += skipped

    def _attend(self, layer: int, g: Tensor, out: Tensor) -> None:
        step, positions = self.frozen.layers[layer], self.readings.positions
        self._meet_bias(g, step.constant)
        if self.is_fresh:
            rows = torch.arange(len(positions), device=g.device)
            fresh, own = g[positions, rows], out[positions, rows]
            if bool(fresh.any()):
                self.spread, self.own = step.attend_from_transposed(fresh, positions, out), own
                self.is_fresh = False
            return
        spread, self.spread = self.spread, None
        is_last = layer == 0 and not self.bias and not self._reads(0, "resid_pre")
        if not is_last and (spread is None or not self.is_plain):
            step.attend_transposed(g, out)
            return
        mixed = self._mixed(step, spread, len(g)) if spread and self.is_plain else step.put_out_transposed(g)
        values = step.unmix(mixed)
        if is_last:
            # Only embeddings are left to meet, which attention's weights can be applied to beforehand.
            self.values = values
        else:
            step.take_in(values, out)

    def _mixed(self, step: FrozenLayer, spread: Spread, m: int) -> Tensor:
        """Return the gradient at heads' outputs behind a single attention, found from few vectors."""
        assert self.own is not None
        positions, rows = self.readings.positions, torch.arange(len(self.own), device=self.own.device)
        mixed = self.own.new_zeros(m, len(rows), step.W_O[..., 0].numel())
        replace(spread, heads=step.put_out_transposed(spread.heads)).add_to(mixed, 0)
        mixed[positions, rows] += step.put_out_transposed(self.own)
        return mixed

    def _meet_embeddings(self, g: Tensor) -> None:
        embeddings, first = self.sources.embeddings[: self.m], self.sources.bias - self.sources.n_positions
        found = torch.bmm(g, embeddings[:, :, None])
        if self.values is not None:
            found += torch.bmm(self.values, self.frozen.layers[0].values(embeddings)[:, :, None])
        self.edges[first : first + self.m] = found[:, :, 0]

    def _meet(self, layer: int, g: Tensor) -> None:
        """Meet what is written at a layer's MLP."""
        norm, skip = self.sources.norms[layer], self.sources.skips[layer]
        states = ("mlp_out_before_norm", "mlp_out")
        if any(self._reads(layer, state) for state in states):
            g = g.clone()
        self._inject(layer, states[1], g)
        if norm is not None:
            self._meet_bias(g, norm.bias.expand(self.frozen.n_positions, -1))
            g = norm.transposed(g, norm.scale[0, : self.m, None])
        self._inject(layer, states[0], g)
        self._meet_bias(g, self.sources.constants[layer])
        if skip is not None:
            key, back = (skip.layer, skip.state), skip.transposed(g)
            self.pending[key] = back + self.pending[key] if key in self.pending else back
        for vectors in self.sources.written(layer):
            vectors.meet(g, 0, self.edges)

    def _meet_bias(self, g: Tensor, constant: Tensor) -> None:
        if self.bias:
            self.edges[self.sources.bias] += torch.einsum("ptd,pd->t", g, constant[: self.m])


CHUNK_ELEMENTS = 2**19
"""How many numbers a chunk's gradient may have: small enough for caches, large enough for matrix products."""


def chunks(readings: Readings, d_model: int, n_sources: int, elements: int = CHUNK_ELEMENTS) -> Iterator[Tensor]:
    """Cut the targets into chunks that `pull` takes, in the order in which influence flows: the last layers first.

    Args:
        readings: The targets.
        d_model: The width of the residual stream.
        n_sources: How many edges each target has, which count as much as its gradient.
        elements: How many numbers a chunk may have.
    """
    if not len(readings):
        return
    n = int(readings.positions.max()) + 1
    order = torch.argsort(readings.last * n + readings.positions, descending=True, stable=True)
    lasts, positions = readings.last[order].tolist(), readings.positions[order].tolist()
    start = 0
    for _, run in groupby(lasts):
        stop = start + len(list(run))
        # A target's edges count as much as its gradient.
        for part in cut([1 + at for at in positions[start:stop]], elements, d_model, n_sources):
            # Ascending, so that the edges of many follow one another.
            yield order[start + part.start : start + part.stop].sort().values
        start = stop
