"""The plain torch model inside either library's object: what it is, and whether a crosscoder fits it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clt_plugin.adapters._pass import Pass
from clt_plugin.adapters.sites import Architecture, architecture_of, check_sites, is_parallel
from clt_plugin.core.crosscoder import Crosscoder
from clt_plugin.core.errors import AttachError

MODES = ("replace", "replace_with_error", "observe")


@dataclass(frozen=True)
class HostModel:
    """What a crosscoder needs to know of a Hugging Face model.

    Attributes:
        architecture: The family's row in the table of sites.
        parallel: Whether its blocks run attention and MLP side by side.
        blocks: The path of the list of blocks.
        n_layers: How many there are.
        d_model: The width of the residual stream.
        name: The model's name, or "" where it has none.
    """

    architecture: Architecture
    parallel: bool
    blocks: str
    n_layers: int
    d_model: int
    name: str

    @property
    def backbone(self) -> str:
        """The path of the module that runs the blocks; "" for the model itself."""
        return self.blocks.rpartition(".")[0]

    @property
    def final_norm(self) -> str:
        """The path of the norm before the unembedding."""
        return f"{self.backbone}.{self.architecture.final_norm}".lstrip(".")

    @classmethod
    def of(cls, model: nn.Module) -> HostModel:
        """Describe a model of a supported family; refuse any other."""
        config = getattr(model, "config", None)
        if config is None:
            raise AttachError(f"{type(model).__name__} has no config: crosscoders attach to transformers models")
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        row = architecture_of(text)
        for path in row.blocks:
            try:
                blocks: Any = model.get_submodule(path)
            except AttributeError:
                continue
            name = str(getattr(config, "name_or_path", "") or "")
            return cls(row, is_parallel(row, text), path, len(blocks), text.hidden_size, name)
        raise AttachError(f"{type(model).__name__} keeps its blocks at none of {', '.join(row.blocks)}")


def crosscoder_for(
    clt: Any, layers: Iterable[int] | None = None, features: Mapping[int, Sequence[int]] | None = None
) -> Crosscoder:
    """Return what ``add_clt`` is to attach: a crosscoder, one loaded from a reference, or a part of either.

    Args:
        clt: A `Crosscoder`, a folder, or an ``hf://`` reference.
        layers: See `Crosscoder.select`.
        features: See `Crosscoder.select`.
    """
    # Not by os.PathLike: this code travels to remote models, which let few modules in.
    if isinstance(clt, str) or hasattr(clt, "__fspath__"):
        from clt_plugin.formats import load

        return load(clt, layers=layers, features=features)
    if not isinstance(clt, Crosscoder):
        raise AttachError(f"add_clt takes a Crosscoder, a folder or an hf:// reference, not {type(clt).__name__}")
    return clt if layers is None and features is None else clt.select(layers, features)


def check_fits(
    crosscoder: Crosscoder, model: nn.Module, mode: str, edits: Any = None, together: bool = False
) -> HostModel:
    """Refuse a crosscoder that does not fit a model, or cannot be attached in a mode; warn of another name.

    Args:
        crosscoder: What is to be attached.
        model: The Hugging Face model.
        mode: One of `MODES`.
        edits: What is to be edited, or None.
        together: Whether all groups are encoded together, from a run that was recorded.
    """
    if mode not in MODES:
        raise AttachError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    if edits is not None:
        if mode == "observe":
            raise AttachError("mode='observe' writes nothing, so that edits would have no effect: use another mode")
        edits.check(crosscoder)
        for part in edits.parts():
            if part.edit.kind == "ablate_handoff":
                raise AttachError(f"{part!r} changes what an MLP reads, as add_clt does not: pass it to intervene")
    host = HostModel.of(model)
    _check_dimensions(crosscoder, host)
    sites = crosscoder.sites
    check_sites(host.architecture, host.parallel, [site.name for site in (*sites.read, *sites.write)])
    _check_mode(crosscoder, mode, together)
    check_runs_once(model)
    wanted, found = crosscoder.host.model_name, _own_name(host.name)
    if wanted and found and _own_name(wanted) != found:
        warnings.warn(
            f"this crosscoder was trained for {wanted}, but the model is {host.name}: the dimensions fit, the "
            "features may mean nothing",
            stacklevel=4,
        )
    return host


def check_runs_once(model: nn.Module) -> None:
    """Refuse a model whose blocks run again in the backward pass."""
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise AttachError(
            "gradient checkpointing runs each block twice, and a crosscoder would read both runs: turn it off first, "
            "with model.gradient_checkpointing_disable(), which newer versions call activation_checkpointing_disable()"
        )


def _check_dimensions(crosscoder: Crosscoder, host: HostModel) -> None:
    wiring = crosscoder.wiring
    if len(wiring.models) > 1:
        models = ", ".join(wiring.models)
        raise AttachError(f"this crosscoder spans the models {models}: encode their activations instead")
    wanted = crosscoder.host.n_layers or _layers_implied(crosscoder)
    if wanted is not None and wanted != host.n_layers:
        raise AttachError(f"this crosscoder is for a model of {wanted} layers, but the model has {host.n_layers}")
    if wiring.layers[-1] >= host.n_layers:
        last = wiring.layers[-1]
        raise AttachError(f"this crosscoder uses layer {last}, but the model has layers 0-{host.n_layers - 1}")
    for site, width in crosscoder.layout.widths:
        if width != host.d_model:
            raise AttachError(f"this crosscoder has width {width} at {site}, but the model's d_model is {host.d_model}")


def _layers_implied(crosscoder: Crosscoder) -> int | None:
    """Return how many layers a model has whose MLPs, from the first on, are all covered; None for one or a choice."""
    wiring = crosscoder.wiring
    from_the_first = wiring.writes_mlps_only and wiring.n_layers == wiring.layers[-1] + 1
    return wiring.n_layers if from_the_first and wiring.n_layers > 1 and not crosscoder.is_partial else None


def _check_mode(crosscoder: Crosscoder, mode: str, together: bool) -> None:
    activation = crosscoder.activation
    if activation.has_batch_threshold:
        unmeasured = crosscoder.training or any(bool(t.isnan()) for t in crosscoder.threshold or ())
        if unmeasured:
            raise AttachError(
                "in training mode, or before its threshold is measured, BatchTopK selects over the whole batch: call "
                "estimate_threshold(x) on typical inputs and eval() first"
            )
    elif activation.joint and not together:
        raise AttachError(
            f"{activation} selects over all layers together, which a forward pass reaches one by one: a jointly "
            "selected TopK needs a per-token threshold; use encode() on recorded activations"
        )
    if mode == "observe":
        return
    reason = crosscoder.wiring.why_not_replace()
    if reason:
        raise AttachError(f"this crosscoder can only be attached with mode='observe': {reason}")
    if mode == "replace" and crosscoder.is_partial:
        raise AttachError(
            "this crosscoder is a selection of layers or features, whose reconstruction is not the whole's: use "
            "mode='replace_with_error', where edits are exact (gradients are not), or mode='observe'"
        )


def _own_name(name: str) -> str:
    """Return a model's own name, without its owner and in lower case; "" for a local folder, which tells nothing."""
    path = Path(name)
    cached = next((part for part in path.parts if part.startswith("models--")), None)
    if cached:  # a folder of the Hub's cache: models--owner--name/snapshots/...
        return cached.rpartition("--")[2].lower()
    return "" if path.is_dir() else path.name.lower()


