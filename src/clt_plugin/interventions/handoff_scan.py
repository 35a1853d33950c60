"""The handoff between every two layers ablated in turn, and what that does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from clt_plugin.interventions._edit import Edit, only
from clt_plugin.interventions._places import EditError
from clt_plugin.interventions.edits import Ablate, Group, Supernode
from clt_plugin.interventions.handoff import ablate_handoff

__all__ = ["HandoffScan", "handoff_scan"]

FEW = 16
"""So many runs need no progress bar."""


@dataclass(frozen=True, eq=False)
class HandoffScan:
    """What ablating each handoff does.

    Attributes:
        effects: By source and target, (n_layers, n_layers); NaN where no handoff was ablated.
        baseline: The measure in the run without ablation.
        measure: What was measured.
        mode: How, as for `intervene`.
    """

    effects: "Float[Tensor, 'source target']"
    baseline: float
    measure: str
    mode: str

    def strongest(self, k: int = 10) -> list[tuple[int, int, float]]:
        """Return the k pairs of the largest effects in magnitude: (source, target, effect)."""
        return sorted(self._rows(), key=lambda row: -abs(row[2]))[:k]

    def to_pandas(self) -> Any:
        """Return one row a pair, with the columns source, target and effect."""
        import pandas

        return pandas.DataFrame(self._rows(), columns=["source", "target", "effect"])

    def plot(self) -> Any:
        """Draw the effects as a heat map; returns matplotlib's figure."""
        from clt_plugin.report.handoff import plot_handoffs

        return plot_handoffs(self.effects, self.measure, f"handoffs ablated one by one, mode {self.mode}")

    def _rows(self) -> list[tuple[int, int, float]]:
        pairs = (~self.effects.isnan()).nonzero().tolist()
        return [(source, target, float(self.effects[source, target])) for source, target in pairs]

    def __str__(self) -> str:
        strongest = self.strongest()
        lines = [f"{self.measure} by handoff, mode {self.mode}; without ablation {self.baseline:.4f}"]
        lines += [f"  {source:>3} -> {target:<3} {effect:+.4f}" for source, target, effect in strongest]
        rest = len(self._rows()) - len(strongest)
        return "\n".join([*lines, f"  and {rest} more" if rest else ""]).rstrip()

    def __repr__(self) -> str:
        return f"<HandoffScan {self.measure}, {len(self._rows())} pairs of {len(self.effects)} layers>"


def handoff_scan(
    model: Any,
    prompts: Any,
    metric: Callable[[Tensor], Any] | None = None,
    features: Group | None = None,
    clt: Any = None,
    pairs: Iterable[tuple[int, int]] | None = None,
    *,
    mode: str = "iterative",
    subspace: Any = None,
    mean: Any = None,
    norm: str = "live",
    position: Any = None,
    freeze_attention: bool | None = None,
    name: str = "clt",
    bar: bool | None = None,
) -> HandoffScan:
    """Ablate the handoff of every pair of layers, one at a time, and measure the effect.

    Args:
        model: As for `intervene`.
        prompts: As for `intervene`; all run as one batch.
        metric: From logits (batch, position, vocabulary) to a number, whose change is measured; by default the
            Kullback-Leibler divergence of each row's last prediction from that of the same mode without ablation, in
            nats, averaged over rows.
        features: {layer: features}, or a `supernode`: remove their writes alone, in place of whole MLP outputs.
        clt: The crosscoder, as for `intervene`.
        pairs: The (source, target) pairs; by default all that go forward, from layers with features where those are
            given.
        mode: ``"iterative"``, ``"local"`` or ``"replace"``, as for `intervene`.
        subspace: As for `ablate_handoff`.
        mean: As for `ablate_handoff`; whole outputs by source, features in the order in which they are given.
        norm: As for `ablate_handoff`.
        position: Remove only at these positions, as for `only`.
        freeze_attention: As for `intervene`.
        name: As for `intervene`.
        bar: Whether to show progress; by default for more than a few pairs.
    """
    from tqdm.auto import tqdm

    from clt_plugin.adapters.huggingface import HostModel, plain_model
    from clt_plugin.interventions.modes import intervene

    with plain_model(model) as hf:
        n_layers = HostModel.of(hf).n_layers
    group = Supernode.of(None, features) if isinstance(features, Mapping) else features
    if pairs is None:
        sources = range(n_layers) if group is None else map(int, group.features)
        pairs = [(source, target) for source in sources for target in range(source + 1, n_layers)]
    edits = {pair: _edit(pair, group, subspace, mean, norm, position) for pair in map(tuple, pairs)}
    if not edits:
        raise EditError("there is no pair of layers to scan: a handoff needs a layer and a later one")
    effects = torch.full((n_layers, n_layers), torch.nan, dtype=torch.float64)
    settings: dict[str, Any] = {"mode": mode, "clt": clt, "freeze_attention": freeze_attention, "name": name}
    # Only this mode's run without ablation is not the model's own.
    plain = intervene(model, prompts, None, **settings).logits if mode == "replace" else None
    baseline = 0.0
    for (source, target), edit in tqdm(
        edits.items(), "handoffs", disable=not (len(edits) > FEW if bar is None else bar)
    ):
        result = intervene(model, prompts, edit, **settings)
        before = result.baseline if plain is None else plain
        if metric is None:
            effect = _divergence(before, result.logits, result.mask)
        else:
            baseline = _number(metric(before))
            effect = _number(metric(result.logits)) - baseline
        effects[source, target] = effect
    return HandoffScan(effects, baseline, _measure(metric), mode)


def _measure(metric: Any) -> str:
    called = getattr(metric, "__name__", "<")
    return "KL (nats)" if metric is None else f"change of {'the metric' if '<' in called else called}"


def _edit(pair: Any, group: Supernode | None, subspace: Any, mean: Any, norm: str, position: Any) -> Edit:
    """Return one pair's edit, with its own share of the features and means."""
    features: Any = None
    if group is not None:
        label = str(pair[0])
        if label not in group.features:
            raise EditError(f"source {label} has no features: give it some, or leave its pairs out")
        chosen, strengths = Ablate(group, mean).at(label)
        features, mean = {pair[0]: chosen}, strengths["mean"]
    elif isinstance(mean, Mapping):
        mean = {pair[0]: mean[pair[0]]} if pair[0] in mean else mean
    baseline = "zero" if mean is None else "mean"
    edit = ablate_handoff(pairs=[pair], features=features, subspace=subspace, baseline=baseline, mean=mean, norm=norm)
    return edit if position is None else only(edit, position=position)


def _divergence(before: Tensor, after: Tensor, mask: Tensor | None) -> float:
    """Return the divergence of each row's last prediction, averaged over rows."""
    rows = torch.arange(len(before), device=before.device)
    last = torch.full_like(rows, before.shape[1] - 1)
    if mask is not None:
        # Padding may be on either side.
        last = torch.where(mask.bool(), torch.arange(mask.shape[1], device=mask.device), 0).amax(-1).to(rows.device)
    p, q = (F.log_softmax(x[rows, last].detach().double(), dim=-1) for x in (before, after))
    return float((p.exp() * (p - q)).sum(-1).mean())


def _number(value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise EditError(f"metric returns one number, not a tensor of shape {tuple(value.shape)}: average it over rows")
    return float(value.detach()) if isinstance(value, Tensor) else float(value)
