"""References to crosscoders: local folders, and ``hf://owner/name[/folder][@revision]`` on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from clt_plugin.core import Crosscoder, FormatError
from clt_plugin.formats import load_folder

_REFERENCE = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<folder>[^@]+?))?/?(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Reference:
    """A place on the Hub.

    Attributes:
        repo: ``owner/name``.
        folder: The folder inside it, or None.
        revision: A branch, tag or commit, or None for the default branch.
    """

    repo: str
    folder: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Parse ``hf://owner/name[/folder][@revision]``.

        >>> Reference.parse("hf://google/gemma-scope-2-1b-pt/clt/width_262k_l0_big@main")
        Reference(repo='google/gemma-scope-2-1b-pt', folder='clt/width_262k_l0_big', revision='main')
        """
        match = _REFERENCE.fullmatch(text)
        if not match:
            raise ValueError(f"{text!r} is not a reference: write hf://owner/name[/folder][@revision]")
        return cls(**match.groupdict())


def fetch(reference: Reference) -> Path:
    """Bring a place on the Hub into the local cache and return its folder; offline, find it there."""
    from huggingface_hub import snapshot_download

    patterns = [f"{reference.folder}/*"] if reference.folder else None
    snapshot = Path(snapshot_download(reference.repo, revision=reference.revision, allow_patterns=patterns))
    folder = snapshot / reference.folder if reference.folder else snapshot
    if not folder.is_dir():
        raise FormatError(f"{reference.repo} has no folder {reference.folder} (revision {snapshot.name})")
    return folder


def load(
    reference: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    lazy: bool | str = "auto",
) -> Crosscoder:
    """Load a crosscoder.

    Args:
        reference: A local folder, or ``hf://owner/name[/folder][@revision]``; the format is recognised.
        device: Where to put it.
        dtype: Convert to it; None keeps the files'.
        lazy: True reads headers and biases now and weights when they are needed: encoders one at a time, decoders by
            the rows of active features. ``"auto"`` does so where the weights exceed 40% of the free memory.

    Returns:
        The crosscoder, in eval mode and frozen: call ``requires_grad_()`` to train it further.

    Raises:
        FormatError: The folder is incomplete or damaged, or in no known format; nothing is half-loaded.
    """
    text = os.fspath(reference)
    folder = fetch(Reference.parse(text)) if text.startswith("hf://") else Path(text)
    return load_folder(folder, lazy, dtype, device)
