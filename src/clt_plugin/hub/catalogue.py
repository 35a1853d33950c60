"""Known crosscoders by short name: data that anyone can extend."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from clt_plugin.core import FormatError

VARIABLE = "CLT_PLUGIN_CATALOGUE"
"""The environment variable that names a further catalogue, a TOML file of the same layout."""


@dataclass(frozen=True)
class Entry:
    """A known crosscoder.

    Attributes:
        name: Its short name.
        reference: Where it is.
        model: The model it was trained for.
        kind: What it is: ``clt``, ``plt`` or ``crosscoder``.
        read: The site read.
        write: The site written.
        layers: How many layers.
        latents: How many latents a layer.
        size: About how large the weights are, in GiB; None where that is not known.
        licence: Its licence, or "" where it states none.
        note: What to know besides.
    """

    name: str
    reference: str
    model: str
    kind: str
    read: str
    write: str
    layers: int | None = None
    latents: int | None = None
    size: float | None = None
    licence: str = ""
    note: str = ""


class Catalogue:
    """Entries by name: those of this package, then those of the user's own file, which come first."""

    def entries(self) -> dict[str, Entry]:
        """Return every entry by name."""
        own = _read(Path(__file__).with_name("catalogue.toml"))
        further = os.environ.get(VARIABLE)
        return own | (_read(Path(further)) if further else {})

    def __getitem__(self, name: str) -> Entry:
        return self.entries()[name]

    def __contains__(self, name: str) -> bool:
        return name in self.entries()

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries().values())

    def table(self, containing: str = "") -> Any:
        """Return the entries as a table of rich's, for a terminal; those whose name or model contains a text."""
        from rich.table import Table

        table = Table("name", "model", "kind", "layers", "latents", "GiB", "licence", title="known crosscoders")
        table.columns[0].no_wrap = True
        for entry in self:
            if containing.lower() in f"{entry.name} {entry.model}".lower():
                numbers = (entry.layers, entry.latents, entry.size)
                shown = (f"{n:,}" if isinstance(n, int) else f"{n:.1f}" if n else "?" for n in numbers)
                table.add_row(entry.name, entry.model, entry.kind, *shown, entry.licence or "?")
        return table

    def hint(self, name: str) -> str:
        """Return a sentence with the entries whose names are like this one, or nothing."""
        close = difflib.get_close_matches(name, self.entries(), n=3)
        return f" (did you mean {' or '.join(close)}?)" if close else ""


def _read(path: Path) -> dict[str, Entry]:
    try:
        data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        return {name: Entry(name=name, **entry) for name, entry in data.items()}
    except (OSError, tomllib.TOMLDecodeError, TypeError) as error:
        known = ", ".join(field.name for field in fields(Entry) if field.name != "name")
        raise FormatError(f"{path.name} is not a catalogue: {error}. Each entry is a table of {known}") from error


CATALOGUE = Catalogue()
"""What ``clt list`` shows."""
