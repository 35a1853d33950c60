"""Where in a data set features are active: the tokens, and the passages, for people to read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from clt_plugin.adapters._run import group_labels
from clt_plugin.attribution.corpus.stream import Seen, members_of, stream
from clt_plugin.attribution.graph import Graph, GraphError


def top_examples(
    model: Any,
    features: Any,
    texts: Iterable[Any],
    *,
    clt: Any = None,
    k: int = 5,
    n_tokens: int = 10,
    context: int = 10,
    batch_size: int = 8,
    max_tokens: int = 256,
    name: str = "clt",
    bar: bool = True,
) -> dict[str, dict[str, Any]]:
    """Find where features are most active in a data set, in one pass.

    The model runs as it is, whatever is attached to it. Special tokens, padding and the positions that the crosscoder
    excludes do not count.

    Args:
        model: An nnsight model, a TransformerBridge, or a transformers model.
        features: A `Graph`, for all of its features; or {layer: features}, a `supernode`, or (layer, feature) pairs.
        texts: Texts, or token ids (position,), of any lengths; read once.
        clt: The crosscoder, or a reference; by default the one that is attached to the model.
        k: How many passages of each feature: the best of as many texts, or pieces of texts.
        n_tokens: How many tokens of each feature.
        context: How many tokens of a passage come before and after the one that is most active.
        batch_size: How many texts run at a time.
        max_tokens: Longer texts are cut into pieces of so many tokens.
        name: The name under which the crosscoder is attached.
        bar: Whether to show progress.

    Returns:
        ``{"{group}_{latent}": {"top_tokens": [[token, largest activation], ...], "examples": [{"tokens": [...],
        "activations": [...]}, ...]}}``, the best first, as `Graph.to_html` takes it for ``feature_info``. Features that
        are never active have empty lists.

    Raises:
        EditError: There are no such features, or a text is of another kind.
        GraphError: A setting cannot be.
        AttachError: The crosscoder does not fit the model.
    """
    from clt_plugin.adapters.huggingface import check_fits, plain_model
    from clt_plugin.interventions.modes import find_crosscoder

    for setting, value, least in (("k", k, 1), ("n_tokens", n_tokens, 1), ("context", context, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise GraphError(f"{setting} is a whole number of at least {least}, not {value!r}")
    crosscoder = find_crosscoder(model, clt, name, None, mode="replace")
    assert crosscoder is not None
    if isinstance(features, Graph):
        rows = features.nodes[features.nodes["kind"] == "feature"]
        features = list(dict.fromkeys(zip(rows["group"], rows["feature"].tolist(), strict=True)))
    members = members_of(crosscoder, features)
    best = [_Best(k, n_tokens, context) for _ in members]
    numbers = {label: number for number, label in enumerate(group_labels(crosscoder.wiring))}
    with plain_model(model) as hf, torch.no_grad():
        host = check_fits(crosscoder, hf, "observe")
        for seen in stream(model, hf, host, crosscoder, texts, batch_size, max_tokens, True, bar):
            acts = _activations(seen, [(numbers[label], latent) for label, latent in members])
            for each, found in zip(best, acts, strict=True):
                each.add(seen, found)
    tokenizer = getattr(model, "tokenizer", None)
    return {f"{g}_{latent}": each.told(tokenizer) for (g, latent), each in zip(members, best, strict=True)}


def _activations(seen: Seen, members: list[tuple[int, int]]) -> Tensor:
    """Return the activations of some features, (n, batch, position), 0 where tokens do not count."""
    flat = torch.zeros(len(members), seen.counted.numel())
    places = seen.counted.cpu().flatten().nonzero()[:, 0]
    for g in {g for g, _ in members}:
        group = seen.active[g]
        number = torch.full((group.n_latents,), -1)
        chosen = [(i, latent) for i, (of, latent) in enumerate(members) if of == g]
        number[[latent for _, latent in chosen]] = torch.tensor([i for i, _ in chosen])
        at = number[group.latents.cpu()]
        flat[at[at >= 0], places[group.tokens.cpu()[at >= 0]]] = group.values.cpu().float()[at >= 0]
    return flat.view(len(members), *seen.counted.shape)


class _Best:
    """The best passages and tokens of one feature so far."""

    def __init__(self, k: int, n_tokens: int, context: int) -> None:
        self.k, self.n_tokens, self.context = k, n_tokens, context
        self.passages: list[tuple[float, list[int], list[float]]] = []
        self.tokens: dict[int, float] = {}

    def add(self, seen: Seen, acts: Tensor) -> None:
        """Take in a batch, with the feature's activations, (batch, position)."""
        ids = seen.ids
        values, places = acts.max(dim=1)
        for row in (values > 0).nonzero()[:, 0].tolist():
            value, at = float(values[row]), int(places[row])
            if len(self.passages) == self.k and value <= self.passages[-1][0]:
                continue
            part = slice(max(0, at - self.context), min(at + self.context + 1, int(seen.lengths[row])))
            self.passages.append((value, ids[row, part].tolist(), acts[row, part].tolist()))
            # Earlier ones stay ahead of equal ones.
            self.passages = sorted(self.passages, key=lambda passage: -passage[0])[: self.k]
        active = acts > 0
        for token, value in zip(ids[active.cpu()].tolist(), acts[active].tolist(), strict=True):
            self.tokens[token] = max(value, self.tokens.get(token, 0.0))

    def told(self, tokenizer: Any) -> dict[str, Any]:
        """Return it as plain data."""

        def text(token: int) -> str:
            return str(token) if tokenizer is None else tokenizer.decode([token])

        top = sorted(self.tokens.items(), key=lambda item: -item[1])[: self.n_tokens]
        return {
            "top_tokens": [[text(token), value] for token, value in top],
            "examples": [
                {"tokens": [text(token) for token in ids], "activations": values} for _, ids, values in self.passages
            ],
        }
