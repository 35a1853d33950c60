"""Weights sliced from safetensors files: the same as the tensors that were written, whichever way they lie there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from clt_plugin.core import File, FormatError, LazyStore, MemoryStore, Piece, Store
from clt_plugin.core.store import product, read_piece, streamed_product

N, D = 7, 5
ROWS = {
    "all": None,
    "some": [1, 4],
    "none": [],
    "unsorted": [5, 0, 3],
    "repeated": [2, 2, 6, 2],
    "one": [6],
}


@pytest.fixture
def weight():
    return torch.randn(N, 3 * D)


def write(folder, name="weights.safetensors", **tensors):
    path = folder / name
    own = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    save_file(own, path)
    return str(path)


def layouts(folder, weight):
    """Write the same (N, 3 D) weights in several ways: {name: pieces}."""
    path = write(folder, flat=weight, last=weight.T, cube=weight.reshape(N, 3, D), wide=weight.repeat(1, 2))
    second = write(folder, "second.safetensors", left=weight[:, :D], right=weight[:, D:].T)
    return {
        "flat": (Piece(File(path), "flat", (N, 3 * D)),),
        "latents last": (Piece(File(path), "last", (3 * D, N), rows_last=True),),
        "three axes": (Piece(File(path), "cube", (N, 3, D)),),
        "columns": (Piece(File(path), "wide", (N, 6 * D), columns=(D, 2 * D)),),
        "side by side": (
            Piece(File(second), "left", (N, D)),
            Piece(File(second), "right", (2 * D, N), rows_last=True),
        ),
        "writes of a cube": tuple(Piece(File(path), "cube", (N, 3, D), columns=(w, w + 1)) for w in range(3)),
        "columns, latents last": tuple(
            Piece(File(path), "last", (3 * D, N), rows_last=True, columns=(w * D, (w + 1) * D)) for w in range(3)
        ),
    }


LAYOUTS = [
    "flat",
    "latents last",
    "three axes",
    "columns",
    "side by side",
    "writes of a cube",
    "columns, latents last",
]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_get(tmp_path, weight, layout, rows):
    pieces = layouts(tmp_path, weight)
    assert list(pieces) == LAYOUTS
    index = None if ROWS[rows] is None else torch.tensor(ROWS[rows], dtype=torch.long)
    want = weight if index is None else weight[index]
    if layout == "columns":
        want = want[:, D : 2 * D]
    assert torch.equal(LazyStore({("W_dec", 3): pieces[layout]}).get("W_dec", 3, index), want)


def test_any_rows(tmp_path_factory):
    weight, folder = torch.randn(N, 3 * D), tmp_path_factory.mktemp("rows")
    pieces = layouts(folder, weight)

    @settings(max_examples=30, suppress_health_check=[HealthCheck.differing_executors])
    @given(st.sampled_from([name for name in LAYOUTS if name != "columns"]), st.lists(st.integers(0, N - 1)))
    def check(layout, rows):
        index = torch.tensor(rows, dtype=torch.long)
        assert torch.equal(LazyStore({("W_enc", 0): pieces[layout]}).get("W_enc", 0, index), weight[index])

    check()


def test_both_stores_answer_alike(tmp_path, weight):
    """`get` is latents first for the encoder too, which a crosscoder holds latents last."""
    skip = torch.randn(4, 6)
    path = write(tmp_path, encoder=weight, decoder=weight + 1, skip=skip)
    memory = MemoryStore({"W_enc": [weight.T], "W_dec": [weight + 1], "W_skip": [skip]})
    lazy = LazyStore(
        {
            ("W_enc", 0): (Piece(File(path), "encoder", (N, 3 * D)),),
            ("W_dec", 0): (Piece(File(path), "decoder", (N, 3 * D)),),
            ("W_skip", 0): (Piece(File(path), "skip", (4, 6)),),
        }
    )
    assert isinstance(memory, Store)
    assert isinstance(lazy, Store)
    assert (memory.lazy, lazy.lazy) == (False, True)
    for kind in ("W_enc", "W_dec", "W_skip"):
        assert torch.equal(memory.get(kind, 0), lazy.get(kind, 0))
        rows = torch.tensor([3, 1])
        assert torch.equal(memory.get(kind, 0, rows), lazy.get(kind, 0, rows))
    for kind, width in (("W_enc", 3 * D), ("W_dec", N), ("W_skip", 4)):
        x = torch.randn(2, width)
        assert torch.equal(product(x, memory, kind, 0), product(x, lazy, kind, 0))


def test_a_store_that_keeps_some_latents(tmp_path, weight):
    path = write(tmp_path, weight=weight, skip=torch.eye(N))
    pieces = {(kind, 0): (Piece(File(path), "weight", (N, 3 * D)),) for kind in ("W_enc", "W_dec")}
    pieces["W_skip", 0] = (Piece(File(path), "skip", (N, N)),)
    store = LazyStore(pieces, latents={0: torch.tensor([6, 2, 3])})
    assert torch.equal(store.get("W_enc", 0), weight[[6, 2, 3]])
    assert torch.equal(store.get("W_dec", 0, torch.tensor([2, 0])), weight[[3, 6]])
    assert torch.equal(store.get("W_skip", 0), torch.eye(N))


# ---------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [None, [3, 1]])
def test_dtypes_are_kept_or_converted(tmp_path, weight, dtype, rows):
    stored = weight.to(dtype)
    path = write(tmp_path, weight=stored)
    rows = None if rows is None else torch.tensor(rows)
    want = stored if rows is None else stored[rows]
    store = LazyStore({("W_dec", 0): (Piece(File(path), "weight", (N, 3 * D)),)})
    kept = store.get("W_dec", 0, rows)
    assert kept.dtype == dtype
    assert torch.equal(kept, want)
    moved = store.moved(torch.float64, torch.device("cpu"))
    assert moved.get("W_dec", 0, rows).dtype == torch.float64
    assert torch.equal(moved.get("W_dec", 0, rows), want.double())
    assert store.dtype is None


def test_moved_to_another_device(tmp_path, weight):
    path = write(tmp_path, weight=weight)
    store = LazyStore({("W_dec", 0): (Piece(File(path), "weight", (N, 3 * D)),)}).moved(
        torch.float16, torch.device("meta")
    )
    got = store.get("W_dec", 0)
    assert (got.device.type, got.dtype, got.shape) == ("meta", torch.float16, weight.shape)


# ---------------------------------------------------------------- scales


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows_last", [False, True])
def test_scales(tmp_path, weight, rows_last, dtype):
    """A factor a column and one a row, for whichever rows are read, in whichever order, however they are asked for."""
    stored, columns, factors = weight.to(dtype), torch.rand(3 * D) + 0.5, torch.rand(N) + 0.5
    path = write(tmp_path, W=stored.T if rows_last else stored)
    shape = (3 * D, N) if rows_last else (N, 3 * D)
    piece = Piece(File(path), "W", shape, rows_last=rows_last, scale=columns, row_scale=factors)
    wide = torch.promote_types(dtype, torch.float32)
    want = stored.to(wide) * columns * factors.to(wide)[:, None]
    for rows in (None, slice(2, 5), *(torch.tensor(rows, dtype=torch.long) for rows in ROWS.values() if rows)):
        got = read_piece(piece, rows)
        assert got.dtype == wide
        assert torch.equal(got, want if rows is None else want[rows])
    store = LazyStore({("W_dec", 0): (piece,), ("W_enc", 0): (piece,)}, dtype=torch.float64)
    x, y = torch.randn(2, N, dtype=torch.float64), torch.randn(2, 3 * D, dtype=torch.float64)
    torch.testing.assert_close(product(x, store, "W_dec", 0), x @ want.double())
    torch.testing.assert_close(product(y, store, "W_enc", 0), y @ want.double().T)
    kept = LazyStore({("W_dec", 0): (piece,)}, latents={0: torch.tensor([6, 2, 3])})
    assert torch.equal(kept.get("W_dec", 0), want[[6, 2, 3]])
    assert torch.equal(kept.get("W_dec", 0, torch.tensor([2, 0])), want[[3, 6]])


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("layout", [{}, {"rows_last": True}])
def test_not_finite(tmp_path, weight, value, layout):
    weight[3, 4] = value
    path = write(tmp_path, "layer_2.safetensors", W=weight.T if layout else weight)
    piece = Piece(File(path), "W", tuple(weight.shape), **layout)
    message = r"^layer_2\.safetensors: W holds values that are not finite \(nan or inf\)"
    with pytest.raises(FormatError, match=message):
        read_piece(piece)
    with pytest.raises(FormatError, match=message):
        read_piece(piece, torch.tensor([1, 3]))
    assert torch.isfinite(read_piece(piece, torch.tensor([1, 2]))).all()


def test_damaged_files(tmp_path, weight):
    path = write(tmp_path, "layer_2.safetensors", W=weight)
    piece = Piece(File(path), "W", tuple(weight.shape))
    whole = (tmp_path / "layer_2.safetensors").read_bytes()
    for length in (0, 6, 40, len(whole) - 4):
        (tmp_path / "layer_2.safetensors").write_bytes(whole[:length])
        with pytest.raises(FormatError, match=r"^layer_2\.safetensors: cannot read W"):
            read_piece(piece)
    (tmp_path / "layer_2.safetensors").write_bytes(whole)
    assert torch.equal(read_piece(piece), weight)
    with pytest.raises(FormatError, match=r"^layer_2\.safetensors: cannot read V"):
        read_piece(Piece(File(path), "V", tuple(weight.shape)))
    (tmp_path / "layer_2.safetensors").unlink()
    with pytest.raises(FormatError, match=r"^layer_2\.safetensors: cannot read W"):
        read_piece(piece)


# ---------------------------------------------------------------- products


def test_streamed_product_is_differentiable_twice_and_keeps_nothing():
    weight, reads, kept = torch.randn(4, 3, dtype=torch.float64), [], []

    def read():
        reads.append(1)
        return weight

    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = streamed_product(x, read)
    assert torch.equal(y, x @ weight)
    assert (len(reads), kept) == (1, [])
    assert torch.autograd.gradcheck(lambda x: streamed_product(x, read), x)
    assert torch.autograd.gradgradcheck(lambda x: streamed_product(x, read), x)
