"""What holds for everything that one load opens, in whichever repository it lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Context:
    """How to ask the Hub, and at which commits.

    Attributes:
        token: A token; None for the stored one.
        revisions: {``owner/name``: revision} for references without one.
        pins: {``owner/name``: commit} in place of whatever branch or tag a reference names.
        commits: {(``owner/name``, branch or tag): commit} as found so far, so that a branch that moves in between
            does not mix two commits.
    """

    token: str | None = field(default=None, repr=False)
    revisions: Mapping[str, str] = field(default_factory=dict)
    pins: Mapping[str, str] = field(default_factory=dict)
    commits: dict[tuple[str, str], str] = field(default_factory=dict)
