"""Model-diff amplification, against both models run on the whole text at every step without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from clt_plugin import interventions as iv
from support.models import bridge_model, make_model, nnsight_model
from support.tracing import left_padded, token_ids

STEPS = 5
PROMPTS = ("w2 w3 w4 w5", "w7 w8")
LIBRARIES = {"nnsight": nnsight_model, "transformer_lens": bridge_model, "transformers": lambda hf: hf}
FREE = {"max_new_tokens": STEPS, "eos_token_id": None}


def pair(family: str = "gpt2") -> tuple[nn.Module, nn.Module]:
    """A model and a fine-tuned one."""
    before, after = make_model(family), make_model(family)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        for parameter in after.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return before, after


def dense(hf: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """The logits of the next token, the whole text run at once."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return hf(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]


def reference(before: nn.Module, after: nn.Module, inputs: dict, alpha: float, steps: int = STEPS) -> tuple:
    """The text, and the logits of each step."""
    ids, logits = inputs["ids"], []
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    for _ in range(steps):
        a, b = dense(after, ids, mask), dense(before, ids, mask)
        logits.append(a + alpha * (a - b))
        ids = torch.cat((ids, logits[-1].argmax(-1, keepdim=True)), dim=1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
    return ids, logits


class Steps:
    """The logits of every step, as a logits processor sees them."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.logits.append(scores.clone())
        return scores


@pytest.mark.parametrize("alpha", [-0.5, 0.5, 3.0])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_each_step_in_a_padded_batch(family: str, alpha: float) -> None:
    before, after = pair(family)
    inputs, steps = left_padded(PROMPTS), Steps()
    expected, logits = reference(before, after, inputs, alpha)
    found = iv.amplify(
        nnsight_model(before), nnsight_model(after), list(PROMPTS), alpha, logits_processor=[steps], **FREE
    )
    assert torch.equal(found.ids, expected)
    assert len(steps.logits) == STEPS
    for step, (one, other) in enumerate(zip(steps.logits, logits, strict=True)):
        assert_close(one, other, rtol=1e-4, atol=1e-4, msg=lambda text, n=step: f"step {n}: {text}")
    assert not torch.equal(expected, reference(before, after, inputs, 0.0)[0]), "alpha should show: choose another"


@pytest.mark.parametrize("alpha", [-1, 0])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_alpha_of_0_and_of_minus_1_are_the_two_models_exactly(family: str, alpha: int) -> None:
    before, after = pair(family)
    ids, mask = (left_padded(PROMPTS)[name] for name in ("ids", "attention_mask"))
    settings = {"max_new_tokens": STEPS, "eos_token_id": None, "do_sample": False, "pad_token_id": 1}
    alone, both = Steps(), Steps()
    chosen = after if alpha == 0 else before
    expected = chosen.generate(ids, attention_mask=mask, logits_processor=[alone], **settings)
    processor = iv.Amplified(before, after, alpha).logits_processor(mask)
    found = after.generate(ids, attention_mask=mask, logits_processor=[processor, both], **settings)
    assert torch.equal(found, expected)
    for one, other in zip(both.logits, alone.logits, strict=True):
        assert torch.equal(one, other)
    other = before if alpha == 0 else after
    assert not torch.equal(found, other.generate(ids, attention_mask=mask, **settings))


@pytest.mark.parametrize("after_in", LIBRARIES)
@pytest.mark.parametrize("before_in", LIBRARIES)
def test_libraries_on_either_side(before_in: str, after_in: str) -> None:
    expected, _ = reference(*pair(), {"ids": token_ids()}, 1.0)
    before, after = pair()
    found = iv.amplify(LIBRARIES[before_in](before), LIBRARIES[after_in](after), token_ids(), 1.0, **FREE)
    assert torch.equal(found.ids, expected)


def test_within_nnsight_and_with_a_bridge_before() -> None:
    before, after = pair()
    expected, _ = reference(before, after, {"ids": token_ids()}, 1.0)
    model = nnsight_model(after)
    processor = iv.Amplified(bridge_model(before), model, 1.0).logits_processor()
    with model.generate(token_ids(), logits_processor=[processor], do_sample=False, **FREE) as tracer:
        out = tracer.result.save()
    assert torch.equal(out, expected)


def test_sampling_and_the_comparison() -> None:
    before, after = pair()
    ids = texts = token_ids()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for _ in range(STEPS):
            a, b = (dense(hf, texts, torch.ones_like(texts)) for hf in (after, before))
            probabilities = ((a + 2 * (a - b)) / 0.7).softmax(-1)
            texts = torch.cat((texts, torch.multinomial(probabilities, 1)), dim=1)
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 0, "seed": 3}
    found = iv.amplify(before, after, ids, 2.0, compare=True, **sampling, **FREE)
    assert torch.equal(found.ids, texts)
    assert found.unedited is not None
    alone = iv.amplify(before, after, ids, 0.0, **sampling, **FREE)
    assert torch.equal(found.unedited.ids, alone.ids)
    assert str(found).splitlines()[0] == "amplified, alpha=2"


def test_what_either_rules_out_stays_so() -> None:
    before, after = pair()
    processor = iv.Amplified(before, after, -1.0).logits_processor()
    ids, scores = token_ids(), torch.randn(2, 61)
    scores[:, 5] = -torch.inf
    mixed = processor(ids, scores)
    assert mixed[:, 5].isneginf().all()
    assert mixed[:, 6:].isfinite().all()


def test_the_cache_is_in_use() -> None:
    before, after = pair()
    lengths = []
    before.register_forward_pre_hook(lambda m, a, k: lengths.append(k["input_ids"].shape[1]), with_kwargs=True)
    iv.amplify(before, after, token_ids(), 1.0, **FREE)
    assert lengths == [7, 1, 1, 1, 1]


# ---------------------------------------------------------------- refusals


def test_models_that_do_not_compare() -> None:
    before, after = pair()
    after.resize_token_embeddings(64)
    with pytest.raises(iv.EditError, match="of 61 tokens before, of 64 after"):
        iv.Amplified(before, after, 1.0)
    before, after = nnsight_model("gpt2"), nnsight_model("gpt2")
    after.tokenizer = _Swapped()
    with pytest.raises(iv.EditError, match="their tokenizers give tokens different ids"):
        iv.Amplified(before, after, 1.0)
    with pytest.raises(iv.EditError, match="alpha is a finite number, not nan"):
        iv.Amplified(before, before, float("nan"))
    with pytest.raises(iv.EditError, match="has no unembedding"):
        iv.Amplified(make_model("gpt2").transformer, make_model("gpt2"), 1.0)


class _Swapped:
    def get_vocab(self) -> dict[str, int]:
        return {"w2": 3, "w3": 2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "num_beams= cannot be used"),
        ({"temperature": 0.5}, "do_sample=False"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"prompt": [[2, 61]]}, "there is no token 61"),
    ],
)
def test_bad_input_is_refused_before_a_model_runs(settings: dict[str, Any], message: str) -> None:
    before, after = pair()
    for hf in (before, after):
        hf.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    arguments = {"prompt": token_ids(), "alpha": 1.0, "max_new_tokens": 3} | settings
    with pytest.raises(iv.EditError, match=message):
        iv.amplify(before, after, **arguments)


def test_a_processor_is_for_one_text_and_no_beams() -> None:
    before, after = pair()
    amplified = iv.Amplified(before, after, 1.0)
    processor = amplified.logits_processor()
    settings = {"do_sample": False, "pad_token_id": 1, **FREE}
    ids = token_ids()
    after.generate(ids, logits_processor=[processor], attention_mask=torch.ones_like(ids), **settings)
    with pytest.raises(iv.EditError, match="a processor for each call"):
        after.generate(ids, logits_processor=[processor], attention_mask=torch.ones_like(ids), **settings)
    with pytest.raises(iv.EditError, match="log-probabilities"):
        after.generate(ids, logits_processor=[amplified.logits_processor()], num_beams=2, **settings)
    with pytest.raises(iv.EditError, match="attention mask has shape"):
        amplified.logits_processor(torch.ones(1, 7))(ids, torch.randn(2, 61))
