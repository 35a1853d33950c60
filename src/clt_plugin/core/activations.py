"""ReLU, JumpReLU, TopK and BatchTopK, as functions with their gradients.

Canonical shapes: pre-activations and activations are (..., n_latents). An `Activation` is a small frozen
value that says which function a crosscoder uses; thresholds and scales, which are learnt or measured, are
passed in. A third party adds one with ``ACTIVATIONS.add(name, cls)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from clt_plugin.core.errors import WiringError
from clt_plugin.core.registry import Registry

# ---------------------------------------------------------------- functions


class _JumpReLU(torch.autograd.Function):
    """h where h > threshold, else 0; the threshold's gradient is a straight-through estimate."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(h, threshold)
        ctx.bandwidth = bandwidth
        return h * (h > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        h, threshold = ctx.saved_tensors
        grad_h = grad * (h > threshold) if ctx.needs_input_grad[0] else None
        grad_threshold = None
        if ctx.needs_input_grad[1]:
            inside = (h - threshold).abs() < ctx.bandwidth / 2
            grad_threshold = (-(threshold / ctx.bandwidth) * inside * grad).sum_to_size(threshold.shape)
        return grad_h, grad_threshold, None


class _Step(torch.autograd.Function):
    """1 where h > threshold, else 0; the threshold's gradient is a straight-through estimate."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(h, threshold)
        ctx.bandwidth = bandwidth
        return (h > threshold).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None]:
        h, threshold = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return None, None, None
        inside = (h - threshold).abs() < ctx.bandwidth / 2
        return None, (-(1 / ctx.bandwidth) * inside * grad).sum_to_size(threshold.shape), None


def jumprelu(h: Float[Tensor, "*batch f"], threshold: Float[Tensor, " f"], bandwidth: float = 0.001) -> Tensor:
    """Return h where it exceeds its latent's threshold, and 0 elsewhere.

    The gradient with respect to h is exact almost everywhere. The true gradient with respect to the threshold is
    0 almost everywhere, so the straight-through estimate stands in: ``-(threshold / bandwidth)`` for each h within
    half a bandwidth of the threshold (Rajamanoharan et al. 2024, "Jumping Ahead", equation 11, with a
    rectangular kernel).

    Args:
        h: Pre-activations, (..., n_latents).
        threshold: One threshold a latent, (n_latents,).
        bandwidth: Width of the kernel, in units of h.
    """
    return _JumpReLU.apply(h, threshold, bandwidth)


def step(h: Float[Tensor, "*batch f"], threshold: Float[Tensor, " f"], bandwidth: float = 0.001) -> Tensor:
    """Return 1 where h exceeds its threshold: summed over latents it is L0, with a gradient for the threshold.

    Shapes and source as for `jumprelu` (equation 12); h itself gets no gradient.
    """
    return _Step.apply(h, threshold, bandwidth)


def topk(
    h: Float[Tensor, "*batch f"], k: int, scale: Float[Tensor, " f"] | None = None, rectify: bool = True
) -> Tensor:
    """Keep the k largest of relu(h) for each token (Gao et al. 2024, "Scaling and evaluating sparse autoencoders").

    Args:
        h: Pre-activations, (..., n_latents).
        k: How many latents to keep a token; fewer are active where fewer are positive.
        scale: Rank by ``relu(h) * scale`` instead, (n_latents,).
        rectify: False takes h itself for relu(h): always k are kept, and where fewer are positive some are negative.
    """
    acts = h.relu() if rectify else h
    score = acts.detach() if scale is None else acts.detach() * scale
    keep = torch.zeros_like(acts, dtype=torch.bool)
    keep.scatter_(-1, score.topk(min(k, h.shape[-1]), dim=-1).indices, True)
    return acts * keep


def batchtopk(h: Float[Tensor, "*batch f"], k: int, scale: Float[Tensor, " f"] | None = None) -> Tensor:
    """Keep the k * n_tokens largest of relu(h) over the whole batch (Bussmann et al. 2024, "BatchTopK").

    Args:
        h: Pre-activations, (..., n_latents); every leading axis counts as tokens.
        k: How many latents to keep a token, on average.
        scale: Rank by ``relu(h) * scale`` instead, (n_latents,).
    """
    acts = h.relu()
    score = (acts.detach() if scale is None else acts.detach() * scale).reshape(-1)
    n_tokens = math.prod(h.shape[:-1])
    keep = torch.zeros_like(score, dtype=torch.bool)
    keep[score.topk(min(k * n_tokens, score.numel())).indices] = True
    return acts * keep.reshape(acts.shape)


# ---------------------------------------------------------------- which function a crosscoder uses

ACTIVATIONS: Registry[type[Activation]] = Registry("activation")


@dataclass(frozen=True)
class Activation:
    """Which activation function a crosscoder uses, with its fixed settings.

    Subclasses are registered by name in `ACTIVATIONS`, implement `__call__` for one group and set the class
    attributes below.
    """

    name: ClassVar[str] = ""
    has_threshold: ClassVar[bool] = False
    """Whether the crosscoder keeps one learnt threshold for each latent."""
    has_batch_threshold: ClassVar[bool] = False
    """Whether the crosscoder keeps one measured threshold for each group, used outside training."""

    def __call__(self, h: Tensor, threshold: Tensor | None, scale: Tensor | None, training: bool) -> Tensor:
        """Activate one group's pre-activations.

        Args:
            h: Pre-activations, (..., n_latents).
            threshold: The group's threshold, (n_latents,) or (), for activations that have one.
            scale: The group's score scale, (n_latents,), for activations that rank by one.
            training: Whether the crosscoder is in training mode.
        """
        raise NotImplementedError

    @property
    def joint(self) -> bool:
        """Whether latents compete across groups, so that no group can be activated by itself."""
        return False

    @property
    def ranks(self) -> bool:
        """Whether latents compete, so that what one does depends on which others there are."""
        return False

    @property
    def ranks_by_decoder_norm(self) -> bool:
        """Whether latents are ranked by activation times decoder norm."""
        return False

    def over_groups(self, n_groups: int) -> Activation:
        """Return the activation that acts on the latents of all groups side by side, for one that is joint."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Return the activation as plain data, for JSON."""
        return {"name": self.name, **asdict(self)}

    @staticmethod
    def make(activation: str | Activation, **settings: Any) -> Activation:
        """Return an activation from its name and settings, or the one given.

        >>> Activation.make("topk", k=32)
        TopK(k=32, scope='group', score='activation')
        """
        if isinstance(activation, Activation):
            if settings:
                raise WiringError(f"{activation} has its settings: {', '.join(settings)} can't be given beside it")
            return activation
        cls = ACTIVATIONS[activation]
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            takes = f"takes {', '.join(known)}" if known else "takes no settings"
            raise WiringError(f"the activation {activation!r} {takes}, not {', '.join(unknown)}")
        needed = {field.name for field in fields(cls) if field.default is MISSING and field.default_factory is MISSING}
        lacking = sorted(needed - set(settings))
        if lacking:
            what = {"k": "a k: how many latents to keep a token"}.get(lacking[0], f"settings: {', '.join(lacking)}")
            raise WiringError(f"the activation {activation!r} needs {what}")
        return cls(**settings)


@dataclass(frozen=True)
class ReLU(Activation):
    """``max(h, 0)``."""

    name: ClassVar[str] = "relu"

    def __call__(self, h: Tensor, threshold: Tensor | None, scale: Tensor | None, training: bool) -> Tensor:
        """Activate; see `Activation.__call__`."""
        return h.relu()


@dataclass(frozen=True)
class JumpReLU(Activation):
    """``h * (h > threshold)``, see `jumprelu`.

    Attributes:
        bandwidth: Width of the straight-through kernel, in units of h; only gradients depend on it.
    """

    name: ClassVar[str] = "jumprelu"
    has_threshold: ClassVar[bool] = True
    bandwidth: float = 0.001

    def __call__(self, h: Tensor, threshold: Tensor | None, scale: Tensor | None, training: bool) -> Tensor:
        """Activate; see `Activation.__call__`."""
        if threshold is None:
            raise WiringError("JumpReLU needs a threshold for each latent")
        return jumprelu(h, threshold, self.bandwidth)


@dataclass(frozen=True)
class _Ranked(Activation):
    """What TopK and BatchTopK share.

    Attributes:
        k: How many latents to keep a token: in each group, or on average over groups where the scope is joint.
        scope: ``"group"``, or ``"joint"``: the k * n_groups best over all groups together.
        score: ``"activation"``, or ``"decoder_norm"``: rank by activation times decoder norm.
    """

    k: int
    scope: str = "group"
    score: str = "activation"

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise WiringError(f"k must be a whole number of at least 1, not {self.k!r}")
        if self.scope not in ("group", "joint"):
            raise WiringError(f"scope must be 'group' or 'joint', not {self.scope!r}")
        if self.score not in ("activation", "decoder_norm"):
            raise WiringError(f"score must be 'activation' or 'decoder_norm', not {self.score!r}")

    @property
    def ranks(self) -> bool:
        """Whether latents compete: always, outside a measured threshold."""
        return True

    @property
    def joint(self) -> bool:
        """Whether latents compete across groups."""
        return self.scope == "joint"

    @property
    def ranks_by_decoder_norm(self) -> bool:
        """Whether latents are ranked by activation times decoder norm."""
        return self.score == "decoder_norm"

    def over_groups(self, n_groups: int) -> Activation:
        """Return the activation that acts on the latents of all groups side by side."""
        return replace(self, k=self.k * n_groups, scope="group")


@dataclass(frozen=True)
class TopK(_Ranked):
    """The k largest of ``relu(h)`` for each token, see `topk`.

    Attributes:
        rectify: False ranks and keeps h itself, the negative too, as some tools do.
    """

    name: ClassVar[str] = "topk"
    rectify: bool = True

    def __post_init__(self) -> None:
        _Ranked.__post_init__(self)
        if not self.rectify and (self.joint or self.ranks_by_decoder_norm):
            raise WiringError("rectify=False ranks h within a group: scope is 'group' then, and score 'activation'")

    def __call__(self, h: Tensor, threshold: Tensor | None, scale: Tensor | None, training: bool) -> Tensor:
        """Activate; see `Activation.__call__`."""
        return topk(h, self.k, scale, self.rectify)

    # Shown and stored only where it is not the usual: what was written before it was there reads the same.

    def __repr__(self) -> str:
        rectify = "" if self.rectify else ", rectify=False"
        return f"TopK(k={self.k}, scope={self.scope!r}, score={self.score!r}{rectify})"

    def to_dict(self) -> dict[str, Any]:
        """Return the activation as plain data, for JSON."""
        data = Activation.to_dict(self)
        return {key: value for key, value in data.items() if key != "rectify" or not value}


@dataclass(frozen=True)
class BatchTopK(_Ranked):
    """In training the largest of ``relu(h)`` over the batch, see `batchtopk`; outside it a fixed threshold.

    The threshold is one score for each group, measured in training, so that what a token activates does not
    depend on the rest of its batch. ``nan`` stands for "not measured yet".
    """

    name: ClassVar[str] = "batchtopk"
    has_batch_threshold: ClassVar[bool] = True

    def __call__(self, h: Tensor, threshold: Tensor | None, scale: Tensor | None, training: bool) -> Tensor:
        """Activate; see `Activation.__call__`."""
        if training:
            return batchtopk(h, self.k, scale)
        if threshold is None or bool(threshold.isnan()):
            raise WiringError(
                "this BatchTopK crosscoder has no threshold yet, and outside training it needs one: call "
                "estimate_threshold(x) on typical inputs, or train() to select over the batch"
            )
        acts = h.relu()
        score = acts if scale is None else acts * scale
        return acts * (score > threshold)


for _cls in (ReLU, JumpReLU, TopK, BatchTopK):
    ACTIVATIONS.add(_cls.name, _cls)


def activate_jointly(
    activation: Activation,
    hs: Sequence[Tensor],
    threshold: Tensor | None,
    scales: Sequence[Tensor | None],
    training: bool,
) -> list[Tensor]:
    """Activate all groups together, where latents compete across groups.

    Args:
        activation: An activation that is joint.
        hs: For each group its pre-activations, (..., n_latents of the group).
        threshold: The measured threshold, the same for every group, or None.
        scales: For each group its score scale, (n_latents of the group,), or None.
        training: Whether the crosscoder is in training mode.
    """
    given = [scale for scale in scales if scale is not None]
    together = activation.over_groups(len(hs))
    acts = together(torch.cat(list(hs), dim=-1), threshold, torch.cat(given) if given else None, training)
    return list(acts.split([h.shape[-1] for h in hs], dim=-1))
