"""Edges by pulling: the gradient of each target is carried back, and met by what sources wrote.

The same map as in `push`, transposed: one backward sweep a chunk of targets, without positions after their last, in
which a target joins at the last layer that it reads.
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
        targets: Numbers of targets, (n,).
    """
    order = torch.argsort(readings.last[targets], descending=True, stable=True)
    edges = _Sweep(frozen, sources, readings.select(targets[order])).run()
    return edges[:, torch.argsort(order)].T


class _Sweep:
    """One chunk of targets on its way back through the layers.

    Rows of the gradient are targets in the order of their last reading, the latest first, so that those on their way
    are a prefix.
    """

    def __init__(self, frozen: FrozenMap, sources: Sources, readings: Readings) -> None:
        self.frozen, self.sources, self.readings = frozen, sources, readings
        self.lasts = readings.last.tolist()
        self.m = int(readings.positions.max()) + 1
        self.edges = torch.zeros(len(sources), len(readings), dtype=frozen.dtype, device=frozen.device)
        # Gradients at states that skips read, by state.
        self.pending: dict[tuple[int, str], Tensor] = {}

    def run(self) -> Tensor:
        """Sweep; return the edges, (S, n)."""
        shape = (self.m, 0, self.frozen.d_model)
        g = torch.zeros(shape, dtype=self.frozen.dtype, device=self.frozen.device)
        for layer in reversed(range(self.frozen.n_layers)):
            step = self.frozen.layers[layer]
            g = self._grown(layer, g)
            self._inject(layer, "resid_post", g)
            self._meet(layer, g)
            if not self.frozen.parallel:
                self._inject(layer, "resid_mid", g)
            attended = g.clone() if self._reads(layer, "attn_out") else g
            self._inject(layer, "attn_out", attended)
            self._meet_bias(attended, step.constant)
            step.attend_transposed(attended, out=g)
            self._inject(layer, "resid_pre", g)
        first = len(self.sources.features) + self.frozen.n_layers * self.sources.n_positions
        for position in range(self.m):
            self.edges[first + position, : g.shape[1]] = g[position] @ self.sources.embeddings[position]
        self._meet_bias(g, self.sources.start)
        self.edges[self.sources.bias] += self.readings.constants
        return self.edges

    def _grown(self, layer: int, g: Tensor) -> Tensor:
        """Take in the targets whose last reading is of this layer."""
        n = sum(last >= layer for last in self.lasts)
        return torch.cat((g, g.new_zeros(self.m, n - g.shape[1], g.shape[2])), dim=1) if n > g.shape[1] else g

    def _reads(self, layer: int, state: str) -> bool:
        return bool(self.readings.at(layer, state)) or (layer, state) in self.pending

    def _inject(self, layer: int, state: str, g: Tensor) -> None:
        """Add the gradient of what is read of a state."""
        for reading in self.readings.at(layer, state):
            # A target reads a state once, so that no entry meets another.
            g[reading.positions, reading.rows] += reading.vectors
        skipped = self.pending.pop((layer, state), None)
        if skipped is not None:
            g[:, : skipped.shape[1]] += skipped

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
            back, key = skip.transposed(g), (skip.layer, skip.state)
            if key in self.pending:
                back[:, : self.pending[key].shape[1]] += self.pending[key]
            self.pending[key] = back
        writing = self.sources.writing(layer)
        # They are sorted by position.
        n = int((self.sources.position[writing] < self.m).sum())
        for part in blocks(torch.arange(n, device=writing.device), g.shape[-1]):
            nodes, vectors = writing[part], self.sources.written(layer, part)
            for position, here in by_position(self.sources.position[nodes]):
                self.edges[nodes[here], : g.shape[1]] += vectors[here] @ g[position].T

    def _meet_bias(self, g: Tensor, constant: Tensor) -> None:
        self.edges[self.sources.bias, : g.shape[1]] += torch.einsum("ptd,pd->t", g, constant[: self.m])


CHUNK_ELEMENTS = 2**22
"""How many numbers a chunk's gradient may have: small enough for caches, large enough for matrix products."""


def chunks(readings: Readings, d_model: int, elements: int = CHUNK_ELEMENTS) -> Iterator[Tensor]:
    """Cut the targets into chunks of neighbouring positions, the last first."""
    order = torch.argsort(readings.positions, descending=True, stable=True)
    positions, stop = readings.positions[order].tolist(), 0
    while stop < len(order):
        first = stop
        stop = min(first + max(1, elements // ((positions[first] + 1) * d_model)), len(order))
        yield order[first:stop]
