"""All edges of a graph, or those between the most influential features: which direction, in which chunks, where.

For S sources and T targets both directions give the same (T, S) matrix. A pushed source costs a sweep over the layers
and positions after its own, a pulled target one over those before; a pulled target besides meets every write of every
source, where a pushed source meets every target once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clt_plugin.attribution import pull as pulling
from clt_plugin.attribution import push as pushing
from clt_plugin.attribution.linear import FrozenMap
from clt_plugin.attribution.local import LocalReplacement
from clt_plugin.attribution.readings import Readings
from clt_plugin.attribution.sources import Sources

SHORT = 2e11
"""Work of fewer flops, a few seconds on a small machine, needs no progress bar."""


@dataclass(frozen=True, eq=False)
class Edges:
    """The edges into some features and all targets.

    Attributes:
        block: (features kept + targets, features kept + errors + embeddings + bias).
        values: Each row's value in the recorded run.
        sums: Each row's sum over all sources, those left out included.
        absolute: Each row's sum of absolute edges over all sources.
        nodes: Which of the active features were kept, ascending.
    """

    block: Tensor
    values: Tensor
    sums: Tensor
    absolute: Tensor
    nodes: Tensor

    def residuals(self) -> Tensor:
        """Return how far each row's sum is from its value, relative to its absolute sum."""
        apart = (self.sums - self.values).abs()
        # A row without any input has the value 0, and is right if it is exactly that.
        return torch.where(self.absolute > 0, apart / self.absolute, torch.where(apart > 0, torch.inf, 0.0))

    def omitted(self) -> Tensor:
        """Return what each row gets from features that were left out."""
        return self.sums - self.block.sum(1)

    def adjacency(self, n_targets: int, bias: bool) -> tuple[Tensor, Tensor]:
        """Return the graph's adjacency, on the CPU, and which of all nodes are in it, (N,) of bool.

        Args:
            n_targets: How many of the rows, the last, are targets.
            bias: Whether the bias is a node.
        """
        n_sources, n_features = self.block.shape[1], len(self.nodes)
        columns = n_sources if bias else n_sources - 1
        n = columns + n_targets
        whole = torch.zeros(n, n, dtype=self.block.dtype)
        whole[:n_features, :columns] = self.block[:n_features, :columns].cpu()
        whole[columns:, :columns] = self.block[n_features:, :columns].cpu()
        kept = torch.ones(n_sources + n_targets, dtype=torch.bool)
        kept[n_sources - 1] = bias
        return whole, kept


def all_edges(
    local: LocalReplacement,
    targets: Readings,
    *,
    direction: str = "auto",
    devices: Sequence[Any] | None = None,
    bar: bool | None = None,
) -> Edges:
    """Find every edge.

    Args:
        local: The local replacement model.
        targets: The targets.
        direction: ``"push"``, ``"pull"`` or ``"auto"``.
        devices: Where to work; the model's own by default.
        bar: Whether to show progress.
    """
    frozen, sources = local.frozen, local.sources
    readings = Readings.join([local.readings(), targets])
    costs = {"push": push_flops(frozen, sources, readings), "pull": pull_flops(frozen, sources, readings)}
    if direction == "auto":
        direction = min(costs, key=lambda way: costs[way])
    block = torch.empty(len(readings), len(sources), dtype=frozen.dtype, device=frozen.device)
    if direction == "push":
        step: Callable[..., Tensor] = pushing.push
        parts = list(pushing.chunks(sources, frozen.d_model, _elements(frozen, pushing.CHUNK_ELEMENTS)))
    else:
        step = pulling.pull
        parts = _pulled_chunks(local, readings)
    for nodes, found in _shared(step, local, readings, parts, devices, _wants_bar(bar, costs[direction])):
        if direction == "push":
            block[:, nodes] = found
        else:
            block[nodes] = found
    every = torch.arange(len(sources.features), device=frozen.device)
    return Edges(block, readings.values, block.sum(1), _absolute_sums(block), every)


def chosen_edges(
    local: LocalReplacement,
    targets: Readings,
    weights: Sequence[float],
    budget: int,
    *,
    direction: str = "auto",
    devices: Sequence[Any] | None = None,
    bar: bool | None = None,
) -> Edges:
    """Find the edges between the most influential features.

    Targets are pulled, the features that influence them most are pulled as well, and so on in rounds that double the
    number of features, until the budget is spent. In each round the influence of every active feature is exact for
    the rows pulled so far: they are pulled in the order in which influence flows, so that only a vector is kept over
    rounds, and of the last round's rows only the columns that stay.

    Args:
        local: The local replacement model.
        targets: The targets.
        weights: Each target's share in influence.
        budget: How many features to keep.
        direction: ``"auto"`` or ``"pull"``: pushing would take every feature.
        devices: Where to work; the model's own by default.
        bar: Whether to show progress.
    """
    frozen, sources = local.frozen, local.sources
    n = len(sources.features)
    sizes = _rounds(n, budget)
    one = pull_flops(frozen, sources, local.readings(torch.arange(min(n, 256), device=frozen.device))) / min(n, 256)
    shown = _wants_bar(bar, one * (sum(sizes) + budget))
    chosen = torch.empty(0, dtype=torch.long, device=frozen.device)
    for size in sizes:
        influence = _influence(local, targets, weights, chosen, devices, shown)
        # Features in the order of the table where influence is equal, none twice, and none without any.
        chosen = torch.argsort(influence, descending=True, stable=True)[:size]
    chosen = chosen[:budget].sort().values
    readings = Readings.join([local.readings(chosen), targets])
    kept = torch.cat((chosen, torch.arange(n, len(sources), device=frozen.device)))
    block = torch.empty(len(readings), len(kept), dtype=frozen.dtype, device=frozen.device)
    sums, absolute = torch.empty_like(readings.values), torch.empty_like(readings.values)
    for rows, found in _shared(pulling.pull, local, readings, _pulled_chunks(local, readings), devices, shown):
        block[rows], sums[rows], absolute[rows] = found[:, kept], found.sum(1), found.abs().sum(1)
    return Edges(block, readings.values, sums, absolute, chosen)


