r"""Graphs as JSON for other viewers: Neuronpedia's schema, and the folder that circuit-tracer's viewer serves.

How a graph is carried (`GRAPH_SCHEMA` is the schema):

- A node keeps its id. That of an error is ``{layer}_-1_{position}``: the older ``0_{layer}_{position}`` is also the id
  of a feature in layer 0. Nodes without a link are left out, embeddings and targets excepted.
- ``feature`` is Cantor's pairing of layer and latent, from which the viewers get both back. -1 stands for errors, as
  the viewers expect, the position for embeddings, the token for logits.
- ``influence`` is the *cumulative* influence at which a node is kept, which is what the viewers' sliders compare.
- ``clerp`` is the label that people gave. That of a feature without one is empty, so that Neuronpedia shows its own.
- **Targets that are no logits** (a difference, a direction, a feature) are carried as nodes of the type ``logit`` at
  the top, the only targets the viewers know: their clerp has the form ``Output "label" (p=share)``, their ``feature``
  counts down from -2, and ``token_prob`` is their share in influence.
- **The bias node** is left out unless it is asked for: the schema has no type for it, and it stands outside influence.
  Asked for, it is a node of the type ``bias`` among the embeddings, at the first position, with its edges.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clt_plugin.attribution.files.schema import BIAS, EMBEDDING, ERROR, FEATURE, LOGIT
from clt_plugin.attribution.graph import Graph, GraphError
from clt_plugin.attribution.scores import cumulative_share, influence
from clt_plugin.core.aside import written_aside

INDEX = "graph-metadata.json"
"""The file in which circuit-tracer's viewer finds the graphs of a folder."""

_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def to_json(
    graph: Graph,
    path: str | PathLike[str],
    slug: str | None = None,
    scan: str | None = None,
    source_set: str | None = None,
    node_threshold: float | None = 0.8,
    edge_threshold: float | None = 0.98,
    **options: Any,
) -> Path:
    """Write a graph as Neuronpedia's JSON, which can be uploaded there.

    Args:
        graph: To write.
        path: Of the file, which is replaced if it is there.
        slug: The graph's name; by default made of the prompt.
        scan: The model, as Neuronpedia names it, such as ``gemma-2-2b``; by default made of the model's name.
        source_set: The set of dashboards on Neuronpedia, such as ``clt-hp``.
        node_threshold: To which the graph is pruned first, see `prune`. A graph that is pruned already is taken as it
            is, and so is any where both thresholds are None.
        edge_threshold: Likewise.
        **options: As in `graph_data`: ``pinned``, ``bias``, ``feature_url``.

    Returns:
        The path.

    Raises:
        GraphError: Where the slug is none, a pinned node is unknown, or a number is not finite.
    """
    data = graph_data(graph, slug, scan, source_set, node_threshold, edge_threshold, **options)
    return _write(Path(path), data)


def to_viewer(
    graph: Graph,
    folder: str | PathLike[str],
    slug: str | None = None,
    scan: str | None = None,
    source_set: str | None = None,
    node_threshold: float | None = 0.8,
    edge_threshold: float | None = 0.98,
    **options: Any,
) -> Path:
    """Write a graph into a folder for circuit-tracer's viewer.

    The folder is flat, as that tool's server wants it: ``{slug}.json`` and the index ``graph-metadata.json``, to which
    the graph is added (one of the same slug is replaced). The server gives it out under ``data/`` and ``graph_data/``
    both: ``circuit-tracer start-server --graph_file_dir FOLDER``.

    Args:
        graph: To write.
        folder: Made if it is not there.
        slug: As in `to_json`, and so are the others.
        scan: The model; the viewer also looks there for features' examples, and shows none where it has none.
        source_set: On Neuronpedia.
        node_threshold: As in `to_json`.
        edge_threshold: As in `to_json`.
        **options: As in `graph_data`.

    Returns:
        The path of the graph's file.

    Raises:
        GraphError: As in `to_json`, and where the folder's index is not one.
    """
    data = graph_data(graph, slug, scan, source_set, node_threshold, edge_threshold, **options)
    metadata = data["metadata"]
    index = Path(folder) / INDEX
    others = [entry for entry in _index(index) if entry.get("slug") != metadata["slug"]]
    written = _write(Path(folder) / f"{metadata['slug']}.json", data)
    _write(index, {"graphs": [*others, metadata]})
    return written


