"""What a call costs a process, measured alike in our environment and in another tool's."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def resident(kind: str) -> int:
    """Return the bytes of memory that are resident now (``VmRSS``), or were at most since the peak was reset."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024  # type: ignore[index]


def measured(function: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Call a function.

    Returns:
        What it returned, and {"cpu": seconds of all threads, "wall": seconds, "peak": how far the process's resident
        memory grew at most, in bytes, "total": to what}, by the kernel's own count, so that no thread of ours watches.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what an earlier call freed counts as growth when it is used anew
    Path("/proc/self/clear_refs").write_text("5")
    before, cpu, wall = resident("VmRSS"), time.process_time(), time.perf_counter()
    result = function()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    total = resident("VmHWM")
    return result, {"cpu": cpu, "wall": wall, "peak": total - before, "total": total}


def serve(step: Callable[[], Any]) -> None:
    """Take a step for every line that comes in, and print the seconds of wall time that it took."""
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)
