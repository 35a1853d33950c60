"""Evaluation against a run of one text at a time through the tests' own reference, in float64."""

from __future__ import annotations

import json

import pytest
import torch

from clt_plugin import AttachError, Crosscoder, Wiring, WiringError
from clt_plugin import interventions as iv
from clt_plugin.core.wiring import Site
from clt_plugin.training.data import DataError, Tokens
from clt_plugin.training.evaluation import evaluate
from support.crosscoders import make_clt
from support.models import D_MODEL, N_LAYERS, bridge_model, make_model, make_tokenizer, nnsight_model
from support.reference import reference_run
from support.toys import boolean_toy

TEXTS = ["w5 w9 w12 w7 w3 w22", "w14", "w8 w8 w31 w40 w2", "w33 w6 w6 w29 w11 w50 w44 w13"]
F64 = torch.float64


def _without(clt, edit):
    """A copy whose dropped writes are zeros."""
    copy = make_clt(dtype=F64, exclude_first=clt.host.exclude_first)
    for group, site in edit.dropped(copy.wiring):
        copy.W_dec[group][:, copy.layout.write_slices[group][site]] = 0
    return copy


def _oracle(hf, clt):
    """FVU by layer, L0 and firing shares by layer, and what the model says, from one text at a time."""
    first, true, recon, acts, said = clt.host.exclude_first, [], [], [], []
    for text in TEXTS:
        ids = torch.tensor([make_tokenizer()(text)["input_ids"]])
        run = reference_run(hf, ids, clt, "replace_with_error")
        replaced = reference_run(hf, ids, clt, "replace")["logits"][0]
        natural = hf(input_ids=ids, use_cache=False).logits[0]
        keep = slice(max(first, 1), None)  # BOS never counts
        true.append(torch.stack([run["true"][layer][0, keep] for layer in range(N_LAYERS)]))
        recon.append(torch.stack([run["recon"][layer][0, keep] for layer in range(N_LAYERS)]))
        acts.append(torch.stack([run["features"][layer][0, keep] for layer in range(N_LAYERS)]))
        for t in range(max(first, 1), ids.shape[1] - 1):
            p, q = natural[t].softmax(-1), replaced[t].softmax(-1)
            token = ids[0, t + 1]
            same = float(p.argmax() == q.argmax())
            said.append([-p[token].log(), -q[token].log(), (p * (p / q).log()).sum(), same])
    y, y_hat, f = torch.cat(true, 1), torch.cat(recon, 1), torch.cat(acts, 1)
    fvu = (y - y_hat).square().sum((1, 2)) / (y - y.mean(1, keepdim=True)).square().sum((1, 2))
    return fvu, (f != 0).double().mean(1), torch.tensor(said, dtype=F64)


@pytest.mark.parametrize("edit", [None, iv.ablate_cross_layer()], ids=["whole", "same-layer"])
@pytest.mark.parametrize("exclude_first", [0, 2])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_all_measures_equal_those_of_one_text_at_a_time(family, exclude_first, edit):
    hf, clt = make_model(family, F64), make_clt(dtype=F64, exclude_first=exclude_first)
    found = evaluate(hf, clt, TEXTS, tokenizer=make_tokenizer(), length=32, batch_size=3, edits=edit)
    fvu, share, said = _oracle(hf, clt if edit is None else _without(clt, edit))
    assert found.n_tokens == sum(len(text.split()) + 1 - max(exclude_first, 1) for text in TEXTS)
    assert list(found.fvu) == ["mlp_out.0", "mlp_out.1", "mlp_out.2"]
    torch.testing.assert_close(torch.tensor(list(found.fvu.values()), dtype=F64), fvu)
    torch.testing.assert_close(torch.tensor(list(found.l0.values()), dtype=F64), share.sum(1))
    torch.testing.assert_close(torch.tensor(list(found.dead.values()), dtype=F64), (share == 0).double().mean(1))
    torch.testing.assert_close(torch.tensor(list(found.dense.values()), dtype=F64), (share > 0.1).double().mean(1))
    loop = found.in_loop
    assert loop.n_predictions == len(said)
    measured = torch.tensor([loop.loss, loop.replaced_loss, loop.kl, loop.top1], dtype=F64)
    torch.testing.assert_close(measured, said.mean(0), rtol=1e-6, atol=1e-9)
    assert loop.delta_loss == pytest.approx(float((said[:, 1] - said[:, 0]).mean()), rel=1e-6)


