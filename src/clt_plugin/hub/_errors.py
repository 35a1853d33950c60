"""What the Hub's errors mean, and what to do next."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable, Iterator

from clt_plugin.core import HubError

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


def is_commit(revision: str) -> bool:
    """Whether a revision is a whole commit, and not a branch or tag."""
    return len(revision) == 40 and all(digit in "0123456789abcdef" for digit in revision)


def _explanation(error: Exception, repo: str, revision: str, paths: list[str]) -> str | None:
    """Say what an error of huggingface_hub means and what to do next; None for one that is not about the Hub."""
    from huggingface_hub import errors

    where = f"{repo}@{revision[:7] if is_commit(revision) else revision}"
    what = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    if isinstance(error, errors.GatedRepoError):  # a kind of RepositoryNotFoundError
        return f"{repo} is gated: accept its terms at https://huggingface.co/{repo}, then {TOKEN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no repository {repo} on the Hub, or it is private: check the name, or {TOKEN}"
    if isinstance(error, errors.RevisionNotFoundError):
        branch, _, folder = revision.partition("/")
        hint = f"; a folder comes before the revision, hf://{repo}/{folder}@{branch}" if folder else ""
        return f"{repo} has no revision {revision}: its page lists the branches, tags and commits{hint}"
    if is_offline(error):
        return (
            f"{where}: {what or 'it'} is not in the cache, and HF_HUB_OFFLINE is set: unset it, or fetch it where "
            "there is a connection"
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"{where} has no {what or 'such entry'}"
    if isinstance(error, errors.HfHubHTTPError):
        if error.response.status_code in (401, 403):
            return (
                f"{where}: the Hub refuses ({_line(error)}): the token may have expired, or may not do this: "
                f"{TOKEN} that may"
            )
        return f"{where}: the Hub answered with an error ({_line(error)}): try again later"
    if is_connection_error(error):
        return f"{where}: the connection failed ({_line(error)}): run it again, the files that have come are kept"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{where}: the disk is full while fetching {what}: make room and run it again"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where}: {what or 'it'} cannot be kept ({_line(error)}): set HF_HOME to a folder that can be written"
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
