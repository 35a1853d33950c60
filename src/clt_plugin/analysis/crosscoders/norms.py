"""Where latents write: decoder norms over the sites they are written to, and whether their directions rotate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clt_plugin.adapters._run import group_labels
from clt_plugin.core import Crosscoder, Site, WiringError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

STRONG = 0.5
"""A site counts as written by a latent if its norm there is at least this share of the latent's largest."""


@dataclass(frozen=True, eq=False)
class NormProfiles:
    """Decoder norms of every latent over the sites it writes.

    Attributes:
        norms: For each group's label, (F, n_writes), in the order of ``sites``.
        sites: For each group's label, the sites it writes.
        strong: See `norm_profiles`.
    """

    norms: Mapping[str, Tensor]
    sites: Mapping[str, Sequence[Site]]
    strong: float

    def latents(self, group: str) -> pd.DataFrame:
        """Return one row for each latent of a group.

        Its columns: ``peak``, the site of the largest norm, and ``norm`` there; ``span``, the number of sites with at
        least a share ``strong`` of it; ``before`` and ``after``, the norm one site earlier and later than the peak, as
        shares of it (NaN where there is no such site).
        """
        import pandas

        norms, names = self.norms[group], [str(site) for site in self.sites[group]]
        largest, peak = norms.max(1)
        relative = norms / largest.clamp(min=torch.finfo(norms.dtype).tiny)[:, None]
        padded = F.pad(relative, (1, 1), value=float("nan"))
        return pandas.DataFrame(
            {
                "peak": [names[place] for place in peak.tolist()],
                "norm": largest.numpy(),
                "span": ((relative >= self.strong) & (largest > 0)[:, None]).sum(1).numpy(),
                "before": padded.gather(1, peak[:, None])[:, 0].numpy(),
                "after": padded.gather(1, peak[:, None] + 2)[:, 0].numpy(),
            }
        )

    @property
    def decay(self) -> pd.DataFrame:
        """The mean norm, relative to the peak's, by how many sites it lies after the peak (negative: before)."""
        import pandas

        total: dict[int, list[float]] = {}
        for norms in self.norms.values():
            largest, peak = norms.double().max(1)
            alive = largest > 0
            relative = norms[alive].double() / largest[alive, None]
            distance = torch.arange(norms.shape[1]) - peak[alive, None]
            for d in range(1 - norms.shape[1], norms.shape[1]):
                here = relative[distance == d]
                sums = total.setdefault(d, [0.0, 0.0])
                sums[0] += float(here.sum())
                sums[1] += len(here)
        rows = [(d, both[0] / both[1], int(both[1])) for d, both in sorted(total.items()) if both[1]]
        return pandas.DataFrame(rows, columns=["distance", "relative_norm", "latents"])

    @property
    def table(self) -> pd.DataFrame:
        """One row for each group and site: how many latents peak there, the mean norm, the mean span of those."""
        import pandas

        rows = []
        for group, norms in self.norms.items():
            known = self.latents(group)
            for place, site in enumerate(self.sites[group]):
                peaked = known[known["peak"] == str(site)]
                rows.append(
                    {
                        "group": group,
                        "site": str(site),
                        "mean_norm": float(norms[:, place].mean()),
                        "peaks": len(peaked),
                        "share_of_peaks": len(peaked) / len(known),
                        "mean_span": float(peaked["span"].mean()) if len(peaked) else float("nan"),
                    }
                )
        return pandas.DataFrame(rows)

    def plot(self) -> Figure:
        """Draw the largest group's latents, sorted by peak, and how norms decay around the peak."""
        from clt_plugin.report.crosscoders import plot_profiles

        group = max(self.norms, key=lambda label: self.norms[label].shape[1])
        names = [str(site) for site in self.sites[group]]
        return plot_profiles(self.norms[group], names, self.decay, f"decoder norms, group {group}")

    def __str__(self) -> str:
        return self.table.to_string(index=False, float_format=lambda value: f"{value:.3f}")


def norm_profiles(clt: Crosscoder, *, strong: float = STRONG) -> NormProfiles:
    """Measure each latent's decoder norm at every site it writes: where it peaks, how it decays, how far it spans.

    Groups are read one at a time. Source: Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model
    Diffing": most features peak at one layer and decay away from it.

    Args:
        clt: Any crosscoder; groups that write a single site have nothing to compare and are left out.
        strong: From what share of its largest norm on a site counts towards a latent's span.

    Raises:
        WiringError: No group writes more than one site.
    """
    labels = group_labels(clt.wiring)
    several = [g for g, sites in enumerate(clt.wiring.writes) if len(sites) > 1]
    if not several:
        raise WiringError("every group of this crosscoder writes one site alone: there is no profile over sites")
    norms = {labels[g]: clt.decoder_norms(g, "per_write").detach().float().cpu() for g in several}
    return NormProfiles(norms, {labels[g]: clt.wiring.writes[g] for g in several}, strong)


