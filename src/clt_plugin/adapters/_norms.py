"""What linear map a norm applies in one run, found by asking it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clt_plugin.core.errors import AttachError


class FreezeError(AttachError):
    """A run that cannot be recorded or frozen, or a freeze that did not act."""


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """A norm whose denominators are those of one run: ``gain * centre(x) * scale + bias``, but for rounding.

    Attributes:
        gain: (d,), in float32 at least, as are the bias and the scale.
        bias: (d,).
        scale: One over each position's denominator, (batch, position, 1).
        centred: Whether the mean is subtracted.
        x: The recorded input, (batch, position, d).
        y: The recorded output, of the same shape.
    """

    gain: Tensor
    bias: Tensor
    scale: Tensor
    centred: bool
    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, norm: nn.Module, x: Tensor, y: Tensor, name: str = "this norm") -> FrozenNorm:
        """Find a norm's gain, centring and bias by asking it, and its scale in one run by projection.

        Args:
            norm: Any module of that form: RMSNorm, with its gain stored as such or as what is added to 1, LayerNorm,
                with parameters or without, `torch.nn.Identity`.
            x: Its input in that run, (batch, position, d).
            y: Its output then.
            name: What to call it in errors.

        Raises:
            FreezeError: The module is not of that form.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        signs = torch.ones(x.shape[-1], dtype=wide, device=x.device)
        signs[1::2] = -1
        # So large that epsilon is nothing beside it, and within reach of float16.
        large = 1e4
        # And so small that it is nothing beside epsilon.
        small = 1e-12 * signs
        probes = torch.stack((0 * signs, large * signs, large * (signs + 3), small))
        # All at once: a norm takes each vector by itself.
        answers = _answers(norm, torch.cat((probes, x.to(wide).flatten(0, -2))))
        bias = answers[0]
        answer, shifted, silent = answers[1:4] - bias
        centred = bool((shifted - answer).abs().max() < 1e-3 * answer.abs().max())
        direction = _centre(signs) if centred else signs
        gain = answer / (direction * direction.pow(2).mean().rsqrt())
        unscaled = gain * (_centre(x.to(wide)) if centred else x.to(wide))
        scaled = answers[4:].view(x.shape) - bias
        square = unscaled.pow(2).sum(-1, keepdim=True)
        # Where nothing comes in, nothing comes out at any scale: epsilon's own, as for a very small input.
        epsilons = (silent.norm() / (gain * small).norm()).nan_to_num()
        scale = torch.where(square > 0, (unscaled * scaled).sum(-1, keepdim=True) / square, epsilons)
        if not bool(((unscaled * scale - scaled).abs() <= 1e-3 * gain.abs().max()).all()):
            raise FreezeError(
                f"{name}, a {type(norm).__name__}, is not gain * centre(x) / denominator + bias, the only form of norm "
                "that can be frozen; or its input is not finite"
            )
        return cls(gain, bias, scale, centred, x, y)

    def linear(self, x: Tensor) -> Tensor:
        """Return ``gain * centre(x) * scale``, (..., position, d)."""
        return self.gain * (_centre(x) if self.centred else x) * self.scale

    def affine(self, x: Tensor) -> Tensor:
        """Return ``gain * centre(x) * scale + bias``, (batch, position, d), in the input's dtype."""
        return (self.linear(x.to(self.gain.dtype)) + self.bias).to(x.dtype)

    def at(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return ``gain * centre(x) * scale`` of vectors that lie at some positions of the only row.

        Args:
            x: (n, ..., d).
            positions: (n,).
        """
        scale = self.scale[0, positions].view(-1, *[1] * (x.ndim - 1))
        return self.gain * (_centre(x) if self.centred else x) * scale

    def transposed(self, g: Tensor, scale: Tensor) -> Tensor:
        """Return the gradient at the input for one at the output, (..., d).

        Args:
            g: (..., d).
            scale: The scales of its positions, to be broadcast, (..., 1).
        """
        g = self.gain * g
        return (_centre(g) if self.centred else g) * scale

    def to(self, dtype: torch.dtype, device: torch.device) -> FrozenNorm:
        """Return the linear map in another dtype, or on another device."""
        moved = {name: getattr(self, name).to(device, dtype) for name in ("gain", "bias", "scale")}
        return replace(self, **moved)

    def normalised(self, x: Tensor) -> Tensor:
        """Return ``centre(x) * scale``, which comes before gain and bias, (batch, position, d), in its dtype."""
        wide = x.to(self.gain.dtype)
        return ((_centre(wide) if self.centred else wide) * self.scale).to(x.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the output at an input of the recorded positions, (batch, position, d), in its dtype.

        Args:
            x: One row a recorded row, or any number for a recording of one.
        """
        # From the recorded output, not from zero: what was recorded comes back to the last bit.
        wide = self.gain.dtype
        return (self.y + self.linear(x.to(wide) - self.x.to(wide))).to(x.dtype)


def _answers(norm: nn.Module, x: Tensor) -> Tensor:
    """Return what a norm makes of vectors, (n, d), in their dtype."""
    state = norm.state_dict(keep_vars=True)
    if all(value.dtype == x.dtype for value in state.values()):
        return norm.forward(x)
    return functional_call(_Bare(norm), {f"norm.{key}": value.to(x.dtype) for key, value in state.items()}, x)


class _Bare(nn.Module):
    """A norm without anyone's hooks, which are not to be asked."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm.forward(x)


def _centre(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)
