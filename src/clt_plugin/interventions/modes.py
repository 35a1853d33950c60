"""`intervene`: one prompt run with and without edits, in one of the modes in which an edit can act.

========== ============================ ===================== ===================== =========================
mode       attention patterns           norm denominators     MLP outputs           features
========== ============================ ===================== ===================== =========================
direct     frozen                       frozen                frozen                of the unedited run
constrained frozen in the layers given  live, unless the      frozen in the layers  of the unedited run
                                        layers are all        given, live elsewhere
iterative  live (or frozen, by flag)    live                  live                  respond
local      frozen                       frozen                replaced, errors      respond
                                                              frozen
replace    live (or frozen, by flag)    live                  replaced, no errors   respond
========== ============================ ===================== ===================== =========================

What is frozen is as it was in the unedited run. A feature's change, edited less natural activation, is added to every
layer it writes; under ``constrained`` writes outside the layers given are dropped. An affine skip's response belongs to
the linear map in every mode. Sources: Ameisen et al. 2025, "Circuit Tracing" (constrained and iterative patching, the
local replacement model), and the conventions of circuit-tracer.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from clt_plugin.adapters import attached_to
from clt_plugin.adapters._run import group_labels
from clt_plugin.core.crosscoder import Crosscoder
from clt_plugin.core.errors import AttachError
from clt_plugin.core.features import SparseFeatures, SparseGroup
from clt_plugin.core.wiring import Site
from clt_plugin.interventions.edits import Edit, EditError
from clt_plugin.interventions.result import Intervention

MODES = ("direct", "constrained", "iterative", "local", "replace")


def intervene(
    model: Any,
    prompt: Any,
    edits: Edit | None = None,
    mode: str = "iterative",
    *,
    clt: Any = None,
    layers: Iterable[int] | None = None,
    freeze_attention: bool | None = None,
    name: str = "clt",
) -> Intervention:
    """Run a prompt with and without edits, and compare.

    The model itself is not changed: what is attached to it, and the hooks and edits of its library, take no part.

    Args:
        model: An nnsight model, a TransformerBridge, or a transformers model.
        prompt: Text, several texts, token ids (position,) or (batch, position), or the model's keyword arguments.
        edits: What to do, see `clt_plugin.interventions`; None for nothing, which shows what a mode itself changes.
        mode: One of the table above.
        clt: The crosscoder, or a reference; by default the one that is attached to the model.
        layers: The layers that are constrained, for ``mode="constrained"``.
        freeze_attention: Whether patterns are frozen in all layers; by default as the table says.
        name: The name under which the crosscoder is attached.

    Returns:
        Logits, features before and after, and the change in probability of the top tokens. Where a strength of an
        edit requires a gradient, the logits have one.

    Raises:
        EditError: The edits do not fit; nothing has run.
        AttachError: The crosscoder does not fit the model, or cannot act in this mode.
    """
    from clt_plugin.adapters.huggingface import plain_model

    if mode not in MODES:
        raise EditError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    if (layers is None) == (mode == "constrained"):
        raise EditError("layers= says which layers are constrained: give it with mode='constrained', and only there")
    if edits is not None and not isinstance(edits, Edit):
        raise EditError(f"edits are made by functions such as scale(layer=3, feature=811, by=2.0), not {edits!r}")
    crosscoder = find_crosscoder(model, clt, name, edits, mode)
    inputs, tokenizer = read_prompt(model, prompt)
    with plain_model(model) as hf:
        return _Comparison(hf, crosscoder, inputs, edits, mode, layers, freeze_attention).result(tokenizer)


def find_crosscoder(model: Any, clt: Any, name: str, edits: Edit | None, mode: str = "iterative") -> Crosscoder | None:
    """Return the crosscoder to use: given, attached, or none where nothing asks for one."""
    from clt_plugin.adapters.huggingface import crosscoder_for

    if clt is not None:
        return crosscoder_for(clt)
    parts = [] if edits is None else list(edits.parts())
    needed = mode != "iterative" or any(part.edit.needs_crosscoder or part.conditions() for part in parts)
    if parts and not needed:
        # Nor is one that is attached: it need not fit, and its features would be computed for nothing.
        return None
    found = attached_to(model)
    if name in found:
        return found[name]
    if not needed and not found:
        return None
    held = f"attached are {', '.join(found)}" if found else "none is attached"
    raise AttachError(f"no crosscoder is attached as {name!r} ({held}): attach one with add_clt, or pass clt=")


def read_prompt(model: Any, prompt: Any) -> tuple[dict[str, Any], Any]:
    """Return the keyword arguments of a plain model for a prompt, and the tokenizer or None.

    Args:
        model: As for `intervene`.
        prompt: As for `intervene`. Texts of unequal length are padded on the left; positions never count padding
            there, in arguments without ``position_ids`` neither.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if isinstance(prompt, Mapping):
        return _with_positions(dict(prompt)), tokenizer
    if isinstance(prompt, str) or (isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], str)):
        if tokenizer is None:
            raise EditError("this model has no tokenizer: give token ids instead of text")
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        return _tokenized(tokenizer, texts), tokenizer
    try:
        ids = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError):
        ids = torch.empty(0)
    if ids.ndim not in (1, 2) or ids.numel() == 0 or ids.is_floating_point() or ids.dtype == torch.bool:
        shown = tuple(ids.shape) if isinstance(prompt, Tensor) else type(prompt).__name__
        raise EditError(f"a prompt is text, or token ids (position,) or (batch, position), not {shown}")
    ids = ids.reshape(-1, ids.shape[-1])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, tokenizer


