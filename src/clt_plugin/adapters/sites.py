"""Where each architecture keeps its sites: one row a family, and every site follows from the row.

To support another architecture, add a row to `ARCHITECTURES` (see CONTRIBUTING.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clt_plugin.core.errors import AttachError
from clt_plugin.core.wiring import SITE_NAMES


@dataclass(frozen=True)
class Place:
    """A site as a module's input or output.

    Attributes:
        module: The module's name in the block; empty for the block itself.
        side: ``"input"`` or ``"output"``.
        before_gain: Whether the site is this norm's input once normalised, before gain and bias.
    """

    module: str
    side: str
    before_gain: bool = False


@dataclass(frozen=True)
class Architecture:
    """How a family's blocks are built, in transformers' names.

    Attributes:
        name: What the family is called.
        model_types: The ``config.model_type`` of its models.
        blocks: Where the list of blocks may be, tried in turn.
        attention: The attention module.
        mlp: The MLP module.
        pre_attention_norm: The norm whose output attention reads, or None.
        pre_mlp_norm: The norm whose output the MLP reads, or None.
        final_norm: The norm before the unembedding, beside the list of blocks.
        post_attention_norm: The norm between attention and the residual stream, or None.
        post_mlp_norm: The norm between the MLP and the residual stream, or None.
        centred: Whether norms subtract the mean (LayerNorm) or not (RMSNorm).
        parallel: Whether attention and MLP both read the block's input, so that there is no ``resid_mid``; or the
            name of the config's flag that says so.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: tuple[str, ...]
    attention: str
    mlp: str
    pre_attention_norm: str | None
    pre_mlp_norm: str | None
    final_norm: str
    post_attention_norm: str | None = None
    post_mlp_norm: str | None = None
    centred: bool = False
    parallel: bool | str = False

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms of a block; one that attention and MLP share counts once."""
        names = (self.pre_attention_norm, self.post_attention_norm, self.pre_mlp_norm, self.post_mlp_norm)
        return tuple(dict.fromkeys(name for name in names if name))

    def places(self, parallel: bool) -> dict[str, Place]:
        """Return the place of every site that a block of this family has.

        Args:
            parallel: Whether this model's blocks are parallel.
        """
        places = {
            "resid_pre": Place("", "input"),
            "attn_out": Place(self.post_attention_norm or self.attention, "output"),
            "mlp_in": Place(self.mlp, "input"),
            # Without a post-norm both are the MLP's own output.
            "mlp_out_before_norm": Place(self.mlp, "output"),
            "mlp_out": Place(self.post_mlp_norm or self.mlp, "output"),
            "resid_post": Place("", "output"),
        }
        if not parallel:
            places["resid_mid"] = Place(self.pre_mlp_norm or self.mlp, "input")
        if self.pre_mlp_norm:
            places["mlp_in_before_gain"] = Place(self.pre_mlp_norm, "input", before_gain=True)
        return {name: places[name] for name in SITE_NAMES if name in places}


_DECODER = ("model.layers", "model.language_model.layers", "language_model.layers", "layers")

ARCHITECTURES: list[Architecture] = [
    Architecture(
        "GPT-2", ("gpt2",), ("transformer.h", "h"), "attn", "mlp", "ln_1", "ln_2", "ln_f", centred=True,
    ),
    Architecture(
        "Llama, Mistral, Qwen", ("llama", "mistral", "qwen2", "qwen3"), _DECODER,
        "self_attn", "mlp", "input_layernorm", "post_attention_layernorm", "norm",
    ),
    Architecture(
        "OLMo", ("olmo",), _DECODER,
        "self_attn", "mlp", "input_layernorm", "post_attention_layernorm", "norm", centred=True,
    ),
    Architecture(
        "OLMo 2", ("olmo2",), _DECODER,
        "self_attn", "mlp", None, None, "norm", "post_attention_layernorm", "post_feedforward_layernorm",
    ),
    Architecture(
        "Gemma 2 and 3", ("gemma2", "gemma3", "gemma3_text"), _DECODER,
        "self_attn", "mlp", "input_layernorm", "pre_feedforward_layernorm", "norm",
        "post_attention_layernorm", "post_feedforward_layernorm",
    ),
    Architecture(
        "GPT-NeoX, Pythia", ("gpt_neox",), ("gpt_neox.layers", "layers"),
        "attention", "mlp", "input_layernorm", "post_attention_layernorm", "final_layer_norm",
        centred=True, parallel="use_parallel_residual",
    ),
]  # fmt: skip


def architecture_of(config: Any) -> Architecture:
    """Return the row for a model's config; refuse a model of no known family."""
    model_type = getattr(config, "model_type", None)
    for row in ARCHITECTURES:
        if model_type in row.model_types:
            return row
    known = ", ".join(kind for row in ARCHITECTURES for kind in row.model_types)
    raise AttachError(
        f"models of type {model_type!r} are not supported: known are {known}. To add a family, add a row to "
        "clt_plugin.adapters.sites.ARCHITECTURES"
    )


def is_parallel(row: Architecture, config: Any) -> bool:
    """Whether this model's blocks run attention and MLP side by side."""
    return bool(getattr(config, row.parallel)) if isinstance(row.parallel, str) else row.parallel


def check_sites(row: Architecture, parallel: bool, names: Iterable[str]) -> None:
    """Refuse sites that blocks of this family do not have, with the list of those they have."""
    places = row.places(parallel)
    for name in dict.fromkeys(names):
        if name not in places:
            kind = "with parallel blocks " if parallel else ""
            raise AttachError(
                f"{row.name} models {kind}have no site {name!r}: possible are {', '.join(places)}. A crosscoder "
                "that reads or writes it was trained on another kind of model"
            )


def normalise(norm: nn.Module, centred: bool, x: Tensor) -> Tensor:
    """Return a norm's input once normalised, before gain and bias.

    Args:
        norm: The norm module; only its epsilon is read.
        centred: Whether it subtracts the mean.
        x: Its input, (..., d).

    Returns:
        (..., d), computed in float32 at least, as transformers' norms do, in x's dtype.
    """
    # OLMo's norm, which has no parameters, keeps its epsilon in the code of its forward.
    eps = next((getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name)), 1e-5)
    wide = x if x.dtype == torch.float64 else x.float()
    if centred:
        wide = wide - wide.mean(-1, keepdim=True)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
