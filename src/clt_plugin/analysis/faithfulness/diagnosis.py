"""Cross-layer superposition, or a circuit of several steps? What features write over layers, and what layers do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clt_plugin.analysis.faithfulness._texts import batches, fitting, on_terminal, several, show
from clt_plugin.analysis.faithfulness.handoff_maps import scanned
from clt_plugin.analysis.faithfulness.profile import l0_profile
from clt_plugin.core import Crosscoder

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What tells cross-layer superposition from a circuit of several steps.

    Attributes:
        directions: One row a pair of layers A < B: of the features at home in A that are active, each weighted by the
            squared norm of what it writes at B, the mean ``cosine`` of what it writes at A and at B, the share whose
            cosine is above 0.7 (``one_direction``) and below 0.3 in magnitude (``orthogonal``); ``features``, how many;
            and ``handoff``, the KL where B's MLP does not see what A's wrote, in nats.
        layers: One row a layer: ``l0``; ``all_neurons`` and ``top_neurons``, the KL where all of its MLP's neurons, or
            the strongest few, are set to 0, in nats.
        n_neurons: How many of the strongest.
        prompts: The prompts.
    """

    directions: pd.DataFrame
    layers: pd.DataFrame
    n_neurons: int
    prompts: Sequence[str]

    @property
    def table(self) -> pd.DataFrame:
        """The table of pairs of layers."""
        return self.directions

    def silent(self, l0: float = 0.5, kl: float = 0.1) -> list[int]:
        """Return the layers with hardly a latent whose neurons matter: a strong sign that steps are skipped.

        Args:
            l0: Layers with at most so many active latents a token.
            kl: Whose neurons, set to 0, move the prediction at least so far, in nats.
        """
        found = (self.layers["l0"] <= l0) & (self.layers["all_neurons"] >= kl)
        return self.layers["layer"][found].tolist()

    def plot(self) -> Figure:
        """Draw directions and handoffs by pair of layers, and L0 beside what neurons do by layer."""
        from clt_plugin.report.faithfulness_circuits import plot_diagnosis

        return plot_diagnosis(self.directions, self.layers, self.n_neurons)


def superposition_or_steps(
    model: Any, clt: Any, prompts: Iterable[Any], *, n_neurons: int = 8, bar: bool | None = None
) -> Diagnosis:
    """Ask of a CLT whether what it writes over several layers is one feature kept up, or steps that it skips.

    Three signs (the study of unfaithful circuits, "Crosslayer superposition vs multi-step circuits" and "Detection
    approaches"). Where layers share the work on one feature, it is written in one direction at A and at B; writes that
    are orthogonal are of another feature, which B computes. Where B computes from what A wrote, ablating the handoff
    moves the prediction. And a layer that has hardly a latent, but neurons that matter, was skipped.

    Args:
        model: An nnsight model, a TransformerBridge, or a transformers model.
        clt: A crosscoder that writes MLP outputs, or a reference.
        prompts: Texts, or token ids (position,).
        n_neurons: How many of each layer's strongest neurons to set to 0 together: those of largest mean of
            ``|activation| * norm of output weights`` over the prompts.
        bar: Whether to show progress; by default on a terminal.
    """
    import pandas as pd

    crosscoder, chosen = fitting(model, clt), several(prompts)
    rows = _directions(crosscoder, _squares(model, crosscoder, chosen))
    if rows:
        effects = scanned(model, chosen, pairs=[row[:2] for row in rows], bar=bar).effects
        rows = [(*row, float(effects[row[0], row[1]])) for row in rows]
    columns = ["source", "target", "cosine", "one_direction", "orthogonal", "features", "handoff"]
    counts = l0_profile(crosscoder, model, chosen, bar=False).l0["clt"]
    whole, top = _neurons(model, chosen, n_neurons, bar)
    layers = pd.DataFrame({"layer": sorted(whole), "l0": [counts.get(layer, 0.0) for layer in sorted(whole)]})
    layers = layers.assign(all_neurons=layers["layer"].map(whole), top_neurons=layers["layer"].map(top))
    return Diagnosis(pd.DataFrame(rows, columns=columns), layers, n_neurons, [show(prompt) for prompt in chosen])


# ---------------------------------------------------------------- directions


def _squares(model: Any, crosscoder: Crosscoder, prompts: Sequence[Any]) -> dict[int, Tensor]:
    """Return the sum over tokens of each latent's squared activation, by group."""
    sums = {g: torch.zeros(n, dtype=torch.float64) for g, n in enumerate(crosscoder.group_sizes)}
    for seen in batches(model, crosscoder, prompts, bar=False):
        for g, group in seen.active.items():
            sums[g].index_add_(0, group.latents.cpu(), group.values.cpu().double().square())
    return sums


