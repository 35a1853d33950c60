"""Checkpoints: where a run stands, on disk, whole or not there.

A checkpoint is a folder ``step-00001000``: the tensors, as PyTorch's distributed checkpoints keep them (so that any
number of processes can load what another number wrote), and ``state.json`` with the numbers and every file's size and
SHA-256. It is written under another name and renamed when all of it is on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import checkpoint as dcp

from clt_plugin.core.aside import written_aside
from clt_plugin.training._mesh import by_first, first_alone

STATE = "state.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read. Says which, and what to do next."""


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], keep: int = 2) -> Path:
    """Write a checkpoint, and forget all but the last ones. Every process calls it; each writes its own shards.

    Args:
        folder: Of the run's checkpoints; made if missing.
        step: How many steps were taken.
        tensors: By name; where several processes share one, a DTensor.
        numbers: Plain data.
        keep: How many checkpoints are kept.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: It cannot be written (a full disk): those from before stay as they are.
    """
    final = folder / f"step-{step:08d}"
    aside = folder / f".{final.name}.partial"

    def make_room() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _forget_partial(folder)
        aside.mkdir()

    def publish() -> None:
        _seal(aside, numbers)
        if final.exists():  # written before, by a run that was stopped right afterwards
            shutil.rmtree(final)
        aside.rename(final)
        for old in found(folder)[:-keep]:
            shutil.rmtree(old)

    try:
        first_alone(make_room)
        _dcp(dcp.save, dict(tensors), checkpoint_id=aside)
        first_alone(publish)
    except (OSError, dcp.api.CheckpointException) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"{final} cannot be written ({_cause(error)}): make room or choose another folder; checkpoints from before "
            "are whole, and the same run started again goes on from the last one"
        ) from error
    return final


def found(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _forget_partial(folder: Path) -> None:
    """Remove what a run that was killed was writing when it ended."""
    for stray in folder.glob(".step-*.partial"):
        shutil.rmtree(stray)


def load_latest(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Load the last checkpoint that is whole into tensors, in place.

    Args:
        folder: Of the run's checkpoints.
        tensors: What to load into, as `save` was given them.

    Returns:
        The numbers saved with it; None where there is no checkpoint.

    Raises:
        CheckpointError: There are checkpoints, but none is whole; or it is of another run.
    """
    path = by_first(lambda: _last_whole(folder))
    return None if path is None else _load(path, tensors)


def _last_whole(folder: Path) -> Path | None:
    """Return the last checkpoint that is whole, and warn of those after it."""
    _forget_partial(folder)
    broken = []
    for path in reversed(found(folder)):
        damage = damage_of(path)
        if damage is None:
            return path
        broken.append(f"{path} {damage}")
        warnings.warn(f"{broken[-1]}: the one before it is gone on from", stacklevel=5)
    if broken:
        raise CheckpointError(
            f"no checkpoint is whole: {'; '.join(broken)}. Remove {folder} to begin the run from its start"
        )
    return None


def damage_of(path: Path) -> str | None:
    """Say what is wrong with a checkpoint's files, or None."""
    try:
        files = json.loads((path / STATE).read_text("utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"has no readable {STATE} ({error})"
    for name, known in files.items():
        try:
            size = (path / name).stat().st_size
            if size != known["bytes"]:
                return f"is broken: {name} has {size} bytes, not {known['bytes']}"
            if _digest(path / name) != known["sha256"]:
                return f"is broken: {name} was changed"
        except OSError as error:
            return f"is broken: {name} cannot be read ({error.strerror})"
    return None


def _load(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    into = dict(tensors)
    try:
        _dcp(dcp.load, into, checkpoint_id=path)
    except (dcp.api.CheckpointException, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is of another run: {_cause(error)}") from error
    numbers: dict[str, Any] = json.loads((path / STATE).read_text("utf-8"))["numbers"]
    return numbers


def _seal(path: Path, numbers: Mapping[str, Any]) -> None:
    """Write the numbers, and what every file must be."""
    files = {file.name: {"bytes": file.stat().st_size, "sha256": _digest(file)} for file in sorted(path.iterdir())}
    for name in files:
        with (path / name).open("rb+") as file:
            os.fsync(file.fileno())
    with written_aside(path / STATE) as aside:
        aside.write_text(json.dumps({"numbers": numbers, "files": files}, indent=1), "utf-8")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _dcp(function: Any, tensors: dict[str, Tensor], **where: Any) -> None:
    alone = not dist.is_initialized()
    with torch.no_grad(), warnings.catch_warnings():
        # It says that it runs in one process, which is what was asked for.
        warnings.simplefilter("ignore")
        function(tensors, no_dist=alone, **where)


def _cause(error: BaseException) -> str:
    failures = getattr(error, "failures", None)
    if failures:
        first = next(iter(failures.values()))
        return str(first[0] if isinstance(first, tuple) else first)
    return str(error)
