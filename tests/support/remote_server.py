"""The server's side of the remote tests: runs written requests against fresh models, with nothing of this project.

Called with a folder of ``{case}.request`` files; each is run in a process of its own, which writes ``{case}.results``
or ``{case}.failure``. The models are rebuilt from their seeds. What a server need not have cannot be imported, and
what a request refers to by name must be of torch, nnsight or the standard library.
"""

from __future__ import annotations

import importlib.abc
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

ABSENT = ("clt_plugin", "support", "transformer_lens", "yaml", "psutil", "jaxtyping", "wrapt", "typer", "beartype")
ALLOWED = {"torch", "nnsight", "greenlet", "cloudpickle", *sys.stdlib_module_names}
FAMILY = {"persistent_lazy": "gemma2", "function": "gemma2"}


class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"the server has no module {name!r}", name=name)


def hide() -> None:
    """From now on nothing of `ABSENT` is to be had."""
    for name in list(sys.modules):
        if name.partition(".")[0] in ABSENT:
            del sys.modules[name]
    sys.meta_path.insert(0, Absent())


def run(request: bytes, model: Any) -> dict[str, Any]:
    """Run a request as nnsight's server does, and return what it saves."""
    from nnsight.intervention.serialization import CustomCloudUnpickler
    from nnsight.schema.request import RequestModel
    from nnsight.tracing import tracer as tracing

    class Checked(CustomCloudUnpickler):
        def find_class(self, module: str, name: str) -> Any:
            assert module.partition(".")[0] in ALLOWED, f"the request refers to {module}.{name}"
            return super().find_class(module, name)

    persistent = model._remoteable_persistent_objects()
    tracer = RequestModel.deserialize(request, persistent, unpickler=Checked)
    tracing.inc()
    try:
        tracer.execute(tracer.info.code)
        saved = tracing._saves()
        return {name: value for name, value in tracer.info.frame.f_locals.items() if id(value) in saved}
    finally:
        tracing.dec()


def serve(folder: Path, name: str, model: Any) -> None:
    """Run one request, and look that the server's own model is left as it was."""
    hide()
    paths, edits = [path for path, _ in model.named_modules()], list(model._edits)
    results = run((folder / f"{name}.request").read_bytes(), model)
    assert [path for path, _ in model.named_modules()] == paths
    assert model._edits == edits
    assert not model.interleaver.mediators
    leaked = [module for module in sys.modules if module.partition(".")[0] in ABSENT]
    assert not leaked, f"imported after all: {leaked}"
    torch.save(results, folder / f"{name}.results")


def main(folder: Path) -> None:
    from support.models import nnsight_model

    torch.set_num_threads(1)
    models = {family: nnsight_model(family) for family in ("gpt2", "gemma2")}
    for request in sorted(folder.glob("*.request")):
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        try:
            serve(folder, request.stem, models[FAMILY.get(request.stem, "gpt2")])
        except BaseException:
            (folder / f"{request.stem}.failure").write_text(traceback.format_exc())
        finally:
            os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
