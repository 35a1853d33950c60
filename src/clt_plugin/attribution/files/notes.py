"""Labels and groups that people saved from a graph's page, and how they come back into the graph."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from clt_plugin.attribution.graph import Graph, GraphError


def with_notes(graph: Graph, notes: str | PathLike[str] | Mapping[str, Any]) -> Graph:
    """Return a graph with the labels and supernodes that were saved from its page.

    Args:
        graph: The one that the page was made of.
        notes: The saved file or its content, ``{"labels": {id: text}, "supernodes": {name: ids}}``; or a plain
            ``{id: text}``. What it names replaces what the graph has; an empty text takes a label away, an empty list a
            supernode. What it does not name stays, but a node is in one supernode: the one that the notes name.

    Raises:
        GraphError: Where it is not such a file, or names nodes that the graph lacks.
    """
    labels, groups = _read(notes)
    known = set(graph.nodes["id"])
    missing = [node for node in [*labels, *(n for members in groups.values() for n in members)] if node not in known]
    if missing:
        raise GraphError(
            f"the notes speak of {missing[0]!r}, which this graph lacks: "
            "give them to the graph that the page was made of"
        )
    graph = graph.with_labels(labels)
    moved = {node for members in groups.values() for node in members}
    for name, members in graph.supernodes.items():
        left = tuple(node for node in members if node not in moved)
        if name in groups or not left:
            graph = graph.without_supernode(name)
        elif len(left) < len(members):
            graph = graph.with_supernode(name, left)
    for name, wanted in groups.items():
        graph = graph.with_supernode(name, wanted) if wanted else graph
    return graph


def _read(notes: str | PathLike[str] | Mapping[str, Any]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return labels and supernodes, after a look at their form."""
    data: Any = notes
    if not isinstance(notes, Mapping):
        try:
            data = json.loads(Path(notes).read_text(encoding="utf-8"))
        except ValueError as error:
            raise GraphError(
                f"{Path(notes).name} is not JSON ({error}): save the labels from the page again"
            ) from error
    if not isinstance(data, Mapping):
        raise GraphError("the notes hold no labels: an object such as {id: text} was expected")
    whole = isinstance(data.get("labels"), Mapping)
    labels, groups = (data["labels"], data.get("supernodes", {})) if whole else (data, {})
    if not all(isinstance(text, str) for text in labels.values()):
        raise GraphError("the notes hold no labels: a text for each id was expected")
    if not isinstance(groups, Mapping) or not all(isinstance(members, list | tuple) for members in groups.values()):
        raise GraphError("the notes hold no supernodes: a list of ids for each name was expected")
    return dict(labels), {name: list(members) for name, members in groups.items()}
