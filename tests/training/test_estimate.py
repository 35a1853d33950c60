"""What a run needs is told before it begins, and a run that cannot fit is refused."""

from __future__ import annotations

import shutil

import pytest

import clt_plugin as cp
from clt_plugin.training import ConfigError, TrainConfig, Trainer, checkpoints, estimate, estimation

GB = 1e9


@pytest.mark.parametrize(
    ("wiring", "d", "n_latents", "parameters", "state"),
    [
        (cp.Wiring.clt(12), 768, 10_000, 0.69, 11),  # GPT-2 small
        (cp.Wiring.clt(26), 2304, 16_384, 14.2, 228),  # Gemma-2-2B
        (cp.Wiring.local_clt(26, 4), 2304, 16_384, 4.7, 75),
    ],
)
def test_known_sizes(wiring, d, n_latents, parameters, state):
    found = estimate(TrainConfig(n_latents=n_latents), wiring, d)
    assert found.n_parameters / 1e9 == pytest.approx(parameters, rel=0.01)
    assert round(found.state / GB) == state


def test_known_operations():
    config = TrainConfig(n_latents=2048, batch_size=1024, activation={"name": "topk", "k": 50})
    found = estimate(config, cp.Wiring.clt(6), 256)
    assert found.dense_flops / 1e9 == pytest.approx(80.5, abs=0.05)
    assert found.sparse_flops / 1e9 == pytest.approx(8.3, abs=0.05)
    joint = config.but(activation={"name": "topk", "k": 50, "scope": "joint"})
    assert estimate(joint, cp.Wiring.clt(6), 256).sparse_flops == found.sparse_flops
    aimed = config.but(activation="jumprelu", sparsity={"target_l0": 300.0})
    assert estimate(aimed, cp.Wiring.clt(6), 256).sparse_flops == found.sparse_flops


def test_a_trainer_and_its_checkpoint_have_the_sizes_estimated(tmp_path):
    widths = {("base", "resid_post", 1): 12, ("chat", "resid_post", 1): 16}
    wiring = cp.Wiring.model_diff(["base", "chat"], 1)
    widths = {site: {"base": 12, "chat": 16}[site.model] for site in wiring.read_sites}
    config = TrainConfig(n_latents=256, wiring=wiring, tokens=4096)
    found = estimate(config, wiring, widths)
    trainer = Trainer(cp.Crosscoder(wiring, widths, 256, "jumprelu"), config)
    assert found.weights == sum(p.nbytes for p in trainer.crosscoder.parameters())
    tensors = trainer.tensors()
    assert found.adam == sum(t.nbytes for name, t in tensors.items() if "exp_avg" in name)
    assert found.checkpoint == pytest.approx(sum(t.nbytes for t in tensors.values()), rel=0.001)
    written = checkpoints.save(tmp_path, 1, tensors, {})
    assert sum(file.stat().st_size for file in written.iterdir()) < 1.2 * found.checkpoint + 30_000


def test_processes_share_latents_and_tokens():
    config = TrainConfig(n_latents=1024, parallel={"latent": 2})
    one, four = (
        estimate(config.but(parallel={"latent": n}), cp.Wiring.clt(4), 64, world=w) for n, w in ((1, 1), (2, 4))
    )
    assert four.n_parameters == one.n_parameters
    assert four.state == pytest.approx(one.state / 2, rel=0.01)
    assert four.dense_flops == one.dense_flops / 4
    assert four.checkpoint == one.checkpoint
    with pytest.raises(ConfigError, match=r"3 processes .* parallel\.latent=2"):
        estimate(config, cp.Wiring.clt(4), 64, world=3)


def test_what_takes_memory_follows_the_settings():
    config = TrainConfig(n_latents=1024, batch_size=4096)
    wiring = cp.Wiring.clt(4)
    found = estimate(config, wiring, 64)
    assert estimate(config.but(data={"dtype": "bfloat16"}), wiring, 64).buffer == found.buffer / 2
    assert estimate(config.but(optimizer={"accumulate": 4}), wiring, 64).step < 0.4 * found.step
    assert estimate(config.but(start={"firing_rate": 0.01}), wiring, 64).step < 0.4 * found.step
    assert estimate(config.but(checkpoints={"keep": 5}), wiring, 64).disk == found.disk + 3 * found.checkpoint
    table = found.table.set_index("quantity")["value"]
    assert table["memory"] * GB == pytest.approx(
        found.state + max(found.step, found.copy) + max(found.buffer, found.statistics)
    )
    assert "14." in str(estimate(TrainConfig(n_latents=16_384), cp.Wiring.clt(26), 2304)).splitlines()[1]
    assert "at least" in estimate(config.but(tokens=4096), wiring, 64).timed()


def test_a_run_that_cannot_fit_into_memory_is_refused(monkeypatch):
    monkeypatch.setattr(estimation, "free_memory", lambda device: int(16 * GB))
    gemma = estimate(TrainConfig(n_latents=16_384), cp.Wiring.clt(26), 2304)
    message = (
        r"needs \d+\.\d GB of memory on cpu \(weights, gradients and Adam 227.7 GB.* 16.0 GB are free: train fewer "
        r"latents.*local_clt.*optimizer.accumulate.*data.buffer.*parallel.latent"
    )
    with pytest.raises(ConfigError, match=message):
        gemma.check()
    estimate(TrainConfig(n_latents=1024), cp.Wiring.clt(4), 64).check()
    # Processes on one machine share its memory.
    small = TrainConfig(n_latents=10_000, batch_size=1000, data={"buffer": 1000}, start={"firing_rate": 0.01})
    alone = estimate(small, cp.Wiring.local_clt(12, 4), 768, world=4)
    alone.check()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="are free"):
        alone.check()


def test_a_run_that_cannot_fit_onto_the_disk_is_refused(tmp_path, monkeypatch):
    found = estimate(TrainConfig(n_latents=1024), cp.Wiring.clt(4), 64)
    usage = shutil.disk_usage(tmp_path)._replace(free=found.disk - 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    found.check()
    with pytest.raises(ConfigError, match=r"comes to .* free: make room, .* lower checkpoints\.keep"):
        found.check(output=tmp_path / "not" / "there")
    # A run that is gone on with replaces what it has written.
    (tmp_path / "old").write_bytes(bytes(2000))
    found.check(output=tmp_path)


def test_train_refuses_before_it_reads_a_text(monkeypatch, tmp_path):
    from clt_plugin import demo

    monkeypatch.setattr(estimation, "free_memory", lambda device: 1_000_000)

    def texts():
        raise AssertionError("texts were read")

    config = TrainConfig(n_latents=64, tokens=4096)
    with pytest.raises(ConfigError, match=r"and 1\.0 MB are free"):
        cp.train(demo.load_model(), texts, config, tokenizer=demo.load_tokenizer())
