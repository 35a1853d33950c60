"""The controller, on plants whose answer is known and in training."""

from __future__ import annotations

import math

import jaxtyping
import pytest
import torch
from torch.testing import assert_close

from clt_plugin.core import Crosscoder, Wiring
from clt_plugin.training.forward import ForwardPass
from clt_plugin.training.penalties import L1, Tanh, total
from clt_plugin.training.schedules import learning_rate
from clt_plugin.training.sparsity import L0Controller
from clt_plugin.training.start import set_firing_rate
from clt_plugin.training.thresholds import keep_above


def plant(controller, exponents, lag, n_steps, weight, state=None):
    """L0 of each group moves towards 100 * (weight * pressure)^-exponent, over about `lag` steps."""
    logs, seen = state or [math.log(1000.0)] * len(exponents), []
    for _ in range(n_steps):
        pressure = controller.pressure
        pressure = [pressure] * len(exponents) if isinstance(pressure, float) else pressure
        aims = [math.log(100) - a * math.log(weight * p) for a, p in zip(exponents, pressure, strict=True)]
        logs = [old + (aim - old) / lag for old, aim in zip(logs, aims, strict=True)]
        seen.append([math.exp(value) for value in logs])
        controller.update(seen[-1])
    return seen, logs


@pytest.mark.parametrize("weight", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("exponent", [0.6, 1.2])
@pytest.mark.parametrize("lag", [1, 30])
def test_it_settles_on_the_target_whatever_the_plant(weight, exponent, lag):
    seen, _ = plant(L0Controller([20.0, 7.0], horizon=50), [exponent] * 2, lag, 1500, weight)
    assert all(abs(a / 20 - 1) < 0.02 and abs(b / 7 - 1) < 0.02 for a, b in seen[-300:])


def test_a_total_and_a_killed_run():
    whole, _ = plant(L0Controller(30.0, horizon=50), [0.5, 1.0], 10, 800, 1.0)
    assert sum(whole[-1]) == pytest.approx(30, rel=0.02)
    first = L0Controller(30.0, horizon=50)
    begun, state = plant(first, [0.5, 1.0], 10, 300, 1.0)
    again = L0Controller(30.0, horizon=50)
    again.load_state_dict(first.state_dict())
    rest, _ = plant(again, [0.5, 1.0], 10, 500, 1.0, state)
    assert begun + rest == whole


def test_silence_is_far_below_the_target_but_not_infinitely():
    controller = L0Controller([5.0], horizon=10, limit=2.0)
    assert controller.pressure == [1.0]
    for _ in range(100):
        controller.update([0.0])
    assert_close(controller.pressure, [math.exp(-2)])
    with pytest.raises(ValueError, match="L0 came for 2 groups"):
        controller.update([1.0, 2.0])
    with pytest.raises(ValueError, match="are above 0"):
        L0Controller(0.0)


def dictionary(n_layers, d, n_features):
    """Sparse features, each with a direction at what every layer reads and at what it writes."""
    reads, writes = torch.nn.functional.normalize(torch.randn(2, n_layers, n_features, d), dim=-1)

    def batch(n):
        features = (torch.rand(n, n_features) < 0.08) * torch.rand(n, n_features) * 3
        return features @ reads, features @ writes

    return batch


def train(activation, penalty, target, n_steps=450, **settings):
    batch, rate = dictionary(2, 12, 24), 4e-3
    crosscoder = Crosscoder(Wiring.clt(2), 12, 32, activation, **settings)
    set_firing_rate(crosscoder, batch(1000)[0], 0.2)
    controller = L0Controller(target, horizon=n_steps // 40)
    optimizer = torch.optim.Adam(crosscoder.parameters(), lr=rate, betas=(0.9, 0.99))
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = rate * learning_rate(step, n_steps)
        run = ForwardPass.of(crosscoder, *batch(192))
        loss = run.error() + total([penalty], run, pressure=controller.pressure)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        keep_above(crosscoder)
        controller.update([group.l0().item() for group in run.groups])
    with torch.no_grad():
        return torch.stack([(acts != 0).sum(-1).double().mean() for acts in crosscoder.encode(batch(4000)[0])])


@pytest.mark.parametrize(
    ("activation", "penalty", "target"),
    [
        ("jumprelu", Tanh(1.0), [2.0, 3.0]),
        ("relu", L1(0.001), 4.0),
    ],
    ids=str,
)
def test_training_reaches_the_target(activation, penalty, target, monkeypatch):
    """Within 10% on tokens not trained on, from weights three orders of magnitude apart."""
    # Checking shapes takes ten times as long as a step this small.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    l0 = train(activation, penalty, target, **({"bandwidth": 0.5} if activation == "jumprelu" else {}))
    reached = l0.sum() if isinstance(target, float) else l0
    assert (reached / torch.tensor(target) - 1).abs().max() < 0.1
