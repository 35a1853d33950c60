"""Whether circuit-tracer reads what this library saves, and this library what circuit-tracer saves.

    python benchmarks/circuit_tracer_format.py

Installs circuit-tracer, at the versions in peers/circuit-tracer.txt, in an environment of its own: about 1.6 GB with a
CPU build of torch, which ``PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu`` finds where pip's own index has
builds for GPUs alone. Then random weights go through files in both directions, and random inputs through both tools:

- ours -> theirs: CLTs saved with ``format="circuit-tracer"`` lie in a Hub cache, from which circuit-tracer's
  ``load_transcoder_from_hub`` takes them without a network, in memory and lazily. It must agree with the CLT that was
  saved, and with what we read back.
- ours -> theirs -> ours: circuit-tracer's ``save_transcoders_to_cache`` writes them anew. What comes back is exact.
- theirs -> ours: CLTs, and sets of transcoders with and without skips (which we read and do not write), written by
  circuit-tracer's ``to_safetensors``, read by `clt_plugin.load`, in memory and lazily.

Features are compared, and reconstructions of the very same features: as encode and decode give them, and as
circuit-tracer's attribution does, which gives nothing to the first position. In bfloat16 the two round at different
points, so that a latent at its threshold may be active in one alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _circuit_tracer import add_environment, ask, environment, snapshot
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

import clt_plugin as cp
from clt_plugin.formats._hooks import TRANSFORMER_LENS

WORKER = "circuit_tracer_worker.py"
N_LAYERS, D_MODEL, N_LATENTS, N_TOKENS = 5, 20, 48, 32
# The largest difference allowed: absolute and relative to the largest entry, in bfloat16 only the latter.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-6}
FLIPPED = 0.005  # of all latents in bfloat16
ARITHMETICS = {"float32": ("float32",), "bfloat16": ("float32", "bfloat16")}
CLTS = {"ReLU": ("hook_resid_mid", "hook_mlp_out"), "JumpReLU": ("mlp.hook_in", "mlp.hook_out")}
SETS = (("ReLU", True), ("JumpReLU", False), ("JumpReLU", True))


@dataclass
class Found:
    """The largest differences between two tensors' entries."""

    absolute: float = 0.0
    relative: float = 0.0
    flipped: float = 0.0

    def add(self, ours: Tensor, theirs: Tensor, arithmetic: str, features: bool = False) -> None:
        """Take two more tensors into account."""
        if ours.shape != theirs.shape:
            raise SystemExit(f"ours has shape {tuple(ours.shape)}, circuit-tracer's {tuple(theirs.shape)}")
        apart = (ours.double() - theirs.double()).abs()
        if not apart.isfinite().all():
            raise SystemExit("a result is not a finite number")
        if features:
            flipped = (ours != 0) != (theirs != 0)
            self.flipped = max(self.flipped, float(flipped.double().mean()))
            if arithmetic == "bfloat16":
                apart[flipped] = 0
        self.absolute = max(self.absolute, float(apart.max()))
        self.relative = max(self.relative, float(apart.max() / theirs.double().abs().max()))

    def within(self, arithmetic: str) -> bool:
        """Whether that is within the tolerance."""
        if arithmetic == "bfloat16":
            return self.relative <= TOLERANCE[arithmetic] and self.flipped <= FLIPPED
        return self.absolute <= TOLERANCE[arithmetic] and self.relative <= TOLERANCE[arithmetic]

    def __str__(self) -> str:
        return f"{self.absolute:.1e} ({self.relative:.1e})"


def jobs() -> dict[str, list[dict[str, Any]]]:
    """Say what is made on either side."""
    ours, theirs = [], []
    for stored, arithmetics in ARITHMETICS.items():
        same = {"stored": stored, "arithmetics": arithmetics}
        for activation, hooks in CLTS.items():
            clt = {"kind": "CLT", "activation": activation, "skip": False, "hooks": hooks} | same
            ours.append(clt | {"name": f"ours/clt-{activation}-{stored}"})
            theirs.append(clt | {"name": f"theirs/clt-{activation}-{stored}"})
        for activation, skip in SETS:
            part = {"kind": "set", "activation": activation, "skip": skip, "hooks": CLTS["JumpReLU"]} | same
            theirs.append(part | {"name": f"theirs/set-{activation}{'-skip' * skip}-{stored}"})
    return {"ours": ours, "theirs": theirs}


def make(job: dict[str, Any]) -> cp.Crosscoder:
    """Make a CLT with random weights."""
    read, write = (TRANSFORMER_LENS[hook] for hook in job["hooks"])
    host = cp.Host("google/gemma-2-2b", n_layers=N_LAYERS, exclude_first=1)
    wiring, dtype = cp.Wiring.clt(N_LAYERS, read, write), getattr(torch, job["stored"])
    clt = cp.Crosscoder(wiring, D_MODEL, N_LATENTS, job["activation"].lower(), host=host, dtype=dtype)
    for name, parameter in clt.named_parameters():
        scale = {"W_enc": D_MODEL**-0.5, "W_dec": N_LATENTS**-0.5}.get(name.partition(".")[0], 0.5)
        parameter.data = (torch.randn(parameter.shape) * scale).to(dtype)
    return clt.eval()


def save_to_hub_cache(clt: cp.Crosscoder, name: str, hub: Path) -> None:
    """Save a CLT there."""
    clt.save(snapshot(name, hub), format="circuit-tracer")


