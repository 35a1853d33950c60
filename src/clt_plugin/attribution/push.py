"""Edges by pushing: each source's writes are carried forward, and met by what targets read.

One forward sweep a chunk of sources. A chunk holds sources that are near each other in position, so that positions
before its first are left out, and a source joins the sweep at the layer where it first writes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from clt_plugin.attribution.linear import FrozenMap
from clt_plugin.attribution.readings import Readings
from clt_plugin.attribution.sources import Skip, Sources


def push(frozen: FrozenMap, sources: Sources, readings: Readings, nodes: Tensor) -> Tensor:
    """Return the edges from some sources to all targets, (T, n).

    Args:
        frozen: The map.
        sources: The sources.
        readings: The targets.
        nodes: Numbers of sources, (n,).
    """
    sweep = _Sweep(frozen, sources, readings, nodes)
    sweep.run()
    return sweep.edges


class _Sweep:
    """One chunk of sources on its way through the layers.

    Rows of the state are sources in the order of their first write, so that those on their way are a prefix.
    """

    def __init__(self, frozen: FrozenMap, sources: Sources, readings: Readings, nodes: Tensor) -> None:
        self.frozen, self.sources, self.readings = frozen, sources, readings
        self.order = torch.argsort(sources.birth[nodes], stable=True)
        self.nodes = nodes[self.order]
        self.births = sources.birth[self.nodes].tolist()
        self.positions = sources.position[self.nodes]
        self.start = int(self.positions.min())
        # The bias is in at most one chunk, always among its first rows.
        biases = (self.nodes == sources.bias).nonzero()[:, 0].tolist()
        self.bias = biases[0] if biases else None
        self.place = torch.full((len(sources),), -1, device=nodes.device)
        self.place[self.nodes] = torch.arange(len(nodes), device=nodes.device)
        self.edges = torch.zeros(len(readings), len(nodes), dtype=frozen.dtype, device=frozen.device)
        self.held: dict[tuple[int, str], Tensor] = {}
        self.wanted = {(skip.layer, skip.state) for skip in sources.skips if skip is not None}

    def run(self) -> None:
        x = self._begin()
        for layer in range(self.frozen.n_layers):
            self._show(layer, "resid_pre", x)
            x = self._attend(layer, x)
            if not self.frozen.parallel:
                self._show(layer, "resid_mid", x)
            x = self._write(layer, x)
            self._show(layer, "resid_post", x)
        if self.bias is not None:
            self.edges[:, self.bias] += self.readings.constants
        # Back to the order asked for.
        self.edges = self.edges[:, torch.argsort(self.order)]

    def _begin(self) -> Tensor:
        """Return the state that enters the first layer: embeddings and the bias."""
        n = self.births.count(-1)
        shape = (self.frozen.n_positions - self.start, n, self.frozen.d_model)
        x = torch.zeros(shape, dtype=self.frozen.dtype, device=self.frozen.device)
        for row in range(n):
            if row == self.bias:
                x[:, row] = self.sources.start[self.start :]
            else:
                position = int(self.positions[row])
                x[position - self.start, row] = self.sources.embeddings[position]
        return x

    def _attend(self, layer: int, x: Tensor) -> Tensor:
        """Add what attention carries over."""
        step, seen = self.frozen.layers[layer], self._is_seen(layer, "attn_out")
        # In place, where nothing asks for what attention alone puts out.
        out = step.attend(x, self.start, None if seen else x)
        if self.bias is not None:
            out[:, self.bias] += step.constant[self.start :]
        self._show(layer, "attn_out", out)
        return x.add_(out) if seen else out

    def _is_seen(self, layer: int, state: str) -> bool:
        return (layer, state) in self.wanted or bool(self.readings.at(layer, state))

    def _show(self, layer: int, state: str, x: Tensor) -> None:
        """Let targets read a state, and keep it where a skip needs it later."""
        if (layer, state) in self.wanted:
            self.held[layer, state] = x.clone()
        rows = x.shape[1]
        for reading in self.readings.at(layer, state) if rows else ():
            for position, here, targets in reading.places:
                if position < self.start:
                    continue
                at = x[position - self.start].T
                if isinstance(targets, slice):
                    self.edges[targets, :rows].addmm_(reading.vectors[here], at)
                else:
                    self.edges[targets, :rows] += reading.vectors[here] @ at

    def _write(self, layer: int, x: Tensor) -> Tensor:
        """Add what is written at a layer's MLP."""
        born = sum(birth <= layer for birth in self.births)
        if born > x.shape[1]:
            x = torch.cat((x, x.new_zeros(len(x), born - x.shape[1], x.shape[2])), dim=1)
        writing = self.sources.writing(layer)
        rows = self.place[writing]
        here = (rows >= 0).nonzero()[:, 0]
        rows, vectors = rows[here], self.sources.written(layer, here)
        positions = self.positions[rows] - self.start
        norm, skip = self.sources.norms[layer], self.sources.skips[layer]
        constants = self.sources.constants[layer, self.start :]
        states = ("mlp_out_before_norm", "mlp_out")
        if skip is None and not any(self._is_seen(layer, state) for state in states):
            if norm is not None:
                vectors = norm.at(vectors, self.positions[rows])
            # Each row writes at one position, so that no entry meets another.
            x[positions, rows] += vectors
            if self.bias is not None:
                if norm is not None:
                    constants = norm.at(constants, self._places()) + norm.bias
                x[:, self.bias] += constants
            return x
        written = self._skipped(skip, x)
        written[positions, rows] += vectors
        if self.bias is not None:
            written[:, self.bias] += constants
        self._show(layer, states[0], written)
        if norm is not None:
            written = norm.at(written, self._places())
            if self.bias is not None:
                written[:, self.bias] += norm.bias
        self._show(layer, states[1], written)
        return x.add_(written)

    def _skipped(self, skip: Skip | None, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        if skip is not None:
            read = self.held[skip.layer, skip.state]
            out[:, : read.shape[1]] = skip(read, self.start)
        return out

    def _places(self) -> Tensor:
        return torch.arange(self.start, self.frozen.n_positions, device=self.frozen.device)


CHUNK_ELEMENTS = 2**22
"""How many numbers a chunk's state may have: small enough for caches, large enough for matrix products."""


def chunks(sources: Sources, d_model: int, elements: int = CHUNK_ELEMENTS) -> Iterator[Tensor]:
    """Cut the sources into chunks of neighbouring positions."""
    order = torch.argsort(sources.position, stable=True)
    positions, stop = sources.position[order].tolist(), 0
    while stop < len(order):
        first = stop
        rows = max(1, elements // ((sources.n_positions - positions[first]) * d_model))
        stop = min(first + rows, len(order))
        yield order[first:stop]
