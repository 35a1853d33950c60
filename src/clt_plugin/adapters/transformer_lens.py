"""A crosscoder in a TransformerBridge. The only file that imports transformer_lens.

The bridge's modules stay as they are, and so do the meanings of its hooks. Each site that is read is one of the
bridge's hook points: a torch hook there, kept last, sees the value after every hook of the user's. Where an MLP's
output is due, the ``forward`` of the Hugging Face module that the bridge wraps is shadowed on the instance, so that
the original need not run. The crosscoder's own hook points stand in the bridge's registry, as
``blocks.{l}.clt.hook_features`` and so on, and not in its tree of modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from clt_plugin.adapters._handle import Handle
from clt_plugin.adapters._run import POINTS, Run, encoded_at_mlp, group_labels, point_labels
from clt_plugin.adapters.huggingface import HostModel, check_fits, crosscoder_for, excluded_positions, pass_of
from clt_plugin.adapters.sites import normalise
from clt_plugin.core.crosscoder import Crosscoder
from clt_plugin.core.errors import AttachError
from clt_plugin.core.wiring import Site

HOOKS = dict(zip(POINTS, ("hook_in", "hook_pre", "hook_features", "hook_recon", "hook_error"), strict=True))
"""TransformerLens's names of the points."""

REFUSED = ("enable_compatibility_mode", "process_weights")
"""What would change a bridge's weights, or drop hook points from its registry."""


def add_clt(
    bridge: TransformerBridge,
    clt: Any,
    mode: str = "replace",
    name: str = "clt",
    *,
    layers: Iterable[int] | None = None,
    features: Mapping[int, Sequence[int]] | None = None,
    edits: Any = None,
) -> Handle:
    """Make a crosscoder part of a TransformerBridge, until it is removed.

    Args:
        bridge: The model.
        clt: A `Crosscoder`, a folder, or an ``hf://`` reference.
        mode: ``"replace"`` puts the reconstruction in place of each MLP's output; ``"replace_with_error"`` adds the
            error back, so that the output is unchanged until a feature is edited; ``"observe"`` only encodes.
        name: The part of the hook names: ``blocks.3.clt.hook_features``.
        layers: Attach the groups of these layers alone (see `Crosscoder.select`).
        features: Attach these features alone, by layer.
        edits: What to edit in every run (see `clt_plugin.interventions`), before users' own hooks on the points.

    Returns:
        A handle; ``handle.remove()`` leaves the bridge as it was.

    Raises:
        AttachError: The crosscoder does not fit, or cannot be attached so; the bridge is as it was.
    """
    clt = crosscoder_for(clt, layers, features)
    if bridge._weights_processed:
        raise AttachError(
            "this bridge's weights were processed (compatibility mode folds norms into them), which changes what a "
            "crosscoder reads and writes: boot the model again and attach without it, or with "
            "enable_compatibility_mode(no_processing=True)"
        )
    host = check_fits(clt, bridge.original_model, mode, edits)
    _check_room(bridge, clt, mode, name)
    attached = _Attached(bridge, clt, mode, name, host, edits)
    try:
        attached.attach()
    except BaseException:
        attached.detach()
        raise
    by_layer = {int(label) if label.isdigit() else label: points for label, points in attached.points.items()}
    return Handle(clt, name, mode, by_layer, attached.detach)


def attached(bridge: TransformerBridge) -> dict[str, Crosscoder]:
    """Return the crosscoders in a bridge, by name."""
    found: dict[str, Crosscoder] = {}
    for block in bridge.blocks:
        for points in vars(block).values():
            if isinstance(points, SimpleNamespace) and hasattr(points, "_run"):
                found.setdefault(points._name, points._run.crosscoder)
    return found


def _check_room(bridge: TransformerBridge, clt: Crosscoder, mode: str, name: str) -> None:
    """Refuse a name that is taken, or a layer that another crosscoder replaces already."""
    if not name.isidentifier() or name.startswith("_"):
        raise AttachError(f"the name {name!r} cannot be part of a hook's name: choose a plain identifier")
    for own in {name, *(_own_name(name, label) for label in point_labels(clt.wiring))}:
        if any(hasattr(block, own) for block in bridge.blocks):
            raise AttachError(f"the name {own!r} is taken on this bridge: remove what holds it, or pass another name=")
    if mode == "observe":
        return
    for layer in sorted({site.layer for site in clt.wiring.write_sites}):
        if "forward" in bridge.blocks[layer].mlp.original_component.__dict__:
            raise AttachError(
                f"the MLP of layer {layer} is replaced already, or its Hugging Face model is wrapped by another "
                "library: remove that first (a bridge changes its model, which nothing else should share), or use "
                "mode='observe'"
            )


def _own_name(name: str, label: str) -> str:
    """Return the name under which a label's points stand in their block: ``clt``, or ``clt_1`` for a second group."""
    return "_".join([name, *label.split("_")[1:]])


