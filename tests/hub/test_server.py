"""The Hub that the tests of this folder talk to, seen through the real huggingface_hub."""

import subprocess
import sys
from pathlib import Path

import huggingface_hub as hf
import pytest
import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors
from safetensors.torch import save

from support.hub_server import HubServer, use

REPO, BIG = "owner/name", "a/b.safetensors"
FILES = {"config.yaml": b"a: 1\n", BIG: save({"w": torch.arange(100_000.0)}), "a/deep/c.txt": b"c"}
SIZES = {path: len(content) for path, content in FILES.items()}
MIDDLE = 1 << 17  # a place in the big file at the end of a chunk, so that a cut there loses nothing


@pytest.fixture
def hub(tmp_path):
    with HubServer() as hub, use(hub, tmp_path):
        hub.add(REPO, FILES)
        yield hub


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def test_snapshots(hub, tmp_path):
    snapshot = hf.snapshot_download(REPO)
    assert contents(snapshot) == FILES
    assert hub.fetched(REPO) == SIZES
    hub.forget()
    assert hf.snapshot_download(REPO) == snapshot
    assert [request.path for request in hub.requests] == [f"/api/models/{REPO}/revision/main"]
    assert tmp_path / "hub" in Path(snapshot).parents
    assert tmp_path / "assets" in hf.cached_assets_path("ours").parents
    code = f"import huggingface_hub; print(huggingface_hub.snapshot_download({REPO!r}))"
    assert subprocess.run([sys.executable, "-c", code], stdout=-1, text=True).stdout.strip() == snapshot


def test_revisions(hub, tmp_path):
    first = hub.add(REPO, {"config.yaml": b"first"})
    hub.tag(REPO, "v1", first)
    last = hub.add(REPO, {"config.yaml": b"last", "a/deep/c.txt": None})
    refs = HfApi().list_repo_refs(REPO)
    assert [(ref.name, ref.target_commit) for ref in refs.branches + refs.tags] == [("main", last), ("v1", first)]
    for revision, expected in ((None, b"last"), ("v1", b"first"), (first, b"first")):
        assert Path(hf.hf_hub_download(REPO, "config.yaml", revision=revision)).read_bytes() == expected
    with use(hub, tmp_path, offline=True):
        assert hf.snapshot_download(REPO, revision="v1", allow_patterns="config.yaml").endswith(first)
        with pytest.raises(errors.OfflineModeIsEnabled):
            HfApi().model_info(REPO)


def test_listings_and_parts(hub):
    info = HfApi().model_info(REPO, files_metadata=True)
    assert {file.rfilename: file.size for file in info.siblings} == SIZES
    tree = HfApi().list_repo_tree(REPO, "a", recursive=True, revision=info.sha)
    assert [(entry.path, getattr(entry, "size", None)) for entry in tree] == [
        (BIG, SIZES[BIG]),
        ("a/deep", None),
        ("a/deep/c.txt", 1),
    ]
    assert [entry.path for entry in HfApi().list_repo_tree(REPO)] == ["a", "config.yaml"]
    assert [entry.size for entry in HfApi().get_paths_info(REPO, [BIG, "none"])] == [SIZES[BIG]]
    assert HfApi().parse_safetensors_file_metadata(REPO, BIG).tensors["w"].shape == [100_000]
    assert hub.fetched(REPO) == {BIG: 100_001}
    with hf.HfFileSystem().open(f"{REPO}/{BIG}", block_size=1000, cache_type="none") as file:
        file.seek(200_000)
        assert file.read(8) == FILES[BIG][200_000:200_008]
    assert hub.ranges(REPO, BIG) == ["bytes=0-100000", "bytes=200000-200007"]


@pytest.mark.parametrize(("reset", "error"), [(False, "RemoteProtocolError"), (True, "ReadError")])
def test_cuts(hub, tmp_path, reset, error):
    hub.cut(REPO, BIG, MIDDLE, times=None, reset=reset)
    with pytest.raises(Exception) as caught:  # noqa: PT011 - of an HTTP library that changes its name with releases
        hf.snapshot_download(REPO)
    assert caught.typename == error
    hub.heal()
    hub.forget()
    hub.cut(REPO, BIG, MIDDLE)
    assert contents(hf.snapshot_download(REPO)) == FILES
    assert hub.ranges(REPO, BIG) == [None, f"bytes={MIDDLE}-"]
    assert hub.fetched(REPO) == {BIG: SIZES[BIG]}


def test_failures_and_delays(hub, tmp_path):
    hub.fail(REPO, "config.yaml", times=2)
    hub.slow(REPO, BIG, 5, after=MIDDLE, times=1)
    with use(hub, tmp_path, timeout=0.2):
        assert contents(hf.snapshot_download(REPO)) == FILES
    assert [r.status for r in hub.requests if r.file == "config.yaml"] == [503, 503, 200, 200]
    assert hub.ranges(REPO, BIG) == [None, f"bytes={MIDDLE}-"]
    hub.fail(REPO, status=500)
    with pytest.raises(errors.HfHubHTTPError, match="500"):
        HfApi().model_info(REPO)


@pytest.mark.parametrize("token", [None, "hf_other", "hf_key"])
def test_refusals(hub, tmp_path, token):
    hub.add("owner/secret", FILES)
    hub.make_private("owner/secret", "hf_key")
    hub.gate(REPO, "hf_key")
    hub.add("owner/open", FILES)
    known = token == "hf_key"
    for repo, options, error in [
        (REPO, {}, None if known else errors.GatedRepoError),
        ("owner/secret", {}, None if known else errors.RepositoryNotFoundError),
        ("owner/none", {}, errors.RepositoryNotFoundError),
        ("owner/open", {"revision": "none"}, errors.RevisionNotFoundError),
        ("owner/open", {"filename": "none"}, errors.RemoteEntryNotFoundError),
    ]:
        with use(hub, tmp_path, token=token):
            if error is None:
                assert contents(hf.snapshot_download(repo)) == FILES
                continue
            with pytest.raises(error) as caught:
                hf.hf_hub_download(repo, **{"filename": "config.yaml", **options})
            assert caught.type is error  # a gated repository is also one that is not found


def test_uploads(hub, tmp_path):
    for path, content in {**FILES, "README.md": b"---\nlicense: mit\n---\n"}.items():
        (tmp_path / "ours" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "ours" / path).write_bytes(content)
    new, folder = "owner/ours", tmp_path / "ours"
    with pytest.raises(errors.HfHubHTTPError, match="401"):
        HfApi().create_repo(new)
    with use(hub, tmp_path, token=hub.writer):
        HfApi().create_repo(new, private=True)
        HfApi().create_repo(new, exist_ok=True)
        done = HfApi().upload_folder(repo_id=new, folder_path=folder)
        assert hub.files(new) == contents(folder) == contents(hf.snapshot_download(new, revision=done.oid))
        sha = HfApi().get_paths_info(new, BIG)[0].lfs.sha256
        assert [r.path for r in hub.requests if r.method == "PUT"] == [f"/upload/{new}/{sha}"]
        assert HfApi().upload_folder(repo_id=new, folder_path=folder).oid == done.oid
        moved = [CommitOperationDelete("a/"), CommitOperationAdd("b.safetensors", FILES[BIG])]
        pull = HfApi().create_commit(new, moved, commit_message="Move", create_pr=True)
        assert {*hub.files(new, pull.pr_revision)} == {"README.md", "config.yaml", "b.safetensors"}
        assert BIG in hub.files(new)
