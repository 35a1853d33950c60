"""Coming and going: what removal, stops, errors and refusals leave behind, which is nothing."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

from clt_plugin import AttachError, Wiring, add_clt
from clt_plugin.adapters import _run
from support.crosscoders import make_clt
from support.models import N_LAYERS, make_model, nnsight_model
from support.reference import reference_run
from support.tracing import MODES, Fingerprint, assert_close, token_ids


def assert_plain(model, ids: torch.Tensor) -> None:
    """A trace gives what the plain model gives."""
    with model.trace(ids):
        logits = model.output.logits.save()
    assert torch.equal(logits, make_model("gpt2")(ids).logits)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref]:
    """Weak references to every run that starts, and to the tensors that go through it."""
    alive: list[weakref.ref] = []
    init, encode = _run.Run.__init__, _run.Run.encode

    def noted_init(self, *args) -> None:
        init(self, *args)
        alive.append(weakref.ref(self))

    def noted_encode(self, group, visit) -> None:
        def noted_visit(name, value):
            value = visit(name, value)
            alive.append(weakref.ref(value))
            return value

        encode(self, group, noted_visit)
        alive.extend(weakref.ref(value) for value in (*self.inputs.values(), *self.decoded.values()))

    monkeypatch.setattr(_run.Run, "__init__", noted_init)
    monkeypatch.setattr(_run.Run, "encode", noted_encode)
    return alive


def assert_all_dead(runs: list[weakref.ref]) -> None:
    assert len(runs) > 5, "nothing was noted"
    alive = [type(run()).__name__ for run in runs if run() is not None]
    assert not alive, f"still alive: {alive}"


def assert_emptied(runs: list[weakref.ref]) -> None:
    """What an exception still holds of a run has let go of its tensors."""
    for ref in runs:
        if type(ref()) is _run.Run:
            assert not vars(ref())["inputs"]
            assert not vars(ref())["decoded"]


# ---------------------------------------------------------------- removal


@pytest.mark.parametrize("mode", MODES)
def test_removal_leaves_the_model_as_it_was(mode: str) -> None:
    model, ids = nnsight_model("gpt2"), token_ids()
    with model.trace(ids):
        logits = model.output.logits.save()
    before = Fingerprint(model)
    handle = model.add_clt(make_clt(), mode)
    with model.trace(ids):
        model.clt.layers[1].features.output *= 2
    assert hasattr(model, "clt")
    handle.remove()
    before.assert_unchanged()
    assert not hasattr(model, "clt")
    with model.trace(ids):
        again = model.output.logits.save()
    assert torch.equal(again, logits)
    handle.remove()
    before.assert_unchanged()


def test_attaching_changes_no_module() -> None:
    model = nnsight_model("gpt2")
    modules, keys = list(model._module.named_modules()), list(model._module.state_dict())
    parameters = sum(parameter.numel() for parameter in model._module.parameters())
    model.add_clt(make_clt())
    assert list(model._module.named_modules()) == modules
    assert list(model._module.state_dict()) == keys
    assert sum(parameter.numel() for parameter in model._module.parameters()) == parameters


def test_a_second_removal_leaves_a_later_crosscoder_alone() -> None:
    model, ids, clt = nnsight_model("gpt2"), token_ids(), make_clt(seed=5)
    handle = model.add_clt(make_clt())
    handle.remove()
    model.add_clt(clt)
    handle.remove()
    with model.trace(ids):
        acts = model.clt.layers[1].features.output.save()
    assert_close(acts, reference_run(make_model("gpt2"), ids, clt)["features"][1])


def test_a_handle_is_a_context_manager() -> None:
    model, ids, clt = nnsight_model("gpt2"), token_ids(), make_clt()
    before = Fingerprint(model)
    with model.add_clt(clt) as handle:
        with model.trace(ids):
            acts = handle.layers[1].features.output.save()
        assert handle.crosscoder is clt
        assert (handle.name, handle.mode) == ("clt", "replace")
    assert_close(acts, reference_run(make_model("gpt2"), ids, clt)["features"][1])
    before.assert_unchanged()
    with pytest.raises(RuntimeError, match="mine"), model.add_clt(clt):
        raise RuntimeError("mine")
    before.assert_unchanged()
    assert "removed" in repr(handle)


def test_clearing_edits_removes_it_and_it_can_be_added_again() -> None:
    model, ids, clt = nnsight_model("gpt2"), token_ids(), make_clt()
    before = Fingerprint(model)
    first = model.add_clt(clt)
    model.clear_edits()
    assert_plain(model, ids)
    second = model.add_clt(clt)
    with model.trace(ids):
        logits = model.output.logits.save()
    assert_close(logits, reference_run(make_model("gpt2"), ids, clt)["logits"])
    first.remove()
    with model.trace(ids):
        logits = model.output.logits.save()
    assert_close(logits, reference_run(make_model("gpt2"), ids, clt)["logits"])
    second.remove()
    before.assert_unchanged()


def test_clearing_edits_and_then_removing() -> None:
    model = nnsight_model("gpt2")
    before = Fingerprint(model)
    handle = model.add_clt(make_clt())
    model.clear_edits()
    handle.remove()
    before.assert_unchanged()


@pytest.mark.parametrize("first", [0, 1])
def test_one_of_two_is_removed(first: int) -> None:
    model, ids, clts = nnsight_model("gpt2"), token_ids(), [make_clt(), make_clt(seed=5)]
    handles = [model.add_clt(clt, "observe", name=name) for clt, name in zip(clts, ("one", "other"), strict=True)]
    handles[first].remove()
    with model.trace(ids):
        acts = handles[1 - first].layers[1].features.output.save()
    assert_close(acts, reference_run(make_model("gpt2"), ids, clts[1 - first], "observe")["features"][1])
    handles[1 - first].remove()
    assert model._edits == []


def test_the_models_parameters_can_change_meanwhile() -> None:
    model, ids, clt = nnsight_model("gpt2"), token_ids(), make_clt()
    model.add_clt(clt)
    changed = make_model("gpt2")
    changed.load_state_dict({key: value * 1.1 for key, value in changed.state_dict().items()})
    model._module.load_state_dict(changed.state_dict())
    with model.trace(ids):
        logits = model.output.logits.save()
    assert_close(logits, reference_run(changed, ids, clt)["logits"])


def test_the_crosscoders_parameters_can_change_meanwhile() -> None:
    model, ids, clt = nnsight_model("gpt2"), token_ids(), make_clt()
    model.add_clt(clt)
    clt.W_dec[0].data.mul_(2)
    with model.trace(ids):
        logits = model.output.logits.save()
    changed = make_clt()
    changed.W_dec[0].data.mul_(2)
    assert_close(logits, reference_run(make_model("gpt2"), ids, changed)["logits"])


def test_a_copy_of_the_plain_model_is_plain() -> None:
    model, ids = nnsight_model("gpt2"), token_ids()
    model.add_clt(make_clt())
    assert torch.equal(copy.deepcopy(model._module)(ids).logits, make_model("gpt2")(ids).logits)


# ---------------------------------------------------------------- runs that end early


@pytest.mark.parametrize("where", ["before", "first line"])
@pytest.mark.parametrize("mode", MODES)
def test_a_whole_run_leaves_nothing_behind(mode: str, where: str, runs: list[weakref.ref]) -> None:
    model, ids, clt = nnsight_model("gpt2"), token_ids(), make_clt()
    before = Fingerprint(model)
    if where == "before":
        handle = model.add_clt(clt, mode)
        with model.trace(ids):
            shape = model.clt.layers[1].features.output.shape.save()
        handle.remove()
    else:
        with model.trace(ids):
            model.add_clt(clt, mode)
            shape = model.clt.layers[1].features.output.shape.save()
    assert shape[:2] == ids.shape
    before.assert_unchanged()
    assert_all_dead(runs)


@pytest.mark.parametrize(("where", "mode"), [("before", "replace"), ("first line", "replace_with_error")])
@pytest.mark.parametrize("stop_at", ["features", "recon", "block"])
def test_a_stopped_trace_leaves_nothing_behind(stop_at: str, mode: str, where: str, runs: list[weakref.ref]) -> None:
    model, ids, clt = nnsight_model("gpt2"), token_ids(), make_clt()
    before = Fingerprint(model)
    if where == "before":
        handle = model.add_clt(clt, mode)
        with model.trace(ids) as tracer:
            if stop_at == "block":
                shape = model.transformer.h[1].output.shape.save()
            else:
                shape = getattr(model.clt.layers[1], stop_at).output.shape.save()
            tracer.stop()
    else:
        with model.trace(ids) as tracer:
            model.add_clt(clt, mode)
            if stop_at == "block":
                shape = model.transformer.h[1].output.shape.save()
            else:
                shape = getattr(model.clt.layers[1], stop_at).output.shape.save()
            tracer.stop()
    assert shape[:2] == ids.shape
    assert_emptied(runs)
    gc.collect()  # an exception that a frame holds holds that frame: nnsight's stop is such a circle
    assert_all_dead(runs)
    if where == "before":
        with model.trace(ids):
            logits = model.output.logits.save()
        assert_close(logits, reference_run(make_model("gpt2"), ids, clt, mode)["logits"], "the next trace")
        handle.remove()
    before.assert_unchanged()
    assert_plain(model, ids)


@pytest.mark.parametrize("where", ["before", "first line"])
@pytest.mark.parametrize("when", ["at once", "at a point", "at the end"])
def test_an_error_in_the_body_leaves_the_model_usable(when: str, where: str, runs: list[weakref.ref]) -> None:
    model, ids, clt = nnsight_model("gpt2"), token_ids(), make_clt()
    before = Fingerprint(model)
    handle = model.add_clt(clt) if where == "before" else None

    def fail(now: str) -> None:
        if now == when:
            raise RuntimeError("mine")

    def run() -> None:
        with model.trace(ids):
            if handle is None:
                model.add_clt(clt)
            fail("at once")
            acts = model.clt.layers[1].features.output
            fail("at a point")
            acts = model.output.logits + acts.sum()
            fail("at the end")

    with pytest.raises(RuntimeError, match="mine"):
        run()
    gc.collect()  # the exception held its frames, and they the tensors
    if when != "at once":
        assert_all_dead(runs)
    if handle is not None:
        with model.trace(ids):
            logits = model.output.logits.save()
        assert_close(logits, reference_run(make_model("gpt2"), ids, clt)["logits"])
        handle.remove()
    before.assert_unchanged()
    assert_plain(model, ids)


def test_an_error_in_the_model_leaves_it_usable() -> None:
    model, ids, clt = nnsight_model("gpt2"), token_ids(), make_clt()
    before = Fingerprint(model)

    def run() -> None:
        with model.trace(ids + 1000):
            model.add_clt(clt)
            model.clt.layers[1].features.output.save()

    with pytest.raises(IndexError):
        run()
    before.assert_unchanged()
    assert_plain(model, ids)


def test_a_point_asked_for_too_late_is_nnsights_own_error() -> None:
    from nnsight.intervention.interleaver import OutOfOrderError

    model, ids, clt = nnsight_model("gpt2"), token_ids(), make_clt()
    model.add_clt(clt)

    def run() -> None:
        with model.trace(ids):
            late = model.clt.layers[2].features.output
            late = model.clt.layers[0].features.output + late

    with pytest.raises(OutOfOrderError, match=r"clt.layers.0.features.output"):
        run()
    with model.trace(ids):
        logits = model.output.logits.save()
    assert_close(logits, reference_run(make_model("gpt2"), ids, clt)["logits"])


def test_traces_do_not_pile_up() -> None:
    model, ids, clt = nnsight_model("gpt2"), token_ids(), make_clt()
    model.add_clt(clt, "replace_with_error")

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    counts = []
    for _ in range(3):
        with model.trace(ids):
            model.clt.layers[1].features.output *= 2
        counts.append(tensors())
    assert counts[1] == counts[2]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("how", ["method", "function"])
def test_refused_after_the_first_line(how: str) -> None:
    model, ids, clt = nnsight_model("gpt2"), token_ids(), make_clt()
    before = Fingerprint(model)

    def run() -> None:
        with model.trace(ids):
            hidden = model.transformer.h[0].output
            if how == "method":
                model.add_clt(clt)
            else:
                add_clt(model, clt)
            hidden = model.output.logits + hidden.sum()

    with pytest.raises(AttachError, match="first line"):
        run()
    before.assert_unchanged()
    assert_plain(model, ids)


def test_refused_after_the_first_line_of_an_invoke() -> None:
    model, ids, clt = nnsight_model("gpt2"), token_ids(), make_clt()
    before = Fingerprint(model)

    def run() -> None:
        with model.trace() as tracer:
            with tracer.invoke(ids[:1]):
                model.output.logits.save()
            with tracer.invoke(ids[1:]):
                model.transformer.h[1].output.save()
                model.add_clt(clt)

    with pytest.raises(AttachError, match="first line"):
        run()
    before.assert_unchanged()
    assert_plain(model, ids)


def test_refused_in_the_body_of_a_trace_before_its_invokes() -> None:
    model, ids, clt = nnsight_model("gpt2"), token_ids(), make_clt()
    before = Fingerprint(model)

    def run() -> None:
        with model.trace() as tracer:
            model.add_clt(clt)
            with tracer.invoke(ids):
                model.output.logits.save()

    with pytest.raises(AttachError, match="invoke"):
        run()
    before.assert_unchanged()
    assert_plain(model, ids)


def test_refused_in_the_body_of_generate_before_its_invokes() -> None:
    model, ids, clt = nnsight_model("gpt2"), token_ids(), make_clt()
    before = Fingerprint(model)

    def run() -> None:
        with model.generate(max_new_tokens=2) as tracer:
            model.add_clt(clt)
            with tracer.invoke(ids):
                tracer.result.save()

    with pytest.raises(AttachError, match="invoke"):
        run()
    before.assert_unchanged()


@pytest.mark.parametrize(
    "name", ["clt", "transformer", "trace", "output", "_edits", "not a name", "generator", "config"]
)
def test_refused_under_a_name_that_is_taken_or_is_none(name: str) -> None:
    model, ids, clt = nnsight_model("gpt2"), token_ids(), make_clt()
    model.add_clt(clt, "observe")
    before = Fingerprint(model)
    with pytest.raises(AttachError, match="name"):
        model.add_clt(clt, "observe", name=name)
    with pytest.raises(AttachError, match="name"), model.trace(ids):
        model.add_clt(clt, "observe", name=name)
    before.assert_unchanged()
    assert_plain(model, ids)


def test_refused_where_another_replaces_already() -> None:
    model, ids, clt = nnsight_model("gpt2"), token_ids(), make_clt()
    model.add_clt(clt, name="first")
    before = Fingerprint(model)
    with pytest.raises(AttachError, match=r"'first' writes the MLP outputs of layers \[0, 1, 2\] already"):
        model.add_clt(clt, name="second")
    with pytest.raises(AttachError, match="'first'"), model.trace(ids):
        model.add_clt(clt, name="second")
    before.assert_unchanged()
    with model.trace(ids):
        logits = model.output.logits.save()
    assert_close(logits, reference_run(make_model("gpt2"), ids, clt)["logits"])


def test_what_does_not_fit_is_refused_inside_a_trace_too() -> None:
    model, ids = nnsight_model("gpt2"), token_ids()
    before = Fingerprint(model)
    too_deep = make_clt(Wiring.clt(N_LAYERS + 1))
    with pytest.raises(AttachError, match="4 layers"), model.trace(ids):
        model.add_clt(too_deep)
    with pytest.raises(AttachError, match="mode"), model.trace(ids):
        model.add_clt(make_clt(), "steer")
    before.assert_unchanged()
    assert_plain(model, ids)


def test_the_handle_of_a_trace_says_that_it_cannot_be_removed() -> None:
    model, ids, clt = nnsight_model("gpt2"), token_ids(), make_clt()
    before = Fingerprint(model)
    with model.trace(ids):
        handle = model.add_clt(clt).save()
        acts = handle.layers[1].features.output.save()
        said = repr(handle).save()
        try:
            handle.remove()
        except AttachError as error:
            refusal = str(error).save()
        logits = model.output.logits.save()
    expected = reference_run(make_model("gpt2"), ids, clt)
    assert_close(acts, expected["features"][1])
    assert_close(logits, expected["logits"])
    assert "until its run ends" in refusal
    assert said.endswith("for one run>")
    before.assert_unchanged()
