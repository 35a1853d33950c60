"""What a run will need, before it begins: memory, disk and time, from a config, a wiring and the widths of sites.

Under Adam a parameter takes 16 bytes: 4 each for the weight, its gradient and two moments. With B tokens a step, R the
width that a group reads, W the width that it writes, F its latents and k those that are active, a step takes::

    dense    2 B F (2 R + 3 W)                      floating-point operations a group
    sparse   2 B F R + 2 B k (R + 3 W)

since the encoder's product is needed for every latent, and all else (the encoder's gradient, the decode and its two
gradients) for active ones alone. Nothing is allocated to find out.
"""

from __future__ import annotations

import functools
import os
import shutil
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clt_plugin.adapters.huggingface import HostModel, plain_model
from clt_plugin.core import Crosscoder, Site, Wiring
from clt_plugin.training._selection import SPARSE_FORMS
from clt_plugin.training.config import ConfigError, TrainConfig
from clt_plugin.training.prepare import is_source
from clt_plugin.training.sparse import SPARSE_BELOW

if TYPE_CHECKING:
    import pandas as pd

SAMPLE = 4096
"""Tokens held to begin with: see `clt_plugin.training.prepare.measure`."""
ACTIVE = 50
"""Latents of a group taken to be active on a token where a config does not say."""
PER_ENTRY = 48
"""Bytes of a sparse step for each active latent of a token: indices, values and their gradients."""
PER_LATENT = 24
"""Bytes of a dense step for each latent of a token: pre-activations, activations, a penalty's, and their gradients.

With these a step of 6 groups comes out at 0.9 to 1.8 times the peak measured (TopK, BatchTopK, JumpReLU; 1,024 tokens
of 2,048 latents and 2,048 of 4,096)."""
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will need. Sizes are in bytes, of one process where there are several, unless said otherwise.

    Attributes:
        config: The run's.
        wiring: The crosscoder's.
        world: Over how many processes the run is spread.
        n_parameters: Of the whole crosscoder.
        weights: In float32.
        gradients: Likewise.
        adam: Its two moments.
        copy: A copy of the weights, which evaluation and the end fold.
        step: What a step holds besides: activations, reconstructions, their gradients.
        buffer: Tokens that wait to be drawn, and those on their way.
        statistics: Means and scales, and the sample that latents start from.
        model: The model's weights.
        dense_flops: Floating-point operations of a step where every latent is computed.
        sparse_flops: Those of a step on active latents alone.
        model_flops: Those of harvesting one step's tokens.
        checkpoint: A checkpoint's size, of all processes together.
        disk: What the run's folder will come to: checkpoints, one more while it is written, and the result.
        cache: What the cache of activations comes to; 0 without one, or without a number of tokens.
    """

    config: TrainConfig
    wiring: Wiring
    world: int
    n_parameters: int
    weights: int
    gradients: int
    adam: int
    copy: int
    step: int
    buffer: int
    statistics: int
    model: int
    dense_flops: float
    sparse_flops: float
    model_flops: float
    checkpoint: int
    disk: int
    cache: int

    @property
    def state(self) -> int:
        """Weights, gradients and Adam's moments."""
        return self.weights + self.gradients + self.adam

    @property
    def memory(self) -> int:
        """The most that the run holds at a time: copies are made between steps, and statistics before the buffer."""
        return self.state + max(self.step, self.copy) + max(self.buffer, self.statistics) + self.model

    def seconds(self, device: Any = None) -> float:
        """Return about how long the run takes at least, by the rate of matrix products measured on a device.

        Reading memory, Adam, evaluation and everything that is no product come on top.
        """
        rate = matmul_rate(str(device or self.config.device or "cpu"), self.config.precision)
        return self.config.n_steps * (min(self.sparse_flops, self.dense_flops) + self.model_flops) / rate

    def timed(self) -> str:
        """Return a line on how long the run takes at least, where its device is at hand to be measured."""
        device = torch.device(self.config.device or "cpu")
        if device.type == "cuda" and not torch.cuda.is_available():
            return "  time              not measured: there is no GPU here"
        hours = self.seconds() / 3600
        rate = matmul_rate(str(device), self.config.precision)
        return f"  time              {hours:,.2f} h at least, at {rate / 1e9:,.0f} GFLOP/s measured on {device}"

    @property
    def table(self) -> pd.DataFrame:
        """One row for each quantity, with the columns quantity, value and unit; without times, which are measured."""
        import pandas

        sizes = ("weights", "gradients", "adam", "copy", "step", "buffer", "statistics", "model", "memory")
        rows: list[tuple[str, float, str]] = [("parameters", self.n_parameters, "")]
        rows += [(name, getattr(self, name) / GB, "GB") for name in (*sizes, "checkpoint", "disk", "cache")]
        flops = ("dense_flops", "sparse_flops", "model_flops")
        rows += [(name, getattr(self, name) / 1e9, "GFLOP a step") for name in flops]
        return pandas.DataFrame(rows, columns=["quantity", "value", "unit"])

    def __str__(self) -> str:
        each = "" if self.world == 1 else f" in each of {self.world} processes"
        lines = [
            f"{self.config.name}: {self.wiring!r}",
            f"  parameters        {_count(self.n_parameters)}",
            f"  memory            {_size(self.memory)}{each}",
            f"    weights, gradients, Adam  {_size(self.state)}",
            f"    a step                    {_size(self.step)}",
            f"    a folded copy             {_size(self.copy)}",
            f"    buffer of tokens          {_size(self.buffer)}",
            f"    statistics and sample     {_size(self.statistics)}",
        ]
        if self.model:
            lines.append(f"    the model                 {_size(self.model)}")
        lines.append(f"  disk              {_size(self.disk)}, of which a checkpoint is {_size(self.checkpoint)}")
        if self.cache:
            lines.append(f"  cache             {_size(self.cache)}")
        lines.append(
            f"  a step            {self.sparse_flops / 1e9:,.1f} GFLOP on active latents, "
            f"{self.dense_flops / 1e9:,.1f} on all; {self.config.n_steps:,} steps of {self.config.batch_size:,} tokens"
        )
        return "\n".join(lines)

    def check(self, device: Any = None, output: str | os.PathLike[str] | None = None) -> None:
        """Refuse a run that cannot fit.

        Args:
            device: Where it is trained; the config's by default.
            output: The run's folder; None for a run that writes nothing.

        Raises:
            ConfigError: Memory or disk is too small. Says what is needed, what there is, and what to change.
        """
        device = torch.device(device or self.config.device or "cpu")
        free = free_memory(device)
        # Processes on one machine share its memory; each GPU has its own.
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device.type == "cpu" and self.world > 1 else 1
        if free is not None and self.memory * sharing > free:
            raise ConfigError(
                f"the run needs {_size(self.memory * sharing)} of memory on {device} (weights, gradients and Adam "
                f"{_size(self.state * sharing)}, a step {_size(self.step * sharing)}, the buffer "
                f"{_size(self.buffer * sharing)}), and {_size(free)} are free: {'; '.join(self._advice())}"
            )
        for what, needed, folder in (("folder", self.disk, output), ("cache", self.cache, self.config.data.cache)):
            if folder is None or not needed:
                continue
            # What a run that is gone on with has written already is replaced, and not needed again.
            there = free_disk(Path(folder)) + _held(Path(folder))
            if needed > there:
                how = "lower checkpoints.keep" if what == "folder" else "lower data.cache_tokens"
                raise ConfigError(
                    f"the run's {what} comes to {_size(needed)}, and the disk of {folder} has {_size(there)} free: "
                    f"make room, choose another disk, or {how}"
                )

    def _advice(self) -> list[str]:
        """Say what would take less memory, what takes most first."""
        advice = ["train fewer latents (n_latents)"]
        if any(len(writes) > 4 for writes in self.wiring.writes):
            advice.append('limit the span (wiring={"name": "local_clt", "span": 4})')
        if self.step > 0.1 * self.memory:
            advice.append("go through each batch in parts (optimizer.accumulate), or make it smaller (batch_size)")
        if self.buffer > 0.1 * self.memory:
            advice.append('hold fewer tokens (data.buffer), or hold them in half the bytes (data.dtype="bfloat16")')
        advice.append("or spread latents over more processes (parallel.latent, under torchrun)")
        return advice


