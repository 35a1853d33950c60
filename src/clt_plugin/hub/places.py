"""From what a user writes to folders: a local path, an ``hf://`` reference, or a short name of the catalogue."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from clt_plugin.core import FormatError, HubError
from clt_plugin.hub._context import Context
from clt_plugin.hub.catalogue import CATALOGUE
from clt_plugin.hub.folder import Folder
from clt_plugin.hub.reference import Reference
from clt_plugin.hub.remote import RemoteFolder, before_pattern, open_remote


def open_folders(
    reference: str,
    token: str | None = None,
    revisions: Mapping[str, str] | None = None,
    pins: Mapping[str, str] | None = None,
) -> list[Folder]:
    """Return the folders that a reference stands for: one, or with a ``*`` in it every one that matches.

    Args:
        reference: A local folder, ``hf://owner/name[/folder][@revision]``, or a short name.
        token: A Hub token; None for the stored one.
        revisions: {``owner/name``: revision} for references without one.
        pins: {``owner/name``: commit} in place of any branch or tag that is named.
    """
    return _open(reference, Context(token, revisions or {}, pins or {}))


def open_folder(reference: str, token: str | None = None, revisions: Mapping[str, str] | None = None) -> Folder:
    """Return the one folder that a reference stands for; arguments as for `open_folders`."""
    return open_with(reference, Context(token, revisions or {}))


def open_with(reference: str, context: Context) -> Folder:
    """Return the one folder that a reference stands for."""
    folders = _open(reference, context)
    if len(folders) > 1:
        raise FormatError(f"{reference} matches {len(folders)} folders, where one was expected")
    return folders[0]


def pinned(reference: str, folders: Sequence[Folder]) -> str:
    """Return a reference to the same folders at their commit, and of local ones the whole path."""
    reference = _looked_up(reference)
    first = folders[0]
    if isinstance(first, RemoteFolder):
        return str(replace(Reference.parse(reference), revision=first.repository.commit))
    return os.path.abspath(reference)


def _looked_up(reference: str) -> str:
    """Return what a short name stands for; a folder comes before a name."""
    if not reference.startswith("hf://") and not Path(reference).exists() and reference in CATALOGUE:
        return CATALOGUE[reference].reference
    return reference


def _open(reference: str, context: Context) -> list[Folder]:
    reference = _looked_up(reference)
    if reference.startswith("hf://"):
        parsed = Reference.parse(reference)
        folder = open_remote(parsed, context)
        if "*" not in (parsed.folder or ""):
            return [folder]
        if not folder.is_listed:
            raise HubError(
                f"{folder.label}: which folders match {parsed.folder} is not known offline, since another tool cached "
                "it: load it once with a connection"
            )
        found: list[Folder] = folder.glob((parsed.folder or "")[len(folder.prefix) :].strip("/"))
    elif "*" in reference:
        path = Path(reference)
        fixed = Path(*before_pattern(path.parts))
        found = Folder(fixed, context=context).glob(path.relative_to(fixed).as_posix()) if fixed.is_dir() else []
    elif Path(reference).is_dir():
        return [Folder(Path(reference), context=context)]
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
