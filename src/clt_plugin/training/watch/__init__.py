"""What is seen of a run while it goes on: metrics, a live console, trackers, early warnings; and its history."""

from clt_plugin.training.watch.history import by_group, evaluations_of, table_of
from clt_plugin.training.watch.warnings import EarlyWarnings, TrainWarning
from clt_plugin.training.watch.watching import Watching

__all__ = ["EarlyWarnings", "TrainWarning", "Watching", "by_group", "evaluations_of", "table_of"]
