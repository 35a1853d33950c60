"""Edges against a direct run: sources are added to a run of the model's own modules, and what changes is looked at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clt_plugin.adapters._attention import blocks_of, part_of
from clt_plugin.adapters._frozen import frozen as frozen_run
from clt_plugin.adapters.huggingface import HostModel
from clt_plugin.attribution.engine._vectors import Vectors
from clt_plugin.attribution.engine.edges import Edges
from clt_plugin.attribution.engine.local import LocalReplacement
from clt_plugin.attribution.engine.resolve import Resolved
from clt_plugin.attribution.engine.sources import Sources
from clt_plugin.core.crosscoder import Crosscoder
from clt_plugin.core.wiring import Site
from clt_plugin.interventions._engine import Engine, FixedRun

SIGNED = 2
"""In so many rows of a direct run all sources are added at once, each with a random sign."""


def column_residual(
    hf: nn.Module, local: LocalReplacement, edges: Edges, resolved: Sequence[Resolved], k: int
) -> tuple[float, list[int]]:
    """Compare edges with a direct run: some features alone, and all sources with random signs.

    Alone, a feature is scaled so that what it writes is as large as what the MLPs write: what follows is linear, and
    rounding is small beside it. Together, every edge counts, so that none may come from another source than it says.

    Args:
        hf: The plain model.
        local: The local replacement model.
        edges: The edges.
        resolved: The targets; those that are not logits are not compared.
        k: How many features to take alone.

    Returns:
        The largest difference, relative to the largest change of its run or the largest value of all; and which of the
        kept features were taken alone.
    """
    sources, nodes = local.sources, edges.nodes.cpu()
    n_features = len(sources.features)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(nodes), generator=generator)[:k].sort().values
    columns = torch.cat((nodes, torch.arange(n_features, len(sources))))
    weights = torch.zeros(len(chosen) + SIGNED, len(sources), dtype=local.frozen.dtype)
    size = max(float(out.abs().max()) for out in local.frozen.recording.mlp_out.values()) or 1.0
    for row, node in enumerate(nodes[chosen].tolist()):
        weights[row, node] = 4 * size / max(_largest_write(sources, node), 1e-30)
    signs = torch.randint(0, 2, (SIGNED, len(columns) - 1), generator=generator) * 2 - 1
    weights[len(chosen) :, columns[:-1]] = signs.to(weights)
    weights = weights.to(edges.whole.device)
    changes = direct_changes(hf, local, weights, resolved)
    rows = torch.cat((nodes, n_features + torch.arange(len(resolved)))).to(changes.device)
    direct, ours = changes[:, rows], edges.effects(weights[:, columns[:-1].to(weights.device)])
    apart = torch.where(direct.isnan(), 0, ours - direct).abs().amax(1)
    # Beside the values themselves, too: an effect much smaller than these is lost in their rounding.
    largest = torch.maximum(ours.abs().amax(1), direct.nan_to_num().abs().amax(1))
    floor = torch.maximum(largest, edges.values.abs().max()).clamp(min=torch.finfo(ours.dtype).tiny)
    return float((apart / floor).max().nan_to_num(nan=torch.inf)), chosen.tolist()


def _largest_write(sources: Sources, node: int) -> float:
    """Return the largest entry of all that a feature writes."""
    rows = sources.rows[int(sources.features.group[node])]
    return float(rows.rows[rows.which[node]].abs().max() * sources.features.activation[node].abs())


def direct_changes(hf: nn.Module, local: LocalReplacement, weights: Tensor, targets: Sequence[Resolved]) -> Tensor:
    """Return what adding sources changes, in a run of the model's own modules with patterns and norms frozen.

    Args:
        hf: The plain model.
        local: The local replacement model.
        weights: How often each source is added in each row, (k, S); 0 for the bias.
        targets: The targets.

    Returns:
        (k, features + targets); nan for targets that are not logits.
    """
    frozen, sources, crosscoder = local.frozen, local.sources, local.crosscoder
    recording, n_features, k = frozen.recording, len(sources.features), len(weights)
    sites, wiring = recording.sites, crosscoder.wiring
    first = n_features + frozen.n_layers * frozen.n_positions
    errors = weights[:, n_features:first].view(k, frozen.n_layers, -1, 1)
    embedded = weights[:, first:-1, None] * sources.embeddings
    given = {site: sources.errors.new_zeros(k, *sources.errors.shape[1:]) for site in wiring.write_sites}
    ordered = weights[:, sources.order]
    for site, total in given.items():
        for part in sources.written(site.layer):
            part.add_to(total, ordered)
    reads = {site: sites[site] for site in wiring.read_sites}
    run = _Changed(crosscoder, {site: sites[site] for site in wiring.write_sites}, reads, given)
    held = {
        layer: out + (errors[:, layer] * sources.errors[layer]).to(out)
        for layer, out in recording.mlp_out.items()
        if layer not in {site.layer for site in wiring.write_sites}
    }
    rows = {key: v.expand(k, -1) if isinstance(v, Tensor) and v.ndim == 2 else v for key, v in local.inputs.items()}
    every = frozenset(range(frozen.n_layers))
    engine = Engine(hf, frozen.host, run, (), recording, every, held)
    # Every MLP's output is given: none needs to run.
    context = (torch.no_grad(), frozen_run(hf, frozen.host, recording), _idle_mlps(hf, frozen.host), engine)
    with contextlib.ExitStack() as stack:
        for each in context:
            stack.enter_context(each)
        seen = stack.enter_context(_Ends(hf, embedded))
        hf(**{**rows, "use_cache": False})
        moved = {site: (run.inputs[site] - reads[site]).to(frozen.dtype) for site in wiring.read_sites}
    unmeasured = torch.full((k, len(targets)), torch.nan, dtype=frozen.dtype, device=frozen.device)
    found = torch.cat((_changes_of_features(crosscoder, sources, moved), unmeasured), dim=1)
    for number, target in enumerate(targets):
        if target.coefficients and recording.unembedded is not None:
            at = int(target.readings.positions[0])
            change = (seen[-1][:, at] - recording.unembedded[:, at]).to(frozen.device, frozen.dtype)
            shares = torch.tensor(list(target.coefficients.values()), dtype=frozen.dtype, device=frozen.device)
            change = change[:, list(target.coefficients)] - change.mean(-1, keepdim=True)
            found[:, n_features + number] = change @ shares
    return found


@contextlib.contextmanager
def _idle_mlps(hf: nn.Module, host: HostModel) -> Iterator[None]:
    """Have MLPs put out zeros at once, as long as the context lasts: what takes the place of that is given."""
    modules = [vars(part_of(block, host.architecture.mlp)) for block in blocks_of(hf, host)]
    before = [{"forward": own["forward"]} if "forward" in own else {} for own in modules]
    try:
        for own in modules:
            own["forward"] = torch.zeros_like
        yield
    finally:
        for own, kept in zip(modules, before, strict=True):
            del own["forward"]
            own.update(kept)


class _Changed(FixedRun):
    """MLP outputs of another run with given changes, and the affine skips' response to what follows from them."""

    def __init__(
        self, crosscoder: Crosscoder, outputs: Mapping[Site, Tensor], reads: Mapping[Site, Tensor], given: Any
    ) -> None:
        every = frozenset(site.layer for site in outputs)
        super().__init__(crosscoder, None, outputs, reads, every)
        self.given = given

    def begin(self, excluded: Tensor | None, now: Any = None) -> None:
        self.clear()
        self.excluded = excluded
        self.changes = dict(self.given)

    def encode(self, group: int, visit: Any) -> None:
        """Encode nothing: what is read is looked at once the run is over."""


