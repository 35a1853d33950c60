"""What a targeting scan keeps: counts of strengths above the limits, never the strengths themselves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from clt_plugin.analysis.weights._nulls import BINS, PER_OCTAVE, Limits, binned, standardised

TOP = 200
"""So many of the strongest pairs of a vector and a unit are kept."""
COLUMNS = ("standard", "strength", "times", "group", "feature", "target", "layer", "unit")
"""What is kept of them: standardised strength, strength with its sign, that over the limit, and who they are."""


@dataclass(frozen=True, eq=False)
class Above:
    """Strengths, of which those below the lowest limit of all nulls are no longer looked at.

    Attributes:
        rows: The vectors of those that are left, (m,).
        units: Their units, (m,).
        strengths: They themselves, with their signs, (m,).
        sizes: Their magnitudes, (m,).
        largest: The largest magnitude of each vector, (n,).
        shape: How many vectors and units there are.
    """

    rows: Tensor
    units: Tensor
    strengths: Tensor
    sizes: Tensor
    largest: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, strengths: Tensor, limits: Iterable[Limits]) -> Above:
        """Look at all strengths once, (n, units): that is what a scan costs beside its product."""
        sizes = strengths.abs()
        lowest = torch.stack([each.limit for each in limits]).amin(0)
        mask = (sizes > lowest).flatten()
        # NumPy finds the few that are true six times as fast.
        places = mask.nonzero()[:, 0] if mask.is_cuda else torch.from_numpy(np.flatnonzero(mask.numpy()))
        count = strengths.shape[1]
        found = strengths.flatten()[places]
        shape = (len(strengths), count)
        return cls(places // count, places % count, found, found.abs(), sizes.amax(1), shape)


@dataclass(eq=False)
class Tally:
    """Counts against one null.

    Args:
        group_sizes: How many latents each group has.
        counts: How many units each layer has.

    Attributes:
        hits: For each layer, how many vectors each unit reads above its limit, (units,).
        negative: How many of those with a negative sign, (units,).
        features: For each group, how many units of each layer read a latent's vectors above their limits,
            (n_latents, layers).
        vectors: How many vectors of each group each layer's units have read, (groups, layers).
        seen: Standardised strengths above the limit, by bin.
        expected: How many there would be by chance, by bin.
        largest: How many vectors have their largest standardised strength above what draws' largest exceed by chance.
        naive: How many have a strength above a single unit's limit.
        naive_by_chance: How many would by chance.
        by_chance: How many strengths would be above their limits by chance.
        weights: By target and layer, how many strengths one draw stands for in ``expected``.
        top: The strongest pairs, (n, columns), in float64.
    """

    group_sizes: tuple[int, ...]
    counts: tuple[int, ...]
    hits: list[Tensor] = field(init=False)
    negative: list[Tensor] = field(init=False)
    features: list[Tensor] = field(init=False)
    vectors: Tensor = field(init=False)
    seen: Tensor = field(init=False)
    expected: Tensor = field(init=False)
    top: Tensor = field(init=False)
    largest: int = 0
    naive: int = 0
    naive_by_chance: float = 0.0
    by_chance: float = 0.0
    weights: dict[tuple[int, int], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.hits = [torch.zeros(n, dtype=torch.long) for n in self.counts]
        self.negative = [torch.zeros(n, dtype=torch.long) for n in self.counts]
        self.features = [torch.zeros(n, len(self.counts), dtype=torch.int32) for n in self.group_sizes]
        self.vectors = torch.zeros(len(self.group_sizes), len(self.counts), dtype=torch.long)
        self.seen = torch.zeros(BINS, dtype=torch.long)
        self.expected = torch.zeros(BINS, dtype=torch.float64)
        self.top = torch.zeros(0, len(COLUMNS), dtype=torch.float64)

    @property
    def tests(self) -> int:
        """How many strengths were compared with a limit."""
        return int((self.vectors.sum(0) * torch.tensor(self.counts)).sum())

    def add(self, above: Above, limits: Limits, who: tuple[int, int, int], latents: Tensor) -> None:
        """Compare strengths with limits.

        Args:
            above: The strengths, those that may be above the limits told apart.
            limits: Of the null, for vectors of this target and this layer's units.
            who: The vectors' group, the number of the site that they are written to, and the layer that reads them.
            latents: Which latents' they are, (n,), on the CPU.
        """
        group, target, layer = who
        n, count = above.shape
        passed = above.sizes > limits.limit[above.units]
        rows, units, found = above.rows[passed], above.units[passed], above.strengths[passed]
        standard = standardised(found.abs(), limits.middle[units], limits.limit[units])
        self.vectors[group, layer] += n
        self.hits[layer] += torch.bincount(units, minlength=count).cpu()
        self.negative[layer] += torch.bincount(units[found < 0], minlength=count).cpu()
        per_vector = torch.bincount(rows, minlength=n).cpu()
        self.features[group][latents, layer] += per_vector.to(torch.int32)
        self.seen += binned(standard)
        self.expected += limits.tail * (n / (limits.draws + 1))
        self.weights[target, layer] = self.weights.get((target, layer), 0.0) + n / (limits.draws + 1)
        highest = standard.new_full((n,), -torch.inf).scatter_reduce_(0, rows, standard, "amax")
        self.largest += int((highest > limits.largest).sum())
        self.naive += int((above.largest > limits.naive).sum())
        self.naive_by_chance += n * limits.naive_by_chance
        self.by_chance += n * count * limits.by_chance
        kept = standard.topk(min(TOP, len(standard))).indices
        times = found[kept].abs() / limits.limit[units[kept]]
        self._keep(standard[kept], found[kept], times, latents[rows[kept].cpu()], units[kept], who)

    def _keep(
        self,
        standard: Tensor,
        strength: Tensor,
        times: Tensor,
        latents: Tensor,
        units: Tensor,
        who: tuple[int, int, int],
    ) -> None:
        group, target, layer = (torch.full((len(standard),), each) for each in who)
        columns = (standard, strength, times, group, latents, target, layer, units)
        rows = torch.cat([self.top, torch.stack([column.cpu().double() for column in columns], dim=1)])
        self.top = rows[rows[:, 0].topk(min(TOP, len(rows))).indices]

    def rates(self) -> tuple[Tensor, Tensor]:
        """Return for each bin how many strengths reach it, and what share of these chance would give, (bins,) each.

        The share is the q-value of Benjamini and Hochberg at the bin's lower edge: the expected number over the number
        found, the smallest of it and of those at lower edges.
        """
        found = self.seen.flip(0).cumsum(0).flip(0)
        # One draw more than there was: nothing is rarer than the rarest draw.
        chance = self.expected.flip(0).cumsum(0).flip(0) + max(self.weights.values(), default=0.0)
        rate = torch.where(found > 0, chance / found.clamp_min(1), torch.inf)
        return found, rate.cummin(0).values.clamp_max(1)

    def discoveries(self, rate: float) -> int:
        """Return how many strengths are significant at a false-discovery rate (Benjamini and Hochberg 1995)."""
        found, rates = self.rates()
        passed = (rates <= rate).nonzero()
        return int(found[passed[0, 0]]) if len(passed) else 0

    def q_values(self, standard: Tensor) -> Tensor:
        """Return the q-values of standardised strengths of 1 and more, (n,)."""
        places = (standard.clamp_min(1).log2() * PER_OCTAVE).long().clamp_max(BINS - 1)
        return self.rates()[1][places]


def resampled(features: Tensor, replicates: int, chance: torch.Generator) -> Tensor:
    """Return sums over features drawn with replacement, (replicates, columns), in float64.

    Args:
        features: (n_features, columns); a feature's vectors go together.
        replicates: How many times.
        chance: Where randomness comes from.
    """
    n, columns = len(features), features.double()
    draws = (torch.randint(n, (n,), generator=chance) for _ in range(replicates))
    return torch.stack([torch.bincount(each, minlength=n).double() @ columns for each in draws])
