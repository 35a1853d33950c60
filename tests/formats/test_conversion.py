"""Converting: exact, verified, in bounded memory, whole or not at all."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file

import clt_plugin as cp
from clt_plugin.formats import _files, conversion
from support.hub_server import HubServer, use


@pytest.fixture
def source(tmp_path):
    clt = cp.Crosscoder(cp.Wiring.clt(3, read="resid_mid"), 4, 50, "jumprelu", host=cp.Host("m", None, 3, 1))
    for parameter in clt.parameters():
        parameter.data.normal_()
    clt.metadata = {"recipe": {"tokens": 5}}
    clt.save(tmp_path / "source")
    return tmp_path / "source"


def assert_same(a, b):
    assert list(conversion.differences(cp.load(a), cp.load(b))) == []


def test_to_and_fro(source, tmp_path):
    cp.convert(source, tmp_path / "ct", "circuit-tracer", bar=False)
    cp.convert(tmp_path / "ct", tmp_path / "native", "native", bar=False)
    assert_same(source, tmp_path / "native")
    for folder in ("ct", "native"):
        assert cp.load(tmp_path / folder).metadata == {"recipe": {"tokens": 5}}


def test_by_small_chunks(source, tmp_path, monkeypatch):
    """Whatever the chunk, safetensors' own reader finds the same tensors."""
    cp.convert(source, tmp_path / "one", "circuit-tracer", bar=False)
    monkeypatch.setattr(_files, "CHUNK_BYTES", 100)
    monkeypatch.setattr(conversion, "CHUNK_BYTES", 100)
    cp.convert(source, tmp_path / "many", "circuit-tracer", bar=False)
    for name in sorted(os.listdir(tmp_path / "one")):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()
    loaded = load_file(tmp_path / "many" / "W_dec_0.safetensors")["W_dec_0"]
    assert torch.equal(loaded, cp.load(source).decoder_view(0))


def test_another_dtype(source, tmp_path):
    cp.convert(source, tmp_path / "half", dtype=torch.bfloat16, bar=False)
    half, whole = cp.load(tmp_path / "half"), cp.load(source)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.W_dec[0], whole.W_dec[0].bfloat16())


def test_some_layers(source, tmp_path):
    cp.convert(source, tmp_path / "part", layers=[1], bar=False)
    part = cp.load(tmp_path / "part")
    assert part.is_partial
    assert part.wiring.home == (1,)


def test_what_the_target_cannot_hold(source, tmp_path):
    with pytest.raises(cp.FormatError, match=r"groups \[1\]: use format='native'"):
        cp.convert(source, tmp_path / "ct", "circuit-tracer", layers=[1], bar=False)
    with pytest.raises(KeyError, match="no format is called 'npz'"):
        cp.convert(source, tmp_path / "ct", "npz", bar=False)
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("key", ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"])
def test_a_write_that_goes_wrong_is_found(source, tmp_path, monkeypatch, key):
    """One bit of one value flips on its way to the disk: verification refuses, and nothing is kept."""
    write, done = _files._write, []

    def flipped(file, name, rows):
        if name.startswith(key) and not done:
            done.append(name)
            whole = torch.cat([chunk.reshape(-1) for chunk in rows.chunks()]).clone()
            whole.view(torch.int32)[0] ^= 1
            rows = _files.Rows.of(whole.reshape(rows.shape))
        write(file, name, rows)

    monkeypatch.setattr(_files, "_write", flipped)
    with pytest.raises(cp.FormatError, match=f"differs in {key}"):
        cp.convert(source, tmp_path / "ct", "circuit-tracer", bar=False)
    assert os.listdir(tmp_path) == ["source"]
    cp.convert(source, tmp_path / "unverified", "circuit-tracer", verify=False, bar=False)


def test_what_is_there_stays(source, tmp_path, monkeypatch):
    cp.convert(source, tmp_path / "x", bar=False)
    with pytest.raises(FileExistsError, match="overwrite"):
        cp.convert(source, tmp_path / "x", bar=False)
    before = {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()}

    def full(file, key, rows):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_files, "_write", full)
    with pytest.raises(OSError, match="No space"):
        cp.convert(source, tmp_path / "x", "circuit-tracer", overwrite=True, bar=False)
    assert {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()} == before
    assert sorted(os.listdir(tmp_path)) == ["source", "x"]


def test_progress_counts_every_byte(source, tmp_path, capsys):
    cp.convert(source, tmp_path / "x")
    shown = capsys.readouterr().err
    assert "writing: 100%" in shown
    assert "verifying: 100%" in shown


def test_zero_and_minus_zero_differ(source, tmp_path, monkeypatch):
    clt = cp.load(source)
    clt.W_dec[0].data[0, 0] = 0.0
    clt.save(source, overwrite=True)
    write = _files._write

    def signed(file, name, rows):
        if name == "W_dec_0":
            whole = torch.cat([chunk.reshape(-1) for chunk in rows.chunks()]).clone()
            whole[whole == 0] = -0.0
            rows = _files.Rows.of(whole.reshape(rows.shape))
        write(file, name, rows)

    monkeypatch.setattr(_files, "_write", signed)
    with pytest.raises(cp.FormatError, match="differs in W_dec 0"):
        cp.convert(source, tmp_path / "ct", "circuit-tracer", bar=False)


@pytest.mark.parametrize(
    ("below", "target", "words"),
    [("p/a/clt", "p", "contains the source"), ("p", "p/a/clt", "is inside the source"), ("p", "q/../p/a", "is inside")],
)
def test_source_and_target_lie_apart(source, tmp_path, below, target, words):
    (tmp_path / below).parent.mkdir(parents=True, exist_ok=True)
    source.rename(tmp_path / below)
    (tmp_path / "p" / "thesis.tex").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=words):
        cp.convert(tmp_path / below, tmp_path / target, overwrite=True, bar=False)
    assert sorted(tmp_path.rglob("*")) == before


def test_in_place(source):
    whole = cp.load(source)
    cp.convert(source, source, "circuit-tracer", overwrite=True, bar=False)
    assert list(conversion.differences(whole, cp.load(source))) == []


def test_of_a_revision(source, tmp_path):
    with HubServer() as hub, use(hub, tmp_path / "machine"):
        commit = hub.add("o/n", source)
        hub.add("o/n", {"config.json": b"{}"})
        cp.convert("hf://o/n", tmp_path / "old", revisions={"o/n": commit}, bar=False)
        assert_same(source, tmp_path / "old")
        cp.convert(f"hf://o/n@{commit}", tmp_path / "again", bar=False)
        assert cp.load(tmp_path / "again").metadata["source"] == [f"hf://o/n@{commit}"]
