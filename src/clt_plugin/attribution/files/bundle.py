"""A graph with all that people want of it, in one folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

from clt_plugin.attribution.files.export import pruned_for_view, to_json
from clt_plugin.attribution.graph import Graph
from clt_plugin.core.aside import written_aside


def write(
    graph: Graph,
    folder: str | PathLike[str],
    name: str = "graph",
    *,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
    source_set: str | None = None,
    feature_info: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Path]:
    """Write a graph whole, as Neuronpedia's JSON, as a page, and its scores.

    Args:
        graph: To write.
        folder: Made if it is not there; files of these names are replaced.
        name: Of ``{name}.safetensors`` (the whole graph), ``{name}.json`` and ``{name}.html`` (pruned) and
            ``{name}-scores.json``.
        node_threshold: Of pruning, for the JSON and the page.
        edge_threshold: Of pruning, likewise.
        source_set: The set of dashboards on Neuronpedia, such as ``clt-hp``.
        feature_info: What the page shows of features, see `Graph.to_html`.

    Returns:
        The files, in that order.
    """
    from clt_plugin.report.graph_page import write_page

    place = Path(folder)
    whole, scores = place / f"{name}.safetensors", place / f"{name}-scores.json"
    thresholds: dict[str, Any] = {"node_threshold": node_threshold, "edge_threshold": edge_threshold}
    pruned = pruned_for_view(graph, **thresholds)
    graph.save(whole)
    # Given the whole graph, which they prune, so that the scores they show are the whole's.
    written = to_json(graph, place / f"{name}.json", source_set=source_set, **thresholds)
    page = write_page(graph, place / f"{name}.html", source_set=source_set, feature_info=feature_info, **thresholds)
    found = {
        "prompt": graph.info.prompt,
        "scores": asdict(graph.scores()),
        "certificate": {"holds": graph.certificate.holds, **graph.certificate.to_dict()},
        "nodes": {"whole": len(graph), "pruned": len(pruned)},
        "pruning": dict(pruned.info.pruning),
    }
    with written_aside(scores) as aside:
        aside.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return [whole, written, page, scores]
