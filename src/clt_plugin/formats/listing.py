"""circuit-tracer's listings: a ``config.yaml`` that names files of transcoders, in this folder or in repositories.

``transcoders`` has an entry a layer, in order from layer 0: ``hf://owner/name/path/in/it``, where ``?revision=`` or
``@`` may add a revision, or a path in the folder; or, as older files have it, a mapping of ``layer`` and ``filepath``.
Beside it stand ``model_name``, ``model_kind``, ``feature_input_hook`` and ``feature_output_hook`` (in
TransformerLens's terms), and optionally ``activation`` and ``k``. They are for files that do not say so themselves;
those that do must not be contradicted.

Listed are single layers (Gemma Scope 1 and 2, and circuit-tracer's own files), or, as a ``cross_layer_transcoder``, the
files of one CLT of Gemma Scope 2. Some listings have the last entry twice, since a tool drops it: it counts once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs

from clt_plugin.core import FORMATS, FormatError
from clt_plugin.core.files import Header
from clt_plugin.formats._description import Description
from clt_plugin.formats._layers import peek
from clt_plugin.formats._one_layer import Listed, join_layers
from clt_plugin.formats.gemma_scope_1 import GemmaScope1
from clt_plugin.formats.gemma_scope_2 import SHARDS, GemmaScope2
from clt_plugin.formats.transcoder_bundle import TranscoderBundle, said_by
from clt_plugin.hub import Folder, Reference, RemoteFolder, read_headers

CONFIG, SET, CLT = "config.yaml", "transcoder_set", "cross_layer_transcoder"
ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+)/([^@?]+)(?:@([\w./-]+)|\?(.*))?")


@dataclass(frozen=True)
class Entry:
    """A file that a listing names.

    Attributes:
        text: How it names it.
        layer: Which layer it is of.
        folder: Where it is.
        name: What it is called there.
    """

    text: str
    layer: int
    folder: Folder
    name: str


class Listing:
    """Reads listings."""

    name = "listing"

    def sniff(self, folder: Folder) -> bool:
        """Whether a folder is in this format."""
        return isinstance(peek(folder, CONFIG).get("transcoders"), list)

    def describe(self, folder: Folder) -> Description:
        """Say which tensor lies where."""
        config, where = folder.yaml(CONFIG), f"{folder.label}/{CONFIG}"
        kind = config.get("model_kind")
        if kind not in (None, SET, CLT):
            raise FormatError(f"{where} says model_kind {kind!r}; known are {SET} and {CLT}")
        entries = _entries(folder, config["transcoders"], where)
        shards = [entry for entry in entries if re.fullmatch(SHARDS, entry.name)]
        if shards or kind == CLT:
            if len(shards) < len(entries) or kind == SET:
                odd = next((entry for entry in entries if entry not in shards), entries[0])
                raise FormatError(
                    f"{where} lists {odd.text} in a {kind or SET}: "
                    f"a {CLT} lists the params_layer_{{i}}.safetensors of one CLT, a {SET} files of single layers"
                )
            return _clt(shards, said_by(config, where, 0), where)
        files = [entry.folder.file(entry.name) for entry in entries]
        headers = read_headers(files)
        parts = []
        for entry, file in zip(entries, files, strict=True):
            describe = _reader(entry, headers[file])
            parts.append(describe(entry.folder, entry.name, headers[file], said_by(config, where, entry.layer)))
        return join_layers(parts, folder.label, self.name)


def _clt(entries: list[Entry], said: Listed, where: str) -> Description:
    """Return the description of a CLT, all of whose files must be listed."""
    places = {entry.folder.source for entry in entries}
    if len(places) > 1:
        raise FormatError(f"{where} lists the files of one CLT in {len(places)} folders: {', '.join(sorted(places))}")
    held = entries[0].folder.numbered(SHARDS)
    if {entry.layer: entry.name for entry in entries} != held:
        missing = [name for name in held.values() if name not in {entry.name for entry in entries}]
        what = f"does not list {', '.join(missing)}" if missing else "does not list the layers in order"
        raise FormatError(f"{where} {what}, of the CLT in {entries[0].folder.label}")
    described = GemmaScope2().describe_shards(entries[0].folder, replace(said, layer=None))
    return replace(described, format=Listing.name)


def _reader(entry: Entry, header: Header) -> Callable[[Folder, str, Header, Listed], Description]:
    """Return what describes a file, by its keys."""
    if entry.name.endswith(".npz"):
        return GemmaScope1().describe_file
    for key, reader in (("w_enc", GemmaScope2()), ("W_enc", TranscoderBundle())):
        if key in header:
            return reader.describe_file
    found = ", ".join(sorted(header)) or "nothing"
    raise FormatError(f"{entry.text} has no encoder (W_enc or w_enc), as a transcoder's file has: it holds {found}")


# ---------------------------------------------------------------- entries


def _entries(folder: Folder, listed: list[Any], where: str) -> list[Entry]:
    """Return the files listed, each once; a repository is opened once, so that all are of one commit."""
    opened: dict[Reference, Folder] = {}
    entries: list[Entry] = []
    named: list[tuple[str, int | None]] = []
    for item in listed:
        what = _named(item, where)
        if not named or what != named[-1]:
            named.append(what)
    for position, (text, layer) in enumerate(named):
        below, name = _place(folder, text, where, opened)
        if below.file(name).size is None:
            missing = "which is not there" if below.is_listed else "which is not in the cache"
            raise FormatError(f"{where} lists {text}, {missing}")
        number = position if layer is None else layer
        # Files are mostly called for their layers; where they are, the order must be theirs.
        called = re.findall(r"(?:^|/)(?:params_)?layer_(\d+)(?=[/._]|$)", text.partition("?")[0])
        if called and int(called[-1]) != number:
            raise FormatError(
                f"{where} lists {text} as layer {number}: list every layer in order, or give mappings with layer and "
                "filepath"
            )
        entries.append(Entry(text, number, below, name))
    if not entries:
        raise FormatError(f"{where} lists no transcoders")
    return entries


def _named(item: Any, where: str) -> tuple[str, int | None]:
    """Return how an entry names its file, and its layer if it says so."""
    text, layer = (item.get("filepath"), item.get("layer")) if isinstance(item, dict) else (item, None)
    if not isinstance(text, str) or not (layer is None or (isinstance(layer, int) and layer >= 0)):
        raise FormatError(f"{where} lists {item!r}, where a path or a mapping of layer and filepath was expected")
    return text, layer


def _place(folder: Folder, text: str, where: str, opened: dict[Reference, Folder]) -> tuple[Folder, str]:
    """Return the folder of a file that is listed, and its name there."""
    if not text.startswith("hf://"):
        return _place_here(folder, text, where)
    match = ADDRESS.fullmatch(text)
    if not match:
        raise FormatError(f"{where} lists {text}, which is not hf://owner/name/path/in/it[?revision=...]")
    repo, inside, at, query = match.groups()
    revision = at or parse_qs(query or "").get("revision", [None])[-1]
    try:
        reference = Reference(repo, None, revision or _own_commit(folder, repo))
    except ValueError as error:
        raise FormatError(f"{where} lists {text}: {error}") from error
    if reference not in opened:
        opened[reference] = folder.elsewhere(str(reference))
    return _below(opened[reference], PurePosixPath(inside))


def _place_here(folder: Folder, text: str, where: str) -> tuple[Folder, str]:
    """Do so for a path, which on this machine may lead out of the folder, and on the Hub may not."""
    path = PurePosixPath(text)
    if not path.is_absolute() and ".." not in path.parts:
        return _below(folder, path)
    if isinstance(folder, RemoteFolder):
        raise FormatError(f"{where} lists {text}, which is on no one else's machine")
    return folder.elsewhere(str(folder.path / path.parent)), path.name


def _below(folder: Folder, path: PurePosixPath) -> tuple[Folder, str]:
    return folder if path.parent == PurePosixPath() else folder / str(path.parent), path.name


def _own_commit(folder: Folder, repo: str) -> str | None:
    """Return the commit of a listing that names files of its own repository: theirs is the same."""
    if isinstance(folder, RemoteFolder) and folder.repository.name == repo:
        return folder.repository.commit
    return None


FORMATS.add(Listing.name, Listing())
