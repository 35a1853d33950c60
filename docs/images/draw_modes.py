"""Draws modes.svg: what is frozen, live or replaced in each mode of `intervene`. Run it here to draw it again."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch

ICE, LIVE, CLT, EDIT = "#cfe3f7", "#ffffff", "#ffe2b8", "#b3470a"
LAYERS = 3
# For each mode, by layer from the first: attention, norm, the MLP's colour, what stands there, whether it is written.
MODES = {
    "direct": ([(ICE, ICE, ICE, "MLP output", True)] * LAYERS, "of the unedited run"),
    "constrained, 0 to 1": (
        [(ICE, LIVE, ICE, "MLP output", True)] * 2 + [(LIVE, LIVE, LIVE, "MLP", False)],
        "of the unedited run",
    ),
    "iterative": ([(LIVE, LIVE, LIVE, "MLP", True)] * LAYERS, "respond"),
    "local": ([(ICE, ICE, CLT, "CLT + error", True)] * LAYERS, "respond"),
    "replace": ([(LIVE, LIVE, CLT, "CLT", True)] * LAYERS, "respond"),
}


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, text: str) -> None:
    """Draw a labelled box."""
    axes.add_patch(FancyBboxPatch((x, y), width, height, "round,pad=0.02,rounding_size=0.06", fc=colour, ec="#444"))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=7)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = "#555", bend: float = 0
) -> None:
    """Draw an arrow."""
    style = {"arrowstyle": "-|>", "mutation_scale": 8, "connectionstyle": f"arc3,rad={bend}"}
    axes.add_patch(FancyArrowPatch(start, end, color=colour, lw=1.1, shrinkA=0, shrinkB=0, **style))


def panel(axes: Axes, title: str, layers: list[tuple[str, str, str, str, bool]], features: str) -> None:
    """Draw one mode: the residual stream upwards, attention to its left, the norm and the MLP to its right."""
    axes.set(xlim=(-1.4, 2.75), ylim=(-0.7, 3.9), title=title)
    axes.axis("off")
    arrow(axes, (0, -0.2), (0, 3.55))
    for layer, (attention, norm, mlp, text, written) in enumerate(layers):
        y = layer * 1.1
        box(axes, -1.3, y, 0.9, 0.28, attention, "attention")
        arrow(axes, (-0.37, y + 0.14), (-0.02, y + 0.14))
        box(axes, 0.35, y + 0.12, 0.5, 0.24, norm, "norm")
        arrow(axes, (0.02, y + 0.24), (0.32, y + 0.24))
        box(axes, 0.35, y + 0.58, 1.15, 0.28, mlp, text)
        arrow(axes, (0.32, y + 0.72), (0.02, y + 0.72))
        if mlp != ICE:
            arrow(axes, (0.6, y + 0.39), (0.6, y + 0.55))
        if written:
            arrow(axes, (1.56, 0.26), (1.53, y + 0.72), EDIT, bend=0.1 if layer == 0 else 0.55)
    axes.plot(1.5, 0.22, "o", color=EDIT, markersize=11)
    axes.text(1.5, 0.21, "Δ", color="white", ha="center", va="center", fontsize=8)
    axes.text(0.45, -0.55, f"features: {features}", ha="center", fontsize=8)


def main() -> None:
    """Draw all modes side by side."""
    figure = Figure(figsize=(12.5, 4.4), layout="constrained")
    for axes, (title, (layers, features)) in zip(figure.subplots(1, len(MODES)), MODES.items(), strict=True):
        panel(axes, title, layers, features)
    meanings = {ICE: "frozen, as in the unedited run", LIVE: "live", CLT: "replaced by the crosscoder"}
    meanings[EDIT] = "the edit, and where its change is written"
    handles = [Patch(fc=colour, ec="#444", label=meaning) for colour, meaning in meanings.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(Path(__file__).with_name("modes.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
