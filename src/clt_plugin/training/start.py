"""How a crosscoder begins: firing rates, decoders tied to encoders, latents that begin as tokens, a trained PLT.

`Crosscoder` draws its weights itself: encoders from U(+-1/sqrt(n_latents)), decoders from U(+-1/sqrt(n_layers d)),
thresholds 0.03 (Ameisen et al. 2025, "Circuit Tracing"). The functions here change a crosscoder in place, in the units
in which it will be trained. They compose: the firing rate is set last, since it depends on encoders and thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clt_plugin.core import Crosscoder, Site, WiringError
from clt_plugin.training._groups import by_site, pre_activations, read


@torch.no_grad()
def set_threshold(crosscoder: Crosscoder, threshold: float) -> None:
    """Set every threshold of a JumpReLU crosscoder, in units of pre-activations."""
    if not crosscoder.activation.has_threshold or crosscoder.threshold is None:
        raise WiringError(f"{crosscoder.activation} has no thresholds to set: only 'jumprelu' does")
    for parameter in crosscoder.threshold:
        parameter.fill_(threshold)


@torch.no_grad()
def set_firing_rate(crosscoder: Crosscoder, x: Tensor | Mapping[Site, Tensor], rate: float) -> None:
    """Set b_enc such that every latent's pre-activation passes its threshold on a chosen share of a sample.

    Exactly ``round(rate * tokens)`` tokens pass it, where pre-activations are distinct: the threshold comes to lie
    midway between those of the last token that passes and the next one. Without thresholds it is 0: latents that
    compete are active less often.

    Args:
        crosscoder: What to change.
        x: The sample, stacked (n_read_sites, ..., d) or {site: (..., d_site)}; some thousands of tokens.
        rate: The share of tokens, above 0 and below 1.
    """
    for g, h in enumerate(pre_activations(crosscoder, x)):
        n = round(rate * len(h))
        if not 0 < n < len(h):
            raise ValueError(
                f"a firing rate of {rate} on {len(h)} tokens is {n} tokens: it must be at least one and not all of "
                "them, so give more tokens or another rate"
            )
        last, following = h.topk(n + 1, dim=0).values[-2:]
        threshold = crosscoder.threshold[g] if crosscoder.threshold and crosscoder.activation.has_threshold else 0
        crosscoder.b_enc[g].add_(threshold - (last + following) / 2)


@torch.no_grad()
def tie_decoders(crosscoder: Crosscoder) -> None:
    """Point every decoder vector where its latent reads; its length stays what it was.

    To a site that the group reads too, a latent writes along what it reads there; to others, along what it reads at the
    last site before. That gives an autoencoder's decoder the encoder's transpose (Gao et al. 2024), and a transcoder's
    its encoder vector at every layer, which its MLPs' outputs need not resemble.
    """
    for g, writes in enumerate(crosscoder.layout.write_slices):
        rows, encoder = crosscoder.layout.read_slices[g], crosscoder.W_enc[g]
        for site, columns in writes.items():
            source = _source(tuple(rows), site)
            vectors = encoder[rows[source]].T
            part = crosscoder.W_dec[g][:, columns]
            if vectors.shape != part.shape:
                raise WiringError(
                    f"{site} has width {part.shape[1]} and {source}, which the group reads, {vectors.shape[1]}: "
                    "decoders can be tied to encoders only where widths agree"
                )
            part.copy_(torch.nn.functional.normalize(vectors, dim=1) * part.norm(dim=1, keepdim=True))


def _source(reads: tuple[Site, ...], write: Site) -> Site:
    """Return which of the sites read a written site's decoder is tied to."""
    same_model = [site for site in reads if site.model == write.model] or list(reads)
    before = [site for site in same_model if site.order <= write.order]
    return max(before, key=lambda site: site.order) if before else same_model[0]


