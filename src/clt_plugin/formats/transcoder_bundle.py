"""circuit-tracer's transcoders: a set of ``layer_{i}.safetensors``, one for every layer of a model.

Each file holds::

    W_enc (F, d)    b_enc (F,)    W_dec (F, d), in some sets (d, F)    b_dec (d,)
    activation_function.threshold (F,), optional    W_skip (d_out, d_in), optional    k, a number, optional

With h = x @ W_enc.T + b_enc: y = activation(h) @ W_dec + b_dec (+ x @ W_skip.T). ``config.yaml`` names the model
(``model_name``), the hooks in TransformerLens's terms (``feature_input_hook``, ``feature_output_hook``), and
optionally ``activation`` (``relu`` or ``topk``, with a ``k``). Where it is silent, thresholds tell of JumpReLU, here
``h * (h > threshold)``, a ``k`` among the tensors of TopK, and else it is ReLU. TopK keeps the k largest h as they are,
negative ones too.

Their tool gives nothing to the first position, the BOS token's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from clt_plugin.core import FORMATS, MODEL, Activation, FormatError, Host, JumpReLU, ReLU, Site, TopK
from clt_plugin.core.files import Header
from clt_plugin.formats._description import Description
from clt_plugin.formats._hooks import RESIDUAL_HOOKS, site_of
from clt_plugin.formats._layers import check_layers, count, peek, shape_of, text
from clt_plugin.formats._one_layer import Listed, Tensors, describe_layer, join_layers
from clt_plugin.hub import Folder

CONFIG, LAYER, LAYERS = "config.yaml", "layer_{i}.safetensors", r"layer_(\d+)\.safetensors"
THRESHOLD = "activation_function.threshold"
HOOKS = {"read": "feature_input_hook", "write": "feature_output_hook"}


class TranscoderBundle:
    """Reads circuit-tracer's sets of transcoders."""

    name = "transcoder-bundle"

    def sniff(self, folder: Folder) -> bool:
        """Whether a folder is in this format; one whose config lists the files is a listing."""
        return bool(folder.numbered(LAYERS)) and not isinstance(peek(folder, CONFIG).get("transcoders"), list)

    def describe(self, folder: Folder) -> Description:
        """Say which tensor lies where."""
        files = folder.numbered(LAYERS)
        check_layers(folder.label, files, LAYER)
        config, where = folder.yaml(CONFIG) if CONFIG in folder else {}, f"{folder.label}/{CONFIG}"
        if config.get("model_kind", "transcoder_set") != "transcoder_set":
            raise FormatError(
                f"{where} says model_kind {config['model_kind']!r}, but its files are a transcoder a layer"
            )
        headers = folder.headers(files.values())
        parts = [
            self.describe_file(folder, name, headers[name], said_by(config, where, layer))
            for layer, name in files.items()
        ]
        return join_layers(parts, folder.label, self.name)

    def describe_file(self, folder: Folder, name: str, header: Header, listed: Listed) -> Description:
        """Do so for one file."""
        if listed.read is None or listed.write is None or listed.layer is None:
            raise FormatError(
                f"{folder.label}/{name}: no config says what it reads and writes, and the tensors do not tell: make a "
                f"folder with a {CONFIG} that has model_name, feature_input_hook and feature_output_hook (such as "
                f"mlp.hook_in and hook_mlp_out), beside the files or listing them under transcoders "
                f"(- hf://owner/name/{LAYER.format(i=0)}, a line a layer)"
            )
        sites = Site(MODEL, listed.read, listed.layer), Site(MODEL, listed.write, listed.layer)
        tensors = Tensors(
            threshold=THRESHOLD,
            W_skip="W_skip",
            decoder_d_by_f=_is_turned(folder, name, header),
            skip_out_by_in=True,
            rectified=False,
        )
        activation, host = _activation(folder, name, header, listed), Host(listed.model_name, exclude_first=1)
        described = describe_layer(folder, name, header, tensors, self.name, sites, host, activation)
        return replace(described, ignored={str(folder.file(name)): frozenset(["k"])})


def said_by(config: dict[str, Any], where: str, layer: int) -> Listed:
    """Return what a ``config.yaml`` says of one of its layers."""
    hooks = {verb: text(where, config, key) for verb, key in HOOKS.items()}
    sites = {verb: site_of(hook, RESIDUAL_HOOKS, where) for verb, hook in hooks.items() if hook}
    model_name, activation = (text(where, config, key) for key in ("model_name", "activation"))
    k = None if config.get("k") is None else count(where, config, "k")
    if k is not None and activation is None:
        raise FormatError(f"{where} gives k {k} and no activation: say activation: topk if it is meant, else drop k")
    return Listed(**sites, layer=layer, model_name=model_name, activation=activation, k=k)


def _is_turned(folder: Folder, name: str, header: Header) -> bool:
    """Whether the decoder is (d, F): some sets have it so, and their files alone tell."""
    file = folder.file(name)
    (n,), (d,) = shape_of(file, header, "b_enc", "F"), shape_of(file, header, "b_dec", "d")
    if n == d:
        raise FormatError(
            f"{file} has as many latents as coordinates, {n}: whether W_dec is (F, d) or (d, F), as some sets have it, "
            "cannot be seen"
        )
    return shape_of(file, header, "W_dec", "F, d") == (d, n)


def _activation(folder: Folder, name: str, header: Header, listed: Listed) -> Activation:
    """Return the activation: what the config says, which the tensors must not contradict, or else what they tell."""
    file, jumps = folder.file(name), THRESHOLD in header
    stored = int(file.read("k")) if "k" in header else None
    said = listed.activation or ("jumprelu" if jumps else "topk" if stored is not None else "relu")
    if said not in ("relu", "jumprelu", "topk"):
        raise FormatError(f"{file}: its config says activation {said!r}; known are relu, jumprelu and topk")
    if jumps != (said == "jumprelu") or (stored is not None and said != "topk"):
        held = [key for key in (THRESHOLD, "k") if key in header]
        raise FormatError(f"{file} is said to have activation {said}, but holds {' and '.join(held) or 'no threshold'}")
    if said != "topk":
        return JumpReLU() if jumps else ReLU()
    if stored is not None and listed.k not in (None, stored):
        raise FormatError(f"{file} holds k = {stored}, but its config says k {listed.k}")
    k = listed.k or stored
    if k is None:
        raise FormatError(
            f"{file} has activation topk, but no k is given: make a folder with a {CONFIG} that says k "
            "(128 for facebook/crv-8b-instruct-transcoders, which its authors' tool knows) and lists the files under "
            "transcoders"
        )
    return TopK(k, rectify=False)


FORMATS.add(TranscoderBundle.name, TranscoderBundle())
