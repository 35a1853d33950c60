"""A crosscoder in an nnsight model. The only file that imports nnsight.

No module of the model changes. A crosscoder is a set of workers, as nnsight's own interventions are, that ride
along with a run: for each site read one *reader*, last in line there, so that it sees every edit of the user's;
for each layer a *gate*, first in line at the MLP's skip gate, which encodes, decodes and puts the reconstruction in
place of the MLP. An nnsight edit starts them on every run; called inside a trace, they run in that one alone. The
points that users read and edit are modules without parameters under an envoy of their own.

Everything private that is used of nnsight is used here, in `_start` and below `_mount`, and tested.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from nnsight import Envoy
from nnsight.intervention.interleaver import Mediator, OutOfOrderError
from nnsight.intervention.tracer import InterleavingTracer
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from clt_plugin.adapters._handle import Handle
from clt_plugin.adapters._run import POINTS, Run, encoded_at_mlp, group_labels, point_labels
from clt_plugin.adapters.huggingface import HostModel, check_fits, crosscoder_for, excluded_positions, pass_of
from clt_plugin.adapters.sites import normalise
from clt_plugin.core.crosscoder import Crosscoder
from clt_plugin.core.errors import AttachError
from clt_plugin.core.wiring import Site

# A class that travels to a remote model is rebuilt from its source, where super() without arguments has no cell
# to look into: hence nn.Module.__init__(self) below.


class Point(nn.Module):
    """A value on show: read, saved and edited at its ``.output``."""

    def forward(self, x: Tensor) -> Tensor:
        """Pass the value on."""
        return x


class PointLayer(nn.Module):
    """The points of one layer."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        for name in POINTS:
            self.add_module(name, Point())


class Points(nn.Module):
    """The points of a crosscoder, by layer."""

    def __init__(self, labels: Iterable[str]) -> None:
        nn.Module.__init__(self)
        self.layers = nn.ModuleDict({label: PointLayer() for label in labels})


class CLTEnvoy(Envoy):
    """The envoy of the points.

    It travels by recipe, not by module path: a remote model has no module at that path.

    Attributes:
        mode: As for `add_clt`.
        written: The layers whose MLP outputs it writes.
        rows: The rows of the batch that it concerns, as nnsight notes them; None for all.
        stored: The edit that starts its workers; None where it acts in one run alone.
        crosscoder: The crosscoder; None at a remote model, since it does not travel with the envoy.
    """

    def __reduce__(self) -> Any:
        return (_envoy, (self.interleaver, self.path, tuple(self.layers._module), self.mode, self.written))


class PointEnvoy(Envoy):
    """The envoy of a layer's points, or of one: it travels as the way to it from the `CLTEnvoy`."""

    def __reduce__(self) -> Any:
        return (_below, (self.root, self.path.removeprefix(f"{self.root.path}.")))


def _envoy(interleaver: Any, path: str, labels: tuple[str, ...], mode: str, written: tuple[int, ...]) -> CLTEnvoy:
    envoy = CLTEnvoy(Points(labels), path=path, interleaver=interleaver, envoys=PointEnvoy)
    envoy.mode, envoy.written, envoy.rows, envoy.stored, envoy.crosscoder = mode, written, None, None, None
    return envoy


def _below(envoy: CLTEnvoy, path: str) -> PointEnvoy:
    return envoy.get(path)


# ---------------------------------------------------------------- add_clt


def add_clt(
    model: Envoy,
    clt: Any,
    mode: str = "replace",
    name: str = "clt",
    *,
    layers: Iterable[int] | None = None,
    features: Mapping[int, Sequence[int]] | None = None,
    edits: Any = None,
) -> Handle:
    """Make a crosscoder part of an nnsight model.

    Outside a trace it stays until removed. As the first line of a trace's or an invoke's body it acts in that alone.

    Args:
        model: An nnsight model over a transformers model.
        clt: A `Crosscoder`, a folder, or an ``hf://`` reference.
        mode: ``"replace"`` puts the reconstruction in place of each MLP's output; ``"replace_with_error"`` adds the
            error back, so that the output is unchanged until a feature is edited; ``"observe"`` only encodes.
        name: The attribute of the model under which the points are found: ``model.clt.layers[3].features.output``.
        layers: Attach the groups of these layers alone (see `Crosscoder.select`).
        features: Attach these features alone, by layer.
        edits: What to edit in every run (see `clt_plugin.interventions`), before users' own edits of the points.

    Returns:
        A handle; ``handle.remove()`` leaves the model as it was.

    Raises:
        AttachError: The crosscoder does not fit, or cannot be attached so; the model is as it was.
    """
    clt = crosscoder_for(clt, layers, features)
    host = check_fits(clt, model._module, mode, edits)
    worker = _worker()
    if worker is not None and worker.pending is not None:
        raise AttachError("inside a trace, add_clt must be the body's first line, before anything is read or edited")
    if worker is None and _collecting_invokes():
        raise AttachError(
            "in the body of a trace() without an input there is no run yet: call add_clt before the trace, or as the "
            "first line of an invoke's body"
        )
    rows = None if worker is None else worker.batch_group
    _check_room(model, clt, mode, name, rows)
    envoy = _mount(model, clt, mode, name, rows)
    object.__setattr__(envoy, "crosscoder", clt)  # set plainly, a module would be wrapped in an envoy of its own
    if worker is None:
        try:
            # This block is stored, and replayed at the start of every run.
            with model.edit(inplace=True):
                drive(model, clt, mode, envoy, host, None, edits)
        except BaseException:
            _unmount(model, envoy, name)
            raise
        envoy.stored = model._edits[-1]
    else:
        _start(lambda: _until_the_end(lambda: _unmount(model, envoy, name)), model, None, first=False)
        drive(model, clt, mode, envoy, host, rows, edits)

    def detach() -> None:
        if envoy.stored in model._edits:
            model._edits.remove(envoy.stored)
        _unmount(model, envoy, name)

    return Handle(clt, name, mode, envoy.layers, detach if worker is None else None)


