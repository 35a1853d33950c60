"""What every edit is: a value with parts, restrictions, a check and data; and how edits are restricted and joined."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from clt_plugin.adapters._pass import Pass
from clt_plugin.adapters._run import group_labels, turn
from clt_plugin.core.crosscoder import Crosscoder
from clt_plugin.core.wiring import Site, Wiring
from clt_plugin.interventions._apply import edit_activations
from clt_plugin.interventions._places import (
    Condition,
    EditError,
    Restriction,
    as_ints,
    check_index,
    condition_from_dict,
    index_from_data,
    label_order,
    show_label,
    show_several,
)
from clt_plugin.interventions.hooks import FwdHook, apply, fwd_hooks


@dataclass(frozen=True)
class Fingerprint:
    """Which crosscoder an edit was saved for.

    Attributes:
        wiring: The name of its wiring.
        group_sizes: The number of latents of every group.
        source: Where it was loaded from, if that is known.
    """

    wiring: str
    group_sizes: tuple[int, ...]
    source: str | None = None

    @classmethod
    def of(cls, crosscoder: Crosscoder) -> Fingerprint:
        """Take a crosscoder's."""
        source = crosscoder.metadata.get("source")
        return cls(crosscoder.wiring.name, tuple(crosscoder.group_sizes), None if source is None else str(source))

    def fits(self, other: Fingerprint) -> bool:
        """Whether both may be of one crosscoder: a source counts where both have one."""
        same = (self.wiring, self.group_sizes) == (other.wiring, other.group_sizes)
        return same and (None in (self.source, other.source) or self.source == other.source)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        sizes = list(self.group_sizes)
        return {"wiring": self.wiring, "n_groups": len(sizes), "group_sizes": sizes, "source": self.source}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Fingerprint:
        """Rebuild it from `to_dict`'s data."""
        return cls(str(data["wiring"]), as_ints("a group's size", data["group_sizes"]), data.get("source"))

    def __str__(self) -> str:
        source = "" if self.source is None else f" from {self.source}"
        sizes = list(dict.fromkeys(self.group_sizes))
        return f"{self.wiring}{source} ({len(self.group_sizes)} groups of {show_several(sizes)} latents)"


# ---------------------------------------------------------------- all edits


