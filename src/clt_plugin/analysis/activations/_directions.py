"""Cosines of decoder vectors with a direction that each token has, summed over where their features are active."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from clt_plugin.analysis._events import row_products
from clt_plugin.core import Crosscoder, Site
from clt_plugin.core.features import SparseFeatures

BINS = 400
"""Of histograms over cosines from -1 to 1."""

KINDS = ("written", "local", "null")
"""The vector that a feature writes at the site, the one it writes at its own layer, and another feature's."""


@dataclass
class Pair:
    """What is known of one group's writes to one site.

    Attributes:
        sums: By kind, the sum of cosines of each latent, (F,).
        counts: By kind, how many there were, (F,).
        histograms: By kind, how many lie in each of `BINS` bins from -1 to 1.
    """

    n_latents: int
    sums: dict[str, Tensor] = field(init=False)
    counts: dict[str, Tensor] = field(init=False)
    histograms: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.sums = {kind: torch.zeros(self.n_latents, dtype=torch.float64) for kind in KINDS}
        self.counts = {kind: torch.zeros(self.n_latents, dtype=torch.float64) for kind in KINDS}
        self.histograms = {kind: torch.zeros(BINS, dtype=torch.float64) for kind in KINDS}

    def add(self, kind: str, latents: Tensor, cosines: Tensor) -> None:
        """Take in cosines, (n,), of the latents given, (n,)."""
        latents, cosines = latents.cpu(), cosines.double().cpu()
        self.sums[kind].index_add_(0, latents, cosines)
        self.counts[kind].index_add_(0, latents, torch.ones_like(cosines))
        self.histograms[kind] += torch.histc(cosines.clamp(-1, 1), BINS, -1, 1)


class Directions:
    """Sums over tokens for every write of a crosscoder.

    Args:
        crosscoder: Whose.
        seed: Of the null: for each feature that is active in a batch, the vector of another one that is.
    """

    def __init__(self, crosscoder: Crosscoder, seed: int) -> None:
        self.crosscoder = crosscoder
        self.pairs = {
            (group, site): Pair(crosscoder.group_sizes[group])
            for group, sites in enumerate(crosscoder.wiring.writes)
            for site in sites
        }
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, features: SparseFeatures, directions: Mapping[tuple[int, Site], Tensor]) -> None:
        """Take in the features of some tokens, and for each write the direction of each token, (tokens, d)."""
        crosscoder = self.crosscoder
        for group, active in enumerate(features.groups):
            used, place = active.latents.unique(return_inverse=True)
            if not len(used):
                continue
            rows = crosscoder.decoder_vectors(group, used).detach()
            slices = crosscoder.layout.write_slices[group]
            home = crosscoder.wiring.home[group]
            own = next((columns for site, columns in slices.items() if site.layer == home), None)
            other = torch.randperm(len(used), generator=self.generator).to(used.device)
            for site, columns in slices.items():
                pair, unit = self.pairs[group, site], F.normalize(directions[group, site], dim=-1)
                written = F.normalize(rows[:, columns], dim=-1)
                vectors = {"written": written, "null": written[other]}
                if own is not None and rows[:, own].shape == written.shape:
                    vectors["local"] = F.normalize(rows[:, own], dim=-1)
                for kind, vector in vectors.items():
                    # Where there is no direction or nothing is written, there is no angle.
                    there = (vector.abs().amax(-1) > 0)[place] & (unit.abs().amax(-1) > 0)[active.tokens]
                    cosines = row_products(vector, place[there], unit, active.tokens[there])
                    pair.add(kind, active.latents[there], cosines)


def bootstrap(sums: Tensor, counts: Tensor, n: int, seed: int) -> tuple[float, float]:
    """Return a 95% interval of ``sum(sums) / sum(counts)`` over latents drawn anew, by the Poisson bootstrap.

    Args:
        sums: (F,).
        counts: (F,).
        n: How many draws.
        seed: Of the draws.
    """
    seen = counts > 0
    if not bool(seen.any()) or n < 2:
        return float("nan"), float("nan")
    both = torch.stack((sums[seen], counts[seen]), dim=1)
    generator = torch.Generator().manual_seed(seed)
    ratios = []
    for _ in range(n):
        weights = torch.poisson(torch.ones(len(both), dtype=both.dtype), generator=generator)
        total, count = (weights @ both).tolist()
        if count:
            ratios.append(total / count)
    low, high = torch.tensor(ratios, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return low, high
