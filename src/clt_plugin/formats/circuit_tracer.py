"""The format of circuit-tracer's CLTs (Hanna & Piotrowski, and many others).

``W_enc_{i}.safetensors`` holds ``W_enc_{i}`` (F, d), ``b_enc_{i}`` (F,), ``b_dec_{i}`` (d,), the bias of *write*
layer i, and optionally ``threshold_{i}`` (F,); ``W_dec_{i}.safetensors`` holds ``W_dec_{i}`` (F, L - i, d), whose
index j writes layer i + j; ``config.yaml`` names the model and the hooks, in TransformerLens's terms. With a
threshold the activation is JumpReLU, without one ReLU.

The first position, the BOS token's, is outside what these CLTs were trained on: their authors' tool zeroes features
and errors there. So ``Host.exclude_first`` is 1 unless the config says otherwise, under a key of our own.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
import yaml

from clt_plugin.core import FORMATS, Activation, Crosscoder, FormatError, Host, JumpReLU, Piece, ReLU, Wiring
from clt_plugin.formats._files import Description, build, read_header, save_tensors, whole_folder

CONFIG = "config.yaml"
KIND = "cross_layer_transcoder"
HOOKS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "ln2.hook_normalized": "mlp_in_before_gain",
    "mlp.hook_in": "mlp_in",
    "mlp.hook_out": "mlp_out_before_norm",
    "hook_mlp_out": "mlp_out",
}
"""Our names of the sites that the config names by TransformerLens's hooks."""


