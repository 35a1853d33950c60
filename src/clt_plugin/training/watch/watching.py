"""One object that a run tells what happens, and that tells everybody who wants to know."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from clt_plugin.core.aside import written_aside
from clt_plugin.training.config import TrainConfig
from clt_plugin.training.trainer import Metrics

METRICS = "metrics.jsonl"


class Watching:
    """Keeps and shows what a run says of itself. Use it as a context manager.

    Args:
        config: The run's.
        folder: Where to; None for nowhere.
        n_done: How many steps were taken before, by a run that is gone on with: what was written of later ones is
            removed, since they come again.

    Attributes:
        history: What was written, one mapping a step, those of before among them.
    """

    def __init__(self, config: TrainConfig, folder: Path | None, n_done: int = 0) -> None:
        self.config, self.path = config, None if folder is None else folder / METRICS
        self.history: list[dict[str, Any]] = []
        if self.path is not None and self.path.exists():
            self.history = [entry for entry in _read(self.path) if entry["step"] < n_done]
            with written_aside(self.path) as aside:
                aside.write_text("".join(json.dumps(entry) + "\n" for entry in self.history), "utf-8")

    def step(self, metrics: Metrics) -> None:
        """Hear of a step."""
        last = metrics.step == self.config.n_steps - 1
        if metrics.step % self.config.watch.every == 0 or last:
            self._write(metrics.to_dict())

    def evaluated(self, step: int, evaluation: Any) -> None:
        """Hear of an evaluation after a step."""
        self._write({"step": step, "evaluation": evaluation.to_dict()})

    def __enter__(self) -> Watching:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open between two steps."""

    def _write(self, entry: dict[str, Any]) -> None:
        self.history.append(entry)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())


def _read(path: Path) -> list[dict[str, Any]]:
    """Return a log's entries; a last line that was cut off, by a kill, is left out."""
    entries = []
    for line in path.read_text("utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries
