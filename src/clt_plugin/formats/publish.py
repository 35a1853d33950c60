"""Publishing a crosscoder on the Hub, with a card that says what it is and how to load it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from clt_plugin.core import SERVICES, Crosscoder, HubError
from clt_plugin.formats._files import plain
from clt_plugin.formats.inspection import facts
from clt_plugin.hub import Reference, explained

CARD, LIBRARY = "README.md", "library_name: clt_plugin"
OURS = {
    "config.json": r"group_\d+\.safetensors|shared\.safetensors",
    "config.yaml": r"W_(enc|dec)_\d+\.safetensors|W_dec_norm\.safetensors",
}
"""The config and the shards of the formats that are written."""


def push_to_hub(
    crosscoder: Crosscoder,
    repo: str,
    *,
    folder: str | None = None,
    format: str = "native",
    private: bool | None = None,
    licence: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    revision: str | None = None,
    message: str | None = None,
    card: bool | None = None,
    token: str | None = None,
) -> str:
    """Publish a crosscoder, in one commit: what an earlier one left in the folder is deleted by the same.

    Args:
        crosscoder: What to publish.
        repo: ``owner/name``; made if missing.
        folder: A folder inside it; by default its root.
        format: ``"native"``, or ``"circuit-tracer"`` for what that format can hold.
        private: Whether a repository that is made is private; with True, one that is there and public is refused.
        licence: An identifier of the Hub's, such as ``"mit"``.
        recipe: How it was trained; goes into the card, and is saved with it.
        metrics: How good it is, such as ``{"fvu": 0.06, "l0": 23.5}``; goes into the card, and is saved with it.
        revision: A branch, made if missing; the default one otherwise.
        message: The commit's message.
        card: Whether to write the card, ``README.md``; by default unless one is there that someone else wrote.
        token: A token that may write; None for the stored one.

    Returns:
        A reference to it at its commit.

    Raises:
        HubError: The Hub refuses; nothing is published then. What was saved aside is removed in any case.
        ValueError: The recipe or metrics hold something else than numbers and text.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    reference = Reference(repo, folder.strip("/") if folder else None, revision)
    more = {"recipe": recipe, "metrics": metrics, "licence": licence}
    held = crosscoder.metadata
    metadata = plain({**held, **{key: value for key, value in more.items() if value}}, "metadata")
    # Where it came from, if that can be looked up by others: a folder of this machine's is nobody else's business.
    metadata["source"] = [place for place in metadata.get("source") or [] if str(place).startswith("hf://")]
    metadata = {key: value for key, value in metadata.items() if value}
    for heading in ("metrics", "recipe"):
        if not isinstance(metadata.get(heading, {}), Mapping):
            raise ValueError(f"metadata[{heading!r}] is no mapping: give one, such as {{'fvu': 0.06}}")
    api = HfApi(token=token, library_name="clt_plugin")
    with tempfile.TemporaryDirectory() as aside, explained(repo, revision or "main"):
        _check_private(api, repo, private)
        crosscoder.metadata = metadata
        try:
            crosscoder.save(Path(aside) / "crosscoder", format=format)
            text = model_card(crosscoder, reference)
        finally:
            crosscoder.metadata = held
        (Path(aside) / "crosscoder" / CARD).write_text(text, encoding="utf-8")
        api.create_repo(repo, private=private, exist_ok=True)
        head = _head(api, repo, revision)
        there = PurePosixPath(reference.folder or "")
        listed = [PurePosixPath(path) for path in api.list_repo_files(repo, revision=head)]
        before = [path.name for path in listed if path.parent == there]
        written = {path.name: path for path in (Path(aside) / "crosscoder").iterdir()}
        if card is False or (card is None and CARD in before and not _is_ours(api, repo, there / CARD, head, aside)):
            del written[CARD]
        commit = api.create_commit(
            repo,
            [
                *(CommitOperationDelete(str(there / name)) for name in _stale(before) if name not in written),
                *(CommitOperationAdd(str(there / name), path) for name, path in sorted(written.items())),
            ],
            revision=revision,
            parent_commit=head,
            commit_message=message or f"Add {crosscoder.wiring.name}",
        )
    return str(Reference(repo, reference.folder, commit.oid))


def _check_private(api: Any, repo: str, private: bool | None) -> None:
    """Refuse to publish in public what was meant to be private."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        is_public = private and not api.model_info(repo).private
    except RepositoryNotFoundError:
        return
    if is_public:
        raise HubError(f"{repo} is there and public: make it private in its settings, or choose another name")


def _head(api: Any, repo: str, revision: str | None) -> str:
    """Return the commit that a branch is at; one that is missing is made."""
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return api.model_info(repo, revision=revision).sha
    except RevisionNotFoundError:
        api.create_branch(repo, branch=revision)
        return api.model_info(repo, revision=revision).sha


def _stale(names: Iterable[str]) -> list[str]:
    """Return the files of crosscoders that were published before, of either format."""
    stale = []
    for config, shards in OURS.items():
        found = [name for name in names if re.fullmatch(shards, name)]
        stale += [*found, *(name for name in names if found and name == config)]
    return stale


def _is_ours(api: Any, repo: str, path: PurePosixPath, commit: str, aside: str) -> bool:
    """Whether a card is one that was written here, or says nothing yet."""
    before = api.hf_hub_download(repo, str(path), revision=commit, local_dir=Path(aside) / "before")
    text = Path(before).read_text(encoding="utf-8")
    return LIBRARY in text or not re.sub(r"\A---\n.*?^---$", "", text, flags=re.DOTALL | re.MULTILINE).strip()


def model_card(crosscoder: Crosscoder, reference: Reference) -> str:
    """Return a model card in Markdown: what it is, its wiring, recipe and metrics, how to load it."""
    from huggingface_hub import ModelCardData

    metadata, host = crosscoder.metadata, crosscoder.host
    kind = "cross-layer transcoder" if crosscoder.wiring.writes_mlps_only else "crosscoder"
    front = ModelCardData(
        library_name="clt_plugin",
        license=metadata.get("licence"),
        base_model=host.model_name,
        tags=[kind.replace(" ", "-"), "mechanistic-interpretability", "crosscoder"],
    )
    sections = [
        f"---\n{front.to_yaml()}\n---\n",
        f"# {reference.repo.partition('/')[2]}\n",
        f"A {kind} for {host.model_name or 'a model that it does not name'}.\n",
        _table(facts(crosscoder)),
        f"```text\n{crosscoder.wiring.draw()}\n```\n",
        "## How to load it\n",
        f'```python\nimport clt_plugin as cp\n\nclt = cp.load("{reference}")\n```\n',
        f'In a model that you have, in nnsight or TransformerLens: `model.add_clt("{reference}")`.\n',
    ]
    for heading in ("metrics", "recipe"):
        if metadata.get(heading):
            sections += [f"## {heading.capitalize()}\n", _table(metadata[heading])]
    return "\n".join(sections)


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {key} | {f'{value:.4g}' if isinstance(value, float) else value} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines, ""])


SERVICES.add("push_to_hub", push_to_hub)
