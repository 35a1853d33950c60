"""From what a user writes to folders: a local path, an ``hf://`` reference, or a short name of the catalogue."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from clt_plugin.core import FormatError
from clt_plugin.hub.catalogue import CATALOGUE
from clt_plugin.hub.folder import Folder
from clt_plugin.hub.reference import Reference
from clt_plugin.hub.remote import open_remote


def open_folders(reference: str, token: str | None = None, revisions: Mapping[str, str] | None = None) -> list[Folder]:
    """Return the folders that a reference stands for: one, or with a ``*`` in it every one that matches.

    Args:
        reference: A local folder, ``hf://owner/name[/folder][@revision]``, or a short name.
        token: A Hub token; None for the stored one.
        revisions: {``owner/name``: revision} for references without one.
    """
    if not reference.startswith("hf://") and not Path(reference).exists() and reference in CATALOGUE:
        reference = CATALOGUE[reference].reference
    if reference.startswith("hf://"):
        parsed = Reference.parse(reference)
        folder = open_remote(parsed, token, revisions or {})
        if "*" not in (parsed.folder or ""):
            return [folder]
        found: list[Folder] = folder.glob((parsed.folder or "")[len(folder.prefix) :].strip("/"))
    elif "*" in reference:
        path = Path(reference)
        anchor = path.anchor or "."
        found = Folder(Path(anchor), anchor.rstrip("/.")).glob(path.relative_to(path.anchor).as_posix())
    elif Path(reference).is_dir():
        return [Folder(Path(reference))]
    elif Path(reference).is_file():
        raise FormatError(f"{reference} is a file: give the folder that holds it")
    else:
        hint = CATALOGUE.hint(reference)
        raise FormatError(
            f"there is no folder {reference}: give a folder, a reference such as hf://owner/name, or a short name from "
            f"`clt list`{hint}"
        )
    if not found:
        raise FormatError(f"{reference} matches no folder")
    return found


def open_folder(reference: str, token: str | None = None, revisions: Mapping[str, str] | None = None) -> Folder:
    """Return the one folder that a reference stands for; arguments as for `open_folders`."""
    folders = open_folders(reference, token, revisions)
    if len(folders) > 1:
        raise FormatError(f"{reference} matches {len(folders)} folders, where one was expected")
    return folders[0]
