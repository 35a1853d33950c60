"""What a graph's certificate is made of: each function measures one thing that could be quietly wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clt_plugin.adapters._attention import blocks_of
from clt_plugin.adapters._norms import FrozenNorm
from clt_plugin.attribution.certificate import Certificate
from clt_plugin.attribution.engine.direct import column_residual
from clt_plugin.attribution.engine.edges import Edges
from clt_plugin.attribution.engine.linear import FrozenMap
from clt_plugin.attribution.engine.local import LocalReplacement
from clt_plugin.attribution.engine.resolve import Resolved
from clt_plugin.attribution.engine.sources import feature_writes

TOLERANCES = {
    torch.float64: {"rows": 1e-9, "median row": 1e-11, "columns": 1e-9, "parts": 1e-9, "run": 1e-4},
    torch.float32: {"rows": 1e-4, "median row": 1e-6, "columns": 5e-5, "parts": 2e-5, "run": 1e-3},
    torch.float16: {"rows": 1e-2, "median row": 2e-3, "columns": 1e-2, "parts": 5e-3, "run": 5e-2},
    torch.bfloat16: {"rows": 5e-2, "median row": 1e-2, "columns": 5e-2, "parts": 2e-2, "run": 2e-1},
}
"""How far off the sums of rows, direct runs, and parts of the map may be, by dtype: a few times what correct graphs of
all families show, which in bfloat16 is 2e-2, 1e-3, 2e-2 and 8e-3. A fault smaller than that cannot be told from
rounding."""


def tolerance_for(*dtypes: torch.dtype, check: str = "rows") -> float:
    """Return the tolerance of a check that suits the coarsest of some dtypes."""
    return max(TOLERANCES[dtype][check] for dtype in dtypes)


def tolerances_for(
    model: torch.dtype, crosscoder: torch.dtype, edges: torch.dtype, tolerance: float | None
) -> dict[str, float]:
    """Return what each check of a certificate must stay below.

    Args:
        model: The model's dtype.
        crosscoder: The crosscoder's.
        edges: That of the edges.
        tolerance: For all checks; None for what suits the dtypes that take part in each.
    """
    parts = tolerance_for(model, edges, check="parts")
    found = {
        "rows": tolerance_for(model, crosscoder, edges),
        "median row": tolerance_for(model, crosscoder, edges, check="median row"),
        "columns": tolerance_for(model, edges, check="columns"),
        "reconstruction": tolerance_for(model, crosscoder, edges, check="parts"),
        "layers": parts,
        "embeddings": parts,
        # Norms, and the softmax of attention, compute in float32 whatever the model's dtype is. Two kinds of attention
        # round at different points, and what they round adds up over layers.
        "norms": max(parts, 1e-5),
        "run": tolerance_for(model, check="run"),
    }
    return found if tolerance is None else dict.fromkeys(found, tolerance)


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


def _relative(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, relative to the largest entry; nan counts as infinite."""
    if not theirs.numel():
        return 0.0
    apart, largest = (ours - theirs).abs().max(), theirs.abs().max()
    return float((apart / largest.clamp(min=torch.finfo(ours.dtype).tiny)).nan_to_num(nan=torch.inf))


def run_residual(hf: nn.Module, local: LocalReplacement) -> float:
    """Return how far the recorded run's logits are from those of the model as it runs by itself.

    And, where no softcap is configured, how far its logits are from what its unembedding puts out: a factor between
    the two would make a target's value another one than the model's.
    """
    kept = local.frozen.recording
    if kept.logits is None or kept.unembedded is None:
        return 0.0
    wide = torch.promote_types(kept.logits.dtype, torch.float32)
    own = hf(**{**local.inputs, "use_cache": False}).logits.to(wide)
    apart = _relative(kept.logits.to(wide), own)
    text = hf.config.get_text_config()  # type: ignore[union-attr,operator]
    if getattr(text, "final_logit_softcapping", None) is None:
        apart = max(apart, _relative(kept.unembedded.to(wide), kept.logits.to(wide)))
    return apart


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
        check_columns: How many columns to compare with a direct run; 0 for none at all.
        tolerance: What all checks must stay below; None for what suits the dtypes.
    """
    frozen, crosscoder = local.frozen, local.crosscoder
    row_ids = [*ids[: len(edges.nodes)], *ids[len(ids) - len(resolved) :]]
    residuals = edges.residuals()
    least = max(float(edges.absolute.median()) / 10, torch.finfo(edges.absolute.dtype).tiny)
    checked = residuals * edges.absolute / edges.absolute.clamp(min=least)
    # What is infinite or nan is worst of all.
    worst = int(checked.nan_to_num(nan=torch.inf).argmax())
    column, chosen = torch.nan, list[int]()
    if check_columns:
        column, chosen = column_residual(hf, local, edges, resolved, check_columns)
    model_dtype = next(hf.parameters()).dtype
    return Certificate(
        max_relative_residual=float(residuals.max()),
        median_relative_residual=float(residuals.median()),
        checked_residual=float(checked[worst]),
        worst=row_ids[worst],
        column_residual=column,
        columns=tuple(ids[i] for i in chosen),
        reconstruction_residual=reconstruction_residual(local),
        embedding_residual=embedding_residual(hf, local),
        norm_residual=norm_residual(frozen),
        run_residual=run_residual(hf, local),
        layer_residuals=tuple(layer_residuals(frozen)),
        tolerances=tolerances_for(model_dtype, crosscoder.dtype, frozen.dtype, tolerance),
        dtype=str(frozen.dtype).removeprefix("torch."),
        model_dtype=str(model_dtype).removeprefix("torch."),
    )
