"""What every way to generate shares: the prompt and the settings, checked before anything runs, and the result."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from clt_plugin.interventions._places import EditError, as_int
from clt_plugin.interventions.modes import read_prompt

if TYPE_CHECKING:
    from collections.abc import Iterator

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Settings of transformers that say how to sample."""

REFUSED = {
    "num_beams": "a row's text changes from beam to beam; leave it out",
    "num_return_sequences": "give the prompt several times instead",
    "assistant_model": "a pass of several guesses is no pass of the text; leave it out",
    "prompt_lookup_num_tokens": "a pass of several guesses is no pass of the text; leave it out",
    "prefill_chunk_size": "the prompt is one pass; leave it out",
    "use_cache": "generation goes through the model's cache; leave it out",
    "past_key_values": "generation begins with the prompt; leave it out",
    "generation_config": "give the settings themselves",
    "return_dict_in_generate": "the result has tokens and texts; intervene() returns logits",
    "max_length": "max_new_tokens= says how much to generate",
    "inputs": "prompt= is what to continue",
}
"""Settings of transformers that mean something else here, and what to do."""


@dataclass(frozen=True, eq=False)
class Generation:
    """Texts that a model has generated.

    Attributes:
        ids: Prompt and new tokens, (batch, position); rows that ended early are padded at their end.
        mask: Which of the prompt's tokens are real, (batch, prompt).
        what: What was done to the model.
        tokenizer: The model's, or None.
        ends: The tokens that end a text.
        seed: What to pass as ``seed=`` to sample the same again; None where nothing was sampled.
        unedited: What the model generates otherwise, if that was asked for.
    """

    ids: Tensor
    mask: Tensor
    what: str
    tokenizer: Any = field(default=None, repr=False)
    ends: frozenset[int] = frozenset()
    seed: int | None = None
    unedited: Generation | None = None

    @property
    def new_ids(self) -> Int[Tensor, "batch new"]:
        """The tokens generated."""
        return self.ids[:, self.mask.shape[1] :]

    @property
    def prompts(self) -> list[str]:
        """The prompts as text; as token ids where there is no tokenizer."""
        return [self._text(row[kept].tolist(), False) for row, kept in zip(self.ids, self._kept(), strict=True)]

    @property
    def texts(self) -> list[str]:
        """The text generated for each row, without what ends it; as token ids where there is no tokenizer."""
        return [self._text(self._until_end(row), True) for row in self.new_ids.tolist()]

    def _kept(self) -> Tensor:
        return torch.nn.functional.pad(self.mask.bool().to(self.ids.device), (0, self.new_ids.shape[1]), value=False)

    def _until_end(self, row: list[int]) -> list[int]:
        stop = next((i for i, token in enumerate(row) if token in self.ends), len(row))
        return row[:stop]

    def _text(self, ids: list[int], skip: bool) -> str:
        if self.tokenizer is None:
            return " ".join(map(str, ids))
        return self.tokenizer.decode(ids, skip_special_tokens=skip)

    def __str__(self) -> str:
        lines = [self.what]
        others = self.unedited.texts if self.unedited is not None else None
        for row, (prompt, text) in enumerate(zip(self.prompts, self.texts, strict=True)):
            lines.append(f"  {prompt!r}")
            lines.append(f"    {'edited    ' if others else ''}{text!r}")
            if others is not None:
                lines.append(f"    unedited  {others[row]!r}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Generation of {self.new_ids.shape[1]} tokens in {len(self.ids)} rows, {self.what}>"


@dataclass(frozen=True, eq=False)
class Job:
    """A prompt to continue: read and checked, nothing run.

    Attributes:
        ids: The prompt, (batch, prompt), padded on the left.
        mask: Which of its tokens are real, of the same shape.
        tokenizer: The model's, or None.
        max_new_tokens: How many tokens to generate at most.
        seed: Where sampling starts; None without sampling.
        settings: What else `transformers` is told.
    """

    ids: Tensor
    mask: Tensor
    tokenizer: Any
    max_new_tokens: int
    seed: int | None
    settings: dict[str, Any]

    @classmethod
    def of(
        cls,
        model: Any,
        prompt: Any,
        max_new_tokens: int,
        do_sample: bool,
        temperature: float | None,
        seed: int | None,
        settings: Mapping[str, Any],
    ) -> Job:
        """Read a prompt and settings, for a model of any library.

        Raises:
            EditError: A prompt that cannot be continued; settings that contradict each other or mean nothing here.
        """
        if as_int("max_new_tokens", max_new_tokens) < 1:
            raise EditError(f"max_new_tokens is at least 1, not {max_new_tokens}")
        for name in settings:
            if name in REFUSED:
                raise EditError(f"{name}= cannot be used here: {REFUSED[name]}")
        settings = dict(settings) | ({} if temperature is None else {"temperature": temperature})
        _check_sampling(do_sample, settings, seed)
        inputs, tokenizer = read_prompt(model, prompt)
        ids, mask = _rows(inputs)
        if do_sample:
            seed = int(torch.randint(2**63 - 1, ())) if seed is None else as_int("seed", seed)
        return cls(ids, mask, tokenizer, max_new_tokens, seed, settings | {"do_sample": bool(do_sample)})

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, positions) of all that passes through the model: the last token generated does not."""
        return len(self.ids), self.longest_prompt + self.max_new_tokens - 1

    @property
    def longest_prompt(self) -> int:
        """The number of real tokens of the longest prompt."""
        return int(self.mask.sum(-1).max())

    def check_model(self, hf: nn.Module) -> None:
        """Raise `EditError` where a model cannot continue the prompt."""
        name = type(hf).__name__
        if not hasattr(hf, "generate") or hf.get_output_embeddings() is None:  # type: ignore[operator]
            raise EditError(f"{name} has no unembedding: load it with its language modelling head")
        if hf.training:
            raise EditError("the model is in training mode, where dropout makes every run another: call eval() first")
        check_ids(self.ids, vocabulary_of(hf))

    def run(self, hf: nn.Module, **more: Any) -> Tensor:
        """Generate with a plain model and return prompt and new tokens, (batch, position).

        Args:
            hf: The model, as edits and hooks on it have made it.
            **more: More settings of transformers.
        """
        device = hf.get_input_embeddings().weight.device  # type: ignore[operator]
        pad = self.settings.get("pad_token_id", hf.generation_config.pad_token_id)  # type: ignore[union-attr]
        if pad is None:
            # Otherwise transformers says in the log which it chose.
            pad = min(self.ends(hf), default=0)
        # The model's own settings hold unless others are given, but for these.
        fixed = {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False, "use_cache": True}
        settings = {**fixed, **self.settings, "max_new_tokens": self.max_new_tokens, "pad_token_id": pad, **more}
        with _seeded(self.seed, device):
            return hf.generate(  # type: ignore[operator]
                input_ids=self.ids.to(device), attention_mask=self.mask.to(device), **settings
            )

    def ends(self, hf: nn.Module) -> frozenset[int]:
        """Return the tokens that end a text."""
        ends = self.settings.get("eos_token_id", hf.generation_config.eos_token_id)  # type: ignore[union-attr]
        several = ends if isinstance(ends, Iterable) else () if ends is None else (ends,)
        return frozenset(int(end) for end in several)

    def result(self, hf: nn.Module, ids: Tensor, what: str) -> Generation:
        """Return generated tokens as a result."""
        return Generation(ids, self.mask, what, self.tokenizer, self.ends(hf), self.seed)

    def with_stop(self, stop: Any) -> Job:
        """Return the same job with one more reason to stop, as a function of (ids, scores)."""
        criteria = [*self.settings.get("stopping_criteria", ()), stop]
        return replace(self, settings=self.settings | {"stopping_criteria": criteria})


def _check_sampling(do_sample: bool, settings: Mapping[str, Any], seed: int | None) -> None:
    said = [name for name in SAMPLING if settings.get(name) is not None]
    if not do_sample and (said or seed is not None):
        name = said[0] if said else "seed"
        raise EditError(f"{name}= is of sampling, but do_sample=False takes the likeliest token: pass do_sample=True")
    temperature = settings.get("temperature")
    if temperature is not None and not (math.isfinite(temperature) and temperature > 0):
        raise EditError(f"temperature is a positive number, not {temperature}: for none at all pass do_sample=False")


def _rows(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return a prompt's ids and mask, (batch, prompt)."""
    ids = inputs.get("input_ids")
    if others := sorted(set(inputs) - {"input_ids", "attention_mask", "position_ids", "token_type_ids"}):
        raise EditError(f"generation continues token ids: the prompt cannot have {others[0]}")
    if ids is None:
        raise EditError("the prompt's arguments have no input_ids")
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if mask.shape != ids.shape:
        raise EditError(f"the attention mask has shape {tuple(mask.shape)}, but the tokens have {tuple(ids.shape)}")
    mask = mask.long()
    if not bool(mask.bool().any(-1).all()):
        raise EditError("a row of the prompt is all padding: give each at least one token")
    if bool((mask.diff(dim=-1) < 0).any()):
        raise EditError("a row of the prompt is padded on the right, where its text is to go on: pad on the left")
    positions = inputs.get("position_ids")
    if positions is not None and not torch.equal(positions[mask.bool()], (mask.cumsum(-1) - 1)[mask.bool()]):
        raise EditError("in generation positions count each row's real tokens from 0: leave out position_ids")
    return ids, mask


