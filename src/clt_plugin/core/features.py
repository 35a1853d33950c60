"""Sparse activations, and the decode that touches only the decoder rows of active latents.

Canonical shapes: a group's activations are (..., F); flattened, (T, F) with T tokens. A decoder is (F, out).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from clt_plugin.core.store import streamed_product

SPARSE_BELOW = 0.035
"""The density under which the sparse decode is the faster one, whatever the shape: see ``benchmarks/decode.py``."""


@dataclass(frozen=True)
class SparseGroup:
    """One group's active latents, sorted by token, then latent.

    Attributes:
        tokens: The flat index of each active latent's token, (n_active,).
        latents: Its index within the group, (n_active,).
        values: Its activation, (n_active,); may carry gradients.
        n_latents: F.
    """

    tokens: Tensor
    latents: Tensor
    values: Tensor
    n_latents: int

    @classmethod
    def of(cls, acts: Tensor) -> SparseGroup:
        """Gather the non-zero entries of (T, F) activations."""
        tokens, latents = acts.nonzero(as_tuple=True)
        return cls(tokens, latents, acts[tokens, latents], acts.shape[-1])


@dataclass(frozen=True)
class SparseFeatures:
    """Sparse activations of all groups: what ``encode(x, sparse=True)`` returns and ``decode`` accepts.

    Attributes:
        groups: For each group its active latents.
        shape: The leading shape of the tokens, such as (batch, position).
        stacked: Whether decoding gives one stacked tensor, as the input was, or a mapping by site.
    """

    groups: tuple[SparseGroup, ...]
    shape: tuple[int, ...]
    stacked: bool = True

    def __len__(self) -> int:
        """Return the number of active latents over all groups and tokens."""
        return sum(len(group.values) for group in self.groups)

    @property
    def indices(self) -> Tensor:
        """(group, flat token, latent) of every active latent, (n_active, 3)."""
        rows = [
            torch.stack((torch.full_like(g.tokens, i), g.tokens, g.latents), dim=1) for i, g in enumerate(self.groups)
        ]
        return torch.cat(rows)

    @property
    def values(self) -> Tensor:
        """The activation of every active latent, (n_active,), in the order of `indices`."""
        return torch.cat([group.values for group in self.groups])

    def with_values(self, values: Tensor) -> SparseFeatures:
        """Return the same active latents with other activations, (n_active,)."""
        parts = values.split([len(group.values) for group in self.groups])
        return replace(self, groups=tuple(replace(g, values=v) for g, v in zip(self.groups, parts, strict=True)))

    def dense(self, group: int) -> Tensor:
        """Return one group's activations, (..., F)."""
        g = self.groups[group]
        flat = g.values.new_zeros(math.prod(self.shape), g.n_latents)
        return flat.index_put((g.tokens, g.latents), g.values).reshape(*self.shape, g.n_latents)

    def to_dense(self) -> Tensor | tuple[Tensor, ...]:
        """Return all activations: (n_groups, ..., F) where the groups are of one size, else one tensor a group."""
        tensors = tuple(self.dense(group) for group in range(len(self.groups)))
        return stack_groups(tensors) if self.stacked else tensors


def stack_groups(tensors: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """Stack one tensor a group where their shapes agree; else return them as a tuple."""
    tensors = tuple(tensors)
    return torch.stack(tensors) if len({tensor.shape for tensor in tensors}) == 1 else tensors


def weighted_row_sum(
    rows: "Float[Tensor, 'r out']",
    tokens: "Int[Tensor, ' n']",
    indices: "Int[Tensor, ' n']",
    values: "Float[Tensor, ' n']",
    n_tokens: int,
) -> "Float[Tensor, 't out']":
    """Sum ``values[i] * rows[indices[i]]`` into row ``tokens[i]`` of the result.

    Args:
        rows: (R, out).
        tokens: (n,), sorted.
        indices: (n,), into rows.
        values: (n,).
        n_tokens: T.

    Returns:
        (T, out). Differentiable in rows and values.
    """
    starts = torch.searchsorted(tokens, torch.arange(n_tokens, device=tokens.device))
    return F.embedding_bag(indices, rows, starts, mode="sum", per_sample_weights=values.to(rows.dtype))


ReadRows = Callable[[Tensor | None], Tensor]
"""Decoder rows (n, out) of the latents given, or all of them for None."""


class _Decode(torch.autograd.Function):
    """acts @ decoder from the active entries, with the exact dense gradient for acts.

    The gradient of an inactive latent is not zero: it is what switching it on would do. So the backward pass
    reads the whole decoder, again rather than still, which keeps lazily read weights out of memory.
    """

    @staticmethod
    def forward(ctx: Any, acts: Tensor, weight: Tensor | None, read_rows: ReadRows) -> Tensor:
        group = SparseGroup.of(acts)
        ctx.read_rows, ctx.group, ctx.has_weight = read_rows, group, weight is not None
        ctx.save_for_backward(*(() if weight is None else (weight,)))
        return _sparse_product(group, weight, read_rows, len(acts))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        # Not as a decorator: a decorated function travels to a remote model without its globals.
        return once_differentiable(_decode_gradients)(ctx, grad)


def _decode_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    weight = ctx.saved_tensors[0] if ctx.has_weight else None
    grad_acts = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_acts = grad @ (ctx.read_rows(None) if weight is None else weight).T
    if weight is not None and ctx.needs_input_grad[1]:
        group = ctx.group
        by_latent = torch.argsort(group.latents, stable=True)
        latents, tokens, values = group.latents[by_latent], group.tokens[by_latent], group.values[by_latent]
        grad_weight = weighted_row_sum(grad.contiguous(), latents, tokens, values, len(weight))
    return grad_acts, grad_weight, None


def _sparse_product(group: SparseGroup, weight: Tensor | None, read_rows: ReadRows, n_tokens: int) -> Tensor:
    """Decode (T, out) from active latents, reading only their rows where the weights are not in memory."""
    if weight is not None:
        return weighted_row_sum(weight, group.tokens, group.latents, group.values, n_tokens)
    used, position = group.latents.unique(return_inverse=True)
    rows = read_rows(used)
    return weighted_row_sum(rows, group.tokens, position, group.values, n_tokens)


def decode_sparse_group(group: SparseGroup, weight: Tensor | None, read_rows: ReadRows, n_tokens: int) -> Tensor:
    """Decode one group of sparse activations to (n_tokens, out): gradients reach the values and the weight."""
    return _sparse_product(group, weight, read_rows, n_tokens)


def decode_dense_group(acts: Tensor, weight: Tensor | None, read_rows: ReadRows, path: str = "auto") -> Tensor:
    """Decode one group's (T, F) activations to (T, out).

    Args:
        acts: (T, F).
        weight: The decoder (F, out), where it is in memory.
        read_rows: Reads decoder rows where it is not.
        path: ``"dense"``, ``"sparse"``, or ``"auto"``: by the measured density. Both give the same result and the
            same first gradients; only the dense path can be differentiated twice.
    """
    # A subclass of Tensor (a fake tensor, say) may have no values to count.
    plain = type(acts) in (Tensor, torch.nn.Parameter) and not acts.is_meta
    if path == "auto":
        sparse = plain and int(acts.count_nonzero()) < SPARSE_BELOW * acts.numel()
    else:
        sparse = path == "sparse"
    if not sparse:
        return streamed_product(acts, lambda: read_rows(None)) if weight is None else acts @ weight
    return _Decode.apply(acts, weight, read_rows)
