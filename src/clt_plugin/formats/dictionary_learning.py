"""The format of science-of-finetuning's crosscoders (Minder et al. 2025; github.com/science-of-finetuning).

``config.json`` (the class's arguments) and ``model.safetensors``: ``encoder.weight`` (n, d, F), ``encoder.bias`` (F,),
``decoder.weight`` (n, F, d), ``decoder.bias`` (n, d), for n = 2 models, base first, then chat. ``trainer_config.json``
names the layer, whose block's output is read and written; without one the folder's name does: ``...-L13-...``::

    r = relu(sum over models of z_m @ encoder.weight[m] + encoder.bias)
    a = r                                      CrossCoder
    a = r * (r * n_f > threshold)              BatchTopKCrossCoder, outside training
    reconstruction of z_m = a @ decoder.weight[m] + decoder.bias[m]

The code normalisation n_f of a latent is the sum of its decoder norms over models (CROSSCODER), the norm of its
decoder vectors as one (SAE), a weighted sum of these two (MIXED), or 1 (NONE). What the library calls scaled
activations are ``a * n_f``. With ``activation_mean``, ``activation_std`` (n, d) and ``activation_global_scale`` (n,)
that are not nan, ``z_m = (x_m - mean_m) * g_m`` and the reconstruction of ``x_m`` is ``z_m / (g_m + 1e-8) + mean_m``:
both are folded into the weights here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clt_plugin.core import FORMATS, Activation, BatchTopK, File, FormatError, Host, Piece, ReLU, Wiring
from clt_plugin.core.files import Header
from clt_plugin.formats._description import Description, Formula
from clt_plugin.formats._layers import check_config, count, mapping, norms, peek, shape_of, times
from clt_plugin.hub import Folder

CONFIG, TRAINER, WEIGHTS = "config.json", "trainer_config.json", "model.safetensors"
MODELS = ("base", "chat")
ITS_KEYS = {"activation_dim", "dict_size", "num_layers"}
CODE_NORMALIZATIONS = {"CROSSCODER": 1, "SAE": 2, "MIXED": 3, "NONE": 4}
"""How activations are scored, with the number that files give it; DECOUPLED, 5, has an activation a model."""

BUFFERS = ("activation_mean", "activation_std", "activation_global_scale")
UNREAD = frozenset(["code_normalization_id", "k", "target_rms", *BUFFERS])
"""Settings kept among the tensors, and the normalisation, which is read apart."""

EPSILON = 1e-8


class DictionaryLearning:
    """Reads crosscoders of science-of-finetuning's fork of dictionary_learning."""

    name = "dictionary-learning-crosscoder"

    def sniff(self, folder: Folder) -> bool:
        """Whether a folder is in this format."""
        return peek(folder, CONFIG).keys() >= ITS_KEYS

    def describe(self, folder: Folder) -> Description:
        """Say which tensor lies where."""
        config, where = folder.json(CONFIG), f"{folder.label}/{CONFIG}"
        trainer = mapping(f"{folder.label}/{TRAINER}", folder.json(TRAINER), "trainer") if TRAINER in folder else {}
        said = {**trainer, **{key: value for key, value in config.items() if value is not None}}
        file, header = folder.file(WEIGHTS), folder.headers([WEIGHTS])[WEIGHTS]
        n_models, d, n = shape_of(file, header, "encoder.weight", "models, d, F")
        check_config(where, config, {"num_layers": n_models, "activation_dim": d, "dict_size": n}, file=file)
        _check_settings(where, config, n_models)
        shape, models = (n_models, n, d), range(n_models)
        encoders = [Piece(file, "encoder.weight", (n_models, d, n), at=(m,), rows_last=True) for m in models]
        decoders = [Piece(file, "decoder.weight", shape, at=(m,)) for m in models]
        bias = Piece(file, "encoder.bias", (n,))
        biases = [Piece(file, "decoder.bias", (n_models, d), at=(m,)) for m in models]
        vectors: dict[tuple[str, int], Piece | Formula] = {("b_enc", 0): bias}
        vectors |= {("b_dec", m): biases[m] for m in models}
        activation: Activation = ReLU()
        if {"threshold", "k"} & header.keys() or "k" in said or "BatchTopK" in str(said.get("dict_class")):
            activation = BatchTopK(_k(folder, said, header), score="decoder_norm")
            vectors["threshold", 0] = Formula(_trained(file), (Piece(file, "threshold", ()),))
            # Of decoders as they are stored, before normalisation is folded in.
            scores = _scores(folder, said, header, tuple(decoders))
            vectors["stored_norms", 0] = Formula(scores, (bias,))
        normalisation = _normalisation(file, header, (n_models, d))
        if normalisation:
            means, scales = normalisation
            vectors["b_enc", 0] = Formula(_shifted(tuple(encoders), means, scales), (bias,))
            for m, scale in enumerate(scales):
                vectors["b_dec", m] = Formula(_written(means[m], scale), (biases[m],))
                encoders[m] = Piece(file, "encoder.weight", (n_models, d, n), (m,), rows_last=True, scale=scale)
                decoders[m] = Piece(file, "decoder.weight", shape, (m,), scale=1 / (scale + EPSILON))
        names = trainer.get("lm_name")
        return Description(
            folder.label,
            self.name,
            Wiring.model_diff(MODELS, _layer(folder, trainer)),
            d,
            (n,),
            activation,
            Host(),
            {("W_enc", 0): tuple(encoders), ("W_dec", 0): tuple(decoders)},
            vectors,
            {str(file): UNREAD},
            metadata={"models": f"{names} (chat, then base)"} if names else {},
        )


