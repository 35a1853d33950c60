"""Steering: features held up or down while a model writes.

Generation is transformers' own, with its cache, streamers and sampling, on the plain model under either library's
object. Edits act in every pass: first the whole prompt's, then one for each token generated, the last excepted, which
no pass reads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clt_plugin.interventions._generation import Generation, token_id
from clt_plugin.interventions._steered import Steered
from clt_plugin.interventions.edits import Edit, EditError, Features, Group, Layer, Supernode, only, scale, set_value
from clt_plugin.interventions.modes import intervene
from clt_plugin.interventions.sweep import Sweep

__all__ = ["Generation", "Sweep", "generate", "steer", "steer_sweep", "stream"]


def steer(
    layer: Layer | None = None,
    feature: Features | None = None,
    group: Group | None = None,
    *,
    by: Any = None,
    value: Any = None,
    start: int | None = None,
    tokens: str | None = None,
) -> Edit:
    """Hold features up or down: `scale` or `set_value`, from a position on.

    Args:
        layer: The layer in which the features live, where there is no group.
        feature: One feature or several of it.
        group: A `supernode`, or {layer: features}, instead of layer and feature.
        by: What they are multiplied by; where they are inactive they stay so.
        value: What they are set to, instead.
        start: The position from which on, counted in each row's real tokens from 0.
        tokens: ``"prompt"``, ``"generated"``, or None for both.

    >>> steer(layer=3, feature=811, by=4.0, start=5)
    only(scale(layer=3, feature=811, by=4.0), position=slice(5, None))
    >>> steer(layer=3, feature=811, value=2.5, tokens="generated")
    only(set_value(layer=3, feature=811, value=2.5), tokens='generated')
    """
    if (by is None) == (value is None):
        raise EditError("steer by a factor, by=, or to a value, value=: give one of the two")
    if tokens not in (None, "prompt", "generated"):
        raise EditError(f"tokens are 'prompt', 'generated' or None for both, not {tokens!r}")
    edit: Edit
    if by is not None:
        edit = scale(layer, feature, by=by, group=group)
    else:
        edit = set_value(layer, feature, value=value, group=group)
    return only(edit, position=None if start is None else slice(start, None), tokens=tokens)


def generate(
    model: Any,
    prompt: Any,
    edits: Edit | None = None,
    *,
    max_new_tokens: int,
    mode: str = "iterative",
    freeze_attention: bool = False,
    clt: Any = None,
    name: str = "clt",
    compare: bool = False,
    streamer: Any = None,
    do_sample: bool = False,
    temperature: float | None = None,
    seed: int | None = None,
    **settings: Any,
) -> Generation:
    """Continue a prompt while edits act.

    The model itself is not changed: what is attached to it, and the hooks and edits of its library, take no part.

    Args:
        model: An nnsight model, a TransformerBridge, or a transformers model.
        prompt: Text, several texts, token ids (position,) or (batch, position), or ``input_ids`` and
            ``attention_mask``, padded on the left. Padding is never edited.
        edits: What to do, see `clt_plugin.interventions`; positions go on counting over generated tokens.
        max_new_tokens: How many tokens to generate at most.
        mode: ``"iterative"``: the model's own MLP outputs, to which edits add; ``"replace"``: reconstructions in their
            place.
        freeze_attention: Whether the prompt's pass keeps the attention patterns that it has without edits. Passes
            after it have none to keep.
        clt: The crosscoder, or a reference; by default the one that is attached to the model.
        name: The name under which the crosscoder is attached.
        compare: Whether to generate the same without edits too, from the same seed.
        streamer: One of transformers' streamers, which sees tokens as they come; see also `stream`.
        do_sample: Whether to sample; otherwise the likeliest token is taken.
        temperature: By which logits are divided in sampling.
        seed: Where sampling starts; by default drawn, and noted in the result. The random state stays as it was.
        **settings: More of transformers' settings for generation, such as ``top_p`` or ``eos_token_id``. Those that
            the model brings along hold too.

    Raises:
        EditError: The edits, the prompt or the settings do not fit; nothing has run.
        AttachError: The crosscoder does not fit the model, or cannot act in this mode.
    """
    how: dict[str, Any] = {"mode": mode, "freeze_attention": freeze_attention, "clt": clt, "name": name}
    sampling: dict[str, Any] = {"do_sample": do_sample, "temperature": temperature, "seed": seed}
    steered = Steered.of(model, prompt, edits, max_new_tokens, **how, **sampling, **settings)
    return steered.generation(edits, compare, streamer)


def stream(
    model: Any, prompt: Any, edits: Edit | None = None, *, max_new_tokens: int, **settings: Any
) -> Iterator[str]:
    """Continue one prompt while edits act, and yield the text in pieces as it comes.

    The model runs in a thread of its own until the text ends or the iterator is closed: until then it is not to be
    used otherwise, nor the random state where it samples.

    Args:
        model: As for `generate`, with a tokenizer.
        prompt: As for `generate`, of one row.
        edits: As for `generate`.
        max_new_tokens: As for `generate`.
        **settings: As for `generate`, ``compare`` and ``streamer`` left out.

    Raises:
        EditError: As for `generate`, and before the first piece is asked for.
        AttachError: As for `generate`.
    """
    for key in ("compare", "streamer"):
        if key in settings:
            raise EditError(f"{key}= is of generate(), not of stream()")
    steered = Steered.of(model, prompt, edits, max_new_tokens, **settings)
    rows, tokenizer = len(steered.job.ids), steered.job.tokenizer
    if tokenizer is None or rows > 1:
        what = "this model has no tokenizer" if tokenizer is None else f"the prompt has {rows} rows"
        raise EditError(f"{what}: stream() yields the text of one row")
    return _pieces(steered, edits)


def _pieces(steered: Steered, edits: Edit | None) -> Iterator[str]:
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(steered.job.tokenizer, skip_prompt=True, skip_special_tokens=True)
    closed, failures = threading.Event(), []

    def stop(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(ids),), closed.is_set(), device=ids.device)

    def run() -> None:
        try:
            steered.ids(edits, steered.job.with_stop(stop), streamer)
        except BaseException as failure:
            failures.append(failure)
        finally:
            streamer.text_queue.put(streamer.stop_signal)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        for piece in streamer:
            if piece:
                yield piece
    finally:
        closed.set()
        thread.join()
    if failures:
        raise failures[0]


# ---------------------------------------------------------------- strengths


def steer_sweep(
    model: Any,
    prompt: Any,
    layer: Layer | None = None,
    feature: Features | None = None,
    group: Group | None = None,
    *,
    strengths: Sequence[float],
    kind: str = "by",
    watch: Sequence[int | str] = (),
    max_new_tokens: int,
    start: int | None = None,
    tokens: str | None = None,
    mode: str = "iterative",
    freeze_attention: bool = False,
    clt: Any = None,
    name: str = "clt",
    do_sample: bool = False,
    temperature: float | None = None,
    seed: int | None = None,
    bar: bool = True,
    **settings: Any,
) -> Sweep:
    """Steer features at several strengths, and lay the texts side by side.

    Args:
        model: As for `generate`.
        prompt: As for `generate`, of one row.
        layer: As for `steer`.
        feature: As for `steer`.
        group: As for `steer`.
        strengths: The strengths, one after another.
        kind: ``"by"`` for factors, ``"value"`` for values.
        watch: Tokens, as ids or as text, whose probability to come right after the prompt is noted.
        max_new_tokens: As for `generate`.
        start: As for `steer`.
        tokens: As for `steer`.
        mode: As for `generate`.
        freeze_attention: As for `generate`.
        clt: As for `generate`.
        name: As for `generate`.
        do_sample: As for `generate`; each strength samples from the same seed.
        temperature: As for `generate`.
        seed: As for `generate`.
        bar: Whether to show a progress bar.
        **settings: As for `generate`.

    Raises:
        EditError: As for `generate`, before the first strength.
        AttachError: As for `generate`.
    """
    from tqdm.auto import tqdm

    if kind not in ("by", "value"):
        raise EditError(f"kind is 'by' for factors or 'value' for values, not {kind!r}")
    chosen = list(strengths)
    if not chosen:
        raise EditError("a sweep needs at least one strength")
    edits = [steer(layer, feature, group, **{kind: each}, start=start, tokens=tokens) for each in chosen]
    how: dict[str, Any] = {"mode": mode, "freeze_attention": freeze_attention, "clt": clt, "name": name}
    sampling: dict[str, Any] = {"do_sample": do_sample, "temperature": temperature, "seed": seed}
    steered = Steered.of(model, prompt, edits[0], max_new_tokens, **how, **sampling, **settings)
    job = steered.job
    if len(job.ids) > 1:
        raise EditError(f"a sweep is of one prompt, not of {len(job.ids)}: sweep over each")
    for edit in edits:
        steered.check(edit)
    watched = {_shown(token, job.tokenizer): token_id(token, job.tokenizer, steered.vocabulary) for token in watch}

    def next_token(edit: Edit | None) -> Tensor:
        # An edit that begins only after the prompt leaves what comes right after it.
        late = start is not None and start >= job.longest_prompt
        given = {"input_ids": job.ids, "attention_mask": job.mask}
        edit = None if late else edit
        result = intervene(model, given, edit, mode, clt=steered.crosscoder, freeze_attention=freeze_attention)
        return F.log_softmax(result.logits[0, -1].detach().double(), dim=-1).cpu()

    unedited = next_token(None)
    texts, kl, rows = [], [], []
    for edit in tqdm(edits, desc="strengths", disable=not bar):
        after = next_token(edit)
        rows.append([float(after[i].exp()) for i in watched.values()])
        kl.append(float((unedited.exp() * (unedited - after)).sum()))
        texts.append(steered.generation(edit).texts[0])
    whole = steered.generation(None)
    features = Supernode.of(None, {layer: feature}) if group is None else group
    what = features if isinstance(features, Supernode) else Supernode.of(None, features)
    return Sweep(
        what=what.arguments(),
        kind=kind,
        mode=mode,
        prompt=whole.prompts[0],
        strengths=tuple(map(float, chosen)),
        texts=tuple(texts),
        kl=tuple(kl),
        probabilities={label: tuple(row[i] for row in rows) for i, label in enumerate(watched)},
        unedited_text=whole.texts[0],
        unedited_probabilities={label: float(unedited[i].exp()) for label, i in watched.items()},
        seed=job.seed,
    )


def _shown(token: int | str, tokenizer: Any) -> str:
    if isinstance(token, str):
        return token
    return str(token) if tokenizer is None else tokenizer.decode([token])
