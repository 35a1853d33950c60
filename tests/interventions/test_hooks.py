"""Edits as hooks of both libraries, against `add_clt(edits=)` and edits written by hand in a plain model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from clt_plugin import AttachError, Wiring
from clt_plugin import interventions as iv
from support.crosscoders import make_clt
from support.models import N_LAYERS, bridge_model, make_model, nnsight_model
from support.reference import reference_greedy, reference_run
from support.tracing import left_padded, token_ids

MODES = ("replace", "replace_with_error")
CLOSE = {"rtol": 1e-6, "atol": 1e-6}
PROMPTS = ("w2 w3 w4 w5", "w7 w8")

EDIT = iv.chain(
    iv.scale(layer=0, feature=[1, 2, 3], by=2.0),
    iv.only(iv.add(layer=1, feature=4, value=2.0), where=iv.active(layer=0, feature=1)),
    iv.only(iv.set_value(layer=2, feature=5, value=3.0), position=-1),
)


def by_hand():
    """What `EDIT` does, in plain torch, to one pass over a whole text."""
    on = []

    def edit(layer: int, acts: Tensor) -> Tensor:
        if layer == 0:
            on[:] = [acts[..., 1].clone() > 0]
            acts[..., 1:4] *= 2
        elif layer == 1:
            acts[..., 4] += 2 * on[0]
        else:
            acts[:, -1, 5] = 3
        return acts

    return edit


def logits_of(library, family, ids, clt, mode, edit, how):
    """The logits of a run with an edit given to add_clt, or as hooks."""
    hf = make_model(family, torch.float64)
    if library == "transformer_lens":
        bridge = bridge_model(hf)
        bridge.add_clt(clt, mode, edits=edit if how == "edits" else None)
        hooks = [] if how == "edits" else edit.fwd_hooks(bridge)
        return bridge.run_with_hooks(ids, fwd_hooks=hooks)
    model = nnsight_model(hf)
    if how == "edits":
        model.add_clt(clt, mode, edits=edit)
        with model.trace(ids):
            logits = model.lm_head.output.save()
    elif how == "hooks":
        model.add_clt(clt, mode)
        with model.trace(ids):
            edit.apply(model)
            logits = model.lm_head.output.save()
    else:
        with model.trace(ids):
            model.add_clt(clt, mode)
            edit.apply(model)
            logits = model.lm_head.output.save()
    return logits


WAYS = [("nnsight", "edits"), ("nnsight", "hooks"), ("nnsight", "first line")]
WAYS += [("transformer_lens", "edits"), ("transformer_lens", "hooks")]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_way_equals_the_edit_by_hand(family: str, mode: str) -> None:
    clt, ids = make_clt(dtype=torch.float64), token_ids()
    hf = make_model(family, torch.float64)
    expected = reference_run(hf, ids, clt, mode, edit=by_hand())["logits"]
    unedited = reference_run(hf, ids, clt, mode)["logits"]
    assert (expected - unedited).abs().max() > 0.1
    for library, how in WAYS:
        logits = logits_of(library, family, ids, clt, mode, EDIT, how)
        assert_close(logits, expected, **CLOSE, msg=lambda text, way=(library, how): f"{way}: {text}")


def test_hooks_are_plain_and_stand_in_a_list_with_others() -> None:
    clt, ids = make_clt(dtype=torch.float64), token_ids()
    bridge = bridge_model(make_model("gpt2", torch.float64))
    bridge.add_clt(clt)
    hooks = iv.scale(layer=1, feature=2, by=3.0).fwd_hooks(bridge)
    assert [name for name, _ in hooks] == ["blocks.1.clt.hook_features"]

    def mine(tensor: Tensor, hook: object) -> Tensor:
        return tensor + 0.5

    def written(first: bool):
        def edit(layer: int, acts: Tensor) -> Tensor:
            if layer != 1:
                return acts
            acts = acts if first else acts + 0.5
            acts[..., 2] *= 3
            return acts + 0.5 if first else acts

        return edit

    own = ("blocks.1.clt.hook_features", mine)
    for first, order in ((True, [*hooks, own]), (False, [own, *hooks])):
        expected = reference_run(make_model("gpt2", torch.float64), ids, clt, "replace", edit=written(first))
        assert_close(bridge.run_with_hooks(ids, fwd_hooks=order), expected["logits"], **CLOSE)


def test_conditions_look_at_what_no_hook_has_touched() -> None:
    """Neither another edit's hooks in the same list, nor edits in place by the user, reach a condition."""
    clt, ids = make_clt(dtype=torch.float64), token_ids()
    bridge = bridge_model(make_model("gpt2", torch.float64))
    bridge.add_clt(clt)
    first = iv.ablate(layer=0, feature=1)
    then = iv.only(iv.add(layer=1, feature=4, value=2.0), where=iv.active(layer=0, feature=1))

    def silence(tensor: Tensor, hook: object) -> Tensor:
        tensor[..., 1] = 0
        return tensor

    def edit(layer: int, acts: Tensor) -> Tensor:
        if layer == 0:
            on[:] = [acts[..., 1].clone() > 0]
            acts[..., 1] = 0
        elif layer == 1:
            acts[..., 4] += 2 * on[0]
        return acts

    on: list[Tensor] = []
    expected = reference_run(make_model("gpt2", torch.float64), ids, clt, "replace", edit=edit)["logits"]
    assert on[0].any()
    assert not on[0].all()
    two = [*first.fwd_hooks(bridge), *then.fwd_hooks(bridge)]
    by_user = [*then.fwd_hooks(bridge), ("blocks.0.clt.hook_features", silence)]
    for hooks in (two, by_user):
        assert_close(bridge.run_with_hooks(ids, fwd_hooks=hooks), expected, **CLOSE)
    model = nnsight_model(make_model("gpt2", torch.float64))
    model.add_clt(clt, edits=then)
    with model.trace(ids):
        model.clt.layers[0].features.output[..., 1] = 0
        logits = model.lm_head.output.save()
    assert_close(logits, expected, **CLOSE)