def _directions(crosscoder: Crosscoder, squares: dict[int, Tensor]) -> list[tuple[Any, ...]]:
    """Return for each pair of a group's home layer and a later layer how alike its writes are there."""
    rows = []
    for g, home in enumerate(crosscoder.wiring.home):
        latents = squares[g].nonzero().flatten()
        decoder = crosscoder.decoder_vectors(g, latents).double().cpu()
        slices = {site.layer: columns for site, columns in crosscoder.layout.write_slices[g].items()}
        if home not in slices or not len(latents):
            continue
        own = decoder[:, slices[home]]
        for layer, columns in slices.items():
            if layer == home:
                continue
            there = decoder[:, columns]
            cosine = F.cosine_similarity(own, there, dim=1)
            weight = squares[g][latents] * there.square().sum(1)
            weight = weight / weight.sum()
            one, apart = (weight[cosine > 0.7].sum(), weight[cosine.abs() < 0.3].sum())
            rows.append((home, layer, float(weight @ cosine), float(one), float(apart), len(latents)))
    return rows


# ---------------------------------------------------------------- neurons


def _neurons(model: Any, prompts: Sequence[Any], n: int, bar: bool | None) -> tuple[dict[int, float], dict[int, float]]:
    """Return by layer the mean KL of the last prediction without its MLP's neurons, and without the strongest."""
    from tqdm.auto import tqdm

    from clt_plugin.adapters.huggingface import HostModel, plain_model
    from clt_plugin.interventions.modes import read_prompt

    whole: dict[int, float] = {}
    top: dict[int, float] = {}
    with plain_model(model) as hf, torch.no_grad():
        host = HostModel.of(hf)
        device = next(hf.parameters()).device
        inputs = [read_prompt(model, prompt)[0] for prompt in prompts]
        runs = [{key: each.to(device) if isinstance(each, Tensor) else each for key, each in x.items()} for x in inputs]
        outputs = [_output_of(block.get_submodule(host.architecture.mlp)) for block in hf.get_submodule(host.blocks)]  # type: ignore[attr-defined,operator]
        strength = [torch.zeros(()) for _ in outputs]
        own = []
        with _watched(outputs, strength):
            own = [_last(hf, run) for run in runs]
        for layer in tqdm(range(len(outputs)), "layers' neurons", disable=not on_terminal(bar)):
            chosen = strength[layer].topk(min(n, len(strength[layer]))).indices
            for found, some in ((whole, None), (top, chosen)):
                with _silenced(outputs[layer], some):
                    kls = [_kl(before, _last(hf, run)) for before, run in zip(own, runs, strict=True)]
                found[layer] = sum(kls) / len(kls)
    return whole, top


def _output_of(mlp: nn.Module) -> nn.Module:
    """Return the module of an MLP that reads its neurons: the last one with a matrix."""
    matrices = [each for each in mlp.modules() if getattr(getattr(each, "weight", None), "ndim", 0) == 2]
    if not matrices:
        raise ValueError(f"{type(mlp).__name__} has no module that reads its neurons: neurons cannot be silenced there")
    return matrices[-1]


@contextmanager
def _watched(outputs: Sequence[nn.Module], strength: list[Tensor]) -> Iterator[None]:
    """Add up, for each layer, how strongly its neurons write."""

    def watch(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x: Tensor = args[0]
            weight: Any = module.weight
            # Linear keeps (out, in), GPT-2's Conv1D (in, out).
            norms = weight.norm(dim=0 if isinstance(module, nn.Linear) else 1)
            strength[layer] = strength[layer].to(x.device) + (x.abs() * norms).flatten(0, -2).double().sum(0)

        return hook

    handles = [module.register_forward_pre_hook(watch(layer)) for layer, module in enumerate(outputs)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _silenced(module: nn.Module, neurons: Tensor | None) -> Iterator[None]:
    """Set neurons, or all of them, to 0 before the module that reads them."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        silent = torch.zeros_like(x) if neurons is None else x.index_fill(-1, neurons, 0)
        return (silent, *args[1:])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _last(hf: Any, inputs: dict[str, Any]) -> Tensor:
    return F.log_softmax(hf(**{**inputs, "use_cache": False}).logits[0, -1].double(), dim=-1)


def _kl(before: Tensor, after: Tensor) -> float:
    return float((before.exp() * (before - after)).sum())
