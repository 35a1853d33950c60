"""Does a feature fire where it should, and stay silent where it should not?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clt_plugin.analysis.faithfulness._statistics import ranks, wilson
from clt_plugin.analysis.faithfulness._texts import batches, fitting, several, show
from clt_plugin.attribution.corpus.stream import members_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Selectivity:
    """How features answer two sets of prompts.

    Attributes:
        activations: One row a feature and prompt: feature, such as ``"3.811"``, or ``"any"`` for the group; set
            (``"should"`` or ``"should not"``); prompt; and the activation where it was looked for.
    """

    activations: pd.DataFrame

    @property
    def table(self) -> pd.DataFrame:
        """One row a feature, and one for any of them.

        On how many prompts it fires that it should fire on (``hits`` of ``n_should``) and should not (``false_alarms``
        of ``n_should_not``), the two rates with Wilson's 95% intervals, and ``auc``: the chance that it is more active
        on a prompt of the first set than on one of the second, ties counting half.
        """
        import pandas as pd

        rows = []
        for feature, of in self.activations.groupby("feature", sort=False):
            sets = [of[of["set"] == name]["activation"].to_numpy() for name in ("should", "should not")]
            row: dict[str, Any] = {"feature": feature}
            for name, count, values in zip(("hit", "false_alarm"), ("should", "should_not"), sets, strict=True):
                fired = int((values > 0).sum())
                low, high = wilson(fired, len(values))
                row |= {f"{name}s": fired, f"n_{count}": len(values), f"{name}_rate": fired / len(values)}
                row |= {f"{name}_low": low, f"{name}_high": high}
            n, m = len(sets[0]), len(sets[1])
            first = ranks([*sets[0], *sets[1]])[:n].sum()
            rows.append(row | {"auc": float((first - n * (n + 1) / 2) / (n * m))})
        return pd.DataFrame(rows)

    def plot(self) -> Figure:
        """Draw every prompt's activation, by feature and set."""
        from clt_plugin.report.faithfulness_circuits import plot_selectivity

        return plot_selectivity(self.activations)


def selectivity(
    model: Any,
    clt: Any,
    features: Any,
    should: Iterable[Any],
    should_not: Iterable[Any],
    *,
    position: int | None = -1,
    bar: bool | None = None,
) -> Selectivity:
    """Look whether features fire on prompts that they should fire on, and on controls.

    The study of unfaithful circuits does it with 20 prompts that hold a list of present-tense verbs and 20 that do not:
    its two features fired on 11 of 20 and on none. A feature that is selective beyond one memorised text is a step of
    its own, which a CLT should not have absorbed into features of that text.

    Args:
        model: An nnsight model, a TransformerBridge, or a transformers model.
        clt: A crosscoder, or a reference.
        features: {layer: features}, (layer, feature) pairs, or a `supernode`; the group fires where any of them does.
        should: Prompts on which they should fire: texts, or token ids (position,).
        should_not: Controls.
        position: Where to look: -1 for the last token; None for the largest activation anywhere.
        bar: Whether to show progress; by default on a terminal.
    """
    import pandas as pd

    from clt_plugin.adapters._run import group_labels

    crosscoder = fitting(model, clt)
    members = members_of(crosscoder, features)
    labels = group_labels(crosscoder.wiring)
    rows = []
    for name, prompts in (("should", several(should)), ("should not", several(should_not))):
        for prompt in prompts:
            (seen,) = batches(model, crosscoder, [prompt], batch_size=1, max_tokens=10**9, bar=False)
            kept = seen.counted.cpu().flatten().nonzero().flatten()
            found = {}
            for label, latent in members:
                group = seen.active[labels.index(label)]
                mine = group.latents == latent
                if position is not None:
                    mine &= group.tokens == _token(kept, position, len(seen.counted[0]), prompt)
                found[f"{label}.{latent}"] = float(group.values[mine].max()) if bool(mine.any()) else 0.0
            found["any"] = max(found.values())
            rows += [(feature, name, show(prompt), value) for feature, value in found.items()]
    return Selectivity(pd.DataFrame(rows, columns=["feature", "set", "prompt", "activation"]))


def _token(kept: Any, position: int, n: int, prompt: Any) -> int:
    """Return which of the counted tokens stands at a position of the prompt."""
    place = position % n if -n <= position < n else -1
    found = (kept == place).nonzero().flatten()
    if not len(found):
        raise ValueError(f"features have no value at position {position} of {show(prompt)!r}, which has {n} tokens")
    return int(found[0])
