"""How fast the targeting scans are, beside the matrix product that they are made of and the disk that they read from.

    python benchmarks/targeting.py
    python benchmarks/targeting.py --width 2304 --mlp 9216 --heads 8 --latents 1024 --folder /somewhere/with/2/GB
    python benchmarks/targeting.py --device cuda

Writes a synthetic CLT of 26 layers in circuit-tracer's layout (bfloat16), with a random Gemma-2-shaped model of few
tokens, and scans it lazily in a process of its own: all norms; heads against one null and against all; neurons against
one null and against all. Shown are wall and CPU seconds, decoder vectors a second, and peak memory beyond the model,
with the pages of files that are mapped. Beside each its floor: the product of every scanned vector with every row, at
the rate that a product of a block's size reaches here, or reading the files once from front to back, whichever takes
longer. CPU seconds, of all threads, over the floor's tell how far from it a scan is where other things run as well.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from lazy import block, forget, front_to_back
from rich.console import Console
from rich.table import Table

from clt_plugin.formats._files import save_tensors

N_LAYERS, HEAD_WIDTH, DTYPE = 26, 256, torch.bfloat16

PROGRAM = """
import json, re, sys, threading, time
import torch, transformers
import clt_plugin as cp
from clt_plugin.analysis import weights

folder, device = sys.argv[1:3]
d, d_mlp, n_heads, threads, draws = map(int, sys.argv[3:])
torch.set_num_threads(threads)
transformers.logging.set_verbosity_error()

def resident():
    status = open("/proc/self/status").read()
    return sum(int(re.search(rf"{kind}:\\s+(\\d+) kB", status)[1]) for kind in ("RssAnon", "RssFile")) * 1024

config = transformers.Gemma2Config(vocab_size=64, hidden_size=d, intermediate_size=d_mlp, num_hidden_layers=26,
    num_attention_heads=n_heads, num_key_value_heads=max(1, n_heads // 2), head_dim=256, bos_token_id=0, eos_token_id=1,
    pad_token_id=1)
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
model = transformers.Gemma2ForCausalLM(config).eval().requires_grad_(False).to(device)
torch.set_default_dtype(torch.float32)
clt = cp.load(folder, lazy=True)
peak, done = 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, resident())
        time.sleep(0.005)

watcher = threading.Thread(target=watch)
watcher.start()

def measure(name, call):
    global peak
    before = peak = resident()
    wall, cpu = time.perf_counter(), time.process_time()
    found = call()
    return {"name": name, "wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu,
            "peak": max(peak, resident()) - before, "vectors": getattr(found, "vectors", 0)}

def floor(rows):
    # Of one block: what a product of this size takes, a vector.
    a, b = torch.randn(1024, d, device=device), torch.randn(rows, d, device=device)
    times = []
    for _ in range(6):
        start, cpu = time.perf_counter(), time.process_time()
        a @ b.T
        if device != "cpu":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start, time.process_time() - cpu))
    return [sorted(each)[2] / 1024 for each in zip(*times[1:])]

few, quiet = {"draws": draws, "nulls": ["covariance"]}, {"bar": False}
results = [
    measure("norms", lambda: weights.decoder_norms(clt, **quiet)),
    measure("heads, 1 null", lambda: weights.attention_targeting(clt, model, **few, **quiet)),
    measure("heads, 6 nulls", lambda: weights.attention_targeting(clt, model, draws=draws, **quiet)),
    measure("neurons, 1 null", lambda: weights.mlp_targeting(clt, model, **few, **quiet)),
    measure("neurons, 5 nulls", lambda: weights.mlp_targeting(clt, model, draws=draws, **quiet)),
]
done.set()
watcher.join()
print("RESULT" + json.dumps({"results": results, "heads": floor(n_heads * 256), "neurons": floor(d_mlp)}))
"""


def write(folder: Path, width: int, n_latents: int) -> None:
    """Write a CLT in circuit-tracer's layout."""
    torch.manual_seed(0)
    for layer in range(N_LAYERS):
        zeros = torch.zeros(n_latents, dtype=DTYPE)
        own = {f"W_enc_{layer}": (torch.randn(n_latents, width) / width**0.5).to(DTYPE), f"b_enc_{layer}": zeros}
        own |= {f"b_dec_{layer}": torch.zeros(width, dtype=DTYPE), f"threshold_{layer}": zeros}
        save_tensors(folder / f"W_enc_{layer}.safetensors", own)
        decoder = {f"W_dec_{layer}": block((n_latents, N_LAYERS - layer, width), DTYPE, 0.1)}
        save_tensors(folder / f"W_dec_{layer}.safetensors", decoder)


def main() -> None:
    """Measure one size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write, and remove again; by default a temporary folder")
    parser.add_argument("--width", type=int, default=256, help="d_model; Gemma-2-2B's is 2304")
    parser.add_argument("--mlp", type=int, default=1024, help="neurons a layer; Gemma-2-2B has 9216")
    parser.add_argument("--heads", type=int, default=2, help="heads of width 256; Gemma-2-2B has 8")
    parser.add_argument("--latents", type=int, default=512, help="a layer; 16384 is Gemma-2-2B's CLT at its full size")
    parser.add_argument("--draws", type=int, default=499, help="of each null, for each target")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    console = Console(width=140)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write(folder, options.width, options.latents)
        size = sum(path.stat().st_size for path in folder.iterdir() if path.name.startswith("W_dec"))
        forget(folder)
        front_to_back(folder)
        bandwidth = front_to_back(folder)
        shape = (options.device, options.width, options.mlp, options.heads, options.threads, options.draws)
        command = [sys.executable, "-c", PROGRAM, name, *map(str, shape)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(run.stderr)
        told = json.loads(re.search(r"RESULT(.*)", run.stdout)[1])  # type: ignore[index]
    title = f"26 layers, d {options.width}, {options.latents} latents a layer, {size / 1e9:.2f} GB of decoders"
    table = Table("", "vectors", "wall s", "CPU s", "vectors/s", "floor s", "CPU/floor's", "peak MiB", title=title)
    for each in told["results"]:
        n = each["vectors"] or options.latents * N_LAYERS * (N_LAYERS + 1) // 2
        wall, cpu = told.get(each["name"].split(",")[0], (0.0, 0.0))
        read = size / bandwidth
        shown = (each["wall"], each["cpu"], n / each["wall"], max(n * wall, read), each["cpu"] / max(n * cpu, read))
        texts = [f"{v:.2f}" if v < 1000 else f"{v:,.0f}" for v in shown]
        table.add_row(each["name"], f"{n:,}", *texts, f"{each['peak'] / 2**20:,.0f}")
    console.print(table)
    console.print(f"read front to back, warm: {bandwidth / 1e9:.2f} GB/s")


if __name__ == "__main__":
    main()
