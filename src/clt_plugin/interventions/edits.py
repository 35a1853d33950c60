"""Edits as pure values: what is done to which features, where.

An edit is made by a function named after what it does, restricted by `only` and joined by `chain`:

    >>> chain(scale(layer=3, feature=811, by=2.0), only(ablate(layer=5, feature=42), position=slice(4, None)))
    chain(scale(layer=3, feature=811, by=2.0), only(ablate(layer=5, feature=42), position=slice(4, None)))

It holds no model and no weights. Two edits are equal if they do the same; every edit is shown as the code that makes
it, and goes to JSON and back. What an edit does to activations is in `_apply`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from clt_plugin.core.crosscoder import Crosscoder
from clt_plugin.interventions._edit import (
    KINDS,
    Chain,
    Edit,
    Fingerprint,
    Only,
    Part,
    Primitive,
    chain,
    check_features,
    from_dict,
    from_json,
    only,
)
from clt_plugin.interventions._places import (
    Condition,
    EditError,
    Restriction,
    active,
    all_of,
    any_of,
    as_feature,
    as_ints,
    as_label,
    as_number,
    inactive,
    not_,
    show_label,
    show_several,
)

__all__ = [
    "Ablate",
    "Add",
    "Chain",
    "Clamp",
    "Condition",
    "Edit",
    "EditError",
    "FeatureEdit",
    "Fingerprint",
    "Only",
    "Part",
    "Primitive",
    "Restriction",
    "Scale",
    "SetValue",
    "Supernode",
    "ablate",
    "active",
    "add",
    "all_of",
    "any_of",
    "chain",
    "clamp",
    "from_dict",
    "from_json",
    "inactive",
    "not_",
    "only",
    "scale",
    "set_value",
    "supernode",
]

Strength = float | tuple[float, ...] | Tensor
"""One number for all features of an edit, or one a feature; a tensor may require a gradient."""


@dataclass(frozen=True, repr=False)
class Supernode:
    """Features that are edited together.

    Attributes:
        name: What they are called; None for features without a name.
        members: (label, features) for every layer, in the order in which strengths are given.
    """

    name: str | None
    members: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, name: str | None, features: Any) -> Supernode:
        """Gather {layer: features}."""
        if not isinstance(features, Mapping) or not features:
            raise EditError(f"features are given by layer, such as {{3: [811, 42]}}, not as {features!r}")
        members: dict[str, tuple[int, ...]] = {}
        for layer, several in features.items():
            label, chosen = as_label(layer), as_ints("a feature", several)
            if label in members or len(set(chosen)) < len(chosen):
                raise EditError(f"layer {show_label(label)} or one of its features is given twice")
            members[label] = tuple(as_feature(feature) for feature in chosen)
        return cls(name, tuple(members.items()))

    @property
    def features(self) -> dict[str, tuple[int, ...]]:
        """The features of each layer, by label."""
        return dict(self.members)

    def __len__(self) -> int:
        """Return the number of features over all layers."""
        return sum(len(features) for _, features in self.members)

    def __repr__(self) -> str:
        shown = ", ".join(f"{show_label(label)}: {list(features)}" for label, features in self.members)
        return f"{{{shown}}}" if self.name is None else f"supernode({self.name!r}, {{{shown}}})"

    def arguments(self) -> str:
        """Return it as the arguments of an edit."""
        if self.name is not None or len(self.members) > 1:
            return f"group={self!r}"
        ((label, features),) = self.members
        return f"layer={show_label(label)}, feature={show_several(features)}"


def supernode(name: str, features: Mapping[int | str, int | Sequence[int]]) -> Supernode:
    """Name a group of features, to edit them as one.

    Args:
        name: What it is called.
        features: {layer: feature or features}.

    >>> scale(group=supernode("Texas", {3: [811, 42], 5: 7}), by=0.0)
    scale(group=supernode('Texas', {3: [811, 42], 5: [7]}), by=0.0)
    """
    return Supernode.of(name, features)


@dataclass(frozen=True, eq=False, repr=False)
class FeatureEdit(Primitive):
    """An edit of features' activations; a subclass for each operation, whose other fields are its strengths."""

    group: Supernode

    strengths: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in self.strengths:
            object.__setattr__(self, name, self._strength(name, getattr(self, name)))

    def _strength(self, name: str, value: Any) -> Strength | None:
        if value is None and self.optional:
            return None
        if isinstance(value, Tensor):
            if value.ndim > 1 or value.dtype == torch.bool or value.is_complex():
                raise EditError(f"{name} is a number, or one a feature, not a tensor of shape {tuple(value.shape)}")
            if not value.is_meta and detect_fake_mode() is None and not bool(value.detach().isfinite().all()):
                raise EditError(f"{name} is {_show_strength(value)}: strengths are finite numbers")
            several: Any = value
        elif isinstance(value, Iterable) and not isinstance(value, str) and getattr(value, "ndim", None) != 0:
            several = tuple(as_number(name, each) for each in value)
        else:
            return as_number(name, value)
        if isinstance(several, Tensor) and several.ndim == 0:
            return several
        if len(several) != len(self.group):
            raise EditError(f"{name} has {len(several)} numbers for {len(self.group)} features: give one, or one each")
        return several

    def targets(self) -> Mapping[str, tuple[int, ...]]:
        """Return the features that are edited, by the label of their group."""
        return self.group.features

    def at(self, label: str) -> tuple[tuple[int, ...], dict[str, Strength | None]]:
        """Return the features edited in one group, and each strength for them."""
        start = 0
        for each, features in self.group.members:
            if each == label:
                break
            start += len(features)
        else:
            return (), {}
        stop, shares = start + len(features), {}
        for name in self.strengths:
            value = getattr(self, name)
            several = isinstance(value, tuple) or (isinstance(value, Tensor) and value.ndim == 1)
            shares[name] = value[start:stop] if several else value
        return features, shares

    def check_against(self, crosscoder: Crosscoder) -> None:
        """Raise `EditError` where a feature is not the crosscoder's, or a strength is no longer finite."""
        for label, features in self.group.members:
            check_features(crosscoder, label, features)
        self.__post_init__()  # a tensor's numbers may have changed since

    def data(self) -> dict[str, Any]:
        """Return what it does as plain data."""
        features = {label: list(features) for label, features in self.group.members}
        data: dict[str, Any] = {"edit": self.kind, "features": features}
        if self.group.name is not None:
            data["name"] = self.group.name
        for name in self.strengths:
            value = getattr(self, name)
            if value is not None:
                data[name] = _numbers(value)
        return data

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> FeatureEdit:
        """Rebuild it from `data`'s result."""
        strengths = {key: value for key, value in data.items() if key not in ("edit", "features", "name")}
        return cls(Supernode.of(data.get("name"), data["features"]), **strengths)

    def __repr__(self) -> str:
        values = {name: getattr(self, name) for name in self.strengths}
        shown = [f"{name}={_show_strength(value)}" for name, value in values.items() if value is not None]
        return f"{self.kind}({', '.join([self.group.arguments(), *shown])})"


