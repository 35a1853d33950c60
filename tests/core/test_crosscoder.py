"""Encoding, decoding and their gradients against the brute force of `oracle`, for every wiring and activation."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from clt_plugin.core import Crosscoder, Site, SparseFeatures, Wiring, WiringError
from core.oracle import (
    ACTIVATIONS,
    WIRINGS,
    brute_cut,
    brute_decode,
    brute_encode,
    brute_pre_activations,
    build,
    copies,
    flat,
    inputs,
    random_features,
    rows,
)

EXACT = {"rtol": 1e-10, "atol": 1e-10}
STACKS = [name for name, (_, width, _) in WIRINGS.items() if isinstance(width, int)]


def weighted(values):
    """Sum of all tensors, each entry with its own fixed weight, so that no transpose or swap goes unseen."""
    return sum((v * torch.linspace(0.3, 1.7, v.numel(), dtype=v.dtype).reshape(v.shape)).sum() for v in values)


def compare(cc, x, y, cut=None):
    """Compare features, reconstruction and all gradients with the brute force; x: {site: (T, d)} leaves."""
    p, x2 = copies(cc), {site: v.detach().clone().requires_grad_() for site, v in x.items()}
    features = cc.encode(x)
    brute = brute_encode(cc, p, x2, cut)
    for got, want in zip(features, rows(brute), strict=True):
        assert_close(got, want, **EXACT)
    assert any(bool((acts != 0).any()) for acts in features)
    expected = brute_decode(cc, p, brute, x2)
    assert list(y) == list(expected)
    for site, value in expected.items():
        assert_close(y[site], value, **EXACT)
    (weighted(y.values()) + weighted(features)).backward()
    (weighted(expected.values()) + weighted(rows(brute))).backward()
    for site in x:
        assert_close(x[site].grad, x2[site].grad, **EXACT)
    for name, parameter in cc.named_parameters():
        if parameter.requires_grad:
            assert_close(parameter.grad, p[name].grad, **EXACT, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert parameter.grad is None


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("wiring", WIRINGS)
def test_forward_and_gradients(wiring, activation):
    cc = build(wiring, activation)
    x = inputs(cc, (5,), grad=True)
    compare(cc, x, cc(x))
    if activation == "jumprelu":
        assert any(bool(t.grad.any()) for t in cc.threshold)


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name.startswith("batchtopk")])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_batchtopk_outside_training(wiring, activation):
    cc = build(wiring, activation)
    seen, new = inputs(cc, (6,)), inputs(cc, (4,), grad=True)
    in_training = cc.encode(seen)
    cc.estimate_threshold(seen)
    assert cc.training
    cc.eval()
    for got, want in zip(cc.encode(seen), in_training, strict=True):
        assert torch.equal(got, want)
    compare(cc, new, cc(new), brute_cut(cc, copies(cc), seen))


@pytest.mark.parametrize("path", ["auto", "dense", "sparse"])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_decode_of_edited_features(wiring, path):
    """Features need not come from an encoder: negative ones, and gradients of inactive ones, count as well."""
    cc = build(wiring)
    p, x = copies(cc), inputs(cc, (5,))
    features = [f.requires_grad_() for f in random_features(cc, (5,))]
    copied = [f.detach().clone().requires_grad_() for f in features]
    y = cc.decode(features, x, path=path)
    expected = brute_decode(cc, p, [list(f) for f in copied], x)
    weighted(y.values()).backward()
    weighted(expected.values()).backward()
    for site, value in expected.items():
        assert_close(y[site], value, **EXACT)
    for f, f2 in zip(features, copied, strict=True):
        assert_close(f.grad, f2.grad, **EXACT)
    for name, parameter in cc.named_parameters():
        if name.startswith(("W_dec", "b_dec", "W_skip")):
            assert_close(parameter.grad, p[name].grad, **EXACT)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4), (0,), (2, 0)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("wiring", ["clt", "ragged_latents", "ragged_skips"])
def test_any_leading_shape(wiring, activation, shape):
    cc = build(wiring, activation)
    x = inputs(cc, shape)
    features, y = cc.encode(x), cc(x)
    brute = brute_encode(cc, copies(cc), flat(x))
    expected = brute_decode(cc, copies(cc), brute, flat(x))
    for g, acts in enumerate(features):
        assert acts.shape == (*shape, cc.group_sizes[g])
        if acts.numel():
            assert_close(acts.reshape(-1, acts.shape[-1]), torch.stack(brute[g]), **EXACT)
    for site, value in expected.items():
        assert_close(y[site], value.reshape(*shape, cc.layout.width[site]), **EXACT)
    sparse = cc.encode(x, sparse=True)
    for site, value in cc.decode(sparse, x).items():
        assert_close(value, y[site], **EXACT)
    for dense, acts in zip(sparse.to_dense(), features, strict=True):
        assert torch.equal(dense, acts)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4), (0,)])
@pytest.mark.parametrize("wiring", STACKS)
def test_stacked_in_stacked_out(wiring, shape):
    cc = build(wiring, "topk-group-activation")
    x = inputs(cc, shape)
    stacked = torch.stack(list(x.values()))
    y, by_site = cc(stacked), cc(x)
    assert isinstance(y, torch.Tensor)
    assert isinstance(by_site, dict)
    assert_close(y, torch.stack(list(by_site.values())))
    features = cc.encode(stacked)
    if isinstance(cc.n_latents, int):
        assert features.shape == (cc.wiring.n_groups, *shape, cc.n_latents)
    else:
        assert [f.shape for f in features] == [(*shape, n) for n in cc.n_latents]
    sparse = cc.encode(stacked, sparse=True)
    assert isinstance(sparse, SparseFeatures)
    assert_close(cc.decode(sparse, stacked), y)


def test_stacked_input_with_ragged_outputs_gives_a_mapping():
    read, narrow = Site("model", "mlp_in", 0), Site("model", "mlp_out", 0)
    cc = Crosscoder(Wiring(((read,),), ((narrow,),)), {read: 4, narrow: 3}, 5)
    assert cc(torch.randn(1, 2, 4))[narrow].shape == (2, 3)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk-joint-decoder_norm"])
def test_sparse_features_carry_gradients(activation):
    cc = build("clt", activation)
    x = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    (dense,) = torch.autograd.grad(weighted([cc.decode(cc.encode(x))]), x)
    (sparse,) = torch.autograd.grad(weighted([cc.decode(cc.encode(x, sparse=True))]), x)
    assert_close(sparse, dense, **EXACT)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_groups_alone_are_the_whole(wiring):
    """encode_group and decode_group, by which a running model goes through the layers."""
    cc = build(wiring, "jumprelu")
    x = inputs(cc, (2, 3))
    features, y = cc.encode(x), cc(x)
    total = {site: cc.bias(site).expand_as(y[site]) for site in cc.wiring.write_sites}
    for g, reads in enumerate(cc.wiring.reads):
        acts = cc.encode_group(g, torch.cat([x[site] for site in reads], dim=-1))
        assert_close(acts, features[g])
        for site, part in cc.decode_group(g, acts).items():
            assert part.shape == y[site].shape
            total[site] = total[site] + part
    for site in total:
        skip = cc.skip(site, x)
        assert (skip is None) == (site not in [write for _, write in cc.wiring.skips])
        assert_close(total[site] if skip is None else total[site] + skip, y[site])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_near_the_brute_force(dtype):
    cc = build("skips", "jumprelu", dtype=dtype)
    x = {site: value.to(dtype) for site, value in inputs(cc).items()}
    exact = {site: value.double() for site, value in x.items()}
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    hs = brute_pre_activations(cc, copies(cc), exact)
    for g in range(3):
        h = cc.pre_activations(g, x[cc.wiring.reads[g][0]])
        assert h.dtype == dtype
        assert_close(h.double(), torch.stack(hs[g]), rtol=tolerance, atol=tolerance)
    features = random_features(cc, (5,))
    expected = brute_decode(cc, copies(cc), [list(f) for f in features], exact)
    for site, value in cc.decode(features, x).items():
        assert value.dtype == dtype
        assert_close(value.double(), expected[site], rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- what is refused


def refuses(message):
    return pytest.raises(WiringError, match=message)


def test_wrong_inputs():
    cc = build("clt")
    with refuses(r"one entry for each site read, \(3, \.\.\., 4\), not \(2, 5, 4\)"):
        cc.encode(torch.randn(2, 5, 4))
    with refuses(r"\(3, \.\.\., 4\), not \(3,\)"):
        cc.encode(torch.randn(3))
    with refuses(r"mlp_in\.0 has width 4, but its input has shape \(5, 3\)"):
        cc.encode(torch.randn(3, 5, 3))
    x = inputs(cc)
    del x[Site("model", "mlp_in", 1)]
    with refuses(r"inputs for mlp_in\.1 are missing"):
        cc.encode(x)
    x = inputs(cc) | {Site("model", "mlp_in", 1): torch.randn(6, 4)}
    with refuses(r"leading shapes differ: \[\(5,\), \(6,\)\]"):
        cc.encode(x)


def test_wrong_features():
    cc = build("clt")
    with refuses(r"\[6, 6, 6\] latents, but the features have \[6, 6\]"):
        cc.decode(torch.zeros(2, 5, 6))
    with refuses(r"\[6, 6, 6\] latents, but the features have \[6, 6, 7\]"):
        cc.decode([torch.zeros(5, 6), torch.zeros(5, 6), torch.zeros(5, 7)])
    with refuses(r"\[6, 6, 6\] latents, but the features have \[5, 7, 6\]"):
        cc.decode(build("ragged_latents").encode(torch.randn(3, 5, 4), sparse=True))
    with refuses(r"leading shapes differ: \[\(1,\), \(5,\)\]"):
        cc.decode([torch.zeros(5, 6), torch.zeros(1, 6), torch.zeros(5, 6)])
    with refuses("but the features have"):
        cc.decode([])
    with pytest.raises(ValueError, match="path must be 'auto', 'dense' or 'sparse', not 'fast'"):
        cc.decode(torch.zeros(3, 5, 6), path="fast")


def test_skips_need_x():
    cc = build("skips")
    with refuses("affine skips, which read x"):
        cc.decode(torch.zeros(3, 5, 6))
    assert cc.decode(torch.zeros(3, 5, 6), torch.zeros(3, 5, 4)).shape == (3, 5, 4)


@pytest.mark.parametrize("n_latents", [0, -1, (4, 4), (4, 4, 0)])
def test_wrong_numbers_of_latents(n_latents):
    with refuses("n_latents is .* number of at least 1, or 3 of them, one a group"):
        Crosscoder(Wiring.clt(3), 4, n_latents)


def test_joint_selection_refuses_single_groups():
    cc = build("clt", "topk-joint-activation")
    with refuses("selects over all groups together"):
        cc.activate(0, torch.randn(5, 6))
    with refuses("selects over all groups together"):
        cc.eval().encode_group(0, torch.randn(5, 4))
    batch = build("clt", "batchtopk-joint-activation")
    with refuses("selects over all groups together"):
        batch.activate(0, torch.randn(5, 6, dtype=torch.float64))
    x = inputs(batch)
    batch.estimate_threshold(x)
    whole = batch.eval().encode(x)
    for g, site in enumerate(batch.wiring.read_sites):
        assert torch.equal(batch.encode_group(g, x[site]), whole[g])


def test_batchtopk_needs_a_threshold_outside_training():
    cc = Crosscoder(Wiring.clt(3), 4, 6, "batchtopk", k=2).eval()
    with refuses("no threshold yet"):
        cc.encode(torch.randn(3, 5, 4))
    with refuses("has no measured threshold: only BatchTopK does"):
        build("clt").estimate_threshold(torch.randn(3, 5, 4))
