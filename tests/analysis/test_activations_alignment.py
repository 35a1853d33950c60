"""Alignment studies against sums over single tokens, with planted alignment found and absent on the null."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from clt_plugin import Crosscoder, Host, Wiring
from clt_plugin.analysis import activations
from clt_plugin.analysis.activations._gradients import loss_gradients
from clt_plugin.core.wiring import Site
from clt_plugin.training.data import Tokens, harvest
from support.crosscoders import make_clt
from support.models import D_MODEL, N_LAYERS, make_model, make_tokenizer, nnsight_model

TEXTS = ["w5 w9 w12 w7 w3 w22", "w14 w2", "w8 w8 w31 w40 w2", "w33 w6 w6 w29 w11 w50 w44 w13"]
F64 = torch.float64
SETTINGS = {"tokenizer": make_tokenizer(), "length": 16, "batch_size": 3, "n_bootstrap": 50}


def _sites(name):
    return [Site("model", name, layer) for layer in range(N_LAYERS)]


def _values(hf, sites):
    """{site: (tokens, d)} of all tokens that count."""
    chunks = harvest(hf, TEXTS, sites, tokenizer=make_tokenizer(), length=16, pack=False, dtype=F64)
    parts = [chunk.activations.by_site() for chunk in chunks]
    return {site: torch.cat([part[site] for part in parts]) for site in sites}


def _means(clt, acts, direction):
    """Mean cosines by (source, target) of the written and of the own layer's vector, token by token."""
    found = {}
    for source in range(N_LAYERS):
        decoder = clt.decoder_view(source)
        for target in range(source, N_LAYERS):
            written, local = [], []
            for token, latent in acts[source].nonzero().tolist():
                to = direction(source, target)[token]
                written.append(F.cosine_similarity(decoder[latent, target - source], to, dim=0))
                local.append(F.cosine_similarity(decoder[latent, 0], to, dim=0))
            found[source, target] = (len(written), float(sum(written)) / len(written), float(sum(local)) / len(local))
    return found


def test_residual_alignment_equals_the_sum_over_single_tokens():
    hf, clt = make_model("llama", F64), make_clt(dtype=F64, exclude_first=1)
    pre, post = _values(hf, _sites("resid_pre")), _values(hf, _sites("resid_post"))
    reads = _values(hf, _sites("mlp_in"))
    acts = clt.encode(torch.stack([reads[site] for site in _sites("mlp_in")]))
    expected = _means(
        clt, acts, lambda source, target: post[_sites("resid_post")[target]] - pre[_sites("resid_pre")[source]]
    )
    found = activations.residual_alignment(clt, hf, TEXTS, **SETTINGS)
    assert len(found.table) == len(expected) == 6
    for row in found.table.itertuples():
        tokens, written, local = expected[row.source, row.target]
        assert row.tokens == tokens
        assert row.mean == pytest.approx(written, rel=1e-9)
        assert row.local == pytest.approx(local, rel=1e-9)
        assert row.low <= row.mean <= row.high
    assert set(found.strongest["target"] - found.strongest["source"]) <= {1, 2}
    assert found.strongest["tokens"].min() >= found.least
    assert found.plot() is not None


def _always_on(decoders):
    """A CLT whose latents are all active everywhere, with decoder vectors {(source, target): (F, d)}."""
    n_latents = len(next(iter(decoders.values())))
    clt = Crosscoder(Wiring.clt(N_LAYERS), D_MODEL, n_latents, "relu", host=Host(exclude_first=1), dtype=F64)
    clt.requires_grad_(False)
    for (source, target), vectors in decoders.items():
        clt.W_enc[source].zero_()
        clt.b_enc[source].fill_(1.0)
        clt.decoder_view(source)[:, target - source] = vectors
    return clt


