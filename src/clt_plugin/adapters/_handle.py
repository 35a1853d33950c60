"""What ``add_clt`` returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clt_plugin.core.crosscoder import Crosscoder


class Handle:
    """A crosscoder attached to a model. Remove it with `remove`, or use it as a context manager.

    Attributes:
        crosscoder: What is attached.
        name: Under which name.
        mode: ``"replace"``, ``"replace_with_error"`` or ``"observe"``.
        layers: Its points, by layer.
    """

    def __init__(
        self, crosscoder: Crosscoder, name: str, mode: str, layers: Any, detach: Callable[[], None] | None
    ) -> None:
        self.crosscoder, self.name, self.mode, self.layers = crosscoder, name, mode, layers
        self._detach = detach

    def remove(self) -> None:
        """Take the crosscoder out: the model is as it was before. A second call does nothing."""
        detach, self._detach = self._detach, None
        if detach is not None:
            detach()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "" if self._detach else ", removed"
        return f"<{type(self.crosscoder).__name__} attached as {self.name!r}, mode={self.mode!r}{state}>"
