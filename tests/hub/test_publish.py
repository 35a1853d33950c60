"""Publishing: what is uploaded loads again and says what it is; what fails publishes nothing."""

from __future__ import annotations

import re

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
