"""From one format to another, layer by layer, verified."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from clt_plugin.core import FORMATS, Crosscoder, FormatError, LazyStore
from clt_plugin.formats._files import CHUNK_BYTES, progress, whole_folder
from clt_plugin.formats.loading import load


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    format: str = "native",
    *,
    dtype: torch.dtype | None = None,
    layers: Iterable[int] | None = None,
    features: Mapping[int, Sequence[int]] | None = None,
    overwrite: bool = False,
    verify: bool = True,
    token: str | None = None,
    revisions: Mapping[str, str] | None = None,
    bar: bool = True,
) -> None:
    """Write a crosscoder in another format: some rows at a time, whatever its size, and whole or not at all.

    Args:
        source: As for `clt_plugin.load`.
        target: The folder to make; neither inside the source's nor around it.
        format: Any registered format that writes.
        dtype: Convert to it; None keeps the files'.
        layers: As for `clt_plugin.load`.
        features: As for `clt_plugin.load`.
        overwrite: Whether a folder that holds something may be replaced.
        verify: Read what was written and compare it, bit by bit, before it takes the target's place.
        token: As for `clt_plugin.load`.
        revisions: As for `clt_plugin.load`.
        bar: Whether to show progress.

    Raises:
        FormatError: The source is damaged, the target's format cannot hold it, or what was written reads differently.
    """
    writer = FORMATS[format]
    if not hasattr(writer, "save"):
        writers = ", ".join(name for name in FORMATS if hasattr(FORMATS[name], "save"))
        raise FormatError(f"the format {format} is only read: write one of {writers}")
    chosen: dict[str, Any] = {"layers": layers, "features": features}
    crosscoder = load(source, dtype=dtype, lazy=True, token=token, revisions=revisions, **chosen)
    _check_apart(crosscoder, target)
    with whole_folder(target, overwrite) as aside:
        bars: dict[str, Any] = {"total": n_bytes(crosscoder), "unit": "B", "unit_scale": True, "disable": not bar}
        with tqdm(desc="writing", **bars) as writing, progress(writing.update):
            writer.save(crosscoder, aside, overwrite=True)
        if verify:
            with tqdm(desc="verifying", **bars) as reading:
                for difference in differences(crosscoder, load(aside, lazy=True), reading.update):
                    raise FormatError(f"what was written differs in {difference}: nothing was kept. Please report this")


def _check_apart(crosscoder: Crosscoder, target: str | os.PathLike[str]) -> None:
    """Refuse a target that holds the folders a lazy crosscoder is read from, or lies in one of them."""
    assert isinstance(crosscoder.store, LazyStore)
    parts = {part for pieces in crosscoder.store.pieces.values() for piece in pieces for part in piece.file.parts}
    there = Path(os.path.realpath(target))
    for folder in {Path(os.path.realpath(os.path.dirname(part.path))) for part in parts}:
        if there in folder.parents or folder in there.parents:
            how = "contains" if there in folder.parents else "is inside"
            raise ValueError(f"the target {there} {how} the source {folder}: give a folder apart from it")


def n_bytes(crosscoder: Crosscoder) -> int:
    """Return how many bytes a lazy crosscoder's weights and vectors take."""
    layout = crosscoder.layout
    count = sum(n * (layout.read_width(g) + layout.write_width(g)) for g, n in enumerate(crosscoder.group_sizes))
    count += sum(layout.width[read] * layout.width[write] for read, write in crosscoder.wiring.skips)
    return (count + sum(vector.numel() for vector in crosscoder.parameters())) * crosscoder.dtype.itemsize


def differences(ours: Crosscoder, theirs: Crosscoder, seen: Callable[[int], Any] = lambda n: None) -> Iterator[str]:
    """Yield what differs between two crosscoders, which are read some rows at a time; ``seen`` is told of bytes."""
    for name in ("wiring", "layout", "activation", "host", "group_sizes", "is_partial", "dtype"):
        if getattr(ours, name) != getattr(theirs, name):
            yield name
            return
    for name in ("b_enc", "b_dec", "threshold", "stored_norms"):
        pair: list[Sequence[Tensor]] = [getattr(crosscoder, name) or () for crosscoder in (ours, theirs)]
        if len(pair[0]) != len(pair[1]) or not all(map(_same, *pair)):
            yield name
        seen(sum(vector.nbytes for vector in pair[0]))
    for g, n in enumerate(ours.group_sizes):
        for kind, width in (("W_enc", ours.layout.read_width(g)), ("W_dec", ours.layout.write_width(g))):
            step = max(1, CHUNK_BYTES // (width * ours.dtype.itemsize))
            for start in range(0, n, step):
                rows = slice(start, min(start + step, n))
                a, b = (crosscoder.store.get(kind, g, rows) for crosscoder in (ours, theirs))
                if not _same(a, b):
                    yield f"{kind} {g}, latents {rows.start} to {rows.stop - 1}"
                seen(a.nbytes)
    for number in range(len(ours.wiring.skips)):
        a, b = (crosscoder.store.get("W_skip", number) for crosscoder in (ours, theirs))
        if not _same(a, b):
            yield f"W_skip {number}"
        seen(a.nbytes)


INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same bit by bit, so that 0 is not -0; nan is nan, whatever its bits."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    bits = [x.detach().contiguous().view(INTEGERS[a.itemsize]) for x in (a, b)]
    # A threshold of BatchTopK that was never measured is nan on both sides.
    return bool(((bits[0] == bits[1]) | (a.isnan() & b.isnan())).all())
