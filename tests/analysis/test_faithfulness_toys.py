"""The toys: networks whose circuits are known, and transcoders of them, made by hand and trained."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from clt_plugin import Crosscoder, Wiring
from clt_plugin.analysis.faithfulness import (
    LAYOUTS,
    MITIGATIONS,
    SETTINGS,
    TABLE_1,
    BooleanNetwork,
    absolute_value,
    boolean_toy,
    boolean_toy_study,
    boolean_toys,
    hop_skip,
    mitigations,
)
from clt_plugin.analysis.faithfulness._network import READS, WRITES
from clt_plugin.analysis.faithfulness._stack import OpenJumpReLU, Recipe, Stack
from clt_plugin.core import jumprelu
from clt_plugin.training.auxiliary import Faithfulness, PreActivation
from clt_plugin.training.forward import ForwardPass
from clt_plugin.training.penalties import Asymmetry, Tanh, total
from clt_plugin.training.schedules import rising
from clt_plugin.training.thresholds import keep_above

EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_network_computes_the_formula(layout):
    network = BooleanNetwork(LAYOUTS[layout])
    sites, directions = network.sites, network.layout.directions()
    assert_close(directions @ directions.T, torch.eye(9).double(), **EXACT)
    for row, (a, b, c, d) in enumerate((network.inputs > 0).tolist()):
        assert bool(network.truth[row]) == ((a != b) and (c != d))
    # Each layer computes from what it reads, and not from the inputs.
    efgh = sites[READS[1]] @ directions[4:8].T
    assert_close(sites[WRITES[1]] @ directions[8], (efgh.sum(1) - 1).relu(), **EXACT)
    read = sites[READS[1]] @ directions[:4].T
    assert_close(read, torch.zeros_like(read) if network.layout.clears_inputs else network.inputs, **EXACT)
    standard = network.standard.standardise(sites)[WRITES[0]]
    assert set(standard.std(0).round(decimals=9).tolist()) <= {0.0, 1.0}


def by_hand(network: BooleanNetwork, skips: bool) -> Crosscoder:
    """A perfect CLT of the network in its nine axes: layer 1 by its own neuron, or by a lookup of the inputs."""
    clt = Crosscoder(Wiring.clt(2), network.layout.width, 8, "relu").double().requires_grad_(False)
    directions = network.layout.directions()
    for parameter in clt.parameters():
        parameter.zero_()
    here, there = (clt.layout.write_slices[0][site] for site in WRITES)
    for latent, (plus, minus) in enumerate(((0, 1), (1, 0), (2, 3), (3, 2))):
        clt.W_enc[0][:, latent] = directions[plus] - directions[minus]
        clt.b_enc[0][latent] = -1
        clt.W_dec[0][latent, here] = directions[4 + latent]
    if skips:
        for latent, row in enumerate(network.truth.nonzero().flatten(), start=4):
            clt.W_enc[0][:, latent] = network.inputs[row] @ directions[:4]
            clt.b_enc[0][latent] = -3
            clt.W_dec[0][latent, there] = directions[8]
    else:
        clt.W_enc[1][:, 0] = directions[4:8].sum(0)
        clt.b_enc[1][0] = -1
        clt.W_dec[1][0] = directions[8]
    return clt


@pytest.mark.parametrize("skips", [False, True])
def test_two_perfect_transcoders_are_told_apart(skips):
    network = BooleanNetwork(LAYOUTS["nine"])
    clt = by_hand(network, skips)
    x = {site: network.sites[site] for site in READS}
    for site, y in clt(x).items():
        assert_close(y, network.sites[site], **EXACT)
    assert torch.equal(network.answers(clt), network.truth)
    assert hop_skip(clt, x=x).fraction(1) == float(skips)
    assert hop_skip(clt, x=x).fraction(0) == 0.0


def test_the_network_needs_its_second_layer():
    network = BooleanNetwork(LAYOUTS["nine"])
    clt = by_hand(network, skips=False)
    clt.W_dec[1].zero_()
    assert not network.answers(clt).any()


def test_gradients_pass_below_the_threshold():
    h = torch.tensor([-1.0, 0.01, 0.5], dtype=torch.float64).requires_grad_()
    theta = torch.full((3,), 0.1, dtype=torch.float64, requires_grad=True)
    activation = OpenJumpReLU(bandwidth=0.3)
    acts = activation(h, theta, None, True)
    assert torch.equal(acts, jumprelu(h, theta, 0.3))
    grads = torch.autograd.grad(acts.sum(), (h, theta))
    assert grads[0].tolist() == [0, 1, 1]
    plain = torch.autograd.grad(jumprelu(h, theta, 0.3).sum(), theta)[0]
    assert torch.equal(grads[1], plain)
    assert plain.tolist() != [0, 0, 0]


def test_a_stack_trains_each_seed_as_if_it_were_alone():
    torch.manual_seed(1)
    wiring, seeds, steps = Wiring.clt(2), (3, 5), 4
    x = {site: torch.randn(7, 6) for site in wiring.read_sites}
    y = {site: torch.randn(7, 6) for site in wiring.write_sites}
    neurons = {layer: torch.randn(7, 3).relu() for layer in (0, 1)}
    kept = (Tanh(0.5, norms="separate"), PreActivation(0.1), Asymmetry(0.7, c=1.0), Faithfulness(0.9))
    recipe = Recipe(kept, steps, rate=0.05, later_rate=0.02, turn=2, bandwidth=0.5)
    stack = Stack(wiring, 6, 5, seeds, recipe)
    weights = dict(zip(wiring.write_sites, (0.3, 1.7), strict=True))
    stack.train(x, y, weights, False, neurons=neurons)

    for seed, found in zip(seeds, stack.crosscoders(), strict=True):
        torch.manual_seed(seed)
        alone = Crosscoder(wiring, 6, 5, OpenJumpReLU(bandwidth=0.5))
        optimiser = torch.optim.Adam(alone.parameters())
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = 0.05 if step < 2 else 0.02
            run = ForwardPass.of(alone, x, y, neurons=neurons)
            errors = [w * (run.outputs[s] - y[s]).square().sum(-1).mean() for s, w in weights.items()]
            optimiser.zero_grad()
            torch.autograd.backward(sum(errors) + total(kept, run, rising(step, steps))[0])
            optimiser.step()
            keep_above(alone)
        for name, parameter in alone.named_parameters():
            assert_close(found.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)


def test_a_clt_skips_the_second_step():
    # The claim of the study of unfaithful circuits, where it first shows: in all steps layer 0's L0 falls to 1.8.
    toy = boolean_toy(steps=600, bar=False)
    assert toy.hop_skip > 0.999
    assert toy.l0[1] < 0.6 < 2 < toy.l0[0]


def test_without_a_penalty_reconstruction_is_near_perfect():
    toy = boolean_toy(layout="nine", sparsity=0.0, steps=350, bar=False)
    assert max(toy.mse) < 5e-3
    assert toy.accuracy == 1.0
    # What it is as it acts on raw activations agrees with the measures, taken in standard units.
    sites = toy.network.sites
    acts = toy.crosscoder.encode({site: sites[site].float() for site in READS})
    assert tuple(float((each > 0).double().sum(1).mean()) for each in acts) == toy.l0
    assert set(toy.table.columns) == {"found", "document"}
    assert toy.table.loc["l0_0", "document"] == TABLE_1["clt"]["l0"][0]
    assert toy.plot().axes


def test_a_repeated_point_gets_a_latent_of_its_own():
    study = absolute_value((0.0, 0.3), (0,), steps=700, bar=False)
    without, with_repeats = (study.table[study.table["repeats"] == share] for share in (0.0, 0.3))
    assert (without["own_latents"] == 0).all()
    assert (without["l0_on_point"] >= 6).all()
    assert (with_repeats["own_latents"] >= 1).all()
    assert (with_repeats["share"] > 0.5).all()
    assert study.plot().axes


def test_studies_are_tables_of_every_setting():
    study = boolean_toy_study((0, 1), ("CLT", "PLT"), steps=3, bar=False)
    assert study.runs.groupby("setting").size().to_dict() == {"CLT": 2, "PLT": 2}
    table = study.table.set_index(["setting", "measure"])
    assert table.loc[("PLT", "l0_1"), "document"] == 0.94
    of = study.runs[study.runs["setting"] == "CLT"]["l0_0"]
    assert table.loc[("CLT", "l0_0"), ["low", "median", "high"]].tolist() == [of.min(), of.median(), of.max()]
    assert study.plot().axes
    assert set(mitigations((0,), steps=2, bar=False).runs["setting"]) == set(MITIGATIONS)
    assert all(boolean_toys((0,), steps=1, bar=False, **settings) for settings in SETTINGS.values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: boolean_toy(layout="square"), "there is no 'square'"),
        (lambda: boolean_toy(wiring="sae"), "'clt' or 'plt', not 'sae'"),
        (lambda: boolean_toy(wiring="plt", span=2), "span 1, not 2"),
        (lambda: boolean_toy(sites="even"), "not 'even'"),
        (lambda: boolean_toys(()), "no seeds"),
        (lambda: boolean_toy(steps=0), "at least one step"),
        (lambda: mitigations((0,), "hope"), "there is no 'hope'"),
        (lambda: absolute_value((1.5,)), "not 1.5"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
