"""Decoder norms: how much is written where, by which features, how far, and over how many layers.

One pass over the decoders gives the norm of every decoder vector, (latents, written sites) a group; the studies of the
norms are made of it and read no weights again. Source of the measures: "Cross-Layer Connections in Cross-Layer
Transcoders: An Empirical Investigation", experiments 1, 3, 4 and 9.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clt_plugin.adapters._run import group_labels
from clt_plugin.analysis.studies import STUDIES, Study
from clt_plugin.analysis.weights._blocks import blocks, check_one_model
from clt_plugin.core.crosscoder import Crosscoder

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class DecoderNorms:
    """The norm of every decoder vector.

    Attributes:
        norms: For each group, (n_latents, n_writes), in float32 at least.
        labels: What each group is called: its layer's number as a rule.
        sources: The layer at which each group reads last.
        targets: For each group the layers of the sites that it writes.
        sites: For each group the names of those sites.
        name: What the crosscoder is called.
    """

    norms: tuple[Tensor, ...]
    labels: tuple[str, ...]
    sources: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]
    sites: tuple[tuple[str, ...], ...]
    name: str

    @property
    def table(self) -> pd.DataFrame:
        """One row a connection, from a group to a site: ``mean``, ``median`` and ``sum`` of its norms, and their ``n``.

        A connection's mass is the mean norm of its vectors, so that groups of any sizes compare.
        """
        import pandas as pd

        rows = []
        for g, norms in enumerate(self.norms):
            for j, (target, site) in enumerate(zip(self.targets[g], self.sites[g], strict=True)):
                column = norms[:, j].double()
                numbers = (float(column.mean()), float(column.median()), float(column.sum()), len(column))
                rows.append((self.labels[g], self.sources[g], target, site, target - self.sources[g], *numbers))
        names = ["group", "source", "target", "site", "distance", "mean", "median", "sum", "n"]
        return pd.DataFrame(rows, columns=names)

    @property
    def summary(self) -> pd.DataFrame:
        """Same-layer and cross-layer: ``connections``, ``total`` mass, ``share`` of it, ``per_connection``.

        The share alone misleads: a CLT of L layers has L same-layer connections and L (L - 1) / 2 others.
        """
        import pandas as pd

        table = self.table
        cross = table["distance"] != 0
        rows = []
        for kind, chosen in (("same-layer", table[~cross]), ("cross-layer", table[cross])):
            total, n = float(chosen["mean"].sum()), len(chosen)
            share = total / float(table["mean"].sum()) if len(table) and table["mean"].sum() else math.nan
            rows.append((kind, n, total, share, total / n if n else math.nan))
        return pd.DataFrame(rows, columns=["kind", "connections", "total", "share", "per_connection"])

    def same_and_cross(self, group: int) -> tuple[Tensor, Tensor]:
        """Return a group's same-layer norms and the sums of its cross-layer norms, (n_latents,) each, in float64."""
        norms = self.norms[group].double()
        here = torch.tensor([target == self.sources[group] for target in self.targets[group]], device=norms.device)
        return norms[:, here].sum(1), norms[:, ~here].sum(1)

    def plot(self) -> Figure:
        """Draw the mass by source and target, and the two kinds of connection beside each other."""
        from clt_plugin.report.weights import plot_mass

        return plot_mass(self.table, self.summary, self.name)

    def __str__(self) -> str:
        return f"decoder norms of {self.name}\n{self.summary.to_string(index=False)}"

    def __repr__(self) -> str:
        return f"<DecoderNorms of {self.name}: {sum(norms.numel() for norms in self.norms):,} vectors>"


def decoder_norms(clt: Crosscoder, *, bar: bool | None = None) -> DecoderNorms:
    """Measure the norm of every decoder vector: the weight mass by source and target layer.

    The vector of latent i of source layer s at target t is ``W_dec[s][i, t]``; its norm is Euclidean, in the units in
    which the crosscoder writes (experiment 1). Decoders are read once, a block at a time.

    Args:
        clt: A crosscoder over one model, in memory or lazy.
        bar: Whether to show progress; by default on a terminal.

    Raises:
        WiringError: It spans several models.
    """
    check_one_model(clt)
    wiring = clt.wiring
    found: list[list[Tensor]] = [[] for _ in clt.group_sizes]
    for block in blocks(clt, bar, "decoder norms"):
        found[block.group].append(torch.stack([v.norm(dim=1) for v in block.vectors.values()], dim=1).cpu())
    return DecoderNorms(
        norms=tuple(torch.cat(parts) for parts in found),
        labels=group_labels(wiring),
        sources=wiring.home,
        targets=tuple(tuple(site.layer for site in sites) for sites in wiring.writes),
        sites=tuple(tuple(site.name for site in sites) for sites in wiring.writes),
        name=wiring.name,
    )


def norms_of(clt: Crosscoder | DecoderNorms, bar: bool | None) -> DecoderNorms:
    """Return norms that were measured already, or measure them."""
    return clt if isinstance(clt, DecoderNorms) else decoder_norms(clt, bar=bar)


STUDIES.add("decoder-norms", Study(decoder_norms, ("clt",), "decoder norm by source and target layer: weight mass"))
