"""Crosscoders to set beside one: drawn afresh, and the model's own MLPs as a crosscoder."""

from __future__ import annotations

from typing import Any

import torch

from clt_plugin.adapters.huggingface import HostModel, plain_model
from clt_plugin.analysis.weights._readers import neuron_writes, neurons
from clt_plugin.core.crosscoder import Crosscoder
from clt_plugin.core.host import Host
from clt_plugin.core.wiring import Wiring


def untrained(clt: Crosscoder, n_latents: int = 256, seed: int = 0) -> Crosscoder:
    """Make a crosscoder of the same wiring as a trained one, as it is before training.

    What a study finds there is of the wiring and the model, not learnt.

    Args:
        clt: The trained one.
        n_latents: At most so many latents a group: they are all drawn alike, so that a sample will do.
        seed: Of the initialisation.
    """
    sizes = [min(n, n_latents) for n in clt.group_sizes]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Crosscoder(clt.wiring, clt.layout.width, sizes, "relu", host=clt.host).requires_grad_(False)


@torch.no_grad()
def own_writes(model: Any) -> Crosscoder:
    """Make per-layer transcoders of a model's own MLPs: a latent a neuron, that writes what the neuron writes.

    Scanned as a CLT is, they say whether a layer is special in the model itself. They are not the MLPs: a latent reads
    its neuron's row (in gated MLPs the gate alone), biases are left out, and its activation is a ReLU. Where a norm
    follows the MLP its gain is taken along and its denominator left out.

    Args:
        model: An nnsight model, a TransformerBridge, or a transformers model.
    """
    with plain_model(model) as hf:
        host = HostModel.of(hf)
        rows = neurons(hf, host, gains=False, normalised=False).weights
        made: dict[str, Any] = {"dtype": rows[0].dtype, "device": rows[0].device}
        sizes = [len(each) for each in rows]
        wiring = Wiring.plt(host.n_layers)
        found = Crosscoder(wiring, host.d_model, sizes, "relu", host=Host(host.name, n_layers=host.n_layers), **made)
        for layer, writes in enumerate(neuron_writes(hf, host)):
            found.W_enc[layer].copy_(rows[layer].T)
            found.W_dec[layer].copy_(writes)
    return found.requires_grad_(False)
