"""A text that a model knows by heart beside one made up: what a group of features does on both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from clt_plugin.analysis.faithfulness._texts import fitting
from clt_plugin.attribution.graph import GraphError
from clt_plugin.interventions import only, set_value
from clt_plugin.interventions.edits import Supernode
from clt_plugin.interventions.modes import intervene

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MADE_UP_LICENCE = (
    "Permission is hereby given, at no cost, to every member of this club holding a copy of this song and associated "
    'sheets (the "Music"), to play the Music without limitation, including the rights to hum, sing, record, arrange, '
    "print, lend, teach, and/or"
)
"""A licence that does not exist, with a list of verbs that ends as that of the MIT licence does."""


@dataclass(frozen=True, eq=False)
class Memorised:
    """What features of a memorised text's circuit do there and on a control.

    Attributes:
        group: The features.
        answer: The token that the model knows by heart.
        features: One row a feature: layer, feature, its activation at the last token of either text, and the weight of
            its edge to the answer.
        table: One row a text and strength: the probability of the answer, the likeliest token and its probability,
            and the KL from the unedited prediction, in nats.
    """

    group: Supernode
    answer: str
    features: pd.DataFrame
    table: pd.DataFrame

    def plot(self) -> Figure:
        """Draw the answer's probability and the KL over strengths, on both texts."""
        from clt_plugin.report.faithfulness_circuits import plot_memorised

        return plot_memorised(self.table, self.features, self.answer)


def memorised(
    model: Any,
    clt: Any,
    prompt: Any = None,
    control: Any = MADE_UP_LICENCE,
    *,
    answer: str | int | None = None,
    n_features: int = 4,
    features: Any = None,
    strengths: Sequence[float] = (0.5, 0.0, -0.7),
    **settings: Any,
) -> Memorised:
    """Steer the features behind a memorised word, on the memorised text and on a made-up one.

    The group is that of the features at the last token with the largest edges into the answer's logit. Strength s sets
    each to s times its activation on the memorised text, on both texts, at the last token. Features that serve the
    memorised text alone are silent on the control; features of a general step are active on both and steer both. The
    study of unfaithful circuits did it on the MIT licence (" sell" after "sublicense, and/or") and a made-up one, with
    strength -0.7.

    Args:
        model: An nnsight model, a TransformerBridge, or a transformers model, with a tokenizer.
        clt: A crosscoder that can stand for MLPs, or a reference.
        prompt: The memorised text; by default the MIT licence up to " sell", which the demo model knows.
        control: The text to compare with.
        answer: The memorised token; by default the likeliest next one.
        n_features: How many features are in the group.
        features: The group itself, {layer: features} or a `supernode`, in place of the strongest.
        strengths: Factors on the activations; 1 leaves the memorised text as it is.
        **settings: Of `attribute`, such as ``max_feature_nodes``.
    """
    import pandas as pd

    from clt_plugin.attribution.trace import attribute
    from clt_plugin.demo import MIT_PROMPT

    crosscoder, prompt = fitting(model, clt), MIT_PROMPT if prompt is None else prompt
    graph = attribute(
        model, prompt, None if answer is None else answer, clt=crosscoder, bar=False, **{"max_n_logits": 1, **settings}
    )
    target = graph.of_kind("target").nonzero().flatten()[:1]
    token = str(graph.nodes["token"].iloc[int(target)])
    token_id = int(graph.nodes["token_id"].iloc[int(target)])
    last = graph.nodes[(graph.nodes["kind"] == "feature") & (graph.nodes["position"] == len(graph.info.tokens) - 1)]
    last = last.assign(edge=graph.adjacency[int(target), torch.tensor(last.index)].double().numpy())
    if features is None:
        last = last[last["edge"] > 0].nlargest(n_features, "edge")
        if not len(last):
            raise GraphError(f"no feature at the last token pushes {token!r}: name some with features=")
        features = {label: of["feature"].tolist() for label, of in last.groupby("group", sort=True)}
    group = features if isinstance(features, Supernode) else Supernode.of(None, features)
    texts = {"memorised": prompt, "control": control}
    unedited = {name: intervene(model, text, None, clt=crosscoder) for name, text in texts.items()}
    held = {name: _held(run, crosscoder, group) for name, run in unedited.items()}
    table = pd.DataFrame(held).rename_axis(["layer", "feature"]).reset_index()
    edges = dict(zip(zip(last["group"], last["feature"], strict=True), last["edge"].tolist(), strict=True))
    keys = zip(table["layer"].tolist(), table["feature"].tolist(), strict=True)
    table = table.assign(edge=[float(edges.get(key, 0.0)) for key in keys])
    rows = []
    for name, text in texts.items():
        for strength in (1.0, *strengths):
            values = [strength * value for value in held["memorised"].values()]
            edit = None if strength == 1.0 else only(set_value(group=group, value=values), position=-1)
            run = unedited[name] if edit is None else intervene(model, text, edit, clt=crosscoder)
            likeliest = max(run.top_tokens(1), key=lambda each: each.after)
            chance = run.probability_change(token_id).after
            shown = "unedited" if edit is None else f"{strength:g}"
            rows.append((name, strength, shown, chance, likeliest.text, likeliest.after, float(run.kl()[0])))
    columns = ["text", "strength", "run", "answer", "likeliest", "probability", "kl"]
    return Memorised(group, token, table, pd.DataFrame(rows, columns=columns))


def _held(run: Any, crosscoder: Any, group: Supernode) -> Mapping[tuple[str, int], float]:
    """Return the activations of a group's features at a run's last token."""
    from clt_plugin.adapters._run import group_labels

    labels = group_labels(crosscoder.wiring)
    return {
        (label, latent): float(run.before.dense(labels.index(label))[0, -1, latent])
        for label, latents in group.members
        for latent in latents
    }
