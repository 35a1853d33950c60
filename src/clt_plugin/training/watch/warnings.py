"""Early warnings: what most often spoils a run, said while there is time to stop it, with what to try."""

from __future__ import annotations

import statistics
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import chain

from clt_plugin.training.config import TrainConfig
from clt_plugin.training.trainer import Metrics

SHORTEST = 100
"""Runs of fewer steps are tried out rather than trained, and say too little."""
IN_A_ROW = 3
"""In so many watched steps, one after another, something must be seen before it is warned of."""
SILENT_BELOW = 0.1
"""A group with fewer active latents a token has all but fallen silent."""
SILENT_SHARE = 0.05
"""So has one with less than this share of the groups' median."""
BEGINNING = 0.1
"""In this first share of a run latents still find their places."""
END = 0.05
"""In this last share of a run an L0 that is not at its target will not come there."""
MISSED_BY = 0.2
"""By how much, relative to its target, an L0 has missed it."""

AGAINST_COLLAPSE = (
    'try separate decoder norms ({"name": "tanh", "norms": "separate"}), a limited span ({"name": "local_clt", '
    '"span": 4}), the penalty "asymmetry", or a smaller sparsity weight'
)
AGAINST_DEATH = (
    "try a smaller learning rate, a smaller sparsity weight, a start at a firing rate (start.firing_rate), or the "
    'penalty "pre_activation" or "auxiliary_topk", which revive latents'
)
AGAINST_STALLING = (
    'they stall; try a wider bandwidth ({"name": "jumprelu", "bandwidth": 0.5}), or other thresholds at the start '
    "(start.threshold)"
)
TOO_DENSE = "try a larger weight of the sparsity penalty, or a longer run"
TOO_SPARSE = "try a smaller weight of the sparsity penalty, or a start with more active latents (start.firing_rate)"

Finding = tuple[tuple[str, int], str]
"""What was seen, of which group; and what to say of it."""


class TrainWarning(UserWarning):
    """Something about a run that goes on, and may spoil what comes of it."""


class EarlyWarnings:
    """Looks at the steps that are watched, and warns once of each thing that goes wrong.

    Of a group: all of its latents are dead; its L0 collapses (below 0.1, or below 5% of the groups' median, after the
    first tenth of the run; or to nothing, at any time): late layers of a CLT are prone to it, since early latents write
    to all later layers at little cost; no pre-activation lies within its thresholds' bandwidth, so that they stall. Of
    the run: a target L0 missed by more than 20% over its last twentieth. Runs of fewer than 100 steps are not judged.

    Args:
        config: The run's.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self._seen: Counter[tuple[str, int]] = Counter()
        self._fired: set[int] = set()

    def step(self, metrics: Metrics) -> None:
        """Hear of a watched step.

        Warns:
            TrainWarning: Of what was seen in three watched steps, one after another.
        """
        if self.config.n_steps < SHORTEST:
            return
        self._fired |= {group for group, l0 in enumerate(metrics.l0) if l0 > SILENT_BELOW}
        found = dict(chain(_dead(metrics), _stalled(metrics), self._collapsed(metrics), self._missed(metrics)))
        for key in list(self._seen):
            # What has been warned of stays known; what passed begins anew.
            if key not in found and self._seen[key] < IN_A_ROW:
                del self._seen[key]
        for key, what in found.items():
            self._seen[key] += 1
            if self._seen[key] == IN_A_ROW:
                warnings.warn(f"step {metrics.step}: {what}", TrainWarning, stacklevel=4)

    def _collapsed(self, metrics: Metrics) -> Iterator[Finding]:
        l0 = metrics.l0
        median = statistics.median(l0)
        settled = metrics.step >= BEGINNING * self.config.n_steps
        for group, value in enumerate(l0):
            to_nothing = value == 0 and group in self._fired
            if to_nothing or (settled and value < max(SILENT_BELOW, SILENT_SHARE * median)):
                what = f"group {group} has an L0 of {value:.2g}, where the groups' median is {median:.2g}"
                yield ("collapsed", group), f"{what}: {AGAINST_COLLAPSE}"

    def _missed(self, metrics: Metrics) -> Iterator[Finding]:
        target, n_steps = self.config.sparsity.target_l0, self.config.n_steps
        if target is None or metrics.step < (1 - END) * n_steps:
            return
        if isinstance(target, int | float):
            compared = [("L0", sum(metrics.l0), float(target))]
        else:
            pairs = enumerate(zip(metrics.l0, target, strict=True))
            compared = [(f"the L0 of group {group}", value, aim) for group, (value, aim) in pairs]
        for number, (which, value, aim) in enumerate(compared):
            if abs(value - aim) > MISSED_BY * aim:
                advice = TOO_DENSE if value > aim else TOO_SPARSE
                yield ("missed", number), f"{which} is {value:.3g} near the end, and its target is {aim:.3g}: {advice}"


def _dead(metrics: Metrics) -> Iterator[Finding]:
    for group, share in enumerate(metrics.dead):
        if share == 1.0:
            yield ("dead", group), f"all latents of group {group} are dead: {AGAINST_DEATH}"


def _stalled(metrics: Metrics) -> Iterator[Finding]:
    for group, share in enumerate(metrics.near):
        if share == 0.0 and metrics.dead[group] < 1.0:
            what = f"no pre-activation of group {group} lies within the bandwidth of its thresholds"
            yield ("stalled", group), f"{what}, whose mean is {metrics.threshold[group]:.2g}: {AGAINST_STALLING}"
