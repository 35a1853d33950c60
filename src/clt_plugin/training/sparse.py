"""The step's arithmetic where few latents are active: one forward pass, equal to the dense one in values and gradients.

The encoder's product is dense, since it decides who is active. From there on only active entries are touched (and,
for JumpReLU, those within the bandwidth): a decode that sums decoder rows, and in the backward pass a decoder gradient
by rows, dot products of active rows with the output's gradient, and an encoder gradient that sums inputs. No other
(B, F) array is made, forward or backward. Where a group is dense the same pass computes it densely.

Shapes: B tokens, F latents, d coordinates read, o coordinates that a group writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from clt_plugin.core import Crosscoder, Site
from clt_plugin.core.activations import activate_jointly
from clt_plugin.training._groups import by_site, read, score_scale
from clt_plugin.training._selection import SPARSE_FORMS, SparseForm
from clt_plugin.training.forward import ForwardPass, GroupActivity, about_group

SPARSE_BELOW = 0.1
"""The density of entries kept under which the sparse step is the faster: see ``benchmarks/training.py --crossover``."""

PATHS = ("auto", "dense", "sparse")


@dataclass(frozen=True, eq=False)
class Entries:
    """Which entries of a group's (B, F) activations are kept.

    Attributes:
        flat: Their flat indices, token * F + latent, (n,): by ascending token, in any order within one.
        n_tokens: B.
        n_latents: F.
    """

    flat: Tensor
    n_tokens: int
    n_latents: int

    @property
    def density(self) -> float:
        """The share of all entries that is kept."""
        return len(self.flat) / max(1, self.n_tokens * self.n_latents)

    @cached_property
    def starts(self) -> Tensor:
        """Where each token's entries start, (B,)."""
        # Flat indices are in order as far as tokens go, which is all that a search for a token's first one needs.
        first = torch.arange(0, self.n_tokens * self.n_latents, self.n_latents, device=self.flat.device)
        return torch.searchsorted(self.flat, first)

    @cached_property
    def tokens(self) -> Tensor:
        """The token of each entry, (n,), ascending."""
        # Counted out: a division of every flat index takes several times as long.
        counts = torch.diff(self.starts, append=self.starts.new_tensor([len(self.flat)]))
        return torch.repeat_interleave(counts, output_size=len(self.flat))

    @cached_property
    def latents(self) -> Tensor:
        """The latent of each entry, (n,)."""
        return self.flat - self.tokens * self.n_latents

    @cached_property
    def by_latent(self) -> ByLatent:
        """The entries by latent, then token: sorted once for all gradients."""
        # Sorting 16 bits takes a third of the time that 64 take.
        few = torch.int16 if self.n_latents < 2**15 else torch.int32
        latents, order = self.latents.to(few).sort(stable=True)
        starts = torch.searchsorted(latents, torch.arange(self.n_latents, dtype=few, device=latents.device))
        return ByLatent(order, self.tokens.index_select(0, order), starts)


@dataclass(frozen=True, eq=False)
class ByLatent:
    """Entries by latent, then token.

    Attributes:
        order: Which entry each is, (n,).
        tokens: Its token, (n,).
        starts: Where each latent's entries start, (F,).
    """

    order: Tensor
    tokens: Tensor
    starts: Tensor


def sum_rows(rows: Tensor, indices: Tensor, starts: Tensor, values: Tensor) -> Tensor:
    """Return sums of ``values[i] * rows[indices[i]]``, one for each start, (n_sums, width).

    Args:
        rows: (n_rows, width).
        indices: Into rows, (n,), those of each sum side by side.
        starts: Where those of each sum start, (n_sums,).
        values: (n,); the sums are differentiable in them.
    """
    return F.embedding_bag(indices, rows, starts, mode="sum", per_sample_weights=values)


# ---------------------------------------------------------------- gradients


