"""Copies of a crosscoder, or of a part of it, in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clt_plugin.core.activations import Activation
from clt_plugin.core.errors import WiringError
from clt_plugin.core.wiring import Layout, Wiring

if TYPE_CHECKING:
    from clt_plugin.core.crosscoder import Crosscoder


def chosen_groups(
    wiring: Wiring,
    group_sizes: Sequence[int],
    activation: Activation,
    has_fixed_threshold: bool,
    layers: Iterable[int] | None,
    features: Mapping[int, Sequence[int]] | None,
) -> tuple[list[int], dict[int, Tensor]]:
    """Return the groups at home in some layers, and for each group with features given, those.

    Args:
        wiring: Of the whole.
        group_sizes: Of the whole.
        activation: Of the whole.
        has_fixed_threshold: Whether an activation that ranks acts by a fixed threshold instead.
        layers: See `Crosscoder.select`.
        features: See `Crosscoder.select`.
    """
    home, features = wiring.home, dict(features or {})
    layers = {*home} if layers is None else {*layers}
    groups = [g for g in range(wiring.n_groups) if home[g] in layers]
    missing = sorted((layers | {*features}) - {*home})
    if missing or not groups:
        raise WiringError(f"no group is at home in layer {missing}: there are groups in layers {list(home)}")
    unkept = sorted({*features} - layers)
    if unkept:
        raise WiringError(f"features of layer {unkept} are asked for, but layers keeps {sorted(layers)}")
    latents = {}
    for g in groups:
        if home[g] in features:
            kept = torch.as_tensor(list(features[home[g]]), dtype=torch.long)
            if len(kept) == 0 or bool(((kept < 0) | (kept >= group_sizes[g])).any()):
                raise WiringError(f"layer {home[g]} has features 0 to {group_sizes[g] - 1}")
            latents[g] = kept
    competing = activation.ranks and not has_fixed_threshold
    if competing and (latents or (activation.joint and len(groups) < wiring.n_groups)):
        raise WiringError(
            f"{activation} ranks latents against those that would be left out, so a selection would activate "
            "others than the whole does: select whole groups (scope 'group'), or use a crosscoder with thresholds"
        )
    return groups, latents


def subset(whole: Crosscoder, wiring: Wiring, groups: Sequence[int], latents: Mapping[int, Tensor]) -> Crosscoder:
    """Copy some groups of a crosscoder, and of them some latents, into memory.

    Args:
        whole: The crosscoder.
        wiring: Its wiring, of these groups alone.
        groups: Which groups.
        latents: For groups that do not keep all their latents, which they keep.
    """
    part = type(whole).__new__(type(whole))
    nn.Module.__init__(part)
    part.wiring, part.layout = wiring, Layout.of(wiring, whole.layout.width)
    part.activation, part.host, part.is_partial = whole.activation, whole.host, whole.is_partial
    part.metadata = dict(whole.metadata)
    part.group_sizes = tuple(len(latents[g]) if g in latents else whole.group_sizes[g] for g in groups)
    part._lazy_store = None

    def vectors(name: str) -> Any:
        held = getattr(whole, name)
        return None if held is None else nn.ParameterList(_picked(held[g], latents.get(g)) for g in groups)

    part.b_enc, part.threshold, part.stored_norms = vectors("b_enc"), vectors("threshold"), vectors("stored_norms")
    biases = [whole.b_dec[whole.wiring.write_sites.index(site)] for site in wiring.write_sites]
    part.b_dec = nn.ParameterList(_own(bias, bias.requires_grad) for bias in biases)
    part.W_enc = nn.ParameterList(_own(whole.store.get("W_enc", g, latents.get(g)).T) for g in groups)
    part.W_dec = nn.ParameterList(_own(whole.store.get("W_dec", g, latents.get(g))) for g in groups)
    skips = [whole.wiring.skips.index(pair) for pair in wiring.skips]
    part.W_skip = nn.ParameterList(_own(whole.store.get("W_skip", n)) for n in skips)
    part.train(whole.training)
    return part


def _own(tensor: Tensor, requires_grad: bool | None = None) -> nn.Parameter:
    requires_grad = tensor.requires_grad if requires_grad is None else requires_grad
    # Contiguous, as safetensors and the encoder's (read width, F) rows want it.
    return nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format), requires_grad)


def _picked(vector: Tensor, latents: Tensor | None) -> nn.Parameter:
    """Copy a group's vector, or the entries of some latents; a threshold of the whole group stays as it is."""
    picked = vector if latents is None or vector.ndim == 0 else vector[latents.to(vector.device)]
    return _own(picked, vector.requires_grad)
