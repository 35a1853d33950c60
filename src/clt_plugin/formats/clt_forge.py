"""The format of CLT-Forge (LLM-Interp), which trains CLTs and transcoders through TransformerLens.

``clt_cfg.json`` lies beside ``clt_weights.safetensors``: ``W_enc`` (L, d, F), ``b_enc`` and ``log_threshold`` (L, F),
``W_dec`` (P, F, d) and ``b_dec`` (P, d) for the P = L (L + 1) / 2 pairs of a source and a target in the order (0, 0),
(0, 1), .., (0, L - 1), (1, 1), .. or, without ``cross_layer_decoders``, for the L layers. Where features were sharded
there is a ``rank{r}_clt_weights.safetensors`` for each share of the latents, with equal ``b_dec`` in all. With the
factors f = ``estimated_norm_scaling_factor_in`` and g = ``.._out`` (L,)::

    p_s = (f_s * x_s) @ W_enc[s] + b_enc[s]       a_s = p_s * (p_s > exp(log_threshold[s]))
    y_t = (sum over s <= t of a_s @ W_dec[s, t] + b_dec[s, t]) / g_t

x is TransformerLens's ``ln2.hook_normalized`` and y its ``hook_mlp_out``; the config names neither. The tool loads
models without processing, and in such a model the hook lies behind gain and bias where the norm is a LayerNorm
(GPT-2), but before the gain where it is an RMSNorm (Llama): so the model, which the config does name, decides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clt_plugin.core import FORMATS, File, FormatError, Host, JumpReLU, Piece, Wiring
from clt_plugin.core.files import Header
from clt_plugin.formats._description import Description, Formula
from clt_plugin.formats._hooks import normalised_site
from clt_plugin.formats._layers import (
    check_config,
    check_layers,
    number,
    peek,
    read_scale,
    shape_of,
    text,
)
from clt_plugin.formats._normalisation import Normalisation
from clt_plugin.hub import Folder, read_headers

CONFIG, WEIGHTS, SHARE = "clt_cfg.json", "clt_weights.safetensors", "rank{i}_clt_weights.safetensors"
LATENTS = {"W_enc": 2, "b_enc": 1, "W_dec": 1, "log_threshold": 1, "feature_count": 1}
"""Which axis of a sharded tensor is that of latents."""
FACTORS = "estimated_norm_scaling_factor_{side}"
NOT_NEEDED = frozenset(["layer_mask", "feature_count", "l_idx", "k_idx"])


class CLTForge:
    """Reads what CLT-Forge saves."""

    name = "clt-forge"

    def sniff(self, folder: Folder) -> bool:
        """Whether a folder is in this format."""
        return {"d_in", "d_latent", "n_layers"} <= peek(folder, CONFIG).keys()

    def describe(self, folder: Folder) -> Description:
        """Say which tensor lies where."""
        config, where, file = folder.json(CONFIG), f"{folder.label}/{CONFIG}", _weights(folder)
        header = file.header()
        n_layers, d, n = shape_of(file, header, "W_enc", "L, d, F")
        check_config(where, config, {"n_layers": n_layers, "d_in": d, "d_latent": n}, file)
        layers, read = range(n_layers), normalised_site(config.get("model_name"), where)
        if config.get("cross_layer_decoders", "layer_mask" in header):
            wiring = Wiring.clt(n_layers, read, "mlp_out")
        else:
            wiring = Wiring.plt(n_layers, read, "mlp_out")
        pairs = [(s, site.layer) for s, sites in enumerate(wiring.writes) for site in sites]
        reads, writes = (_factors(file, header, side, n_layers) for side in ("in", "out"))
        weights: dict[tuple[str, int], tuple[Piece, ...]] = {}
        vectors: dict[tuple[str, int], Piece | Formula] = {}
        for s in layers:
            encoder = Piece(file, "W_enc", (n_layers, d, n), at=(s,), rows_last=True)
            weights["W_enc", s] = (reads[s].encoder(encoder),)
            vectors["b_enc", s] = Piece(file, "b_enc", (n_layers, n), at=(s,))
            vectors["threshold", s] = Formula(torch.exp, (Piece(file, "log_threshold", (n_layers, n), at=(s,)),))
            decoders = {t: Piece(file, "W_dec", (len(pairs), n, d), (p,)) for p, (s_, t) in enumerate(pairs) if s_ == s}
            weights["W_dec", s] = tuple(writes[t].decoder(piece) for t, piece in decoders.items())
        for t in layers:
            biases = [Piece(file, "b_dec", (len(pairs), d), (p,)) for p, (_, t_) in enumerate(pairs) if t_ == t]
            vectors["b_dec", t] = writes[t].b_dec(biases)
        return Description(
            folder.label,
            self.name,
            wiring,
            d,
            (n,) * n_layers,
            JumpReLU(number(where, config, "jumprelu_bandwidth", 1.0)),
            Host(text(where, config, "model_name"), None, n_layers),
            weights,
            vectors,
            ignored={str(file): NOT_NEEDED | {FACTORS.format(side=side) for side in ("in", "out")}},
        )


def _factors(file: File, header: Header, side: str, n_layers: int) -> list[Normalisation]:
    """Return each layer's factor, as the deviation that inputs and outputs are divided by."""
    key = FACTORS.format(side=side)
    return [Normalisation(std=1 / factor) for factor in read_scale(file, header, key, (n_layers,), above_0=True)]