def attached(model: Envoy) -> dict[str, Crosscoder]:
    """Return the crosscoders that stay in a model until they are removed, by name."""
    children = [child for child in model._children if isinstance(child, CLTEnvoy) and child.stored in model._edits]
    return {child.path.rpartition(".")[2]: child.crosscoder for child in children}


def _check_room(model: Envoy, clt: Crosscoder, mode: str, name: str, rows: Any) -> None:
    """Refuse a name that is taken, or a layer that another crosscoder replaces already in the same rows."""
    for child in list(model._children):
        if isinstance(child, CLTEnvoy) and child.stored is not None and child.stored not in model._edits:
            _unmount(model, child, child.path.rpartition(".")[2])  # left over by model.clear_edits()
    if not name.isidentifier() or name.startswith("_"):
        raise AttachError(f"the name {name!r} cannot be an attribute: choose a plain identifier")
    if hasattr(type(model), name) or name in model.__dict__ or hasattr(model._module, name):
        raise AttachError(f"the name {name!r} is taken on this model: remove what holds it, or pass another name=")
    if mode == "observe":
        return
    written = {site.layer for site in clt.wiring.write_sites}
    for child in model._children:
        if not isinstance(child, CLTEnvoy) or child.mode == "observe":
            continue
        taken = sorted(written & set(child.written))
        # Two invokes of one trace have different rows, and None stands for all of them.
        if taken and (None in (rows, child.rows) or rows == child.rows):
            raise AttachError(
                f"{child.path.rpartition('.')[2]!r} writes the MLP outputs of layers {taken} already: remove it, or "
                "attach one of the two with mode='observe'"
            )


# ---------------------------------------------------------------- the workers


