"""What is kept of a step: numbers, of all parts of a batch and of all processes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from clt_plugin.training._mesh import Mesh
from clt_plugin.training.forward import ForwardPass, GroupActivity


@dataclass(frozen=True, eq=False)
class Seen:
    """What is kept of a part of a batch: numbers, while its graph is let go.

    Attributes:
        loss: The reconstruction loss and all penalties, weighted; a number, as are the next two.
        error: The reconstruction loss.
        variance: Of what was to be written, summed over sites.
        l0: Active latents a token, of each group, (n_groups,).
        near: The share of pre-activations near their thresholds, likewise.
        penalties: Each penalty by name, without its weight.
    """

    loss: Tensor
    error: Tensor
    variance: Tensor
    l0: Tensor
    near: Tensor
    penalties: dict[str, Tensor]

    @classmethod
    def of(cls, run: ForwardPass, loss: Tensor, error: Tensor, penalties: dict[str, Tensor]) -> Seen:
        """Take the numbers of a forward pass; means of what was to be written are those of all processes."""
        targets = list(run.targets.values())
        means = run.mesh.over_tokens(torch.cat([y.mean(0) for y in targets])).split([y.shape[-1] for y in targets])
        spreads = [(y - mean).square().sum(-1).mean() for y, mean in zip(targets, means, strict=True)]
        l0 = [group.sum_per_token((group.acts != 0).to(group.acts.dtype)) for group in run.groups]
        near = [_near(group) for group in run.groups]
        variance = torch.stack(spreads).sum()
        return cls(loss.detach(), error.detach(), variance, torch.stack(l0), torch.stack(near), penalties)

    @classmethod
    def mean_of(cls, parts: list[Seen]) -> Seen:
        """Return the mean over parts of a batch."""

        def mean(values: Iterable[Tensor]) -> Tensor:
            return torch.stack([*values]).mean(0)

        return cls(
            loss=mean(s.loss for s in parts),
            error=mean(s.error for s in parts),
            variance=mean(s.variance for s in parts),
            l0=mean(s.l0 for s in parts),
            near=mean(s.near for s in parts),
            penalties={name: mean(s.penalties[name] for s in parts) for name in parts[0].penalties},
        )

    def over(self, mesh: Mesh) -> Seen:
        """Return what all processes saw, of each of which this is a part: L0 of its own latents, else means."""
        if mesh.size == 1:
            return self
        numbers = [self.loss, self.error, self.variance, self.l0 * mesh.n_latent, self.near, *self.penalties.values()]
        flat = mesh.mean(torch.cat([number.double().view(-1) for number in numbers]))
        loss, error, variance, l0, near, *penalties = flat.split([number.numel() for number in numbers])
        named = {name: value.squeeze() for name, value in zip(self.penalties, penalties, strict=True)}
        return Seen(loss.squeeze(), error.squeeze(), variance.squeeze(), l0, near, named)


def _near(group: GroupActivity) -> Tensor:
    """Return the share of a group's pre-activations within its thresholds' bandwidth; 0 without thresholds."""
    if group.threshold is None:
        return group.acts.new_zeros(())
    inside = (group.pre - group.per_entry(group.threshold)).abs() < group.bandwidth / 2
    return inside.sum() / (group.n_tokens * group.n_latents)


def fired(group: GroupActivity) -> Tensor:
    """Return which of a group's latents are active on any token, (F,) of bool."""
    if group.latents is None:
        return (group.acts != 0).any(0)
    result = torch.zeros(group.n_latents, dtype=torch.bool, device=group.acts.device)
    result[group.latents[group.acts != 0]] = True
    return result
