"""The Boolean toy: a network whose circuit is known, and transcoders that find it or skip over it.

The network computes (a XOR b) AND (c XOR d) in two steps. A CLT can write layer 1's output from layer 0's latents, as a
lookup table of the inputs, and leave layer 1 without any: a faithful reconstruction, and an unfaithful circuit. The
study of unfaithful circuits found that it does (its Table 1 is `TABLE_1`). Whether it does depends on the layout of the
network and on the loss, so that distributions over seeds are what to look at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from clt_plugin.analysis.faithfulness._network import LAYOUTS, READS, WRITES, BooleanNetwork, Layout, wiring_of
from clt_plugin.analysis.faithfulness._stack import Recipe, Stack
from clt_plugin.analysis.faithfulness.skipping import hop_skip
from clt_plugin.core import Crosscoder
from clt_plugin.training.auxiliary import PreActivation
from clt_plugin.training.penalties import Penalty, Tanh
from clt_plugin.training.standard import fold

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

SITES = ("as-is", "equal")
STEPS = 10_000
SPARSITY = 0.018
"""Of the tanh penalty, at the end of the run."""

TABLE_1: Mapping[str, Mapping[str, Any]] = {
    "clt": {"l0": (1.81, 0.0), "mse": (0.0052, 0.0028), "alive": (8, 0), "accuracy": 1.0},
    "plt": {"l0": (1.68, 0.94), "mse": (0.0065, 0.0033), "alive": (7, 5), "accuracy": 1.0},
}
"""Table 1 of the study of unfaithful circuits: one run of each, by layer."""


@dataclass(frozen=True, eq=False)
class BooleanToy:
    """A transcoder of the Boolean network, trained from one seed.

    Attributes:
        network: The network.
        crosscoder: The transcoder, as it acts on the network's own activations.
        seed: Where its weights began.
        l0: By layer, the mean number of active latents over the 16 inputs.
        mse: By layer, the mean squared error over inputs and all axes, in standard units.
        alive: By layer, how many latents are active on any input.
        accuracy: The share of inputs on which the network with both MLPs replaced answers right.
        hop_skip: The share of layer 1's reconstruction that layer 0's latents write, `HopSkip.fraction`; nan where
            nothing is written there.
    """

    network: BooleanNetwork
    crosscoder: Crosscoder
    seed: int
    l0: tuple[float, float]
    mse: tuple[float, float]
    alive: tuple[int, int]
    accuracy: float
    hop_skip: float

    def row(self) -> dict[str, Any]:
        """Return the measures as one flat row."""
        by_layer = {"l0": self.l0, "mse": self.mse, "alive": self.alive}
        flat = {f"{name}_{layer}": each for name, values in by_layer.items() for layer, each in enumerate(values)}
        return {"seed": self.seed, **flat, "accuracy": self.accuracy, "hop_skip": self.hop_skip}

    @property
    def table(self) -> pd.DataFrame:
        """The measures beside those of `TABLE_1`: one row a measure."""
        import pandas as pd

        name = "plt" if all(len(sites) == 1 for sites in self.crosscoder.wiring.writes) else "clt"
        row = {key: value for key, value in self.row().items() if key != "seed"}
        return pd.DataFrame({"found": row, "document": _flat(TABLE_1[name])}).loc[list(row)].rename_axis("measure")

    def plot(self) -> Figure:
        """Draw the activations of the latents alive on all 16 inputs, and the reconstruction of i beside i."""
        from clt_plugin.report.faithfulness_toys import plot_toy

        sites, network = self.network.sites, self.network
        acts = self.crosscoder.encode({site: sites[site].float() for site in READS})
        said = self.crosscoder.decode(acts)[WRITES[1]] @ network.layout.directions()[8].float()
        alive = [(layer, each[:, (each > 0).any(0)].T) for layer, each in enumerate(acts)]
        return plot_toy(network.inputs, alive, network.neurons[1][:, 0], said, f"seed {self.seed}: {self}")

    def __str__(self) -> str:
        return (
            f"L0 {self.l0[0]:.2f} and {self.l0[1]:.2f}, accuracy {self.accuracy:.0%}, "
            f"layer 1 written by layer 0: {self.hop_skip:.3f}"
        )


def boolean_toy(
    wiring: str = "clt",
    seed: int = 0,
    layout: str | Layout = "wide",
    norms: str = "concatenated",
    span: int | None = None,
    sites: str = "as-is",
    **settings: Any,
) -> BooleanToy:
    """Train a transcoder on the Boolean network, on all 16 inputs at every step; about a quarter of a minute.

    The loss is the squared error, averaged over inputs, layers and axes, plus lambda times the inputs' mean of
    ``sum tanh(D a)``, plus 1e-6 times that of ``sum ReLU(-h)``; lambda rises linearly to `SPARSITY`. Every axis has its
    own unit of standard deviation. JumpReLU from threshold 0.03, bandwidth 0.01, whose gradient reaches h wherever it
    is at least 0; Adam at 1e-3, and 1e-4 from step 800. The setting is that of the study of unfaithful circuits, with
    what it leaves open chosen such that its Table 1 comes out.

    Args:
        wiring: ``"clt"`` or ``"plt"``.
        seed: From which weights are drawn.
        layout: Of `LAYOUTS`, or your own.
        norms: D in the penalty: ``"concatenated"`` or ``"separate"``, see `Crosscoder.decoder_norms`.
        span: Of a CLT: how many layers a latent writes at most; 1 makes it per-layer.
        sites: ``"as-is"``: every axis counts the same, so that layer 0, where eight vary in the wide layout, counts
            eight times as much as layer 1, where one does. ``"equal"``: both sites' variances count the same.
        **settings: As for `boolean_toys`.
    """
    return boolean_toys((seed,), wiring, layout, norms, span, sites, **settings)[0]


def boolean_toys(
    seeds: Sequence[int],
    wiring: str = "clt",
    layout: str | Layout = "wide",
    norms: str = "concatenated",
    span: int | None = None,
    sites: str = "as-is",
    *,
    penalties: Sequence[Penalty] = (),
    sparsity: float = SPARSITY,
    n_latents: int = 32,
    steps: int = STEPS,
    bar: bool | None = None,
) -> list[BooleanToy]:
    """Train one transcoder a seed side by side, which hardly takes longer than one alone; see `boolean_toy`.

    Args:
        seeds: The seeds. What one comes to does not depend on the others, rounding aside.
        wiring: As for `boolean_toy`.
        layout: As for `boolean_toy`.
        norms: As for `boolean_toy`.
        span: As for `boolean_toy`.
        sites: As for `boolean_toy`.
        penalties: Added to the loss: mitigations, such as `clt_plugin.training.penalties.Asymmetry`.
        sparsity: Lambda at the end of the run.
        n_latents: Of each layer.
        steps: How many; lambda rises over all of them.
        bar: Whether to show progress; by default on a terminal.
    """
    if isinstance(layout, str) and layout not in LAYOUTS:
        raise ValueError(f"the toy's layouts are {', '.join(LAYOUTS)}, or your own Layout: there is no {layout!r}")
    if sites not in SITES:
        raise ValueError(f"sites are weighed {' or '.join(map(repr, SITES))}, not {sites!r}")
    network = BooleanNetwork(LAYOUTS[layout] if isinstance(layout, str) else layout)
    alive = PreActivation(1e-6, norms=None, floor="zero")
    recipe = Recipe((Tanh(sparsity, norms=norms), alive, *penalties), steps)
    stack = Stack(wiring_of(wiring, span), network.layout.width, n_latents, list(seeds), recipe)
    standard = {site: x.float() for site, x in network.standard.standardise(network.sites).items()}
    x, y = ({site: standard[site] for site in some} for some in (READS, WRITES))
    weights = dict.fromkeys(WRITES, 1.0 / (2 * network.layout.width))
    if sites == "equal":
        variance = {site: float(y[site].square().sum()) for site in WRITES}
        mean = sum(variance.values()) / len(variance)
        weights = {site: weight * mean / variance[site] for site, weight in weights.items()}
    neurons = {layer: each.float() for layer, each in network.neurons.items()}
    stack.train(x, y, weights, bar, neurons=neurons)
    return [_measured(network, each, seed) for seed, each in zip(stack.seeds, stack.crosscoders(), strict=True)]


@torch.no_grad()
def _measured(network: BooleanNetwork, trained: Crosscoder, seed: int) -> BooleanToy:
    """Measure a transcoder that acts on standard units, and fold it onto raw ones."""
    trained = trained.double()
    standard = network.standard.standardise(network.sites)
    acts = trained.encode({site: standard[site] for site in READS})
    said = trained.decode(tuple(acts))
    l0 = [float((each > 0).double().sum(1).mean()) for each in acts]
    alive = [int((each > 0).any(0).sum()) for each in acts]
    mse = [float((said[site] - standard[site]).square().mean()) for site in WRITES]
    folded = fold(trained, network.standard)
    right = network.answers(folded) == network.truth
    skipped = hop_skip(trained, x={site: standard[site] for site in READS}).fraction(1)
    accuracy = float(right.double().mean())
    return BooleanToy(network, folded.float(), seed, (l0[0], l0[1]), (mse[0], mse[1]), (alive[0], alive[1]),
                      accuracy, skipped)  # fmt: skip


def _flat(measures: Mapping[str, Any]) -> dict[str, float]:
    flat = {}
    for name, value in measures.items():
        several = enumerate(value) if isinstance(value, tuple) else [(None, value)]
        flat.update({name if layer is None else f"{name}_{layer}": float(each) for layer, each in several})
    return flat
