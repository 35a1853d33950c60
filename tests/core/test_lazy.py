"""A lazy crosscoder is the crosscoder in memory, whatever is asked of it."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from clt_plugin.core import Crosscoder, File, FormatError, LazyStore, Piece
from core.oracle import WIRINGS, build, inputs, random_features

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def on_disk(cc, folder, dtype=None):
    """Write a crosscoder's weights, a file a group, and return one that reads them lazily, with the rest copied."""
    pieces = {}
    for g in range(cc.wiring.n_groups):
        path = str(folder / f"group_{g}.safetensors")
        encoder, decoder = cc.W_enc[g].detach(), cc.W_dec[g].detach()
        save_file({"W_enc": encoder.contiguous(), "W_dec": decoder.contiguous()}, path)
        pieces["W_enc", g] = (Piece(File(path), "W_enc", tuple(encoder.shape), rows_last=True),)
        pieces["W_dec", g] = (Piece(File(path), "W_dec", tuple(decoder.shape)),)
    for n, skip in enumerate(cc.W_skip):
        path = str(folder / f"skip_{n}.safetensors")
        save_file({"W_skip": skip.detach()}, path)
        pieces["W_skip", n] = (Piece(File(path), "W_skip", tuple(skip.shape)),)
    dtype = dtype or cc.dtype
    lazy = Crosscoder(
        cc.wiring, cc.layout.width, cc.group_sizes, cc.activation, host=cc.host, store=LazyStore(pieces), dtype=dtype
    )
    lazy.load_state_dict({k: v for k, v in cc.state_dict().items() if not k.startswith("W_")})
    return lazy


@pytest.fixture(params=["clt", "sum", "ragged_latents", "ragged_skips", "skips", "acausal"])
def pair(request, tmp_path):
    cc = build(request.param, "topk-group-decoder_norm")
    return cc, on_disk(cc, tmp_path)


def test_encode_and_decode(pair):
    cc, lazy = pair
    assert lazy.is_lazy
    assert "lazy" in repr(lazy)
    x = inputs(cc, (2, 3))
    for got, want in zip(lazy.encode(x), cc.encode(x), strict=True):
        assert_close(got, want, **EXACT)
    sparse, want = lazy.encode(x, sparse=True), cc(x)
    decoded = [lazy.decode(sparse, x), lazy.decode(sparse.to_dense(), x), lazy.decode(cc.encode(x), x, "dense")]
    for y in (lazy(x), *decoded):
        for site in want:
            assert_close(y[site], want[site], **EXACT)
    for g in range(cc.wiring.n_groups):
        rows = torch.tensor([3, 0])
        assert torch.equal(lazy.decoder_vectors(g, rows), cc.decoder_vectors(g, rows))
        assert torch.equal(lazy.encoder_vectors(g), cc.encoder_vectors(g))
        assert_close(lazy.decoder_norms(g, "separate"), cc.decoder_norms(g, "separate"))


@pytest.mark.parametrize("path", ["auto", "dense", "sparse"])
def test_gradients(pair, path):
    cc, lazy = pair
    x, features = inputs(cc, (4,), grad=True), [f.requires_grad_() for f in random_features(cc, (4,))]
    results = []
    for each in (cc, lazy):
        y, acts = each.decode(features, x, path=path), each.encode(x)
        loss = sum((v * torch.arange(v.numel()).reshape(v.shape)).sum() for v in [*y.values(), *acts])
        biases = [*each.b_enc, *each.b_dec]
        results.append(torch.autograd.grad(loss, [*x.values(), *features, *biases], allow_unused=True))
    for want, got in zip(*results, strict=True):
        assert_close(got, want, **EXACT)


def test_gradients_through_sparse_features(pair):
    cc, lazy = pair
    x = inputs(cc, (4,), grad=True)
    grads = []
    for each in (cc, lazy):
        y = each.decode(each.encode(x, sparse=True), x)
        loss = sum((v * torch.arange(v.numel()).reshape(v.shape)).sum() for v in y.values())
        grads.append(torch.autograd.grad(loss, list(x.values())))
    for want, got in zip(*grads, strict=True):
        assert_close(got, want, **EXACT)


def test_state_and_pickles_are_complete(pair):
    cc, lazy = pair
    x = inputs(cc)
    assert set(lazy.state_dict()) == set(cc.state_dict())
    for name, value in lazy.state_dict().items():
        assert torch.equal(value, cc.state_dict()[name])
        assert value.is_contiguous()
    fresh = build_like(cc)
    fresh.load_state_dict(lazy.state_dict())
    for twin in (fresh, lazy.materialize(), pickle.loads(pickle.dumps(lazy)), copy.deepcopy(lazy)):
        assert not twin.is_lazy
        for site, y in twin(x).items():
            assert_close(y, cc(x)[site], **EXACT)
    assert lazy.is_lazy
    assert cc.materialize() is cc


def build_like(cc):
    return Crosscoder(cc.wiring, cc.layout.width, cc.group_sizes, cc.activation, dtype=cc.dtype)


def test_as_a_part_of_a_larger_module(tmp_path):
    cc = build("clt")
    whole = torch.nn.ModuleDict({"clt": on_disk(cc, tmp_path)})
    assert set(whole.state_dict()) == {f"clt.{name}" for name in cc.state_dict()}


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_another_dtype(tmp_path, stored):
    cc = build("skips", dtype=stored)
    lazy = on_disk(cc, tmp_path, dtype=torch.float32)
    assert lazy.encoder_vectors(0).dtype == torch.float32
    x = inputs(cc)
    cc.to(torch.float64)
    assert lazy.to(torch.float64) is lazy
    assert (lazy.dtype, lazy.is_lazy) == (torch.float64, True)
    assert lazy.decoder_vectors(0, torch.tensor([1])).dtype == torch.float64
    for site, y in lazy(x).items():
        assert y.dtype == torch.float64
        assert_close(y, cc(x)[site], **EXACT)
    assert {value.dtype for value in lazy.state_dict().values()} == {torch.float64}
    assert lazy.bfloat16()(x)[cc.wiring.write_sites[0]].dtype == torch.bfloat16


def test_select_reads_what_it_keeps(tmp_path):
    cc = build("skips", "jumprelu")
    lazy = on_disk(cc, tmp_path)
    part = lazy.select(layers=[1, 2], features={1: [4, 0]})
    want = cc.select(layers=[1, 2], features={1: [4, 0]})
    assert not part.is_lazy
    assert list(part.state_dict()) == list(want.state_dict())
    for name, value in part.state_dict().items():
        assert torch.equal(value, want.state_dict()[name])
        assert value.is_contiguous()


def test_only_rows_of_active_latents_are_read(tmp_path, monkeypatch):
    cc = build("clt")
    lazy, asked = on_disk(cc, tmp_path), []
    get = LazyStore.get

    def recorded(self, kind, group, rows=None):
        asked.append((kind, group, None if rows is None else rows.tolist()))
        return get(self, kind, group, rows)

    monkeypatch.setattr(LazyStore, "get", recorded)
    features = [torch.zeros(2, 6, dtype=torch.float64) for _ in range(3)]
    features[0][0, 5], features[0][1, 2], features[2][1, 4] = 1.0, 2.0, 3.0
    assert_close(lazy.decode(features, path="sparse"), cc.decode(features))
    assert asked == [("W_dec", 0, [2, 5]), ("W_dec", 1, []), ("W_dec", 2, [4])]


def test_files_that_change_are_refused(tmp_path):
    """Whatever replaces them: biases are of the file that was there at first."""
    cc = build("clt")
    lazy, path = on_disk(cc, tmp_path), tmp_path / "group_1.safetensors"
    before = path.read_bytes()
    lazy.to(torch.float32).decoder_vectors(1)
    for content in (before[:-8], before[:-8] + bytes(8), None):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(FormatError, match=r"^group_1\.safetensors changed since it was opened: load it again"):
            lazy.decoder_vectors(1)
        lazy.decoder_vectors(0)


def test_damage_is_refused_when_it_is_read(tmp_path):
    cc = build("clt")
    lazy = on_disk(cc, tmp_path)
    features, damaged = [torch.zeros(2, 6, dtype=torch.float64) for _ in range(3)], cc.W_dec[1].detach().clone()
    damaged[3, 2] = float("nan")
    save_file({"W_dec": damaged}, str(tmp_path / "group_1.safetensors"))
    lazy._lazy_store = dataclasses.replace(lazy.store, stamps=None)  # opened after that
    features[1][0, 2] = 1.0
    assert lazy.decode(features, path="sparse")
    features[1][1, 3] = 1.0
    with pytest.raises(FormatError, match=r"^group_1\.safetensors: W_dec holds values that are not finite"):
        lazy.decode(features, path="sparse")


def test_the_cases_are_lazy_in_all_wirings(tmp_path):
    for name in WIRINGS:
        folder = tmp_path / name
        folder.mkdir()
        cc = build(name, "jumprelu")
        lazy, x = on_disk(cc, folder), inputs(cc)
        for site, y in lazy(x).items():
            assert_close(y, cc(x)[site], **EXACT)
