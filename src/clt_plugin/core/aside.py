"""Files that are whole or not there: written aside, then renamed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from os import PathLike
from pathlib import Path


class written_aside:
    """Give a path beside `path` to write to, which takes its place once the block is done and all is on the disk.

    If the block raises, that file is removed and whatever was at `path` is as before.

    Args:
        path: Where the file shall be; its folder is made. A file that is there is replaced.

    Raises:
        IsADirectoryError: A folder is there; nothing was written.
    """

    # A class, not a generator with a decorator: what lies in the core may travel to a remote model.

    def __init__(self, path: str | PathLike[str]) -> None:
        self.final = Path(path)
        self.aside = Path()

    def __enter__(self) -> Path:
        if self.final.is_dir():
            raise IsADirectoryError(f"{self.final} is a folder: give the path of a file, such as one in it")
        self.final.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.final.parent, prefix=f".{self.final.name}.")
        os.close(handle)
        self.aside = Path(name)
        return self.aside

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                self._take_its_place()
        finally:
            # Gone by now, if all went well.
            with contextlib.suppress(OSError):
                os.unlink(self.aside)

    def _take_its_place(self) -> None:
        # On the disk before it takes the other's place.
        with open(self.aside, "rb+") as file:
            os.fsync(file.fileno())
        # mkstemp lets nobody else read; the file shall have the rights that any new file has.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(self.aside, 0o666 & ~mask)
        os.replace(self.aside, self.final)
