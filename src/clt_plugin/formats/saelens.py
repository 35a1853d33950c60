"""The format of SAELens (github.com/jbloomAus/SAELens): autoencoders and transcoders, a folder each.

``cfg.json`` and ``sae_weights.safetensors``: ``W_enc`` (d_in, F), ``b_enc`` (F,), ``W_dec`` (F, d_out), ``b_dec``
(d_out,); ``threshold`` (F,), in training ``log_threshold``, for JumpReLU; ``W_skip`` (d_out, d_in) for skip
transcoders. With ``h = x - b_dec`` where
the config says ``apply_b_dec_to_input`` (never for a transcoder), else ``h = x``, and ``p = h @ W_enc + b_enc``::

    standard, transcoder   a = relu(p)
    jumprelu               a = relu(p) * (p > threshold)
    topk                   a = relu(the k largest p), ranked by p times decoder norm if rescale_acts_by_decoder_norm
    gated                  a = relu(h @ W_enc * exp(r_mag) + b_mag) * (h @ W_enc + b_gate > 0), which is a JumpReLU
    y = a @ W_dec + b_dec (+ x @ W_skip.T)

What SAELens calls the activations of a TopK with ``rescale_acts_by_decoder_norm`` are these times the decoder norms.
``sparsity.safetensors`` (how often latents are active) is not read. Configs from before version 6 are flat and have
other names; version 6 keeps what it says of the model under ``metadata``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clt_plugin.core import FORMATS, MODEL, Activation, FormatError, Host, JumpReLU, Piece, ReLU, Site, TopK
from clt_plugin.core.files import Header
from clt_plugin.formats._description import Description, Formula
from clt_plugin.formats._hooks import GEMMA_MODULES, RESIDUAL_HOOKS, site_of, split_block
from clt_plugin.formats._layers import norms, of_centred_input, one_layer, peek, shape_of, times
from clt_plugin.hub import Folder

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
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

LAYER_NORM = re.compile(r"gpt-?(2|neo|j)|pythia|opt-|bloom|phi-[12]|solu|gelu|tiny-stories", re.IGNORECASE)
RMS_NORM = re.compile(r"gemma|llama|mistral|mixtral|qwen|gpt-oss", re.IGNORECASE)
"""How models are called that have LayerNorms, and RMSNorms: TransformerLens hooks the two at different places."""

TRANSFORMER_LENS_NAMES = {"gpt2-small": "gpt2"}
RECIPE = ("dataset_path", "context_size", "prepend_bos", "sae_lens_training_version")


class SAELens:
    """Reads SAELens's folders."""

    name = "saelens"

    def sniff(self, folder: Folder) -> bool:
        """Whether a folder is in this format."""
        return CONFIG in folder and (WEIGHTS in folder or "d_sae" in peek(folder, CONFIG))

    def describe(self, folder: Folder) -> Description:
        """Say which tensor lies where."""
        config, where = _flat(folder.json(CONFIG)), f"{folder.label}/{CONFIG}"
        kind = _check(where, config)
        file, header = folder.file(WEIGHTS), folder.headers([WEIGHTS])[WEIGHTS]
        architecture, d_in, n = config["architecture"], config.get("d_in"), config.get("d_sae")
        if not isinstance(d_in, int) or not isinstance(n, int):
            raise FormatError(f"{where} must give d_in and d_sae, not {d_in!r} and {n!r}")
        transcodes, has_skip = architecture.endswith("transcoder"), "skip" in architecture
        d_out = d_in
        if transcodes:
            d_out = config.get("d_out") or shape_of(file, header, "W_dec", "F, d_out")[1]
        read, write = _sites(where, config, transcodes)
        encoder = Piece(file, "W_enc", (d_in, n), rows_last=True)
        decoder = Piece(file, "W_dec", (n, d_out))
        weights = {("W_enc", 0): (encoder,), ("W_dec", 0): (decoder,)}
        b_dec = Piece(file, "b_dec", (d_out,))
        vectors: dict[tuple[str, int], Piece | Formula] = {("b_dec", 0): b_dec}
        centre = None if transcodes or not config.get("apply_b_dec_to_input", True) else b_dec
        ignored = frozenset[str]()
        if has_skip:
            weights["W_skip", 0] = (Piece(file, "W_skip", (d_out, d_in), rows_last=True),)
        if kind == "gated":
            growth = _vector(folder, header, "r_mag", n).exp()
            weights["W_enc", 0] = (Piece(file, "W_enc", (d_in, n), rows_last=True, row_scale=growth),)
            vectors |= _gated(encoder, centre)
        else:
            b_enc = Piece(file, "b_enc", (n,))
            vectors["b_enc", 0] = b_enc if centre is None else of_centred_input(b_enc, centre, encoder)
        if kind == "jumprelu":
            vectors["threshold", 0] = Formula(_at_least_0, (Piece(file, "threshold", (n,)),))
            if "log_threshold" in header:  # before it is saved for inference
                vectors["threshold", 0] = Formula(torch.exp, (Piece(file, "log_threshold", (n,)),))
        if config.get("rescale_acts_by_decoder_norm") and kind == "topk":
            vectors["stored_norms", 0] = Formula(lambda _: norms(decoder), (b_dec,))
        if "scaling_factor" in header or config.get("finetuning_scaling_factor"):
            factor, ignored = _scaling_factor(folder, where, header, config, n), frozenset(["scaling_factor"])
            weights["W_dec", 0] = (Piece(file, "W_dec", (n, d_out), row_scale=factor),)
        name = config.get("model_name")
        return Description(
            folder.label,
            self.name,
            one_layer(read, write, has_skip),
            {read: d_in, write: d_out},
            (n,),
            _activation(where, config, kind),
            Host(TRANSFORMER_LENS_NAMES.get(name, name) if isinstance(name, str) else None),
            weights,
            vectors,
            {str(file): ignored},
            metadata={"recipe": recipe} if (recipe := {key: config[key] for key in RECIPE if config.get(key)}) else {},
        )


