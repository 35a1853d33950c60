"""One trainer for every wiring: a step is a forward pass, a loss, its gradients and an update.

`Trainer` knows nothing of models or texts: it is shown activations. The loop that harvests, shows and saves is `train`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from clt_plugin.core import Crosscoder, Site
from clt_plugin.training._groups import by_site
from clt_plugin.training._seen import Seen, fired
from clt_plugin.training.config import ConfigError, TrainConfig
from clt_plugin.training.forward import ForwardPass
from clt_plugin.training.parallel import ALONE, Mesh, as_shared, check, gradient_norm, share_axis
from clt_plugin.training.penalties import SparsityPenalty, total
from clt_plugin.training.schedules import learning_rate, rising
from clt_plugin.training.sparse import forward_pass
from clt_plugin.training.sparsity import L0Controller
from clt_plugin.training.standard import Standard, fold
from clt_plugin.training.thresholds import keep_above


class TrainError(RuntimeError):
    """A run that cannot go on. Says why, and from where it can."""


@dataclass(frozen=True)
class Metrics:
    """What one step was like.

    Attributes:
        step: Its number, from 0.
        loss: The reconstruction loss and all penalties, weighted.
        error: The squared error summed over written sites, a token, in units of training.
        fvu: The fraction of variance unexplained of all written sites together, on this batch.
        l0: Active latents a token, of each group.
        dead: The share of each group's latents that are dead.
        penalties: Each penalty by name, without its weight.
        learning_rate: Of this step.
        gradient_norm: Of all parameters as one vector, before clipping; None where nothing is clipped.
        pressure: What a controller multiplied sparsity penalties with, a number for all groups or one for each.
        threshold: The mean of each group's thresholds, for activations that learn them; empty for others.
        near: The share of each group's pre-activations that lie within the thresholds' bandwidth, which is where their
            gradient comes from; likewise.
    """

    step: int
    loss: float
    error: float
    fvu: float
    l0: tuple[float, ...]
    dead: tuple[float, ...]
    penalties: dict[str, float]
    learning_rate: float
    gradient_norm: float | None = None
    pressure: tuple[float, ...] = (1.0,)
    threshold: tuple[float, ...] = ()
    near: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data, as JSON gives it back."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


class Trainer:
    """Trains a crosscoder on activations that it is shown, step by step.

    Args:
        crosscoder: In memory; it is changed. With `standard` it acts on standard units, and `finished` folds it.
        config: How to train it. Of what a config says, model, data and start do not matter here.
        standard: How activations are standardised; None for as they come.
        mesh: The processes that train together, each with its share of the crosscoder: see
            `clt_plugin.training.parallel`. All of them take every step, with the same activations.

    Attributes:
        crosscoder: The crosscoder, as it is by now: this process's share of it.
        n_done: How many steps were taken.
        silent: For each group and latent, the number of tokens since it fired, (F,).

    >>> trainer = Trainer(crosscoder, TrainConfig(n_latents=512, tokens=10**6))          # doctest: +SKIP
    >>> for reads, writes in batches:                                                    # doctest: +SKIP
    ...     print(trainer.step(reads, writes).fvu)
    """

    def __init__(
        self, crosscoder: Crosscoder, config: TrainConfig, standard: Standard | None = None, mesh: Mesh = ALONE
    ) -> None:
        if crosscoder.is_lazy:
            raise ConfigError("a lazy crosscoder's weights are in files: train crosscoder.materialize()")
        check(config, crosscoder.activation, mesh)
        self.crosscoder, self.config, self.standard, self.mesh = crosscoder.train(), config, standard, mesh
        self.n_done = 0
        self.optimizer = make_adam(crosscoder, config)
        self.controller = make_controller(crosscoder, config)
        device = crosscoder.device
        self.silent = [torch.zeros(n, dtype=torch.long, device=device) for n in crosscoder.group_sizes]
        self._loss = self._compiled()

    # ---------------------------------------------------------------- a step

    def step(
        self, reads: Tensor | Mapping[Site, Tensor], writes: Tensor | Mapping[Site, Tensor], **more: Any
    ) -> Metrics:
        """Take one step: forward, backward, update.

        Args:
            reads: What the crosscoder reads, stacked (n_read_sites, batch, d) or {site: (batch, d_site)}.
            writes: What it should write, stacked or by site, on the same tokens.
            **more: Further attributes of `ForwardPass` by name, for penalties that need them: {key: (batch, ...)}.

        Returns:
            What the step was like.

        Raises:
            TrainError: The loss or its gradient is not finite. Nothing was updated.
        """
        config, wiring = self.config, self.crosscoder.wiring
        # Read first: a step that the schedule does not have must not leave gradients behind.
        rate = learning_rate(self.n_done, config.n_steps, config.optimizer.falls_over, config.optimizer.warm_up)
        x, y = by_site(reads, wiring.read_sites), by_site(writes, wiring.write_sites)
        self.optimizer.zero_grad(set_to_none=True)
        parts = list(_parts(config.optimizer.accumulate, x, y, more, self.mesh))
        seen = Seen.mean_of([self._part(part, 1 / len(parts)) for part in parts]).over(self.mesh)
        norm = self._update(rate * config.optimizer.learning_rate)
        l0, pressure = seen.l0.tolist(), self._pressure()
        if self.controller is not None:
            self.controller.update(l0)
        self.n_done += 1
        return self._metrics(seen, l0, rate, norm, pressure)

    def _part(self, part: tuple[dict[Site, Tensor], dict[Site, Tensor], dict[str, Any]], share: float) -> Seen:
        """Go forward and backward over a part of a batch, and add up gradients."""
        x, y, more = part
        run, loss, error, penalties = self._loss(self.standardised(x), self.standardised(y), more)
        everywhere = self.mesh.mean(loss.detach())
        if not bool(torch.isfinite(everywhere)):
            raise self._not_finite(f"the loss is {everywhere.item()}")
        # Not the tensor's method, for which nnsight, once imported, reads the caller's source.
        torch.autograd.backward(loss * share)
        with torch.no_grad():
            self._count(run)
            return Seen.of(run, loss, error, penalties)

    def _loss_of(
        self, x: dict[Site, Tensor], y: dict[Site, Tensor], more: dict[str, Any]
    ) -> tuple[ForwardPass, Tensor, Tensor, dict[str, Tensor]]:
        """Return the forward pass over some tokens, the loss, the reconstruction's part of it, and the penalties."""
        config = self.config
        rise = rising(self.n_done, config.n_steps, config.sparsity.rise_over)
        dead = tuple(silent > config.sparsity.dead_after for silent in self.silent)
        low = config.precision == "bfloat16"
        with torch.autocast(self.crosscoder.device.type, torch.bfloat16, enabled=low):
            path = "dense" if config.compile else config.path
            run = forward_pass(self.crosscoder, x, y, path, self.mesh, dead=dead, **more)
        error = run.error()
        penalty, shown = total(config.sparsity.penalties, run, rise, self._pressure())
        return run, error + penalty, error, shown

    def _compiled(self) -> Callable[..., Any]:
        if not self.config.compile:
            return self._loss_of
        backend = self.config.compile if isinstance(self.config.compile, str) else "inductor"
        return torch.compile(self._loss_of, backend=backend)

    def _update(self, rate: float) -> float | None:
        """Move the weights; return the gradient's norm, where it was measured."""
        clip, norm = self.config.optimizer.clip, None
        for name, parameter in self.crosscoder.named_parameters():
            if parameter.grad is not None:
                self.mesh.average(parameter.grad, is_share=share_axis(self.crosscoder, name) is not None)
        if clip is not None:
            found = gradient_norm(self.crosscoder, self.mesh)
            norm = float(found)
            if not norm < float("inf"):
                raise self._not_finite(f"the gradient's norm is {norm}")
            clip_grads_with_norm_(self.crosscoder.parameters(), clip, found)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self.optimizer.step()
        keep_above(self.crosscoder)
        return norm

    def _not_finite(self, what: str) -> TrainError:
        self.optimizer.zero_grad(set_to_none=True)
        return TrainError(
            f"at step {self.n_done} {what}; nothing was updated. Often the learning rate is too high "
            f"({self.config.optimizer.learning_rate}), or an activation was not finite"
        )

    # ---------------------------------------------------------------- what is kept about latents

    def _count(self, run: ForwardPass) -> None:
        """Count for each latent the tokens since it fired."""
        active = self.mesh.any_token(fired(group) for group in run.groups)
        for silent, group, mask in zip(self.silent, run.groups, active, strict=True):
            silent += group.n_tokens * self.mesh.n_data
            silent[mask] = 0

    def _pressure(self) -> float | list[float]:
        return 1.0 if self.controller is None else self.controller.pressure

    def _metrics(
        self, seen: Seen, l0: list[float], rate: float, norm: float | None, pressure: float | list[float]
    ) -> Metrics:
        learnt = self.crosscoder.threshold if self.crosscoder.activation.has_threshold else ()
        dead = torch.stack([(silent > self.config.sparsity.dead_after).float().mean() for silent in self.silent])
        return Metrics(
            step=self.n_done - 1,
            loss=seen.loss.item(),
            error=seen.error.item(),
            fvu=(seen.error / seen.variance).item(),
            l0=tuple(l0),
            dead=tuple(self.mesh.mean(dead).tolist()),
            penalties={name: value.item() for name, value in seen.penalties.items()},
            learning_rate=rate * self.config.optimizer.learning_rate,
            gradient_norm=norm,
            pressure=tuple(pressure) if isinstance(pressure, list) else (pressure,),
            threshold=tuple(self.mesh.mean(torch.stack([t.detach().mean() for t in learnt])).tolist())
            if learnt
            else (),
            near=tuple(seen.near.tolist()) if learnt else (),
        )

    def standardised(
        self, values: Tensor | Mapping[Site, Tensor], sites: tuple[Site, ...] | None = None
    ) -> dict[Site, Tensor]:
        """Return raw activations, stacked or by site, in units of training, {site: (tokens, d_site)}.

        Args:
            values: The activations.
            sites: Which sites, in the order in which they are stacked; of a mapping all by default, else those read.
        """
        if sites is None:
            sites = tuple(values) if isinstance(values, Mapping) else self.crosscoder.wiring.read_sites
        found = by_site(values, sites)
        moved = {site: value.to(self.crosscoder.device, self.crosscoder.dtype) for site, value in found.items()}
        return moved if self.standard is None else self.standard.standardise(moved)

    # ---------------------------------------------------------------- where it stands

    def finished(
        self, sample: Tensor | Mapping[Site, Tensor] | None = None, crosscoder: Crosscoder | None = None
    ) -> Crosscoder:
        """Return the crosscoder as it is by now, acting on raw activations, in evaluation mode: a copy.

        Args:
            sample: What it reads on some tokens, raw, on which a BatchTopK's threshold is measured.
            crosscoder: The whole one, where this trainer has a share (`clt_plugin.training.parallel.put_together`); it
                is changed, and not copied.
        """
        if crosscoder is None or crosscoder is self.crosscoder:
            crosscoder = copy.deepcopy(self.crosscoder)
        if sample is not None and crosscoder.activation.has_batch_threshold:
            on_device = {site: x.to(crosscoder.device) for site, x in self.standardised(sample).items()}
            crosscoder.estimate_threshold(on_device)
        return self.folded(crosscoder)

    def folded(self, crosscoder: Crosscoder) -> Crosscoder:
        """Have a crosscoder in units of training act on raw activations, in place; a copy, where it is this one."""
        if crosscoder is self.crosscoder:
            crosscoder = copy.deepcopy(crosscoder)
        folded = crosscoder if self.standard is None else fold(crosscoder, self.standard, in_place=True)
        return folded.eval().requires_grad_(False)

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor that a step changes, by name: weights, Adam's moments, counts. They are not copies.

        Where latents are shared, they are DTensors: a checkpoint of them can be loaded by another number of processes.
        """
        found = {f"silent/{g}": as_shared(silent, 0, self.mesh) for g, silent in enumerate(self.silent)}
        for name, parameter in self.crosscoder.named_parameters():
            axis = share_axis(self.crosscoder, name)
            found[f"weights/{name}"] = as_shared(parameter.detach(), axis, self.mesh)
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"adam/{name}/{key}"] = as_shared(value, axis if value.ndim else None, self.mesh)
        return found

    def numbers(self) -> dict[str, Any]:
        """Return the rest of where training stands, as plain data."""
        controller = {} if self.controller is None else self.controller.state_dict()
        return {"n_done": self.n_done, "controller": controller}

    def load_numbers(self, numbers: Mapping[str, Any]) -> None:
        """Take `numbers` back; tensors are loaded into `tensors` in place."""
        self.n_done = int(numbers["n_done"])
        if self.controller is not None:
            self.controller.load_state_dict(numbers["controller"])


# ---------------------------------------------------------------- what a trainer is made of


def make_adam(crosscoder: Crosscoder, config: TrainConfig) -> torch.optim.Adam:
    """Return Adam over a crosscoder's parameters; thresholds form a group of their own, with a rate of their own."""
    of_thresholds = {id(t) for t in crosscoder.threshold or ()}
    learnt = [p for p in crosscoder.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in learnt if id(p) not in of_thresholds], "factor": 1.0},
        {"params": [p for p in learnt if id(p) in of_thresholds], "factor": config.optimizer.threshold_rate},
    ]
    settings = config.optimizer
    rate, betas = settings.learning_rate, settings.betas
    groups = [group for group in groups if group["params"]]
    adam = torch.optim.Adam(groups, lr=rate, betas=betas, eps=settings.epsilon, fused=True)
    for parameter in learnt:
        # Made now and not at the first step, so that a checkpoint has somewhere to be loaded to.
        moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        adam.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    return adam


