"""Attention through the interface of transformers: seen, exchanged, and asked for its value-output map.

Each family's attention module does its own projections and asks an implementation, by the name in its config, for
``softmax(q k) v`` alone. Under a name of ours that implementation can be told what to do for each layer, so that
grouped queries, fused projections, sliding windows, softcaps and norms of queries and keys need no code here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from clt_plugin.adapters._norms import FreezeError
from clt_plugin.adapters.huggingface import HostModel

IMPLEMENTATION = "clt_plugin"
"""The name under which transformers knows the attention that can be recorded and frozen."""

_Attend = Callable[..., tuple[Tensor, Tensor | None]]

_ACTING: WeakKeyDictionary[nn.Module, _Attend] = WeakKeyDictionary()
"""What the attention modules of models that are recorded or frozen at this moment do instead of their own."""


def _attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Act for a module: as it is told to, or as its family's eager attention, as in a vision tower."""
    return _ACTING.get(module, partial(eager(module), module))(*args, **kwargs)


def _mask(*, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor:
    """Return the mask for eager attention: 0, and a very negative number where there is nothing to see."""
    # Most families take their softmax in float32, where float64's lowest number is infinite: then padded positions,
    # which see nothing, would be NaN, and by the next layer everything.
    return eager_mask(dtype=torch.float32 if dtype == torch.float64 else dtype, **kwargs)


# Masks are made for an implementation's name.
AttentionInterface.register(IMPLEMENTATION, _attend)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)


def eager(module: nn.Module) -> _Attend:
    """Return the eager attention of a module's family."""
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise FreezeError(
        f"{type(module).__name__} does not run through transformers' AttentionInterface with an eager attention, so "
        "its patterns can be neither seen nor frozen; a library's model goes through plain_model(model) first"
    )


def take_over(stack: ExitStack, hf: nn.Module, host: HostModel, act: _Attend) -> None:
    """Have every block's attention call ``act(layer, module, query, ...)``, until the stack is closed."""
    for layer, block in enumerate(blocks_of(hf, host)):
        module = part_of(block, host.architecture.attention)
        eager(module)
        if module in _ACTING:
            raise FreezeError("this model is being recorded, or is frozen, already: leave that first")
        _ACTING[module] = partial(act, layer, module)
        stack.callback(_ACTING.pop, module, None)
    before = [(config, config._attn_implementation) for config in _configs(hf)]
    stack.callback(_restore, before)
    for config, _ in before:
        config._attn_implementation = IMPLEMENTATION


def _restore(before: list[tuple[Any, str | None]]) -> None:
    # In the order in which they were found: setting a config's implementation sets those of the configs it holds.
    for config, implementation in before:
        config._attn_implementation = implementation


def _configs(hf: nn.Module) -> list[Any]:
    """Return every config in a model, each after those that hold it."""
    found: dict[int, Any] = {}

    def add(config: Any) -> None:
        if id(config) in found or not hasattr(config, "_attn_implementation"):
            return
        found[id(config)] = config
        for name in config.sub_configs:
            add(getattr(config, name, None))

    for module in hf.modules():
        add(getattr(module, "config", None))
    return list(found.values())


def blocks_of(hf: nn.Module, host: HostModel) -> Any:
    """Return a model's list of blocks."""
    return hf.get_submodule(host.blocks)


def part_of(module: nn.Module, name: str) -> nn.Module:
    """Return a part of a module by its name."""
    try:
        return module.get_submodule(name)
    except AttributeError:
        raise FreezeError(
            f"{type(module).__name__} has no {name!r}, as its row in clt_plugin.adapters.sites.ARCHITECTURES says"
        ) from None


# ---------------------------------------------------------------- what a module does to values


