"""A controller that reaches a target L0 by weighing sparsity penalties."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LARGEST_ERROR = 1.0
"""Errors of log L0 beyond this count as this much: the weight rises no faster for a start that is very dense."""
LARGEST_INTEGRATED = 0.3
"""In the integral, errors count as no more than this, so that the way down from a dense start does not wind it up."""


@dataclass
class L0Controller:
    """Weighs sparsity penalties such that L0, the mean number of active latents a token, comes to a target.

    A proportional-integral controller on logarithms: with ``e = log(L0 / target)``, L0 averaged over about
    ``horizon / 20`` steps, the penalty's weight is multiplied with ``exp(gain * e + sum of e over steps * 2 gain^2 /
    horizon)``, large errors counting less. Logarithms, since neither the scale of a penalty's weight nor how L0 depends
    on it is known. Training answers a change of the weight late; the proportional part lets go of the weight as soon as
    L0 falls, before the integral would have it undershoot. Begin with a weight that is too small rather than too large:
    what a far too large one silences in the first steps comes back slowly.

    Call `update` after each step, and give `clt_plugin.training.penalties.total` the `pressure`.

    Attributes:
        target: L0 of every group together, a number; or one number a group, (n_groups,).
        horizon: Over about how many steps the integral acts: no less than training takes to answer a change of the
            weight (some tens of steps under Adam), and much less than the run; a fortieth of it, say.
        gain: How strongly to react. At 1 a run comes to its target without swinging; at 4 it may fall silent first.
        limit: The largest and smallest factor are exp(+-limit).
        smoothed: State: log L0 averaged, one number or one a group; empty before the first update.
        integral: State: the integral part of the log factor, likewise.
    """

    target: float | Sequence[float]
    horizon: int = 50
    gain: float = 1.0
    limit: float = 12.0
    smoothed: list[float] = field(default_factory=list)
    integral: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._targets = self._numbers(self.target)
        if min(self._targets) <= 0 or self.horizon < 1 or self.gain <= 0:
            raise ValueError(f"a target L0, a horizon and a gain are above 0: got {self}")

    @staticmethod
    def _numbers(values: float | Sequence[float] | Tensor) -> list[float]:
        return [float(value) for value in torch.as_tensor(values, dtype=torch.float64).flatten()]

    @property
    def pressure(self) -> float | list[float]:
        """What to multiply sparsity penalties with: one number, or one a group, as the target has them."""
        factors = [
            math.exp(self._clamped(self.gain * self._error(i) + self.integral[i])) if self.smoothed else 1.0
            for i in range(len(self._targets))
        ]
        return factors[0] if isinstance(self.target, int | float) else factors

    def update(self, l0: Sequence[float] | Tensor) -> None:
        """Take in a step's L0.

        Args:
            l0: Active latents a token of each group, (n_groups,).
        """
        measured = self._numbers(l0)
        if isinstance(self.target, int | float):
            measured = [sum(measured)]
        if len(measured) != len(self._targets):
            raise ValueError(f"the targets are {self.target}, but L0 came for {len(measured)} groups")
        # A group in which nothing fires counts as one far below its target, not infinitely far.
        logs = [math.log(max(value, 1e-3 * aim)) for value, aim in zip(measured, self._targets, strict=True)]
        if not self.smoothed:
            self.smoothed, self.integral = logs, [0.0] * len(logs)
        keep = math.exp(-20 / self.horizon)
        self.smoothed = [keep * old + (1 - keep) * new for old, new in zip(self.smoothed, logs, strict=True)]
        rate = 2 * self.gain**2 / self.horizon
        for i, total in enumerate(self.integral):
            self.integral[i] = self._clamped(total + rate * _within(self._error(i), LARGEST_INTEGRATED))

    def _error(self, i: int) -> float:
        return _within(self.smoothed[i] - math.log(self._targets[i]), LARGEST_ERROR)

    def _clamped(self, value: float) -> float:
        return _within(value, self.limit)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, a few numbers, for a checkpoint."""
        return {"smoothed": list(self.smoothed), "integral": list(self.integral)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state back."""
        self.smoothed, self.integral = list(state["smoothed"]), list(state["integral"])


def _within(value: float, limit: float) -> float:
    return min(limit, max(-limit, value))
