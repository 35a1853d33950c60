"""Gemma-2-2B: a cross-layer transcoder of 16,384 latents a layer, on 8 GPUs of 80 GB by ``torchrun``.

14.2 B parameters, 228 GB with gradients and Adam, spread over 8 processes by latents; a span of 4 would take 4.7 B:
``--set 'wiring={name: local_clt, span: 4}'``.
"""

import torch

from clt_plugin.training import TrainConfig
from clt_plugin.training.data import texts_from_hub

NAME = "google/gemma-2-2b"


def model():
    """Load the model in bfloat16: in float16 its activations overflow."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(NAME, dtype=torch.bfloat16)
    return loaded.to(config.device).eval().requires_grad_(False)


def tokenizer():
    """Load its tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(NAME)


def data():
    """Read FineWeb as it is used."""
    return texts_from_hub("HuggingFaceFW/fineweb", config="sample-10BT")


config = TrainConfig(
    name="gemma-2-2b-clt",
    wiring="clt",
    n_latents=16_384,
    activation={"name": "jumprelu", "bandwidth": 0.5},
    tokens=300_000_000,
    batch_size=4096,
    optimizer={"learning_rate": 2e-4, "warm_up": 1000, "clip": 1.0, "accumulate": 2},
    sparsity={
        "penalties": [
            {"name": "tanh", "weight": 1e-3, "norms": "separate"},
            {"name": "pre_activation", "weight": 1e-5, "over": "dead"},
        ],
        "target_l0": 26 * 25.0,
    },
    start={"firing_rate": 0.005, "threshold": 0.5},
    data={"length": 1024, "rows": 4, "buffer": 2**16, "dtype": "bfloat16"},
    checkpoints={"every": 2000},
    evaluation={"every": 10_000, "tokens": 2**16},
    precision="bfloat16",
    parallel={"latent": 8},
    device="cuda",
)
