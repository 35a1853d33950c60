"""Edges by pushing: what sources write is carried forward, and met by what targets read.

One sweep a chunk of sources. A chunk holds sources that first write at the same layer, at neighbouring positions: the
layers and positions before are left out.
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
        nodes: Numbers of sources that first write at one layer, by position, (n,); the bias by itself.
    """
    sweep = _Sweep(frozen, sources, readings, nodes)
    sweep.run()
    return sweep.edges


class _Sweep:
    """One chunk of sources on its way through the layers."""

    def __init__(self, frozen: FrozenMap, sources: Sources, readings: Readings, nodes: Tensor) -> None:
        self.frozen, self.sources, self.readings, self.nodes = frozen, sources, readings, nodes
        self.birth = int(sources.birth[nodes[0]])
        self.is_bias = int(nodes[0]) == sources.bias
        self.start = int(sources.position[nodes[0]])
        # Where each row writes, from the first position on.
        self.at = sources.position[nodes] - self.start
        self.place = torch.full((len(sources),), -1, device=nodes.device)
        self.place[nodes] = torch.arange(len(nodes), device=nodes.device)
        self.edges = torch.zeros(len(readings), len(nodes), dtype=frozen.dtype, device=frozen.device)
        # States that skips read later, and those that they read.
        self.held: dict[tuple[int, str], Tensor] = {}
        self.wanted = {(skip.layer, skip.state) for skip in sources.skips if skip is not None}

    def run(self) -> None:
        """Sweep; the edges are in `edges` then."""
        shape = (self.frozen.n_positions - self.start, len(self.nodes), self.frozen.d_model)
        x = torch.zeros(shape, dtype=self.frozen.dtype, device=self.frozen.device)
        if self.birth >= 0:
            self._write(self.birth, x)
            self._show(self.birth, "resid_post", x)
        elif self.is_bias:
            x[:, 0] = self.sources.start
        else:
            self._add(x, torch.arange(len(self.nodes)), self.sources.embeddings[self.at + self.start])
        for layer in range(self.birth + 1, self.frozen.n_layers):
            self._show(layer, "resid_pre", x)
            x = self._attend(layer, x)
            if not self.frozen.parallel:
                self._show(layer, "resid_mid", x)
            self._write(layer, x)
            self._show(layer, "resid_post", x)
        if self.is_bias:
            self.edges[:, 0] += self.readings.constants

    def _is_seen(self, layer: int, state: str) -> bool:
        return (layer, state) in self.wanted or bool(self.readings.at(layer, state))

    def _show(self, layer: int, state: str, x: Tensor) -> None:
        """Let targets read a state, and keep it where a skip needs it later."""
        if (layer, state) in self.wanted:
            self.held[layer, state] = x.clone()
        for reading in self.readings.at(layer, state):
            if reading.padded is not None:
                vectors, places = reading.padded[0][self.start :], reading.padded[1]
                found = torch.bmm(vectors, x[: len(vectors)].transpose(1, 2)).flatten(0, 1)
                # Targets at earlier positions come first, and get nothing.
                late = int((reading.positions < self.start).sum())
                self.edges.index_add_(0, reading.rows[late:], found[places[late:] - self.start * vectors.shape[1]])
                continue
            for position, here, targets in reading.places:
                if position >= self.start:
                    self.edges[targets] += reading.vectors[here] @ x[position - self.start].T

    def _attend(self, layer: int, x: Tensor) -> Tensor:
        """Return a state with what attention carries over."""
        step, seen = self.frozen.layers[layer], self._is_seen(layer, "attn_out")
        # In place, where nothing asks for what attention alone puts out.
        out = torch.zeros_like(x) if seen else x
        if layer == self.birth + 1 and not self.is_bias:
            # Each row is at one position yet.
            rows = torch.arange(len(self.nodes), device=x.device)
            step.attend_from(x[self.at, rows], self.at, self.start, out)
        else:
            step.attend(x, self.start, out)
        if self.is_bias:
            out[:, 0] += step.constant
        self._show(layer, "attn_out", out)
        return x.add_(out) if seen else out

    def _write(self, layer: int, x: Tensor) -> None:
        """Add what is written at a layer's MLP, in place."""
        rows = self.place[self.sources.writing(layer)]
        here = (rows >= 0).nonzero()[:, 0]
        rows, vectors = rows[here], self.sources.written(layer, here)
        norm, skip = self.sources.norms[layer], self.sources.skips[layer]
        states = ("mlp_out_before_norm", "mlp_out")
        if skip is None and not self.is_bias and not any(self._is_seen(layer, state) for state in states):
            if norm is not None:
                vectors = norm.at(vectors, self.at[rows] + self.start)
            self._add(x, rows, vectors)
            return
        written = self._skipped(skip, x)
        self._add(written, rows, vectors)
        if self.is_bias:
            written[:, 0] += self.sources.constants[layer]
        self._show(layer, states[0], written)
        if norm is not None:
            written = norm.at(written, torch.arange(self.start, self.frozen.n_positions, device=x.device))
            if self.is_bias:
                written[:, 0] += norm.bias
        self._show(layer, states[1], written)
        x += written

    def _add(self, x: Tensor, rows: Tensor, vectors: Tensor) -> None:
        """Add a vector to some rows, each at the row's own position."""
        if len(rows):
            x.view(-1, x.shape[-1]).index_add_(0, self.at[rows] * x.shape[1] + rows.to(x.device), vectors)

    def _skipped(self, skip: Skip | None, x: Tensor) -> Tensor:
        """Return what a skip makes of the state that it reads; nothing of a state before the rows' first write."""
        read = None if skip is None else self.held.get((skip.layer, skip.state))
        return torch.zeros_like(x) if skip is None or read is None else skip(read, self.start)


CHUNK_ELEMENTS = 2**19
"""How many numbers a chunk's state may have: small enough for caches, large enough for matrix products."""


def chunks(sources: Sources, d_model: int, elements: int = CHUNK_ELEMENTS) -> Iterator[Tensor]:
    """Cut the sources into chunks that `push` takes."""
    # Features and errors apart, so that a chunk's numbers are in a row.
    is_feature = torch.arange(len(sources), device=sources.birth.device) < len(sources.features)
    groups = 2 * sources.birth + is_feature
    order = torch.argsort(groups * sources.n_positions + sources.position, stable=True)
    yield order.new_tensor([sources.bias])
    order, stop = order[order != sources.bias], 0
    births, positions = groups[order].tolist(), sources.position[order].tolist()
    while stop < len(order):
        first = stop
        most = first + max(1, elements // ((sources.n_positions - positions[first]) * d_model))
        while stop < min(most, len(order)) and births[stop] == births[first]:
            stop += 1
        yield order[first:stop]
