"""Random edits for hypothesis: on features 0-4 of layers 1 and 3, in rows of up to six tokens."""

from __future__ import annotations

import warnings
from typing import Any

from hypothesis import strategies as st

from clt_plugin import interventions as iv

N_FEATURES = 5
LABELS = ("1", "3")

numbers = st.floats(-3, 3, allow_nan=False, width=32)


def quietly_chain(*edits: iv.Edit) -> iv.Edit:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return iv.chain(*edits)


@st.composite
def indices(draw: Any) -> Any:
    """An index, several, or a slice."""
    kind = draw(st.sampled_from(["one", "several", "slice"]))
    if kind == "one":
        return draw(st.integers(-7, 6))
    if kind == "several":
        return draw(st.lists(st.integers(-7, 6), min_size=1, max_size=3))
    bound = st.none() | st.integers(-7, 6)
    start, stop, step = draw(bound), draw(bound), draw(st.none() | st.integers(1, 3))
    if stop is not None and (start or 0) >= stop and ((start or 0) < 0) == (stop < 0):
        stop = None
    return slice(start, stop, step)


def conditions(latest: str = "1", positions: bool = True) -> Any:
    """A condition on layers up to the latest."""
    places = st.sampled_from(["same", "any"])
    leaf = st.builds(
        iv.active,
        st.sampled_from([label for label in LABELS if int(label) <= int(latest)]),
        st.integers(0, N_FEATURES - 1),
        above=st.sampled_from([0.0, -0.5, 1.0]),
        position=places | st.integers(-6, 5) if positions else places,
    )
    several = st.lists(leaf, min_size=1, max_size=3)
    return leaf | st.one_of(
        leaf.map(iv.not_),
        several.map(lambda each: iv.all_of(*each)),
        several.map(lambda each: iv.any_of(*each)),
        several.map(lambda each: iv.not_(iv.any_of(each[0], iv.not_(each[-1])))),
    )


@st.composite
def restrictions(draw: Any, positions: bool = True) -> dict[str, Any]:
    """The arguments of an `only`, without layer."""
    chosen = draw(st.sets(st.sampled_from(["position", "batch", "tokens", "where"]), max_size=2))
    tokens = st.sampled_from(["prompt", "generated"]) | st.lists(st.integers(0, 3), min_size=1, max_size=2)
    values = {"position": indices(), "batch": indices(), "tokens": tokens, "where": conditions(positions=positions)}
    return {name: draw(values[name]) for name in sorted(chosen)}


@st.composite
def feature_edits(draw: Any) -> iv.Edit:
    """One operation on one layer or two."""
    layers = draw(st.lists(st.sampled_from(LABELS), min_size=1, max_size=2, unique=True))
    features = st.lists(st.integers(0, N_FEATURES - 1), min_size=1, max_size=3, unique=True)
    members = {label: draw(features) for label in layers}
    n = sum(map(len, members.values()))
    group = iv.supernode("some", members) if draw(st.booleans()) else members
    strength = numbers | st.lists(numbers, min_size=n, max_size=n)
    kind = draw(st.sampled_from(["set_value", "add", "scale", "ablate", "clamp"]))
    if kind == "scale":
        return iv.scale(group=group, by=draw(strength))
    if kind == "ablate":
        return iv.ablate(group=group, mean=draw(st.none() | strength))
    if kind == "clamp":
        low, high = sorted((draw(numbers), draw(numbers)))
        bounds = draw(st.sampled_from([{"min": low}, {"max": high}, {"min": low, "max": high}]))
        return iv.clamp(group=group, **bounds)
    return getattr(iv, kind)(group=group, value=draw(strength))


@st.composite
def edits(draw: Any, positions: bool = True, depth: int = 2) -> iv.Edit:
    """Operations, restricted and chained."""
    kind = draw(st.sampled_from(["one", "only", "chain"])) if depth else "one"
    if kind == "one":
        return draw(feature_edits())
    if kind == "only":
        inner = draw(edits(positions, depth - 1))
        layers = draw(st.none() | st.sampled_from(inner.layers())) if inner.layers() else None
        return iv.only(inner, layer=layers, **draw(restrictions(positions)))
    return quietly_chain(*draw(st.lists(edits(positions, depth - 1), min_size=1, max_size=3)))
