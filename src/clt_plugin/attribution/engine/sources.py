"""Where edges start: active features, errors, embeddings and the bias, and what each writes where.

Every source writes at one position, but for the bias node, which writes at all. What the MLPs wrote in the recorded run
is split exactly: the features' writes, the decoder biases, the affine skips, and errors for the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from clt_plugin.adapters._norms import FrozenNorm
from clt_plugin.adapters._run import group_labels
from clt_plugin.attribution.engine._vectors import Vectors, by_position
from clt_plugin.attribution.engine.linear import FrozenMap, moved
from clt_plugin.core.crosscoder import Crosscoder
from clt_plugin.core.features import SparseGroup
from clt_plugin.core.wiring import MLP_WRITES, Site


@dataclass(frozen=True, eq=False)
class ActiveFeatures:
    """The active features of one prompt, by (layer, group, position, latent).

    Attributes:
        group: Each feature's group of latents, (n,).
        position: Where it is active, (n,).
        latent: Its index in the group, (n,).
        activation: (n,).
        pre_activation: (n,).
        labels: Each group's label.
        home: Each group's layer.
    """

    group: Tensor
    position: Tensor
    latent: Tensor
    activation: Tensor
    pre_activation: Tensor
    labels: tuple[str, ...]
    home: tuple[int, ...]

    @classmethod
    def of(cls, crosscoder: Crosscoder, frozen: FrozenMap, silent: Tensor) -> ActiveFeatures:
        """Encode what was read in the recorded run.

        Args:
            crosscoder: The crosscoder.
            frozen: With the recording of all its sites.
            silent: Positions whose features count as 0, (position,) of bool.
        """
        wiring, reads = crosscoder.wiring, frozen.recording.sites
        inputs = {site: reads[site][0].to(crosscoder.device) for site in wiring.read_sites}
        # Where groups are selected from together they are encoded together, and their pre-activations found again.
        together = crosscoder.encode(inputs, sparse=True).groups if crosscoder.activation.joint else None
        found = []
        for g in sorted(range(wiring.n_groups), key=lambda g: (wiring.home[g], g)):
            h = crosscoder.pre_activations(g, torch.cat([inputs[site] for site in wiring.reads[g]], dim=-1))
            group = SparseGroup.of(crosscoder.activate(g, h)) if together is None else together[g]
            kept = ~silent.to(group.tokens.device)[group.tokens]
            tokens, latents, values = group.tokens[kept], group.latents[kept], group.values[kept]
            found.append((torch.full_like(tokens, g), tokens, latents, values, h[tokens, latents]))
        columns = [torch.cat(parts).to(frozen.device) for parts in zip(*found, strict=True)]
        group, position, latent = columns[:3]
        activation, pre_activation = (column.to(frozen.dtype) for column in columns[3:])
        return cls(group, position, latent, activation, pre_activation, group_labels(wiring), wiring.home)

    def __len__(self) -> int:
        """Return how many features are active."""
        return len(self.group)

    def of_group(self, g: int) -> Tensor:
        """Return the places of a group's features in the table, ascending."""
        return (self.group == g).nonzero()[:, 0]

    @cached_property
    def ranges(self) -> dict[int, slice]:
        """Where each group that has active features has them in the table, in its order."""
        return dict(by_position(self.group))


@dataclass(frozen=True, eq=False)
class Rows:
    """The decoder rows of one group's active features, each row once.

    Attributes:
        rows: (n_unique, sum of the widths written).
        which: Of every node of the table of active features its row, (n,); -1 for those of other groups.
        columns: Which columns belong to each layer that is written.
    """

    rows: Tensor
    which: Tensor
    columns: dict[int, slice]


@dataclass(frozen=True, eq=False)
class Skip:
    """An affine skip: what a layer's MLP site gets from a state of this layer or an earlier one.

    Attributes:
        layer: The layer that is read.
        state: Which of its states.
        weight: The norm in between folded in, (d, d).
        scale: One over the norm's denominators, 0 where no skip acts, (position,).
    """

    layer: int
    state: str
    weight: Tensor
    scale: Tensor

    def __call__(self, x: Tensor, start: int) -> Tensor:
        """Return what it adds for states (m, rows, d) at positions from start on."""
        return (x @ self.weight) * self.scale[start : start + len(x), None, None]

    def transposed(self, g: Tensor) -> Tensor:
        """Return the gradient at what is read, for one at what is written at the first m positions, (m, rows, d)."""
        return (g * self.scale[: len(g), None, None]) @ self.weight.T


