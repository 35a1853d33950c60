"""What a lazily read CLT costs: opening it, and one encode and decode of 32 tokens, beside reading everything.

    python benchmarks/lazy.py --folder /somewhere/with/20/GB

Writes a synthetic CLT of 8 to 9 GB in each of the two main layouts, circuit-tracer's (bfloat16, encoders latents first,
decoders of the layers written) and Gemma Scope 2's (float32, encoders transposed, full-length decoders), and measures
in a process of its own, with the files out of the page cache (cold) and in it (warm). Peak memory is the process's
growth, with the pages of files that it maps. Beside it the floor: the bytes of all encoders and of the decoder rows of
active features, which any method must read, at the bandwidth that reading these files from front to back reaches.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from clt_plugin.formats._files import Rows, save_tensors

N_LAYERS, N_TOKENS, L0 = 26, 32, 50
LAYOUTS = {"circuit-tracer": (2304, 5120, torch.bfloat16), "gemma-scope-2": (1152, 2688, torch.float32)}

PROGRAM = """
import json, re, sys, threading, time
import torch
import clt_plugin as cp

folder, lazy = sys.argv[1], sys.argv[2] == "lazily"
torch.set_num_threads(2)

def resident():
    status = open("/proc/self/status").read()
    return sum(int(re.search(rf"{kind}:\\s+(\\d+) kB", status)[1]) for kind in ("RssAnon", "RssFile")) * 1024

peak, before, done = 0, resident(), threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, resident())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
start = time.perf_counter()
clt = cp.load(folder, lazy=lazy)
opened = time.perf_counter()
torch.manual_seed(0)
x = torch.randn(clt.n_layers, 32, clt.d_model).to(clt.dtype)
cpu = time.process_time()
with torch.no_grad():
    features = clt.encode(x, sparse=True)
    encoded = time.perf_counter()
    y = clt.decode(features)
finished = time.perf_counter()
cpu = time.process_time() - cpu
done.set()
watcher.join()
rows = sum(len(group.latents.unique()) * clt.decoder_vectors(g, torch.tensor([0])).numel() for g, group in
           enumerate(features.groups))
print(json.dumps({"open": opened - start, "encode": encoded - opened, "decode": finished - encoded, "cpu": cpu,
                  "peak": max(peak, resident()) - before, "active": len(features), "rows": rows * clt.dtype.itemsize,
                  "mean": float(y.float().abs().mean())}))
"""


def block(shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> Rows:
    """Return a tensor of random values of which 64 rows repeat: what is in it costs nothing to make."""
    rows = (torch.randn(64, *shape[1:]) * scale).to(dtype)
    return Rows(shape, dtype, lambda chunk: rows[torch.arange(chunk.start, chunk.stop) % 64])


def write(folder: Path, layout: str, n_latents: int | None) -> None:
    """Write a CLT whose thresholds let about `L0` latents a token and layer through."""
    d, n, dtype = LAYOUTS[layout]
    n = n_latents or n
    # Pre-activations of normal inputs and encoders of norm 1 are normal.
    cut = float(torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - L0 / n)))
    threshold = torch.full((n,), cut, dtype=dtype)
    for layer in range(N_LAYERS):
        b_enc, b_dec = torch.zeros(n, dtype=dtype), torch.zeros(d, dtype=dtype)
        encoder = (torch.randn(n, d) / d**0.5).to(dtype)
        if layout == "circuit-tracer":
            own = {f"W_enc_{layer}": encoder, f"b_enc_{layer}": b_enc, f"b_dec_{layer}": b_dec}
            save_tensors(folder / f"W_enc_{layer}.safetensors", own | {f"threshold_{layer}": threshold})
            decoder = {f"W_dec_{layer}": block((n, N_LAYERS - layer, d), dtype, 0.1)}
            save_tensors(folder / f"W_dec_{layer}.safetensors", decoder)
        else:
            decoder_rows = (torch.randn(64, N_LAYERS, d) * 0.1).to(dtype)
            decoder_rows[:, :layer] = 0
            rows = Rows((n, N_LAYERS, d), dtype, lambda c, held=decoder_rows: held[torch.arange(c.start, c.stop) % 64])
            own = {"w_enc": encoder.T.contiguous(), "b_enc": b_enc, "b_dec": b_dec, "threshold": threshold}
            save_tensors(folder / f"params_layer_{layer}.safetensors", own | {"w_dec": rows})
    if layout == "gemma-scope-2":
        hook = "model.layers.{all}."
        config = {
            "hf_hook_point_in": f"{hook}pre_feedforward_layernorm.output",
            "hf_hook_point_out": f"{hook}post_feedforward_layernorm.output",
            "width": n * N_LAYERS,
            "model_name": "google/gemma-3-1b-pt",
            "architecture": "jump_relu",
            "l0": L0,
            "affine_connection": False,
            "type": "clt",
        }
        (folder / "config.json").write_text(json.dumps(config))


def forget(folder: Path) -> None:
    """Put a folder's files out of the page cache."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def front_to_back(folder: Path) -> float:
    """Return the bytes a second that reading every file reaches."""
    start, total = time.perf_counter(), 0
    for path in folder.iterdir():
        with open(path, "rb", buffering=0) as file:
            while data := file.read(1 << 24):
                total += len(data)
    return total / (time.perf_counter() - start)


def measure(folder: Path, way: str, cold: bool) -> dict[str, float]:
    """Run the program once."""
    if cold:
        forget(folder)
    result = subprocess.run([sys.executable, "-c", PROGRAM, str(folder), way], capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stderr)
    return json.loads(re.search(r"\{.*\}", result.stdout)[0])  # type: ignore[index]


def main() -> None:
    """Measure both layouts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write, and remove again; by default a temporary folder")
    parser.add_argument("--latents", type=int, help="latents a layer: 16384 is Gemma-2-2B's CLT at its full size")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layout", choices=LAYOUTS, action="append")
    parser.add_argument("--lazily-only", action="store_true", help="where everything would not fit into memory")
    options = parser.parse_args()
    console = Console(width=150)
    for layout in options.layout or LAYOUTS:
        folder = Path(tempfile.mkdtemp(dir=options.folder))
        try:
            write(folder, layout, options.latents)
            size = sum(path.stat().st_size for path in folder.iterdir())
            forget(folder)
            bandwidth = {"cold": front_to_back(folder), "warm": front_to_back(folder)}
            table = Table(
                "",
                "open s",
                "encode s",
                "decode s",
                "CPU s",
                "peak MiB",
                "floor s",
                title=f"{layout}, {size / 1e9:.1f} GB",
            )
            for way in ("lazily",) if options.lazily_only else ("lazily", "everything"):
                for state in ("cold", "warm"):
                    runs = [measure(folder, way, state == "cold") for _ in range(options.repeats)]
                    median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                    d, n, dtype = LAYOUTS[layout]
                    encoders = N_LAYERS * (options.latents or n) * d * dtype.itemsize
                    floor = (
                        (encoders + median["rows"]) / bandwidth[state] if way == "lazily" else size / bandwidth[state]
                    )
                    shown = (f"{median[key]:.2f}" for key in ("open", "encode", "decode", "cpu"))
                    table.add_row(f"{way}, {state}", *shown, f"{median['peak'] / 2**20:,.0f}", f"{floor:.2f}")
            console.print(table)
            console.print(
                f"active latents: {median['active']:,.0f}; read front to back: "
                + ", ".join(f"{state} {rate / 1e9:.2f} GB/s" for state, rate in bandwidth.items())
            )
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
