"""Virtual weights: what a feature's write adds to what another feature reads, along the residual stream alone.

``V[s, t] = sum over writes w of s, reads r of t, with w before r, of W_dec_s[w] . W_enc_t[r]``, with the gain and the
centring of norms on the way folded in: of the norm that t reads through (``mlp_in``, and ``mlp_in_before_gain`` for
its centring) and of a post-norm that s writes through (``mlp_out_before_norm``). Denominators, which differ from token
to token, are left out, and so are paths through attention, MLPs and affine skips.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from clt_plugin.adapters._norms import FrozenNorm
from clt_plugin.adapters.huggingface import HostModel
from clt_plugin.core.crosscoder import Crosscoder
from clt_plugin.core.errors import AttachError
from clt_plugin.core.wiring import MLP_READS, Site

ADDED = ("attn_out", "mlp_out_before_norm", "mlp_out")
"""The sites whose writes are added to the residual stream."""
STREAM = ("resid_pre", *MLP_READS, "resid_post")
"""The sites that read the residual stream."""
ENTRIES = 2**24
"""How many weights are read and converted at a time."""


@dataclass(frozen=True, eq=False)
class Chosen:
    """Some features of one group.

    Attributes:
        group: The group.
        latents: Which of its latents, (n,).
        columns: Where each stands among all the chosen features, (n,).
    """

    group: int
    latents: Tensor
    columns: Tensor


class ResidualPath:
    """The way from what is written to what is read, in one model.

    Args:
        hf: The plain Hugging Face model.
        host: What it is.
        crosscoder: Whose features write and read.

    Raises:
        AttachError: The crosscoder adds nothing to the residual stream, or reads nothing of it.
    """

    def __init__(self, hf: nn.Module, host: HostModel, crosscoder: Crosscoder) -> None:
        self.hf, self.host, self.crosscoder = hf, host, crosscoder
        sites = crosscoder.sites
        for verb, found, known in (("writes", sites.write, ADDED), ("reads", sites.read, STREAM)):
            if not any(site.name in known for site in found):
                names = ", ".join(dict.fromkeys(site.name for site in found))
                raise AttachError(
                    f"this crosscoder {verb} {names}: virtual weights are of features that add to the residual stream "
                    f"({', '.join(ADDED)}) and of features that read it ({', '.join(STREAM)})"
                )
        self._norms = {site: self._norm(site) for site in (*sites.read, *sites.write)}

    def reaches(self, write: Site, read: Site) -> bool:
        """Whether what is added at one site is part of what is read at another."""
        if write.name not in ADDED or read.name not in STREAM:
            return False
        if write.layer != read.layer:
            return write.layer < read.layer
        # Parallel blocks have their MLP read what enters the block.
        beside = self.host.parallel and read.name in MLP_READS
        return write.order < read.order and not beside

    @torch.no_grad()
    def into(self, chosen: list[Chosen]) -> Tensor:
        """Return the virtual weights from every latent, groups one after another, into the chosen ones, (N, n)."""
        clt, layout = self.crosscoder, self.crosscoder.layout
        asked = [self._zeros(layout.write_width(g), chosen) for g in range(clt.wiring.n_groups)]
        for part in chosen:
            encoders = clt.encoder_vectors(part.group, part.latents).double()
            for read, rows in layout.read_slices[part.group].items():
                seen = self._through(read, encoders[:, rows], back=True)
                for group, slices in enumerate(layout.write_slices):
                    for write, columns in slices.items():
                        if self.reaches(write, read):
                            asked[group][columns, part.columns] += self._through(write, seen, back=True).T
        return torch.cat([self._product("W_dec", group, right) for group, right in enumerate(asked)])

    @torch.no_grad()
    def out_of(self, chosen: list[Chosen]) -> Tensor:
        """Return the virtual weights from the chosen latents into every one, groups one after another, (N, n)."""
        clt, layout = self.crosscoder, self.crosscoder.layout
        given = [self._zeros(layout.read_width(g), chosen) for g in range(clt.wiring.n_groups)]
        for part in chosen:
            decoders = clt.decoder_vectors(part.group, part.latents).double()
            added = {
                write: self._through(write, decoders[:, columns])
                for write, columns in layout.write_slices[part.group].items()
            }
            for group, slices in enumerate(layout.read_slices):
                for read, rows in slices.items():
                    before = [v for write, v in added.items() if self.reaches(write, read)]
                    if before:
                        given[group][rows, part.columns] = self._through(read, torch.stack(before).sum(0)).T
        return torch.cat([self._product("W_enc", group, right) for group, right in enumerate(given)])

    def _zeros(self, width: int, chosen: list[Chosen]) -> Tensor:
        n = sum(len(part.latents) for part in chosen)
        return torch.zeros(width, n, dtype=torch.float64, device=self.crosscoder.device)

    def _product(self, kind: str, group: int, right: Tensor) -> Tensor:
        """Return a group's weights times ``right``, (F, n), in float64; weights are read a few rows at a time."""
        if not bool(right.any()):
            return right.new_zeros(self.crosscoder.group_sizes[group], right.shape[1])
        return torch.cat([rows.double() @ right for rows in self._rows(kind, group, len(right))])

    def _rows(self, kind: str, group: int, width: int) -> Iterator[Tensor]:
        clt, size, step = self.crosscoder, self.crosscoder.group_sizes[group], max(1, ENTRIES // width)
        # Most files hold an encoder with its latents last, where a few take as long to read as all.
        whole = clt.encoder_vectors(group) if kind == "W_enc" else None
        for start in range(0, size, step):
            rows = slice(start, min(start + step, size))
            yield clt.store.get(kind, group, rows) if whole is None else whole[rows]

    def _through(self, site: Site, vectors: Tensor, back: bool = False) -> Tensor:
        """Take vectors, (n, d), through the norm at a site but for its denominators; or back, as what is read is."""
        norm = self._norms[site]
        if norm is None:
            return vectors
        return norm.transposed(vectors, norm.scale) if back else norm.linear(vectors)

    def _norm(self, site: Site) -> FrozenNorm | None:
        """Return the norm at a site, with denominators of 1 and in float64; None where there is none."""
        architecture, device = self.host.architecture, self.crosscoder.device
        before, after = architecture.pre_mlp_norm, architecture.post_mlp_norm
        name = {"mlp_in": before, "mlp_in_before_gain": before, "mlp_out_before_norm": after}.get(site.name)
        if name is None:
            return None
        module = self.hf.get_submodule(f"{self.host.blocks}.{site.layer}.{name}")
        parameter = next(self.hf.parameters())
        probe = torch.linspace(-1, 1, self.host.d_model, dtype=parameter.dtype, device=parameter.device)[None, None]
        norm = FrozenNorm.of(module, probe, probe, name=f"layer {site.layer}'s norm {name}").to(torch.float64, device)
        one = torch.ones_like(norm.gain)
        return replace(norm, scale=one, gain=one if site.name == "mlp_in_before_gain" else norm.gain)
