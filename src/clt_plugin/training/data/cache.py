"""Activations on disk: safetensors shards and a manifest, whole shards only, checked when they are read.

A shard has ``values`` (tokens, width), ``ids`` (tokens,) and, for int8, ``scales`` (tokens, sites): int8 keeps
``round(127 x / max|x|)`` with the largest value of each token at each site, so that a value is off by at most
``max|x| / 254``. What rounding costs is measured as shards are written: `ActivationCache.relative_error`.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, count, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clt_plugin.core.aside import written_aside
from clt_plugin.core.wiring import Site
from clt_plugin.training.data._manifest import NAME, Manifest, Shard
from clt_plugin.training.data.activations import (
    Activations,
    Chunk,
    Cursor,
    DataError,
    Source,
    check_whole,
    permutation,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


class ActivationCache:
    """Activations in a folder that `write_cache` wrote: a `Source`.

    A shard is checked in full before anything of it is used.

    Args:
        folder: The folder.
        on_broken: ``"refuse"``: a missing, truncated or changed shard is an error that names it; ``"skip"``: it is
            named in a warning and left out.
        chunk_tokens: How many tokens a chunk has, at most.
        shuffle: A seed: chunks come in an order drawn from it, another one each epoch; in the order of the harvest by
            default. A `Buffer` mixes tokens of `capacity / chunk_tokens` places of the whole cache then.
        epochs: How often the cache is read; None for: without end.
        dtype: What chunks are in: float32 or bfloat16.
        device: Where they are put.

    Attributes:
        folder: The folder.
        manifest: What it says of itself.
        sites: The sites, in the order of columns.
        widths: Each one's width.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        on_broken: str = "refuse",
        chunk_tokens: int = 4096,
        shuffle: int | None = None,
        epochs: int | None = 1,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
    ) -> None:
        check_whole("chunk_tokens", chunk_tokens, 1)
        if epochs is not None:
            check_whole("epochs", epochs, 1)
        if on_broken not in ("refuse", "skip"):
            raise DataError(f"on_broken is 'refuse' or 'skip', not {on_broken!r}")
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        self.sites, self.widths = self.manifest.sites, self.manifest.widths
        self.on_broken, self.chunk_tokens, self.shuffle, self.epochs = on_broken, chunk_tokens, shuffle, epochs
        self.dtype, self.device = dtype, device
        self._damage: dict[str, str | None] = {}
        self._known: set[str] = set()
        if not self.manifest.complete:
            warnings.warn(
                f"{self.folder} is not complete: it has {len(self):,} tokens; write_cache with the same arguments "
                "goes on where it stopped",
                stacklevel=2,
            )

    def __len__(self) -> int:
        """The number of tokens, those of broken shards among them."""
        return self.manifest.tokens

    @property
    def relative_error(self) -> dict[Site, float]:
        """For each site, the root of its summed squared rounding errors over that of its summed squares."""
        pairs = zip(
            zip(*(shard.squared_errors for shard in self.manifest.shards), strict=True),
            zip(*(shard.squares for shard in self.manifest.shards), strict=True),
            strict=True,
        )
        found = [(sum(errors) / max(sum(squares), 1e-300)) ** 0.5 for errors, squares in pairs]
        return dict(zip(self.sites, found, strict=False))

    def broken(self) -> dict[str, str]:
        """Check every shard, and return {file: what is wrong with it}."""
        found = {shard.file: self._damage_of(shard) for shard in self.manifest.shards}
        return {file: damage for file, damage in found.items() if damage}

    def identity(self) -> dict[str, Any]:
        """Say by plain data what decides which activations come; see `Source.identity`."""
        dtype = str(self.dtype).removeprefix("torch.")
        settings = {"chunk_tokens": self.chunk_tokens, "shuffle": self.shuffle, "read_as": dtype}
        return {**self.manifest.identity, **settings, "on_broken": self.on_broken}

    def __iter__(self) -> Iterator[Chunk]:
        """Give all chunks, from the beginning."""
        return self.chunks()

    def chunks(self, start: Cursor | None = None) -> Iterator[Chunk]:
        """Read chunks, from a cursor on; see `Source.chunks`.

        Raises:
            DataError: A shard is broken, and `on_broken` is ``"refuse"``; or no shard is whole.
        """
        start = start or Cursor()
        places = [
            (shard, begin, min(begin + self.chunk_tokens, shard.tokens))
            for shard in self.manifest.shards
            for begin in range(0, shard.tokens, self.chunk_tokens)
        ]
        for epoch in count(start.epoch):
            if self.epochs is not None and epoch >= self.epochs:
                return
            order: Any = range(len(places))
            if self.shuffle is not None:
                order = permutation(len(places), "chunks", self.shuffle, epoch).tolist()
            first = start.item if epoch == start.epoch else 0
            empty = True
            for number in range(first, len(places)):
                shard, begin, end = places[order[number]]
                if self._usable(shard):
                    empty = False
                    yield self._chunk(shard, begin, end, Cursor(epoch, number + 1))
            if empty and not first:
                raise DataError(f"{self.folder} has no shard that can be read: write the cache again")

    def _damage_of(self, shard: Shard) -> str | None:
        if shard.file not in self._damage:
            self._damage[shard.file] = shard.damage(self.folder)
        return self._damage[shard.file]

    def _usable(self, shard: Shard) -> bool:
        damage = self._damage_of(shard)
        if damage is None:
            return True
        what = f"{self.folder / shard.file} {damage}"
        if self.on_broken == "refuse":
            raise DataError(
                f"{what}: write_cache with the same arguments writes it again, on_broken='skip' leaves it out"
            )
        if shard.file not in self._known:
            self._known.add(shard.file)
            warnings.warn(f"{what}: its {shard.tokens:,} tokens are left out", stacklevel=3)
        return False

    def _chunk(self, shard: Shard, begin: int, end: int, after: Cursor) -> Chunk:
        from safetensors import safe_open

        with safe_open(self.folder / shard.file, framework="pt") as file:
            tensors = {key: file.get_slice(key)[begin:end] for key in file.keys()}  # noqa: SIM118 - not a mapping
        flat = _unpacked(tensors, self.widths, self.dtype).to(self.device)
        return Chunk(Activations(flat, self.sites, self.widths), tensors["ids"].long(), after)


