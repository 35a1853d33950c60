"""A run on the console: a live display on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from clt_plugin.training.config import TrainConfig
from clt_plugin.training.trainer import Metrics
from clt_plugin.training.watch.history import evaluated

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

SHOWN_EACH = 8
"""Up to so many groups, each one's numbers are shown; of more, a bar each and the extremes."""
LINES = 50
"""About how many plain lines a run has."""
BARS = "▁▂▃▄▅▆▇█"


def console_for(config: TrainConfig, console: Console | None = None) -> list[Any]:
    """Return what shows a run: none, a live display or plain lines, as `WatchConfig.console` says and the place allows.

    Args:
        config: The run's.
        console: Where to show it; stderr by default.
    """
    if config.watch.console is False:
        return []
    from rich.console import Console

    console = console or Console(stderr=True)
    if console.is_terminal:
        return [LiveConsole(config, console)]
    return [PlainConsole(config, console)] if config.watch.console else []


class PlainConsole:
    """A line now and then, for logs.

    Args:
        config: The run's.
        console: Where to show it.
    """

    def __init__(self, config: TrainConfig, console: Console) -> None:
        self.config, self.console = config, console
        self.clock = Clock(config)

    def step(self, metrics: Metrics, tokens_per_second: float, watched: bool) -> None:
        """Hear of a step."""
        left = self.clock.left(metrics.step)
        last = metrics.step == self.config.n_steps - 1
        if metrics.step % max(self.config.watch.every, self.config.n_steps // LINES) == 0 or last:
            self._print(f"{_progress(metrics, self.config)}  {numbers(metrics)}  {_speed(tokens_per_second, left)}")

    def evaluated(self, step: int, evaluation: Any) -> None:
        """Hear of an evaluation after a step."""
        self._print(_evaluation(step, evaluation))

    def close(self) -> None:
        """Nothing is open between two lines."""

    def _print(self, line: str) -> None:
        # As it is: neither wrapped nor coloured, so that a log can be searched.
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class LiveConsole:
    """Progress, loss, FVU, L0, dead latents, speed, time left and the last evaluation, at one place of a terminal.

    Args:
        config: The run's.
        console: Where to show it.
    """

    def __init__(self, config: TrainConfig, console: Console) -> None:
        from rich.live import Live
        from rich.progress_bar import ProgressBar

        self.config, self.clock = config, Clock(config)
        self.bar = ProgressBar(total=config.n_steps, width=40)
        self.metrics: Metrics | None = None
        self.speed, self.left = 0.0, float("nan")
        self.last_evaluation = ""
        # Drawn twice a second, by a thread of its own: steps may be many, and only say where they are.
        self._live = Live(get_renderable=self.drawn, console=console, refresh_per_second=2)
        self._live.start()

    def step(self, metrics: Metrics, tokens_per_second: float, watched: bool) -> None:
        """Hear of a step."""
        self.metrics, self.speed = metrics, tokens_per_second
        self.left = self.clock.left(metrics.step)

    def evaluated(self, step: int, evaluation: Any) -> None:
        """Hear of an evaluation after a step."""
        self.last_evaluation = _evaluation(step, evaluation)

    def close(self) -> None:
        """Leave the display as it is by now."""
        self._live.stop()

    def drawn(self) -> RenderableType:
        """Return the display as it is by now."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        metrics = self.metrics
        if metrics is None:
            return Text(f"{self.config.name}: the first step")
        self.bar.update(completed=metrics.step + 1)
        head = Table.grid(padding=(0, 1))
        head.add_row(self.config.name, self.bar, Text(_progress(metrics, self.config)))
        lines: list[RenderableType] = [head, Text(numbers(metrics)), Text(f"L0    {per_group(metrics.l0, '.1f')}")]
        if any(metrics.dead):
            lines.append(Text(f"dead  {per_group(metrics.dead, '.0%')}"))
        lines.append(Text(_speed(self.speed, self.left)))
        if self.last_evaluation:
            lines.append(Text(self.last_evaluation))
        return Group(*lines)


class Clock:
    """Says how long a run will still take, by the pace of the steps taken here.

    Args:
        config: The run's.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.n_steps = config.n_steps
        self.first: tuple[int, float] | None = None

    def left(self, step: int) -> float:
        """Return how many seconds are left after a step; NaN after the first one seen, which says nothing of pace."""
        now = time.perf_counter()
        if self.first is None:
            self.first = (step, now)
        first, began = self.first
        return (now - began) / (step - first) * (self.n_steps - 1 - step) if step > first else float("nan")


def numbers(metrics: Metrics) -> str:
    """Return a step's numbers over all groups in a line."""
    dead = sum(metrics.dead) / len(metrics.dead)
    mean = sum(metrics.l0) / len(metrics.l0)
    return f"loss {metrics.loss:.4g}  FVU {metrics.fvu:.4f}  L0 {mean:.1f} a group  dead {dead:.1%}"


def per_group(values: Sequence[float], form: str) -> str:
    """Return a number of each group in a line: each, or where there are many a bar each and the extremes.

    >>> per_group([3.0, 1.5], ".1f")
    '3.0 1.5'
    >>> per_group(range(9), ".0f")
    '▁▁▂▃▄▅▆▇█  0 (group 0) to 8 (group 8)'
    """
    if len(values) <= SHOWN_EACH:
        return " ".join(format(value, form) for value in values)
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / high if high > 0 else 0.0
    bars = "".join(BARS[int(value * scale)] for value in values)
    where = [list(values).index(value) for value in (low, high)]
    return f"{bars}  {low:{form}} (group {where[0]}) to {high:{form}} (group {where[1]})"


def _progress(metrics: Metrics, config: TrainConfig) -> str:
    done = metrics.step + 1
    return f"step {done:,} of {config.n_steps:,} ({done / config.n_steps:.0%})"


def _speed(tokens_per_second: float, left: float) -> str:
    return f"{tokens_per_second:,.0f} tokens/s, {_duration(left)} left"


def _duration(seconds: float) -> str:
    """Return a duration for people.

    >>> _duration(7), _duration(3723), _duration(200_000), _duration(float("nan"))
    ('0:07', '1:02:03', '2 d 7 h', '?')
    """
    if seconds != seconds:
        return "?"
    whole = int(seconds)
    days, hours, minutes = whole // 86400, whole // 3600, whole // 60 % 60
    if days:
        return f"{days} d {hours % 24} h"
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def _evaluation(step: int, evaluation: Any) -> str:
    found = evaluated(evaluation.to_dict())
    loop = f", loss {found['delta_loss']:+.4f}, KL {found['kl']:.4f}" if "delta_loss" in found else ""
    top1 = f", top-1 {found['top1']:.1%}" if "top1" in found else ""
    return f"evaluated after step {step + 1:,}: FVU {found['fvu']:.4f}, L0 {found['l0']:.1f} a group{loop}{top1}"
