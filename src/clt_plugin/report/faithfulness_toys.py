"""Figures of the toys: what one transcoder learnt, and distributions over seeds beside a document's figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd


def plot_toy(inputs: Tensor, alive: Sequence[tuple[int, Tensor]], truth: Tensor, said: Tensor, title: str) -> Figure:
    """Plot the activations of living latents on all 16 inputs, and the reconstruction of the answer beside it.

    Args:
        inputs: a-d, (16, 4).
        alive: Each layer and the activations of its living latents, (n, 16).
        truth: i, (16,).
        said: Its reconstruction by the transcoder, (16,).
        title: Above the plot.
    """
    figure = Figure(figsize=(7.0, 5.0), layout="constrained")
    heights = [3, *(min(10, max(2, len(acts))) for _, acts in alive), 4]
    axes = figure.subplots(len(heights), height_ratios=heights, sharex=True)
    axes[0].imshow(inputs.T.numpy(), aspect="auto", cmap="Greys", vmin=-2, vmax=2)
    axes[0].set_yticks(range(4), list("abcd"), fontsize=6)
    for place, (layer, acts) in zip(axes[1:-1], alive, strict=True):
        place.set_ylabel(f"layer {layer}", fontsize=8)
        if len(acts):
            place.imshow(acts.numpy(), aspect="auto", cmap="Blues")
            place.set_yticks([])
        else:
            place.text(
                0.5, 0.5, "no latent is ever active", ha="center", va="center", transform=place.transAxes, fontsize=8
            )
            place.set_yticks([])
    axes[-1].step(range(16), truth.numpy(), where="mid", color="0.5", label="i")
    axes[-1].plot(range(16), said.numpy(), "o", markersize=4, color="C0", label="its reconstruction")
    axes[-1].legend(fontsize=7)
    axes[-1].set_xlabel("input")
    axes[0].set_title(title, fontsize=9)
    return figure


def plot_toy_study(runs: pd.DataFrame, documents: Mapping[str, Mapping[str, float]], steps: int) -> Figure:
    """Plot each seed's L0 of layer 1 and hop-skip fraction, one row a setting.

    Args:
        runs: With the columns setting, wiring, l0_1 and hop_skip.
        documents: By wiring, the document's measures, such as l0_1.
        steps: How long the runs were.
    """
    settings = list(dict.fromkeys(runs["setting"]))
    figure = Figure(figsize=(8.0, 1.3 + 0.36 * len(settings)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, column, label in zip(
        panels, ("l0_1", "hop_skip"), ("L0 of layer 1", "layer 1 written by layer 0's latents"), strict=True
    ):
        for place, setting in enumerate(settings):
            of = runs[runs["setting"] == setting]
            shift = [0.5 * (i / max(1, len(of) - 1) - 0.5) for i in range(len(of))]
            axes.scatter(of[column], [place + each for each in shift], s=12, alpha=0.6, linewidths=0, color="C0")
            axes.plot([of[column].median()] * 2, [place - 0.35, place + 0.35], color="C0", linewidth=1.5)
            known = documents.get(of["wiring"].iloc[0], {}).get(column)
            if known is not None:
                axes.plot([known], [place], marker="D", markersize=5, color="C3", linestyle="none")
        axes.set_xlabel(label)
    panels[0].set_yticks(range(len(settings)), settings, fontsize=8)
    panels[0].invert_yaxis()
    panels[1].set_xlim(-0.05, 1.05)
    figure.suptitle(f"A dot a seed, bars medians, diamonds the document's run ({steps:,} steps)", fontsize=10)
    return figure


def plot_data_point(table: pd.DataFrame) -> Figure:
    """Plot for each share of repeats how much of the repeated point latents of its own write, and its L0.

    Args:
        table: With the columns repeats, share and l0_on_point.
    """
    figure = Figure(figsize=(7.0, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.scatter(table["repeats"], table["share"], s=18, alpha=0.7, color="C0")
    left.set_ylim(-0.03, 1.03)
    left.set_ylabel("share of the point that\nlatents of its own write")
    right.scatter(table["repeats"], table["l0_on_point"], s=18, alpha=0.7, color="C1")
    right.set_ylim(bottom=0)
    right.set_ylabel("latents active on the point")
    for axes in (left, right):
        axes.set_xlabel("share of the data that is the point")
    figure.suptitle("|x| with a repeated data point", fontsize=10)
    return figure
