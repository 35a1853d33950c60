"""What a targeting scan found: tables by null, by layer, by head or neuron."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt_plugin.analysis.weights._tally import COLUMNS, Tally, resampled
from clt_plugin.core.wiring import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

REPLICATES = 200
"""How often features are drawn again for an interval."""


@dataclass(frozen=True, eq=False)
class Targeting:
    """What a targeting scan found.

    Attributes:
        kind: ``"head"`` or ``"neuron"``.
        part: What heads read for, ``"q"``, ``"k"`` or ``"v"``; ``""`` for neurons.
        table: One row a null. ``share`` of all strengths, one for each vector and unit, above the unit's 99th
            percentile under the null, with a 95% interval ``low`` to ``high`` by bootstrap over features; the share
            ``by_chance``. ``share_largest``: of vectors, those whose largest standardised strength is above the 99th
            percentile of draws' largest. ``naive``: of vectors, those whose largest strength is above the percentile
            of single strengths, the document's measure, and what it is ``naive_by_chance``. ``discoveries`` at a
            false-discovery rate over all ``tests``, and their share, ``discovered``.
        fdr: That rate.
        vectors: How many decoder vectors were scanned; those of norm 0 were left out.
        about: What was scanned and how: vectors, readers, whether gains are folded.
        null: The null that plots and tables show unless another is named.
    """

    kind: str
    part: str
    table: pd.DataFrame
    fdr: float
    vectors: int
    about: str
    null: str
    _tallies: dict[str, Tally]
    _labels: tuple[str, ...]
    _sources: tuple[int, ...]
    _sites: tuple[Site, ...]
    _seed: int

    def by_layer(self, null: str | None = None) -> pd.DataFrame:
        """Return one row a layer that reads.

        ``share`` of strengths above their limits with a 95% interval, and ``part``, the layer's part of all that are.
        The part grows with how many vectors a layer is shown: compare shares.
        """
        import pandas as pd

        tally = self._tally(null)
        units = torch.tensor(tally.counts)
        tests = tally.vectors.sum(0) * units
        hits = torch.stack([each.sum() for each in tally.hits])
        sums = bootstrap(tally, self._seed)
        read = tests > 0
        low, high = interval(sums[:, read] / tests[read])
        return pd.DataFrame(
            {
                "layer": read.nonzero()[:, 0].tolist(),
                "tests": tests[read].tolist(),
                "hits": hits[read].tolist(),
                "share": (hits[read] / tests[read]).tolist(),
                "low": low.tolist(),
                "high": high.tolist(),
                "part": (hits[read] / hits.sum().clamp_min(1)).tolist(),
            }
        )

    def by_unit(self, null: str | None = None, k: int | None = None) -> pd.DataFrame:
        """Return one row a head, or neuron, those that most vectors point at first: hubs.

        ``hits`` of its ``tests``, their ``share`` with a 95% interval by bootstrap over vectors, ``by_chance`` how many
        hits there would be, and of neurons ``negative``, the share of hits with a negative product: suppression.

        Args:
            null: Against which null.
            k: How many at most.
        """
        import numpy as np
        import pandas as pd

        tally = self._tally(null)
        tests = tally.vectors.sum(0).repeat_interleave(torch.tensor(tally.counts))
        layers = torch.arange(len(tally.counts)).repeat_interleave(torch.tensor(tally.counts))
        units = torch.cat([torch.arange(n) for n in tally.counts])
        hits, negative = torch.cat(tally.hits), torch.cat(tally.negative)
        order = hits.argsort(descending=True, stable=True)
        order = order[tests[order] > 0][:k]
        n, share = tests[order].numpy(), (hits[order] / tests[order]).numpy()
        draws = np.random.default_rng(self._seed).binomial(n, share, (REPLICATES, len(n))) / n
        low, high = np.percentile(draws, [2.5, 97.5], axis=0)
        columns: dict[str, Any] = {"layer": layers[order].tolist(), self.kind: units[order].tolist(), "tests": n}
        columns |= {"hits": hits[order].tolist(), "share": share, "low": low, "high": high}
        columns["by_chance"] = n * tally.by_chance / max(tally.tests, 1)
        if self.kind == "neuron":
            columns["negative"] = (negative[order] / hits[order].clamp_min(1)).tolist()
        return pd.DataFrame(columns)

    def top(self, null: str | None = None, k: int = 20) -> pd.DataFrame:
        """Return the strongest pairs of a decoder vector and a unit, by standardised strength.

        Columns: ``source`` and ``feature``, ``target`` (the layer written), ``layer`` and head or neuron, ``strength``
        (of the vector at length 1; of neurons the cosine), ``times`` the 99th percentile, ``standard`` (0 at the null's
        median, 1 at its 99th percentile), and ``q``, its q-value over all tests.

        Args:
            null: Against which null.
            k: How many; 200 are kept.
        """
        import pandas as pd

        tally = self._tally(null)
        top = dict(zip(COLUMNS, tally.top[:k].T, strict=True))
        groups, sites = top["group"].long().tolist(), top["target"].long().tolist()
        return pd.DataFrame(
            {
                "group": [self._labels[g] for g in groups],
                "source": [self._sources[g] for g in groups],
                "feature": top["feature"].long().tolist(),
                "target": [self._sites[i].layer for i in sites],
                "layer": top["layer"].long().tolist(),
                self.kind: top["unit"].long().tolist(),
                "strength": top["strength"].tolist(),
                "times": top["times"].tolist(),
                "standard": top["standard"].tolist(),
                "q": tally.q_values(top["standard"]).tolist(),
            }
        )

    def negative(self, null: str | None = None) -> float:
        """Return the share of strengths above their limits that are negative: suppression; NaN for heads."""
        tally = self._tally(null)
        hits = int(torch.cat(tally.hits).sum())
        return int(torch.cat(tally.negative).sum()) / max(hits, 1) if self.kind == "neuron" else float("nan")

    def plot(self, null: str | None = None) -> Figure:
        """Draw shares by null and by layer, and the heads or neurons that most vectors point at."""
        from clt_plugin.report.targeting import plot_targeting

        shown = {name: self.by_layer(name) for name in self._tallies}
        units = self.by_unit(null, None if self.kind == "head" else 20)
        return plot_targeting(self.kind, self.table, shown, units, null or self.null, self.about)

    def _tally(self, null: str | None) -> Tally:
        null = null or self.null
        if null not in self._tallies:
            raise ValueError(f"this scan has the nulls {', '.join(self._tallies)}, not {null!r}")
        return self._tallies[null]

    def __str__(self) -> str:
        return f"{self.about}; {self.vectors:,} vectors\n{self.table.to_string(index=False)}"

    def __repr__(self) -> str:
        return f"<Targeting of {self.kind}s: {self.vectors:,} vectors, nulls {', '.join(self._tallies)}>"


def bootstrap(tally: Tally, seed: int) -> Tensor:
    """Return hits by layer with features drawn again, group by group, (replicates, layers)."""
    chance = torch.Generator().manual_seed(seed)
    return torch.stack([resampled(each, REPLICATES, chance) for each in tally.features]).sum(0)


def interval(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 95% interval of samples, (replicates, ...), over replicates."""
    low, high = samples.quantile(torch.tensor([0.025, 0.975], dtype=samples.dtype), dim=0)
    return low, high
