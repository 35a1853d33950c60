"""Crosscoders of one shape trained side by side on the same few inputs, one a seed: many small runs at the cost of one.

Canonical shapes, for S seeds, F latents a group, B tokens: seeds' latents lie side by side, so that pre-activations and
activations are (B, S * F), encoders (d_read, S * F) and decoders (S * F, d_written); outputs are (S, B, d). No weight
is shared, and Adam treats every number by itself, so that the gradient of the sum of all losses trains each seed as if
it were alone. Penalties that are sums over latents need not know of the stack; others see one seed at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clt_plugin.analysis.faithfulness._texts import on_terminal
from clt_plugin.core import Crosscoder, JumpReLU, Site, Wiring, WiringError
from clt_plugin.training.forward import ForwardPass, GroupActivity, about_group
from clt_plugin.training.penalties import Penalty, total
from clt_plugin.training.schedules import rising
from clt_plugin.training.thresholds import keep_above


class _Open(torch.autograd.Function):
    """JumpReLU whose gradient reaches h wherever h >= 0, not above the threshold alone."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(h, threshold)
        ctx.bandwidth = bandwidth
        return h * (h > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        h, threshold = ctx.saved_tensors
        inside = (h - threshold).abs() < ctx.bandwidth / 2
        return grad * (h >= 0), (-(threshold / ctx.bandwidth) * inside * grad).sum_to_size(threshold.shape), None


@dataclass(frozen=True)
class OpenJumpReLU(JumpReLU):
    """JumpReLU with a straight-through gradient for h between 0 and the threshold; the same outside training."""

    name: ClassVar[str] = "jumprelu"

    def __call__(self, h: Tensor, threshold: Tensor | None, scale: Tensor | None, training: bool) -> Tensor:
        """Activate; see `Activation.__call__`."""
        if threshold is None:
            raise WiringError("JumpReLU needs a threshold for each latent")
        return _Open.apply(h, threshold, self.bandwidth)


@dataclass(frozen=True)
class Recipe:
    """How a stack is trained.

    Attributes:
        penalties: Added to the loss, each times its weight; sparsity penalties' weights rise linearly over the run.
        steps: How many steps, each over all inputs.
        rate: Adam's learning rate.
        later_rate: Its learning rate from `turn` on.
        turn: The step from which it is that.
        threshold: Where thresholds begin.
        bandwidth: Of their straight-through gradient.
    """

    penalties: tuple[Penalty, ...]
    steps: int
    rate: float = 1e-3
    later_rate: float = 1e-4
    turn: int = 800
    threshold: float = 0.03
    bandwidth: float = 0.01

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"a run has at least one step, not {self.steps}")


