"""How fast the sparse decode is, and from which density on a dense product is the faster one.

    python benchmarks/decode.py --quick

Times the decode of a CLT of 12 layers, d 768 and 4,096 latents a layer, for 64 tokens with 50 active latents a layer,
by the sparse path and by a dense einsum on the same decoder tensors, alternating. The floors beside it are what any
method must do: two operations for each active latent and written coordinate, and one read of each row in use, at the
bandwidth that summing a large tensor reaches here.
The sweep over densities finds where dense overtakes sparse: the ground for `SPARSE_BELOW` in core/features.py.
Wall time depends on what else runs; ratios and CPU time hardly do.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from clt_plugin.core import Crosscoder, SparseFeatures, SparseGroup, Wiring, features
from clt_plugin.core.features import decode_dense_group

N_LAYERS, D_MODEL, N_LATENTS, N_TOKENS, L0 = 12, 768, 4096, 64, 50
DENSITIES = (0.005, 0.0122, 0.025, 0.035, 0.05, 0.075, 0.1, 0.2)
# (tokens, written width): a prompt and a batch, the shortest and the longest decoder.
SHAPES = ((16, 768), (64, 768), (64, 9216), (256, 768), (256, 4608), (1024, 768))
QUICK_DENSITIES, QUICK_SHAPES = (0.0122, 0.025, 0.05, 0.1), ((64, 768), (64, 4608))


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Return the CPU and wall seconds of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    return time.process_time() - cpu, time.perf_counter() - wall


def compare(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float]]:
    """Return the median CPU and wall seconds of each function, called in turn after one warm-up."""
    for function in functions.values():
        function()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(timed(function))
    return {
        name: (statistics.median(cpu for cpu, _ in runs), statistics.median(wall for _, wall in runs))
        for name, runs in times.items()
    }


def bandwidth() -> float:
    """Return the bytes a CPU second that reading a large tensor reaches."""
    large = torch.ones(50_000_000)
    cpu, _ = compare({"read": large.sum}, repeats=5)["read"]
    return 4 * len(large) / cpu


def sparse_acts(n_tokens: int, n_latents: int, n_active: int) -> torch.Tensor:
    """Return (n_tokens, n_latents) activations with n_active latents a token."""
    chosen = torch.rand(n_tokens, n_latents).topk(n_active, dim=-1).indices
    return torch.zeros(n_tokens, n_latents).scatter_(1, chosen, torch.rand(n_tokens, n_active) + 0.1)


def dense_einsum(clt: Crosscoder, acts: torch.Tensor) -> torch.Tensor:
    """Decode by one einsum a layer over the whole decoder (F, L - l, d)."""
    y = torch.stack([bias.expand(acts.shape[1], -1) for bias in clt.b_dec]).clone()
    for layer in range(N_LAYERS):
        y[layer:] += torch.einsum("tf,fwd->wtd", acts[layer], clt.decoder_view(layer))
    return y


def whole_clt(console: Console, repeats: int) -> None:
    """Time the decode of a whole CLT."""
    clt = Crosscoder(Wiring.clt(N_LAYERS), D_MODEL, N_LATENTS)
    acts = torch.stack([sparse_acts(N_TOKENS, N_LATENTS, L0) for _ in range(N_LAYERS)])
    sparse = SparseFeatures(tuple(SparseGroup.of(layer) for layer in acts), (N_TOKENS,))
    ways = {
        "dense einsum": lambda: dense_einsum(clt, acts),
        "dense path": lambda: clt.decode(acts, path="dense"),
        "sparse path": lambda: clt.decode(acts, path="sparse"),
        "auto path": lambda: clt.decode(acts),
        "sparse features": lambda: clt.decode(sparse),
    }
    with torch.no_grad():
        error = max(float((way() - ways["dense einsum"]()).abs().max()) for way in ways.values())
        times = compare(ways, repeats)
    widths = [D_MODEL * (N_LAYERS - layer) for layer in range(N_LAYERS)]
    flops = sum(2 * int(acts[layer].count_nonzero()) * widths[layer] for layer in range(N_LAYERS))
    rows = [int(acts[layer].any(dim=0).sum()) for layer in range(N_LAYERS)]
    read = sum(4 * n * width for n, width in zip(rows, widths, strict=True))
    whole = sum(4 * N_LATENTS * width for width in widths)
    work = {"dense": (sum(2 * N_TOKENS * N_LATENTS * w for w in widths), whole), "sparse": (flops, read)}

    title = f"CLT decode: {N_LAYERS} layers, d {D_MODEL}, {N_LATENTS} latents, {N_TOKENS} tokens, L0 {L0} a layer"
    table = Table(title=title, caption=f"float32, {torch.get_num_threads()} thread(s), largest difference {error:.1e}")
    for column in ("", "CPU ms", "wall ms", "CPU ratio", "wall ratio", "GFLOP", "MB of decoder", "CPU GFLOP/s"):
        table.add_column(column, justify="left" if not column else "right")
    base = times["dense einsum"]
    for name, (cpu, wall) in times.items():
        n_flops, n_bytes = work["dense" if name.startswith("dense") else "sparse"]
        cells = [f"{1000 * cpu:.1f}", f"{1000 * wall:.1f}", f"{base[0] / cpu:.1f}x", f"{base[1] / wall:.1f}x"]
        table.add_row(name, *cells, f"{n_flops / 1e9:.2f}", f"{n_bytes / 1e6:.0f}", f"{n_flops / 1e9 / cpu:.1f}")
    console.print(table)
    speed, gathered = bandwidth(), 2 * flops
    console.print(
        f"Floors of the sparse decode: {flops / 1e9:.2f} GFLOP and {read / 1e6:.0f} MB of decoder rows, "
        f"{flops / work['dense'][0]:.1%} and {read / whole:.1%} of the dense decode's.\n"
        f"Memory is read at {speed / 1e9:.1f} GB a CPU second: {1000 * read / speed:.0f} ms to read each row in use "
        f"once, {1000 * gathered / speed:.0f} ms once for each token that uses it ({gathered / 1e6:.0f} MB).\n"
    )


def crossover(ratios: dict[float, float]) -> str:
    """Return the density where the ratio falls to 1, by interpolation between the two around it."""
    previous = None
    for density, ratio in ratios.items():
        if ratio < 1:
            if previous is None:
                return f"< {density:.2f}"
            below, above = previous
            return f"{below + (density - below) * (above - 1) / (above - ratio):.3f}"
        previous = (density, ratio)
    return f"> {density:.2f}"


def sweep(console: Console, shapes: tuple[tuple[int, int], ...], densities: tuple[float, ...], repeats: int) -> None:
    """Time one group's decode over densities: how many times as long as the sparse path the dense one takes."""
    table = Table(
        title=f"CPU time of dense / sparse, {torch.get_num_threads()} thread(s), {N_LATENTS} latents",
        caption=f"SPARSE_BELOW is {features.SPARSE_BELOW}",
    )
    for column in ("tokens", "width", "pass", *(f"{density:.1%}" for density in densities), "equal at"):
        table.add_column(column, justify="right")
    for n_tokens, width in shapes:
        weight = torch.randn(N_LATENTS, width)
        upstream = torch.randn(n_tokens, width)
        for name, train in (("forward", False), ("and backward", True)):
            ratios = {}
            for density in densities:
                acts = sparse_acts(n_tokens, N_LATENTS, max(1, round(density * N_LATENTS)))

                def decode(path: str, acts=acts, weight=weight, upstream=upstream, train=train) -> None:
                    acts, weight = acts.detach().requires_grad_(train), weight.detach().requires_grad_(train)
                    out = decode_dense_group(acts, weight, lambda rows: weight, path)
                    if train:
                        torch.autograd.grad(out, (acts, weight), upstream)

                times = compare({path: lambda p=path, d=decode: d(p) for path in ("sparse", "dense")}, repeats)
                ratios[density] = times["dense"][0] / times["sparse"][0]
            cells = [f"{ratio:.2f}" for ratio in ratios.values()]
            table.add_row(str(n_tokens), str(width), name, *cells, crossover(ratios))
        del weight
        gc.collect()
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats and shapes: under a minute")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    console = Console(width=140)
    whole_clt(console, repeats=5 if options.quick else 11)
    if options.quick:
        sweep(console, QUICK_SHAPES, QUICK_DENSITIES, repeats=3)
    else:
        sweep(console, SHAPES, DENSITIES, repeats=5)


if __name__ == "__main__":
    main()
