"""What readers of transcoders share that keep every tensor of a layer in one file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from clt_plugin.core import Activation, Host, JumpReLU, Piece, ReLU, Site
from clt_plugin.core.files import Header
from clt_plugin.formats._description import Description, Formula, join
from clt_plugin.formats._layers import all_or_none, at_least_zero, one_layer, shape_of
from clt_plugin.hub import Folder


@dataclass(frozen=True)
class Listed:
    """What a config says of a layer's file that the file may not say itself; None where it is silent.

    Attributes:
        read: The name of the site read.
        write: The name of the site written.
        layer: The layer.
        model_name: The model.
        activation: The activation's name.
        k: Its k.
    """

    read: str | None = None
    write: str | None = None
    layer: int | None = None
    model_name: str | None = None
    activation: str | None = None
    k: int | None = None


@dataclass(frozen=True)
class Tensors:
    """What a format calls the tensors of a layer, and which way round they lie.

    Attributes:
        W_enc: (F, d), or (d, F).
        b_enc: (F,).
        W_dec: (F, d), or (d, F).
        b_dec: (d,).
        threshold: (F,); where it is there the activation is JumpReLU, else ReLU.
        W_skip: (d_in, d_out), or (d_out, d_in); "" where there is none.
        encoder_d_by_f: Whether ``W_enc`` is (d, F).
        decoder_d_by_f: Whether ``W_dec`` is (d, F).
        skip_out_by_in: Whether ``W_skip`` is (d_out, d_in).
        rectified: Whether JumpReLU is ``relu(h) * (h > threshold)``, else ``h * (h > threshold)``.
    """

    W_enc: str = "W_enc"
    b_enc: str = "b_enc"
    W_dec: str = "W_dec"
    b_dec: str = "b_dec"
    threshold: str = "threshold"
    W_skip: str = ""
    encoder_d_by_f: bool = False
    decoder_d_by_f: bool = False
    skip_out_by_in: bool = False
    rectified: bool = True

    def sizes(self, folder: Folder, name: str, header: Header) -> tuple[int, int]:
        """Return (F, d), of which the encoder's shape tells."""
        if self.encoder_d_by_f:
            d, n = shape_of(folder.file(name), header, self.W_enc, "d, F")
        else:
            n, d = shape_of(folder.file(name), header, self.W_enc, "F, d")
        return n, d

    def threshold_of(self, piece: Piece) -> Piece | Formula:
        """Return the threshold t with which JumpReLU is our ``h * (h > t)``."""
        return Formula(at_least_zero, (piece,)) if self.rectified else piece


def describe_layer(
    folder: Folder,
    name: str,
    header: Header,
    tensors: Tensors,
    format: str,
    sites: tuple[Site, Site],
    host: Host,
    activation: Activation | None = None,
) -> Description:
    """Say which tensor of a layer lies where.

    Args:
        folder: Where the file is.
        name: The file.
        header: Its header.
        tensors: What it calls them.
        format: The format's name.
        sites: The sites read and written, which are of one width.
        host: The model.
        activation: By default the one that the tensors tell.
    """
    file = folder.file(name)
    n, d = tensors.sizes(folder, name, header)
    affine, has_threshold = tensors.W_skip in header, tensors.threshold in header

    def matrix(key: str, turned: bool, rows: int) -> tuple[Piece]:
        return (Piece(file, key, (d, rows) if turned else (rows, d), rows_last=turned),)

    weights: dict[tuple[str, int], tuple[Piece, ...]] = {
        ("W_enc", 0): matrix(tensors.W_enc, tensors.encoder_d_by_f, n),
        ("W_dec", 0): matrix(tensors.W_dec, tensors.decoder_d_by_f, n),
    }
    if affine:
        weights["W_skip", 0] = matrix(tensors.W_skip, tensors.skip_out_by_in, d)
    vectors: dict[tuple[str, int], Piece | Formula] = {
        ("b_enc", 0): Piece(file, tensors.b_enc, (n,)),
        ("b_dec", 0): Piece(file, tensors.b_dec, (d,)),
    }
    if has_threshold:
        vectors["threshold", 0] = tensors.threshold_of(Piece(file, tensors.threshold, (n,)))
    activation = activation or (JumpReLU() if has_threshold else ReLU())
    wiring = one_layer(*sites, affine)
    return Description(str(file), format, wiring, d, (n,), activation, host, weights, vectors)


def join_layers(parts: Sequence[Description], label: str, format: str) -> Description:
    """Return the description of a set with a layer a file; from layer 0 on without gap it is the model's whole."""
    all_or_none(label, {part.label: bool(part.wiring.skips) for part in parts}, "a skip connection")
    kind = parts[0].wiring.name.partition("(")[0] if parts else ""
    whole = join(parts, label, format, kind + "({n})")
    if whole.wiring.home == tuple(range(len(parts))):
        whole = replace(whole, host=replace(whole.host, n_layers=len(parts)))
    return whole
