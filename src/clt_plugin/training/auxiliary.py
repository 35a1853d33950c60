"""Auxiliary losses: for dead latents, and for a crosscoder that computes layer by layer as its model does.

They are penalties like those of `clt_plugin.training.penalties`, registered beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from clt_plugin.core import Site, WiringError
from clt_plugin.training._competition import top_of_rows
from clt_plugin.training._groups import read
from clt_plugin.training.forward import ForwardPass, GroupActivity
from clt_plugin.training.penalties import PENALTIES, Penalty

# ---------------------------------------------------------------- dead latents


@dataclass(frozen=True)
class PreActivation(Penalty):
    """``sum_i ReLU(theta_i - h_i) D_i``: lifts what does not fire (Ameisen et al. 2025, "Circuit Tracing").

    Only inactive latents have a part in it. Over all of them its gradient is dense, but cheap: since
    ``ReLU(-u) = -u + ReLU(u)``, it is that of ``theta_i - mean h_i``, which is linear in the mean of what is read, plus
    that of ``ReLU(h_i - theta_i)`` at active entries alone. So no pass over (B, F) is needed.

    Attributes:
        over: ``"inactive"``: every latent where it is inactive; ``"dead"``: dead latents alone.
        norms: ``"concatenated"`` or ``"separate"``; None for 1 in place of D_i.
        floor: ``"threshold"``, or ``"zero"`` for 0 in place of theta_i, which it is anyway without thresholds.
    """

    name: ClassVar[str] = "pre_activation"
    spreads: ClassVar[str | None] = "sum"
    over: str = "inactive"
    norms: str | None = "concatenated"
    floor: str = "threshold"

    def __post_init__(self) -> None:
        if self.over not in ("inactive", "dead"):
            raise WiringError(f"over must be 'inactive' or 'dead', not {self.over!r}")
        if self.floor not in ("threshold", "zero"):
            raise WiringError(f"floor must be 'threshold' or 'zero', not {self.floor!r}")

    def __call__(self, run: ForwardPass) -> Tensor:
        """Return the penalty on a batch; see `Penalty.__call__`."""
        of_group = self._of_dead if self.over == "dead" else self._of_inactive
        return torch.stack([of_group(run, g) for g in range(len(run.groups))]).sum()

    def _floor(self, group: GroupActivity) -> Tensor:
        if self.floor == "zero" or group.threshold is None:
            return group.pre.new_zeros(group.n_latents)
        return group.threshold

    def _norms(self, group: GroupActivity) -> Tensor:
        return group.pre.new_ones(group.n_latents) if self.norms is None else group.norms(self.norms)

    def _of_inactive(self, run: ForwardPass, g: int) -> Tensor:
        group = run.groups[g]
        floor = self._floor(group)
        left_out = group.latents is not None and group.threshold is not None and self.floor == "zero"
        if not group.complete or left_out:
            raise WiringError(
                "the penalty 'pre_activation' over inactive latents needs every pre-activation above the floor, and "
                "sparse activations lack some here: use over='dead', or dense activations"
            )
        above = group.mean_over_tokens((group.pre - group.per_entry(floor)).relu())
        return (floor - group.mean_pre() + above) @ self._norms(group)

    def _of_dead(self, run: ForwardPass, g: int) -> Tensor:
        group = run.groups[g]
        dead = dead_latents(run, g, self.name)
        if not len(dead):
            return group.pre.new_zeros(())
        short = (self._floor(group)[dead] - pre_activations_of(run, g, dead)).relu()
        return short.mean(0) @ self._norms(group)[dead]


@dataclass(frozen=True)
class AuxiliaryTopK(Penalty):
    """``sum_w ||e_w - ehat_w||^2``: dead latents reconstruct what is left (Gao et al. 2024, appendix A.2).

    e is the error that the reconstruction leaves, without gradients; ehat decodes, for each group, the k largest of
    ``relu(h)`` among its dead latents. Without dead latents it is 0. That source's weight is 1/32.

    Attributes:
        k: How many dead latents of a group a token; that source takes about half of d.
    """

    name: ClassVar[str] = "auxiliary_topk"
    spreads: ClassVar[str | None] = "whole"
    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise WiringError(f"k must be a whole number of at least 1, not {self.k!r}")

    def __call__(self, run: ForwardPass) -> Tensor:
        """Return the loss on a batch; see `Penalty.__call__`."""
        written: dict[Site, Tensor] = {}
        every_dead = [dead_latents(run, g, self.name) for g in range(len(run.groups))]
        numbers = run.mesh.total(
            torch.tensor([*map(len, every_dead)], device=run.groups[0].pre.device), "latent"
        ).tolist()
        for g, slices in enumerate(run.crosscoder.layout.write_slices):
            # Where any process has dead latents all take part.
            if numbers[g]:
                acts = self._best(run, g, every_dead[g], numbers[g])
                y = acts @ run.crosscoder.decoder_vectors(g, every_dead[g])
                for site, columns in slices.items():
                    written[site] = written[site] + y[:, columns] if site in written else y[:, columns]
        loss = run.groups[0].pre.new_zeros(())
        for site, y in written.items():
            error = (run.targets[site] - run.outputs[site]).detach()
            loss = loss + (error - run.mesh.over_latents(y)).square().sum(-1).mean()
        return loss

    def _best(self, run: ForwardPass, g: int, dead: Tensor, n_dead: int) -> Tensor:
        """Return relu(h) of dead latents where it is among the k largest of all n_dead, else 0, (B, n)."""
        h = pre_activations_of(run, g, dead).relu()
        flat = top_of_rows(run.mesh, h.detach(), min(self.k, n_dead))
        best = torch.zeros_like(h).view(-1).index_fill_(0, flat, 1)
        return h * best.view_as(h)


def dead_latents(run: ForwardPass, group: int, penalty: str) -> Tensor:
    """Return the indices of a group's dead latents, (n,)."""
    return run.need("dead", penalty)[group].nonzero().squeeze(1)


