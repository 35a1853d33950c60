"""From a reference to a crosscoder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clt_plugin.core import FORMATS, SERVICES, Crosscoder, FormatError, HubError
from clt_plugin.core._subset import chosen_groups
from clt_plugin.formats._description import Description, build, join
from clt_plugin.hub import Folder, Reference, RemoteFile, RemoteFolder, open_folders, pinned

SHOWS_GAPS = {"native": "config.json", "circuit-tracer": "config.yaml"}
"""Formats in which a file that is missing is missed, if there is this config: the others may just seem smaller."""


def recognise(folder: Folder) -> Any:
    """Return the format that a folder is in."""
    found = [format for format in FORMATS.values() if format.sniff(folder)]
    if len(found) > 1:
        names = " and ".join(format.name for format in found)
        raise FormatError(f"{folder.label} holds files of {names}: keep each in a folder of its own")
    if found and not folder.is_listed and SHOWS_GAPS.get(found[0].name) not in folder.names:
        raise HubError(
            f"{folder.label}: which files belong to it is not known offline, since another tool cached it, and so not "
            f"whether some are missing: load it once with a connection, or give {folder.path} if you know it is whole"
        )
    if found:
        return found[0]
    held = [*folder.names, *(f"{name}/" for name in folder.folders)]
    shown = ", ".join(held[:8]) + (", ..." if len(held) > 8 else "") if held else "nothing"
    known = ", ".join(FORMATS)
    hint = ": give the folder that holds the crosscoder" if folder.folders else ""
    raise FormatError(f"{folder.label} is in no known format ({known}): it holds {shown}{hint}")


def describe(
    reference: str | os.PathLike[str] | Sequence[str],
    *,
    token: str | None = None,
    revisions: Mapping[str, str] | None = None,
) -> Description:
    """Say what lies at a reference, from configs and headers alone; arguments as for `load`."""
    text, pins = _with_pins(reference)
    folders = open_folders(text, token=token, revisions=revisions, pins=pins)
    found = combine([recognise(folder).describe(folder) for folder in folders], text)
    sources = _sources(text, folders, found)
    if not isinstance(reference, str | os.PathLike) and sources != [*reference]:  # one named at two branches
        raise FormatError(f"{text} names other files now: {', '.join(sources)}")
    return replace(found, metadata={**found.metadata, "source": sources}) if sources else found


def _with_pins(reference: str | os.PathLike[str] | Sequence[str]) -> tuple[str, dict[str, str]]:
    """Return a reference, and the commits of other repositories that a ``metadata["source"]`` has besides."""
    if isinstance(reference, str | os.PathLike):
        return os.fspath(reference), {}
    first, *others = reference
    named = [Reference.parse(other) for other in others]
    repos = [other.repo for other in named]
    return first, {other.repo: other.revision for other in named if other.revision and repos.count(other.repo) == 1}


def _sources(reference: str, folders: Sequence[Folder], found: Description) -> list[str]:
    """Return a reference to what was opened, then other repositories that it names; nothing where all is here."""
    files = dict.fromkeys(part for file in found.files for part in file.parts)
    repositories = dict.fromkeys(file.source for file in files if isinstance(file, RemoteFile))
    own = {str(Reference(f.repository.name, None, f.repository.commit)) for f in folders if isinstance(f, RemoteFolder)}
    return [pinned(reference, folders), *(repo for repo in repositories if repo not in own)] if repositories else []


def combine(parts: Sequence[Description], label: str) -> Description:
    """Return the description of what lies in one folder, or side by side in several."""
    if len(parts) == 1:
        return parts[0]
    return join(parts, label, parts[0].format, parts[0].wiring.name.partition("(")[0] + "({n})")


def load(
    reference: str | os.PathLike[str] | Sequence[str],
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
            matches: ``hf://google/gemma-scope-2-1b-pt/transcoder_all/layer_*_width_16k_l0_small``. Or a crosscoder's
            ``metadata["source"]``, which loads the same again.
        device: Where to put it.
        dtype: Convert to it; None keeps the files'.
        lazy: True reads headers and biases now and weights when they are needed: encoders one at a time, decoders by
            the rows of active features. ``"auto"`` does so where the weights exceed 40% of the free memory.
        layers: Load the groups at home in these layers, and fetch no more than they need; see `Crosscoder.select`.
        features: {layer: latents to keep there}; see `Crosscoder.select`.
        token: A Hub token; by default the one that ``hf auth login`` stored, or ``HF_TOKEN``.
        revisions: {``owner/name``: revision} for repositories that a config names without one.

    Returns:
        The crosscoder, in eval mode and frozen: call ``requires_grad_()`` to train it further. Of one from the Hub,
        ``metadata["source"]`` is a list: the reference at its commit, then at theirs the repositories that it names.

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
    if Path(text).is_dir():
        if revision is not None:
            raise ValueError(f"{text} is a local folder, which has no revisions")
        return load(Path(text, (subfolder or "").strip("/")), **settings)
    named = Reference.parse(text if text.startswith("hf://") else f"hf://{text}")
    if None not in (revision, named.revision) and revision != named.revision:
        raise ValueError(f"{text} names a revision, and revision={revision!r} another: give one")
    folder = "/".join(filter(None, (named.folder, (subfolder or "").strip("/"))))
    return load(str(Reference(named.repo, folder or None, revision or named.revision)), **settings)


SERVICES.add("from_pretrained", from_pretrained)
