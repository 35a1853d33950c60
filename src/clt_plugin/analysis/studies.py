"""Every study by name: what it needs, and how the command ``clt analyse NAME`` runs it and writes what it finds.

A study is a function that returns a result with a small table and a plot. Its module registers it here, so that the
command, which is thin, needs to know none of them; a third party adds its own likewise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from clt_plugin.core import Registry
from clt_plugin.core.aside import written_aside

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class Result(Protocol):
    """What a study returns: numbers as a table, and the same at a glance."""

    @property
    def table(self) -> pd.DataFrame:
        """The numbers, small enough to read; one row for each thing measured."""
        ...

    def plot(self) -> Figure:
        """Return a figure of them."""
        ...


NEEDS = {
    "clt": "a crosscoder",
    "model": "the model that it belongs to",
    "plt": "per-layer transcoders of the same model, trained alike",
    "texts": "texts to run",
    "prompts": "prompts, one a line",
}
"""What a study can ask for: these are the names of its function's first parameters."""


@dataclass(frozen=True)
class Study:
    """One study.

    Attributes:
        function: Takes what it `needs` by these names, and settings by keyword; returns a `Result`.
        needs: Of `NEEDS`.
        about: What it measures, in one line.
        settings: What ``clt analyse`` may pass besides: {keyword: its type}.
    """

    function: Callable[..., Any]
    needs: tuple[str, ...]
    about: str
    settings: dict[str, type] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = [need for need in self.needs if need not in NEEDS]
        if unknown:
            raise ValueError(f"a study needs some of {', '.join(NEEDS)}, not {', '.join(unknown)}")


STUDIES: Registry[Study] = Registry("study")
"""Studies by name, such as ``decoder-norms``."""


def write(result: Result, folder: Path, name: str) -> list[Path]:
    """Write a study's table as CSV, its figure as PNG and its page, where it has one; return their paths.

    Each is whole or not there.
    """
    table, picture = folder / f"{name}.csv", folder / f"{name}.png"
    with written_aside(table) as aside:
        result.table.to_csv(aside)
    with written_aside(picture) as aside:
        result.plot().savefig(aside, dpi=150, format="png")
    written = [table, picture]
    if hasattr(result, "to_html"):
        written.append(folder / f"{name}.html")
        result.to_html(written[-1])
    return written
