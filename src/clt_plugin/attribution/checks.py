"""What a graph's certificate is made of: each function measures one thing that could be quietly wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clt_plugin.adapters._attention import blocks_of
from clt_plugin.adapters._frozen import frozen as frozen_run
from clt_plugin.adapters._norms import FrozenNorm
from clt_plugin.attribution.certificate import Certificate
from clt_plugin.attribution.edges import Edges
from clt_plugin.attribution.linear import FrozenMap
from clt_plugin.attribution.local import LocalReplacement
from clt_plugin.attribution.resolve import Resolved
from clt_plugin.attribution.sources import Sources, feature_writes
from clt_plugin.core.crosscoder import Crosscoder
from clt_plugin.core.wiring import Site
from clt_plugin.interventions._engine import Engine, FixedRun

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far off a check may be, by the coarsest dtype that took part. A correct graph's rows are off by about 3e-7 in
float32 and 6e-3 in bfloat16; columns, and layers, by a few times that."""


def tolerance_for(*dtypes: torch.dtype) -> float:
    """Return the tolerance that suits the coarsest of some dtypes."""
    return max(TOLERANCES[dtype] for dtype in dtypes)


def layer_residuals(frozen: FrozenMap) -> list[float]:
    """Return how far each layer's frozen attention is from what the model's own put out, then the head.

    Returns:
        For each layer the largest difference, relative to the output's largest entry; last, that of the final norm
        and the unembedding, for one random direction of logits.
    """
    found = []
    for layer, step in enumerate(frozen.layers):
        own = frozen.value(layer, "attn_out")
        ours = step.constant[:, None].clone()
        step.attend(frozen.value(layer, "resid_pre")[:, None], 0, ours)
        ours = ours[:, 0]
        found.append(_relative(ours, own))
    if frozen.unembedding is None or frozen.recording.unembedded is None:
        return [*found, 0.0]
    last = torch.tensor([frozen.n_positions - 1])
    x = frozen.value(frozen.n_layers - 1, "resid_post")[last]
    normed = frozen.final_norm.at(x, last) + frozen.final_norm.bias
    own = frozen.recording.unembedded[0, last].to(frozen.dtype)
    # In the model's own dtype, whose unembedding may be too large to copy.
    ours = (normed.to(frozen.unembedding) @ frozen.unembedding.T).to(own)
    if frozen.unembedding_bias is not None:
        ours = ours + frozen.unembedding_bias.to(own)
    return [*found, _relative(ours, own.to(ours.device))]


def reconstruction_residual(local: LocalReplacement) -> float:
    """Return how far what the sources write is from what the crosscoder makes of the same run by itself.

    The crosscoder encodes and decodes anew. Compared are positions at which it acts and that are not zeroed.
    """
    crosscoder, frozen, sources = local.crosscoder, local.frozen, local.sources
    reads = {site: frozen.recording.sites[site][0].to(crosscoder.device) for site in crosscoder.wiring.read_sites}
    worst = 0.0
    for site, theirs in crosscoder.decode(crosscoder.encode(reads), reads).items():
        ours = feature_writes(sources, site.layer) + sources.constants[site.layer]
        skip = sources.skips[site.layer]
        if skip is not None:
            ours = ours + skip(frozen.value(skip.layer, skip.state)[:, None], 0)[:, 0]
        worst = max(worst, _relative(ours[local.acting], theirs.to(ours)[local.acting]))
    return worst


def embedding_residual(hf: nn.Module, local: LocalReplacement) -> float:
    """Return how far what tokens leave to the bias in the first residual stream depends on which tokens they are.

    The model runs on other tokens, up to its first block.
    """
    ids = local.inputs["input_ids"]
    others = ids.roll(1, dims=1)
    if bool((others == ids).all()):
        others = torch.where(ids > 0, ids - 1, ids + 1)
    seen: list[Tensor] = []
    first = blocks_of(hf, local.frozen.host)[0]

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise _Enough

    embedding = hf.get_input_embeddings()  # type: ignore[operator]
    hooks = [
        embedding.register_forward_hook(lambda module, args, output: seen.append(output)),
        first.register_forward_pre_hook(stop, with_kwargs=True),
    ]
    try:
        with contextlib.suppress(_Enough):
            hf(**{**local.inputs, "input_ids": others, "use_cache": False})
    finally:
        for hook in hooks:
            hook.remove()
    embedded, stream = (value[0].to(local.sources.start) for value in seen)
    apart = (stream - embedded - local.sources.start).abs().max()
    return float(apart / embedded.abs().max().clamp(min=torch.finfo(apart.dtype).tiny))


