"""Steering in generation, against the whole text computed again at every step without a cache."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.testing import assert_close
from transformers.masking_utils import eager_mask

from clt_plugin import AttachError
from clt_plugin import interventions as iv
from support.crosscoders import make_clt
from support.models import bridge_model, make_model, make_tokenizer, nnsight_model
from support.reference import reference_greedy, reference_run
from support.tracing import left_padded, token_ids

STEPS = 5
PROMPTS = ("w2 w3 w4 w5", "w7 w8")
RUNS = {"iterative": "replace_with_error", "replace": "replace"}
LIBRARIES = {"nnsight": nnsight_model, "transformer_lens": bridge_model, "transformers": lambda hf: hf}


def set_to(value: float, chosen: Any, feature: int = 4, layer: int = 1) -> Any:
    """An edit by hand: a feature set at the columns that ``chosen(row, n_columns)`` gives."""

    def edit(at: int, acts: Tensor) -> Tensor:
        if at == layer:
            for row in range(acts.shape[0]):
                acts[row, list(chosen(row, acts.shape[1])), feature] = value
        return acts

    return edit


def greedy(family: str, inputs: dict, clt: Any, mode: str, edit: Any = None, steps: int = STEPS) -> list[dict]:
    hf = make_model(family)
    return reference_greedy(hf, inputs["ids"], clt, RUNS[mode], steps, inputs.get("attention_mask"), edit=edit)


class Steps:
    """The logits of every step, as a logits processor sees them."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.logits.append(scores.clone())
        return scores

    def assert_those_of(self, runs: list[dict]) -> None:
        assert len(self.logits) == len(runs)
        for step, (found, run) in enumerate(zip(self.logits, runs, strict=True)):
            assert_close(
                found, run["logits"][:, -1], rtol=2e-5, atol=2e-5, msg=lambda text, n=step: f"step {n}: {text}"
            )


def differ(runs: list[dict], others: list[dict]) -> None:
    """Check that two series of runs have different logits: otherwise to equal one of them says nothing."""
    pairs = zip(runs, others, strict=True)
    assert max(float((a["logits"][:, -1] - b["logits"][:, -1]).abs().max()) for a, b in pairs) > 1e-2


# What acts where, beside which columns of each padded row those are: rows start at 0 and 2, prompts end at 5.
RESTRICTIONS = {
    "everywhere": ({}, lambda row, n: range((0, 2)[row], n)),
    "from a position on": ({"start": 3}, lambda row, n: range((0, 2)[row] + 3, n)),
    "from a generated position on": ({"start": 5}, lambda row, n: range((0, 2)[row] + 5, n)),
    "the prompt": ({"tokens": "prompt"}, lambda row, n: range((0, 2)[row], 5)),
    "what is generated": ({"tokens": "generated"}, lambda row, n: range(5, n)),
    "the prompt's end": ({"start": 2, "tokens": "prompt"}, lambda row, n: range((0, 2)[row] + 2, 5)),
}


