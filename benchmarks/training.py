"""How fast a training step is: forward, backward and Adam, where few latents are active, beside the dense path.

    python benchmarks/training.py
    python benchmarks/training.py --growth
    python benchmarks/training.py --crossover
    python benchmarks/training.py --peer

Five cases in float32, by default on two threads: a CLT of 6 layers, d 256 and 2,048 latents a layer, 50 of them active
a token and layer, with TopK, JumpReLU (and its tanh penalty) and BatchTopK, per-layer transcoders likewise, and a
crosscoder of two models of d 768 with 8,192 latents; each on batches of 1,024 tokens. The sparse and the dense path run
in turn on copies of the same weights, and what is shown are medians of wall time. Their gradients are compared in
float64 before. A step is `forward_pass`, the loss, its gradients and ``torch.optim.Adam(fused=True)``, as in training.

The floors are what any method must do: dense, six operations for each weight and token; sparse, two for each encoder
weight and token, and six for each decoder coordinate, and two for each encoder coordinate, of an active latent. They
are shown as the time they take at the rate that a large matrix product reaches here, measured in turn with the steps.

Peak memory is how far a fresh process's resident memory grows during a step beyond parameters, gradients and optimiser
state, which are all there before it.

``--growth`` varies layers, latents and batch. ``--crossover`` varies how many latents are active: the ground for
`SPARSE_BELOW` in training/sparse.py. ``--peer`` takes the same steps with Llamascopium, installed at the versions in
peers/llamascopium.txt in an environment of its own (about 1.6 GB with a CPU build of torch): for every row one process
of theirs and one of ours, that take their steps in turn, with the same Adam. Llamascopium's penalty reaches no decoder
norms, so that with JumpReLU it has a little less to do.

Wall time needs an idle machine; ratios depend on what else runs a little less.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace

import torch
from _peers import PEERS, add_environment, environment
from peers._measure import measured, serve
from rich.console import Console
from rich.table import Table
from torch import Tensor

import clt_plugin as cp
from clt_plugin.training import sparse
from clt_plugin.training.penalties import Tanh, total
from clt_plugin.training.sparse import forward_pass

PENALTY = (Tanh(1e-3),)
PEER = "llamascopium"
GROWTH = {"layers": (3, 6, 12), "latents": (1024, 2048, 4096, 8192), "batch": (256, 512, 1024, 2048)}
CROSSOVER = (0.0125, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3)


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        wiring: ``"clt"``, ``"plt"``, or ``"models"`` for a crosscoder of two models.
        activation: By name.
        layers: Of the model.
        width: Of every site, d.
        latents: Of each group.
        batch: Tokens.
        active: Latents a token and group.
    """

    wiring: str = "clt"
    activation: str = "topk"
    layers: int = 6
    width: int = 256
    latents: int = 2048
    batch: int = 1024
    active: int = 50


CASES = {
    "TopK CLT": Case(),
    "JumpReLU CLT": Case(activation="jumprelu"),
    "BatchTopK CLT": Case(activation="batchtopk"),
    "TopK PLT": Case(wiring="plt"),
    "two-model crosscoder": Case(wiring="models", width=768, latents=8192),
}


# ---------------------------------------------------------------------------------------------------- the step