class _Enough(Exception):  # noqa: N818 - nothing went wrong
    """What ends a run after all that is wanted of it."""


def norm_residual(frozen: FrozenMap) -> float:
    """Return how far the norms' linear forms are from what their modules put out, at most."""
    kept = frozen.recording
    norms: dict[Any, FrozenNorm] = {**kept.norms, "final_norm": kept.final_norm}
    return max(_relative(norm.y.to(norm.gain), kept.own_norms[key].to(norm.gain)) for key, norm in norms.items())


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


def columns(
    hf: nn.Module,
    inputs: Mapping[str, Any],
    crosscoder: Crosscoder,
    frozen: FrozenMap,
    sources: Sources,
    chosen: Tensor,
    targets: Sequence[Resolved],
) -> tuple[Tensor, Tensor]:
    """Return what some features do, by running the model's own modules with patterns and norms frozen.

    Each feature's writes are added, times a factor that makes them as large as the residual stream: what follows is
    linear, and rounding is small beside it.

    Args:
        hf: The plain model.
        inputs: As for the recorded run.
        crosscoder: The crosscoder.
        frozen: The map, with the recording.
        sources: The sources.
        chosen: Which features, (k,).
        targets: The targets; of directions nothing is measured.

    Returns:
        (k, features + targets): the changes over the factor; nan for directions.
    """
    recording, features, k = frozen.recording, sources.features, len(chosen)
    sites, wiring = recording.sites, crosscoder.wiring
    given = {
        site: torch.zeros(k, frozen.n_positions, frozen.d_model, dtype=frozen.dtype) for site in wiring.write_sites
    }
    size = max(float(recording.mlp_out[layer].abs().max()) for layer in recording.mlp_out) or 1.0
    factors = torch.ones(k, dtype=frozen.dtype)
    for row, node in enumerate(chosen.tolist()):
        g, position = int(features.group[node]), int(features.position[node])
        latent = features.latent[node : node + 1].to(crosscoder.device)
        written = crosscoder.decoder_vectors(g, latent)[0].detach().to("cpu", frozen.dtype)
        written = written * features.activation[node].cpu()
        factors[row] = 4 * size / max(float(written.abs().max()), 1e-30)
        for site, place in crosscoder.layout.write_slices[g].items():
            given[site][row, position] = factors[row] * written[place]
    device = frozen.device
    changes = {site: change.to(device) for site, change in given.items()}
    outputs = {site: sites[site] for site in wiring.write_sites}
    reads = {site: sites[site] for site in wiring.read_sites}
    run = _Changed(crosscoder, outputs, reads, changes)
    held = {layer: out.expand(k, -1, -1) for layer, out in recording.mlp_out.items()}
    for site in wiring.write_sites:
        held.pop(site.layer)
    every = frozenset(range(frozen.n_layers))
    rows = {key: v.expand(k, -1) if isinstance(v, Tensor) and v.ndim == 2 else v for key, v in inputs.items()}
    engine = Engine(hf, frozen.host, run, (), recording, every, held)
    with torch.no_grad(), frozen_run(hf, frozen.host, recording), engine, _unembedded(hf) as seen:
        hf(**{**rows, "use_cache": False})
        moved = {site: (run.inputs[site] - reads[site]).to(frozen.dtype) for site in wiring.read_sites}
    unmeasured = torch.full((k, len(targets)), torch.nan, dtype=frozen.dtype, device=device)
    found = torch.cat((_changes_of_features(crosscoder, sources, moved), unmeasured), dim=1)
    for number, target in enumerate(targets):
        if target.coefficients and recording.unembedded is not None:
            at = int(target.readings.positions[0])
            change = (seen[-1][:, at] - recording.unembedded[:, at]).to(device, frozen.dtype)
            shares = torch.tensor(list(target.coefficients.values()), dtype=frozen.dtype, device=device)
            change = change[:, list(target.coefficients)] - change.mean(-1, keepdim=True)
            found[:, len(features) + number] = change @ shares
    return found / factors.to(device)[:, None], factors


def _changes_of_features(crosscoder: Crosscoder, sources: Sources, moved: Mapping[Site, Tensor]) -> Tensor:
    """Return how much each feature's pre-activation changes with what is read, (k, features)."""
    features, rows = sources.features, len(next(iter(moved.values())))
    found = sources.errors.new_empty(rows, len(features))
    for g, sites in enumerate(crosscoder.wiring.reads):
        nodes = features.of_group(g)
        if len(nodes):
            x = torch.cat([moved[site] for site in sites], dim=-1)[:, features.position[nodes]]
            used, which = features.latent[nodes].unique(return_inverse=True)
            encoders = crosscoder.encoder_vectors(g, used.to(crosscoder.device)).detach().to(x)
            found[:, nodes] = torch.einsum("knd,nd->kn", x, encoders[which])
    return found


