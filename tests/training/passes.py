"""Forward passes of the oracle's crosscoders: dense, and the same as active entries alone."""

from __future__ import annotations

import torch

from clt_plugin.core.activations import jumprelu
from clt_plugin.training._groups import read
from clt_plugin.training.forward import ForwardPass, GroupActivity, about_group
from core.oracle import build, inputs

N_TOKENS = 7


def targets(crosscoder):
    return {
        site: torch.randn(N_TOKENS, crosscoder.layout.width[site]).double() for site in crosscoder.wiring.write_sites
    }


def dense(wiring="clt", activation="jumprelu"):
    """A dense forward pass over random inputs."""
    crosscoder = build(wiring, activation)
    return ForwardPass.of(crosscoder, inputs(crosscoder, (N_TOKENS,)), targets(crosscoder))


def sparse(run: ForwardPass) -> ForwardPass:
    """The same pass, of which only entries are kept that are active or within the bandwidth."""
    crosscoder, groups = run.crosscoder, []
    for g in range(len(run.groups)):
        x = read(crosscoder, g, run.inputs)
        h, theta = crosscoder.pre_activations(g, x), crosscoder.threshold[g]
        bandwidth = crosscoder.activation.bandwidth
        tokens, latents = (h > theta - bandwidth / 2).nonzero(as_tuple=True)
        near = h[tokens, latents]
        acts = jumprelu(near, theta[latents], bandwidth)
        about = about_group(crosscoder, g, x)
        groups.append(GroupActivity(acts, near, len(x), tokens=tokens, latents=latents, **about))
    return ForwardPass(crosscoder, tuple(groups), run.inputs, run.targets, run.outputs, dead=run.dead)


def gradients(value, crosscoder):
    """Every parameter's gradient by name, 0 where there is none."""
    names, parameters = zip(*crosscoder.named_parameters(), strict=True)
    found = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}
