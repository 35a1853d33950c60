"""Sparse features, and the decode that touches active latents' rows only, against a dense product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from clt_plugin.core import Crosscoder, SparseFeatures, SparseGroup, Wiring, features
from clt_plugin.core.features import decode_dense_group, decode_sparse_group

TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 0.05, "atol": 0.15},
}
DENSITIES = [0.0, 0.01, 0.1, 0.5, 0.9, 1.0]


def planted(density, n_tokens=13, n_latents=40, width=11, dtype=torch.float64):
    """Make (acts, weight) where a share of the activations, some negative, is not zero."""
    acts = torch.randn(n_tokens, n_latents, dtype=torch.float64)
    acts = acts * (torch.rand_like(acts) < density)
    return acts.to(dtype), torch.randn(n_latents, width, dtype=torch.float64).to(dtype)


def refuse_to_read(latents):
    raise AssertionError("the weights are in memory: nothing is to be read")


class Recorder:
    """Decoder rows that live elsewhere; remembers which were asked for."""

    def __init__(self, weight):
        self.weight, self.asked = weight, []

    def __call__(self, latents):
        self.asked.append(None if latents is None else latents.tolist())
        return self.weight if latents is None else self.weight[latents]


# ---------------------------------------------------------------- one group


@pytest.mark.parametrize("path", ["sparse", "dense", "auto"])
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_decode_equals_the_dense_product(dtype, density, path):
    acts, weight = planted(density, dtype=dtype)
    out = decode_dense_group(acts, weight, refuse_to_read, path)
    assert (out.dtype, out.shape) == (dtype, (13, 11))
    assert_close(out.double(), acts.double() @ weight.double(), **TOLERANCE[dtype])
    lazily = decode_dense_group(acts, None, Recorder(weight), path)
    assert_close(lazily.double(), out.double(), **TOLERANCE[dtype])


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gradients_equal_the_dense_ones(dtype, density):
    """The inactive latents' too: their gradient is what switching them on would do."""
    acts, weight = planted(density, dtype=dtype)
    upstream = torch.randn(13, 11, dtype=torch.float64).to(dtype)
    exact = [t.double().requires_grad_() for t in (acts, weight)]
    want = torch.autograd.grad(exact[0] @ exact[1], exact, upstream.double())
    leaves = [acts.requires_grad_(), weight.requires_grad_()]
    got = torch.autograd.grad(decode_dense_group(*leaves, refuse_to_read, "sparse"), leaves, upstream)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        assert_close(g.double(), w, **TOLERANCE[dtype])
    assert bool((got[0][acts == 0] != 0).all())
    (lazily,) = torch.autograd.grad(decode_dense_group(acts, None, Recorder(weight.detach()), "sparse"), acts, upstream)
    assert_close(lazily, got[0])


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sparse_group_decode_and_gradients(dtype, density):
    acts, weight = planted(density, dtype=dtype)
    group = SparseGroup.of(acts)
    values, weight = group.values.clone().requires_grad_(), weight.requires_grad_()
    out = decode_sparse_group(SparseGroup(group.tokens, group.latents, values, 40), weight, refuse_to_read, 13)
    exact = [acts.double().requires_grad_(), weight.detach().double().requires_grad_()]
    assert_close(out.double(), exact[0] @ exact[1], **TOLERANCE[dtype])
    upstream = torch.randn(13, 11, dtype=torch.float64).to(dtype)
    grad_acts, grad_weight = torch.autograd.grad(exact[0] @ exact[1], exact, upstream.double())
    got_values, got_weight = torch.autograd.grad(out, (values, weight), upstream)
    assert_close(got_values.double(), grad_acts[group.tokens, group.latents], **TOLERANCE[dtype])
    assert_close(got_weight.double(), grad_weight, **TOLERANCE[dtype])