def graph_data(
    graph: Graph,
    slug: str | None = None,
    scan: str | None = None,
    source_set: str | None = None,
    node_threshold: float | None = 0.8,
    edge_threshold: float | None = 0.98,
    *,
    pinned: Iterable[str] = (),
    bias: bool = False,
    feature_url: str | None = None,
) -> dict[str, Any]:
    """Return what `to_json` writes, as plain data.

    Args:
        graph: To write.
        slug: As in `to_json`, and so are the next four.
        scan: The model.
        source_set: On Neuronpedia.
        node_threshold: Of pruning.
        edge_threshold: Of pruning.
        pinned: Ids of the nodes that the viewer shows in its subgraph; members of supernodes always are.
        bias: Whether the bias node and its edges are written too.
        feature_url: Where the viewer finds features' own pages as JSON, ``{feature_url}/{feature}.json``.
    """
    pinned = list(pinned)
    for name in pinned:
        graph.index(name)
    pruned = pruned_for_view(graph, node_threshold, edge_threshold)
    weights = pruned.adjacency.detach().cpu().double()
    if not bias:
        weights = weights.masked_fill(pruned.of_kind("bias"), 0.0)
    kept = weights.ne(0).any(0) | weights.ne(0).any(1) | pruned.of_kind("embedding", "target")
    nodes = _nodes(pruned, kept)
    return {
        "metadata": _metadata(pruned, slug, scan, source_set, feature_url),
        "qParams": _view(pruned, [node["node_id"] for node in nodes], pinned),
        "nodes": nodes,
        "links": links(pruned, weights),
    }


def pruned_for_view(graph: Graph, node_threshold: float | None, edge_threshold: float | None) -> Graph:
    """Return a graph pruned to be looked at, with the columns of influence; one pruned already is returned as it is.

    Args:
        graph: To prune.
        node_threshold: As in `prune`; None stands for 1, but where both are None nothing is pruned at all.
        edge_threshold: As in `prune`; likewise.

    Raises:
        GraphError: Where an edge is not finite.
    """
    if not bool(graph.adjacency.isfinite().all()):
        raise GraphError("an edge is not finite, and can be neither written nor drawn: look at the graph's certificate")
    if graph.info.pruning and "cumulative_influence" in graph.nodes.columns:
        return graph
    if node_threshold is None and edge_threshold is None:
        found = influence(graph)
        columns = {"influence": found.numpy(), "cumulative_influence": cumulative_share(found).numpy()}
        return replace(graph, nodes=graph.nodes.assign(**columns))
    return graph.prune(
        node_threshold=1.0 if node_threshold is None else node_threshold,
        edge_threshold=1.0 if edge_threshold is None else edge_threshold,
    )


def links(graph: Graph, weights: Tensor) -> list[dict[str, Any]]:
    """Return the edges that are not 0 as the schema's links, by target and source.

    Args:
        graph: Whose nodes they join.
        weights: (N, N), row = target, column = source.
    """
    ids = graph.nodes["id"].tolist()
    targets, sources = weights.nonzero(as_tuple=True)
    values = weights[targets, sources].tolist()
    return [
        {"source": ids[source], "target": ids[target], "weight": value}
        for target, source, value in zip(targets.tolist(), sources.tolist(), values, strict=True)
    ]


def cantor(layer: int, latent: int) -> int:
    """Return Cantor's pairing of a layer and a latent: one number from which both can be had back."""
    return (layer + latent) * (layer + latent + 1) // 2 + latent


def shown(token: str) -> str:
    """Return a token with its white space in sight, as circuit-tracer writes it."""
    return token.replace("\n", "⏎").replace("\t", "→").replace("\r", "↵")


# ---------------------------------------------------------------- nodes


def _nodes(graph: Graph, kept: Tensor) -> list[dict[str, Any]]:
    """Return the schema's nodes, in the order of the graph."""
    n_others = 0
    nodes = []
    rows: list[Any] = graph.nodes.to_dict("records")
    first = int(torch.argmax(graph.of_kind("target").int()))
    for place, row in enumerate(rows):
        if not kept[place]:
            continue
        label = graph.labels.get(row["id"], "")
        node = {
            "node_id": row["id"],
            "layer": str(row["layer"]),
            "ctx_idx": int(row["position"]),
            "influence": _number(row["cumulative_influence"]),
            "run_idx": 0,
            "reverse_ctx_idx": 0,
            "is_target_logit": place == first,
            "token_prob": 0.0,
            "clerp": label,
        }
        if row["kind"] == "target":
            of_token = not str(row["id"]).startswith("target_")
            n_others += not of_token
            node |= _target(graph, row, label, 0 if of_token else n_others)
        else:
            node |= _inner(row, label)
        nodes.append(node)
    return nodes


