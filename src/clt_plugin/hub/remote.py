"""Folders and files of the Hugging Face Hub, as formats see them: read from the cache, else by ranges of bytes."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from clt_plugin.core import File, FormatError, HubError
from clt_plugin.core.files import AGAIN, DTYPES, Header, read_npz, said
from clt_plugin.hub._cache import is_whole
from clt_plugin.hub._context import Context
from clt_plugin.hub._requests import Repository, Tree
from clt_plugin.hub.folder import Folder, natural
from clt_plugin.hub.reference import Reference

HEADER_BYTES = 2**16
"""How much of a safetensors file is asked for at first: the headers of most are shorter."""

LARGEST_HEADER = 100_000_000
"""How long a safetensors header may be, by its specification."""

COUNTS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
"""The dtypes of what is not a weight, such as a stored k."""

AT_ONCE = 8
"""How many requests are under way at a time."""


def open_remote(reference: Reference, context: Context) -> RemoteFolder:
    """Open a folder of the Hub; its listing is asked for now, everything else when it is needed."""
    repository = Repository.open(reference, context)
    fixed = "/".join(before_pattern((reference.folder or "").split("/")))
    folder = RemoteFolder(repository, fixed, repository.tree(fixed))
    if not folder.names and not folder.folders:
        raise FormatError(f"{repository.label} has no folder {fixed or 'with files'}")
    return folder


def before_pattern(parts: Iterable[str]) -> Iterator[str]:
    """Yield the parts of a path that come before the first with a ``*``."""
    for part in parts:
        if "*" in part:
            return
        yield part


class RemoteFolder(Folder):
    """A folder of a repository of the Hub, at one commit."""

    def __init__(self, repository: Repository, prefix: str, tree: Tree) -> None:
        label = "/".join(filter(None, (repository.label, prefix)))
        super().__init__(repository.snapshot / prefix, label, repository.context)
        self.repository, self.prefix, self.tree = repository, prefix, tree

    @property
    def is_listed(self) -> bool:  # type: ignore[override]
        """Whether all its files are known."""
        return self.tree.is_complete

    def _path(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _below(self) -> Iterator[str]:
        start = self._path("")
        return (path[len(start) :] for path in self.tree.sizes if path.startswith(start))

    @property
    def names(self) -> list[str]:
        """The files directly in it, in natural order."""
        return sorted((path for path in self._below() if "/" not in path), key=natural)

    @property
    def folders(self) -> list[str]:
        """The folders directly in it, in natural order."""
        return sorted({path.partition("/")[0] for path in self._below() if "/" in path}, key=natural)

    @property
    def parent(self) -> RemoteFolder | None:
        """The folder that it lies in, listed anew; None for the repository itself."""
        if not self.prefix:
            return None
        above = self.prefix.rpartition("/")[0]
        return RemoteFolder(self.repository, above, self.repository.tree(above))

    @property
    def source(self) -> str:
        """A reference to it at its commit."""
        return str(Reference(self.repository.name, self.prefix or None, self.repository.commit))

    def __truediv__(self, name: str) -> RemoteFolder:
        self._check_inside(name)
        return RemoteFolder(self.repository, self._path(name), self.tree)

    def file(self, name: str) -> RemoteFile:
        """Return a file of tensors."""
        self._check_inside(name)
        path = self._path(name)
        return RemoteFile(
            str(self.repository.snapshot / path),
            f"{self.label}/{name}",
            repository=self.repository,
            remote_path=path,
            listed_size=self.tree.sizes.get(path),
        )

    def headers(self, names: Iterable[str]) -> dict[str, Header]:
        """Return the headers of several files, by name, asking for several at a time."""
        files = {name: self.file(name) for name in names}
        found = read_headers(files.values())
        return {name: found[file] for name, file in files.items()}

    def text(self, name: str) -> str:
        """Read a small text file, from the cache if it is there."""
        file = self.file(name)
        if file.is_here:
            return super().text(name)
        return file.read_bytes(0, file.listed_size).decode("utf-8") if file.listed_size else ""


@dataclass(frozen=True)
class RemoteFile(File):
    """A file of the Hub: read from the cache if it is there, else by ranges of bytes.

    Attributes:
        repository: Where it is.
        remote_path: Its path there.
        listed_size: Its size as listed, or None.
    """

    repository: Repository = field(kw_only=True, compare=False)
    remote_path: str = field(kw_only=True)
    listed_size: int | None = field(kw_only=True)

    @property
    def source(self) -> str:
        """A reference to the repository at its commit."""
        return str(Reference(self.repository.name, revision=self.repository.commit))

    @property
    def is_here(self) -> bool:
        """Whether it is in the cache, as long as it is listed: one that was cut short counts as not there."""
        return is_whole(self.path, self.listed_size)

    @property
    def size(self) -> int | None:
        """Its size in bytes, or None where that is not known."""
        return File.size.fget(self) if self.is_here else self.listed_size  # type: ignore[attr-defined]

    def read_bytes(self, start: int, stop: int) -> bytes:
        """Read a range of its bytes, wherever it is."""
        return self.repository.read(self.remote_path, start, stop, self.listed_size)

    def fetch(self) -> None:
        """Bring it into the cache."""
        self.repository.fetch({self.remote_path: self.listed_size})

    def header(self) -> Header:
        """Return {key: (shape, dtype)}, without fetching the file; a pickle has no header to read ahead."""
        if not self.is_here and self.remote_path.endswith((".pt", ".pth", ".bin")):
            self.fetch()
        if self.is_here:
            return File.header(self)
        if self.listed_size == 0:
            raise FormatError(f"{self} is empty on the Hub (0 bytes): it was published so; ask its authors")
        with said(f"{self} is truncated or damaged on the Hub", "ask its authors"):
            if self.remote_path.endswith(".npz"):
                with io.BufferedReader(_Ranges(self)) as stream:  # type: ignore[arg-type]
                    return {key: (entry.shape, entry.dtype) for key, entry in read_npz(stream).items()}
            spans = self._spans()
        return {key: (span.shape, DTYPES.get(span.dtype, span.dtype)) for key, span in spans.items()}

    def _spans(self) -> dict[str, _Span]:
        """Return where the tensors of a safetensors file lie."""
        size = self.listed_size
        first = self.read_bytes(0, min(HEADER_BYTES, size or HEADER_BYTES))
        start = 8 + int.from_bytes(first[:8], "little")
        if start > LARGEST_HEADER or (size is not None and start > size):
            raise ValueError(f"its header would have {start - 8:,} bytes")
        if start > len(first):
            first += self.read_bytes(len(first), start)
        return _spans(json.loads(first[8:start]), start, size)

    def read(self, key: str, at: tuple[int, ...] = (), rows: Tensor | slice | None = None) -> Tensor:
        """Return (part of) a tensor, see `File.read`; of a file that is not here, by ranges of bytes."""
        if not self.is_here and not self.remote_path.endswith(".safetensors"):
            self.fetch()
        if self.is_here:
            return File.read(self, key, at, rows)
        with said(f"{self}: cannot read {key}", AGAIN):
            span = self._spans()[key]
            dtype, shape, offset = (DTYPES | COUNTS)[span.dtype], list(span.shape), span.start
            for index in at:
                offset += range(shape.pop(0))[index] * prod(shape) * dtype.itemsize
            if rows is None:
                data = self.read_bytes(offset, offset + prod(shape) * dtype.itemsize)
                return _tensor(data, dtype, shape)
            everyone = range(shape[0])
            wanted = everyone[rows] if isinstance(rows, slice) else [everyone[row] for row in rows.tolist()]
            length = prod(shape[1:]) * dtype.itemsize
            ranges = [(offset + row * length, offset + (row + 1) * length) for row in wanted]
            parts = _at_once(lambda bounds: self.read_bytes(*bounds), ranges)
            return _tensor(b"".join(parts), dtype, [len(wanted), *shape[1:]])


@dataclass(frozen=True)
class _Span:
    """Where a tensor lies in a safetensors file: its shape, dtype by name, and first byte."""

    shape: tuple[int, ...]
    dtype: str
    start: int


def _spans(header: dict[str, Any], start: int, size: int | None) -> dict[str, _Span]:
    """Return where tensors lie; refuse a header that contradicts itself, or the size of the file.

    Args:
        header: {key: dtype, shape and offsets}.
        start: Where the data begin.
        size: How many bytes the file has.
    """
    header.pop("__metadata__", None)
    try:
        said_of = {key: (*info["data_offsets"], tuple(info["shape"]), info["dtype"]) for key, info in header.items()}
    except (KeyError, TypeError) as error:
        raise ValueError("a tensor of its header lacks a dtype, shape or offsets") from error
    spans, end = {}, 0
    for key, (begin, stop, shape, dtype) in sorted(said_of.items(), key=lambda item: item[1][:2]):
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, stop)) or begin != end or stop < begin:
            raise ValueError(f"{key}, of shape {shape}, is said to lie at bytes {begin} to {stop}, after byte {end}")
        known = (DTYPES | COUNTS).get(dtype)
        if known is not None and stop - begin != prod(shape) * known.itemsize:
            raise ValueError(f"{key} is given {stop - begin:,} bytes, where {shape} of {dtype} was expected")
        spans[key], end = _Span(shape, dtype, start + begin), stop
    if size is not None and start + end != size:
        raise ValueError(f"it has {size:,} bytes, where its header speaks of {start + end:,}")
    return spans


def _tensor(data: bytes, dtype: torch.dtype, shape: list[int]) -> Tensor:
    if not data:  # which frombuffer refuses
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


class _Ranges(io.RawIOBase):
    """A file of the Hub as a stream that can be read anywhere; for archives, whose directory is at the end."""

    def __init__(self, file: RemoteFile) -> None:
        self.file, self.size, self.position = file, file.listed_size or 0, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        stop = min(self.position + len(buffer), self.size)
        if stop <= self.position:
            return 0
        data = self.file.read_bytes(self.position, stop)
        buffer[: len(data)] = data
        self.position = stop
        return len(data)


# ---------------------------------------------------------------- many files


def read_headers(files: Iterable[File]) -> dict[File, Header]:
    """Return the headers of files, asking the Hub for several at a time."""
    files = list(dict.fromkeys(files))
    away = [file for file in files if not file.is_here]
    headers: dict[File, Header] = dict(zip(away, _at_once(lambda file: file.header(), away), strict=True))
    return {file: headers[file] if file in headers else file.header() for file in files}


def fetch(files: Iterable[File]) -> None:
    """Bring those of the files that are on the Hub, and not here, into the cache."""
    missing: dict[Repository, list[RemoteFile]] = {}
    for part in dict.fromkeys(part for file in files for part in file.parts):
        if isinstance(part, RemoteFile) and not part.is_here:
            missing.setdefault(part.repository, []).append(part)
    needed = sum(file.listed_size or 0 for group in missing.values() for file in group)
    for repository, group in missing.items():
        _check_space(repository, needed)
        repository.fetch({file.remote_path: file.listed_size for file in group})


def _check_space(repository: Repository, needed: int) -> None:
    existing = next(folder for folder in repository.snapshot.parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise HubError(
            f"{repository.label}: {needed / 2**30:.1f} GiB are to be fetched, but {free / 2**30:.1f} GiB are free at "
            f"{existing}: make room, set HF_HOME to another disk, or load some layers with layers="
        )


def _at_once(function: Callable[[Any], Any], items: list[Any]) -> list[Any]:
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(AT_ONCE, len(items))) as pool:
        return list(pool.map(function, items))
