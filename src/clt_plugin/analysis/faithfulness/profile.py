"""L0 over layers, and the share of first layers in circuits: a CLT beside per-layer transcoders trained alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clt_plugin.analysis.faithfulness._statistics import interval
from clt_plugin.analysis.faithfulness._texts import batches, fitting, on_terminal, several, show

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


# ---------------------------------------------------------------- L0


@dataclass(frozen=True)
class L0Profile:
    """How many latents are active a token, layer by layer.

    Attributes:
        l0: {name of the crosscoder: {layer: mean number of active latents of its groups a token}}.
        n_tokens: How many tokens counted.
    """

    l0: Mapping[str, Mapping[int, float]]
    n_tokens: int

    @property
    def table(self) -> pd.DataFrame:
        """One row a layer, one column a crosscoder."""
        import pandas as pd

        return pd.DataFrame(self.l0).rename_axis("layer").reset_index()

    def asymmetry(self, name: str = "clt") -> float:
        """Return the L0 of the first layer over the mean of the others: 1 for an even profile."""
        first, *others = self.l0[name].values()
        mean = sum(others) / len(others) if others else 0.0
        return first / mean if mean > 0 else float("inf") if first > 0 else float("nan")

    def plot(self) -> Figure:
        """Draw L0 by layer, one bar a crosscoder."""
        from clt_plugin.report.faithfulness import plot_l0

        return plot_l0(self.l0, self.n_tokens)


def l0_profile(
    clt: Any,
    model: Any,
    texts: Iterable[Any],
    plt: Any = None,
    *,
    batch_size: int = 8,
    max_tokens: int = 256,
    bar: bool | None = None,
) -> L0Profile:
    """Count active latents layer by layer: late layers that are nearly silent beside a PLT's warn of depth collapse.

    Early latents of a CLT write to all later layers at little cost, so that late layers may be left without any (the
    study of unfaithful circuits found layer 0 more than three times as active in GPT-2's CLTs, and not in PLTs trained
    alike). A profile is a warning only beside a PLT of the same recipe.

    Args:
        clt: A crosscoder, or a reference.
        model: An nnsight model, a TransformerBridge, or a transformers model.
        texts: Texts, or token ids (position,).
        plt: Per-layer transcoders of the same model, to stand beside it.
        batch_size: How many texts run at a time.
        max_tokens: Longer texts are cut into pieces of so many tokens.
        bar: Whether to show progress; by default on a terminal.
    """
    texts = list(texts)
    measured, n_tokens = {}, 0
    for name, each in (("clt", clt), ("plt", plt)):
        if each is None:
            continue
        crosscoder, n_tokens = fitting(model, each), 0
        counts = dict.fromkeys(sorted(set(crosscoder.wiring.home)), 0)
        for seen in batches(model, crosscoder, texts, batch_size=batch_size, max_tokens=max_tokens, bar=bar):
            n_tokens += int(seen.counted.sum())
            for group, active in seen.active.items():
                counts[crosscoder.wiring.home[group]] += len(active.values)
        if not n_tokens:
            raise ValueError("no token counts: give texts with tokens beyond those that the crosscoder excludes")
        measured[name] = {layer: count / n_tokens for layer, count in counts.items()}
    return L0Profile(measured, n_tokens)


# ---------------------------------------------------------------- circuits


@dataclass(frozen=True)
class Contributions:
    """The share of first layers' features in circuits, over several prompts.

    Attributes:
        curves: {name of the crosscoder: a curve a prompt: the share of layers 0 to n, for every n}.
        edges: Over which edges, see `clt_plugin.attribution.paths.Contribution`.
        prompts: The prompts, in the order of the curves.
    """

    curves: Mapping[str, Sequence[Sequence[float]]]
    edges: str
    prompts: Sequence[str]

    @property
    def table(self) -> pd.DataFrame:
        """One row a crosscoder and layer: the mean ``cumulative`` share, ``low`` and ``high`` (95%, over prompts)."""
        import pandas as pd

        rows = []
        for name, curves in self.curves.items():
            for layer, values in enumerate(zip(*curves, strict=True)):
                low, high = interval(values)
                rows.append((name, layer, sum(values) / len(values), low, high))
        return pd.DataFrame(rows, columns=["crosscoder", "layer", "cumulative", "low", "high"])

    def plot(self) -> Figure:
        """Draw the mean curves with their intervals, beside layers that all do as much."""
        from clt_plugin.report.faithfulness import plot_contributions_of

        return plot_contributions_of(self.table, len(self.prompts), self.edges)


def cumulative_contribution(
    model: Any,
    clt: Any,
    prompts: Iterable[Any],
    plt: Any = None,
    *,
    edges: str = "circuit",
    bar: bool | None = None,
    **settings: Any,
) -> Contributions:
    """Measure over prompts how much of the top logit's circuit the features of layers 0 to n do, for every n.

    For each prompt, over all positive edges that leave features among the nodes that lead to the likeliest next token,
    ``sum over l <= n of sum over edges from layer l of w_e``, as a share of all layers'. In the study of unfaithful
    circuits (its figure 6, 45 prompts, Gemma-2-2B) it rises evenly for a PLT, and nearly all at layers 0 and 1 for a
    CLT.

    Args:
        model: An nnsight model, a TransformerBridge, or a transformers model.
        clt: A crosscoder, or a reference.
        prompts: Texts, or token ids (position,).
        plt: Per-layer transcoders of the same model, to stand beside it.
        edges: ``"circuit"``, or ``"target"`` for the edges into the logit alone.
        bar: Whether to show progress; by default on a terminal.
        **settings: Of `attribute`, such as ``max_feature_nodes``.
    """
    from tqdm.auto import tqdm

    from clt_plugin.attribution.trace import attribute

    prompts = several(prompts)
    crosscoders = {name: fitting(model, each) for name, each in (("clt", clt), ("plt", plt)) if each is not None}
    curves: dict[str, list[list[float]]] = {name: [] for name in crosscoders}
    shown = {"max_n_logits": 1, **settings}
    for prompt in tqdm(prompts, "circuits", disable=not on_terminal(bar)):
        for name, crosscoder in crosscoders.items():
            graph = attribute(model, prompt, clt=crosscoder, bar=False, **shown)
            curves[name].append(graph.cumulative_contribution(edges=edges).table["cumulative"].tolist())
    return Contributions(curves, edges, [show(prompt) for prompt in prompts])
