"""What decoder norms say of features and of distance: cross-layer scores, decay, spans.

Source: "Cross-Layer Connections in Cross-Layer Transcoders: An Empirical Investigation", experiments 3, 4 and 9.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt_plugin.analysis.studies import STUDIES, Study
from clt_plugin.analysis.weights._blocks import shown
from clt_plugin.analysis.weights.norms import DecoderNorms, norms_of
from clt_plugin.core.crosscoder import Crosscoder

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class CrossLayerFeatures:
    """Features by how much more they write to other layers than to their own.

    Attributes:
        table: The highest scores, one row a feature: ``layer`` (its group), ``feature``, ``score``, ``same`` (its
            same-layer norm), ``cross`` (the sum of its other norms); with texts also ``top_tokens``.
        scores: For each group every latent's score, (n_latents,); NaN where it writes nothing.
        labels: What each group is called.
        writes: How many other layers each group writes: scores grow with it.
    """

    table: pd.DataFrame
    scores: tuple[Tensor, ...]
    labels: tuple[str, ...]
    writes: tuple[int, ...]

    def plot(self) -> Figure:
        """Draw the scores by layer, and those of the highest features."""
        from clt_plugin.report.weights import plot_scores

        return plot_scores(self.scores, self.labels, self.writes, self.table)


def cross_layer_features(
    clt: Crosscoder | DecoderNorms,
    model: Any = None,
    texts: Iterable[Any] | None = None,
    *,
    k: int = 20,
    n_tokens: int = 5,
    crosscoder: Crosscoder | None = None,
    bar: bool | None = None,
) -> CrossLayerFeatures:
    """Rank features by their cross-layer score, and show the tokens at which the highest are active.

    ``score = sum over targets other than the source of |W_dec[s][i, t]|, over |W_dec[s][i, s]|`` (experiment 3). Early
    layers have more targets, so that the score is no fair comparison between layers: divide it by ``writes`` for the
    ratio of mean norms. A feature without a same-layer norm has an infinite score; one that writes nothing has none.

    Args:
        clt: A crosscoder over one model, or its norms.
        model: The model, to find top tokens with.
        texts: Texts in which to find them.
        k: How many of the highest scores to show.
        n_tokens: How many tokens of each.
        crosscoder: Where norms are given, the crosscoder that they are of.
        bar: Whether to show progress; by default on a terminal.

    Raises:
        ValueError: Texts are given without a model or a crosscoder.
    """
    import pandas as pd

    norms = norms_of(clt, bar)
    parts = [norms.same_and_cross(g) for g in range(len(norms.labels))]
    scores = tuple(cross / same for same, cross in parts)
    every = torch.cat(scores).nan_to_num(nan=-1.0, posinf=torch.inf)
    best = every.topk(min(k, len(every))).indices
    ends = torch.tensor([len(each) for each in scores]).cumsum(0)
    rows = []
    for place in best[every[best] >= 0].tolist():
        g = int(torch.searchsorted(ends, place, right=True))
        latent = place - (int(ends[g - 1]) if g else 0)
        same, cross = (float(side[latent]) for side in parts[g])
        rows.append((norms.labels[g], latent, float(scores[g][latent]), same, cross))
    table = pd.DataFrame(rows, columns=["layer", "feature", "score", "same", "cross"])
    if texts is not None:
        crosscoder = clt if isinstance(clt, Crosscoder) else crosscoder
        if model is None or crosscoder is None:
            raise ValueError("top tokens are found by running texts: give the model, and the crosscoder, with them")
        table["top_tokens"] = _top_tokens(model, crosscoder, table, texts, n_tokens, bar)
    others = zip(norms.targets, norms.sources, strict=True)
    writes = tuple(sum(target != source for target in targets) for targets, source in others)
    return CrossLayerFeatures(table, scores, norms.labels, writes)


def _top_tokens(
    model: Any, clt: Crosscoder, table: pd.DataFrame, texts: Iterable[Any], n_tokens: int, bar: bool | None
) -> list[str]:
    from clt_plugin.attribution import top_examples

    features = list(zip(table["layer"], table["feature"].tolist(), strict=True))
    found = top_examples(model, features, texts, clt=clt, k=1, n_tokens=n_tokens, bar=shown(bar))
    return [", ".join(repr(token) for token, _ in found[f"{g}_{i}"]["top_tokens"]) for g, i in features]


@dataclass(frozen=True, eq=False)
class Distance:
    """Decoder norm against the distance from source to target.

    Attributes:
        table: One row a distance: ``connections``, ``mean`` (of their mean norms), and the ``p10`` and ``p90`` of the
            norms of all their vectors.
        rate: By which factor a layer's distance multiplies the mean norm: least squares on its logarithm over
            connections, with one intercept for all. Below 1 for a decay.
        rate_within: The same with an intercept for each source. Long distances belong to early sources alone, and
            where those write more or less than others the first fit takes that for a decay, or hides one.
        same_layer: Whether distance 0 was part of the fits.
    """

    table: pd.DataFrame
    rate: float
    rate_within: float
    same_layer: bool

    def decay(self, distance: int = 5) -> float:
        """Return the mean norm at a distance over that at 0: the document's decay factor, 0.34 at 5 for its CLT."""
        means = dict(zip(self.table["distance"].tolist(), self.table["mean"].tolist(), strict=True))
        if 0 not in means or distance not in means:
            raise ValueError(f"there are no connections at the distances 0 and {distance}: {sorted(means)} are there")
        return means[distance] / means[0]

    def plot(self) -> Figure:
        """Draw the mean norm and its spread by distance, with the fits."""
        from clt_plugin.report.weights import plot_distance

        return plot_distance(self.table, self.rate, self.rate_within, self.same_layer)