def drive(
    model: Envoy, clt: Crosscoder, mode: str, points: CLTEnvoy, host: HostModel, group: Any, edits: Any = None
) -> None:
    """Start the workers that put a crosscoder into the run that is about to begin.

    Args:
        model: The model, whose run it is.
        clt: The crosscoder.
        mode: As for `add_clt`.
        points: Its points.
        host: What the model is.
        group: The rows of the batch that it concerns, as nnsight notes them; None for all.
        edits: As for `add_clt`.
    """
    run, wiring = Run(clt, mode, edits), clt.wiring
    backbone = model.get(host.backbone) if host.backbone else model
    blocks = model.get(host.blocks)
    places = host.architecture.places(host.parallel)
    labels = group_labels(wiring)

    def visitor(label: str) -> Callable[[str, Tensor], Tensor]:
        layer = points.layers[label]
        return lambda name, value: getattr(layer, name)(value, hook=True)

    def encode(chosen: Iterable[int]) -> None:
        for g in chosen:
            run.encode(g, visitor(labels[g]))

    def module(layer: int, name: str) -> Envoy:
        return getattr(blocks[layer], name) if name else blocks[layer]

    def reader(site: Site) -> Callable[[], None]:
        place = places[site.name]
        source = module(site.layer, place.module)
        due = [g for g, reads in enumerate(wiring.reads) if site in reads and not encoded_at_mlp(wiring, g)]

        def read() -> None:
            value = getattr(source, place.side)
            value = value[0] if isinstance(value, tuple) else value
            if place.before_gain:
                value = normalise(source._module, host.architecture.centred, value)
            run.read(site, value)
            # A group whose last read this is can be encoded at once; `encode` passes over the others.
            encode(due)

        return read

    def gate(layer: int, due: list[int], site: Site | None) -> Callable[[], None]:
        mlp = module(layer, host.architecture.mlp)
        target = module(layer, places[site.name].module) if site else mlp

        def pass_gate() -> None:
            like = Mediator.value(f"{mlp.path}.input")
            Mediator.value(f"{mlp.path}.skip")
            encode(due)
            if site is None or not run.ready(site):
                return
            like = like[0][0] if like[0] else next(iter(like[1].values()))
            visit = visitor(str(layer))
            if run.keeps_some_outputs:
                true = target.output
                target.output = run.output(site, true, visit)
            elif _shares_batch(model, group):
                # A skip would have to cover every row of the batch, and this crosscoder has only some of them.
                target.output = run.output(site, like, visit)
            elif target is mlp:
                mlp.skip(run.output(site, like, visit))
            else:
                y = run.output(site, like, visit)
                mlp.skip(torch.zeros_like(y))
                Mediator.value(f"{target.path}.skip")
                target.skip(y)

        return pass_gate

    def begin() -> None:
        args, kwargs = backbone.inputs
        ids = args[0] if args else kwargs.get("input_ids")
        shape = tuple((ids if ids is not None else kwargs["inputs_embeds"]).shape[:2])
        # A scan has shapes and no values, so that no mask can be looked at.
        if detect_fake_mode() is not None:
            run.begin(None)
            return
        now = None if edits is None else pass_of(kwargs, ids, shape)
        run.begin(excluded_positions(clt.host.exclude_first, kwargs, shape), now)

    for site in wiring.read_sites:
        _start(reader(site), model, group, first=False)
    written = {site.layer: site for site in wiring.write_sites} if mode != "observe" else {}
    at_mlp = [g for g in range(wiring.n_groups) if encoded_at_mlp(wiring, g)]
    for layer in sorted({*written, *(wiring.home[g] for g in at_mlp)}):
        due = [g for g in at_mlp if wiring.home[g] == layer]
        _start(gate(layer, due, written.get(layer)), model, group, first=True)
    _start(begin, model, group, first=True, finally_=run.clear)


def _shares_batch(model: Envoy, group: Any) -> bool:
    batcher = model.interleaver.batcher
    return group is not None and batcher is not None and batcher.batching


def _forever(visit: Callable[[], None], finally_: Callable[[], None] | None) -> None:
    """Follow the model through every forward pass of a run, and end without a word when it ends."""
    me, n = Mediator.current("clt"), 0
    try:
        while True:
            me.iteration = n  # pinned: a second request within one visit would otherwise match it again
            visit()
            n += 1
    except OutOfOrderError:
        pass
    finally:
        if finally_ is not None:
            finally_()


def _start(
    visit: Callable[[], None],
    model: Envoy,
    group: Any,
    first: bool,
    finally_: Callable[[], None] | None = None,
) -> None:
    """Start a worker that calls ``visit`` once a forward pass: before all other workers in line, or after them."""
    scope = {"forever": _forever, "visit": visit, "finally_": finally_}
    worker = Mediator(compile("forever(visit, finally_)", "<clt_plugin>", "exec"), {}, scope)
    worker.batch_group = group
    interleaver = model.interleaver
    others = list(interleaver.mediators)
    # A new list, since nnsight may be iterating over the old one.
    interleaver.mediators = [worker, *others] if first else [*others, worker]
    worker.start(interleaver)


def _until_the_end(then: Callable[[], None]) -> None:
    """Park until the run is over, however it ends."""
    try:
        Mediator.value("clt_plugin: the end of the run")
    finally:
        then()


# ---------------------------------------------------------------- nnsight's private side


def _worker() -> Mediator | None:
    """Return the worker whose code is running, or None outside a run."""
    try:
        return Mediator.current("clt")
    except ValueError:
        return None


def _collecting_invokes() -> bool:
    """Whether the code running is the body of a trace() that is collecting its invokes."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is InterleavingTracer.execute.__code__:
            return True
        frame = frame.f_back
    return False


def _mount(model: Envoy, clt: Crosscoder, mode: str, name: str, rows: Any) -> CLTEnvoy:
    """Hang an envoy of the points into the model's tree of envoys; its tree of modules stays as it is."""
    written = tuple(sorted({site.layer for site in clt.wiring.write_sites}))
    envoy = _envoy(model.interleaver, f"{model.path}.{name}", point_labels(clt.wiring), mode, written)
    envoy.rows = rows
    model._children.append(envoy)
    object.__setattr__(model, name, envoy)
    return envoy


def _unmount(model: Envoy, envoy: CLTEnvoy, name: str) -> None:
    model._children[:] = [child for child in model._children if child is not envoy]
    if model.__dict__.get(name) is envoy:
        del model.__dict__[name]
