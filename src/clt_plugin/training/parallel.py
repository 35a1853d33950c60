"""Training by several processes, under ``torchrun``: who has what, and how a crosscoder is spread and put together.

Processes form a mesh of data x latent. Each has a share of every group's latents, with their encoders, biases,
thresholds and decoders, and goes forward on a share of every batch's tokens. Decoders are far too large to be sent
around; reconstructions, (tokens, all that is written), are summed over shares instead. What the loss, the gradients
and an update are does not depend on how many processes there are, to rounding.

`train` does all of this by itself; by hand it is::

    mesh = start(config)
    trainer = Trainer(spread(crosscoder, mesh), config, standard, mesh)     # the first process's crosscoder
    trainer.step(reads, writes)                                             # the whole batch, in every process
    whole = put_together(trainer.crosscoder, mesh)                          # in the first process
"""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.utils import get_total_norm

from clt_plugin.core import Activation, BatchTopK, Crosscoder, Host, Site, TopK, Wiring
from clt_plugin.training._mesh import ALONE, Mesh, by_first, first_alone
from clt_plugin.training.config import ConfigError, TrainConfig

__all__ = [
    "ALONE",
    "Mesh",
    "by_first",
    "check",
    "first_alone",
    "gradient_norm",
    "put_together",
    "share_axis",
    "sizes_of_share",
    "spread",
    "start",
]

PATIENCE = timedelta(hours=2)
"""How long a process waits for the others: for as long as the first may take to write a cache, or to evaluate."""

AXES = {"W_enc": 1, "b_enc": 0, "W_dec": 0, "threshold": 0, "stored_norms": 0}
"""Along which axis each kind of parameter is cut into shares; others every process has whole."""


