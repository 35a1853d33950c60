"""Figures of the faithfulness report: hop-skip, L0, contributions, replacement errors, rank agreement, handoffs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

SHARES = {
    "norm": "share of the mean squared norm",
    "aligned": "share of the reconstruction",
    "variance": "share of the reconstruction's variance",
}
COLOURS = {"clt": "C0", "plt": "C1", "model": "0.35"}
NAMES = {"clt": "CLT", "plt": "PLT", "model": "model"}


def plot_hop_skip(table: pd.DataFrame, share: str) -> Figure:
    """Plot for every target layer which layers' latents write it, one stacked bar a target.

    Args:
        table: With the columns target, source and the share.
        share: Which of `SHARES`.
    """
    figure = Figure(figsize=(5.5, 3.4), layout="constrained")
    axes = figure.subplots()
    wide = table.pivot_table(index="target", columns="source", values=share, aggfunc="sum")
    below, above = 0 * wide.iloc[:, 0], 0 * wide.iloc[:, 0]
    colours = _shades(len(wide.columns))
    for number, source in enumerate(wide.columns):
        values = wide[source].fillna(0.0)
        # Shares against the whole hang below 0.
        start = above.where(values >= 0, below)
        axes.bar(wide.index, values, bottom=start, color=colours[number], width=0.75, label=f"layer {source}")
        above, below = above + values.clip(lower=0), below + values.clip(upper=0)
    _layers(axes, "layer that is written")
    axes.set_ylabel(SHARES[share])
    axes.set_title("Who writes each layer's reconstruction", fontsize=10)
    if len(wide.columns) <= 12:
        figure.legend(title="latents of", fontsize=7, title_fontsize=7, loc="outside right upper")
    return figure


def plot_l0(l0: Mapping[str, Mapping[int, float]], n_tokens: int) -> Figure:
    """Plot active latents a token by layer, one bar a crosscoder."""
    figure = Figure(figsize=(5.5, 3.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(l0)
    for number, (name, values) in enumerate(l0.items()):
        x = [layer + (number - (len(l0) - 1) / 2) * width for layer in values]
        axes.bar(x, list(values.values()), width=0.92 * width, color=COLOURS.get(name), label=NAMES.get(name, name))
    _layers(axes, "layer")
    axes.set_ylabel("active latents a token")
    axes.legend(fontsize=8)
    axes.set_title(f"L0 by layer, {n_tokens:,} tokens", fontsize=10)
    return figure


def plot_contributions_of(table: pd.DataFrame, n_prompts: int, edges: str) -> Figure:
    """Plot mean cumulative shares over layers with their intervals.

    Args:
        table: With the columns crosscoder, layer, cumulative, low and high.
        n_prompts: Over how many prompts.
        edges: ``"circuit"`` or ``"target"``.
    """
    figure = Figure(figsize=(5.5, 3.4), layout="constrained")
    axes = figure.subplots()
    n_layers = int(table["layer"].max()) + 1
    even = [(layer + 1) / n_layers for layer in range(n_layers)]
    axes.plot(range(n_layers), even, color="0.7", linestyle="--", linewidth=1.0, label="all layers alike")
    for name, of in table.groupby("crosscoder", sort=False):
        colour = COLOURS.get(str(name))
        label = NAMES.get(str(name), str(name))
        axes.plot(of["layer"], of["cumulative"], marker="o", markersize=3, color=colour, label=label)
        axes.fill_between(of["layer"], of["low"], of["high"], color=colour, alpha=0.15, linewidth=0)
    axes.set_ylim(0, 1.03)
    _layers(axes, "layer")
    axes.set_ylabel("share of layers up to this one")
    axes.legend(fontsize=8)
    over = "the circuit's positive edges" if edges == "circuit" else "positive edges into the logit"
    axes.set_title(f"Cumulative contribution, {over}, {n_prompts} prompts", fontsize=10)
    return figure


def plot_replacement(table: pd.DataFrame, n_tokens: int) -> Figure:
    """Plot cosine and normalised error over layers, local and global.

    Args:
        table: With the columns layer, replacement, site, cosine and error.
        n_tokens: Over how many tokens.
    """
    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    looks = {
        ("local", "mlp_out"): ("C0", "-"),
        ("global", "mlp_out"): ("C3", "-"),
        ("global", "resid_post"): ("C3", "--"),
    }
    what = {"mlp_out": "MLP output", "resid_post": "residual stream"}
    for (replacement, site), (colour, line) in looks.items():
        of = table[(table["replacement"] == replacement) & (table["site"] == site)]
        label = f"{replacement}: {what[site]}"
        left.plot(of["layer"], of["cosine"], line, color=colour, marker="o", markersize=3, label=label)
        right.plot(of["layer"], of["error"], line, color=colour, marker="o", markersize=3, label=label)
    left.set_ylabel("cosine with the model's own")
    right.set_ylabel("normalised squared error")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        _layers(axes, "layer")
    left.legend(fontsize=7)
    figure.suptitle(
        f"Reconstruction from the model's own run, and with every MLP replaced ({n_tokens:,} tokens)", fontsize=10
    )
    return figure


def plot_agreement(table: pd.DataFrame, pairs: pd.DataFrame, measure: str, n_prompts: int) -> Figure:
    """Plot rank correlations with their intervals, and the measured effect against influence.

    Args:
        table: With the columns pairs, predictor, spearman, low and high.
        pairs: With the columns influence and effect.
        measure: ``"KL"`` or ``"knock-on"``.
        n_prompts: Over how many prompts.
    """
    figure = Figure(figsize=(8.0, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    predictors = list(dict.fromkeys(table["predictor"]))
    parts = list(dict.fromkeys(table["pairs"]))
    for number, part in enumerate(parts):
        of = table[table["pairs"] == part]
        y = [predictors.index(name) + 0.18 * (number - (len(parts) - 1) / 2) * 2 for name in of["predictor"]]
        spread = [(of["spearman"] - of["low"]).abs(), (of["high"] - of["spearman"]).abs()]
        label = {"all": "all pairs", "indirect": "mainly indirect"}.get(part, part)
        left.errorbar(of["spearman"], y, xerr=spread, fmt="o", markersize=4, capsize=2, color=f"C{number}", label=label)
    left.set_yticks(range(len(predictors)), predictors)
    left.invert_yaxis()
    left.axvline(0, color="0.7", linewidth=0.8)
    left.set_xlim(-1, 1.02)
    left.set_xlabel("Spearman correlation with the effect, 95% interval")
    if len(parts) > 1:
        left.legend(fontsize=7)
    seen = pairs[(pairs["influence"] > 0) & (pairs["effect"] > 0)]
    right.scatter(seen["influence"], seen["effect"], s=6, alpha=0.4, linewidths=0, color="C0", rasterized=True)
    if len(seen):
        right.set_xscale("log")
        right.set_yscale("log")
    right.set_xlabel("influence in the graph")
    effect = {"KL": "KL of the prediction (nats)", "knock-on": "relative change"}[measure]
    right.set_ylabel(effect)
    what = {"KL": "Ablations of features", "knock-on": "Knock-on effects of ablations"}[measure]
    figure.suptitle(f"{what} against the graph ({n_prompts} prompts)", fontsize=10)
    return figure


def plot_handoff_maps(effects: Mapping[str, Tensor], n_prompts: int) -> Figure:
    """Plot what ablating handoffs does, in a model and in its replacement models, side by side.

    Args:
        effects: By name, (source, target), in nats; NaN where none was ablated.
        n_prompts: Over how many prompts.
    """
    n = len(next(iter(effects.values())))
    figure = Figure(figsize=(1.2 + (1.4 + 0.4 * n) * len(effects), 1.6 + 0.4 * n), layout="constrained")
    largest = max(float(each[~each.isnan()].max()) for each in effects.values())
    image: Any = None
    for axes, (name, each) in zip(figure.subplots(1, len(effects), squeeze=False)[0], effects.items(), strict=True):
        image = axes.imshow(each.numpy(), cmap="Blues", vmin=0, vmax=largest or 1.0)
        if n <= 12:
            for source, target in (~each.isnan()).nonzero().tolist():
                value = float(each[source, target])
                colour = "white" if value > 0.6 * largest else "0.2"
                axes.annotate(f"{value:.2g}", (target, source), ha="center", va="center", fontsize=7, color=colour)
            axes.set_xticks(range(n))
            axes.set_yticks(range(n))
        axes.set_xlabel("MLP that reads without it")
        axes.set_title(NAMES[name] if name == "model" else f"{NAMES[name]} in its place", fontsize=9)
        axes.set_ylabel("MLP that wrote it" if name == next(iter(effects)) else "")
    figure.colorbar(image, ax=figure.axes, label="KL (nats)", shrink=0.8)
    figure.suptitle(f"Handoffs ablated one by one ({n_prompts} prompts)", fontsize=10)
    return figure


def _layers(axes: Any, label: str) -> None:
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _shades(n: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](0.05 + 0.85 * i / max(1, n - 1)) for i in range(n)]
