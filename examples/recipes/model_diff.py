"""Gemma-2-2B and its chat model: one crosscoder over both at layer 13, to find what fine-tuning added and took away.

BatchTopK, which keeps latents of either model alone apart from shared ones where L1 merges them. The wiring reads and
writes both models' residual streams; both see the same tokens. After Lindsey et al. 2024, "Sparse Crosscoders".
"""

import torch

from clt_plugin.training import TrainConfig
from clt_plugin.training.data import texts_from_hub

NAMES = {"base": "google/gemma-2-2b", "chat": "google/gemma-2-2b-it"}


def load(name):
    """Load one of them in bfloat16: in float16 its activations overflow."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    return loaded.to(config.device).eval().requires_grad_(False)


model = {"base": lambda: load(NAMES["base"]), "chat": lambda: load(NAMES["chat"])}


def tokenizer():
    """Load the tokenizer that both share."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(NAMES["base"])


def data():
    """Read FineWeb as it is used."""
    return texts_from_hub("HuggingFaceFW/fineweb", config="sample-10BT")


config = TrainConfig(
    name="gemma-2-2b-diff",
    wiring={"name": "model_diff", "layer": 13},
    n_latents=32_768,
    activation={"name": "batchtopk", "k": 100},
    tokens=100_000_000,
    batch_size=4096,
    optimizer={"learning_rate": 1e-4, "warm_up": 1000, "clip": 1.0},
    sparsity={"penalties": [{"name": "auxiliary_topk", "weight": 1 / 32, "k": 1024}]},
    start={"decoders": "tied"},
    data={"length": 1024, "rows": 4, "buffer": 2**18, "dtype": "bfloat16"},
    checkpoints={"every": 2000},
    precision="bfloat16",
    device="cuda",
)