@torch.no_grad()
def start_at_tokens(
    crosscoder: Crosscoder,
    x: Tensor | Mapping[Site, Tensor],
    y: Tensor | Mapping[Site, Tensor],
    encoder_norm: float = 1.0,
    decoder_norm: float = 0.6,
    generator: torch.Generator | None = None,
) -> None:
    """Let every latent begin as a token: it reads along that token's input and writes along its outputs.

    All latents are then about something that occurs, and few die: the demo's crosscoders were trained from such a
    start. Each group draws its own tokens, none twice.

    Args:
        crosscoder: What to change: encoders and decoders.
        x: What is read, stacked (n_read_sites, ..., d) or {site: (..., d_site)}, about 0 on average (standardised).
        y: What is to be written on the same tokens, likewise.
        encoder_norm: The norm of every latent's encoder vectors as one.
        decoder_norm: The norm of every latent's decoder vectors as one.
        generator: For the draw.
    """
    inputs = by_site(x, crosscoder.wiring.read_sites)
    outputs = by_site(y, crosscoder.wiring.write_sites)
    n_tokens = len(next(iter(inputs.values())))
    if any(len(value) != n_tokens for value in (*inputs.values(), *outputs.values())):
        raise WiringError("x and y must hold the same tokens")
    needed = max(crosscoder.group_sizes)
    if n_tokens < needed:
        raise ValueError(f"{needed} latents of a group begin at as many tokens, but there are {n_tokens}: give more")
    for g, n in enumerate(crosscoder.group_sizes):
        device = "cpu" if generator is None else generator.device
        drawn = torch.randperm(n_tokens, generator=generator, device=device)[:n].to(crosscoder.device)
        reads = read(crosscoder, g, inputs)[drawn]
        writes = torch.cat([outputs[site][drawn] for site in crosscoder.wiring.writes[g]], dim=1)
        crosscoder.W_enc[g].copy_(torch.nn.functional.normalize(reads, dim=1).T * encoder_norm)
        crosscoder.W_dec[g].copy_(torch.nn.functional.normalize(writes, dim=1) * decoder_norm)


@torch.no_grad()
def start_from(crosscoder: Crosscoder, trained: Crosscoder) -> None:
    """Let a crosscoder begin as a trained one of narrower wiring: a CLT as per-layer transcoders (Gemma Scope 2).

    Groups are paired in order: each must read what its partner reads and write at least what its partner writes. What
    is written besides starts at 0, where it has gradients, so that at first both give the same reconstruction.

    Args:
        crosscoder: What to change: all its weights.
        trained: Where from; a PLT's groups for a CLT's. To train on in standard units, `unfold` it first.
    """
    wiring, other = crosscoder.wiring, trained.wiring
    problem = _why_not_from(crosscoder, trained)
    if problem:
        raise WiringError(f"this crosscoder cannot begin as that one: {problem}")
    for g in range(wiring.n_groups):
        crosscoder.W_enc[g].copy_(trained.encoder_vectors(g).T)
        crosscoder.b_enc[g].copy_(trained.b_enc[g])
        if crosscoder.threshold is not None and trained.threshold is not None:
            crosscoder.threshold[g].copy_(trained.threshold[g])
        decoder, theirs = crosscoder.W_dec[g].zero_(), trained.decoder_vectors(g)
        for site, columns in trained.layout.write_slices[g].items():
            decoder[:, crosscoder.layout.write_slices[g][site]] = theirs[:, columns].to(decoder)
    for site, bias in zip(wiring.write_sites, crosscoder.b_dec, strict=True):
        bias.copy_(trained.bias(site)) if site in other.write_sites else bias.zero_()
    for n, pair in enumerate(wiring.skips):
        skip = crosscoder.W_skip[n].zero_()
        if pair in other.skips:
            skip.copy_(trained.store.get("W_skip", other.skips.index(pair)))


def _why_not_from(crosscoder: Crosscoder, trained: Crosscoder) -> str | None:
    wiring, other = crosscoder.wiring, trained.wiring
    if crosscoder.group_sizes != trained.group_sizes:
        return f"its groups have {list(crosscoder.group_sizes)} latents, the other's {list(trained.group_sizes)}"
    if crosscoder.activation.name != trained.activation.name:
        return f"its activation is {crosscoder.activation}, the other's {trained.activation}"
    if trained.stored_norms is not None:
        return "the other ranks latents by stored norms, which would not follow its decoders: unfold() it first"
    for g in range(wiring.n_groups):
        lacking = [site for site in other.writes[g] if site not in wiring.writes[g]]
        if wiring.reads[g] != other.reads[g] or lacking:
            return f"group {g} must read what the other's reads, and write what it writes"
    widths = crosscoder.layout.width
    differing = [str(site) for site, width in trained.layout.width.items() if widths[site] != width]
    if differing:
        return f"the widths of {', '.join(differing)} differ"
    lost = [pair for pair in other.skips if pair not in wiring.skips]
    return f"the other has affine skips that it lacks: {lost[0][0]} -> {lost[0][1]}" if lost else None