def estimate(
    config: TrainConfig,
    wiring: Wiring,
    widths: int | Mapping[Any, int],
    *,
    model_bytes: int = 0,
    world: int = 1,
) -> Estimate:
    """Estimate what a run needs. Nothing is allocated.

    Args:
        config: The run's.
        wiring: The crosscoder's: `clt_plugin.training.prepare.wiring_of` makes it from a config and a model.
        widths: Of every site, or by model name, or by `Site`, as `Crosscoder` takes them.
        model_bytes: The model's weights, taken to be float32; 0 for a model that is loaded already.
        world: How many processes there are; latents are spread over ``config.parallel.latent`` of them.

    >>> found = estimate(TrainConfig(n_latents=10_000), Wiring.clt(12), 768)           # GPT-2 small
    >>> found.n_parameters, round(found.state / 1e9)
    (691449216, 11)
    """
    n_shards = config.parallel.latent
    if world % n_shards:
        raise ConfigError(f"{world} processes cannot be shared out in rows of parallel.latent={n_shards}")
    # On the device that has no memory: sizes are those that the crosscoder itself makes.
    crosscoder = Crosscoder(wiring, widths, config.n_latents, config.activation, device="meta")
    total = sum(p.numel() for p in crosscoder.parameters())
    learnt = sum(p.numel() for p in crosscoder.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in (*crosscoder.b_dec, *crosscoder.W_skip))
    mine = whole + (learnt - whole) // n_shards
    sites = {site: crosscoder.layout.width[site] for site in (*wiring.read_sites, *wiring.write_sites)}
    tokens = config.batch_size * n_shards // world
    dense, sparse = _flops(crosscoder, _active(config, crosscoder), tokens)
    n_latents = sum(crosscoder.group_sizes)
    checkpoint = 12 * learnt + 8 * n_latents
    at_tokens = max(crosscoder.group_sizes) if config.start.decoders == "tokens" else 0
    waiting = config.data.buffer + 3 * config.data.rows * config.data.length
    per_token = sum(sites.values())
    cached = config.data.cache_tokens if config.data.cache is not None else None
    return Estimate(
        config=config,
        wiring=wiring,
        world=world,
        n_parameters=total,
        weights=4 * mine,
        gradients=4 * mine,
        adam=8 * mine,
        copy=4 * mine,
        step=_step_bytes(config, crosscoder, sites, tokens),
        buffer=waiting * per_token * BYTES[config.data.dtype],
        statistics=per_token * (16 + 8 * (at_tokens + SAMPLE)),
        model=model_bytes,
        dense_flops=dense / n_shards,
        sparse_flops=sparse / n_shards,
        model_flops=2.0 * model_bytes / 4 * tokens,
        checkpoint=checkpoint,
        disk=(config.checkpoints.keep + 1) * checkpoint + 4 * total,
        cache=(cached or 0) * per_token * BYTES[config.data.cache_dtype],
    )


