"""Listings: of files on the Hub, each repository at one commit, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import clt_plugin as cp
from clt_plugin.hub import Folder
from support.hub_server import HubServer, use
from support.layouts import gemma_scope_1, gemma_scope_2, transcoder_bundle
from support.layouts import listing as made

SETTINGS = "model_name: google/gemma-2-2b\nfeature_input_hook: {}\nfeature_output_hook: {}\n"
GS1 = SETTINGS.format("ln2.hook_normalized", "hook_mlp_out")
GS2 = SETTINGS.format("mlp.hook_in", "hook_mlp_out").replace("2-2b", "3-4b-it")


def files(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def listing(head: str, *entries: str) -> bytes:
    return (head + "transcoders:\n" + "".join(f"- {entry}\n" for entry in entries)).encode()


@pytest.fixture
def hub(tmp_path):
    with HubServer() as server, use(server, tmp_path / "cache"):
        yield server


def npz_paths(n_layers: int = 3) -> list[str]:
    return [f"layer_{layer}/width_16k/average_l0_{70 + layer}" for layer in range(n_layers)]


def reconstructs(clt: cp.Crosscoder, oracle) -> None:
    x = [torch.randn(4, clt.layout.width[site]) for site in clt.sites.read]
    got = clt.decode(clt.encode(dict(zip(clt.sites.read, x, strict=True))), dict(zip(clt.sites.read, x, strict=True)))
    for site, want in zip(clt.sites.write, oracle(x), strict=True):
        torch.testing.assert_close(got[site], want)


# ---------------------------------------------------------------- on the Hub


def test_gemma_scope_1_by_its_listing(hub, tmp_path):
    oracle = gemma_scope_1.write_set(tmp_path / "x", npz_paths())
    hub.add("google/some-transcoders", files(tmp_path / "x"))
    entries = [f"hf://google/some-transcoders/{path}/params.npz" for path in npz_paths()]
    hub.add("someone/listing", {"config.yaml": listing(GS1, *entries)})
    clt = cp.load("hf://someone/listing")
    assert clt.wiring == cp.Wiring.plt(3, read="mlp_in_before_gain")
    assert clt.host == cp.Host("google/gemma-2-2b", None, 3, 1)
    reconstructs(clt, oracle)


def test_gemma_scope_1_without_a_listing(hub, tmp_path):
    oracle = gemma_scope_1.write(tmp_path / "x" / "layer_5/width_16k/average_l0_87")
    hub.add("google/gemma-scope-2b-pt-transcoders", files(tmp_path / "x"))
    clt = cp.load("hf://google/gemma-scope-2b-pt-transcoders/layer_5/width_16k/average_l0_87")
    assert [str(site) for site in (*clt.sites.read, *clt.sites.write)] == ["mlp_in_before_gain.5", "mlp_out.5"]
    assert clt.host == cp.Host("google/gemma-2-2b", None, None, 1)
    reconstructs(clt, oracle)


def test_a_gemma_scope_2_clt_by_its_listing(hub, tmp_path):
    oracle = gemma_scope_2.write_sites(tmp_path / "x" / "clt", "clt", gemma_scope_2.ALL, True, "google/gemma-3-4b-it")
    hub.add("google/scope", files(tmp_path / "x"))
    entries = [f"hf://google/scope/clt/params_layer_{i}.safetensors" for i in (0, 1, 2, 2)]
    hub.add("someone/listing", {"clt/config.yaml": listing(GS2 + "model_kind: cross_layer_transcoder\n", *entries)})
    for lazy in (True, False):
        clt = cp.load("hf://someone/listing/clt", lazy=lazy)
        assert clt.wiring == cp.Wiring.clt(3).with_skips()
        reconstructs(clt, oracle)


def test_one_repository_is_asked_for_once(hub, tmp_path):
    gemma_scope_2.write_set(tmp_path / "x")
    hub.add("google/scope", files(tmp_path / "x"))
    names = [f"layer_{i}_width_16k_l0_small_affine/params.safetensors" for i in range(3)]
    hub.add("someone/listing", {"config.yaml": listing(GS2, *(f"hf://google/scope/{name}" for name in names))})
    cp.load("hf://someone/listing", lazy=True)
    asked = [
        r.path for r in hub.requests if r.repo == "google/scope" and "/api/" in r.path and "/resolve/" not in r.path
    ]
    assert len([path for path in asked if "/revision/" in path]) == 1, asked


@pytest.mark.parametrize("form", ["hf://o/bundle/{}?revision={}", "hf://o/bundle/{}@{}"])
def test_revisions(hub, tmp_path, form):
    names = [f"layer_{i}.safetensors" for i in range(3)]
    head = SETTINGS.format("hook_resid_mid", "mlp.hook_out")
    oracles = []
    for version in ("old", "new"):
        folder = tmp_path / version
        folder.mkdir()
        oracles.append(transcoder_bundle.write(folder, "relu", skip=True))
        commit = hub.add("o/bundle", files(folder))
        oracles[-1] = (oracles[-1], commit)
    (old, commit), (new, _) = oracles
    hub.add("o/old", {"config.yaml": listing(head, *(form.format(name, commit) for name in names))})
    hub.add("o/new", {"config.yaml": listing(head, *(f"hf://o/bundle/{name}" for name in names))})
    reconstructs(cp.load("hf://o/old"), old)
    reconstructs(cp.load("hf://o/new"), new)
    reconstructs(cp.load("hf://o/new", revisions={"o/bundle": commit}), old)


def test_a_bundle_with_its_own_k(hub, tmp_path):
    (tmp_path / "x").mkdir()
    oracle = transcoder_bundle.write(tmp_path / "x", "topk", skip=True, stored_k=True)
    hub.add("o/bundle", files(tmp_path / "x"))
    reconstructs(cp.load("hf://o/bundle"), oracle)


def test_files_beside_a_listing_are_of_its_commit(hub, tmp_path):
    head, names = SETTINGS.format("hook_resid_mid", "mlp.hook_out"), [f"layer_{i}.safetensors" for i in range(3)]
    versions = []
    for version in ("old", "new"):
        folder = tmp_path / version
        folder.mkdir()
        oracle = transcoder_bundle.write(folder, "relu", skip=False)
        config = listing(head, *(f"hf://o/bundle/{name}" for name in names))
        versions.append((oracle, hub.add("o/bundle", files(folder) | {"config.yaml": config})))
    for oracle, commit in versions:
        reconstructs(cp.load(f"hf://o/bundle@{commit}"), oracle)


def test_what_is_not_on_the_hub(hub, tmp_path):
    gemma_scope_1.write_set(tmp_path / "x", npz_paths(2))
    hub.add("google/some", files(tmp_path / "x"))
    entries = [f"hf://google/some/{path}/params.npz" for path in npz_paths(3)]
    hub.add("o/listing", {"config.yaml": listing(GS1, *entries)})
    with pytest.raises(cp.FormatError, match=r"average_l0_72/params\.npz, which is not there"):
        cp.load("hf://o/listing")
    hub.add("o/local", {"config.yaml": listing(GS1, str(tmp_path / "layer_0.safetensors"))})
    with pytest.raises(cp.FormatError, match="on no one else's machine"):
        cp.load("hf://o/local")
    hub.add("o/lost", {"config.yaml": listing(GS1, "hf://google/nothing/layer_0.safetensors")})
    with pytest.raises(cp.HubError, match="google/nothing"):
        cp.load("hf://o/lost")


def test_a_branch_that_moves_in_between(hub, tmp_path, monkeypatch):
    """Named twice in two ways, it is asked for once: two commits do not mix."""
    versions = []
    for version in ("old", "new"):
        (tmp_path / version).mkdir()
        versions.append(transcoder_bundle.write(tmp_path / version, "relu", skip=False))
    hub.add("o/bundle", files(tmp_path / "old"))
    entries = ["hf://o/bundle/layer_0.safetensors", "hf://o/bundle/layer_1.safetensors@main"]
    entries.append("hf://o/bundle/layer_2.safetensors?revision=main")
    hub.add("o/listing", {"config.yaml": listing(PLT, *entries)})
    opened = Folder.elsewhere

    def and_then_it_moves(folder, reference):
        found = opened(folder, reference)
        hub.add("o/bundle", files(tmp_path / "new"))
        return found

    monkeypatch.setattr(Folder, "elsewhere", and_then_it_moves)
    clt = cp.load("hf://o/listing")
    reconstructs(clt, versions[0])
    monkeypatch.undo()


def test_its_source_loads_the_same_again(hub, tmp_path):
    """Whatever the branches are at by then, that of the listing and those that it names."""
    (tmp_path / "old").mkdir()
    oracle = transcoder_bundle.write(tmp_path / "old", "relu", skip=False)
    theirs = hub.add("o/bundle", files(tmp_path / "old"))
    entries = [f"hf://o/bundle/{name}" for name in LAYERS[:2]] + ["hf://o/bundle/layer_2.safetensors?revision=main"]
    ours = hub.add("o/listing", {"sub/config.yaml": listing(PLT, *entries)})
    clt = cp.load("hf://o/listing/sub")
    source = clt.metadata["source"]
    assert source == [f"hf://o/listing/sub@{ours}", f"hf://o/bundle@{theirs}"]
    (tmp_path / "new").mkdir()
    transcoder_bundle.write(tmp_path / "new", "relu", skip=False)
    hub.add("o/bundle", files(tmp_path / "new"))
    hub.add("o/listing", {"sub/config.yaml": b""})
    again = cp.load(source)
    reconstructs(again, oracle)
    assert again.metadata["source"] == source


def test_a_listing_here_of_a_gated_repository(hub, tmp_path):
    """Token and revisions hold for what a local listing names, too."""
    for version in ("old", "new"):
        (tmp_path / version).mkdir()
    oracle = transcoder_bundle.write(tmp_path / "old", "relu", skip=False)
    commit = hub.add("o/bundle", files(tmp_path / "old"))
    transcoder_bundle.write(tmp_path / "new", "relu", skip=False)
    hub.add("o/bundle", files(tmp_path / "new"))
    hub.make_private("o/bundle", "hf_secret")
    (tmp_path / "listing").mkdir()
    (tmp_path / "listing" / "config.yaml").write_bytes(listing(PLT, *(f"hf://o/bundle/{name}" for name in LAYERS)))
    with pytest.raises(cp.HubError, match="private"):
        cp.load(tmp_path / "listing")
    clt = cp.load(tmp_path / "listing", token="hf_secret", revisions={"o/bundle": commit})
    reconstructs(clt, oracle)
    assert clt.metadata["source"] == [str(tmp_path / "listing"), f"hf://o/bundle@{commit}"]
    reconstructs(cp.load(clt.metadata["source"], token="hf_secret"), oracle)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("../../../secret/layer_0.safetensors", "on no one else's machine"),
        ("hf://o/x/../../../secret/layer_0.safetensors", "is no folder inside it"),
        ("hf://o/x/layer_0.safetensors?revision=../../v1", "is not a revision"),
        ("hf://../x/layer_0.safetensors", "is not a repository"),
    ],
)
def test_a_listing_of_the_hub_reads_nothing_here(hub, tmp_path, entry, words):
    """From its snapshot's place in the cache, .. would lead to files of this machine."""
    (tmp_path / "cache" / "hub" / "secret").mkdir(parents=True)
    transcoder_bundle.write(tmp_path / "cache" / "hub" / "secret", "relu", skip=False)
    hub.add("o/x", {"config.yaml": listing(PLT, entry), "b/a.txt": b""})
    with pytest.raises(cp.FormatError, match=words):
        cp.load("hf://o/x")


