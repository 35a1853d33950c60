"""A model that generates while edits act in it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from clt_plugin.adapters._run import group_labels
from clt_plugin.core.crosscoder import Crosscoder
from clt_plugin.interventions._edit import Edit, Part
from clt_plugin.interventions._generation import Generation, Job, check_ids, vocabulary_of
from clt_plugin.interventions._places import EditError
from clt_plugin.interventions.modes import find_crosscoder

MODES = ("iterative", "replace")


class Steered:
    """A model, and how edits act in it while it generates.

    Args:
        model: As for `generate`.
        job: What to generate.
        mode: As for `generate`.
        freeze_attention: As for `generate`.
        crosscoder: What is edited, or None.
    """

    def __init__(self, model: Any, job: Job, mode: str, freeze_attention: bool, crosscoder: Any) -> None:
        from clt_plugin.adapters.huggingface import HostModel, check_fits, plain_model

        if mode not in MODES:
            raise EditError(f"in generation mode is one of {', '.join(MODES)}, not {mode!r}")
        if mode == "replace" and crosscoder is None:
            raise EditError("mode='replace' needs a crosscoder: attach one with add_clt, or pass clt=")
        self.model, self.job, self.mode, self.crosscoder = model, job, mode, crosscoder
        self.freeze_attention = freeze_attention
        self.recording: Any = None
        fits = "replace" if mode == "replace" else "replace_with_error"
        with plain_model(model) as hf:
            self.host = HostModel.of(hf) if crosscoder is None else check_fits(crosscoder, hf, fits)
            job.check_model(hf)
            self.vocabulary = vocabulary_of(hf)

    @classmethod
    def of(
        cls,
        model: Any,
        prompt: Any,
        edits: Edit | None,
        max_new_tokens: int,
        *,
        mode: str = "iterative",
        freeze_attention: bool = False,
        clt: Any = None,
        name: str = "clt",
        do_sample: bool = False,
        temperature: float | None = None,
        seed: int | None = None,
        **settings: Any,
    ) -> Steered:
        """Read and check what `generate` is given; nothing has run then."""
        if edits is not None and not isinstance(edits, Edit):
            raise EditError(f"edits are made by functions such as scale(layer=3, feature=811, by=2.0), not {edits!r}")
        job = Job.of(model, prompt, max_new_tokens, do_sample, temperature, seed, settings)
        steered = cls(model, job, mode, freeze_attention, find_crosscoder(model, clt, name, edits, mode))
        if edits is not None:
            steered.check(edits)
        return steered

    def check(self, edits: Edit) -> None:
        """Raise `EditError` where edits do not fit the crosscoder, the model, or the prompt and what comes after."""
        edits.check(self.crosscoder, self.job.shape)
        rows, prompt = self.job.shape[0], self.job.longest_prompt
        for part in edits.parts():
            which = {within.tokens for within in part.within if isinstance(within.tokens, str)}
            if "prompt" in which:
                part.check(self.crosscoder, (rows, prompt))
            if "generated" in which and self.job.max_new_tokens == 1:
                raise EditError(f"{part!r} never acts: with max_new_tokens=1 no pass reads a generated token")
            for within in part.within:
                if isinstance(within.tokens, tuple):
                    check_ids(torch.tensor(within.tokens), self.vocabulary)
        for part in _handoffs(edits):
            edit: Any = part.edit
            host = self.host
            edit.check_model(host.n_layers, host.d_model, self.crosscoder, host.architecture.post_mlp_norm)
            if edit.norm == "frozen":
                raise EditError(f"{edit!r}: there are no denominators to keep for tokens yet to come: norm='live'")

    def generation(self, edits: Edit | None, compare: bool = False, streamer: Any = None) -> Generation:
        """Generate, and put together the result."""
        from clt_plugin.adapters.huggingface import plain_model

        ids = self.ids(edits, self.job, streamer)
        others = self.ids(None, self.job) if compare else None
        frozen = ", attention frozen in the prompt" if self.freeze_attention else ""
        with plain_model(self.model) as hf:
            result = self.job.result(hf, ids, f"{edits!r}, mode {self.mode}{frozen}")
            if others is None:
                return result
            return replace(result, unedited=self.job.result(hf, others, f"unedited, mode {self.mode}{frozen}"))

    def ids(self, edits: Edit | None, job: Job, streamer: Any = None) -> Tensor:
        """Generate, and return prompt and new tokens, (batch, position)."""
        from clt_plugin.adapters._run import Run
        from clt_plugin.adapters.huggingface import plain_model
        from clt_plugin.interventions._engine import Engine, LiveRun

        # Without edits, a reconstruction and its error are the model's own output.
        idle = self.crosscoder is None or (edits is None and self.mode == "iterative")
        handoffs = [] if edits is None else _handoffs(edits)
        run: Any = None
        if self.crosscoder is not None and not idle:
            live = self.mode == "iterative"
            needed = _needed(edits, self.crosscoder, handoffs)
            run = LiveRun(self.crosscoder, edits, needed) if live else Run(self.crosscoder, "replace", edits)
        with torch.no_grad(), plain_model(self.model) as hf, ExitStack() as stack:
            if self.freeze_attention:
                _FrozenPrompt(hf, self.host, self._record(hf), stack)
            stack.enter_context(Engine(hf, self.host, run, handoffs))
            return job.run(hf, **({} if streamer is None else {"streamer": streamer}))

    def _record(self, hf: nn.Module) -> Any:
        """Return the unedited pass over the prompt, run once."""
        from clt_plugin.adapters._frozen import record

        if self.recording is None:
            device = hf.get_input_embeddings().weight.device  # type: ignore[operator]
            ids, mask = self.job.ids.to(device), self.job.mask.to(device)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            self.recording = record(hf, self.host, inputs)
        return self.recording


def _needed(edits: Edit | None, crosscoder: Crosscoder, handoffs: list[Part]) -> set[str]:
    """Return the labels of the groups that edits are about: in generation no others need be encoded."""
    if edits is None:
        return set()
    labels = group_labels(crosscoder.wiring)
    masked = {labels[group] for group, _ in edits.dropped(crosscoder.wiring)}
    edits_of_features: Any = [part.edit for part in handoffs if part.edit.needs_crosscoder]
    handed = {str(source) for edit in edits_of_features for source in edit.sources}
    return {*edits.layers(), *edits.watched(), *masked, *handed}


def _handoffs(edits: Edit) -> list[Part]:
    return [part for part in edits.parts() if part.edit.kind == "ablate_handoff"]


class _FrozenPrompt:
    """Freezes attention patterns in a model's next pass, and in none after it.

    Args:
        hf: The plain model.
        host: What it is.
        recording: The pass whose patterns are kept.
        stack: Undoes everything when it is closed.
    """

    def __init__(self, hf: nn.Module, host: Any, recording: Any, stack: ExitStack) -> None:
        self.args = (hf, host, recording)
        self.freeze = stack.enter_context(ExitStack())
        self.before = hf.register_forward_pre_hook(self._begin)
        self.after = hf.register_forward_hook(self._end, always_call=True)
        stack.callback(self.before.remove)
        stack.callback(self.after.remove)

    def _begin(self, module: nn.Module, args: Any) -> None:
        from clt_plugin.adapters._frozen import frozen

        self.before.remove()
        self.freeze.enter_context(frozen(*self.args, patterns=True, norms=False))

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.after.remove()
        self.freeze.close()
