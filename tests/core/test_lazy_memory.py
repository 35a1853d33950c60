"""A lazy crosscoder much larger than a memory bound runs within it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

# Many layers, so that one layer's file is small beside the whole: a kernel may map all of a file of which some rows
# are read, and what is mapped counts.
N_LAYERS, D, F = 24, 128, 2304
BOUND = 56 * 2**20

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")

PROGRAM = """
import json, re, sys, threading, time
import torch
from clt_plugin.core import Crosscoder, File, LazyStore, Piece, Wiring

folder, what, n_layers, d, n = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
torch.set_num_threads(1)

def resident():
    # Pages of files that are mapped (and merely cached) count as well as the process's own.
    status = open("/proc/self/status").read()
    return sum(int(re.search(rf"{kind}:\\s+(\\d+) kB", status)[1]) for kind in ("RssAnon", "RssFile")) * 1024

def make(n_layers, n, store=None):
    torch.manual_seed(0)
    clt = Crosscoder(Wiring.clt(n_layers), d, n, "topk", k=16, store=store)
    return clt, torch.randn(n_layers, 8, d)

def use(clt, x):
    features = clt.encode(x, sparse=True)
    return len(features), clt.decode(features)

small, x = make(2, 64)
use(small, x)

pieces = {}
for layer in range(n_layers):
    path = f"{folder}/layer_{layer}.safetensors"
    pieces["W_enc", layer] = (Piece(File(path), "W_enc", (n, d)),)
    pieces["W_dec", layer] = (Piece(File(path), "W_dec", (n, n_layers - layer, d)),)
clt, x = make(n_layers, n, LazyStore(pieces))

peak, before, done = 0, resident(), threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, resident())
        time.sleep(0.0005)

watcher = threading.Thread(target=watch)
watcher.start()
if what == "materialised":
    clt = clt.materialize()
with torch.no_grad():
    n_active, y = use(clt, x)
done.set()
watcher.join()
print(json.dumps({"growth": max(peak, resident()) - before, "active": n_active, "mean": float(y.abs().mean())}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a CLT of some 380 MB, a file a layer, and return its folder."""
    path = tmp_path_factory.mktemp("large")
    generator = torch.Generator().manual_seed(0)
    for layer in range(N_LAYERS):
        encoder = torch.randn(F, D, generator=generator) / D**0.5
        decoder = torch.randn(F, N_LAYERS - layer, D, generator=generator) / D**0.5
        save_file({"W_enc": encoder, "W_dec": decoder}, path / f"layer_{layer}.safetensors")
    yield path
    for file in path.iterdir():
        file.unlink()


def run(folder, what):
    command = [sys.executable, "-c", PROGRAM, str(folder), what, str(N_LAYERS), str(D), str(F)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(re.search(r"\{.*\}", result.stdout)[0])


@pytest.fixture(scope="module")
def lazily(folder):
    return run(folder, "lazy")


@needs_proc
def test_a_crosscoder_six_times_the_bound(folder, lazily):
    assert sum(file.stat().st_size for file in folder.iterdir()) > 6 * BOUND
    assert lazily["active"] == N_LAYERS * 8 * 16
    assert 0 < lazily["growth"] < BOUND


@needs_proc
def test_the_bound_tells_when_all_is_loaded(folder, lazily):
    whole = run(folder, "materialised")
    assert whole["growth"] > 6 * BOUND
    assert whole["active"] == lazily["active"]
    assert whole["mean"] == pytest.approx(lazily["mean"], rel=1e-5)