def test_padding_is_never_edited() -> None:
    clt, inputs = make_clt(dtype=torch.float64), left_padded(PROMPTS)
    mask = inputs["attention_mask"].bool()

    def edit(layer: int, acts: Tensor) -> Tensor:
        if layer == 1:
            for row, start in enumerate((0, 2)):
                acts[row, start + 1 :, 4] = 2.0  # from each row's second token on
        return acts

    expected = reference_run(
        make_model("gpt2", torch.float64),
        inputs["ids"],
        clt,
        "replace",
        edit=edit,
        attention_mask=inputs["attention_mask"],
        position_ids=inputs["position_ids"],
    )
    value = iv.only(iv.set_value(layer=1, feature=4, value=2.0), position=slice(1, None))
    model = nnsight_model(make_model("gpt2", torch.float64))
    model.add_clt(clt)
    with model.trace(list(PROMPTS)):
        value.apply(model)
        acts = model.clt.layers[1].features.output.save()
        logits = model.lm_head.output.save()
    assert_close(logits[mask], expected["logits"][mask], **CLOSE)
    assert_close(acts, expected["features"][1], **CLOSE)


def test_one_invoke_of_two() -> None:
    clt = make_clt(dtype=torch.float64)
    edit = iv.set_value(layer=1, feature=4, value=2.0)
    model = nnsight_model(make_model("gpt2", torch.float64))
    model.add_clt(clt)
    with model.trace() as tracer:
        with tracer.invoke("w2 w3 w4 w5"):
            edit.apply(model)
            first = model.clt.layers[1].features.output.save()
        with tracer.invoke("w7 w8"):
            second = model.clt.layers[1].features.output.save()
    assert (first[..., 4] == 2).all()
    assert not (second[..., 4] == 2).any()


def test_every_step_of_generation() -> None:
    clt, ids, steps = make_clt(), token_ids(), 4
    edit = iv.only(iv.set_value(layer=1, feature=4, value=6.0), position=slice(8, None))

    def written(layer: int, acts: Tensor) -> Tensor:
        if layer == 1:
            acts[:, 8:, 4] = 6
        return acts

    runs = reference_greedy(make_model("gpt2"), ids, clt, "replace", steps, edit=written)
    model = nnsight_model("gpt2")
    model.add_clt(clt)
    with model.generate(ids, max_new_tokens=steps, do_sample=False) as tracer:
        for _step in tracer.iter[:steps]:
            edit.apply(model)
        out = tracer.result.save()
    assert torch.equal(out, runs[-1]["ids"])
    assert not torch.equal(out, reference_greedy(make_model("gpt2"), ids, clt, "replace", steps)[-1]["ids"])


def test_a_second_group_at_home_in_a_layer() -> None:
    wiring = Wiring.plt(N_LAYERS) + Wiring.plt(N_LAYERS, read="resid_mid")
    clt, ids = make_clt(wiring, dtype=torch.float64), token_ids()
    # Encoded in the order of the groups, although the residual stream is reached before the MLP's input.
    edit = iv.only(iv.add(layer="1_1", feature=4, value=2.0), where=iv.active(layer=1, feature=2))

    def written(label: int | str, acts: Tensor) -> Tensor:
        if label == "1_1":
            acts[..., 4] += 2 * on[0]
        elif label == 1:
            on[:] = [acts[..., 2] > 0]
        return acts

    on: list[Tensor] = []
    expected = reference_run(make_model("gpt2", torch.float64), ids, clt, "replace", edit=written)["logits"]
    assert on[0].any()
    for library, how in WAYS:
        assert_close(logits_of(library, "gpt2", ids, clt, "replace", edit, how), expected, **CLOSE)


def test_a_scan_changes_nothing() -> None:
    model = nnsight_model("gpt2")
    model.add_clt(make_clt())
    with model.scan(token_ids()):
        EDIT.apply(model)
        shape = model.lm_head.output.shape.save()
    assert tuple(shape) == (2, 7, 61)


