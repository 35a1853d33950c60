"""What a crosscoder's weights are: norms, views, dtype, saving of state, selection, measured thresholds."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close

from clt_plugin.core import Crosscoder, CrossLayerTranscoder, Host, Site, Wiring, WiringError
from core.oracle import ACTIVATIONS, WIRINGS, brute_norms, build, copies, inputs


def same(left, right):
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------- norms and views


@pytest.mark.parametrize("kind", ["concatenated", "separate", "per_write"])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_decoder_norms(wiring, kind):
    cc = build(wiring)
    for g in range(cc.wiring.n_groups):
        norms = cc.decoder_norms(g, kind)
        assert_close(norms, brute_norms(cc, copies(cc), g, kind), rtol=1e-12, atol=1e-12)
        norms.sum().backward()
        assert bool(cc.W_dec[g].grad.any())


def test_decoder_norms_kind():
    with pytest.raises(ValueError, match="kind must be one of concatenated, separate, per_write, not 'max'"):
        build("clt").decoder_norms(0, "max")


def test_stored_norms_rank_in_place_of_measured_ones():
    cc = build("clt", "topk-group-decoder_norm")
    x = inputs(cc)
    measured = cc.encode(x)
    own = [cc.decoder_norms(g).detach() for g in range(3)]
    cc.stored_norms = torch.nn.ParameterList(torch.nn.Parameter(n, requires_grad=False) for n in own)
    with torch.no_grad():
        for weight in cc.W_dec:
            weight *= torch.rand(len(weight), 1)
    same(cc.encode(x), measured)
    same(pickle.loads(pickle.dumps(cc)).stored_norms, own)
    same(cc.select(layers=[0, 2]).stored_norms, [own[0], own[2]])


@pytest.mark.parametrize(
    ("activation", "choice"),
    [
        ("topk-group-activation", {"features": {1: [4, 2]}}),
        ("topk-joint-activation", {"layers": [1]}),
        ("topk-joint-activation", {"features": {1: [4, 2]}}),
        ("batchtopk-group-activation", {"features": {1: [4, 2]}}),
    ],
)
def test_a_selection_of_latents_that_compete_is_refused(activation, choice):
    with pytest.raises(WiringError, match="ranks latents against those that would be left out"):
        build("clt", activation).select(**choice)


def test_a_measured_threshold_allows_any_selection():
    cc = build("clt", "batchtopk-joint-activation")
    x = inputs(cc)
    cc.estimate_threshold(x)
    cc.eval()
    part, kept = cc.select(layers=[1], features={1: [4, 2]}), cc.encode(x)[1][..., [4, 2]]
    same(part.encode({site: x[site] for site in part.wiring.read_sites}), [kept])


def test_views_need_equal_widths():
    cc = Crosscoder(Wiring.model_diff(["a", "b"], 3), {"a": 8, "b": 24}, 5)
    for view in (cc.decoder_view, cc.encoder_view):
        with pytest.raises(WiringError, match=r"differ in width \(a:resid_post.3 8, b:resid_post.3 24\)"):
            view(0)


def test_a_frozen_crosscoder_stays_frozen():
    cc = build("clt with skips" if "clt with skips" in WIRINGS else "clt").requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in cc.select(layers=[0, 1]).parameters())


def test_views_of_a_clt():
    cc = build("clt")
    for layer in range(3):
        assert cc.encoder_view(layer).shape == (1, 4, 6)
        assert torch.equal(cc.encoder_view(layer)[0], cc.W_enc[layer])
        view = cc.decoder_view(layer)
        assert view.shape == (6, 3 - layer, 4)
        # Index j writes layer + j: what one latent of one layer writes, read off a decode.
        features = [torch.zeros(1, 6, dtype=torch.float64) for _ in range(3)]
        features[layer][0, 2] = 1.0
        y = cc.decode(features)
        for j in range(3 - layer):
            target = Site("model", "mlp_out", layer + j)
            assert_close(y[target][0] - cc.bias(target), view[2, j])


def test_views_of_several_reads():
    cc = build("acausal")
    view = cc.encoder_view(0)
    assert view.shape == (3, 3, 6)
    x = inputs(cc)
    total = sum(x[site] @ view[r] for r, site in enumerate(cc.wiring.read_sites)) + cc.b_enc[0]
    assert_close(cc.encode(x)[0], total.relu())
    assert cc.decoder_view(0).shape == (6, 3, 3)


def test_vectors_are_rows_of_latents():
    cc = build("clt")
    latents = torch.tensor([4, 0, 4])
    assert torch.equal(cc.encoder_vectors(1), cc.W_enc[1].T)
    assert torch.equal(cc.encoder_vectors(1, latents), cc.W_enc[1].T[latents])
    assert torch.equal(cc.decoder_vectors(0, latents), cc.W_dec[0][latents])


# ---------------------------------------------------------------- what it says of itself


def test_properties():
    cc = Crosscoder(Wiring.clt(3), 4, 6, "jumprelu", host=Host("gpt2", n_layers=3))
    assert CrossLayerTranscoder is Crosscoder
    assert (cc.n_layers, cc.d_model, cc.n_latents, cc.dtype, cc.device.type) == (3, 4, 6, torch.float32, "cpu")
    assert (cc.sites.read_name, cc.sites.write_name) == ("mlp_in", "mlp_out")
    assert cc.sites.read == cc.wiring.read_sites
    assert not cc.is_lazy
    assert not cc.is_partial
    assert cc.host.to_dict()["model_name"] == "gpt2"
    assert repr(cc).startswith("Crosscoder(<Wiring clt(3): 3 groups, reads mlp_in, writes mlp_out, layers 0-2>")
    assert build("sum").sites.write_name == "mlp_out+attn_out"
    assert build("ragged_latents").n_latents == (5, 7, 6)
    with pytest.raises(WiringError, match="the sites differ in width"):
        _ = build("model_diff_ragged").d_model


def test_initial_weights():
    def largest(weight):
        return float(weight.detach().abs().max())

    cc = Crosscoder(Wiring.clt(4), 16, 64, "jumprelu")
    for g in range(4):
        assert 0.95 / 64**0.5 < largest(cc.W_enc[g]) <= 1 / 64**0.5
        assert 0.95 / (4 * 16) ** 0.5 < largest(cc.W_dec[g]) <= 1 / (4 * 16) ** 0.5
        assert torch.equal(cc.threshold[g], torch.full((64,), 0.03))
        assert not cc.b_enc[g].any()
        assert not cc.b_dec[g].any()
    wide, narrow = Site("base", "resid_post", 0), Site("chat", "resid_post", 0)
    ragged = Crosscoder(Wiring.model_diff(["base", "chat"], 0), {"base": 100, "chat": 4}, 500)
    for site, bound in ((wide, 0.1), (narrow, 0.5)):
        assert 0.95 * bound < largest(ragged.W_dec[0][:, ragged.layout.write_slices[0][site]]) <= bound


# ---------------------------------------------------------------- dtype, state, pickle


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_to_another_dtype(activation):
    cc = build("skips", activation)
    x = inputs(cc)
    y = cc.to(torch.float32)(x)
    assert cc.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in y.values())
    assert {p.dtype for p in cc.parameters()} == {torch.float32}


@pytest.mark.parametrize("activation", ["jumprelu", "batchtopk-group-decoder_norm"])
@pytest.mark.parametrize("wiring", ["clt", "ragged_skips", "ragged_latents"])
def test_state_and_pickle_round_trips(wiring, activation):
    cc = build(wiring, activation)
    x = inputs(cc)
    torch.manual_seed(1)
    other = build(wiring, activation)
    assert not torch.equal(other.b_dec[0], cc.b_dec[0])
    assert not other.load_state_dict(cc.state_dict()).unexpected_keys
    for twin in (other, pickle.loads(pickle.dumps(cc)), copy.deepcopy(cc)):
        assert list(twin.state_dict()) == list(cc.state_dict())
        same(twin.state_dict().values(), cc.state_dict().values())
        same(twin(x).values(), cc(x).values())
        same(twin.eval().encode(x), cc.eval().encode(x))
        assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in cc.parameters()]
        assert (twin.wiring, twin.activation, twin.host) == (cc.wiring, cc.activation, cc.host)
        cc.train()


def test_state_has_every_parameter():
    kinds = {name.split(".")[0] for name in build("skips", "jumprelu").state_dict()}
    assert kinds == {"W_enc", "W_dec", "W_skip", "b_enc", "b_dec", "threshold"}


# ---------------------------------------------------------------- select


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_selected_latents_are_columns_of_the_whole(wiring, activation):
    cc = build(wiring, activation)
    x, layer = inputs(cc), cc.wiring.home[-1]
    kept = [3, 0, 2]
    part = cc.select(layers=[layer], features={layer: kept})
    groups = [g for g in range(cc.wiring.n_groups) if cc.wiring.home[g] == layer]
    whole = cc.encode(x)
    same(part.encode({site: x[site] for site in part.wiring.read_sites}), [whole[g][:, kept] for g in groups])
    assert part.is_partial
    assert set(part.group_sizes) == {3}
    assert all(p.is_contiguous() for p in part.parameters())
    # An edit's effect is the whole's: decode a change, with biases and skips taken off again.
    edits = [torch.randn(5, 3, dtype=torch.float64) for _ in groups]
    change = {site: y - part.decode([e * 0 for e in edits], x)[site] for site, y in part.decode(edits, x).items()}
    for site, delta in change.items():
        expected = torch.zeros_like(delta)
        for g, edit in zip(groups, edits, strict=True):
            if site in cc.wiring.writes[g]:
                expected += edit @ cc.W_dec[g][kept][:, cc.layout.write_slices[g][site]]
        assert_close(delta, expected)


def test_select_keeps_biases_skips_and_thresholds():
    cc = build("skips", "batchtopk-group-activation")
    part = cc.eval().select(layers=iter([1, 2]))
    assert part.wiring == cc.wiring.select([1, 2])
    assert part.group_sizes == (6, 6)
    assert not part.training
    same(part.b_dec, list(cc.b_dec)[1:])
    same(part.W_skip, list(cc.W_skip)[1:])
    same(part.threshold, list(cc.threshold)[1:])
    some = cc.select(features={2: range(4)})
    assert some.group_sizes == (6, 6, 4)
    same(some.b_enc, [cc.b_enc[0], cc.b_enc[1], cc.b_enc[2][:4]])
    with torch.no_grad():
        part.b_dec[0] += 1
    assert not torch.equal(part.b_dec[0], cc.b_dec[1])


def test_select_refuses_what_is_not_there():
    cc = build("clt")
    with pytest.raises(WiringError, match=r"at home in layer \[7\]: there are groups in layers \[0, 1, 2\]"):
        cc.select(layers=[1, 7])
    with pytest.raises(WiringError, match=r"no group is at home in layer \[7\]"):
        cc.select(features={7: [0]})
    with pytest.raises(WiringError, match=r"features of layer \[2\] are asked for, but layers keeps \[1\]"):
        cc.select(layers=[1], features={2: [0]})
    with pytest.raises(WiringError, match="layer 1 has features 0 to 5"):
        cc.select(features={1: [6]})
    with pytest.raises(WiringError, match="layer 1 has features 0 to 5"):
        cc.select(features={1: []})
    with pytest.raises(WiringError, match="no group is at home"):
        cc.select(layers=[])


# ---------------------------------------------------------------- measured thresholds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name.startswith("batchtopk")])
def test_estimated_threshold_selects_the_same(activation, dtype):
    cc = build("clt", activation, dtype=dtype)
    x = torch.randn(3, 40, 4, dtype=dtype)
    trained = cc.encode(x)
    cc.estimate_threshold(x)
    assert torch.equal(cc.eval().encode(x), trained)
    assert not any(t.requires_grad for t in cc.threshold)
    if cc.activation.joint:
        assert len({float(t) for t in cc.threshold}) == 1
    # A token selects the same whatever stands beside it.
    assert_close(cc.encode(x[:, :1]), trained[:, :1])


def test_estimated_threshold_is_just_below_the_smallest_selected():
    cc = Crosscoder(Wiring.sae(0), 2, 2, "batchtopk", k=1)
    with torch.no_grad():
        cc.W_enc[0].copy_(torch.eye(2))
        x = torch.tensor([[[1.0, 1.0 - 2**-24]]])
    cc.estimate_threshold(x)
    assert cc.eval().encode(x).count_nonzero() == 1


def test_estimated_threshold_where_nothing_is_active():
    cc = build("clt", "batchtopk-joint-activation")
    with torch.no_grad():
        cc.b_enc[1].fill_(-100)
    x = torch.randn(3, 10, 4, dtype=torch.float64)
    trained = cc.encode(x)
    cc.estimate_threshold(x)
    assert not trained[1].any()
    assert torch.equal(cc.eval().encode(x), trained)


def test_a_group_that_selects_nothing_is_warned_of():
    cc = build("clt", "batchtopk-group-activation")
    with torch.no_grad():
        cc.b_enc[1].fill_(-1e3)
    with pytest.warns(UserWarning, match=r"groups \[1\] selected nothing"):
        cc.estimate_threshold(inputs(cc))
