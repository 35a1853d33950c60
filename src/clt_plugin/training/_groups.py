"""What training asks of a crosscoder group by group: what each reads, and by what it ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from clt_plugin.core import Crosscoder, Site, WiringError


def by_site(x: Tensor | Mapping[Site, Tensor], sites: Sequence[Site]) -> dict[Site, Tensor]:
    """Return activations as {site: (tokens, d_site)}, leading axes flattened.

    Args:
        x: Stacked (n_sites, ..., d), or {site: (..., d_site)}.
        sites: Which sites, in the order in which they are stacked.
    """
    if isinstance(x, Tensor):
        if len(x) != len(sites):
            raise WiringError(f"stacked activations have one entry for each of {len(sites)} sites, not {len(x)}")
        x = dict(zip(sites, x, strict=True))
    missing = [str(site) for site in sites if site not in x]
    if missing:
        raise WiringError(f"activations of {', '.join(missing)} are missing")
    return {site: x[site].reshape(-1, x[site].shape[-1]) for site in sites}


def read(crosscoder: Crosscoder, group: int, inputs: Mapping[Site, Tensor]) -> Tensor:
    """Return what one group reads, (tokens, sum of the widths read), its sites side by side."""
    parts = [inputs[site] for site in crosscoder.wiring.reads[group]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def pre_activations(crosscoder: Crosscoder, x: Tensor | Mapping[Site, Tensor]) -> list[Tensor]:
    """Return every group's pre-activations, (tokens, F_g) each."""
    inputs = by_site(x, crosscoder.wiring.read_sites)
    return [crosscoder.pre_activations(g, read(crosscoder, g, inputs)) for g in range(crosscoder.wiring.n_groups)]


def score_scale(crosscoder: Crosscoder, group: int) -> Tensor | None:
    """Return what an activation that ranks by decoder norm multiplies with, (F_g,); None for all others."""
    if not crosscoder.activation.ranks_by_decoder_norm:
        return None
    if crosscoder.stored_norms is not None:
        return crosscoder.stored_norms[group]
    return crosscoder.decoder_norms(group).detach()
