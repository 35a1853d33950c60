"""A step against one written by hand with autograd, and what a trainer keeps, refuses and reaches."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import normalize

import clt_plugin as cp
from clt_plugin.core import Site
from clt_plugin.training import ConfigError, Standard, TrainConfig, Trainer, TrainError
from clt_plugin.training.standard import Scaling

WIDTH, N_LATENTS, N_TOKENS = 6, 24, 40
ACTIVATIONS = {
    "relu": "relu",
    "jumprelu": {"name": "jumprelu", "bandwidth": 0.2},
    "topk": {"name": "topk", "k": 4},
    "batchtopk": {"name": "batchtopk", "k": 4},
    "joint": {"name": "batchtopk", "k": 4, "scope": "joint"},
}
TANH = {"name": "tanh", "weight": 0.3}


def config_of(activation="relu", steps=10, **more):
    settings = {"tokens": steps * N_TOKENS, "batch_size": N_TOKENS, "sparsity": {"penalties": [TANH]}}
    return TrainConfig(n_latents=N_LATENTS, activation=ACTIVATIONS.get(activation, activation), **(settings | more))


def crosscoder_of(config, wiring=None, seed=0):
    torch.manual_seed(seed)
    return cp.Crosscoder(wiring or cp.Wiring.clt(3), WIDTH, N_LATENTS, config.activation, dtype=torch.float64)


def batches(n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, N_TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    return [(each, each.sin() + each.roll(1, 0)) for each in x]


def trained(config, n=3, **more):
    trainer = Trainer(crosscoder_of(config), config, **more)
    return trainer, [trainer.step(*batch) for batch in batches(n)]


# ---------------------------------------------------------------- one step


@pytest.mark.parametrize("path", ["sparse", "dense"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_steps_equal_those_of_a_loop_by_hand(activation, path):
    config = config_of(activation, path=path, optimizer={"warm_up": 2, "falls_over": 0.8, "learning_rate": 0.01})
    trainer, metrics = trained(config)

    mine = crosscoder_of(config).train()
    adam = torch.optim.Adam(mine.parameters())
    for number, (x, y) in enumerate(batches(3)):
        rate = 0.01 * min((number + 1) / 2, (10 - number) / 8, 1)
        acts = mine.encode(x)
        error = (mine.decode(acts) - y).square().sum(-1).mean(-1).sum()
        tanh = sum((acts[g] * mine.W_dec[g].norm(dim=1)).tanh().sum(-1).mean() for g in range(3))
        loss = error + 0.3 * number / 10 * tanh
        adam.zero_grad()
        loss.backward()
        adam.param_groups[0]["lr"] = rate
        adam.step()
        if mine.activation.has_threshold:
            for threshold in mine.threshold:
                threshold.data.clamp_(min=1e-3)
        found = metrics[number]
        assert found.loss == pytest.approx(loss.item(), rel=1e-12)
        assert found.error == pytest.approx(error.item(), rel=1e-12)
        assert found.fvu == pytest.approx(
            error.item() / (y - y.mean(1, keepdim=True)).square().sum(-1).mean(-1).sum().item(), rel=1e-12
        )
        assert found.l0 == pytest.approx(((acts != 0).sum(-1).double().mean(-1)).tolist())
        assert found.learning_rate == pytest.approx(rate)
        assert found.penalties["tanh"] == pytest.approx(tanh.item(), rel=1e-12)
    for name, parameter in trainer.crosscoder.named_parameters():
        torch.testing.assert_close(parameter, dict(mine.named_parameters())[name], rtol=0, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
def test_parts_of_a_batch_add_up_to_the_whole(activation):
    whole, _ = trained(config_of(activation))
    parts, _ = trained(config_of(activation, optimizer={"accumulate": 4}))
    for name, parameter in parts.crosscoder.named_parameters():
        torch.testing.assert_close(parameter, dict(whole.crosscoder.named_parameters())[name], rtol=0, atol=1e-11)


def test_gradients_are_clipped_as_one_vector():
    config = config_of("relu", optimizer={"clip": 0.5})
    trainer, (first, *_) = trained(config, 1)
    assert first.gradient_norm > 0.5
    moments = [trainer.optimizer.state[p]["exp_avg"] for p in trainer.crosscoder.parameters()]
    assert torch.stack([(10 * m).norm() for m in moments]).norm().item() == pytest.approx(0.5, rel=1e-5)


def test_thresholds_have_a_rate_of_their_own_and_stay_above_0():
    still, _ = trained(config_of("jumprelu", optimizer={"threshold_rate": 1e-12}))
    moved, _ = trained(config_of("jumprelu", optimizer={"threshold_rate": 1e4}))
    assert torch.stack(list(still.crosscoder.threshold)).sub(0.03).abs().max() < 1e-10
    assert torch.stack(list(moved.crosscoder.threshold)).min() == 1e-3


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bfloat16_is_close_to_float32(activation):
    losses = {}
    for precision in ("float32", "bfloat16"):
        config = config_of(activation, steps=100, precision=precision)
        trainer = Trainer(crosscoder_of(config).float(), config)
        losses[precision] = [trainer.step(x.float(), y.float()).loss for x, y in batches(20)]
        assert all(parameter.dtype == torch.float32 for parameter in trainer.crosscoder.parameters())
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.03)


COMPILED = """
import torch, clt_plugin as cp
x = torch.randn(1, 40, 6, generator=torch.Generator().manual_seed(0))
stepped = []
for compiled in (False, "eager"):
    how = {"tokens": 400, "batch_size": 40, "compile": compiled}
    config = cp.TrainConfig(n_latents=24, activation={"name": "topk", "k": 4}, **how)
    torch.manual_seed(0)
    trainer = cp.training.Trainer(cp.Crosscoder(cp.Wiring.sae(0), 6, 24, config.activation), config)
    trainer.step(x, x)
    stepped.append(trainer.tensors())
