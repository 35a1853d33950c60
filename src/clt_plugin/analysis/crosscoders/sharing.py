"""Shared and exclusive latents, by how their decoder norm is divided between two models, or between a layer's sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from clt_plugin.adapters._run import group_labels
from clt_plugin.core import Crosscoder, Site, WiringError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

EXCLUSIVE, SHARED = 0.1, (0.4, 0.6)
"""Relative norms below `EXCLUSIVE`, or above 1 less it, are of one side alone; those within `SHARED` of both alike."""


def relative_norm(norms_a: Tensor, norms_b: Tensor) -> Tensor:
    """Return ``0.5 (1 + (|d_b| - |d_a|) / max(|d_a|, |d_b|))``: 0 for latents of a alone, 1 for b alone, (F,).

    A latent without any norm has 0.5 by this formula; its norms say that it is dead.
    """
    largest = torch.maximum(norms_a, norms_b)
    return 0.5 * (1 + (norms_b - norms_a) / largest.clamp(min=torch.finfo(largest.dtype).tiny))


@dataclass(frozen=True, eq=False)
class Sharing:
    """How latents divide between what they write.

    Attributes:
        names: What they write: the models, or the sites.
        shares: For each group's label, each latent's share of norm by name, (F, len(names)); rows sum to 1.
        norms: The norms themselves, likewise.
        cosines: For each group's label, the cosine between the first two names' decoder vectors, (F,); None where they
            differ in width.
    """

    names: tuple[str, ...]
    shares: Mapping[str, Tensor]
    norms: Mapping[str, Tensor]
    cosines: Mapping[str, Tensor] | None

    def relative(self, group: str) -> Tensor:
        """Return the relative norm of a group's latents between the first two names, (F,)."""
        norms = self.norms[group]
        return relative_norm(norms[:, 0], norms[:, 1])

    def classes(self, group: str) -> list[str]:
        """Say of each latent of a group ``"only NAME"``, ``"shared"``, or ``"between"``; ``"dead"`` without norm.

        Of two names by the relative norm. Of more, a latent is of one name alone if that has more than 1 less
        `EXCLUSIVE` of its norm, and shared if none has more than half again its equal share.
        """
        largest, top = self.shares[group].argmax(1), self.shares[group].amax(1)
        if len(self.names) == 2:
            value = self.relative(group)
            only, both = (value < EXCLUSIVE) | (value > 1 - EXCLUSIVE), (value >= SHARED[0]) & (value <= SHARED[1])
        else:
            only, both = top > 1 - EXCLUSIVE, top <= 1.5 / len(self.names)
        about = zip((top == 0).tolist(), only.tolist(), both.tolist(), largest.tolist(), strict=True)
        return [
            "dead" if dead else f"only {self.names[place]}" if alone else "shared" if shared else "between"
            for dead, alone, shared, place in about
        ]

    def latents(self, group: str) -> pd.DataFrame:
        """Return one row for each latent of a group: class, norms, shares, and for two names the relative norm."""
        import pandas

        columns = {f"norm {name}": self.norms[group][:, i].numpy() for i, name in enumerate(self.names)}
        columns |= {f"share {name}": self.shares[group][:, i].numpy() for i, name in enumerate(self.names)}
        if len(self.names) == 2:
            columns["relative_norm"] = self.relative(group).numpy()
        if self.cosines is not None:
            columns["cosine"] = self.cosines[group].numpy()
        return pandas.DataFrame({"class": self.classes(group), **columns})

    @property
    def table(self) -> pd.DataFrame:
        """One row for each class: how many latents, their share, and the mean cosine of their two vectors."""
        import pandas

        every = pandas.concat([self.latents(group) for group in self.norms], ignore_index=True)
        rows = []
        for name in ("dead", *(f"only {each}" for each in self.names), "shared", "between"):
            here = every[every["class"] == name]
            cosine = float(here["cosine"].mean()) if self.cosines is not None and len(here) else float("nan")
            rows.append({"class": name, "latents": len(here), "share": len(here) / len(every), "mean_cosine": cosine})
        return pandas.DataFrame(rows)

    def plot(self) -> Figure:
        """Draw the distribution of relative norms (of two names) or of shares, beside the cosines of shared latents."""
        from clt_plugin.report.crosscoders import plot_sharing

        two = len(self.names) == 2
        values = torch.cat([self.relative(g) if two else self.shares[g].amax(1) for g in self.norms])
        alive = torch.cat([norms.sum(1) > 0 for norms in self.norms.values()])
        cosines = None if self.cosines is None else torch.cat(list(self.cosines.values()))[alive]
        axis = f"0: {self.names[0]} alone, 1: {self.names[1]} alone" if two else "largest share of the norm"
        return plot_sharing(values[alive], cosines, axis)

    def __str__(self) -> str:
        return self.table.to_string(index=False, float_format=lambda value: f"{value:.3f}")


def shared_latents(clt: Crosscoder) -> Sharing:
    """Tell latents that both models use from those of one alone, by relative decoder norm.

    Of two models the measure is ``0.5 (1 + (|d_b| - |d_a|) / max(|d_a|, |d_b|))``; of more, each one's share of the
    norm. In a pre/post-MLP crosscoder, which has one model, the two sides are the sites: a latent of ``mlp_out`` alone
    is **new**, one of both is **maintained** over the MLP, and its cosine says whether its direction is. Groups that
    write a single model's single site are left out.

    Norms alone misjudge latents that training has pushed to one side (see `latent_scaling`). Sources: Lindsey et al.
    2024, "Sparse Crosscoders"; Minder et al. 2025, "Overcoming Sparsity Artifacts in Crosscoders".

    Args:
        clt: A crosscoder whose groups write several models, or two sites or more of one.

    Raises:
        WiringError: No group does; or groups differ in what they write.
    """
    names, norms, shares, cosines = None, {}, {}, {}
    for g, label in enumerate(group_labels(clt.wiring)):
        parts = _parts(clt.wiring.writes[g])
        if len(parts) < 2:
            continue
        if names is not None and tuple(parts) != names:
            raise WiringError(
                f"the groups write different things ({', '.join(names)}; {', '.join(parts)}), so that latents do not "
                "compare: give a crosscoder over several models, or both sides of an MLP; of a CLT see norm_profiles"
            )
        names = tuple(parts)
        rows, slices = clt.decoder_vectors(g).detach().float(), clt.layout.write_slices[g]
        vectors = [torch.cat([rows[:, slices[site]] for site in sites], dim=1) for sites in parts.values()]
        norms[label] = torch.stack([vector.norm(dim=1) for vector in vectors], dim=1).cpu()
        shares[label] = norms[label] / norms[label].sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        if vectors[0].shape == vectors[1].shape:
            cosines[label] = F.cosine_similarity(vectors[0], vectors[1], dim=1).cpu()
    if names is None:
        raise WiringError("no group of this crosscoder writes several models or sites: nothing can be shared")
    return Sharing(names, shares, norms, cosines if len(cosines) == len(norms) else None)


def _parts(sites: Sequence[Site]) -> dict[str, list[Site]]:
    """Return {name: sites} of what is to be told apart: the models, or the sites of one model."""
    several = len({site.model for site in sites}) > 1
    parts: dict[str, list[Site]] = {}
    for site in sites:
        parts.setdefault(site.model if several else str(site), []).append(site)
    return parts
