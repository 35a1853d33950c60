"""Does what a graph says hold in the model? Influence against ablation, and knock-on effects against influence.

Both compare ranks: a graph says which features matter, and ablating them one at a time in the model itself says which
do. Direct edges are nearly forced to be confirmed under frozen attention; so attention is live here by default, and
knock-on effects on other features are the real test.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from clt_plugin.analysis.faithfulness._statistics import spearman_interval
from clt_plugin.analysis.faithfulness._texts import fitting, on_terminal, several, show
from clt_plugin.attribution.graph import Graph
from clt_plugin.attribution.scores import blocks, in_order, shares, target_weights

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

PREDICTORS = ("influence", "activation", "direct edge", "random")
"""What is compared with the measured effect: the graph's influence, and baselines."""
ROWS = 16
"""So many ablations run as one batch."""


@dataclass(frozen=True, eq=False)
class RankAgreement:
    """How well a graph predicts what ablations do.

    Attributes:
        measure: What was measured: ``"KL"`` of the last prediction, or ``"knock-on"`` effects on other features.
        pairs: One row a thing ablated (and, of knock-on effects, a feature that may respond): ``prompt`` (its number),
            ``source``, ``target``, ``effect`` and a column for each predictor; ``indirect``, whether most of the
            influence takes more than one edge.
        prompts: The prompts.
        resamples: Of the bootstrap.
    """

    measure: str
    pairs: pd.DataFrame
    prompts: Sequence[str]
    resamples: int = 300

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row a predictor: Spearman's rank correlation with the effect, its 95% interval, and how many pairs.

        The mean over prompts of the correlation within each; the interval is by bootstrap over prompts and pairs. Of
        knock-on effects there is a row for all pairs and one for those that are mainly indirect.
        """
        import pandas as pd

        parts = {"all": self.pairs}
        if self.measure == "knock-on":
            parts["indirect"] = self.pairs[self.pairs["indirect"]]
        rows = []
        for part, pairs in parts.items():
            for name in PREDICTORS:
                groups = [(each[name].to_numpy(), each["effect"].to_numpy()) for _, each in pairs.groupby("prompt")]
                rows.append((part, name, *spearman_interval(groups, resamples=self.resamples), len(pairs)))
        return pd.DataFrame(rows, columns=["pairs", "predictor", "spearman", "low", "high", "n"])

    def plot(self) -> Figure:
        """Draw the correlations with their intervals, and the effect against influence."""
        from clt_plugin.report.faithfulness import plot_agreement

        return plot_agreement(self.table, self.pairs, self.measure, len(self.prompts))


def ablation_against_influence(
    model: Any,
    clt: Any,
    prompts: Iterable[Any],
    *,
    n_features: int = 32,
    freeze_attention: bool = False,
    seed: int = 0,
    bar: bool | None = None,
    **settings: Any,
) -> RankAgreement:
    """Ablate features one at a time, and compare the KL of the last prediction with what the graph says of them.

    Of each prompt's graph half the features are those of most influence, half are drawn from the rest. Each, at its
    position, is set to 0 in the model (`intervene`, mode ``"iterative"``: everything after it responds). Predictors:
    the node's influence on the logits; and as baselines its activation, the absolute weight of its direct edges to the
    logits, and random numbers. Ameisen et al. 2025, "Circuit Tracing", evaluate influence so.

    Args:
        model: An nnsight model, a TransformerBridge, or a transformers model.
        clt: A crosscoder that can stand for MLPs, or a reference.
        prompts: Texts, or token ids (position,).
        n_features: How many features of each prompt to ablate.
        freeze_attention: Whether attention patterns keep their values of the unedited run.
        seed: Of the features drawn, and of the random baseline.
        bar: Whether to show progress; by default on a terminal.
        **settings: Of `attribute`, such as ``max_feature_nodes``.
    """
    rows: list[dict[str, Any]] = []
    prompts = several(prompts)
    for number, graph, ablate in _graphs(model, clt, prompts, freeze_attention, bar, settings):
        chosen, random = _chosen(graph, n_features, seed + number)
        weights, influence = target_weights(graph), graph.influence()
        targets = graph.of_kind("target").nonzero().flatten()
        direct = weights[targets] @ graph.adjacency[targets].to("cpu", torch.float64).abs()
        share = weights[targets] @ _shares_of(graph, targets)
        for place, kl, _ in ablate(chosen, False):
            activation = float(graph.nodes["activation"][place])
            predicted = [float(influence[place]), activation, float(direct[place]), random.random()]
            row = {"prompt": number, "source": graph.nodes["id"][place], "target": "logits", "effect": kl}
            row |= dict(zip(PREDICTORS, predicted, strict=True))
            rows.append(row | {"indirect": bool(influence[place] > 2 * share[place])})
    return _agreement("KL", rows, prompts)


def knock_on(
    model: Any,
    clt: Any,
    prompts: Iterable[Any],
    *,
    n_features: int = 16,
    freeze_attention: bool = False,
    seed: int = 0,
    bar: bool | None = None,
    **settings: Any,
) -> RankAgreement:
    """Ablate features one at a time, and compare what becomes of later features with the influence on them.

    For a source s and each active feature t that edges lead to: the effect is ``|change of a_t| / a_t`` in the model
    without s; the influence is the sum over all paths from s to t of the products of the edges' shares, the entry
    (t, s) of ``(I - Ahat)^-1 - I``. The literature's figure is a Spearman correlation of 0.72 on 20 prompts (Ameisen et
    al. 2025, "Circuit Tracing").

    Args:
        model: As for `ablation_against_influence`.
        clt: As for `ablation_against_influence`.
        prompts: As for `ablation_against_influence`.
        n_features: How many features of each prompt to ablate.
        freeze_attention: As for `ablation_against_influence`.
        seed: As for `ablation_against_influence`.
        bar: As for `ablation_against_influence`.
        **settings: As for `ablation_against_influence`.
    """
    rows: list[dict[str, Any]] = []
    prompts = several(prompts)
    for number, graph, ablate in _graphs(model, clt, prompts, freeze_attention, bar, settings):
        chosen, random = _chosen(graph, n_features, seed + number)
        influences, ids = influence_of(graph, chosen), graph.nodes["id"].tolist()
        activations = torch.tensor(graph.nodes["activation"].to_numpy())
        features = graph.of_kind("feature").nonzero().flatten()
        edges = graph.adjacency[features][:, chosen].to("cpu", torch.float64).abs()
        share = _shares_of(graph, features)[:, chosen]
        for k, (place, _, change) in enumerate(ablate(chosen, True)):
            reached = (influences[features, k] > 0).nonzero().flatten()
            for each, target in zip(reached.tolist(), features[reached].tolist(), strict=True):
                influence = float(influences[target, k])
                predicted = [influence, float(activations[place]), float(edges[each, k]), random.random()]
                row = {"prompt": number, "source": ids[place], "target": ids[target]}
                row |= {"effect": abs(float(change[target])) / float(activations[target])}
                row |= dict(zip(PREDICTORS, predicted, strict=True))
                rows.append(row | {"indirect": influence > 2 * float(share[each, k])})
    return _agreement("knock-on", rows, prompts)


def influence_of(graph: Graph, sources: Sequence[int]) -> Tensor:
    """Return the influence of some nodes on every node: columns of ``(I - Ahat)^-1 - I``, (N, n) in float64.

    Args:
        graph: The graph.
        sources: Places of the nodes.
    """
    found = torch.zeros(len(graph), len(sources), dtype=torch.float64)
    start = torch.zeros_like(found)
    start[list(sources), range(len(sources))] = 1
    # From the inputs on: a row is computed once all that it reads is; what rows read of each other is a small system.
    for some, rows in blocks(graph, in_order(graph)):
        share = shares(rows)
        among = torch.eye(len(some), dtype=torch.float64) - share[:, some]
        given = share @ start + share @ found
        found[some] = torch.linalg.solve_triangular(among, given, upper=False, unitriangular=True)
    return found


# ---------------------------------------------------------------- what both share


def _agreement(measure: str, rows: list[dict[str, Any]], prompts: Sequence[Any]) -> RankAgreement:
    import pandas as pd

    if not rows:
        raise ValueError("no feature could be ablated: none is active on these prompts")
    return RankAgreement(measure, pd.DataFrame(rows), [show(prompt) for prompt in prompts])


def _graphs(
    model: Any, clt: Any, prompts: Sequence[Any], freeze_attention: bool, bar: bool | None, settings: Mapping[str, Any]
) -> Iterable[tuple[int, Graph, Any]]:
    """Yield each prompt's number, its graph, and what ablates features of it."""
    from tqdm.auto import tqdm

    from clt_plugin.attribution.trace import attribute

    crosscoder = fitting(model, clt)
    for number, prompt in enumerate(tqdm(prompts, "ablations", disable=not on_terminal(bar))):
        graph = attribute(model, prompt, clt=crosscoder, bar=False, **settings)
        yield number, graph, _Ablations(model, crosscoder, graph, freeze_attention)


