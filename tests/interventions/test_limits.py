"""Where a mode cannot be exact, or an edit can do nothing, it is said; and what was quietly wrong before."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import clt_plugin as cp
from clt_plugin import interventions as iv
from support.crosscoders import make_clt
from support.models import make_model

IDS = [[0, 5, 9, 12, 7]]


def test_local_needs_the_whole() -> None:
    model, clt = make_model("gpt2"), make_clt()
    with pytest.raises(cp.AttachError, match="those left out would stand frozen in the errors"):
        cp.intervene(model, IDS, iv.set_value(0, 3, value=5.0), "local", clt=clt.select([0, 1]))
    for mode in ("direct", "iterative"):
        whole = cp.intervene(model, IDS, iv.set_value(0, 3, value=5.0), mode, clt=clt).logits
        part = cp.intervene(model, IDS, iv.set_value(0, 3, value=5.0), mode, clt=clt.select([0, 1])).logits
        assert_close(part, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["direct", "iterative", "local"])
def test_without_edits_a_rounded_crosscoder_changes_nothing(mode: str, dtype: torch.dtype) -> None:
    model, clt = make_model("llama", dtype), make_clt(dtype=torch.bfloat16)
    result = cp.intervene(model, IDS, None, mode, clt=clt)
    assert_close(result.logits, result.baseline, rtol=1e-5, atol=1e-5)
    assert result.changed_features() == []


def test_conditions_when_groups_are_not_in_layer_order() -> None:
    model, clt = make_model("gpt2"), make_clt()
    edit = iv.only(iv.set_value(2, 5, value=30.0), where=iv.not_(iv.active(0, 3, above=1e9)))
    shuffled = clt.select([2, 1, 0])
    for mode in ("direct", "iterative"):
        expected = cp.intervene(model, IDS, edit, mode, clt=clt).logits
        assert_close(cp.intervene(model, IDS, edit, mode, clt=shuffled).logits, expected, rtol=1e-5, atol=1e-5)


def test_edits_that_write_nothing_within_the_range() -> None:
    model, clt = make_model("gpt2"), make_clt()
    with pytest.warns(UserWarning, match=r"layer 2 write none of the constrained layers \[0\]"):
        result = cp.intervene(model, IDS, iv.set_value(2, 5, value=9.0), "constrained", layers=range(1), clt=clt)
    assert_close(result.logits, result.baseline, rtol=1e-5, atol=1e-5)


def test_an_edit_saved_for_the_whole_and_a_selection() -> None:
    clt = make_clt()
    saved = iv.from_json(iv.ablate(0, 3).to_json(clt=clt))
    saved.check(clt)
    with pytest.raises(iv.EditError, match="this is a selection, whose features may be numbered otherwise"):
        saved.check(clt.select([0]))


def test_generation_encodes_only_what_edits_are_about(monkeypatch: pytest.MonkeyPatch) -> None:
    model, clt, encoded = make_model("gpt2"), make_clt(), set()
    pre_activations = cp.Crosscoder.pre_activations
    monkeypatch.setattr(
        cp.Crosscoder, "pre_activations", lambda self, group, x: encoded.add(group) or pre_activations(self, group, x)
    )
    for edit, groups in ((iv.add(1, 3, value=2.0), {1}), (iv.only_span(2), {0}), (iv.ablate_handoff(0, 2), set())):
        encoded.clear()
        iv.generate(model, IDS, edit, max_new_tokens=2, clt=clt)
        assert encoded == groups
