"""What attention does with sources: pairs that make a score, heads that an edge goes through; heat maps."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor


def plot_pairs(scores: Tensor, queries: Sequence[str], keys: Sequence[str], title: str = "") -> Figure:
    """Plot what pairs of sources add to an attention score.

    Args:
        scores: (query, key).
        queries: What the sources of the query are called.
        keys: What those of the key are called.
        title: Above the plot.
    """
    figure, axes = _map(scores, title, "added to the score")
    axes.set_xticks(range(len(keys)), keys, rotation=90)
    axes.set_yticks(range(len(queries)), queries)
    axes.set_xlabel("source at the key", fontsize=8)
    axes.set_ylabel("source at the query", fontsize=8)
    return figure


def plot_loadings(loadings: Tensor, title: str = "") -> Figure:
    """Plot the parts of an edge by the last head that they pass.

    Args:
        loadings: (layer, head).
        title: Above the plot.
    """
    figure, axes = _map(loadings, title, "part of the edge")
    axes.set_xticks(range(loadings.shape[1]))
    axes.set_yticks(range(loadings.shape[0]))
    axes.set_xlabel("head", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    return figure


def _map(values: Tensor, title: str, label: str) -> tuple[Figure, Axes]:
    """Return a figure with a map of signed values, white at 0."""
    rows, columns = values.shape
    largest = float(values.abs().max()) if values.numel() else 0.0
    figure = Figure(figsize=(2.4 + max(3.0, 0.3 * columns), 1.8 + max(2.0, 0.26 * rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values.numpy(), cmap="RdBu_r", vmin=-(largest or 1.0), vmax=largest or 1.0, aspect="auto")
    axes.tick_params(labelsize=7)
    axes.set_title(title.replace("$", r"\$"), fontsize=9)
    figure.colorbar(image, ax=axes, label=label, shrink=0.85)
    return figure, axes
