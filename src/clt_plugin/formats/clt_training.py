"""The format of EleutherAI's clt-training, a fork of sparsify that trains cross-layer transcoders.

A folder for each layer, ``h.{l}.mlp`` or ``layers.{l}.mlp``, holds ``cfg.json`` and ``sae.safetensors``. Its encoder is
``encoder.weight`` (F, d) and ``encoder.bias`` (F,)::

    z_s = x_s * sqrt(d) / in_norm                   (x_s without normalize_io)
    a_s = the k largest of relu(z_s @ encoder.weight.T + encoder.bias)
    y_t = u_t * out_norm / sqrt(d)                  (u_t without normalize_io)

What layer s writes at layer t = s + j, for j < its ``n_targets``, depends on how the decoders are tied::

    coalesce_topk   u_t                                                             where W_dec lies
    none            sum over s of q_st * (a_s @ W_decs.j + b_decs.j)                (F, d), with layer s
     with per_source_tied: W_dec for every W_decs.j
    concat          (sum over s of a_s) @ W_dec + b_dec  (+ z_t @ W_skip.T)         (F, d), with layer t
    per-layer       sum over s of a_s @ W_dec[s-th F rows] + b_dec (+ same)         (n_sources * F, d), with layer t

q_st is 1; with ``divide_cross_layer`` and s < t it is 1 / (sources of t - 1). ``n_targets`` 0 is a transcoder a layer:
``a_l @ W_dec + b_dec (+ z_l @ W_skip.T)``. With ``post_encoder_scale``, a_s is multiplied with layer s's
``post_enc_scales.j`` (F,) on its way to layer s + j.

What the layers read is not in their configs but in the run's ``config.json`` above them: the input of the MLP, or where
``hookpoints_in`` names its norm, of that norm. Without it the sites cannot be told, and the folder is refused.

Refused besides: groupmax and BatchTopK; ``topk_coalesced``, which selects anew for each target; post-encoder biases
that are not 0, which are added to active latents for each target; ``secondary_target_tied``; skips across layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from clt_plugin.core import FORMATS, File, FormatError, Host, Piece, TopK, Wiring
from clt_plugin.core.files import Header
from clt_plugin.formats._description import Description, Formula
from clt_plugin.formats._layers import (
    check_layers,
    count,
    only_where,
    peek,
    read_scale,
    shape_of,
    site_into,
    text,
)
from clt_plugin.formats._normalisation import Normalisation
from clt_plugin.formats._views import Stacked
from clt_plugin.hub import Folder

CONFIG, RUN, WEIGHTS = "cfg.json", "config.json", "sae.safetensors"
HOOKPOINT = re.compile(r"(?P<blocks>(?:\w+\.)*(?:h|layers))\.(?P<layer>\d+)\.mlp")
ITS_KEYS = {"n_targets", "n_sources", "normalize_io", "coalesce_topk"}
"""Keys that the fork's configs have and sparsify's have not."""
DEFAULTS: dict[str, Any] = {
    "activation": "topk", "k": None, "transcode": False, "skip_connection": False, "normalize_io": False,
    "divide_cross_layer": False, "per_source_tied": False, "coalesce_topk": "none", "post_encoder_scale": False,
    "secondary_target_tied": False, "topk_coalesced": False, "signed": False, "matryoshka": False,
}  # fmt: skip
"""Settings that are the same for every layer."""
REFUSED = {
    "secondary_target_tied": "a second decoder, the target's, is added to each source's",
    "topk_coalesced": "the latents of all sources are selected anew for each target",
    "signed": "negative activations are kept",
    "matryoshka": "several sizes are nested, and which to read is not known",
}
"""Settings that no crosscoder here can follow, and what they do."""


class CLTTraining:
    """Reads what clt-training saves."""

    name = "clt-training"

    def sniff(self, folder: Folder) -> bool:
        """Whether a folder is in this format."""
        hookpoints = [name for name in folder.folders if HOOKPOINT.fullmatch(name)]
        one = folder / hookpoints[0] if hookpoints else folder
        return bool(ITS_KEYS & peek(one, CONFIG).keys())

    def describe(self, folder: Folder) -> Description:
        """Say which tensor lies where."""
        names = _layers(folder)
        layers = range(len(names))
        configs = [folder.json(f"{name}/{CONFIG}") for name in names]
        settings = _settings(folder, names, configs)
        spans = _spans(folder, names, configs)
        wiring = _wiring(folder, names, max(1, spans[0]), settings)
        crosses = spans[0] > 0
        held = folder.headers(f"{name}/{WEIGHTS}" for name in names)
        headers = list(held.values())
        files: list[File] = [folder.file(name) for name in held]
        sizes = [shape_of(file, header, "encoder.weight", "F, d") for file, header in zip(files, headers, strict=True)]
        d = sizes[0][1]
        if crosses and settings["coalesce_topk"] == "per-layer":
            files = [Stacked(file.path, str(file), file, n) for file, (n, _) in zip(files, sizes, strict=True)]
        reads, writes = (_norms(files, headers, f"{side}_norm", d, settings) for side in ("in", "out"))
        weights: dict[tuple[str, int], tuple[Piece, ...]] = {}
        vectors: dict[tuple[str, int], Piece | Formula] = {}
        for s, (n, _) in enumerate(sizes):
            weights["W_enc", s] = (reads[s].encoder(Piece(files[s], "encoder.weight", (n, d))),)
            bias = Piece(files[s], "encoder.bias", (n,))
            vectors["b_enc", s] = _without_post_encoder(bias, files[s], headers[s])
        parts = _Parts(files, headers, [n for n, _ in sizes], d, settings, crosses)
        sources = [[s for s in layers if s <= t < s + max(1, spans[s])] for t in layers]
        for s in layers:
            targets = range(s, s + max(1, spans[s]))
            weights["W_dec", s] = tuple(writes[t].decoder(parts.decoder(s, t, sources[t])) for t in targets)
        for t in layers:
            skip = parts.skip(t)
            vectors["b_dec", t] = writes[t].b_dec(parts.biases(t, sources[t]), skip, reads[t])
            if skip:
                weights["W_skip", t] = (writes[t].skip(skip, reads[t]),)
        # The first offset's tensors are saved a second time under the names that transcoders have.
        twice = frozenset(["W_dec", "b_dec", "W_skip"] if crosses and settings["coalesce_topk"] == "none" else [])
        scales = {key for key in ("in_norm", "out_norm") if settings["normalize_io"]}
        if settings["post_encoder_scale"]:  # the first offset's, again, is saved twice
            scales |= {"post_enc_scale", *(f"post_enc_scales.{k}" for k in range(max(1, spans[0])))}
        return Description(
            folder.label,
            self.name,
            wiring,
            d,
            tuple(n for n, _ in sizes),
            TopK(settings["k"]),
            Host(text(f"{folder.label}/{RUN}", _run(folder), "model")),
            weights,
            vectors,
            ignored={str(file): twice | scales for file in files},
        )


def _layers(folder: Folder) -> list[str]:
    """Return the folders of the layers, of which none may be missing."""
    matches = [match for name in folder.folders if (match := HOOKPOINT.fullmatch(name))]
    if not matches:
        raise FormatError(f"{folder.label} is one layer of several: give the folder above, and the layer with layers=")
    blocks = matches[0]["blocks"]
    found = {int(match["layer"]): match[0] for match in matches if match["blocks"] == blocks}
    odd = [name for name in folder.folders if name.startswith(f"{blocks}.") and name not in found.values()]
    if odd or len(found) < len(matches):
        raise FormatError(f"{folder.label} holds other hookpoints besides {matches[0][0]}: only MLPs' can be read")
    check_layers(folder.label, found, f"{blocks}.{{i}}.mlp")
    return [found[layer] for layer in sorted(found)]


def _settings(folder: Folder, names: list[str], configs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the settings that every layer shares; refuse those that cannot be followed."""
    every = [{key: config.get(key, default) for key, default in DEFAULTS.items()} for config in configs]
    where, settings = f"{folder.label}/{names[0]}/{CONFIG}", every[0]
    for name, other in zip(names, every, strict=True):
        differ = [key for key in DEFAULTS if other[key] != settings[key]]
        if differ:
            raise FormatError(
                f"{folder.label}/{name}/{CONFIG} says {differ[0]} {other[differ[0]]!r}, and {names[0]}'s says "
                f"{settings[differ[0]]!r}: layers that differ in it cannot be one crosscoder"
            )
    for key, what in REFUSED.items():
        if settings[key]:
            raise FormatError(f"{where} says {key}: {what}, which no crosscoder here can do")
    if settings["activation"] != "topk":
        raise FormatError(f"{where} says activation {settings['activation']!r}: only topk depends on the token alone")
    if not settings["transcode"]:
        raise FormatError(f"{where} does not say transcode: true, and of this format only transcoders can be read")
    if settings["coalesce_topk"] not in ("none", "concat", "per-layer"):
        raise FormatError(
            f"{where} says coalesce_topk {settings['coalesce_topk']!r}: known are none, concat, per-layer"
        )
    return settings | {"k": count(where, settings, "k")}


