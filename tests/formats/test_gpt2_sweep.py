"""The GPT-2 sweep's folders that are incomplete or of two minds."""

import pytest
from safetensors.torch import load_file, save_file

import clt_plugin as cp
from support.layouts import gpt2_sweep as layout


@pytest.fixture
def folder(tmp_path):
    layout.write(tmp_path, True)
    return tmp_path


@pytest.mark.parametrize("name", ["encoder_layer_0", "encoder_layer_2", "decoder_layer_2", "decoder_layer_0"])
def test_a_layer_that_is_missing(folder, name):
    (folder / f"{name}.safetensors").unlink()
    with pytest.raises(cp.FormatError, match=f"{name}.*missing"):
        cp.load(folder)


def test_a_skip_at_some_layers_only(folder):
    path = folder / "decoder_layer_1.safetensors"
    save_file({key: value for key, value in load_file(path).items() if key != "W_skip"}, path)
    with pytest.raises(cp.FormatError, match=r"have a W_skip, but decoder_layer_1.safetensors has none"):
        cp.load(folder)


def test_an_empty_layer(folder):
    path = folder / "encoder_layer_1.safetensors"
    save_file(load_file(path) | {"W_enc": load_file(path)["W_enc"][:0].clone()}, path)
    with pytest.raises(cp.FormatError, match=r"W_enc must be \(F, d\), not \(0, 4\)"):
        cp.load(folder)
