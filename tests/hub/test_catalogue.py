"""The catalogue is data: every entry is well-formed, and anyone can add some."""

from __future__ import annotations

import pytest

import clt_plugin as cp
from clt_plugin.core import SITE_NAMES
from clt_plugin.hub import CATALOGUE, Reference
from clt_plugin.hub.catalogue import VARIABLE


@pytest.mark.parametrize("entry", list(CATALOGUE), ids=lambda entry: entry.name)
def test_every_entry(entry):
    assert Reference.parse(entry.reference)
    assert entry.kind in ("clt", "plt", "crosscoder")
    assert {entry.read, entry.write} <= set(SITE_NAMES)
    assert entry.size is None or 0.1 < entry.size < 1000


def test_own_entries(tmp_path, monkeypatch):
    clt = cp.Crosscoder(cp.Wiring.clt(2), 4, 6)
    clt.save(tmp_path / "clt")
    own = tmp_path / "own.toml"
    entry = f'reference = "{tmp_path}/clt"\nmodel = "m"\nkind = "clt"\nread = "mlp_in"\nwrite = "mlp_out"\n'
    own.write_text(f'["mine"]\n{entry}["gemma-2-2b-426k"]\n{entry}')
    monkeypatch.setenv(VARIABLE, str(own))
    for name in ("mine", "gemma-2-2b-426k"):  # one's own come first
        assert cp.load(name).n_layers == 2


def test_a_folder_comes_before_a_name(tmp_path, monkeypatch):
    cp.Crosscoder(cp.Wiring.clt(2), 4, 6).save(tmp_path / "gemma-2-2b-426k")
    monkeypatch.chdir(tmp_path)
    assert cp.load("gemma-2-2b-426k").n_layers == 2


def test_a_name_that_is_not_known(tmp_path):
    with pytest.raises(cp.FormatError, match=r"no folder gemma-2-2b-427k.*`clt list` \(did you mean gemma-2-2b-426k"):
        cp.load("gemma-2-2b-427k")


@pytest.mark.parametrize("text", ["[", '["x"]\nmodel = 1', '["x"]\nreference = "hf://a/b"\nsurprise = 1'])
def test_a_broken_catalogue(tmp_path, monkeypatch, text):
    (tmp_path / "own.toml").write_text(text)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "own.toml"))
    with pytest.raises(cp.FormatError, match=r"own.toml is not a catalogue.*Each entry is a table of reference"):
        cp.load("anything")
