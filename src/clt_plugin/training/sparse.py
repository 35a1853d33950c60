"""The step's arithmetic where few latents are active: one forward pass, equal to the dense one in values and gradients.

The encoder's product is dense, since it decides who is active. From there on only active entries are touched (and,
for JumpReLU, those within the bandwidth): a decode that sums decoder rows, and in the backward pass a decoder gradient
by rows, dot products of active rows with the output's gradient, and an encoder gradient that sums inputs. No other
(B, F) array is made, forward or backward. Where a group is dense the same pass computes it densely.

Shapes: B tokens, F latents, d coordinates read, o coordinates that a group writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clt_plugin.core import Activation, Crosscoder, Site
from clt_plugin.core.activations import activate_jointly
from clt_plugin.training._competition import competes, select
from clt_plugin.training._entries import Entries, cut, dot_rows, pieces_of, sum_rows
from clt_plugin.training._groups import by_site, read, score_scale
from clt_plugin.training._mesh import ALONE, Mesh
from clt_plugin.training._selection import SPARSE_FORMS, SparseForm
from clt_plugin.training.forward import ForwardPass, GroupActivity, about_group

SPARSE_BELOW = 0.1
"""The density of entries kept under which the sparse step is the faster: see ``benchmarks/training.py --crossover``."""

PATHS = ("auto", "dense", "sparse")


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
        pieces: The columns of all outputs side by side, cut into pieces.
        places: For each group the pieces that it writes, in the order of its decoder's columns.
        sizes: The width of every written site, in the order of the wiring.
    """

    entries: tuple[Entries | None, ...]
    pieces: tuple[slice, ...]
    places: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]

    def columns(self, group: int) -> list[slice]:
        """Return the columns of a group's decoder that write each of its pieces."""
        widths = [self.pieces[place].stop - self.pieces[place].start for place in self.places[group]]
        stops = list(accumulate(widths))
        return [slice(stop - width, stop) for stop, width in zip(stops, widths, strict=True)]


class _Decode(torch.autograd.Function):
    """What all groups write, (B, all outputs side by side), from ``*acts, *W_dec, *b_dec``."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, n_tokens: int, *tensors: Tensor) -> Tensor:
        n_groups = len(plan.entries)
        acts, weights, biases = tensors[:n_groups], tensors[n_groups : 2 * n_groups], tensors[2 * n_groups :]
        ctx.save_for_backward(*acts, *weights)
        ctx.plan = plan
        bias = torch.cat(biases)
        y = [bias[each].repeat(n_tokens, 1) for each in plan.pieces]
        for g, kept in enumerate(plan.entries):
            written = _written(kept, acts[g].detach(), weights[g].detach(), plan.columns(g))
            for place, part in zip(plan.places[g], written, strict=True):
                y[place] += part
        return torch.cat(y, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        n_groups = len(plan.entries)
        acts, weights = ctx.saved_tensors[:n_groups], ctx.saved_tensors[n_groups:]
        pieces = pieces_of(grad, plan.pieces)
        grad_acts, grad_weights = [], []
        for g, kept in enumerate(plan.entries):
            mine = [pieces[place] for place in plan.places[g]]
            of_acts, of_weight = _decode_gradients(kept, mine, acts[g], weights[g])
            grad_acts.append(of_acts)
            grad_weights.append(of_weight)
        return None, None, *grad_acts, *grad_weights, *grad.sum(0).split(plan.sizes)


def _written(kept: Entries | None, acts: Tensor, weight: Tensor, columns: Sequence[slice]) -> Iterator[Tensor]:
    """Give what a group writes by each of several columns of its decoder, (B, width)."""
    if kept is not None and kept.in_pieces:
        for piece in pieces_of(weight, columns):
            yield sum_rows(piece, kept.latents, kept.starts, acts)
        return
    whole = acts @ weight if kept is None else sum_rows(weight, kept.latents, kept.starts, acts)
    for each in columns:
        yield whole[:, each]


def _decode_gradients(
    kept: Entries | None, pieces: Sequence[Tensor], acts: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of a group's activations, (n,) or (B, F), and of its decoder, (F, o).

    Args:
        kept: Its entries kept, or None where it is dense.
        pieces: The gradient of what it writes, (B, o) in pieces side by side.
        acts: Its activations, (n,) or (B, F).
        weight: Its decoder, (F, o).
    """
    grad = torch.cat(list(pieces), dim=1)
    if kept is None:
        return grad @ weight.T, acts.T @ grad
    # By latent, so that both gather rows of the gradient, which is smaller than the decoder.
    by = kept.by_latent
    sorted_acts = acts.index_select(0, by.order)
    dots = dot_rows(weight, by.latents, by.starts, grad, by.tokens)
    grad_acts = torch.empty_like(acts).scatter_(0, by.order, dots)
    if not kept.in_pieces:
        return grad_acts, sum_rows(grad, by.tokens, by.starts, sorted_acts)
    sums = [sum_rows(piece, by.tokens, by.starts, sorted_acts) for piece in pieces]
    return grad_acts, torch.cat(sums, dim=1)


