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

from clt_plugin.attribution.engine import pull as pulling
from clt_plugin.attribution.engine import push as pushing
from clt_plugin.attribution.engine.linear import FrozenMap
from clt_plugin.attribution.engine.local import LocalReplacement
from clt_plugin.attribution.engine.readings import Readings, order_of
from clt_plugin.attribution.engine.sources import Sources

SHORT = 2e11
"""Work of fewer flops, a few seconds on a small machine, needs no progress bar."""


@dataclass(frozen=True, eq=False)
class Edges:
    """The edges into some features and all targets, in the adjacency of their graph.

    Rows are what edges go into: the features kept, then the targets, R in all.

    Attributes:
        whole: (N, N), for the features kept, errors, embeddings, the bias where it is a node, and targets.
        bias: Each row's edge from the bias, (R,).
        has_bias: Whether the bias is a node of the whole.
        values: Each row's value in the recorded run.
        sums: Each row's sum over all sources, those left out included.
        absolute: Each row's sum of absolute edges over all sources.
        kept: Each row's sum over the sources kept, the bias included.
        nodes: Which of the active features were kept, ascending.
    """

    whole: Tensor
    bias: Tensor
    has_bias: bool
    values: Tensor
    sums: Tensor
    absolute: Tensor
    kept: Tensor
    nodes: Tensor

    @property
    def block(self) -> Tensor:
        """The edges into all rows from the features kept, errors, embeddings and the bias, (R, S): a copy."""
        n = len(self.whole) - (len(self.values) - len(self.nodes)) - self.has_bias
        tables = _tables(self.whole, len(self.nodes), len(self.values))
        return torch.cat((torch.cat([table[:, :n] for table in tables]), self.bias[:, None]), dim=1)

    def effects(self, weights: Tensor) -> Tensor:
        """Return what some sources together do to each row, without a copy of the edges.

        Args:
            weights: How often each source counts, for the features kept, errors and embeddings, (k, sources).

        Returns:
            (k, R).
        """
        tables = _tables(self.whole, len(self.nodes), len(self.values))
        return torch.cat([weights @ table[:, : weights.shape[1]].T for table in tables], dim=1)

    def residuals(self) -> Tensor:
        """Return how far each row's sum is from its value, relative to its absolute sum."""
        apart = (self.sums - self.values).abs()
        # A row without any input has the value 0, and is right if it is exactly that.
        return torch.where(self.absolute > 0, apart / self.absolute, torch.where(apart > 0, torch.inf, 0.0))

    def omitted(self) -> Tensor:
        """Return what each row gets from features that were left out."""
        return self.sums - self.kept

    def adjacency(self, n_targets: int, bias: bool) -> tuple[Tensor, Tensor]:
        """Return the graph's adjacency, on the CPU, and which of all nodes are in it, (N,) of bool.

        Args:
            n_targets: How many of the rows, the last, are targets.
            bias: Whether the bias is to be a node: as the edges were found, or no longer, which takes a copy.
        """
        n = len(self.whole) + (not self.has_bias)
        kept = torch.ones(n, dtype=torch.bool)
        kept[n - n_targets - 1] = bias
        if bias == self.has_bias:
            return self.whole.cpu(), kept
        assert self.has_bias
        stay = kept.to(self.whole.device)
        return self.whole[stay][:, stay].cpu(), kept


def _tables(whole: Tensor, n_features: int, n_rows: int) -> list[Tensor]:
    """Return the rows of a graph's adjacency that edges go into, of features and of targets, without a copy."""
    return [whole[:n_features], whole[len(whole) - (n_rows - n_features) :]]


def _sums(whole: Tensor, n_features: int, n_rows: int) -> tuple[Tensor, Tensor]:
    """Return those rows' sums, and their sums of absolute values, (R,)."""
    # By parts, so that no second matrix of that size is made, and each is still in the cache for the second sum.
    parts = [part for table in _tables(whole, n_features, n_rows) for part in table.split(64)]
    return torch.cat([part.sum(1) for part in parts]), torch.cat([part.abs().sum(1) for part in parts])


