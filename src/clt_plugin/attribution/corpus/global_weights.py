"""Beyond the prompt: which features feed which, over a whole data set.

For a source s and a target t, with virtual weight V (see below) and expectations over the tokens of a data set::

    ERA[s, t]   = E[1(a_t > 0) a_s] V[s, t]        expected residual attribution
    TWERA[s, t] = E[a_t a_s] / E[a_t] V[s, t]      the same, weighted by the target's activation

(Ameisen et al. 2025, "Circuit Tracing", on global weights.) V alone is full of pairs that are never active together;
the expectations leave them out. V is what one unit of the source adds to the target's pre-activation along the residual
stream alone: the sum, over what s writes before t reads, of <decoder, encoder>, with the gains and the centring of the
norms on the way folded in and their denominators, which differ from token to token, left out. What attention, MLPs and
affine skips carry is not part of it.

Some features are chosen and set against all features of the crosscoder in one pass over the texts. What is kept is of
the size (all features, chosen ones), in float64, never of all against all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt_plugin.adapters._run import group_labels
from clt_plugin.attribution.corpus._global_sums import Sums
from clt_plugin.attribution.corpus._virtual import Chosen, ResidualPath
from clt_plugin.attribution.corpus.stream import members_of, stream
from clt_plugin.attribution.graph import GraphError
from clt_plugin.core.crosscoder import Crosscoder

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

ROLES = ("both", "targets", "sources")
"""What the chosen features can be."""
MEASURES = ("twera", "era", "weight")
"""What pairs of features can be ranked by."""


@dataclass(frozen=True, eq=False)
class GlobalWeights:
    """Sums over the tokens of a data set, of chosen features (n) with all features of a crosscoder (N).

    All features come group after group, each group's by latent. Results over the parts of a data set add up, ``a + b``,
    to that over the whole.

    Attributes:
        features: (group label, latent) of the chosen ones; a label is the layer's number as a rule.
        groups: For each group of latents its label and how many there are.
        n_tokens: How many tokens counted.
        active: In how many of them each feature was active, (N,).
        total: The sum of its activations, (N,).
        together: The sum of the products of two features' activations, (N, n).
        under_chosen: The sum of a feature's activations where the chosen one is active, (N, n); None where the chosen
            ones are sources only.
        over_chosen: The sum of the chosen one's activations where the other is active, (N, n); None where the chosen
            ones are targets only.
        into_chosen: The virtual weights from every feature into the chosen ones, (N, n), or None likewise.
        out_of_chosen: Those from the chosen ones into every feature, (N, n), or None likewise.
    """

    features: tuple[tuple[str, int], ...]
    groups: tuple[tuple[str, int], ...]
    n_tokens: int
    active: Tensor
    total: Tensor
    together: Tensor
    under_chosen: Tensor | None
    over_chosen: Tensor | None
    into_chosen: Tensor | None
    out_of_chosen: Tensor | None

    def __add__(self, other: GlobalWeights) -> GlobalWeights:
        """Return the result over both data sets, of the same features of the same crosscoder in the same model."""
        if not isinstance(other, GlobalWeights):
            return NotImplemented
        weights = ("into_chosen", "out_of_chosen")
        same = self.features == other.features and self.groups == other.groups
        if not (same and all(_same(getattr(self, name), getattr(other, name)) for name in weights)):
            raise GraphError(
                "these are not two parts of one data set: the chosen features, their role, the crosscoder or the model "
                "differ"
            )
        sums = ("active", "total", "together", "under_chosen", "over_chosen")
        added: dict[str, Any] = {name: _sum(getattr(self, name), getattr(other, name)) for name in sums}
        return replace(self, n_tokens=self.n_tokens + other.n_tokens, **added)

    # ---------------------------------------------------------------- measures

    def measure(self, feature: tuple[int | str, int], as_: str, by: str = "twera") -> Tensor:
        """Return a measure of one chosen feature with every feature, (N,) of float64.

        Args:
            feature: (layer, latent), one of the chosen ones.
            as_: ``"target"``: the others are its sources; or ``"source"``.
            by: ``"twera"``, ``"era"``, or ``"weight"`` for V. A target that is never active has a TWERA of 0.
        """
        column = self._column(feature)
        if as_ not in ("target", "source"):
            raise GraphError(f"a feature is taken as_='target' or as_='source', not {as_!r}")
        if by not in MEASURES:
            raise GraphError(f"pairs are ranked by one of {', '.join(MEASURES)}, not {by!r}")
        target = as_ == "target"
        weights = self.into_chosen if target else self.out_of_chosen
        sums = self.under_chosen if target else self.over_chosen
        if weights is None or sums is None:
            raise GraphError(f"the chosen features were not taken as {as_}s: call global_weights with as_='both'")
        if by == "weight":
            return weights[:, column]
        if by == "era":
            return sums[:, column] / max(self.n_tokens, 1) * weights[:, column]
        strength = self.total[self._place(feature)] if target else self.total
        # Where the target is silent there is nothing to divide, 0 by 0.
        return (self.together[:, column] / strength).nan_to_num(0.0) * weights[:, column]

    def sources(self, feature: tuple[int | str, int], by: str = "twera", k: int = 20) -> pd.DataFrame:
        """Return the strongest sources of a chosen feature, as a table.

        Args:
            feature: (layer, latent).
            by: As for `measure`; the strongest are the largest in magnitude. Pairs with 0 are left out.
            k: How many at most.

        Returns:
            One row a feature: ``group`` (its label), ``feature`` (its latent), ``weight`` (V), ``era``, ``twera``,
            ``frequency`` (the share of tokens in which it is active) and ``mean`` (its mean activation over all).
        """
        return self._table(feature, "target", by, k)

    def targets(self, feature: tuple[int | str, int], by: str = "twera", k: int = 20) -> pd.DataFrame:
        """Return the strongest targets of a chosen feature, as a table like that of `sources`."""
        return self._table(feature, "source", by, k)

    def frequency(self, feature: tuple[int | str, int]) -> float:
        """Return the share of tokens in which a feature, chosen or not, is active."""
        return float(self.active[self._place(feature)]) / max(self.n_tokens, 1)

    def plot(self, feature: tuple[int | str, int] | None = None, by: str = "twera", k: int = 10) -> Figure:
        """Plot a chosen feature's strongest sources and targets as bars; by default of the first one."""
        from clt_plugin.report.global_weights import plot_global_weights

        feature = self.features[0] if feature is None else feature
        sides = {}
        if self.into_chosen is not None:
            sides["sources"] = self.sources(feature, by, k)
        if self.out_of_chosen is not None:
            sides["targets"] = self.targets(feature, by, k)
        return plot_global_weights(sides, by, f"feature {feature[0]}.{feature[1]}, {self.n_tokens} tokens")

    def _table(self, feature: tuple[int | str, int], as_: str, by: str, k: int) -> pd.DataFrame:
        measures = {name: self.measure(feature, as_, name) for name in MEASURES}
        ranked = measures[by].abs().topk(min(k, len(self.total)))
        kept = ranked.indices[ranked.values > 0]
        ends = torch.tensor([size for _, size in self.groups], device=kept.device).cumsum(0)
        group = torch.searchsorted(ends, kept, right=True)
        latents = kept - torch.nn.functional.pad(ends, (1, 0))[group]
        columns: dict[str, Any] = {"group": [self.groups[g][0] for g in group.tolist()], "feature": latents.tolist()}
        columns |= {name: measures[name][kept].tolist() for name in ("weight", "era", "twera")}
        n = max(self.n_tokens, 1)
        columns |= {"frequency": (self.active[kept] / n).tolist(), "mean": (self.total[kept] / n).tolist()}
        import pandas as pd

        return pd.DataFrame(columns)

    def _column(self, feature: tuple[int | str, int]) -> int:
        wanted = _named(feature)
        if wanted not in self.features:
            chosen = ", ".join(f"{label}.{latent}" for label, latent in self.features[:8])
            raise GraphError(f"feature {wanted[0]}.{wanted[1]} was not chosen: chosen were {chosen}")
        return self.features.index(wanted)

    def _place(self, feature: tuple[int | str, int]) -> int:
        """Return where a feature stands among all."""
        (wanted, latent), start = _named(feature), 0
        for label, size in self.groups:
            if label == wanted and 0 <= latent < size:
                return start + latent
            start += size
        raise GraphError(f"there is no feature {wanted}.{latent}: groups are {dict(self.groups)}")

    def __str__(self) -> str:
        first = self.features[0]
        parts = [f"{len(self.features)} features beside {len(self.total)}, over {self.n_tokens} tokens"]
        for as_, what in (("target", "sources"), ("source", "targets")):
            if (self.into_chosen if as_ == "target" else self.out_of_chosen) is not None:
                table = self._table(first, as_, "twera", 5)
                shown = table.to_string(index=False) if len(table) else "none"
                parts.append(f"strongest {what} of {first[0]}.{first[1]}:\n{shown}")
        return "\n".join(parts)

    def __repr__(self) -> str:
        return f"<GlobalWeights of {len(self.features)} features beside {len(self.total)}, {self.n_tokens} tokens>"


