"""What cross-layer writes contribute: evaluations with and without them, and beside per-layer transcoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clt_plugin.core import Crosscoder, WiringError
from clt_plugin.interventions import only_span
from clt_plugin.training.evaluation import Evaluation, evaluate

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Evaluations:
    """Several evaluations on the same texts, side by side.

    Attributes:
        by_name: {what was evaluated: its evaluation}; the first is what the others are compared with.
        title: Of the plot.
    """

    by_name: Mapping[str, Evaluation]
    title: str

    @property
    def table(self) -> pd.DataFrame:
        """One row for each condition: FVU averaged over sites, its ratio to the first one's, L0, and the loop's."""
        import pandas

        first = next(iter(self.by_name.values()))
        rows = []
        for name, found in self.by_name.items():
            row = {"condition": name, "fvu": found.mean_fvu, "times_first": found.mean_fvu / first.mean_fvu}
            row["l0"] = found.mean_l0
            if found.in_loop is not None:
                loop = found.in_loop
                row |= {"delta_loss": loop.delta_loss, "kl": loop.kl, "top1": loop.top1, "loss": loop.loss}
            rows.append(row)
        return pandas.DataFrame(rows)

    @property
    def by_site(self) -> pd.DataFrame:
        """FVU of every written site (rows) under every condition (columns)."""
        import pandas

        return pandas.DataFrame({name: found.fvu for name, found in self.by_name.items()})

    def plot(self) -> Figure:
        """Draw FVU by site, and what the replaced model loses, for every condition."""
        from clt_plugin.report.evaluations import plot_evaluations

        return plot_evaluations(self.by_site, self.table, self.title)

    def __str__(self) -> str:
        return f"{self.title}\n{self.table.to_string(index=False, float_format=lambda value: f'{value:.4f}')}"


def cross_layer_ablation(
    clt: Crosscoder, model: Any, texts: Any, *, spans: Sequence[int] | None = None, plt: Any = None, **settings: Any
) -> Evaluations:
    """Drop decoder writes that go far, step by step down to a group's own layer, and measure what is lost.

    The measure is that of `evaluate`: FVU = sum ||y - yhat||^2 / sum ||y - mean y||^2 for each site, and in the loop
    KL(model || replaced) and the loss added. Biases and features stay as they are. The CLT was not trained to do
    without what is dropped, so that the loss is an upper bound on what cross-layer writes are needed for; per-layer
    transcoders trained alike are the fairer comparison.
    Source: "Cross-Layer Connections in Cross-Layer Transcoders", experiment 2.

    Args:
        clt: A crosscoder that writes several layers.
        model: The model that it belongs to.
        texts: A `Tokens`, or whatever `Texts.of` reads.
        spans: Keep writes that span at most so many layers, one condition each; by default 1 (its own layer alone), 2,
            4, ... as far as it writes.
        plt: Per-layer transcoders of the same model, as a last condition.
        **settings: Of `evaluate`, such as ``max_tokens``.

    Raises:
        WiringError: No group writes any layer but its own.
    """
    wiring = clt.wiring
    homes = zip(wiring.home, wiring.writes, strict=True)
    longest = max(abs(site.layer - home) for home, sites in homes for site in sites)
    if not longest:
        raise WiringError("every group of this crosscoder writes its own layer alone: there is nothing to ablate")
    if spans is None:
        spans = [2**n for n in range(longest.bit_length())]
    found = {"all writes": evaluate(model, clt, texts, **settings)}
    for span in sorted(spans, reverse=True):
        name = "own layer alone" if span == 1 else f"span of {span} layers"
        found[name] = evaluate(model, clt, texts, edits=only_span(span), **settings)
    if plt is not None:
        found["per-layer transcoders"] = evaluate(model, plt, texts, **settings)
    return Evaluations(found, "without cross-layer writes")


def reconstruction(clt: Crosscoder, model: Any, plt: Crosscoder, texts: Any, **settings: Any) -> Evaluations:
    """Compare a CLT with per-layer transcoders on the same texts: FVU by layer, L0, and the replaced model.

    The two compare fairly where they were trained alike and spend as many active features: L0 is in the table.
    Source: "Cross-Layer Connections in Cross-Layer Transcoders", experiment 9.

    Args:
        clt: The CLT.
        model: The model of both.
        plt: The per-layer transcoders.
        texts: A `Tokens`, or whatever `Texts.of` reads.
        **settings: Of `evaluate`, such as ``max_tokens``.
    """
    found = {"CLT": evaluate(model, clt, texts, **settings), "per-layer": evaluate(model, plt, texts, **settings)}
    return Evaluations(found, "CLT and per-layer transcoders")
