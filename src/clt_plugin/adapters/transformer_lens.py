"""A crosscoder in a TransformerBridge. The only file that imports transformer_lens.

The bridge's modules stay as they are, and so do the meanings of its hooks. Each site that is read is one of the
bridge's hook points: a torch hook there, kept last, sees the value after every hook of the user's. Where an MLP's
output is due, the ``forward`` of the Hugging Face module that the bridge wraps is shadowed on the instance, so that
the original need not run. The crosscoder's own hook points stand in the bridge's registry, as
``blocks.{l}.clt.hook_features`` and so on, and not in its tree of modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from clt_plugin.adapters._handle import Handle
from clt_plugin.adapters._run import POINTS, Run, encoded_at_mlp, group_labels, point_labels
from clt_plugin.adapters.huggingface import HostModel, check_fits, excluded_positions
from clt_plugin.adapters.sites import Place, normalise
from clt_plugin.core.crosscoder import Crosscoder
from clt_plugin.core.errors import AttachError
from clt_plugin.core.wiring import Site

HOOKS = dict(zip(POINTS, ("hook_in", "hook_pre", "hook_features", "hook_recon", "hook_error"), strict=True))
"""TransformerLens's names of the points."""

REFUSED = ("enable_compatibility_mode", "process_weights")

Undo = list[Callable[[], Any]]


