"""Where edits act: layers, positions, rows, tokens and conditions, as plain data.

A group of latents goes by its *label*: the layer it is at home in, as a string, ``"3"``; where several groups are at
home in one layer, the later ones are ``"3_1"``, ``"3_2"`` and so on.
"""

from __future__ import annotations

import math
import operator
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


class EditError(ValueError):
    """An edit that cannot be, or that does not fit the crosscoder or the prompt."""


# ---------------------------------------------------------------- numbers, labels, indices


def as_int(what: str, value: Any) -> int:
    """Return a whole number; ``what`` names it in the error."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise EditError(f"{what} is a whole number, not {value!r}")


def as_ints(what: str, value: Any) -> tuple[int, ...]:
    """Return one whole number or several, as a tuple."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    several = isinstance(value, Iterable) and not isinstance(value, str)
    values = tuple(as_int(what, each) for each in (value if several else (value,)))
    if not values:
        raise EditError(f"{what} is a whole number or several: none were given")
    return values


def as_label(layer: Any) -> str:
    """Return the label of the group at home in a layer."""
    if isinstance(layer, str):
        if re.fullmatch(r"(0|[1-9]\d*)(_[1-9]\d*)?", layer):
            return layer
        raise EditError(f"a layer is a number such as 3, or a group's label such as '3_1', not {layer!r}")
    number = as_int("a layer", layer)
    if number < 0:
        raise EditError(f"layers count from 0: there is no layer {number}")
    return str(number)


def as_labels(layer: Any) -> tuple[str, ...]:
    """Return the labels of one layer or several, in order."""
    several = isinstance(layer, Iterable) and not isinstance(layer, str)
    labels = {as_label(each) for each in (layer if several else (layer,))}
    if not labels:
        raise EditError("layer is a layer or several: none were given")
    return tuple(sorted(labels, key=label_order))


def as_feature(value: Any) -> int:
    """Return the index of a feature."""
    feature = as_int("a feature", value)
    if feature < 0:
        raise EditError(f"features count from 0: there is no feature {feature}")
    return feature


def label_order(label: str) -> tuple[int, ...]:
    """Return what labels are sorted by: the layer, then the number within it."""
    return tuple(int(part) for part in label.split("_"))


def show_label(label: str) -> str:
    """Return a label as it is typed: a number where it is one."""
    return repr(label) if "_" in label else label


def show_several(values: Iterable[Any]) -> str:
    """Return one value, or several as a list."""
    shown = [str(value) for value in values]
    return shown[0] if len(shown) == 1 else f"[{', '.join(shown)}]"


Index = tuple[int, ...] | slice
"""Several indices, sorted, or a slice; negative ones count from the end, as in Python."""


def as_index(what: str, value: Any) -> Index:
    """Return an index, several, or a slice that goes forward."""
    if not isinstance(value, slice):
        return tuple(sorted(set(as_ints(what, value))))
    bounds = {name: getattr(value, name) for name in ("start", "stop", "step")}
    start, stop, step = (None if v is None else as_int(f"{what}'s {name}", v) for name, v in bounds.items())
    if step is not None and step < 1:
        raise EditError(f"{what} is a set, which has no direction: a slice's step is at least 1, not {step}")
    if stop is not None and (start or 0) >= stop and ((start or 0) < 0) == (stop < 0):
        raise EditError(f"{what}={show_index(value)} selects nothing")
    return slice(start, stop, step)


def show_index(index: Index) -> str:
    """Return an index as it is typed."""
    if isinstance(index, slice):
        bounds = (index.start, index.stop) if index.step is None else (index.start, index.stop, index.step)
        return f"slice({', '.join(map(str, bounds))})"
    return show_several(index)


def index_data(index: Index) -> Any:
    """Return an index as plain data."""
    return {"slice": [index.start, index.stop, index.step]} if isinstance(index, slice) else list(index)


def index_from_data(data: Any) -> Any:
    """Return what `index_data` was given."""
    return slice(*data["slice"]) if isinstance(data, Mapping) else data


def check_index(what: str, index: Index, n: int) -> None:
    """Raise where an index lies beyond n, or a slice selects nothing of them."""
    if isinstance(index, slice):
        if not range(*index.indices(n)):
            raise EditError(f"{what}={show_index(index)} selects none of the {n} there are")
    elif beyond := [i for i in index if not -n <= i < n]:
        raise EditError(f"{what} {beyond[0]} is beyond the {n} there are: give {-n} to {n - 1}")


