"""The format of EleutherAI's sparsify: TopK autoencoders, transcoders and skip transcoders, a folder each.

A folder is named after the module it was trained on, ``layers.3.mlp``, ``h.3.mlp`` or ``layers.3``, and holds
``cfg.json`` and ``sae.safetensors``: ``encoder.weight`` (F, d), ``encoder.bias`` (F,), ``W_dec`` (F, d), ``b_dec`` (d,)
and, of a skip transcoder, ``W_skip`` (d, d)::

    a = the k largest of relu((x - c) @ encoder.weight.T + encoder.bias)
    y = a @ W_dec + b_dec + x @ W_skip.T

where c is ``b_dec`` unless the config says ``transcode: true``, and 0 then. Transcoders of before February 2025 have no
such key and subtract ``b_dec`` as well (commit f02711e of github.com/EleutherAI/sparsify). An autoencoder reads and
writes the module's output; a transcoder reads its input and writes its output.

A folder of such folders is a crosscoder with a group a layer. ``config.json`` beside them is the run's, and names the
``model``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from clt_plugin.core import FORMATS, MODEL, FormatError, Host, Piece, Site, TopK
from clt_plugin.core.files import Header
from clt_plugin.formats._description import Description, Formula, join
from clt_plugin.formats._layers import check_config, count, of_centred_input, one_layer, peek, shape_of, text
from clt_plugin.hub import Folder

CONFIG, RUN, WEIGHTS = "cfg.json", "config.json", "sae.safetensors"
HOOKPOINT = re.compile(r"(?P<blocks>(?:[\w.]+\.)?(?:layers|h))\.(?P<layer>\d+)(?:\.(?P<module>.+))?")
MODULES = {"": ("resid_pre", "resid_post"), "mlp": ("mlp_in", "mlp_out_before_norm")}
"""For each module that we have sites for, by its name within a block, its input and its output."""

ITS_KEYS = {"expansion_factor", "k", "d_in"}
CROSS_LAYER_KEYS = {"n_targets", "n_sources", "normalize_io", "coalesce_topk"}
"""Keys of clt-training's configs, a fork that trains cross-layer transcoders and names its files alike."""


class Sparsify:
    """Reads sparsify's folders, and folders of them."""

    name = "sparsify"

    def sniff(self, folder: Folder) -> bool:
        """Whether a folder is in this format."""
        return _is_one(folder) or any(_is_one(folder / name) for name in _hookpoints(folder))

    def describe(self, folder: Folder) -> Description:
        """Say which tensor lies where."""
        if _is_one(folder):
            name = folder.label.rpartition("/")[2]
            if not HOOKPOINT.fullmatch(name):
                raise FormatError(
                    f"{folder.label} does not say which module it is of: the folder that holds {CONFIG} is expected to "
                    "be named after it, such as layers.3.mlp"
                )
            return _describe_one(folder, name, folder.headers([WEIGHTS])[WEIGHTS], _run_above(folder))
        names = _one_a_layer(folder)
        run = folder.json(RUN) if RUN in folder else None
        trained = (run or {}).get("hookpoints") or []
        if not isinstance(trained, list):
            raise FormatError(f"{folder.label}/{RUN} says hookpoints {trained!r}, where a list was expected")
        missing = [name for name in map(str, trained) if HOOKPOINT.fullmatch(name) and name not in names]
        if missing:
            raise FormatError(
                f"{folder.label}/{RUN} lists {', '.join(missing[:4])}, which the folder lacks: it is incomplete, fetch "
                "it again"
            )
        files = {name: f"{name}/{WEIGHTS}" for name in names}
        headers = folder.headers(files.values())
        parts = [_describe_one(folder / name, name, headers[file], run) for name, file in files.items()]
        return join(parts, folder.label, self.name, parts[0].wiring.name.partition("(")[0] + "({n})")


def _run_above(folder: Folder) -> dict[str, Any] | None:
    """Return the config of the run that one of its folders is of, where it lies above it."""
    above = folder.parent
    config = {} if above is None else peek(above, RUN)
    return config if "hookpoints" in config else None


def _is_one(folder: Folder) -> bool:
    config = peek(folder, CONFIG)
    if CROSS_LAYER_KEYS & config.keys():
        return False
    return (WEIGHTS in folder and CONFIG in folder) or config.keys() >= ITS_KEYS


