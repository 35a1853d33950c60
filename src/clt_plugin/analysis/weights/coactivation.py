"""Do features and the heads or neurons that they point at act together on text?

The first validation that "Cross-Layer Connections in Cross-Layer Transcoders: An Empirical Investigation" asks of its
targeting scans: alignment of weights alone is structure that may never be used.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt_plugin.adapters._run import group_labels
from clt_plugin.adapters.huggingface import check_fits, plain_model
from clt_plugin.analysis.studies import STUDIES, Study
from clt_plugin.analysis.weights._activity import Activity
from clt_plugin.analysis.weights._blocks import shown
from clt_plugin.analysis.weights._tally import resampled
from clt_plugin.analysis.weights.targeted import Targeting
from clt_plugin.analysis.weights.targeting import attention_targeting
from clt_plugin.attribution.corpus.stream import Seen, stream
from clt_plugin.core.crosscoder import Crosscoder

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

FEWEST = 10
"""Features that are active at fewer tokens are left out."""


@dataclass(frozen=True, eq=False)
class Pair:
    """A feature and a unit that one of its vectors points at.

    Attributes:
        group: The number of the feature's group.
        label: What the group is called.
        feature: The feature.
        layer: The unit's layer.
        unit: The unit.
        sign: -1 where the vector points away from a neuron's row, else 1.
        standard: How strongly, standardised by the null.
    """

    group: int
    label: str
    feature: int
    layer: int
    unit: int
    sign: int
    standard: float


def strongest_pairs(targeting: Targeting, clt: Crosscoder, null: str | None, k: int) -> list[Pair]:
    """Return the k pairs of a feature and a unit that a scan found strongest, each once."""
    numbers = {label: g for g, label in enumerate(group_labels(clt.wiring))}
    pairs: dict[tuple[int, int, int, int], Pair] = {}
    for row in targeting.top(null, k=10**9).to_dict("records"):
        who = (numbers[row["group"]], row["feature"], row["layer"], row[targeting.kind])
        sign = -1 if row["strength"] < 0 else 1
        pairs.setdefault(who, Pair(who[0], row["group"], *who[1:], sign, row["standard"]))
    if not pairs:
        raise ValueError("the scan found no vector above a limit: there is nothing to validate")
    return list(pairs.values())[:k]


def interval_of_mean(values: Tensor, seed: int) -> tuple[float, float, float]:
    """Return the mean of some values, and its 95% interval by bootstrap."""
    if not len(values):
        return (float("nan"),) * 3
    means = resampled(values[:, None], 2000, torch.Generator().manual_seed(seed))[:, 0] / len(values)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return float(values.double().mean()), low, high


@dataclass(frozen=True, eq=False)
class Coactivation:
    """How much more active units are where the features are that point at them.

    Attributes:
        kind: ``"head"`` or ``"neuron"``.
        table: One row a pair: the feature, the unit, how strongly it points there (``standard``), at how many
            ``tokens`` it is active; ``effect``, by how many standard deviations of its own the unit is more active
            there than elsewhere (less, where a vector points away from a neuron); ``control``, the mean of that
            over features of the same layer that are about as often active; ``above``, the share of those that it
            exceeds.
        difference: The mean of effect less control over pairs, with a 95% interval by bootstrap over pairs.
        silent: How many pairs were left out, their feature being active at fewer than 10 tokens.
        tokens: How many tokens were seen.
    """

    kind: str
    table: pd.DataFrame
    difference: tuple[float, float, float]
    silent: int
    tokens: int

    def plot(self) -> Figure:
        """Draw each pair's effect beside that of its controls."""
        from clt_plugin.report.targeting import plot_beside

        label = "queries' norm" if self.kind == "head" else "pre-activation"
        return plot_beside(self.table, self.difference, f"{label} where the feature is active (sd)", log=False)

    def __str__(self) -> str:
        mean, low, high = self.difference
        return (
            f"{len(self.table)} pairs over {self.tokens} tokens ({self.silent} silent): effect less control "
            f"{mean:.3f} sd ({low:.3f} to {high:.3f})"
        )