def test_a_perfect_dictionary_explains_everything():
    toy = boolean_toy()
    # Each text of the toy is one token, which predicts none: two in a row are two inputs.
    found = evaluate(toy.hf, toy.clt, torch.arange(16).reshape(8, 2), length=2)
    assert found.mean_fvu < 1e-20
    assert found.in_loop.kl < 1e-12
    assert found.in_loop.top1 == 1.0
    assert abs(found.in_loop.delta_loss) < 1e-12


def test_libraries_agree_and_rows_can_be_given():
    clt = make_clt(exclude_first=1)
    plain = evaluate(make_model("llama"), clt, TEXTS, tokenizer=make_tokenizer(), length=16)
    for model in (nnsight_model("llama"), bridge_model("llama")):
        assert _close(evaluate(model, clt, TEXTS, length=16, batch_size=1), plain)
    given = Tokens(TEXTS, make_tokenizer(), length=16, pack=False)
    assert _close(evaluate(make_model("llama"), clt, given), plain)


def _close(one, other):
    return one.table["value"].tolist() == pytest.approx(other.table["value"].tolist(), rel=1e-4)


def test_what_cannot_replace_is_only_observed():
    sites = [Site("model", "resid_post", layer) for layer in range(N_LAYERS)]
    crosscoder = make_clt(Wiring.acausal(sites))
    found = evaluate(make_model("gpt2"), crosscoder, TEXTS, tokenizer=make_tokenizer(), length=16)
    assert found.in_loop is None
    assert "resid_post" in found.why_not_in_loop
    assert list(found.fvu) == [str(site) for site in sites]
    assert len(found.l0) == 1
    models = {"base": make_model("gpt2"), "chat": make_model("gpt2")}
    diff = make_clt(Wiring.model_diff(models, layer=1))
    found = evaluate(models, diff, TEXTS, tokenizer=make_tokenizer(), length=16)
    assert found.why_not_in_loop == "it spans several models"
    base, chat = found.fvu.values()
    assert base > 0
    assert chat > 0
    assert "several models" in str(found)


def test_it_stops_leaves_modes_alone_and_says_what_it_found():
    hf, clt = make_model("gpt2"), make_clt(exclude_first=1)
    clt.train()
    found = evaluate(hf, clt, TEXTS, tokenizer=make_tokenizer(), length=16, batch_size=1, max_tokens=7, in_loop=False)
    assert clt.training
    assert found.n_tokens == 7  # texts of six tokens and of one
    assert found.why_not_in_loop == "it was not asked for"
    data = json.loads(json.dumps(found.to_dict()))
    assert data["fvu"]["mlp_out.1"] == found.fvu["mlp_out.1"]
    assert set(found.table["measure"]) == {"fvu", "l0", "dead", "dense"}


def test_refusals():
    hf, clt = make_model("gpt2"), make_clt()
    with pytest.raises(iv.EditError, match="write masks alone, not under set_value"):
        evaluate(hf, clt, TEXTS, tokenizer=make_tokenizer(), edits=iv.set_value(layer=0, feature=1, value=2.0))
    with pytest.raises(DataError, match="no token of these texts counts"):
        evaluate(hf, make_clt(exclude_first=2), ["w3", "w5"], tokenizer=make_tokenizer(), length=16)
    unmeasured = Crosscoder(Wiring.clt(N_LAYERS), D_MODEL, 8, "batchtopk", k=2)
    with pytest.raises(WiringError, match="thresholds were not measured"):
        evaluate(hf, unmeasured, TEXTS, tokenizer=make_tokenizer(), length=16, in_loop=False)
    wide = Crosscoder(Wiring.clt(N_LAYERS), D_MODEL + 1, 4)
    with pytest.raises(AttachError, match="width 17"):
        evaluate(hf, wide, TEXTS, tokenizer=make_tokenizer(), length=16)
