"""What a graph is made from: which models it can be of, and what its crosscoder is called."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clt_plugin.attribution.graph import GraphError
from clt_plugin.core.crosscoder import Crosscoder


def check_host(hf: nn.Module) -> None:
    """Refuse a model with a head for something else, and one whose layers round what they read.

    Args:
        hf: The plain transformers model. One without any head is let through: sites of it can be targets.

    Raises:
        GraphError: It is such a model.
    """
    kind = type(hf).__name__
    for name, module in hf.named_modules():
        weight = getattr(module, "weight", None)
        # Quantised modules of torch have their weight as a method.
        rounds = weight.dtype == torch.int8 if isinstance(weight, Tensor) else "quantized" in type(module).__module__
        if rounds:
            raise GraphError(
                f"this {kind} is quantised to int8 ({name}): such layers round what they read, so that no linear map "
                "and no graph of them adds up; load the model in bfloat16 or float32"
            )
    head = hf.get_output_embeddings() if hasattr(hf, "get_output_embeddings") else None  # type: ignore[operator]
    if head is None and getattr(hf, "base_model", hf) is not hf:
        raise GraphError(
            f"this {kind} has a head that gives no logits of tokens, so that there is nothing to explain: load the "
            "model as a causal language model, with transformers.AutoModelForCausalLM for one"
        )


def in_short(crosscoder: Crosscoder) -> str:
    """Return what a crosscoder is in a few words, such as ``clt(26), 16384 latents a group, JumpReLU``."""
    sizes = sorted(set(crosscoder.group_sizes))
    n_latents = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    activation = type(crosscoder.activation).__name__
    return f"{crosscoder.wiring.name}, {n_latents} latents a group, {activation}"