# ---------------------------------------------------------------- the config


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config of any version with its metadata beside the rest, under today's names."""
    metadata = config.get("metadata") or {}
    version = config.get("sae_lens_version") or metadata.get("sae_lens_version") or "0"
    flat = {RENAMED.get(key, key): value for key, value in {**metadata, **config}.items()}
    flat["is_old"] = int(re.match(r"\d*", str(version))[0] or 0) < 6  # type: ignore[index]
    flat.setdefault("architecture", "standard")
    arguments = flat.get("activation_fn_kwargs") or {}
    if flat["is_old"] and flat.get("activation_fn") == "topk" and "k" in arguments:
        flat |= {"architecture": "topk", "k": arguments["k"]}
    normalisation = flat.get("normalize_activations")
    if isinstance(normalisation, bool):
        flat["normalize_activations"] = "expected_average_only_in" if normalisation else "none"
    return flat


def _check(where: str, config: Mapping[str, Any]) -> str:
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
    if config.get("reshape_activations", "none") != "none" or any(hook.endswith("hook_z") for hook in hooks):
        raise FormatError(f"{where} is of attention's heads (hook_z), before they are added up: that is not a site")
    if heads != [None, None]:
        raise FormatError(f"{where} names a head ({heads[0]}): a site is of all heads together")
    if architecture.endswith("transcoder") and config.get("apply_b_dec_to_input"):
        raise FormatError(f"{where} says apply_b_dec_to_input, which no transcoder of SAELens does")
    return ARCHITECTURES[architecture]


def _activation(where: str, config: Mapping[str, Any], kind: str) -> Activation:
    if kind != "topk":
        return ReLU() if kind == "relu" else JumpReLU()
    k = config.get("k")
    if not isinstance(k, int) or k < 1:
        raise FormatError(f"{where} gives no k (found {k!r}): how many latents to keep is expected under that name")
    return TopK(k, score="decoder_norm" if config.get("rescale_acts_by_decoder_norm") else "activation")


# ---------------------------------------------------------------- sites


