"""science-of-finetuning's crosscoders: which layer, which code normalisation, and what is not a fixed function."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import clt_plugin as cp
from support.layouts.dictionary_learning import K, config_of, write


def changed(folder, name="config.json", **said):
    data = json.loads((folder / name).read_text())
    data.get("trainer", data).update(said)
    (folder / name).write_text(json.dumps(data))


def rewritten(folder, **tensors):
    path = folder / "model.safetensors"
    kept = {key: value for key, value in (load_file(path) | tensors).items() if value is not None}
    save_file(kept, path)


def refused(folder, *words):
    with pytest.raises(cp.FormatError) as error:
        cp.load(folder)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "x", "CROSSCODER", True, "nan")
    return tmp_path / "x"


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"code_normalization": "DECOUPLED"}, ["DECOUPLED", "an activation for each model"]),
        ({"code_normalization": "SAE"}, ["config.json says code_normalization SAE", "says CROSSCODER"]),
        ({"code_normalization": "new"}, ["code_normalization NEW", "known are CROSSCODER, SAE, MIXED, NONE"]),
        ({"encoder_layers": [0]}, ["encoder_layers [0]"]),
        ({"latent_processor": "mine"}, ["latent_processor 'mine'"]),
        ({"num_decoder_layers": 1}, ["num_decoder_layers 1"]),
        ({"dict_size": 8}, ["dict_size", "8", "9"]),
        ({"num_layers": 3}, ["num_layers", "3", "2"]),
    ],
)
def test_refused_configs(folder, said, words):
    changed(folder, **said)
    refused(folder, *words)


@pytest.mark.parametrize("code", ["CodeNormalization.CROSSCODER", "crosscoder", None])
def test_names_of_the_code_normalisation(folder, code):
    changed(folder, code_normalization=code)
    assert cp.load(folder).has_measured_threshold


def test_one_that_is_decoupled_by_its_tensors(folder):
    changed(folder, code_normalization=None)
    rewritten(folder, code_normalization_id=torch.tensor(5))
    refused(folder, "model.safetensors says code_normalization number 5", "an activation for each model")


@pytest.mark.parametrize("suffix", ["SAELoss", "Decoupled"])
def test_a_name_that_contradicts_the_default(tmp_path, suffix):
    folder = tmp_path / f"gemma-2-2b-L13-k100-lr1e-04-{suffix}"
    write(folder, None, True, trainer=False)
    refused(folder, "no code_normalization", suffix)


def test_the_layer_is_the_trainers_or_the_names(tmp_path):
    for name, layer in (("gemma-2-2b-crosscoder-l13-mu4.1e-02-lr1e-04", 13), ("Llama-3.2-1B-L8-k100-CCLoss", 8)):
        write(tmp_path / name, None, False, trainer=False)
        assert cp.load(tmp_path / name).wiring == cp.Wiring.model_diff(("base", "chat"), layer)
    write(tmp_path / "mine", None, False, trainer=False)
    refused(tmp_path / "mine", "does not say which layer", "trainer_config.json", "l13")


def test_a_threshold_that_was_never_set(folder):
    rewritten(folder, threshold=torch.tensor(-1.0))
    refused(folder, "threshold is -1", "never set")


def test_a_batchtopk_without_threshold(tmp_path):
    """Something still says what it is: it must not pass for a ReLU."""
    write(tmp_path / "x", None, True)
    rewritten(tmp_path / "x", threshold=None)
    refused(tmp_path / "x", "no tensor threshold")
    changed(tmp_path / "x", k=None)
    rewritten(tmp_path / "x", k=None)
    changed(tmp_path / "x", "trainer_config.json", k_target=K)
    refused(tmp_path / "x", "no tensor threshold")


def test_where_k_comes_from(folder):
    changed(folder, k=None)
    assert cp.load(folder).activation.k == K  # the tensor's
    changed(folder, "trainer_config.json", k_target=5)
    assert cp.load(folder).activation.k == 5
    rewritten(folder, k=None)
    changed(folder, "trainer_config.json", k_target=None)
    refused(folder, "gives no k")


def test_part_of_a_normalisation(folder):
    rewritten(folder, activation_mean=torch.zeros(2, 4))
    refused(folder, "activation_std", "not finite")
    rewritten(folder, activation_std=torch.ones(2, 4), activation_global_scale=torch.tensor([1.0, 0.0]))
    refused(folder, "a scale that is not above 0")
    rewritten(folder, activation_global_scale=torch.ones(3))
    refused(folder, "activation_global_scale has shape (3,), where (2,) was expected")


@pytest.mark.parametrize("code", ["CROSSCODER", "SAE", "MIXED", "NONE"])
def test_scores_are_of_the_decoders_as_stored(tmp_path, code):
    """Folding changes decoder norms, not which latents are on."""
    write(tmp_path / "x", code, True, "normalised")
    changed(tmp_path / "x", code_normalization_alpha_sae=0.7, code_normalization_alpha_cc=0.3)
    crosscoder = cp.load(tmp_path / "x")
    stored = load_file(tmp_path / "x" / "model.safetensors")["decoder.weight"]
    summed, joint = stored.norm(dim=2).sum(0), stored.pow(2).sum((0, 2)).sqrt()
    want = {"CROSSCODER": summed, "SAE": joint, "MIXED": 0.7 * joint + 0.3 * summed, "NONE": torch.ones_like(joint)}
    torch.testing.assert_close(crosscoder.stored_norms[0].data, want[code])
    assert not torch.allclose(crosscoder.stored_norms[0], crosscoder.decoder_norms(0))


def test_a_single_models_autoencoder_is_not_one(tmp_path):
    config = config_of(None, True)
    del config["num_layers"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, "in no known format")
