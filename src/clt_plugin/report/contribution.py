"""How much of a circuit its first layers do: a curve over layers, one a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def plot_contributions(curves: Mapping[str, Sequence[float]], title: str = "") -> Figure:
    """Plot cumulative shares over layers, beside the straight line of layers that do as much each.

    Args:
        curves: For each graph, the share of layers 0 to n, for every n; "" names none.
        title: Above the plot.
    """
    figure = Figure(figsize=(5.5, 3.4), layout="constrained")
    axes = figure.subplots()
    n_layers = max(map(len, curves.values()))
    even = [(layer + 1) / n_layers for layer in range(n_layers)]
    axes.plot(range(n_layers), even, color="0.7", linestyle="--", linewidth=1.0, label="all layers alike")
    for number, (name, values) in enumerate(curves.items()):
        label = name.replace("$", r"\$") or None
        axes.plot(range(len(values)), values, marker="o", markersize=3, color=f"C{number % 10}", label=label)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("share of layers up to this one")
    axes.legend(fontsize=8)
    axes.set_title(title.replace("$", r"\$"), fontsize=10)
    return figure
