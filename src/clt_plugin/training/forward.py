"""What one forward pass over a batch gave: all that penalties see of it.

Two forms hold the same. Dense, a group's activations and pre-activations are (B, F). Sparse, they are the entries
(n,) that are active or lie within the thresholds' bandwidth, each with its token and its latent. In both, every tensor
carries gradients, so that a penalty's reaches whatever it depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from clt_plugin.core import Crosscoder, Site, WiringError, step
from clt_plugin.core.activations import activate_jointly
from clt_plugin.training._groups import by_site, read, score_scale
from clt_plugin.training._mesh import ALONE, Mesh


@dataclass(frozen=True, eq=False)
class GroupActivity:
    """What one group of latents did on a batch of B tokens.

    Attributes:
        acts: Activations, (B, F), or those of the entries kept, (n,).
        pre: Pre-activations, likewise.
        n_tokens: B.
        n_latents: F.
        norms: Gives decoder norms of a kind, (F,) with gradients: see `Crosscoder.decoder_norms`.
        mean_pre: Gives the mean pre-activation of every latent, (F,) with gradients, from the mean of what is read.
        threshold: JumpReLU's thresholds, (F,), or None.
        bandwidth: Of their straight-through gradient, in units of pre-activations.
        tokens: The token of each entry kept, (n,); None for dense activations.
        latents: The latent of each entry kept, (n,); None for dense activations.
        complete: Whether no entry left out lies above its threshold (above 0, where there is none): not so where
            latents compete and the entries are those selected.
    """

    acts: Tensor
    pre: Tensor
    n_tokens: int
    n_latents: int
    norms: Callable[[str], Tensor]
    mean_pre: Callable[[], Tensor]
    threshold: Tensor | None = None
    bandwidth: float = 0.001
    tokens: Tensor | None = None
    latents: Tensor | None = None
    complete: bool = True

    def per_entry(self, values: Tensor) -> Tensor:
        """Return one value a latent, (F,), as each entry's: to multiply `acts` or `pre` with."""
        return values if self.latents is None else values.index_select(0, self.latents)

    def mean_over_tokens(self, entries: Tensor) -> Tensor:
        """Return each latent's mean over all B tokens, (F,), where entries left out count as 0."""
        if self.latents is None:
            return entries.sum(0) / self.n_tokens
        return entries.new_zeros(self.n_latents).index_add(0, self.latents, entries) / self.n_tokens

    def sum_per_token(self, entries: Tensor) -> Tensor:
        """Return the sum over all entries for each token, averaged over the B tokens: a number."""
        return entries.sum() / self.n_tokens

    def l0(self) -> Tensor:
        """Return how many latents are active a token, on average; with a gradient for the thresholds if there are any.

        The gradient is the straight-through estimate of `clt_plugin.core.step`.
        """
        if self.threshold is None:
            return self.sum_per_token((self.acts.detach() != 0).to(self.acts.dtype))
        return self.sum_per_token(step(self.pre, self.per_entry(self.threshold), self.bandwidth))

    def rates(self) -> Tensor:
        """Return the share of tokens on which each latent is active, (F,), with gradients as `l0` has them."""
        if self.threshold is None:
            return self.mean_over_tokens((self.acts.detach() != 0).to(self.acts.dtype))
        return self.mean_over_tokens(step(self.pre, self.per_entry(self.threshold), self.bandwidth))

    def dense(self, entries: Tensor) -> Tensor:
        """Return entries as (B, F), 0 where left out."""
        if self.tokens is None or self.latents is None:
            return entries
        flat = entries.new_zeros(self.n_tokens, self.n_latents)
        return flat.index_put((self.tokens, self.latents), entries)


@dataclass(frozen=True, eq=False)
class ForwardPass:
    """One forward pass of a crosscoder over a batch of B tokens, in the units in which it is trained.

    Attributes:
        crosscoder: Whose.
        groups: What each of its groups did.
        inputs: What was read, {site: (B, d_site)}.
        targets: What was to be written, {site: (B, d_site)}.
        outputs: What was written, {site: (B, d_site)}.
        dead: For each group which latents are dead, (F,) bool, by whatever the caller holds to be dead; None where that
            is not known.
        neurons: {layer: (B, n)}: activations of the model's own MLP neurons, for penalties that look at them.
        tangents: {site read: (B, d_site)}: directions in which inputs are moved, see `mlp_response`.
        responses: {site written: (B, d_site)}: how the model's own MLPs answer, to first order.
        mesh: The processes that have the other latents and tokens; groups are this one's part. What a penalty computes
            from sums over latents or means over tokens is summed and averaged over them: see `Penalty.spreads`.
    """

    crosscoder: Crosscoder
    groups: tuple[GroupActivity, ...]
    inputs: Mapping[Site, Tensor]
    targets: Mapping[Site, Tensor]
    outputs: Mapping[Site, Tensor]
    dead: tuple[Tensor, ...] | None = None
    neurons: Mapping[int, Tensor] = field(default_factory=dict)
    tangents: Mapping[Site, Tensor] = field(default_factory=dict)
    responses: Mapping[Site, Tensor] = field(default_factory=dict)
    mesh: Mesh = ALONE

    @classmethod
    def of(
        cls,
        crosscoder: Crosscoder,
        x: Tensor | Mapping[Site, Tensor],
        y: Tensor | Mapping[Site, Tensor],
        **more: Any,
    ) -> ForwardPass:
        """Run a crosscoder densely: the plain form, which the sparse one must equal.

        Args:
            crosscoder: In training mode, if it is a BatchTopK.
            x: What it reads, stacked (n_read_sites, B, d) or {site: (B, d_site)}.
            y: What it should write, stacked or by site.
            **more: Further attributes.
        """
        wiring = crosscoder.wiring
        inputs, targets = by_site(x, wiring.read_sites), by_site(y, wiring.write_sites)
        every = range(wiring.n_groups)
        reads = [read(crosscoder, g, inputs) for g in every]
        pre = [crosscoder.pre_activations(g, reads[g]) for g in every]
        if crosscoder.activation.joint:
            threshold = None if crosscoder.threshold is None else crosscoder.threshold[0]
            scales = [score_scale(crosscoder, g) for g in every]
            acts = activate_jointly(crosscoder.activation, pre, threshold, scales, crosscoder.training)
        else:
            acts = [crosscoder.activate(g, pre[g]) for g in every]
        groups = tuple(
            GroupActivity(acts[g], pre[g], len(reads[g]), **about_group(crosscoder, g, reads[g])) for g in every
        )
        outputs = crosscoder.decode(tuple(acts), dict(inputs))
        return cls(crosscoder, groups, inputs, targets, outputs, **more)

    def error(self) -> Tensor:
        """Return the reconstruction loss: the squared error summed over all written sites, averaged over tokens."""
        squares = [(self.outputs[site] - self.targets[site]).square().sum(-1).mean() for site in self.targets]
        return torch.stack(squares).sum()

    def need(self, what: str, by: str) -> Any:
        """Return an attribute, or say that a penalty cannot do without it."""
        value = getattr(self, what)
        if not value:
            raise WiringError(f"the penalty {by!r} needs {what}: give ForwardPass its {what}")
        return value


def about_group(crosscoder: Crosscoder, group: int, x: Tensor) -> dict[str, Any]:
    """Return what a `GroupActivity` says of a group besides its activations, as keyword arguments.

    Args:
        crosscoder: Whose.
        group: Which group.
        x: What the group read, (B, sum of the widths read).
    """
    threshold = crosscoder.threshold if crosscoder.activation.has_threshold else None
    mean = x.mean(0)
    return {
        "n_latents": crosscoder.group_sizes[group],
        # Computed once, however many penalties ask.
        "norms": cache(lambda kind: crosscoder.decoder_norms(group, kind)),
        "mean_pre": cache(lambda: crosscoder.pre_activations(group, mean)),
        "threshold": None if threshold is None else threshold[group],
        "bandwidth": getattr(crosscoder.activation, "bandwidth", 0.001),
    }
