"""Repositories on the Hugging Face Hub, at one commit: listed, read by byte ranges, fetched whole.

What is known of a commit never changes, so the listing and every range of bytes that was read are kept (in
huggingface_hub's folder for assets), beside the files themselves (in its cache, in its own layout). A second run, or
one offline, asks for nothing that was asked before.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clt_plugin.core import FormatError, HubError
from clt_plugin.hub._cache import (
    assets_folder,
    cache_folder,
    flat,
    is_whole,
    keep,
    known_bytes,
    known_commit,
    known_sizes,
)
from clt_plugin.hub._context import Context
from clt_plugin.hub._errors import explained, is_commit, is_connection_error
from clt_plugin.hub.reference import Reference, stays_inside

SMALL = 2**20
"""Up to how many bytes a file may have that is taken whole where a server knows no ranges."""


@dataclass(frozen=True)
class Tree:
    """The files below a folder.

    Attributes:
        sizes: {path in the repository: size in bytes}.
        is_complete: Whether these are all: not so where only the cache could be looked at.
    """

    sizes: Mapping[str, int | None]
    is_complete: bool = True


@dataclass(frozen=True, eq=False)
class Repository:
    """A repository of the Hub at one commit.

    Attributes:
        name: ``owner/name``.
        commit: 40 hexadecimal digits.
        context: How to ask for it, and for what it names.
    """

    name: str
    commit: str
    context: Context

    @classmethod
    def open(cls, reference: Reference, context: Context) -> Repository:
        """Find out which commit a revision is; offline, from the cache."""
        repo = reference.repo
        revision = reference.revision or context.revisions.get(repo) or "main"
        if not is_commit(revision):
            known = context.pins.get(repo) or context.commits.get((repo, revision))
            commit = known or _resolve(repo, revision, context.token)
            context.commits[repo, revision] = revision = commit
        return cls(repo, revision, context)

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"{self.name}@{self.commit[:7]}"

    @property
    def snapshot(self) -> Path:
        """Where its files are, or will be once fetched."""
        return cache_folder(self.name) / "snapshots" / self.commit

    @property
    def assets(self) -> Path:
        """Where what is known of it besides is kept."""
        return assets_folder(self.name, self.commit)

    def tree(self, prefix: str) -> Tree:
        """Return the files below a folder; offline and never listed, those at hand."""
        kept = self.assets / ("listings/" + flat(prefix) if prefix else "listing")
        sizes = known_sizes(kept.with_name(f"{kept.name}.json"))
        if sizes is None:
            sizes = self._listed_by_others(prefix)
        if sizes is None:
            try:
                sizes = self._ask_for_sizes(prefix)
            except HubError as error:
                here = self.snapshot / prefix
                if not is_connection_error(error.__cause__) or not here.is_dir():
                    raise
                found = (path for path in here.rglob("*") if path.is_file())
                return Tree({p.relative_to(self.snapshot).as_posix(): p.stat().st_size for p in found}, False)
            keep(kept.with_name(f"{kept.name}.json"), json.dumps(sizes).encode())
        odd = next((path for path in sizes if not stays_inside(path)), None)
        if odd is not None:
            raise HubError(f"{self.label} lists {odd!r}, which is no file inside a repository: it is refused")
        return Tree(sizes)

    def _ask_for_sizes(self, prefix: str) -> dict[str, int | None]:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import EntryNotFoundError
        from huggingface_hub.hf_api import RepoFile

        api = HfApi(token=self.context.token)
        try:
            with explained(self.name, self.commit):
                listed = api.list_repo_tree(self.name, prefix or None, recursive=True, revision=self.commit)
                return {item.path: item.size for item in listed if isinstance(item, RepoFile)}
        except HubError as error:
            if isinstance(error.__cause__, EntryNotFoundError):
                raise FormatError(f"{self.label} has no folder {prefix}") from error
            raise

    def _listed_by_others(self, prefix: str) -> dict[str, int | None] | None:
        """Return what huggingface_hub listed when it fetched the repository; older versions keep no listing."""
        try:
            from huggingface_hub import get_cached_repo_tree

            listed = get_cached_repo_tree(self.name, revision=self.commit, cache_dir=cache_folder(self.name).parent)
        except Exception:  # no listing, of whatever kind that error is in this version
            return None
        start = f"{prefix}/" if prefix else ""
        return {file.path: file.size for file in listed if file.path.startswith(start)}

    def fetch(self, sizes: Mapping[str, int | None]) -> None:
        """Bring files, {path: size}, into the cache, with a progress bar; what an interrupted run brought is kept."""
        missing = [path for path, size in sizes.items() if not is_whole(self.snapshot / path, size)]
        cut = [path for path in missing if is_whole(self.snapshot / path, None)]
        for paths, again in (([path for path in missing if path not in cut], False), (cut, True)):
            if paths:
                with explained(self.name, self.commit, [self._said(path) for path in paths]):
                    self._download(paths, again)
        for path in missing:
            if not is_whole(self.snapshot / path, None):
                raise HubError(f"{self.label} has no {path}: its listing names files that are not there")
            if not is_whole(self.snapshot / path, sizes[path]):
                raise HubError(f"{self.label} lists {sizes[path]:,} bytes of {self._said(path)}: delete that file")

    def _download(self, paths: list[str], again: bool) -> None:
        from huggingface_hub import snapshot_download

        patterns = [glob.escape(path) for path in paths]
        try:
            snapshot_download(
                self.name,
                revision=self.commit,
                token=self.context.token,
                allow_patterns=patterns,
                force_download=again,
            )
        except ValueError as error:  # which says that it cannot be fetched again, and has the reason as its cause
            raise error.__cause__ or error from None

    def _said(self, path: str) -> str:
        """Return how messages name a file that must be fetched: with the place of one that is there, but not whole."""
        here = self.snapshot / path
        return f"{path} ({here} is not whole)" if is_whole(here, None) else path

    def read(self, path: str, start: int, stop: int, size: int | None = None) -> bytes:
        """Read a range of a file's bytes, once: afterwards it is known.

        Args:
            path: The file.
            start: The first byte.
            stop: The byte after the last.
            size: How many bytes the file has, where that is known.
        """
        known = self.assets / "ranges" / f"{flat(path)}.{start}-{stop}"
        data = known_bytes(known, stop - start)
        if data is not None:
            return data
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        headers = build_hf_headers(token=self.context.token, library_name="clt_plugin")
        # Not compressed: a range would be one of the compressed file.
        headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        url = hf_hub_url(self.name, path, revision=self.commit)
        with explained(self.name, self.commit, [self._said(path)]):
            with http_stream_backoff("GET", url, headers=headers, follow_redirects=True) as response:
                hf_raise_for_status(response)
                data = _body(response, start, stop, size)
        if len(data) != stop - start:
            raise HubError(f"{self.label}/{path}: asked for bytes {start} to {stop}, got {len(data):,} bytes")
        keep(known, data)
        return data


def _body(response: Any, start: int, stop: int, size: int | None) -> bytes:
    """Return the bytes asked for, or fewer."""
    if response.status_code == 206 and response.headers.get("Content-Encoding", "identity") == "identity":
        return response.read()
    # A server that knows no ranges sends the whole file, which may be gigabytes.
    if response.status_code != 200 or size is None or size > SMALL:
        return b""
    whole = b""
    for block in response.iter_bytes():
        whole += block
        if len(whole) > size:
            break
    return whole[start:stop] if len(whole) == size else b""


def _resolve(repo: str, revision: str, token: str | None) -> str:
    """Return the commit that a branch or tag is at; offline, the one it was at when it was last asked for."""
    from huggingface_hub import HfApi

    ours = assets_folder(repo, "refs") / flat(revision)
    try:
        with explained(repo, revision):
            commit = HfApi(token=token).model_info(repo, revision=revision).sha
    except HubError as error:
        known = known_commit([ours, cache_folder(repo) / "refs" / revision])
        if known is None or not is_connection_error(error.__cause__):
            raise
        return known
    if not commit:
        raise HubError(f"the Hub does not say which commit {repo}@{revision} is")
    keep(ours, commit.encode())
    return commit
