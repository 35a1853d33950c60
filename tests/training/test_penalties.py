"""Penalties against loops over tokens and latents, dense and sparse, and where their gradients go."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.testing import assert_close

from clt_plugin.core import RegistryError, WiringError
from clt_plugin.training.forward import ForwardPass
from clt_plugin.training.penalties import (
    L1,
    PENALTIES,
    Asymmetry,
    Penalty,
    Quadratic,
    Tanh,
    from_settings,
    total,
)
from core.oracle import ACTIVATIONS, brute_decode, brute_encode, brute_norms, build, copies, inputs
from training.passes import N_TOKENS, dense, gradients, sparse, targets


def brute_l0(run):
    return [sum(float(a != 0) for a in group.acts.flatten()) / N_TOKENS for group in run.groups]


def brute(penalty: Penalty, run: ForwardPass) -> float:
    """The documented formulas, one latent of one token at a time."""
    crosscoder, p, l0 = run.crosscoder, copies(run.crosscoder), brute_l0(run)
    if isinstance(penalty, Quadratic):
        l0 = [sum(l0)] if penalty.scope == "total" else l0
        return sum(2 / penalty.target * (n - penalty.target) ** 2 for n in l0)
    if isinstance(penalty, Asymmetry) and penalty.c is None:
        aim = penalty.profile or [1.0] * len(l0)
        return sum((n / sum(l0) - q / sum(aim)) ** 2 for n, q in zip(l0, aim, strict=True)) * len(l0)
    value = 0.0
    for g, group in enumerate(run.groups):
        norms = brute_norms(crosscoder, p, g, penalty.norms).tolist()
        for row in group.acts.tolist():
            for act, norm in zip(row, norms, strict=True):
                value += math.tanh(penalty.c * norm * act) if isinstance(penalty, Tanh) else norm * act
    return value / N_TOKENS


SPARSITY = [
    Tanh(1.0, c=0.7),
    Tanh(1.0, norms="separate"),
    L1(1.0),
    L1(1.0, norms="concatenated"),
    Quadratic(1.0, target=2.0),
    Quadratic(1.0, target=5.0, scope="total"),
    Asymmetry(1.0),
    Asymmetry(1.0, profile=(3.0, 1.0, 1.0)),
]


@pytest.mark.parametrize("penalty", SPARSITY, ids=str)
def test_the_formula_dense_and_sparse(penalty):
    run = dense()
    value = penalty(run)
    assert value.item() == pytest.approx(brute(penalty, run), rel=1e-12)
    other = sparse(run)
    assert len(other.groups[0].acts) < other.groups[0].n_tokens * other.groups[0].n_latents
    assert_close(penalty(other), value)
    expected = gradients(value, run.crosscoder)
    for name, got in gradients(penalty(other), run.crosscoder).items():
        assert_close(got, expected[name], msg=lambda text, name=name: f"{name}: {text}")
    # Thresholds have the straight-through gradient; decoders and encoders theirs, unless only a count is penalised.
    assert all(expected[f"threshold.{g}"].any() for g in range(3))
    counts = isinstance(penalty, Quadratic | Asymmetry)
    assert all(expected[f"{name}.{g}"].any() != counts for g in range(3) for name in ("W_dec", "W_enc", "b_enc"))


@pytest.mark.parametrize("penalty", [Tanh(1.0), Tanh(1.0, norms="separate"), L1(1.0)], ids=str)
def test_gradients_against_finite_differences(penalty):
    crosscoder = build("clt", "relu")
    x, y = inputs(crosscoder, (N_TOKENS,)), targets(crosscoder)
    found = gradients(penalty(ForwardPass.of(crosscoder, x, y)), crosscoder)
    for name in ("W_dec.0", "W_enc.1", "b_enc.2"):
        parameter, eps = crosscoder.get_parameter(name).data, 1e-6
        direction, values = torch.randn_like(parameter), []
        for shift in (eps, -2 * eps):
            parameter += shift * direction
            values.append(penalty(ForwardPass.of(crosscoder, x, y)).item())
        parameter += eps * direction
        slope = (found[name] * direction).sum().item()
        assert abs(slope) > 1e-3
        assert slope == pytest.approx((values[0] - values[1]) / (2 * eps), rel=1e-5)


@pytest.mark.parametrize("penalty", [*SPARSITY, Asymmetry(1.0, c=1.0)], ids=str)
def test_a_batch_shown_twice_costs_the_same(penalty):
    """A penalty is a mean, so that its weight means the same for every batch size."""
    crosscoder = build("clt", "jumprelu")
    x, y = inputs(crosscoder, (N_TOKENS,)), targets(crosscoder)
    once, twice = (
        penalty(ForwardPass.of(crosscoder, *({site: v.repeat(n, 1) for site, v in z.items()} for z in (x, y))))
        for n in (1, 2)
    )
    assert_close(once, twice)


def test_asymmetry_is_least_for_the_profile_and_blind_to_scale():
    run = dense(activation="jumprelu")
    l0 = brute_l0(run)
    assert Asymmetry(1.0, profile=tuple(10 * n for n in l0))(run).item() == pytest.approx(0, abs=1e-20)
    assert Asymmetry(1.0)(run).item() > 1e-4
    silent = build("clt", "jumprelu")
    for bias in silent.b_enc:
        bias.data.fill_(-100)
    nothing = ForwardPass.of(silent, run.inputs, run.targets)
    assert Asymmetry(1.0)(nothing).item() == 0
    smooth = Asymmetry(1.0, c=1e6)(dense(activation="relu"))
    torch.manual_seed(0)
    assert smooth.item() > 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_dense_pass_is_the_crosscoders(activation):
    run = dense("skips", activation)
    crosscoder, p = run.crosscoder, copies(run.crosscoder)
    features = brute_encode(crosscoder, p, run.inputs)
    for group, acts in zip(run.groups, features, strict=True):
        assert_close(group.acts, torch.stack(acts))
    expected = brute_decode(crosscoder, p, features, run.inputs)
    error = sum((expected[site] - run.targets[site]).square().sum().item() for site in expected) / N_TOKENS
    assert run.error().item() == pytest.approx(error, rel=1e-12)


def test_weights_rises_and_pressure():
    run = dense()
    tanh, l1, asymmetry = Tanh(0.5), L1(2.0), Asymmetry(3.0)
    value, shown = total([tanh, l1, asymmetry], run, rise=0.25, pressure=[1.0, 10.0, 100.0])
    parts = [0.5 * tanh.of_group(group) + 2 * l1.of_group(group) for group in run.groups]
    expected = 0.25 * (parts[0] + 10 * parts[1] + 100 * parts[2]) + 3 * asymmetry(run)
    assert_close(value, expected)
    assert shown["tanh"].item() == pytest.approx(brute(tanh, run))
    assert_close(total([tanh], run, pressure=2.0)[0], tanh(run))
    assert total([], run)[0] == 0


@dataclass(frozen=True)
class _Mine(Penalty):
    name: ClassVar[str] = "mine"

    def __call__(self, run):
        return run.groups[0].acts.square().sum()


def test_a_third_party_adds_one():
    PENALTIES.add("mine", _Mine)
    try:
        penalties = from_settings([{"name": "mine", "weight": 2.0}, Tanh(1.0)])
        assert penalties == (_Mine(2.0), Tanh(1.0))
        assert from_settings([each.to_dict() for each in penalties]) == penalties
        run = dense()
        assert_close(total(penalties[:1], run, rise=0.0)[0], 2 * run.groups[0].acts.square().sum())
    finally:
        PENALTIES.remove("mine")


def test_refusals():
    with pytest.raises(WiringError, match="without thresholds that count has no gradient"):
        Quadratic(1.0, target=2.0)(dense(activation="relu"))
    with pytest.raises(WiringError, match="needs weight: it takes weight, c, norms"):
        Penalty.make("tanh", c=1.0)
    with pytest.raises(WiringError, match="has no setting d"):
        Penalty.make("tanh", weight=1.0, d=1.0)
    with pytest.raises(RegistryError, match="no penalty is called"):
        Penalty.make("elastic", weight=1.0)
    with pytest.raises(WiringError, match="target L0 above 0"):
        Quadratic(1.0, target=0.0)
    with pytest.raises(WiringError, match="2 numbers, but there are 3 groups"):
        Asymmetry(1.0, profile=(1.0, 2.0))(dense())
