"""Penalties: small frozen values that look at a forward pass and return what to add to the loss.

Each is a mean over the tokens of the batch, so that its weight means the same for every batch size. D_i is the decoder
norm of latent i, under autograd, so that a penalty's gradient reaches the decoders; a_i its activation, h_i its
pre-activation, theta_i its threshold. A third party adds one with ``PENALTIES.add("name", cls)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from clt_plugin.core import Registry, WiringError
from clt_plugin.training.forward import ForwardPass, GroupActivity

PENALTIES: Registry[type[Penalty]] = Registry("penalty")
"""Penalties by name."""


@dataclass(frozen=True)
class Penalty:
    """A term of the loss, with its fixed settings.

    Subclasses are registered by name in `PENALTIES` and implement `__call__`.

    Attributes:
        weight: What it is multiplied with, lambda.
    """

    name: ClassVar[str] = ""
    rises: ClassVar[bool] = False
    """Whether its weight rises over training, see `clt_plugin.training.schedules.rising`."""
    spreads: ClassVar[str | None] = None
    """How several processes compute it, each with a part of the latents and tokens (`ForwardPass.mesh`); it is a mean
    over tokens in either case. ``"sum"``: it is a sum over latents, so that what they return is added up;
    ``"whole"``: it sums over processes itself, and each returns all of it; None: they cannot."""
    weight: float

    def __call__(self, run: ForwardPass) -> Tensor:
        """Return the penalty on a batch, a number, without its weight."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Return the penalty as plain data, for JSON: `Penalty.make` takes it."""
        return {"name": self.name, **asdict(self)}

    @staticmethod
    def make(name: str, **settings: Any) -> Penalty:
        """Return a penalty from its name and settings.

        >>> Penalty.make("tanh", weight=0.01)
        Tanh(weight=0.01, c=1.0, norms='concatenated')
        """
        cls = PENALTIES[name]
        known = {each.name: each.default is MISSING for each in fields(cls)}
        wrong = sorted(set(settings) - set(known))
        lacking = [key for key, needed in known.items() if needed and key not in settings]
        if wrong or lacking:
            what = f"has no setting {', '.join(wrong)}" if wrong else f"needs {', '.join(lacking)}"
            raise WiringError(f"the penalty {name!r} {what}: it takes {', '.join(known)}")
        return cls(**settings)


