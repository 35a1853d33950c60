"""One crosscoder in one run of a model: what it has read, what its features say, what it writes.

Both adapters drive this one engine. An adapter says when a site is read and when an MLP's output is due, and
passes each value through its library's points by way of ``visit``; the arithmetic is here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from clt_plugin.adapters._pass import Pass
from clt_plugin.core.crosscoder import Crosscoder
from clt_plugin.core.errors import AttachError
from clt_plugin.core.wiring import SITE_NAMES, Site, Wiring

POINTS = ("enc_in", "pre_acts", "features", "recon", "error")
"""What a crosscoder shows at each layer, in the order in which a forward pass reaches it."""


class Edits(Protocol):
    """What an edit does in a run; `clt_plugin.interventions` makes them."""

    def check(self, crosscoder: Crosscoder) -> None:
        """Raise where it does not fit a crosscoder."""

    def activations(self, label: str, acts: Tensor, natural: Mapping[str, Tensor], now: Pass) -> Tensor:
        """Return a group's activations, edited; the same tensor where nothing is."""
        ...

    def dropped(self, wiring: Wiring) -> Collection[tuple[int, Site]]:
        """Return which groups' writes to which sites are left out."""
        ...

    def watched(self) -> Collection[str]:
        """Return the labels of the groups whose natural activations it looks at."""
        ...


Visit = Callable[[str, Tensor], Tensor]
"""Pass a point's value through the library: the value after every user's hook on it."""

_MLP_DUE = SITE_NAMES.index("mlp_out_before_norm")


def encoded_at_mlp(wiring: Wiring, group: int) -> bool:
    """Whether a group has read all it reads once its home layer's MLP is about to run."""
    last = max(wiring.reads[group], key=lambda site: site.order)
    return SITE_NAMES.index(last.name) < _MLP_DUE


def turn(wiring: Wiring, group: int) -> tuple[int, int, int]:
    """Return when in a forward pass a group is encoded: groups compare by it."""
    last = max(site.order for site in wiring.reads[group])
    layer, place = (last[0], _MLP_DUE - 1) if encoded_at_mlp(wiring, group) else last
    return (layer, place, group)


def group_labels(wiring: Wiring) -> tuple[str, ...]:
    """Name each group by the layer it is at home in; where several are, the later ones ``3_1``, ``3_2`` and so on."""
    labels: list[str] = []
    for group, home in enumerate(wiring.home):
        earlier = wiring.home[:group].count(home)
        labels.append(f"{home}_{earlier}" if earlier else str(home))
    return tuple(labels)


def point_labels(wiring: Wiring) -> tuple[str, ...]:
    """Name every place that has points: the groups, and the layers that are written."""
    written = [str(site.layer) for site in wiring.write_sites]
    labels = dict.fromkeys((*group_labels(wiring), *written))
    return tuple(sorted(labels, key=lambda label: [int(part) for part in label.split("_")]))


