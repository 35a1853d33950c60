"""Which of a crosscoder's writes are dropped: ablations on the level of the wiring.

A write goes from a source, the home layer of a group, to a target, the layer that is written. No stored weight
changes, and no weights are copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from clt_plugin.core.crosscoder import Crosscoder
from clt_plugin.core.errors import WiringError
from clt_plugin.core.features import SparseFeatures
from clt_plugin.core.wiring import Site, Wiring
from clt_plugin.interventions._edit import KINDS, Edit, Primitive
from clt_plugin.interventions._places import EditError, as_int, as_ints, show_several

__all__ = ["WriteMask", "ablate_cross_layer", "decode", "drops", "only_span"]


@dataclass(frozen=True, eq=False, repr=False)
class WriteMask(Primitive):
    """Drops writes to other layers than their source; see `ablate_cross_layer`.

    In a `chain`, a write survives if every mask keeps it.

    Attributes:
        source: Drop only writes from these layers.
        target: Drop only writes to these layers.
        pairs: Drop only these (source, target).
        min_distance: Drop only writes that go at least so many layers.
    """

    source: tuple[int, ...] | None = None
    target: tuple[int, ...] | None = None
    pairs: tuple[tuple[int, int], ...] | None = None
    min_distance: int = 1

    kind: ClassVar[str] = "ablate_cross_layer"
    restricted_by: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name in ("source", "target"):
            layers = getattr(self, name)
            if layers is not None:
                object.__setattr__(self, name, tuple(sorted(set(as_ints(f"a {name} layer", layers)))))
        if self.pairs is not None:
            object.__setattr__(self, "pairs", tuple(sorted({_pair(pair) for pair in self.pairs})))
            if not self.pairs or self.source is not None or self.target is not None:
                raise EditError("pairs= gives (source, target) pairs, at least one, instead of source= and target=")
        if as_int("the distance", self.min_distance) < 1:
            raise EditError(f"a write to its own layer is kept: the least distance is 1, not {self.min_distance}")

    def keeps(self, source: int, target: int) -> bool:
        """Whether a write from one layer to another is kept."""
        if abs(target - source) < self.min_distance:
            return True
        if self.pairs is not None:
            return (source, target) not in self.pairs
        from_here = self.source is None or source in self.source
        return not (from_here and (self.target is None or target in self.target))

    def check_against(self, crosscoder: Crosscoder) -> None:
        """Raise `EditError` where it names a layer or a pair that the crosscoder does not write."""
        wiring = crosscoder.wiring
        written = {(home, site.layer) for home, sites in zip(wiring.home, wiring.writes, strict=True) for site in sites}
        known = ({source for source, _ in written}, {target for _, target in written})
        for name, layers, there in zip(("source", "target"), (self.source, self.target), known, strict=True):
            if unknown := sorted(set(layers or ()) - there):
                found = ", ".join(map(str, sorted(there)))
                raise EditError(f"no write of this crosscoder has {name} {unknown[0]}: there are {found}")
        if unwritten := sorted(set(self.pairs or ()) - written):
            source, target = unwritten[0]
            targets = ", ".join(str(t) for s, t in sorted(written) if s == source) or "none"
            raise EditError(f"layer {source} does not write layer {target} in this crosscoder: it writes {targets}")

    def data(self) -> dict[str, Any]:
        """Return what it does as plain data."""
        fields = {"source": self.source, "target": self.target, "pairs": self.pairs, "min_distance": self.min_distance}
        lists = {name: _as_lists(value) for name, value in fields.items() if value is not None}
        return {"edit": self.kind, **lists}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> WriteMask:
        """Rebuild it from `data`'s result."""
        return cls(**{name: value for name, value in data.items() if name != "edit"})

    def __repr__(self) -> str:
        shown = [f"{name}={show_several(v)}" for name, v in (("source", self.source), ("target", self.target)) if v]
        if self.pairs:
            shown.append(f"pairs={list(self.pairs)}")
        if self.min_distance > 1:
            shown.append(f"min_distance={self.min_distance}")
        return f"{self.kind}({', '.join(shown)})"


KINDS[WriteMask.kind] = WriteMask


def _pair(pair: Any) -> tuple[int, int]:
    layers = as_ints("a layer of a pair", pair)
    if len(layers) != 2 or layers[0] == layers[1]:
        raise EditError(f"a pair is (source, target), two different layers, not {pair!r}")
    return (layers[0], layers[1])