def total(
    penalties: Sequence[Penalty], run: ForwardPass, rise: float = 1.0, pressure: float | Sequence[float] = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add penalties up, each times its weight.

    Args:
        penalties: Which.
        run: A forward pass.
        rise: What the weights that rise over training have risen to, from 0 to 1.
        pressure: What a controller multiplies sparsity penalties with (`L0Controller.pressure`): one number, or one a
            group.

    Returns:
        The sum, a number with gradients, and {name: the penalty without its weight}, without gradients. Penalties
        of one name are added up.
    """
    result = run.groups[0].acts.new_zeros(())
    shown: dict[str, Tensor] = {}
    for penalty in penalties:
        if isinstance(penalty, SparsityPenalty):
            parts = _added(penalty, run, penalty.by_group(run))
            value, term = parts.sum(), (parts * torch.as_tensor(pressure, dtype=parts.dtype, device=parts.device)).sum()
        else:
            value = term = _added(penalty, run, penalty(run))
        result = result + penalty.weight * (rise if penalty.rises else 1.0) * term
        shown[penalty.name] = value.detach() + shown.get(penalty.name, 0)
    return result, shown


def _added(penalty: Penalty, run: ForwardPass, value: Tensor) -> Tensor:
    """Add up what the processes that share the latents return."""
    return run.mesh.over_latents(value) if penalty.spreads == "sum" else value


# ---------------------------------------------------------------- sparsity


@dataclass(frozen=True)
class SparsityPenalty(Penalty):
    """A penalty that is a sum over groups, each of which a controller may weigh: see `L0Controller`."""

    rises: ClassVar[bool] = True

    def of_group(self, group: GroupActivity) -> Tensor:
        """Return one group's part, a number."""
        raise NotImplementedError

    def by_group(self, run: ForwardPass) -> Tensor:
        """Return every group's part, (n_groups,)."""
        return torch.stack([self.of_group(group) for group in run.groups])

    def __call__(self, run: ForwardPass) -> Tensor:
        """Return the penalty on a batch; see `Penalty.__call__`."""
        return self.by_group(run).sum()


@dataclass(frozen=True)
class Tanh(SparsityPenalty):
    """``sum_i tanh(c D_i a_i)``: about L0, but smooth (Ameisen et al. 2025, "Circuit Tracing", training of the CLT).

    Activations are taken to be at least 0, as all but an unrectified TopK's are.

    Attributes:
        c: How steep; latents with ``c D_i a_i`` far above 1 count as 1.
        norms: ``"concatenated"`` or ``"separate"``, see `Crosscoder.decoder_norms`.
    """

    name: ClassVar[str] = "tanh"
    spreads: ClassVar[str | None] = "sum"
    c: float = 1.0
    norms: str = "concatenated"

    def of_group(self, group: GroupActivity) -> Tensor:
        """Return one group's part, a number."""
        return group.sum_per_token((group.acts * group.per_entry(self.c * group.norms(self.norms))).tanh())


@dataclass(frozen=True)
class L1(SparsityPenalty):
    """``sum_i D_i a_i`` (Lindsey et al. 2024, "Sparse Crosscoders"); activations are taken to be at least 0.

    Attributes:
        norms: ``"separate"``, as that source has it, or ``"concatenated"``.
    """

    name: ClassVar[str] = "l1"
    spreads: ClassVar[str | None] = "sum"
    norms: str = "separate"

    def of_group(self, group: GroupActivity) -> Tensor:
        """Return one group's part, a number."""
        # First over tokens, then times the norms: (F,) rather than as many products as there are entries.
        return group.mean_over_tokens(group.acts) @ group.norms(self.norms)


@dataclass(frozen=True)
class Quadratic(Penalty):
    """``(2 / L0*) (L0 - L0*)^2``, L0 the mean number of active latents a token (Gemma Scope 2, technical report).

    L0's gradient is JumpReLU's straight-through estimate, which reaches thresholds alone.

    Attributes:
        target: L0*, of each group, or of all together.
        scope: ``"group"``: the sum of every group's penalty; ``"total"``: one penalty on the sum of their L0.
    """

    name: ClassVar[str] = "quadratic"
    rises: ClassVar[bool] = True
    spreads: ClassVar[str | None] = "whole"
    target: float
    scope: str = "group"

    def __post_init__(self) -> None:
        if not self.target > 0:
            raise WiringError(f"the penalty 'quadratic' needs a target L0 above 0, not {self.target}")
        if self.scope not in ("group", "total"):
            raise WiringError(f"scope must be 'group' or 'total', not {self.scope!r}")

    def __call__(self, run: ForwardPass) -> Tensor:
        """Return the penalty on a batch; see `Penalty.__call__`."""
        l0 = run.mesh.over_all(torch.stack([_thresholded(group, self.name).l0() for group in run.groups]))
        l0 = l0.sum() if self.scope == "total" else l0
        return (2 / self.target * (l0 - self.target).square()).sum()


@dataclass(frozen=True)
class Frequent(Penalty):
    """``sum_i ReLU(r_i - limit)``, r_i the share of tokens on which latent i is active: against dense latents.

    A target for L0 alone is also reached with a few latents that are nearly always active. The gradient is that of
    JumpReLU's L0, and reaches thresholds alone. The formula is ours; the demo's crosscoders were trained with it.

    Attributes:
        limit: The share of tokens beyond which a latent counts as dense.
    """

    name: ClassVar[str] = "frequent"
    rises: ClassVar[bool] = True
    spreads: ClassVar[str | None] = "sum"
    limit: float = 0.05

    def __call__(self, run: ForwardPass) -> Tensor:
        """Return the penalty on a batch; see `Penalty.__call__`."""
        rates = [run.mesh.over_tokens(_thresholded(group, self.name).rates()) for group in run.groups]
        return torch.stack([(rate - self.limit).relu().sum() for rate in rates]).sum()


@dataclass(frozen=True)
class Asymmetry(Penalty):
    """Unequal L0 over groups: the mean over groups of ``(L0_g / mean L0 - p_g / mean p)^2``.

    Against depth collapse: in a CLT early layers' latents write to all later ones at little cost, so that late layers
    fall silent. It may force latents on a layer that computes little; the profile of per-layer transcoders trained
    alike is then the better aim than equality.

    Attributes:
        profile: p, one number a group: the L0 they should be in proportion to. None for equal.
        c: None counts active latents, with JumpReLU's straight-through gradient, which reaches thresholds alone. A
            number counts ``sum_i tanh(c D_i a_i)`` instead, for activations without thresholds.
    """

    name: ClassVar[str] = "asymmetry"
    spreads: ClassVar[str | None] = "whole"
    profile: tuple[float, ...] | None = None
    c: float | None = None

    def __post_init__(self) -> None:
        if self.profile is not None:
            object.__setattr__(self, "profile", tuple(self.profile))
            if min(self.profile) < 0 or not sum(self.profile) > 0:
                raise WiringError(f"a profile has one number of at least 0 a group, not {self.profile}")

    def __call__(self, run: ForwardPass) -> Tensor:
        """Return the penalty on a batch; see `Penalty.__call__`. It is 0 where nothing is active at all."""
        if self.c is None:
            l0 = torch.stack([_thresholded(group, self.name).l0() for group in run.groups])
        else:
            l0 = Tanh(1.0, c=self.c).by_group(run)
        l0 = run.mesh.over_all(l0)
        profile = torch.ones_like(l0) if self.profile is None else l0.new_tensor(self.profile)
        if len(profile) != len(l0):
            raise WiringError(f"the profile has {len(profile)} numbers, but there are {len(l0)} groups")
        mean = l0.mean()
        if not bool(mean.detach() > 0):
            return l0.sum() * 0
        return (l0 / mean - profile / profile.mean()).square().mean()


def _thresholded(group: GroupActivity, name: str) -> GroupActivity:
    """Return the group, whose thresholds are all that L0 can be lowered by."""
    if group.threshold is None:
        raise WiringError(
            f"the penalty {name!r} counts active latents, and without thresholds that count has no gradient: use the "
            "activation 'jumprelu', or a penalty such as 'tanh'"
        )
    return group


for _cls in (Tanh, L1, Quadratic, Frequent, Asymmetry):
    PENALTIES.add(_cls.name, _cls)


def from_settings(settings: Sequence[Penalty | Mapping[str, Any]]) -> tuple[Penalty, ...]:
    """Return penalties from values or from plain data, such as ``{"name": "l1", "weight": 0.1}``."""
    return tuple(each if isinstance(each, Penalty) else Penalty.make(**each) for each in settings)
