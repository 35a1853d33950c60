"""Tensors in files, mapped into memory: safetensors, NumPy's npz and PyTorch's own.

Reading some rows of a mapped tensor touches these rows alone, whichever kind of file they lie in.
"""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clt_plugin.core.errors import FormatError, HubError

Header = dict[str, tuple[tuple[int, ...], torch.dtype | str]]
"""For each tensor of a file its shape and dtype; a dtype that torch lacks, or that weights never have, by its name."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What safetensors calls the dtypes that weights may have."""

ASKED_FROM = 2**20
"""From how many bytes on rows are asked for ahead: on a cold disk it halves the time, on a warm one it costs 2 ms."""

AGAIN = "fetch or save it again"


@dataclass(frozen=True)
class File:
    """A file of tensors.

    Attributes:
        path: Where it is.
        label: How messages name it; the file's own name by default.
    """

    path: str
    label: str = ""

    def __str__(self) -> str:
        return self.label or os.path.basename(self.path)

    @property
    def parts(self) -> tuple[File, ...]:
        """The files it is made of: itself, unless it is a view of others."""
        return (self,)

    @property
    def is_here(self) -> bool:
        """Whether the file is on this machine."""
        return os.path.isfile(self.path)

    @property
    def size(self) -> int | None:
        """Its size in bytes, or None where that is not known."""
        return os.path.getsize(self.path) if os.path.isfile(self.path) else None

    def stamp(self) -> tuple[int, int, int] | None:
        """Return what changes when the file does: size, time and inode; None where there is no file."""
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_size, found.st_mtime_ns, found.st_ino

    def header(self) -> Header:
        """Return {key: (shape, dtype)}; a missing, empty or damaged file is refused."""
        if not os.path.isfile(self.path):
            raise FormatError(f"{self} is missing: fetch or save the folder again")
        if os.path.getsize(self.path) == 0:
            raise FormatError(f"{self} is empty: {AGAIN}")
        with said(f"{self} ({os.path.getsize(self.path):,} bytes) is truncated or damaged", AGAIN):
            return _header(self.path)

    def tensor(self, key: str) -> Tensor:
        """Return a tensor whose values are read from the file as they are used: never write into it."""
        with said(f"{self}: cannot read {key}", AGAIN):
            return _mapped(self.path, key)

    def read(self, key: str, at: tuple[int, ...] = (), rows: Tensor | slice | None = None) -> Tensor:
        """Return (part of) a tensor: ``tensor[at][rows]``; what is not taken is not read."""
        tensor = self.tensor(key)
        with said(f"{self}: cannot read {key}", AGAIN):
            for index in at:
                tensor = tensor[index]
            if isinstance(rows, Tensor):
                self.ask_ahead(key, tensor, rows)
            return tensor if rows is None else tensor[rows]

    def ask_ahead(self, key: str, tensor: Tensor, rows: Tensor) -> None:
        """Tell the system which rows will be read, so that a disk is asked for all of them and not for page by page.

        Args:
            key: The tensor's key.
            tensor: The tensor as `tensor` gave it, or a view of it whose rows are contiguous.
            rows: Which of its rows.
        """
        length = tensor[:1].nbytes
        if (
            len(rows) * length < ASKED_FROM
            or not self.path.endswith(".safetensors")
            or not hasattr(os, "posix_fadvise")
        ):
            return
        with open(self.path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            start = 8 + size + json.loads(file.read(size))[key]["data_offsets"][0]
            start += tensor.storage_offset() * tensor.element_size()
            step = tensor.stride(0) * tensor.element_size()
            for row in rows.unique().tolist():
                os.posix_fadvise(file.fileno(), start + row * step, length, os.POSIX_FADV_WILLNEED)


class said:
    """Turns whatever a library says of a damaged file into one error that names it."""

    # Not by contextlib's decorator: a decorated function travels to a remote model without its globals.

    def __init__(self, what: str, then: str) -> None:
        self.what, self.then = what, then

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        # Readers of damaged files raise what they like: OSError, ValueError, RuntimeError, SafetensorError, ...
        if isinstance(error, Exception) and not isinstance(error, FormatError | HubError | MemoryError):
            raise FormatError(f"{self.what} ({error}): {self.then}") from error


# ---------------------------------------------------------------- the kinds of file


def _header(path: str) -> Header:
    if path.endswith(".npz"):
        return {key: (tensor.shape, tensor.dtype) for key, tensor in _npz(path).items()}
    if not path.endswith(".safetensors"):
        return {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in _pickle(path).items()}
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        return {key: (tuple(s.get_shape()), DTYPES.get(s.get_dtype(), s.get_dtype())) for key, s in slices.items()}


def _mapped(path: str, key: str) -> Tensor:
    if path.endswith(".npz"):
        return _npz(path)[key].tensor()
    if not path.endswith(".safetensors"):
        return _pickle(path)[key]
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        # Not a copy: it holds on to the mapped file and reads pages as they are touched.
        return file.get_tensor(key)


def _pickle(path: str) -> dict[str, Tensor]:
    """Return the tensors of a file that torch.save wrote, mapped; nothing but tensors and containers is unpickled."""
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"it holds {type(state).__name__}, where a dict of tensors was expected")
    return state


