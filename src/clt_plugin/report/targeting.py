"""Do decoder vectors point at heads and neurons: shares by null and by layer, hubs, and what text says of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

if TYPE_CHECKING:
    import pandas as pd


def plot_targeting(
    kind: str,
    table: pd.DataFrame,
    by_layer: Mapping[str, pd.DataFrame],
    by_unit: pd.DataFrame,
    null: str,
    about: str,
) -> Figure:
    """Plot the share above the 99th percentile of each null, all together and by layer, and the units most pointed at.

    Args:
        kind: ``"head"`` or ``"neuron"``.
        table: Of `Targeting`.
        by_layer: For each null, `Targeting.by_layer`.
        by_unit: `Targeting.by_unit` of one null; of neurons the first few.
        null: Which.
        about: Above the plot.
    """
    figure = Figure(figsize=(12.5, 3.9), layout="constrained")
    shares, layers, units = figure.subplots(1, 3, width_ratios=[1.1, 1.2, 1.2])
    colours = {name: f"C{i}" for i, name in enumerate(table["null"])}
    _shares(shares, table, colours, kind)
    for name, each in by_layer.items():
        shown = {"color": colours[name], "linewidth": 2.2 if name == null else 1.0}
        layers.plot(each["layer"], 100 * each["share"], "o-", markersize=3, label=name, **shown)
        layers.fill_between(each["layer"], 100 * each["low"], 100 * each["high"], color=colours[name], alpha=0.15)
    layers.axhline(100 * float(table["by_chance"].iloc[0]), color="0.4", linestyle=":", linewidth=1)
    layers.set_ylim(bottom=0)
    layers.xaxis.set_major_locator(MaxNLocator(integer=True))
    layers.set_xlabel("layer that reads", fontsize=8)
    layers.set_ylabel("% above the 99th percentile", fontsize=8)
    layers.legend(fontsize=7, frameon=False)
    if kind == "head":
        _heads(figure, units, by_unit, null)
    else:
        _hubs(units, by_unit, null)
    for axes in (shares, layers, units):
        axes.tick_params(labelsize=7)
    figure.suptitle(about, fontsize=10)
    return figure


def _shares(axes: Axes, table: pd.DataFrame, colours: Mapping[str, str], kind: str) -> None:
    for place, row in enumerate(table.to_dict("records")):
        share, low, high = (100 * row[name] for name in ("share", "low", "high"))
        axes.barh(place, share, 0.6, color=colours[row["null"]], alpha=0.85)
        axes.plot([low, high], [place, place], color="0.2", linewidth=1.2)
        # Of thousands of neurons one nearly always passes: that says nothing, and would squeeze all else.
        if kind == "head":
            axes.plot([100 * row["naive"]], [place], "x", color="0.3", markersize=5)
            axes.plot([100 * row["naive_by_chance"]], [place], "|", color="0.3", markersize=9)
    if kind == "head":
        axes.plot([], [], "x", color="0.3", label="largest of all heads against one's percentile")
        axes.plot([], [], "|", color="0.3", markersize=9, linestyle="", label="that by chance")
        axes.legend(fontsize=6, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    axes.axvline(100 * float(table["by_chance"].iloc[0]), color="0.4", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(table)), table["null"].tolist())
    axes.invert_yaxis()
    axes.set_xlabel(f"% of vector-{kind} pairs above the null's 99th percentile", fontsize=8)


def _heads(figure: Figure, axes: Axes, by_unit: pd.DataFrame, null: str) -> None:
    shares = by_unit.pivot(index="layer", columns="head", values="share") * 100
    image = axes.imshow(shares.to_numpy(), cmap="Blues", vmin=0, aspect="auto")
    axes.set_xticks(range(shares.shape[1]), shares.columns.tolist())
    axes.set_yticks(range(shares.shape[0]), shares.index.tolist())
    axes.set_xlabel("head", fontsize=8)
    axes.set_ylabel("layer that reads", fontsize=8)
    axes.set_title(f"against {null}", fontsize=9)
    figure.colorbar(image, ax=axes, label="% above", shrink=0.85)


def _hubs(axes: Axes, hubs: pd.DataFrame, null: str) -> None:
    places = np.arange(len(hubs))
    negative = hubs["hits"] * hubs["negative"]
    axes.barh(places, hubs["hits"] - negative, color="C0", label="towards")
    axes.barh(places, negative, left=hubs["hits"] - negative, color="C3", label="away from")
    axes.plot(hubs["by_chance"], places, "|", color="0.2", markersize=8, label="by chance")
    names = [f"{layer}.{neuron}" for layer, neuron in zip(hubs["layer"], hubs["neuron"], strict=True)]
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlabel("vectors that point at the neuron", fontsize=8)
    axes.set_title(f"most pointed at, against {null}", fontsize=9)
    axes.set_xlim(0, 1.4 * float(hubs["hits"].max()))
    axes.legend(fontsize=7, frameon=False)


def plot_beside(
    table: pd.DataFrame, summary: tuple[float, float, float], label: str, log: bool, title: str = ""
) -> Figure:
    """Plot each pair's effect against that of its controls.

    Args:
        table: With the columns ``effect`` and ``control``.
        summary: What is shown above: a mean and its interval.
        label: What an effect is.
        log: Whether axes are logarithmic.
        title: Before the summary.
    """
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axes = figure.subplots()
    kept = table[(table["effect"] > 0) & (table["control"] > 0)] if log else table
    axes.plot(kept["control"], kept["effect"], "o", markersize=5, alpha=0.6)
    both = np.concatenate([kept["control"].to_numpy(), kept["effect"].to_numpy(), [] if log else [0.0]])
    if len(both):
        ends = [both.min(), both.max()]
        axes.plot(ends, ends, color="0.5", linewidth=0.8, linestyle="--")
    if log:
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            axis.set_major_formatter(FormatStrFormatter("%g"))
            axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("control features", fontsize=8)
    axes.set_ylabel("the feature that points there", fontsize=8)
    mean, low, high = summary
    what = "log2 ratio by size" if log else "difference"
    axes.set_title(f"{title or label}\n{len(kept)} pairs, {what} {mean:.2f} ({low:.2f} to {high:.2f})", fontsize=9)
    axes.tick_params(labelsize=7)
    return figure
