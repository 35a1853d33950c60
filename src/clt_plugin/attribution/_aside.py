"""Files that are whole or not there: written aside, then renamed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from os import PathLike
from pathlib import Path


@contextlib.contextmanager
def written_aside(path: str | PathLike[str]) -> Iterator[Path]:
    """Give a path beside `path` to write to, which takes its place once the block is done.

    Args:
        path: Where the file shall be; its folder is made. One that is there is replaced.

    Yields:
        Where to write. If the block raises, that file is removed and whatever was at `path` is as before.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=final.parent, prefix=f".{final.name}.")
    os.close(handle)
    try:
        yield Path(aside)
        # mkstemp lets nobody else read; the file shall have the rights that any new file has.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(aside, 0o666 & ~mask)
        os.replace(aside, final)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise
