"""Crosscoders written by hand, whose shared, exclusive, rotating and new latents are known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clt_plugin import Crosscoder, Site, Wiring, WiringError
from clt_plugin.analysis import STUDIES, crosscoders
from support.crosscoders import make_clt
from support.models import make_model

F64 = torch.float64
D = 64
SHARED, BASE, CHAT = range(10), range(10, 15), range(15, 20)
SHRUNK, COPIES, THEIR_BASE = range(20, 25), range(25, 30), range(30, 35)
"""Latents of both models, of either; those that training shrank in base; and copies, one for each model."""


def _directions(n, seed=3, d=D):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=F64))[0][:n]


def _sparse(n_tokens, n, seed=0, share=0.1):
    generator = torch.Generator().manual_seed(seed)
    on = torch.rand(n_tokens, n, generator=generator) < share
    return on * (0.5 + torch.rand(n_tokens, n, generator=generator).double())


def _model_diff():
    """A crosscoder over two models and activations for it, {site: (2000, D)}.

    Base lacks what is exclusive to chat but for a tenth of it, which nothing explains in either model.
    """
    crosscoder = Crosscoder(Wiring.model_diff(("base", "chat"), layer=1), D, 35, "relu", dtype=F64).requires_grad_(
        False
    )
    base, chat = crosscoder.wiring.read_sites
    directions, acts = _directions(30), _sparse(2000, 30)
    crosscoder.W_enc[0].zero_()
    crosscoder.W_dec[0].zero_()
    encoder, decoder = crosscoder.encoder_vectors(0), crosscoder.decoder_vectors(0)
    base_x, chat_x = torch.zeros(2000, D, dtype=F64), torch.zeros(2000, D, dtype=F64)
    for latent in range(30):
        direction, part = directions[latent], acts[:, latent, None] * directions[latent]
        in_base, in_chat = latent not in CHAT, latent not in BASE
        extra = 0.1 if latent in CHAT else 0.0
        base_x += (float(in_base) + extra) * part
        chat_x += (float(in_chat) + extra) * part
        read, scale = (slice(D, None), 1 + extra) if in_chat else (slice(None, D), 1.0)
        encoder[latent, read] = direction / scale
        if in_base and latent not in SHRUNK and latent not in COPIES:
            decoder[latent, :D] = direction
        if in_chat:
            decoder[latent, D:] = direction
    for latent, copy in zip(COPIES, THEIR_BASE, strict=True):
        encoder[copy, :D] = directions[latent]
        decoder[copy, :D] = directions[latent]
    return crosscoder, {base: base_x, chat: chat_x}


def test_norms_tell_shared_from_exclusive_latents():
    crosscoder, _ = _model_diff()
    found = crosscoders.shared_latents(crosscoder)
    classes = found.classes("1")
    assert [classes[i] for i in (0, 10, 15, 20, 25, 30)] == [
        "shared", "only base", "only chat", "only chat", "only chat", "only base"
    ]  # fmt: skip
    assert found.relative("1")[[0, 10, 15]].tolist() == [0.5, 0.0, 1.0]
    assert found.table.set_index("class")["latents"].to_dict() == {
        "dead": 0, "only base": 10, "only chat": 15, "shared": 10, "between": 0
    }  # fmt: skip
    assert found.cosines["1"][list(SHARED)].tolist() == pytest.approx([1.0] * 10)
    assert found.plot() is not None


def test_latent_scaling_tells_exclusive_latents_from_shrunk_ones_and_copies():
    crosscoder, activations = _model_diff()
    found = crosscoders.latent_scaling(crosscoder, activations)
    latents = found.latents.set_index("latent")
    assert set(latents.index[latents["exclusive"]]) == set(CHAT)
    # By hand: base has 0.1 of what chat has 1.1 of; a shrunk one is whole in base's error; a copy is in its
    # reconstruction, put there by the other.
    assert latents["nu_e"][list(CHAT)].tolist() == pytest.approx([0.1 / 1.1] * 5, abs=1e-6)
    assert latents["nu_r"][list(CHAT)].abs().max() < 0.05
    assert latents["nu_e"][list(SHRUNK)].tolist() == pytest.approx([1.0] * 5, abs=1e-6)
    assert latents["nu_r"][list(COPIES)].min() > 0.95
    # The known failure: without its own part put back, an exclusive latent looks shared.
    assert latents["nu_e_without_own"][list(CHAT)].tolist() == pytest.approx([1.0] * 5, abs=1e-6)
    table = found.table.set_index("class")
    assert table.loc["only chat (norm > 0.9)", ["latents", "exclusive"]].tolist() == [15, 5]
    assert found.plot() is not None


def test_latent_scaling_equals_the_best_fit_latent_by_latent():
    """The closed form, streamed over batches of any size, against least squares on dense tensors."""
    crosscoder = make_clt(Wiring.model_diff(("base", "chat"), layer=0), dtype=F64)
    base, chat = crosscoder.wiring.read_sites
    x = {site: torch.randn(50, 16, dtype=F64) for site in (base, chat)}
    parts = [{site: value[rows] for site, value in x.items()} for rows in (slice(0, 7), slice(7, 50))]
    found = crosscoders.latent_scaling(crosscoder, parts).latents
    (acts,), recon = crosscoder.encode(x), crosscoder(x)
    slices = crosscoder.layout.write_slices[0]
    for latent in range(24):
        f, d = acts[:, latent], crosscoder.W_dec[0][latent, slices[chat]]
        column = (f[:, None] * d).flatten()[:, None]
        for m, name in ((base, "a"), (chat, "b")):
            own = f[:, None] * crosscoder.W_dec[0][latent, slices[m]]
            for kind, y in (("r", recon[m]), ("e", x[m] - recon[m] + own)):
                beta = torch.linalg.lstsq(column, y.flatten()[:, None]).solution
                assert found.loc[latent, f"beta_{kind}_{name}"] == pytest.approx(float(beta), rel=1e-6)


def test_a_batchtopk_in_training_mode_is_measured_as_it_runs():
    """In training mode it would select over each batch, and the result would depend on how tokens are cut into them."""
    crosscoder = make_clt(Wiring.model_diff(("base", "chat"), layer=0), activation="batchtopk", k=4)
    x = {site: torch.randn(40, 16) for site in crosscoder.wiring.read_sites}
    crosscoder.estimate_threshold(x)
    crosscoder.train()
    whole = crosscoders.latent_scaling(crosscoder, x).latents
    parts = [{site: value[rows] for site, value in x.items()} for rows in (slice(0, 3), slice(3, 40))]
    assert crosscoders.latent_scaling(crosscoder, parts).latents["tokens"].equals(whole["tokens"])
    assert crosscoder.training


def test_norm_profiles_and_rotation_of_known_decoders():
    """Latent 0 peaks at site 1 and decays; 1 is stable; 2 rotates and keeps its norm; 3 is dead."""
    crosscoder = Crosscoder(Wiring.acausal([0, 1, 2]), 8, 4, "relu", dtype=F64).requires_grad_(False)
    axes = torch.eye(8, dtype=F64)
    decoder = crosscoder.decoder_view(0)
    decoder.zero_()
    decoder[0, 0], decoder[0, 1], decoder[0, 2] = 0.5 * axes[0], 2.0 * axes[0], 1.0 * axes[0]
    decoder[1, :] = axes[1]
    for site in range(3):
        decoder[2, site] = axes[2 + site]
    found = crosscoders.norm_profiles(crosscoder)
    latents = found.latents("2")
    assert latents["peak"].tolist()[:3] == ["resid_post.1", "resid_post.0", "resid_post.0"]
    assert latents["span"].tolist() == [2, 3, 3, 0]
    assert latents.loc[0, ["before", "after"]].tolist() == [0.25, 0.5]
    decay = found.decay.set_index("distance")["relative_norm"]
    assert decay[0] == 1.0
    assert decay[1] == pytest.approx((0.5 + 1 + 1) / 3)
    assert decay[-1] == 0.25
    assert found.plot() is not None
    turned = crosscoders.rotation(crosscoder)
    assert turned.consistency["2"][:3].tolist() == pytest.approx([1.0, 1.0, 0.0])
    assert bool(turned.consistency["2"][3].isnan())
    # Latent 0 is weak at site 0: of the pair (0, 1) the other two count.
    assert turned.counts["2"][0, 1] == 2
    assert float(turned.cosines["2"][0, 1]) == pytest.approx(0.5)
    assert float(turned.cosines["2"][1, 2]) == pytest.approx(2 / 3)
    assert turned.rotating(1)["latent"].tolist() == [2]
    assert turned.plot() is not None


def test_random_directions_do_not_look_stable():
    crosscoder = make_clt(Wiring.clt(3))
    assert abs(crosscoders.rotation(crosscoder).table["mean_cosine"]).max() < 4 / (24 * 16) ** 0.5


def test_new_and_maintained_features_of_an_mlp_and_what_new_ones_are_made_of():
    """Latents 0-4 are maintained, 5 is of the input alone; 6 is new, made of 2 and of minus 3."""
    crosscoder = Crosscoder(Wiring.pre_post_mlp(0), 16, 7, "relu", dtype=F64).requires_grad_(False)
    before, after = crosscoder.wiring.write_sites
    axes, encoder, decoder = torch.eye(16, dtype=F64), crosscoder.encoder_vectors(0), crosscoder.decoder_vectors(0)
    encoder.zero_()
    decoder.zero_()
    for latent in range(6):
        encoder[latent], decoder[latent, :16] = axes[latent], axes[latent]
        if latent < 5:
            decoder[latent, 16:] = axes[latent + 8]
    encoder[6], decoder[6, 16:] = 2 * axes[2] - axes[3], axes[15]
    crosscoder.b_enc[0][6] = -0.25
    sharing = crosscoders.shared_latents(crosscoder)
    assert sharing.classes("0") == ["shared"] * 5 + ["only mlp_in.0", "only mlp_out.0"]
    x = _sparse(400, 16, share=0.4) + 0.05 * torch.randn(400, 16, dtype=F64)
    found = crosscoders.feature_inputs(crosscoder, {before: x, after: x}, [6], k=2)
    on = (2 * x[:, 2] - x[:, 3] - 0.25) > 0
    acts = x.clamp(min=0)
    assert found.table["source"].tolist() == [2, 3]
    assert found.table["product"].tolist() == [2.0, -1.0]
    assert found.table["strength"].tolist() == pytest.approx(
        [float(2 * acts[on, 2].mean()), float(-acts[on, 3].mean())], rel=1e-9
    )
    totals = found.totals.iloc[0]
    assert totals["tokens"] == int(on.sum())
    assert totals["pre_activation"] == pytest.approx(float((2 * x[on, 2] - x[on, 3] - 0.25).mean()), rel=1e-9)
    # Nothing is left over but what ReLU cut off.
    left = (2 * (x - acts)[on, 2] - (x - acts)[on, 3]).mean()
    assert totals["error"] == pytest.approx(float(left), abs=1e-9)
    assert found.plot() is not None


def _persistent(same):
    """A crosscoder over three sites, three SAEs, and activations whose features persist over sites, or do not."""
    sites = [Site("model", "resid_post", layer) for layer in range(3)]
    n, acts = 6, [_sparse(500, 6, seed=0 if same else layer) for layer in range(3)]
    directions = [_directions(n, seed=10 + layer, d=16) for layer in range(3)]
    x = {site: acts[i] @ directions[i] for i, site in enumerate(sites)}
    whole = Crosscoder(Wiring.acausal(sites), 16, n, "relu", dtype=F64).requires_grad_(False)
    whole.W_enc[0][:] = torch.cat([d.T / 3 for d in directions])
    whole.W_dec[0][:] = torch.cat(directions, dim=1)
    saes = {}
    for i, site in enumerate(sites):
        sae = saes[site] = Crosscoder(Wiring.sae(site), 16, n, "relu", dtype=F64).requires_grad_(False)
        order = torch.arange(n).roll(i)  # each SAE numbers its latents its own way
        sae.W_enc[0][:], sae.W_dec[0][:] = directions[i][order].T, directions[i][order]
    # What rounding makes of orthogonal directions is no activation.
    for crosscoder in (whole, *saes.values()):
        crosscoder.b_enc[0].fill_(-1e-9)
    return whole, saes, x, acts


def test_features_that_persist_cost_an_sae_latent_a_site_and_clusters_show_it():
    whole, saes, x, acts = _persistent(same=True)
    found = crosscoders.against_saes(whole, saes, [x])
    table = found.table.set_index("what")
    assert table["fvu"].max() < 1e-12
    l0 = float((acts[0] > 0).sum(1).double().mean())
    assert table["l0"].tolist() == pytest.approx([l0, 3 * l0, l0])
    assert table["latents"].tolist() == [6, 18, 6]
    assert sorted(len(chain) for chain in found.clusters) == [3] * 6
    assert table["parameters"].tolist() == [6 * 16 * 3 * 2] * 3
    assert found.plot() is not None


def test_features_that_do_not_persist_are_not_clustered():
    whole, saes, x, _ = _persistent(same=False)
    found = crosscoders.against_saes(whole, list(saes.values()), x)
    table = found.table.set_index("what")
    assert found.clusters == []
    assert table.loc["SAEs, clustered", "l0"] == table.loc["per-layer SAEs", "l0"]
    # One latent for what each site does on its own cannot reconstruct it.
    assert table.loc["crosscoder", "fvu"] > 0.3
    with pytest.raises(WiringError, match=r"no SAE for resid_post\.2"):
        crosscoders.against_saes(whole, list(saes.values())[:2], x)


def test_geometry_survives_a_rotation_and_not_a_permutation():
    crosscoder = Crosscoder(Wiring.model_diff(("a", "b"), layer=0), D, 60, "relu", dtype=F64).requires_grad_(False)
    vectors = F.normalize(torch.randn(60, 8, dtype=F64) @ _directions(8), dim=1)
    crosscoder.W_dec[0][:, :D] = vectors
    crosscoder.W_dec[0][:, D:] = vectors @ _directions(D, seed=9)
    found = crosscoders.decoder_geometry(crosscoder)
    assert found.n_latents == 60
    assert found.correlation == pytest.approx(1.0, abs=1e-5)
    assert abs(found.permuted) < 0.1
    assert crosscoders.shared_latents(crosscoder).cosines["0"].max() < 0.8
    assert found.plot() is not None


def test_shared_latents_that_are_read_otherwise_are_told_by_their_effects():
    """Same vectors in both models: alike where the unembedding is, apart where its tokens were permuted."""
    crosscoder = make_clt(Wiring.model_diff(("a", "b"), layer=2))
    crosscoder.W_dec[0][:, 16:] = crosscoder.W_dec[0][:, :16]
    hf, other = make_model("gpt2"), make_model("gpt2")
    # Tied to the embedding, of which a copy is to change.
    other.lm_head.weight = torch.nn.Parameter(hf.lm_head.weight.roll(17, 0), requires_grad=False)
    same = crosscoders.direct_effects(crosscoder, {"a": hf, "b": hf})
    assert len(same.latents) == 24
    assert same.latents["correlation"].tolist() == pytest.approx([1.0] * 24, abs=1e-5)
    moved = crosscoders.direct_effects(crosscoder, {"a": hf, "b": other})
    assert moved.latents["cosine"].tolist() == pytest.approx([1.0] * 24, abs=1e-5)
    assert abs(moved.table["correlation"][0]) < 0.2
    # By hand, for one latent: through LayerNorm's centring and gain, and each model's unembedding.
    vector = crosscoder.W_dec[0][5, :16]
    added = (vector - vector.mean()) * hf.transformer.ln_f.weight
    logits = torch.stack((hf.lm_head.weight @ added, other.lm_head.weight @ added))
    assert moved.latents["correlation"][5] == pytest.approx(float(torch.corrcoef(logits)[0, 1]), abs=1e-5)
    assert moved.plot() is not None
    with pytest.raises(WiringError, match="the models given are a"):
        crosscoders.direct_effects(crosscoder, {"a": hf})


def test_three_models_are_told_apart_by_shares():
    crosscoder = Crosscoder(Wiring.model_diff(("a", "b", "c"), layer=0), 4, 3, "relu").requires_grad_(False)
    decoder = crosscoder.decoder_view(0)
    decoder.zero_()
    decoder[0, :, 0] = 1.0
    decoder[1, 1, 0] = 1.0
    found = crosscoders.shared_latents(crosscoder)
    assert found.classes("0") == ["shared", "only b", "dead"]
    assert found.shares["0"][0].tolist() == pytest.approx([1 / 3] * 3)
    assert found.plot() is not None


def test_refusals():
    plt, clt = make_clt(Wiring.plt(3)), make_clt()
    for study in (crosscoders.norm_profiles, crosscoders.rotation, crosscoders.shared_latents):
        with pytest.raises(WiringError, match=r"no group|every group"):
            study(plt)
    with pytest.raises(WiringError, match="of a CLT see norm_profiles"):
        crosscoders.shared_latents(clt)
    with pytest.raises(WiringError, match="compares two models"):
        crosscoders.latent_scaling(clt, [])
    with pytest.raises(WiringError, match="one group that writes all it reads"):
        crosscoders.feature_inputs(clt, [], [0])
    with pytest.raises(WiringError, match="no activations"):
        crosscoders.latent_scaling(make_clt(Wiring.model_diff(("a", "b"), 0)), [])
    for name in ("norm-profiles", "rotation", "shared-latents", "decoder-geometry"):
        assert STUDIES[name].needs == ("clt",)
