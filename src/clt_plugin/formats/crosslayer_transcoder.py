"""The format of crosslayer-transcoder (Goreg12345), a library that trains CLTs and transcoders on GPT-2.

``checkpoint.safetensors`` holds ``encoder.W`` (L, d, F), ``encoder.b`` (L, F), ``decoder.b`` (L, d), for a CLT
``decoder.W_{t}`` (t + 1, F, d), one for each *target* with its sources s = 0 .. t, for transcoders a layer
``decoder.W`` (L, F, d), and what the nonlinearity keeps. ``config.yaml`` names the parts. With z the inputs, and u
the sums, before and after standardising::

    z_s = (x_s - mean_s) / std_s              a_s = nonlinearity(z_s @ W_s + b_s)
    u_t = sum over s <= t of a_s @ W_t[s] + b_t         y_t = u_t * std_t + mean_t

JumpReLU keeps what exceeds both 0 and ``nonlinearity.theta`` (1, L, F). Outside training, BatchTopK keeps what exceeds
``nonlinearity.threshold``: (1,) for all layers together, (L,) where each layer has its own. Means and deviations are
usually folded into the weights before saving; ``input_standardizer`` and ``output_standardizer`` hold them otherwise,
(L, d) or (L,).

x is the residual stream before the MLP's norm (the library hooks the input of ``ln_2``), y the MLP's output. The
config names no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from clt_plugin.core import FORMATS, Activation, BatchTopK, FormatError, Host, JumpReLU, Piece, ReLU, TopK, Wiring
from clt_plugin.core.files import Header
from clt_plugin.formats._description import Description, Formula
from clt_plugin.formats._layers import (
    at_least_zero,
    check_config,
    count,
    mapping,
    number,
    peek,
    read_scale,
    shape_of,
)
from clt_plugin.formats._normalisation import Normalisation
from clt_plugin.hub import Folder

CONFIG, WEIGHTS = "config.yaml", "checkpoint.safetensors"
DECODERS = {"CrosslayerDecoder": True, "MatryoshkaCrosslayerDecoder": True, "Decoder": False}
"""Whether each kind of decoder writes later layers."""
STANDARDISED = ("input_standardizer", "output_standardizer")
STANDARDISERS = {"Dimensionwise": "L, d", "Layerwise": "L"}
"""What the kinds of standardiser that can be folded are called, and the axes of their means and deviations."""


class CrosslayerTranscoder:
    """Reads what crosslayer-transcoder saves."""

    name = "crosslayer-transcoder"

    def sniff(self, folder: Folder) -> bool:
        """Whether a folder is in this format."""
        model = peek(folder, CONFIG).get("model")
        return isinstance(model, dict) and str(model.get("class_path")).startswith("crosslayer_transcoder.")

    def describe(self, folder: Folder) -> Description:
        """Say which tensor lies where."""
        parts, where = _parts(folder), f"{folder.label}/{CONFIG}"
        file, header = folder.file(WEIGHTS), folder.headers([WEIGHTS])[WEIGHTS]
        n_layers, d, n = shape_of(file, header, "encoder.W", "L, d, F")
        layers = range(n_layers)
        found = {"n_layers": n_layers, "d_acts": d, "d_features": n}
        for part in ("encoder", "decoder", "nonlinearity"):
            check_config(f"{where}, {part},", parts[part].args, found, file)
        crosses = _kind(parts, "decoder", where, DECODERS)
        reads, writes = (_standardiser(folder, header, parts, f"{side}put", n_layers, d) for side in ("in", "out"))
        weights: dict[tuple[str, int], tuple[Piece, ...]] = {}
        vectors: dict[tuple[str, int], Piece | Formula] = {}
        for s in layers:
            encoder = Piece(file, "encoder.W", (n_layers, d, n), at=(s,), rows_last=True)
            weights["W_enc", s] = (reads[s].encoder(encoder),)
            vectors["b_enc", s] = reads[s].b_enc(Piece(file, "encoder.b", (n_layers, n), at=(s,)), encoder)
            decoders = [(t, Piece(file, f"decoder.W_{t}", (t + 1, n, d), at=(s,))) for t in layers[s:]]
            if not crosses:
                decoders = [(s, Piece(file, "decoder.W", (n_layers, n, d), at=(s,)))]
            weights["W_dec", s] = tuple(writes[t].decoder(piece) for t, piece in decoders)
            vectors["b_dec", s] = writes[s].b_dec([Piece(file, "decoder.b", (n_layers, d), at=(s,))])
        activation, thresholds = _nonlinearity(folder, parts, n_layers, n)
        vectors |= {("threshold", s): threshold for s, threshold in enumerate(thresholds)}
        return Description(
            folder.label,
            self.name,
            (Wiring.clt if crosses else Wiring.plt)(n_layers, read="resid_mid", write="mlp_out"),
            d,
            (n,) * n_layers,
            activation,
            Host(n_layers=n_layers),
            weights,
            vectors,
            ignored={str(file): _ignored(parts, activation)},
        )


class _Part(NamedTuple):
    """A part that the config names: the name of its class, and the arguments."""

    name: str
    args: dict[str, Any]


def _parts(folder: Folder) -> Mapping[str, _Part]:
    """Return the parts that the config names."""
    model, where = folder.yaml(CONFIG)["model"], f"{folder.label}/{CONFIG}"
    named, parts = mapping(where, model, "init_args"), {}
    for part in named:
        if said := mapping(where, named, part):
            name = str(said.get("class_path")).rpartition(".")[2]
            parts[part] = _Part(name, mapping(f"{where}, {part},", said, "init_args"))
    if not {"encoder", "decoder", "nonlinearity"} <= parts.keys():
        raise FormatError(f"{where} names no encoder, decoder and nonlinearity under model: init_args")
    unfolded = [part for part in STANDARDISED if part in parts]
    if model.get("is_folded") and unfolded:
        raise FormatError(f"{where} says is_folded, yet names an {unfolded[0]}: whether to apply it cannot be told")
    return parts


def _kind(parts: Mapping[str, _Part], part: str, where: str, known: Mapping[str, Any]) -> Any:
    """Return what is known of the class of a part."""
    name = parts[part].name
    if name not in known:
        raise FormatError(f"{where} names the {part} {name}: known are {', '.join(known)}")
    return known[name]


def _nonlinearity(
    folder: Folder, parts: Mapping[str, _Part], n_layers: int, n: int
) -> tuple[Activation, list[Piece | Formula]]:
    """Return the activation, and a threshold for each layer where it has them."""
    file, args, where = folder.file(WEIGHTS), parts["nonlinearity"].args, f"{folder.label}/{CONFIG}"

    def k() -> int:
        return count(f"{where}, nonlinearity,", args, "k")

    def stored(name: str, shape: tuple[int, ...], at: tuple[int, ...]) -> Piece:
        return Piece(file, f"nonlinearity.{name}", shape, at)

    layers = range(n_layers)
    kinds: dict[str, Any] = {
        "ReLU": lambda: (ReLU(), []),
        "JumpReLU": lambda: (
            JumpReLU(number(f"{where}, nonlinearity,", args, "bandwidth", 0.01)),
            [Formula(at_least_zero, (stored("theta", (1, n_layers, n), (0, s)),)) for s in layers],
        ),
        "PerLayerTopK": lambda: (TopK(k()), []),
        "BatchTopK": lambda: (BatchTopK(k(), scope="joint"), [stored("threshold", (1,), (0,)) for _ in layers]),
        "PerLayerBatchTopK": lambda: (BatchTopK(k()), [stored("threshold", (n_layers,), (s,)) for s in layers]),
    }
    return _kind(parts, "nonlinearity", where, kinds)()


def _standardiser(
    folder: Folder, header: Header, parts: Mapping[str, _Part], side: str, n_layers: int, d: int
) -> list[Normalisation]:
    """Return how each layer is standardised; nothing where that was folded into the weights."""
    part, file = f"{side}_standardizer", folder.file(WEIGHTS)
    if part not in parts:
        return [Normalisation()] * n_layers
    name = parts[part].name
    if name == "Standardizer":  # which does nothing
        return [Normalisation()] * n_layers
    if name.startswith("Samplewise"):
        raise FormatError(
            f"{folder.label}/{CONFIG} names the {part} {name}: it divides each token by its own deviation, which no "
            "weights can hold. Only what it read once normalised could be given to such a crosscoder"
        )
    kinds = {f"{kind}{side.capitalize()}Standardizer": axes for kind, axes in STANDARDISERS.items()}
    axes = _kind(parts, part, f"{folder.label}/{CONFIG}", kinds)
    shape = (n_layers, d)[: len(axes.split(","))]
    stored = (read_scale(file, header, f"{part}.{name}", shape) for name in ("mean", "std"))
    return [Normalisation(mean, std) for mean, std in zip(*stored, strict=True)]


def _ignored(parts: Mapping[str, _Part], activation: Activation) -> frozenset[str]:
    """Return the keys that are read by other means, or that only training needs."""
    keys = {f"{part}.{name}" for part in STANDARDISED if part in parts for name in ("mean", "std")}
    return frozenset(keys | ({"nonlinearity.bandwidth"} if isinstance(activation, JumpReLU) else set()))


FORMATS.add(CrosslayerTranscoder.name, CrosslayerTranscoder())
