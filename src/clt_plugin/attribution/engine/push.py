"""Edges by pushing: what sources write is carried forward, and met by what targets read.

One sweep a chunk of sources. A chunk holds sources of one kind that first write at the same layer, at neighbouring
positions: the layers and positions before are left out. Three products are saved besides, none of them by an
approximation. Attention makes of a vector at one position one vector a head, in shares at later positions, so that the
first attention behind a source costs next to nothing, and the next one's values little. And what the last attention
that is read puts out need not be written into the residual stream: the targets are taken back through its output map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise

import torch
from torch import Tensor

from clt_plugin.attribution.engine._vectors import Vectors, cut
from clt_plugin.attribution.engine.linear import FrozenLayer, FrozenMap, Spread
from clt_plugin.attribution.engine.readings import Readings
from clt_plugin.attribution.engine.sources import Skip, Sources


@dataclass(frozen=True, eq=False)
class Chunk:
    """Sources that are pushed together; or the bias, alone.

    Attributes:
        nodes: Their numbers, one after another.
        birth: The first layer at whose MLP they write; -1 for embeddings and the bias.
        group: The features' group; None for other sources.
        places: Positions, ascending, and which of the sources first write there.
    """

    nodes: slice
    birth: int
    group: int | None
    places: Sequence[tuple[int, slice]]

    def __len__(self) -> int:
        """Return the number of sources."""
        return self.nodes.stop - self.nodes.start


class Push:
    """Pushes chunks of sources to targets.

    Args:
        frozen: The map.
        sources: The sources.
        readings: Targets, in one or several tables.
    """

    def __init__(self, frozen: FrozenMap, sources: Sources, readings: Sequence[Readings]) -> None:
        self.frozen, self.sources, self.readings = frozen, sources, readings
        # States that skips read.
        self.wanted = {(skip.layer, skip.state) for skip in sources.skips if skip is not None}
        self.last = max((int(table.last_layer.max()) for table in readings if len(table)), default=-1)
        # By state, the table's number, and what its targets read there; what they read of the last layer, taken back
        # through its attention's output map.
        self.met: dict[tuple[int, str], list[tuple[int, Vectors]]] = {}
        self.met_behind: dict[str, list[tuple[int, Vectors]]] = {}
        for number, table in enumerate(readings):
            for reading in table.readings:
                vectors = reading.placed
                vectors.prepare()
                self.met.setdefault((reading.layer, reading.state), []).append((number, vectors))
                if reading.layer == self.last and reading.state in ("attn_out", "resid_mid", "resid_post"):
                    behind = vectors.behind(frozen.layers[self.last].W_O.flatten(0, 1))
                    behind.prepare()
                    self.met_behind.setdefault(reading.state, []).append((number, behind))

    def __call__(self, chunk: Chunk, edges: Sequence[Tensor]) -> None:
        """Add the edges from a chunk's sources.

        Args:
            chunk: The sources.
            edges: For each table of targets the matrix to add to, (targets, sources of the chunk).
        """
        _Sweep(self, chunk, edges).run()

    def bias(self) -> list[Tensor]:
        """Return the edges from the bias to each table's targets, (targets,)."""
        edges = [table.constants.clone() for table in self.readings]
        bias = self.sources.bias
        self(Chunk(slice(bias, bias + 1), -1, None, [(0, slice(0, 1))]), [column[:, None] for column in edges])
        return edges