def _transposed(values: Tensor) -> Tensor:
    """Return a transposed copy, made in pieces that stay in a processor's cache: in half the time that one takes."""
    result = values.new_empty(values.shape[::-1])
    for rows, columns in zip(values.split(512), result.split(512, dim=1), strict=True):
        columns.copy_(rows.T)
    return result


class _PreActivations(torch.autograd.Function):
    """Pre-activations at the entries kept, with gradients of ``x @ W_enc + b_enc`` from these alone."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, entries: Entries, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
        ctx.save_for_backward(x, W_enc)
        ctx.entries = entries
        return h.view(-1).index_select(0, entries.flat).to(W_enc.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc = ctx.saved_tensors
        kept: Entries = ctx.entries
        grad_x = grad_W = grad_b = None
        if ctx.needs_input_grad[2]:
            grad_x = sum_rows(W_enc.T.contiguous(), kept.latents, kept.starts, grad)
        if ctx.needs_input_grad[3]:
            by = kept.by_latent
            grad_W = _transposed(sum_rows(x, by.tokens, by.starts, grad.index_select(0, by.order)))
        if ctx.needs_input_grad[4]:
            grad_b = grad.new_zeros(kept.n_latents).index_add_(0, kept.latents, grad)
        return None, None, grad_x, grad_W, grad_b


@dataclass(frozen=True, eq=False)
class _Plan:
    """What `_Decode` needs besides tensors.

    Attributes:
        entries: For each group its entries kept, or None where it is dense.
        columns: For each group (columns of all outputs side by side, columns of the group's decoder), run by run.
        sizes: The width of every written site, in the order of the wiring.
    """

    entries: tuple[Entries | None, ...]
    columns: tuple[tuple[tuple[slice, slice], ...], ...]
    sizes: tuple[int, ...]

    def of_group(self, group: int, y: Tensor) -> Tensor:
        """Return the columns of (B, all outputs) that a group writes, (B, o), contiguous."""
        parts = [y[:, columns] for columns, _ in self.columns[group]]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).contiguous()


class _Decode(torch.autograd.Function):
    """What all groups write, (B, all outputs side by side), from ``*acts, *W_dec, *b_dec``."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, n_tokens: int, *tensors: Tensor) -> Tensor:
        n_groups = len(plan.entries)
        acts, weights, biases = tensors[:n_groups], tensors[n_groups : 2 * n_groups], tensors[2 * n_groups :]
        ctx.save_for_backward(*acts, *weights)
        ctx.plan = plan
        y = torch.cat(biases).repeat(n_tokens, 1)
        for g, kept in enumerate(plan.entries):
            if kept is None:
                part = acts[g] @ weights[g]
            else:
                part = sum_rows(weights[g].detach(), kept.latents, kept.starts, acts[g].detach())
            for here, there in plan.columns[g]:
                y[:, here] += part[:, there]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        n_groups = len(plan.entries)
        acts, weights = ctx.saved_tensors[:n_groups], ctx.saved_tensors[n_groups:]
        grad_acts, grad_weights = [], []
        for g, kept in enumerate(plan.entries):
            of_acts, of_weight = _decode_gradients(kept, plan.of_group(g, grad), acts[g], weights[g])
            grad_acts.append(of_acts)
            grad_weights.append(of_weight)
        return None, None, *grad_acts, *grad_weights, *grad.sum(0).split(plan.sizes)


def _decode_gradients(kept: Entries | None, grad: Tensor, acts: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of a group's activations, (n,) or (B, F), and of its decoder, (F, o).

    The decoder's gradient G is linear in the activations, ``G_i = sum_t a_ti g_t`` with g the output's gradient, so
    that the derivative of ``<G, W>`` by an activation is ``g_t . W_i``: the activation's gradient. Sorted by latent,
    both gather rows of g, which is smaller than the decoder.
    """
    if kept is None:
        return grad @ weight.T, acts.T @ grad
    by = kept.by_latent
    with torch.enable_grad():
        sorted_acts = acts.index_select(0, by.order).requires_grad_()
        grad_weight = sum_rows(grad, by.tokens, by.starts, sorted_acts)
    (grad_sorted,) = torch.autograd.grad(grad_weight, sorted_acts, weight)
    return torch.empty_like(acts).scatter_(0, by.order, grad_sorted), grad_weight.detach()


# ---------------------------------------------------------------- one pass


def forward_pass(
    crosscoder: Crosscoder,
    x: Tensor | Mapping[Site, Tensor],
    y: Tensor | Mapping[Site, Tensor],
    path: str = "auto",
    **more: Any,
) -> ForwardPass:
    """Run a crosscoder over a batch, sparse where sparse; the same values and gradients as `ForwardPass.of`.

    Gradients reach every parameter, x, and whatever penalties take from `GroupActivity`; they can't be differentiated
    again where a group is sparse. Among equal scores TopK and BatchTopK may choose other latents than the dense pass.

    Args:
        crosscoder: In memory, and in training mode if it is a BatchTopK without a measured threshold.
        x: What it reads, stacked (n_read_sites, B, d) or {site: (B, d_site)}.
        y: What it should write, stacked or by site.
        path: ``"sparse"``, ``"dense"``, or ``"auto"``: sparse for each group of which less than `SPARSE_BELOW` is kept.
            Activations that `SPARSE_FORMS` does not know are dense.
        **more: Further attributes of the `ForwardPass`.
    """
    if path not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}, not {path!r}")
    wiring = crosscoder.wiring
    inputs, targets = by_site(x, wiring.read_sites), by_site(y, wiring.write_sites)
    reads = [read(crosscoder, g, inputs).to(crosscoder.dtype) for g in range(wiring.n_groups)]
    if crosscoder.activation.joint:
        found = _activate_jointly(crosscoder, reads, path)
    else:
        found = [_activate(crosscoder, g, reads[g], path) for g in range(wiring.n_groups)]
    outputs = _outputs(crosscoder, found, inputs, len(reads[0]))
    groups = tuple(
        GroupActivity(each.acts, each.pre, len(reads[g]), **each.form(), **about_group(crosscoder, g, reads[g]))
        for g, each in enumerate(found)
    )
    return ForwardPass(crosscoder, groups, inputs, targets, outputs, **more)


@dataclass(frozen=True, eq=False)
class _Activated:
    """What one group did: activations and pre-activations, (B, F), or those of the entries kept, (n,)."""

    acts: Tensor
    pre: Tensor
    entries: Entries | None = None
    complete: bool = True

    def form(self) -> dict[str, Any]:
        """Return what a `GroupActivity` says of sparse activations, as keyword arguments."""
        if self.entries is None:
            return {}
        return {"tokens": self.entries.tokens, "latents": self.entries.latents, "complete": self.complete}


def _activate(crosscoder: Crosscoder, group: int, x: Tensor, path: str) -> _Activated:
    h = _pre_activations(crosscoder, group, x)
    kept, form = None, SPARSE_FORMS.get(type(crosscoder.activation))
    if form is not None and path != "dense":
        threshold = None if crosscoder.threshold is None else crosscoder.threshold[group].detach()
        scale = score_scale(crosscoder, group)
        flat = form.keep(crosscoder.activation, h.detach(), threshold, scale, crosscoder.training)
        kept = Entries(flat, *h.shape)
    if form is None or kept is None or not _is_sparse(kept.density, path):
        return _Activated(crosscoder.activate(group, h), h)
    return _sparsely(crosscoder, group, x, h, kept, form)


def _activate_jointly(crosscoder: Crosscoder, reads: Sequence[Tensor], path: str) -> list[_Activated]:
    every, activation, sizes = range(len(reads)), crosscoder.activation, crosscoder.group_sizes
    hs = [_pre_activations(crosscoder, g, reads[g]) for g in every]
    threshold = None if crosscoder.threshold is None else crosscoder.threshold[0].detach()
    scales = [score_scale(crosscoder, g) for g in every]
    form = SPARSE_FORMS.get(type(activation))
    flat = None
    if form is not None and path != "dense":
        together = torch.cat([h.detach() for h in hs], dim=1)
        given = [scale for scale in scales if scale is not None]
        scale = torch.cat(given) if given else None
        flat = form.keep(activation.over_groups(len(hs)), together, threshold, scale, crosscoder.training)
    if form is None or flat is None or not _is_sparse(len(flat) / max(1, together.numel()), path):
        acts = activate_jointly(activation, hs, threshold, scales, crosscoder.training)
        return [_Activated(act, h) for act, h in zip(acts, hs, strict=True)]
    tokens, starts = flat // sum(sizes), [sum(sizes[:g]) for g in every]
    latents = flat - tokens * sum(sizes)
    result = []
    for g in every:
        mine = (latents >= starts[g]) & (latents < starts[g] + sizes[g])
        kept = Entries(tokens[mine] * sizes[g] + latents[mine] - starts[g], *hs[g].shape)
        result.append(_sparsely(crosscoder, g, reads[g], hs[g], kept, form))
    return result


def _pre_activations(crosscoder: Crosscoder, group: int, x: Tensor) -> Tensor:
    # One product with the bias added to it: `Crosscoder.pre_activations` adds it in a pass of its own.
    return torch.addmm(crosscoder.b_enc[group], x, crosscoder.W_enc[group])


def _sparsely(crosscoder: Crosscoder, group: int, x: Tensor, h: Tensor, kept: Entries, form: SparseForm) -> _Activated:
    """Return a group's activations at the entries kept; h has no part in the backward pass, and is not held."""
    pre = _PreActivations.apply(h.detach(), kept, x, crosscoder.W_enc[group], crosscoder.b_enc[group])
    threshold = None
    if crosscoder.activation.has_threshold and crosscoder.threshold is not None:
        threshold = crosscoder.threshold[group].index_select(0, kept.latents)
    return _Activated(form.act(crosscoder.activation, pre, threshold), pre, kept, form.complete)


def _is_sparse(density: float, path: str) -> bool:
    return path == "sparse" or density < SPARSE_BELOW


def _outputs(
    crosscoder: Crosscoder, found: Sequence[_Activated], inputs: Mapping[Site, Tensor], n_tokens: int
) -> dict[Site, Tensor]:
    """Decode what all groups did, {site: (B, d_site)}, with biases and affine skips."""
    layout, sites = crosscoder.layout, crosscoder.wiring.write_sites
    sizes = tuple(layout.width[site] for site in sites)
    starts = {site: sum(sizes[:i]) for i, site in enumerate(sites)}
    columns = tuple(_runs(slices, starts) for slices in layout.write_slices)
    plan = _Plan(tuple(each.entries for each in found), columns, sizes)
    y = _Decode.apply(plan, n_tokens, *(each.acts for each in found), *crosscoder.W_dec, *crosscoder.b_dec)
    # One split, whose backward pass is one concatenation: slices would each fill a whole gradient with zeros.
    outputs = dict(zip(sites, y.split(sizes, dim=1), strict=True))
    for site in sites:
        skip = crosscoder.skip(site, inputs)
        if skip is not None:
            outputs[site] = outputs[site] + skip
    return outputs


def _runs(slices: Mapping[Site, slice], starts: Mapping[Site, int]) -> tuple[tuple[slice, slice], ...]:
    """Pair the columns of all outputs side by side with those of a group's decoder; neighbours make one run."""
    runs: list[tuple[slice, slice]] = []
    for site, there in slices.items():
        here = slice(starts[site], starts[site] + there.stop - there.start)
        if runs and runs[-1][0].stop == here.start:
            here, there = slice(runs[-1][0].start, here.stop), slice(runs[-1][1].start, there.stop)
            runs.pop()
        runs.append((here, there))
    return tuple(runs)
