"""Repositories on the Hugging Face Hub, at one commit: listed, read by byte ranges, fetched whole.

What is known of a commit never changes, so the listing and every range of bytes that was read are kept (in
huggingface_hub's folder for assets), beside the files themselves (in its cache, in its own layout). A second run, or
one offline, asks for nothing that was asked before.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from clt_plugin.core import File, FormatError, HubError
from clt_plugin.core.files import DTYPES, Header, read_npz
from clt_plugin.hub.folder import Folder, natural
from clt_plugin.hub.reference import Reference

HEADER_BYTES = 2**16
"""How much of a safetensors file is asked for at first: the headers of most are shorter."""

COUNTS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
"""The dtypes of what is not a weight, such as a stored k."""

AT_ONCE = 8
"""How many requests are under way at a time."""


@dataclass(frozen=True, eq=False)
class Repository:
    """A repository of the Hub at one commit.

    Attributes:
        name: ``owner/name``.
        commit: 40 hexadecimal digits.
        token: A token; None for the stored one.
        revisions: Which revisions to take of repositories that this one names.
    """

    name: str
    commit: str
    token: str | None = None
    revisions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, reference: Reference, token: str | None, revisions: Mapping[str, str]) -> Repository:
        """Find out which commit a revision is; offline, from the cache."""
        revision = reference.revision or revisions.get(reference.repo) or "main"
        commit = revision if _is_commit(revision) else _resolve(reference.repo, revision, token)
        return cls(reference.repo, commit, token, revisions)

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"{self.name}@{self.commit[:7]}"

    @property
    def snapshot(self) -> Path:
        """Where its files are, or will be once fetched."""
        return _cache_folder(self.name) / "snapshots" / self.commit

    @property
    def assets(self) -> Path:
        """Where what is known of it besides is kept."""
        from huggingface_hub import cached_assets_path

        return Path(cached_assets_path("clt_plugin", self.name, self.commit))

    def sizes(self, prefix: str) -> dict[str, int | None]:
        """Return {path: size in bytes} of every file below a folder; offline and never listed, of those at hand."""
        known = self.assets / "trees" / f"{_flat(prefix) or 'root'}.json"
        if known.is_file():
            return json.loads(known.read_text(encoding="utf-8"))
        from huggingface_hub import HfApi
        from huggingface_hub.errors import EntryNotFoundError
        from huggingface_hub.hf_api import RepoFile

        try:
            with explained(self.name, self.commit):
                listed = HfApi(token=self.token).list_repo_tree(
                    self.name, prefix or None, recursive=True, revision=self.commit
                )
                sizes: dict[str, int | None] = {item.path: item.size for item in listed if isinstance(item, RepoFile)}
        except HubError as error:
            if isinstance(error.__cause__, EntryNotFoundError):
                raise FormatError(f"{self.label} has no folder {prefix}") from error
            here = self.snapshot / prefix
            if not is_connection_error(error.__cause__) or not here.is_dir():
                raise
            # Nothing says whether this is all there is: formats find gaps, and what is missing is asked for later.
            found = (path for path in here.rglob("*") if path.is_file())
            return {path.relative_to(self.snapshot).as_posix(): path.stat().st_size for path in found}
        _write(known, json.dumps(sizes).encode())
        return sizes

    def fetch(self, paths: Iterable[str]) -> None:
        """Bring files into the cache, with a progress bar; what an interrupted run has brought is kept."""
        from huggingface_hub import snapshot_download

        missing = [path for path in paths if not (self.snapshot / path).is_file()]
        if not missing:
            return
        with explained(self.name, self.commit, missing):
            snapshot_download(
                self.name, revision=self.commit, token=self.token, allow_patterns=[glob.escape(p) for p in missing]
            )
        absent = [path for path in missing if not (self.snapshot / path).is_file()]
        if absent:
            raise HubError(f"{self.label} has no {', '.join(absent[:4])}: its listing names files that are not there")

    def read(self, path: str, start: int, stop: int) -> bytes:
        """Read a range of a file's bytes, once: afterwards it is known."""
        known = self.assets / "ranges" / f"{_flat(path)}.{start}-{stop}"
        if known.is_file() and known.stat().st_size == stop - start:
            return known.read_bytes()
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        headers = build_hf_headers(token=self.token, library_name="clt_plugin")
        headers["Range"] = f"bytes={start}-{stop - 1}"
        url = hf_hub_url(self.name, path, revision=self.commit)
        with explained(self.name, self.commit, [path]):
            with http_stream_backoff("GET", url, headers=headers, follow_redirects=True) as response:
                hf_raise_for_status(response)
                # A server that knows no ranges would send the whole file, gigabytes of it.
                data = response.read() if response.status_code == 206 else b""
        if len(data) != stop - start:
            raise HubError(f"{self.label}/{path}: asked for bytes {start} to {stop}, got {len(data):,} bytes")
        _write(known, data)
        return data


