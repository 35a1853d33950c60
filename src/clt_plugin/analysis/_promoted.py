"""Which tokens each latent promotes and suppresses by what it writes, directly: its decoder through the unembedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from clt_plugin.adapters._norms import FrozenNorm
from clt_plugin.adapters.huggingface import HostModel, plain_model
from clt_plugin.core import AttachError, Crosscoder, Site

ADDED = ("attn_out", "mlp_out", "mlp_out_before_norm")
"""Sites whose writes add up in the residual stream."""

STREAM = ("resid_pre", "resid_mid", "resid_post")
"""Sites that are the residual stream itself, of which the last one written counts."""

_BLOCK = 2**25
"""So many logits at a time."""


class Promotion:
    """Finds the tokens that latents promote and suppress most.

    The direct effect on the logits of a latent at unit activation: what it adds to the residual stream over all layers,
    through the final norm's gain (and centring) and the unembedding, less the mean over the vocabulary. The norm's
    denominator, which is one positive number a token, is left out, and so is whatever later layers do about it.

    Args:
        model: The model that a latent's writes are read by.
    """

    def __init__(self, model: Any) -> None:
        with plain_model(model) as hf:
            host = HostModel.of(hf)
            head: Any = hf.get_output_embeddings()  # type: ignore[operator]
            norm = hf.get_submodule(host.final_norm)
            self.weight: Tensor | None = None
            if head is not None:
                self.weight = head.weight.detach()
                self._through = _linear(norm, host.d_model, self.weight)

    def logits(self, vectors: Tensor) -> Tensor:
        """Return the logits that vectors in the residual stream add up to, (n, d) to (n, vocabulary), in float32.

        Raises:
            AttachError: The model has no unembedding.
        """
        if self.weight is None:
            raise AttachError("this model has no unembedding, so that nothing promotes tokens: load it with its head")
        through = self._through(vectors.to(self.weight.device, torch.float32)).to(self.weight.dtype)
        logits = (through @ self.weight.T).float()
        return logits - logits.mean(1, keepdim=True)

    def top(self, crosscoder: Crosscoder, group: int, model: str, n: int) -> tuple[Tensor, ...] | None:
        """Return ids and logits of the n tokens promoted, then of the n suppressed most, (F, n) each.

        None where the group adds nothing to the residual stream, or there is no unembedding.

        Args:
            crosscoder: Whose.
            group: Which group.
            model: The model whose sites count.
            n: How many tokens.
        """
        columns = added(crosscoder, group, model)
        if self.weight is None or not columns:
            return None
        size, n = max(1, _BLOCK // len(self.weight)), min(n, len(self.weight))
        parts = []
        for start in range(0, crosscoder.group_sizes[group], size):
            rows = torch.arange(start, min(start + size, crosscoder.group_sizes[group]), device=crosscoder.device)
            vectors = crosscoder.decoder_vectors(group, rows).detach()
            logits = self.logits(torch.stack([vectors[:, part] for part in columns]).sum(0))
            (high, highest), (low, lowest) = logits.topk(n, dim=1), (-logits).topk(n, dim=1)
            parts.append((highest.int().cpu(), high.cpu(), lowest.int().cpu(), -low.cpu()))
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _linear(norm: nn.Module, d_model: int, like: Any) -> Callable[[Tensor], Tensor]:
    """Return a norm's map but for its denominator: gain * centre(x)."""
    x = torch.linspace(-1, 1, d_model, device=like.device)[None, None]
    state = next(iter(norm.parameters()), like)
    with torch.no_grad():
        probe = x.to(state.dtype)
        frozen = FrozenNorm.of(norm, probe, norm.forward(probe), "the final norm")
    gain, centred = frozen.gain.float(), frozen.centred
    return lambda vectors: gain * (vectors - vectors.mean(-1, keepdim=True) if centred else vectors)


def added(crosscoder: Crosscoder, group: int, model: str) -> list[slice]:
    """Return which columns of a group's decoder sum to what a latent adds to the residual stream."""
    slices = crosscoder.layout.write_slices[group]
    here: list[Site] = [site for site in crosscoder.wiring.writes[group] if site.model == model]
    added = [site for site in here if site.name in ADDED]
    if added:
        return [slices[site] for site in added]
    stream = [site for site in here if site.name in STREAM]
    return [slices[max(stream, key=lambda site: site.order)]] if stream else []
