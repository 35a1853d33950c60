"""The handoffs that a model depends on, and whether its replacement model depends on the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from clt_plugin.analysis.faithfulness._texts import fitting, several, show
from clt_plugin.interventions.handoff_scan import HandoffScan, handoff_scan

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Handoffs:
    """What ablating the handoff of every pair of layers does, in a model and in its replacement models.

    Attributes:
        scans: By where: ``"model"``, ``"clt"`` and ``"plt"``.
        prompts: The prompts.
    """

    scans: Mapping[str, HandoffScan]
    prompts: Sequence[str]

    @property
    def table(self) -> pd.DataFrame:
        """One row a pair: source, target, and the effect in each."""
        first, *others = ((name, scan.to_pandas()) for name, scan in self.scans.items())
        table = first[1].rename(columns={"effect": first[0]})
        for name, other in others:
            table = table.merge(other.rename(columns={"effect": name}), on=["source", "target"])
        return table

    def plot(self) -> Figure:
        """Draw the effects as heat maps side by side."""
        from clt_plugin.report.faithfulness import plot_handoff_maps

        return plot_handoff_maps({name: scan.effects for name, scan in self.scans.items()}, len(self.prompts))


def handoffs(
    model: Any, prompts: Iterable[Any], clt: Any = None, plt: Any = None, *, bar: bool | None = None, **settings: Any
) -> Handoffs:
    """Ablate the handoff between every two layers, in the model and in its replacement models, and measure the KL.

    What layer A's MLP wrote is taken out of what layer B's MLP reads, and of nothing else (`ablate_handoff`). Where B
    computes from A's output the prediction moves: a multi-step circuit. A replacement model that reconstructs B from
    earlier latents depends on fewer handoffs than the model does: the sign that it skips steps (the study of unfaithful
    circuits, "Detection and mitigation").

    Args:
        model: An nnsight model, a TransformerBridge, or a transformers model.
        prompts: Texts, or token ids (position,).
        clt: A crosscoder, whose replacement model (``mode="replace"``) is scanned too.
        plt: Per-layer transcoders, likewise.
        bar: As for `handoff_scan`.
        **settings: Of `handoff_scan`, such as ``pairs`` or ``norm``.
    """
    chosen = several(prompts)
    scans = {"model": scanned(model, chosen, mode="iterative", bar=bar, **settings)}
    for name, each in (("clt", clt), ("plt", plt)):
        if each is not None:
            scans[name] = scanned(model, chosen, clt=fitting(model, each), mode="replace", bar=bar, **settings)
    return Handoffs(scans, [show(prompt) for prompt in chosen])


def scanned(model: Any, prompts: Sequence[Any], **settings: Any) -> HandoffScan:
    """Return `handoff_scan` over prompts, the mean over all: texts as one batch, token ids as one for each length."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    rows = [torch.as_tensor(prompt).flatten() for prompt in prompts if not isinstance(prompt, str)]
    alike = [[row for row in rows if len(row) == length] for length in sorted({len(row) for row in rows})]
    batches: list[tuple[Any, int]] = [(texts, len(texts))] if texts else []
    batches += [(torch.stack(some), len(some)) for some in alike]
    scans = [(handoff_scan(model, batch, **settings), n) for batch, n in batches]
    effects = torch.stack([scan.effects * n for scan, n in scans]).sum(0) / len(prompts)
    return replace(scans[0][0], effects=effects)
