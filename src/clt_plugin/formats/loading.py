"""From a reference to a crosscoder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from clt_plugin.core import FORMATS, SERVICES, Crosscoder, FormatError
from clt_plugin.core._subset import chosen_groups
from clt_plugin.formats._description import Description, build, join
from clt_plugin.hub import Folder, open_folders


def recognise(folder: Folder) -> Any:
    """Return the format that a folder is in."""
    for format in FORMATS.values():
        if format.sniff(folder):
            return format
    held = [*folder.names, *(f"{name}/" for name in folder.folders)]
    shown = ", ".join(held[:8]) + (", ..." if len(held) > 8 else "") if held else "nothing"
    known = ", ".join(FORMATS)
    hint = ": give the folder that holds the crosscoder" if folder.folders else ""
    raise FormatError(f"{folder.label} is in no known format ({known}): it holds {shown}{hint}")


def describe(
    reference: str | os.PathLike[str],
    *,
    token: str | None = None,
    revisions: Mapping[str, str] | None = None,
) -> Description:
    """Say what lies at a reference, from configs and headers alone; arguments as for `load`."""
    folders = open_folders(os.fspath(reference), token=token, revisions=revisions)
    return combine([recognise(folder).describe(folder) for folder in folders], str(reference))


def combine(parts: Sequence[Description], label: str) -> Description:
    """Return the description of what lies in one folder, or side by side in several."""
    if len(parts) == 1:
        return parts[0]
    return join(parts, label, parts[0].format, parts[0].wiring.name.partition("(")[0] + "({n})")


def load(
    reference: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    lazy: bool | str = "auto",
    layers: Iterable[int] | None = None,
    features: Mapping[int, Sequence[int]] | None = None,
    token: str | None = None,
    revisions: Mapping[str, str] | None = None,
) -> Crosscoder:
    """Load a crosscoder.

    Args:
        reference: A local folder, ``hf://owner/name[/folder][@revision]``, or a short name of the catalogue
            (``clt list``); the format is recognised. A ``*`` in the folder takes one crosscoder of each folder that
            matches: ``hf://google/gemma-scope-2-1b-pt/transcoder_all/layer_*_width_16k_l0_small``.
        device: Where to put it.
        dtype: Convert to it; None keeps the files'.
        lazy: True reads headers and biases now and weights when they are needed: encoders one at a time, decoders by
            the rows of active features. ``"auto"`` does so where the weights exceed 40% of the free memory.
        layers: Load the groups at home in these layers, and fetch no more than they need; see `Crosscoder.select`.
        features: {layer: latents to keep there}; see `Crosscoder.select`.
        token: A Hub token; by default the one that ``hf auth login`` stored, or ``HF_TOKEN``.
        revisions: {``owner/name``: revision} for repositories that a config names without one.

    Returns:
        The crosscoder, in eval mode and frozen: call ``requires_grad_()`` to train it further. Its
        ``metadata["source"]`` names the commit it came from.

    Raises:
        FormatError: The folder is incomplete or damaged, or in no known format; nothing is half-loaded.
        HubError: The Hub cannot give it: it is gated, unknown, or not in the cache while offline.
    """
    description = describe(reference, token=token, revisions=revisions)
    latents: dict[int, torch.Tensor] = {}
    if layers is not None or features is not None:
        fixed = description.has_measured_threshold
        whole = (description.wiring, description.n_latents, description.activation, fixed)
        groups, chosen = chosen_groups(*whole, layers, features)
        latents = {groups.index(g): kept for g, kept in chosen.items()}
        description = description.select(groups)
    return build(description, lazy, dtype, device, latents)


def from_pretrained(
    name_or_folder: str | os.PathLike[str], revision: str | None = None, subfolder: str | None = None, **settings: Any
) -> Crosscoder:
    """Load from ``owner/name`` or a folder; see `Crosscoder.from_pretrained`."""
    text = os.fspath(name_or_folder)
    if text.startswith("hf://") or Path(text).is_dir():
        if revision is not None and not text.startswith("hf://"):
            raise ValueError(f"{text} is a local folder, which has no revisions")
        reference = text.rstrip("/") + (f"/{subfolder}" if subfolder else "")
    else:
        reference = f"hf://{text}" + (f"/{subfolder}" if subfolder else "")
    return load(reference + (f"@{revision}" if revision else ""), **settings)


SERVICES.add("from_pretrained", from_pretrained)