class Edit:
    """Something done to a run: a value that says what, where, and nothing of any model.

    `Primitive` edits do one thing; `Only` and `Chain` hold others.
    """

    def parts(self) -> Iterator[Part]:
        """Go through the primitive edits, in order, each with all the restrictions it stands under."""
        raise NotImplementedError

    def layers(self) -> tuple[str, ...]:
        """Return the labels of the groups whose features are edited, in order."""
        return tuple(sorted({label for part in self.parts() for label in part.labels()}, key=label_order))

    def check(self, crosscoder: Crosscoder | None, shape: tuple[int, int] | None = None) -> None:
        """Raise `EditError` where the edit does not fit; nothing has run then.

        Args:
            crosscoder: What is to be edited; None where no part needs a crosscoder.
            shape: (batch, position) of the run, padding included, where known; in generation all positions to come.
        """
        for part in self.parts():
            part.check(crosscoder, shape)

    def activations(self, label: str, acts: Tensor, natural: Mapping[str, Tensor], now: Pass) -> Tensor:
        """Return a group's activations, edited; the same tensor where nothing is.

        Args:
            label: The group's label.
            acts: Its activations, (batch, position, F).
            natural: Unedited activations, by label, of the groups in `watched`, as far as they are known.
            now: The tokens of this pass.
        """
        return edit_activations(self.parts(), label, acts, natural, now)

    def watched(self) -> frozenset[str]:
        """Return the labels of the groups whose natural activations conditions look at."""
        conditions = (condition for part in self.parts() for condition in part.conditions())
        return frozenset(leaf.label for condition in conditions for leaf in condition.leaves())

    def dropped(self, wiring: Wiring) -> frozenset[tuple[int, Site]]:
        """Return which groups' writes to which sites are left out: those that not every part keeps."""
        primitives = [part.edit for part in self.parts()]
        return frozenset(
            (group, site)
            for group, (home, sites) in enumerate(zip(wiring.home, wiring.writes, strict=True))
            for site in sites
            if not all(primitive.keeps(home, site.layer) for primitive in primitives)
        )

    def fwd_hooks(self, bridge: Any, name: str = "clt") -> list[FwdHook]:
        """Return the edit as hooks for TransformerLens: ``run_with_hooks(prompt, fwd_hooks=edit.fwd_hooks(bridge))``.

        They are plain functions, and stand in one list with the user's own; hooks act in the order of the list.
        Conditions look at activations as hooks of edits first meet them.

        Args:
            bridge: A TransformerBridge.
            name: The name under which the crosscoder is attached to it.

        Returns:
            (hook name, function) pairs, which hold as long as that crosscoder is attached.

        Raises:
            EditError: The edit does not fit the crosscoder, or is of more than activations: writes, handoffs.
            AttachError: No crosscoder is attached so, or only to observe.
        """
        return fwd_hooks(self, bridge, name)

    def apply(self, model: Any, name: str = "clt") -> None:
        """Act in the body of an nnsight trace, invoke or generation step, on the features of the crosscoder there.

        It reads the pass's inputs and then the features concerned, in the order of the forward pass; what the body
        reads before and after follows nnsight's rules for that order.

        Args:
            model: The nnsight model, whose trace it is.
            name: The name under which the crosscoder is attached to it, before the trace or in the body's first line.

        Raises:
            EditError: The edit does not fit the crosscoder, or is of more than activations: writes, handoffs.
            AttachError: No crosscoder is attached so, or only to observe.
        """
        apply(self, model, name)

    def to_dict(self, clt: Crosscoder | None = None) -> dict[str, Any]:
        """Return the edit as plain data.

        Args:
            clt: The crosscoder it is for, whose fingerprint is stored: used with another one, the edit is refused.
        """
        marks = [part.edit.made_for for part in self.parts() if part.edit.made_for is not None]
        if clt is not None:
            self.check(clt)
            marks = [Fingerprint.of(clt)]
        if len(set(marks)) > 1:
            raise EditError(f"these edits were saved for different crosscoders: {marks[0]}, and {marks[1]}")
        return self.data() | ({"clt": marks[0].to_dict()} if marks else {})

    def to_json(self, path: str | Path | None = None, clt: Crosscoder | None = None) -> str:
        """Return the edit as JSON, and write it to a file where one is given; see `to_dict` for ``clt``."""
        text = json.dumps(self.to_dict(clt), indent=2)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def data(self) -> dict[str, Any]:
        """Return what it does as plain data, without a fingerprint."""
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        return self.data() == other.data() if isinstance(other, Edit) else NotImplemented

    def __hash__(self) -> int:
        # Not by strength: a tensor's may change.
        return hash((type(self).__name__, self.layers()))


