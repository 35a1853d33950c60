"""Training: CLTs, per-layer transcoders and crosscoders by one trainer.

`train` goes from a model and texts to a saved crosscoder; `Trainer` takes single steps on activations that you hold.
"""

from clt_plugin.training.checkpoints import CheckpointError
from clt_plugin.training.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    ParallelConfig,
    SparsityConfig,
    StandardConfig,
    StartConfig,
    TrainConfig,
    WatchConfig,
)
from clt_plugin.training.estimation import Estimate, estimate
from clt_plugin.training.evaluation import Evaluation, evaluate
from clt_plugin.training.loop import TrainResult, train
from clt_plugin.training.penalties import PENALTIES, Penalty
from clt_plugin.training.recipes import Recipe
from clt_plugin.training.standard import Standard, fold, unfold
from clt_plugin.training.thresholds import Conversion, estimate_threshold, to_jumprelu, to_threshold
from clt_plugin.training.trainer import Metrics, Trainer, TrainError
from clt_plugin.training.watch import TrainWarning
from clt_plugin.training.wirings import WIRINGS

__all__ = [
    "PENALTIES",
    "WIRINGS",
    "CheckpointConfig",
    "CheckpointError",
    "ConfigError",
    "Conversion",
    "DataConfig",
    "Estimate",
    "Evaluation",
    "EvaluationConfig",
    "Metrics",
    "OptimizerConfig",
    "ParallelConfig",
    "Penalty",
    "Recipe",
    "SparsityConfig",
    "Standard",
    "StandardConfig",
    "StartConfig",
    "TrainConfig",
    "TrainError",
    "TrainResult",
    "TrainWarning",
    "Trainer",
    "WatchConfig",
    "estimate",
    "estimate_threshold",
    "evaluate",
    "fold",
    "to_jumprelu",
    "to_threshold",
    "train",
    "unfold",
]
