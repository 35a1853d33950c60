"""Pictures of crosscoders: norms over sites, rotation, what models share, inputs of latents, SAEs beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

AT_MOST = 2000
"""So many latents, spread evenly over all, are drawn where each has a place of its own."""


def plot_profiles(norms: Tensor, sites: Sequence[str], decay: pd.DataFrame, title: str = "") -> Figure:
    """Plot latents' norms over sites, sorted by where they peak, and the mean norm around the peak.

    Args:
        norms: (F, n_sites).
        sites: Their names.
        decay: With the columns distance, relative_norm and latents; distances that few latents have are not drawn.
        title: Above the plot.
    """
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.2, 1])
    values = norms.numpy()
    alive = values[values.max(1) > 0]
    relative = alive / alive.max(1, keepdims=True)
    # Sites count from 0: the mean place of a latent's norm breaks ties between those that peak at one site.
    centre = (relative * np.arange(relative.shape[1])).sum(1) / relative.sum(1)
    order = np.lexsort((centre, relative.argmax(1)))
    shown = relative[order][:: max(1, len(order) // AT_MOST)]
    image = left.imshow(shown, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    _name_sites(left, sites)
    left.set_yticks([])
    left.set_ylabel(f"{len(alive)} latents, by peak")
    figure.colorbar(image, ax=left, label="norm / largest norm", shrink=0.85)
    # Far from the peak few latents may be left, whose mean is noise.
    common = decay[decay["latents"] >= 0.01 * decay["latents"].max()]
    right.plot(common["distance"], common["relative_norm"], marker="o", markersize=4)
    right.axvline(0, color="0.8", linewidth=0.8)
    right.set_ylim(0, 1.05)
    right.set_xlabel("sites after the peak")
    right.set_ylabel("mean norm / norm at the peak")
    figure.suptitle(title, fontsize=10)
    return figure


def plot_rotation(cosines: Tensor, sites: Sequence[str], consistency: Mapping[str, Tensor], title: str = "") -> Figure:
    """Plot mean cosines between sites, and how single latents' mean cosines are distributed.

    Args:
        cosines: (n_sites, n_sites); NaN where no latent writes both.
        sites: Their names.
        consistency: For each group, each latent's mean cosine.
        title: Above the plot.
    """
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    image = left.imshow(cosines.numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
    _name_sites(left, sites)
    left.set_yticks(range(len(sites)), sites, fontsize=7)
    figure.colorbar(image, ax=left, label="mean cosine", shrink=0.85)
    known = np.concatenate([values.numpy() for values in consistency.values()])
    right.hist(known[np.isfinite(known)], bins=40, range=(-1, 1), color="C0")
    right.set_xlabel("mean cosine between the sites a latent writes strongly")
    right.set_ylabel("latents")
    figure.suptitle(title, fontsize=10)
    return figure


def plot_sharing(values: Tensor, cosines: Tensor | None, axis: str) -> Figure:
    """Plot how relative norms are distributed, and the cosines of latents by relative norm.

    Args:
        values: Relative norms, or shares, (F,).
        cosines: Between each latent's two vectors, (F,), or None.
        axis: What the values are.
    """
    figure = Figure(figsize=(9.0 if cosines is not None else 5.0, 3.4), layout="constrained")
    grid = figure.subplots(1, 1 if cosines is None else 2, squeeze=False)[0]
    grid[0].hist(values.numpy(), bins=50, range=(0, 1), color="C0")
    grid[0].set_yscale("symlog", linthresh=1)
    grid[0].set_xlabel(axis)
    grid[0].set_ylabel("latents")
    if cosines is not None:
        step = max(1, len(values) // AT_MOST)
        grid[1].scatter(values[::step].numpy(), cosines[::step].numpy(), s=5, alpha=0.5, linewidths=0)
        grid[1].axhline(0, color="0.8", linewidth=0.8)
        grid[1].set_xlim(-0.02, 1.02)
        grid[1].set_ylim(-1.05, 1.05)
        grid[1].set_xlabel(axis)
        grid[1].set_ylabel("cosine of the two vectors")
    return figure


def plot_scaling(latents: pd.DataFrame, bounds: tuple[float, float], title: str = "") -> Figure:
    """Plot nu_r against nu_e, one dot a latent, coloured by relative norm.

    Args:
        latents: With the columns nu_r, nu_e and relative_norm.
        bounds: Of exclusive latents, for nu_r and nu_e.
        title: Above the plot.
    """
    figure = Figure(figsize=(5.4, 4.2), layout="constrained")
    axes = figure.subplots()
    x, y = (latents[name].clip(-0.5, 1.5) for name in ("nu_e", "nu_r"))
    dots = axes.scatter(x, y, c=latents["relative_norm"], cmap="coolwarm", vmin=0, vmax=1, s=10, linewidths=0)
    axes.axvline(bounds[1], color="0.6", linestyle="--", linewidth=0.8)
    axes.axhline(bounds[0], color="0.6", linestyle="--", linewidth=0.8)
    axes.set_xlim(-0.55, 1.55)
    axes.set_ylim(-0.55, 1.55)
    axes.annotate("exclusive", (-0.5, -0.5), fontsize=8, color="0.4")
    axes.set_xlabel("nu_e: of the error, own part put back")
    axes.set_ylabel("nu_r: of the reconstruction")
    figure.colorbar(dots, ax=axes, label="relative decoder norm")
    axes.set_title(title, fontsize=10)
    return figure


def plot_inputs(table: pd.DataFrame, at_most: int = 6) -> Figure:
    """Plot the strongest inputs of each target as bars.

    Args:
        table: With the columns target, source and strength.
        at_most: So many targets are drawn.
    """
    targets = list(dict.fromkeys(table["target"]))[:at_most]
    figure = Figure(figsize=(3.0 * max(1, len(targets)), 3.2), layout="constrained")
    grid = figure.subplots(1, max(1, len(targets)), squeeze=False)[0]
    for axes, target in zip(grid, targets, strict=False):
        here = table[table["target"] == target]
        colours = ["C0" if value > 0 else "C3" for value in here["strength"]]
        axes.barh([str(source) for source in here["source"]], here["strength"], color=colours)
        axes.invert_yaxis()
        axes.axvline(0, color="0.5", linewidth=0.8)
        axes.tick_params(labelsize=7)
        axes.set_title(f"into {target}", fontsize=9)
        axes.set_xlabel("strength", fontsize=8)
    return figure


def plot_geometry(first: Tensor, second: Tensor, names: tuple[str, str], correlation: float, permuted: float) -> Figure:
    """Plot each pair's cosine in one model against that in the other.

    Args:
        first: (pairs,).
        second: (pairs,).
        names: The models.
        correlation: Between the two.
        permuted: With one model's latents permuted.
    """
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axes = figure.subplots()
    step = max(1, len(first) // (5 * AT_MOST))
    axes.scatter(first[::step].numpy(), second[::step].numpy(), s=3, alpha=0.3, linewidths=0)
    axes.axline((0, 0), slope=1, color="0.6", linewidth=0.8)
    axes.set_xlabel(f"cosine of two shared latents in {names[0]}")
    axes.set_ylabel(f"in {names[1]}")
    axes.set_title(f"correlation {correlation:.3f} (permuted {permuted:.3f})", fontsize=10)
    return figure


def plot_effects(latents: pd.DataFrame, names: tuple[str, str]) -> Figure:
    """Plot the cosine of each latent's two vectors against the correlation of its effects, beside permuted ones.

    Args:
        latents: With the columns cosine, correlation and permuted.
        names: The models.
    """
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.scatter(latents["cosine"], latents["correlation"], s=6, alpha=0.5, linewidths=0)
    left.axline((0, 0), slope=1, color="0.7", linewidth=0.8)
    left.set_xlabel(f"cosine of the vectors in {names[0]} and {names[1]}")
    left.set_ylabel("correlation of the logits they add")
    for name, colour in (("correlation", "C0"), ("permuted", "0.6")):
        right.hist(latents[name], bins=40, range=(-1, 1), histtype="step", color=colour, label=name)
    right.set_xlabel("correlation of the logits they add")
    right.set_ylabel("shared latents")
    right.legend(fontsize=8)
    return figure


def plot_against_saes(by_site: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Plot FVU by site, and active latents a token.

    Args:
        by_site: FVU, one row a site and one column a kind.
        table: With the columns what and l0.
    """
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    for name in by_site.columns:
        left.plot(range(len(by_site)), by_site[name], marker="o", markersize=4, label=name)
    _name_sites(left, list(by_site.index))
    left.set_ylim(bottom=0)
    left.set_ylabel("fraction of variance unexplained")
    left.legend(fontsize=8)
    bars = right.barh(table["what"], table["l0"], color=[f"C{number}" for number in range(len(table))])
    right.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    right.invert_yaxis()
    right.margins(x=0.15)
    right.tick_params(labelsize=8)
    right.set_xlabel("active latents a token, over all sites")
    return figure


def _name_sites(axes: Axes, sites: Sequence[str]) -> None:
    axes.set_xticks(range(len(sites)), sites, rotation=90 if len(sites) > 4 else 0, fontsize=7)