@dataclass(frozen=True)
class NpzEntry:
    """One array of an npz file, which is a zip archive of npy files.

    Attributes:
        path: The file, or an open one.
        name: The entry's name.
        shape: Of the array.
        dtype: Of the array.
        fortran: Whether its first axis varies fastest.
        offset: Where its data begin in the file; None where the entry is compressed, and can only be read whole.
    """

    path: Any
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    fortran: bool
    offset: int | None

    def tensor(self) -> Tensor:
        """Return the array, mapped where the entry is not compressed."""
        import numpy as np

        if self.offset is None:
            with np.load(self.path) as arrays:
                return torch.from_numpy(arrays[self.name])
        if isinstance(self.dtype, str):
            raise ValueError(f"it is of dtype {self.dtype}")
        numpy_dtype: Any = torch.empty(0, dtype=self.dtype).numpy().dtype
        order: Any = "F" if self.fortran else "C"
        # Copy on write: torch warns of arrays that cannot be written, and the file stays as it is.
        array = np.memmap(self.path, dtype=numpy_dtype, mode="c", offset=self.offset, shape=self.shape, order=order)
        return torch.from_numpy(array)


def read_npz(file: Any) -> dict[str, NpzEntry]:
    """Return the arrays of an npz file, a path or an open file, from its directory and the entries' headers alone."""
    import numpy as np

    entries = {}
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            with archive.open(info) as stream:
                version = np.lib.format.read_magic(stream)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read(stream)
                start = stream.tell()
            name = info.filename.removesuffix(".npy")
            torch_dtype: torch.dtype | str
            try:
                torch_dtype = torch.from_numpy(np.empty(0, dtype)).dtype
            except (TypeError, ValueError):  # of another kind, or another byte order
                torch_dtype = str(dtype)
            stored = info.compress_type == zipfile.ZIP_STORED
            offset = _data_offset(archive, info) + start if stored else None
            entries[name] = NpzEntry(file, name, tuple(shape), torch_dtype, fortran, offset)
    return entries


def _npz(path: str) -> dict[str, NpzEntry]:
    entries = read_npz(path)
    size = os.path.getsize(path)
    for entry in entries.values():
        if entry.offset is not None and entry.offset > size:
            raise ValueError(f"{entry.name} lies beyond its end")
    return entries


def _data_offset(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """Return where an entry's data begin: after its local header, whose two lengths differ from the directory's."""
    stream = archive.fp
    assert stream is not None
    stream.seek(info.header_offset + 26)
    lengths = stream.read(4)
    return info.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