@dataclass(frozen=True, eq=False)
class Sources:
    """Every source of edges, numbered: features, errors by (layer, position), embeddings by position, the bias.

    Attributes:
        features: The active features.
        rows: For each group its decoder rows.
        errors: What each layer's MLP wrote beyond the reconstruction, at the written site, (layer, position, d).
        embeddings: (position, d).
        start: What the bias writes into the first residual stream: position embeddings, (position, d).
        constants: What it writes at each layer's MLP site, (layer, position, d): decoder biases, the skips' constants,
            and what the MLPs wrote at positions that are zeroed.
        norms: For each layer the norm between the site that is written and the residual stream, or None.
        skips: For each layer its affine skip, or None.
    """

    features: ActiveFeatures
    rows: dict[int, Rows]
    errors: Tensor
    embeddings: Tensor
    start: Tensor
    constants: Tensor
    norms: tuple[FrozenNorm | None, ...]
    skips: tuple[Skip | None, ...]

    @property
    def n_layers(self) -> int:
        """How many layers there are."""
        return self.errors.shape[0]

    @property
    def n_positions(self) -> int:
        """How many positions the prompt has."""
        return self.errors.shape[1]

    def __len__(self) -> int:
        """Return the number of sources, the bias included."""
        return len(self.features) + (self.n_layers + 1) * self.n_positions + 1

    @property
    def bias(self) -> int:
        """The bias node's number, the last."""
        return len(self) - 1

    @cached_property
    def position(self) -> Tensor:
        """The first position at which each source writes, (S,); 0 for the bias."""
        places = torch.arange(self.n_positions, device=self.errors.device)
        return torch.cat((self.features.position, places.repeat(self.n_layers + 1), places.new_zeros(1)))

    @cached_property
    def birth(self) -> Tensor:
        """The first layer at whose MLP each source writes, (S,); -1 for embeddings and the bias."""
        first = torch.tensor([min(self.rows[g].columns) for g in range(len(self.rows))], dtype=torch.long)
        layers = torch.arange(self.n_layers).repeat_interleave(self.n_positions)
        late = first.to(self.features.group.device)[self.features.group]
        before = layers.new_full((self.n_positions + 1,), -1)
        return torch.cat((late, layers.to(late), before.to(late)))

    @property
    def n_writing(self) -> int:
        """How many sources write at MLPs: features and errors, the first of all."""
        return len(self.features) + self.n_layers * self.n_positions

    @cached_property
    def order(self) -> Tensor:
        """Features and errors by position, and there by the first layer at which they write, (n_writing,).

        So those that write at one layer are neighbours at each position, whose edges are found in one product.
        """
        nodes = torch.arange(self.n_writing, device=self.errors.device)
        key = (self.position[: len(nodes)] * self.n_layers + self.birth[: len(nodes)]) * 2
        return torch.argsort(key + (nodes >= len(self.features)), stable=True)

    @cached_property
    def places(self) -> Tensor:
        """Where each source is in that order, (n_writing,)."""
        return torch.empty_like(self.order).scatter_(0, self.order, torch.arange(len(self.order)).to(self.order))

    def writing(self, layer: int) -> Tensor:
        """Return where in `order` those are that write at a layer's MLP site, (n,); and any between two of them."""
        first = len(self.features) + layer * self.n_positions
        # A layer's error comes last of all that write there, at each position.
        stops = starts = self.places[first : first + self.n_positions]
        for g, nodes in self.features.ranges.items():
            if layer in self.rows[g].columns:
                starts = starts.scatter_reduce(0, self.features.position[nodes], self.places[nodes], "amin")
        counts = stops - starts + 1
        shifts = starts - (counts.cumsum(0) - counts)
        return torch.arange(int(counts.sum()), device=starts.device) + shifts.repeat_interleave(counts)

    def written(self, layer: int) -> Iterable[Vectors]:
        """Return what sources write at a layer's MLP site, by their places in `order`, in parts that are small enough.

        Between them there may be zeros, for sources that write elsewhere.
        """
        if layer in self._written:
            return self._written[layer]
        width = self.errors.shape[-1]
        parts = (self._part(layer, self.order[places], places) for places in blocks(self.writing(layer), width))
        if not self.keeps_vectors:
            return parts
        self._written[layer] = list(parts)
        return self._written[layer]

    def _part(self, layer: int, nodes: Tensor, places: Tensor) -> Vectors:
        return Vectors(places, self.position[nodes], self.vectors(layer, nodes))

    @cached_property
    def keeps_vectors(self) -> bool:
        """Whether what every source writes everywhere is small enough to be kept."""
        entries = sum(len(self.writing(layer)) for layer in range(self.n_layers)) * self.errors.shape[-1]
        return entries * self.errors.element_size() <= KEPT_BYTES

    @cached_property
    def _written(self) -> dict[int, list[Vectors]]:
        return {}

    def of_features(self, g: int, layer: int, nodes: slice) -> Tensor | None:
        """Return what some features of one group write at a layer's MLP site, (n, d), or None if they do not.

        Args:
            g: The group.
            layer: The layer.
            nodes: Their places in the table of active features.
        """
        rows = self.rows[g]
        if layer not in rows.columns:
            return None
        taken = rows.rows[:, rows.columns[layer]][rows.which[nodes]].to(self.errors.dtype)
        return taken.mul_(self.features.activation[nodes, None])

    def vectors(self, layer: int, nodes: Tensor) -> Tensor:
        """Return what some sources write at a layer's MLP site, (n, d): 0 for those that do not write there.

        Args:
            layer: The layer.
            nodes: Numbers of features and errors, (n,).
        """
        out = self.errors.new_zeros(len(nodes), self.errors.shape[-1])
        for g, range_ in self.features.ranges.items():
            rows, here = self.rows[g], ((nodes >= range_.start) & (nodes < range_.stop)).nonzero()[:, 0]
            if layer in rows.columns and len(here):
                taken = rows.rows[:, rows.columns[layer]][rows.which[nodes[here]]].to(out.dtype)
                out[here] = taken.mul_(self.features.activation[nodes[here], None])
        position = nodes - len(self.features) - layer * self.n_positions
        here = ((position >= 0) & (position < self.n_positions)).nonzero()[:, 0]
        out[here] = self.errors[layer, position[here]]
        return out

    def to(self, device: torch.device) -> Sources:
        """Return the sources on another device."""
        if device == self.errors.device:
            return self
        return replace(self, **{each.name: moved(getattr(self, each.name), device) for each in fields(self)})


