"""Stopping a run between two steps when it is asked to, so that nothing of it is lost."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Give a function that says whether Ctrl-C was pressed or the process was asked to end.

    The first such signal is remembered; a second one acts as it would have. Outside the main thread, where Python has
    no say in signals, nobody is asked.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}

    def remember(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(number, before[number])

    for number in SIGNALS:
        signal.signal(number, remember)
    try:
        yield lambda: bool(asked)
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