for name, value in stepped[0].items():
    torch.testing.assert_close(stepped[1][name], value, rtol=0, atol=1e-6)
print("the same")
"""


def test_a_compiled_step_is_the_same():
    # In a process of its own: here the tests' type checks would be compiled too.
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=200)
    assert done.stdout == "the same\n", done.stderr


def test_mappings_by_site_are_stacked_activations():
    config, (x, y) = config_of("topk"), batches(1)[0]
    wiring = crosscoder_of(config).wiring
    stacked, by_site = (Trainer(crosscoder_of(config), config) for _ in range(2))
    reads, writes = dict(zip(wiring.read_sites, x, strict=True)), dict(zip(wiring.write_sites, y, strict=True))
    assert stacked.step(x, y) == by_site.step(reads, writes)


# ---------------------------------------------------------------- units


def test_raw_activations_are_standardised_and_the_finished_crosscoder_acts_on_raw_ones():
    config = config_of("topk")
    sites = crosscoder_of(config).sites
    generator = torch.Generator().manual_seed(5)
    standard = Standard(
        {
            site: Scaling(torch.randn(WIDTH, generator=generator).double(), torch.full((WIDTH,), 2.0 + n).double())
            for n, site in enumerate((*sites.read, *sites.write))
        }
    )
    raw = [
        (
            {site: standard[site].restore(x[i]) for i, site in enumerate(sites.read)},
            {site: standard[site].restore(y[i]) for i, site in enumerate(sites.write)},
        )
        for x, y in batches(3)
    ]
    trainer = Trainer(crosscoder_of(config), config, standard)
    found = [trainer.step(*batch).loss for batch in raw]
    plain, expected = trained(config)
    assert found == pytest.approx([m.loss for m in expected], rel=1e-10)
    x, _ = raw[0]
    finished = trainer.finished()
    standardised = plain.crosscoder.eval()(standard.standardise(x))
    for site, value in finished(x).items():
        torch.testing.assert_close(value, standard[site].restore(standardised[site]), rtol=0, atol=1e-9)
    assert not finished.training
    assert trainer.crosscoder.training


def test_a_batchtopk_is_finished_with_a_threshold_measured_on_a_sample():
    trainer, _ = trained(config_of("batchtopk"))
    x, _ = batches(1)[0]
    finished = trainer.finished(x)
    torch.testing.assert_close(finished.encode(x), copy.deepcopy(trainer.crosscoder).train().encode(x))
    assert not trainer.crosscoder.has_measured_threshold


# ---------------------------------------------------------------- latents that fire, and how many


def test_tokens_since_a_latent_fired_are_counted():
    config = config_of("relu", sparsity={"penalties": [TANH], "dead_after": 2 * N_TOKENS})
    crosscoder = crosscoder_of(config)
    crosscoder.b_enc[1].data[:5] = -1e3
    trainer = Trainer(crosscoder, config)
    dead = [trainer.step(*batch).dead[1] for batch in batches(3)]
    assert dead == [0, 0, pytest.approx(5 / N_LATENTS)]
    assert trainer.silent[1][:5].tolist() == [3 * N_TOKENS] * 5
    assert trainer.silent[1][5:].max() == 0


@pytest.mark.parametrize("target", [6.0, (3.0, 2.0, 1.5)])
def test_a_target_l0_is_reached_to_within_a_tenth(target):
    config = config_of("jumprelu", 500, optimizer={"learning_rate": 5e-3})
    config = config.but(sparsity={"penalties": [{"name": "tanh", "weight": 1e-2}], "target_l0": target})
    trainer = Trainer(crosscoder_of(config), config)
    data = batches(30)
    last = [trainer.step(*data[n % 30]).l0 for n in range(500)][-50:]
    l0 = torch.tensor(last).mean(0)
    if isinstance(target, float):
        assert l0.sum().item() == pytest.approx(target, rel=0.1)
    else:
        assert l0.tolist() == pytest.approx(target, rel=0.1)


# ---------------------------------------------------------------- what goes wrong


def test_a_loss_that_is_not_finite_stops_before_anything_is_updated():
    trainer, _ = trained(config_of("relu", optimizer={"clip": 1.0}))
    before = {name: value.clone() for name, value in trainer.tensors().items()}
    x, y = batches(1)[0]
    with pytest.raises(TrainError, match="at step 3 the loss is nan; nothing was updated"):
        trainer.step(x, y.where(y > -100, 0).fill_(torch.nan))
    with pytest.raises(TrainError, match="nothing was updated"):
        trainer.step(x, y * 1e200)
    for name, value in trainer.tensors().items():
        if not name.startswith("silent"):
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert trainer.step(x, y).step == 3


def test_what_does_not_fit_is_refused(tmp_path):
    config = config_of("relu")
    (x, y), trainer = batches(1)[0], Trainer(crosscoder_of(config), config)
    with pytest.raises(ConfigError, match=r"the same tokens.*\[30, 40\]"):
        trainer.step(x[:, :30], y)
    parts = config.but(batch_size=39, optimizer={"accumulate": 3})
    with pytest.raises(ConfigError, match="3 equal part"):
        Trainer(crosscoder_of(parts), parts).step(x, y)
    with pytest.raises(ConfigError, match=r'target_l0 is reached by weighing.*"name": "tanh"'):
        Trainer(crosscoder_of(config), config.but(sparsity={"penalties": [], "target_l0": 5.0}))
    with pytest.raises(ConfigError, match="2 numbers, but there are 3 groups"):
        Trainer(crosscoder_of(config), config.but(sparsity={"target_l0": (5.0, 1.0)}))
    crosscoder_of(config).save(tmp_path / "saved")
    with pytest.raises(ConfigError, match="materialize"):
        Trainer(cp.load(tmp_path / "saved", lazy=True), config)
    for _ in range(10):
        trainer.step(x, y)
    with pytest.raises(ValueError, match="a run of 10 steps has no step 10"):
        trainer.step(x, y)


# ---------------------------------------------------------------- known answers


def test_features_in_superposition_are_recovered():
    """The mean of each true feature's largest cosine with a decoder: 16 sparse features in 10 dimensions."""
    torch.manual_seed(0)
    features = normalize(torch.randn(16, 10), dim=1)
    site = Site("model", "resid_post", 0)
    config = TrainConfig(
        n_latents=24, activation="relu", tokens=1000 * 256, batch_size=256, optimizer={"learning_rate": 1e-2},
        sparsity={"penalties": [{"name": "l1", "weight": 0.2}], "rise_over": 0.5},
    )  # fmt: skip
    sae = cp.Crosscoder(cp.Wiring.sae(0), 10, 24, "relu")
    trainer = Trainer(sae, config)
    cosines = [(features @ normalize(sae.W_dec[0].detach(), dim=1).T).amax(1)]
    for _ in range(config.n_steps):
        x = {site: ((torch.rand(256, 16) < 0.05) * (0.5 + torch.rand(256, 16))) @ features}
        trainer.step(x, x)
    cosines.append((features @ normalize(sae.W_dec[0].detach(), dim=1).T).amax(1))
    assert cosines[0].mean() < 0.7
    assert cosines[1].mean() > 0.94


