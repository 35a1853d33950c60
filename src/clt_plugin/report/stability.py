"""How many edges survive in how many of several prunings, and how large these edges are."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def plot_stability(counts: Sequence[int], survives: Sequence[int], sizes: Sequence[float], title: str = "") -> Figure:
    """Plot the number of edges by how many prunings they survive, and below it each edge's size.

    Args:
        counts: How many edges survive 1, 2 and so on of the prunings.
        survives: For each edge, how many it survives.
        sizes: For each edge, its absolute weight.
        title: Above the plot.
    """
    figure = Figure(figsize=(6.0, 4.6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    above.bar(range(1, len(counts) + 1), counts, color="C0", width=0.8)
    above.set_ylabel("edges")
    above.set_title(title.replace("$", r"\$") or f"{sum(counts)} edges under {len(counts)} prunings", fontsize=10)
    below.scatter(survives, sizes, s=8, alpha=0.4, linewidths=0, color="0.3")
    if any(sizes):
        below.set_yscale("log")
    below.set_ylabel("absolute weight")
    below.set_xlabel("prunings that an edge survives")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure
