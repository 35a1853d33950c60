"""Native and circuit-tracer folders: exact round trips, whatever the wiring, activation and dtype."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

import clt_plugin as cp
from clt_plugin import core
from clt_plugin.core import Activation

WIRINGS = {
    "clt": cp.Wiring.clt(3),
    "clt, other sites": cp.Wiring.clt(2, read="resid_mid", write="mlp_out_before_norm"),
    "clt with skips": cp.Wiring.clt(3).with_skips(),
    "plt": cp.Wiring.plt(3),
    "local clt": cp.Wiring.local_clt(4, span=2),
    "acausal": cp.Wiring.acausal([1, 4, 7]),
    "weakly causal": cp.Wiring.weakly_causal([1, 4, 7]),
    "strictly causal": cp.Wiring.strictly_causal(3),
    "pre/post MLP": cp.Wiring.pre_post_mlp(2, reads="both"),
    "model diff": cp.Wiring.model_diff(["base", "chat"], layer=3),
    "sae": cp.Wiring.sae(("attn_out", 2)),
}
ACTIVATIONS = {
    "relu": {},
    "jumprelu": {"bandwidth": 0.02},
    "topk": {"k": 3, "scope": "joint", "score": "decoder_norm"},
    "batchtopk": {"k": 2},
}
HOST = cp.Host("owner/model", "0123abc", n_layers=9, exclude_first=1)


def make(
    wiring: cp.Wiring, activation: str = "jumprelu", dtype: torch.dtype = torch.float32, ragged: bool = True, **more
) -> cp.Crosscoder:
    settings = ACTIVATIONS[activation]
    sizes = [5 + g * ragged for g in range(wiring.n_groups)]
    widths = {"model": 4, "base": 4, "chat": 6}
    crosscoder = cp.Crosscoder(wiring, widths, sizes, activation, host=HOST, dtype=dtype, **settings, **more)
    for parameter in crosscoder.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    return crosscoder


def assert_same(a: cp.Crosscoder, b: cp.Crosscoder) -> None:
    for name in ("wiring", "layout", "activation", "host", "group_sizes", "is_partial", "dtype"):
        assert getattr(a, name) == getattr(b, name), name
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=0, atol=0, equal_nan=True, msg=key)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("wiring", WIRINGS)
def test_native_round_trip(tmp_path, wiring, activation, lazy):
    crosscoder = make(WIRINGS[wiring], activation)
    crosscoder.save(tmp_path / "x")
    loaded = cp.load(tmp_path / "x", lazy=lazy)
    assert loaded.is_lazy == lazy
    assert not loaded.training
    assert_same(crosscoder, loaded)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", ["native", "circuit-tracer"])
def test_dtypes_are_kept_or_converted(tmp_path, format, dtype):
    crosscoder = make(cp.Wiring.clt(3, read="resid_mid"), dtype=dtype, ragged=False)
    crosscoder.host = dataclasses.replace(HOST, n_layers=3)
    crosscoder.save(tmp_path / "x", format=format)
    assert_same(crosscoder, cp.load(tmp_path / "x"))
    wide = cp.load(tmp_path / "x", dtype=torch.float64, lazy=True)
    assert wide.dtype == torch.float64
    assert_same(crosscoder.double(), wide)


def test_measured_thresholds_and_stored_norms_are_kept(tmp_path):
    crosscoder = make(cp.Wiring.clt(2), "batchtopk").eval()
    for threshold in crosscoder.threshold:
        threshold.data.fill_(0.25)
    norms = (torch.rand(n) for n in crosscoder.group_sizes)
    crosscoder.stored_norms = torch.nn.ParameterList(torch.nn.Parameter(n, requires_grad=False) for n in norms)
    crosscoder.save(tmp_path / "x")
    assert_same(crosscoder, cp.load(tmp_path / "x"))


def test_a_selection_stays_one(tmp_path):
    part = make(cp.Wiring.clt(3)).select(layers=[1, 2], features={1: [4, 0]})
    part.save(tmp_path / "x")
    assert cp.load(tmp_path / "x").is_partial
    assert_same(part, cp.load(tmp_path / "x"))


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
@pytest.mark.parametrize("read", ["resid_pre", "resid_mid", "mlp_in_before_gain", "mlp_in"])
@pytest.mark.parametrize("write", ["mlp_out", "mlp_out_before_norm"])
def test_circuit_tracer_round_trip(tmp_path, read, write, activation, lazy):
    crosscoder = make(cp.Wiring.clt(3, read=read, write=write), activation, ragged=False)
    crosscoder.host = dataclasses.replace(HOST, n_layers=3, exclude_first=0)
    crosscoder.save(tmp_path / "x", format="circuit-tracer")
    loaded = cp.load(tmp_path / "x", lazy=lazy)
    assert_same(crosscoder, loaded)


def test_circuit_tracer_layout_by_its_own_formula(tmp_path):
    """Written by hand as published, with weights that no transposition survives; read by the formula of that tool."""
    n_layers, d, n = 3, 4, 6
    encoders = [torch.randn(n, d) for _ in range(n_layers)]
    decoders = [torch.randn(n, n_layers - i, d) for i in range(n_layers)]
    b_enc, b_dec = torch.randn(n_layers, n), torch.randn(n_layers, d)
    threshold = torch.rand(n_layers, n)
    from safetensors.torch import save_file

    for i in range(n_layers):
        tensors = {f"W_enc_{i}": encoders[i], f"b_enc_{i}": b_enc[i], f"b_dec_{i}": b_dec[i]}
        save_file(tensors | {f"threshold_{i}": threshold[i]}, tmp_path / f"W_enc_{i}.safetensors")
        save_file({f"W_dec_{i}": decoders[i]}, tmp_path / f"W_dec_{i}.safetensors")
    (tmp_path / "config.yaml").write_text("model_name: google/gemma-2-2b\nmodel_kind: cross_layer_transcoder\n")

    clt = cp.load(tmp_path)
    assert clt.sites.read_name == "resid_mid"
    assert clt.sites.write_name == "mlp_out"
    assert clt.host == cp.Host("google/gemma-2-2b", None, n_layers=3, exclude_first=1)
    x = torch.randn(n_layers, 5, d)
    y = torch.stack([b_dec[w].expand(5, d) for w in range(n_layers)]).clone()
    for i in range(n_layers):
        h = x[i] @ encoders[i].T + b_enc[i]
        acts = h * (h > threshold[i])
        for j in range(n_layers - i):
            y[i + j] += acts @ decoders[i][:, j]
    torch.testing.assert_close(clt(x), y)


def test_native_encoders_are_stored_latents_first(tmp_path):
    crosscoder = make(cp.Wiring.clt(2))
    crosscoder.save(tmp_path / "x")
    stored = load_file(tmp_path / "x" / "group_0.safetensors")
    assert torch.equal(stored["W_enc"], crosscoder.W_enc[0].T)
    assert stored["W_dec"].shape == (5, 8)


def test_third_party_activation_round_trips(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Square(Activation):
        name = "square"
        power: int = 2

        def __call__(self, h, threshold, scale, training):
            return h.relu() ** self.power

    core.ACTIVATIONS.add("square", Square)
    try:
        crosscoder = cp.Crosscoder(cp.Wiring.plt(2), 4, 6, "square", power=3)
        crosscoder.save(tmp_path / "x")
        assert cp.load(tmp_path / "x").activation == Square(3)
    finally:
        core.ACTIVATIONS.remove("square")