@dataclass(frozen=True, eq=False)
class Primitive(Edit):
    """An edit that does one thing. Another kind is a subclass, listed in `KINDS`.

    Attributes:
        made_for: The crosscoder it was saved for, if one was given.
    """

    made_for: Fingerprint | None = field(default=None, kw_only=True)

    kind: ClassVar[str] = ""
    restricted_by: ClassVar[tuple[str, ...]] = ("layer", "position", "batch", "tokens", "where")
    """What `only` may restrict it by."""
    needs_active: ClassVar[bool] = False
    """Whether it does nothing to a feature that is inactive."""

    def parts(self) -> Iterator[Part]:
        """Return itself, unrestricted."""
        yield Part(self)

    def targets(self) -> Mapping[str, tuple[int, ...]]:
        """Return the features that are edited, by the label of their group."""
        return {}

    def at(self, label: str) -> tuple[tuple[int, ...], Mapping[str, Any]]:
        """Return the features that are edited in one group, and each strength for them, by name."""
        return (), {}

    def edited(self, x: Tensor, **strengths: Any) -> Tensor:
        """Return new activations, or one value for all: x is (batch, position, n_features), strengths go by name."""
        return x

    def keeps(self, source: int, target: int) -> bool:
        """Whether writes from one layer to another are kept."""
        return True

    @property
    def needs_crosscoder(self) -> bool:
        """Whether it is about a crosscoder, not the model alone."""
        return True

    def check_against(self, crosscoder: Crosscoder) -> None:
        """Raise `EditError` where it does not fit a crosscoder."""

    def check_model(
        self, n_layers: int, d_model: int, crosscoder: Crosscoder | None = None, post_norm: str | None = None
    ) -> None:
        """Raise `EditError` where it does not fit a model, with a crosscoder in it, and a norm after its MLPs."""

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Primitive:
        """Rebuild it from `data`'s result."""
        raise NotImplementedError


@dataclass(frozen=True)
class Part:
    """A primitive edit and the restrictions it stands under, all of which must be met.

    Attributes:
        edit: The primitive edit.
        within: What each `only` around it says.
    """

    edit: Primitive
    within: tuple[Restriction, ...] = ()

    def labels(self) -> tuple[str, ...]:
        """Return the labels of the groups whose features are edited."""
        kept = [r.layer for r in self.within if r.layer is not None]
        return tuple(label for label in self.edit.targets() if all(label in layers for layers in kept))

    def conditions(self) -> list[Condition]:
        """Return the conditions."""
        return [r.where for r in self.within if r.where is not None]

    def check(self, crosscoder: Crosscoder | None, shape: tuple[int, int] | None = None) -> None:
        """Raise `EditError` where it does not fit a crosscoder, or a run of this shape."""
        if crosscoder is not None:
            self._check_features(crosscoder)
        elif self.edit.needs_crosscoder or self.conditions():
            raise EditError(f"{self!r} is about features: it needs a crosscoder")
        if shape is not None:
            self.check_places(shape)

    def check_places(self, shape: tuple[int, int]) -> None:
        """Raise `EditError` where it names rows or positions that a run of this shape lacks."""
        for r in self.within:
            if r.position is not None:
                check_index("position", r.position, shape[1])
            if r.batch is not None:
                check_index("batch", r.batch, shape[0])
            for leaf in () if r.where is None else r.where.leaves():
                if isinstance(leaf.position, int):
                    check_index("a condition's position", (leaf.position,), shape[1])

    def _check_features(self, crosscoder: Crosscoder) -> None:
        mark, present = self.edit.made_for, Fingerprint.of(crosscoder)
        if mark is not None and crosscoder.is_partial:
            raise EditError(
                f"this edit was saved for another crosscoder, {mark}, where this is a selection, whose features may be "
                "numbered otherwise: use it with the whole, or make the edit anew"
            )
        if mark is not None and not mark.fits(present):
            raise EditError(
                f"this edit was saved for another crosscoder, {mark}, where this is {present}: features of one mean "
                "nothing in the other. Load that one, or make the edit anew"
            )
        self.edit.check_against(crosscoder)
        for leaf in (leaf for condition in self.conditions() for leaf in condition.leaves()):
            check_features(crosscoder, leaf.label, (leaf.feature,))
            late = [label for label in self.labels() if _turn(crosscoder, label) < _turn(crosscoder, leaf.label)]
            if late:
                raise _too_late(leaf, late[0])

    def __repr__(self) -> str:
        shown = repr(self.edit)
        for restriction in self.within:
            shown = _show_only(shown, restriction)
        return shown


