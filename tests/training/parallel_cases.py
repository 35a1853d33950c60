"""What test_parallel.py has several processes do: ``python parallel_cases.py FOLDER``, which starts four, then two.

The same functions run in the test's own process, alone, and the results are compared there.
"""

from __future__ import annotations

import copy
import os
import signal
import socket
import sys
from pathlib import Path

import torch
from torch import distributed as dist
from torch.multiprocessing import start_processes

import clt_plugin as cp
from clt_plugin.training import TrainConfig, TrainError, checkpoints
from clt_plugin.training._competition import top_of_all, top_of_rows
from clt_plugin.training.data import Activations, Chunk, Cursor
from clt_plugin.training.parallel import ALONE, Mesh, put_together, spread, start
from clt_plugin.training.trainer import Trainer

WIDTH, N_LATENTS, N_TOKENS, N_STEPS = 5, 16, 16, 4
WIRING = cp.Wiring.clt(3).with_skips()
MESHES = {4: [(2, 2)], 2: [(2, 1), (1, 2)]}
"""For each number of processes, the meshes of (data, latent)."""
PATHS = {4: ("sparse", "dense"), 2: ("sparse",)}

TANH, L1 = {"name": "tanh", "weight": 0.3}, {"name": "l1", "weight": 0.1}
ALIVE = [{"name": "auxiliary_topk", "weight": 0.2, "k": 3}, {"name": "pre_activation", "weight": 0.1, "over": "dead"}]
OF_THRESHOLDS = [
    {"name": "quadratic", "weight": 0.02, "target": 6.0},
    {"name": "quadratic", "weight": 0.03, "target": 9.0, "scope": "total"},
    {"name": "frequent", "weight": 0.1, "limit": 0.2},
    {"name": "asymmetry", "weight": 0.2, "profile": [1, 2, 1]},
    {"name": "pre_activation", "weight": 0.05},
]
JACOBIAN = {"name": "jacobian", "weight": 0.1}
CASES = {
    "relu": ("relu", [TANH, L1, JACOBIAN, {"name": "asymmetry", "weight": 0.2, "c": 2.0}]),
    "jumprelu": ({"name": "jumprelu", "bandwidth": 0.4}, [TANH, *OF_THRESHOLDS]),
    "topk": ({"name": "topk", "k": 3}, [TANH, *ALIVE]),
    "topk unrectified": ({"name": "topk", "k": 11, "rectify": False}, [L1]),
    "topk by norm": ({"name": "topk", "k": 3, "score": "decoder_norm"}, [TANH]),
    "topk joint": ({"name": "topk", "k": 2, "scope": "joint"}, [TANH]),
    "batchtopk": ({"name": "batchtopk", "k": 3}, [L1, *ALIVE]),
    "batchtopk joint": ({"name": "batchtopk", "k": 2, "scope": "joint", "score": "decoder_norm"}, [TANH]),
}
CHAINED = ("jumprelu", "batchtopk")


def config_of(case: str, n_latent: int = 1, path: str = "sparse", **more) -> TrainConfig:
    activation, penalties = CASES[case]
    sparsity = {"penalties": penalties, "rise_over": 0.0, "dead_after": N_TOKENS}
    if case == "relu":
        sparsity["target_l0"] = 5.0
    settings = {
        "batch_size": N_TOKENS,
        "tokens": N_STEPS * N_TOKENS,
        "optimizer": {"learning_rate": 0.01, "warm_up": 0, "clip": 1.0, "accumulate": 2},
        "sparsity": sparsity,
        "parallel": {"latent": n_latent},
    }
    return TrainConfig(n_latents=N_LATENTS, wiring=WIRING, activation=activation, path=path, **(settings | more))


def crosscoder_of(case: str) -> cp.Crosscoder:
    torch.manual_seed(0)
    crosscoder = cp.Crosscoder(WIRING, WIDTH, N_LATENTS, config_of(case).activation, dtype=torch.float64)
    for name, parameter in crosscoder.named_parameters():
        if parameter.requires_grad and not name.startswith("threshold"):
            parameter.data.normal_(std=0.5)
    # The last are silent, and soon dead: more of one share's latents than of another's.
    for bias in crosscoder.b_enc:
        bias.data[-6:] = -20
    return crosscoder


