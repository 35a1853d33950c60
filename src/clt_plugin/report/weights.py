"""What decoder norms and logits say of cross-layer connections: heat maps, curves and bars."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

NUMBERS_BELOW = 13
"""Up to so many layers, each cell's number is written into it."""


def plot_mass(table: pd.DataFrame, summary: pd.DataFrame, title: str = "") -> Figure:
    """Plot mean decoder norms by source and target, beside the total and the mean of the two kinds of connection.

    Args:
        table: Of `DecoderNorms`.
        summary: Of `DecoderNorms`.
        title: Above the plot.
    """
    groups, targets = list(dict.fromkeys(table["group"])), sorted(set(table["target"]))
    mass = np.full((len(groups), len(targets)), np.nan)
    for group, target, mean in zip(table["group"], table["target"], table["mean"], strict=True):
        mass[groups.index(group), targets.index(target)] = mean
    figure = Figure(figsize=(4.6 + max(3.0, 0.34 * len(targets)), 1.2 + max(2.6, 0.3 * len(groups))))
    figure.set_layout_engine("constrained")
    axes, bars = figure.subplots(1, 2, width_ratios=[3, 1.3])
    image = axes.imshow(mass, cmap="Blues", vmin=0, aspect="auto")
    if len(targets) < NUMBERS_BELOW:
        largest = np.nanmax(mass)
        for row, column in np.argwhere(~np.isnan(mass)).tolist():
            colour = "white" if mass[row, column] > 0.6 * largest else "0.2"
            text = f"{mass[row, column]:.2g}"
            axes.annotate(text, (column, row), ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(targets)), targets, fontsize=7)
    axes.set_yticks(range(len(groups)), groups, fontsize=7)
    axes.set_xlabel("target layer", fontsize=8)
    axes.set_ylabel("source", fontsize=8)
    figure.colorbar(image, ax=axes, label="mean decoder norm", shrink=0.85)
    _kinds(bars, summary)
    figure.suptitle(f"decoder norms, {title}", fontsize=10)
    return figure


def _kinds(axes: Axes, summary: pd.DataFrame) -> None:
    """Draw the share of the mass and the mean of a connection, for both kinds."""
    largest = max(float(summary["per_connection"].max()), 1e-30)
    heights = [summary["share"].tolist(), (summary["per_connection"] / largest).tolist()]
    shown = [[f"{100 * v:.0f}%" for v in summary["share"]], [f"{v:.3g}" for v in summary["per_connection"]]]
    for k, kind in enumerate(summary["kind"]):
        bars = axes.bar([j + 0.4 * k for j in range(2)], [each[k] for each in heights], 0.38, label=kind)
        axes.bar_label(bars, [each[k] for each in shown], fontsize=7)
    axes.set_xticks([0.2, 1.2], ["share of\nall mass", "mean of a\nconnection"], fontsize=7)
    axes.set_yticks([])
    axes.set_ylim(0, 1.3)
    axes.legend(fontsize=7, frameon=False, loc="upper center")


def plot_scores(scores: Sequence[Tensor], labels: Sequence[str], writes: Sequence[int], table: pd.DataFrame) -> Figure:
    """Plot the distribution of cross-layer scores by layer, beside the features with the highest.

    Args:
        scores: For each group, (n_latents,).
        labels: What groups are called.
        writes: To how many other layers each writes.
        table: Of `CrossLayerFeatures`.
    """
    figure = Figure(figsize=(9.5, 1.4 + 0.24 * max(10, len(table), len(labels))), layout="constrained")
    axes, bars = figure.subplots(1, 2, width_ratios=[1.2, 1])
    for place, (each, n) in enumerate(zip(scores, writes, strict=True)):
        values = each[each.isfinite()].numpy()
        if n and len(values):
            low, middle, high = np.percentile(values, [5, 50, 95])
            axes.plot([low, high], [place, place], color="C0", linewidth=4, alpha=0.35, solid_capstyle="butt")
            axes.plot([middle], [place], "o", color="C0", markersize=4)
            axes.plot([values.max()], [place], "|", color="C0", markersize=7)
    axes.set_yticks(
        range(len(labels)), [f"layer {x} (to {n})" for x, n in zip(labels, writes, strict=True)], fontsize=7
    )
    axes.set_xlabel("cross-layer score: median, 5 to 95%, largest", fontsize=8)
    axes.axvline(1, color="0.7", linewidth=0.8)
    axes.invert_yaxis()
    finite = [score if math.isfinite(score) else 0.0 for score in table["score"]]
    names = [f"{layer}.{feature}" for layer, feature in zip(table["layer"], table["feature"], strict=True)]
    if "top_tokens" in table:
        tokens = [str(each)[:34].replace("$", r"\$") for each in table["top_tokens"]]
        names = [f"{name}  {each}" for name, each in zip(names, tokens, strict=True)]
    bars.barh(range(len(names)), finite, color="C1")
    bars.set_yticks(range(len(names)), names, fontsize=7)
    bars.invert_yaxis()
    bars.set_xlabel("the highest scores", fontsize=8)
    for each in (axes, bars):
        each.tick_params(axis="x", labelsize=7)
    return figure


