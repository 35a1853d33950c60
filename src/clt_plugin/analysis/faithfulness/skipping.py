"""How much of a layer's reconstruction earlier layers' latents write: the hop-skip fraction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt_plugin.core import Crosscoder, Site
from clt_plugin.core.features import SparseGroup, decode_sparse_group

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class Parts:
    """Second moments of what each layer's latents write to each target layer, summed over tokens, in float64.

    Args:
        crosscoder: Whose.
    """

    def __init__(self, crosscoder: Crosscoder) -> None:
        self.crosscoder, self.tokens = crosscoder, 0
        # {target: {source: (sum of y_s, sum of |y_s|^2, sum of <y_s, sum over sources of y>)}}
        self.sums: dict[Site, dict[int, list[Tensor]]] = {}

    def update(self, features: Mapping[int, SparseGroup], n_tokens: int) -> None:
        """Take in a batch: each group's active latents over ``n_tokens`` tokens."""
        crosscoder, home = self.crosscoder, self.crosscoder.wiring.home
        self.tokens += n_tokens
        parts: dict[Site, dict[int, Tensor]] = {site: {} for site in crosscoder.wiring.write_sites}
        for g, group in features.items():
            y = _decoded(crosscoder, g, group, n_tokens)
            for site, columns in crosscoder.layout.write_slices[g].items():
                held = parts[site].get(home[g])
                parts[site][home[g]] = y[:, columns] if held is None else held + y[:, columns]
        for site, by_source in parts.items():
            whole = torch.stack(list(by_source.values())).sum(0)
            for source, y in by_source.items():
                new = [y.sum(0), y.square().sum(), (y * whole).sum()]
                old = self.sums.setdefault(site, {}).get(source)
                self.sums[site][source] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]

    def result(self) -> HopSkip:
        """Return the fractions."""
        if not self.tokens:
            raise ValueError("no token was counted: give texts with tokens beyond those that the crosscoder excludes")
        rows: list[dict[str, Any]] = []
        for site, by_source in self.sums.items():
            mean = {source: sums[0] / self.tokens for source, sums in by_source.items()}
            centre = torch.stack(list(mean.values())).sum(0)
            norm = {source: float(sums[1]) for source, sums in by_source.items()}
            aligned = {s: float(v[2]) for s, v in by_source.items()}
            varied = {s: float(v[2] - self.tokens * (mean[s] * centre).sum()) for s, v in by_source.items()}
            for source in sorted(by_source):
                row = {"target": site.layer, "source": source, "site": str(site)}
                shares = (("norm", norm), ("aligned", aligned), ("variance", varied))
                rows.append(row | {name: _share(of[source], sum(of.values())) for name, of in shares})
        return HopSkip(tuple(tuple(row.values()) for row in rows))


@dataclass(frozen=True)
class HopSkip:
    """How much of each layer's reconstruction comes from the latents of which layer.

    Attributes:
        rows: One a target and source: target layer, source layer, the written site, and three shares, each of which
            adds up to 1 over the sources of a target: ``norm``, of ``E ||y_s||^2``, from 0 to 1; ``aligned``, of
            ``E <y_s, y>``, what a source adds to the whole y without bias, negative where it works against it; and
            ``variance``, the same about the means. nan where nothing is written.
    """

    rows: tuple[tuple[Any, ...], ...]

    @property
    def table(self) -> pd.DataFrame:
        """One row a target and source, with the columns target, source, site, norm, aligned and variance."""
        import pandas as pd

        return pd.DataFrame(list(self.rows), columns=["target", "source", "site", "norm", "aligned", "variance"])

    def fraction(self, target: int, share: str = "norm") -> float:
        """Return the hop-skip fraction of a target layer: the share of all earlier layers together."""
        table = self.table
        of = table[table["target"] == target]
        if of["site"].nunique() != 1:
            written = sorted(set(table["site"]))
            raise ValueError(f"layer {target} has {of['site'].nunique()} written sites, not one: written are {written}")
        return float(of[of["source"] < target][share].sum(skipna=False)) if (of["source"] < target).any() else 0.0

    def fractions(self, share: str = "norm") -> dict[int, float]:
        """Return the hop-skip fraction of every target layer."""
        return {target: self.fraction(target, share) for target in sorted(set(self.table["target"]))}

    def plot(self, share: str = "norm") -> Figure:
        """Draw for every target layer whose latents write it."""
        from clt_plugin.report.faithfulness import plot_hop_skip

        return plot_hop_skip(self.table, share)


def hop_skip(
    clt: Any, model: Any = None, texts: Iterable[Any] | None = None, *, x: Any = None, **settings: Any
) -> HopSkip:
    """Measure how much of each layer's reconstruction the latents of earlier layers write.

    With ``y_s`` what the latents of layer s write to a target layer, the hop-skip fraction is the share that layers
    before the target have in ``sum_s E ||y_s||^2``; other shares are in the table. For per-layer transcoders it is 0.
    In a CLT whose late layers fall silent it nears 1, as the study of unfaithful circuits found in its Boolean toy;
    the formula is ours.

    Args:
        clt: A crosscoder, or a reference.
        model: Whose activations to use, with `texts`.
        texts: Texts to run.
        x: Activations that are read, as for `Crosscoder.encode`, in place of model and texts.
        **settings: ``batch_size``, ``max_tokens`` and ``bar``, as for `l0_profile`.
    """
    from clt_plugin.adapters.huggingface import crosscoder_for
    from clt_plugin.analysis.faithfulness._texts import batches

    crosscoder = crosscoder_for(clt)
    parts = Parts(crosscoder)
    with torch.no_grad():
        if x is not None:
            features = crosscoder.encode(x, sparse=True)
            n_tokens = torch.Size(features.shape).numel()
            parts.update(dict(enumerate(features.groups)), n_tokens)
        elif model is None or texts is None:
            raise ValueError("hop_skip needs activations to look at: give model and texts, or x=")
        else:
            for seen in batches(model, crosscoder, texts, **settings):
                parts.update(seen.active, int(seen.counted.sum()))
    return parts.result()


def _decoded(crosscoder: Crosscoder, group: int, acts: SparseGroup, n_tokens: int) -> Tensor:
    """Return what a group's active latents write, (n_tokens, sum of the widths written), in float64."""
    used, place = acts.latents.unique(return_inverse=True)
    rows = crosscoder.decoder_vectors(group, used).double()
    if not len(used):
        return rows.new_zeros(n_tokens, crosscoder.layout.write_width(group))
    compact = SparseGroup(acts.tokens, place, acts.values.double(), len(used))
    return decode_sparse_group(compact, rows, lambda _: rows, n_tokens)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float("nan")
