"""Folders of tensor files and small configs, as formats see them: on this machine, or (`RemoteFolder`) on the Hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from clt_plugin.core import File, FormatError, HubError
from clt_plugin.core.files import Header
from clt_plugin.hub._context import Context
from clt_plugin.hub.reference import stays_inside


class Folder:
    """A folder on this machine.

    Attributes:
        path: Where it is.
        label: How messages name it.
        context: How to ask for what it names on the Hub.
    """

    is_listed = True
    """Whether all its files are known: not so offline, of a folder of the Hub that was cached without a listing."""

    def __init__(self, path: Path, label: str | None = None, context: Context | None = None) -> None:
        self.path, self.label = path, _name(path) if label is None else label
        self.context = context or Context()
        self._configs: dict[str, Any] = {}

    # ---------------------------------------------------------------- what it holds

    @property
    def names(self) -> list[str]:
        """The files directly in it, in natural order (``layer_2`` before ``layer_10``)."""
        return sorted((path.name for path in self.path.iterdir() if path.is_file()), key=natural)

    @property
    def folders(self) -> list[str]:
        """The folders directly in it, in natural order."""
        found = (path.name for path in self.path.iterdir() if path.is_dir() and not path.name.startswith("."))
        return sorted(found, key=natural)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __truediv__(self, name: str) -> Folder:
        self._check_inside(name)
        return Folder(self.path / name, f"{self.label}/{name}", self.context)

    def _check_inside(self, name: str) -> None:
        if not stays_inside(name):
            raise FormatError(f"{self.label}: {name!r} is no folder inside it: write plain names between slashes")

    @property
    def parent(self) -> Folder | None:
        """The folder that it lies in, where what several folders share may be; None for the outermost."""
        path = Path(os.path.abspath(self.path))
        return None if path.parent == path else Folder(path.parent, path.parent.name or "/", self.context)

    @property
    def source(self) -> str:
        """A reference to it, with which the same can be loaded again."""
        return str(self.path)

    def glob(self, pattern: str) -> list[Folder]:
        """Return the folders below it whose path matches a pattern such as ``layer_*_width_16k``, in natural order."""
        first, _, rest = pattern.partition("/")
        if "*" not in first:
            return (self / first).glob(rest) if rest else [self / first]
        found = [self / name for name in self.folders if PurePosixPath(name).match(first)]
        return [below for folder in found for below in folder.glob(rest)] if rest else found

    def numbered(self, pattern: str) -> dict[int, str]:
        """Return {number: file} for the files whose whole name matches a pattern whose one group is a number."""
        matches = ((re.fullmatch(pattern, name), name) for name in self.names)
        return dict(sorted((int(match[1]), name) for match, name in matches if match))

    # ---------------------------------------------------------------- reading

    def file(self, name: str) -> File:
        """Return a file of tensors."""
        return File(str(self.path / name), f"{self.label}/{name}")

    def headers(self, names: Iterable[str]) -> dict[str, Header]:
        """Return the headers of several files, by name."""
        return {name: self.file(name).header() for name in names}

    def text(self, name: str) -> str:
        """Read a small text file."""
        return (self.path / name).read_text(encoding="utf-8")

    def json(self, name: str) -> dict[str, Any]:
        """Read a JSON object; what is not one is refused."""
        return self._config(name, json.loads, "JSON", "an object")

    def yaml(self, name: str) -> dict[str, Any]:
        """Read a YAML mapping; what is not one is refused."""
        return self._config(name, yaml.safe_load, "YAML", "a mapping")

    def _config(self, name: str, parse: Any, language: str, wanted: str) -> dict[str, Any]:
        if name not in self._configs:
            try:
                data = parse(self.text(name))
            except HubError:
                raise
            except (OSError, ValueError, yaml.YAMLError) as error:
                raise FormatError(f"{self.label}/{name} cannot be read as {language} ({error})") from error
            if not isinstance(data, dict):
                raise FormatError(f"{self.label}/{name} holds {type(data).__name__}, where {wanted} was expected")
            self._configs[name] = data
        return self._configs[name]

    def elsewhere(self, reference: str) -> Folder:
        """Open a folder of another repository, which a config names, with the same token, revisions and commits."""
        from clt_plugin.hub.places import open_with

        return open_with(reference, self.context)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.label}>"


def natural(name: str) -> list[Any]:
    """Return a key that sorts names by the numbers in them: ``layer_2`` before ``layer_10``."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _name(path: Path) -> str:
    """Return what a folder is called, also one that is given as ``.`` or ``..``."""
    return path.name if path.name not in ("", "..") else Path(os.path.abspath(path)).name or "/"
