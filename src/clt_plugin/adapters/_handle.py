"""What ``add_clt`` returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clt_plugin.core.crosscoder import Crosscoder
from clt_plugin.core.errors import AttachError


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
        # Attached inside a trace, it acts until the run ends and cannot be taken out before.
        self._for_one_run = detach is None

    def remove(self) -> None:
        """Take the crosscoder out: the model is as it was before. A second call does nothing.

        Raises:
            AttachError: It was attached inside a trace, and acts until that run ends.
        """
        if self._for_one_run:
            raise AttachError(
                f"{self.name!r} was attached inside a trace and acts until its run ends, when it goes by itself: "
                "attach it outside the trace to take it out by hand"
            )
        detach, self._detach = self._detach, None
        if detach is not None:
            detach()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = ", for one run" if self._for_one_run else "" if self._detach else ", removed"
        return f"<{type(self.crosscoder).__name__} attached as {self.name!r}, mode={self.mode!r}{state}>"
