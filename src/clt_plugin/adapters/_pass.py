"""What passes through a model in one forward pass: which tokens, at which positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pass:
    """One forward pass.

    Attributes:
        ids: Token ids, (batch, position); None where embeddings were given instead.
        positions: Each token's index, counted from its row's first real token, (batch, position); in generation the
            cache counts too. Padding has negative ones.
        kept: False at padding, (batch, position).
        lengths: How many real tokens each row has so far, (batch,).
        generated: Which tokens were generated, not given, (batch, position).
    """

    ids: Tensor | None
    positions: Tensor
    kept: Tensor
    lengths: Tensor
    generated: Tensor

    @classmethod
    def of(
        cls, ids: Tensor | None, shape: tuple[int, int], mask: Tensor | None = None, past: int = 0, prompt: int = 0
    ) -> Pass:
        """Describe a pass.

        Args:
            ids: Token ids, (batch, position), or None.
            shape: (batch, position).
            mask: Which tokens are real, (batch, past + position), or None for all.
            past: How many positions the cache holds.
            prompt: How many positions of the cache and this pass were given; 0 for: all of a pass without a cache,
                none of one with it.
        """
        seen = past + shape[1]
        mask = torch.ones(shape[0], seen, dtype=torch.bool) if mask is None else mask.bool().cpu()
        if mask.shape[1] < seen:
            # Masks over a sliding window forget the text's beginning: it was real.
            mask = torch.nn.functional.pad(mask, (seen - mask.shape[1], 0), value=True)
        mask = mask.expand(shape[0], -1)
        counted = mask.long().cumsum(-1)
        kept = mask[:, past:seen]
        positions = torch.where(kept, counted[:, past:seen] - 1, -1)
        index = torch.arange(past, seen).expand(shape)
        given = prompt or (seen if past == 0 else 0)
        return cls(ids, positions, kept, counted[:, seen - 1], index >= given)
