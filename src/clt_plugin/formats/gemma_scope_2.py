"""Gemma Scope 2: CLTs, crosscoders, transcoders and autoencoders for Gemma 3 (Google DeepMind).

A folder is one of them, and ``config.json`` says which: ``type``, ``model_name``, ``hf_hook_point_in`` and
``hf_hook_point_out`` (modules in transformers' names; ``{all}`` or ``{5,9,12,15}`` stands for several layers),
``architecture`` (``jump_relu``), ``affine_connection``, and ``width``, the latents of all layers together.

Transcoders and autoencoders keep a layer in ``params.safetensors``; CLTs and crosscoders, of S sites, keep site i in
``params_layer_{i}.safetensors``. Both hold::

    w_enc (d, F)    b_enc (F,)    threshold (F,)    w_dec (F, d), or (F, S, d)    b_dec (d,)
    affine_skip_connection (d, d), optional

With h = x_i @ w_enc + b_enc and a_i = relu(h) * (h > threshold), CLTs and crosscoders write at site m::

    y_m = b_dec_m + sum over i of a_i @ w_dec_i[:, m]  (+ x_m @ affine_skip_connection_m)

so the decoder's middle axis counts sites from the first, whichever it reads. That nothing is written before it is read
lies in the values: they are about 0 there, which is checked, and what is left of them is not used.

``examples.safetensors``, where there is one, is no weight. None of these was trained on the BOS token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from clt_plugin.core import FORMATS, MODEL, FormatError, Host, JumpReLU, Piece, Site, Wiring
from clt_plugin.core.files import Header
from clt_plugin.formats._description import Description, Formula
from clt_plugin.formats._hooks import GEMMA_MODULES, site_of
from clt_plugin.formats._layers import all_or_none, check_layers, peek
from clt_plugin.formats._one_layer import Listed, Tensors, describe_layer
from clt_plugin.hub import Folder

CONFIG, SINGLE = "config.json", "params.safetensors"
SHARD, SHARDS = "params_layer_{i}.safetensors", r"params_layer_(\d+)\.safetensors"
SKIP = "affine_skip_connection"
TENSORS = Tensors("w_enc", "b_enc", "w_dec", "b_dec", "threshold", SKIP, encoder_d_by_f=True)
SINGLE_TYPES, SHARDED_TYPES = ("sae", "transcoder"), ("clt", "crosscoder")
HOOKS = {"read": "hf_hook_point_in", "write": "hf_hook_point_out"}


class GemmaScope2:
    """Reads Gemma Scope 2."""

    name = "gemma-scope-2"

    def sniff(self, folder: Folder) -> bool:
        """Whether a folder is in this format."""
        return SINGLE in folder or bool(folder.numbered(SHARDS)) or HOOKS["read"] in peek(folder, CONFIG)

    def describe(self, folder: Folder) -> Description:
        """Say which tensor lies where."""
        if SINGLE in folder:
            return self.describe_file(folder, SINGLE, folder.headers([SINGLE])[SINGLE], Listed())
        if not folder.numbered(SHARDS):
            raise FormatError(
                f"{folder.label} has neither {SINGLE} nor {SHARD.format(i=0)}: it is incomplete, fetch it again"
            )
        return self.describe_shards(folder, Listed())

    def describe_file(self, folder: Folder, name: str, header: Header, listed: Listed) -> Description:
        """Do so for one layer, of which a listing may say what no config beside it does."""
        config = _Config.read(folder, SINGLE_TYPES) if name == SINGLE else _Config(f"{folder.label}/{CONFIG}", {})
        every = [] if listed.layer is None else [listed.layer]
        (read,), (write,) = (config.sites(verb, listed, 1, every) for verb in HOOKS)
        _require_threshold(folder, name, header)
        host = Host(config.model_name(listed), exclude_first=1)
        described = describe_layer(folder, name, header, TENSORS, self.name, (read, write), host)
        config.check_affine({name: header})
        config.check_width({name: described.n_latents[0]})
        return described

    def describe_shards(self, folder: Folder, listed: Listed) -> Description:
        """Do so for a CLT or crosscoder."""
        config, found = _Config.read(folder, SHARDED_TYPES), folder.numbered(SHARDS)
        headers = folder.headers(found.values())
        decoders = (header["w_dec"][0] for header in headers.values() if "w_dec" in header)
        written = [shape[1] for shape in decoders if len(shape) == 3]
        n_sites = check_layers(folder.label, found, SHARD, max([*written, max(found) + 1]))
        affine = config.check_affine(headers)
        wiring = config.wiring(listed, n_sites)
        weights: dict[tuple[str, int], tuple[Piece, ...]] = {}
        vectors: dict[tuple[str, int], Piece | Formula] = {}
        sizes, d = {}, TENSORS.sizes(folder, found[0], headers[found[0]])[1]
        for i, name in found.items():
            _require_threshold(folder, name, headers[name])
            file, (n, _) = folder.file(name), TENSORS.sizes(folder, name, headers[name])
            sizes[name] = n
            weights["W_enc", i] = (Piece(file, "w_enc", (d, n), rows_last=True),)
            early = (0, i) if i else None
            weights["W_dec", i] = (Piece(file, "w_dec", (n, n_sites, d), columns=(i, n_sites), zeros=early),)
            if affine:
                weights["W_skip", i] = (Piece(file, SKIP, (d, d)),)
            vectors["b_enc", i], vectors["b_dec", i] = Piece(file, "b_enc", (n,)), Piece(file, "b_dec", (d,))
            vectors["threshold", i] = TENSORS.threshold_of(Piece(file, "threshold", (n,)))
        config.check_width(sizes)
        every_layer = wiring.layers == tuple(range(n_sites)) and wiring.writes_mlps_only
        host = Host(config.model_name(listed), n_layers=n_sites if every_layer else None, exclude_first=1)
        wiring = wiring.with_skips() if affine else wiring
        numbers = tuple(sizes.values())
        return Description(folder.label, self.name, wiring, d, numbers, JumpReLU(), host, weights, vectors)


def _require_threshold(folder: Folder, name: str, header: Header) -> None:
    if "threshold" not in header:
        found = ", ".join(sorted(header)) or "nothing"
        raise FormatError(f"{folder.label}/{name} has no tensor threshold, which JumpReLU needs: it holds {found}")


@dataclass(frozen=True)
class _Config:
    """What ``config.json`` says, where it is there.

    Attributes:
        where: The file, for messages.
        values: What it says.
    """

    where: str
    values: dict[str, Any]

    @classmethod
    def read(cls, folder: Folder, types: tuple[str, ...]) -> _Config:
        """Read it, and refuse what contradicts the files beside it."""
        config = cls(f"{folder.label}/{CONFIG}", folder.json(CONFIG) if CONFIG in folder else {})
        architecture, kind = config.values.get("architecture", "jump_relu"), config.values.get("type", types[0])
        if architecture != "jump_relu":
            raise FormatError(f"{config.where} says architecture {architecture!r}; Gemma Scope 2 has jump_relu alone")
        if kind not in types:
            raise FormatError(f"{config.where} says type {kind!r}, but its files are those of {' or '.join(types)}")
        return config

    def sites(self, verb: str, listed: Listed, n_sites: int, every: list[int]) -> list[Site]:
        """Return the sites read or written, which a listing must not contradict; ``every`` is what {all} stands for."""
        given = listed.read if verb == "read" else listed.write
        hook = self.values.get(HOOKS[verb])
        if hook is None and self.values.get("type") == "sae":
            hook = self.values.get(HOOKS["read"])
        if hook is None and given is None:
            raise FormatError(
                f"{self.where} does not say which site it {verb}s, or is missing, and the tensors do not tell: fetch "
                f"it again, or write one with {' and '.join(HOOKS.values())}, such as 'model.layers.17.output', with "
                "{all} for the number"
            )
        layers, name = (None, str(given)) if hook is None else self._place(hook)
        if given not in (None, name):
            raise FormatError(f"{self.where} says that it {verb}s {name}, but it is listed as if it {verb}s {given}")
        layers = every if layers is None else layers
        if listed.layer is not None and layers != [listed.layer]:
            raise FormatError(f"{self.where} names the layers {layers}, but it is listed as layer {listed.layer}")
        if len(layers) != n_sites:
            held = "one layer alone" if n_sites == 1 else f"{n_sites} sites"
            raise FormatError(f"{self.where} names {hook!r}, but the tensors are those of {held}")
        return [Site(MODEL, name, layer) for layer in layers]

    def _place(self, hook: Any) -> tuple[list[int] | None, str]:
        """Return the layers, None for all, and the site's name."""
        match = re.fullmatch(r"(?:[\w.]+\.)?layers\.(?:\{([\d, ]+|all)\}|(\d+))\.(.+)", str(hook))
        if not match:
            raise FormatError(f"{self.where} names {hook!r}, which is not a place in a block")
        several, one, module = match.groups()
        if module == "self_attn.o_proj.input":
            raise FormatError(
                f"{self.where}: it reads {module}, the heads' outputs before they are projected, which is not a site "
                "that this package reads: transcoders, and autoencoders on the residual stream or MLP outputs, load"
            )
        layers = None if several == "all" else [int(layer) for layer in (several or one).split(",")]
        return layers, site_of(module, GEMMA_MODULES, self.where)

    def wiring(self, listed: Listed, n_sites: int) -> Wiring:
        """Return the wiring of a CLT or crosscoder."""
        reads, writes = (self.sites(verb, listed, n_sites, list(range(n_sites))) for verb in HOOKS)
        layers = [site.layer for site in reads]
        if layers != sorted(set(layers)):
            raise FormatError(f"{self.where} names the layers {layers}, which must be distinct and in order")
        if reads == writes:
            return Wiring.weakly_causal(reads)
        for sites in (reads, writes):
            if [site.layer for site in sites] != list(range(n_sites)):
                raise FormatError(
                    f"{self.where} names the layers {[site.layer for site in sites]}; a CLT reads and writes every "
                    f"layer, here 0 to {n_sites - 1}"
                )
        return Wiring.clt(n_sites, reads[0].name, writes[0].name)

    def check_affine(self, headers: dict[str, Header]) -> bool:
        """Return whether there are skips: in every file or in none, as the config says if it does."""
        has = {name: SKIP in header for name, header in headers.items()}
        said = self.values.get("affine_connection")
        if not isinstance(said, bool):
            return all_or_none(self.where, has, SKIP)
        wrong = [name for name, holds in has.items() if holds != said]
        if wrong:
            what = f"{', '.join(wrong[:4])} {'lacks' if said else 'holds'} {SKIP}"
            raise FormatError(f"{self.where} says affine_connection {said}, but {what}")
        return said

    def check_width(self, sizes: dict[str, int]) -> None:
        """Refuse files whose latents are not as many as the config says for all of them."""
        width, total = self.values.get("width"), sum(sizes.values())
        if isinstance(width, int) and width != total:
            odd = [name for name, n in sizes.items() if n * len(sizes) != width]
            raise FormatError(
                f"{self.where} says width {width}, which is for all layers together, but the encoders have {total} "
                f"latents; see {', '.join(odd[:4])}"
            )

    def model_name(self, listed: Listed) -> str | None:
        """Return the model's name on the Hub; a listing's, which must fit."""
        own = self.values.get("model_name")
        if not isinstance(own, str) or not listed.model_name:
            return hub_name(listed.model_name or own)
        if own.endswith(("-pt", "-it")) and hub_name(own) != hub_name(listed.model_name):
            raise FormatError(f"{self.where} says that the model is {own}, but it is listed for {listed.model_name}")
        return hub_name(listed.model_name)


def hub_name(name: Any) -> str | None:
    """Return what the Hub calls a Gemma 3 model; configs drop the owner and the ``-pt``, and write v3 for 3.

    >>> hub_name("gemma-v3-1b-pt"), hub_name("google/gemma-3-270m-pt"), hub_name("google/gemma-3-4b-it")
    ('google/gemma-3-1b-pt', 'google/gemma-3-270m', 'google/gemma-3-4b-it')
    """
    if not isinstance(name, str):
        return None
    match = re.fullmatch(r"(?:google/)?gemma-v?3-(270m|1b|4b|12b|27b)(-pt|-it)?", name)
    if not match:
        return name
    size, tuned = match.groups(default="-pt")
    return f"google/gemma-3-{size}{'' if size == '270m' and tuned == '-pt' else tuned}"


FORMATS.add(GemmaScope2.name, GemmaScope2())