def _as_lists(value: Any) -> Any:
    return [_as_lists(each) for each in value] if isinstance(value, tuple) else value


def ablate_cross_layer(
    source: int | Sequence[int] | None = None,
    target: int | Sequence[int] | None = None,
    pairs: Iterable[tuple[int, int]] | None = None,
    min_distance: int = 1,
) -> WriteMask:
    """Drop decoder writes whose target layer is not their source layer: all of them, or those that are chosen.

    Args:
        source: Only writes from these layers, the home layers of groups.
        target: Only writes to these layers.
        pairs: Only these (source, target), instead of source and target.
        min_distance: Only writes that go at least so many layers.

    >>> ablate_cross_layer(target=[2, 3], min_distance=2)
    ablate_cross_layer(target=[2, 3], min_distance=2)
    """
    chosen = None if pairs is None else tuple(pairs)
    return WriteMask(source, target, chosen, min_distance)  # type: ignore[arg-type]


def only_span(k: int) -> WriteMask:
    """Keep the writes that span at most k layers, the source's own included: target - source < k.

    >>> only_span(2)
    ablate_cross_layer(min_distance=2)
    """
    return WriteMask(min_distance=k)


def drops(edit: Edit, wiring: Wiring) -> frozenset[tuple[int, Site]]:
    """Return the writes, as (group, written site), that an edit's masks drop."""
    return edit.dropped(wiring)


def decode(
    crosscoder: Crosscoder,
    features: SparseFeatures | Tensor | Sequence[Tensor],
    edit: Edit,
    x: Tensor | Mapping[Site, Tensor] | None = None,
) -> Any:
    """Decode features without the writes that an edit drops. Biases and skips stay; features are taken as they are.

    Args:
        crosscoder: Whose decoder.
        features: As for `Crosscoder.decode`: stacked, one tensor a group, or sparse.
        edit: Any edit, of which the write masks act.
        x: What was read; needed only where there are affine skips.

    Returns:
        As `Crosscoder.decode`: stacked (n_write_sites, ..., d), or {site: (..., d_site)}.
    """
    edit.check(crosscoder)
    wiring, dropped = crosscoder.wiring, drops(edit, crosscoder.wiring)
    if not dropped:
        return crosscoder.decode(features, x)
    if isinstance(features, SparseFeatures):
        n_groups, stacked, dense = len(features.groups), features.stacked, features.dense
    else:
        n_groups, stacked = len(features), isinstance(features, Tensor)
        dense = features.__getitem__  # type: ignore[assignment]
    if n_groups != wiring.n_groups:
        raise WiringError(f"the crosscoder has {wiring.n_groups} groups, but the features have {n_groups}")
    total: dict[Site, Tensor] = {}
    for group, sites in enumerate(wiring.writes):
        acts = dense(group)
        shape = acts.shape[:-1]
        if acts.shape[-1] != crosscoder.group_sizes[group]:
            size = crosscoder.group_sizes[group]
            raise WiringError(f"group {group} has {size} latents, but its features have {acts.shape[-1]}")
        kept = [site for site in sites if (group, site) not in dropped]
        parts = crosscoder.decode_group(group, acts) if kept else {}
        for site in kept:
            total[site] = total[site] + parts[site] if site in total else parts[site]
    result = {}
    for site in wiring.write_sites:
        bias = crosscoder.bias(site)
        result[site] = total[site] + bias if site in total else bias.expand(*shape, -1)
    if wiring.skips:
        inputs = _inputs(wiring, x)
        for site in wiring.write_sites:
            skip = crosscoder.skip(site, inputs)
            result[site] = result[site] if skip is None else result[site] + skip
    stacked = (stacked or isinstance(x, Tensor)) and crosscoder.layout.common_width() is not None
    return torch.stack(list(result.values())) if stacked else result


def _inputs(wiring: Wiring, x: Tensor | Mapping[Site, Tensor] | None) -> Mapping[Site, Tensor]:
    if x is None:
        raise WiringError("this crosscoder has affine skips, which read x: call decode(crosscoder, features, edit, x)")
    return dict(zip(wiring.read_sites, x, strict=True)) if isinstance(x, Tensor) else x