def test_planted_latents_of_a_crosscoder_are_recovered_with_the_sites_that_they_write():
    """Of 12 planted features 4 write both sites, 4 the first alone and 4 the second alone."""
    torch.manual_seed(1)
    planted = normalize(torch.randn(2, 12, 16), dim=2)
    planted[1, 4:8], planted[0, 8:] = 0, 0
    sites = [Site("model", "resid_post", layer) for layer in (0, 1)]

    def draw(n):
        acts = (torch.rand(n, 12) < 0.08) * (0.5 + torch.rand(n, 12))
        return {site: acts @ planted[i] for i, site in enumerate(sites)}

    config = TrainConfig(
        n_latents=20, activation="relu", tokens=1000 * 256, batch_size=256, optimizer={"learning_rate": 1e-2},
        sparsity={"penalties": [{"name": "l1", "weight": 0.1}], "rise_over": 0.5},
    )  # fmt: skip
    crosscoder = cp.Crosscoder(cp.Wiring.acausal(sites), 16, 20, "relu")
    trainer = Trainer(crosscoder, config)
    for _ in range(config.n_steps):
        x = draw(256)
        trainer.step(x, x)
    decoder = crosscoder.W_dec[0].detach()
    cosines = normalize(planted.transpose(0, 1).flatten(1), dim=1) @ normalize(decoder, dim=1).T
    assert cosines.amax(1).min() > 0.95
    norms = decoder.unflatten(1, (2, 16)).norm(dim=2)[cosines.argmax(1)]
    share = norms[:, 0] / norms.sum(1)
    assert share[:4].sub(0.5).abs().max() < 0.1
    assert share[4:8].min() > 0.9
    assert share[8:].max() < 0.1
