"""Texts read through a model for a crosscoder: rows of tokens, and what those that count have at its sites."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from clt_plugin.core import Crosscoder, Site, WiringError
from clt_plugin.training.data.activations import Activations, check_whole
from clt_plugin.training.data.harvest import Harvest
from clt_plugin.training.data.tokens import Rows, Tokens


def models_of(model: Any, crosscoder: Crosscoder) -> dict[str, Any]:
    """Return {name: model} as a crosscoder's sites name them; one model goes by the name that its sites have."""
    return dict(model) if isinstance(model, Mapping) else {crosscoder.wiring.models[0]: model}


def tokens_for(model: Any, crosscoder: Crosscoder, texts: Any, tokenizer: Any = None, length: int = 256) -> Tokens:
    """Return texts as the rows on which a crosscoder is looked at: one text or a piece of one each.

    Args:
        model: A model, or {name: model}.
        crosscoder: Its ``host`` says how many first tokens of a row do not count.
        texts: A `Tokens`, which is returned as it is, or whatever `Texts.of` reads.
        tokenizer: For models without one of their own.
        length: How many tokens a row has at most.
    """
    if isinstance(texts, Tokens):
        return texts
    if tokenizer is None:
        tokenizer = tokenizer_of(model)
    return Tokens(texts, tokenizer, length=length, pack=False, exclude_first=crosscoder.host.exclude_first)


def tokenizer_of(model: Any) -> Any:
    """Return the tokenizer of a model, or of the first of several that has one; None where none has."""
    every = model.values() if isinstance(model, Mapping) else (model,)
    return next((own for each in every if (own := getattr(each, "tokenizer", None)) is not None), None)


@contextmanager
def as_it_runs(crosscoder: Crosscoder) -> Iterator[None]:
    """Hold a crosscoder in evaluation mode, in which it runs outside training, whatever mode it was in.

    Raises:
        WiringError: A BatchTopK's thresholds were not measured, without which nothing would be active.
    """
    if crosscoder.activation.has_batch_threshold and not crosscoder.has_measured_threshold:
        raise WiringError(
            "this BatchTopK's thresholds were not measured, and without them nothing is active: call "
            "estimate_threshold(x) on typical inputs first"
        )
    was_training = crosscoder.training
    crosscoder.eval()
    try:
        yield
    finally:
        crosscoder.train(was_training)


def read_texts(
    model: Any,
    crosscoder: Crosscoder,
    tokens: Tokens,
    *,
    sites: Iterable[Site] = (),
    batch_size: int = 8,
    max_tokens: int | None = None,
    bar: bool | None = None,
    desc: str = "texts",
) -> Iterator[tuple[Rows, Activations]]:
    """Run rows through a model, and give each batch with what its tokens that count have, (tokens, d) a site.

    As long as batches are taken, the crosscoder is in evaluation mode (`as_it_runs`).

    Args:
        model: A model, or {name: model} for a wiring over several.
        crosscoder: Whose sites are read.
        tokens: The rows.
        sites: Further sites.
        batch_size: How many rows run at a time.
        max_tokens: No further batch is run once so many tokens have counted; None for all.
        bar: Whether to show progress; by default on a terminal.
        desc: What the bar says.

    Raises:
        DataError: The texts cannot be run as asked.
        AttachError: The model has no such site.
        WiringError: See `as_it_runs`.
    """
    from tqdm.auto import tqdm

    if max_tokens is not None:
        check_whole("max_tokens", max_tokens, 1)
    wiring = crosscoder.wiring
    wanted = dict.fromkeys((*wiring.read_sites, *wiring.write_sites, *sites))
    dtype = torch.float64 if crosscoder.dtype == torch.float64 else torch.float32
    source = Harvest(
        models_of(model, crosscoder), tokens, wanted, batch_size=batch_size, dtype=dtype, device=crosscoder.device
    )
    # The same rows twice: a harvest's chunks are of the batches in which any token counts.
    counted = (rows for rows in tokens.batches(batch_size) if bool(rows.counted.any()))
    hidden = None if bar is None else not bar
    bar_of = tqdm(total=max_tokens, desc=desc, unit="token", disable=hidden, leave=False)
    with as_it_runs(crosscoder), bar_of as progress:
        seen = 0
        for rows, chunk in zip(counted, source.chunks(), strict=False):
            yield rows, chunk.activations
            seen += len(chunk.ids)
            progress.update(len(chunk.ids))
            if max_tokens is not None and seen >= max_tokens:
                return
