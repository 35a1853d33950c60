"""A crosscoder, edits and handoffs in a plain Hugging Face model: the one engine behind every mode of `intervene`.

The engine says when a site is read and when an MLP's output is due, as both adapters do; what is written then is a
`Run`'s affair: the adapters' own for ``replace``, one of those below for the other modes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clt_plugin.adapters._frozen import Recording
from clt_plugin.adapters._norms import FrozenNorm
from clt_plugin.adapters._pass import Pass
from clt_plugin.adapters._run import Run, Visit, encoded_at_mlp, turn
from clt_plugin.adapters.huggingface import HostModel, excluded_positions, pass_of
from clt_plugin.adapters.sites import normalise
from clt_plugin.core.crosscoder import Crosscoder
from clt_plugin.core.wiring import Site
from clt_plugin.interventions._apply import places_of
from clt_plugin.interventions._edit import Part

if TYPE_CHECKING:
    from clt_plugin.interventions.handoff import Handoff


class LocalRun(Run):
    """The local replacement model: features respond to what they read, and errors are those of another run.

    Args:
        crosscoder: The crosscoder.
        edits: What is edited, or None.
        errors: For each written site what the MLP put out beyond the reconstruction, (batch, position, d).
        reads: What was read then.
    """

    def __init__(
        self, crosscoder: Crosscoder, edits: Any, errors: Mapping[Site, Tensor], reads: Mapping[Site, Tensor]
    ) -> None:
        super().__init__(crosscoder, "replace", edits)
        self.errors, self.reads = errors, reads

    @property
    def keeps_some_outputs(self) -> bool:
        """Whether the model's own MLP outputs are needed: never, the errors stand for them at every position."""
        return False

    def output(self, site: Site, own: Tensor, visit: Visit) -> Tensor:
        """Return the reconstruction and the error; see `Run.output`."""
        self.written.add(site)
        # As wide as the errors, float32 at least: then, without an edit, the output is that of the other run.
        y = self._reconstruction(site, own.shape[:-1]) + self.errors[site]
        if self.excluded is not None:
            # No crosscoder acts there: not the skip neither, the MLP's output is held.
            response = skip_response(self, site, self.reads, ~self.excluded)
            y = y if response is None else y - response.to(y)
        return y.to(device=own.device, dtype=own.dtype)


def skip_response(run: Run, site: Site, reads: Mapping[Site, Tensor], silent: Tensor | None) -> Tensor | None:
    """Return what an affine skip adds to a site because what it reads has changed, (batch, position, d), or None.

    Args:
        run: The run.
        site: The written site.
        reads: What was read in the other run.
        silent: Positions at which nothing is to be returned, (batch, position), or None.
    """
    for read, write in run.crosscoder.wiring.skips:
        if write == site:
            moved = run.inputs[read] - reads[read]
            skip = run.crosscoder.skip(site, {read: moved.to(run.crosscoder.device)})
            if skip is not None and silent is not None:
                skip = skip.masked_fill(silent.to(skip.device)[..., None], 0)
            return skip
    return None


