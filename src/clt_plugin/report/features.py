"""Which features are active where: one dot each, by layer and position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from torch import Tensor


def plot_features(
    features: Mapping[int, Tensor], tokens: Sequence[str], title: str = "", mark: tuple[int, int, int] | None = None
) -> Figure:
    """Plot active features by layer and position.

    Within a layer's band a feature keeps its height, so that one active at many positions is a row of dots. The
    area of a dot grows with the activation.

    Args:
        features: For each layer its activations, (position, n_latents).
        tokens: The prompt's tokens, one a position.
        title: Above the plot.
        mark: (layer, position, feature) to ring.
    """
    figure = Figure(figsize=(max(6.0, 0.26 * len(tokens) + 1.5), 1.3 * len(features) + 1.6), layout="constrained")
    axes = figure.subplots()
    largest = max(float(acts.max()) for acts in features.values()) or 1.0
    for layer, acts in features.items():
        positions, latents = acts.nonzero(as_tuple=True)
        heights = layer - 0.4 + 0.8 * latents / acts.shape[-1]
        sizes = 60 * acts[positions, latents] / largest
        axes.scatter(positions, heights, s=1 + sizes, alpha=0.55, linewidths=0, color=f"C{layer % 10}")
        axes.axhline(layer + 0.5, color="0.85", linewidth=0.8)
        count = (acts > 0).sum(-1).float().mean()
        axes.annotate(f"L0 {count:.0f}", (1.005, layer), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    if mark is not None:
        layer, position, latent = mark
        height = layer - 0.4 + 0.8 * latent / features[layer].shape[-1]
        axes.scatter([position], [height], s=160, facecolors="none", edgecolors="crimson", linewidths=1.6)
        axes.annotate(
            f"{layer}.{latent}", (position, height), (-8, 9), textcoords="offset points", ha="right", fontsize=8
        )
    axes.set_xticks(range(len(tokens)), [_shown(token) for token in tokens], rotation=90, fontsize=7)
    axes.set_yticks(list(features), [f"layer {layer}" for layer in features])
    axes.set_xlim(-0.7, len(tokens) - 0.3)
    axes.set_ylim(min(features) - 0.5, max(features) + 0.5)
    axes.set_title(title, fontsize=10)
    return figure


def _shown(token: str) -> str:
    """Return a token as an axis can show it; a dollar sign would begin mathematics."""
    return token.replace("\n", "\\n").replace("$", r"\$").strip() or repr(token)
