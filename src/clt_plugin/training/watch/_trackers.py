"""TensorBoard and Weights & Biases: what is watched of a run, as they take it. Either is needed only if asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clt_plugin.core.aside import written_aside
from clt_plugin.training.config import ConfigError, TrainConfig
from clt_plugin.training.trainer import Metrics
from clt_plugin.training.watch.history import BY_GROUP, evaluated, scalars


def trackers_for(config: TrainConfig, folder: Path | None, n_done: int) -> list[Any]:
    """Return the trackers that a config asks for.

    Args:
        config: The run's.
        folder: The run's; None for none.
        n_done: How many steps were taken before.

    Raises:
        ConfigError: One is not installed, or has nowhere to write to.
    """
    trackers: list[Any] = []
    if config.watch.tensorboard:
        trackers.append(TensorBoard(config, folder, n_done))
    if config.watch.wandb is not None:
        trackers.append(WeightsAndBiases(config, folder))
    return trackers


class Tracker:
    """Tells another program of the steps that are watched, as numbers by name."""

    def step(self, metrics: Metrics, tokens_per_second: float, watched: bool) -> None:
        """Hear of a step."""
        if not watched:
            return
        entry = metrics.to_dict()
        numbers = {name: value for name, value in scalars(entry).items() if name != "step"}
        for name in BY_GROUP:
            # One number is its own mean.
            if len(entry[name]) > 1:
                numbers |= {f"{name}/{group}": value for group, value in enumerate(entry[name])}
        self.tell(metrics.step, {**numbers, "tokens_per_second": tokens_per_second})

    def evaluated(self, step: int, evaluation: Any) -> None:
        """Hear of an evaluation after a step."""
        self.tell(step, {f"evaluation/{name}": v for name, v in evaluated(evaluation.to_dict()).items()})

    def tell(self, step: int, numbers: dict[str, float]) -> None:
        """Pass numbers on."""
        raise NotImplementedError

    def close(self) -> None:
        """Have everything written."""
        raise NotImplementedError


class TensorBoard(Tracker):
    """Files for TensorBoard, in the folder ``tensorboard`` of the run's."""

    def __init__(self, config: TrainConfig, folder: Path | None, n_done: int) -> None:
        if folder is None:
            raise ConfigError("watch.tensorboard writes into the run's folder, and there is none: give output=")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "watch.tensorboard needs the library tensorboard: pip install tensorboard, or leave it out "
                "(metrics.jsonl has the same numbers)"
            ) from error
        # What was written of steps that come again is taken back.
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=n_done or None)

    def tell(self, step: int, numbers: dict[str, float]) -> None:
        """Pass numbers on."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Have everything written."""
        self._writer.close()


class WeightsAndBiases(Tracker):
    """A run of Weights & Biases, which goes on under the same id where the run is gone on with."""

    def __init__(self, config: TrainConfig, folder: Path | None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                "watch.wandb needs the library wandb: pip install wandb, or leave it out (metrics.jsonl has the same "
                "numbers)"
            ) from error
        known = None if folder is None else folder / "wandb.json"
        again = known is not None and known.exists()
        self._run: Any = wandb.init(
            project=config.watch.wandb,
            name=config.name,
            config=config.to_dict(),
            dir=None if folder is None else str(folder),
            id=json.loads(known.read_text("utf-8"))["id"] if known is not None and again else None,
            resume="allow" if again else None,
        )
        if known is not None and not again:
            with written_aside(known) as aside:
                aside.write_text(json.dumps({"id": self._run.id}) + "\n", "utf-8")

    def tell(self, step: int, numbers: dict[str, float]) -> None:
        """Pass numbers on."""
        # A step of its own, since an evaluation is told after its step's metrics.
        self._run.log({**numbers, "step": step})

    def close(self) -> None:
        """Have everything written."""
        self._run.finish()
