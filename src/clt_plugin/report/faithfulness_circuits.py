"""Figures of circuits told twice: selectivity, memorised texts, a CLT against a PLT, superposition or steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from clt_plugin.report.faithfulness import COLOURS, NAMES

if TYPE_CHECKING:
    import pandas as pd


def plot_selectivity(activations: pd.DataFrame) -> Figure:
    """Plot every prompt's activation, one row a feature, the two sets apart.

    Args:
        activations: With the columns feature, set, prompt and activation.
    """
    features = list(dict.fromkeys(activations["feature"]))
    figure = Figure(figsize=(6.5, 1.2 + 0.5 * len(features)), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(dict.fromkeys(activations["set"])):
        of = activations[activations["set"] == name]
        # Spread a little, the same every time, so that equal values show.
        order = of.groupby("feature").cumcount() / max(1, of.groupby("feature")["prompt"].count().max())
        y = [features.index(feature) + 0.3 * (number - 0.5) * 1.2 for feature in of["feature"]]
        y = [each + 0.2 * (place - 0.5) for each, place in zip(y, order, strict=True)]
        axes.scatter(of["activation"], y, s=14, alpha=0.6, linewidths=0, color=f"C{number}", label=name)
    axes.set_yticks(range(len(features)), [f"feature {each}" if each != "any" else "any of them" for each in features])
    axes.invert_yaxis()
    axes.set_xlabel("activation")
    axes.legend(title="prompts on which they", fontsize=8, title_fontsize=8)
    axes.set_title("Selectivity", fontsize=10)
    return figure


def plot_memorised(table: pd.DataFrame, features: pd.DataFrame, answer: str) -> Figure:
    """Plot what steering does on a memorised text and on a control.

    Args:
        table: With the columns text, run, answer, likeliest, probability and kl.
        features: With the columns layer, feature, memorised and control.
        answer: The memorised token.
    """
    figure = Figure(figsize=(9.0, 3.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    names = [f"{row.layer}.{row.feature}" for row in features.itertuples()]
    runs = list(dict.fromkeys(table["run"]))
    for number, text in enumerate(dict.fromkeys(table["text"])):
        shift, colour = 0.38 * (number - 0.5), f"C{number}"
        at = [place + shift for place in range(len(names))]
        left.barh(at, features[text], height=0.36, color=colour, label=text)
        of = table[table["text"] == text]
        middle.plot(range(len(runs)), of["answer"], marker="o", markersize=4, color=colour)
        right.bar([place + shift for place in range(len(runs))], of["kl"], width=0.36, color=colour)
        for place, row in zip(range(len(runs)), of.itertuples(), strict=True):
            shown = repr(row.likeliest)[1:-1].replace("$", r"\$")
            right.annotate(shown, (place + shift, row.kl), ha="center", va="bottom", fontsize=6)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel("activation at the last token")
    left.legend(fontsize=7)
    middle.set_ylabel(f"probability of {answer!r}".replace("$", r"\$"))
    middle.set_ylim(-0.03, 1.03)
    right.set_ylabel("KL (nats); above, the likeliest token")
    for axes in (middle, right):
        axes.set_xticks(range(len(runs)), runs, fontsize=8)
        axes.set_xlabel("times the activation")
    figure.suptitle("A group of features steered on a memorised text and on a control", fontsize=10)
    return figure


def plot_versus(by_layer: Mapping[str, Sequence[float]], matches: pd.DataFrame, prompt: str) -> Figure:
    """Plot where each crosscoder's influence lies, and how alike matched features are.

    Args:
        by_layer: By name, the share of each layer in features' influence.
        matches: With the columns decoder and coactivation.
        prompt: Above the plot.
    """
    figure = Figure(figsize=(8.0, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    width = 0.8 / len(by_layer)
    for number, (name, values) in enumerate(by_layer.items()):
        x = [layer + (number - (len(by_layer) - 1) / 2) * width for layer in range(len(values))]
        left.bar(x, values, width=0.92 * width, color=COLOURS[name], label=NAMES[name])
    left.set_xlabel("layer")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_ylabel("share of features' influence")
    left.legend(fontsize=8)
    right.scatter(matches["decoder"], matches["coactivation"], s=10, alpha=0.5, linewidths=0, color="C2")
    right.set_xlabel("cosine of what decoders write")
    right.set_ylabel("cosine of activations")
    right.set_title(f"{len(matches)} matched features", fontsize=9)
    shown = prompt if len(prompt) <= 60 else f"...{prompt[-57:]}"
    figure.suptitle(shown.replace("$", r"\$").replace("\n", " "), fontsize=10)
    return figure


def plot_diagnosis(directions: pd.DataFrame, layers: pd.DataFrame, n_neurons: int) -> Figure:
    """Plot the pairs of layers by direction and handoff, and each layer's L0 beside what its neurons do.

    Args:
        directions: With the columns source, target, cosine and handoff.
        layers: With the columns layer, l0, all_neurons and top_neurons.
        n_neurons: How many the top neurons are.
    """
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.scatter(directions["cosine"], directions["handoff"], s=22, color="C0")
    if len(directions) <= 40:
        for row in directions.itertuples():
            left.annotate(f" {row.source}→{row.target}", (row.cosine, row.handoff), fontsize=7, va="center")
    left.axvspan(-0.3, 0.3, color="0.93", zorder=0)
    left.set_xlim(-1.02, 1.02)
    left.set_xlabel("cosine of the writes at source and target; shaded: another direction")
    left.xaxis.label.set_fontsize(8)
    left.set_ylabel("handoff ablated: KL (nats)")
    left.set_title("Pairs of layers", fontsize=9)
    right.bar(layers["layer"] - 0.2, layers["all_neurons"], width=0.36, color="0.35", label="all neurons set to 0")
    right.bar(layers["layer"] + 0.2, layers["top_neurons"], width=0.36, color="0.7", label=f"the strongest {n_neurons}")
    right.set_xlabel("layer")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set_ylabel("KL (nats)")
    other = right.twinx()
    other.plot(layers["layer"], layers["l0"], color="C0", marker="o", markersize=4)
    other.set_ylim(bottom=0)
    other.set_ylabel("L0", color="C0")
    right.legend(fontsize=7)
    right.set_title("Layers", fontsize=9)
    return figure
