"""What edits do to activations, against a brute force that goes entry by entry over the edit's data."""

from __future__ import annotations

import warnings
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from clt_plugin import interventions as iv
from clt_plugin.adapters._pass import Pass
from interventions.strategies import LABELS, N_FEATURES, edits, feature_edits, quietly_chain, restrictions

EXACT = {"rtol": 0, "atol": 0}


class Rows:
    """A batch in one pass: real tokens marked, the cache's included."""

    def __init__(self, mask, past, n_prompt, ids):
        self.mask, self.past, self.n_prompt, self.ids = mask, past, n_prompt, ids
        self.shape = (len(mask), len(mask[0]) - past)

    def as_pass(self):
        mask = torch.tensor(self.mask)
        return Pass.of(torch.tensor(self.ids), self.shape, mask, self.past, self.n_prompt)


@st.composite
def batches(draw, past=None):
    n, past = draw(st.integers(1, 3)), draw(st.integers(0, 3)) if past is None else past
    seen = past + draw(st.integers(1, 4))
    # Each row has at least its last token; what comes before is padding, then real.
    pads = draw(st.lists(st.integers(0, seen - 1), min_size=n, max_size=n))
    mask = [[column >= pad for column in range(seen)] for pad in pads]
    ids = [[draw(st.integers(0, 3)) for _ in range(seen - past)] for _ in range(n)]
    return Rows(mask, past, draw(st.integers(1, seen)), ids)


def random_acts(seed, shape):
    rng = torch.Generator().manual_seed(seed)
    acts = torch.randn(*shape, N_FEATURES, generator=rng, dtype=torch.float64)
    return torch.where(torch.rand(acts.shape, generator=rng) < 0.4, 0.0, acts)


# ---------------------------------------------------------------- the brute force


def selects(index, number, n):
    """Whether an index, as JSON has it, selects one of n by Python's own rules."""
    if isinstance(index, dict):
        return number in range(n)[slice(*index["slice"])]
    return any(-n <= i < n and range(n)[i] == number for i in index)


def holds(condition, natural, rows, row, column):
    ((word, content),) = condition.items()
    if word == "not":
        return not holds(content, natural, rows, row, column)
    if word in ("all", "any"):
        return (all if word == "all" else any)(holds(each, natural, rows, row, column) for each in content)
    real = [c for c in range(len(rows.mask[row])) if rows.mask[row][c]]
    if content["position"] == "same":
        columns = [column]
    elif content["position"] == "any":
        columns = [c - rows.past for c in real if c >= rows.past]
    else:
        place = content["position"]
        columns = [real[place] - rows.past] if -len(real) <= place < len(real) else []
    return any(float(natural[content["layer"]][row, c, content["feature"]]) > content["above"] for c in columns)


def allowed(only, natural, rows, row, column, label):
    real = [c for c in range(len(rows.mask[row])) if rows.mask[row][c]]
    if "layer" in only and label not in only["layer"]:
        return False
    if "position" in only and not selects(only["position"], real.index(column + rows.past), len(real)):
        return False
    if "batch" in only and not selects(only["batch"], row, len(rows.mask)):
        return False
    if "tokens" in only:
        generated = column + rows.past >= rows.n_prompt
        if isinstance(only["tokens"], str):
            if generated != (only["tokens"] == "generated"):
                return False
        elif rows.ids[row][column] not in only["tokens"]:
            return False
    return "where" not in only or holds(only["where"], natural, rows, row, column)


def brute(data, label, value, feature, natural, rows, row, column):
    """One entry's value after an edit."""
    if data["edit"] == "chain":
        for each in data["edits"]:
            value = brute(each, label, value, feature, natural, rows, row, column)
        return value
    if data["edit"] == "only":
        if not allowed(data, natural, rows, row, column, label):
            return value
        return brute(data["of"], label, value, feature, natural, rows, row, column)
    if feature not in data["features"].get(label, []):
        return value
    order = [(each, f) for each, features in data["features"].items() for f in features]

    def strength(name):
        given = data.get(name)
        return given[order.index((label, feature))] if isinstance(given, list) else given

    if data["edit"] == "set_value":
        return strength("value")
    if data["edit"] == "add":
        return value + strength("value")
    if data["edit"] == "scale":
        return value * strength("by")
    if data["edit"] == "ablate":
        return strength("mean") or 0.0
    low, high = strength("min"), strength("max")
    value = value if low is None else max(value, low)
    return value if high is None else min(value, high)


