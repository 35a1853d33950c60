"""Latent scaling: how much of a latent each model has, measured on activations, not on decoder norms.

For latent j with the decoder vector d_j of model b, and a model m::

    beta_m = sum_i f_ij <d_j, y_i> / (|d_j|^2 sum_i f_ij^2)

is the best scale at which ``f_ij d_j`` fits y over all tokens i. Two choices of y:

- beta_r: y is model m's reconstruction: is the latent, or are others in its place, used there?
- beta_e: y is model m's error with the latent's own part put back, ``x_m - recon_m + f_j d_j^m``: is it in the model's
  activations but in no other latent?

``nu = beta_a / beta_b`` of each. A latent of model b alone has nu_r and nu_e near 0; one that training split into
copies has a large nu_r (the other copy reconstructs it in a), one that it left out of a's reconstruction a large nu_e.
Without putting the own part back beta_b is about 0 for every well trained latent, its nu is noise, and an exclusive
latent can look shared: the column ``nu_e_without_own`` shows it.
Source: Minder et al. 2025, "Overcoming Sparsity Artifacts in Crosscoders to Interpret Chat-Tuning".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt_plugin.adapters._run import group_labels
from clt_plugin.analysis._events import row_products
from clt_plugin.analysis.crosscoders._data import encoded
from clt_plugin.analysis.crosscoders.sharing import relative_norm
from clt_plugin.core import Crosscoder, Site, WiringError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

NU_R, NU_E = 0.5, 0.2
"""A latent is of one model alone where nu_r and nu_e are below these (Minder et al. 2025)."""


@dataclass(frozen=True, eq=False)
class LatentScaling:
    """What `latent_scaling` measured.

    Attributes:
        latents: One row for each latent: its group and number; ``tokens`` on which it was active; its relative decoder
            norm (1 for b alone); ``beta_r_a``, ``beta_r_b``, ``nu_r``, ``beta_e_a``, ``beta_e_b`` and ``nu_e``; the
            misleading ``nu_e_without_own``; and ``exclusive``, whether nu_r < 0.5 and nu_e < 0.2. Latents that were
            never active have NaN.
        base: Model a's name.
        chat: Model b's name.
        n_tokens: Over how many tokens.
    """

    latents: pd.DataFrame
    base: str
    chat: str
    n_tokens: int

    @property
    def table(self) -> pd.DataFrame:
        """One row for each class by decoder norm: how many latents, and how many of them scaling finds exclusive."""
        import pandas

        alive = self.latents[self.latents["tokens"] > 0]
        norm = alive["relative_norm"]
        classes = {
            f"only {self.chat} (norm > 0.9)": norm > 0.9,
            "between (0.6 to 0.9)": (norm > 0.6) & (norm <= 0.9),
            "shared (0.4 to 0.6)": (norm >= 0.4) & (norm <= 0.6),
            "between (0.1 to 0.4)": (norm >= 0.1) & (norm < 0.4),
            f"only {self.base} (norm < 0.1)": norm < 0.1,
        }
        rows = []
        for name, here in classes.items():
            chosen = alive[here]
            rows.append(
                {
                    "class": name,
                    "latents": len(chosen),
                    "exclusive": int(chosen["exclusive"].sum()),
                    "median_nu_r": float(chosen["nu_r"].median()) if len(chosen) else float("nan"),
                    "median_nu_e": float(chosen["nu_e"].median()) if len(chosen) else float("nan"),
                }
            )
        return pandas.DataFrame(rows)

    def plot(self) -> Figure:
        """Draw nu_r against nu_e, coloured by relative norm, with the bounds of exclusive latents."""
        from clt_plugin.report.crosscoders import plot_scaling

        return plot_scaling(self.latents[self.latents["tokens"] > 0], (NU_R, NU_E), f"{self.base} against {self.chat}")

    def __str__(self) -> str:
        return self.table.to_string(index=False, float_format=lambda value: f"{value:.3f}")


def latent_scaling(
    clt: Crosscoder, activations: Any, *, base: str | None = None, chat: str | None = None, bar: bool | None = None
) -> LatentScaling:
    """Measure how much of each latent two models have: see the module's formulas. One streaming pass, closed form.

    Args:
        clt: A crosscoder over two models or more, of one width at the sites compared.
        activations: ``harvest({name: model, ...}, texts, clt.wiring)``, a cache, or batches {site: (tokens, d)}.
        base: Model a; by default the first that the crosscoder writes.
        chat: Model b, whose decoder vectors are fitted; by default the second.
        bar: Whether to show progress; by default on a terminal.

    Raises:
        WiringError: The crosscoder does not write both models, or at another number of sites or widths.
    """
    sites = _sites(clt, base, chat)
    sums = [_Sums(clt, g, pair) for g, pair in enumerate(sites)]
    n_tokens = 0
    for batch, features in encoded(clt, activations, bar):
        recon = {site: y.detach() for site, y in clt.decode(features, batch if clt.wiring.skips else None).items()}
        n_tokens += features.shape[0]
        for total, active in zip(sums, features.groups, strict=True):
            total.add(batch, recon, active)
    import pandas

    labels = group_labels(clt.wiring)
    latents = pandas.concat([total.result(labels[total.group]) for total in sums], ignore_index=True)
    first, second = sites[0]
    return LatentScaling(latents, first.model, second.model, n_tokens)


def _sites(clt: Crosscoder, base: str | None, chat: str | None) -> list[tuple[Site, Site]]:
    """Return, for each group, where it writes the two models."""
    written = list(dict.fromkeys(site.model for site in clt.wiring.write_sites))
    if len(written) < 2:
        raise WiringError(f"latent scaling compares two models, but this crosscoder writes {written[0]} alone")
    names = (base or written[0], chat or written[1])
    found = []
    for g, sites in enumerate(clt.wiring.writes):
        pair = [[site for site in sites if site.model == name] for name in names]
        if [len(each) for each in pair] != [1, 1] or names[0] == names[1]:
            raise WiringError(
                f"group {g} does not write {names[0]} and {names[1]} at one site each: choose base= and chat="
            )
        (a,), (b,) = pair
        if clt.layout.width[a] != clt.layout.width[b]:
            raise WiringError(
                f"{a} and {b} differ in width, so that one's decoder vectors cannot be fitted to the other"
            )
        found.append((a, b))
    return found


class _Sums:
    """What is summed over tokens for one group, in float64, (F,) each.

    Args:
        clt: The crosscoder.
        group: Which group.
        pair: Where it writes model a and model b.
    """

    def __init__(self, clt: Crosscoder, group: int, pair: tuple[Site, Site]) -> None:
        self.clt, self.group, self.pair = clt, group, pair
        size = clt.group_sizes[group]
        self.tokens = torch.zeros(size, dtype=torch.float64)
        self.squares = torch.zeros(size, dtype=torch.float64)
        # <d_j, y> summed with f_j, by what y is: the reconstruction or the error, of model a (0) and b (1).
        self.recon = torch.zeros(2, size, dtype=torch.float64)
        self.error = torch.zeros(2, size, dtype=torch.float64)

    def add(self, batch: Any, recon: Any, active: Any) -> None:
        """Take in a batch: activations and reconstructions by site, and the group's active latents."""
        used, place = active.latents.unique(return_inverse=True)
        if not len(used):
            return
        vectors = self._vectors(used, 1)
        values = active.values.detach()
        self._sum(self.tokens, active.latents, torch.ones_like(values))
        self._sum(self.squares, active.latents, values.square())
        for m, site in enumerate(self.pair):
            error = batch[site].to(recon[site]) - recon[site]
            for total, y in ((self.recon[m], recon[site]), (self.error[m], error)):
                products = row_products(vectors, place, y, active.tokens)
                self._sum(total, active.latents, values * products)

    def _vectors(self, latents: Tensor | None, m: int) -> Tensor:
        columns = self.clt.layout.write_slices[self.group][self.pair[m]]
        return self.clt.decoder_vectors(self.group, latents).detach()[:, columns]

    @staticmethod
    def _sum(total: Tensor, latents: Tensor, values: Tensor) -> None:
        total.index_add_(0, latents.cpu(), values.double().cpu())

    def result(self, label: str) -> pd.DataFrame:
        """Return one row for each latent."""
        import pandas

        a, b = (self._vectors(None, m).double().cpu() for m in (0, 1))
        scale = b.square().sum(1) * self.squares
        # A latent's own part in model m's error: f_j d_j^m, along d_j.
        own = torch.stack(((b * a).sum(1), (b * b).sum(1))) * self.squares
        beta_r, beta_e, without = self.recon / scale, (self.error + own) / scale, self.error / scale
        nu_r, nu_e, nu_without = (beta[0] / beta[1] for beta in (beta_r, beta_e, without))
        columns = {
            "tokens": self.tokens.long(),
            "relative_norm": relative_norm(a.norm(dim=1), b.norm(dim=1)),
            "beta_r_a": beta_r[0],
            "beta_r_b": beta_r[1],
            "nu_r": nu_r,
            "beta_e_a": beta_e[0],
            "beta_e_b": beta_e[1],
            "nu_e": nu_e,
            "nu_e_without_own": nu_without,
            "exclusive": (nu_r < NU_R) & (nu_e < NU_E),
        }
        data = {name: value.numpy() for name, value in columns.items()}
        return pandas.DataFrame({"group": label, "latent": range(len(self.tokens)), **data})