class _Sweep:
    """One chunk of sources on its way through the layers."""

    def __init__(self, push: Push, chunk: Chunk, edges: Sequence[Tensor]) -> None:
        self.push, self.chunk, self.edges = push, chunk, edges
        self.frozen, self.sources = push.frozen, push.sources
        self.is_bias = chunk.nodes.start == self.sources.bias
        self.start = chunk.places[0][0]
        # Rows are 0 at positions before their own.
        stops = dict(chunk.places)
        self.reach: list[slice] = []
        for position in range(self.start, self.frozen.n_positions):
            before = self.reach[-1].stop if self.reach else 0
            self.reach.append(slice(0, stops[position].stop if position in stops else before))
        device = self.frozen.device
        # Where each row writes, from the first position on, and its place in a state whose rows follow one another.
        self.at = self.sources.position[chunk.nodes] - self.start
        self.cells = self.at * len(chunk) + torch.arange(len(chunk), device=device)
        # What each row has written at its own position so far, (rows, d), and what the first attention made of it.
        self.own = torch.zeros(len(chunk), self.frozen.d_model, dtype=self.frozen.dtype, device=device)
        self.spread: Spread | None = None
        # The last attention's output, before its output map.
        self.mixed: Tensor | None = None
        # States that skips read later.
        self.held: dict[tuple[int, str], Tensor] = {}

    def run(self) -> None:
        """Sweep, and add to the edges."""
        chunk, shape = self.chunk, (self.frozen.n_positions - self.start, len(self.chunk), self.frozen.d_model)
        x = torch.zeros(shape, dtype=self.frozen.dtype, device=self.frozen.device)
        if chunk.birth >= 0:
            self._write(chunk.birth, x)
            self._show(chunk.birth, "resid_post", x)
        elif self.is_bias:
            x[:, 0] = self.sources.start
        else:
            self.own += self.sources.embeddings[self.at + self.start]
            self._add(x, self.own)
        for layer in range(chunk.birth + 1, self.push.last + 1):
            self._show(layer, "resid_pre", x)
            x = self._attend(layer, x)
            if not self.frozen.parallel:
                self._show(layer, "resid_mid", x)
            self._write(layer, x)
            self._show(layer, "resid_post", x)

    def _is_seen(self, layer: int, *states: str) -> bool:
        return any(where in self.push.wanted or where in self.push.met for where in ((layer, one) for one in states))

    def _show(self, layer: int, state: str, x: Tensor | None) -> None:
        """Let targets read a state, ``x`` and what the last attention put out; keep it where a skip needs it later."""
        if (layer, state) in self.push.wanted:
            assert x is not None
            self.held[layer, state] = x.clone()
        if x is not None:
            for number, vectors in self.push.met.get((layer, state), ()):
                vectors.meet(x, self.start, self.reach, self.edges[number])
        if self.mixed is not None:
            for number, vectors in self.push.met_behind.get(state, ()):
                vectors.meet(self.mixed, self.start, self.reach, self.edges[number])

    def _attend(self, layer: int, x: Tensor) -> Tensor:
        """Return a state with what attention carries over; at the last layer, keep that beside it."""
        step, seen = self.frozen.layers[layer], self._is_seen(layer, "attn_out")
        if self.is_bias:
            out = step.constant[:, None].clone()
            step.attend(x, 0, out)
        elif layer == self.chunk.birth + 1:
            # In place, where nothing asks for what attention alone puts out.
            out = torch.zeros_like(x) if seen else x
            self.spread = step.spread(self.own, self.chunk.places)
            self.spread.add_to(out, self.start)
        else:
            mixed = step.mix(self._values(layer, step, x), self.start)
            if layer == self.push.last and not self.push.wanted:
                self.mixed = mixed
                self._show(layer, "attn_out", None)
                return x
            out = torch.zeros_like(x) if seen else x
            step.put_out(mixed, out)
        self._show(layer, "attn_out", out)
        return x if out is x else x.add_(out)

    def _values(self, layer: int, step: FrozenLayer, x: Tensor) -> Tensor:
        """Return what attention makes values of, for a state behind one attention from few vectors."""
        # Few vectors, where that is fewer than there are positions.
        if layer > self.chunk.birth + 2 or self.push.wanted or len(x) <= len(step.W_O) + 1:
            return step.values(x)
        assert self.spread is not None
        values = x.new_zeros(*x.shape[:2], step.W_V[0].numel())
        replace(self.spread, heads=step.values(self.spread.heads)).add_to(values, self.start)
        values.view(-1, values.shape[-1]).index_add_(0, self.cells, step.values(self.own))
        return values

    def _write(self, layer: int, x: Tensor) -> None:
        """Add what is written at a layer's MLP, in place."""
        vectors, norm, skip = self._written(layer), self.sources.norms[layer], self.sources.skips[layer]
        states = ("mlp_out_before_norm", "mlp_out")
        normed = vectors if vectors is None or norm is None else norm.at(vectors, self.at + self.start)
        if normed is not None:
            self.own += normed
        if skip is None and not self.is_bias and not self._is_seen(layer, *states):
            self._add(x, normed)
            return
        written = self._skipped(skip, x)
        self._add(written, vectors)
        if self.is_bias:
            written[:, 0] += self.sources.constants[layer]
        self._show(layer, states[0], written)
        if norm is not None:
            written = norm.at(written, torch.arange(self.start, self.frozen.n_positions, device=x.device))
            if self.is_bias:
                written[:, 0] += norm.bias
        self._show(layer, states[1], written)
        x += written

    def _written(self, layer: int) -> Tensor | None:
        """Return what the rows write at a layer's MLP, (rows, d), or None."""
        if self.chunk.group is not None:
            return self.sources.of_features(self.chunk.group, layer, self.chunk.nodes)
        return self.sources.errors[layer, self.at + self.start] if layer == self.chunk.birth else None

    def _add(self, x: Tensor, vectors: Tensor | None) -> None:
        """Add a vector to each row at its own position."""
        if vectors is not None:
            x.view(-1, x.shape[-1]).index_add_(0, self.cells, vectors)

    def _skipped(self, skip: Skip | None, x: Tensor) -> Tensor:
        """Return what a skip makes of the state that it reads; nothing of a state before the rows' first write."""
        read = None if skip is None else self.held.get((skip.layer, skip.state))
        return torch.zeros_like(x) if skip is None or read is None else skip(read, self.start)


CHUNK_ELEMENTS = 2**20
"""How many numbers a chunk's state may have: small enough for caches, large enough for matrix products."""


def chunks(
    sources: Sources, d_model: int, only_embeddings: bool = False, *, elements: int = CHUNK_ELEMENTS
) -> Iterator[Chunk]:
    """Cut all sources but the bias into chunks that `Push` takes.

    Args:
        sources: The sources.
        d_model: The width of the residual stream.
        only_embeddings: Whether to leave out all but embeddings.
        elements: How many numbers a chunk's state may have.
    """
    positions, n, n_features = sources.position.tolist(), sources.n_positions, len(sources.features)
    kinds: list[tuple[int, int | None, slice]] = []
    if not only_embeddings:
        kinds += [(min(sources.rows[g].columns), g, nodes) for g, nodes in sources.features.ranges.items()]
        firsts = range(n_features, sources.n_writing, n)
        kinds += [(layer, None, slice(first, first + n)) for layer, first in enumerate(firsts)]
    kinds.append((-1, None, slice(sources.n_writing, sources.n_writing + n)))
    for birth, group, nodes in kinds:
        for part in cut([n - position for position in positions[nodes]], elements, d_model):
            here = slice(nodes.start + part.start, nodes.start + part.stop)
            yield Chunk(here, birth, group, _places(positions[here]))


def _places(positions: Sequence[int]) -> list[tuple[int, slice]]:
    """Return each position of an ascending list, and where it is there."""
    runs = [(position, len(list(run))) for position, run in groupby(positions)]
    stops = [0, *accumulate(count for _, count in runs)]
    return [(position, slice(*ends)) for (position, _), ends in zip(runs, pairwise(stops), strict=True)]
