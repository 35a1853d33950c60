"""The demo's model: a cross-layer transcoder of 1,536 latents a layer, L0 about 20 a layer, in minutes on a CPU.

Each latent begins as a token: it reads along that token's MLP input and writes along its outputs.
"""

from clt_plugin.demo import load_corpus
from clt_plugin.training import TrainConfig

model = "demo"


def data():
    """Read what is trained on: every text but one in twenty."""
    return [text for number, text in enumerate(load_corpus()) if number % 20]


def evaluate_on():
    """Read the texts held out."""
    return load_corpus()[::20]


config = TrainConfig(
    name="demo-clt",
    wiring="clt",
    n_latents=1536,
    activation={"name": "jumprelu", "bandwidth": 0.5},
    tokens=3000 * 512,
    batch_size=512,
    optimizer={"learning_rate": 3e-3, "betas": (0.9, 0.99)},
    sparsity={
        "penalties": [
            {"name": "quadratic", "weight": 0.1, "target": 20.0},
            {"name": "frequent", "weight": 1.0, "limit": 0.05},
            {"name": "pre_activation", "weight": 3e-3, "over": "dead"},
        ],
        "rise_over": 0.7,
        "dead_after": 50_000,
    },
    start={"decoders": "tokens", "threshold": 1.0, "firing_rate": 0.03},
    data={"length": 512, "rows": 8},
    evaluation={"every": 1000},
)