def _spans(folder: Folder, names: list[str], configs: list[dict[str, Any]]) -> list[int]:
    """Return how many layers each layer writes: all as many, or as there are left; 0 for transcoders."""
    spans = [config.get("n_targets", 0) for config in configs]
    first = spans[0] if isinstance(spans[0], int) else len(spans)
    for layer, span in enumerate(spans):
        expected = min(first, len(spans) - layer)
        if not isinstance(span, int) or span != expected or span < 0:
            raise FormatError(
                f"{folder.label}/{names[layer]}/{CONFIG} says n_targets {span!r}, where {expected} follows from the "
                f"{len(spans)} layers that are there: are some missing?"
            )
    return spans


def _run(folder: Folder) -> dict[str, Any]:
    if RUN not in folder:
        raise FormatError(
            f"{folder.label} has no {RUN}, the run's config, and nothing else says what was read: put one there that "
            'says {"hookpoints_in": []} if it was the MLPs\' input, or names the norms before them, as ["h.*.ln_2"], '
            "if it was the residual stream that enters those"
        )
    return folder.json(RUN)


def _wiring(folder: Folder, names: list[str], span: int, settings: Mapping[str, Any]) -> Wiring:
    run, where, n_layers = _run(folder), f"{folder.label}/{RUN}", len(names)
    hookpoints = run.get("hookpoints_in") or ["mlp"]
    if not isinstance(hookpoints, list):
        raise FormatError(f"{where} says hookpoints_in {hookpoints!r}, where a list was expected")
    modules = {str(name).rpartition(".")[2] for name in hookpoints}
    if len(modules) > 1:
        raise FormatError(f"{where}: hookpoints_in names {', '.join(sorted(modules))}, where one module was expected")
    read = site_into(modules.pop(), run.get("model"), where)
    # The MLP's own output, which GPT-2 adds to the residual stream as it is.
    write = "mlp_out" if re.match(r"(?:\w+\.)*h\.", names[0]) else "mlp_out_before_norm"
    if span == 1:
        wiring = Wiring.plt(n_layers, read, write)
    elif span == n_layers:
        wiring = Wiring.clt(n_layers, read, write)
    else:
        wiring = Wiring.local_clt(n_layers, span, read, write)
    if not settings["skip_connection"]:
        return wiring
    if settings["coalesce_topk"] == "none" and span > 1:
        raise FormatError(
            f"{folder.label}/{names[0]}/{CONFIG} has skips across layers (skip_connection with coalesce_topk none): a "
            "site here has one skip, from its own layer"
        )
    return wiring.with_skips()


