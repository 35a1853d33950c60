"""A graph on disk: what is saved is loaded exactly, and what is no whole graph is refused with what to do."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from attribution.graphs import make_certificate, make_graph
from clt_plugin.attribution.graph import Graph, GraphError


def rich(dtype: torch.dtype = torch.float64) -> Graph:
    """A graph with something in every place, awkward texts included."""
    graph = make_graph(seed=1, dtype=dtype, omitted=0.1, model_name='a "model"', settings={"max_n_logits": 10})
    ids = graph.nodes["id"].tolist()
    graph = graph.with_label(ids[0], "</script> \u2028 \U0001f984 \n").with_supernode("capitals", ids[:3])
    nodes = graph.nodes.assign(token=["\ufffd\x00", *graph.nodes["token"][1:]], pinned=True, note="x")
    certificate = make_certificate(columns=("bias", ids[0]), column_residual=math.nan)
    return Graph(graph.adjacency, nodes, certificate, graph.info, graph.labels, graph.supernodes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_saved_is_loaded(dtype: torch.dtype, tmp_path: Path) -> None:
    for graph in (rich(dtype), rich(dtype).prune(), rich(dtype).select([])):
        path = tmp_path / "made" / "g.safetensors"
        graph.save(path)
        found = Graph.load(str(path))
        assert found.adjacency.dtype == dtype
        assert torch.equal(found.adjacency, graph.adjacency)
        pd.testing.assert_frame_equal(found.nodes, graph.nodes, check_exact=True)
        assert found.info == graph.info
        assert found.certificate.to_dict() == graph.certificate.to_dict()
        assert math.isnan(found.certificate.column_residual)
        assert (found.labels, found.supernodes) == (graph.labels, graph.supernodes)
        assert [file.name for file in path.parent.iterdir()] == ["g.safetensors"]


def test_a_loaded_graph_does_not_hang_on_its_file(tmp_path: Path) -> None:
    graph, path = rich(), tmp_path / "g.safetensors"
    graph.save(path)
    found = Graph.load(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(found.adjacency, graph.adjacency)


def test_an_interrupted_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "g.safetensors"
    make_graph(seed=1).save(path)
    before = path.read_bytes()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("clt_plugin.attribution.files.storage.os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_graph(seed=2).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["g.safetensors"]


def rewritten(path: Path, **changes: object) -> None:
    """Save the file again with other metadata; a value of None takes a key away."""
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    metadata = {key: value for key, value in {**metadata, **changes}.items() if value is not None}
    save_file(tensors, path, metadata)


def test_what_is_no_whole_graph_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "g.safetensors"
    rich().save(path)
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(GraphError, match=r"g\.safetensors is no safetensors file, or a damaged one .*: save"):
            Graph.load(path)
    path.write_bytes(b"PK\x03\x04 a zip file, perhaps a pickle" * 9)
    with pytest.raises(GraphError, match="is no safetensors file"):
        Graph.load(path)
    save_file({"W_enc": torch.zeros(3)}, path)
    with pytest.raises(GraphError, match=r"but not of a graph: give one that graph.save wrote"):
        Graph.load(path)
    for version in ("2", None):
        path.write_bytes(whole)
        rewritten(path, schema_version=version)
        with pytest.raises(GraphError, match=rf"has schema version {version!r}; this release reads version 1: update"):
            Graph.load(path)
    with safe_open_of(whole, path) as file:
        data = json.loads(file.metadata()["graph"])
    for change in (
        {"labels": {"nobody": "x"}},
        {"columns": [*data["columns"], "more"]},
        {"info": {}},
        {"certificate": {}},
        {"strings": data["strings"] | {"id": data["strings"]["id"][1:]}},
    ):
        path.write_bytes(whole)
        rewritten(path, graph=json.dumps(data | change), sha256=None)
        with pytest.raises(GraphError, match=r"does not hold a whole graph \(.*\): save it again"):
            Graph.load(path)
    with pytest.raises(FileNotFoundError, match=r"there is no graph .*nowhere"):
        Graph.load(tmp_path / "nowhere")


def test_a_changed_byte_is_refused(tmp_path: Path) -> None:
    graph, path = make_graph(seed=1), tmp_path / "g.safetensors"
    graph.save(path)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(8, len(whole), (60,), generator=generator).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(GraphError):
            Graph.load(path)
    # The least bit of an edge, which no sum of rows would show.
    at = whole.index(graph.adjacency[graph.adjacency != 0][0].numpy().tobytes())
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(GraphError, match=r"g\.safetensors is damaged: what it holds is not what was saved; save the"):
        Graph.load(path)
    path.write_bytes(whole)
    rewritten(path, sha256=None)  # as the first releases wrote it
    assert torch.equal(Graph.load(path).adjacency, graph.adjacency)


def test_what_cannot_be_written_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder: give the path of a file"):
        make_graph().save(tmp_path)

    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match=r"could not be written to .*g\.safetensors \(I/O .*: see that there is room"):
        make_graph().save(tmp_path / "g.safetensors")
    assert list(tmp_path.iterdir()) == []


def safe_open_of(data: bytes, path: Path) -> safe_open:
    path.write_bytes(data)
    return safe_open(path, framework="pt")


def test_what_is_no_plain_data_is_not_saved(tmp_path: Path) -> None:
    graph = make_graph(settings={"model": object()})
    with pytest.raises(GraphError, match="is saved with plain data only"):
        graph.save(tmp_path / "g.safetensors")
    assert list(tmp_path.iterdir()) == []
