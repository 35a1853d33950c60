"""Does ablating a feature change the head or neuron that it points at, more than ablating another feature does?

The second validation that "Cross-Layer Connections in Cross-Layer Transcoders: An Empirical Investigation" asks of its
targeting scans: the causal one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clt_plugin.adapters.huggingface import HostModel, check_fits, plain_model
from clt_plugin.analysis.studies import STUDIES, Study
from clt_plugin.analysis.weights import _readers
from clt_plugin.analysis.weights._activity import Activity
from clt_plugin.analysis.weights._blocks import read_block, shown
from clt_plugin.analysis.weights.coactivation import Pair, interval_of_mean, strongest_pairs
from clt_plugin.analysis.weights.targeted import Targeting
from clt_plugin.analysis.weights.targeting import attention_targeting
from clt_plugin.attribution.corpus.stream import Seen, stream
from clt_plugin.core.crosscoder import Crosscoder

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class TargetingEffect:
    """What ablating features does to the heads or neurons that they point at.

    Attributes:
        kind: ``"head"`` or ``"neuron"``.
        table: One row a pair: the feature, the unit, ``standard`` (how strongly it points there), at how many
            ``places`` it was ablated; ``effect``, by how much that changed the unit there, on average, and
            ``control``, the same for features of the same layer that were ablated in its stead; what the two write to
            the layers before the unit, ``size`` and ``control_size``, which controls are matched by; of neurons
            ``as_foretold``, the share of places where the change has the sign that weights foretell.
        log2_ratio: The mean over pairs of log2 of effect over control, each divided by the size of what was written,
            with a 95% interval by bootstrap over pairs; 0 where pointing at a unit makes no difference.
        silent: How many pairs were left out: no token has their feature and another one active.
    """

    kind: str
    table: pd.DataFrame
    log2_ratio: tuple[float, float, float]
    silent: int

    def plot(self) -> Figure:
        """Draw each pair's effect beside its control's."""
        from clt_plugin.report.targeting import plot_beside

        label = "relative change of the query" if self.kind == "head" else "change of the pre-activation"
        return plot_beside(self.table, self.log2_ratio, f"{label} when ablated", log=True)

    def __str__(self) -> str:
        mean, low, high = self.log2_ratio
        return (
            f"{len(self.table)} pairs ({self.silent} silent): ablating the feature changes its {self.kind} "
            f"{2**mean:.2f} times as much as ablating another of its size ({2**low:.2f} to {2**high:.2f})"
        )


def targeting_effect(
    clt: Crosscoder,
    model: Any,
    texts: Iterable[Any],
    targeting: Targeting | None = None,
    *,
    null: str | None = None,
    k: int = 20,
    places: int = 4,
    batch_size: int = 8,
    max_tokens: int = 64,
    seed: int = 0,
    bar: bool | None = None,
) -> TargetingEffect:
    """Ablate features that point at heads or neurons, where they are most active, and measure those units.

    Each feature is ablated at one token at a time by `clt_plugin.intervene` with ``mode="iterative"``: all of its
    writes go, and what comes between responds. Measured at that token is ``|q' - q| / |q|`` for a head's query (key,
    value), ``|h' - h|`` for a neuron's pre-activation. The control at each token is the feature of the same layer,
    active there too, whose write is nearest in size, ``|a * sum of its decoder vectors that the unit's layer sees|``:
    of two writes as large, does the one that points at the unit change it more?

    Args:
        clt: The crosscoder.
        model: An nnsight model, a TransformerBridge, or a transformers model.
        texts: Texts, or token ids (position,); read once.
        targeting: A scan of this crosscoder and model; by default that of heads' queries.
        null: Against which null the pairs are strongest; by default the scan's first.
        k: How many pairs.
        places: At how many tokens each feature is ablated.
        batch_size: How many texts run at a time.
        max_tokens: Longer texts are cut into pieces of so many tokens: each ablation runs one.
        seed: Of the bootstrap.
        bar: Whether to show progress; by default on a terminal.

    Raises:
        ValueError: The scan found nothing.
        AttachError: The crosscoder does not fit the model.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    targeting = targeting or attention_targeting(clt, model, bar=bar)
    pairs = strongest_pairs(targeting, clt, null, k)
    best: list[list[_Place]] = [[] for _ in pairs]
    rows = []
    with plain_model(model) as hf, torch.no_grad():
        host = check_fits(clt, hf, "observe")
        for seen in stream(model, hf, host, clt, texts, batch_size, max_tokens, True, shown(bar)):
            for pair, found in zip(pairs, best, strict=True):
                _add_places(seen, pair, found, places)
        sizes = _Sizes(clt, hf, host, targeting.kind)
        with Activity(hf, host, targeting.kind, targeting.part, [pair.layer for pair in pairs]) as activity:
            work = list(zip(pairs, best, strict=True))
            for pair, found in tqdm(work, "ablations", disable=not shown(bar)):
                row = _measured(clt, hf, pair, found, sizes, activity)
                if row is not None:
                    rows.append(row)
    names = ["group", "feature", "layer", targeting.kind, "standard", "places", "effect", "control", "size"]
    table = pd.DataFrame(rows, columns=[*names, "control_size", "as_foretold"])
    if targeting.kind == "head":
        table = table.drop(columns="as_foretold")
    # Matches are never perfect: what is left of a difference in size is divided out.
    both = table[(table[["effect", "control", "size", "control_size"]] > 0).all(axis=1)]
    ratio = (both["effect"] / both["size"]) / (both["control"] / both["control_size"])
    ratios = torch.tensor(ratio.to_numpy(dtype=float)).log2()
    return TargetingEffect(targeting.kind, table, interval_of_mean(ratios, seed), len(pairs) - len(rows))


