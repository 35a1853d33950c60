"""Evaluations under write masks, and top activating tokens."""

from __future__ import annotations

import pytest
import torch

from clt_plugin import Wiring, WiringError
from clt_plugin import interventions as iv
from clt_plugin.analysis import STUDIES, activations
from clt_plugin.training.evaluation import evaluate
from support.crosscoders import make_clt
from support.models import N_LAYERS, make_model, make_tokenizer, nnsight_model
from support.toys import written_twice

TEXTS = ["w5 w9 w12 w7 w3 w22", "w14", "w8 w8 w31 w40 w2", "w33 w6 w6 w29 w11 w50 w44 w13"]


def test_conditions_are_evaluations_under_masks():
    hf, clt, settings = make_model("gpt2"), make_clt(), {"tokenizer": make_tokenizer(), "length": 16}
    found = activations.cross_layer_ablation(clt, hf, TEXTS, plt=make_clt(Wiring.plt(N_LAYERS)), **settings)
    assert list(found.by_name) == ["all writes", "span of 2 layers", "own layer alone", "per-layer transcoders"]
    own = evaluate(hf, clt, TEXTS, edits=iv.ablate_cross_layer(), **settings)
    assert found.by_name["own layer alone"] == own
    assert found.table["times_first"].iloc[0] == 1.0
    assert found.by_site.loc["mlp_out.2", "own layer alone"] == own.fvu["mlp_out.2"]
    # What writes the first layer is never dropped.
    assert len(set(found.by_site.loc["mlp_out.0"].iloc[:3])) == 1
    assert found.plot() is not None
    with pytest.raises(WiringError, match="nothing to ablate"):
        activations.cross_layer_ablation(make_clt(Wiring.plt(N_LAYERS)), hf, TEXTS, **settings)


def test_a_write_that_is_needed_is_missed_and_one_that_is_not_is_not():
    """One feature writes at both layers of the toy; where each layer has one of its own, nothing crosses."""
    ids = torch.arange(4).repeat_interleave(2).reshape(4, 2)
    both, own = written_twice(one_feature=True), written_twice(one_feature=False)
    missed = activations.cross_layer_ablation(both.clt, both.hf, ids, length=2)
    assert missed.by_name["all writes"].mean_fvu < 1e-20
    assert missed.by_site.loc["mlp_out.1", "own layer alone"] > 0.9
    assert missed.by_name["own layer alone"].in_loop.kl > 0.01
    fine = activations.cross_layer_ablation(own.clt, own.hf, ids, length=2)
    assert fine.by_name["own layer alone"].mean_fvu < 1e-20
    assert fine.by_name["own layer alone"].in_loop.kl < 1e-12


def test_reconstruction_compares_two():
    hf, settings = make_model("gpt2"), {"tokenizer": make_tokenizer(), "length": 16}
    found = activations.reconstruction(make_clt(), hf, make_clt(Wiring.plt(N_LAYERS)), TEXTS, **settings)
    assert list(found.table["condition"]) == ["CLT", "per-layer"]
    assert found.plot() is not None


def test_top_tokens():
    model, clt = nnsight_model("llama"), make_clt(exclude_first=1)
    found = activations.top_tokens(clt, model, TEXTS, features="0.3, 2.7", k=2, bar=False)
    assert list(found.by_feature) == ["0_3", "2_7"]
    table = found.table
    assert set(table["feature"]) <= {"0_3", "2_7"}
    assert found.plot() is not None
    drawn = activations.top_tokens(clt, model, TEXTS, n=5, bar=False)
    assert len(drawn.by_feature) == 5
    assert drawn.by_feature == activations.top_tokens(clt, model, TEXTS, n=5, bar=False).by_feature
    assert "0_3" in str(found)
    with pytest.raises(iv.EditError, match="written layer"):
        activations.top_tokens(clt, model, TEXTS, features="0:3")


def test_studies_are_registered():
    for name in ("cross-layer-ablation", "reconstruction", "residual-alignment", "gradient-alignment", "top-tokens"):
        assert STUDIES[name].needs[:2] == ("clt", "model")
