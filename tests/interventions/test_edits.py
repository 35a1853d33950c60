"""Edits as values: what they say of themselves, how they compose, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import warnings
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given

from clt_plugin import Wiring
from clt_plugin import interventions as iv
from clt_plugin.interventions._places import Restriction, indices_apart
from interventions.strategies import edits, quietly_chain, restrictions
from support.crosscoders import make_clt

EXAMPLES = {
    "scale(layer=3, feature=811, by=2.0)": iv.scale(layer=3, feature=811, by=2),
    "set_value(layer='3_1', feature=[5, 2], value=[0.5, 1.0])": iv.set_value("3_1", (5, 2), value=np.array([0.5, 1.0])),
    "ablate(layer=5, feature=42)": iv.ablate(layer=5, feature=42),
    "ablate(layer=5, feature=42, mean=0.25)": iv.ablate(layer=5, feature=42, mean=0.25),
    "clamp(layer=0, feature=1, max=3.0)": iv.clamp(layer=0, feature=1, max=3.0),
    "add(group=supernode('Texas', {3: [811, 4], 5: [7]}), value=1.0)": iv.add(
        group=iv.supernode("Texas", {3: [811, 4], 5: 7}), value=1
    ),
    "scale(group={1: [2], 0: [3]}, by=tensor(2.0, requires_grad=True))": iv.scale(
        group={1: 2, 0: 3}, by=torch.tensor(2.0, requires_grad=True)
    ),
    "only(ablate(layer=5, feature=42), position=-1)": iv.only(iv.ablate(layer=5, feature=42), position=-1),
    "only(ablate(layer=5, feature=42), position=slice(4, None), batch=[0, 2], tokens='generated')": iv.only(
        iv.ablate(layer=5, feature=42), position=slice(4, None), batch=(2, 0, 2), tokens="generated"
    ),
    "only(scale(layer=3, feature=1, by=0.0), tokens=[5, 7], "
    "where=all_of(active(layer=3, feature=811, above=0.5, position='any'), not_(active(layer=0, feature=2))))": iv.only(
        iv.scale(layer=3, feature=1, by=0),
        tokens=[7, 5],
        where=iv.all_of(iv.active(3, 811, above=0.5, position="any"), iv.inactive(0, 2)),
    ),
    "chain(scale(layer=3, feature=811, by=2.0), ablate_cross_layer(min_distance=2))": iv.chain(
        iv.scale(layer=3, feature=811, by=2.0), iv.only_span(2)
    ),
}
NAMES = {name: getattr(iv, name) for name in iv.__all__} | {"tensor": torch.tensor}


@pytest.mark.parametrize("text", EXAMPLES)
def test_an_edit_is_shown_as_the_code_that_makes_it(text):
    assert repr(EXAMPLES[text]) == text


@given(edits())
def test_code_shown_makes_an_equal_edit(edit):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = eval(repr(edit), NAMES)
    assert again == edit
    assert hash(again) == hash(edit)


@given(edits())
def test_json_round_trip(edit):
    again = iv.from_json(edit.to_json())
    assert again == edit
    assert again.to_dict() == edit.to_dict()
    assert repr(again) == repr(edit)
    assert iv.from_dict(edit.to_dict()) == edit


def test_tensors_are_saved_by_value():
    edit = iv.scale(group={3: [1, 2], 5: 0}, by=torch.tensor([0.1, 2.0, 3.0], requires_grad=True))
    again = iv.from_json(edit.to_json())
    assert again == edit
    assert again.by == tuple(torch.tensor([0.1, 2.0, 3.0]).tolist())


def test_json_goes_to_a_file_and_back(tmp_path):
    edit = EXAMPLES["chain(scale(layer=3, feature=811, by=2.0), ablate_cross_layer(min_distance=2))"]
    path = tmp_path / "edit.json"
    assert json.loads(edit.to_json(path)) == json.loads(path.read_text())
    assert iv.from_json(path) == iv.from_json(str(path)) == edit


def test_equality_goes_by_what_an_edit_does():
    edit = iv.scale(layer=3, feature=811, by=2.0)
    assert edit == iv.scale(layer="3", feature=[811], by=torch.tensor(2.0, requires_grad=True))
    assert edit == iv.scale(group={3: 811}, by=np.float32(2))
    assert edit == iv.scale(group={3: 811}, by=torch.tensor([2.0]))
    others = (
        iv.scale(layer=3, feature=811, by=2.5),
        iv.scale(layer=3, feature=812, by=2.0),
        iv.scale(layer=4, feature=811, by=2.0),
        iv.add(layer=3, feature=811, value=2.0),
        iv.scale(group=iv.supernode("a", {3: 811}), by=2.0),
        iv.only(edit, position=0),
        iv.chain(edit, iv.ablate(layer=4, feature=0)),
    )
    assert all(edit != other for other in others)
    assert iv.only(edit, position=range(3)) == iv.only(edit, position=[2, 1, 0])
    assert iv.ablate(layer=0, feature=0) != iv.ablate(layer=0, feature=0, mean=0.0)


def test_edits_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        iv.scale(layer=3, feature=811, by=2.0).by = 3.0


@given(edits(), edits(), edits())
def test_chain_is_associative(a, b, c):
    one, other = quietly_chain(quietly_chain(a, b), c), quietly_chain(a, quietly_chain(b, c))
    assert one == other == quietly_chain(a, b, c)
    assert [part.edit for part in one.parts()] == [part.edit for e in (a, b, c) for part in e.parts()]


def test_chains_of_one_and_of_none():
    edit = iv.ablate(layer=0, feature=1)
    assert iv.chain(edit) is edit
    assert list(iv.chain().parts()) == []
    assert iv.only(edit) is edit


@given(edits(), restrictions(), restrictions())
def test_only_within_only_holds_both(edit, a, b):
    try:
        both = iv.only(iv.only(edit, **a), **b)
    except iv.EditError:
        return
    within = [part.within for part in edit.parts()]
    for part, before in zip(both.parts(), within, strict=True):
        assert part.within[: len(before)] == before
        assert part.within[len(before) :] == tuple(restriction(each) for each in (a, b) if each)


def restriction(arguments):
    return Restriction.of(*(arguments.get(name) for name in ("layer", "position", "batch", "tokens", "where")))


def test_layers_are_those_that_are_left():
    group = iv.scale(group={10: 1, 2: 2, "2_1": 3}, by=2.0)
    assert group.layers() == ("2", "2_1", "10")
    assert iv.only(group, layer=[10, 2]).layers() == ("2", "10")
    assert iv.only(group, layer="2_1").layers() == ("2_1",)
    assert iv.only(iv.only(group, layer=[10, 2]), layer=[2, "2_1"]).layers() == ("2",)
    assert iv.chain(iv.only(group, layer=10), iv.add(layer=3, feature=0, value=1)).layers() == ("3", "10")
    assert iv.ablate_cross_layer().layers() == ()


def test_watched_are_the_groups_of_conditions():
    where = iv.any_of(iv.active(1, 0), iv.not_(iv.all_of(iv.active("2_1", 0), iv.active(3, 5))))
    edit = iv.chain(iv.only(iv.ablate(layer=4, feature=1), where=where), iv.ablate(layer=9, feature=0))
    assert edit.watched() == {"1", "2_1", "3"}


# ---------------------------------------------------------------- collisions

A, B = iv.scale(layer=3, feature=[811, 42], by=2.0), iv.ablate(layer=3, feature=42)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (A, B),
        (B, B),
        (iv.only(A, position=0), iv.only(B, position=-1)),
        (iv.only(A, position=slice(2, None)), iv.only(B, position=[0, 5])),
        (iv.only(A, position=0), iv.only(B, batch=1)),
        (iv.only(A, tokens=[1, 2]), iv.only(B, tokens=2)),
        (iv.only(A, tokens="prompt"), iv.only(B, tokens=2)),
        (iv.only(A, tokens="prompt"), iv.only(B, tokens="prompt")),
        (iv.only(A, where=iv.active(3, 0)), iv.only(B, where=iv.inactive(3, 1))),
    ],
)
def test_two_edits_that_can_hit_one_feature_warn(one, other):
    with pytest.warns(UserWarning, match="can both hit feature") as caught:
        joined = iv.chain(one, other)
    assert len(caught) == 1
    assert all(repr(edit) in str(caught[0].message) for edit in (one, other))
    assert caught[0].filename == __file__
    # Once: neither another edit, nor a restriction, nor a file says it again.
    again = iv.chain(iv.only(joined, batch=0), iv.ablate(layer=4, feature=42))
    assert iv.from_json(again.to_json()) == again


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (A, iv.ablate(layer=3, feature=7)),
        (A, iv.ablate(layer=4, feature=42)),
        (iv.only(A, position=0), iv.only(B, position=1)),
        (iv.only(A, position=-1), iv.only(B, position=-2)),
        (iv.only(A, position=slice(4)), iv.only(B, position=slice(4, None))),
        (iv.only(A, position=slice(0, None, 2)), iv.only(B, position=slice(1, None, 2))),
        (iv.only(A, position=slice(2, 5)), iv.only(B, position=[0, 1, 5])),
        (iv.only(iv.only(A, batch=0), position=1), iv.only(B, batch=[1, 2])),
        (iv.only(A, tokens="prompt"), iv.only(B, tokens="generated")),
        (iv.only(A, tokens=1), iv.only(B, tokens=2)),
        (iv.only(A, where=iv.active(3, 0)), iv.only(B, where=iv.inactive(3, 0))),
        (iv.only(iv.add(group={3: 42, 4: 42}, value=1), layer=4), B),
    ],
)
def test_edits_that_cannot_meet_do_not_warn(one, other):
    iv.chain(one, other)


BOUNDS = (None, -2, -1, 0, 1, 2, 4)
SLICES = [slice(start, stop, step) for start, stop, step in product(BOUNDS, BOUNDS, (None, 2, 4))]
INDICES = [(i,) for i in range(-3, 4)] + [(-2, 1), (0, 3), *(index for index in SLICES if range(-9, 9)[index])]


def test_indices_apart_meet_nowhere():
    met = {index: [chosen(INDICES[index], n) for n in range(14)] for index in range(len(INDICES))}
    for one, other in product(range(len(INDICES)), repeat=2):
        a, b = INDICES[one], INDICES[other]
        meet = any(p & q for p, q in zip(met[one], met[other], strict=True))
        if indices_apart(a, b):
            assert not meet, (a, b)
        elif not ends_count(a) and not ends_count(b):
            assert meet, (a, b)


def chosen(index, n):
    if isinstance(index, slice):
        return set(range(n)[index])
    return {range(n)[i] for i in index if -n <= i < n}


def ends_count(index):
    bounds = (index.start, index.stop) if isinstance(index, slice) else index
    return any(bound is not None and bound < 0 for bound in bounds)


# ---------------------------------------------------------------- refusals

SCALE = {"layer": 3, "feature": 1, "by": 2.0}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: iv.scale(**SCALE | {"by": math.nan}), "by is a finite number, not nan"),
        (lambda: iv.scale(**SCALE | {"by": torch.tensor(math.nan)}), "by is tensor(nan): strengths are finite"),
        (lambda: iv.scale(**SCALE | {"by": "2"}), "by is a finite number, not '2'"),
        (lambda: iv.scale(**SCALE | {"by": None}), "by is a finite number, not None"),
        (lambda: iv.scale(**SCALE | {"by": [1.0, 2.0]}), "by has 2 numbers for 1 features"),
        (lambda: iv.scale(**SCALE | {"by": torch.ones(1, 1)}), "not a tensor of shape (1, 1)"),
        (lambda: iv.set_value(layer=0, feature=0, value=math.inf), "value is a finite number, not inf"),
        (lambda: iv.ablate(layer=0, feature=0, mean=[1, math.nan]), "mean is a finite number, not nan"),
        (lambda: iv.clamp(layer=0, feature=0), "clamp needs min, max or both"),
        (lambda: iv.clamp(layer=0, feature=0, min=2, max=1), "clamp's min 2.0 exceeds its max 1.0"),
        (lambda: iv.scale(**SCALE | {"feature": -1}), "there is no feature -1"),
        (lambda: iv.scale(**SCALE | {"feature": []}), "none were given"),
        (lambda: iv.scale(**SCALE | {"feature": [1, 1]}), "given twice"),
        (lambda: iv.scale(**SCALE | {"feature": 1.5}), "a feature is a whole number, not 1.5"),
        (lambda: iv.scale(**SCALE | {"feature": True}), "a feature is a whole number, not True"),
        (lambda: iv.scale(**SCALE | {"layer": -1}), "there is no layer -1"),
        (lambda: iv.scale(**SCALE | {"layer": "3_0"}), "not '3_0'"),
        (lambda: iv.scale(layer=3, by=2.0), "say which features"),
        (lambda: iv.scale(**SCALE, group={3: 1}), "say which features"),
        (lambda: iv.supernode("none", {}), "features are given by layer"),
        (lambda: iv.only(B, position=1.0), "position is a whole number, not 1.0"),
        (lambda: iv.only(B, position=[]), "none were given"),
        (lambda: iv.only(B, position=slice(5, 2)), "position=slice(5, 2) selects nothing"),
        (lambda: iv.only(B, position=slice(5, None, -1)), "step is at least 1, not -1"),
        (lambda: iv.only(B, batch="all"), "batch is a whole number, not 'all'"),
        (lambda: iv.only(B, tokens="Texas"), "tokens are 'prompt', 'generated' or token ids, not 'Texas'"),
        (lambda: iv.only(B, tokens=-1), "there is no -1"),
        (lambda: iv.only(B, layer=4), "nothing is left to edit in 4: the edit's layers are 3"),
        (lambda: iv.only(B, where=True), "where takes conditions"),
        (
            lambda: iv.only(B, where=iv.active(4, 0)),
            "active(layer=4, feature=0) is known only after the edit at layer 3",
        ),
        (lambda: iv.only(iv.only_span(1), position=0), "cannot be restricted by position"),
        (lambda: iv.only("scale", position=0), "only takes edits such as"),
        (lambda: iv.chain(A, lambda acts: acts), "chain takes edits such as"),
        (lambda: iv.active(3, 1, above=math.nan), "above is a finite number, not nan"),
        (lambda: iv.active(3, 1, position="here"), "a condition's position is 'same', 'any' or a number, not 'here'"),
        (lambda: iv.all_of(), "all_of takes conditions"),
        (lambda: iv.not_(A), "not_ takes conditions"),
        (lambda: iv.from_json('{"edit": "scael"}'), "no edit is called 'scael': there are ablate"),
        (lambda: iv.from_json('{"edit": "scale", "by": 2.0}'), "not the description of an edit: KeyError: 'features'"),
        (lambda: iv.from_json('{"edit": "scale", "features": {"3": [1]}, "too": 2.0}'), "not the description of an"),
        (lambda: iv.from_json('{"edit": "scale", "features": {"3": [1]}, "by": NaN}'), "not nan"),
        (lambda: iv.from_json("{"), "not the JSON of an edit"),
        (lambda: iv.from_dict({"edit": "only", "of": B.data(), "where": {"on": 1}}), "not a condition"),
        (lambda: iv.from_dict([]), "not the description of an edit"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_made(make, message):
    with pytest.raises(iv.EditError, match=re.escape(message)) as caught:
        make()
    assert isinstance(caught.value, ValueError)


CLT = make_clt()  # of 24 latents a layer


@pytest.mark.parametrize(
    ("edit", "shape", "message"),
    [
        (iv.ablate(layer=0, feature=24), None, "layer 0 has features 0 to 23: there is no feature 24"),
        (iv.ablate(layer=99, feature=0), None, "no features at layer 99: it has them at 0, 1"),
        (iv.ablate(layer="0_1", feature=0), None, "no features at layer '0_1'"),
        (iv.only(iv.ablate(layer=1, feature=0), where=iv.active(0, 24)), None, "there is no feature 24"),
        (iv.only(B, position=0), None, "there is no feature 42"),
        (iv.only(iv.ablate(layer=1, feature=0), position=[0, 5]), (2, 5), "position 5 is beyond the 5 there are"),
        (iv.only(iv.ablate(layer=1, feature=0), position=-6), (2, 5), "give -5 to 4"),
        (
            iv.only(iv.ablate(layer=1, feature=0), position=slice(5, None)),
            (2, 5),
            "position=slice(5, None) selects none",
        ),
        (iv.only(iv.ablate(layer=1, feature=0), batch=2), (2, 5), "batch 2 is beyond the 2 there are: give -2 to 1"),
        (
            iv.only(iv.ablate(layer=1, feature=0), where=iv.active(0, 1, position=5)),
            (2, 5),
            "a condition's position 5 is beyond",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_a_run(edit, shape, message):
    clt = make_clt(Wiring.clt(4)) if "42" in message else CLT
    with pytest.raises(iv.EditError, match=re.escape(message)):
        edit.check(clt, shape)
    with pytest.raises(iv.EditError, match=re.escape(message)):
        iv.chain(iv.only_span(1), edit).check(clt, shape)


def test_what_fits_is_not_refused():
    edit = iv.only(iv.ablate(layer=1, feature=23), position=[-5, 4], batch=-2, where=iv.active(1, 23, position=4))
    edit.check(CLT)
    edit.check(CLT, (2, 5))
    with pytest.raises(iv.EditError, match="needs a crosscoder"):
        edit.check(None)


def test_a_tensor_that_became_nan_is_refused():
    by = torch.tensor(2.0)
    edit = iv.scale(layer=0, feature=0, by=by)
    edit.check(CLT)
    by.fill_(math.nan)
    with pytest.raises(iv.EditError, match="finite"):
        edit.check(CLT)


def test_a_condition_on_a_group_encoded_later_in_the_same_layer_is_refused():
    # Group "1" reads the end of layer 1; group "1_1" reads its MLP's input, before that.
    clt = make_clt(Wiring.strictly_causal(3) + Wiring.clt(3))
    early, late = iv.ablate(layer="1_1", feature=0), iv.ablate(layer=1, feature=0)
    iv.only(late, where=iv.active("1_1", 0)).check(clt)
    edit = iv.only(early, where=iv.active(1, 0))
    with pytest.raises(iv.EditError, match="known only after the edit at layer '1_1'"):
        edit.check(clt)


# ---------------------------------------------------------------- fingerprints


def test_an_edit_saved_for_one_crosscoder_is_refused_by_another():
    edit = iv.chain(iv.only(iv.scale(layer=0, feature=3, by=2.0), position=0), iv.only_span(2))
    saved = edit.to_json(clt=CLT)
    again = iv.from_json(saved)
    assert again == edit
    again.check(CLT)
    for other in (make_clt(Wiring.plt(4)), make_clt(n_latents=25)):
        edit.check(other)
        with pytest.raises(iv.EditError, match="saved for another crosscoder"):
            again.check(other)
    # It stays with the edit: in a chain, under a restriction, and when saved again.
    alone = iv.from_json(iv.scale(layer=0, feature=3, by=2.0).to_json(clt=CLT))
    longer = iv.chain(again, iv.ablate(layer=0, feature=0))
    for kept in (iv.only(alone, batch=0), longer, iv.from_json(again.to_json()), iv.from_json(longer.to_json())):
        with pytest.raises(iv.EditError, match="saved for another crosscoder"):
            kept.check(make_clt(n_latents=25))


def test_a_source_counts_where_both_have_one():
    here, elsewhere, unknown = make_clt(), make_clt(), make_clt()
    here.metadata["source"], elsewhere.metadata["source"] = "hf://a@1", "hf://b@2"
    edit = iv.from_json(iv.ablate(layer=0, feature=3).to_json(clt=here))
    edit.check(here)
    edit.check(unknown)
    with pytest.raises(iv.EditError, match=re.escape("hf://a@1") + ".*" + re.escape("hf://b@2")):
        edit.check(elsewhere)
    other = iv.from_json(iv.ablate(layer=1, feature=3).to_json(clt=elsewhere))
    with pytest.raises(iv.EditError, match="saved for different crosscoders"):
        iv.chain(edit, other).to_json()


def test_an_edit_that_does_not_fit_is_not_saved_for_a_crosscoder(tmp_path):
    with pytest.raises(iv.EditError, match="no feature 24"):
        iv.ablate(layer=0, feature=24).to_json(tmp_path / "edit.json", clt=CLT)
    assert not (tmp_path / "edit.json").exists()