def _inner(row: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Return what is particular to a node that is no target."""
    layer, position, latent = int(row["layer"]), int(row["position"]), int(row["feature"])
    if row["kind"] == "feature":
        return {
            "feature": cantor(layer, latent),
            "feature_type": FEATURE,
            "jsNodeId": f"{row['group']}_{latent}-0",
            "activation": _number(row["activation"]),
        }
    if row["kind"] == "error":
        clerp = label or f'Error of layer {layer} at "{shown(row["token"])}"'
        return {"feature": -1, "feature_type": ERROR, "jsNodeId": f"{layer}_-1-{position}", "clerp": clerp}
    if row["kind"] == "embedding":
        return {
            "feature": position,
            "feature_type": EMBEDDING,
            "layer": "E",
            "jsNodeId": f"E_{row['token_id']}-{position}",
            "clerp": label or f'Embedding of "{shown(row["token"])}"',
        }
    return {
        "feature": None,
        "feature_type": BIAS,
        "layer": "E",
        "ctx_idx": 0,
        "jsNodeId": "bias",
        "influence": 0.0,
        "clerp": label or "Biases",
    }


def _target(graph: Graph, row: Mapping[str, Any], label: str, number: int) -> dict[str, Any]:
    """Return what is particular to a target; `number` counts those that are no logits, and is 0 for a logit."""
    share = float(row["weight"])
    of_token = number == 0
    name = shown(row["token"]) if of_token else shown(label or graph.label(row["id"]))
    marked = f'Output "{name}" (p={share:.3f})'
    return {
        "feature": int(row["token_id"]) if of_token else -1 - number,
        "feature_type": LOGIT,
        "layer": str(graph.info.n_layers + 1),
        "ctx_idx": int(row["position"]) % max(len(graph.info.tokens), 1),
        "jsNodeId": f"L_{row['token_id']}-{row['position']}" if of_token else row["id"],
        "token_prob": share,
        "clerp": f"{marked} {label}" if of_token and label else marked,
        "influence": None,
    }


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


# ---------------------------------------------------------------- about the graph


def _metadata(
    graph: Graph, slug: str | None, scan: str | None, source_set: str | None, feature_url: str | None
) -> dict[str, Any]:
    """Return the schema's metadata: where the graph comes from, and what was checked of it."""
    info = graph.info
    slug = slug if slug is not None else slug_of(info.prompt)
    if not _SLUG.fullmatch(slug):
        raise GraphError(f"{slug!r} is no slug, which names files and addresses: use letters, digits, '-', '_' and '.'")
    details = {"neuronpedia_source_set": source_set, "feature_json_base_url": feature_url}
    details = {name: value for name, value in details.items() if value is not None}
    pruning = {name: float(info.pruning[name]) for name in ("node_threshold", "edge_threshold") if name in info.pruning}
    metadata = {
        "slug": slug,
        "scan": scan or model_slug(info.model_name),
        "prompt_tokens": [shown(token) for token in info.tokens],
        "prompt": info.prompt,
        "schema_version": 1,
        "transcoder_list": [],
        "info": {
            "description": f"{info.crosscoder}: {graph.certificate}" if info.crosscoder else str(graph.certificate),
            "source_urls": [info.source] if info.source else [],
            "generator": {"name": "clt_plugin", "version": version("clt-plugin")},
            "create_time_ms": int(time.time() * 1000),
        },
        "generation_settings": {
            **{name: value for name, value in info.settings.items() if value is not None},
            "certificate": graph.certificate.to_dict(),
        },
        "pruning_settings": {**info.pruning, **pruning},
    }
    if "node_threshold" in pruning:
        metadata["node_threshold"] = pruning["node_threshold"]
    return {**metadata, "feature_details": details} if details else metadata


def model_slug(name: str) -> str:
    """Return what Neuronpedia calls a model as a rule: the last part of its name, in small letters."""
    return name.rsplit("/", 1)[-1].lower() or "model"


def slug_of(prompt: str) -> str:
    """Return a name made of a prompt's letters and digits, such as ``the-capital-of-texas-is``."""
    words = re.findall(r"[a-z0-9]+", prompt.lower())
    return "-".join(words)[:60].rstrip("-") or "graph"


def _view(graph: Graph, ids: list[str], pinned: Iterable[str]) -> dict[str, Any]:
    """Return the schema's saved view: what is pinned and grouped, of the nodes that are written."""
    there = set(ids)
    groups = [[name, *(node for node in members if node in there)] for name, members in graph.supernodes.items()]
    groups = [group for group in groups if len(group) > 1]
    together = [*pinned, *(node for _, *members in groups for node in members)]
    return {
        "pinnedIds": [node for node in dict.fromkeys(together) if node in there],
        "supernodes": groups,
        "linkType": "both",
        "clickedId": "",
        "sg_pos": "",
    }


# ---------------------------------------------------------------- files


def _write(path: Path, data: Mapping[str, Any]) -> Path:
    try:
        text = json.dumps(data, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise GraphError(f"{path.name} cannot be written as JSON ({error}): look at the graph's info") from error
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")
    return path


def _index(path: Path) -> list[dict[str, Any]]:
    """Return the graphs that a viewer's folder has already."""
    if not path.exists():
        return []
    try:
        graphs = json.loads(path.read_text(encoding="utf-8"))["graphs"]
        if not all(isinstance(entry, dict) for entry in graphs):
            raise TypeError("its entries are not objects")
    except (ValueError, KeyError, TypeError) as error:
        raise GraphError(f"{path} is not an index of graphs ({error}): move it away, or write elsewhere") from error
    return list(graphs)
