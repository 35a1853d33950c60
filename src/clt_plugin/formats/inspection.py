"""What lies at a reference, told from configs and headers alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from clt_plugin.core import Crosscoder, FormatError, Layout
from clt_plugin.formats._description import Description, check_files
from clt_plugin.formats.loading import combine, recognise
from clt_plugin.hub import RemoteFile, open_folders

DRAWN_UP_TO = 32
"""How many groups and layers a wiring may have to be drawn."""


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found; ``print`` it.

    Attributes:
        source: What was looked at, at its commit where it is on the Hub.
        format: The format's name.
        description: What it is; None where that could not be made out, and ``problems`` say why.
        dtypes: Of the weights.
        size: Of the files, in bytes.
        not_here: The files on the Hub that are not in the cache, by their size.
        problems: What is missing, damaged or contradictory; empty where it can be loaded.
    """

    source: str
    format: str
    description: Description | None
    dtypes: tuple[torch.dtype, ...]
    size: int
    not_here: Mapping[str, int]
    problems: tuple[str, ...]

    @property
    def is_complete(self) -> bool:
        """Whether nothing is missing or wrong."""
        return not self.problems

    def rows(self) -> dict[str, str]:
        """Return what there is to say, by heading."""
        rows = {"source": self.source, "format": self.format}
        if self.description is not None:
            rows |= _rows(self.description)
        if self.dtypes:
            rows["dtype"] = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        rows["size"] = _bytes(self.size)
        if self.not_here:
            rows["to fetch"] = f"{_number(len(self.not_here), 'file')}, {_bytes(sum(self.not_here.values()))}"
        rows["problems"] = "none" if self.is_complete else f"{len(self.problems)}"
        return rows

    def __str__(self) -> str:
        rows = self.rows()
        width = max(map(len, rows)) + 2
        lines = [f"{heading:<{width}}{value}" for heading, value in rows.items()]
        lines += [f"  - {problem}" for problem in self.problems]
        if self.description is not None:
            wiring = self.description.wiring
            if wiring.n_groups <= DRAWN_UP_TO and wiring.n_layers <= DRAWN_UP_TO:
                lines += ["", wiring.draw()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data, for JSON."""
        data: dict[str, Any] = {
            "source": self.source,
            "format": self.format,
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in self.dtypes],
            "size": self.size,
            "not_here": dict(self.not_here),
            "problems": list(self.problems),
        }
        if self.description is not None:
            found = self.description
            data |= {
                "wiring": found.wiring.to_dict(),
                "n_latents": list(found.n_latents),
                "activation": found.activation.to_dict(),
                "host": found.host.to_dict(),
                "metadata": dict(found.metadata),
            }
        return data


def inspect(
    reference: str | os.PathLike[str], *, token: str | None = None, revisions: Mapping[str, str] | None = None
) -> Inspection:
    """Look at a crosscoder without reading its weights: of files on the Hub, the headers are fetched and no more.

    Args:
        reference: As for `clt_plugin.load`.
        token: As for `clt_plugin.load`.
        revisions: As for `clt_plugin.load`.
    """
    folders = open_folders(os.fspath(reference), token=token, revisions=revisions)
    format, problems, description = recognise(folders[0]), [], None
    dtypes: set[torch.dtype] = set()
    try:
        description = combine([recognise(folder).describe(folder) for folder in folders], str(reference))
    except FormatError as error:
        problems.append(str(error))
    if description is not None:
        dtypes, problems = check_files(description)
        if len(dtypes) > 1:
            names = ", ".join(sorted(map(str, dtypes)))
            problems.append(f"{description.label} mixes the dtypes {names}: say which you want when you load it")
        files = description.files
    else:
        files = [folder.file(name) for folder in folders for name in folder.names if _holds_tensors(name)]
    parts = dict.fromkeys(part for file in files for part in file.parts)
    away = [part for part in parts if isinstance(part, RemoteFile) and not part.is_here]
    return Inspection(
        source=folders[0].source if len(folders) == 1 else f"{reference} ({len(folders)} folders)",
        format=format.name,
        description=description,
        dtypes=tuple(sorted(dtypes, key=str)),
        size=sum(file.size or 0 for file in files),
        not_here={str(file): file.size or 0 for file in away},
        problems=tuple(problems),
    )


def _holds_tensors(name: str) -> bool:
    return name.endswith((".safetensors", ".npz", ".pt", ".pth"))


def _rows(found: Description) -> dict[str, str]:
    wiring, host, sizes = found.wiring, found.host, sorted(set(found.n_latents))
    first = host.exclude_first
    layers = sorted(set(wiring.home))
    latents = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    of = f" of {host.n_layers}" if host.n_layers and host.n_layers != len(layers) else ""
    reads, writes = (dict.fromkeys(site.name for site in sites) for sites in (wiring.read_sites, wiring.write_sites))
    return {
        "model": (host.model_name or "not said") + (f"@{host.model_revision}" if host.model_revision else ""),
        "layers": f"{_span(layers)}{of}",
        "latents": f"{latents} a group, {sum(found.n_latents):,} in {_number(wiring.n_groups, 'group')}",
        "d_model": _widths(found),
        "activation": str(found.activation),
        "reads": " + ".join(reads),
        "writes": " + ".join(writes) + (f", with {_number(len(wiring.skips), 'affine skip')}" if wiring.skips else ""),
        "left out": {0: "nothing", 1: "the first position"}.get(first, f"the first {first} positions"),
        "wiring": wiring.name,
    }


def _number(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def _widths(found: Description) -> str:
    """Return the width of the sites; where they differ, of those read and those written."""
    width = Layout.of(found.wiring, found.d_model).width
    read, written = (
        " or ".join(f"{n:,}" for n in sorted({width[site] for site in sites}))
        for sites in (found.wiring.read_sites, found.wiring.write_sites)
    )
    return read if read == written else f"{read} read, {written} written"


def _span(layers: list[int]) -> str:
    if len(layers) == 1:
        return f"{layers[0]}"
    if layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]} to {layers[-1]} ({len(layers)})"
    return ", ".join(map(str, layers))


def _bytes(n: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:,.0f} {unit}" if unit == "B" else f"{n:,.1f} {unit}"
        n = n / 1024  # type: ignore[assignment]
    return f"{n:,.1f} GiB"


def facts(crosscoder: Crosscoder) -> dict[str, str]:
    """Return the same headings of a crosscoder in memory, for a model card."""
    shown = Description(
        label="",
        format="",
        wiring=crosscoder.wiring,
        d_model=crosscoder.layout.width,
        n_latents=crosscoder.group_sizes,
        activation=crosscoder.activation,
        host=crosscoder.host,
        weights={},
        vectors={},
    )
    return _rows(shown) | {"dtype": str(crosscoder.dtype).removeprefix("torch.")}