# ---------------------------------------------------------------- writing


def write_cache(
    source: Source,
    folder: str | os.PathLike[str],
    *,
    dtype: str = "bfloat16",
    max_tokens: int | None = None,
    shard_bytes: int = 2**28,
    bar: bool | None = None,
) -> ActivationCache:
    """Write a source's activations to a folder.

    A folder that was begun with the same source and settings is gone on with: whole shards stay, broken ones are
    written again, the rest is added. A shard appears once it is whole, however the run ends.

    Args:
        source: Where activations come from, such as a `Harvest`.
        folder: Where to; made if missing.
        dtype: What is kept: ``"float32"``, ``"bfloat16"`` (a relative error of about 2e-3) or ``"int8"``.
        max_tokens: Stop after so many tokens, or a few more: chunks are kept whole. All by default.
        shard_bytes: About how large a shard is; twice that is held in memory.
        bar: Whether to show progress; by default on a terminal.

    Returns:
        The cache.

    Raises:
        DataError: The folder holds something else, or cannot be written (a full disk): what is there stays.
    """
    from tqdm.auto import tqdm

    if dtype not in DTYPES:
        raise DataError(f"activations are kept as {', '.join(DTYPES)}, not as {dtype!r}")
    check_whole("shard_bytes", shard_bytes, 1)
    if max_tokens is not None:
        check_whole("max_tokens", max_tokens, 1)
    folder, limits = Path(folder), {"shard_bytes": shard_bytes, "max_tokens": max_tokens}
    manifest = _begin(folder, Manifest(dtype, source.sites, source.widths, source.identity(), limits))
    shown = None if bar is None else not bar
    chunks, at, tokens = source.chunks(), Cursor(), 0
    with tqdm(total=max_tokens, desc="harvesting", unit="token", unit_scale=True, disable=shown) as progress:
        for index in count():
            start = manifest.shards[index - 1].after if index else Cursor()
            enough = max_tokens is not None and tokens >= max_tokens
            known = index < len(manifest.shards)
            if enough or (not known and manifest.complete):
                break
            if known and manifest.shards[index].damage(folder) is None:
                tokens += manifest.shards[index].tokens
                progress.update(manifest.shards[index].tokens)
                continue
            if at != start:
                chunks = source.chunks(start)
            left = None if max_tokens is None else max_tokens - tokens
            pile = _Pile(chunks, source.widths, dtype, shard_bytes, left)
            if not pile.tokens:
                break
            shard = pile.write(folder / f"shard-{index:05d}.safetensors")
            manifest, at = manifest.with_shard(index, shard), shard.after
            _write(manifest, folder)
            tokens += shard.tokens
            progress.update(shard.tokens)
    if not manifest.tokens:
        raise DataError("the source has no tokens that count: see its texts, and which tokens are excluded")
    manifest = replace(manifest, complete=True)
    _write(manifest, folder)
    return ActivationCache(folder)


