"""Model-diff amplification: what fine-tuning changed, taken further while sampling.

The next token is drawn from ``logits_after + alpha * (logits_after - logits_before)``: alpha 0 is the model after
fine-tuning, -1 the one before it, and above 0 rare behaviour that fine-tuning brought in becomes frequent.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clt_plugin.interventions._generation import Generation, Job, vocabulary_of
from clt_plugin.interventions._places import EditError, as_number

__all__ = ["Amplified", "amplify"]


class Amplified:
    """Two models, and how far to go beyond the second.

    Args:
        before: The model before fine-tuning: an nnsight model, a TransformerBridge, or a transformers model.
        after: The model after it, which generates; of any of the three too.
        alpha: How far to go.

    Raises:
        EditError: alpha is no finite number, or the models have different vocabularies.
    """

    def __init__(self, before: Any, after: Any, alpha: float) -> None:
        from clt_plugin.adapters.huggingface import plain_model

        self.before, self.after, self.alpha = before, after, as_number("alpha", alpha)
        with plain_model(before) as earlier, plain_model(after) as later:
            sizes = [_vocabulary(hf) for hf in (earlier, later)]
        words: list[Any] = [getattr(model, "tokenizer", None) for model in (before, after)]
        if sizes[0] != sizes[1]:
            raise EditError(f"the models' logits cannot be compared: of {sizes[0]} tokens before, of {sizes[1]} after")
        if None not in words and words[0].get_vocab() != words[1].get_vocab():
            raise EditError("the models' logits cannot be compared: their tokenizers give tokens different ids")

    def logits_processor(self, attention_mask: Int[Tensor, "batch prompt"] | None = None) -> LogitsProcessor:
        """Return a processor for one call of the model after: ``generate(..., logits_processor=[this])``.

        Processors that generation has of its own, such as a repetition penalty, act on the logits before it; sampling's
        temperature and cuts act after it.

        Args:
            attention_mask: The prompt's, where it is padded on the left.
        """
        return LogitsProcessor(self, attention_mask)

    def __repr__(self) -> str:
        return f"Amplified({type(self.before).__name__} -> {type(self.after).__name__}, alpha={self.alpha:g})"


def _vocabulary(hf: nn.Module) -> int:
    if not hasattr(hf, "generate") or hf.get_output_embeddings() is None:  # type: ignore[operator]
        raise EditError(f"{type(hf).__name__} has no unembedding: load it with its language modelling head")
    return vocabulary_of(hf)


class LogitsProcessor:
    """Amplifies the logits of each step; it runs the model before alongside, with a cache of its own.

    Args:
        amplified: The models.
        attention_mask: The prompt's, (batch, prompt), or None for no padding.
    """

    def __init__(self, amplified: Amplified, attention_mask: Tensor | None = None) -> None:
        self.amplified, self.mask = amplified, attention_mask
        self.seen: Tensor | None = None
        self.cache: Any = None

    def __call__(
        self, input_ids: Int[Tensor, "batch position"], scores: Float[Tensor, "batch vocabulary"]
    ) -> Float[Tensor, "batch vocabulary"]:
        """Return the amplified logits of the next token.

        Args:
            input_ids: The text so far, padding included.
            scores: The logits of the model after.

        Raises:
            EditError: It is used for a second text, or in a beam search.
        """
        if self.seen is None and bool((scores.logsumexp(-1).abs() < 1e-4).all()):
            raise EditError("these are log-probabilities, as of a beam search: amplify logits, with num_beams=1")
        alpha, before = self.amplified.alpha, self._before(input_ids).to(scores)
        # So written, alpha of 0 and of -1 are exactly one of the two.
        mixed = (1 + alpha) * scores - alpha * before
        # What either rules out stays so.
        return torch.where(scores.isneginf() | before.isneginf(), -torch.inf, mixed)

    def _before(self, ids: Tensor) -> Tensor:
        """Return the logits of the model before, (batch, vocabulary)."""
        from clt_plugin.adapters.huggingface import plain_model

        if self.seen is None:
            new = ids
        elif ids.shape[0] == self.seen.shape[0] and torch.equal(ids[:, :-1], self.seen):
            new = ids[:, -1:]
        else:
            raise EditError(
                "this text does not go on from the last step's: make a processor for each call of generate(), with "
                "num_beams=1"
            )
        with torch.no_grad(), plain_model(self.amplified.before) as hf:
            device = hf.get_input_embeddings().weight.device  # type: ignore[operator]
            mask = self._mask(ids).to(device)
            arguments = {
                "input_ids": new.to(device),
                "attention_mask": mask,
                "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :],
                "logits_to_keep": 1,
            }
            known = inspect.signature(type(hf).forward).parameters
            arguments = {name: value for name, value in arguments.items() if name in known}
            output = hf(**arguments, past_key_values=self.cache, use_cache=True)
        self.seen, self.cache = ids.clone(), output.past_key_values
        return output.logits[:, -1]

    def _mask(self, ids: Tensor) -> Tensor:
        if self.mask is None:
            return torch.ones_like(ids)
        rows, prompt = self.mask.shape
        if rows != ids.shape[0] or prompt > ids.shape[1]:
            raise EditError(f"the attention mask has shape {(rows, prompt)}, but the text has {tuple(ids.shape)}")
        return torch.nn.functional.pad(self.mask.to(ids), (0, ids.shape[1] - prompt), value=1)


def amplify(
    before: Any,
    after: Any,
    prompt: Any,
    alpha: float,
    *,
    max_new_tokens: int,
    compare: bool = False,
    streamer: Any = None,
    do_sample: bool = False,
    temperature: float | None = None,
    seed: int | None = None,
    **settings: Any,
) -> Generation:
    """Continue a prompt with what changed between two models amplified.

    Args:
        before: As for `Amplified`.
        after: As for `Amplified`; its own settings for generation hold unless others are given.
        prompt: Text, several texts, token ids (position,) or (batch, position), or ``input_ids`` and
            ``attention_mask``, padded on the left.
        alpha: How far to go beyond the model after.
        max_new_tokens: How many tokens to generate at most.
        compare: Whether to generate the same with the model after alone, from the same seed.
        streamer: One of transformers' streamers.
        do_sample: Whether to sample; otherwise the likeliest token is taken.
        temperature: By which logits are divided in sampling.
        seed: Where sampling starts; by default drawn, and noted in the result.
        **settings: More of transformers' settings for generation.

    Raises:
        EditError: The models do not compare, or the prompt or the settings do not fit; nothing has run.
    """
    from clt_plugin.adapters.huggingface import plain_model

    amplified = Amplified(before, after, alpha)
    reader = before if getattr(after, "tokenizer", None) is None else after
    job = Job.of(reader, prompt, max_new_tokens, do_sample, temperature, seed, settings)
    more = {} if streamer is None else {"streamer": streamer}
    with ExitStack() as stack:
        earlier, later = (stack.enter_context(plain_model(model)) for model in (before, after))
        job.check_model(earlier)
        job.check_model(later)
        processors = [amplified.logits_processor(job.mask), *settings.get("logits_processor", ())]
        ids = job.run(later, logits_processor=processors, **more)
        result = job.result(later, ids, f"amplified, alpha={amplified.alpha:g}")
        if not compare:
            return result
        return replace(result, unedited=job.result(later, job.run(later), "the model after, alpha=0"))
