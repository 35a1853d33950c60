"""What makes one attention score of a run: the frozen linear maps of its query and its key.

The attention module does its own projections, norms of queries and keys, and rotary embedding; queries and keys are
seen as they arrive at the attention interface of transformers. With the denominators of those norms frozen they are
affine in what the module reads, and their linear part is asked for by differentiating.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clt_plugin.adapters._attention import blocks_of, part_of, take_over
from clt_plugin.adapters._norms import FrozenNorm
from clt_plugin.attribution.engine.linear import FrozenMap
from clt_plugin.attribution.engine.readings import Reading, Readings, order_of


@dataclass(frozen=True, eq=False)
class Side:
    """A query, or a key, at one position, as a function of the residual stream that enters the layer there.

    Attributes:
        position: Where.
        value: In the run, (d_head,).
        weight: The linear part, the norm before attention folded in, (d_head, d).
        constant: What it holds whatever is read, (d_head,).
    """

    position: int
    value: Tensor
    weight: Tensor
    constant: Tensor


@dataclass(frozen=True, eq=False)
class Score:
    """One attention score, and what the model makes of it.

    Attributes:
        query: The query's side.
        key: The key's.
        scaling: What their product is multiplied with.
        softcap: Scores x then become ``softcap tanh(x / softcap)``; None where they are used as they are.
        row: The scores of the query with every key, scaled, before the softcap, (position,).
        weights: What becomes of them: capped, masked, normalised, (position,).
        visible: Which keys the mask lets the query see, (position,).
    """

    query: Side
    key: Side
    scaling: float
    softcap: float | None
    row: Tensor
    weights: Tensor
    visible: Tensor

    def readings(self, layer: int) -> Readings:
        """Return what the query's components, then the key's, read."""
        n, device = len(self.query.value), self.row.device
        sides, parts = (self.query, self.key), []
        rows = torch.arange(2 * n, device=device)
        for first, side in zip((0, n), sides, strict=True):
            positions = torch.full((n,), side.position, device=device)
            parts.append(Reading(layer, "resid_pre", rows[first : first + n], positions, side.weight))
        constants, values = (torch.cat([getattr(side, name) for side in sides]) for name in ("constant", "value"))
        positions = torch.cat([part.positions for part in parts])
        last = torch.full_like(rows, order_of(layer, "resid_pre"))
        return Readings(tuple(parts), constants, values, positions, last)


def score_of(hf: nn.Module, frozen: FrozenMap, layer: int, head: int, query: int, key: int) -> Score:
    """Find what makes a score.

    Args:
        hf: The plain model.
        frozen: The map of a run of it.
        layer: The layer.
        head: Which of its heads.
        query: The position that looks.
        key: The position that is looked at.
    """
    host, recording = frozen.host, frozen.recording
    like: dict[str, Any] = {"dtype": frozen.dtype, "device": frozen.device}
    asked = torch.promote_types(frozen.dtype, torch.float32)
    module = part_of(blocks_of(hf, host)[layer], host.architecture.attention)
    name = host.architecture.pre_attention_norm
    before = None if name is None else recording.norms[layer, name]
    x = frozen.value(layer, "resid_pre")[None] if before is None else before.y
    with _Asked(hf, frozen, module) as ask, torch.no_grad():
        # The norms of queries and keys are frozen as they are in this call, the first.
        queries, keys, mask = ask(layer, x.to(asked))
        group = queries.shape[0] // keys.shape[0]
        run_query, run_keys = queries[head], keys[head // group]
        with torch.enable_grad():
            zero = torch.zeros_like(x, dtype=asked).requires_grad_()
            queries, keys, _ = ask(layer, zero)
            at = (queries[head, query], keys[head // group, key])
            weights = [_jacobian(vector, zero, place) for vector, place in zip(at, (query, key), strict=True)]
        constants = [vector.detach() for vector in at]
    sides = []
    for place, value, weight, constant in zip(
        (query, key), (run_query[query], run_keys[key]), weights, constants, strict=True
    ):
        if before is not None:
            norm = before.to(asked, weight.device)
            constant = constant + weight @ norm.bias
            weight = norm.transposed(weight, norm.scale[0, place])
        sides.append(Side(place, value.to(**like), weight.to(**like), constant.to(**like)))
    row = ask.scaling * (run_keys @ run_query[query])
    capped = row if ask.softcap is None else ask.softcap * torch.tanh(row / ask.softcap)
    hidden = torch.zeros_like(row) if mask is None else mask[0, min(head, mask.shape[1] - 1), query, : len(row)]
    return Score(
        query=sides[0],
        key=sides[1],
        scaling=ask.scaling,
        softcap=ask.softcap,
        row=row.to(**like),
        weights=(capped + hidden).softmax(-1).to(**like),
        # What a mask hides is very negative in any dtype.
        visible=(hidden > -1e4).to(frozen.device),
    )


class _Asked:
    """An attention module that is asked for its queries and keys, its own norms frozen as in the first call.

    Args:
        hf: The plain model.
        frozen: The map, with its recording.
        module: The attention module.
    """

    def __init__(self, hf: nn.Module, frozen: FrozenMap, module: nn.Module) -> None:
        self.hf, self.frozen, self.module = hf, frozen, module
        self.scaling, self.softcap = 1.0, None
        self._norms: dict[str, FrozenNorm] = {}
        self._seen: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> _Asked:
        with ExitStack() as stack:
            take_over(stack, self.hf, self.frozen.host, self._attend)
            for name, part in self.module.named_modules():
                if "norm" in type(part).__name__.lower():
                    hook = part.register_forward_hook(partial(self._normalise, name), prepend=True)
                    stack.callback(hook.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __call__(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the queries, (heads, position, d_head), the keys, and the mask or None, for what the module reads."""
        self.frozen.recording.calls[layer].repeat(self.module, x)
        assert self._seen is not None
        return self._seen

    def _attend(
        self, layer: int, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        self.scaling, self.softcap = kwargs["scaling"], kwargs.get("softcap")
        self._seen = query[0], key[0], mask
        return value.new_zeros(*query.transpose(1, 2).shape[:3], value.shape[-1]), None

    def _normalise(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if name not in self._norms:
            self._norms[name] = FrozenNorm.of(module, args[0], output, name=f"the attention's norm {name}")
        return self._norms[name].affine(args[0])


def _jacobian(vector: Tensor, x: Tensor, position: int) -> Tensor:
    """Return the derivative of a vector, (n,), with respect to x, (1, position, d), at one position: (n, d)."""
    rows = [torch.autograd.grad(component, x, retain_graph=True)[0][0, position] for component in vector]
    return torch.stack(rows)
