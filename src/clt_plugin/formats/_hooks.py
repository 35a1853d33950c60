"""Other tools' names for our sites."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from clt_plugin.core import FormatError

TRANSFORMER_LENS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "ln2.hook_normalized": "mlp_in_before_gain",
    "mlp.hook_in": "mlp_in",
    "mlp.hook_out": "mlp_out_before_norm",
    "hook_mlp_out": "mlp_out",
}
"""The hooks that transcoders are made on, as TransformerLens and circuit-tracer name them."""

RESIDUAL_HOOKS = TRANSFORMER_LENS | {"hook_resid_post": "resid_post", "hook_attn_out": "attn_out"}
"""Those that autoencoders and crosscoders are made on besides."""

GEMMA_MODULES = {
    "output": "resid_post",
    "post_attention_layernorm.output": "attn_out",
    "pre_feedforward_layernorm.output": "mlp_in",
    "mlp.output": "mlp_out_before_norm",
    "post_feedforward_layernorm.output": "mlp_out",
}
"""The modules of Gemma 2 and 3, as transformers names them within a block."""


LAYER_NORM = re.compile(r"gpt-?(2|neo|j)|pythia|opt-|bloom|phi-[12]|solu|gelu|tiny-stories", re.IGNORECASE)
RMS_NORM = re.compile(r"gemma|llama|mistral|mixtral|qwen|gpt-oss", re.IGNORECASE)
"""How models are called that have LayerNorms, and RMSNorms: TransformerLens hooks the two at different places."""


def normalised_site(model: Any, where: str, folded: bool = False) -> str:
    """Return which site ``ln2.hook_normalized`` is: behind a LayerNorm's gain unless it was folded, before any other.

    Args:
        model: The model's name.
        where: Which file says so, for the message.
        folded: Whether TransformerLens ran the model with its norms' gains folded into the weights.
    """
    name = str(model)
    if RMS_NORM.search(name):
        return "mlp_in_before_gain"
    if LAYER_NORM.search(name):
        return "mlp_in_before_gain" if folded else "mlp_in"
    raise FormatError(
        f"{where} reads ln2.hook_normalized of {model}, which is before or after the norm's gain depending on the "
        "model's kind of norm, and that is not known: name the model as its authors do, such as gpt2 or gemma-2-2b"
    )


def site_of(hook: str, hooks: Mapping[str, str], where: str) -> str:
    """Return the site that a hook stands for; refuse one that is none of ours.

    Args:
        hook: Its name within a block.
        hooks: The names known.
        where: Which file says so, for the message.
    """
    if hook not in hooks:
        raise FormatError(f"{where} names the hook {hook!r}; known are {', '.join(hooks)}")
    return hooks[hook]


def split_block(name: str, where: str) -> tuple[int, str]:
    """Split ``blocks.3.hook_mlp_out`` or ``model.layers.3.mlp.output`` into the layer and the name within a block."""
    match = re.fullmatch(r"(?:blocks|(?:[\w.]+\.)?(?:layers|h))\.(\d+)\.(.+)", name)
    if not match:
        raise FormatError(f"{where} names {name!r}, which is not a place in a block")
    return int(match[1]), match[2]
