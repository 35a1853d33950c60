"""What benchmarks/circuit_tracer_format.py asks of circuit-tracer, in circuit-tracer's own environment.

    python circuit_tracer_worker.py FOLDER

FOLDER holds ``jobs.json`` and ``inputs.safetensors``; what it computes goes to ``answers/``, what it writes to
``made/`` and ``cached/``, and what else it says to ``told.json``. Nothing of ours is imported here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from circuit_tracer.transcoder.activation_functions import JumpReLU
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet
from circuit_tracer.utils.caching import save_transcoders_to_cache
from circuit_tracer.utils.hf_utils import load_transcoder_from_hub
from safetensors.torch import load_file, save_file

CPU = torch.device("cpu")


def answer(transcoder: Any, x: torch.Tensor, path: Path) -> None:
    """Write what it makes of inputs (n_layers, positions, d): as they are, and as its attribution takes them."""
    x = x.to(next(transcoder.parameters()).dtype)
    features = transcoder.encode(x)
    components = transcoder.compute_attribution_components(x)
    results = {
        "features": features,
        "reconstruction": transcoder.decode(features, x),
        "attributed features": components["activation_matrix"].to_dense(),
        "attributed reconstruction": components["reconstruction"],
    }
    save_file({key: value.contiguous() for key, value in results.items()}, path)


def make(job: dict[str, Any], shape: Sequence[int]) -> Any:
    """Make a CLT or a set of transcoders with random weights."""
    n_layers, d, n = shape
    stored = getattr(torch, job["stored"])
    settings = {"skip_connection": job["skip"], "device": CPU, "dtype": stored}
    made: CrossLayerTranscoder | TranscoderSet
    if job["kind"] == "CLT":
        activation = "jump_relu" if job["activation"] == "JumpReLU" else "relu"
        hooks = dict(zip(("feature_input_hook", "feature_output_hook"), job["hooks"], strict=True))
        made = CrossLayerTranscoder(n_layers, n, d, activation, lazy_decoder=False, **hooks, **settings)
    else:
        layers = {}
        for i in range(n_layers):
            jump = JumpReLU(torch.zeros(n, dtype=stored), 0.1)
            activation = jump if job["activation"] == "JumpReLU" else torch.nn.functional.relu
            layers[i] = SingleLayerTranscoder(d, n, activation, i, **settings)
        made = TranscoderSet(layers, *job["hooks"])
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape) / (parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 2))
    return made


def write(made: Any, folder: Path, model_name: str = "google/gemma-2-2b") -> None:
    """Write it as circuit-tracer does; its own writer leaves ``config.yaml`` to whoever publishes."""
    made.to_safetensors(str(folder))
    config = {
        "model_name": model_name,
        "model_kind": "transcoder_set" if isinstance(made, TranscoderSet) else "cross_layer_transcoder",
        "feature_input_hook": made.feature_input_hook,
        "feature_output_hook": made.feature_output_hook,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


@torch.no_grad()
def main() -> None:
    folder = Path(sys.argv[1])
    jobs = json.loads((folder / "jobs.json").read_text())
    x = load_file(folder / "inputs.safetensors")["x"]
    torch.manual_seed(1)
    hooks = {}
    for job in jobs["ours"]:
        name, answers = job["name"], folder / "answers" / job["name"]
        answers.mkdir(parents=True)
        for arithmetic in job["arithmetics"]:
            dtype = getattr(torch, arithmetic)
            for lazy in (False, True):
                loaded, _ = load_transcoder_from_hub(name, CPU, dtype, lazy, lazy, use_cache=False)
                hooks[name] = [loaded.feature_input_hook, loaded.feature_output_hook]
                answer(loaded, x, answers / f"{arithmetic}{'-lazy' * lazy}.safetensors")
        save_transcoders_to_cache(name, folder / "cached", device=CPU, dtype=getattr(torch, job["stored"]))
    for job in jobs["theirs"]:
        answers = folder / "answers" / job["name"]
        answers.mkdir(parents=True)
        made = make(job, jobs["shape"])
        write(made, folder / "made" / job["name"])
        for arithmetic in job["arithmetics"]:
            answer(made.to(getattr(torch, arithmetic)), x, answers / f"{arithmetic}.safetensors")
    (folder / "told.json").write_text(json.dumps({"version": version("circuit-tracer"), "hooks": hooks}))


if __name__ == "__main__":
    main()
