"""Writing: safetensors files by chunks, and folders written whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil
import torch
from torch import Tensor

from clt_plugin.core import FORMATS, Crosscoder, FormatError
from clt_plugin.core.files import DTYPES
from clt_plugin.core.store import is_finite
from clt_plugin.hub import Folder

CHUNK_BYTES = 64 * 2**20
"""How much of a tensor is in memory at a time while it is written."""


_written: ContextVar[Callable[[int], Any]] = ContextVar("_written", default=lambda n_bytes: None)


@contextmanager
def progress(written: Callable[[int], Any]) -> Iterator[None]:
    """Have a function told of every chunk of so many bytes that is written within."""
    token = _written.set(written)
    try:
        yield
    finally:
        _written.reset(token)


@dataclass(frozen=True)
class Rows:
    """A tensor that is written by chunks of rows.

    Attributes:
        shape: Of the whole.
        dtype: Of the whole.
        read: Returns the rows of a slice, in any shape that has their number of elements.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[slice], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Rows:
        """Wrap a tensor in memory."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda rows: tensor[rows] if tensor.ndim else tensor)

    @property
    def n_bytes(self) -> int:
        """How many bytes it takes."""
        count = self.dtype.itemsize
        for n in self.shape:
            count *= n
        return count

    def chunks(self) -> Iterator[Tensor]:
        """Read it, some rows at a time."""
        n_rows = self.shape[0] if self.shape else 1
        step = max(1, CHUNK_BYTES // max(1, self.n_bytes // max(1, n_rows)))
        for start in range(0, n_rows, step):
            yield self.read(slice(start, min(start + step, n_rows)))


def encoder_rows(crosscoder: Crosscoder, group: int) -> Rows:
    """Return a group's encoder, latents first, (F, sum of the widths read), to be written by chunks."""
    shape = (crosscoder.group_sizes[group], crosscoder.layout.read_width(group))
    return Rows(shape, crosscoder.dtype, lambda rows: crosscoder.store.get("W_enc", group, rows))


def decoder_rows(crosscoder: Crosscoder, group: int, *shape: int) -> Rows:
    """Return a group's decoder, (F, sum of the widths written) or of another shape, to be written by chunks."""
    flat = (crosscoder.group_sizes[group], crosscoder.layout.write_width(group))
    return Rows(shape or flat, crosscoder.dtype, lambda rows: crosscoder.store.get("W_dec", group, rows))


def save_tensors(path: Path, tensors: Mapping[str, Tensor | Rows]) -> None:
    """Write a safetensors file by chunks of rows; refuse what is not finite.

    The library's own writer needs every tensor whole in memory, which for a layer of a large CLT is 12 GB.
    """
    rows = {key: value if isinstance(value, Rows) else Rows.of(value.detach()) for key, value in tensors.items()}
    names, header, start = {dtype: name for name, dtype in DTYPES.items()}, {}, 0
    for key, value in rows.items():
        end = start + value.n_bytes
        header[key] = {"dtype": names[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data begin at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, value in rows.items():
            _write(file, key, value)
        file.flush()
        os.fsync(file.fileno())


def _write(file: IO[bytes], key: str, rows: Rows) -> None:
    written = 0
    for chunk in rows.chunks():
        if not is_finite(chunk):
            raise FormatError(f"{key} holds values that are not finite (nan or inf): nothing was saved")
        plain = chunk.detach().to("cpu", rows.dtype).contiguous()
        data: Any = plain.reshape(-1).view(torch.uint8).numpy().data
        file.write(data)
        written += data.nbytes
        _written.get()(data.nbytes)
    if written != rows.n_bytes:
        raise FormatError(f"{key} has {written:,} bytes, where {rows.shape} of {rows.dtype} takes {rows.n_bytes:,}")


@contextmanager
def whole_folder(folder: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Give a folder to write into that takes the place of ``folder`` once everything is written.

    What was there stays as it was until then, and if the writing fails. What a run that was killed left beside it, for
    the same folder, is removed; a folder that such a run had moved away and not yet replaced is put back.

    Args:
        folder: The folder to make; of a link, what it leads to.
        overwrite: Whether a folder that holds a crosscoder may be replaced.
    """
    target = Path(os.path.realpath(folder))
    target.parent.mkdir(parents=True, exist_ok=True)
    _tidy(target)
    _check_free(target, overwrite)
    aside = Path(tempfile.mkdtemp(prefix=f"{_beside(target)}{os.getpid()}.", suffix=".partial", dir=target.parent))
    try:
        yield aside
        # mkdtemp makes a private folder; a saved one is as readable as any other.
        aside.chmod(0o777 & ~_umask())
        _swap(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check_free(target: Path, overwrite: bool) -> None:
    """Refuse to replace a file, anything unasked, and what is not just a crosscoder."""
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target.name} is a file: give a folder")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"the folder {target.name} holds something already: pass overwrite=True to replace it")
    below = next((path.name for path in target.iterdir() if path.is_dir()), None)
    if below is not None or not _is_crosscoder(Folder(target)):
        what = f"the folder {below}" if below is not None else "something that is no crosscoder"
        raise FileExistsError(
            f"the folder {target.name} holds {what}, which overwrite=True does not replace: give another folder, or "
            "remove it first"
        )


def _is_crosscoder(folder: Folder) -> bool:
    try:
        return any(format.sniff(folder) for format in FORMATS.values())
    except FormatError:  # a damaged one
        return False


def _swap(new: Path, target: Path) -> None:
    """Put ``new`` in the place of ``target``; on failure target is as it was."""
    if not target.exists():
        new.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f"{_beside(target)}{os.getpid()}.", suffix=".old", dir=target.parent))
    try:
        target.rename(old)
        new.rename(target)
    except BaseException:
        if not target.exists():
            old.rename(target)
        else:
            old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _beside(target: Path) -> str:
    """Return how the names begin of what is written beside a folder: with the machine, since disks are shared."""
    return f".{target.name}.{zlib.crc32(platform.node().encode()):08x}."


def _tidy(target: Path) -> None:
    """Remove what processes that are no more left beside a folder, or put it back where that is all there is."""
    named = re.compile(re.escape(_beside(target)) + r"(\d+)\.\w+\.(partial|old)")
    for path in target.parent.iterdir():
        match = named.fullmatch(path.name)
        if not match or psutil.pid_exists(int(match[1])):
            continue
        if match[2] == "old" and not target.exists() and any(path.iterdir()):
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def plain(value: Any, name: str) -> Any:
    """Return a value as numbers, text, lists and mappings, which every format can hold; refuse others by name.

    >>> plain({"fvu": torch.tensor(0.5), "of": (1, 2)}, "metrics")
    {'fvu': 0.5, 'of': [1, 2]}
    """
    if hasattr(value, "tolist"):  # of torch and NumPy
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{name}[{str(key)!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{name}[{number}]") for number, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{name} is a {type(value).__name__}: give numbers, text, lists and mappings of them")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
