"""crosslayer-transcoder's configs that cannot be followed, or contradict themselves or the tensors."""

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import clt_plugin as cp
from support.layouts import crosslayer_transcoder as layout


@pytest.fixture
def folder(tmp_path):
    layout.write(tmp_path, "BatchTopK", "Dimensionwise")
    return tmp_path


def edit(folder, change):
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    change(config["model"], config["model"]["init_args"])
    path.write_text(yaml.safe_dump(config))


@pytest.mark.parametrize(
    ("part", "name", "words"),
    [
        ("decoder", "OtherDecoder", "names the decoder OtherDecoder: known are CrosslayerDecoder"),
        ("nonlinearity", "GELU", "names the nonlinearity GELU: known are ReLU, JumpReLU"),
        ("input_standardizer", "SamplewiseInputStandardizer", "by its own deviation, which no weights can hold"),
        ("output_standardizer", "OtherStandardizer", "names the output_standardizer OtherStandardizer: known are"),
        ("decoder", "Decoder", "no tensor decoder.W:"),
        (
            "output_standardizer",
            "LayerwiseOutputStandardizer",
            r"output_standardizer.mean is \(3, 4\), where \(3,\) was expected",
        ),
    ],
)
def test_another_class(folder, part, name, words):
    edit(folder, lambda model, args: args[part].update(class_path=f"crosslayer_transcoder.model.x.{name}"))
    with pytest.raises(cp.FormatError, match=words):
        cp.load(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model, args: args["nonlinearity"]["init_args"].update(k=2.5), "gives no k .found 2.5.: a whole number"),
        (lambda model, args: args["encoder"]["init_args"].update(d_features=8), "says d_features 8, but .* have 7"),
        (lambda model, args: args.pop("encoder"), "names no encoder, decoder and nonlinearity"),
        (lambda model, args: model.update(is_folded=True), "says is_folded, yet names an input_standardizer"),
        (lambda model, args: args.update(input_standardizer=None), "holds input_standardizer.mean"),
    ],
)
def test_contradictions(folder, change, words):
    edit(folder, change)
    with pytest.raises(cp.FormatError, match=words):
        cp.load(folder)


def test_a_deviation_that_is_not_finite(folder):
    path = folder / "checkpoint.safetensors"
    state = load_file(path)
    state["input_standardizer.std"][1, 2] = torch.nan
    save_file(state, path)
    with pytest.raises(cp.FormatError, match=r"input_standardizer.std must hold finite numbers"):
        cp.load(folder, lazy=True)


def test_another_tools_config_is_not_looked_into(tmp_path):
    (tmp_path / "config.yaml").write_text("- a list\n")
    with pytest.raises(cp.FormatError, match="in no known format"):
        cp.load(tmp_path)


def test_some_layers(folder):
    whole, part = cp.load(folder), cp.load(folder, layers=[1, 2])
    assert torch.equal(part.decoder_vectors(0), whole.decoder_vectors(1))
    assert torch.equal(part.b_enc[1], whole.b_enc[2])
