"""Gemma Scope 1: transcoders and autoencoders for Gemma 2 (Google DeepMind).

A layer is a ``params.npz``::

    W_enc (d, F)    b_enc (F,)    threshold (F,)    W_dec (F, d)    b_dec (d,)

With h = x @ W_enc + b_enc: y = (relu(h) * (h > threshold)) @ W_dec + b_dec.

There is no config: neither the layer nor the site is in the file, and a transcoder and an autoencoder have the same
tensors. Only the path tells, ``gemma-scope-2b-pt-transcoders/layer_5/width_16k/average_l0_87``: the layer by its
folder, the sites and the model by the repository's name, which is part of a path in the Hub's cache as well. A copy
of such files elsewhere loads where folders are named like that, or where a ``config.yaml`` lists them with hooks.

Transcoders read the MLP's input before the norm's gain, which their authors fold into the weights of the MLP, and
write what the MLP adds to the residual stream, after the norm that follows it. None of these was trained on the BOS
token.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import PurePath

import torch
from torch import Tensor

from clt_plugin.core import FORMATS, MODEL, FormatError, Host, Piece, Site
from clt_plugin.core.files import Header
from clt_plugin.formats._description import Description, Formula
from clt_plugin.formats._layers import shape_of
from clt_plugin.formats._one_layer import Listed, Tensors, describe_layer
from clt_plugin.hub import Folder

PARAMS = "params.npz"
TENSORS = Tensors(encoder_d_by_f=True)
SITES = {
    "transcoders": ("mlp_in_before_gain", "mlp_out"),
    "res": ("resid_post", "resid_post"),
    "mlp": ("mlp_out", "mlp_out"),
}
"""What the last word of a repository's name stands for: the sites read and written."""


class GemmaScope1:
    """Reads Gemma Scope 1."""

    name = "gemma-scope-1"

    def sniff(self, folder: Folder) -> bool:
        """Whether a folder is in this format."""
        return PARAMS in folder

    def describe(self, folder: Folder) -> Description:
        """Say which tensor lies where."""
        return self.describe_file(folder, PARAMS, folder.headers([PARAMS])[PARAMS], Listed())

    def describe_file(self, folder: Folder, name: str, header: Header, listed: Listed) -> Description:
        """Do so for one file, of which a listing may say what its path does not."""
        told = _told_by_path(folder)
        read, write = listed.read or told.read, listed.write or told.write
        layer = told.layer if listed.layer is None else listed.layer
        if read is None or write is None or layer is None:
            lacking = "which layer it is" if layer is None else "what it reads and writes"
            raise FormatError(
                f"{folder.label}/{name} does not hold {lacking}, and its path does not tell: keep the Hub's folders, "
                "as in gemma-scope-2b-pt-transcoders/layer_5/width_16k/average_l0_87, or make a config.yaml that lists "
                "the file under transcoders, with feature_input_hook and feature_output_hook"
            )
        for key in ("b_enc", "threshold"):
            shape_of(folder.file(name), header, key, "F")
        sites = Site(MODEL, read, layer), Site(MODEL, write, layer)
        host = Host(listed.model_name or told.model_name, exclude_first=1)
        described = describe_layer(folder, name, header, TENSORS, self.name, sites, host)
        return _without_scaling(described, header)


def _told_by_path(folder: Folder) -> Listed:
    """Return what folders above a file are called for; those nearest to it count."""
    told = Listed()
    for part in PurePath(os.path.abspath(folder.path)).parts:
        if match := re.fullmatch(r"layer_(\d+)", part):
            told = replace(told, layer=int(match[1]))
        elif part == "embedding":
            told = replace(told, layer=None)
        if match := re.fullmatch(r"(?:.*--)?gemma-scope-(2b|9b|27b)-(pt|it)-(transcoders|res|mlp|att)", part):
            size, tuned, what = match.groups()
            read, write = SITES.get(what, (None, None))
            told = Listed(read, write, None, f"google/gemma-2-{size}{'-it' if tuned == 'it' else ''}")
            if what == "att":
                raise FormatError(
                    f"{folder.label} reads the heads' outputs before they are projected, which is not a site that this "
                    "package reads: transcoders, and autoencoders on the residual stream or the MLP's output, load"
                )
    return told


def _without_scaling(described: Description, header: Header) -> Description:
    """Accept a factor a latent where all are 1, as some files have it; others would change what is written."""
    if "scaling_factor" not in header:
        return described
    bias = described.vectors["b_enc", 0]
    assert isinstance(bias, Piece)
    scaling = replace(bias, key="scaling_factor")

    def checked(bias: Tensor, factors: Tensor) -> Tensor:
        if not bool(torch.allclose(factors, torch.ones_like(factors))):
            raise FormatError(f"{scaling.file}: scaling_factor is not 1 everywhere, which this format does not know")
        return bias

    return replace(described, vectors={**described.vectors, ("b_enc", 0): Formula(checked, (bias, scaling))})


FORMATS.add(GemmaScope1.name, GemmaScope1())
