"""A crosscoder in an nnsight model: what traces read, and what edits do, against a plain torch reference."""

from __future__ import annotations

import pytest
import torch

from clt_plugin import Wiring
from support.crosscoders import make_clt
from support.models import N_LAYERS, make_model, nnsight_model
from support.reference import read_sites, reference_run
from support.tracing import (
    MODES,
    POINTS,
    Fingerprint,
    assert_close,
    assert_points,
    inner,
    left_padded,
    read_points,
    token_ids,
)

PROMPTS = ("w2 w3 w4 w5 w6", "w7 w8", "w9 w10 w11")


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_neox", "olmo2"])
def test_every_point_is_read_at_its_value(family: str, mode: str) -> None:
    clt, model, ids = make_clt(), nnsight_model(family), token_ids()
    expected = reference_run(make_model(family), ids, clt, mode)
    model.add_clt(clt, mode)
    with model.trace(ids):
        seen = read_points(model.clt, mode).save()
        logits = model.output.logits.save()
    assert_points(seen, expected)
    assert_close(logits, expected["logits"])


@pytest.mark.parametrize(("family", "mode"), [("gpt2", "replace"), *(("gemma2", mode) for mode in MODES)])
def test_the_first_line_of_a_trace_acts_in_that_trace_alone(family: str, mode: str) -> None:
    clt, model, ids = make_clt(), nnsight_model(family), token_ids()
    plain = make_model(family)
    expected = reference_run(plain, ids, clt, mode)
    before = Fingerprint(model)
    with model.trace(ids):
        model.add_clt(clt, mode)
        seen = read_points(model.clt, mode).save()
        logits = model.output.logits.save()
    assert_points(seen, expected)
    assert_close(logits, expected["logits"])
    before.assert_unchanged()
    with model.trace(ids):
        logits = model.output.logits.save()
    assert_close(logits, plain(ids).logits)


@pytest.mark.parametrize(("family", "write"), [("gpt2", "mlp_out"), ("gemma2", "mlp_out_before_norm")])
def test_every_site_that_can_be_read(family: str, write: str) -> None:
    hf, ids = make_model(family), token_ids()
    for read in read_sites(hf):
        clt, model = make_clt(read=read, write=write), nnsight_model(family)
        expected = reference_run(hf, ids, clt)
        model.add_clt(clt)
        with model.trace(ids):
            seen = read_points(model.clt, "replace").save()
            logits = model.output.logits.save()
        assert_points(seen, expected)
        assert_close(logits, expected["logits"], read)


@pytest.mark.parametrize("activation", [{"activation": "jumprelu"}, {"activation": "topk", "k": 4}])
def test_activation_functions_and_affine_skips(activation: dict) -> None:
    wiring = Wiring.local_clt(N_LAYERS, span=2).with_skips()
    clt, model, ids = make_clt(wiring, **activation), nnsight_model("gpt2"), token_ids()
    expected = reference_run(make_model("gpt2"), ids, clt)
    model.add_clt(clt)
    with model.trace(ids):
        seen = read_points(model.clt, "replace").save()
        logits = model.output.logits.save()
    assert_points(seen, expected)
    assert_close(logits, expected["logits"])


def test_layers_count_from_the_end_too() -> None:
    clt, model, ids = make_clt(), nnsight_model("gpt2"), token_ids()
    model.add_clt(clt)
    with model.trace(ids):
        last = model.clt.layers[-1].features.output.save()
    assert_close(last, reference_run(make_model("gpt2"), ids, clt)["features"][N_LAYERS - 1])


def test_what_a_trace_shows_of_a_replaced_mlp() -> None:
    clt, model, ids = make_clt(), nnsight_model("gpt2"), token_ids()
    expected = reference_run(make_model("gpt2"), ids, clt)
    model.add_clt(clt)
    with model.trace(ids):
        x = model.transformer.h[1].mlp.input.save()
        y = model.transformer.h[1].mlp.output.save()
    assert_close(x, expected["enc_in"][1])
    assert_close(y, expected["recon"][1])


