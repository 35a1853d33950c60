"""Crosscoders from a server that speaks the Hub's endpoints: only what is needed, pinned, resumed, explained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import clt_plugin as cp
from clt_plugin.hub import remote
from support.hub_server import HubServer, use
from support.layouts import transcoder_bundle

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


def shipped(crosscoder, folder):
    crosscoder.save(folder)
    return folder


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


@pytest.fixture
def filled(hub, commit, tmp_path):
    """Return a snapshot that another tool cached, without ours and without its own listing."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(REPO))
    shutil.rmtree(tmp_path / "machine" / "assets", ignore_errors=True)
    return folder


def forget_listings(tmp_path, monkeypatch):
    """Forget what huggingface_hub listed when it fetched a snapshot, as if an older version of it had."""
    from huggingface_hub import _tree_cache

    monkeypatch.setattr(_tree_cache, "_IN_MEMORY_TREE_CACHE", {})
    for trees in (tmp_path / "machine").rglob("trees"):
        shutil.rmtree(trees)


def test_a_cache_that_another_tool_filled(hub, clt, filled, tmp_path):
    """A whole snapshot loads offline; one with a file missing is refused, with the file's name."""
    with use(hub, tmp_path / "machine", offline=True):
        assert_same(cp.load(f"hf://{REPO}"), clt)
        (filled / "W_dec_1.safetensors").unlink()
        with pytest.raises(cp.HubError, match=r"owner/some-clt@.*W_dec_1.safetensors.* not in the cache"):
            cp.load(f"hf://{REPO}")


def test_a_cache_without_any_listing(hub, clt, filled, tmp_path, monkeypatch):
    forget_listings(tmp_path, monkeypatch)
    with use(hub, tmp_path / "machine", offline=True):
        assert_same(cp.load(f"hf://{REPO}"), clt)
        (filled / "W_dec_1.safetensors").unlink()
        with pytest.raises(cp.FormatError, match=r"owner/some-clt@.*W_dec_1.safetensors missing"):
            cp.load(f"hf://{REPO}")
        (filled / "config.yaml").unlink()  # without it circuit-tracer's defaults would be taken
        with pytest.raises(cp.HubError, match="which files belong to it is not known offline"):
            cp.load(f"hf://{REPO}")


@pytest.mark.parametrize("listed", [False, True])
def test_a_part_of_a_set_in_the_cache(hub, tmp_path, monkeypatch, listed):
    """Two layers of three look like a set of two: refused offline, unless a listing says what is missing."""
    from huggingface_hub import snapshot_download

    (tmp_path / "set").mkdir()
    transcoder_bundle.write(tmp_path / "set", "relu", skip=False)
    hub.add("owner/set", tmp_path / "set")
    snapshot_download("owner/set", allow_patterns=["config.yaml", "layer_0.*", "layer_1.*"])
    if not listed:
        forget_listings(tmp_path, monkeypatch)
    with use(hub, tmp_path / "machine", offline=True):
        words = "layer_2.safetensors is not in the cache" if listed else "not known offline.*load it once with"
        for look in (cp.load, cp.inspect):
            with pytest.raises(cp.HubError, match=words):
                look("hf://owner/set")


def test_some_of_the_folders_that_match(hub, tmp_path, monkeypatch):
    from huggingface_hub import snapshot_download

    for layer in range(2):
        cp.Crosscoder(cp.Wiring.sae(cp.Site("", "resid_post", layer)), 4, 6).save(tmp_path / "set" / f"layer_{layer}")
    hub.add("owner/set", tmp_path / "set")
    snapshot_download("owner/set", allow_patterns=["layer_0/*"])
    forget_listings(tmp_path, monkeypatch)
    with use(hub, tmp_path / "machine", offline=True):
        assert cp.load("hf://owner/set/layer_0").wiring.n_groups == 1  # the native format says what it has
        with pytest.raises(cp.HubError, match=r"which folders match layer_\* is not known offline"):
            cp.load("hf://owner/set/layer_*")


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
    with pytest.raises(
        cp.FormatError, match=r"W_dec_2.safetensors is truncated or damaged on the Hub \(it has .* bytes, where"
    ):
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


# ---------------------------------------------------------------- where it came from


def test_the_source_of_a_folder(hub, tmp_path):
    clt = cp.Crosscoder(cp.Wiring.clt(2), 4, 6)
    commit = hub.add(REPO, {f"a/root/{path.name}": path for path in shipped(clt, tmp_path / "x").iterdir()})
    (source,) = cp.load(f"hf://{REPO}/a/root/").metadata["source"]
    assert source == f"hf://{REPO}/a/root@{commit}"
    hub.add(REPO, {"a/root/config.json": b"{}"})
    assert_same(cp.load(source), clt)
    assert_same(cp.load([source]), clt)


def test_the_source_of_several(hub, tmp_path):
    for layer in range(3):
        shipped(cp.Crosscoder(cp.Wiring.sae(cp.Site("", "mlp_out", layer)), 4, 6), tmp_path / "x" / f"layer_{layer}")
    commit = hub.add(REPO, tmp_path / "x")
    loaded = cp.load(f"hf://{REPO}/layer_*")
    assert loaded.metadata["source"] == [f"hf://{REPO}/layer_*@{commit}"]
    assert_same(cp.load(loaded.metadata["source"]), loaded)