class LiveRun(Run):
    """MLP outputs as they are, to which the writes of edits are added: all of it is live, and differentiable.

    The adapters' ``replace_with_error`` puts out the same, but its error is detached.

    Args:
        crosscoder: The crosscoder.
        edits: What is edited, or None.
        needed: The labels of the groups to encode; None for all, so that all features are seen.
    """

    def __init__(self, crosscoder: Crosscoder, edits: Any, needed: Collection[str] | None = None) -> None:
        super().__init__(crosscoder, "replace_with_error", edits)
        self.needed = self.labels if needed is None else needed

    def encode(self, group: int, visit: Visit) -> None:
        """Encode a group, and note what edits of it write; see `Run.encode`."""
        if self.labels[group] not in self.needed:
            return
        if group not in self.encoded and all(site in self.inputs for site in self.crosscoder.wiring.reads[group]):
            self.encoded.add(group)
            visit("features", self._noted(group, self._natural_at(group, self.inputs)))

    def output(self, site: Site, own: Tensor, visit: Visit) -> Tensor:
        """Return the model's own output and what edits add to it; see `Run.output`."""
        self.written.add(site)
        return own + self.changes[site].to(own) if site in self.changes else own

    def _natural_at(self, group: int, inputs: Mapping[Site, Tensor]) -> Tensor:
        """Return a group's activations for given inputs, (batch, position, F)."""
        reads = [inputs[site] for site in self.crosscoder.wiring.reads[group]]
        x = torch.cat(reads, dim=-1) if len(reads) > 1 else reads[0]
        return self._activate(group, self.crosscoder.pre_activations(group, x.to(self.crosscoder.device)))

    def _noted(self, group: int, natural: Tensor) -> Tensor:
        """Return a group's activations after edits; note what edits change of what it writes."""
        acts = self._edited(group, natural)
        if acts is not natural:
            self._add(self._kept(group, self.crosscoder.decode_group(group, acts - natural)), 1)
        lost = {site for g, site in self.dropped if g == group}
        if lost:
            parts = self.crosscoder.decode_group(group, natural)
            self._add({site: part for site, part in parts.items() if site in lost}, -1)
        return acts

    def _add(self, parts: Mapping[Site, Tensor], sign: int) -> None:
        for site, part in parts.items():
            self.changes[site] = self.changes[site] + sign * part if site in self.changes else sign * part


class FixedRun(LiveRun):
    """MLP outputs of another run, to which the writes of edits are added, in some layers; the others stay live.

    Args:
        crosscoder: The crosscoder.
        edits: What is edited.
        outputs: For each written site what it held in that run, (batch, position, d).
        reads: What was read then.
        layers: The layers that are written so.
    """

    def __init__(
        self,
        crosscoder: Crosscoder,
        edits: Any,
        outputs: Mapping[Site, Tensor],
        reads: Mapping[Site, Tensor],
        layers: frozenset[int],
    ) -> None:
        super().__init__(crosscoder, edits)
        self.outputs, self.reads, self.layers = outputs, reads, layers
        self.features: dict[str, Tensor] = {}

    def begin(self, excluded: Tensor | None, now: Pass | None = None) -> None:
        """Start a forward pass: what edits change is known before it, from the other run's activations."""
        super().begin(excluded, now)
        # In the order of a pass: conditions look at what was encoded before.
        for group in sorted(range(len(self.labels)), key=lambda group: turn(self.crosscoder.wiring, group)):
            with torch.no_grad():
                natural = self._natural_at(group, self.reads)
            self.features[self.labels[group]] = self._noted(group, natural)

    def encode(self, group: int, visit: Visit) -> None:
        """Show a group's features, which do not respond to what is read."""
        if group not in self.encoded:
            self.encoded.add(group)
            visit("features", self.features[self.labels[group]])

    def output(self, site: Site, own: Tensor, visit: Visit) -> Tensor:
        """Return the frozen output, what edits add to it, and the affine skip's response; see `Run.output`."""
        self.written.add(site)
        if site.layer not in self.layers:
            return own
        y = self.outputs[site]
        if site in self.changes:
            y = y + self.changes[site].to(y)
        # Where no crosscoder acts the MLP's output is held, as that of a layer without one.
        response = skip_response(self, site, self.reads, self.excluded)
        y = y if response is None else y + response.to(y)
        return y.to(device=own.device, dtype=own.dtype)