def test_where_a_post_norm_is_written_the_mlp_itself_reads_as_zeros() -> None:
    clt, model, ids = make_clt(), nnsight_model("gemma2"), token_ids()
    expected = reference_run(make_model("gemma2"), ids, clt)
    model.add_clt(clt)
    with model.trace(ids):
        y = model.model.layers[1].mlp.output.save()
        written = model.model.layers[1].post_feedforward_layernorm.output.save()
    assert not y.any()
    assert_close(written, expected["recon"][1])


def test_a_run_without_a_body() -> None:
    clt, model, ids = make_clt(), nnsight_model("gpt2"), token_ids()
    model.add_clt(clt)
    out = model.trace(ids, trace=False)
    assert_close(out.logits, reference_run(make_model("gpt2"), ids, clt)["logits"])


def test_calls_of_the_plain_model_do_not_see_it() -> None:
    model, ids = nnsight_model("gpt2"), token_ids()
    model.add_clt(make_clt())
    assert torch.equal(model._module(ids).logits, make_model("gpt2")(ids).logits)


def test_traces_rooted_at_a_submodule_do_not_see_it() -> None:
    model, ids = nnsight_model("gpt2"), token_ids()
    model.add_clt(make_clt())
    with model.transformer.trace(ids):
        hidden = model.transformer.output.last_hidden_state.save()
    assert torch.equal(hidden, make_model("gpt2").transformer(ids).last_hidden_state)


def test_it_is_in_the_picture_of_the_model() -> None:
    model = nnsight_model("gpt2")
    assert "(clt)" not in repr(model)
    model.add_clt(make_clt())
    assert "(clt): Points" in repr(model)
    assert "model.clt.layers.1.features" in [path for path, _ in model.named_modules()]


# ---------------------------------------------------------------- edits

EDITS = {
    "enc_in": lambda value: value * 1.5,
    "pre_acts": lambda value: value + 1,
    "features": lambda value: value * 2,
    "recon": lambda value: value + 0.5,
    "error": lambda value: value * 0.25,
}
CASES = [(mode, point) for mode in ("replace", "replace_with_error") for point in POINTS[mode]]


@pytest.mark.parametrize(("mode", "point"), CASES)
def test_an_edit_by_assignment(mode: str, point: str) -> None:
    family = "gemma2"
    clt, model, ids = make_clt(), nnsight_model(family), token_ids()
    change = EDITS[point]
    edits = {point: lambda layer, value: change(value) if layer == 1 else value}
    expected = reference_run(make_model(family), ids, clt, mode, edits=edits)
    model.add_clt(clt, mode)
    with model.trace(ids):
        target = getattr(model.clt.layers[1], point)
        target.output = change(target.output)
        later = model.clt.layers[2].features.output.save()
        logits = model.output.logits.save()
    assert_close(later, expected["features"][2])
    assert_close(logits, expected["logits"])


@pytest.mark.parametrize(("mode", "point"), CASES)
def test_an_edit_in_place(mode: str, point: str) -> None:
    clt, model, ids = make_clt(), nnsight_model("gpt2"), token_ids()

    def change(layer: int, value: torch.Tensor) -> torch.Tensor:
        if layer == 1:
            value[:, -1, 3:9] += 2
        return value

    hf = make_model("gpt2")
    expected = reference_run(hf, ids, clt, mode, edits={point: change})
    model.add_clt(clt, mode)
    with model.trace(ids):
        block_input = model.transformer.h[1].mlp.input.clone().save()
        value = getattr(model.clt.layers[1], point).output
        value[:, -1, 3:9] += 2
        later = model.clt.layers[2].features.output.save()
        logits = model.output.logits.save()
    assert_close(block_input, reference_run(hf, ids, clt, mode)["enc_in"][1])
    assert_close(later, expected["features"][2])
    assert_close(logits, expected["logits"])
    assert (logits - make_model("gpt2")(ids).logits).abs().max() > 0.01


def test_an_edit_of_what_the_encoder_reads_leaves_the_mlp_its_input() -> None:
    clt, model, ids = make_clt(), nnsight_model("gpt2"), token_ids()
    expected = reference_run(make_model("gpt2"), ids, clt, "replace_with_error")
    model.add_clt(clt, "replace_with_error")
    with model.trace(ids):
        model.clt.layers[1].enc_in.output[:] = 0
        true = model.transformer.h[1].mlp.c_proj.output.save()
    assert_close(true, expected["true"][1])


