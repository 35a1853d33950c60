"""GPT-2 small: a cross-layer transcoder of 10,000 latents a layer, L0 about 13 a layer, on 100 million tokens.

After "Circuit Tracing" (Ameisen et al. 2025) as replicated for a study of unfaithful circuits: JumpReLU, inputs and
outputs standardised by coordinate, batches of 1,000 tokens, 12 to 15 active latents a layer. 0.69 B parameters, 11 GB
with gradients and Adam: a GPU of 24 GB.
"""

from clt_plugin.training import TrainConfig
from clt_plugin.training.data import texts_from_hub

model = "openai-community/gpt2"


def data():
    """Read OpenWebText as it is used."""
    return texts_from_hub("Skylion007/openwebtext")


config = TrainConfig(
    name="gpt2-clt",
    wiring="clt",
    n_latents=10_000,
    activation={"name": "jumprelu", "bandwidth": 0.5},
    tokens=100_000_000,
    batch_size=1000,
    optimizer={"learning_rate": 4e-4, "warm_up": 1000, "clip": 1.0},
    sparsity={
        "penalties": [
            {"name": "tanh", "weight": 1e-3, "c": 1.0, "norms": "concatenated"},
            {"name": "pre_activation", "weight": 1e-5, "over": "dead"},
        ],
        "target_l0": 12 * 13.0,
    },
    start={"firing_rate": 0.01, "threshold": 0.5},
    standard={"per_coordinate": True},
    data={"buffer": 2**18, "dtype": "bfloat16", "rows": 32},
    checkpoints={"every": 5000},
    evaluation={"every": 10_000, "tokens": 2**16},
    device="cuda",
)
