"""What is seen of a run while it goes on: metrics on disk, a live console, early warnings."""

from clt_plugin.training.watch.watching import Watching

__all__ = ["Watching"]
