"""The format of circuit-tracer's CLTs (Hanna & Piotrowski, and many others).

``W_enc_{i}.safetensors`` holds ``W_enc_{i}`` (F, d), ``b_enc_{i}`` (F,), ``b_dec_{i}`` (d,), the bias of *write*
layer i, and optionally ``threshold_{i}`` (F,); ``W_dec_{i}.safetensors`` holds ``W_dec_{i}`` (F, L - i, d), whose
index j writes layer i + j; ``config.yaml`` names the model and the hooks, in TransformerLens's terms. With a
threshold the activation is JumpReLU, without one ReLU.

Cross-layer TopK CLTs (ByteDance) use the same names without biases, with the norms of decoder vectors: in each
``W_dec_{i}.safetensors`` as ``W_dec_norm_{i}`` (F,), or all in ``W_dec_norm.safetensors`` as ``W_dec_norm`` (L, F).
Of all layers' ``relu(x @ W_enc.T)`` the ``L * k`` best by activation times norm are kept; ``config.json`` has the k.

The first position, the BOS token's, is outside what these CLTs were trained on: their authors' tool zeroes features
and errors there. So ``Host.exclude_first`` is 1 unless the config says otherwise, under a key of our own.
"""

from __future__ import annotations

import os
from typing import Any

import yaml
from torch import Tensor

from clt_plugin.core import FORMATS, Activation, Crosscoder, FormatError, Host, JumpReLU, Piece, ReLU, TopK, Wiring
from clt_plugin.core.files import Header
from clt_plugin.formats._description import Description
from clt_plugin.formats._files import Rows, decoder_rows, encoder_rows, plain, save_tensors, whole_folder
from clt_plugin.formats._hooks import TRANSFORMER_LENS, site_of
from clt_plugin.formats._layers import mapping
from clt_plugin.hub import Folder

CONFIG, JSON_CONFIG, NORMS = "config.yaml", "config.json", "W_dec_norm.safetensors"
ENCODERS, DECODERS = r"W_enc_(\d+)\.safetensors", r"W_dec_(\d+)\.safetensors"
KIND = "cross_layer_transcoder"


