"""The Boolean toy over seeds, in several settings, and with mitigations: distributions beside the document's table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clt_plugin.analysis.faithfulness.toy import STEPS, TABLE_1, _flat, boolean_toys
from clt_plugin.training.auxiliary import Faithfulness
from clt_plugin.training.penalties import Asymmetry

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "CLT": {},
    "PLT": {"wiring": "plt"},
    "CLT, separate norms": {"norms": "separate"},
    "CLT, sites equal": {"sites": "equal"},
    "PLT, sites equal": {"wiring": "plt", "sites": "equal"},
    "CLT, nine axes": {"layout": "nine"},
    "PLT, nine axes": {"layout": "nine", "wiring": "plt"},
    "CLT, random directions": {"layout": "random"},
}
"""By name, settings of `boolean_toys`: the first two are those of the document's Table 1, the others controls."""

MITIGATIONS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "separate norms": {"norms": "separate"},
    "span 1": {"span": 1},
    "asymmetry penalty": {"penalties": (Asymmetry(0.05, c=1.0),)},
    "faithfulness loss": {"penalties": (Faithfulness(0.05),)},
}
"""By name, what the document proposes against skipped steps, as settings of `boolean_toys`. With two layers the only
span below a CLT's is 1, which makes it per-layer."""

MEASURES = ("l0_0", "l0_1", "mse_0", "mse_1", "alive_0", "alive_1", "accuracy", "hop_skip")


@dataclass(frozen=True, eq=False)
class ToyStudy:
    """Runs of the Boolean toy.

    Attributes:
        runs: One row a setting and seed: ``setting``, ``wiring``, ``seed`` and the measures of `BooleanToy`.
        steps: How long the runs were.
    """

    runs: pd.DataFrame
    steps: int

    @property
    def table(self) -> pd.DataFrame:
        """One row a setting and measure: ``low``, ``median`` and ``high`` over seeds, ``n``, and the ``document``'s.

        The document's figures, of one run each, stand beside the settings of its own layout without mitigations.
        ``skipped`` is the share of seeds in which layer 1 has no latent at all.
        """
        import pandas as pd

        rows = []
        for setting, of in self.runs.groupby("setting", sort=False):
            known = _flat(TABLE_1[of["wiring"].iloc[0]]) if setting in ("CLT", "PLT", "none") else {}
            for measure in MEASURES:
                low, median, high = of[measure].quantile([0, 0.5, 1])
                rows.append((setting, measure, low, median, high, len(of), known.get(measure, float("nan"))))
            skipped = float((of["alive_1"] == 0).mean())
            rows.append((setting, "skipped", skipped, skipped, skipped, len(of), float("nan")))
        return pd.DataFrame(rows, columns=["setting", "measure", "low", "median", "high", "n", "document"])

    def plot(self) -> Figure:
        """Draw every seed's L0 of layer 1 and hop-skip fraction, one row a setting."""
        from clt_plugin.report.faithfulness_toys import plot_toy_study

        known = {wiring: _flat(measures) for wiring, measures in TABLE_1.items()}
        return plot_toy_study(self.runs, known, self.steps)


def boolean_toy_study(
    seeds: Sequence[int] = range(20),
    settings: Iterable[str] | Mapping[str, Mapping[str, Any]] = tuple(SETTINGS),
    *,
    steps: int = STEPS,
    bar: bool | None = None,
) -> ToyStudy:
    """Train the Boolean toy from several seeds in several settings; some minutes each, whatever the number of seeds.

    The study of unfaithful circuits shows one CLT and one PLT. Here are distributions, and controls: layouts other than
    the one that reproduces it, separate norms, and both sites weighted equally, since in its layout one axis varies in
    layer 1 and eight in layer 0.

    Args:
        seeds: The seeds.
        settings: Names of `SETTINGS`, or {name: settings of `boolean_toys`}.
        steps: How many; fewer than 10,000 are a trial of the code, not of the claim.
        bar: Whether to show progress; by default on a terminal.
    """
    return _study(seeds, _named(settings, SETTINGS), steps, bar)


def mitigations(
    seeds: Sequence[int] = range(5),
    settings: Iterable[str] | Mapping[str, Mapping[str, Any]] = tuple(MITIGATIONS),
    *,
    steps: int = STEPS,
    bar: bool | None = None,
) -> ToyStudy:
    """Train the Boolean toy's CLT with what is proposed against skipped steps, all on one footing.

    The layout, the loss and the seeds are the same; only the mitigation differs: separate decoder norms, a span of 1, a
    penalty on unequal L0, or a loss that rewards latents which follow the layer's own neurons. One that works brings
    latents back to layer 1, lowers the hop-skip fraction, and keeps accuracy and error.

    Args:
        seeds: The seeds.
        settings: Names of `MITIGATIONS`, or {name: settings of `boolean_toys`}.
        steps: As for `boolean_toy_study`.
        bar: Whether to show progress; by default on a terminal.
    """
    return _study(seeds, _named(settings, MITIGATIONS), steps, bar)


def _named(settings: Any, known: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
    if isinstance(settings, Mapping):
        return settings
    chosen = [settings] if isinstance(settings, str) else list(settings)
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        raise ValueError(f"settings are {', '.join(known)}: there is no {unknown[0]!r}" if unknown else "no settings")
    return {name: known[name] for name in chosen}


def _study(seeds: Sequence[int], settings: Mapping[str, Mapping[str, Any]], steps: int, bar: bool | None) -> ToyStudy:
    import pandas as pd

    rows = []
    for name, each in settings.items():
        about = {"setting": name, "wiring": each.get("wiring", "clt")}
        rows += [about | toy.row() for toy in boolean_toys(seeds, steps=steps, bar=bar, **each)]
    return ToyStudy(pd.DataFrame(rows), steps)