def plot_distance(table: pd.DataFrame, rate: float, rate_within: float, same_layer: bool) -> Figure:
    """Plot mean decoder norms and their spread by distance, with exponential fits.

    Args:
        table: Of `Distance`.
        rate: The factor a layer, over all connections.
        rate_within: That within sources.
        same_layer: Whether distance 0 was fitted.
    """
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    x, mean = table["distance"].to_numpy(), table["mean"].to_numpy()
    axes.fill_between(x, table["p10"], table["p90"], alpha=0.2, linewidth=0, label="10 to 90% of vectors")
    axes.plot(x, mean, "o-", label="mean")
    fitted = (mean > 0) & ((x > 0) | same_layer)
    for factor, style, label in ((rate, "--", "fit"), (rate_within, ":", "within sources")):
        if math.isfinite(factor) and fitted.any():
            centre = np.average(x[fitted], weights=table["connections"].to_numpy()[fitted])
            level = np.average(np.log(mean[fitted]), weights=table["connections"].to_numpy()[fitted])
            axes.plot(x[fitted], np.exp(level) * factor ** (x[fitted] - centre), style, color="0.3")
            axes.plot([], [], style, color="0.3", label=f"{label}: x {factor:.2f} a layer")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("distance from source to target, in layers")
    axes.set_ylabel("decoder norm")
    axes.legend(fontsize=7, frameon=False)
    return figure


def plot_spans(table: pd.DataFrame, spans: Mapping[str, Sequence[Tensor]]) -> Figure:
    """Plot how many features write how many layers, and the mean span by layer.

    Args:
        table: Of `FeatureSpan`.
        spans: Of `FeatureSpan`.
    """
    figure = Figure(figsize=(8.5, 3.4), layout="constrained")
    counts, means = figure.subplots(1, 2)
    longest = max(int(each.max()) for groups in spans.values() for each in groups)
    width = 0.8 / len(spans)
    for k, (of, groups) in enumerate(spans.items()):
        every = np.concatenate([each.numpy() for each in groups])
        every = every[every > 0]
        share = np.bincount(every, minlength=longest + 1)[1:] / max(len(every), 1)
        shift = width * (k - (len(spans) - 1) / 2)
        counts.bar(
            np.arange(1, longest + 1) + shift, share, width, label=f"{of}: mean {every.mean():.2f}", color=f"C{k}"
        )
        chosen = table[table["of"] == of]
        means.plot(chosen["layer"], chosen["mean"], "o-", color=f"C{k}", label=of)
        means.plot(chosen["layer"], chosen["possible"], ":", color=f"C{k}")
    counts.set_xlabel("layers written")
    counts.set_ylabel("share of features")
    counts.legend(fontsize=8, frameon=False)
    means.plot([], [], ":", color="0.4", label="all it can write")
    means.set_xlabel("source layer")
    means.set_ylabel("mean span")
    means.legend(fontsize=8, frameon=False)
    return figure


def plot_time_travel(table: pd.DataFrame, cosine: tuple[float, float, float], gains: bool) -> Figure:
    """Plot cosines of logits and shares of equal top tokens by distance, beside another feature's.

    Args:
        table: Of `TimeTravel`.
        cosine: The mean over all vectors and its interval.
        gains: Whether the final norm's gain was folded in.
    """
    figure = Figure(figsize=(8.5, 3.4), layout="constrained")
    cosines, tokens = figure.subplots(1, 2)
    grouped = table.groupby("distance")
    for column, label, style in (
        ("cosine", "logits of the same feature", "o-"),
        ("control", "logits of another feature", "s--"),
        ("vectors", "the vectors themselves", ".:"),
    ):
        mean = grouped[column].mean()
        cosines.plot(mean.index, mean, style, label=label, markersize=4)
    cosines.axhline(0, color="0.8", linewidth=0.8)
    cosines.set_ylim(-1.05, 1.05)
    cosines.set_ylabel("cosine with the same-layer vector")
    cosines.set_title(f"logits: {cosine[0]:.3f} ({cosine[1]:.3f} to {cosine[2]:.3f})", fontsize=9)
    for column, label, style in (
        ("same_token", "the same feature", "o-"),
        ("same_by_chance", "another feature", "s--"),
    ):
        share = grouped[column].mean()
        tokens.plot(share.index, share, style, label=label, markersize=4)
    tokens.set_ylim(-0.02, 1.02)
    tokens.set_ylabel("share with the same top token")
    tokens.set_title(f"final norm's gain {'folded in' if gains else 'left out'}", fontsize=9)
    for axes in (cosines, tokens):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("distance from source to target, in layers")
        axes.legend(fontsize=7, frameon=False)
    return figure