def add_clt(
    bridge: TransformerBridge,
    clt: Any,
    mode: str = "replace",
    name: str = "clt",
    *,
    layers: Iterable[int] | None = None,
    features: Mapping[int, Sequence[int]] | None = None,
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

    Returns:
        A handle; ``handle.remove()`` leaves the bridge as it was.

    Raises:
        AttachError: The crosscoder does not fit, or cannot be attached so; the bridge is as it was.
    """
    if not isinstance(clt, Crosscoder):
        from clt_plugin.hub import load

        clt = load(clt)
    if layers is not None or features is not None:
        clt = clt.select(layers, features)
    _refuse_processed_weights(bridge)
    host = check_fits(clt, bridge.original_model, mode)
    labels = point_labels(clt.wiring)
    _check_room(bridge, clt, mode, name, labels)
    undo: Undo = []

    def detach() -> None:
        while undo:
            undo.pop()()

    try:
        points = {label: _mount(bridge, label, name, undo) for label in labels}
        _attach(bridge, clt, mode, host, points, undo)
        _guard(bridge, undo)
    except BaseException:
        detach()
        raise
    return Handle(clt, name, mode, points, detach)


def _refuse_processed_weights(bridge: TransformerBridge) -> None:
    if any(getattr(module, "_use_processed_weights", False) for module in bridge.modules()):
        raise AttachError(
            "this bridge's weights were processed (compatibility mode folds norms into them), which changes what a "
            "crosscoder reads and writes: boot the model again and attach without compatibility mode"
        )


def _check_room(bridge: TransformerBridge, clt: Crosscoder, mode: str, name: str, labels: Iterable[str]) -> None:
    """Refuse a name that is taken, or a layer that another crosscoder replaces already."""
    if not name.isidentifier() or name.startswith("_"):
        raise AttachError(f"the name {name!r} cannot be part of a hook's name: choose a plain identifier")
    for block in bridge.blocks:
        if hasattr(block, name):
            raise AttachError(f"the name {name!r} is taken on this bridge: remove what holds it, or pass another name=")
    if mode == "observe":
        return
    for layer in sorted({site.layer for site in clt.wiring.write_sites}):
        if "forward" in bridge.blocks[layer].mlp.original_component.__dict__:
            raise AttachError(
                f"the MLP of layer {layer} is replaced already, or its Hugging Face model is wrapped by another "
                "library: remove that first (a bridge changes its model, which nothing else should share), or use "
                "mode='observe'"
            )


# ---------------------------------------------------------------- points


def _mount(bridge: TransformerBridge, label: str, name: str, undo: Undo) -> SimpleNamespace:
    """Put a label's hook points into the bridge's registry, and within reach as ``bridge.blocks[l].clt``."""
    layer, _, rest = label.partition("_")
    own = f"{name}_{rest}" if rest else name
    points = SimpleNamespace(**{hook: HookPoint() for hook in HOOKS.values()})
    for hook, point in vars(points).items():
        point.name = f"blocks.{layer}.{own}.{hook}"
        bridge._hook_registry[point.name] = point
        undo.append(lambda key=point.name: bridge._hook_registry.pop(key, None))
    # Into the instance's dictionary: set as an attribute it would count as a submodule.
    holder = bridge.blocks[int(layer)].__dict__
    holder[own] = points
    undo.append(lambda: holder.pop(own, None))
    return points


class _LastHook:
    """A hook that sees what a hook point holds after every other hook on it, whenever those were added."""

    def __init__(self, owner: nn.Module, point: HookPoint, see: Callable[[Tensor], None]) -> None:
        self.point = point
        self.see = see
        self.handle = point.register_forward_hook(self._seen)
        # Torch runs hooks in the order of registration: registering anew just before the point fires makes it last.
        self.renewal = owner.register_forward_pre_hook(self._renew)

    def _seen(self, module: nn.Module, args: Any, output: Any) -> None:
        self.see(output)

    def _renew(self, *args: Any) -> None:
        self.handle.remove()
        self.handle = self.point.register_forward_hook(self._seen)

    def remove(self) -> None:
        self.handle.remove()
        self.renewal.remove()


# ---------------------------------------------------------------- the run


def _attach(
    bridge: TransformerBridge,
    clt: Crosscoder,
    mode: str,
    host: HostModel,
    points: Mapping[str, SimpleNamespace],
    undo: Undo,
) -> None:
    """Hook the sites that are read, and shadow the MLPs that are written."""
    run, wiring = Run(clt, mode), clt.wiring
    places = host.architecture.places(host.parallel)
    labels = group_labels(wiring)

    def visitor(label: str) -> Callable[[str, Tensor], Tensor]:
        return lambda name, value: getattr(points[label], HOOKS[name])(value)

    def encode(chosen: Iterable[int]) -> None:
        for g in chosen:
            run.encode(g, visitor(labels[g]))

    def read(site: Site) -> None:
        place = places[site.name]
        owner, point = _hook_point(bridge, site, place, host)
        norm = owner.original_component if place.before_gain else None
        due = [g for g, reads in enumerate(wiring.reads) if site in reads and not encoded_at_mlp(wiring, g)]

        def see(value: Tensor) -> None:
            value = value[0] if isinstance(value, tuple) else value
            run.read(site, value if norm is None else normalise(norm, host.architecture.centred, value))
            encode(due)

        undo.append(_LastHook(owner, point, see).remove)

    def shadow(layer: int, due: list[int], site: Site | None) -> None:
        block = bridge.blocks[layer]
        mlp = block.mlp.original_component
        target = _component(block, places[site.name].module, host).original_component if site else mlp

        def at_mlp(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            encode(due)
            if target is not mlp and site is not None and run.ready(site) and not run.keeps_some_outputs:
                return torch.zeros_like(x)  # not needed: the post-norm's output is replaced
            return at_target(x, *args, **kwargs) if target is mlp else type(mlp).forward(mlp, x, *args, **kwargs)

        def at_target(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if site is None or not run.ready(site):
                return type(target).forward(target, x, *args, **kwargs)
            visit = visitor(str(layer))
            if not run.keeps_some_outputs:
                return run.output(site, x, visit)
            true = type(target).forward(target, x, *args, **kwargs)
            return run.output(site, true, visit, true)

        _shadow_forward(mlp, at_mlp, undo)
        if target is not mlp:
            _shadow_forward(target, at_target, undo)

    backbone = bridge.original_model.get_submodule(host.backbone)

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        shape = tuple((ids if ids is not None else kwargs["inputs_embeds"]).shape[:2])
        run.begin(excluded_positions(clt.host.exclude_first, kwargs, shape))

    undo.append(backbone.register_forward_pre_hook(begin, with_kwargs=True).remove)
    undo.append(backbone.register_forward_hook(lambda *_: run.clear(), always_call=True).remove)
    for site in wiring.read_sites:
        read(site)
    written = {site.layer: site for site in wiring.write_sites} if mode != "observe" else {}
    at_mlp_groups = [g for g in range(wiring.n_groups) if encoded_at_mlp(wiring, g)]
    for layer in sorted({*written, *(wiring.home[g] for g in at_mlp_groups)}):
        shadow(layer, [g for g in at_mlp_groups if wiring.home[g] == layer], written.get(layer))


def _component(block: nn.Module, name: str, host: HostModel) -> nn.Module:
    """Return the bridge's component for a module of the family's table."""
    row = host.architecture
    generic = {
        "": "",
        row.attention: "attn",
        row.post_attention_norm: "ln1_post",
        row.pre_mlp_norm: "ln2",
        row.mlp: "mlp",
        row.post_mlp_norm: "ln2_post",
    }[name]
    return getattr(block, generic) if generic else block


def _hook_point(bridge: TransformerBridge, site: Site, place: Place, host: HostModel) -> tuple[nn.Module, HookPoint]:
    """Return the hook point that holds a site, and the component that fires it."""
    component = _component(bridge.blocks[site.layer], place.module, host)
    return component, component.hook_in if place.side == "input" else component.hook_out


def _shadow_forward(module: nn.Module, forward: Callable[..., Any], undo: Undo) -> None:
    """Shadow a module's forward on the instance: neither its class nor the tree of modules changes."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward

    def restore() -> None:
        if before is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = before

    undo.append(restore)


def _guard(bridge: TransformerBridge, undo: Undo) -> None:
    """Refuse, while a crosscoder is attached, what would change the weights under it."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AttachError(
            "a crosscoder is attached, and processing weights would change what it reads and writes: remove it first"
        )

    for name in REFUSED:
        if name not in bridge.__dict__:
            bridge.__dict__[name] = refuse
            undo.append(lambda name=name: bridge.__dict__.pop(name, None))
