"""What readers share: looking into configs, counting layers, computing vectors from weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clt_plugin.core import File, FormatError, Piece, Site, Wiring
from clt_plugin.core.files import Header
from clt_plugin.formats._description import Formula
from clt_plugin.hub import Folder


def peek(folder: Folder, name: str) -> dict[str, Any]:
    """Return a config to recognise a folder by; nothing where there is none, or what it holds is not one."""
    if name not in folder:
        return {}
    try:
        return folder.json(name) if name.endswith(".json") else folder.yaml(name)
    except FormatError:
        return {}


def shape_of(file: File, header: Header, key: str, axes: str) -> tuple[int, ...]:
    """Return a tensor's shape, from which sizes are taken; refuse one that is missing or has other axes.

    Args:
        file: Where it is.
        header: The file's header.
        key: The tensor's key.
        axes: What its axes are called, such as ``"L, d, F"``.
    """
    if key not in header:
        raise FormatError(f"{file} has no tensor {key}: it holds {', '.join(sorted(header)) or 'nothing'}")
    shape = header[key][0]
    if len(shape) != axes.count(",") + 1 or 0 in shape:
        raise FormatError(f"{file}: {key} must be ({axes}), not {shape}")
    return shape


def read_scale(file: File, header: Header, key: str, shape: tuple[int, ...], above_0: bool = False) -> Tensor:
    """Read what weights are multiplied with or divided by; refuse another shape, and values that are not finite."""
    found = header.get(key, (None, None))[0]
    if found != shape:
        raise FormatError(f"{file}: {key} is {'missing' if found is None else found}, where {shape} was expected")
    scale = wide(file.read(key))
    if not bool(scale.isfinite().all()) or (above_0 and not bool((scale > 0).all())):
        raise FormatError(f"{file}: {key} must hold finite numbers{' above 0' if above_0 else ''}")
    return scale


def check_config(where: str, config: Mapping[str, Any], found: Mapping[str, int], file: File | None = None) -> None:
    """Refuse a config that contradicts the tensors; what it does not say is not asked for.

    Args:
        where: What the config is called.
        config: What it says.
        found: {its key: what the tensors have}.
        file: Where the tensors are, for the message.
    """
    tensors = f"the tensors of {file}" if file else "the tensors"
    for key, value in found.items():
        if config.get(key, value) != value:
            raise FormatError(f"{where} says {key} {config[key]!r}, but {tensors} have {value}")


def count(where: str, config: Mapping[str, Any], key: str) -> int:
    """Return a number that a config must give, such as k: whole, and at least 1."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 1 or value % 1:
        raise FormatError(
            f"{where} gives no {key} (found {value!r}): a whole number of at least 1 is expected under that name"
        )
    return int(value)


def number(where: str, config: Mapping[str, Any], key: str, default: float) -> float:
    """Return a number above 0 that a config may give."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise FormatError(f"{where} says {key} {value!r}, where a number above 0 was expected")
    return float(value)


def text(where: str, config: Mapping[str, Any], key: str) -> str | None:
    """Return a name that a config may give; refuse what is not one."""
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise FormatError(f"{where} says {key} {value!r}, where a name was expected")
    return value


def mapping(where: str, config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the part of a config under a key, empty where there is none; refuse what is not a mapping."""
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise FormatError(f"{where} says {key} {value!r}, where a mapping was expected")
    return value


def all_or_none(label: str, has: Mapping[str, bool], what: str) -> bool:
    """Return whether all files have something; refuse some with and some without.

    Args:
        label: What messages call the whole.
        has: {file: whether it has it}.
        what: What it is, such as ``"a skip connection"``.
    """
    held, lacking = ([name for name, holds in has.items() if holds == wanted] for wanted in (True, False))
    if held and lacking:
        raise FormatError(
            f"{label}: {_some(held)} {'have' if len(held) > 1 else 'has'} {what}, but {_some(lacking)} "
            f"{'have' if len(lacking) > 1 else 'has'} none: fetch or save it again"
        )
    return bool(held)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def check_layers(label: str, found: Collection[int], file: str, n_layers: int | None = None) -> int:
    """Return the number of layers, of which none may be missing.

    Args:
        label: The folder's.
        found: The layers that are there.
        file: What a layer's file is called, with ``{i}`` for the number.
        n_layers: How many there must be; None for as many as the last one found says.
    """
    n_layers = n_layers or max(found, default=-1) + 1
    missing = [file.format(i=i) for i in range(n_layers) if i not in found]
    if missing or len(found) > n_layers:
        what = (
            f"{', '.join(missing)} missing" if missing else f"{len(found)} layers found where {n_layers} are expected"
        )
        raise FormatError(f"{label}: {what}: the folder is incomplete or mixed, fetch or save it again")
    return n_layers


