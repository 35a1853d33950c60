"""One object that a run tells what happens, and that tells everybody who wants to know."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, Protocol

from clt_plugin.core.aside import written_aside
from clt_plugin.training.config import TrainConfig
from clt_plugin.training.trainer import Metrics
from clt_plugin.training.watch._console import console_for
from clt_plugin.training.watch._trackers import trackers_for
from clt_plugin.training.watch.warnings import EarlyWarnings

METRICS = "metrics.jsonl"


class Watcher(Protocol):
    """Who is told of a run: a console, TensorBoard, Weights & Biases."""

    def step(self, metrics: Metrics, tokens_per_second: float, watched: bool) -> None:
        """Hear of a step, and whether it is one of those that are written."""

    def evaluated(self, step: int, evaluation: Any) -> None:
        """Hear of an evaluation after a step."""

    def close(self) -> None:
        """Hear that the run is over, or was stopped."""


class Watching:
    """Keeps and shows what a run says of itself. Use it as a context manager.

    Every `WatchConfig.every` steps, and at the last one, a step's metrics are written to ``metrics.jsonl`` and told to
    TensorBoard and Weights & Biases where these are asked for; every step is shown on the console. What goes wrong
    early is warned of: see `EarlyWarnings`.

    Args:
        config: The run's.
        folder: Where to; None for nowhere.
        n_done: How many steps were taken before, by a run that is gone on with: what was written of later ones is
            removed, since they come again.

    Attributes:
        history: What was written, one mapping a step, those of before among them; see
            `clt_plugin.training.watch.history`.

    Raises:
        ConfigError: On entering: what `WatchConfig` asks for is not installed, or needs a folder.
    """

    def __init__(self, config: TrainConfig, folder: Path | None, n_done: int = 0) -> None:
        self.config, self.folder, self.path = config, folder, None if folder is None else folder / METRICS
        self.history: list[dict[str, Any]] = []
        self._watchers: list[Watcher] = []
        self._warnings = EarlyWarnings(config)
        self._n_before, self._began = n_done, time.perf_counter()
        if self.path is not None and self.path.exists():
            self.history = [entry for entry in _read(self.path) if entry["step"] < n_done]
            with written_aside(self.path) as aside:
                aside.write_text("".join(json.dumps(entry) + "\n" for entry in self.history), "utf-8")

    def step(self, metrics: Metrics) -> None:
        """Hear of a step."""
        done = metrics.step + 1
        seconds = max(time.perf_counter() - self._began, 1e-9)
        speed = (done - self._n_before) * self.config.batch_size / seconds
        watched = metrics.step % self.config.watch.every == 0 or done == self.config.n_steps
        if watched:
            self._write(metrics.to_dict())
            self._warnings.step(metrics)
        for watcher in self._watchers:
            watcher.step(metrics, speed, watched)

    def evaluated(self, step: int, evaluation: Any) -> None:
        """Hear of an evaluation after a step."""
        self._write({"step": step, "evaluation": evaluation.to_dict()})
        for watcher in self._watchers:
            watcher.evaluated(step, evaluation)

    def __enter__(self) -> Watching:
        self._began = time.perf_counter()
        self._watchers = trackers_for(self.config, self.folder, self._n_before)
        self._watchers += console_for(self.config)
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the console, and have trackers write what they hold."""
        while self._watchers:
            self._watchers.pop().close()

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