class _unembedded:
    """What the unembedding puts out while the context lasts."""

    def __init__(self, hf: nn.Module) -> None:
        self.head: Any = hf.get_output_embeddings()  # type: ignore[operator]

    def __enter__(self) -> list[Tensor]:
        seen: list[Tensor] = []
        self.hook = None
        if self.head is not None:
            self.hook = self.head.register_forward_hook(lambda module, args, output: seen.append(output))
        return seen

    def __exit__(self, *_: object) -> None:
        if self.hook is not None:
            self.hook.remove()


def _relative(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, relative to the largest entry; nan counts as infinite."""
    if not theirs.numel():
        return 0.0
    apart, largest = (ours - theirs).abs().max(), theirs.abs().max()
    return float((apart / largest.clamp(min=torch.finfo(ours.dtype).tiny)).nan_to_num(nan=torch.inf))


# ---------------------------------------------------------------- the whole


def certify(
    hf: nn.Module,
    local: LocalReplacement,
    edges: Edges,
    resolved: Sequence[Resolved],
    ids: Sequence[str],
    check_columns: int,
    tolerance: float | None,
) -> Certificate:
    """Check what can be checked of a graph.

    Args:
        hf: The plain model.
        local: The local replacement model.
        edges: The edges.
        resolved: The targets.
        ids: Of all nodes.
        check_columns: How many columns to compare with a direct run.
        tolerance: What the checks must stay below; None for what suits the dtypes.
    """
    frozen, crosscoder = local.frozen, local.crosscoder
    row_ids = [*ids[: len(edges.nodes)], *ids[len(ids) - len(resolved) :]]
    residuals = edges.residuals()
    least = max(float(edges.absolute.median()) / 10, torch.finfo(edges.absolute.dtype).tiny)
    checked = residuals * edges.absolute / edges.absolute.clamp(min=least)
    # What is infinite or nan is worst of all.
    worst = int(checked.nan_to_num(nan=torch.inf).argmax())
    column, chosen = _column_residual(hf, local, edges, resolved, check_columns)
    model_dtype = next(hf.parameters()).dtype
    coarsest = (model_dtype, crosscoder.dtype, frozen.dtype)
    return Certificate(
        max_relative_residual=float(residuals.max()),
        median_relative_residual=float(residuals.median()),
        checked_residual=float(checked[worst]),
        worst=row_ids[worst],
        tolerance=tolerance_for(*coarsest) if tolerance is None else tolerance,
        column_residual=column,
        columns=tuple(ids[i] for i in chosen),
        reconstruction_residual=reconstruction_residual(local),
        embedding_residual=embedding_residual(hf, local),
        norm_residual=norm_residual(frozen),
        layer_residuals=tuple(layer_residuals(frozen)),
        dtype=str(frozen.dtype).removeprefix("torch."),
        model_dtype=str(model_dtype).removeprefix("torch."),
    )


def _column_residual(
    hf: nn.Module, local: LocalReplacement, edges: Edges, resolved: Sequence[Resolved], k: int
) -> tuple[float, list[int]]:
    """Compare a few columns with a direct run; return the largest relative difference, and which they are."""
    kept = len(edges.nodes)
    if not k or not kept:
        return float("nan"), []
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(kept, generator=generator)[:k].sort().values
    nodes = edges.nodes[chosen.to(edges.nodes.device)]
    direct, factors = columns(hf, local.inputs, local.crosscoder, local.frozen, local.sources, nodes, resolved)
    rows = torch.cat((edges.nodes, len(local.sources.features) + torch.arange(len(resolved)).to(edges.nodes)))
    ours = edges.block[:, chosen.to(edges.block.device)].T
    direct = direct[:, rows].to(ours)
    apart = torch.where(direct.isnan(), 0, ours - direct).abs().amax(1)
    largest = torch.maximum(ours.abs().amax(1), direct.nan_to_num().abs().amax(1))
    # What was added is as large as what the MLPs write, so that an effect much smaller than the values themselves is
    # next to none: there the direct run shows its rounding.
    floor = edges.values.abs().max() / factors.to(ours)
    return float((apart / torch.maximum(largest, floor)).max()), chosen.tolist()
