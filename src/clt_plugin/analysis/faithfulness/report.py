"""`faithfulness_report`: everything that tells whether a CLT may be believed, as an object, a table and one page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

from clt_plugin.analysis.faithfulness._texts import fitting, several, show
from clt_plugin.analysis.faithfulness.causal import RankAgreement, ablation_against_influence, knock_on
from clt_plugin.analysis.faithfulness.handoff_maps import Handoffs, handoffs
from clt_plugin.analysis.faithfulness.profile import (
    Contributions,
    L0Profile,
    cumulative_contribution,
    l0_profile,
)
from clt_plugin.analysis.faithfulness.replacement import ReplacementError, replacement_error
from clt_plugin.analysis.faithfulness.skipping import HopSkip, hop_skip

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class FaithfulnessReport:
    """What a CLT gets right about its model on some prompts, and where it may mislead.

    Attributes:
        replacement: Cosine and normalised error of the local and the global replacement, by layer.
        ablation: The KL of ablations against influence, and against baselines.
        knock_on: Measured knock-on effects against influence between features.
        hop_skip: How much of each layer's reconstruction earlier layers' latents write.
        l0: L0 by layer, beside the PLT's where there is one.
        contribution: The cumulative contribution of layers, likewise.
        handoffs: What ablating handoffs does in the model and in the replacement models.
        about: What was measured: the model, the crosscoders, the prompts.
    """

    replacement: ReplacementError
    ablation: RankAgreement
    knock_on: RankAgreement
    hop_skip: HopSkip
    l0: L0Profile
    contribution: Contributions
    handoffs: Handoffs
    about: Mapping[str, str]

    @property
    def table(self) -> pd.DataFrame:
        """Every number in one form: part, measure, layer ("" where it has none), value, low and high (95%)."""
        import pandas as pd

        rows: list[tuple[Any, ...]] = []
        for row in self.replacement.table.itertuples():
            for measure in ("cosine", "error"):
                name = f"{row.replacement} {measure}, {row.site}"
                rows.append(("replacement", name, row.layer, getattr(row, measure), None, None))
        for part, agreement in (("ablation", self.ablation), ("knock-on", self.knock_on)):
            for row in agreement.table.itertuples():
                name = f"{row.predictor}, {row.pairs} pairs"
                rows.append((part, name, "", row.spearman, row.low, row.high))
        rows += [("hop-skip", "fraction", layer, each, None, None) for layer, each in self.hop_skip.fractions().items()]
        for name, values in self.l0.l0.items():
            rows += [("L0", name, layer, each, None, None) for layer, each in values.items()]
        for row in self.contribution.table.itertuples():
            rows.append(("cumulative contribution", row.crosscoder, row.layer, row.cumulative, row.low, row.high))
        columns = ["part", "measure", "layer", "value", "low", "high"]
        return pd.DataFrame(rows, columns=columns).astype({"low": float, "high": float})

    def parts(self) -> dict[str, Any]:
        """Return each part's result by its title, in the order of the page."""
        return {
            "Replacement": self.replacement,
            "Ablations against influence": self.ablation,
            "Knock-on effects": self.knock_on,
            "Hop-skip": self.hop_skip,
            "L0 by layer": self.l0,
            "Cumulative contribution": self.contribution,
            "Handoffs": self.handoffs,
        }

    def findings(self) -> list[str]:
        """Return the report in a few sentences."""
        table, last = self.replacement.table, max(self.l0.l0["clt"])
        errors = table[(table["site"] == "mlp_out")].groupby("replacement")["error"].mean()
        worst = max(self.hop_skip.fractions().items(), key=lambda item: (item[1] == item[1], item[1]))
        found = [
            f"Reconstructing each layer from the model's own run leaves a normalised error of {errors['local']:.3f}; "
            f"with every MLP replaced it is {errors['global']:.3f}.",
            "Influence predicts what ablating a feature does to the prediction with a rank correlation of "
            f"{_spread(self.ablation)}, and what it does to other features with {_spread(self.knock_on)}; where most "
            f"of the influence is indirect, with {_spread(self.knock_on, 'indirect')}.",
            f"At most {worst[1]:.0%} of a layer's reconstruction is written by earlier layers (layer {worst[0]}).",
        ]
        for name, values in self.l0.l0.items():
            found.append(f"{name.upper()}: L0 {values[0]:.1f} in layer 0 and {values[last]:.1f} in layer {last}.")
        return found

    def plot(self) -> Figure:
        """Draw the rank agreement of knock-on effects, the hardest of the tests; each part has a plot of its own."""
        return self.knock_on.plot()

    def to_html(self, path: str | PathLike[str]) -> Path:
        """Write one self-contained page with every part's figure and table; return its path."""
        from clt_plugin.report.faithfulness_page import write_page

        return write_page(self, path)

    def __str__(self) -> str:
        return "\n".join([*(f"{name}: {value}" for name, value in self.about.items()), *self.findings()])


