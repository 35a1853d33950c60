"""What a graph explains: logits, differences of logits, directions in the residual stream, features.

A target's value is a linear function of one state at one position. A logit's is taken less the mean over the
vocabulary, and before a softcap, ``(W_U[token] - mean W_U) . final_norm(x)``: what raises all logits alike changes no
probability (Ameisen et al. 2025, "Circuit Tracing", section on attribution graphs).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Logit:
    """A sum of logits, each with a coefficient, less as many mean logits.

    Attributes:
        tokens: (token, coefficient), a token as its id or as text that is one token.
        position: After which token of the prompt; the last by default.
        weight: The target's share in influence; by default its probability if it is one logit, else 1.
    """

    tokens: tuple[tuple[int | str, float], ...]
    position: int = -1
    weight: float | None = None


@dataclass(frozen=True, eq=False)
class Direction:
    """The component of a site along a vector.

    Attributes:
        vector: (d,).
        layer: The layer; None for the last.
        site: One of `SITE_NAMES`, or ``"final_norm"`` for what the unembedding reads.
        position: A position of the prompt.
        weight: The target's share in influence.
        name: What people call it.
    """

    vector: Tensor
    layer: int | None = None
    site: str = "resid_post"
    position: int = -1
    weight: float = 1.0
    name: str = "direction"


@dataclass(frozen=True)
class Feature:
    """A feature's pre-activation, whether it is active or not.

    Attributes:
        layer: Its layer, or its group's label.
        feature: The latent.
        position: A position of the prompt.
        weight: The target's share in influence.
    """

    layer: int | str
    feature: int
    position: int = -1
    weight: float = 1.0


Target = Logit | Direction | Feature


def logit(token: int | str, position: int = -1, weight: float | None = None) -> Logit:
    """Explain a token's logit.

    Args:
        token: Its id, or text that is one token.
        position: After which token of the prompt.
        weight: The target's share in influence; its probability by default.
    """
    return Logit(((token, 1.0),), position, weight)


def difference(token: int | str, other: int | str, position: int = -1, weight: float | None = None) -> Logit:
    """Explain the difference of two tokens' logits.

    Args:
        token: The one, as its id or as text that is one token.
        other: The one that is subtracted.
        position: After which token of the prompt.
        weight: The target's share in influence; 1 by default.
    """
    return Logit(((token, 1.0), (other, -1.0)), position, weight)


def direction(
    vector: Tensor,
    layer: int | None = None,
    site: str = "resid_post",
    position: int = -1,
    weight: float = 1.0,
    name: str = "direction",
) -> Direction:
    """Explain the component of a site along a vector, (d,), such as a probe's or a steering vector.

    Args:
        vector: (d,).
        layer: The layer; None for the last.
        site: One of `clt_plugin.core.wiring.SITE_NAMES`, or ``"final_norm"`` for what the unembedding reads.
        position: A position of the prompt.
        weight: The target's share in influence.
        name: What to call it.
    """
    return Direction(torch.as_tensor(vector), layer, site, position, weight, name)


def feature(layer: int | str, feature: int, position: int = -1, weight: float = 1.0) -> Feature:
    """Explain a feature's pre-activation: why it is active, or why it is not.

    Args:
        layer: Its layer, or its group's label.
        feature: The latent.
        position: A position of the prompt.
        weight: The target's share in influence.
    """
    return Feature(layer, feature, position, weight)
