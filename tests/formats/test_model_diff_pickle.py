"""ckkissane's crosscoder: that its activations are scaled is said, and can be folded in."""

from __future__ import annotations

import json

import pytest
import torch

import clt_plugin as cp
from clt_plugin import formats
from support.layouts import dictionary_learning
from support.layouts.model_diff_pickle import CONFIG, write

FACTORS = {"base": 0.28, "chat": 0.24}


def unscaled(oracle, x):
    """What an oracle over scaled activations says of activations."""
    factors = FACTORS.values()
    reconstructed = oracle([one * factor for one, factor in zip(x, factors, strict=True)])
    return [z / factor for z, factor in zip(reconstructed, factors, strict=True)]


def by_site(crosscoder, x):
    return dict(zip(crosscoder.sites.read, x, strict=True))


def test_that_it_acts_on_scaled_activations_is_said_and_kept(tmp_path):
    write(tmp_path)
    with pytest.warns(UserWarning, match=r"input_scale is not stored.*0\.2758961493232058 \(base\)"):
        crosscoder = cp.load(tmp_path)
    crosscoder.save(tmp_path / "native")
    assert cp.load(tmp_path / "native").metadata["input_scale"].startswith("not stored")


@pytest.mark.parametrize("lazy", [False, True])
def test_rescaled_it_acts_on_activations(tmp_path, lazy):
    oracle = write(tmp_path)
    scaled = formats.rescale(formats.describe(tmp_path), FACTORS)
    crosscoder = formats.build(scaled, lazy=lazy)
    x = [torch.randn(5, 4), torch.randn(5, 4)]
    want = unscaled(oracle, x)
    got = crosscoder(by_site(crosscoder, x))
    for y, site in zip(want, crosscoder.sites.write, strict=True):
        torch.testing.assert_close(got[site], y)
    assert crosscoder.metadata["input_scale"] == {"folded in": FACTORS}


def test_rescaling_what_is_already_normalised(tmp_path):
    """Scales multiply, and a bias that is computed is divided as well."""
    oracle = dictionary_learning.write(tmp_path / "x", "SAE", True, "normalised")
    crosscoder = formats.build(formats.rescale(formats.describe(tmp_path / "x"), FACTORS))
    x = [torch.randn(5, 4), torch.randn(5, 4)]
    want = unscaled(oracle, x)
    for y, got in zip(want, crosscoder(by_site(crosscoder, x)).values(), strict=True):
        torch.testing.assert_close(got, y)


@pytest.mark.parametrize("factors", [{"base": 0.3}, {"base": 0.3, "chat": 0.0}, {"base": 1, "chat": 1, "other": 1}])
def test_factors_for_each_model(tmp_path, factors):
    write(tmp_path)
    with pytest.raises(ValueError, match="a factor above 0 is needed for each of base, chat"):
        formats.rescale(formats.describe(tmp_path), factors)


def test_sites_that_are_not_stored_apart(tmp_path):
    cp.Crosscoder(cp.Wiring.model_diff(("base", "chat"), 3), 4, 7).save(tmp_path / "native")
    with pytest.raises(ValueError, match="does not store its sites apart"):
        formats.rescale(formats.describe(tmp_path / "native"), FACTORS)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"d_in": None}, "gives no d_in"),
        ({"dict_size": "many"}, "gives no dict_size"),
        ({"dict_size": 8}, r"W_enc has shape \(2, 4, 7\), where \(2, 4, 8\) was expected"),
        ({"hook_point": "blocks.14.attn.hook_z"}, "attn.hook_z"),
        ({"hook_point": None}, "not a place in a block"),
    ],
)
def test_refused_configs(tmp_path, said, words):
    write(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps(CONFIG | said))
    with pytest.raises(cp.FormatError, match=words):
        cp.load(tmp_path)