@given(
    n_tokens=st.integers(0, 9),
    n_latents=st.integers(1, 20),
    width=st.integers(1, 9),
    density=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_decode_of_any_shape_and_density(n_tokens, n_latents, width, density, seed):
    torch.manual_seed(seed)
    acts, weight = planted(density, n_tokens, n_latents, width)
    want = acts @ weight
    for path in ("sparse", "auto"):
        assert_close(decode_dense_group(acts, weight, refuse_to_read, path), want, **TOLERANCE[torch.float64])
    group = SparseGroup.of(acts)
    assert_close(decode_sparse_group(group, None, Recorder(weight), n_tokens), want, **TOLERANCE[torch.float64])


def test_gradcheck_of_the_sparse_path():
    acts, weight = planted(0.3, 4, 6, 3)
    # Finite differences move every entry, so every entry is active: exact dense gradients are tested above.
    acts = torch.where(acts == 0, 0.5, acts)
    arguments = (acts.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, w: decode_dense_group(a, w, refuse_to_read, "sparse"), arguments)


def test_only_the_dense_path_is_differentiated_twice():
    acts, weight = planted(0.3)
    acts.requires_grad_()
    for path in ("dense", "sparse"):
        out = decode_dense_group(acts, weight.requires_grad_(), refuse_to_read, path)
        (grad,) = torch.autograd.grad(out.pow(2).sum(), acts, create_graph=True)
        if path == "dense":
            assert torch.autograd.grad(grad.sum(), acts)[0].any()
        else:
            with pytest.raises(RuntimeError, match="once_differentiable"):
                grad.sum().backward()


def test_only_active_rows_are_read():
    acts, weight = torch.zeros(3, 10), torch.randn(10, 4)
    acts[0, 7], acts[1, 2], acts[2, 7] = 1.0, -2.0, 3.0
    read = Recorder(weight)
    assert_close(decode_dense_group(acts, None, read, "sparse"), acts @ weight)
    assert_close(decode_sparse_group(SparseGroup.of(acts), None, read, 3), acts @ weight)
    assert read.asked == [[2, 7], [2, 7]]
    # The gradient of inactive latents needs the whole decoder, which is read then and no sooner.
    out = decode_dense_group(acts.requires_grad_(), None, read, "sparse")
    assert read.asked[2:] == [[2, 7]]
    out.sum().backward()
    assert read.asked[3:] == [None]


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_no_weight_that_was_read_is_kept_for_the_backward_pass(path):
    acts, weight = planted(0.1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = decode_dense_group(acts.requires_grad_(), None, Recorder(weight), path)
    assert all(t.shape != weight.shape and t.shape != weight.T.shape for t in kept)
    (grad,) = torch.autograd.grad(out.sum(), acts)
    assert_close(grad, weight.sum(1).expand_as(acts))


def test_auto_takes_the_path_of_the_density(monkeypatch):
    calls = []
    apply = features._Decode.apply
    monkeypatch.setattr(features._Decode, "apply", lambda *args: calls.append("sparse") or apply(*args))
    weight = torch.randn(100, 4)
    limit = round(features.SPARSE_BELOW * 1000)
    assert 0 < limit < 1000
    for n_active, expected in ((0, ["sparse"]), (limit - 1, ["sparse"]), (limit + 1, []), (1000, [])):
        acts = torch.zeros(1000)
        acts[torch.randperm(1000)[:n_active]] = 1.0
        assert_close(decode_dense_group(acts.reshape(10, 100), weight, refuse_to_read), acts.reshape(10, 100) @ weight)
        assert calls == expected
        calls.clear()
    decode_dense_group(torch.zeros(10, 100), weight, refuse_to_read, "dense")
    assert calls == []


def test_auto_asks_no_values_of_a_tensor_that_has_none():
    out = decode_dense_group(torch.zeros(3, 10, device="meta"), torch.zeros(10, 4, device="meta"), refuse_to_read)
    assert out.shape == (3, 4)


# ---------------------------------------------------------------- SparseFeatures


def example():
    return torch.tensor([[[0.0, 1.5, 0.0], [2.0, 0.0, -3.0]], [[0.0, 0.0, 0.0], [0.0, 0.0, 4.0]]])


def test_indices_and_values():
    acts = example()
    sparse = SparseFeatures(tuple(SparseGroup.of(a) for a in acts), (2,))
    assert sparse.indices.tolist() == [[0, 0, 1], [0, 1, 0], [0, 1, 2], [1, 1, 2]]
    assert sparse.values.tolist() == [1.5, 2.0, -3.0, 4.0]
    assert len(sparse) == 4
    assert torch.equal(sparse.to_dense(), acts)
    assert torch.equal(sparse.dense(1), acts[1])


def test_with_values():
    sparse = SparseFeatures(tuple(SparseGroup.of(a) for a in example()), (2,))
    edited = sparse.with_values(sparse.values * torch.tensor([0.0, 10.0, 1.0, -1.0]))
    assert torch.equal(edited.indices, sparse.indices)
    assert edited.to_dense().tolist() == [[[0, 0, 0], [20, 0, -3]], [[0, 0, 0], [0, 0, -4]]]
    assert sparse.values.tolist() == [1.5, 2.0, -3.0, 4.0]


def test_leading_shapes_and_ragged_groups():
    cc = Crosscoder(Wiring.clt(2), 4, (5, 7), dtype=torch.float64)
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64)
    dense, sparse = cc.encode(x), cc.encode(x, sparse=True)
    assert (sparse.shape, sparse.stacked) == ((3, 2), True)
    for g, acts in enumerate(sparse.to_dense()):
        assert torch.equal(acts, dense[g])
        assert torch.equal(sparse.dense(g), dense[g])
        flat = acts.reshape(6, -1)
        rows = sparse.indices[sparse.indices[:, 0] == g]
        assert torch.equal(flat[rows[:, 1], rows[:, 2]], sparse.values[sparse.indices[:, 0] == g])


def test_values_carry_gradients_to_the_input_and_from_dense():
    cc = Crosscoder(Wiring.clt(2), 4, 5, dtype=torch.float64)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    (want,) = torch.autograd.grad(cc.encode(x).pow(2).sum(), x)
    (got,) = torch.autograd.grad(cc.encode(x, sparse=True).values.pow(2).sum(), x)
    assert_close(got, want)
    (got,) = torch.autograd.grad(cc.encode(x, sparse=True).to_dense().pow(2).sum(), x)
    assert_close(got, want)


def test_editing_sparse_values_is_editing_dense_ones():
    cc = Crosscoder(Wiring.clt(3), 4, 20, dtype=torch.float64)
    sparse = cc.encode(torch.randn(3, 5, 4, dtype=torch.float64), sparse=True)
    values = torch.randn(len(sparse), dtype=torch.float64, requires_grad=True)
    edited = sparse.with_values(values)
    y, want = cc.decode(edited), cc.decode(edited.to_dense(), path="dense")
    assert_close(y, want, **TOLERANCE[torch.float64])
    upstream = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, values, upstream)
    (grad,) = torch.autograd.grad(want, values, upstream)
    assert_close(got, grad, **TOLERANCE[torch.float64])
