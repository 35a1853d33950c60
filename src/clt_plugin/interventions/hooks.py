"""Edits as hooks on a crosscoder that is attached: TransformerLens's ``fwd_hooks``, and within an nnsight trace.

Both act on the points ``features`` as the edits given to ``add_clt(edits=)`` do, only later: after those, and after
whichever of the user's own hooks come first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch._guards import detect_fake_mode

from clt_plugin.adapters._pass import Pass
from clt_plugin.adapters._run import Run, group_labels, turn
from clt_plugin.adapters.huggingface import HostModel, pass_of
from clt_plugin.core.crosscoder import Crosscoder
from clt_plugin.core.errors import AttachError
from clt_plugin.interventions._places import EditError, label_order, show_label

if TYPE_CHECKING:
    from clt_plugin.interventions._edit import Edit

FwdHook = tuple[str, Callable[..., Tensor]]


def fwd_hooks(edit: Edit, bridge: Any, name: str = "clt") -> list[FwdHook]:
    """Return an edit as (hook name, function) pairs; see `Edit.fwd_hooks`."""
    run = _run_in(bridge, name)
    _check(edit, run.crosscoder, run.mode)

    def on(label: str, function: Callable[..., Tensor]) -> FwdHook:
        layer, _, number = label.partition("_")
        points = vars(bridge.blocks[int(layer)])[f"{name}_{number}" if number else name]
        return points.hook_features.name, function

    return [
        *(on(label, _recorder(run, label)) for label in sorted(edit.watched(), key=label_order)),
        *(on(label, _editor(edit, run, label)) for label in edit.layers()),
    ]


def _run_in(bridge: Any, name: str) -> Run:
    """Return the run of the crosscoder that is attached to a bridge under a name."""
    if not hasattr(bridge, "_hook_registry"):
        raise AttachError(
            f"fwd_hooks are of a TransformerBridge, not of {type(bridge).__name__}: in an nnsight trace call "
            "edit.apply(model), or pass the edit to add_clt(edits=)"
        )
    held = {}
    for block in bridge.blocks:
        for points in vars(block).values():
            if hasattr(points, "_run") and hasattr(points, "hook_features"):
                held[points._name] = points._run
    if name not in held:
        raise _not_attached(name, ", ".join(held))
    return held[name]


def _not_attached(name: str, others: str = "") -> AttachError:
    held = f"attached are {others}" if others else "none is attached"
    return AttachError(f"no crosscoder is attached as {name!r} ({held}): attach one with add_clt first")


def _check(edit: Edit, crosscoder: Crosscoder | None, mode: str) -> None:
    """Refuse an edit that hooks cannot do, or that does not fit; None where the crosscoder is not at hand."""
    if mode == "observe":
        raise AttachError("mode='observe' writes nothing, so that edits would have no effect: attach with another mode")
    for part in edit.parts():
        if not part.edit.targets():
            raise EditError(
                f"{part.edit!r} is of no feature's activation, which is what hooks edit: pass it to add_clt(edits=), "
                "if it drops writes, or to intervene"
            )
    if crosscoder is not None:
        edit.check(crosscoder)


def _check_places(edit: Edit, now: Pass) -> None:
    """Refuse positions and rows beyond those of a pass that none follows."""
    for part in edit.parts():
        part.check_places((len(now.lengths), int(now.lengths.max())))


def _recorder(run: Run, label: str) -> Callable[..., Tensor]:
    def record(tensor: Tensor, hook: Any) -> Tensor:
        if label not in run.natural:
            # A copy: later hooks may edit in place.
            run.natural[label] = tensor.detach().clone()
        return tensor

    return record


def _editor(edit: Edit, run: Run, label: str) -> Callable[..., Tensor]:
    def apply_edit(tensor: Tensor, hook: Any) -> Tensor:
        if run.now is None:
            raise AttachError(f"{edit!r}: these hooks are of a crosscoder that was removed: make them anew")
        edited = edit.activations(label, tensor, run.natural, run.now)
        if edited is not tensor:
            # For the conditions of other edits' hooks after these.
            run.natural.setdefault(label, tensor.detach())
        return edited

    return apply_edit


def apply(edit: Edit, model: Any, name: str = "clt") -> None:
    """Act on the run of the trace in whose body this is called; see `Edit.apply`."""
    points: Any = getattr(model, name, None)
    if not hasattr(points, "layers") or not hasattr(points, "crosscoder"):
        raise _not_attached(name)
    crosscoder = points.crosscoder
    _check(edit, crosscoder, points.mode)
    watched, edited = edit.watched(), edit.layers()
    labels = sorted({*watched, *edited}, key=label_order)
    if crosscoder is not None:
        number = {label: group for group, label in enumerate(group_labels(crosscoder.wiring))}
        labels.sort(key=lambda label: turn(crosscoder.wiring, number[label]))
    host = HostModel.of(model)
    args, kwargs = (model.get(host.backbone) if host.backbone else model).inputs
    ids = args[0] if args else kwargs.get("input_ids")
    shape = tuple((ids if ids is not None else kwargs["inputs_embeds"]).shape[:2])
    # A scan has shapes and no values.
    now = None if detect_fake_mode() is not None else pass_of(kwargs, ids, shape)
    # In generation, which has a cache or says that it has none, what is beyond this pass may come in a later one.
    alone = kwargs.get("past_key_values") is None and kwargs.get("use_cache") is not False
    if now is not None and alone:
        _check_places(edit, now)
    natural: dict[str, Tensor] = {}
    for label in labels:
        point = points.layers[label].features
        acts = point.output
        if now is None:
            continue
        if crosscoder is None:
            _check_width(edit, label, acts)
        natural[label] = acts.detach().clone() if label in watched else acts
        if label in edited:
            point.output = edit.activations(label, acts, natural, now)


def _check_width(edit: Edit, label: str, acts: Tensor) -> None:
    """Check features by what is at hand on a remote model, where the crosscoder is not."""
    conditions = [leaf for part in edit.parts() for where in part.conditions() for leaf in where.leaves()]
    named = [feature for part in edit.parts() for feature in part.edit.targets().get(label, ())]
    named += [leaf.feature for leaf in conditions if leaf.label == label]
    if named and max(named) >= acts.shape[-1]:
        raise EditError(
            f"layer {show_label(label)} has features 0 to {acts.shape[-1] - 1}: there is no feature {max(named)}"
        )
