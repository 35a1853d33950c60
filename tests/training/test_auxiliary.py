"""Losses for dead latents and for faithful layers, against loops, explicit Jacobians and known answers."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from clt_plugin.core import Site, Wiring, WiringError
from clt_plugin.training._groups import read
from clt_plugin.training.auxiliary import (
    AuxiliaryTopK,
    Faithfulness,
    JacobianMatching,
    PreActivation,
    mlp_response,
    own_response,
    tracked,
)
from clt_plugin.training.forward import ForwardPass
from core.oracle import brute_norms, build, copies, inputs
from training.passes import N_TOKENS, dense, gradients, sparse, targets

DEAD = tuple(torch.tensor([True, False, True, True, False, False]) for _ in range(3))


def all_pre(run):
    return [run.crosscoder.pre_activations(g, read(run.crosscoder, g, run.inputs)) for g in range(len(run.groups))]


# ---------------------------------------------------------------- dead latents


@pytest.mark.parametrize(
    "penalty",
    [
        PreActivation(1.0),
        PreActivation(1.0, norms="separate"),
        PreActivation(1.0, norms=None),
        PreActivation(1.0, over="dead"),
        PreActivation(1.0, over="dead", floor="zero"),
    ],
    ids=str,
)
def test_pre_activation_loss_and_its_cheap_gradient(penalty):
    run = dense(activation="jumprelu")
    crosscoder, p = run.crosscoder, copies(run.crosscoder)
    run = ForwardPass(crosscoder, run.groups, run.inputs, run.targets, run.outputs, dead=DEAD)
    expected, plain = 0.0, 0.0
    for g, h in enumerate(all_pre(run)):
        floor = crosscoder.threshold[g] if penalty.floor == "threshold" else torch.zeros_like(crosscoder.threshold[g])
        norms = crosscoder.decoder_norms(g, penalty.norms) if penalty.norms else torch.ones_like(floor)
        which = DEAD[g].double() if penalty.over == "dead" else torch.ones_like(floor)
        plain = plain + ((floor - h).relu() * norms * which).sum() / N_TOKENS
        numbers = brute_norms(crosscoder, p, g, penalty.norms).tolist() if penalty.norms else [1.0] * 6
        for row in h.tolist():
            for i, value in enumerate(row):
                if penalty.over == "inactive" or DEAD[g][i]:
                    expected += max(floor[i].item() - value, 0) * numbers[i] / N_TOKENS
    # The cheap form has the value and all gradients of the plain one, from dense and from sparse activations.
    wanted = gradients(plain, crosscoder)
    for each in (run, sparse(run)):
        assert penalty(each).item() == pytest.approx(expected, rel=1e-10)
        for name, got in gradients(penalty(each), crosscoder).items():
            assert_close(got, wanted[name], msg=lambda text, name=name: f"{name}: {text}")
    assert wanted["W_enc.0"].any()


def test_pre_activation_loss_refuses_what_it_cannot_see():
    run = dense(activation="jumprelu")
    with pytest.raises(WiringError, match="use over='dead', or dense"):
        PreActivation(1.0, floor="zero")(sparse(run))
    with pytest.raises(WiringError, match="needs dead: give ForwardPass its dead"):
        PreActivation(1.0, over="dead")(run)


def test_auxiliary_topk():
    crosscoder, k = build("clt", "topk-group-activation"), 2
    run = ForwardPass.of(crosscoder, inputs(crosscoder, (N_TOKENS,)), targets(crosscoder), dead=DEAD)
    p, expected = copies(crosscoder), 0.0
    hs = all_pre(run)
    for w, site in enumerate(crosscoder.wiring.write_sites):
        error = (run.targets[site] - run.outputs[site]).detach()
        for t in range(N_TOKENS):
            y = torch.zeros(4, dtype=torch.float64)
            for g in range(w + 1):  # of a CLT, groups up to w write layer w
                alive = sorted(((hs[g][t, i].item(), i) for i in range(6) if DEAD[g][i]), reverse=True)[:k]
                for _, i in alive:
                    act = (torch.dot(run.inputs[Site("model", "mlp_in", g)][t], p[f"W_enc.{g}"][:, i])) + p[
                        f"b_enc.{g}"
                    ][i]
                    y = y + act.relu() * p[f"W_dec.{g}"][i, 4 * (w - g) : 4 * (w - g + 1)]
            expected = expected + (error[t] - y).square().sum() / N_TOKENS
    value = AuxiliaryTopK(1.0, k=k)(run)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    got, wanted = gradients(value, crosscoder), torch.autograd.grad(expected, [*p.values()], allow_unused=True)
    for name, gradient in zip(p, wanted, strict=True):
        assert_close(got[name], torch.zeros_like(p[name]) if gradient is None else gradient)
    # Only dead latents are trained by it, not b_dec.
    assert not got["W_dec.0"][~DEAD[0]].any()
    assert not got["b_dec.0"].any()
    none_dead = tuple(torch.zeros(6, dtype=torch.bool) for _ in range(3))
    alive = ForwardPass(crosscoder, run.groups, run.inputs, run.targets, run.outputs, dead=none_dead)
    assert AuxiliaryTopK(1.0, k=k)(alive).item() == 0
    assert PreActivation(1.0, over="dead")(alive).item() == 0


# ---------------------------------------------------------------- faithful layers


def test_tracked_against_corrcoef():
    acts = (torch.randn(40, 5).double() - 0.3).relu().requires_grad_()
    neurons = torch.randn(40, 3).double() @ torch.diag(torch.tensor([1.0, 5.0, 0.1]).double())
    table = torch.corrcoef(torch.cat([acts.detach(), neurons], dim=1).T)[:5, 5:]
    share = neurons.var(0) / neurons.var(0).sum()
    value = tracked(acts, neurons)
    assert value.item() == pytest.approx(float((table.square().amax(0) * share).sum()), rel=1e-10)
    # A latent and a neuron that never vary change nothing and have no gradient.
    more = torch.cat([acts, torch.zeros(40, 1).double()], dim=1)
    (gradient,) = torch.autograd.grad(tracked(more, torch.cat([neurons, torch.ones(40, 1).double()], dim=1)), acts)
    assert_close(gradient, torch.autograd.grad(value, acts)[0])
    assert tracked(torch.zeros(40, 2).double(), neurons).item() == 0


def test_faithfulness_is_0_for_a_perfect_dictionary_and_1_for_a_silent_layer():
    crosscoder = build("clt", "relu")
    run = ForwardPass.of(crosscoder, inputs(crosscoder, (N_TOKENS,)), targets(crosscoder))
    perfect = {layer: 3 * run.groups[layer].acts.detach()[:, :2] + 1 for layer in range(3)}
    assert run.groups[0].acts[:, :2].std() > 0
    with_neurons = ForwardPass(crosscoder, run.groups, run.inputs, run.targets, run.outputs, neurons=perfect)
    assert Faithfulness(1.0)(with_neurons).item() == pytest.approx(0, abs=1e-12)
    for layer in (1, 2):
        crosscoder.b_enc[layer].data.fill_(-100.0)
    silent = ForwardPass.of(crosscoder, run.inputs, run.targets, neurons=perfect)
    assert Faithfulness(1.0)(silent).item() == pytest.approx(2 / 3)
    jump = sparse(dense(activation="jumprelu"))
    neurons = {1: torch.randn(N_TOKENS, 3).double()}
    of_sparse = ForwardPass(jump.crosscoder, jump.groups, jump.inputs, jump.targets, jump.outputs, neurons=neurons)
    of_dense = ForwardPass.of(jump.crosscoder, jump.inputs, jump.targets, neurons=neurons)
    assert_close(Faithfulness(1.0)(of_sparse), Faithfulness(1.0)(of_dense))
    with pytest.raises(WiringError, match="neurons of layer 7 are given"):
        Faithfulness(1.0)(ForwardPass.of(crosscoder, run.inputs, run.targets, neurons={7: neurons[1]}))


@pytest.mark.parametrize("wiring", ["clt", "skips"])
def test_the_crosscoders_response_is_its_jacobian(wiring):
    """Of the layer's own input alone: what earlier layers write is held still."""
    crosscoder = build(wiring, "jumprelu")
    run = ForwardPass.of(crosscoder, inputs(crosscoder, (N_TOKENS,)), targets(crosscoder))
    read_site, write = Site("model", "mlp_in", 2), Site("model", "mlp_out", 2)
    tangents = {site: torch.randn_like(x) for site, x in run.inputs.items()}

    def of_last(x):
        return crosscoder({**run.inputs, read_site: x})[write]

    jacobian = torch.autograd.functional.jacobian(of_last, run.inputs[read_site])
    expected = torch.einsum("tiuj,uj->ti", jacobian, tangents[read_site])
    assert_close(own_response(run, write, tangents), expected)
    jump = sparse(run)
    assert_close(own_response(jump, write, tangents), expected)


