"""A run for test_loop.py, in a process of its own that can be killed: ``python killed_run.py FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import clt_plugin as cp
from support.models import make_model, make_tokenizer

torch.set_num_threads(1)


def texts() -> list[str]:
    """Return 300 texts of drawn words."""
    generator = torch.Generator().manual_seed(0)
    return [" ".join(f"w{int(i)}" for i in torch.randint(2, 61, (30,), generator=generator)) for _ in range(300)]


def config(**more: object) -> cp.TrainConfig:
    """Return a config that has everything in it that a checkpoint must hold."""
    settings: dict[str, object] = {
        "n_latents": 40,
        "activation": {"name": "jumprelu", "bandwidth": 0.3},
        "tokens": 60 * 64,
        "batch_size": 64,
        "sparsity": {
            "penalties": [
                {"name": "tanh", "weight": 1e-3},
                {"name": "jacobian", "weight": 1e-2},
                {"name": "pre_activation", "weight": 1e-2, "over": "dead"},
            ],
            "target_l0": 12.0,
            "dead_after": 500,
        },
        "start": {"decoders": "tokens", "firing_rate": 0.1},
        "data": {"length": 32, "buffer": 700, "statistics": 600, "rows": 4},
        "checkpoints": {"every": 7},
        "evaluation": {"every": 25, "tokens": 100},
        "watch": {"every": 1, "console": False},
    }
    return cp.TrainConfig.from_dict(settings | more)


def main(folder: Path) -> None:
    """Train."""
    cp.train(make_model("gpt2"), texts(), config(), output=folder, tokenizer=make_tokenizer())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