def widths_of(models: Mapping[str, Any], data: Any, wiring: Wiring) -> dict[Site, int]:
    """Return how wide the sites of a wiring are, those that there are.

    Args:
        models: {name: model}; empty where data are activations.
        data: A `Source` of activations; anything else is texts, and the models say it.
        wiring: Whose sites.
    """
    if is_source(data):
        known = dict(zip(data.sites, data.widths, strict=True))
    else:
        known = {}
        for name, model in models.items():
            with plain_model(model) as hf:
                width = HostModel.of(hf).d_model
            known |= {site: width for site in (*wiring.read_sites, *wiring.write_sites) if site.model == name}
    return {site: known[site] for site in (*wiring.read_sites, *wiring.write_sites) if site in known}


def check_room(
    config: TrainConfig, models: Mapping[str, Any], data: Any, wiring: Wiring, output: Path | None, world: int = 1
) -> None:
    """Refuse a run of models that are loaded that cannot fit: see `Estimate.check`.

    Args:
        config: The run's.
        models: {name: model}, as sites name them.
        data: As `train` takes it.
        wiring: The crosscoder's.
        output: The run's folder; None for none.
        world: How many processes there are.
    """
    widths = widths_of(models, data, wiring)
    # Where a site is not there, whoever opens the source says so.
    if all(site in widths for site in (*wiring.read_sites, *wiring.write_sites)):
        estimate(config, wiring, widths, world=world).check(output=output)