def distance(clt: Crosscoder | DecoderNorms, *, same_layer: bool = True, bar: bool | None = None) -> Distance:
    """Measure how decoder norms decay with distance, and fit an exponential.

    ``log mean norm(s, t) = a + log(rate) (t - s)`` by least squares over connections (experiment 4 has the ratio of
    two distances; the fits are ours). A slope needs connections at two distances, otherwise it is NaN.

    Args:
        clt: A crosscoder over one model, or its norms.
        same_layer: Whether distance 0 counts in the fits: what a feature writes to its own layer may be apart.
        bar: Whether to show progress; by default on a terminal.
    """
    import pandas as pd

    norms = norms_of(clt, bar)
    pairs = norms.table
    rows = []
    for apart, chosen in pairs.groupby("distance"):
        at = [
            each[:, j]
            for g, each in enumerate(norms.norms)
            for j, target in enumerate(norms.targets[g])
            if target - norms.sources[g] == apart
        ]
        low, high = _percentiles(torch.cat(at))
        rows.append((apart, len(chosen), float(chosen["mean"].mean()), low, high))
    table = pd.DataFrame(rows, columns=["distance", "connections", "mean", "p10", "p90"])
    fitted = pairs[(pairs["mean"] > 0) & ((pairs["distance"] > 0) | same_layer)]
    x = torch.tensor(fitted["distance"].to_numpy(), dtype=torch.float64)
    y = torch.tensor(fitted["mean"].to_numpy(), dtype=torch.float64).log()
    source = torch.tensor(fitted["source"].to_numpy())
    return Distance(table, _rate(x, y, torch.zeros_like(source)), _rate(x, y, source), same_layer)


def _percentiles(values: Tensor) -> tuple[float, float]:
    """Return the 10th and 90th percentile; not by `torch.quantile`, which takes 16 million values at most."""
    return tuple(float(values.kthvalue(max(1, round(q * len(values)))).values) for q in (0.1, 0.9))  # type: ignore[return-value]


def _rate(x: Tensor, y: Tensor, group: Tensor) -> float:
    """Return exp of the slope of y on x, with an intercept for each group."""
    for g in group.unique():
        inside = group == g
        x = torch.where(inside, x - x[inside].mean(), x)
        y = torch.where(inside, y - y[inside].mean(), y)
    spread = float((x * x).sum())
    return math.exp(float((x * y).sum()) / spread) if spread > 0 else math.nan


@dataclass(frozen=True, eq=False)
class FeatureSpan:
    """Over how many layers features write.

    Attributes:
        table: One row a group of each crosscoder: ``of`` (``"CLT"`` or ``"PLT"``), ``layer``, ``features`` (those that
            write anything), ``mean`` span, ``possible`` (how many layers it can write).
        spans: {of: for each group every latent's span, (n_latents,)}.
        threshold: A layer counts where the norm is above so much of the feature's largest; or above so much itself.
        relative: Which of the two.
    """

    table: pd.DataFrame
    spans: dict[str, tuple[Tensor, ...]]
    threshold: float
    relative: bool

    def mean(self, of: str = "CLT") -> float:
        """Return the mean span of all features that write anything."""
        chosen = self.table[self.table["of"] == of]
        return float((chosen["mean"] * chosen["features"]).sum() / max(int(chosen["features"].sum()), 1))

    def plot(self) -> Figure:
        """Draw how many features have which span, and the mean span by layer."""
        from clt_plugin.report.weights import plot_spans

        return plot_spans(self.table, self.spans)


def feature_span(
    clt: Crosscoder | DecoderNorms,
    plt: Crosscoder | DecoderNorms | None = None,
    *,
    threshold: float = 0.1,
    relative: bool = True,
    bar: bool | None = None,
) -> FeatureSpan:
    """Count the layers that each feature writes above a threshold, for a CLT and for per-layer transcoders.

    Experiment 9 counts ``|W_dec[s][i, t]| > threshold`` with a threshold that it does not give, and reports a mean of
    12.5 layers for its CLT; per-layer transcoders have 1 by construction. A relative threshold does not depend on the
    scale of activations. Latents that write nothing are left out of means.

    Args:
        clt: A crosscoder over one model, or its norms.
        plt: Per-layer transcoders to set beside it, or their norms.
        threshold: Above which a layer counts.
        relative: Whether the threshold is a share of the feature's largest norm.
        bar: Whether to show progress; by default on a terminal.
    """
    import pandas as pd

    rows, spans = [], {}
    for of, given in (("CLT", clt), ("PLT", plt)):
        if given is None:
            continue
        norms, found = norms_of(given, bar), []
        for label, each in zip(norms.labels, norms.norms, strict=True):
            largest = each.amax(1, keepdim=True)
            span = (each > (threshold * largest if relative else threshold)).sum(1)
            alive = largest[:, 0] > 0
            mean = float(span[alive].double().mean()) if bool(alive.any()) else math.nan
            rows.append((of, label, int(alive.sum()), mean, each.shape[1]))
            found.append(torch.where(alive, span, 0))
        spans[of] = tuple(found)
    table = pd.DataFrame(rows, columns=["of", "layer", "features", "mean", "possible"])
    return FeatureSpan(table, spans, threshold, relative)


STUDIES.add(
    "cross-layer-features",
    Study(
        cross_layer_features,
        ("clt", "model", "texts"),
        "features that write most to other layers than their own, with their top tokens",
        {"k": int, "n_tokens": int},
    ),
)
STUDIES.add("distance", Study(distance, ("clt",), "decoder norm against distance", {"same_layer": bool}))
STUDIES.add(
    "feature-span",
    Study(
        feature_span,
        ("clt", "plt"),
        "how many layers features write, CLT against PLT",
        {"threshold": float, "relative": bool},
    ),
)