class _Ablations:
    """Ablates a graph's features one at a time, several to a batch.

    Args:
        model: The model.
        crosscoder: Whose features.
        graph: Of one prompt.
        freeze_attention: As for `intervene`.
    """

    def __init__(self, model: Any, crosscoder: Any, graph: Graph, freeze_attention: bool) -> None:
        from clt_plugin.adapters._run import group_labels

        self.model, self.crosscoder, self.graph, self.frozen = model, crosscoder, graph, freeze_attention
        features = graph.nodes[graph.nodes["kind"] == "feature"]
        # For each group the places of its features in the graph, their positions and their latents.
        self.where = []
        for label in group_labels(crosscoder.wiring):
            own = features[features["group"] == label]
            self.where.append(torch.tensor([own.index.tolist(), own["position"].tolist(), own["feature"].tolist()]))

    def __call__(self, places: Sequence[int], with_features: bool) -> Iterable[tuple[int, float, Tensor]]:
        """Yield each place, the KL of the last prediction, and every node's change of activation, (N,)."""
        from clt_plugin.interventions import ablate, chain, only
        from clt_plugin.interventions.modes import intervene

        columns = [self.graph.nodes[name].tolist() for name in ("group", "feature", "position")]
        for start in range(0, len(places), ROWS):
            some = places[start : start + ROWS]
            edits = [
                only(ablate(columns[0][place], columns[1][place]), position=columns[2][place], batch=row)
                for row, place in enumerate(some)
            ]
            ids = torch.tensor(self.graph.info.token_ids).expand(len(some), -1)
            run = intervene(self.model, ids, chain(*edits), clt=self.crosscoder, freeze_attention=self.frozen)
            kl = run.kl()
            changes = self._changes(run, len(some)) if with_features else torch.empty(len(some), 0)
            for row, place in enumerate(some):
                yield place, float(kl[row]), changes[row]

    def _changes(self, run: Any, n: int) -> Tensor:
        """Return every node's change of activation in each row of a run, (n, N); 0 for those that are no features."""
        changes = torch.zeros(n, len(self.graph), dtype=torch.float64)
        for g, (places, positions, latents) in enumerate(self.where):
            # One group at a time: dense activations of all would not fit.
            before, after = (each.dense(g)[:, positions, latents].double().cpu() for each in (run.before, run.after))
            changes[:, places] = after - before
        return changes


def _chosen(graph: Graph, n: int, seed: int) -> tuple[list[int], np.random.Generator]:
    """Return features of a graph, half of most influence and half of the rest; and the generator that drew them."""
    random = np.random.default_rng(seed)
    places = graph.of_kind("feature").nonzero().flatten()
    order = places[graph.influence()[places].argsort(descending=True, stable=True)].tolist()
    top = order[: (n + 1) // 2]
    rest = order[len(top) :]
    drawn = random.permutation(len(rest))[: n - len(top)].tolist()
    return top + [rest[i] for i in drawn], random


def _shares_of(graph: Graph, places: Tensor) -> Tensor:
    """Return the shares of some rows' edges, (n, N) in float64."""
    return torch.cat([shares(rows) for _, rows in blocks(graph, places)])