def _changes_of_features(crosscoder: Crosscoder, sources: Sources, moved: Mapping[Site, Tensor]) -> Tensor:
    """Return how much each feature's pre-activation changes with what is read, (k, features)."""
    features, rows = sources.features, len(next(iter(moved.values())))
    found = sources.errors.new_zeros(len(features), rows)
    for g, sites in enumerate(crosscoder.wiring.reads):
        nodes = features.of_group(g)
        if len(nodes):
            x = torch.cat([moved[site] for site in sites], dim=-1).transpose(0, 1)
            used, which = features.latent[nodes].unique(return_inverse=True)
            encoders = crosscoder.encoder_vectors(g, used.to(crosscoder.device)).detach().to(x)
            read = Vectors(nodes, features.position[nodes], encoders[which])
            read.meet(x, 0, [slice(None)] * len(x), found)
    return found.T


class _Ends:
    """Both ends of a model while the context lasts: adds to its embeddings, and keeps what its unembedding puts out."""

    def __init__(self, hf: nn.Module, added: Tensor) -> None:
        self.embedding: Any = hf.get_input_embeddings()  # type: ignore[operator]
        self.head: Any = hf.get_output_embeddings()  # type: ignore[operator]
        self.added = added

    def __enter__(self) -> list[Tensor]:
        seen: list[Tensor] = []
        self.hooks = [self.embedding.register_forward_hook(lambda module, args, out: out + self.added.to(out))]
        if self.head is not None:
            self.hooks.append(self.head.register_forward_hook(lambda module, args, out: seen.append(out)))
        return seen

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()
