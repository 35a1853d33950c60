"""References, and loading from a cache in the Hub's own layout, offline."""

from pathlib import Path

import pytest

import clt_plugin as cp
from clt_plugin.hub import Folder, Reference

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://mntss/clt-gemma-2-2b-426k", ("mntss/clt-gemma-2-2b-426k", None, None)),
        ("hf://o/n@main", ("o/n", None, "main")),
        ("hf://o/n@refs/pr/3", ("o/n", None, "refs/pr/3")),
        (f"hf://o/n/a/b_c.d@{COMMIT}", ("o/n", "a/b_c.d", COMMIT)),
        ("hf://o/n/folder/", ("o/n", "folder", None)),
        ("hf://o/n//", ("o/n", None, None)),
        ("hf://o/n/a//@v1", ("o/n", "a", "v1")),
    ],
)
def test_references(text, expected):
    assert Reference.parse(text) == Reference(*expected)


@pytest.mark.parametrize("text", ["hf://", "hf://owner", "hf:/o/n", "https://huggingface.co/o/n", "hf://o/n@", "o/n"])
def test_what_is_no_reference(text):
    with pytest.raises(ValueError, match="hf://owner/name"):
        Reference.parse(text)


@pytest.mark.parametrize(
    "text",
    ["hf://o/n/../x", "hf://o/n/a/../../b", "hf://../n", "hf://o/..", "hf://o/n//a", "hf://o/n/a//b", "hf://o/n@../v1"],
)
def test_references_that_lead_elsewhere(text):
    with pytest.raises(ValueError, match=r"without \.\."):
        Reference.parse(text)


@pytest.mark.parametrize("name", ["..", "../b", "/etc", "a//b", "", "a/.."])
def test_folders_hold_what_is_in_them(tmp_path, name):
    with pytest.raises(cp.FormatError, match="is no folder inside it"):
        Folder(tmp_path) / name


def test_labels(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    assert [Folder(Path(name)).label for name in (".", "..", "../a")] == ["a", tmp_path.name, "a"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Point the Hub's cache to a folder of our own, with one repository in it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--owner--some-clt"
    (repository / "refs").mkdir(parents=True)
    for revision in ("main", "v1"):
        (repository / "refs" / revision).write_text(COMMIT)
    clt = cp.Crosscoder(cp.Wiring.clt(2), 4, 6)
    clt.save(repository / "snapshots" / COMMIT / "small", format="circuit-tracer")
    return clt


@pytest.mark.parametrize("revision", ["", "@main", "@v1", f"@{COMMIT}"])
def test_load_from_the_cache(cache, revision):
    import torch

    loaded = cp.load(f"hf://owner/some-clt/small{revision}", lazy=True)
    assert torch.equal(loaded.encoder_vectors(1), cache.encoder_vectors(1))


def test_a_folder_that_is_not_there(cache):
    with pytest.raises(cp.HubError, match="not in the cache"):
        cp.load("hf://owner/some-clt/big")


def test_a_repository_that_is_not_cached(cache):
    with pytest.raises(cp.HubError, match="not in the cache"):
        cp.load("hf://owner/other")