def all_edges(
    local: LocalReplacement,
    targets: Readings,
    *,
    bias_node: bool = True,
    direction: str = "auto",
    devices: Sequence[Any] | None = None,
    bar: bool | None = None,
) -> Edges:
    """Find every edge.

    Args:
        local: The local replacement model.
        targets: The targets.
        bias_node: Whether the graph has the bias as a node; it counts in the sums in any case.
        direction: ``"push"``, ``"pull"`` or ``"auto"``.
        devices: Where to work; the model's own by default.
        bar: Whether to show progress.
    """
    frozen, sources = local.frozen, local.sources
    features = local.readings()
    readings = Readings.join([features, targets])
    costs = {"push": push_flops(frozen, sources, readings), "pull": pull_flops(frozen, sources, readings)}
    if direction == "auto":
        direction = min(costs, key=lambda way: costs[way])
    n, shown = len(features), _wants_bar(bar, costs[direction])
    size = len(sources) - (not bias_node) + len(targets)
    whole = torch.zeros(size, size, dtype=frozen.dtype, device=frozen.device)
    tables = _tables(whole, n, len(readings))
    if direction == "pull":
        for rows, found in _pulled(local, readings, devices, shown, embeddings=False):
            _put(tables, rows, found)
    bias = _push(local, [features, targets], tables, direction == "pull", devices, shown)
    if bias_node:
        _put([table[:, sources.bias :] for table in tables], torch.arange(len(bias), device=bias.device), bias[:, None])
    sums, absolute = _sums(whole, n, len(readings))
    if not bias_node:
        sums, absolute = sums + bias, absolute + bias.abs()
    nodes = torch.arange(n, device=frozen.device)
    return Edges(whole, bias, bias_node, readings.values, sums, absolute, sums, nodes)


def _put(tables: Sequence[Tensor], rows: Tensor, found: Tensor) -> None:
    """Put edges into rows of two tables, which are numbered one after the other, and their first columns.

    Args:
        tables: The tables.
        rows: The rows, (n,).
        found: (n, columns).
    """
    is_first = rows < len(tables[0])
    for table, here, shift in ((tables[0], is_first, 0), (tables[1], ~is_first, len(tables[0]))):
        these = rows[here] - shift
        if len(these):
            part, into = found if len(these) == len(rows) else found[here], table[:, : found.shape[1]]
            first = int(these[0])
            follow = torch.equal(these, torch.arange(first, first + len(these), device=these.device))
            into[slice(first, first + len(these)) if follow else these] = part