def _named(feature: tuple[int | str, int]) -> tuple[str, int]:
    label, latent = feature
    return str(label), int(latent)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a + b.to(a.device)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.allclose(a, b.to(a.device), rtol=1e-6, atol=0.0)


# ---------------------------------------------------------------- over a data set


def global_weights(
    model: Any,
    texts: Iterable[Any],
    features: Any,
    *,
    clt: Any = None,
    as_: str = "both",
    batch_size: int = 8,
    max_tokens: int = 512,
    skip_special: bool = True,
    name: str = "clt",
    bar: bool = True,
) -> GlobalWeights:
    """Set chosen features against all features of a crosscoder, over a data set, in one pass.

    The model runs as it is, whatever is attached to it. Padding and the positions that the crosscoder excludes do not
    count, nor do special tokens.

    Args:
        model: An nnsight model, a TransformerBridge, or a transformers model.
        texts: Texts, or token ids (position,), of any lengths; read once. One without tokens is passed over.
        features: {layer: features}, a `supernode`, or (layer, feature) pairs.
        clt: The crosscoder, or a reference; by default the one that is attached to the model.
        as_: ``"targets"`` to find what feeds the chosen features, ``"sources"`` to find what they feed, ``"both"``.
        batch_size: How many texts run at a time. The result does not depend on it, but for rounding.
        max_tokens: Longer texts are cut into pieces of so many tokens, each with the text's BOS token.
        skip_special: Whether the tokenizer's special tokens are left out.
        name: The name under which the crosscoder is attached.
        bar: Whether to show progress.

    Raises:
        EditError: There are no such features, or a text is of another kind.
        GraphError: No feature was chosen, or a setting cannot be.
        AttachError: The crosscoder does not fit the model, or adds nothing to the residual stream.
    """
    from clt_plugin.adapters.huggingface import check_fits, plain_model
    from clt_plugin.interventions.modes import find_crosscoder

    if as_ not in ROLES:
        raise GraphError(f"as_ is one of {', '.join(ROLES)}, not {as_!r}")
    crosscoder = find_crosscoder(model, clt, name, None, mode="replace")
    assert crosscoder is not None
    members = members_of(crosscoder, features)
    if not members:
        raise GraphError("no features were chosen: name one at least, such as {3: [811]}")
    chosen = _chosen(crosscoder, members)
    # Before the texts: what does not fit is to be said now.
    with plain_model(model) as hf:
        host = check_fits(crosscoder, hf, "observe")
        path = ResidualPath(hf, host, crosscoder)
        into = None if as_ == "sources" else path.into(chosen)
        out_of = None if as_ == "targets" else path.out_of(chosen)
        sums = Sums(crosscoder, chosen, into is not None, out_of is not None)
        with torch.no_grad():
            for seen in stream(model, hf, host, crosscoder, texts, batch_size, max_tokens, skip_special, bar):
                sums.add(seen.active, int(seen.counted.sum()))
    return GlobalWeights(
        features=members,
        groups=tuple(zip(group_labels(crosscoder.wiring), crosscoder.group_sizes, strict=True)),
        n_tokens=sums.n_tokens,
        active=sums.active,
        total=sums.total,
        together=sums.together,
        under_chosen=sums.under_chosen,
        over_chosen=sums.over_chosen,
        into_chosen=into,
        out_of_chosen=out_of,
    )


def _chosen(crosscoder: Crosscoder, members: Sequence[tuple[str, int]]) -> list[Chosen]:
    parts, device = [], crosscoder.device
    for group, label in enumerate(group_labels(crosscoder.wiring)):
        columns = [column for column, (each, _) in enumerate(members) if each == label]
        if columns:
            latents = torch.tensor([members[column][1] for column in columns], device=device)
            parts.append(Chosen(group, latents, torch.tensor(columns, device=device)))
    return parts