def _sites(where: str, config: Mapping[str, Any], transcodes: bool) -> tuple[Site, Site]:
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
        site = Site(MODEL, _normalised(where, config), layer)
    _warn_if_centred(where, config, site)
    return site


def _normalised(where: str, config: Mapping[str, Any]) -> str:
    """Return which site ``ln2.hook_normalized`` is: after a LayerNorm's gain unless that was folded, before any other.

    SAELens runs models unfolded, unless told otherwise; before it recorded how, folded.
    """
    model, settings = str(config.get("model_name")), config.get("model_from_pretrained_kwargs")
    if RMS_NORM.search(model):
        return "mlp_in_before_gain"
    if not LAYER_NORM.search(model):
        raise FormatError(
            f"{where} reads ln2.hook_normalized of {model}, which is before or after the norm's gain depending on the "
            "model's kind of norm, and that is not known: name the model as its authors do"
        )
    folded = config["is_old"] if settings is None else settings.get("fold_ln", False)
    return "mlp_in_before_gain" if folded else "mlp_in"


def _warn_if_centred(where: str, config: Mapping[str, Any], site: Site) -> None:
    """Warn of activations that are not the model's own, but TransformerLens's: the residual stream less its mean."""
    if site.name in ("mlp_in_before_gain", "mlp_in"):
        return
    settings = config.get("model_from_pretrained_kwargs")
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


# ---------------------------------------------------------------- tensors


def _at_least_0(threshold: Tensor) -> Tensor:
    """Return the threshold at which relu(p) * (p > threshold) is p * (p > it)."""
    return threshold.clamp(min=0)


def _gated(encoder: Piece, centre: Piece | None) -> dict[tuple[str, int], Piece | Formula]:
    """Return the bias and the threshold with which a JumpReLU is a gated autoencoder.

    With u = h @ W_enc and e = exp(r_mag), the gate u + b_gate > 0 is e u + b_mag > b_mag - e b_gate: this is the same
    whatever is subtracted from the input.
    """
    n = encoder.shape[1]
    b_mag, r_mag, b_gate = (Piece(encoder.file, key, (n,)) for key in ("b_mag", "r_mag", "b_gate"))

    def bias(b: Tensor, r: Tensor, *centres: Tensor) -> Tensor:
        moved = sum((times(encoder, c) for c in centres), torch.zeros(n, dtype=torch.float64))
        return b.double() - moved * r.double().exp()

    def threshold(b: Tensor, r: Tensor, gate: Tensor) -> Tensor:
        return _at_least_0(b.double() - r.double().exp() * gate.double())

    return {
        ("b_enc", 0): Formula(bias, (b_mag, r_mag) if centre is None else (b_mag, r_mag, centre)),
        ("threshold", 0): Formula(threshold, (b_mag, r_mag, b_gate)),
    }


def _vector(folder: Folder, header: Header, key: str, n: int) -> Tensor:
    """Read one number a latent now, since weights are scaled by it."""
    file = folder.file(WEIGHTS)
    if shape_of(file, header, key, "F") != (n,):
        raise FormatError(f"{file}: {key} has shape {header[key][0]}, where {(n,)} was expected")
    vector = file.read(key)
    if not bool(torch.isfinite(vector).all()):
        raise FormatError(f"{file}: {key} holds values that are not finite (nan or inf)")
    return vector.to(torch.promote_types(vector.dtype, torch.float32))


def _scaling_factor(folder: Folder, where: str, header: Header, config: Mapping[str, Any], n: int) -> Tensor | None:
    """Return what decoder vectors are multiplied with after finetuning; None where that is 1."""
    factor = _vector(folder, header, "scaling_factor", n)
    if torch.allclose(factor, torch.ones(n, dtype=factor.dtype)):
        return None
    if not config.get("finetuning_scaling_factor"):
        raise FormatError(
            f"{folder.file(WEIGHTS)} has a scaling_factor other than 1, but {where} does not say "
            "finetuning_scaling_factor: one of the two is wrong"
        )
    return factor


FORMATS.add(SAELens.name, SAELens())