def check_features(crosscoder: Crosscoder, label: str, features: Iterable[int]) -> None:
    """Raise `EditError` where a crosscoder lacks a group or one of its features."""
    labels = group_labels(crosscoder.wiring)
    if label not in labels:
        raise EditError(
            f"this crosscoder has no features at layer {show_label(label)}: it has them at "
            f"{', '.join(map(show_label, labels))}"
        )
    size = crosscoder.group_sizes[labels.index(label)]
    if beyond := [feature for feature in features if feature >= size]:
        raise EditError(f"layer {show_label(label)} has features 0 to {size - 1}: there is no feature {beyond[0]}")


def _turn(crosscoder: Crosscoder, label: str) -> tuple[int, int, int]:
    return turn(crosscoder.wiring, group_labels(crosscoder.wiring).index(label))


def _too_late(leaf: Any, label: str) -> EditError:
    return EditError(
        f"{leaf!r} is known only after the edit at layer {show_label(label)}: a condition looks at the edit's own "
        "layer or an earlier one"
    )


# ---------------------------------------------------------------- only and chain


@dataclass(frozen=True, eq=False, repr=False)
class Only(Edit):
    """An edit restricted; see `only`."""

    edit: Edit
    within: Restriction

    def parts(self) -> Iterator[Part]:
        """Go through the primitive edits, in order, each with all the restrictions it stands under."""
        for part in self.edit.parts():
            yield replace(part, within=(*part.within, self.within))

    def data(self) -> dict[str, Any]:
        """Return what it does as plain data."""
        return {"edit": "only", "of": self.edit.data(), **self.within.to_dict()}

    def __repr__(self) -> str:
        return _show_only(repr(self.edit), self.within)


def _show_only(shown: str, within: Restriction) -> str:
    return f"only({', '.join([shown, *(f'{name}={value}' for name, value in within.arguments().items())])})"


def only(
    edit: Edit,
    layer: Any = None,
    position: Any = None,
    batch: Any = None,
    tokens: Any = None,
    where: Condition | None = None,
) -> Edit:
    """Restrict an edit: it acts where all that is given holds. Padding is never edited.

    Args:
        edit: What to restrict, a chain too. Within another `only`, both hold.
        layer: The layers whose features are still edited, one or several.
        position: Positions of each row, one or several, a range or a slice. They count the row's real tokens from 0,
            padding left out, and go on counting in generation; negative ones count from the row's end so far.
        batch: Rows of the batch, given in the same ways.
        tokens: ``"prompt"`` or ``"generated"``; or ids, one or several: the edit acts at positions that hold one.
            What is generated is told by the model's cache: where it is switched off, as by TransformerLens's
            ``use_past_kv_cache=False``, every pass looks like a prompt, and ``"generated"`` never acts.
        where: A condition on natural activations, made by `active`, `inactive`, `all_of`, `any_of` or `not_`.
    """
    _check_edits("only", (edit,))
    within = Restriction.of(layer, position, batch, tokens, where)
    restricted = Only(edit, within)
    for part in restricted.parts():
        refused = [name for name in within.arguments() if name not in part.edit.restricted_by]
        if refused:
            raise EditError(f"{part.edit!r} cannot be restricted by {', '.join(refused)}")
        for leaf in () if where is None else where.leaves():
            late = [label for label in part.labels() if label_order(label)[0] < label_order(leaf.label)[0]]
            if late:
                raise _too_late(leaf, late[0])
    if layer is not None and not restricted.layers():
        found = ", ".join(map(show_label, edit.layers())) or "none"
        raise EditError(f"nothing is left to edit in {within.arguments()['layer']}: the edit's layers are {found}")
    return restricted if within.arguments() else edit


@dataclass(frozen=True, eq=False, repr=False)
class Chain(Edit):
    """Edits one after another; see `chain`."""

    edits: tuple[Edit, ...]

    def parts(self) -> Iterator[Part]:
        """Go through the primitive edits, in order, each with all the restrictions it stands under."""
        for edit in self.edits:
            yield from edit.parts()

    def data(self) -> dict[str, Any]:
        """Return what it does as plain data."""
        return {"edit": "chain", "edits": [edit.data() for edit in self.edits]}

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.edits))})"


