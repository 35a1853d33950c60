"""A dense float64 brute force for crosscoders, and the cases it is compared on.

Written from the documented formulas and shapes alone: plain loops over groups, sites and tokens, one latent's score
at a time, and offsets counted here. It takes from a crosscoder its parameters, its wiring's table and nothing else.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clt_plugin.core import Crosscoder, Site, Wiring

ATTENTION = [("attn_out", layer) for layer in range(3)]

# name: (wiring, widths, latents)
WIRINGS = {
    "sae": (Wiring.sae(1), 4, 6),
    "plt": (Wiring.plt(3), 4, 6),
    "clt": (Wiring.clt(3), 4, 6),
    "local_clt": (Wiring.local_clt(4, span=2), 3, 5),
    "acausal": (Wiring.acausal(range(3)), 3, 6),
    "weakly_causal": (Wiring.weakly_causal(range(3)), 3, 5),
    "strictly_causal": (Wiring.strictly_causal(4), 3, 5),
    "pre_post_mlp": (Wiring.pre_post_mlp(2), 4, 6),
    "pre_post_mlp_both": (Wiring.pre_post_mlp(2, reads="both"), 4, 6),
    "model_diff": (Wiring.model_diff(["base", "chat"], layer=1), 4, 6),
    "model_diff_ragged": (Wiring.model_diff(["base", "chat"], layer=1), {"base": 3, "chat": 5}, 6),
    "sum": (Wiring.strictly_causal(3) + Wiring.weakly_causal(ATTENTION), 3, 4),
    "ragged_latents": (Wiring.clt(3), 4, (5, 7, 6)),
    "skips": (Wiring.clt(3).with_skips(), 4, 6),
    "ragged_skips": (
        Wiring.model_diff(["base", "chat"], 1).with_skips(
            [(Site("base", "resid_post", 1), Site("chat", "resid_post", 1))]
        ),
        {"base": 3, "chat": 5},
        6,
    ),
}

# name: (activation, settings)
ACTIVATIONS = {
    "relu": ("relu", {}),
    "jumprelu": ("jumprelu", {"bandwidth": 0.9}),
    "topk-unrectified": ("topk", {"k": 4, "rectify": False}),
    **{
        f"{kind}-{scope}-{score}": (kind, {"k": 2, "scope": scope, "score": score})
        for kind in ("topk", "batchtopk")
        for scope in ("group", "joint")
        for score in ("activation", "decoder_norm")
    },
}


def build(wiring: str, activation: str = "relu", **made) -> Crosscoder:
    """Make a crosscoder of a case with every parameter, biases and skips included, away from zero."""
    table, widths, n_latents = WIRINGS[wiring]
    name, settings = ACTIVATIONS[activation]
    crosscoder = Crosscoder(table, widths, n_latents, name, **settings, **{"dtype": torch.float64, **made})
    with torch.no_grad():
        for name, parameter in crosscoder.named_parameters():
            positive = name.startswith("threshold")
            parameter.copy_(0.2 + 0.3 * torch.rand_like(parameter) if positive else 0.7 * torch.randn_like(parameter))
    return crosscoder


def inputs(crosscoder: Crosscoder, shape: tuple[int, ...] = (5,), grad: bool = False) -> dict[Site, Tensor]:
    """Make random inputs for every site read."""
    return {
        site: torch.randn(*shape, crosscoder.layout.width[site], dtype=torch.float64, requires_grad=grad)
        for site in crosscoder.wiring.read_sites
    }


def copies(crosscoder: Crosscoder) -> dict[str, Tensor]:
    """Copy the parameters to float64 leaves, by name."""
    return {name: p.detach().double().clone().requires_grad_() for name, p in crosscoder.named_parameters()}


# ---------------------------------------------------------------- the brute force


def brute_pre_activations(cc: Crosscoder, p: dict[str, Tensor], x: dict[Site, Tensor]) -> list[list[Tensor]]:
    """Return [group][token] of (F_g,) for x of {site: (T, d)}."""
    n_tokens = len(next(iter(x.values())))
    groups = []
    for g, reads in enumerate(cc.wiring.reads):
        rows = []
        for t in range(n_tokens):
            h, offset = p[f"b_enc.{g}"], 0
            for site in reads:
                for i in range(x[site].shape[-1]):
                    h = h + x[site][t, i] * p[f"W_enc.{g}"][offset + i]
                offset += x[site].shape[-1]
            assert offset == len(p[f"W_enc.{g}"])
            rows.append(h)
        groups.append(rows)
    return groups


def brute_norms(cc: Crosscoder, p: dict[str, Tensor], group: int, kind: str) -> Tensor:
    """Return decoder norms by the definition, summing squares one entry at a time."""
    weight, rows = p[f"W_dec.{group}"].detach(), []
    for vector in weight:
        per_write, offset = [], 0
        for site in cc.wiring.writes[group]:
            width = cc.layout.width[site]
            per_write.append(sum(float(v) ** 2 for v in vector[offset : offset + width]) ** 0.5)
            offset += width
        if kind == "concatenated":
            rows.append(sum(n**2 for n in per_write) ** 0.5)
        else:
            rows.append(per_write if kind == "per_write" else sum(per_write))
    return torch.tensor(rows, dtype=torch.float64)


def _best(scores: dict[tuple, float], n: int, floor: float) -> set[tuple]:
    return {key for key in sorted(scores, key=scores.__getitem__, reverse=True)[:n] if scores[key] > floor}


def _floor(cc: Crosscoder) -> float:
    """Below which no pre-activation is kept."""
    return 0.0 if getattr(cc.activation, "rectify", True) else -math.inf


def all_scores(cc: Crosscoder, p: dict[str, Tensor], hs: list[list[Tensor]]) -> dict[tuple[int, int, int], float]:
    """Return the score of each (group, token, latent): relu(h), times the decoder norm where it ranks by that.

    Of a TopK that does not rectify the score is h.
    """
    ranked = getattr(cc.activation, "score", "activation") == "decoder_norm"
    scores = {}
    for g, rows in enumerate(hs):
        norms = brute_norms(cc, p, g, "concatenated") if ranked else None
        for t, h in enumerate(rows):
            for i, value in enumerate(h.detach().tolist()):
                scores[g, t, i] = max(value, _floor(cc)) * (float(norms[i]) if ranked else 1.0)
    return scores


def selected(
    cc: Crosscoder, p: dict[str, Tensor], hs: list[list[Tensor]], cut: list[float] | None = None
) -> set[tuple[int, int, int]]:
    """Return which (group, token, latent) are active.

    Args:
        cc: The crosscoder.
        p: Its parameters' copies.
        hs: Pre-activations, [group][token].
        cut: For BatchTopK outside training: the smallest score that is active, for each group.
    """
    activation, n_groups, n_tokens = cc.activation, len(hs), len(hs[0])
    scores = all_scores(cc, p, hs)
    if activation.name == "relu":
        return {key for key, score in scores.items() if score > 0}
    if activation.name == "jumprelu":
        thetas = [p[f"threshold.{g}"].tolist() for g in range(n_groups)]
        return {(g, t, i) for g, t, i in scores if hs[g][t][i].item() > thetas[g][i]}
    if cut is not None:
        return {key for key, score in scores.items() if score > 0 and score >= cut[key[0]]}
    # Who competes with whom: latents of one token or of the batch, of one group or of all.
    pools: dict[tuple, dict] = {}
    for (g, t, i), score in scores.items():
        pool = (None if activation.joint else g, t if activation.name == "topk" else None)
        pools.setdefault(pool, {})[g, t, i] = score
    places = activation.k * (n_groups if activation.joint else 1) * (n_tokens if activation.name == "batchtopk" else 1)
    return set().union(*(_best(pool, places, _floor(cc)) for pool in pools.values()))


def brute_cut(cc: Crosscoder, p: dict[str, Tensor], x: dict[Site, Tensor]) -> list[float]:
    """Return the smallest score that BatchTopK selects over x, for each group."""
    hs = brute_pre_activations(cc, p, x)
    scores = all_scores(cc, p, hs)
    chosen = selected(cc, p, hs)
    return [min(scores[key] for key in chosen if cc.activation.joint or key[0] == g) for g in range(len(hs))]


def brute_encode(
    cc: Crosscoder, p: dict[str, Tensor], x: dict[Site, Tensor], cut: list[float] | None = None
) -> list[list[Tensor]]:
    """Return features, [group][token] of (F_g,), whose autograd gradient is the documented one."""
    hs = brute_pre_activations(cc, p, x)
    chosen = selected(cc, p, hs, cut)
    features = []
    for g, rows in enumerate(hs):
        acts = []
        for t, h in enumerate(rows):
            mask = torch.tensor([float((g, t, i) in chosen) for i in range(len(h))], dtype=torch.float64)
            act = h * mask
            if cc.activation.name == "jumprelu":
                # Adds nothing to the value, and the straight-through estimate to the threshold's gradient.
                theta, eps = p[f"threshold.{g}"], cc.activation.bandwidth
                inside = ((h - theta).abs() < eps / 2).double()
                act = act + (-(theta / eps) * inside).detach() * (theta - theta.detach())
            acts.append(act)
        features.append(acts)
    return features


def brute_decode(
    cc: Crosscoder, p: dict[str, Tensor], features: list[list[Tensor]], x: dict[Site, Tensor]
) -> dict[Site, Tensor]:
    """Return {site: (T, d)} for features of [group][token]."""
    result = {}
    for w, site in enumerate(cc.wiring.write_sites):
        width, rows = cc.layout.width[site], []
        for t in range(len(features[0])):
            y = p[f"b_dec.{w}"]
            for g, writes in enumerate(cc.wiring.writes):
                offset = 0
                for written in writes:
                    if written == site:
                        for i, value in enumerate(features[g][t]):
                            y = y + value * p[f"W_dec.{g}"][i, offset : offset + width]
                    offset += cc.layout.width[written]
            for n, (read, write) in enumerate(cc.wiring.skips):
                if write == site:
                    for i in range(cc.layout.width[read]):
                        y = y + x[read][t, i] * p[f"W_skip.{n}"][i]
            rows.append(y)
        result[site] = torch.stack(rows) if rows else torch.zeros(0, width, dtype=torch.float64)
    return result


def flat(x: dict[Site, Tensor]) -> dict[Site, Tensor]:
    """Flatten leading axes to tokens."""
    return {site: value.reshape(-1, value.shape[-1]) for site, value in x.items()}


def rows(features: list[list[Tensor]]) -> list[Tensor]:
    """Stack [group][token] to one (T, F_g) a group."""
    return [torch.stack(acts) for acts in features]


def random_features(cc: Crosscoder, shape: tuple[int, ...], density: float = 0.3) -> list[Tensor]:
    """Make sparse random features, one (..., F_g) a group."""
    made = (torch.randn(*shape, n, dtype=torch.float64) for n in cc.group_sizes)
    return [acts * (torch.rand_like(acts) < density) for acts in made]
