"""References to places on the Hugging Face Hub: ``hf://owner/name[/folder][@revision]``."""

from __future__ import annotations

import re
from dataclasses import dataclass

_REFERENCE = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<folder>[^@]*))?(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Reference:
    """A place on the Hub.

    Attributes:
        repo: ``owner/name``.
        folder: The folder inside it, or None; with ``*`` it stands for every folder that matches.
        revision: A branch, tag or commit, or None for the default branch.
    """

    repo: str
    folder: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        for what, path in (("repository", self.repo), ("folder", self.folder), ("revision", self.revision)):
            if path is not None and not stays_inside(path):
                raise ValueError(f"{path!r} is not a {what}: write plain names between slashes, without ..")

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Parse ``hf://owner/name[/folder][@revision]``.

        >>> Reference.parse("hf://google/gemma-scope-2-1b-pt/clt/width_262k_l0_big@main")
        Reference(repo='google/gemma-scope-2-1b-pt', folder='clt/width_262k_l0_big', revision='main')
        """
        match = _REFERENCE.fullmatch(text)
        if not match:
            raise ValueError(f"{text!r} is not a reference: write hf://owner/name[/folder][@revision]")
        return cls(match["repo"], (match["folder"] or "").rstrip("/") or None, match["revision"])

    def __str__(self) -> str:
        folder = f"/{self.folder}" if self.folder else ""
        return f"hf://{self.repo}{folder}" + (f"@{self.revision}" if self.revision else "")


def stays_inside(path: str) -> bool:
    """Whether a path is relative and leads nowhere but down: no part of it is empty, ``.`` or ``..``.

    >>> [stays_inside(path) for path in ("a/b.c", "../a", "a/../../b", "/a", "a//b", "")]
    [True, False, False, False, False, False]
    """
    return not {"", ".", ".."} & {*re.split(r"[/\\]", path)}
