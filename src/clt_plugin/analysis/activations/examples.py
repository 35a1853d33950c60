"""Top activating tokens of any feature, with their context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from clt_plugin.adapters._run import group_labels
from clt_plugin.attribution.corpus.examples import top_examples
from clt_plugin.core import Crosscoder

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Examples:
    """Where features are most active.

    Attributes:
        by_feature: {"{group}_{latent}": {"top_tokens": [[token, activation], ...], "examples": [{"tokens": [...],
            "activations": [...]}, ...]}}, the best first: what `Graph.to_html` takes as ``feature_info``.
    """

    by_feature: Mapping[str, Mapping[str, Any]]

    @property
    def table(self) -> pd.DataFrame:
        """One row for each passage: feature, rank, the token that is most active, its activation, and the passage."""
        import pandas

        rows = []
        for feature, known in self.by_feature.items():
            for rank, example in enumerate(known["examples"], 1):
                acts, tokens = example["activations"], example["tokens"]
                peak = max(range(len(acts)), key=acts.__getitem__)
                rows.append((feature, rank, tokens[peak], acts[peak], "".join(tokens)))
        return pandas.DataFrame(rows, columns=["feature", "rank", "token", "activation", "passage"])

    def plot(self) -> Figure:
        """Draw each feature's best passage, its tokens shaded by activation."""
        from clt_plugin.report.passages import plot_passages

        best = {name: known["examples"][0] for name, known in self.by_feature.items() if known["examples"]}
        return plot_passages(best, "where features are most active")

    def __str__(self) -> str:
        lines = []
        for feature, known in self.by_feature.items():
            tokens = ", ".join(f"{token!r} {value:.2f}" for token, value in known["top_tokens"][:5])
            lines.append(f"{feature}: {tokens or 'never active'}")
            lines += [f"    {_marked(example)}" for example in known["examples"]]
        return "\n".join(lines)


def _marked(example: Mapping[str, Any]) -> str:
    """Return a passage on one line, with the most active token between guillemets."""
    acts, tokens = example["activations"], list(example["tokens"])
    peak = max(range(len(acts)), key=acts.__getitem__)
    tokens[peak] = f"«{tokens[peak]}»"
    return "".join(tokens).replace("\n", "⏎")


def top_tokens(
    clt: Crosscoder,
    model: Any,
    texts: Any,
    *,
    features: Mapping[int, Sequence[int]] | Sequence[tuple[int, int]] | str | None = None,
    n: int = 10,
    seed: int = 0,
    **settings: Any,
) -> Examples:
    """Find the tokens and passages on which features are most active.

    Args:
        clt: The crosscoder.
        model: The model that it belongs to.
        texts: Texts, or token ids (position,).
        features: {layer: features} or (layer, feature) pairs, or a text such as ``"0.451 3.17"``; by default some drawn
            at random from all, so that nobody chooses the ones that read well.
        n: How many are drawn.
        seed: Of the drawing.
        **settings: Of `top_examples`, such as ``k`` and ``context``.

    Raises:
        EditError: There are no such features, or a text is of another kind.
    """
    chosen: Any = features
    if features is None:
        chosen = _drawn(clt, n, seed)
    elif isinstance(features, str):
        chosen = _read(features)
    return Examples(top_examples(model, chosen, texts, clt=clt, **settings))


def _drawn(clt: Crosscoder, n: int, seed: int) -> list[tuple[Any, int]]:
    """Return (label, latent) of some features, drawn from all alike, in order."""
    labels, sizes = group_labels(clt.wiring), torch.tensor(clt.group_sizes)
    order = torch.randperm(int(sizes.sum()), generator=torch.Generator().manual_seed(seed))[:n].sort().values
    ends = sizes.cumsum(0)
    groups = torch.searchsorted(ends, order, right=True)
    return [(labels[g], int(i - (ends[g] - sizes[g]))) for g, i in zip(groups.tolist(), order, strict=True)]


def _read(text: str) -> list[tuple[str, int]]:
    from clt_plugin.interventions import EditError

    pairs = []
    for word in text.replace(",", " ").split():
        layer, dot, latent = word.rpartition(".")
        if not dot or not latent.isdigit():
            raise EditError(f"a feature is written layer.feature, such as 3.811, not {word!r}")
        pairs.append((layer, int(latent)))
    return pairs
