"""Edges by pulling: the gradient of targets is carried back, and met by what sources wrote.

The same map as in `push`, transposed: one sweep a chunk of targets. A chunk holds targets whose last reading is of the
same state, at neighbouring positions: the layers and positions after are left out. As in `push`, the first attention on
the way costs next to nothing, the second little, and what the last one takes back to its values need not be written
into the residual stream: what sources wrote is carried through its value map instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from clt_plugin.attribution.engine._vectors import Vectors, cut
from clt_plugin.attribution.engine.linear import FrozenLayer, FrozenMap, Spread
from clt_plugin.attribution.engine.readings import Readings
from clt_plugin.attribution.engine.sources import Sources


def pull(frozen: FrozenMap, sources: Sources, readings: Readings, targets: Tensor) -> Tensor:
    """Return the edges from all sources to some targets, (n, S).

    Args:
        frozen: The map.
        sources: The sources.
        readings: The targets.
        targets: Numbers of targets whose last reading is of one state, by position, (n,).
    """
    return Pull(frozen, sources, readings, bias=True)(targets)


class Pull:
    """Pulls chunks of targets.

    Args:
        frozen: The map.
        sources: The sources.
        readings: The targets.
        embeddings: Whether to find the edges from embeddings. They are few and first, so that all else asks for one
            layer less, and pushing them may cost less than that.
        bias: Whether to find the edges from the bias too, which meets every layer at every position.
    """

    def __init__(
        self, frozen: FrozenMap, sources: Sources, readings: Readings, *, embeddings: bool = True, bias: bool = False
    ) -> None:
        self.frozen, self.sources, self.readings = frozen, sources, readings
        self.embeddings, self.bias = embeddings or bias, bias
        n, at = sources.n_writing, torch.arange(sources.n_positions, device=frozen.device)
        self.embedded = Vectors(n + at, at, sources.embeddings)
        self.n_sources = len(sources) if bias else n + self.embeddings * len(at)
        # The last attention that is needed: sources other than embeddings write after the first.
        self.end = 0 if self.embeddings else 1
        self._behind: list[Vectors] | None = None
        self.order = torch.cat((sources.places, torch.arange(n, self.n_sources, device=frozen.device)))

    def __call__(self, targets: Tensor) -> Tensor:
        """Return the edges to some targets, from features and errors, then embeddings, then the bias, (n, sources).

        Args:
            targets: Their numbers, (n,): their last readings are of one state, and they are in order of position.
        """
        return _Sweep(self, self.readings.select(targets)).run().index_select(1, self.order)

    def behind(self) -> Iterable[Vectors]:
        """Return what the last attention's values meet: what was written before it, carried through its value map."""
        if self._behind is not None:
            return self._behind
        weight, norm = self.frozen.layers[self.end].W_V.flatten(1).T, self.sources.norms[0]
        if self.end == 0:
            parts: Iterable[Vectors] = (self.embedded,)
        elif norm is None:
            parts = self.sources.written(0)
        else:
            parts = (replace(one, vectors=norm.at(one.vectors, one.positions)) for one in self.sources.written(0))
        found = (one.behind(weight) for one in parts)
        if not self.sources.keeps_vectors:
            return found
        self._behind = list(found)
        return self._behind