def _begin(folder: Path, wanted: Manifest) -> Manifest:
    """Return the manifest to go on with."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / NAME).is_file():
        found = Manifest.read(folder)
        found.check_same(wanted, folder)
        # What a killed run was writing when it ended.
        for stray in (*folder.glob(".shard-*"), *folder.glob(f".{NAME}.*")):
            stray.unlink()
        return found
    if any(not entry.name.startswith(f".{NAME}.") for entry in folder.iterdir()):
        raise DataError(f"{folder} holds something that is no cache of activations: give an empty folder, or a new one")
    _write(wanted, folder)
    return wanted


class _Pile:
    """The chunks of one shard, as the shard keeps them.

    Args:
        chunks: Where to take them from.
        widths: Of the sites.
        dtype: What the shard keeps.
        n_bytes: How large it shall be at least.
        n_tokens: How many tokens are enough in any case.
    """

    def __init__(
        self, chunks: Iterator[Chunk], widths: tuple[int, ...], dtype: str, n_bytes: int, n_tokens: int | None
    ) -> None:
        self.tokens, self.after = 0, Cursor()
        self.parts: list[dict[str, Tensor]] = []
        self.squares, self.errors = torch.zeros(2, len(widths), dtype=torch.float64)
        size = 0
        for chunk in chunks:
            flat = chunk.activations.flat.cpu()
            part = _packed(flat, widths, dtype)
            self.parts.append({**part, "ids": chunk.ids.int()})
            self.squares += _sums(flat.double() ** 2, widths)
            self.errors += _sums((flat.double() - _unpacked(part, widths, torch.float64)) ** 2, widths)
            self.tokens += len(flat)
            self.after = chunk.after
            size += part["values"].nbytes
            if size >= n_bytes or (n_tokens is not None and self.tokens >= n_tokens):
                break

    def write(self, path: Path) -> Shard:
        """Write the shard, whole or not at all."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {key: torch.cat([part[key] for part in self.parts]) for key in self.parts[0]}
        try:
            with written_aside(path) as aside:
                save_file(tensors, aside)
                with aside.open("rb") as file:
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                size = aside.stat().st_size
        except (OSError, SafetensorError) as error:
            raise _unwritten(path, error) from error
        sums = tuple(self.squares.tolist()), tuple(self.errors.tolist())
        return Shard(path.name, self.tokens, size, sha256, self.after, *sums)


def _write(manifest: Manifest, folder: Path) -> None:
    try:
        manifest.write(folder)
    except OSError as error:
        raise _unwritten(folder / NAME, error) from error


def _unwritten(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path} cannot be written ({error}): make room or choose another folder; what was written before is whole, "
        "and write_cache with the same arguments goes on from there"
    )


def _packed(flat: Tensor, widths: tuple[int, ...], dtype: str) -> dict[str, Tensor]:
    """Return activations as a shard keeps them."""
    if dtype != "int8":
        return {"values": flat.to(DTYPES[dtype])}
    sites = flat.float().split(widths, dim=1)
    scales = torch.stack([site.abs().amax(1) for site in sites], dim=1) / 127
    # A token that is 0 throughout keeps any scale.
    scales = torch.where(scales > 0, scales, 1.0)
    values = torch.cat([site / scales[:, i : i + 1] for i, site in enumerate(sites)], dim=1)
    return {"values": values.round_().clamp_(-127, 127).to(torch.int8), "scales": scales}


def _unpacked(tensors: dict[str, Tensor], widths: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    values = tensors["values"]
    if "scales" not in tensors:
        return values.to(dtype)
    ends = list(accumulate(widths, initial=0))
    flat = values.to(torch.promote_types(dtype, torch.float32))
    for i, (begin, end) in enumerate(pairwise(ends)):
        flat[:, begin:end] *= tensors["scales"][:, i : i + 1]
    return flat.to(dtype)


def _sums(values: Tensor, widths: tuple[int, ...]) -> Tensor:
    return torch.stack([site.sum() for site in values.split(widths, dim=1)])
