"""What ablating the handoff between two layers does, for all pairs: a heat map."""

from __future__ import annotations

from matplotlib.figure import Figure
from torch import Tensor

NUMBERS_BELOW = 13
"""Up to so many layers, each cell's number is written into it."""


def plot_handoffs(effects: Tensor, measure: str, title: str = "") -> Figure:
    """Plot effects by the layer that writes and the layer that reads.

    Args:
        effects: (source, target); NaN where there is none.
        measure: What the colour means.
        title: Above the plot.
    """
    n = len(effects)
    known = effects[~effects.isnan()]
    largest = float(known.abs().max()) if len(known) else 0.0
    signed = bool((known < 0).any())
    figure = Figure(figsize=(1.8 + max(3.0, 0.45 * n), 1.0 + max(2.5, 0.4 * n)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        effects.numpy(),
        cmap="RdBu_r" if signed else "Blues",
        vmin=-largest if signed else 0.0,
        vmax=largest or 1.0,
        aspect="equal",
    )
    if n < NUMBERS_BELOW:
        for source, target in (~effects.isnan()).nonzero().tolist():
            value = float(effects[source, target])
            colour = "white" if abs(value) > 0.6 * largest else "0.2"
            axes.annotate(f"{value:.2g}", (target, source), ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(n))
    axes.set_yticks(range(n))
    axes.tick_params(labelsize=7)
    axes.set_xlabel("target: the layer whose MLP reads without it")
    axes.set_ylabel("source: the layer whose MLP wrote it")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, label=measure, shrink=0.85)
    return figure