def test_a_folder_called_root(hub, clt, commit, tmp_path):
    """Its listing is not the repository's."""
    other = cp.Crosscoder(cp.Wiring.clt(2), 4, 6)
    commit = hub.add(REPO, {f"root/{path.name}": path for path in shipped(other, tmp_path / "other").iterdir()})
    assert_same(cp.load(f"hf://{REPO}/root@{commit}"), other)
    assert_same(cp.load(f"hf://{REPO}@{commit}"), clt)


# ---------------------------------------------------------------- caches that are worth nothing


def test_a_cache_that_cannot_be_written(hub, clt, commit, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.mkstemp", lambda **_: (_ for _ in ()).throw(PermissionError(13, "denied")))
    assert_same(cp.load(f"hf://{REPO}", layers=[1], features={1: [5]}), clt.select([1], {1: [5]}))


def test_a_cache_with_a_file_in_its_way(hub, clt, commit, tmp_path):
    (tmp_path / "machine" / "assets").parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "machine" / "assets").write_text("")
    assert_same(cp.load(f"hf://{REPO}"), clt)


def test_downloads_that_cannot_be_kept(hub, commit, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied", "/some/cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", denied)
    with pytest.raises(cp.HubError, match=r"cannot be kept.*/some/cache.*HF_HOME"):
        cp.load(f"hf://{REPO}")


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": "b"}'])
def test_a_damaged_listing_is_asked_for_again(hub, clt, commit, tmp_path, content):
    cp.inspect(f"hf://{REPO}")
    (listing,) = (tmp_path / "machine" / "assets").rglob("listing.json")
    for path in ((tmp_path / "machine" / "assets").rglob("refs/*"), [listing]):
        for file in path:
            file.write_text(content)
    assert_same(cp.load(f"hf://{REPO}"), clt)


def test_a_file_that_the_cache_has_cut_short(hub, clt, commit, tmp_path):
    cp.load(f"hf://{REPO}")
    path = snapshot(tmp_path, commit) / "W_dec_1.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    config = snapshot(tmp_path, commit) / "config.yaml"
    if config.exists():
        config.write_bytes(b"")
    with use(hub, tmp_path / "machine", offline=True):
        with pytest.raises(cp.HubError, match=r"W_dec_1.safetensors \(.*/W_dec_1.safetensors is not whole\)"):
            cp.load(f"hf://{REPO}")
    assert_same(cp.load(f"hf://{REPO}"), clt)
    assert path.read_bytes() == whole


def test_long_and_odd_names(hub, clt, tmp_path):
    folder = "/".join(["é" * 40] * 3)
    files = {f"{folder}/{path.name}": path for path in (tmp_path / "clt").iterdir()}
    hub.add(REPO, files | {f"{folder}/a1²": b"", f"{folder}/a10": b"", f"{folder}/a2": b""})
    for _ in range(2):
        hub.forget()
        assert_same(cp.load(f"hf://{REPO}/{folder}", layers=[1], features={1: [5]}), clt.select([1], {1: [5]}))
    assert [request.path for request in hub.requests] == [f"/api/models/{REPO}/revision/main"]


# ---------------------------------------------------------------- tokens stay where they belong


def test_no_token_is_shown(hub, clt, commit):
    lazy = cp.load(f"hf://{REPO}", token="hf_secret", layers=[1], features={1: [5]}, lazy=True)
    folder = cp.hub.open_folder(f"hf://{REPO}", token="hf_secret")
    for thing in (lazy.store, folder, folder.file("W_enc_0.safetensors"), folder.context, folder.repository):
        assert "hf_secret" not in repr(thing)


def test_a_token_that_expired(hub, clt, commit):
    for status in (401, 403):
        hub.fail(REPO, "config.yaml", status=status, times=1)
        with pytest.raises(cp.HubError, match="hf auth login"):
            cp.load(f"hf://{REPO}", token="hf_old")


def test_as_the_hub_sends_files(hub, clt, commit):
    """Large ones from another host, which is shown no token; small ones compressed, if that is accepted."""
    hub.redirects = hub.compresses = True
    hub.gate(REPO, "hf_secret")
    cp.load(f"hf://{REPO}", token="hf_secret", layers=[1], features={1: [5]})
    assert {request.status for request in hub.requests if request.file == "config.yaml"} == {206}
    assert_same(cp.load(f"hf://{REPO}", token="hf_secret"), clt)
    elsewhere = [request for request in hub.requests if hub.other_url.endswith(request.host)]
    assert any(request.range for request in elsewhere)
    assert not any(request.token for request in elsewhere)


def test_a_small_file_that_is_sent_whole(hub, clt, commit, monkeypatch):
    """Some server compresses whatever is asked: what is small is taken whole."""
    hub.compresses = True
    monkeypatch.setattr("huggingface_hub.utils.build_hf_headers", lambda **_: AlwaysGzip())
    assert_same(cp.load(f"hf://{REPO}"), clt)
    assert any(request.file == "config.yaml" and request.status == 200 for request in hub.requests)


class AlwaysGzip(dict):
    def __ior__(self, other):
        return AlwaysGzip(super().__or__(other) | {"Accept-Encoding": "gzip"})
