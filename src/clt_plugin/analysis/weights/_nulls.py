"""What targeting is compared with: directions drawn in six ways, and what heads or neurons make of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clt_plugin.analysis.weights._blocks import read_block
from clt_plugin.analysis.weights._readers import Units
from clt_plugin.core.crosscoder import Crosscoder
from clt_plugin.core.wiring import Site, Wiring

NULLS = ("isotropic", "norm", "covariance", "shuffled", "untrained", "base")
"""The nulls by name, see `clt_plugin.analysis.weights.attention_targeting`."""
SAMPLE = 2048
"""So many vectors of each target are held, from which covariances are taken and shuffled vectors are drawn."""
LEVEL = 0.99
FEWEST = 199
"""With fewer draws a 99th percentile is hardly one."""


@dataclass(frozen=True, eq=False)
class Bank:
    """A sample of what is written to each target, brought to length 1.

    Attributes:
        vectors: {target: (n, d)}.
        groups: {target: the group that each comes from, (n,)}.
        scale: The root mean square of the norms that they had.
    """

    vectors: dict[Site, Tensor]
    groups: dict[Site, Tensor]
    scale: float

    @classmethod
    def of(
        cls,
        clt: Crosscoder,
        pairs: dict[int, list[Site]],
        through: Callable[[Site, Tensor], Tensor],
        chance: torch.Generator,
    ) -> Bank:
        """Take about `SAMPLE` vectors of each target, in equal parts from the groups that write it.

        Args:
            clt: The crosscoder.
            pairs: For each group the targets that are scanned.
            through: Takes vectors from where they are written to the residual stream.
            chance: Where randomness comes from.
        """
        writers = {site: sum(site in sites for sites in pairs.values()) for sites in pairs.values() for site in sites}
        vectors: dict[Site, list[Tensor]] = {site: [] for site in writers}
        groups: dict[Site, list[Tensor]] = {site: [] for site in writers}
        squares: list[Tensor] = []
        for g, sites in pairs.items():
            each = {site: min(-(-SAMPLE // writers[site]), clt.group_sizes[g]) for site in sites}
            order = torch.randperm(clt.group_sizes[g], generator=chance)[: max(each.values(), default=0)]
            if not len(order):
                continue
            # Read in the order of the file, then shuffled back, so that the first are a random sample themselves.
            rows, place = order.sort()
            block = read_block(clt, g, rows)
            for site in sites:
                found = through(site, block.vectors[site][place.argsort()][: each[site]])
                norms = found.norm(dim=1)
                squares.append(norms.square().cpu())
                vectors[site].append(found[norms > 0] / norms[norms > 0, None])
                groups[site].append(torch.full((int((norms > 0).sum()),), g))
        total = torch.cat(squares) if squares else torch.zeros(1)
        return cls(
            {site: torch.cat(found) for site, found in vectors.items()},
            {site: torch.cat(found) for site, found in groups.items()},
            float(total.double().mean().sqrt()),
        )


@dataclass(frozen=True, eq=False)
class Limits:
    """What one null has one layer's units read, as numbers to compare with.

    Attributes:
        middle: The median for each unit, (units,).
        limit: The 99th percentile for each unit, (units,): the order statistic that a further draw exceeds with a
            probability of ``by_chance`` exactly.
        by_chance: That probability.
        largest: What the largest of a vector's standardised strengths, ``(s - middle) / (limit - middle)`` over units,
            exceeds with that probability.
        naive: The 99th percentile of all units' strengths together.
        naive_by_chance: How many draws have one unit or more above that: the error of comparing a maximum with a single
            unit's percentile.
        tail: How many standardised strengths of draws lie in each bin of `binned`, (bins,).
        draws: How many draws there were.
    """

    middle: Tensor
    limit: Tensor
    by_chance: float
    largest: float
    naive: float
    naive_by_chance: float
    tail: Tensor
    draws: int

    @classmethod
    def of(cls, strengths: Tensor) -> Limits:
        """Take the limits of what draws are read as, (draws, units), not negative."""
        n = len(strengths)
        above = max(1, int((1 - LEVEL) * (n + 1) + 1e-9))
        # By unit, so that a unit's draws lie side by side.
        columns = strengths.T.contiguous()
        middle = columns[:, :MIDDLE].median(dim=1).values
        best = columns.topk(above + 1, dim=1)
        # A draw is compared with the limit of all others, as a further one is with that of all: for each of those
        # above the limit that is the next one below.
        standard = standardised(best.values[:, :-1], middle[:, None], best.values[:, -1:])
        highest = torch.full((n,), -torch.inf, dtype=columns.dtype, device=columns.device)
        highest.scatter_reduce_(0, best.indices[:, :-1].flatten(), standard.flatten(), "amax")
        every = strengths[: max(1, ENOUGH // strengths.shape[1])].flatten()
        naive = float(every.kthvalue(max(1, round(LEVEL * len(every)))).values)
        return cls(
            middle=middle,
            limit=best.values[:, -2],
            by_chance=above / (n + 1),
            largest=float(highest.topk(above).values[-1]),
            naive=naive,
            naive_by_chance=float((strengths.amax(1) > naive).double().mean()),
            tail=binned(standard),
            draws=n,
        )


ENOUGH, MIDDLE = 2**20, 999
"""So many strengths, and so many draws, are plenty for a percentile of all units, and for a median of each."""
BINS, PER_OCTAVE = 16384, 1024
"""Standardised strengths from 1 to 65,536 are counted in bins of 0.07%."""


def standardised(strengths: Tensor, middle: Tensor, limit: Tensor) -> Tensor:
    """Return ``(s - middle) / (limit - middle)``: 0 at the null's median, 1 at its 99th percentile."""
    return (strengths - middle) / (limit - middle).clamp_min(torch.finfo(strengths.dtype).tiny)


