"""Passages whose tokens are shaded by how active a feature is on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

_COLUMNS = 150
"""How many characters a line has."""


def plot_passages(passages: Mapping[str, Mapping[str, Any]], title: str = "") -> Figure:
    """Draw passages, one a line, each token on a ground as dark as its activation relative to the passage's largest.

    Args:
        passages: For each feature's name ``tokens`` and as many ``activations``.
        title: Above the plot.
    """
    figure = Figure(figsize=(11.0, 0.9 + 0.32 * max(1, len(passages))), layout="constrained")
    axes = figure.subplots()
    axes.set_xlim(0, _COLUMNS)
    axes.set_ylim(len(passages) - 0.4, -0.8)
    axes.axis("off")
    shades = colormaps["Oranges"]
    for row, (name, passage) in enumerate(passages.items()):
        largest = max(passage["activations"]) or 1.0
        axes.text(0, row, f"{name}  {largest:.2f}", fontsize=8, va="center", family="monospace")
        column = 14.0
        for token, activation in zip(passage["tokens"], passage["activations"], strict=True):
            shown = token.replace("\n", "↵").replace("\t", " ")
            if column + len(shown) > _COLUMNS:
                break
            strength = max(activation, 0.0) / largest
            ground = {"facecolor": shades(0.75 * strength), "edgecolor": "none", "pad": 1.0} if strength > 0 else None
            # A dollar sign would begin mathematics.
            text = shown.replace("$", r"\$")
            axes.text(column, row, text, fontsize=8, va="center", family="monospace", bbox=ground)
            column += len(shown)
    axes.set_title(title, fontsize=10)
    return figure
