"""Crosscoders from a server that speaks the Hub's endpoints: only what is needed, pinned, resumed, explained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import clt_plugin as cp
from clt_plugin.hub import remote
from support.hub_server import HubServer, use

N_LAYERS, D, F = 4, 16, 64
REPO = "owner/some-clt"


@pytest.fixture
def hub(tmp_path):
    with HubServer() as server, use(server, tmp_path / "machine"):
        yield server


@pytest.fixture
def clt(tmp_path):
    """Return a CLT whose files are longer than the first read of a header, and its folder."""
    clt = cp.Crosscoder(cp.Wiring.clt(N_LAYERS, read="resid_mid"), D, F * 64, "jumprelu", host=cp.Host("m", None, 4, 1))
    for parameter in clt.parameters():
        parameter.data.normal_()
    clt.eval().requires_grad_(False)
    clt.save(tmp_path / "clt", format="circuit-tracer")
    return clt


@pytest.fixture
def commit(hub, clt, tmp_path):
    return hub.add(REPO, tmp_path / "clt")


def assert_same(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def bodies(hub):
    """Return the files of which more than a header was sent."""
    return {name for name, n in hub.fetched(REPO).items() if n > 2 * remote.HEADER_BYTES}


def test_all_of_it(hub, clt, commit):
    loaded = cp.load(f"hf://{REPO}")
    assert_same(loaded, clt)
    assert loaded.metadata["source"] == [f"hf://{REPO}@{commit}"]


def test_a_second_time_asks_for_the_revision_alone(hub, clt, commit):
    cp.load(f"hf://{REPO}")
    hub.forget()
    cp.load(f"hf://{REPO}")
    assert [request.path for request in hub.requests] == [f"/api/models/{REPO}/revision/main"]
    hub.forget()
    cp.load(f"hf://{REPO}@{commit}")
    assert hub.requests == []


@pytest.mark.parametrize("lazy", [False, True])
def test_some_layers_fetch_no_others(hub, clt, commit, lazy):
    loaded = cp.load(f"hf://{REPO}", layers=[2], lazy=lazy)
    assert_same(loaded, clt.select([2]))
    assert loaded.is_partial
    assert bodies(hub) == {"W_enc_2.safetensors", "W_dec_2.safetensors"}


def test_some_features_fetch_their_rows_alone(hub, clt, commit):
    loaded = cp.load(f"hf://{REPO}", layers=[1], features={1: [700, 3, 4]})
    assert_same(loaded, clt.select([1], {1: [700, 3, 4]}))
    assert bodies(hub) == set()


def test_many_features_fetch_the_file(hub, clt, commit):
    chosen = list(range(0, F * 64, 2))
    loaded = cp.load(f"hf://{REPO}", layers=[1], features={1: chosen})
    assert_same(loaded, clt.select([1], {1: chosen}))
    assert bodies(hub) == {"W_enc_1.safetensors", "W_dec_1.safetensors"}


def test_add_clt_fetches_the_layers_it_attaches(hub, commit):
    from clt_plugin.adapters.huggingface import crosscoder_for

    crosscoder_for(f"hf://{REPO}", layers=[3])
    assert bodies(hub) == {"W_enc_3.safetensors", "W_dec_3.safetensors"}


def test_what_was_loaded_is_there_offline(hub, clt, commit, tmp_path):
    cp.load(f"hf://{REPO}", layers=[2])
    cp.load(f"hf://{REPO}", layers=[1], features={1: [5]})
    with use(hub, tmp_path / "machine", offline=True):
        hub.forget()
        assert_same(cp.load(f"hf://{REPO}", layers=[2]), clt.select([2]))
        assert_same(cp.load(f"hf://{REPO}", layers=[1], features={1: [5]}), clt.select([1], {1: [5]}))
        with pytest.raises(cp.HubError, match=r"W_.*HF_HUB_OFFLINE is set"):
            cp.load(f"hf://{REPO}")
        assert hub.requests == []


def test_a_cache_that_another_tool_filled(hub, clt, commit, tmp_path):
    """A whole snapshot loads offline; one with a file missing is refused, with the file's name."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(REPO))
    shutil.rmtree(tmp_path / "machine" / "assets", ignore_errors=True)
    with use(hub, tmp_path / "machine", offline=True):
        assert_same(cp.load(f"hf://{REPO}"), clt)
        (folder / "W_dec_1.safetensors").unlink()
        with pytest.raises(cp.FormatError, match=r"owner/some-clt@.*W_dec_1.safetensors missing"):
            cp.load(f"hf://{REPO}")


def test_unreachable_and_cached(hub, clt, commit, monkeypatch):
    cp.load(f"hf://{REPO}")
    hub.fail(REPO, status=503, times=None)
    with pytest.raises(cp.HubError, match="try again later"):
        cp.load(f"hf://{REPO}")
    assert_same(cp.load(f"hf://{REPO}@{commit}"), clt)


# ---------------------------------------------------------------- revisions


def test_revisions_are_pinned(hub, clt, commit, tmp_path):
    hub.tag(REPO, "v1", commit)
    second = cp.Crosscoder(clt.wiring, D, 8, "relu")
    second.save(tmp_path / "second", format="circuit-tracer")
    later = hub.add(REPO, tmp_path / "second")
    assert later != commit
    assert cp.load(f"hf://{REPO}").n_latents == 8
    for revision in ("v1", commit):
        loaded = cp.load(f"hf://{REPO}@{revision}")
        assert loaded.n_latents == F * 64
        assert loaded.metadata["source"] == [f"hf://{REPO}@{commit}"]
    assert cp.load(f"hf://{REPO}", revisions={REPO: "v1"}).n_latents == F * 64


def test_what_is_not_there(hub, clt, commit):
    with pytest.raises(cp.HubError, match="no revision v9"):
        cp.load(f"hf://{REPO}@v9")
    with pytest.raises(cp.HubError, match="no repository owner/other on the Hub, or it is private"):
        cp.load("hf://owner/other")
    with pytest.raises(cp.FormatError, match="no folder nowhere"):
        cp.load(f"hf://{REPO}/nowhere")


# ---------------------------------------------------------------- tokens


def test_gated_and_private(hub, clt, commit):
    hub.gate(REPO, "hf_secret")
    with pytest.raises(cp.HubError, match=r"gated: accept its terms at https://huggingface.co/owner/some-clt.*hf auth"):
        cp.load(f"hf://{REPO}")
    assert_same(cp.load(f"hf://{REPO}", token="hf_secret"), clt)


def test_private(hub, clt, commit):
    hub.make_private(REPO, "hf_secret")
    with pytest.raises(cp.HubError, match="or it is private: check the name, or give a token"):
        cp.load(f"hf://{REPO}")
    assert_same(cp.load(f"hf://{REPO}", token="hf_secret"), clt)


# ---------------------------------------------------------------- trouble on the way


def test_a_cut_connection_is_resumed(hub, clt, commit):
    hub.cut(REPO, "W_dec_0.safetensors", after=300_000, times=1)
    assert_same(cp.load(f"hf://{REPO}"), clt)
    ranges = [r for r in hub.ranges(REPO, "W_dec_0.safetensors") if r]
    assert any(not r.startswith("bytes=0-") for r in ranges)


def test_a_connection_that_stays_cut(hub, clt, commit, tmp_path):
    hub.cut(REPO, "W_dec_0.safetensors", after=300_000, times=None)
    with pytest.raises(cp.HubError, match=r"connection failed.*run it again"):
        cp.load(f"hf://{REPO}")
    with use(hub, tmp_path / "machine", offline=True), pytest.raises(cp.HubError, match="W_dec_0"):
        cp.load(f"hf://{REPO}")
    hub.heal()
    done = {name for name in hub.fetched(REPO) if (snapshot(tmp_path, commit) / name).exists()}
    hub.forget()
    assert_same(cp.load(f"hf://{REPO}"), clt)
    again = set(hub.fetched(REPO))
    assert "W_dec_0.safetensors" in again
    assert not again & done


def snapshot(tmp_path, commit):
    return tmp_path / "machine" / "hub" / "models--owner--some-clt" / "snapshots" / commit


def test_a_server_that_knows_no_ranges(hub, clt, commit, monkeypatch):
    hub.fail(REPO, "W_enc_0.safetensors", status=200, times=None, method="GET")
    with pytest.raises(cp.HubError, match=r"W_enc_0.safetensors: asked for bytes 0 to 65536, got 0 bytes"):
        cp.load(f"hf://{REPO}", layers=[1])


def test_an_empty_file_as_published(hub, clt, commit):
    hub.add(REPO, {"W_dec_2.safetensors": b""})
    with pytest.raises(cp.FormatError, match=r"W_dec_2.safetensors is empty on the Hub"):
        cp.load(f"hf://{REPO}")


def test_a_file_cut_short_as_published(hub, clt, commit, tmp_path):
    whole = (tmp_path / "clt" / "W_dec_2.safetensors").read_bytes()
    hub.add(REPO, {"W_dec_2.safetensors": whole[:-100]})
    with pytest.raises(cp.FormatError, match=r"W_dec_2.safetensors is damaged on the Hub \(it has .* bytes, where"):
        cp.load(f"hf://{REPO}")


def test_a_full_disk_is_told_before(hub, clt, commit, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(cp.HubError, match=r"GiB are to be fetched, but 0.0 GiB are free.*layers="):
        cp.load(f"hf://{REPO}")
    assert bodies(hub) == set()


def test_a_repository_of_many(hub, clt, tmp_path):
    hub.add(REPO, {f"{name}/{path.name}": path for name in ("a", "b") for path in (tmp_path / "clt").iterdir()})
    with pytest.raises(cp.FormatError, match=r"holds a/, b/: give the folder that holds the crosscoder"):
        cp.load(f"hf://{REPO}")
    assert_same(cp.load(f"hf://{REPO}/b"), clt)
    assert not any(name.startswith("a/") for name in hub.fetched(REPO))