def open_remote(reference: Reference, token: str | None, revisions: Mapping[str, str]) -> RemoteFolder:
    """Open a folder of the Hub; its listing is asked for now, everything else when it is needed."""
    repository = Repository.open(reference, token, revisions)
    prefix = reference.folder or ""
    fixed = "/".join(_before_pattern(prefix.split("/")))
    folder = RemoteFolder(repository, fixed, repository.sizes(fixed))
    if not folder.names and not folder.folders:
        raise FormatError(f"{repository.label} has no folder {fixed or 'with files'}")
    return folder


def _before_pattern(parts: list[str]) -> Iterator[str]:
    for part in parts:
        if "*" in part:
            return
        yield part


class RemoteFolder(Folder):
    """A folder of a repository of the Hub, at one commit."""

    def __init__(self, repository: Repository, prefix: str, sizes: Mapping[str, int | None]) -> None:
        super().__init__(repository.snapshot / prefix, "/".join(filter(None, (repository.label, prefix))))
        self.repository, self.prefix, self.sizes = repository, prefix, sizes

    def _below(self) -> Iterator[str]:
        start = f"{self.prefix}/" if self.prefix else ""
        return (path[len(start) :] for path in self.sizes if path.startswith(start))

    @property
    def names(self) -> list[str]:
        """The files directly in it, in natural order."""
        return sorted((path for path in self._below() if "/" not in path), key=natural)

    @property
    def folders(self) -> list[str]:
        """The folders directly in it, in natural order."""
        return sorted({path.partition("/")[0] for path in self._below() if "/" in path}, key=natural)

    @property
    def parent(self) -> RemoteFolder | None:
        """The folder that it lies in, listed anew; None for the repository itself."""
        if not self.prefix:
            return None
        above = self.prefix.rpartition("/")[0]
        return RemoteFolder(self.repository, above, self.repository.sizes(above))

    @property
    def source(self) -> str:
        """A reference to it at its commit."""
        return str(Reference(self.repository.name, self.prefix or None, self.repository.commit))

    def __truediv__(self, name: str) -> RemoteFolder:
        return RemoteFolder(self.repository, f"{self.prefix}/{name}" if self.prefix else name, self.sizes)

    def file(self, name: str) -> RemoteFile:
        """Return a file of tensors."""
        path = f"{self.prefix}/{name}" if self.prefix else name
        return RemoteFile(
            str(self.repository.snapshot / path),
            f"{self.label}/{name}",
            repository=self.repository,
            remote_path=path,
            listed_size=self.sizes.get(path),
        )

    def headers(self, names: Iterable[str]) -> dict[str, Header]:
        """Return the headers of several files, by name, asking for several at a time."""
        files = {name: self.file(name) for name in names}
        found = read_headers(files.values())
        return {name: found[file] for name, file in files.items()}

    def text(self, name: str) -> str:
        """Read a small text file, from the cache if it is there."""
        if (self.path / name).is_file():
            return super().text(name)
        path = f"{self.prefix}/{name}" if self.prefix else name
        size = self.sizes.get(path)
        return self.repository.read(path, 0, size).decode("utf-8") if size else ""

    def elsewhere(self, reference: str) -> Folder:
        """Open a folder of another repository, which a config names."""
        from clt_plugin.hub.places import open_folder

        return open_folder(reference, self.repository.token, self.repository.revisions)


