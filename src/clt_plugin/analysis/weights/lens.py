"""Time travel: do a feature's writes to later layers say the same token as its write to its own layer?

Source: "Cross-Layer Connections in Cross-Layer Transcoders: An Empirical Investigation", experiment 5.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from clt_plugin.adapters._run import group_labels
from clt_plugin.adapters.huggingface import check_fits, plain_model
from clt_plugin.analysis.studies import STUDIES, Study
from clt_plugin.analysis.weights import _readers
from clt_plugin.analysis.weights._blocks import Block, blocks, check_one_model
from clt_plugin.analysis.weights._tally import resampled
from clt_plugin.core.crosscoder import Crosscoder
from clt_plugin.core.errors import WiringError
from clt_plugin.core.wiring import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

REPLICATES = 200


@dataclass(frozen=True, eq=False)
class TimeTravel:
    """Same-layer and cross-layer vectors through the unembedding.

    Attributes:
        table: One row a source and target: ``n`` features, ``cosine`` of the logits of their two vectors (mean, and
            ``sd`` over features), ``control``, the mean cosine with another feature's same-layer vector, ``vectors``,
            the mean cosine of the two vectors themselves; of ``sampled`` features ``same_token``, the share whose two
            top tokens are one, and ``same_by_chance``, that share beside another feature's.
        cosine: The mean over all cross-layer vectors, and a 95% interval by bootstrap over features.
        same_token: The share of sampled pairs with the same top token.
        same_by_chance: That share for shuffled features.
        examples: Sampled features with the top token of their same-layer vector, and of each cross-layer one.
        gains: Whether the final norm's gain and centring were folded in.
    """

    table: pd.DataFrame
    cosine: tuple[float, float, float]
    same_token: float
    same_by_chance: float
    examples: pd.DataFrame
    gains: bool

    def plot(self) -> Figure:
        """Draw cosines and shares of equal top tokens by distance, beside the controls."""
        from clt_plugin.report.weights import plot_time_travel

        return plot_time_travel(self.table, self.cosine, self.gains)

    def __str__(self) -> str:
        mean, low, high = self.cosine
        gains = "folded in" if self.gains else "left out"
        return (
            f"same-layer and cross-layer vectors through the unembedding, the final norm's gain {gains}: cosine of "
            f"logits {mean:.3f} ({low:.3f} to {high:.3f}), same top token {self.same_token:.1%} "
            f"(by chance {self.same_by_chance:.1%})"
        )


def time_travel(
    clt: Crosscoder,
    model: Any,
    *,
    n_features: int = 64,
    gains: bool = True,
    seed: int = 0,
    bar: bool | None = None,
) -> TimeTravel:
    """Compare a feature's same-layer and cross-layer vectors as logits (the logit lens of experiment 5).

    If a cross-layer write foretold the token that the same-layer write promotes, their logits ``W_U v`` would agree.
    Logits are taken less their mean over the vocabulary, and before a final softcap. The cosine of two vectors' logits
    is ``v G w / sqrt(v G v  w G w)`` with ``G = W_U^T W_U``, so that it costs two products with a (d, d) matrix and is
    taken of every vector; top tokens are found for a sample of features.

    Args:
        clt: A crosscoder over one model whose features write their own layer and others, in memory or lazy.
        model: An nnsight model, a TransformerBridge, or a transformers model.
        n_features: How many features of each group to find top tokens for.
        gains: Whether the final norm's gain and centring are folded into the unembedding.
        seed: Of what is drawn.
        bar: Whether to show progress; by default on a terminal.

    Raises:
        AttachError: The crosscoder does not fit the model, or the model has no unembedding.
        WiringError: No feature writes both its own layer and another.
    """
    check_one_model(clt)
    with plain_model(model) as hf, torch.no_grad():
        host = check_fits(clt, hf, "observe")
        head = _readers.unembedding(hf, host, gains)
        through = _readers.to_stream(clt, hf, host, head)
    labels, chance = group_labels(clt.wiring), torch.Generator().manual_seed(seed)
    lens = _Lens(head, _gram(head))
    chosen = [set(torch.randperm(n, generator=chance)[:n_features].tolist()) for n in clt.group_sizes]
    for block in blocks(clt, bar, "logit lens"):
        written = {site: through(site, v) for site, v in block.vectors.items() if site.name in _readers.ADDED}
        own = [site for site in written if site.layer == clt.wiring.home[block.group]]
        cross = [site for site in written if site not in own]
        if len(own) == 1 and cross:
            lens.add(block, written[own[0]], {site: written[site] for site in cross}, chosen[block.group], chance)
    if not lens.found:
        raise WiringError("no feature of this crosscoder writes both its own layer and another: nothing travels")
    decode = getattr(getattr(model, "tokenizer", None), "decode", None)
    return lens.result(clt, labels, gains, decode, torch.Generator().manual_seed(seed))


def _gram(head: Tensor) -> Tensor:
    """Return ``head.T @ head`` summed in float64, (d, d), in the head's dtype."""
    total = torch.zeros(head.shape[1], head.shape[1], dtype=torch.float64, device=head.device)
    for rows in head.split(4096):
        total += rows.T.double() @ rows.double()
    return total.to(head.dtype)


