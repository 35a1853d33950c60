"""A crosscoder in generation: every step is replaced and can be read, and equals a run without a cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support.crosscoders import make_clt
from support.models import N_LAYERS, make_model, nnsight_model
from support.reference import reference_attached, reference_greedy
from support.tracing import MODES, Fingerprint, assert_close, left_padded, token_ids

STEPS = 4
PROMPTS = ("w2 w3 w4 w5", "w7 w8")
OPEN_LOOP = "ignore:.*was never reached. the loop asked for a step:UserWarning"


def assert_steps(seen: list[dict[int, Tensor]], runs: list[dict], rows: slice = slice(None)) -> None:
    """Compare the features of every step with those of runs over the whole text."""
    assert len(seen) == len(runs)
    for step, (acts, run) in enumerate(zip(seen, runs, strict=True)):
        for layer in range(N_LAYERS):
            expected = run["features"][layer][rows]
            assert_close(acts[layer], expected if step == 0 else expected[:, -1:], f"step {step}, layer {layer}")


@pytest.mark.parametrize(("family", "mode"), [*(("gpt2", mode) for mode in MODES), ("gemma2", "replace")])
def test_every_step_is_replaced_and_readable(family: str, mode: str) -> None:
    clt, model, ids = make_clt(), nnsight_model(family), token_ids()
    runs = reference_greedy(make_model(family), ids, clt, mode, STEPS)
    model.add_clt(clt, mode)
    with model.generate(ids, max_new_tokens=STEPS, do_sample=False) as tracer:
        seen = [].save()
        for _step in tracer.iter[:STEPS]:
            seen.append({layer: model.clt.layers[layer].features.output for layer in range(N_LAYERS)})
        out = tracer.result.save()
    assert_steps(seen, runs)
    assert torch.equal(out, runs[-1]["ids"])
    assert 1 not in out, "an end of text would cut the test short: choose another seed"


@pytest.mark.filterwarnings(OPEN_LOOP)
@pytest.mark.parametrize("where", ["before", "first line"])
def test_an_open_loop_over_the_steps(where: str) -> None:
    clt, model, ids = make_clt(), nnsight_model("gpt2"), token_ids()
    runs = reference_greedy(make_model("gpt2"), ids, clt, "replace", STEPS)
    before = Fingerprint(model)
    if where == "before":
        handle = model.add_clt(clt)
        with model.generate(ids, max_new_tokens=STEPS, do_sample=False) as tracer:
            seen, logits = [].save(), [].save()
            for _step in tracer.iter[:]:
                seen.append({layer: model.clt.layers[layer].features.output for layer in range(N_LAYERS)})
                logits.append(model.lm_head.output[:, -1])
        handle.remove()
    else:
        with model.generate(ids, max_new_tokens=STEPS, do_sample=False) as tracer:
            model.add_clt(clt)
            seen, logits = [].save(), [].save()
            for _step in tracer.iter[:]:
                seen.append({layer: model.clt.layers[layer].features.output for layer in range(N_LAYERS)})
                logits.append(model.lm_head.output[:, -1])
    assert_steps(seen, runs)
    for step, run in enumerate(runs):
        assert_close(logits[step], run["logits"][:, -1], f"step {step}")
    before.assert_unchanged()


def test_generation_without_a_body() -> None:
    clt, model, ids = make_clt(), nnsight_model("gpt2"), token_ids()
    runs = reference_greedy(make_model("gpt2"), ids, clt, "replace", STEPS)
    model.add_clt(clt)
    assert torch.equal(model.generate(ids, max_new_tokens=STEPS, do_sample=False), runs[-1]["ids"])


@pytest.mark.parametrize("mode", ["replace", "replace_with_error"])
def test_an_edit_at_every_step(mode: str) -> None:
    clt, model, ids = make_clt(), nnsight_model("gpt2"), token_ids()
    edit = lambda layer, acts: acts * 2 if layer == 1 else acts  # noqa: E731
    runs = reference_greedy(make_model("gpt2"), ids, clt, mode, STEPS, edit=edit)
    plain = reference_greedy(make_model("gpt2"), ids, clt, mode, STEPS)
    model.add_clt(clt, mode)
    with model.generate(ids, max_new_tokens=STEPS, do_sample=False) as tracer:
        for _step in tracer.iter[:STEPS]:
            model.clt.layers[1].features.output *= 2
        out = tracer.result.save()
    assert torch.equal(out, runs[-1]["ids"])
    assert not torch.equal(out, plain[-1]["ids"]), "the edit should show: choose another seed"


def test_an_edit_at_one_step_lasts_in_the_cache() -> None:
    clt, model, ids = make_clt(), nnsight_model("gpt2"), token_ids()
    position = ids.shape[1]  # of the first token generated, which step 1 runs

    def edit(layer: int, acts: Tensor) -> Tensor:
        if layer == 0 and acts.shape[1] > position:
            acts[:, position] += 1
        return acts

    runs = reference_greedy(make_model("gpt2"), ids, clt, "replace_with_error", STEPS, edit=edit)
    model.add_clt(clt, "replace_with_error")
    with model.generate(ids, max_new_tokens=STEPS, do_sample=False) as tracer:
        logits = [].save()
        for step in tracer.iter[:STEPS]:
            if step == 1:
                model.clt.layers[0].features.output += 1
            logits.append(model.lm_head.output[:, -1])
        out = tracer.result.save()
    for step, run in enumerate(runs):
        assert_close(logits[step], run["logits"][:, -1], f"step {step}")
    assert torch.equal(out, runs[-1]["ids"])


def test_an_mlp_skipped_at_one_step_leaves_the_other_steps_in_step() -> None:
    clt, model, ids = make_clt(), nnsight_model("gpt2"), token_ids()
    position = ids.shape[1]

    def silence(layer: int, y: Tensor) -> Tensor:
        if layer == 1 and y.shape[1] > position:
            y[:, position] = 0
        return y

    runs = reference_greedy(make_model("gpt2"), ids, clt, "replace", STEPS, edits={"recon": silence})
    model.add_clt(clt)
    with model.generate(ids, max_new_tokens=STEPS, do_sample=False) as tracer:
        seen = [].save()
        for step in tracer.iter[:STEPS]:
            if step == 1:
                acts = {layer: model.clt.layers[layer].features.output for layer in (0, 1)}
                model.transformer.h[1].mlp.skip(torch.zeros_like(ids[:, :1, None] * acts[0][..., :16]))
                seen.append(acts | {2: model.clt.layers[2].features.output})
            else:
                seen.append({layer: model.clt.layers[layer].features.output for layer in range(N_LAYERS)})
    assert_steps(seen, runs)


@pytest.mark.parametrize("mode", MODES)
def test_left_padded_prompts_in_two_invokes(mode: str) -> None:
    clt, model = make_clt(), nnsight_model("gpt2")
    inputs = left_padded(PROMPTS)
    runs = reference_greedy(make_model("gpt2"), inputs["ids"], clt, mode, STEPS, inputs["attention_mask"])
    model.add_clt(clt, mode)
    with model.generate(max_new_tokens=STEPS, do_sample=False) as tracer:
        with tracer.invoke(PROMPTS[0]):
            first = [].save()
            for _step in tracer.iter[:STEPS]:
                first.append({layer: model.clt.layers[layer].features.output for layer in range(N_LAYERS)})
        with tracer.invoke(PROMPTS[1]):
            second = [].save()
            for _step in tracer.iter[:STEPS]:
                second.append({layer: model.clt.layers[layer].features.output for layer in range(N_LAYERS)})
        with tracer.invoke():
            out = tracer.result.save()
    assert_steps(first, runs, slice(0, 1))
    assert_steps(second, runs, slice(1, 2))
    assert torch.equal(out, runs[-1]["ids"])


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_the_first_line_of_one_invoke(family: str) -> None:
    clt, model = make_clt(), nnsight_model(family)
    inputs = left_padded(PROMPTS)
    replaced = reference_greedy(make_model(family), inputs["ids"], clt, "replace", STEPS, inputs["attention_mask"])
    plain = reference_greedy(make_model(family), inputs["ids"], clt, "observe", STEPS, inputs["attention_mask"])
    before = Fingerprint(model)
    with model.generate(max_new_tokens=STEPS, do_sample=False) as tracer:
        with tracer.invoke(PROMPTS[0]):
            model.add_clt(clt)
            seen = [].save()
            for _step in tracer.iter[:STEPS]:
                seen.append({layer: model.clt.layers[layer].features.output for layer in range(N_LAYERS)})
            out = tracer.result.save()
        with tracer.invoke(PROMPTS[1]):
            other_out = tracer.result.save()
    assert_steps(seen, replaced, slice(0, 1))
    assert torch.equal(out, replaced[-1]["ids"][:1])
    assert torch.equal(other_out, plain[-1]["ids"][1:])
    before.assert_unchanged()


@pytest.mark.parametrize(("mode", "where"), [("replace", "before"), ("replace_with_error", "first line")])
def test_beams(mode: str, where: str) -> None:
    clt, model, ids = make_clt(), nnsight_model("gpt2"), token_ids(rows=1)
    settings = {"max_new_tokens": STEPS, "num_beams": 2, "do_sample": False}
    with reference_attached(make_model("gpt2"), clt, mode) as hf:
        expected = hf.generate(ids, **settings)
    if where == "before":
        model.add_clt(clt, mode)
        with model.generate(ids, **settings) as tracer:
            acts = [].save()
            for _step in tracer.iter[:STEPS]:
                acts.append(model.clt.layers[1].features.output)
            out = tracer.result.save()
    else:
        with model.generate(ids, **settings) as tracer:
            model.add_clt(clt, mode)
            acts = [].save()
            for _step in tracer.iter[:STEPS]:
                acts.append(model.clt.layers[1].features.output)
            out = tracer.result.save()
    assert torch.equal(out, expected)
    assert [tuple(value.shape[:2]) for value in acts] == [(2, ids.shape[1])] + [(2, 1)] * (STEPS - 1)


def test_the_first_positions_are_excluded_in_the_first_step_alone() -> None:
    clt, model = make_clt(exclude_first=2), nnsight_model("gpt2")
    inputs = left_padded(PROMPTS)
    runs = reference_greedy(make_model("gpt2"), inputs["ids"], clt, "replace", STEPS, inputs["attention_mask"])
    model.add_clt(clt)
    with model.generate(list(PROMPTS), max_new_tokens=STEPS, do_sample=False) as tracer:
        seen = [].save()
        for _step in tracer.iter[:STEPS]:
            seen.append({layer: model.clt.layers[layer].features.output for layer in range(N_LAYERS)})
        out = tracer.result.save()
    assert_steps(seen, runs)
    assert not seen[0][0][0, :2].any()
    assert not seen[0][0][1, 2:4].any(), "padding does not count as a first position"
    assert seen[0][0][1, :2].any()
    assert all(acts[0].any() for acts in seen[1:])
    assert torch.equal(out, runs[-1]["ids"])


def test_generation_stopped_half_way_leaves_nothing_behind() -> None:
    clt, model, ids = make_clt(), nnsight_model("gpt2"), token_ids()
    before = Fingerprint(model)
    with model.generate(ids, max_new_tokens=STEPS, do_sample=False) as tracer:
        model.add_clt(clt)
        for step in tracer.iter[:STEPS]:
            acts = model.clt.layers[1].features.output.save()
            if step == 2:
                tracer.stop()
    runs = reference_greedy(make_model("gpt2"), ids, clt, "replace", 3)
    assert_close(acts, runs[2]["features"][1][:, -1:])
    before.assert_unchanged()
    assert torch.equal(
        model.generate(ids, max_new_tokens=2, do_sample=False), make_model("gpt2").generate(ids, max_new_tokens=2)
    )
