"""Handoff ablation: what one layer's MLP wrote, taken out of what a later layer's MLP reads and of nothing else.

It tells two circuits apart that a cross-layer transcoder draws alike. Where the later MLP computes from the earlier
one's output, the behaviour breaks; where both compute the same from what came before, and a feature is merely kept up,
it survives. The residual stream carries on what was written; copies that attention has made, and what MLPs in between
made of it, remain.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from clt_plugin.adapters._run import group_labels
from clt_plugin.core.crosscoder import Crosscoder
from clt_plugin.core.wiring import Site
from clt_plugin.interventions._edit import KINDS, Primitive, check_features
from clt_plugin.interventions._places import EditError, as_int, as_ints, show_several
from clt_plugin.interventions.edits import Ablate, Features, Group, Supernode, _numbers, _show_strength

__all__ = ["Handoff", "ablate_handoff"]

NORMS = ("live", "frozen")
BASELINES = ("zero", "mean")


@dataclass(frozen=True, eq=False, repr=False)
class Handoff(Primitive):
    """What layers hand to later layers' MLPs is removed; see `ablate_handoff`.

    Attributes:
        pairs: (source, target) layers, sorted, source < target.
        features: The features of the source layers whose writes are removed; None for their MLPs' whole outputs.
        subspace: Orthonormal rows (k, d), in float64; only the component in their span is removed. None for all.
        mean: What stays in place of what is removed. None for nothing; for features a number, or one a feature; for
            whole outputs a tensor (d,), or {source: (d,)}.
        norm: Whether the norm before the target's MLP is computed anew, ``"live"``, or keeps the denominators of the
            unedited run where the handoff acts, ``"frozen"``.
    """

    pairs: tuple[tuple[int, int], ...]
    features: Supernode | None = None
    subspace: Tensor | None = None
    mean: Any = None
    norm: str = "live"

    kind: ClassVar[str] = "ablate_handoff"
    restricted_by: ClassVar[tuple[str, ...]] = ("position", "batch", "tokens")

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs", tuple(sorted({_pair(pair) for pair in self.pairs})))
        if not self.pairs:
            raise EditError("a handoff goes from a layer to a later one: no such pair was given")
        if self.norm not in NORMS:
            raise EditError(f"norm is 'live' or 'frozen', not {self.norm!r}")
        if self.subspace is not None:
            object.__setattr__(self, "subspace", _orthonormal(self.subspace))
        if self.features is not None:
            self._check_members(self.features)
            # As for an ablation of the features themselves, and refused for the same reasons.
            object.__setattr__(self, "mean", Ablate(self.features, self.mean).mean)
        elif isinstance(self.mean, Mapping):
            means = {as_int("a source of mean=", layer): _vector("mean", mean) for layer, mean in self.mean.items()}
            if lacking := sorted(set(self.sources) - set(means)):
                raise EditError(f"mean= gives none for source {lacking[0]}: give one a source, as {{source: (d,)}}")
            object.__setattr__(self, "mean", {layer: means[layer] for layer in self.sources})
        elif self.mean is not None:
            object.__setattr__(self, "mean", _vector("mean", self.mean))

    @property
    def sources(self) -> tuple[int, ...]:
        """The layers from whose output something is removed."""
        return tuple(sorted({source for source, _ in self.pairs}))

    @property
    def targets_read(self) -> tuple[int, ...]:
        """The layers whose MLPs read less."""
        return tuple(sorted({target for _, target in self.pairs}))

    @property
    def needs_crosscoder(self) -> bool:
        """Whether it is of features, which only a crosscoder has."""
        return self.features is not None

    def clash(self, other: Handoff) -> str | None:
        """Return why two cannot act at one place, to follow their names; None where they can."""
        both = sorted(set(self.targets_read) & set(other.targets_read))
        if both and self.norm != other.norm:
            return f"take layer {both[0]}'s norm as 'live' and as 'frozen' at one place: give them the same norm="
        for source, target in sorted(set(self.pairs) & set(other.pairs)):
            if self.features is None or other.features is None:
                what = f"layer {source}'s output"
            else:
                shared = set(self.features.features[str(source)]) & set(other.features.features[str(source)])
                if not shared:
                    continue
                what = f"feature {min(shared)} of layer {source}"
            return f"both remove {what} from what layer {target} reads, at one place: give them as one handoff"
        return None

    # ---------------------------------------------------------------- what is removed

    def of_output(
        self, source: int, written: "Float[Tensor, 'batch position d']"
    ) -> "Float[Tensor, 'batch position d']":
        """Return what is removed of a source's whole MLP output, in float32 at least.

        Args:
            source: The layer.
            written: What its MLP added to the residual stream, (batch, position, d).
        """
        wide = written.to(torch.promote_types(written.dtype, torch.float32))
        mean = self.mean[source] if isinstance(self.mean, Mapping) else self.mean
        return self._projected(wide if mean is None else wide - mean.to(wide))

    def of_features(
        self,
        crosscoder: Crosscoder,
        source: int,
        target: int,
        acts: "Float[Tensor, 'batch position f']",
        dropped: Collection[tuple[int, Site]] = (),
    ) -> "Float[Tensor, 'batch position d']":
        """Return what is removed of features' writes: ``sum over source <= l < target of (f - mean) @ W_dec[l]``.

        Args:
            crosscoder: Whose features.
            source: The layer they are at home in.
            target: The layer whose MLP reads; writes from there on reach it too late to count.
            acts: All activations of that layer's group, (batch, position, F).
            dropped: The writes, as (group, site), that are left out in this run, so that there is nothing to remove.
        """
        assert self.features is not None
        group = group_labels(crosscoder.wiring).index(str(source))
        chosen, strengths = Ablate(self.features, self.mean).at(str(source))
        latents = torch.tensor(chosen, device=crosscoder.device)
        rows = crosscoder.decoder_vectors(group, latents)
        f = acts.to(rows.device)[..., latents]
        f = f.to(torch.promote_types(f.dtype, torch.float32))
        if strengths["mean"] is not None:
            f = f - torch.as_tensor(strengths["mean"], dtype=f.dtype, device=f.device)
        slices = crosscoder.layout.write_slices[group]
        parts = [
            rows[:, slices[site]].to(f.dtype)
            for site in _handed(crosscoder, group, source, target)
            if (group, site) not in dropped
        ]
        if not parts:
            return f.new_zeros(*f.shape[:-1], crosscoder.d_model)
        return self._projected(f @ torch.stack(parts).sum(0))

    def _projected(self, x: Tensor) -> Tensor:
        if self.subspace is None:
            return x
        rows = self.subspace.to(x)
        return (x @ rows.T) @ rows

    # ---------------------------------------------------------------- whether it fits

    def _check_members(self, features: Supernode) -> None:
        """Raise where the features are not those of the sources."""
        sources = set(map(str, self.sources))
        if numbered := [label for label in features.features if "_" in label]:
            raise EditError(
                f"layer {numbered[0]!r}: handoffs are of features of a layer's first group, such as layer 3"
            )
        if others := sorted(set(features.features) ^ sources, key=int):
            what = "is no source" if others[0] not in sources else "is a source without features"
            raise EditError(f"layer {others[0]} {what}: features= gives {{layer: features}} for every source")

    def check_against(self, crosscoder: Crosscoder) -> None:
        """Raise `EditError` where features are not the crosscoder's, or hand nothing to a target."""
        width, wiring = crosscoder.layout.common_width(), crosscoder.wiring
        if width is not None:
            self._check_width(width)
        if self.features is None:
            return
        if width is None or not wiring.writes_mlps_only:
            raise EditError(
                "the handoff of features is what they write to MLP outputs of one model; this crosscoder writes "
                f"{', '.join(sorted({site.name for site in wiring.write_sites}))}: ablate handoffs of whole outputs, "
                "without features="
            )
        for label, features in self.features.members:
            check_features(crosscoder, label, features)
        for source, target in self.pairs:
            group = group_labels(wiring).index(str(source))
            if not _handed(crosscoder, group, source, target):
                layers = ", ".join(str(site.layer) for site in wiring.writes[group])
                raise EditError(
                    f"features of layer {source} write layers {layers}, nothing of which layer {target} could read: "
                    "choose a later target"
                )

    def check_model(
        self, n_layers: int, d_model: int, crosscoder: Crosscoder | None = None, post_norm: str | None = None
    ) -> None:
        """Raise `EditError` where it does not fit a model.

        Args:
            n_layers: How many layers the model has.
            d_model: The width of its residual stream.
            crosscoder: The one whose features are meant.
            post_norm: The norm between the model's MLPs and its residual stream, if it has one.
        """
        last = self.targets_read[-1]
        if last >= n_layers:
            raise EditError(f"there is no layer {last} to hand to: the model has layers 0-{n_layers - 1}")
        self._check_width(d_model)
        if self.features is None or crosscoder is None or post_norm is None:
            return
        if any(site.name == "mlp_out_before_norm" for site in crosscoder.wiring.write_sites):
            raise EditError(
                f"this crosscoder writes before the norm {post_norm}, so that no part of the residual stream is one "
                "feature's: ablate the handoff of whole outputs, without features="
            )

    def _check_width(self, d_model: int) -> None:
        found = [] if self.subspace is None else [("subspace", self.subspace.shape[1])]
        if self.features is None and self.mean is not None:
            means = self.mean.values() if isinstance(self.mean, Mapping) else (self.mean,)
            found += [("mean", len(mean)) for mean in means]
        for name, width in found:
            if width != d_model:
                raise EditError(f"{name} has width {width}, but the residual stream has {d_model}")

    # ---------------------------------------------------------------- data

    def data(self) -> dict[str, Any]:
        """Return what it does as plain data."""
        data: dict[str, Any] = {"edit": self.kind, "pairs": [list(pair) for pair in self.pairs], "norm": self.norm}
        if self.features is not None:
            data["features"] = {label: list(features) for label, features in self.features.members}
            if self.features.name is not None:
                data["name"] = self.features.name
        if self.subspace is not None:
            data["subspace"] = self.subspace.tolist()
        if isinstance(self.mean, Mapping):
            data["mean"] = {str(source): mean.tolist() for source, mean in self.mean.items()}
        elif self.mean is not None:
            data["mean"] = self.mean.tolist() if self.features is None else _numbers(self.mean)
        return data

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Handoff:
        """Rebuild it from `data`'s result."""
        features, mean = data.get("features"), data.get("mean")
        if isinstance(mean, Mapping):
            mean = {int(source): values for source, values in mean.items()}
        supernode = None if features is None else Supernode.of(data.get("name"), features)
        pairs = tuple(tuple(pair) for pair in data["pairs"])
        return cls(pairs, supernode, data.get("subspace"), mean, data.get("norm", "live"))  # type: ignore[arg-type]

    def __repr__(self) -> str:
        if self.pairs == _forward(self.sources, self.targets_read):
            shown = [f"source={show_several(self.sources)}", f"target={show_several(self.targets_read)}"]
        else:
            shown = [f"pairs={list(self.pairs)}"]
        if self.features is not None:
            members = self.features.members
            alone = self.features.name is None and len(members) == 1
            shown.append(f"features={show_several(members[0][1]) if alone else repr(self.features)}")
        if self.subspace is not None:
            shown.append(f"subspace=<{len(self.subspace)} of {self.subspace.shape[1]} directions>")
        if self.mean is not None:
            shown.append(f"baseline='mean', mean={self._shown_mean()}")
        if self.norm != "live":
            shown.append(f"norm={self.norm!r}")
        return f"{self.kind}({', '.join(shown)})"

    def _shown_mean(self) -> str:
        if self.features is not None:
            return _show_strength(self.mean)
        if isinstance(self.mean, Mapping):
            return f"{{{', '.join(f'{source}: <{len(mean)} numbers>' for source, mean in self.mean.items())}}}"
        return f"<{len(self.mean)} numbers>"


