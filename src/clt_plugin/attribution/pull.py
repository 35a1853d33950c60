"""Edges by pulling: the gradient of targets is carried back, and met by what sources wrote.

The same map as in `push`, transposed: one sweep a chunk of targets. A chunk holds targets whose last reading is of the
same state, at neighbouring positions: the layers and positions after are left out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from clt_plugin.attribution.linear import FrozenMap
from clt_plugin.attribution.readings import Readings
from clt_plugin.attribution.sources import Sources, blocks, by_position


def pull(frozen: FrozenMap, sources: Sources, readings: Readings, targets: Tensor) -> Tensor:
    """Return the edges from all sources to some targets, (n, S).

    Args:
        frozen: The map.
        sources: The sources.
        readings: The targets.
        targets: Numbers of targets whose last reading is of one state, (n,).
    """
    return _Sweep(frozen, sources, readings.select(targets)).run().T


class _Sweep:
    """One chunk of targets on its way back through the layers."""

    def __init__(self, frozen: FrozenMap, sources: Sources, readings: Readings) -> None:
        self.frozen, self.sources, self.readings = frozen, sources, readings
        self.m = int(readings.positions.max()) + 1
        self.edges = torch.zeros(len(sources), len(readings), dtype=frozen.dtype, device=frozen.device)
        # Gradients at states that skips read, by state.
        self.pending: dict[tuple[int, str], Tensor] = {}
        # Whether every row is at its own position yet.
        self.is_fresh = True

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
        first = len(self.sources.features) + self.frozen.n_layers * self.sources.n_positions
        for position in range(self.m):
            self.edges[first + position] = g[position] @ self.sources.embeddings[position]
        self._meet_bias(g, self.sources.start)
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
            fresh = g[positions, rows]
            if bool(fresh.any()):
                step.attend_from_transposed(fresh, positions, out)
                self.is_fresh = False
        else:
            step.attend_transposed(g, out)

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
        writing = self.sources.writing(layer)
        # They are sorted by position.
        n = int((self.sources.position[writing] < self.m).sum())
        for part in blocks(torch.arange(n, device=writing.device), g.shape[-1]):
            nodes, vectors = writing[part], self.sources.written(layer, part)
            for position, here in by_position(self.sources.position[nodes]):
                self.edges[nodes[here]] += vectors[here] @ g[position].T

    def _meet_bias(self, g: Tensor, constant: Tensor) -> None:
        self.edges[self.sources.bias] += torch.einsum("ptd,pd->t", g, constant[: self.m])


CHUNK_ELEMENTS = 2**20
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
    lasts, positions, stop = readings.last[order].tolist(), readings.positions[order].tolist(), 0
    while stop < len(order):
        first = stop
        most = first + max(1, elements // max((positions[first] + 1) * d_model, n_sources))
        while stop < min(most, len(order)) and lasts[stop] == lasts[first]:
            stop += 1
        yield order[first:stop]
