"""Do cross-layer writes point where the residual stream goes, or where the loss would have it go?

Two studies of one form. Each token has a direction at each written site; for every feature that is active there, the
cosine of its decoder vector for that site with that direction is taken. Beside it stand the vector that the feature
writes at its own layer (``local``), and the vector that another active feature of the same layer writes at the same
site (``null``): what any vector of these decoders would reach, whatever feature it belonged to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt_plugin.adapters._run import group_labels
from clt_plugin.analysis.activations._directions import BINS, KINDS, Directions, Pair, bootstrap
from clt_plugin.analysis.activations._gradients import loss_gradients
from clt_plugin.core import Crosscoder, Site
from clt_plugin.training.data.activations import Activations
from clt_plugin.training.data.tokens import Rows
from clt_plugin.training.reading import read_texts, tokens_for

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Directing = Callable[[Rows, Activations], Mapping[tuple[int, Site], Tensor]]
"""The direction of each token that counts, (tokens, d), for every write (group, site)."""


@dataclass(frozen=True, eq=False)
class Alignment:
    """How decoder vectors lie to a direction of each token on which their features are active.

    Attributes:
        table: One row for each write of a group to a site: the group's label, its source layer, the target layer, how
            many cosines there are and of how many features; their mean with its 95% interval (bootstrap over
            features); the mean of the vector written at the own layer (``local``) and of other features' vectors
            (``null``); and the share of cosines above the 99th percentile of the null (0.01 where nothing is aligned).
        strongest: The features whose writes to other layers are aligned best on average, over at least `least` tokens.
        histograms: {"cross-layer", "same layer", "null": counts of cosines from -1 to 1}.
        direction: What the direction is, for people.
        least: See `strongest`.
    """

    table: pd.DataFrame
    strongest: pd.DataFrame
    histograms: Mapping[str, Tensor]
    direction: str
    least: int

    def plot(self) -> Figure:
        """Draw the mean cosine by source and target, and how cosines are distributed."""
        from clt_plugin.report.alignment import plot_alignment

        return plot_alignment(self.table, self.histograms, f"cosine with {self.direction}")

    def __str__(self) -> str:
        shown = self.table.to_string(index=False, float_format=lambda value: f"{value:.4f}")
        return f"cosine of decoder vectors with {self.direction}\n{shown}"


def residual_alignment(
    clt: Crosscoder,
    model: Any,
    texts: Any,
    *,
    tokenizer: Any = None,
    max_tokens: int | None = 20_000,
    length: int = 256,
    batch_size: int = 8,
    n_bootstrap: int = 200,
    seed: int = 0,
    bar: bool | None = None,
) -> Alignment:
    """Compare what a feature writes to a later layer with what the residual stream gains up to there.

    For a write from layer s to layer t the direction is ``R_out - R_in``: the residual stream as it leaves layer t less
    that which entered layer s, on the tokens on which the feature is active. A write that stood in for the layers
    between would be aligned with it.
    Source: "Cross-Layer Connections in Cross-Layer Transcoders", experiment 6.

    Args:
        clt: The crosscoder.
        model: The model that it belongs to.
        texts: A `Tokens`, or whatever `Texts.of` reads.
        tokenizer: For models without one of their own.
        max_tokens: No further batch is run once so many tokens have counted; None for all.
        length: How many tokens a row has at most.
        batch_size: How many rows run at a time.
        n_bootstrap: How many draws the intervals are made of.
        seed: Of the draws and of the null.
        bar: Whether to show progress; by default on a terminal.
    """
    wiring = clt.wiring
    into = {g: Site(sites[0].model, "resid_pre", wiring.home[g]) for g, sites in enumerate(wiring.reads)}
    out_of = {site: Site(site.model, "resid_post", site.layer) for site in wiring.write_sites}

    def gained(rows: Rows, found: Activations) -> Mapping[tuple[int, Site], Tensor]:
        return {
            (g, site): found[out_of[site]] - found[into[g]] for g, sites in enumerate(wiring.writes) for site in sites
        }

    sums = Directions(clt, seed)
    tokens = tokens_for(model, clt, texts, tokenizer, length)
    settings: dict[str, Any] = {"batch_size": batch_size, "max_tokens": max_tokens, "bar": bar}
    _stream(sums, model, tokens, gained, (*into.values(), *out_of.values()), settings)
    return _result(sums, "the residual stream's gain from source to target", n_bootstrap, seed)


def gradient_alignment(
    clt: Crosscoder,
    model: Any,
    texts: Any,
    *,
    tokenizer: Any = None,
    max_tokens: int | None = 20_000,
    length: int = 256,
    batch_size: int = 8,
    n_bootstrap: int = 200,
    seed: int = 0,
    bar: bool | None = None,
) -> Alignment:
    """Compare what a feature writes with what would lower the loss at once: minus the loss's gradient at the site.

    The gradient is that of the summed next-token cross-entropy of the model as it is. ``mean - local`` in the table
    says whether the vector for the target suits the target better than the one for the own layer would.
    Source: "Cross-Layer Connections in Cross-Layer Transcoders", experiment 8.

    Args:
        clt: The crosscoder.
        model: The model that it belongs to.
        texts: As for `residual_alignment`.
        tokenizer: As for `residual_alignment`.
        max_tokens: As for `residual_alignment`.
        length: As for `residual_alignment`.
        batch_size: As for `residual_alignment`.
        n_bootstrap: As for `residual_alignment`.
        seed: As for `residual_alignment`.
        bar: As for `residual_alignment`.
    """
    wiring = clt.wiring

    def wanted(rows: Rows, found: Activations) -> Mapping[tuple[int, Site], Tensor]:
        gradients = loss_gradients(model, rows, wiring.write_sites)
        return {(g, site): -gradients[site].to(clt.device) for g, sites in enumerate(wiring.writes) for site in sites}

    sums = Directions(clt, seed)
    tokens = tokens_for(model, clt, texts, tokenizer, length)
    settings: dict[str, Any] = {"batch_size": batch_size, "max_tokens": max_tokens, "bar": bar}
    _stream(sums, model, tokens, wanted, (), settings)
    return _result(sums, "minus the loss's gradient at the target", n_bootstrap, seed)


def _stream(
    sums: Directions, model: Any, tokens: Any, directing: Directing, sites: tuple[Site, ...], settings: dict[str, Any]
) -> None:
    crosscoder = sums.crosscoder
    for rows, found in read_texts(model, crosscoder, tokens, sites=sites, **settings):
        with torch.no_grad():
            features = crosscoder.encode(found.by_site(crosscoder.sites.read), sparse=True)
        sums.add(features, directing(rows, found))


# ---------------------------------------------------------------- the result


def _result(sums: Directions, direction: str, n_bootstrap: int, seed: int, least: int = 5) -> Alignment:
    import pandas

    wiring = sums.crosscoder.wiring
    labels, rows, features = group_labels(wiring), [], []
    histograms = {name: torch.zeros(BINS, dtype=torch.float64) for name in ("cross-layer", "same layer", "null")}
    for (group, site), pair in sums.pairs.items():
        source = wiring.home[group]
        histograms["same layer" if site.layer == source else "cross-layer"] += pair.histograms["written"]
        histograms["null"] += pair.histograms["null"]
        about = {"group": labels[group], "source": source, "site": str(site), "target": site.layer}
        rows.append({**about, **_row(pair, n_bootstrap, seed)})
        if site.layer == source:
            continue
        often = pair.counts["written"] >= least
        means = (pair.sums["written"] / pair.counts["written"]).where(often, -torch.inf)
        for latent in means.topk(min(20, len(means))).indices.tolist():
            if bool(often[latent]):
                tokens = int(pair.counts["written"][latent])
                features.append({**about, "feature": latent, "tokens": tokens, "mean": float(means[latent])})
    strongest = pandas.DataFrame(features, columns=["group", "source", "site", "target", "feature", "tokens", "mean"])
    strongest = strongest.sort_values("mean", ascending=False, kind="stable", ignore_index=True).head(20)
    return Alignment(pandas.DataFrame(rows), strongest, histograms, direction, least)


def _row(pair: Pair, n_bootstrap: int, seed: int) -> dict[str, Any]:
    means = {}
    for kind in KINDS:
        count = float(pair.counts[kind].sum())
        means[kind] = float(pair.sums[kind].sum()) / count if count else float("nan")
    low, high = bootstrap(pair.sums["written"], pair.counts["written"], n_bootstrap, seed)
    return {
        "tokens": int(pair.counts["written"].sum()),
        "features": int((pair.counts["written"] > 0).sum()),
        "mean": means["written"],
        "low": low,
        "high": high,
        "local": means["local"],
        "null": means["null"],
        "above_null_p99": _share_above(pair),
    }


def _share_above(pair: Pair) -> float:
    """Return the share of cosines above the null's 99th percentile, to the width of a bin."""
    null, written = pair.histograms["null"], pair.histograms["written"]
    if not float(null.sum()) or not float(written.sum()):
        return float("nan")
    # From above: the bins of which the null has at most 1%.
    tail = null.flip(0).cumsum(0) <= 0.01 * null.sum()
    return float(written.flip(0)[tail].sum() / written.sum())
