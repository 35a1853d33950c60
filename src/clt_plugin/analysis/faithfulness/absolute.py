"""|x| with a repeated data point: a transcoder learns the point, which the model it stands for does not know.

The model computes |x_i| = ReLU(x_i) + ReLU(-x_i), coordinate by coordinate. Where one point makes up much of the data,
sparsity pays for a latent of its own: one active latent in place of one a coordinate. The reconstruction is as good,
and the circuit is a lookup that the model does not do. Per-layer transcoders fall for it as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt_plugin.analysis.faithfulness._network import READS, WRITES
from clt_plugin.analysis.faithfulness._stack import Recipe, Stack
from clt_plugin.core import Crosscoder, Wiring
from clt_plugin.training.penalties import Tanh

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

ALIKE = 0.9
"""A latent is the point's own where the cosine of its decoder and the point's |x| is above this."""


@dataclass(frozen=True, eq=False)
class AbsoluteValue:
    """Transcoders of |x|, one a share of repeats and seed.

    Attributes:
        table: One row a run: ``repeats`` (the share of the data that is the point), ``seed``, ``own_latents`` (how many
            are active on the point and write its |x| all at once: the model's neurons write one coordinate each),
            ``share`` (of the point's |x|, what they write), ``elsewhere`` (on what share of other points they fire),
            ``l0_on_point``, ``l0_elsewhere``, and ``fvu``, of the data without the point.
        crosscoders: The transcoders, in the order of the rows.
        point: The repeated point, (d,).
    """

    table: pd.DataFrame
    crosscoders: Sequence[Crosscoder]
    point: Tensor

    def plot(self) -> Figure:
        """Draw the point's own latents and L0 there over the share of repeats."""
        from clt_plugin.report.faithfulness_toys import plot_data_point

        return plot_data_point(self.table)


def absolute_value(
    repeats: Sequence[float] = (0.0, 0.3),
    seeds: Sequence[int] = (0, 1, 2),
    *,
    d: int = 6,
    n_latents: int = 24,
    n_points: int = 384,
    sparsity: float = 0.15,
    steps: int = 1000,
    bar: bool | None = None,
) -> AbsoluteValue:
    """Train transcoders of |x| on data in which one point is repeated.

    Of each x every coordinate is 0 but for one in seven, which are uniform on (-1, 1); the point has +-1 everywhere.
    The loss is the squared error summed over coordinates, plus lambda times ``sum tanh(D a)``; JumpReLU, Adam.

    Args:
        repeats: The shares of the data that are the point.
        seeds: Of the weights; the data is the same for all.
        d: How many coordinates.
        n_latents: Twice d and some more: enough for the model's own neurons and a point.
        n_points: How many points of data, repeats included.
        sparsity: Lambda at the end of the run.
        steps: How many, each over all data.
        bar: Whether to show progress; by default on a terminal.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    crosscoders: list[Crosscoder] = []
    draw = torch.Generator().manual_seed(0)
    point = torch.randint(2, (d,), generator=draw) * 2.0 - 1
    others = torch.rand(n_points, d, generator=draw) * 2 - 1
    others = others * (torch.rand(n_points, d, generator=draw) < 1 / 7)
    for share in repeats:
        if not 0 <= share < 1:
            raise ValueError(f"repeats are shares of the data, from 0 to below 1, not {share}")
        x = others.clone()
        x[: round(share * n_points)] = point
        recipe = Recipe((Tanh(sparsity),), steps, rate=1e-2, later_rate=2e-3, turn=steps // 2)
        stack = Stack(Wiring.plt(1), d, n_latents, seeds, recipe)
        stack.train({READS[0]: x}, {WRITES[0]: x.abs()}, {WRITES[0]: 1.0}, bar)
        for seed, trained in zip(seeds, stack.crosscoders(), strict=True):
            rows.append({"repeats": share, "seed": seed, **_measured(trained, point, others)})
            crosscoders.append(trained)
    return AbsoluteValue(pd.DataFrame(rows), crosscoders, point)


@torch.no_grad()
def _measured(trained: Crosscoder, point: Tensor, others: Tensor) -> dict[str, float]:
    on_point, elsewhere = trained.encode_group(0, point), trained.encode_group(0, others)
    cosine = torch.nn.functional.cosine_similarity(trained.W_dec[0], point.abs()[None], dim=1)
    own = (on_point > 0) & (cosine > ALIKE)
    written = (on_point * own) @ trained.W_dec[0]
    target = others.abs()
    error = (trained(others[None])[0] - target).square().sum()
    return {
        "own_latents": int(own.sum()),
        "share": float(written @ point.abs() / point.square().sum()),
        "elsewhere": float((elsewhere[:, own] > 0).any(1).float().mean()),
        "l0_on_point": int((on_point > 0).sum()),
        "l0_elsewhere": float((elsewhere > 0).float().sum(1).mean()),
        "fvu": float(error / (target - target.mean(0)).square().sum()),
    }
