"""Files seen otherwise than their tensors lie in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clt_plugin.core import File
from clt_plugin.core.files import Header


@dataclass(frozen=True)
class Stacked(File):
    """A file whose ``W_dec`` (n * F, d) is seen as (n, F, d), one decoder a source.

    Attributes:
        file: The file.
        n_latents: F.
    """

    file: File | None = None
    n_latents: int = 1

    @property
    def parts(self) -> tuple[File, ...]:
        """The file itself."""
        return (self._whole,)

    @property
    def is_here(self) -> bool:
        """Whether the file is on this machine."""
        return self._whole.is_here

    @property
    def size(self) -> int | None:
        """Its size in bytes, or None where that is not known."""
        return self._whole.size

    @property
    def _whole(self) -> File:
        assert self.file is not None
        return self.file

    def header(self) -> Header:
        """Return {key: (shape, dtype)}, the decoder's rows by source."""
        header = dict(self._whole.header())
        shape, dtype = header.get("W_dec", ((), ""))
        if len(shape) == 2 and shape[0] % self.n_latents == 0:
            header["W_dec"] = ((shape[0] // self.n_latents, self.n_latents, shape[1]), dtype)
        return header

    def read(self, key: str, at: tuple[int, ...] = (), rows: Tensor | slice | None = None) -> Tensor:
        """Return (part of) a tensor, see `File.read`; of the decoder, one source's rows."""
        if key != "W_dec" or not at:
            return self._whole.read(key, at, rows)
        of_source = torch.arange(self.n_latents) + at[0] * self.n_latents
        if rows is None:
            return self._whole.read(key, (), slice(int(of_source[0]), int(of_source[-1]) + 1))
        return self._whole.read(key, (), of_source[rows])