def _tokenized(tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    rows = [tokenizer(text)["input_ids"] for text in texts]
    if not all(rows):
        raise EditError("a prompt has no tokens")
    longest = max(map(len, rows))
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
    return _with_positions({"input_ids": ids, "attention_mask": mask})


def _with_positions(inputs: dict[str, Any]) -> dict[str, Any]:
    """Add the positions that a left-padded prompt needs: a model that is given none counts padding."""
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and inputs.get("position_ids") is None and not mask[:, :1].all():
        inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return inputs


class _Comparison:
    """One prompt, run once as it is and once with edits.

    Args:
        hf: The plain model.
        crosscoder: The crosscoder, or None.
        inputs: The model's keyword arguments.
        edits: What to do.
        mode: As for `intervene`.
        layers: As for `intervene`.
        freeze_attention: As for `intervene`.
    """

    def __init__(
        self,
        hf: nn.Module,
        crosscoder: Crosscoder | None,
        inputs: dict[str, Any],
        edits: Edit | None,
        mode: str,
        layers: Iterable[int] | None,
        freeze_attention: bool | None,
    ) -> None:
        from clt_plugin.adapters.huggingface import HostModel, check_fits, pass_of
        from clt_plugin.interventions._generation import check_ids, vocabulary_of

        self.hf, self.crosscoder, self.edits, self.mode = hf, crosscoder, edits, mode
        device = next(hf.parameters()).device
        self.inputs = {key: v.to(device) if isinstance(v, Tensor) else v for key, v in inputs.items()}
        ids = self.inputs.get("input_ids", self.inputs.get("inputs_embeds"))
        if ids is None:
            raise EditError("the prompt's arguments name neither input_ids nor inputs_embeds")
        self.shape = (ids.shape[0], ids.shape[1])
        if not all(self.shape):
            raise EditError("the prompt has no tokens")
        now = pass_of(self.inputs, None, self.shape)
        self.kept = now.kept.to(device)
        if not bool(self.kept.any(-1).all()):
            raise EditError("a row of the prompt is all padding: give each at least one token")
        if crosscoder is None:
            self.host = HostModel.of(hf)
        else:
            self.host = check_fits(crosscoder, hf, "replace" if mode == "replace" else "replace_with_error")
            if mode == "local" and crosscoder.is_partial:
                raise AttachError(
                    "this crosscoder is a selection of layers or features: under mode='local' those left out would "
                    "stand frozen in the errors. Use the whole, or another mode, in which a selection is exact"
                )
        if edits is not None:
            edits.check(crosscoder, (self.shape[0], int(now.lengths.max())))
            named = [r.tokens for part in edits.parts() for r in part.within if isinstance(r.tokens, tuple)]
            # A model without an unembedding is refused once it has run.
            if named and hf.get_output_embeddings() is not None:  # type: ignore[operator]
                check_ids(torch.tensor(sum(named, ())), vocabulary_of(hf))
        handoffs = [] if edits is None else [part for part in edits.parts() if part.edit.kind == "ablate_handoff"]
        for part in handoffs:
            post_norm = self.host.architecture.post_mlp_norm
            part.edit.check_model(self.host.n_layers, self.host.d_model, crosscoder, post_norm)
            if mode in ("direct", "constrained"):
                raise EditError(
                    f"{part!r} changes what an MLP reads, but under mode={mode!r} MLPs do not respond: use "
                    "'iterative', 'local' or 'replace'"
                )
        self.handoffs = handoffs
        every = frozenset(range(self.host.n_layers))
        self.layers = every if layers is None else frozenset(layers)
        if not self.layers:
            raise EditError("layers= names no layer: with none constrained, all that edits write would be dropped")
        if beyond := sorted(self.layers - every):
            raise EditError(f"there is no layer {beyond[0]}: the model has layers 0-{self.host.n_layers - 1}")
        self._warn_of_dropped_writes()
        linear = mode in ("direct", "local")
        self.norms = every if linear or (mode == "constrained" and self.layers == every) else frozenset()
        frozen = every if linear else self.layers if mode == "constrained" else frozenset()
        self.patterns = frozen if freeze_attention is None else (every if freeze_attention else frozenset())

    def result(self, tokenizer: Any) -> Intervention:
        """Run both, and compare."""
        from clt_plugin.adapters._frozen import frozen, record
        from clt_plugin.interventions._engine import Engine

        sites = () if self.crosscoder is None else (*self.crosscoder.sites.read, *self.crosscoder.sites.write)
        self.base = record(self.hf, self.host, self.inputs, sites)
        if self.base.logits is None:
            raise EditError(f"{type(self.hf).__name__} has no unembedding: load it with its language modelling head")
        excluded = self._excluded()
        before = None if self.crosscoder is None else self._features(excluded)
        run = None if self.crosscoder is None else self._run(before, excluded)
        # Also where nothing is frozen: both runs then attend by the same means.
        freeze = frozen(self.hf, self.host, self.base, self.patterns, self.norms)
        with torch.set_grad_enabled(torch.is_grad_enabled() and _wants_gradient(self.edits)):
            held = self._held()
            with freeze, Engine(self.hf, self.host, run, self.handoffs, self.base, self.norms, held) as engine:
                logits = self.hf(**{**self.inputs, "use_cache": False}).logits
                after = [] if run is None else [engine.features[label].detach() for label in run.labels]
        return Intervention(
            logits=logits,
            baseline=self.base.logits,
            before=None if before is None else _sparse(before),
            after=None if run is None else _sparse(after),
            edits=self.edits,
            mode=self.mode,
            ids=self.inputs.get("input_ids"),
            mask=self.kept,
            tokenizer=tokenizer,
        )

    def _warn_of_dropped_writes(self) -> None:
        """Warn of edits that write no layer in the constrained range, so that they do nothing."""
        if self.mode != "constrained" or self.crosscoder is None or self.edits is None:
            return
        writes = dict(zip(group_labels(self.crosscoder.wiring), self.crosscoder.wiring.writes, strict=True))
        edited = self.edits.layers()
        if edited and not {site.layer for label in edited for site in writes[label]} & self.layers:
            warnings.warn(
                f"features of layer {', '.join(edited)} write none of the constrained layers {sorted(self.layers)}: "
                "their edits change nothing",
                stacklevel=5,
            )

    def _excluded(self) -> Tensor | None:
        from clt_plugin.adapters.huggingface import excluded_positions

        first = 0 if self.crosscoder is None else self.crosscoder.host.exclude_first
        return excluded_positions(first, self.inputs, self.shape)

    def _features(self, excluded: Tensor | None) -> list[Tensor]:
        """Return each group's activations in the unedited run, (batch, position, F)."""
        crosscoder, features = self.crosscoder, []
        assert crosscoder is not None
        with torch.no_grad():
            for group, reads in enumerate(crosscoder.wiring.reads):
                x = torch.cat([self.base.sites[site] for site in reads], dim=-1).to(crosscoder.device)
                acts = crosscoder.encode_group(group, x)
                features.append(acts if excluded is None else acts.masked_fill(excluded.to(acts.device)[..., None], 0))
        return features

    def _held(self) -> dict[int, Tensor]:
        """Return what frozen MLPs that the crosscoder does not write put out in the unedited run, by layer."""
        if self.crosscoder is None or self.mode not in ("direct", "constrained", "local"):
            return {}
        written = {site.layer for site in self.crosscoder.sites.write}
        return {layer: self.base.mlp_out[layer] for layer in sorted(self.layers - written)}

    def _run(self, before: list[Tensor] | None, excluded: Tensor | None) -> Any:
        from clt_plugin.adapters._run import Run
        from clt_plugin.interventions._engine import FixedRun, LiveRun, LocalRun

        crosscoder, base = self.crosscoder, self.base
        assert crosscoder is not None
        assert before is not None
        reads = {site: base.sites[site] for site in crosscoder.sites.read}
        if self.mode in ("direct", "constrained"):
            outputs = {site: base.sites[site] for site in crosscoder.sites.write}
            return FixedRun(crosscoder, self.edits, outputs, reads, self.layers)
        if self.mode == "local":
            return LocalRun(crosscoder, self.edits, self._errors(before), reads)
        return Run(crosscoder, "replace", self.edits) if self.mode == "replace" else LiveRun(crosscoder, self.edits)

    def _errors(self, before: list[Tensor]) -> dict[Site, Tensor]:
        """Return what each MLP put out in the unedited run beyond its reconstruction."""
        crosscoder = self.crosscoder
        assert crosscoder is not None
        reads = {site: self.base.sites[site].to(crosscoder.device) for site in crosscoder.sites.read}
        with torch.no_grad():
            recon = crosscoder.decode(tuple(before), reads)
        wide = torch.promote_types(crosscoder.dtype, torch.float32)
        return {site: self.base.sites[site].to(y.device, wide) - y.to(wide) for site, y in recon.items()}


def _wants_gradient(edits: Edit | None) -> bool:
    """Whether a number of an edit, a strength or a mean, requires a gradient."""
    parts = () if edits is None else edits.parts()
    values = (getattr(part.edit, field.name) for part in parts for field in fields(part.edit))
    tensors = (each for value in values for each in (value.values() if isinstance(value, dict) else (value,)))
    return any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors)


def _sparse(features: list[Tensor]) -> SparseFeatures:
    shape = tuple(features[0].shape[:-1])
    return SparseFeatures(tuple(SparseGroup.of(acts.reshape(-1, acts.shape[-1])) for acts in features), shape, True)
