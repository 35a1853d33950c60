"""Texts run through a model, and what a crosscoder's features do on them, a batch at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from clt_plugin.attribution.corpus.stream import Seen, stream
from clt_plugin.core import Crosscoder


def batches(
    model: Any,
    crosscoder: Crosscoder,
    texts: Iterable[Any],
    *,
    batch_size: int = 8,
    max_tokens: int = 256,
    bar: bool | None = None,
) -> Iterator[Seen]:
    """Run texts through the plain model inside a model of either library.

    Args:
        model: An nnsight model, a TransformerBridge, or a transformers model.
        crosscoder: Whose features to see.
        texts: Texts, or token ids (position,).
        batch_size: How many run at a time.
        max_tokens: Longer texts are cut into pieces of so many tokens.
        bar: Whether to show progress; by default on a terminal.

    Yields:
        What is active, batch by batch; special tokens and excluded positions do not count.
    """
    from clt_plugin.adapters.huggingface import check_fits, plain_model

    with plain_model(model) as hf:
        host = check_fits(crosscoder, hf, "observe")
        found = stream(model, hf, host, crosscoder, texts, batch_size, max_tokens, True, on_terminal(bar))
        while True:
            # Around each batch alone: a generator that waits must not leave gradients off for everybody else.
            with torch.no_grad():
                seen = next(found, None)
            if seen is None:
                return
            yield seen


def on_terminal(bar: bool | None) -> bool:
    """Return whether to show progress: as asked for, else on a terminal."""
    return sys.stderr.isatty() if bar is None else bar


def fitting(model: Any, clt: Any, name: str = "clt") -> Crosscoder:
    """Return the crosscoder to use: given, loaded from a reference, or the one attached to the model."""
    from clt_plugin.interventions.modes import find_crosscoder

    found = find_crosscoder(model, clt, name, None, "a study")
    assert found is not None
    return found


def several(prompts: Iterable[Any]) -> list[Any]:
    """Return prompts as a list; refuse one text, whose letters would be taken for prompts, and none."""
    if isinstance(prompts, str):
        raise ValueError("prompts are several: give one as [prompt]")
    found = list(prompts)
    if not found:
        raise ValueError("no prompts were given")
    return found


def show(prompt: Any) -> str:
    """Return a prompt as a short text, its end where it is long."""
    text = prompt if isinstance(prompt, str) else f"{len(torch.as_tensor(prompt).flatten())} tokens"
    return text if len(text) <= 40 else f"...{text[-37:]}"
