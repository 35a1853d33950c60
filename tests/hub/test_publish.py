"""Publishing: what is uploaded loads again and says what it is; what fails publishes nothing."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import clt_plugin as cp
from clt_plugin import formats
from support.hub_server import HubServer, use

REPO = "owner/my-clt"


@pytest.fixture
def hub(tmp_path):
    with HubServer() as server, use(server, tmp_path / "machine", token=server.writer):
        yield server


@pytest.fixture
def clt():
    clt = cp.Crosscoder(cp.Wiring.clt(3), 4, 6, "jumprelu", host=cp.Host("google/gemma-2-2b", None, 3, 1))
    for parameter in clt.parameters():
        parameter.data.normal_()
    return clt.eval().requires_grad_(False)


def assert_same(a, b):
    for key, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[key]), key


@pytest.mark.parametrize("format", ["native", "circuit-tracer"])
@pytest.mark.parametrize("folder", [None, "small/v2"])
def test_there_and_back(hub, clt, format, folder):
    reference = clt.push_to_hub(REPO, format=format, folder=folder)
    assert re.fullmatch(rf"hf://{REPO}(/{folder})?@[0-9a-f]{{40}}", reference)
    assert_same(cp.load(reference), clt)
    assert cp.load(reference).host == clt.host


def test_in_the_hubs_idiom(hub, clt, tmp_path):
    reference = clt.push_to_hub(REPO, folder="sub")
    commit = reference.rpartition("@")[2]
    assert_same(cp.Crosscoder.from_pretrained(REPO, subfolder="sub"), clt)
    assert_same(cp.CrossLayerTranscoder.from_pretrained(REPO, subfolder="sub", revision=commit, lazy=True), clt)
    assert_same(cp.Crosscoder.from_pretrained(reference), clt)
    for text, more in (
        (f"hf://{REPO}@{commit}", {"subfolder": "sub"}),
        (f"hf://{REPO}@{commit}", {"subfolder": "/sub/", "revision": commit}),
        (f"hf://{REPO}/sub", {"revision": commit}),
        (f"{REPO}/sub", {}),
    ):
        assert_same(cp.Crosscoder.from_pretrained(text, **more), clt)
    with pytest.raises(ValueError, match="names a revision, and revision='main' another"):
        cp.Crosscoder.from_pretrained(reference, revision="main")
    with pytest.raises(cp.HubError, match=f"no revision main/sub.*hf://{REPO}/sub@main"):
        cp.load(f"hf://{REPO}@main/sub")
    clt.save(tmp_path / "a" / "b")
    assert_same(cp.Crosscoder.from_pretrained(tmp_path / "a", subfolder="b"), clt)
    with pytest.raises(ValueError, match="local folder, which has no revisions"):
        cp.Crosscoder.from_pretrained(tmp_path / "a", revision="main")


def test_the_card(hub, clt):
    clt.metadata = {"recipe": {"tokens": "1B"}}
    clt.push_to_hub(REPO, licence="mit", metrics={"fvu": 0.0612345, "l0": 23.5})
    card = hub.files(REPO)["README.md"].decode()
    front = card.split("---")[1]
    assert "library_name: clt_plugin" in front
    assert "license: mit" in front
    assert "base_model: google/gemma-2-2b" in front
    assert f'cp.load("hf://{REPO}")' in card
    assert clt.wiring.draw() in card
    for row in (
        "| fvu | 0.06123 |",
        "| l0 | 23.5 |",
        "| tokens | 1B |",
        "| reads | mlp_in |",
        "| layers | 0 to 2 (3) |",
    ):
        assert row in card, row
    loaded = cp.load(f"hf://{REPO}")
    assert loaded.metadata["metrics"] == {"fvu": 0.0612345, "l0": 23.5}
    assert loaded.metadata["recipe"] == {"tokens": "1B"}
    assert clt.metadata == {"recipe": {"tokens": "1B"}}  # publishing changes nothing here


def test_a_card_without_a_model(clt):
    clt.host = cp.Host()
    assert "a model that it does not name" in formats.model_card(clt, cp.hub.Reference(REPO))


def test_refused(hub, clt, tmp_path):
    with use(hub, tmp_path / "other", token="hf_wrong"), pytest.raises(cp.HubError, match="token"):
        clt.push_to_hub(REPO)
    with pytest.raises(cp.FormatError, match="TopK"):
        cp.Crosscoder(cp.Wiring.clt(2), 4, 6, "topk", k=2).push_to_hub("owner/never", format="circuit-tracer")
    assert not any("never" in request.path for request in hub.requests)


def test_private_and_private_stays(hub, clt, tmp_path):
    clt.push_to_hub(REPO, private=True)
    with use(hub, tmp_path / "other"), pytest.raises(cp.HubError, match="or it is private"):
        cp.load(f"hf://{REPO}")


# ---------------------------------------------------------------- over what is there


def other(n_layers):
    clt = cp.Crosscoder(cp.Wiring.clt(n_layers), 4, 5, host=cp.Host(None, None, n_layers, 1))
    return clt.eval().requires_grad_(False)


@pytest.mark.parametrize("folder", [None, "small"])
@pytest.mark.parametrize("before", ["native", "circuit-tracer"])
@pytest.mark.parametrize("after", ["native", "circuit-tracer"])
def test_over_an_older_one(hub, clt, before, after, folder):
    """Of another format, or with more layers: none of its files is left, and nothing else is touched."""
    hub.add(
        REPO, {"notes.txt": b"notes", "config.json": b"{}", "below/config.yaml": b"", "below/W_enc_0.safetensors": b""}
    )
    old = other(4).push_to_hub(REPO, format=before, folder=folder)
    reference = clt.push_to_hub(REPO, format=after, folder=folder)
    assert_same(cp.load(reference), clt)
    assert cp.load(old).n_layers == 4
    kept = {"notes.txt", "below/config.yaml", "below/W_enc_0.safetensors"}
    assert kept < {*hub.files(REPO)}
    assert ("config.json" in hub.files(REPO)) == (folder is not None or after == "native" or before == "circuit-tracer")


def test_beside_another_format(hub, clt, tmp_path):
    """What is not ours is not deleted; with it the folder means two things, and is refused."""
    from support.layouts import transcoder_bundle

    (tmp_path / "x").mkdir()
    transcoder_bundle.write(tmp_path / "x", "relu", skip=False)
    hub.add(REPO, tmp_path / "x")
    with pytest.raises(cp.FormatError, match="holds files of transcoder-bundle and native: keep each in"):
        cp.load(clt.push_to_hub(REPO))


def test_private_is_refused_of_what_is_public(hub, clt):
    clt.push_to_hub(REPO)
    before = hub.files(REPO)
    with pytest.raises(cp.HubError, match="there and public: make it private"):
        other(2).push_to_hub(REPO, private=True)
    assert hub.files(REPO) == before
    clt.push_to_hub("owner/secret", private=True)
    clt.push_to_hub("owner/secret", private=True)
    clt.push_to_hub("owner/secret")


def test_to_a_branch(hub, clt):
    other(2).push_to_hub(REPO)
    reference = clt.push_to_hub(REPO, folder="sub", revision="v2")
    assert_same(cp.load(reference), clt)
    assert_same(cp.load(f"hf://{REPO}/sub@v2"), clt)
    assert not any(name.startswith("sub/") for name in hub.files(REPO))
    assert f'cp.load("hf://{REPO}/sub@v2")' in hub.files(REPO, "v2")["sub/README.md"].decode()
    assert_same(cp.load(clt.push_to_hub("owner/new", revision="v1")), clt)


def test_whose_card_it_is(hub, clt):
    def card():
        return hub.files(REPO)["README.md"].decode()

    hub.add(REPO, {"README.md": b"---\nlicense: mit\n---\n\n"})
    clt.push_to_hub(REPO, metrics={"l0": 1})
    assert "| l0 | 1 |" in card()  # what said nothing is replaced
    clt.push_to_hub(REPO, metrics={"l0": 2})
    assert "| l0 | 2 |" in card()  # so is our own
    clt.push_to_hub(REPO, metrics={"l0": 3}, card=False)
    assert "| l0 | 2 |" in card()
    hub.add(REPO, {"README.md": b"# My years of work\n"})
    clt.push_to_hub(REPO)
    assert card() == "# My years of work\n"
    clt.push_to_hub(REPO, card=True)
    assert "library_name: clt_plugin" in card()


# ---------------------------------------------------------------- numbers of every kind


@pytest.mark.parametrize("format", ["native", "circuit-tracer"])
def test_metrics_from_torch_and_numpy(hub, clt, format):
    clt.metadata = {"of": (torch.tensor([1, 2]), np.bool_(True))}
    metrics = {"fvu": torch.tensor(0.5), "l0": np.float32(2), "n": np.int64(3), "by layer": np.array([0.5, 1.0])}
    loaded = cp.load(clt.push_to_hub(REPO, metrics=metrics, format=format))
    assert loaded.metadata["metrics"] == {"fvu": 0.5, "l0": 2.0, "n": 3, "by layer": [0.5, 1.0]}
    assert loaded.metadata["of"] == [[1, 2], True]


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"metrics": {"fvu": object()}}, r"metadata\['metrics'\]\['fvu'\] is a object"),
        ({"recipe": {"steps": [1, {2}]}}, r"metadata\['recipe'\]\['steps'\]\[1\] is a set"),
        ({"metrics": [1, 2]}, r"metadata\['metrics'\] is no mapping"),
    ],
)
def test_what_no_card_can_say(hub, clt, metadata, words):
    clt.metadata = metadata
    with pytest.raises(ValueError, match=words):
        clt.push_to_hub(REPO)
    assert hub.requests == []
