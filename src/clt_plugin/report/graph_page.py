"""A graph as one page of HTML that opens from disk: no server, no network, no files beside it.

The page's own code lies in ``assets/``; Plotly's, which draws, is written into each page from the installed package. A
policy in the page forbids every request and every script but these two. Prompts, tokens and labels are data: they are
written so that no browser takes them for markup, and the page's code shows them as text.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from clt_plugin.attribution.files.export import model_slug, pruned_for_view, shown
from clt_plugin.attribution.graph import Graph, GraphError
from clt_plugin.attribution.scores import edge_scores
from clt_plugin.core.aside import written_aside

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("graph_model.js", "graph_drawing.js", "graph_panel.js", "graph_page.js")
"""The page's code, in the order in which it is written into one function."""

_DIGITS = 7
"""Significant digits of numbers in the page, which shows three."""


def write_page(
    graph: Graph,
    path: str | PathLike[str],
    *,
    feature_info: Mapping[str, Mapping[str, Any]] | None = None,
    source_set: str | None = None,
    neuronpedia_model: str | None = None,
    max_nodes: int = 1000,
    max_edges: int = 50_000,
    node_threshold: float | None = 0.8,
    edge_threshold: float | None = 0.98,
    pinned: Iterable[str] = (),
    title: str | None = None,
) -> Path:
    """Write a graph as one self-contained HTML page.

    It shows features by layer and position, embeddings below, targets above, errors as small diamonds. In it one can
    follow edges, move the threshold of influence, search, pin, group, label, and save labels and groups as JSON, which
    `with_notes` reads back. The page says what of the graph it leaves out.

    Args:
        graph: To show; one that is not pruned yet is pruned first.
        path: Of the page, which is replaced if it is there.
        feature_info: What is known of features: ``{id or "{group}_{latent}": {"top_tokens": [...], "examples":
            [...]}}``. A token is a text, or a pair of text and number; an example is a text, or a mapping with
            ``tokens`` and ``activations`` of one length.
        source_set: The set of dashboards on Neuronpedia, such as ``clt-hp``: features then link to theirs.
        neuronpedia_model: The model's name there; by default made of the model's name.
        max_nodes: At most so many nodes are in the page, those of most influence; embeddings, targets and pinned nodes
            come first, and all of them are.
        max_edges: At most so many edges are, those with the largest scores, as in pruning.
        node_threshold: Of pruning, see `prune`. A graph that is pruned already is taken as it is, and so is any where
            both thresholds are None.
        edge_threshold: Of pruning, likewise.
        pinned: Ids of nodes that are pinned from the start, unless they are pruned away.
        title: Of the page; by default the prompt.

    Returns:
        The path.

    Raises:
        GraphError: Where a pinned node is unknown, an edge is not finite, or `feature_info` is of another form.
    """
    from plotly.offline import get_plotlyjs

    pins = list(dict.fromkeys(graph.ids([name])[0] for name in pinned))
    view = _view(graph, pruned_for_view(graph, node_threshold, edge_threshold), pins, max_nodes, max_edges)
    data = page_data(graph, view, pins, feature_info or {})
    if source_set is not None:
        model = quote(neuronpedia_model or model_slug(graph.info.model_name), safe="")
        before, after = f"https://www.neuronpedia.org/{model}/", f"-{quote(source_set, safe='')}/"
        data["neuronpedia"] = {"before": before, "after": after}
    text = _page(data, title or graph.info.prompt or "Attribution graph", get_plotlyjs())
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")
    return Path(path)


# ---------------------------------------------------------------- what is in the page


def _view(graph: Graph, pruned: Graph, pins: list[str], max_nodes: int, max_edges: int) -> Graph:
    """Return the part of a pruned graph that the page holds; the bias and nodes without edges are not drawn."""
    weights = pruned.adjacency.detach()
    inner = ~pruned.of_kind("bias")
    joined = weights[:, inner.to(weights.device)].ne(0).any(1) | weights.ne(0).any(0)
    always = pruned.of_kind("embedding", "target") | torch.from_numpy(pruned.nodes["id"].isin(pins).to_numpy().copy())
    rest = (joined.cpu() & inner & ~always).nonzero()[:, 0]
    influence = torch.from_numpy(pruned.nodes["influence"].to_numpy().copy())
    order = influence[rest].argsort(descending=True, stable=True)
    chosen = always.index_fill(0, rest[order[: max(0, max_nodes - int(always.sum()))]], True)
    # The bias stays as a source, so that the page can say what it gives; it is no node there.
    view = pruned.select(chosen | pruned.of_kind("bias"))
    return view.select_edges(_strongest(view, max_edges).to(view.adjacency.device))


