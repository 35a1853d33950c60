"""A crosscoder against per-layer sparse autoencoders: loss, active latents and cost, and SAE latents clustered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt_plugin.analysis.crosscoders._data import encoded
from clt_plugin.core import Crosscoder, Site, SparseFeatures, WiringError
from clt_plugin.training.reading import as_it_runs
from clt_plugin.training.standard import Moments

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class AgainstSAEs:
    """A crosscoder and per-layer SAEs on the same activations.

    Attributes:
        table: One row each for ``crosscoder``, ``per-layer SAEs`` and ``SAEs, clustered``: ``fvu`` (mean over sites),
            ``l0`` (active latents a token over all sites; of clusters: how many have an active latent), ``latents``
            (or clusters), ``parameters`` of encoders and decoders, and ``flops`` a token of encoding all latents
            densely and decoding the active ones.
        by_site: FVU of each site, crosscoder and SAEs.
        clusters: Each cluster of more than one SAE latent, as (site, latent) pairs.
        threshold: From what cosine of activations on SAE latents of neighbouring sites were joined.
    """

    table: pd.DataFrame
    by_site: pd.DataFrame
    clusters: Sequence[Sequence[tuple[str, int]]]
    threshold: float

    def plot(self) -> Figure:
        """Draw FVU by site, and active latents a token."""
        from clt_plugin.report.crosscoders import plot_against_saes

        return plot_against_saes(self.by_site, self.table)

    def __str__(self) -> str:
        return self.table.to_string(index=False, float_format=lambda value: f"{value:.4g}")


def against_saes(
    clt: Crosscoder,
    saes: Mapping[Site, Crosscoder] | Sequence[Crosscoder],
    activations: Any,
    *,
    threshold: float = 0.7,
    bar: bool | None = None,
) -> AgainstSAEs:
    """Compare a crosscoder with one SAE a site: what each explains, with how many active latents, at what cost.

    A feature that stays in the residual stream takes a latent in every layer's SAE and one in a crosscoder. To tell how
    much of the crosscoder's lower L0 is that, SAE latents are clustered afterwards: those of neighbouring sites whose
    activations have a cosine above `threshold`, and are each other's best match, belong together, and a cluster counts
    once. At equal cost: compare rows of the table with like `parameters`, or like `flops`.
    Source: Lindsey et al. 2024, "Sparse Crosscoders", crosscoders against per-layer SAEs.

    Args:
        clt: A crosscoder that reads and writes the sites, such as ``Wiring.acausal(sites)``.
        saes: One SAE (``Wiring.sae(site)``) for each of its sites.
        activations: ``harvest(model, texts, clt.wiring)``, a cache, or batches {site: (tokens, d)}; read twice.
        threshold: See above. For each pair of neighbours a matrix of their latents' products is held.
        bar: Whether to show progress; by default on a terminal.

    Raises:
        WiringError: An SAE is missing, or is none; or there are no activations.
    """
    sites = clt.wiring.write_sites
    by_site = _by_site(saes, sites)
    whole, parts = _Errors(clt), {site: _Errors(sae) for site, sae in by_site.items()}
    gram = _Gram(by_site)
    for batch, features in encoded(clt, activations, bar):
        whole.add(batch, features)
        found = {site: _encode(sae, batch) for site, sae in by_site.items()}
        for site, sae_features in found.items():
            parts[site].add(batch, sae_features)
        gram.add(found)
    clusters = gram.clusters(threshold)
    active = _Active(by_site, clusters)
    for batch, _ in encoded(clt, activations, bar):
        active.add({site: _encode(sae, batch) for site, sae in by_site.items()})
    fvu = {site: errors.fvu()[site] for site, errors in parts.items()}
    return _result(whole, parts, fvu, clusters, active, threshold)


def _by_site(saes: Any, sites: Sequence[Site]) -> dict[Site, Crosscoder]:
    every = list(saes.values()) if isinstance(saes, Mapping) else list(saes)
    known: dict[Site, Crosscoder] = {}
    for sae in every:
        if sae.wiring.reads != sae.wiring.writes or len(sae.wiring.write_sites) != 1:
            raise WiringError(f"an SAE reads and writes one site, as Wiring.sae(site) does, not {sae.wiring!r}")
        known[sae.wiring.write_sites[0]] = sae
    missing = [str(site) for site in sites if site not in known]
    if missing:
        raise WiringError(f"there is no SAE for {', '.join(missing)}: give one for each site that is compared")
    return {site: known[site] for site in sites}


def _encode(sae: Crosscoder, batch: Mapping[Site, Tensor]) -> SparseFeatures:
    with as_it_runs(sae), torch.no_grad():
        features: SparseFeatures = sae.encode(
            {site: batch[site].to(sae.device) for site in sae.sites.read}, sparse=True
        )
    return features


class _Errors:
    """Squared errors and active latents of one crosscoder."""

    def __init__(self, crosscoder: Crosscoder) -> None:
        self.crosscoder = crosscoder
        self.squares = dict.fromkeys(crosscoder.sites.write, 0.0)
        self.moments = {site: Moments(crosscoder.layout.width[site]) for site in crosscoder.sites.write}
        self.active, self.n_tokens = [0] * crosscoder.wiring.n_groups, 0

    def add(self, batch: Mapping[Site, Tensor], features: SparseFeatures) -> None:
        """Take in a batch."""
        with torch.no_grad():
            decoded = self.crosscoder.decode(features, dict(batch) if self.crosscoder.wiring.skips else None)
        if isinstance(decoded, Tensor):
            decoded = dict(zip(self.crosscoder.sites.write, decoded, strict=True))
        for site, y in decoded.items():
            self.moments[site].update(batch[site])
            self.squares[site] += float((batch[site].to(y.device).double() - y.double()).square().sum())
        self.active = [n + len(g.values) for n, g in zip(self.active, features.groups, strict=True)]
        self.n_tokens += features.shape[0]

    def fvu(self) -> dict[Site, float]:
        """Return the fraction of variance unexplained by site."""
        return {site: self.squares[site] / float(m.deviation.sum()) for site, m in self.moments.items()}

    @property
    def l0(self) -> float:
        """Active latents a token."""
        return sum(self.active) / self.n_tokens

    @property
    def parameters(self) -> int:
        """Numbers in encoders and decoders."""
        return sum(
            size * (self.crosscoder.layout.read_width(g) + self.crosscoder.layout.write_width(g))
            for g, size in enumerate(self.crosscoder.group_sizes)
        )

    @property
    def flops(self) -> float:
        """Multiplications and additions a token: dense encoding, and decoding of the active latents."""
        layout, sizes = self.crosscoder.layout, self.crosscoder.group_sizes
        encoding = sum(2 * size * layout.read_width(g) for g, size in enumerate(sizes))
        decoding = sum(2 * n * layout.write_width(g) for g, n in enumerate(self.active))
        return encoding + decoding / self.n_tokens


class _Gram:
    """Products of activations of SAE latents at neighbouring sites, summed over tokens."""

    def __init__(self, saes: Mapping[Site, Crosscoder]) -> None:
        self.sites = tuple(saes)
        sizes = {site: sae.group_sizes[0] for site, sae in saes.items()}
        self.squares = {site: torch.zeros(size, dtype=torch.float64) for site, size in sizes.items()}
        self.products = {
            (a, b): torch.zeros(sizes[a], sizes[b], dtype=torch.float32)
            for a, b in zip(self.sites, self.sites[1:], strict=False)
        }

    def add(self, found: Mapping[Site, SparseFeatures]) -> None:
        """Take in the latents of a batch."""
        for site, features in found.items():
            group = features.groups[0]
            self.squares[site].index_add_(0, group.latents.cpu(), group.values.double().square().cpu())
        for (a, b), product in self.products.items():
            product += (found[a].dense(0).T @ found[b].dense(0)).float().cpu()

    def clusters(self, threshold: float) -> list[list[tuple[Site, int]]]:
        """Return chains of latents that are each other's best match above a cosine, from site to site."""
        following: dict[tuple[Site, int], tuple[Site, int]] = {}
        for (a, b), product in self.products.items():
            norms = self.squares[a].sqrt()[:, None] * self.squares[b].sqrt()
            cosines = torch.where(norms > 0, product / norms, 0.0)
            best, back = cosines.argmax(1), cosines.argmax(0)
            rows = torch.arange(len(best))
            joined = (back[best] == rows) & (cosines[rows, best] > threshold)
            following |= {(a, i): (b, int(best[i])) for i in joined.nonzero()[:, 0].tolist()}
        begun = [start for start in following if start not in set(following.values())]
        chains = []
        for start in begun:
            chain = [start]
            while chain[-1] in following:
                chain.append(following[chain[-1]])
            chains.append(chain)
        return chains