class _Sweep:
    """One chunk of targets on its way back through the layers."""

    def __init__(self, pull: Pull, readings: Readings) -> None:
        self.pull, self.frozen, self.sources, self.readings = pull, pull.frozen, pull.sources, readings
        positions = readings.positions
        self.m = int(positions[-1]) + 1
        self.rows = torch.arange(len(readings), device=positions.device)
        # Rows are 0 at positions after their own.
        befores = torch.searchsorted(positions, torch.arange(self.m, device=positions.device)).tolist()
        self.reach = [slice(before, len(readings)) for before in befores]
        self.edges = readings.values.new_zeros(len(readings), pull.n_sources)
        # Gradients at states that skips read, by state.
        self.pending: dict[tuple[int, str], Tensor] = {}
        # Whether every row is at its own position yet.
        self.is_fresh = True
        # What each row reads, (rows, d), and what the first attention made of it; where that is all there is.
        self.is_plain = len(readings.readings) == 1 and not any(self.sources.skips)
        self.own: Tensor | None = None
        self.spread: Spread | None = None
        # The gradient at the last attention's values.
        self.values: Tensor | None = None

    def run(self) -> Tensor:
        """Sweep; return the edges, (n, sources), features and errors as in `Sources.order`."""
        shape, end = (self.m, len(self.readings), self.frozen.d_model), self.pull.end
        g = torch.zeros(shape, dtype=self.frozen.dtype, device=self.frozen.device)
        for layer in reversed(range(end, int(self.readings.last_layer[0]) + 1)):
            self._inject(layer, "resid_post", g)
            self._meet(layer, g)
            if not self.frozen.parallel:
                self._inject(layer, "resid_mid", g)
            attended = g.clone() if self._reads(layer, "attn_out") else g
            self._inject(layer, "attn_out", attended)
            self._attend(layer, attended, g)
            self._inject(layer, "resid_pre", g)
        if end:
            self._inject(0, "resid_post", g)
            self._meet(0, g)
        else:
            self._see(self.pull.embedded, g)
        if self.values is not None:
            for vectors in self.pull.behind():
                self._see(vectors, self.values)
        if self.pull.bias:
            self._meet_bias(g, self.sources.start)
            self.edges[:, -1] += self.readings.constants
        return self.edges

    def _see(self, vectors: Vectors, g: Tensor) -> None:
        vectors.meet(g, 0, self.reach, self.edges.T)

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
            fresh, own = g[positions, self.rows], out[positions, self.rows]
            if bool(fresh.any()):
                self.spread, self.own = step.attend_from_transposed(fresh, positions, out), own
                self.is_fresh = False
            return
        spread, self.spread = self.spread, None
        # Few vectors, where that is fewer than there are positions.
        is_simple = spread is not None and self.is_plain and self.m > len(step.W_O) + 1
        is_last = layer == self.pull.end and not self.pull.bias
        if not is_last and not is_simple:
            step.attend_transposed(g, out)
            return
        values = step.unmix(self._mixed(step, spread) if spread and is_simple else step.put_out_transposed(g))
        if is_last:
            self.values = values
        else:
            step.take_in(values, out)

    def _mixed(self, step: FrozenLayer, spread: Spread) -> Tensor:
        """Return the gradient at heads' outputs behind a single attention, found from few vectors."""
        assert self.own is not None
        n_heads, d_head, _ = step.W_O.shape
        mixed = self.own.new_zeros(n_heads, self.m, len(self.own), d_head)
        heads = step.put_out_transposed(spread.heads)
        for _, rows, share in spread.shares:
            into = mixed[:, : len(share), rows].flatten(2)
            into.baddbmm_(share.expand(n_heads, -1, -1), heads[:, :, rows].flatten(2))
        mixed[:, self.readings.positions, self.rows] += step.put_out_transposed(self.own)
        return mixed

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
            self._see(vectors, g)

    def _meet_bias(self, g: Tensor, constant: Tensor) -> None:
        if self.pull.bias:
            self.edges[:, -1] += torch.einsum("ptd,pd->t", g, constant[: self.m])


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
    lasts, positions = readings.last[order].tolist(), readings.positions[order].tolist()
    start = 0
    for _, run in groupby(lasts):
        stop = start + len(list(run))
        # A target's edges count as much as its gradient.
        for part in cut([1 + at for at in positions[start:stop]], elements, d_model, n_sources):
            # By position, and there ascending, so that the edges of many follow one another.
            these = order[start + part.start : start + part.stop].sort().values
            yield these[torch.argsort(readings.positions[these], stable=True)]
        start = stop