def _inputs(graph: Graph, view: Graph) -> Tensor:
    """Return the absolute sum of all edges into each of the view's nodes, in the graph it was taken from: (n,)."""
    places = torch.tensor([graph.index(name) for name in view.nodes["id"]])
    rows = graph.adjacency.detach()[places.to(graph.adjacency.device)]
    return rows.abs().sum(1, dtype=torch.float64).cpu()


def _strongest(view: Graph, max_edges: int) -> Tensor:
    """Return which edges have the largest scores, as in pruning, a mask; the bias's edges are always in it."""
    scores = edge_scores(view)
    found = scores[scores > 0]
    if len(found) <= max_edges:
        return torch.ones_like(scores, dtype=torch.bool)
    least = found.topk(max_edges).values[-1] if max_edges else math.inf
    return (scores >= least) | view.of_kind("bias")


def page_data(
    graph: Graph, view: Graph, pinned: Iterable[str] = (), feature_info: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Return what the page's code reads, as plain data.

    Args:
        graph: As it was given.
        view: The part of it that the page holds.
        pinned: Ids.
        feature_info: As in `write_page`.
    """
    drawn = ~view.of_kind("bias")
    ids = set(view.nodes["id"][drawn.numpy()])
    weights = view.adjacency.detach().cpu().double()[drawn][:, drawn]
    targets, sources = weights.nonzero(as_tuple=True)
    nodes = _nodes(graph, view, drawn)
    info = graph.info
    features = [node["cumulative"] for node in nodes if node["kind"] == "feature"]
    return {
        "prompt": info.prompt,
        "tokens": [shown(token) or f"#{known}" for token, known in zip(info.tokens, info.token_ids, strict=True)],
        "n_layers": info.n_layers,
        "eyebrow": " · ".join(part for part in (info.model_name, info.crosscoder) if part) or "attribution graph",
        "nodes": nodes,
        "edges": {
            "source": sources.tolist(),
            "target": targets.tolist(),
            "weight": [_rounded(weight) for weight in weights[targets, sources].tolist()],
        },
        "threshold": min(1.0, math.ceil(max(features, default=1.0) * 100) / 100),
        "largest_influence": max((node["influence"] for node in nodes), default=0.0) or 1.0,
        "labels": dict(view.labels),
        "supernodes": {name: list(graph.supernodes[name]) for name in view.supernodes},
        "pinned": [name for name in pinned if name in ids],
        "features": _known(feature_info or {}, nodes),
        "certificate": _certificate(graph),
        "scores": _scores(graph),
        "about": _about(graph),
        "note": _note(graph, view, len(nodes), len(sources)),
        "neuronpedia": None,
    }


def _nodes(graph: Graph, view: Graph, drawn: Tensor) -> list[dict[str, Any]]:
    """Return the nodes as the page has them; influence in shares of the targets' weight."""
    whole = float(view.nodes["weight"].sum()) or 1.0
    from_bias = view.adjacency.detach().cpu().double()[:, view.of_kind("bias")].sum(1).tolist()
    inputs = _inputs(graph, view).tolist()
    rows = view.nodes.to_dict("records")
    return [
        {
            **{name: row[name] for name in ("id", "kind", "layer", "feature", "group")},
            "position": row["position"] % max(len(graph.info.token_ids), 1),
            "name": view.label(place) if row["id"] not in view.labels else _own_name(view, place),
            "token": shown(row["token"]),
            **{name: _rounded(row[name]) for name in ("activation", "value", "weight", "omitted")},
            "influence": _rounded(row["influence"] / whole),
            "cumulative": _rounded(row["cumulative_influence"]),
            "bias": _rounded(from_bias[place]),
            "input": _rounded(inputs[place]),
        }
        for place, row in enumerate(rows)
        if drawn[place]
    ]


def _own_name(graph: Graph, place: int) -> str:
    """Return what a labelled node is, apart from its label."""
    return graph.with_label(place, "").label(place)


def _known(feature_info: Mapping[str, Mapping[str, Any]], nodes: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what is known of the page's features, after a look at its form."""
    if not isinstance(feature_info, Mapping):
        raise GraphError(f"feature_info is a mapping by id or {{group}}_{{latent}}, not {type(feature_info).__name__}")
    keys = {key for node in nodes for key in (node["id"], f"{node['group']}_{node['feature']}")}
    known = {}
    for key, info in feature_info.items():
        if key not in keys:
            continue
        where = f"feature_info of {key!r}"
        if not isinstance(info, Mapping):
            raise GraphError(f"{where} is a mapping with 'top_tokens' and 'examples', not {type(info).__name__}")
        known[key] = {
            "top_tokens": [_top_token(where, token) for token in _several(where, info, "top_tokens")],
            "examples": [_example(where, example) for example in _several(where, info, "examples")],
        }
    return known


def _several(where: str, info: Mapping[str, Any], name: str) -> list[Any]:
    found = info.get(name, [])
    if isinstance(found, str) or not isinstance(found, Iterable):
        raise GraphError(f"{where}: {name} are several, in a list, not {type(found).__name__}")
    return list(found)


def _top_token(where: str, token: Any) -> Any:
    if isinstance(token, str):
        return token
    if not isinstance(token, list | tuple) or len(token) != 2 or not _fits(token[:1], token[1:]):
        raise GraphError(f"{where}: a top token is a text, or a pair of text and number")
    return [token[0], _rounded(float(token[1]))]


def _example(where: str, example: Any) -> Any:
    if isinstance(example, str):
        return example
    named = isinstance(example, Mapping) and {"tokens", "activations"} <= set(example)
    tokens, numbers = (_several(where, example, name) if named else [] for name in ("tokens", "activations"))
    if not named or not _fits(tokens, numbers):
        raise GraphError(f"{where}: an example is a text, or has tokens and as many activations")
    return {"tokens": tokens, "activations": [_rounded(float(a)) for a in numbers]}


def _fits(tokens: Sequence[Any], numbers: Sequence[Any]) -> bool:
    """Return whether there are as many texts as numbers."""
    texts = all(isinstance(token, str) for token in tokens)
    return texts and len(tokens) == len(numbers) and all(hasattr(number, "__float__") for number in numbers)


def _certificate(graph: Graph) -> dict[str, Any]:
    certificate = graph.certificate
    return {
        "holds": certificate.holds,
        "text": str(certificate),
        "failures": certificate.failures(),
        "residual": f"{certificate.max_relative_residual:.1e}",
    }


def _scores(graph: Graph) -> list[dict[str, Any]]:
    """Return the graph's scores, each with what it means."""
    scores = graph.scores()
    of = "Of the pruned graph: " if graph.info.pruning else ""
    told = {
        "replacement": (scores.replacement, "the share of influence that starts at embeddings, not at errors"),
        "completeness": (scores.completeness, "the share of nodes' inputs, weighted by influence, that is not error"),
    }
    return [
        {"name": name, "value": _rounded(value), "title": (of + text)[:1].upper() + (of + text)[1:]}
        for name, (value, text) in told.items()
    ]


def _about(graph: Graph) -> dict[str, str]:
    info = graph.info
    told = {"model": info.model_name, "crosscoder": info.crosscoder, "source": info.source}
    settings = {**info.settings, **{name.replace("_", " "): value for name, value in info.pruning.items()}}
    told |= {name: str(value) for name, value in settings.items() if value is not None}
    return {name: text for name, text in told.items() if text}


def _note(graph: Graph, view: Graph, n_nodes: int, n_edges: int) -> str:
    """Say how much of the graph is in the page, and why not more."""
    inner = ~graph.of_kind("bias")
    all_nodes = int(inner.sum())
    inside = inner.to(graph.adjacency.device)
    all_edges = int(graph.adjacency.detach().ne(0)[inside][:, inside].sum())
    said = f"In this page: {n_nodes:,} of {all_nodes:,} nodes and {n_edges:,} of {all_edges:,} edges"
    pruning = view.info.pruning
    if not pruning:
        return said + (", the strongest." if (n_nodes, n_edges) != (all_nodes, all_edges) else ".")
    shares = f"{pruning['node_threshold']:g} of nodes' and {pruning['edge_threshold']:g} of edges' influence"
    return f"{said} (pruned to {shares}; then the strongest)."


def _rounded(value: float) -> float | None:
    """Return a number with few digits; None for nan and the like, which JSON lacks."""
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None


# ---------------------------------------------------------------- the file


def _page(data: Mapping[str, Any], title: str, plotly: str) -> str:
    """Return the page's text: all parts put into the template in one pass, so that none is taken for a place."""
    own = "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS)
    parts = {
        "title": html.escape(title),
        "style": (ASSETS / "graph_page.css").read_text(encoding="utf-8"),
        "data": _quiet(json.dumps(data, allow_nan=False)),
        "plotly": _script(plotly),
        "script": _script(f'(() => {{\n"use strict";\n{own}}})();'),
    }
    hashes = " ".join(f"'sha256-{_digest(parts[name])}'" for name in ("plotly", "script"))
    parts["policy"] = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    template = (ASSETS / "graph_page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)


def _quiet(text: str) -> str:
    """Return JSON in which no browser finds markup: the same JSON, with these characters as escapes."""
    return re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _script(text: str) -> str:
    """Return a script that does not end before its end."""
    return re.sub("</(?=script)", r"<\\/", text, flags=re.IGNORECASE)


def _digest(text: str) -> str:
    # Browsers hash the text after they have made every line's end one character.
    plain = text.replace("\r\n", "\n").replace("\r", "\n")
    return base64.b64encode(hashlib.sha256(plain.encode()).digest()).decode()
