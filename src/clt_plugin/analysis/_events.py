"""Products of decoder vectors with what tokens have, where latents are active."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 2**24
"""So many numbers at a time."""


def row_products(vectors: Tensor, places: Tensor, others: Tensor, tokens: Tensor) -> Tensor:
    """Return ``<vectors[places[i]], others[tokens[i]]>`` for every i, (n,), a block at a time.

    Args:
        vectors: (m, d).
        places: (n,), into vectors.
        others: (tokens, d).
        tokens: (n,), into others.
    """
    others = others.to(vectors.dtype)
    size = max(1, _BLOCK // max(1, vectors.shape[1]))
    blocks = zip(places.split(size), tokens.split(size), strict=True)
    parts = [(vectors[place] * others[token]).sum(-1) for place, token in blocks]
    return torch.cat(parts) if parts else vectors.new_zeros(0)