def binned(standard: Tensor) -> Tensor:
    """Count standardised strengths of 1 and more by bin, (bins,)."""
    places = (standard.double().clamp_min(1).log2() * PER_OCTAVE).long().clamp_max(BINS - 1)
    return torch.bincount(places.flatten(), minlength=BINS).cpu()


@dataclass(eq=False)
class Nulls:
    """Draws directions, and keeps what limits they set.

    Args:
        units: The heads or neurons.
        bank: What is written.
        pairs: For each group the targets that are scanned.
        own: The model's own MLP writes by layer, each (d_mlp, d), where a null is made of them.
        draws: How many directions each null draws for each target.
        chance: Where randomness comes from.
    """

    units: Units
    bank: Bank
    pairs: dict[int, list[Site]]
    own: Sequence[Tensor]
    draws: int
    chance: torch.Generator
    _limits: dict[tuple[str, Site | None, int], Limits] = field(default_factory=dict)

    def limits(self, name: str, target: Site, layer: int) -> Limits:
        """Return what a null sets for vectors written at a target, as a layer's units read them."""
        # These know nothing of targets, but for their width.
        key = (name, None if name in ("isotropic", "norm", "untrained") else target, layer)
        if key not in self._limits:
            weight = self.units.weights[layer]
            directions = self.directions(name, target).to(weight)
            self._limits[key] = Limits.of(self.units.strengths(layer, directions).abs())
        return self._limits[key]

    def can_draw(self, name: str) -> str | None:
        """Say why a null cannot be drawn, or None."""
        if name == "shuffled" and any(len(self._others(site)) < FEWEST for site in self._targets()):
            return "sources write too few other targets"
        if name == "base" and any(len(self.own[site.layer]) < FEWEST for site in self._targets()):
            return f"the model has fewer than {FEWEST} neurons a layer"
        return None

    def directions(self, name: str, target: Site) -> Tensor:
        """Draw directions of length 1, (n, d): as many as asked for, or as there are."""
        d = self.bank.vectors[target].shape[1]
        if name in ("isotropic", "norm"):
            found = torch.randn(self.draws, d, generator=self.chance)
        elif name == "untrained":
            found = self._untrained(d)
        elif name == "covariance":
            found = self._gaussian(self.bank.vectors[target])
        else:
            pool = self._others(target) if name == "shuffled" else self.own[target.layer]
            found = pool[torch.randperm(len(pool), generator=self.chance)[: self.draws].to(pool.device)]
        return torch.nn.functional.normalize(found, dim=1)

    def _gaussian(self, sample: Tensor) -> Tensor:
        """Draw from the normal distribution with a sample's mean and covariance, in its span: no root is needed."""
        mean = sample.mean(0)
        noise = torch.randn(self.draws, len(sample), generator=self.chance).to(sample)
        return mean + noise @ (sample - mean) / max(len(sample) - 1, 1) ** 0.5

    def _untrained(self, d: int) -> Tensor:
        """Draw decoders as a crosscoder is initialised; their scale does not matter here."""
        site = next(iter(self.bank.vectors))
        with torch.random.fork_rng():
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=self.chance)))
            return Crosscoder(Wiring(((site,),), ((site,),)), d, self.draws).W_dec[0].detach()

    def _others(self, target: Site) -> Tensor:
        """Return what the sources of a target write to other targets."""
        sources = torch.tensor([g for g, sites in self.pairs.items() if target in sites])
        parts = [
            vectors[torch.isin(self.bank.groups[site], sources).to(vectors.device)]
            for site, vectors in self.bank.vectors.items()
            if site != target
        ]
        return torch.cat(parts) if parts else self.bank.vectors[target][:0]

    def _targets(self) -> list[Site]:
        return list(self.bank.vectors)


def unit_writes(writes: Tensor, n: int, chance: torch.Generator) -> Tensor:
    """Return directions of what n neurons write, (n, d), or of all; not of those that write nothing."""
    chosen = writes[torch.randperm(len(writes), generator=chance)[:n].to(writes.device)]
    norms = chosen.norm(dim=1)
    return chosen[norms > 0] / norms[norms > 0, None]
