"""How densely features are active: one line a group."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor


def plot_densities(densities: Mapping[str, Tensor], n_tokens: int) -> Figure:
    """Plot how many features there are by the share of tokens on which they are active, on logarithmic axes.

    Args:
        densities: For each group, (F,).
        n_tokens: Over how many tokens: what is active on one has the least density there is.
    """
    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    axes = figure.subplots()
    edges = np.logspace(-math.log10(max(n_tokens, 10)), 0, 25)
    for number, (group, density) in enumerate(densities.items()):
        alive = density[density > 0].numpy()
        dead = 1 - len(alive) / max(1, len(density))
        counts, _ = np.histogram(alive, bins=edges)
        colour = f"C{number % 10}"
        axes.stairs(counts, edges, color=colour, label=f"group {group} ({dead:.0%} dead)", linewidth=1.3)
    axes.set_xscale("log")
    axes.set_xlabel("share of tokens on which a feature is active")
    axes.set_ylabel("features")
    axes.legend(fontsize=7, ncols=1 + len(densities) // 9)
    return figure