# ---------------------------------------------------------------- how they are found


def sources_of(crosscoder: Crosscoder, frozen: FrozenMap, excluded: Tensor, zeroed: Tensor) -> Sources:
    """Split a recorded run into sources.

    Args:
        crosscoder: The crosscoder.
        frozen: The map, with the recording of all the crosscoder's sites.
        excluded: Positions at which the crosscoder does not act: all that MLPs wrote there is error, (position,).
        zeroed: Positions whose features and errors count as 0, and whose MLP outputs the bias carries, (position,).
    """
    features = ActiveFeatures.of(crosscoder, frozen, excluded | zeroed)
    written = {site.layer: site for site in crosscoder.wiring.write_sites}
    rows = {g: _rows(crosscoder, features, g) for g in range(crosscoder.wiring.n_groups)}
    recording, n, d = frozen.recording, frozen.n_positions, frozen.d_model
    assert recording.embeddings is not None
    like: dict[str, Any] = {"dtype": frozen.dtype, "device": frozen.device}
    embeddings = recording.embeddings[0].to(**like)
    first = next(site for site in recording.sites if site.name == "resid_pre" and site.layer == 0)
    empty = torch.zeros(frozen.n_layers, n, d, **like)
    skips = _skips(crosscoder, frozen, excluded)
    norms = []
    for layer in range(frozen.n_layers):
        site = written.get(layer)
        norms.append(frozen.layers[layer].mlp_out if site is not None and site.name == MLP_WRITES[0] else None)
    sources = Sources(
        features=features,
        rows=rows,
        errors=empty,
        embeddings=embeddings,
        start=recording.sites[first][0].to(**like) - embeddings,
        constants=empty.clone(),
        norms=tuple(norms),
        skips=tuple(skip for skip, _ in skips),
    )
    for layer in range(frozen.n_layers):
        site = written.get(layer)
        value = (recording.mlp_out[layer] if site is None else recording.sites[site])[0].to(**like)
        sources.constants[layer] = _constant(crosscoder, site, excluded, skips[layer], like)
        rest = value - sources.constants[layer] - feature_writes(sources, layer)
        skip = sources.skips[layer]
        if skip is not None:
            rest = rest - skip(frozen.value(skip.layer, skip.state)[:, None], 0)[:, 0]
        sources.constants[layer, zeroed] += rest[zeroed]
        sources.errors[layer] = rest.masked_fill(zeroed[:, None], 0)
    return sources


def feature_writes(sources: Sources, layer: int) -> Tensor:
    """Return the sum of what features write at a layer's MLP site, (position, d)."""
    total, size = torch.zeros_like(sources.errors[layer]), BLOCK_BYTES // (4 * sources.errors.shape[-1])
    for g, range_ in sources.features.ranges.items():
        for first in range(range_.start, range_.stop, max(1, size)):
            here = slice(first, min(first + max(1, size), range_.stop))
            written = sources.of_features(g, layer, here)
            if written is not None:
                total.index_add_(0, sources.features.position[here], written)
    return total


KEPT_BYTES = 256 * 2**20
"""How large all sources' vectors together may be to be gathered once, and not for each chunk anew."""

BLOCK_BYTES = 64 * 2**20
"""How large a matrix of vectors may be that is gathered at a time."""


def blocks(nodes: Tensor, width: int) -> Sequence[Tensor]:
    """Cut a list of nodes so that the vectors of each part stay within `BLOCK_BYTES`."""
    return nodes.split(max(1, BLOCK_BYTES // (4 * width)))


def _rows(crosscoder: Crosscoder, features: ActiveFeatures, g: int) -> Rows:
    nodes = features.of_group(g)
    used, place = features.latent[nodes].unique(return_inverse=True)
    rows = crosscoder.decoder_vectors(g, used.to(crosscoder.device)).detach().to(features.group.device)
    which = torch.full_like(features.group, -1)
    which[nodes] = place
    slices = crosscoder.layout.write_slices[g]
    return Rows(rows, which, {site.layer: columns for site, columns in slices.items()})


def _constant(
    crosscoder: Crosscoder,
    site: Site | None,
    excluded: Tensor,
    skip: tuple[Skip | None, Tensor | None],
    like: dict[str, Any],
) -> Tensor:
    """Return what a layer's MLP site holds whatever is read, but for errors: (position, d), or 0."""
    if site is None:
        return torch.zeros((), **like)
    bias = crosscoder.bias(site).detach().to(**like)
    if skip[1] is not None:
        bias = bias + skip[1]
    return torch.where(excluded[:, None], 0, bias)


def _skips(
    crosscoder: Crosscoder, frozen: FrozenMap, excluded: Tensor
) -> list[tuple[Skip, Tensor] | tuple[None, None]]:
    """Return each layer's skip and what its norm's bias becomes, (d,)."""
    found: list[tuple[Skip, Tensor] | tuple[None, None]] = [(None, None)] * frozen.n_layers
    for number, (read, write) in enumerate(crosscoder.wiring.skips):
        weight = crosscoder.store.get("W_skip", number).detach().to(frozen.device, frozen.dtype)
        layer, state, norm = frozen.state(read)
        scale = torch.ones(frozen.n_positions, dtype=frozen.dtype, device=frozen.device)
        constant = torch.zeros_like(weight[0])
        if norm is not None:
            scale, constant = norm.scale[0, :, 0], norm.bias @ weight
            weight = norm.transposed(weight.T, torch.ones_like(scale[:1])).T
        found[write.layer] = (Skip(layer, state, weight, scale.masked_fill(excluded, 0)), constant)
    return found
