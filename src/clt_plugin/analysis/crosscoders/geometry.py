"""Whether latents that two models share lie to each other in one model as they do in the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from clt_plugin.analysis.crosscoders.sharing import shared_latents
from clt_plugin.core import Crosscoder, WiringError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Geometry:
    """Cosines between pairs of shared latents, in one model and in the other.

    Attributes:
        first: Cosines of pairs in the first model, (pairs,).
        second: Of the same pairs in the second, (pairs,).
        names: The two models (or sites).
        n_latents: How many shared latents there are, those compared.
        correlation: Pearson's, between the two.
        permuted: The same with the second model's latents in another order: what no correspondence gives.
    """

    first: Tensor
    second: Tensor
    names: tuple[str, str]
    n_latents: int
    correlation: float
    permuted: float

    @property
    def table(self) -> pd.DataFrame:
        """One row: the number of latents, the correlation of their cosines, and that of permuted latents."""
        import pandas

        row = {"latents": self.n_latents, "pairs": len(self.first), "correlation": self.correlation}
        return pandas.DataFrame([{**row, "permuted": self.permuted}])

    def plot(self) -> Figure:
        """Draw each pair's cosine in one model against that in the other."""
        from clt_plugin.report.crosscoders import plot_geometry

        return plot_geometry(self.first, self.second, self.names, self.correlation, self.permuted)

    def __str__(self) -> str:
        return self.table.to_string(index=False, float_format=lambda value: f"{value:.3f}")


def decoder_geometry(clt: Crosscoder, *, max_latents: int = 1000, seed: int = 0) -> Geometry:
    """Compare the geometry of shared latents' decoder vectors between two models.

    Of every pair of shared latents the cosine between their vectors is taken in each model; if the models use the same
    geometry, the two agree, whatever rotation lies between them and whatever their widths. The measure is the
    correlation over pairs (representational similarity: Kriegeskorte, Mur and Bandettini 2008); the control permutes
    one model's latents.

    Args:
        clt: A crosscoder of one group over two models, or over two sites of one.
        max_latents: At most so many shared latents are compared, drawn at random.
        seed: Of the drawing and of the permutation.

    Raises:
        WiringError: It has several groups, or fewer than three shared latents.
    """
    sharing = shared_latents(clt)
    if len(sharing.norms) != 1 or len(sharing.names) != 2:
        raise WiringError("the geometry is compared in a crosscoder of one group that writes two models or sites")
    ((label, _),) = sharing.norms.items()
    shared = torch.tensor([i for i, kind in enumerate(sharing.classes(label)) if kind == "shared"])
    if len(shared) < 3:
        raise WiringError(f"{len(shared)} latents are shared: their geometry needs at least three")
    generator = torch.Generator().manual_seed(seed)
    shared = shared[torch.randperm(len(shared), generator=generator)[:max_latents]].sort().values
    rows = clt.decoder_vectors(0, shared.to(clt.device)).detach().float().cpu()
    several = len({site.model for site in clt.wiring.writes[0]}) > 1
    vectors = []
    for name in sharing.names:
        here = [s for site, s in clt.layout.write_slices[0].items() if (site.model if several else str(site)) == name]
        vectors.append(F.normalize(torch.cat([rows[:, columns] for columns in here], dim=1), dim=1))
    upper = torch.triu_indices(len(shared), len(shared), offset=1)
    first, second = ((v @ v.T)[upper[0], upper[1]].double() for v in vectors)
    order = torch.randperm(len(shared), generator=generator)
    mixed = vectors[1][order]
    permuted = (mixed @ mixed.T)[upper[0], upper[1]].double()
    a, b = sharing.names
    return Geometry(first, second, (a, b), len(shared), _correlation(first, second), _correlation(first, permuted))


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack((a, b)))[0, 1])