@dataclass(frozen=True)
class RemoteFile(File):
    """A file of the Hub: read from the cache if it is there, else by ranges of bytes.

    Attributes:
        repository: Where it is.
        remote_path: Its path there.
        listed_size: Its size as listed, or None.
    """

    repository: Repository = field(kw_only=True, compare=False)
    remote_path: str = field(kw_only=True)
    listed_size: int | None = field(kw_only=True)

    @property
    def source(self) -> str:
        """A reference to the repository at its commit."""
        return str(Reference(self.repository.name, revision=self.repository.commit))

    @property
    def size(self) -> int | None:
        """Its size in bytes, or None where that is not known."""
        return File.size.fget(self) if self.is_here else self.listed_size  # type: ignore[attr-defined]

    def header(self) -> Header:
        """Return {key: (shape, dtype)}, without fetching the file."""
        if self.is_here or self.remote_path.endswith((".pt", ".pth", ".bin")):
            if not self.is_here:  # a pickle has no header to read ahead
                self.repository.fetch([self.remote_path])
            return File.header(self)
        if self.listed_size == 0:
            raise FormatError(f"{self} is empty on the Hub (0 bytes): it was published so; ask its authors")
        if self.remote_path.endswith(".npz"):
            with io.BufferedReader(_Ranges(self)) as stream:  # type: ignore[arg-type]
                return {key: (entry.shape, entry.dtype) for key, entry in read_npz(stream).items()}
        header = self._safetensors_header()[1]
        return {key: (tuple(info["shape"]), DTYPES.get(info["dtype"], info["dtype"])) for key, info in header.items()}

    def _safetensors_header(self) -> tuple[int, dict[str, Any]]:
        """Return where the data begin, and the header."""
        size = self.listed_size
        first = self.repository.read(self.remote_path, 0, min(HEADER_BYTES, size or HEADER_BYTES))
        start = 8 + int.from_bytes(first[:8], "little")
        try:
            if size is not None and start > size:
                raise ValueError("its header is longer than the file")
            if start > len(first):
                first += self.repository.read(self.remote_path, len(first), start)
            header = json.loads(first[8:start])
            header.pop("__metadata__", None)
            end = start + max((info["data_offsets"][1] for info in header.values()), default=0)
            if size is not None and end != size:
                raise ValueError(f"it has {size:,} bytes, where its header speaks of {end:,}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{self} is damaged on the Hub ({error}): ask its authors") from error
        return start, header

    def read(self, key: str, at: tuple[int, ...] = (), rows: Tensor | slice | None = None) -> Tensor:
        """Return (part of) a tensor, see `File.read`; of a file that is not here, by ranges of bytes."""
        if not self.is_here and not self.remote_path.endswith(".safetensors"):
            self.repository.fetch([self.remote_path])
        if self.is_here:
            return File.read(self, key, at, rows)
        start, header = self._safetensors_header()
        info = header[key]
        dtype, shape = (DTYPES | COUNTS)[info["dtype"]], list(info["shape"])
        offset = start + info["data_offsets"][0]
        for index in at:
            shape.pop(0)
            offset += index * prod(shape) * dtype.itemsize
        wanted = [*range(shape[0])[rows]] if isinstance(rows, slice) else None if rows is None else rows.tolist()
        if wanted is None:
            data = self.repository.read(self.remote_path, offset, offset + prod(shape) * dtype.itemsize)
            return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)
        if not wanted:
            return torch.empty(0, *shape[1:], dtype=dtype)
        length = prod(shape[1:]) * dtype.itemsize
        ranges = [(offset + row * length, offset + (row + 1) * length) for row in wanted]
        parts = _at_once(lambda r: self.repository.read(self.remote_path, *r), ranges)
        return torch.frombuffer(bytearray(b"".join(parts)), dtype=dtype).reshape(len(wanted), *shape[1:])


class _Ranges(io.RawIOBase):
    """A file of the Hub as a stream that can be read anywhere; for archives, whose directory is at the end."""

    def __init__(self, file: RemoteFile) -> None:
        self.file, self.size, self.position = file, file.listed_size or 0, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        stop = min(self.position + len(buffer), self.size)
        if stop <= self.position:
            return 0
        data = self.file.repository.read(self.file.remote_path, self.position, stop)
        buffer[: len(data)] = data
        self.position = stop
        return len(data)


# ---------------------------------------------------------------- many files


def read_headers(files: Iterable[File]) -> dict[File, Header]:
    """Return the headers of files, asking the Hub for several at a time."""
    files = list(dict.fromkeys(files))
    away = [file for file in files if not file.is_here]
    headers: dict[File, Header] = dict(zip(away, _at_once(lambda file: file.header(), away), strict=True))
    return {file: headers[file] if file in headers else file.header() for file in files}


