"""Activation functions against their formulas, and the registry a third party adds to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jaxtyping
import pytest
import torch
from torch.testing import assert_close

from clt_plugin.core import (
    ACTIVATIONS,
    Activation,
    BatchTopK,
    Crosscoder,
    JumpReLU,
    RegistryError,
    ReLU,
    TopK,
    Wiring,
    WiringError,
    jumprelu,
    step,
)
from clt_plugin.core.activations import batchtopk, topk
from clt_plugin.core.registry import Registry

# ---------------------------------------------------------------- formulas

H = torch.tensor([[-1.0, 0.2, 0.5, 3.0], [0.4, 0.31, 0.3, 0.29]], dtype=torch.float64)
THETA = torch.tensor([0.0, 0.3, 0.3, 0.3], dtype=torch.float64)


def test_jumprelu_values():
    assert jumprelu(H, THETA).tolist() == [[0.0, 0.0, 0.5, 3.0], [0.4, 0.31, 0.0, 0.0]]
    assert step(H, THETA).tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]


def test_straight_through_gradients():
    h, theta = H.clone().requires_grad_(), THETA.clone().requires_grad_()
    upstream = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]], dtype=torch.float64)
    # Within 0.15 of their thresholds.
    inside = torch.tensor([[0, 1, 0, 0], [0, 1, 1, 1]], dtype=torch.float64)
    bandwidth = 0.3
    grad_h, grad_theta = torch.autograd.grad(jumprelu(h, theta, bandwidth), (h, theta), upstream)
    assert_close(grad_h, upstream * torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0]]))
    assert_close(grad_theta, (-(THETA / bandwidth) * inside * upstream).sum(0))
    (grad_step,) = torch.autograd.grad(step(h, theta, bandwidth), theta, upstream)
    assert_close(grad_step, (-(1 / bandwidth) * inside * upstream).sum(0))


def test_the_kernel_is_an_unbiased_slope_of_the_expected_value():
    """Averaged over many h, the straight-through gradient is the derivative of the mean, by finite differences."""
    h = torch.randn(400_000, 1, dtype=torch.float64)
    theta, delta = torch.tensor([0.5], dtype=torch.float64, requires_grad=True), 0.02
    for function in (jumprelu, step):
        (got,) = torch.autograd.grad(function(h, theta, 0.04).mean(), theta)
        up, down = (function(h, theta.detach() + shift).mean() for shift in (delta, -delta))
        assert_close(got, ((up - down) / (2 * delta)).reshape(1), rtol=0.05, atol=0)


@pytest.mark.parametrize(
    "function",
    [
        lambda h: h.relu(),
        lambda h: jumprelu(h, torch.full((6,), 0.2, dtype=h.dtype)),
        lambda h: topk(h, 2),
        lambda h: topk(h, 2, torch.arange(1.0, 7.0, dtype=h.dtype)),
        lambda h: topk(h, 4, rectify=False),
        lambda h: batchtopk(h, 2),
        lambda h: batchtopk(h, 2, torch.arange(1.0, 7.0, dtype=h.dtype)),
    ],
    ids=["relu", "jumprelu", "topk", "topk scaled", "topk unrectified", "batchtopk", "batchtopk scaled"],
)
def test_finite_differences(function):
    """Each function is smooth away from its jumps, and no entry here is within 1e-3 of one."""
    h = (torch.randperm(24).double().reshape(4, 6) - 11.37) / 10
    assert torch.autograd.gradcheck(function, h.requires_grad_())


def test_topk():
    h = torch.tensor([[3.0, 1.0, 2.0, -4.0], [-1.0, -2.0, 0.5, -3.0]])
    assert topk(h, 2).tolist() == [[3, 0, 2, 0], [0, 0, 0.5, 0]]
    assert topk(h, 9).tolist() == h.relu().tolist()
    assert topk(h, 1, torch.tensor([1.0, 10.0, 1.0, 100.0])).tolist() == [[0, 1, 0, 0], [0, 0, 0.5, 0]]


def test_topk_unrectified():
    """The k largest of h itself: where fewer than k are positive, negative ones are kept as they are."""
    h = torch.tensor([[3.0, 1.0, 2.0, -4.0], [-1.0, -2.0, 0.5, -3.0]])
    assert topk(h, 2, rectify=False).tolist() == [[3, 0, 2, 0], [-1, 0, 0.5, 0]]
    assert topk(h, 9, rectify=False).tolist() == h.tolist()
    assert TopK(2, rectify=False)(h, None, None, False).tolist() == topk(h, 2, rectify=False).tolist()


def test_batchtopk():
    h = torch.tensor([[3.0, 1.0, 2.0, -4.0], [-1.0, -2.0, 0.5, -3.0]])
    assert batchtopk(h, 1).tolist() == [[3, 0, 2, 0], [0, 0, 0, 0]]
    assert batchtopk(h.reshape(2, 1, 4), 1).tolist() == [[[3, 0, 2, 0]], [[0, 0, 0, 0]]]
    assert batchtopk(h, 1, torch.tensor([1.0, 10.0, 1.0, 1.0])).tolist() == [[3, 1, 0, 0], [0, 0, 0, 0]]
    assert batchtopk(h, 4).tolist() == h.relu().tolist()


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)])
def test_no_tokens(shape):
    h = torch.zeros(shape)
    for out in (topk(h, 2), batchtopk(h, 2), jumprelu(h, torch.zeros(4)), step(h, torch.zeros(4))):
        assert out.shape == shape


def test_shapes_are_checked_at_run_time():
    """A threshold of one entry would broadcast without complaint: the tests' run-time checks see it."""
    with pytest.raises(jaxtyping.TypeCheckError):
        jumprelu(torch.zeros(2, 3), torch.zeros(1))


