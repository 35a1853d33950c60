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
    """Give a path beside `path` to write to, which takes its place once the block is done and all is on the disk.

    Args:
        path: Where the file shall be; its folder is made. A file that is there is replaced.

    Yields:
        Where to write. If the block raises, that file is removed and whatever was at `path` is as before.

    Raises:
        OSError: Nothing can be written there, such as where `path` is a folder.
    """
    final = Path(path)
    if final.is_dir():
        raise IsADirectoryError(f"{final} is a folder: give the path of a file to write, such as one in it")
    final.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=final.parent, prefix=f".{final.name}.")
    os.close(handle)
    try:
        yield Path(name)
        # On the disk before it takes the other's place.
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        # mkstemp lets nobody else read; the file shall have the rights that any new file has.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, final)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
