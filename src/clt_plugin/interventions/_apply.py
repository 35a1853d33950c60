"""What edits do to one group's activations in one forward pass.

Canonical shapes: activations are (batch, position, F); places, and all that describes tokens, (batch, position).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch._guards import detect_fake_mode

from clt_plugin.adapters._pass import Pass
from clt_plugin.interventions._places import (
    Active,
    AllOf,
    AnyOf,
    Condition,
    EditError,
    Index,
    Not,
    Restriction,
    show_label,
)

if TYPE_CHECKING:
    from clt_plugin.interventions._edit import Part


def edit_activations(
    parts: Iterable[Part],
    label: str,
    acts: "Float[Tensor, 'batch position f']",
    natural: "Mapping[str, Float[Tensor, 'batch position _']]",
    now: Pass,
) -> "Float[Tensor, 'batch position f']":
    """Edit one group's activations.

    A feature that is scaled where it is inactive, at all the tokens given, is warned of; at tokens that the model
    itself generates, one a pass, this says nothing.

    Args:
        parts: What is done, in order; what is not of features is passed over.
        label: The group's label.
        acts: Its activations as they are now. They stay as they are.
        natural: Unedited activations, by label, of the groups that conditions look at.
        now: The tokens of this pass.

    Returns:
        Edited activations; ``acts`` itself where nothing was to be edited. Differentiable in acts and strengths.

    Raises:
        EditError: Where a condition or a restriction asks for something that this pass does not hold.
    """
    result = acts
    for part in parts:
        if label not in part.labels():
            continue
        if tuple(now.kept.shape) != tuple(acts.shape[:2]):
            raise EditError(f"activations of shape {tuple(acts.shape)} in a pass of {tuple(now.kept.shape)} tokens")
        here = places_of(part, now, natural).to(acts.device)
        if _nowhere(here):
            continue
        if result is acts:
            result = acts.clone()
        _edit_part(part, label, result, here, now.generated.to(acts.device))
    return result


def _edit_part(part: Part, label: str, acts: Tensor, here: Tensor, generated: Tensor) -> None:
    """Edit activations in place, which are a copy already."""
    features, strengths = part.edit.at(label)
    columns = torch.tensor(features, device=acts.device)
    # In float32 at least, as torch itself multiplies by a number; and only these columns.
    old = acts[..., columns].to(torch.promote_types(acts.dtype, torch.float32))
    if part.edit.needs_active:
        _warn_of_silence(part, label, features, old, here & ~generated)
    values = {name: _as_tensor(strength, old) for name, strength in strengths.items()}
    new = torch.where(here[..., None], part.edit.edited(old, **values), old)
    acts[..., columns] = new.to(acts.dtype)


def _warn_of_silence(part: Part, label: str, features: tuple[int, ...], old: Tensor, here: Tensor) -> None:
    if _nowhere(here) or detect_fake_mode() is not None:
        return
    active = ((old != 0) & here[..., None]).flatten(0, 1).any(0).tolist()
    silent = [str(feature) for feature, on in zip(features, active, strict=True) if not on]
    if silent:
        which = f"feature{'s' if len(silent) > 1 else ''} {', '.join(silent)} of layer {show_label(label)}"
        warnings.warn(
            f"{part!r} leaves {which} at 0, inactive at the tokens of this pass where it acts: use add or set_value",
            UserWarning,
            stacklevel=4,
        )


def _as_tensor(strength: Any, like: Tensor) -> Tensor | None:
    return None if strength is None else torch.as_tensor(strength, dtype=like.dtype, device=like.device)


# ---------------------------------------------------------------- places


def places_of(part: Part, now: Pass, natural: "Mapping[str, Tensor]") -> "Bool[Tensor, 'batch position']":
    """Return where a part of an edit acts in a pass; never at padding.

    Args:
        part: An edit and its restrictions.
        now: The tokens of the pass.
        natural: Unedited activations, by label, of the groups that conditions look at.
    """
    here = now.kept
    for restriction in part.within:
        here = here & _plainly(restriction, now)
    # Conditions come last: they may ask for what only passes hold in which there is something to edit.
    for restriction in part.within:
        if restriction.where is not None and not _nowhere(here):
            here = here & _holds(restriction.where, natural, now)
    return here


def _nowhere(here: Tensor) -> bool:
    """Whether no place is left; unknown, so False, where there are shapes and no values, as in nnsight's scan."""
    return detect_fake_mode() is None and not bool(here.any())


def _plainly(restriction: Restriction, now: Pass) -> "Bool[Tensor, 'batch position']":
    """Return where all of a restriction but its condition is met."""
    here = torch.ones_like(now.kept)
    if restriction.position is not None:
        here = here & _indexed(restriction.position, now.positions, now.lengths[:, None])
    if restriction.batch is not None:
        rows = torch.arange(len(here), device=here.device)
        here = here & _indexed(restriction.batch, rows, torch.full_like(rows, len(rows)))[:, None]
    if isinstance(restriction.tokens, str):
        here = here & (now.generated if restriction.tokens == "generated" else ~now.generated)
    elif restriction.tokens is not None:
        if now.ids is None:
            raise EditError("tokens= names token ids, but this run starts from embeddings: restrict by position=")
        here = here & torch.isin(now.ids.to(here.device), torch.tensor(restriction.tokens, device=here.device))
    return here


def _indexed(index: Index, places: "Int[Tensor, '...']", n: "Int[Tensor, '...']") -> "Bool[Tensor, '...']":
    """Return which places an index selects, where there are n; the two broadcast."""
    if not isinstance(index, slice):
        wanted = torch.tensor(index, device=places.device)
        return (places[..., None] == torch.where(wanted < 0, n[..., None] + wanted, wanted)).any(-1)
    start, stop, step = index.start or 0, index.stop, index.step or 1
    first = torch.clamp(n + start, min=0) if start < 0 else torch.full_like(n, start)
    chosen = (places >= first) & ((places - first) % step == 0)
    if stop is None:
        return chosen
    return chosen & (places < (n + stop if stop < 0 else stop))


def _holds(condition: Condition, natural: Mapping[str, Tensor], now: Pass) -> "Bool[Tensor, 'batch _']":
    """Return where a condition holds, (batch, position), or (batch, 1) where it is one answer a row."""
    if isinstance(condition, Not):
        return ~_holds(condition.condition, natural, now)
    if isinstance(condition, AllOf):  # or AnyOf, which is one in all but what it does here
        first, *others = (_holds(each, natural, now) for each in condition.conditions)
        for other in others:
            first = first | other if isinstance(condition, AnyOf) else first & other
        return first
    assert isinstance(condition, Active)
    if condition.label not in natural:
        raise EditError(f"{condition!r}: no activations of layer {show_label(condition.label)} are known at this point")
    on = natural[condition.label].to(now.kept.device)[..., condition.feature] > condition.above
    if condition.position == "same":
        return on
    asked = now.kept
    if isinstance(condition.position, int):
        place = torch.where(now.lengths + condition.position < 0, -1, now.lengths + condition.position)
        place = place if condition.position < 0 else torch.full_like(place, condition.position)
        asked = asked & (now.positions == place[:, None])
        gone = (place >= 0) & (place < now.lengths) & ~asked.any(1)
        if detect_fake_mode() is None and bool(gone.any()):
            raise EditError(
                f"{condition!r} asks for a position that was run in an earlier pass, whose activations are gone: in "
                "generation restrict the edit by tokens='prompt', or let the condition look at position='same'"
            )
    return (on & asked).any(1, keepdim=True)
