"""What every format needs of files: checked headers, vectors, and folders written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from clt_plugin.core import Activation, Crosscoder, FormatError, Host, LazyStore, Piece, Wiring

LAZY_SHARE = 0.4
"""With ``lazy="auto"``, weights larger than this share of the free memory stay on disk."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Description:
    """A crosscoder on disk: what it is, and which tensor lies where.

    Attributes:
        folder: Where it lies.
        wiring: Who reads and writes what.
        d_model: Widths, as for `Crosscoder`.
        n_latents: The number of latents of each group.
        activation: The activation.
        host: The model it belongs to.
        weights: For each (kind, group), the pieces that make ``W_enc``, ``W_dec`` or ``W_skip``, latents first.
        vectors: For each (``"b_enc"``, ``"b_dec"``, ``"threshold"`` or ``"stored_norms"``, number), its piece. An
            absent bias is 0, an absent threshold of BatchTopK not measured.
        ignored: Keys, by file, that may be there and are rightly not read.
    """

    folder: Path
    wiring: Wiring
    d_model: Any
    n_latents: tuple[int, ...]
    activation: Activation
    host: Host
    weights: Mapping[tuple[str, int], tuple[Piece, ...]]
    vectors: Mapping[tuple[str, int], Piece]
    ignored: Mapping[str, frozenset[str]] | None = None

    @property
    def pieces(self) -> list[Piece]:
        """Every piece."""
        return [*(piece for pieces in self.weights.values() for piece in pieces), *self.vectors.values()]


def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return {key: (shape, dtype)} of a safetensors file; a missing, empty or truncated file is refused."""
    if not path.is_file():
        raise FormatError(f"{path.parent.name}/{path.name} is missing: fetch or save the folder again")
    if path.stat().st_size == 0:
        raise FormatError(f"{path.parent.name}/{path.name} is empty: fetch or save it again")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
            header = {key: (tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()}
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise FormatError(
            f"{path.parent.name}/{path.name} ({size:,} bytes) is truncated or damaged ({error}): fetch or save it again"
        ) from error
    unknown = {key: dtype for key, (_, dtype) in header.items() if dtype not in DTYPES}
    if unknown:
        raise FormatError(f"{path.parent.name}/{path.name} holds dtypes that are not floats: {unknown}")
    return {key: (shape, DTYPES[dtype]) for key, (shape, dtype) in header.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; what is not one is refused with the file's name."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path.parent.name}/{path.name} cannot be read as JSON ({error})") from error
    if not isinstance(data, dict):
        raise FormatError(f"{path.parent.name}/{path.name} holds {type(data).__name__}, where an object was expected")
    return data


def build(
    description: Description,
    lazy: bool | str = "auto",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Crosscoder:
    """Check every header, then make the crosscoder: nothing is made of a folder that does not fit.

    Args:
        description: What lies where.
        lazy: Leave encoders and decoders on disk; ``"auto"`` does where they exceed `LAZY_SHARE` of free memory.
        dtype: Convert to it; None keeps the files', which must then agree.
        device: Where to put parameters, and what is read later.
    """
    if lazy not in (True, False, "auto"):
        raise ValueError(f"lazy must be True, False or 'auto', not {lazy!r}")
    dtypes = check(description)
    if dtype is None:
        if len(dtypes) > 1:
            names = ", ".join(sorted(str(d) for d in dtypes))
            raise FormatError(f"{description.folder.name} mixes the dtypes {names}: say which you want with dtype=")
        (dtype,) = dtypes
    device = torch.device(device or "cpu")
    if lazy == "auto":
        n_weights = sum(_count(piece.shape) for pieces in description.weights.values() for piece in pieces)
        size = n_weights * torch.empty(0, dtype=dtype).element_size()
        lazy = device.type == "cpu" and size > LAZY_SHARE * psutil.virtual_memory().available
    crosscoder = Crosscoder(
        description.wiring,
        description.d_model,
        description.n_latents,
        description.activation,
        host=description.host,
        dtype=dtype,
        device=device,
        store=LazyStore(description.weights, dtype, device),
    )
    if any(name == "stored_norms" for name, _ in description.vectors):
        empty = (torch.zeros(n, dtype=dtype, device=device) for n in description.n_latents)
        crosscoder.stored_norms = nn.ParameterList(nn.Parameter(norms, requires_grad=False) for norms in empty)
    with torch.no_grad():
        for (name, number), piece in description.vectors.items():
            getattr(crosscoder, name)[number].copy_(read_vector(piece))
    crosscoder.eval().requires_grad_(False)
    return crosscoder if lazy else crosscoder.materialize()


def check(description: Description) -> set[torch.dtype]:
    """Compare every file's header with what is expected of it; return the dtypes found."""
    by_path: dict[str, list[Piece]] = {}
    for piece in description.pieces:
        by_path.setdefault(piece.path, []).append(piece)
    dtypes = set()
    for path, pieces in by_path.items():
        header, where = read_header(Path(path)), f"{description.folder.name}/{Path(path).name}"
        for piece in pieces:
            if piece.key not in header:
                found = ", ".join(sorted(header)) or "nothing"
                raise FormatError(f"{where} has no tensor {piece.key}: it holds {found}")
            shape, dtype = header[piece.key]
            if shape != piece.shape:
                raise FormatError(f"{where}: {piece.key} has shape {shape}, where {piece.shape} was expected")
            dtypes.add(dtype)
        ignored = (description.ignored or {}).get(path, frozenset())
        unknown = sorted(set(header) - {piece.key for piece in pieces} - ignored)
        if unknown:
            raise FormatError(
                f"{where} holds {', '.join(unknown)}, which this format does not know: reading on would ignore "
                "weights, so it is refused"
            )
    return dtypes


def read_vector(piece: Piece) -> Tensor:
    """Read a small tensor whole; refuse what is not finite."""
    with safe_open(piece.path, framework="pt") as file:
        tensor = file.get_tensor(piece.key)
    if not bool(torch.isfinite(tensor).all()):
        raise FormatError(f"{Path(piece.path).name}: {piece.key} holds values that are not finite (nan or inf)")
    return tensor


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file of detached, contiguous copies; refuse what is not finite."""
    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    for key, tensor in plain.items():
        if not bool(torch.isfinite(tensor).all()):
            raise FormatError(f"{key} holds values that are not finite (nan or inf): nothing was saved")
    save_file(plain, path)
    # safetensors makes private files; a saved crosscoder is as readable as any other file.
    path.chmod(0o666 & ~_umask())


@contextmanager
def whole_folder(folder: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Give a folder to write into that takes the place of ``folder`` once everything is written.

    What was there stays as it was until then, and if the writing fails.

    Args:
        folder: The folder to make.
        overwrite: Whether a folder that holds something may be replaced.
    """
    target = Path(os.path.abspath(folder))
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target.name} is a file: give a folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise FileExistsError(f"the folder {target.name} holds something already: pass overwrite=True to replace it")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield aside
        # mkdtemp makes a private folder; a saved one is as readable as any other.
        aside.chmod(0o777 & ~_umask())
        _swap(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _swap(new: Path, target: Path) -> None:
    """Put ``new`` in the place of ``target``; on failure target is as it was."""
    if not target.exists():
        new.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _count(shape: Iterable[int]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count
