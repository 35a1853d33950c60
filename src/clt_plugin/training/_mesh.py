"""Processes that train one crosscoder together, and what they tell each other.

The convention that makes every gradient right: a process computes the loss of its own tokens. What its latents add to
a sum over all latents is summed over processes in the forward pass, and the backward pass is the identity, since every
process goes backward from the same sum. What is a mean over tokens is averaged over processes in the forward pass,
backward the identity too, and gradients are averaged over processes before the update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


class Mesh:
    """Data x latent processes: those of a row share their tokens, those of a column share their latents.

    Without a `DeviceMesh` it is one process alone, whose every sum and mean is the value itself.

    Args:
        devices: With the axes ``"data"`` and ``"latent"``, over all processes, in the order of their ranks.

    Attributes:
        devices: Likewise.
        n_data: Over how many processes tokens are spread.
        n_latent: Over how many processes latents are spread.
        data_rank: Whose share of the tokens this process has.
        latent_rank: Whose share of the latents this process has.
    """

    def __init__(self, devices: DeviceMesh | None = None) -> None:
        self.devices = devices
        self.n_data, self.n_latent, self.data_rank, self.latent_rank = 1, 1, 0, 0
        self._groups: dict[str, Any] = {}
        if devices is not None:
            self.n_data, self.n_latent = devices.size(0), devices.size(1)
            self.data_rank, self.latent_rank = devices.get_local_rank("data"), devices.get_local_rank("latent")
            self._groups = {axis: devices.get_group(axis) for axis in ("data", "latent")}

    def __repr__(self) -> str:
        return f"Mesh({self.n_data} x {self.n_latent}, here {self.data_rank}, {self.latent_rank})"

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self.n_data * self.n_latent

    @property
    def rank(self) -> int:
        """Which process this is: rows of the mesh follow each other."""
        return self.data_rank * self.n_latent + self.latent_rank

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and shows."""
        return self.rank == 0

    def group(self, axis: str | None) -> Any:
        """Return the processes along an axis, ``"data"`` or ``"latent"``, or None for all."""
        return None if axis is None else self._groups[axis]

    def rows(self, n: int) -> slice:
        """Return which of n tokens, a number that `n_data` divides, are this process's."""
        size = n // self.n_data
        return slice(self.data_rank * size, (self.data_rank + 1) * size)

    # ---------------------------------------------------------------- with gradients

    def over_latents(self, value: Tensor) -> Tensor:
        """Return the sum over the shares of the latents; backward the identity."""
        return value if self.n_latent == 1 else _Reduced.apply(value, lambda v: self._sum(v, "latent"))

    def over_tokens(self, value: Tensor) -> Tensor:
        """Return the mean over the shares of the tokens; backward the identity."""
        return value if self.n_data == 1 else _Reduced.apply(value, lambda v: self._sum(v, "data") / self.n_data)

    def over_all(self, value: Tensor) -> Tensor:
        """Return the sum over the shares of the latents and the mean over those of the tokens, likewise."""
        return self.over_tokens(self.over_latents(value))

    # ---------------------------------------------------------------- without

    def total(self, value: Tensor, axis: str | None = None) -> Tensor:
        """Return the sum over processes, along one axis or of all."""
        return value if self.size == 1 else self._sum(value.detach(), axis)

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean over all processes: the same number everywhere, to the last bit."""
        return value if self.size == 1 else self._sum(value.detach(), None) / self.size

    def any_token(self, masks: Iterable[Tensor]) -> list[Tensor]:
        """Return masks of latents, (F,) of bool each, set where they are set for any share of the tokens."""
        masks = list(masks)
        if self.n_data == 1:
            return masks
        counts = self._sum(torch.cat(masks).int(), "data")
        return list((counts > 0).split([len(mask) for mask in masks]))

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set in any process."""
        if self.size == 1:
            return flag
        return bool(self._sum(torch.tensor(int(flag), device=self.device), None))

    def gathered(self, value: Tensor, axis: str | None) -> Tensor:
        """Return the value that each process has, (n, ...), along an axis or of all; shapes are the same."""
        group = self.group(axis)
        parts = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, value.contiguous(), group=group)
        return torch.stack(parts)

    def average(self, gradient: Tensor, is_share: bool) -> None:
        """Average a gradient over processes, in place.

        Args:
            gradient: Of this process's tokens.
            is_share: Whether it is of this process's share of the latents. What every process has whole is averaged
                over all of them: they have the same gradient but for rounding, which must not drive them apart.
        """
        n = self.n_data if is_share else self.size
        if n > 1:
            dist.all_reduce(gradient, group=self.group("data" if is_share else None))
            gradient /= n

    @property
    def device(self) -> torch.device:
        """Where what is told to each other must be."""
        kind = "cpu" if self.devices is None else self.devices.device_type
        return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)

    def _sum(self, value: Tensor, axis: str | None) -> Tensor:
        result = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result, group=self.group(axis))
        return result


class _Reduced(torch.autograd.Function):
    """A value summed or averaged over processes; backward the identity."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        return reduce(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


ALONE = Mesh()
"""One process."""


# ---------------------------------------------------------------- all processes, whatever their mesh


def first_alone(function: Callable[[], T]) -> T | None:
    """Have the first process call a function while the others wait; return what it returned there, None elsewhere.

    What it raises is raised in every process, so that none waits for what does not come.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return function()
    result: T | None = None
    failed: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            result = function()
        except Exception as error:
            failed[0] = error
    dist.broadcast_object_list(failed, src=0)
    if failed[0] is not None:
        raise failed[0]
    return result


def by_first(function: Callable[[], T]) -> T:
    """Have the first process call a function, and return what it returned, pickled, in every process."""
    found: list[Any] = [first_alone(function)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(found, src=0)
    result: T = found[0]
    return result
