"""What a crosscoder's features say over a data set: texts run through a model a batch at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from clt_plugin.adapters._pass import Pass
from clt_plugin.adapters._run import Run, Visit
from clt_plugin.attribution.graph import GraphError
from clt_plugin.core.crosscoder import Crosscoder
from clt_plugin.core.features import SparseGroup


class Watch(Run):
    """Keeps what is active in one pass, of each group as soon as it is encoded: all groups at once would not fit.

    Args:
        crosscoder: The crosscoder.
        kept: The tokens that may count, (batch, position).
    """

    def __init__(self, crosscoder: Crosscoder, kept: Tensor) -> None:
        super().__init__(crosscoder, "observe")
        self.kept = kept
        self.found: dict[int, SparseGroup] = {}

    def begin(self, excluded: Tensor | None, now: Pass | None = None) -> None:
        """Start the pass; see `Run.begin`."""
        super().begin(excluded, now)
        self.counted = self.kept if excluded is None else self.kept & ~excluded.to(self.kept.device)

    def encode(self, group: int, visit: Visit) -> None:
        """Encode a group, and keep its active latents; see `Run.encode`."""

        def keep(name: str, value: Tensor) -> Tensor:
            if name == "features":
                self.found[group] = SparseGroup.of(value[self.counted])
            return value

        super().encode(group, keep)


@dataclass(frozen=True, eq=False)
class Seen:
    """One batch.

    Attributes:
        ids: (batch, position), with padding after each text.
        lengths: How many tokens each text has, (batch,).
        counted: Which tokens count, (batch, position) of bool.
        active: For each group its active latents; tokens are the counted ones, row after row.
    """

    ids: Tensor
    lengths: Tensor
    counted: Tensor
    active: Mapping[int, SparseGroup]


def stream(
    model: Any,
    hf: Any,
    host: Any,
    crosscoder: Crosscoder,
    texts: Iterable[Any],
    batch_size: int,
    max_tokens: int,
    skip_special: bool,
    bar: bool,
) -> Iterator[Seen]:
    """Run texts through a model, a batch at a time.

    Args:
        model: Whose tokenizer to use.
        hf: The plain model.
        host: What it is.
        crosscoder: The crosscoder.
        texts: Texts, or token ids (position,), of any lengths; one without tokens is passed over.
        batch_size: How many run at a time.
        max_tokens: Longer texts are cut into pieces of so many tokens, each with the text's BOS token.
        skip_special: Whether special tokens do not count.
        bar: Whether to show progress.
    """
    from tqdm.auto import tqdm

    from clt_plugin.interventions._engine import Engine

    if isinstance(texts, str):
        raise GraphError("texts are several: give one as [text]")
    if batch_size < 1 or max_tokens < 2:
        raise GraphError(f"batch_size is at least 1, max_tokens at least 2, not {batch_size} and {max_tokens}")
    tokenizer = getattr(model, "tokenizer", None)
    special = torch.tensor(tokenizer.all_special_ids if tokenizer is not None and skip_special else [])
    total = len(texts) if isinstance(texts, Sized) else None
    device = next(hf.parameters()).device
    with tqdm(total=total, desc="texts", unit="text", disable=not bar) as progress:

        def pieces() -> Iterator[Tensor]:
            for text in texts:
                yield from _pieces(tokenizer, text, max_tokens)
                progress.update()

        rows = pieces()
        while batch := list(islice(rows, batch_size)):
            # Padding comes last, where no token of a causal model sees it: nothing need be masked, and no row of
            # attention is left without a key. (Without any mask, transformers would warn of it.)
            ids = pad_sequence(batch, batch_first=True)
            lengths = torch.tensor([len(row) for row in batch])
            kept = (torch.arange(ids.shape[1]) < lengths[:, None]) & ~torch.isin(ids, special)
            watch = Watch(crosscoder, kept.to(crosscoder.device))
            with Engine(hf, host, watch):
                # Not the head: its logits are of no use, and by far the largest thing in the run.
                here = ids.to(device)
                hf.base_model(input_ids=here, attention_mask=torch.ones_like(here), use_cache=False)
                seen = Seen(ids, lengths, watch.counted, dict(watch.found))
            yield seen


def _pieces(tokenizer: Any, text: Any, max_tokens: int) -> Iterator[Tensor]:
    """Return the token ids of a text, (position,), in pieces; of one without tokens nothing."""
    from clt_plugin.interventions.edits import EditError

    if isinstance(text, str):
        if tokenizer is None:
            raise EditError("this model has no tokenizer: give token ids instead of text")
        text = tokenizer(text, verbose=False)["input_ids"] if text else []
    ids = torch.as_tensor(text)
    if ids.ndim != 1 or (len(ids) and ids.is_floating_point()):
        raise EditError(f"a text is a string, or token ids (position,), not ids of shape {tuple(ids.shape)}")
    bos = getattr(tokenizer, "bos_token_id", None)
    first = ids[:1].long() if len(ids) and bos is not None and int(ids[0]) == bos else ids[:0].long()
    for piece in ids[len(first) :].long().split(max_tokens - len(first)):
        if len(piece) or len(first):
            yield torch.cat((first, piece))


def members_of(crosscoder: Crosscoder, features: Any) -> tuple[tuple[str, int], ...]:
    """Return (label, latent) of every feature asked for, none of none, and refuse those that are not there."""
    from clt_plugin.interventions._edit import check_features
    from clt_plugin.interventions.edits import EditError, Supernode

    if not isinstance(features, Supernode | Mapping):
        by_layer: dict[Any, list[Any]] = {}
        for pair in features:
            if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
                raise EditError(f"features are {{layer: features}} or (layer, feature) pairs, not {pair!r}")
            by_layer.setdefault(pair[0], []).append(pair[1])
        features = by_layer
    if not features:
        return ()
    group = features if isinstance(features, Supernode) else Supernode.of(None, features)
    for label, latents in group.members:
        check_features(crosscoder, label, latents)
    return tuple((label, latent) for label, latents in group.members for latent in latents)
