"""A run's history as tables: what was watched of its steps, of its groups, and of its evaluations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

BY_GROUP = ("l0", "dead", "threshold", "near", "pressure")
"""What metrics have a number of each group for."""


def table_of(history: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Return the metrics of the steps that were watched, indexed by step; L0 and the like are means over groups.

    Args:
        history: As `Watching.history` and ``metrics.jsonl`` have it: a mapping for each step watched, of what
            `Metrics.to_dict` says, and one for each evaluation, which is left out.

    Returns:
        Columns loss, error, fvu, l0, dead, learning_rate and pressure, one for each penalty, and where the run has
        them gradient_norm, threshold and near.
    """
    import pandas

    rows = [scalars(entry) for entry in history if "evaluation" not in entry]
    return pandas.DataFrame(rows, columns=_order(rows)).set_index("step")


def by_group(history: Iterable[Mapping[str, Any]], measure: str) -> pd.DataFrame:
    """Return one measure of each group, (steps watched, groups), indexed by step.

    Args:
        history: See `table_of`.
        measure: ``"l0"``, ``"dead"``, ``"threshold"`` or ``"near"``.
    """
    import pandas

    steps = [entry for entry in history if "evaluation" not in entry]
    index = pandas.Index([entry["step"] for entry in steps], name="step")
    return pandas.DataFrame([entry[measure] for entry in steps], index=index)


def evaluations_of(history: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Return the evaluations, indexed by the step after which they were made: fvu, l0, and what the loop measured."""
    import pandas

    rows = [{"step": entry["step"], **evaluated(entry["evaluation"])} for entry in history if "evaluation" in entry]
    return pandas.DataFrame(rows, columns=["step", "fvu", "l0", "delta_loss", "kl", "top1"]).set_index("step")


def scalars(entry: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a watched step by name, those of groups averaged: a row of `table_of`."""
    row: dict[str, float] = {}
    for name, value in entry.items():
        if name == "penalties":
            row |= value
        elif name in BY_GROUP:
            row |= {name: sum(value) / len(value)} if value else {}
        elif value is not None:
            row[name] = value
    return row


def evaluated(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of an evaluation that are followed over a run."""
    loop = evaluation.get("in_loop") or {}
    found = {"fvu": evaluation["mean_fvu"], "l0": evaluation["mean_l0"]}
    return found | {name: loop[name] for name in ("delta_loss", "kl", "top1") if name in loop}


def _order(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return every name once, as first met: a history without a step has the column step alone."""
    names: Iterator[str] = (name for row in rows for name in row)
    return list(dict.fromkeys(["step", *names]))