def _numbers(value: Strength) -> Any:
    numbers = value.tolist() if isinstance(value, Tensor) else list(value) if isinstance(value, tuple) else value
    return numbers[0] if isinstance(numbers, list) and len(numbers) == 1 else numbers


def _show_strength(value: Strength) -> str:
    if not isinstance(value, Tensor):
        return str(_numbers(value))
    grad = ", requires_grad=True" if value.requires_grad else ""
    return f"tensor({value.tolist()}{grad})"


@dataclass(frozen=True, eq=False, repr=False)
class SetValue(FeatureEdit):
    """Features take a value; see `set_value`."""

    value: Strength
    kind, strengths = "set_value", ("value",)

    def edited(self, x: Tensor, **strengths: Any) -> Tensor:
        """Return the value."""
        return strengths["value"]


@dataclass(frozen=True, eq=False, repr=False)
class Add(FeatureEdit):
    """A value is added to features; see `add`."""

    value: Strength
    kind, strengths = "add", ("value",)

    def edited(self, x: Tensor, **strengths: Any) -> Tensor:
        """Add the value."""
        return x + strengths["value"]


@dataclass(frozen=True, eq=False, repr=False)
class Scale(FeatureEdit):
    """Features are multiplied; see `scale`."""

    by: Strength
    kind, strengths, needs_active = "scale", ("by",), True

    def edited(self, x: Tensor, **strengths: Any) -> Tensor:
        """Multiply."""
        return x * strengths["by"]


