"""Activations from whatever holds them, batch by batch, and latents that are active on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from clt_plugin.core import Crosscoder, Site, SparseFeatures, WiringError
from clt_plugin.training.data import Activations, Chunk
from clt_plugin.training.reading import as_it_runs


def batches_of(source: Any) -> Iterator[Mapping[Site, Tensor]]:
    """Give {site: (tokens, d_site)} of a source's tokens, a batch at a time.

    Args:
        source: A `Harvest` or another `Source`; `Activations`; {site: (tokens, d_site)}; or an iterable of these, which
            a study that needs two passes reads twice.
    """
    if isinstance(source, Mapping):
        yield source
    elif isinstance(source, Activations):
        yield source.by_site()
    elif isinstance(source, Chunk):
        yield source.activations.by_site()
    elif hasattr(source, "chunks"):
        for chunk in source.chunks():
            yield chunk.activations.by_site()
    elif isinstance(source, Iterable) and not isinstance(source, Tensor | str):
        for part in source:
            yield from batches_of(part)
    else:
        raise WiringError(
            f"activations come from harvest(models, texts, crosscoder.wiring), or as {{site: (tokens, d)}}, not from "
            f"{type(source).__name__}"
        )


def encoded(
    crosscoder: Crosscoder, source: Any, bar: bool | None = None
) -> Iterator[tuple[Mapping[Site, Tensor], SparseFeatures]]:
    """Give every batch, on the crosscoder's device, with the latents that are active on it.

    As long as batches are taken, the crosscoder is in evaluation mode (`as_it_runs`).

    Raises:
        WiringError: A site that is read is missing, there are no activations, or thresholds were not measured.
    """
    from tqdm.auto import tqdm

    empty = True
    hidden = None if bar is None else not bar
    with as_it_runs(crosscoder), tqdm(desc="tokens", unit="token", disable=hidden, leave=False) as progress:
        for found in batches_of(source):
            batch = {site: x.to(crosscoder.device) for site, x in found.items()}
            with torch.no_grad():
                features = crosscoder.encode({site: batch[site] for site in crosscoder.sites.read}, sparse=True)
            empty = empty and not features.shape[0]
            yield batch, features
            progress.update(features.shape[0])
    if empty:
        raise WiringError("there are no activations: give a source that has tokens")