# ---------------------------------------------------------------- one pass


def forward_pass(
    crosscoder: Crosscoder,
    x: Tensor | Mapping[Site, Tensor],
    y: Tensor | Mapping[Site, Tensor],
    path: str = "auto",
    mesh: Mesh = ALONE,
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
        mesh: The processes that have the other latents and tokens: see `clt_plugin.training.parallel`.
        **more: Further attributes of the `ForwardPass`.
    """
    if path not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}, not {path!r}")
    wiring = crosscoder.wiring
    inputs, targets = by_site(x, wiring.read_sites), by_site(y, wiring.write_sites)
    reads = [read(crosscoder, g, inputs).to(crosscoder.dtype) for g in range(wiring.n_groups)]
    if crosscoder.activation.joint:
        found = _activate_jointly(crosscoder, reads, path, mesh)
    else:
        found = [_activate(crosscoder, g, reads[g], path, mesh) for g in range(wiring.n_groups)]
    outputs = _outputs(crosscoder, found, inputs, len(reads[0]), mesh)
    groups = tuple(
        GroupActivity(each.acts, each.pre, len(reads[g]), **each.form(), **about_group(crosscoder, g, reads[g]))
        for g, each in enumerate(found)
    )
    return ForwardPass(crosscoder, groups, inputs, targets, outputs, mesh=mesh, **more)


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


def _activate(crosscoder: Crosscoder, group: int, x: Tensor, path: str, mesh: Mesh) -> _Activated:
    h = _pre_activations(crosscoder, group, x)
    activation = crosscoder.activation
    kept, form, across = None, SPARSE_FORMS.get(type(activation)), competes(mesh, activation, crosscoder.training)
    if form is not None and (path != "dense" or across):
        threshold = None if crosscoder.threshold is None else crosscoder.threshold[group].detach()
        flat = _kept(crosscoder, activation, form, h.detach(), threshold, score_scale(crosscoder, group), mesh)
        kept = Entries(flat, *h.shape)
    if form is None or kept is None or not _is_sparse(kept.density, path):
        acts = _at(form, activation, h, kept.flat) if across and kept and form else crosscoder.activate(group, h)
        return _Activated(acts, h)
    return _sparsely(crosscoder, group, x, h, kept, form)


def _activate_jointly(crosscoder: Crosscoder, reads: Sequence[Tensor], path: str, mesh: Mesh) -> list[_Activated]:
    every, activation, sizes = range(len(reads)), crosscoder.activation, crosscoder.group_sizes
    hs = [_pre_activations(crosscoder, g, reads[g]) for g in every]
    threshold = None if crosscoder.threshold is None else crosscoder.threshold[0].detach()
    scales = [score_scale(crosscoder, g) for g in every]
    flat, form, across = None, SPARSE_FORMS.get(type(activation)), competes(mesh, activation, crosscoder.training)
    if form is not None and (path != "dense" or across):
        together = torch.cat([h.detach() for h in hs], dim=1)
        given = [scale for scale in scales if scale is not None]
        scale = torch.cat(given) if given else None
        flat = _kept(crosscoder, activation.over_groups(len(hs)), form, together, threshold, scale, mesh)
    if form is None or flat is None or not _is_sparse(len(flat) / max(1, together.numel()), path):
        if across and flat is not None and form is not None:
            acts = list(_at(form, activation, torch.cat(hs, dim=1), flat).split(sizes, dim=1))
        else:
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
    # One product with the bias added to it: `Crosscoder.pre_activations` adds it in a pass of its own. Under autocast
    # it is of lower precision, and all that follows is not.
    return torch.addmm(crosscoder.b_enc[group], x, crosscoder.W_enc[group]).to(crosscoder.dtype)


def _kept(
    crosscoder: Crosscoder, activation: Activation, form: SparseForm, h: Tensor, threshold: Any, scale: Any, mesh: Mesh
) -> Tensor:
    """Return the flat indices of pre-activations that are kept, by ascending token."""
    if competes(mesh, activation, crosscoder.training):
        return select(mesh, activation, h, scale)
    return form.keep(activation, h, threshold, scale, crosscoder.training)


def _at(form: SparseForm, activation: Activation, h: Tensor, flat: Tensor) -> Tensor:
    """Return dense activations, (B, F), where those selected are known by their flat indices."""
    selected = torch.zeros(h.numel(), dtype=torch.bool, device=h.device).index_fill_(0, flat, True)
    return form.act(activation, h, None) * selected.view_as(h)


def _sparsely(crosscoder: Crosscoder, group: int, x: Tensor, h: Tensor, kept: Entries, form: SparseForm) -> _Activated:
    """Return a group's activations at the entries kept; h has no part in the backward pass, and is not held."""
    pre = _PreActivations.apply(h.detach(), kept, x, crosscoder.W_enc[group], crosscoder.b_enc[group])
    threshold = None
    if crosscoder.activation.has_threshold and crosscoder.threshold is not None:
        threshold = crosscoder.threshold[group].index_select(0, kept.latents)
    return _Activated(form.act(crosscoder.activation, pre, threshold), pre, kept, form.complete)


def _is_sparse(density: float, path: str) -> bool:
    return path == "sparse" or (path == "auto" and density < SPARSE_BELOW)


def _outputs(
    crosscoder: Crosscoder, found: Sequence[_Activated], inputs: Mapping[Site, Tensor], n_tokens: int, mesh: Mesh
) -> dict[Site, Tensor]:
    """Decode what all groups did, {site: (B, d_site)}, with biases and affine skips."""
    layout, sites = crosscoder.layout, crosscoder.wiring.write_sites
    sizes = tuple(layout.width[site] for site in sites)
    pieces = cut(sizes, crosscoder.device)
    numbers, first = {}, 0
    for site, own in zip(sites, pieces, strict=True):
        numbers[site] = range(first, first + len(own))
        first += len(own)
    places = tuple(tuple(number for site in slices for number in numbers[site]) for slices in layout.write_slices)
    plan = _Plan(tuple(each.entries for each in found), tuple(chain.from_iterable(pieces)), places, sizes)
    biases, acts = [*crosscoder.b_dec], [each.acts for each in found]
    if mesh.n_latent == 1:
        y = _Decode.apply(plan, n_tokens, *acts, *crosscoder.W_dec, *biases)
    else:
        # What each process's latents write is summed, and biases are added once.
        nothing = [torch.zeros_like(bias) for bias in biases]
        y = mesh.over_latents(_Decode.apply(plan, n_tokens, *acts, *crosscoder.W_dec, *nothing)) + torch.cat(biases)
    # One split, whose backward pass is one concatenation: slices would each fill a whole gradient with zeros.
    outputs = dict(zip(sites, y.split(sizes, dim=1), strict=True))
    for site in sites:
        skip = crosscoder.skip(site, inputs)
        if skip is not None:
            outputs[site] = outputs[site] + skip
    return outputs
