"""A CLT and per-layer transcoders on one prompt: which features and which paths each finds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clt_plugin.analysis.faithfulness._texts import batches, fitting
from clt_plugin.attribution.graph import Graph
from clt_plugin.core import Crosscoder
from clt_plugin.core.features import SparseGroup

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from clt_plugin.attribution.compare import Comparison
    from clt_plugin.attribution.paths import Path

MATCHINGS = ("both", "decoder", "coactivation")


@dataclass(frozen=True, eq=False)
class Versus:
    """Two crosscoders' accounts of one prediction.

    Attributes:
        graphs: By name, ``"clt"`` and ``"plt"``.
        matches: One row a pair of matched features: ``clt`` and ``plt`` (such as ``"0.451"``), the cosine of what their
            ``decoder``s write, the cosine of their ``coactivation``, and the ``similarity`` by which they were matched.
        by: How features were matched.
        similarity: How alike two must be to match.
        comparison: The pruned graphs' difference, with matched features as the same nodes.
        paths: By name, the strongest paths from any token's embedding to the likeliest logit.
    """

    graphs: dict[str, Graph]
    matches: pd.DataFrame
    by: str
    similarity: float
    comparison: Comparison
    paths: dict[str, list[Path]]

    @property
    def table(self) -> pd.DataFrame:
        """One row a measure, one column a crosscoder.

        ``features`` active and how many are ``matched``; ``matched influence``, their share in all features' influence;
        ``hops``, how many features a path from the logits back to the inputs passes on average, each path counting by
        its share; ``first layer``, the share of layer 0 in features' influence; and the graph's two scores.
        """
        import pandas as pd

        columns = {}
        for name, graph in self.graphs.items():
            influence = graph.influence()
            features = graph.of_kind("feature")
            labels = [
                f"{group}.{latent}" for group, latent in zip(graph.nodes["group"], graph.nodes["feature"], strict=True)
            ]
            matched = torch.tensor([label in set(self.matches[name]) for label in labels]) & features
            whole = float(influence[features].sum())
            first = features & torch.tensor((graph.nodes["layer"] == 0).to_numpy())
            scores = graph.scores()
            columns[name] = {
                "features": int(features.sum()),
                "matched": int(matched.sum()),
                "matched influence": float(influence[matched].sum()) / whole,
                "hops": whole / float(graph.nodes["weight"].sum()),
                "first layer": float(influence[first].sum()) / whole,
                "replacement score": scores.replacement,
                "completeness": scores.completeness,
            }
        return pd.DataFrame(columns).rename_axis("measure")

    def plot(self) -> Figure:
        """Draw the influence of layers in each graph, and how alike matched features are."""
        from clt_plugin.report.faithfulness_circuits import plot_versus

        by_layer = {name: _by_layer(graph) for name, graph in self.graphs.items()}
        return plot_versus(by_layer, self.matches, self.graphs["clt"].info.prompt)

    def __str__(self) -> str:
        lines = [
            self.table.to_string(float_format="{:.3f}".format),
            f"matched by {self.by}, at least {self.similarity}",
        ]
        for name, paths in self.paths.items():
            lines += [f"{name}:", *(f"  {path}" for path in paths)]
        return "\n".join([*lines, str(self.comparison)])


def clt_against_plt(
    model: Any,
    clt: Any,
    plt: Any,
    prompt: Any,
    *,
    by: str = "both",
    similarity: float = 0.5,
    texts: Iterable[Any] = (),
    n_paths: int = 5,
    **settings: Any,
) -> Versus:
    """Trace one prompt with a CLT and with per-layer transcoders, match their features, and compare what they tell.

    Features that are active on the prompt are matched where each is the other's nearest, of any layers, and they are
    at least as alike as asked. Two similarities: the cosine of what decoders write, summed over the layers written,
    which is what each leaves in the residual stream at last; and the cosine of their activations over all tokens of the
    prompt and of further texts. ``"both"`` is the mean of the two. Only one-to-one matches are found: a CLT's feature
    that stands for a chain of a PLT's matches the nearest of the chain.

    Args:
        model: An nnsight model, a TransformerBridge, or a transformers model.
        clt: A CLT, or a reference.
        plt: Per-layer transcoders of the same model, or a reference.
        prompt: Text, or token ids (position,).
        by: ``"both"``, ``"decoder"`` or ``"coactivation"``.
        similarity: From -1 to 1.
        texts: Texts over which co-activation is measured besides the prompt.
        n_paths: How many of the strongest paths to find.
        **settings: Of `attribute`, such as ``max_feature_nodes``.
    """
    import pandas as pd

    from clt_plugin.attribution.compare import compare
    from clt_plugin.attribution.trace import attribute

    if by not in MATCHINGS:
        raise ValueError(f"features are matched by {', '.join(MATCHINGS)}, not by {by!r}")
    crosscoders = {"clt": fitting(model, clt), "plt": fitting(model, plt)}
    graphs = {name: attribute(model, prompt, clt=each, bar=False, **settings) for name, each in crosscoders.items()}
    members = {name: _active(graphs[name], crosscoders[name]) for name in graphs}
    decoder = (
        F.normalize(_written(crosscoders["clt"], members["clt"]), dim=1)
        @ F.normalize(_written(crosscoders["plt"], members["plt"]), dim=1).mT
    )
    together = _coactivation(model, crosscoders, members, [prompt, *texts])
    alike = {"both": (decoder + together) / 2, "decoder": decoder, "coactivation": together}[by]
    pairs = _nearest(alike, similarity)
    names = {name: _names(crosscoders[name], members[name]) for name in members}
    found = [(names["clt"][i], names["plt"][j], decoder[i, j], together[i, j], alike[i, j]) for i, j in pairs]
    matches = pd.DataFrame(
        [(one, other, *map(float, values)) for one, other, *values in found],
        columns=["clt", "plt", "decoder", "coactivation", "similarity"],
    ).sort_values("similarity", ascending=False, ignore_index=True)
    pruned = {name: graph.prune() for name, graph in graphs.items()}
    comparison = compare(pruned["clt"], pruned["plt"], features=_same(pruned, matches))
    paths = {name: _strongest(graph, n_paths) for name, graph in graphs.items()}
    return Versus(graphs, matches, by, similarity, comparison, paths)


# ---------------------------------------------------------------- matching


def _active(graph: Graph, crosscoder: Crosscoder) -> list[tuple[int, Tensor]]:
    """Return for each group the latents that are features of a graph, sorted."""
    from clt_plugin.adapters._run import group_labels

    features = graph.nodes[graph.nodes["kind"] == "feature"]
    found = []
    for g, label in enumerate(group_labels(crosscoder.wiring)):
        latents = features["feature"][features["group"] == label].unique()
        found.append((g, torch.tensor(latents, dtype=torch.int64).sort().values))
    return found


def _names(crosscoder: Crosscoder, members: Sequence[tuple[int, Tensor]]) -> list[str]:
    from clt_plugin.adapters._run import group_labels

    labels = group_labels(crosscoder.wiring)
    return [f"{labels[g]}.{latent}" for g, latents in members for latent in latents.tolist()]


def _written(crosscoder: Crosscoder, members: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Return what features leave in the residual stream, (n, d) in float64."""
    sums = []
    for g, latents in members:
        rows = crosscoder.decoder_vectors(g, latents).double()
        slices = crosscoder.layout.write_slices[g].values()
        sums.append(torch.stack([rows[:, columns] for columns in slices]).sum(0))
    return torch.cat(sums).cpu()