@dataclass(frozen=True, eq=False)
class Call:
    """What an attention module was called with in one run, beside the hidden states.

    Attributes:
        args: Positional arguments after the hidden states, or None where those came by name.
        kwargs: Arguments by name.
    """

    args: tuple[Any, ...] | None
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Keep a call's arguments."""
        dropped = ("hidden_states", "past_key_values", "layer_past", "use_cache")
        return cls(args[1:] if args else None, {key: value for key, value in kwargs.items() if key not in dropped})

    def repeat(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """Call a module so again, in the dtype of other hidden states, (rows, position, d); return its output."""
        wide = hidden.dtype
        args = tuple(_cast(value, wide) for value in self.args or ())
        kwargs = {key: _cast(value, wide) for key, value in self.kwargs.items()}
        if self.args is None:
            kwargs["hidden_states"] = hidden
        else:
            args = (hidden, *args)
        state = module.state_dict(keep_vars=True)
        if all(_cast(value, wide) is value for value in state.values()):
            return module.forward(*args, **kwargs)[0]
        cast = {f"module.{key}": _cast(value, wide) for key, value in state.items()}
        return functional_call(_Bare(module), cast, args, kwargs)[0]


class _Bare(nn.Module):
    """A module without anyone's hooks, which are not to be asked."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Return a value, or a tuple of values, with the floating tensors in it in a dtype."""
    if isinstance(value, tuple | list):
        return tuple(_cast(each, dtype) for each in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@dataclass(frozen=True, eq=False)
class ValueOutput:
    """What an attention module does to what it reads, but for the pattern: affine on either side of it.

    With x the module's input and P the pattern, head h adds ``P_h (x @ W_V[:, j] + value_bias[j]) @ W_O[h]``, and all
    heads together ``output_bias``; r heads share one of values, j = h // r.

    Attributes:
        W_V: (d, value heads, d_head).
        value_bias: (value heads, d_head).
        W_O: (heads, d_head, d).
        output_bias: (d,).
    """

    W_V: Tensor
    value_bias: Tensor
    W_O: Tensor
    output_bias: Tensor


def value_outputs(
    hf: nn.Module, host: HostModel, calls: dict[int, Call], patterns: dict[int, Tensor], dtype: torch.dtype
) -> list[ValueOutput]:
    """Find every layer's map by feeding basis vectors through its attention module.

    Args:
        hf: The plain model.
        host: What it is.
        calls: How each layer's module was called, on one row.
        patterns: Each layer's pattern then, (1, heads, position, position).
        dtype: In which to ask, and to return: float32 at least.
    """
    now: dict[str, Any] = {}

    def act(layer: int, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        now["value"] = value
        return now["give"](value), None

    with torch.no_grad(), ExitStack() as stack:
        take_over(stack, hf, host, act)
        return [
            _value_output(part_of(block, host.architecture.attention), calls[layer], patterns[layer], host, dtype, now)
            for layer, block in enumerate(blocks_of(hf, host))
        ]


def _value_output(
    module: nn.Module, call: Call, pattern: Tensor, host: HostModel, dtype: torch.dtype, now: dict[str, Any]
) -> ValueOutput:
    (_, heads, n, _), d, device = pattern.shape, host.d_model, pattern.device
    nothing = torch.zeros(1, n, d, dtype=dtype, device=device)

    def rows(basis: int) -> Tensor:
        """Return basis vectors as rows of the recorded length, padded with zeros: (rows, n, basis)."""
        n_rows = -(-basis // n)
        eye = torch.zeros(n_rows * n, basis, dtype=dtype, device=device)
        eye[:basis].fill_diagonal_(1)
        return eye.view(n_rows, n, basis)

    # One row of zeros besides, for what both sides add whatever they are given.
    now["give"] = lambda value: value.new_zeros(value.shape[0], n, heads, value.shape[-1])
    output_bias = call.repeat(module, torch.cat((nothing, rows(d))))[0, 0]
    value = now["value"].transpose(1, 2).to(dtype)
    value_bias = value[0, 0]
    W_V = value[1:].flatten(0, 1)[:d] - value_bias
    outputs = rows(heads * W_V.shape[-1])
    now["give"] = lambda value: outputs.unflatten(-1, (heads, -1))
    W_O = call.repeat(module, nothing.repeat(len(outputs), 1, 1)).flatten(0, 1)[: outputs.shape[-1]] - output_bias
    return ValueOutput(W_V, value_bias, W_O.unflatten(0, (heads, -1)), output_bias)
