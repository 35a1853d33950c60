"""The format of crosslayer-coding (curt-tigges), which trained the CLTs of ctigges/gpt2-clts.

``cfg.json`` lies beside one safetensors file. With source layers s and target layers t, it holds
``encoder_module.encoders.{s}.weight`` (F, d) and ``.bias_param`` (F,), for JumpReLU ``theta_manager.log_threshold``
(L, F), and ``decoder_module.decoders.{..}.weight`` (d, F) and ``.bias_param`` (d,), with skips (d, d) under
``decoder_module.skip_weights.{..}``. ``decoder_tying`` says which there are::

    none        {s}->{t}:  u_t = sum over s <= t of a_s @ W_{s->t}.T + b_{s->t}  (+ z_s @ S_{s->t}.T)
    per_source  {s}:       u_t = sum over s <= t of a_s @ W_s.T + b_s            (+ z_t @ S_t.T)
    per_target  {t}:       u_t = (sum over s <= t of a_s) @ W_t.T + b_t          (+ z_t @ S_t.T)

``a = p * (p >= exp(log_threshold))`` for JumpReLU; TopK keeps the k largest of p themselves, the negative too.

With ``feature_scale.{t}`` (F,), of tied decoders, every a_s is multiplied with it on its way to layer t.

z and u are normalised, by the store of activations and not by the model: with ``mean_std``,
``z = (x - mean) / (std + 1e-6)`` and ``y = u * (std + 1e-6) + mean``, from ``norm_stats.json`` in the folder or, shared
by several, in the one above; with ``sqrt_d_model``, ``z = x * sqrt(d)`` and ``y = u / sqrt(d)``.

Refused: activations that depend on the rest of the batch (BatchTopK, TopK over all layers, which ranks by z-scores over
the batch), ``feature_offset`` unless it is 0, skips across layers.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from clt_plugin.core import FORMATS, Activation, File, FormatError, Host, JumpReLU, Piece, ReLU, TopK, Wiring
from clt_plugin.core.files import Header
from clt_plugin.formats._description import Description, Formula
from clt_plugin.formats._layers import (
    check_config,
    count,
    only_where,
    peek,
    read_scale,
    shape_of,
    site_into,
    text,
)
from clt_plugin.formats._normalisation import Normalisation
from clt_plugin.hub import Folder

CONFIG, STATS, LATEST = "cfg.json", "norm_stats.json", "clt_checkpoint_latest.safetensors"
METHODS = {
    "auto": "mean_std",
    "estimated_mean_std": "mean_std",
    "auto_sqrt_d_model": "sqrt_d_model",
    "estimated_mean_std_sqrt_d_model": "sqrt_d_model",
}
"""What older configs call the ways of normalising."""
EPSILON = 1e-6
"""What the store of activations adds to a deviation."""
TIED = {"none": "{s}->{t}", "per_source": "{s}", "per_target": "{t}"}
"""For each way of tying, what the decoder from layer s to layer t is called."""
OFFSET = "it is added to active latents for one target, as no activation here does"


class CrosslayerCoding:
    """Reads what crosslayer-coding saves."""

    name = "crosslayer-coding"

    def sniff(self, folder: Folder) -> bool:
        """Whether a folder is in this format."""
        return {"num_features", "num_layers", "d_model"} <= peek(folder, CONFIG).keys()

    def describe(self, folder: Folder) -> Description:
        """Say which tensor lies where."""
        config, where = folder.json(CONFIG), f"{folder.label}/{CONFIG}"
        name = _weights(folder)
        file, header = folder.file(name), folder.headers([name])[name]
        n, d = shape_of(file, header, "encoder_module.encoders.0.weight", "F, d")
        check_config(where, config, {"num_features": n, "d_model": d}, file)
        n_layers = count(where, config, "num_layers")
        if n_layers > len(header):
            raise FormatError(f"{where} says num_layers {n_layers}, but {file} holds {len(header)} tensors in all")
        reads, writes = _normalisation(folder, config, n_layers, d)
        activation = _activation(where, config, n)
        wiring = Wiring.clt(n_layers, *_sites(where, config))
        weights: dict[tuple[str, int], tuple[Piece, ...]] = {}
        vectors: dict[tuple[str, int], Piece | Formula] = {}
        log_threshold = "log_threshold" if "log_threshold" in header else "theta_manager.log_threshold"
        for s in range(n_layers):
            encoder = Piece(file, f"encoder_module.encoders.{s}.weight", (n, d))
            bias = Piece(file, f"encoder_module.encoders.{s}.bias_param", (n,))
            weights["W_enc", s] = (reads[s].encoder(encoder),)
            vectors["b_enc", s] = reads[s].b_enc(bias, encoder)
            if isinstance(activation, JumpReLU):
                vectors["threshold", s] = Formula(_just_below, (Piece(file, log_threshold, (n_layers, n), at=(s,)),))
        tied, scaled = _tying(where, config), _feature_wise(header, "scale")
        if scaled:  # then for every target
            scaled = {t: scaled.get(t, f"decoder_module.feature_scale.{t}") for t in range(n_layers)}
        scales = {t: read_scale(file, header, key, (n,)) for t, key in scaled.items()}
        for s in range(n_layers):
            keys = {t: f"decoder_module.decoders.{tied.format(s=s, t=t)}.weight" for t in range(s, n_layers)}
            pieces = {t: Piece(file, key, (d, n), rows_last=True, row_scale=scales.get(t)) for t, key in keys.items()}
            weights["W_dec", s] = tuple(writes[t].decoder(piece) for t, piece in pieces.items())
        skips = _skips(file, header, config, n_layers, d)
        for t in range(n_layers):
            # A decoder that is a target's own has one bias; one that is a source's adds its bias for every source.
            decoders = dict.fromkeys(tied.format(s=s, t=t) for s in range(t + 1))
            biases = [Piece(file, f"decoder_module.decoders.{decoder}.bias_param", (d,)) for decoder in decoders]
            skip = skips[t] if skips else None
            offset = {Piece(file, key, (n,)): 0.0 for at, key in _feature_wise(header, "offset").items() if at == t}
            vectors["b_dec", t] = only_where(writes[t].b_dec(biases, skip, reads[t]), offset, OFFSET)
            if skip:
                weights["W_skip", t] = (writes[t].skip(skip, reads[t]),)
        wiring = wiring.with_skips() if skips else wiring
        host = Host(text(where, config, "model_name"), None, n_layers)
        ignored = {str(file): frozenset(scaled.values())}
        return Description(
            folder.label, self.name, wiring, d, (n,) * n_layers, activation, host, weights, vectors, ignored
        )  # fmt: skip


def _weights(folder: Folder) -> str:
    """Return the name of the one file of weights: of several checkpoints, the one called the latest."""
    names = [name for name in folder.names if name.endswith(".safetensors")]
    if LATEST in names:
        return LATEST
    if len(names) != 1:
        found = f"it holds {', '.join(names[:4])}" if names else f"none is there, such as {LATEST}: fetch it again"
        raise FormatError(f"{folder.label}: one .safetensors file was expected beside {CONFIG}, {found}")
    return names[0]


def _tying(where: str, config: dict[str, Any]) -> str:
    tying = text(where, config, "decoder_tying") or "none"
    if tying not in TIED:
        raise FormatError(f"{where} says decoder_tying {tying!r}: known are {', '.join(TIED)}")
    return TIED[tying]


def _sites(where: str, config: dict[str, Any]) -> tuple[str, str]:
    """Return what is read and written, from the templates; GPT-2's CLTs read the input of ln_2 where none are given."""
    model, sites = config.get("model_name"), []
    for name, default in (("mlp_input_template", "ln_2.input"), ("mlp_output_template", "mlp.output")):
        template = text(where, config, name)
        if not template and re.fullmatch(r"(?:openai-community/)?gpt2(?:-\w+)?", str(model)):
            template = f"transformer.h.{{}}.{default}"
        match = re.fullmatch(r"(?:\w+\.)*(h|layers)\.\{\}\.(\w+)\.(input|output)", template or "")
        side = default.partition(".")[2]
        if not match or match[3] != side or (side == "output" and match[2] != "mlp"):
            raise FormatError(
                f"{where}: {name} is {template!r}, where something like 'transformer.h.{{}}.{default}' was expected: "
                f"it says what is {'read' if side == 'input' else 'written'}"
            )
        # The MLP's own output, which GPT-2 adds to the residual stream as it is.
        written = "mlp_out" if match[1] == "h" else "mlp_out_before_norm"
        sites.append(written if side == "output" else site_into(match[2], model, where))
    return sites[0], sites[1]