class CircuitTracer:
    """Reads and writes circuit-tracer's CLT format."""

    name = "circuit-tracer"

    def sniff(self, folder: Path) -> bool:
        """Whether a folder is in this format."""
        names = {path.name for path in folder.glob("W_*.safetensors")}
        return any(re.fullmatch(r"W_enc_\d+\.safetensors", name) for name in names)

    def load(
        self,
        folder: Path,
        lazy: bool | str = "auto",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Crosscoder:
        """Load a folder; arguments as for `clt_plugin.load`."""
        return build(self._describe(folder, _read_config(folder)), lazy, dtype, device)

    def _describe(self, folder: Path, config: dict[str, Any]) -> Description:
        n_layers = _count_layers(folder)
        own = config.get("clt_plugin") or {}
        wiring = Wiring.clt(
            n_layers,
            read=_site(folder, config.get("feature_input_hook", "hook_resid_mid")),
            write=_site(folder, config.get("feature_output_hook", "hook_mlp_out")),
        )
        sizes, thresholds, d_model = [], [], None
        weights: dict[tuple[str, int], tuple[Piece, ...]] = {}
        vectors = {}
        for layer in range(n_layers):
            encoder, decoder = (str(folder / f"{name}_{layer}.safetensors") for name in ("W_enc", "W_dec"))
            header = read_header(Path(encoder))
            shape = header.get(f"W_enc_{layer}", ((), None))[0]
            if len(shape) != 2:
                raise FormatError(f"{folder.name}/W_enc_{layer}.safetensors: W_enc_{layer} must be (F, d), not {shape}")
            n, width = shape
            d_model = d_model or width
            sizes.append(n)
            weights["W_enc", layer] = (Piece(encoder, f"W_enc_{layer}", (n, d_model)),)
            weights["W_dec", layer] = (Piece(decoder, f"W_dec_{layer}", (n, n_layers - layer, d_model)),)
            vectors["b_enc", layer] = Piece(encoder, f"b_enc_{layer}", (n,))
            vectors["b_dec", layer] = Piece(encoder, f"b_dec_{layer}", (d_model,))
            if f"threshold_{layer}" in header:
                thresholds.append(layer)
                vectors["threshold", layer] = Piece(encoder, f"threshold_{layer}", (n,))
        if thresholds and len(thresholds) < n_layers:
            without = sorted(set(range(n_layers)) - set(thresholds))
            raise FormatError(f"{folder.name}: layers {without} have no threshold, the others have one")
        activation: Activation = ReLU()
        if thresholds:
            activation = JumpReLU(own["bandwidth"]) if "bandwidth" in own else JumpReLU()
        host = Host(
            config.get("model_name"), own.get("model_revision"), n_layers, exclude_first=own.get("exclude_first", 1)
        )
        return Description(folder, wiring, d_model, tuple(sizes), activation, host, weights, vectors)

    def save(self, crosscoder: Crosscoder, folder: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write a folder, layer by layer; see `Crosscoder.save`."""
        hooks = {site: hook for hook, site in HOOKS.items()}
        read, write = crosscoder.sites.read_name, crosscoder.sites.write_name
        _check_fits(crosscoder, read, write)
        activation, host = crosscoder.activation, crosscoder.host
        own: dict[str, Any] = {"exclude_first": host.exclude_first, "model_revision": host.model_revision}
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
                encoder = {
                    f"W_enc_{layer}": crosscoder.encoder_vectors(layer),
                    f"b_enc_{layer}": crosscoder.b_enc[layer],
                    f"b_dec_{layer}": crosscoder.b_dec[layer],
                }
                if crosscoder.threshold is not None:
                    encoder[f"threshold_{layer}"] = crosscoder.threshold[layer]
                save_tensors(aside / f"W_enc_{layer}.safetensors", encoder)
                save_tensors(aside / f"W_dec_{layer}.safetensors", {f"W_dec_{layer}": crosscoder.decoder_view(layer)})
            (aside / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise FormatError(f"{folder.name}/{CONFIG} cannot be read as YAML ({error})") from error
    if not isinstance(config, dict):
        raise FormatError(f"{folder.name}/{CONFIG} holds {type(config).__name__}, where a mapping was expected")
    if config.get("model_kind", KIND) != KIND:
        raise FormatError(f"{folder.name}/{CONFIG} says model_kind {config['model_kind']!r}, but the files are a CLT's")
    return config


def _count_layers(folder: Path) -> int:
    """Count the layers by both kinds of file, and by what the first decoder writes: a gap is a missing shard."""
    found: dict[str, set[int]] = {"W_enc": set(), "W_dec": set()}
    for path in folder.glob("W_*.safetensors"):
        if match := re.fullmatch(r"(W_enc|W_dec)_(\d+)\.safetensors", path.name):
            found[match[1]].add(int(match[2]))
    n_layers = max(found["W_enc"] | found["W_dec"]) + 1
    if 0 in found["W_dec"]:
        shape, _ = read_header(folder / "W_dec_0.safetensors").get("W_dec_0", ((), None))
        n_layers = max(n_layers, shape[1]) if len(shape) == 3 else n_layers
    for name, layers in found.items():
        missing = sorted(set(range(n_layers)) - layers)
        if missing:
            files = ", ".join(f"{name}_{layer}.safetensors" for layer in missing)
            raise FormatError(f"{folder.name}: {files} missing: the folder is incomplete, fetch or save it again")
    return n_layers


def _site(folder: Path, hook: str) -> str:
    if hook not in HOOKS:
        raise FormatError(f"{folder.name}/{CONFIG} names the hook {hook!r}; known are {', '.join(HOOKS)}")
    return HOOKS[hook]


def _check_fits(crosscoder: Crosscoder, read: str, write: str) -> None:
    """Refuse what the format cannot hold."""
    wiring = crosscoder.wiring
    reason = None
    if read not in HOOKS.values() or write not in HOOKS.values():
        reason = f"it reads {read} and writes {write}"
    elif wiring != Wiring.clt(wiring.n_layers, read, write):
        reason = f"its wiring is {wiring.name}" + (" with affine skips" if wiring.skips else "")
    elif not isinstance(crosscoder.activation, ReLU | JumpReLU):
        reason = f"its activation is {crosscoder.activation}"
    elif crosscoder.host.n_layers not in (None, wiring.n_layers):
        reason = f"it covers {wiring.n_layers} layers of a model of {crosscoder.host.n_layers}"
    elif crosscoder.is_partial:
        reason = "it is a selection of a larger one"
    if reason:
        raise FormatError(f"circuit-tracer's format holds ReLU or JumpReLU CLTs, but {reason}: use format='native'")


FORMATS.add(CircuitTracer.name, CircuitTracer())
