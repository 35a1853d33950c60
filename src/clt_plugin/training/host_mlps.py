"""The model's own MLPs beside the training, for losses that compare a crosscoder with what they do inside."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clt_plugin.adapters.huggingface import HostModel, plain_model
from clt_plugin.core import Site, Wiring, WiringError
from clt_plugin.core.wiring import MLP_WRITES
from clt_plugin.training.auxiliary import Faithfulness, JacobianMatching, mlp_response
from clt_plugin.training.penalties import Penalty
from clt_plugin.training.standard import Standard


class HostMLPs:
    """Gives what `Faithfulness` and `JacobianMatching` need, from what the crosscoder reads.

    Each written MLP output is paired with what is read in the same layer. The modules are copies that share their
    weights with the model: whoever runs the model meanwhile, with hooks on it, is not disturbed.

    Args:
        model: Whose MLPs; as for `harvest`.
        wiring: Of the crosscoder: it must read MLP inputs, or the residual stream before MLPs, and write MLP outputs.
        penalties: What is asked for.
        seed: Of the directions in which inputs are moved.
    """

    def __init__(self, model: Any, wiring: Wiring, penalties: tuple[Penalty, ...], seed: int = 0) -> None:
        kinds = {type(penalty) for penalty in penalties}
        self.neurons, self.responses = Faithfulness in kinds, JacobianMatching in kinds
        self.generator = torch.Generator().manual_seed(seed)
        self.pairs: dict[Site, Site] = {}
        self.chains: dict[Site, _Chain] = {}
        if not (self.neurons or self.responses):
            return
        reads = {site.layer: site for site in wiring.read_sites if site.name in ("mlp_in", "resid_mid")}
        self.pairs = {w: reads[w.layer] for w in wiring.write_sites if w.name in MLP_WRITES and w.layer in reads}
        if not self.pairs:
            raise WiringError(
                "the penalties 'faithfulness' and 'jacobian' compare with MLPs: the wiring must read mlp_in or "
                f"resid_mid and write MLP outputs of the same layers, not {wiring!r}"
            )
        with plain_model(model) as hf:
            host = HostModel.of(hf)
            self.chains = {write: _Chain(hf, host, read, write) for write, read in self.pairs.items()}

    def about(self, inputs: Mapping[Site, Tensor], standard: Standard | None) -> dict[str, Any]:
        """Return further attributes of a `ForwardPass` on a batch.

        Args:
            inputs: What is read, raw, {site: (B, d_site)}.
            standard: The units in which the crosscoder is trained; None for raw ones.
        """
        found: dict[str, Any] = {}
        if self.neurons:
            layers = {write.layer: (read, self.chains[write]) for write, read in self.pairs.items()}
            found["neurons"] = {layer: chain.neurons(inputs[read]) for layer, (read, chain) in layers.items()}
        if self.responses:
            tangents, responses = {}, {}
            for write, read in self.pairs.items():
                function: Callable[[Tensor], Tensor] = self.chains[write]
                x = inputs[read]
                if standard is not None:
                    function, x = standard.standardised(function, read, write), standard[read].standardise(x)
                tangents[read], responses[write] = mlp_response(function, x, self.generator)
            found |= {"tangents": tangents, "responses": responses}
        return found


class _Chain:
    """From a site that is read to one written in the same layer: norm, MLP, norm, as far as they lie between."""

    def __init__(self, hf: nn.Module, host: HostModel, read: Site, write: Site) -> None:
        row, block = host.architecture, hf.get_submodule(f"{host.blocks}.{read.layer}")
        names = [row.pre_mlp_norm if read.name == "resid_mid" else None, row.mlp]
        names.append(row.post_mlp_norm if write.name == "mlp_out" else None)
        shared = {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())}
        self.modules = [copy.deepcopy(block.get_submodule(name), dict(shared)) for name in names if name]
        self.mlp = self.modules[names[0] is not None]
        self.dtype = next(self.mlp.parameters()).dtype

    def __call__(self, x: Tensor) -> Tensor:
        """Map what is read, (B, d), raw, to what is written, (B, d), raw, differentiably."""
        value = x.to(self.dtype)
        for module in self.modules:
            value = module(value)
        return value.to(x.dtype)

    @torch.no_grad()
    def neurons(self, x: Tensor) -> Tensor:
        """Return the activations of the MLP's neurons, (B, n), scaled by the norms of what they write."""
        last: list[tuple[nn.Module, Tensor]] = []

        def see(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            last[:] = [(module, arguments[0])]

        # The product that writes the output is the last that runs, whatever a family calls it.
        weighted = [m for m in self.mlp.modules() if isinstance(getattr(m, "weight", None), Tensor)]
        handles = [module.register_forward_pre_hook(see) for module in weighted]
        try:
            self(x)
        finally:
            for handle in handles:
                handle.remove()
        ((module, neurons),) = last
        weight: Any = module.weight
        # (out, in) for Linear, (in, out) for GPT-2's Conv1D.
        across = 0 if isinstance(module, nn.Linear) else 1
        return (neurons * weight.norm(dim=across)).to(x.dtype)