def coactivation(
    clt: Crosscoder,
    model: Any,
    texts: Iterable[Any],
    targeting: Targeting | None = None,
    *,
    null: str | None = None,
    k: int = 50,
    controls: int = 20,
    batch_size: int = 8,
    max_tokens: int = 256,
    seed: int = 0,
    bar: bool | None = None,
) -> Coactivation:
    """Ask whether heads or neurons are more active where the features are that point at them.

    A head's activity is the norm of its query (key, value), a neuron's its pre-activation. For each pair
    ``effect = (mean activity where the feature is active - mean elsewhere) / sd``, with the sign that the weights
    foretell; controls are features of the same layer whose counts of active tokens are nearest. No effect above that
    of controls speaks against the targeting being used; an effect does not show what causes it, see `targeting_effect`.

    Args:
        clt: The crosscoder.
        model: An nnsight model, a TransformerBridge, or a transformers model.
        texts: Texts, or token ids (position,); read once.
        targeting: A scan of this crosscoder and model; by default that of heads' queries.
        null: Against which null the pairs are strongest; by default the scan's first.
        k: How many pairs.
        controls: How many control features a pair.
        batch_size: How many texts run at a time.
        max_tokens: Longer texts are cut into pieces of so many tokens.
        seed: Of the bootstrap.
        bar: Whether to show progress; by default on a terminal.

    Raises:
        ValueError: The scan found nothing.
        AttachError: The crosscoder does not fit the model.
    """
    import pandas as pd

    targeting = targeting or attention_targeting(clt, model, bar=bar)
    pairs = strongest_pairs(targeting, clt, null, k)
    units = list(dict.fromkeys((pair.layer, pair.unit) for pair in pairs))
    sums = _Sums(clt, pairs, units)
    with plain_model(model) as hf, torch.no_grad():
        host = check_fits(clt, hf, "observe")
        with Activity(hf, host, targeting.kind, targeting.part, [layer for layer, _ in units]) as activity:
            for seen in stream(model, hf, host, clt, texts, batch_size, max_tokens, True, shown(bar)):
                sums.add(seen, activity)
                activity.forget()
    rows = [row for pair in pairs if (row := sums.row(pair, controls)) is not None]
    names = ["group", "feature", "layer", targeting.kind, "standard", "tokens", "effect", "control", "above"]
    table = pd.DataFrame(rows, columns=names)
    apart = torch.tensor((table["effect"] - table["control"]).to_numpy(dtype=float))
    return Coactivation(targeting.kind, table, interval_of_mean(apart, seed), len(pairs) - len(rows), int(sums.tokens))


class _Sums:
    """Sums of units' activity over all tokens, and over those where each latent is active.

    Args:
        clt: The crosscoder.
        pairs: Whose groups are looked at.
        units: (layer, unit) in the order of columns.
    """

    def __init__(self, clt: Crosscoder, pairs: list[Pair], units: list[tuple[int, int]]) -> None:
        self.units, self.tokens = units, 0
        self.total = torch.zeros(len(units), dtype=torch.float64)
        self.squares = torch.zeros_like(self.total)
        groups = sorted({pair.group for pair in pairs})
        self.counts = {g: torch.zeros(clt.group_sizes[g], dtype=torch.long) for g in groups}
        self.active = {g: torch.zeros(clt.group_sizes[g], len(units), dtype=torch.float64) for g in groups}

    def add(self, seen: Seen, activity: Activity) -> None:
        """Take in a batch."""
        every = torch.stack([activity.level(layer, unit) for layer, unit in self.units], dim=-1)
        levels = every[seen.counted.to(every.device)].double().cpu()
        self.tokens += len(levels)
        self.total += levels.sum(0)
        self.squares += levels.square().sum(0)
        for g, counts in self.counts.items():
            latents, tokens = seen.active[g].latents.cpu(), seen.active[g].tokens.cpu()
            counts += torch.bincount(latents, minlength=len(counts))
            self.active[g].index_add_(0, latents, levels[tokens])

    def row(self, pair: Pair, controls: int) -> tuple[Any, ...] | None:
        """Return a pair's row; None where the feature is hardly ever active, or always."""
        counts, column = self.counts[pair.group], self.units.index((pair.layer, pair.unit))
        usable = (counts >= FEWEST) & (counts <= self.tokens - FEWEST)
        if not bool(usable[pair.feature]):
            return None
        n = counts.double()
        here = self.active[pair.group][:, column]
        variance = self.squares[column] / self.tokens - (self.total[column] / self.tokens) ** 2
        apart = here / n - (self.total[column] - here) / (self.tokens - n)
        effects = pair.sign * apart / variance.clamp_min(1e-30).sqrt()
        usable[pair.feature] = False
        others = usable.nonzero()[:, 0]
        far = (n[others].log() - n[pair.feature].log()).abs()
        beside = effects[others[far.topk(min(controls, len(others)), largest=False).indices]]
        effect = float(effects[pair.feature])
        who = (pair.label, pair.feature, pair.layer, pair.unit, pair.standard, int(counts[pair.feature]))
        return (*who, effect, float(beside.mean()), float((beside < effect).double().mean()))


STUDIES.add(
    "coactivation",
    Study(
        coactivation,
        ("clt", "model", "texts"),
        "are heads more active where the features are that point at them",
        {"null": str, "k": int, "controls": int, "seed": int},
    ),
)
