"""A training run at a glance: loss and FVU, L0 of each group, dead latents, and what evaluations found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from clt_plugin.training.watch.history import by_group, evaluations_of, table_of

NAMED_BELOW = 9
"""Up to so many groups are named in a legend; of more, a bar of colours runs from the first to the last."""


def plot_run(
    history: Iterable[Mapping[str, Any]], name: str = "", target_l0: float | tuple[float, ...] | None = None
) -> Figure:
    """Plot a run.

    Args:
        history: See `clt_plugin.training.watch.history.table_of`.
        name: Of the run, above the plot.
        target_l0: What `SparsityConfig.target_l0` asked for: of all groups together, marked as its share of one; or of
            each, marked at each one's end.
    """
    history = list(history)
    table, evaluations = table_of(history), evaluations_of(history)
    figure = Figure(figsize=(10.0, 6.2), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True)
    _losses(grid[0, 0], table, evaluations)
    if len(table):
        _groups(grid[0, 1], by_group(history, "l0"), "L0: active latents a token", target_l0)
        _groups(grid[1, 0], by_group(history, "dead"), "share of latents that are dead", None)
        grid[0, 1].set_yscale("symlog", linthresh=1.0)
        grid[0, 1].set_ylim(bottom=0)
        grid[1, 0].set_ylim(-0.005, max(0.1, *(1.05 * max(entry["dead"]) for entry in history if "dead" in entry)))
    _evaluations(grid[1, 1], evaluations)
    for axes in grid[1]:
        axes.set_xlabel("step")
    for axes in grid.flat:
        axes.tick_params(labelsize=8)
    figure.suptitle(name, fontsize=11)
    return figure


def _losses(axes: Axes, table: Any, evaluations: Any) -> None:
    """Draw FVU, on batches and where it was evaluated, and the loss beside it on an axis of its own."""
    lines = []
    if len(table):
        lines += axes.plot(table.index, table["fvu"], color="C0", linewidth=1.2, label="FVU of batches")
        beside = axes.twinx()
        lines += beside.plot(table.index, table["loss"], color="0.6", linewidth=0.9, label="loss (right)")
        beside.set_yscale("log")
        beside.tick_params(which="both", labelsize=8)
        axes.set_zorder(beside.get_zorder() + 1)
        axes.patch.set_visible(False)
        # A start may be far off: what matters is what the run comes down to.
        axes.set_ylim(0, min(1.1, 1.1 * float(np.nanmax([0.1, *table["fvu"]]))))
    if len(evaluations):
        lines += axes.plot(evaluations.index, evaluations["fvu"], "o", color="C3", markersize=5, label="FVU evaluated")
    axes.set_title("fraction of variance unexplained", fontsize=9)
    axes.legend(handles=lines, fontsize=8)


def _groups(axes: Axes, values: Any, title: str, target: float | tuple[float, ...] | None) -> None:
    """Draw a line for each group, coloured from the first to the last."""
    import matplotlib

    n = values.shape[1]
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, n))
    for group, colour in enumerate(colours):
        axes.plot(values.index, values[group], color=colour, linewidth=1.1, label=f"group {group}")
        if isinstance(target, tuple):
            axes.plot(values.index[-1], target[group], "x", color=colour, markersize=6)
    if isinstance(target, int | float):
        axes.axhline(
            target / n, color="0.3", linestyle="--", linewidth=0.9, label=f"target / {n}" if n > 1 else "target"
        )
    axes.set_title(title, fontsize=9)
    if n < NAMED_BELOW:
        axes.legend(fontsize=7, ncols=1 + n // 4)
        return
    scale = ScalarMappable(Normalize(0, n - 1), matplotlib.colors.ListedColormap(colours))
    figure: Any = axes.figure
    figure.colorbar(scale, ax=axes, label="group").ax.tick_params(labelsize=7)


def _evaluations(axes: Axes, evaluations: Any) -> None:
    """Draw what the model loses with the crosscoder in its loop, where that was evaluated."""
    axes.set_title("with the model in the loop", fontsize=9)
    measured = evaluations.dropna(subset=["delta_loss"])
    if not len(measured):
        axes.text(0.5, 0.5, "not evaluated", ha="center", va="center", color="0.5", transform=axes.transAxes)
        axes.set_yticks([])
        return
    for column, label, colour in (("delta_loss", "loss added, nats a token", "C3"), ("kl", "KL, nats a token", "C0")):
        axes.plot(measured.index, measured[column], "o-", color=colour, markersize=5, linewidth=1.0, label=label)
    last = measured.iloc[-1]
    axes.annotate(f"{last['delta_loss']:+.3f}", (measured.index[-1], last["delta_loss"]), fontsize=8,
                  xytext=(0, 8), textcoords="offset points", ha="right")  # fmt: skip
    values = measured[["delta_loss", "kl"]].to_numpy()
    axes.set_ylim(min(0.0, 1.2 * float(values.min())), 1.25 * max(1e-6, float(values.max())))
    axes.legend(fontsize=8)
