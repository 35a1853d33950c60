"""The format of a sweep of sparse coders over GPT-2 (mntss/sparsecoder-sweep-gpt2), its cross-layer transcoders.

``encoder_layer_{s}.safetensors`` holds ``W_enc`` (F, d) and ``b_enc`` (F,); ``decoder_layer_{t}.safetensors``, one for
each *target*, holds ``W_dec_from_{s}`` (d, F) for s = 0 .. t, ``b_dec`` (d,) and optionally ``W_skip`` (d, d)::

    a_s = relu(x_s @ W_enc_s.T + b_enc_s)
    y_t = sum over s <= t of a_s @ W_dec_from_s.T + b_dec_t  (+ x_t @ W_skip_t.T)

x is the residual stream before the MLP's norm, y the MLP's output. There is no config, so that the model is not
named. The variants are branches of the repository: give one as ``@revision``. (EleutherAI/attribute,
``experiments/convert_relu_clt.py``.)
"""

from __future__ import annotations

from clt_plugin.core import FORMATS, Host, Piece, ReLU, Wiring
from clt_plugin.formats._description import Description
from clt_plugin.formats._layers import all_or_none, check_layers, shape_of
from clt_plugin.hub import Folder

ENCODER, DECODER = "encoder_layer_{i}.safetensors", "decoder_layer_{i}.safetensors"


class SparsecoderSweep:
    """Reads cross-layer transcoders whose decoders lie by target."""

    name = "sparsecoder-sweep"

    def sniff(self, folder: Folder) -> bool:
        """Whether a folder is in this format."""
        return bool(_numbered(folder, ENCODER))

    def describe(self, folder: Folder) -> Description:
        """Say which tensor lies where."""
        encoders, decoders = _numbered(folder, ENCODER), _numbered(folder, DECODER)
        n_layers = max({*encoders} | {*decoders}) + 1
        check_layers(folder.label, encoders, ENCODER, n_layers)
        check_layers(folder.label, decoders, DECODER, n_layers)
        layers = range(n_layers)
        headers = folder.headers([*encoders.values(), *decoders.values()])
        files = {name: folder.file(name) for name in headers}
        shapes = [shape_of(files[encoders[s]], headers[encoders[s]], "W_enc", "F, d") for s in layers]
        sizes, d = [n for n, _ in shapes], shapes[0][1]
        weights: dict[tuple[str, int], tuple[Piece, ...]] = {}
        vectors = {}
        for s in layers:
            encoder = files[encoders[s]]
            weights["W_enc", s] = (Piece(encoder, "W_enc", (sizes[s], d)),)
            vectors["b_enc", s] = Piece(encoder, "b_enc", (sizes[s],))
        for s in layers:
            weights["W_dec", s] = tuple(
                Piece(files[decoders[t]], f"W_dec_from_{s}", (d, sizes[s]), rows_last=True) for t in layers[s:]
            )
            vectors["b_dec", s] = Piece(files[decoders[s]], "b_dec", (d,))
        wiring = Wiring.clt(n_layers, read="resid_mid", write="mlp_out")
        if all_or_none(folder.label, {name: "W_skip" in headers[name] for name in decoders.values()}, "a W_skip"):
            wiring = wiring.with_skips()
            for t in layers:
                weights["W_skip", t] = (Piece(files[decoders[t]], "W_skip", (d, d), rows_last=True),)
        host = Host(n_layers=n_layers)
        return Description(folder.label, self.name, wiring, d, tuple(sizes), ReLU(), host, weights, vectors)


def _numbered(folder: Folder, file: str) -> dict[int, str]:
    return folder.numbered(file.format(i=r"(\d+)").replace(".safe", r"\.safe"))


FORMATS.add(SparsecoderSweep.name, SparsecoderSweep())
