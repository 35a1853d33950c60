"""Publishing a crosscoder on the Hub, with a card that says what it is and how to load it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clt_plugin.core import SERVICES, Crosscoder
from clt_plugin.formats.inspection import facts
from clt_plugin.hub import Reference, explained


def push_to_hub(
    crosscoder: Crosscoder,
    repo: str,
    *,
    folder: str | None = None,
    format: str = "native",
    private: bool | None = None,
    licence: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
) -> str:
    """Publish a crosscoder.

    Args:
        crosscoder: What to publish.
        repo: ``owner/name``; made if missing.
        folder: A folder inside it; by default its root.
        format: ``"native"``, or ``"circuit-tracer"`` for what that format can hold.
        private: Whether a repository that is made is private.
        licence: An identifier of the Hub's, such as ``"mit"``.
        recipe: How it was trained; goes into the card, and is saved with it.
        metrics: How good it is, such as ``{"fvu": 0.06, "l0": 23.5}``; goes into the card, and is saved with it.
        revision: A branch; the default one otherwise.
        message: The commit's message.
        token: A token that may write; None for the stored one.

    Returns:
        A reference to it at its commit.

    Raises:
        HubError: The Hub refuses; nothing is published then. What was saved aside is removed in any case.
    """
    from huggingface_hub import HfApi

    more = {"recipe": recipe, "metrics": metrics, "licence": licence}
    held = crosscoder.metadata
    api = HfApi(token=token, library_name="clt_plugin")
    with tempfile.TemporaryDirectory() as aside, explained(repo, revision or "main"):
        crosscoder.metadata = held | {key: value for key, value in more.items() if value}
        try:
            crosscoder.save(Path(aside) / "crosscoder", format=format)
            card = model_card(crosscoder, Reference(repo, folder))
        finally:
            crosscoder.metadata = held
        (Path(aside) / "crosscoder" / "README.md").write_text(card, encoding="utf-8")
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=Path(aside) / "crosscoder",
            path_in_repo=folder,
            revision=revision,
            commit_message=message or f"Add {crosscoder.wiring.name}",
        )
    return str(Reference(repo, folder, commit.oid))


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