def _rounds(n: int, budget: int) -> list[int]:
    """Return how many features are chosen after each round, the budget at last."""
    if n <= 2 * budget:
        # Pulling them all, once, costs as much as the rounds, and their influence is that of the whole graph.
        return [n, budget]
    sizes = [budget]
    while sizes[0] > 64 and len(sizes) < 5:
        sizes.insert(0, -(-sizes[0] // 2))
    return sizes


def _influence(
    local: LocalReplacement,
    targets: Readings,
    weights: Sequence[float],
    chosen: Tensor,
    devices: Sequence[Any] | None,
    bar: bool,
) -> Tensor:
    """Return every active feature's influence on the targets, through the features chosen so far, (features,)."""
    frozen, sources = local.frozen, local.sources
    n, device = len(sources.features), frozen.device
    readings = Readings.join([local.readings(chosen), targets])
    # Influence that has reached each row: a target's own weight, and what later rows hand down.
    reached = torch.zeros(n, dtype=torch.float64, device=device)
    shares = torch.tensor(weights, dtype=torch.float64, device=device)
    shares = shares / shares.sum() if bool(shares.sum() > 0) else shares
    for rows, found in _shared(pulling.pull, local, readings, _pulled_chunks(local, readings), devices, bar):
        inputs = found[:, : sources.bias].abs().double()
        inputs = inputs / inputs.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        of_feature = rows < len(chosen)
        start = torch.where(of_feature, 0.0, shares[(rows - len(chosen)).clamp(min=0)])
        start[of_feature] = reached[chosen[rows[of_feature]]]
        reached += start @ inputs[:, :n]
    return reached


# ---------------------------------------------------------------- who works, and what it costs


def _shared(
    step: Callable[..., Tensor],
    local: LocalReplacement,
    readings: Readings,
    parts: Sequence[Tensor],
    devices: Sequence[Any] | None,
    bar: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Work through chunks, on several devices side by side; return each with its edges, in their order."""
    from tqdm.auto import tqdm

    home = local.frozen.device
    places = [torch.device(device) for device in devices or [home]]
    copies = {place: (local.to(place), readings.to(place)) for place in dict.fromkeys(places)}

    def work(number: int) -> Tensor:
        place = places[number % len(places)]
        here, reads = copies[place]
        with torch.no_grad():
            return step(here.frozen, here.sources, reads, parts[number].to(place)).to(home)

    with tqdm(total=sum(map(len, parts)), desc="edges", disable=not bar) as progress:
        if len(places) == 1:
            results: Iterator[Tensor] = map(work, range(len(parts)))
            yield from _counted(parts, results, progress)
            return
        with ThreadPoolExecutor(len(places)) as pool:
            # As many at a time as there are devices, so that what is found does not pile up.
            waiting = [pool.submit(work, number) for number in range(min(len(places), len(parts)))]
            for number in range(len(parts)):
                found = waiting.pop(0).result()
                if number + len(places) < len(parts):
                    waiting.append(pool.submit(work, number + len(places)))
                yield from _counted(parts[number : number + 1], iter([found]), progress)


def _pulled_chunks(local: LocalReplacement, readings: Readings) -> list[Tensor]:
    elements = _elements(local.frozen, pulling.CHUNK_ELEMENTS)
    return list(pulling.chunks(readings, local.frozen.d_model, len(local.sources), elements))


def _elements(frozen: FrozenMap, elements: int) -> int:
    """Return how large a chunk may be: other devices than the CPU want more work at a time."""
    return elements if frozen.device.type == "cpu" else 32 * elements


def _counted(parts: Sequence[Tensor], results: Iterator[Tensor], progress: Any) -> Iterator[tuple[Tensor, Tensor]]:
    for part, found in zip(parts, results, strict=True):
        yield part, found
        progress.update(len(part))


def _wants_bar(bar: bool | None, flops: float) -> bool:
    return flops > SHORT if bar is None else bar


def _absolute_sums(block: Tensor) -> Tensor:
    # By rows, so that no second matrix of that size is made.
    return torch.cat([part.abs().sum(1) for part in block.split(256)])


def push_flops(frozen: FrozenMap, sources: Sources, readings: Readings) -> float:
    """Return about how many floating-point operations pushing all sources takes."""
    after = (frozen.n_positions - sources.position).double()
    layers = (frozen.n_layers - 1 - sources.birth).double()
    return float((layers * _sweep(frozen, after)).sum()) + len(sources) * len(readings) * frozen.d_model


def pull_flops(frozen: FrozenMap, sources: Sources, readings: Readings) -> float:
    """Return about how many floating-point operations pulling all targets takes."""
    before, layers = (readings.positions + 1).double(), (readings.last_layer + 1).double()
    # Every layer's writes are met by the targets above it: about as many as can see half of them.
    above = [float((readings.last_layer > layer).sum()) for layer in range(frozen.n_layers)]
    writes = sum(len(sources.writing(layer)) * n for layer, n in enumerate(above))
    return float((layers * _sweep(frozen, before)).sum()) + writes * frozen.d_model


def _sweep(frozen: FrozenMap, positions: Tensor) -> Tensor:
    """Return what carrying one row through one layer's attention costs, over so many positions."""
    step = frozen.layers[0]
    values, outputs = step.W_V[0].numel(), step.W_O[..., 0].numel()
    return 2 * positions * (frozen.d_model * (values + outputs) + positions * outputs)
