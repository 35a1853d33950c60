"""sparsify's folders: what a config must say before it is read, and which folders are a set."""

from __future__ import annotations

import json
import re

import pytest
import torch

import clt_plugin as cp
from clt_plugin.formats import FORMATS
from clt_plugin.hub import Folder
from support.layouts.sparsify import MLPS, config_of, write, write_one


def changed(folder, **said):
    """Change what a config says; None takes a key out."""
    config = json.loads((folder / "cfg.json").read_text()) | said
    (folder / "cfg.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"activation": "groupmax"}, ["activation 'groupmax'", "only topk"]),
        ({"signed": True}, ["signed", "negative activations"]),
        ({"k": None}, ["cfg.json gives no k", "under that name"]),
        ({"k": "32"}, ["gives no k (found '32')"]),
        ({"d_in": 5}, ["d_in", "5", "4"]),
        ({"num_latents": 8}, ["num_latents", "8", "9"]),
        ({"skip_connection": True}, ["sae.safetensors has no tensor W_skip"]),
    ],
)
def test_refused_configs(tmp_path, said, words):
    write_one(tmp_path / "layers.3.mlp", "transcoder")
    changed(tmp_path / "layers.3.mlp", **said)
    with pytest.raises(cp.FormatError) as error:
        cp.load(tmp_path / "layers.3.mlp")
    assert all(word in str(error.value) for word in words), str(error.value)


def test_what_matters_in_training_alone_is_not_asked_for(tmp_path):
    write_one(tmp_path / "layers.3", "today")
    folder = changed(tmp_path / "layers.3", multi_topk=True, normalize_decoder=False, num_latents=0, expansion_factor=7)
    assert cp.load(folder).n_latents == 9


def test_b_dec_is_subtracted_unless_the_config_says_that_it_transcodes(tmp_path):
    """The same tensors, with and without the key that came with commit f02711e."""
    write_one(tmp_path / "layers.3.mlp", "skip")
    before = cp.load(tmp_path / "layers.3.mlp")
    after = cp.load(changed(tmp_path / "layers.3.mlp", transcode=True))
    assert before.wiring == after.wiring
    shift = before.encoder_vectors(0) @ before.b_dec[0]
    torch.testing.assert_close(before.b_enc[0], after.b_enc[0] - shift)
    assert torch.equal(before.b_dec[0], after.b_dec[0])


def test_a_folder_whose_module_is_not_known(tmp_path):
    for name, words in (
        ("downloaded", "the folder that holds cfg.json is expected to be named after it, such as layers.3.mlp"),
        ("layers.3.self_attn", "is of layers.3.self_attn: known are blocks and their mlp"),
    ):
        write_one(tmp_path / name, "today")
        with pytest.raises(cp.FormatError, match=words):
            cp.load(tmp_path / name)


def test_an_mlp_that_may_be_read_before_or_after(tmp_path):
    write_one(tmp_path / "layers.0.mlp", "2024")
    for reference in (tmp_path / "layers.0.mlp", tmp_path):
        with pytest.raises(cp.FormatError, match=r"does not say transcode.*config.json.*transcode: false"):
            cp.load(reference)
    (tmp_path / "config.json").write_text(json.dumps({"transcode": True}))
    assert cp.load(tmp_path).wiring == cp.Wiring.plt(1, "mlp_in", "mlp_out_before_norm")
    (tmp_path / "config.json").write_text("{}")  # of a run of before there were transcoders
    assert cp.load(tmp_path).wiring == cp.Wiring.sae(("mlp_out_before_norm", 0))


def test_a_skip_of_no_transcoder(tmp_path):
    write_one(tmp_path / "layers.0.mlp", "skip")
    with pytest.raises(cp.FormatError, match="has a skip connection but says transcode: false"):
        cp.load(changed(tmp_path / "layers.0.mlp", transcode=False))


def test_several_kinds_of_hookpoint(tmp_path):
    write(tmp_path, "skip", MLPS)
    write(tmp_path, "2024", ["layers.0", "layers.1"])
    with pytest.raises(cp.FormatError, match="several kinds of hookpoint") as error:
        cp.load(tmp_path)
    suggested = re.findall(r"/(layers\.\S+),", str(error.value))
    assert cp.load(tmp_path / "layers.*.mlp").wiring.n_groups == 3
    assert cp.load(tmp_path / suggested[0]).wiring == cp.Wiring(
        *[tuple((cp.Site("model", "resid_post", layer),) for layer in range(2))] * 2
    )


def test_a_set_of_which_the_run_lists_more(tmp_path):
    write(tmp_path, "skip", MLPS, {"hookpoints": [*MLPS, "layers.3.mlp"]})
    with pytest.raises(cp.FormatError, match=r"config.json lists layers.3.mlp, which the folder lacks"):
        cp.load(tmp_path)
    (tmp_path / "config.json").unlink()
    assert cp.load(tmp_path, layers=[1]).wiring.n_groups == 1


def test_cross_layer_transcoders_of_its_fork_are_not_its_own(tmp_path):
    write(tmp_path, "transcoder", ["h.0.mlp"])
    changed(tmp_path / "h.0.mlp", n_targets=2)
    assert not any(FORMATS["sparsify"].sniff(Folder(folder)) for folder in (tmp_path, tmp_path / "h.0.mlp"))


def test_every_config_is_one_of_that_tool():
    assert all({"k", "d_in", "expansion_factor"} <= config_of(age).keys() for age in ("2024", "skip", "transcoder"))