# ---------------------------------------------------------------- shards


def _weights(folder: Folder) -> File:
    """Return the file of weights: one, or all ranks' as if they were one."""
    ranks = folder.numbered(SHARE.format(i=r"(\d+)"))
    if WEIGHTS in folder or not ranks:
        return folder.file(WEIGHTS)
    check_layers(folder.label, ranks, SHARE)
    files = tuple(folder.file(name) for name in ranks.values())
    return Shares(files[0].path, f"{folder.label}/{' + '.join(ranks.values())}", files)


@dataclass(frozen=True)
class Shares(File):
    """Files that share out the latents of their tensors, seen as one.

    Attributes:
        files: In the order of their latents.
    """

    files: tuple[File, ...] = ()

    @property
    def parts(self) -> tuple[File, ...]:
        """The files themselves."""
        return self.files

    @property
    def is_here(self) -> bool:
        """Whether all are on this machine."""
        return all(file.is_here for file in self.files)

    @property
    def size(self) -> int | None:
        """Their size together, or None where that is not known."""
        sizes = [file.size for file in self.files]
        return sum(size for size in sizes if size is not None) if None not in sizes else None

    def header(self) -> Header:
        """Return the header of the whole; refuse shares that differ in more than the number of latents."""
        headers = read_headers(self.files)
        whole: Header = {}
        for file, header in headers.items():
            for key, (shape, dtype) in header.items():
                before = whole.setdefault(key, (shape, dtype)) if file == self.files[0] else whole.get(key)
                axis = LATENTS.get(key, len(shape))
                if before is None or [*before[0][:axis], *before[0][axis + 1 :]] != [*shape[:axis], *shape[axis + 1 :]]:
                    raise FormatError(f"{file}: {key} {shape} does not go with what {self.files[0]} holds")
                if axis < len(shape) and file != self.files[0]:
                    whole[key] = ((*shape[:axis], before[0][axis] + shape[axis], *shape[axis + 1 :]), before[1])
            if missing := ", ".join(sorted(whole.keys() - header.keys())):
                raise FormatError(f"{file} has no {missing}, which {self.files[0]} holds")
        return whole

    def read(self, key: str, at: tuple[int, ...] = (), rows: Tensor | slice | None = None) -> Tensor:
        """Return (part of) a tensor, see `File.read`: the shares' latents one after another."""
        if key not in LATENTS:
            return self.files[0].read(key, at, rows)
        axis = LATENTS[key] - len(at)
        if rows is None or axis > 0:
            whole = torch.cat([file.read(key, at) for file in self.files], dim=axis)
            return whole if rows is None else whole[rows]
        sizes = [header[key][0][LATENTS[key]] for header in read_headers(self.files).values()]
        wanted = torch.arange(sum(sizes))[rows]
        parts, start = [], 0
        for file, n in zip(self.files, sizes, strict=True):
            here = wanted[(wanted >= start) & (wanted < start + n)] - start
            if len(here) or not len(wanted):
                parts.append(file.read(key, at, here))
            start += n
        # The rows of each share are together now: back into the order asked for.
        order = torch.bucketize(wanted, torch.tensor(sizes).cumsum(0), right=True).argsort(stable=True)
        return torch.cat(parts)[order.argsort()]


FORMATS.add(CLTForge.name, CLTForge())