def excluded_positions(first: int, arguments: dict[str, Any], shape: tuple[int, ...]) -> Tensor | None:
    """Return which positions of a forward pass are among the first ones, (batch, position), or None where none is.

    Padding does not count: the first positions are the first that the attention mask keeps.

    Args:
        first: How many first positions are excluded.
        arguments: The backbone's keyword arguments: its attention mask and cache are looked at.
        shape: (batch, position) of this pass.
    """
    if not first:
        return None
    cache = arguments.get("past_key_values")
    past = cache.get_seq_length() if cache is not None else 0
    seen = past + shape[1]
    kept = _kept_positions(arguments.get("attention_mask"))
    if kept is None:
        kept = torch.ones(shape[0], seen, dtype=torch.bool)
    elif kept.shape[1] < seen:
        # Masks over a sliding window forget the text's beginning, which is not excluded in any case by then.
        kept = F.pad(kept, (seen - kept.shape[1], 0), value=True)
    excluded = (kept & (kept.cumsum(-1) <= first))[:, past:seen].expand(shape)
    return excluded if bool(excluded.any()) else None


def pass_of(arguments: dict[str, Any], ids: Tensor | None, shape: tuple[int, ...]) -> Pass:
    """Describe a forward pass of the backbone.

    Args:
        arguments: Its keyword arguments: its attention mask and cache are looked at.
        ids: Its token ids, or None.
        shape: (batch, position) of this pass.
    """
    cache = arguments.get("past_key_values")
    past = cache.get_seq_length() if cache is not None else 0
    return Pass.of(ids, (shape[0], shape[1]), _kept_positions(arguments.get("attention_mask")), past)


def _kept_positions(mask: Any) -> Tensor | None:
    """Return which positions an attention mask keeps, (batch, keys); None where it says nothing of padding."""
    if isinstance(mask, dict):
        # One a kind of attention, as a multimodal model hands them on to its text model.
        mask = mask.get("full_attention", next(iter(mask.values())))
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim == 4:
        # What each query may see, (batch, heads, queries, keys), as booleans or as 0 among very negative numbers.
        return (mask if mask.dtype == torch.bool else mask == 0)[:, 0].any(-2)
    return mask.bool()


class plain_model:
    """The Hugging Face model inside either library's object, as it runs without the library: a context manager.

    A bridge's components step aside as long as the context lasts, so the bridge itself is not to be run in it.

    Args:
        model: An nnsight model, a TransformerBridge, or a transformers model, which is given back as it is.

    Raises:
        AttachError: A bridge whose weights were processed; an nnsight model inside its own trace.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._aside: list[tuple[nn.Module, str, nn.Module]] = []

    def __enter__(self) -> nn.Module:
        model = self.model
        # By name, so that neither library is imported here.
        libraries = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
        if "nnsight" in libraries:
            return _inside_nnsight(model)
        if "transformer_lens" not in libraries:
            return model
        if model._weights_processed:
            raise AttachError(
                "this bridge's weights were processed (compatibility mode folds norms into them), so that the model "
                "they came from is gone: boot it again without"
            )
        try:
            self._step_aside(model.original_model)
        except BaseException:
            self.__exit__()
            raise
        return model.original_model

    def __exit__(self, *_: object) -> None:
        while self._aside:
            parent, name, component = self._aside.pop()
            parent._modules[name] = component

    def _step_aside(self, parent: nn.Module) -> None:
        """Put the module that each component of a bridge wraps in the component's place."""
        for name, child in list(parent._modules.items()):
            if child is None:
                continue
            original = child._modules.get("_original_component")
            if original is not None:
                self._aside.append((parent, name, child))
                parent._modules[name] = original
            self._step_aside(child if original is None else original)


def _inside_nnsight(model: Any) -> nn.Module:
    """Return the model that nnsight wraps, with its weights loaded."""
    if model.interleaver.interleaving:
        raise AttachError("the plain model cannot run inside a trace, which would take part in it: leave the trace")
    if not model.dispatched:
        model.dispatch()
    return model._module