@dataclass(eq=False)
class _Lens:
    """What was seen so far.

    Attributes:
        head: (vocabulary, d).
        gram: (d, d).
        found: For each group and target columns over features: cosine, control, cosine of the vectors.
        tokens: (group, latent, target): top tokens of the same-layer vector, of the cross-layer one, and of another
            feature's same-layer vector.
    """

    head: Tensor
    gram: Tensor
    found: dict[tuple[int, Site], list[Tensor]] = field(default_factory=dict)
    tokens: dict[tuple[int, int, Site], tuple[int, int, int]] = field(default_factory=dict)

    def add(
        self, block: Block, here: Tensor, cross: dict[Site, Tensor], chosen: set[int], chance: torch.Generator
    ) -> None:
        """Take in a block's same-layer vectors, (n, d), and its cross-layer ones by target."""
        # Another feature's, of the same layer: so many places further on.
        step = int(torch.randint(1, max(len(here), 2), (1,), generator=chance))
        other = torch.arange(len(here), device=here.device).roll(step)
        here_read = here @ self.gram
        rows = [i for i in range(len(here)) if i + block.rows.start in chosen]
        local = self._top(here[rows]), self._top(here[other[rows]])
        for site, vectors in cross.items():
            sizes = ((vectors @ self.gram) * vectors).sum(1).clamp_min(0).sqrt()
            own_sizes = (here_read * here).sum(1).clamp_min(0).sqrt()
            inner = (here_read * vectors).sum(1) / (own_sizes * sizes)
            control = (here_read[other] * vectors).sum(1) / (own_sizes[other] * sizes)
            direct = cosine_similarity(here, vectors, dim=1, eps=0.0)
            columns = torch.stack([inner, control, direct], dim=1).double().cpu()
            self.found.setdefault((block.group, site), []).append(columns)
            for i, *three in zip(rows, local[0], self._top(vectors[rows]), local[1], strict=True):
                if bool(columns[i].isfinite().all()):
                    self.tokens[block.group, i + block.rows.start, site] = (three[0], three[1], three[2])

    def _top(self, vectors: Tensor) -> list[int]:
        return (vectors @ self.head.T).argmax(1).tolist() if len(vectors) else []

    def result(self, clt: Crosscoder, labels: Any, gains: bool, decode: Any, chance: torch.Generator) -> TimeTravel:
        """Make tables of it."""
        import pandas as pd

        rows, sums = [], []
        for g in dict.fromkeys(group for group, _ in self.found):
            columns = {site: torch.cat(parts) for (group, site), parts in self.found.items() if group == g}
            cosines = torch.stack([each[:, 0] for each in columns.values()], dim=1)
            sums.append(torch.stack([cosines.nansum(1), cosines.isfinite().sum(1)], dim=1))
            for site, each in columns.items():
                same = [t for (group, _, target), t in self.tokens.items() if (group, target) == (g, site)]
                rows.append(
                    {
                        "group": labels[g],
                        "source": clt.wiring.home[g],
                        "target": site.layer,
                        "distance": site.layer - clt.wiring.home[g],
                        "n": int(each[:, 0].isfinite().sum()),
                        "cosine": float(each[:, 0].nanmean()),
                        "sd": float(each[each[:, 0].isfinite(), 0].std()),
                        "control": float(each[:, 1].nanmean()),
                        "vectors": float(each[:, 2].nanmean()),
                        "sampled": len(same),
                        "same_token": _share([a == b for a, b, _ in same]),
                        "same_by_chance": _share([c == b for _, b, c in same]),
                    }
                )
        draws = torch.stack([resampled(each, REPLICATES, chance) for each in sums]).sum(0)
        total = torch.cat(sums).sum(0)
        ends = (draws[:, 0] / draws[:, 1]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        three = list(self.tokens.values())
        return TimeTravel(
            table=pd.DataFrame(rows),
            cosine=(float(total[0] / total[1]), float(ends[0]), float(ends[1])),
            same_token=_share([a == b for a, b, _ in three]),
            same_by_chance=_share([c == b for _, b, c in three]),
            examples=self._examples(labels, decode),
            gains=gains,
        )

    def _examples(self, labels: Any, decode: Any) -> pd.DataFrame:
        import pandas as pd

        said = (lambda token: decode([token])) if decode else str
        rows = [
            (labels[g], latent, site.layer, said(own), said(cross), own == cross)
            for (g, latent, site), (own, cross, _) in self.tokens.items()
        ]
        return pd.DataFrame(rows, columns=["layer", "feature", "target", "same_layer", "cross_layer", "equal"])


def _share(values: list[bool]) -> float:
    return sum(values) / len(values) if values else float("nan")


STUDIES.add(
    "time-travel",
    Study(
        time_travel,
        ("clt", "model"),
        "do cross-layer writes promote the token that the same-layer write does",
        {"n_features": int, "gains": bool, "seed": int},
    ),
)