def faithfulness_report(
    model: Any,
    clt: Any,
    prompts: Iterable[Any],
    *,
    plt: Any = None,
    texts: Iterable[Any] | None = None,
    n_features: int = 24,
    n_sources: int = 12,
    bar: bool | None = None,
    **settings: Any,
) -> FaithfulnessReport:
    """Put a CLT to the tests that tell whether what it says of a model may be believed.

    Each part is a study of its own, whose docstring has the formula and the source: `replacement_error`,
    `ablation_against_influence`, `knock_on`, `hop_skip`, `l0_profile`, `cumulative_contribution` and `handoffs`.

    Args:
        model: An nnsight model, a TransformerBridge, or a transformers model.
        clt: A crosscoder that can stand for MLPs, or a reference.
        prompts: Texts, or token ids (position,); ten or more for intervals that mean something.
        plt: Per-layer transcoders of the same model and recipe, to stand beside it: without them L0, hop-skip and
            contributions have nothing to be compared with.
        texts: Texts for hop-skip and L0; by default the prompts.
        n_features: How many features of each prompt to ablate against influence.
        n_sources: How many to ablate for knock-on effects.
        bar: Whether to show progress; by default on a terminal.
        **settings: Of `attribute`, such as ``max_feature_nodes``, which bounds cost and memory on long prompts.
    """
    chosen: Sequence[Any] = several(prompts)
    crosscoder = fitting(model, clt)
    beside = None if plt is None else fitting(model, plt)
    read = list(chosen if texts is None else texts)
    about = {
        "Model": _name_of(model),
        "Crosscoder": repr(crosscoder),
        "Prompts": f"{len(chosen)}: {'; '.join(map(show, chosen))}",
    }
    if beside is not None:
        about["Beside it"] = repr(beside)
    return FaithfulnessReport(
        replacement=replacement_error(model, crosscoder, chosen, bar=bar),
        ablation=ablation_against_influence(model, crosscoder, chosen, n_features=n_features, bar=bar, **settings),
        knock_on=knock_on(model, crosscoder, chosen, n_features=n_sources, bar=bar, **settings),
        hop_skip=hop_skip(crosscoder, model, read, bar=bar),
        l0=l0_profile(crosscoder, model, read, beside, bar=bar),
        contribution=cumulative_contribution(model, crosscoder, chosen, beside, bar=bar, **settings),
        handoffs=handoffs(model, chosen, crosscoder, beside, bar=bar),
        about=about,
    )


def _name_of(model: Any) -> str:
    from clt_plugin.adapters.huggingface import HostModel, plain_model

    with plain_model(model) as hf:
        return HostModel.of(hf).name or type(hf).__name__


def _spread(agreement: RankAgreement, part: str = "all") -> str:
    table = agreement.table
    row = table[(table["pairs"] == part) & (table["predictor"] == "influence")].iloc[0]
    if row["spearman"] != row["spearman"]:
        return "none that could be told (too few pairs, or all alike)"
    return f"{row['spearman']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