def batch(number: int):
    """A batch, and what penalties need besides."""
    generator = torch.Generator().manual_seed(100 + number)
    x, tangents = torch.randn(2, 3, N_TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    reads = dict(zip(WIRING.read_sites, x, strict=True))
    writes = dict(zip(WIRING.write_sites, x.sin() + x.roll(1, 0), strict=True))
    of_reads = dict(zip(WIRING.read_sites, tangents, strict=True))
    responses = dict(zip(WIRING.write_sites, x.cos() * tangents, strict=True))
    return reads, writes, {"tangents": of_reads, "responses": responses}


def step(trainer: Trainer):
    reads, writes, more = batch(trainer.n_done)
    return trainer.step(reads, writes, **more).to_dict()


def weights_of(share: cp.Crosscoder, mesh: Mesh):
    whole = put_together(share, mesh)
    return None if whole is None else {name: p.detach().clone() for name, p in whole.named_parameters()}


def gradients_of(trainer: Trainer):
    """The gradients of the last step, clipped, put together as weights are."""
    share = copy.deepcopy(trainer.crosscoder)
    for own, parameter in zip(share.parameters(), trainer.crosscoder.parameters(), strict=True):
        own.data.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return weights_of(share, trainer.mesh)


def run(case: str, mesh: Mesh = ALONE, path: str = "sparse"):
    """Take two steps: everything that can be seen of them, whole in the first process."""
    config = config_of(case, mesh.n_latent, path)
    whole = crosscoder_of(case) if mesh.is_first else None
    trainer = Trainer(spread(whole, mesh), config, mesh=mesh)
    metrics, gradients = [step(trainer)], gradients_of(trainer)
    metrics.append(step(trainer))
    silent = torch.cat(
        [mesh.gathered(each, "latent").view(-1) if mesh.n_latent > 1 else each for each in trainer.silent]
    )
    return {
        "metrics": metrics,
        "gradients": gradients,
        "weights": weights_of(trainer.crosscoder, mesh),
        "silent": silent,
    }


def go_on(case: str, folder: Path, mesh: Mesh = ALONE):
    """Load the last checkpoint, take a step and write the next."""
    whole = crosscoder_of(case)
    for parameter in whole.parameters():  # so that what counts is what is loaded
        parameter.data.zero_()
    trainer = Trainer(spread(whole, mesh), config_of(case, mesh.n_latent), mesh=mesh)
    numbers = checkpoints.load_latest(folder / case, trainer.tensors())
    trainer.load_numbers(numbers)
    step(trainer)
    checkpoints.save(folder / case, trainer.n_done, trainer.tensors(), trainer.numbers())
    return trainer


# ---------------------------------------------------------------- selections


def scores_of(n_data: int, n_latent: int, kind: str):
    """Scores of all processes, (n_data * 6, n_latent * 8)."""
    generator = torch.Generator().manual_seed(5)
    scores = torch.randn(n_data * 6, n_latent * 8, generator=generator, dtype=torch.float64)
    if kind == "ties":
        return (scores * 2).round().float()
    return scores.float() if kind == "float32" else scores


SELECTIONS = [("float64", 3), ("float32", 5), ("ties", 1), ("ties", 4), ("ties", 8), ("float32", 1000)]


def selections(mesh: Mesh):
    """For each selection the mask of what is chosen of all scores, in rows and in all."""
    found = []
    for kind, k in SELECTIONS:
        scores = scores_of(mesh.n_data, mesh.n_latent, kind)
        n = scores.shape[1]
        own = scores.chunk(mesh.n_data)[mesh.data_rank].chunk(mesh.n_latent, 1)[mesh.latent_rank].contiguous()
        for flat in (top_of_rows(mesh, own, min(k, n)), top_of_all(mesh, own, k * len(scores))):
            mask = torch.zeros(own.numel()).index_fill_(0, flat, 1).view_as(own)
            parts = mesh.gathered(mask, None).view(mesh.n_data, mesh.n_latent, *mask.shape)
            found.append(torch.cat([torch.cat([*row], 1) for row in parts]).bool())
    return found


# ---------------------------------------------------------------- whole runs


class Noise:
    """Activations that are what their numbers make them: 3 layers of mlp_in and mlp_out."""

    sites = (*WIRING.read_sites, *WIRING.write_sites)
    widths = (WIDTH,) * len(sites)

    def identity(self):
        return {"name": "noise"}

    def chunks(self, begin: Cursor | None = None):
        for number in range(begin.item if begin else 0, 400):
            generator = torch.Generator().manual_seed(number)
            flat = torch.randn(13, sum(self.widths), generator=generator)
            flat[:, sum(self.widths) // 2 :] += flat[:, : sum(self.widths) // 2].sin()
            yield Chunk(Activations(flat, self.sites, self.widths), torch.arange(13), Cursor(0, number + 1, 0))


def run_config(n_latent: int = 1) -> TrainConfig:
    return TrainConfig(
        n_latents=N_LATENTS, wiring=WIRING, activation={"name": "batchtopk", "k": 3}, batch_size=N_TOKENS,
        tokens=12 * N_TOKENS, data={"buffer": 64, "statistics": 128}, sparsity={"penalties": [L1]},
        checkpoints={"every": 5}, watch={"every": 1, "console": False}, parallel={"latent": n_latent},
    )  # fmt: skip


def interrupted(folder: Path, n_latent: int):
    """Begin a run, of which one process alone is asked to stop after its seventh step: all do."""
    before = Trainer.step

    def asked(trainer, *args, **more):
        if trainer.n_done == 6 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(trainer, *args, **more)

    Trainer.step = asked
    try:
        cp.train(None, Noise(), run_config(n_latent), output=folder)
    except TrainError as error:
        return str(error)
    finally:
        Trainer.step = before


def refused(config: TrainConfig, mesh: Mesh):
    """What is said to a config that several processes cannot do."""
    try:
        Trainer(spread(crosscoder_of("relu"), mesh), config, mesh=mesh)
    except ValueError as error:
        return str(error)


def refusals(mesh: Mesh):
    relu = config_of("relu", mesh.n_latent)
    configs = [
        relu.but(sparsity={"penalties": [{"name": "faithfulness", "weight": 1.0}], "target_l0": None}),
        relu.but(compile=True),
        relu.but(optimizer={"accumulate": 16}),
    ]
    found = [refused(config, mesh) for config in configs]
    try:
        start(relu.but(parallel={"latent": 3}))
    except ValueError as error:
        found.append(str(error))
    reads, writes, more = batch(0)
    trainer = Trainer(spread(crosscoder_of("relu"), mesh), relu, mesh=mesh)
    next(iter(reads.values()))[-1] = torch.nan  # a token of the last process alone
    try:
        trainer.step(reads, writes, **more)
    except TrainError as error:
        found.append(str(error))
    return found


# ---------------------------------------------------------------- processes


def work(rank: int, world: int, port: int, folder: Path) -> None:
    """Do everything in one of several processes; the first writes what comes of it."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    results = {}
    for n_data, n_latent in MESHES[world]:
        mesh = start(config_of("relu", n_latent))
        assert (mesh.n_data, mesh.n_latent) == (n_data, n_latent)
        runs = {(case, path): run(case, mesh, path) for case in CASES for path in PATHS[world]}
        for each in runs.values():
            everywhere = [None] * world
            dist.all_gather_object(everywhere, each["metrics"])
            assert all(metrics == each["metrics"] for metrics in everywhere), everywhere
        results[n_data, n_latent] = {"runs": runs, "selections": selections(mesh)}
    for case in CHAINED:
        go_on(case, folder / "chain", mesh if world == 2 else start(config_of(case, 2)))
    results["refusals"] = refusals(start(config_of("relu", world // 2)))
    if world == 4:
        results["stopped"] = interrupted(folder / "run", 2)
    else:
        cp.train(None, Noise(), run_config(1), output=folder / "run")
    if rank == 0:
        torch.save(results, folder / f"{world}.pt")
    dist.barrier()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


if __name__ == "__main__":
    for world in MESHES:
        start_processes(work, (world, free_port(), Path(sys.argv[1])), nprocs=world, start_method="fork")
