"""The client's side of the remote tests: runs each request here, and writes it to a file as nnsight would send it.

A program of its own, since pytest's checks of shapes rewrite the functions that are to travel. Called with a folder,
which gets ``{case}.request`` and ``{case}.expected`` for each case.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import nnsight
import torch
from nnsight.intervention.backends.remote import RemoteBackend

import clt_plugin
import clt_plugin as cp
from clt_plugin import add_clt
from clt_plugin import interventions as iv
from support.crosscoders import make_clt
from support.models import nnsight_model
from support.tracing import token_ids

CASES = {}
FAMILY = {"persistent_lazy": "gemma2", "function": "gemma2"}


def case(function: Any) -> Any:
    CASES[function.__name__] = function
    return function


class ToFile(RemoteBackend):
    """Serialises a trace as the remote backend does, and writes it to a file instead of posting it."""

    def __init__(self, path: Path) -> None:
        super().__init__(model_key="tiny", host="http://localhost:1")
        self.path, self.compress = path, False

    def __call__(self, tracer: Any = None) -> None:
        self.path.write_bytes(self._serialize(tracer))


def clt_for(case_name: str) -> cp.Crosscoder:
    return make_clt(seed=len(case_name), activation="jumprelu", exclude_first=1)


@case
def applied(model: Any, ids: torch.Tensor, folder: Path, backend: Any) -> Any:
    edit = iv.chain(
        iv.only(iv.set_value(layer=0, feature=[1, 5], value=3.0), position=-1, where=iv.active(0, 2, position="any")),
        iv.add(layer=1, feature=3, value=[2.0]),
    )
    with model.add_clt(clt_for("applied"), mode="replace_with_error"):
        with model.trace(ids, backend=backend):
            edit.apply(model)
            features = model.clt.layers[1].features.output.save()
            logits = model.output.logits.save()
    return None if backend else {"features": features, "logits": logits}


@case
def edits(model: Any, ids: torch.Tensor, folder: Path, backend: Any) -> Any:
    edit = iv.chain(
        iv.only(iv.set_value(layer=0, feature=[1, 5], value=3.0), position=-1, where=iv.active(0, 2, position="any")),
        iv.add(layer=1, feature=3, value=[2.0]),
        iv.only_span(2),
    )
    with model.add_clt(clt_for("edits"), mode="replace_with_error", edits=edit):
        with model.trace(ids, backend=backend):
            features = model.clt.layers[1].features.output.save()
            logits = model.output.logits.save()
    return None if backend else {"features": features, "logits": logits}


@case
def persistent(model: Any, ids: torch.Tensor, folder: Path, backend: Any) -> Any:
    with model.add_clt(clt_for("persistent")):
        with model.trace(ids, backend=backend):
            model.clt.layers[1].features.output[:, -1] *= 2
            features = model.clt.layers[2].features.output.save()
            recon = model.clt.layers[2].recon.output.save()
            logits = model.output.logits.save()
    return None if backend else {"features": features, "recon": recon, "logits": logits}


@case
def persistent_lazy(model: Any, ids: torch.Tensor, folder: Path, backend: Any) -> Any:
    saved = folder / "clt"
    if not saved.exists():
        clt_for("persistent_lazy").save(saved)
    with model.add_clt(cp.load(saved, lazy=True), "replace_with_error", name="mine") as handle:
        with model.trace(ids, backend=backend):
            handle.layers[0].features.output += 1
            features = model.mine.layers[2].features.output.save()
            error = model.mine.layers[2].error.output.save()
            logits = model.output.logits.save()
    return None if backend else {"features": features, "error": error, "logits": logits}


@case
def function(model: Any, ids: torch.Tensor, folder: Path, backend: Any) -> Any:
    clt = clt_for("function")
    with model.trace(ids, backend=backend):
        add_clt(model, clt)
        features = model.clt.layers[2].features.output.save()
        logits = model.output.logits.save()
    return None if backend else {"features": features, "logits": logits}


@case
def function_of_the_package(model: Any, ids: torch.Tensor, folder: Path, backend: Any) -> Any:
    clt = clt_for("function_of_the_package")
    with model.trace(ids, backend=backend):
        cp.add_clt(model, clt, "replace_with_error", name="mine", layers=[0, 1], features={1: [3, 5, 7]})
        model.mine.layers[1].features.output += 1
        features = model.mine.layers[1].features.output.save()
        logits = model.output.logits.save()
    return None if backend else {"features": features, "logits": logits}


@case
def selection(model: Any, ids: torch.Tensor, folder: Path, backend: Any) -> Any:
    clt = make_clt(n_latents=3000)
    with model.add_clt(clt, "replace_with_error", layers=[1], features={1: [3, 5, 7]}) as handle:
        with model.trace(ids, backend=backend):
            handle.layers[1].features.output += 1
            features = model.clt.layers[1].features.output.save()
            logits = model.output.logits.save()
    return None if backend else {"features": features, "logits": logits}


@case
def one_invoke_of_two(model: Any, ids: torch.Tensor, folder: Path, backend: Any) -> Any:
    clt = clt_for("one_invoke_of_two")
    with model.trace(backend=backend) as tracer:
        with tracer.invoke(ids[:1]):
            plain = model.output.logits.save()
        with tracer.invoke(ids[1:]):
            add_clt(model, clt)
            features = model.clt.layers[2].features.output.save()
            logits = model.output.logits.save()
    return None if backend else {"plain": plain, "features": features, "logits": logits}


@case
def gradient(model: Any, ids: torch.Tensor, folder: Path, backend: Any) -> Any:
    clt = make_clt(cp.Wiring.plt(3), activation="topk", k=1, n_latents=100).requires_grad_()
    with model.trace(ids, backend=backend):
        add_clt(model, clt)
        acts = model.clt.layers[0].features.output
        loss = model.output.logits[:, -1, 5].sum()
        with loss.backward():
            slope = acts.grad.save()
    return None if backend else {"slope": slope}


@case
def generation(model: Any, ids: torch.Tensor, folder: Path, backend: Any) -> Any:
    clt = clt_for("generation")
    with model.generate(ids, max_new_tokens=3, do_sample=False, backend=backend) as tracer:
        add_clt(model, clt)
        features = [].save()
        for _step in tracer.iter[:3]:
            features.append(model.clt.layers[1].features.output)
        out = tracer.result.save()
    return None if backend else {"features": features, "out": out}


@case
def session(model: Any, ids: torch.Tensor, folder: Path, backend: Any) -> Any:
    with model.add_clt(clt_for("session")):
        with model.session(backend=backend):
            with model.trace(ids[:1]):
                donated = model.clt.layers[1].features.output
            with model.trace(ids[1:]):
                model.clt.layers[1].features.output = donated
                logits = model.output.logits.save()
    return None if backend else {"logits": logits}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    nnsight.register(clt_plugin)
    for name, run in CASES.items():
        model = nnsight_model(FAMILY.get(name, "gpt2"))
        torch.manual_seed(0)
        torch.save(run(model, token_ids(), folder, None), folder / f"{name}.expected")
        torch.manual_seed(0)
        run(model, token_ids(), folder, ToFile(folder / f"{name}.request"))
    shutil.rmtree(folder / "clt")  # a server has no file of the client's


if __name__ == "__main__":
    main(Path(sys.argv[1]))
