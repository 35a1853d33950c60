"""How a crosscoder begins: exact firing rates, tied decoders, tokens, a trained PLT."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from clt_plugin.core import Crosscoder, Site, Wiring, WiringError
from clt_plugin.training.start import set_firing_rate, set_threshold, start_at_tokens, start_from, tie_decoders
from core.oracle import build, inputs


@pytest.mark.parametrize("activation", ["jumprelu", "relu", "topk-group-activation"])
@pytest.mark.parametrize(("rate", "expected"), [(0.05, 15), (0.5, 150), (0.0034, 1)])
def test_every_latent_fires_on_exactly_the_share_asked_for(activation, rate, expected):
    crosscoder = build("ragged_latents", activation)
    x = inputs(crosscoder, (3, 100))
    set_firing_rate(crosscoder, x, rate)
    for g, (site,) in enumerate(crosscoder.wiring.reads):
        theta = crosscoder.threshold[g] if activation == "jumprelu" else 0
        h = crosscoder.pre_activations(g, x[site].reshape(-1, 4))
        assert (h > theta).sum(0).tolist() == [expected] * crosscoder.group_sizes[g]
        # The threshold lies midway between the last token that passes and the next.
        margin = (h - theta).abs().topk(2, dim=0, largest=False).values
        assert_close(margin[0], margin[1])


def test_a_firing_rate_that_cannot_be():
    crosscoder = build("clt", "relu")
    for rate in (0.001, 1.0):
        with pytest.raises(ValueError, match="give more tokens or another rate"):
            set_firing_rate(crosscoder, inputs(crosscoder, (100,)), rate)
    with pytest.raises(WiringError, match="3 sites, not 2"):
        set_firing_rate(crosscoder, torch.randn(2, 50, 4).double(), 0.1)


def test_thresholds():
    crosscoder = build("clt", "jumprelu")
    set_threshold(crosscoder, 0.25)
    assert all(bool((threshold == 0.25).all()) for threshold in crosscoder.threshold)
    with pytest.raises(WiringError, match="has no thresholds to set"):
        set_threshold(build("clt", "relu"), 0.1)


@pytest.mark.parametrize(
    ("wiring", "source"),
    [
        ("acausal", lambda g, site, reads: site),
        ("clt", lambda g, site, reads: reads[0]),
        # Reads the MLP's input and output: what is written to each comes from the same.
        ("pre_post_mlp_both", lambda g, site, reads: site),
        ("model_diff", lambda g, site, reads: site),
    ],
)
def test_tied_decoders(wiring, source):
    crosscoder = build(wiring, "relu")
    before = [crosscoder.decoder_norms(g, "per_write") for g in range(crosscoder.wiring.n_groups)]
    tie_decoders(crosscoder)
    for g, writes in enumerate(crosscoder.wiring.writes):
        reads = crosscoder.wiring.reads[g]
        assert_close(crosscoder.decoder_norms(g, "per_write"), before[g])
        for w, site in enumerate(writes):
            encoder = crosscoder.encoder_view(g)[reads.index(source(g, site, reads))].T
            cosine = torch.cosine_similarity(crosscoder.decoder_view(g)[:, w], encoder, dim=1)
            assert_close(cosine, torch.ones_like(cosine))
    ragged = Crosscoder(Wiring.pre_post_mlp(0), {Site("model", "mlp_in", 0): 3, Site("model", "mlp_out", 0): 4}, 5)
    with pytest.raises(WiringError, match=r"mlp_out.0 has width 4 and mlp_in.0, which the group reads, 3"):
        tie_decoders(ragged)


def test_latents_begin_as_tokens():
    crosscoder = build("clt", "relu")
    x = inputs(crosscoder, (20,))
    y = {site: torch.randn(20, 4).double() for site in crosscoder.wiring.write_sites}
    start_at_tokens(crosscoder, x, y, encoder_norm=2.0, decoder_norm=0.5, generator=torch.Generator().manual_seed(1))
    for g, (read,) in enumerate(crosscoder.wiring.reads):
        unit = torch.nn.functional.normalize(x[read], dim=1)
        along = crosscoder.encoder_vectors(g) @ unit.T / 2
        tokens = along.argmax(1)
        assert len(tokens.unique()) == crosscoder.group_sizes[g]
        assert_close(along.amax(1), torch.ones(6).double())
        # What a latent writes is what its own token has at every layer it writes.
        outputs = torch.cat([y[site][tokens] for site in crosscoder.wiring.writes[g]], dim=1)
        assert_close(crosscoder.decoder_vectors(g), torch.nn.functional.normalize(outputs, dim=1) / 2)
    again = build("clt", "relu")
    start_at_tokens(again, x, y, generator=torch.Generator().manual_seed(1))
    assert_close(2 * again.W_enc[1], crosscoder.W_enc[1])
    few = {site: value[:5] for site, value in x.items()}
    with pytest.raises(ValueError, match="6 latents of a group begin at as many tokens, but there are 5"):
        start_at_tokens(crosscoder, few, {site: value[:5] for site, value in y.items()})
    with pytest.raises(WiringError, match="the same tokens"):
        start_at_tokens(crosscoder, few, y)


@pytest.mark.parametrize("activation", ["jumprelu", "topk-group-decoder_norm", "batchtopk-joint-activation"])
def test_a_clt_begins_as_a_trained_plt(activation):
    plt = build("plt", activation)
    clt = Crosscoder(Wiring.clt(3).with_skips(), 4, 6, plt.activation, dtype=torch.float64)
    start_from(clt, plt)
    x = inputs(plt, (9,))
    acts = clt.encode(x)
    # Joint selections and all: at first the two are one and the same.
    assert_close(clt.decode(acts, x), plt(x))
    sum(y.sum() for y in clt.decode(acts, x).values()).backward()
    assert clt.W_dec[0].grad[:, 4:].any()  # what starts at 0 learns


def test_it_cannot_begin_as_something_else():
    plt = build("plt", "jumprelu")
    with pytest.raises(WiringError, match="its activation is ReLU"):
        start_from(build("clt", "relu"), plt)
    with pytest.raises(WiringError, match="group 0 must read what the other's reads, and write what it writes"):
        start_from(plt, build("clt", "jumprelu"))
    with pytest.raises(WiringError, match=r"its groups have \[5, 7, 6\] latents"):
        start_from(build("ragged_latents", "jumprelu"), plt)
    with pytest.raises(WiringError, match="affine skips that it lacks"):
        start_from(build("clt", "jumprelu"), build("skips", "jumprelu"))
