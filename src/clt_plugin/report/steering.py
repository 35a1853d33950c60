"""What steering does at each strength: the next token's probabilities, and how far the prediction moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure


def plot_sweep(
    strengths: Sequence[float],
    probabilities: Mapping[str, Sequence[float]],
    unedited: Mapping[str, float],
    kl: Sequence[float],
    title: str = "",
    label: str = "strength",
) -> Figure:
    """Plot probabilities, dashed where unedited, and below them the divergence, over strengths.

    Args:
        strengths: The strengths.
        probabilities: For each token its probability at each strength.
        unedited: For each token its probability without edits.
        kl: The divergence from the unedited prediction at each strength, in nats.
        title: Above the plot.
        label: What strengths are.
    """
    n_rows = 2 if probabilities else 1
    figure = Figure(figsize=(6.0, 1.0 + 2.2 * n_rows), layout="constrained")
    rows = figure.subplots(n_rows, sharex=True, squeeze=False)[:, 0]
    order = sorted(range(len(strengths)), key=lambda i: strengths[i])
    x = [strengths[i] for i in order]
    for number, (token, values) in enumerate(probabilities.items()):
        colour = f"C{number % 10}"
        shown = repr(token).replace("$", r"\$")
        rows[0].plot(x, [values[i] for i in order], marker="o", markersize=3, color=colour, label=shown)
        rows[0].axhline(unedited[token], color=colour, linestyle="--", linewidth=0.8)
    if probabilities:
        rows[0].set_ylabel("probability")
        rows[0].set_ylim(bottom=0)
        rows[0].legend(fontsize=8)
    rows[-1].plot(x, [kl[i] for i in order], marker="o", markersize=3, color="0.3")
    rows[-1].set_ylabel("KL (nats)")
    rows[-1].set_ylim(bottom=0)
    rows[-1].set_xlabel(label)
    rows[0].set_title(title.replace("$", r"\$"), fontsize=10)
    return figure
