"""What a folder of cached activations says of itself: one JSON file, rewritten after every shard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from clt_plugin.core.aside import written_aside
from clt_plugin.core.wiring import Site
from clt_plugin.training.data.activations import Cursor, DataError, digest

NAME = "manifest.json"
FORMAT = "clt_plugin.activations"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Shard:
    """One file of a cache.

    Attributes:
        file: Its name.
        tokens: How many tokens it has.
        bytes: Its size.
        sha256: The digest of its bytes.
        after: Where in the source the next shard begins.
        squares: For each site, the sum of its squared values.
        squared_errors: For each site, the sum of the squared errors that rounding to the cache's dtype made.
    """

    file: str
    tokens: int
    bytes: int
    sha256: str
    after: Cursor
    squares: tuple[float, ...]
    squared_errors: tuple[float, ...]

    def damage(self, folder: Path) -> str | None:
        """Say what is wrong with the file, or None if it is whole."""
        path = folder / self.file
        try:
            size = path.stat().st_size
            if size != self.bytes:
                return f"has {size:,} bytes, not {self.bytes:,}"
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != self.sha256:
                    return "has other content than was written (its checksum differs)"
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read ({error})"
        return None


@dataclass(frozen=True)
class Manifest:
    """The manifest.

    Attributes:
        dtype: ``"float32"``, ``"bfloat16"`` or ``"int8"``.
        sites: The sites, in the order of columns.
        widths: Each one's width.
        source: The identity of what was harvested: models, texts, tokenizer, settings.
        limits: ``shard_bytes`` and ``max_tokens``, which say where shards and the cache end.
        complete: Whether the cache is as long as was asked.
        shards: The files, in the order of the source.
    """

    dtype: str
    sites: tuple[Site, ...]
    widths: tuple[int, ...]
    source: Mapping[str, Any]
    limits: Mapping[str, Any]
    complete: bool = False
    shards: tuple[Shard, ...] = ()

    @property
    def tokens(self) -> int:
        """How many tokens all shards have."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def identity(self) -> dict[str, Any]:
        """Say what decides which activations come."""
        return {"kind": "cache", "dtype": self.dtype, "shards": digest([shard.sha256 for shard in self.shards])}

    def with_shard(self, index: int, shard: Shard) -> Manifest:
        """Return the manifest with one more shard, or with another one in an old one's place."""
        return replace(self, shards=(*self.shards[:index], shard, *self.shards[index + 1 :]))

    def check_same(self, other: Manifest, folder: Path) -> None:
        """Refuse to go on with a cache of something else."""
        mine, theirs = self._settings(), other._settings()
        differ = [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]
        if differ:
            raise DataError(
                f"{folder} holds activations of something else ({', '.join(differ)} differ): give another folder, or "
                "the source and settings that it was begun with"
            )

    def _settings(self) -> dict[str, Any]:
        data = self.to_dict()
        return {"dtype": data["dtype"], "sites": data["sites"], **data["limits"], **data["source"]}

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data, for JSON."""
        sites = [
            {"model": site.model, "name": site.name, "layer": site.layer, "width": width}
            for site, width in zip(self.sites, self.widths, strict=True)
        ]
        shards = [{**asdict(shard), "after": shard.after.to_list()} for shard in self.shards]
        # Through JSON, so that what was written compares equal with what is read.
        data = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "complete": self.complete,
            "tokens": self.tokens,
            "dtype": self.dtype,
            "sites": sites,
            "source": dict(self.source),
            "limits": dict(self.limits),
            "shards": shards,
        }
        return dict(json.loads(json.dumps(data)))

    def write(self, folder: Path) -> None:
        """Write it to a folder, whole or not at all."""
        with written_aside(folder / NAME) as aside:
            aside.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read a folder's manifest.

        Raises:
            DataError: There is none, or it is damaged, or of another release.
        """
        path = folder / NAME
        if not path.is_file():
            raise DataError(f"{folder} is no cache of activations, as it has no {NAME}: write one with write_cache")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT or data["schema_version"] != SCHEMA_VERSION:
                raise DataError(
                    f"{path} is of format {data['format']!r}, version {data['schema_version']!r}; this release reads "
                    f"{FORMAT!r}, version {SCHEMA_VERSION}: update clt_plugin, or write the cache again"
                )
            sites = tuple(Site(site["model"], site["name"], site["layer"]) for site in data["sites"])
            widths = tuple(site["width"] for site in data["sites"])
            shards = tuple(_shard(shard) for shard in data["shards"])
            return cls(data["dtype"], sites, widths, data["source"], data["limits"], data["complete"], shards)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path} is damaged ({error}): write the cache again in another folder") from error


def _shard(data: Mapping[str, Any]) -> Shard:
    lists = {name: tuple(data[name]) for name in ("squares", "squared_errors")}
    return Shard(**{**data, **lists, "after": Cursor(*data["after"])})
