"""The loss's gradient at sites of a model that runs as it is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clt_plugin.adapters.huggingface import HostModel, plain_model
from clt_plugin.adapters.sites import check_sites
from clt_plugin.core import AttachError, Site
from clt_plugin.training.data.tokens import Rows


def loss_gradients(model: Any, rows: Rows, sites: Sequence[Site]) -> dict[Site, Tensor]:
    """Return the gradient of the summed next-token cross-entropy at sites, at the tokens that count.

    Predictions count from a token that counts to a next one that counts. A token that no prediction depends on, such as
    the last one, has gradient 0.

    Args:
        model: An nnsight model, a TransformerBridge or a transformers model. Its parameters get no gradients.
        rows: What to run it on.
        sites: Where.

    Returns:
        {site: (tokens that count, d_site)}.

    Raises:
        AttachError: The model has no such site, or what is there is no tensor that the pass goes on with.
    """
    with plain_model(model) as hf, ExitStack() as stack, torch.enable_grad():
        seen = _watched(stack, hf, sites)
        ids = rows.ids.to(next(hf.parameters()).device)
        # Padding comes last, where no token of a causal model sees it.
        logits = hf(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        where = (rows.counted[:, :-1] & rows.counted[:, 1:]).to(ids.device)
        wide = torch.promote_types(logits.dtype, torch.float32)
        loss = F.cross_entropy(logits[:, :-1][where].to(wide), ids[:, 1:][where], reduction="sum")
        gradients = torch.autograd.grad(loss, [seen[site] for site in sites])
    kept = rows.counted.to(gradients[0].device)
    return {site: gradient[kept].detach() for site, gradient in zip(sites, gradients, strict=True)}


def _watched(stack: ExitStack, hf: nn.Module, sites: Sequence[Site]) -> dict[Site, Tensor]:
    """Have the next pass keep what it has at sites, differentiable; return where it will be found."""
    host = HostModel.of(hf)
    check_sites(host.architecture, host.parallel, [site.name for site in sites])
    places, blocks = host.architecture.places(host.parallel), hf.get_submodule(host.blocks)
    seen: dict[Site, Tensor] = {}

    def hook(handle: Any) -> None:
        stack.callback(handle.remove)

    # Weights may be frozen: something that all sites depend on has to require gradients.
    embedding: Any = hf.get_input_embeddings()  # type: ignore[operator]
    hook(embedding.register_forward_hook(lambda m, args, out: out if out.requires_grad else out.requires_grad_()))
    for site in sites:
        place = places[site.name]
        if place.before_gain:
            raise AttachError(f"{site} lies inside a norm, where there is no gradient to be had: write another site")
        module = blocks.get_submodule(f"{site.layer}.{place.module}".rstrip("."))
        if place.side == "input":

            def keep_input(m: nn.Module, args: Any, kwargs: Any, site: Site = site) -> None:
                seen[site] = args[0] if args else next(iter(kwargs.values()))

            hook(module.register_forward_pre_hook(keep_input, with_kwargs=True))
        else:

            def keep_output(m: nn.Module, args: Any, output: Any, site: Site = site) -> None:
                seen[site] = output[0] if isinstance(output, tuple) else output

            hook(module.register_forward_hook(keep_output))
    return seen