def _active(config: TrainConfig, crosscoder: Crosscoder) -> list[float]:
    """Return how many latents of each group are taken to be active on a token."""
    n_groups, target = crosscoder.wiring.n_groups, config.sparsity.target_l0
    k = getattr(config.activation, "k", None)
    if k is not None:
        wanted = [float(k)] * n_groups
    elif target is not None:
        wanted = [target / n_groups] * n_groups if isinstance(target, int | float) else [float(t) for t in target]
    else:
        wanted = [float(ACTIVE)] * n_groups
    return [min(active, size) for active, size in zip(wanted, crosscoder.group_sizes, strict=True)]


def _flops(crosscoder: Crosscoder, active: list[float], n_tokens: int) -> tuple[float, float]:
    """Return the floating-point operations of a step, dense and sparse."""
    dense = sparse = 0.0
    for g, (size, k) in enumerate(zip(crosscoder.group_sizes, active, strict=True)):
        reads, writes = crosscoder.layout.read_width(g), crosscoder.layout.write_width(g)
        dense += 2 * n_tokens * size * (2 * reads + 3 * writes)
        sparse += 2 * n_tokens * (size * reads + k * (reads + 3 * writes))
    return dense, sparse


def _step_bytes(config: TrainConfig, crosscoder: Crosscoder, sites: Mapping[Site, int], n_tokens: int) -> int:
    """Return what a step holds besides weights and gradients."""
    part, n_shards = n_tokens // config.optimizer.accumulate, config.parallel.latent
    written = sum(sites[site] for site in crosscoder.wiring.write_sites)
    # The batch as drawn and in standard units; of a part the reconstruction, its error and their gradients.
    result = 8 * n_tokens * sum(sites.values()) + 16 * part * written
    active, sizes = _active(config, crosscoder), crosscoder.group_sizes
    if _starts_sparse(config, active, sizes):
        # Pre-activations of one group at a time, and what selects among them.
        return int(result + part * (8 * max(sizes) / n_shards + PER_ENTRY * sum(active)))
    return int(result + PER_LATENT * part * sum(sizes) / n_shards)


def _starts_sparse(config: TrainConfig, active: list[float], sizes: tuple[int, ...]) -> bool:
    """Whether a step is sparse from the first one on: where it becomes so later, the first ones decide."""
    if config.compile or config.path == "dense" or type(config.activation) not in SPARSE_FORMS:
        return False
    chosen = getattr(config.activation, "k", None) is not None
    rate = config.start.firing_rate
    density = max(a / s for a, s in zip(active, sizes, strict=True)) if chosen else 0.5 if rate is None else rate
    return config.path == "sparse" or density < SPARSE_BELOW


# ---------------------------------------------------------------- what there is


def free_memory(device: torch.device) -> int | None:
    """Return how many bytes are free on a device; None where it does not say."""
    if device.type == "cpu":
        import psutil

        return int(psutil.virtual_memory().available)
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None


def free_disk(folder: Path) -> int:
    """Return how many bytes are free where a folder is, or will be."""
    there = folder.resolve()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def _held(folder: Path) -> int:
    """Return how many bytes a folder's files have."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@functools.cache
def matmul_rate(device: str, precision: str = "float32") -> float:
    """Return the floating-point operations a second of matrix products on a device, measured in a fraction of a second.

    Args:
        device: Such as ``"cpu"`` or ``"cuda"``.
        precision: ``"float32"`` or ``"bfloat16"``.
    """
    size = 4096 if device.startswith("cuda") else 1024
    a = torch.rand(size, size, device=device, dtype=getattr(torch, precision))

    def once() -> float:
        began = time.perf_counter()
        (a @ a)[0, 0].item()  # which waits for it
        return time.perf_counter() - began

    once()
    return 2 * size**3 / statistics.median(once() for _ in range(5))


def _size(n_bytes: float) -> str:
    """Return a size for people.

    >>> _size(11_061_395_456), _size(3_000_000)
    ('11.1 GB', '3.0 MB')
    """
    return f"{n_bytes / GB:.1f} GB" if n_bytes >= GB else f"{n_bytes / 1e6:.1f} MB"


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.2f} M"
