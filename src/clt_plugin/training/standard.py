"""Standardisation of sites: statistics streamed over all batches, and folded into the weights exactly.

Standardised, a site is ``x' = (x - mean) / scale``, so that all sites count alike in the loss. A crosscoder trained so
is folded before it is saved: it then maps raw activations to raw activations, for every activation function, to
rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clt_plugin.core import Crosscoder, Site, WiringError

SMALLEST_SPREAD = 1e-6
"""A site that varies by less than this, relative to its own root mean square, is taken not to vary at all."""


class Moments:
    """Count, mean and sum of squared deviations of a site's coordinates, in float64, over any number of batches.

    Batches are combined by the formula of Chan, Golub and LeVeque (1979, "Updating formulae and a pairwise algorithm
    for computing sample variances"), which loses nothing where means are large and does not depend on how the tokens
    are cut into batches.

    Attributes:
        count: Tokens seen.
        mean: (d,), float64, on the CPU.
        deviation: Sums of squared deviations from the mean, (d,), float64, on the CPU.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.deviation = torch.zeros(width, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        """Take in a batch, (..., d)."""
        x = x.detach().reshape(-1, x.shape[-1])
        x = x.to(_wide_device(x.device), torch.float64)
        if len(x):
            mean = x.mean(0)
            self._add(len(x), mean.cpu(), (x - mean).square().sum(0).cpu())

    def merge(self, other: Moments) -> None:
        """Take in what another has seen: another process, for instance."""
        if other.count:
            self._add(other.count, other.mean, other.deviation)

    def _add(self, count: int, mean: Tensor, deviation: Tensor) -> None:
        if mean.shape != self.mean.shape:
            raise WiringError(f"the site has width {len(self.mean)}, but activations of width {len(mean)} came")
        both, apart = self.count + count, mean - self.mean
        self.deviation = self.deviation + deviation + apart.square() * (self.count * count / both)
        self.mean = self.mean + apart * (count / both)
        self.count = both

    @property
    def variance(self) -> Tensor:
        """The mean squared deviation of each coordinate, (d,)."""
        return self.deviation / max(self.count, 1)


class Statistics:
    """Moments of every site, streamed: show it batches from everywhere, not the first alone.

    Attributes:
        moments: {site: `Moments`}.
    """

    def __init__(self) -> None:
        self.moments: dict[Site, Moments] = {}

    def update(self, activations: Mapping[Site, Tensor]) -> None:
        """Take in a batch, {site: (..., d_site)}."""
        for site, x in activations.items():
            moments = self.moments.setdefault(site, Moments(x.shape[-1]))
            moments.update(x)
            if not bool(moments.deviation.isfinite().all()):
                raise ValueError(f"an activation of {site} is not finite: leave such tokens out, or harvest in float32")

    def merge(self, other: Statistics) -> None:
        """Take in what another has seen."""
        for site, moments in other.moments.items():
            self.moments.setdefault(site, Moments(len(moments.mean))).merge(moments)

    def standard(self, centred: bool = True, per_coordinate: bool = False, floor: float = 0.1) -> Standard:
        """Return the standardisation of what was seen.

        Args:
            centred: Whether means are taken off, so that the mean square is 1 about the mean; otherwise about 0.
            per_coordinate: Whether each coordinate has its own scale. By default a site has one: a coordinate that
                hardly varies gets no weight that is larger for it.
            floor: The smallest scale a coordinate may have, relative to the scale of its whole site.
        """
        if per_coordinate and not 0 < floor <= 1:
            raise ValueError(f"floor is relative to the site's own scale, above 0 and up to 1, not {floor}")
        return Standard({site: _scaling(site, m, centred, per_coordinate, floor) for site, m in self.moments.items()})


@dataclass(frozen=True, eq=False)
class Scaling:
    """How one site is standardised: ``(x - mean) / scale``.

    Attributes:
        mean: (d,), float64.
        scale: (d,), float64, above 0; the same for every coordinate unless each has its own.
    """

    mean: Tensor
    scale: Tensor

    def standardise(self, x: Tensor) -> Tensor:
        """Return raw activations, (..., d), in standard units, in their own dtype."""
        return (x - self.mean.to(x)) / self.scale.to(x)

    def restore(self, x: Tensor) -> Tensor:
        """Return activations in standard units, (..., d), as raw ones, in their own dtype."""
        return x * self.scale.to(x) + self.mean.to(x)


def _scaling(site: Site, moments: Moments, centred: bool, per_coordinate: bool, floor: float) -> Scaling:
    if moments.count < 2:
        raise ValueError(f"{site} was seen on {moments.count} tokens: statistics need at least 2, and better 10,000")
    second = moments.variance + moments.mean.square()
    square = moments.variance if centred else second
    of_site = square.mean().sqrt()
    if not of_site > SMALLEST_SPREAD * second.mean().sqrt():
        raise ValueError(
            f"{site} does not vary over the {moments.count} tokens seen, so it cannot be standardised: leave it out of "
            "the wiring, or give more tokens"
        )
    scale = square.sqrt().clamp(min=floor * of_site) if per_coordinate else of_site.expand(len(square)).clone()
    return Scaling(moments.mean.clone() if centred else torch.zeros_like(moments.mean), scale)


@dataclass(frozen=True, eq=False)
class Standard:
    """How every site is standardised.

    Attributes:
        sites: {site: `Scaling`}.
    """

    sites: Mapping[Site, Scaling]

    @classmethod
    def of(cls, batches: Iterable[Mapping[Site, Tensor]], **settings: Any) -> Standard:
        """Measure it on batches, {site: (..., d_site)} each; see `Statistics.standard` for the settings."""
        statistics = Statistics()
        for batch in batches:
            statistics.update(batch)
        return statistics.standard(**settings)

    def standardise(self, activations: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
        """Return raw activations, {site: (..., d_site)}, in standard units."""
        return {site: self[site].standardise(x) for site, x in activations.items()}

    def restore(self, activations: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
        """Return activations in standard units, {site: (..., d_site)}, as raw ones."""
        return {site: self[site].restore(x) for site, x in activations.items()}

    def standardised(self, function: Callable[[Tensor], Tensor], read: Site, write: Site) -> Callable[[Tensor], Tensor]:
        """Return a function from one site to another, such as an MLP, as it acts in standard units."""
        return lambda x: self[write].standardise(function(self[read].restore(x)))

    def inverse(self) -> Standard:
        """Return the standardisation that takes this one back."""
        return Standard({site: Scaling(-s.mean / s.scale, 1 / s.scale) for site, s in self.sites.items()})

    def state_dict(self) -> list[dict[str, Any]]:
        """Return it as plain data and tensors, for a checkpoint."""
        return [
            {"site": [site.model, site.name, site.layer], "mean": each.mean, "scale": each.scale}
            for site, each in self.sites.items()
        ]

    @classmethod
    def from_state_dict(cls, state: Iterable[Mapping[str, Any]]) -> Standard:
        """Rebuild it from `state_dict`'s data."""
        return cls({Site(*each["site"]): Scaling(each["mean"], each["scale"]) for each in state})

    def __getitem__(self, site: Site) -> Scaling:
        if site not in self.sites:
            known = ", ".join(str(each) for each in self.sites)
            raise WiringError(f"{site} has no statistics: they were taken of {known}")
        return self.sites[site]


# ---------------------------------------------------------------- folding


@torch.no_grad()
def fold(crosscoder: Crosscoder, standard: Standard, in_place: bool = False) -> Crosscoder:
    """Fold a standardisation into a crosscoder's weights: trained on standard units, it then acts on raw activations.

    Exact for every activation. Pre-activations stay what they are, and with them learnt thresholds. Where latents are
    ranked by decoder norm, folding changes the norms: the scores keep those of before, as `Crosscoder.stored_norms`,
    so that selections and measured thresholds stay too. Computed in float64, and rounded once to the crosscoder's
    dtype.

    Args:
        crosscoder: Acts on standard units. Fold it once.
        standard: Of every site that it reads or writes.
        in_place: Whether to change the crosscoder itself, which saves the memory of a copy.

    Returns:
        The crosscoder that acts on raw activations, on the same device and of the same dtype.
    """
    if in_place and crosscoder.is_lazy:
        raise WiringError("a lazy crosscoder's weights are in files: fold it with in_place=False, or materialize() it")
    folded = crosscoder if in_place else copy.deepcopy(crosscoder)
    wiring, layout = folded.wiring, folded.layout
    wide: dict[str, Any] = {"device": _wide_device(folded.device), "dtype": torch.float64}
    scalings = {
        site: Scaling(standard[site].mean.to(**wide), standard[site].scale.to(**wide))
        for site in (*wiring.read_sites, *wiring.write_sites)
    }
    for site, scaling in scalings.items():
        if scaling.mean.shape != (layout.width[site],):
            raise WiringError(f"{site} has width {layout.width[site]}, but its statistics {len(scaling.mean)}")
    if folded.activation.ranks_by_decoder_norm and folded.stored_norms is None:
        folded.stored_norms = nn.ParameterList(
            nn.Parameter(folded.decoder_norms(g).clone(), requires_grad=False) for g in range(wiring.n_groups)
        )
    for g in range(wiring.n_groups):
        encoder, bias = folded.W_enc[g].to(**wide), folded.b_enc[g].to(**wide)
        for site, rows in layout.read_slices[g].items():
            encoder[rows] /= scalings[site].scale[:, None]
            bias = bias - scalings[site].mean @ encoder[rows]
        folded.W_enc[g].copy_(encoder)
        folded.b_enc[g].copy_(bias)
        for site, columns in layout.write_slices[g].items():
            part = folded.W_dec[g][:, columns]
            part.copy_(part.to(**wide) * scalings[site].scale)
    for site, bias in zip(wiring.write_sites, folded.b_dec, strict=True):
        bias.copy_(_folded_bias(folded, site, scalings))
    for n, (read, write) in enumerate(wiring.skips):
        skip = folded.W_skip[n].to(**wide)
        folded.W_skip[n].copy_(skip / scalings[read].scale[:, None] * scalings[write].scale)
    return folded


@torch.no_grad()
def unfold(crosscoder: Crosscoder, standard: Standard, in_place: bool = False) -> Crosscoder:
    """Undo `fold`: a crosscoder that acts on raw activations then acts on standard units, to be trained further.

    Norms that folding stored are dropped again, so that scores follow the decoders while they are trained. Norms that a
    raw crosscoder ranks by, and that standard units change, stay stored and as they are.

    Args:
        crosscoder: Acts on raw activations.
        standard: Of every site that it reads or writes.
        in_place: Whether to change the crosscoder itself.

    Returns:
        The crosscoder that acts on standard units.
    """
    unfolded = fold(crosscoder, standard.inverse(), in_place)
    stored, tolerance = unfolded.stored_norms, 100 * torch.finfo(unfolded.dtype).eps
    if stored is not None and all(
        torch.allclose(norms, unfolded.decoder_norms(g), rtol=tolerance, atol=0) for g, norms in enumerate(stored)
    ):
        unfolded.stored_norms = None
    return unfolded


def _wide_device(device: torch.device) -> torch.device:
    """Return where float64 is to be had: not on Apple's GPUs."""
    return torch.device("cpu") if device.type == "mps" else device


def _folded_bias(folded: Crosscoder, site: Site, scalings: Mapping[Site, Scaling]) -> Tensor:
    """Return the decoder bias of a written site, whose skip is not folded yet, (d,), in float64."""
    bias = folded.bias(site).to(scalings[site].mean)
    for n, (read, write) in enumerate(folded.wiring.skips):
        if write == site:
            bias = bias - (scalings[read].mean / scalings[read].scale) @ folded.W_skip[n].to(bias)
    return bias * scalings[site].scale + scalings[site].mean
