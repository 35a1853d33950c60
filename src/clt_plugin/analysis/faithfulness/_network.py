"""The Boolean network, made by hand: (a XOR b) AND (c XOR d) in two MLP layers with residual connections.

Layer 0 has e, f = ReLU(+-(a - b) - 1) and g, h likewise on c and d; layer 1 has i = ReLU(e + f + g + h - 1). Each of
the nine values has a direction of its own in the residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from clt_plugin.core import Crosscoder, Site, Wiring
from clt_plugin.core.wiring import MODEL
from clt_plugin.training.standard import Scaling, Standard

READS, WRITES = tuple(tuple(Site(MODEL, name, layer) for layer in (0, 1)) for name in ("mlp_in", "mlp_out"))
"""What transcoders of the network read and write, by layer."""


@dataclass(frozen=True)
class Layout:
    """Where the nine values a-i lie in the residual stream.

    Attributes:
        width: Of the residual stream.
        axes: The axis of each value; None for random orthogonal directions.
        clears_inputs: Whether MLP 0 also writes minus the inputs, so that layer 1 sees e-h alone.
    """

    width: int
    axes: tuple[int, ...] | None
    clears_inputs: bool

    def directions(self) -> Tensor:
        """Return the direction of each of a-i, orthonormal rows (9, width) in float64."""
        if self.axes is None:
            drawn = torch.randn(self.width, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            return torch.linalg.qr(drawn)[0].T
        return torch.eye(self.width, dtype=torch.float64)[list(self.axes)]


LAYOUTS: Mapping[str, Layout] = {
    "wide": Layout(110, (0, 1, 2, 3, 104, 105, 106, 107, 108), clears_inputs=True),
    "nine": Layout(9, tuple(range(9)), clears_inputs=False),
    "random": Layout(110, None, clears_inputs=False),
}
"""``"wide"`` reproduces the document's Table 1: of 110 axes nine are used, and MLP 0 clears the inputs. ``"nine"`` has
nine axes; ``"random"`` has nine random directions in a width of 110. Neither clears the inputs."""


@dataclass(frozen=True)
class BooleanNetwork:
    """The network on all 16 inputs, in float64.

    Attributes:
        layout: Where its values lie.
    """

    layout: Layout

    @cached_property
    def inputs(self) -> Tensor:
        """The inputs a, b, c, d as +-1, (16, 4)."""
        return torch.tensor([[1.0 - 2 * (t >> bit & 1) for bit in range(4)] for t in range(16)]).double()

    @cached_property
    def neurons(self) -> dict[int, Tensor]:
        """Each layer's neurons: e, f, g, h, (16, 4), and i, (16, 1)."""
        a, b, c, d = self.inputs.T
        first = torch.stack([a - b - 1, b - a - 1, c - d - 1, d - c - 1], dim=1).relu()
        return {0: first, 1: (first.sum(1, keepdim=True) - 1).relu()}

    @property
    def truth(self) -> Tensor:
        """Whether the formula is true, (16,)."""
        return self.neurons[1][:, 0] > 0.5

    @cached_property
    def sites(self) -> dict[Site, Tensor]:
        """What each MLP reads and writes, {site: (16, width)}."""
        directions = self.layout.directions()
        start = self.inputs @ directions[:4]
        first = self.neurons[0] @ directions[4:8] - (start if self.layout.clears_inputs else 0)
        return {
            READS[0]: start,
            WRITES[0]: first,
            READS[1]: start + first,
            WRITES[1]: self.neurons[1] @ directions[8:],
        }

    @cached_property
    def standard(self) -> Standard:
        """Each axis by its own mean and unbiased standard deviation; of those that do not vary, the mean alone."""
        scalings = {}
        for site, x in self.sites.items():
            spread = x.std(0)
            scalings[site] = Scaling(x.mean(0), torch.where(spread > 1e-9, spread, 1.0))
        return Standard(scalings)

    def answers(self, crosscoder: Crosscoder) -> Tensor:
        """Return what the network says with its MLPs replaced, (16,) of bool.

        Args:
            crosscoder: Acts on raw activations. Later layers read the residual stream that it wrote.
        """
        stream, written = self.sites[READS[0]], dict.fromkeys(WRITES, torch.zeros(()))
        for layer in (0, 1):
            for site, part in crosscoder.decode_group(layer, crosscoder.encode_group(layer, stream)).items():
                written[site] = written[site] + part
            stream = stream + written[WRITES[layer]] + crosscoder.bias(WRITES[layer])
        return stream @ self.layout.directions()[8] > 0.5


def wiring_of(name: str, span: int | None) -> Wiring:
    """Return the wiring of ``"clt"`` (of a limited span, if given) or ``"plt"`` for two layers."""
    if name not in ("clt", "plt"):
        raise ValueError(f"the toy's wiring is 'clt' or 'plt', not {name!r}")
    if name == "plt" and span not in (None, 1):
        raise ValueError(f"per-layer transcoders have span 1, not {span}: leave span= out, or say wiring='clt'")
    if name == "clt" and span is not None:
        return Wiring.local_clt(2, span=span)
    return Wiring.clt(2) if name == "clt" else Wiring.plt(2)