def _hookpoints(folder: Folder) -> list[str]:
    return [name for name in folder.folders if HOOKPOINT.fullmatch(name)]


def _one_a_layer(folder: Folder) -> list[str]:
    """Return the hookpoints of a folder, which must be of one kind."""
    names = [name for name in _hookpoints(folder) if _is_one(folder / name)]
    patterns = {}
    for name in names:
        match = HOOKPOINT.fullmatch(name)
        assert match
        # A pattern that ends in a digit matches blocks, but no module within one.
        module = f"*.{match['module']}" if match["module"] else "*[0-9]"
        patterns[f"{match['blocks']}.{module}"] = name
    if len(patterns) > 1:
        raise FormatError(
            f"{folder.label} holds several kinds of hookpoint ({', '.join(patterns.values())}): name one kind, such as "
            f"{folder.label}/{next(iter(patterns))}, or one folder"
        )
    return names


def _describe_one(folder: Folder, name: str, header: Header, run: Mapping[str, Any] | None) -> Description:
    config, file = folder.json(CONFIG), folder.file(WEIGHTS)
    where = f"{folder.label}/{CONFIG}"
    n, d = shape_of(file, header, "encoder.weight", "F, d")
    # 0 latents stand for d_in * expansion_factor.
    check_config(where, config, {"d_in": d} | ({"num_latents": n} if config.get("num_latents") else {}), file=file)
    has_skip = "W_skip" in header or bool(config.get("skip_connection"))
    read, write = _sites(where, name, _is_transcoder(where, name, config, has_skip, run))
    encoder = Piece(file, "encoder.weight", (n, d))
    bias, b_dec = Piece(file, "encoder.bias", (n,)), Piece(file, "b_dec", (d,))
    b_enc: Piece | Formula = bias if config.get("transcode", False) else of_centred_input(bias, b_dec, encoder)
    weights = {("W_enc", 0): (encoder,), ("W_dec", 0): (Piece(file, "W_dec", (n, d)),)}
    if has_skip:
        weights["W_skip", 0] = (Piece(file, "W_skip", (d, d), rows_last=True),)
    return Description(
        folder.label,
        Sparsify.name,
        one_layer(read, write, has_skip),
        d,
        (n,),
        _activation(where, config),
        Host(text(f"{RUN} above {folder.label}", run or {}, "model")),
        weights,
        {("b_enc", 0): b_enc, ("b_dec", 0): b_dec},
    )


def _activation(where: str, config: Mapping[str, Any]) -> TopK:
    kind = config.get("activation", "topk")
    if kind != "topk":
        raise FormatError(
            f"{where} says activation {kind!r}, which keeps the largest of each group of latents: only topk can be read"
        )
    if config.get("signed"):
        raise FormatError(f"{where} says signed: negative activations would be kept, and here they are 0")
    return TopK(count(where, config, "k"))


def _is_transcoder(
    where: str, name: str, config: Mapping[str, Any], has_skip: bool, run: Mapping[str, Any] | None
) -> bool:
    """Whether it reads a module's input, not its output: something must say so, for the tensors are the same."""
    said = config.get("transcode")
    if said is False and has_skip:
        raise FormatError(
            f"{where} has a skip connection but says transcode: false, and what it reads is not known: a transcoder's "
            "config says true, or (before February 2025) nothing"
        )
    if said is not None or has_skip:
        return bool(said) or has_skip
    if not name.endswith(".mlp"):
        return False
    if run is None:
        raise FormatError(
            f"{where} does not say transcode, so it may read the MLP's input or its output: give the folder above "
            f"with its {RUN}, which says so, or write transcode: false into {CONFIG} if it is an autoencoder"
        )
    return bool(run.get("transcode", False))


def _sites(where: str, name: str, transcodes: bool) -> tuple[Site, Site]:
    """Return what is read and what is written."""
    match = HOOKPOINT.fullmatch(name)
    module = (match["module"] or "") if match else name
    if not match or module not in MODULES:
        raise FormatError(f"{where} is of {name}: known are blocks and their mlp, such as layers.3 and layers.3.mlp")
    before, after = (Site(MODEL, site, int(match["layer"])) for site in MODULES[module])
    return (before, after) if transcodes else (after, after)


FORMATS.add(Sparsify.name, Sparsify())
