"""How weights and the learning rate move over a run: pure functions of the step's number.

A run of ``n_steps`` steps numbers them from 0 to ``n_steps - 1``.
"""

from __future__ import annotations


def rising(step: int, n_steps: int, over: float = 1.0) -> float:
    """Return the share of its final weight that a penalty has: from 0 linearly to 1 (Ameisen et al. 2025).

    Args:
        step: The step's number, from 0.
        n_steps: How many steps the run has.
        over: The share of the run over which it rises; it stays at 1 from then on. 0 for no rise.

    >>> [rising(step, 4, over=0.5) for step in range(4)]
    [0.0, 0.5, 1.0, 1.0]
    """
    _check(step, n_steps, over=over)
    return 1.0 if over == 0 else min(1.0, step / (over * n_steps))


def learning_rate(step: int, n_steps: int, last: float = 0.2, warm_up: int = 0) -> float:
    """Return the share of the full learning rate: a linear rise, a level stretch, a linear fall to 0 at the end.

    Args:
        step: The step's number, from 0.
        n_steps: How many steps the run has. At step ``n_steps``, which is not taken, the rate is 0.
        last: The share of the run over which it falls (Ameisen et al. 2025, "Circuit Tracing": the last fifth).
        warm_up: Over how many first steps it rises.

    >>> [learning_rate(step, 10, warm_up=2) for step in (0, 1, 5, 8, 9)]
    [0.5, 1.0, 1.0, 1.0, 0.5]
    """
    _check(step, n_steps, last=last)
    up = 1.0 if warm_up == 0 else (step + 1) / warm_up
    down = 1.0 if last == 0 else (n_steps - step) / (last * n_steps)
    return min(1.0, up, down)


def _check(step: int, n_steps: int, **shares: float) -> None:
    if not 0 <= step < n_steps:
        raise ValueError(f"a run of {n_steps} steps has no step {step}: they are numbered from 0")
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is a share of the run, from 0 to 1, not {share}")