@dataclass(frozen=True, eq=False)
class Rotation:
    """Whether a latent's decoder vectors point in one direction at all the sites it writes.

    Attributes:
        cosines: For each group's label, the mean cosine between the vectors at two sites, (n_writes, n_writes), over
            latents that write both strongly; NaN where none does.
        counts: How many latents that is, likewise.
        consistency: For each latent of each group, its mean cosine over pairs of sites that it writes strongly, (F,);
            NaN where it has one such site.
        sites: For each group's label, the sites it writes.
    """

    cosines: Mapping[str, Tensor]
    counts: Mapping[str, Tensor]
    consistency: Mapping[str, Tensor]
    sites: Mapping[str, Sequence[Site]]

    @property
    def table(self) -> pd.DataFrame:
        """One row for each pair of sites of each group: the mean cosine, and of how many latents."""
        import pandas

        rows: list[dict[str, Any]] = []
        for group, cosines in self.cosines.items():
            for i, one in enumerate(self.sites[group]):
                for j, other in list(enumerate(self.sites[group]))[i + 1 :]:
                    rows.append(
                        {
                            "group": group,
                            "site": str(one),
                            "other": str(other),
                            "mean_cosine": float(cosines[i, j]),
                            "latents": int(self.counts[group][i, j]),
                        }
                    )
        return pandas.DataFrame(rows)

    def rotating(self, k: int = 10) -> pd.DataFrame:
        """Return the k latents that write several sites strongly in the most different directions."""
        import pandas

        rows = [
            (group, latent, value)
            for group, values in self.consistency.items()
            for latent, value in enumerate(values.tolist())
            if value == value
        ]
        found = pandas.DataFrame(rows, columns=["group", "latent", "mean_cosine"])
        return found.sort_values("mean_cosine", kind="stable", ignore_index=True).head(k)

    def plot(self) -> Figure:
        """Draw the mean cosines of the largest group, and how single latents are distributed."""
        from clt_plugin.report.crosscoders import plot_rotation

        group = max(self.cosines, key=lambda label: len(self.cosines[label]))
        names = [str(site) for site in self.sites[group]]
        return plot_rotation(self.cosines[group], names, self.consistency, f"directions over sites, group {group}")

    def __str__(self) -> str:
        return self.table.to_string(index=False, float_format=lambda value: f"{value:.3f}")


def rotation(clt: Crosscoder, *, strong: float = STRONG) -> Rotation:
    """Compare the directions of a latent's decoder vectors at the sites it writes, by their cosines.

    A latent that keeps its magnitude while its cosines are low rotates; random directions would have cosines around 0
    with a spread of 1 / sqrt(d). Source: Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model
    Diffing".

    Args:
        clt: Any crosscoder with a group that writes several sites of one width.
        strong: A site counts for a latent if its norm there is at least this share of its largest.

    Raises:
        WiringError: No group writes several sites of one width.
    """
    labels, cosines, counts, consistency, sites = group_labels(clt.wiring), {}, {}, {}, {}
    for g, written in enumerate(clt.wiring.writes):
        if len(written) < 2 or len({clt.layout.width[site] for site in written}) > 1:
            continue
        means, n, each = _cosines(clt.decoder_view(g).detach().float(), strong)
        label = labels[g]
        cosines[label], counts[label], consistency[label], sites[label] = means, n, each, written
    if not cosines:
        raise WiringError("no group of this crosscoder writes several sites of one width: there are no cosines")
    return Rotation(cosines, counts, consistency, sites)


def _cosines(vectors: Tensor, strong: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean cosines and counts of pairs of sites, (w, w), and each latent's mean, for vectors (F, w, d)."""
    norms = vectors.norm(dim=-1)
    largest = norms.amax(1, keepdim=True)
    counted = (norms >= strong * largest) & (largest > 0)
    unit = F.normalize(vectors, dim=-1) * counted[..., None]
    mask = counted.float()
    n = mask.T @ mask
    means = torch.einsum("fvd,fwd->vw", unit, unit) / n
    # Of a latent's pairs: the square of the sum of its unit vectors has each twice, and each vector's own square.
    own = mask.sum(1)
    each = (unit.sum(1).square().sum(-1) - own) / (own * (own - 1))
    return means.cpu(), n.cpu(), each.masked_fill(own < 2, float("nan")).cpu()