def make_controller(crosscoder: Crosscoder, config: TrainConfig) -> L0Controller | None:
    """Return the controller of a target L0, where one is asked for."""
    target, n_groups = config.sparsity.target_l0, crosscoder.wiring.n_groups
    if target is None:
        return None
    if not any(isinstance(penalty, SparsityPenalty) for penalty in config.sparsity.penalties):
        raise ConfigError(
            "sparsity.target_l0 is reached by weighing a sparsity penalty, and there is none: add one to "
            'sparsity.penalties, such as {"name": "tanh", "weight": 1e-3}'
        )
    if not isinstance(target, int | float) and len(target) != n_groups:
        raise ConfigError(f"sparsity.target_l0 has {len(target)} numbers, but there are {n_groups} groups")
    # Longer than training takes to answer, and much shorter than the run: see `L0Controller`.
    return L0Controller(target, horizon=max(20, config.n_steps // 40))


def _parts(
    n: int, x: dict[Site, Tensor], y: dict[Site, Tensor], more: dict[str, Any], mesh: Mesh
) -> Iterator[tuple[dict[Site, Tensor], dict[Site, Tensor], dict[str, Any]]]:
    """Cut a batch into n parts of equally many tokens, and give this process's share of each."""
    n_tokens = len(next(iter(x.values())))
    different = {len(value) for value in (*x.values(), *y.values())}
    if different != {n_tokens} or n_tokens == 0 or n_tokens % (n * mesh.n_data):
        raise ConfigError(
            f"reads and writes hold the same tokens, at least one, in {n * mesh.n_data} equal part(s): they hold "
            f"{sorted(different)}"
        )
    size = n_tokens // n
    own = mesh.rows(size)
    for begin in range(0, n_tokens, size):
        taken = slice(begin + own.start, begin + own.stop)
        some = {key: {k: v[taken] for k, v in value.items()} for key, value in more.items()}
        yield {s: v[taken] for s, v in x.items()}, {s: v[taken] for s, v in y.items()}, some