def vocabulary_of(hf: nn.Module) -> int:
    """Return how many tokens a model can put out."""
    return int(hf.get_output_embeddings().weight.shape[0])  # type: ignore[operator]


def check_ids(ids: Tensor, vocabulary: int) -> None:
    """Raise `EditError` where a token is not in a vocabulary of so many."""
    beyond = ids[(ids < 0) | (ids >= vocabulary)]
    if beyond.numel():
        raise EditError(f"there is no token {int(beyond[0])}: the model has tokens 0 to {vocabulary - 1}")


def token_id(token: int | str, tokenizer: Any, vocabulary: int) -> int:
    """Return a token's id; a text must be one token."""
    if not isinstance(token, str):
        number = as_int("a token", token)
    elif tokenizer is None:
        raise EditError(f"this model has no tokenizer: give the id of {token!r}")
    else:
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            parts = ", ".join(repr(tokenizer.decode([i])) for i in ids) or "none"
            raise EditError(f"{token!r} is {len(ids)} tokens ({parts}): give one")
        number = ids[0]
        # An unknown word becomes another token.
        if tokenizer.decode([number]).strip().casefold() != token.strip().casefold():
            raise EditError(f"{token!r} is not in this model's vocabulary")
    check_ids(torch.tensor([number]), vocabulary)
    return number


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draw from a seed, and leave the random state as it was."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