def _activation(where: str, config: dict[str, Any], n: int) -> Activation:
    name, mode = text(where, config, "activation_fn") or "jumprelu", config.get("topk_mode", "global")
    if name == "topk" and mode == "per_layer":
        k = config.get("topk_k")
        if not isinstance(k, int | float) or k <= 0:
            raise FormatError(f"{where}: topk_k is {k!r}, where a number above 0 was expected")
        # A share of the width is rounded up, in float32.
        return TopK(int(k) if k >= 1 else int(torch.tensor(k * n).ceil()), rectify=False)
    if name in ("topk", "batchtopk"):
        how = "over all layers, by z-scores over the batch," if mode == "global" else "over the batch"
        raise FormatError(
            f"{where}: {name} ranks {how} so that what a token activates depends on the tokens beside it: convert it "
            "to JumpReLU with the tool that trained it"
        )
    known: dict[str, Activation] = {"jumprelu": JumpReLU(), "relu": ReLU()}
    if name not in known:
        raise FormatError(f"{where}: activation_fn is {name!r}: known are {', '.join(known)}, topk and batchtopk")
    return known[name]


def _skips(file: File, header: Header, config: dict[str, Any], n_layers: int, d: int) -> list[Piece]:
    """Return each target's skip, if there are any."""
    if not config.get("skip_connection"):
        return []
    prefix = "decoder_module.skip_weights."
    untied = config.get("decoder_tying", "none") == "none"
    across = [
        key for key in header if untied and key.startswith(prefix) and len(set(key[len(prefix) :].split("->"))) > 1
    ]
    if across:
        raise FormatError(
            f"{file}: {across[0]} is a skip across layers: a site here has one skip, from its own layer, so that "
            "only CLTs with tied decoders, or without skips, can be read"
        )
    keys = [f"{prefix}{t}->{t}" if untied else f"{prefix}{t}" for t in range(n_layers)]
    return [Piece(file, key, (d, d), rows_last=True) for key in keys]


