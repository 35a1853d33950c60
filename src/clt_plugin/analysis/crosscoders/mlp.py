"""What an MLP makes new features of: encoder-decoder products, weighted by activation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from clt_plugin.analysis.crosscoders._data import encoded
from clt_plugin.core import Crosscoder, WiringError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class FeatureInputs:
    """What feeds latents, on the tokens on which they are active.

    Attributes:
        table: The strongest inputs of each target: ``target`` and ``source`` (latents of the one group), ``product``
            (of the source's decoder vector at what is read and the target's encoder vector), ``activation`` (the
            source's mean where the target is active), and their product, ``strength``.
        totals: One row for each target: ``tokens`` on which it is active, its mean ``pre_activation`` there, and the
            parts that sum to it: ``features`` (all sources), ``bias`` (encoder's, and decoder's through the encoder),
            and ``error``, what the reconstruction of what is read leaves out.
    """

    table: pd.DataFrame
    totals: pd.DataFrame

    def plot(self) -> Figure:
        """Draw the strongest inputs of each target as bars."""
        from clt_plugin.report.crosscoders import plot_inputs

        return plot_inputs(self.table)

    def __str__(self) -> str:
        form: Any = {"index": False, "float_format": lambda value: f"{value:.3f}"}
        return f"{self.totals.to_string(**form)}\n{self.table.to_string(**form)}"


def feature_inputs(
    clt: Crosscoder, activations: Any, latents: Sequence[int], *, k: int = 10, bar: bool | None = None
) -> FeatureInputs:
    """Find what chosen latents, such as those that are new after an MLP, are computed from.

    Encoders read what the same crosscoder reconstructs, so that a source s with decoder vector d_s and a target t with
    encoder vector e_t have the product ``<d_s, e_t>``, and on average, over tokens on which t is active, s contributes
    ``<d_s, e_t> E[f_s]`` to its pre-activation. Contributions, biases and the reconstruction's error sum to it.
    Source: Lindsey et al. 2024, "Sparse Crosscoders", pre- and post-MLP crosscoders.

    Args:
        clt: A crosscoder of one group that writes all it reads, such as ``Wiring.pre_post_mlp(layer)``.
        activations: ``harvest(model, texts, clt.wiring)``, a cache, or batches {site: (tokens, d)}.
        latents: The targets.
        k: How many inputs of each.
        bar: Whether to show progress; by default on a terminal.

    Raises:
        WiringError: The crosscoder is of another form, there are no such latents, or no activations.
    """
    _check(clt, latents)
    (reads,) = clt.wiring.reads
    chosen = torch.as_tensor(list(latents), device=clt.device)
    encoders = clt.encoder_vectors(0, chosen).detach().double()
    n = clt.group_sizes[0]
    sums = torch.zeros(len(chosen), n, dtype=torch.float64, device=clt.device)
    tokens, inputs = sums.new_zeros(len(chosen)), sums.new_zeros(len(chosen), encoders.shape[1])
    for batch, features in encoded(clt, activations, bar):
        active = features.groups[0]
        on = (features.dense(0)[:, chosen] > 0).double()
        tokens += on.sum(0)
        inputs += on.T @ torch.cat([batch[site] for site in reads], dim=1).double()
        # One row of `on` an active entry: few are, and each adds to every target that is active beside it.
        sums.index_add_(1, active.latents, (active.values.detach().double()[:, None] * on[active.tokens]).T)
    means = sums / tokens[:, None]
    decoders = torch.cat([_columns(clt, site) for site in reads], dim=1).double()
    products = encoders @ decoders.T
    strengths = products * means
    through = encoders @ torch.cat([clt.bias(site) for site in reads]).detach().double()
    bias = clt.b_enc[0].detach()[chosen].double() + through
    pre = (encoders * (inputs / tokens[:, None])).sum(1) + clt.b_enc[0].detach()[chosen].double()
    return _told(chosen, tokens, pre, bias, products, means, strengths, k)


def _check(clt: Crosscoder, latents: Sequence[int]) -> None:
    wiring = clt.wiring
    if wiring.n_groups != 1 or not set(wiring.reads[0]) <= set(wiring.writes[0]) or wiring.skips:
        raise WiringError(
            "inputs are found for a crosscoder of one group that writes all it reads and has no skips, such as "
            f"Wiring.pre_post_mlp(layer), not for {wiring!r}"
        )
    wrong = [latent for latent in latents if not 0 <= latent < clt.group_sizes[0]]
    if wrong or not len(latents):
        what = f"there is no latent {wrong[0]}" if wrong else "no latent is asked for"
        raise WiringError(f"{what}: this crosscoder has latents 0-{clt.group_sizes[0] - 1}")


def _columns(clt: Crosscoder, site: Any) -> torch.Tensor:
    return clt.decoder_vectors(0).detach()[:, clt.layout.write_slices[0][site]]


def _told(chosen: Any, tokens: Any, pre: Any, bias: Any, products: Any, means: Any, strengths: Any, k: int) -> Any:
    import pandas

    rows, totals = [], []
    for i, target in enumerate(chosen.tolist()):
        features = float(strengths[i].sum())
        known = {
            "tokens": int(tokens[i]),
            "pre_activation": float(pre[i]),
            "features": features,
            "bias": float(bias[i]),
        }
        totals.append({"target": target, **known, "error": float(pre[i]) - features - float(bias[i])})
        order = strengths[i].nan_to_num().abs().topk(min(k, strengths.shape[1])).indices.tolist()
        for source in order if tokens[i] else []:
            parts = {"product": float(products[i, source]), "activation": float(means[i, source])}
            rows.append({"target": target, "source": source, **parts, "strength": float(strengths[i, source])})
    columns = ["target", "source", "product", "activation", "strength"]
    return FeatureInputs(pandas.DataFrame(rows, columns=columns), pandas.DataFrame(totals))
