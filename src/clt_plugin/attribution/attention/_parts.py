"""What splits of one number over sources share: the table of sources, and the check that parts add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from clt_plugin.attribution.certificate import CertificateError
from clt_plugin.attribution.engine.checks import layer_residuals, reconstruction_residual, tolerance_for
from clt_plugin.attribution.engine.edges import Edges
from clt_plugin.attribution.engine.local import LocalReplacement
from clt_plugin.attribution.engine.pull import chunks, pull
from clt_plugin.attribution.engine.readings import Readings
from clt_plugin.attribution.engine.resolve import Resolved
from clt_plugin.attribution.engine.table import table_of


def source_nodes(local: LocalReplacement, tokenizer: Any) -> pd.DataFrame:
    """Return the table of the sources, one row each, in their order: a graph's without its targets.

    Args:
        local: The local replacement model.
        tokenizer: The model's, or None.
    """
    n, device = len(local.sources.features), local.frozen.device
    zero = torch.zeros(n + 1, device=device)
    none = Edges(zero[:, None], zero, True, zero, zero, zero, zero, torch.arange(n, device=device))
    # A graph has a target, whose row is the last: what stands in for it here is left out again.
    target = Resolved(local.readings(none.nodes[:0]), {"id": ""}, {})
    return table_of(local, none, (target,), tokenizer).drop(columns=["weight", "omitted"]).iloc[:-1]


def pulled(local: LocalReplacement, readings: Readings) -> Tensor:
    """Return the edges from all sources to some targets, (T, S), a chunk of targets at a time."""
    edges = readings.values.new_zeros(len(readings), len(local.sources))
    for part in chunks(readings, local.frozen.d_model, len(local.sources)):
        edges[part] = pull(local.frozen, local.sources, readings, part)
    return edges


def check_sums(
    local: LocalReplacement,
    model_dtype: torch.dtype,
    sums: Sequence[tuple[str, Tensor, Tensor, Tensor]],
    tolerance: float | None,
    rounded: Sequence[tuple[str, Tensor, Tensor]] = (),
) -> tuple[float, float]:
    """Check that parts add up, and what they were found from.

    Args:
        local: The local replacement model, whose attention and reconstruction are compared with the model's own.
        model_dtype: In which the model ran.
        sums: (what, sums, values, absolute sums): each sum is to be its value, but for rounding, which is relative to
            the absolute sum.
        tolerance: What all must stay below; None for what suits the dtypes.
        rounded: (what, found, own): numbers that models compute in float32 whatever their dtype.

    Returns:
        The largest of the sums' residuals, and the tolerance.

    Raises:
        CertificateError: Something does not hold.
    """
    if tolerance is None:
        tolerance = tolerance_for(model_dtype, local.crosscoder.dtype, local.frozen.dtype)
    found = {f"layer {layer}'s attention": each for layer, each in enumerate(layer_residuals(local.frozen)[:-1])}
    found["the reconstruction"] = reconstruction_residual(local)
    largest = 0.0
    for what, total, value, absolute in sums:
        apart = (total - value).abs()
        found[what] = float(torch.where(absolute > 0, apart / absolute, torch.where(apart > 0, torch.inf, 0.0)).max())
        largest = max(largest, found[what])
    failed = [f"{what} is off by {each:.1e}" for what, each in found.items() if not each <= tolerance]
    for what, ours, own in rounded:
        off = float((ours - own.to(ours)).abs().max())
        if not off <= max(tolerance, 1e-5):
            failed.append(f"{what} is off by {off:.1e}")
    if failed:
        raise CertificateError(f"these parts do not add up (tolerance {tolerance:.0e}): " + "; ".join(failed))
    return largest, tolerance