class _Active:
    """How many clusters have an active latent, token by token; a latent in none is a cluster of its own."""

    def __init__(self, saes: Mapping[Site, Crosscoder], clusters: Sequence[Sequence[tuple[Site, int]]]) -> None:
        self.numbers, self.n_clusters = {}, 0
        for site, sae in saes.items():
            self.numbers[site] = torch.arange(self.n_clusters, self.n_clusters + sae.group_sizes[0])
            self.n_clusters += sae.group_sizes[0]
        for chain in clusters:
            first = int(self.numbers[chain[0][0]][chain[0][1]])
            for site, latent in chain:
                self.numbers[site][latent] = first
        self.n_clusters = len(torch.cat(list(self.numbers.values())).unique())
        self.active = self.n_tokens = 0

    def add(self, found: Mapping[Site, SparseFeatures]) -> None:
        """Take in the latents of a batch."""
        pairs = [
            torch.stack((features.groups[0].tokens.cpu(), self.numbers[site][features.groups[0].latents.cpu()]))
            for site, features in found.items()
        ]
        self.active += torch.cat(pairs, dim=1).unique(dim=1).shape[1]
        self.n_tokens += next(iter(found.values())).shape[0]


def _result(
    whole: _Errors,
    parts: Mapping[Site, _Errors],
    fvu: Mapping[Site, float],
    clusters: Sequence[Sequence[tuple[Site, int]]],
    active: _Active,
    threshold: float,
) -> AgainstSAEs:
    import pandas

    own, n = whole.fvu(), len(parts)
    both = {
        "parameters": sum(errors.parameters for errors in parts.values()),
        "flops": sum(errors.flops for errors in parts.values()),
    }
    latents = sum(errors.crosscoder.group_sizes[0] for errors in parts.values())
    mean = sum(fvu.values()) / n
    rows: list[dict[str, Any]] = [
        {
            "what": "crosscoder",
            "fvu": sum(own.values()) / n,
            "l0": whole.l0,
            "latents": sum(whole.crosscoder.group_sizes),
            "parameters": whole.parameters,
            "flops": whole.flops,
        },
        {"what": "per-layer SAEs", "fvu": mean, "l0": sum(e.l0 for e in parts.values()), "latents": latents, **both},
        {
            "what": "SAEs, clustered",
            "fvu": mean,
            "l0": active.active / active.n_tokens,
            "latents": active.n_clusters,
            **both,
        },
    ]
    names = {str(site): (own[site], fvu[site]) for site in fvu}
    by_site = pandas.DataFrame.from_dict(names, orient="index", columns=["crosscoder", "per-layer SAEs"])
    told = [[(str(site), latent) for site, latent in chain] for chain in clusters]
    return AgainstSAEs(pandas.DataFrame(rows), by_site, told, threshold)