@pytest.mark.parametrize("path", ["../secret.safetensors", "/etc/passwd", "a/../../b"])
def test_a_repository_that_lists_what_is_elsewhere(hub, path):
    hub.add("o/x", {"config.yaml": b"", path: b"x"})
    with pytest.raises(cp.HubError, match="which is no file inside a repository"):
        cp.load("hf://o/x")


# ---------------------------------------------------------------- here


@pytest.fixture
def bundle(tmp_path):
    transcoder_bundle.write(tmp_path, "relu", skip=False)
    return tmp_path


def refused(folder: Path, content: bytes, words: str) -> None:
    (folder / "config.yaml").write_bytes(content)
    with pytest.raises(cp.FormatError, match=re.escape(words)):
        cp.load(folder)


PLT = SETTINGS.format("hook_resid_mid", "mlp.hook_out")
LAYERS = [f"layer_{i}.safetensors" for i in range(3)]
WRONG = {
    "nothing": (PLT + "transcoders: []\n", "lists no transcoders"),
    "a number": (listing(PLT, "3").decode(), "lists 3, where a path or a mapping"),
    "no path": (listing(PLT, "{layer: 3}").decode(), "where a path or a mapping"),
    "no repository": (listing(PLT, "hf://layer_0.safetensors").decode(), "which is not hf://owner/name"),
    "order": (listing(PLT, LAYERS[1], LAYERS[0]).decode(), "lists layer_1.safetensors as layer 0"),
    "a gap": (listing(PLT, LAYERS[0], LAYERS[2]).decode(), "lists layer_2.safetensors as layer 1"),
    "twice": (listing(PLT, *LAYERS, LAYERS[1]).decode(), "lists layer_1.safetensors as layer 3"),
    "absent": (listing(PLT, *LAYERS, "layer_3.safetensors").decode(), "layer_3.safetensors, which is not there"),
    "kind": (listing("model_kind: sae\n" + PLT, *LAYERS).decode(), "model_kind 'sae'"),
    "CLT": (listing("model_kind: cross_layer_transcoder\n" + PLT, *LAYERS).decode(), "lists layer_0.safetensors in a"),
    "no hooks": (listing("", *LAYERS).decode(), "no config says what it reads and writes"),
}