def _coactivation(
    model: Any, crosscoders: dict[str, Crosscoder], members: dict[str, Any], texts: Sequence[Any]
) -> Tensor:
    """Return the cosine of the activations of every pair of features over texts, (n_clt, n_plt) in float64."""
    products, squares = torch.zeros(()), {name: torch.zeros(()) for name in crosscoders}
    for text in texts:
        seen = {name: list(batches(model, each, [text], bar=False)) for name, each in crosscoders.items()}
        for one, other in zip(seen["clt"], seen["plt"], strict=True):
            # Where the two exclude different positions, a token counts if it does for both.
            both = one.counted.cpu() & other.counted.cpu()
            acts = {}
            for name, each in (("clt", one), ("plt", other)):
                n = int(each.counted.sum())
                dense = torch.cat([_dense(each.active[g], latents, n) for g, latents in members[name]], dim=1)
                acts[name] = dense[both[each.counted.cpu()]]
                squares[name] = squares[name] + acts[name].square().sum(0)
            products = products + acts["clt"].mT @ acts["plt"]
    norms = squares["clt"].sqrt()[:, None] * squares["plt"].sqrt()
    return products / norms.clamp(min=1e-30)


def _dense(group: SparseGroup, latents: Tensor, n_tokens: int) -> Tensor:
    """Return some latents' activations, (n_tokens, n) in float64."""
    place = torch.full((group.n_latents,), -1)
    place[latents] = torch.arange(len(latents))
    columns = place[group.latents.cpu()]
    kept = columns >= 0
    dense = torch.zeros(n_tokens, len(latents), dtype=torch.float64)
    dense[group.tokens.cpu()[kept], columns[kept]] = group.values.cpu().double()[kept]
    return dense


def _nearest(alike: Tensor, least: float) -> list[tuple[int, int]]:
    """Return the pairs of which each is the other's nearest and that are alike enough."""
    if not alike.numel():
        return []
    columns, rows = alike.argmax(1), alike.argmax(0)
    mutual = rows[columns] == torch.arange(len(alike))
    close = alike[torch.arange(len(alike)), columns] >= least
    return [(i, int(columns[i])) for i in (mutual & close).nonzero().flatten().tolist()]


def _same(graphs: dict[str, Graph], matches: pd.DataFrame) -> dict[str, str]:
    """Return which nodes of the two graphs are the same: matched features at one position."""
    partner = dict(zip(matches["clt"], matches["plt"], strict=True))
    at: dict[str, dict[tuple[str, int], str]] = {}
    for name, graph in graphs.items():
        features = graph.nodes[graph.nodes["kind"] == "feature"]
        columns = (features[column].tolist() for column in ("group", "feature", "position", "id"))
        at[name] = {(f"{g}.{latent}", position): node for g, latent, position, node in zip(*columns, strict=True)}
    return {
        node: other
        for (feature, position), node in at["clt"].items()
        if (other := at["plt"].get((partner.get(feature, ""), position))) is not None
    }


# ---------------------------------------------------------------- what each tells


def _strongest(graph: Graph, n: int) -> list[Path]:
    """Return the strongest paths from any embedding to the likeliest target."""
    target = int(graph.nodes["weight"].to_numpy().argmax())
    found = [
        path
        for source in graph.of_kind("embedding").nonzero().flatten().tolist()
        for path in graph.paths(source, target, n)
    ]
    return sorted(found, key=lambda path: -path.share)[:n]


def _by_layer(graph: Graph) -> list[float]:
    influence = graph.influence()
    features = graph.of_kind("feature")
    layers = torch.tensor(graph.nodes["layer"].to_numpy())[features]
    sums = torch.zeros(graph.info.n_layers, dtype=torch.float64).index_add(0, layers, influence[features])
    return (sums / sums.sum()).tolist()