@dataclass(frozen=True, eq=False, repr=False)
class Ablate(FeatureEdit):
    """Features take their mean, or 0; see `ablate`."""

    mean: Strength | None = None
    kind, strengths, optional = "ablate", ("mean",), True

    def edited(self, x: Tensor, **strengths: Any) -> Tensor:
        """Return the mean."""
        return torch.zeros_like(x) if strengths["mean"] is None else strengths["mean"]


@dataclass(frozen=True, eq=False, repr=False)
class Clamp(FeatureEdit):
    """Features are kept within bounds; see `clamp`."""

    min: Strength | None = None
    max: Strength | None = None
    kind, strengths, optional = "clamp", ("min", "max"), True

    def __post_init__(self) -> None:
        """Check that there is room between the bounds."""
        FeatureEdit.__post_init__(self)
        if self.min is None and self.max is None:
            raise EditError("clamp needs min, max or both")
        if self.min is None or self.max is None or detect_fake_mode() is not None:
            return
        low, high = torch.as_tensor(_numbers(self.min)), torch.as_tensor(_numbers(self.max))
        if bool((low > high).any()):
            raise EditError(f"clamp's min {_show_strength(self.min)} exceeds its max {_show_strength(self.max)}")

    def edited(self, x: Tensor, **strengths: Any) -> Tensor:
        """Put what lies beyond a bound onto it."""
        # Not clamp: where a bound is met exactly, the gradient is the activation's, and none of it the bound's.
        if strengths["min"] is not None:
            x = torch.where(x < strengths["min"], strengths["min"], x)
        if strengths["max"] is not None:
            x = torch.where(x > strengths["max"], strengths["max"], x)
        return x


KINDS.update({cls.kind: cls for cls in (SetValue, Add, Scale, Ablate, Clamp)})


def _group(layer: Any, feature: Any, group: Any) -> Supernode:
    if group is None and layer is not None and feature is not None:
        return Supernode.of(None, {layer: feature})
    if group is None or layer is not None or feature is not None:
        raise EditError("say which features: layer= and feature=, or group=")
    return group if isinstance(group, Supernode) else Supernode.of(None, group)


Layer = int | str
Features = int | Sequence[int]
Group = Supernode | Mapping[Layer, Features]


def set_value(
    layer: Layer | None = None, feature: Features | None = None, *, value: Any, group: Group | None = None
) -> SetValue:
    """Set features to a value.

    Args:
        layer: The layer in which the features live, where there is no group.
        feature: One feature or several of it.
        value: What they are set to: a number, or one a feature, in the group's order; a tensor (of no or one axis)
            may require a gradient. As in all edits.
        group: A `supernode`, or {layer: features}, instead of layer and feature.

    >>> set_value(layer=3, feature=[811, 42], value=1.5)
    set_value(layer=3, feature=[811, 42], value=1.5)
    """
    return SetValue(_group(layer, feature, group), value)


def add(layer: Layer | None = None, feature: Features | None = None, *, value: Any, group: Group | None = None) -> Add:
    """Add a value to features; arguments as for `set_value`."""
    return Add(_group(layer, feature, group), value)


def scale(layer: Layer | None = None, feature: Features | None = None, *, by: Any, group: Group | None = None) -> Scale:
    """Multiply features; arguments as for `set_value`. A feature that is inactive stays so, which warns when it acts.

    >>> scale(layer=3, feature=811, by=2.0)
    scale(layer=3, feature=811, by=2.0)
    """
    return Scale(_group(layer, feature, group), by)


def ablate(
    layer: Layer | None = None, feature: Features | None = None, *, mean: Any = None, group: Group | None = None
) -> Ablate:
    """Set features to 0, or to their mean where it is given; other arguments as for `set_value`."""
    return Ablate(_group(layer, feature, group), mean)


def clamp(
    layer: Layer | None = None,
    feature: Features | None = None,
    *,
    min: Any = None,
    max: Any = None,
    group: Group | None = None,
) -> Clamp:
    """Keep features at or above ``min`` and at or below ``max``; other arguments as for `set_value`."""
    return Clamp(_group(layer, feature, group), min, max)
