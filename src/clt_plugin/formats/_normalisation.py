"""Normalised inputs and outputs, folded into weights that act on what is not normalised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clt_plugin.core import Piece
from clt_plugin.formats._description import Formula
from clt_plugin.formats._layers import times, wide


@dataclass(frozen=True)
class Normalisation:
    """How a site is normalised: ``(x - mean) / std`` where it is read, ``u * std + mean`` where it is written.

    Attributes:
        mean: A number or one a coordinate, (d,); None for 0.
        std: A number or one a coordinate, (d,); None for 1.
    """

    mean: Tensor | None = None
    std: Tensor | None = None

    def encoder(self, piece: Piece) -> Piece:
        """Return an encoder that reads what is not normalised: its columns divided by std."""
        return piece if self.std is None else replace(piece, scale=1 / self.std)

    def b_enc(self, bias: Piece, encoder: Piece) -> Piece | Formula:
        """Return ``bias - (mean / std) @ W_enc``, (F,), for an encoder as it is stored."""
        if self.mean is None:
            return bias

        def of(stored: Tensor) -> Tensor:
            width = encoder.shape[len(encoder.at)] if encoder.rows_last else encoder.shape[-1]
            return stored.double() - times(encoder, self._shift(width))

        return Formula(of, (bias,))

    def decoder(self, piece: Piece) -> Piece:
        """Return a decoder that writes what is not normalised: its columns times std."""
        if self.std is None:
            return piece
        return replace(piece, scale=self.std if piece.scale is None else piece.scale * self.std)

    def skip(self, piece: Piece, read: Normalisation) -> Piece:
        """Return a skip, rows the coordinates read, from and to what is not normalised."""
        if read.std is None:
            return self.decoder(piece)
        inverse = 1 / read.std
        return self.decoder(replace(piece, row_scale=inverse) if inverse.ndim else replace(piece, scale=inverse))

    def b_dec(
        self, biases: Sequence[Piece], skip: Piece | None = None, read: Normalisation | None = None
    ) -> Piece | Formula:
        """Return ``(sum of biases - (read's mean / std) @ W_skip) * std + mean``, (d,).

        Args:
            biases: Every bias of the site, (d,) each.
            skip: The skip that writes to the site, as it is stored.
            read: How the site that the skip reads is normalised.
        """
        shifts = skip is not None and read is not None and read.mean is not None
        if len(biases) == 1 and not shifts and self.mean is None and self.std is None:
            return biases[0]

        def of(*tensors: Tensor) -> Tensor:
            total = torch.stack([wide(bias) for bias in tensors[: len(biases)]]).sum(0)
            if shifts and skip and read:
                weight = as_stored(skip, tensors[-1])
                total = total - read._shift(weight.shape[0]) @ weight
            total = total if self.std is None else total * self.std
            return total if self.mean is None else total + self.mean

        return Formula(of, (*biases, skip) if shifts and skip else tuple(biases))

    def _shift(self, width: int) -> Tensor:
        """Return what normalising moves every input by, (width,)."""
        assert self.mean is not None
        return (self.mean if self.std is None else self.mean / self.std).expand(width)


def as_stored(piece: Piece, tensor: Tensor) -> Tensor:
    """Return a piece's tensor as (rows, columns), in float32 at least, without its scale."""
    return wide(tensor.T if piece.rows_last else tensor)
