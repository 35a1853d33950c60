"""Where edges end: what the pre-activations of features, and the targets of a graph, read of the residual stream.

Every target is a linear function of one or more states at one position, and a constant, which is the bias node's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from clt_plugin.attribution.engine._vectors import Vectors
from clt_plugin.attribution.engine.linear import STATES, FrozenMap
from clt_plugin.attribution.engine.sources import ActiveFeatures
from clt_plugin.core.crosscoder import Crosscoder


def order_of(layer: int, state: str) -> int:
    """Return when a forward pass reaches a state: targets that feed others come before those."""
    return layer * len(STATES) + STATES.index(state)


@dataclass(frozen=True, eq=False)
class Reading:
    """What some targets read of one state of one layer.

    Attributes:
        layer: The layer.
        state: Which of its states.
        rows: The numbers of the targets, (n,).
        positions: Where each reads, (n,), ascending.
        vectors: What the state there is multiplied with, norms folded in, (n, d).
    """

    layer: int
    state: str
    rows: Tensor
    positions: Tensor
    vectors: Tensor

    @cached_property
    def placed(self) -> Vectors:
        """The vectors, as what states meet."""
        return Vectors(self.rows, self.positions, self.vectors)

    @property
    def order(self) -> int:
        """When a forward pass reaches it."""
        return order_of(self.layer, self.state)


@dataclass(frozen=True, eq=False)
class Readings:
    """All that some targets read.

    Attributes:
        readings: In the order of a forward pass.
        constants: What each target's value holds whatever is read, (T,).
        values: Each target's value in the recorded run, (T,).
        positions: Where each target reads, (T,).
        last: When a forward pass reaches the last state that each target reads, as `order_of` says, (T,).
    """

    readings: tuple[Reading, ...]
    constants: Tensor
    values: Tensor
    positions: Tensor
    last: Tensor

    def __len__(self) -> int:
        """Return the number of targets."""
        return len(self.values)

    @property
    def last_layer(self) -> Tensor:
        """The last layer of which each target reads, (T,)."""
        return self.last // len(STATES)

    def at(self, layer: int, state: str) -> list[Reading]:
        """Return what is read of one state."""
        return [reading for reading in self.readings if (reading.layer, reading.state) == (layer, state)]

    def select(self, rows: Tensor) -> Readings:
        """Return the readings of some targets, numbered anew in the order given."""
        place = torch.full_like(self.positions, -1)
        place[rows] = torch.arange(len(rows), device=rows.device)
        kept = []
        for reading in self.readings:
            here = place[reading.rows] >= 0
            if bool(here.any()):
                parts = (place[reading.rows[here]], reading.positions[here], reading.vectors[here])
                kept.append(Reading(reading.layer, reading.state, *parts))
        tables = (self.constants[rows], self.values[rows], self.positions[rows], self.last[rows])
        return Readings(tuple(kept), *tables)

    def to(self, device: torch.device) -> Readings:
        """Return the readings on another device."""
        if device == self.values.device:
            return self
        moved = tuple(
            replace(r, rows=r.rows.to(device), positions=r.positions.to(device), vectors=r.vectors.to(device))
            for r in self.readings
        )
        tables = (table.to(device) for table in (self.constants, self.values, self.positions, self.last))
        return Readings(moved, *tables)

    @classmethod
    def join(cls, parts: Iterable[Readings]) -> Readings:
        """Number the targets of several readings one after another."""
        parts = list(parts)
        moved, first = [], 0
        for part in parts:
            moved += [replace(reading, rows=reading.rows + first) for reading in part.readings]
            first += len(part)
        names = ("constants", "values", "positions", "last")
        tables = (torch.cat([getattr(part, name) for part in parts]) for name in names)
        return cls(tuple(sorted(moved, key=lambda reading: reading.order)), *tables)


def of_features(crosscoder: Crosscoder, frozen: FrozenMap, features: ActiveFeatures, nodes: Tensor) -> Readings:
    """Return what the pre-activations of some features read.

    Args:
        crosscoder: The crosscoder.
        frozen: The map.
        features: The table of features.
        nodes: Places in it, ascending, (n,).
    """
    constants = torch.zeros(len(nodes), dtype=frozen.dtype, device=frozen.device)
    last = torch.zeros_like(nodes)
    readings = []
    for g, sites in enumerate(crosscoder.wiring.reads):
        rows = (features.group[nodes] == g).nonzero()[:, 0]
        if not len(rows):
            continue
        used, which = features.latent[nodes[rows]].unique(return_inverse=True)
        asked = used.to(crosscoder.device)
        encoders = crosscoder.encoder_vectors(g, asked).detach().to(frozen.device, frozen.dtype)
        b_enc = crosscoder.b_enc[g].detach()[asked].to(frozen.device, frozen.dtype)
        constants[rows] = b_enc[which]
        last[rows] = max(order_of(*frozen.state(site)[:2]) for site in sites)
        order = torch.argsort(features.position[nodes[rows]], stable=True)
        rows, which = rows[order], which[order]
        positions = features.position[nodes[rows]]
        for site in sites:
            vectors = encoders[:, crosscoder.layout.read_slices[g][site]]
            layer, state, norm = frozen.state(site)
            if norm is not None:
                constants[rows] += (vectors @ norm.bias)[which]
                vectors = norm.transposed(vectors, torch.ones_like(vectors[:, :1]))[which] * norm.scale[0, positions]
            else:
                vectors = vectors[which]
            readings.append(Reading(layer, state, rows, positions, vectors))
    tables = (features.pre_activation[nodes], features.position[nodes], last)
    return Readings(tuple(sorted(readings, key=lambda reading: reading.order)), constants, *tables)