MODULE_INPUTS = {
    "ln_2": "resid_mid",
    "pre_feedforward_layernorm": "resid_mid",
    "post_attention_layernorm": "resid_mid",
    "mlp": "mlp_in",
}
"""The sites that are a module's input: the norm before the MLP, as families call it, and the MLP."""


def site_into(module: str, model_name: str | None, where: str) -> str:
    """Return the site that is a module's input.

    Args:
        module: Its name in transformers, within a block.
        model_name: The model, where it is known.
        where: Which file names it, for the message.
    """
    if module not in MODULE_INPUTS:
        raise FormatError(f"{where} reads the input of {module!r}: known are {', '.join(MODULE_INPUTS)}")
    if module == "post_attention_layernorm" and re.search("gemma|olmo-?2", model_name or "", re.IGNORECASE):
        raise FormatError(f"{where} reads the input of {module}, which in {model_name} is no site of a transcoder's")
    return MODULE_INPUTS[module]


def only_where(vector: Piece | Formula, holds: Mapping[Piece, float], why: str) -> Piece | Formula:
    """Return a vector that is read only where other tensors do nothing, and refused where they do.

    Args:
        vector: What to read.
        holds: {tensor: the value at which it does nothing}.
        why: What is wrong where a tensor has another value.
    """
    if not holds:
        return vector
    own = vector.pieces if isinstance(vector, Formula) else (vector,)

    def of(*tensors: Tensor) -> Tensor:
        for (piece, value), tensor in zip(holds.items(), tensors[len(own) :], strict=True):
            if bool((tensor != value).any()):
                raise FormatError(f"{piece.file}: {piece.key} is not {value:g} throughout: {why}")
        return vector.of(*tensors[: len(own)]) if isinstance(vector, Formula) else tensors[0]

    return Formula(of, (*own, *holds))


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 at least, in which sums and products are exact enough."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# ---------------------------------------------------------------- one layer


def at_least_zero(threshold: Tensor) -> Tensor:
    """Return t such that ``h * (h > t)`` is ``relu(h) * (h > threshold)``."""
    return threshold.clamp(min=0)


def one_layer(read: Site, write: Site, skip: bool = False) -> Wiring:
    """Return the wiring of one autoencoder, or of one layer's transcoder, with or without an affine skip."""
    wiring = Wiring.sae(read)
    if read != write:
        wiring = Wiring(((read,),), ((write,),), name=f"plt(layer {write.layer})")
    return wiring.with_skips([(read, write)]) if skip else wiring


CHUNK = 2**24
"""How many entries of a weight are in memory at a time while a vector is computed from it."""


def times(weight: Piece, x: Tensor) -> Tensor:
    """Return weight @ x in float64, (rows,), for a weight that stays on disk and x of (columns,)."""
    stored, x = weight.file.read(weight.key, weight.at), x.double()
    step = max(1, CHUNK // max(1, stored[0].numel()))
    starts = range(0, len(stored), step)
    if weight.rows_last:
        return torch.stack([x[i : i + step] @ stored[i : i + step].double() for i in starts]).sum(0)
    return torch.cat([stored[i : i + step].double() @ x for i in starts])


def norms(weight: Piece) -> Tensor:
    """Return the norm of each row in float64, (rows,), of a weight that stays on disk, rows first."""
    stored = weight.file.read(weight.key, weight.at)
    step = max(1, CHUNK // max(1, stored[0].numel()))
    return torch.cat([stored[i : i + step].double().flatten(1).norm(dim=1) for i in range(0, len(stored), step)])


def of_centred_input(bias: Piece, centre: Piece, encoder: Piece) -> Formula:
    """Return the encoder bias, (F,), of ``(x - centre) @ W_enc + bias`` for an encoder that reads x itself."""
    return Formula(lambda b, c: b.double() - times(encoder, c), (bias, centre))