def compare(clt: cp.Crosscoder, x: Tensor, answers: Path, arithmetic: str, found: tuple[Found, Found]) -> None:
    """Find how features and reconstructions differ from circuit-tracer's."""
    theirs = load_file(answers)
    acts = clt.encode(x)
    attributed = acts.clone()
    attributed[:, : clt.host.exclude_first] = 0
    for kind, ours in (("", acts), ("attributed ", attributed)):
        features = theirs[f"{kind}features"]
        if not features.any():
            raise SystemExit(f"{answers}: no feature is active, so nothing is compared")
        found[0].add(ours, features, arithmetic, features=True)
        found[1].add(clt.decode(features, x.to(clt.dtype)), theirs[f"{kind}reconstruction"], arithmetic)


def check(
    job: dict[str, Any], folder: Path, answers: Path, x: Tensor, saved: cp.Crosscoder | None = None
) -> Iterator[tuple[str, Found, Found, bool]]:
    """Compare what is in a folder, and what was saved there, with circuit-tracer's answers.

    Returns:
        For each arithmetic (its name, features' differences, reconstructions' differences, whether they agree).
    """
    sites = [TRANSFORMER_LENS[hook] for hook in job["hooks"]]
    for arithmetic in job["arithmetics"]:
        found, dtype = (Found(), Found()), getattr(torch, arithmetic)
        clts = [cp.load(folder, lazy=lazy, dtype=dtype) for lazy in (False, True)]
        if saved is not None:
            clts.append(deepcopy(saved).to(dtype))
        for clt in clts:
            if [clt.sites.read_name, clt.sites.write_name] != sites:
                raise SystemExit(f"{job['name']}: {clt.sites}, where {sites} were expected")
            paths = sorted(answers.glob(f"{arithmetic}*.safetensors"))
            if len(paths) != (1 if saved is None else 2):  # in memory, and lazily where it loads
                raise SystemExit(f"{job['name']}: circuit-tracer answered in {len(paths)} ways")
            for path in paths:
                compare(clt, x, path, arithmetic, found)
        yield arithmetic, *found, all(part.within(arithmetic) for part in found)


def check_return(clt: cp.Crosscoder, folder: Path, x: Tensor) -> tuple[Found, Found, bool]:
    """Compare a CLT with what came back, which must be the same."""
    back, found = cp.load(folder), (Found(), Found())
    acts = clt.encode(x)
    found[0].add(back.encode(x), acts, "float32", features=True)
    found[1].add(back.decode(acts), clt.decode(acts), "float32")
    tensors = clt.state_dict(), back.state_dict()
    same = tensors[0].keys() == tensors[1].keys() and all(
        value.dtype == tensors[1][key].dtype and torch.equal(value, tensors[1][key])
        for key, value in tensors[0].items()
    )
    return *found, same and found[0].absolute == found[1].absolute == 0


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_environment(parser)
    options = parser.parse_args()
    console = Console(width=140)
    python = environment(options.environment, console)
    table = Table(caption="largest differences: absolute (relative to the largest entry)")
    for column in ("direction", "what", "files", "arithmetic", "features", "reconstructions", "active in one", "agree"):
        table.add_column(column, no_wrap=True, justify="right" if 3 < len(table.columns) < 7 else "left")
    agree = []

    def show(way: str, job: dict[str, Any], arithmetic: str, acts: Found, y: Found, good: bool) -> None:
        what = f"{job['kind']}, {job['activation']}" + ", skips" * job["skip"]
        flipped, mark = f"{acts.flipped:.2%}", "yes" if good else "NO"
        table.add_row(way, what, job["stored"], arithmetic, str(acts), str(y), flipped, mark)
        agree.append(good)

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder, todo = Path(name), jobs()
        x = torch.randn(N_LAYERS, N_TOKENS, D_MODEL)
        save_file({"x": x}, folder / "inputs.safetensors")
        made = {job["name"]: make(job) for job in todo["ours"]}
        for label, clt in made.items():
            save_to_hub_cache(clt, label, folder / "hub")
        (folder / "jobs.json").write_text(json.dumps({"shape": (N_LAYERS, D_MODEL, N_LATENTS), **todo}))
        ask(python, WORKER, folder)
        told = json.loads((folder / "told.json").read_text())
        for job in todo["ours"]:
            same_hooks = told["hooks"][job["name"]] == list(job["hooks"])
            at = snapshot(job["name"], folder / "hub"), folder / "answers" / job["name"]
            for arithmetic, acts, y, good in check(job, *at, x, made[job["name"]]):
                show("ours -> theirs", job, arithmetic, acts, y, good and same_hooks)
        for job in todo["ours"]:
            returned = check_return(made[job["name"]], folder / "cached" / job["name"], x)
            show("ours -> theirs -> ours", job, job["stored"], *returned)
        for job in todo["theirs"]:
            for row in check(job, folder / "made" / job["name"], folder / "answers" / job["name"], x):
                show("theirs -> ours", job, *row)
    sizes = f"{N_LAYERS} layers, d {D_MODEL}, {N_LATENTS} latents, {N_TOKENS} positions"
    table.title = f"circuit-tracer {told['version']}: {sizes}"
    console.print(table)
    if not all(agree):
        raise SystemExit(f"{agree.count(False)} of {len(agree)} disagree")


if __name__ == "__main__":
    main()