class Run:
    """A crosscoder in training, and two batches that it sees in turn."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        wiring = {
            "clt": lambda: cp.Wiring.clt(case.layers),
            "plt": lambda: cp.Wiring.plt(case.layers),
            "models": lambda: cp.Wiring.model_diff(("base", "chat"), layer=0),
        }[case.wiring]()
        settings = {"bandwidth": 0.05} if case.activation == "jumprelu" else {"k": case.active}
        self.crosscoder = cp.Crosscoder(wiring, case.width, case.latents, case.activation, dtype=dtype, **settings)
        sites = (len(wiring.read_sites), len(wiring.write_sites))
        self.batches = [tuple(torch.randn(n, case.batch, case.width, dtype=dtype) for n in sites) for _ in range(2)]
        self.penalties = PENALTY if case.activation == "jumprelu" else ()
        self.seen = 0
        if self.crosscoder.threshold is not None and self.crosscoder.activation.has_threshold:
            self._set_thresholds(case)
        # Rates so low that as many latents stay active as there were.
        self.optimizer = torch.optim.Adam(self.crosscoder.parameters(), lr=1e-7, fused=True)

    @torch.no_grad()
    def _set_thresholds(self, case: Case) -> None:
        for g, threshold in enumerate(self.crosscoder.threshold):
            h = self.crosscoder.pre_activations(g, self.batches[0][0][g]).flatten()
            threshold.fill_(h.kthvalue(h.numel() - case.active * case.batch).values)

    def gradients(self, path: str) -> sparse.ForwardPass:
        """Run forward and backward."""
        x, y = self.batches[self.seen % 2]
        self.optimizer.zero_grad(set_to_none=True)
        run = forward_pass(self.crosscoder, x, y, path)
        (run.error() + total(self.penalties, run)[0]).backward()
        return run

    def step(self, path: str) -> None:
        """Take a step."""
        self.gradients(path)
        self.optimizer.step()
        self.seen += 1


def error_of_gradients(case: Case) -> float:
    """Return the largest difference between the paths' gradients in float64, as a share of the largest gradient."""
    run = Run(case, torch.float64)
    grads: dict[str, list[Tensor]] = {}
    for path in ("sparse", "dense"):
        run.gradients(path)
        grads[path] = [p.grad for p in run.crosscoder.parameters() if p.grad is not None]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*grads.values(), strict=True))


def floors(case: Case, run: Run) -> tuple[float, float]:
    """Return the operations that a dense and a sparse step need at least."""
    layout = run.crosscoder.layout
    groups = range(run.crosscoder.wiring.n_groups)
    reads, writes = sum(layout.read_width(g) for g in groups), sum(layout.write_width(g) for g in groups)
    # Of an encoder there is no gradient of its input: two products rather than three.
    dense = case.batch * case.latents * (4 * reads + 6 * writes)
    active = case.batch * case.active * (2 * reads + 6 * writes)
    return dense, 2 * case.batch * case.latents * reads + active


# ------------------------------------------------------------------------------------------------- measurement