def fetch(files: Iterable[File]) -> None:
    """Bring those of the files that are on the Hub, and not here, into the cache."""
    missing: dict[Repository, list[RemoteFile]] = {}
    for part in dict.fromkeys(part for file in files for part in file.parts):
        if isinstance(part, RemoteFile) and not part.is_here:
            missing.setdefault(part.repository, []).append(part)
    needed = sum(file.listed_size or 0 for group in missing.values() for file in group)
    for repository, group in missing.items():
        _check_space(repository, needed)
        repository.fetch(file.remote_path for file in group)


def _check_space(repository: Repository, needed: int) -> None:
    existing = next(folder for folder in repository.snapshot.parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise HubError(
            f"{repository.label}: {needed / 2**30:.1f} GiB are to be fetched, but {free / 2**30:.1f} GiB are free at "
            f"{existing}: make room, set HF_HOME to another disk, or load some layers with layers="
        )


def _at_once(function: Callable[[Any], Any], items: list[Any]) -> list[Any]:
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(AT_ONCE, len(items))) as pool:
        return list(pool.map(function, items))


# ---------------------------------------------------------------- commits and caches


def _is_commit(revision: str) -> bool:
    return len(revision) == 40 and all(digit in "0123456789abcdef" for digit in revision)


def _cache_folder(repo: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def _resolve(repo: str, revision: str, token: str | None) -> str:
    """Return the commit that a branch or tag is at; offline, the one it was at when it was last asked for."""
    from huggingface_hub import HfApi, cached_assets_path

    ours = Path(cached_assets_path("clt_plugin", repo, "refs")) / _flat(revision)
    try:
        with explained(repo, revision):
            commit = HfApi(token=token).model_info(repo, revision=revision).sha
    except HubError as error:
        if not is_connection_error(error.__cause__):
            raise
        known = [path for path in (ours, _cache_folder(repo) / "refs" / revision) if path.is_file()]
        if not known:
            raise
        return max(known, key=lambda path: path.stat().st_mtime).read_text(encoding="utf-8").strip()
    if not commit:
        raise HubError(f"the Hub does not say which commit {repo}@{revision} is")
    _write(ours, commit.encode())
    return commit


def _flat(path: str) -> str:
    return quote(path, safe="")


def _write(path: Path, data: bytes) -> None:
    """Write a small file aside and rename it, so that no other run reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise


# ---------------------------------------------------------------- what to say when it fails


TOKEN = "give a token, by `hf auth login`, HF_TOKEN or token="


@contextlib.contextmanager
def explained(repo: str, revision: str, paths: Iterable[str] = ()) -> Iterator[None]:
    """Turn the Hub's errors into one that says what to do next."""
    try:
        yield
    except Exception as error:
        message = _explanation(error, repo, revision, list(paths))
        if message is None:
            raise
        raise HubError(message) from error


def _explanation(error: Exception, repo: str, revision: str, paths: list[str]) -> str | None:
    """Say what an error of huggingface_hub means and what to do next; None for one that is not about the Hub."""
    from huggingface_hub import errors

    where = f"{repo}@{revision[:7] if _is_commit(revision) else revision}"
    what = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    if isinstance(error, errors.GatedRepoError):  # a kind of RepositoryNotFoundError
        return f"{repo} is gated: accept its terms at https://huggingface.co/{repo}, then {TOKEN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no repository {repo} on the Hub, or it is private: check the name, or {TOKEN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision}: its page lists the branches, tags and commits"
    if is_offline(error):
        return (
            f"{where}: {what or 'it'} is not in the cache, and HF_HUB_OFFLINE is set: unset it, or fetch it where "
            "there is a connection"
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"{where} has no {what or 'such entry'}"
    if isinstance(error, errors.HfHubHTTPError):
        return f"{where}: the Hub answered with an error ({_line(error)}): try again later"
    if is_connection_error(error):
        return f"{where}: the connection failed ({_line(error)}): run it again, the files that have come are kept"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{where}: the disk is full while fetching {what}: make room and run it again"
    return None


def is_offline(error: BaseException | None) -> bool:
    """Whether an error says that the Hub may not be asked."""
    from huggingface_hub import constants, errors

    nothing_here = isinstance(error, errors.LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE
    return isinstance(error, errors.OfflineModeIsEnabled) or nothing_here


def is_connection_error(error: BaseException | None) -> bool:
    """Whether an error says that the Hub was not reached, or the connection cut."""
    # By name: the client's own classes change with its versions (httpx, httpx2).
    names = {kind.__name__ for kind in type(error).__mro__} if error else set()
    return bool(names & {"TransportError", "ConnectionError", "LocalEntryNotFoundError"})


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
