"""What SAELens's configs say, in every version of theirs: the architecture, the settings and the sites."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

from clt_plugin.core import MODEL, Activation, FormatError, JumpReLU, ReLU, Site, TopK
from clt_plugin.formats._hooks import (
    GEMMA_MODULES,
    LAYER_NORM,
    RESIDUAL_HOOKS,
    normalised_site,
    site_of,
    split_block,
)
from clt_plugin.formats._layers import count, mapping, text

ARCHITECTURES = {
    "standard": "relu",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "topk": "topk",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
TRAINING = "it is a training checkpoint: save it for inference with SAELens (save_inference_model), as jumprelu"
UNREADABLE = {
    "abstopk": "it keeps negative activations, which are 0 here",
    "matching_pursuit": "it chooses its latents one after the other, with no encoder",
    "temporal": "it attends over positions",
    "batchtopk": TRAINING,
    "matryoshka_batchtopk": TRAINING,
}
NORMALISATIONS = {
    "expected_average_only_in": "its weights act on scaled activations, and the factor is not in the folder: fold it "
    "in with SAELens (fold_activation_norm_scaling_factor) and save again",
    "covariance_whitening": "its weights act on whitened activations: fold that in with SAELens "
    "(fold_activation_whitening) and save again",
    "constant_norm_rescale": "it scales every token by its own norm, which no fixed weights do",
    "layer_norm": "it normalises every token by itself, which no fixed weights do",
}
RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
"""Keys of configs from before version 6, and what they are called now."""

MODULES = {"output": "resid_post", "input": "resid_pre", "mlp.input": "mlp_in", "mlp.output": "mlp_out_before_norm"}
"""The modules of any model, as transformers names them within a block."""


def flat(where: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config of any version with its metadata beside the rest, under today's names."""
    metadata = mapping(where, config, "metadata")
    version = config.get("sae_lens_version") or metadata.get("sae_lens_version") or "0"
    flat = {RENAMED.get(key, key): value for key, value in {**metadata, **config}.items()}
    flat["is_old"] = int(re.match(r"\d*", str(version))[0] or 0) < 6  # type: ignore[index]
    flat["architecture"] = flat.get("architecture") or "standard"
    arguments = mapping(where, flat, "activation_fn_kwargs")
    settings = flat.get("model_from_pretrained_kwargs")
    flat["model_from_pretrained_kwargs"] = settings and mapping(where, flat, "model_from_pretrained_kwargs")
    if flat["is_old"] and flat.get("activation_fn") == "topk" and "k" in arguments:
        flat |= {"architecture": "topk", "k": arguments["k"]}
    normalisation = flat.get("normalize_activations")
    if isinstance(normalisation, bool):
        flat["normalize_activations"] = "expected_average_only_in" if normalisation else "none"
    for key in ("architecture", "activation_fn", "normalize_activations", "model_name"):
        text(where, flat, key)
    return flat


def check(where: str, config: Mapping[str, Any]) -> str:
    """Refuse what no fixed weights do; return the kind of activation."""
    architecture = config["architecture"]
    if architecture not in ARCHITECTURES:
        reason = UNREADABLE.get(architecture, f"known are {', '.join(ARCHITECTURES)}")
        raise FormatError(f"{where} says architecture {architecture!r}: {reason}")
    function, expected = config.get("activation_fn") or "relu", {"relu", architecture} & {"relu", "topk"}
    if config["is_old"] and function not in expected:
        raise FormatError(f"{where} says activation_fn {function!r}: known are relu, and topk with a k")
    normalisation = config.get("normalize_activations") or "none"
    if normalisation != "none":
        reason = NORMALISATIONS.get(normalisation, "this is not known")
        raise FormatError(f"{where} says normalize_activations {normalisation!r}: {reason}")
    hooks = (str(config.get(key) or "") for key in ("hook_name", "hook_name_out"))
    heads = [config.get(key) for key in ("hook_head_index", "hook_head_index_out")]
    if (config.get("reshape_activations") or "none") != "none" or any(hook.endswith("hook_z") for hook in hooks):
        raise FormatError(f"{where} is of attention's heads (hook_z), before they are added up: that is not a site")
    if heads != [None, None]:
        raise FormatError(f"{where} names a head ({heads[0]}): a site is of all heads together")
    if architecture.endswith("transcoder") and config.get("apply_b_dec_to_input"):
        raise FormatError(f"{where} says apply_b_dec_to_input, which no transcoder of SAELens does")
    return ARCHITECTURES[architecture]


def activation_of(where: str, config: Mapping[str, Any], kind: str) -> Activation:
    """Return the activation of a kind."""
    if kind != "topk":
        return ReLU() if kind == "relu" else JumpReLU()
    score = "decoder_norm" if config.get("rescale_acts_by_decoder_norm") else "activation"
    return TopK(count(where, config, "k"), score=score)


# ---------------------------------------------------------------- sites


def sites_of(where: str, config: Mapping[str, Any], transcodes: bool) -> tuple[Site, Site]:
    """Return what is read and what is written."""
    read = _site(where, config, "")
    if not transcodes:
        return read, read
    return read, _site(where, config, "_out")


def _site(where: str, config: Mapping[str, Any], suffix: str) -> Site:
    # transformers' own name, where there is one, is the more exact.
    name = config.get(f"hf_hook_name{suffix}") or config.get(f"hook_name{suffix}")
    if not isinstance(name, str):
        raise FormatError(f"{where} gives no hook_name{suffix}: where it belongs is expected under that name")
    if not name.startswith("blocks."):
        layer, module = split_block(name if name.endswith((".input", ".output")) else f"{name}.output", where)
        is_gemma = "gemma" in str(config.get("model_name")).lower()
        return Site(MODEL, site_of(module, {**GEMMA_MODULES, **MODULES} if is_gemma else MODULES, where), layer)
    layer, hook = split_block(name, where)
    site = Site(MODEL, site_of(hook, RESIDUAL_HOOKS, where), layer)
    if hook == "ln2.hook_normalized":
        # SAELens runs models unfolded, unless told otherwise; before it recorded how, folded.
        settings = config["model_from_pretrained_kwargs"]
        folded = config["is_old"] if settings is None else settings.get("fold_ln", False)
        site = Site(MODEL, normalised_site(config.get("model_name"), where, folded), layer)
    _warn_if_centred(where, config, site)
    return site


def _warn_if_centred(where: str, config: Mapping[str, Any], site: Site) -> None:
    """Warn of activations that are not the model's own, but TransformerLens's: the residual stream less its mean."""
    if site.name in ("mlp_in_before_gain", "mlp_in"):
        return
    settings = config["model_from_pretrained_kwargs"]
    if settings is None:
        unsaid = config["is_old"] and LAYER_NORM.search(str(config.get("model_name")))
        how = "may have been trained (its config does not say)" if unsaid else None
    else:
        how = "was trained" if settings.get("center_writing_weights") else None
    if how:
        warnings.warn(
            f"{where}: {how} on TransformerLens's processed model (center_writing_weights), whose {site.name} has its "
            "mean over coordinates subtracted: run it there, or subtract each token's mean before encoding",
            stacklevel=2,
        )
