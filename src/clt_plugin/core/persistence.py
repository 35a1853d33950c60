"""Saving, loading and publishing, as methods of a crosscoder. Outer layers do the work: see `SERVICES`."""

from __future__ import annotations

from os import PathLike
from typing import Any, TypeVar

T = TypeVar("T", bound="Persistent")


class Persistent:
    """What a crosscoder can do with folders and with the Hub."""

    # Registries are imported within, since a crosscoder that travels to a remote model takes its globals along.

    def save(self, folder: str | PathLike[str], format: str = "native", overwrite: bool = False) -> None:
        """Save to a folder, atomically: what was there stays until everything new is written.

        Args:
            folder: Where to; made if missing.
            format: ``"native"``, ``"circuit-tracer"``, or any registered format that writes.
            overwrite: Whether a folder that holds something may be replaced.
        """
        from clt_plugin.core.registry import FORMATS

        FORMATS[format].save(self, folder, overwrite=overwrite)

    @classmethod
    def from_pretrained(
        cls: type[T],
        name_or_folder: str | PathLike[str],
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | None = None,
        **settings: Any,
    ) -> T:
        """Load in the Hub's idiom; the same as `clt_plugin.load` of ``hf://owner/name/subfolder@revision``.

        Args:
            name_or_folder: ``owner/name``, or a local folder.
            revision: A branch, tag or commit.
            subfolder: A folder inside it.
            token: A Hub token.
            **settings: Of `clt_plugin.load`, such as ``lazy=True``.
        """
        from clt_plugin.core.registry import SERVICES

        return SERVICES["from_pretrained"](name_or_folder, revision, subfolder, token=token, **settings)

    def push_to_hub(self, repo: str, **settings: Any) -> str:
        """Publish on the Hub, with a model card; see `clt_plugin.formats.push_to_hub` for the settings.

        Args:
            repo: ``owner/name``; made if missing.
            **settings: Such as ``private=True`` or ``format="circuit-tracer"``.

        Returns:
            A reference to what was published, at its commit: `clt_plugin.load` takes it.
        """
        from clt_plugin.core.registry import SERVICES

        return SERVICES["push_to_hub"](self, repo, **settings)
