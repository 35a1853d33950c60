"""Feature browser: one streaming pass over a corpus for where every latent is active and which tokens it promotes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clt_plugin.adapters._run import group_labels
from clt_plugin.analysis._promoted import Promotion
from clt_plugin.analysis.activations._collect import Collector
from clt_plugin.analysis.activations.cards import TENSORS, VERSION, FeatureBrowser
from clt_plugin.core import Crosscoder
from clt_plugin.training.data.activations import check_whole
from clt_plugin.training.reading import models_of, read_texts, tokenizer_of, tokens_for


def feature_browser(
    clt: Crosscoder,
    model: Any,
    texts: Any,
    *,
    tokenizer: Any = None,
    max_tokens: int | None = None,
    length: int = 256,
    batch_size: int = 8,
    k: int = 8,
    context: int = 10,
    bins: int = 32,
    n_tokens: int = 10,
    bar: bool | None = None,
) -> FeatureBrowser:
    """Read a corpus once, and keep for every latent its top examples, its histogram and the tokens it promotes.

    Memory: about ``k (12 context + 10) + 4 bins + 16 n_tokens`` bytes a latent, whatever the corpus; what is written
    takes as much. Each of the k passages is from another row of text. Promoted and suppressed tokens are by direct
    effect: what the latent adds to the residual stream over all layers, through the final norm's gain and the
    unembedding, less the mean over the vocabulary. Decoders are streamed.
    Source: Bricken et al. 2023, "Towards Monosemanticity" (feature dashboards), and Ameisen et al. 2025.

    Args:
        clt: The crosscoder; it may be lazy.
        model: The model that it belongs to; {name: model} for a wiring over several, whose first one's tokens are said.
        texts: A `Tokens`, or whatever `Texts.of` reads.
        tokenizer: For models without one of their own.
        max_tokens: No further batch is run once so many tokens have counted; None for all.
        length: How many tokens a row has at most.
        batch_size: How many rows run at a time.
        k: How many passages of each latent.
        context: How many tokens come before and after the most active one.
        bins: Of histograms, a power of two.
        n_tokens: How many tokens promoted and suppressed.
        bar: Whether to show progress; by default on a terminal.

    Raises:
        DataError: The texts cannot be run as asked.
        AttachError: The model has no such site.
    """
    for name, value, least in (("k", k, 1), ("context", context, 0), ("bins", bins, 1), ("n_tokens", n_tokens, 1)):
        check_whole(name, value, least)
    if bins & (bins - 1):
        raise ValueError(f"bins is a power of two, so that two bins can become one, not {bins}")
    labels, sizes = group_labels(clt.wiring), clt.group_sizes
    collectors = [Collector(size, k, context, bins) for size in sizes]
    tokens = tokens_for(model, clt, texts, tokenizer, length)
    seen = 0
    for rows, found in read_texts(
        model, clt, tokens, batch_size=batch_size, max_tokens=max_tokens, bar=bar, desc="feature browser"
    ):
        with torch.no_grad():
            features = clt.encode(found.by_site(clt.sites.read), sparse=True)
        seen += features.shape[0]
        for collector, group in zip(collectors, features.groups, strict=True):
            collector.add(rows, group)
    name, first = next(iter(models_of(model, clt).items()))
    promotion = Promotion(first)
    tensors: dict[str, Tensor] = {}
    for group, (label, collector) in enumerate(zip(labels, collectors, strict=True)):
        tensors |= {f"{label}.{key}": value for key, value in _kept(collector).items()}
        words = promotion.top(clt, group, name, n_tokens)
        if words is not None:
            tensors |= {f"{label}.{key}": value for key, value in zip(TENSORS[-4:], words, strict=True)}
    known = tokenizer if tokenizer is not None else tokenizer_of(model)
    tensors |= _vocabulary(known)
    about = {
        "version": VERSION,
        "groups": dict(zip(labels, sizes, strict=True)),
        "layers": dict(zip(labels, clt.wiring.home, strict=True)),
        "n_tokens": max(seen, 1),
        "settings": {"k": k, "context": context, "bins": bins, "n_tokens": n_tokens, "length": tokens.length},
        "crosscoder": clt.wiring.name,
        "model": clt.host.model_name or "",
        "tensors": sorted(tensors),
    }
    return FeatureBrowser(about, tensors)


def _kept(collector: Collector) -> dict[str, Tensor]:
    names = ("tokens", "total", "largest", "histogram", "peaks", "windows", "activations")
    return {**{name: getattr(collector, name) for name in names}, "range": collector.ranges}


def _vocabulary(tokenizer: Any) -> dict[str, Tensor]:
    """Return every token's text: the bytes of all, one after another, and where each ends."""
    if tokenizer is None:
        return {}
    texts = [tokenizer.decode([i]).encode("utf-8") for i in range(len(tokenizer))]
    ends = torch.tensor([len(text) for text in texts]).cumsum(0)
    return {
        "vocabulary.bytes": torch.frombuffer(bytearray(b"".join(texts) or b" "), dtype=torch.uint8),
        "vocabulary.ends": ends,
    }
