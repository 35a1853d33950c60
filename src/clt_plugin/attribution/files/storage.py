"""A graph as one safetensors file: numbers as tensors, all else as JSON in the header; nothing is ever unpickled.

The header's metadata are ``format``, ``schema_version``, ``graph``: JSON with the names of the table's columns in
order (``columns``), those of strings with their values (``strings``), ``info``, ``certificate``, ``labels`` and
``supernodes``; and ``sha256``, the digest of ``graph`` and of all tensors, without which what changed on the way, an
edge or a label, would pass under the certificate of the whole. The tensors are ``adjacency`` (N, N) and, for each
column of numbers, ``nodes.{column}`` (N,).
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import fields
from os import PathLike
from typing import Any

import pandas as pd
import torch

from clt_plugin.attribution.certificate import Certificate
from clt_plugin.attribution.graph import Graph, GraphError, GraphInfo
from clt_plugin.core.aside import written_aside

FORMAT = "clt_plugin.graph"
SCHEMA_VERSION = 1


def save(graph: Graph, path: str | PathLike[str]) -> None:
    """Write a graph to a file, whole or not at all: one that is there is replaced once the new one is written.

    Raises:
        OSError: It cannot be written there: the disk is full, or the path is a folder, or not yours to write.
        GraphError: The graph's info or table holds something else than plain data.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    strings = {name: column.tolist() for name, column in graph.nodes.items() if not _is_number(column)}
    tensors = {"adjacency": graph.adjacency.detach().cpu().contiguous()}
    tensors |= {
        f"nodes.{name}": torch.tensor(column.to_numpy()) for name, column in graph.nodes.items() if name not in strings
    }
    data = {
        "columns": list(graph.nodes.columns),
        "strings": strings,
        "info": {each.name: _plain(getattr(graph.info, each.name)) for each in fields(GraphInfo)},
        "certificate": graph.certificate.to_dict(),
        "labels": dict(graph.labels),
        "supernodes": dict(graph.supernodes),
    }
    text = _json(data)
    metadata = {
        "format": FORMAT,
        "schema_version": str(SCHEMA_VERSION),
        "graph": text,
        "sha256": _digest(text, tensors),
    }
    with written_aside(path) as aside:
        try:
            save_file(tensors, aside, metadata)
        except SafetensorError as error:  # which a full disk gives too
            raise OSError(
                f"the graph could not be written to {os.fspath(path)} ({error}): see that there is room, or save it "
                "elsewhere"
            ) from error


def load(path: str | PathLike[str]) -> Graph:
    """Read a graph that `save` wrote.

    Raises:
        GraphError: The file is damaged, of another release, or of something else.
        FileNotFoundError: There is none.
    """
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no graph {os.fspath(path)}: save one there, or give another path")
    name = os.path.basename(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # A copy: what was merely mapped would change with the file.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise GraphError(
            f"{name} is no safetensors file, or a damaged one ({error}): save the graph again with graph.save, or copy "
            "it again from where it is whole"
        ) from error
    if metadata.get("format") != FORMAT:
        raise GraphError(f"{name} is a safetensors file, but not of a graph: give one that graph.save wrote")
    if metadata.get("schema_version") != str(SCHEMA_VERSION):
        raise GraphError(
            f"{name} has schema version {metadata.get('schema_version')!r}; this release reads version "
            f"{SCHEMA_VERSION}: update clt_plugin, or save the graph again with the release that wrote it"
        )
    # Files of the first releases have no digest.
    if "sha256" in metadata and metadata["sha256"] != _digest(metadata.get("graph", ""), tensors):
        raise GraphError(
            f"{name} is damaged: what it holds is not what was saved; save the graph again with graph.save, or copy it "
            "again from where it is whole"
        )
    try:
        return _graph(json.loads(metadata["graph"]), tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise GraphError(f"{name} does not hold a whole graph ({error}): save it again with graph.save") from error


def _graph(data: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Graph:
    strings = {name: pd.Series(values, dtype=str) for name, values in data["strings"].items()}
    columns = {name: strings[name] if name in strings else tensors[f"nodes.{name}"].numpy() for name in data["columns"]}
    info = data["info"]
    about = {**info, "tokens": tuple(info["tokens"]), "token_ids": tuple(info["token_ids"])}
    return Graph(
        tensors["adjacency"],
        pd.DataFrame(columns),
        Certificate.from_dict(data["certificate"]),
        GraphInfo(**about),
        data["labels"],
        {name: tuple(members) for name, members in data["supernodes"].items()},
    )


def _digest(text: str, tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_number(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_extension_array_dtype(column)


def _plain(value: Any) -> Any:
    return dict(value) if hasattr(value, "items") else value


def _json(data: dict[str, Any]) -> str:
    try:
        return json.dumps(data)
    except TypeError as error:
        raise GraphError(f"a graph is saved with plain data only ({error}): see its info and its table") from error