def brute_all(edit, label, acts, natural, rows):
    data, expected = edit.to_dict(), acts.clone()
    for row in range(rows.shape[0]):
        for column in range(rows.shape[1]):
            if rows.mask[row][column + rows.past]:
                for f in range(N_FEATURES):
                    value = float(acts[row, column, f])
                    expected[row, column, f] = brute(data, label, value, f, natural, rows, row, column)
    return expected


def apply(edit, label, acts, natural, now):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return edit.activations(label, acts, natural, now)


def compare(edit, rows, seed):
    acts = {label: random_acts(seed + int(label), rows.shape) for label in LABELS}
    natural = {label: random_acts(seed + 10 + int(label), rows.shape) for label in LABELS}
    for label in LABELS:
        before = acts[label].clone()
        known = {each: natural[each] for each in LABELS if int(each) <= int(label)}
        got = apply(edit, label, acts[label], known, rows.as_pass())
        assert torch.equal(acts[label], before)
        assert_close(got, brute_all(edit, label, before, natural, rows), **EXACT)
        touched = label in edit.layers()
        assert touched or got is acts[label]


@settings(max_examples=150)
@given(edits(), batches(past=0), st.integers(0, 1000))
def test_a_pass_without_a_cache(edit, rows, seed):
    compare(edit, rows, seed)


@settings(max_examples=150)
@given(edits(positions=False), batches(), st.integers(0, 1000))
def test_passes_over_a_cache(edit, rows, seed):
    compare(edit, rows, seed)


@given(feature_edits(), restrictions(positions=False), restrictions(positions=False), batches(), st.integers(0, 1000))
def test_only_within_only_is_the_intersection(edit, a, b, rows, seed):
    natural = {label: random_acts(seed + int(label), rows.shape) for label in LABELS}
    acts, now = torch.full((*rows.shape, N_FEATURES), 7.5, dtype=torch.float64), rows.as_pass()
    for label in edit.layers():
        alone = apply(edit, label, acts, natural, now)
        one = apply(iv.only(edit, **a), label, acts, natural, now) == alone
        other = apply(iv.only(edit, **b), label, acts, natural, now) == alone
        both = apply(iv.only(iv.only(edit, **a), **b), label, acts, natural, now)
        assert_close(both, torch.where(one & other, alone, acts), **EXACT)


@given(edits(), edits(), batches(past=0), st.integers(0, 1000))
def test_a_chain_is_one_after_the_other(a, b, rows, seed):
    natural = {label: random_acts(seed + int(label), rows.shape) for label in LABELS}
    now = rows.as_pass()
    for label in LABELS:
        acts = random_acts(seed + 5, rows.shape)
        got = apply(quietly_chain(a, b), label, acts, natural, now)
        assert_close(got, apply(b, label, apply(a, label, acts, natural, now), natural, now), **EXACT)


# ---------------------------------------------------------------- by hand

FOUR = Pass.of(torch.arange(8).reshape(2, 4), (2, 4), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))


def where_changed(edit, now=FOUR, natural=None):
    acts = torch.zeros(*now.kept.shape, 2)
    return (edit.activations("0", acts, natural or {}, now)[..., 1] != 0).int().tolist()


SET = iv.set_value(layer=0, feature=1, value=1.0)


@pytest.mark.parametrize(
    ("edit", "places"),
    [
        (SET, [[0, 0, 1, 1], [1, 1, 1, 1]]),
        (iv.only(SET, position=0), [[0, 0, 1, 0], [1, 0, 0, 0]]),
        (iv.only(SET, position=-1), [[0, 0, 0, 1], [0, 0, 0, 1]]),
        (iv.only(SET, position=[-2, 3]), [[0, 0, 1, 0], [0, 0, 1, 1]]),
        (iv.only(SET, position=slice(1, -1)), [[0, 0, 0, 0], [0, 1, 1, 0]]),
        (iv.only(SET, position=range(1, 3)), [[0, 0, 0, 1], [0, 1, 1, 0]]),
        (iv.only(SET, batch=-1), [[0, 0, 0, 0], [1, 1, 1, 1]]),
        (iv.only(SET, tokens=[0, 3, 4]), [[0, 0, 0, 1], [1, 0, 0, 0]]),
        (iv.only(iv.only(SET, position=slice(1, None)), position=slice(None, 2)), [[0, 0, 0, 1], [0, 1, 0, 0]]),
    ],
)
def test_places(edit, places):
    assert where_changed(edit) == places


