"""On-disk formats: one file each, recognised from the content of a folder.

A format is an object with a ``name`` and three methods: ``sniff(folder)``, ``load(folder, lazy, dtype, device)``
and ``save(crosscoder, folder, overwrite)``; `FORMATS.add` makes it known. Most describe which tensor lies where and
leave the checks and the reading to `build`.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from clt_plugin.core import FORMATS, Crosscoder, FormatError
from clt_plugin.formats import circuit_tracer, native  # noqa: F401 - they register themselves
from clt_plugin.formats._files import Description, build

__all__ = ["FORMATS", "Description", "build", "load_folder", "recognise"]


def recognise(folder: str | os.PathLike[str]) -> str:
    """Return the name of the format that a folder is in."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FormatError(f"there is no folder {folder}: give a folder, or a reference such as hf://owner/name")
    for format in FORMATS.values():
        if format.sniff(folder):
            return format.name
    files = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(files[:6]) + (", ..." if len(files) > 6 else "") if files else "nothing"
    raise FormatError(f"{folder} is in no known format ({', '.join(FORMATS)}): it holds {shown}")


def load_folder(
    folder: str | os.PathLike[str],
    lazy: bool | str = "auto",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Crosscoder:
    """Load a crosscoder from a folder, whose format is recognised; arguments as for `clt_plugin.load`."""
    return FORMATS[recognise(folder)].load(Path(folder), lazy, dtype, device)