def chain(*edits: Edit) -> Edit:
    """Join edits: each acts on what those before it left.

    Two that can hit the same feature at the same place are warned of, since then their order matters.
    """
    _check_edits("chain", edits)
    _warn_of_collisions(edits)
    return _joined(edits)


def _joined(edits: Iterable[Edit]) -> Edit:
    flat = tuple(inner for edit in edits for inner in (edit.edits if isinstance(edit, Chain) else (edit,)))
    return flat[0] if len(flat) == 1 else Chain(flat)


def _check_edits(name: str, edits: Iterable[Any]) -> None:
    for edit in edits:
        if not isinstance(edit, Edit):
            raise EditError(f"{name} takes edits such as scale(layer=3, feature=811, by=2.0), not {edit!r}")


def _warn_of_collisions(edits: Sequence[Edit]) -> None:
    """Warn of pairs from different edits, and refuse handoffs that clash; one edit's own were seen when it was made."""
    parts = [(number, part) for number, edit in enumerate(edits) for part in edit.parts()]
    handoffs = [(number, part) for number, part in parts if part.edit.kind == "ablate_handoff"]
    for (one, before), (other, after) in combinations(handoffs, 2):
        handoff: Any = before.edit
        if one != other and (why := handoff.clash(after.edit)) and not _apart(before, after):
            raise EditError(f"{before!r} and {after!r} {why}")
    hits: dict[tuple[str, int], list[int]] = {}
    for index, (_, part) in enumerate(parts):
        for label in part.labels():
            for feature in part.edit.targets()[label]:
                hits.setdefault((label, feature), []).append(index)
    # Each pair once, whatever the number of features they share.
    pairs = {pair: place for place, several in hits.items() for pair in combinations(several, 2)}
    for (first, second), (label, feature) in sorted(pairs.items()):
        (one, before), (other, after) = parts[first], parts[second]
        if one != other and not _apart(before, after):
            warnings.warn(
                f"{before!r} and {after!r} can both hit feature {feature} of layer {show_label(label)}: the second "
                "acts on what the first left",
                UserWarning,
                stacklevel=3,
            )


def _apart(one: Part, other: Part) -> bool:
    return any(a.apart(b) for a in one.within for b in other.within)


# ---------------------------------------------------------------- JSON

KINDS: dict[str, type[Primitive]] = {}
"""The primitive edits by the name that data gives them; each kind adds itself."""


def from_dict(data: Mapping[str, Any]) -> Edit:
    """Rebuild an edit from `Edit.to_dict`'s data."""
    try:
        mark = data.get("clt")
        return _built(data, None if mark is None else Fingerprint.from_dict(mark))
    except EditError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise EditError(f"not the description of an edit: {type(error).__name__}: {error}") from error


def from_json(source: str | Path) -> Edit:
    """Rebuild an edit from JSON, or from a file that holds it."""
    is_text = isinstance(source, str) and source.lstrip().startswith("{")
    text = str(source) if is_text else Path(source).read_text(encoding="utf-8")
    try:
        data = json.loads(text)
    except ValueError as error:
        raise EditError(f"not the JSON of an edit: {error}") from error
    return from_dict(data)


def _built(data: Mapping[str, Any], mark: Fingerprint | None) -> Edit:
    content = {key: value for key, value in data.items() if key != "clt"}
    kind = content["edit"]
    if kind == "chain":
        return _joined([_built(each, mark) for each in content["edits"]])
    if kind == "only":
        for name in ("position", "batch"):
            content[name] = index_from_data(content.get(name))
        where = content.get("where")
        content["where"] = None if where is None else condition_from_dict(where)
        inner = _built(content["of"], mark)
        return only(inner, **{key: value for key, value in content.items() if key not in ("edit", "of")})
    if kind not in KINDS:
        raise EditError(f"no edit is called {kind!r}: there are {', '.join(sorted([*KINDS, 'chain', 'only']))}")
    return replace(KINDS[kind].from_data(content), made_for=mark)