def in_turn(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median wall seconds of each function, called in turn after two warm-ups."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 2):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repeat >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def timed(case: Case, repeats: int, paths: Sequence[str] = ("sparse", "dense")) -> tuple[dict[str, float], float]:
    """Return the median seconds of a step by each path, and the operations a second of a large product."""
    run, large = Run(case), torch.randn(1024, 1024)
    runs = {path: copy.deepcopy(run) for path in paths}
    steps = {path: lambda path=path: runs[path].step(path) for path in paths}
    times = in_turn({**steps, "product": lambda: large @ large}, repeats)
    return times, 2 * 1024**3 / times.pop("product")


def peak(name: str, path: str, threads: int) -> float:
    """Return the bytes by which a step's memory grows, measured in a fresh process."""
    command = [sys.executable, __file__, "--peak", name, "--path", path, "--threads", str(threads)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{name}, {path}, failed:\n{result.stdout}{result.stderr}")
    return json.loads(result.stdout)["peak"]


def print_peak(name: str, path: str) -> None:
    run = Run(CASES[name])
    for _ in range(3):
        run.step(path)
    _, cost = measured(lambda: run.step(path))
    print(json.dumps(cost))


class Steps:
    """A process that takes steps of training and times them, for as long as the context lasts."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def read(self) -> str:
        """Return what the process says next."""
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(map(str, self.process.args))} failed")
        return line

    def step(self) -> float:
        """Return the seconds that a step takes."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.read())


def beside_peer(python: str, name: str, csr: bool, repeats: int) -> tuple[float, float, dict[str, float]]:
    """Return the median seconds of our steps and of the peer's, and what the peer says of itself."""
    threads = torch.get_num_threads()
    job = json.dumps({**asdict(CASES[name]), "csr": csr, "threads": threads})
    with ExitStack() as stack:
        ours = stack.enter_context(Steps([sys.executable, __file__, "--serve", name, "--threads", str(threads)]))
        theirs = stack.enter_context(Steps([python, "-W", "ignore", str(PEERS / f"{PEER}_worker.py"), job]))
        told = json.loads(theirs.read())
        times = [(ours.step(), theirs.step()) for _ in range(repeats + 2)][2:]
    return *(statistics.median(taken) for taken in zip(*times, strict=True)), told


# ------------------------------------------------------------------------------------------------------ tables


def table_of(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, caption=f"float32, {torch.get_num_threads()} thread(s), medians of wall time")
    for column in columns:
        table.add_column(column, justify="left" if not column else "right")
    return table


def show_cases(console: Console, repeats: int) -> None:
    columns = ("", "sparse ms", "dense ms", "ratio", "floor ms", "dense floor", "sparse MB", "dense MB", "difference")
    table = table_of("A training step of 1,024 tokens", columns)
    for name, case in CASES.items():
        times, rate = timed(case, repeats)
        dense, few = floors(case, Run(case))
        peaks = [peak(name, path, torch.get_num_threads()) / 1e6 for path in ("sparse", "dense")]
        table.add_row(
            name,
            *(f"{1000 * times[path]:.0f}" for path in ("sparse", "dense")),
            f"{times['dense'] / times['sparse']:.1f}x",
            *(f"{1000 * work / rate:.0f}" for work in (few, dense)),
            *(f"{each:.0f}" for each in peaks),
            f"{error_of_gradients(case):.0e}",
        )
    console.print(table)


def show_growth(console: Console, repeats: int) -> None:
    table = table_of("How a step of the TopK CLT grows", ("", "sparse ms", "dense ms", "ratio", "floor ms"))
    for what, values in GROWTH.items():
        for value in values:
            case = replace(Case(), **{what: value})
            times, rate = timed(case, repeats)
            _, few = floors(case, Run(case))
            cells = [f"{1000 * times[path]:.0f}" for path in ("sparse", "dense")]
            ratio = f"{times['dense'] / times['sparse']:.1f}x"
            table.add_row(f"{value:,} {what}", *cells, ratio, f"{1000 * few / rate:.0f}")
        table.add_section()
    console.print(table)


def show_crossover(console: Console, repeats: int) -> None:
    densities = [f"{density:.2%}" for density in CROSSOVER]
    table = table_of("Dense / sparse, by the share of latents that are active", ("", *densities))
    for name, case in CASES.items():
        ratios = []
        for density in CROSSOVER:
            times, _ = timed(replace(case, active=round(density * case.latents)), repeats)
            ratios.append(f"{times['dense'] / times['sparse']:.2f}")
        table.add_row(name, *ratios)
    console.print(table)
    console.print(f"SPARSE_BELOW is {sparse.SPARSE_BELOW}")


def show_peer(console: Console, repeats: int, python: str) -> None:
    table = table_of(
        "A training step of 1,024 tokens", ("", "ours ms", "Llamascopium ms", "ratio", "its active latents")
    )
    for name, csr in (("TopK CLT", True), ("TopK CLT", False), ("JumpReLU CLT", False), ("BatchTopK CLT", False)):
        ours, theirs, told = beside_peer(python, name, csr, repeats)
        cells = (f"{1000 * ours:.0f}", f"{1000 * theirs:.0f}", f"{theirs / ours:.1f}x", f"{told['active']:.1f}")
        table.add_row(f"{name}, {'CSR' if csr else 'dense'} there", *cells)
    console.print(table)
    console.print(f"Llamascopium {told['version']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--growth", action="store_true", help="vary layers, latents and batch")
    parser.add_argument("--crossover", action="store_true", help="vary how many latents are active")
    parser.add_argument("--peer", action="store_true", help="take steps with Llamascopium beside ours")
    add_environment(parser, PEER)
    parser.add_argument("--serve", choices=CASES, help="take a step of one case for every line read")
    parser.add_argument("--peak", choices=CASES, help="print one case's peak memory, as JSON")
    parser.add_argument("--path", choices=sparse.PATHS, default="sparse", help="of --peak")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=140)
    if options.peak:
        print_peak(options.peak, options.path)
    elif options.serve:
        run = Run(CASES[options.serve])
        serve(lambda: run.step("sparse"))
    elif options.peer:
        show_peer(console, options.repeats, str(environment(PEER, options.environment, console)))
    elif options.growth:
        show_growth(console, options.repeats)
    elif options.crossover:
        show_crossover(console, options.repeats)
    else:
        show_cases(console, options.repeats)


if __name__ == "__main__":
    main()