class Run:
    """The state of one crosscoder in one forward pass, renewed by `begin`.

    Args:
        crosscoder: What is attached.
        mode: ``"replace"``, ``"replace_with_error"`` or ``"observe"``.
        edits: What is edited in every pass.
    """

    def __init__(self, crosscoder: Crosscoder, mode: str, edits: Edits | None = None) -> None:
        self.crosscoder = crosscoder
        self.mode = mode
        self.edits = edits
        self.labels = group_labels(crosscoder.wiring)
        self.dropped = frozenset(edits.dropped(crosscoder.wiring)) if edits else frozenset()
        self.clear()

    def clear(self) -> None:
        """Forget everything: nothing of a forward pass outlives it."""
        self.inputs: dict[Site, Tensor] = {}
        self.encoded: set[int] = set()
        # Decoded so far for each site still to be written, from edited features, and what edits alone change.
        self.decoded: dict[Site, Tensor] = {}
        self.changes: dict[Site, Tensor] = {}
        self.written: set[Site] = set()
        self.excluded: Tensor | None = None
        self.now: Pass | None = None
        # Natural activations that conditions of edits look at.
        self.natural: dict[str, Tensor] = {}

    def begin(self, excluded: Tensor | None, now: Pass | None = None) -> None:
        """Start a forward pass.

        Args:
            excluded: Positions outside what the crosscoder was trained on, (batch, position), or None.
            now: What passes through the model; needed only for edits.
        """
        self.clear()
        self.excluded, self.now = excluded, now
        if self.crosscoder.training and self.crosscoder.activation.has_batch_threshold:
            raise AttachError("BatchTopK in training mode selects over the whole batch: call eval() on the crosscoder")

    def read(self, site: Site, value: Tensor) -> None:
        """Take what a site holds, (batch, position, d); a block entered twice in a pass counts once."""
        width = self.crosscoder.layout.width[site]
        if value.shape[-1] != width:
            raise AttachError(f"{site} has width {value.shape[-1]} in the model, but {width} in the crosscoder")
        self.inputs.setdefault(site, value)

    def encode(self, group: int, visit: Visit) -> None:
        """Encode a group whose sites were read; one whose layer was skipped stays silent, as if inactive."""
        crosscoder, reads = self.crosscoder, self.crosscoder.wiring.reads[group]
        if group in self.encoded or any(site not in self.inputs for site in reads):
            return
        self.encoded.add(group)
        parts = [self.inputs[site] for site in reads]
        x = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        # Points get copies: an edit in place must not reach into the residual stream, or into what is compared below.
        x_seen = _shown(visit, "enc_in", x.clone())
        h = crosscoder.pre_activations(group, x_seen.to(crosscoder.device))
        h_seen = _shown(visit, "pre_acts", h.clone())
        acts = self._activate(group, h_seen)
        if self.mode == "replace_with_error":
            natural = self._natural(group, x, x_seen, h, h_seen, acts)
        acts = self._edited(group, acts)
        # Some activation functions keep their output for the backward pass, which an edit in place would spoil.
        acts = _shown(visit, "features", acts.clone() if acts.requires_grad else acts)
        if self.mode == "observe":
            return
        if crosscoder.is_partial and acts.requires_grad:
            acts.register_hook(_warn_of_missing_paths)
        _accumulate(self.decoded, self._kept(group, crosscoder.decode_group(group, acts)))
        if self.mode == "replace" and self.excluded is not None:
            natural = acts.masked_fill(self.excluded.to(acts.device)[..., None], 0)
        if self.keeps_some_outputs:
            self._note_changes(group, acts, natural)

    def _edited(self, group: int, acts: Tensor) -> Tensor:
        """Return a group's activations after the edits that the run was given."""
        label = self.labels[group]
        if self.edits is None or self.now is None:
            return acts
        if label in self.edits.watched():
            # A copy: a user may edit in place what the point shows.
            self.natural[label] = acts.detach().clone()
        return self.edits.activations(label, acts, self.natural, self.now)

    def _kept(self, group: int, parts: dict[Site, Tensor]) -> dict[Site, Tensor]:
        """Return what a group writes, without the writes that are left out."""
        return {site: part for site, part in parts.items() if (group, site) not in self.dropped}

    def _note_changes(self, group: int, acts: Tensor, natural: Tensor) -> None:
        """Note what edits change of what a group writes: what its error must not make up for."""
        with torch.no_grad():
            if _differ(acts, natural):
                _accumulate(self.changes, self._kept(group, self.crosscoder.decode_group(group, acts - natural)))
            lost = {site for g, site in self.dropped if g == group}
            if lost:
                parts = self.crosscoder.decode_group(group, natural)
                _accumulate(self.changes, {site: -part for site, part in parts.items() if site in lost})

    def _natural(self, group: int, x: Tensor, x_seen: Tensor, h: Tensor, h_seen: Tensor, acts: Tensor) -> Tensor:
        """Return the activations that no edit has touched, (..., F), computed again only where one has."""
        # Not as a decorator: a decorated function travels to a remote model without its globals.
        with torch.no_grad():
            if _differ(x, x_seen):
                h = self.crosscoder.pre_activations(group, x.to(self.crosscoder.device))
            elif not _differ(h, h_seen):
                return acts.clone()
            return self._activate(group, h)

    @property
    def keeps_some_outputs(self) -> bool:
        """Whether the model's own MLP outputs are needed in this pass."""
        return self.mode == "replace_with_error" or self.excluded is not None

    def ready(self, site: Site) -> bool:
        """Whether anything is to be written at a site: once a pass, and not where all that would write was skipped."""
        return self.mode != "observe" and bool(self.inputs) and site not in self.written

    def output(self, site: Site, own: Tensor, visit: Visit) -> Tensor:
        """Return what takes the place of an MLP's output.

        Args:
            site: The written site.
            own: The model's own output, (batch, position, d); unless `keeps_some_outputs`, any tensor of its shape,
                dtype and device.
            visit: Passes points through the library.

        Returns:
            (batch, position, d), in the dtype and on the device of ``own``.
        """
        self.written.add(site)
        y = self._reconstruction(site, own.shape[:-1])
        if not self.keeps_some_outputs:
            return _shown(visit, "recon", y).to(device=own.device, dtype=own.dtype)
        # In float32 at least: then the two cancel, and without an edit the output is the model's own.
        wide = torch.promote_types(y.dtype, torch.float32)
        with torch.no_grad():
            natural = y - self.changes.pop(site) if site in self.changes else y
            error = own.to(y.device, wide) - natural.to(wide)
        y = _shown(visit, "recon", y)
        if self.mode == "replace_with_error":
            y = y + _shown(visit, "error", error)
        elif self.excluded is not None:
            y = torch.where(self.excluded.to(y.device)[..., None], y + error, y)
        return y.to(device=own.device, dtype=own.dtype)

    def _reconstruction(self, site: Site, shape: tuple[int, ...]) -> Tensor:
        """Return the bias, the skip and what groups have decoded so far for a site, (batch, position, d)."""
        crosscoder = self.crosscoder
        y = crosscoder.bias(site).expand(*shape, -1).clone()
        if site in self.decoded:
            y = y + self.decoded.pop(site)
        for read, write in crosscoder.wiring.skips:
            # As with features, what a skipped layer would have read counts for nothing.
            if write == site and read in self.inputs:
                skip = crosscoder.skip(site, {read: self.inputs[read].to(crosscoder.device)})
                y = y if skip is None else y + skip
        return y

    def _activate(self, group: int, h: Tensor) -> Tensor:
        acts = self.crosscoder.activate(group, h)
        if self.excluded is None:
            return acts
        return acts.masked_fill(self.excluded.to(acts.device)[..., None], 0)


def _shown(visit: Visit, name: str, value: Tensor) -> Tensor:
    """Show a value at a point; an edit that would broadcast, and so mean something else, is refused."""
    seen, shape = visit(name, value), tuple(value.shape)
    if not isinstance(seen, Tensor) or tuple(seen.shape) != shape:
        found = tuple(seen.shape) if isinstance(seen, Tensor) else type(seen).__name__
        raise AttachError(f"{name} has shape {shape}, but was set to {found}: assign a tensor of that shape")
    return seen


def _warn_of_missing_paths(grad: Tensor) -> None:
    warnings.warn(
        "this gradient was taken through a selection of a crosscoder's layers or features: edits of them are exact, "
        "but gradients lack the paths through what was left out; attach the whole for gradients",
        stacklevel=2,
    )


def _differ(one: Tensor, other: Tensor) -> bool:
    """Whether an edit has changed a value; not where there are shapes and no values, as in nnsight's scan."""
    return detect_fake_mode() is None and not torch.equal(one, other)


def _accumulate(total: dict[Site, Tensor], parts: dict[Site, Tensor]) -> None:
    for site, part in parts.items():
        total[site] = total[site] + part if site in total else part