def pre_activations_of(run: ForwardPass, group: int, latents: Tensor) -> Tensor:
    """Return the pre-activations of some latents alone, (B, n), whether or not they are among the entries kept."""
    x = read(run.crosscoder, group, run.inputs)
    return x @ run.crosscoder.encoder_vectors(group, latents).T + run.crosscoder.b_enc[group][latents]


# ---------------------------------------------------------------- faithful to the model's own layers


@dataclass(frozen=True)
class Faithfulness(Penalty):
    """``1 - sum_j v_j max_i corr(a_i, n_j)^2``: a layer's latents should track the layer's own neurons.

    The mean over layers, where i runs over the latents of the groups at home in the layer and j over the neurons given
    for it, each with its share v_j of their variance over the batch: scale a neuron by the norm of its output weights
    to weigh it by what it writes. Between 0, where every neuron has a latent that follows it exactly, and 1. It is what
    the study of unfaithful circuits suggests against depth collapse ("auxiliary faithfulness losses", which reward
    latents whose activations correlate with neurons); the formula is ours. It sees latents that fire in the batch, so
    it does not wake those of a silent layer: a loss for dead latents does. Costs B * F * n products a layer.
    """

    name: ClassVar[str] = "faithfulness"

    def __call__(self, run: ForwardPass) -> Tensor:
        """Return the loss on a batch; see `Penalty.__call__`."""
        home, losses = run.crosscoder.wiring.home, []
        for layer, neurons in run.need("neurons", self.name).items():
            groups = [group for g, group in enumerate(run.groups) if home[g] == layer]
            if not groups:
                raise WiringError(f"neurons of layer {layer} are given, but groups are at home in {sorted({*home})}")
            acts = torch.cat([group.dense(group.acts) for group in groups], dim=1)
            losses.append(1 - tracked(acts, neurons))
        return torch.stack(losses).mean()


def tracked(acts: Tensor, neurons: Tensor) -> Tensor:
    """Return the share of neurons' variance that single latents follow: ``sum_j v_j max_i corr(a_i, n_j)^2``.

    Args:
        acts: (B, F), differentiable.
        neurons: (B, n).

    Returns:
        A number from 0 to 1; 0 where no latent or no neuron varies.
    """
    neurons = neurons.detach().to(acts.dtype)
    neurons = neurons - neurons.mean(0)
    variance = neurons.square().sum(0)
    # Latents and neurons that do not vary have no correlation, and a gradient without bound.
    varying = (acts.detach() - acts.detach()[:1]).any(0)
    if not bool(varying.any()) or not bool((variance > 0).any()):
        return acts.sum() * 0
    neurons, variance = neurons[:, variance > 0], variance[variance > 0]
    centred = acts[:, varying] - acts[:, varying].mean(0)
    correlation = (centred / centred.norm(dim=0)).T @ (neurons / variance.sqrt())
    return correlation.square().amax(0) @ (variance / variance.sum())