@pytest.mark.parametrize("name", WRONG)
def test_listings_that_cannot_be(bundle, name):
    text, words = WRONG[name]
    refused(bundle, text.encode(), words)


def test_a_repeated_last_entry_is_one_layer(bundle):
    (bundle / "config.yaml").write_bytes(listing(PLT, *LAYERS, LAYERS[-1]))
    assert cp.load(bundle).wiring.n_groups == 3


def test_elsewhere_on_this_machine(bundle, tmp_path):
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "listing").mkdir()
    (tmp_path / "listing" / "config.yaml").write_bytes(listing(PLT, *(str(bundle / name) for name in LAYERS)))
    assert cp.load(tmp_path / "listing").wiring.n_groups == 3
    (tmp_path / "listing" / "config.yaml").write_bytes(listing(PLT, *(f"../{name}" for name in LAYERS)))
    assert cp.load(tmp_path / "listing").wiring.n_groups == 3


def test_layers_by_number(bundle):
    entries = [f"{{layer: {i}, filepath: layer_{i}.safetensors}}" for i in (2, 1)]
    (bundle / "config.yaml").write_bytes(listing(PLT, *entries))
    clt = cp.load(bundle)
    assert (clt.wiring.layers, clt.host.n_layers) == ((1, 2), None)
    refused(bundle, listing(PLT, *entries, "{layer: 1, filepath: ./layer_1.safetensors}"), "layer 1 more than once")