def chosen_edges(
    local: LocalReplacement,
    targets: Readings,
    weights: Sequence[float],
    budget: int,
    *,
    bias_node: bool = True,
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
        bias_node: As for `all_edges`.
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
    # The features kept, errors, embeddings, the bias; the graph's last nodes are the targets.
    kept = torch.cat((chosen, torch.arange(n, sources.bias, device=frozen.device)))
    size = len(kept) + bias_node + len(targets)
    whole = torch.zeros(size, size, dtype=frozen.dtype, device=frozen.device)
    tables = _tables(whole, len(chosen), len(readings))
    bias = pushing.Push(frozen, sources, [readings]).bias()[0]
    sums, absolute, remain = bias.clone(), bias.abs(), bias.clone()
    for rows, found in _pulled(local, readings, devices, shown):
        sums[rows] += found.sum(1)
        absolute[rows] += found.abs().sum(1)
        found = found[:, kept]
        remain[rows] += found.sum(1)
        _put(tables, rows, found)
    if bias_node:
        _put([table[:, len(kept) :] for table in tables], torch.arange(len(bias), device=bias.device), bias[:, None])
    return Edges(whole, bias, bias_node, readings.values, sums, absolute, remain, chosen)


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
    for rows, found in _pulled(local, readings, devices, bar):
        inputs = found.abs().double()
        inputs = inputs / inputs.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        of_feature = rows < len(chosen)
        start = torch.where(of_feature, 0.0, shares[(rows - len(chosen)).clamp(min=0)])
        start[of_feature] = reached[chosen[rows[of_feature]]]
        reached += start @ inputs[:, :n]
    return reached


# ---------------------------------------------------------------- who works, and what it costs


def _push(
    local: LocalReplacement,
    readings: Sequence[Readings],
    tables: Sequence[Tensor],
    only_embeddings: bool,
    devices: Sequence[Any] | None,
    bar: bool,
) -> Tensor:
    """Push every source, or the embeddings; write the edges into the tables' first columns, and return the bias's."""

    def prepare(place: torch.device) -> Callable[[pushing.Chunk], None]:
        here = local.to(place)
        push = pushing.Push(here.frozen, here.sources, [table.to(place) for table in readings])

        def work(chunk: pushing.Chunk) -> None:
            # Each chunk has columns of its own, so that threads do not meet.
            edges = [table[:, chunk.nodes] for table in tables]
            if place == local.frozen.device:
                push(chunk, edges)
                return
            found = [torch.zeros_like(part, device=place) for part in edges]
            push(chunk, found)
            for part, mine in zip(edges, found, strict=True):
                part.copy_(mine)

        return work

    elements = _elements(local.frozen, pushing.CHUNK_ELEMENTS)
    parts = list(pushing.chunks(local.sources, local.frozen.d_model, only_embeddings, elements=elements))
    for _ in _shared(prepare, local, parts, devices, bar and not only_embeddings):
        pass
    return torch.cat(pushing.Push(local.frozen, local.sources, readings).bias())


def _pulled(
    local: LocalReplacement, readings: Readings, devices: Sequence[Any] | None, bar: bool, embeddings: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pull targets; return chunks of them, the last layers' first, with their edges from all but the bias.

    Without embeddings, these are left out too, and so are chunks that nothing else reaches.
    """

    def prepare(place: torch.device) -> Callable[[Tensor], Tensor]:
        here = local.to(place)
        pull = pulling.Pull(here.frozen, here.sources, readings.to(place), embeddings=embeddings)
        return lambda rows: pull(rows.to(place)).to(home)

    home = local.frozen.device
    elements = _elements(local.frozen, pulling.CHUNK_ELEMENTS)
    parts = list(pulling.chunks(readings, local.frozen.d_model, len(local.sources), elements=elements))
    if not embeddings:
        # The first layer's MLP is the first that anything else writes at.
        parts = [rows for rows in parts if int(readings.last[rows[0]]) >= order_of(0, "mlp_out_before_norm")]
    return _shared(prepare, local, parts, devices, bar)


def _shared(
    prepare: Callable[[torch.device], Callable[[Any], Any]],
    local: LocalReplacement,
    parts: Sequence[Any],
    devices: Sequence[Any] | None,
    bar: bool,
) -> Iterator[tuple[Any, Any]]:
    """Work through chunks, on several devices side by side; return each with what came of it, in their order."""
    from tqdm.auto import tqdm

    places = [torch.device(device) for device in devices or [local.frozen.device]]
    with torch.no_grad():
        steps = {place: prepare(place) for place in dict.fromkeys(places)}

    def work(number: int) -> Any:
        with torch.no_grad():
            return steps[places[number % len(places)]](parts[number])

    with tqdm(total=sum(map(len, parts)), desc="edges", disable=not bar) as progress:
        if len(places) == 1:
            results: Iterator[Any] = map(work, range(len(parts)))
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


def _elements(frozen: FrozenMap, elements: int) -> int:
    """Return how large a chunk may be: other devices than the CPU want more work at a time."""
    return elements if frozen.device.type == "cpu" else 32 * elements


def _counted(parts: Sequence[Any], results: Iterator[Any], progress: Any) -> Iterator[tuple[Any, Any]]:
    for part, found in zip(parts, results, strict=True):
        yield part, found
        progress.update(len(part))


def _wants_bar(bar: bool | None, flops: float) -> bool:
    return flops > SHORT if bar is None else bar


MEETING = 2
"""How many times as long an operation takes where edges meet, in thin products, as in attention's large ones."""


def push_flops(frozen: FrozenMap, sources: Sources, readings: Readings) -> float:
    """Return about what pushing all sources takes, in floating-point operations of large matrix products."""
    after = (frozen.n_positions - sources.position).double()
    # The first attention behind a source costs next to nothing.
    layers = (frozen.n_layers - 2 - sources.birth).clamp(min=0).double()
    meetings = len(sources) * len(readings) * frozen.d_model
    return float((layers * _sweep(frozen, after)).sum()) + MEETING * meetings


def pull_flops(frozen: FrozenMap, sources: Sources, readings: Readings) -> float:
    """Return about what pulling all targets takes, in floating-point operations of large matrix products."""
    # The first attention behind a target costs next to nothing, and only embeddings need that of the first layer.
    before, layers = (readings.positions + 1).double(), (readings.last_layer - 1).clamp(min=0).double()
    # Every layer's writes are met by the targets above it: about as many as can see half of them.
    above = [float((readings.last_layer > layer).sum()) for layer in range(frozen.n_layers)]
    meetings = sum(len(sources.writing(layer)) * n for layer, n in enumerate(above)) * frozen.d_model
    return float((layers * _sweep(frozen, before)).sum()) + MEETING * meetings


def _sweep(frozen: FrozenMap, positions: Tensor) -> Tensor:
    """Return what carrying one row through one layer's attention costs, over so many positions."""
    step = frozen.layers[0]
    values, outputs = step.W_V[0].numel(), step.W_O[..., 0].numel()
    return 2 * positions * (frozen.d_model * (values + outputs) + positions * outputs)
