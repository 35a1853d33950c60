"""Whether shared latents do the same in two models: their direct effects on each model's predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt_plugin.analysis._promoted import Promotion, added
from clt_plugin.analysis.crosscoders.sharing import shared_latents
from clt_plugin.core import Crosscoder, WiringError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_BLOCK = 256
"""So many latents' logits at a time."""


@dataclass(frozen=True, eq=False)
class Effects:
    """Direct effects of shared latents in two models.

    Attributes:
        latents: One row for each shared latent: ``latent``, the ``cosine`` of its two decoder vectors, the
            ``correlation`` over the vocabulary of the logits it adds in one model and in the other, and ``permuted``,
            the correlation with those that another shared latent adds in the other.
        names: The two models.
    """

    latents: pd.DataFrame
    names: tuple[str, str]

    @property
    def table(self) -> pd.DataFrame:
        """One row: how many shared latents, and the means and lowest tenths of what was measured of them."""
        import pandas

        known = self.latents[["cosine", "correlation", "permuted"]]
        row = {"latents": len(known), **known.mean().to_dict()}
        return pandas.DataFrame([{**row, "correlation_p10": float(known["correlation"].quantile(0.1))}])

    def plot(self) -> Figure:
        """Draw each shared latent's cosine against the correlation of its effects."""
        from clt_plugin.report.crosscoders import plot_effects

        return plot_effects(self.latents, self.names)

    def __str__(self) -> str:
        return self.table.to_string(index=False, float_format=lambda value: f"{value:.3f}")


def direct_effects(clt: Crosscoder, model: Mapping[str, Any], *, seed: int = 0) -> Effects:
    """Compare what shared latents do in two models: what each adds to the logits of the one and of the other.

    A latent may be shared, and even point in one direction, while what reads it has changed; or turn while what reads
    it turns along. So its decoder vector for each model goes through that model's own final norm's gain and
    unembedding, and the logits are correlated over the vocabulary. This is the last and shortest piece of a circuit,
    and the only one that needs no prompt; for what lies between, attribute each model.
    Source: the question is that of Lindsey et al. 2024, "Sparse Crosscoders" (circuits of universal features).

    Args:
        clt: A crosscoder of one group over the residual stream, or what is added to it, of two models.
        model: {name: model}, as its sites name them, with one vocabulary.
        seed: Of the permutation.

    Raises:
        WiringError: The crosscoder is of another form, or fewer than two latents are shared.
        AttachError: A model has no unembedding.
    """
    sharing = shared_latents(clt)
    names = sharing.names
    if len(sharing.norms) != 1 or len(names) != 2 or set(names) - set(model):
        raise WiringError(
            f"effects are compared for a crosscoder of one group over two models, and both models: it writes "
            f"{', '.join(names)}, and the models given are {', '.join(model)}"
        )
    ((label, _),) = sharing.norms.items()
    shared = torch.tensor([i for i, kind in enumerate(sharing.classes(label)) if kind == "shared"], dtype=torch.long)
    columns = [added(clt, 0, name) for name in names]
    if len(shared) < 2 or not all(columns):
        raise WiringError(f"{len(shared)} latents are shared in what is added to the residual stream: two are needed")
    order = torch.randperm(len(shared), generator=torch.Generator().manual_seed(seed))
    # A permutation without fixed points, so that each is beside another one.
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    readers, rows = [Promotion(model[name]) for name in names], []
    for start in range(0, len(shared), _BLOCK):
        block = slice(start, start + _BLOCK)
        first, second, mixed = (
            reader.logits(_written(clt, chosen, parts))
            for reader, chosen, parts in zip(
                (readers[0], readers[1], readers[1]),
                (shared[block], shared[block], shared[other[block]]),
                (columns[0], columns[1], columns[1]),
                strict=True,
            )
        )
        if first.shape != second.shape:
            raise WiringError(f"{names[0]} and {names[1]} have vocabularies of {first.shape[1]} and {second.shape[1]}")
        rows += torch.stack((_correlations(first, second), _correlations(first, mixed)), dim=1).tolist()
    return Effects(_told(shared, sharing.cosines, label, rows), (names[0], names[1]))


def _written(clt: Crosscoder, latents: Tensor, columns: list[slice]) -> Tensor:
    vectors = clt.decoder_vectors(0, latents.to(clt.device)).detach()
    return torch.stack([vectors[:, part] for part in columns]).sum(0)


def _correlations(a: Tensor, b: Tensor) -> Tensor:
    """Return Pearson's correlation of each row of one with the same row of the other, (n,); rows are centred."""
    return torch.nn.functional.cosine_similarity(a, b.to(a.device), dim=1).cpu()


def _told(shared: Tensor, cosines: Mapping[str, Tensor] | None, label: str, rows: list[list[float]]) -> pd.DataFrame:
    import pandas

    cosine = torch.full((len(shared),), float("nan")) if cosines is None else cosines[label][shared]
    found = pandas.DataFrame(rows, columns=["correlation", "permuted"])
    return pandas.DataFrame({"latent": shared.numpy(), "cosine": cosine.numpy(), **found})