@dataclass(frozen=True)
class JacobianMatching(Penalty):
    """``||J_hat v - J v||^2 / ||J v||^2``: to first order, the crosscoder should answer its input as the MLP does.

    v is a random direction for each token (`ForwardPass.tangents`), ``J v`` the MLP's answer (`ForwardPass.responses`,
    see `mlp_response`), ``J_hat v`` that of the latents that read and write this layer, with those active that are:
    what earlier layers' latents write is not an answer to this layer's input. For v ~ N(0, 1) the numerator's
    expectation is the squared Frobenius norm of ``J_hat - J``, so one direction a token is enough. The mean over the
    written sites with responses. It works against depth collapse: a layer whose output is all written by earlier ones
    has ``J_hat = 0`` and loss 1. For activations whose slope is 1 where they are not 0.
    """

    name: ClassVar[str] = "jacobian"
    spreads: ClassVar[str | None] = "whole"

    def __call__(self, run: ForwardPass) -> Tensor:
        """Return the loss on a batch; see `Penalty.__call__`."""
        tangents, losses = run.need("tangents", self.name), []
        for site, response in run.need("responses", self.name).items():
            answer = own_response(run, site, tangents)
            size = run.mesh.over_tokens(response.detach().square().sum())
            losses.append((answer - response.detach()).square().sum() / size)
        return torch.stack(losses).mean()


def own_response(run: ForwardPass, site: Site, tangents: dict[Site, Tensor]) -> Tensor:
    """Return how what a crosscoder writes to a site moves, to first order, with what it reads in the same layer.

    Args:
        run: A forward pass.
        site: The written site.
        tangents: {site read: (B, d_site)}: how what is read moves.

    Returns:
        (B, d_site), differentiable with respect to encoders, decoders and skips.
    """
    crosscoder, wiring = run.crosscoder, run.crosscoder.wiring
    moved = {r: v for r, v in tangents.items() if (r.model, r.layer) == (site.model, site.layer)}
    answers: list[Tensor] = []
    for g in wiring.writers(site):
        own = [r for r in wiring.reads[g] if r in moved]
        if own:
            rows = crosscoder.layout.read_slices[g]
            encoder = crosscoder.encoder_vectors(g)
            h = torch.stack([moved[r] @ encoder[:, rows[r]].T for r in own]).sum(0)
            active = run.groups[g].dense((run.groups[g].acts.detach() != 0).to(h.dtype))
            answers.append((h * active) @ crosscoder.decoder_vectors(g)[:, crosscoder.layout.write_slices[g][site]])
    if answers:
        answers = [run.mesh.over_latents(torch.stack(answers).sum(0))]
    skipped = {read: write for read, write in wiring.skips if write == site}
    answers += [moved[r] @ crosscoder.store.get("W_skip", wiring.skips.index((r, site))) for r in skipped if r in moved]
    if not answers:
        raise WiringError(f"no latent reads the layer of {site} where tangents are given, and writes {site}")
    return torch.stack(answers).sum(0)


def mlp_response(
    mlp: Callable[[Tensor], Tensor], x: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Move an MLP's input in a random direction and return how its output moves, to first order.

    Args:
        mlp: Maps what is read, (B, d_read), to what is to be written, (B, d_write), each token by itself, in the units
            in which the crosscoder is trained: see `Standard.standardised`.
        x: What is read, (B, d_read).
        generator: For the directions.

    Returns:
        The directions, (B, d_read), from a normal distribution; and the responses, (B, d_write). Neither has gradients.
    """
    # Drawn on the generator's device, so that a seed gives the same directions wherever x is.
    device = x.device if generator is None else generator.device
    tangent = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)
    # Two backward passes, not forward-mode differentiation, which fewer modules support.
    _, response = torch.autograd.functional.jvp(mlp, x.detach(), tangent)
    return tangent, response


for _cls in (PreActivation, AuxiliaryTopK, Faithfulness, JacobianMatching):
    PENALTIES.add(_cls.name, _cls)
