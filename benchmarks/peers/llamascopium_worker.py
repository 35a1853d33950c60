"""What benchmarks/training.py asks of Llamascopium, in Llamascopium's own environment: steps of training, timed.

    python llamascopium_worker.py JOB

JOB is JSON: activation, layers, width, latents, batch, active, csr (decode with CSR matrices) and threads. It prints,
as JSON, its version and how many latents are active a token and layer, and then the seconds of a step for every line
that it reads. A step is its ``compute_loss``, the gradients and the same fused Adam as ours: neither autocast, clipping
nor metrics. Nothing of ours is imported here.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Any

import torch
from _measure import serve
from llamascopium.models.clt import CLTConfig, CrossLayerTranscoder


def make(job: dict[str, Any]) -> CrossLayerTranscoder:
    """Make a CLT with its own initial weights, and zero thresholds."""
    config = CLTConfig(
        d_model=job["width"],
        expansion_factor=job["latents"] / job["width"],
        act_fn=job["activation"],
        top_k=job["active"],
        hook_points_in=[f"in.{layer}" for layer in range(job["layers"])],
        hook_points_out=[f"out.{layer}" for layer in range(job["layers"])],
        decode_with_csr=job["csr"],
        jumprelu_threshold_window=0.05,
        # As ours: latents compete by their activations alone.
        sparsity_include_decoder_norm=False,
        norm_activation="inference",
    )
    clt = CrossLayerTranscoder(config)
    clt.init_parameters(init_log_jumprelu_threshold_value=0.0)
    return clt


@torch.no_grad()
def set_thresholds(clt: CrossLayerTranscoder, x: torch.Tensor, active: int) -> None:
    """Set JumpReLU's thresholds so that as many latents are active a token and layer."""
    _, h = clt.encode(x, return_hidden_pre=True)
    for layer, threshold in enumerate(clt.activation_function.log_jumprelu_threshold):
        flat = h[:, layer].flatten()
        threshold.fill_(flat.kthvalue(flat.numel() - active * len(x)).values.log())


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    clt = make(job)
    batches = []
    for _ in range(2):
        batch = {point: torch.randn(job["batch"], job["width"]) for point in clt.cfg.associated_hook_points}
        batches.append(batch | {"tokens": torch.zeros(job["batch"], dtype=torch.long)})
    penalty = None
    if job["activation"] == "jumprelu":
        penalty = "tanh"
        set_thresholds(clt, clt.prepare_input(batches[0])[0], job["active"])
    # A rate so low that as many latents stay active as there were.
    optimizer = torch.optim.Adam(clt.parameters(), lr=1e-7, fused=True)

    def step() -> torch.Tensor:
        batch = batches[0]
        batches.reverse()
        optimizer.zero_grad(set_to_none=True)
        result = clt.compute_loss(batch, sparsity_loss_type=penalty, l1_coefficient=1e-3)
        result["loss"].backward()
        optimizer.step()
        return result["feature_acts"]

    active = int((step() > 0).sum()) / (job["batch"] * job["layers"])
    print(json.dumps({"version": version("llamascopium"), "active": active}), flush=True)
    serve(step)


if __name__ == "__main__":
    main()
