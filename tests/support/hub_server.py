"""A Hugging Face Hub on loopback: models alone, in memory, with a log of what was asked and faults on demand.

It answers what huggingface_hub asks when it downloads, lists, reads ranges, and uploads without Xet::

    with HubServer() as hub, use(hub, tmp_path):
        commit = hub.add("owner/name", {"config.yaml": b"...", "a/b.safetensors": path})
        hub.cut("owner/name", "a/b.safetensors", after=1000)
        huggingface_hub.snapshot_download("owner/name")
        assert hub.sent("owner/name", "a/b.safetensors") == 1000 + rest

As on the Hub, the files and sizes of a gated repository are public and only their contents are not; of a private one
nothing is. Unlike the Hub, lists come in one page; and unless asked for with `redirects` and `compresses`, large files
come from the same host, where the Hub redirects to another, and what it compresses (small text files) is sent as it is.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
import warnings
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

BLOCK = 1 << 16
BIG = 10_000_000  # bytes from which on a file is kept in Git LFS, whatever its name
LARGE_SUFFIXES = {".bin", ".ckpt", ".gz", ".h5", ".msgpack", ".npy", ".npz", ".onnx", ".pt", ".pth", ".safetensors"}
DATE = "2025-01-01T00:00:00.000Z"


@dataclass
class Blob:
    """A file's content: bytes, or a file of ours that is read when it is asked for."""

    source: bytes | Path
    lfs: bool

    @cached_property
    def size(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        stop = self.size if stop is None else stop
        if isinstance(self.source, bytes):
            yield from (self.source[at : min(at + BLOCK, stop)] for at in range(start, stop, BLOCK))
            return
        with open(self.source, "rb") as file:
            file.seek(start)
            while start < stop and (block := file.read(min(BLOCK, stop - start))):
                start += len(block)
                yield block

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for block in self.blocks():
            digest.update(block)
        return digest.hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @cached_property
    def oid(self) -> str:
        """The id git gives to what it stores: the content, or the pointer to it."""
        if self.lfs:
            return git_oid("blob", self.pointer)
        return git_oid("blob", b"".join(self.blocks()))

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


def git_oid(kind: str, content: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


def is_large(path: str, size: int) -> bool:
    return PurePosixPath(path).suffix in LARGE_SUFFIXES or size >= BIG


@dataclass
class Commit:
    sha: str
    parent: str | None
    title: str
    files: dict[str, Blob]


@dataclass
class Repository:
    name: str
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    access: str = "public"
    tokens: set[str] = field(default_factory=set)

    def resolve(self, revision: str) -> Commit | None:
        pulls = {f"refs/pr/{number}": sha for number, sha in self.pulls.items()}
        sha = {**self.tags, **self.branches, **pulls}.get(revision)
        if sha is None and re.fullmatch("[0-9a-f]{7,40}", revision):
            sha = next((full for full in self.commits if full.startswith(revision)), None)
        return None if sha is None else self.commits[sha]

    def commit(self, parent: Commit | None, title: str, changes: Mapping[str, Blob | None]) -> Commit:
        files = {**(parent.files if parent else {}), **changes}
        kept = {path: blob for path, blob in sorted(files.items()) if blob is not None}
        above = parent.sha if parent else None
        # The number of commits makes the same content a new commit; nothing random, so that runs can be compared.
        content = [self.name, above, title, len(self.commits), [(path, blob.oid) for path, blob in kept.items()]]
        commit = Commit(git_oid("commit", json.dumps(content).encode()), above, title, kept)
        self.commits[commit.sha] = commit
        return commit


@dataclass
class Request:
    """A line of the log. `sent` counts the body's bytes handed to the socket, and grows while they are."""

    method: str
    path: str
    repo: str | None = None
    file: str | None = None
    range: str | None = None
    token: str | None = None
    host: str | None = None
    status: int | None = None
    sent: int = 0


@dataclass
class Fault:
    kind: str
    repo: str
    file: str | None
    method: str | None
    times: int | None
    value: float
    after: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)


class RefusalError(Exception):
    """An answer that is an error, by the headers huggingface_hub tells them apart with."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


class HubServer:
    """The server and what it holds. Closing it raises what went wrong inside it."""

    writer = "hf_writer"  # the token that may create, write and read everything
    redirects = False  # whether large files come from another host, as on the Hub
    compresses = False  # whether small files are sent compressed, and whole, to whom accepts that, as on the Hub

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.uploaded: dict[str, bytes] = {}  # LFS objects, by sha256, before a commit refers to them
        self.requests: list[Request] = []
        self.errors: list[BaseException] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.closing = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._servers = [_Server(("127.0.0.1", 0), handler) for _ in range(2)]
        self.url, self.other_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        # The default interval would make each test wait half a second for the end.
        starts = (server.serve_forever for server in self._servers)
        self._threads = [threading.Thread(target=start, args=(0.01,), daemon=True) for start in starts]

    def __enter__(self) -> HubServer:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.closing.set()
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()
        if self.errors and kind is None:
            raise self.errors[0]

    # What it holds

    def add(
        self,
        repo: str,
        files: Mapping[str, bytes | Path | None] | Path,
        revision: str = "main",
        title: str = "Add files",
    ) -> str:
        """Commit files (or all of a folder) on top of a branch; None deletes one. Return the commit."""
        if isinstance(files, Path):
            files = {path.relative_to(files).as_posix(): path for path in files.rglob("*") if path.is_file()}
        changes = {path: None if source is None else self._blob(path, source) for path, source in files.items()}
        with self.lock:
            repository = self.repositories.setdefault(repo, Repository(repo))
            commit = repository.commit(repository.resolve(revision), title, changes)
            repository.branches[revision] = commit.sha
        return commit.sha

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Return all contents at a revision."""
        commit = self.repositories[repo].resolve(revision)
        assert commit is not None, f"{repo} has no {revision}"
        return {path: b"".join(blob.blocks()) for path, blob in commit.files.items()}

    def tag(self, repo: str, name: str, commit: str) -> None:
        self.repositories[repo].tags[name] = commit

    def gate(self, repo: str, *tokens: str) -> None:
        """Let only these tokens (and the writer's) read contents."""
        self.repositories[repo].access, self.repositories[repo].tokens = "gated", {*tokens}

    def make_private(self, repo: str, *tokens: str) -> None:
        """Let only these tokens (and the writer's) know of it."""
        self.repositories[repo].access, self.repositories[repo].tokens = "private", {*tokens}

    def _blob(self, path: str, source: bytes | Path) -> Blob:
        blob = Blob(source, lfs=False)
        blob.lfs = is_large(path, blob.size)
        return blob

    # What goes wrong

    def cut(self, repo: str, file: str, after: int, times: int | None = 1, *, reset: bool = False) -> None:
        """Close the connection before the file's byte `after`; answers that stop short of it are not touched.

        Args:
            repo: The repository.
            file: The file.
            after: A position in the file, not in the answer: one cut always (`times` None) is never passed.
            times: How often; None for always.
            reset: Whether the client sees a reset where it else sees an early end.
        """
        self.faults.append(Fault("cut", repo, file, "GET", times, float(reset), after))

    def fail(
        self,
        repo: str,
        file: str | None = None,
        status: int = 503,
        times: int | None = 1,
        *,
        method: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Answer with a status whatever is asked of a file, or without one, of the repository."""
        self.faults.append(Fault("fail", repo, file, method, times, status, headers=headers or {}))

    def slow(
        self, repo: str, file: str | None, seconds: float, *, after: int | None = None, times: int | None = None
    ) -> None:
        """Wait before answering, or with `after`, before sending the file's byte at that position."""
        kind, method = ("wait", None) if after is None else ("pause", "GET")
        self.faults.append(Fault(kind, repo, file, method, times, seconds, after or 0))

    def heal(self) -> None:
        """End all faults."""
        self.faults.clear()

    def _fault(self, kind: str, request: Request, start: int = 0, stop: int = 1) -> Fault | None:
        """Return the first fault of a kind that is due, and count it."""
        with self.lock:
            for fault in self.faults:
                if (
                    (fault.kind, fault.repo) == (kind, request.repo)
                    and fault.file in (None, request.file)
                    and fault.method in (None, request.method)
                    and fault.times != 0
                    and (kind in ("fail", "wait") or (fault.after < stop and (kind == "cut" or fault.after >= start)))
                ):
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None

    # What was asked

    def sent(self, repo: str, file: str | None = None) -> int:
        """Return how many bytes of a file's content, or of all files', were sent."""
        return sum(self.fetched(repo).values()) if file is None else self.fetched(repo).get(file, 0)

    def fetched(self, repo: str) -> dict[str, int]:
        """Return the files of which content was asked, and how many bytes of it were sent."""
        totals: dict[str, int] = {}
        with self.lock:
            for request in self.requests:
                if request.repo == repo and request.file is not None and request.method == "GET":
                    totals[request.file] = totals.get(request.file, 0) + request.sent
        return totals

    def ranges(self, repo: str, file: str) -> list[str | None]:
        """Return the Range of each GET of a file, in order."""
        return [r.range for r in self.requests if (r.repo, r.file, r.method) == (repo, file, "GET")]

    def forget(self) -> None:
        """Empty the log."""
        with self.lock:
            self.requests.clear()


class _Server(ThreadingHTTPServer):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.live: dict[Any, threading.Thread] = {}

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(target=self.process_request_thread, args=(request, client_address), daemon=True)
        self.live[request] = thread
        thread.start()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        super().process_request_thread(request, client_address)
        del self.live[request]

    def server_close(self) -> None:
        super().server_close()
        # Clients keep connections open between requests: end these, so that no thread or socket outlives the server.
        for request, thread in list(self.live.items()):
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)
            thread.join(5)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore what is left here: clients that hang up between requests."""


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are written apart, and would wait for each other
    timeout = 60

    def do(self) -> None:
        self.body = self._read_body()
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ") or None
        said = {"range": self.headers["Range"], "token": token, "host": self.headers["Host"]}
        self.request_ = Request(self.command, unquote(url.path), **said)
        try:
            handle, values = self._route(url.path)
            self.request_.repo, self.request_.file = values.get("repo"), values.get("file")
            with self.hub.lock:
                self.hub.requests.append(self.request_)
            if handle is None:
                raise RefusalError(404, f"this server knows no {self.command} {url.path}")
            if fault := self.hub._fault("wait", self.request_):
                self.hub.closing.wait(fault.value)
            if fault := self.hub._fault("fail", self.request_):
                raise RefusalError(int(fault.value), f"fault on demand: {int(fault.value)}", headers=fault.headers)
            handle(self, **values)
        except RefusalError as refusal:
            self._answer({"error": str(refusal)}, refusal.status, refusal.headers)
        except OSError:  # the client went away
            self.close_connection = True
        except Exception as error:
            self.hub.errors.append(error)
            self._answer({"error": repr(error)}, 500)

    do_GET = do_HEAD = do_POST = do_PUT = do  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """Keep quiet: the log is `HubServer.requests`."""

    def _route(self, path: str) -> tuple[Callable[..., None] | None, dict[str, str]]:
        for pattern, method, handle in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == ("GET" if self.command == "HEAD" else self.command):
                return handle, {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
        return None, {}

    def _read_body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.request_.status = status
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # Who may ask for what

    def _repository(self, name: str, contents: bool = False) -> Repository:
        repo, token = self.hub.repositories.get(name), self.request_.token
        known = repo is not None and token in {*repo.tokens, self.hub.writer}
        if repo is None or (repo.access == "private" and not known):
            raise RefusalError(404 if token else 401, "Repository not found", "RepoNotFound")
        if contents and repo.access == "gated" and not known:
            why = "you are not in the authorized list" if token else "you must be authenticated to access it"
            raise RefusalError(403 if token else 401, f"Access to model {name} is restricted: {why}", "GatedRepo")
        return repo

    def _revision(self, repo: Repository, revision: str) -> Commit:
        commit = repo.resolve(revision)
        if commit is None:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def _writer(self) -> None:
        if self.request_.token != self.hub.writer:
            raise RefusalError(403 if self.request_.token else 401, "You need write access")

    # Reading

    def resolve(self, repo: str, revision: str, file: str) -> None:
        commit = self._revision(self._repository(repo, contents=True), revision)
        if file not in commit.files:
            raise RefusalError(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit.sha})
        blob = commit.files[file]
        if blob.lfs and self.hub.redirects:
            about = {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size), "X-Repo-Commit": commit.sha}
            location = f"{self.hub.other_url}/{repo}/signed/{commit.sha}/{quote(file)}"
            self._answer({}, 302, {"Location": location, "ETag": f'"{blob.etag}"', **about})
        elif not blob.lfs and self.hub.compresses and "gzip" in (self.headers["Accept-Encoding"] or ""):
            self._compressed(commit, blob)
        else:
            self._contents(commit, blob)

    def signed(self, repo: str, revision: str, file: str) -> None:
        """Send a file from the other host, which knows addresses and no tokens."""
        commit = self.hub.repositories[repo].commits[revision]
        self._contents(commit, commit.files[file])

    def _compressed(self, commit: Commit, blob: Blob) -> None:
        body = gzip.compress(b"".join(blob.blocks()))
        self.request_.status = 200
        self.send_response(200)
        for name, value in (("ETag", f'"{blob.etag}"'), ("X-Repo-Commit", commit.sha), ("Content-Encoding", "gzip")):
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.request_.sent += blob.size
            self.wfile.write(body)

    def _contents(self, commit: Commit, blob: Blob) -> None:
        start, stop = 0, blob.size
        if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.request_.range or ""):
            first, last = asked.groups()
            start = int(first) if first else max(0, blob.size - int(last))
            stop = min(blob.size, int(last) + 1) if first and last else blob.size
            if start >= blob.size:
                raise RefusalError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{blob.size}"})
        self.request_.status = 206 if asked else 200
        self.send_response(self.request_.status)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{blob.etag}"')
        self.send_header("X-Repo-Commit", commit.sha)
        if blob.lfs:
            self.send_header("X-Linked-ETag", f'"{blob.sha256}"')
            self.send_header("X-Linked-Size", str(blob.size))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{blob.size}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if self.command == "GET":
            self._send(blob, start, stop)

    def _send(self, blob: Blob, start: int, stop: int) -> None:
        cut = self.hub._fault("cut", self.request_, start, stop)
        end = max(start, cut.after) if cut else stop
        if pause := self.hub._fault("pause", self.request_, start, end):
            self._write(blob, start, pause.after)
            self.hub.closing.wait(pause.value)
            start = pause.after
        self._write(blob, start, end)
        if cut:
            self.close_connection = True
            if cut.value:  # to linger for no time is to reset
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                time.sleep(0.02)  # a reset that overtakes what was sent would take it away
                self.connection.close()

    def _write(self, blob: Blob, start: int, stop: int) -> None:
        for block in blob.blocks(start, stop):
            # Before it is sent: a client that has it all looks at the log at once.
            self.request_.sent += len(block)
            try:
                self.wfile.write(block)
            except OSError:
                self.request_.sent -= len(block)
                raise

    def info(self, repo: str, revision: str = "main") -> None:
        repository = self._repository(repo)
        commit = repository.resolve(revision)
        if commit is None and repository.commits:
            self._revision(repository, revision)
        files = commit.files.items() if commit else []
        siblings = [{"rfilename": path, **(_blob_info(blob) if "blobs" in self.query else {})} for path, blob in files]
        self._answer(
            {
                "_id": git_oid("repo", repo.encode())[:24],
                "id": repo,
                "modelId": repo,
                "author": repo.partition("/")[0],
                "sha": commit.sha if commit else "0" * 40,
                "lastModified": DATE,
                "createdAt": DATE,
                "private": repository.access == "private",
                "gated": "manual" if repository.access == "gated" else False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": siblings,
            }
        )

    def tree(self, repo: str, revision: str, folder: str = "") -> None:
        commit = self._revision(self._repository(repo), revision)
        prefix = f"{folder}/" if folder else ""
        entries = {path: entry for path, entry in _entries(commit).items() if path.startswith(prefix)}
        if not entries and folder:
            raise RefusalError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        if self.query.get("recursive", [""])[0].lower() != "true":
            entries = {path: entry for path, entry in entries.items() if "/" not in path.removeprefix(prefix)}
        self._answer(list(entries.values()))

    def paths_info(self, repo: str, revision: str) -> None:
        entries = _entries(self._revision(self._repository(repo), revision))
        paths = [path.rstrip("/") for path in parse_qs(self.body.decode()).get("paths", [])]
        self._answer([entries[path] for path in paths if path in entries])

    def refs(self, repo: str) -> None:
        repository = self._repository(repo)

        def listed(kind: str, refs: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in refs.items()]

        answer = {"branches": listed("heads", repository.branches), "tags": listed("tags", repository.tags)}
        self._answer({**answer, "converts": [], "pullRequests": listed("pr", repository.pulls)})

    def history(self, repo: str, revision: str) -> None:
        repository = self._repository(repo)
        commit: Commit | None = self._revision(repository, revision)
        answer = []
        while commit:
            answer.append({"id": commit.sha, "title": commit.title, "message": "", "authors": [], "date": DATE})
            commit = repository.commits.get(commit.parent or "")
        self._answer(answer)

    def auth_check(self, repo: str) -> None:
        self._repository(repo, contents=True)
        self._answer({})

    def whoami(self) -> None:
        if self.request_.token is None:
            raise RefusalError(401, "Invalid username or password.")
        self._answer({"type": "user", "name": "owner", "orgs": [], "auth": {"type": "access_token"}})

    # Writing

    def create(self) -> None:
        self._writer()
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'owner'}/{asked['name']}"
        url = f"{self.hub.url}/{name}"
        with self.hub.lock:
            if name in self.hub.repositories:
                message = "You already created this model repo"
                self._answer({"error": message, "url": url}, 409, {"X-Error-Message": message})
                return
            hidden = asked.get("visibility") == "private" or asked.get("private")
            repository = Repository(name, access="private" if hidden else "public")
            # As on the Hub, where it adds .gitattributes.
            repository.branches["main"] = repository.commit(None, "initial commit", {}).sha
            self.hub.repositories[name] = repository
        self._answer({"url": url, "name": name, "id": git_oid("repo", name.encode())[:24]})

    def validate(self) -> None:
        import yaml

        front = re.match(r"---\n(.*?)\n---", json.loads(self.body)["content"], re.DOTALL)
        try:
            yaml.safe_load(front[1] if front else "")
        except yaml.YAMLError as error:
            self._answer({"errors": [{"message": str(error)}], "warnings": []}, 400)
            return
        # The Hub warns of a README without metadata; so it does here, as the client turns that into a warning.
        empty = [] if front else [{"message": "empty or missing yaml metadata in repo card"}]
        self._answer({"errors": [], "warnings": empty})

    def preupload(self, repo: str, revision: str) -> None:
        repository = self._repository(repo)
        self._writer()
        commit = repository.resolve(revision)
        files = commit.files if commit else {}
        self._answer(
            {
                "files": [
                    {
                        "path": (path := asked["path"]),
                        "uploadMode": "lfs" if is_large(path, asked["size"]) else "regular",
                        "shouldIgnore": False,
                        **({"oid": files[path].etag} if path in files else {}),
                    }
                    for asked in json.loads(self.body)["files"]
                ]
            }
        )

    def batch(self, repo: str) -> None:
        repository = self._repository(repo)
        self._writer()
        objects = json.loads(self.body)["objects"]
        held = {blob.sha256 for commit in repository.commits.values() for blob in commit.files.values() if blob.lfs}
        for wanted in objects:
            if wanted["oid"] not in held:
                wanted["actions"] = {"upload": {"href": f"{self.hub.url}/upload/{repo}/{wanted['oid']}"}}
        self._answer({"transfer": "basic", "objects": objects})

    def upload(self, repo: str, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise RefusalError(400, f"what was uploaded is not {oid}")
        self.hub.uploaded[oid] = self.body
        self._answer({})

    def commit(self, repo: str, revision: str) -> None:
        repository = self._repository(repo)
        self._writer()
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.hub.lock:
            head = repository.resolve(revision)
            if head is None and (repository.commits or revision != "main"):
                self._revision(repository, revision)
            if header.get("parentCommit") not in (None, head and head.sha):
                raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
            changes = self._changes(repository, head.files if head else {}, lines)
            commit = repository.commit(head, header["summary"], changes)
            answer = {"commitUrl": f"{self.hub.url}/{repo}/commit/{commit.sha}", "commitOid": commit.sha}
            if "create_pr" in self.query:
                number = str(len(repository.pulls) + 1)
                repository.pulls[number] = commit.sha
                answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{number}"
            else:
                repository.branches[revision] = commit.sha
        self._answer({"success": True, **answer})

    def _changes(self, repo: Repository, files: Mapping[str, Blob], lines: list[Any]) -> dict[str, Blob | None]:
        held = {blob.sha256: blob for commit in repo.commits.values() for blob in commit.files.values() if blob.lfs}
        changes: dict[str, Blob | None] = {}
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "file":
                changes[value["path"]] = Blob(b64decode(value["content"]), lfs=False)
            elif key == "lfsFile" and value["oid"] in self.hub.uploaded:
                changes[value["path"]] = Blob(self.hub.uploaded[value["oid"]], lfs=True)
            elif key == "lfsFile" and value["oid"] in held:
                changes[value["path"]] = held[value["oid"]]
            elif key == "lfsFile":
                raise RefusalError(400, f"no LFS object {value['oid']} was uploaded")
            elif key == "deletedFile" and value["path"] not in files:
                raise RefusalError(404, "A file with this name doesn't exist", "EntryNotFound")
            elif key == "deletedFile":
                changes[value["path"]] = None
            elif key == "deletedFolder":
                changes |= dict.fromkeys(path for path in files if path.startswith(value["path"].rstrip("/") + "/"))
        return changes

    def create_tag(self, repo: str, revision: str) -> None:
        self._create_ref(self._repository(repo).tags, repo, revision, json.loads(self.body)["tag"])

    def create_branch(self, repo: str, name: str) -> None:
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        self._create_ref(self._repository(repo).branches, repo, start, name)

    def _create_ref(self, refs: dict[str, str], repo: str, revision: str, name: str) -> None:
        self._writer()
        if name in refs:
            raise RefusalError(409, f"{name} exists already")
        refs[name] = self._revision(self._repository(repo), revision).sha
        self._answer({})


def _blob_info(blob: Blob) -> dict[str, Any]:
    lfs = {"lfs": {"sha256": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}} if blob.lfs else {}
    return {"size": blob.size, "blobId": blob.oid, **lfs}


def _entries(commit: Commit) -> dict[str, dict[str, Any]]:
    """Files and folders, as the tree lists them."""
    entries: dict[str, dict[str, Any]] = {}
    for path, blob in commit.files.items():
        lfs = {"lfs": {"oid": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}} if blob.lfs else {}
        entries[path] = {"type": "file", "path": path, "oid": blob.oid, "size": blob.size, **lfs}
        for folder in map(str, list(PurePosixPath(path).parents)[:-1]):
            oid = git_oid("tree", f"{commit.sha}/{folder}".encode())
            entries[folder] = {"type": "directory", "path": folder, "oid": oid, "size": 0}
    return dict(sorted(entries.items()))


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_MODEL = rf"/api/models/{_REPO}"
_REVISION = r"(?P<revision>[^/]+)"
# Matched before they are unquoted: a slash in a revision comes quoted, and so it does in a tree's folder.
ROUTES = [
    (rf"/{_REPO}/resolve/{_REVISION}/(?P<file>.+)", "GET", _Handler.resolve),
    (rf"/{_REPO}/signed/{_REVISION}/(?P<file>.+)", "GET", _Handler.signed),
    (_MODEL, "GET", _Handler.info),
    (rf"{_MODEL}/revision/{_REVISION}", "GET", _Handler.info),
    (rf"{_MODEL}/tree/{_REVISION}(?:/(?P<folder>.+))?", "GET", _Handler.tree),
    (rf"{_MODEL}/paths-info/{_REVISION}", "POST", _Handler.paths_info),
    (rf"{_MODEL}/refs", "GET", _Handler.refs),
    (rf"{_MODEL}/commits/{_REVISION}", "GET", _Handler.history),
    (rf"{_MODEL}/auth-check(?:/write)?", "GET", _Handler.auth_check),
    (rf"{_MODEL}/preupload/{_REVISION}", "POST", _Handler.preupload),
    (rf"{_MODEL}/commit/{_REVISION}", "POST", _Handler.commit),
    (rf"{_MODEL}/tag/{_REVISION}", "POST", _Handler.create_tag),
    (rf"{_MODEL}/branch/(?P<name>[^/]+)", "POST", _Handler.create_branch),
    (rf"/{_REPO}\.git/info/lfs/objects/batch", "POST", _Handler.batch),
    (rf"/upload/{_REPO}/(?P<oid>[0-9a-f]{{64}})", "PUT", _Handler.upload),
    (r"/api/repos/create", "POST", _Handler.create),
    (r"/api/validate-yaml", "POST", _Handler.validate),
    (r"/api/whoami-v2", "GET", _Handler.whoami),
]


@contextlib.contextmanager
def use(
    hub: HubServer,
    cache: Path,
    *,
    token: str | None = None,
    offline: bool = False,
    chunk: int = 1 << 10,
    timeout: float = 10,
) -> Iterator[None]:
    """Point huggingface_hub at a server, in this process and in those it starts, and its caches into a folder.

    Can be nested, as with ``offline=True`` once something is cached.

    Args:
        hub: The server.
        cache: Where its caches go: downloads in ``hub``, assets in ``assets``.
        token: What it finds in the environment; else it finds none.
        offline: Whether it believes to be offline.
        chunk: How many bytes it reads at once. A cut loses what was read of a chunk, and its own are 10 MiB, so that
            with them a file of a test's size would never be resumed.
        timeout: Seconds it waits for an answer to the calls it limits: those for files.
    """
    from huggingface_hub import _tree_cache as tree_cache
    from huggingface_hub import constants, file_download, hf_api, hf_file_system
    from huggingface_hub.utils import _cache_assets, _cache_manager, _http, close_session

    hurried = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: time.sleep(min(seconds, 0.01))})
    downloads, assets = str(cache / "hub"), str(cache / "assets")
    values = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": offline,
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": downloads,
        "HF_ASSETS_CACHE": assets,
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_STORED_TOKENS_PATH": str(cache / "stored_tokens"),
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
        # Uploads go by Xet whenever it is installed, without asking the server; downloads only if it offers it.
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,  # with it, each call names the agent it runs under, having asked for a list
        "HF_HUB_ETAG_TIMEOUT": timeout,
        "HF_HUB_DOWNLOAD_TIMEOUT": timeout,
        "DOWNLOAD_CHUNK_SIZE": chunk,
    }
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": downloads,
        "HF_ASSETS_CACHE": assets,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **{name: ",".join(filter(None, ["127.0.0.1", os.environ.get(name)])) for name in ("NO_PROXY", "no_proxy")},
        **({"HF_TOKEN": token} if token else {}),
    }
    unset = {"HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE", "TRANSFORMERS_OFFLINE"}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # Their plain LFS upload calls their HTTP client in a way it has deprecated.
        warnings.filterwarnings("ignore", "Use 'content=<...>'", DeprecationWarning)
        for name, value in values.items():
            patch.setattr(constants, name, value)
        for name in unset - set(environment):
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        # What was copied when the modules were imported, by modules and by the instances they keep.
        patch.setattr(_cache_assets, "HF_ASSETS_CACHE", assets)
        patch.setattr(_cache_manager, "HF_HUB_CACHE", downloads)
        patch.setattr(hf_api.api, "endpoint", hub.url)
        patch.setattr(hf_file_system.hffs, "endpoint", hub.url)
        patch.setattr(hf_file_system.hffs._api, "endpoint", hub.url)
        patch.setattr(hf_file_system.hffs, "dircache", {})
        patch.setattr(hf_file_system.hffs, "_repo_and_revision_exists_cache", {})
        patch.setattr(hf_file_system.HfFileSystem, "_cache", {})
        patch.setattr(tree_cache, "_IN_MEMORY_TREE_CACHE", {})
        patch.setattr(file_download, "time", hurried)
        patch.setattr(file_download, "_ETAG_RETRY_TIMEOUT", timeout)
        patch.setattr(_http, "time", hurried)
        close_session()  # one made before knows other proxies, and one left open would warn
        try:
            yield
        finally:
            close_session()