@dataclass(frozen=True, eq=False)
class _Place:
    """A token at which a feature is active.

    Attributes:
        value: Its activation.
        ids: The text up to and with that token, (position,).
        latents: The features of its group that are active there, (n,).
        values: Their activations.
    """

    value: float
    ids: Tensor
    latents: Tensor
    values: Tensor


def _add_places(seen: Seen, pair: Pair, found: list[_Place], places: int) -> None:
    """Keep the tokens at which a pair's feature is most active, among those with another active feature."""
    group = seen.active[pair.group]
    latents, tokens, values = group.latents.cpu(), group.tokens.cpu(), group.values.detach().cpu()
    mine = (latents == pair.feature).nonzero()[:, 0]
    where = seen.counted.cpu().nonzero()
    for at in mine[values[mine].argsort(descending=True)][:places].tolist():
        value, token = float(values[at]), tokens[at]
        here = tokens == token
        if int(here.sum()) < 2 or (len(found) == places and value <= found[-1].value):
            continue
        row, position = where[token].tolist()
        found.append(_Place(value, seen.ids[row, : position + 1].cpu(), latents[here], values[here]))
        found.sort(key=lambda place: -place.value)
        del found[places:]


class _Sizes:
    """How large features' writes to the layers before a unit are.

    Args:
        clt: The crosscoder.
        hf: The plain model.
        host: What it is.
        kind: ``"head"`` or ``"neuron"``.
    """

    def __init__(self, clt: Crosscoder, hf: nn.Module, host: HostModel, kind: str) -> None:
        self.clt = clt
        like = torch.zeros(1, dtype=torch.float32, device=clt.device)
        self.through = _readers.to_stream(clt, hf, host, like)
        units = _readers.Units(kind, (), 1, ())
        self.first = {site: units.first_after(site, host.parallel) for site in clt.wiring.write_sites}

    def of(self, group: int, layer: int, latents: Tensor, values: Tensor) -> Tensor:
        """Return the norm of what some latents at some activations add to what a layer reads, (n,)."""
        written = read_block(self.clt, group, latents.to(self.clt.device)).vectors
        seen = [
            self.through(site, vectors)
            for site, vectors in written.items()
            if site.name in _readers.ADDED and self.first[site] <= layer
        ]
        return torch.stack(seen).sum(0).norm(dim=1).cpu() * values if seen else torch.zeros(len(latents))


def _measured(
    clt: Crosscoder, hf: nn.Module, pair: Pair, found: list[_Place], sizes: _Sizes, activity: Activity
) -> tuple[Any, ...] | None:
    """Ablate a pair's feature and its controls at each place; return the pair's row."""
    if not found:
        return None
    chosen, own, beside = [], [], []
    for place in found:
        size = sizes.of(pair.group, pair.layer, place.latents, place.values)
        mine = int((place.latents == pair.feature).nonzero()[0, 0])
        far = torch.where(size > 0, (size.log() - size[mine].log()).abs(), torch.inf)
        far[mine] = torch.inf
        other = int(far.argmin())
        chosen.append(int(place.latents[other]))
        own.append(float(size[mine]))
        beside.append(float(size[other]))
    before, after = _runs(clt, hf, pair, [place.ids for place in found], chosen, activity)
    change = after - before
    n = len(found)
    if activity.units is None:
        effects = change[:, 0].abs()
        foretold = float((change[:n, 0] * pair.sign < 0).double().mean())
    else:
        effects, foretold = change.norm(dim=1) / before.norm(dim=1).clamp_min(1e-30), float("nan")
    who = (pair.label, pair.feature, pair.layer, pair.unit, pair.standard, n)
    effect, control = float(effects[:n].mean()), float(effects[n:].mean())
    return (*who, effect, control, sum(own) / n, sum(beside) / n, foretold)


def _runs(
    clt: Crosscoder, hf: nn.Module, pair: Pair, texts: list[Tensor], controls: list[int], activity: Activity
) -> tuple[Tensor, Tensor]:
    """Return what a unit takes in at each text's last token, before and after ablations, (2 texts, width) each.

    The first half has the pair's feature ablated, the second the controls.
    """
    from clt_plugin.interventions import ablate, chain, intervene, only

    n, longest = len(texts), max(map(len, texts))
    ids = torch.stack([torch.nn.functional.pad(text, (longest - len(text), 0)) for text in texts]).repeat(2, 1)
    lengths = torch.tensor([len(text) for text in texts]).repeat(2)
    mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
    edits = [only(ablate(layer=pair.label, feature=pair.feature), position=-1, batch=list(range(n)))]
    for feature in dict.fromkeys(controls):
        rows = [n + i for i, each in enumerate(controls) if each == feature]
        edits.append(only(ablate(layer=pair.label, feature=feature), position=-1, batch=rows))
    activity.forget()
    intervene(hf, {"input_ids": ids, "attention_mask": mask}, chain(*edits), mode="iterative", clt=clt)
    before, after = (run[:, -1].double().cpu() for run in activity.runs(pair.layer, pair.unit))
    activity.forget()
    return before, after


STUDIES.add(
    "targeting-effect",
    Study(
        targeting_effect,
        ("clt", "model", "texts"),
        "does ablating a feature change the head that it points at",
        {"null": str, "k": int, "places": int, "seed": int},
    ),
)