class _Attached:
    """One crosscoder in one bridge: what it hooks and shadows there, and how to undo that.

    Args:
        bridge: The model.
        clt: The crosscoder.
        mode: As for `add_clt`.
        name: As for `add_clt`.
        host: What the model is.
        edits: As for `add_clt`.
    """

    def __init__(
        self, bridge: TransformerBridge, clt: Crosscoder, mode: str, name: str, host: HostModel, edits: Any = None
    ) -> None:
        self.bridge, self.clt, self.mode, self.name, self.host = bridge, clt, mode, name, host
        self.run = Run(clt, mode, edits)
        # Whether a forward pass is under way: a block or an MLP that is called by itself runs as it always did.
        self.in_pass = False
        self.places = host.architecture.places(host.parallel)
        self.labels = group_labels(clt.wiring)
        self.points: dict[str, SimpleNamespace] = {}
        self.undo: list[Callable[[], Any]] = []

    def attach(self) -> None:
        """Put everything in place; `detach` undoes as much of it as was done."""
        wiring = self.clt.wiring
        self._guard()
        for label in point_labels(wiring):
            self._mount(label)
        self._follow_passes()
        for site in wiring.read_sites:
            self._read(site)
        # After the reads, since an MLP's input may be among them.
        for layer in sorted({wiring.home[g] for g in range(wiring.n_groups) if encoded_at_mlp(wiring, g)}):
            self._encode_at_mlp(layer)
        if self.mode != "observe":
            for site in wiring.write_sites:
                self._write(site)

    def detach(self) -> None:
        """Leave the bridge as it was."""
        while self.undo:
            self.undo.pop()()
        self._end()

    # ---------------------------------------------------------------- points

    def _mount(self, label: str) -> None:
        """Put a label's hook points into the bridge's registry, and within reach as ``bridge.blocks[l].clt``."""
        layer, own = label.partition("_")[0], _own_name(self.name, label)
        points = SimpleNamespace(**{hook: HookPoint() for hook in HOOKS.values()})
        for hook, point in vars(points).items():
            point.name = f"blocks.{layer}.{own}.{hook}"
            self._put(self.bridge._hook_registry, point.name, point)
        # For edits as hooks, which ask it what passes through the model.
        points._run, points._name = self.run, self.name
        # Into the instance's dictionary: set as an attribute it would count as a submodule.
        self._put(self.bridge.blocks[int(layer)].__dict__, own, points)
        self.points[label] = points

    def _visitor(self, label: str) -> Callable[[str, Tensor], Tensor]:
        return lambda name, value: getattr(self.points[label], HOOKS[name])(value)

    def _put(self, mapping: dict[str, Any], key: str, value: Any) -> None:
        """Set a key until `detach`."""
        had, before = key in mapping, mapping.get(key)
        mapping[key] = value
        self.undo.append(lambda: mapping.__setitem__(key, before) if had else mapping.pop(key, None))

    # ---------------------------------------------------------------- the run

    def _follow_passes(self) -> None:
        """Begin the run anew at each forward pass, and keep nothing of it afterwards, however it ends."""
        backbone = self.bridge.original_model.get_submodule(self.host.backbone)

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = args[0] if args else kwargs.get("input_ids")
            shape = tuple((ids if ids is not None else kwargs["inputs_embeds"]).shape[:2])
            excluded = excluded_positions(self.clt.host.exclude_first, kwargs, shape)
            self.run.begin(excluded, pass_of(kwargs, ids, shape))
            self.in_pass = True

        self.undo.append(backbone.register_forward_pre_hook(begin, with_kwargs=True).remove)
        self.undo.append(backbone.register_forward_hook(lambda *_: self._end(), always_call=True).remove)

    def _end(self) -> None:
        self.in_pass = False
        self.run.clear()

    def _read(self, site: Site) -> None:
        """Take what a site holds, once all of the user's hooks there have run."""
        place = self.places[site.name]
        component = self._component(site.layer, place.module)
        if place.before_gain:
            self._read_normalised(site, component)
            return
        point = component.hook_in if place.side == "input" else component.hook_out
        self._last(component, point, lambda value: self._take(site, value))

    def _read_normalised(self, site: Site, norm: Any) -> None:
        """Take a norm's input once normalised.

        The bridge has it too, at ``hook_normalized``, but without gradients: unless someone's hook there, or on the
        scale, asks for them and may edit it.
        """
        dtype = torch.float32

        def hooked() -> bool:
            return norm.hook_scale.has_hooks() or norm.hook_normalized.has_hooks()

        def at_input(x: Tensor) -> None:
            nonlocal dtype
            dtype = x.dtype
            if not hooked():
                self._take(site, normalise(norm.original_component, self.host.architecture.centred, x))

        def at_normalised(value: Tensor) -> None:
            if hooked():
                self._take(site, value.to(dtype))

        self._last(norm, norm.hook_in, at_input)
        self._last(norm, norm.hook_normalized, at_normalised)

    def _take(self, site: Site, value: Tensor) -> None:
        # Blocks before start_at_layer run on input that means nothing, and what they write is thrown away.
        start = getattr(self.bridge.blocks[site.layer], "_start_at_layer_idx", None)
        if not self.in_pass or site.layer < (start or 0):
            return
        self.run.read(site, value)
        wiring = self.clt.wiring
        # A group whose last read this is can be encoded at once; `Run.encode` passes over the others.
        self._encode([g for g, reads in enumerate(wiring.reads) if site in reads and not encoded_at_mlp(wiring, g)])

    def _encode_at_mlp(self, layer: int) -> None:
        """Encode a layer's groups once the MLP has its input."""
        wiring, mlp = self.clt.wiring, self._component(layer, self.host.architecture.mlp)
        due = [g for g in range(wiring.n_groups) if wiring.home[g] == layer and encoded_at_mlp(wiring, g)]
        self._last(mlp, mlp.hook_in, lambda _: self._encode(due))

    def _encode(self, groups: Iterable[int]) -> None:
        for g in groups:
            self.run.encode(g, self._visitor(self.labels[g]))

    def _write(self, site: Site) -> None:
        """Put the reconstruction in place of what the module at a site returns."""
        run, visit = self.run, self._visitor(str(site.layer))
        mlp = self._component(site.layer, self.host.architecture.mlp)
        target = self._component(site.layer, self.places[site.name].module)

        def output(like: Tensor, original: Callable[[], Tensor]) -> Tensor:
            if not run.ready(site):
                return original()
            return run.output(site, original() if run.keeps_some_outputs else like, visit)

        def skip(x: Tensor, original: Callable[[], Tensor]) -> Tensor:
            return torch.zeros_like(x) if run.ready(site) and not run.keeps_some_outputs else original()

        self._shadow(target.original_component, output)
        if target is mlp:
            return
        # What a post-norm would read is not needed where its output is replaced.
        self._shadow(mlp.original_component, skip)
        # Hooks on the norm's own scale make the bridge compute the norm itself, and this is where that ends.
        norm = target._apply_weight_and_bias
        self._put(
            target.__dict__, "_apply_weight_and_bias", lambda x, dtype: output(x.to(dtype), lambda: norm(x, dtype))
        )

    def _shadow(self, module: nn.Module, instead: Callable[[Tensor, Callable[[], Tensor]], Tensor]) -> None:
        """Shadow a module's forward on the instance: neither its class nor the tree of modules changes."""
        original: Callable[..., Tensor] = module.forward
        self._put(
            module.__dict__, "forward", lambda x, *args, **kwargs: instead(x, lambda: original(x, *args, **kwargs))
        )

    # ---------------------------------------------------------------- the bridge

    def _component(self, layer: int, name: str) -> Any:
        """Return the bridge's component for a module of a block, in transformers' names: it stands in its place."""
        block = self.bridge.blocks[layer]
        component = block.original_component.get_submodule(name) if name else block
        if not isinstance(getattr(component, "hook_in", None), HookPoint):
            raise AttachError(f"TransformerLens has no hook points at {name!r} of this model's blocks")
        return component

    def _last(self, component: nn.Module, point: HookPoint, see: Callable[[Tensor], None]) -> None:
        self.undo.append(_LastHook(component, point, see).remove)

    def _guard(self) -> None:
        """Refuse, while a crosscoder is attached, what would change the weights under it."""
        methods = self.bridge.__dict__
        for method in REFUSED:
            refusal = methods.setdefault(method, _Refusal(method))
            refusal.names.append(self.name)
            self.undo.append(partial(refusal.release, methods, self.name))


class _LastHook:
    """A hook that sees what a hook point holds after every other hook on it, whenever those were added."""

    def __init__(self, component: nn.Module, point: HookPoint, see: Callable[[Tensor], None]) -> None:
        self.point = point
        self.see = see
        self.handle = point.register_forward_hook(self._seen)
        # Torch runs hooks in the order of registration: registering anew just before the point fires makes it last.
        self.renewal = component.register_forward_pre_hook(self._renew)

    def _seen(self, module: nn.Module, args: Any, output: Any) -> None:
        self.see(output)

    def _renew(self, *args: Any) -> None:
        self.handle.remove()
        self.handle = self.point.register_forward_hook(self._seen)

    def remove(self) -> None:
        self.handle.remove()
        self.renewal.remove()


class _Refusal:
    """Stands in for a method of a bridge as long as crosscoders are attached to it."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.names: list[str] = []

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise AttachError(
            f"{self.method}() would change the weights that {', '.join(map(repr, self.names))} reads and writes "
            "through: remove the crosscoder first"
        )

    def release(self, methods: dict[str, Any], name: str) -> None:
        """Let go for one crosscoder; after the last, the method is the bridge's own again."""
        self.names.remove(name)
        if not self.names:
            methods.pop(self.method, None)