class CircuitTracer:
    """Reads and writes circuit-tracer's CLT format."""

    name = "circuit-tracer"

    def sniff(self, folder: Folder) -> bool:
        """Whether a folder is in this format."""
        return bool(folder.numbered(ENCODERS))

    def describe(self, folder: Folder) -> Description:
        """Say which tensor lies where."""
        config = _read_config(folder)
        n_layers = _count_layers(folder)
        own = mapping(f"{folder.label}/{CONFIG}", config, "clt_plugin")
        first = own.get("exclude_first", 1)
        if not isinstance(first, int) or first < 0:
            raise FormatError(f"{folder.label}/{CONFIG} says exclude_first {first!r}, where a number of positions goes")
        wiring = Wiring.clt(
            n_layers,
            read=_site(folder, config.get("feature_input_hook", "hook_resid_mid")),
            write=_site(folder, config.get("feature_output_hook", "hook_mlp_out")),
        )
        encoders, decoders = folder.numbered(ENCODERS), folder.numbered(DECODERS)
        headers = folder.headers([*encoders.values(), *decoders.values(), *((NORMS,) if NORMS in folder else ())])
        ranked = NORMS in folder or "W_dec_norm_0" in headers[decoders[0]]
        sizes, thresholds, d_model = [], [], None
        weights: dict[tuple[str, int], tuple[Piece, ...]] = {}
        vectors, ignored = {}, {}
        for layer in range(n_layers):
            encoder, decoder = folder.file(encoders[layer]), folder.file(decoders[layer])
            header = headers[encoders[layer]]
            shape = header.get(f"W_enc_{layer}", ((), None))[0]
            if len(shape) != 2:
                raise FormatError(f"{encoder}: W_enc_{layer} must be (F, d), not {shape}")
            n, width = shape
            d_model = d_model or width
            sizes.append(n)
            weights["W_enc", layer] = (Piece(encoder, f"W_enc_{layer}", (n, d_model)),)
            weights["W_dec", layer] = (Piece(decoder, f"W_dec_{layer}", (n, n_layers - layer, d_model)),)
            for name, size in (("b_enc", n), ("b_dec", d_model)):
                if not ranked or f"{name}_{layer}" in header:
                    vectors[name, layer] = Piece(encoder, f"{name}_{layer}", (size,))
            if f"threshold_{layer}" in header:
                thresholds.append(layer)
                vectors["threshold", layer] = Piece(encoder, f"threshold_{layer}", (n,))
            if ranked:
                key = f"W_dec_norm_{layer}"
                vectors["stored_norms", layer] = Piece(decoder, key, (n,))
                if NORMS in folder:
                    norms = Piece(folder.file(NORMS), "W_dec_norm", (n_layers, n), at=(layer,))
                    vectors["stored_norms", layer] = norms
                    ignored[str(decoder)] = frozenset([key])
        if thresholds and len(thresholds) < n_layers:
            without = sorted(set(range(n_layers)) - set(thresholds))
            raise FormatError(f"{folder.label}: layers {without} have no threshold, the others have one")
        if thresholds and ranked:
            raise FormatError(f"{folder.label} has both thresholds and decoder norms to rank by: it can only mean one")
        activation: Activation = ReLU()
        if thresholds:
            activation = JumpReLU(own["bandwidth"]) if "bandwidth" in own else JumpReLU()
        elif ranked:
            activation = TopK(_k(folder, config), scope="joint", score="decoder_norm")
        host = Host(_model_name(config), own.get("model_revision"), n_layers, exclude_first=first)
        return Description(
            folder.label,
            self.name,
            wiring,
            d_model,
            tuple(sizes),
            activation,
            host,
            weights,
            vectors,
            ignored,
            metadata=own.get("metadata") or {},
        )

    def save(self, crosscoder: Crosscoder, folder: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write a folder, layer by layer; see `Crosscoder.save`."""
        hooks = {site: hook for hook, site in TRANSFORMER_LENS.items()}
        read, write = crosscoder.sites.read_name, crosscoder.sites.write_name
        _check_fits(crosscoder, read, write)
        activation, host = crosscoder.activation, crosscoder.host
        own: dict[str, Any] = {"exclude_first": host.exclude_first, "model_revision": host.model_revision}
        if crosscoder.metadata:
            own["metadata"] = plain(crosscoder.metadata, "metadata")
        if isinstance(activation, JumpReLU):
            own["bandwidth"] = activation.bandwidth
        config = {
            "model_name": host.model_name,
            "model_kind": KIND,
            "feature_input_hook": hooks[read],
            "feature_output_hook": hooks[write],
            "clt_plugin": own,
        }
        with whole_folder(folder, overwrite) as aside:
            for layer in range(crosscoder.n_layers):
                encoder: dict[str, Tensor | Rows] = {
                    f"W_enc_{layer}": encoder_rows(crosscoder, layer),
                    f"b_enc_{layer}": crosscoder.b_enc[layer],
                    f"b_dec_{layer}": crosscoder.b_dec[layer],
                }
                if crosscoder.threshold is not None:
                    encoder[f"threshold_{layer}"] = crosscoder.threshold[layer]
                save_tensors(aside / f"W_enc_{layer}.safetensors", encoder)
                shape = (crosscoder.group_sizes[layer], crosscoder.n_layers - layer, crosscoder.d_model)
                decoder = {f"W_dec_{layer}": decoder_rows(crosscoder, layer, *shape)}
                save_tensors(aside / f"W_dec_{layer}.safetensors", decoder)
            (aside / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def _read_config(folder: Folder) -> dict[str, Any]:
    config = folder.yaml(CONFIG) if CONFIG in folder else folder.json(JSON_CONFIG) if JSON_CONFIG in folder else {}
    if config.get("model_kind", KIND) != KIND:
        raise FormatError(
            f"{folder.label}/{CONFIG} says model_kind {config['model_kind']!r}, but the files are a CLT's"
        )
    return config


def _model_name(config: dict[str, Any]) -> str | None:
    names = (config.get(key) for key in ("model_name", "base_model", "base_model_name", "model"))
    return next((name for name in names if isinstance(name, str)), None)


def _k(folder: Folder, config: dict[str, Any]) -> int:
    k = config.get("k")
    if not isinstance(k, int) or k < 1:
        raise FormatError(
            f"{folder.label} ranks latents by decoder norm, but its config gives no k (found {k!r}): how many a layer "
            "to keep, on average, is expected under that name"
        )
    return k


def _count_layers(folder: Folder) -> int:
    """Count the layers by both kinds of file, and by what the first decoder writes: a gap is a missing shard."""
    encoders, decoders = folder.numbered(ENCODERS), folder.numbered(DECODERS)
    n_layers = max({*encoders} | {*decoders}) + 1
    if 0 in decoders:
        header: Header = folder.headers([decoders[0]])[decoders[0]]
        shape, _ = header.get("W_dec_0", ((), None))
        n_layers = max(n_layers, shape[1]) if len(shape) == 3 else n_layers
    for name, found in (("W_enc", encoders), ("W_dec", decoders)):
        missing = sorted(set(range(n_layers)) - set(found))
        if missing:
            files = ", ".join(f"{name}_{layer}.safetensors" for layer in missing)
            raise FormatError(f"{folder.label}: {files} missing: the folder is incomplete, fetch or save it again")
    return n_layers


def _site(folder: Folder, hook: str) -> str:
    return site_of(hook, TRANSFORMER_LENS, f"{folder.label}/{CONFIG}")


def _check_fits(crosscoder: Crosscoder, read: str, write: str) -> None:
    """Refuse what the format cannot hold."""
    wiring, hooks = crosscoder.wiring, {*TRANSFORMER_LENS.values()}
    reason = None
    if read not in hooks or write not in hooks:
        reason = f"it reads {read} and writes {write}"
    elif wiring != Wiring.clt(wiring.n_layers, read, write):
        reason = f"its wiring is {wiring.name}" + (" with affine skips" if wiring.skips else "")
    elif not isinstance(crosscoder.activation, ReLU | JumpReLU):
        reason = f"its activation is {crosscoder.activation}"
    elif crosscoder.host.n_layers not in (None, wiring.n_layers):
        reason = f"it covers {wiring.n_layers} layers of a model of {crosscoder.host.n_layers}"
    elif crosscoder.is_partial:
        reason = "it is a selection of a larger one"
    elif len(set(crosscoder.group_sizes)) > 1:  # the tool sizes every layer as the first
        reason = f"its layers have different numbers of latents, {list(crosscoder.group_sizes)}"
    if reason:
        raise FormatError(f"circuit-tracer's format holds ReLU or JumpReLU CLTs, but {reason}: use format='native'")


FORMATS.add(CircuitTracer.name, CircuitTracer())