def _norms(
    files: list[File], headers: list[Header], key: str, d: int, settings: Mapping[str, Any]
) -> list[Normalisation]:
    """Return what each layer's inputs or outputs are divided by."""
    if not settings["normalize_io"]:
        return [Normalisation()] * len(files)
    norms = (read_scale(file, header, key, (1,), above_0=True) for file, header in zip(files, headers, strict=True))
    return [Normalisation(std=norm[0] / d**0.5) for norm in norms]


def _without_post_encoder(bias: Piece, file: File, header: Header) -> Piece | Formula:
    """Return an encoder's bias that is refused where active latents are offset after it."""
    holds = {Piece(file, key, bias.shape): 0.0 for key in header if re.fullmatch(r"post_encs?(\.\d+)?", key)}
    return only_where(
        bias,
        holds,
        "it is added to active latents for each target, as no activation here does. If this was converted from "
        "another tool's crosscoder, load that one",
    )


@dataclass(frozen=True)
class _Parts:
    """Where decoders, biases and skips are, as they are stored."""

    files: list[File]
    headers: list[Header]
    sizes: list[int]
    d: int
    settings: Mapping[str, Any]
    crosses: bool

    def decoder(self, s: int, t: int, sources: list[int]) -> Piece:
        """Return the decoder from layer s to layer t, of all those that write t."""
        mode, shape, scale = self.settings["coalesce_topk"], (self.sizes[s], self.d), self._latent_scale(s, t)
        if not self.crosses or mode == "concat":
            return Piece(self.files[t], "W_dec", shape, row_scale=scale)
        if mode == "per-layer":
            return Piece(self.files[t], "W_dec", (len(sources), *shape), at=(sources.index(s),), row_scale=scale)
        key = "W_dec" if self.settings["per_source_tied"] else f"W_decs.{t - s}"
        return Piece(self.files[s], key, shape, scale=self._share(s, t, sources), row_scale=scale)

    def biases(self, t: int, sources: list[int]) -> list[Piece]:
        """Return the biases that are added at layer t."""
        if not self.crosses or self.settings["coalesce_topk"] != "none":
            return [Piece(self.files[t], "b_dec", (self.d,))]
        return [Piece(self.files[s], f"b_decs.{t - s}", (self.d,), scale=self._share(s, t, sources)) for s in sources]

    def skip(self, t: int) -> Piece | None:
        """Return the skip to layer t from its own input."""
        if not self.settings["skip_connection"]:
            return None
        key = "W_skips.0" if self.crosses and self.settings["coalesce_topk"] == "none" else "W_skip"
        return Piece(self.files[t], key, (self.d, self.d), rows_last=True)

    def _latent_scale(self, s: int, t: int) -> Tensor | None:
        """Return what the active latents of layer s are multiplied with for layer t, or None."""
        if not self.settings["post_encoder_scale"]:
            return None
        key = f"post_enc_scales.{t - s}" if self.crosses else "post_enc_scale"
        return read_scale(self.files[s], self.headers[s], key, (self.sizes[s],))

    def _share(self, s: int, t: int, sources: list[int]) -> float | None:
        divided = self.settings["divide_cross_layer"] and s < t
        return 1 / max(1, len(sources) - 1) if divided else None


FORMATS.add(CLTTraining.name, CLTTraining())
