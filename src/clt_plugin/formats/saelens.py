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

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clt_plugin.core import FORMATS, FormatError, Host, Piece
from clt_plugin.core.files import Header
from clt_plugin.formats._description import Description, Formula
from clt_plugin.formats._layers import (
    at_least_zero,
    check_config,
    count,
    norms,
    of_centred_input,
    one_layer,
    peek,
    read_scale,
    shape_of,
    times,
)
from clt_plugin.formats._saelens_config import activation_of, check, flat, sites_of
from clt_plugin.hub import Folder

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
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
        where = f"{folder.label}/{CONFIG}"
        config = flat(where, folder.json(CONFIG))
        kind = check(where, config)
        file, header = folder.file(WEIGHTS), folder.headers([WEIGHTS])[WEIGHTS]
        architecture, d_in, n = config["architecture"], count(where, config, "d_in"), count(where, config, "d_sae")
        transcodes, has_skip = architecture.endswith("transcoder"), "skip" in architecture
        d_out = d_in
        if transcodes:
            d_out = shape_of(file, header, "W_dec", "F, d_out")[1]
            check_config(where, config, {"d_out": d_out}, file)
        read, write = sites_of(where, config, transcodes)
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
            growth = read_scale(file, header, "r_mag", (n,)).exp()
            weights["W_enc", 0] = (Piece(file, "W_enc", (d_in, n), rows_last=True, row_scale=growth),)
            vectors |= _gated(encoder, centre)
        else:
            b_enc = Piece(file, "b_enc", (n,))
            vectors["b_enc", 0] = b_enc if centre is None else of_centred_input(b_enc, centre, encoder)
        if kind == "jumprelu":
            vectors["threshold", 0] = Formula(at_least_zero, (Piece(file, "threshold", (n,)),))
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
            activation_of(where, config, kind),
            Host(name and TRANSFORMER_LENS_NAMES.get(name, name)),
            weights,
            vectors,
            {str(file): ignored},
            metadata={"recipe": recipe} if (recipe := {key: config[key] for key in RECIPE if config.get(key)}) else {},
        )


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
        return at_least_zero(b.double() - r.double().exp() * gate.double())

    return {
        ("b_enc", 0): Formula(bias, (b_mag, r_mag) if centre is None else (b_mag, r_mag, centre)),
        ("threshold", 0): Formula(threshold, (b_mag, r_mag, b_gate)),
    }


def _scaling_factor(folder: Folder, where: str, header: Header, config: Mapping[str, Any], n: int) -> Tensor | None:
    """Return what decoder vectors are multiplied with after finetuning; None where that is 1."""
    factor = read_scale(folder.file(WEIGHTS), header, "scaling_factor", (n,))
    if torch.allclose(factor, torch.ones(n, dtype=factor.dtype)):
        return None
    if not config.get("finetuning_scaling_factor"):
        raise FormatError(
            f"{folder.file(WEIGHTS)} has a scaling_factor other than 1, but {where} does not say "
            "finetuning_scaling_factor: one of the two is wrong"
        )
    return factor


FORMATS.add(SAELens.name, SAELens())