@pytest.mark.parametrize("step", [None, 1, 2, 3])
def test_slices_are_those_of_python(step):
    # Rows of one to six tokens, padded to six.
    mask = torch.ones(6, 6, dtype=torch.bool).tril().flip(1)
    now = Pass.of(None, (6, 6), mask)
    bounds = (None, *range(-7, 8))
    for start, stop in product(bounds, bounds):
        index = slice(start, stop, step)
        try:
            edit = iv.only(SET, position=index)
        except iv.EditError:
            assert not any(range(n)[index] for n in range(20))
            continue
        for n, row in enumerate(where_changed(edit, now), start=1):
            assert [c - (6 - n) for c in range(6) if row[c]] == list(range(n)[index]), (index, n)


def test_conditions_combine_as_in_logic():
    # Every combination of three features, one a token.
    natural = torch.tensor(list(product((0.0, 1.0), repeat=3)))[None]
    now, a, b, c = Pass.of(None, (1, 8)), *(iv.active(0, feature) for feature in range(3))
    for condition, expected in [
        (a, lambda a, b, c: a),
        (iv.inactive(0, 1), lambda a, b, c: not b),
        (iv.all_of(a, b, c), lambda a, b, c: a and b and c),
        (iv.any_of(a, b, c), lambda a, b, c: a or b or c),
        (iv.any_of(iv.all_of(a, iv.not_(b)), c), lambda a, b, c: (a and not b) or c),
        (iv.not_(iv.any_of(a, iv.all_of(b, c))), lambda a, b, c: not (a or (b and c))),
    ]:
        (places,) = where_changed(iv.only(SET, where=condition), now, {"0": natural})
        assert places == [int(bool(expected(*row))) for row in natural[0].tolist()]


def test_generation_goes_on_counting():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    step = Pass.of(torch.tensor([[9], [9]]), (2, 1), mask, past=4)
    assert where_changed(iv.only(SET, position=2), step) == [[1], [0]]
    assert where_changed(iv.only(SET, position=slice(3, None)), step) == [[0], [1]]
    assert where_changed(iv.only(SET, position=-1), step) == [[1], [1]]
    assert where_changed(iv.only(SET, tokens="generated"), step) == [[1], [1]]
    assert where_changed(iv.only(SET, tokens="prompt"), step) == [[0], [0]]
    assert where_changed(iv.only(SET, tokens="generated")) == [[0] * 4] * 2


def test_a_condition_on_a_position_of_an_earlier_pass_says_so():
    step = Pass.of(torch.tensor([[9], [9]]), (2, 1), past=4)
    natural = {"0": torch.ones(2, 1, 2)}
    edit = iv.only(SET, where=iv.active(0, 0, position=1))
    with pytest.raises(iv.EditError, match="run in an earlier pass, whose activations are gone"):
        where_changed(edit, step, natural)
    assert where_changed(iv.only(edit, tokens="prompt"), step, natural) == [[0], [0]]
    assert where_changed(iv.only(SET, where=iv.active(0, 0, position=-1)), step, natural) == [[1], [1]]
    assert where_changed(iv.only(SET, where=iv.active(0, 0, position=7)), step, natural) == [[0], [0]]


def test_what_a_pass_does_not_hold_is_said():
    with pytest.raises(iv.EditError, match="no activations of layer 0 are known"):
        where_changed(iv.only(SET, where=iv.active(0, 0)))
    with pytest.raises(iv.EditError, match="starts from embeddings"):
        where_changed(iv.only(SET, tokens=5), Pass.of(None, (2, 4)))
    with pytest.raises(iv.EditError, match=r"activations of shape \(1, 4, 2\) in a pass of \(2, 4\)"):
        SET.activations("0", torch.zeros(1, 4, 2), {}, FOUR)


def test_nothing_to_edit_gives_the_same_object_back():
    acts = torch.ones(2, 4, 2)
    for edit in (iv.chain(), iv.only_span(1), iv.ablate(layer=1, feature=0), iv.only(SET, position=9)):
        assert edit.activations("0", acts, {}, FOUR) is acts
    condition = iv.only(SET, where=iv.inactive(0, 0))
    assert condition.activations("0", acts, {"0": acts}, FOUR) is acts


