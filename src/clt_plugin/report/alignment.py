"""Mean cosines by source and target, and how cosines are distributed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

NUMBERS_BELOW = 13
"""Up to so many layers, each cell's number is written into it."""


def plot_alignment(table: pd.DataFrame, histograms: Mapping[str, Tensor], title: str = "") -> Figure:
    """Plot mean cosines by source and target layer, and the distribution over all writes and tokens.

    Args:
        table: With the columns source, target and mean; several writes between two layers are averaged.
        histograms: For each kind of vector, counts in equal bins from -1 to 1.
        title: Above the plot.
    """
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.2])
    means = table.pivot_table(index="source", columns="target", values="mean", aggfunc="mean")
    largest = float(np.nanmax(np.abs(means.to_numpy()))) or 1.0
    image = left.imshow(means.to_numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
    left.set_xticks(range(len(means.columns)), means.columns, fontsize=7)
    left.set_yticks(range(len(means.index)), means.index, fontsize=7)
    left.set_xlabel("target layer")
    left.set_ylabel("source layer")
    if max(means.shape) < NUMBERS_BELOW:
        for (row, column), value in np.ndenumerate(means.to_numpy()):
            if np.isfinite(value):
                colour = "white" if abs(value) > 0.6 * largest else "0.2"
                left.annotate(f"{value:.2g}", (column, row), ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=left, label="mean cosine", shrink=0.85)
    reach = 0.05
    for number, (name, counts) in enumerate(histograms.items()):
        total = float(counts.sum())
        if not total:
            continue
        centres = (np.arange(len(counts)) + 0.5) / len(counts) * 2 - 1
        density = counts.numpy() / total * len(counts) / 2
        colour, style = ("0.5", "--") if name == "null" else (f"C{number}", "-")
        right.plot(centres, density, color=colour, linestyle=style, linewidth=1.2, label=name)
        cumulated = np.cumsum(counts.numpy()) / total
        inside = (cumulated > 0.001) & (cumulated < 0.999)
        if inside.any():
            reach = max(reach, float(np.abs(centres[inside]).max()))
    right.axvline(0, color="0.8", linewidth=0.8)
    right.set_xlim(-reach, reach)
    right.set_xlabel("cosine, over tokens on which the feature is active")
    right.set_ylabel("density")
    right.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure
