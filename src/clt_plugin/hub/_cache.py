"""What is known of repositories, on this machine: files in huggingface_hub's cache, and what was read of others.

Nothing here fails: what cannot be written is asked for again, and so is what is there but damaged.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

from clt_plugin.core.aside import written_aside
from clt_plugin.hub._errors import is_commit

LONGEST = 150
"""Up to how many characters of a path go into a file's name; systems allow 255 bytes, of which some are ours."""


def cache_folder(repo: str) -> Path:
    """Return where huggingface_hub keeps a repository's files."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def assets_folder(repo: str, of: str) -> Path:
    """Return where we keep what is known of a commit, or of ``refs``: not made here, as it may be read only."""
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE).expanduser() / "clt_plugin" / repo.replace("/", "--") / of


def flat(path: str) -> str:
    """Return a file's name that stands for a path."""
    name = quote(path, safe="")
    if len(name) <= LONGEST:
        return name
    return f"{name[:100]}-{hashlib.sha256(path.encode()).hexdigest()[:32]}"


def is_whole(path: str | Path, size: int | None) -> bool:
    """Whether a file is there and as long as it must be; with None, however long it is."""
    try:
        found = os.stat(path)
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and size in (None, found.st_size)


def known_bytes(path: Path, n: int) -> bytes | None:
    """Return what was kept, if it is all there."""
    with contextlib.suppress(OSError):
        data = path.read_bytes()
        return data if len(data) == n else None
    return None


def known_sizes(path: Path) -> dict[str, int | None] | None:
    """Return {path: size} as it was kept, if it can be read."""
    with contextlib.suppress(OSError, ValueError):
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict) and all(size is None or isinstance(size, int) for size in data.values()):
            return data
    return None


def known_commit(paths: Iterable[Path]) -> str | None:
    """Return the commit in the file that was written last."""
    found = []
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            found.append((path.stat().st_mtime, path.read_text(encoding="utf-8").strip()))
    return max(((at, commit) for at, commit in found if is_commit(commit)), default=(0, None))[1]


def keep(path: Path, data: bytes) -> None:
    """Write a small file aside and rename it, so that no other run reads half of it; where that fails, let it be."""
    with contextlib.suppress(OSError), written_aside(path) as aside:
        aside.write_bytes(data)