# ---------------------------------------------------------------- settings


def test_make():
    assert Activation.make("relu") == ReLU()
    assert Activation.make("jumprelu", bandwidth=0.1) == JumpReLU(0.1)
    assert Activation.make("batchtopk", k=3, scope="joint") == BatchTopK(3, "joint")
    assert Activation.make(TopK(3)) == TopK(3)
    assert TopK(3).to_dict() == {"name": "topk", "k": 3, "scope": "group", "score": "activation"}
    assert repr(TopK(3)) == "TopK(k=3, scope='group', score='activation')"
    assert repr(TopK(3, rectify=False)) == "TopK(k=3, scope='group', score='activation', rectify=False)"
    assert TopK(3, rectify=False).to_dict()["rectify"] is False
    made = (ReLU(), JumpReLU(0.1), TopK(3, "joint"), TopK(3, rectify=False), BatchTopK(2, score="decoder_norm"))
    for activation in made:
        settings = activation.to_dict()
        assert Activation.make(settings.pop("name"), **settings) == activation


REFUSED = {
    "unknown setting": (("relu", {"k": 3}), "the activation 'relu' takes no settings, not k"),
    "unknown settings": (("jumprelu", {"k": 3, "b": 1}), "'jumprelu' takes bandwidth, not b, k"),
    "no k": (("topk", {}), "'topk' needs a k: how many latents to keep a token"),
    "zero k": (("topk", {"k": 0}), "k must be a whole number of at least 1, not 0"),
    "negative k": (("batchtopk", {"k": -2}), "k must be a whole number of at least 1, not -2"),
    "scope": (("topk", {"k": 1, "scope": "layer"}), "scope must be 'group' or 'joint', not 'layer'"),
    "score": (("topk", {"k": 1, "score": "norm"}), "score must be 'activation' or 'decoder_norm', not 'norm'"),
    "unrectified, joint": (("topk", {"k": 1, "rectify": False, "scope": "joint"}), "ranks h within a group"),
    "unrectified, ranked": (("topk", {"k": 1, "rectify": False, "score": "decoder_norm"}), "and score 'activation'"),
    "BatchTopK unrectified": (("batchtopk", {"k": 1, "rectify": False}), "takes k, scope, score, not rectify"),
    "both": ((TopK(3), {"k": 4}), "has its settings: k can't be given beside it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_settings(name):
    (activation, settings), message = REFUSED[name]
    with pytest.raises(WiringError, match=message):
        Crosscoder(Wiring.clt(2), 4, 6, activation, **settings)


def test_unknown_name():
    with pytest.raises(RegistryError, match="no activation is called 'gelu': the known ones are batchtopk, jumprelu"):
        Crosscoder(Wiring.clt(2), 4, 6, "gelu")


# ---------------------------------------------------------------- a third party's


@dataclass(frozen=True)
class Squared(Activation):
    """``factor * max(h, 0) ** 2``."""

    name: ClassVar[str] = "squared"
    factor: float

    def __call__(self, h, threshold, scale, training):
        return self.factor * h.relu() ** 2


@pytest.fixture
def squared():
    ACTIVATIONS.add("squared", Squared)
    yield
    ACTIVATIONS.remove("squared")


@pytest.mark.usefixtures("squared")
def test_a_third_partys_activation():
    cc = Crosscoder(Wiring.clt(2), 4, 6, "squared", factor=2.0, dtype=torch.float64)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    for g in range(2):
        assert_close(cc.encode(x)[g], 2 * (x[g] @ cc.W_enc[g] + cc.b_enc[g]).relu() ** 2)
    assert cc.threshold is None
    with pytest.raises(WiringError, match="the activation 'squared' needs settings: factor"):
        Activation.make("squared")
    with pytest.raises(RegistryError, match="the activation 'squared' is registered already"):
        ACTIVATIONS.add("squared", Squared)


def test_the_third_partys_activation_is_gone_again():
    assert "squared" not in ACTIVATIONS
    assert list(ACTIVATIONS) == ["relu", "jumprelu", "topk", "batchtopk"]


def test_registry():
    registry = Registry("thing")
    assert registry.register("one")(1) == 1
    assert ("one" in registry, list(registry), registry.values()) == (True, ["one"], [1])
    for use in (registry.__getitem__, registry.remove):
        with pytest.raises(RegistryError, match="no thing is called 'two': the known ones are one"):
            use("two")
    registry.remove("one")
    assert "one" not in registry
