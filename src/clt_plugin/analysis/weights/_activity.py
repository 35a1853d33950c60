"""What chosen heads and neurons take in when a model runs."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from clt_plugin.adapters._attention import blocks_of, part_of
from clt_plugin.adapters.huggingface import HostModel
from clt_plugin.analysis.weights._readers import Units, Within, heads


class Activity:
    """Sees, run by run, the queries (keys, values) of heads or the pre-activations of neurons, in some layers.

    A head's query is what its projection makes of what attention reads, before a norm of queries and rotary embedding.

    Args:
        hf: The plain model.
        host: What it is.
        kind: ``"head"`` or ``"neuron"``.
        part: What heads read for.
        layers: The layers to look at.
    """

    def __init__(self, hf: nn.Module, host: HostModel, kind: str, part: str, layers: Iterable[int]) -> None:
        self.hf, self.host, self.layers = hf, host, sorted(set(layers))
        self.units: Units | None = heads(hf, host, part, gains=False) if kind == "head" else None
        self._seen: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}
        self._stack = ExitStack()

    def __enter__(self) -> Activity:
        for layer in self.layers:
            block, row = blocks_of(self.hf, self.host)[layer], self.host.architecture
            if self.units is None:
                within = self._stack.enter_context(Within(part_of(block, row.mlp)))
                self._seen[layer] = within.runs
            else:
                module = part_of(block, row.attention)
                hook = module.register_forward_pre_hook(partial(self._see, layer), with_kwargs=True)
                self._stack.callback(hook.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def runs(self, layer: int, unit: int) -> list[Tensor]:
        """Return what a unit took in, in each run since `forget`: (batch, position, width), of width 1 for a neuron."""
        if self.units is None:
            return [run[..., unit, None] for run in self._seen[layer]]
        rows = slice(unit * self.units.width, (unit + 1) * self.units.width)
        weight, bias = self.units.weights[layer][rows], self.units.biases[layer][rows]
        return [run.to(weight) @ weight.T + bias for run in self._seen[layer]]

    def level(self, layer: int, unit: int) -> Tensor:
        """Return how active a unit was in the last run, (batch, position): a query's norm, or the pre-activation."""
        taken = self.runs(layer, unit)[-1]
        return taken[..., 0] if self.units is None else taken.norm(dim=-1)

    def forget(self) -> None:
        """Forget all runs."""
        for runs in self._seen.values():
            runs.clear()

    def _see(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._seen[layer].append((args[0] if args else kwargs["hidden_states"]).detach())