def indices_apart(a: Index, b: Index) -> bool:
    """Whether two indices can have nothing in common, whatever they are applied to."""
    if isinstance(a, slice) and isinstance(b, slice):
        if _from_end(a) or _from_end(b):
            return False
        one, other = _span(a), _span(b)
        first = max(one.start, other.start)
        # What is common comes back after this many places.
        last = min(one.stop, other.stop, first + math.lcm(one.step, other.step))
        return not any(i in one and i in other for i in range(first, last))
    if isinstance(a, slice):
        return indices_apart(b, a)
    if isinstance(b, slice):
        return not _from_end(a) and not _from_end(b) and not any(i in _span(b) for i in a)
    # 3 and -1 are the same place in a row of four.
    return len({i < 0 for i in (*a, *b)}) == 1 and not set(a) & set(b)


def _from_end(index: Index) -> bool:
    """Whether any of an index counts from the end."""
    bounds = (index.start, index.stop) if isinstance(index, slice) else index
    return any(bound is not None and bound < 0 for bound in bounds)


def _span(index: slice) -> range:
    return range(index.start or 0, sys.maxsize if index.stop is None else index.stop, index.step or 1)


# ---------------------------------------------------------------- conditions


class Condition:
    """What must hold at a place for an edit to act there.

    It looks at activations before edits of their own group; those of an earlier group reach them, where features
    respond. Made by `active`, `inactive`, `all_of`, `any_of` and `not_`.
    """

    def leaves(self) -> tuple[Active, ...]:
        """Return the features it looks at."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        raise NotImplementedError


@dataclass(frozen=True, repr=False)
class Active(Condition):
    """A feature's activation lies above a value.

    Attributes:
        label: The feature's group.
        feature: Its index.
        above: The value.
        position: ``"same"``, ``"any"``, or a position of the row.
    """

    label: str
    feature: int
    above: float = 0.0
    position: str | int = "same"

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", as_label(self.label))
        object.__setattr__(self, "feature", as_feature(self.feature))
        object.__setattr__(self, "above", as_number("above", self.above))
        if self.position not in ("same", "any"):
            if isinstance(self.position, str):
                raise EditError(f"a condition's position is 'same', 'any' or a number, not {self.position!r}")
            object.__setattr__(self, "position", as_int("a condition's position", self.position))

    def leaves(self) -> tuple[Active, ...]:
        """Return the features it looks at."""
        return (self,)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        fields = {"layer": self.label, "feature": self.feature, "above": self.above, "position": self.position}
        return {"active": fields}

    def __repr__(self) -> str:
        above = f", above={self.above}" if self.above else ""
        position = "" if self.position == "same" else f", position={self.position!r}"
        return f"active(layer={show_label(self.label)}, feature={self.feature}{above}{position})"


@dataclass(frozen=True, repr=False)
class Not(Condition):
    """A condition does not hold."""

    condition: Condition

    def leaves(self) -> tuple[Active, ...]:
        """Return the features it looks at."""
        return self.condition.leaves()

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {"not": self.condition.to_dict()}

    def __repr__(self) -> str:
        return f"not_({self.condition!r})"


@dataclass(frozen=True, repr=False)
class AllOf(Condition):
    """Several conditions all hold."""

    conditions: tuple[Condition, ...]
    word = "all"

    def leaves(self) -> tuple[Active, ...]:
        """Return the features it looks at."""
        return tuple(leaf for condition in self.conditions for leaf in condition.leaves())

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {self.word: [condition.to_dict() for condition in self.conditions]}

    def __repr__(self) -> str:
        return f"{self.word}_of({', '.join(map(repr, self.conditions))})"


@dataclass(frozen=True, repr=False)
class AnyOf(AllOf):
    """At least one of several conditions holds."""

    word = "any"


def active(layer: int | str, feature: int, above: float = 0.0, position: str | int = "same") -> Active:
    """Ask for a feature whose natural activation lies above a value.

    Args:
        layer: The feature's layer, no later than the edit's.
        feature: Its index.
        above: The value that it exceeds.
        position: Where: ``"same"``, at the edited position; ``"any"``, at any real position of the row in this pass;
            or one position of the row, from 0, or from its end where negative.
    """
    return Active(layer, feature, above, position)  # type: ignore[arg-type]


def inactive(layer: int | str, feature: int, above: float = 0.0, position: str | int = "same") -> Condition:
    """Ask for a feature whose natural activation does not lie above a value: ``not_(active(...))``."""
    return Not(active(layer, feature, above, position))


def all_of(*conditions: Condition) -> Condition:
    """Ask for conditions that all hold."""
    return AllOf(_conditions("all_of", conditions))


def any_of(*conditions: Condition) -> Condition:
    """Ask for conditions of which at least one holds."""
    return AnyOf(_conditions("any_of", conditions))


def not_(condition: Condition) -> Condition:
    """Ask for a condition not to hold."""
    _conditions("not_", (condition,))
    return condition.condition if isinstance(condition, Not) else Not(condition)


def _conditions(name: str, conditions: tuple[Any, ...]) -> tuple[Condition, ...]:
    others = [condition for condition in conditions if not isinstance(condition, Condition)]
    if others or not conditions:
        found = repr(others[0]) if others else "nothing"
        raise EditError(f"{name} takes conditions such as active(layer=3, feature=811), not {found}")
    return conditions


def condition_from_dict(data: Mapping[str, Any]) -> Condition:
    """Rebuild a condition from its data."""
    if len(data) != 1:
        raise EditError(f"not a condition: {dict(data)}")
    ((word, content),) = data.items()
    if word == "active":
        return active(**content)
    if word == "not":
        return not_(condition_from_dict(content))
    if word in ("all", "any"):
        return (all_of if word == "all" else any_of)(*(condition_from_dict(each) for each in content))
    raise EditError(f"not a condition: {dict(data)}")


def as_number(what: str, value: Any) -> float:
    """Return a finite number."""
    try:
        if not isinstance(value, bool | str) and math.isfinite(number := float(value)):
            return number
    except (TypeError, ValueError):
        pass
    raise EditError(f"{what} is a finite number, not {value!r}")


# ---------------------------------------------------------------- restrictions


@dataclass(frozen=True)
class Restriction:
    """What one `only` says; a place must meet all of it.

    Attributes:
        layer: Labels of groups.
        position: Positions of each row, padding not counted.
        batch: Rows.
        tokens: ``"prompt"``, ``"generated"``, or token ids.
        where: A condition.
    """

    layer: tuple[str, ...] | None = None
    position: Index | None = None
    batch: Index | None = None
    tokens: str | tuple[int, ...] | None = None
    where: Condition | None = None

    @classmethod
    def of(cls, layer: Any, position: Any, batch: Any, tokens: Any, where: Any) -> Restriction:
        """Read what a user typed."""
        if isinstance(tokens, str):
            if tokens not in ("prompt", "generated"):
                raise EditError(f"tokens are 'prompt', 'generated' or token ids, not {tokens!r}")
        elif tokens is not None:
            tokens = tuple(sorted(set(as_ints("a token id", tokens))))
            if tokens[0] < 0:
                raise EditError(f"token ids count from 0: there is no {tokens[0]}")
        if where is not None:
            _conditions("where", (where,))
        return cls(
            None if layer is None else as_labels(layer),
            None if position is None else as_index("position", position),
            None if batch is None else as_index("batch", batch),
            tokens,
            where,
        )

    def arguments(self) -> dict[str, str]:
        """Return what it restricts, as it is typed."""
        shown = {}
        if self.layer is not None:
            shown["layer"] = show_several(map(show_label, self.layer))
        if self.position is not None:
            shown["position"] = show_index(self.position)
        if self.batch is not None:
            shown["batch"] = show_index(self.batch)
        if self.tokens is not None:
            shown["tokens"] = repr(self.tokens) if isinstance(self.tokens, str) else show_several(self.tokens)
        if self.where is not None:
            shown["where"] = repr(self.where)
        return shown

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        tokens = list(self.tokens) if isinstance(self.tokens, tuple) else self.tokens
        data = {
            "layer": None if self.layer is None else list(self.layer),
            "position": None if self.position is None else index_data(self.position),
            "batch": None if self.batch is None else index_data(self.batch),
            "tokens": tokens,
            "where": None if self.where is None else self.where.to_dict(),
        }
        return {name: value for name, value in data.items() if value is not None}

    def apart(self, other: Restriction) -> bool:
        """Whether no place can meet both."""
        if self.position is not None and other.position is not None and indices_apart(self.position, other.position):
            return True
        if self.batch is not None and other.batch is not None and indices_apart(self.batch, other.batch):
            return True
        if isinstance(self.tokens, tuple) and isinstance(other.tokens, tuple):
            if not set(self.tokens) & set(other.tokens):
                return True
        elif isinstance(self.tokens, str) and isinstance(other.tokens, str) and self.tokens != other.tokens:
            return True
        return self.where is not None and other.where is not None and not_(self.where) == other.where
