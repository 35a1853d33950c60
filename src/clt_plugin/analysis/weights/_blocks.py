"""Decoder vectors a block at a time: each read once, rows of all targets together, the next while one is used."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from clt_plugin.core.crosscoder import Crosscoder
from clt_plugin.core.errors import WiringError
from clt_plugin.core.wiring import Site

ENTRIES, ROWS = 2**26, 2048
"""A block has at most so many weights, 256 MiB in float32, and so many latents."""


@dataclass(frozen=True, eq=False)
class Block:
    """Some latents of a group, with all that they write.

    Attributes:
        group: The group.
        rows: Which of its latents.
        vectors: {written site: decoder vectors (n, d_site)}, in float32 at least.
    """

    group: int
    rows: slice
    vectors: dict[Site, Tensor]


def check_one_model(clt: Crosscoder) -> None:
    """Refuse a crosscoder over several models, whose layers are not those of one stack."""
    if len(clt.wiring.models) > 1:
        raise WiringError(
            f"this study compares layers of one model, but the crosscoder spans {', '.join(clt.wiring.models)}: see "
            "clt_plugin.analysis.crosscoders for those"
        )


def shown(bar: bool | None) -> bool:
    """Whether to show a bar: by default on a terminal."""
    return sys.stderr.isatty() if bar is None else bar


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which weights of a dtype are measured: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def blocks(clt: Crosscoder, bar: bool | None = None, what: str = "decoders", entries: int = ENTRIES) -> Iterator[Block]:
    """Read all decoders, groups one after another, each weight once.

    Args:
        clt: The crosscoder.
        bar: Whether to show progress; by default on a terminal.
        what: What the bar says.
        entries: How many weights a block has at most.
    """
    from tqdm.auto import tqdm

    parts = [(g, rows) for g in range(clt.wiring.n_groups) for rows in _rows(clt, g, entries)]

    progress = tqdm(total=sum(clt.group_sizes), desc=what, unit="latent", disable=not shown(bar))
    with progress, ThreadPoolExecutor(1) as ahead:
        pending = ahead.submit(read_block, clt, *parts[0])
        for following in [*parts[1:], None]:
            block = pending.result()
            if following is not None:
                pending = ahead.submit(read_block, clt, *following)
            yield block
            progress.update(block.rows.stop - block.rows.start)


def read_block(clt: Crosscoder, group: int, rows: slice | Tensor) -> Block:
    """Read some latents' decoder vectors; a block of rows given one by one has the slice from 0."""
    weight = clt.store.get("W_dec", group, rows).detach()
    weight = weight.to(wide(weight.dtype))
    vectors = {site: weight[:, columns] for site, columns in clt.layout.write_slices[group].items()}
    return Block(group, rows if isinstance(rows, slice) else slice(0, len(rows)), vectors)


def _rows(clt: Crosscoder, group: int, entries: int) -> Iterator[slice]:
    size = clt.group_sizes[group]
    step = min(ROWS, max(1, entries // clt.layout.write_width(group)))
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