def test_without_an_edit_replace_with_error_changes_no_logit() -> None:
    for family in ("gpt2", "gemma2", "gpt_neox"):
        model, ids = nnsight_model(family), token_ids()
        model.add_clt(make_clt(), "replace_with_error")
        with model.trace(ids):
            logits = model.output.logits.save()
        assert_close(logits, make_model(family)(ids).logits, family)


@pytest.mark.parametrize(
    ("read", "module"),
    [
        ("mlp_in", "mlp"),
        ("resid_mid", "ln_2"),
        ("mlp_in_before_gain", "ln_2"),
        ("mlp_in", "ln_2"),
        ("resid_pre", ""),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_a_user_edit_of_what_is_read_reaches_the_encoder(mode: str, read: str, module: str) -> None:
    clt, model, ids = make_clt(read=read), nnsight_model("gpt2"), token_ids()
    hf = make_model("gpt2")

    def edited(module: torch.nn.Module, args: tuple) -> tuple:
        return (args[0] * 2 + 1, *args[1:])

    inner(hf, 1, module).register_forward_pre_hook(edited)
    expected = reference_run(hf, ids, clt, mode)
    model.add_clt(clt, mode)
    with model.trace(ids):
        block = model.transformer.h[1]
        source = getattr(block, module) if module else block
        source.input = source.input * 2 + 1
        acts = model.clt.layers[1].features.output.save()
        logits = model.output.logits.save()
    assert_close(acts, expected["features"][1])
    assert_close(logits, expected["logits"])


def test_a_user_edit_in_place_of_what_is_read_reaches_the_encoder() -> None:
    clt, model, ids = make_clt(), nnsight_model("gpt2"), token_ids()
    hf = make_model("gpt2")
    inner(hf, 1, "mlp").register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    expected = reference_run(hf, ids, clt)
    with model.trace(ids):
        model.add_clt(clt)
        model.transformer.h[1].mlp.input[:] *= 2
        acts = model.clt.layers[1].features.output.save()
        logits = model.output.logits.save()
    assert_close(acts, expected["features"][1])
    assert_close(logits, expected["logits"])


@pytest.mark.parametrize("mode", ["replace", "replace_with_error"])
def test_a_user_edit_of_the_mlps_output_comes_after_the_replacement(mode: str) -> None:
    clt, model, ids = make_clt(), nnsight_model("gpt2"), token_ids()
    edits = {"recon": lambda layer, value: value + 1 if layer == 1 else value}
    expected = reference_run(make_model("gpt2"), ids, clt, mode, edits=edits)
    model.add_clt(clt, mode)
    with model.trace(ids):
        model.transformer.h[1].mlp.output += 1
        logits = model.output.logits.save()
    assert_close(logits, expected["logits"])


# ---------------------------------------------------------------- several invokes


@pytest.mark.parametrize(("family", "mode"), [("gpt2", "replace"), *(("gemma2", mode) for mode in MODES)])
def test_invokes_of_different_lengths_share_a_lasting_crosscoder(family: str, mode: str) -> None:
    clt, model = make_clt(), nnsight_model(family)
    expected = reference_run(make_model(family), clt=clt, mode=mode, **left_padded(PROMPTS))
    model.add_clt(clt, mode)
    with model.trace() as tracer:
        with tracer.invoke(PROMPTS[0]):
            first = read_points(model.clt, mode).save()
            logits = model.output.logits.save()
        with tracer.invoke(list(PROMPTS[1:])):
            others = read_points(model.clt, mode).save()
            other_logits = model.output.logits.save()
    assert_points(first, expected, slice(0, 1))
    assert_points(others, expected, slice(1, 3))
    assert_close(torch.cat((logits, other_logits)), expected["logits"])


@pytest.mark.parametrize("mode", ["replace", "replace_with_error"])
def test_an_edit_in_one_invoke_changes_its_rows_alone(mode: str) -> None:
    clt, model = make_clt(), nnsight_model("gpt2")

    def change(layer: int, acts: torch.Tensor) -> torch.Tensor:
        if layer == 1:
            acts[1, -1, :8] += 2
        return acts

    expected = reference_run(make_model("gpt2"), clt=clt, mode=mode, edit=change, **left_padded(PROMPTS[:2]))
    model.add_clt(clt, mode)
    with model.trace() as tracer:
        with tracer.invoke(PROMPTS[0]):
            logits = model.output.logits.save()
        with tracer.invoke(PROMPTS[1]):
            model.clt.layers[1].features.output[:, -1, :8] += 2
            other_logits = model.output.logits.save()
    assert_close(torch.cat((logits, other_logits)), expected["logits"])


@pytest.mark.parametrize(("family", "mode"), [("gpt2", "replace"), *(("gemma2", mode) for mode in MODES)])
def test_the_first_line_of_an_invoke_acts_in_that_invoke_alone(family: str, mode: str) -> None:
    clt, model, hf = make_clt(), nnsight_model(family), make_model(family)
    inputs = left_padded(PROMPTS)
    expected = reference_run(hf, clt=clt, mode=mode, **inputs)
    plain = reference_run(hf, clt=clt, mode="observe", **inputs)["logits"]
    before = Fingerprint(model)
    with model.trace() as tracer:
        with tracer.invoke(PROMPTS[0]):
            logits = model.output.logits.save()
        with tracer.invoke(PROMPTS[1]):
            model.add_clt(clt, mode)
            seen = read_points(model.clt, mode).save()
            other_logits = model.output.logits.save()
        with tracer.invoke(PROMPTS[2]):
            last_logits = model.output.logits.save()
    assert_points(seen, expected, slice(1, 2))
    assert_close(other_logits, expected["logits"][1:2])
    assert_close(torch.cat((logits, last_logits)), plain[[0, 2]], "the other invokes'")
    before.assert_unchanged()


@pytest.mark.parametrize("mode", MODES)
def test_two_invokes_with_a_crosscoder_each(mode: str) -> None:
    one, other, model, hf = make_clt(), make_clt(seed=5), nnsight_model("gpt2"), make_model("gpt2")
    inputs = left_padded(PROMPTS[:2])
    before = Fingerprint(model)
    with model.trace() as tracer:
        with tracer.invoke(PROMPTS[0]):
            model.add_clt(one, mode, name="one")
            seen = read_points(model.one, mode).save()
            logits = model.output.logits.save()
        with tracer.invoke(PROMPTS[1]):
            model.add_clt(other, mode, name="other")
            model.other.layers[0].features.output[:, -1] = 1
            other_logits = model.output.logits.save()

    def change(layer: int, acts: torch.Tensor) -> torch.Tensor:
        if layer == 0:
            acts[:, -1] = 1
        return acts

    expected = reference_run(hf, clt=one, mode=mode, **inputs)
    assert_points(seen, expected, slice(0, 1))
    assert_close(logits, expected["logits"][:1])
    expected = reference_run(hf, clt=other, mode=mode, edit=change, **inputs)
    assert_close(other_logits, expected["logits"][1:])
    before.assert_unchanged()


def test_an_invoke_without_an_input_sees_every_row() -> None:
    clt, model = make_clt(), nnsight_model("gpt2")
    expected = reference_run(make_model("gpt2"), clt=clt, **left_padded(PROMPTS))
    with model.trace() as tracer:
        with tracer.invoke(list(PROMPTS[:2])):
            pass
        with tracer.invoke(PROMPTS[2]):
            pass
        with tracer.invoke():
            model.add_clt(clt)
            seen = read_points(model.clt, "replace").save()
            logits = model.output.logits.save()
    assert_points(seen, expected)
    assert_close(logits, expected["logits"])


def test_a_barrier_hands_features_from_one_invoke_to_another() -> None:
    clt, model = make_clt(), nnsight_model("gpt2")
    prompts = ("w2 w3 w4", "w5 w6 w7")
    inputs = left_padded(prompts)
    acts = reference_run(make_model("gpt2"), clt=clt, **inputs)["features"][1]

    def change(layer: int, value: torch.Tensor) -> torch.Tensor:
        return torch.cat((value[:1], acts[:1])) if layer == 1 else value

    expected = reference_run(make_model("gpt2"), clt=clt, edit=change, **inputs)
    model.add_clt(clt)
    with model.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(prompts[0]):
            donated = model.clt.layers[1].features.output
            barrier()
        with tracer.invoke(prompts[1]):
            barrier()
            model.clt.layers[1].features.output = donated
            logits = model.output.logits.save()
    assert_close(logits, expected["logits"][1:])


# ---------------------------------------------------------------- nnsight's other idioms


def test_a_session_carries_features_from_one_trace_to_the_next() -> None:
    clt, model = make_clt(), nnsight_model("gpt2")
    ids, other_ids = token_ids(seed=1), token_ids(seed=2)
    acts = reference_run(make_model("gpt2"), ids, clt)["features"][1]
    edit = lambda layer, value: acts if layer == 1 else value  # noqa: E731
    expected = reference_run(make_model("gpt2"), other_ids, clt, edit=edit)
    model.add_clt(clt)
    with model.session():
        with model.trace(ids):
            donated = model.clt.layers[1].features.output
        with model.trace(other_ids):
            model.clt.layers[1].features.output = donated
            logits = model.output.logits.save()
    assert_close(logits, expected["logits"])


def test_a_session_of_traces_that_each_add_their_own() -> None:
    clt, model, ids = make_clt(), nnsight_model("gpt2"), token_ids()
    before = Fingerprint(model)
    with model.session():
        with model.trace(ids):
            model.add_clt(clt)
            acts = model.clt.layers[1].features.output
        with model.trace(ids):
            model.add_clt(clt, "replace_with_error")
            model.clt.layers[1].features.output = acts * 2
            logits = model.output.logits.save()
    acts = reference_run(make_model("gpt2"), ids, clt)["features"][1]
    edit = lambda layer, value: acts * 2 if layer == 1 else value  # noqa: E731
    expected = reference_run(make_model("gpt2"), ids, clt, "replace_with_error", edit=edit)
    assert_close(logits, expected["logits"])
    before.assert_unchanged()


def test_added_between_the_traces_of_a_session_it_stays() -> None:
    clt, model, ids = make_clt(), nnsight_model("gpt2"), token_ids()
    with model.session():
        with model.trace(ids):
            plain = model.output.logits.save()
        model.add_clt(clt)
        with model.trace(ids):
            logits = model.output.logits.save()
    expected = reference_run(make_model("gpt2"), ids, clt)["logits"]
    assert_close(plain, make_model("gpt2")(ids).logits)
    assert_close(logits, expected)
    assert_close(model.trace(ids, trace=False).logits, expected)


def test_a_cache_of_points() -> None:
    clt, model, ids = make_clt(), nnsight_model("gpt2"), token_ids()
    expected = reference_run(make_model("gpt2"), ids, clt)
    model.add_clt(clt)
    with model.trace(ids) as tracer:
        cache = tracer.cache(modules=[layer.features for layer in model.clt.layers])
    assert len(cache.keys()) == N_LAYERS
    for layer in range(N_LAYERS):
        assert_close(cache[f"model.clt.layers.{layer}.features"].output, expected["features"][layer])


def test_a_cache_of_everything_holds_the_points_too() -> None:
    clt, model, ids = make_clt(), nnsight_model("gpt2"), token_ids()
    expected = reference_run(make_model("gpt2"), ids, clt)
    with model.trace(ids) as tracer:
        model.add_clt(clt)
        cache = tracer.cache()
    assert_close(cache["model.clt.layers.1.features"].output, expected["features"][1])
    assert_close(cache["model.clt.layers.1.recon"].output, expected["recon"][1])
    assert_close(cache["model.transformer.h.1.mlp"].output, expected["recon"][1])


@pytest.mark.parametrize("first", ["edit", "crosscoder"])
def test_beside_an_edit_of_the_users(first: str) -> None:
    clt, model, ids = make_clt(), nnsight_model("gpt2"), token_ids()
    hf = make_model("gpt2")
    inner(hf, 0, "mlp").register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    change = {"features": lambda layer, acts: acts + 1 if layer == 1 else acts}
    expected = reference_run(hf, ids, clt, edits=change)
    if first == "crosscoder":
        model.add_clt(clt)
    with model.edit(inplace=True):
        model.transformer.h[0].mlp.input = model.transformer.h[0].mlp.input * 2
    if first == "edit":
        model.add_clt(clt)
    with model.edit(inplace=True):
        model.clt.layers[1].features.output += 1
    for _ in range(2):
        with model.trace(ids):
            acts = model.clt.layers[1].features.output.save()
            logits = model.output.logits.save()
        assert_close(acts, expected["features"][1])
        assert_close(logits, expected["logits"])


def test_an_edited_copy_of_the_model() -> None:
    clt, model, ids = make_clt(), nnsight_model("gpt2"), token_ids()
    model.add_clt(clt)
    with model.edit() as (_tracer, edited):
        edited.clt.layers[1].features.output *= 2
    edit = lambda layer, acts: acts * 2 if layer == 1 else acts  # noqa: E731
    with edited.trace(ids):
        logits = edited.output.logits.save()
    assert_close(logits, reference_run(make_model("gpt2"), ids, clt, edit=edit)["logits"])
    with model.trace(ids):
        logits = model.output.logits.save()
    assert_close(logits, reference_run(make_model("gpt2"), ids, clt)["logits"])


def test_a_crosscoder_added_to_an_edited_copy_stays_out_of_the_original() -> None:
    clt, model, ids = make_clt(), nnsight_model("gpt2"), token_ids()
    with model.edit() as (_tracer, edited):
        edited.transformer.h[0].mlp.output *= 1
    handle = edited.add_clt(clt)
    assert not hasattr(model, "clt")
    with model.trace(ids):
        plain = model.output.logits.save()
    assert_close(plain, make_model("gpt2")(ids).logits)
    model.add_clt(clt, "observe")
    with edited.trace(ids):
        acts = edited.clt.layers[1].features.output.save()
        logits = edited.output.logits.save()
    expected = reference_run(make_model("gpt2"), ids, clt)
    assert_close(acts, expected["features"][1])
    assert_close(logits, expected["logits"])
    handle.remove()
    assert not hasattr(edited, "clt")
    with model.trace(ids):
        acts = model.clt.layers[1].features.output.save()
    assert_close(acts, reference_run(make_model("gpt2"), ids, clt, "observe")["features"][1])


def test_an_edit_that_adds_a_crosscoder_itself() -> None:
    clt, model, ids = make_clt(), nnsight_model("gpt2"), token_ids()
    expected = reference_run(make_model("gpt2"), ids, clt)
    with model.edit(inplace=True):
        model.add_clt(clt)
    for _ in range(2):
        with model.trace(ids):
            logits = model.output.logits.save()
        assert_close(logits, expected["logits"])
    assert not hasattr(model, "clt")


# ---------------------------------------------------------------- skips


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_that_the_user_skips_is_silent(mode: str) -> None:
    clt, model, ids = make_clt(), nnsight_model("gpt2"), token_ids()
    hf = make_model("gpt2")
    inner(hf, 1).forward = lambda x, *args, **kwargs: x
    expected = reference_run(hf, ids, clt, mode)
    model.add_clt(clt, mode)
    with model.trace(ids):
        model.transformer.h[1].skip(model.transformer.h[1].input)
        acts = model.clt.layers[2].features.output.save()
        logits = model.output.logits.save()
    assert 1 not in expected["features"]
    assert_close(acts, expected["features"][2])
    assert_close(logits, expected["logits"])
    with model.trace(ids):
        logits = model.output.logits.save()
    assert_close(logits, reference_run(make_model("gpt2"), ids, clt, mode)["logits"], "the next trace")


@pytest.mark.parametrize("mode", MODES)
def test_a_user_skip_of_the_mlp_wins(mode: str) -> None:
    clt, model, ids = make_clt(), nnsight_model("gpt2"), token_ids()
    hf = make_model("gpt2")
    inner(hf, 1, "mlp").forward = lambda x: x * 3
    # With the error, what stands in for the MLP is what the reconstruction is completed to.
    expected = reference_run(hf, ids, clt, mode)
    if mode == "replace":
        edits = {"recon": lambda layer, y: inner(hf, 1, "ln_2")(state["x"]) * 3 if layer == 1 else y}
        state = {}
        inner(hf, 1, "ln_2").register_forward_pre_hook(lambda module, args: state.update(x=args[0]))
        expected = reference_run(hf, ids, clt, mode, edits=edits)
    model.add_clt(clt, mode)
    with model.trace(ids):
        x = model.transformer.h[1].mlp.input
        skipped_acts = model.clt.layers[1].features.output.save()
        model.transformer.h[1].mlp.skip(x * 3)
        acts = model.clt.layers[2].features.output.save()
        logits = model.output.logits.save()
    assert_close(skipped_acts, expected["features"][1])
    assert_close(acts, expected["features"][2])
    assert_close(logits, expected["logits"])


def test_a_module_called_ad_hoc_does_not_disturb_the_run() -> None:
    clt, model, ids = make_clt(), nnsight_model("gpt2"), token_ids()
    hf = make_model("gpt2")
    expected = reference_run(hf, ids, clt)
    model.add_clt(clt)
    with model.trace(ids):
        hidden = model.transformer.h[0].output.save()
        aside = model.transformer.h[0](hidden).save()
        acts = model.clt.layers[1].features.output.save()
        watched = model.transformer.h[0](hidden, hook=True).save()
        logits = model.output.logits.save()
    # Entered a second time, a block is the plain model's own.
    assert_close(aside, inner(hf, 0)(hidden))
    assert_close(watched, aside)
    assert_close(acts, expected["features"][1])
    assert_close(logits, expected["logits"])


# ---------------------------------------------------------------- several crosscoders


def test_two_observe_at_once() -> None:
    one, other, model, ids = make_clt(), make_clt(seed=5, read="resid_mid"), nnsight_model("gpt2"), token_ids()
    model.add_clt(one, "observe", name="one")
    model.add_clt(other, "observe", name="other")
    with model.trace(ids):
        seen = [read_points(model.other, "observe", [1]), read_points(model.one, "observe", [2])].save()
        logits = model.output.logits.save()
    hf = make_model("gpt2")
    assert_points(seen[0], reference_run(hf, ids, other, "observe"))
    assert_points(seen[1], reference_run(hf, ids, one, "observe"))
    assert_close(logits, hf(ids).logits)


@pytest.mark.parametrize("first", ["replacing", "observing"])
def test_one_replaces_and_one_observes_what_it_reads(first: str) -> None:
    replacing, observing, model, ids = make_clt(), make_clt(seed=5), nnsight_model("gpt2"), token_ids()
    edit = lambda layer, acts: acts * 2 if layer == 0 else acts  # noqa: E731
    expected = reference_run(make_model("gpt2"), ids, replacing, edit=edit)
    if first == "replacing":
        model.add_clt(replacing, name="replacing")
    model.add_clt(observing, "observe", name="observing")
    if first == "observing":
        model.add_clt(replacing, name="replacing")
    with model.trace(ids):
        model.replacing.layers[0].features.output *= 2
        observed = model.observing.layers[2].features.output.save()
        logits = model.output.logits.save()
    assert_close(logits, expected["logits"])
    # It encodes the inputs of the replaced run.
    inputs = torch.stack(list(expected["enc_in"].values()))
    assert_close(observed, observing.encode(inputs)[2])


def test_two_replace_disjoint_layers() -> None:
    lower, upper = make_clt(Wiring.plt(1)), make_clt(Wiring.plt(2).select([1]), seed=5)
    lower.is_partial = False
    model, ids = nnsight_model("gpt2"), token_ids()
    model.add_clt(lower.select([0]), "replace_with_error", name="lower")
    model.add_clt(upper.select([1]), "replace_with_error", name="upper")
    with model.trace(ids):
        model.lower.layers[0].features.output *= 2
        model.upper.layers[1].features.output *= 2
        logits = model.output.logits.save()
    both = make_clt(Wiring.plt(2))
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        getattr(both, name)[0] = getattr(lower, name)[0]
        getattr(both, name)[1] = getattr(upper, name)[0]
    expected = reference_run(make_model("gpt2"), ids, both, "replace_with_error", edit=lambda layer, acts: acts * 2)
    assert_close(logits, expected["logits"])