KINDS[Handoff.kind] = Handoff


def _pair(pair: Any) -> tuple[int, int]:
    layers = as_ints("a layer of a pair", pair)
    if len(layers) != 2:
        raise EditError(f"a pair is (source, target), not {pair!r}")
    source, target = layers
    if source < 0:
        raise EditError(f"layers count from 0: there is no layer {source}")
    if source >= target:
        raise EditError(
            f"a layer hands only to later ones: the source comes before the target, not {source} -> {target}"
        )
    return (source, target)


def _forward(sources: Iterable[int], targets: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Return all pairs that go forward, sorted."""
    later = tuple(targets)
    return tuple(sorted({(source, target) for source in sources for target in later if source < target}))


def _handed(crosscoder: Crosscoder, group: int, source: int, target: int) -> list[Site]:
    """Return the sites that a group writes before a target's MLP reads."""
    return [site for site in crosscoder.wiring.writes[group] if source <= site.layer < target]


def _finite(what: str, value: Any) -> Tensor:
    try:
        # Numbers that are not in a tensor, from JSON say, are as exact as they were written.
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise EditError(f"{what} is a tensor of numbers, not {value!r}: {error}") from error
    tensor = tensor if tensor.is_floating_point() else tensor.to(torch.float64)
    if not bool(tensor.detach().isfinite().all()):
        raise EditError(f"{what} holds a number that is not finite")
    return tensor


def _vector(what: str, value: Any) -> Tensor:
    vector = _finite(what, value)
    if vector.ndim != 1 or not len(vector):
        raise EditError(f"{what} of a whole output is of shape (d,), or {{source: (d,)}}, not {tuple(vector.shape)}")
    return vector


def _orthonormal(rows: Any) -> Tensor:
    """Return orthonormal rows of the same span, (rank, d), in float64."""
    rows = _finite("subspace", rows).detach().double()
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2:
        raise EditError(f"subspace is given by its directions, (k, d), not by a tensor of shape {tuple(rows.shape)}")
    gram = rows @ rows.T
    if (gram - torch.eye(len(rows)).to(gram)).abs().max() < 1e-12:
        return rows
    _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
    kept = directions[sizes > 1e-7 * sizes.max()]
    if not len(kept):
        raise EditError("subspace has no direction that is not zero")
    return kept


def ablate_handoff(
    source: int | Sequence[int] | None = None,
    target: int | Sequence[int] | None = None,
    features: Features | Group | None = None,
    subspace: Any = None,
    baseline: str = "zero",
    mean: Any = None,
    norm: str = "live",
    pairs: Iterable[tuple[int, int]] | None = None,
) -> Handoff:
    """Remove what layers wrote from what later layers' MLPs read, and from nothing else.

    Before the norm of the target's MLP, what the source wrote is subtracted from the residual stream; the stream
    itself carries it on. Source: the study of unfaithful CLT circuits by Dearstyne, Maher and others (SPAR, Fall 2025),
    which names the test.

    Args:
        source: The layer that writes, or several; by default those of ``features``, where they are given by layer.
        target: The layer that reads, or several: all pairs of source and target that go forward.
        features: Remove what these features write before the target, instead of the source's whole MLP output:
            features of the one source, {layer: features}, or a `supernode`.
        subspace: Remove only the component in the span of these directions, (k, d) or (d,).
        baseline: ``"zero"``, or ``"mean"``: what is removed is the difference from its mean.
        mean: The mean: for a whole output (d,) or {source: (d,)}; for features a number, or one a feature.
        norm: ``"live"`` computes the target's norm on the result, ``"frozen"`` keeps its denominators where the
            handoff acts.
        pairs: (source, target) pairs, instead of source and target.

    >>> ablate_handoff(source=[0, 1], target=4)
    ablate_handoff(source=[0, 1], target=4)
    >>> ablate_handoff(source=2, target=3, features=[811, 42], norm="frozen")
    ablate_handoff(source=2, target=3, features=[811, 42], norm='frozen')
    """
    if baseline not in BASELINES:
        raise EditError(f"baseline is 'zero' or 'mean', not {baseline!r}")
    if (mean is not None) != (baseline == "mean"):
        raise EditError("baseline='mean' goes with mean=: give both, or neither for a baseline of zero")
    if isinstance(features, Mapping):
        features = Supernode.of(None, features)
    if pairs is not None:
        if source is not None or target is not None:
            raise EditError("pairs= goes instead of source= and target=")
        chosen = tuple(_pair(pair) for pair in pairs)
    else:
        if source is None and isinstance(features, Supernode):
            source = [int(label.partition("_")[0]) for label in features.features]
        chosen = _chosen(source, target)
    if features is not None and not isinstance(features, Supernode):
        sources = {layer for layer, _ in chosen}
        if len(sources) > 1:
            raise EditError(f"there are {len(sources)} sources: give features by layer, such as {{3: [811, 42]}}")
        features = Supernode.of(None, dict.fromkeys(sources, features))
    return Handoff(chosen, features, subspace, mean, norm)


def _chosen(source: Any, target: Any) -> tuple[tuple[int, int], ...]:
    """Return the pairs of sources and targets that go forward; one that is in none is refused."""
    if source is None or target is None:
        raise EditError("say which layer hands to which: source= and target=, or pairs=")
    sources, targets = as_ints("a source layer", source), as_ints("a target layer", target)
    chosen = _forward(sources, targets)
    for name, layers, place in (("source", sources, 0), ("target", targets, 1)):
        if idle := sorted(set(layers) - {pair[place] for pair in chosen}):
            others = f"target {show_several(targets)}" if place == 0 else f"source {show_several(sources)}"
            raise EditError(f"a layer hands only to later ones: {name} {idle[0]} has no partner in {others}")
    return chosen