def test_a_strength_has_a_gradient() -> None:
    clt, ids = make_clt(dtype=torch.float64), token_ids()
    bridge = bridge_model(make_model("gpt2", torch.float64))
    bridge.add_clt(clt)

    def loss(strength: Tensor) -> Tensor:
        edit = iv.set_value(layer=1, feature=4, value=strength)
        return bridge.run_with_hooks(ids, fwd_hooks=edit.fwd_hooks(bridge))[..., 7].sum()

    strength = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(strength), strength)
    step = 1e-6
    with torch.no_grad():
        slope = (loss(strength + step) - loss(strength - step)) / (2 * step)
    assert_close(gradient, slope, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("library", ["nnsight", "transformer_lens"])
def test_what_does_not_fit_is_refused_before_the_run(library: str) -> None:
    model = nnsight_model("gpt2") if library == "nnsight" else bridge_model("gpt2")

    def use(edit: iv.Edit, name: str = "clt") -> None:
        if library == "transformer_lens":
            edit.fwd_hooks(model, name=name)
            return
        with model.trace(token_ids()):
            edit.apply(model, name=name)

    fine = iv.scale(layer=0, feature=1, by=2.0)
    with pytest.raises(AttachError, match="no crosscoder is attached as 'clt'"):
        use(fine)
    with model.add_clt(make_clt(), "observe"):
        with pytest.raises(AttachError, match="observe"):
            use(fine)
    model.add_clt(make_clt())
    with pytest.raises(AttachError, match="no crosscoder is attached as 'plt'"):
        use(fine, name="plt")
    with pytest.raises(iv.EditError, match="layer 0 has features 0 to 23: there is no feature 24"):
        use(iv.scale(layer=0, feature=24, by=2.0))
    with pytest.raises(iv.EditError, match="pass it to add_clt"):
        use(iv.chain(fine, iv.ablate_cross_layer()))
    with pytest.raises(iv.EditError, match="intervene"):
        use(iv.ablate_handoff(source=0, target=1))


@pytest.mark.parametrize("make", [nnsight_model, bridge_model])
def test_a_handoff_is_not_for_add_clt(make) -> None:
    with pytest.raises(AttachError, match="pass it to intervene"):
        make("gpt2").add_clt(make_clt(), edits=iv.chain(iv.ablate_handoff(source=0, target=2)))


def test_hooks_of_a_crosscoder_that_is_gone() -> None:
    bridge = bridge_model("gpt2")
    handle = bridge.add_clt(make_clt())
    hooks = iv.scale(layer=0, feature=1, by=2.0).fwd_hooks(bridge)
    handle.remove()
    bridge.add_clt(make_clt())
    with pytest.raises(AttachError, match="make them anew"):
        bridge.run_with_hooks(token_ids(), fwd_hooks=hooks)


def test_hooks_are_not_for_nnsight() -> None:
    model = nnsight_model("gpt2")
    model.add_clt(make_clt())
    with pytest.raises(AttachError, match=r"edit.apply\(model\)"):
        iv.scale(layer=0, feature=1, by=2.0).fwd_hooks(model)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_places_beyond_a_trace_are_refused(family: str) -> None:
    model = nnsight_model(family)
    model.add_clt(make_clt())
    add = iv.add(layer=1, feature=4, value=2.0)
    longest = 5  # of a beginning and four words; the other row has two tokens of padding
    for within, message in (
        ({"position": longest}, f"position {longest} is beyond the {longest} there are"),
        ({"position": slice(longest, None)}, "selects none"),
        ({"batch": 2}, "batch 2 is beyond the 2"),
        ({"where": iv.active(layer=0, feature=1, position=9)}, "a condition's position 9"),
    ):
        # nnsight raises what a body raises as an error of its own class too.
        with pytest.raises(Exception, match=message), model.trace(list(PROMPTS)):
            iv.only(add, **within).apply(model)
    # Padding is no room.
    with pytest.raises(Exception, match="position 3 is beyond the 3"), model.trace(**one_padded_row()):
        iv.only(add, position=3).apply(model)
    with model.trace(list(PROMPTS)):
        iv.only(add, position=longest - 1).apply(model)


def one_padded_row() -> dict[str, Tensor]:
    inputs = left_padded(PROMPTS)
    return {"input_ids": inputs["ids"][1:], "attention_mask": inputs["attention_mask"][1:]}


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}], ids=["with a cache", "without"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_position_to_come_in_generation_is_no_error(family: str, settings: dict) -> None:
    ids, model = token_ids(), nnsight_model(family)
    model.add_clt(make_clt())
    edit, seen = iv.only(iv.set_value(layer=1, feature=4, value=2.0), position=8), []
    with model.generate(ids, max_new_tokens=3, do_sample=False, **settings) as tracer:
        for _step in tracer.iter[:3]:
            edit.apply(model)
            seen.append((model.clt.layers[1].features.output[:, -1, 4] == 2).all().item())
        seen.save()
    assert seen == [False, False, True]