def test_planted_alignment_is_found_in_its_place_and_nowhere_else():
    """One latent in 25 of layer 0 writes, at layer 2, what the residual stream gains on average; all else is noise."""
    hf = make_model("gpt2", F64)
    gained = (
        _values(hf, _sites("resid_post"))[_sites("resid_post")[2]]
        - _values(hf, _sites("resid_pre"))[_sites("resid_pre")[0]]
    )
    decoders = {
        (source, target): torch.randn(100, D_MODEL, dtype=F64)
        for source in range(N_LAYERS)
        for target in range(source, N_LAYERS)
    }
    decoders[0, 2][:4] = gained.mean(0)
    found = activations.residual_alignment(_always_on(decoders), hf, TEXTS, **SETTINGS)
    assert set(found.strongest["feature"].head(4)) == {0, 1, 2, 3}
    assert set(zip(found.strongest["source"].head(4), found.strongest["target"].head(4), strict=True)) == {(0, 2)}
    best = float(F.cosine_similarity(gained, gained.mean(0), dim=-1).mean())
    assert found.strongest["mean"].head(4).tolist() == pytest.approx([best] * 4, rel=1e-9)
    rest = found.table[(found.table["source"] != 0) | (found.table["target"] != 2)]
    # Isotropic vectors: the mean of 100 cosines, each of spread 1 / sqrt(d), averaged over similar tokens.
    assert rest["mean"].abs().max() < 4 / math.sqrt(100 * D_MODEL)
    # Every latent is active, so that another's vector is drawn from the very same vectors.
    assert rest["above_null_p99"].max() < 0.02


def test_gradients_say_what_the_loss_does_when_something_is_added():
    hf, clt = make_model("gpt2", F64), make_clt(dtype=F64)
    (rows,) = Tokens(TEXTS, make_tokenizer(), length=16, pack=False).batches(8)
    sites = (*clt.wiring.write_sites, Site("model", "resid_post", 0))
    gradients = loss_gradients(hf, rows, sites)

    def loss(site, step):
        def add(module, args, output):
            moved = (output[0] if isinstance(output, tuple) else output).clone()
            moved[rows.counted] += step
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        block = hf.transformer.h[site.layer]
        handle = (block.mlp if site.name == "mlp_out" else block).register_forward_hook(add)
        logits = hf(input_ids=rows.ids, attention_mask=torch.ones_like(rows.ids)).logits
        handle.remove()
        where = rows.counted[:, :-1] & rows.counted[:, 1:]
        return F.cross_entropy(logits[:, :-1][where], rows.ids[:, 1:][where], reduction="sum")

    for site in sites:
        step = torch.randn_like(gradients[site])
        with torch.no_grad():
            change = (loss(site, 1e-5 * step) - loss(site, -1e-5 * step)) / 2e-5
        assert float((gradients[site] * step).sum()) == pytest.approx(float(change), rel=1e-6)
    assert all(parameter.grad is None for parameter in hf.parameters())


def test_gradient_alignment_equals_the_sum_over_single_tokens_and_finds_what_is_planted():
    hf, clt = make_model("gpt2", F64), make_clt(dtype=F64, exclude_first=1)
    (rows,) = Tokens(TEXTS, make_tokenizer(), length=16, pack=False).batches(8)
    wanted = {site: -g for site, g in loss_gradients(hf, rows, clt.wiring.write_sites).items()}
    decoders = {
        (source, target): torch.randn(50, D_MODEL, dtype=F64)
        for source in range(N_LAYERS)
        for target in range(source, N_LAYERS)
    }
    site = clt.wiring.write_sites[2]
    decoders[1, 2][7] = F.normalize(wanted[site], dim=-1).mean(0)
    found = activations.gradient_alignment(_always_on(decoders), hf, TEXTS, **SETTINGS)
    best = found.strongest.iloc[0]
    assert (best["source"], best["target"], best["feature"]) == (1, 2, 7)
    # The last token of a text predicts nothing: there is no direction, and no cosine.
    assert int(found.table["tokens"].iloc[0]) == 50 * (int(rows.counted.sum()) - len(TEXTS))

    reads = _values(hf, _sites("mlp_in"))
    acts = clt.encode(torch.stack([reads[site] for site in _sites("mlp_in")]))
    there = wanted[site].abs().sum(-1) > 0
    expected = _means(
        clt, [act * there[:, None] for act in acts], lambda s, target: wanted[clt.wiring.write_sites[target]]
    )
    measured = activations.gradient_alignment(clt, hf, TEXTS, **SETTINGS)
    for row in measured.table.itertuples():
        assert (row.tokens, row.mean, row.local) == pytest.approx(expected[row.source, row.target], rel=1e-6)


def test_libraries_agree():
    clt = make_clt(exclude_first=1)
    plain = activations.gradient_alignment(clt, make_model("llama"), TEXTS, **SETTINGS)
    wrapped = activations.gradient_alignment(clt, nnsight_model("llama"), TEXTS, **SETTINGS)
    assert wrapped.table["mean"].tolist() == pytest.approx(plain.table["mean"].tolist(), abs=1e-5)
