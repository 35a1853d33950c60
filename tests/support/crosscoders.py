"""Tiny random crosscoders for the tiny models, with weights large enough that what they do is visible."""

from __future__ import annotations

from typing import Any

import torch

from clt_plugin import Crosscoder, Host, Wiring
from support.models import D_MODEL, N_LAYERS

N_LATENTS = 24


def make_clt(
    wiring: Wiring | None = None,
    *,
    read: str = "mlp_in",
    write: str = "mlp_out",
    activation: str = "relu",
    seed: int = 0,
    scale: float = 3.0,
    n_latents: int = N_LATENTS,
    dtype: torch.dtype = torch.float32,
    exclude_first: int = 0,
    **settings: Any,
) -> Crosscoder:
    """Make a crosscoder; by default a CLT over all layers, fixed by its seed."""
    wiring = wiring or Wiring.clt(N_LAYERS, read=read, write=write)
    host = Host(exclude_first=exclude_first)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clt = Crosscoder(wiring, D_MODEL, n_latents, activation, host=host, **settings)
        for name, parameter in clt.named_parameters():
            if not name.startswith("threshold"):
                # Biases are 0 at first, which hides what goes wrong with them.
                parameter.data.mul_(scale).add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.data.uniform_(0.1, 0.6)
    return clt.to(dtype).eval().requires_grad_(False)