@pytest.mark.parametrize("which", RESTRICTIONS)
@pytest.mark.parametrize("mode", RUNS)
def test_restrictions_in_a_padded_batch(which: str, mode: str) -> None:
    clt, inputs, steps = make_clt(), left_padded(PROMPTS), Steps()
    settings, chosen = RESTRICTIONS[which]
    runs = greedy("gpt2", inputs, clt, mode, set_to(6.0, chosen))
    differ(runs, greedy("gpt2", inputs, clt, mode))
    edit = iv.steer(layer=1, feature=4, value=6.0, **settings)
    found = iv.generate(
        nnsight_model("gpt2"),
        list(PROMPTS),
        edit,
        max_new_tokens=STEPS,
        mode=mode,
        clt=clt,
        logits_processor=[steps],
        eos_token_id=None,
    )
    assert torch.equal(found.ids, runs[-1]["ids"])
    steps.assert_those_of(runs)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mistral"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_every_library(library: str, family: str) -> None:
    clt, inputs = make_clt(exclude_first=1), left_padded(PROMPTS)
    runs = greedy(family, inputs, clt, "iterative", set_to(6.0, lambda row, n: range((1, 3)[row], n)), steps=6)
    plain = make_model(family).generate(
        inputs["ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    model, steps = LIBRARIES[library](make_model(family)), Steps()
    edit = iv.steer(layer=1, feature=4, value=6.0, start=1)
    prompt = {"input_ids": inputs["ids"], "attention_mask": inputs["attention_mask"]}
    settings = {"max_new_tokens": 6, "clt": clt, "eos_token_id": None}
    found = iv.generate(model, prompt, edit, logits_processor=[steps], **settings)
    assert torch.equal(found.ids, runs[-1]["ids"])
    steps.assert_those_of(runs)
    beside = iv.generate(model, prompt, edit, compare=True, **settings)
    assert torch.equal(beside.ids, found.ids)
    assert beside.unedited is not None
    assert torch.equal(beside.unedited.ids, plain)
    assert not torch.equal(found.ids, plain), "the edit should show: choose another"


def test_the_attached_crosscoder_is_the_default_and_takes_no_part_otherwise() -> None:
    clt, ids = make_clt(), token_ids()
    expected = greedy("gpt2", {"ids": ids}, clt, "iterative", set_to(6.0, lambda row, n: range(n)))[-1]["ids"]
    edit = iv.steer(layer=1, feature=4, value=6.0)
    for library in ("nnsight", "transformer_lens"):
        model = LIBRARIES[library](make_model("gpt2"))
        before = [(n, id(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in _modules(model)]
        # What is attached steers too, if it takes part.
        handle = model.add_clt(clt, "replace", edits=iv.set_value(layer=0, feature=2, value=9.0))
        assert torch.equal(iv.generate(model, ids, edit, max_new_tokens=STEPS).ids, expected)
        handle.remove()
        assert [(n, id(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in _modules(model)] == before


def _modules(model: Any) -> list[tuple[str, torch.nn.Module]]:
    hf = model._module if hasattr(model, "_module") else model.original_model
    return list(hf.named_modules())


def test_a_model_is_as_it_was_after_a_failure() -> None:
    class Broken(transformers.generation.streamers.BaseStreamer):
        def put(self, value: Tensor) -> None:
            raise KeyError("streamer")

    bridge = bridge_model("gpt2")
    before = [(n, id(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in _modules(bridge)]
    edit = iv.steer(layer=1, feature=4, value=6.0)
    for freeze in (False, True):
        with pytest.raises(KeyError, match="streamer"):
            iv.generate(
                bridge,
                token_ids(1),
                edit,
                max_new_tokens=3,
                clt=make_clt(),
                freeze_attention=freeze,
                streamer=Broken(),
            )
        assert [(n, id(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in _modules(bridge)] == before


def test_a_handoff_acts_in_every_step() -> None:
    ids, hf, steps, runs, plain = token_ids(), make_model("gpt2"), Steps(), [], []
    texts = ids
    for _ in range(STEPS):
        plain.append({"logits": hf(texts, use_cache=False).logits})
        wrote = {}
        handles = [hf.transformer.h[0].mlp.register_forward_hook(lambda m, a, out, wrote=wrote: wrote.update(y=out))]
        norm = hf.transformer.h[2].ln_2
        handles.append(norm.register_forward_pre_hook(lambda m, a, wrote=wrote: (a[0] - wrote["y"],)))
        runs.append({"logits": hf(texts, use_cache=False).logits})
        for handle in handles:
            handle.remove()
        texts = torch.cat((texts, runs[-1]["logits"][:, -1:].argmax(-1)), dim=1)
    edit = iv.ablate_handoff(source=0, target=2)
    found = iv.generate(
        nnsight_model("gpt2"), ids, edit, max_new_tokens=STEPS, logits_processor=[steps], eos_token_id=None
    )
    assert torch.equal(found.ids, texts)
    steps.assert_those_of(runs)
    differ(runs, plain)


def test_writes_are_dropped_in_every_step() -> None:
    clt, local, ids, steps = make_clt(), make_clt(), token_ids(), Steps()
    for weight in local.W_dec:
        weight.data[:, 16:] = 0  # a group writes its own layer first
    runs = greedy("gpt2", {"ids": ids}, local, "replace")
    differ(runs, greedy("gpt2", {"ids": ids}, clt, "replace"))
    edit = iv.ablate_cross_layer()
    settings = {"max_new_tokens": STEPS, "mode": "replace", "clt": clt, "eos_token_id": None}
    iv.generate(make_model("gpt2"), ids, edit, logits_processor=[steps], **settings)
    steps.assert_those_of(runs)


# ---------------------------------------------------------------- frozen attention


class _Oracle:
    """Attention whose patterns can be seen, and given for the first queries."""

    def __init__(self) -> None:
        self.seen: dict[int, Tensor] = {}
        self.given: dict[int, Tensor] = {}

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any = None, **_: Any
    ):
        heads = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)
        scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        n = query.shape[2]
        scores = scores + torch.full((n, n), -torch.inf).triu(1)
        pattern = scores.softmax(-1)
        self.seen[module.layer_idx] = pattern
        if module.layer_idx in self.given:
            given = self.given[module.layer_idx]
            k = given.shape[2]
            pattern = pattern.clone()
            pattern[:, :, :k] = 0
            pattern[:, :, :k, :k] = given
        return (pattern @ value).transpose(1, 2).contiguous(), pattern


def sharp_model(family: str) -> Any:
    """A model whose attention patterns depend much on what is attended to."""
    hf = make_model(family)
    for name, parameter in hf.named_parameters():
        if "c_attn" in name or "q_proj" in name:
            parameter.data.mul_(4)
    return hf


@pytest.mark.parametrize("mode", RUNS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_frozen_attention_is_of_the_prompt_alone(family: str, mode: str) -> None:
    clt, ids = make_clt(), token_ids(rows=2, length=6)
    oracle = _Oracle()
    transformers.AttentionInterface.register("oracle", oracle)
    transformers.AttentionMaskInterface.register("oracle", eager_mask)
    hf = sharp_model(family)
    hf.set_attn_implementation("oracle")
    hf(ids, use_cache=False)
    patterns = dict(oracle.seen)
    edit = set_to(6.0, lambda row, n: range(n))
    free = reference_greedy(hf, ids, clt, RUNS[mode], STEPS, edit=edit)
    oracle.given = patterns
    runs = reference_greedy(hf, ids, clt, RUNS[mode], STEPS, edit=edit)
    differ(runs, free)
    value, model = iv.steer(layer=1, feature=4, value=6.0), sharp_model(family)
    for freeze, expected in ((True, runs), (False, free)):
        steps = Steps()
        settings = {"mode": mode, "clt": clt, "eos_token_id": None, "logits_processor": [steps]}
        iv.generate(model, ids, value, max_new_tokens=STEPS, freeze_attention=freeze, **settings)
        steps.assert_those_of(expected)
    assert model.config._attn_implementation == make_model(family).config._attn_implementation


def test_frozen_attention_in_a_padded_batch() -> None:
    """Each row is as it would be alone."""
    clt, edit = make_clt(), iv.steer(layer=1, feature=4, value=6.0)
    settings = {"max_new_tokens": STEPS, "clt": clt, "freeze_attention": True, "eos_token_id": None}
    model = nnsight_model("llama")
    both = iv.generate(model, list(PROMPTS), edit, **settings)
    for row, prompt in enumerate(PROMPTS):
        assert torch.equal(both.new_ids[row], iv.generate(model, prompt, edit, **settings).new_ids[0])


# ---------------------------------------------------------------- sampling and streaming


def test_sampling_from_a_seed() -> None:
    clt, ids, temperature = make_clt(), token_ids(), 0.7
    edit = set_to(6.0, lambda row, n: range(n))
    texts = ids
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for _ in range(STEPS):
            logits = reference_run(make_model("gpt2"), texts, clt, "replace_with_error", edit=edit)["logits"][:, -1]
            texts = torch.cat((texts, torch.multinomial((logits / temperature).softmax(-1), 1)), dim=1)
    value = iv.steer(layer=1, feature=4, value=6.0)
    settings = {"max_new_tokens": STEPS, "clt": clt, "do_sample": True, "temperature": temperature, "top_k": 0}
    before = torch.get_rng_state()
    found = iv.generate(make_model("gpt2"), ids, value, seed=3, eos_token_id=None, **settings)
    assert torch.equal(found.ids, texts)
    assert torch.equal(torch.get_rng_state(), before)
    # Without a seed one is drawn, and noted.
    first, second = (iv.generate(make_model("gpt2"), ids, value, compare=True, **settings) for _ in range(2))
    assert first.seed != second.seed
    assert first.unedited is not None
    again = iv.generate(make_model("gpt2"), ids, value, seed=first.seed, **settings)
    assert torch.equal(again.ids, first.ids)
    none = iv.generate(make_model("gpt2"), ids, None, seed=first.seed, **settings)
    assert torch.equal(none.ids, first.unedited.ids)


@pytest.mark.parametrize("library", ["nnsight", "transformer_lens"])
def test_a_stream_is_the_text_in_pieces(library: str) -> None:
    model, edit = LIBRARIES[library](make_model("gpt2")), iv.steer(layer=1, feature=4, value=6.0)
    settings = {"max_new_tokens": STEPS, "clt": make_clt(), "do_sample": True, "seed": 5}
    whole = iv.generate(model, PROMPTS[0], edit, **settings)
    pieces = list(iv.stream(model, PROMPTS[0], edit, **settings))
    assert len(pieces) == STEPS
    assert "".join(pieces) == whole.texts[0]
    assert whole.texts[0] != iv.generate(model, PROMPTS[0], None, **settings).texts[0]


def test_a_stream_that_is_closed_early_leaves_the_model_free() -> None:
    bridge = bridge_model("gpt2")
    before = [(n, id(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in _modules(bridge)]
    threads = threading.active_count()
    pieces = iv.stream(bridge, PROMPTS[0], None, max_new_tokens=50, clt=make_clt())
    assert threading.active_count() == threads, "nothing runs before the first piece is asked for"
    next(pieces)
    pieces.close()
    assert threading.active_count() == threads
    assert [(n, id(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in _modules(bridge)] == before


def test_a_stream_that_fails_says_so() -> None:
    def fail(ids: Tensor, scores: Tensor) -> Tensor:
        raise KeyError("processor")

    with pytest.raises(KeyError, match="processor"):
        list(
            iv.stream(
                nnsight_model("gpt2"), PROMPTS[0], None, max_new_tokens=3, clt=make_clt(), logits_processor=[fail]
            )
        )


def test_streamers_of_transformers() -> None:
    class Collect(transformers.generation.streamers.BaseStreamer):
        def __init__(self) -> None:
            self.values: list[Tensor] = []

        def put(self, value: Tensor) -> None:
            self.values.append(value)

        def end(self) -> None:
            self.values.append(torch.tensor(-1))

    collect, edit = Collect(), iv.steer(layer=1, feature=4, value=6.0)
    found = iv.generate(
        nnsight_model("gpt2"), list(PROMPTS), edit, max_new_tokens=STEPS, clt=make_clt(), streamer=collect, compare=True
    )
    prompt, *new, end = collect.values
    assert int(end) == -1
    assert_close(torch.cat((prompt, torch.stack(new, dim=1)), dim=1), found.ids)


# ---------------------------------------------------------------- results


def test_a_generation_prints() -> None:
    clt, model = make_clt(), nnsight_model("gpt2")
    edit = iv.steer(layer=1, feature=4, value=6.0)
    found = iv.generate(model, list(PROMPTS), edit, max_new_tokens=2, clt=clt, compare=True)
    words = [" ".join(f"w{i}" for i in row) for row in found.new_ids.tolist()]
    assert found.texts == words
    assert found.prompts == ["<bos> w2 w3 w4 w5", "<bos> w7 w8"]
    assert str(found).splitlines() == [
        "set_value(layer=1, feature=4, value=6.0), mode iterative",
        "  '<bos> w2 w3 w4 w5'",
        f"    edited    '{words[0]}'",
        f"    unedited  '{found.unedited.texts[0]}'",
        "  '<bos> w7 w8'",
        f"    edited    '{words[1]}'",
        f"    unedited  '{found.unedited.texts[1]}'",
    ]
    # Without a tokenizer texts are ids; what follows an end of text is no text.
    ids, mask = torch.tensor([[1, 2, 9, 7, 1, 1], [4, 3, 8, 1, 1, 1]]), torch.tensor([[0, 1], [1, 1]])
    plain = iv.Generation(ids, mask, "nothing", ends=frozenset({1}))
    assert (plain.prompts, plain.texts) == (["2", "4 3"], ["9 7", "8"])


@pytest.mark.parametrize("mode", RUNS)
def test_a_sweep(mode: str) -> None:
    clt, model = make_clt(), nnsight_model("gpt2")
    strengths, ids = (-2.0, 0.0, 6.0), torch.tensor([make_tokenizer()(PROMPTS[0])["input_ids"]])
    sweep = iv.steer_sweep(
        model,
        PROMPTS[0],
        layer=1,
        feature=4,
        strengths=strengths,
        kind="value",
        watch=["w9", 12],
        max_new_tokens=STEPS,
        mode=mode,
        clt=clt,
        start=2,
        bar=False,
    )
    hf = make_model("gpt2")
    unedited = F.log_softmax(reference_run(hf, ids, clt, RUNS[mode])["logits"][0, -1].double(), -1)
    chances = {"w9": float(unedited[9].exp()), "w12": float(unedited[12].exp())}
    assert sweep.unedited_probabilities == pytest.approx(chances, abs=1e-5)
    for i, strength in enumerate(strengths):
        edit = set_to(strength, lambda row, n: range(2, n))
        runs = reference_greedy(hf, ids, clt, RUNS[mode], STEPS, edit=edit)
        after = F.log_softmax(runs[0]["logits"][0, -1].double(), -1)
        assert sweep.kl[i] == pytest.approx(float((unedited.exp() * (unedited - after)).sum()), abs=1e-5)
        assert sweep.probabilities["w9"][i] == pytest.approx(float(after[9].exp()), abs=1e-5)
        assert sweep.probabilities["w12"][i] == pytest.approx(float(after[12].exp()), abs=1e-5)
        assert sweep.texts[i] == " ".join(f"w{t}" for t in runs[-1]["ids"][0, 5:].tolist())
    assert len(set(sweep.texts)) > 1
    table = sweep.to_pandas()
    assert list(table.columns) == ["value", "kl", "p(w9)", "p(w12)", "text"]
    assert list(table["text"]) == list(sweep.texts)
    lines = str(sweep).splitlines()
    assert lines[0] == f"steer(layer=1, feature=4), mode {mode}"
    assert len(lines) == 3 + 1 + len(strengths)
    assert sweep.texts[2] in lines[-1]
    figure = sweep.plot()
    assert [tuple(line.get_xdata()) for line in figure.axes[-1].lines] == [strengths]


def test_a_sweep_over_what_is_generated_leaves_the_first_prediction() -> None:
    for where in ({"tokens": "generated"}, {"start": 5}):
        sweep = iv.steer_sweep(
            nnsight_model("gpt2"),
            PROMPTS[0],
            group={1: [4], 2: [3]},
            strengths=[6.0],
            kind="value",
            max_new_tokens=3,
            clt=make_clt(),
            bar=False,
            **where,
        )
        assert sweep.kl == pytest.approx([0.0], abs=1e-9)
        assert sweep.texts[0] != sweep.unedited_text


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give one of the two"),
        ({"by": 2.0, "value": 1.0}, "give one of the two"),
        ({"by": float("nan")}, "by is a finite number, not nan"),
        ({"value": float("inf")}, "value is a finite number"),
        ({"by": 2.0, "tokens": "all"}, "tokens are 'prompt', 'generated' or None"),
        ({"by": 2.0, "start": 1.5}, "start is a whole number"),
        ({"by": 2.0, "group": {1: 4}}, "say which features"),
    ],
)
def test_steering_that_means_nothing(arguments: dict, message: str) -> None:
    with pytest.raises(iv.EditError, match=message):
        iv.steer(layer=1, feature=4, **arguments)


NINE = iv.steer(layer=1, feature=4, value=9.0)
BAD = {
    "a feature beyond": ({"edits": iv.steer(layer=1, feature=24, by=2.0)}, "there is no feature 24"),
    "a start beyond": ({"edits": iv.steer(layer=1, feature=4, by=2.0, start=9)}, "selects none of the 9"),
    "a start beyond the prompt": (
        {"edits": iv.steer(layer=1, feature=4, by=2.0, start=5, tokens="prompt")},
        "selects none of the 5",
    ),
    "nothing read of what is generated": (
        {"edits": iv.steer(layer=1, feature=4, by=2.0, tokens="generated"), "max_new_tokens": 1},
        "never acts",
    ),
    "a row beyond": ({"edits": iv.only(NINE, batch=1)}, "batch 1 is beyond the 1"),
    "an unknown token": ({"edits": iv.only(NINE, tokens=[61])}, "there is no token 61"),
    "an unknown token in the prompt": ({"prompt": [[2, 61]]}, "there is no token 61"),
    "no edit": ({"edits": lambda x: x}, "edits are made by functions"),
    "no tokens": ({"max_new_tokens": 0}, "at least 1"),
    "another mode": ({"mode": "direct"}, "mode is one of iterative, replace"),
    "temperature without sampling": ({"temperature": 0.7}, "do_sample=False"),
    "cuts without sampling": ({"top_p": 0.9}, "top_p= is of sampling"),
    "a seed without sampling": ({"seed": 1}, "seed= is of sampling"),
    "temperature 0": ({"temperature": 0.0, "do_sample": True}, "temperature is a positive number"),
    "beams": ({"num_beams": 2}, "num_beams= cannot be used here"),
    "no cache": ({"use_cache": False}, "use_cache= cannot be used here"),
    "padding on the right": (
        {"prompt": {"input_ids": torch.tensor([[2, 3]]), "attention_mask": torch.tensor([[1, 0]])}},
        "pad on the left",
    ),
    "nothing but padding": (
        {"prompt": {"input_ids": torch.tensor([[2, 3]]), "attention_mask": torch.tensor([[0, 0]])}},
        "all padding",
    ),
    "embeddings": ({"prompt": {"inputs_embeds": torch.zeros(1, 2, 16)}}, "inputs_embeds"),
    "a frozen norm": ({"edits": iv.ablate_handoff(source=0, target=2, norm="frozen")}, "norm='live'"),
    "a layer to hand to": ({"edits": iv.ablate_handoff(source=0, target=3)}, "no layer 3"),
}


@pytest.mark.parametrize("which", BAD)
def test_bad_input_is_refused_before_the_model_runs(which: str) -> None:
    changes, message = BAD[which]
    hf = make_model("gpt2")
    hf.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    arguments = {"prompt": "w2 w3 w4 w5", "edits": NINE, "max_new_tokens": 5, "clt": make_clt()} | changes
    prompt, edits = arguments.pop("prompt"), arguments.pop("edits")
    for function in (iv.generate, iv.stream):
        with pytest.raises(iv.EditError, match=message):
            function(nnsight_model(hf), prompt, edits, **arguments)


def test_other_refusals() -> None:
    model, clt = nnsight_model("gpt2"), make_clt()
    with pytest.raises(AttachError, match="no crosscoder is attached"):
        iv.generate(model, PROMPTS[0], NINE, max_new_tokens=2)
    with pytest.raises(AttachError, match="no crosscoder is attached"):
        iv.generate(model, PROMPTS[0], iv.ablate_handoff(source=0, target=2), max_new_tokens=2, mode="replace")
    with pytest.raises(iv.EditError, match="training mode"):
        iv.generate(nnsight_model(make_model("gpt2").train()), PROMPTS[0], NINE, max_new_tokens=2, clt=clt)
    with pytest.raises(iv.EditError, match="has 2 rows"):
        iv.stream(model, list(PROMPTS), NINE, max_new_tokens=2, clt=clt)
    with pytest.raises(iv.EditError, match="no tokenizer"):
        iv.stream(make_model("gpt2"), [[2, 3]], NINE, max_new_tokens=2, clt=clt)
    with pytest.raises(iv.EditError, match="compare= is of generate"):
        iv.stream(model, PROMPTS[0], NINE, max_new_tokens=2, clt=clt, compare=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strengths": []}, "at least one strength"),
        ({"strengths": [1.0, float("nan")]}, "finite"),
        ({"kind": "add"}, "kind is 'by'"),
        ({"watch": ["w2 w3"]}, "is 2 tokens"),
        ({"watch": ["nowhere"]}, "not in this model's vocabulary"),
        ({"watch": [61]}, "there is no token 61"),
        ({"start": 9}, "selects none"),
    ],
)
def test_bad_sweeps(changes: dict, message: str) -> None:
    hf = make_model("gpt2")
    hf.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    arguments = {"layer": 1, "feature": 4, "strengths": [1.0], "max_new_tokens": 3, "clt": make_clt(), "bar": False}
    with pytest.raises(iv.EditError, match=message):
        iv.steer_sweep(nnsight_model(hf), PROMPTS[0], **arguments | changes)
    with pytest.raises(iv.EditError, match="of one prompt"):
        iv.steer_sweep(nnsight_model(hf), list(PROMPTS), **arguments)


def test_a_padded_row_is_swept_as_the_row_alone() -> None:
    model, clt, row = make_model("gpt2"), make_clt(), [0, 5, 9]
    padded = {"input_ids": torch.tensor([[1, 1, *row]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1]])}
    how = {"strengths": [6.0], "kind": "value", "watch": [7], "max_new_tokens": 2, "clt": clt, "bar": False}
    found, alone = (iv.steer_sweep(model, prompt, layer=1, feature=4, **how) for prompt in (padded, [row]))
    assert found.kl == pytest.approx(alone.kl, abs=1e-5)
    assert alone.kl[0] > 1e-3
    assert found.unedited_probabilities == pytest.approx(alone.unedited_probabilities, abs=1e-6)
    assert found.texts == alone.texts


def test_silence_in_the_prompt_is_said_of_the_prompt_alone() -> None:
    hf, clt, ids = make_model("gpt2"), make_clt(), token_ids(rows=1)
    acts = reference_run(hf, ids, clt, "replace_with_error")["features"][0]
    silent = int((acts.amax((0, 1)) == 0).nonzero()[0])
    edit = iv.scale(layer=0, feature=silent, by=2.0)
    with pytest.warns(UserWarning, match="inactive at the tokens of this pass"):
        iv.generate(hf, ids, edit, max_new_tokens=2, clt=clt)
    # Of tokens to come it says nothing.
    iv.generate(hf, ids, iv.only(edit, tokens="generated"), max_new_tokens=2, clt=clt)