def test_jacobian_matching_is_the_frobenius_distance():
    """Over a basis of directions the loss is the distance of the Jacobians, and 0 where they agree."""
    wiring = Wiring.plt(1)
    crosscoder = build("plt", "relu").select(layers=[0]).requires_grad_()
    assert crosscoder.wiring.read_sites == wiring.read_sites
    (read_site,), (write,) = wiring.read_sites, wiring.write_sites
    x, d = torch.randn(4).double(), 4
    mlp = torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.Tanh(), torch.nn.Linear(9, 4)).double()
    tangent, response = mlp_response(mlp, x.expand(6, d), torch.Generator().manual_seed(3))
    true = torch.autograd.functional.jacobian(mlp, x)
    assert_close(response, tangent @ true.T)
    assert not response.requires_grad
    assert abs(tangent.mean().item()) < 0.6
    basis = torch.eye(d).double()
    run = ForwardPass.of(
        crosscoder,
        {read_site: x.expand(d, d)},
        {write: torch.zeros(d, d).double()},
        tangents={read_site: basis},
        responses={write: basis @ true.T},
    )
    own = torch.autograd.functional.jacobian(lambda v: crosscoder({read_site: v})[write], x)
    loss = JacobianMatching(1.0)(run)
    assert loss.item() == pytest.approx(((own - true).norm() ** 2 / true.norm() ** 2).item(), rel=1e-12)
    found = gradients(loss, crosscoder)
    assert found["W_enc.0"].any()
    assert found["W_dec.0"].any()
    with pytest.raises(WiringError, match="needs tangents"):
        JacobianMatching(1.0)(dense())