def start(config: TrainConfig) -> Mesh:
    """Return the mesh that a config asks for of the processes that ``torchrun`` started; `ALONE` without it.

    It joins them, over NCCL where `config.device` is a GPU, of which each process takes the one of its own local rank,
    and else over gloo. A process group that there is already is used.

    Raises:
        ConfigError: So many processes have no such mesh.
    """
    n_latent = config.parallel.latent
    n = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if n % n_latent:
        raise ConfigError(
            f"parallel.latent={n_latent} does not divide the number of processes, {n}: start as many as a multiple of "
            f"it, with torchrun --nproc-per-node {n_latent}, or set parallel.latent to 1"
        )
    if n == 1:
        return ALONE
    kind = torch.device(config.device or "cpu").type
    if not dist.is_initialized():
        if kind == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=PATIENCE)
        # At the very end, since one program may train more than once.
        atexit.register(_leave)
    return Mesh(init_device_mesh(kind, (n // n_latent, n_latent), mesh_dim_names=("data", "latent")))


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def check(config: TrainConfig, activation: Activation, mesh: Mesh) -> None:
    """Refuse what several processes cannot compute exactly.

    Raises:
        ConfigError: Says what, and what to change.
    """
    if mesh.size == 1:
        return
    part = config.batch_size // config.optimizer.accumulate
    if part % mesh.n_data:
        raise ConfigError(
            f"{part} tokens a part of a batch are not shared evenly by {mesh.n_data} processes: choose batch_size, "
            "divided by optimizer.accumulate, as a multiple of that"
        )
    if config.compile:
        raise ConfigError("compile is for one process: set compile to False, or run without torchrun")
    unknown = [penalty.name for penalty in config.sparsity.penalties if penalty.spreads is None]
    if unknown:
        raise ConfigError(
            f"the penalties {', '.join(unknown)} look at all tokens and latents at once, so that several processes "
            "cannot compute them exactly: leave them out, or run in one process"
        )
    if activation.ranks and not isinstance(activation, TopK | BatchTopK):
        raise ConfigError(f"how {activation} selects over several processes is not known: run in one process")


# ---------------------------------------------------------------- shares


def share_axis(crosscoder: Crosscoder, name: str) -> int | None:
    """Return along which axis a parameter is cut into shares, by its name; None where every process has it whole."""
    kind = name.split(".")[0]
    if kind == "threshold" and not crosscoder.activation.has_threshold:
        return None
    return AXES.get(kind)


def sizes_of_share(sizes: int | tuple[int, ...], mesh: Mesh) -> int | tuple[int, ...]:
    """Return how many latents of every group, or of each, a process has.

    Raises:
        ConfigError: A group's latents are not shared evenly.
    """
    uneven = [size for size in ((sizes,) if isinstance(sizes, int) else sizes) if size % mesh.n_latent]
    if uneven:
        raise ConfigError(
            f"{uneven[0]} latents of a group are not shared evenly by {mesh.n_latent} processes: choose n_latents as a "
            "multiple of parallel.latent"
        )
    return sizes // mesh.n_latent if isinstance(sizes, int) else tuple(size // mesh.n_latent for size in sizes)


@dataclass(frozen=True)
class _Shape:
    """All of a crosscoder but its weights."""

    wiring: Wiring
    widths: dict[Site, int]
    sizes: int | tuple[int, ...]
    activation: Activation
    host: Host
    dtype: torch.dtype
    stores_norms: bool

    @classmethod
    def of(cls, it: Crosscoder, sizes: int | tuple[int, ...]) -> _Shape:
        widths = dict(it.layout.width)
        return cls(it.wiring, widths, sizes, it.activation, it.host, it.dtype, it.stored_norms is not None)

    def empty(self, device: torch.device | str) -> Crosscoder:
        """Make a crosscoder with weights of any value."""
        made: dict[str, Any] = {"dtype": self.dtype, "device": "meta"}
        result = Crosscoder(self.wiring, self.widths, self.sizes, self.activation, host=self.host, **made)
        if self.stores_norms:
            norms = (nn.Parameter(torch.empty(n, **made), requires_grad=False) for n in result.group_sizes)
            result.stored_norms = nn.ParameterList(norms)
        return result.to_empty(device=device)


@torch.no_grad()
def spread(crosscoder: Crosscoder | None, mesh: Mesh, device: torch.device | str | None = None) -> Crosscoder:
    """Give every process its share of the first process's crosscoder. All of them call it.

    Args:
        crosscoder: In memory; it stays as it is. Only the first process needs one.
        mesh: Which processes.
        device: Of the shares; the mesh's own by default.

    Returns:
        The share: of the same wiring, with some of every group's latents.
    """
    if mesh.size == 1:
        assert crosscoder is not None
        return crosscoder

    def shape() -> _Shape:
        assert crosscoder is not None
        return _Shape.of(crosscoder, sizes_of_share(crosscoder.group_sizes, mesh))

    share = by_first(shape).empty(mesh.device if device is None else device)
    for name, parameter in share.named_parameters():
        axis, value = share_axis(share, name), parameter.data
        whole = crosscoder.get_parameter(name).data if crosscoder is not None and mesh.is_first else None
        if axis is None or mesh.n_latent == 1:
            if whole is not None:
                value.copy_(whole)
            dist.broadcast(value, src=0)
            continue
        if mesh.data_rank == 0:
            pieces = None
            if whole is not None:
                pieces = [piece.to(value).contiguous() for piece in whole.chunk(mesh.n_latent, axis)]
            dist.scatter(value, pieces, src=0, group=mesh.group("latent"))
        dist.broadcast(value, group=mesh.group("data"), group_src=0)
    return share


@torch.no_grad()
def put_together(share: Crosscoder, mesh: Mesh) -> Crosscoder | None:
    """Return the whole crosscoder in the first process, in the CPU's memory, and None in the others. All call it.

    Args:
        share: This process's.
        mesh: Which processes.

    Returns:
        In one process alone the crosscoder itself.
    """
    if mesh.n_latent == 1:
        return share if mesh.is_first else None
    if mesh.data_rank != 0:
        return None
    whole = None
    if mesh.is_first:
        whole = _Shape.of(share, tuple(size * mesh.n_latent for size in share.group_sizes)).empty("cpu")
        whole.train(share.training).metadata = dict(share.metadata)
    for name, parameter in share.named_parameters():
        axis, value = share_axis(share, name), parameter.data
        if axis is None:
            if whole is not None:
                whole.get_parameter(name).copy_(value)
            continue
        parts = [torch.empty_like(value) for _ in range(mesh.n_latent)] if whole is not None else None
        dist.gather(value.contiguous(), parts, dst=0, group=mesh.group("latent"))
        if whole is not None and parts is not None:
            whole.get_parameter(name).copy_(torch.cat(parts, axis))
    return whole


def as_shared(value: Tensor, axis: int | None, mesh: Mesh) -> Tensor:
    """Return a share as the tensor that all shares make up, for a checkpoint: a view, not a copy.

    Args:
        value: This process's share, or what every process has whole.
        axis: Along which axis it was cut; None for whole.
        mesh: Which processes.
    """
    if mesh.devices is None:
        return value
    cut = Replicate() if axis is None else Shard(axis)
    return DTensor.from_local(value, mesh.devices, (Replicate(), cut), run_check=False)


def gradient_norm(crosscoder: Crosscoder, mesh: Mesh) -> Tensor:
    """Return the norm of the gradients of all parameters as one vector, once they are averaged over tokens."""
    shares: list[Tensor] = []
    whole: list[Tensor] = []
    for name, parameter in crosscoder.named_parameters():
        if parameter.grad is not None:
            (whole if share_axis(crosscoder, name) is None else shares).append(parameter.grad)
    of_shares = mesh.total(get_total_norm(shares).square(), "latent")
    return (of_shares + get_total_norm(whole).square()).sqrt()