def test_a_scaled_feature_that_is_inactive_wherever_it_acts_warns():
    acts = torch.zeros(2, 4, 3)
    acts[1, 3, 0] = acts[0, 0, 1] = 1.0  # feature 1 at padding alone
    edit = iv.scale(layer=0, feature=[0, 1, 2], by=2.0)
    with pytest.warns(UserWarning, match=r"leaves features 1, 2 of layer 0 at 0") as caught:
        edit.activations("0", acts, {}, FOUR)
    assert len(caught) == 1
    iv.only(edit, position=9).activations("0", acts, {}, FOUR)
    iv.scale(layer=0, feature=0, by=2.0).activations("0", acts, {}, FOUR)
    with pytest.warns(UserWarning, match="leaves feature 0 of layer 0 at 0"):
        iv.only(iv.scale(layer=0, feature=0, by=2.0), batch=0).activations("0", acts, {}, FOUR)
    # What an earlier edit made active is; and what the model generates, a token a pass, says nothing.
    quietly_chain(SET, iv.scale(layer=0, feature=1, by=2.0)).activations("0", acts, {}, FOUR)
    step = Pass.of(torch.tensor([[9], [9]]), (2, 1), past=4)
    edit.activations("0", acts[:, :1] * 0, {}, step)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_arithmetic_is_that_of_torch(dtype):
    acts = torch.randn(2, 4, 6).to(dtype)
    for by in (1.1, torch.tensor(1.1)):
        got = iv.scale(layer=0, feature=[5, 0], by=by).activations("0", acts, {}, Pass.of(None, (2, 4)))
        assert got.dtype == dtype
        expected = acts.clone()
        expected[..., [5, 0]] *= 1.1
        assert_close(got, expected, rtol=0 if isinstance(by, float) else 1e-6, atol=0)


# ---------------------------------------------------------------- gradients

OPERATIONS = {
    "set_value": (iv.set_value, ("value",), lambda x, value: value),
    "add": (iv.add, ("value",), lambda x, value: x + value),
    "scale": (iv.scale, ("by",), lambda x, by: x * by),
    "ablate": (iv.ablate, ("mean",), lambda x, mean: mean),
    "clamp": (iv.clamp, ("min", "max"), lambda x, min, max: min if x < min else max if x > max else x),
}


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients_in_strengths_and_activations(operation, several):
    make, names, plain = OPERATIONS[operation]
    features = {3: [4, 1], 1: [2]}
    draws = {"min": -0.3, "max": 0.4}
    strengths = {
        name: (draws.get(name, 1.3) + (0.1 * torch.rand(3) if several else torch.tensor(0.0))).double().requires_grad_()
        for name in names
    }
    edit = iv.only(make(group=features, **strengths), position=[0, -1])
    weight = torch.randn(2, 4, N_FEATURES, dtype=torch.float64)
    acts = {label: torch.randn(2, 4, N_FEATURES, dtype=torch.float64, requires_grad=True) for label in LABELS}
    loss = sum((weight * edit.activations(label, acts[label], {}, FOUR)).sum() for label in LABELS)
    leaves = [*strengths.values(), *acts.values()]
    got = torch.autograd.grad(loss, leaves)

    places = [(0, 2), (0, 3), (1, 0), (1, 3)]
    order = [(str(layer), f) for layer, several_features in features.items() for f in several_features]
    expected = torch.zeros((), dtype=torch.float64)
    for label in LABELS:
        for row in range(2):
            for column in range(4):
                for f in range(N_FEATURES):
                    value = acts[label][row, column, f]
                    if (row, column) in places and (label, f) in order:
                        at = order.index((label, f))
                        value = plain(value, **{n: s[at] if several else s for n, s in strengths.items()})
                    expected = expected + weight[row, column, f] * value
    for ours, theirs in zip(got, torch.autograd.grad(expected, leaves), strict=True):
        assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert ours.any()


def test_second_derivatives_of_a_chain():
    by = torch.tensor(2.0, requires_grad=True)
    edit = quietly_chain(iv.scale(layer=0, feature=1, by=by), iv.scale(layer=0, feature=1, by=by))
    acts = torch.full((1, 1, 2), 3.0, requires_grad=True)
    (first,) = torch.autograd.grad(edit.activations("0", acts, {}, Pass.of(None, (1, 1))).sum(), by, create_graph=True)
    (second,) = torch.autograd.grad(first, by)
    assert (first.item(), second.item()) == (12.0, 6.0)


def test_without_gradients_and_in_inference_mode():
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            acts = torch.ones(2, 4, 2)
            assert where_changed(SET) == [[0, 0, 1, 1], [1, 1, 1, 1]]
            assert SET.activations("0", acts, {}, FOUR) is not acts


def test_shapes_without_values():
    # As in nnsight's scan, where a pass is rehearsed on tensors that hold nothing.
    from torch._subclasses.fake_tensor import FakeTensorMode

    where = iv.active(0, 0, position=1)
    edit = iv.chain(iv.only(SET, position=[0, -1], where=where), iv.scale(layer=0, feature=0, by=2.0))
    with FakeTensorMode(allow_non_fake_inputs=True):
        acts = torch.zeros(2, 4, 2)
        assert edit.activations("0", acts, {"0": acts}, FOUR).shape == (2, 4, 2)
