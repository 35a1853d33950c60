"""What an intervention does to the model's predictions: two bars a token, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from clt_plugin.interventions.result import TokenChange


def plot_token_changes(changes: Sequence[TokenChange], title: str = "") -> Figure:
    """Plot tokens' probabilities before and after, the first on top.

    Args:
        changes: Of `Intervention.top_tokens`.
        title: Above the plot.
    """
    figure = Figure(figsize=(6.0, 0.42 * len(changes) + 1.2), layout="constrained")
    axes = figure.subplots()
    places = range(len(changes))
    before, after = ([getattr(change, when) for change in changes] for when in ("before", "after"))
    axes.barh([place - 0.2 for place in places], before, height=0.38, color="0.7", label="before")
    axes.barh([place + 0.2 for place in places], after, height=0.38, color="C0", label="after")
    axes.set_yticks(places, [_shown(repr(change.text)) for change in changes], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("probability", fontsize=8)
    axes.legend(fontsize=8)
    axes.set_title(_shown(title), fontsize=9, wrap=True)
    return figure


def _shown(text: str) -> str:
    """Return a text as it is: a dollar sign would begin mathematics."""
    return text.replace("$", r"\$")
