"""What feeds a feature over a data set, and what it feeds: bars, the strongest on top."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    import pandas as pd

NAMES = {"twera": "TWERA", "era": "ERA", "weight": "virtual weight"}
"""What the measures are called."""


def plot_global_weights(sides: Mapping[str, pd.DataFrame], by: str, title: str = "") -> Figure:
    """Plot tables of `GlobalWeights.sources` and `GlobalWeights.targets` side by side.

    Args:
        sides: For each table what its rows are, such as ``"sources"``.
        by: The measure that is drawn.
        title: Above the plot.
    """
    rows = max(1, *(len(table) for table in sides.values()))
    figure = Figure(figsize=(1.0 + 3.4 * len(sides), 1.2 + 0.26 * rows), layout="constrained")
    for axes, (side, table) in zip(figure.subplots(1, len(sides), squeeze=False)[0], sides.items(), strict=True):
        values = table[by].tolist()
        axes.barh(range(len(values)), values, color=["C3" if value < 0 else "C0" for value in values])
        names = [f"{group}.{feature}" for group, feature in zip(table["group"], table["feature"], strict=True)]
        axes.set_yticks(range(len(values)), names, fontsize=7)
        axes.set_ylim(rows - 0.4, -0.6)
        axes.axvline(0, color="0.6", linewidth=0.8)
        axes.tick_params(axis="x", labelsize=7)
        axes.set_title(side if values else f"no {side}", fontsize=9)
        axes.set_xlabel(NAMES[by], fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure
