"""An iterator that runs in a thread of its own, a bounded number of items ahead of whoever takes them."""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Items made in another thread.

    What the iterator raises is raised where its item would have been taken. The thread ends with the iterator, with
    `close`, and when the object is forgotten or Python ends.

    Args:
        make: Makes the iterator; called in the thread.
        depth: How many items may wait.

    Attributes:
        busy: Held while an item is made: whoever holds it has the thread stand still.
    """

    def __init__(self, make: Callable[[], Iterator[T]], depth: int) -> None:
        self.busy = threading.Lock()
        self._items: queue.Queue[Any] = queue.Queue(depth)
        self._ended: BaseException | None = None
        stop = threading.Event()
        # The thread knows nothing of this object, which can therefore be forgotten.
        arguments = (make, self._items, stop, self.busy)
        thread = threading.Thread(target=_work, args=arguments, name="clt_plugin-data", daemon=True)
        self.close = weakref.finalize(self, _halt, self._items, stop, thread)
        thread.start()

    def ready(self) -> bool:
        """Whether the next item can be taken without waiting."""
        return self._ended is not None or not self._items.empty()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._ended is None:
            kind, value = self._items.get()
            if kind == "item":
                return value  # type: ignore[no-any-return]
            self._ended = value
        raise self._ended


def _work(make: Callable[[], Iterator[Any]], items: queue.Queue[Any], stop: threading.Event, busy: Any) -> None:
    end: BaseException = StopIteration()
    with contextlib.ExitStack() as stack:
        try:
            iterator = make()
            if hasattr(iterator, "close"):
                stack.callback(iterator.close)
            while not stop.is_set():
                with busy:
                    item = next(iterator)
                items.put(("item", item))
                # Not held on to while the next one is made.
                del item
        except BaseException as error:  # StopIteration among them
            end = error
    items.put(("end", end))


def _halt(items: queue.Queue[Any], stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    # (Whoever is forgotten may be forgotten in any thread, this one too: it ends by itself then.)
    while thread.is_alive() and thread is not threading.current_thread():
        # The thread may be waiting for room.
        with contextlib.suppress(queue.Empty):
            while True:
                items.get_nowait()
        thread.join(0.01)