# ---------------------------------------------------------------- the configs


def _check_settings(where: str, config: Mapping[str, Any], n_models: int) -> None:
    """Refuse arguments of the class that make it another one."""
    if n_models != len(MODELS):
        raise FormatError(f"{where} is of {n_models} models, where a base and a chat model are expected")
    every = [None, list(range(n_models))]
    usual: dict[str, list[Any]] = {
        "encoder_layers": every,
        "latent_processor": [None],
        "num_decoder_layers": [None, n_models],
    }
    for key, values in usual.items():
        if config.get(key) not in values:
            raise FormatError(f"{where} says {key} {config[key]!r}: only crosscoders without can be read")


def _layer(folder: Folder, trainer: Mapping[str, Any]) -> int:
    layer = trainer.get("layer")
    if isinstance(layer, int):
        if layer < 0:
            raise FormatError(f"{folder.label}/{TRAINER} says layer {layer}, where a block's index was expected")
        return layer
    named = {*re.findall(r"(?<![A-Za-z0-9])[lL](\d+)(?![A-Za-z0-9])", folder.label)}
    if len(named) != 1:
        raise FormatError(
            f'{folder.label} does not say which layer it is of: write {{"trainer": {{"layer": 13}}}} into {TRAINER}, '
            "or name the folder as it was published, such as gemma-2-2b-crosscoder-l13"
        )
    return int(named.pop())


def _k(folder: Folder, config: Mapping[str, Any], header: Header) -> int:
    """Return how many latents were kept in training; it is no longer used after that."""
    given = [key for key in ("k", "k_target") if isinstance(config.get(key), int)]
    if given:
        return count(f"{folder.label}/{CONFIG}", config, given[0])
    if "k" not in header:
        raise FormatError(f"{folder.label}/{CONFIG} gives no k, nor do the tensors: is it a BatchTopK?")
    return int(folder.file(WEIGHTS).read("k"))


# ---------------------------------------------------------------- scores