class Engine:
    """Hooks that put a run and handoffs into a plain model, as long as a context lasts.

    Args:
        hf: The plain Hugging Face model.
        host: What it is.
        run: What a crosscoder reads and writes; None for the model as it is, in which handoffs may act.
        handoffs: What is removed from what MLPs read.
        recording: The unedited run, for norms that are frozen; None in generation.
        frozen_norms: The layers whose norms are frozen by the context around this one.
        held: MLP outputs, after a post-norm, that stand as given, by layer: of frozen layers that no group writes.
    """

    def __init__(
        self,
        hf: nn.Module,
        host: HostModel,
        run: Run | None,
        handoffs: Sequence[Part] = (),
        recording: Recording | None = None,
        frozen_norms: frozenset[int] = frozenset(),
        held: Mapping[int, Tensor] | None = None,
    ) -> None:
        self.hf, self.host, self.run, self.recording, self.frozen_norms = hf, host, run, recording, frozen_norms
        self.held = held or {}
        self.handoffs: list[tuple[Part, Handoff]] = [(part, part.edit) for part in handoffs]  # type: ignore[misc]
        self.blocks: Any = hf.get_submodule(host.blocks)
        self.places = host.architecture.places(host.parallel)
        # Edited features by label, and what each layer's MLP wrote, in the pass under way.
        self.features: dict[str, Tensor] = {}
        self.wrote: dict[int, Tensor] = {}
        self.now: Pass | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Engine:
        with ExitStack() as stack:
            self._stack = stack
            backbone = self.hf.get_submodule(self.host.backbone)
            self._hook(backbone.register_forward_pre_hook(self._begin, with_kwargs=True))
            for target in sorted({target for _, handoff in self.handoffs for _, target in handoff.pairs}):
                self._remove_from(target)
            # What is written comes first: hooks run in the order of registration, and a group that reads an MLP's
            # output reads what was put in its place.
            for site in () if self.run is None else self.run.crosscoder.wiring.write_sites:
                self._write(site)
            for layer, output in self.held.items():
                module = self._module(layer, self.places["mlp_out"].module)
                self._hook(module.register_forward_hook(lambda module, args, own, output=output: output))
            if self.run is not None:
                for site in self.run.crosscoder.wiring.read_sites:
                    self._read(site)
                for layer in sorted(set(self.run.crosscoder.wiring.home)):
                    self._encode_at(layer)
            for layer in sorted({source for _, handoff in self.handoffs for source, _ in handoff.pairs}):
                self._note_output(layer)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        if self.run is not None:
            self.run.clear()

    def _hook(self, handle: Any) -> None:
        self._stack.callback(handle.remove)

    def _module(self, layer: int, name: str) -> nn.Module:
        return self.blocks[layer].get_submodule(name) if name else self.blocks[layer]

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        shape = tuple((ids if ids is not None else kwargs["inputs_embeds"]).shape[:2])
        self.now = pass_of(kwargs, ids, shape)
        self.features.clear()
        self.wrote.clear()
        if self.run is not None:
            excluded = excluded_positions(self.run.crosscoder.host.exclude_first, kwargs, shape)
            self.run.begin(excluded, self.now)

    # ---------------------------------------------------------------- what the crosscoder reads and writes

    def _visit(self, label: str) -> Callable[[str, Tensor], Tensor]:
        def visit(name: str, value: Tensor) -> Tensor:
            if name == "features":
                self.features[label] = value
            return value

        return visit

    def _encode(self, groups: Iterable[int]) -> None:
        assert self.run is not None
        for g in groups:
            self.run.encode(g, self._visit(self.run.labels[g]))

    def _read(self, site: Site) -> None:
        assert self.run is not None
        run, wiring, place = self.run, self.run.crosscoder.wiring, self.places[site.name]
        module = self._module(site.layer, place.module)
        late = [g for g, reads in enumerate(wiring.reads) if site in reads and not encoded_at_mlp(wiring, g)]

        def read(value: Tensor) -> None:
            # A handoff is taken from what the MLP, or a crosscoder in its place, reads; where no norm comes before the
            # MLP, its own input has lost it already.
            before_norm = self.host.architecture.pre_mlp_norm and (place.before_gain or site.name == "resid_mid")
            if before_norm or site.name == "resid_pre":
                value = self._without_handoffs(site.layer, value)
            if place.before_gain:
                value = self._before_gain(site.layer, module, value)
            run.read(site, value)
            self._encode(late)

        if place.side == "input":
            hook = lambda module, args, kwargs: read(args[0] if args else next(iter(kwargs.values())))  # noqa: E731
            self._hook(module.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            self._hook(module.register_forward_hook(lambda module, args, output: read(_first(output))))

    def _before_gain(self, layer: int, norm: nn.Module, x: Tensor) -> Tensor:
        live = normalise(norm, self.host.architecture.centred, x)
        where = self._frozen_places(layer)
        if layer not in self.frozen_norms and where is None:
            return live
        kept = self._frozen_norm(layer).normalised(x)
        return kept if layer in self.frozen_norms or where is None else torch.where(where.to(x.device), kept, live)

    def _frozen_norm(self, layer: int) -> FrozenNorm:
        assert self.recording is not None
        return self.recording.norms[layer, self.host.architecture.pre_mlp_norm or ""]

    def _encode_at(self, layer: int) -> None:
        """Encode a layer's groups once its MLP has its input."""
        assert self.run is not None
        wiring = self.run.crosscoder.wiring
        due = [g for g in range(wiring.n_groups) if wiring.home[g] == layer and encoded_at_mlp(wiring, g)]
        if due:
            mlp = self._module(layer, self.host.architecture.mlp)
            self._hook(mlp.register_forward_pre_hook(lambda module, args: self._encode(due)))

    def _write(self, site: Site) -> None:
        run, module = self.run, self._module(site.layer, self.places[site.name].module)
        assert run is not None

        def write(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return run.output(site, output, self._visit("")) if run.ready(site) else output

        self._hook(module.register_forward_hook(write))

    def _note_output(self, layer: int) -> None:
        def note(module: nn.Module, args: Any, output: Tensor) -> None:
            self.wrote[layer] = output

        # After what is written there: hooks run in the order of registration.
        self._hook(self._module(layer, self.places["mlp_out"].module).register_forward_hook(note))

    # ---------------------------------------------------------------- handoffs

    def _remove_from(self, target: int) -> None:
        """Have a layer's MLP read the residual stream without what is handed to it; nothing else does."""
        name, mlp = self.host.architecture.pre_mlp_norm, self._module(target, self.host.architecture.mlp)
        if not name:
            # Ahead of all others: whoever looks at this MLP's input sees what it reads.
            take = lambda m, args: (self._without_handoffs(target, args[0]),)  # noqa: E731
            self._hook(mlp.register_forward_pre_hook(take, prepend=True))
            return
        norm = self._module(target, name)

        def instead(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            x = self._without_handoffs(target, args[0])
            if target in self.frozen_norms:
                return self._frozen_norm(target)(x)
            live, where = module.forward(x), self._frozen_places(target)
            return live if where is None else torch.where(where.to(x.device), self._frozen_norm(target)(x), live)

        self._hook(norm.register_forward_hook(instead))

    def _handed(self, target: int) -> list[tuple[Part, Handoff]]:
        return [(part, handoff) for part, handoff in self.handoffs if any(t == target for _, t in handoff.pairs)]

    def _frozen_places(self, target: int) -> Tensor | None:
        """Return where handoffs keep a target's denominators, (batch, position, 1); None where none does."""
        frozen = [part for part, handoff in self._handed(target) if handoff.norm == "frozen"]
        return torch.stack([self._places_of(part) for part in frozen]).any(0)[..., None] if frozen else None

    def _places_of(self, part: Part) -> Tensor:
        assert self.now is not None
        return places_of(part, self.now, self.run.natural if self.run is not None else {})

    def _without_handoffs(self, target: int, x: Tensor) -> Tensor:
        for part, handoff in self._handed(target):
            where = self._places_of(part)
            removed = self._removed(handoff, [source for source, t in handoff.pairs if t == target], target)
            x = torch.where(where.to(x.device)[..., None], x - removed.to(x), x)
        return x

    def _removed(self, handoff: Handoff, sources: Sequence[int], target: int) -> Tensor:
        """Return what a handoff takes from what a target reads, (batch, position, d)."""
        parts = []
        for source in sources:
            if handoff.features is None:
                parts.append(handoff.of_output(source, self.wrote[source]))
                continue
            assert self.run is not None
            run, acts = self.run, self.features[str(source)]
            parts.append(handoff.of_features(run.crosscoder, source, target, acts, run.dropped))
        return torch.stack(parts).sum(0)


def _first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value