def _feature_wise(header: Header, kind: str) -> dict[int, str]:
    """Return {target: key} of what changes active latents for a target; older checkpoints have it with the encoders."""
    matches = (re.fullmatch(rf"(?:decoder|encoder)_module\.feature_{kind}\.(\d+)", key) for key in header)
    return {int(match[1]): match[0] for match in matches if match}


def _normalisation(
    folder: Folder, config: dict[str, Any], n_layers: int, d: int
) -> tuple[list[Normalisation], list[Normalisation]]:
    """Return how each layer's input and output is normalised."""
    where = f"{folder.label}/{CONFIG}"
    method = text(where, config, "normalization_method") or "none"
    method = "sqrt_d_model" if config.get("sqrt_d_model_normalize") else METHODS.get(method, method)
    if method == "sqrt_d_model":
        root = [Normalisation(std=torch.tensor(d**-0.5))] * n_layers
        return root, root
    if method not in ("none", "mean_std"):
        raise FormatError(f"{where} says normalization_method {method!r}: known are none, mean_std, sqrt_d_model")
    above = folder if STATS in folder else folder.parent
    holder = above if above is not None and STATS in above else None
    if method == "mean_std" and holder is None:
        raise FormatError(
            f"{where} says normalization_method mean_std, but there is no {STATS}, neither in {folder.label} nor in "
            "the folder above: take it from the data set of activations, or from the repository"
        )
    if holder is None:
        return [Normalisation()] * n_layers, [Normalisation()] * n_layers
    if method == "none":
        raise FormatError(
            f"{where} says nothing of normalisation, or none, but {holder.label}/{STATS} lies with it: set "
            "normalization_method to mean_std if it was trained on normalised activations, else keep the two apart"
        )
    stats = holder.json(STATS)
    sides = ([_stat(stats, layer, side, d, holder) for layer in range(n_layers)] for side in ("inputs", "targets"))
    reads, writes = sides
    return reads, writes


def _stat(stats: dict[str, Any], layer: int, side: str, d: int, folder: Folder) -> Normalisation:
    try:
        mean, std = (torch.tensor(stats[str(layer)][side][name], dtype=torch.float32) for name in ("mean", "std"))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FormatError(f"{folder.label}/{STATS}: layer {layer} lacks a mean or std of its {side}") from error
    if mean.shape != (d,) or std.shape != (d,) or not bool((mean.isfinite() & std.isfinite() & (std > 0)).all()):
        raise FormatError(
            f"{folder.label}/{STATS}: layer {layer}'s {side} need a mean and a std of {d} finite numbers, stds above 0"
        )
    return Normalisation(mean, std + EPSILON)


def _just_below(log_threshold: Tensor) -> Tensor:
    """Return thresholds such that exceeding them is reaching the stored ones: ``p >= theta`` is ``p > below theta``."""
    theta = log_threshold.exp()
    return torch.nextafter(theta, torch.full_like(theta, -math.inf))


FORMATS.add(CrosslayerCoding.name, CrosslayerCoding())