def test_what_is_no_transcoder(bundle):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, bundle / "other.safetensors")
    refused(bundle, listing(PLT, "other.safetensors"), "has no encoder (W_enc or w_enc)")


def test_a_listing_against_its_files(tmp_path):
    made.write_gemma_scope_2(tmp_path)
    text = (tmp_path / "config.yaml").read_text()
    refused(tmp_path, text.replace("mlp.hook_in", "hook_resid_mid").encode(), "listed as if it reads resid_mid")
    refused(tmp_path, text.replace("gemma-3-4b-it", "gemma-3-4b-pt").encode(), "it is listed for google/gemma-3-4b-pt")
    first, second = (f"layer_{i}_width_16k_l0_small_affine/params.safetensors" for i in (0, 1))
    mapping = f"{{layer: 1, filepath: {first}}}"
    head = text.partition("transcoders")[0]
    refused(tmp_path, listing(head, mapping), f"lists {first} as layer 1")
    (tmp_path / "copy").mkdir()
    for name in ("config.json", "params.safetensors"):
        (tmp_path / "copy" / name).write_bytes((tmp_path / second).with_name(name).read_bytes())
    refused(tmp_path, listing(head, "copy/params.safetensors"), "names the layers [1], but it is listed as layer 0")


def test_a_clt_that_loses_a_layer(tmp_path):
    made.write_clt(tmp_path)
    text = (tmp_path / "config.yaml").read_text()
    last = "- clt/params_layer_2.safetensors\n"
    refused(tmp_path, text.replace(last, "").encode(), "does not list params_layer_2.safetensors, of the CLT in")
    set_of = text.replace("cross_layer_transcoder", "transcoder_set")
    refused(tmp_path, set_of.encode(), "lists clt/params_layer_0.safetensors in a transcoder_set")
    (tmp_path / "clt" / "config.json").unlink()
    (tmp_path / "config.yaml").write_text(text)
    assert cp.load(tmp_path).wiring == cp.Wiring.clt(3).with_skips()


def test_gemma_scope_2_without_configs(tmp_path):
    oracle = made.write_gemma_scope_2(tmp_path)
    for path in tmp_path.rglob("config.json"):
        path.unlink()
    reconstructs(cp.load(tmp_path), oracle)