class Stack:
    """Crosscoders of one shape, one a seed; see the module.

    Args:
        wiring: Of each.
        widths: Of its sites, {site: d}, or one for all.
        n_latents: Of each group of each, F.
        seeds: From which weights are drawn, as `Crosscoder` draws them.
        recipe: How they are trained.
    """

    def __init__(
        self, wiring: Wiring, widths: int | Mapping[Site, int], n_latents: int, seeds: Sequence[int], recipe: Recipe
    ) -> None:
        self.seeds, self.recipe, self.n_latents = tuple(seeds), recipe, n_latents
        if not self.seeds:
            raise ValueError("no seeds were given: give at least one, such as seeds=range(20)")
        self.activation = OpenJumpReLU(bandwidth=recipe.bandwidth)
        self._make: Callable[[int], Crosscoder] = lambda n: Crosscoder(wiring, widths, n, self.activation)
        self.wide = self._make(n_latents * len(self.seeds))
        self.b_dec = [nn.Parameter(bias.detach().expand(len(self.seeds), 1, -1).clone()) for bias in self.wide.b_dec]
        with torch.no_grad():
            for place, seed in enumerate(self.seeds):
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    alone = self._make(n_latents)
                for g in range(wiring.n_groups):
                    self.wide.W_enc[g][:, self._own(place)] = alone.W_enc[g]
                    self.wide.W_dec[g][self._own(place)] = alone.W_dec[g]
            for threshold in self.wide.threshold or ():
                threshold.fill_(recipe.threshold)

    def _own(self, place: int) -> slice:
        return slice(place * self.n_latents, (place + 1) * self.n_latents)

    def forward(self, x: Mapping[Site, Tensor], y: Mapping[Site, Tensor], **more: Any) -> ForwardPass:
        """Run all of them: as `ForwardPass.of`, with outputs (S, B, d)."""
        wide, wiring = self.wide, self.wide.wiring
        groups, outputs = [], dict(zip(wiring.write_sites, self.b_dec, strict=True))
        for g, sites in enumerate(wiring.reads):
            read = torch.cat([x[site] for site in sites], dim=-1) if len(sites) > 1 else x[sites[0]]
            pre = wide.pre_activations(g, read)
            acts = wide.activate(g, pre)
            groups.append(GroupActivity(acts, pre, len(read), **about_group(wide, g, read)))
            by_seed = acts.unflatten(1, (len(self.seeds), -1)).transpose(0, 1)
            written = by_seed @ wide.W_dec[g].unflatten(0, (len(self.seeds), -1))
            for site, columns in wide.layout.write_slices[g].items():
                outputs[site] = outputs[site] + written[..., columns]
        return ForwardPass(wide, tuple(groups), dict(x), dict(y), outputs, **more)

    def of_seed(self, run: ForwardPass, place: int) -> ForwardPass:
        """Return one seed's part of a forward pass."""
        own = self._own(place)
        groups = tuple(_part(group, own) for group in run.groups)
        return replace(run, groups=groups, outputs={site: each[place] for site, each in run.outputs.items()})

    def train(
        self,
        x: Mapping[Site, Tensor],
        y: Mapping[Site, Tensor],
        weights: Mapping[Site, float],
        bar: bool | None = None,
        **more: Any,
    ) -> None:
        """Train all of them on all inputs at every step.

        Args:
            x: What is read, {site: (B, d)}.
            y: What is to be written, {site: (B, d)}.
            weights: What each written site's squared error, summed over its axes, counts.
            bar: Whether to show progress; by default on a terminal.
            **more: Further attributes of `ForwardPass`, which penalties ask for.
        """
        from tqdm.auto import tqdm

        recipe = self.recipe
        summed = [each for each in recipe.penalties if each.spreads == "sum"]
        others = [each for each in recipe.penalties if each.spreads != "sum"]
        optimiser = torch.optim.Adam([*self._parameters(), *self.b_dec], lr=recipe.rate, fused=True)
        for step in tqdm(range(recipe.steps), f"{len(self.seeds)} seeds", disable=not on_terminal(bar)):
            optimiser.param_groups[0]["lr"] = recipe.rate if step < recipe.turn else recipe.later_rate
            run, rise = self.forward(x, y, **more), rising(step, recipe.steps)
            errors = [w * (run.outputs[site] - y[site]).square().sum((0, 2)).mean() for site, w in weights.items()]
            loss = torch.stack(errors).sum() + total(summed, run, rise)[0]
            if others:
                for place in range(len(self.seeds)):
                    loss = loss + total(others, self.of_seed(run, place), rise)[0]
            optimiser.zero_grad()
            # Not loss.backward(), which nnsight, once imported, looks into at every call.
            torch.autograd.backward(loss)
            optimiser.step()
            keep_above(self.wide)

    def _parameters(self) -> list[Tensor]:
        wide = self.wide
        return [*wide.W_enc, *wide.b_enc, *wide.W_dec, *(wide.threshold or ())]

    @torch.no_grad()
    def crosscoders(self) -> list[Crosscoder]:
        """Return each seed's crosscoder, of plain JumpReLU, which does the same outside training."""
        found = []
        for place in range(len(self.seeds)):
            own, wide = self._own(place), self.wide
            alone = self._make(self.n_latents)
            alone.activation = JumpReLU(bandwidth=self.recipe.bandwidth)
            for g in range(wide.wiring.n_groups):
                alone.W_enc[g].copy_(wide.W_enc[g][:, own])
                alone.b_enc[g].copy_(wide.b_enc[g][own])
                alone.W_dec[g].copy_(wide.W_dec[g][own])
                if alone.threshold is not None and wide.threshold is not None:
                    alone.threshold[g].copy_(wide.threshold[g][own])
            for bias, several in zip(alone.b_dec, self.b_dec, strict=True):
                bias.copy_(several[place, 0])
            found.append(alone.eval().requires_grad_(False))
        return found


def _part(group: GroupActivity, own: slice) -> GroupActivity:
    """Return the activity of some of a group's latents, as if they were all."""
    return replace(
        group,
        acts=group.acts[:, own],
        pre=group.pre[:, own],
        n_latents=own.stop - own.start,
        norms=lambda kind: group.norms(kind)[own],
        mean_pre=lambda: group.mean_pre()[own],
        threshold=None if group.threshold is None else group.threshold[own],
    )