def _scores(
    folder: Folder, config: Mapping[str, Any], header: Header, decoders: tuple[Piece, ...]
) -> Callable[[Tensor], Tensor]:
    """Return what computes what activations are multiplied with before the threshold, (F,)."""
    where, file = f"{folder.label}/{CONFIG}", folder.file(WEIGHTS)
    said = config.get("code_normalization")
    said = None if said is None else str(said).rpartition(".")[2].upper()
    _check_code(where, said)
    guess = re.search(r"SAELoss|Decoupled", folder.label, re.IGNORECASE)
    if said is None and "code_normalization_id" not in header and guess:
        raise FormatError(
            f"{where} gives no code_normalization, and {guess[0]} in the folder's name is not the default, CROSSCODER: "
            f"write it into {CONFIG}"
        )

    def of(_: Tensor) -> Tensor:
        code = said or "CROSSCODER"
        if "code_normalization_id" in header:
            number = int(file.read("code_normalization_id"))
            stored = next((code for code, id in CODE_NORMALIZATIONS.items() if id == number), f"number {number}")
            _check_code(str(file), stored)
            if said not in (None, stored):
                raise FormatError(f"{where} says code_normalization {said}, but {file} says {stored}")
            code = stored
        by_model = torch.stack([norms(decoder) for decoder in decoders])
        summed, joint = by_model.sum(0), by_model.norm(dim=0)
        alphas = (config.get("code_normalization_alpha_sae", 1.0), config.get("code_normalization_alpha_cc", 0.1))
        return {
            "CROSSCODER": summed,
            "SAE": joint,
            "MIXED": alphas[0] * joint + alphas[1] * summed,
            "NONE": torch.ones_like(joint),
        }[code]

    return of


def _check_code(where: str, code: str | None) -> None:
    if code is None or code in CODE_NORMALIZATIONS:
        return
    reason = "it has an activation for each model, where one is expected" if code in ("DECOUPLED", "number 5") else ""
    raise FormatError(
        f"{where} says code_normalization {code}: {reason or 'known are ' + ', '.join(CODE_NORMALIZATIONS)}"
    )


def _trained(file: File) -> Callable[[Tensor], Tensor]:
    def of(threshold: Tensor) -> Tensor:
        if threshold < 0:
            raise FormatError(
                f"{file}: threshold is {float(threshold):g}, so it was never set: this is a checkpoint of too early a "
                "step of training"
            )
        return threshold

    return of


# ---------------------------------------------------------------- normalisation


def _normalisation(file: File, header: Header, shape: tuple[int, int]) -> tuple[Tensor, list[float]] | None:
    """Return the means (n, d) and for each model the scale; None where activations are read as they are."""
    if not {*BUFFERS} & {*header}:
        return None
    expected = dict(zip(BUFFERS, (shape, shape, shape[:1]), strict=True))
    for key, wanted in expected.items():
        if shape_of(file, header, key, "models, d" if len(wanted) == 2 else "models") != wanted:
            raise FormatError(f"{file}: {key} has shape {header[key][0]}, where {wanted} was expected")
    mean, std, scale = (file.read(key) for key in BUFFERS)
    if mean.isnan().all() and std.isnan().all():
        return None
    if not all(bool(torch.isfinite(buffer).all()) for buffer in (mean, std, scale)) or not bool((scale > 0).all()):
        raise FormatError(
            f"{file}: {', '.join(BUFFERS)} hold values that are not finite, or a scale that is not above 0"
        )
    return mean.double(), scale.double().tolist()


def _shifted(encoders: Sequence[Piece], means: Tensor, scales: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """Return what makes the encoder's bias, (F,), one for activations that are not normalised."""

    def of(bias: Tensor) -> Tensor:
        shifts = [scale * times(encoder, mean) for encoder, mean, scale in zip(encoders, means, scales, strict=True)]
        return bias.double() - torch.stack(shifts).sum(0)

    return of


def _written(mean: Tensor, scale: float) -> Callable[[Tensor], Tensor]:
    """Return what makes a decoder's bias, (d,), one for activations that are not normalised."""
    return lambda bias: bias.double() / (scale + EPSILON) + mean


FORMATS.add(DictionaryLearning.name, DictionaryLearning())
