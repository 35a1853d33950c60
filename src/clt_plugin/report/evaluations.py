"""Evaluations side by side: what is not explained at each site, and what the replaced model loses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    import pandas as pd


def plot_evaluations(by_site: pd.DataFrame, table: pd.DataFrame, title: str = "") -> Figure:
    """Plot FVU by site, one line a condition, beside the loss that each adds to the model.

    Args:
        by_site: FVU, one row a site and one column a condition.
        table: One row a condition, with the columns condition and fvu, and delta_loss where there is a loop.
        title: Above the plot.
    """
    looped = "delta_loss" in table and bool(table["delta_loss"].notna().any())
    figure = Figure(figsize=(9.0 if looped else 5.5, 3.4), layout="constrained")
    grid = figure.subplots(1, 2 if looped else 1, squeeze=False, width_ratios=[3, 2] if looped else None)[0]
    axes = grid[0]
    for number, name in enumerate(by_site.columns):
        axes.plot(range(len(by_site)), by_site[name], marker="o", markersize=4, color=f"C{number % 10}", label=name)
    axes.set_xticks(range(len(by_site)), by_site.index, rotation=90 if len(by_site) > 6 else 0, fontsize=7)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("fraction of variance unexplained")
    axes.legend(fontsize=8)
    if looped:
        axes = grid[1]
        colours = [f"C{number % 10}" for number in range(len(table))]
        bars = axes.barh(table["condition"], table["delta_loss"], color=colours)
        axes.bar_label(bars, fmt="%.3f", fontsize=8, padding=2)
        axes.invert_yaxis()
        axes.margins(x=0.18)
        axes.tick_params(labelsize=8)
        axes.set_xlabel("loss added, nats a token")
    figure.suptitle(title, fontsize=10)
    return figure
